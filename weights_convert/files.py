"""Files of named tensors: read lazily and never unpickled, written as a stream.

safetensors files are mapped into memory, their header checked by us; pickled files (.bin, .pt,
.pth, .ckpt) are read with torch's weights_only and mapped where their format allows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snoopi.errors import writing

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
INDEX = ".safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20  # bytes; the format's own limit
_NESTED = ("state_dict", "model", "module", "params", "params_ema")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its shape and dtype are known, its values come with `read()`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of one or more files by name. metadata: what the safetensors headers say."""

    path: Path
    entries: Mapping[str, Entry]
    files: tuple[Path, ...]
    metadata: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: entry.shape for name, entry in self.entries.items()}


def open_weights(path: Path | str, prefer: str = "ema") -> Weights:
    """The tensors of a file, or of the shards that an index.json names.

    prefer: "ema" or "raw", where a pickled file holds both as `state_dict_ema` and `state_dict`.
    Raises ValueError for a file that is missing, truncated, foreign, or that only unpickling could
    read; nothing of it is executed.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of weights, got a folder")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return _sharded(path, prefer)
    if path.suffix == ".safetensors":
        entries, metadata = _safetensors(path)
    elif path.suffix in PICKLED:
        entries, metadata = _pickled(path, prefer), {}
    else:
        kinds = ", ".join((".safetensors", INDEX, *PICKLED))
        raise ValueError(f"{path}: expected a file of weights ({kinds})")
    return Weights(path, entries, (path,), metadata)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- safetensors ----------------------------------------------------------------------------------


def _safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    header, start, size = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to strings")
    spans = {name: _span(path, name, data, size - start) for name, data in header.items()}
    end = 0
    for name, (begin, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise ValueError(f"{path}: {name} must begin at byte {end} of the data, not at {begin}")
        end = stop
    if end != size - start:
        raise ValueError(f"{path} is damaged: its tensors take {end} bytes, it has {size - start}")
    if not spans:
        return {}, metadata
    with path.open("rb") as file:
        # A private map: torch asks for memory that could be written to; nobody does.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    entries = {}
    for name, (begin, _, dtype, shape) in spans.items():
        entries[name] = Entry(shape, dtype, _reader(data, start + begin, dtype, shape))
    return entries, metadata


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(
                f"{path} is not a whole safetensors file: its header claims {length} bytes, "
                f"it has {max(size - 8, 0)}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its safetensors header must be an object")
    return header, 8 + length, size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} stands in it twice")
        found[name] = value
    return found


def _span(
    path: Path, name: str, data: Any, size: int
) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Begin, end, dtype and shape of one tensor, checked against each other."""
    where = f"{path}: {name}"
    if not isinstance(data, dict) or set(data) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have dtype, shape and data_offsets, got {data!r:.80}")
    if not isinstance(data["dtype"], str) or data["dtype"] not in DTYPES:
        raise ValueError(f"{where} has the unknown dtype {data['dtype']!r}")
    for key in ("shape", "data_offsets"):
        sizes = data[key]
        if not isinstance(sizes, list) or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
            raise ValueError(f"{where}.{key} must be a list of sizes, got {data[key]!r:.80}")
    dtype, shape = DTYPES[data["dtype"]], tuple(data["shape"])
    if len(data["data_offsets"]) != 2 or data["data_offsets"][1] > size:
        raise ValueError(
            f"{path} is truncated or damaged: {name} is at {data['data_offsets']} of {size} bytes"
        )
    begin, end = data["data_offsets"]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise ValueError(
            f"{where} must take {expected} bytes, for {data['dtype']} {list(shape)}, "
            f"got {end - begin}"
        )
    return begin, end, dtype, shape


def _reader(
    data: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:  # a header of any length is allowed
            raw = torch.frombuffer(
                data, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset
            )
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)

    return read


