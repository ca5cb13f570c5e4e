"""NAG and VSF on the op's outputs against formulations of their own, and gradients through them.

VSF is written here as what it is, one softmax over the keys of both texts; NAG token by token in
fp64. Errors are held to the rule of `cases`, with SDPA in the same dtype as the one to beat.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FLOOR, Case, Inputs, error, make
from torch import Tensor

from snoopi import ops
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.ops.native import NATIVE

BACKENDS = ["auto", "reference", *(["fused"] if NATIVE.loaded else [])]
CASES = [
    Case(),
    Case(m=65, n=77, d=40, n_neg=5, h=3),
    Case(m=17, n=12, d=16, mask="random"),
    Case(m=35, n=12, d=72, mask="dead"),
    Case(m=33, n=20, d=64, mask="random", shared=True),
    Case(m=33, d=16, strided=True, mask="dead", b=3),
    Case(m=33, n=20, d=40, spread=10.0),
]


def made(case: Case, dtype: torch.dtype) -> Inputs:
    """`make`, where a dead case's first row has a prompt and no negative besides."""
    inputs = make(case, dtype)
    if case.mask == "dead":
        inputs.kwargs["mask_neg"][0] = False
    return inputs


def twin(inputs: Inputs, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masks = {name: inputs.kwargs[name] for name in ("mask_pos", "mask_neg")}
    return ops.twin_attention(inputs.q, *inputs.texts, backend=backend, **masks)


def region(case: Case) -> Tensor:
    """A strength per query [b m], fp32 as a network makes it."""
    g = torch.Generator().manual_seed(3)
    return 4 * torch.rand(case.b, case.m, generator=g)


def joint_softmax(inputs: Inputs, how: VSF) -> Tensor:
    """softmax([q K+; q K- - bias]) [V+; -scale V-], without a log-sum-exp or a sigmoid."""
    q, (k_pos, v_pos, k_neg, v_neg) = inputs.q, inputs.texts
    b, m, _, d = q.shape
    scale = how.scale if isinstance(how.scale, Tensor) else torch.tensor(how.scale)
    scale = scale.to(q.dtype).expand(b, m)
    wide = [x.expand(b, *x.shape[1:]) for x in (k_pos, k_neg, v_pos, v_neg)]
    logits = torch.einsum("bmhd,bnhd->bhmn", q, torch.cat(wide[:2], 1)) / math.sqrt(d)
    low, live = [], []
    for k, mask, bias in ((k_pos, "mask_pos", 0.0), (k_neg, "mask_neg", -how.bias)):
        n, given = k.shape[1], inputs.kwargs[mask]
        low.append(torch.full((n,), bias, dtype=q.dtype))
        live.append(torch.ones(b, n).bool() if given is None else given.expand(b, n))
    dead = ~torch.cat(live, 1)[:, None, None]  # [b 1 1 n]
    weights = (logits + torch.cat(low)).masked_fill(dead, -torch.inf).softmax(-1).nan_to_num()
    flip = torch.ones(b, m, k_pos.shape[1] + k_neg.shape[1], dtype=q.dtype)
    flip[:, :, k_pos.shape[1] :] = -scale[..., None]
    return torch.einsum("bhmn,bnhd->bmhd", weights * flip[:, None], torch.cat(wide[2:], 1))


def sdpa(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Both attentions by torch's own op in the inputs' dtype, [b m h d]; 0 without a key."""
    outputs = []
    for i, name in ((0, "mask_pos"), (2, "mask_neg")):
        wide = [x.expand(len(inputs.q), *x.shape[1:]) for x in inputs.texts[i : i + 2]]
        k, v = (x.transpose(1, 2) for x in wide)
        mask = inputs.kwargs[name]
        mask = None if mask is None else mask[:, None, None]
        z = F.scaled_dot_product_attention(inputs.q.transpose(1, 2), k, v, mask)
        outputs.append(z.transpose(1, 2))
    return outputs[0], outputs[1]


def vsf_chain(inputs: Inputs, how: VSF) -> Tensor:
    """Joint softmax by SDPA with a mask of numbers, as one would write it; scale a number."""
    q, (k_pos, v_pos, k_neg, v_neg) = inputs.q, inputs.texts
    b = len(q)
    wide = [x.expand(b, *x.shape[1:]) for x in (k_pos, k_neg, v_pos, -how.scale * v_neg)]
    bias = []
    for k, name, low in ((k_pos, "mask_pos", 0.0), (k_neg, "mask_neg", -how.bias)):
        row = torch.full((b, k.shape[1]), low, dtype=q.dtype)
        if inputs.kwargs[name] is not None:
            row = row.masked_fill(~inputs.kwargs[name], -torch.inf)
        bias.append(row)
    k, v = (torch.cat(wide[i : i + 2], 1).transpose(1, 2) for i in (0, 2))
    mask = torch.cat(bias, 1)[:, None, None].expand(-1, 1, q.shape[1], -1)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


def nag_by_token(z_pos: Tensor, z_neg: Tensor, phi: Any, how: NAG, live: Tensor) -> Tensor:
    """NAG in fp64 with a loop over tokens; phi a number or [b m], live [b]: has a negative."""
    out = torch.zeros_like(z_pos, dtype=torch.float64)
    for b in range(z_pos.shape[0]):
        for m in range(z_pos.shape[1]):
            pos, neg = z_pos[b, m].double().flatten(), z_neg[b, m].double().flatten()
            far = pos + float(phi[b, m] if isinstance(phi, Tensor) else phi) * (pos - neg)
            size, size_pos = (
                x.abs().sum() if how.norm_p == 1 else x.square().sum().sqrt() for x in (far, pos)
            )
            if size > how.tau * size_pos:
                far = far * (how.tau * size_pos / size)
            mixed = how.blend * far + (1 - how.blend) * pos
            out[b, m] = (mixed if live[b] else pos).view_as(out[b, m])
    return out


def middle_ratio(z_pos: Tensor, z_neg: Tensor, norm_p: int) -> float:
    """A tau that clips half of the tokens at phi = 2."""
    far, pos = ((z.flatten(2).norm(p=norm_p, dim=-1)) for z in (3 * z_pos - 2 * z_neg, z_pos))
    return float((far / pos)[pos > 0].quantile(0.5))


def nag_chain(z_pos: Tensor, z_neg: Tensor, how: NAG) -> Tensor:
    """NAG as ordinary ops in the inputs' dtype, as its paper has it (R = 0/0 kept out)."""
    far = z_pos + how.phi * (z_pos - z_neg)
    norms = [x.flatten(2).norm(p=how.norm_p, dim=-1)[..., None, None] for x in (far, z_pos)]
    ratio = norms[0] / norms[1].clamp(min=1e-6)
    far = far * ratio.clamp(max=how.tau) / ratio.clamp(min=1e-6)
    return how.blend * far + (1 - how.blend) * z_pos


def live_rows(inputs: Inputs) -> Tensor:
    mask = inputs.kwargs["mask_neg"]
    rows = torch.ones(1).bool() if mask is None else mask.any(-1)
    return rows.expand(len(inputs.q))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("how", [VSF(), VSF(1.0, 0.0), VSF(0.5, -1.0)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vsf_is_one_softmax_over_both_texts(case: Case, how: VSF, dtype: torch.dtype) -> None:
    inputs = made(case, dtype)
    exact = joint_softmax(inputs.to(torch.float64), how)
    theirs = error(vsf_chain(inputs, how), exact)
    for backend in BACKENDS:
        got = how.combine(*twin(inputs, backend))
        assert got.dtype == dtype
        assert error(got, exact) <= max(2 * theirs, FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("norm_p", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nag_is_its_formula_over_all_heads(case: Case, norm_p: int, dtype: torch.dtype) -> None:
    inputs = made(case, dtype)
    wide, live = twin(inputs.to(torch.float64), "reference"), live_rows(inputs)
    how = NAG(2.0, middle_ratio(wide[0], wide[2], norm_p), 0.5, norm_p)
    exact = nag_by_token(wide[0], wide[2], how.phi, how, live)
    theirs = torch.where(live[:, None, None, None], nag_chain(*sdpa(inputs), how), sdpa(inputs)[0])
    for backend in BACKENDS:
        got = how.combine(*twin(inputs, backend))
        assert got.dtype == dtype
        assert error(got, exact) <= max(2 * error(theirs, exact), FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_strength_per_query(case: Case, dtype: torch.dtype) -> None:
    inputs, a = made(case, dtype), region(case)
    wide = inputs.to(torch.float64)
    z_pos, _, z_neg, _ = twin(wide, "reference")
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype]
    exact = joint_softmax(wide, VSF(a.double(), 0.1))
    got = VSF(a, 0.1).combine(*twin(inputs))
    assert got.dtype == dtype and error(got, exact) < bound
    how = NAG(a, 2.5, 0.5)
    exact = nag_by_token(z_pos, z_neg, a, how, live_rows(inputs))
    got = how.combine(*twin(inputs))
    assert got.dtype == dtype and error(got, exact) < bound
    exact = z_pos - a.double()[..., None, None] * z_neg
    got = NASA(a).combine(*twin(inputs))
    assert got.dtype == dtype and error(got, exact) < bound


@pytest.mark.parametrize("how", [NASA(0.7), NAG(3.0), NAG(3.0, norm_p=2), VSF(2.0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_outputs_are_combined_in_fp32_and_rounded_once(backend: str, how: Guidance) -> None:
    z_pos, lse_pos, z_neg, lse_neg = twin(make(CASES[1], torch.bfloat16), backend)
    got = how.combine(z_pos, lse_pos, z_neg, lse_neg)
    want = how.combine(z_pos.float(), lse_pos, z_neg.float(), lse_neg)
    assert want.dtype == torch.float32 and torch.equal(got, want.bfloat16())


def guided(inputs: Inputs, how: Guidance, backend: str) -> Tensor:
    null = None
    if how.needs_null:
        k, v = (inputs.kwargs[name] for name in ("k_null", "v_null"))
        null = ops.attention(inputs.q, k, v, inputs.kwargs["mask_null"])
    return how.combine(*twin(inputs, backend), null)


GRADIENTS = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), NAG(2.0, norm_p=2), VSF(1.5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", GRADIENTS, ids=str)
@pytest.mark.parametrize("mask", [None, "random", "dead"])
def test_gradcheck_through_a_guidance(mask: str | None, how: Guidance, backend: str) -> None:
    """fp64, with masks, a null text and a strength per query among the inputs."""
    case = Case(b=2, m=3, n=3, d=2, h=2, c_out=None, null=True, mask=mask)
    inputs = make(case, torch.float64)
    names = ("k_null", "v_null")
    leaves = [inputs.q, *inputs.texts, *(inputs.kwargs[name] for name in names)]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    a = region(case).double().requires_grad_()

    def run(*tensors: Tensor) -> Tensor:
        q, *texts = tensors[:5]
        kwargs = inputs.kwargs | dict(zip(names, tensors[5:7], strict=True))
        changed = {"phi" if isinstance(how, NAG) else "scale": tensors[7]}
        return guided(Inputs(q, texts, kwargs), type(how)(**(vars(how) | changed)), backend)

    assert torch.autograd.gradcheck(run, (*leaves, a))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", GRADIENTS, ids=str)
def test_texts_without_a_key_give_no_nan_gradient(backend: str, how: Guidance) -> None:
    """Both texts dead in the second row, where NAG's norms are 0 and VSF's gap is inf - inf."""
    inputs = make(Case(mask="dead", null=True))
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, *inputs.texts)]
    out = guided(Inputs(leaves[0], leaves[1:], inputs.kwargs), how, backend)
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all()
    z = [torch.zeros(1, 1, 2, 4, requires_grad=True) for _ in range(3)]
    lse = [torch.full((1, 1, 2), -torch.inf, requires_grad=True) for _ in range(2)]
    out = how.combine(z[0], lse[0], z[1], lse[1], z[2])
    for grad in torch.autograd.grad(out.sum(), [*z, *lse], allow_unused=True):
        assert grad is None or grad.isfinite().all()
