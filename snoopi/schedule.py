"""Noise schedules and what a network may predict.

x_t = alpha_t x0 + sigma_t eps (SNOOPI Eq. 1), alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t).
Conversions run in fp32 or better: at t = 999 an error of the prediction is amplified by
sigma/alpha = 14.6 (Stable Diffusion) or 157 (PixArt).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["eps", "v", "x0", "flow"]
Betas = Literal["scaled_linear", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule of `steps` timesteps and what the network predicts with it.

    prediction: "eps"; "v" = alpha eps - sigma x0; "x0"; "flow", the velocity of a rectified flow,
    which has no place in such a schedule: only the sampler "flow" reads it.
    """

    betas: Betas = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    prediction: Prediction = "eps"

    def __post_init__(self) -> None:
        for name, kinds in (("betas", Betas), ("prediction", Prediction)):
            if getattr(self, name) not in get_args(kinds):
                expected = ", ".join(get_args(kinds))
                raise ValueError(f"{name} must be one of {expected}, got {getattr(self, name)!r}")

    def alpha_bar(self) -> Tensor:
        """abar_t, float64 [steps]: the product of 1 - beta up to and with t."""
        if self.betas == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        else:
            low, high = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            betas = torch.linspace(low, high, self.steps, dtype=torch.float64) ** 2
        return torch.cumprod(1 - betas, dim=0)

    def alpha_sigma(
        self, t: Tensor, like: Tensor, abar: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of integer timesteps t [b], shaped to multiply `like` [b ...].

        float32, or float64 if `like` is; on like's device. abar: abar_t in place of the schedule's
        (SwiftBrush and DMD2 rounded abar_999 to 0.0047).
        """
        if self.prediction == "flow":
            raise ValueError("a rectified flow has no alpha_t and sigma_t: use the sampler 'flow'")
        found = self.alpha_bar()[t.cpu()]
        found = found if abar is None else torch.full_like(found, abar)
        abar_t = found.view(-1, *[1] * (like.dim() - 1))  # [b 1 1 1]
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        alpha, sigma = abar_t.sqrt(), (1 - abar_t).sqrt()
        return alpha.to(like.device, dtype), sigma.to(like.device, dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps (Eq. 1); x0, eps [b ...], t int [b]."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for x_t."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[self.prediction]

    def to_x0(
        self, prediction: Tensor, x_t: Tensor, t: Tensor, abar: float | None = None
    ) -> Tensor:
        """The clean latent that a prediction at x_t means; fp32 or better. abar: alpha_sigma's."""
        pred, x_t = upcast(prediction), upcast(x_t)
        alpha, sigma = self.alpha_sigma(t, x_t, abar)
        if self.prediction == "eps":
            return (x_t - sigma * pred) / alpha
        return alpha * x_t - sigma * pred if self.prediction == "v" else pred

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at x_t means; fp32 or better."""
        pred, x_t = upcast(prediction), upcast(x_t)
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.prediction == "x0":
            return (x_t - alpha * pred) / sigma
        return alpha * pred + sigma * x_t if self.prediction == "v" else pred


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or as it is if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
