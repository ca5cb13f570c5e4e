"""What a path holds: the networks, their sizes, and how the files name them.

Recognised from names and shapes, from config.json where there is one. What weights cannot say (that
a network predicts v, at which size a DiT was trained) is asked for with --arch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snoopi.folders import SPEC_FILE, read_spec, read_tools
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.dit import DiTConfig
from snoopi.models.t5 import T5Config
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig
from snoopi.zoo import PRESETS, ModelSpec, TextSpec, ToolSpec, preset, text_part
from weights_convert import configs, tables, tools
from weights_convert.files import INDEX, PICKLED, Entry, Weights, open_weights
from weights_convert.found import Found, Part
from weights_convert.rules import Layout, names

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_MODEL_TYPES = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
_EMA_MOST = 100  # fewer names of an average are none
# Single files' text encoders: prefix, index among the text encoders, and whether OpenCLIP named it.
_SINGLE_TEXT = (
    (tables.LDM_CLIP, 0, False),
    (tables.LDM_OPENCLIP, 0, True),
    (tables.SGM_CLIP, 0, False),
    (tables.SGM_OPENCLIP, 1, True),
)

# A config.json's class: the part it is, its sizes, its names.
_CLASSES: dict[str, tuple[str, Callable[..., Any], Callable[..., Layout]]] = {
    "UNet2DConditionModel": ("backbone", configs.unet, tables.unet_diffusers),
    "PixArtTransformer2DModel": ("backbone", configs.dit, tables.dit_diffusers),
    "Transformer2DModel": ("backbone", configs.dit, tables.dit_diffusers),
    "AutoencoderKL": ("vae", configs.vae, tables.vae_diffusers),
    "CLIPTextModel": ("text_encoder", configs.clip_text, tables.clip_hf),
    "CLIPTextModelWithProjection": ("text_encoder", configs.clip_text, tables.clip_hf),
    "T5EncoderModel": ("text_encoder", configs.t5, tables.t5_hf),
    "T5ForConditionalGeneration": ("text_encoder", configs.t5, tables.t5_hf),
}
# Networks of a diffusers folder that no picture here needs.
_LEFT_OUT = ("safety_checker", "image_encoder")


def detect(source: Path, arch: str | None = None, prefer: str = "ema") -> Found:
    """Recognise a path. arch: a preset, or a snoopi.json (or its folder) whose model this is.

    Raises ValueError for what is not recognised, and for what only --arch can say.
    """
    asked = _asked(arch)
    tool = asked if isinstance(asked, ToolSpec) else None
    model = asked if isinstance(asked, ModelSpec) else None
    if source.is_dir() and (source / "model_index.json").is_file() and tool is None:
        return _diffusers(source, model, prefer)
    if source.is_dir() and (source / SPEC_FILE).is_file():
        raise ValueError(f"{source} is a model folder already; `export` writes other layouts")
    weights, config = _weights(source, prefer)
    if not weights.entries:
        raise ValueError(f"{weights.path} holds no tensor")
    try:
        found = None if model else tools.detect(weights, tool, config)
    except (KeyError, IndexError, ArithmeticError) as error:
        raise _unreadable(weights.path, error) from error
    if found is not None:
        return found
    if tool is not None:
        raise ValueError(f"{weights.path} does not hold {tool.arch}, as --arch says")
    if config is not None:
        return _component(source, model, prefer)
    return _file(weights, model, prefer)


def _weights(source: Path, prefer: str) -> tuple[Weights, Path | None]:
    """The file of weights that a path means, and the config.json beside it in a component."""
    if not source.is_dir():
        return open_weights(source, prefer), None
    config = source / "config.json"
    if config.is_file():
        return open_weights(component_file(source, prefer), prefer), config
    files = _weight_files(source)
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise ValueError(
            f"{source} is no diffusers folder (it holds neither model_index.json nor "
            f"config.json), and of files of weights it must hold one, found: {names}"
        )
    return open_weights(files[0], prefer), None


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: its names are those of a known kind, but the sizes cannot be read from it "
        f"({error!r}): is it whole?"
    )


def _asked(arch: str | None) -> ModelSpec | ToolSpec | None:
    """The spec that --arch names."""
    if arch is None:
        return None
    path = Path(arch)
    if path.name == SPEC_FILE and path.is_file():
        path = path.parent
    if (path / SPEC_FILE).is_file():
        try:
            return read_spec(path)[0]
        except ValueError as error:
            try:
                return read_tools(path)[0]
            except ValueError:
                raise error from None
    return preset(arch)


# --- folders --------------------------------------------------------------------------------------


def _diffusers(folder: Path, asked: ModelSpec | None, prefer: str) -> Found:
    """A pipeline's folder: one folder a network, each with its config.json."""
    index = _json(folder / "model_index.json")
    backbones = [n for n in ("unet", "transformer") if (folder / n).is_dir()]
    if len(backbones) > 1:
        raise ValueError(f"{folder} holds both unet and transformer: expected one of them")
    known = {*backbones, "vae", "text_encoder", "text_encoder_2"}
    strange = [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and value[:1] in (["diffusers"], ["transformers"])
        and (folder / name).is_dir()
        and name not in known
        and any(_weight_files(folder / name))
        and name not in _LEFT_OUT
    ]
    if strange:
        raise ValueError(f"{folder} holds {', '.join(strange)}, of which snoopi has no network")
    parts = [
        _from_folder(folder / name, None, prefer) for name in sorted(known) if _has(folder, name)
    ]
    parts = [dataclasses.replace(p, name=_part_name(p.files[0].parent.name)) for p in parts]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = _json(scheduler) if scheduler.is_file() else None
    spec = _spec({part.name: part.config for part in parts}, asked, schedule, folder)
    tokenizers = [folder / name for name in ("tokenizer", "tokenizer_2")][: len(spec.text)]
    found = [path if path.is_dir() else None for path in tokenizers]
    notes = [f"left out on purpose: {name}" for name in _LEFT_OUT if _has(folder, name)]
    says = (schedule or {}).get("prediction_type", "epsilon")
    if schedule and asked and configs.schedule(schedule).prediction != asked.schedule.prediction:
        notes.append(f"scheduler_config.json says {says}; --arch {asked.arch} goes before it")
    return Found(spec, parts, found, notes=notes)


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_dir()


