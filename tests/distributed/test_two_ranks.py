"""Two gloo processes on the CPU: sharding changes where numbers live, never what they are."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from snoopi import config as recipes
from snoopi import lora, parallel, plan, runstate, zoo
from snoopi.conditioning import Conditioning
from snoopi.distiller import Distiller
from snoopi.methods.ema import EMA
from snoopi.methods.vsd import teacher_scores
from snoopi.models.clip_vision import CLIPVision, CLIPVisionConfig
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline, load
from snoopi.runstate import OptimizerState, RunStateError
from snoopi.worlds.shapes import ShapesWorld

pytestmark = pytest.mark.distributed
WORLD, BATCH, STEPS = 2, 8, 3
Ranks = Callable[[Callable[..., None]], Path]
_SHAPES_DIT = zoo.model("shapes_dit")
TINY_DIT = dataclasses.replace(
    _SHAPES_DIT,
    backbone=dataclasses.replace(_SHAPES_DIT.backbone, layers=2, heads=2, head_dim=8),
)


class Block(nn.Module):
    """A residual block with a frozen base and a trainable adapter, in one FSDP2 group."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_a = nn.Linear(width, 3, bias=False)
        self.lora_b = nn.Linear(3, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.base(x) + self.lora_b(self.lora_a(x)))


class Net(nn.Module):
    """Odd widths, so that the ranks' parts are unequal."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.body = nn.ModuleList(Block(width) for _ in range(3))
        self.last = nn.Linear(width, 2)
        self.seen: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(t[0].item())
        h = self.first(x) + (t / 1000)[:, None]
        for block in self.body:
            h = block(h)
        return self.last(h)

    def encode(self, x: Tensor) -> Tensor:
        return self.first(x)


def build(seed: int = 0, **sharding: Any) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = Net()
    parallel.shard(net, list(net.body), methods=("encode",), **sharding)
    free = [p for p in net.parameters() if p.requires_grad]
    return net, torch.optim.AdamW(free, 1e-2, betas=(0.0, 0.99), weight_decay=0.1)


def state(net: Net, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    return {
        "net": runstate.trainable(net),
        "optimizer": OptimizerState(optimizer, net.named_parameters()),
        "extra": {"best": 0.25},
    }


def train(
    net: Net, optimizer: torch.optim.AdamW, steps: range, parts: int = 1
) -> list[list[float]]:
    """[[loss, gradient norm] of each step]: as a loop of ours does it."""
    rows = []
    for step in steps:
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
        micro = parallel.micro_batches(parallel.slice_of(BATCH), parts)
        total = 0.0
        for number, rows_of_part in enumerate(micro, 1):
            with parallel.gradient_sync(net, number == len(micro)):
                here = x[rows_of_part.start : rows_of_part.stop]
                loss = (net(here, torch.full((len(here),), 999.0)) - 1).square().mean() / parts
                loss.backward()
            total += loss.item()
        parallel.reduce_gradients(net.parameters())
        norm = parallel.clip_grad_norm(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([parallel.mean({"loss": total})["loss"], norm])
    return rows


def whole(net: Net, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Weights and moments, gathered on rank 0."""
    moments = OptimizerState(optimizer, net.named_parameters()).state_dict()
    flat = {f"{name}.{key}": v for name, keys in moments.items() for key, v in keys.items()}
    return {**parallel.gather_full_state_dict(net), **parallel.gather_full(flat)}


