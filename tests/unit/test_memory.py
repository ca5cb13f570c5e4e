"""benchmarks.memory on toys: its rows, its page, and what stops it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import memory
from snoopi import config as recipes
from snoopi import plan, zoo


class Said(NamedTuple):
    """A process that has ended, and what it has printed."""

    text: str
    returncode: int = 0

    def communicate(self) -> tuple[str, None]:
        return self.text, None

    def kill(self) -> None:
        pass


@pytest.mark.slow
def test_planned_rows_and_their_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "RECIPES", {"debug": "debug"})
    monkeypatch.setattr(plan, "RANKS", (1, 4, 64))
    assert memory.main(["--part", "plan", "--out", str(tmp_path / "page.md")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:6] == "debug "]
    assert [row[1] for row in rows] == ["yes", "no"]
    # Batch, then 1, 2, 4, 8 and 64 ranks: 64 do not divide a batch of 8.
    assert all(row[2] == "8" and row[7] == "-" and "-" not in (row[3], row[5]) for row in rows)
    page = (tmp_path / "page.md").read_text()
    assert "python -m benchmarks.memory --part plan" in page and "a dash: the ranks" in page
    (row,) = [row for row in memory.planned() if not row["checkpointing"]]
    config = recipes.load("debug")
    assert row["peaks"][4] == plan.plan(zoo.model("debug"), config, 4).peak
    assert row["one_by_one"] < row["peaks"][1]


def test_another_number_than_the_plans_is_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("student", "teacher pair", "optimizer moments", "moving average")
    row: dict[str, Any] = {"shape": "pgsb_sd15", "ranks": 8, "planned": dict.fromkeys(parts, 8)}
    row["found"] = {**row["planned"], "student": 9}
    monkeypatch.setattr(memory, "_child", lambda *_: Said(json.dumps(row)))
    assert memory.main(["--part", "shards"]) == 1
    assert "pgsb_sd15 on 8 ranks: planned and found" in capsys.readouterr().err
    monkeypatch.setattr(memory, "_child", lambda *_: Said("", returncode=1))
    with pytest.raises(memory.common.WrongResult, match="a rank of 2 failed"):
        memory._resident(Path("m"), True, 2)


@pytest.mark.slow
def test_the_first_of_64_ranks_holds_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RECIPES", {"pgsb_sd15": "sd15"})
    monkeypatch.setattr(memory, "PRETENDED", (64,))
    (row,) = memory.sharded()
    assert row["found"] == row["planned"] and row["found"]["student"] > 10**7


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident sets: Linux")
def test_two_gloo_ranks_take_what_the_plan_says(tmp_path: Path) -> None:
    spec = memory.small("dit")
    memory._pipeline(spec).save(tmp_path / "m")
    planned = plan.plan(spec, memory.recipe(True), 2).peak
    for found in memory._resident(tmp_path / "m", True, 2):
        assert found["measured"] - found["libraries"] == pytest.approx(planned, rel=0.15)
