"""Which exception is a user's mistake, and what its line says."""

from __future__ import annotations

import errno
import os
import signal
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
