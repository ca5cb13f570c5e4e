"""Figures of units as JSON lines: written as they come, read back, never measured twice."""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from snoopi.errors import writing
from snoopi.provenance import commit, machine
from snoopi.reproduce.units import Unit

KEYS = ("key", "kind", "unit", "figures", "seconds", "commit", "machine")


class Records:
    """The lines of a file by their units' keys; a later line of the same key counts.

    Each line: key, kind, unit (what was run), figures, and where it comes from: seconds, date,
    commit, machine. Raises ValueError, naming the line, for a file that is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            row = _parse(line)
            if row is None:
                raise ValueError(f"{path}: line {number} is not a record: remove it or the file")
            self._rows[row["key"]] = row

    def __contains__(self, unit: Unit) -> bool:
        return unit.key in self._rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def figures(self, unit: Unit) -> dict[str, Any] | None:
        """A unit's figures, None if it has not been run."""
        row = self._rows.get(unit.key)
        return None if row is None else row["figures"]

    def add(
        self,
        unit: Unit,
        figures: Mapping[str, Any],
        seconds: float,
        threads: int,
        made_at: str | None = None,
    ) -> None:
        """Append a unit's line at once, from any thread. made_at: the commit, if not this one."""
        row: dict[str, Any] = {
            "key": unit.key,
            "kind": unit.kind,
            "unit": unit.plain(),
            "figures": dict(figures),
            "seconds": round(seconds, 1),
            "date": datetime.date.today().isoformat(),
            "commit": made_at or commit(),
            "machine": machine(threads),
        }
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path), self.path.open("ab", buffering=0) as file:
                start, rest = file.tell(), memoryview(line)
                try:
                    while rest:  # a disk that is nearly full takes a part
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(start)
                    raise
            self._rows[row["key"]] = row


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and all(key in row for key in KEYS)
    return row if whole else None
