"""The words of `python -m snoopi.evaluate`, and what can be wrong with them."""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from snoopi import arguments, errors, worlds
from snoopi.evaluate import hpsv2, measure, pairs
from snoopi.evaluate.clip_score import PREFIX, SIZE
from snoopi.evaluate.measure import Switches
from snoopi.evaluate.picture_sets import MANIFEST, PROMPTS, SUFFIXES
from snoopi.pipeline import MODES


def parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    found = errors.Parser(
        prog="snoopi.evaluate",
        description="Measure a model or a folder of pictures.",
        epilog="docs/metrics.md has the protocols, and lines to copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument(
        "target",
        nargs="?",
        metavar="MODEL|FOLDER",
        help="a model folder (or a shipped model's name), which draws, or a folder of pictures",
    )
    found.add_argument(
        "--metrics",
        required=True,
        metavar="M[,M...]",
        help=f"some of {', '.join(measure.METRICS)} (named: worlds: all a prompt names is right)",
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    found.add_argument("--batch", type=int, default=32, metavar="N", help="pictures at once")
    _drawing_words(found.add_argument_group("pictures").add_argument)
    _tool_words(found.add_argument_group("networks (folders made by weights_convert)").add_argument)
    _protocol_words(found.add_argument_group("protocols").add_argument)
    return found


def _drawing_words(add: Callable[..., Any]) -> None:
    add("--prompts", type=Path, metavar="FILE", help=".txt, .jsonl, or .json (a list, or labels)")
    add(
        *("--num", "--count"),  # torchrun takes --num for a short --numa-binding
        type=int,
        metavar="N",
        help="the first N prompts or pictures; None: all (under torchrun: --count)",
    )
    add("--out", type=Path, metavar="FOLDER", help="a model's pictures; what is there is kept")
    add("--world", choices=worlds.NAMES, help="prompts, real pictures and judge of a small world")
    add("--seed", type=int, default=0, help="of the starting noise: picture i has noise i")
    add("--guidance", choices=MODES, default="nasa", help="how the negative is used")
    add("--negative", metavar="TEXT", help="what to steer away from, for all prompts")
    add(
        "--scale",
        type=arguments.scale,
        metavar="S[,S...]",
        help="strength of the guidance; None: the model's, and for removal's pairs under nasa 0.5",
    )
    add("--steps", type=int, help="sampler steps; None: the model's")
    add("--size", metavar="HxW", help="size in pixels; None: the model's")
    add("--dtype", choices=list(arguments.DTYPES), help="compute type; None: as stored")
    add("--optimize", choices=("auto", "none"), default="auto", help="pack weights for speed")


def _tool_words(add: Callable[..., Any]) -> None:
    add("--inception", metavar="FOLDER", help="the FID Inception: fid, kid, pr")
    add("--vgg", metavar="FOLDER", help="VGG16: pr --pr-features vgg16")
    add("--clip", metavar="FOLDER", help="a CLIP with both towers: clip, removal")
    add("--hps", metavar="FOLDER", help="HPSv2's CLIP: hpsv2")


def _protocol_words(add: Callable[..., Any]) -> None:
    add(
        "--reference",
        type=Path,
        metavar="PATH",
        help="real pictures (a folder), or a .safetensors of their features or statistics",
    )
    add("--features", type=Path, metavar="FILE", help="features of the pictures, as a .safetensors")
    add("--cache", type=Path, metavar="FOLDER", help="keep features of the reference there")
    add("--save-features", type=Path, metavar="FOLDER", help="keep features of the pictures there")
    add("--kid-subsets", type=int, default=Switches.kid_subsets, metavar="N", help="of kid")
    add("--kid-size", type=int, default=Switches.kid_size, metavar="N", help="pictures of a subset")
    add(
        "--pr-features",
        choices=("inception", "vgg16"),
        default="inception",
        help="what pr compares: as the COCO-30K line, or as Kynkaanniemi et al.",
    )
    add("--pr-k", type=int, default=Switches.pr_k, metavar="K", help="the neighbour of pr's radius")
    add("--bgr", action="store_true", help="pr reads channels as cv2 does, like the published line")
    add("--clip-prefix", default=PREFIX, metavar="TEXT", help="in front of clip's texts")
    add(
        "--clip-first",
        type=int,
        default=SIZE,
        metavar="N",
        help="pixels a side before CLIP's own resize, 0: as they are",
    )
    add("--hps-version", choices=hpsv2.VERSIONS, help="of --hps: its files do not say it")
    add("--hps-prompts", type=Path, metavar="FOLDER", help="the benchmark's four .json files")
    add("--hps-antialias", choices=("on", "off"), default="on", help="off: torchvision below 0.17")
    add("--hps-jpeg", type=int, default=hpsv2.QUALITY, metavar="Q", help="JPEG pass, 0: none")
    add(
        "--pairs", type=Path, metavar="FILE", help="removal's pairs (.jsonl); None: the paper's six"
    )
    add(
        "--removal-count",
        type=int,
        default=pairs.COUNT,
        metavar="N",
        help="pictures a pair, or prompts an attribute of a world",
    )


# Switches by the metrics that read them: given with others alone they would be given in vain.
_READ_BY = {
    ("kid_subsets", "kid_size"): ("kid",),
    ("pr_features", "pr_k", "bgr"): ("pr",),
    ("clip_prefix",): ("clip",),
    ("clip_first",): ("clip", "removal"),
    ("hps_version", "hps_prompts", "hps_antialias", "hps_jpeg"): ("hpsv2",),
    ("pairs", "removal_count"): ("removal",),
    ("prompts", "num", "negative"): ("fid", "kid", "pr", "clip", "named", "hpsv2"),
    ("reference", "features", "cache", "save_features"): ("fid", "kid", "pr"),
}


_parser = functools.cache(parser)


def given(options: argparse.Namespace, name: str) -> bool:
    """Whether an option has another value than it has by itself."""
    return bool(getattr(options, name) != _parser().get_default(name))


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def check(options: argparse.Namespace, metrics: Sequence[str]) -> None:
    """ValueError for what is known to be wrong before anything is read."""
    for names, readers in _READ_BY.items():
        for name in names:
            if given(options, name) and not set(metrics) & set(readers):
                raise ValueError(f"{flag(name)} is for {', '.join(readers)}: leave it out")
    _check_features(options)
    _check_json(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    for name in ("num", "batch", "kid_subsets", "pr_k", "removal_count", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {value}")
    if options.kid_size < 2:
        raise ValueError(f"--kid-size must be at least 2, got {options.kid_size}")
    if not 0 <= options.hps_jpeg <= 95:
        raise ValueError(f"--hps-jpeg must be from 1 to 95, or 0 for none, got {options.hps_jpeg}")
    if options.clip_first < 0:
        raise ValueError(f"--clip-first must be 0 or more, got {options.clip_first}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {options.seed}")
    for name in ("out", "cache", "save_features"):
        path = getattr(options, name)
        if path and path.exists() and not path.is_dir():
            raise ValueError(f"{flag(name)} must be a folder, got the file {path}")
    for path in filter(None, (options.json, options.out, options.cache, options.save_features)):
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(above, os.W_OK) or (above != path and not above.is_dir()):
            raise ValueError(f"cannot write {path}: {above} is no folder that can be written to")
    if options.world and (options.pr_k != 3 or options.bgr or options.pr_features != "inception"):
        raise ValueError("--pr-k, --pr-features and --bgr: a world's judge has its own features")
    if options.world:
        for name in ("prompts", "reference", "features", "pairs", "cache", "save_features"):
            if getattr(options, name):
                what = "prompts, real pictures and a judge of its own"
                raise ValueError(f"--world has {what}: leave {flag(name)} out")


def _check_features(options: argparse.Namespace) -> None:
    """ValueError for folders of features that nothing would be kept in, and rows left out."""
    if options.features and options.save_features:
        raise ValueError("--save-features: the features are there (--features)")
    if options.features and options.num is not None:
        raise ValueError("--num: every row of --features is measured")
    if options.cache and options.reference and options.reference.is_file():
        raise ValueError(f"--cache: the reference is a file of features, {options.reference}")


def _check_json(path: Path | None) -> None:
    """ValueError if the report would take the place of anything but an earlier report."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json must be a file, got the folder {path}")
    if path.name in (MANIFEST, PROMPTS) or path.suffix.lower() in SUFFIXES:
        raise ValueError(f"--json: {path.name} is a name of a set of pictures: give another")
    if path.is_file() and path.stat().st_size:
        try:
            there = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            there = None
        if not (isinstance(there, dict) and "metrics" in there):
            raise ValueError(f"--json: {path} holds something else: remove it, or give another")
