"""Timestep embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int, *, sin_first: bool = False, shift: float = 0.0) -> Tensor:
    """Sinusoidal features of t [b] -> fp32 [b width]; frequencies 10000^(-i / (width/2 - shift)).

    Cosines first, as in Stable Diffusion and PixArt; sin_first with shift 1 for LCM's guidance
    embedding. Integer timesteps may exceed what 16-bit floats hold, so t is read in fp32.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    # Rounded in the trained models' order: one ulp of a frequency turns t = 999 by 1e-4.
    if sin_first:
        exponent = index * -(math.log(10000.0) / (half - shift))
    else:
        exponent = -math.log(10000.0) * index / (half - shift)
    angles = t.float()[:, None] * torch.exp(exponent)  # [b width/2]
    parts = (angles.sin(), angles.cos()) if sin_first else (angles.cos(), angles.sin())
    return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear; `cond_proj` (no bias) adds LCM's guidance embedding to the input."""

    def __init__(self, width_in: int, width: int, cond_width: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.cond_proj = nn.Linear(cond_width, width_in, bias=False) if cond_width else None
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x [b width_in] -> [b width]."""
        x = x.to(self.linear_1.weight.dtype)
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition.to(x.dtype))
        return self.linear_2(self.act(self.linear_1(x)))
