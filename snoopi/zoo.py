"""Model presets: architecture, prediction type, one-step recipe and guidance strengths.

A ModelSpec is all that is needed to build the networks of a model and to call them rightly; a model
folder stores one in snoopi.json. Sources: the models' published configs; strengths are those of
guidance.PRESETS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from snoopi.guidance import PRESETS as STRENGTHS
from snoopi.guidance import strength
from snoopi.models.clip import CLIPText, CLIPTextConfig
from snoopi.models.clip_vision import CLIPVision, CLIPVisionConfig
from snoopi.models.dit import DiT, DiTConfig
from snoopi.models.inception import Inception, InceptionConfig
from snoopi.models.t5 import T5Config, T5Encoder
from snoopi.models.unet import UNet, UNetConfig
from snoopi.models.vae import TAESD, VAE, PatchVAE, PatchVAEConfig, TAESDConfig, VAEConfig
from snoopi.models.vgg import VGG, VGGConfig
from snoopi.schedule import Schedule

# Of a field that snoopi.json files written before it lack: they mean its default.
_ADDED = {"added": True}


@dataclass(frozen=True)
class TextSpec:
    """One text encoder, which of its outputs the backbone reads, and the padding id.

    lower: prompts are lowercased and stripped first, as PixArt's were in training.
    """

    config: CLIPTextConfig | T5Config
    output: Literal["last", "penultimate"] = "last"
    pooled: bool = False
    pad_id: int = 49407
    lower: bool = field(default=False, metadata=_ADDED)

    def prepare(self, prompt: str) -> str:
        """The prompt as the tokenizer gets it."""
        return prompt.lower().strip() if self.lower else prompt


@dataclass(frozen=True)
class OneStep:
    """How a one-step model is called: on z ~ N(0, I) at timestep t, then x0 by the schedule.

    sampler: one of samplers.SAMPLERS in place of that one call, and for more than one step.
    steps: how many when the caller does not say. times: the sampler's timesteps at that number of
    steps, empty for its own. abar: alpha_t^2 of the one call in place of the schedule's. eta: of
    TCD. guidance: LCM's, for networks that read it as guidance_embed.
    """

    t: int = 999
    sampler: str = field(default="", metadata=_ADDED)
    steps: int = field(default=1, metadata=_ADDED)
    times: tuple[int, ...] = field(default=(), metadata=_ADDED)
    abar: float | None = field(default=None, metadata=_ADDED)
    eta: float = field(default=1.0, metadata=_ADDED)
    guidance: float | None = field(default=None, metadata=_ADDED)


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights.

    latent_size: latent pixels a side of its native picture. null: the unconditional text, the
    encoded empty prompt or zeros. one_step: None for a multi-step model. steps, kappa, sampler:
    the defaults of a multi-step call. strengths: default strength per guidance.
    """

    arch: str
    backbone: UNetConfig | DiTConfig
    vae: VAEConfig | PatchVAEConfig | TAESDConfig
    text: tuple[TextSpec, ...]
    schedule: Schedule = field(default_factory=Schedule)
    latent_size: int = 64
    null: Literal["encoded", "zeros"] = "encoded"
    one_step: OneStep | None = None
    steps: int = 25
    kappa: float = 7.5
    sampler: str = field(default="ddim", metadata=_ADDED)
    strengths: Mapping[str, float] = field(default_factory=dict)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.vae.latent_channels

    def parts(self) -> dict[str, Any]:
        """Part name to its config: backbone, vae, text_encoder, text_encoder_2, ..."""
        texts = {text_part(i): text.config for i, text in enumerate(self.text)}
        return {"backbone": self.backbone, "vae": self.vae, **texts}

    def to_json(self) -> dict[str, Any]:
        """Plain data for snoopi.json."""
        return _to_plain(self)

    @classmethod
    def from_json(cls, data: Any) -> ModelSpec:
        """The inverse of to_json; ValueError names what is unknown, missing or of a wrong type."""
        return _from_plain(cls, data, "model")


ToolConfig = CLIPVisionConfig | CLIPTextConfig | InceptionConfig | VGGConfig | TAESDConfig


