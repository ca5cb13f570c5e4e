"""The records as a report: tables, plots and verdicts, in HTML, Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from snoopi import page
from snoopi.plots import Curve, Plot, line_plot
from snoopi.report import Figure, text_table
from snoopi.reproduce.experiments import EXPERIMENTS, Claim, Column, Table, value
from snoopi.reproduce.records import Records
from snoopi.reproduce.statistics import Seeds, Verdict, judge, spread

INTRODUCTION = (
    "Means +- standard deviations over seeds. A verdict compares two arms seed by seed (the same "
    "prompts and noise): a claim holds, or does not, where the 95 % interval of the difference "
    "(Student's t) leaves 0 out; else the arms are not separable at this number of seeds. Many "
    "claims are tested, each at 95 %: one in twenty is expected to be wrong by chance. F is the "
    "Frechet distance in the features of the world's judge, right the share of pictures that show "
    "all that their prompt names; lower F is better."
)


class Shown(NamedTuple):
    """A table as text, with its verdicts and plots."""

    table: Table
    headers: list[str]
    rows: list[list[str]]
    verdicts: list[tuple[Claim, Verdict]]
    plots: list[Plot]


class Chapter(NamedTuple):
    """An experiment on a world. missing: units that have not been run."""

    name: str
    world: str
    title: str
    question: str
    tables: list[Shown]
    missing: int


def chapters(
    names: Sequence[str], world: str, records: Records, seeds: Sequence[int]
) -> list[Chapter]:
    """What the records say of experiments."""
    found = []
    for name in names:
        experiment = EXPERIMENTS[name]
        units = experiment.units(world, records, seeds)
        shown = [_shown(table, records, seeds) for table in experiment.tables(world, records)]
        missing = sum(unit not in records for unit in units)
        found.append(Chapter(name, world, experiment.title, experiment.question, shown, missing))
    return found


def _shown(table: Table, records: Records, seeds: Sequence[int]) -> Shown:
    figures = {
        name: {seed: row for seed in seeds if (row := records.figures(unit(seed))) is not None}
        for name, unit in table.arms.items()
    }
    headers = ["arm", "seeds", *(column.title for column in table.columns)]
    rows = [
        [name, _count(found), *(_cell(_values(found, c.key), c) for c in table.columns)]
        for name, found in figures.items()
    ]
    verdicts = []
    for claim in table.claims:
        left = _values(_matched(figures[claim.left]), claim.figure)
        right = dict.fromkeys(left, 0.0)
        if claim.right:
            right = _values(_matched(figures[claim.right]), claim.figure)
        verdicts.append((claim, judge(left, right, claim.sign)))
    return Shown(table, headers, rows, verdicts, list(_plots(table, figures)))


def _matched(figures: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The seeds on which a search, where there was one, found a strength that keeps enough."""
    return {seed: row for seed, row in figures.items() if row.get("within_bound", True)}


def _count(figures: Mapping[int, Mapping[str, Any]]) -> str:
    """How many seeds, and on how many no strength kept enough."""
    missed = len(figures) - len(_matched(figures))
    return f"{len(figures)} ({missed} keep too little)" if missed else str(len(figures))


