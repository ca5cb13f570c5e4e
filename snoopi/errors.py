"""How a command ends early: a user's mistake is one line on stderr and status 2, a signal 128 + n.

ValueError is the package's word for a mistake. OSErrors of the file system count, too (a full disk,
a folder that is read-only); any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

# What a user's disk and paths can answer. EPIPE, timeouts and refused connections are not here.
_DISK = frozenset(
    (
        *(errno.EACCES, errno.EBUSY, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO),
        *(errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENODEV),
        *(errno.ENOENT, errno.ENOLCK, errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO),
        *(errno.EOPNOTSUPP, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETXTBSY),
    )
)


class Parser(argparse.ArgumentParser):
    """argparse with its mistakes on one line, without the usage above them."""

    def error(self, message: str) -> NoReturn:
        """Print the one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def one_line(error: Exception) -> str | None:
    """The line for a user's mistake; None for an exception that only a bug can raise."""
    if isinstance(error, OSError):
        if error.errno not in _DISK:
            return None
        where = f"{os.fspath(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}"
    # A library's message inside ours may have several lines.
    return " ".join(str(error).split()) if isinstance(error, ValueError) else None


class RankLost(RuntimeError):
    """Another rank has died or does not answer: no mistake of the user, nor a bug of this rank."""


# gloo has no class of its own for it, NCCL has one class for everything: only the text tells.
_UNREACHABLE = re.compile(r"gloo/(transport|rendezvous)/|ncclRemoteError|remote process exited")


def of_the_network(error: BaseException) -> bool:
    """Whether a collective failed because another rank could not be reached."""
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and bool(_UNREACHABLE.search(str(error)))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not: a write to an open file knows no name.

    safetensors reports a full disk with an error of its own; only its text tells the cause.
    """
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        error.filename2 = None
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


# --- signals --------------------------------------------------------------------------------------


def leave_on_signals(command: str) -> None:
    """End the process with one line on SIGINT and SIGTERM, until `interruptible` takes over.

    For a command's first lines: importing torch takes seconds, and Ctrl-C there is no traceback.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{command}: {signal.Signals(number).name}: stopped before it began\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT at a moment when nothing is lost by stopping at once.

    A KeyboardInterrupt, so that no `except Exception` on the way takes it for an error.
    """

    def __init__(self, caught: int) -> None:
        super().__init__()
        self.caught = signal.Signals(caught)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT raise Interrupted in the body; the former handlers come back on exit.

    Only the main thread can have handlers; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    former = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Hold SIGTERM and SIGINT back; the function it gives lets those through that came.

    For native code that calls back into Python: an exception of a handler in there is lost, or
    ends the process (std::terminate). On exit, what came is let through.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    came: list[int] = []

    def through() -> None:
        while came:
            number = came.pop(0)
            handler = former[signal.Signals(number)]
            if callable(handler):
                handler(number, None)
            elif handler == signal.SIG_DFL:
                signal.signal(number, handler)
                signal.raise_signal(number)

    former = {
        n: signal.signal(n, lambda number, _: came.append(number))
        for n in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield through
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    through()


class Stopped(Exception):
    """A signal ended the work, and its state is saved."""

    def __init__(self, message: str, caught: int) -> None:
        super().__init__(message)
        self.status = 128 + caught


def status(command: str, work: Callable[[], None], again: str = "") -> int:
    """Do a command's work; its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped, 141
    when who reads stdout has left (`| head`), 1 when another rank was lost.

    A mistake, a stop and a lost rank are one line on stderr; a bug of ours keeps its traceback.
    again: how the work goes on later. Of several ranks the first speaks for all; what may befall
    one alone (a full disk, a lost rank) each says itself.
    """
    try:
        with interruptible():
            work()
        sys.stdout.flush()  # what the interpreter does as it ends, too late to say anything about
    except BrokenPipeError:
        if not _stdout_has_no_reader():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for that last flush
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        line = one_line(error)
        if line is None:
            raise
        _complain(command, line, every_rank=isinstance(error, OSError))
        return 2
    except RankLost as lost:
        _complain(command, f"{lost}; {again}", every_rank=True)
        return 1
    except Stopped as stopped:
        _complain(command, str(stopped))
        return stopped.status
    except Interrupted as stop:
        how = f"stopped at once; {again}" if again else "stopped"
        _complain(command, f"{stop.caught.name}: {how}")
        return 128 + stop.caught
    return 0


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except ValueError:  # no file, as under a test
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _complain(command: str, line: str, every_rank: bool = False) -> None:
    rank = int(os.environ.get("RANK", "0"))  # there may be no process group yet, or no more
    if rank == 0 or every_rank:
        where = f"rank {rank}: " if rank else ""
        print(f"{command}: {where}{line}", file=sys.stderr, flush=True)
