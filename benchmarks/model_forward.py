"""One call of a model's networks, by part, against diffusers on the same weights.

python -m benchmarks.model_forward [--models sd21,sd15,pixart-512,sdxl] [--dtype fp32|bf16|both]
                                   [--batch 1,4] [--parts backbone,vae,text] [--size PIXELS]
                                   [--rounds N] [--compile [unet|all]] [--profile] [--threads N,...]
                                   [--keep FOLDER] [--json FILE]

Full size, random weights, 512 x 512. The sides run in processes of their own and take turns; what
they compute is compared before anything is timed. Needs diffusers and transformers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import common, models, sides
from benchmarks.common import Column, Row, Table, number
from benchmarks.models import Worker
from snoopi import errors
from snoopi.models.t5 import T5Config
from snoopi.zoo import ModelSpec

NAME = "benchmarks.model_forward"
PARTS = ("backbone", "vae", "text")
GEMMS = ((4096, 1280, 1280), (4096, 320, 2560))  # m, in, out: the best one is the machine's rate
TOP = 15  # operators of a profile
Rows = list[dict[str, Any]]


class Case(NamedTuple):
    """What is measured: the parts of a model in one format."""

    model: str
    dtype: str
    threads: int
    batches: Sequence[int]
    parts: Sequence[str]
    pixels: int
    rounds: int
    compiled: str
    profile: bool


def measure(case: Case, folder: Path) -> tuple[Rows, Rows]:
    """The rows of a model, and those of its profile.

    Raises:
        WrongResult: a side computes something else.
    """
    spec = models.spec(case.model)
    models.write(folder, spec, case.dtype, tiny=False)
    # A T5 encoder is in no folder: both sides have its prompts from a cache.
    cached = isinstance(spec.text[0].config, T5Config)
    parts = [part for part in case.parts if not (part == "text" and cached)]
    exact = _exact(case, spec, folder, parts)

    def setup(*names: str) -> sides.Setup:
        return models.setup(folder, spec, case.dtype, case.threads, *names, compiled=case.compiled)

    theirs = [side for side in sides.THEIRS if side != "compiled" or case.compiled]
    rows: Rows = []
    profiled: Rows = []
    with (
        models.workers([*map(setup, sides.OURS), setup(*theirs)]) as workers,
        common.at_threads(case.threads),
    ):
        for batch in case.batches:
            given = models.inputs(spec, batch, case.pixels)
            for side in (*sides.OURS, "diffusers"):
                workers[side].ask("give", given)
            for part in parts:
                rows += _part(case, batch, part, workers, exact.get(part))
                if case.profile and batch == case.batches[0]:
                    profiled += _profile(case, part, workers)
    return rows, profiled


def _exact(case: Case, spec: ModelSpec, folder: Path, parts: Sequence[str]) -> Mapping[str, Any]:
    """diffusers' results in fp32 of one picture by part; none for fp32 itself, or if memory lacks
    the room."""
    if case.dtype == "fp32" or not models.fits_in_fp32(folder, case.dtype):
        return {}
    setup = models.setup(folder, spec, "fp32", case.threads, "diffusers")
    with models.workers([setup]) as workers:
        worker = workers["diffusers"]
        worker.ask("give", models.inputs(spec, 1, case.pixels))
        return {part: worker.ask("output", "diffusers", part) for part in parts}


def _part(case: Case, batch: int, part: str, workers: Mapping[str, Worker], exact: Any) -> Rows:
    """A part's row, and the backbone's with a negative under NASA: the calls of the check are what
    warms each side up."""
    what = f"{case.model} {case.dtype} {part}, batch {batch}"
    names = [side for side in workers if side != "compiled" or _compiles(part, case.compiled)]
    first = workers["compiled"].span("compiled", part).seconds if "compiled" in names else None
    got = {side: workers[side].ask("output", side, part) for side in names}
    found = models.check(what, case.dtype, got, exact)
    gflop = workers["diffusers"].ask("flops", part) / 1e9
    against = "diffusers" if exact is None else "fp32"
    checked = {"error": found, "error_against": against, "compile_s": first}
    rows = [_timed(case, batch, part, workers, dict.fromkeys(names, part), gflop, checked)]
    if part == "backbone":
        ours = {side: workers[side].ask("output", side, "nasa") for side in sides.OURS}
        what = f"{what}, with NASA"
        rounding = None if exact is None else found["diffusers"]
        away = models.check_negative(what, case.dtype, ours, got["none"], rounding)
        checked = {"error": away, "error_against": "none", "compile_s": None}
        calls = {side: "nasa" if side in sides.OURS else part for side in names}
        rows.append(_timed(case, batch, "backbone+nasa", workers, calls, gflop, checked))
    return rows


def _compiles(part: str, option: str) -> bool:
    """Whether --compile reaches a part."""
    return (part == "backbone" and option != "") or (part == "vae" and option == "all")


def _timed(
    case: Case,
    batch: int,
    part: str,
    workers: Mapping[str, Worker],
    calls: Mapping[str, str],
    gflop: float,
    checked: Mapping[str, Any],
) -> dict[str, Any]:
    """A row, printed: a call of each side (by its name in `calls`) in turns with GEMMS here."""
    runs: dict[str, list[Callable[[], object]]] = {
        side: [lambda side=side, call=call: workers[side].span(side, call)]  # type: ignore[misc]
        for side, call in calls.items()
    }
    linears = _linears(case.dtype)
    taken = common.interleave({**runs, "gemm": linears}, case.rounds, warmup=0)
    rate = max(
        2 * m * k * n / (1e6 * times.ms)
        for times, (m, k, n) in zip(taken.pop("gemm"), GEMMS, strict=True)
    )
    times = {side: parts[0] for side, parts in taken.items()}
    ours = times["snoopi"].seconds
    ratios = {
        side: [a / b for a, b in zip(other.seconds, ours, strict=True)]
        for side, other in times.items()
        if side != "snoopi"
    }
    gflops = 1e3 * gflop / times["snoopi"].ms
    row = {
        "model": case.model,
        "part": part,
        "dtype": case.dtype,
        "threads": case.threads,
        "batch": batch,
        "pixels": case.pixels,
        "ms": {side: one.ms for side, one in times.items()},
        "quartiles_ms": {side: one.quartiles_ms for side, one in times.items()},
        "speedup": {side: statistics.median(one) for side, one in ratios.items()},
        "speedup_quartiles": {side: common.quartiles(one) for side, one in ratios.items()},
        "gflop": gflop,
        "gflops": gflops,
        "gemm_gflops": rate,
        "roof_fraction": gflops / rate,
        "cores": {side: one.cores for side, one in times.items()},
        **checked,
    }
    print(common.text_row(TABLE.columns, row), flush=True)
    return row


def _linears(dtype: str) -> list[Callable[[], object]]:
    """GEMMS as calls, once called."""
    kind = common.DTYPES[dtype]

    def make(m: int, k: int, n: int) -> Callable[[], object]:
        x, w = (torch.randn(rows, k).to(kind) for rows in (m, n))
        F.linear(x, w)
        return lambda: F.linear(x, w)

    return [make(*sizes) for sizes in GEMMS]


def _profile(case: Case, part: str, workers: Mapping[str, Worker]) -> Rows:
    """The operators that take most in snoopi's call and in that of channels_last diffusers."""
    return [
        {
            "model": case.model,
            "part": part,
            "dtype": case.dtype,
            "threads": case.threads,
            "side": side,
            "operator": operator,
            "calls": calls,
            "self_ms": ms,
            "share": share,
        }
        for side in ("snoopi", "channels_last")
        for operator, calls, ms, share in workers[side].ask("profile", side, part, TOP)
    ]