def _ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    for work in WORKS:
        (folder / work.__name__).mkdir(exist_ok=True)
        work(folder / work.__name__)
        (folder / f"{work.__name__}.{rank}").touch()
    dist.barrier()  # without it gloo may abort the rank that is behind
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Runs all WORKS in one pair of processes, whose start is the slow part.

    Gives, for a work, the folder in which it ran; raises if it failed or was not reached.
    """
    folder = tmp_path_factory.mktemp("ranks")
    trouble: list[Exception] = []
    (folder / "load_on_two").mkdir()
    save_teachers(folder / "distil_on_two")
    net, optimizer = build()
    train(net, optimizer, range(STEPS))
    runstate.save(folder / "load_on_two", STEPS, state(net, optimizer))
    try:
        mp.spawn(_ranks, (folder,), nprocs=WORLD)
    except Exception as error:
        trouble.append(error)

    def done(work: Callable[..., None]) -> Path:
        if not all((folder / f"{work.__name__}.{rank}").exists() for rank in range(WORLD)):
            raise trouble[0]
        return folder / work.__name__

    return done


def assert_equal_runs(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=atol, msg=name)


def train_in_three_ways(tmp_path: Path) -> None:
    for name, sharding, parts in [
        ("sharded", {}, 1),
        ("accumulated", {}, 2),
        ("replicated", {"policy": "never"}, 1),
    ]:
        net, optimizer = build(**sharding)
        assert isinstance(net.last.weight, DTensor) == (name != "replicated")
        rows = train(net, optimizer, range(STEPS), parts)
        parallel.check_equal("rows", rows)
        result = whole(net, optimizer)
        assert bool(result) == parallel.is_main()
        if parallel.is_main():
            torch.save((rows, result), tmp_path / f"{name}.pt")
    net, _ = build()
    assert net.encode(torch.ones(1, 5)).shape == (1, 7)


def test_a_sharded_step_is_the_step_of_one_process(ranks: Ranks) -> None:
    folder = ranks(train_in_three_ways)
    net, optimizer = build()
    expected_rows = train(net, optimizer, range(STEPS))
    expected = whole(net, optimizer)
    assert expected_rows[0][1] > 0.5, "the test must clip"
    for name in ("sharded", "accumulated", "replicated"):
        rows, got = torch.load(folder / f"{name}.pt")
        torch.testing.assert_close(
            torch.tensor(rows), torch.tensor(expected_rows), rtol=1e-5, atol=0
        )
        assert_equal_runs(got, expected, 1e-6)


def save_on_two(tmp_path: Path) -> None:
    net, optimizer = build()
    train(net, optimizer, range(STEPS))
    with runstate.lock(tmp_path / "run"):
        path = runstate.save(tmp_path / "run", STEPS, state(net, optimizer), config="abc")
    assert runstate.manifest(path).world == WORLD
    saved = whole(net, optimizer)
    if parallel.is_main():
        torch.save(saved, tmp_path / "saved.pt")
    # Two ranks again, and an abandoned damaged state between them.
    runstate.save(tmp_path / "run", STEPS + 1, state(net, optimizer))
    if parallel.is_main():
        (tmp_path / "run" / "state" / f"step-{STEPS + 1:08d}" / "__1_0.distcp").unlink()
    parallel.barrier()
    again, its_optimizer = build()
    train(again, its_optimizer, range(7, 9))
    assert runstate.load_latest(tmp_path / "run", state(again, its_optimizer)) == STEPS
    loaded = runstate.trainable(again)
    for name, value in runstate.trainable(net).items():
        assert torch.equal(loaded[name].to_local(), value.to_local()), name
    rows = train(again, its_optimizer, range(STEPS, STEPS + 2))
    assert rows == train(net, optimizer, range(STEPS, STEPS + 2)), "resumed, but not bit for bit"
    with pytest.raises(RunStateError, match=r"does not fit this run: extra.best is not wanted"):
        short = state(again, its_optimizer)
        del short["extra"]
        runstate.load_latest(tmp_path / "run", short)


def test_saved_on_two_ranks_loaded_on_one(ranks: Ranks) -> None:
    folder = ranks(save_on_two)
    net, optimizer = build(seed=1)
    frozen = net.body[0].base.weight.clone()
    assert runstate.load_latest(folder / "run", state(net, optimizer)) == STEPS
    assert torch.equal(net.body[0].base.weight, frozen)
    saved, got = torch.load(folder / "saved.pt"), whole(net, optimizer)
    for name in saved:
        assert ".base." in name or torch.equal(saved[name], got[name]), name


def load_on_two(tmp_path: Path) -> None:
    net, optimizer = build(seed=1)
    assert runstate.load_latest(tmp_path, state(net, optimizer)) == STEPS
    loaded = whole(net, optimizer)
    if parallel.is_main():
        torch.save(loaded, tmp_path / "loaded.pt")


def test_saved_on_one_rank_loaded_on_two(ranks: Ranks) -> None:
    net, optimizer = build()
    train(net, optimizer, range(STEPS))
    loaded = torch.load(ranks(load_on_two) / "loaded.pt")
    for name, value in whole(net, optimizer).items():
        assert ".base." in name or torch.equal(loaded[name], value), name


def small_things(tmp_path: Path) -> None:
    rank = parallel.rank()
    assert parallel.slice_of(4) == range(2 * rank, 2 * rank + 2)
    with pytest.raises(ValueError, match="expected a multiple of 2 ranks, got 3"):
        parallel.slice_of(3)
    assert parallel.mean({"x": float(rank), "y": torch.tensor(4.0)}) == {"x": 0.5, "y": 4.0}
    with pytest.raises(ValueError, match="'the seed' differs between ranks: 0 on 0, 1 on 1"):
        parallel.check_equal("'the seed'", rank)
    with pytest.raises(ValueError, match="initial weights of Net differs"):
        build(seed=rank)

    mark = tmp_path / "mark"
    with parallel.main_first():
        if rank == 0:
            time.sleep(0.2)
        assert mark.exists() == (rank == 1)
        mark.touch()

    with parallel.SignalGuard() as guard:
        assert not guard.stop()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert guard.stop()

    if rank == 1:  # a file where the run's folder should be: only rank 0 meets it
        (tmp_path / "run").touch()
    parallel.barrier()
    with pytest.raises(RunStateError, match="cannot save the run state of step 1"):
        runstate.save(tmp_path / "run", 1, {"x": torch.zeros(1)})
    with pytest.raises(RunStateError, match="cannot use"), runstate.lock(tmp_path / "run"):
        pass


def test_ranks_agree(ranks: Ranks) -> None:
    ranks(small_things)


def bf16(tmp_path: Path) -> None:
    net, optimizer = build(dtype="bf16")
    for time_of_row in (999.0, 271.5):
        with parallel.autocast(torch.device("cpu"), "bf16"):
            out = net(torch.ones(2, 5), torch.full((2,), time_of_row))
        assert out.dtype == torch.float32
        out.sum().backward()
    assert net.seen == [999.0, 271.5], "a timestep was rounded on its way in"
    assert net.last.weight.dtype == net.last.weight.grad.dtype == torch.float32
    assert parallel.clip_grad_norm(net.parameters(), 1.0) > 1
    optimizer.step()


def test_bf16_leaves_timesteps_and_master_weights_alone(ranks: Ranks) -> None:
    ranks(bf16)


def checkpointed(tmp_path: Path) -> None:
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        net = Net()
        if on:
            parallel.checkpoint_blocks(net.body)
        parallel.shard(net, list(net.body))
        net(torch.ones(2, 5), torch.zeros(2)).square().sum().backward()
        grads.append([p.grad.to_local().clone() for p in net.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


def test_checkpointing_under_sharding_keeps_gradients(ranks: Ranks) -> None:
    ranks(checkpointed)


def pair_of(kind: str) -> Any:
    """A tiny teacher pair whose weights are not zero."""
    spec = zoo.model("debug") if kind == "unet" else TINY_DIT
    net = zoo.fresh(spec, "backbone", 0).eval()
    for number, (name, p) in enumerate(net.named_parameters()):
        p.data += 0.05 * Noise(1).normal(name, 0, [number], p.shape)[0]
    lora.inject(net, ["to_q", "to_v"], 2, 4)
    return spec, net


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathers(tmp_path: Path) -> None:
    for kind in ("unet", "dit"):
        spec, plain = pair_of(kind)
        net = pair_of(kind)[1]
        parallel.shard(net, net.blocks())
        backbone = spec.backbone
        x = Noise(2).normal("x", 0, range(2), (backbone.in_channels, 8, 8))
        cond = Conditioning(Noise(2).normal("cond", 0, range(2), (4, backbone.text_width)))
        null = Conditioning(torch.zeros(1, 4, backbone.text_width))
        t, kappa = torch.tensor([20, 700]), torch.tensor([0.5, 4.0])
        expected = teacher_scores(plain, x, t, cond, null, kappa, kappa)
        blocks, counts = len(net.blocks()), {}
        for passes in ("fused", "sequential"):
            net.reshard()  # the root stays gathered after a forward without a backward
            with Gathers() as counted:
                got = teacher_scores(net, x, t, cond, null, kappa, kappa, passes)  # type: ignore[arg-type]
            counts[passes] = counted.count
            for mine, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert counts == {"fused": blocks + 1, "sequential": 4 * blocks + 1}


def test_a_teacher_evaluation_gathers_each_block_once(ranks: Ranks) -> None:
    ranks(gathers)


def streamed(tmp_path: Path) -> None:
    for kind in ("unet", "dit"):
        whole = pair_of(kind)[1]
        state = whole.state_dict()
        taken = []

        def read(name: str, rows: slice, state: Any = state, taken: list[int] = taken) -> Tensor:
            found = state[name][rows]
            taken.append(found.numel())
            return found

        net = copy.deepcopy(whole).to("meta")
        parallel.shard(net, net.blocks(), read=read)
        full = parallel.gather_full_state_dict(net)
        if parallel.is_main():
            assert full.keys() == state.keys()
            assert all(torch.equal(full[name], state[name]) for name in state)
        shares = [p.to_local() for p in net.parameters()]
        first = sum(state[name][:1].numel() for name in state)  # what ranks compare
        assert sum(taken) == first + sum(part.numel() for part in shares)
        if parallel.is_main():
            held = plan.size(whole.parameters(), WORLD)
            assert held == sum(part.nbytes for part in shares)

        def other(name: str, rows: slice, state: Any = state) -> Tensor:
            return state[name][rows] + parallel.rank()

        with pytest.raises(ValueError, match=r"initial weights of .* differs between ranks"):
            parallel.shard(copy.deepcopy(whole).to("meta"), [], read=other)


def test_a_rank_reads_its_own_rows_alone(ranks: Ranks) -> None:
    ranks(streamed)


def distilled(kind: str, folder: Path, apart: bool = False) -> list[dict[str, float]]:
    """Figures of two steps of a distillation that streams its teacher.

    apart: of one step whose adapters are not zero, so that the two teachers differ from the start.
    """
    words = ["run.batch=4", "run.steps=2", "lora.rank=2", "optim.student.lr=1e-4"]
    config = recipes.load("debug", [*words, 'lora.targets=["to_q", "to_v"]'])
    teacher = load(folder / kind, dtype=torch.float32, defer=("backbone",))
    trainer = Distiller(config, torch.device("cpu"), teacher)
    if apart:
        for name, p in trainer.pair.named_parameters():
            if p.requires_grad:
                here, first = parallel.local_rows(p.detach())
                start = 0.3 * Noise(3).normal(name, 0, [0], p.shape)[0]
                here.copy_(start[first : first + len(here)])
    return [parallel.mean(trainer.step(step)) for step in range(1 if apart else 2)]


def distil_on_two(tmp_path: Path) -> None:
    for kind in ("unet", "dit"):
        rows = [distilled(kind, tmp_path), distilled(kind, tmp_path, apart=True)]
        if parallel.is_main():
            torch.save(rows, tmp_path / f"{kind}.pt")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_two_ranks_distil_as_one_does(ranks: Ranks, kind: str) -> None:
    folder = ranks(distil_on_two)
    got, expected = torch.load(folder / f"{kind}.pt")[0], distilled(kind, folder)
    for mine, theirs in zip(got, expected, strict=True):
        # Adam turns rounding of gradients near zero into steps, which the next norm shows. Intel's
        # products round by the size of the batch, so that both are more there: 2e-6 and 1e-4.
        norms = {name for name in theirs if name.startswith("grad_norm")}
        for names, rel in ((theirs.keys() - norms, 1e-5), (norms, 5e-4)):
            there = pytest.approx([theirs[name] for name in names], rel=rel, abs=1e-6)
            assert [mine[name] for name in names] == there
    # At the first step the adapters are zero, and so is the gap between the teachers.
    assert all(expected[1][name] > 1e-6 for name in ("loss_vsd", "loss_lora", "gap"))


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_two_ranks_see_the_teachers_apart_as_one_does(ranks: Ranks, kind: str) -> None:
    """The VSD loss is the square of a small difference: it must be far above a tolerance."""
    folder = ranks(distil_on_two)
    (got,), (expected,) = torch.load(folder / f"{kind}.pt")[1], distilled(kind, folder, apart=True)
    for name, value in expected.items():
        assert value > 1e-2 and got[name] == pytest.approx(value, rel=1e-5, abs=0), name


def average(kind: str) -> dict[str, Tensor]:
    """The average in bf16 of weights that move, gathered on rank 0."""
    net = pair_of(kind)[1]
    net.requires_grad_(True)
    parallel.shard(net, net.blocks())
    ema = EMA(net, 0.999, torch.bfloat16, Noise(4), parallel.local_rows)
    for step in range(10_000, 10_003):
        with torch.no_grad():
            for p in net.parameters():
                p *= 1.01
        ema.update(net, step)
    return parallel.gather_full(ema.average)


def average_on_two(tmp_path: Path) -> None:
    for kind in ("unet", "dit"):
        found = average(kind)
        if parallel.is_main():
            torch.save(found, tmp_path / f"{kind}.pt")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_two_ranks_round_an_average_as_one_does(ranks: Ranks, kind: str) -> None:
    got, expected = torch.load(ranks(average_on_two) / f"{kind}.pt"), average(kind)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def save_teachers(folder: Path) -> None:
    for kind in ("unet", "dit"):
        spec, net = pair_of(kind)
        lora.remove(net)
        tokenizer, text = ShapesWorld().tokenizer(), spec.text[0]
        words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
        spec = dataclasses.replace(spec, text=(dataclasses.replace(text, config=words),))
        encoder = zoo.fresh(spec, "text_encoder", 0)
        Pipeline(spec, net, None, [encoder], [tokenizer]).save(folder / kind)


def test_sharding_at_one_rank_saves_what_an_unsharded_run_loads(tmp_path: Path) -> None:
    with parallel.session("cpu", group=True):
        sharded, its_optimizer = build(policy="always")
        assert isinstance(sharded.last.weight, DTensor)
        train(sharded, its_optimizer, range(STEPS))
        runstate.save(tmp_path, STEPS, state(sharded, its_optimizer))
        expected = whole(sharded, its_optimizer)
    assert not dist.is_initialized()
    net, optimizer = build()
    assert runstate.load_latest(tmp_path, state(net, optimizer)) == STEPS
    assert_equal_runs(whole(net, optimizer), expected, 0)


def test_a_frozen_scalar_is_kept_whole(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        width=16, mlp_width=24, layers=2, heads=2, patch=4, image_size=8, projection=6
    )
    torch.manual_seed(0)
    plain = CLIPVision(config).eval()
    pictures = torch.rand(2, 3, 8, 8)
    with parallel.session("cpu", group=True):
        with pytest.raises(ValueError, match="a scalar of CLIPVision cannot be sharded: freeze it"):
            parallel.shard(CLIPVision(config), [], policy="always")
        net = CLIPVision(config).eval().requires_grad_(False)
        net.load_state_dict(plain.state_dict())
        parallel.shard(net, net.blocks(), policy="always")
        assert isinstance(net.visual_projection.weight, DTensor)
        assert not isinstance(net.logit_scale, DTensor)
        assert torch.equal(net(pictures).pooled, plain(pictures).pooled)


WORKS = [
    *(train_in_three_ways, save_on_two, load_on_two, bf16, checkpointed, small_things),
    *(gathers, streamed, distil_on_two, average_on_two),
]