@dataclass(frozen=True)
class ToolSpec:
    """Networks that serve measuring or losses, not generation; networks: part name to config."""

    arch: str
    networks: Mapping[str, ToolConfig]

    def parts(self) -> dict[str, Any]:
        """Part name to its config."""
        return dict(self.networks)

    def to_json(self) -> dict[str, Any]:
        """Plain data for snoopi.json."""
        return _to_plain(self)

    @classmethod
    def from_json(cls, data: Any) -> ToolSpec:
        """The inverse of to_json; ValueError names what is unknown, missing or of a wrong type."""
        return _from_plain(cls, data, "model")


def text_part(index: int) -> str:
    """The part name of the i-th text encoder, as in diffusers: text_encoder, text_encoder_2."""
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"


NETWORKS: dict[type, type[nn.Module]] = {
    UNetConfig: UNet,
    DiTConfig: DiT,
    VAEConfig: VAE,
    PatchVAEConfig: PatchVAE,
    TAESDConfig: TAESD,
    CLIPTextConfig: CLIPText,
    T5Config: T5Encoder,
    CLIPVisionConfig: CLIPVision,
    InceptionConfig: Inception,
    VGGConfig: VGG,
}


def _strengths(name: str, *methods: str) -> dict[str, float]:
    """What guidance.PRESETS has of a model (NASA alone by default), as ModelSpec.strengths."""
    return {m: float(strength(STRENGTHS[name][m])) for m in methods or ("nasa",)}


_CLIP_L = CLIPTextConfig()
_CLIP_H = CLIPTextConfig(width=1024, mlp_width=4096, layers=23, heads=16, activation="gelu")
_CLIP_BIGG = CLIPTextConfig(
    width=1280, mlp_width=5120, layers=32, heads=20, activation="gelu", projection=1280
)
_SD15_UNET = UNetConfig()
_SD21_UNET = UNetConfig(heads=(5, 10, 20, 20), text_width=1024, linear_proj=True)
_SDXL_UNET = UNetConfig(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    text_width=2048,
    linear_proj=True,
    pooled_width=1280,
)
_V = Schedule(prediction="v")
_SD15 = ModelSpec(
    "sd15",
    _SD15_UNET,
    VAEConfig(),
    (TextSpec(_CLIP_L),),
    sampler="pndm",
    strengths=_strengths("sd15"),
)
_SD21 = ModelSpec(
    "sd21",
    _SD21_UNET,
    VAEConfig(),
    (TextSpec(_CLIP_H, pad_id=0),),
    sampler="pndm",
    strengths=_strengths("sd21"),
)
_SDXL = ModelSpec(
    "sdxl",
    _SDXL_UNET,
    VAEConfig(scaling=0.13025),
    (
        TextSpec(_CLIP_L, output="penultimate"),
        TextSpec(_CLIP_BIGG, output="penultimate", pooled=True, pad_id=0),
    ),
    latent_size=128,
    null="zeros",
    sampler="euler-leading",
    strengths=_strengths("sdxl"),
)
_LINEAR = Schedule("linear", 1e-4, 0.02)
_PIXART = ModelSpec(
    "pixart-256",
    DiTConfig(sample_size=32),
    VAEConfig(),
    (TextSpec(T5Config(), pad_id=0, lower=True),),
    schedule=_LINEAR,
    latent_size=32,
    steps=20,
    kappa=4.5,
    sampler="dpm++",
    strengths=_strengths("pixart"),
)
# The shapes world: 32 x 32 pictures, 8 x 8 latents; the world's tokenizer sets the text sizes.
_SHAPES_UNET = UNetConfig(
    channels=(64, 112),
    resnets=1,
    depth=(1, 1),
    mid_depth=1,
    heads=(4, 7),
    text_width=80,
    linear_proj=True,
    norm_groups=16,
)
_SHAPES = ModelSpec(
    "shapes",
    _SHAPES_UNET,
    VAEConfig(channels=(16, 32, 64), resnets=1, norm_groups=8, scaling=1.0),
    (
        TextSpec(
            CLIPTextConfig(
                vocabulary=32, length=12, width=80, mlp_width=320, layers=2, heads=4, eos_id=31
            ),
            pad_id=0,
        ),
    ),
    schedule=_V,
    latent_size=8,
    kappa=4.0,
    strengths=_strengths("shapes", "nasa", "nasa-centred") | {"embed-sub": 1.0, "cfg": 2.0},
)
# The same world for PixArt's kinds of network, text and schedule.
_SHAPES_DIT = dataclasses.replace(
    _SHAPES,
    arch="shapes_dit",
    backbone=DiTConfig(
        out_channels=4, layers=5, heads=6, head_dim=32, text_width=96, sample_size=8
    ),
    text=(
        TextSpec(
            T5Config(
                vocabulary=32,
                length=12,
                width=96,
                mlp_width=256,
                layers=2,
                heads=4,
                head_dim=24,
                eos_id=31,
            ),
            pad_id=0,
        ),
    ),
    schedule=_LINEAR,
)
# The emoji world: 32 x 32 pictures as 16 x 16 latents of 2 x 2 patches (33 dB). A learned VAE that
# ends at 8 x 8, as on shapes, loses outlines and skin tones there (docs/worlds.md has the figures).
# Text is read on the two lower levels; its encoder is wide enough for 1,700 words.
_EMOJI = dataclasses.replace(
    _SHAPES,
    arch="emoji",
    backbone=dataclasses.replace(
        _SHAPES_UNET,
        in_channels=7,
        out_channels=7,
        channels=(32, 64, 112),
        depth=(0, 1, 1),
        heads=(2, 4, 7),
        text_width=128,
    ),
    vae=PatchVAEConfig(latent_channels=7, patch=2),
    text=(
        TextSpec(
            CLIPTextConfig(
                vocabulary=1750,
                length=16,
                width=128,
                mlp_width=512,
                layers=2,
                heads=4,
                eos_id=1749,
            ),
            pad_id=0,
        ),
    ),
    latent_size=16,
)

