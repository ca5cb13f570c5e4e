"""Texts as read, with their K/V for every cross-attention, and the last few of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snoopi import ops
from snoopi.conditioning import Conditioning, TextKV
from snoopi.guidance import Guidance
from snoopi.ops import TextPack

RECENT = 8  # texts that a pipeline keeps: prompts, negatives and the null text


class Text:
    """A text (a plain Conditioning) and its K/V by layer, made when they are first asked for."""

    def __init__(self, cond: Conditioning) -> None:
        self.cond = cond
        self._layers: dict[bool, tuple[TextPack, ...]] = {}

    def layers(self, backbone: Any, packed: bool) -> tuple[TextPack, ...]:
        """K/V for every cross-attention of a backbone; packed: for the op that guides."""
        if packed not in self._layers:
            if packed:
                plain = self.layers(backbone, False)
                self._layers[True] = tuple(ops.pack_text(kv.k, kv.v, kv.mask) for kv in plain)
            else:
                kv = backbone.text_kv(self.cond).kv
                self._layers[False] = tuple(layer[0] for layer in kv.layers)
        return self._layers[packed]

    def filled(self, backbone: Any) -> Conditioning:
        """The text alone, with its K/V."""
        layers = tuple((kv, None, None) for kv in self.layers(backbone, False))
        return replace(self.cond, kv=TextKV(self.cond.sources(), layers))


def guided(
    backbone: Any, text: Text, negative: Text, null: Text | None, guidance: Guidance
) -> Conditioning:
    """A text with its negative (and null) text under a guidance, with the K/V of all."""
    texts = (text, negative, null)
    layers = [t.layers(backbone, True) for t in texts if t is not None]
    if null is None:
        layers.append((None,) * len(layers[0]))  # type: ignore[arg-type]
    away = None if null is None else null.cond
    cond = replace(text.cond, negative=negative.cond, null=away, guidance=guidance)
    return replace(cond, kv=TextKV(cond.sources(), tuple(zip(*layers, strict=True))))


class RecentTexts:
    """The RECENT texts used last, all forgotten once what they were made by changes.

    A change is another parameter or buffer, other memory, or a write in place that torch counts:
    not one through `.data` or of tensors made under inference_mode.
    """

    def __init__(self) -> None:
        self._texts: dict[Hashable, Text] = {}
        self._seen: list[tuple[Any, ...]] = []

    def get(self, key: Hashable, make: Callable[[], Conditioning]) -> Text:
        """The text of a key, made if it is not there. Under grad it is made and not kept."""
        if torch.is_grad_enabled():
            return Text(make())
        text = self._texts.pop(key, None) or Text(make())
        self._texts[key] = text  # the last in order is the one used last
        if len(self._texts) > RECENT:
            del self._texts[next(iter(self._texts))]
        return text

    def clear(self) -> None:
        """Forget all."""
        self._texts.clear()
        self._seen = []

    def check(self, networks: Sequence[nn.Module], tokenizers: Sequence[object]) -> bool:
        """Forget all if something of this has changed; before the first text of a call.

        Returns whether all is as it was.
        """
        tensors = [t for net in networks for t in (*net.parameters(), *net.buffers())]
        now = [*((t, _mark(t)) for t in tensors), *((t, None) for t in tokenizers)]
        known = len(now) == len(self._seen) and all(
            seen() is x and was == mark
            for (seen, was), (x, mark) in zip(self._seen, now, strict=True)
        )
        if not known:
            self.clear()
            self._seen = [(weakref.ref(x), mark) for x, mark in now]
        return known


def _mark(x: Tensor) -> tuple[int, int]:
    """Differs after a change in place, and where the tensor's memory is another."""
    return x.data_ptr(), 0 if x.is_inference() else x._version
