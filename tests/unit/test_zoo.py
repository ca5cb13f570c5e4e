"""Presets, their JSON, and building networks from them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from snoopi import zoo
from snoopi.models.clip import CLIPText
from snoopi.models.dit import DiT, DiTConfig
from snoopi.models.t5 import T5Encoder
from snoopi.models.unet import UNet, UNetConfig
from snoopi.models.vae import VAE, PatchVAE, PatchVAEConfig
from snoopi.samplers import SAMPLERS
from snoopi.zoo import PRESETS, ModelSpec


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_is_exact(name: str) -> None:
    spec = PRESETS[name]
    text = json.dumps(spec.to_json())
    again = ModelSpec.from_json(json.loads(text))
    assert again == spec and type(again.text) is tuple
    assert type(again.backbone) is type(spec.backbone)
    assert json.dumps(again.to_json()) == text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_and_fit_together(name: str) -> None:
    spec = PRESETS[name]
    assert spec.arch == name and zoo.preset(name) is spec
    assert sum(text.config.width for text in spec.text) == spec.backbone.text_width
    pooled = [getattr(text.config, "projection", None) for text in spec.text if text.pooled]
    width = getattr(spec.backbone, "pooled_width", None)
    assert pooled == ([width] if width else [])
    assert spec.latent_channels == spec.backbone.in_channels
    variance = 2 if "pixart" in name else 1  # PixArt's is learned, and cut off
    assert spec.backbone.out_channels == variance * spec.latent_channels
    if isinstance(spec.backbone, DiTConfig):
        assert spec.backbone.sample_size == spec.latent_size
    for text in spec.text:
        assert 0 <= text.pad_id < text.config.vocabulary
        assert text.config.eos_id < text.config.vocabulary


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_recipes_can_be_run(name: str) -> None:
    """Its sampler exists, and its times are as many as its steps."""
    base, recipe, _ = zoo.RECIPES[name]
    spec = PRESETS[name]
    assert spec.one_step == recipe
    assert recipe.sampler == "" or recipe.sampler in SAMPLERS
    assert recipe.steps == 1 or recipe.sampler
    assert not recipe.times or len(recipe.times) == recipe.steps
    assert (recipe.guidance is None) == (getattr(base.backbone, "guidance_width", None) is None)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_default_strengths() -> None:
    """Of the published models, NASA's of SNOOPI Tab. 8 (0.5 as in its Tab. 3 where it has none)."""
    rows = {"instaflow": 0.19, "dmd-pixart": 0.45, "yoso-pixart": 0.2, "pixart-lcm": 0.5}
    kinds = {"sd15": 0.04, "dreamshaper": 0.04, "sdxl": 0.5, "pixart": 0.8}
    for name, spec in PRESETS.items():
        if name in ("shapes", "shapes_dit", "emoji", "debug"):
            want = {"nasa": 1.0, "nasa-centred": 1.5, "embed-sub": 1.0, "cfg": 2.0}
        else:
            kind = next((v for k, v in kinds.items() if k in name), 0.3)  # the rest are SD2.1's
            want = {"nasa": rows.get(name, kind)}
        assert spec.strengths == want, name
        assert all(type(value) is float for value in spec.strengths.values())


def test_a_spec_of_an_earlier_version_is_read() -> None:
    data = PRESETS["sd-turbo"].to_json()
    del data["sampler"]
    data["one_step"] = {"kind": "OneStep", "t": 999}
    spec = ModelSpec.from_json(data)
    assert spec.sampler == "ddim" and spec.one_step == zoo.OneStep()
    del data["kappa"]
    with pytest.raises(ValueError, match="model lacks kappa"):
        ModelSpec.from_json(data)


def test_published_constants() -> None:
    """Scaling, prediction, padding and null of the published models."""
    scaling = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025, "sdxl-turbo": 0.13025}
    for name, value in scaling.items():
        assert PRESETS[name].vae.scaling == value  # type: ignore[union-attr]
    predictions = {n: PRESETS[n].schedule.prediction for n in ("sd15", "sd21", "sd21-v", "sdxl")}
    assert predictions == {"sd15": "eps", "sd21": "eps", "sd21-v": "v", "sdxl": "eps"}
    pads = {n: [text.pad_id for text in PRESETS[n].text] for n in ("sd15", "sd21", "sdxl")}
    assert pads == {"sd15": [49407], "sd21": [0], "sdxl": [49407, 0]}
    assert [text.output for text in PRESETS["sdxl"].text] == ["penultimate", "penultimate"]
    assert (PRESETS["sd15"].null, PRESETS["sdxl"].null) == ("encoded", "zeros")
    sizes = {n: PRESETS[n].latent_size for n in ("sd15", "sd21-v", "sdxl", "sdxl-turbo")}
    assert sizes == {"sd15": 64, "sd21-v": 96, "sdxl": 128, "sdxl-turbo": 64}


@pytest.mark.parametrize("name", PRESETS)
def test_every_part_builds_on_meta_in_eval_mode(name: str) -> None:
    parts = PRESETS[name].parts()
    kinds = [type(zoo.build(name, part)) for part in parts]
    dit = isinstance(PRESETS[name].backbone, DiTConfig)
    texts = [T5Encoder if dit else CLIPText] * len(PRESETS[name].text)
    vae = PatchVAE if isinstance(PRESETS[name].vae, PatchVAEConfig) else VAE
    assert kinds == [DiT if dit else UNet, vae, *texts]
    net = zoo.build(name)
    assert not net.training and all(p.is_meta for p in net.parameters())
    assert not torch.zeros(1).is_meta


