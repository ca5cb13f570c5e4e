"""LoRA by hand: low-rank adapters beside frozen weights, and the row gate of the teacher pair.

y = W x + (gamma / rank) B A x (Hu et al., 2021; SNOOPI Tab. 6: gamma 128, rank 64). The base keeps
its parameter names (`to_q.weight`, beside it `to_q.lora_a` and `to_q.lora_b`), B starts at zero, so
injecting changes nothing. Within `rows(net, r)` adapters act on batch rows >= r only: one network
is the frozen teacher on its first r rows and the LoRA teacher on the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi.noise import Noise

SUFFIXES = ("lora_a", "lora_b")


class _Adapter(nn.Module):
    """What LoRALinear and LoRAConv2d share: the two factors, the multiplier and the row gate."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    multiplier: float
    first_row: int

    def _delta(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adapt(self, base: Tensor, x: Tensor) -> Tensor:
        """base + multiplier B A x on rows >= first_row; the rows before are base untouched."""
        if self.first_row == 0:
            return torch.add(base, self._delta(x), alpha=self.multiplier)
        if self.first_row > x.shape[0]:
            # A text or timestep of one row, broadcast later, is on both sides of the gate.
            raise ValueError(f"lora.rows from row {self.first_row}, but an input has {len(x)} rows")
        if self.first_row < x.shape[0]:
            # In place: no gradient runs here (see `rows`), and base is this layer's own.
            base[self.first_row :].add_(self._delta(x[self.first_row :]), alpha=self.multiplier)
        return base

    def delta_weight(self) -> Tensor:
        """multiplier B A in the shape of the base weight, fp32."""
        b, a = self.lora_b.float().flatten(1), self.lora_a.float().flatten(1)
        return self.multiplier * (b @ a).view(self._base().shape)

    def _base(self) -> nn.Parameter:
        return self.get_parameter("weight")


class LoRALinear(_Adapter, nn.Linear):
    """A Linear with an adapter: lora_a [r in], lora_b [out r]."""

    def _delta(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_a), self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """x [b ... in] -> [b ... out]."""
        return self._adapt(F.linear(x, self.weight, self.bias), x)


class LoRAConv2d(_Adapter, nn.Conv2d):
    """A Conv2d with an adapter: lora_a [r in kh kw], lora_b [out r 1 1]."""

    def _delta(self, x: Tensor) -> Tensor:
        down = F.conv2d(x, self.lora_a, None, self.stride, self.padding, self.dilation)
        return F.conv2d(down, self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """x [b in h w] -> [b out h' w']."""
        return self._adapt(self._conv_forward(x, self.weight, self.bias), x)


def inject(
    net: nn.Module, targets: Sequence[str], rank: int, gamma: float, noise: Noise | None = None
) -> list[str]:
    """Give each Linear and Conv2d whose name matches a pattern an adapter; returns their names.

    targets: module names, or glob patterns over the dotted name ("*.to_q", "*.attn2.to_*", "*").
    The multiplier is gamma / rank. The base weights stop requiring gradients; `lora_a` is
    initialised from `noise` (stream "init", keyed by the module's name), kaiming-uniform as in the
    LoRA code; `lora_b` is zero. ValueError: a pattern that matches nothing, a grouped convolution.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}")
    layers = {name: m for name, m in net.named_modules() if _bare(m)}
    chosen = {name for name in layers if any(_matches(name, t) for t in targets)}
    for target in targets:
        if not any(_matches(name, target) for name in layers):
            raise ValueError(f"LoRA target {target!r} matches no Linear or Conv2d of the network")
    net.requires_grad_(False)
    names = [name for name in layers if name in chosen]
    for name in names:
        _adopt(layers[name], name, rank, gamma / rank, noise or Noise(0))
    return names


def _bare(module: nn.Module) -> bool:
    """A Linear or Conv2d as it is, or packed for inference (snoopi.optimize)."""
    kinds = (nn.Linear, nn.Conv2d)
    return type(module) in kinds or (isinstance(module, kinds) and hasattr(module, "unpack"))


def _matches(name: str, target: str) -> bool:
    """A glob over the whole dotted name, or the last parts of it ("to_q", "attn2.to_q")."""
    return fnmatch(name, target) or fnmatch(name, f"*.{target}")


def _adopt(layer: nn.Module, name: str, rank: int, multiplier: float, noise: Noise) -> None:
    """Give a layer a random first factor and a second one of zeros."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    shape_b = (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))
    a = initial(f"{name}.lora_a", (rank, *weight.shape[1:]), noise).to(weight.device)
    attach(layer, name, a, torch.zeros(shape_b, device=weight.device), multiplier)


def initial(name: str, shape: Sequence[int], noise: Noise) -> Tensor:
    """What `inject` gives the adapter tensor of a dotted name ("x.to_q.lora_a"), fp32 on the CPU.

    A network that was injected on the meta device is filled by it afterwards.
    """
    layer, factor = name.rsplit(".", 1)
    if factor == "lora_b":
        return torch.zeros(tuple(shape))
    bound = 1 / math.sqrt(math.prod(shape[1:]))  # kaiming_uniform_ with a = sqrt(5)
    return noise.uniform(f"init {layer}", 0, [0], -bound, bound, shape)[0]


def attach(layer: nn.Module, name: str, a: Tensor, b: Tensor, multiplier: float) -> None:
    """Turn a Linear or Conv2d into its LoRA class in place, so that names, hooks and parents stay.

    a [r in ...], b [out r ...]: the factors, in the shape of LoRALinear's or LoRAConv2d's. name:
    for the errors alone. ValueError: a grouped convolution, or a layer that has an adapter already.
    """
    if _bare(layer) and hasattr(layer, "unpack"):
        layer.unpack()  # type: ignore[operator]  # an adapter's sum is not in the pack
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise ValueError(f"LoRA on {name}: {type(layer).__name__} is no bare Linear or Conv2d")
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise ValueError(f"LoRA on {name}: only plain zero-padded convolutions are supported")
    layer.__class__ = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
    layer.lora_a, layer.lora_b = nn.Parameter(a), nn.Parameter(b)
    vars(layer).update(multiplier=multiplier, first_row=0)


def adapters(net: nn.Module) -> dict[str, _Adapter]:
    """The layers that carry an adapter, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, _Adapter)}


def parameters(net: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters."""
    return [p for name, p in net.named_parameters() if name.endswith(SUFFIXES)]


def state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, by their names in the network."""
    return {k: v for k, v in net.state_dict().items() if k.endswith(SUFFIXES)}


@contextmanager
def rows(net: nn.Module, first_row: int) -> Iterator[None]:
    """Adapters act on batch rows >= first_row only; first_row = batch size switches them off.

    Only under no_grad: a gate held by a context manager is gone when activation checkpointing runs
    the forward again, and the gradients would be silently wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("lora.rows is for no_grad only: a training forward runs all rows")
    layers: list[_Adapter] = list(adapters(net).values())
    for layer in layers:
        layer.first_row = first_row
    try:
        yield
    finally:
        for layer in layers:
            layer.first_row = 0


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Add every adapter to its base weight and remove it: W + (gamma / rank) B A."""
    _remove(net, lambda layer: layer._base().add_(layer.delta_weight().to(layer._base().dtype)))


@torch.no_grad()
def merged(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`merge` of a state dict of `net` (whole, or an average of it), without touching either.

    The names are those of the network without adapters; base weights are summed in fp32.
    """
    out = {name: value for name, value in state.items() if not name.endswith(SUFFIXES)}
    if len(out) == len(state):
        return out
    for name, layer in adapters(net).items():
        base = state[f"{name}.weight"]
        a, b = (state[f"{name}.{suffix}"].float().flatten(1) for suffix in SUFFIXES)
        delta = layer.multiplier * (b @ a).view(base.shape)
        out[f"{name}.weight"] = (base.float() + delta).to(base.dtype)
    return out


@torch.no_grad()
def remove(net: nn.Module) -> None:
    """Drop every adapter; the base weights stay as they are."""
    _remove(net, lambda layer: None)


def _remove(net: nn.Module, before: Callable[[_Adapter], object]) -> None:
    for layer in adapters(net).values():
        before(layer)
        del layer.lora_a, layer.lora_b, layer.multiplier, layer.first_row
        layer.__class__ = nn.Conv2d if isinstance(layer, LoRAConv2d) else nn.Linear  # type: ignore[assignment]
