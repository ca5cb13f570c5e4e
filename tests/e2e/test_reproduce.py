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
