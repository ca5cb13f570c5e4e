"""Which exception is a user's mistake, and what its line says."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from snoopi import errors


def test_a_mistake_is_one_line() -> None:
    assert errors.one_line(ValueError("a\n  b")) == "a b"
    full = OSError(errno.ENOSPC, "No space left on device", "x.png")
    assert errors.one_line(full) == "x.png: No space left on device"
    assert errors.one_line(OSError(errno.EROFS, "Read-only file system")) == "Read-only file system"


@pytest.mark.parametrize(
    "bug", [KeyError("x"), AssertionError(), ConnectionResetError(errno.ECONNRESET, "x"), OSError()]
)
def test_a_bug_has_no_line(bug: Exception) -> None:
    assert errors.one_line(bug) is None


def test_writing_names_the_file() -> None:
    with pytest.raises(OSError) as raised, errors.writing(Path("model")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert errors.one_line(raised.value) == "model: No space left on device"
    with pytest.raises(OSError) as raised, errors.writing(Path("model")):
        raise SafetensorError("Error while serializing: I/O error: ... (os error 28)")
    assert errors.one_line(raised.value) == f"model: {os.strerror(errno.ENOSPC)}"
    with pytest.raises(SafetensorError), errors.writing(Path("model")):
        raise SafetensorError("a bug of ours")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_and_former_handlers_come_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with pytest.raises(errors.Interrupted) as raised, errors.interruptible():
        os.kill(os.getpid(), number)
        signal.pause()
    assert raised.value.caught == number and signal.getsignal(number) == former


@pytest.mark.parametrize("lines", [1, 100_000], ids=["buffered", "many"])
def test_a_reader_that_leaves_ends_the_command_in_silence(lines: int) -> None:
    work = f"lambda: [print('x' * 50) for _ in range({lines})]"
    command = ["-c", f"import time; from snoopi import errors; time.sleep(0.2); "
               f"raise SystemExit(errors.status('x', {work}))"]  # fmt: skip
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, *command], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.close(reader)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE and said == b""


def test_a_broken_pipe_of_ours_is_a_bug() -> None:
    def work() -> None:
        raise BrokenPipeError(errno.EPIPE, "of a worker")

    with pytest.raises(BrokenPipeError):
        errors.status("x", work)


def test_another_thread_has_no_handlers() -> None:
    seen: list[object] = []

    def body() -> None:
        with errors.interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_parser_says_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        errors.Parser(prog="snoopi.x").parse_args(["--no"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "snoopi.x: unrecognized arguments: --no (see --help)\n"
