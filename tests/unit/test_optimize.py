"""snoopi.optimize: packs weights from outside, changes nothing beyond rounding, can be undone."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from snoopi import lora, ops
from snoopi.conditioning import Conditioning
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.layers import packed
from snoopi.layers.attention import CrossAttention, SelfAttention
from snoopi.layers.blocks import ResnetBlock, Upsample
from snoopi.layers.packed import PackedConv2d, PackedGEGLU, PackedLinear, PackedPointwise
from snoopi.models.unet import UNet, UNetConfig
from snoopi.models.vae import VAE, VAEConfig
from snoopi.ops import reference
from snoopi.ops.native import NATIVE
from snoopi.optimize import optimize, restore

packs = pytest.mark.skipif(not NATIVE.projects, reason=f"no packed weights: {NATIVE.why}")
DTYPES = (torch.float32, torch.bfloat16)
GUIDANCES = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), VSF(1.0)]


def layer() -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention(32, 12, 2, 16).requires_grad_(False)


def condition(guidance: Guidance) -> Conditioning:
    g = torch.Generator().manual_seed(1)
    texts = [Conditioning(torch.randn(1, 7, 12, generator=g)) for _ in range(3)]
    return Conditioning(texts[0].tokens, negative=texts[1], null=texts[2], guidance=guidance)


def picture() -> Tensor:
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_packed_weights_give_the_same(guidance: Guidance) -> None:
    net, x, cond = layer(), picture(), condition(guidance)
    plain = net(x, cond, (4, 4))
    assert optimize(nn.ModuleList([net]))[0] is net and isinstance(net.to_out[0], PackedLinear)
    torch.testing.assert_close(net(x, cond, (4, 4)), plain)
    restore(net)
    assert type(net.to_out[0]) is nn.Linear
    assert torch.equal(net(x, cond, (4, 4)), plain)


def changed(net: CrossAttention, how: str) -> None:
    out = net.to_out[0]
    if how == "replaced":
        fresh = nn.Linear(32, 32, device="meta").to_empty(device="cpu").requires_grad_(False)
        fresh.weight.fill_(0.1), fresh.bias.fill_(0.2)
        out.load_state_dict(fresh.state_dict(), assign=True)
    elif how == "in place":
        out.weight.mul_(-1)
    else:
        lora.inject(net, ["to_out.0"], rank=2, gamma=2.0)
        out.lora_b.fill_(0.3)
        if how == "merged":
            lora.merge(net)


@torch.no_grad()
@pytest.mark.parametrize("how", ["replaced", "in place", "adapter", "merged"])
def test_changed_weights_are_seen(how: str) -> None:
    net, x, cond = layer(), picture(), condition(NASA(0.7))
    optimize(net)
    other = layer()
    before = net(x, cond, (4, 4))
    changed(net, how), changed(other, how)
    got = net(x, cond, (4, 4))
    torch.testing.assert_close(got, other(x, cond, (4, 4)))
    assert (got - before).abs().max() > 1e-2
    lora.remove(net)
    optimize(net)
    assert isinstance(net.to_out[0], PackedLinear)


@torch.no_grad()
def test_an_optimized_layer_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    net, x, cond = layer(), picture(), condition(NASA(0.7))
    optimize(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cond, (4, 4)), net(x, cond, (4, 4)))


def test_a_parameter_that_wants_a_gradient_is_refused() -> None:
    net = nn.ModuleDict({"a": layer(), "b": layer()})
    net["b"].to_out[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"b\.to_out\.0\.bias requires a gradient"):
        optimize(net)
    assert type(net["a"].to_out[0]) is nn.Linear


def fresh(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return net.to(dtype).requires_grad_(False)


def unet(dtype: torch.dtype) -> nn.Module:
    sizes = {"channels": (32, 64), "resnets": 1, "depth": (1, 1), "heads": (2, 2)}
    return fresh(UNet(UNetConfig(**sizes, text_width=12, norm_groups=8)), dtype)  # type: ignore[arg-type]


def vae(dtype: torch.dtype) -> nn.Module:
    return fresh(VAE(VAEConfig(channels=(32, 64), resnets=1, norm_groups=8)), dtype)


def run(net: nn.Module, dtype: torch.dtype, text_width: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(4)
    if isinstance(net, VAE):
        return net.decode(net.encode(torch.randn(2, 3, 18, 12, generator=g).to(dtype)))
    cond = Conditioning(torch.randn(2, 7, text_width, generator=g).to(dtype))
    x = torch.randn(2, 4, 9, 6, generator=g).to(dtype)  # odd: the upsampler is told a size
    return net(x, torch.tensor([999, 271]), cond)


def off(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@packs
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("make", [unet, vae])
def test_networks_are_packed_and_restored(
    make: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    net = make(dtype)
    truth = run(make(dtype).double(), torch.float64)
    names, plain = dict(net.named_parameters()), run(net, dtype)
    optimize(net)
    kinds = [type(m) for m in net.modules()]
    convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules())
    # All but the first of each network, whose channels are few, and the strided ones.
    assert convolutions - 4 <= kinds.count(PackedConv2d) < convolutions
    pays = NATIVE.pairs if dtype == torch.bfloat16 else NATIVE.attends
    assert (PackedGEGLU in kinds) == (pays and isinstance(net, UNet))
    assert {n: p is names[n] for n, p in net.named_parameters()} == dict.fromkeys(names, True)
    got = run(net, dtype)
    assert not torch.equal(got, plain)
    assert off(got, truth) <= 2 * off(plain, truth)
    assert off(got, truth) < (3e-2 if dtype == torch.bfloat16 else 3e-6)
    restore(net)
    assert torch.equal(run(net, dtype), plain) and PackedConv2d not in map(type, net.modules())


@packs
def test_packed_networks_train_as_plain_ones() -> None:
    """Where a gradient is wanted the plain path runs, all through."""
    plain, net = unet(torch.float32), optimize(unet(torch.float32))
    for each in (plain, net):
        each.requires_grad_(True)
    losses = [run(each, torch.float32).square().mean() for each in (plain, net)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


def plainly(net: nn.Module, x: Tensor) -> Tensor:
    """What the same weights give without packs."""
    return restore(copy.deepcopy(net))(x)


def block(dtype: torch.dtype = torch.float32) -> nn.Module:
    return fresh(ResnetBlock(32, 64, None, 8, 1e-6), dtype)


@packs
@torch.no_grad()
@pytest.mark.parametrize("part", ["conv1", "conv2", "norm1", "norm2", "conv_shortcut"])
@pytest.mark.parametrize("how", ["in place", "replaced", "hook", "adapter"])
def test_what_happens_to_a_packed_block_is_seen(part: str, how: str) -> None:
    x = torch.randn(2, 32, 8, 8)
    net = optimize(block())
    before = net(x)
    module = net.get_submodule(part)
    assert isinstance(module, (nn.GroupNorm, nn.Conv2d))
    if how == "in place":
        module.weight.mul_(-1)
    elif how == "replaced":
        module.weight = nn.Parameter(-module.weight, requires_grad=False)
    elif how == "hook":
        module.register_forward_hook(lambda module, args, out: -out)
    elif isinstance(module, nn.GroupNorm):
        return
    else:
        lora.inject(net, [part], rank=2, gamma=2.0)
        module.lora_b.fill_(0.3)  # type: ignore[union-attr, operator]
    got = net(x)
    torch.testing.assert_close(got, plainly(net, x))
    assert (got - before).abs().max() > 1e-2


@packs
@torch.no_grad()
def test_the_adapters_of_a_packed_network_reach_every_layer() -> None:
    plain, net = unet(torch.float32), optimize(unet(torch.float32))
    assert lora.inject(net, ["*"], rank=1, gamma=1.0) == lora.inject(plain, ["*"], 1, 1.0)
    torch.testing.assert_close(run(net, torch.float32), run(plain, torch.float32))


@packs
@torch.no_grad()
def test_an_upsampler_doubles_in_the_op_or_matches_a_size() -> None:
    x, net = torch.randn(1, 32, 5, 6), fresh(Upsample(32))
    plain = [net(x), net(x, (10, 12)), net(x, (9, 11))]
    optimize(net)
    for size, expected in zip((None, (10, 12), (9, 11)), plain, strict=True):
        torch.testing.assert_close(net(x, size), expected)
    assert isinstance(net.conv, PackedConv2d)
    assert torch.equal(net(x, (9, 11)), plain[2])


@packs
@torch.no_grad()
def test_a_packed_network_compiles_and_casts() -> None:
    torch.compiler.reset()
    net, x = optimize(block()), torch.randn(2, 32, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plainly(net, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), plainly(net, x))


@torch.no_grad()
def test_geglu() -> None:
    """Against fp64, with and without norm and bias; 64 rows and more, and few."""
    g = torch.Generator().manual_seed(5)
    for rows in (1, 37, 300):
        x, weight = torch.randn(2, rows, 64, generator=g), torch.randn(192, 64, generator=g) / 8
        bias, gain, offset = (torch.randn(n, generator=g) for n in (192, 64, 64))
        for dtype in DTYPES:
            tensors = [t.to(dtype) for t in (x, weight, bias, gain, offset)]
            pack = ops.pack_geglu(tensors[1])
            pays = NATIVE.pairs if dtype == torch.bfloat16 else NATIVE.attends
            assert (pack.packed is not None) == pays
            for norm in (False, True):
                wide = [t.double() for t in tensors]
                truth = reference.geglu(*wide[:3], ops.LayerNorm(*wide[3:]) if norm else None)
                how = ops.LayerNorm(*tensors[3:]) if norm else None
                got = ops.geglu(tensors[0], pack, tensors[2], norm=how)
                assert off(got, truth) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    with pytest.raises(ValueError, match=r"bias must be \[192\], got \[191\]"):
        ops.geglu(x, ops.pack_geglu(weight), bias[1:])
    with pytest.raises(ValueError, match=r"norm.gain must be \[64\], got \[63\]"):
        ops.geglu(x, ops.pack_geglu(weight), norm=ops.LayerNorm(gain[1:], offset))
    with pytest.raises(ValueError, match=r"weight must be \[2c c_in\], got \[191, 64\]"):
        ops.pack_geglu(weight[1:])
    if NATIVE.pairs:
        packed = ops.pack_geglu(weight.bfloat16()).packed
        args = (x.bfloat16(), packed, 192, bias, gain, offset, 1e-5, True, None)
        torch.library.opcheck(torch.ops.snoopi.linear, args)
        torch.library.opcheck(torch.ops.snoopi.pack_geglu, (weight.bfloat16(),))


@torch.no_grad()
def test_linear() -> None:
    """Against fp64, with and without norm, bias and residual; whole panels of columns, and not."""
    g = torch.Generator().manual_seed(5)
    for rows, c_in, c_out in ((1, 32, 7), (37, 64, 96), (300, 96, 100), (2100, 32, 64)):
        sizes = ((2, rows, c_in), (c_out, c_in), (c_out,), (2, rows, c_out), (c_in,), (c_in,))
        drawn = [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]
        for dtype in (torch.float64, *DTYPES):
            x, weight, bias, residual, *norm = (t.to(dtype) for t in drawn)
            for given in range(8):
                b, r = bias if given & 1 else None, residual if given & 2 else None
                n = ops.LayerNorm(*norm) if given & 4 else None
                wide = [None if t is None else t.double() for t in (x, weight, b, r)]
                wide_norm = None if n is None else (*(t.double() for t in norm), n.eps)
                truth = reference.linear(*wide[:3], wide_norm, wide[3])  # type: ignore[arg-type]
                got = ops.linear(x, ops.pack_linear(weight, b), norm=n, residual=r)
                bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
                assert got.dtype == dtype and off(got, truth) < bound
    pack = ops.pack_linear(weight, bias)
    with pytest.raises(ValueError, match=r"x must be \[.. 32\], got \[2, 2100, 31\]"):
        ops.linear(x[..., 1:], pack)
    with pytest.raises(ValueError, match=r"residual must be \[2, 2100, 64\], got \[2, 2100, 63\]"):
        ops.linear(x, pack, residual=residual[..., 1:])
    if NATIVE.projects:
        args = (x, pack.packed, 64, bias, *norm, 1e-5, False, residual)
        torch.library.opcheck(torch.ops.snoopi.linear, args)
        with pytest.raises(RuntimeError, match=r"a packed weight of 32 to 90 channels must be"):
            torch.ops.snoopi.linear(x, pack.packed, 90, None, None, None, 0.0, False, None)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers are packed on any processor and in any dtype, not where it pays alone."""
    if not NATIVE.projects:
        pytest.skip(f"no packed weights: {NATIVE.why}")
    monkeypatch.setattr(packed, "pays", lambda weight: weight.shape[1] % 32 == 0)


