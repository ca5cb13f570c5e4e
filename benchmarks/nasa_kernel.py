"""The fused op against ordinary PyTorch, torch.compile and the machine's GEMM rate.

python -m benchmarks.nasa_kernel [--guidance nasa,nasa-centred,nag,vsf] [--shapes real|sweep]
                                 [--dtype fp32|bf16|both] [--threads 1,2] [--repeats N]
                                 [--device cpu|cuda] [--json FILE] [--plots FOLDER]

b batch, m query tokens, n tokens of each text, h heads, d head dim, c = h*d channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import calls, common, plots
from benchmarks.calls import METHODS, Inputs, Shape, make_inputs
from benchmarks.common import Column, Row, Table, number
from snoopi import errors

NAME = "benchmarks.nasa_kernel"
GEMM = (2048, 1280, 1280)  # rows, c_in, c_out of the Linear whose rate is the roof


# The cross-attentions of the models at their native size, one picture.
REAL = {
    "sd15-4096": Shape(4096, 77, 8, 40),
    "sd15-1024": Shape(1024, 77, 8, 80),
    "sd15-256": Shape(256, 77, 8, 160),
    "sd21-4096": Shape(4096, 77, 5, 64),
    "sdxl-4096": Shape(4096, 77, 10, 64),
    "sdxl-1024": Shape(1024, 77, 20, 64),
    "pixart-1024": Shape(1024, 120, 16, 72),
}
# One size at a time around BASE; d moves the heads along, so that c and the FLOPs stay.
BASE = Shape(1024, 77, 10, 64)
SWEEPS = {
    "m": [dataclasses.replace(BASE, m=m) for m in (64, 256, 1024, 2048, 4096)],
    "n": [dataclasses.replace(BASE, n=n) for n in (16, 48, 77, 96, 120, 154, 300)],
    "d": [dataclasses.replace(BASE, d=d, h=BASE.c // d) for d in (16, 32, 40, 64, 80, 128, 160)],
    "b": [dataclasses.replace(BASE, b=b) for b in (1, 2, 4, 8)],
}


class Case(NamedTuple):
    """What one row measures."""

    name: str
    shape: Shape
    dtype: str
    threads: int
    guidance: str = "nasa"
    device: str = "cpu"

    def inputs(self) -> Inputs:
        """Its inputs, on its device."""
        return make_inputs(self.shape, self.dtype, self.guidance, self.device)

    def __str__(self) -> str:
        if self.device != "cpu":
            return f"{self.guidance} {self.name} ({self.shape}) {self.dtype} on {self.device}"
        unit = "thread" if self.threads == 1 else "threads"
        return f"{self.guidance} {self.name} ({self.shape}) {self.dtype} on {self.threads} {unit}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 for a wrong result, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads, names = common.thread_counts(options.threads), common.dtypes(options.dtype)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no CUDA device")
        threads = [1]  # of the host
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32 on every side
    cases = _cases(_guidances(options), options.shapes, names, threads)
    cases = [case._replace(device=options.device) for case in cases]
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    if options.plots is not None:
        if options.shapes != "sweep":
            raise ValueError("--plots draws the sweeps: it needs --shapes sweep")
        plots.check_installed("--plots")
    common.check_file("--json", options.json)
    common.check_folder("--plots", options.plots)
    rounds = f"{options.repeats} interleaved rounds"
    if options.device == "cuda":
        rounds += ", the device's share alone: calls are replayed from CUDA graphs"
    machine = common.begin(threads, TABLE, rounds, options.device)
    with torch.inference_mode():
        _check_all(cases)
        print("\n" + common.text_head(TABLE.columns), flush=True)
        rows = []
        for case in cases:
            rows.append(measure(case, options.repeats, compile=options.compile))
            print(common.text_row(TABLE.columns, rows[-1]), flush=True)
    command = _command(options, names, threads)
    common.finish(options.json, TABLE, command, machine, rows, summarise(rows), _notes(rows))
    if options.plots is not None:
        _plot(options.plots, rows, machine)


def _guidances(options: argparse.Namespace) -> list[str]:
    """--guidance as names, in the order given; the sweeps are NASA's alone."""
    chosen = list(dict.fromkeys(options.guidance.split(",")))
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        known = ", ".join(METHODS)
        raise ValueError(f"--guidance: unknown guidance {unknown[0]!r}; known are {known}")
    if options.shapes == "sweep" and chosen != ["nasa"]:
        raise ValueError(f"--shapes sweep is for --guidance nasa alone, got {options.guidance!r}")
    return chosen


