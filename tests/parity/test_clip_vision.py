"""CLIP's image towers (and both towers as one model) against transformers and open_clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.models.clip import CLIPText, CLIPTextConfig
from snoopi.models.clip_vision import CLIPVision, CLIPVisionConfig
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity
# Head widths of the published towers: B and L 64, H 80, g 88, bigG 104.
HEADS = [64, 80, 88, 104]


def configs(head_dim: int, activation: str) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    image = CLIPVisionConfig(
        width=2 * head_dim,
        mlp_width=96,
        layers=3,
        heads=2,
        patch=8,
        image_size=32,
        projection=24,
        activation=activation,  # type: ignore[arg-type]
    )
    text = CLIPTextConfig(
        vocabulary=60,
        length=12,
        width=48,
        mlp_width=64,
        layers=2,
        heads=3,
        projection=24,
        eos_id=59,
        activation=activation,  # type: ignore[arg-type]
    )
    return image, text


def their_config(image: CLIPVisionConfig, text: CLIPTextConfig) -> Any:
    transformers = oracle.package("transformers")
    vision = {
        "hidden_size": image.width,
        "intermediate_size": image.mlp_width,
        "num_hidden_layers": image.layers,
        "num_attention_heads": image.heads,
        "patch_size": image.patch,
        "image_size": image.image_size,
        "hidden_act": image.activation,
    }
    words = {
        "vocab_size": text.vocabulary,
        "max_position_embeddings": text.length,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": text.activation,
        "eos_token_id": text.eos_id,
    }
    return transformers.CLIPConfig(
        text_config=words, vision_config=vision, projection_dim=image.projection
    )


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """transformers' CLIPModel by our parts: text names, and all others to the image tower."""
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    words = {k: v for k, v in state.items() if k.startswith("text_")}
    return {k: v for k, v in state.items() if k not in words}, words


def pair(head_dim: int, activation: str) -> tuple[CLIPVision, CLIPText, Any]:
    image, text = configs(head_dim, activation)
    theirs = oracle.package("transformers").CLIPModel(their_config(image, text))
    oracle.randomise(theirs)
    ours = CLIPVision(image).eval(), CLIPText(text).eval()
    for net, state in zip(ours, split(theirs.state_dict()), strict=True):
        net.requires_grad_(False).load_state_dict(state, strict=True)
    return *ours, theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("head_dim", HEADS)
def test_image_tower_equals_transformers(head_dim: int, activation: str) -> None:
    ours, _, theirs = pair(head_dim, activation)
    x = randn(3, 3, 32, 32, seed=1)

    def run() -> Any:
        return theirs.vision_model(pixel_values=x, output_hidden_states=True)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, lambda: ours(x), run)

    got, want = ours(x), run()
    assert len(want.hidden_states) == 4
    oracle.close("last", got.last, want.last_hidden_state, report)
    oracle.close("penultimate", got.penultimate, want.hidden_states[-2], report)
    oracle.close("pooled", got.pooled, theirs.visual_projection(want.pooler_output), report)


def test_both_towers_and_the_temperature_give_their_logits() -> None:
    image, words, theirs = pair(64, "quick_gelu")
    with torch.no_grad():
        theirs.logit_scale.fill_(1.7)
        image.load_state_dict(split(theirs.state_dict())[0])
    x, ids = randn(3, 3, 32, 32, seed=1), tokens()
    ids[:, 7:] = 59
    want = theirs(input_ids=ids, pixel_values=x)
    oracle.close("text", unit(words(ids).pooled), want.text_embeds)
    oracle.close("image", unit(image(x).pooled), want.image_embeds)
    assert image.logit_scale is not None
    cosines = unit(image(x).pooled) @ unit(words(ids).pooled).T
    oracle.close("logits", image.logit_scale.exp() * cosines, want.logits_per_image)


def tokens() -> Tensor:
    """Words [2 12] without an eos."""
    return torch.randint(1, 58, (2, 12), generator=torch.Generator().manual_seed(4))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_lone_projected_tower_of_transformers_fits(activation: str) -> None:
    transformers = oracle.package("transformers")
    image, text = configs(64, activation)
    image = CLIPVisionConfig(**{**vars(image), "temperature": False})
    config = their_config(image, text).vision_config
    config.projection_dim = image.projection
    theirs = oracle.randomise(transformers.CLIPVisionModelWithProjection(config))
    ours = CLIPVision(image).eval().requires_grad_(False)
    ours.load_state_dict(split(theirs.state_dict())[0], strict=True)
    x = randn(2, 3, 32, 32)
    oracle.close("pooled", ours(x).pooled, theirs(x).image_embeds)


