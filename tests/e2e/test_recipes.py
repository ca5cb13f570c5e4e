"""Every recipe of a real model runs: its own losses and schedules, at the size of a toy."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snoopi
from snoopi import config, final, folders, train, worlds, zoo
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.clip_vision import CLIPVisionConfig
from snoopi.models.t5 import T5Config
from snoopi.models.vae import TAESDConfig, VAEConfig
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ModelSpec, ToolSpec

ROOT = Path(snoopi.__file__).parents[1]
PROMPTS = ("a red fox in the snow", "two boats", "the sea at night", "a cup of tea", "an owl")
NEGATIVES = ("bad photo", "duplicate", "low resolution")
WORDS = sorted({word for prompt in (*PROMPTS, *NEGATIVES) for word in prompt.split()})
TOKENIZER = Tokenizer.words(WORDS, 8)
# The recipe and its teacher.
RECIPES = {
    "pgsb_sd21": "sd21",
    "pgsb_sd15": "sd15",
    "sbv2_sd21": "sd21",
    "swiftbrush_sd21": "sd21",
    "pgsb_pixart": "pixart-512",
    "pgsb_pixart_t999": "pixart-512",
    "pgsb_sdxl": "sdxl",
    "nasat_pixart": "pixart-512",
    "nasat_sd21": "sd21",
}
SLOW = ("pgsb_sd15", "swiftbrush_sd21", "pgsb_sdxl", "nasat_sd21")
SMALL = [
    *("run.batch=2", "run.steps=3", "run.log=1", "run.save=3", "lora.rank=2"),
    *("student_lora.rank=2", "clip_loss.tau=1", "data.dropout=0.5"),
]


def figures(folder: Path) -> list[dict[str, float]]:
    """The rows of a run, without its speed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "images_per_s"} for row in rows]


def shrunk(name: str) -> ModelSpec:
    """A preset of the same kind: its levels, projections, text outputs, null text and schedule."""
    spec = zoo.model(name)
    words = TOKENIZER.tokenizer.get_vocab_size()
    widths, texts = [], []
    for i, text in enumerate(spec.text):
        small: dict[str, Any] = {"width": 12 + 4 * i, "mlp_width": 16, "layers": 2, "heads": 2}
        if isinstance(text.config, T5Config):
            small["head_dim"] = 6
        elif text.config.projection:
            small["projection"] = 10
        encoder = dataclasses.replace(text.config, **small).for_words(words, 8)
        texts.append(dataclasses.replace(text, config=encoder, pad_id=0))
        widths.append(encoder.width)
    more: dict[str, Any] = {"text_width": sum(widths)}
    if name.startswith("pixart"):
        more |= {"layers": 2, "heads": 2, "head_dim": 8, "sample_size": 8}
    else:
        levels = len(spec.backbone.channels)  # type: ignore[union-attr]
        more |= {"channels": (8, *[16] * (levels - 1)), "heads": (2,) * levels, "norm_groups": 4}
        more |= {"resnets": 1, "mid_depth": 1}
        depth = spec.backbone.depth  # type: ignore[union-attr]
        more["depth"] = tuple(min(d, 1) for d in depth)
        if name == "sdxl":
            more |= {"pooled_width": 10, "size_width": 8}
    return dataclasses.replace(
        spec,
        backbone=dataclasses.replace(spec.backbone, **more),
        vae=VAEConfig(channels=(8, 8), resnets=1, norm_groups=4, scaling=spec.vae.scaling),
        text=tuple(texts),
        latent_size=8,
    )


