"""What a world is: the interface that training and measuring use, and what worlds share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from snoopi.noise import Noise
from snoopi.tokenize import Tokenizer


class Batch(NamedTuple):
    """Captioned pictures with the truth about them.

    pictures: float32 [b 3 size size] in [-1, 1];  labels: int64 [b a], columns in the order of the
    world's attributes, -1 where a picture shows no value of an attribute.
    """

    pictures: Tensor
    captions: list[str]
    labels: Tensor


class Lesson(NamedTuple):
    """What a judge learns from. pictures, labels: as in Batch. subjects: int64 [b], what else a
    picture shows, from 0 to the world's `subjects` - 1; None where its labels say all there is."""

    pictures: Tensor
    labels: Tensor
    subjects: Tensor | None = None


class Example(NamedTuple):
    """A prompt that leaves an attribute open, and the value a negative prompt names."""

    prompt: str
    attribute: str
    value: int


class Avoid(NamedTuple):
    """Values that real pictures must not show, one for each prompt: int64 [n]."""

    attribute: str
    values: Tensor


class World(Protocol):
    """A captioned picture source; every draw is a function of (seed, stream, step, index).

    attributes: what is known of its pictures, each with its values. vocabulary: the words of its
    captions, sorted. subjects: how many things there are, beside the attributes, for a judge to
    tell apart; or 0. attribution: one line that must go with its pictures, '' where none must.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def attribution(self) -> str: ...
    @property
    def example(self) -> Example: ...
    @property
    def vocabulary(self) -> list[str]: ...
    @property
    def subjects(self) -> int: ...

    def tokenizer(self) -> Tokenizer:
        """A word-level tokenizer of the captions' vocabulary."""

    def batch(
        self, noise: Noise, step: int, indices: Sequence[int], stream: str = "world"
    ) -> Batch:
        """Training pictures with captions; picture i does not depend on its neighbours."""

    def lesson(self, noise: Noise, step: int, indices: Sequence[int], overshoot: float) -> Lesson:
        """Pictures and labels for a judge: rare values are not rare, nuisance is wider."""

    def real(
        self,
        noise: Noise,
        prompts: Sequence[str],
        step: int,
        indices: Sequence[int],
        stream: str = "evaluate.real",
        nuisance: str = "evaluate.nuisance",
        avoid: Avoid | None = None,
    ) -> Tensor:
        """A real picture of each prompt, [n 3 size size]; what it leaves open follows the world's
        priors. avoid: among the values of that attribute but this one."""

    def prompts(
        self,
        noise: Noise,
        count: int | None = None,
        split: str = "train",
        *,
        stream: str = "world.prompts",
        step: int = 0,
        indices: Sequence[int] | None = None,
    ) -> list[str]:
        """Captions alone, of the split "train" or "held-out". Give either count or indices."""

    def removal_cases(
        self,
        noise: Noise,
        attribute: str,
        count: int | None = None,
        split: str = "held-out",
        *,
        stream: str = "world.removal",
        step: int = 0,
        indices: Sequence[int] | None = None,
    ) -> list[str]:
        """Prompts that leave `attribute` open."""

    def bare_word(self, attribute: str, value: int) -> str:
        """The shortest caption of one value, as a negative prompt."""

    def named(self, text: str) -> dict[str, int]:
        """What a caption names: attribute -> value index. ValueError for no caption."""

    def captions(self, split: str | None = None) -> list[str]:
        """Every caption there is, or those of one split."""


def categorical(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Indices drawn with the weights [s], by uniform draws u."""
    edges = np.cumsum(weights)
    return np.searchsorted(edges, u * edges[-1], side="right")


def indices_of(count: int | None, indices: Sequence[int] | None) -> Sequence[int]:
    """The indices of `count` or `indices`. Raises ValueError unless one is given, or both agree."""
    if indices is None and count is not None:
        return range(count)
    if indices is None or (count is not None and count != len(indices)):
        raise ValueError(f"give count or indices, or both of one length, got count={count}")
    return indices
