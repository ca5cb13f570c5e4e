"""The model folders that come with the package: small, whole, made by the committed recipes."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import snoopi
from snoopi import config as recipes
from snoopi import generate, worlds
from snoopi.evaluate.negatives import EVALUATION_SEED
from snoopi.evaluate.world import Ruler
from snoopi.final import drawer
from snoopi.folders import SHIPPED, read_spec, shipped
from snoopi.pipeline import load
from snoopi.train import FREE
from snoopi.worlds.judge import Judge

TEACHER = SHIPPED / "shapes_teacher"
TEACHERS = ("shapes_teacher", "emoji_teacher")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.stem}.{k}": v for f in files for k, v in load_file(f).items()}


def test_what_is_shipped() -> None:
    assert shipped() == ["emoji_teacher", "shapes_teacher", "shapes_vae"]


def test_a_wheel_holds_every_file_of_the_package() -> None:
    root = Path(snoopi.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["snoopi"]
    held = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    built = {".py", ".pyc", ".so"}  # setuptools takes modules and extensions by itself
    files = {path for path in root.rglob("*") if path.is_file() and path.suffix not in built}
    assert files - held == set()


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_small_and_in_fp16(name: str) -> None:
    found = weights(SHIPPED / name)
    assert {key.split(".")[0] for key in found} == {"backbone", "text_encoder", "vae"}
    assert sum(value.numel() for value in found.values()) <= 4_800_000
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert all(bool(value.isfinite().all()) for value in found.values())
    size = sum(file.stat().st_size for file in (SHIPPED / name).rglob("*") if file.is_file())
    assert size < 10_000_000


def test_pictures_of_a_teacher_say_whose_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("emoji_teacher", True), ("shapes_teacher", False)):
        words = ["", "--steps", "2", "--guidance", "none", "--out", str(tmp_path / "a.png")]
        assert generate.main([name, *words]) == 0
        assert ("OpenMoji" in capsys.readouterr().out) == said


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_what_its_recipe_makes(name: str) -> None:
    """Keys that came after the teacher was made must stand at their defaults."""
    provenance = read_spec(SHIPPED / name)[1]
    made = provenance["config"]
    now, default = recipes.flat(recipes.load(name)), recipes.flat(recipes.Config())
    assert provenance["recipe"] == name and set(made) <= set(now)
    assert {key: now[key] for key in made} == made
    later = {key for key in set(now) - set(made) if not key.startswith(FREE)}
    assert all(now[key] == default[key] for key in later)
    assert ("OpenMoji" in provenance.get("pictures", "")) == (name == "emoji_teacher")


def test_its_vae_has_a_source() -> None:
    provenance = read_spec(TEACHER)[1]
    source = SHIPPED / provenance["source"] / "vae.safetensors"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["source_sha256"] == {"vae.safetensors": digest}


@pytest.mark.parametrize("part", ["vae.safetensors"])
def test_its_vae_is_the_shipped_one(part: str) -> None:
    mine, theirs = load_file(TEACHER / part), load_file(SHIPPED / "shapes_vae" / part)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key].half()) for key, value in mine.items())


@pytest.mark.parametrize(("name", "right"), [("shapes", 0.9), ("emoji", 0.35)])
def test_a_teacher_follows_held_out_prompts(name: str, right: float) -> None:
    """A small sample of what docs/worlds.md measures at n = 1,000: 100 and 49.7 % at kappa 4."""
    world = worlds.build(name)
    ruler = Ruler(world, Judge.load(world), 64, EVALUATION_SEED)
    teacher = load(SHIPPED / f"{name}_teacher", optimize="auto")
    assert ruler.measure(drawer(teacher, 25, 4.0), 64).all_right >= right
