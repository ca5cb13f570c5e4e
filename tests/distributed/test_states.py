"""Run states of two ranks, resumed on one and on three; saved in the background beside training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from snoopi import config, runlog, runstate, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FAST = (
    *("run.steps=6", "run.batch=6", "run.save=2", "run.keep=9", "evaluate.prompts=0"),
    'lora.targets=["to_q"]',
)
OF_PREDICTIONS = ("loss_lora", "denoise_lora", "denoise_frozen", "x0_std", "kappa_mean")
SAVED = 2  # the step from which other numbers of ranks go on


def run(rank: int, folder: Path, name: str, world: int, words: tuple[str, ...]) -> None:
    """One rank of `torchrun --nproc-per-node WORLD -m snoopi.train debug ... --resume`."""
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}/rendezvous-{name}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    recipe = config.load("debug", [*FAST, *words])
    train.run(recipe, folder / name, torch.device("cpu"), resume=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs the debug recipe on some ranks to its end; gives the run's folder."""
    folder = tmp_path_factory.mktemp("states")

    def go(name: str, world: int, *words: str) -> Path:
        if world == 1:
            run(0, folder, name, 1, words)
        else:
            mp.spawn(run, (folder, name, world, words), nprocs=world)
        return folder / name

    go("whole-1", 1)  # trains the teacher, too, whose batch three ranks cannot share
    return go


@pytest.fixture(scope="module")
def of_two(go: Callable[..., Path]) -> Path:
    return go("whole-2", 2)


def figures(out: Path) -> list[dict[str, Any]]:
    rows = runlog.read(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


@pytest.mark.parametrize("world", [1, 3])
def test_saved_on_two_ranks_resumed_on_others(
    go: Callable[..., Path], of_two: Path, world: int
) -> None:
    """The rest of the run is the rest of a run that always had that number of ranks."""
    expected = figures(of_two.with_name("whole-1") if world == 1 else go("whole-3", 3))
    out = of_two.with_name(f"resumed-{world}")
    shutil.copytree(of_two, out, ignore=shutil.ignore_patterns("model", ".lock"))
    for step in runstate.steps(out):
        if step > SAVED:
            shutil.rmtree(out / "state" / f"step-{step:08d}")
    go(f"resumed-{world}", world)
    found = figures(out)
    assert found[:SAVED] == figures(of_two)[:SAVED]
    assert [row["step"] for row in found] == list(range(1, 7))
    for row, other in zip(found, expected, strict=True):
        # Not rounding: only pictures of one rank are compared with one another.
        assert row.pop("diversity") > 0 < other.pop("diversity")
        for name, value in other.items():
            # The gap, 1e-4, is a difference of predictions of size 1, rounded at 6e-8 each; what
            # the student does follows from it.
            rel = 1e-5 if name in OF_PREDICTIONS else 2e-3
            assert row[name] == pytest.approx(value, rel=rel, abs=1e-9), (row["step"], name)
        assert row.keys() == other.keys()
    last = out / "state" / "step-00000006"
    assert runstate.manifest(last).world == world


def test_two_ranks_save_in_the_background(go: Callable[..., Path], of_two: Path) -> None:
    """Collectives of the saving thread and of the run do not mix: rows and states are the same."""
    out = go("background-2", 2, "run.async_save=true", "run.milestones=3")
    assert figures(out) == figures(of_two)
    assert runstate.steps(out) == [2, 3, 4, 6]
    for step in (2, 4, 6):
        states = (each / "state" / f"step-{step:08d}" for each in (out, of_two))
        mine, theirs = (runstate.manifest(path) for path in states)
        assert {n: f for n, f in mine.files.items() if n.endswith(".distcp")} == {
            n: f for n, f in theirs.files.items() if n.endswith(".distcp")
        }
        assert mine.milestone == (step == 6)
