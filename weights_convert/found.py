"""What a source was recognised as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snoopi.zoo import ModelSpec, ToolSpec
from weights_convert.files import Entry
from weights_convert.rules import Layout


@dataclass(frozen=True)
class Part:
    """One network of a source. name: "backbone", "vae", "text_encoder", ...

    weights: its tensors alone, under the layout's names. rename: another spelling of those.
    """

    name: str
    config: Any
    weights: Mapping[str, Entry]
    layout: Layout
    files: tuple[Path, ...]
    rename: Callable[[str], str] = lambda name: name


@dataclass(frozen=True)
class Found:
    """All that a source holds. tokenizers: folder of each text encoder's, None where it has none.

    leftover: names of a single file that no network's prefix covers. pad_ids: of the tokenizers
    that come with the package, where the spec does not say.
    """

    spec: ModelSpec | ToolSpec
    parts: Sequence[Part]
    tokenizers: Sequence[Path | None]
    leftover: Sequence[str] = ()
    notes: Sequence[str] = ()
    pad_ids: Sequence[int] = ()
