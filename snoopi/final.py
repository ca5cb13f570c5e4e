"""What is measured during and at the end of a run on a world, and the report made of it.

During the run an Observer draws the same prompts with the same noise at every look. At the end a
student is measured beside its teacher on held-out prompts, with and without negative prompts.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snoopi import config as recipes
from snoopi.config import Config
from snoopi.evaluate.removal import (
    Choice,
    Generate,
    RemovalReport,
    choose_scale,
    removal_experiment,
)
from snoopi.evaluate.world import Draw, Quality, Ruler, pick
from snoopi.noise import Noise
from snoopi.pictures import grid, save_png
from snoopi.pipeline import Pipeline, load
from snoopi.report import Figure, Report, print_report, write_report
from snoopi.runlog import read
from snoopi.worlds.judge import Judge
from snoopi.worlds.shapes import ShapesWorld

EVALUATION_SEED = 1_000_003  # prompts and noise of measurements, apart from any run's seed
TUNING_SEED = 1_000_033  # prompts and noise on which strengths are chosen
GRID = 10  # pictures in a row of a grid
KEEP_BOUND = 0.96  # a strength must keep this share of what the unguided pictures get right
# Fig. 3's baselines beside NASA; each gets the same search over its own strengths.
BASELINES: dict[str, tuple[float, ...]] = {
    "nasa-centred": (0.5, 1.0, 1.5, 2.0, 3.0),
    "embed-sub": (0.25, 0.5, 1.0, 1.5, 2.0),
    "cfg": (1.25, 1.5, 2.0, 2.5, 3.0),
}


class Observer:
    """Looks at the model during a run: held-out figures for metrics.jsonl, and a sample grid."""

    def __init__(self, config: Config, out: Path, teacher: Path | None) -> None:
        self.config, self.out, self.multi_step = config, out, teacher is None
        self._ruler: Ruler | None = None

    @property
    def ruler(self) -> Ruler:
        """The held-out prompts and their real pictures; made at the first look."""
        if self._ruler is None:
            judge = Judge.load()
            self._ruler = Ruler(
                ShapesWorld(), judge, self.config.evaluate.prompts, EVALUATION_SEED
            )
        return self._ruler

    def look(self, pipeline: Pipeline | None, step: int) -> dict[str, float]:
        """Figures of the model after `step`; writes samples/step-NNNNNN.png. None: not rank 0."""
        if pipeline is None or not self.config.evaluate.prompts:
            return {}
        draw = drawer(pipeline, 1, 1.0)
        chosen = pick(self.ruler.prompts, 2 * GRID)
        pictures = draw([self.ruler.prompts[i] for i in chosen], chosen)
        save_png(grid(pictures, GRID), self.out / "samples" / f"step-{step:06d}.png")
        if self.multi_step:  # one step of a teacher tells little, and many are dear
            return {}
        q = self.ruler.measure(draw, self.config.evaluate.batch)
        names = ("all_right", "frechet", "precision", "recall")
        return {name: getattr(q, name) for name in names}


def drawer(pipeline: Pipeline, steps: int, kappa: float) -> Draw:
    """Pictures of prompts without a negative; more than one step means DDIM under CFG at kappa."""

    def draw(prompts: list[str], indices: list[int]) -> Tensor:
        z = pipeline.noise(EVALUATION_SEED, indices)
        return pipeline.pictures(prompts, z, None, "cfg", kappa, steps)

    return draw


def guided_drawer(pipeline: Pipeline, mode: str, seed: int) -> Callable[[float], Generate]:
    """Pictures of prompts with negatives, by strength, as evaluate.removal asks for them."""

    def at(scale: float) -> Generate:
        def generate(
            prompts: list[str], negatives: list[str] | None, indices: list[int]
        ) -> Tensor:
            z = pipeline.noise(seed, indices)
            if negatives is None:
                return pipeline.pictures(prompts, z, guidance="none")
            return pipeline.pictures(prompts, z, negatives, mode, scale)

        return generate

    return at


def finish_student(
    config: Config,
    out: Path,
    model: Path,
    teacher: Path | None,
    observer: Observer,
    seconds: dict[str, float],
) -> None:
    """Measure a student beside its teacher; write report.html, summary.json and the samples."""
    assert teacher is not None
    started, ruler, student = time.monotonic(), observer.ruler, load(model)
    many, parent = config.evaluate, load(teacher)
    rows = {
        "student": _measure(ruler, drawer(student, 1, 1.0), many.batch),
        "teacher_1": _measure(ruler, drawer(parent, 1, 1.0), many.batch),
        "teacher_25": _measure(
            ruler, drawer(parent, many.teacher_steps, many.teacher_kappa), many.batch
        ),
    }
    seconds = {**seconds, "quality": time.monotonic() - started}
    qualities = {name: quality for name, (quality, _) in rows.items()}
    figures = [_comparison(config, ruler, {k: p for k, (_, p) in rows.items()})]
    summary = _summary(qualities)
    report, table = {}, []
    if many.removal:
        started = time.monotonic()
        choice, result, table = _negatives(config, student)
        summary |= {"nasa_scale": choice.scale, "nasa_scale_within_bound": choice.met}
        report = result.to_dict()
        figures.append(_strip(student, ruler.world, many.scales))
        seconds["negatives"] = time.monotonic() - started
    _write(config, out, figures, {**summary, "seconds": seconds}, report, table)


def finish_teacher(
    config: Config,
    out: Path,
    model: Path,
    teacher: Path | None,
    observer: Observer,
    seconds: dict[str, float],
) -> None:
    """Measure a teacher with its own sampler; write the same kind of report."""
    if not config.evaluate.prompts:
        print(f"{model}: written", flush=True)
        return
    started, many, pipeline = time.monotonic(), config.evaluate, load(model)
    ruler = observer.ruler
    drawers = {
        "teacher_1": drawer(pipeline, 1, 1.0),
        "teacher_25": drawer(pipeline, many.teacher_steps, many.teacher_kappa),
    }
    rows = {name: _measure(ruler, draw, many.batch) for name, draw in drawers.items()}
    figure = _comparison(config, ruler, {k: p for k, (_, p) in rows.items()})
    summary = _summary({name: quality for name, (quality, _) in rows.items()})
    seconds = {**seconds, "quality": time.monotonic() - started}
    _write(config, out, [figure], {**summary, "seconds": seconds}, {}, [])


def _measure(ruler: Ruler, draw: Draw, batch: int) -> tuple[Quality, Tensor]:
    """Quality on all prompts, and the pictures of the grid's prompts."""
    pictures = ruler.draw(draw, batch)
    return ruler.judge_pictures(pictures), pictures[pick(ruler.prompts, 2 * GRID)]


