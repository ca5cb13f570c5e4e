"""snoopi::attention, plain attention in the native op: values, gradients, and who takes a call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FLOOR, Case, Inputs, error, make
from torch import Tensor

from snoopi import ops
from snoopi.ops import eager, library, native
from snoopi.ops.native import NATIVE
from snoopi.ops.packs import TextPack

CASES = [
    Case(),
    Case(m=1, n=1, d=1, h=1, b=1),
    Case(m=65, n=77, d=40),
    Case(m=256, n=256, d=64, b=1),
    Case(m=33, n=300, d=160, h=3),
    Case(m=35, n=120, d=72, outliers=True, spread=10.0),
    Case(m=33, n=31, d=16, strided=True),
    Case(m=33, n=1100, d=64, rising=True),
]
NAMES = ("q", "k", "v")


def tensors(inputs: Inputs) -> list[Tensor]:
    return [inputs.q, *inputs.texts[:2]]


def gradients(chain: object, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors(inputs)]
    return list(torch.autograd.grad(chain(*leaves), leaves, grad.to(leaves[0].dtype)))


def by_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return library.attention_op(q, k, v, q.shape[-1] ** -0.5)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's in the tensors' own dtype, forward and backward: what kernels are judged by."""
    x = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*x).transpose(1, 2)


def by_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager.sdpa(q, TextPack(k, v), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_against_fp64(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    wide = inputs.to(torch.float64)
    grad = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, theirs, exact = (
        [f(*tensors(x)), *gradients(f, x, grad)]
        for f, x in ((by_op, inputs), (by_sdpa, inputs), (by_sdpa, wide))
    )
    for name, mine, other, right in zip(("z", *NAMES), got, theirs, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        assert error(mine, right) <= max(2 * error(other, right), FLOOR[dtype]), name


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in tensors(make(Case(m=5, n=4, d=3), torch.float64))]
    assert torch.autograd.gradcheck(by_op, inputs)


def test_the_lse_is_the_twins_and_carries_no_gradient() -> None:
    inputs = make(Case(m=9, n=12, d=16))
    q, k, v = (x.requires_grad_() for x in tensors(inputs))
    z, lse = torch.ops.snoopi.attention(q, k, v, 0.25)
    expected = ops.twin_attention(q, k, v, k, v, softmax_scale=0.25, backend="reference")
    torch.testing.assert_close((z, lse), expected[:2])
    assert z.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    args = [x.requires_grad_() for x in tensors(make(case, dtype))]
    # Its tolerance is fp32's; in bf16 a compiled backward rounds at other places.
    which = ["test_schema", "test_autograd_registration", "test_faketensor"]
    which += [] if dtype == torch.bfloat16 else ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.snoopi.attention, (*args, 0.3), test_utils=which)


class Counted:
    """Calls of the native op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, op = 0, library.attention_op

        def counted(*args: object) -> Tensor:
            self.calls += 1
            return op(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(library, "attention_op", counted)


# What is changed from a call that the op takes, and whether it still does.
CALLS = {
    "fp32": ({}, True),
    "bf16": ({"dtype": torch.bfloat16}, True),
    "a tiny bf16 one": ({"dtype": torch.bfloat16, "m": 8, "n": 8}, True),
    "fp16": ({"dtype": torch.float16}, False),
    "fp64": ({"dtype": torch.float64}, False),
    "a tiny fp32 one": ({"m": 16, "n": 16}, False),
    "wide heads in fp32": ({"d": 161}, False),
    "many keys in fp32": ({"n": 1025}, False),
    "many keys in bf16": ({"dtype": torch.bfloat16, "n": 1025}, True),
    "a mask": ({"mask": True}, False),
    "a text for all": ({"shared": True}, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_who_takes_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, taken = CALLS[name]
    monkeypatch.setattr(native, "NATIVE", NATIVE._replace(attends=True))
    counted = Counted(monkeypatch)
    how = {"dtype": torch.float32, "m": 128, "n": 128, "d": 8, "mask": False, "shared": False}
    m, n, d, dtype = (({**how, **change})[x] for x in ("m", "n", "d", "dtype"))
    q, k, v = (torch.randn(2, x, 2, d, dtype=torch.float32).to(dtype) for x in (m, n, n))
    mask = torch.ones(2, n, dtype=torch.bool) if change.get("mask") else None
    if change.get("shared"):
        k, v = k[:1], v[:1]
    got = ops.attention(q, k, v, mask)
    assert counted.calls == (taken and NATIVE.loaded)
    expected = eager.sdpa(q, TextPack(k, v, mask), None)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_another_processor_leaves_it_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE", NATIVE._replace(attends=False))
    counted = Counted(monkeypatch)
    q, k, v = (torch.randn(2, 64, 2, 8).bfloat16() for _ in range(3))
    assert torch.equal(ops.attention(q, k, v), by_eager(q, k, v)) and counted.calls == 0