def _part_name(name: str) -> str:
    return "backbone" if name in ("unet", "transformer", "unet_ema") else name


def _component(folder: Path, asked: ModelSpec | None, prefer: str) -> Found:
    """One network's folder, with its config.json."""
    part = _from_folder(folder, asked, prefer)
    spec = _spec({part.name: part.config}, asked, None, folder)
    tokenizers = [None] * len(spec.text)
    place = _text_index(part, spec)
    if place is not None and place > 0:
        part = dataclasses.replace(part, name=text_part(place))
    return Found(spec, [part], tokenizers)


def _weight_files(folder: Path) -> list[Path]:
    """Files of weights in a folder, an index in place of its shards."""
    kinds = (".safetensors", *PICKLED)
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds or p.name.endswith(INDEX))
    if indices := [p for p in files if p.name.endswith(".index.json")]:
        shards = set(_json(indices[0]).get("weight_map", {}).values())
        files = [p for p in files if p.name not in shards]
    return files


def component_file(folder: Path, prefer: str) -> Path:
    """The file of weights in a component's folder: the plain one before variants."""
    variants = ("", "fp16", "bf16", "fp32", "non_ema")
    if prefer == "raw":
        variants = ("non_ema", *variants[:-1])
    for variant in variants:
        dot = f".{variant}" if variant else ""
        for kind in (".safetensors", ".bin"):
            for stem in _STEMS:
                for name in (
                    f"{stem}{dot}{kind}",
                    f"{stem}{kind}.index{dot}.json",
                    f"{stem}{dot}{kind}.index.json",
                ):
                    if (folder / name).is_file():
                        return folder / name
    found = ", ".join(path.name for path in _weight_files(folder)) or "none"
    raise ValueError(f"{folder} holds no {_STEMS[0]} or model file of weights, found: {found}")


