"""Prompts against diffusers' pipelines: token ids, text features, and whole runs under CFG."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from snoopi.models.clip import CLIPText, CLIPTextConfig
from snoopi.models.dit import DiT
from snoopi.models.t5 import T5Config, T5Encoder
from snoopi.models.unet import UNet
from snoopi.models.vae import VAE, VAEConfig
from snoopi.pipeline import Pipeline
from snoopi.tokenize import Tokenizer, clip_vocabulary
from snoopi.zoo import ModelSpec, preset
from tests.parity import matrix, oracle, test_dit, test_unet, test_vae, tiny
from tests.parity.oracle import randn

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::snoopi.tokenize.PromptCut"),
]
SIDE = 8  # latent pixels
LONG = "a very long list of " + "red and blue and green " * 60
PROMPTS = ["A photo of a Cat, (8k:1.3)", "", "  Ünïcødé 東京 🦩 don't \n", LONG]
NEGATIVES = ["blurry, Low Quality", "a dog", LONG, ""]
BASES = {"sd15": "sd15", "sd21": "sd21", "sd21-v": "sd21", "sdxl": "sdxl"}
NAMES = [*BASES, "pixart-512", "pixart-1024"]


class Pair(NamedTuple):
    """Our pipeline and diffusers' with the same weights."""

    ours: Pipeline
    theirs: Any


# --- the two pipelines ----------------------------------------------------------------------------


def pair(name: str, folder: Path) -> Pair:
    return pixart(name, folder) if name.startswith("pixart") else stable_diffusion(name)


def stable_diffusion(name: str) -> Pair:
    diffusers = oracle.package("diffusers")
    theirs_config, unet = test_unet.TINY[BASES[name]]
    spec = preset(name)
    sizes = [(24, 3, None)] if name != "sdxl" else [(12, 3, None), (12, 4, 20)]
    texts, nets, tokenizers = [], [], []
    for i, (text, (width, layers, projection)) in enumerate(zip(spec.text, sizes, strict=True)):
        activation = text.config.activation  # type: ignore[union-attr]
        net = oracle.randomise(tiny.clip(width, layers, activation, projection), seed=10 + i)
        config = CLIPTextConfig(
            width=width,
            mlp_width=40,
            layers=layers,
            heads=2,
            activation=activation,
            projection=projection,
        )
        texts.append(dataclasses.replace(text, config=config))
        nets.append(net)
        tokenizers.append(their_clip(text.pad_id))
    spec = dataclasses.replace(spec, backbone=unet, vae=small_vae(spec), text=tuple(texts))
    backbone = oracle.randomise(diffusers.UNet2DConditionModel(**theirs_config), seed=20)
    parts: dict[str, Any] = {"unet": backbone, "text_encoder": nets[0], "tokenizer": tokenizers[0]}
    if name == "sdxl":
        parts |= {"text_encoder_2": nets[1], "tokenizer_2": tokenizers[1], "add_watermarker": False}
        kind = diffusers.StableDiffusionXLPipeline
    else:
        kind = diffusers.StableDiffusionPipeline
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts |= {"requires_safety_checker": False}
    theirs = kind(vae=their_vae(spec), scheduler=scheduler(spec), **parts)
    ids = [Tokenizer.clip(text.pad_id) for text in spec.text]
    return Pair(our_pipeline(spec, UNet(unet), backbone, nets, ids), theirs)


def pixart(name: str, folder: Path) -> Pair:
    """PixArt by its configs; the larger one reads sizes, which needs its sample_size of 128."""
    diffusers = oracle.package("diffusers")
    more, dit = test_dit.TINY["sizes" if name == "pixart-1024" else "sigma"]
    if name == "pixart-1024":
        more, dit = more | {"sample_size": 128}, dataclasses.replace(dit, sample_size=128)
    spec, width = preset(name), dit.text_width
    tokenizer = their_t5()
    tokenizer.save_pretrained(folder)
    net = oracle.randomise(tiny.t5(width, 256), seed=10)
    with torch.no_grad():
        net.shared.weight.copy_(randn(256, width, seed=9))
    config = T5Config(vocabulary=256, width=width, mlp_width=32, layers=2, heads=2, head_dim=10)
    text = dataclasses.replace(spec.text[0], config=config)
    spec = dataclasses.replace(spec, backbone=dit, vae=small_vae(spec), text=(text,))
    backbone = diffusers.PixArtTransformer2DModel(**test_dit.their_config(dit, more))
    oracle.randomise(backbone, seed=20)
    theirs = diffusers.PixArtAlphaPipeline(
        tokenizer, net, their_vae(spec), backbone, scheduler(spec)
    )  # fmt: skip
    ids = [Tokenizer.from_folder(folder, config.length)]
    return Pair(our_pipeline(spec, DiT(dit), backbone, [net], ids), theirs)


