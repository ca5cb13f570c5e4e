"""The op inside whole networks: compiled, exported, under autocast, with views, LoRA and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from snoopi import lora, ops
from snoopi.conditioning import Conditioning
from snoopi.guidance import NAG, NASA, VSF, Guidance, with_strength
from snoopi.layers import attention
from snoopi.layers.attention import CrossAttention, fill_kv
from snoopi.models.dit import DiT, DiTConfig
from snoopi.models.unet import UNet, UNetConfig
from snoopi.ops import LinearPack, TextPack
from snoopi.ops.native import NATIVE

GUIDANCES = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), NAG(2.0, norm_p=2), VSF(1.0)]
NETS = ["unet", "dit"]
T = torch.tensor([999, 271])
ROUNDING = 2e-6


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(kind: str) -> Any:
    """A small network with random weights: UNet levels with and without text, or two DiT blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "unet":
            sizes: dict[str, Any] = {"channels": (8, 16), "resnets": 1, "depth": (0, 1)}
            net: Any = UNet(UNetConfig(**sizes, heads=(1, 2), text_width=12, norm_groups=4))
        else:
            width = {"heads": 2, "head_dim": 8, "text_width": 12}
            net = DiT(DiTConfig(out_channels=4, layers=2, sample_size=8, **width))
        return net.eval().requires_grad_(False)


def text(b: int, n: int, seed: int, masked: bool = True) -> Conditioning:
    """Random text; its last token is padding."""
    mask = (torch.arange(n) < n - 1).expand(b, n).contiguous() if masked else None
    return Conditioning(2 * randn(b, n, 12, seed=seed), mask)


def steered(guidance: Guidance | None, seed: int = 0, region: bool = False) -> Conditioning:
    """A batch of two with a negative and a null text of one row."""
    first = 100 * seed
    return replace(
        text(2, 5, first + 1),
        negative=text(1, 4, first + 2),
        null=text(1, 6, first + 3),
        guidance=guidance,
        region=randn(2, 8, 8, seed=first + 4).sigmoid() if region else None,
    )


def picture(seed: int = 0) -> Tensor:
    return randn(2, 4, 8, 8, seed=1000 + seed)


def difference(got: Tensor, want: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm())


def per_layer(net: Any, seed: int) -> Tensor:
    return randn(len(net.cross_attentions()), seed=seed).sigmoid()


def compiled(net: nn.Module, backend: Any = "aot_eager") -> tuple[Any, Any]:
    """The network compiled as one graph, and what counts how often that was done."""
    count = CompileCounterWithBackend(backend)
    return torch.compile(net, fullgraph=True, backend=count), count


# --- torch.compile ---------------------------------------------------------------------------

# What reaches the cross-attentions besides a number: a region, a strength per layer, K/V packs.
SOME = ["number", "region", "layers", "packs"]
WAYS = [*(pytest.param(way, marks=pytest.mark.slow) for way in SOME), "all"]


def conditioning(net: Any, guidance: Guidance, way: str, seed: int = 0) -> Conditioning:
    if way in ("layers", "all"):
        guidance = with_strength(guidance, 2 * per_layer(net, seed + 7))
    cond = steered(guidance, seed, region=way in ("region", "all"))
    return net.text_kv(cond) if way in ("packs", "all") else cond


@torch.no_grad()
def check_compiled(kind: str, guidance: Guidance, way: str, backend: str = "aot_eager") -> None:
    net = network(kind)
    fast, count = compiled(net, backend)
    for seed in range(3):  # other texts, strengths and regions run the graph that there is
        x, cond = picture(seed), conditioning(net, guidance, way, seed)
        want = net(x, T, cond)
        assert difference(fast(x, T, cond), want) < ROUNDING
        assert difference(want, net(x, T, cond.plain())) > 1e-3
    assert count.frame_count == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_a_dit_compiles_as_one_graph(guidance: Guidance, way: str) -> None:
    check_compiled("dit", guidance, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guidance", [NASA(0.7, centred=True)], ids=str)
def test_a_unet_compiles_as_one_graph(guidance: Guidance, way: str) -> None:
    check_compiled("unet", guidance, way)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_inductor_gives_the_same(kind: str, guidance: Guidance) -> None:
    check_compiled(kind, guidance, "all", "inductor")


@torch.no_grad()
@pytest.mark.parametrize(
    "guidance", [NASA(0.1, centred=True), pytest.param(NAG(0.1), marks=pytest.mark.slow)], ids=str
)
def test_numbers_as_strengths_share_a_graph(guidance: Guidance) -> None:
    """A strength per step must not compile at each step: one graph, and one for any number."""
    net = network("dit")
    fast, count = compiled(net)
    for i in range(1, 7):
        cond = steered(with_strength(guidance, 0.15 * i))
        assert difference(fast(picture(), T, cond), net(picture(), T, cond)) < ROUNDING
    assert count.frame_count <= 2


TENSOR = pytest.param(torch.tensor(0.5), id="tensor", marks=pytest.mark.slow)


@torch.no_grad()
@pytest.mark.parametrize("on", [pytest.param(0.5, id="number"), TENSOR])
def test_a_number_of_zero_is_a_graph_of_its_own(on: float | Tensor) -> None:
    """Guidance in the first steps alone: nothing is compiled when the schedule runs again."""
    net = network("dit")
    fast, count = compiled(net)
    cond, counts = steered(NASA(0.5)), []
    for _ in range(2):
        for value in (on, on, 0.0, 0.0):
            got = fast(picture(), T, replace(cond, guidance=NASA(value)))
            want = net(picture(), T, cond if value is on else cond.plain())
            assert difference(got, want) < ROUNDING
        counts.append(count.frame_count)
    assert counts[0] == counts[1]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [NASA(0.7, centred=True), NAG(2.0), VSF(1.0)], ids=str)
