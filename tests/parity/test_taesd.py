"""TAESD against diffusers' AutoencoderTiny."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.models.vae import TAESD, TAESDConfig
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity


def pair(scaling: float = 1.0) -> tuple[TAESD, Any]:
    config = TAESDConfig(channels=16, scaling=scaling)
    theirs = oracle.package("diffusers").AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
        scaling_factor=scaling,
    )
    oracle.randomise(theirs)
    ours = TAESD(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (36, 50)])
def test_encode_equals_diffusers(size: tuple[int, int], scaling: float) -> None:
    ours, theirs = pair(scaling)
    x = randn(2, 3, *size).clamp(-1, 1)

    def want() -> Tensor:
        return theirs.encode(x).latents * theirs.config.scaling_factor

    def report() -> str:
        return oracle.hidden_report(ours, theirs, lambda: ours.encode(x), want)

    oracle.close(f"encode {size}", ours.encode(x), want(), report)
    assert torch.equal(ours.encode(x, randn(2, 4, 1, 1)), ours.encode(x))


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_decode_equals_diffusers(size: tuple[int, int], scaling: float) -> None:
    ours, theirs = pair(scaling)
    z = 3 * randn(2, 4, *size, seed=2)  # where the squashing bites

    def want() -> Tensor:
        return theirs.decode(z / theirs.config.scaling_factor).sample

    def report() -> str:
        return oracle.hidden_report(ours, theirs, lambda: ours.decode(z), want)

    oracle.close(f"decode {size}", ours.decode(z), want(), report)


def test_reconstructions_equal_diffusers_without_its_bytes() -> None:
    """AutoencoderTiny.forward alone stores latents as bytes in between; its methods do not."""
    ours, theirs = pair()
    x = randn(1, 3, 32, 48).clamp(-1, 1)
    oracle.close("reconstruction", ours(x), theirs.decode(theirs.encode(x).latents).sample)
    z = ours.encode(x)
    levels = torch.round(z.div(6).add(0.5).clamp(0, 1) * 255) / 255
    assert oracle.errors(ours(x), theirs(x).sample)[0] > 1e-4
    oracle.close("through bytes", ours.decode((levels - 0.5) * 6), theirs(x).sample)


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
def test_presets_have_the_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs = oracle.package("diffusers").AutoencoderTiny()  # its defaults are TAESD
    ours = zoo.build(name, "vae")
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(theirs))
    assert oracle.count(ours) == 2_445_063
    config = ours.config
    assert config.scaling == theirs.config.scaling_factor == 1.0
    assert (config.factor, config.latent_channels) == (8, 4)
