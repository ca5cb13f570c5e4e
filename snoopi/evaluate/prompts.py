"""Prompts to draw pictures of, from files in the forms that benchmarks have."""

from __future__ import annotations

import json
from pathlib import Path

from snoopi.data import TextFile
from snoopi.evaluate.hpsv2 import is_text, read_list


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in its order.

    .txt: one a line; .jsonl: objects with a prompt; .json: a list of texts (HPSv2's benchmark), or
    {"labels": [[file, caption], ...]} (the COCO-30K line's dataset.json). Raises ValueError, naming
    the file, for anything else.
    """
    if path.suffix not in (".txt", ".jsonl", ".json"):
        raise ValueError(f"--prompts: expected a .txt, .jsonl or .json file, got {path}")
    if path.suffix != ".json":
        file = TextFile(path, "--prompts")
        return file.texts(range(len(file)))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        return read_list(path)
    if not isinstance(found, list) or not found or not all(map(_is_label, found)):
        raise ValueError(f"{path}: labels must be a list of [file, caption] texts")
    return [caption for _, caption in found]


def _is_label(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2 and is_text(row[1])
