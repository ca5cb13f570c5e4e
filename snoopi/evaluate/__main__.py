"""Measure a model or a folder of pictures, on the command line.

python -m snoopi.evaluate MODEL --metrics fid,clip --prompts captions.txt --out FOLDER ...
python -m snoopi.evaluate FOLDER --metrics fid,kid,pr --reference REAL --inception TOOL
torchrun --nproc-per-node N -m snoopi.evaluate MODEL ...            draws on N ranks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snoopi import errors

if __name__ == "__main__":
    errors.leave_on_signals("snoopi.evaluate")  # the imports below take seconds

import numpy
import PIL
import torch
from torch import Tensor

import snoopi
from snoopi import arguments, parallel, worlds
from snoopi.evaluate import features, hpsv2, measure, pairs
from snoopi.evaluate.clip_score import PREFIX, SIZE
from snoopi.evaluate.measure import Bench, Result, Switches, WorldBench
from snoopi.evaluate.negatives import EVALUATION_SEED
from snoopi.evaluate.picture_sets import (
    DrawnSet,
    How,
    Job,
    Row,
    draw,
    found_rows,
    is_model,
    model_digest,
    paint,
    picture_files,
    read_rows,
    texts_digest,
)
from snoopi.evaluate.prompts import read_prompts
from snoopi.evaluate.removal import Generate
from snoopi.evaluate.world import Ruler
from snoopi.folders import read_spec, shipped_or_path
from snoopi.noise import Noise
from snoopi.pictures import write_atomically
from snoopi.pipeline import MODES, Pipeline, load
from snoopi.tokenize import PromptCut
from snoopi.worlds.judge import Judge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORLD_COUNT = 1000  # pictures of a world, if --num does not say
_MAIN = ("fid", "kid", "pr", "clip", "named")  # metrics that read the main set of pictures


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped, 1 when
    another rank was lost."""
    options = _parser().parse_intermixed_args(words)
    try:
        with errors.interruptible():
            _command(options)
    except (ValueError, OSError) as error:
        line = errors.one_line(error)
        if line is None:
            raise
        _complain(line, every_rank=isinstance(error, OSError))
        return 2
    except errors.RankLost as lost:
        _complain(f"{lost}; the same command goes on", every_rank=True)
        return 1
    except errors.Interrupted as stop:
        _complain(f"{stop.caught.name}: stopped; the same command goes on")
        return 128 + stop.caught
    return 0


def _complain(line: str, every_rank: bool = False) -> None:
    """One line on stderr: of rank 0, or (where the others may be well) of each rank it befalls."""
    if _rank() == 0 or every_rank:
        where = f"rank {_rank()}: " if _rank() else ""
        print(f"snoopi.evaluate: {where}{line}", file=sys.stderr, flush=True)


def _rank() -> int:
    """This process's number; there may be no process group yet, or no more."""
    return int(os.environ.get("RANK", "0"))


# --- the command ----------------------------------------------------------------------------------


def _command(options: argparse.Namespace) -> None:
    metrics = measure.names(options.metrics)
    _check_options(options)
    model = _model(options)
    how = _how(options)
    sets = _sets(options, metrics, model, how)
    bench = _bench(options, metrics, model, sets, how)
    measure.check(metrics, bench)
    for wanted in sets.values():
        wanted.check()
    seconds, drawn = {}, {}
    if model is not None:
        started = time.monotonic()
        for wanted in sets.values() if _rank() == 0 else ():
            wanted.tidy()  # no rank draws before all have met
        generates = options.world and "removal" in metrics
        if generates or any(wanted.missing() for wanted in sets.values()):
            drawn = _draw(options, model, sets, bench, how)
        else:
            _say("every picture is there")
            for wanted in sets.values() if _rank() == 0 else ():
                wanted.start()  # there may be fewer than before
        seconds["drawing"] = time.monotonic() - started
    if _rank() == 0:
        started = time.monotonic()
        results = measure.measure(metrics, bench, _say)
        seconds["measuring"] = time.monotonic() - started
        report = _report(options, bench, sets, drawn, results, seconds)
        print(f"{_headline(options, model)}\n\n{table(results)}")
        if options.json:
            write_atomically(options.json, (json.dumps(report, indent=2) + "\n").encode())
            print(f"wrote {options.json}")


