"""Text embeddings computed once (data.cache): a folder of safetensors shards and an index.

Only what a backbone reads is kept: of an encoder whose padding is hidden (T5) the prompt's own
tokens, of CLIP all of them (positions after the end of the text differ from prompt to prompt, and
are read). Rows of unequal length lie one after another, with offsets; each has a CRC-32, which is
compared whenever the row is read, and each shard a SHA-256, which `verify` compares.

A shard appears whole or not at all and is then noted in the index, so a killed command goes on
where it was. A shard's bytes do not depend on that: its batches begin with its first row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snoopi.conditioning import Conditioning
from snoopi.errors import writing
from snoopi.folders import load_part, read_spec, tokenizer_folder
from snoopi.pictures import write_atomically
from snoopi.zoo import text_part

FORMAT, VERSION = "snoopi text cache", 1
INDEX = "index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("null", "prompts", "negatives")  # the null text is a set of one row
_OPEN = 256  # shards kept mapped
Encode = Callable[[list[str]], Conditioning]


@dataclass(frozen=True)
class Identity:
    """What a cache is of: SHA-256 of encoders and files ("" without negatives), and its storage."""

    encoders: str
    prompts: str
    negatives: str
    dtype: str
    shard_size: int


# In the words of a refusal: "holds a cache of another prompt file".
_OTHER = {
    "encoders": "other text encoders",
    "prompts": "another prompt file",
    "negatives": "another file of negatives",
    "dtype": "another dtype",
    "shard_size": "another shard size",
}


@dataclass(frozen=True)
class Sizes:
    """Of one text: tokens [length width], pooled [pooled] (0: none); masked: padding is hidden."""

    length: int
    width: int
    pooled: int
    masked: bool


@dataclass(frozen=True)
class Shard:
    """One file: how many texts and tokens it holds, its bytes and their SHA-256."""

    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What index.json says. counts: texts of each kind. sizes: None before the first shard."""

    identity: Identity
    counts: Mapping[str, int]
    sizes: Sizes | None
    shards: Mapping[str, Shard]
    format: str = FORMAT
    version: int = VERSION

    def plan(self) -> Iterator[tuple[str, str, range]]:
        """(file, kind, rows) of every shard of the whole cache."""
        size = self.identity.shard_size
        for kind in KINDS:
            count = self.counts.get(kind, 0)
            for start in range(0, count, size):
                yield _name(kind, start // size), kind, range(start, min(start + size, count))

    def missing(self) -> list[str]:
        """Files of shards that are not written yet."""
        return [name for name, _, _ in self.plan() if name not in self.shards]


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.safetensors"


def encoders_digest(model: Path) -> str:
    """SHA-256 of all that decides a model folder's embeddings: encoders, tokenizers, their use.

    Raises ValueError for a folder without one of them.
    """
    spec, _ = read_spec(model)
    digest = hashlib.sha256(json.dumps(spec.to_json()["text"], sort_keys=True).encode())
    for i in range(len(spec.text)):
        for name in (f"{text_part(i)}.safetensors", f"{tokenizer_folder(i)}/tokenizer.json"):
            digest.update(bytes.fromhex(_sha256(model / name)))
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


# --- the index ------------------------------------------------------------------------------------


def read_index(folder: Path) -> Index:
    """The index of a cache. Raises ValueError for a folder that is no cache of this version."""
    try:
        found = json.loads((folder / INDEX).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} is not a text cache: {INDEX}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{folder} is not a text cache: {INDEX} is not JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a text cache: {INDEX} is of another format")
    if found.get("version") != VERSION:
        got = found.get("version")
        raise ValueError(f"{folder}: expected text cache version {VERSION}, got {got!r}")
    try:
        index = Index(
            Identity(**found["identity"]),
            {str(kind): int(count) for kind, count in found["counts"].items()},
            None if found["sizes"] is None else Sizes(**found["sizes"]),
            {str(name): Shard(**shard) for name, shard in found["shards"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder} is not a text cache: {INDEX} is malformed") from None
    if index.identity.dtype not in DTYPES or index.identity.shard_size < 1:
        raise ValueError(f"{folder} is not a text cache: {INDEX} is malformed")
    return index


def _write_index(folder: Path, index: Index) -> None:
    content = json.dumps(dataclasses.asdict(index), indent=1) + "\n"
    write_atomically(folder / INDEX, content.encode())


def _refuse_other(folder: Path, found: Identity, wanted: Identity) -> None:
    """ValueError naming the first thing of which a cache is another's."""
    for name, what in _OTHER.items():
        is_, should = getattr(found, name), getattr(wanted, name)
        if is_ != should:
            raise ValueError(
                f"{folder} holds a cache of {what}: expected {_short(should)}, got {_short(is_)}"
            )


def _short(value: str | int) -> str:
    """A SHA-256 by its first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value or "-")


# --- writing --------------------------------------------------------------------------------------


def write(
    folder: Path,
    identity: Identity,
    counts: Mapping[str, int],
    texts: Callable[[str, range], list[str]],
    encode: Encode,
    *,
    batch: int = 32,
    say: Callable[[str], None] = lambda line: None,
) -> Index:
    """Write the shards of a cache that are not there yet.

    texts: the texts of some rows of a kind. encode: texts -> Conditioning, called with `batch` of
    them (the null text alone, as in training). Negatives may be added to a cache without.

    Raises:
        ValueError: the folder holds something else, or a cache of something else; a text's
            embedding is not finite.
        OSError: naming a file that cannot be written; finished shards stay.
    """
    with _locked(folder):
        index = _begin(folder, identity, counts)
        plan = list(index.plan())
        for number, (name, kind, rows) in enumerate(plan, 1):
            if name in index.shards:
                continue
            size = 1 if kind == "null" else batch
            tensors, sizes = _encoded(texts(kind, rows), encode, size, DTYPES[identity.dtype])
            assert index.sizes in (None, sizes), "an encoder's sizes do not change"
            shard = _write_shard(folder / name, tensors)
            shards = {**index.shards, name: shard}
            index = dataclasses.replace(index, sizes=sizes, shards=shards)
            _write_index(folder, index)
            say(f"{folder}: shard {number} of {len(plan)} ({name})")
        return index


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a cache's folder (made if absent) against a second writer."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is being written by another command") from None
            yield


def _begin(folder: Path, identity: Identity, counts: Mapping[str, int]) -> Index:
    """The index to go on from, in a folder that holds its shards and nothing half-written."""
    fresh = Index(identity, dict(counts), None, {})
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not there:
        index = fresh
    elif not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is not empty, and holds no text cache: choose another --out")
    else:
        index = read_index(folder)
        found = index.identity
        if not found.negatives:  # they may come later
            found = dataclasses.replace(found, negatives=identity.negatives)
        _refuse_other(folder, found, identity)
        whole = {n: s for n, s in index.shards.items() if _bytes(folder / n) == s.bytes}
        index = dataclasses.replace(fresh, sizes=index.sizes, shards=whole)
    _write_index(folder, index)
    for path in folder.iterdir():
        if path.name not in (INDEX, ".lock", *index.shards) and _is_ours(path.name):
            path.unlink()
    return index


def _is_ours(name: str) -> bool:
    """Whether a file is a shard or the index, or one of them under the name it is written by."""
    name = name.removeprefix(".")
    return name.startswith((INDEX, *(f"{kind}-" for kind in KINDS)))


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _encoded(
    texts: list[str], encode: Encode, batch: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Sizes]:
    """A shard's tensors: tokens [sum of lengths, k], offsets [rows + 1], crc [rows], pooled."""
    tokens, pooled, lengths = [], [], []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        # Always a whole batch: rounding depends on its size, and those of training are whole.
        cond = encode([*part, *([""] * (batch - len(part)))])
        sizes = Sizes(
            length=cond.tokens.shape[1],
            width=cond.width,
            pooled=0 if cond.pooled is None else cond.pooled.shape[1],
            masked=cond.mask is not None,
        )
        for row, text in enumerate(part):
            length = sizes.length if cond.mask is None else _length(cond.mask[row], text)
            tokens.append(_stored(cond.tokens[row, :length], dtype, text))
            lengths.append(length)
            if cond.pooled is not None:
                pooled.append(_stored(cond.pooled[row], dtype, text))
    crcs = [_crc(own, pooled[i] if pooled else None) for i, own in enumerate(tokens)]
    tensors = {
        "tokens": torch.cat(tokens),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "crc": torch.tensor(crcs, dtype=torch.int64),
    }
    return tensors | ({"pooled": torch.stack(pooled)} if pooled else {}), sizes


def _length(mask: Tensor, text: str) -> int:
    """How many tokens of a row are read; they come first, as tokenizers pad at the end."""
    length = int(mask.sum())
    if not bool(mask[:length].all()):
        raise ValueError(f"the tokenizer pads before the text: cannot cache {text[:60]!r}")
    return length


def _stored(value: Tensor, dtype: torch.dtype, text: str) -> Tensor:
    """A copy (not a view that keeps a whole batch) on the CPU in a cache's dtype, finite."""
    stored = value.to("cpu", dtype, copy=True)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"the embedding of {text[:60]!r} is not finite")
    return stored


def _crc(tokens: Tensor, pooled: Tensor | None) -> int:
    crc = zlib.crc32(_raw(tokens))
    return crc if pooled is None else zlib.crc32(_raw(pooled), crc)


def _raw(value: Tensor) -> Any:
    """A tensor's bytes, not copied if it is contiguous."""
    return value.contiguous().view(torch.uint8).numpy()


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> Shard:
    """Write a shard under another name, sync it, and only then give it its own."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            save_file(tensors, partial)
            partial.chmod(0o644)  # safetensors makes it readable by its owner alone
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            size = _bytes(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return Shard(len(tensors["crc"]), len(tensors["tokens"]), size, digest)


# --- reading --------------------------------------------------------------------------------------


class _Mapped(NamedTuple):
    """A shard that is mapped: only what is sliced is read."""

    file: Any
    offsets: list[int]
    crc: list[int]


class TextCache:
    """A finished cache, opened for a model folder and its files of texts.

    prompts, negatives: the files' SHA-256; negatives "" reads none. Opening compares the index,
    the encoders and every shard's size; `read` each row's CRC; `verify` every byte.

    Raises ValueError for a folder that is no cache, one that is not finished, or another's.
    """

    def __init__(self, folder: Path | str, model: Path, prompts: str, negatives: str = "") -> None:
        self.folder, self.model = Path(folder), Path(model)
        index = read_index(self.folder)
        if negatives and not index.identity.negatives:
            raise ValueError(f"{folder} was made without --negatives, which data.negatives needs")
        negatives = negatives or index.identity.negatives
        wanted = dataclasses.replace(index.identity, prompts=prompts, negatives=negatives)
        _refuse_other(self.folder, index.identity, wanted)  # before the encoders' many bytes
        encoders = encoders_digest(self.model)
        _refuse_other(self.folder, index.identity, dataclasses.replace(wanted, encoders=encoders))
        missing = index.missing()
        if missing or index.sizes is None:
            count = len(list(index.plan()))
            raise ValueError(
                f"{folder} is not finished: {len(missing)} of {count} shards are missing; "
                "the command that makes it goes on when called again"
            )
        for name, shard in index.shards.items():
            if _bytes(self.folder / name) != shard.bytes:
                got = max(0, _bytes(self.folder / name))
                raise ValueError(
                    f"{folder} is damaged: {name} has {got} of {shard.bytes} bytes; "
                    "the command that makes it replaces it when called again"
                )
        self.index, self.sizes = index, index.sizes
        self._open = functools.lru_cache(maxsize=_OPEN)(self._map)

    def read(self, kind: str, rows: Sequence[int]) -> Conditioning:
        """The texts of some rows of a kind, fp32 on the CPU, padded with zeros to full length.

        Padding is hidden by the mask, as the encoder's own was, so what a network makes of it is
        equal. Raises ValueError for a row whose bytes are not those that were written.
        """
        sizes = self.sizes
        tokens = torch.zeros(len(rows), sizes.length, sizes.width)
        mask = torch.zeros(len(rows), sizes.length, dtype=torch.bool)
        pooled = torch.zeros(len(rows), sizes.pooled)
        for i, row in enumerate(rows):
            assert 0 <= row < self.index.counts[kind]
            number, place = divmod(row, self.index.identity.shard_size)
            shard = self._open(_name(kind, number))
            start, end = shard.offsets[place : place + 2]
            own = shard.file.get_slice("tokens")[start:end]  # [n_i k]
            more = shard.file.get_slice("pooled")[place] if sizes.pooled else None
            if _crc(own, more) != shard.crc[place]:
                raise ValueError(
                    f"{self.folder} is damaged: row {place} of {_name(kind, number)} does not "
                    "have the CRC-32 noted for it"
                )
            tokens[i, : end - start], mask[i, : end - start] = own, True
            if more is not None:
                pooled[i] = more
        return Conditioning(
            tokens, mask if sizes.masked else None, pooled if sizes.pooled else None
        )

    def _map(self, name: str) -> _Mapped:
        try:
            file = safe_open(self.folder / name, framework="pt")
            offsets, crc = (file.get_tensor(key).tolist() for key in ("offsets", "crc"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder} is damaged: {name}: {error}") from None
        return _Mapped(file, offsets, crc)

    def encoders(self) -> list[nn.Module | None]:
        """The model folder's text encoders in fp32, for when they are needed after all."""
        spec, _ = read_spec(self.model)
        parts = (text_part(i) for i in range(len(spec.text)))
        return [load_part(self.model, spec, part, torch.float32, False) for part in parts]


def shards_digest(folder: Path, negatives: bool) -> str:
    """SHA-256 of all that a run reads of a cache, which may hold negatives that it does not."""
    noted = [
        (name, shard.sha256)
        for name, shard in sorted(read_index(folder).shards.items())
        if negatives or not name.startswith("negatives-")
    ]
    return hashlib.sha256(json.dumps(noted).encode()).hexdigest()


def verify(folder: Path) -> Index:
    """Read every byte of a cache's shards; its index.

    Raises ValueError naming the first shard that is not as it was written.
    """
    index = read_index(folder)
    for name, shard in index.shards.items():
        if _sha256(folder / name) != shard.sha256:
            raise ValueError(
                f"{folder} is damaged: {name} does not have the SHA-256 noted for it; "
                "remove it and call the command that makes it again"
            )
    return index
