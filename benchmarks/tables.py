"""Results as markdown, for benchmarks/results: python -m benchmarks.tables FILE.json ..."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    attention,
    common,
    generate,
    model_forward,
    nasa_kernel,
    nasa_price,
    train_step,
)
from snoopi import errors
from snoopi.pictures import write_atomically

NAME = "benchmarks.tables"
TABLES = {
    "attention": attention.TABLE,
    "generate": generate.TABLE,
    "model_forward": model_forward.TABLE,
    "nasa_kernel": nasa_kernel.TABLE,
    "nasa_price": nasa_price.TABLE,
    "train_step": train_step.TABLE,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, or 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    page = "\n".join(page_of(path) for path in options.files)
    if options.out is None:
        print(page, end="")
        return
    common.check_file("--out", options.out)
    write_atomically(options.out, page.encode())
    print(f"wrote {options.out}")


def page_of(path: Path) -> str:
    """The page of one result.

    Raises:
        ValueError: a file that is not a benchmark's --json.
    """
    try:
        result = json.loads(path.read_text())
        return common.markdown(TABLES[result["benchmark"]], result)
    except (ValueError, KeyError, TypeError) as trouble:
        raise ValueError(
            f"{path} is not what a benchmark's --json writes: {trouble!r}"
        ) from trouble


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(prog=NAME, description="Benchmarks' --json files as markdown tables.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="results")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="write there instead of printing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
