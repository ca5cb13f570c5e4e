"""The sizes of networks, read from a config.json or from the shapes in a file of weights.

Heads are not visible in shapes: SD1.5 has eight everywhere, later UNets and text encoders 64
channels a head, PixArt 72. A config.json, or --arch with a snoopi.json, says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from snoopi.models.clip import CLIPTextConfig
from snoopi.models.dit import DiTConfig
from snoopi.models.t5 import T5Config
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig
from snoopi.schedule import Schedule

Shapes = Mapping[str, tuple[int, ...]]
Json = Mapping[str, Any]

# Options of diffusers' and transformers' classes that our networks do not have, with the values
# under which they are the same network.
_UNET_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_DIT_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "norm_type": ("ada_norm_single",),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
}
_MOST_STEPS = 100_000  # a schedule is a table of that many numbers
_CLIP_ONLY: dict[str, tuple[Any, ...]] = {"layer_norm_eps": (1e-5,)}
_T5_ONLY: dict[str, tuple[Any, ...]] = {"layer_norm_epsilon": (1e-6,)}
_SCHEDULE_ONLY: dict[str, tuple[Any, ...]] = {
    "rescale_betas_zero_snr": (False,),
    "trained_betas": (None,),
}


def _check(data: Json, only: Mapping[str, tuple[Any, ...]]) -> None:
    """ValueError for an option that our network does not have."""
    for name, values in only.items():
        if name in data and data[name] not in values:
            raise ValueError(f"{name} = {data[name]!r} is not supported, only {values[0]!r}")


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """One value a level."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * count


# --- config.json ----------------------------------------------------------------------------------


def unet(data: Json) -> UNetConfig:
    """UNet2DConditionModel's config; "attention_head_dim" means the number of heads there."""
    _check(data, _UNET_ONLY)
    channels = tuple(data.get("block_out_channels", (320, 640, 1280, 1280)))
    n = len(channels)
    down = data.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    crossed = [kind == "CrossAttnDownBlock2D" for kind in down]
    up = ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)]
    for kind in (*down, *data.get("up_block_types", up)):
        if kind not in ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"):
            raise ValueError(f"block type {kind!r} is not supported")
    if list(data.get("up_block_types", up)) != up:
        raise ValueError(f"up_block_types must mirror down_block_types: {up}")
    layers = _each(data.get("transformer_layers_per_block", 1), n)
    heads = data.get("num_attention_heads") or data.get("attention_head_dim", 8)
    resnets = set(_each(data.get("layers_per_block", 2), n))
    if len(resnets) != 1:
        raise ValueError(f"layers_per_block must be one number, got {data['layers_per_block']}")
    size_width = data.get("addition_time_embed_dim") or 256
    pooled = None
    if data.get("addition_embed_type"):
        pooled = data["projection_class_embeddings_input_dim"] - 6 * size_width
    return UNetConfig(
        in_channels=data.get("in_channels", 4),
        out_channels=data.get("out_channels", 4),
        channels=channels,
        resnets=resnets.pop(),
        depth=tuple(d if c else 0 for d, c in zip(layers, crossed, strict=True)),
        mid_depth=layers[-1],
        heads=_each(heads, n),
        text_width=data.get("cross_attention_dim", 1280),
        linear_proj=bool(data.get("use_linear_projection", False)),
        norm_groups=data.get("norm_num_groups", 32),
        pooled_width=pooled,
        size_width=size_width,
        guidance_width=data.get("time_cond_proj_dim"),
    )


def vae(data: Json) -> VAEConfig:
    """AutoencoderKL's config; old files leave the scaling to the class."""
    _check(data, _VAE_ONLY)
    return VAEConfig(
        in_channels=data.get("in_channels", 3),
        latent_channels=data.get("latent_channels", 4),
        channels=tuple(data["block_out_channels"]),
        resnets=data.get("layers_per_block", 2),
        norm_groups=data.get("norm_num_groups", 32),
        scaling=float(data.get("scaling_factor", 0.18215)),
    )


