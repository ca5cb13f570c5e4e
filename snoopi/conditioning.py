"""What a backbone is conditioned on besides x and t.

Conditionings and guidances are pytrees: their tensors can be inputs of exported programs, be mapped
over, and be found in the graph of a compiled network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.ops import TextPack


class TextKV(NamedTuple):
    """K/V of a text, its negative and its null text for every cross-attention.

    sources: what they were made from; layers: (a pack or None for each of the three, ...).
    """

    sources: tuple[Tensor | None, ...]
    layers: tuple[tuple[TextPack | None, ...], ...]


@dataclass(frozen=True)
class Conditioning:
    """Text (and sizes) for one call of a backbone, and how to steer away from a negative text.

    tokens [b n k]: text features. mask bool [b n], True = attend; None attends to all.
    pooled [b k']: SDXL's pooled text. size_ids: SDXL int [b 6] (orig_h, orig_w, top, left,
    target_h, target_w); PixArt-1024 float [b 3] (h, w, h/w).
    negative, null: Conditionings without guidance, batch b or 1. guidance: how the negative is used
    in every cross-attention; `nasa_scale=s` is short for guidance=NASA(s).
    region [b|1 H W] on the latent grid: multiplies the strength; each cross-attention averages it
    to its own size. guidance_embed [b]: LCM's w = 1000 (CFG scale - 1). kv: K/V filled in by
    `backbone.text_kv`.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    size_ids: Tensor | None = None
    negative: Conditioning | None = field(default=None, kw_only=True)
    null: Conditioning | None = field(default=None, kw_only=True)
    guidance: Guidance | None = field(default=None, kw_only=True)
    nasa_scale: float | Tensor | None = field(default=None, kw_only=True)
    region: Tensor | None = field(default=None, kw_only=True)
    guidance_embed: Tensor | None = field(default=None, kw_only=True)
    kv: TextKV | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.tokens.dim() != 3:
            raise ValueError(f"tokens must be [b n k], got {list(self.tokens.shape)}")
        if self.mask is not None and self.mask.shape != self.tokens.shape[:2]:
            expected, got = list(self.tokens.shape[:2]), list(self.mask.shape)
            raise ValueError(f"mask must be [b n] = {expected}, got {got}")
        if self.nasa_scale is not None:
            if self.guidance is not None:
                raise ValueError("give either guidance or nasa_scale, not both")
            object.__setattr__(self, "guidance", NASA(self.nasa_scale))
            object.__setattr__(self, "nasa_scale", None)
        if self.guidance is not None and self.negative is None:
            raise ValueError("guidance needs a negative Conditioning")
        if self.guidance is not None and self.guidance.needs_null and self.null is None:
            raise ValueError(f"{type(self.guidance).__name__} with centred=True needs `null`")
        batch = self.tokens.shape[0]  # len() would make it a constant of an exported program
        if self.region is not None and (
            self.region.dim() != 3 or self.region.shape[0] not in (1, batch)
        ):
            got = list(self.region.shape)
            raise ValueError(f"region must be [{batch} or 1, H, W], got {got}")
        for name in ("negative", "null"):
            self._check_text(name, getattr(self, name))
        if self.kv is not None:
            pairs = zip(self.kv.sources, self.sources(), strict=True)
            if any(made is not now for made, now in pairs):
                raise ValueError("kv was made from other texts: call text_kv again")

    def _check_text(self, name: str, text: Conditioning | None) -> None:
        if text is None:
            return
        if text.negative is not None or text.guidance is not None:
            raise ValueError(f"{name} must be a Conditioning without a negative and guidance")
        batch = self.tokens.shape[0]
        if text.tokens.shape[0] not in (1, batch) or text.tokens.shape[2] != self.width:
            expected = f"[{batch} or 1, n, {self.width}]"
            raise ValueError(f"{name}.tokens must be {expected}, got {list(text.tokens.shape)}")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def sources(self) -> tuple[Tensor | None, ...]:
        """Tokens and mask of the text, its negative and its null text: what a pack holds."""
        texts = (self, self.negative, self.null)
        pairs = ((None, None) if text is None else (text.tokens, text.mask) for text in texts)
        return tuple(part for pair in pairs for part in pair)

    @property
    def width(self) -> int:
        """Width of the text features, k."""
        return self.tokens.shape[2]

    def plain(self) -> Conditioning:
        """The same text without negative and guidance."""
        return replace(self, negative=None, null=None, guidance=None, region=None, kv=None)

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """f applied to every tensor of the text (tokens, mask, pooled, sizes, embeddings)."""
        names = ("mask", "pooled", "size_ids", "guidance_embed")
        values: dict[str, Any] = {
            n: None if getattr(self, n) is None else f(getattr(self, n)) for n in names
        }
        return Conditioning(f(self.tokens), **values)

    def expand(self, batch: int) -> Conditioning:
        """A text of batch 1 repeated to `batch` rows (views); a text of `batch` rows as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"cannot expand a conditioning of {len(self)} rows to {batch}")

        def rows(x: Tensor) -> Tensor:
            return x.expand(batch, *x.shape[1:])

        text = self.map(rows)
        if self.kv is None:
            return text
        packs = [kv[0] for kv in self.kv.layers]
        return text._filled(
            [None if kv is None else TextPack(rows(kv.k), rows(kv.v), text.mask) for kv in packs]
        )

    def _filled(self, packs: Sequence[TextPack | None]) -> Conditioning:
        """With the K/V of the text alone, by layer."""
        layers = tuple((kv, None, None) for kv in packs)
        return replace(self, kv=TextKV(self.sources(), layers))


def concat(parts: Sequence[Conditioning]) -> Conditioning:
    """Plain conditionings stacked along the batch; lengths and masks must agree in kind.

    K/V are stacked where all parts have them, else left out.
    """

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        if any(value is None for value in values):
            raise ValueError(f"cannot stack conditionings with and without {name}")
        return torch.cat(values)

    if any(part.negative is not None or part.guidance is not None for part in parts):
        raise ValueError("cannot stack conditionings that carry a negative")
    names = ("mask", "pooled", "size_ids", "guidance_embed")
    values: dict[str, Any] = {name: join(name) for name in names}
    text = Conditioning(torch.cat([part.tokens for part in parts]), **values)
    filled = [part.kv.layers for part in parts if part.kv is not None]
    if len(filled) < len(parts):
        return text
    packs = [[kv[0] for kv in layer] for layer in zip(*filled, strict=True)]
    return text._filled([_stack(layer, text.mask) for layer in packs])


def _stack(packs: Sequence[TextPack | None], mask: Tensor | None) -> TextPack | None:
    """K/V of a layer for several texts along the batch, unpacked: what plain attention reads."""
    made = [kv for kv in packs if kv is not None]
    if len(made) < len(packs):
        return None
    return TextPack(torch.cat([kv.k for kv in made]), torch.cat([kv.v for kv in made]), mask)


# --- pytrees --------------------------------------------------------------------------------------

# Of each kind the fields that hold tensors or a strength, and the others, which must be plain data.
_FIELDS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Conditioning: (tuple(f.name for f in fields(Conditioning) if f.name != "nasa_scale"), ()),
    NASA: (("scale",), ("centred",)),
    NAG: (("phi",), ("tau", "blend", "norm_p")),
    VSF: (("scale",), ("bias",)),
}


def _flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """Parts and plain data. `kv` travels as its layers: its sources are the texts beside it."""
    names, others = _FIELDS[type(value)]
    parts = [getattr(value, name) for name in names]
    if isinstance(value, Conditioning) and value.kv is not None:
        parts[names.index("kv")] = value.kv.layers
    return parts, tuple(getattr(value, name) for name in others)


def _flatten_with_keys(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
    parts, data = _flatten(value)
    names, _ = _FIELDS[type(value)]
    return [(pytree.GetAttrKey(n), part) for n, part in zip(names, parts, strict=True)], data


def _unflatten(kind: type, parts: Iterable[Any], data: Iterable[Any]) -> Any:
    """The inverse. Nothing is checked: a part may be a stand-in for a tensor, as a name or None."""
    value: Any = object.__new__(kind)
    names, others = _FIELDS[kind]
    for name, part in zip((*names, *others), (*parts, *data), strict=True):
        object.__setattr__(value, name, part)
    if kind is Conditioning:
        object.__setattr__(value, "nasa_scale", None)
        if value.kv is not None:
            object.__setattr__(value, "kv", TextKV(value.sources(), value.kv))
    return value


pytree._register_namedtuple(TextPack, serialized_type_name="snoopi.ops.packs.TextPack")
for _kind in _FIELDS:
    pytree.register_pytree_node(
        _kind,
        _flatten,
        partial(_unflatten, _kind),
        serialized_type_name=f"{_kind.__module__}.{_kind.__qualname__}",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=_flatten_with_keys,
    )