def _check_options(options: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    for name in ("num", "batch", "kid_subsets", "pr_k", "removal_count", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.kid_size < 2:
        raise ValueError(f"--kid-size must be at least 2, got {options.kid_size}")
    if not 0 <= options.hps_jpeg <= 95:
        raise ValueError(f"--hps-jpeg must be from 1 to 95, or 0 for none, got {options.hps_jpeg}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {options.seed}")
    if options.json and options.json.is_dir():
        raise ValueError(f"--json must be a file, got the folder {options.json}")
    for name in ("out", "cache", "save_features"):
        path = getattr(options, name)
        if path and path.exists() and not path.is_dir():
            raise ValueError(f"--{name.replace('_', '-')} must be a folder, got the file {path}")
    for path in filter(None, (options.json, options.out, options.cache, options.save_features)):
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(above, os.W_OK) or (above != path and not above.is_dir()):
            raise ValueError(f"cannot write {path}: {above} is no folder that can be written to")
    if options.world and (options.pr_k != 3 or options.bgr or options.pr_features != "inception"):
        raise ValueError("--pr-k, --pr-features and --bgr: a world's judge has its own features")
    if options.world and (options.reference or options.features or options.prompts):
        raise ValueError(
            "--world has prompts and real pictures of its own: leave --prompts, --reference and "
            "--features out"
        )


def _model(options: argparse.Namespace) -> Path | None:
    """The model folder that draws, None if pictures or features are there."""
    if options.target is None:
        if options.features is None:
            raise ValueError("expected a model folder, a folder of pictures, or --features FILE")
        _draws_nothing(options)
        return None
    path = shipped_or_path(options.target)
    if not is_model(path):
        if not path.is_dir():
            raise ValueError(f"{path} is no model folder and no folder of pictures")
        _draws_nothing(options)
        return None
    read_spec(path)
    if options.out is None:
        raise ValueError("--out must say where the pictures go")
    if options.features:
        raise ValueError("--features are instead of a model's pictures: leave MODEL out")
    return path


def _draws_nothing(options: argparse.Namespace) -> None:
    """ValueError for options that only a model's pictures have."""
    for name in ("out", "scale", "steps", "size", "dtype"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for a model: the pictures are there")


def _how(options: argparse.Namespace) -> How:
    scale = tuple(options.scale) if isinstance(options.scale, list) else options.scale
    size = arguments.size(options.size)
    return How(options.seed, options.guidance, scale, options.steps, size)


# --- the pictures ---------------------------------------------------------------------------------


def _sets(
    options: argparse.Namespace, metrics: Sequence[str], model: Path | None, how: How
) -> dict[str, DrawnSet]:
    """What a model has to draw for the metrics: the "main" set, "hpsv2" and "removal"."""
    if model is None:
        return {}
    identity = {
        "model": model.resolve().name,
        "weights": model_digest(model),
        **dataclasses.asdict(how),
        "negative": options.negative,
        "dtype": options.dtype or "as stored",
        "device": options.device,
        "optimize": options.optimize,
    }
    found = {}
    benchmark = "hpsv2" in metrics and options.hps_prompts is not None
    if any(name in _MAIN for name in metrics) or ("hpsv2" in metrics and not benchmark):
        found["main"] = _main_set(options, identity)
    if benchmark:
        found["hpsv2"] = _benchmark_set(options, identity)
    if "removal" in metrics and not options.world:
        found["removal"] = _removal_set(options, identity)
    return found


def _main_set(options: argparse.Namespace, identity: Mapping[str, Any]) -> DrawnSet:
    texts, source = _prompts(options)
    if options.num is not None and options.num > len(texts):
        raise ValueError(f"--num {options.num}: {source} has {len(texts)} prompts")
    first = enumerate(texts[: options.num])
    jobs = [Job(f"{i:05d}.png", text, options.negative, i) for i, text in first]
    # A world's prompts are a function of their index: more of them are the same set.
    digest = source if options.world else texts_digest(texts)
    return DrawnSet(options.out, jobs, {**identity, "prompts": digest})


def _benchmark_set(options: argparse.Namespace, identity: Mapping[str, Any]) -> DrawnSet:
    """HPSv2's; --num: of each style. The noise is the prompt's place among all."""
    styles = hpsv2.read_prompts(options.hps_prompts)
    every = [(style, i, text) for style, texts in styles.items() for i, text in enumerate(texts)]
    jobs = [
        Job(f"{style}/{i:05d}.png", text, options.negative, noise)
        for noise, (style, i, text) in enumerate(every)
        if options.num is None or i < options.num
    ]
    digest = texts_digest([text for _, _, text in every])
    return DrawnSet(options.out / "hpsv2", jobs, {**identity, "prompts": digest})


def _removal_set(options: argparse.Namespace, identity: Mapping[str, Any]) -> DrawnSet:
    """Before and after, at the paper's strength if nothing else is said."""
    identity = {**identity, "negative": "each pair's"}
    if identity["scale"] is None and identity["guidance"] == "nasa":
        identity["scale"] = pairs.SCALE
    jobs = pairs.jobs(_pairs(options), options.removal_count)
    texts = [f"{job.prompt}\n{job.negative}" for job in jobs if job.noise == 0]
    return DrawnSet(options.out / "removal", jobs, {**identity, "prompts": texts_digest(texts)})


def _pairs(options: argparse.Namespace) -> list[pairs.Pair]:
    return pairs.read_pairs(options.pairs or pairs.PAPER)


def _prompts(options: argparse.Namespace) -> tuple[list[str], str]:
    """Prompts of the main set, and where they are from."""
    if options.world:
        count = options.num or WORLD_COUNT
        world = worlds.build(options.world)
        texts = world.prompts(Noise(EVALUATION_SEED), count, "held-out", stream="evaluate.prompts")
        return texts, f"held-out captions of the {options.world} world"
    if options.prompts is None:
        raise ValueError("--prompts must name a file of prompts to draw")
    return read_prompts(options.prompts), str(options.prompts)


def _bench(
    options: argparse.Namespace,
    metrics: Sequence[str],
    model: Path | None,
    sets: Mapping[str, DrawnSet],
    how: How,
) -> Bench:
    """What is measured, and with what."""
    tools = {name: getattr(options, name) for name in ("inception", "vgg", "clip", "hps")}
    bench = Bench(
        tools={name: Path(folder) for name, folder in tools.items() if folder},
        switches=_switches(options),
        cache=options.cache,
        keep=options.save_features,
        batch=options.batch,
        device=options.device,
    )
    if options.features:
        bench.features = features.read_features(options.features)
    if options.reference:
        is_file = options.reference.is_file()
        bench.reference = features.read_features(options.reference) if is_file else None
        if not is_file:
            picture_files(options.reference)
            bench.reference = options.reference
    if "removal" in metrics:
        bench.pairs = _pairs(options)
    if model is not None:
        rows = {name: wanted.rows() for name, wanted in sets.items()}
        bench.rows, bench.removal = rows.get("main", []), rows.get("removal", [])
        bench.benchmark = _styles(rows.get("hpsv2", []))
    elif options.target:
        _find(options, metrics, bench)
    if options.world:
        count = len(bench.rows) or options.removal_count
        world = worlds.build(options.world)
        ruler = Ruler(world, Judge.load(world), count, EVALUATION_SEED)
        asked = [row.prompt for row in bench.rows]
        if any(a is not None and a != b for a, b in zip(asked, ruler.prompts, strict=False)):
            raise ValueError(f"{options.target} shows other prompts than --world {options.world}'s")
        how_many = options.removal_count
        bench.world = WorldBench(ruler, model is not None, EVALUATION_SEED, how_many)
    return bench


def _find(options: argparse.Namespace, metrics: Sequence[str], bench: Bench) -> None:
    """The pictures of a folder: those in it, HPSv2's styles, removal's pairs."""
    folder = Path(options.target)
    benchmark = (folder / "hpsv2").is_dir() or options.hps_prompts is not None
    if "hpsv2" in metrics and benchmark:
        bench.benchmark = _found_styles(options, folder)
    if "removal" in metrics and not options.world:
        if not (folder / "removal").is_dir():
            raise ValueError(
                f"removal: {folder} holds no folder removal with pictures before and after: draw "
                "them from a model (--out)"
            )
        bench.removal = read_rows(folder / "removal")
    distances = any(name in ("fid", "kid", "pr") for name in metrics) and not options.features
    others = any(name in ("clip", "named") for name in metrics)
    if distances or others or ("hpsv2" in metrics and not benchmark):
        texts = read_prompts(options.prompts) if options.prompts else None
        bench.rows = found_rows(folder, texts, options.negative, options.num)


def _found_styles(options: argparse.Namespace, folder: Path) -> dict[str, list[Row]]:
    """HPSv2's pictures, FOLDER[/hpsv2]/STYLE/*, with their prompts."""
    folder = folder / "hpsv2" if (folder / "hpsv2").is_dir() else folder
    if options.hps_prompts is None:
        styles = _styles(read_rows(folder))
        return {style: rows[: options.num] for style, rows in styles.items()}
    prompts = hpsv2.read_prompts(options.hps_prompts)
    return {
        style: found_rows(folder / style, texts, None, options.num)
        for style, texts in prompts.items()
    }


def _styles(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Pictures by the folder that they are in."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.file.parent.name, []).append(row)
    return found


def _draw(
    options: argparse.Namespace,
    model: Path,
    sets: Mapping[str, DrawnSet],
    bench: Bench,
    how: How,
) -> dict[str, int]:
    """Draw what is missing on all ranks; how many pictures rank 0 drew of each set."""
    kind = "cuda" if options.device == "cuda" else "cpu"
    drawn = {}
    with parallel.session(kind) as device, warnings.catch_warnings():  # type: ignore[arg-type]
        bench.device = str(device)
        pipeline = load(model, str(device), DTYPES.get(options.dtype or ""), options.optimize)
        for name, wanted in sets.items():
            _say_unread(pipeline, wanted)
            warnings.simplefilter("ignore", PromptCut)  # said above
            mine = how
            if "scale" in wanted.identity:
                mine = dataclasses.replace(how, scale=wanted.identity["scale"])
            total = len(wanted.missing())
            _say(f"drawing {total} pictures into {wanted.folder}")
            rank, world = parallel.rank(), parallel.world_size()
            tell = _progress(-(-total // world))
            drawn[name] = draw(pipeline, wanted, mine, options.batch, rank, world, tell)
        if bench.world is not None:
            generate = _generate(pipeline, how)
            bench.world = dataclasses.replace(bench.world, generate=generate)
    return drawn


def _generate(pipeline: Pipeline, how: How) -> Generate:
    """Pictures of prompts with their negatives, as removal by a world's checker asks for them."""

    def generate(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> Tensor:
        return paint(pipeline, prompts, negatives, indices, how).cpu()

    return generate


def _say_unread(pipeline: Pipeline, wanted: DrawnSet) -> None:
    """What the model does not read of its prompts: unknown words, and ends of long ones."""
    texts = {text for job in wanted.jobs for text in (job.prompt, job.negative) if text}
    for spec, tokenizer in zip(pipeline.spec.text, pipeline.tokenizers, strict=True):
        if tokenizer is None:
            continue
        read = [spec.prepare(text) for text in sorted(texts)]
        if unknown := sorted({word for text in read for word in tokenizer.unknown(text)}):
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            _say(f"not in the vocabulary: {', '.join(unknown[:10])}{more}")
        if cut := [line for text in read if (line := tokenizer.cut(text))]:
            _say(f"{len(cut)} of {len(read)} texts: {cut[0]}")


def _progress(total: int) -> Callable[[int], None]:
    """Says how far drawing is, at every tenth."""
    tenths = [0]

    def done(count: int) -> None:
        if total and 10 * count // total > tenths[0]:
            tenths[0] = 10 * count // total
            _say(f"  {count} of {total}")

    return done


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr, flush=True)


# --- the report -----------------------------------------------------------------------------------


def _report(
    options: argparse.Namespace,
    bench: Bench,
    sets: Mapping[str, DrawnSet],
    drawn: Mapping[str, int],
    results: Mapping[str, Result],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything, as plain data."""
    given = {name: _plain(value) for name, value in vars(options).items()}
    return {
        "target": options.target,
        "seed": options.seed,
        "pictures": {
            name: {"folder": str(s.folder), "count": len(s.jobs), "identity": dict(s.identity)}
            for name, s in sets.items()
        }
        or {"main": {"count": bench.count}},
        "drawn_by_rank_0": dict(drawn),
        "metrics": {name: result.to_dict() for name, result in results.items()},
        "options": given,
        "versions": {
            "snoopi": snoopi.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _headline(options: argparse.Namespace, model: Path | None) -> str:
    """What was measured."""
    if model is None:
        return str(options.target or options.features)
    words = [f"seed {options.seed}", f"guidance {options.guidance}"]
    words.append(f"negative {options.negative or 'none'}")
    for name in ("scale", "steps", "size"):
        value = getattr(options, name)
        words.append(f"the model's {name}" if value is None else f"{name} {value}")
    return f"{model}: {', '.join(words)}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def table(results: Mapping[str, Result]) -> str:
    """The figures as lines of text, and below them how each came about."""
    lines = [("metric", "figure", "value", "95 %", "n")]
    for metric, result in results.items():
        for name, figure in result.figures.items():
            interval = ""
            if figure.low is not None and figure.high is not None:
                interval = f"{figure.low:.3f} to {figure.high:.3f}"
            shown = metric if name == next(iter(result.figures)) else ""
            lines.append((shown, name, _number(figure.value), interval, str(figure.n)))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    right = (2, 4)
    text = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, "", *(f"{m}: {r.protocol}" for m, r in results.items())])


def _number(value: float) -> str:
    """Four digits, and no exponent where none is needed."""
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"


def _switches(options: argparse.Namespace) -> Switches:
    return Switches(
        kid_subsets=options.kid_subsets,
        kid_size=options.kid_size,
        pr_features=options.pr_features,
        pr_k=options.pr_k,
        bgr=options.bgr,
        prefix=options.clip_prefix,
        clip_first=options.clip_first or None,
        hps_version=options.hps_version,
        hps=hpsv2.Reading(options.hps_antialias == "on", options.hps_jpeg or None),
    )


# --- the words ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog="snoopi.evaluate",
        description="Measure a model or a folder of pictures.",
        epilog="docs/metrics.md has the protocols, and lines to copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="MODEL|FOLDER",
        help="a model folder (or a shipped model's name), which draws, or a folder of pictures",
    )
    parser.add_argument(
        "--metrics",
        required=True,
        metavar="M[,M...]",
        help=f"some of {', '.join(measure.METRICS)} (named: worlds: all a prompt names is right)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="pictures at once")
    _drawing_words(parser.add_argument_group("pictures").add_argument)
    _tool_words(
        parser.add_argument_group("networks (folders made by weights_convert)").add_argument
    )
    _protocol_words(parser.add_argument_group("protocols").add_argument)
    return parser


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
        help="strength of the guidance; None: the model's, and for removal under nasa 0.5",
    )
    add("--steps", type=int, help="sampler steps; None: the model's")
    add("--size", metavar="HxW", help="size in pixels; None: the model's")
    add("--dtype", choices=list(DTYPES), help="compute type; None: as stored")
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
    add("--save-features", type=Path, metavar="FOLDER", help="write features of the pictures there")
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


if __name__ == "__main__":
    sys.exit(main())
