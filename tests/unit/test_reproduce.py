"""Comparisons of one's own: means over a run's last evaluations, over seeds, the guidance table."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.evaluate.negatives import METHODS, Search, drawer, guidance_table
from snoopi.evaluate.removal import Choice
from snoopi.evaluate.world import Quality
from snoopi.final import FOLLOWED, end_means
from snoopi.reproduce import __main__ as reproduce


def look(value: float, **more: Any) -> dict[str, Any]:
    return {**dict.fromkeys(FOLLOWED, value), **more}


def quality(frechet: float) -> Quality:
    return Quality(10, 0.5, {}, frechet, 0.5, 0.5)


def test_end_means_take_the_last_three_looks() -> None:
    rows = [look(9.0, step=1), {"step": 2, "loss": 1.0}, look(1.0), look(2.0), look(6.0)]
    teacher = {"teacher_1": quality(7.0), "teacher_25": quality(2.0)}
    means = end_means(rows, teacher)
    assert means["evaluations"] == 3 and means["frechet"] == means["recall"] == 3.0
    assert means["gap_closed"] == pytest.approx((7 - 3) / (7 - 2))
    assert "gap_closed" not in end_means(rows)
    assert end_means([look(4.0)])["frechet"] == 4.0


def summary(frechet: float, recall: float) -> dict[str, Any]:
    end = {**look(0.9), "frechet": frechet, "recall": recall, "evaluations": 3}
    return {"end": end}


def test_compare_gives_means_and_spread_over_seeds() -> None:
    names = ("frechet_teacher_1", "frechet_teacher_25", "all_right_teacher_25", "recall_teacher_25")
    teacher = dict(zip(names, (6.0, 1.0, 0.9, 0.8), strict=True))
    summaries = {
        reproduce.RunKey("a", 0): {**summary(2.0, 0.5), **teacher},
        reproduce.RunKey("a", 1): summary(1.0, 0.7),
        reproduce.RunKey("b", 0): summary(3.5, 0.6),
    }
    results = reproduce._compare(summaries)
    a, b = results["recipes"]
    assert (a["recipe"], a["seeds"], b["seeds"]) == ("a", 2, 1)
    assert a["frechet"] == 1.5 and a["gap_closed"] == pytest.approx(0.9)
    assert a["recall_sd"] == pytest.approx(0.02**0.5) and b["recall_sd"] is None
    assert [run["gap_closed"] for run in results["runs"]] == pytest.approx([0.8, 1.0, 0.5])
    text = reproduce._recipe_text(results)
    assert "1.500 +- 0.707" in text and "b, seed 0" in text


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["recipes", "pgsb_shape"], "pgsb_shapes"),
        (["recipes", "debug", "run.step=3"], "run.steps"),
        (["recipes", "--jobs", "0"], "--jobs"),
        (["recipes", "shapes_teacher"], "a recipe that distils"),
        (["guidance", "nowhere"], "nowhere"),
        (["guidance", "nowhere", "--count", "0"], "--count"),
        (["guidance", "shapes_teacher", "--scales", "0", "1"], "--scales must be above 0"),
        (["guidance", "emoji_teacher", "--count", "5"], "words of the shapes world"),
        (["recipes", "pgsb_shapes", "pgsb_shapes_dit"], "under one teacher"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--out", str(tmp_path / "out")] if words[0] == "recipes" else []
    assert reproduce.main([*words, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert names in line and not (tmp_path / "out").exists()


class Stub:
    """A pipeline that notes what it is asked for and draws grey noise."""

    spec = dataclasses.replace(zoo.preset("debug"), one_step=zoo.OneStep())

    def __init__(self) -> None:
        self.asked: set[tuple[str, float | None]] = set()

    def noise(self, seed: int, indices: list[int]) -> Tensor:
        return torch.zeros(len(indices), 1)

    def pictures(self, prompts: Any, z: Any, negatives: Any, mode: str, scale: float) -> Tensor:
        self.asked.add((mode, scale))
        noise = torch.Generator().manual_seed(len(prompts))
        return torch.rand(len(prompts), 3, 32, 32, generator=noise) * 2 - 1


def test_every_method_gets_the_same_search() -> None:
    stub = Stub()
    table = guidance_table(stub, (0.5, 1.0), count=2, batch=5)  # type: ignore[arg-type]
    expected = {(name, unit(s)) for name, unit in METHODS.items() for s in (0.5, 1.0)}
    assert stub.asked - {("none", 0.0)} == expected
    rows = table.rows()
    assert [row["method"] for row in rows] == list(METHODS)
    assert json.dumps([method.to_dict() for method in table.methods.values()], allow_nan=False)
    assert table.best().name not in ("cfg", "embed-sub")
    with pytest.raises(ValueError, match="unknown method 'nasty'"):
        guidance_table(stub, (1.0,), 1, methods=["nasty"])  # type: ignore[arg-type]


def test_weaker_strengths_are_tried_where_none_keeps_enough() -> None:
    tried: list[list[float]] = []

    class Tuning:
        def choose_scale(self, at: Any, scales: list[float], bound: float) -> Choice:
            tried.append(scales)
            return Choice(min(scales), min(scales) <= 1.05, {})

    stub = Stub()
    search = Search(stub, count=1)  # type: ignore[arg-type]
    search.__dict__["tuning"] = Tuning()  # a cached property
    found = search.method("cfg", (0.5, 1.0), partial(drawer, stub, "cfg"))  # type: ignore[arg-type]
    assert tried == [[1.5, 2.0], [1 + 1 / 32, 1 + 1 / 16, 1.125, 1.5]]
    assert found.choice.scale == 1 + 1 / 32 and found.choice.met
