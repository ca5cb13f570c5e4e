"""Tiny random models of every architecture, in the files that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from snoopi.tokenize import clip_vocabulary
from tests.parity import oracle, test_dit, test_unet, test_vae

VOCABULARY = 49408
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd15": SD_BETAS | {"_class_name": "PNDMScheduler"},
    "sd21": SD_BETAS | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
    "sd21-v": SD_BETAS | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": SD_BETAS | {"_class_name": "EulerDiscreteScheduler"},
    "pixart-512": LINEAR_BETAS | {"_class_name": "DPMSolverMultistepScheduler"},
    "pixart-1024": LINEAR_BETAS | {"_class_name": "DPMSolverMultistepScheduler"},
}
ARCHITECTURES = tuple(SCHEDULERS)


def components(name: str) -> dict[str, nn.Module]:
    """The networks of a model by their folder in diffusers' layout."""
    diffusers = oracle.package("diffusers")
    vae = test_vae.their_config(test_vae.CHANNELS, 8)
    vae["scaling_factor"] = 0.13025 if name == "sdxl" else 0.18215
    nets: dict[str, Any] = {"vae": diffusers.AutoencoderKL(**vae)}
    if name.startswith("pixart"):
        kind = "sizes" if name == "pixart-1024" else "sigma"
        more, config = test_dit.TINY[kind]
        nets["transformer"] = diffusers.PixArtTransformer2DModel(
            **test_dit.their_config(config, more)
        )
        nets["text_encoder"] = t5(config.text_width)
    else:
        base = "sd21" if name == "sd21-v" else name
        nets["unet"] = diffusers.UNet2DConditionModel(**test_unet.TINY[base][0])
        if name == "sdxl":
            nets["text_encoder"] = clip(12, 3, "quick_gelu")
            nets["text_encoder_2"] = clip(12, 4, "gelu", projection=20)
        else:
            nets["text_encoder"] = clip(24, 3, "quick_gelu" if name == "sd15" else "gelu")
    return {part: oracle.randomise(net, seed) for seed, (part, net) in enumerate(nets.items())}


def clip(width: int, layers: int, activation: str, projection: int | None = None) -> Any:
    """A CLIP text encoder with the real vocabulary."""
    transformers = oracle.package("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=activation,
        projection_dim=projection or 512,
        bos_token_id=0,
        eos_token_id=2,
    )
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    config.architectures = [kind]
    return getattr(transformers, kind)(config)


def t5(width: int, vocabulary: int = 64) -> Any:
    """A T5 v1.1 encoder."""
    transformers = oracle.package("transformers")
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=10,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    config.architectures = ["T5EncoderModel"]
    return transformers.T5EncoderModel(config)


def state(net: nn.Module) -> dict[str, Tensor]:
    """A network's tensors under the names of published files."""
    found = {k: v.contiguous() for k, v in net.state_dict().items() if "position_ids" not in k}
    found.pop("encoder.embed_tokens.weight", None)  # T5's embedding has two names
    clip_text = any(k.endswith("embeddings.token_embedding.weight") for k in found)
    if clip_text and not any(k.startswith("text_model.") for k in found):
        found = {f"text_model.{k}": v for k, v in found.items()}
    return found


# --- diffusers folders ----------------------------------------------------------------------------


