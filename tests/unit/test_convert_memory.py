"""Conversion streams: it holds one tensor at a time, however large the file is."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snoopi import zoo
from snoopi.folders import FORMAT
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig
from snoopi.zoo import ModelSpec, TextSpec
from weights_convert import tables
from weights_convert.convert import targets
from weights_convert.files import Entry, open_weights, write_safetensors
from weights_convert.rules import names, source_shape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

# Like SD2: an embedding that is a fifth of the file, and OpenCLIP's q, k, v in one matrix.
SPEC = dataclasses.replace(
    zoo.preset("sd21"),
    arch="large",
    backbone=UNetConfig(
        channels=(192, 384, 768),
        depth=(1, 1, 0),
        heads=(3, 6, 12),
        text_width=512,
        linear_proj=True,
    ),
    vae=VAEConfig(channels=(32, 64), norm_groups=8),
    text=(
        TextSpec(
            CLIPTextConfig(width=512, mlp_width=1024, layers=2, heads=8, activation="gelu"),
            pad_id=0,
        ),
    ),
)
SLACK = 64 * 2**20  # bytes beside the tensors: readers, allocator, interpreter

PROGRAM = """
import sys, threading, time
from weights_convert.convert import convert
import snoopi.tokenize

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def sample():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)

source, target, arch, dtype = sys.argv[1:]
snoopi.tokenize.Tokenizer.clip(0)  # its tables are no part of the weights
done, before, peaks = False, anonymous(), [0]
thread = threading.Thread(target=sample)
thread.start()
if target == "nothing":
    from weights_convert.files import open_weights
    kept = [entry.read().clone() for entry in open_weights(source).entries.values()]
    time.sleep(0.1)
else:
    convert(source, target, arch, None if dtype == "None" else dtype, check=True)
done = True
thread.join()
print(max(peaks) - before, len(peaks))
"""


def file_entries(spec: ModelSpec) -> dict[str, Entry]:
    """A whole LDM file's tensors, made one by one."""
    text = spec.text[0].config
    layouts = {
        "backbone": tables.unet_ldm(spec.backbone),
        "vae": tables.vae_ldm(spec.vae),
        "text_encoder": tables.clip_openclip(text, tables.LDM_OPENCLIP, text.layers),
    }
    shapes = {}
    for part, layout in layouts.items():
        wanted = targets(spec, part)
        for ours, (name, rule) in names(wanted, layout).items():
            shapes[name] = source_shape(wanted[ours], rule)

    def entry(shape: tuple[int, ...]) -> Entry:
        return Entry(shape, torch.float32, lambda: torch.full(shape, 0.5))

    return {name: entry(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors, model.ckpt and snoopi.json of SPEC."""
    folder = tmp_path_factory.mktemp("large")
    write_safetensors(folder / "model.safetensors", file_entries(SPEC))
    entries = open_weights(folder / "model.safetensors").entries
    torch.save({"state_dict": {k: e.read() for k, e in entries.items()}}, folder / "model.ckpt")
    (folder / "spec").mkdir()
    data = {"format": FORMAT, "model": SPEC.to_json(), "provenance": {}}
    (folder / "spec/snoopi.json").write_text(json.dumps(data))
    return folder


def peak(source: Path, target: Path | str, dtype: str | None) -> int:
    """Bytes of anonymous memory that a conversion, with its check, took beside the interpreter."""
    arch = str(source.parent / "spec")
    command = [sys.executable, "-c", PROGRAM, str(source), str(target), arch, str(dtype)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, samples = map(int, done.stdout.split())
    assert samples > 20
    return taken


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_anonymous_memory_is_that_of_a_tensor(
    kind: str, dtype: str | None, sources: Path, tmp_path: Path
) -> None:
    source = sources / f"model.{kind}"
    entries = open_weights(source).entries
    largest = max(4 * math.prod(entry.shape) for entry in entries.values())
    size = source.stat().st_size
    limit = 1.5 * largest + SLACK
    assert size > 2 * limit and largest > 90 * 2**20
    taken = peak(source, tmp_path / "model", dtype)
    print(
        f"{kind} {dtype}: {taken / 2**20:.0f} MB of {size / 2**20:.0f}, limit {limit / 2**20:.0f}"
    )
    assert taken < limit
    written = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert written == pytest.approx(size / (2 if dtype else 1), rel=0.01)


def test_the_measure_sees_a_file_that_is_loaded_whole(sources: Path) -> None:
    source = sources / "model.safetensors"
    assert peak(source, "nothing", None) > 0.9 * source.stat().st_size
