"""Ways to use a negative prompt, side by side: each searched alike, then measured once.

Every method gets the same search: the same multipliers of its own unit, on the same tuning prompts
(training captions), under the same bound on what is kept. The strength found is then measured once
on held-out prompts with other noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from snoopi.evaluate.removal import Choice, Generate, RemovalReport, RemovalTest
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.worlds import ShapesWorld, World
from snoopi.worlds.judge import Judge

EVALUATION_SEED = 1_000_003  # prompts and noise of measurements, apart from any run's seed
TUNING_SEED = 1_000_033  # prompts and noise on which strengths are chosen
KEEP_BOUND = 0.96  # a strength must keep this share of what the unguided pictures get right

# Strength from a multiplier of the search: 1 is about where each method starts to cost quality on
# the shapes world.
METHODS: dict[str, Callable[[float], float]] = {
    "nasa": lambda s: s,
    "nasa-centred": lambda s: s,
    "nag": lambda s: 4 * s,
    "vsf": lambda s: 2 * s,
    "embed-sub": lambda s: s,
    "cfg": lambda s: 1 + s,
}
BASELINES = ("embed-sub", "cfg")  # what is not negative attention


@dataclass(frozen=True)
class Method:
    """A way to use a negative prompt, at the strength that its search chose."""

    name: str
    choice: Choice
    report: RemovalReport

    def row(self) -> dict[str, Any]:
        """One line of the guidance table: totals on the reporting prompts."""
        easy, targeted = self.report.easy["total"], self.report.targeted["total"]
        fidelity = self.report.fidelity["targeted"]
        return {
            "method": self.name,
            "scale": self.choice.scale,
            "within bound": self.choice.met,
            "easy": easy.free,
            "easy 95 %": _percents(easy.free_low, easy.free_high),
            "targeted": targeted.free,
            "targeted 95 %": _percents(targeted.free_low, targeted.free_high),
            "keep": targeted.keep,
            "keep 95 %": _percents(targeted.keep_low, targeted.keep_high),
            "keep_ratio": targeted.keep_ratio,
            "same": targeted.same,
            "same 95 %": _percents(targeted.same_low, targeted.same_high),
            "frechet": fidelity.frechet,
            "frechet 95 %": f"{fidelity.low:.2f} to {fidelity.high:.2f}",
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, plain, for JSON."""
        return {
            "method": self.name,
            "choice": self.choice.to_dict(),
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class GuidanceTable:
    """All methods on one model. before: easy removal and Frechet distance without guidance."""

    methods: Mapping[str, Method]

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the table."""
        return [method.row() for method in self.methods.values()]

    @property
    def free_before(self) -> float:
        """Share of pictures free of a random negative without any guidance."""
        return next(iter(self.methods.values())).report.easy["total"].free_before

    @property
    def frechet_before(self) -> float:
        """Frechet distance without guidance to real pictures without the targeted negative."""
        return next(iter(self.methods.values())).report.fidelity["targeted"].before

    def best(self) -> Method:
        """The negative attention that removes most (targeted) within its bound."""
        attention = [m for name, m in self.methods.items() if name not in BASELINES]
        return max(attention, key=lambda m: (m.choice.met, m.report.targeted["total"].free))


def guidance_table(
    pipeline: Pipeline,
    multipliers: Sequence[float],
    count: int,
    batch: int = 64,
    methods: Sequence[str] = tuple(METHODS),
    world: World | None = None,
) -> GuidanceTable:
    """Search each method's strength and measure it, on `count` prompts an attribute each time.

    world: the one that the pipeline was trained on; None: the shapes world.
    Raises ValueError for an unknown method or no multiplier.
    """
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}: expected some of {', '.join(METHODS)}")
    world = world or ShapesWorld()
    judge = Judge.load(world)

    def test(seed: int, split: str) -> RemovalTest:
        plain = drawer(pipeline, "none", seed)(0.0)
        return RemovalTest(plain, judge, world, Noise(seed), count=count, split=split, batch=batch)

    tuning, reporting = test(TUNING_SEED, "train"), test(EVALUATION_SEED, "held-out")
    found = {}
    for name in methods:
        scales = [METHODS[name](s) for s in multipliers]
        choice = tuning.choose_scale(drawer(pipeline, name, TUNING_SEED), scales, KEEP_BOUND)
        report = reporting.measure(drawer(pipeline, name, EVALUATION_SEED)(choice.scale))
        found[name] = Method(name, choice, report)
    return GuidanceTable(found)


def drawer(pipeline: Pipeline, mode: str, seed: int) -> Callable[[float], Generate]:
    """Pictures of prompts with negatives, by strength, as RemovalTest asks for them."""

    def at(scale: float) -> Generate:
        def generate(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> Tensor:
            z = pipeline.noise(seed, indices)
            return pipeline.pictures(prompts, z, negatives, mode, scale)

        return generate

    return at


def _percents(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "n/a"
    return f"{100 * low:.1f} to {100 * high:.1f}"
