"""Files of networks that measure: CLIP models with both towers, Inception, VGG16, TAESD."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from snoopi.models.clip import CLIPTextConfig
from snoopi.models.clip_vision import CLIPVisionConfig
from snoopi.zoo import TOOLS, ToolSpec
from weights_convert import configs, tables
from weights_convert.files import Entry, Weights
from weights_convert.found import Found, Part
from weights_convert.rules import IDENTITY, Layout, Rule

# Channels a head of the image towers, by their width; everywhere else 64.
_HEADS = {1280: 80, 1408: 88, 1664: 104}
_POSITION_IDS = r"vision_model\.embeddings\.position_ids"


def detect(weights: Weights, asked: ToolSpec | None, config: Path | None = None) -> Found | None:
    """The tools in a file, or None. config: Hugging Face's config.json beside it."""
    keys = weights.entries
    if "vision_model.embeddings.class_embedding" in keys:
        return _clip(weights, asked, config, _hugging_face)
    if "visual.class_embedding" in keys:
        return _clip(weights, asked, None, _open_clip)
    for name, key in _MARKS.items():
        if key in keys:
            spec = asked or TOOLS[name]
            (part,) = spec.parts()
            layout = Layout(IDENTITY)
            found = Part(part, spec.parts()[part], keys, layout, weights.files)
            return Found(spec, [found], [])
    return None


# One name that says which network a file holds.
_MARKS = {
    "inception-fid": "Mixed_7c.branch_pool.conv.weight",
    "vgg16": "features.28.weight",
    "taesd": "decoder.layers.18.weight",
}


def _clip(
    weights: Weights,
    asked: ToolSpec | None,
    config: Path | None,
    read: Callable[[Weights, ToolSpec | None, Path | None], tuple[Any, Any, Layout, Layout]],
) -> Found:
    image, text, image_layout, text_layout = read(weights, asked, config)
    mine = ("vision_model.", "visual", "logit_scale")
    halves: tuple[dict[str, Entry], dict[str, Entry]] = ({}, {})
    for key, entry in weights.entries.items():
        halves[not key.startswith(mine)][key] = entry
    parts = [Part("image_encoder", image, halves[0], image_layout, weights.files)]
    if halves[1]:
        parts.append(Part("text_encoder", text, halves[1], text_layout, weights.files))
    networks = {part.name: part.config for part in parts}
    known = [name for name, spec in TOOLS.items() if spec.networks == networks]
    spec = ToolSpec(known[0] if known else asked.arch if asked else "clip", networks)
    # Any padding will do: the text's embedding is read at its end, and nothing looks further.
    pad = 49407 if getattr(text, "activation", "") == "quick_gelu" else 0
    return Found(spec, parts, [None] if text else [], pad_ids=[pad] if text else [])