def alive(net: nn.Module, seed: int) -> nn.Module:
    """A network whose last layer, which starts at zero, gives something."""
    for i, p in enumerate(net.parameters()):
        if not bool(p.any()):
            p.data.copy_(0.05 * Noise(seed).normal("alive", 0, [i], p.shape)[0])
    return net.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/*, as the recipes name them, and their texts."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "negatives.txt").write_text("\n".join(NEGATIVES))
    for name in set(RECIPES.values()):
        spec = shrunk(name)
        nets = {part: alive(zoo.fresh(spec, part, 0), 1) for part in spec.parts()}
        texts = [nets[zoo.text_part(i)] for i in range(len(spec.text))]
        tokenizers = [TOKENIZER] * len(texts)
        pipeline = Pipeline(spec, nets["backbone"], nets["vae"], texts, tokenizers)
        pipeline.save(root / "models" / name)
    image = CLIPVisionConfig(
        width=16, mlp_width=24, layers=1, heads=2, patch=8, image_size=16, projection=12
    )
    text = CLIPTextConfig(width=12, mlp_width=24, layers=1, heads=2, projection=12)
    text = text.for_words(TOKENIZER.tokenizer.get_vocab_size(), 8)
    clip = ToolSpec("clip-vit-b-32", {"image_encoder": image, "text_encoder": text})
    towers = {part: zoo.fresh(clip, part, 0) for part in clip.parts()}
    folders.save_tools(root / "models/clip-vit-b-32", clip, towers, TOKENIZER)
    sizes = TAESDConfig(channels=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    for name in ("taesd", "taesdxl"):
        tiny = ToolSpec(name, {"vae": sizes})
        folders.save_tools(root / "models" / name, tiny, {"vae": zoo.fresh(tiny, "vae", 0)})
    return root


@pytest.mark.parametrize(
    "name", [pytest.param(r, marks=[pytest.mark.slow] if r in SLOW else []) for r in RECIPES]
)
def test_three_steps(
    name: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a user runs it, from the folder with models/ and prompts.txt; smaller and shorter."""
    monkeypatch.chdir(models)
    recipe = config.load(name)
    assert train.main([name, *SMALL, "--out", str(tmp_path / "run")]) == 0
    rows = figures(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    low, high = recipe.kappa.teacher
    assert all(low <= row["kappa_mean"] <= high for row in rows)
    assert all(row["grad_norm_lora"] > 0 for row in rows)
    # At the first step the teachers agree where kappa is one; from the second on VSD pulls.
    assert all(row["grad_norm_student"] > 0 and row["gap"] > 0 for row in rows[1:])
    if recipe.clip_loss.weight:
        falling = [recipe.clip_loss.weight * left / 3 for left in (3, 2, 1)]
        assert [row["clip_weight"] for row in rows] == pytest.approx(falling)
        assert all(row["loss_clip"] > 0 and row["grad_x0_clip"] > 0 for row in rows)
    else:
        assert "loss_clip" not in rows[0]
    teacher, student = snoopi.load(recipe.model.teacher), snoopi.load(tmp_path / "run/model")
    assert student.spec.one_step == zoo.OneStep(recipe.vsd.student_t)
    assert student.spec.null == recipe.data.null == zoo.model(RECIPES[name]).null
    assert student.backbone is not None and teacher.backbone is not None
    before, after = teacher.backbone.state_dict(), student.backbone.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    if recipe.model.student == "lora":
        wanted = tuple(f"{target}.weight" for target in recipe.student_lora.targets)
        assert changed and all(key.endswith(wanted) for key in changed)
    else:
        assert len(changed) > 0.9 * len(before)
    assert "snoopi.train" not in capsys.readouterr().err  # no complaint


TINY = [
    *("run.batch=2", "run.steps=3", "run.log=1", "run.save=3"),
    *("evaluate.prompts=4", "evaluate.every=0", "evaluate.batch=8"),
]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps of the emoji world's teacher."""
    out = tmp_path_factory.mktemp("emoji")
    more = ["evaluate.teacher_steps=2", "optim.student.warmup=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snoopi.trainers.FIT_PICTURES", 64)
        assert train.main(["emoji_teacher", *TINY, *more, "--out", str(out / "emoji_teacher")]) == 0
    return out


def test_emoji_teacher(emoji: Path) -> None:
    """Three steps of the recipe as it is, in few pictures; the report says whose art it is."""
    rows = figures(emoji / "emoji_teacher")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    report = (emoji / "emoji_teacher/report.html").read_text(encoding="utf-8")
    assert "OpenMoji (https://openmoji.org), CC BY-SA 4.0" in report
    teacher = snoopi.load(emoji / "emoji_teacher/model")
    assert teacher.spec.arch == "emoji" and teacher("woman teacher")[0].size == (32, 32)


def test_emoji_student(emoji: Path) -> None:
    """Three steps from the teacher that is shipped; the strip of the world's own example."""
    more = ["evaluate.removal=0", "evaluate.teacher_steps=2"]
    assert train.main(["pgsb_emoji_gap", *TINY, *more, "--out", str(emoji / "pgsb_emoji_gap")]) == 0
    rows = figures(emoji / "pgsb_emoji_gap")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    summary = json.loads((emoji / "pgsb_emoji_gap/summary.json").read_text(encoding="utf-8"))
    assert summary["prompts"] == 4 and 0 <= summary["all_right"] <= 1
    student = snoopi.load(emoji / "pgsb_emoji_gap/model")
    figure = final._strip(student, worlds.build("emoji"))
    assert figure.caption.startswith('"teacher dark skin tone", negative prompt "man"')


@pytest.mark.parametrize("name", [name for name in config.recipes() if "emoji" in name])
def test_emoji_recipes_are_those_of_shapes_with_another_world(name: str) -> None:
    """What differs is the world, its preset, what a run starts from, and a teacher's steps."""
    changed = config.differences(config.load(name.replace("emoji", "shapes")), config.load(name))
    ours = {line.split(":")[0] for line in changed}
    assert "data.world" in ours
    assert ours <= {"data.world", "model.preset", "model.vae", "model.teacher", "run.steps"}


@pytest.mark.parametrize("key", ["model", "taesd"])
def test_a_missing_tool_is_said_before_the_teacher_is_read(
    key: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On one line that names the key; nothing is written."""
    monkeypatch.chdir(models)
    words = ["pgsb_sd21", "model.teacher=models/nowhere", f"clip_loss.{key}=models/gone"]
    assert train.main([*words, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"clip_loss.{key}: models/gone is not a model folder" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_are_one_process(models: Path, tmp_path: Path) -> None:
    """A sharded LoRA student with the CLIP loss; its merged folder, too."""
    # Without health figures: diversity is of the pictures that one rank has at once, here one.
    more = ("run.dtype=fp32", "run.health=false")
    words = ["-m", "snoopi.train", "sbv2_sd21", *SMALL, *more, "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, *words, str(tmp_path / f"on{ranks}")]
        done = subprocess.run(command, cwd=models, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (figures(tmp_path / f"on{ranks}") for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-7) for key in a)
    nets = (snoopi.load(tmp_path / f"on{ranks}/model").backbone for ranks in (1, 2))
    states = [net.state_dict() for net in nets if net is not None]
    assert len(states) == 2 and states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_print_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([name, "--print-config"]) == 0
    assert f'teacher = "models/{RECIPES[name]}"' in capsys.readouterr().out


def test_numbers_of_table_6() -> None:
    """SNOOPI's appendix, and training.md 2.1 to 2.7 where it is silent."""
    steps = {"pgsb_sd15": 60_000, "pgsb_sd21": 40_000, "pgsb_pixart": 60_000}
    for name, count in steps.items():
        recipe = config.load(name)
        top = 3.0 if name == "pgsb_pixart" else 4.0
        assert (recipe.run.steps, recipe.run.batch, recipe.run.dtype) == (count, 64, "bf16")
        assert recipe.kappa.teacher == recipe.kappa.lora == (0.5, top)
        assert (recipe.clip_loss.weight, recipe.clip_loss.tau) == (0.1, 0.37)
        assert (recipe.optim.student.lr, recipe.optim.lora.lr) == (1e-6, 1e-3)
        assert (recipe.lora.rank, recipe.lora.gamma) == (64, 128)
    times = {name: config.load(name).vsd.student_t for name in RECIPES}
    assert times == {**dict.fromkeys(RECIPES, 999), "pgsb_pixart": 400, "nasat_pixart": 400}
    aware = config.load("nasat_pixart"), config.load("nasat_sd21")  # the later version's numbers
    assert all(r.nasa_train.alpha == (0, 1) and r.data.negatives for r in aware)
    assert (aware[0].run.steps, aware[0].run.batch) == (50_000, 32)
    brush, second = config.load("swiftbrush_sd21"), config.load("sbv2_sd21")
    assert brush.kappa.teacher == brush.kappa.lora == (4.5, 4.5) and not brush.clip_loss.weight
    assert (second.student_lora.rank, second.student_lora.gamma) == (256, 512)
    assert second.model.student == "lora" and second.clip_loss.tau == 0.35
