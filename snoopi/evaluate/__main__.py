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
from snoopi.evaluate import features, hpsv2, measure, pairs, words
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
from snoopi.pipeline import Pipeline, load
from snoopi.report import text_table
from snoopi.tokenize import PromptCut
from snoopi.worlds.judge import Judge

WORLD_COUNT = 1000  # pictures of a world, if --num does not say
_MAIN = ("fid", "kid", "pr", "clip", "named")  # metrics that read the main set of pictures


def main(given: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped, 1 when
    another rank was lost."""
    options = words.parser().parse_intermixed_args(given)
    again = "the same command goes on"
    return errors.status("snoopi.evaluate", lambda: _command(options), again)


def _rank() -> int:
    """This process's number; there may be no process group yet, or no more."""
    return int(os.environ.get("RANK", "0"))


# --- the command ----------------------------------------------------------------------------------


def _command(options: argparse.Namespace) -> None:
    metrics = measure.names(options.metrics)
    words.check(options, metrics)
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
    if options.features:
        raise ValueError("--features are instead of a model's pictures: leave MODEL out")
    return path


def _draws_nothing(options: argparse.Namespace) -> None:
    """ValueError for options that only a model's pictures have."""
    drawing = ("out", "scale", "steps", "size", "dtype", "seed", "guidance", "optimize")
    for name in (*drawing, "removal_count"):
        if words.given(options, name):
            raise ValueError(f"{words.flag(name)} is for a model: the pictures are there")
    if options.target is None and (options.prompts or options.negative is not None):
        raise ValueError("--prompts and --negative are for pictures: --features have none")


def _how(options: argparse.Namespace) -> How:
    scale = tuple(options.scale) if isinstance(options.scale, list) else options.scale
    size = arguments.size(options.size)
    return How(options.seed, options.guidance, scale, options.steps, size)


# --- the pictures ---------------------------------------------------------------------------------


def _sets(
    options: argparse.Namespace, metrics: Sequence[str], model: Path | None, how: How
) -> dict[str, DrawnSet]:
    """What a model has to draw for the metrics: the "main" set, "hpsv2" and "removal"."""
    benchmark = "hpsv2" in metrics and options.hps_prompts is not None
    main = any(name in _MAIN for name in metrics) or ("hpsv2" in metrics and not benchmark)
    paired = "removal" in metrics and not options.world  # a world's are drawn as it measures
    if model is None or not (benchmark or main or paired):
        return {}
    if options.out is None:
        raise ValueError("--out must say where the pictures go")
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
    if main:
        found["main"] = _main_set(options, identity)
    if benchmark:
        found["hpsv2"] = _benchmark_set(options, identity)
    if paired:
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
        judge = Judge.load(world)
        if how.size not in (None, (judge.size, judge.size)):
            raise ValueError(
                f"--size {options.size}: the {options.world} world's pictures have {judge.size} "
                "pixels a side"
            )
        ruler = Ruler(world, judge, count, EVALUATION_SEED)
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
    if any(name in _MAIN for name in metrics) or ("hpsv2" in metrics and not benchmark):
        texts = read_prompts(options.prompts) if options.prompts else None
        bench.rows = found_rows(folder, texts, options.negative, options.num)
        if bench.features and bench.features.count != len(bench.rows):
            raise ValueError(
                f"{folder} holds {len(bench.rows)} pictures, {options.features} "
                f"{bench.features.count} rows"
            )


def _found_styles(options: argparse.Namespace, folder: Path) -> dict[str, list[Row]]:
    """HPSv2's pictures, FOLDER[/hpsv2]/STYLE/*, with their prompts."""
    folder = folder / "hpsv2" if (folder / "hpsv2").is_dir() else folder
    if options.hps_prompts is None:
        styles = _styles(read_rows(folder))
        for style, rows in styles.items():
            if options.num is not None and len(rows) < options.num:
                raise ValueError(f"--num {options.num}: {folder / style} has {len(rows)} pictures")
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
        pipeline = load(
            model, str(device), arguments.DTYPES.get(options.dtype or ""), options.optimize
        )
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
        "seed": options.seed if sets or (bench.world and bench.world.draws) else None,
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
    texts = (f"{metric}: {result.protocol}" for metric, result in results.items())
    return "\n".join([text_table(lines[0], lines[1:]), "", *texts])


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


if __name__ == "__main__":
    sys.exit(main())
