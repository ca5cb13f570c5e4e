"""report.html opens anywhere and hides nothing; summary.json keeps its contract."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snoopi import pictures
from snoopi.plots import Curve, Plot, interval_bar, line_plot, log_ticks, nice_ticks
from snoopi.report import (
    SUMMARY_KEYS,
    Figure,
    Report,
    health_plots,
    print_report,
    render_html,
    standard_plots,
    summarise,
    text_table,
    verdict,
    write_report,
)

EVIL = "<script>alert('x')</script> & \"quoted\""


def removal_row(**changes: Any) -> dict[str, Any]:
    row = {"n": 50, "free": 0.62, "free_low": 0.48, "free_high": 0.74, "free_before": 0.0}
    return row | {"keep": 0.92, "keep_before": 0.95, "keep_ratio": 0.968, "same": 0.8} | changes


@pytest.fixture
def report() -> Report:
    figure = Figure(f"Grid {EVIL}", Image.new("RGB", (8, 8), "red"), EVIL, EVIL)
    strip = dataclasses.replace(figure, title="Strip", section="control")
    rows: list[dict[str, Any]] = [
        {"step": s, "loss_vsd": 1 / (s + 1), "grad_norm_student": 2.0} for s in range(300)
    ]
    rows += [{"step": s, "frechet_student": 90.0 - s / 10, EVIL: 1.0} for s in (0, 100, 200)]
    kinds = {"easy": {"shape": removal_row(), EVIL: removal_row(), "total": removal_row()}}
    return Report(
        title=f"Run {EVIL}",
        summary={
            "all_right": 0.87,
            "frechet_student": 43.0,
            "frechet_teacher_25": 32.0,
            "frechet_teacher_1": 152.0,
            "nasa_scale": 1.5,
            "seconds": {"train": 312.0, "evaluate": 9.5},
        },
        recipe_toml=f'title = "{EVIL}"',
        rows=rows,
        grids=[figure, strip],
        removal={**kinds, "targeted": kinds["easy"]},
        guidance_table=[{"method": EVIL, "targeted": 0.5}, {"method": "NASA", "keep": math.nan}],
        provenance={"machine": EVIL, "torch": "2.13.0", "loss": math.inf},
    )


class Elements(HTMLParser):
    """Start tags with their attributes; checks that tags close in order."""

    VOID = frozenset(("meta", "img", "br", "link"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing(report: Report) -> None:
    page = render_html(report)
    elements = Elements(page).found
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements}
    urls = [a[k] or "" for _, a in elements for k in ("src", "href", "srcset", "data") if k in a]
    assert len(urls) == 2 and all(url.startswith("data:image/png;base64,") for url in urls)
    assert not re.search(r"https?://|url\(|@import", page)


def test_what_the_caller_gives_is_escaped(report: Report) -> None:
    page = render_html(report)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_pictures_have_words_and_their_size(report: Report) -> None:
    images = [a for tag, a in Elements(render_html(report)).found if tag == "img"]
    assert [(a["alt"], a["width"], a["height"]) for a in images] == [(EVIL, "8", "8")] * 2


def test_plots_are_well_formed_and_say_what_they_show(report: Report) -> None:
    plots = re.findall(r"<svg.*?</svg>", render_html(report), flags=re.DOTALL)
    assert len(plots) == 3 + 2 * 3  # Frechet distance, losses, gradient norms; one bar a row
    for svg in plots:
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label")
        assert root.find(".//title") is not None
        numbers = [v for e in root.iter() for v in e.attrib.values()]
        assert "nan" not in numbers and "inf" not in numbers


def test_health_has_a_section_with_help_to_read_it() -> None:
    names = ("gap_t_20-211", "gap_t_212-403", "diversity", "drift_start", "drift_last")
    more = ("denoise_lora", "denoise_frozen", "clip_share", "grad_x0_vsd", "gap")
    rows: list[dict[str, Any]] = [
        {"step": s, **dict.fromkeys((*names, *more), 0.5)} for s in (1, 2)
    ]
    rows[1]["warning"] = f"diversity fell {EVIL}"
    health = health_plots(rows)
    assert [[curve.label for curve in plot.curves] for plot, _ in health] == [
        ["20-211", "212-403"],
        ["diversity"],
        ["start", "last"],
        ["lora", "frozen"],
        ["vsd"],
        ["clip share"],
    ]
    assert [plot.title for plot in standard_plots(rows, {})] == [
        "Student and teacher: gap of their scores"
    ]
    page = render_html(Report("t", rows=rows))
    assert "<h2>Health</h2>" in page and "(step 2)" in page and "<script" not in page
    assert all(len(reading) > 40 and reading[:40].split("'")[0] in page for _, reading in health)
    assert "<h2>Health</h2>" not in render_html(Report("t", rows=[{"step": 1, "loss": 1.0}]))


def test_files(report: Report, tmp_path: Path) -> None:
    page = write_report(tmp_path / "run", report)
    assert page == tmp_path / "run" / "report.html"
    names = sorted(p.relative_to(tmp_path / "run").as_posix() for p in page.parent.rglob("*.*"))
    assert names == [
        "report.html",
        "samples/grid-script-alert-x-script-quoted.png",
        "samples/strip.png",
        "summary.json",
    ]
    before = page.read_bytes()
    write_report(tmp_path / "run", report)
    assert page.read_bytes() == before


def test_figures_of_one_title_get_files_of_their_own(tmp_path: Path) -> None:
    one = Figure("Same", Image.new("RGB", (2, 2)))
    write_report(tmp_path, Report("t", grids=[one, one]))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["same-2.png", "same.png"]


def test_summary_keeps_its_contract(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text)
    assert set(SUMMARY_KEYS) <= set(summary) and list(summary) == sorted(summary)
    assert summary["gap_closed"] == pytest.approx((152 - 43) / (152 - 32))
    assert summary["removal_targeted"] == summary["removal_easy"] == 0.62
    assert summary["keep_ratio"] == 0.968
    assert summary["seconds"] == {"train": 312.0, "evaluate": 9.5}


def test_summary_has_every_key_when_nothing_was_measured() -> None:
    assert summarise(Report("empty")) == {**dict.fromkeys(SUMMARY_KEYS), "seconds": {}}


def test_summary_prefers_what_it_is_given(report: Report) -> None:
    given = {**report.summary, "gap_closed": 0.5, "removal_easy": 0.1}
    summary = summarise(dataclasses.replace(report, summary=given))
    assert summary["gap_closed"] == 0.5 and summary["removal_easy"] == 0.1


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    values = {
        "all_right": math.nan,
        "frechet_student": torch.tensor(math.inf),
        "kid": np.float32("nan"),
        "seconds": {"train": math.nan},
    }
    rows = [{"step": 0, "loss_vsd": math.nan}, {"step": 1, "loss_vsd": None}]
    removal = {"easy": {"total": removal_row(free=math.nan, keep=None)}}
    report = Report("t", values, rows=rows, removal=removal)
    write_report(tmp_path, report)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summary["kid"] is None and summary["seconds"] == {"train": None}
    page = render_html(report)
    assert "n/a" in page
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


def test_scalars_of_torch_and_numpy_are_numbers() -> None:
    summary = summarise(Report("t", {"all_right": torch.tensor(0.5), "n": np.int64(3)}))
    assert summary["all_right"] == 0.5 and summary["n"] == 3


@pytest.mark.parametrize(
    ("student", "words"),
    [(43.0, "closes 91 % of the gap"), (30.0, "as good as 25"), (160.0, "no better yet")],
)
def test_verdict_follows_the_figures(student: float, words: str) -> None:
    figures = {"frechet_student": student, "frechet_teacher_25": 32.0, "frechet_teacher_1": 152.0}
    assert words in verdict(summarise(Report("t", figures)))


def test_verdict_without_figures() -> None:
    assert verdict(summarise(Report("t"))) == "This run measured no pictures."


def test_no_gap_is_claimed_when_25_steps_are_no_better_than_one() -> None:
    figures = {"frechet_student": 5.0, "frechet_teacher_25": 9.0, "frechet_teacher_1": 8.0}
    assert summarise(Report("t", figures))["gap_closed"] is None


def test_terminal_tables(report: Report) -> None:
    out = io.StringIO()
    print_report(report, out)
    text = out.getvalue()
    for words in ("closes 91 % of the gap", "90.8 %", "48.0 to 74.0", "targeted", "5 min 12 s"):
        assert words in text
    assert text_table(("a", "b"), [("x", "10"), ("long", "9")]).splitlines() == [
        "a      b",
        "----  --",
        "x     10",
        "long   9",
    ]


def test_each_key_is_drawn_once() -> None:
    keys = ("frechet_student", "precision", "recall", "all_right", "right_shape", "loss_lora")
    row = {"step": 1, **dict.fromkeys((*keys, "gap", "gap_closed", "kappa_mean"), 0.5)}
    plots = standard_plots([row], summarise(Report("t", {"frechet_teacher_1": 9.0})))
    assert {p.title: [c.label for c in p.curves] for p in plots} == {
        "Frechet distance to real pictures": ["student"],
        "Precision and recall": ["precision", "recall"],
        "Attributes drawn right": ["all right", "shape"],
        "Gap between one teacher step and 25": ["gap closed"],
        "Losses": ["lora"],
        "Student and teacher: gap of their scores": ["gap"],
    }
    assert plots[0].references == {"teacher, 1 step": 9.0}


@pytest.mark.parametrize(
    "ys", [[1.0], [0.0, 0.0], [-1.0, 1.0], [1e-9, 1.0, 1e6], [1e20] * 5, [5.0, math.nan, 6.0]]
)
@pytest.mark.parametrize("log", [None, True, False])
def test_line_plot_stays_inside_its_frame(ys: list[float], log: bool | None) -> None:
    plot = Plot("t", "y", [Curve("c", range(len(ys)), ys)], {"ref": 2.0, "none": math.nan}, log=log)
    root = ET.fromstring(line_plot(plot))
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    circles = [(float(c.get("cx", "nan")), float(c.get("cy", "nan"))) for c in root.iter("circle")]
    assert len(circles) == sum(map(math.isfinite, ys))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in circles)


def test_long_curves_are_drawn_as_means_with_a_band() -> None:
    root = ET.fromstring(line_plot(Plot("t", "y", [Curve("c", range(5000), [1.0, 3.0] * 2500)])))
    assert len(list(root.iter("circle"))) <= 120
    assert len(list(root.iter("polygon"))) == 1


def test_ticks() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert nice_ticks(31.9, 152.3) == pytest.approx([50, 100, 150])
    assert nice_ticks(2, 2) == [2]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(0.15, 3) == pytest.approx([0.2, 0.5, 1, 2])


def test_interval_bar() -> None:
    bar = ET.fromstring(interval_bar(0.62, 0.48, 0.74, before=0.1))
    assert bar.get("aria-label") == "62%, 95 % interval 48% to 74%, before 10%"
    assert interval_bar(math.nan, 0, 1) == ""


def test_to_uint8_covers_the_range() -> None:
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    pixels = pictures.to_uint8(levels)
    assert pixels.shape == (1, 1, 5, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.full((1, 3, 2, 2), math.nan)])
def test_to_uint8_refuses(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pictures must be"):
        pictures.to_uint8(bad)


def test_grid_enlarges_without_blurring() -> None:
    tiles = torch.rand(5, 3, 4, 4) * 2 - 1
    sheet = np.asarray(pictures.grid(tiles, columns=2, scale=3, pad=1))
    assert sheet.shape == (3 * 14, 2 * 14, 3)
    last = sheet[29:41, 1:13]  # row 2, column 0
    assert (last == pictures.to_uint8(tiles)[4].repeat(3, 0).repeat(3, 1)).all()
    assert (sheet[28:, 14:] == 255).all()  # no sixth picture


def test_grid_makes_room_for_labels() -> None:
    tiles = torch.zeros(4, 3, 8, 8)
    plain = pictures.grid(tiles, 2)
    labelled = pictures.grid(tiles, 2, titles=["a", "b"], row_titles=["a long prompt " * 4, "q"])
    assert labelled.width > plain.width and labelled.height > plain.height


@pytest.mark.parametrize(
    "arguments",
    [{"columns": 0}, {"columns": 2, "titles": ["one"]}, {"columns": 2, "row_titles": ["1", "2"]}],
)
def test_grid_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"columns|titles"):
        pictures.grid(torch.zeros(2, 3, 4, 4), **arguments)


def test_save_png_and_data_uri_round_trip(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    path = pictures.save_png(image, tmp_path / "new" / "a.png")
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert pictures.data_uri(image).startswith("data:image/png;base64,")


def test_a_link_is_written_through_and_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    (tmp_path / "real.json").write_bytes(b"old")
    link.symlink_to("real.json")
    assert pictures.write_atomically(link, b"new") == link
    assert link.is_symlink() and (tmp_path / "real.json").read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        pictures.write_atomically(pipe, b"through")
        assert os.read(reader, 99) == b"through" and pipe.is_fifo()
    finally:
        os.close(reader)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pictures.write_atomically(tmp_path / "a.txt", b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        pictures.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
