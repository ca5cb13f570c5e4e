"""A run stops where its figures are no numbers, says what the step was, and saves nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import FAST, assert_nothing_half, rows
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from snoopi import runstate, train

pytestmark = pytest.mark.e2e

QUIET = "evaluate.prompts=0"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.splitlines()[-1]


def assert_states_finite(out: Path, tmp_path: Path) -> None:
    """Every tensor of every state that was written."""
    for step in runstate.steps(out):
        file = tmp_path / "state.pt"
        dcp_to_torch_save(out / "state" / f"step-{step:08d}", file)
        assert runstate.not_finite(torch.load(file, weights_only=True)) == []
    assert_nothing_half(out)


def poison(model: Path, value: float) -> None:
    """Give one weight of a model's backbone an impossible value."""
    path = model / "backbone.safetensors"
    state = load_file(path)
    state["conv_in.weight"].view(-1)[0] = value
    save_file(state, path)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(1e38, marks=pytest.mark.slow)])
def test_a_broken_teacher_stops_the_run_and_a_mended_one_goes_on(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    teacher, out = tmp_path / "debug_teacher" / "model", tmp_path / "out"
    shutil.copytree(reference.parent / "debug_teacher" / "model", teacher)
    # The first four steps of the reference, as if it had been stopped there.
    shutil.copytree(reference, out, ignore=shutil.ignore_patterns("step-00000006", "model"))
    words = [*FAST, QUIET, "--out", str(out), "--resume"]
    poison(teacher, value)
    assert train.main(words) == 2
    line = last_line(capsys)
    assert line.startswith("snoopi.train: step 5: ") and "not finite" in line
    for part in ("loss_vsd", "t = [", "kappa = [", "kappa_lora = [", "prompts = ['"):
        assert part in line
    assert runstate.steps(out) == [4] and not (out / "model").exists()
    assert rows(out) == rows(reference)[:4]
    assert_states_finite(out, tmp_path)
    shutil.copy(
        reference.parent / "debug_teacher" / "model" / "backbone.safetensors",
        teacher / "backbone.safetensors",
    )
    assert train.main(words) == 0
    assert rows(out) == rows(reference)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # lr beyond fp32: the step's loss is a number, its update is not.
        (["debug", "optim.student.lr=1e39"], ("student.", "t = [", "kappa = [", "prompts = [")),
        (
            ["debug", "optim.lora.lr=1e39", "lora.updates_per_step=1"],
            ("lora.", "t = [", "kappa = [", "prompts = ["),
        ),
        # The second update of the step meets what the first one broke.
        (["debug", "optim.lora.lr=1e39"], ("loss_lora", "t = [", "kappa = [", "prompts = [")),
        # Finite weights whose next loss overflows.
        (["debug", "optim.student.lr=1e30"], ("loss_", "t = [", "kappa = [", "prompts = [")),
        (["debug_teacher", "optim.student.lr=1e39"], ("backbone.", "t = [", "captions = [")),
        (["debug_teacher", "optim.student.lr=1e30"], ("loss", "t = [", "captions = [")),
        (["shapes_vae", "optim.student.lr=1e39"], ("vae.", "pictures")),
        (["shapes_vae", "optim.student.lr=1e30"], ("loss", "pictures")),
    ],
)
def test_an_absurd_learning_rate(
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    parts: tuple[str, ...],
) -> None:
    os.symlink(reference.parent / "debug_teacher", tmp_path / "debug_teacher")
    out = tmp_path / "out"
    rest = ["run.steps=4", "run.save=1", "run.log=1", "run.batch=2", QUIET, "evaluate.every=0"]
    rest += ["optim.student.warmup=0", "optim.student.clip=1"]
    rest += ['lora.targets=["to_q"]'] if words[0] == "debug" else []
    assert train.main([*words, *rest, "--out", str(out)]) == 2
    line = last_line(capsys)
    assert line.startswith("snoopi.train: step ") and "not finite" in line
    assert all(part in line for part in parts), line
    assert not (out / "model").exists()
    assert_states_finite(out, tmp_path)


def test_nothing_that_is_not_finite_is_saved(
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The average and the LoRA teacher's optimizer, too, where every figure is a number."""
    os.symlink(reference.parent / "debug_teacher", tmp_path / "debug_teacher")
    step = train.Distiller.step

    def break_average(self: train.Distiller, number: int) -> dict:
        row = step(self, number)
        if number == 1:
            next(iter(self.average.average.values())).fill_(torch.inf)
        return row

    def break_moments(self: train.Distiller, number: int) -> dict:
        row = step(self, number)
        moments = next(iter(self.lora_optimizer.state.state_dict().values()))
        if number == 1:
            moments["exp_avg_sq"].fill_(torch.nan)
        return row

    for broken, name in ((break_average, "average."), (break_moments, "optimizer_lora.")):
        monkeypatch.setattr(train.Distiller, "step", broken)
        out = tmp_path / name
        assert train.main([*FAST, "run.steps=2", QUIET, "--out", str(out)]) == 2
        line = last_line(capsys)
        assert f"step 2: {name}" in line and "not finite" in line
        assert runstate.steps(out) == [] and not (out / "model").exists()
