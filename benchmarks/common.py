"""What every benchmark shares: interleaved timing, the error rule, the machine, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snoopi import errors
from snoopi.ops.native import CUDA, NATIVE
from snoopi.pictures import write_atomically

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Errors below these are right whatever eager's are (it may be exact by luck).
ERROR_FLOORS = {"fp32": 2e-7, "bf16": 1e-3}
ERROR_FACTOR = 2.0
# What eager is judged against: far above its rounding, far below another formula's result in fp32.
ERROR_CEILINGS = {"fp32": 1e-5, "bf16": 2e-2}

Row = Mapping[str, Any]


class WrongResult(Exception):
    """A competitor computes something else than it should: there is nothing to time."""


def status(command: str, work: Callable[[], None]) -> int:
    """Do a benchmark's work; `errors.status` with 1 and one line for a wrong result."""
    try:
        return errors.status(command, work)
    except WrongResult as wrong:
        print(f"{command}: {wrong}", file=sys.stderr)
        return 1


# --- options --------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    add = parser.add_argument
    add("--dtype", choices=[*DTYPES, "both"], default="both", help="number format")
    add("--threads", metavar="N[,N]", help="numbers of threads; None: 1,2 as far as cores reach")
    add("--json", type=Path, metavar="FILE", help="write machine and rows there")


def dtypes(option: str) -> list[str]:
    """--dtype as a list of names."""
    return list(DTYPES) if option == "both" else [option]


def thread_counts(option: str | None) -> list[int]:
    """--threads as numbers, in the order given; ValueError if there are fewer cores than that."""
    cores = num_cores()
    if option is None:
        return [n for n in (1, 2) if n <= cores]
    words = option.split(",")
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise ValueError(f"--threads must be numbers of at least 1, such as 1,2, got {option!r}")
    counts = list(dict.fromkeys(map(int, words)))
    if max(counts) > cores:
        raise ValueError(f"--threads must be at most {cores}, the cores there are, got {option!r}")
    return counts


def check_file(name: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before the minutes of measuring that it is for."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {path}")
    check_folder(name, path.parent)


def check_folder(name: str, path: Path | None) -> None:
    """Refuse a folder that can be neither written nor made."""
    if path is None:
        return
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"{name}: {path} is not a folder that can be written")


# --- timing ---------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Seconds of one call, and the processor seconds that all threads took."""

    seconds: float
    processor: float


class Times(NamedTuple):
    """Seconds of one thing, a round each, and the processor seconds that all threads took."""

    seconds: list[float]
    processor: list[float]

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile in milliseconds."""
        low, high = quartiles(self.seconds)
        return 1e3 * low, 1e3 * high

    @property
    def cores(self) -> float:
        """Cores in use, on average: below the number of threads on a busy machine."""
        return sum(self.processor) / sum(self.seconds)


def interleave(
    competitors: Mapping[str, Sequence[Callable[[], object]]], rounds: int, warmup: int = 2
) -> dict[str, list[Times]]:
    """Time competitors in turns, so that a machine that slows down does so for all of them.

    A competitor is a sequence of parts, each timed on its own; a round runs all parts of one, then
    of the next. The order changes from round to round, because who comes after whom matters: the
    second finds the inputs in the caches. A part that runs in another process returns the Span it
    took there. Returns the Times of each part.
    """
    times = {name: [Times([], []) for _ in parts] for name, parts in competitors.items()}
    for i in range(-warmup, rounds):
        for name in _order(list(competitors), i + warmup):
            for part, taken in zip(competitors[name], times[name], strict=True):
                processor, wall = time.process_time(), time.perf_counter()
                found = part()
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                if isinstance(found, Span):
                    wall, processor = found
                if i >= 0:
                    taken.seconds.append(wall)
                    taken.processor.append(processor)
    return times


GRAPH_CALLS = 20  # of a CUDA graph: launching the graph itself is a small part of their time


def replayed(run: Callable[[], object], device: str) -> Callable[[], object]:
    """On CUDA: a part of `replays` of run. On the CPU: run itself."""
    return run if device == "cpu" else replays([run] * GRAPH_CALLS)


def replays(runs: Sequence[Callable[[], object]]) -> Callable[[], Span]:
    """A part that replays a CUDA graph of all runs, often enough to fill a millisecond.

    Its Span is one run by the device's clock: what Python and the launches take of the host, which
    at batch 1 is more than most kernels run, does not count.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is done once, as loading code, is not for the graph
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def part(times: int) -> Span:
        events[0].record()
        for _ in range(times):
            graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        seconds = events[0].elapsed_time(events[1]) / 1e3 / times / len(runs)
        return Span(seconds, seconds)

    part(1)
    once = max(part(1).seconds * len(runs), 1e-6)
    return functools.partial(part, max(2, min(100, round(1e-3 / once))))


