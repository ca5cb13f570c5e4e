"""How the files people have name the parameters of snoopi's networks, as data.

Each function gives the Layout of one network in one kind of file. Our names are diffusers' (UNet,
DiT, VAE) and Hugging Face's (CLIP, T5), so those files need next to no rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from snoopi.models.clip import CLIPTextConfig
from snoopi.models.dit import DiTConfig
from snoopi.models.unet import UNet, UNetConfig
from snoopi.models.vae import VAEConfig
from weights_convert.rules import IDENTITY, Layout, Rule, names

# Prefixes in the single files of the LDM (SD1, SD2) and SGM (SDXL) repositories.
LDM_UNET = "model.diffusion_model."
LDM_VAE = "first_stage_model."
LDM_CLIP = "cond_stage_model.transformer."
LDM_OPENCLIP = "cond_stage_model.model."
SGM_CLIP = "conditioner.embedders.0.transformer."
SGM_OPENCLIP = "conditioner.embedders.1.model."

# What single files hold besides networks: noise schedules, losses, counters of the average.
LDM_DROP = (
    r"(alphas|sqrt|log|posterior|betas|one_minus|lvlb).*",
    r"(logvar|scale_factor|denoiser\.sigmas|global_step)",
    r"first_stage_model\.loss\..*",
    r"model_ema\.(decay|num_updates)",
    r"(cond_stage_model|conditioner\.embedders\.\d)\.(transformer|model)\.logit_scale",
)
POSITION_IDS = r"(text_model\.)?embeddings\.position_ids"

_RESNET = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)


# --- UNet -----------------------------------------------------------------------------------------


def unet_ldm(config: UNetConfig, prefix: str = LDM_UNET) -> Layout:
    """The UNet of an LDM or SGM file: blocks are numbered through, their parts by position."""
    rules = [
        Rule("time_embedding.linear_1.", "time_embed.0."),
        Rule("time_embedding.linear_2.", "time_embed.2."),
        Rule("time_embedding.cond_proj.", "time_embed.cond_proj."),
        Rule("add_embedding.linear_1.", "label_emb.0.0."),
        Rule("add_embedding.linear_2.", "label_emb.0.2."),
        Rule("conv_in.", "input_blocks.0.0."),
        Rule("conv_norm_out.", "out.0."),
        Rule("conv_out.", "out.2."),
        *_resnet("mid_block.resnets.0.", "middle_block.0."),
        *_resnet("mid_block.resnets.1.", f"middle_block.{2 if config.mid_depth else 1}."),
        Rule("mid_block.attentions.0.", "middle_block.1."),
    ]
    for level in range(len(config.channels)):
        rules += _down(config, level)
        rules += _up(config, level)
    return Layout(rules, prefix)


def _down(config: UNetConfig, level: int) -> Iterator[Rule]:
    ours, first = f"down_blocks.{level}.", 1 + level * (config.resnets + 1)
    for i in range(config.resnets):
        yield from _resnet(f"{ours}resnets.{i}.", f"input_blocks.{first + i}.0.")
        yield Rule(f"{ours}attentions.{i}.", f"input_blocks.{first + i}.1.")
    down = f"input_blocks.{first + config.resnets}.0.op."
    yield Rule(f"{ours}downsamplers.0.conv.", down)


def _up(config: UNetConfig, place: int) -> Iterator[Rule]:
    """`place` counts from the middle out, as diffusers' up_blocks do."""
    depth = config.depth[len(config.depth) - 1 - place]
    ours, count = f"up_blocks.{place}.", config.resnets + 1
    for i in range(count):
        theirs = f"output_blocks.{place * count + i}."
        yield from _resnet(f"{ours}resnets.{i}.", f"{theirs}0.")
        yield Rule(f"{ours}attentions.{i}.", f"{theirs}1.")
    # After the resnet, and after the transformer where there is one.
    last = f"output_blocks.{place * count + count - 1}.{2 if depth else 1}.conv."
    yield Rule(f"{ours}upsamplers.0.conv.", last)


def _resnet(ours: str, theirs: str) -> Iterator[Rule]:
    return (Rule(ours + a, theirs + b) for a, b in _RESNET)