def _from_folder(folder: Path, asked: ModelSpec | None, prefer: str) -> Part:
    """A network from config.json and its file."""
    data = _json(folder / "config.json")
    classes = data.get("architectures")
    if not isinstance(classes, list | None):
        raise ValueError(f"{folder / 'config.json'}: architectures must be a list, got {classes}")
    first = classes[0] if classes else None
    kind = data.get("_class_name") or first or _MODEL_TYPES.get(str(data.get("model_type")))
    if not isinstance(kind, str) or kind not in _CLASSES:
        near = ", ".join(_CLASSES)
        raise ValueError(f"{folder / 'config.json'}: {kind!r} is not one of {near}")
    name, config, layout = _CLASSES[kind]
    weights = open_weights(component_file(folder, prefer), prefer)
    try:
        sizes = config(data)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / 'config.json'}: {_reason(error)}") from error
    files = (weights.path, *(f for f in weights.files if f != weights.path))
    return Part(name, sizes, weights.entries, layout(), files)


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object, got {type(data).__name__}")
    return data


# --- files ----------------------------------------------------------------------------------------


def _file(weights: Weights, asked: ModelSpec | None, prefer: str) -> Found:
    """A file without a config."""
    keys = weights.entries
    try:
        if any(key.startswith((tables.LDM_UNET, tables.LDM_VAE)) for key in keys):
            return _single(weights, asked, prefer)
        part = _bare(weights, asked)
        spec = _spec({part.name: part.config}, asked, None, weights.path)
    except (KeyError, IndexError, ArithmeticError) as error:
        raise _unreadable(weights.path, error) from error
    place = _text_index(part, spec)
    if place is not None and place > 0:
        part = dataclasses.replace(part, name=text_part(place))
    return Found(spec, [part], [None] * len(spec.text))


def _bare(weights: Weights, asked: ModelSpec | None) -> Part:
    """One network in a file of its own."""
    keys, shapes, path = weights.entries, weights.shapes(), weights.path

    def part(name: str, config: Any, layout: Layout) -> Part:
        return Part(name, config, keys, layout, weights.files)

    backbone = None if asked is None else asked.backbone
    scaling = 0.18215 if asked is None else getattr(asked.vae, "scaling", 0.18215)
    asked_text = [] if asked is None else [text.config for text in asked.text]
    if "input_blocks.0.0.weight" in keys:
        sizes = _sizes(UNetConfig, lambda: configs.unet_from_ldm(shapes), backbone)
        return part("backbone", sizes, tables.unet_ldm(sizes, ""))
    if "down_blocks.0.resnets.0.conv1.weight" in keys and "time_embedding.linear_1.weight" in keys:
        sizes = _sizes(UNetConfig, lambda: configs.unet_from_diffusers(shapes), backbone)
        return part("backbone", sizes, tables.unet_diffusers())
    if any(re.fullmatch(r"(|base_model\.|model\.)x_embedder\.proj\.weight", key) for key in keys):
        return _pixart(weights, backbone)
    if "pos_embed.proj.weight" in keys:
        side = _sample_size(path, keys, "pos_embed.pos_embed", backbone)
        sizes = _sizes(
            DiTConfig, lambda: configs.dit_from_shapes(shapes, lambda name: name, side), backbone
        )
        return part("backbone", sizes, tables.dit_diffusers())
    if "encoder.down.0.block.0.conv1.weight" in keys:
        sizes = _sizes(
            VAEConfig, lambda: configs.vae_from_ldm(shapes, scaling), asked and asked.vae
        )
        return part("vae", sizes, tables.vae_ldm(sizes, ""))
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in keys:
        sizes = _sizes(
            VAEConfig, lambda: configs.vae_from_diffusers(shapes, scaling), asked and asked.vae
        )
        return part("vae", sizes, tables.vae_diffusers())
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in keys:
        sizes = _sizes(T5Config, lambda: configs.t5_from_hf(shapes), *asked_text)
        return part("text_encoder", sizes, tables.t5_hf())
    embedding = "embeddings.token_embedding.weight"
    if embedding in keys or f"text_model.{embedding}" in keys:
        sizes = configs.clip_text_from_hf(shapes)
        sizes = _sizes(CLIPTextConfig, lambda: sizes, *_like(sizes, asked_text))
        return part("text_encoder", sizes, tables.clip_hf())
    if "lora" in " ".join(list(keys)[:3]).lower():
        raise ValueError(f"{path} is a LoRA: use `python -m weights_convert lora` or `merge`")
    raise ValueError(f"{path} is not recognised: its first names are {', '.join(list(keys)[:3])}")