def from_open_clip(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """open_clip's names to ours, written here from the facts, not through the converter."""
    image: dict[str, Tensor] = {"logit_scale": state["logit_scale"]}
    text: dict[str, Tensor] = {"text_projection.weight": state["text_projection"].T}
    image["visual_projection.weight"] = state["visual.proj"].T
    heads = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
    }
    norms = {
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "ln_final.": "text_model.final_layer_norm.",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, value in state.items():
        to = image if name.startswith("visual.") else text
        if name in heads:
            to[heads[name]] = value
        elif prefix := next((p for p in norms if name.startswith(p)), None):
            to[norms[prefix] + name.removeprefix(prefix)] = value
        elif "resblocks." in name:
            number, _, rest = name.split("resblocks.")[1].partition(".")
            base = f"{'vision' if to is image else 'text'}_model.encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    to[f"{base}self_attn.{part}_proj.{kind}"] = third
            else:
                module, _, kind = rest.rpartition(".")
                to[f"{base}{inner[module]}.{kind}"] = value
    return image, text


def open_clip_model(image: CLIPVisionConfig, text: CLIPTextConfig) -> Any:
    """open_clip's model of these sizes, randomised."""
    theirs = oracle.package("open_clip").CLIP(
        embed_dim=image.projection,
        vision_cfg={
            "image_size": image.image_size,
            "layers": image.layers,
            "width": image.width,
            "head_width": image.width // image.heads,
            "patch_size": image.patch,
            "mlp_ratio": image.mlp_width / image.width,
        },
        text_cfg={
            "context_length": text.length,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_width / text.width,
        },
        quick_gelu=image.activation == "quick_gelu",
    )
    return oracle.randomise(theirs)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("head_dim", HEADS)
def test_both_towers_equal_open_clip(head_dim: int, quick: bool) -> None:
    image, text = configs(head_dim, "quick_gelu" if quick else "gelu")
    theirs = open_clip_model(image, text)
    ours = CLIPVision(image).eval(), CLIPText(text).eval()
    for net, state in zip(ours, from_open_clip(theirs.state_dict()), strict=True):
        net.requires_grad_(False).load_state_dict(state, strict=True)
    x, ids = randn(2, 3, 32, 32, seed=1), tokens()
    ids[0, 5], ids[1, 9] = 59, 59
    ids[0, 6:], ids[1, 10:] = 0, 0  # open_clip pads with 0
    oracle.close("image", ours[0](x).pooled, theirs.encode_image(x))
    oracle.close("text", ours[1](ids).pooled, theirs.encode_text(ids))
    assert ours[0].logit_scale is not None
    assert float(ours[0].logit_scale) == float(theirs.logit_scale)


@pytest.mark.parametrize("name", [n for n in zoo.TOOLS if "clip" in n])
def test_presets_have_transformers_names_and_shapes(name: str) -> None:
    image, text = (zoo.TOOLS[name].networks[p] for p in ("image_encoder", "text_encoder"))
    assert isinstance(image, CLIPVisionConfig) and isinstance(text, CLIPTextConfig)
    with torch.device("meta"):
        theirs = oracle.package("transformers").CLIPModel(their_config(image, text))
    state = split(theirs.state_dict())
    for part, want in zip(("image_encoder", "text_encoder"), state, strict=True):
        shapes = {k: tuple(v.shape) for k, v in want.items()}
        oracle.same_keys(oracle.shapes(zoo.build(name, part)), shapes)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("clip-vit-b-32", "ViT-B-32-quickgelu"),
        ("clip-vit-b-16", "ViT-B-16-quickgelu"),
        ("clip-vit-l-14", "ViT-L-14-quickgelu"),
        ("openclip-vit-h-14", "ViT-H-14"),
        ("openclip-vit-g-14", "ViT-g-14"),
        ("openclip-vit-bigg-14", "ViT-bigG-14"),
    ],
)
def test_presets_have_open_clips_published_sizes(name: str, theirs: str) -> None:
    """Its own configs, at full size on meta: every tensor, heads and activation, too."""
    open_clip = oracle.package("open_clip")
    config = open_clip.get_model_config(theirs)
    with torch.device("meta"):
        net = open_clip.CLIP(**config)
    image, text = zoo.build(name, "image_encoder"), zoo.build(name, "text_encoder")
    assert oracle.count(net) == oracle.count(image) + oracle.count(text)
    assert oracle.count(net.visual) == oracle.count(image) - 1
    for ours, want in zip((image, text), from_open_clip(net.state_dict()), strict=True):
        oracle.same_keys(oracle.shapes(ours), {k: tuple(v.shape) for k, v in want.items()})
    blocks = net.visual.transformer.resblocks, net.transformer.resblocks
    for ours, block in zip((image, text), (b[0] for b in blocks), strict=True):
        assert block.attn.num_heads == ours.config.heads
        quick = type(block.mlp.gelu).__name__ == "QuickGELU"
        assert quick == (ours.config.activation == "quick_gelu")
    assert tuple(net.visual.image_size) == (image.config.image_size,) * 2