def test_compiled_under_autocast_and_inference_mode(guidance: Guidance) -> None:
    net = network("dit")
    fast, _ = compiled(net)
    cond = conditioning(net, guidance, "all")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        want, got = net(picture(), T, cond), fast(picture(), T, cond)
    assert got.dtype == want.dtype
    assert difference(got, want) < 1e-6


def test_gradients_through_a_compiled_network() -> None:
    net, cond = network("dit").requires_grad_(True), steered(NASA(0.7, centred=True), region=True)
    fast, _ = compiled(net)
    found = []
    for call in (net, fast):
        net.zero_grad()
        call(picture(), T, cond).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert difference(found[1][name], want) < 1e-4, name


# --- torch.export ----------------------------------------------------------------------------


@torch.no_grad()
def check_exported(kind: str, guidance: Guidance, way: str, strict: bool) -> None:
    net = network(kind)
    example = picture(), T, conditioning(net, guidance, way)
    program = torch.export.export(net, example, strict=strict).module()
    for seed in range(3):
        t = torch.tensor([500 + seed, 20])
        arguments = picture(seed), t, conditioning(net, guidance, way, seed)
        assert difference(program(*arguments), net(*arguments)) < ROUNDING


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_a_dit_is_exported_with_its_conditioning_as_input(guidance: Guidance, way: str) -> None:
    check_exported("dit", guidance, way, strict=False)


@pytest.mark.parametrize("guidance", [NASA(0.7, centred=True)], ids=str)
def test_a_unet_is_exported_with_its_conditioning_as_input(guidance: Guidance) -> None:
    check_exported("unet", guidance, "all", strict=False)


@pytest.mark.parametrize("guidance", [NASA(0.7, centred=True)], ids=str)
def test_strict_export(guidance: Guidance) -> None:
    check_exported("dit", guidance, "all", strict=True)


