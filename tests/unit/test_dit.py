"""The DiT alone: texts and their masks, packs, adapters, its start and its errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import lora, zoo
from snoopi.conditioning import Conditioning
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.methods.vsd import teacher_scores
from snoopi.models.dit import DiT, DiTConfig
from snoopi.noise import Noise

NOISE = Noise(5)
CONFIG = DiTConfig(layers=2, heads=2, head_dim=12, text_width=10, sample_size=8)
GUIDANCES = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), VSF(1.0)]
T = torch.tensor([999, 271])
LENGTHS = torch.tensor([5, 2])  # tokens of each prompt; the rest is padding


def randn(name: str, *shape: int) -> Tensor:
    return NOISE.normal(name, 0, [0], shape)[0]


X = randn("x", 2, 4, 8, 6)


def dit(config: DiTConfig = CONFIG) -> DiT:
    """A DiT whose every parameter does something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DiT(config).eval()
        for p in net.parameters():
            p.data.normal_(std=0.3)
    return net.requires_grad_(False)


def text(name: str, b: int, n: int, lengths: Tensor) -> Conditioning:
    return Conditioning(randn(name, b, n, 10), torch.arange(n) < lengths[:, None])


COND = text("cond", 2, 5, LENGTHS)
NEGATIVE, NULL = text("negative", 1, 4, torch.tensor([3])), text("null", 1, 6, torch.tensor([2]))


def steered(guidance: Guidance | None, **kwargs: Any) -> Conditioning:
    return replace(COND, **({"negative": NEGATIVE, "null": NULL, "guidance": guidance} | kwargs))


def other_padding(cond: Conditioning) -> Conditioning:
    """The same text with other features where nothing attends."""
    assert cond.mask is not None
    return replace(cond, tokens=torch.where(cond.mask[..., None], cond.tokens, 7.0))


# --- texts -----------------------------------------------------------------------------------


def test_padding_is_not_read() -> None:
    net = dit()
    want = net(X, T, COND)
    torch.testing.assert_close(net(X, T, other_padding(COND)), want, rtol=1e-5, atol=1e-5)
    assert (net(X, T, replace(COND, mask=None)) - want).abs().max() > 0.01


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_padding_of_the_negative_and_the_null_text_is_not_read(guidance: Guidance) -> None:
    net = dit()
    want = net(X, T, steered(guidance))
    padded = steered(guidance, negative=other_padding(NEGATIVE), null=other_padding(NULL))
    torch.testing.assert_close(net(X, T, padded), want, rtol=1e-4, atol=1e-4)
    assert (want - net(X, T, COND)).abs().max() > 0.01


def test_a_text_without_a_token_gives_zero_not_nan() -> None:
    net, nobody = dit(), torch.zeros(2, 5, dtype=torch.bool)
    got = net(X, T, replace(COND, mask=nobody))
    for layer in net.cross_attentions():  # no value is left, only the bias of to_out
        layer.to_out[0].weight.zero_()
    assert got.isfinite().all()
    torch.testing.assert_close(got, net(X, T, COND))


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_negative_without_a_token_is_the_plain_prediction(guidance: Guidance) -> None:
    net, nobody = dit(), torch.zeros(1, 4, dtype=torch.bool)
    negative, null = replace(NEGATIVE, mask=nobody), replace(NEGATIVE, mask=nobody)
    got = net(X, T, steered(guidance, negative=negative, null=null))
    torch.testing.assert_close(got, net(X, T, COND), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [None, NASA(0.0), NAG(0.0), VSF(0.0)])
def test_no_guidance_or_strength_zero_is_bit_equal_to_plain(guidance: Guidance | None) -> None:
    net = dit()
    assert torch.equal(net(X, T, steered(guidance)), net(X, T, COND))


def test_a_region_steers_its_patches() -> None:
    net = dit()
    region = torch.zeros(1, 8, 6)
    assert torch.allclose(net(X, T, steered(NASA(0.7), region=region)), net(X, T, COND), atol=1e-5)
    region[:, :2, :2] = 1.0  # the first token alone
    layer = net.cross_attentions()[0]
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, a, out: outputs.append(out))
    net(X, T, COND)
    net(X, T, steered(NASA(0.7), region=region))
    handle.remove()
    changed = (outputs[1] - outputs[0]).abs().amax((0, 2))  # [m]
    assert changed[0] > 0.01 and changed[1:].max() < 1e-5


def test_strengths_per_layer_are_in_forward_order() -> None:
    net = dit()
    got = net(X, T, steered(NASA(torch.tensor([0.7, 0.0]))))
    net.cross_attentions()[1].index, other = 0, net.cross_attentions()[0]
    other.index = 1
    swapped = net(X, T, steered(NASA(torch.tensor([0.0, 0.7]))))
    assert torch.equal(got, swapped)
    with pytest.raises(ValueError, match="a strength per layer needs 2 values, got 3"):
        net(X, T, steered(NASA(torch.ones(3))))


# --- packs -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("guidance", [None, *GUIDANCES])
def test_filled_in_texts_give_the_same_prediction(guidance: Guidance | None) -> None:
    net, cond = dit(), steered(guidance)
    packed = net.text_kv(cond)
    assert packed.tokens is cond.tokens and packed.kv is not None
    assert torch.equal(net(X, T, packed), net(X, T, cond))
    net.caption_projection.linear_1.weight.zero_()  # nothing is projected a second time
    assert torch.equal(net(X, T, packed), net(X, T, replace(packed)))
    assert not torch.equal(net(X, T, packed), net(X, T, cond))


