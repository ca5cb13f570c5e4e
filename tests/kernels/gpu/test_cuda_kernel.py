"""The CUDA kernels on a device: the calls of the emulated tests, and what only a device can show.

Calls snoopi/_cuda.so through ctypes, if it is there and no older than csrc/cuda; else compiles
csrc/cuda/nasa.cu for the device at hand, which needs no PyTorch headers.
"""

import ctypes
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import common
from snoopi.ops import native

sys.path.insert(0, str(Path(__file__).parents[1] / "simt"))

from simt_build import CUDA, cached, nvcc_path, sources
from simt_cases import (
    DTYPES,
    FLOOR,
    HEAD_DIMS,
    MANY_ROWS,
    PROJECTED,
    WIDE_LOGITS,
    Call,
    Errors,
    grid,
    make,
)

pytestmark = pytest.mark.gpu
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
ids = DTYPES.__getitem__


class Text(ctypes.Structure):
    """NasaText of csrc/cuda/nasa_params.h."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k_stride", ctypes.c_int64 * 3),
        ("v_stride", ctypes.c_int64 * 3),
        ("mask_stride", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """NasaParams of csrc/cuda/nasa_params.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64 * 3),
        ("b", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("h", ctypes.c_int64),
        ("texts", Text * 3),
        ("num_texts", ctypes.c_int),
        ("twin", ctypes.c_int),
        ("softmax_scale", ctypes.c_float),
        ("nasa_scale", ctypes.c_float),
        ("strength", ctypes.c_void_p),
        ("strength_stride", ctypes.c_int64 * 2),
        ("w_out", ctypes.c_void_p),
        ("b_out", ctypes.c_void_p),
        ("c_out", ctypes.c_int64),
        ("out", ctypes.c_void_p * 2),
        ("lse", ctypes.c_void_p * 3),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path, nvcc = native._PACKAGE / "_cuda.so", nvcc_path()
    inputs = [path for path in sources(kernels=True) if path.parent == CUDA]
    if not path.is_file() or path.stat().st_mtime < max(x.stat().st_mtime for x in inputs):
        if nvcc is None:
            pytest.skip("needs the CUDA op as it is built of these sources, or nvcc")
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        command = [str(nvcc), "-std=c++17", "-O3", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC"]
        path = cached("nasa.so", [*command, str(CUDA / "nasa.cu")], inputs)
    loaded = ctypes.CDLL(str(path))
    loaded.snoopi_nasa_cuda_error.restype = ctypes.c_char_p
    loaded.snoopi_nasa_cuda.argtypes = [
        ctypes.POINTER(Params),
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return loaded


class Prepared:
    """A call's tensors on the device, kept alive, and the struct that points to them."""

    def __init__(self, call: Call, dtype: torch.dtype, twin: bool = False) -> None:
        self.inputs = make(call, dtype)
        self.dtype, self.kept = dtype, []
        kwargs, params = self.inputs.kwargs, Params()
        q = self.keep(self.inputs.q)
        params.q = q.data_ptr()
        params.q_stride[:] = q.stride()[:3]
        params.b, params.m, params.h = q.shape[:3]
        texts = [
            (*self.inputs.texts[:2], kwargs["mask_pos"]),
            (*self.inputs.texts[2:], kwargs["mask_neg"]),
        ]
        if "k_null" in kwargs:
            texts.append((kwargs["k_null"], kwargs["v_null"], kwargs["mask_null"]))
        for i, text in enumerate(texts):
            self.set_text(params.texts[i], *text)
        params.num_texts, params.twin = len(texts), twin
        params.softmax_scale = call.d**-0.5
        a = kwargs["nasa_scale"]
        if isinstance(a, Tensor):
            a = self.keep(a.float())
            params.strength, params.strength_stride[:] = a.data_ptr(), a.stride()
        else:
            params.nasa_scale = a
        shape = (call.b, call.m, call.h, call.d)
        if call.c_out is not None:
            w, bias = (
                self.keep(kwargs["w_out"]),
                self.keep(kwargs["b_out"]),
            )  # the last that are kept
            params.w_out, params.b_out = w.data_ptr(), bias.data_ptr()
            params.c_out, shape = call.c_out, (call.b, call.m, call.c_out)
        nan = float("nan")
        self.out = [torch.full(shape, nan, dtype=dtype, device="cuda") for _ in range(1 + twin)]
        self.lse = [torch.full((*shape[:2], call.h), nan, device="cuda") for _ in texts]
        params.out[: len(self.out)] = [x.data_ptr() for x in self.out]
        params.lse[: len(self.lse)] = [x.data_ptr() for x in self.lse]
        self.params, self.d = params, call.d

    def keep(self, x: Tensor) -> Tensor:
        """The tensor on the device, with its strides."""
        there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        self.kept.append(there.copy_(x))
        return there

    def set_text(self, text: Text, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        k, v = self.keep(k), self.keep(v)
        shared = k.shape[0] == 1
        text.k, text.v, text.n = k.data_ptr(), v.data_ptr(), k.shape[1]
        text.k_stride[:] = (0 if shared else k.stride(0), k.stride(1), k.stride(2))
        text.v_stride[:] = (0 if shared else v.stride(0), v.stride(1), v.stride(2))
        if mask is not None:
            mask = self.keep(mask)
            text.mask, text.mask_stride = mask.data_ptr(), 0 if shared else mask.stride(0)

    def launch(self, library: ctypes.CDLL) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        error = library.snoopi_nasa_cuda(self.params, CODES[self.dtype], self.d, stream)
        assert error == 0, library.snoopi_nasa_cuda_error(error).decode()

    def run(self, library: ctypes.CDLL) -> list[Tensor]:
        self.launch(library)
        torch.cuda.synchronize()
        return [x.cpu() for x in (*self.out, *self.lse)]


def measured(library: ctypes.CDLL, call: Call, dtype: torch.dtype) -> Errors:
    prepared = Prepared(call, dtype)
    errors = Errors.of(prepared.run(library)[0], prepared.inputs)
    assert errors.ours <= max(2.0 * errors.eager, FLOOR[dtype]), f"{call}: {errors}"
    return errors


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_error_is_that_of_eager(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    calls = [call for d in HEAD_DIMS for call in grid(d)] + MANY_ROWS + WIDE_LOGITS
    if dtype != torch.float32:
        calls += [x for x in PROJECTED if fits(library, x, dtype)]
    errors = [measured(library, call, dtype) for call in calls]
    logs = [math.log(max(e.ours, 1e-9) / max(e.eager, 1e-9)) for e in errors]
    mean = math.exp(sum(logs) / len(logs))
    print(f"{DTYPES[dtype]}: {mean:.3f} of eager's error")
    assert mean <= (1.5 if dtype == torch.float32 else 1.0)


def fits(library: ctypes.CDLL, call: Call, dtype: torch.dtype) -> bool:
    """Whether the device has enough shared memory for the projection in the kernel."""
    prepared, stream = Prepared(call, dtype), torch.cuda.current_stream().cuda_stream
    error = library.snoopi_nasa_cuda(prepared.params, CODES[dtype], call.d, stream)
    return library.snoopi_nasa_cuda_error(error) != b"shared memory"


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_runs_are_bitwise_equal(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    for call in (Call(40, 77, b=2, m=1500, h=8), Call(160, 300, m=250, h=8, null=3)):
        prepared = Prepared(call, dtype)
        first = prepared.run(library)
        assert not any(x.isnan().any() for x in first)
        for _ in range(20):
            again = prepared.run(library)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_twin_is_what_nasa_combines(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    call = Call(64, 77, n_neg=120, mask="random")
    z_pos, z_neg, lse_pos, lse_neg = Prepared(call, dtype, twin=True).run(library)
    z, *lse = Prepared(call, dtype).run(library)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(
        z_pos.float() - 1.3 * z_neg.float(), z.float(), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(lse_pos, lse[0]) and torch.equal(lse_neg, lse[1])


def test_a_graph_can_hold_it(library: ctypes.CDLL) -> None:
    prepared = Prepared(Call(40, 77, m=200, h=8), torch.bfloat16)
    expected = prepared.run(library)[0]
    prepared.out[0].fill_(float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.launch(library)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(prepared.out[0].cpu(), expected)


def microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """The median time of these calls, each on its own memory, in a CUDA graph."""
    part = common.replays(runs)
    return 1e6 * statistics.median(part().seconds for _ in range(20))


def test_replays_run_the_calls_and_time_one_of_them() -> None:
    counts = torch.zeros(3, device="cuda")
    part = common.replays([partial(row.add_, 1) for row in counts])
    counts.zero_()
    span = part()
    assert 0 < span.seconds < 1e-3
    assert counts[0] >= 1 and (counts == counts[0]).all()


def test_print_times(library: ctypes.CDLL) -> None:
    """Prints, and judges nothing: the kernel beside PyTorch's chain, and both with a projection.

    The kernel that projects by itself is beside the one that leaves it to a product: it is the
    default where csrc/cuda/nasa_launch.h (projects_well) takes it to be faster. The device alone is
    timed, on more inputs than its second cache holds.
    """
    for m, h, d, n in (
        (4096, 8, 40, 77),
        (1024, 8, 80, 77),
        (4096, 10, 64, 77),
        (1024, 16, 72, 120),
    ):
        call = Call(d, n, b=1, m=m, h=h)
        prepared = copies(call)
        chains = []
        for inputs in (x.inputs for x in prepared):
            q, *texts = (x.cuda() for x in (inputs.q, *inputs.texts))
            kwargs = {**inputs.kwargs, "mask_pos": None, "mask_neg": None}
            chains.append(type(inputs)(q, texts, kwargs).eager)
        ours = microseconds([partial(x.launch, library) for x in prepared])
        eager = microseconds(chains)
        print(f"m={m} h={h} d={d} n={n}: {ours:.1f} us, eager {eager:.1f} us")
        call = replace(call, c_out=h * d)
        if h * d <= 640 and fits(library, call, torch.bfloat16):
            print_projections(library, call, prepared)


def copies(call: Call) -> list[Prepared]:
    """So many of a call that their tensors fill the second cache twice; 20 at least."""
    first = Prepared(call, torch.bfloat16)
    size = sum(x.nbytes for x in (*first.kept, *first.out))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    number = max(20, 2 * cache // size)
    return [first, *(Prepared(call, torch.bfloat16) for _ in range(number - 1))]


def print_projections(library: ctypes.CDLL, call: Call, plain: list[Prepared]) -> None:
    """Times of a call with its projection, in the kernel and by a product after `plain`."""
    inside = copies(call)

    def by_a_product(x: Prepared, w: Tensor, bias: Tensor) -> None:
        x.launch(library)
        torch.nn.functional.linear(x.out[0].flatten(2), w, bias)

    ours = [partial(x.launch, library) for x in inside]
    theirs = [
        partial(by_a_product, x, *other.kept[-2:]) for x, other in zip(plain, inside, strict=False)
    ]
    times = microseconds(ours), microseconds(theirs)
    print("    projected inside {:.1f} us, by a product {:.1f} us".format(*times))
