"""Decoding of big pictures piece by piece, in bounded memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Piece(NamedTuple):
    """A tile along one side: where it lies in latent and picture, and its weights [pixels]."""

    latent: slice
    picture: slice
    weights: Tensor


def decode_tiled(vae: Any, latents: Tensor, tile: int, overlap: float = 0.25) -> Tensor:
    """Latents [b c h w] -> pictures [b 3 H W], decoded in tiles that overlap and are blended.

    tile: the most latent pixels of a tile's side. overlap: the share of that which neighbours have
    in common; there each one's weight falls linearly to 0. One tile of one picture is decoded at a
    time, so memory is that of a tile and of the result. Latents that fit into a tile are decoded as
    they are, bit for bit as without tiles; in larger ones norms and attention see one tile only, so
    colours may differ a little across the picture.

    Raises ValueError for a tile below 2, or an overlap that is not from 0 to 0.5.
    """
    check_tile(tile)
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap must be from 0 to 0.5 of a tile, got {overlap}")
    batch, _, height, width = latents.shape
    if height <= tile and width <= tile:
        return vae.decode(latents)
    factor = vae.config.factor
    rows, columns = (_pieces(n, tile, round(tile * overlap), factor) for n in (height, width))
    pictures = torch.zeros(batch, 3, height * factor, width * factor, device=latents.device)
    for latent, picture in zip(latents.split(1), pictures.split(1), strict=True):
        for y in rows:
            for x in columns:
                part = vae.decode(latent[:, :, y.latent, x.latent])
                weights = (y.weights[:, None] * x.weights).to(part.device)
                picture[:, :, y.picture, x.picture] += weights * part
    return pictures.to(latents.dtype)


def check_tile(tile: int | None) -> None:
    """ValueError for a tile that is no side of a square; None is no tiling."""
    if tile is not None and tile < 2:
        raise ValueError(f"tile must be at least 2 latent pixels, got {tile}")


def _pieces(side: int, tile: int, shared: int, factor: int) -> list[_Piece]:
    """The fewest equal pieces of a side with `shared` in common; their weights add up to 1."""
    count = 1 + -(-max(side - tile, 0) // (tile - shared))
    tile = -(-(side + (count - 1) * shared) // count)  # as many of this size reach as far
    starts = [i * (side - tile) // max(count - 1, 1) for i in range(count)]
    weights = torch.zeros(len(starts), side * factor)
    pieces = []
    for row, start in zip(weights, starts, strict=True):
        latent = slice(start, start + tile)
        picture = slice(start * factor, (start + tile) * factor)
        rise = ((torch.arange(tile * factor) + 0.5) / max(shared * factor, 0.5)).clamp(max=1)
        row[picture] = 1
        if start > 0:
            row[picture] = rise
        if start + tile < side:
            row[picture] = torch.minimum(row[picture], rise.flip(0))
        pieces.append(_Piece(latent, picture, row[picture]))
    total = weights.sum(0)
    return [p._replace(weights=p.weights / total[p.picture]) for p in pieces]
