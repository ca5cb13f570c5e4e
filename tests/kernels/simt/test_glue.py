"""csrc/cuda/torch.cpp on CPU tensors: the CUDA op's glue over the emulated kernels."""

from typing import Any

import pytest
import torch
from cases import Case, Inputs, error, make
from simt_build import CUDA, FLAGS, SIMT, cached, compiler, setup_py, sources
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import cpp_extension

from snoopi.ops import library, native, reference
from snoopi.ops.native import CUDA_TEXT, CUDA_VERSION
from snoopi.ops.packs import TextPack

SMS = 4
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float32: 2e-7}
CASES = [
    Case(m=65, n=77, d=40, h=3),
    Case(m=31, n=77, d=64, c_out=None, mask="random"),
    Case(m=35, n=120, n_neg=5, d=72, mask="dead", null=True, strength=True, shared=True),
    Case(m=33, n=20, d=80, strided=True, null=True, mask="random", strength=True),
    Case(m=17, n=77, n_neg=300, d=160, h=1, shared=True, strided=True, c_out=None),
]


@pytest.fixture(scope="session")
def ops() -> Any:
    """torch.ops.snoopi_emulated: nasa_attention and twin_attention for the CPU."""
    gxx = compiler()
    torch_flags = ["-std=c++20", *FLAGS[1:], "-DSNOOPI_EMULATED"]
    torch_flags += [
        f"-DTORCH_TARGET_VERSION={setup_py().STABLE_ABI}",
        f"-DBUILT_FOR={torch.__version__!r}",
    ]
    torch_flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    glue = [gxx, *torch_flags, "-c", str(CUDA / "torch.cpp")]
    # A device so small that the few blocks of a kernel that projects fill it.
    kernels = [gxx, *FLAGS, f"-DSIMT_PROCESSORS={SMS}", "-c", str(SIMT / "nasa_emu.cpp")]
    objects = [
        cached("torch.o", glue, [CUDA / "torch.cpp", CUDA / "nasa_params.h"]),
        cached("nasa_emu.o", kernels, sources(kernels=True)),
    ]
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    link = [gxx, "-shared", *map(str, objects), *folders, "-ltorch_cpu", "-lc10"]
    torch.ops.load_library(str(cached("snoopi_emulated.so", link, objects)))
    return torch.ops.snoopi_emulated


def nasa(ops: Any, inputs: Inputs) -> Tensor:
    kwargs, a = inputs.kwargs, inputs.kwargs["nasa_scale"]
    names = ("w_out", "b_out", "k_null", "v_null", "mask_pos", "mask_neg", "mask_null")
    strength = (a, 0.0) if isinstance(a, Tensor) else (None, a)
    given = [kwargs.get(name) for name in names]
    return ops.nasa_attention(
        inputs.q, *inputs.texts, *given, *strength, inputs.q.shape[-1] ** -0.5
    )


def close(got: Tensor, exact: Tensor, eager: Tensor) -> None:
    assert got.shape == eager.shape and got.dtype == eager.dtype and got.is_contiguous()
    assert error(got, exact) <= max(2 * error(eager, exact), FLOOR[got.dtype])


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_eager(ops: Any, case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    close(nasa(ops, inputs), inputs.exact(), inputs.eager())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("case", "inside"),
    [
        (Case(m=100, n=77, d=40, b=1, h=8, c_out=320, null=True, mask="random"), True),
        (Case(m=50, n=20, d=40, b=2, c_out=9, strength=True), True),
        (Case(m=100, n=77, d=40, b=2, h=3), False),  # more blocks than run at once
        (Case(m=100, n=77, d=64, b=1), False),
    ],
    ids=str,
)
def test_the_kernel_projects_where_that_should_be_faster(
    ops: Any, case: Case, inside: bool, bias: bool
) -> None:
    inputs = make(case, torch.bfloat16)
    if not bias:
        inputs.kwargs["b_out"] = None
    w = inputs.kwargs["w_out"]
    for weight in (w, w.t().contiguous().t(), torch.cat([w.flatten()[:1], w.flatten()])[1:]):
        inputs.kwargs["w_out"] = weight.view(w.shape)
        with profile(activities=[ProfilerActivity.CPU]) as calls:
            out = nasa(ops, inputs)
        close(out, inputs.exact(), inputs.eager())
        outside = "aten::linear" in {event.key for event in calls.key_averages()}
        assert outside != (inside and weight is w), "weights the kernel cannot read stay outside"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_tensors_are_read_as_they_lie_or_copied(ops: Any, dtype: torch.dtype) -> None:
    inputs = make(Case(m=18, n=20, d=40, h=3, b=2, mask="random"), dtype)
    right = nasa(ops, inputs)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def off_by_one(x: Tensor) -> Tensor:  # contiguous, but not on 16 bytes
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    def odd_rows(x: Tensor) -> Tensor:  # rows that are no multiple of 16 bytes apart
        return torch.nn.functional.pad(x, (0, 1))[..., :-1]

    def every_other(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    masks = {name: inputs.kwargs[name] for name in ("mask_pos", "mask_neg")}
    for lay in (heads_first, off_by_one, odd_rows, every_other):
        other = Inputs(lay(inputs.q), [lay(x) for x in inputs.texts], dict(inputs.kwargs))
        other.kwargs |= {name: mask.t().contiguous().t() for name, mask in masks.items()}
        assert torch.equal(nasa(ops, other), right), lay.__name__


def test_one_negative_for_the_batch_is_not_copied(ops: Any) -> None:
    inputs = make(Case(m=18, n=20, d=64, b=3, shared=True, mask="random"), torch.bfloat16)
    assert inputs.texts[2].shape[0] == 1
    right = nasa(ops, inputs)
    texts = [*inputs.texts[:2], *(x.expand(3, -1, -1, -1) for x in inputs.texts[2:])]
    kwargs = {**inputs.kwargs, "mask_neg": inputs.kwargs["mask_neg"].expand(3, -1)}
    assert torch.equal(nasa(ops, Inputs(inputs.q, texts, kwargs)), right)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float32])
