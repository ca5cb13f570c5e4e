"""snoopi.ops.nasa_attention against fp64, on every path that this build has."""

import math

import pytest
import torch
from cases import CASES, DTYPES, MEAN_ERRORS, Case, Inputs, check, error, make
from torch import Tensor

from snoopi import ops
from snoopi.ops import native
from snoopi.ops.native import NATIVE

BACKENDS = ["auto", "reference", *(["fused"] if NATIVE.loaded else [])]
needs_native = pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.why)


def run(inputs: Inputs, backend: str = "auto") -> Tensor:
    return ops.nasa_attention(inputs.q, *inputs.texts, backend=backend, **inputs.kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_eager(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    for backend in BACKENDS:
        out = run(inputs, backend)
        assert out.dtype == dtype
        check(out, inputs)
    check(inputs.packed(), inputs)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_error_is_that_of_eager(dtype: torch.dtype) -> None:
    logs = []
    for seed in range(3):
        for case in CASES:
            inputs = make(case, dtype, seed)
            exact = inputs.exact()
            ours, theirs = error(run(inputs, "fused"), exact), error(inputs.eager(), exact)
            logs.append(math.log(max(ours, 1e-9) / max(theirs, 1e-9)))
    MEAN_ERRORS[dtype] = math.exp(sum(logs) / len(logs))
    assert MEAN_ERRORS[dtype] <= {torch.float32: 1.5, torch.bfloat16: 1.0}[dtype]


@needs_native
def test_half_is_computed_in_fp32() -> None:
    inputs = make(Case(d=40, n=12, null=True), torch.float16)
    check(run(inputs, "fused"), inputs)


@needs_native
def test_one_row_of_a_batch_does_not_depend_on_the_others() -> None:
    inputs = make(Case(m=70, n=20, d=40, c_out=None, mask="random", strength=True))
    whole = run(inputs, "fused")
    cut = {k: v[1:, :13] if k == "nasa_scale" else v for k, v in inputs.kwargs.items()}
    cut = {k: v[1:] if k.startswith("mask") and v is not None else v for k, v in cut.items()}
    part = Inputs(inputs.q[1:, :13], [x[1:] for x in inputs.texts], cut)
    assert torch.equal(run(part, "fused"), whole[1:, :13])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_texts_give_zero(backend: str) -> None:
    inputs = make(Case(c_out=None))
    inputs.kwargs["mask_pos"] = inputs.kwargs["mask_neg"] = torch.zeros(1, 7, dtype=torch.bool)
    assert torch.equal(run(inputs, backend), torch.zeros_like(inputs.q))
    inputs.kwargs["mask_pos"] = None
    plain = ops.attention(inputs.q, *inputs.texts[:2])
    torch.testing.assert_close(run(inputs, backend), plain)


@pytest.mark.parametrize("backend", BACKENDS[1:])  # SDPA itself makes 0 of a row of NaN
def test_nan_and_infinity_are_not_hidden(backend: str) -> None:
    inputs = make(Case(c_out=None))
    inputs.q[0, 3, 1, 2] = float("nan")
    out = run(inputs, backend)
    assert out[0, 3, 1].isnan().all()
    assert out[0, 3, 0].isfinite().all()
    assert out[1].isfinite().all()
    inputs = make(Case(c_out=None))
    inputs.texts[1][0, 2, 0, 4] = float("inf")
    assert run(inputs, backend)[0, :, 0, 4].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_python_zero_is_the_plain_path_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    inputs = make(Case(m=65, n=12, d=40, null=True, mask="dead"), dtype)
    mask, w, b = (inputs.kwargs[x] for x in ("mask_pos", "w_out", "b_out"))
    plain = ops.attention(inputs.q, *inputs.texts[:2], mask, w, b)
    for zero in (0.0, 0, -0.0):
        inputs.kwargs["nasa_scale"] = zero
        assert torch.equal(run(inputs, backend), plain)


def test_tensor_zeros_are_the_plain_path_to_rounding() -> None:
    inputs = make(Case(m=65, n=12, d=40))
    plain = ops.attention(
        inputs.q, *inputs.texts[:2], None, inputs.kwargs["w_out"], inputs.kwargs["b_out"]
    )
    inputs.kwargs["nasa_scale"] = torch.zeros(2, 65)
    torch.testing.assert_close(run(inputs), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_a_tensor_strength(backend: str) -> None:
    inputs = make(Case(m=9, c_out=None))
    inputs.kwargs["nasa_scale"] = 0.7
    expected = run(inputs, backend)
    for shape in [(), (2, 9), (1, 9), (2, 1), (1, 1)]:
        inputs.kwargs["nasa_scale"] = torch.full(shape, 0.7)
        torch.testing.assert_close(run(inputs, backend), expected)


def test_null_text_equal_to_negative_cancels() -> None:
    inputs = make(Case(m=33, n=12, d=16))
    inputs.kwargs |= {"k_null": inputs.texts[2], "v_null": inputs.texts[3]}
    plain = ops.attention(
        inputs.q, *inputs.texts[:2], None, inputs.kwargs["w_out"], inputs.kwargs["b_out"]
    )
    torch.testing.assert_close(run(inputs), plain)


def test_softmax_scale_and_its_sign() -> None:
    inputs = make(Case(n=12, d=16))
    for scale in (1.0, 0.01, -0.5):
        inputs.kwargs["softmax_scale"] = scale
        expected = run(inputs.to(torch.float64), "reference")
        assert error(run(inputs), expected) < 1e-6


def test_attention_is_softmax_attention() -> None:
    inputs = make(Case(m=9, n=12, d=16, mask="dead"), torch.float64)
    k, v = inputs.texts[:2]
    mask, w, b = (inputs.kwargs[x] for x in ("mask_pos", "w_out", "b_out"))
    logits = torch.einsum("bmhd,bnhd->bhmn", inputs.q, k) / 4
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    expected = torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(2) @ w.T + b
    torch.testing.assert_close(ops.attention(inputs.q, k, v, mask, w, b), expected)
    assert torch.equal(ops.attention(inputs.q, k, v, mask)[1], torch.zeros_like(inputs.q[1]))


@needs_native
def test_packs_hold_the_native_layout() -> None:
    inputs = make(Case(m=33, n=12, d=16, mask="random"))
    pos = ops.pack_text(*inputs.texts[:2], inputs.kwargs["mask_pos"])
    neg = ops.pack_text(*inputs.texts[2:])
    out = ops.pack_linear(inputs.kwargs["w_out"], inputs.kwargs["b_out"])
    assert pos.packed is not None and pos.live is not None
    assert (out.packed is not None) == NATIVE.projects
    assert torch.equal(pos.live, inputs.kwargs["mask_pos"].sum(1).int())
    expected = ops.nasa_attention_packed(inputs.q, pos, neg, out, nasa_scale=0.5)
    for part in (pos.k, pos.v, neg.k, neg.v, *([out.weight] if out.packed is not None else [])):
        part.zero_()  # the pack is a snapshot
    found = ops.nasa_attention_packed(inputs.q, pos, neg, out, nasa_scale=0.5)
    assert torch.equal(found, expected)
    assert ops.nasa_attention_packed(inputs.q, pos, neg, None, nasa_scale=0.5).dim() == 4


@needs_native
def test_packs_of_another_layout_are_refused() -> None:
    inputs = make(Case(m=33, n=12, d=16))
    pos, neg = ops.pack_text(*inputs.texts[:2]), ops.pack_text(*inputs.texts[2:])
    out = ops.pack_linear(inputs.kwargs["w_out"])
    assert neg.packed is not None
    with pytest.raises(RuntimeError, match="a packed text must be"):
        cut = neg._replace(packed=neg.packed[..., :-64].contiguous())
        ops.nasa_attention_packed(inputs.q, pos, cut, out, nasa_scale=0.5)
    assert neg.live is not None
    with pytest.raises(RuntimeError, match="live keys must be 0 to 12, got 13"):
        long = neg._replace(live=neg.live + 1)
        ops.nasa_attention_packed(inputs.q, pos, long, out, nasa_scale=0.5)
    if out.packed is None:
        return
    with pytest.raises(RuntimeError, match="a packed weight must be"):
        cut_out = out._replace(packed=out.packed[:-64])
        ops.nasa_attention_packed(inputs.q, pos, neg, cut_out, nasa_scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_under_autocast(dtype: torch.dtype) -> None:
    inputs = make(Case(m=33, n=12, d=16, null=True))
    inputs.texts = [x.to(dtype) for x in inputs.texts]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = inputs.packed(), run(inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain)


def test_inputs_are_left_alone() -> None:
    inputs = make(Case(null=True, mask="dead", strength=True))
    tensors = [inputs.q, *inputs.texts, *(x for x in inputs.kwargs.values() if torch.is_tensor(x))]
    before = [t.clone() for t in tensors]
    for backend in BACKENDS:
        run(inputs, backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@needs_native
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            inputs = make(Case(m=700, n=20, d=40, h=4, c_out=160, strength=True))
            results.append([run(inputs, "fused"), *ops.twin_attention(inputs.q, *inputs.texts)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_casts_to_its_dtype() -> None:
    inputs = make(Case(m=33, n=12, d=16))
    inputs.texts[2] = inputs.texts[2].bfloat16()  # mixed dtypes are fine here
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(inputs, backend)
            plain = ops.attention(inputs.q, *inputs.texts[:2])
        assert out.dtype == plain.dtype == torch.bfloat16
        torch.testing.assert_close(out, run(inputs.to(torch.bfloat16), backend))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run(inputs.to(torch.float64), backend).dtype == torch.float64


def test_bf16_under_grad_runs_in_fp32_even_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch's attention is taken."""
    monkeypatch.setattr(native, "NATIVE", native.NATIVE._replace(attends=False))
    inputs = make(Case(m=33, n=12, d=16))
    q = inputs.q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = ops.attention(q, *inputs.texts[:2])
    wide = ops.attention(*(x.bfloat16().float() for x in (q, *inputs.texts[:2]))).bfloat16()
    assert torch.equal(z, wide)
    z.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_meta_tensors_have_the_right_shapes() -> None:
    for case in (Case(null=True, mask="random", strength=True), Case(c_out=None)):
        inputs = make(case)
        kwargs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.kwargs.items()}
        meta = Inputs(inputs.q.to("meta"), [x.to("meta") for x in inputs.texts], kwargs)
        for backend in ("auto", "reference"):
            out = run(meta, backend)
            assert (out.shape, out.dtype) == (run(inputs).shape, out.dtype)
            assert out.device.type == "meta"
