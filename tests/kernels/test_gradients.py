"""Gradients of the ops, and what torch's own checkers say about their registration."""

import pytest
import torch
from cases import Case, Inputs, error, make
from torch import Tensor

from snoopi import ops
from snoopi.ops.native import NATIVE

BACKENDS = ["auto", "reference", *(["fused"] if NATIVE.loaded else [])]
CASES = [
    Case(b=2, m=3, n=3, d=2, h=2, c_out=5),
    Case(b=2, m=3, n=2, d=3, h=1, c_out=None, null=True, strength=True, shared=True),
    Case(b=2, m=2, n=3, d=2, h=2, c_out=3, null=True, strength=True, mask="dead"),
]


def schema_args(inputs: Inputs) -> tuple[object, ...]:
    """Arguments of torch.ops.snoopi.nasa_attention."""
    names = ("w_out", "b_out", "k_null", "v_null", "mask_pos", "mask_neg", "mask_null")
    a = inputs.kwargs["nasa_scale"]
    strength = (a, 0.0) if isinstance(a, Tensor) else (None, a)
    named = (inputs.kwargs.get(name) for name in names)
    return (inputs.q, *inputs.texts, *named, *strength, inputs.q.shape[-1] ** -0.5)


def twin_args(inputs: Inputs) -> tuple[object, ...]:
    masks = (inputs.kwargs["mask_pos"], inputs.kwargs["mask_neg"])
    return (inputs.q, *inputs.texts, *masks, inputs.q.shape[-1] ** -0.5)


def grown(args: tuple[object, ...]) -> tuple[object, ...]:
    """The same arguments with a gradient asked of each floating-point tensor."""
    return tuple(
        x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in args
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    inputs = make(case, torch.float64)
    nasa, twin = grown(schema_args(inputs)), grown(twin_args(inputs))
    assert torch.autograd.gradcheck(torch.ops.snoopi.nasa_attention, nasa)

    def finite_twin(*args: object) -> tuple[Tensor, ...]:
        # A text without a live key has lse = -inf, of which no finite difference exists.
        z_pos, lse_pos, z_neg, lse_neg = torch.ops.snoopi.twin_attention(*args)
        return z_pos, lse_pos[:1], z_neg, lse_neg[:1]

    assert torch.autograd.gradcheck(finite_twin, twin)


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES[:2]]


@pytest.mark.parametrize("case", [*SLOW, CASES[2]], ids=str)
def test_opcheck(case: Case) -> None:
    inputs = make(case)
    for args in (schema_args(inputs), grown(schema_args(inputs))):
        torch.library.opcheck(torch.ops.snoopi.nasa_attention, args)
    for args in (twin_args(inputs), grown(twin_args(inputs))):
        torch.library.opcheck(torch.ops.snoopi.twin_attention, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_inputs(backend: str, dtype: torch.dtype) -> None:
    case = Case(m=33, n=12, d=16, null=True, mask="dead", strength=True, shared=True)
    exact = gradients(make(case, dtype).to(torch.float64), "reference")
    for got, right in zip(gradients(make(case, dtype), backend), exact, strict=True):
        assert got.dtype == dtype
        assert error(got, right) < (2e-2 if dtype == torch.bfloat16 else 2e-6)


def gradients(inputs: Inputs, backend: str) -> list[Tensor]:
    leaves = [inputs.q, *inputs.texts]
    leaves += [inputs.kwargs[x] for x in ("k_null", "v_null", "w_out", "b_out", "nasa_scale")]
    for leaf in leaves:
        leaf.requires_grad_()
    out = ops.nasa_attention(inputs.q, *inputs.texts, backend=backend, **inputs.kwargs)
    weight = torch.linspace(-1, 1, out.numel()).bfloat16().to(out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_gradients_that_are_asked_for(backend: str) -> None:
    inputs = make(Case())
    inputs.texts[2].requires_grad_()
    out = ops.nasa_attention(inputs.q, *inputs.texts, backend=backend, **inputs.kwargs)
    out.sum().backward()
    assert inputs.texts[2].grad is not None
    assert inputs.q.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_number_strength_tensor(backend: str) -> None:
    inputs = make(Case(m=9, c_out=None), torch.float64)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs.kwargs["nasa_scale"] = a
    ops.nasa_attention(inputs.q, *inputs.texts, backend=backend, **inputs.kwargs).sum().backward()
    negative = ops.attention(inputs.q, *inputs.texts[2:]).sum()
    torch.testing.assert_close(a.grad, -negative)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twin_gradients(backend: str) -> None:
    inputs = make(Case(m=9, n=12, d=16, mask="random"))
    exact = twin_gradients(inputs.to(torch.float64), "reference")
    for got, right in zip(twin_gradients(inputs, backend), exact, strict=True):
        assert error(got, right) < 2e-6


def twin_gradients(inputs: Inputs, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, *inputs.texts)]
    masks = {name: inputs.kwargs[name] for name in ("mask_pos", "mask_neg")}
    outputs = ops.twin_attention(*leaves, backend=backend, **masks)
    return list(torch.autograd.grad(sum((x**2).sum() for x in outputs), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_without_a_live_key_passes_no_gradient(backend: str) -> None:
    inputs = make(Case(mask="dead"))
    leaves = [x.requires_grad_() for x in (inputs.q, *inputs.texts)]
    out = ops.nasa_attention(*leaves, backend=backend, **inputs.kwargs)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
        assert grad[0].isfinite().all()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str, compiler: str) -> None:
    torch.compiler.reset()
    inputs = make(Case(m=9, n=5, d=8, null=True, mask="random", strength=True, c_out=16))

    def guided(q: Tensor, w: Tensor) -> Tensor:
        kwargs = inputs.kwargs | {"w_out": w}
        z = ops.nasa_attention(q * 2, *inputs.texts, backend=backend, **kwargs)
        return z + ops.attention(q, *inputs.texts[:2]).flatten(2)

    inputs.kwargs["b_out"] = None
    compiled = torch.compile(guided, fullgraph=True, backend=compiler)
    w = inputs.kwargs["w_out"]
    torch.testing.assert_close(compiled(inputs.q, w), guided(inputs.q, w))
    leaves = [inputs.q.clone().requires_grad_(), w.clone().requires_grad_()]
    right = torch.autograd.grad(guided(*leaves).sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    torch.testing.assert_close(got, right)
