"""What a run found: report.html, summary.json, samples/*.png, and the same figures in the terminal.

report.html is one file that opens without a network: style, plots and pictures are inside it.
"""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from PIL import Image

from snoopi import page
from snoopi.pictures import save_png, write_atomically
from snoopi.plots import Curve, Plot, interval_bar, line_plot

SUMMARY_KEYS = (
    "all_right",
    "frechet_student",
    "frechet_teacher_25",
    "frechet_teacher_1",
    "gap_closed",
    "removal_easy",
    "removal_targeted",
    "keep_ratio",
    "nasa_scale",
    "seconds",
)
"""Keys that summary.json always has; null where nothing was measured."""

_RATES = frozenset(
    (
        *("all_right", "gap_closed", "precision", "recall", "keep", "keep_before", "keep_ratio"),
        *("removal_easy", "removal_targeted", "easy", "targeted"),
        *("free", "free_low", "free_high", "free_before", "same"),
    )
)
_TITLES = {
    "all_right": "All attributes right",
    "frechet_student": "Frechet distance, student in 1 step",
    "frechet_teacher_25": "Frechet distance, teacher in 25 steps",
    "frechet_teacher_1": "Frechet distance, teacher in 1 step",
    "gap_closed": "Gap closed",
    "removal_easy": "Removal, negative at random",
    "removal_targeted": "Removal, targeted",
    "keep_ratio": "Kept with a negative prompt",
    "nasa_scale": "NASA strength",
    "end": "Means over the last evaluations",
}

_COLUMNS = {"scale": "strength", "keep_ratio": "of unguided"}  # short, for the head of a table


class _PlotKind(NamedTuple):
    """A plot drawn when the rows hold one of its keys: the key itself or key_<anything>.

    reading: a sentence that helps to read it.
    """

    title: str
    y_label: str
    keys: tuple[str, ...]
    fraction: bool = False
    reading: str = ""


_PLOTS = (
    _PlotKind("Frechet distance to real pictures", "Frechet distance", ("frechet",)),
    _PlotKind("Precision and recall", "share of pictures", ("precision", "recall"), True),
    _PlotKind("Attributes drawn right", "share of pictures", ("all_right", "right"), True),
    _PlotKind("Gap between one teacher step and 25", "closed", ("gap_closed",), True),
    _PlotKind("Losses", "loss", ("loss",)),
    _PlotKind("Gradient norms", "norm before clipping", ("grad_norm",)),
    _PlotKind("Student and teacher: gap of their scores", "gap", ("gap",)),
)
# What snoopi.health (and, for the last two, the CLIP loss) puts into the rows.
_HEALTH = (
    _PlotKind(
        "Gap of the teachers by timestep",
        "gap",
        ("gap_t",),
        reading="Root mean square of what the student is pushed by: the curves fall, then level "
        "off; one that rises alone names the noise level at which the student goes astray.",
    ),
    _PlotKind(
        "Gap of the teachers by guidance scale",
        "gap",
        ("gap_kappa",),
        reading="More guidance makes a wider gap, but the curves have one course; a top curve that "
        "runs away from the others asks for a smaller upper end of kappa.",
    ),
    _PlotKind(
        "Diversity of x0",
        "distance, standard deviations",
        ("diversity",),
        reading="Pictures that have nothing in common are about 1.4 apart; a fall to half of the "
        "first value is the mark of a collapse, and warned of.",
    ),
    _PlotKind(
        "Drift of x0",
        "root mean square",
        ("drift",),
        reading="Distance of the same noise and prompts from their first x0 (start) and from "
        "their x0 one probe ago (last): last falls as the run settles; where it does not, the "
        "learning rate is too large or the student goes round in circles.",
    ),
    _PlotKind(
        "Denoising loss of both teachers",
        "loss",
        ("denoise",),
        reading="On the student's own pictures, same noise: the LoRA teacher must come to lie "
        "below the frozen one, or it does not know the student and its gradient means nothing.",
    ),
    _PlotKind(
        "Gradients at x0, VSD and CLIP",
        "norm of a picture's gradient",
        ("grad_x0",),
        reading="What reaches a picture from either loss: CLIP is a help as long as it stays "
        "below VSD.",
    ),
    _PlotKind(
        "Share of the CLIP loss in the gradient",
        "share",
        ("clip_share",),
        True,
        "CLIP / (CLIP + VSD): above one half the CLIP loss leads, which costs quality; it must "
        "fall to 0 with the schedule of its weight.",
    ),
)


