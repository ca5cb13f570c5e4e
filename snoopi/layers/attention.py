"""Attention layers. CrossAttention is the ONE place where guidance enters a network.

Parameter names are diffusers' (to_q, to_k, to_v, to_out.0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.conditioning import Conditioning, TextKV
from snoopi.guidance import NASA, Guidance, strength, with_strength


class SelfAttention(nn.Module):
    """Softmax attention of a sequence to itself; residual and norm stay outside."""

    def __init__(self, channels: int, heads: int, head_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """x [b m c] -> [b m c]."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [b m h d]
        k = self.to_k(x).unflatten(-1, (self.heads, -1))  # [b m h d]
        v = self.to_v(x).unflatten(-1, (self.heads, -1))  # [b m h d]
        return self.to_out[0](ops.attention(q, k, v).flatten(-2))  # [b m c]


class CrossAttention(nn.Module):
    """Attention of picture tokens to text, with negative guidance (SNOOPI Eq. 8-10).

    index: the layer's place among the network's `count` cross-attentions in forward order, which
    the network sets (per-layer strengths).
    """

    def __init__(
        self, channels: int, text_width: int, heads: int, head_dim: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.index, self.count = 0, 1
        self.to_q = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(text_width, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(text_width, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, channels)])

    def key_value(self, text: Conditioning) -> tuple[Tensor, Tensor]:
        """K and V of one text [b n h d] by the layer's projections, the same for every text."""
        k = self.to_k(text.tokens).unflatten(-1, (self.heads, -1))  # [b n h d]
        v = self.to_v(text.tokens).unflatten(-1, (self.heads, -1))  # [b n h d]
        return k, v

    def forward(self, x: Tensor, cond: Conditioning, size: tuple[int, int]) -> Tensor:
        """x [b m c], the tokens of a picture of size (h, w) with m = h w -> [b m c]."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [b m h d]
        k, v = self._kv(cond, 0)
        guidance, negative = self._guidance(cond, size), cond.negative
        if guidance is None or negative is None:
            return self._plain(q, k, v, cond.mask)
        k_neg, v_neg = self._kv(cond, 1)
        if isinstance(guidance, NASA):
            return self._nasa(q, (k, v), (k_neg, v_neg), cond, guidance)
        z_pos, lse_pos, z_neg, lse_neg = ops.twin_attention(
            q, k, v, k_neg, v_neg, mask_pos=cond.mask, mask_neg=negative.mask
        )
        return self._out(guidance.combine(z_pos, lse_pos, z_neg, lse_neg))

    def _kv(self, cond: Conditioning, which: int) -> tuple[Tensor, Tensor]:
        """K/V of the text (0), its negative (1) or the null text (2): filled in, or projected."""
        made = None if cond.kv is None else cond.kv.layers[self.index][which]
        if made is not None:
            return made
        text = (cond, cond.negative, cond.null)[which]
        assert text is not None
        return self.key_value(text)

    def _guidance(self, cond: Conditioning, size: tuple[int, int]) -> Guidance | None:
        """This layer's guidance with its own strength; None if it is off (a float 0)."""
        if cond.guidance is None:
            return None
        value = strength(cond.guidance)
        if isinstance(value, Tensor) and value.dim() == 1:
            if len(value) != self.count:
                raise ValueError(
                    f"a strength per layer needs {self.count} values, got {len(value)}"
                )
            value = value[self.index]
        if not isinstance(value, Tensor) and value == 0:
            return None
        if cond.region is not None:
            value = value * _pool(cond.region, size)  # [b m]
        return with_strength(cond.guidance, value)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self._out(ops.attention(q, k, v, mask))

    def _nasa(
        self,
        q: Tensor,
        pos: tuple[Tensor, Tensor],
        neg: tuple[Tensor, Tensor],
        cond: Conditioning,
        guidance: NASA,
    ) -> Tensor:
        """Eq. 10 and the output projection in one op."""
        assert cond.negative is not None
        k_null, v_null, mask_null = None, None, None
        if guidance.centred:
            assert cond.null is not None
            (k_null, v_null), mask_null = self._kv(cond, 2), cond.null.mask
        scale = guidance.scale
        if torch.compiler.is_dynamo_compiling() and not isinstance(scale, Tensor):
            # As the op's float argument it would be a constant: a new graph for every strength.
            scale = scale * torch.ones((), dtype=torch.float64, device=q.device)
        w_out, b_out = self._fusable_out()
        z = ops.nasa_attention(
            q,
            *pos,
            *neg,
            w_out,
            b_out,
            k_null=k_null,
            v_null=v_null,
            mask_pos=cond.mask,
            mask_neg=cond.negative.mask,
            mask_null=mask_null,
            nasa_scale=scale,
        )
        return z if w_out is not None else self._out(z)

    def _fusable_out(self) -> tuple[Tensor | None, Tensor | None]:
        """to_out's weight and bias if the op may take the projection: only from a plain Linear.

        An adapter, a hook, a subclass or a forward of its own on it would be bypassed in silence,
        so then the op returns z and to_out runs as a module.
        """
        out = self.to_out[0]
        hooks = (out._forward_hooks, out._forward_pre_hooks, out._backward_hooks)
        if type(out) is not nn.Linear or "forward" in vars(out) or any(hooks):
            return None, None
        return out.weight, out.bias

    def _out(self, z: Tensor) -> Tensor:
        return self.to_out[0](z.flatten(-2))  # [b m c]


def _pool(region: Tensor, size: tuple[int, int]) -> Tensor:
    """A region [b H W] averaged to a layer's h x w, flattened [b m]."""
    return F.adaptive_avg_pool2d(region[:, None].float(), size).flatten(1)


def fill_kv(layers: list[CrossAttention], cond: Conditioning) -> TextKV:
    """K/V of a conditioning's texts for every layer."""
    if torch.is_grad_enabled():
        raise RuntimeError("text_kv is for inference: call it under no_grad or inference_mode")
    texts = (cond, cond.negative, cond.null)
    made = tuple(
        tuple(None if text is None else layer.key_value(text) for text in texts) for layer in layers
    )
    return TextKV(cond.sources(), made)
