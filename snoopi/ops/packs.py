"""Containers for the op's inputs: one text's keys and values, and an output projection.

Both are NamedTuples of ordinary tensors, so they can be stored, moved and returned freely. In this
version they hold plain contiguous tensors; a later one may hold a layout that a kernel reads
faster, which is why callers make them with `pack_text` and `pack_linear` and look inside neither.
"""

from typing import NamedTuple

from torch import Tensor

from snoopi.ops import checks


class TextPack(NamedTuple):
    """One text as `nasa_attention_packed` takes it: k, v [b|1 n h d], mask bool [b|1 n] or None."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None


class LinearPack(NamedTuple):
    """A projection as `nasa_attention_packed` takes it: weight [c_out h*d], bias [c_out]."""

    weight: Tensor
    bias: Tensor | None = None


def pack_text(k: Tensor, v: Tensor, mask: Tensor | None = None) -> TextPack:
    """Pack the keys and values of one text for `nasa_attention_packed`; do it once per prompt.

    k, v [b|1 n h d]; mask bool [b|1 n], True = attend. The pack is a snapshot for inference: it
    does not follow later changes of k and v.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_text_alone(k, v, mask)
    return TextPack(k.contiguous(), v.contiguous(), None if mask is None else mask.contiguous())


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> LinearPack:
    """Pack an output projection for `nasa_attention_packed`; do it once per set of weights.

    weight [c_out c_in] and bias [c_out] as in nn.Linear. The pack is a snapshot for inference: it
    does not follow later changes of the weights.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_linear(weight, bias, names=("weight", "bias"))
    return LinearPack(weight.contiguous(), None if bias is None else bias.contiguous())