class Tensors(nn.Module):
    """A network whose inputs are tensors alone; the strength is one of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, negative: Tensor, a: Tensor) -> Tensor:
        cond = Conditioning(tokens, negative=Conditioning(negative), nasa_scale=a)
        return self.net(x, t, cond)


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
def test_a_program_of_tensors_holds_the_op_and_reads_the_strength(kind: str) -> None:
    net = network(kind)
    layers = len(net.cross_attentions())

    def arguments(seed: int) -> tuple[Tensor, ...]:
        texts = randn(2, 5, 12, seed=seed), randn(1, 4, 12, seed=seed + 1)
        return picture(seed), T, *texts, per_layer(net, seed)

    program = torch.export.export(Tensors(net), arguments(0))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    if NATIVE.loaded:  # else the ordinary chain is exported
        assert names.count("snoopi.nasa_attention.default") == layers
    for seed in (1, 2):
        given = arguments(seed)
        got, want = program.module()(*given), Tensors(net)(*given)
        assert difference(got, want) < ROUNDING
        other = program.module()(*given[:-1], torch.zeros(layers))
        assert difference(other, want) > 1e-3


@torch.no_grad()
def test_lengths_and_batch_may_stay_open_in_an_export() -> None:
    net = network("dit")

    def arguments(b: int, n: int, n_neg: int) -> tuple[Tensor, ...]:
        texts = randn(b, n, 12, seed=n), randn(1, n_neg, 12, seed=n_neg)
        return randn(b, 4, 8, 8, seed=b), torch.arange(b), *texts, torch.tensor(0.7)

    auto = torch.export.Dim.AUTO
    shapes = ({0: auto}, {0: auto}, {0: auto, 1: auto}, {1: auto}, {})
    program = torch.export.export(Tensors(net), arguments(2, 5, 4), dynamic_shapes=shapes)
    for given in (arguments(2, 5, 4), arguments(3, 7, 2), arguments(5, 4, 9)):
        assert difference(program.module()(*given), Tensors(net)(*given)) < ROUNDING


@torch.no_grad()
def test_an_exported_program_refuses_what_it_was_not_made_for() -> None:
    net = network("dit")
    cond = steered(NASA(0.7))
    program = torch.export.export(net, (picture(), T, cond)).module()
    for other in (NASA(0.8), NASA(0.7, centred=True), NAG(0.7), None):
        with pytest.raises((ValueError, AssertionError, RuntimeError)):  # torch's own checks
            program(picture(), T, replace(cond, guidance=other))


@torch.no_grad()
def test_conditionings_are_pytrees() -> None:
    net = network("dit")
    for guidance in GUIDANCES:
        cond = net.text_kv(steered(guidance, region=True))
        leaves, spec = pytree.tree_flatten(cond)
        again = pytree.tree_unflatten(leaves, spec)
        assert again.guidance == guidance and again.kv is not None
        assert torch.equal(net(picture(), T, again), net(picture(), T, cond))
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
        # Mapped tensors are the texts that the packs were made from: a replaced text still is not.
        wide = pytree.tree_map_only(Tensor, lambda x: x.clone(), again)
        assert replace(wide, region=None).kv is not None
        with pytest.raises(ValueError, match="kv was made from other texts"):
            replace(wide, tokens=wide.tokens.clone())
    named = dict(pytree.tree_flatten_with_path(steered(NASA(0.7)))[0])
    assert {pytree.keystr(path) for path in named} >= {".tokens", ".negative.mask"}


# --- autocast, inference_mode, views ---------------------------------------------------------


def layer() -> CrossAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CrossAttention(16, 12, 2, 8, bias=True).requires_grad_(False)


def chain(net: CrossAttention, x: Tensor, cond: Conditioning) -> Tensor:
    """A layer by ordinary torch ops: torch's own attention, then the formula, then to_out."""

    def heads(z: Tensor) -> Tensor:
        return z.unflatten(-1, (2, 8)).transpose(1, 2)  # [b h m d]

    q = heads(net.to_q(x))

    def attend(text: Conditioning) -> Tensor:
        k, v = (heads(to(text.tokens.expand(2, -1, -1))) for to in (net.to_k, net.to_v))
        mask = None if text.mask is None else text.mask[:, None, None]
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return z.transpose(1, 2).flatten(-2)  # [b m c]

    guidance, neg, null = cond.guidance, cond.negative, cond.null
    assert neg is not None and null is not None
    z, away = attend(cond), attend(neg)
    if isinstance(guidance, NASA):
        away = away - attend(null) if guidance.centred else away
        return net.to_out[0](z - guidance.scale * away)
    assert isinstance(guidance, NAG)
    far = z + guidance.phi * (z - away)
    p = guidance.norm_p
    ratio = far.norm(p=p, dim=-1, keepdim=True) / z.norm(p=p, dim=-1, keepdim=True)
    far = far * ratio.clamp(max=guidance.tau) / ratio
    return net.to_out[0](guidance.blend * far + (1 - guidance.blend) * z)


@torch.no_grad()
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("guidance", GUIDANCES[:4], ids=str)
def test_autocast_is_as_exact_as_the_chain_under_autocast(guidance: Guidance, packs: bool) -> None:
    """K/V made outside autocast, in fp32, are cast by the op."""
    net, x, cond = layer(), randn(2, 64, 16, seed=9), steered(guidance)
    exact = chain(layer().double(), x.double(), widened(cond))
    assert difference(net(x, cond, (8, 8)), exact) < ROUNDING
    if packs:
        cond = filled([net], cond)
    with torch.autocast("cpu", torch.bfloat16):
        got, theirs = net(x, cond, (8, 8)), chain(net, x, cond)
    assert got.dtype == theirs.dtype == torch.bfloat16
    assert difference(got, exact) <= max(2 * difference(theirs, exact), 1e-3)


def widened(cond: Conditioning) -> Conditioning:
    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return pytree.tree_map_only(Tensor, wide, cond)