@dataclass(frozen=True)
class Figure:
    """A picture with words: `alt` says what is to be seen, `caption` what it means."""

    title: str
    image: Image.Image
    caption: str = ""
    alt: str = ""
    section: Literal["samples", "control"] = "samples"  # control: beside the negative prompts


@dataclass(frozen=True)
class Report:
    """All a report shows. What is empty is left out; a number that is not finite reads n/a.

    Attributes:
        summary: the headline figures (SUMMARY_KEYS and any more); rates in [0, 1], seconds a dict.
        rows: metrics.jsonl; each plot takes the keys it knows (frechet*, precision, loss_*, ...).
        plots: in place of the plots made from rows.
        removal: evaluate.removal's RemovalReport.to_dict(): {"easy" | "targeted": {attribute or
            "total": {n, free, free_low, free_high, free_before, keep, keep_before, same}}}.
        guidance_table: one dict for each way to use a negative prompt, with the same keys.
        provenance: seed, machine, versions, ... in the order to show.
    """

    title: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    recipe_toml: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    grids: Sequence[Figure] = ()
    removal: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    guidance_table: Sequence[Mapping[str, Any]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    plots: Sequence[Plot] | None = None


def write_report(folder: Path, report: Report) -> Path:
    """Write samples/*.png, summary.json and report.html into folder; returns report.html's path.

    Each file is written whole or not at all.
    """
    for name, figure in zip(_file_names(report.grids), report.grids, strict=True):
        save_png(figure.image, folder / "samples" / name)
    summary = json.dumps(summarise(report), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(folder / "summary.json", summary.encode())
    return write_atomically(folder / "report.html", render_html(report).encode())


def summarise(report: Report) -> dict[str, Any]:
    """The content of summary.json: plain JSON values, every key of SUMMARY_KEYS, never a NaN.

    Fills in what follows from the rest: gap_closed = (teacher in 1 step - student) / (teacher in 1
    step - teacher in 25) of the Frechet distances, and the removal rates from `removal`.
    """
    out: dict[str, Any] = {**dict.fromkeys(SUMMARY_KEYS), "seconds": {}}
    out |= {key: _plain(value) for key, value in report.summary.items()}
    one, many = out["frechet_teacher_1"], out["frechet_teacher_25"]
    student = out["frechet_student"]
    if out["gap_closed"] is None and None not in (one, many, student) and one > many:
        out["gap_closed"] = (one - student) / (one - many)
    for kind in ("easy", "targeted"):
        total = report.removal.get(kind, {}).get("total", {})
        if out[f"removal_{kind}"] is None:
            out[f"removal_{kind}"] = _plain(total.get("free"))
        if kind == "targeted" and out["keep_ratio"] is None:
            out["keep_ratio"] = _plain(total.get("keep_ratio"))
    return out


def verdict(summary: Mapping[str, Any]) -> str:
    """One to three sentences that say what the figures of `summarise` mean."""
    sentences = [_verdict_gap(summary), _verdict_prompt(summary), _verdict_removal(summary)]
    return " ".join(s for s in sentences if s) or "This run measured no pictures."


def print_report(report: Report, file: TextIO | None = None) -> None:
    """Print the verdict, the figures and the tables as aligned text (to stdout by default)."""
    out = file if file is not None else sys.stdout
    summary = summarise(report)
    print(f"\n{report.title}\n{textwrap.fill(verdict(summary), 96)}\n", file=out)
    print(text_table(("figure", "value"), _figures(summary)), file=out)
    for kind, rows in report.removal.items():
        print(f"\nRemoval, {_KINDS.get(kind, (kind, ''))[0].lower()}", file=out)
        cells = [_removal_cells(name, row) for name, row in _total_last(rows)]
        print(text_table([h.lower() for h in _REMOVAL_HEADERS], cells), file=out)
    if report.guidance_table:
        print(f"\nWays to use a negative prompt\n{guidance_text(report.guidance_table)}", file=out)


def guidance_text(table: Sequence[Mapping[str, Any]]) -> str:
    """A guidance table (Report.guidance_table) as aligned text."""
    return text_table(*_guidance_cells(table))


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns under a rule: the first to the left, the others to the right."""
    table = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def standard_plots(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Plot]:
    """The plots that the rows of metrics.jsonl have keys for, each key in the first that fits.

    Without those of `health_plots`.
    """
    return [plot for kind, plot in _plots(rows, summary) if kind in _PLOTS]


def health_plots(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Plot, str]]:
    """The plots of a run's health, each with a sentence that helps to read it."""
    return [(plot, kind.reading) for kind, plot in _plots(rows, {}) if kind in _HEALTH]


def _plots(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Iterator[tuple[_PlotKind, Plot]]:
    keys = dict.fromkeys(
        key for row in rows for key, value in row.items() if _finite(value) is not None
    )
    taken = {"step"}
    for kind in (*_HEALTH, *_PLOTS):  # health first: its names are the longer ones
        mine = [k for k in keys if k not in taken and _belongs(k, kind.keys)]
        taken |= set(mine)
        if mine:
            labels = _labels(mine, kind.keys)
            curves = [_curve(rows, key, name) for key, name in zip(mine, labels, strict=True)]
            references = _teachers(summary) if "frechet" in kind.keys else {}
            plot = Plot(kind.title, kind.y_label, curves, references, fraction=kind.fraction)
            yield kind, plot


# --- values ----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON values only: scalars of numpy and torch as numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _finite(value: Any) -> float | None:
    """The value as a finite float, or None."""
    plain = _plain(value)
    return float(plain) if isinstance(plain, int | float) and not isinstance(plain, bool) else None


def _show(key: str, value: Any) -> str:
    """A value as text: rates as percentages, seconds as durations, n/a for what is not finite."""
    plain = _plain(value)
    if plain is None:
        return "n/a"
    if isinstance(plain, Mapping):
        return ", ".join(f"{k} {_show(k, v)}" for k, v in plain.items()) or "n/a"
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    if isinstance(plain, list):
        return ", ".join(_show(key, v) for v in plain)
    if isinstance(plain, str):
        return plain
    if key in _RATES or key.startswith(("all_right_", "right_", "precision_", "recall_")):
        return _percent(plain)
    return f"{plain:,}" if isinstance(plain, int) else f"{plain:.3g}"


def _percent(value: Any) -> str:
    number = _finite(value)
    return "n/a" if number is None else f"{100 * number:.1f} %"


def _duration(seconds: Any) -> str:
    number = _finite(seconds)
    if number is None:
        return "n/a"
    if number < 10:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    if hours or minutes >= 10:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _title(key: str) -> str:
    return _TITLES.get(key, key.replace("_", " "))


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of all figures: the contract's first, then any others, then durations."""
    known = [key for key in SUMMARY_KEYS if key != "seconds" and summary[key] is not None]
    others = [key for key in summary if key not in SUMMARY_KEYS]
    figures = [(_title(key), _show(key, summary[key])) for key in known + others]
    seconds = summary["seconds"]
    parts = seconds if isinstance(seconds, Mapping) else {"all": seconds}
    return figures + [(f"time: {_title(name)}", _duration(s)) for name, s in parts.items()]


# --- sentences -------------------------------------------------------------------------------


def _verdict_gap(summary: Mapping[str, Any]) -> str:
    gap = _finite(summary.get("gap_closed"))
    student, one, many = (
        _show("frechet", summary.get(f"frechet_{who}"))
        for who in ("student", "teacher_1", "teacher_25")
    )
    if gap is None:
        return "" if student == "n/a" else f"The student's Frechet distance is {student}."
    figures = f"(Frechet distance {student}; the teacher has {one} in 1 step and {many} in 25)"
    if gap >= 1:
        return f"One step of the student is as good as 25 of its teacher {figures}."
    if gap <= 0:
        return f"The student is no better yet than one step of its teacher {figures}."
    share = f"{100 * gap:.0f} %"
    return f"The student closes {share} of the gap between one teacher step and 25 {figures}."


def _verdict_prompt(summary: Mapping[str, Any]) -> str:
    right = _finite(summary.get("all_right"))
    if right is None:
        return ""
    return f"{100 * right:.0f} % of its pictures show everything that their prompts name."


def _verdict_removal(summary: Mapping[str, Any]) -> str:
    removed, kept = (_finite(summary.get(key)) for key in ("removal_targeted", "keep_ratio"))
    if removed is None:
        return ""
    scale = _finite(summary.get("nasa_scale"))
    strength = "" if scale is None else f" (NASA {scale:g})"
    keeps = "" if kept is None else f", and keeps {100 * kept:.0f} % of what the prompts ask for"
    return (
        f"A negative prompt{strength} removes what it names from {100 * removed:.0f} % of the "
        f"pictures that would have shown it{keeps}."
    )


# --- tables ----------------------------------------------------------------------------------

_REMOVAL_HEADERS = ("Attribute", "Before", "After", "95 % interval", "Pictures", "Keep", "Same")
_KINDS = {
    "easy": (
        "Negative drawn at random",
        "As in the paper: most pictures are free of the negative without any guidance.",
    ),
    "targeted": (
        "Targeted negative",
        "The negative names what the same noise shows without guidance, so none is free before.",
    ),
}


def _total_last(
    rows: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(rows.items(), key=lambda item: item[0] == "total")


def _removal_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    low, high = _finite(row.get("free_low")), _finite(row.get("free_high"))
    interval = "n/a" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return [
        name,
        _percent(row.get("free_before")),
        _percent(row.get("free")),
        interval,
        _show("n", row.get("n")),
        f"{_percent(row.get('keep_before'))} -> {_percent(row.get('keep'))}",
        _percent(row.get("same")),
    ]


def _guidance_cells(
    table: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    keys = list(dict.fromkeys(key for row in table for key in row))
    cells = [[_show(key, row[key]) if key in row else "" for key in keys] for row in table]
    return [_COLUMNS.get(key, key.replace("_", " ")) for key in keys], cells


def _removal_table(kind: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    title, meaning = _KINDS.get(kind, (kind, ""))
    lines = []
    for name, row in _total_last(rows):
        cells = [escape(cell) for cell in _removal_cells(name, row)]
        value, low, high = (_finite(row.get(key)) for key in ("free", "free_low", "free_high"))
        before = _finite(row.get("free_before"))
        bar = "" if None in (value, low, high) else interval_bar(value, low, high, before)  # type: ignore[arg-type]
        cells[3] = f'<span class="interval">{bar}<span>{cells[3]}</span></span>'
        cells[5] = cells[5].replace("-&gt;", "&rarr;")
        lines.append(cells)
    return page.table(_REMOVAL_HEADERS, lines, title, meaning, last_is_total="total" in rows)


# --- plots -----------------------------------------------------------------------------------


def _belongs(key: str, stems: Sequence[str]) -> bool:
    return any(key == stem or key.startswith(f"{stem}_") for stem in stems)


def _labels(keys: Sequence[str], stems: Sequence[str]) -> list[str]:
    """`grad_norm_student` reads "student" in the plot of gradient norms, unless two would clash."""
    short = [_without_stem(key, stems) for key in keys]
    names = short if len(set(short)) == len(short) else keys
    return [name.replace("_", " ") for name in names]


def _without_stem(key: str, stems: Sequence[str]) -> str:
    return next((key[len(stem) + 1 :] for stem in stems if key.startswith(f"{stem}_")), key)


def _curve(rows: Sequence[Mapping[str, Any]], key: str, label: str) -> Curve:
    points = [(_finite(row.get("step", i)), _finite(row.get(key))) for i, row in enumerate(rows)]
    pairs = [(x, y) for x, y in points if x is not None and y is not None]
    return Curve(label, [x for x, _ in pairs], [y for _, y in pairs])


def _teachers(summary: Mapping[str, Any]) -> dict[str, float]:
    names = {"teacher, 1 step": "frechet_teacher_1", "teacher, 25 steps": "frechet_teacher_25"}
    values = {label: _finite(summary.get(key)) for label, key in names.items()}
    return {label: value for label, value in values.items() if value is not None}


# --- the page --------------------------------------------------------------------------------


def render_html(report: Report) -> str:
    """report.html as text. Everything the caller gives is escaped."""
    summary = summarise(report)
    sections = [
        _header(report, summary),
        page.section("Pictures", _figures_html(report.grids, "samples")),
        page.section("Training", _plots_html(report, summary)),
        page.section("Health", _health_html(report)),
        page.section("Negative prompts", _control_html(report)),
        page.section("How it was made", _provenance_html(report, summary)),
    ]
    return page.document(report.title, "\n".join(sections))


def _header(report: Report, summary: Mapping[str, Any]) -> str:
    title = escape(report.title)
    text = escape(verdict(summary)).replace(" %", "&nbsp;%")
    headline = page.tiles(_headline(summary))
    return f'<header><h1>{title}</h1><p class="verdict">{text}</p></header>{headline}'


def _headline(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and note of the headline figures that were measured."""
    show = {key: _show(key, summary[key]) for key in SUMMARY_KEYS}
    seconds = summary["seconds"]
    spent = sum(filter(None, map(_finite, seconds.values()))) if isinstance(seconds, Mapping) else 0
    items = [
        ("Frechet distance", show["frechet_student"], "student, one step; lower is better"),
        (
            "Gap closed",
            show["gap_closed"],
            f"teacher: {show['frechet_teacher_1']} in 1 step, {show['frechet_teacher_25']} in 25",
        ),
        ("Prompts followed", show["all_right"], "pictures with every named attribute right"),
        (
            "Removed",
            show["removal_targeted"],
            f"of what a targeted negative prompt names (NASA {show['nasa_scale']})",
        ),
        ("Kept", show["keep_ratio"], "of what the prompts name, with a negative prompt"),
        ("Time", _duration(spent) if spent else "n/a", "all stages, this machine"),
    ]
    return [item for item in items if item[1] != "n/a"]


def _figures_html(figures: Sequence[Figure], where: str) -> str:
    mine = (f for f in figures if f.section == where)
    return "".join(page.figure(f.title, f.image, f.caption, f.alt or f.title) for f in mine)


def _plots_html(report: Report, summary: Mapping[str, Any]) -> str:
    plots = standard_plots(report.rows, summary) if report.plots is None else report.plots
    items = "".join(
        f"<figure><h3>{escape(plot.title)}</h3>{line_plot(plot)}</figure>" for plot in plots
    )
    return f'<div class="plots">{items}</div>' if items else ""


def _health_html(report: Report) -> str:
    """Warnings of the run, and its health plots with what they say."""
    warnings = [(_finite(r.get("step")), r["warning"]) for r in report.rows if r.get("warning")]
    lines = "".join(
        f"<p><strong>Warning</strong> (step {_show('step', step)}): {escape(str(text))}</p>"
        for step, text in warnings
    )
    items = "".join(
        f"<figure><h3>{escape(plot.title)}</h3>{line_plot(plot)}"
        f"<figcaption>{escape(reading)}</figcaption></figure>"
        for plot, reading in health_plots(report.rows)
    )
    return lines + (f'<div class="plots">{items}</div>' if items else "")


def _control_html(report: Report) -> str:
    parts = [_figures_html(report.grids, "control")]
    if report.removal:
        parts.append(
            "<p>A picture is free of the negative when the judge does not see it there; the "
            "interval is Wilson's, and the hollow mark shows the rate before. Keep: attributes "
            "that the prompt names and that are right, before and after. Same: attributes that "
            "nobody named and that stayed as they were.</p>"
        )
        parts += [_removal_table(kind, rows) for kind, rows in report.removal.items()]
    if report.guidance_table:
        headers, rows = _guidance_cells(report.guidance_table)
        cells = [[escape(cell) for cell in row] for row in rows]
        names = [escape(header[:1].upper() + header[1:]) for header in headers]
        note = "on the same prompts and noise."
        parts.append(page.table(names, cells, "Ways to use a negative prompt", note))
    return "".join(parts)


def _provenance_html(report: Report, summary: Mapping[str, Any]) -> str:
    parts = [
        page.facts((_title(key), _show(key, value)) for key, value in report.provenance.items())
    ]
    if report.recipe_toml:
        parts.append(page.details("Recipe", f"<pre>{escape(report.recipe_toml)}</pre>"))
    cells = [[escape(name), escape(value)] for name, value in _figures(summary)]
    everything = page.table(("Figure", "Value"), cells, "summary.json", "holds these figures.")
    return "".join([*parts, page.details("All figures", everything)])


def _file_names(figures: Sequence[Figure]) -> list[str]:
    """A PNG name for each figure from its title; a number keeps equal ones apart."""
    names: list[str] = []
    for figure in figures:
        slug = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")[:60] or "figure"
        name, count = f"{slug}.png", 1
        while name in names:
            count += 1
            name = f"{slug}-{count}.png"
        names.append(name)
    return names
