"""Ctrl-C, SIGTERM and kill -9 at any moment: one line or none, and --resume goes on bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import (
    ENV,
    FAST,
    Command,
    Warm,
    assert_ends_in_one_line,
    assert_nothing_half,
    model_bytes,
    row_count,
    rows,
)

from snoopi import runstate

pytestmark = pytest.mark.e2e

QUIET = "evaluate.prompts=0"
KILLS = int(os.environ.get("SNOOPI_KILLS", "8"))


@pytest.fixture
def out(reference: Path, tmp_path: Path) -> Path:
    """A run's folder to be, with a teacher beside it."""
    os.symlink(reference.parent / "debug_teacher", tmp_path / "debug_teacher")
    return tmp_path / "out"


def writing_state(out: Path, step: int) -> bool:
    """Whether the state of a step is being written, some of it already there."""
    partial = out / "state" / f".partial-step-{step:08d}"
    return partial.is_dir() and any(path.stat().st_size for path in partial.iterdir())


def saved(out: Path) -> dict[int, dict[str, tuple[int, str]]]:
    """Sizes and hashes of all files of a run's states, by step; not of DCP's index of them, which
    names each save anew."""
    states = out / "state"
    steps = {step: runstate.manifest(states / f"step-{step:08d}") for step in runstate.steps(out)}
    return {
        step: {name: entry for name, entry in found.files.items() if name != ".metadata"}
        for step, found in steps.items()
    }


def assert_same_run(out: Path, straight: Path) -> None:
    """Rows, states and model of two finished runs are the same, bit for bit; nothing is left."""
    assert rows(out) == rows(straight)
    assert saved(out) == saved(straight)
    weights = [model_bytes(each) for each in (out, straight)]
    for files in weights:
        del files["snoopi.json"]  # names the run's folder
    assert weights[0] == weights[1]
    assert_nothing_half(out)


def resumed(warm: Warm, out: Path, reference: Path, *words: str) -> Command:
    """Resume; the figures must be those of the run that nobody stopped."""
    done = warm.run("train", *FAST, *words, "--out", str(out), "--resume")
    assert rows(out) == rows(reference)
    assert_nothing_half(out)
    return done


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    warm: Warm, out: Path, reference: Path, how: signal.Signals
) -> None:
    command = warm.start("train", *FAST, "run.save=6", "--out", str(out))
    command.until(lambda: row_count(out) >= 2)
    command.send(how)
    assert command.wait() == 128 + how
    (step,) = runstate.steps(out)
    assert 2 <= step < 6
    assert_ends_in_one_line(command, f"stopped after step {step} of 6", f"--resume --out {out}")
    assert f"{how.name}: stopping after this step; Ctrl-C again stops at once" in command.stderr
    assert_nothing_half(out)
    resumed(warm, out, reference, QUIET)


def test_a_second_ctrl_c_stops_at_once(warm: Warm, out: Path, reference: Path) -> None:
    """Here while a state is written: that state is not there, the one before it is."""
    command = warm.start("train", *FAST, "--out", str(out))
    command.until(lambda: runstate.steps(out) == [2] and writing_state(out, 4))
    command.send(signal.SIGINT)
    command.until(lambda: "SIGINT: stopping after this step" in command.stderr)
    command.send(signal.SIGINT)
    assert command.wait() == 130
    assert runstate.steps(out) == [2], "the state was whole before the second Ctrl-C came"
    assert_ends_in_one_line(command, "SIGINT: stopped at once", "--resume")
    assert_nothing_half(out)
    resumed(warm, out, reference, QUIET)


def test_a_signal_while_the_teacher_is_trained(warm: Warm, tmp_path: Path) -> None:
    """The teacher's state is saved, and the same command goes on with it."""
    out, teacher = tmp_path / "out", tmp_path / "debug_teacher"
    command = warm.start("train", *FAST, "--out", str(out))
    command.until(lambda: row_count(teacher) >= 2)
    command.send(signal.SIGTERM)
    assert command.wait() == 143
    assert_ends_in_one_line(command, "of 20", f"--resume --out {teacher}")
    assert runstate.steps(teacher) and not out.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step(warm: Warm, out: Path, how: signal.Signals) -> None:
    """While it reads what it starts from: there is neither a folder yet nor a loop's handler."""
    prompts = out.with_name("prompts.txt")
    os.mkfifo(prompts)  # holds the run where it reads it
    command = warm.start("train", *FAST, f"data.prompts={prompts}", "--out", str(out))
    with prompts.open("wb"):  # opens once the command reads it
        command.send(how)
        assert command.wait() == 128 + how
    assert_ends_in_one_line(command, f"{how.name}: stopped at once", "--resume")
    assert not out.exists()


