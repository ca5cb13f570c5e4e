"""Ways to use a negative prompt, side by side: each searched alike, then measured once.

Every method gets the same search: the same multipliers of its own unit, on the same tuning prompts
(training captions), under the same bound on what is kept. The strength found is then measured once
on held-out prompts with other noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from snoopi.evaluate.removal import Choice, Generate, RemovalReport, RemovalTest
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.worlds import ShapesWorld, World
from snoopi.worlds.judge import Judge

ByScale = Callable[[float], Generate]
"""Pictures of a method, by its strength."""

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
WEAKER = (1 / 32, 1 / 16, 1 / 8)  # multipliers tried where none of the search's keeps enough
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
    search = Search(pipeline, count, batch, world)
    return GuidanceTable(
        {m: search.method(m, multipliers, partial(drawer, pipeline, m)) for m in methods}
    )


class Search:
    """The search and the measurement that every method gets, on one model.

    What does not depend on the method is drawn once: see RemovalTest. Arguments as of
    `guidance_table`.
    """

    def __init__(
        self, pipeline: Pipeline, count: int, batch: int = 64, world: World | None = None
    ) -> None:
        world = world or ShapesWorld()
        judge = Judge.load(world)

        def test(seed: int, split: str) -> RemovalTest:
            plain, noise = drawer(pipeline, "none", seed)(0.0), Noise(seed)
            return RemovalTest(plain, judge, world, noise, count=count, split=split, batch=batch)

        self._tuning = lambda: test(TUNING_SEED, "train")
        self.reporting = test(EVALUATION_SEED, "held-out")

    @cached_property
    def tuning(self) -> RemovalTest:
        """The test on which strengths are chosen."""
        return self._tuning()

    def method(
        self, name: str, multipliers: Sequence[float], at_seed: Callable[[int], ByScale]
    ) -> Method:
        """A method at the best of its strengths. at_seed: its pictures by the seed of the noise.

        Where every one of them breaks the bound, weaker ones are tried. A name that METHODS lacks
        has its multipliers for strengths.
        """
        scale_of, by_scale = METHODS.get(name, float), at_seed(TUNING_SEED)

        def choose(tried: Sequence[float]) -> Choice:
            return self.tuning.choose_scale(by_scale, [scale_of(s) for s in tried], KEEP_BOUND)

        choice = choose(multipliers)
        if not choice.met:
            choice = choose([*WEAKER, min(multipliers)])
        report = self.reporting.measure(at_seed(EVALUATION_SEED)(choice.scale))
        return Method(name, choice, report)


def drawer(pipeline: Pipeline, mode: str, seed: int) -> ByScale:
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
