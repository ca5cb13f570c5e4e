"""Two students into one: theta = weight A + (1 - weight) B (SwiftBrush v2, with weight 0.5)."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch

import snoopi
from snoopi.errors import writing
from snoopi.folders import SPEC_FILE, read_spec, replacing, write_spec
from snoopi.zoo import ModelSpec
from weights_convert.convert import targets
from weights_convert.files import Entry, Weights, open_weights, sha256, write_safetensors
from weights_convert.rules import cast

PART = "backbone"
# What must be equal of two models whose weights can be averaged.
_ALIKE = ("backbone", "vae", "text", "schedule", "one_step", "null")


def blend(
    first: Path | str, second: Path | str, target: Path | str, weight: float = 0.5
) -> ModelSpec:
    """Write the model folder `target`: the mean of two backbones, weight of `first`.

    In fp32, stored in first's dtype, one tensor of each in memory at a time. All else is first's;
    what second has of it must be the same, up to its storage. The provenance says both files'
    SHA-256. Returns the spec.

    Raises ValueError for models of other sizes, schedules or one-step calls, for other text
    encoders or VAEs, and for a target that exists; OSError for the disk. Then nothing is written.
    """
    first, second, target = Path(first), Path(second), Path(target)
    if not (math.isfinite(weight) and 0 <= weight <= 1):
        raise ValueError(f"the weight must be from 0 to 1, got {weight}")
    spec, provenance = read_spec(first)
    theirs, _ = read_spec(second)
    for name in _ALIKE:
        ours, other = getattr(spec, name), getattr(theirs, name)
        if ours != other:
            raise ValueError(f"{second} has another {name} than {first}: {other} and {ours}")
    if target.exists():
        raise ValueError(f"{target} exists already: choose another DST")
    a, b = (_open(folder, spec) for folder in (first, second))
    others = [first / f"{part}.safetensors" for part in spec.parts() if part != PART]
    others = [path for path in others if path.is_file()]
    for path in others:
        twin = second / path.name
        if twin.is_file() and not _same(open_weights(path), open_weights(twin)):
            raise ValueError(f"{twin} is another network than {path}")
    digests = {"first": sha256(a.path), "second": sha256(b.path)}
    record = {"weight": weight, "names": [first.name, second.name], "sha256": digests}
    entries = {name: _mean(name, a.entries[name], b.entries[name], weight) for name in a.entries}
    with replacing(target) as folder:
        write_safetensors(folder / f"{PART}.safetensors", entries, a.metadata)
        for path in others:
            with writing(folder / path.name):
                shutil.copyfile(path, folder / path.name)
        for tokenizer in first.glob("tokenizer*"):
            shutil.copytree(tokenizer, folder / tokenizer.name)
        provenance = {**provenance, "blended": record, "snoopi": snoopi.__version__}
        write_spec(folder, spec, provenance)
    return spec


def _open(folder: Path, spec: ModelSpec) -> Weights:
    path = folder / f"{PART}.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} has no {PART}")
    weights = open_weights(path)
    if weights.shapes() != targets(spec, PART):
        raise ValueError(f"{path} does not fit its {SPEC_FILE}")
    return weights


def _same(a: Weights, b: Weights) -> bool:
    """Whether two files hold equal tensors, in the coarser dtype where storage differs."""
    if a.shapes() != b.shapes():
        return False
    for name, ours in a.entries.items():
        theirs = b.entries[name]
        dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(ours.read().to(dtype), theirs.read().to(dtype)):
            return False
    return True


def _mean(name: str, a: Entry, b: Entry, weight: float) -> Entry:
    return dataclasses.replace(
        a,
        read=lambda: cast(
            name, weight * a.read().float() + (1 - weight) * b.read().float(), a.dtype
        ),
    )


def add_parsers(kinds: Any) -> None:
    """Register `blend`."""
    kind = kinds.add_parser(
        "blend",
        help="the mean of two model folders' backbones",
        description="The mean of two model folders' backbones: W A + (1 - W) B.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = kind.add_argument
    add("first", type=Path, metavar="A", help="a snoopi model folder")
    add("second", type=Path, metavar="B", help="another of the same sizes and schedule")
    add("target", type=Path, metavar="DST", help="the model folder to write")
    add("--weight", type=float, default=0.5, metavar="W", help="of A, from 0 to 1")
    kind.set_defaults(run=_blend)


def _blend(options: argparse.Namespace) -> None:
    spec = blend(options.first, options.second, options.target, options.weight)
    print(f"wrote {options.target} ({spec.arch}): {options.weight:g} of {options.first}")
