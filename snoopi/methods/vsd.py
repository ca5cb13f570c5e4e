"""Variational score distillation with a random guidance scale: PG-SB (SNOOPI Eq. 6-7).

The teacher pair is ONE network with LoRA adapters: eps_psi, the frozen teacher, is the network
without them, eps_phi, the LoRA teacher, the network with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from snoopi import lora
from snoopi.conditioning import Conditioning, concat
from snoopi.guidance import cfg
from snoopi.noise import Noise
from snoopi.schedule import Schedule, upcast

Range = tuple[float, float]
Passes = Literal["fused", "sequential"]
SMALL = 4096  # latent pixels of a batch below which a call costs more than its products


class TeacherScores(NamedTuple):
    """Guided predictions of both teachers at x_t, as the network predicts; fp32 or better."""

    teacher: Tensor
    lora_teacher: Tensor


def draw_kappa(
    noise: Noise,
    step: int,
    indices: Sequence[int],
    teacher: Range,
    lora_teacher: Range,
    draw: Literal["shared", "independent"] = "shared",
    per: Literal["sample", "batch"] = "sample",
) -> tuple[Tensor, Tensor]:
    """Guidance scales kappa of the frozen and the LoRA teacher, [b] each (Eq. 7).

    shared: one u ~ U(0, 1) mapped to both ranges. per batch: the whole batch has one draw, the
    same on every rank. A range [c, c] is the constant c exactly.
    """
    rows = [0] * len(indices) if per == "batch" else list(indices)
    u_teacher = noise.uniform("kappa", step, rows)
    u_lora = u_teacher if draw == "shared" else noise.uniform("kappa_lora", step, rows)
    low, high = teacher
    low_lora, high_lora = lora_teacher
    return low + (high - low) * u_teacher, low_lora + (high_lora - low_lora) * u_lora


def choose_passes(
    asked: Literal["auto", "fused", "sequential"], sharded: bool, pixels: int
) -> Passes:
    """What parallel.teacher_pass means for a batch of so many latent pixels (b h w).

    "auto": one call where the weights would be gathered four times, or where the batch is so small
    that calls are what costs; else four, which need less memory and, in the caches of a CPU, a
    little less time (benchmarks.train_step).
    """
    if asked != "auto":
        return asked
    return "fused" if sharded or pixels < SMALL else "sequential"


@torch.no_grad()
def teacher_scores(
    pair: nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    null: Conditioning,
    kappa: Tensor,
    kappa_lora: Tensor,
    passes: Passes = "fused",
    *,
    negative: Conditioning | None = None,
) -> TeacherScores:
    """Both teachers' guided predictions (Eq. 4 for each).

    passes "fused": one call on 4b rows, [frozen y, frozen null | lora y, lora null]; adapters act
    on the second half, so the frozen rows are bit-equal to the network without adapters and one
    sharded copy serves both, gathered once. "sequential": four calls on b rows, equal to rounding,
    with a quarter of the activations. x_t [b c h w], t int [b], kappa, kappa_lora [b]. negative:
    the frozen teacher's unconditional text in place of null (Eq. 5), for negative-aware training;
    the LoRA teacher keeps null.
    """
    b = len(x_t)
    null = null.expand(b)
    away = null if negative is None else negative.expand(b)
    texts = (cond, away, cond, null)
    if passes == "fused":
        with lora.rows(pair, 2 * b):
            out = upcast(pair(x_t.repeat(4, 1, 1, 1), t.repeat(4), concat(texts)))  # [4b c h w]
        c_psi, u_psi, c_phi, u_phi = out.chunk(4)
    else:
        c_psi, u_psi, c_phi, u_phi = (
            _rows_from(pair, first, x_t, t, text)
            for first, text in zip((b, b, 0, 0), texts, strict=True)
        )
    return TeacherScores(cfg(c_psi, u_psi, kappa), cfg(c_phi, u_phi, kappa_lora))


def _rows_from(pair: nn.Module, first: int, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
    """One call whose adapters act on rows >= first: none of them, or all. fp32 [b c h w]."""
    with lora.rows(pair, first):
        return upcast(pair(x_t, t, text))


def vsd_gradient(
    schedule: Schedule,
    scores: TeacherScores,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    weight: Literal["sigma2", "none"] = "sigma2",
    normaliser: Literal["none", "dmd"] = "none",
) -> Tensor:
    """The gradient of the VSD loss with respect to x0: w(t) (eps_psi - eps_phi) (Eq. 7).

    In fp32, or fp64 if x_t and the scores are.
    w = sigma_t^2 (SwiftBrush). The chain rule's alpha_t is left in w, as the paper does.
    normaliser "dmd": divided by the mean over a picture of |x0 - x0_psi| (DMD, Eq. 8).
    Nothing is clamped and no NaN is hidden.
    """
    gradient = schedule.to_eps(scores.teacher, x_t, t) - schedule.to_eps(
        scores.lora_teacher, x_t, t
    )
    if weight == "sigma2":
        gradient = gradient * schedule.alpha_sigma(t, x_t)[1].square()
    if normaliser == "dmd":
        distance = (upcast(x0) - schedule.to_x0(scores.teacher, x_t, t)).abs()
        gradient = gradient / distance.flatten(1).mean(1).view(-1, 1, 1, 1)
    return gradient


def surrogate(x0: Tensor, gradient: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """A loss whose gradient with respect to x0 is `gradient` (per element / elements for "mean").

    0.5 |x0 - stopgrad(x0 - gradient)|^2 over a picture's elements, one number per sample, [b].
    In fp32, or fp64 if x0 is.
    """
    target = (x0 - gradient).detach()
    error = 0.5 * (upcast(x0) - upcast(target)).square().flatten(1)
    return error.mean(1) if reduction == "mean" else error.sum(1)
