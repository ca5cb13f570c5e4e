"""Does a negative prompt remove what it names, and what else does it change? (SNOOPI Tab. 7)

A case is a prompt that leaves one attribute of the world open. Its negative names one value of that
attribute, chosen in one of two ways:

    easy       at random, as in the paper: most pictures are free of it without any guidance
    targeted   the value the same noise shows without guidance: no picture is free of it before
               (where it shows none of the attribute's values, there is nothing to remove: the
               case counts in no rate)

A removal is worth little if the rest of the picture goes with it, so every figure comes with what
was kept: the attributes that the prompt names (keep), those that nobody named but the picture
showed (same), and the
Frechet distance to real pictures that show the prompt and are free of the negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snoopi.evaluate.fid import FeatureStats, frechet_distance, frechet_interval
from snoopi.noise import Noise
from snoopi.worlds import Avoid, World
from snoopi.worlds.judge import Judge

Generate = Callable[[list[str], list[str] | None, list[int]], Tensor]
"""(prompts, negatives or None, noise indices) -> pictures [b 3 H W] in [-1, 1]. The same index must
mean the same noise in every call."""

KINDS = ("easy", "targeted")
REFINE = 2  # halvings of a search's last interval
REAL_PER_PROMPT = 4  # real pictures behind a Frechet reference, for each prompt


@dataclass(frozen=True)
class Removal:
    """Rates in [0, 1] over n pictures with Wilson 95 % intervals; None: there was nothing to count.

    keep and same count attributes, `named` and `others` of them, several a picture: their intervals
    take these for independent. keep_ratio: right after over right before. Of no pictures free is 0
    and its interval all there is.
    """

    n: int
    named: int
    others: int
    free: float  # pictures that do not show the negative's value
    free_low: float
    free_high: float
    free_before: float  # the same without guidance
    keep: float | None  # attributes named in the prompt that are right
    keep_low: float | None
    keep_high: float | None
    keep_before: float | None
    keep_ratio: float | None
    same: float | None  # attributes named by neither, unchanged by the guidance
    same_low: float | None
    same_high: float | None


@dataclass(frozen=True)
class Fidelity:
    """Frechet distance to real pictures of the prompts without what the negative names.

    low, high: 95 % interval (fid.frechet_interval). before: without guidance.
    """

    frechet: float
    low: float
    high: float
    before: float


@dataclass(frozen=True)
class RemovalReport:
    """Results by attribute and in total, for the two ways to choose a negative."""

    easy: dict[str, Removal]
    targeted: dict[str, Removal]
    fidelity: dict[str, Fidelity]  # "easy", "targeted"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return asdict(self)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The rates alone, plain: {"easy" | "targeted": {attribute or "total": {...}}}."""
        plain = self.to_dict()
        return {kind: plain[kind] for kind in KINDS}


@dataclass(frozen=True)
class Choice:
    """A guidance strength with the evidence it was chosen on (targeted, all attributes)."""

    scale: float
    met: bool  # whether any strength satisfied the bound; else scale is the one that keeps most
    results: dict[float, Removal]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return asdict(self)


class _Read(NamedTuple):
    """What the judge sees in n pictures."""

    labels: Tensor  # int64 [n a]
    features: Tensor  # [n d]


