"""The paper's experiments: units and their keys, records, verdicts, and the report made of them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import snoopi
from snoopi import config as recipes
from snoopi.evaluate import negatives, removal
from snoopi.report import Figure
from snoopi.reproduce import __main__ as command
from snoopi.reproduce import book, units
from snoopi.reproduce.experiments import (
    EXPERIMENTS,
    RATES,
    TUNING_SEED,
    WORLDS,
    check,
    value,
)
from snoopi.reproduce.records import Records, machine
from snoopi.reproduce.statistics import Verdict, difference, judge, spread
from snoopi.reproduce.units import Negatives, Teacher, Train, Unit, parse, students

RUN = Train("pgsb_shapes", 0)
UNITS: list[Unit] = [
    RUN,
    Teacher("shapes_teacher", (2.0, 5.0), 1),
    Negatives(RUN, "nasa"),
    Negatives(RUN, "nasa", 0.5, 10),
]


def figures(unit: Unit, quality: Callable[[Unit], float]) -> dict[str, Any]:
    """What a unit could have measured."""
    f = quality(unit)
    found = {"frechet": f, "all_right": 0.9, "precision": 0.6, "recall": 0.9, "updates": 4}
    looks = [{"step": s, "frechet": f + 1 / s} for s in (1, 2, 4)]
    removal = {"scale": 1.0, "easy_before": 0.6, "easy": 0.9, "targeted": 0.8, "keep_ratio": 0.96}
    return (
        {**found, "curve": looks} if isinstance(unit, Train) else {**found, **removal, "same": 0.7}
    )


# --- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.describe())
def test_a_unit_is_read_back_from_its_record(unit: Unit) -> None:
    again = parse(unit.kind, json.loads(json.dumps(unit.plain())))
    assert again == unit and again.key == unit.key


def test_a_key_is_of_what_decides_the_figures_and_nothing_else() -> None:
    words = ("run.steps=200",)
    same = [(*words, "optim.student.lr=1e-4"), (*words, "run.log=7"), (*words, "evaluate.batch=10")]
    assert {Train("pgsb_shapes", 0, more).key for more in same} == {RUN.key}
    other = [
        Train("pgsb_shapes", 1),
        Train("pgsb_shapes", 0, ("run.steps=201",)),
        Train("pgsb_shapes", 0, (*words, "kappa.lora=[1.0, 1.0]")),
        Train("pgsb_shapes_gap", 0),
        *UNITS[1:],
        Negatives(Train("pgsb_shapes", 1), "nasa"),
        Negatives(RUN, "vsf"),
        Teacher("shapes_teacher", (2.0, 5.0), 2),
    ]
    assert len({unit.key for unit in [RUN, *other]}) == 1 + len(other)
    # The recipe decides, not its name: swiftbrush_shapes is pgsb_shapes at the mean.
    mean = ("run.steps=200", "kappa.teacher=[2.25, 2.25]", "kappa.lora=[2.25, 2.25]")
    assert Train("pgsb_shapes", 0, mean).key == Train("swiftbrush_shapes", 0).key


def test_students_are_trained_once() -> None:
    assert students(UNITS) == [RUN]
    same = Train("pgsb_shapes", 0, ("run.steps=200", "optim.student.lr=0.0001"))
    assert students([same, RUN]) == [same] and students([RUN, same]) == [RUN]


def test_a_teacher_that_is_trained_first_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Train("pgsb_shapes_dit", 0)
    before = run.what()
    assert before["teacher"] not in ("", Train("pgsb_shapes", 0).what()["teacher"])
    load = recipes.load
    monkeypatch.setattr(
        recipes,
        "load",
        lambda name, more=(): load(name, [*more, *["run.steps=700"] * ("teacher" in name)]),
    )
    units._teacher.cache_clear()
    try:
        assert run.what() != before
    finally:
        units._teacher.cache_clear()


def test_what_keys_leave_out_is_as_the_records_know_it() -> None:
    """Changed, figures on record are of something else: run them again, and pin it anew."""
    text = repr((
        recipes.Evaluate().scales, negatives.KEEP_BOUND, removal.REFINE, negatives.WEAKER,
        {name: [scale(s) for s in (0.5, 1.0)] for name, scale in negatives.METHODS.items()},
        negatives.EVALUATION_SEED, negatives.TUNING_SEED,
    ))  # fmt: skip
    digest = hashlib.sha256(text.encode())
    package = Path(snoopi.__file__).parent
    names = ("worlds/*_judge.safetensors", "shipped/*/text_encoder.safetensors",
             "shipped/*/vae.safetensors")  # fmt: skip
    for path in sorted(path for name in names for path in package.glob(name)):
        digest.update(path.read_bytes())
    assert digest.hexdigest()[:16] == "96d4329454847588"


# --- statistics -----------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    left, right = {0: 3.0, 1: 5.0, 2: 4.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    found = difference(left, right)  # 2, 3, 1: mean 2, sd 1, t(2) = 4.303
    assert found is not None and found.n == 3 and found.mean == 2
    half = 4.303 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half) and found.high == pytest.approx(2 + half)
    assert difference({0: 1.0}, {1: 1.0}) is None
    mean, sd = spread({3: 1.0})
    assert mean == 1 and math.isnan(sd) and spread({0: 1.0, 1: 3.0})[1] == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("left", "sign", "word"),
    [
        ({0: 1.0, 1: 1.1, 2: 0.9}, -1, "holds"),
        ({0: 1.0, 1: 1.1, 2: 0.9}, 1, "does not hold"),
        ({0: 9.0, 1: 1.1, 2: 0.9}, -1, "not separable"),
        ({0: 1.0}, -1, "one seed"),
        ({}, -1, "not run"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(
    left: dict[int, float], sign: int, word: str
) -> None:
    found = judge(left, {0: 3.0, 1: 3.0, 2: 3.0}, sign)
    assert found.word == word and found.text().startswith(word)
    assert ("seeds" in found.text()) == (found.difference is not None and found.difference.n > 1)


# --- records --------------------------------------------------------------------------------------


def test_records_are_read_back_and_the_last_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "runs.jsonl"
    records = Records(path)
    assert RUN not in records and records.figures(RUN) is None
    threads = [
        threading.Thread(target=records.add, args=(unit, {"frechet": 1.0}, 2.0, 1))
        for unit in UNITS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records.add(RUN, {"frechet": 3.0}, 2.0, 1, made_at="abc")
    for found in (records, Records(path)):
        assert len(found) == len(UNITS) and found.figures(RUN) == {"frechet": 3.0}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["commit"] == "abc" and lines[0]["commit"] != "abc"
    assert lines[0]["machine"] == machine(1)
    with pytest.raises(ValueError):
        records.add(RUN, {"frechet": math.nan}, 1.0, 1)
    assert len(path.read_text().splitlines()) == len(UNITS) + 1


@pytest.mark.parametrize("tail", ['{"key": "a"}\n', "[]\n", '{"key"', "\n"])
def test_a_line_that_is_no_record_is_named(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Records(path).add(RUN, {}, 1.0, 1)
    path.write_text(path.read_text() + tail)
    with pytest.raises(ValueError, match="line 2 is not a record"):
        Records(path)


# --- experiments ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """All of the shapes world, as if run: a fixed 4.5 is worst, the gap is best."""
    records = Records(tmp_path_factory.mktemp("full") / "runs.jsonl")

    def quality(unit: Unit) -> float:
        run = unit.student if isinstance(unit, Negatives) else unit
        if not isinstance(run, Train):
            return 1.0 + 0.01 * unit.seed
        rate = next((w for w in run.overrides if "lr" in w), "lr=1e-4").split("=")[1]
        start = {"pgsb_shapes_fixed": 3.0, "pgsb_shapes_gap": 1.0}.get(run.recipe, 2.0)
        return start + 0.01 * unit.seed * len(run.recipe) + abs(float(rate) - 2e-4) * 1e3

    for name in WORLDS["shapes"]:
        for _ in range(2):  # what was found may ask for more
            for unit in EXPERIMENTS[name].units("shapes", records, range(3)):
                if unit not in records:
                    records.add(unit, figures(unit, quality), 1.0, 1)
    return records


def test_every_arm_has_a_recipe_and_every_claim_its_arms(full: Records) -> None:
    for world, names in WORLDS.items():
        check(names, world, full)
    for name in WORLDS["shapes"]:
        for table in EXPERIMENTS[name].tables("shapes", full):
            for claim in table.claims:
                assert claim.left in table.arms and claim.right in {*table.arms, ""}
                row = full.figures(table.arms[claim.left](0))
                assert row is not None and value(row, claim.figure) is not None, claim
            assert table.x is None or set(table.x[1]) <= set(table.arms)


def test_tuning_comes_first_and_is_not_reported(full: Records, tmp_path: Path) -> None:
    experiment, empty = EXPERIMENTS["tab2"], Records(tmp_path / "none.jsonl")
    begun = experiment.units("shapes", empty, range(3))
    tuning = [unit for unit in begun if unit.seed == TUNING_SEED]
    assert len(experiment.tables("shapes", empty)) == 1
    assert len(tuning) == 9 * len(RATES) and len(begun) == len(tuning) + 9 * 3
    own, tuned = experiment.tables("shapes", full)
    for name, unit in tuned.arms.items():
        assert own.arms[name](0).key != unit(0).key  # 2e-4 was made the best
        assert "optim.student.lr=0.0002" in unit(0).plain()["overrides"]
        assert unit(0).seed == 0


def test_the_default_rate_is_not_run_again() -> None:
    rate = ("run.steps=200", f"optim.student.lr={RATES[1]:g}")
    assert Train("pgsb_shapes", 0, rate).key == RUN.key


def test_verdicts_and_forms_of_the_report(full: Records) -> None:
    found = book.chapters(WORLDS["shapes"], "shapes", full, range(3))
    assert [chapter.missing for chapter in found] == [0] * len(found)
    tab2 = next(chapter for chapter in found if chapter.name == "tab2")
    words = {claim.text: verdict.word for claim, verdict in tab2.tables[0].verdicts}
    assert words["random for both is better than fixed"] == "holds"
    assert words["a fixed gap, 3.5 / 2, is better than random for both"] == "holds"
    assert words["random for the frozen teacher alone does harm"] == "does not hold"
    text, page = (
        book.as_text(found),
        book.as_html(
            found, full, {"fig5": [Figure("A strip", Image.new("RGB", (4, 4)), "", "alt")]}
        ),
    )
    markdown = book.as_markdown(found, "the command")
    for form in (text, page, markdown):
        assert all(chapter.title in form for chapter in found) and "does not hold" in form
    assert page.count("<svg") == 1 + 2 + 2 * 2  # Fig. 2, Tab. 1, Fig. 5
    assert "A strip" in page and "<script" not in page and "http" not in page.split("</style>")[1]
    rows = book.summary_rows(found)
    assert len(rows) == sum(c.paper for ch in found for t in ch.tables for c, _ in t.verdicts)


def test_a_search_that_found_no_strength_is_marked_and_not_compared(tmp_path: Path) -> None:
    records = Records(tmp_path / "runs.jsonl")
    (table,) = EXPERIMENTS["fig3"].tables("shapes", records)
    for name, arm in table.arms.items():
        for seed in range(3):
            met = name == "CFG of outputs" or seed > 0
            found = {"scale": 1.0, "targeted": 0.5 + 0.1 * (name == "NASA") + 0.01 * seed}
            removed = {"easy": 1.0, "easy_before": 0.5, "same": 1.0, "keep_ratio": 1.0}
            row = {**found, **removed, "frechet": 1.0, "within_bound": met}
            records.add(arm(seed), row, 1.0, 1)
    (shown,) = book.chapters(["fig3"], "shapes", records, range(3))[0].tables
    seeds = {row[0]: row[1] for row in shown.rows}
    assert seeds["NASA"] == "3 (1 keep too little)" and seeds["CFG of outputs"] == "3"
    assert all(verdict.difference and verdict.difference.n == 2 for _, verdict in shown.verdicts)


def test_a_line_that_the_disk_took_half_of_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "runs.jsonl")
    records.add(RUN, {}, 1.0, 1)
    before = records.path.read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            records.add(UNITS[1], {}, 1.0, 1)
    assert records.path.read_bytes() == before and UNITS[1] not in records


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    records = Records(tmp_path / "none.jsonl")
    found = book.chapters(["tab2"], "shapes", records, range(2))
    text = book.as_text(found)
    assert "45 units have not been run yet" in text and "not run" in text
    assert book.summary_rows(found) == [] and book.as_html(found, records, {})


def test_derived_figures() -> None:
    curve = [{"frechet": f} for f in (4.0, 1.0, 5.0)]
    assert value({"curve": curve}, "rises") == pytest.approx(math.sqrt(16 / 2))  # the fall is none
    assert value({"easy": 0.9, "easy_before": 0.6}, "gain") == pytest.approx(0.3)
    assert value({"curve": curve[:1]}, "rises") is None


def test_curves_are_over_updates_of_the_student(full: Records) -> None:
    (fig2,) = book.chapters(["fig2"], "shapes", full, range(3))
    (plot,) = fig2.tables[0].plots
    assert [list(curve.x) for curve in plot.curves] == [[1, 2, 4]] * 4
    assert plot.curves[0].y[0] > plot.curves[0].y[-1]


# --- the command ----------------------------------------------------------------------------------


def test_what_is_on_record_is_drawn_and_not_run(
    full: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--records", str(full.path), "--out", str(tmp_path / "out")]
    page = tmp_path / "docs" / "results.md"
    before = full.path.read_bytes()
    assert command.main(["all", *words, "--markdown", str(page)]) == 0  # nothing is missing
    assert (tmp_path / "out" / "report.html").is_file() and page.is_file()
    assert "Table 2" in capsys.readouterr().out and full.path.read_bytes() == before
    assert command.main(["tab2", *words, "--seeds", "4", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("18 units to run")
    words += ["--seeds", "4", "--dry-run", "--only", "^pgsb_shapes seed 3$"]
    assert command.main(["tab2", *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["pgsb_shapes seed 3"] and last.startswith("1 units to run")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["tab2", "--seeds", "0"], "--seeds"),
        (["tab2", "--jobs", "0"], "--jobs"),
        (["tab9"], "tab9"),
        (["tab2", "--only", "nothing"], "no unit of tab2 matches 'nothing'"),
        (["tab2", "--only", "seed ("], "regular expression"),
        (["tab2", "--world", "sea"], "sea"),
        (["dit", "--world", "emoji"], "dit"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        status: int | str | None = command.main(
            [*words, "--out", str(out), "--records", str(tmp_path / "r.jsonl")]
        )
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert names in line and not out.exists()


def test_a_verdict_without_runs_has_no_numbers() -> None:
    assert Verdict("not run", None).text() == "not run"