def _cases(
    guidances: Sequence[str], shapes: str, names: Sequence[str], threads: Sequence[int]
) -> list[Case]:
    if shapes == "sweep":
        swept = dict.fromkeys(shape for axis in SWEEPS.values() for shape in axis)
        first = [(shape, threads[0]) for shape in swept]
        more = [(BASE, count) for count in threads[1:]]
        return [Case(str(s), s, dtype, count) for dtype in names for s, count in first + more]
    chosen = list(REAL) if shapes == "real" else shapes.split(",")
    unknown = [name for name in chosen if name not in REAL]
    if unknown:
        known = ", ".join(["real", "sweep", *REAL])
        raise ValueError(f"--shapes: unknown shape {unknown[0]!r}; known are {known}")
    return [
        Case(name, REAL[name], dtype, count, guidance)
        for guidance in guidances
        for dtype in names
        for count in threads
        for name in chosen
    ]


# --- checks ---------------------------------------------------------------------------------------


def compiled(x: Inputs, guidance: str) -> tuple[Callable[[], Tensor] | None, str]:
    """torch.compile of the eager chain, compiled by a first call; None and why where it fails.

    Call it at the number of threads that it will run on: that number is compiled in.
    """
    torch.compiler.reset()  # recompilations of one function are limited
    try:
        fast = calls.chain(
            x, guidance, functools.partial(torch.compile, fullgraph=True, dynamic=False)
        )
        fast()
    except Exception as trouble:  # whatever inductor misses here, such as a compiler
        first = (str(trouble).strip().splitlines() or [""])[0]
        why = re.sub(r"\S*/", "", first)  # the folders of paths say nothing elsewhere
        return None, f"torch.compile failed: {type(trouble).__name__}: {why}"
    return fast, ""


def check(case: Case, x: Inputs) -> dict[str, float]:
    """Relative rms errors of the competitors against fp64.

    Raises:
        WrongResult: an error of the op or of eager above the rule, naming the case.
    """
    truth, runs = calls.exact(x, case.guidance), calls.competitors(x, case.guidance)
    found = {name: common.error(run(), truth) for name, run in runs.items()}
    common.check_eager(f"{case}, eager", case.dtype, found["eager"])
    for name in ("warm", "cold"):
        common.check_error(f"{case}, {name}", case.dtype, found[name], found["eager"])
    return found


def _check_all(cases: Sequence[Case]) -> None:
    """Every case before any is timed: a wrong kernel is told in seconds."""
    for case in cases:
        with common.at_threads(case.threads):
            check(case, case.inputs())
    factor = f"{common.ERROR_FACTOR:g}"
    print(f"\nchecked {len(cases)} rows against fp64: no error above {factor} times eager's")


# --- a row ----------------------------------------------------------------------------------------