def unet_ldm_names(config: UNetConfig, prefix: str = "") -> dict[str, str]:
    """Each parameter of a UNet to its name in an LDM or SGM file."""
    import torch

    with torch.device("meta"):
        targets = UNet(config).state_dict()
    return {k: name for k, (name, _) in names(targets, unet_ldm(config, prefix)).items()}


def ema_name(name: str) -> str:
    """The averaged weight's name in an LDM file: its dots are gone."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


# --- VAE ------------------------------------------------------------------------------------------

_VAE_OLD = tuple(
    (rf"(.*mid_block\.attentions\.0\.){old}\.", rf"\1{new}.")
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", r"to_out.0"),
    )
)
_VAE_ATTENTION = (
    ("group_norm.", "norm.", False),
    ("to_q.", "q.", True),
    ("to_k.", "k.", True),
    ("to_v.", "v.", True),
    ("to_out.0.", "proj_out.", True),
)


def vae_diffusers(prefix: str = "") -> Layout:
    """diffusers' AutoencoderKL, with the attention names of before 2023 (SD1.5, SD2.1) or after."""
    return Layout(IDENTITY, prefix, aliases=_VAE_OLD)


def vae_ldm(config: VAEConfig, prefix: str = LDM_VAE) -> Layout:
    """AutoencoderKL of an LDM file: the up path is numbered from the picture's side."""
    rules = [
        Rule("quant_conv.", "quant_conv."),
        Rule("post_quant_conv.", "post_quant_conv."),
    ]
    levels = len(config.channels)
    for half, blocks in (("encoder", "down"), ("decoder", "up")):
        rules += [Rule(f"{half}.{name}.", f"{half}.{name}.") for name in ("conv_in", "conv_out")]
        rules += [Rule(f"{half}.conv_norm_out.", f"{half}.norm_out.")]
        for i in (0, 1):
            rules += _vae_resnet(f"{half}.mid_block.resnets.{i}.", f"{half}.mid.block_{i + 1}.")
        for ours, theirs, conv in _VAE_ATTENTION:
            name, old = f"{half}.mid_block.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}"
            rules.append(Rule(name, old, conv=conv))
        for level in range(levels):
            theirs = f"{half}.{blocks}.{level if blocks == 'down' else levels - 1 - level}."
            name = f"{half}.{blocks}_blocks.{level}."
            for j in range(config.resnets + (blocks == "up")):
                rules += _vae_resnet(f"{name}resnets.{j}.", f"{theirs}block.{j}.")
            rules.append(Rule(f"{name}{blocks}samplers.0.conv.", f"{theirs}{blocks}sample.conv."))
    return Layout(rules, prefix, drop=(r"loss\..*", r"model_ema\..*"))


def _vae_resnet(ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}conv_shortcut.", f"{theirs}nin_shortcut.")
    for name in ("norm1.", "conv1.", "norm2.", "conv2."):
        yield Rule(ours + name, theirs + name)


# --- text encoders --------------------------------------------------------------------------------


def clip_hf(prefix: str = "", drop: Sequence[str] = ()) -> Layout:
    """Hugging Face's CLIPTextModel; newer files may leave "text_model." out."""
    bare = r"(embeddings|encoder|final_layer_norm)\."
    aliases = ((rf"^{bare}", r"text_model.\1."),)
    return Layout(IDENTITY, prefix, aliases, (POSITION_IDS, *drop))


_OPENCLIP_LAYER = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)


def openclip_layers(ours: str, theirs: str, count: int) -> Iterator[Rule]:
    """OpenCLIP's transformer layers: q, k and v are thirds of one matrix."""
    for i in range(count):
        a, b = f"{ours}{i}.", f"{theirs}{i}."
        for name, other in _OPENCLIP_LAYER:
            yield Rule(a + name, b + other)
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
            for kind in ("weight", "bias"):
                yield Rule(f"{a}self_attn.{name}.{kind}", f"{b}attn.in_proj_{kind}", (j, 3))


