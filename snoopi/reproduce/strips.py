"""Pictures of experiments, drawn from the students that are there: the same prompts and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from snoopi.evaluate.negatives import EVALUATION_SEED, drawer
from snoopi.evaluate.world import pick
from snoopi.noise import Noise
from snoopi.pictures import grid
from snoopi.pipeline import Pipeline, load
from snoopi.report import Figure
from snoopi.reproduce import candidates
from snoopi.reproduce.experiments import EXPERIMENTS, Table
from snoopi.reproduce.records import Records
from snoopi.reproduce.units import Negatives, Train
from snoopi.worlds import build
from snoopi.worlds.judge import Judge

COLUMNS = 10
SEED = 0  # of the students that are drawn


def strips(name: str, world: str, records: Records, out: Path) -> Iterator[Figure]:
    """The pictures of an experiment, a figure for each table, where runs in `out` have the models.

    A table of students: a row for each. A table of ways to use a negative, or of strengths: a row
    for each, on prompts whose pictures show the negative without guidance.
    """
    for table in EXPERIMENTS[name].tables(world, records):
        units = {row: arm(SEED) for row, arm in table.arms.items()}
        runs = {row: u for row, u in units.items() if isinstance(u, Train)}
        negatives = {row: u for row, u in units.items() if isinstance(u, Negatives)}
        if runs:
            yield from _students(table, world, runs, out)
        elif negatives:
            yield from _negatives(table, world, negatives, records, out)


def _students(table: Table, world: str, runs: dict[str, Train], out: Path) -> Iterator[Figure]:
    there = {row: folder for row, run in runs.items() if (folder := _model(run, out)) is not None}
    if not there:
        return
    source = build(world)
    prompts = source.prompts(Noise(EVALUATION_SEED), 200, "held-out")
    chosen = pick(prompts, COLUMNS)
    tiles = []
    for folder in there.values():
        pipeline = load(folder)
        z = pipeline.noise(EVALUATION_SEED, chosen)
        tiles.append(pipeline.pictures([prompts[i] for i in chosen], z, guidance="none"))
    titles = [prompts[i] for i in chosen]
    image = grid(torch.cat(tiles), COLUMNS, titles=titles, row_titles=list(there))
    alt = f"A grid of {', '.join(there)} for {COLUMNS} prompts"
    caption = f"Held-out prompts, the same noise; students of seed 0. {source.attribution}".strip()
    yield Figure(table.title, image, caption, alt)


def _negatives(
    table: Table, world: str, units: dict[str, Negatives], records: Records, out: Path
) -> Iterator[Figure]:
    found = {}
    for row, unit in units.items():
        figures, folder = records.figures(unit), _model(unit.student, out)
        if figures is not None and folder is not None:
            found[row] = (folder, unit.method, figures["scale"])
    if not found:
        return
    folders = {folder: load(folder) for folder, _, _ in found.values()}
    prompts, words, indices = _cases(world, next(iter(folders.values())))
    rows, tiles = [], []
    for folder, pipeline in folders.items():
        z = pipeline.noise(EVALUATION_SEED, indices)
        rows.append("no negative")
        tiles.append(pipeline.pictures(prompts, z, guidance="none"))
        for row, (where, method, scale) in found.items():
            if where == folder:
                rows.append(f"{row} ({scale:g})" if table.x is None else row)
                own = candidates.drawer if method in candidates.CANDIDATES else drawer
                tiles.append(own(pipeline, method, EVALUATION_SEED)(scale)(prompts, words, indices))
    titles = [f"{p}; not {w}" for p, w in zip(prompts, words, strict=True)]
    image = grid(torch.cat(tiles), len(prompts), titles=titles, row_titles=rows)
    caption = "Prompts whose picture shows the negative without guidance; the student of seed 0. "
    caption = (caption + build(world).attribution).strip()
    yield Figure(table.title, image, caption, f"A grid of {', '.join(rows)}", section="control")


def _cases(world: str, pipeline: Pipeline) -> tuple[list[str], list[str], list[int]]:
    """Prompts, negatives and noise: two for each attribute, of what the plain pictures show."""
    source = build(world)
    judge = Judge.load(source)
    prompts, words, indices = [], [], []
    for column, attribute in enumerate(source.attributes):
        cases = source.removal_cases(Noise(EVALUATION_SEED), attribute, 20)
        own = list(range(100 * column, 100 * column + len(cases)))
        shown = _labels(pipeline, judge, cases, own)[:, column].tolist()
        for i in [i for i, value in enumerate(shown) if value >= 0][:2]:
            prompts.append(cases[i])
            words.append(source.bare_word(attribute, shown[i]))
            indices.append(own[i])
    return prompts, words, indices


def _labels(
    pipeline: Pipeline, judge: Judge, prompts: Sequence[str], indices: Sequence[int]
) -> Tensor:
    z = pipeline.noise(EVALUATION_SEED, indices)
    return judge.labels(pipeline.pictures(prompts, z, guidance="none"))


def _model(run: Train, out: Path) -> Path | None:
    folder = out / run.folder / "model"
    return folder if folder.is_dir() else None
