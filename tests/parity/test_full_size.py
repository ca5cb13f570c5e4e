"""Whole models at their published sizes, with random weights: files, conversion, one picture.

Written, converted and deleted again: up to 30 GB of disk, 24 GB of memory and minutes each, hence
`slow` (`pytest -m "parity and slow" tests/parity/test_full_size.py`).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import snoopi
from snoopi.conditioning import Conditioning
from snoopi.tokenize import Tokenizer
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = [pytest.mark.parity, pytest.mark.slow]

ROOT = Path(snoopi.__file__).parents[1]
TOLERANCE = 2e-5  # fp32, of models a hundred times deeper and wider than the tiny ones
SHARD = 2 * 2**30  # bytes of a file
BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LINEAR = BETAS | {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
CLIP_BIGG = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
PIXART: dict[str, Any] = {"sample_size": 64, "interpolation_scale": 1, "caption_channels": 4096}


# --- random files ---------------------------------------------------------------------------------


class Values:
    """N(0, 1) numbers, cheaply: slices of one block that the seed of a tensor's place chooses."""

    def __init__(self, seed: int = 0) -> None:
        self.block = randn(2**25, seed=seed)
        self.start = 0

    def fill(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A parameter: matrices keep the size of what they act on, norms are near one."""
        count = shape.numel()
        size = len(self.block)
        self.start = (self.start + 7_919_317) % max(size - count, 1)
        values = self.block[self.start : self.start + count]
        if count > size:  # T5's embedding
            values = self.block.repeat(-(-count // size))[:count]
        values = values.view(shape)
        if len(shape) > 1:
            token = name.endswith(("embedding.weight", "shared.weight"))
            scale = 1.0 if token else shape[1:].numel() ** -0.5
            return (values * scale).to(dtype)
        return (0.1 * values + (1.0 if name.endswith("weight") else 0.0)).to(dtype)


def write(folder: Path, net: nn.Module, dtype: torch.dtype, stem: str) -> None:
    """A component's files, sharded as the hubs' are when they are large; `net` is on meta."""
    folder.mkdir(parents=True)
    net.save_config(folder) if hasattr(net, "save_config") else net.config.save_pretrained(folder)
    values, part, size, parts = Values(), {}, 0, []
    state = {k: v for k, v in net.state_dict().items() if k != "encoder.embed_tokens.weight"}
    last = list(state)[-1]
    where: dict[str, int] = {}
    for name, tensor in state.items():
        part[name] = values.fill(name, tensor.shape, dtype)
        where[name], size = len(parts), size + part[name].numel() * part[name].element_size()
        if size > SHARD or name == last:
            parts.append(folder / f"part-{len(parts)}.safetensors")
            save_file(part, parts[-1], metadata={"format": "pt"})
            part, size = {}, 0
    if len(parts) == 1:
        parts[0].rename(folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for path, name in zip(parts, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {}, "weight_map": {key: names[i] for key, i in where.items()}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def clip_tokenizer(folder: Path, pad: str) -> None:
    """vocab.json, merges.txt and the padding token, as in the hubs' folders."""
    folder.mkdir()
    model = json.loads(Tokenizer.clip(0).tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))


def t5_tokenizer(folder: Path) -> None:
    """A small unigram vocabulary in T5's ids: the published one is in no package."""
    from tokenizers import Tokenizer as HF
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    hf = HF(Unigram(pieces, unk_id=2, byte_fallback=False))
    hf.pre_tokenizer = Metaspace()
    hf.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    hf.save(str(folder / "tokenizer.json"))


