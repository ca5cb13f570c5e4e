"""One call of each guidance of attention: inputs, the fused op, PyTorch's ops, the exact result.

b batch, m query tokens, n tokens of each text, h heads, d head dim, c = h*d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from snoopi import ops
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.noise import Noise
from snoopi.ops import LinearPack, TextPack, eager
from snoopi.ops.nasa import Choice
from snoopi.ops.native import CUDA, NATIVE

NASA_SCALE = 0.5


@dataclass(frozen=True)
class Shape:
    """One call: q [b m h d], texts of n tokens, a projection of c to c channels."""

    m: int
    n: int
    h: int
    d: int
    b: int = 1

    @property
    def c(self) -> int:
        """Channels."""
        return self.h * self.d

    def flops(self, texts: int = 2) -> int:
        """Of Q K^T and P V with every text and of the projection.

        Neither the softmax nor the combination of the texts is counted.
        """
        return self.b * (texts * 4 * self.m * self.n * self.c + 2 * self.m * self.c**2)

    def bytes(self, dtype: str, texts: int = 2) -> int:
        """Of q, K and V of every text, weight, bias and the result, each moved once."""
        rows = 2 * self.m + texts * 2 * self.n
        elements = self.b * rows * self.c + self.c**2 + self.c
        return elements * common.DTYPES[dtype].itemsize

    def __str__(self) -> str:
        return " ".join(f"{key}{value}" for key, value in self.sizes().items())

    def sizes(self) -> dict[str, int]:
        """The sizes by name, batch first."""
        return {key: getattr(self, key) for key in ("b", "m", "n", "h", "d")}


class Inputs(NamedTuple):
    """Arguments of the op, the first seven in the order of `ops.nasa_attention`."""

    q: Tensor
    k_pos: Tensor
    v_pos: Tensor
    k_neg: Tensor
    v_neg: Tensor
    w_out: Tensor
    b_out: Tensor
    k_null: Tensor | None = None
    v_null: Tensor | None = None

    @property
    def null(self) -> TextPack | None:
        """The null text, for the guidance that reads one."""
        if self.k_null is None or self.v_null is None:
            return None
        return TextPack(self.k_null, self.v_null)


def make_inputs(shape: Shape, dtype: str, guidance: str = "nasa", device: str = "cpu") -> Inputs:
    """Inputs of a shape: N(0, 1), the weight scaled to keep that; every dtype rounds the same."""
    b, m, n, h, d, c = shape.b, shape.m, shape.n, shape.h, shape.d, shape.c
    noise = Noise(0)

    def draw(name: str, *sizes: int) -> Tensor:
        return noise.sample(name, 0, 0, sizes)

    made = [draw("q", b, m, h, d)]
    made += [draw(name, b, n, h, d) for name in ("k_pos", "v_pos", "k_neg", "v_neg")]
    made += [draw("w_out", c, c) * c**-0.5, draw("b_out", c)]
    if METHODS[guidance].guidance.needs_null:
        made += [draw(name, b, n, h, d) for name in ("k_null", "v_null")]
    return Inputs(*(x.to(device, common.DTYPES[dtype]) for x in made))


# --- ordinary PyTorch ops -------------------------------------------------------------------------


def nasa_chain(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    k_null: Tensor | None = None,
    v_null: Tensor | None = None,
) -> Tensor:
    """NASA: scaled_dot_product_attention of each text, subtract, linear."""
    pos, neg = TextPack(k_pos, v_pos), TextPack(k_neg, v_neg)
    null = None if k_null is None or v_null is None else TextPack(k_null, v_null)
    return eager.nasa_attention(q, pos, neg, null, w_out, b_out, NASA_SCALE, None)


def nag_chain(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    w_out: Tensor,
    b_out: Tensor,
) -> Tensor:
    """NAG: scaled_dot_product_attention of each text, extrapolate, clip, blend, linear."""
    pos = eager.sdpa(q, TextPack(k_pos, v_pos), None)  # [b m h d]
    neg = eager.sdpa(q, TextPack(k_neg, v_neg), None)
    z = METHODS["nag"].guidance.combine(pos, None, neg, None)
    return eager.project(z, w_out, b_out)


def vsf_chain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w_out: Tensor, b_out: Tensor
) -> Tensor:
    """VSF: one scaled_dot_product_attention over both texts, linear; see `vsf_texts`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b h . d]
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return eager.project(z.transpose(1, 2), w_out, b_out)


