"""Layers whose weights are also laid out for the native ops; snoopi.optimize makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.ops import ConvPack, GEGLUPack, LayerNorm, LinearPack, reference
from snoopi.ops.native import NATIVE


class Packed:
    """What packed layers have in common: each is the plain layer that it was, and a pack besides.

    The pack does not serve where a gradient is wanted, in a compiled graph, under autocast, and
    once the weight was replaced or changed in place: then the layer is its plain self.
    """

    plain: ClassVar[type[nn.Module]]
    _pack: Any
    _mark: tuple[int, int]

    @classmethod
    def _adopt(cls, module: Any, pack: ConvPack | GEGLUPack | LinearPack) -> bool:
        """Turn a plain layer into this class, if its pack has a native layout."""
        if pack.packed is None:
            return False
        module.__class__ = cls
        module._pack, module._mark = pack, mark(module)
        return True

    def unpack(self) -> None:
        """Become the plain layer again."""
        del self._pack, self._mark
        self.__class__ = self.plain  # type: ignore[assignment]

    def _serves(self, x: Tensor, norm: nn.Module | None, kind: type[nn.Module]) -> bool:
        """Whether the pack stands for the layer with x, after a norm of the kind if given."""
        return _serve([self], [self._mark], x, norm, kind)


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
            and not hooked(module)
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


class PackedPointwise(Packed, nn.Conv2d):
    """A 1x1 convolution that runs the native op on its pixels as rows."""

    plain = nn.Conv2d
    _pack: LinearPack

    @classmethod
    def pack(cls, module: nn.Conv2d) -> bool:
        """Pack a plain 1x1 convolution, if that pays on this processor; False for others."""
        packable = (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
            and module.groups == 1
            and pays(module.weight)
            and not hooked(module)
        )
        return packable and cls._adopt(
            module, ops.pack_linear(module.weight.detach()[:, :, 0, 0], module.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c_out h w], channels-last."""
        if not self._serves(x, None, nn.GroupNorm):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1)  # [b h w c]
        return ops.linear(rows, self._pack._replace(bias=self.bias)).permute(0, 3, 1, 2)


