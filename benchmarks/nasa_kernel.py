"""The NASA op on the CPU against ordinary PyTorch, torch.compile and the machine's GEMM rate.

python -m benchmarks.nasa_kernel [--shapes real|sweep] [--dtype fp32|bf16|both] [--threads 1,2]
                                 [--repeats N] [--json FILE] [--plots FOLDER]

b batch, m query tokens, n tokens of each of the two texts, h heads, d head dim, c = h*d channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, plots
from benchmarks.common import Column, Row, Table, number
from snoopi import errors, ops
from snoopi.noise import Noise
from snoopi.ops import eager
from snoopi.ops.packs import TextPack

NAME = "benchmarks.nasa_kernel"
NASA_SCALE = 0.5
GEMM = (2048, 1280, 1280)  # rows, c_in, c_out of the Linear whose rate is the roof


@dataclass(frozen=True)
class Shape:
    """One call: q [b m h d], two texts of n tokens, a projection of c to c channels."""

    m: int
    n: int
    h: int
    d: int
    b: int = 1

    @property
    def c(self) -> int:
        """Channels."""
        return self.h * self.d

    @property
    def flops(self) -> int:
        """Of Q K^T and P V with both texts and of the projection; the softmax is not counted."""
        return self.b * (8 * self.m * self.n * self.c + 2 * self.m * self.c**2)

    def bytes(self, dtype: str) -> int:
        """Of q, K and V of both texts, weight, bias and the result, each moved once."""
        elements = 2 * self.b * self.m * self.c + 4 * self.b * self.n * self.c + self.c**2 + self.c
        return elements * common.DTYPES[dtype].itemsize

    def __str__(self) -> str:
        return " ".join(f"{key}{value}" for key, value in self.sizes().items())

    def sizes(self) -> dict[str, int]:
        """The sizes by name, batch first."""
        return {key: getattr(self, key) for key in ("b", "m", "n", "h", "d")}


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

    def __str__(self) -> str:
        unit = "thread" if self.threads == 1 else "threads"
        return f"{self.name} ({self.shape}) {self.dtype} on {self.threads} {unit}"


class Inputs(NamedTuple):
    """Arguments of the op, in the order of `ops.nasa_attention`."""

    q: Tensor
    k_pos: Tensor
    v_pos: Tensor
    k_neg: Tensor
    v_neg: Tensor
    w_out: Tensor
    b_out: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 for a wrong result, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads, names = common.thread_counts(options.threads), common.dtypes(options.dtype)
    cases = _cases(options.shapes, names, threads)
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    if options.plots is not None:
        if options.shapes != "sweep":
            raise ValueError("--plots draws the sweeps: it needs --shapes sweep")
        plots.check_installed("--plots")
    common.check_file("--json", options.json)
    common.check_folder("--plots", options.plots)
    machine = common.machine(threads)
    print("\n".join(common.machine_lines(machine)))
    print(f"\nColumns (times: median of {options.repeats} interleaved rounds)")
    print(common.explain(TABLE.columns), flush=True)
    with torch.inference_mode():
        _check_all(cases)
        print("\n" + common.text_head(TABLE.columns), flush=True)
        rows = []
        for case in cases:
            rows.append(measure(case, options.repeats, compile=options.compile))
            print(common.text_row(TABLE.columns, rows[-1]), flush=True)
    summary, notes = summarise(rows), _notes(rows)
    print("\n" + common.text_head(TABLE.summary))
    print("\n".join(common.text_row(TABLE.summary, line) for line in summary))
    print("".join(f"\n{note}" for note in notes), flush=True)
    if options.json is not None:
        head = {"benchmark": "nasa_kernel", "command": _command(options, names, threads)}
        result = {**head, "machine": machine, "rows": rows, "summary": summary, "notes": notes}
        common.write_json(options.json, result)
    if options.plots is not None:
        _plot(options.plots, rows, machine)


def _cases(shapes: str, names: Sequence[str], threads: Sequence[int]) -> list[Case]:
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
        Case(name, REAL[name], dtype, count)
        for dtype in names
        for count in threads
        for name in chosen
    ]


# --- the competitors ------------------------------------------------------------------------------


def make_inputs(shape: Shape, dtype: str) -> Inputs:
    """Inputs of a shape: N(0, 1), the weight scaled to keep that; every dtype rounds the same."""
    b, m, n, h, d, c = shape.b, shape.m, shape.n, shape.h, shape.d, shape.c
    noise = Noise(0)

    def draw(name: str, *sizes: int) -> Tensor:
        return noise.sample(name, 0, 0, sizes)

    made = [draw("q", b, m, h, d)]
    made += [draw(name, b, n, h, d) for name in ("k_pos", "v_pos", "k_neg", "v_neg")]
    made += [draw("w_out", c, c) * c**-0.5, draw("b_out", c)]
    return Inputs(*(x.to(common.DTYPES[dtype]) for x in made))


def chain(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    w_out: Tensor,
    b_out: Tensor,
) -> Tensor:
    """The baseline: scaled_dot_product_attention twice, subtract, linear."""
    pos, neg = TextPack(k_pos, v_pos), TextPack(k_neg, v_neg)
    return eager.nasa_attention(q, pos, neg, None, w_out, b_out, NASA_SCALE, None)


def competitors(x: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The op warm (packed beforehand) and cold (packs in the call), and the eager chain."""
    pos, neg = ops.pack_text(x.k_pos, x.v_pos), ops.pack_text(x.k_neg, x.v_neg)
    out = ops.pack_linear(x.w_out, x.b_out)
    return {
        "warm": lambda: ops.nasa_attention_packed(x.q, pos, neg, out, nasa_scale=NASA_SCALE),
        "cold": lambda: ops.nasa_attention(*x, nasa_scale=NASA_SCALE),
        "eager": lambda: chain(*x),
    }