def _sizes(kind: type, infer: Callable[[], Any], *asked: Any) -> Any:
    """What --arch says of this kind of network, else what the shapes say.

    The plan compares all shapes later; heads and norm groups are not visible in them.
    """
    same = [config for config in asked if isinstance(config, kind)]
    try:
        sizes = infer()
        # An --arch of other sizes is told so, where these are a known network's.
        known = [spec for spec in PRESETS.values() if sizes in spec.parts().values()]
        return sizes if known or not same else same[0]
    except (ValueError, LookupError, ArithmeticError) as error:
        if same:  # the plan says what is missing
            return same[0]
        if not isinstance(error, ValueError):
            raise
        raise ValueError(
            f"the sizes that its shapes show make no known network ({error}): "
            f"add --arch with the snoopi.json of such a model"
        ) from error


def _like(sizes: CLIPTextConfig, asked: Sequence[Any]) -> list[Any]:
    """Of several text encoders that --arch names, the one with this one's widths."""
    shown = ("vocabulary", "length", "width", "mlp_width", "layers", "projection")
    return [
        config
        for config in asked
        if isinstance(config, CLIPTextConfig)
        and all(getattr(config, name) == getattr(sizes, name) for name in shown)
    ]


def _pixart(weights: Weights, backbone: Any) -> Part:
    """PixArt's own file; some training programs put a prefix before its names."""
    suffix = "x_embedder.proj.weight"
    prefix = next(k for k in weights.entries if k.endswith(suffix))[: -len(suffix)]
    entries = {k: v for k, v in weights.entries.items() if k.startswith(prefix)}
    if strange := [k for k in weights.entries if k not in entries]:
        raise ValueError(f"{weights.path} has an unexpected {strange[0]}")
    side = _sample_size(weights.path, entries, f"{prefix}pos_embed", backbone)
    layout = tables.dit_pixart(DiTConfig(), prefix)

    def theirs(name: str) -> str:
        return names([name], layout)[name][0]

    shapes = {name: entry.shape for name, entry in entries.items()}
    sizes = _sizes(DiTConfig, lambda: configs.dit_from_shapes(shapes, theirs, side), backbone)
    return Part("backbone", sizes, entries, tables.dit_pixart(sizes, prefix), weights.files)


def _sample_size(path: Path, entries: Mapping[str, Entry], positions: str, backbone: Any) -> int:
    """Latent pixels a side at which a DiT was trained: from its positions, or --arch."""
    if isinstance(backbone, DiTConfig):
        return backbone.sample_size
    if positions in entries:
        return 2 * math.isqrt(entries[positions].shape[1])
    if any("csize_embedder" in key or "resolution_embedder" in key for key in entries):
        return 128
    raise ValueError(
        f"{path} does not say at which size it was trained: "
        f"add --arch pixart-256, pixart-512 or a recipe's name"
    )


def _single(weights: Weights, asked: ModelSpec | None, prefer: str) -> Found:
    """An LDM or SGM file: all networks of a model under prefixes."""
    entries = weights.entries
    groups: dict[str, dict[str, Entry]] = {}
    prefixes = (tables.LDM_UNET, tables.LDM_VAE, *(prefix for prefix, _, _ in _SINGLE_TEXT))
    averaged = {k: v for k, v in entries.items() if k.startswith("model_ema.")}
    for key, entry in entries.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is not None and not _dropped(key):
            groups.setdefault(prefix, {})[key] = entry
    parts = []
    if tables.LDM_UNET in groups:
        parts.append(_single_unet(weights, groups[tables.LDM_UNET], averaged, asked, prefer))
    if tables.LDM_VAE in groups:
        scaling = 0.13025 if any(k.startswith("conditioner.") for k in entries) else 0.18215
        shapes = _bare_shapes(groups[tables.LDM_VAE], tables.LDM_VAE)
        sizes = _sizes(
            VAEConfig, lambda: configs.vae_from_ldm(shapes, scaling), asked and asked.vae
        )
        layout = tables.vae_ldm(sizes)
        parts.append(Part("vae", sizes, groups[tables.LDM_VAE], layout, weights.files))
    for prefix, index, openclip in _SINGLE_TEXT:
        if prefix in groups:
            name, text = text_part(index), None if asked is None else asked.text[index].config
            sizes, layout = _single_text(groups[prefix], prefix, openclip, text)
            parts.append(Part(name, sizes, groups[prefix], layout, weights.files))
    used = {key for group in groups.values() for key in group}
    left = [k for k in entries if k not in used and k not in averaged and not _dropped(k)]
    spec = _spec({part.name: part.config for part in parts}, asked, None, weights.path)
    taken = {key for part in parts for key in part.weights}
    out = [key for key in entries if key not in taken and key not in left]
    notes = _left_out(out)
    return Found(spec, parts, [None] * len(spec.text), left, notes)