def our_pipeline(
    spec: ModelSpec, backbone: Any, theirs: Any, texts: list[Any], tokenizers: list[Tokenizer]
) -> Pipeline:
    """Strictly loaded with their weights, at a native picture of SIDE latent pixels."""
    backbone.load_state_dict(theirs.state_dict(), strict=True)
    encoders: list[Any] = []
    for text, net in zip(spec.text, texts, strict=True):
        kind: Any = T5Encoder if isinstance(text.config, T5Config) else CLIPText
        encoders.append(kind(text.config))
        encoders[-1].load_state_dict(tiny.state(net), strict=True)
    vae = VAE(spec.vae)  # type: ignore[arg-type]
    vae.load_state_dict(their_vae(spec).state_dict(), strict=True)
    for net in (backbone, vae, *encoders):
        net.eval().requires_grad_(False)
    spec = dataclasses.replace(spec, latent_size=SIDE)
    return Pipeline(spec, backbone, vae, encoders, tokenizers)


def small_vae(spec: ModelSpec) -> VAEConfig:
    """The model's VAE at the width of the tests'."""
    return dataclasses.replace(spec.vae, channels=test_vae.CHANNELS, norm_groups=8)  # type: ignore[return-value]


def their_vae(spec: ModelSpec) -> Any:
    config = test_vae.their_config(test_vae.CHANNELS, 8)
    config |= {"scaling_factor": spec.vae.scaling}  # type: ignore[union-attr]
    return oracle.randomise(oracle.package("diffusers").AutoencoderKL(**config), seed=30)