class PackedLinear(Packed, nn.Linear):
    """A Linear that runs the native op where that pays; an attention's projection takes its pack.

    direct: whether it does so by itself.
    """

    plain = nn.Linear
    _pack: LinearPack
    direct: bool

    @classmethod
    def pack(cls, module: nn.Linear, *, always: bool = False) -> bool:
        """Pack a plain Linear, if that pays on this processor, or `always`; False: it stays."""
        packable = type(module) is nn.Linear and not hooked(module)
        direct = pays(module.weight)
        if not (packable and (direct or always)):
            return False
        if not cls._adopt(module, ops.pack_linear(module.weight.detach(), module.bias)):
            return False
        module.direct = direct  # type: ignore[assignment]
        return True

    def unpack(self) -> None:
        """Become the plain layer again."""
        del self.direct
        super().unpack()

    def for_attention(self) -> LinearPack:
        """Weight and bias as an attention's projection; the pack where the weight is as it was."""
        # A graph would hold the pack, but could not see that the weight has changed.
        if torch.compiler.is_compiling() or self._mark != mark(self):
            return LinearPack(self.weight, self.bias)
        return self._pack._replace(weight=self.weight, bias=self.bias)

    def takes(self, x: Tensor, norm: nn.LayerNorm | None = None) -> bool:
        """Whether `fused` serves for x [.. c_in], after a LayerNorm if given."""
        return self.direct and self._serves(x, norm, nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        """[.. c_in] -> [.. c_out]."""
        return self.fused(x) if self.takes(x) else super().forward(x)

    def fused(
        self, x: Tensor, norm: nn.LayerNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """norm(x) W^T + bias + residual; for x that it `takes`."""
        pack = self._pack._replace(bias=self.bias)
        return ops.linear(x, pack, norm=layer_norm(norm), residual=residual)


class PackedTogether:
    """Linears of one input, packed as one: queries, keys and values of self-attention."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weights: list[Tensor] = [layer.weight.detach() for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self._pack = ops.pack_linear(
            torch.cat(weights), torch.cat(biases).detach() if biases else None
        )
        # The op reads the packed layout; of the weight only shape and dtype are of use.
        self._pack = self._pack._replace(weight=self._pack.weight.to("meta"))
        self._marks = [mark(layer) for layer in layers]
        self._biases = [mark_of(layer.bias) for layer in layers]

    @staticmethod
    def pays(layers: Sequence[nn.Linear]) -> bool:
        """Whether to pack these layers on this processor."""
        alike = all(type(x) is nn.Linear and not hooked(x) for x in layers)
        return alike and pays(layers[0].weight) and len({x.bias is None for x in layers}) == 1

    def takes(self, layers: Sequence[nn.Linear], x: Tensor, norm: nn.LayerNorm | None) -> bool:
        """Whether `fused` serves for these layers, which must be the ones that were packed."""
        return (
            _serve(layers, self._marks, x, norm, nn.LayerNorm)
            and all(type(layer) is nn.Linear for layer in layers)
            and [mark_of(layer.bias) for layer in layers] == self._biases
        )

    def fused(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        """The layers' results for norm(x), next to each other in the last dim."""
        return ops.linear(x, self._pack, norm=layer_norm(norm))


def linear(
    layer: nn.Module,
    x: Tensor,
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """layer(norm(x)) + residual: in one pass where the layer is packed (snoopi.optimize)."""
    if isinstance(layer, PackedLinear) and layer.takes(x, norm):
        return layer.fused(x, norm, residual)
    y = layer(x if norm is None else norm(x))
    return y if residual is None else residual + y


class PackedGEGLU(Packed, nn.Linear):
    """The Linear to a GEGLU's values and gates, packed for what follows it, too."""

    plain = nn.Linear
    _pack: GEGLUPack

    @classmethod
    def pack(cls, module: nn.Linear) -> bool:
        """Pack a plain Linear, if that pays on this processor; False for others, which stay."""
        packable = type(module) is nn.Linear and not hooked(module)
        return packable and cls._adopt(module, ops.pack_geglu(module.weight.detach()))

    def takes(self, x: Tensor, norm: nn.LayerNorm) -> bool:
        """Whether `gated` serves for x [.. c_in] after a LayerNorm."""
        return self._serves(x, norm, nn.LayerNorm)

    def gated(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """value * gelu(gate) of this Linear's output for norm(x); for x that `takes` it."""
        return ops.geglu(x, self._pack, self.bias, norm=layer_norm(norm))


def added(part: Any, x: Tensor, norm: nn.LayerNorm, *args: Any) -> Tensor:
    """x + part(norm(x), *args), by the `added` of the part's own class where nobody would miss it.

    A hook is to see what the part is given. A subclass may have another forward, and what was put
    in the part's place has no `added`. In a compiled graph no pack serves.
    """
    if torch.compiler.is_compiling() or "added" not in vars(type(part)) or hooked(part):
        return x + part(norm(x), *args)
    return part.added(x, norm, *args)


def pays(weight: Tensor) -> bool:
    """Whether a plain linear layer is faster in the native op: bf16 on AMX, where it saves passes
    over rows that the second cache does not hold.
    """
    return NATIVE.tiles and weight.dtype == torch.bfloat16 and weight.shape[1] % 32 == 0


def layer_norm(norm: nn.LayerNorm | None) -> LayerNorm | None:
    """A LayerNorm as the ops take it."""
    return None if norm is None else LayerNorm(norm.weight, norm.bias, norm.eps)


def mark(layer: Any) -> tuple[int, int]:
    """What tells a layer's weight from another, and from itself after a change in place."""
    return mark_of(layer.weight)


def mark_of(x: Tensor | None) -> tuple[int, int]:
    """`mark` of a tensor. Not of changes to inference tensors and through `.data`."""
    return (0, 0) if x is None else (x.data_ptr(), 0 if x.is_inference() else x._version)


def _serve(
    layers: Sequence[Any],
    marks: Sequence[tuple[int, int]],
    x: Tensor,
    norm: nn.Module | None,
    kind: type[nn.Module],
) -> bool:
    """Whether packs made at the marks stand for the layers with x, after a norm of the kind."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if norm is not None and (type(norm) is not kind or norm.bias is None or _watched(norm)):
        return False
    return all(
        mark(layer) == at
        and (x.dtype, x.device) == (layer.weight.dtype, layer.weight.device)
        and not _watched(layer)
        for layer, at in zip(layers, marks, strict=True)
    )


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    forward = (module._forward_hooks, module._forward_pre_hooks)
    backward = (module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(forward) or any(backward)


def _watched(module: nn.Module) -> bool:
    """Whether a hook, or somebody's gradient, would miss that a module was bypassed."""
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    return wanted or hooked(module)
