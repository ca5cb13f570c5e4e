"""A snoopi model folder into the files that other programs read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from snoopi.errors import writing
from snoopi.folders import read_spec, replacing, tokenizer_folder
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.dit import DiTConfig
from snoopi.models.t5 import T5Config
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ModelSpec, text_part
from weights_convert import tables
from weights_convert.convert import targets
from weights_convert.files import Entry, open_weights, write_safetensors
from weights_convert.rules import Item, Layout, Plan, names

LAYOUTS = ("diffusers", "ldm", "pixart")
Json = dict[str, Any]


def export(source: Path | str, target: Path | str, layout: str) -> list[str]:
    """Write a model folder in another layout; returns lines that say what was written.

    layout: "diffusers" (a folder that DiffusionPipeline.from_pretrained reads), "ldm" (one
    .safetensors of SD1, SD2 or SDXL in the LDM / SGM names) or "pixart" (the transformer alone, in
    PixArt-alpha's names, as .pth or .safetensors). Nothing is cast. Raises ValueError for a model
    that the layout cannot hold, or a target that exists; then nothing is written.
    """
    source, target = Path(source), Path(target)
    spec, _ = read_spec(source)
    if layout not in LAYOUTS:
        raise ValueError(f"--to must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if target.exists():
        raise ValueError(f"{target} exists already: choose another DST")
    parts = {
        name: open_weights(source / f"{name}.safetensors").entries
        for name in spec.parts()
        if (source / f"{name}.safetensors").is_file()
    }
    if not parts:
        raise ValueError(f"{source} holds no network")
    for name, entries in parts.items():
        if {k: e.shape for k, e in entries.items()} != targets(spec, name):
            raise ValueError(f"{source / name}.safetensors does not fit its snoopi.json")
    if layout == "diffusers":
        return _diffusers(spec, parts, source, target)
    tensors, lines = _ldm(spec, parts) if layout == "ldm" else _pixart(spec, parts)
    _write_file(tensors, target, layout)
    return [*lines, f"wrote {target} ({len(tensors)} tensors)"]


def _write_file(tensors: Mapping[str, Entry], target: Path, layout: str) -> None:
    if target.suffix == ".safetensors":
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(target, tensors, {"format": "pt"})
    elif target.suffix == ".pth" and layout == "pixart":
        partial = target.with_name(f".{target.name}.partial")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                state = {name: entry.read().clone() for name, entry in tensors.items()}
                torch.save({"state_dict": state}, partial)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
    else:
        kinds = ".safetensors or .pth" if layout == "pixart" else ".safetensors"
        raise ValueError(f"DST must end in {kinds} for --to {layout}, got {target.name}")


def backward(layout: Layout, network: Mapping[str, Entry]) -> dict[str, Entry]:
    """A network's tensors under a layout's names."""
    found = names(network, layout)
    items = [
        Item(target, name, rule, network[target].shape) for target, (name, rule) in found.items()
    ]
    return Plan(items).backward(network)


# --- single files ---------------------------------------------------------------------------------


def _ldm(
    spec: ModelSpec, parts: Mapping[str, Mapping[str, Entry]]
) -> tuple[dict[str, Entry], list[str]]:
    """SD1 and SD2 in LDM's names, SDXL in SGM's."""
    if not isinstance(spec.backbone, UNetConfig):
        raise ValueError(f"--to ldm is for UNets, not for {spec.arch}; use --to pixart")
    out: dict[str, Entry] = {}
    lines = []
    if "backbone" in parts:
        out |= backward(tables.unet_ldm(spec.backbone), parts["backbone"])
    if "vae" in parts:
        if not isinstance(spec.vae, VAEConfig):
            raise ValueError(f"--to ldm needs an AutoencoderKL, got {type(spec.vae).__name__}")
        out |= backward(tables.vae_ldm(spec.vae), parts["vae"])
    for i, text in enumerate(spec.text):
        if text_part(i) not in parts or not isinstance(text.config, CLIPTextConfig):
            continue
        layout = _ldm_text(spec, i, text.config)
        out |= backward(layout, parts[text_part(i)])
        if layout.prefix == tables.LDM_OPENCLIP:
            lines.append(
                f"{text_part(i)}: {text.config.layers} layers; OpenCLIP's last one, which Stable "
                f"Diffusion 2 never reads, is not in a model folder"
            )
    return out, lines


def _ldm_text(spec: ModelSpec, index: int, config: CLIPTextConfig) -> Layout:
    if len(spec.text) == 2:
        if index == 0:
            return tables.clip_hf(tables.SGM_CLIP)
        return tables.clip_openclip(config, tables.SGM_OPENCLIP)
    if config.activation == "quick_gelu":
        return tables.clip_hf(tables.LDM_CLIP)
    return tables.clip_openclip(config, tables.LDM_OPENCLIP)


def _pixart(
    spec: ModelSpec, parts: Mapping[str, Mapping[str, Entry]]
) -> tuple[dict[str, Entry], list[str]]:
    if not isinstance(spec.backbone, DiTConfig) or "backbone" not in parts:
        raise ValueError(f"--to pixart is for a PixArt transformer, not for {spec.arch}")
    others = [name for name in parts if name != "backbone"]
    lines = [f"the file holds the transformer alone, not {', '.join(others)}"] if others else []
    return backward(tables.dit_pixart(spec.backbone), parts["backbone"]), lines


# --- diffusers' folder ----------------------------------------------------------------------------


def _diffusers(
    spec: ModelSpec, parts: Mapping[str, Mapping[str, Entry]], source: Path, target: Path
) -> list[str]:
    index, lines = _index(spec), []
    with replacing(target) as temporary:
        for name, entries in parts.items():
            folder = temporary / _folder_name(spec, name)
            folder.mkdir()
            library, kind, config = _component(spec, name)
            index[folder.name] = [library, kind]
            _json(folder / "config.json", config | _dtype(library, entries))
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            write_safetensors(folder / f"{stem}.safetensors", entries, {"format": "pt"})
            lines.append(f"{folder.name}: {kind}, {len(entries)} tensors")
        for i in range(len(spec.text)):
            name = tokenizer_folder(i)
            if (source / name).is_dir():
                kind = _write_tokenizer(spec, i, Tokenizer.load(source / name), temporary / name)
                index[name] = ["transformers", kind]
        (temporary / "scheduler").mkdir()
        scheduler = _scheduler(spec)
        _json(temporary / "scheduler/scheduler_config.json", scheduler)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        _json(temporary / "model_index.json", index)
    return [*lines, f"wrote {target} (diffusers, {index['_class_name']})"]


def _json(path: Path, data: Mapping[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _dtype(library: str, entries: Mapping[str, Entry]) -> Json:
    kind = str(next(iter(entries.values())).dtype).removeprefix("torch.")
    return {"dtype": kind} if library == "transformers" else {}


def _folder_name(spec: ModelSpec, part: str) -> str:
    if part != "backbone":
        return part
    return "unet" if isinstance(spec.backbone, UNetConfig) else "transformer"


def _index(spec: ModelSpec) -> Json:
    if isinstance(spec.backbone, DiTConfig):
        return {"_class_name": "PixArtAlphaPipeline"}
    if len(spec.text) == 2:
        return {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": spec.null == "zeros",
            "image_encoder": [None, None],
            "feature_extractor": [None, None],
        }
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }


def _component(spec: ModelSpec, part: str) -> tuple[str, str, Json]:
    """Library, class and config.json of a network."""
    config = spec.parts()[part]
    if isinstance(config, UNetConfig):
        return "diffusers", "UNet2DConditionModel", _unet(spec, config)
    if isinstance(config, DiTConfig):
        return "diffusers", "PixArtTransformer2DModel", _dit(config)
    if isinstance(config, VAEConfig):
        return "diffusers", "AutoencoderKL", _vae(spec, config)
    if isinstance(config, T5Config):
        return "transformers", "T5EncoderModel", _t5(config)
    if isinstance(config, CLIPTextConfig):
        kind = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
        return "transformers", kind, _clip(config, kind)
    raise ValueError(f"diffusers has no class for {part}, a {type(config).__name__}")


def _unet(spec: ModelSpec, c: UNetConfig) -> Json:
    if c.mid_depth != c.depth[-1] and c.depth[-1]:
        raise ValueError("diffusers' UNet has the last level's depth in the middle")
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depth]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    data: Json = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "sample_size": spec.latent_size,
        "block_out_channels": list(c.channels),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": c.resnets,
        "transformer_layers_per_block": [*(d or 1 for d in c.depth[:-1]), c.mid_depth],
        "attention_head_dim": list(c.heads),  # the number of heads, in spite of its name
        "cross_attention_dim": c.text_width,
        "use_linear_projection": c.linear_proj,
        "norm_num_groups": c.norm_groups,
    }
    if c.guidance_width:
        data["time_cond_proj_dim"] = c.guidance_width
    if c.pooled_width:
        data |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": c.size_width,
            "projection_class_embeddings_input_dim": c.pooled_width + 6 * c.size_width,
        }
    return data


def _vae(spec: ModelSpec, c: VAEConfig) -> Json:
    count = len(c.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": c.in_channels,
        "out_channels": c.in_channels,
        "latent_channels": c.latent_channels,
        "block_out_channels": list(c.channels),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": c.resnets,
        "norm_num_groups": c.norm_groups,
        "scaling_factor": c.scaling,
        "sample_size": spec.latent_size * c.factor,
        "force_upcast": c.scaling == 0.13025,  # SDXL's overflows in fp16
    }


def _dit(c: DiTConfig) -> Json:
    return {
        "_class_name": "PixArtTransformer2DModel",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "patch_size": c.patch,
        "num_layers": c.layers,
        "num_attention_heads": c.heads,
        "attention_head_dim": c.head_dim,
        "cross_attention_dim": c.width,
        "caption_channels": c.text_width,
        "sample_size": c.sample_size,
        "interpolation_scale": c.interpolation,
        "use_additional_conditions": c.size_embed,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def _clip(c: CLIPTextConfig, kind: str) -> Json:
    return {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": c.vocabulary,
        "max_position_embeddings": c.length,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "hidden_act": c.activation,
        "projection_dim": c.projection or 512,
        "bos_token_id": c.eos_id - 1,
        "eos_token_id": c.eos_id,
        "pad_token_id": c.eos_id,
        "layer_norm_eps": 1e-5,
    }


def _t5(c: T5Config) -> Json:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": c.vocabulary,
        "d_model": c.width,
        "d_ff": c.mlp_width,
        "d_kv": c.head_dim,
        "num_layers": c.layers,
        "num_heads": c.heads,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _scheduler(spec: ModelSpec) -> Json:
    """A DDIM scheduler with the model's betas and prediction; users may choose another."""
    schedule = spec.schedule
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if schedule.prediction not in kinds:
        raise ValueError(f"diffusers' schedulers have no prediction {schedule.prediction!r}")
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": schedule.betas,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.steps,
        "prediction_type": kinds[schedule.prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if spec.one_step else "leading",
    }


def _write_tokenizer(spec: ModelSpec, index: int, tokenizer: Tokenizer, folder: Path) -> str:
    """A tokenizer's folder as transformers reads it; returns the class."""
    folder.mkdir()
    hf, length = tokenizer.tokenizer, tokenizer.max_length
    pad = hf.id_to_token(tokenizer.pad_id)
    model = json.loads(hf.to_str())["model"]
    if isinstance(spec.text[index].config, CLIPTextConfig) and model["type"] == "BPE":
        kind = "CLIPTokenizer"
        _json(folder / "vocab.json", model["vocab"])
        pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        with writing(folder / "merges.txt"):
            text = "\n".join(["#version: 0.2", *pairs]) + "\n"
            (folder / "merges.txt").write_text(text, encoding="utf-8")
        special = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad,
        }
    else:
        kind = "T5Tokenizer" if model["type"] == "Unigram" else "PreTrainedTokenizerFast"
        tokenizer.save(folder)
        special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    _json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": kind, "model_max_length": length}
    _json(folder / "tokenizer_config.json", special | more)
    return kind


# --- command --------------------------------------------------------------------------------------


def add_parsers(kinds: Any) -> None:
    """Register `export`."""
    kind = kinds.add_parser(
        "export",
        help="a model folder into other programs' files",
        description="A model folder in another layout. diffusers: a folder that "
        "DiffusionPipeline.from_pretrained reads; ldm: one .safetensors of SD1, SD2 or SDXL in the "
        "LDM / SGM names; pixart: the transformer alone in PixArt-alpha's names, .pth or "
        ".safetensors. Nothing is cast.",
    )
    kind.add_argument("source", type=Path, metavar="SRC", help="a snoopi model folder")
    kind.add_argument("target", type=Path, metavar="DST", help="what to write")
    kind.add_argument("--to", choices=LAYOUTS, required=True, help="the layout")
    kind.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    print("\n".join(export(options.source, options.target, options.to)))
