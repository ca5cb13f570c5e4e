"""Health figures in rows and report, and training that does not know of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import FAST, Warm, model_bytes, rows

from snoopi import runstate

pytestmark = pytest.mark.e2e

QUIET = "evaluate.prompts=0"
STEMS = ("gap_t_", "gap_kappa_", "diversity", "drift_", "denoise_", "warning")


def without_health(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(STEMS)}


def tensor_files(out: Path, step: int) -> dict[str, tuple[int, str]]:
    """Sizes and hashes of what a state holds of the training."""
    files = runstate.manifest(out / "state" / f"step-{step:08d}").files
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


def test_training_is_the_same_without_health(warm: Warm, reference: Path) -> None:
    out = reference.with_name("without-health")
    warm.run("train", *FAST, QUIET, "run.health=false", "--out", str(out))
    assert rows(out) == [without_health(row) for row in rows(reference)]
    assert rows(out) != rows(reference)
    assert runstate.attached(out, 6) == {}
    assert tensor_files(out, 6) == tensor_files(reference, 6)
    weights, expected = model_bytes(out), model_bytes(reference)
    assert weights["backbone.safetensors"] == expected["backbone.safetensors"]


def test_rows_and_report_tell_of_health(reference: Path) -> None:
    found = rows(reference)
    for row in found:
        for stem in STEMS[:3]:
            assert any(name.startswith(stem) for name in row), (stem, row)
        assert row["denoise_frozen"] != row["denoise_lora"]
    # Adapters start at 0, so the first update has no gradient.
    assert found[0]["drift_start"] == 0 < found[1]["drift_start"] == found[1]["drift_last"]
    assert found[5]["drift_start"] != found[5]["drift_last"] > 0
    gaps = [value for name, value in found[-1].items() if name.startswith("gap_t_")]
    rounded = pytest.approx(found[-1]["gap"], rel=1e-6)  # a row's own mean is in fp32
    assert min(gaps) <= found[-1]["gap"] <= max(gaps) or max(gaps) == rounded
    page = (reference / "report.html").read_text()
    assert "<h2>Health</h2>" in page and "Denoising loss of both teachers" in page


def test_the_teachers_are_compared_on_the_same_numbers(warm: Warm, reference: Path) -> None:
    """Adapters start at 0, so the first of two updates is one of equals, and logged by itself."""
    out = reference.with_name("compared")
    words = ["run.steps=2", "run.log=1", "lora.updates_per_step=1"]
    warm.run("train", *FAST, QUIET, *words, "--out", str(out))
    first, second = rows(out)
    assert first["denoise_lora"] == first["loss_lora"]
    assert first["denoise_frozen"] == pytest.approx(first["denoise_lora"], rel=1e-6)
    assert second["denoise_lora"] == second["loss_lora"]
    assert second["denoise_frozen"] != pytest.approx(second["denoise_lora"], rel=1e-6)