class _Case(NamedTuple):
    """Prompts of one open attribute, and what the model shows for them without guidance."""

    attribute: str
    prompts: list[str]
    indices: list[int]
    named: Tensor  # int64 [n a], the value the prompt names or -1
    before: _Read
    negatives: dict[str, Tensor]  # kind -> int64 [n], the value the negative names


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
        low, high = wilson(self.free, self.n) if self.n else (0.0, 1.0)
        keep_low, keep_high = _interval(self.right, self.named)
        same_low, same_high = _interval(self.unchanged, self.others)
        return Removal(
            n=self.n,
            named=self.named,
            others=self.others,
            free=self.free / max(1, self.n),
            free_low=low,
            free_high=high,
            free_before=self.free_before / max(1, self.n),
            keep=_share(self.right, self.named),
            keep_low=keep_low,
            keep_high=keep_high,
            keep_before=_share(self.right_before, self.named),
            keep_ratio=_share(self.right, self.right_before),
            same=_share(self.unchanged, self.others),
            same_low=same_low,
            same_high=same_high,
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
    world: World, labels: Tensor, prompts: Sequence[str]
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


class RemovalTest:
    """Removal by negative prompts (SNOOPI Tab. 7): prompts, negatives, and all but the guidance.

    What does not depend on the guidance is made once: the pictures without guidance and the real
    ones. So methods and strengths are compared on the same prompts, negatives and noise.

    Args:
        unguided: draws without guidance; its negatives are always None.
        count: prompts for each attribute.
        attributes: which attributes are left open in turn; None: all of the world's.
        split: the prompts' split of the world.
        batch: most pictures drawn at once.

    Raises:
        ValueError: an unknown attribute or split, or nothing to draw.
    """

    def __init__(
        self,
        unguided: Generate,
        judge: Judge,
        world: World,
        noise: Noise,
        *,
        count: int = 400,
        attributes: Sequence[str] | None = None,
        split: str = "held-out",
        batch: int = 64,
    ) -> None:
        if count < 1 or batch < 1:
            raise ValueError(f"count and batch must be positive, got count={count} batch={batch}")
        self.judge, self.world, self.noise, self.batch = judge, world, noise, batch
        names = list(world.attributes) if attributes is None else list(attributes)
        if not names:
            raise ValueError("attributes must name at least one attribute")
        self._cases = [self._case(unguided, name, count, split) for name in names]
        self._references: dict[str, FeatureStats] = {}

    def measure(self, generate: Generate) -> RemovalReport:
        """All figures of one way to use a negative prompt."""
        tables, fidelity = {}, {}
        for kind in KINDS:
            reads = [self._guided(generate, case, kind) for case in self._cases]
            tables[kind] = self._rates(reads, kind)
            fidelity[kind] = self._fidelity(reads, kind)
        return RemovalReport(**tables, fidelity=fidelity)

    def choose_scale(
        self,
        generate_at_scale: Callable[[float], Generate],
        scales: Sequence[float],
        keep_bound: float = 0.96,
        refine: int = REFINE,
    ) -> Choice:
        """The strength that removes most (targeted) with keep >= keep_bound * keep_before.

        Between the best of the strengths and the next larger one, which breaks the bound, `refine`
        halvings come closer to the bound: a grid leaves each method another share of it unused.
        Use it on tuning prompts, and report the result on others. If no strength meets the bound,
        the one that keeps most is returned with met = False. Raises ValueError without strengths.
        """
        if not scales:
            raise ValueError("scales must name at least one guidance strength")
        results: dict[float, Removal] = {}

        def within(scale: float) -> bool:
            if scale not in results:
                generate = generate_at_scale(scale)
                reads = [self._guided(generate, case, "targeted") for case in self._cases]
                results[scale] = self._rates(reads, "targeted")["total"]
            return (results[scale].keep_ratio or 0.0) >= keep_bound

        def best(good: Sequence[float]) -> float:
            return max(good, key=lambda s: results[s].free)

        good = [scale for scale in scales if within(scale)]
        if not good:
            return Choice(max(results, key=lambda s: results[s].keep or 0.0), False, results)
        low = best(good)
        larger = [scale for scale in scales if scale > low and scale not in good]
        for _ in range(refine if larger else 0):
            middle = (low + min(larger)) / 2
            if within(middle):
                good.append(low := middle)
            else:
                larger.append(middle)
        return Choice(best(good), True, results)

    def _case(self, unguided: Generate, attribute: str, count: int, split: str) -> _Case:
        prompts = self.world.removal_cases(self.noise, attribute, count, split)
        column = list(self.world.attributes).index(attribute)
        first = column * count  # other noise for each attribute
        indices = list(range(first, first + count))
        before = self._read(unguided, prompts, None, indices)
        stream, values = f"removal.negative.{attribute}", self.world.attributes[attribute]
        easy = self.noise.integers(stream, 0, indices, 0, len(values))
        shown = before.labels[:, column]
        negatives = {"easy": easy, "targeted": torch.where(shown < 0, easy, shown)}
        return _Case(attribute, prompts, indices, _named(self.world, prompts), before, negatives)

    def _guided(self, generate: Generate, case: _Case, kind: str) -> _Read:
        values = case.negatives[kind].tolist()
        words = [self.world.bare_word(case.attribute, value) for value in values]
        return self._read(generate, case.prompts, words, case.indices)

    def _read(
        self,
        generate: Generate,
        prompts: list[str],
        negatives: list[str] | None,
        indices: list[int],
    ) -> _Read:
        """What the judge reads in the pictures; they are not kept."""
        labels, features = [], []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            words = None if negatives is None else negatives[part]
            pictures = generate(prompts[part], words, indices[part])
            if len(pictures) != len(prompts[part]):
                raise ValueError(
                    f"generate gave {len(pictures)} pictures for {len(prompts[part])} prompts"
                )
            features.append(self.judge.features(pictures))
            labels.append(self.judge.labels_of(features[-1]))
        return _Read(torch.cat(labels), torch.cat(features))

    def _rates(self, reads: Sequence[_Read], kind: str) -> dict[str, Removal]:
        tallies = {
            case.attribute: _count(self.world, case, kind, read.labels)
            for case, read in zip(self._cases, reads, strict=True)
        }
        total = sum(tallies.values(), _Tally())
        return {name: tally.rates() for name, tally in {**tallies, "total": total}.items()}

    def _fidelity(self, reads: Sequence[_Read], kind: str) -> Fidelity:
        if kind not in self._references:
            self._references[kind] = self._reference(kind)
        real = self._references[kind]
        features = torch.cat([read.features for read in reads])
        before = torch.cat([case.before.features for case in self._cases])
        low, high = frechet_interval(features, real)
        distance = frechet_distance(FeatureStats.of(features), real)
        return Fidelity(distance, low, high, frechet_distance(FeatureStats.of(before), real))

    def _reference(self, kind: str) -> FeatureStats:
        """Features of real pictures that show each prompt and not its negative.

        What the prompt leaves open follows the world's priors; the negative's attribute follows
        them among its other values.
        """
        stats = FeatureStats(self._cases[0].before.features.shape[1])
        for case in self._cases:
            for draw in range(REAL_PER_PROMPT):
                avoid = Avoid(case.attribute, case.negatives[kind])
                pictures = self.world.real(
                    self.noise,
                    case.prompts,
                    draw,
                    case.indices,
                    f"removal.real.{case.attribute}",
                    "removal.nuisance",
                    avoid,
                )
                stats.update(self.judge.features(pictures))
        return stats


def _named(world: World, prompts: Sequence[str]) -> Tensor:
    rows = [[world.named(text).get(name, -1) for name in world.attributes] for text in prompts]
    return torch.tensor(rows, dtype=torch.int64).view(len(prompts), len(world.attributes))


def _count(world: World, case: _Case, kind: str, after: Tensor) -> _Tally:
    column = list(world.attributes).index(case.attribute)
    before, named, values = case.before.labels, case.named, case.negatives[kind]
    if kind == "targeted":
        shown = before[:, column] >= 0
        before, named, values, after = before[shown], named[shown], values[shown], after[shown]
    asked = named >= 0
    others = ~asked & (before >= 0)
    others[:, column] = False
    return _Tally(
        n=len(values),
        free=int((after[:, column] != values).sum()),
        free_before=int((before[:, column] != values).sum()),
        named=int(asked.sum()),
        right=int((after == named)[asked].sum()),
        right_before=int((before == named)[asked].sum()),
        others=int(others.sum()),
        unchanged=int((after == before)[others].sum()),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _interval(part: int, whole: int) -> tuple[float | None, float | None]:
    return wilson(part, whole) if whole else (None, None)
