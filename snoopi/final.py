"""What is measured during and at the end of a run on a world, and the report made of it.

During the run an Observer draws the same prompts with the same noise at every look. At the end a
student is measured beside its teacher on held-out prompts, with and without negative prompts.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from functools import cached_property
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
KEEP_BOUND = 0.97  # a strength must keep this share of what the unguided pictures get right
# Fig. 3's baselines beside NASA; each gets the same search over its own strengths.
BASELINES: dict[str, tuple[float, ...]] = {
    "nasa-centred": (0.5, 0.75, 1.0, 1.5, 2.0),
    "embed-sub": (0.25, 0.5, 0.75, 1.0, 1.5),
    "cfg": (1.25, 1.5, 2.0, 2.5, 3.0),
}


class Observer:
    """Looks at a model during a run, and measures it at the end. This one: of a VAE."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out, self.world = config, out, ShapesWorld()

    def look(self, pipeline: Pipeline | None, step: int) -> dict[str, float]:
        """Held-out figures for metrics.jsonl, and a sample grid. None: not rank 0."""
        if pipeline is None or not self.config.evaluate.prompts:
            return {}
        pictures, back = self._reconstruct(pipeline)
        self.save(torch.cat([pictures[:GRID], back[:GRID]]), step)
        return {"psnr": psnr(back, pictures)}

    def finish(self, model: Path, source: Path | None, seconds: dict[str, float]) -> None:
        """Measure the finished model and write the report."""
        pictures, back = self._reconstruct(load(model, optimize="auto"))
        image = grid(
            torch.cat([pictures[:GRID], back[:GRID]]), GRID, row_titles=["picture", "decoded"]
        )
        figure = Figure("Pictures and their reconstructions", image, "Held-out pictures.")
        summary = {"psnr": psnr(back, pictures), "seconds": seconds}
        self.write([figure], summary, {}, [])

    @torch.no_grad()
    def _reconstruct(self, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
        """Pictures that training never sees, and what the VAE makes of them."""
        vae, count = pipeline.vae, self.config.evaluate.prompts
        assert vae is not None
        pictures = self.world.batch(Noise(EVALUATION_SEED), 0, range(count)).pictures
        rows = [vae.decode(vae.encode(x)) for x in pictures.split(self.config.evaluate.batch)]
        return pictures, torch.cat(rows).clamp(-1, 1)

    def save(self, pictures: Tensor, step: int) -> None:
        """Write a sample grid."""
        save_png(grid(pictures, GRID), self.out / "samples" / f"step-{step:06d}.png")

    def write(
        self,
        figures: list[Figure],
        summary: dict[str, Any],
        removal: dict[str, Any],
        table: list[dict[str, Any]],
        last: dict[str, Any] | None = None,
    ) -> None:
        """report.html, summary.json, the figures' PNG files, and the same in the terminal.

        last: figures of the finished model, the last point of the curves.
        """
        end = {"step": self.config.run.steps, **(last or {})}
        report = Report(
            title=f"snoopi: {self.out.name}",
            summary=summary,
            recipe_toml=recipes.to_toml(self.config),
            rows=[*read(self.out / "metrics.jsonl"), end],
            grids=figures,
            removal=removal,
            guidance_table=table,
            provenance=_machine(self.config),
        )
        path = write_report(self.out, report)
        print_report(report)
        print(f"\nwrote {path}, {self.out / 'summary.json'}, {self.out / 'model'}", flush=True)


class TeacherObserver(Observer):
    """A multi-step model: looked at in one step (many are dear), measured in many at the end."""

    @cached_property
    def ruler(self) -> Ruler:
        """The held-out prompts and their real pictures; made at the first look."""
        return Ruler(self.world, Judge.load(), self.config.evaluate.prompts, EVALUATION_SEED)

    def look(self, pipeline: Pipeline | None, step: int) -> dict[str, float]:
        """A sample grid in one step, no figures."""
        if pipeline is not None and self.config.evaluate.prompts:
            chosen = pick(self.ruler.prompts, 2 * GRID)
            self.save(
                drawer(pipeline, 1, 1.0)([self.ruler.prompts[i] for i in chosen], chosen), step
            )
        return {}

    def finish(self, model: Path, source: Path | None, seconds: dict[str, float]) -> None:
        """The teacher in one step and in many."""
        if not self.config.evaluate.prompts:
            print(f"wrote {model}", flush=True)
            return
        started, pipeline = time.monotonic(), load(model, optimize="auto")
        qualities, pictures = self.measure(self.teacher_drawers(pipeline))
        seconds = {**seconds, "quality": time.monotonic() - started}
        figure = _comparison(self.config, self.ruler, pictures)
        self.write([figure], {**_summary(qualities), "seconds": seconds}, {}, [])

    def teacher_drawers(self, teacher: Pipeline) -> dict[str, Draw]:
        """The teacher in many steps under guidance, and in one without."""
        many = self.config.evaluate
        return {
            "teacher_25": drawer(teacher, many.teacher_steps, many.teacher_kappa),
            "teacher_1": drawer(teacher, 1, 1.0),
        }

    def measure(self, drawers: dict[str, Draw]) -> tuple[dict[str, Quality], dict[str, Tensor]]:
        """Quality of each generator on all prompts, and its pictures of the grid's prompts."""
        batch = self.config.evaluate.batch
        drawn = {name: self.ruler.draw(draw, batch) for name, draw in drawers.items()}
        chosen = pick(self.ruler.prompts, 2 * GRID)
        qualities = {name: self.ruler.judge_pictures(x) for name, x in drawn.items()}
        return qualities, {name: x[chosen] for name, x in drawn.items()}


class StudentObserver(TeacherObserver):
    """A one-step model, measured beside its teacher and under negative prompts."""

    def look(self, pipeline: Pipeline | None, step: int) -> dict[str, float]:
        """A sample grid, and the student's quality on all held-out prompts."""
        super().look(pipeline, step)
        if pipeline is None or not self.config.evaluate.prompts:
            return {}
        quality = self.ruler.measure(drawer(pipeline, 1, 1.0), self.config.evaluate.batch)
        return _curves(quality)

    def finish(self, model: Path, source: Path | None, seconds: dict[str, float]) -> None:
        """The student beside its teacher; NASA and its baselines under negative prompts."""
        assert source is not None
        many = self.config.evaluate
        if not many.prompts:
            print(f"wrote {model}", flush=True)
            return
        started, student = time.monotonic(), load(model, optimize="auto")
        drawers = self.teacher_drawers(load(source, optimize="auto")) | {
            "student": drawer(student, 1, 1.0)
        }
        qualities, pictures = self.measure(drawers)
        seconds = {**seconds, "quality": time.monotonic() - started}
        figures = [_comparison(self.config, self.ruler, pictures)]
        summary, removal = _summary(qualities), {}
        table: list[dict[str, Any]] = []
        if many.removal:
            started = time.monotonic()
            choice, result, table = _negatives(self.config, student)
            summary |= {"nasa_scale": choice.scale, "nasa_scale_within_bound": choice.met}
            removal = result.to_dict()
            figures.append(_strip(student, many.scales))
            seconds["negatives"] = time.monotonic() - started
        last = _curves(qualities["student"])
        self.write(figures, {**summary, "seconds": seconds}, removal, table, last)


def _curves(quality: Quality) -> dict[str, float]:
    """The figures that are followed over training."""
    names = ("all_right", "frechet", "precision", "recall")
    return {name: getattr(quality, name) for name in names}


OBSERVERS: dict[str, type[Observer]] = {
    "autoencode": Observer,
    "denoise": TeacherObserver,
    "vsd": StudentObserver,
}


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10 * math.log10(4 / (pictures - reference).square().mean().item())


def drawer(pipeline: Pipeline, steps: int, kappa: float) -> Draw:
    """Pictures of prompts without a negative; more than one step means DDIM under CFG at kappa."""

    def draw(prompts: list[str], indices: list[int]) -> Tensor:
        z = pipeline.noise(EVALUATION_SEED, indices)
        return pipeline.pictures(prompts, z, None, "cfg", kappa, steps)

    return draw


def guided_drawer(pipeline: Pipeline, mode: str, seed: int) -> Callable[[float], Generate]:
    """Pictures of prompts with negatives, by strength, as evaluate.removal asks for them."""

    def at(scale: float) -> Generate:
        def generate(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> Tensor:
            z = pipeline.noise(seed, indices)
            if negatives is None:
                return pipeline.pictures(prompts, z, guidance="none")
            return pipeline.pictures(prompts, z, negatives, mode, scale)

        return generate

    return at


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


def _strip(student: Pipeline, scales: tuple[float, ...]) -> Figure:
    """One seed under growing NASA strength, plain and null-centred."""
    prompt, negative = "a large solid shape on a white background", "red"
    values, rows = (0.0, *scales), []
    chosen = _showing(student, prompt, "colour", negative)
    for mode in ("nasa", "nasa-centred"):
        for index in chosen:
            z = student.noise(EVALUATION_SEED, [index])
            rows += [student.pictures([prompt], z, [negative], mode, value) for value in values]
    names = [f"{mode}, noise {i}" for mode in ("NASA", "null-centred") for i in chosen]
    image = grid(
        torch.cat(rows), len(values), titles=[f"{value:g}" for value in values], row_titles=names
    )
    caption = f'"{prompt}", negative prompt "{negative}", strength from left to right.'
    alt = "A strip of pictures under growing strength of the negative prompt"
    return Figure("Strength of a negative prompt", image, caption, alt, section="control")


def _showing(student: Pipeline, prompt: str, attribute: str, word: str) -> list[int]:
    """Two noises whose picture without a negative shows the value (the first two, if none does)."""
    names = list(ShapesWorld.attributes)
    value = ShapesWorld.attributes[attribute].index(word)
    indices = list(range(40))
    z = student.noise(EVALUATION_SEED, indices)
    pictures = student.pictures([prompt] * len(indices), z, guidance="none")
    shown = Judge.load().labels(pictures)[:, names.index(attribute)] == value
    return ([i for i in indices if shown[i]] + indices)[:2]


def _machine(config: Config) -> dict[str, Any]:
    return {
        "seed": config.run.seed,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
