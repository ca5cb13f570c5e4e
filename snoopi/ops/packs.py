"""Containers for the op's inputs: one text's keys and values, and an output projection.

Both are NamedTuples of ordinary tensors, so they can be stored, moved and returned freely. Where
the native op runs they also hold the layout that its kernel reads, which is made for the processor
at hand: panels of keys, values and weights, masked keys left out. Make them with `pack_text` and
`pack_linear`, and look inside neither.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from snoopi.ops import checks, native


class TextPack(NamedTuple):
    """One text as `nasa_attention_packed` takes it: k, v [b|1 n h d], mask bool [b|1 n] or None.

    packed: bytes [b|1 h size] of the native layout, with `live` int32 [b|1], the number of keys in
    it; both None where there is no native kernel.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    packed: Tensor | None = None
    live: Tensor | None = None

    def native(self) -> tuple[Tensor | None, Tensor | None, int]:
        """The arguments of snoopi::guided_attention for this text."""
        return self.packed, self.live, self.k.shape[1]


class LinearPack(NamedTuple):
    """A linear layer as `linear` and `nasa_attention_packed` take it: weight [c_out c_in], bias.

    packed: bytes [size] of the native layout; None where there is no native kernel for it.
    """

    weight: Tensor
    bias: Tensor | None = None
    packed: Tensor | None = None

    def native(self) -> tuple[Tensor, Tensor | None, int]:
        """The arguments of snoopi::guided_attention for this projection, packed or not."""
        weight = self.weight if self.packed is None else self.packed
        return weight, self.bias, self.weight.shape[0]


class Formula(NamedTuple):
    """How attentions to a positive and a negative text become one, as `guided_attention` takes it.

    strength: a number, or a tensor by query [b m]. kind and its parameters:
        nasa  none: Z+ - strength Z-, or Z+ - strength (Z- - Z0) with a null text.
        vsf   (bias,): one softmax over both texts, the negative logits lowered by bias, the
              negative values times -strength.
        nag   (tau, blend, p): z = Z+ + strength (Z+ - Z-), its p-norm over all heads of a token
              kept below tau times that of Z+; then blend z + (1 - blend) Z+. p is 1 or 2.
        combine: what the guidance's `combine` computes; the op does not know it.
    """

    strength: float | Tensor
    kind: str
    parameters: tuple[float, ...] = ()


def pack_text(k: Tensor, v: Tensor, mask: Tensor | None = None) -> TextPack:
    """Pack the keys and values of one text for `nasa_attention_packed`; do it once per prompt.

    k, v [b|1 n h d]; mask bool [b|1 n], True = attend. The pack is a snapshot for inference: it
    does not follow later changes of k and v.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_text_alone(k, v, mask)
    packed = live = None
    if native.why_not(k) is None:
        packed, live = torch.ops.snoopi.pack_text(k, v, mask)
    return TextPack(k, v, mask, packed, live)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> LinearPack:
    """Pack a linear layer for `linear` or `nasa_attention_packed`; do it once per set of weights.

    weight [c_out c_in] and bias [c_out] as in nn.Linear. The pack is a snapshot for inference: it
    does not follow later changes of the weights.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_linear(weight, bias, names=("weight", "bias"))
    usable = native.why_not(weight) is None and native.NATIVE.projects
    packed = torch.ops.snoopi.pack_linear(weight) if usable else None
    return LinearPack(weight, bias, packed)