def _hugging_face(
    weights: Weights, asked: ToolSpec | None, config: Path | None
) -> tuple[Any, Any, Layout, Layout]:
    """CLIPModel: both towers, each with its projection, and logit_scale."""
    shapes = weights.shapes()
    has_text = any(key.startswith("text_model.") for key in shapes)
    base = "vision_model."
    image = _image(
        shapes[f"{base}embeddings.patch_embedding.weight"],
        shapes[f"{base}embeddings.position_embedding.weight"],
        shapes[f"{base}encoder.layers.0.mlp.fc1.weight"],
        configs.count(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        shapes["visual_projection.weight"][0],
        "logit_scale" in shapes,
    )
    text = configs.clip_text_from_hf(shapes) if has_text else None
    image, text = _settled(image, text, asked, config, weights.path)
    drop = (tables.POSITION_IDS, _POSITION_IDS)
    layout = Layout(IDENTITY, drop=drop)
    return image, text, layout, layout


def _open_clip(
    weights: Weights, asked: ToolSpec | None, config: Path | None
) -> tuple[Any, Any, Layout, Layout]:
    """open_clip's CLIP, as HPSv2's files are, too."""
    shapes = weights.shapes()
    image = _image(
        shapes["visual.conv1.weight"],
        shapes["visual.positional_embedding"],
        shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"],
        configs.count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        shapes["visual.proj"][1],
        "logit_scale" in shapes,
    )
    text = None
    if "token_embedding.weight" in shapes:
        bare = {k: s for k, s in shapes.items() if not k.startswith("visual.")}
        text = configs.clip_text_from_openclip(bare)
    image, text = _settled(image, text, asked, config, weights.path)
    return image, text, *_open_clip_layouts(image, text)


def _open_clip_layouts(
    image: CLIPVisionConfig, text: CLIPTextConfig | None
) -> tuple[Layout, Layout]:
    model = "vision_model."
    rules = [
        Rule("logit_scale", "logit_scale"),
        Rule("visual_projection.weight", "visual.proj", transposed=True),
        Rule(f"{model}embeddings.class_embedding", "visual.class_embedding"),
        Rule(f"{model}embeddings.patch_embedding.", "visual.conv1."),
        Rule(f"{model}embeddings.position_embedding.weight", "visual.positional_embedding"),
        Rule(f"{model}pre_layrnorm.", "visual.ln_pre."),
        Rule(f"{model}post_layernorm.", "visual.ln_post."),
        *tables.openclip_layers(
            f"{model}encoder.layers.", "visual.transformer.resblocks.", image.layers
        ),
    ]
    return Layout(rules), tables.clip_openclip(text, "", text.layers) if text else Layout(())


def _image(
    patches: tuple[int, ...],
    positions: tuple[int, ...],
    mlp: tuple[int, ...],
    layers: int,
    projection: int,
    temperature: bool,
) -> CLIPVisionConfig:
    width, _, patch, _ = patches
    return CLIPVisionConfig(
        width=width,
        mlp_width=mlp[0],
        layers=layers,
        heads=max(width // _HEADS.get(width, 64), 1),
        patch=patch,
        image_size=math.isqrt(positions[0] - 1) * patch,
        projection=projection,
        activation="gelu" if width > 1024 else "quick_gelu",
        temperature=temperature,
    )


def _settled(
    image: CLIPVisionConfig,
    text: CLIPTextConfig | None,
    asked: ToolSpec | None,
    config: Path | None,
    path: Path,
) -> tuple[CLIPVisionConfig, CLIPTextConfig | None]:
    """The sizes with what shapes do not show: heads, and the activation of small towers.

    OpenAI's ViT-B and L read quick_gelu, LAION's of the same shapes gelu; a wrong one runs and is
    wrong.
    """
    if asked is not None:
        found: Mapping[str, Any] = asked.networks
        wanted = found.get("image_encoder")
        if isinstance(wanted, CLIPVisionConfig):
            image = dataclasses.replace(wanted, temperature=image.temperature)
            return image, found.get("text_encoder") if text else None
    if config is not None:
        return _from_config(image, text, json.loads(config.read_text(encoding="utf-8")))
    if image.width <= 1024:
        raise ValueError(
            f"{path} does not say whether its towers read quick_gelu (OpenAI's) or gelu (LAION's): "
            f"add --arch clip-vit-b-32, clip-vit-b-16 or clip-vit-l-14 (OpenAI's), or a snoopi.json"
        )
    return image, text


def _from_config(
    image: CLIPVisionConfig, text: CLIPTextConfig | None, data: Mapping[str, Any]
) -> tuple[CLIPVisionConfig, CLIPTextConfig | None]:
    vision = data.get("vision_config", data)
    image = dataclasses.replace(
        image,
        heads=vision.get("num_attention_heads", image.heads),
        activation=vision.get("hidden_act", "quick_gelu"),
    )
    words = data.get("text_config", {})
    if text is not None:
        text = dataclasses.replace(
            text,
            heads=words.get("num_attention_heads", text.heads),
            activation=words.get("hidden_act", "quick_gelu"),
        )
    return image, text
