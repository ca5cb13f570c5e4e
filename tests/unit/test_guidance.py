"""Classifier-free guidance, NASA, NAG and VSF: their formulas, and what a Conditioning accepts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import ops
from snoopi.conditioning import Conditioning, concat
from snoopi.guidance import NAG, NASA, VSF, Guidance, cfg, strength, with_strength

B, M, N_POS, N_NEG, H, D = 2, 5, 6, 4, 3, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pos, neg = (B, N_POS, H, D), (B, N_NEG, H, D)
    k_pos, v_pos = randn(*pos, seed=1), randn(*pos, seed=2)
    return 2 * randn(B, M, H, D), k_pos, v_pos, randn(*neg, seed=3), randn(*neg, seed=4)


def twin(**masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.twin_attention(*texts(), **masks, backend="reference")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = torch.einsum("bmhd,bnhd->bhmn", q, k) / D**0.5
    logits = logits if bias is None else logits + bias
    return torch.einsum("bhmn,bnhd->bmhd", logits.softmax(-1), v)


# --- classifier-free guidance ----------------------------------------------------------------


def test_cfg_is_equation_4_at_every_kappa() -> None:
    c, u = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    for kappa in (0.0, 0.5, 1.0, 7.5):
        torch.testing.assert_close(cfg(c, u, kappa), (1 - kappa) * u + kappa * c)
    per_row = cfg(c, u, torch.tensor([0.0, 0.5, 7.5], dtype=torch.float32))
    assert per_row.dtype == torch.float64
    for row, kappa in enumerate((0.0, 0.5, 7.5)):
        torch.testing.assert_close(per_row[row], cfg(c, u, kappa)[row])


# --- NASA ------------------------------------------------------------------------------------


def test_nasa_is_equation_10() -> None:
    q, k_pos, v_pos, k_neg, v_neg = texts()
    z_pos, z_neg = softmax_attention(q, k_pos, v_pos), softmax_attention(q, k_neg, v_neg)
    torch.testing.assert_close(NASA(0.7).combine(*twin()), z_pos - 0.7 * z_neg)
    region = randn(B, M, seed=5)
    want = z_pos - region[:, :, None, None] * z_neg
    torch.testing.assert_close(NASA(region).combine(*twin()), want)


def test_centred_nasa_steers_by_the_difference_to_the_null_text() -> None:
    z_pos, _, z_neg, _ = twin()
    z_null = randn(B, M, H, D, seed=6)
    guidance = NASA(0.7, centred=True)
    assert guidance.needs_null and not NASA(0.7).needs_null
    got = guidance.combine(z_pos, None, z_neg, None, z_null)
    torch.testing.assert_close(got, z_pos - 0.7 * (z_neg - z_null))
    assert torch.equal(guidance.combine(z_pos, None, z_null, None, z_null), z_pos)
    with pytest.raises(ValueError, match="z_null"):
        guidance.combine(z_pos, None, z_neg, None)


# --- NAG -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_p", [1, 2])
def test_nag_is_its_paper_token_by_token(norm_p: int) -> None:
    z_pos, lse_pos, z_neg, lse_neg = twin()
    guidance = NAG(phi=3.0, tau=5.0, blend=0.4, norm_p=norm_p)
    got = guidance.combine(z_pos, lse_pos, z_neg, lse_neg)
    clipped = 0
    for b in range(B):
        for m in range(M):
            pos, neg = z_pos[b, m].flatten(), z_neg[b, m].flatten()  # all heads of a token
            z = pos + 3.0 * (pos - neg)
            ratio = float(z.norm(norm_p) / pos.norm(norm_p))
            clipped += ratio > 5.0
            z = z * min(ratio, 5.0) / ratio
            want = 0.4 * z + 0.6 * pos
            torch.testing.assert_close(got[b, m].flatten(), want, rtol=1e-6, atol=1e-6)
    assert 0 < clipped < B * M  # both sides of the threshold are tested


def test_nag_identities() -> None:
    z_pos, lse_pos, z_neg, lse_neg = twin()
    same = NAG(2.0).combine(z_pos, lse_pos, z_pos, lse_pos)
    torch.testing.assert_close(same, z_pos)
    torch.testing.assert_close(NAG(2.0, blend=0.0).combine(z_pos, lse_pos, z_neg, lse_neg), z_pos)
    loose = NAG(2.0, tau=1e9, blend=1.0).combine(z_pos, lse_pos, z_neg, lse_neg)
    torch.testing.assert_close(loose, 3 * z_pos - 2 * z_neg)
    tight = NAG(2.0, tau=0.5, blend=1.0).combine(z_pos, lse_pos, z_neg, lse_neg)
    ratio = tight.flatten(-2).norm(p=1, dim=-1) / z_pos.flatten(-2).norm(p=1, dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))


# --- VSF -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "bias"), [(3.0, 0.1), (1.0, 0.0), (0.5, -1.0)])
def test_vsf_is_one_softmax_with_flipped_values(scale: float, bias: float) -> None:
    q, k_pos, v_pos, k_neg, v_neg = texts()
    k, v = torch.cat([k_pos, k_neg], 1), torch.cat([v_pos, -scale * v_neg], 1)
    logit_bias = torch.cat([torch.zeros(N_POS), torch.full((N_NEG,), -bias)]).double()
    want = softmax_attention(q, k, v, logit_bias)
    torch.testing.assert_close(VSF(scale, bias).combine(*twin()), want)


def test_vsf_with_masks_is_the_joint_softmax_over_live_keys() -> None:
    q, k_pos, v_pos, k_neg, v_neg = texts()
    mask_pos, mask_neg = torch.ones(B, N_POS, dtype=torch.bool), torch.ones(B, N_NEG).bool()
    mask_pos[0, 2:], mask_neg[1, 1:] = False, False
    got = VSF(3.0, 0.1).combine(*twin(mask_pos=mask_pos, mask_neg=mask_neg))
    bias = torch.where(mask_pos, 0.0, -torch.inf), torch.where(mask_neg, -0.1, -torch.inf)
    k, v = torch.cat([k_pos, k_neg], 1), torch.cat([v_pos, -3.0 * v_neg], 1)
    want = softmax_attention(q, k, v, torch.cat(bias, 1)[:, None, None])
    torch.testing.assert_close(got, want)


def test_vsf_needs_both_lse() -> None:
    z_pos, lse_pos, z_neg, _ = twin()
    with pytest.raises(ValueError, match="log-sum-exp"):
        VSF().combine(z_pos, lse_pos, z_neg, None)


# --- all three -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [NASA(0.7), NAG(), VSF()])
def test_masked_texts_give_no_nan(guidance: Guidance) -> None:
    mask_pos, mask_neg = torch.ones(B, N_POS).bool(), torch.ones(B, N_NEG).bool()
    mask_neg[0] = False
    z = twin(mask_pos=mask_pos, mask_neg=mask_neg)
    got = guidance.combine(*z)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], z[0][0])  # a row without a negative is left alone
    for masks in ((0, 1), (0, 0)):
        both = torch.ones(B, N_POS).bool(), torch.ones(B, N_NEG).bool()
        both[0][0], both[1][0] = bool(masks[0]), bool(masks[1])
        assert guidance.combine(*twin(mask_pos=both[0], mask_neg=both[1])).isfinite().all()


@pytest.mark.parametrize("guidance", [NASA(0.7, True), NAG(1.0, 2.0, 0.3, 2), VSF(2.0, 0.3)])
def test_strength_can_be_read_and_replaced_alone(guidance: Guidance) -> None:
    stronger = with_strength(guidance, 9.0)
    assert strength(stronger) == 9.0 and type(stronger) is type(guidance)
    assert with_strength(stronger, strength(guidance)) == guidance


# --- Conditioning ----------------------------------------------------------------------------

TOKENS = torch.zeros(2, 3, 4)
TEXT = Conditioning(TOKENS)


def test_nasa_scale_is_short_for_nasa() -> None:
    cond = Conditioning(TOKENS, negative=TEXT, nasa_scale=0.3)
    assert cond.guidance == NASA(0.3) and cond.nasa_scale is None
    assert replace(cond, guidance=NASA(0.5)).guidance == NASA(0.5)
    plain = cond.plain()
    assert plain.guidance is None and plain.negative is None and plain.tokens is TOKENS


@pytest.mark.parametrize(
    ("message", "kwargs"),
    [
        (r"tokens must be \[b n k\], got \[2, 4\]", {"tokens": torch.zeros(2, 4)}),
        (r"mask must be \[b n\] = \[2, 3\], got \[2, 4\]", {"mask": torch.ones(2, 4).bool()}),
        (
            "either guidance or nasa_scale",
            {"negative": TEXT, "guidance": NASA(), "nasa_scale": 1.0},
        ),
        ("guidance needs a negative", {"guidance": NAG()}),
        ("guidance needs a negative", {"nasa_scale": 0.5}),
        ("centred=True needs `null`", {"negative": TEXT, "guidance": NASA(1.0, centred=True)}),
        (
            r"negative.tokens must be \[2 or 1, n, 4\], got \[3, 3, 4\]",
            {"negative": Conditioning(torch.zeros(3, 3, 4))},
        ),
        (
            r"null.tokens must be \[2 or 1, n, 4\], got \[1, 3, 5\]",
            {"null": Conditioning(torch.zeros(1, 3, 5))},
        ),
        (
            "negative must be a Conditioning without",
            {"negative": Conditioning(TOKENS, negative=TEXT)},
        ),
        (
            "null must be a Conditioning without",
            {"null": Conditioning(TOKENS, negative=TEXT, nasa_scale=1.0)},
        ),
    ],
)
def test_impossible_conditionings_are_refused(message: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        Conditioning(**({"tokens": TOKENS} | kwargs))


def test_expand_and_map() -> None:
    one = Conditioning(torch.randn(1, 3, 4), torch.ones(1, 3).bool(), torch.randn(1, 6))
    four = one.expand(4)
    assert len(four) == 4 and four.mask is not None and four.pooled is not None
    assert four.mask.shape == (4, 3) and four.pooled.shape == (4, 6)
    assert torch.equal(four.tokens[3], one.tokens[0]) and TEXT.expand(2) is TEXT
    with pytest.raises(ValueError, match="cannot expand a conditioning of 2 rows to 3"):
        TEXT.expand(3)
    rolled = four.map(lambda x: x[:2])
    assert len(rolled) == 2 and rolled.size_ids is None


def test_concat_stacks_and_refuses_what_cannot_be_stacked() -> None:
    masked = Conditioning(TOKENS, torch.ones(2, 3).bool())
    assert len(concat([TEXT, TEXT, TEXT])) == 6
    with pytest.raises(ValueError, match="with and without mask"):
        concat([TEXT, masked])
    with pytest.raises(ValueError, match="carry a negative"):
        concat([TEXT, Conditioning(TOKENS, negative=TEXT)])
