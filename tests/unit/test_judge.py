"""The judge: what it reads in clean pictures, its file, its training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from snoopi.evaluate.fid import FeatureStats, frechet_distance
from snoopi.noise import Noise
from snoopi.worlds import ShapesWorld
from snoopi.worlds.judge import SHIPPED, Judge, accuracy, main, train_judge

WORLD = ShapesWorld()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_the_shipped_judge_reads_clean_pictures(judge: Judge) -> None:
    rates = accuracy(judge, WORLD, Noise(77), 1000)
    assert list(rates) == ["all", *WORLD.attributes]
    assert rates["all"] >= 0.995
    assert SHIPPED.stat().st_size < 500_000


def test_the_shipped_judge_reads_degraded_pictures(judge: Judge) -> None:
    batch = WORLD.batch(Noise(78), 0, range(500))
    grain = 0.15 * Noise(78).normal("grain", 0, range(500), (3, 32, 32))
    soft = torch.nn.functional.avg_pool2d(batch.pictures, 3, 1, 1, count_include_pad=False)
    for pictures in (batch.pictures + grain, soft):
        assert (judge.labels(pictures) == batch.labels).all(1).double().mean() > 0.98


def test_the_frechet_distance_sees_grain_and_missing_modes(judge: Judge) -> None:
    real = FeatureStats.of(judge.features(WORLD.batch(Noise(1), 0, range(600)).pictures))
    batch = WORLD.batch(Noise(2), 0, range(600))
    grain = Noise(2).normal("grain", 0, range(600), (3, 32, 32))

    def distance(pictures: torch.Tensor) -> float:
        return frechet_distance(real, FeatureStats.of(judge.features(pictures)))

    floor, some, much = (distance(batch.pictures + sd * grain) for sd in (0, 0.15, 0.3))
    assert floor < some < much
    assert distance(batch.pictures[batch.labels[:, 1] != 0]) > 3 * floor  # nothing red


def test_labels_do_not_depend_on_the_batch(judge: Judge) -> None:
    pictures = WORLD.batch(Noise(3), 0, range(130)).pictures
    pictures = pictures + 0.5 * Noise(3).normal("grain", 0, range(130), (3, 32, 32))
    whole = judge.labels(pictures)
    assert whole.dtype == torch.int64 and whole.shape == (130, 5)
    for part in ([129], [64, 0, 5], list(range(40, 110))):
        assert torch.equal(judge.labels(pictures[part]), whole[part])
    assert judge.features(pictures).shape == (130, 64)
    assert judge.labels(pictures[:0]).shape == (0, 5)


def test_the_judge_refuses_bad_pictures(judge: Judge) -> None:
    with pytest.raises(
        ValueError, match=r"float \[b 3 32 32\], got torch.float32 \[2, 3, 64, 64\]"
    ):
        judge.labels(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"got torch.uint8"):
        judge.labels(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="finite"):
        judge.features(torch.full((1, 3, 32, 32), torch.nan))


def test_the_file_says_how_it_was_made(judge: Judge, tmp_path: Path) -> None:
    with safe_open(SHIPPED, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith("python -m snoopi.worlds.judge")
    assert json.loads(metadata["accuracy"])["all"] >= 0.999
    assert {"seed", "steps", "torch"} <= set(metadata)
    path = tmp_path / "copy.safetensors"
    judge.save(path, {"note": "a copy"})
    copy = Judge.load(path)
    pictures = WORLD.batch(Noise(4), 0, range(4)).pictures
    assert torch.equal(copy.features(pictures), judge.features(pictures))
    assert copy.attributes == judge.attributes == dict(WORLD.attributes)
    assert [p.name for p in tmp_path.iterdir()] == ["copy.safetensors"]


def test_files_that_are_no_judge_are_refused(judge: Judge, tmp_path: Path) -> None:
    data = SHIPPED.read_bytes()
    path = tmp_path / "judge.safetensors"
    for broken in (data[: len(data) // 2], data[:100], b"", b"not a model at all"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Judge.load(path)
    with pytest.raises(ValueError, match="no such judge file"):
        Judge.load(tmp_path / "missing.safetensors")
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a judge file"):
        Judge.load(path)
    weights = load_file(SHIPPED)
    config = {"attributes": judge.attributes, "size": 32, "widths": judge.widths, "features": 64}
    for bad in (
        config | {"features": 32},
        config | {"cats": 1},
        {"size": 32},
        config | {"widths": 3},
    ):
        save_file(weights, path, {"format": "snoopi-judge-1", "config": json.dumps(bad)})
        with pytest.raises(ValueError, match="do not fit"):
            Judge.load(path)


def test_training_is_deterministic_and_leaves_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    first = train_judge(WORLD, Noise(0), steps=3, batch=8)
    torch.manual_seed(123)
    second = train_judge(WORLD, Noise(0), steps=3, batch=8)
    other = train_judge(WORLD, Noise(1), steps=3, batch=8)
    torch.set_rng_state(state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_training_learns(judge: Judge) -> None:
    short = train_judge(WORLD, Noise(0), steps=40, batch=16)
    assert accuracy(short, WORLD, Noise(5), 256)["background"] > 0.9


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "judge.safetensors"
    assert main(["--out", str(out), "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy on clean pictures" in printed and str(out) in printed
    assert Judge.load(out).width == 64
    for arguments in (
        [],
        ["--out", str(out), "--steps", "0"],
        ["--out", str(tmp_path / "a" / "b")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_importing_a_world_loads_no_judge() -> None:
    code = "import sys, snoopi.worlds; sys.exit('snoopi.worlds.judge' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