def test_strengths_of_any_float_and_stride(ops: Any, kind: torch.dtype) -> None:
    inputs = make(Case(m=18, n=20, d=40, strength=True), torch.float32)
    a = inputs.kwargs["nasa_scale"].to(kind)
    inputs.kwargs["nasa_scale"] = a.float()
    right = nasa(ops, inputs)
    inputs.kwargs["nasa_scale"] = a.t().contiguous().t()
    assert torch.equal(nasa(ops, inputs), right)


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda x: str(x)[6:])
def test_twins_and_their_log_sum_exp(ops: Any, dtype: torch.dtype) -> None:
    inputs = make(Case(m=35, n=120, n_neg=5, d=72, mask="dead", c_out=None), dtype)
    masks = [inputs.kwargs[name] for name in ("mask_pos", "mask_neg")]
    scale = inputs.q.shape[-1] ** -0.5
    got = ops.twin_attention(inputs.q, *inputs.texts, *masks, scale)

    def by(chain: Any, x: Inputs) -> Any:
        pos, neg = TextPack(*x.texts[:2], masks[0]), TextPack(*x.texts[2:], masks[1])
        return chain(x.q, pos, neg, scale)

    exact = by(reference.twin_attention, inputs.to(torch.float64))
    plain = by(reference.twin_attention, inputs)
    for i in (0, 2):
        close(got[i], exact[i], plain[i])
        live = exact[i + 1].isfinite()
        assert torch.equal(got[i + 1] == -torch.inf, ~live) and not live.all()
        assert got[i + 1].dtype == torch.float32
        assert (got[i + 1] - exact[i + 1])[live].abs().max() < 1e-4


def test_nothing_to_attend_from(ops: Any) -> None:
    inputs = make(Case(m=18, n=20, d=40), torch.bfloat16)
    none = Inputs(inputs.q[:, :0], inputs.texts, inputs.kwargs)
    assert nasa(ops, none).shape == (2, 0, 24)


def test_what_the_kernel_cannot_take_is_refused(ops: Any) -> None:
    good = make(Case(m=18, n=20, d=40), torch.bfloat16)

    def refused(message: str, **changes: Any) -> None:
        texts = [changes.get(f"text{i}", x) for i, x in enumerate(good.texts)]
        kwargs = {**good.kwargs, **changes.get("kwargs", {})}
        with pytest.raises(RuntimeError, match=message):
            nasa(ops, Inputs(changes.get("q", good.q), texts, kwargs))

    refused(
        "head dim", q=good.q[..., :8], **{f"text{i}": x[..., :8] for i, x in enumerate(good.texts)}
    )
    refused("expected float16, bfloat16 or float32", q=good.q.double())
    refused("the dtype of q", q=good.q.float())
    refused("q must be", q=good.q[0])
    refused("v must have the shape of k", text1=good.texts[1][:, 1:])
    refused("k must be", text0=good.texts[0][..., :1, :], text1=good.texts[1][..., :1, :])
    refused("a mask must be bool", kwargs={"mask_pos": torch.ones(2, 20)})
    refused("a mask must be bool", kwargs={"mask_neg": torch.ones(2, 19, dtype=torch.bool)})
    refused("strength must be", kwargs={"nasa_scale": torch.ones(2, 17)})
    long = torch.zeros(1, CUDA_TEXT + 1, 2, 40, dtype=torch.bfloat16)
    refused("refused a call: texts", text2=long, text3=long)


def test_schemas_and_limits_are_those_of_the_package(ops: Any) -> None:
    for name in (library.NASA, library.TWIN):
        ours = getattr(torch.ops.snoopi, name.partition("::")[2]).default._schema
        theirs = getattr(ops, name.partition("::")[2]).default._schema
        assert str(ours).partition("(")[2] == str(theirs).partition("(")[2]
    source = (CUDA / "torch.cpp").read_text()
    assert f"kVersion = {CUDA_VERSION};" in source
    params = (CUDA / "nasa_params.h").read_text()
    assert f"kMaxTextLength = {CUDA_TEXT};" in params
    launch = (CUDA / "nasa_launch.h").read_text()
    assert f"p.b > {native.CUDA_GRID} || p.h > {native.CUDA_GRID}" in launch
    assert native.CUDA_QUERIES == 1 << 24 and "p.m > (1 << 24)" in launch
    assert native.CUDA_SPAN == 2**31 - 1 and "rows > INT32_MAX" in launch