def linear_unet(dtype: torch.dtype) -> nn.Module:
    sizes = {"channels": (32, 64), "resnets": 1, "depth": (1, 1), "heads": (2, 2)}
    config = UNetConfig(**sizes, text_width=32, norm_groups=8, linear_proj=True)  # type: ignore[arg-type]
    return fresh(UNet(config), dtype)


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("make", [unet, linear_unet])
def test_linear_layers_are_packed_and_restored(
    make: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    net = make(dtype)
    width = net.config.text_width  # type: ignore[union-attr]
    truth, plain = run(make(dtype).double(), torch.float64, width), run(net, dtype, width)
    optimize(net)
    kinds = [type(m) for m in net.modules()]
    assert PackedLinear in kinds and PackedPointwise in kinds
    assert all(m._packed is not None for m in net.modules() if isinstance(m, SelfAttention))
    got = run(net, dtype, width)
    assert not torch.equal(got, plain)
    assert off(got, truth) <= 2 * off(plain, truth)
    restore(net)
    assert torch.equal(run(net, dtype, width), plain)
    assert not {PackedLinear, PackedPointwise} & {type(m) for m in net.modules()}


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("part", ["to_q", "to_k", "to_v", "to_out.0"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", ["in place", "bias", "replaced", "hook", "adapter"])
def test_what_happens_to_packed_attention_is_seen(part: str, bias: bool, how: str) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(32).requires_grad_(False)
    net = SelfAttention(32, 2, 16, bias=bias).requires_grad_(False)
    optimize(net)
    assert net._packed is not None
    x = picture()
    before = net.added(x, norm)
    module = net.get_submodule(part)
    assert isinstance(module, nn.Linear)
    if how == "in place":
        module.weight.mul_(-1)
    elif how == "bias":
        module.bias = nn.Parameter(torch.ones(32), requires_grad=False)
    elif how == "replaced":
        module.weight = nn.Parameter(-module.weight, requires_grad=False)
    elif how == "hook":
        module.register_forward_hook(lambda module, args, out: -out)
    else:
        lora.inject(net, [part], rank=2, gamma=2.0)
        module.lora_b.fill_(0.3)  # type: ignore[operator, union-attr]
    got = net.added(x, norm)
    plain = restore(copy.deepcopy(net))
    torch.testing.assert_close(got, x + plain(norm(x)))
    torch.testing.assert_close(net(norm(x)), plain(norm(x)))
    if not (part == "to_k" and how == "bias"):  # a softmax does not see what all keys share
        assert (got - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
def test_a_hook_on_attention_sees_what_it_is_given() -> None:
    """Its input after the norm, and its result without the residual, packed or not."""
    seen: list[tuple[Tensor, Tensor]] = []
    for net in (linear_unet(torch.float32), optimize(linear_unet(torch.float32))):
        for name in ("attn1", "attn2", "ff"):
            part = net.get_submodule(f"down_blocks.0.attentions.0.transformer_blocks.0.{name}")
            part.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        run(net, torch.float32, 32)
    for plain, packed_ in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(packed_, plain)


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bias", [False, True])
def test_packed_attention_compiles_as_one_graph(bias: bool) -> None:
    torch.compiler.reset()
    net = optimize(SelfAttention(32, 2, 16, bias=bias).requires_grad_(False))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(picture()), net(picture()))


class Halved(SelfAttention):
    """What somebody makes of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", [Halved, nn.Identity])
def test_another_class_in_the_place_of_attention_is_called(kind: type[nn.Module]) -> None:
    """Packed or not: its own forward runs."""
    results = []
    for pack in (False, True):
        net = linear_unet(torch.float32)
        block = net.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
        other = Halved(32, 2, 16).requires_grad_(False) if kind is Halved else nn.Identity()
        if kind is Halved:
            other.load_state_dict(block.attn1.state_dict())  # type: ignore[operator, union-attr]
        plain = run(net, torch.float32, 32)
        block.attn1 = other
        results.append(run(optimize(net) if pack else net, torch.float32, 32))
        assert (results[-1] - plain).abs().max() > 1e-3
    torch.testing.assert_close(*results)
