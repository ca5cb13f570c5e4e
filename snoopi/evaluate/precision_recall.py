"""Improved precision and recall (Kynkaanniemi et al. 2019): are pictures real, are all kinds there?

Letters: n rows of one set, m of the other, d features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Shares of fake rows within the real manifold, and of real rows within the fake one.

    A manifold is the union of balls around its rows that reach the k-th nearest neighbour. Squared
    distances are taken in float64, in tiles of block x block: no n x m matrix is ever held.

    Raises ValueError for features that are not finite [n d] of one width, or n <= k.
    """
    for name, rows in (("real", real), ("fake", fake)):
        _check(name, rows, k)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features of {real.shape[1]} and {fake.shape[1]} values cannot be compared"
        )
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be positive, got k={k} block={block}")
    # A common shift changes no distance and keeps |a|^2 + |b|^2 - 2ab away from cancellation.
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre
    precision = _inside(fake, real, _radii(real, k, block), block)
    recall = _inside(real, fake, _radii(fake, k, block), block)
    return precision, recall


def _check(name: str, rows: Tensor, k: int) -> None:
    if rows.ndim != 2 or not bool(rows.isfinite().all()):
        raise ValueError(f"{name} features must be finite [n d], got {list(rows.shape)}")
    if len(rows) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} {name} rows, got {len(rows)}")


def _blocks(rows: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + block]) for start in range(0, len(rows), block))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n m], never negative."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return (squares - 2 * a @ b.T).clamp(min=0)


def _radii(rows: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row: [n]."""
    radii = []
    for start, part in _blocks(rows, block):
        nearest = part.new_full((len(part), k), torch.inf)
        for other, columns in _blocks(rows, block):
            tile = _squared_distances(part, columns)
            if other == start:
                tile.fill_diagonal_(torch.inf)  # a row is no neighbour of its own
            nearest = torch.cat([nearest, tile], 1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _inside(rows: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Share of rows that lie in a ball around any centre."""
    hits = 0
    for _, part in _blocks(rows, block):
        found = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for start, columns in _blocks(centres, block):
            near = _squared_distances(part, columns) <= radii[start : start + block]
            found |= near.any(1)
        hits += int(found.sum())
    return hits / len(rows)
