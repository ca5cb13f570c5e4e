"""Run states in one process: bit-equal resume, and nothing damaged or foreign is read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snoopi import errors, parallel, runstate
from snoopi.runstate import OptimizerState, RunStateError


class Run:
    """A toy run: a network with a frozen part, its optimizer, an average, a plain value."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        self.net[0].requires_grad_(False)
        free = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(free, 1e-2, weight_decay=0.1)
        self.average = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.extra: dict[str, Any] = {"best": 0.5, "names": ["a", "b"]}

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net,
            "optimizer": OptimizerState(self.optimizer, self.net.named_parameters()),
            "average": self.average,
            "extra": self.extra,
        }

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            self.net(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, value in self.net.state_dict().items():
                self.average[name].lerp_(value, 0.1)

    def tensors(self) -> list[Tensor]:
        moments = OptimizerState(self.optimizer, self.net.named_parameters()).state_dict()
        flat = [value for moment in moments.values() for value in moment.values()]
        return [*self.net.state_dict().values(), *self.average.values(), *flat]


def saved_steps(folder: Path, *steps: int, keep: int = 9) -> Run:
    run, done = Run(), 0
    for step in steps:
        run.train(range(done, step))
        runstate.save(folder, step, run.state(), keep=keep)
        done = step
    return run


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    straight = Run()
    straight.train(range(6))
    saved_steps(tmp_path, 3)
    resumed = Run(seed=1)
    resumed.extra.update(best=0.0, names=[])
    assert runstate.load_latest(tmp_path, resumed.state()) == 3
    assert resumed.extra == {"best": 0.5, "names": ["a", "b"]}
    resumed.train(range(3, 6))
    assert all(map(torch.equal, straight.tensors(), resumed.tensors()))
    assert {t.item() for t in resumed.tensors() if t.ndim == 0} == {6.0}


def test_a_state_before_the_first_step_can_be_resumed(tmp_path: Path) -> None:
    fresh, resumed = Run(), Run(seed=1)
    runstate.save(tmp_path, 0, fresh.state())
    assert runstate.load_latest(tmp_path, resumed.state()) == 0
    for run in (fresh, resumed):
        run.train(range(2))
    assert all(map(torch.equal, fresh.tensors(), resumed.tensors()))


def test_adapters_alone(tmp_path: Path) -> None:
    run, other = Run(), Run(seed=1)
    runstate.save(tmp_path, 1, {"adapters": runstate.trainable(run.net)})
    runstate.load_latest(tmp_path, {"adapters": runstate.trainable(other.net)})
    assert torch.equal(run.net[2].weight, other.net[2].weight)
    assert not torch.equal(run.net[0].weight, other.net[0].weight)


def test_the_newest_are_kept_and_an_abandoned_future_is_not(tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert runstate.steps(tmp_path) == [3, 4]
    path = runstate.save(tmp_path, 3, run.state(), keep=2, config="abc")
    assert runstate.steps(tmp_path) == [3]
    found = runstate.manifest(path)
    assert (found.step, found.config, found.world) == (3, "abc", 1)
    assert sorted(item.name for item in (tmp_path / "state").iterdir()) == [path.name]


def test_milestones_are_kept_for_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    for step in range(1, 8):
        run.train(range(step - 1, step))
        runstate.save(tmp_path, step, run.state(), keep=2, milestone=step in (2, 4))
    assert runstate.steps(tmp_path) == [2, 4, 6, 7]
    states = tmp_path / "state"
    assert [runstate.manifest(p).milestone for p in sorted(states.iterdir())] == [1, 1, 0, 0]
    for step in (6, 7):  # the newest whole one is a milestone
        truncate(states / f"step-0000000{step}")
    assert runstate.load_latest(tmp_path, Run(seed=1).state()) == 4
    assert capsys.readouterr().err.count("warning: ") == 2
    (states / "step-00000002" / "manifest.json").write_text("{}")  # one that is no state any more
    runstate.save(tmp_path, 5, run.state(), keep=1)
    assert runstate.steps(tmp_path) == [4, 5]
    runstate.save(tmp_path, 3, run.state(), keep=1)
    assert runstate.steps(tmp_path) == [3], "a milestone of a future that was left is kept"


def test_small_files_beside_the_tensors(tmp_path: Path) -> None:
    path = runstate.save(tmp_path, 1, Run().state(), files={"notes": b"abc"})
    assert runstate.attached(tmp_path, 1) == {"notes": b"abc"}
    assert runstate.load_latest(tmp_path, Run(seed=1).state()) == 1
    (path / "notes").write_bytes(b"abd")
    with pytest.raises(RunStateError, match="notes does not have the SHA-256"):
        runstate.load_latest(tmp_path, Run(seed=1).state())
    runstate.save(tmp_path, 2, Run().state())
    assert runstate.attached(tmp_path, 2) == {}


class Held:
    """Holds background saves back where they would write, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()
        write = runstate._write

        def held(*arguments: Any) -> None:
            self.reached.set()
            assert self.let_go.wait(30)
            write(*arguments)

        monkeypatch.setattr(runstate, "_write", held)


def test_a_background_save_is_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved_steps(tmp_path, 3)
    expected = [tensor.clone() for tensor in run.tensors()]
    files = runstate.manifest(tmp_path / "state" / "step-00000003").files
    held = Held(monkeypatch)
    with runstate.Saver(background=True) as saver:
        saver.save(tmp_path, 3, run.state(), config="abc", keep=9)
        assert held.reached.wait(30)
        saver.check()  # nothing to say yet
        run.train(range(3, 6))
        held.let_go.set()
        saver.save(tmp_path, 6, run.state(), keep=9)  # waits for the one before it
        assert runstate.steps(tmp_path)[0] == 3
    assert runstate.steps(tmp_path) == [3, 6]
    assert runstate.noted_config(tmp_path, 3) == "abc"
    # To the byte what a save at once has written.
    again = runstate.manifest(tmp_path / "state" / "step-00000003").files
    assert again["__0_0.distcp"] == files["__0_0.distcp"]
    shutil.rmtree(tmp_path / "state" / "step-00000006")
    resumed = Run(seed=1)
    assert runstate.load_latest(tmp_path, resumed.state()) == 3
    assert all(map(torch.equal, resumed.tensors(), expected))


@pytest.mark.parametrize("where", ["check", "save", "exit"])
def test_a_failed_background_save_is_raised_by_what_comes_next(where: str, tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = runstate.Saver(background=True)
    message = r"cannot save the run state of step 2 .*File too"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        with pytest.raises(RunStateError, match=message), saver:
            saver.save(tmp_path, 2, run.state())
            while where == "check":
                saver.check()
                time.sleep(0.01)
            if where == "save":
                saver.save(tmp_path, 3, run.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [item.name for item in (tmp_path / "state").iterdir()] == ["step-00000001"]
    saver.save(tmp_path, 2, run.state())  # said once
    saver.wait()
    assert runstate.steps(tmp_path) == [1, 2]


def test_a_ctrl_c_beside_a_background_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It interrupts the main thread at once, and the state is whole when the thread ends."""
    run, held = saved_steps(tmp_path, 1), Held(monkeypatch)
    saver = runstate.Saver(background=True)
    with pytest.raises(errors.Interrupted), errors.interruptible(), saver:
        saver.save(tmp_path, 2, run.state())
        assert held.reached.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert runstate.steps(tmp_path) == [1]
    held.let_go.set()
    saver.wait()
    assert runstate.load_latest(tmp_path, Run(seed=1).state()) == 2


def test_another_error_waits_for_a_background_save(tmp_path: Path) -> None:
    """The run stops on what is not finite: the state of an earlier step is still written."""
    with pytest.raises(ValueError, match="not finite"), runstate.Saver(background=True) as saver:
        saver.save(tmp_path, 2, Run().state())
        raise ValueError("not finite")
    assert runstate.steps(tmp_path) == [2]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # a full disk, as far as we can see
    try:
        with pytest.raises(RunStateError, match=r"cannot save the run state of step 2 .*File too"):
            runstate.save(tmp_path, 2, run.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [item.name for item in (tmp_path / "state").iterdir()] == ["step-00000001"]
    assert runstate.load_latest(tmp_path, Run(seed=1).state()) == 1


def test_a_bug_in_a_save_shows_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(runstate, "_write", broken)
    with pytest.raises(RunStateError, match="TypeError: ours"):
        runstate.save(tmp_path, 1, Run().state())
    assert "Traceback" in capsys.readouterr().err


def test_a_ctrl_c_in_a_save_is_a_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP wraps it like an error."""
    run = saved_steps(tmp_path, 1)

    class Interrupting(runstate.FileSystemWriter):
        def write_data(self, *_: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(runstate, "FileSystemWriter", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        runstate.save(tmp_path, 2, run.state())
    assert [item.name for item in (tmp_path / "state").iterdir()] == ["step-00000001"]


def test_a_ctrl_c_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """In the middle of a tensor, torch's writer would make an error of one in seven, or abort."""
    state = {f"{n}": torch.zeros(64, 64) for n in range(60)}
    started = time.monotonic()
    runstate.save(tmp_path, 1, {"tensors": state})
    life = time.monotonic() - started
    stopped = 0
    for moment in range(1, 41):
        # The signal itself: a timer's would not be one of those that a save holds back.
        timer = threading.Timer(life * moment / 40, os.kill, (os.getpid(), signal.SIGINT))
        with contextlib.suppress(errors.Interrupted), errors.interruptible():
            timer.start()
            try:
                runstate.save(tmp_path, 2, {"tensors": state})
                timer.join()
                time.sleep(0.01)  # it may come after the save, but must not after the test
            finally:
                timer.join()
        stopped += 2 not in runstate.steps(tmp_path)
        assert runstate.steps(tmp_path)[0] == 1
        shutil.rmtree(tmp_path / "state" / "step-00000002", ignore_errors=True)
    assert stopped > 10


def test_what_is_not_finite_is_named() -> None:
    run = Run()
    run.train(range(1))
    assert runstate.not_finite(run.state()) == []
    run.net[2].bias.data[1] = torch.inf
    run.average["0.weight"][0, 0] = torch.nan
    run.optimizer.state[run.net[2].weight]["exp_avg_sq"][0, 0] = -torch.inf
    assert runstate.not_finite(run.state()) == [
        "net.2.bias",
        "optimizer.2.weight.exp_avg_sq",
        "average.0.weight",
    ]


def test_a_full_disk_takes_no_lock(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with (
            pytest.raises(RunStateError, match=f"cannot use {tmp_path} as .*: File too large"),
            runstate.lock(tmp_path),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with runstate.lock(tmp_path):  # the refused one does not hold it
        pass


def test_leftovers_of_a_killed_save_are_not_states(tmp_path: Path) -> None:
    (tmp_path / "state" / ".partial-step-00000009").mkdir(parents=True)
    assert runstate.steps(tmp_path) == []
    saved_steps(tmp_path, 1)
    assert [item.name for item in (tmp_path / "state").iterdir()] == ["step-00000001"]


def truncate(state: Path) -> None:
    path = state / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


def flip(state: Path) -> None:
    path = state / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose(state: Path) -> None:
    (state / "__0_0.distcp").unlink()


def lose_manifest(state: Path) -> None:
    (state / "manifest.json").unlink()


def age(state: Path) -> None:
    path = state / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))


def misname(state: Path) -> None:
    """A state that was copied to another step's name."""
    path = state / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 7}))


