"""Does a negative prompt remove what it names, and what else does it change? (SNOOPI Tab. 7)

A case is a prompt that leaves one attribute of the world open. Its negative names one value of that
attribute, chosen in one of two ways:

    easy       at random, as in the paper: most pictures are free of it without any guidance
    targeted   the value the same noise shows without guidance: no picture is free of it before

A removal is worth little if the rest of the picture goes with it, so every figure comes with what
was kept: the attributes that the prompt names (keep), and those that nobody named (same).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from snoopi.noise import Noise
from snoopi.worlds.judge import Judge
from snoopi.worlds.shapes import ShapesWorld

Generate = Callable[[list[str], list[str] | None, list[int]], Tensor]
"""(prompts, negatives or None, noise indices) -> pictures [b 3 H W] in [-1, 1]. The same index must
mean the same noise in every call."""

KINDS = ("easy", "targeted")


@dataclass(frozen=True)
class Removal:
    """Rates in [0, 1] over n pictures; None where there was nothing to count."""

    n: int
    free: float  # pictures that do not show the negative's value
    free_low: float  # Wilson 95 % interval
    free_high: float
    free_before: float  # the same without guidance
    keep: float | None  # attributes named in the prompt that are right
    keep_before: float | None
    keep_ratio: float | None
    same: float | None  # attributes named by neither, unchanged by the guidance


@dataclass(frozen=True)
class RemovalReport:
    """Results by attribute and in total, for the two ways to choose a negative."""

    easy: dict[str, Removal]
    targeted: dict[str, Removal]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """A guidance strength with the evidence it was chosen on (targeted, all attributes)."""

    scale: float
    met: bool  # whether any strength satisfied the bound; else scale is the one that keeps most
    results: dict[float, Removal]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Cases:
    """Prompts of one open attribute, and what the model shows for them without guidance."""

    attribute: str
    prompts: list[str]
    indices: list[int]
    before: Tensor  # int64 [n a]
    named: Tensor  # int64 [n a], the value the prompt names or -1


@dataclass(frozen=True)
class _Tally:
    """Counts that add up over attributes."""

    n: int = 0
    free: int = 0
    free_before: int = 0
    named: int = 0
    right: int = 0
    right_before: int = 0
    others: int = 0
    unchanged: int = 0

    def __add__(self, other: _Tally) -> _Tally:
        mine, theirs = asdict(self), asdict(other)
        return _Tally(**{key: mine[key] + theirs[key] for key in mine})

    def rates(self) -> Removal:
        low, high = wilson(self.free, self.n)
        return Removal(
            n=self.n,
            free=self.free / self.n,
            free_low=low,
            free_high=high,
            free_before=self.free_before / self.n,
            keep=_share(self.right, self.named),
            keep_before=_share(self.right_before, self.named),
            keep_ratio=_share(self.right, self.right_before),
            same=_share(self.unchanged, self.others),
        )


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a rate (95 % by default).

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def all_named_right(
    world: ShapesWorld, labels: Tensor, prompts: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """How often a picture shows all its prompt names, and how often each attribute is right.

    labels: int64 [b a], what the judge reads. Prompts that name nothing count nowhere; an attribute
    that no prompt names is absent from the dict. Raises ValueError if no prompt names anything.
    """
    named = _named(world, prompts)
    if labels.shape != named.shape:
        raise ValueError(f"labels must be {list(named.shape)}, got {list(labels.shape)}")
    asked = named >= 0
    if not bool(asked.any()):
        raise ValueError("no prompt names an attribute")
    right = labels == named
    complete = (right | ~asked).all(1)[asked.any(1)].double().mean().item()
    per = {
        name: right[asked[:, i], i].double().mean().item()
        for i, name in enumerate(world.attributes)
        if bool(asked[:, i].any())
    }
    return complete, per


def removal_experiment(
    generate: Generate,
    judge: Judge,
    world: ShapesWorld,
    noise: Noise,
    *,
    count: int = 400,
    attributes: Sequence[str] | None = None,
    split: str = "held-out",
    batch: int = 64,
    unguided: Generate | None = None,
) -> RemovalReport:
    """Removal by negative prompts (SNOOPI Tab. 7) on `count` prompts for each attribute.

    generate is called with at most `batch` prompts; with negatives None it must draw without
    guidance (`unguided` may do that in its place). Pictures without guidance are drawn once.
    """
    cases = _cases(unguided or generate, judge, world, noise, count, attributes, split, batch)
    results = {kind: _rates(generate, judge, world, noise, cases, kind, batch) for kind in KINDS}
    return RemovalReport(**results)


def choose_scale(
    generate_at_scale: Callable[[float], Generate],
    judge: Judge,
    world: ShapesWorld,
    noise: Noise,
    scales: Sequence[float],
    *,
    keep_bound: float = 0.96,
    count: int = 100,
    attributes: Sequence[str] | None = None,
    split: str = "train",
    batch: int = 64,
) -> Choice:
    """The strength that removes most (targeted) with keep >= keep_bound * keep_before.

    Works on tuning prompts: report the result on others. If no strength meets the bound, the one
    that keeps most is returned with met = False. Raises ValueError without any strength.
    """
    if not scales:
        raise ValueError("scales must name at least one guidance strength")
    first = generate_at_scale(scales[0])
    cases = _cases(first, judge, world, noise, count, attributes, split, batch)
    results = {}
    for scale in scales:
        generate = generate_at_scale(scale)
        table = _rates(generate, judge, world, noise, cases, "targeted", batch)
        results[scale] = table["total"]
    good = [s for s, r in results.items() if (r.keep_ratio or 0.0) >= keep_bound]
    if good:
        return Choice(max(good, key=lambda s: results[s].free), True, results)
    return Choice(max(results, key=lambda s: results[s].keep or 0.0), False, results)


def _cases(
    unguided: Generate,
    judge: Judge,
    world: ShapesWorld,
    noise: Noise,
    count: int,
    attributes: Sequence[str] | None,
    split: str,
    batch: int,
) -> list[_Cases]:
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be positive, got count={count} batch={batch}")
    cases = []
    for attribute in attributes if attributes is not None else world.attributes:
        prompts = world.removal_cases(noise, attribute, count, split)
        first = list(world.attributes).index(attribute) * count  # other noise for each attribute
        indices = list(range(first, first + count))
        before = _judged(unguided, judge, prompts, None, indices, batch)
        cases.append(_Cases(attribute, prompts, indices, before, _named(world, prompts)))
    if not cases:
        raise ValueError("attributes must name at least one attribute")
    return cases


def _rates(
    generate: Generate,
    judge: Judge,
    world: ShapesWorld,
    noise: Noise,
    cases: Sequence[_Cases],
    kind: str,
    batch: int,
) -> dict[str, Removal]:
    tallies = {}
    for case in cases:
        values = _negatives(world, noise, case, kind)
        words = [world.bare_word(case.attribute, value) for value in values.tolist()]
        after = _judged(generate, judge, case.prompts, words, case.indices, batch)
        tallies[case.attribute] = _count(world, case, values, after)
    total = sum(tallies.values(), _Tally())
    return {name: tally.rates() for name, tally in {**tallies, "total": total}.items()}


def _negatives(world: ShapesWorld, noise: Noise, case: _Cases, kind: str) -> Tensor:
    """The value each negative names, int64 [n]."""
    if kind == "targeted":
        return case.before[:, list(world.attributes).index(case.attribute)]
    stream, values = f"removal.negative.{case.attribute}", world.attributes[case.attribute]
    return noise.integers(stream, 0, case.indices, 0, len(values))


def _judged(
    generate: Generate,
    judge: Judge,
    prompts: list[str],
    negatives: list[str] | None,
    indices: list[int],
    batch: int,
) -> Tensor:
    """What the judge reads in the pictures, int64 [n a]; pictures are not kept."""
    rows = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        words = None if negatives is None else negatives[part]
        rows.append(judge.labels(generate(prompts[part], words, indices[part])))
        if len(rows[-1]) != len(prompts[part]):
            raise ValueError(
                f"generate gave {len(rows[-1])} pictures for {len(prompts[part])} prompts"
            )
    return torch.cat(rows)


def _named(world: ShapesWorld, prompts: Sequence[str]) -> Tensor:
    rows = [[world.named(text).get(name, -1) for name in world.attributes] for text in prompts]
    return torch.tensor(rows, dtype=torch.int64).view(len(prompts), len(world.attributes))


def _count(world: ShapesWorld, case: _Cases, values: Tensor, after: Tensor) -> _Tally:
    column = list(world.attributes).index(case.attribute)
    asked = case.named >= 0
    others = ~asked
    others[:, column] = False
    return _Tally(
        n=len(values),
        free=int((after[:, column] != values).sum()),
        free_before=int((case.before[:, column] != values).sum()),
        named=int(asked.sum()),
        right=int((after == case.named)[asked].sum()),
        right_before=int((case.before == case.named)[asked].sum()),
        others=int(others.sum()),
        unchanged=int((after == case.before)[others].sum()),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
