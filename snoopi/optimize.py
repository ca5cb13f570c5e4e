"""Lays a module's weights out for inference, from outside; the module itself stays as it is.

optimize(net) gives every 3x3 convolution its filters in the layout of the native op
(snoopi.ops.pack_conv), which takes the norm, SiLU, doubling and sums around it along, every GEGLU
its Linear (snoopi.ops.pack_geglu), every cross-attention its output projection
(snoopi.ops.pack_linear), and where that pays (layers.packed.pays) all other Linears and 1x1
convolutions, q, k and v of self-attention as one; other convolutions become channels-last.
restore(net) takes it back. The plain weights stay and serve every other path, so results agree to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snoopi.layers.attention import CrossAttention, SelfAttention
from snoopi.layers.blocks import Upsample
from snoopi.layers.packed import (
    Packed,
    PackedConv2d,
    PackedGEGLU,
    PackedLinear,
    PackedPointwise,
)
from snoopi.models.unet import FeedForward


def optimize(module: nn.Module, done: Callable[[Tensor], object] | None = None) -> nn.Module:
    """Pack what can be packed, in place; call it again after weights have changed.

    A pack is a snapshot. Where its Parameter was replaced or changed in place since, it is not
    used; changes through `.data`, and of tensors made under inference_mode, it cannot see. So it is
    for inference: refused while a Linear or Conv2d has a parameter that requires a gradient. What
    has an adapter or a hook is left alone.

    done: called with every weight once it is packed, which only other paths read from then on.
    Returns the module.

    Raises:
        ValueError: naming a parameter that requires a gradient, before anything is packed.
    """
    restore(module)
    modules = list(module.modules())
    doubled = {id(m.conv) for m in modules if isinstance(m, Upsample)}
    gated = {id(m.first) for m in modules if isinstance(m, FeedForward)}
    projections = {id(m.to_out[0]) for m in modules if isinstance(m, CrossAttention)}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers = [m for m in modules if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"optimize is for inference, but {names[id(parameter)]} requires a gradient: "
                    "call requires_grad_(False) on the module first"
                )
    together = set()
    for attention in modules:
        if isinstance(attention, SelfAttention) and attention.pack():
            together |= {id(m) for m in (attention.to_q, attention.to_k, attention.to_v)}
    for layer in layers:
        if id(layer) in together:
            packed = True
        elif isinstance(layer, nn.Conv2d):
            packed = PackedConv2d.pack(layer, doubled=id(layer) in doubled)
            packed = packed or PackedPointwise.pack(layer)
            if not packed:
                _relayout(layer, torch.channels_last)
        elif id(layer) in gated:
            packed = PackedGEGLU.pack(layer)
        else:
            packed = PackedLinear.pack(layer, always=id(layer) in projections)
        if packed and done is not None:
            done(layer.weight)
    return module


def restore(module: nn.Module) -> nn.Module:
    """Take away what `optimize` added. Returns the module."""
    for part in module.modules():
        if isinstance(part, (SelfAttention, Packed)):
            part.unpack()
        elif isinstance(part, nn.Conv2d):
            _relayout(part, torch.contiguous_format)
    return module


def _relayout(conv: nn.Conv2d, layout: torch.memory_format) -> None:
    """Change how a weight lies in memory; its values, and the Parameter, stay."""
    if conv.weight.dim() == 4 and not conv.weight.is_meta:
        conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
