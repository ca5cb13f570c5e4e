"""The ops' slow twins: plain torch, obviously right, any device, any floating dtype.

b batch, m query tokens, n text tokens, h heads, d head dim. 16-bit inputs are computed in fp32,
fp32 and fp64 in their own precision; results are rounded once, at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from snoopi.ops.packs import TextPack


def nasa_attention(
    q: Tensor,
    pos: TextPack,
    neg: TextPack,
    null: TextPack | None,
    w_out: Tensor | None,
    b_out: Tensor | None,
    nasa_scale: float | Tensor,
    softmax_scale: float,
) -> Tensor:
    """NASA cross-attention (SNOOPI Eq. 8-10): Z+ - a Z-, or Z+ - a (Z- - Z0) with a null text.

    nasa_scale is a float or [b m]. Returns [b m c_out], or [b m h d] without w_out.
    """
    z, _ = attend(q, pos, softmax_scale)  # [b m h d]
    away, _ = attend(q, neg, softmax_scale)
    if null is not None:
        away = away - attend(q, null, softmax_scale)[0]
    if isinstance(nasa_scale, Tensor):
        nasa_scale = nasa_scale.to(z.dtype)[:, :, None, None]  # [b m 1 1]
    z = z - nasa_scale * away
    if w_out is not None:
        z = z.flatten(2) @ w_out.to(z.dtype).mT  # [b m c_out]
        if b_out is not None:
            z = z + b_out.to(z.dtype)
    return z.to(q.dtype)


def twin_attention(
    q: Tensor, pos: TextPack, neg: TextPack, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention to two texts: (z_pos, lse_pos, z_neg, lse_neg), z [b m h d], lse [b m h]."""
    z_pos, lse_pos = attend(q, pos, softmax_scale)
    z_neg, lse_neg = attend(q, neg, softmax_scale)
    return z_pos.to(q.dtype), lse_pos, z_neg.to(q.dtype), lse_neg


def attend(q: Tensor, text: TextPack, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [b m h d] to one text: z [b m h d] and lse [b m h], computing dtype.

    lse is the natural log of the sum of exp(scale q.k). A row whose keys are all masked has z = 0
    and lse = -inf, and passes no gradient.
    """
    dtype = computing_dtype(q)
    q, k, v = q.to(dtype), text.k.to(dtype), text.v.to(dtype)
    logits = softmax_scale * torch.einsum("bmhd,bnhd->bmhn", q, k)
    if text.mask is None:
        lse = logits.logsumexp(-1)
        return torch.einsum("bmhn,bnhd->bmhd", logits.softmax(-1), v), lse
    # A text without a live key is attended to in full and then replaced: no NaN, here or backward.
    alive = text.mask.any(-1)[:, None, None]  # [b|1 1 1]
    mask = text.mask[:, None, None, :] | ~alive[..., None]  # [b|1 1 1 n]
    logits = logits.masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1).masked_fill(~alive, float("-inf"))
    z = torch.einsum("bmhn,bnhd->bmhd", logits.softmax(-1), v)
    return z.masked_fill(~alive[..., None], 0.0), lse


def conv(
    x: Tensor,
    weight: Tensor,
    doubled: bool,
    added: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    """conv(silu(scale x + shift)) + added + residual, of x doubled by nearest neighbour if asked.

    x [b c_in h w], weight [c_out c_in k k], scale, shift [b c_in], added [b|1 c_out].
    """
    dtype = computing_dtype(x)
    y = x.to(dtype)
    if scale is not None and shift is not None:
        y = y * scale.to(dtype)[:, :, None, None] + shift.to(dtype)[:, :, None, None]
    y = F.silu(y) if silu else y
    y = F.interpolate(y, scale_factor=2.0, mode="nearest") if doubled else y
    y = F.conv2d(y, weight.to(dtype), padding=weight.shape[-1] // 2)
    y = y if added is None else y + added.to(dtype)[:, :, None, None]
    y = y if residual is None else y + residual.to(dtype)
    return y.to(x.dtype)


def group_norm_fold(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift [b c] with scale x + shift = GroupNorm(x) of x [b c h w]."""
    rows = x.double().unflatten(1, (groups, -1)).flatten(2)  # [b g c/g*h*w]
    mean, variance = rows.mean(-1), rows.var(-1, unbiased=False)
    width = x.shape[1] // groups
    by = (variance + eps).rsqrt().repeat_interleave(width, 1)  # [b c]
    scale = by if weight is None else by * weight.double()
    shift = -scale * mean.repeat_interleave(width, 1)
    shift = shift if bias is None else shift + bias.double()
    return scale.to(computing_dtype(x)), shift.to(computing_dtype(x))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    residual: Tensor | None,
) -> Tensor:
    """norm(x) W^T + bias + residual; x [.. c_in]. norm: a LayerNorm's gain, offset and eps."""
    y = _wide_linear(x, weight, bias, norm)
    return (y if residual is None else y + residual.to(y.dtype)).to(x.dtype)


def geglu(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, Tensor, float] | None
) -> Tensor:
    """value * gelu(gate), value and gate the halves of norm(x) W^T + bias; x [.. c_in]."""
    value, gate = _wide_linear(x, weight, bias, norm).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def _wide_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, Tensor, float] | None
) -> Tensor:
    dtype = computing_dtype(x)
    y = x.to(dtype)
    if norm is not None:
        gain, offset, eps = norm
        y = F.layer_norm(y, (x.shape[-1],), gain.to(dtype), offset.to(dtype), eps)
    return F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))


def computing_dtype(q: Tensor) -> torch.dtype:
    """fp64 for fp64 tensors, fp32 for all others."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
