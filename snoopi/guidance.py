"""Guidance: classifier-free guidance of predictions, and of attention (NASA, NAG, VSF).

The `combine` of each dataclass is the formula in plain torch: the oracle of the fused op, and what
runs where no fused path exists. z is an attention output before the output projection, [b m h d];
lse is the log-sum-exp of its logits, [b m h].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def cfg(conditional: Tensor, unconditional: Tensor, kappa: Tensor | float) -> Tensor:
    """Classifier-free guidance (SNOOPI Eq. 4; Eq. 5 with a negative prompt as the unconditional).

    (1 - kappa) unconditional + kappa conditional, written as u + kappa (c - u). kappa: a number or
    [b]. kappa below 1 is real guidance too: there is no shortcut.
    """
    if isinstance(kappa, Tensor):
        kappa = kappa.to(conditional).view(-1, *[1] * (conditional.dim() - 1))  # [b 1 1 1]
    return unconditional + kappa * (conditional - unconditional)


@dataclass(frozen=True)
class NASA:
    """Negative-Away Steer Attention (SNOOPI Eq. 10): Z+ - alpha Z-, then the output projection.

    scale: alpha; a number, or one per cross-attention in forward order [layers].
    centred: Z+ - alpha (Z- - Z0), Z0 the attention to the null prompt. An empty negative then
    changes nothing, and more of what the prompt leaves open survives at equal removal.
    """

    scale: float | Tensor = 0.5
    centred: bool = False

    @property
    def needs_null(self) -> bool:
        """Whether the null prompt must be given."""
        return self.centred

    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor:
        """z [b m h d] of one layer: `scale` must be a number here, or [b m] (a region)."""
        scale = _per_query(self.scale)
        if not self.centred:
            return z_pos - scale * z_neg
        if z_null is None:
            raise ValueError("centred NASA needs the attention to the null prompt, z_null")
        return z_pos - scale * (z_neg - z_null)


@dataclass(frozen=True)
class NAG:
    """Normalized Attention Guidance: extrapolate, clip the norm, blend (Chen et al., 2025).

    z = Z+ + phi (Z+ - Z-); its norm over all heads of a token is kept below tau times that of Z+;
    out = blend z + (1 - blend) Z+. phi is the paper's; "nag_scale" elsewhere is phi + 1.
    norm_p: 1 as in the paper, 2 as in the authors' Flux code.
    """

    phi: float | Tensor = 2.0
    tau: float = 2.5
    blend: float = 0.375
    norm_p: int = 1
    needs_null: ClassVar[bool] = False

    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor:
        """z [b m h d] of one layer; z_pos where there is no negative key (lse- = -inf)."""
        z = z_pos + _per_query(self.phi) * (z_pos - z_neg)
        norm_pos = z_pos.float().flatten(-2).norm(p=self.norm_p, dim=-1)  # [b m]
        norm = z.float().flatten(-2).norm(p=self.norm_p, dim=-1)  # [b m]
        # min(R, tau) / R without dividing by R = norm / norm_pos, which is 0/0 on a masked row.
        shrink = torch.where(norm > self.tau * norm_pos, self.tau * norm_pos / norm, 1.0)
        z = z * shrink[..., None, None].to(z.dtype)
        z = self.blend * z + (1 - self.blend) * z_pos
        if lse_neg is None:
            return z
        return torch.where((lse_neg == -torch.inf)[..., None], z_pos.to(z.dtype), z)


@dataclass(frozen=True)
class VSF:
    """Value Sign Flip: one softmax over [K+; K-] with values [V+; -scale V-] (Guo and Du, 2025).

    With W = sigmoid(lse+ - lse- + bias) it equals W Z+ - scale (1 - W) Z-. bias lowers the
    negative logits.
    """

    scale: float | Tensor = 3.0
    bias: float = 0.1
    needs_null: ClassVar[bool] = False

    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor:
        """z [b m h d] of one layer; needs both lse [b m h]. Without a negative key W = 1."""
        if lse_pos is None or lse_neg is None:
            raise ValueError("VSF needs the log-sum-exp of both attentions")
        w = torch.sigmoid(lse_pos - lse_neg + self.bias)
        w = torch.where(lse_neg == -torch.inf, 1.0, w)[..., None].to(z_pos.dtype)  # [b m h 1]
        return w * z_pos - _per_query(self.scale) * (1 - w) * z_neg


Guidance = NASA | NAG | VSF


def strength(guidance: Guidance) -> float | Tensor:
    """The strength of a guidance, whatever its paper calls it: NASA and VSF scale, NAG phi."""
    return guidance.phi if isinstance(guidance, NAG) else guidance.scale


def with_strength(guidance: Guidance, value: float | Tensor) -> Guidance:
    """The same guidance at another strength."""
    if isinstance(guidance, NAG):
        return NAG(value, guidance.tau, guidance.blend, guidance.norm_p)
    if isinstance(guidance, VSF):
        return VSF(value, guidance.bias)
    return NASA(value, guidance.centred)


def _per_query(scale: float | Tensor) -> float | Tensor:
    """A number as it is, [b m] as [b m 1 1]."""
    if isinstance(scale, Tensor) and scale.dim() == 2:
        return scale[:, :, None, None]
    return scale