def on_meta(kind: Any, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return kind(**config) if isinstance(config, dict) else kind(config)


def folder(path: Path, name: str, dtype: torch.dtype) -> Path:
    """A diffusers folder of random weights."""
    diffusers, transformers = oracle.package("diffusers"), oracle.package("transformers")
    te = "text_encoder"
    backbone, scheduler = "unet", BETAS | {"prediction_type": "epsilon"}
    if name == "pixart-512":
        backbone, scheduler = "transformer", LINEAR | {"prediction_type": "epsilon"}
        net = on_meta(diffusers.PixArtTransformer2DModel, PIXART)
        texts = {te: (transformers.T5EncoderModel, transformers.T5Config(**T5_XXL))}
    else:
        config = {"sd15": oracle.SD15, "sd21": oracle.SD21, "sdxl": oracle.SDXL}[name]
        net = on_meta(diffusers.UNet2DConditionModel, config)
        clip, pooled = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
        sizes = [(te, clip, CLIP_H if name == "sd21" else CLIP_L)]
        sizes += [("text_encoder_2", pooled, CLIP_BIGG)] if name == "sdxl" else []
        texts = {n: (kind, transformers.CLIPTextConfig(**c)) for n, kind, c in sizes}
    stem = "diffusion_pytorch_model"
    write(path / backbone, net, dtype, stem)
    scaling = 0.13025 if name == "sdxl" else 0.18215
    vae = on_meta(diffusers.AutoencoderKL, VAE | {"scaling_factor": scaling})
    write(path / "vae", vae, dtype, stem)
    parts = {backbone: ["diffusers", type(net).__name__], "vae": ["diffusers", "AutoencoderKL"]}
    for i, (part, (kind, config)) in enumerate(texts.items()):
        # T5-XXL is 19 GB in fp32: bf16, as everybody runs it on a machine of 24 GB.
        config.architectures = [kind.__name__]
        with torch.device("meta"):
            encoder = kind(config)
        write(path / part, encoder, torch.bfloat16 if "T5" in kind.__name__ else dtype, "model")
        tokenizer = path / part.replace("text_encoder", "tokenizer")
        if "T5" in kind.__name__:
            t5_tokenizer(tokenizer)
        else:
            clip_tokenizer(tokenizer, "!" if i == 1 or name == "sd21" else "<|endoftext|>")
        parts[part] = ["transformers", kind.__name__]
        parts[tokenizer.name] = ["transformers", "CLIPTokenizer"]
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    kinds = {"sdxl": "StableDiffusionXLPipeline", "pixart-512": "PixArtAlphaPipeline"}
    index = {"_class_name": kinds.get(name, "StableDiffusionPipeline"), **parts}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


# --- commands -------------------------------------------------------------------------------------


def command(*words: str | Path) -> tuple[str, float]:
    """Run a module; its output, and the most anonymous memory it had, in GB."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    peak = 0.0
    run = subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while True:
        try:
            output = run.communicate(timeout=0.05)[0]
            break
        except subprocess.TimeoutExpired:
            for line in Path(f"/proc/{run.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) / 2**20)
    assert run.returncode == 0, output
    return output, peak


def largest_gb(model: Path) -> float:
    """The largest tensor of a model folder, in GB."""
    from safetensors import safe_open

    sizes = {"BF16": 2, "F16": 2, "F32": 4}
    largest = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                size = int(np.prod(part.get_shape())) * sizes[part.get_dtype()]
                largest = max(largest, size)
    return largest / 2**30


def convert(source: Path, target: Path, *options: str) -> None:
    """Convert, and hold the anonymous memory to its bound."""
    output, peak = command("weights_convert", source, target, *options)
    bound = 1.5 * largest_gb(target) + 1.0
    print(output.strip())
    print(f"{target.name}: RssAnon {peak:.2f} GB at most, bound {bound:.2f} GB")
    assert peak <= bound


def draw(model: Path, picture: Path, *options: str) -> None:
    output, peak = command(
        *("snoopi.generate", model, "a red cat in the snow", "--negative", "rain"),
        *("--out", picture, *options),
    )
    pixels = np.asarray(Image.open(picture))
    print(f"{output.strip()}; RssAnon {peak:.1f} GB at most")
    assert pixels.shape == (512, 512, 3) and pixels.std() > 1


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder whose files do not stay."""
    yield tmp_path
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arch"), [("sd15", "dmd2-sd15"), ("sd21", "swiftbrush"), ("pixart-512", "dmd-pixart")]
)
def test_a_folder_becomes_a_picture(name: str, arch: str, place: Path) -> None:
    source = folder(place / "source", name, torch.float32)
    convert(source, place / "fp32", "--arch", arch)
    compare(name, source, place / "fp32")
    draw(place / "fp32", place / "fp32.png", "--seed", "1")
    for path in place.glob("fp32/*"):
        path.unlink() if path.is_file() else None
    convert(source, place / "bf16", "--arch", arch, "--dtype", "bf16")
    draw(place / "bf16", place / "bf16.png", "--seed", "1")
    a, b = (np.asarray(Image.open(place / f"{n}.png")).astype(float) for n in ("fp32", "bf16"))
    print(f"{name}: bf16 picture {np.abs(a - b).mean():.1f} of 255 from fp32's")


def compare(name: str, source: Path, model: Path) -> None:
    """One call of the backbone at its native size, ours beside diffusers' from the same folder."""
    diffusers = oracle.package("diffusers")
    pipeline = snoopi.load(model)
    ours = pipeline.backbone
    pipeline = None
    x, t = randn(1, 4, 64, 64, seed=1), torch.tensor([999])
    width = {"sd15": 768, "sd21": 1024, "pixart-512": 4096}[name]
    n = 120 if name == "pixart-512" else 77
    cond = Conditioning(randn(1, n, width, seed=2))
    with torch.no_grad():
        got = ours(x, t, cond)
    del ours
    gc.collect()
    if name == "pixart-512":
        theirs = diffusers.PixArtTransformer2DModel.from_pretrained(source / "transformer")
        sizes = {"resolution": None, "aspect_ratio": None}
        with torch.no_grad():
            want = theirs(x, cond.tokens, t, added_cond_kwargs=sizes, return_dict=False)[0]
        want = want[:, :4]
    else:
        theirs = diffusers.UNet2DConditionModel.from_pretrained(source / "unet")
        with torch.no_grad():
            want = theirs(x, t, cond.tokens, return_dict=False)[0]
    rms, worst = oracle.errors(got, want)
    print(f"{name} at full size: relative error rms {rms:.2e}, max {worst:.2e}")
    assert max(rms, worst) <= TOLERANCE


def test_sdxl_converts_and_runs_a_step(place: Path) -> None:
    source = folder(place / "source", "sdxl", torch.bfloat16)
    convert(source, place / "model")
    net = snoopi.load(place / "model").backbone
    cond = Conditioning(
        randn(1, 77, 2048, seed=1).bfloat16(),
        pooled=randn(1, 1280, seed=2).bfloat16(),
        size_ids=torch.tensor([[1024, 1024, 0, 0, 1024, 1024]]),
    )
    with torch.no_grad():
        out = net(randn(1, 4, 128, 128, seed=3).bfloat16(), torch.tensor([999]), cond)
    assert out.shape == (1, 4, 128, 128) and bool(torch.isfinite(out).all())
