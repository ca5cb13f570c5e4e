"""The process's memory as the C library and the kernel keep it: what torch says nothing about.

glibc gives every big block back to the system when it is freed, and the next tensor of that size
faults its pages in again, which on a CPU costs as much as filling them. `keep_freed` ends that for
the whole process, `give_back` begins it again. On other systems and C libraries nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from torch import Tensor

# mallopt's parameters (malloc.h), and glibc's own values for them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MMAP_MAX = 65536
# Where glibc's moving thresholds end in a process that frees big blocks; setting one stops them.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, 64 << 20
_NEVER = 2**31 - 1  # mallopt takes an int


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.malloc_trim.argtypes = (ctypes.c_size_t,)
    return libc


def keep_freed() -> bool:
    """Keep freed memory in this process for the next tensors; returns whether it can (glibc).

    Process-wide. What was freed before goes to the system first, so loading's garbage is not kept.
    Afterwards the process holds more than it used at once, up to twice as much: glibc does not
    always find room for an aligned block where one of its size was.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back() -> bool:
    """Undo `keep_freed` and return what is free to the system; whether it can (glibc)."""
    libc = _glibc()
    if libc is None:
        return False
    libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
    libc.malloc_trim(0)
    return True


def drop_pages(mapped: Tensor) -> None:
    """Let the system take back the pages of a tensor that lies in a mapped file and is done with.

    Whole pages inside it, so that its neighbours stay as they are. Read it no more: in a file's
    mapping it would be there again, in other memory it would be zeros.
    """
    libc = _glibc()
    if libc is None:
        return
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)


def dropper() -> Callable[[Tensor], None]:
    """`drop_pages` for tensors that lie in files mapped now; of others it drops nothing.

    Files of which a page was written to in this process are left alone (Linux): what was written
    would be lost. For weights just loaded: what is written later it does not see.
    """
    files = _unwritten_files()  # once: to read them for every weight took a fifth of loading
    begins = [low for low, _ in files]

    def drop(weight: Tensor) -> None:
        begin = weight.data_ptr()
        i = bisect_right(begins, begin) - 1
        if i >= 0 and begin + weight.nbytes <= files[i][1]:
            drop_pages(weight)

    return drop


def drop_read(weights: Iterable[Tensor]) -> None:
    """Let the files in which the weights lie mapped leave memory, until they are read again.

    Reading them again is cheap while the system still has them. A file of which a page was written
    to in this process stays whole (Linux): what was written would be lost.
    """
    libc = _glibc()
    if libc is None:
        return
    places = sorted({weight.data_ptr() for weight in weights})
    for low, high in _unwritten_files():
        i = bisect_left(places, low)
        if i < len(places) and places[i] < high:
            libc.madvise(low, high - low, mmap.MADV_DONTNEED)


def _unwritten_files() -> list[tuple[int, int]]:
    """Address ranges in which a file lies of which this process has no pages of its own (Linux).

    In ascending order.
    """
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return []
    ranges, found = [], None
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # "low-high permissions offset device inode path"
            parts = rest.split(maxsplit=4)
            low, _, high = name.partition("-")
            found = (int(low, 16), int(high, 16)) if parts[3] != "0" else None
        elif name == "Anonymous:" and found is not None and rest.split()[0] == "0":
            ranges.append(found)
    return ranges
