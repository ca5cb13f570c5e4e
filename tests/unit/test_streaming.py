"""A distillation whose backbones are read tensor by tensor, and its frozen weights in bf16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snoopi import config as recipes
from snoopi import folders, lora, parallel, zoo
from snoopi.distiller import Distiller
from snoopi.folders import is_deferred
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline, load
from snoopi.worlds.shapes import ShapesWorld

CPU = torch.device("cpu")
WORDS = ["run.batch=2", "run.steps=2", "optim.student.lr=1e-3", "parallel.shard=never"]


def teacher(preset: str = "debug") -> Pipeline:
    """A model of which every weight says something."""
    spec, tokenizer = zoo.model(preset), ShapesWorld().tokenizer()
    text = spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    spec = dataclasses.replace(spec, text=(dataclasses.replace(text, config=words),))
    nets = [zoo.fresh(spec, part, 0).eval() for part in ("backbone", "text_encoder")]
    for net in nets:
        for i, (name, p) in enumerate(net.named_parameters()):
            p.data += 0.02 * Noise(1).normal(name, 0, [i], p.shape)[0]
    return Pipeline(spec, nets[0], None, [nets[1]], [tokenizer])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return teacher().save(tmp_path / "teacher", torch.float16)


def distiller(pipeline: Pipeline, *words: str, student: Pipeline | None = None) -> Distiller:
    return Distiller(recipes.load("debug", [*WORDS, *words]), CPU, pipeline, student)


def streamed(folder: Path) -> Pipeline:
    found = load(folder, dtype=torch.float32, defer=("backbone",))
    assert is_deferred(found.backbone)
    return found


def weights(trainer: Distiller) -> dict[str, torch.Tensor]:
    nets = {"student": trainer.student, "pair": trainer.pair}
    return {f"{n}.{k}": v for n, net in nets.items() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_streamed_run_is_one_of_whole_networks_bit_for_bit(folder: Path, dtype: str) -> None:
    words = (f"run.dtype={dtype}", "parallel.checkpointing=true")
    whole = distiller(load(folder, dtype=torch.float32), *words)
    parts = distiller(streamed(folder), *words)
    expected, got = weights(whole), weights(parts)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].stride() == value.stride(), name
        assert torch.equal(got[name], value), name
    for name in ("student", "pair"):
        pairs = zip(*(getattr(t, name).parameters() for t in (parts, whole)), strict=True)
        assert all(a.requires_grad == b.requires_grad for a, b in pairs)
    for step in range(2):
        assert parts.step(step) == whole.step(step)


def test_a_student_of_its_own_is_streamed_from_its_own_folder(tmp_path: Path, folder: Path) -> None:
    other = teacher()
    nn.init.constant_(other.backbone.conv_in.bias, 0.5)
    trainer = distiller(streamed(folder), student=streamed(other.save(tmp_path / "student")))
    assert torch.all(trainer.student.conv_in.bias == 0.5)
    assert not torch.any(trainer.pair.conv_in.bias == 0.5)


def test_bf16_stores_what_autocast_would_make_of_the_teachers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = distiller(streamed(folder), "run.dtype=bf16")
    kinds = {name: p.dtype for name, p in trainer.pair.named_parameters()}
    assert kinds["conv_in.weight"] == kinds["mid_block.resnets.0.conv1.weight"] == torch.bfloat16
    assert kinds["conv_in.bias"] == kinds["conv_norm_out.weight"] == torch.float32
    assert {kinds[n] for n in kinds if n.endswith(lora.SUFFIXES)} == {torch.float32}
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    rows = [trainer.step(step) for step in range(2)]
    monkeypatch.setattr(parallel, "store_bf16", lambda net: net)
    plain = distiller(streamed(folder), "run.dtype=bf16")
    assert {p.dtype for p in plain.pair.parameters()} == {torch.float32}
    assert rows == [plain.step(step) for step in range(2)]


def test_without_an_average_none_is_kept(folder: Path) -> None:
    trainer = distiller(streamed(folder), "ema.decay=0")
    trainer.step(0)
    assert trainer.state()["average"] == {}
    pipeline = trainer.pipeline()
    assert pipeline is not None
    got = pipeline.backbone.state_dict()
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv_in.bias"), "does not fit UNet: lacks conv_in.bias"),
        (
            lambda state: state.update({"conv_in.bias": torch.zeros(3)}),
            r"conv_in.bias must be \[16\], got \[3\]",
        ),
        (
            lambda state: state.update({"conv_in.bias": torch.zeros(16, dtype=torch.int64)}),
            "conv_in.bias must be of a floating type",
        ),
    ],
)
def test_a_deferred_file_is_checked_at_once(folder: Path, change: Any, message: str) -> None:
    path = folders.weights_path(folder, "backbone")
    state = load(folder).backbone.state_dict()
    change(state)
    from safetensors.torch import save_file

    save_file(state, path)
    with pytest.raises(ValueError, match=message):
        load(folder, defer=("backbone",))
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load(folder, defer=("backbone",))
