"""Kernel distance between two sets of features (Binkowski et al. 2018), in float64 throughout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snoopi.noise import Noise

SUBSETS, SIZE = 100, 1000  # of the paper's protocol, and torch-fidelity's


class KernelDistance(NamedTuple):
    """Mean and population standard deviation of the squared MMD over subsets."""

    mean: float
    std: float


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features [n d] and [m d] under the kernel (x y / d + 1)^3.

    The mean of the kernel over pairs of different rows of x, plus that of y, minus twice the mean
    over pairs of a row of each. It may be negative.

    Raises:
        ValueError: features that are not finite [n d] of one width, or fewer than two rows.
    """
    _check(x, y, 2)
    x, y = x.double(), y.double()
    return (_within(x) + _within(y) - 2 * _kernel(x, y).mean()).item()


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = SUBSETS, size: int = SIZE, seed: int = 0
) -> KernelDistance:
    """The squared MMD of `subsets` random pairs of subsets of `size` rows, real [n d], fake [m d].

    Rows of a subset are drawn without repetition, from the seed alone. The distance has no bias at
    any size, so sets of different sizes compare.

    Raises:
        ValueError: features that are not finite [n d] of one width, fewer rows than `size`,
            `subsets` below one or `size` below two.
    """
    if subsets < 1 or size < 2:
        raise ValueError(
            f"subsets must be at least 1 and size at least 2, got {subsets} and {size}"
        )
    _check(real, fake, size)
    noise, found = Noise(seed), []
    for subset in range(subsets):
        draw = noise.generator("kid", 0, subset)
        rows = [torch.from_numpy(draw.permutation(len(x))[:size]) for x in (real, fake)]
        found.append(squared_mmd(real[rows[0]], fake[rows[1]]))
    values = torch.tensor(found, dtype=torch.float64)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3  # [n m]


def _within(x: Tensor) -> Tensor:
    """The mean of the kernel over pairs of different rows."""
    kernel, n = _kernel(x, x), len(x)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))


def _check(real: Tensor, fake: Tensor, least: int) -> None:
    for rows in (real, fake):
        if rows.ndim != 2 or not bool(rows.isfinite().all()):
            raise ValueError(f"features must be finite [n d], got {list(rows.shape)}")
        if len(rows) < least:
            raise ValueError(f"the kernel distance needs {least} rows a side, got {len(rows)}")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features of {real.shape[1]} and {fake.shape[1]} values cannot be compared"
        )
