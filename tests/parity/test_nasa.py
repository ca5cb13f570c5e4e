"""NASA through the whole UNet against the paper's Algorithm 1 as a diffusers processor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snoopi import lora
from snoopi.conditioning import Conditioning
from tests.parity import oracle
from tests.parity.oracle import randn
from tests.parity.test_unet import TINY, pair, text, their_prediction

pytestmark = pytest.mark.parity


class Algorithm1:
    """SNOOPI's Algorithm 1 ("NASA Attention"), its names kept; masks as in the positive branch."""

    def __init__(self, neg_emb: Tensor, scale: float, neg_mask: Tensor | None = None) -> None:
        self.neg_emb, self.scale, self.neg_mask = neg_emb, scale, neg_mask

    def __call__(
        self,
        attn: Any,
        z: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert encoder_hidden_states is not None and z.ndim == 3
        residual, emb, neg_emb = z, encoder_hidden_states, self.neg_emb
        bsz, sequence_length, _ = emb.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, sequence_length, bsz)
            attention_mask = attention_mask.view(bsz, attn.heads, -1, attention_mask.shape[-1])
        query = self.heads(attn, attn.to_q(z))
        key, value = self.heads(attn, attn.to_k(emb)), self.heads(attn, attn.to_v(emb))
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        z = z.transpose(1, 2).reshape(bsz, -1, value.shape[1] * value.shape[3])
        neg_key, neg_value = attn.to_k(neg_emb), attn.to_v(neg_emb)
        neg_key, neg_value = self.heads(attn, neg_key), self.heads(attn, neg_value)
        neg_mask = None if self.neg_mask is None else self.neg_mask[:, None, None, :]
        neg_z = F.scaled_dot_product_attention(query, neg_key, neg_value, attn_mask=neg_mask)
        neg_z = neg_z.transpose(1, 2).reshape(bsz, -1, value.shape[1] * value.shape[3])
        z_nasa = z - self.scale * neg_z  # Equation 10
        z_nasa = attn.to_out[1](attn.to_out[0](z_nasa))
        if attn.residual_connection:
            z_nasa = z_nasa + residual
        return z_nasa / attn.rescale_output_factor

    @staticmethod
    def heads(attn: Any, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)


def with_algorithm1(theirs: Any, processor: Algorithm1) -> Any:
    for name, module in theirs.named_modules():
        if name.endswith("attn2"):
            module.set_processor(processor)
    return theirs


@pytest.mark.parametrize("scale", [0.3, 1.0, -0.5])
@pytest.mark.parametrize("name", TINY)
def test_nasa_equals_algorithm_1(name: str, scale: float) -> None:
    ours, theirs = pair(name)
    x, t = randn(2, 4, 12, 20, seed=11), torch.tensor([999, 271])
    cond = text(ours.config, 2)
    negative = text(ours.config, 2, n=5, seed=21)
    with_algorithm1(theirs, Algorithm1(negative.tokens, scale))

    def got() -> Tensor:
        return ours(x, t, replace(cond, negative=negative, nasa_scale=scale))

    def want() -> Tensor:
        return their_prediction(theirs, x, t, cond)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, got, want)

    oracle.close(f"{name} NASA {scale}", got(), want(), report)
    assert oracle.errors(got(), ours(x, t, cond))[0] > 0.01


def test_nasa_with_masks_on_both_texts_equals_algorithm_1() -> None:
    ours, theirs = pair("sd21")
    x, t = randn(2, 4, 8, 8, seed=12), torch.tensor([999, 3])
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    neg_mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    cond = Conditioning(text(ours.config, 2).tokens, mask)
    negative = Conditioning(text(ours.config, 2, n=5, seed=21).tokens, neg_mask)
    with_algorithm1(theirs, Algorithm1(negative.tokens, 0.7, neg_mask))
    got = ours(x, t, replace(cond, negative=negative, nasa_scale=0.7))
    oracle.close("NASA masked", got, their_prediction(theirs, x, t, cond))


def test_nasa_with_a_lora_on_every_projection_equals_algorithm_1_with_merged_weights() -> None:
    """An adapter on to_out must not be bypassed by the op that takes the projection."""
    ours, theirs = pair("sd15")
    x, t = randn(2, 4, 8, 8, seed=13), torch.tensor([999, 3])
    cond = text(ours.config, 2)
    negative = text(ours.config, 2, n=5, seed=21)
    targets = [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    lora.inject(ours, targets, 4, 8.0)
    with torch.no_grad():
        for seed, layer in enumerate(lora.adapters(ours).values()):
            layer.lora_b.copy_(randn(*layer.lora_b.shape, seed=seed))
    ours.requires_grad_(False)
    got = ours(x, t, replace(cond, negative=negative, nasa_scale=0.7))
    plain = pair("sd15")[0](x, t, replace(cond, negative=negative, nasa_scale=0.7))
    assert oracle.errors(got, plain)[0] > 0.01
    lora.merge(ours)
    theirs.load_state_dict(ours.state_dict())
    with_algorithm1(theirs, Algorithm1(negative.tokens, 0.7))
    oracle.close("NASA with LoRA", got, their_prediction(theirs, x, t, cond))