# The shapes world at a size for tests: 20 steps take seconds, and the latents need no training.
_DEBUG = dataclasses.replace(
    _SHAPES,
    arch="debug",
    vae=PatchVAEConfig(),
    backbone=dataclasses.replace(
        _SHAPES_UNET,
        in_channels=16,
        out_channels=16,
        channels=(16, 32),
        heads=(2, 2),
        text_width=16,
        norm_groups=8,
    ),
    text=(
        TextSpec(
            CLIPTextConfig(
                vocabulary=32, length=12, width=16, mlp_width=32, layers=1, heads=2, eos_id=31
            ),
            pad_id=0,
        ),
    ),
)

_PIXART_512 = dataclasses.replace(_PIXART, arch="pixart-512", backbone=DiTConfig(), latent_size=64)
_PIXART_1024 = dataclasses.replace(
    _PIXART,
    arch="pixart-1024",
    backbone=DiTConfig(sample_size=128, interpolation=2.0, size_embed=True),
    latent_size=128,
)
_LCM_SDXL = dataclasses.replace(_SDXL, backbone=dataclasses.replace(_SDXL_UNET, guidance_width=256))
_LCM_SD15 = dataclasses.replace(_SD15, backbone=dataclasses.replace(_SD15_UNET, guidance_width=256))
_SDXL_512 = dataclasses.replace(_SDXL, latent_size=64)
_X0 = Schedule(prediction="x0")
_ROUNDED = 0.0047  # abar_999 as SwiftBrush's and DMD2's code has it; exactly it is 0.00466
_DMD2_TIMES = (999, 749, 499, 249)
_LCM = OneStep(sampler="lcm", steps=4)

# One- and few-step models: what they were distilled from, how they are called, and what else
# differs. Their strength is guidance.PRESETS' for their name, or else that of what they come from.
RECIPES: dict[str, tuple[ModelSpec, OneStep, Mapping[str, Any]]] = {
    "swiftbrush": (_SD21, OneStep(abar=_ROUNDED), {}),
    "sbv2": (_SD21, OneStep(), {}),
    "sd-turbo": (_SD21, OneStep(sampler="euler"), {}),
    "sdxl-turbo": (_SDXL_512, OneStep(sampler="euler-ancestral"), {}),
    "dmd-pixart": (_PIXART_512, OneStep(400), {}),
    "dmd2-sd15": (_SD15, OneStep(abar=_ROUNDED), {}),
    "dmd2-sdxl-1step": (_SDXL, OneStep(399), {}),
    "dmd2-sdxl-4step": (_SDXL, OneStep(sampler="dmd2", steps=4, times=_DMD2_TIMES), {}),
    "dmd2-sdxl-4step-lora": (_SDXL, OneStep(sampler="dmd2", steps=4, times=_DMD2_TIMES), {}),
    "lcm-sdxl": (_LCM_SDXL, dataclasses.replace(_LCM, guidance=8.0), {}),
    "lcm-dreamshaper": (_LCM_SD15, dataclasses.replace(_LCM, guidance=8.0), {}),
    "lcm-lora-sdxl": (_SDXL, _LCM, {}),
    "lcm-lora-sd15": (_SD15, _LCM, {}),
    "instaflow": (
        _SD15,
        OneStep(sampler="flow"),
        {"schedule": Schedule(prediction="flow")},
    ),
    "yoso-pixart": (
        _PIXART_512,
        OneStep(sampler="lcm"),
        {"schedule": dataclasses.replace(_LINEAR, prediction="v")},
    ),
    "pixart-lcm": (_PIXART_1024, _LCM, {}),
    "hyper-sdxl-1step": (_SDXL, OneStep(800, sampler="lcm", times=(800,)), {}),
    "hyper-sdxl-1step-lora": (_SDXL, OneStep(sampler="tcd"), {}),
    "hyper-sd15-1step-lora": (_SD15, OneStep(sampler="tcd"), {}),
    **{
        f"hyper-{name}-{n}steps-lora": (base, OneStep(sampler="ddim-abar0", steps=n), {})
        for name, base in (("sdxl", _SDXL), ("sd15", _SD15))
        for n in (2, 4, 8)
    },
    "sdxl-lightning-1step": (_SDXL, OneStep(sampler="euler"), {"schedule": _X0}),
    **{
        f"sdxl-lightning-{n}step": (_SDXL, OneStep(sampler="euler", steps=n), {}) for n in (2, 4, 8)
    },
}

