"""The comparisons as a user starts and stops them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snoopi.reproduce.jobs import Runner
from snoopi.reproduce.records import Records
from snoopi.reproduce.units import Negatives, Teacher, Train, Unit

pytestmark = pytest.mark.e2e

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def reproduce(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "snoopi.reproduce", *words],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_comparison_is_stopped_resumed_and_read_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["recipes", "debug", "--seeds", "0", "1", "--jobs", "2", "--out", str(out)]
    words += ["evaluate.every=8", "evaluate.prompts=12", "run.save=2"]
    first = reproduce(*words)
    metrics = out / "debug-seed0" / "metrics.jsonl"
    for _ in range(2400):
        if metrics.is_file() and metrics.read_text().count("\n") >= 4:
            break
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "snoopi.reproduce: SIGTERM: stopped"
    assert (out / "debug_teacher" / "model").is_dir()  # trained once, before both
    assert not (out / "recipes.json").exists()

    again = reproduce(*words)
    text, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    results = json.loads((out / "recipes.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    assert results["runs"][0]["evaluations"] == 3  # steps 8, 16 and the end
    assert results["recipes"][0]["frechet_sd"] > 0 and "debug, seed 1" in text

    begun = time.time()
    third = reproduce(*words)  # nothing to train: the same table from what is there
    assert third.communicate(timeout=120)[0] == text and third.returncode == 0
    assert (out / "debug-seed1" / "summary.json").stat().st_mtime < begun


@pytest.mark.slow
def test_units_are_run_recorded_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ("run.steps=4", "run.batch=2", "evaluate.prompts=6", "evaluate.every=2")
    run = Train("debug", 0, words)
    units: list[Unit] = [
        run,
        Negatives(run, "nasa", 0.5, 2),
        Negatives(run, "auto-mass-centred", 0.5, 2),
        Teacher("shapes_teacher", (2.0, 5.0), 0, 2, 8),
    ]
    path, out = tmp_path / "runs.jsonl", tmp_path / "out"
    runner = Runner(out, 2, Records(path))
    runner.run(units)
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and "4/4" in capsys.readouterr().out
    records = Records(path)
    trained = records.figures(run)
    assert trained is not None and [look["step"] for look in trained["curve"]] == [2, 4]
    assert trained["frechet"] == pytest.approx(
        sum(look["frechet"] for look in trained["curve"]) / 2, rel=1e-5
    )
    removed = records.figures(units[1])
    assert removed is not None and removed["n"] == 2 * 5 and removed["scale"] == 0.5
    Runner(out, 2, records).run(units)
    assert path.read_text().splitlines() == lines and capsys.readouterr().out == ""
    # A run whose line is lost is noted again from its folder, not trained again.
    path.write_text("\n".join(line for line in lines if '"kind": "train"' not in line) + "\n")
    begun = (out / run.folder / "summary.json").stat().st_mtime
    Runner(out, 2, Records(path)).run(units)
    assert Records(path).figures(run) == trained
    assert (out / run.folder / "summary.json").stat().st_mtime == begun


@pytest.mark.slow
def test_a_unit_that_fails_is_one_line(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "out", 1, Records(tmp_path / "runs.jsonl"))
    with pytest.raises(ValueError, match=r"snoopi\.train.*ended with status 2"):
        runner.run([Train("debug", 0, ("run.steps=4", "model.student_init=nowhere"))])
    assert not (tmp_path / "runs.jsonl").exists()
