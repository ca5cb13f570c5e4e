"""snoopi.ops.guided_attention: NAG and VSF in the fused op against their formulas on fp64."""

import pytest
import torch
from cases import CASES, DTYPES, FLOOR, Case, Inputs, error, make
from torch import Tensor

from snoopi import ops
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.ops import eager, reference
from snoopi.ops.native import NATIVE
from snoopi.ops.packs import TextPack

GUIDANCES = [
    VSF(3.0, 0.1),
    VSF(0.7, -2.0),
    NAG(2.0, 2.5, 0.375),
    NAG(5.0, 1.1, 0.8),
    NAG(2.0, 1.2, 0.5, norm_p=2),
    NAG(-0.5, 0.9, 1.0, norm_p=2),
]
GRID = [case for case in CASES if not case.null]


def by_hand(inputs: Inputs, guidance: Guidance, wide: bool) -> Tensor:
    """The formula on two plain attentions: in fp64, or in the inputs' dtype as PyTorch ops."""
    inputs = inputs.to(torch.float64) if wide else inputs
    masks = (inputs.kwargs["mask_pos"], inputs.kwargs["mask_neg"])
    pos, neg = TextPack(*inputs.texts[:2], masks[0]), TextPack(*inputs.texts[2:], masks[1])
    scale = inputs.q.shape[-1] ** -0.5
    z_pos, lse_pos, z_neg, lse_neg = reference.twin_attention(inputs.q, pos, neg, scale)
    if not wide:
        z_pos, z_neg = eager.sdpa(inputs.q, pos, None), eager.sdpa(inputs.q, neg, None)
    z = guidance.combine(z_pos, lse_pos, z_neg, lse_neg).to(inputs.q.dtype)
    return eager.project(z, inputs.kwargs.get("w_out"), inputs.kwargs.get("b_out"))


def packs(inputs: Inputs, packed: bool) -> tuple[TextPack, TextPack, ops.LinearPack | None]:
    make_text = ops.pack_text if packed else TextPack
    make_out = ops.pack_linear if packed else ops.LinearPack
    kwargs = inputs.kwargs
    out = make_out(kwargs["w_out"], kwargs["b_out"]) if "w_out" in kwargs else None
    pos = make_text(*inputs.texts[:2], kwargs["mask_pos"])
    return pos, make_text(*inputs.texts[2:], kwargs["mask_neg"]), out


def with_strength(guidance: Guidance, inputs: Inputs) -> Guidance:
    a = inputs.kwargs["nasa_scale"]
    if not isinstance(a, Tensor):
        return guidance
    if isinstance(guidance, NAG):
        return NAG(a, guidance.tau, guidance.blend, guidance.norm_p)
    assert isinstance(guidance, VSF)
    return VSF(a, guidance.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "raw"])
def test_error_is_at_most_twice_that_of_eager(
    packed: bool, guidance: Guidance, dtype: torch.dtype
) -> None:
    for case in GRID:
        inputs = make(case, dtype)
        how = with_strength(guidance, inputs)
        got = ops.guided_attention(inputs.q, *packs(inputs, packed), how)
        assert got.dtype == dtype
        wide = with_strength(guidance, inputs.to(torch.float64))
        exact = by_hand(inputs, wide, wide=True)
        theirs = error(by_hand(inputs, how, wide=False), exact)
        ours = error(got, exact)
        assert ours <= max(2 * theirs, FLOOR[dtype]), (case, ours, theirs)


@pytest.mark.parametrize("guidance", [VSF(3.0), NAG(2.0)], ids=["vsf", "nag"])
def test_rows_without_a_negative_key_are_the_positive_attention(guidance: Guidance) -> None:
    inputs = make(Case(m=33, n=12, d=16, mask="dead", c_out=None), torch.float32)
    inputs.kwargs["mask_pos"] = None
    got = ops.guided_attention(inputs.q, *packs(inputs, True), guidance)
    plain = ops.attention(inputs.q, *inputs.texts[:2])
    torch.testing.assert_close(got[1], plain[1])
    assert (got[0] - plain[0]).abs().max() > 0.05


@pytest.mark.parametrize("guidance", [VSF(3.0), NAG(2.0)], ids=["vsf", "nag"])
def test_gradients_take_the_plain_path(guidance: Guidance) -> None:
    inputs = make(Case(m=9, n=5, d=8), torch.float64)
    q = inputs.q.clone().requires_grad_()
    got = ops.guided_attention(q, *packs(inputs, True), guidance)
    (grad,) = torch.autograd.grad(got.sum(), q)
    leaf = inputs.q.clone().requires_grad_()
    inputs.q = leaf
    (right,) = torch.autograd.grad(by_hand(inputs, guidance, wide=True).sum(), leaf)
    torch.testing.assert_close(grad, right)


def test_nasa_by_its_formula_is_nasa_attention() -> None:
    inputs = make(Case(m=33, n=12, d=16))
    got = ops.guided_attention(inputs.q, *packs(inputs, True), NASA(1.3))
    torch.testing.assert_close(got, inputs.packed())


def test_the_null_text_is_given_where_it_is_read() -> None:
    inputs = make(Case(m=33, n=12, d=16, null=True))
    kwargs = inputs.kwargs
    null = ops.pack_text(kwargs["k_null"], kwargs["v_null"], kwargs["mask_null"])
    got = ops.guided_attention(inputs.q, *packs(inputs, True), NASA(1.3, centred=True), null=null)
    torch.testing.assert_close(got, inputs.packed())
    with pytest.raises(ValueError, match="NASA needs a null text"):
        ops.guided_attention(inputs.q, *packs(inputs, True), NASA(1.3, centred=True))
    with pytest.raises(ValueError, match="VSF needs no null text"):
        ops.guided_attention(inputs.q, *packs(inputs, True), VSF(1.3), null=null)


@pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.why)
def test_compiles_as_one_graph_with_the_packing_inside() -> None:
    torch.compiler.reset()
    inputs = make(Case(m=9, n=5, d=8, mask="random"))

    def guided(q: Tensor) -> Tensor:
        texts = packs(inputs, True)
        return ops.guided_attention(q * 2, *texts, VSF(2.0)) + ops.guided_attention(
            q, *texts, NAG(2.0)
        )

    compiled = torch.compile(guided, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs.q), guided(inputs.q))


@pytest.mark.parametrize("centred", [False, True])
def test_a_formula_of_its_own_is_combined_in_plain_torch(centred: bool) -> None:
    inputs = make(Case(m=33, n=12, d=16, null=True))
    kwargs = inputs.kwargs
    null = ops.pack_text(kwargs["k_null"], kwargs["v_null"], kwargs["mask_null"])

    class Own(NASA):
        def formula(self) -> ops.Formula:
            return ops.Formula(self.scale, "combine")

    more = {"null": null} if centred else {}
    texts = packs(inputs, True)
    got = ops.guided_attention(inputs.q, *texts, Own(1.3, centred), **more)
    right = ops.guided_attention(inputs.q, *texts, NASA(1.3, centred), **more)
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.why)
def test_an_unknown_formula_is_refused() -> None:
    inputs = make(Case())

    class Odd(VSF):
        def formula(self) -> ops.Formula:
            return ops.Formula(1.0, "odd")

    with pytest.raises(RuntimeError, match="a formula must be nasa, vsf or nag, got odd"):
        ops.guided_attention(inputs.q, *packs(inputs, True), Odd())