@pytest.mark.parametrize(
    ("name", "backbone", "text"),
    [
        ("pixart-256", 610_856_096, 4_762_310_656),
        ("pixart-512", 610_856_096, 4_762_310_656),
        ("pixart-1024", 611_349_152, 4_762_310_656),
        ("shapes_dit", 3_338_512, 224_864),
    ],
)
def test_parameter_counts(name: str, backbone: int, text: int) -> None:
    nets = [zoo.build(name, part) for part in ("backbone", "text_encoder")]
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [backbone, text]


def test_pixart_has_its_published_schedule_positions_and_sizes() -> None:
    for side in (256, 512, 1024):
        spec = PRESETS[f"pixart-{side}"]
        assert spec.latent_size == side // 8 and spec.vae == PRESETS["sd15"].vae
        assert (spec.schedule.betas, spec.schedule.beta_start) == ("linear", 1e-4)
        assert (spec.schedule.beta_end, spec.schedule.prediction) == (0.02, "eps")
        assert [text.config.length for text in spec.text] == [120]
        assert [text.config.masked for text in spec.text] == [True]
        ids = spec.backbone.size_ids(side, side)
        assert ids == ((1024.0, 1024.0, 1.0) if side == 1024 else None)
    assert PRESETS["sdxl"].backbone.size_ids(1024, 1024) == (1024, 1024, 0, 0, 1024, 1024)
    assert PRESETS["sd15"].backbone.size_ids(512, 512) is None


def test_build_takes_a_spec_and_a_device() -> None:
    net = zoo.build(PRESETS["shapes"], "text_encoder", device="cpu")
    assert all(p.device.type == "cpu" for p in net.parameters())


def test_user_mistakes_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'sd1\.5'; the nearest is 'sd15'"):
        zoo.preset("sd1.5")
    with pytest.raises(ValueError, match="sd15 has no part 'text_encoder_2'; it has backbone, vae"):
        zoo.build("sd15", "text_encoder_2")


def broken(path: str, value: Any) -> dict[str, Any]:
    """SDXL's JSON with one value changed (or removed: value `...`) at a dotted path."""
    data: Any = copy.deepcopy(json.loads(json.dumps(PRESETS["sdxl-turbo"].to_json())))
    *parents, key = [int(k) if k.isdigit() else k for k in path.split(".")]
    node = data
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("latent_sise", 64, "model has an unknown key 'latent_sise'; the nearest is 'latent_size'"),
        ("backbone.chanels", [], "model.backbone has an unknown key 'chanels'.*'channels'"),
        ("schedule", ..., "model lacks schedule"),
        ("backbone.heads", ..., "model.backbone lacks heads"),
        ("latent_size", "64", "model.latent_size must be int, got '64'"),
        ("latent_size", 64.0, "model.latent_size must be int, got 64.0"),
        ("steps", True, "model.steps must be int, got True"),
        ("backbone.linear_proj", 1, "model.backbone.linear_proj must be bool, got 1"),
        ("backbone.channels", 320, "model.backbone.channels must be a list, got 320"),
        ("backbone.channels", [320, 640, "1280"], r"model.backbone.channels\[2\] must be int"),
        ("null", "empty", "model.null must be one of encoded, zeros, got 'empty'"),
        ("schedule.prediction", "epsilon", "model.schedule.prediction must be one of eps, v, x0"),
        ("strengths", [], r"model.strengths must be an object, got \[\]"),
        ("strengths.nasa", "big", "model.strengths.nasa must be float, got 'big'"),
        ("vae.kind", "TAESD", r"model.vae.kind must be one of .*'PatchVAEConfig', 'TAESDC"),
        ("vae", 3, "model.vae.kind must be one of"),
        ("backbone", None, r"model.backbone.kind must be one of \['UNetConfig', 'DiTConfig'\]"),
        (
            "text.0.config.kind",
            "T5Config",
            r"model.text\[0\].config has an unknown key 'activation'",
        ),
        ("one_step", {"kind": "TwoStep"}, "model.one_step must be an object of kind OneStep"),
        ("text.1.output", "first", r"model.text\[1\].output must be one of last, penultimate"),
        ("text.0.config.activation", "relu", r"model.text\[0\].config.activation must be one of"),
        ("backbone.heads", [5, 10], "channels, depth and heads need one entry a level"),
        ("backbone.heads", [5, 10, 19], "1280 channels must be divisible by 19 heads"),
    ],
)
def test_broken_json_is_one_clear_error(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_json(broken(path, value))


@pytest.mark.parametrize("data", [None, [], "sd15", {}, {"kind": "UNetConfig"}])
def test_what_is_no_model_at_all_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="model must be an object of kind ModelSpec"):
        ModelSpec.from_json(data)


def test_integers_are_read_as_floats_where_floats_belong() -> None:
    spec = ModelSpec.from_json(broken("kappa", 4))
    assert spec == replace(PRESETS["sdxl-turbo"], kappa=4.0) and type(spec.kappa) is float


def test_one_step_may_be_absent() -> None:
    assert ModelSpec.from_json(broken("one_step", None)).one_step is None


def test_unet_config_refuses_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="40 channels must be divisible by 4 heads and 16 norm"):
        UNetConfig(channels=(40,), depth=(1,), heads=(4,), norm_groups=16)
