"""Recipes: what is read back equals what was written, and every mistake is one clear line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from snoopi import config
from snoopi.config import ConfigError


@pytest.mark.parametrize("name", config.recipes())
def test_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    loaded = config.load(name)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(loaded), "utf-8")
    assert config.load(path) == loaded
    assert config.identity(config.load(path), ()) == config.identity(loaded, ())


def test_awkward_values_read_back_equal(tmp_path: Path) -> None:
    awkward = 'a "b"\\c \t\n\x7f [x] # \u00e9\U0001f600'
    loaded = config.load("debug", ["optim.student.lr=1e-300"])
    loaded = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, teacher=awkward))
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(loaded), "utf-8")
    assert config.load(path) == loaded


def test_base_is_inherited_and_overridden() -> None:
    base, gap = config.load("pgsb_shapes"), config.load("pgsb_shapes_gap")
    assert gap.kappa.teacher == (3.5, 3.5) and gap.kappa.lora == (2.0, 2.0)
    assert config.differences(base, gap) == [
        "kappa.teacher: [0.5, 4.0] -> [3.5, 3.5]",
        "kappa.lora: [0.5, 4.0] -> [2.0, 2.0]",
    ]


def test_a_control_has_the_mean_of_the_random_range() -> None:
    random, fixed = config.load("pgsb_shapes").kappa, config.load("swiftbrush_shapes").kappa
    assert fixed.teacher == (sum(random.teacher) / 2,) * 2 == fixed.lora


def test_paths_of_bases_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "debug"\n[run]\nseed = 5\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\n[run]\nlog = 7\n')
    loaded = config.load(tmp_path / "b.toml").run
    assert (loaded.seed, loaded.log, loaded.steps) == (5, 7, 20)


def test_overrides_are_toml_or_bare_text_and_the_last_wins() -> None:
    loaded = config.load(
        "debug",
        [
            "run.dtype=bf16",
            "run.seed=1",
            "run.seed = 2",
            "kappa.lora=[1, 2]",
            "model.teacher=2024",
            'model.student_init="x y"',
            "optim.student.lr=1",
            'lora.targets=["to_q"]',
        ],
    )
    assert (loaded.run.dtype, loaded.run.seed) == ("bf16", 2)
    assert loaded.kappa.lora == (1.0, 2.0) and isinstance(loaded.optim.student.lr, float)
    assert (loaded.model.teacher, loaded.model.student_init) == ("2024", "x y")
    assert loaded.lora.targets == ("to_q",)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("vsd.studnt_t=3", ["unknown key vsd.studnt_t", "nearest is vsd.student_t"]),
        ("student_t=3", ["unknown key student_t", "nearest is vsd.student_t"]),
        ("kapa.teacher=[1,2]", ["unknown key kapa.teacher", "nearest is kappa.teacher"]),
        ("optim.studnt.lr=1", ["nearest is optim.student.lr"]),
        ("clip_los.tau=0.3", ["unknown key clip_los.tau", "nearest is clip_loss.tau"]),
        ("clip_loss.weight=0.1", ["clip_loss.model: expected a folder of tools with a CLIP"]),
        ("nasa_train.alpha=[1, 0]", ["low <= high", "got [1.0, 0.0]"]),
        ("kappa=3", ["kappa: expected a section with the keys kappa.teacher"]),
        ("optim.student.lr=-1", ["optim.student.lr: expected number above 0, got -1.0"]),
        ("optim.student.lr=nan", ["expected number, got nan"]),
        ("optim.student.lr=true", ["expected number, got True"]),
        ("optim.student.betas=[0.9, 1.0]", ["optim.student.betas", "got [0.9, 1.0]"]),
        ("evaluate.prompts=1", ["expected 0, or at least 2, got 1"]),
        ("evaluate.teacher_steps=1001", ["from 1 to 1000, got 1001"]),
        ("optim.student.warmup=20", ["expected less than run.steps = 20, got 20"]),
        ("kappa.teacher=[4.0, 0.5]", ["low <= high", "got [4.0, 0.5]"]),
        ("kappa.teacher=3", ["expected [number, number], got 3"]),
        ("kappa.teacher=[-1, 1]", ["at least 0, got [-1.0, 1.0]"]),
        ("kappa.draw=both", ["expected shared or independent, got 'both'"]),
        ("vsd.t=[20, 1200]", ["from 0 to 1000, got [20, 1200]"]),
        ("vsd.t=[20, 20]", ["low < high"]),
        ("vsd.student_t=1000", ["from 0 to 999, got 1000"]),
        ("run.steps=0", ["run.steps", "at least 1, got 0"]),
        ("run.steps=1e3", ["expected whole number, got 1000.0"]),
        ("run.accumulate=3", ["expected a divisor of run.batch = 8, got 3"]),
        ("lora.targets=[]", ["expected [text, ...], got []"]),
        ("model.teacher=''", ["model.teacher: expected a model folder"]),
        ("denoise.weight=none", ["denoise.weight is not read by run.method = 'vsd'"]),
        ("model.preset=shapes", ["model.preset is not read"]),
        ("run.steps", ["expected section.key=value"]),
        ("run.steps=", ["expected section.key=value"]),
        ("run.steps=3\nseed = 4", ["expected whole number"]),
    ],
)
def test_a_wrong_override_is_named(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        config.load("debug", [override])
    message = str(raised.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_prompts_of_ones_own_need_negatives_of_ones_own() -> None:
    aware = "nasa_train.alpha=[0, 1]"
    assert config.load("debug", [aware]).nasa_train.alpha == (0.0, 1.0)  # the world has some
    with pytest.raises(ConfigError, match=r"nasa_train\.alpha: expected data.negatives beside"):
        config.load("debug", [aware, "data.prompts=mine.txt"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[run]\nstep = 3\n", ["unknown key run.step", "nearest is run.steps"]),
        ("[rum]\nsteps = 3\n", ["unknown section rum", "nearest is run"]),
        ('[run]\nsteps = "3"\n', ["run.steps: expected whole number, got '3'"]),
        ("[run\n", ["not valid TOML", "line 1"]),
        ("base = 3\n", ["base: expected the name"]),
        ('base = "debig"\n', ["unknown recipe 'debig'", "nearest is debug"]),
        ('base = "mine.toml"\n', ["in a circle"]),
        ('base = "debug"\n[run]\nmethod = "denoise"\n', ["is not read by run.method = 'denoise'"]),
    ],
)
def test_a_wrong_file_is_named(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        config.load(path)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_the_file_of_a_wrong_key_is_named_not_the_file_that_inherits_it(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("[run]\nsteps = 0\n")
    (tmp_path / "new.toml").write_text('base = "old.toml"\n[run]\nsteps = 1\n')
    with pytest.raises(ConfigError, match=r"old\.toml: run\.steps"):
        config.load(tmp_path / "new.toml")


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "y.toml")
    with pytest.raises(ConfigError, match="unknown recipe 'pgsb'; the nearest is pgsb_"):
        config.load("pgsb")


def test_identity_is_of_what_decides_a_runs_numbers() -> None:
    def identity(*overrides: str) -> str:
        return config.identity(config.load("debug", overrides), ("run.log", "evaluate."))

    assert identity() == identity("run.log=7", "evaluate.prompts=0")
    assert identity() != identity("run.seed=1")
    assert identity() != identity("data.prompts=mine.txt")
    assert config.identity(config.Config(), ()) == config.identity(config.Config(), ("run.",))


def test_the_reference_has_a_line_with_a_meaning_for_every_key() -> None:
    lines = config.reference().splitlines()
    assert len({line.split()[0] for line in lines}) == len(lines) > 40
    assert any(line.startswith("kappa.teacher ") and "frozen teacher" in line for line in lines)
    assert all(len(line.rsplit("  ", 1)[1]) > 5 for line in lines)
