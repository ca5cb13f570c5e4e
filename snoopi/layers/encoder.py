"""The transformer layer that CLIP's text and image towers share. Names are Hugging Face's."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["quick_gelu", "gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Self-attention with biases everywhere; causal for text."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b n k] -> [b n k]."""
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b h n d]
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(z.transpose(1, 2).flatten(-2))  # [b n k]


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, mlp_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = quick_gelu if activation == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b n k] -> [b n k]."""
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP (LayerNorm eps 1e-5)."""

    def __init__(
        self, width: int, mlp_width: int, heads: int, activation: Activation, *, causal: bool
    ) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, heads, causal)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[b n k] -> [b n k]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))