def test_a_signal_while_torch_is_imported(tmp_path: Path) -> None:
    """The real command, in its first seconds."""
    words = [sys.executable, "-m", "snoopi.train", *FAST, "--out", str(tmp_path / "out")]
    with subprocess.Popen(words, env=ENV, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as run:
        maps = Path(f"/proc/{run.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        errors = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert errors == "snoopi.train: SIGINT: stopped before it began\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_during_the_final_evaluation(
    warm: Warm, out: Path, reference: Path, how: signal.Signals
) -> None:
    command = warm.start("train", *FAST, "--out", str(out))
    command.until(lambda: (out / "model").is_dir())
    command.send(how)
    assert command.wait() == 128 + how
    assert_ends_in_one_line(command, f"{how.name}: stopped at once", "--resume")
    assert not (out / "summary.json").exists()
    assert_nothing_half(out)
    before = model_bytes(out)
    resumed(warm, out, reference)
    assert (out / "report.html").is_file() and (out / "summary.json").is_file()
    assert model_bytes(out) == before


def test_a_signal_while_the_last_state_is_written(warm: Warm, out: Path, reference: Path) -> None:
    """Asked to stop, it does not begin the final evaluation."""
    command = warm.start("train", *FAST, "--out", str(out))
    command.until(lambda: writing_state(out, 6))
    command.send(signal.SIGTERM)
    assert command.wait() == 143
    assert_ends_in_one_line(command, "stopped after step 6 of 6", "finishes with the report")
    assert runstate.steps(out)[-1] == 6 and not (out / "model").exists()
    resumed(warm, out, reference)
    assert (out / "report.html").is_file()


def test_a_finished_run_finishes_again(warm: Warm, out: Path, reference: Path) -> None:
    shutil.copytree(reference, out)
    resumed(warm, out, reference)
    weights = {n: c for n, c in model_bytes(out).items() if n != "snoopi.json"}
    assert weights == {n: c for n, c in model_bytes(reference).items() if n != "snoopi.json"}
    before = model_bytes(out)
    resumed(warm, out, reference)
    assert model_bytes(out) == before


@pytest.mark.distributed
def test_torchrun_passes_signals_and_lines_on(out: Path, reference: Path, warm: Warm) -> None:
    """What a user types: the line of ours stands in torchrun's own report, the state is saved."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
    words = [*launcher, "-m", "snoopi.train", *FAST, "run.save=6", "--out", str(out)]
    with subprocess.Popen(words, env=ENV, stderr=subprocess.PIPE, text=True) as run:
        while row_count(out) < 1:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        errors = run.communicate(timeout=60)[1]
    assert run.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("snoopi.train: ")]
    assert len(lines) == 1 and "stopped after step" in lines[0] and "--resume" in lines[0]
    assert len(runstate.steps(out)) == 1
    refused = subprocess.run(
        [*launcher, "-m", "snoopi.train", *FAST, "--out", str(out)],
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0 and refused.stderr.count("snoopi.train: ") == 1
    assert re.search(r"exitcode *: 2\b", refused.stderr)  # torchrun's own status is 1
    resumed(warm, out, reference, QUIET)


# --- kill -9 of a rank ----------------------------------------------------------------------------

RANK_KILLS = int(os.environ.get("SNOOPI_RANK_KILLS", "3"))
TWO_RANKS = (*FAST, QUIET, "run.steps=10", "run.keep=3", "run.milestones=5")


LIFE = 120  # seconds that no life of two ranks takes: who waits longer, hangs


@contextlib.contextmanager
def torchrun(out: Path, *words: str, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Two ranks, under a launcher that starts both anew when one dies; ended on exit."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", f"--max-restarts={restarts}", "-m", "snoopi.train"]
    with out.with_suffix(".err").open("w") as stream:
        launched = subprocess.Popen(
            [*launcher, *TWO_RANKS, *words, "--out", str(out), "--resume"],
            env=ENV,
            stdout=stream,
            stderr=stream,
            text=True,
        )
    try:
        yield launched
    finally:
        launched.terminate()
        launched.wait(timeout=LIFE)


def finished(launched: subprocess.Popen[str], out: Path) -> None:
    """Wait for the end of a run, which must be a good one, and told without a traceback."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launched.wait(LIFE)
    told = out.with_suffix(".err").read_text()
    assert launched.poll() == 0 and "Traceback" not in told, told


def ranks_of(launcher: int) -> dict[int, int]:
    """{rank: process id} of the ranks that a torchrun has now."""
    found = {}
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        for child in children:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
            if rank is not None:
                found[rank] = int(child)
    except OSError:  # one of them has just ended
        return {}
    return found


def lives(launched: subprocess.Popen[str]) -> Iterator[dict[int, int]]:
    """The ranks of each life that a torchrun gives them, until it ends or no new life comes."""
    known: set[int] = set()
    end = time.monotonic() + LIFE
    while launched.poll() is None and time.monotonic() < end:
        ranks = ranks_of(launched.pid)
        if len(ranks) == 2 and not known & set(ranks.values()):
            known |= set(ranks.values())
            yield ranks
            end = time.monotonic() + LIFE
        time.sleep(0.005)


def moment_of_two(rng: random.Random, out: Path, life: float) -> tuple[str, Callable[[], bool]]:
    """When to kill a rank in the life that begins now: at any time of it (half of it is torch's
    import and the ranks' finding one another), after some rows, while a state or a model is written
    by this life and not by the one before. A life may end before its moment comes."""
    born, rows_before = time.time(), row_count(out)
    kind = rng.choice(["time", "time", "row", "row", "state", "model"])
    seconds, rows_later = rng.uniform(0, life), rows_before + rng.randint(1, 3)

    def now() -> bool:
        if kind == "time":
            return time.time() > born + seconds
        if kind == "row":
            return row_count(out) >= rows_later
        pattern = "state/.partial-*/*" if kind == "state" else ".model.*/*"
        with contextlib.suppress(OSError):  # it may get its final name meanwhile
            return any(path.stat().st_mtime > born for path in out.glob(pattern))
        return False

    return f"{kind} {seconds:.1f} s" if kind == "time" else kind, now


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("words", [(), ("run.async_save=true",)], ids=["at-once", "background"])
def test_kill_9_of_any_rank_and_torchruns_restart(
    out: Path, reference: Path, words: tuple[str, ...]
) -> None:
    """`SNOOPI_RANK_KILLS=20 pytest -m slow -k any_rank` kills 20 times; SNOOPI_KILL_SEED repeats.

    At a random moment of a life a random rank dies; torchrun starts both anew, and the run ends as
    one that nobody killed. Each death costs one of torchrun's restarts, none is to spare.
    """
    seed = int(os.environ.get("SNOOPI_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed of the moments (SNOOPI_KILL_SEED): {seed}", flush=True)
    rng = random.Random(seed)
    straight, started = out.with_name("straight"), time.time()
    with torchrun(straight) as launched:
        finished(launched, straight)
    assert runstate.steps(straight) == [5, 6, 8, 10]
    life = time.time() - started
    kills = runs = 0
    while kills < RANK_KILLS:
        out = out.with_name(f"killed-{runs}")
        with torchrun(out, *words, restarts=RANK_KILLS - kills) as launched:
            for ranks in lives(launched):
                kind, now = moment_of_two(rng, out, life)
                end = time.monotonic() + LIFE
                while ranks_of(launched.pid) == ranks and not now():
                    assert time.monotonic() < end, out.with_suffix(".err").read_text()
                    time.sleep(0.005)
                if ranks_of(launched.pid) == ranks:
                    rank = rng.randrange(2)
                    os.kill(ranks[rank], signal.SIGKILL)
                    kills += 1
                    print(f"{kills}: rank {rank}, {kind}, row {row_count(out)}", flush=True)
                if kills == RANK_KILLS:
                    break
            finished(launched, out)
        assert_same_run(out, straight)
        runs += 1
    print(f"{runs} runs finished", flush=True)


# --- kill -9 --------------------------------------------------------------------------------------


def moment(rng: random.Random, out: Path, life: float) -> Callable[[], bool]:
    """When to kill: at any time of a life, or at the next sight of a thing that takes little of it.

    Times are drawn over the whole life, from the first instruction to the report.
    """
    kind = rng.choice(["time", "time", "state", "published", "model"])
    if kind == "time":
        end = time.monotonic() + rng.uniform(0, life)
        return lambda: time.monotonic() >= end
    if kind == "state":
        return lambda: any(writing_state(out, step) for step in range(2, 7, 2))
    if kind == "published":
        before = runstate.steps(out)
        return lambda: runstate.steps(out) != before
    return lambda: any(out.glob(".model.*"))


@pytest.mark.slow
def test_kill_9_at_random_moments(warm: Warm, out: Path, reference: Path) -> None:
    """KILLS kills in one folder after another; each finished folder must equal a whole run's.

    `SNOOPI_KILLS=20 pytest -k random_moments` kills 20 times, and asks that they were spread.
    """
    seed = int(os.environ.get("SNOOPI_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed of the moments (SNOOPI_KILL_SEED): {seed}")
    rng = random.Random(seed)
    started = time.monotonic()
    straight = out
    warm.run("train", *FAST, QUIET, "--out", str(straight))
    life = time.monotonic() - started
    assert rows(straight) == rows(reference)
    kills = finished = 0
    steps_at_death = []
    while kills < KILLS:
        out = out.with_name(f"killed-{finished}")
        command = warm.start("train", *FAST, QUIET, "--out", str(out), "--resume")
        now = moment(rng, out, life)
        command.until(lambda c=command, n=now: n() or c.poll() is not None)
        if command.poll() is None:
            command.send(signal.SIGKILL)
        if command.wait() == -signal.SIGKILL:  # else it had ended before the signal came
            kills += 1
            steps_at_death.append(row_count(out))
        else:
            assert command.status == 0, command.stderr
            assert_same_run(out, straight)
            finished += 1
        assert "warning" not in command.stderr, f"a state was damaged: {command.stderr}"
    print(f"steps when killed: {steps_at_death}, {finished} runs finished")
    if out.exists():
        resumed(warm, out, reference, QUIET)
        assert_same_run(out, straight)
    few = KILLS < 20  # may all fall on few steps
    assert few or len(set(steps_at_death)) > 2, "the moments were not spread over the run"
