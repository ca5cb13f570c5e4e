"""Attention layers. CrossAttention is the ONE place where guidance enters a network.

Parameter names are diffusers' (to_q, to_k, to_v, to_out.0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.conditioning import Conditioning, TextKV
from snoopi.guidance import Guidance, strength, with_strength
from snoopi.layers.packed import PackedLinear, PackedTogether, hooked, linear
from snoopi.ops import LinearPack, TextPack


class SelfAttention(nn.Module):
    """Softmax attention of a sequence to itself; residual and norm stay outside."""

    def __init__(self, channels: int, heads: int, head_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(channels, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, channels)])
        self._packed: PackedTogether | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [b m c] -> [b m c]."""
        return self.to_out[0](self._attend(x, None))

    def added(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x + attention of norm(x), [b m c] -> [b m c]."""
        return linear(self.to_out[0], self._attend(x, norm), residual=x)

    def _attend(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        """The attention's result of norm(x) before its projection, [b m h*d]."""
        layers = (self.to_q, self.to_k, self.to_v)
        if self._packed is not None and self._packed.takes(layers, x, norm):
            y = self._packed.fused(x, norm).unflatten(-1, (3, self.heads, -1))  # [b m 3 h d]
            q, k, v = y.unbind(2)  # [b m h d] each
        else:
            y = x if norm is None else norm(x)
            q, k, v = (part(y).unflatten(-1, (self.heads, -1)) for part in layers)  # [b m h d]
        return ops.attention(q, k, v).flatten(-2)

    def pack(self) -> bool:
        """Pack q, k and v as one product where that pays; see snoopi.optimize."""
        layers = (self.to_q, self.to_k, self.to_v)
        self._packed = PackedTogether(layers) if PackedTogether.pays(layers) else None
        return self._packed is not None

    def unpack(self) -> None:
        """Undo `pack`."""
        self._packed = None


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
        return self._attend(x, cond, size, None, None)

    def added(
        self, x: Tensor, norm: nn.LayerNorm, cond: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        """x + attention of norm(x), [b m c] -> [b m c]."""
        return self._attend(x, cond, size, norm, x)

    def _attend(
        self,
        x: Tensor,
        cond: Conditioning,
        size: tuple[int, int],
        norm: nn.LayerNorm | None,
        residual: Tensor | None,
    ) -> Tensor:
        q = linear(self.to_q, x, norm=norm).unflatten(-1, (self.heads, -1))  # [b m h d]
        pos = self._text(cond, 0)
        guidance = self._guidance(cond, size)
        if guidance is None or cond.negative is None:
            return self._out(ops.attention(q, pos.k, pos.v, pos.mask), residual)
        neg, out = self._text(cond, 1), self._linear()
        null = self._text(cond, 2) if guidance.needs_null else None
        z = ops.guided_attention(q, pos, neg, out, guidance, null=null)
        if out is None:
            return self._out(z, residual)
        return z if residual is None else residual + z

    def _text(self, cond: Conditioning, which: int) -> TextPack:
        """K/V of the text (0), its negative (1) or the null text (2): filled in, or projected."""
        made = None if cond.kv is None else cond.kv.layers[self.index][which]
        if made is not None:
            return made
        text = (cond, cond.negative, cond.null)[which]
        assert text is not None
        return TextPack(*self.key_value(text), text.mask)

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
        if torch.compiler.is_dynamo_compiling() and not isinstance(value, Tensor):
            # As the op's float argument it would be a constant: a new graph for every strength.
            value = value * torch.ones((), dtype=torch.float64, device=cond.tokens.device)
        if cond.region is not None:
            value = value * _pool(cond.region, size)  # [b m]
        return with_strength(cond.guidance, value)

    def _linear(self) -> LinearPack | None:
        """to_out's weight and bias if the op may take the projection: of a plain or packed Linear.

        An adapter, a hook, a subclass or a forward of its own on it would be bypassed in silence,
        so then the op returns z and to_out runs as a module.
        """
        out = self.to_out[0]
        if type(out) not in (nn.Linear, PackedLinear) or hooked(out):
            return None
        if isinstance(out, PackedLinear):
            return out.for_attention()
        return LinearPack(out.weight, out.bias)  # type: ignore[arg-type]

    def _out(self, z: Tensor, residual: Tensor | None) -> Tensor:
        return linear(self.to_out[0], z.flatten(-2), residual=residual)  # [b m c]


def _pool(region: Tensor, size: tuple[int, int]) -> Tensor:
    """A region [b H W] averaged to a layer's h x w, flattened [b m]."""
    return F.adaptive_avg_pool2d(region[:, None].float(), size).flatten(1)


def fill_kv(layers: list[CrossAttention], cond: Conditioning) -> TextKV:
    """K/V of a conditioning's texts for every layer, packed for the op where it will run."""
    if torch.is_grad_enabled():
        raise RuntimeError("text_kv is for inference: call it under no_grad or inference_mode")
    texts = (cond, cond.negative, cond.null)

    def make(layer: CrossAttention, text: Conditioning) -> TextPack:
        k, v = layer.key_value(text)
        # A text alone goes through PyTorch's attention, which takes them as they are.
        guided = cond.guidance is not None
        return ops.pack_text(k, v, text.mask) if guided else TextPack(k, v, text.mask)

    made = tuple(
        tuple(None if text is None else make(layer, text) for text in texts) for layer in layers
    )
    return TextKV(cond.sources(), made)
