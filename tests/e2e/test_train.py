"""The commands, as a user types them: train, stop, resume, spread over ranks, generate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Warm
from PIL import Image, ImageChops

import snoopi
from snoopi.report import SUMMARY_KEYS

pytestmark = pytest.mark.e2e

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = "evaluate.prompts=0"
STEPS = 10
DEBUG = ("debug", f"run.steps={STEPS}")
FIGURES = ("loss_vsd", "loss_lora", "grad_norm_student", "grad_norm_lora", "gap", "kappa_mean")


def train(*words: str, ranks: int = 1) -> list[str]:
    """The command line of snoopi.train, under torchrun with more than one rank."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "snoopi.train", *words]


def run(*words: str, ranks: int = 1, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        train(*words, ranks=ranks), env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, done.stderr
    return done


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path) -> list[list[float]]:
    """What must be equal bit for bit: every logged figure but the speed."""
    return [[row["step"], *(row[name] for name in FIGURES)] for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted debug run, from teacher to report, and its runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    warm.run("train", *DEBUG, "--out", str(runs / "whole"))
    return runs / "whole"


def test_a_run_leaves_model_report_and_figures(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert set(SUMMARY_KEYS) <= set(summary)
    assert all(summary[key] is not None for key in SUMMARY_KEYS if key != "gap_closed")
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert summary["end"]["evaluations"] == 1
    assert summary["end"]["frechet"] == pytest.approx(summary["frechet_student"])
    assert summary["frechet_real"] < summary["frechet_student"] and summary["all_right_real"] == 1
    page = (whole / "report.html").read_text()
    assert "http://" not in page and "https://" not in page  # opens offline
    for picture in (whole / "samples").glob("*.png"):
        assert Image.open(picture).size[0] > 32
    assert (whole.parent / "debug_teacher" / "model" / "snoopi.json").is_file()


def test_a_rerun_is_equal_bit_for_bit(whole: Path) -> None:
    again = whole.parent / "again"
    run(*DEBUG, QUIET, "--out", str(again))  # a process of its own, not a fork
    assert figures(again) == figures(whole)


_MORE = (signal.SIGINT, signal.SIGKILL)
SIGNALS = [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in _MORE)]


@pytest.mark.parametrize("how", SIGNALS)  # SIGKILL at random moments: test_stopping
def test_a_stopped_run_resumes_bit_for_bit(whole: Path, how: signal.Signals) -> None:
    out = whole.parent / how.name
    process = subprocess.Popen(
        train(*DEBUG, QUIET, "run.save=2", "--out", str(out)),
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(out, 3, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    before = [row["step"] for row in rows(out)]
    assert 3 <= before[-1] < STEPS, "the run ended before it was stopped"
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + how
        assert "--resume" in errors and "Traceback" not in errors
    run(*DEBUG, QUIET, "run.save=2", "--out", str(out), "--resume")
    assert figures(out) == figures(whole)


def wait_for_rows(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    for _ in range(4000):
        if (out / "metrics.jsonl").is_file() and len(rows_so_far(out)) >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("the run wrote no rows")


def rows_so_far(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().split("\n")[:-1]


def test_a_run_killed_before_its_first_state_starts_again(warm: Warm, whole: Path) -> None:
    out = whole.parent / "early"
    words = [*DEBUG, QUIET, f"run.save={STEPS}", "--out", str(out)]
    process = subprocess.Popen(train(*words), env=ENV, stderr=subprocess.PIPE, text=True)
    wait_for_rows(out, 2, process)
    process.kill()
    process.communicate(timeout=120)
    warm.run("train", *words, "--resume")
    assert figures(out) == figures(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("shard", ["auto", pytest.param("never", marks=pytest.mark.slow)])
def test_two_ranks_give_the_losses_of_one(whole: Path, shard: str) -> None:
    out = whole.parent / f"two-{shard}"
    run(*DEBUG, QUIET, f"parallel.shard={shard}", "--out", str(out), ranks=2)
    torch.testing.assert_close(
        torch.tensor(figures(out), dtype=torch.float64),
        torch.tensor(figures(whole), dtype=torch.float64),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_follows_fp32(whole: Path, ranks: int) -> None:
    out = whole.parent / f"bf16-{ranks}"
    run(*DEBUG, QUIET, "run.dtype=bf16", "--out", str(out), ranks=ranks)
    got, expected = (torch.tensor(figures(f), dtype=torch.float64) for f in (out, whole))
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.02)


def test_accumulation_gives_the_losses_of_one_part(warm: Warm, whole: Path) -> None:
    out = whole.parent / "accumulated"
    warm.run("train", *DEBUG, QUIET, "run.accumulate=4", "--out", str(out))
    got, expected = (torch.tensor(figures(f), dtype=torch.float64) for f in (out, whole))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # by parts: test_compile, test_plan
def test_checkpointing_changes_nothing(warm: Warm, whole: Path) -> None:
    out = whole.parent / "checkpointed"
    warm.run("train", *DEBUG, QUIET, "parallel.checkpointing=true", "--out", str(out))
    got, expected = (torch.tensor(figures(f), dtype=torch.float64) for f in (out, whole))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["pgsb_shape"], "pgsb_shapes"),
        (["debug", "kapa.teacher=[1,2]"], "kappa.teacher"),
        (["debug", "run.steps=0"], "run.steps"),
        (["debug", "model.teacher=nowhere"], "nowhere"),
        (["debug", "run.steps=many"], "whole number"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    warm: Warm, tmp_path: Path, words: list[str], names: str
) -> None:
    done = warm.run("train", *words, "--out", str(tmp_path / "out"), status=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and names in lines[0]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_run_does_not_overwrite_another(warm: Warm, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    words = ("train", *DEBUG, "--out", str(whole))
    assert "--resume" in warm.run(*words, status=2).stderr
    other = warm.run(*words, "run.seed=1", "--resume", status=2)
    assert "run.seed: 0 -> 1" in other.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_looks_do_not_depend_on_the_rows_logged(whole: Path) -> None:
    out = whole.parent / "looks"
    run("debug", "evaluate.every=7", "evaluate.removal=0", "run.log=20", "--out", str(out))
    assert [row["step"] for row in rows(out)] == [7, 14, 20]
    assert all(row["frechet"] > 0 for row in rows(out)[:2])
    names = {path.name for path in (out / "samples").glob("step-*.png")}
    assert names == {"step-000007.png", "step-000014.png"}


def test_dry_run_and_print_config_write_nothing(warm: Warm, tmp_path: Path) -> None:
    for flag in ("--dry-run", "--print-config"):
        words = ("shapes_teacher", flag, "--out", str(tmp_path / "out"))
        printed = warm.run("train", *words).stdout
        assert "[optim.student]" in printed
    assert not (tmp_path / "out").exists()


def test_generate_writes_pictures(warm: Warm, whole: Path, tmp_path: Path) -> None:
    model, out = str(whole / "model"), tmp_path / "picture.png"
    words = [model, "a red circle", "--negative", "striped", "--scale", "1", "--out", str(out)]
    assert str(out) in warm.run("generate", *words).stdout
    assert Image.open(out).size == (32, 32)
    warm.run("generate", *words, "--num", "2", "--steps", "2", "--guidance", "nasa-centred")
    plain = [*words[:-1], str(tmp_path / "plain.png"), "--vae", model, "--tile", "64"]
    warm.run("generate", *plain, "--optimize", "none")
    difference = ImageChops.difference(Image.open(out), Image.open(tmp_path / "plain.png"))
    assert max(high for _, high in difference.getextrema()) <= 1
    assert {p.name for p in tmp_path.iterdir()} == {
        "picture.png",
        "plain.png",
        "picture-0.png",
        "picture-1.png",
    }


def test_generate_names_a_users_mistake(warm: Warm, whole: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "x.png")
    missing = warm.run("generate", str(tmp_path), "a circle", "--out", out, status=2)
    assert "snoopi.json" in missing.stderr and "Traceback" not in missing.stderr
    model = str(whole / "model")
    size = warm.run("generate", model, "a", "--size", "33x32", "--out", out, status=2)
    assert "multiples of 4" in size.stderr
    assert not Path(out).exists()


def pixels(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def test_a_picture_does_not_depend_on_its_batch(whole: Path) -> None:
    pipeline = snoopi.load(whole / "model")
    prompts = ["a red circle", "a blue star on a white background", "a small square", ""]
    together = pixels(pipeline(prompts, seed=3, num=2))
    alone = [pixels(pipeline(p, seed=3, num=2)) for p in prompts]
    assert together == [picture for pictures in alone for picture in pictures]
    assert pixels(pipeline("a red circle", seed=3)) == together[:1]


@pytest.mark.parametrize("guidance", ["nasa", "nasa-centred", "nag", "vsf", "embed-sub"])
def test_no_negative_is_the_plain_picture(whole: Path, guidance: str) -> None:
    pipeline = snoopi.load(whole / "model")
    z = pipeline.noise(0, [0, 1])
    prompts = ["a red circle", "a star"]
    plain = pipeline.pictures(prompts, z, guidance="none")
    assert torch.equal(pipeline.pictures(prompts, z, None, guidance), plain)
    assert torch.equal(pipeline.pictures(prompts, z, ["", None], guidance), plain)
    zero = pipeline.pictures(prompts, z, ["red", "blue"], guidance, 0.0)
    if guidance in ("nasa", "nasa-centred", "nag"):
        assert torch.equal(zero, plain)
    mixed = pipeline.pictures(prompts, z, ["red", None], guidance, 1.0)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], plain[0], atol=1e-4)


# --- the DiT family ----------------------------------------------------------------------------

DIT_TEACHER = (
    "debug_teacher",
    "model.preset=shapes_dit",
    "model.vae=shapes_vae",
    "denoise.prediction=eps",
)
DIT_TARGETS = 'lora.targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]'


@pytest.fixture(scope="module")
def dit(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted student at t = 400 of a DiT teacher, and its runs folder."""
    runs = tmp_path_factory.mktemp("dit")
    warm.run("train", *DIT_TEACHER, QUIET, "--out", str(runs / "teacher"))
    warm.run("train", *student(runs), "--out", str(runs / "whole"))
    return runs / "whole"


def student(runs: Path) -> list[str]:
    teacher = f"model.teacher={runs / 'teacher' / 'model'}"
    return [*DEBUG, teacher, DIT_TARGETS, "vsd.student_t=400", "evaluate.removal=4"]


def test_a_dit_teacher_learns_by_eps_prediction_under_linear_betas(dit: Path) -> None:
    losses = [row["loss"] for row in rows(dit.parent / "teacher")]
    assert losses[0] == pytest.approx(1.0, abs=0.05)  # its output starts at zero
    assert losses[-1] < 0.9 * losses[0]
    spec = snoopi.load(dit.parent / "teacher" / "model").spec
    assert (spec.schedule.betas, spec.schedule.prediction) == ("linear", "eps")
    assert type(spec.backbone).__name__ == "DiTConfig" and spec.one_step is None


def test_a_dit_student_is_measured_with_negatives(dit: Path) -> None:
    summary = json.loads((dit / "summary.json").read_text())
    assert all(summary[key] is not None for key in SUMMARY_KEYS if key != "gap_closed")
    pipeline = snoopi.load(dit / "model")
    assert pipeline.spec.one_step.t == 400
    plain = pixels(pipeline("a red circle"))
    assert pixels(pipeline("a red circle", negative="striped", scale=1.0)) != plain


@pytest.mark.slow
def test_a_stopped_dit_teacher_resumes_bit_for_bit(dit: Path) -> None:
    check_resume(dit.parent / "stopped-teacher", dit.parent / "teacher", [*DIT_TEACHER], ["loss"])


@pytest.mark.slow
def test_a_stopped_dit_student_resumes_bit_for_bit(dit: Path) -> None:
    check_resume(dit.parent / "stopped", dit, student(dit.parent), FIGURES)


def check_resume(out: Path, whole: Path, words: list[str], names: Sequence[str]) -> None:
    """Kill a run after some rows, resume it, and compare every figure with the whole run's."""
    words = [*words, QUIET, "run.save=2", "--out", str(out)]
    process = subprocess.Popen(train(*words), env=ENV, stderr=subprocess.PIPE, text=True)
    wait_for_rows(out, 3, process)
    process.kill()
    process.communicate(timeout=120)
    assert len(rows_so_far(out)) < len(rows(whole)), "the run ended before it was stopped"
    run(*words, "--resume")
    got, expected = ([[r[name] for name in names] for r in rows(f)] for f in (out, whole))
    assert got == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_losses_of_one_dit(dit: Path) -> None:
    for name, words, keys in (
        ("teacher", [*DIT_TEACHER], ["loss", "grad_norm"]),
        ("whole", student(dit.parent), FIGURES),
    ):
        out = dit.parent / f"two-{name}"
        run(*words, QUIET, "--out", str(out), ranks=2)
        got, expected = (
            torch.tensor([[row[key] for key in keys] for row in rows(folder)], dtype=torch.float64)
            for folder in (out, dit.parent / name)
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_checkpointing_changes_no_dit(dit: Path) -> None:
    out = dit.parent / "checkpointed"
    run(*student(dit.parent), QUIET, "parallel.checkpointing=true", "--out", str(out))
    got, expected = (torch.tensor(figures(f), dtype=torch.float64) for f in (out, dit))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