def measure(case: Case, repeats: int, *, compile: bool = True) -> dict[str, Any]:
    """Check one case, then time its competitors; the row of the result.

    Raises:
        WrongResult: see `check`.
    """
    shape, dtype, guidance, device = case.shape, case.dtype, case.guidance, case.device
    x, texts = case.inputs(), METHODS[guidance].texts
    flops, moved = shape.flops(texts), shape.bytes(dtype, texts)
    kind: dict[str, Any] = {"dtype": common.DTYPES[dtype], "device": device}
    gemm = [torch.ones(size, **kind) for size in (GEMM[:2], GEMM[:0:-1])]
    with common.at_threads(case.threads):
        found = check(case, x)
        path = calls.explain(x, guidance)
        runs = calls.competitors(x, guidance)
        fast, why_not = compiled(x, guidance) if compile else (None, "torch.compile was left out")
        if fast is not None:
            found["compiled"] = common.error(fast(), calls.exact(x, guidance))
            common.check_error(f"{case}, compiled", dtype, found["compiled"], found["eager"])
            runs["compiled"] = fast
        timed: dict[str, Callable[[], object]] = {**runs, "gemm": lambda: F.linear(*gemm)}
        parts = {name: [common.replayed(run, device)] for name, run in timed.items()}
        times = {name: made[0] for name, made in common.interleave(parts, repeats).items()}
    ms = {name: taken.ms for name, taken in times.items()}
    roof = 2 * GEMM[0] * GEMM[1] * GEMM[2] / ms["gemm"] / 1e6  # GFLOP/s
    floor_ms = flops / roof / 1e6
    handed = path.path == "eager"
    return {
        "guidance": guidance,
        "shape": case.name,
        "dtype": dtype,
        "threads": case.threads,
        **shape.sizes(),
        "c": shape.c,
        "fused_ms": ms["warm"],
        "cold_ms": ms["cold"],
        "eager_ms": ms["eager"],
        "compiled_ms": ms.get("compiled"),
        "gemm_ms": ms["gemm"],
        "quartiles_ms": {name: taken.quartiles_ms for name, taken in times.items()},
        "cores": {name: taken.cores for name, taken in times.items()},
        "speedup": ms["eager"] / ms["warm"],
        # Where auto hands the call to eager, cold is eager; the ratio of the two would be noise.
        "speedup_cold": 1.0 if handed else ms["eager"] / ms["cold"],
        "speedup_compiled": ms["compiled"] / ms["warm"] if fast else None,
        "speedup_cold_compiled": ms["compiled"] / ms["cold"] if fast else None,
        "gflops": flops / ms["warm"] / 1e6,
        "roof_gflops": roof,
        "floor_ms": floor_ms,
        "roof_fraction": floor_ms / ms["warm"],
        "bytes": moved,
        "gb_per_s": moved / ms["warm"] / 1e6,
        "error_fused": found["warm"],
        "error_cold": found["cold"],
        "error_eager": found["eager"],
        "error_compiled": found.get("compiled"),
        "error_ratio": max(found["warm"], 1e-12) / max(found["eager"], 1e-12),
        "path": path.path,
        "why": path.why,
        "handed_to_eager": handed,
        "compiled_why": why_not or None,
    }


def _cold(row: Row) -> str:
    return "= eager" if row["handed_to_eager"] else f"{row['speedup_cold']:.2f}"


def _spread(row: Row) -> str:
    """The widest interquartile range among the row's times, in percent of its median."""
    medians = {"warm": "fused_ms"}
    spreads = [
        (high - low) / row[medians.get(name, f"{name}_ms")]
        for name, (low, high) in row["quartiles_ms"].items()
    ]
    return f"{100 * max(spreads):.0f}%"


# --- all rows -------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """A quantity whose geometric mean is printed, and which end of it is the worst."""

    title: str
    key: str
    worst: Callable[..., Row]


MEASURES = (
    Measure("warm over eager", "speedup", min),
    Measure("cold over eager", "speedup_cold", min),
    Measure("warm over compiled", "speedup_compiled", min),
    Measure("fraction of the floor", "roof_fraction", min),
    Measure("error over eager's", "error_ratio", max),
)


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric means per guidance, dtype and threads, each with its worst shape."""
    lines = []
    for group in dict.fromkeys(map(_group, rows)):
        for title, key, worst in MEASURES:
            mine = [row for row in rows if _group(row) == group and row[key] is not None]
            line: dict[str, Any] = {**dict(zip(_GROUP, group, strict=True)), "measure": title}
            line |= {"count": len(mine), "mean": None, "worst": None, "worst_shape": None}
            if mine:
                last = worst(mine, key=lambda row: row[key])
                line["mean"] = common.geomean(row[key] for row in mine)
                line |= {"worst": last[key], "worst_shape": last["shape"]}
            lines.append(line)
    return lines


_GROUP = ("guidance", "dtype", "threads")


def _group(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _GROUP)


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know besides the numbers: paths, missing competitors, a busy machine."""
    notes = []
    paths = dict.fromkeys((row["path"], row["why"]) for row in rows)
    for path, why in paths:
        mine = [_place(row) for row in rows if (row["path"], row["why"]) == (path, why)]
        notes.append(f"path {path}: {why}" + (f": {', '.join(mine)}" if len(paths) > 1 else ""))
    if any(row["handed_to_eager"] for row in rows):
        notes.append(
            "rows with path eager are handed to it, so cold is eager there and counts as 1"
        )
    for why in dict.fromkeys(row["compiled_why"] for row in rows if row["compiled_why"]):
        missing = sum(row["compiled_why"] == why for row in rows)
        notes.append(f"compiled: {missing} of {len(rows)} rows have none: {why}")
    return notes + common.busy(rows)


def _place(row: Row) -> str:
    return f"{row['guidance']} {row['shape']} {row['dtype']} x{row['threads']}"


