"""Guidance inside the UNet's cross-attention: when it is off, per layer, per pixel, with packs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snoopi import lora, ops
from snoopi.conditioning import Conditioning
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.layers.attention import CrossAttention
from snoopi.models.unet import UNet, UNetConfig

GUIDANCES = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), VSF(1.0)]
SIZE = (3, 5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(b: int, n: int, seed: int, width: int = 12) -> Conditioning:
    return Conditioning(3 * randn(b, n, width, seed=seed))


NEGATIVE, NULL = text(1, 4, 2), text(1, 6, 3)
COND = text(2, 5, 1)


def layer() -> CrossAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CrossAttention(16, 12, 2, 8).requires_grad_(False)


def unet() -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UNetConfig(
            channels=(16, 32), resnets=1, depth=(1, 2), heads=(2, 4), text_width=12, norm_groups=8
        )
        return UNet(config).eval().requires_grad_(False)


def steered(guidance: Guidance | None, **kwargs: Any) -> Conditioning:
    return replace(COND, **({"negative": NEGATIVE, "null": NULL, "guidance": guidance} | kwargs))


X, T = randn(2, 4, 9, 6, seed=4), torch.tensor([999, 271])
TOKENS = randn(2, 15, 16, seed=5)


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# --- off means the plain path ----------------------------------------------------------------


@pytest.mark.parametrize(
    "cond",
    [
        steered(None),
        *(steered(g) for g in (NASA(0.0), NASA(0.0, centred=True), NAG(0.0), VSF(0.0), NASA(0))),
        steered(NASA(0.0), region=torch.ones(1, 9, 6)),
        replace(steered(NASA(0.7)), guidance=None),
        steered(NASA(0.7)).plain(),
    ],
)
def test_no_guidance_or_strength_zero_is_bit_equal_to_plain(cond: Conditioning) -> None:
    net = unet()
    assert torch.equal(net(X, T, cond), net(X, T, COND))


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_guidance_changes_the_output(guidance: Guidance) -> None:
    net = unet()
    assert difference(net(X, T, steered(guidance)), net(X, T, COND)) > 1e-3


@pytest.mark.parametrize("guidance", [NASA(torch.zeros(())), NAG(torch.zeros(())), VSF(0.0)])
def test_a_zero_tensor_is_plain_to_rounding(guidance: Guidance) -> None:
    net = unet()
    if isinstance(guidance, VSF):  # 0 scales Z-, but W stays: only the float switches VSF off
        guidance = VSF(torch.zeros(()), bias=50.0)
    assert difference(net(X, T, steered(guidance)), net(X, T, COND)) < 1e-5


def test_centred_nasa_with_the_null_text_as_negative_is_plain_to_rounding() -> None:
    net = unet()
    cond = steered(NASA(1.5, centred=True), negative=NULL)
    assert difference(net(X, T, cond), net(X, T, COND)) < 1e-5
    assert difference(net(X, T, steered(NASA(1.5), negative=NULL)), net(X, T, COND)) > 1e-2


# --- one layer against the formula -----------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_layer_is_the_formula_then_the_output_projection(guidance: Guidance) -> None:
    net, masks = layer(), {}
    cond = steered(guidance)
    q, texts = net.to_q(TOKENS).unflatten(-1, (2, 8)), (COND, NEGATIVE, NULL)
    (k, v), (k_neg, v_neg), (k_null, v_null) = (net.key_value(t) for t in texts)
    z_pos, lse_pos, z_neg, lse_neg = ops.twin_attention(q, k, v, k_neg, v_neg, **masks)
    z_null = ops.attention(q, k_null, v_null)
    z = guidance.combine(z_pos, lse_pos, z_neg, lse_neg, z_null)
    assert difference(net(TOKENS, cond, SIZE), net.to_out[0](z.flatten(-2))) < 1e-6


def test_vsf_in_a_layer_is_one_softmax_over_both_texts() -> None:
    net = layer()
    q = net.to_q(TOKENS).unflatten(-1, (2, 8))
    (k, v), (k_neg, v_neg) = net.key_value(COND), net.key_value(NEGATIVE.expand(2))
    keys, values = torch.cat([k, k_neg], 1), torch.cat([v, -1.5 * v_neg], 1)
    want = net.to_out[0](ops.attention(q, keys, values).flatten(-2))
    got = net(TOKENS, steered(VSF(1.5, bias=0.0)), SIZE)
    assert difference(got, want) < 1e-6


def test_nag_clips_the_norm_over_all_heads_of_a_token() -> None:
    net = layer()
    with torch.no_grad():
        net.to_out[0].weight.copy_(torch.eye(16))
        net.to_out[0].bias.zero_()
    z_pos = net(TOKENS, COND, SIZE)
    tight = net(TOKENS, steered(NAG(4.0, tau=0.5, blend=1.0)), SIZE)
    ratio = tight.norm(p=1, dim=-1) / z_pos.norm(p=1, dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_fully_masked_texts_give_no_nan(guidance: Guidance) -> None:
    net = unet()
    dead_row = torch.tensor([[True] * 5, [False] * 5])
    dead = torch.zeros(1, 4, dtype=torch.bool)
    negative = Conditioning(NEGATIVE.tokens, dead)
    for cond in (steered(guidance, negative=negative), steered(guidance, mask=dead_row)):
        assert net(X, T, cond).isfinite().all()
    if not guidance.needs_null:  # centred NASA keeps + Z0
        got = net(X, T, steered(guidance, negative=negative))
        assert difference(got, net(X, T, COND)) < 1e-5


@pytest.mark.parametrize("guidance", [NASA(0.7), NAG(2.0), VSF(1.0)])
def test_a_row_without_a_negative_is_left_alone_beside_one_with(guidance: Guidance) -> None:
    net, mask = unet(), torch.tensor([[False] * 4, [True] * 4])
    mixed = steered(guidance, negative=Conditioning(NEGATIVE.tokens.expand(2, -1, -1), mask))
    got = net(X, T, mixed)
    assert difference(got[:1], net(X, T, COND)[:1]) < 1e-5
    assert difference(got[1:], net(X, T, steered(guidance))[1:]) < 1e-5


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_masked_tokens_do_not_matter(guidance: Guidance) -> None:
    """Padding a text and masking the padding changes nothing, in all three texts."""

    def padded(text: Conditioning) -> Conditioning:
        tokens = torch.cat([text.tokens, 100 * randn(len(text), 3, 12, seed=8)], dim=1)
        mask = torch.arange(tokens.shape[1]).expand(len(text), -1) < text.tokens.shape[1]
        return Conditioning(tokens, mask)

    net, cond = unet(), padded(COND)
    cond = replace(cond, negative=padded(NEGATIVE), null=padded(NULL), guidance=guidance)
    assert difference(net(X, T, cond), net(X, T, steered(guidance))) < 1e-5


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_negative_of_one_row_serves_the_batch(guidance: Guidance) -> None:
    net = unet()
    many = steered(guidance, negative=NEGATIVE.expand(2), null=NULL.expand(2))
    assert difference(net(X, T, steered(guidance)), net(X, T, many)) < 1e-5


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_rows_do_not_see_each_other(guidance: Guidance) -> None:
    net = unet()
    both = net(X, T, steered(guidance))
    for row in range(2):
        alone = replace(steered(guidance), tokens=COND.tokens[row : row + 1])
        got = net(X[row : row + 1], T[row : row + 1], alone)
        assert difference(got, both[row : row + 1]) < 1e-5


# --- strength per layer and per pixel --------------------------------------------------------


@pytest.mark.parametrize("kind", [NASA, NAG, VSF])
def test_a_strength_per_layer_reaches_its_layer(kind: type) -> None:
    net = unet()
    layers = net.cross_attentions()
    equal = kind(torch.full((len(layers),), 0.7))
    assert difference(net(X, T, steered(equal)), net(X, T, steered(kind(0.7)))) < 1e-5
    values = torch.arange(1.0, len(layers) + 1) / len(layers)
    seen: dict[int, Tensor] = {}
    for module in layers:
        module.register_forward_hook(lambda m, args, out: seen.update({m.index: out}))
        module.register_forward_pre_hook(lambda m, args: inputs.update({m.index: args}))
    inputs: dict[int, Any] = {}
    net(X, T, steered(kind(values)))
    assert list(seen) == list(range(len(layers)))
    outputs = dict(seen)
    for i, module in enumerate(layers):
        x, _, size = inputs[i]
        want = module(x, steered(kind(float(values[i]))), size)
        assert difference(outputs[i], want) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 20])
def test_a_strength_per_layer_must_fit_the_network(n: int) -> None:
    with pytest.raises(ValueError, match=f"a strength per layer needs 10 values, got {n}"):
        unet()(X, T, steered(NASA(torch.ones(n))))


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("with_region", [False, True])
def test_a_16_bit_network_stays_16_bit(guidance: Guidance, with_region: bool) -> None:
    def half(text: Conditioning) -> Conditioning:
        return text.map(Tensor.bfloat16)

    net = unet().bfloat16()
    cond = replace(half(COND), negative=half(NEGATIVE), null=half(NULL), guidance=guidance)
    if with_region:
        cond = replace(cond, region=torch.ones(1, 9, 6))
    got = net(X.bfloat16(), T, cond)
    assert got.dtype == torch.bfloat16
    assert difference(got.float(), unet()(X, T, steered(guidance))) < 0.1


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_a_region_of_ones_is_no_region(guidance: Guidance) -> None:
    net = unet()
    for b in (1, 2):
        got = net(X, T, steered(guidance, region=torch.ones(b, 9, 6)))
        assert difference(got, net(X, T, steered(guidance))) < 1e-5


@pytest.mark.parametrize("guidance", [NASA(0.7), NASA(0.7, centred=True), NAG(2.0)])
def test_a_region_of_zeros_is_plain_to_rounding(guidance: Guidance) -> None:
    net = unet()
    got = net(X, T, steered(guidance, region=torch.zeros(1, 9, 6)))
    assert difference(got, net(X, T, COND)) < 1e-5


@pytest.mark.parametrize("guidance", [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), VSF(1.0)])
def test_a_region_selects_tokens_of_one_layer(guidance: Guidance) -> None:
    net, region = layer(), torch.zeros(1, *SIZE)
    region[:, :, :2] = 1
    got = net(TOKENS, steered(guidance, region=region), SIZE)
    inside, everywhere = region.flatten().bool(), net(TOKENS, steered(guidance), SIZE)
    assert difference(got[:, inside], everywhere[:, inside]) < 1e-5
    if not isinstance(guidance, VSF):  # see test_a_zero_tensor_is_plain_to_rounding
        plain = net(TOKENS, COND, SIZE)
        assert difference(got[:, ~inside], plain[:, ~inside]) < 1e-5


def test_a_region_is_averaged_to_the_layer() -> None:
    net, fine = layer(), torch.rand(2, 6, 10, generator=torch.Generator().manual_seed(0))
    coarse = fine.view(2, 3, 2, 5, 2).mean((2, 4))
    got = net(TOKENS, steered(NASA(0.7), region=fine), SIZE)
    assert difference(got, net(TOKENS, steered(NASA(0.7), region=coarse), SIZE)) < 1e-6


# --- K/V filled in ---------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, *GUIDANCES])
def test_filled_in_kv_gives_the_same_output(guidance: Guidance | None) -> None:
    net, cond = unet(), steered(guidance)
    with torch.no_grad():
        packed = net.text_kv(cond)
        assert packed.kv is not None and len(packed.kv.layers) == len(net.cross_attentions())
        assert torch.equal(net(X, T, packed), net(X, T, cond))
        expected = net(X, T, cond)
        for layer in net.cross_attentions():  # the text itself is no longer read
            layer.to_k.weight.zero_()
            layer.to_v.weight.zero_()
        assert torch.equal(net(X, T, packed), expected)
        plain = net.text_kv(COND)
        assert torch.equal(net(X, T, plain), net(X, T, COND))
        assert packed.plain().kv is None


def test_kv_of_another_text_is_refused() -> None:
    with torch.no_grad():
        packed = unet().text_kv(COND)
    with pytest.raises(ValueError, match="call text_kv again"):
        replace(packed, tokens=COND.tokens + 1)


def test_kv_of_another_mask_is_refused() -> None:
    """A pack holds the live keys alone, so a mask of its own belongs to what it was made from."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        packed = unet().text_kv(steered(NASA(0.7, centred=True), mask=mask))
    assert replace(packed, region=torch.ones(1, 9, 6)).kv is packed.kv
    other = Conditioning(NEGATIVE.tokens, torch.ones(1, 4, dtype=torch.bool))
    for change in ({"mask": None}, {"mask": mask.clone()}, {"negative": other}, {"null": NEGATIVE}):
        with pytest.raises(ValueError, match="call text_kv again"):
            replace(packed, **change)


