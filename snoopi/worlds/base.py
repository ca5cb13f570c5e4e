"""What a world is: the interface that training and measuring use, and what worlds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class World(ABC):
    """A captioned picture source; every draw is a function of (seed, stream, step, index).

    attributes: what is known of its pictures, each with its values. vocabulary: the words of its
    captions, sorted. subjects: how many things there are, beside the attributes, for a judge to
    tell apart; or 0. attribution: one line that must go with its pictures, '' where none must.
    """

    name: str
    size: int  # pixels a side
    attributes: Mapping[str, tuple[str, ...]]
    example: Example
    subjects: int = 0
    attribution: str = ""

    def __init__(self) -> None:
        texts = self._texts()
        self.vocabulary: list[str] = sorted({word for text in texts for word in text.split()})
        self.max_tokens: int = max(len(text.split()) for text in texts) + 2  # bos and eos

    @abstractmethod
    def _texts(self) -> list[str]:
        """Every caption there is [s]."""

    @abstractmethod
    def _weights(self, split: str) -> np.ndarray:
        """How often each caption is drawn in a split [s]. Raises ValueError for another split."""

    @abstractmethod
    def _case_weights(self, attribute: str, split: str) -> np.ndarray:
        """The same among the prompts that leave an attribute open [s]."""

    @abstractmethod
    def _bare_word(self, attribute: str, value: int) -> str:
        """`bare_word` of a value that there is."""

    @abstractmethod
    def batch(
        self, noise: Noise, step: int, indices: Sequence[int], stream: str = "world"
    ) -> Batch:
        """Training pictures with captions; picture i does not depend on its neighbours."""

    @abstractmethod
    def lesson(self, noise: Noise, step: int, indices: Sequence[int], overshoot: float) -> Lesson:
        """Pictures and labels for a judge: rare values are not rare, nuisance is wider."""

    @abstractmethod
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

    @abstractmethod
    def named(self, text: str) -> dict[str, int]:
        """What a caption names: attribute -> value index. ValueError for no caption."""

    def tokenizer(self) -> Tokenizer:
        """A word-level tokenizer of the captions' vocabulary."""
        return Tokenizer.words(self.vocabulary, self.max_tokens)

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
        """Captions alone, with the priors of the training captions.

        "train": as in training, bare words and empty captions included; "held-out": captions never
        trained on, each saying two things or more. Give either count or indices.
        """
        return self._draw(noise, stream, step, _indices(count, indices), self._weights(split))

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
        """Prompts that leave `attribute` open.

        Raises ValueError for an unknown attribute or split.
        """
        self._values(attribute)
        weights = self._case_weights(attribute, split)
        stream = f"{stream}.{attribute}"
        return self._draw(noise, stream, step, _indices(count, indices), weights)

    def bare_word(self, attribute: str, value: int) -> str:
        """The caption of one value alone, as a negative prompt."""
        values = self._values(attribute)
        if not 0 <= value < len(values):
            raise ValueError(f"{attribute} has values 0..{len(values) - 1}, got {value}")
        return self._bare_word(attribute, value)

    def captions(self, split: str | None = None) -> list[str]:
        """Every caption there is, or those of one split."""
        if split is None:
            return list(self._texts())
        return [t for t, p in zip(self._texts(), self._weights(split), strict=True) if p > 0]

    def _values(self, attribute: str) -> tuple[str, ...]:
        if attribute not in self.attributes:
            known = ", ".join(self.attributes)
            raise ValueError(f"unknown attribute {attribute!r}: expected {known}")
        return self.attributes[attribute]

    def _draw(
        self, noise: Noise, stream: str, step: int, indices: Sequence[int], weights: np.ndarray
    ) -> list[str]:
        u = noise.uniform(stream, step, indices).double().numpy()
        return [self._texts()[i] for i in categorical(weights, u)]


def categorical(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Indices drawn with the weights [s], by uniform draws u."""
    edges = np.cumsum(weights)
    return np.searchsorted(edges, u * edges[-1], side="right")


def _indices(count: int | None, indices: Sequence[int] | None) -> Sequence[int]:
    """The indices of `count` or `indices`. Raises ValueError unless one is given, or both agree."""
    if indices is None and count is not None:
        return range(count)
    if indices is None or (count is not None and count != len(indices)):
        raise ValueError(f"give count or indices, or both of one length, got count={count}")
    return indices
