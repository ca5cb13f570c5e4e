"""Guidance: classifier-free guidance of predictions, and of attention (NASA, NAG, VSF).

The `combine` of each dataclass is the formula in plain torch: the oracle of the fused op, and what
runs where no fused path exists. z is an attention output before the output projection, [b m h d];
lse is the log-sum-exp of its logits, [b m h]. 16-bit z are combined in fp32 and rounded once.

PRESETS holds the published strengths by model, METHODS the guidances at their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from snoopi.ops import Formula


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

    def formula(self) -> Formula:
        """The same for the fused op."""
        return Formula(self.scale, "nasa")

    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor:
        """z [b m h d] of one layer: `scale` must be a number here, 0-d, or [b m] (a region)."""
        away = _widen(z_neg)
        if self.centred:
            if z_null is None:
                raise ValueError("centred NASA needs the attention to the null prompt, z_null")
            away = away - _widen(z_null)
        return (_widen(z_pos) - _per_query(self.scale) * away).to(z_pos.dtype)


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

    def __post_init__(self) -> None:
        if self.norm_p not in (1, 2):
            raise ValueError(f"NAG norm_p must be 1 or 2, got {self.norm_p}")

    def formula(self) -> Formula:
        """The same for the fused op."""
        return Formula(self.phi, "nag", (self.tau, self.blend, self.norm_p))

    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor:
        """z [b m h d] of one layer; z_pos where there is no negative key (lse- = -inf)."""
        pos, neg = _widen(z_pos), _widen(z_neg)
        z = pos + _per_query(self.phi) * (pos - neg)
        most = self.tau * pos.flatten(-2).norm(p=self.norm_p, dim=-1)  # [b m]
        norm = z.flatten(-2).norm(p=self.norm_p, dim=-1)  # [b m]
        # min(R, tau) / R without dividing by R = norm / norm_pos: 0/0 on a masked row, and a
        # division that `where` leaves out would still give NaN gradients.
        long = norm > most
        shrink = torch.where(long, most / torch.where(long, norm, 1.0), 1.0)  # [b m]
        z = self.blend * shrink[..., None, None] * z + (1 - self.blend) * pos
        if lse_neg is not None:
            z = torch.where(_dead(lse_neg), pos, z)
        return z.to(z_pos.dtype)


@dataclass(frozen=True)
class VSF:
    """Value Sign Flip: one softmax over [K+; K-] with values [V+; -scale V-] (Guo and Du, 2025).

    With W = sigmoid(lse+ - lse- + bias) it equals W Z+ - scale (1 - W) Z-. bias lowers the
    negative logits.
    """

    scale: float | Tensor = 3.0
    bias: float = 0.1
    needs_null: ClassVar[bool] = False

    def formula(self) -> Formula:
        """The same for the fused op."""
        return Formula(self.scale, "vsf", (self.bias,))

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
        pos, neg, dead = _widen(z_pos), _widen(z_neg), _dead(lse_neg)
        gap = (lse_pos - lse_neg + self.bias)[..., None].to(pos.dtype)  # [b m h 1]
        gap = torch.where(dead, 0.0, gap)  # inf - inf, were its gradient asked for
        w = torch.where(dead, 1.0, torch.sigmoid(gap))
        # 1 - W by the same function of -gap: near W = 1 the difference would lose its digits.
        rest = torch.where(dead, 0.0, torch.sigmoid(-gap))
        return (w * pos - _per_query(self.scale) * rest * neg).to(z_pos.dtype)


Guidance = NASA | NAG | VSF

# Every guidance of attention by its name on the command line, at its default strength. NAG: its
# paper's values for SD1.5. VSF: its paper's for SD3.5 (it has none for the networks here).
METHODS: dict[str, Guidance] = {
    "nasa": NASA(),
    "nasa-centred": NASA(centred=True),
    "nag": NAG(),
    "vsf": VSF(),
}

# Published values by model family, and by model where one differs. NASA: SNOOPI Tab. 8 (InstaFlow,
# DMD2 and PG-SB on SD1.5; SBv2 and PG-SB on SD2.1; YOSO, DMD and PG-SB on PixArt); 0.5 where it has
# no row, the strength of all models in its Tab. 3 and 7. NAG: its paper (SDXL; PixArt-Sigma's for
# PixArt). shapes: found by search on that world.
PRESETS: dict[str, dict[str, Guidance]] = {
    "sd15": {"nasa": NASA(0.04), "nag": NAG(2.0, blend=0.375)},
    "instaflow": {"nasa": NASA(0.19)},
    "sd21": {"nasa": NASA(0.3)},
    "sdxl": {"nasa": NASA(0.5), "nag": NAG(2.0, blend=0.5)},
    "pixart": {"nasa": NASA(0.8), "nag": NAG(4.0, blend=0.375)},
    "dmd-pixart": {"nasa": NASA(0.45)},
    "yoso-pixart": {"nasa": NASA(0.2)},
    "pixart-lcm": {"nasa": NASA(0.5)},
    "shapes": {"nasa": NASA(1.0), "nasa-centred": NASA(1.5, centred=True)},
}


def strength(guidance: Guidance) -> float | Tensor:
    """The strength of a guidance, whatever its paper calls it: NASA and VSF scale, NAG phi."""
    return guidance.phi if isinstance(guidance, NAG) else guidance.scale


def with_strength(guidance: Guidance, value: float | Tensor) -> Guidance:
    """The same guidance at another strength."""
    if isinstance(guidance, NAG):
        return replace(guidance, phi=value)
    return replace(guidance, scale=value)


def _per_query(scale: float | Tensor) -> float | Tensor:
    """A number as it is, [b m] as [b m 1 1]."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    if scale.dim() != 2:
        raise ValueError(f"a layer's strength must be a number or [b m], got {list(scale.shape)}")
    return scale[:, :, None, None]


def _widen(z: Tensor) -> Tensor:
    """16-bit tensors in fp32, others as they are."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def _dead(lse: Tensor) -> Tensor:
    """Where a text has no key to attend to, [b m h 1]."""
    return (lse == -torch.inf)[..., None]
