"""Two students into one: the mean of their weights, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import snoopi
from snoopi import zoo
from snoopi.pipeline import Pipeline
from snoopi.worlds.shapes import ShapesWorld
from snoopi.zoo import ModelSpec
from weights_convert.__main__ import main
from weights_convert.blend import blend

SPEC = dataclasses.replace(zoo.preset("debug"), one_step=zoo.OneStep())


def save(folder: Path, seed: int, spec: ModelSpec = SPEC, texts: int = 0) -> Path:
    """A student with a text encoder of its own seed, and no VAE."""
    net = zoo.fresh(spec, "backbone", seed)
    out = net.conv_out.weight
    out.data.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))
    text = zoo.fresh(spec, "text_encoder", texts)
    return Pipeline(spec, net, None, [text], [ShapesWorld().tokenizer()]).save(folder)


@pytest.mark.parametrize("weight", [0.5, 0.25, 1.0])
def test_the_mean_of_two_students(tmp_path: Path, weight: float) -> None:
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    words = ["blend", str(a), str(b), str(tmp_path / "c"), "--weight", str(weight)]
    assert main(words) == 0
    ours, theirs, got = (load_file(f / "backbone.safetensors") for f in (a, b, tmp_path / "c"))
    assert got.keys() == ours.keys()
    for name, value in got.items():
        want = weight * ours[name].double() + (1 - weight) * theirs[name].double()
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7)
    if weight == 1:
        assert all(torch.equal(got[name], ours[name]) for name in got)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(p.name for p in a.iterdir())
    whole = snoopi.load(tmp_path / "c")
    assert whole.spec == SPEC and whole.tokenizers[0] is not None
    record = json.loads((tmp_path / "c" / "snoopi.json").read_text())["provenance"]["blended"]
    assert record["weight"] == weight and record["names"] == ["a", "b"]
    assert len(set(record["sha256"].values())) == 2


def test_the_storage_is_the_firsts(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    snoopi.load(a).save(tmp_path / "half", torch.bfloat16)
    blend(tmp_path / "half", b, tmp_path / "c")
    ours, theirs = (
        load_file(tmp_path / "half/backbone.safetensors"),
        load_file(b / "backbone.safetensors"),
    )
    for name, value in load_file(tmp_path / "c/backbone.safetensors").items():
        want = (0.5 * ours[name].float() + 0.5 * theirs[name]).bfloat16()
        assert torch.equal(value, want)


def _other(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: save(folder, 2, dataclasses.replace(SPEC, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (_other(one_step=zoo.OneStep(400)), "another one_step"),
        (_other(null="zeros"), "another null"),
        (_other(backbone=dataclasses.replace(SPEC.backbone, norm_groups=4)), "another backbone"),
        (lambda folder: save(folder, 2, texts=5), "text_encoder.safetensors is another network"),
        (lambda folder: folder, "is not a model folder: it does not exist"),
    ],
)
def test_other_models_are_refused(
    make: Callable[[Path], Path],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = save(tmp_path / "a", 1), make(tmp_path / "b")
    assert main(["blend", str(a), str(b), str(tmp_path / "c")]) == 2
    line = capsys.readouterr().err
    assert part in line and line.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_a_target_that_exists_and_a_wrong_weight_are_refused(tmp_path: Path) -> None:
    a = save(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="exists already"):
        blend(a, a, a)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1, got"):
            blend(a, a, tmp_path / "c", weight)
