"""Checks of the op's arguments, with messages in words. Nothing here computes."""

import numbers
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Text(Protocol):
    """What the checks read of a text; `packs.TextPack` is one."""

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...


def check_call(
    q: Tensor,
    texts: Mapping[str, Text],
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    same_dtype: bool = True,
) -> None:
    """Check q [b m h d], the texts by the suffix of their arguments' names, and the projection.

    same_dtype is False under autocast, where every tensor is cast to q's dtype anyway.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be [b m h d], got {_shape(q)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor, got {_dtype(q)}")
    if q.shape[3] < 1:
        raise ValueError(f"q must have a head dim d of at least 1, got {_shape(q)}")
    named: list[tuple[str, Tensor | None]] = []
    for suffix, text in texts.items():
        _check_text(q, suffix, text)
        named += [(f"k{suffix}", text.k), (f"v{suffix}", text.v), (f"mask{suffix}", text.mask)]
    if w_out is not None or b_out is not None:
        check_linear(w_out, b_out, c_in=q.shape[2] * q.shape[3], same_dtype=same_dtype)
        named += [("w_out", w_out), ("b_out", b_out)]
    for name, tensor in named:
        _check_like_q(q, name, tensor, same_dtype)


def check_text_alone(k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Check one text without a query: k, v [b n h d] of one shape and dtype, mask bool [b|1 n]."""
    if k.dim() != 4 or k.shape[1] < 1:
        raise ValueError(f"k must be [b n h d] with n of at least 1, got {_shape(k)}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v must be like k, {_shape(k)} {_dtype(k)}, got {_shape(v)} {_dtype(v)}")
    if mask is not None:
        _check_mask("mask", mask, k.shape[0], k.shape[1])


def check_linear(
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    c_in: int | None = None,
    names: tuple[str, str] = ("w_out", "b_out"),
    same_dtype: bool = True,
) -> None:
    """Check an output projection: weight [c_out c_in] and bias [c_out] as in nn.Linear."""
    w_name, b_name = names
    if weight is None:
        raise ValueError(f"{b_name} was given without {w_name}")
    if weight.dim() != 2 or (c_in is not None and weight.shape[1] != c_in):
        width = "c_in" if c_in is None else f"h*d={c_in}"
        raise ValueError(f"{w_name} must be [c_out {width}], got {_shape(weight)}")
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{b_name} must be [c_out] with c_out={weight.shape[0]}, got {_shape(bias)}"
        )
    if same_dtype and bias.dtype != weight.dtype:
        raise ValueError(f"{b_name} must be {_dtype(weight)} like {w_name}, got {_dtype(bias)}")


def check_strength(nasa_scale: object, q: Tensor) -> None:
    """Check a strength: a number, or a floating-point tensor [b m] (either may be 1) or 0-d."""
    if isinstance(nasa_scale, (float, int, torch.SymFloat, numbers.Real)):
        return
    b, m = q.shape[0], q.shape[1]
    if not isinstance(nasa_scale, Tensor):
        raise ValueError(f"nasa_scale must be a number or a tensor [b m], got {nasa_scale!r}")
    shape = nasa_scale.shape
    fits = len(shape) == 0 or (len(shape) == 2 and shape[0] in (b, 1) and shape[1] in (m, 1))
    if not fits or not nasa_scale.is_floating_point():
        raise ValueError(
            f"nasa_scale must be a number or a floating-point tensor [b m] with b={b}, m={m}, "
            f"got {_shape(nasa_scale)} {_dtype(nasa_scale)}"
        )
    if nasa_scale.device != q.device and nasa_scale.dim() > 0:
        raise ValueError(f"nasa_scale must be on {q.device} like q, got {nasa_scale.device}")


def check_backend(backend: str) -> None:
    """Check the backend's name."""
    if backend not in ("auto", "fused", "reference"):
        raise ValueError(f"backend must be auto, fused or reference, got {backend!r}")


def _check_text(q: Tensor, suffix: str, text: Text) -> None:
    b, _, h, d = q.shape
    k, v = text.k, text.v
    fits = k.dim() == 4 and k.shape[0] in (b, 1) and k.shape[1] >= 1 and k.shape[2:] == q.shape[2:]
    if not fits:
        raise ValueError(
            f"k{suffix} must be [b n h d] with b={b} or 1, n >= 1, h={h} d={d}, got {_shape(k)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v{suffix} must be {_shape(k)} like k{suffix}, got {_shape(v)}")
    if text.mask is not None:
        _check_mask(f"mask{suffix}", text.mask, b, k.shape[1])


def _check_mask(name: str, mask: Tensor, b: int, n: int) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, True = attend, got {_dtype(mask)}")
    if mask.dim() != 2 or mask.shape[0] not in (b, 1) or mask.shape[1] != n:
        raise ValueError(f"{name} must be [b n] with b={b} or 1, n={n}, got {_shape(mask)}")


def _check_like_q(q: Tensor, name: str, tensor: Tensor | None, same_dtype: bool) -> None:
    if tensor is None:
        return
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
    if same_dtype and tensor.dtype not in (q.dtype, torch.bool):
        raise ValueError(
            f"{name} must be {_dtype(q)} like q, got {_dtype(tensor)} (mixed dtypes are cast under "
            "torch.autocast only)"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