def _sharded(path: Path, prefer: str) -> Weights:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        where = index["weight_map"]
        names = {str(name) for name in where.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} must hold a weight_map of names to files: {error!r}") from error
    entries: dict[str, Entry] = {}
    files: list[Path] = []
    for name in sorted(names):
        if not name or Path(name).name != name or name.endswith(".index.json"):
            raise ValueError(f"{path}: a shard must be a file of weights beside it, got {name!r}")
        shard = open_weights(path.with_name(name), prefer)
        for key, entry in shard.entries.items():
            if where.get(key) != name:
                raise ValueError(f"{path} says {key} is in {where.get(key)!r}, but it is in {name}")
            entries[key] = entry
        files += shard.files
    if lost := [key for key in where if key not in entries]:
        raise ValueError(f"{path} names {lost[0]} and {len(lost) - 1} more that no shard holds")
    return Weights(path, entries, (path, *files), {})


def write_safetensors(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in the order of the mapping, one in memory at a time, atomically.

    Raises OSError naming the file (a full disk), ValueError where a tensor is not what its entry
    says; then nothing bears the file's name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path), partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in entries.items():
                file.write(_bytes(name, entry))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def _bytes(name: str, entry: Entry) -> memoryview:
    value = entry.read()
    if tuple(value.shape) != entry.shape or value.dtype != entry.dtype:
        raise ValueError(
            f"{name} must be {entry.dtype} {list(entry.shape)}, "
            f"got {value.dtype} {list(value.shape)}"
        )
    return value.contiguous().view(-1).view(torch.uint8).numpy().data


# --- pickled files --------------------------------------------------------------------------------


def _pickled(path: Path, prefer: str) -> dict[str, Entry]:
    data = _unnested(path, _load(path), prefer)
    entries = {}
    for name, value in data.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = _number(path, name, value)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{path}: expected tensors by name, got {name!r} of type {kind}")
        if trouble := _unreadable(value):
            raise ValueError(f"{path}: {name} is {trouble}, not a plain tensor in memory")
        entries[name] = Entry(tuple(value.shape), value.dtype, value.detach)
    return entries


def _number(path: Path, name: Any, value: int | float) -> Tensor:
    """An alpha, or a step count, that was saved as a number."""
    try:
        return torch.tensor(value)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {name!r} is too large a number") from error


def _unreadable(value: Tensor) -> str | None:
    """What makes a tensor one that safetensors cannot hold."""
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.")
    if value.device.type != "cpu":
        return f"on the device {value.device}"
    if value.is_neg() or value.is_conj():
        return "a lazily negated or conjugated view"
    return None if value.dtype in _NAMES else f"of {value.dtype}"


def _load(path: Path) -> Any:
    archive = _archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        # torch's own message advises to unpickle blindly: only what it found is repeated.
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)|class (\S+) ", text):
            raise ValueError(
                f"{path} holds Python objects ({found[1] or found[2]}) besides tensors, which "
                f"would have to be executed; use the safetensors file of the same model, or save "
                f"its state_dict alone"
            ) from None
        reason = _first_line(text.rpartition("WeightsUnpickler error:")[2])
        raise ValueError(f"{path} is no readable file of weights: {reason}") from None
    except Exception as error:  # a damaged pickle or archive can raise anything
        reason = _first_line(str(error)) or type(error).__name__
        raise ValueError(f"{path} is no readable file of weights: {reason}") from None


def _archive(path: Path) -> bool:
    """Whether it is a zip archive; ValueError for TorchScript and what unpacks to more than it is.

    Files of torch before 1.6 are none.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as file:
            items = file.infolist()
    except Exception as error:  # a damaged directory can raise anything
        raise ValueError(f"{path} is no readable file of weights: {error}") from None
    if any("/code/" in item.filename for item in items):
        raise ValueError(
            f"{path} is a TorchScript program, not a file of weights (OpenAI's CLIP files are): "
            f"save torch.jit.load(path).state_dict(), or use the model's safetensors file"
        )
    if sum(item.file_size for item in items) > path.stat().st_size:
        raise ValueError(f"{path} is compressed or damaged: torch stores tensors as they are")
    return True


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""


def _unnested(path: Path, data: Any, prefer: str) -> Mapping[Any, Any]:
    """The mapping of tensors in what a training program saved."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got {type(data).__name__}")
    if prefer == "ema" and isinstance(data.get("state_dict_ema"), Mapping):
        return data["state_dict_ema"]
    for key in _NESTED:
        if isinstance(data.get(key), Mapping):
            return data[key]
    return data
