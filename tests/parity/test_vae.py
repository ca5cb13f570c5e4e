"""The VAE against diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.models.vae import VAE, VAEConfig
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity
CHANNELS = (16, 32, 48, 48)


def their_config(channels: tuple[int, ...], groups: int) -> dict[str, Any]:
    """The published vae/config.json, at other widths."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": groups,
    }


def pair(scaling: float) -> tuple[VAE, Any]:
    diffusers = oracle.package("diffusers")
    config = their_config(CHANNELS, 8) | {"scaling_factor": scaling}
    theirs = oracle.randomise(diffusers.AutoencoderKL(**config))
    ours = VAE(VAEConfig(channels=CHANNELS, norm_groups=8, scaling=scaling)).eval()
    ours.requires_grad_(False).load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (36, 50)])
@pytest.mark.parametrize("scaling", [0.18215, 0.13025])
def test_encode_equals_diffusers(scaling: float, size: tuple[int, int]) -> None:
    ours, theirs = pair(scaling)
    x = randn(2, 3, *size).clamp(-1, 1)

    def got() -> tuple[Tensor, Tensor]:
        return ours.moments(x)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, got, lambda: theirs.encode(x))

    latent = theirs.encode(x).latent_dist
    oracle.close(f"encode {size} mean", got()[0], latent.mean, report)
    oracle.close(f"encode {size} logvar", got()[1], latent.logvar, report)
    oracle.close("latents", ours.encode(x), latent.mean * theirs.config.scaling_factor, report)
    eps = randn(*latent.mean.shape, seed=1)
    want = (latent.mean + latent.std * eps) * theirs.config.scaling_factor
    oracle.close("sampled latents", ours.encode(x, eps), want, report)


@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
@pytest.mark.parametrize("scaling", [0.18215, 0.13025])
def test_decode_equals_diffusers(scaling: float, size: tuple[int, int]) -> None:
    ours, theirs = pair(scaling)
    z = randn(2, 4, *size, seed=2)

    def want() -> Tensor:
        return theirs.decode(z / theirs.config.scaling_factor).sample

    def report() -> str:
        return oracle.hidden_report(ours, theirs, lambda: ours.decode(z), want)

    oracle.close(f"decode {size}", ours.decode(z), want(), report)


def test_log_variance_is_clamped_like_diffusers() -> None:
    ours, theirs = pair(0.18215)
    with torch.no_grad():
        for net in (ours, theirs):
            net.quant_conv.weight[4:] *= 200
    x = randn(1, 3, 32, 32)
    logvar = ours.moments(x)[1]
    assert float(logvar.min()) == -30 and float(logvar.max()) == 20
    # 200 times the values has 200 times the rounding inside the clamp: compare where it bites.
    bites = logvar.abs().ge(20) & (logvar.eq(-30) | logvar.eq(20))
    assert torch.equal(logvar[bites], theirs.encode(x).latent_dist.logvar[bites])


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl"])
def test_presets_have_the_published_names_and_shapes(preset: str) -> None:
    diffusers = oracle.package("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**their_config((128, 256, 512, 512), 32))
    ours = zoo.build(preset, "vae")
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(theirs))
    assert oracle.count(ours) == 83_653_863
    assert oracle.count(ours.encoder) == 34_163_592
    assert oracle.count(ours.decoder) == 49_490_179
    assert len(ours.state_dict()) == 248
    assert ours.config.scaling == (0.13025 if preset == "sdxl" else 0.18215)