def dit(data: Json) -> DiTConfig:
    """PixArtTransformer2DModel's config."""
    _check(data, _DIT_ONLY)
    size = data.get("sample_size", 128)
    extra = data.get("use_additional_conditions")
    scale = data.get("interpolation_scale")
    return DiTConfig(
        in_channels=data.get("in_channels", 4),
        out_channels=data.get("out_channels", 8),
        patch=data.get("patch_size", 2),
        layers=data.get("num_layers", 28),
        heads=data.get("num_attention_heads", 16),
        head_dim=data.get("attention_head_dim", 72),
        text_width=data.get("caption_channels", 4096),
        sample_size=size,
        interpolation=float(scale if scale is not None else max(size // 64, 1)),
        size_embed=size == 128 if extra is None else bool(extra),
    )


def clip_text(data: Json) -> CLIPTextConfig:
    """CLIPTextModel's config. Its special ids are wrong in every published file: not read."""
    data = data.get("text_config", data)
    _check(data, _CLIP_ONLY)
    if data["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act must be quick_gelu or gelu, got {data['hidden_act']!r}")
    vocabulary = data.get("vocab_size", 49408)
    return CLIPTextConfig(
        vocabulary=vocabulary,
        length=data.get("max_position_embeddings", 77),
        width=data["hidden_size"],
        mlp_width=data["intermediate_size"],
        layers=data["num_hidden_layers"],
        heads=data["num_attention_heads"],
        activation=data["hidden_act"],
        projection=data.get("projection_dim") if projects(data) else None,
        eos_id=vocabulary - 1,
    )


def projects(data: Json) -> bool:
    """Whether a CLIP config is that of a tower with its projection."""
    return any("Projection" in name for name in data.get("architectures") or ())


def t5(data: Json) -> T5Config:
    """T5EncoderModel's config."""
    _check(data, _T5_ONLY)
    kind = data.get("feed_forward_proj", "relu")
    if kind != "gated-gelu":
        raise ValueError(f"feed_forward_proj must be gated-gelu (T5 v1.1), got {kind!r}")
    return T5Config(
        vocabulary=data["vocab_size"],
        width=data["d_model"],
        mlp_width=data["d_ff"],
        layers=data["num_layers"],
        heads=data["num_heads"],
        head_dim=data["d_kv"],
        buckets=data.get("relative_attention_num_buckets", 32),
        max_distance=data.get("relative_attention_max_distance", 128),
    )


def schedule(data: Json) -> Schedule:
    """A scheduler_config.json's betas and prediction type."""
    _check(data, _SCHEDULE_ONLY)
    prediction = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    kind = data.get("prediction_type", "epsilon")
    if not isinstance(kind, str) or kind not in prediction:
        raise ValueError(f"prediction_type {kind!r} is not supported: {', '.join(prediction)}")
    steps = data.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"num_train_timesteps must be from 1 to {_MOST_STEPS}, got {steps!r}")
    return Schedule(
        betas=data.get("beta_schedule", "linear"),
        beta_start=data.get("beta_start", 1e-4),
        beta_end=data.get("beta_end", 0.02),
        steps=steps,
        prediction=prediction[kind],  # type: ignore[arg-type]
    )


# --- shapes ---------------------------------------------------------------------------------------


def count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand at the pattern's group."""
    found = (re.match(pattern, name) for name in shapes)
    return len({match[1] for match in found if match})


def unet_from_ldm(shapes: Shapes) -> UNetConfig:
    """A UNet's sizes from an LDM or SGM file's names (without prefix) and shapes."""
    ops = [
        int(m[1]) for m in (re.match(r"input_blocks\.(\d+)\.0\.op\.weight", k) for k in shapes) if m
    ]
    first = min(ops, default=count(shapes, r"input_blocks\.(\d+)\."))
    resnets, levels = first - 1, len(ops) + 1
    starts = [1 + level * first for level in range(levels)]
    return _unet(
        shapes,
        [f"input_blocks.{i}.0.out_layers.3.weight" for i in starts],
        [f"input_blocks.{i}.1." for i in starts],
        "middle_block.1.",
        resnets,
        ("input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight"),
        "time_embed.cond_proj.weight",
    )


def unet_from_diffusers(shapes: Shapes) -> UNetConfig:
    """A UNet's sizes from diffusers' names and shapes."""
    levels = range(count(shapes, r"down_blocks\.(\d+)\."))
    return _unet(
        shapes,
        [f"down_blocks.{i}.resnets.0.conv2.weight" for i in levels],
        [f"down_blocks.{i}.attentions.0." for i in levels],
        "mid_block.attentions.0.",
        count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        ("conv_in.weight", "conv_out.weight", "add_embedding.linear_1.weight"),
        "time_embedding.cond_proj.weight",
    )


def _unet(
    shapes: Shapes,
    convs: Sequence[str],
    transformers: Sequence[str],
    middle: str,
    resnets: int,
    ends: tuple[str, str, str],
    guidance: str,
) -> UNetConfig:
    def depth(prefix: str) -> int:
        return count(shapes, re.escape(prefix) + r"transformer_blocks\.(\d+)\.")

    channels = tuple(shapes[name][0] for name in convs)
    projection = shapes[middle + "proj_in.weight"]
    text_width = shapes[middle + "transformer_blocks.0.attn2.to_k.weight"][1]
    linear = len(projection) == 2
    # Eight heads a level in SD1 (whose projections are convolutions), 64 channels a head later.
    heads = tuple(max(c // 64, 1) for c in channels) if linear else (8,) * len(channels)
    pooled = shapes[ends[2]][1] - 6 * 256 if ends[2] in shapes else None
    return UNetConfig(
        in_channels=shapes[ends[0]][1],
        out_channels=shapes[ends[1]][0],
        channels=channels,
        resnets=resnets,
        depth=tuple(depth(prefix) for prefix in transformers),
        mid_depth=depth(middle),
        heads=heads,
        text_width=text_width,
        linear_proj=linear,
        pooled_width=pooled,
        guidance_width=shapes[guidance][1] if guidance in shapes else None,
    )


def vae_from_ldm(shapes: Shapes, scaling: float) -> VAEConfig:
    """An AutoencoderKL's sizes from an LDM file."""
    levels = range(count(shapes, r"encoder\.down\.(\d+)\."))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["post_quant_conv.weight"][0],
        channels=tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in levels),
        resnets=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        scaling=scaling,
    )


def vae_from_diffusers(shapes: Shapes, scaling: float) -> VAEConfig:
    """An AutoencoderKL's sizes from diffusers' names."""
    levels = range(count(shapes, r"encoder\.down_blocks\.(\d+)\."))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["post_quant_conv.weight"][0],
        channels=tuple(
            shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in levels
        ),
        resnets=count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        scaling=scaling,
    )


