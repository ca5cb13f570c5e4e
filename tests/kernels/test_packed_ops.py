"""What torch's own checker says of the ops on packs: schemas, fakes, tracing with open shapes."""

import pytest
import torch
from cases import Case, make

from snoopi import ops
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.ops.native import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.why)
CASES = [
    Case(),
    Case(n=1, n_neg=1, m=1, d=5, c_out=None),
    Case(m=17, n=12, d=16, null=True, mask="random", strength=True),
    Case(m=9, n=20, d=40, mask="dead", shared=True, strided=True),
]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_packing(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    text = (*inputs.texts[:2], inputs.kwargs["mask_pos"])
    torch.library.opcheck(torch.ops.snoopi.pack_text, text)
    if case.c_out is not None and NATIVE.projects:
        weight = (inputs.kwargs["w_out"],)
        torch.library.opcheck(torch.ops.snoopi.pack_linear, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("how", [NASA(0.7), NAG(2.0), NAG(2.0, norm_p=2), VSF(1.5)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_op_on_packs(case: Case, how: Guidance, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    kwargs, a = inputs.kwargs, inputs.kwargs["nasa_scale"]
    pos = ops.pack_text(*inputs.texts[:2], kwargs["mask_pos"])
    neg = ops.pack_text(*inputs.texts[2:], kwargs["mask_neg"])
    null = None
    if case.null and isinstance(how, NASA):
        null = ops.pack_text(kwargs["k_null"], kwargs["v_null"], kwargs["mask_null"])
    texts = [part for text in (pos, neg) for part in text.native()]
    texts += (None, None, 0) if null is None else null.native()
    out = (None, None, 0)
    if case.c_out is not None:
        out = ops.pack_linear(kwargs["w_out"], kwargs["b_out"]).native()
    strength = (a, 0.0) if case.strength else (None, a)
    formula = how.formula()
    parameters = [float(x) for x in formula.parameters]
    args = (inputs.q, *texts, *out, *strength, formula.kind, parameters, case.d**-0.5)
    torch.library.opcheck(torch.ops.snoopi.guided_attention, args)