# --- the command ----------------------------------------------------------------------------------


def _of(key: str, side: str, form: str = ".2f") -> Callable[[Row], str]:
    """A cell: row[key][side], a dash where there is none."""
    return lambda row: number(side, form)(row[key])


def _errors(row: Row) -> str:
    """A cell: snoopi's error, and diffusers' where both are against fp32."""
    ours = row["error"]["snoopi"]
    return f"{ours:.1e}" + (
        f"/{row['error']['diffusers']:.1e}" if row["error_against"] == "fp32" else ""
    )


TABLE = Table(
    f"One call of a network, by part, against diffusers: `{NAME}`",
    (
        Column("model", "", lambda row: row["model"], 10),
        Column("part", "", lambda row: row["part"], 13),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("batch", "pictures of a call", number("batch", "d"), 5),
        Column("snoopi", 'ms, optimize="auto"', _of("ms", "snoopi", ".0f"), 6),
        Column("none", 'ms, optimize="none"', _of("ms", "none", ".0f"), 6),
        Column("diffusers", "ms, as it comes", _of("ms", "diffusers", ".0f"), 9),
        Column(
            "best",
            "ms, diffusers in channels_last under inference_mode",
            _of("ms", "channels_last", ".0f"),
            6,
        ),
        Column(
            "compiled", "ms, under torch.compile with freezing", _of("ms", "compiled", ".0f"), 8
        ),
        Column("/diff", "diffusers' time over snoopi's", _of("speedup", "diffusers"), 5),
        Column("/best", "best's time over snoopi's", _of("speedup", "channels_last"), 5),
        Column("/comp", "compiled's time over snoopi's", _of("speedup", "compiled"), 5),
        Column("GFLOP", "of the plain call", number("gflop", ".0f"), 6),
        Column("GFLOP/s", "of snoopi", number("gflops", ".0f"), 7),
        Column("roof", "that over the rate of F.linear", number("roof_fraction"), 4),
        Column(
            "error",
            "of snoopi/diffusers against diffusers in fp32; alone: from diffusers, with NASA from "
            "none",
            _errors,
            15,
        ),
        Column("cores", "in use", common.cores, 5),
    ),
    (
        Column("operator", "", lambda row: row["operator"], 48),
        Column("model", "", lambda row: f"{row['model']} {row['dtype']} {row['part']}", 24),
        Column("side", "", lambda row: row["side"], 13),
        Column("calls", "", number("calls", "d"), 5),
        Column("ms", "", number("self_ms", ".1f"), 8),
        Column("share", "", number("share"), 5),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 if a side computes something else, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads = models.check_options(options)
    names, batches = models.names(options.models), models.batches(options.batch)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    described = common.begin(threads, TABLE, f"{options.rounds} interleaved rounds")
    print("\n" + common.text_head(TABLE.columns), flush=True)
    rows: Rows = []
    profiled: Rows = []
    for model in names:
        for dtype in common.dtypes(options.dtype):
            with models.place(options.keep, model, dtype) as folder:
                for count in threads:
                    more = (options.size, options.rounds, options.compile, options.profile)
                    case = Case(model, dtype, count, batches, parts, *more)
                    found, operators = measure(case, folder)
                    rows += found
                    profiled += operators
    command = _command(options, threads)
    common.finish(options.json, TABLE, command, described, rows, profiled, _notes(rows))


def _notes(rows: Rows) -> list[str]:
    """What the table does not show."""
    notes = common.busy(rows) + models.unjudged(rows)
    rates: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        rates.setdefault((row["dtype"], row["threads"]), []).append(row["gemm_gflops"])
    for (dtype, threads), found in rates.items():
        text = f"{statistics.median(found):.0f} GFLOP/s, the median of the rows"
        notes.append(f"F.linear in {dtype}, {threads} threads: {text}")
    notes += [
        f"{row['model']} {row['dtype']} {row['part']}, batch {row['batch']}: compiled in "
        f"{row['compile_s']:.0f} s"
        for row in rows
        if row["compile_s"] is not None
    ]
    return notes


def _command(options: argparse.Namespace, threads: Sequence[int]) -> str:
    """The command without the files it writes."""
    counts = ",".join(map(str, threads))
    words = f"--models {options.models} --dtype {options.dtype} --batch {options.batch}"
    words += f" --parts {options.parts} --size {options.size} --rounds {options.rounds}"
    words += f" --compile {options.compile}" if options.compile else ""
    words += " --profile" if options.profile else ""
    return f"python -m {NAME} {words} --threads {counts}"


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="One call of a model's networks, by part, against diffusers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    common.add_options(parser)
    models.add_options(parser)
    add("--parts", default=",".join(PARTS), metavar="PART[,...]", help="which networks")
    add("--profile", action="store_true", help="the operators that take most, by side")
    return parser


if __name__ == "__main__":
    sys.exit(main())