def _order(names: Sequence[str], turn: int) -> list[str]:
    """The names from another start each turn, and at another stride once all have started."""
    count = len(names)
    strides = [s for s in range(1, count) if math.gcd(s, count) == 1] or [1]
    stride = strides[turn // count % len(strides)]
    return [names[(turn + stride * i) % count] for i in range(count)]


def total(parts: Sequence[Times]) -> Times:
    """The Times of all parts together, round by round."""
    seconds = [sum(one) for one in zip(*(part.seconds for part in parts), strict=True)]
    processor = [sum(one) for one in zip(*(part.processor for part in parts), strict=True)]
    return Times(seconds, processor)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@contextlib.contextmanager
def at_threads(count: int) -> Iterator[None]:
    """torch's number of threads in the body."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        if torch.get_num_threads() != count:
            raise ValueError(f"this torch runs on {torch.get_num_threads()} threads, not {count}")
        yield
    finally:
        torch.set_num_threads(former)


def geomean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


# --- errors ---------------------------------------------------------------------------------------


def error(got: Tensor, exact: Tensor) -> float:
    """Relative rms error against fp64; NaN and infinities count as infinite."""
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return math.inf
    return ((got.double() - exact).norm() / exact.norm()).item()


def check_error(what: str, dtype: str, ours: float, eagers: float) -> None:
    """Hold an error to the rule: at most ERROR_FACTOR times eager's, or below the floor.

    Raises:
        WrongResult: naming what was computed.
    """
    bound = max(ERROR_FACTOR * eagers, ERROR_FLOORS[dtype])
    if not ours <= bound:
        raise WrongResult(
            f"{what}: error {ours:.3g} against fp64, at most {bound:.3g} is allowed "
            f"(eager's is {eagers:.3g}); nothing was timed"
        )


def check_eager(what: str, dtype: str, found: float) -> None:
    """Hold eager itself to a ceiling: a wrong one would allow everything, and be no competitor.

    Raises:
        WrongResult: naming what was computed.
    """
    if not found <= ERROR_CEILINGS[dtype]:
        raise WrongResult(
            f"{what}: error {found:.3g} against fp64, at most {ERROR_CEILINGS[dtype]:.3g} is "
            "allowed; nothing was timed"
        )


# --- the machine ----------------------------------------------------------------------------------

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def machine(threads: Sequence[int], device: str = "cpu") -> dict[str, Any]:
    """Where the numbers come from; neither paths nor the host's name are in it."""
    info, op = _cpuinfo(), NATIVE if device == "cpu" else CUDA
    has = info.get("flags", "").split()
    return {
        "processor": info.get("model name") or platform.machine(),
        "isa": [flag for flag in _FLAGS if flag in has],
        "cores": num_cores(),
        "threads": list(threads),
        "torch": str(torch.__version__),
        # Why a library does not load may name its path.
        "op": op.why if op.loaded else op.why.partition(":")[0],
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
        "commit": _commit(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def machine_lines(described: Mapping[str, Any]) -> list[str]:
    """`machine` in words."""
    isa = " ".join(described["isa"]) or "none of " + " ".join(_FLAGS)
    lines = [
        f"processor: {described['processor']}, {described['cores']} cores, {isa}",
        f"torch {described['torch']}; op: {described['op']}",
        f"commit: {described['commit'] or 'unknown'}",
    ]
    if described.get("gpu"):
        lines.insert(1, f"GPU: {described['gpu']}, CUDA {torch.version.cuda}")
    if described["environment"]:
        lines.append(" ".join(f"{k}={v}" for k, v in described["environment"].items()))
    return lines


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first core; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _commit() -> str | None:
    """The commit that is checked out, with a mark if tracked files differ; None without git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- results --------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table: its title, what it means, a row's cell, its width on a terminal."""

    title: str
    meaning: str
    cell: Callable[[Row], str]
    width: int


class Table(NamedTuple):
    """How a benchmark's rows and its summary are shown; meanings are printed above the rows."""

    title: str
    columns: tuple[Column, ...]
    summary: tuple[Column, ...]


def number(key: str, form: str = ".2f") -> Callable[[Row], str]:
    """A cell that shows row[key], a dash where there is none."""
    return lambda row: "-" if row.get(key) is None else format(row[key], form)


def cores(row: Row) -> str:
    """A cell: the cores in use by the competitor with the fewest; row["cores"] has them by name."""
    return f"{min(row['cores'].values()):.1f}"


def busy(rows: Sequence[Row]) -> list[str]:
    """A note if rows ran on clearly fewer cores than threads: their numbers mean little."""
    short = sum(min(row["cores"].values()) < 0.8 * row["threads"] for row in rows)
    if not short:
        return []
    return [
        f"{short} of {len(rows)} rows had fewer cores than threads (column cores): is the machine "
        "busy? Do not quote them"
    ]


def text_head(columns: Sequence[Column]) -> str:
    """The titles over a rule."""
    titles = _text_line(columns, [column.title for column in columns])
    return f"{titles}\n{_text_line(columns, ['-' * column.width for column in columns])}"


def text_row(columns: Sequence[Column], row: Row) -> str:
    """A row under `text_head`."""
    return _text_line(columns, [column.cell(row) for column in columns])


def _text_line(columns: Sequence[Column], cells: Sequence[str]) -> str:
    first, *rest = zip(columns, cells, strict=True)
    aligned = [first[1].ljust(first[0].width), *(cell.rjust(col.width) for col, cell in rest)]
    return "  ".join(aligned).rstrip()


def explain(columns: Sequence[Column]) -> str:
    """One line a column: what it means."""
    explained = [column for column in columns if column.meaning]
    width = max(len(column.title) for column in explained)
    return "\n".join(f"  {col.title.ljust(width)}  {col.meaning}" for col in explained)


def markdown(table: Table, result: Mapping[str, Any]) -> str:
    """A result as a page of benchmarks/results: command, machine, rows, summary, notes."""
    lines = [f"## {table.title}", "", f"    {result['command']}", ""]
    lines += [f"- {line}" for line in machine_lines(result["machine"])]
    lines += ["", *_markdown_table(table.columns, result["rows"])]
    if result["summary"]:
        lines += ["", *_markdown_table(table.summary, result["summary"])]
    lines += ["", "Columns:", ""]
    lines += [f"- {col.title}: {col.meaning}" for col in table.columns if col.meaning]
    if result["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[Column], rows: Iterable[Row]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rule = ["---", *("---:" for _ in columns[1:])]
    body = [line(column.cell(row) for column in columns) for row in rows]
    return [line(column.title for column in columns), line(rule), *body]


def begin(threads: Sequence[int], table: Table, times: str, device: str = "cpu") -> dict[str, Any]:
    """Say where and what is measured (times: what a time is); returns `machine`."""
    described = machine(threads, device)
    print("\n".join(machine_lines(described)))
    print(f"\nColumns (times: median of {times})")
    print(explain(table.columns), flush=True)
    return described


def finish(
    path: Path | None,
    table: Table,
    command: str,
    described: Mapping[str, Any],
    rows: Sequence[Row],
    summary: Sequence[Row],
    notes: Sequence[str],
) -> None:
    """Show what stands below the rows, and write --json if a path is given.

    command: "python -m benchmarks.NAME ...", without the file it writes.
    """
    if summary:
        print("\n" + text_head(table.summary))
        print("\n".join(text_row(table.summary, line) for line in summary))
    print("".join(f"\n{note}" for note in notes), flush=True)
    if path is not None:
        benchmark = command.split()[2].rpartition(".")[2]
        head = {"benchmark": benchmark, "command": command, "machine": described}
        write_json(path, {**head, "rows": rows, "summary": summary, "notes": notes})


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all, and say so."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {path}")
