"""Units as processes: what is missing is trained or measured, several at once, and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from snoopi import config as recipes
from snoopi.config import Config
from snoopi.folders import shipped
from snoopi.reproduce.records import Records
from snoopi.reproduce.units import Teacher, Train, Unit, students, unique
from snoopi.runlog import read

T = TypeVar("T")
R = TypeVar("R")
CURVE = ("step", "frechet", "all_right", "precision", "recall")  # of a look during a run


class Processes:
    """`python -m` in processes, up to `jobs` at once; they share the cores."""

    def __init__(self, jobs: int) -> None:
        shared = max(1, (os.cpu_count() or 1) // jobs)
        threads = os.environ.get("OMP_NUM_THREADS", "") or str(shared)
        if not threads.isdecimal() or not int(threads):
            raise ValueError(f"OMP_NUM_THREADS must be a number of threads, got {threads!r}")
        self.jobs, self.threads = jobs, int(threads)
        self._children: list[subprocess.Popen[str]] = []

    def run(self, words: Sequence[str]) -> str:
        """The output of `python -m`. Raises ValueError if it fails."""
        child = subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        text, _ = child.communicate()
        self._children.remove(child)
        if child.returncode:
            what = f"python -m {' '.join(words[:3])}"
            raise ValueError(f"{what}: ended with status {child.returncode}")
        return text

    def teacher(self, name: str, out: Path) -> None:
        """Train a teacher that runs in `out` would train first, each for itself, if it lacks."""
        trained = name in recipes.recipes() and name not in shipped()
        if trained and not (out / name / "model").is_dir():
            print(f"training the teacher {name} in {out / name}", flush=True)
            self.run(["snoopi.train", name, "--out", str(out / name), "--resume"])

    def all(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The results of work(item), in order; where one fails, or at a stop, the others end.

        Runs of snoopi.train save their states then.
        """
        pool = ThreadPoolExecutor(self.jobs)
        try:
            return [job.result() for job in [pool.submit(work, item) for item in items]]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(self._children):  # their threads take them out as they end
                child.terminate()
            raise
        finally:
            pool.shutdown()


class Runner:
    """Trains and measures units in processes, and adds their figures to the records.

    out: folder of the runs; what is finished there is not trained again.
    """

    def __init__(self, out: Path, jobs: int, records: Records) -> None:
        self.out, self.records, self.processes = out, records, Processes(jobs)
        self._done, self._total = 0, 0

    def run(self, units: Sequence[Unit]) -> None:
        """Make the figures of all units that the records lack. A stop saves the runs' states.

        Raises ValueError for a process that failed.
        """
        todo = unique(unit for unit in units if unit not in self.records)
        runs = [run for run in students(todo) if not finished(self.out / run.folder, run.config())]
        recorded = [unit for unit in todo if isinstance(unit, Train) and unit not in runs]
        rest = [unit for unit in todo if not isinstance(unit, Train)]
        self._done, self._total = 0, len(runs) + len(rest)
        teachers = [run.config().model.teacher for run in runs]
        teachers += [unit.model for unit in rest if isinstance(unit, Teacher)]
        for name in dict.fromkeys(teachers):
            self.processes.teacher(name, self.out)
        for unit in recorded:  # trained in an earlier call that was stopped before it was noted
            self._note(unit)
        self.processes.all(self._train, runs)
        self.processes.all(self._measure, rest)

    def model(self, run: Train) -> Path:
        """The model folder of a run."""
        return self.out / run.folder / "model"

    def _train(self, run: Train) -> None:
        folder = self.out / run.folder
        self.processes.run(["snoopi.train", *run.words(), "--out", str(folder), "--resume"])
        if run not in self.records:
            self._note(run)
        self._say(run)

    def _note(self, run: Train) -> None:
        folder = self.out / run.folder
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        seconds = sum(v for v in summary["seconds"].values() if isinstance(v, int | float))
        self.records.add(run, train_figures(folder), seconds, self.processes.threads)

    def _measure(self, unit: Unit) -> None:
        if isinstance(unit, Teacher):
            trained = str(self.out / unit.model / "model")
            model = unit.model if unit.model in shipped() else trained
        else:
            assert not isinstance(unit, Train)
            model = str(self.model(unit.student))
        started = time.monotonic()
        words = ["snoopi.reproduce.measure", unit.kind, json.dumps(unit.plain()), "--model", model]
        figures = json.loads(self.processes.run(words).splitlines()[-1])
        self.records.add(unit, figures, time.monotonic() - started, self.processes.threads)
        self._say(unit)

    def _say(self, unit: Unit) -> None:
        self._done += 1
        print(f"{self._done}/{self._total}  {unit.describe()}", flush=True)


def finished(folder: Path, config: Config) -> bool:
    """Whether the folder holds the end of a run of that recipe."""
    if not (folder / "summary.json").is_file():
        return False
    return not recipes.differences(recipes.load(folder / "config.toml"), config)


def train_figures(folder: Path) -> dict[str, Any]:
    """A finished run's figures: means over its last evaluations, and all of them as a curve."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = recipes.load(folder / "config.toml")
    rows = [*read(folder / "metrics.jsonl"), {"step": config.run.steps, **_last(summary)}]
    looks = [row for row in rows if all(name in row for name in CURVE)]
    return {
        **summary["end"],
        "curve": [{name: _round(row[name]) for name in CURVE} for row in looks],
        "updates": config.run.steps // config.vsd.every,
    }


def _last(summary: dict[str, Any]) -> dict[str, float]:
    """The finished model's look."""
    found = {name: summary[name] for name in ("all_right", "precision", "recall")}
    return {**found, "frechet": summary["frechet_student"]}


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
