"""The gated linear layer of a GEGLU with its LayerNorm, in one pass.

Native on the CPU (csrc/cpu/project.h); elsewhere the reference in plain PyTorch, same result to
rounding. For inference: nothing here carries a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snoopi.ops import native, reference


class LayerNorm(NamedTuple):
    """gain (x - mean) / sqrt(variance + eps) + offset over the last dim; gain, offset [c]."""

    gain: Tensor
    offset: Tensor
    eps: float = 1e-5


class GEGLUPack(NamedTuple):
    """The weight [2c c_in] of a GEGLU's Linear, values before gates, and its native layout.

    packed is None where there is no native kernel for it, or PyTorch's products are faster.
    """

    weight: Tensor
    packed: Tensor | None = None


def pack_geglu(weight: Tensor) -> GEGLUPack:
    """Pack the weight [2c c_in] of a GEGLU for `geglu`; do it once per set of weights.

    Raises:
        ValueError: another shape.
    """
    if weight.dim() != 2 or weight.shape[0] % 2:
        raise ValueError(f"weight must be [2c c_in], got {list(weight.shape)}")
    c_out, c_in = weight.shape
    if weight.dtype == torch.bfloat16:
        pays = native.NATIVE.pairs
    else:  # deep fp32 weights outweigh what is saved beside their product
        pays = weight.dtype == torch.float32 and native.NATIVE.attends and c_in <= 640
    if not pays or native.why_not(weight) is not None or c_out % 32 or c_in % 32:
        return GEGLUPack(weight)
    return GEGLUPack(weight, torch.ops.snoopi.pack_geglu(weight))


def geglu(
    x: Tensor, pack: GEGLUPack, bias: Tensor | None = None, *, norm: LayerNorm | None = None
) -> Tensor:
    """value * gelu(gate) [.. c], value and gate the halves of norm(x) W^T + bias, x [.. c_in].

    16-bit tensors are computed in fp32: x rounds once after the norm, the result once.

    Raises:
        ValueError: x, bias or norm that do not fit the weight.
    """
    c_out, c_in = pack.weight.shape
    if x.shape[-1] != c_in:
        raise ValueError(f"x must be [.. {c_in}], got {list(x.shape)}")
    gain, offset, eps = (None, None, 0.0) if norm is None else norm
    for name, part, size in (
        ("bias", bias, c_out),
        ("norm.gain", gain, c_in),
        ("norm.offset", offset, c_in),
    ):
        if part is not None and tuple(part.shape) != (size,):
            raise ValueError(f"{name} must be [{size}], got {list(part.shape)}")
    if pack.packed is None or native.why_not(x) is not None or x.dtype != pack.weight.dtype:
        return reference.geglu(x, pack.weight, bias, norm)
    return torch.ops.snoopi.geglu.default(x, pack.packed, c_out, bias, gain, offset, eps)
