"""The log of a run: every step once, whatever interrupted it."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from snoopi import runlog
from snoopi.runlog import RunLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(path: Path, steps: range, *, resumed: int = 0) -> None:
    with RunLog(path, 100, resumed=resumed, stream=io.StringIO()) as log:
        for step in steps:
            log.write(step, {"loss_vsd": torch.tensor(0.5 * step)})


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "m.jsonl", 3, stream=io.StringIO())
    log.write(1, {"loss": 0.25, "note": "x"})
    assert runlog.read(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.25, "note": "x"}]
    log.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b'{"step": 6}\n{"st'])
def test_resuming_leaves_each_step_once(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 6))
    with path.open("ab") as file:
        file.write(torn)
    write(path, range(4, 9), resumed=3)
    assert [row["step"] for row in runlog.read(path)] == list(range(1, 9))


def test_resuming_before_the_first_row_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(10, 20, 5))
    write(path, range(6, 8), resumed=5)
    assert [row["step"] for row in runlog.read(path)] == [6, 7]


def test_a_new_run_does_not_append_to_an_old_one(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", range(1, 3))
    with pytest.raises(ValueError, match="earlier run"):
        write(tmp_path / "m.jsonl", range(1, 3))


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        write(tmp_path / "m.jsonl", range(4, 5), resumed=3)


def test_rows_stay_json_when_a_loss_is_not_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path / "m.jsonl", 9, stream=io.StringIO()) as log:
        log.write(1, {"loss": float("nan"), "grad_norm": float("inf")})
    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": "nan", "grad_norm": "inf"}


def test_other_ranks_write_and_show_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with RunLog(tmp_path / "m.jsonl", 9, main=False, stream=stream) as log:
        log.write(1, {"loss": 1.0})
        log.say("hello")
    assert not stream.getvalue() and not (tmp_path / "m.jsonl").exists()


class StubWriter:
    """What RunLog asks of torch's SummaryWriter."""

    made: ClassVar[list[StubWriter]] = []

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = self.closed = 0
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("resumed", [0, 4])
def test_tensorboard_gets_the_numbers_of_every_row(
    resumed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = types.ModuleType("stub")
    stub.SummaryWriter = StubWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    folder = tmp_path / "tensorboard"
    how: dict[str, Any] = {"stream": io.StringIO(), "tensorboard": folder}
    with RunLog(tmp_path / "m.jsonl", 9, main=False, **how) as log:
        log.write(1, {"loss": 1.0})
    assert not StubWriter.made, "of rank 0 alone"
    with RunLog(tmp_path / "m.jsonl", 9, resumed=resumed, **how) as log:
        log.write(5, {"loss": torch.tensor(0.5), "warning": "text", "count": 3})
        (writer,) = StubWriter.made
        assert writer.flushed == 2 and not writer.closed
    StubWriter.made.clear()
    assert writer.folder == str(folder) and writer.closed == 1
    assert writer.purge_step == (5 if resumed else None)
    assert writer.scalars == [("loss", 0.5, 5), ("count", 3, 5)]


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'snoopi\[tensorboard\]'"):
        RunLog(tmp_path / "m.jsonl", 9, tensorboard=tmp_path / "tensorboard")


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    for resumed, steps in ((0, range(1, 6)), (3, range(4, 7))):
        with RunLog(
            tmp_path / "m.jsonl", 9, resumed=resumed, stream=io.StringIO(), tensorboard=folder
        ) as log:
            for step in steps:
                log.write(step, {"loss": step + resumed / 10})
    found = EventAccumulator(str(folder)).Reload().Scalars("loss")
    values = [1.0, 2.0, 3.0, 4.3, 5.3, 6.3]
    assert [event.step for event in found] == list(range(1, 7))
    assert [event.value for event in found] == pytest.approx(values)


def test_without_a_terminal_a_line_at_most_every_interval_and_the_last(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(None, 9, interval=3600, stream=stream) as log:
        for step in range(1, 10):
            log.write(step, {"loss_vsd": 1.0, "kappa_mean": 2.25})
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1/9", "9/9"]
    assert "vsd 1" in lines[0] and "kappa 2.25" in lines[0] and "left" in lines[0]


def test_on_a_terminal_the_line_is_redrawn_over_longer_ones() -> None:
    stream = Terminal()
    with RunLog(None, 9, stream=stream) as log:
        log.write(1, {"loss": 0.123456})
        log.write(2, {"loss": 1.0})
        log.say("saved")
    drawn = stream.getvalue().split("\n")[0].split("\r")[1:]
    assert len(drawn) == 2 and len(drawn[1]) >= len(drawn[0].rstrip())
    assert stream.getvalue().endswith("\nsaved\n")


def test_progress_line_shows_time_left() -> None:
    line = runlog.progress_line(7, 100, {"step": 7, "loss": 0.5, "other": 3.0}, 3725.0)
    assert line == "  7/100  loss 0.5  left 1:02:05"
