"""What is measured during and at the end of a run on a world, and the report made of it.

During the run an Observer draws the same prompts with the same noise at every look. At the end a
student is measured beside its teacher on held-out prompts, with and without negative prompts.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snoopi import config as recipes
from snoopi import worlds
from snoopi.config import Config
from snoopi.evaluate.negatives import EVALUATION_SEED, GuidanceTable, guidance_table
from snoopi.evaluate.world import Draw, Quality, Ruler, gap_closed, pick
from snoopi.noise import Noise
from snoopi.pictures import grid, save_png
from snoopi.pipeline import Pipeline, load
from snoopi.provenance import machine
from snoopi.report import Figure, Report, print_report, write_report
from snoopi.runlog import read
from snoopi.worlds import World
from snoopi.worlds.judge import Judge

GRID = 10  # pictures in a row of a grid
STRIP = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # NASA strengths of the strip
LOOKS = 3  # evaluations behind the means over the end of a run
FOLLOWED = ("all_right", "frechet", "precision", "recall")  # the figures of a look


class Observer:
    """Looks at a model during a run, and measures it at the end. This one: of a VAE."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = config, out
        self.world = worlds.build(config.data.world)

    def look(self, pipeline: Pipeline | None, step: int) -> dict[str, float]:
        """Held-out figures for metrics.jsonl, and a sample grid. None: not rank 0."""
        if pipeline is None or not self.config.evaluate.prompts:
            return {}
        pictures, back = self._reconstruct(pipeline)
        self.save(torch.cat([pictures[:GRID], back[:GRID]]), step)
        return {"psnr": psnr(back, pictures)}

    def finish(self, model: Path, source: Path | None, seconds: dict[str, float]) -> None:
        """Measure the finished model and write the report."""
        if not self.config.evaluate.prompts:
            print(f"wrote {model}", flush=True)
            return
        pictures, back = self._reconstruct(load(model, optimize="auto"))
        columns = min(GRID, len(pictures))
        tiles = torch.cat([pictures[:columns], back[:columns]])
        image = grid(tiles, columns, row_titles=["picture", "decoded"])
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
            provenance=_provenance(self.config) | self.pictures(),
        )
        path = write_report(self.out, report)
        print_report(report)
        print(f"\nwrote {path}, {self.out / 'summary.json'}, {self.out / 'model'}", flush=True)

    def pictures(self) -> dict[str, str]:
        """Whose the world's pictures are, for what is made of them: {} where nobody asks for it."""
        return {"pictures": self.world.attribution} if self.world.attribution else {}