def clip_openclip(config: CLIPTextConfig, prefix: str, depth: int | None = None) -> Layout:
    """OpenCLIP's text tower. depth: layers in the file; those beyond config.layers are dropped."""
    model = "text_model."
    rules = [
        Rule(f"{model}embeddings.token_embedding.", "token_embedding."),
        Rule(f"{model}embeddings.position_embedding.weight", "positional_embedding"),
        Rule(f"{model}final_layer_norm.", "ln_final."),
        Rule("text_projection.weight", "text_projection", transposed=True),
        *openclip_layers(f"{model}encoder.layers.", "transformer.resblocks.", config.layers),
    ]
    drop = [r"attn_mask", r"logit_scale"]
    drop += [
        rf"transformer\.resblocks\.{i}\..*" for i in range(config.layers, depth or config.layers)
    ]
    drop += [] if config.projection else [r"text_projection"]
    return Layout(rules, prefix, drop=drop)


def t5_hf(prefix: str = "") -> Layout:
    """Hugging Face's T5EncoderModel, whose embedding has two names; a decoder is left out."""
    aliases = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)
    return Layout(
        IDENTITY,
        prefix,
        aliases,
        (r"encoder\.embed_tokens\.weight", r"decoder\..*", r"lm_head.*"),
    )


# --- DiT ------------------------------------------------------------------------------------------

_DIT_TIME = (
    ("timestep_embedder", "t_embedder"),
    ("resolution_embedder", "csize_embedder"),
    ("aspect_ratio_embedder", "ar_embedder"),
)


def dit_diffusers(prefix: str = "") -> Layout:
    """diffusers' PixArtTransformer2DModel (and the Transformer2DModel before it)."""
    return Layout(IDENTITY, prefix, drop=(r"pos_embed\.pos_embed",))


def dit_pixart(config: DiTConfig, prefix: str = "") -> Layout:
    """PixArt-alpha's own .pth: q, k, v in one matrix, k and v of the text in another."""
    rules = [
        Rule("pos_embed.proj.", "x_embedder.proj."),
        Rule("adaln_single.linear.", "t_block.1."),
        Rule("caption_projection.linear_1.", "y_embedder.y_proj.fc1."),
        Rule("caption_projection.linear_2.", "y_embedder.y_proj.fc2."),
        Rule("proj_out.", "final_layer.linear."),
        Rule("scale_shift_table", "final_layer.scale_shift_table"),
    ]
    for ours, theirs in _DIT_TIME:
        for i in (1, 2):
            name = f"adaln_single.emb.{ours}.linear_{i}."
            rules.append(Rule(name, f"{theirs}.mlp.{2 * i - 2}."))
    for i in range(config.layers):
        a, b = f"transformer_blocks.{i}.", f"blocks.{i}."
        rules += [
            Rule(f"{a}scale_shift_table", f"{b}scale_shift_table"),
            *(Rule(f"{a}attn1.to_{n}.", f"{b}attn.qkv.", (j, 3)) for j, n in enumerate("qkv")),
            Rule(f"{a}attn1.to_out.0.", f"{b}attn.proj."),
            Rule(f"{a}attn2.to_q.", f"{b}cross_attn.q_linear."),
            *(
                Rule(f"{a}attn2.to_{n}.", f"{b}cross_attn.kv_linear.", (j, 2))
                for j, n in enumerate("kv")
            ),
            Rule(f"{a}attn2.to_out.0.", f"{b}cross_attn.proj."),
            Rule(f"{a}ff.net.0.proj.", f"{b}mlp.fc1."),
            Rule(f"{a}ff.net.2.", f"{b}mlp.fc2."),
        ]
    # Positions are computed; the learned null caption is not used (the encoded "" is).
    drop = (r"(base_model\.|model\.)?pos_embed", r"y_embedder\.y_embedding")
    return Layout(rules, prefix, drop=drop)


def unet_diffusers(prefix: str = "") -> Layout:
    """diffusers' UNet2DConditionModel."""
    return Layout(IDENTITY, prefix)


def own(prefix: str = "") -> Layout:
    """snoopi's own files."""
    return Layout(IDENTITY, prefix)