def garble(state: Path) -> None:
    (state / "manifest.json").write_text('{"format": "snoopi run state", "version": 1, "files": 3}')


@pytest.mark.parametrize("damage", [truncate, flip, lose, lose_manifest, age, garble, misname])
def test_a_damaged_state_is_passed_over_aloud(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_steps(tmp_path, 1, 2)
    damage(tmp_path / "state" / "step-00000002")
    assert runstate.load_latest(tmp_path, Run(seed=1).state()) == 1
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "step-00000002" in warning
    assert warning.count("\n") == 1
    damage(tmp_path / "state" / "step-00000001")
    with pytest.raises(RunStateError, match=r"cannot resume from .*no whole run state"):
        runstate.load_latest(tmp_path, Run(seed=1).state())


def test_no_state_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunStateError, match="no run state"):
        runstate.load_latest(tmp_path, Run().state())


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_foreign_pickle_is_not_run(tmp_path: Path) -> None:
    """A state with a valid manifest around a hostile .metadata."""
    saved_steps(tmp_path, 1)
    state = tmp_path / "state" / "step-00000001"
    (state / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    sign(state)
    with pytest.raises(RunStateError, match="does not belong into a run state"):
        runstate.load_latest(tmp_path, Run(seed=1).state())
    assert not (tmp_path / "mark").exists()


def test_a_foreign_plain_value_is_not_run(tmp_path: Path) -> None:
    run = Run()
    run.extra["best"] = Bomb(tmp_path / "mark")
    runstate.save(tmp_path, 1, run.state())
    with pytest.raises(RunStateError, match=r"step-00000001 does not fit this run: .*Unpickling"):
        runstate.load_latest(tmp_path, Run(seed=1).state())
    assert not (tmp_path / "mark").exists()


def sign(state: Path) -> None:
    """Write sizes and hashes of the files as they are now into the manifest."""
    path = state / "manifest.json"
    found = json.loads(path.read_text())
    found["files"] = {name: runstate._size_and_hash(state / name) for name in found["files"]}
    path.write_text(json.dumps(found))


def test_a_state_that_does_not_fit_is_an_error_not_a_cast(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1)
    for change, message in [
        (lambda s: s.pop("extra"), "extra.best is not wanted"),
        (lambda s: s.update(more=torch.zeros(2)), "more is not in it"),
        (
            lambda s: s["average"].update({"0.bias": torch.zeros(3)}),
            r"0.bias is \[16\] torch.float32",
        ),
        (
            lambda s: s["average"].update({"0.bias": torch.zeros(16, dtype=torch.bfloat16)}),
            "torch.float32, expected .16. torch.bfloat16",
        ),
    ]:
        state = Run(seed=1).state()
        change(state)
        with pytest.raises(RunStateError, match=message):
            runstate.load_latest(tmp_path, state)


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    taken = pytest.raises(RunStateError, match=f"process {os.getpid()}")
    with runstate.lock(out), taken, runstate.lock(out):
        pytest.fail("locked twice")
    with runstate.lock(out):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunStateError, match="cannot use"), runstate.lock(tmp_path / "file"):
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from snoopi import runstate\n"
        "with runstate.lock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    with runstate.lock(tmp_path):
        pass


