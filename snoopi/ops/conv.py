"""Convolutions with what stands around them in one pass: norm, SiLU, doubling, sums.

Native on the CPU (csrc/cpu/convolve.h); elsewhere the reference in plain PyTorch, same result to
rounding. For inference: nothing here carries a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snoopi.ops import native, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class ConvPack(NamedTuple):
    """The filters of a convolution of stride 1, padded to keep the size, and their native layout.

    weight [c_out c_in 3 3]. doubled: the input is doubled by nearest neighbour first.
    kind, packed: how it is computed, and bytes [size] for that; packed is None where there is no
    native kernel for it, or PyTorch's is faster. A snapshot: it does not follow later changes of
    the weight.
    """

    weight: Tensor
    doubled: bool = False
    kind: str = ""
    packed: Tensor | None = None


class Affine(NamedTuple):
    """scale x + shift by channel, both [b c] in fp32 (fp64): a GroupNorm of known moments."""

    scale: Tensor
    shift: Tensor


def pack_conv(weight: Tensor, *, doubled: bool = False) -> ConvPack:
    """Pack a convolution's filters for `conv`; do it once per set of weights.

    weight [c_out c_in 3 3]. Winograd's transform where it is faster (F(2x2, 3x3) of Lavin &
    Gray, 2016): 16/9 the bytes of the plain weight.

    Raises:
        ValueError: another shape.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight must be [c_out c_in 3 3], got {list(weight.shape)}")
    if native.why_not(weight) is not None or weight.dtype not in _DTYPES:
        return ConvPack(weight, doubled)
    sizes = (weight.shape[0], weight.shape[1], weight.dtype)
    kind = torch.ops.snoopi.conv_kind(doubled, *sizes)
    if not torch.ops.snoopi.conv_bytes(kind, *sizes):
        return ConvPack(weight, doubled)
    return ConvPack(weight, doubled, kind, torch.ops.snoopi.pack_conv(weight, kind))


def conv(
    x: Tensor,
    pack: ConvPack,
    added: Tensor | None = None,
    *,
    norm: Affine | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """conv(silu(scale x + shift)) + added + residual; what is not given is left out.

    x [b c_in h w]; added [b|1 c_out]: bias, time embedding; residual like the result. The result
    [b c_out h w] (2h 2w of a doubled picture) is channels-last. 16-bit tensors are computed in
    fp32: activations round once, before the products, and sums once, at the end.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, pack, added, norm, residual)
    scale, shift = (None, None) if norm is None else norm
    if pack.packed is None or native.why_not(x) is not None or x.dtype != pack.weight.dtype:
        rest = (added, scale, shift, silu, residual)
        return reference.conv(x, pack.weight, pack.doubled, *rest)
    return torch.ops.snoopi.conv.default(
        x, pack.packed, pack.kind, pack.weight.shape[0], scale, shift, silu, added, residual
    )


def group_norm_fold(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """GroupNorm of x [b c h w] as scale x + shift, from the moments of its groups.

    weight, bias [c] as in nn.GroupNorm. Sums in fp64 of sums in fp32 around a channel's first
    value, so that a mean far from 0 loses nothing.

    Raises:
        ValueError: x whose channels are no multiple of the groups.
    """
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x must be [b c h w], c a multiple of {groups}, got {list(x.shape)}")
    if native.why_not(x) is None and x.dtype in _DTYPES and x.shape[1] % 32 == 0 and x.numel():
        args = (x, groups, weight, bias, eps)
        return Affine(*torch.ops.snoopi.group_norm_fold.default(*args))
    return Affine(*reference.group_norm_fold(x, groups, weight, bias, eps))


def _check(
    x: Tensor, pack: ConvPack, added: Tensor | None, norm: Affine | None, residual: Tensor | None
) -> None:
    c_out, c_in = pack.weight.shape[:2]
    if x.dim() != 4 or x.shape[1] != c_in:
        raise ValueError(f"x must be [b {c_in} h w], got {list(x.shape)}")
    b, times = x.shape[0], 2 if pack.doubled else 1
    result = (b, c_out, x.shape[2] * times, x.shape[3] * times)
    for name, tensor, shapes in (
        ("added", added, ((b, c_out), (1, c_out))),
        ("residual", residual, (result,)),
        ("norm.scale", norm and norm.scale, ((b, c_in),)),
        ("norm.shift", norm and norm.shift, ((b, c_in),)),
    ):
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must be {list(shapes[0])}, got {list(tensor.shape)}")
