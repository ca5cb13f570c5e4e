"""snoopi.ops on a device, by the CUDA op as it is built: what a user's calls go through.

Streams, copies of what cannot be read as it lies, the product after the kernel, graphs,
torch.compile. Where the op is not built (SNOOPI_BUILD) there is nothing to test.
"""

from typing import Any

import pytest
import torch
from cases import FLOOR, Case, Inputs, error, make
from torch import Tensor

from snoopi import ops
from snoopi.guidance import NAG, VSF
from snoopi.ops import native

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    Case(m=65, n=77, d=40, h=3),
    Case(m=4096, n=77, d=40, h=8, b=1, c_out=320),  # projected in the kernel on an H100
    Case(m=31, n=77, d=64, c_out=None, mask="random"),
    Case(m=35, n=120, n_neg=5, d=72, mask="dead", null=True, strength=True, shared=True),
    Case(m=33, n=20, d=80, strided=True, null=True, mask="random", strength=True),
    Case(m=17, n=77, n_neg=300, d=160, h=1, shared=True, strided=True, c_out=None),
]


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips without the op; one that is there must load and run. fp32 means fp32."""
    if not (native._PACKAGE / "_cuda.so").is_file():
        pytest.skip(native.CUDA.why)
    assert native.CUDA.loaded, native.CUDA.why
    trouble = native.device_trouble(torch.cuda.current_device())
    assert trouble is None, trouble
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def moved(x: Any, device: str = "cuda") -> Any:
    """Tensors on a device, with their strides; all else as it is."""
    if isinstance(x, Tensor):
        there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return there.copy_(x)
    if isinstance(x, Inputs):
        kwargs = {name: moved(value, device) for name, value in x.kwargs.items()}
        return Inputs(moved(x.q, device), [moved(t, device) for t in x.texts], kwargs)
    return x


def inputs_of(case: Case, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    return moved(make(case, dtype))


def nasa(x: Inputs) -> Tensor:
    return ops.nasa_attention(x.q, *x.texts, **x.kwargs, backend="fused")


def close(got: Tensor, x: Inputs) -> None:
    exact, eager = x.exact(), x.eager()
    assert got.dtype == eager.dtype and got.device == eager.device and got.is_contiguous()
    floor = max(FLOOR[got.dtype], 1e-3 if got.dtype == torch.float16 else 0.0)
    assert error(got, exact) <= max(2 * error(eager, exact), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_eager(case: Case, dtype: torch.dtype) -> None:
    x = inputs_of(case, dtype)
    assert tuple(ops.explain(x.q, *x.texts, **x.kwargs)) == ("fused", native.CUDA.why)
    with torch.no_grad():
        close(nasa(x), x)


def test_twins_and_what_is_combined_from_them() -> None:
    x = inputs_of(Case(m=35, n=120, n_neg=5, d=72, mask="dead", c_out=None))
    masks = {name: x.kwargs[name] for name in ("mask_pos", "mask_neg")}
    got = ops.twin_attention(x.q, *x.texts, **masks, backend="fused")
    exact = ops.twin_attention(*(t.double() for t in (x.q, *x.texts)), **masks)
    for i in (0, 2):
        assert error(got[i], exact[i]) < 1e-2
        live = exact[i + 1].isfinite()
        assert torch.equal(got[i + 1] == -torch.inf, ~live) and not live.all()
        assert (got[i + 1] - exact[i + 1])[live].abs().max() < 1e-4
    pos, neg = ops.pack_text(*x.texts[:2]), ops.pack_text(*x.texts[2:])
    for guidance in (NAG(3.0), VSF(2.0)):
        wide = [ops.TextPack(t.k.double(), t.v.double()) for t in (pos, neg)]
        out = ops.guided_attention(x.q, pos, neg, None, guidance)
        assert error(out, ops.guided_attention(x.q.double(), *wide, None, guidance)) < 2e-2


@pytest.mark.parametrize("c_out", [None, 24])
def test_the_current_stream_is_taken(c_out: int | None) -> None:
    x = inputs_of(Case(m=1000, n=77, d=64, h=5, c_out=c_out))
    expected, q = nasa(x), x.q
    x.q = torch.full_like(q, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # on any other stream the op would be done by now
        x.q.copy_(q)
        out = nasa(x)
        x.q.fill_(torch.nan)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_copies_live_as_long_as_the_kernel_reads_them() -> None:
    x = inputs_of(Case(m=1000, n=77, d=64, h=5, mask="random"))
    expected = nasa(x)

    def off_by_one(x: Tensor) -> Tensor:  # contiguous, but not on 16 bytes
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    x.q, x.texts = off_by_one(x.q), [off_by_one(t) for t in x.texts]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        out = nasa(x)
        others = [torch.full_like(x.q, torch.nan) for _ in range(8)]  # in the copies' place
    torch.cuda.synchronize()
    assert others[0].isnan().all() and torch.equal(out, expected)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_graph_can_hold_it(case: Case) -> None:
    x, other = inputs_of(case), moved(make(case, torch.bfloat16, seed=1))
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        nasa(x)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nasa(x)
    x.q.copy_(other.q)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, nasa(x))


def test_it_compiles_into_one_graph() -> None:
    x = inputs_of(Case(m=65, n=77, d=40, h=3, mask="random", null=True))

    def call(q: Tensor) -> Tensor:
        return ops.nasa_attention(q * 2, *x.texts, **x.kwargs)

    with torch.no_grad():
        out = torch.compile(call, fullgraph=True)(x.q)
    close(out, Inputs(x.q * 2, x.texts, x.kwargs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_tensors_device_is_taken() -> None:
    case = Case(m=65, n=77, d=40, h=3, mask="random")
    assert torch.cuda.current_device() == 0
    here, there = (moved(make(case, torch.bfloat16), f"cuda:{i}") for i in range(2))
    assert ops.explain(there.q, *there.texts, **there.kwargs).path == "fused"
    out = nasa(there)
    assert out.device == there.q.device and torch.cuda.current_device() == 0
    close(out, there)
    close(nasa(here), here)


def test_what_the_kernel_does_not_take_runs_all_the_same() -> None:
    x = inputs_of(Case(m=9, n=5, d=40), torch.float32)
    kwargs: dict[str, Any] = {"nasa_scale": 0.5, "softmax_scale": -0.1}
    assert ops.explain(x.q, *x.texts, **kwargs).path == "eager"
    wide = [t.double() for t in (x.q, *x.texts)]
    exact = ops.nasa_attention(*wide, **kwargs, backend="reference")
    assert error(ops.nasa_attention(x.q, *x.texts, **kwargs), exact) < 1e-5


def test_packs_of_the_cpu_can_be_moved() -> None:
    x = make(Case(m=9, n=77, d=40), torch.bfloat16)
    packs = ops.pack_text(*x.texts[:2]), ops.pack_text(*x.texts[2:])
    out = ops.pack_linear(x.kwargs["w_out"], x.kwargs["b_out"])
    pos, neg, out = (type(pack)(*map(moved, pack)) for pack in (*packs, out))
    there = moved(x)
    z = ops.nasa_attention_packed(there.q, pos, neg, out, nasa_scale=x.kwargs["nasa_scale"])
    assert torch.equal(z, nasa(there))
