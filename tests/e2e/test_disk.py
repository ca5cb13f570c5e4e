"""Full disks, read-only folders, two runs in one folder: one line, and nothing half-written.

A full disk is a limit on the size of a file (RLIMIT_FSIZE), which the kernel enforces for every
writer and which needs no right; where this machine lets us mount one, a small disk, too.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import (
    FAST,
    Command,
    Warm,
    assert_ends_in_one_line,
    assert_nothing_half,
    assert_one_line,
    model_bytes,
    row_count,
    rows,
)

from snoopi import runstate

pytestmark = pytest.mark.e2e


@pytest.fixture
def out(reference: Path, tmp_path: Path) -> Path:
    """A run's folder to be, with a teacher beside it."""
    os.symlink(reference.parent / "debug_teacher", tmp_path / "debug_teacher")
    return tmp_path / "out"


def fill_disk(command: Command, largest: int) -> None:
    """From now on no file of the running command grows beyond `largest` bytes."""
    hard = resource.prlimit(command.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (largest, hard))


def files(out: Path) -> dict[str, bytes]:
    """A run's files but its lock."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    found.pop(".lock", None)
    return found


def resumed_equals(warm: Warm, out: Path, reference: Path) -> None:
    """With room again the run goes on as if nothing had been."""
    warm.run("train", *FAST, "evaluate.prompts=0", "--out", str(out), "--resume")
    assert rows(out) == rows(reference)
    assert_nothing_half(out)
    weights = "backbone.safetensors"
    assert model_bytes(out)[weights] == model_bytes(reference)[weights]


def test_a_disk_that_is_full_from_the_start(warm: Warm, out: Path) -> None:
    words = [*FAST, "--out", str(out)]
    done = warm.run("train", *words, status=2, largest_file=2000)
    assert_ends_in_one_line(done, "config.toml", "File too large")
    assert set(files(out)) == set()
    assert_nothing_half(out)


def test_a_disk_that_fills_while_figures_are_logged(warm: Warm, out: Path, reference: Path) -> None:
    command = warm.start("train", *FAST, "run.save=6", "--out", str(out))
    command.until(lambda: row_count(out) >= 2)
    fill_disk(command, (out / "metrics.jsonl").stat().st_size + 20)  # the next row is torn
    assert command.wait() == 2
    assert_ends_in_one_line(command, "metrics.jsonl", "File too large")
    assert_nothing_half(out)
    resumed_equals(warm, out, reference)


def test_a_disk_that_fills_while_a_state_is_written(warm: Warm, out: Path, reference: Path) -> None:
    command = warm.start("train", *FAST, "--out", str(out))
    command.until(lambda: runstate.steps(out) == [2])
    fill_disk(command, 500_000)
    before = files(out / "state" / "step-00000002")
    assert command.wait() == 2
    parts = ("run state of step 4", "File too large", "MB free", "earlier states are untouched")
    assert_ends_in_one_line(command, *parts)
    assert runstate.steps(out) == [2] and files(out / "state" / "step-00000002") == before
    assert_nothing_half(out)
    resumed_equals(warm, out, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of a few megabytes, or None where nothing may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    yield disk if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_small_disk(warm: Warm, reference: Path, small_disk: Path | None, tmp_path: Path) -> None:
    """The real error, ENOSPC; without the right to mount, the limit stands in for it."""
    room = small_disk or tmp_path / "limited"
    room.mkdir(exist_ok=True)
    os.symlink(reference.parent / "debug_teacher", room / "debug_teacher")
    out = room / "out"
    command = warm.start("train", *FAST, "--out", str(out))
    command.until(lambda: runstate.steps(out) == [2])
    if small_disk is None:
        fill_disk(command, 500_000)
    assert command.wait() == 2
    cause = "File too large" if small_disk is None else "No space left on device"
    assert_ends_in_one_line(command, "run state of step 4", cause)
    assert runstate.steps(out) == [2]
    assert_nothing_half(out)
    if small_disk:
        grow = ["mount", "-o", "remount,size=64m", str(small_disk)]
        subprocess.run(grow, check=True)
    resumed_equals(warm, out, reference)


@pytest.mark.parametrize(("largest", "name"), [(2000, "config.toml"), (100_000, "model")])
def test_a_disk_that_is_full_when_a_finished_run_finishes_again(
    warm: Warm, out: Path, reference: Path, largest: int, name: str
) -> None:
    """The model and the report that were there survive whole."""
    shutil.copytree(reference, out)
    before = files(out)
    words = [*FAST, "--out", str(out), "--resume"]
    done = warm.run("train", *words, status=2, largest_file=largest)
    assert_ends_in_one_line(done, name, "File too large")
    assert files(out) == before
    assert_nothing_half(out)


def test_a_disk_that_fills_before_the_report(warm: Warm, out: Path, reference: Path) -> None:
    shutil.copytree(reference, out)
    before, model = files(out), (out / "model").stat().st_ino
    command = warm.start("train", *FAST, "--out", str(out), "--resume")
    command.until(lambda: (out / "model").exists() and (out / "model").stat().st_ino != model)
    fill_disk(command, 10_000)
    assert command.wait() == 2
    assert_ends_in_one_line(command, str(out), "File too large")
    after = files(out)
    assert {name for name in before if after[name] != before[name]} <= {"model/snoopi.json"}
    assert_nothing_half(out)


def test_a_disk_that_is_full_for_a_picture(warm: Warm, reference: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    words = [str(reference / "model"), "a red circle", "--out", str(picture)]
    done = warm.run("generate", *words, status=2, largest_file=1000)
    assert_one_line(done.stderr, "snoopi.generate: ", str(picture), "File too large")
    assert list(tmp_path.iterdir()) == []
    warm.run("generate", *words)
    before = picture.read_bytes()
    warm.run("generate", *words, "--seed", "1", status=2, largest_file=1000)
    assert picture.read_bytes() == before and list(tmp_path.iterdir()) == [picture]


# --- folders that take nothing --------------------------------------------------------------------


def test_a_read_only_folder(warm: Warm, reference: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    os.mkdir(closed, 0o555)
    teacher = reference.parent / "debug_teacher" / "model"
    words = [*FAST, f"model.teacher={teacher}", "--out", str(closed / "out")]
    done = warm.run("train", *words, status=2, no_rights=True)
    assert_one_line(done.stderr, str(closed), "cannot be written to")
    words = [str(reference / "model"), "a red circle", "--out", str(closed / "x.png")]
    done = warm.run("generate", *words, status=2, no_rights=True)
    assert_one_line(done.stderr, str(closed / "x.png"), "Permission denied")
    assert list(closed.iterdir()) == []


def test_a_run_in_a_folder_that_became_read_only(warm: Warm, out: Path, reference: Path) -> None:
    shutil.copytree(reference, out)
    before = files(out)
    out.chmod(0o555)
    words = [*FAST, "--out", str(out), "--resume"]
    done = warm.run("train", *words, status=2, no_rights=True)
    assert_one_line(done.stderr, str(out), "cannot be written to")
    out.chmod(0o755)
    assert files(out) == before


@pytest.mark.parametrize("where", ["/proc/snoopi/out", "/sys/snoopi"])
def test_a_file_system_that_makes_no_folders(warm: Warm, reference: Path, where: str) -> None:
    """These refuse root, too."""
    teacher = reference.parent / "debug_teacher" / "model"
    words = [*FAST, f"model.teacher={teacher}", "--out", where]
    assert_one_line(warm.run("train", *words, status=2).stderr, "cannot use", where)
    words = [str(reference / "model"), "a red circle", "--out", f"{where}/x.png"]
    assert_one_line(warm.run("generate", *words, status=2).stderr, f"{where}/x.png")


def test_a_file_in_the_way(warm: Warm, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for where in (file, file / "out"):
        done = warm.run("train", *FAST, "--out", str(where), status=2)
        assert_one_line(done.stderr, f"cannot use {where}", f"{file} is not a folder")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_two_runs_into_one_folder(warm: Warm, out: Path, reference: Path) -> None:
    first = warm.start("train", *FAST, "--out", str(out))
    first.until(lambda: row_count(out) >= 1)
    second = warm.run("train", *FAST, "--out", str(out), "--resume", status=2)
    assert_one_line(second.stderr, str(out), f"in use by another run (process {first.pid})")
    third = warm.run("train", *FAST, "run.seed=1", "--out", str(out), status=2)
    assert_one_line(third.stderr, str(out))
    assert first.poll() is None, "the first run was over too soon"
    assert first.wait() == 0 and rows(out) == rows(reference)
    assert_nothing_half(out)


def test_two_runs_that_need_one_teacher(warm: Warm, tmp_path: Path) -> None:
    teacher = tmp_path / "debug_teacher"
    first = warm.start("train", *FAST, "--out", str(tmp_path / "first"))
    first.until(lambda: row_count(teacher) >= 1)
    second = warm.run("train", *FAST, "--out", str(tmp_path / "second"), status=2)
    assert_ends_in_one_line(second, str(teacher), f"in use by another run (process {first.pid})")
    assert not (tmp_path / "second").exists()
    first.send(9)
    first.wait()
