"""Removal by negative prompts on real models (SNOOPI Tab. 3 and 7): pairs, pictures, a CLIP judge.

A pair is a prompt and a negative; its pictures are drawn with and without the negative from the
same noise. The paper had people say which pictures are free of what the negative names; here a CLIP
does: a picture shows it if, of the texts compared, the one that names it is the most similar.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from snoopi.evaluate.picture_sets import Job, Row
from snoopi.evaluate.removal import wilson

PAPER = Path(__file__).with_name("removal_pairs.jsonl")  # the six pairs of Tab. 7
COUNT = 100  # pictures a pair
SCALE = 0.5  # NASA's strength there
_KEYS = ("prompt", "negative", "shows", "others")


class Pair(NamedTuple):
    """A prompt, its negative, the text of what must go, and texts of what may be there instead."""

    prompt: str
    negative: str
    shows: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    """Pictures of n that are free of what the negative names, with Wilson's 95 % interval."""

    free: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, free: int, n: int) -> Rate:
        """Of counts."""
        return cls(free / n, *wilson(free, n), n)


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a .jsonl file. Raises ValueError, naming file and line, for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    pairs = [_pair(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise ValueError(f"{path} holds no pair")
    if len({pair[:2] for pair in pairs}) < len(pairs):
        raise ValueError(f"{path} holds the same prompt and negative twice")
    return pairs


def _pair(line: str, where: str) -> Pair:
    try:
        data = json.loads(line)
        found = Pair(*(data[key] for key in _KEYS))
        texts = [*found[:3], *found.others]
        good = isinstance(found.others, list) and found.others
        good = good and all(isinstance(text, str) and text for text in texts)
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise ValueError(
            f'{where}: expected {{"prompt": text, "negative": text, "shows": text, '
            f'"others": [text, ...]}}, got {line:.60}'
        )
    return found._replace(others=tuple(found.others))


def jobs(pairs: Sequence[Pair], count: int) -> list[Job]:
    """Pictures of every prompt without a negative, and of every pair; noise 0 to count - 1."""
    found = {}
    for number, pair in enumerate(pairs):
        before = [p.prompt for p in pairs].index(pair.prompt)  # one set for all its negatives
        for index in range(count):
            for folder, negative in (
                (f"before-{before}", None),
                (f"after-{number}", pair.negative),
            ):
                name = f"{folder}/{index:05d}.png"
                found[name] = Job(name, pair.prompt, negative, index)
    return list(found.values())


def pictures(rows: Sequence[Row], pair: Pair, negative: str | None) -> list[Path]:
    """The pictures of a pair without its negative (None), or with it.

    Raises ValueError if there is none.
    """
    found = [row.file for row in rows if (row.prompt, row.negative) == (pair.prompt, negative)]
    if not found:
        how = "without a negative" if negative is None else f"with the negative {negative!r}"
        raise ValueError(f"the pictures hold none of {pair.prompt!r} {how}")
    return found


def free(embeddings: Tensor, texts: Tensor) -> int:
    """How many pictures [n k] are most similar to another than the first of the texts [m k]."""
    return int(((embeddings @ texts.T).argmax(1) != 0).sum())