def test_kv_is_refused_under_grad() -> None:
    with pytest.raises(RuntimeError, match="inference"):
        unet().text_kv(COND)


# --- the output projection is never bypassed -------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_an_unmerged_lora_acts_as_the_merged_one(guidance: Guidance) -> None:
    net, cond = unet(), steered(guidance)
    bare = net(X, T, cond)
    lora.inject(net, ["attn2.to_out.0", "attn2.to_k"], 2, 4.0)
    with torch.no_grad():
        for seed, p in enumerate(lora.parameters(net)):
            p.copy_(0.2 * randn(*p.shape, seed=seed))
        got = net(X, T, cond)
        lora.merge(net)
        want = net(X, T, cond)
    assert difference(got, want) < 1e-5 and difference(got, bare) > 1e-2


@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
def test_op_backends_agree_with_a_lora_on_the_projection(backend: str) -> None:
    net = layer()
    lora.inject(net, ["to_out.0"], 2, 4.0)
    with torch.no_grad():
        net.to_out[0].lora_b.copy_(randn(16, 2))
        got = net(TOKENS, steered(NASA(0.7)), SIZE)
        lora.merge(net)
        q = net.to_q(TOKENS).unflatten(-1, (2, 8))
        texts = (*net.key_value(COND), *net.key_value(NEGATIVE))
        out = net.to_out[0].weight, net.to_out[0].bias
        try:
            want = ops.nasa_attention(q, *texts, *out, nasa_scale=0.7, backend=backend)
        except ValueError as error:
            pytest.skip(f"{error}")
    assert difference(got, want) < 1e-5


def test_hooks_on_the_projection_run() -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        net, seen = layer(), []
        getattr(net.to_out[0], register)(lambda *args, seen=seen: seen.append(1))
        net(TOKENS, steered(NASA(0.7)), SIZE)
        assert seen == [1]


def test_a_subclass_of_linear_is_called_as_a_module() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = layer()
    want = net(TOKENS, steered(NASA(0.7)), SIZE)
    net.to_out[0].__class__ = Doubled
    assert difference(net(TOKENS, steered(NASA(0.7)), SIZE), 2 * want) < 1e-6


def test_gradients_reach_every_projection_through_nasa() -> None:
    net = layer().requires_grad_(True)
    net(TOKENS, steered(NASA(0.7)), SIZE).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.any(), name