def filled(layers: list[CrossAttention], cond: Conditioning) -> Conditioning:
    return replace(cond, kv=fill_kv(layers, cond))


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_a_network_under_autocast_is_near_its_fp32_self(kind: str, guidance: Guidance) -> None:
    """As near as it is without a negative, up to what the guidance magnifies."""
    net, x, cond = network(kind), picture(), steered(guidance, region=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = net(x, T, cond), net(x, T, cond.plain())
    assert difference(plain, net(x, T, cond.plain())) < 0.02
    assert difference(got, net(x, T, cond)) < 0.03


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_inference_mode_changes_nothing(kind: str, guidance: Guidance) -> None:
    net = network(kind)
    with torch.no_grad():
        want = net(picture(), T, conditioning(net, guidance, "all"))
    with torch.inference_mode():
        cond = conditioning(net, guidance, "all")
        assert cond.tokens.is_inference()
        got = net(picture(), T, cond)
    assert torch.equal(got, want)
    with torch.no_grad():  # tensors made there serve here
        assert torch.equal(net(picture(), T, cond), want)


def views(shape: torch.Size, x: Tensor) -> list[Tensor]:
    """The same numbers with other strides: transposed, a slice of a wider one, every other row."""
    wide = torch.zeros(*shape[:-1], shape[-1] + 3).to(x)
    wide[..., 2:-1] = x
    rows = torch.zeros(shape[0], 2 * shape[1], *shape[2:]).to(x)
    rows[:, ::2] = x
    return [x.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 2:-1], rows[:, ::2]]


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_views_as_inputs(guidance: Guidance) -> None:
    net, x, cond = layer(), randn(2, 64, 16, seed=9), steered(guidance, region=True)
    assert cond.negative is not None and cond.null is not None and cond.region is not None
    want = net(x, cond, (8, 8))
    for i, view in enumerate(views(x.shape, x)):
        assert not view.is_contiguous()
        others: dict[str, Any] = {}
        for name in ("negative", "null"):
            part = getattr(cond, name)
            others[name] = replace(part, tokens=views(part.tokens.shape, part.tokens)[i])
        others["region"] = views(cond.region.shape, cond.region)[i]
        other = replace(cond, tokens=views(cond.tokens.shape, cond.tokens)[i], **others)
        assert difference(net(view, other, (8, 8)), want) < ROUNDING
        assert difference(net(view, filled([net], other), (8, 8)), want) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
def test_views_as_pictures(kind: str) -> None:
    net, cond = network(kind), steered(NASA(0.7, centred=True), region=True)
    want = net(picture(), T, cond)
    for view in (picture().mT.contiguous().mT, picture().to(memory_format=torch.channels_last)):
        assert difference(net(view, T, cond), want) < ROUNDING


# --- batches ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_mixed_batches_are_their_rows(kind: str, guidance: Guidance) -> None:
    """Rows with a negative of their own beside rows without one, each as if it were alone."""
    net, used = network(kind), torch.tensor([True, False, True, False])
    x, t = randn(4, 4, 8, 8), torch.tensor([999, 271, 500, 3])
    prompt, negative, null = text(4, 5, 1), text(4, 4, 2), text(4, 6, 3)
    assert negative.mask is not None and null.mask is not None
    mixed = replace(
        prompt,
        negative=replace(negative, mask=negative.mask & used[:, None]),
        null=replace(null, mask=null.mask & used[:, None]),
        guidance=guidance,
        region=randn(4, 8, 8, seed=5).sigmoid(),
    )
    both = net(x, t, mixed), net(x, t, net.text_kv(mixed))
    assert torch.equal(*both)
    for i in range(4):
        row = slice(i, i + 1)
        alone = prompt.map(lambda v, row=row: v[row])
        if used[i]:
            assert mixed.region is not None
            alone = replace(
                alone,
                negative=negative.map(lambda v, row=row: v[row]),
                null=null.map(lambda v, row=row: v[row]),
                guidance=guidance,
                region=mixed.region[row],
            )
        assert difference(both[0][row], net(x[row], t[row], alone)) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_one_negative_serves_a_batch(kind: str, guidance: Guidance) -> None:
    net, cond = network(kind), steered(guidance, region=True)
    assert cond.negative is not None and cond.null is not None and cond.region is not None
    many = replace(cond, negative=cond.negative.expand(2), null=cond.null.expand(2))
    assert difference(net(picture(), T, cond), net(picture(), T, many)) < ROUNDING
    one = replace(cond, region=cond.region[:1])
    many = replace(cond, region=cond.region[:1].expand(2, 8, 8))
    assert difference(net(picture(), T, one), net(picture(), T, many)) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_bit_equal_to_plain(kind: str, dtype: torch.dtype) -> None:
    """Strength 0 as a Python number, no guidance, no negative: over random batches and masks."""
    net = network(kind).to(dtype)
    draw = torch.Generator().manual_seed(0)
    for _ in range(12):
        b, n, n_neg, n_null = (int(torch.randint(1, 6, (), generator=draw)) for _ in range(4))

        def some(b: int, n: int) -> Conditioning:
            mask = torch.rand(b, n, generator=draw) < 0.6
            return Conditioning(torch.randn(b, n, 12, generator=draw).to(dtype), mask)

        x = torch.randn(b, 4, 8, 8, generator=draw).to(dtype)
        t = torch.randint(0, 1000, (b,), generator=draw)
        cond = replace(some(b, n), negative=some(1, n_neg), null=some(b, n_null))
        plain = replace(cond, negative=None, null=None)
        cond = replace(cond, region=torch.rand(1, 8, 8, generator=draw))
        want = net(x, t, plain)
        for guidance in (None, NASA(0.0), NASA(-0.0, centred=True), NAG(0.0), VSF(0)):
            off = replace(cond, guidance=guidance)
            assert torch.equal(net(x, t, off), want)
            assert torch.equal(net(x, t, net.text_kv(off)), want)
        with torch.autocast("cpu", torch.bfloat16):
            off = replace(cond, guidance=NASA(0.0))
            assert torch.equal(net(x, t, off), net(x, t, plain))