def save_folder(name: str, nets: dict[str, nn.Module], folder: Path, layout: str) -> Path:
    """layout: safetensors, fp16 (a variant's files), sharded, or bin."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for part, net in nets.items():
        save_component(net, folder / part, layout)
        library = "transformers" if part.startswith("text") else "diffusers"
        index[part] = [library, type(net).__name__]
        if part.startswith("text"):
            place = part.replace("text_encoder", "tokenizer")
            save_tokenizer(name, folder / place)
            index[place] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULERS[name]))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_component(net: nn.Module, folder: Path, layout: str) -> None:
    """config.json and the weights of one network."""
    folder.mkdir(parents=True)
    config: Any = net.config
    if hasattr(net, "save_config"):
        net.save_config(folder)
        stem, torch_stem = "diffusion_pytorch_model", "diffusion_pytorch_model"
    else:
        config.save_pretrained(folder)
        stem, torch_stem = "model", "pytorch_model"
    tensors = state(net)
    if layout == "bin":
        torch.save(tensors, folder / f"{torch_stem}.bin")
    elif layout == "fp16":
        half = {k: v.half() for k, v in tensors.items()}
        save_file(half, folder / f"{stem}.fp16.safetensors", {"format": "pt"})
    elif layout == "sharded":
        names = list(tensors)
        halves = {"1": names[: len(names) // 2], "2": names[len(names) // 2 :]}
        where = {}
        for number, keys in halves.items():
            file = f"{stem}-0000{number}-of-00002.safetensors"
            save_file({k: tensors[k] for k in keys}, folder / file, {"format": "pt"})
            where |= dict.fromkeys(keys, file)
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    else:
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def save_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer's folder of a text encoder, as the hubs have it."""
    folder.mkdir()
    if name.startswith("pixart"):
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -2.0)]
        pieces += [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
        hf = HFTokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
        hf.pre_tokenizer = Metaspace()
        template = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
        hf.post_processor = TemplateProcessing(**template)
        hf.save(str(folder / "tokenizer.json"))
        return
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    second = name.startswith("sd21") or folder.name == "tokenizer_2"
    pad = "!" if second else "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    # SD2.1's two files disagree; this one is wrong.
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))


# --- PixArt's own file ----------------------------------------------------------------------------


def pixart_state(net: nn.Module) -> dict[str, Tensor]:
    """PixArt-alpha's names, written down apart from the tables they are to test."""
    old = state(net)
    get = old.pop
    out: dict[str, Tensor] = {}

    def linear(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = torch.cat([get(f"{name}.{kind}") for name in ours])

    linear("x_embedder.proj", "pos_embed.proj")
    time = "adaln_single.emb"
    linear("t_embedder.mlp.0", f"{time}.timestep_embedder.linear_1")
    linear("t_embedder.mlp.2", f"{time}.timestep_embedder.linear_2")
    for theirs, ours in (("csize", "resolution"), ("ar", "aspect_ratio")):
        if f"{time}.{ours}_embedder.linear_1.weight" in old:
            linear(f"{theirs}_embedder.mlp.0", f"{time}.{ours}_embedder.linear_1")
            linear(f"{theirs}_embedder.mlp.2", f"{time}.{ours}_embedder.linear_2")
    linear("t_block.1", "adaln_single.linear")
    linear("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    linear("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    linear("final_layer.linear", "proj_out")
    out["final_layer.scale_shift_table"] = get("scale_shift_table")
    count = 1 + max(int(k.split(".")[1]) for k in old if k.startswith("transformer_blocks."))
    for i in range(count):
        a, b = f"transformer_blocks.{i}", f"blocks.{i}"
        out[f"{b}.scale_shift_table"] = get(f"{a}.scale_shift_table")
        linear(f"{b}.attn.qkv", *(f"{a}.attn1.to_{n}" for n in "qkv"))
        linear(f"{b}.attn.proj", f"{a}.attn1.to_out.0")
        linear(f"{b}.cross_attn.q_linear", f"{a}.attn2.to_q")
        linear(f"{b}.cross_attn.kv_linear", f"{a}.attn2.to_k", f"{a}.attn2.to_v")
        linear(f"{b}.cross_attn.proj", f"{a}.attn2.to_out.0")
        linear(f"{b}.mlp.fc1", f"{a}.ff.net.0.proj")
        linear(f"{b}.mlp.fc2", f"{a}.ff.net.2")
    assert not old, list(old)
    side = net.config.sample_size // 2
    out["pos_embed"] = torch.zeros(1, side * side, out["x_embedder.proj.weight"].shape[0])
    out["y_embedder.y_embedding"] = torch.zeros(120, 20)
    return out