def _values(figures: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    found = {seed: value(row, key) for seed, row in figures.items()}
    return {seed: number for seed, number in found.items() if number is not None}


def _cell(values: Seeds, column: Column) -> str:
    if not values:
        return ""
    mean, deviation = spread(values)
    factor, digits = (100, 1) if column.rate else (1, 3)
    text = f"{factor * mean:.{digits}f}"
    if not math.isnan(deviation):
        text += f" +- {factor * deviation:.{digits}f}"
    return f"{text} %" if column.rate else text


def _plots(table: Table, figures: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Iterator[Plot]:
    if table.curves:
        curves = []
        for name, found in figures.items():
            points: dict[float, list[float]] = {}
            for row in found.values():
                last = row["curve"][-1]["step"]
                for look in row["curve"]:
                    at = look["step"] * row["updates"] / last
                    points.setdefault(at, []).append(look["frechet"])
            x = sorted(points)
            curves.append(Curve(name, x, [sum(points[at]) / len(points[at]) for at in x]))
        yield Plot("F over training, mean of the seeds", "F", curves, x_label="student updates")
    if table.x is None:
        return
    label, places = table.x
    shares = [column for column in table.columns if column.rate]
    others = [column for column in table.columns if not column.rate]
    for columns in (shares, others):
        curves = [_over(column, places, figures) for column in columns]
        curves = [curve for curve in curves if curve.x]
        if curves:
            rate = columns is shares
            y = "share" if rate else ", ".join(curve.label for curve in curves)
            yield Plot(f"{y} by {label}", y, curves, x_label=label, fraction=rate)


def _over(
    column: Column,
    places: Mapping[str, float],
    figures: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> Curve:
    """The means of one figure over the arms' places."""
    means = {
        at: spread(values)[0]
        for name, at in places.items()
        if (values := _values(figures[name], column.key))
    }
    return Curve(column.title, list(means), list(means.values()))


def summary_rows(found: Sequence[Chapter]) -> list[list[str]]:
    """Every claim of the paper with its verdict: experiment, claim, verdict."""
    return [
        [f"{chapter.name}, {chapter.world}", claim.text, verdict.text()]
        for chapter in found
        for shown in chapter.tables
        for claim, verdict in shown.verdicts
        if claim.paper and verdict.difference is not None
    ]


def _claim_rows(shown: Shown) -> list[list[str]]:
    return [
        ["paper" if claim.paper else "control", claim.text, verdict.text()]
        for claim, verdict in shown.verdicts
    ]


def as_text(found: Sequence[Chapter]) -> str:
    """For a terminal."""
    parts = []
    for chapter in found:
        parts.append(f"{chapter.title} ({chapter.world}){_missing(chapter)}")
        for shown in chapter.tables:
            parts.append(f"\n{shown.table.title}\n{text_table(shown.headers, shown.rows)}")
            parts += [f"  {kind}: {claim}: {word}" for kind, claim, word in _claim_rows(shown)]
        parts.append("")
    return "\n".join(parts)


def as_markdown(found: Sequence[Chapter], command: str) -> str:
    """For the docs."""
    parts = ["# Results", f"`{command}` wrote this page from `runs.jsonl`.", INTRODUCTION]
    for chapter in found:
        parts.append(f"## {chapter.title}: {chapter.world}")
        parts.append(f"{chapter.question}{_missing(chapter)}")
        for shown in chapter.tables:
            parts.append(f"**{shown.table.title}.** {shown.table.note}".strip())
            parts.append(_markdown_table(shown.headers, shown.rows))
            if shown.verdicts:
                parts.append(_markdown_table(["", "claim", "verdict"], _claim_rows(shown)))
    return "\n\n".join(parts) + "\n"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(
    found: Sequence[Chapter], records: Records, pictures: Mapping[str, Sequence[Figure]]
) -> str:
    """One page that stands alone. pictures: of an experiment, by its name."""
    title = "snoopi: the paper's experiments on small worlds"
    rows = summary_rows(found)
    cells = [[escape(cell) for cell in row] for row in rows]
    claims = page.table(
        ["Experiment", "Claim", "Verdict"], cells, "The paper's claims", INTRODUCTION
    )
    content = [f"<header><h1>{escape(title)}</h1></header>"]
    content.append(page.section("What holds", claims))
    for chapter in found:
        parts = [f"<p>{escape(chapter.question + _missing(chapter))}</p>"]
        for shown in chapter.tables:
            parts.append(_table(shown.headers, shown.rows, shown.table.title, shown.table.note))
            if shown.verdicts:
                parts.append(_table(["Kind", "Claim", "Verdict"], _claim_rows(shown), "Verdicts"))
            plots = [
                f"<figure><h3>{escape(plot.title)}</h3>{line_plot(plot)}</figure>"
                for plot in shown.plots
            ]
            if plots:
                parts.append(f'<div class="plots">{"".join(plots)}</div>')
        parts += [
            page.figure(picture.title, picture.image, picture.caption, picture.alt)
            for picture in pictures.get(chapter.name, ())
        ]
        content.append(page.section(escape(f"{chapter.title}: {chapter.world}"), "".join(parts)))
    content.append(page.section("Where the figures come from", _sources(records)))
    return page.document(title, "".join(content))


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str, note: str = ""
) -> str:
    cells = [[escape(cell).replace("+-", "&plusmn;") for cell in row] for row in rows]
    return page.table([escape(cell) for cell in headers], cells, title, note)


def _sources(records: Records) -> str:
    """How many figures come from which commit and processor."""
    counts: dict[tuple[str, str], int] = {}
    for row in records:
        where = row["machine"]
        processor = f"{where['processor']}, {where['instruction set']}, torch {where['torch']}"
        key = (row["commit"], processor)
        counts[key] = counts.get(key, 0) + 1
    rows = [[commit, processor, str(count)] for (commit, processor), count in counts.items()]
    hours = sum(row["seconds"] for row in records) / 3600
    note = f"{len(records)} units of all worlds, {hours:.1f} hours of processes."
    return _table(["Commit", "Processor", "Units"], rows, "Records", note)


def _missing(chapter: Chapter) -> str:
    if not chapter.missing:
        return ""
    return f" ({chapter.missing} units have not been run yet.)"
