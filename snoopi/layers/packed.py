"""Layers whose weights are also laid out for the native ops; snoopi.optimize makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.ops import ConvPack, GEGLUPack


class PackedConv2d(nn.Conv2d):
    """An nn.Conv2d in every respect; where it may, it runs the native op on packed filters.

    It may not where a gradient is wanted, in a compiled graph, under autocast, and once the weight
    was replaced or changed in place: then it is its plain self.
    """

    _pack: ConvPack
    _packed_version: int

    @staticmethod
    def packable(module: nn.Module) -> bool:
        """Whether a module is a plain 3x3 convolution that keeps the size."""
        return (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
            and not _hooked(module)
        )

    @classmethod
    def pack(cls, module: nn.Conv2d, *, doubled: bool = False) -> bool:
        """Turn a `packable` module into a packed one, if there is a native kernel for it.

        doubled: packed for the doubled picture before it (see Upsample), and only for that.
        """
        pack = ops.pack_conv(module.weight.detach(), doubled=doubled)
        if pack.packed is None:
            return False
        module.__class__ = cls
        assert isinstance(module, PackedConv2d)
        module._pack, module._packed_version = pack, version(module.weight)
        return True

    def unpack(self) -> None:
        """Undo `pack`."""
        del self._pack, self._packed_version
        self.__class__ = nn.Conv2d  # type: ignore[assignment]

    def takes(self, x: Tensor, norm: nn.Module | None = None) -> bool:
        """Whether the packed filters serve for x [b c h w], after a GroupNorm and SiLU if given."""
        if not _serves(self, self._pack.weight, self._packed_version, x):
            return False
        return norm is None or (type(norm) is nn.GroupNorm and not _watched(norm))

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
        """Bias and time embedding [b|1 c_out]."""
        if self.bias is None:
            return time
        return self.bias[None] if time is None else self.bias.float() + time.float()


class PackedGEGLU(nn.Linear):
    """The Linear to a GEGLU's values and gates; itself in every respect, and packed besides."""

    _pack: GEGLUPack
    _packed_version: int

    @classmethod
    def pack(cls, module: nn.Linear) -> bool:
        """Turn a plain Linear into a packed one, if there is a native kernel for it."""
        if type(module) is not nn.Linear or _hooked(module):
            return False
        pack = ops.pack_geglu(module.weight.detach())
        if pack.packed is None:
            return False
        module.__class__ = cls
        assert isinstance(module, PackedGEGLU)
        module._pack, module._packed_version = pack, version(module.weight)
        return True

    def unpack(self) -> None:
        """Undo `pack`."""
        del self._pack, self._packed_version
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def takes(self, x: Tensor, norm: nn.Module) -> bool:
        """Whether `gated` serves for x [.. c_in] after a LayerNorm."""
        if not _serves(self, self._pack.weight, self._packed_version, x):
            return False
        return type(norm) is nn.LayerNorm and not _watched(norm) and norm.bias is not None

    def gated(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """value * gelu(gate) of this Linear's output for norm(x); for x that `takes` it."""
        how = {"gain": norm.weight, "offset": norm.bias, "eps": norm.eps}
        return ops.geglu(x, self._pack, self.bias, **how)  # type: ignore[arg-type]


PACKED = (PackedConv2d, PackedGEGLU)


def _serves(module: nn.Conv2d | nn.Linear, packed: Tensor, at: int, x: Tensor) -> bool:
    """Whether a pack of a weight at version `at` stands for the module with x."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    weight = module.weight
    return (
        packed.data_ptr() == weight.data_ptr()
        and at == version(weight)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not _watched(module)
    )


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
