"""Configs that lie: junk in any config.json is one ValueError, before a network is built of it."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from snoopi import errors, zoo
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig
from snoopi.pipeline import Pipeline
from snoopi.worlds.shapes import ShapesWorld
from snoopi.zoo import ModelSpec
from weights_convert.convert import convert, plan_all
from weights_convert.detect import detect
from weights_convert.export import export

JUNK: tuple[Any, ...] = (
    *(None, -1, 0, 7, 10**9, 10**30, 1e300, float("nan"), True, "x", ""),
    *([], [None], [1, 2, 3], [10**9, 10**9], {}, {"a": 1}),
)
VAE = VAEConfig(channels=(16, 16), resnets=1, norm_groups=8)


def specs() -> dict[str, ModelSpec]:
    text = CLIPTextConfig(
        vocabulary=32, length=12, width=16, mlp_width=32, layers=1, heads=2, eos_id=31
    )
    sdxl, dit = zoo.preset("sdxl"), zoo.preset("shapes_dit")
    unet = UNetConfig(
        channels=(16, 32),
        resnets=1,
        depth=(0, 1),
        heads=(1, 2),
        text_width=32,
        linear_proj=True,
        norm_groups=8,
        pooled_width=16,
    )
    texts = tuple(
        dataclasses.replace(t, config=dataclasses.replace(text, projection=16 if i else None))
        for i, t in enumerate(sdxl.text)
    )
    backbone = dataclasses.replace(dit.backbone, layers=2, out_channels=8)
    return {
        "sdxl": dataclasses.replace(sdxl, backbone=unet, vae=VAE, text=texts),
        "pixart": dataclasses.replace(dit, backbone=backbone, vae=VAE),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """diffusers folders of a UNet and a DiT with all their parts."""
    base, found = tmp_path_factory.mktemp("configs"), {}
    for name, spec in specs().items():
        nets = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
        texts = [net for part, net in nets.items() if part.startswith("text")]
        words = [ShapesWorld().tokenizer() for _ in texts]
        Pipeline(spec, nets["backbone"], nets["vae"], texts, words, {}).save(base / f"{name}-own")
        export(base / f"{name}-own", base / name, "diffusers")
        found[name] = base / name
    return found


@pytest.fixture
def source(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a folder, its weights as links."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "source", symlinks=True))


def planned(source: Path) -> bool:
    """Whether the folder is taken; else one line of a ValueError names a file or it."""
    try:
        plan_all(detect(source), source)
    except ValueError as error:
        line = errors.one_line(error)
        assert line is not None and str(source) in line and len(line) < 2000
        return False
    return True


def change(file: Path, key: str, value: Any) -> None:
    data = json.loads(file.read_text())
    data[key] = value
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("source", ["sdxl", "pixart"], indirect=True)
def test_junk_under_every_key(source: Path) -> None:
    assert planned(source)
    rng, taken, tried = random.Random(0), 0, 0
    for file in sorted(source.rglob("*config.json")):
        if file.parent.name.startswith("tokenizer"):
            continue
        whole = file.read_text()
        for key in json.loads(whole):
            for value in rng.sample(JUNK, 1):
                change(file, key, value)
                taken += planned(source)
                tried += 1
                file.write_text(whole)
    assert tried > 45 and 0 < taken < 0.7 * tried  # not every key is read


@pytest.mark.parametrize("source", ["sdxl", "pixart"], indirect=True)
def test_a_config_that_is_no_object(source: Path) -> None:
    for file in (*source.rglob("config.json"), source / "model_index.json"):
        whole = file.read_text()
        for text in ("", "[]", "3", "null", "{", '["a"]', '{"a":' * 10_000):
            file.write_text(text)
            assert not planned(source)
        file.write_text(whole)


CLAIMS = [
    ("sdxl", "unet", "layers_per_block", 10**9, "more than its weights can hold"),
    ("sdxl", "unet", "transformer_layers_per_block", [1, 10**9], "more than its weights can hold"),
    ("sdxl", "unet", "block_out_channels", [16, 10**9], "more than its weights can hold"),
    ("sdxl", "unet", "attention_head_dim", -1, "heads must be at least 1"),
    ("sdxl", "unet", "norm_num_groups", 0.5, "norm_groups must be int, got 0.5"),
    ("sdxl", "unet", "norm_eps", 1e-6, "norm_eps = 1e-06 is not supported, only 1e-05"),
    ("sdxl", "unet", "_class_name", ["UNet2DConditionModel"], "is not one of UNet2DCondition"),
    ("sdxl", "text_encoder", "num_hidden_layers", 10**9, "more than its weights can hold"),
    ("sdxl", "text_encoder", "vocab_size", 10**12, "more than its weights can hold"),
    ("sdxl", "text_encoder", "vocab_size", "32", "must be int|unsupported operand"),
    ("sdxl", "text_encoder", "layer_norm_eps", 1e-6, "only 1e-05"),
    ("sdxl", "text_encoder", "hidden_act", "relu", "hidden_act must be quick_gelu or gelu"),
    ("sdxl", "text_encoder", "architectures", 3, "architectures must be a list, got 3"),
    ("sdxl", "vae", "block_out_channels", [], "channels must be at least 1"),
    ("sdxl", "vae", "scaling_factor", 0, "scaling must be positive"),
    ("sdxl", "vae", "scaling_factor", float("inf"), "scaling must be positive"),
    ("sdxl", "vae", "latents_mean", [0.1] * 4, "latents_mean = .* is not supported"),
    ("sdxl", "vae", "latent_channels", -1, "latent_channels must be at least 1"),
    ("sdxl", "scheduler", "prediction_type", ["epsilon"], "prediction_type .* is not supported"),
    ("sdxl", "scheduler", "num_train_timesteps", 10**9, "num_train_timesteps must be from 1 to"),
    ("sdxl", "scheduler", "trained_betas", [0.1, 0.2], "trained_betas = .* is not supported"),
    ("sdxl", "scheduler", "rescale_betas_zero_snr", True, "zero_snr = True is not supported"),
    ("sdxl", "scheduler", "beta_end", 2.0, "beta_end must be from 0 to below 1"),
    ("pixart", "transformer", "num_layers", 10**9, "more than its weights can hold"),
    ("pixart", "transformer", "caption_channels", None, "text_width must be int, got None"),
    ("pixart", "transformer", "norm_type", "layer_norm", "only 'ada_norm_single'"),
    ("pixart", "text_encoder", "d_kv", -3, "head_dim must be at least 1"),
    ("pixart", "text_encoder", "feed_forward_proj", "relu", "must be gated-gelu"),
    ("pixart", "text_encoder", "layer_norm_epsilon", 1e-5, "only 1e-06"),
]


@pytest.mark.parametrize(
    ("source", "part", "key", "value", "match"), CLAIMS, indirect=["source"], ids=str
)
def test_what_a_claim_is_answered(
    source: Path, part: str, key: str, value: Any, match: str, tmp_path: Path
) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(source / part / name, key, value)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "model")
    assert sorted(tmp_path.iterdir()) == before
