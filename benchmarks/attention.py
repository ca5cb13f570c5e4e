"""Plain attention in the native op against scaled_dot_product_attention, on real shapes.

python -m benchmarks.attention [--dtype fp32|bf16|both] [--threads 1,2] [--rounds N] [--json FILE]

Of a picture to itself and to a text of 77 or 120 tokens, batch 1, without a gradient; texts are
packed in the call. It says where `ops.attention` should take the op (snoopi.ops.nasa.pays).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.common import Column, Table, number
from snoopi import errors
from snoopi.noise import Noise
from snoopi.ops import library, nasa
from snoopi.ops.native import NATIVE
from snoopi.ops.packs import TextPack

NAME = "benchmarks.attention"
GEMM = (2048, 1280, 1280)


class Shape(NamedTuple):
    """Query and text tokens, heads, head dim."""

    m: int
    n: int
    h: int
    d: int


SHAPES = {
    **{f"sd15 self {m}": Shape(m, m, 8, d) for m, d in ((4096, 40), (1024, 80), (256, 160))},
    **{f"sd21 self {m}": Shape(m, m, h, 64) for m, h in ((4096, 5), (1024, 10), (256, 20))},
    "pixart self 1024": Shape(1024, 1024, 16, 72),
    "vae self 4096": Shape(4096, 4096, 1, 512),
    "shapes self 64": Shape(64, 64, 4, 16),
    "shapes self 16": Shape(16, 16, 7, 16),
    "sd15 text 4096": Shape(4096, 77, 8, 40),
    "sd21 text 1024": Shape(1024, 77, 10, 64),
    "sd15 text 64": Shape(64, 77, 8, 160),
    "pixart text 1024": Shape(1024, 120, 16, 72),
}


def measure(name: str, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """One row.

    Raises:
        WrongResult: the op's error is above the rule.
    """
    s, noise = SHAPES[name], Noise(0)
    wide = [
        noise.sample(x, 0, 0, (1, t, s.h, s.d)) for x, t in (("q", s.m), ("k", s.n), ("v", s.n))
    ]
    q, k, v = (x.to(common.DTYPES[dtype]) for x in wide)
    scale = s.d**-0.5

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b h m d]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    with torch.no_grad(), common.at_threads(threads):
        exact = sdpa(q.double(), k.double(), v.double())
        ours, theirs = (
            common.error(got, exact)
            for got in (library.attention_op(q, k, v, scale), sdpa(q, k, v))
        )
        common.check_eager(f"{name} {dtype}", dtype, theirs)
        taken = nasa.pays(q, TextPack(k, v))
        if taken:
            common.check_error(f"{name} {dtype}", dtype, ours, theirs)
        else:  # it may be less exact, which is shown and one of the reasons
            common.check_eager(f"{name} {dtype}", dtype, ours)
        left, right = (
            noise.sample(x, 0, 0, size).to(q.dtype)
            for x, size in (("left", GEMM[:2]), ("right", (GEMM[2], GEMM[1])))
        )
        runs: dict[str, list[Callable[[], object]]] = {
            "op": [lambda: library.attention_op(q, k, v, scale)],
            "sdpa": [lambda: sdpa(q, k, v)],
            "gemm": [lambda: F.linear(left, right)],
        }
        times = {key: made[0] for key, made in common.interleave(runs, rounds).items()}
    gflop = 4 * s.m * s.n * s.h * s.d / 1e9
    rate = 2 * GEMM[0] * GEMM[1] * GEMM[2] / 1e6 / times["gemm"].ms  # GFLOP/s
    return {
        "shape": name,
        "dtype": dtype,
        "threads": threads,
        "op_ms": times["op"].ms,
        "sdpa_ms": times["sdpa"].ms,
        "speedup": times["sdpa"].ms / times["op"].ms,
        "floor": gflop / rate * 1e3 / times["op"].ms,
        "error_op": ours,
        "error_sdpa": theirs,
        "taken": "op" if taken else "sdpa",
        "cores": {key: taken.cores for key, taken in times.items()},
    }


TABLE = Table(
    f"Plain attention against PyTorch's: `{NAME}`",
    (
        Column("shape", "", lambda row: row["shape"], 17),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("op", "ms", number("op_ms", ".3f"), 9),
        Column("sdpa", "ms", number("sdpa_ms", ".3f"), 9),
        Column("speedup", "sdpa's time over the op's", number("speedup"), 7),
        Column(
            "floor", "the products' time at a large GEMM's rate, over the op's", number("floor"), 5
        ),
        Column("error", "of the op against fp64, relative rms", number("error_op", ".1e"), 7),
        Column("sdpa's", "error", number("error_sdpa", ".1e"), 7),
        Column("taken", "what ops.attention takes", lambda row: row["taken"], 5),
        Column("cores", "in use, of the competitor with the fewest", common.cores, 5),
    ),
    (
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "", number("threads", "d"), 3),
        Column("speedup", "", number("speedup"), 7),
        Column("worst", "", number("worst"), 5),
        Column("at", "", lambda row: row["at"], 17),
    ),
)


def summary(rows: Sequence[common.Row]) -> list[dict[str, Any]]:
    """Geometric mean and worst shape of what ops.attention takes the op for."""
    found = []
    for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in rows):
        mine = [r for r in rows if (r["dtype"], r["threads"], r["taken"]) == (dtype, threads, "op")]
        if mine:
            worst = min(mine, key=lambda row: row["speedup"])
            mean = common.geomean(row["speedup"] for row in mine)
            found.append(
                {
                    "dtype": dtype,
                    "threads": threads,
                    "speedup": mean,
                    "worst": worst["speedup"],
                    "at": worst["shape"],
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 for a wrong result, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads = common.thread_counts(options.threads)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if not NATIVE.loaded:
        raise ValueError(f"there is nothing to compare: {NATIVE.why}")
    common.check_file("--json", options.json)
    described = common.begin(threads, TABLE, f"{options.rounds} interleaved rounds")
    print("\n" + common.text_head(TABLE.columns), flush=True)
    rows = []
    for dtype in common.dtypes(options.dtype):
        for count in threads:
            for name in SHAPES:
                rows.append(measure(name, dtype, count, options.rounds))
                print(common.text_row(TABLE.columns, rows[-1]), flush=True)
    notes = ["the means are of the rows where ops.attention takes the op", *common.busy(rows)]
    counts = ",".join(map(str, threads))
    words = f"--dtype {options.dtype} --threads {counts} --rounds {options.rounds}"
    command = f"python -m {NAME} {words}"
    common.finish(options.json, TABLE, command, described, rows, summary(rows), notes)


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="Plain attention in the native op against scaled_dot_product_attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    common.add_options(parser)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="interleaved rounds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