PRESETS: dict[str, ModelSpec] = {
    "sd15": _SD15,
    "sd21": _SD21,
    "sd21-v": dataclasses.replace(
        _SD21, arch="sd21-v", schedule=_V, latent_size=96, sampler="ddim-leading"
    ),
    "sdxl": _SDXL,
    "pixart-256": _PIXART,
    "pixart-512": _PIXART_512,
    "pixart-1024": _PIXART_1024,
    **{
        name: dataclasses.replace(
            base,
            arch=name,
            one_step=recipe,
            strengths=_strengths(name) if name in STRENGTHS else base.strengths,
            **changes,
        )
        for name, (base, recipe, changes) in RECIPES.items()
    },
    "shapes": _SHAPES,
    "shapes_dit": _SHAPES_DIT,
    "emoji": _EMOJI,
    "debug": _DEBUG,
}


def _clip(arch: str, image: CLIPVisionConfig, text: CLIPTextConfig) -> ToolSpec:
    return ToolSpec(arch, {"image_encoder": image, "text_encoder": text})


_TEXT_B = CLIPTextConfig(width=512, mlp_width=2048, heads=8, projection=512)
_TEXT_H = dataclasses.replace(_CLIP_H, layers=24, projection=1024)  # Stable Diffusion 2 drops one
_VISION_L = CLIPVisionConfig(
    width=1024, mlp_width=4096, layers=24, heads=16, patch=14, projection=768
)
_VISION_H = dataclasses.replace(
    _VISION_L, width=1280, mlp_width=5120, layers=32, projection=1024, activation="gelu"
)
# OpenAI's weights read quick_gelu in both towers, LAION's gelu.
TOOLS: dict[str, ToolSpec] = {
    "clip-vit-b-32": _clip("clip-vit-b-32", CLIPVisionConfig(), _TEXT_B),
    "clip-vit-b-16": _clip("clip-vit-b-16", CLIPVisionConfig(patch=16), _TEXT_B),
    "clip-vit-l-14": _clip(
        "clip-vit-l-14", _VISION_L, dataclasses.replace(_CLIP_L, projection=768)
    ),
    "openclip-vit-h-14": _clip("openclip-vit-h-14", _VISION_H, _TEXT_H),
    "openclip-vit-g-14": _clip(
        "openclip-vit-g-14",
        dataclasses.replace(_VISION_H, width=1408, mlp_width=6144, layers=40),
        _TEXT_H,
    ),
    "openclip-vit-bigg-14": _clip(
        "openclip-vit-bigg-14",
        dataclasses.replace(_VISION_H, width=1664, mlp_width=8192, layers=48, projection=1280),
        _CLIP_BIGG,
    ),
    "inception-fid": ToolSpec("inception-fid", {"network": InceptionConfig()}),
    "vgg16": ToolSpec("vgg16", {"network": VGGConfig()}),
    "taesd": ToolSpec("taesd", {"vae": TAESDConfig()}),
    "taesdxl": ToolSpec("taesdxl", {"vae": TAESDConfig()}),
}


