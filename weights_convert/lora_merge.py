"""LoRAs into the weights they were trained beside: a model folder in, a model folder out."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snoopi
from snoopi.errors import writing
from snoopi.folders import SPEC_FILE, read_spec, replacing, write_spec
from snoopi.zoo import ModelSpec
from weights_convert.convert import targets
from weights_convert.files import Entry, open_weights, sha256, write_safetensors
from weights_convert.lora_files import Factor, Lora, read_lora, spec_of
from weights_convert.rules import cast

# A module's changes, each with its strength.
Changes = Sequence[tuple[float, Factor]]


def merge(
    source: Path | str,
    loras: Sequence[Path | str],
    target: Path | str,
    scales: Sequence[float] = (1.0,),
    arch: str | None = None,
    part: str | None = None,
    alpha: float | None = None,
) -> list[Lora]:
    """Write the model folder `target`: `source` with LoRAs added to its weights.

    W' = W + sum of scale (alpha / rank) up down, in fp32, stored in the dtype of W; one weight is
    in memory at a time. scales: one for each LoRA, or one for all. arch: the recipe that
    the merged model is called by, such as lcm-lora-sd15; None: the source's. part, alpha: see
    read_lora. The provenance says each LoRA's SHA-256 and scale. Returns the LoRAs.

    Raises ValueError for a LoRA that is not of this model or changes a network the folder lacks,
    OSError for the disk; then nothing is written.
    """
    source, target = Path(source), Path(target)
    spec, provenance = read_spec(source)
    merged = spec if arch is None else spec_of(arch)
    theirs = merged.parts()
    if other := [name for name, config in spec.parts().items() if theirs.get(name) != config]:
        raise ValueError(f"{merged.arch} has another {other[0]} than {source}")
    if target.exists():
        raise ValueError(f"{target} exists already: choose another DST")
    if not loras:
        raise ValueError("give at least one LoRA")
    if len(scales) not in (1, len(loras)):
        raise ValueError(f"give one scale, or one per LoRA: {len(loras)}, got {len(scales)}")
    if bad := [scale for scale in scales if not math.isfinite(scale)]:
        raise ValueError(f"a scale must be a finite number, got {bad[0]}")
    scales = list(scales) * (len(loras) if len(scales) == 1 else 1)
    read = [read_lora(path, spec, part, alpha) for path in loras]
    for path, lora in zip(loras, read, strict=True):
        for name in lora.parts:
            if not (source / f"{name}.safetensors").is_file():
                raise ValueError(f"{path} changes the {name}, which {source} has not")
    history = [*provenance.get("merged", []), *map(_record, loras, read, scales)]
    with replacing(target) as folder:
        for name in spec.parts():
            path = source / f"{name}.safetensors"
            if path.is_file():
                _merge_part(path, folder / path.name, _changes(name, read, scales), spec, name)
        for tokenizer in source.glob("tokenizer*"):
            shutil.copytree(tokenizer, folder / tokenizer.name)
        provenance = {**provenance, "merged": history, "snoopi": snoopi.__version__}
        write_spec(folder, merged, provenance)
    return read


def _changes(
    part: str, loras: Sequence[Lora], scales: Sequence[float]
) -> dict[str, list[tuple[float, Factor]]]:
    """The changes of each module of a part, in the order of the LoRAs."""
    found: dict[str, list[tuple[float, Factor]]] = {}
    for scale, lora in zip(scales, loras, strict=True):
        for name, factor in lora.parts.get(part, {}).items():
            found.setdefault(name, []).append((scale, factor))
    return found


def _merge_part(
    source: Path, target: Path, changes: Mapping[str, Changes], spec: ModelSpec, part: str
) -> None:
    if not changes:
        with writing(target):
            shutil.copyfile(source, target)
        return
    weights = open_weights(source)
    if weights.shapes() != targets(spec, part):
        raise ValueError(f"{source} does not fit its {SPEC_FILE}")
    merged = {
        name: _merged(name, entry, changes.get(name.removesuffix(".weight"), ()))
        for name, entry in weights.entries.items()
    }
    write_safetensors(target, merged, weights.metadata)


def _merged(name: str, entry: Entry, changes: Changes) -> Entry:
    if not changes or not name.endswith(".weight"):
        return entry

    def read() -> Tensor:
        weight = entry.read().float()
        total = torch.zeros_like(weight)
        for scale, factor in changes:
            total += scale * factor.delta(entry.shape)
        return cast(name, weight + total, entry.dtype)

    return dataclasses.replace(entry, read=read)


def _record(path: Path | str, lora: Lora, scale: float) -> dict[str, Any]:
    """What the provenance says of a LoRA."""
    return {
        "lora": Path(path).name,
        "files": {file.name: sha256(file) for file in lora.files},
        "dialect": lora.dialect,
        "scale": scale,
        "modules": {part: len(factors) for part, factors in lora.parts.items()},
    }