def clip_text_from_hf(shapes: Shapes) -> CLIPTextConfig:
    """A CLIP text encoder's sizes from Hugging Face's names ("text_model." in front or not)."""
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocabulary, width = bare["embeddings.token_embedding.weight"]
    return _clip_text(
        vocabulary,
        bare["embeddings.position_embedding.weight"][0],
        width,
        bare["encoder.layers.0.mlp.fc1.weight"][0],
        count(bare, r"encoder\.layers\.(\d+)\."),
        shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None,
    )


def clip_text_from_openclip(shapes: Shapes, layers: int | None = None) -> CLIPTextConfig:
    """OpenCLIP's text tower. layers: how many of the file's to use; then without projection."""
    vocabulary, width = shapes["token_embedding.weight"]
    found = count(shapes, r"transformer\.resblocks\.(\d+)\.")
    projection = shapes["text_projection"][1] if "text_projection" in shapes else None
    return _clip_text(
        vocabulary,
        shapes["positional_embedding"][0],
        width,
        shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        found if layers is None else layers,
        projection if layers is None else None,
    )


def _clip_text(
    vocabulary: int, length: int, width: int, mlp: int, layers: int, projection: int | None
) -> CLIPTextConfig:
    # OpenAI's ViT-L tower has quick_gelu; LAION's H, g and bigG have GELU, and are wider.
    activation = "quick_gelu" if width <= 768 else "gelu"
    return CLIPTextConfig(
        vocabulary=vocabulary,
        length=length,
        width=width,
        mlp_width=mlp,
        layers=layers,
        heads=max(width // 64, 1),
        activation=activation,  # type: ignore[arg-type]
        projection=projection,
        eos_id=vocabulary - 1,
    )


def t5_from_hf(shapes: Shapes) -> T5Config:
    """A T5 encoder's sizes."""
    tied = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    vocabulary, width = shapes[tied]
    layer = "encoder.block.0.layer."
    buckets, heads = shapes[f"{layer}0.SelfAttention.relative_attention_bias.weight"]
    return T5Config(
        vocabulary=vocabulary,
        width=width,
        mlp_width=shapes[f"{layer}1.DenseReluDense.wi_0.weight"][0],
        layers=count(shapes, r"encoder\.block\.(\d+)\."),
        heads=heads,
        head_dim=shapes[f"{layer}0.SelfAttention.q.weight"][0] // heads,
        buckets=buckets,
    )


def dit_from_shapes(shapes: Shapes, names: Callable[[str], str], sample_size: int) -> DiTConfig:
    """A DiT's sizes. names: our name to the file's; sample_size: latent pixels a side."""
    width, channels, patch, _ = shapes[names("pos_embed.proj.weight")]
    blocks = re.escape(names("transformer_blocks.0.scale_shift_table")).replace("0", r"(\d+)", 1)
    size_embed = names("adaln_single.emb.resolution_embedder.linear_1.weight") in shapes
    return DiTConfig(
        in_channels=channels,
        out_channels=shapes[names("proj_out.weight")][0] // patch**2,
        patch=patch,
        layers=count(shapes, blocks),
        heads=max(width // 72, 1),
        head_dim=72 if width % 72 == 0 else width,
        text_width=shapes[names("caption_projection.linear_1.weight")][1],
        sample_size=sample_size,
        interpolation=float(max(sample_size // 64, 1)),
        size_embed=size_embed,
    )