def _command(options: argparse.Namespace, names: Sequence[str], threads: Sequence[int]) -> str:
    """The command without the files it writes."""
    dtype = names[0] if len(names) == 1 else "both"
    words = f"--guidance {options.guidance} --shapes {options.shapes} --dtype {dtype}"
    words += f" --threads {','.join(map(str, threads))} --repeats {options.repeats}"
    words += "" if options.device == "cpu" else f" --device {options.device}"
    return f"python -m {NAME} {words}{'' if options.compile else ' --no-compile'}"


def _plot(folder: Path, rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    base: Mapping[str, int] = {**BASE.sizes(), "c": BASE.c, "threads": machine["threads"][0]}
    where = f"{machine['processor']}; {machine['op']}; torch {machine['torch']}"
    titles = {
        "m": "query tokens m",
        "n": "text tokens n",
        "d": "head dim d (c stays)",
        "b": "batch b",
        "threads": "threads",
    }
    for axis, title in titles.items():
        # On an axis are the rows that have the base's other sizes; h follows d.
        others = [key for key in base if key not in (axis, "h")]
        mine = [row for row in rows if all(row[key] == base[key] for key in others)]
        fixed = " ".join(f"{key}={base[key]}" for key in others)
        plots.draw_sweep(folder / f"{axis}.png", axis, title, f"NASA op at {fixed}\n{where}", mine)
        print(f"wrote {folder / f'{axis}.png'}")


TABLE = Table(
    "The fused op: `benchmarks.nasa_kernel`",
    (
        Column("shape", "", lambda row: row["shape"], 22),
        Column("guidance", "", lambda row: row["guidance"], 12),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("warm", "ms, the op on texts and weights packed beforehand", number("fused_ms"), 7),
        Column("cold", "ms, the op on plain tensors: it packs in the call", number("cold_ms"), 7),
        Column(
            "eager",
            "ms, the guidance from scaled_dot_product_attention, elementwise ops and linear",
            number("eager_ms"),
            7,
        ),
        Column("compiled", "ms, torch.compile of eager", number("compiled_ms"), 8),
        Column("spread", "widest interquartile range of these, of its median", _spread, 6),
        Column("cores", "in use, of the competitor with the fewest", common.cores, 5),
        Column("warm/e", "eager's time over warm's: above 1 the op wins", number("speedup"), 6),
        Column("cold/e", "eager's time over cold's; '= eager': handed to it", _cold, 7),
        Column("warm/c", "compiled's time over warm's", number("speedup_compiled"), 6),
        Column(
            "GFLOP/s", "of warm: 4 m n c a text + 2 m c^2, a picture", number("gflops", ".0f"), 7
        ),
        Column(
            "roof",
            f"GFLOP/s of F.linear [{GEMM[0]} {GEMM[1]}] x [{GEMM[1]} {GEMM[2]}] in the same loop",
            number("roof_gflops", ".0f"),
            6,
        ),
        Column(
            "floor",
            "fraction of the floor, the time that the FLOPs take at that rate, over warm's",
            number("roof_fraction"),
            5,
        ),
        Column("GB/s", "of warm: inputs and result moved once", number("gb_per_s", ".1f"), 5),
        Column("error", "relative rms of warm against fp64", number("error_fused", ".1e"), 7),
        Column("err/e", "the same over eager's", number("error_ratio"), 5),
        Column("path", "of cold", lambda row: row["path"], 9),
    ),
    (
        Column("geometric mean", "", lambda row: row["measure"], 22),
        Column("guidance", "", lambda row: row["guidance"], 12),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "", number("threads", "d"), 3),
        Column("shapes", "", number("count", "d"), 6),
        Column("mean", "", number("mean", ".3f"), 6),
        Column("worst", "", number("worst", ".3f"), 6),
        Column("of shape", "", lambda row: row["worst_shape"] or "-", 22),
    ),
)


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="The fused op: checked against fp64, then timed next to PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--guidance",
        default="nasa",
        metavar="NAME[,NAME]",
        help=f"what combines the texts: {', '.join(METHODS)}; the sweep is of nasa alone",
    )
    add(
        "--shapes",
        default="real",
        metavar="SHAPES",
        help=f"real (the models' layers), sweep (one size at a time), or names: {', '.join(REAL)}",
    )
    common.add_options(parser)
    where = "where it runs; cuda: the device's share of a call is timed, not that of the host"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=where)
    add("--repeats", type=int, default=20, metavar="N", help="rounds of every row")
    add(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="leave torch.compile out (faster)",
    )
    add("--plots", type=Path, metavar="FOLDER", help="draw the sweeps there, a PNG each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