def vsf_texts(x: Inputs) -> tuple[Tensor, ...]:
    """Arguments of `vsf_chain`: [K+; K-], [V+; -scale V-] [b 2n h d], what is added to logits.

    Made once per prompt, so it is no part of what is timed.
    """
    guidance = METHODS["vsf"].guidance
    assert isinstance(guidance, VSF)
    k = torch.cat([x.k_pos, x.k_neg], 1)
    v = torch.cat([x.v_pos, -guidance.scale * x.v_neg], 1)
    n = x.k_pos.shape[1]
    bias = torch.zeros(1, 1, 1, k.shape[1], dtype=k.dtype, device=k.device)
    bias[..., n:] = -guidance.bias
    return x.q, k, v, bias, x.w_out, x.b_out


class Method(NamedTuple):
    """A guidance at the strength that is timed, and its chain of ordinary PyTorch ops."""

    guidance: Guidance
    chain: Callable[..., Tensor]
    arguments: Callable[[Inputs], tuple[Tensor | None, ...]]

    @property
    def texts(self) -> int:
        """Texts that a call attends to."""
        return 3 if self.guidance.needs_null else 2


METHODS = {
    "nasa": Method(NASA(NASA_SCALE), nasa_chain, lambda x: x[:7]),
    "nasa-centred": Method(NASA(NASA_SCALE, centred=True), nasa_chain, lambda x: x),
    "nag": Method(NAG(), nag_chain, lambda x: x[:7]),
    "vsf": Method(VSF(), vsf_chain, vsf_texts),
}


# --- the competitors ------------------------------------------------------------------------------


def competitors(x: Inputs, guidance: str = "nasa") -> dict[str, Callable[[], Tensor]]:
    """The op warm (packed beforehand) and cold (packs in the call), and the eager chain."""
    method = METHODS[guidance].guidance
    plain_pos, plain_neg = TextPack(x.k_pos, x.v_pos), TextPack(x.k_neg, x.v_neg)
    pos, neg = (ops.pack_text(text.k, text.v) for text in (plain_pos, plain_neg))
    null = None if x.null is None else ops.pack_text(x.null.k, x.null.v)
    out, plain_out = ops.pack_linear(x.w_out, x.b_out), LinearPack(x.w_out, x.b_out)

    def warm() -> Tensor:
        if isinstance(method, NASA):
            scale = method.scale
            return ops.nasa_attention_packed(x.q, pos, neg, out, null=null, nasa_scale=scale)
        return ops.guided_attention(x.q, pos, neg, out, method)

    def cold() -> Tensor:
        if isinstance(method, NASA):
            return ops.nasa_attention(
                *x[:7], k_null=x.k_null, v_null=x.v_null, nasa_scale=method.scale
            )
        return ops.guided_attention(x.q, plain_pos, plain_neg, plain_out, method)

    return {"warm": warm, "cold": cold, "eager": chain(x, guidance)}


def chain(
    x: Inputs, guidance: str, compile: Callable[..., Callable[..., Tensor]] | None = None
) -> Callable[[], Tensor]:
    """The eager chain as a call without arguments; with `compile`, what that makes of it."""
    method = METHODS[guidance]
    arguments = method.arguments(x)
    run = method.chain if compile is None else compile(method.chain)
    return lambda: run(*arguments)


def explain(x: Inputs, guidance: str = "nasa") -> Choice:
    """The path that cold takes, and why."""
    method = METHODS[guidance].guidance
    if isinstance(method, NASA):
        return ops.explain(*x[:7], k_null=x.k_null, v_null=x.v_null, nasa_scale=method.scale)
    # guided_attention has no explain; without the native op it is the twin form and `combine`.
    native = CUDA if x.q.is_cuda else NATIVE
    return Choice("fused" if native.loaded else "reference", native.why)


def exact(x: Inputs, guidance: str = "nasa") -> Tensor:
    """The result by the guidance's formula in fp64, from the inputs as they are rounded."""
    wide = Inputs(*(None if tensor is None else tensor.double() for tensor in x))  # type: ignore[arg-type]
    twins = ops.twin_attention(*wide[:5], backend="reference")
    null = None if wide.null is None else ops.attention(wide.q, wide.null.k, wide.null.v)
    z = METHODS[guidance].guidance.combine(*twins, null)  # [b m h d]
    return F.linear(z.flatten(2), wide.w_out, wide.b_out)