def their_clip(pad_id: int) -> Any:
    """pad_id 0 is the token "!"."""
    vocabulary, merges = clip_vocabulary()
    kind = oracle.package("transformers").CLIPTokenizer
    pad = {0: "!", 49407: "<|endoftext|>"}[pad_id]
    return kind(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def their_t5() -> Any:
    """Letters, digits and a few words as pieces, and T5's 100 extra ones."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -4.0) for c in string.ascii_letters + string.digits + ".,:()'"]
    pieces += [(f"▁{word}", -6.0) for word in ("a", "A", "cat", "Cat", "photo", "of", "red", "and")]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return oracle.package("transformers").T5Tokenizer(vocab=pieces)


# Our samplers' names: diffusers' class, and the published scheduler_config.json's options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": (
        "DDIMScheduler",
        {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1},
    ),
    "ddim-leading": (
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "euler-leading": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
}


def scheduler(spec: ModelSpec) -> Any:
    """diffusers' scheduler for a model's own sampler."""
    kind, options = SCHEDULERS[spec.sampler]
    schedule = spec.schedule
    return getattr(oracle.package("diffusers"), kind)(
        num_train_timesteps=schedule.steps,
        beta_schedule=schedule.betas,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[schedule.prediction],
        **options,
    )


@pytest.fixture(params=NAMES, scope="module")
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Pair]:
    found = pair(request.param, tmp_path_factory.mktemp("tokenizer"))
    found.theirs.set_progress_bar_config(disable=True)
    return request.param, found


# --- texts ----------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Features of prompts and negatives; masks and pooled features of both if there are any."""

    tokens: Tensor
    negative: Tensor
    masks: tuple[Tensor, Tensor] | None = None
    pooled: tuple[Tensor, Tensor] | None = None


def their_texts(name: str, theirs: Any, prompts: list[str], negatives: Any) -> Texts:
    kwargs = {"do_classifier_free_guidance": True, "negative_prompt": negatives, "device": "cpu"}
    if name.startswith("pixart"):
        if negatives is None:
            kwargs["negative_prompt"] = ""
        tokens, mask, negative, negative_mask = theirs.encode_prompt(
            prompts, clean_caption=False, **kwargs
        )
        return Texts(tokens, negative, (mask.bool(), negative_mask.bool()))
    found = theirs.encode_prompt(prompts, num_images_per_prompt=1, **kwargs)
    return Texts(*found[:2], pooled=found[2:] if name == "sdxl" else None)


def check(name: str, both: Pair, negatives: Any) -> None:
    ours, theirs = both
    want = their_texts(name, theirs, PROMPTS, negatives)
    cond = ours.encode(PROMPTS)
    null = ours.null().expand(len(PROMPTS)) if negatives is None else ours.encode(negatives)
    oracle.close(f"{name} prompts", cond.tokens, want.tokens)
    assert (want.masks is None and cond.mask is None) or torch.equal(cond.mask, want.masks[0])
    assert (want.masks is None and null.mask is None) or torch.equal(null.mask, want.masks[1])
    assert (cond.pooled is None) == (want.pooled is None)
    if want.pooled is not None:
        oracle.close(f"{name} pooled", cond.pooled, want.pooled[0])
    pairs = [(null.tokens, want.negative)]
    pairs += [] if want.pooled is None else [(null.pooled, want.pooled[1])]
    for got, expected in pairs:
        if name == "sdxl" and negatives is None:
            assert got.shape == expected.shape and not got.any() and not expected.any()
        else:
            oracle.close(f"{name} negatives", got, expected)


def test_texts_equal_diffusers(both: tuple[str, Pair]) -> None:
    name, found = both
    check(name, found, NEGATIVES)


def test_the_null_text_equals_diffusers(both: tuple[str, Pair]) -> None:
    """Zeros for SDXL, the encoded empty prompt for the rest."""
    name, found = both
    check(name, found, None)


def test_token_ids_equal_diffusers(both: tuple[str, Pair]) -> None:
    name, (ours, theirs) = both
    their_names = ["tokenizer", "tokenizer_2"][: len(ours.tokenizers)]
    for spec, tokenizer, their_name in zip(
        ours.spec.text, ours.tokenizers, their_names, strict=True
    ):
        assert tokenizer is not None and tokenizer.pad_id == spec.pad_id
        prompts = [p.lower().strip() if name.startswith("pixart") else p for p in PROMPTS]
        want = getattr(theirs, their_name)(
            prompts,
            padding="max_length",
            max_length=120 if name.startswith("pixart") else 77,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = tokenizer([spec.prepare(p) for p in PROMPTS])
        assert torch.equal(ids, want.input_ids)
        assert torch.equal(mask, want.attention_mask.bool())


# --- whole runs -----------------------------------------------------------------------------------


def their_latents(name: str, theirs: Any, z: Tensor, negatives: Any, kappa: float) -> Tensor:
    more: dict[str, Any] = {"negative_prompt": negatives}
    if name.startswith("pixart"):
        more |= {"use_resolution_binning": False, "clean_caption": False}
        more["negative_prompt"] = "" if negatives is None else negatives
    return theirs(
        PROMPTS[: len(z)],
        height=8 * z.shape[2],
        width=8 * z.shape[3],
        num_inference_steps=4,
        guidance_scale=kappa,
        latents=z.clone(),
        output_type="latent",
        **more,
    ).images


def with_sampler(both: Pair, sampler: str | None) -> Pair:
    """Both pipelines with DDIM, or another sampler, in place of the model's own."""
    ours, theirs = both
    spec = ours.spec if sampler is None else dataclasses.replace(ours.spec, sampler=sampler)
    theirs.scheduler = scheduler(spec)
    again = Pipeline(spec, ours.backbone, ours.vae, ours.text_encoders, ours.tokenizers)
    return Pair(again, theirs)


@pytest.mark.parametrize("sampler", [None, "ddim"])
@pytest.mark.parametrize("negatives", [["blurry, Low Quality", "a dog", LONG], None])
def test_runs_equal_diffusers(
    both: tuple[str, Pair], negatives: list[str] | None, sampler: str | None
) -> None:
    """Four steps of the model's own sampler or of DDIM under CFG, from the same noise."""
    name, (ours, theirs) = both[0], with_sampler(both[1], sampler)
    z = randn(3, 4, SIDE, SIDE, seed=40)
    want = their_latents(name, theirs, z, negatives, 4.0)
    got = ours.latents(PROMPTS[:3], z, negatives, guidance="cfg", scale=4.0, steps=4)
    oracle.close(f"{name} {ours.spec.sampler} latents", got, want)


def test_pictures_equal_diffusers(both: tuple[str, Pair]) -> None:
    name, (ours, theirs) = both[0], with_sampler(both[1], None)
    z = randn(1, 4, SIDE, SIDE, seed=40)
    latents = their_latents(name, theirs, z, ["a dog"], 4.0)
    with torch.no_grad():
        want = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample.clamp(-1, 1)
    got = ours.pictures(PROMPTS[:1], z, ["a dog"], guidance="cfg", scale=4.0, steps=4)
    oracle.close(f"{name} pictures", got, want)
    matrix.record(name, "whole run", max(oracle.errors(got, want)))


@pytest.mark.parametrize("size", [(6, 10), (16, 8)])
def test_other_sizes_equal_diffusers(both: tuple[str, Pair], size: tuple[int, int]) -> None:
    """SDXL and PixArt-1024 are told the size of the picture."""
    name, (ours, theirs) = both[0], with_sampler(both[1], "ddim")
    z = randn(1, 4, *size, seed=42)
    want = their_latents(name, theirs, z, ["a dog"], 4.0)
    got = ours.latents(PROMPTS[:1], z, ["a dog"], guidance="cfg", scale=4.0, steps=4)
    oracle.close(f"{name} {size} latents", got, want)


def test_a_mixed_batch_is_its_rows(both: tuple[str, Pair]) -> None:
    """A row without a negative runs with the null text, whatever the other rows have."""
    name, (ours, _) = both
    z = randn(2, 4, SIDE, SIDE, seed=41)
    got = ours.latents(PROMPTS[:2], z, [None, "a dog"], guidance="cfg", scale=4.0, steps=2)
    for i, negative in enumerate((None, "a dog")):
        alone = ours.latents(
            PROMPTS[i : i + 1], z[i : i + 1], [negative], guidance="cfg", scale=4.0, steps=2
        )
        oracle.close(f"{name} row {i}", got[i : i + 1], alone)
