"""The UNet against diffusers' UNet2DConditionModel: outputs when tiny, names at full size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.conditioning import Conditioning
from snoopi.layers.embeddings import sinusoid
from snoopi.models.unet import UNet, UNetConfig
from tests.parity import oracle
from tests.parity.oracle import SD15, SD21, SDXL, randn

pytestmark = pytest.mark.parity
SMALL = {"norm_num_groups": 8, "cross_attention_dim": 24}
SMALL_OURS: dict[str, Any] = {"norm_groups": 8, "text_width": 24}

# name: (diffusers' config, ours)
TINY: dict[str, tuple[dict[str, Any], UNetConfig]] = {
    "sd15": (
        SD15 | SMALL | {"block_out_channels": (24, 32, 32, 48), "attention_head_dim": 2},
        UNetConfig(channels=(24, 32, 32, 48), heads=(2, 2, 2, 2), **SMALL_OURS),
    ),
    "sd21": (
        SD21 | SMALL | {"block_out_channels": (16, 32, 64, 64), "attention_head_dim": (1, 2, 4, 4)},
        UNetConfig(channels=(16, 32, 64, 64), heads=(1, 2, 4, 4), linear_proj=True, **SMALL_OURS),
    ),
    "sdxl": (
        SDXL
        | SMALL
        | {
            "block_out_channels": (16, 32, 64),
            "attention_head_dim": (1, 2, 4),
            "transformer_layers_per_block": (1, 1, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
        UNetConfig(
            channels=(16, 32, 64),
            depth=(0, 1, 2),
            mid_depth=2,
            heads=(1, 2, 4),
            linear_proj=True,
            pooled_width=20,
            size_width=8,
            **SMALL_OURS,
        ),
    ),
}
LCM_WIDTH = 32


def pair(name: str, lcm: bool = False, seed: int = 0) -> tuple[UNet, Any]:
    """Our UNet and diffusers' with the same random weights, loaded strictly by name."""
    diffusers = oracle.package("diffusers")
    theirs_config, config = TINY[name]
    if lcm:
        theirs_config = theirs_config | {"time_cond_proj_dim": LCM_WIDTH}
        config = UNetConfig(**{**vars(config), "guidance_width": LCM_WIDTH})
    theirs = oracle.randomise(diffusers.UNet2DConditionModel(**theirs_config), seed)
    ours = UNet(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def text(config: UNetConfig, b: int, n: int = 7, seed: int = 1) -> Conditioning:
    """Random text features, with SDXL's pooled text and sizes where the network reads them."""
    if config.pooled_width is None:
        return Conditioning(randn(b, n, config.text_width, seed=seed))
    sizes = torch.tensor([[1024, 768, 0, 16, 1000, 999], [64, 64, 3, 0, 64, 72]])
    return Conditioning(
        randn(b, n, config.text_width, seed=seed),
        pooled=randn(b, config.pooled_width, seed=seed + 1),
        size_ids=sizes[torch.arange(b) % 2],
    )


def their_prediction(net: Any, x: Tensor, t: Tensor, cond: Conditioning, **more: Any) -> Tensor:
    """diffusers' forward on our conditioning."""
    if cond.pooled is not None:
        more["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.size_ids}
    if cond.mask is not None:
        more["encoder_attention_mask"] = cond.mask
    return net(x, t, cond.tokens, return_dict=False, **more)[0]


def check(name: str, ours: UNet, theirs: Any, x: Tensor, t: Tensor, cond: Conditioning) -> None:
    def got() -> Tensor:
        return ours(x, t, cond)

    def want() -> Tensor:
        return their_prediction(theirs, x, t, cond)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, got, want)

    oracle.close(name, got(), want(), report)


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 7), (1, 5)])
@pytest.mark.parametrize("name", TINY)
def test_outputs_equal_diffusers(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(name)
    x = randn(3, 4, *size, seed=2)
    check(f"{name} {size}", ours, theirs, x, torch.tensor([0, 431, 999]), text(ours.config, 3))


@pytest.mark.parametrize("name", TINY)
def test_float_timesteps_are_not_rounded(name: str) -> None:
    ours, theirs = pair(name, seed=3)
    x, cond = randn(3, 4, 8, 8, seed=4), text(ours.config, 3)
    t = torch.tensor([1000.0, 271.5, 0.25])
    check(f"{name} float t", ours, theirs, x, t, cond)
    assert not torch.equal(ours(x, t, cond), ours(x, t.floor(), cond))


@pytest.mark.parametrize("name", TINY)
def test_text_mask_equals_diffusers(name: str) -> None:
    ours, theirs = pair(name, seed=5)
    x, cond = randn(2, 4, 8, 8, seed=6), text(ours.config, 2)
    mask = torch.tensor([[True] * 7, [True] * 2 + [False] * 5])
    cond = Conditioning(cond.tokens, mask, cond.pooled, cond.size_ids)
    check(f"{name} masked text", ours, theirs, x, torch.tensor([5, 700]), cond)


@pytest.mark.parametrize("width", [32, 256, 320])
def test_sinusoids_equal_diffusers_bit_for_bit(width: int) -> None:
    diffusers = oracle.package("diffusers")
    embeddings = oracle.package("diffusers.models.embeddings")
    t = torch.tensor([999.0, 431.0, 271.5, 1.0, 0.0, 1000.0, 1024.0])
    want = embeddings.get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(sinusoid(t, width), want)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    w = torch.tensor([7.0, 0.5, 0.0, 14.0])
    want = embed(None, w, embedding_dim=width)
    assert torch.equal(sinusoid(1000 * w, width, sin_first=True, shift=1.0), want)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_lcm_guidance_embedding_equals_diffusers(name: str) -> None:
    diffusers = oracle.package("diffusers")
    ours, theirs = pair(name, lcm=True)
    assert ours.time_embedding.cond_proj.bias is None
    x, cond, t = randn(2, 4, 8, 8, seed=7), text(ours.config, 2), torch.tensor([999, 259])
    w = torch.tensor([7.0, 0.5])  # guidance scale - 1
    # The pipeline's method reads nothing of the pipeline; it multiplies w by 1000.
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    features = embed(None, w, embedding_dim=LCM_WIDTH)
    want = their_prediction(theirs, x, t, cond, timestep_cond=features)
    guided = Conditioning(cond.tokens, None, cond.pooled, cond.size_ids, guidance_embed=1000 * w)
    oracle.close(f"{name} LCM", ours(x, t, guided), want)
    check(f"{name} LCM without w", ours, theirs, x, t, cond)
    assert not torch.equal(ours(x, t, cond), ours(x, t, guided))


@pytest.mark.parametrize(
    ("preset", "config", "params", "tensors", "cross"),
    [
        ("sd15", SD15, 859_520_964, 686, 16),
        ("sd21", SD21, 865_910_724, 686, 16),
        ("sdxl", SDXL, 2_567_463_684, 1680, 70),
    ],
)
def test_presets_have_the_published_names_and_shapes(
    preset: str, config: dict[str, Any], params: int, tensors: int, cross: int
) -> None:
    diffusers = oracle.package("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    ours = zoo.build(preset)
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(theirs))
    assert oracle.count(ours) == params
    assert len(ours.state_dict()) == tensors
    assert len(ours.cross_attentions()) == cross


@pytest.mark.parametrize(("preset", "params"), [("sd15", 859_602_884), ("sdxl", 2_567_545_604)])
def test_lcm_presets_add_one_tensor(preset: str, params: int) -> None:
    config = UNetConfig(**{**vars(zoo.preset(preset).backbone), "guidance_width": 256})
    with torch.device("meta"):
        net = UNet(config)
    assert net.state_dict()["time_embedding.cond_proj.weight"].shape == (320, 256)
    assert oracle.count(net) == params


def test_other_presets_share_the_architecture_of_their_base() -> None:
    for name, base in (("sd21-v", "sd21"), ("sd-turbo", "sd21"), ("sdxl-turbo", "sdxl")):
        assert zoo.preset(name).backbone == zoo.preset(base).backbone
        assert zoo.preset(name).text == zoo.preset(base).text


def test_forward_order_of_cross_attentions_is_their_index() -> None:
    ours, _ = pair("sdxl")
    seen: list[int] = []
    layers = ours.cross_attentions()
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(module.index))
    ours(randn(1, 4, 8, 8), torch.tensor([10]), text(ours.config, 1))
    assert seen == list(range(len(layers)))
