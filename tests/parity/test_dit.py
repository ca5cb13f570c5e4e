"""The DiT against diffusers' PixArtTransformer2DModel: outputs when tiny, names at full size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.conditioning import Conditioning
from snoopi.models.dit import DiT, DiTConfig, positions
from tests.parity import oracle
from tests.parity.oracle import randn
from tests.parity.test_nasa import Algorithm1, with_algorithm1

pytestmark = pytest.mark.parity

# name: (diffusers' config, ours)
TINY: dict[str, tuple[dict[str, Any], DiTConfig]] = {
    "sigma": (
        {"sample_size": 8, "out_channels": 8},
        DiTConfig(layers=3, heads=2, head_dim=12, text_width=20, sample_size=8),
    ),
    "sizes": (
        {
            "sample_size": 16,
            "out_channels": 8,
            "interpolation_scale": 2,
            "use_additional_conditions": True,
        },
        DiTConfig(
            layers=3,
            heads=2,
            head_dim=12,
            text_width=20,
            sample_size=16,
            interpolation=2.0,
            size_embed=True,
        ),
    ),
    "plain": (
        {"sample_size": 8, "out_channels": 4, "patch_size": 1},
        DiTConfig(
            out_channels=4, patch=1, layers=3, heads=2, head_dim=12, text_width=20, sample_size=8
        ),
    ),
}


def their_config(config: DiTConfig, more: dict[str, Any]) -> dict[str, Any]:
    """diffusers' arguments: the published transformer/config.json's at our sizes."""
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.layers,
        "cross_attention_dim": config.width,
        "caption_channels": config.text_width,
        "in_channels": 4,
        "patch_size": 2,
        "use_additional_conditions": False,
        "interpolation_scale": 1,
        **more,
    }


def pair(name: str, seed: int = 0) -> tuple[DiT, Any]:
    """Our DiT and diffusers' with the same random weights, loaded strictly by name."""
    diffusers = oracle.package("diffusers")
    more, config = TINY[name]
    theirs = diffusers.PixArtTransformer2DModel(**their_config(config, more))
    oracle.randomise(theirs, seed)
    ours = DiT(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def text(config: DiTConfig, b: int, n: int = 7, seed: int = 1) -> Conditioning:
    """Random text features, with sizes where the network reads them."""
    sizes = torch.tensor([[512.0, 768.0, 512 / 768], [1024.0, 1000.0, 1.024]])
    return Conditioning(
        randn(b, n, config.text_width, seed=seed),
        size_ids=sizes[torch.arange(b) % 2] if config.size_embed else None,
    )


def their_prediction(net: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """diffusers' forward on our conditioning; the learned variance is cut off."""
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if cond.size_ids is not None:
        sizes = {"resolution": cond.size_ids[:, :2], "aspect_ratio": cond.size_ids[:, 2:]}
    out = net(
        x,
        encoder_hidden_states=cond.tokens,
        timestep=t,
        added_cond_kwargs=sizes,
        encoder_attention_mask=cond.mask,
        return_dict=False,
    )[0]
    return out[:, :4]


def check(name: str, ours: DiT, theirs: Any, x: Tensor, t: Tensor, cond: Conditioning) -> None:
    def got() -> Tensor:
        return ours(x, t, cond)

    def want() -> Tensor:
        return their_prediction(theirs, x, t, cond)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, got, want)

    oracle.close(name, got(), want(), report)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (4, 10), (2, 2)])