# --- what a loop asks of parallel.py in one process -----------------------------------------------


def test_one_process_needs_no_group() -> None:
    with parallel.session("cpu") as device:
        assert device == torch.device("cpu") and parallel.is_main()
        assert parallel.slice_of(7) == range(7) and parallel.world_size() == 1
        assert parallel.mean({"a": 1.0, "b": torch.tensor(2.0)}) == {"a": 1.0, "b": 2.0}
        assert parallel.mean({}) == {}
        parallel.check_equal("x", 1)
        with parallel.main_first():
            parallel.barrier()


def test_micro_batches_split_a_share_or_say_why_not() -> None:
    assert parallel.micro_batches(range(4, 8), 2) == [range(4, 6), range(6, 8)]
    with pytest.raises(ValueError, match=r"run.accumulate: expected a divisor of the 4 pictures"):
        parallel.micro_batches(range(4, 8), 3)


def test_clipping_is_torchs() -> None:
    ours, theirs = Run().net, Run().net
    for net in (ours, theirs):
        net(torch.ones(2, 8)).square().sum().backward()
    norm = parallel.clip_grad_norm(ours.parameters(), 0.5)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours[2].weight.grad, theirs[2].weight.grad)
    before = ours[2].weight.grad.clone()
    assert parallel.clip_grad_norm(ours.parameters(), 0) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(before, ours[2].weight.grad)


def test_a_norm_that_is_not_finite_scales_nothing() -> None:
    net = Run().net
    net(torch.ones(2, 8)).sum().backward()
    net[2].bias.grad.fill_(float("inf"))
    before = net[2].weight.grad.clone()
    assert parallel.clip_grad_norm(net.parameters(), 1.0) == float("inf")
    assert torch.equal(before, net[2].weight.grad)


def test_checkpointing_keeps_gradients() -> None:
    plain, checked = Run().net, Run().net
    parallel.checkpoint_blocks([checked[0], checked[2]])
    for net in (plain, checked):
        net(torch.ones(2, 8)).square().sum().backward()
    assert torch.equal(plain[2].weight.grad, checked[2].weight.grad)
    assert list(checked.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(number: int) -> None:
    former = signal.getsignal(number)
    with parallel.SignalGuard() as guard:
        assert not guard.stop()
        os.kill(os.getpid(), number)
        assert guard.stop() and guard.caught == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(number) == former
