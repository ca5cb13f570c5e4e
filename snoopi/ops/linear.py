"""Linear layers with what stands around them in one pass: LayerNorm, residual, the gate of a GEGLU.

Native on the CPU (csrc/cpu/project.h); elsewhere the reference in plain PyTorch, same result to
rounding. For inference: nothing here carries a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snoopi.ops import native, reference
from snoopi.ops.packs import LinearPack


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


def linear(
    x: Tensor, pack: LinearPack, *, norm: LayerNorm | None = None, residual: Tensor | None = None
) -> Tensor:
    """norm(x) W^T + bias + residual [.. c_out], x [.. c_in]; what is not given is left out.

    pack: pack_linear's. 16-bit tensors are computed in fp32: x rounds once after the norm, the
    result once.

    Raises:
        ValueError: shapes that do not fit the weight.
    """
    c_out, c_in = pack.weight.shape
    _check(x, c_in, norm)
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], c_out):
        raise ValueError(f"residual must be {[*x.shape[:-1], c_out]}, got {list(residual.shape)}")
    if not _native(x, pack):
        return reference.linear(x, pack.weight, pack.bias, norm, residual)
    parts = (None, None, 0.0) if norm is None else norm
    args = (x, pack.packed, c_out, pack.bias, *parts, False, residual)
    return torch.ops.snoopi.linear.default(*args)


def geglu(
    x: Tensor, pack: GEGLUPack, bias: Tensor | None = None, *, norm: LayerNorm | None = None
) -> Tensor:
    """value * gelu(gate) [.. c], value and gate the halves of norm(x) W^T + bias, x [.. c_in].

    16-bit tensors are computed in fp32: x rounds once after the norm, the result once.

    Raises:
        ValueError: x, bias or norm that do not fit the weight.
    """
    c_out, c_in = pack.weight.shape
    _check(x, c_in, norm)
    if bias is not None and tuple(bias.shape) != (c_out,):
        raise ValueError(f"bias must be [{c_out}], got {list(bias.shape)}")
    if not _native(x, pack):
        return reference.geglu(x, pack.weight, bias, norm)
    parts = (None, None, 0.0) if norm is None else norm
    return torch.ops.snoopi.linear.default(x, pack.packed, c_out, bias, *parts, True, None)


def _native(x: Tensor, pack: LinearPack | GEGLUPack) -> bool:
    """Whether the native op takes x: its kernel reads channels by 32."""
    usable = pack.packed is not None and native.why_not(x) is None
    return usable and x.dtype == pack.weight.dtype and x.shape[-1] % 32 == 0


def _check(x: Tensor, c_in: int, norm: LayerNorm | None) -> None:
    if x.shape[-1] != c_in:
        raise ValueError(f"x must be [.. {c_in}], got {list(x.shape)}")
    for name, part in () if norm is None else (("gain", norm.gain), ("offset", norm.offset)):
        if tuple(part.shape) != (c_in,):
            raise ValueError(f"norm.{name} must be [{c_in}], got {list(part.shape)}")