class TeacherObserver(Observer):
    """A multi-step model: looked at in one step (many are dear), measured in many at the end."""

    @cached_property
    def ruler(self) -> Ruler:
        """The held-out prompts and their real pictures; made at the first look."""
        return Ruler(
            self.world, Judge.load(self.world), self.config.evaluate.prompts, EVALUATION_SEED
        )

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
        steps = self.config.evaluate.teacher_steps
        drawers = self.teacher_drawers(pipeline) | {
            f"teacher_{steps}_kappa_{kappa:g}": drawer(pipeline, steps, kappa)
            for kappa in self.config.evaluate.teacher_kappas
        }
        qualities, pictures = self.measure(drawers)
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
        """Quality of each generator on all prompts, and its pictures of the grid's prompts.

        Other real pictures ("real") are measured like a generator: they are the best there is.
        """
        batch = self.config.evaluate.batch
        drawn = {name: self.ruler.draw(draw, batch) for name, draw in drawers.items()}
        drawn["real"] = self.ruler.real()
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
        drawers = {"student": drawer(student, 1, 1.0)}
        if many.teacher:
            drawers = self.teacher_drawers(load(source, optimize="auto")) | drawers
        qualities, pictures = self.measure(drawers)
        seconds = {**seconds, "quality": time.monotonic() - started}
        figures = [_comparison(self.config, self.ruler, pictures)]
        last = _curves(qualities["student"])
        looks = [*read(self.out / "metrics.jsonl"), last]
        summary, removal = _summary(qualities), {}
        summary["end"] = end_means(looks, qualities)
        table: list[dict[str, Any]] = []
        if many.removal:
            started = time.monotonic()
            count = max(1, many.removal // len(self.world.attributes))
            found = guidance_table(student, many.scales, count, many.batch, world=self.world)
            removal, table = found.methods["nasa"].report.tables(), found.rows()
            summary |= _guidance_summary(found)
            figures.append(_strip(student, self.world))
            seconds["negatives"] = time.monotonic() - started
        self.write(figures, {**summary, "seconds": seconds}, removal, table, last)


def _curves(quality: Quality) -> dict[str, float]:
    """The figures that are followed over training."""
    return {name: getattr(quality, name) for name in FOLLOWED}


def end_means(
    rows: Sequence[Mapping[str, Any]], qualities: Mapping[str, Quality] | None = None
) -> dict[str, float]:
    """Means of the followed figures over a run's last evaluations (at most LOOKS of them).

    A single Frechet distance jumps between evaluations, so runs are compared by these.

    Args:
        rows: metrics.jsonl, with the finished model's figures as the last row.
        qualities: the teacher's, for the share of the gap that is closed.
    """
    looks = [row for row in rows if all(name in row for name in FOLLOWED)][-LOOKS:]
    means = {name: sum(row[name] for row in looks) / len(looks) for name in FOLLOWED}
    teacher = qualities or {}
    if "teacher_1" in teacher and "teacher_25" in teacher:
        one, many = teacher["teacher_1"].frechet, teacher["teacher_25"].frechet
        if one > many:
            means["gap_closed"] = gap_closed(means["frechet"], one, many)
    return {"evaluations": len(looks), **means}


def _guidance_summary(table: GuidanceTable) -> dict[str, Any]:
    """What the summary says of negative prompts: NASA's figures, and which method is best."""
    nasa, best = table.methods["nasa"], table.best()
    total = best.report.targeted["total"]
    return {
        "nasa_scale": nasa.choice.scale,
        "nasa_scale_within_bound": nasa.choice.met,
        "free_before": table.free_before,
        "frechet_before_negatives": table.frechet_before,
        "best_guidance": best.name,
        "best_guidance_scale": best.choice.scale,
        "best_guidance_easy": best.report.easy["total"].free,
        "best_guidance_targeted": total.free,
        "best_guidance_same": total.same,
    }


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


def _summary(qualities: dict[str, Quality]) -> dict[str, Any]:
    """The contract's headline figures, and precision and recall beside them."""
    best = qualities["student" if "student" in qualities else "teacher_25"]
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
            for figure in ("all_right", "precision", "recall"):
                summary[f"{figure}_{name}"] = getattr(quality, figure)
    return summary


def _comparison(config: Config, ruler: Ruler, pictures: dict[str, Tensor]) -> Figure:
    """The same prompts and noise, a row for each generator; prompts above the columns."""
    many = config.evaluate
    steps = many.teacher_steps
    others = {f"teacher_{steps}_kappa_{k:g}": k for k in many.teacher_kappas}
    names = {
        "real": "real pictures",
        **{name: f"teacher, {steps} steps, kappa {k:g}" for name, k in others.items()},
        "teacher_25": f"teacher, {steps} steps, kappa {many.teacher_kappa:g}",
        "teacher_1": "teacher, 1 step",
        "student": "student, 1 step",
    }
    rows = [name for name in names if name in pictures]
    prompts = [ruler.prompts[i] for i in pick(ruler.prompts, 2 * GRID)]
    columns = min(GRID, len(prompts))
    tiles = torch.cat([pictures[row][:columns] for row in rows])
    image = grid(tiles, columns, titles=prompts[:columns], row_titles=[names[row] for row in rows])
    caption = "Held-out prompts; all generated rows start from the same noise."
    alt = f"A grid of {', '.join(names[row] for row in rows)} for {GRID} prompts"
    return Figure("Same prompts, same noise", image, caption, alt)


def _strip(student: Pipeline, world: World) -> Figure:
    """One seed under growing NASA strength, plain and null-centred."""
    prompt, attribute, value = world.example
    negative, strengths, rows = world.bare_word(attribute, value), STRIP, []
    chosen = _showing(student, world)
    for mode in ("nasa", "nasa-centred"):
        for index in chosen:
            z = student.noise(EVALUATION_SEED, [index])
            rows += [student.pictures([prompt], z, [negative], mode, scale) for scale in strengths]
    names = [f"{mode}, noise {i}" for mode in ("NASA", "null-centred") for i in chosen]
    image = grid(
        torch.cat(rows),
        len(strengths),
        titles=[f"{scale:g}" for scale in strengths],
        row_titles=names,
    )
    caption = f'"{prompt}", negative prompt "{negative}", strength from left to right.'
    alt = "A strip of pictures under growing strength of the negative prompt"
    return Figure("Strength of a negative prompt", image, caption, alt, section="control")


def _showing(student: Pipeline, world: World) -> list[int]:
    """Two noises whose picture of the example's prompt without a negative shows its value (the
    first two, if none does)."""
    prompt, attribute, value = world.example
    indices = list(range(40))
    z = student.noise(EVALUATION_SEED, indices)
    pictures = student.pictures([prompt] * len(indices), z, guidance="none")
    column = list(world.attributes).index(attribute)
    shown = Judge.load(world).labels(pictures)[:, column] == value
    return ([i for i in indices if shown[i]] + indices)[:2]


def _provenance(config: Config) -> dict[str, Any]:
    where = machine(torch.get_num_threads())
    return {"seed": config.run.seed, **where, "python": platform.python_version()}