def _left_out(keys: Sequence[str]) -> list[str]:
    """What of a single file is not taken: one of two spellings of the UNet, and what is none."""
    kinds = {
        "model_ema.": "averaged weights",
        tables.LDM_UNET: "raw UNet weights",
        "": "of schedules and the like",
    }
    counts = dict.fromkeys(kinds.values(), 0)
    for key in keys:
        counts[next(kind for start, kind in kinds.items() if key.startswith(start))] += 1
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return [f"left out on purpose: {said}"]


def _dropped(key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in tables.LDM_DROP)


def _bare_shapes(entries: Mapping[str, Entry], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name[len(prefix) :]: entry.shape for name, entry in entries.items()}


def _single_unet(
    weights: Weights,
    raw: Mapping[str, Entry],
    averaged: Mapping[str, Entry],
    asked: ModelSpec | None,
    prefer: str,
) -> Part:
    shapes = _bare_shapes(raw, tables.LDM_UNET)
    backbone = asked and asked.backbone
    sizes = _sizes(UNetConfig, lambda: configs.unet_from_ldm(shapes), backbone)
    layout = tables.unet_ldm(sizes)
    if prefer == "raw" or len(averaged) < min(_EMA_MOST, len(raw)):
        return Part("backbone", sizes, raw, layout, weights.files)
    # Averages of other networks are left out with what single files hold besides networks.
    mine = {k: v for k, v in averaged.items() if k.startswith("model_ema.diffusion_model")}
    layout = dataclasses.replace(layout, drop=())
    return Part("backbone", sizes, mine, layout, weights.files, tables.ema_name)


def _single_text(
    entries: Mapping[str, Entry], prefix: str, openclip: bool, asked: Any
) -> tuple[Any, Layout]:
    shapes = _bare_shapes(entries, prefix)
    if not openclip:
        sizes = configs.clip_text_from_hf(shapes) if asked is None else asked
        return sizes, tables.clip_hf(prefix)
    depth = configs.count(shapes, r"transformer\.resblocks\.(\d+)\.")
    if prefix == tables.LDM_OPENCLIP:
        # SD2 reads the layer before the last: its text encoder ends there.
        sizes = asked or configs.clip_text_from_openclip(shapes, depth - 1)
    else:
        sizes = asked or configs.clip_text_from_openclip(shapes)
    return sizes, tables.clip_openclip(sizes, prefix, depth)


# --- the model that the networks make up ----------------------------------------------------------


def _spec(
    found: Mapping[str, Any], asked: ModelSpec | None, scheduler: dict[str, Any] | None, path: Path
) -> ModelSpec:
    """The ModelSpec: what was found, in the preset that --arch names or that fits it."""
    spec = asked or _family(found, scheduler, path)
    if scheduler is not None and asked is None:
        try:
            spec = dataclasses.replace(spec, schedule=configs.schedule(scheduler))
        except ValueError as error:
            raise ValueError(f"{path / 'scheduler' / 'scheduler_config.json'}: {error}") from error
    if asked is not None:
        _check_asked(found, asked, path)
    changes: dict[str, Any] = {}
    if "backbone" in found:
        changes["backbone"] = found["backbone"]
    if "vae" in found:
        changes["vae"] = found["vae"]
    if isinstance(found.get("backbone"), DiTConfig):
        changes["latent_size"] = found["backbone"].sample_size
    texts = list(spec.text)
    for i, text in enumerate(texts):
        config = found.get(text_part(i))
        if config is not None and _same_kind(config, text.config):
            texts[i] = dataclasses.replace(text, config=config)
    if len(found) == 1 and (lone := next(iter(found.values()))) and _is_text(lone):
        place = _place(lone, spec.text)
        if place is None:
            raise ValueError(f"{path}: {spec.arch} has no text encoder of this kind")
        texts = list(spec.text)
        texts[place] = dataclasses.replace(texts[place], config=lone)
    changes["text"] = tuple(texts)
    return dataclasses.replace(spec, **changes)


