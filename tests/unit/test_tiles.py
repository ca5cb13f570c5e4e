"""Decoding in tiles: the same picture where the decoder sees no further than a tile."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from snoopi import tiles, zoo
from snoopi.models.vae import VAE, PatchVAE, PatchVAEConfig, VAEConfig
from snoopi.noise import Noise
from snoopi.tiles import decode_tiled


def patches() -> PatchVAE:
    """A decoder whose patches do not see one another."""
    vae = PatchVAE(PatchVAEConfig())
    for i, p in enumerate(vae.parameters()):
        p.data = Noise(1).normal("patches", 0, [i], p.shape)[0]
    return vae


def latents(*shape: int) -> Tensor:
    return Noise(0).normal("z", 0, range(shape[0]), shape[1:])


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("size", [(9, 8), (8, 23), (17, 31)])
def test_tiles_of_a_local_decoder_are_the_whole(size: tuple[int, int], overlap: float) -> None:
    vae, z = patches(), latents(2, 16, *size)
    torch.testing.assert_close(decode_tiled(vae, z, 8, overlap), vae.decode(z))


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_pieces_cover_a_side_and_weigh_one(shared: int) -> None:
    for side in range(1, 70):
        pieces = tiles._pieces(side, 8, shared, 4)
        total = torch.zeros(4 * side)
        for piece in pieces:
            assert piece.latent.stop - piece.latent.start <= 8 and piece.latent.stop <= side
            total[piece.picture] += piece.weights
            assert (piece.weights > 0).all()
        torch.testing.assert_close(total, torch.ones(4 * side))
        common = [a.latent.stop - b.latent.start for a, b in pairwise(pieces)]
        assert all(shared <= n <= shared + 1 for n in common)  # no more is decoded twice than asked


def test_a_seam_is_blended_linearly() -> None:
    """Two tiles of flat colour: across what they share the picture is a straight line."""

    class Flat(PatchVAE):
        def decode(self, latents: Tensor) -> Tensor:
            return torch.full((1, 3, 32, 32), float(latents.flatten()[0]))

    z = torch.arange(14.0).expand(1, 16, 8, 14)  # tiles from column 0 and column 6
    row = decode_tiled(Flat(PatchVAEConfig()), z, 8)[0, 0, 0]
    assert (row[:24] == 0).all() and (row[32:] == 6).all()
    torch.testing.assert_close(row[24:32], 6 * (torch.arange(8) + 0.5) / 8)


def test_a_picture_within_a_tile_is_the_plain_decode_bit_for_bit() -> None:
    config = VAEConfig(channels=(16, 32), resnets=1, norm_groups=8)
    vae, z = VAE(config).eval(), latents(2, 4, 8, 6)
    with torch.no_grad():
        assert torch.equal(decode_tiled(vae, z, 8), vae.decode(z))
        larger = decode_tiled(vae.bfloat16(), z.bfloat16(), 5)  # norms see one tile: another one
    assert larger.shape == (2, 3, 16, 12) and larger.dtype == torch.bfloat16


def test_one_tile_is_decoded_at_a_time() -> None:
    seen = []

    class Watched(PatchVAE):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(tuple(latents.shape))
            return super().decode(latents)

    decode_tiled(Watched(PatchVAEConfig()), latents(3, 16, 16, 16), 8)
    assert len(seen) == 3 * 9
    assert all(shape[0] == 1 and max(shape[2:]) <= 8 for shape in seen)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (0, 0.25, "tile must be at least 2 latent pixels, got 0"),
        (-8, 0.25, "tile must be at least 2 latent pixels, got -8"),
        (8, 0.75, "overlap must be from 0 to 0.5 of a tile, got 0.75"),
        (8, -0.1, "overlap must be from 0 to 0.5"),
        (8, float("nan"), "overlap must be from 0 to 0.5"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tile: int, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_tiled(zoo.build("taesd", "vae", "cpu"), latents(1, 4, 4, 4), tile, overlap)
