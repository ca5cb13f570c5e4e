"""Prompts of one's own for distillation (data.prompts, data.negatives), and their cache.

A .txt file has one text a line, a .jsonl file one object {"prompt": text} a line; blank lines do
not count. Sample n of a run (step * batch + place in the batch) reads one prompt, each prompt once
an epoch, in an order that is a function of the run's seed and the epoch alone. Its negative is
drawn anew at each step.

python -m snoopi.data cache MODEL PROMPTS --out FOLDER
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import warnings
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path

from snoopi import errors

if __name__ == "__main__":
    errors.leave_on_signals("snoopi.data")  # the imports below take seconds

import numpy as np
import torch

from snoopi import textcache
from snoopi.conditioning import Conditioning
from snoopi.folders import shipped_or_path
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline, load
from snoopi.tokenize import PromptCut

SUFFIXES = (".txt", ".jsonl")
STREAM = "prompts.order"
_BOM = b"\xef\xbb\xbf"
_TOLD = 10_000  # texts that are looked at for words that are not read


# --- files of texts -------------------------------------------------------------------------------


class TextFile:
    """The texts of a file, by row. They stay on disk: of millions, memory holds the places alone.

    key: what a message calls the file. digest: SHA-256 of its content.

    Raises ValueError, on one line, for a file that is missing, of another kind, not UTF-8, or
    without a text, and for a line of a .jsonl file that is not an object with a prompt.
    """

    def __init__(self, path: Path | str, key: str) -> None:
        self.path, self.key = Path(path), key
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"{key}: expected a {' or '.join(SUFFIXES)} file, got {path}")
        try:
            self._file = self.path.open("rb")
            weakref.finalize(self, self._file.close)
            self._places, self._lengths, self.digest = self._scan()
            self._stamp = self._now()
        except OSError as error:
            raise ValueError(f"{key}: cannot read {path}: {error.strerror}") from None
        if not self._places:
            raise ValueError(f"{key}: {path} holds no prompt, expected at least one")

    def __len__(self) -> int:
        return len(self._places)

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of some rows. Raises ValueError if the file was changed since it was opened."""
        found = [self._text(self._line(row)) or "" for row in rows]
        if self._now() != self._stamp:
            self._stamp = self._now()
            self._file.seek(0)
            if hashlib.file_digest(self._file, "sha256").hexdigest() != self.digest:
                raise ValueError(f"{self.key}: {self.path} was changed while it was in use")
        return found

    def _line(self, row: int) -> bytes:
        # Not a memory map: to read one of a file that was cut short ends the process.
        return os.pread(self._file.fileno(), self._lengths[row], self._places[row])

    def _now(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def _scan(self) -> tuple[array[int], array[int], str]:
        """Place and length in bytes of every line that holds a text, and the file's SHA-256."""
        places, lengths, digest, place = array("q"), array("q"), hashlib.sha256(), 0
        # Lines end at LF alone: JSON allows other separators within a text.
        for number, line in enumerate(self._file, 1):
            digest.update(line)
            start = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if self._holds_text(number, line[start:]):
                places.append(place + start)
                lengths.append(len(line) - start)
            place += len(line)
        return places, lengths, digest.hexdigest()

    def _holds_text(self, number: int, line: bytes) -> bool:
        try:
            shown = line.decode().strip()
        except UnicodeDecodeError:
            where = f"{self.path} is not UTF-8 text: see line {number}"
            raise ValueError(f"{self.key}: {where}") from None
        if shown and self._text(line) is None:
            raise ValueError(
                f"{self.key}: {self.path}, line {number}: "
                f'expected {{"prompt": "text"}}, got {shown:.60}'
            )
        return bool(shown)

    def _text(self, line: bytes) -> str | None:
        """The text of a line; None of a line without one."""
        text = line.decode(errors="replace").strip()
        return (_prompt(text) if self.path.suffix == ".jsonl" else text) or None


def _prompt(line: str) -> str | None:
    """The prompt of one line of a .jsonl file, None if it is not an object with one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    return prompt.strip() if isinstance(prompt, str) else None


class PromptList(TextFile):
    """The prompts of a file (data.prompts), by global sample index."""

    def __init__(self, path: Path | str, noise: Noise) -> None:
        super().__init__(path, "data.prompts")
        self._noise = noise
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)  # a batch spans two epochs

    def __getitem__(self, sample: int) -> str:
        """The prompt of global sample index `sample`, which has no upper end."""
        return self.texts([self._row(sample)])[0]

    def rows(self, step: int, batch: int, indices: Sequence[int]) -> list[int]:
        """Rows of samples `indices` of step `step`, whose global batch has `batch` samples."""
        return [self._row(step * batch + index) for index in indices]

    def batch(self, step: int, batch: int, indices: Sequence[int]) -> list[str]:
        """The prompts in `rows`."""
        return self.texts(self.rows(step, batch, indices))

    def _row(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self))
        return int(self._order(epoch)[place])

    def _draw_order(self, epoch: int) -> np.ndarray:
        numbers = self._noise.generator(STREAM, epoch, 0).random(len(self))
        return np.argsort(numbers, kind="stable")


class NegativeList(TextFile):
    """The negative prompts of a file (data.negatives): any of them for any sample."""

    def __init__(self, path: Path | str, noise: Noise) -> None:
        super().__init__(path, "data.negatives")
        self._noise = noise

    def rows(self, step: int, indices: Sequence[int]) -> list[int]:
        """A row for each of samples `indices` of step `step`, drawn alike from all."""
        return self._noise.integers("negatives", step, indices, 0, len(self)).tolist()

    def batch(self, step: int, indices: Sequence[int]) -> list[str]:
        """The negative prompts in `rows`."""
        return self.texts(self.rows(step, indices))


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's content, as TextFile.digest."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unread(file: TextFile, model: Pipeline) -> list[str]:
    """Lines that say what a model does not read of the first texts of a file.

    Words that its vocabulary lacks, and what lies beyond its tokenizers' length.
    """
    lines, first = [], file.texts(range(min(_TOLD, len(file))))  # of millions they tell it as well
    for spec, tokenizer in zip(model.spec.text, model.tokenizers, strict=True):
        if tokenizer is None:
            continue
        texts = [spec.prepare(text) for text in first]
        words = sorted({word for text in texts for word in tokenizer.unknown(text)})
        if words:
            more = f" and {len(words) - 10} more" if len(words) > 10 else ""
            lines.append(f"{file.path}: not in the vocabulary: {', '.join(words[:10])}{more}")
        cut = [line for text in texts if (line := tokenizer.cut(text)) is not None]
        if cut:
            lines.append(f"{file.path}: {len(cut)} of its first {len(texts)} prompts: {cut[0]}")
    return lines


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    options = _parser().parse_args(arguments)
    return errors.status("snoopi.data", lambda: _cache(options))


def _cache(options: argparse.Namespace) -> None:
    """Write a cache, or what of it is not there yet."""
    for name in ("batch", "shard_size"):
        if getattr(options, name) < 1:
            got = getattr(options, name)
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {got}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    model = shipped_or_path(options.model)
    files = {"prompts": TextFile(options.prompts, "PROMPTS")}
    if options.negatives:
        files["negatives"] = TextFile(options.negatives, "--negatives")
    digests = {kind: file.digest for kind, file in files.items()}
    identity = textcache.Identity(
        encoders=textcache.encoders_digest(model),
        prompts=digests["prompts"],
        negatives=digests.get("negatives", ""),
        dtype=options.dtype,
        shard_size=options.shard_size,
    )
    # In fp32, as a run encodes on the fly; the networks that make pictures are not needed.
    pipeline = load(model, options.device, torch.float32, without=("backbone", "vae"))
    for file in files.values():
        for line in unread(file, pipeline):
            _say(line)

    def texts(kind: str, rows: range) -> list[str]:
        return [""] if kind == "null" else files[kind].texts(rows)

    @torch.no_grad()
    def encode(prompts: list[str]) -> Conditioning:
        return pipeline.encode(prompts)

    counts = {"null": 1, **{kind: len(file) for kind, file in files.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)  # `unread` has told it
        index = textcache.write(
            options.out, identity, counts, texts, encode, batch=options.batch, say=_say
        )
    if options.verify:
        textcache.verify(options.out)
        print(f"verified {options.out}: every shard has its SHA-256")
    print(f"wrote {options.out}: {_figures(index)}")


def _figures(index: textcache.Index) -> str:
    """How much a cache holds, and what packing and its dtype save."""
    sizes, shards = index.sizes, index.shards.values()
    assert sizes is not None
    rows, held = sum(s.rows for s in shards), sum(s.bytes for s in shards)
    tokens = sum(s.tokens for s in shards)
    whole = 4 * rows * (sizes.length * sizes.width + sizes.pooled)
    return (
        f"{rows} texts, {tokens} of {rows * sizes.length} tokens, {held / 1e6:.1f} MB in "
        f"{index.identity.dtype} ({held / whole:.0%} of every token in fp32)"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(prog="snoopi.data", description="What training reads.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help = "compute the text embeddings of a file of prompts once (data.cache)"
    formatter = argparse.ArgumentDefaultsHelpFormatter
    cache = commands.add_parser("cache", help=help, description=help, formatter_class=formatter)
    add = cache.add_argument
    add("model", metavar="MODEL", help="a model folder: its text encoders and tokenizers are read")
    add("prompts", metavar="PROMPTS", type=Path, help=".txt (one a line) or .jsonl (key prompt)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the cache; a killed command goes on",
    )
    add("--negatives", type=Path, metavar="FILE", help="a file of negative prompts, cached, too")
    add("--batch", type=int, default=32, metavar="N", help="texts encoded at once")
    add("--dtype", choices=list(textcache.DTYPES), default="bf16", help="of the stored numbers")
    add("--shard-size", type=int, default=2048, metavar="N", help="texts in one file")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run the encoders")
    add("--verify", action="store_true", help="read every byte again and compare the checksums")
    return parser


if __name__ == "__main__":
    sys.exit(main())
