"""`python -m weights_convert` as a user types it: what it writes, says, and refuses."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import snoopi
from snoopi.folders import SHIPPED
from tests.e2e.commands import ENV
from weights_convert.__main__ import main

pytestmark = pytest.mark.e2e
TEACHER = SHIPPED / "shapes_teacher"


def run(*words: str | Path, status: int = 0) -> str:
    """Its output; a mistake is one line on stderr and nothing on stdout. In this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*map(str, words)]) == status, err.getvalue()
    if status:
        assert out.getvalue() == "" and len(err.getvalue().splitlines()) == 1, err.getvalue()
        return err.getvalue()
    return out.getvalue()


def test_out_and_back(tmp_path: Path) -> None:
    """A model folder to diffusers' layout and back: the same weights, the same picture."""
    command = [sys.executable, "-m", "weights_convert", "export", str(TEACHER)]
    command += [str(tmp_path / "diffusers"), "--to", "diffusers"]
    said = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True).stdout
    assert f"wrote {tmp_path / 'diffusers'} (diffusers, StableDiffusionPipeline)" in said
    said = run(tmp_path / "diffusers", tmp_path / "model", "--arch", "shapes", "--check")
    assert "286" in said and "3,453,108" in said
    assert "read back: every tensor equals the source's" in said
    for path in TEACHER.glob("*.safetensors"):
        a, b = load_file(path), load_file(tmp_path / "model" / path.name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    pictures = [snoopi.load(m)("a red star", steps=2) for m in (TEACHER, tmp_path / "model")]
    assert pictures[0][0].tobytes() == pictures[1][0].tobytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_single_file_out_and_back(tmp_path: Path) -> None:
    run("export", TEACHER, tmp_path / "model.safetensors", "--to", "ldm")
    said = run(tmp_path / "model.safetensors", tmp_path / "model", "--arch", TEACHER)
    assert "wrote" in said
    for path in TEACHER.glob("*.safetensors"):
        a, b = load_file(path), load_file(tmp_path / "model" / path.name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nowhere does not exist" in run(tmp_path / "nowhere", out, status=2)
    line = run(TEACHER, out, status=2)
    assert "is a model folder already" in line
    (tmp_path / "notes.bin").write_text("no weights")
    assert "is no readable file of weights" in run(tmp_path / "notes.bin", out, status=2)
    out.mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    line = run(tmp_path / "x.pth", out, status=2)
    assert "exists already: it is not a model folder" in line
    line = run(tmp_path / "x.pth", tmp_path / "new", status=2)
    assert "is not recognised: its first names are x" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.bin", "out", "x.pth"]