# --- the output projection is never bypassed -------------------------------------------------


def adapted(kind: str) -> Any:
    net = network(kind)
    lora.inject(net, ["attn2.to_out.0"], 2, 4.0)
    with torch.no_grad():
        for seed, p in enumerate(lora.parameters(net)):
            p.copy_(0.3 * randn(*p.shape, seed=seed))
    return net.requires_grad_(False)


def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the op takes its slow twins."""

    class Reference:
        attention = staticmethod(ops.attention)

        @staticmethod
        def guided_attention(
            q: Tensor,
            pos: TextPack,
            neg: TextPack,
            out: LinearPack | None,
            guidance: Guidance,
            null: TextPack | None,
        ) -> Tensor:
            texts, masks = (*pos[:2], *neg[:2]), {"mask_pos": pos.mask, "mask_neg": neg.mask}
            w, b = (None, None) if out is None else out[:2]
            if not isinstance(guidance, NASA):
                twins = ops.twin_attention(q, *texts, **masks, backend="reference")
                z = guidance.combine(*twins).to(q.dtype)
                return z if w is None else F.linear(z.flatten(2), w, b)
            k_null, v_null, mask_null = (None, None, None) if null is None else null[:3]
            nulls = {"k_null": k_null, "v_null": v_null, "mask_null": mask_null}
            return ops.nasa_attention(
                *(q, *texts, w, b),
                **masks,
                **nulls,
                nasa_scale=guidance.scale,
                backend="reference",
            )

    monkeypatch.setattr(attention, "ops", Reference)


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_an_unmerged_lora_on_to_out(
    kind: str, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native op, its twin and the merged weights agree; the adapter acts."""
    net, cond = adapted(kind), steered(guidance, region=True)
    bare = network(kind)(picture(), T, cond)
    got = net(picture(), T, cond)
    assert difference(got, bare) > 1e-2
    by_reference(monkeypatch)
    assert difference(net(picture(), T, cond), got) < ROUNDING
    monkeypatch.undo()
    lora.merge(net)
    assert difference(net(picture(), T, cond), got) < ROUNDING


@torch.no_grad()
def test_an_unmerged_lora_is_compiled_and_exported() -> None:
    net, cond = adapted("dit"), steered(NASA(0.7))
    want = net(picture(), T, cond)
    assert difference(compiled(net)[0](picture(), T, cond), want) < ROUNDING
    program = torch.export.export(net, (picture(), T, cond))
    assert difference(program.module()(picture(), T, cond), want) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("guidance", GUIDANCES[::2], ids=str)
def test_a_hook_on_to_out_acts(guidance: Guidance, compile_it: bool) -> None:
    net, cond = network("dit"), steered(guidance)
    want = net(picture(), T, cond)
    for module in net.cross_attentions():
        module.to_out[0].register_forward_hook(lambda module, args, out: 2 * out)
    call = compiled(net)[0] if compile_it else net
    got = call(picture(), T, cond)
    for module in net.cross_attentions():
        out = module.to_out[0]
        out._forward_hooks.clear()
        out.weight.mul_(2)
        out.bias.mul_(2)
    assert difference(got, net(picture(), T, cond)) < ROUNDING
    assert difference(got, want) > 1e-2
