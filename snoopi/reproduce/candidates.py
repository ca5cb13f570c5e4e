"""Candidates for an automatic strength: rules that set NASA's alpha by what each query sees.

A rule that worked would need no search: one scale would do for every model, prompt and negative.
They are tried beside the others at matched retention; none is a feature of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snoopi.evaluate.negatives import ByScale
from snoopi.evaluate.removal import Generate
from snoopi.guidance import NASA
from snoopi.ops import Formula
from snoopi.pipeline import Pipeline
from snoopi.samplers import one_step

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(Z+ [b m h d], what is taken away [b m h d], lse+, lse- [b m h]) -> weight [b m h]."""


def _projection(z_pos: Tensor, away: Tensor, lse_pos: Tensor, lse_neg: Tensor) -> Tensor:
    """The share of `away` that Z+ holds: nothing is removed that is not there."""
    square = away.square().sum(-1)
    return torch.where(square > 0, (z_pos * away).sum(-1) / square.clamp(min=1e-12), 0).clamp(min=0)


def _norm(z_pos: Tensor, away: Tensor, lse_pos: Tensor, lse_neg: Tensor) -> Tensor:
    """As long as Z+, whatever the negative's own length."""
    length = away.norm(dim=-1)
    return torch.where(length > 0, z_pos.norm(dim=-1) / length.clamp(min=1e-6), 0)


def _mass(z_pos: Tensor, away: Tensor, lse_pos: Tensor, lse_neg: Tensor) -> Tensor:
    """Twice the share of attention the negative would get beside the prompt: 1 where they tie."""
    return 2 * torch.sigmoid(lse_neg - lse_pos)


RULES: dict[str, Rule] = {"projection": _projection, "norm": _norm, "mass": _mass}


@dataclass(frozen=True)
class Automatic(NASA):
    """Z+ - scale w (Z- - Z0), w by a rule for every query and head; without Z0 unless centred."""

    scale: float = 1.0
    rule: str = "projection"

    def formula(self) -> Formula:
        """What only `combine` knows."""
        return Formula(self.scale, "combine")

    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor:
        """z [b m h d] of one layer; needs both lse, and z_null if centred."""
        assert lse_pos is not None and lse_neg is not None
        away = z_neg
        if self.centred:
            assert z_null is not None
            away = z_neg - z_null
        weight = RULES[self.rule](z_pos.float(), away.float(), lse_pos, lse_neg)
        return z_pos - (self.scale * weight)[..., None].to(away) * away


CANDIDATES: dict[str, Automatic] = {
    "auto-projection": Automatic(rule="projection"),
    "auto-norm": Automatic(rule="norm"),
    "auto-mass": Automatic(rule="mass"),
    "auto-mass-centred": Automatic(rule="mass", centred=True),
}


def drawer(pipeline: Pipeline, name: str, seed: int) -> ByScale:
    """Pictures of a one-step model under a candidate, as evaluate.negatives.drawer's."""
    recipe, vae = pipeline.spec.one_step, pipeline.vae
    assert recipe is not None and vae is not None and pipeline.backbone is not None
    base = "nasa-centred" if CANDIDATES[name].centred else "nasa"

    def at(scale: float) -> Generate:
        how = replace(CANDIDATES[name], scale=scale)

        @torch.no_grad()
        def generate(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> Tensor:
            assert negatives is not None
            cond = pipeline.condition(prompts, negatives, base, 1.0)
            cond = replace(cond, guidance=how)
            z, schedule = pipeline.noise(seed, indices), pipeline.spec.schedule
            x0 = one_step(pipeline.backbone, schedule, z, cond, recipe.t, recipe.abar)
            return vae.decode(x0).float().clamp(-1, 1)

        return generate

    return at
