"""python -m weights_convert SRC DST, and export, lora, merge, extract, blend."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from snoopi import errors
from snoopi.report import text_table
from weights_convert.convert import DTYPES, Report, convert

COMMANDS = ("convert", "export", "lora", "merge", "extract", "blend")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "convert")
    options = _parser().parse_args(words)
    return errors.status("weights_convert", lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog="weights_convert",
        description="Checkpoints into snoopi's model folders, and back. "
        "`python -m weights_convert SRC DST` is short for `convert`.",
    )
    kinds = parser.add_subparsers(required=True, parser_class=errors.Parser, metavar="COMMAND")
    kind = kinds.add_parser(
        "convert",
        help="a checkpoint into a model folder",
        description="A checkpoint (diffusers folder, single file, one network's file, PixArt .pth, "
        "LDM/SGM .safetensors or .ckpt) into a snoopi model folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = kind.add_argument
    add("source", type=Path, metavar="SRC", help="the checkpoint's file or folder")
    add("target", type=Path, metavar="DST", help="the model folder to write")
    add("--arch", metavar="NAME", help="a preset or one-step recipe, or a snoopi.json")
    add("--dtype", choices=list(DTYPES), help="storage of the weights; None: as they are")
    add("--prefer", choices=("ema", "raw"), default="ema", help="where a file holds both")
    add("--check", action="store_true", help="read everything back and compare")
    add("--overwrite", action="store_true", help="replace a model folder at DST")
    kind.set_defaults(run=_convert)
    for name in ("export", "lora", "blend"):
        if importlib.util.find_spec(f"weights_convert.{name}"):
            importlib.import_module(f"weights_convert.{name}").add_parsers(kinds)
    return parser


def _convert(options: argparse.Namespace) -> None:
    report = convert(
        options.source,
        options.target,
        options.arch,
        options.dtype,
        options.prefer,
        options.check,
        options.overwrite,
    )
    print(_text(report))
    if options.check:
        print("read back: every tensor equals the source's")


def _text(report: Report) -> str:
    rows = [
        (
            part.part,
            str(part.tensors),
            f"{part.parameters:,}",
            part.dtype,
            f"{part.megabytes:.1f}",
            str(len(part.dropped)),
        )
        for part in report.parts
    ]
    headers = ("part", "tensors", "parameters", "dtype", "MB", "left out")
    lines = [text_table(headers, rows), ""]
    lines += [f"known by its SHA-256: {name}" for name in report.verified]
    lines += report.notes
    lines.append(f"wrote {report.folder} ({report.arch})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