@torch.no_grad()
def test_replacing_a_text_without_filling_it_anew_is_an_error() -> None:
    packed = dit().text_kv(steered(NASA(0.7)))
    with pytest.raises(ValueError, match="kv was made from other texts"):
        replace(packed, negative=text("negative", 1, 4, torch.tensor([1])))


# --- adapters --------------------------------------------------------------------------------


def test_teacher_scores_with_masks_equal_four_plain_calls() -> None:
    net = dit()
    lora.inject(net, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"], 4, 8, NOISE)
    for i, p in enumerate(lora.parameters(net)):
        p.data += 0.1 * NOISE.normal("adapter", 0, [i], p.shape)[0]
    null, kappa = text("null", 1, 5, torch.tensor([2])), torch.tensor([0.5, 4.0])
    kappa_lora = torch.tensor([2.0, 0.7])
    scores = teacher_scores(net, X, T, COND, null, kappa, kappa_lora)
    with torch.no_grad():
        yes, no = net(X, T, COND), net(X, T, null.expand(2))
        lora.remove(net)
        frozen_yes, frozen_no = net(X, T, COND), net(X, T, null.expand(2))
    k, k_lora = kappa.view(-1, 1, 1, 1), kappa_lora.view(-1, 1, 1, 1)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(scores.lora_teacher, no + k_lora * (yes - no), **close)
    torch.testing.assert_close(scores.teacher, frozen_no + k * (frozen_yes - frozen_no), **close)
    assert (scores.teacher - scores.lora_teacher).abs().max() > 0.01


# --- what goes in and out --------------------------------------------------------------------


def test_the_learned_variance_is_cut_off() -> None:
    net = dit()
    want = net(X, T, COND)
    assert want.shape == X.shape
    rows = net.proj_out.bias.view(2, 2, 8)
    rows[..., 4:] += 100.0
    assert torch.equal(net(X, T, COND), want)
    rows[0, 1, 2] += 1.0  # top right of each patch, channel 2
    change = net(X, T, COND) - want
    assert torch.allclose(change[:, 2, ::2, 1::2], torch.ones(2, 4, 3), atol=1e-5)
    assert change.abs().sum() == pytest.approx(24, rel=1e-4)


def test_time_is_not_rounded_under_autocast() -> None:
    net, seen, t = dit(), [], torch.tensor([999.0, 271.5])
    net.adaln_single.emb.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(X, t, COND)
    assert seen[0].tolist() == [999.0, 271.5]
    want = net(X, t, COND)
    assert (out.float() - want).norm() < 0.1 * want.norm()


def test_gradients_reach_every_parameter() -> None:
    net = dit(replace(CONFIG, out_channels=4, size_embed=True)).requires_grad_(True)
    cond = replace(COND, size_ids=torch.tensor([[512.0, 768.0, 2 / 3], [64.0, 64.0, 1.0]]))
    net(X, T, cond).square().mean().backward()
    for name, p in net.named_parameters():
        # A bias of keys shifts all logits alike: its gradient is 0 but for rounding.
        assert p.grad is not None and (p.grad.abs().max() > 0 or "to_k.bias" in name), name


def test_blocks_are_what_is_sharded() -> None:
    net = dit()
    assert net.blocks() == list(net.transformer_blocks)
    assert [layer.index for layer in net.cross_attentions()] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 8, 7)}, "latents of multiples of 2, got 8x7"),
        ({"cond": Conditioning(torch.zeros(2, 5, 9))}, "text features of width 10, got 9"),
        ({"cond": replace(COND, guidance_embed=torch.ones(2))}, "a DiT does not read it"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit()(**({"x": X, "t": T, "cond": COND} | change))


@pytest.mark.parametrize("sizes", [None, torch.ones(2, 6), torch.ones(1, 3)])
def test_sizes_must_fit(sizes: Tensor | None) -> None:
    net = dit(replace(CONFIG, size_embed=True))
    with pytest.raises(ValueError, match=r"needs cond.size_ids \[b 3\] = \(h, w, h/w\), got"):
        net(X, T, replace(COND, size_ids=sizes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 3}, "out_channels must be at least in_channels = 4, got 3"),
        ({"head_dim": 13}, "heads x head_dim must be divisible by 4, got 26"),
        ({"head_dim": 10, "size_embed": True}, "must be divisible by 12, got 20"),
        ({"sample_size": 9}, "sample_size must be a multiple of patch = 2, got 9"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


# --- the start -------------------------------------------------------------------------------


def test_a_fresh_dit_predicts_zero_reads_no_text_and_has_small_gates() -> None:
    net = zoo.fresh("shapes_dit", "backbone", 0)
    width = net.config.text_width
    cond = Conditioning(randn("cond", 2, 5, width))
    x, t = randn("x", 2, 4, 8, 8), T
    assert torch.equal(net(x, t, cond), torch.zeros_like(x))
    torch.nn.init.normal_(net.proj_out.weight)
    other = Conditioning(randn("other", 2, 5, width))
    assert torch.equal(net(x, t, cond), net(x, t, other))
    modulation = net.adaln_single(t, None)[0] + net.transformer_blocks[0].scale_shift_table
    gates = modulation[:, [2, 5]]
    assert 0 < gates.std() < 0.3
    assert all(p.isfinite().all() for p in net.parameters())


def test_fresh_is_a_function_of_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        net = zoo.fresh("shapes_dit", "backbone", seed)
        return torch.cat([p.flatten() for p in net.parameters()])

    state = torch.random.get_rng_state()
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.random.get_rng_state(), state)