def preset(name: str) -> Any:
    """The ModelSpec or ToolSpec of a name; ValueError names the nearest one."""
    if name in PRESETS:
        return PRESETS[name]
    if name in TOOLS:
        return TOOLS[name]
    near = get_close_matches(name, [*PRESETS, *TOOLS], n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown model {name!r}; the nearest is {near!r} of {', '.join([*PRESETS, *TOOLS])}"
    )


def model(name: str) -> ModelSpec:
    """The ModelSpec of a name; ValueError for a tool's name, too: it makes no pictures."""
    spec = preset(name)
    if not isinstance(spec, ModelSpec):
        raise ValueError(f"{name!r} is a tool, not a model: expected one of {', '.join(PRESETS)}")
    return spec


def build(spec: str | ModelSpec | ToolSpec, part: str = "backbone", device: str = "meta") -> Any:
    """The network of one part, in eval mode; on "meta" it has shapes but no memory.

    spec: a preset's name, a ModelSpec or a ToolSpec. part: "backbone", "vae", "text_encoder",
    "text_encoder_2"; of tools "image_encoder", "text_encoder", "network" or "vae".
    """
    spec = preset(spec) if isinstance(spec, str) else spec
    parts = spec.parts()
    if part not in parts:
        raise ValueError(f"{spec.arch} has no part {part!r}; it has {', '.join(parts)}")
    with torch.device(device), _Unfilled() if device == "meta" else contextlib.nullcontext():
        return NETWORKS[type(parts[part])](parts[part]).eval()


class _Unfilled(TorchFunctionMode):
    """Leaves out torch's initialisation: on meta it fills nothing, but loads the compiler (1 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def fresh(spec: str | ModelSpec | ToolSpec, part: str, seed: int) -> Any:
    """A randomly initialised network in training mode: a function of the seed alone.

    torch's own initialisation, except that text embeddings start small beside what the layers add,
    and for what a network's `initialise` says (a backbone's output starts at zero). The global
    generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(spec, part, "cpu").train()
        for module in net.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
        if isinstance(net, (UNet, DiT, T5Encoder)):
            net.initialise()
    return net


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {k: _to_plain(v) for k, v in value.items()}
    return [_to_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _from_plain(kind: Any, data: Any, where: str) -> Any:
    """Plain data back to a type: dataclasses by their fields, tuples, unions by "kind"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType,):
        return _from_union(args, data, where)
    if dataclasses.is_dataclass(kind):
        return _from_fields(kind, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} must be a list, got {data!r}")
        items = zip(data, [args[0]] * len(data), strict=True)
        return tuple(_from_plain(k, v, f"{where}[{i}]") for i, (v, k) in enumerate(items))
    if origin is Literal:
        if data not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, got {data!r}")
        return data
    return _from_scalar(kind, args, data, where)


def _from_scalar(kind: Any, args: tuple, data: Any, where: str) -> Any:
    if isinstance(kind, type) and kind in (int, float, str, bool):
        fits = isinstance(data, kind) or (kind is float and isinstance(data, int))
        if not fits or (isinstance(data, bool) and kind is not bool):
            raise ValueError(f"{where} must be {kind.__name__}, got {data!r}")
        return kind(data)
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {data!r}")
    return {k: _from_plain(args[1], v, f"{where}.{k}") for k, v in data.items()}


def _from_union(args: tuple, data: Any, where: str) -> Any:
    if data is None and type(None) in args:
        return None
    kinds = [arg for arg in args if arg is not type(None)]
    if len(kinds) == 1:
        return _from_plain(kinds[0], data, where)
    name = data.get("kind") if isinstance(data, dict) else None
    for kind in kinds:
        if kind.__name__ == name:
            return _from_plain(kind, data, where)
    raise ValueError(f"{where}.kind must be one of {[k.__name__ for k in kinds]}, got {name!r}")


def _from_fields(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict) or data.get("kind") != kind.__name__:
        raise ValueError(f"{where} must be an object of kind {kind.__name__}, got {data!r:.80}")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    added = [f.name for f in dataclasses.fields(kind) if f.metadata.get("added")]
    for key in data:
        if key != "kind" and key not in names:
            near = get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has an unknown key {key!r}; the nearest is {near!r}")
    missing = [name for name in names if name not in data and name not in added]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    found = [name for name in names if name in data]
    return kind(**{n: _from_plain(hints[n], data[n], f"{where}.{n}") for n in found})
