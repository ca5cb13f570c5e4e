"""Registers the ops in torch.ops.snoopi: schemas, defaults, fakes, gradients.

Schemas exist in every build. The default implementation of an op is its reference, so a graph that
holds the op runs anywhere; the native library, when loaded, takes over the CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snoopi.ops import eager, reference
from snoopi.ops.packs import Formula, LinearPack, TextPack

ATTENTION = "snoopi::attention"
NASA = "snoopi::nasa_attention"
TWIN = "snoopi::twin_attention"
GUIDED = "snoopi::guided_attention"
PACK_TEXT = "snoopi::pack_text"
PACK_LINEAR = "snoopi::pack_linear"
CONV = "snoopi::conv"
PACK_CONV = "snoopi::pack_conv"
GROUP_NORM_FOLD = "snoopi::group_norm_fold"
LINEAR = "snoopi::linear"
PACK_GEGLU = "snoopi::pack_geglu"
_NUM_NASA_TENSORS = 13
_NUM_TWIN_TENSORS = 7

torch.library.define(
    ATTENTION,
    "(Tensor q, Tensor k, Tensor v, float softmax_scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    NASA,
    "(Tensor q, Tensor k_pos, Tensor v_pos, Tensor k_neg, Tensor v_neg, Tensor? w_out, "
    "Tensor? b_out, Tensor? k_null, Tensor? v_null, Tensor? mask_pos, Tensor? mask_neg, "
    "Tensor? mask_null, Tensor? strength, float nasa_scale, float softmax_scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    TWIN,
    "(Tensor q, Tensor k_pos, Tensor v_pos, Tensor k_neg, Tensor v_neg, Tensor? mask_pos, "
    "Tensor? mask_neg, float softmax_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is packed is laid out for the processor, so these have native kernels only. Their
# results carry no gradient: the faces in `nasa` take another path where one is wanted.
torch.library.define(
    GUIDED,
    "(Tensor q, Tensor pos, Tensor pos_live, int pos_n, Tensor neg, Tensor neg_live, int neg_n, "
    "Tensor? null, Tensor? null_live, int null_n, Tensor? w_out, Tensor? b_out, int c_out, "
    "Tensor? strength, float scale, str kind, float[] parameters, float softmax_scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    PACK_TEXT,
    "(Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(PACK_LINEAR, "(Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    CONV,
    "(Tensor x, Tensor weight, str kind, int c_out, Tensor? scale, Tensor? shift, bool silu, "
    "Tensor? added, Tensor? residual) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    PACK_CONV, "(Tensor weight, str kind) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    LINEAR,
    "(Tensor x, Tensor weight, int c_out, Tensor? bias, Tensor? gain, Tensor? offset, float eps, "
    "bool gated, Tensor? residual) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(PACK_GEGLU, "(Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    GROUP_NORM_FOLD,
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention_op(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Call snoopi::attention; its log-sum-exp serves the backward pass alone."""
    return torch.ops.snoopi.attention.default(q, k, v, softmax_scale)[0]


def nasa_op(
    q: Tensor,
    pos: TextPack,
    neg: TextPack,
    null: TextPack | None,
    w_out: Tensor | None,
    b_out: Tensor | None,
    nasa_scale: float | Tensor,
    softmax_scale: float,
) -> Tensor:
    """Call snoopi::nasa_attention; with a tensor strength the float beside it is unused."""
    k_null, v_null, mask_null = null[:3] if null is not None else (None, None, None)
    tensor = isinstance(nasa_scale, Tensor)
    args = (q, pos.k, pos.v, neg.k, neg.v, w_out, b_out, k_null, v_null)
    masks = (pos.mask, neg.mask, mask_null)
    strength = (nasa_scale, 0.0) if tensor else (None, nasa_scale)
    return torch.ops.snoopi.nasa_attention.default(*args, *masks, *strength, softmax_scale)