def exact(x: Inputs) -> Tensor:
    """The result in fp64, from the inputs as they are rounded."""
    return ops.nasa_attention(
        *(tensor.double() for tensor in x), nasa_scale=NASA_SCALE, backend="reference"
    )


def compiled(x: Inputs) -> tuple[Callable[[], Tensor] | None, str]:
    """torch.compile of the eager chain, compiled by a first call; None and why where it fails.

    Call it at the number of threads that it will run on: that number is compiled in.
    """
    torch.compiler.reset()  # recompilations of one function are limited
    fast = torch.compile(chain, fullgraph=True, dynamic=False)
    try:
        fast(*x)
    except Exception as trouble:  # whatever inductor misses here, such as a compiler
        first = (str(trouble).strip().splitlines() or [""])[0]
        why = re.sub(r"\S*/", "", first)  # the folders of paths say nothing elsewhere
        return None, f"torch.compile failed: {type(trouble).__name__}: {why}"
    return lambda: fast(*x), ""


def check(case: Case, x: Inputs) -> dict[str, float]:
    """Relative rms errors of the competitors against fp64.

    Raises:
        WrongResult: an error of the op above the rule, naming the case.
    """
    truth = exact(x)
    found = {name: common.error(run(), truth) for name, run in competitors(x).items()}
    for name in ("warm", "cold"):
        common.check_error(f"{case}, {name}", case.dtype, found[name], found["eager"])
    return found


def _check_all(cases: Sequence[Case]) -> None:
    """Every case before any is timed: a wrong kernel is told in seconds."""
    for case in cases:
        with common.at_threads(case.threads):
            check(case, make_inputs(case.shape, case.dtype))
    factor = f"{common.ERROR_FACTOR:g}"
    print(f"\nchecked {len(cases)} rows against fp64: no error above {factor} times eager's")


# --- a row ----------------------------------------------------------------------------------------


