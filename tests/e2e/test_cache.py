"""The cache of text embeddings as a user makes it: killed and called again, and trained from."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from commands import FAST, Warm, assert_ends_in_one_line, rows

from snoopi import textcache

pytestmark = pytest.mark.e2e

WORDS = ("red", "green", "blue", "big", "small", "circle", "square", "star", "a", "left")
SHORT = (*FAST, "run.steps=3", "evaluate.prompts=0")


@pytest.fixture(scope="module")
def base(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of prompts and one of negatives, and the teacher `model`."""
    folder = tmp_path_factory.mktemp("cache")
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    (folder / "p.txt").write_text("\n".join(texts))
    (folder / "n.txt").write_text("\n".join(WORDS))
    shutil.copytree(reference.parent / "debug_teacher" / "model", folder / "model")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_killed_at_any_point_it_goes_on(warm: Warm, base: Path) -> None:
    """kill -9 while shards are written: whole ones stay, and the cache has the same bytes."""
    words = [str(base / "model"), str(base / "p.txt"), "--batch", "5", "--shard-size", "5"]
    warm.run("data", "cache", *words, "--out", str(base / "whole"))
    out = base / "killed"
    for seen in (1, 60):  # with 201 shards to write
        command = warm.start("data", "cache", *words, "--out", str(out))
        command.until(lambda seen=seen: len(list(out.glob("prompts-*"))) >= seen)
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        index = textcache.read_index(out)
        assert 0 < len(index.shards) < 201
        kept = {name: (out / name).stat().st_mtime_ns for name in index.shards}
    command = warm.run("data", "cache", *words, "--out", str(out), "--verify")
    assert files(out) == files(base / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert f"verified {out}" in command.stdout and "1001 texts" in command.stdout


def test_a_run_from_a_cache_logs_the_same_losses(warm: Warm, base: Path) -> None:
    """Bit for bit for fp32 at the run's batch; the networks of its model folder are equal, too."""
    cache = ["--batch", "2", "--dtype", "fp32", "--out", str(base / "fp32")]
    warm.run("data", "cache", str(base / "model"), str(base / "p.txt"), *cache)
    words = [*SHORT, f"model.teacher={base / 'model'}", f"data.prompts={base / 'p.txt'}"]
    warm.run("train", *words, "--out", str(base / "encoded"))
    more = [f"data.cache={base / 'fp32'}", "--out", str(base / "cached")]
    warm.run("train", *words, *more)
    assert len(rows(base / "encoded")) == 3 and rows(base / "cached") == rows(base / "encoded")
    networks = sorted((base / "encoded" / "model").glob("*.safetensors"))
    assert [path.stem for path in networks] == ["backbone", "text_encoder", "vae"]
    for path in networks:
        assert (base / "cached" / "model" / path.name).read_bytes() == path.read_bytes()


def test_a_cache_of_another_file_is_refused_before_anything_is_written(
    warm: Warm, base: Path
) -> None:
    cache = [str(base / "model"), str(base / "n.txt"), "--out", str(base / "other")]
    warm.run("data", "cache", *cache)
    words = [*SHORT, f"model.teacher={base / 'model'}", f"data.prompts={base / 'p.txt'}"]
    words += [f"data.cache={base / 'other'}", "--out", str(base / "refused")]
    command = warm.run("train", *words, status=2)
    assert_ends_in_one_line(command, "holds a cache of another prompt file", str(base / "other"))
    assert not (base / "refused").exists()
    assert json.loads((base / "other" / "index.json").read_text())["counts"]["prompts"] == 10
