"""The ordinary PyTorch chain: scaled_dot_product_attention per text, subtract, linear.

The path of every call without a negative, the baseline the fused op is judged against, and what
backend="auto" takes where no fused path exists or where the chain is the faster one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from snoopi.ops.packs import TextPack


def attend(
    q: Tensor,
    text: TextPack,
    w_out: Tensor | None,
    b_out: Tensor | None,
    softmax_scale: float | None,
) -> Tensor:
    """Attention of q [b m h d] to one text, then the projection: [b m c_out] or [b m h d]."""
    return project(sdpa(q, text, softmax_scale), w_out, b_out)


def nasa_attention(
    q: Tensor,
    pos: TextPack,
    neg: TextPack,
    null: TextPack | None,
    w_out: Tensor | None,
    b_out: Tensor | None,
    nasa_scale: float | Tensor,
    softmax_scale: float | None,
) -> Tensor:
    """NASA (SNOOPI Eq. 10) as a chain of ordinary ops; nasa_scale a float or [b m]."""
    z = sdpa(q, pos, softmax_scale)  # [b m h d]
    away = sdpa(q, neg, softmax_scale)
    if null is not None:
        away = away - sdpa(q, null, softmax_scale)
    if isinstance(nasa_scale, Tensor):
        strength = nasa_scale[:, :, None, None]  # [b m 1 1]
        return project((z - strength * away).to(q.dtype), w_out, b_out)
    return project(torch.sub(z, away, alpha=nasa_scale), w_out, b_out)


def sdpa(q: Tensor, text: TextPack, softmax_scale: float | None) -> Tensor:
    """scaled_dot_product_attention on [b m h d]; a text without a live key gives 0, never NaN."""
    k, v, mask, dtype = text.k, text.v, text.mask, q.dtype
    if k.shape[0] != q.shape[0]:
        k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
    if mask is not None and q.device.type != "cpu":
        # The CPU's kernels return 0 for a fully masked row (a test holds them to it); elsewhere it
        # depends on the kernel that is chosen, so such a text is unmasked and its values cleared.
        alive = mask.any(-1, keepdim=True)  # [b|1 1]
        mask, v = mask | ~alive, torch.where(alive[:, :, None, None], v, 0)
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and needs_grad(q, k, v):
        # The 16-bit backward of SDPA is 10 times slower than fp32's on the CPU.
        q, k, v = q.float(), k.float(), v.float()
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None, None, :],
        scale=softmax_scale,
    )  # [b h m d]
    return z.transpose(1, 2).to(dtype)  # [b m h d]


def project(z: Tensor, w_out: Tensor | None, b_out: Tensor | None) -> Tensor:
    """The output projection: [b m h d] -> [b m c_out]; z itself without w_out."""
    return z if w_out is None else F.linear(z.flatten(2), w_out, b_out)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
