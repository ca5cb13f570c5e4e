"""Tools: networks that measure. Presets, their sizes, and their folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snoopi import folders, pipeline, zoo
from snoopi.config import Config
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.clip_vision import CLIPVision, CLIPVisionConfig
from snoopi.models.inception import Inception
from snoopi.models.vae import TAESD, TAESDConfig
from snoopi.models.vgg import VGG, VGGConfig
from snoopi.trainers import VAETrainer
from snoopi.zoo import TOOLS, ToolSpec

IMAGE = CLIPVisionConfig(
    width=32, mlp_width=48, layers=2, heads=2, patch=8, image_size=16, projection=24
)
TEXT = CLIPTextConfig(
    vocabulary=32, length=12, width=16, mlp_width=24, layers=1, heads=2, eos_id=31, projection=24
)
TINY = ToolSpec("tiny-clip", {"image_encoder": IMAGE, "text_encoder": TEXT})


def networks(spec: ToolSpec = TINY) -> dict[str, nn.Module]:
    return {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}


def counts(name: str) -> list[int]:
    nets = [zoo.build(name, part) for part in TOOLS[name].parts()]
    return [sum(p.numel() for p in net.parameters()) for net in nets]


@pytest.mark.parametrize(
    ("name", "total", "visual"),
    [
        ("clip-vit-b-32", 151_277_313, 87_849_216),
        ("clip-vit-b-16", 149_620_737, 86_192_640),
        ("clip-vit-l-14", 427_616_513, 303_966_208),
        ("openclip-vit-h-14", 986_109_441, 632_076_800),
        ("openclip-vit-g-14", 1_366_678_273, 1_012_645_632),
        ("openclip-vit-bigg-14", 2_539_567_105, 1_844_907_264),
    ],
)
def test_clip_models_have_the_published_parameters(name: str, total: int, visual: int) -> None:
    assert sum(counts(name)) == total
    assert counts(name)[0] == visual + 1  # logit_scale lives in the image tower
    image, text = TOOLS[name].networks.values()
    assert isinstance(image, CLIPVisionConfig) and isinstance(text, CLIPTextConfig)
    assert image.projection == text.projection
    assert image.activation == text.activation
    assert image.activation == ("gelu" if name.startswith("open") else "quick_gelu")
    widths = {"clip-vit-": 64, "openclip-vit-h": 80, "openclip-vit-g-": 88, "openclip-vit-b": 104}
    width = next(width for start, width in widths.items() if name.startswith(start))
    assert image.width == width * image.heads


def test_other_tools_have_the_published_parameters() -> None:
    assert counts("inception-fid") == [23_850_960]
    assert counts("vgg16") == [138_357_544]
    assert counts("taesd") == counts("taesdxl") == [2_445_063]
    inception = zoo.build("inception-fid", "network")
    assert len(inception.state_dict()) == 566
    assert sum(p.numel() for p in inception.fc.parameters()) == 23_850_960 - 21_785_568
    assert len(zoo.build("vgg16", "network").state_dict()) == 32


@pytest.mark.parametrize("name", TOOLS)
def test_presets_are_named_build_and_go_through_json(name: str) -> None:
    spec = TOOLS[name]
    assert spec.arch == name and zoo.preset(name) is spec
    text = json.dumps(spec.to_json())
    assert ToolSpec.from_json(json.loads(text)) == spec
    kinds = {"image_encoder": CLIPVision, "network": VGG if name == "vgg16" else Inception}
    for part in spec.parts():
        net = zoo.build(name, part)
        assert not net.training and all(p.is_meta for p in net.parameters())
        assert isinstance(net, kinds.get(part, nn.Module))
        assert net.blocks()


def test_logit_scale_can_be_left_out_with_a_lone_image_tower() -> None:
    config = dataclasses.replace(IMAGE, temperature=False)
    with_it, without = (CLIPVision(c).state_dict() for c in (IMAGE, config))
    assert with_it.keys() - without.keys() == {"logit_scale"}
    assert with_it["logit_scale"].shape == () and float(with_it["logit_scale"]) > 2.6


def same(got: Mapping[str, nn.Module], want: Mapping[str, nn.Module]) -> None:
    assert list(got) == list(want)
    for part in want:
        a, b = got[part].state_dict(), want[part].state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_folder_is_what_was_saved(tmp_path: Path) -> None:
    nets = networks()
    folder = folders.save_tools(tmp_path / "clip", TINY, nets, provenance={"source": "here"})
    found = folders.load_tools(folder)
    same(found, nets)
    assert all(not n.training for n in found.values())
    assert not any(p.requires_grad for n in found.values() for p in n.parameters())
    assert folders.read_tools(folder) == (TINY, {"source": "here"})
    assert json.loads((folder / "snoopi.json").read_text())["model"]["kind"] == "ToolSpec"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip"]


def test_half_precision_is_widened_on_the_cpu_unless_asked_for(tmp_path: Path) -> None:
    folder = folders.save_tools(tmp_path / "clip", TINY, networks(), dtype=torch.float16)

    def dtypes(dtype: torch.dtype | None) -> set[torch.dtype]:
        found = folders.load_tools(folder, dtype=dtype)
        return {p.dtype for net in found.values() for p in net.parameters()}

    assert dtypes(None) == {torch.float32}
    assert dtypes(torch.bfloat16) == {torch.bfloat16}


def test_a_part_may_be_absent_but_not_all(tmp_path: Path) -> None:
    folder = folders.save_tools(tmp_path / "clip", TINY, networks())
    (folder / "text_encoder.safetensors").unlink()
    assert list(folders.load_tools(folder)) == ["image_encoder"]
    (folder / "image_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no network: expected image_encoder\.safetensors"):
        folders.load_tools(folder)


def test_models_and_tools_are_told_apart(tmp_path: Path) -> None:
    tools = folders.save_tools(tmp_path / "clip", TINY, networks())
    with pytest.raises(ValueError, match=r"expected a ModelSpec, got a ToolSpec; .*load_tools"):
        pipeline.load(tools)
    model = pipeline.Pipeline(zoo.model("debug")).save(tmp_path / "debug")
    with pytest.raises(ValueError, match=r"expected a ToolSpec, got a ModelSpec; .*\.load reads"):
        folders.load_tools(model)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "snoopi.json"
    data = json.loads(path.read_text())
    data["model"] |= changes
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"heads": 0}, "model.networks.image_encoder.heads must be at least 1, got 0"),
        ({"heads": 3}, "model.networks.image_encoder.heads must divide the width 32, got 3"),
        ({"patch": 0}, "image_size must be a multiple of patch, got 16 and 0"),
        ({"patch": 5}, "image_size must be a multiple of patch, got 16 and 5"),
        ({"activation": "relu"}, "activation must be one of quick_gelu, gelu, got 'relu'"),
        ({"kind": "UNetConfig"}, r"image_encoder.kind must be one of \['CLIPVisionConfig'"),
        ({"width": 64}, "image_encoder.safetensors does not fit CLIPVision: .*; and .* more"),
    ],
)
def test_a_wrong_config_is_one_clear_error(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folders.save_tools(tmp_path / "clip", TINY, networks())
    model = json.loads((folder / "snoopi.json").read_text())["model"]
    model["networks"]["image_encoder"] |= config
    change(folder, networks=model["networks"])
    with pytest.raises(ValueError, match=message):
        folders.load_tools(folder)


def test_other_mistakes_are_refused(tmp_path: Path) -> None:
    folder = folders.save_tools(tmp_path / "clip", TINY, networks())
    change(folder, kind="Tools")
    with pytest.raises(ValueError, match="model must be an object of kind ToolSpec"):
        folders.load_tools(folder)
    with pytest.raises(ValueError, match="does not exist"):
        folders.load_tools(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has the parts image_encoder, text_encoder, got vae"):
        folders.save_tools(tmp_path / "new", TINY, {"vae": nn.Identity()})
    with pytest.raises(ValueError, match="got none"):
        folders.save_tools(tmp_path / "new", TINY, {})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="vgg16 has no part 'backbone'; it has network"):
        zoo.build("vgg16")
    with pytest.raises(ValueError, match="unknown model 'clip-vit-l14'; the nearest is"):
        zoo.preset("clip-vit-l14")
    with pytest.raises(ValueError, match="'vgg16' is a tool, not a model"):
        zoo.model("vgg16")


def test_a_recipe_cannot_train_a_tool() -> None:
    config = Config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, preset="vgg16"))
    with pytest.raises(ValueError, match="'vgg16' is a tool, not a model"):
        VAETrainer(config, torch.device("cpu"))


def test_pictures_of_a_wrong_shape_are_refused() -> None:
    vgg = VGG(VGGConfig(channels=(4, 4), convs=(1, 1), width=4, classes=2)).eval()
    with torch.device("meta"):
        inception = zoo.build("inception-fid", "network")
    for net, shape, message in (
        (CLIPVision(IMAGE), (1, 3, 32, 32), r"\[b 3 16 16\], got \[1, 3, 32, 32\]"),
        (CLIPVision(IMAGE), (3, 16, 16), r"\[b 3 16 16\], got \[3, 16, 16\]"),
        (inception, (1, 3, 74, 299), r"at least 75 pixels, got \[1, 3, 74, 299\]"),
        (inception, (1, 1, 299, 299), r"\[b 3 h w\]"),
        (vgg, (1, 3, 3, 8), "at least 4 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            net(torch.zeros(shape))


def test_a_pipeline_may_carry_a_tiny_autoencoder(tmp_path: Path) -> None:
    tiny = TAESDConfig(channels=8, latent_channels=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    spec = dataclasses.replace(zoo.model("debug"), vae=tiny)
    made = pipeline.Pipeline(spec, vae=zoo.fresh(spec, "vae", 0).eval())
    found = pipeline.load(made.save(tmp_path / "model"))
    assert isinstance(found.vae, TAESD) and found.spec.vae == tiny
    assert found.noise(0, [0], (32, 16)).shape == (1, 16, 16, 8)
    pictures = torch.rand(2, 3, 16, 8) * 2 - 1
    latents = found.vae.encode(pictures)
    assert latents.shape == (2, 16, 8, 4)
    assert torch.equal(found.vae.decode(latents), found.vae(pictures))
    scaled = TAESD(dataclasses.replace(tiny, scaling=0.5)).eval()
    scaled.load_state_dict(found.vae.state_dict())
    assert torch.equal(scaled.encode(pictures), latents * 0.5)
    assert torch.equal(scaled.decode(latents * 0.5), found.vae.decode(latents))


def test_training_works_through_every_tower() -> None:
    """Losses need gradients with regard to the pictures."""
    pictures = torch.rand(2, 3, 16, 16, requires_grad=True)
    CLIPVision(IMAGE).eval()(pictures).pooled.sum().backward()
    assert pictures.grad is not None and bool(pictures.grad.abs().sum() > 0)
