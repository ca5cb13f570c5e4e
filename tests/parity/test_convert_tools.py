"""Files of image towers, Inception, VGG16, TAESD: recognised, converted, equal to the oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from snoopi import zoo
from snoopi.folders import load_tools, read_tools
from snoopi.tokenize import Tokenizer
from tests.parity import matrix, oracle, test_clip_vision
from tests.parity.oracle import randn
from weights_convert.convert import convert, targets
from weights_convert.files import Entry, Weights
from weights_convert.rules import plan
from weights_convert.tools import detect

pytestmark = pytest.mark.parity


def same(architecture: str, layout: str, got: Tensor, want: Tensor) -> None:
    oracle.close(f"{architecture} {layout}", got, want)
    matrix.record(architecture, layout, max(oracle.errors(got, want)))


def clip_outputs(tools: dict[str, nn.Module], ids: Tensor, x: Tensor) -> list[Tensor]:
    return [tools["image_encoder"](x).pooled, tools["text_encoder"](ids).pooled]


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_hugging_face_clip(activation: str, layout: str, tmp_path: Path) -> None:
    transformers = oracle.package("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "hidden_act": activation}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 49408, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    config.architectures = ["CLIPModel"]
    theirs: Any = oracle.randomise(transformers.CLIPModel(config))
    state = {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as older files have
    (tmp_path / "source").mkdir()
    config.save_pretrained(tmp_path / "source")
    if layout == "bin":
        torch.save(state, tmp_path / "source/pytorch_model.bin")
    else:
        save_file(state, tmp_path / "source/model.safetensors")
    convert(tmp_path / "source", tmp_path / "model", check=True)
    tools = load_tools(tmp_path / "model")
    ids = torch.randint(1, 49405, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 20:] = 49407
    x = randn(2, 3, 32, 32)
    with torch.no_grad():
        got = clip_outputs(tools, ids, x)
        out = theirs(input_ids=ids, pixel_values=x)
        want = [theirs.get_image_features(x), theirs.get_text_features(ids)]
    for a, b in zip(got, want, strict=True):
        b = b if isinstance(b, Tensor) else b.pooler_output
        same("CLIP", layout, a, b)
    a, b = (nn.functional.normalize(v, dim=-1) for v in got)
    logits = tools["image_encoder"].logit_scale.exp() * a @ b.T
    oracle.close("logits", logits, out.logits_per_image)
    assert Tokenizer.load(tmp_path / "model/tokenizer").max_length == 77


@pytest.mark.parametrize("nested", [False, True], ids=["open_clip", "HPSv2"])
def test_an_open_clip_file(nested: bool, tmp_path: Path) -> None:
    image, text = test_clip_vision.configs(80, "gelu")
    theirs = test_clip_vision.open_clip_model(image, text)
    state = theirs.state_dict()
    torch.save({"state_dict": state, "epoch": 2} if nested else state, tmp_path / "model.pt")
    arch = tmp_path / "arch"
    arch.mkdir()
    spec = zoo.ToolSpec("tiny", {"image_encoder": image, "text_encoder": text})
    data = {"format": 1, "model": spec.to_json(), "provenance": {}}
    (arch / "snoopi.json").write_text(json.dumps(data))
    convert(tmp_path / "model.pt", tmp_path / "model", arch=str(arch), check=True)
    tools = load_tools(tmp_path / "model")
    ids = torch.randint(
        1, text.eos_id, (2, text.length), generator=torch.Generator().manual_seed(1)
    )
    ids[:, -1] = text.eos_id
    x = randn(2, 3, image.image_size, image.image_size)
    with torch.no_grad():
        got = clip_outputs(tools, ids, x)
        want = [theirs.encode_image(x), theirs.encode_text(ids)]
    for a, b in zip(got, want, strict=True):
        same("CLIP", "HPSv2 .pt" if nested else "open_clip", a, b)


@pytest.mark.parametrize("name", [name for name in zoo.TOOLS if "clip" in name])
def test_full_size_clips_are_recognised(name: str) -> None:
    """By open_clip's names and shapes: B and L need --arch, the others are known."""
    spec = zoo.TOOLS[name]
    with torch.device("meta"):
        nets = {part: zoo.build(spec, part) for part in spec.parts()}
    image, text = spec.networks["image_encoder"], spec.networks["text_encoder"]
    from weights_convert import tools

    shapes: dict[str, tuple[int, ...]] = {}
    layouts = tools._open_clip_layouts(image, text)
    for part, layout in zip(spec.parts(), layouts, strict=True):
        ours = {k: tuple(v.shape) for k, v in nets[part].state_dict().items()}
        from weights_convert.rules import names, source_shape

        shapes |= {n: source_shape(ours[k], rule) for k, (n, rule) in names(ours, layout).items()}

    def read() -> Tensor:
        raise AssertionError("nothing is read")

    entries = {k: Entry(s, torch.float32, read) for k, s in shapes.items()}
    weights = Weights(Path("open_clip.pt"), entries, (Path("open_clip.pt"),), {})
    if not name.startswith("openclip"):
        with pytest.raises(ValueError, match=r"quick_gelu \(OpenAI's\) or gelu .*add --arch"):
            detect(weights, None)
    found = detect(weights, None if name.startswith("openclip") else spec)
    assert found is not None and found.spec == spec
    for part in found.parts:
        _, trouble = plan(targets(spec, part.name), part.layout, part.weights)
        assert not trouble, trouble[:3]


def test_inception_vgg_and_taesd(tmp_path: Path) -> None:
    """Names are the sources' own; recognised, and every tensor equal."""
    for name in ("inception-fid", "vgg16", "taesd"):
        (part,) = zoo.TOOLS[name].parts()
        with torch.device("cpu"):
            net = zoo.fresh(zoo.TOOLS[name], part, 0) if name != "vgg16" else None
        if net is None:  # half a gigabyte: planned only
            wanted = targets(zoo.TOOLS[name], part)
            entries = {
                k: Entry(s, torch.float32, lambda: torch.empty(0)) for k, s in wanted.items()
            }
            weights = Weights(Path("vgg16.pth"), entries, (Path("vgg16.pth"),), {})
            found = detect(weights, None)
            assert found is not None and found.spec == zoo.TOOLS[name]
            continue
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
        convert(tmp_path / f"{name}.pth", tmp_path / name, check=True)
        assert read_tools(tmp_path / name)[0] == zoo.TOOLS[name]
        back = load_tools(tmp_path / name)[part].state_dict()
        assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())
        matrix.record(name, "bin", 0.0)
