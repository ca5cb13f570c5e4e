"""From noise to a clean latent: one step, and DDIM with classifier-free guidance.

Samplers own no randomness: the caller gives the noise. They know nothing of K/V packs or attention
guidance: those travel in the Conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from snoopi.conditioning import Conditioning, concat
from snoopi.guidance import cfg
from snoopi.schedule import Schedule

Spacing = Literal["trailing", "leading"]


class Backbone(Protocol):
    """forward(x, t, cond) -> prediction."""

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


def one_step(
    backbone: Backbone, schedule: Schedule, z: Tensor, cond: Conditioning, t: int
) -> Tensor:
    """x0 = f(z, y): one call on pure noise z [b c h w] at timestep t, converted by the schedule.

    At t below 999 the input is still unscaled noise (DMD, SwiftBrush); only the conversion uses
    (alpha_t, sigma_t).
    """
    steps = torch.full((len(z),), t, device=z.device)
    return schedule.to_x0(backbone(z, steps, cond), z, steps)


def guided(
    backbone: Backbone,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    null: Conditioning | None = None,
    kappa: Tensor | float = 1.0,
) -> Tensor:
    """The prediction under classifier-free guidance (Eq. 4; Eq. 5 with a negative prompt as null).

    Without `null` the conditional prediction alone. Both texts run as one batch where they can be
    stacked (equal lengths, both masked or neither, no attention guidance on the conditional side).
    """
    if null is None:
        return backbone(x, t, cond)
    null = null.expand(len(x))
    masks_agree = (cond.mask is None) == (null.mask is None)
    stackable = masks_agree and cond.tokens.shape == null.tokens.shape
    if stackable and cond.guidance is None and cond.kv is None:
        both = backbone(x.repeat(2, 1, 1, 1), t.repeat(2), concat([cond.plain(), null]))
        conditional, unconditional = both.chunk(2)
        return cfg(conditional, unconditional, kappa)
    return cfg(backbone(x, t, cond), backbone(x, t, null), kappa)


def timesteps(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> list[int]:
    """`steps` timesteps from high to low.

    "trailing" starts at the last one (999, and 999 alone for one step); "leading" is Stable
    Diffusion's original, with offset 1.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")
    most = schedule.steps - (spacing == "leading")  # its offset of 1 must stay inside
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be in 1..{most}, got {steps}")
    if spacing == "leading":
        ratio = schedule.steps // steps
        return [i * ratio + 1 for i in reversed(range(steps))]
    return [round(schedule.steps - i * schedule.steps / steps) - 1 for i in range(steps)]


def ddim(
    backbone: Backbone,
    schedule: Schedule,
    z: Tensor,
    cond: Conditioning,
    *,
    steps: int = 25,
    null: Conditioning | None = None,
    kappa: Tensor | float = 1.0,
    spacing: Spacing = "trailing",
    alpha_one: bool = True,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al., 2021, eta 0) from z [b c h w] ~ N(0, I) to x0.

    alpha_one: the last step ends at x0 itself; False ends at abar[0], as Stable Diffusion's
    configs do (set_alpha_to_one false). callback(step, x) sees each new x.
    """
    x, times = z, timesteps(schedule, steps, spacing)
    abar = schedule.alpha_bar()
    stride = schedule.steps // steps
    for i, now in enumerate(times):
        t = torch.full((len(x),), now, device=x.device)
        prediction = guided(backbone, x, t, cond, null, kappa)
        x0, eps = schedule.to_x0(prediction, x, t), schedule.to_eps(prediction, x, t)
        # "leading" steps by its stride; "trailing" by its grid, where the stride may not be whole.
        grid_next = times[i + 1] if i + 1 < steps else -1
        after = now - stride if spacing == "leading" else grid_next
        last = 1.0 if alpha_one else float(abar[0])
        abar_next = float(abar[after]) if after >= 0 else last
        x = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
        if callback is not None:
            callback(i, x)
    return x