@pytest.mark.parametrize("name", TINY)
def test_outputs_equal_diffusers(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(name)
    x, t = randn(3, 4, *size, seed=2), torch.tensor([0, 431, 999])
    check(f"{name} {size}", ours, theirs, x, t, text(ours.config, 3))


@pytest.mark.parametrize("name", TINY)
def test_text_mask_equals_diffusers(name: str) -> None:
    ours, theirs = pair(name, seed=5)
    x, cond = randn(2, 4, 8, 8, seed=6), text(ours.config, 2)
    mask = torch.tensor([[True] * 7, [True] * 2 + [False] * 5])
    masked = replace(cond, mask=mask)
    check(f"{name} masked text", ours, theirs, x, torch.tensor([5, 700]), masked)
    whole = ours(x, torch.tensor([5, 700]), cond)
    assert oracle.errors(ours(x, torch.tensor([5, 700]), masked), whole)[0] > 0.01


@pytest.mark.parametrize("name", TINY)
def test_float_timesteps_are_not_rounded(name: str) -> None:
    ours, theirs = pair(name, seed=3)
    x, cond = randn(3, 4, 8, 8, seed=4), text(ours.config, 3)
    t = torch.tensor([1000.0, 271.5, 0.25])
    check(f"{name} float t", ours, theirs, x, t, cond)
    assert not torch.equal(ours(x, t, cond), ours(x, t.floor(), cond))


def test_sizes_change_the_prediction() -> None:
    ours, _ = pair("sizes")
    x, cond, t = randn(2, 4, 8, 8), text(ours.config, 2), torch.tensor([5, 700])
    assert cond.size_ids is not None
    for column in range(3):
        other = cond.size_ids.clone()
        other[:, column] += 3
        changed = ours(x, t, replace(cond, size_ids=other))
        assert oracle.errors(changed, ours(x, t, cond))[0] > 1e-4


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 80)])
def test_positions_equal_diffusers_bit_for_bit(size: tuple[int, int]) -> None:
    embeddings = oracle.package("diffusers.models.embeddings")
    for preset in ("pixart-256", "pixart-512", "pixart-1024"):
        config = zoo.preset(preset).backbone
        assert isinstance(config, DiTConfig)
        want = embeddings.get_2d_sincos_pos_embed(
            config.width,
            size,
            base_size=config.sample_size // config.patch,
            interpolation_scale=config.interpolation,
        )
        assert torch.equal(positions(config, size), want.float())


@pytest.mark.parametrize(
    ("preset", "more", "tensors"),
    [
        ("pixart-256", {"sample_size": 32}, 603),
        ("pixart-512", {"sample_size": 64}, 603),
        ("pixart-1024", {"sample_size": 128, "use_additional_conditions": True}, 611),
    ],
)
def test_presets_have_the_published_names_and_shapes(
    preset: str, more: dict[str, Any], tensors: int
) -> None:
    diffusers = oracle.package("diffusers")
    config = zoo.preset(preset).backbone
    assert isinstance(config, DiTConfig)
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(
            **their_config(config, {"out_channels": 8, "interpolation_scale": None, **more})
        )
    ours = zoo.build(preset)
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(theirs))
    assert oracle.count(ours) == oracle.count(theirs)
    assert len(ours.state_dict()) == tensors
    assert theirs.pos_embed.interpolation_scale == config.interpolation


@pytest.mark.parametrize("scale", [0.3, 1.0, -0.5])
@pytest.mark.parametrize("name", TINY)
def test_nasa_with_masks_equals_algorithm_1(name: str, scale: float) -> None:
    """Texts of different lengths, each with its mask; both go through the caption projection."""
    ours, theirs = pair(name)
    x, t = randn(2, 4, 8, 8, seed=12), torch.tensor([999, 3])
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    neg_mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    cond = replace(text(ours.config, 2), mask=mask)
    negative = Conditioning(text(ours.config, 2, n=5, seed=21).tokens, neg_mask)
    guided = replace(cond, negative=negative, nasa_scale=scale)
    projected = theirs.caption_projection(negative.tokens)
    with_algorithm1(theirs, Algorithm1(projected, scale, neg_mask))

    def got() -> Tensor:
        return ours(x, t, guided)

    def want() -> Tensor:
        return their_prediction(theirs, x, t, cond)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, got, want)

    oracle.close(f"{name} NASA {scale}", got(), want(), report)
    with torch.no_grad():
        packed = ours.text_kv(guided)
    oracle.close(f"{name} NASA {scale} packed", ours(x, t, packed), want())
    assert oracle.errors(got(), ours(x, t, cond))[0] > 0.01
