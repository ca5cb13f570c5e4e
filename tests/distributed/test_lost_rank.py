"""A rank that dies: the others say so at once, and a restart finds nothing of the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from snoopi import parallel, runstate, train
from snoopi.errors import RankLost, of_the_network

pytestmark = pytest.mark.distributed
PATIENCE = 60  # seconds, where the default timeout of a collective would take 1800


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """What torchrun has: a store that outlives the ranks, and the variables that lead to it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    yield server


def start(work: Callable[..., None], *words: object) -> list[BaseProcess]:
    """Ranks 0 and 1 of one life, each a process that calls work(rank, ...)."""

    def child(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        work(rank, *words)

    # A fork: importing torch anew would take most of the time.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def ends(process: BaseProcess) -> int:
    """Its exit status; it must end without being killed."""
    process.join(PATIENCE)
    status = process.exitcode
    process.kill()
    assert status is not None, "hangs"
    return status


def dies_in_a_collective(rank: int, out: Path, dying: int) -> None:
    try:
        with parallel.session("cpu"):
            parallel.barrier()
            if rank == dying:
                os.kill(os.getpid(), signal.SIGKILL)
            parallel.mean({"loss": 1.0})
    except RankLost as lost:
        out.with_name(f"rank-{rank}").write_text(str(lost))


@pytest.mark.parametrize("dying", [0, 1])
def test_the_other_rank_says_what_happened(
    store: dist.TCPStore, tmp_path: Path, dying: int
) -> None:
    ranks = start(dies_in_a_collective, tmp_path / "out", dying)
    assert ends(ranks[dying]) == -signal.SIGKILL
    assert ends(ranks[1 - dying]) == 0
    said = (tmp_path / f"rank-{1 - dying}").read_text()
    assert said.startswith("another rank has ended or does not answer (")
    assert "peer" in said and "\n" not in said and "gloo" not in said


def dies_while_it_saves(rank: int, out: Path) -> None:
    try:
        with parallel.session("cpu"), runstate.Saver(background=True) as saver:
            if rank == 1:
                runstate._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            saver.save(out, 1, {"net": torch.nn.Linear(2, 2)})
            saver.wait()
    except RankLost as lost:
        out.with_name(f"rank-{rank}").write_text(str(lost))


def test_the_saving_thread_says_it_too(
    store: dist.TCPStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = start(dies_while_it_saves, tmp_path / "out")
    assert [ends(process) for process in ranks] == [0, -signal.SIGKILL]
    assert "another rank has ended" in (tmp_path / "rank-0").read_text()
    assert "Traceback" not in capfd.readouterr().err
    assert runstate.steps(tmp_path / "out") == []


def lives(rank: int, out: Path, life: int) -> None:
    if life and rank == 0:
        time.sleep(3)  # rank 1 looks for it while the store knows the dead one alone
    with parallel.session("cpu"), runstate.Saver(background=True) as saver:
        saver.save(out, life, {"rank": torch.tensor(float(rank))})
        saver.wait()
        if not life:
            parallel.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_restart_finds_nothing_of_the_dead(store: dist.TCPStore, tmp_path: Path) -> None:
    for life, status in enumerate([-signal.SIGKILL, 0]):
        assert [ends(process) for process in start(lives, tmp_path, life)] == [status] * 2
        assert runstate.steps(tmp_path)[-1] == life


def names(store: dist.Store, order: list[int]) -> list[str]:
    """The names that the ranks of a start find, which begin in this order."""
    found = [""] * len(order)

    def find(rank: int) -> None:
        patience = timedelta(seconds=PATIENCE)
        found[rank] = parallel._name_of_this_start(store, rank, len(order), patience)

    threads = [Thread(target=find, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # it has seen what the store held before the next one comes
    for thread in threads:
        thread.join()
    return found


def test_each_start_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    orders = [[0, 1, 2], [2, 1, 0], [0, 1, 2], [1, 0, 2], [1, 0], [0, 3, 2, 1]]
    starts = [names(store, order) for order in orders]
    assert all(found == found[:1] * len(found) for found in starts)
    assert len({found[0] for found in starts}) == len(orders)


def test_a_rank_that_never_starts_is_named() -> None:
    store, short = dist.HashStore(), timedelta(seconds=0.05)
    with pytest.raises(RankLost, match=r"rank 1, 2 of 3 did not start within 0.05 s"):
        parallel._name_of_this_start(store, 0, 3, short)
    with pytest.raises(RankLost, match=r"rank 0 of 3 did not start"):
        parallel._name_of_this_start(store, 2, 3, short)


def test_other_errors_are_not_taken_for_a_lost_rank() -> None:
    assert of_the_network(dist.DistNetworkError("x")) and of_the_network(dist.DistStoreError("x"))
    assert not of_the_network(dist.DistBackendError("NCCL error: unhandled cuda error"))
    assert not of_the_network(RuntimeError("ProcessGroupGloo does not support float8"))
    assert not of_the_network(ValueError("[gloo/transport/tcp/pair.cc:1] x"))
    with pytest.raises(RuntimeError, match="a bug"), parallel.session("cpu"):
        raise RuntimeError("a bug")


def test_the_command_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(options: object) -> None:
        raise RankLost("another rank has ended")

    monkeypatch.setattr(train, "_command", lose)
    monkeypatch.setenv("RANK", "3")
    assert train.main(["debug"]) == 1
    line = "snoopi.train: rank 3: another rank has ended; the same command with --resume goes on\n"
    assert capsys.readouterr().err == line
