"""Prompts of one's own for distillation (data.prompts): a text file, in an order that is no state.

A .txt file has one prompt a line, a .jsonl file one object {"prompt": text} a line; blank lines do
not count. Sample n of a run (step * batch + place in the batch) reads one prompt, each prompt once
an epoch, in an order that is a function of the run's seed and the epoch alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from snoopi.noise import Noise

SUFFIXES = (".txt", ".jsonl")
STREAM = "prompts.order"


class PromptList:
    """The prompts of a file, by global sample index.

    Raises ValueError, on one line, for a file that is missing, of another kind, not UTF-8, or
    without a prompt, and for a line of a .jsonl file that is not an object with a prompt.
    """

    def __init__(self, path: Path | str, noise: Noise) -> None:
        self.path, self._noise = Path(path), noise
        content = _content(self.path)
        self.prompts = _prompts(self.path, content)
        self.digest = hashlib.sha256(content).hexdigest()
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)  # a batch spans two epochs

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, sample: int) -> str:
        """The prompt of global sample index `sample`, which has no upper end."""
        epoch, place = divmod(sample, len(self.prompts))
        return self.prompts[self._order(epoch)[place]]

    def batch(self, step: int, batch: int, indices: Sequence[int]) -> list[str]:
        """Prompts of samples `indices` of step `step`, whose global batch has `batch` samples."""
        return [self[step * batch + index] for index in indices]

    def _draw_order(self, epoch: int) -> list[int]:
        numbers = self._noise.generator(STREAM, epoch, 0).random(len(self.prompts))
        return np.argsort(numbers, kind="stable").tolist()


def _content(path: Path) -> bytes:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"data.prompts: expected a {' or '.join(SUFFIXES)} file, got {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data.prompts: cannot read {path}: {error.strerror}") from None


def _prompts(path: Path, content: bytes) -> tuple[str, ...]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"data.prompts: {path} is not UTF-8 text: see line {line}") from None
    # Not splitlines: it would also cut at characters that JSON allows within a text.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    read = _object if path.suffix == ".jsonl" else _line
    prompts = tuple(read(path, number, line) for number, line in lines if line)
    if not prompts:
        raise ValueError(f"data.prompts: {path} holds no prompt, expected at least one")
    return prompts


def _line(path: Path, number: int, line: str) -> str:
    return line


def _object(path: Path, number: int, line: str) -> str:
    """The prompt of one line of a .jsonl file."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f'data.prompts: {path}, line {number}: expected {{"prompt": "text"}}, got {line:.60}'
        )
    return prompt.strip()
