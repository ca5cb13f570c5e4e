"""Exports: diffusers loads them without a warning, and round trips are bit-equal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity import matrix, oracle, tiny
from tests.parity.test_convert import single_file, spec_file
from weights_convert.convert import convert
from weights_convert.export import export

pytestmark = pytest.mark.parity
ROUND_TRIPS = ("sd15", "sd21", "sd21-v", "sdxl", "pixart-512", "pixart-1024")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal names, and tensors equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_diffusers_to_snoopi_to_diffusers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    nets = tiny.components(name)
    for net in nets.values():
        net.to(dtype)
    source = tiny.save_folder(name, nets, tmp_path / "source", "safetensors")
    convert(source, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back", "diffusers")
    for part in nets:
        (a,) = (source / part).glob("*.safetensors")
        same(load_file(a), load_file(tmp_path / "back" / part / a.name))
    matrix.record(name, "round trip", 0.0)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_diffusers_loads_it_without_a_warning(
    name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    diffusers = oracle.package("diffusers")
    nets = tiny.components(name)
    source = tiny.save_folder(name, nets, tmp_path / "source", "safetensors")
    convert(source, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back", "diffusers")
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(caplog.handler)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "back")
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [
        line for line in said if "requires torchvision" not in line
    ] == []  # an import of theirs
    assert [str(w.message) for w in recwarn if "diffusers" in str(w.filename)] == []
    for part, net in nets.items():
        same(tiny.state(net), tiny.state(getattr(pipeline, part)))
        theirs = getattr(pipeline, part).config
        for key, value in dict(net.config if part[0] != "t" else {}).items():
            if not key.startswith("_") and key not in ("sample_size", "force_upcast"):
                mine = theirs[key]
                wide = isinstance(value, int) and isinstance(mine, (list, tuple))
                assert (set(mine) == {value}) if wide else (_plain(mine) == _plain(value)), key
    pad = {"sd15": "<|endoftext|>", "sdxl": "<|endoftext|>", "pixart": "<pad>"}
    assert pipeline.tokenizer.pad_token == pad.get(name.split("-")[0], "!")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_ldm_to_snoopi_to_ldm(name: str, tmp_path: Path) -> None:
    tensors = single_file(name, tiny.components(name), ema=False)
    save_file(tensors, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "model", arch=str(spec_file(name, tmp_path)))
    export(tmp_path / "model", tmp_path / "back.safetensors", "ldm")
    back = load_file(tmp_path / "back.safetensors")
    lost = tensors.keys() - back.keys()
    # Not networks, or (SD2) what its UNet never reads.
    unread = ("betas", "alphas_cumprod", "logit_scale", "position_ids")
    if name == "sd21":
        unread = (*unread, "resblocks.3.", "text_projection")
    assert all(any(word in key for word in unread) for key in lost), lost
    same({k: v for k, v in tensors.items() if k not in lost}, back)
    matrix.record(name, "LDM trip", 0.0)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_pixart_to_snoopi_to_pixart(kind: str, tmp_path: Path) -> None:
    tensors = tiny.pixart_state(tiny.components("pixart-1024")["transformer"])
    torch.save({"state_dict": tensors}, tmp_path / "model.pth")
    arch = str(spec_file("pixart-1024", tmp_path))
    convert(tmp_path / "model.pth", tmp_path / "model", arch=arch)
    export(tmp_path / "model", tmp_path / f"back.{kind}", "pixart")
    path = tmp_path / f"back.{kind}"
    back = load_file(path) if kind == "safetensors" else torch.load(path)["state_dict"]
    lost = tensors.keys() - back.keys()
    assert lost == {"pos_embed", "y_embedder.y_embedding"}
    same({k: v for k, v in tensors.items() if k not in lost}, back)


def test_what_a_layout_cannot_hold(tmp_path: Path) -> None:
    nets = tiny.components("pixart-512")
    source = tiny.save_folder("pixart-512", nets, tmp_path / "source", "safetensors")
    convert(source, tmp_path / "model")
    with pytest.raises(ValueError, match="--to ldm is for UNets, not for pixart"):
        export(tmp_path / "model", tmp_path / "out.safetensors", "ldm")
    with pytest.raises(ValueError, match=r"must end in .safetensors or .pth"):
        export(tmp_path / "model", tmp_path / "out.bin", "pixart")
    with pytest.raises(ValueError, match="exists already"):
        export(tmp_path / "model", tmp_path / "source", "diffusers")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "model"}
