"""One measurement in a process of its own: a unit as JSON in, its figures as the last line out.

python -m snoopi.reproduce.measure KIND JSON [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from snoopi import config as recipes
from snoopi import errors
from snoopi.evaluate.negatives import EVALUATION_SEED, Search, drawer
from snoopi.evaluate.removal import RemovalReport
from snoopi.evaluate.world import Quality, Ruler
from snoopi.folders import shipped_or_path
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline, load
from snoopi.reproduce import candidates
from snoopi.reproduce.units import Negatives, Teacher, parse
from snoopi.worlds import build
from snoopi.worlds.judge import Judge

BATCH = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = errors.Parser(prog="snoopi.reproduce.measure", description=__doc__)
    parser.add_argument("kind")
    parser.add_argument("unit", help="what the unit's plain() gave, as JSON")
    parser.add_argument("--model", required=True, type=Path)
    options = parser.parse_args(arguments)
    return errors.status("snoopi.reproduce.measure", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    unit = parse(options.kind, json.loads(options.unit))
    pipeline = load(shipped_or_path(str(options.model)), optimize="auto")
    if isinstance(unit, Teacher):
        figures = teacher_figures(unit, pipeline)
    else:
        assert isinstance(unit, Negatives)
        figures = negative_figures(unit, pipeline)
    print(json.dumps(figures), flush=True)


def teacher_figures(unit: Teacher, pipeline: Pipeline) -> dict[str, float]:
    """Quality of many steps under CFG; the seed is that of prompts, noise and kappa."""
    seed, (low, high) = EVALUATION_SEED + unit.seed, unit.kappa
    world, noise = build(unit.world), Noise(seed)
    ruler = Ruler(world, Judge.load(world), unit.prompts, seed)

    def draw(prompts: list[str], indices: list[int]) -> Tensor:
        kappa = low + (high - low) * noise.uniform("kappa", 0, indices)
        z = pipeline.noise(seed, indices)
        return pipeline.pictures(prompts, z, None, "cfg", kappa, unit.steps)

    return quality_figures(ruler.measure(draw, BATCH))


def quality_figures(quality: Quality) -> dict[str, float]:
    """The four figures of a generator."""
    return {
        name: getattr(quality, name) for name in ("all_right", "frechet", "precision", "recall")
    }


def negative_figures(unit: Negatives, pipeline: Pipeline) -> dict[str, Any]:
    """What a method removes and keeps, at its searched or given strength."""
    world = build(unit.student.config().data.world)
    search = Search(pipeline, unit.prompts, BATCH, world)
    own = candidates.drawer if unit.method in candidates.CANDIDATES else drawer
    at_seed = partial(own, pipeline, unit.method)
    if unit.scale is not None:
        report = search.reporting.measure(at_seed(EVALUATION_SEED)(unit.scale))
        return {"scale": unit.scale, **removal_figures(report)}
    method = search.method(unit.method, recipes.Evaluate().scales, at_seed)
    found = {"scale": method.choice.scale, "within_bound": method.choice.met}
    return {**found, **removal_figures(method.report)}


def removal_figures(report: RemovalReport) -> dict[str, Any]:
    """Totals of a report: shares with their 95 % intervals, and Frechet distances."""
    easy, targeted = report.easy["total"], report.targeted["total"]
    return {
        "n": easy.n,
        "targeted_n": targeted.n,
        "easy_before": easy.free_before,
        "easy": easy.free,
        "easy_interval": [easy.free_low, easy.free_high],
        "targeted": targeted.free,
        "targeted_interval": [targeted.free_low, targeted.free_high],
        "keep": targeted.keep,
        "keep_ratio": targeted.keep_ratio,
        "same": targeted.same,
        "frechet": report.fidelity["targeted"].frechet,
        "frechet_before": report.fidelity["targeted"].before,
    }


if __name__ == "__main__":
    sys.exit(main())