def measure(case: Case, repeats: int, *, compile: bool = True) -> dict[str, Any]:
    """Check one case, then time its competitors; the row of the result.

    Raises:
        WrongResult: see `check`.
    """
    shape, dtype = case.shape, case.dtype
    x = make_inputs(shape, dtype)
    gemm = [torch.ones(size, dtype=common.DTYPES[dtype]) for size in (GEMM[:2], GEMM[:0:-1])]
    with common.at_threads(case.threads):
        found = check(case, x)
        path = ops.explain(*x, nasa_scale=NASA_SCALE)
        runs = competitors(x)
        fast, why_not = compiled(x) if compile else (None, "torch.compile was left out")
        if fast is not None:
            found["compiled"] = common.error(fast(), exact(x))
            common.check_error(f"{case}, compiled", dtype, found["compiled"], found["eager"])
            runs["compiled"] = fast
        parts: dict[str, list[Callable[[], object]]] = {name: [run] for name, run in runs.items()}
        parts["gemm"] = [lambda: F.linear(*gemm)]
        times = {name: made[0] for name, made in common.interleave(parts, repeats).items()}
    ms = {name: taken.ms for name, taken in times.items()}
    roof = 2 * GEMM[0] * GEMM[1] * GEMM[2] / ms["gemm"] / 1e6  # GFLOP/s
    floor_ms = shape.flops / roof / 1e6
    handed = path.path == "eager"
    return {
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
        "gflops": shape.flops / ms["warm"] / 1e6,
        "roof_gflops": roof,
        "floor_ms": floor_ms,
        "roof_fraction": floor_ms / ms["warm"],
        "bytes": shape.bytes(dtype),
        "gb_per_s": shape.bytes(dtype) / ms["warm"] / 1e6,
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
    """Geometric means per dtype and threads, each with its worst shape."""
    lines = []
    for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in rows):
        for title, key, worst in MEASURES:
            mine = [
                row
                for row in rows
                if (row["dtype"], row["threads"]) == (dtype, threads) and row[key] is not None
            ]
            line: dict[str, Any] = {"dtype": dtype, "threads": threads, "measure": title}
            line |= {"count": len(mine), "mean": None, "worst": None, "worst_shape": None}
            if mine:
                last = worst(mine, key=lambda row: row[key])
                line["mean"] = common.geomean(row[key] for row in mine)
                line |= {"worst": last[key], "worst_shape": last["shape"]}
            lines.append(line)
    return lines


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
    return f"{row['shape']} {row['dtype']} x{row['threads']}"


def _command(options: argparse.Namespace, names: Sequence[str], threads: Sequence[int]) -> str:
    """The command without the files it writes."""
    dtype = names[0] if len(names) == 1 else "both"
    words = f"--shapes {options.shapes} --dtype {dtype} --threads {','.join(map(str, threads))}"
    extra = "" if options.compile else " --no-compile"
    return f"python -m {NAME} {words} --repeats {options.repeats}{extra}"


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
    "The NASA op: `benchmarks.nasa_kernel`",
    (
        Column("shape", "", lambda row: row["shape"], 22),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("warm", "ms, the op on texts and weights packed beforehand", number("fused_ms"), 7),
        Column("cold", "ms, the op on plain tensors: it packs in the call", number("cold_ms"), 7),
        Column(
            "eager",
            "ms, scaled_dot_product_attention of each text, subtract, linear",
            number("eager_ms"),
            7,
        ),
        Column("compiled", "ms, torch.compile of eager", number("compiled_ms"), 8),
        Column("spread", "widest interquartile range of these, of its median", _spread, 6),
        Column("cores", "in use, of the competitor with the fewest", common.cores, 5),
        Column("warm/e", "eager's time over warm's: above 1 the op wins", number("speedup"), 6),
        Column("cold/e", "eager's time over cold's; '= eager': handed to it", _cold, 7),
        Column("warm/c", "compiled's time over warm's", number("speedup_compiled"), 6),
        Column("GFLOP/s", "of warm: 8 m n c + 2 m c^2 a picture", number("gflops", ".0f"), 7),
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
        Column("path", "of cold by ops.explain", lambda row: row["path"], 9),
    ),
    (
        Column("geometric mean", "", lambda row: row["measure"], 22),
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
        description="The NASA op on the CPU: checked against fp64, then timed next to PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--shapes",
        default="real",
        metavar="SHAPES",
        help=f"real (the models' layers), sweep (one size at a time), or names: {', '.join(REAL)}",
    )
    common.add_options(parser)
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
