"""The model folders that come with the package: small, whole, made by the committed recipes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snoopi import config as recipes
from snoopi.evaluate.negatives import EVALUATION_SEED
from snoopi.evaluate.world import Ruler
from snoopi.final import drawer
from snoopi.folders import SHIPPED, read_spec, shipped
from snoopi.pipeline import load
from snoopi.train import FREE
from snoopi.worlds.judge import Judge
from snoopi.worlds.shapes import ShapesWorld

TEACHER = SHIPPED / "shapes_teacher"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.stem}.{k}": v for f in files for k, v in load_file(f).items()}


def test_what_is_shipped() -> None:
    assert shipped() == ["shapes_teacher", "shapes_vae"]


def test_the_teacher_is_small_and_in_fp16() -> None:
    found = weights(TEACHER)
    assert {key.split(".")[0] for key in found} == {"backbone", "text_encoder", "vae"}
    assert sum(value.numel() for value in found.values()) <= 4_800_000
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert sum(file.stat().st_size for file in TEACHER.rglob("*") if file.is_file()) < 10_000_000


def test_the_teacher_is_what_its_recipe_makes() -> None:
    """Keys that came after the teacher was made must stand at their defaults."""
    provenance = read_spec(TEACHER)[1]
    made = provenance["config"]
    now, default = recipes.flat(recipes.load("shapes_teacher")), recipes.flat(recipes.Config())
    assert provenance["recipe"] == "shapes_teacher" and set(made) <= set(now)
    assert {key: now[key] for key in made} == made
    later = {key for key in set(now) - set(made) if not key.startswith(FREE)}
    assert all(now[key] == default[key] for key in later)
    source = SHIPPED / provenance["source"] / "vae.safetensors"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["source_sha256"] == {"vae.safetensors": digest}


@pytest.mark.parametrize("part", ["vae.safetensors"])
def test_its_vae_is_the_shipped_one(part: str) -> None:
    mine, theirs = load_file(TEACHER / part), load_file(SHIPPED / "shapes_vae" / part)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key].half()) for key, value in mine.items())


def test_the_teacher_follows_held_out_prompts() -> None:
    """A small sample of what docs/worlds.md measures at n = 1,000 (>= 96 % at kappa 4)."""
    ruler = Ruler(ShapesWorld(), Judge.load(), 64, EVALUATION_SEED)
    teacher = load(TEACHER, optimize="auto")
    assert ruler.measure(drawer(teacher, 25, 4.0), 64).all_right >= 0.9
