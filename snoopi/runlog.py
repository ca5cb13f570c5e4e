"""A run's log: metrics.jsonl (one object a logged step), the line that shows progress, and, with
the package tensorboard, the same figures as TensorBoard's events.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from snoopi.errors import writing

# What the progress line shows, in this order, if a row has it: key of the row, short name.
_SHOWN = {
    "loss": "loss",
    "loss_vsd": "vsd",
    "loss_lora": "lora",
    "grad_norm": "|g|",
    "grad_norm_student": "|g|",
    "grad_norm_lora": "|g lora|",
    "gap": "gap",
    "kappa_mean": "kappa",
    "images_per_s": "img/s",
}


class RunLog:
    """Appends rows to `metrics.jsonl` and shows progress on stderr; does nothing on ranks above 0.

    On a terminal the progress line is redrawn in place; elsewhere a line is printed at most every
    `interval` seconds. Each row is written at once, so a killed run loses none.

    Args:
        path: the file; its folder must exist. None: no file, progress only.
        total: steps of the run.
        resumed: step of the run state that was loaded, 0 for a new run. Rows of later steps, and a
            torn last line, are removed, so that each step appears once.
        main: whether this is rank 0.
        tensorboard: folder of TensorBoard's event files, for the numbers of each row. None: none.

    Raises:
        ValueError: the file has rows and the run was not resumed, or a row is not one of ours; or
            the package tensorboard is missing.
        OSError: naming the file, here and in `write`, for example on a full disk.
    """

    def __init__(
        self,
        path: Path | None,
        total: int,
        *,
        resumed: int = 0,
        main: bool = True,
        interval: float = 15.0,
        stream: TextIO | None = None,
        tensorboard: Path | None = None,
    ) -> None:
        self.total = total
        self._main, self._interval = main, interval
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        self._start, self._first, self._shown = time.monotonic(), resumed, -math.inf
        self._width = 0
        self._path = path
        self._file: Any = None  # a raw binary file
        self._board: Any = None  # a SummaryWriter
        self._board_folder = tensorboard
        if main and path is not None:
            with writing(path):
                _keep_rows(path, resumed)
                # Unbuffered: what a full disk refused must not be tried again at exit.
                self._file = path.open("ab", buffering=0)
        if main and tensorboard is not None:
            # Steps from here on are written anew: TensorBoard drops what it has of them.
            purge = resumed + 1 if resumed else None
            with writing(tensorboard):
                self._board = event_writer()(str(tensorboard), purge_step=purge)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append {"step": step, **row} and show progress; values: numbers, text, scalar tensors."""
        if not self._main:
            return
        plain = {"step": step, **{name: _plain(value) for name, value in row.items()}}
        if self._file is not None:
            # Python would write NaN and Infinity, which are not JSON.
            safe = {name: _jsonable(value) for name, value in plain.items()}
            self._append(json.dumps(safe, allow_nan=False).encode() + b"\n")
        if self._board is not None and self._board_folder is not None:
            with writing(self._board_folder):
                for name, value in plain.items():
                    if name != "step" and isinstance(value, int | float):
                        self._board.add_scalar(name, value, step)
                self._board.flush()  # a killed run loses no row here either
        self.show(step, plain)

    def _append(self, line: bytes) -> None:
        """Write a row; a file system that takes a part of it says why at the next try."""
        assert self._file is not None and self._path is not None
        with writing(self._path):
            while line:
                line = line[self._file.write(line) :]

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Draw or print the progress line; the last step is always shown."""
        now = time.monotonic()
        if not self._main or (
            not self._tty and step < self.total and now - self._shown < self._interval
        ):
            return
        self._shown = now
        line = progress_line(step, self.total, row, self._seconds_left(step, now))
        if self._tty:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line of its own on rank 0, below the progress line if there is one."""
        if self._main:
            self._stream.write(("\n" if self._width else "") + text + "\n")
            self._stream.flush()
            self._width = 0

    def close(self) -> None:
        """End the progress line and put the rows on disk."""
        if self._width:
            self._stream.write("\n")
            self._width = 0
        board, self._board = self._board, None
        if board is not None:
            board.close()
        file, self._file = self._file, None
        if file is not None:
            with file:
                os.fsync(file.fileno())

    def _seconds_left(self, step: int, now: float) -> float:
        done = step - self._first
        return (now - self._start) / done * (self.total - step) if done > 0 else math.nan


def event_writer() -> Any:
    """torch's SummaryWriter.

    Raises:
        ValueError: the package tensorboard, which it needs, is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "run.tensorboard: expected the package tensorboard, which is not installed: "
            "pip install 'snoopi[tensorboard]'"
        ) from None
    return SummaryWriter


def progress_line(step: int, total: int, row: Mapping[str, Any], seconds_left: float) -> str:
    """One line: step, the row's known figures, time left."""
    figures = [f"{name} {row[key]:.4g}" for key, name in _SHOWN.items() if key in row]
    left = "" if math.isnan(seconds_left) else f"  left {_clock(seconds_left)}"
    return f"{step:>{len(str(total))}}/{total}  " + "  ".join(figures) + left


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn last line (of a run that is being written) is left out.

    Raises:
        ValueError: any other line is not a JSON object with a step.
    """
    return _rows(path)[0]


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows, the byte at which each row ends)."""
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}: line {number} is not a row of a run's metrics")
        rows.append(row)
        ends.append(end)
    return rows, ends


def _keep_rows(path: Path, step: int) -> None:
    """Cut off rows of steps after `step`."""
    if not path.exists():
        return
    rows, ends = _rows(path)
    if rows and step == 0:
        raise ValueError(f"{path} holds an earlier run: resume it, or choose another folder")
    kept = sum(row["step"] <= step for row in rows)
    # Rows are written in order of steps, so the rows to keep come first.
    with path.open("r+b") as file:
        file.truncate(ends[kept - 1] if kept else 0)


def _plain(value: Any) -> Any:
    """Scalar tensors and numpy scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
