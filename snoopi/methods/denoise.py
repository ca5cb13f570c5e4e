"""The denoising loss: trains teachers, and the LoRA teacher on the student's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from snoopi.conditioning import Conditioning
from snoopi.noise import Noise
from snoopi.samplers import Backbone
from snoopi.schedule import Schedule, upcast

Weight = Literal["none", "alpha_bar", "min_snr"]


def denoising_loss(
    net: Backbone,
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    cond: Conditioning,
    weight: Weight = "none",
) -> Tensor:
    """Mean squared error of the prediction at x_t (SNOOPI Eq. 3), one number per sample, fp32 [b].

    In the network's own parametrisation: eps, v or x0. x0, eps [b c h w], t int [b].
    """
    x_t = schedule.add_noise(x0, eps, t)
    error = upcast(net(x_t, t, cond)) - schedule.target(x0, eps, t)
    return error.square().flatten(1).mean(1) * loss_weight(schedule, t, weight, x0)


def loss_weight(schedule: Schedule, t: Tensor, weight: Weight, like: Tensor) -> Tensor:
    """The weight over timesteps, [b].

    "alpha_bar" is SwiftBrush's for eps-prediction. "min_snr" is min(SNR, 5) for x0-prediction
    (Hang et al., 2023) carried over to eps and v.
    """
    alpha, sigma = schedule.alpha_sigma(t, like)
    abar, var = alpha.flatten().square(), sigma.flatten().square()
    if weight == "none":
        return torch.ones_like(abar)
    if weight == "alpha_bar":
        return abar
    snr = abar / var
    if schedule.prediction == "x0":
        return snr.clamp(max=5.0)
    return snr.clamp(max=5.0) / (snr if schedule.prediction == "eps" else snr + 1)


def draw_timesteps(
    noise: Noise,
    step: int,
    indices: Sequence[int],
    bounds: tuple[int, int],
    sampling: Literal["uniform", "logit_normal"] = "uniform",
) -> Tensor:
    """Timesteps in [low, high), int64 [b].

    "logit_normal": the sigmoid of N(0, 1) stretched over the range (Esser et al., 2024, who found
    it best for rectified flow): most draws fall where text decides what the picture becomes.
    """
    low, high = bounds
    if sampling == "uniform":
        return noise.integers("t", step, indices, low, high)
    u = torch.sigmoid(noise.normal("t", step, indices).double())
    return (low + (high - low) * u).long().clamp(low, high - 1)


def drop_text(cond: Conditioning, null: Conditioning, dropped: Tensor) -> Conditioning:
    """Text dropout: rows where dropped [b] is True get the null text (batch 1)."""

    def pick(text: Tensor | None, other: Tensor | None) -> Tensor | None:
        if text is None or other is None:
            return text
        shape = (-1, *[1] * (text.dim() - 1))
        return torch.where(dropped.to(text.device).view(shape), other, text)

    return Conditioning(
        torch.where(dropped.to(cond.tokens.device)[:, None, None], null.tokens, cond.tokens),
        pick(cond.mask, null.mask),
        pick(cond.pooled, null.pooled),
        cond.size_ids,
        guidance_embed=cond.guidance_embed,
    )