def guided_op(
    q: Tensor,
    pos: TextPack,
    neg: TextPack,
    null: TextPack | None,
    out: LinearPack | None,
    formula: Formula,
    softmax_scale: float,
) -> Tensor:
    """Call snoopi::guided_attention on packs that hold the native layout."""
    texts = [(None, None, 0) if t is None else t.native() for t in (pos, neg, null)]
    linear = (None, None, 0) if out is None else out.native()
    a = formula.strength
    strength = (a, 0.0) if isinstance(a, Tensor) else (None, a)
    return torch.ops.snoopi.guided_attention.default(
        q, *texts[0], *texts[1], *texts[2], *linear, *strength, *formula[1:], softmax_scale
    )


def twin_op(
    q: Tensor, pos: TextPack, neg: TextPack, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call snoopi::twin_attention."""
    return torch.ops.snoopi.twin_attention.default(
        q, pos.k, pos.v, neg.k, neg.v, pos.mask, neg.mask, softmax_scale
    )


@torch.library.impl(ATTENTION, "default")
def _attention_default(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    z, lse = reference.attend(q, TextPack(k, v), softmax_scale)
    return z.to(q.dtype).contiguous(), lse.contiguous()


@torch.library.register_fake(ATTENTION)
def _attention_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=reference.computing_dtype(q))


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs[:3], z, lse)
    ctx.softmax_scale = inputs[3]


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """PyTorch's backward pass of attention, in fp32 (fp64), from the log-sum-exp of the forward.

    In 16 bits it would be ten times slower on a CPU. As in every flash attention the result comes
    rounded to the inputs' dtype.
    """
    *saved, lse = ctx.saved_tensors
    wide = [x.to(lse.dtype).transpose(1, 2) for x in (grad, *saved)]  # [b h m d]
    if grad.device.type in ("cpu", "meta"):
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        found = op(*wide, lse.transpose(1, 2), 0.0, False, scale=ctx.softmax_scale)
    else:
        grad, q, k, v, _ = wide
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            q, k, v = leaves
            z = F.scaled_dot_product_attention(q, k, v, scale=ctx.softmax_scale)
        found = torch.autograd.grad(z, leaves, grad)
    dtypes = [x.dtype for x in saved]
    grads = (g.transpose(1, 2).to(dtype) for g, dtype in zip(found, dtypes, strict=False))
    return (*grads, None)


torch.library.register_autograd(ATTENTION, _attention_backward, setup_context=_attention_setup)


def _nasa_by(
    chain: Any, tensors: Sequence[Tensor | None], nasa_scale: float, scale: float
) -> Tensor:
    """Run a chain (of `reference` or `eager`) on the tensors in the schema's order."""
    q, k_pos, v_pos, k_neg, v_neg, w_out, b_out, k_null, v_null, *rest = tensors
    mask_pos, mask_neg, mask_null, strength = rest
    assert q is not None and k_pos is not None and v_pos is not None
    assert k_neg is not None and v_neg is not None
    null = None if k_null is None or v_null is None else TextPack(k_null, v_null, mask_null)
    pos, neg = TextPack(k_pos, v_pos, mask_pos), TextPack(k_neg, v_neg, mask_neg)
    a = nasa_scale if strength is None else strength
    return chain(q, pos, neg, null, w_out, b_out, a, scale)


@torch.library.impl(NASA, "default")
def _nasa_default(*args: Any) -> Tensor:
    tensors, scalars = args[:_NUM_NASA_TENSORS], args[_NUM_NASA_TENSORS:]
    return _nasa_by(reference.nasa_attention, tensors, *scalars).contiguous()


@torch.library.register_fake(NASA)
def _nasa_fake(*args: Any) -> Tensor:
    q, w_out = args[0], args[5]
    shape = q.shape if w_out is None else (*q.shape[:2], w_out.shape[0])
    return q.new_empty(shape)


@torch.library.register_fake(GUIDED)
def _guided_fake(q: Tensor, *args: Any) -> Tensor:
    w_out, c_out = args[9], args[11]
    return q.new_empty(q.shape if w_out is None else (*q.shape[:2], c_out))


@torch.library.register_fake(PACK_TEXT)
def _pack_text_fake(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch = k.shape[0] if mask is None or mask.shape[0] == 1 else mask.shape[0]
    size = torch.ops.snoopi.text_bytes(int(k.shape[1]), int(k.shape[3]), k.dtype)
    packed = k.new_empty((batch, k.shape[2], size), dtype=torch.uint8)
    return packed, k.new_empty((batch,), dtype=torch.int32)


@torch.library.register_fake(PACK_GEGLU)
@torch.library.register_fake(PACK_LINEAR)
def _pack_linear_fake(weight: Tensor) -> Tensor:
    size = torch.ops.snoopi.linear_bytes(*(int(n) for n in weight.shape), weight.dtype)
    return weight.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake(CONV)
def _conv_fake(x: Tensor, weight: Tensor, kind: str, c_out: int, *args: Any) -> Tensor:
    times = 2 if kind in ("doubled", "phased") else 1
    size = (x.shape[0], c_out, x.shape[2] * times, x.shape[3] * times)
    return x.new_empty(size).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake(PACK_CONV)
def _pack_conv_fake(weight: Tensor, kind: str) -> Tensor:
    c_out, c_in = (int(n) for n in weight.shape[:2])
    size = torch.ops.snoopi.conv_bytes(kind, c_out, c_in, weight.dtype)
    return weight.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake(LINEAR)
def _linear_fake(x: Tensor, weight: Tensor, c_out: int, *args: Any) -> Tensor:
    gated = args[4]
    return x.new_empty((*x.shape[:-1], c_out // 2 if gated else c_out))


@torch.library.register_fake(GROUP_NORM_FOLD)
def _group_norm_fold_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.computing_dtype(x)
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def _nasa_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_NUM_NASA_TENSORS])
    ctx.scalars = inputs[_NUM_NASA_TENSORS:]


def _nasa_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recomputes the forward pass as the ordinary chain in fp32 (fp64) and differentiates it."""
    wanted = ctx.needs_input_grad[:_NUM_NASA_TENSORS]
    with torch.enable_grad():
        inputs = _leaves(ctx.saved_tensors, wanted)
        wide = [_widen(t) for t in inputs]
        out = _nasa_by(eager.nasa_attention, wide, *ctx.scalars)
    return (*_gradients([out], [grad.to(out.dtype)], inputs, wanted), None, None)


torch.library.register_autograd(NASA, _nasa_backward, setup_context=_nasa_setup)


def _twin_by_reference(tensors: Sequence[Any], scale: float) -> tuple[Tensor, ...]:
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg = tensors
    pos, neg = TextPack(k_pos, v_pos, mask_pos), TextPack(k_neg, v_neg, mask_neg)
    return reference.twin_attention(q, pos, neg, scale)


@torch.library.impl(TWIN, "default")
def _twin_default(*args: Any) -> tuple[Tensor, ...]:
    outputs = _twin_by_reference(args[:_NUM_TWIN_TENSORS], args[_NUM_TWIN_TENSORS])
    return tuple(t.contiguous() for t in outputs)


@torch.library.register_fake(TWIN)
def _twin_fake(*args: Any) -> tuple[Tensor, ...]:
    q = args[0]
    dtype = reference.computing_dtype(q)
    lse_pos, lse_neg = (q.new_empty(q.shape[:3], dtype=dtype) for _ in range(2))
    return q.new_empty(q.shape), lse_pos, q.new_empty(q.shape), lse_neg


def _twin_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TWIN_TENSORS])
    ctx.softmax_scale = inputs[_NUM_TWIN_TENSORS]


def _twin_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:_NUM_TWIN_TENSORS]
    with torch.enable_grad():
        inputs = _leaves(ctx.saved_tensors, wanted)
        outputs = _twin_by_reference([_widen(t) for t in inputs], ctx.softmax_scale)
    grads = tuple(g.to(out.dtype) for g, out in zip(grads, outputs, strict=True))
    return (*_gradients(outputs, grads, inputs, wanted), None)


torch.library.register_autograd(TWIN, _twin_backward, setup_context=_twin_setup)


def _leaves(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The saved tensors, cut from their graph; those whose gradient is wanted require one."""
    return [
        None if t is None else t.detach().requires_grad_(want)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def _widen(tensor: Tensor | None) -> Tensor | None:
    """16-bit tensors in fp32; all others, masks included, as they are."""
    if tensor is None or tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor
    return tensor.float()


def _gradients(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the wanted inputs, in the inputs' dtypes and places; None elsewhere."""
    leaves = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(outputs, leaves, grads))
    return [next(found) if want else None for want in wanted]
