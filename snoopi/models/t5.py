"""The text encoder of T5 v1.1 (XXL for PixArt, and the small worlds').

Parameter names are Hugging Face's T5EncoderModel's, the tied second name of the embedding left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; the defaults are XXL's, with PixArt's prompt length.

    buckets, max_distance: of the relative positions. masked: padding is hidden from the encoder
    and from the network that reads its output.
    """

    vocabulary: int = 32128
    length: int = 120
    width: int = 4096
    mlp_width: int = 10240
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    buckets: int = 32
    max_distance: int = 128
    masked: bool = True
    eos_id: int = 1

    def for_words(self, vocabulary: int, length: int) -> T5Config:
        """The same encoder for a vocabulary whose last id is eos, and prompts of `length`."""
        return replace(self, vocabulary=vocabulary, length=length, eos_id=vocabulary - 1)


class T5Output(NamedTuple):
    """last [b n k]: the last layer's output, normalised."""

    last: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, eps 1e-6; no mean and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[b n k] -> [b n k] in the weight's dtype; the mean square is fp32."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(self.weight.dtype)


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance key - query, int64: half of them for keys that follow.

    Of each half, the first half counts single steps; the rest widen with the logarithm, up to
    max_distance and whatever lies beyond.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    ratio = torch.log(far.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, wide) + half * (distance > 0)


class Attention(nn.Module):
    """Self-attention with a bias by relative position; logits are not divided by sqrt(d)."""

    def __init__(self, config: T5Config, has_table: bool) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if has_table:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def position_bias(self, n: int) -> Tensor:
        """The bias of every query and key of n tokens, [1 h n n]."""
        place = torch.arange(n, device=self.relative_attention_bias.weight.device)
        distance = place - place[:, None]  # [n n], key - query
        index = bucket(distance, self.config.buckets, self.config.max_distance)
        return self.relative_attention_bias(index).permute(2, 0, 1)[None]  # [1 h n n]

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [b n k], bias [1 h n n] or None to read the table, mask bool [b n] -> [b n k], bias."""
        if bias is None:
            bias = self.position_bias(x.shape[1])
        q, k, v = (
            f(x).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)  # [b h n d]
            for f in (self.q, self.k, self.v)
        )
        added = bias.to(q.dtype)
        if mask is not None:
            # The lowest number, not -inf: a text without a token is no NaN.
            added = added.masked_fill(~mask[:, None, None], torch.finfo(q.dtype).min)  # [b h n n]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
        return self.o(z.transpose(1, 2).flatten(2)), bias


class GatedGELU(nn.Module):
    """gelu (tanh) of one Linear times another, and a Linear back."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b n k] -> [b n k]."""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    """Pre-norm attention and MLP. The first block holds the table of relative positions."""

    def __init__(self, config: T5Config, has_table: bool) -> None:
        super().__init__()
        attend = {"SelfAttention": Attention(config, has_table)}
        mlp = {"DenseReluDense": GatedGELU(config)}
        self.layer = nn.ModuleList(
            nn.ModuleDict({**part, "layer_norm": RMSNorm(config.width)}) for part in (attend, mlp)
        )

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [b n k] -> [b n k], and the bias [1 h n n] for the next block."""
        attend, mlp = self.layer
        y = attend.get_submodule("layer_norm")(x)
        z, bias = attend.get_submodule("SelfAttention")(y, bias, mask)
        x = x + z
        y = mlp.get_submodule("layer_norm")(x)
        return x + mlp.get_submodule("DenseReluDense")(y), bias


class T5Encoder(nn.Module):
    """A T5 v1.1 encoder: forward(ids, mask) -> T5Output."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(config, i == 0) for i in range(config.layers))
        self.encoder.final_layer_norm = RMSNorm(config.width)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> T5Output:
        """ids int64 [b n], mask bool [b n], True = attend; None attends to all."""
        x, bias = self.shared(ids), None  # [b n k]
        for block in self.blocks():
            x, bias = block(x, bias, mask)
        return T5Output(self.encoder.get_submodule("final_layer_norm")(x))

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return list(self.encoder.get_submodule("block").children())

    @torch.no_grad()
    def initialise(self) -> None:
        """Queries start 1 / sqrt(d) smaller, since the logits are not divided by it (T5)."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.q.weight.mul_(self.config.head_dim**-0.5)
