"""Packs a module's weights for inference, from outside; the module itself stays as it is.

optimize(net) gives every cross-attention its output projection in the layout that the fused op
multiplies (snoopi.ops.pack_linear); restore(net) takes them away again. The plain weights stay and
serve every other path, so results agree to rounding.
"""

from __future__ import annotations

from torch import nn

from snoopi.layers.attention import CrossAttention


def optimize(module: nn.Module) -> nn.Module:
    """Pack what can be packed, in place; call it again after weights have changed.

    A pack is a snapshot. Where its Parameter was replaced or changed in place since, it is not
    used; changes through `.data`, and of tensors made under inference_mode, it cannot see. So it is
    for inference: refused while a parameter that would be packed requires a gradient. An output
    projection with an adapter or a hook is left alone.

    Returns the module.

    Raises:
        ValueError: naming a parameter that requires a gradient, before anything is packed.
    """
    layers = {n: m for n, m in module.named_modules() if isinstance(m, CrossAttention)}
    for name, layer in layers.items():
        for key, parameter in layer.to_out[0].named_parameters():
            if parameter.requires_grad:
                where = ".".join(filter(None, (name, "to_out.0", key)))
                raise ValueError(
                    f"optimize is for inference, but {where} requires a gradient: call "
                    "requires_grad_(False) on the module first"
                )
    for layer in layers.values():
        layer.pack_out()
    return module


def restore(module: nn.Module) -> nn.Module:
    """Take away what `optimize` added. Returns the module."""
    for layer in module.modules():
        if isinstance(layer, CrossAttention):
            layer.unpack_out()
    return module
