"""A checkpoint into a snoopi model folder, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import snoopi
from snoopi.folders import SPEC_FILE, parse_spec, replacing, tokenizer_folder, write_spec
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ModelSpec, TextSpec, ToolSpec, build
from weights_convert.detect import detect
from weights_convert.files import Entry, open_weights, sha256, write_safetensors
from weights_convert.found import Found, Part
from weights_convert.rules import Plan, Shape, plan, trouble_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What a network has several of: each takes a tensor or more.
_COUNTS = ("layers", "resnets", "depth", "mid_depth", "convs", "encoder_blocks", "decoder_blocks")
_MAY_BE_0 = ("depth", "mid_depth", "eos_id")
_HARMLESS = {True: 100, False: 10_000}  # counts and sizes up to here, whatever the weights hold

# SHA-256 of published files, as far as it is known: its beginning and end.
PUBLISHED = (
    ("19da7aaa4b88", "ffae9f1", "SD1.5 unet"),
    ("a2b5134f4dbc", "d2194c", "SD1.5 vae"),
    ("d008943c017f", "d88334", "SD1.5 text_encoder"),
    ("6dfae3e5f7d4", "974214", "SD2.1-base unet"),
    ("cce6febb0b6d", "fc916c", "SD2.1-base text_encoder"),
    ("a1d993488569", "df5815", "SD2.1-base vae"),
    ("df955bdf6b68", "0956d2", "v2-1_512-ema-pruned"),
    ("1238522277c4", "638b0c", "SD2.1-v unet"),
    ("83e012a805b8", "61e139", "SDXL unet fp16"),
    ("1598f3d24932", "9f2341", "SDXL vae"),
    ("3a6032f63d37", "a8d3ff", "SDXL text_encoder_2"),
    ("31e35c80fc48", "7e5b", "SDXL single file"),
    ("48fa46161a74", "fd1bdb", "SDXL-Turbo unet fp16"),
)


@dataclass(frozen=True)
class Written:
    """One network that was written."""

    part: str
    tensors: int
    parameters: int
    dtype: str
    megabytes: float
    dropped: Sequence[str]


@dataclass(frozen=True)
class Report:
    """What a conversion wrote. verified: published files among the sources, by their SHA-256."""

    folder: Path
    arch: str
    parts: Sequence[Written]
    verified: Sequence[str]
    notes: Sequence[str]


def convert(
    source: Path | str,
    target: Path | str,
    arch: str | None = None,
    dtype: str | None = None,
    prefer: str = "ema",
    check: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write the model folder `target` from a checkpoint; a part of a model gives a partial folder.

    arch: a preset's name or a snoopi.json, for what weights cannot say. dtype: "fp32", "bf16" or
    "fp16" for all floating-point weights; None keeps each one's. prefer: "ema" or "raw", where a
    file holds both. check: read everything back and compare it with the source. overwrite: replace
    a model folder that is there. At most one tensor is in memory at a time.

    Raises ValueError naming what is wrong with the source, OSError for the disk; `target` then is
    what it was.
    """
    source, target = Path(source), Path(target)
    _check_target(target, overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if prefer not in ("ema", "raw"):
        raise ValueError(f"prefer must be ema or raw, got {prefer!r}")
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    found = detect(source, arch, prefer)
    plans = plan_all(found, source)
    tokenizers = _tokenizers(found)
    _check_twins(found, source)
    kind = DTYPES.get(dtype or "")
    with replacing(target) as folder:
        parts = [_write_part(part, plans[part.name], folder, kind) for part in found.parts]
        for i, tokenizer in enumerate(tokenizers):
            if tokenizer is not None:
                (folder / tokenizer_folder(i)).mkdir()
                tokenizer.save(folder / tokenizer_folder(i))
        hashes = _hashes(found, source)
        provenance = {
            "converted_from": source.name,
            "files": hashes,
            "prefer": prefer,
            "dtype": dtype or "as stored",
            "snoopi": snoopi.__version__,
        }
        write_spec(folder, found.spec, provenance)
        if check:
            _check(found, plans, folder, kind)
    verified = [entry["published"] for entry in hashes.values() if "published" in entry]
    return Report(target, found.spec.arch, parts, verified, found.notes)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if overwrite and (target / SPEC_FILE).is_file():
        return
    hint = "add --overwrite" if (target / SPEC_FILE).is_file() else "it is not a model folder"
    raise ValueError(f"{target} exists already: {hint}, or choose another DST")


def targets(spec: ModelSpec | ToolSpec, part: str) -> dict[str, Shape]:
    """Names and shapes of a network's parameters."""
    return {name: tuple(tensor.shape) for name, tensor in build(spec, part).state_dict().items()}


def plan_all(found: Found, source: Path) -> dict[str, Plan]:
    """The plan of every part; ValueError lists the trouble of all of them."""
    _check_spec(found, source)
    plans, trouble = {}, [f"has an unexpected {name}" for name in found.leftover]
    for part in found.parts:
        try:
            wanted = targets(found.spec, part.name)
        except ValueError as error:
            raise ValueError(f"{source}: {part.name}: {error}") from error
        plans[part.name], more = plan(wanted, part.layout, part.weights, part.rename)
        trouble += [f"{part.name}: {line}" for line in more]
    if trouble:
        raise ValueError(trouble_line(f"{source} does not fit {found.spec.arch}", trouble))
    return plans


def _check_twins(found: Found, source: Path) -> None:
    """T5's embedding has two names: one is left out, so they must hold the same values."""
    one, other = "shared.weight", "encoder.embed_tokens.weight"
    for part in found.parts:
        if one in part.weights and other in part.weights:
            a, b = part.weights[one].read(), part.weights[other].read()
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                raise ValueError(f"{source}: {part.name}: {one} and {other} differ, expected one")


def _check_spec(found: Found, source: Path) -> None:
    """ValueError where a config's sizes are none, or claim more than the weights can hold.

    Before a network is built of them: even on the meta device a billion layers take memory.
    """
    try:
        parse_spec(type(found.spec), found.spec.to_json())
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{source}: {error}") from error
    for part in found.parts:
        shapes = [entry.shape for entry in part.weights.values()]
        widest = max((n for shape in shapes for n in shape), default=0)
        for name, value in dataclasses.asdict(part.config).items():
            where = f"{source}: {part.name}.{name}"
            numbers = value if isinstance(value, tuple) else (value,)
            sizes = [n for n in numbers if type(n) is int]
            least = 0 if name in _MAY_BE_0 else 1
            if not numbers or any(n < least for n in sizes):
                raise ValueError(f"{where} must be at least {least}, got {value}")
            if type(value) is float and not 0 < value < math.inf:
                raise ValueError(f"{where} must be positive, got {value}")
            many = sum(sizes) > len(shapes) if name in _COUNTS else max(sizes, default=0) > widest
            if many and max(sizes) > _HARMLESS[name in _COUNTS]:
                raise ValueError(
                    f"{where} = {value} is more than its weights can hold "
                    f"({len(shapes)} tensors, the widest of {widest})"
                )


def _write_part(part: Part, how: Plan, folder: Path, dtype: torch.dtype | None) -> Written:
    entries = how.forward(part.weights, dtype)
    path = folder / f"{part.name}.safetensors"
    write_safetensors(path, entries, {"format": "pt"})
    kinds = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries.values()})
    count = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    size = path.stat().st_size / 1e6
    return Written(part.name, len(entries), count, "+".join(kinds), size, how.dropped)


