"""Commands as a user types them, and what the tests ask of their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import snoopi
from snoopi import runstate

ROOT = Path(snoopi.__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# A whole run in two seconds: rows of every step, states of every other, and a small report. Most of
# it goes into writing the states, by the number of their tensors: hence few adapters.
FAST = (
    *("debug", "run.steps=6", "run.batch=2", "run.save=2", 'lora.targets=["to_q"]'),
    *("evaluate.prompts=4", "evaluate.removal=0"),
)


class Command:
    """One command that was started; its streams are files, so that they outlive it."""

    def __init__(self, warm: Warm, pid: int, out: Path, err: Path) -> None:
        self._warm, self.pid, self._out, self._err = warm, pid, out, err
        self.status: int | None = None

    def poll(self) -> int | None:
        """The exit status (-n after signal n), None while it runs."""
        if self.status is None:
            self.status = self._warm.ask(pid=self.pid)
        return self.status

    def wait(self, seconds: float = 120) -> int:
        """The exit status, once it is there."""
        self.until(lambda: self.poll() is not None, seconds)
        assert self.status is not None
        return self.status

    def until(self, true: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something to be true; at most some ten milliseconds late."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"waited in vain; stderr: {self.stderr}"
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """A signal to a process that is not waited for yet."""
        assert self.status is None
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    @property
    def last_line(self) -> str:
        return self.stderr.strip().splitlines()[-1]


class Warm:
    """Starts commands by forking from a process that has imported the package (warm.py)."""

    def __init__(self) -> None:
        self._streams = tempfile.TemporaryDirectory()
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            env=ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._commands: list[Command] = []

    def ask(self, **request: Any) -> Any:
        """One request to warm.py, and its answer."""
        assert self._server.stdin and self._server.stdout
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        module: str,
        *words: str,
        cwd: Path | None = None,
        largest_file: int = 0,
        no_rights: bool = False,
    ) -> Command:
        """Start snoopi.`module`. largest_file: bytes a file may have (0: any number); a write
        beyond fails as on a full disk. no_rights: without root's right to pass over modes."""
        self._count += 1
        out, err = (Path(self._streams.name) / f"{self._count}.{name}" for name in ("out", "err"))
        for stream in (out, err):
            stream.touch()  # a command may be killed before it opens them
        pid = self.ask(
            module=module,
            words=words,
            cwd=str(cwd or self._streams.name),
            out=str(out),
            err=str(err),
            largest_file=largest_file,
            no_rights=no_rights,
        )
        self._commands.append(Command(self, pid, out, err))
        return self._commands[-1]

    def run(self, module: str, *words: str, status: int = 0, **how: Any) -> Command:
        """Start it, wait, and compare its exit status."""
        command = self.start(module, *words, **how)
        assert command.wait() == status, command.stderr
        return command

    def close(self) -> None:
        """End the server and what still runs."""
        for command in self._commands:
            if command.poll() is None:
                command.send(signal.SIGKILL)
                command.wait()
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(timeout=10)
        self._streams.cleanup()


# --- what is looked at ----------------------------------------------------------------------------


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their speed: what must be equal bit for bit."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in found]


def row_count(out: Path) -> int:
    """Whole lines of metrics.jsonl, also while it is written."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def model_bytes(out: Path) -> dict[str, bytes]:
    """The files of a run's model folder."""
    model = out / "model"
    return {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()}


def assert_one_line(text: str, *parts: str) -> None:
    """One line with all the parts, and no traceback."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert all(part in lines[0] for part in parts), (lines[0], parts)


def assert_ends_in_one_line(command: Command, *parts: str) -> None:
    """Progress, then one line of the command's own with all the parts; no traceback."""
    lines = command.stderr.strip().splitlines()
    assert "Traceback" not in command.stderr and "Error:" not in command.stderr, command.stderr
    assert [line for line in lines if line.startswith("snoopi.")] == lines[-1:], command.stderr
    assert all(part in lines[-1] for part in parts), (lines[-1], parts)


def assert_nothing_half(out: Path) -> None:
    """What bears a final name in a run's folder is whole; nothing bears another name."""
    for step in runstate.steps(out):
        path = out / "state" / f"step-{step:08d}"
        for name, (size, sha) in runstate.manifest(path).files.items():
            assert runstate._size_and_hash(path / name) == (size, sha)
    if (out / "model").exists():
        snoopi.load(out / "model")
    if (out / "summary.json").exists():
        json.loads((out / "summary.json").read_text())
    names = [p.name for p in out.rglob("*") if p.name.startswith(".")]
    assert set(names) <= {".lock", ".metadata"}, names
