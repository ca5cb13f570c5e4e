"""snoopi.ops.twin_attention: both attentions and their log-sum-exp."""

import pytest
import torch
from cases import DTYPES, FLOOR, Case, Inputs, error, make

from snoopi import ops
from snoopi.ops import eager
from snoopi.ops.native import NATIVE
from snoopi.ops.packs import TextPack

BACKENDS = ["auto", "reference", *(["fused"] if NATIVE.loaded else [])]
CASES = [
    Case(),
    Case(m=1, n=1, d=1, h=1, b=1),
    Case(m=65, n=77, d=40, n_neg=5),
    Case(m=17, n=12, d=160, mask="random"),
    Case(m=35, n=12, d=72, mask="dead", shared=True),
    Case(m=33, n=20, d=64, outliers=True, spread=10.0),
    Case(m=33, d=16, strided=True, mask="random"),
]


def run(inputs: Inputs, backend: str) -> tuple[torch.Tensor, ...]:
    masks = {name: inputs.kwargs[name] for name in ("mask_pos", "mask_neg")}
    return ops.twin_attention(inputs.q, *inputs.texts, backend=backend, **masks)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_against_fp64(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    exact = run(inputs.to(torch.float64), "reference")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for backend in BACKENDS:
        got = run(inputs, backend)
        assert [x.dtype for x in got] == [dtype, wide, dtype, wide]
        for i, name in enumerate(("mask_pos", "mask_neg")):
            text = TextPack(*inputs.texts[2 * i : 2 * i + 2], inputs.kwargs[name])
            theirs = error(eager.sdpa(inputs.q, text, None), exact[2 * i])
            assert error(got[2 * i], exact[2 * i]) <= max(2 * theirs, FLOOR[dtype])
            lse, right = got[2 * i + 1], exact[2 * i + 1]
            assert torch.equal(lse == -torch.inf, right == -torch.inf)
            live = right > -torch.inf
            tight = 1e-12 if dtype == torch.float64 else 1e-6
            assert error(lse[live], right[live]) <= tight


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_the_natural_logsumexp_of_the_scaled_logits(backend: str) -> None:
    inputs = make(Case(m=9, n=12, d=16, mask="dead"), torch.float64)
    logits = torch.einsum("bmhd,bnhd->bmhn", inputs.q, inputs.texts[0]) / 4
    mask = inputs.kwargs["mask_pos"][:, None, None]
    expected = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(run(inputs, backend)[1], expected)
    assert (run(inputs, backend)[1][1] == -torch.inf).all()


def test_nasa_is_the_difference_of_the_twins() -> None:
    inputs = make(Case(m=33, n=12, d=16, c_out=None, mask="dead"))
    z_pos, _, z_neg, _ = run(inputs, "auto")
    nasa = ops.nasa_attention(inputs.q, *inputs.texts, **inputs.kwargs)
    torch.testing.assert_close(nasa, z_pos - 1.3 * z_neg)
