"""Stateless randomness: every number is a function of (seed, stream, step, sample index).

Nothing is saved but the step: one rank, many ranks and a resumed run draw the same numbers, and
sample i is the same at any batch size. Drawn on the CPU, so devices agree too.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 16  # numbers of 16 bits that one count of a Philox generator makes


@dataclass(frozen=True)
class Noise:
    """The random numbers of one run.

    A draw is keyed by a stream name ("z", "t", "eps", ...), a step and GLOBAL sample indices; each
    sample has a Philox generator of its own under a 128-bit hash of all four (torch's CPU generator
    keeps 32 bits of a seed, which collide at millions of samples).
    """

    seed: int

    def generator(self, stream: str, step: int, index: int) -> np.random.Generator:
        """A fresh generator for one sample of one stream at one step."""
        text = struct.pack("<qqq", self.seed, step, index) + stream.encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def sample(self, stream: str, step: int, index: int, shape: Sequence[int]) -> Tensor:
        """N(0, 1) of one sample, float32 [*shape]."""
        return self.normal(stream, step, [index], shape)[0]

    def normal(
        self, stream: str, step: int, indices: Sequence[int], shape: Sequence[int] = ()
    ) -> Tensor:
        """N(0, 1), float32 [len(indices), *shape]."""
        out = np.empty((len(indices), *shape), dtype=np.float32)
        for row, index in enumerate(indices):
            out[row] = self.generator(stream, step, index).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(out)

    def uniform(
        self,
        stream: str,
        step: int,
        indices: Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        shape: Sequence[int] = (),
    ) -> Tensor:
        """U[low, high), float32 [len(indices), *shape]; low == high gives the constant exactly."""
        out = np.empty((len(indices), *shape), dtype=np.float32)
        for row, index in enumerate(indices):
            out[row] = self.generator(stream, step, index).random(shape, dtype=np.float32)
        return torch.from_numpy(low + (high - low) * out)

    def integers(
        self,
        stream: str,
        step: int,
        indices: Sequence[int],
        low: int,
        high: int,
        shape: Sequence[int] = (),
    ) -> Tensor:
        """Integers in [low, high), int64 [len(indices), *shape]."""
        out = np.empty((len(indices), *shape), dtype=np.int64)
        for row, index in enumerate(indices):
            out[row] = self.generator(stream, step, index).integers(low, high, shape)
        return torch.from_numpy(out)

    def bits(self, stream: str, step: int, first: int, count: int) -> Tensor:
        """16 random bits of each of the elements first, first + 1, ... of one long row; int32.

        An element's bits are the same whichever part of the row is asked for.
        """
        source = self.generator(stream, step, 0).bit_generator
        assert isinstance(source, np.random.Philox)
        skip = first % _AT_ONCE
        source.advance(first // _AT_ONCE)
        words = source.random_raw(-(-(skip + count) // 4)).astype("<u8", copy=False)
        return torch.from_numpy(words.view("<u2")[skip : skip + count].astype(np.int32))