def _summary(qualities: dict[str, Quality]) -> dict[str, Any]:
    """The contract's headline figures, and precision and recall beside them."""
    best = qualities.get("student", qualities["teacher_25"])
    summary: dict[str, Any] = {
        "all_right": best.all_right,
        "precision": best.precision,
        "recall": best.recall,
        "prompts": best.n,
        **{f"right_{name}": rate for name, rate in best.attributes.items()},
    }
    for name, quality in qualities.items():
        summary[f"frechet_{name}"] = quality.frechet
        if quality is not best:
            summary[f"all_right_{name}"] = quality.all_right
    return summary


def _negatives(
    config: Config, student: Pipeline
) -> tuple[Choice, RemovalReport, list[dict[str, Any]]]:
    """Choose each method's strength on tuning prompts, then measure it once on others."""
    many, world, judge = config.evaluate, ShapesWorld(), Judge.load()
    count = max(1, many.removal // len(world.attributes))
    scales = {"nasa": many.scales, **BASELINES}
    chosen, results = {}, {}
    for mode, values in scales.items():
        chosen[mode] = choose_scale(
            guided_drawer(student, mode, TUNING_SEED),
            judge,
            world,
            Noise(TUNING_SEED),
            values,
            keep_bound=KEEP_BOUND,
            count=count,
            split="train",
            batch=many.batch,
        )
        generate = guided_drawer(student, mode, EVALUATION_SEED)(chosen[mode].scale)
        results[mode] = removal_experiment(
            generate, judge, world, Noise(EVALUATION_SEED), count=count, batch=many.batch
        )
    table = [_row(mode, chosen[mode], results[mode]) for mode in scales]
    return chosen["nasa"], results["nasa"], table


def _row(mode: str, choice: Choice, result: RemovalReport) -> dict[str, Any]:
    """One line of the guidance table: totals on the reporting prompts."""
    easy, targeted = result.easy["total"], result.targeted["total"]
    return {
        "method": mode,
        "scale": choice.scale,
        "easy": easy.free,
        "targeted": targeted.free,
        "targeted 95 %": f"{100 * targeted.free_low:.1f} to {100 * targeted.free_high:.1f}",
        "keep_ratio": targeted.keep_ratio,
        "same": targeted.same,
    }


def _comparison(config: Config, ruler: Ruler, pictures: dict[str, Tensor]) -> Figure:
    """The same prompts and noise, a row for each generator; prompts above the columns."""
    names = {
        "teacher_25": f"teacher, {config.evaluate.teacher_steps} steps",
        "teacher_1": "teacher, 1 step",
        "student": "student, 1 step",
    }
    rows = [name for name in names if name in pictures]
    prompts = [ruler.prompts[i] for i in pick(ruler.prompts, 2 * GRID)]
    tiles = torch.cat([pictures[row][:GRID] for row in rows])
    image = grid(tiles, GRID, titles=prompts[:GRID], row_titles=[names[row] for row in rows])
    caption = "Held-out prompts; every row starts from the same noise."
    alt = f"A grid of {', '.join(names[row] for row in rows)} for {GRID} prompts"
    return Figure("Same prompts, same noise", image, caption, alt)


def _strip(student: Pipeline, world: ShapesWorld, scales: tuple[float, ...]) -> Figure:
    """One seed under growing NASA strength, plain and null-centred."""
    prompt, negative = "a large solid shape on a white background", "red"
    values = (0.0, *scales)
    rows = []
    for mode in ("nasa", "nasa-centred"):
        for index in range(2):
            z = student.noise(EVALUATION_SEED, [index])
            rows += [student.pictures([prompt], z, [negative], mode, value) for value in values]
    names = [f"{mode}, noise {i}" for mode in ("NASA", "null-centred") for i in (1, 2)]
    image = grid(
        torch.cat(rows), len(values), titles=[f"{value:g}" for value in values], row_titles=names
    )
    caption = f'"{prompt}", negative prompt "{negative}", strength from left to right.'
    alt = "A strip of pictures under growing strength of the negative prompt"
    return Figure("Strength of a negative prompt", image, caption, alt, section="control")


def _write(
    config: Config,
    out: Path,
    figures: list[Figure],
    summary: dict[str, Any],
    removal: dict[str, Any],
    table: list[dict[str, Any]],
) -> None:
    report = Report(
        title=f"snoopi: {out.name}",
        summary=summary,
        recipe_toml=recipes.to_toml(config),
        rows=read(out / "metrics.jsonl"),
        grids=figures,
        removal=removal,
        guidance_table=table,
        provenance=_machine(config),
    )
    path = write_report(out, report)
    print_report(report)
    print(f"\nwrote {path}, {out / 'summary.json'}, {out / 'model'}", flush=True)


def _machine(config: Config) -> dict[str, Any]:
    return {
        "seed": config.run.seed,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