def _is_text(config: Any) -> bool:
    return isinstance(config, (CLIPTextConfig, T5Config))


def _same_kind(a: Any, b: Any) -> bool:
    return type(a) is type(b)


def _place(config: Any, texts: Sequence[TextSpec]) -> int | None:
    """The text encoder that a lone file is: equal sizes, else the first of its kind."""
    equal = [i for i, text in enumerate(texts) if text.config == config]
    kind = [
        i
        for i, text in enumerate(texts)
        if _same_kind(text.config, config)
        and bool(getattr(text.config, "projection", None))
        == bool(getattr(config, "projection", None))
    ]
    return next(iter(equal or kind), None)


def _text_index(part: Part, spec: ModelSpec) -> int | None:
    if part.name != "text_encoder":
        return None
    return next((i for i, text in enumerate(spec.text) if text.config == part.config), None)


def _check_asked(found: Mapping[str, Any], asked: ModelSpec, path: Path) -> None:
    """ValueError where the sizes are those of another preset than the one asked for."""
    sizes = found.get("backbone")
    if sizes is None or sizes == asked.backbone:
        return
    fits = [name for name, spec in PRESETS.items() if spec.backbone == sizes]
    if type(sizes) is not type(asked.backbone) or fits:
        what = ", ".join(fits) or type(sizes).__name__.removesuffix("Config")
        raise ValueError(f"{path} has the sizes of {what}, not of {asked.arch} as --arch says")


def _family(found: Mapping[str, Any], scheduler: dict[str, Any] | None, path: Path) -> ModelSpec:
    """The preset that fits."""
    backbone = found.get("backbone")
    if isinstance(backbone, UNetConfig):
        return preset(_unet_family(backbone, scheduler, path))
    if isinstance(backbone, DiTConfig):
        if backbone.size_embed:
            return preset("pixart-1024")
        return preset("pixart-256" if backbone.sample_size <= 32 else "pixart-512")
    for config in found.values():
        if isinstance(config, VAEConfig):
            return preset("sdxl" if config.scaling == 0.13025 else "sd15")
        if isinstance(config, T5Config):
            return preset("pixart-512")
        if isinstance(config, CLIPTextConfig):
            if config.projection:
                return preset("sdxl")
            return preset("sd15" if config.activation == "quick_gelu" else "sd21")
    raise ValueError(f"{path} holds no network")


def _unet_family(config: UNetConfig, scheduler: dict[str, Any] | None, path: Path) -> str:
    scheduler = scheduler or {}
    euler = str(scheduler.get("_class_name", "")).startswith("Euler")
    turbo = euler and scheduler.get("timestep_spacing") == "trailing"
    if config.pooled_width is not None:
        if config.guidance_width is not None and "lcm-sdxl" in PRESETS:
            return "lcm-sdxl"
        return "sdxl-turbo" if turbo else "sdxl"
    if not config.linear_proj:
        lcm = config.guidance_width is not None and "lcm-dreamshaper" in PRESETS
        return "lcm-dreamshaper" if lcm else "sd15"
    if scheduler.get("prediction_type") == "v_prediction":
        return "sd21-v"
    if turbo:
        return "sd-turbo"
    if scheduler:
        return "sd21"
    raise ValueError(
        f"{path} is of the SD2 family, and its weights do not say whether it predicts eps or v: "
        f"add --arch sd21 (eps), sd21-v (v), sd-turbo or a recipe's name"
    )
