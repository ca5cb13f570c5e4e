"""Measuring a generator on a world: held-out prompts, a judge, real pictures of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from snoopi.evaluate.fid import FeatureStats, frechet_distance
from snoopi.evaluate.precision_recall import precision_recall
from snoopi.evaluate.removal import all_named_right
from snoopi.noise import Noise
from snoopi.worlds import World
from snoopi.worlds.judge import Judge

Draw = Callable[[list[str], list[int]], Tensor]
"""(prompts, noise indices) -> pictures [b 3 H W] in [-1, 1]."""

REAL_PER_PROMPT = 4  # real pictures behind the Frechet reference, for each prompt


@dataclass(frozen=True)
class Quality:
    """A generator on n held-out prompts.

    all_right: pictures that show everything their prompt names. attributes: the same for each
    attribute. frechet: in the judge's 64 features, against real pictures of the same prompts.
    precision, recall: k = 3 nearest neighbours in those features, one real picture a prompt.
    """

    n: int
    all_right: float
    attributes: dict[str, float]
    frechet: float
    precision: float
    recall: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


class Ruler:
    """Held-out prompts of a world with what real pictures of them look like to the judge.

    Everything is a function of (seed, count): every generator is measured on the same prompts with
    the same noise indices 0..count-1. The real pictures show what each prompt names; what it leaves
    open follows the world's priors.
    """

    def __init__(self, world: World, judge: Judge, count: int, seed: int = 0) -> None:
        self.world, self.judge, self.count = world, judge, count
        noise = Noise(seed)
        self.prompts = world.prompts(noise, count, "held-out", stream="evaluate.prompts")
        draws = range(REAL_PER_PROMPT)
        features = [judge.features(self._real(noise, draw)) for draw in draws]
        self._stats = FeatureStats.of(torch.cat(features))
        self._real_features = features[0]

    def _real(self, noise: Noise, draw: int) -> Tensor:
        """One real picture for each prompt."""
        return self.world.real(noise, self.prompts, draw, range(self.count))

    def real(self) -> Tensor:
        """Other real pictures of the prompts [n 3 H W]: their quality is the best there is."""
        return self._real(Noise(1), REAL_PER_PROMPT)

    def measure(self, draw: Draw, batch: int = 100) -> Quality:
        """The quality of a generator on the ruler's prompts."""
        return self.judge_pictures(self.draw(draw, batch))

    def draw(self, draw: Draw, batch: int = 100) -> Tensor:
        """One picture for each of the ruler's prompts, `batch` at once."""
        parts = [range(i, min(i + batch, self.count)) for i in range(0, self.count, batch)]
        return torch.cat([draw([self.prompts[i] for i in part], list(part)) for part in parts])

    def judge_pictures(self, pictures: Tensor) -> Quality:
        """The quality of one picture for each of the ruler's prompts, in order."""
        features = self.judge.features(pictures)
        labels = self.judge.labels_of(features)
        right, attributes = all_named_right(self.world, labels, self.prompts)
        frechet = frechet_distance(FeatureStats.of(features), self._stats)
        precision, recall = precision_recall(self._real_features, features)
        return Quality(self.count, right, attributes, frechet, precision, recall)


def gap_closed(student: float, one_step: float, many_steps: float) -> float:
    """The share of the Frechet gap between a teacher's one step and its many that is closed.

    (F_1 - F_student) / (F_1 - F_many); 1 is as good as the many steps, above 1 better.
    """
    return (one_step - student) / (one_step - many_steps)


def pick(prompts: Sequence[str], count: int) -> list[int]:
    """Indices of `count` different prompts, the ones naming most first come first served."""
    seen: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        seen.setdefault(prompt, i)
    longest = sorted(seen.values(), key=lambda i: -len(prompts[i].split()))
    return sorted(longest[:count])