def _tokenizers(found: Found) -> list[Tokenizer | None]:
    """A tokenizer for each text encoder: the checkpoint's own, else CLIP's committed vocabulary."""
    if isinstance(found.spec, ToolSpec):
        return [Tokenizer.clip(pad_id) for pad_id in found.pad_ids]
    parts = {part.name for part in found.parts}
    made: list[Tokenizer | None] = []
    for i, (text, folder) in enumerate(zip(found.spec.text, found.tokenizers, strict=True)):
        name = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
        made.append(_tokenizer(text, folder) if name in parts or folder is not None else None)
    return made


def _tokenizer(text: TextSpec, folder: Path | None) -> Tokenizer | None:
    if folder is not None:
        return Tokenizer.from_folder(folder, text.config.length, None)
    if text.config.vocabulary == 49408:
        return Tokenizer.clip(text.pad_id, text.config.length)
    return None


def _hashes(found: Found, source: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every source file, and which published file it is."""
    files = sorted({path for part in found.parts for path in part.files})
    root = source if source.is_dir() else source.parent
    hashes = {}
    for path in files:
        digest = sha256(path)
        entry: dict[str, Any] = {"sha256": digest, "bytes": path.stat().st_size}
        for start, end, name in PUBLISHED:
            if digest.startswith(start) and digest.endswith(end):
                entry["published"] = name
        hashes[str(path.relative_to(root))] = entry
    return hashes


def _check(found: Found, plans: dict[str, Plan], folder: Path, dtype: torch.dtype | None) -> None:
    """Read the folder back: the same names and shapes, and every value equal to the source's."""
    for part in found.parts:
        written = open_weights(folder / f"{part.name}.safetensors").entries
        if {n: e.shape for n, e in written.items()} != targets(found.spec, part.name):
            raise ValueError(f"{part.name}: what was written has other names or shapes")
        for name, entry in plans[part.name].forward(part.weights, dtype).items():
            _check_tensor(f"{part.name}: {name}", entry, written[name])


def _check_tensor(name: str, wanted: Entry, got: Entry) -> None:
    if wanted.dtype != got.dtype or not torch.equal(_bits(wanted), _bits(got)):
        raise ValueError(f"{name} differs from the source after writing")


def _bits(entry: Entry) -> torch.Tensor:
    """A tensor's bytes, without a copy where it lies in order: NaN equals itself."""
    return entry.read().contiguous().view(-1).view(torch.uint8)
