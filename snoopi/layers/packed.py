"""Layers whose weights are also laid out for the native ops; snoopi.optimize makes them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.ops import ConvPack, GEGLUPack, reference


class Packed:
    """What packed layers have in common: each is the plain layer that it was, and a pack besides.

    The pack does not serve where a gradient is wanted, in a compiled graph, under autocast, and
    once the weight was replaced or changed in place: then the layer is its plain self.
    """

    plain: ClassVar[type[nn.Module]]
    _pack: Any
    _version: int

    @classmethod
    def _adopt(cls, module: Any, pack: ConvPack | GEGLUPack) -> bool:
        """Turn a plain layer into this class, if its pack has a native layout."""
        if pack.packed is None:
            return False
        module.__class__ = cls
        module._pack, module._version = pack, version(module.weight)
        return True

    def unpack(self) -> None:
        """Become the plain layer again."""
        del self._pack, self._version
        self.__class__ = self.plain  # type: ignore[assignment]

    def _serves(self, x: Tensor, norm: nn.Module | None, kind: type[nn.Module]) -> bool:
        """Whether the pack stands for the layer with x, after a norm of the kind if given."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        assert isinstance(self, nn.Module)
        weight: Tensor = self.weight  # type: ignore[assignment]
        return (
            self._pack.weight.data_ptr() == weight.data_ptr()
            and self._version == version(weight)
            and x.dtype == weight.dtype
            and x.device == weight.device
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not _watched(self)
            and (norm is None or (type(norm) is kind and not _watched(norm)))
        )


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution that runs the native op on packed filters."""

    plain = nn.Conv2d
    _pack: ConvPack

    @classmethod
    def pack(cls, module: nn.Conv2d, *, doubled: bool = False) -> bool:
        """Pack a plain 3x3 convolution that keeps the size; False for others, which stay.

        doubled: packed for the doubled picture before it (see Upsample), and only for that.
        """
        packable = (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
            and not _hooked(module)
        )
        return packable and cls._adopt(
            module, ops.pack_conv(module.weight.detach(), doubled=doubled)
        )

    def takes(self, x: Tensor, norm: nn.Module | None = None) -> bool:
        """Whether the packed filters serve for x [b c h w], after a GroupNorm and SiLU if given."""
        return self._serves(x, norm, nn.GroupNorm)

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c_out h w]."""
        if self._pack.doubled or not self.takes(x):
            return super().forward(x)
        return ops.conv(x, self._pack, self._added(None))

    def fused(
        self,
        x: Tensor,
        norm: nn.GroupNorm,
        *,
        time: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """conv(silu(norm(x))) + time [b c_out] + residual; for x that `takes` it with norm."""
        folded = ops.group_norm_fold(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        added = self._added(time)
        return ops.conv(x, self._pack, added, norm=folded, silu=True, residual=residual)

    def of_doubled(self, x: Tensor) -> Tensor:
        """conv of x doubled by nearest neighbour: [b c h w] -> [b c_out 2h 2w]."""
        if self._pack.doubled and self.takes(x):
            return ops.conv(x, self._pack, self._added(None))
        return self(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def _added(self, time: Tensor | None) -> Tensor | None:
        """Bias and time embedding [b|1 c_out], their sum in what the op sums in."""
        if self.bias is None or time is None:
            return time if self.bias is None else self.bias[None]
        wide = reference.computing_dtype(time)
        return self.bias.to(wide) + time.to(wide)


class PackedGEGLU(Packed, nn.Linear):
    """The Linear to a GEGLU's values and gates, packed for what follows it, too."""

    plain = nn.Linear
    _pack: GEGLUPack

    @classmethod
    def pack(cls, module: nn.Linear) -> bool:
        """Pack a plain Linear, if that pays on this processor; False for others, which stay."""
        packable = type(module) is nn.Linear and not _hooked(module)
        return packable and cls._adopt(module, ops.pack_geglu(module.weight.detach()))

    def takes(self, x: Tensor, norm: nn.LayerNorm) -> bool:
        """Whether `gated` serves for x [.. c_in] after a LayerNorm."""
        return norm.bias is not None and self._serves(x, norm, nn.LayerNorm)

    def gated(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """value * gelu(gate) of this Linear's output for norm(x); for x that `takes` it."""
        layer_norm = ops.LayerNorm(norm.weight, norm.bias, norm.eps)
        return ops.geglu(x, self._pack, self.bias, norm=layer_norm)


def version(x: Tensor) -> int:
    """Counts changes in place, but not those of inference tensors and through `.data`."""
    return 0 if x.is_inference() else x._version


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return "forward" in vars(module) or any(hooks)


def _watched(module: nn.Module) -> bool:
    """Whether a hook, or somebody's gradient, would miss that a module was bypassed."""
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    return wanted or _hooked(module)
