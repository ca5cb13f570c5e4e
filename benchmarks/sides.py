"""The two sides of a comparison on the same weights: snoopi, and diffusers.

Each lives in a process of its own, for what one does to its process (memory kept for reuse,
imports) must not reach the other. `snoopi` is a pipeline loaded with optimize="auto", `none` one
without; `diffusers` is diffusers as it comes, `channels_last` the same with UNet and VAE in that
layout under inference_mode, `compiled` under torch.compile with freezing. Text encoders are alike
in the last three.

    python -m benchmarks.sides SETUP

is a fresh process up to its first picture: SETUP is JSON, see `first_picture`. So neither this file
imports snoopi nor the other side's process does.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OURS, THEIRS = ("snoopi", "none"), ("diffusers", "channels_last", "compiled")
NEGATIVE = "rain, blurry"
# Costs the same at any strength; some models' own (0.04) would hide in rounding.
STRENGTH = 0.5
STORED_TOKENS, READ_TOKENS = 120, 20  # of a stored text, and how many of them are no padding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Setup(NamedTuple):
    """What a side is to load, and how it is called; all of it goes through JSON.

    folder: with `snoopi` and `diffusers` in it, and `tiny` where the small VAE is asked for.
    dtype: of the weights in memory. stored: width of the text features that stand for a text
    encoder (a cached prompt); 0 where the model has its encoders. t, abar: timestep and alpha_t^2
    (None: the schedule's) of the one call. sides: of those in this process. compiled: "", "unet" or
    "all", what the side of that name compiles.
    """

    folder: str
    dtype: str
    threads: int
    stored: int
    t: int
    abar: float | None
    sides: tuple[str, ...]
    tiny: bool = False
    compiled: str = ""


class Host:
    """A side's process: answers what a benchmark asks by the name of a method."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.setup, self.dtype = setup, DTYPES[setup.dtype]
        self.inputs: dict[str, Any] = {}
        self.stages: dict[str, float] = {}
        self.drawn = 0

    # --- one call of a network ---

    def give(self, inputs: dict[str, Any]) -> None:
        """Inputs of `call`: arrays in fp32 (masks and ids as they are), and prompts.

        x [b c h w] noise; z [b c h w] latents; tokens [b n k], mask [b n] or None, pooled [b k] or
        None, size_ids [b 6] or None; negative [1 n k]; prompts.
        """
        self.inputs = {
            name: self._tensor(value) if hasattr(value, "dtype") else value
            for name, value in inputs.items()
        }

    def _tensor(self, value: Any) -> Tensor:
        found = torch.from_numpy(value)
        return found.to(self.dtype) if found.is_floating_point() else found

    def call(self, side: str, part: str) -> Callable[[], Tensor]:
        """A call of one part on the inputs given: backbone, nasa, vae or text."""
        raise NotImplementedError

    def mode(self, side: str) -> contextlib.AbstractContextManager[Any]:
        """Under what a side runs."""
        return torch.inference_mode() if side == "channels_last" else torch.no_grad()

    def span(self, side: str, part: str) -> tuple[float, float]:
        """Seconds of a call, and of the processor in it."""
        call = self.call(side, part)
        with self.mode(side):
            processor, wall = time.process_time(), time.perf_counter()
            call()
            return time.perf_counter() - wall, time.process_time() - processor

    def output(self, side: str, part: str) -> Any:
        """The result of a call, in fp32."""
        with self.mode(side):
            return self.call(side, part)().float().numpy()

    def profile(self, side: str, part: str, top: int) -> list[tuple[str, int, float, float]]:
        """The operators that take most: name, calls, ms of their own, share of all operators'."""
        call = self.call(side, part)
        cpu = torch.profiler.ProfilerActivity.CPU
        with self.mode(side), torch.profiler.profile(activities=[cpu]) as found:
            call()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
        total = sum(row.self_cpu_time_total for row in rows)
        return [
            (row.key, row.count, row.self_cpu_time_total / 1e3, row.self_cpu_time_total / total)
            for row in rows[:top]
        ]

    # --- a whole picture ---

    def draw(self, side: str, batch: int, pixels: int, negative: bool, vae: str) -> dict[str, Any]:
        """Seconds of a drawing by stage, of new prompts; nothing is kept of the pictures.

        The sum of text, backbone and vae is less than the total: tokens, noise, K/V of a negative,
        and pictures in 8 bits are no stage.
        """
        prompts = [f"a red cat in the snow, {self.drawn + i}" for i in range(batch)]
        self.drawn += batch
        self.stages = dict.fromkeys(("text", "backbone", "vae"), 0.0)
        processor, wall = time.process_time(), time.perf_counter()
        with self.mode(side):
            self._draw(side, prompts, pixels, NEGATIVE if negative else None, vae)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        return {**self.stages, "total": wall, "processor": processor}

    def _draw(
        self, side: str, prompts: Sequence[str], pixels: int, negative: str | None, vae: str
    ) -> list[Any]:
        """Pictures as PIL's images; overridden."""
        raise NotImplementedError

    def picture(
        self, side: str, prompts: Sequence[str], z: Any, negative: str | None, vae: str
    ) -> Any:
        """Pictures [b 3 h w] in [-1, 1] from prompts and noise [b c h w]; overridden."""
        raise NotImplementedError

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the body's time to a stage."""
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


def stored_texts(width: int) -> Tensor:
    """A prompt's and a negative's features of a text encoder that is not there [2 n k]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, STORED_TOKENS, width, generator=generator)


def stored_mask(batch: int) -> Tensor:
    """Which of their tokens are text, bool [b n]."""
    return (torch.arange(STORED_TOKENS) < READ_TOKENS).expand(batch, -1)


# --- snoopi ---------------------------------------------------------------------------------------


class Stored(nn.Module):
    """Stands for a text encoder: the features of the text that the first id names."""

    def __init__(self, texts: Tensor) -> None:
        super().__init__()
        self.texts = nn.Parameter(texts, requires_grad=False)  # [2 n k]

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        """ids [b n] -> .last [b n k]."""
        return SimpleNamespace(last=self.texts[ids[:, 0]])

    @staticmethod
    def tokenizer(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [b n], 1 for NEGATIVE and 0 for any other text, and their mask."""
        which = torch.tensor([int(prompt == NEGATIVE) for prompt in prompts])
        return which[:, None].expand(-1, STORED_TOKENS), stored_mask(len(prompts))


class Ours(Host):
    """A snoopi pipeline."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        import snoopi

        (side,) = setup.sides
        how = "auto" if side == "snoopi" else "none"
        folder = Path(setup.folder)
        pipeline: Any = snoopi.load(folder / "snoopi", dtype=self.dtype, optimize=how)
        self.pipeline = pipeline
        if setup.stored:
            pipeline.text_encoders = [Stored(stored_texts(setup.stored).to(self.dtype))]
            pipeline.tokenizers = [Stored.tokenizer]
        self.vaes = {"full": self.pipeline.vae}
        if setup.tiny:
            tiny = snoopi.load(folder / "tiny", dtype=self.dtype, optimize=how)
            self.vaes["tiny"] = tiny.vae
        for encoder in self.pipeline.text_encoders:
            self._watch("text", encoder, "forward")
        self._watch("backbone", self.pipeline.backbone, "forward")
        for vae in self.vaes.values():
            self._watch("vae", vae, "decode")

    def _watch(self, stage: str, owner: Any, name: str) -> None:
        """Count an object's method as a stage."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return method(*args, **kwargs)

        setattr(owner, name, watched)

    def call(self, side: str, part: str) -> Callable[[], Tensor]:
        """NASA's call makes the K/V of both texts, as the plain one makes its text's."""
        given, pipeline = self.inputs, self.pipeline
        if part == "vae":
            return lambda: pipeline.vae.decode(given["z"])
        if part == "text":
            return self._texts(given["prompts"])
        return self._backbone(part == "nasa")

    def _texts(self, prompts: Sequence[str]) -> Callable[[], Tensor]:
        spec, nets = self.pipeline.spec.text, self.pipeline.text_encoders
        ids = [tokenizer(prompts)[0] for tokenizer in self.pipeline.tokenizers]

        def call() -> Tensor:
            outs = [net(x) for net, x in zip(nets, ids, strict=True)]
            features = [getattr(o, s.output) for o, s in zip(outs, spec, strict=True)]
            return torch.cat(features, -1)

        return call

    def _backbone(self, nasa: bool) -> Callable[[], Tensor]:
        from snoopi.conditioning import Conditioning

        given, net = self.inputs, self.pipeline.backbone
        cond = Conditioning(given["tokens"], given["mask"], given["pooled"], given["size_ids"])
        t = torch.full((len(given["x"]),), self.setup.t)
        if not nasa:
            return lambda: net(given["x"], t, cond)
        mask = None if given["mask"] is None else given["mask"][:1]
        negative = Conditioning(given["negative"], mask)
        guided = Conditioning(
            cond.tokens,
            cond.mask,
            cond.pooled,
            cond.size_ids,
            negative=negative,
            nasa_scale=STRENGTH,
        )
        return lambda: net(given["x"], t, net.text_kv(guided))

    def _draw(
        self, side: str, prompts: Sequence[str], pixels: int, negative: str | None, vae: str
    ) -> list[Any]:
        self.pipeline.vae = self.vaes[vae]
        scale = None if negative is None else STRENGTH
        return self.pipeline(prompts, negative, scale=scale, size=(pixels, pixels))

    def picture(
        self, side: str, prompts: Sequence[str], z: Any, negative: str | None, vae: str
    ) -> Any:
        """As a call of the pipeline makes them, before they are rounded to 8 bits."""
        self.pipeline.vae = self.vaes[vae]
        scale = None if negative is None else STRENGTH
        negatives = [negative] * len(prompts)
        made = self.pipeline.pictures(prompts, torch.from_numpy(z), negatives, scale=scale)
        return made.float().numpy()


# --- diffusers ------------------------------------------------------------------------------------


def packages(folder: Path) -> Any:
    """The class of diffusers' pipeline for a folder, imported with all that it uses.

    Raises:
        ImportError: diffusers or transformers is not installed.
    """
    quiet()
    for name in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{name}.utils.logging")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    index = json.loads((folder / "model_index.json").read_text())
    return getattr(importlib.import_module("diffusers"), index["_class_name"])


def quiet() -> None:
    """Before their import: without the network, and without torchvision.

    Beside a torch for the CPU a torchvision for CUDA does not load, and they would not without.
    """
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Theirs(Host):
    """A diffusers pipeline's networks, called as its one-step recipe says."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        folder = Path(setup.folder, "diffusers")
        absent = {"text_encoder": None, "tokenizer": None} if setup.stored else {}
        pipe = packages(folder).from_pretrained(folder, dtype=self.dtype, **absent)
        self.pipe, self.pixart = pipe, hasattr(pipe, "transformer")
        self.texts = [] if setup.stored else [(pipe.tokenizer, pipe.text_encoder)]
        if hasattr(pipe, "text_encoder_2"):
            self.texts.append((pipe.tokenizer_2, pipe.text_encoder_2))
        net = pipe.transformer if self.pixart else pipe.unet
        self.nets = {"diffusers": net}
        self.vaes: dict[tuple[str, str], Any] = {("diffusers", "full"): pipe.vae}
        if setup.tiny:
            self.vaes["diffusers", "tiny"] = self._tiny()
        self.stored = stored_texts(setup.stored or 1)[:1].to(self.dtype)  # [1 n k]
        self._others()

    def _tiny(self) -> Any:
        from safetensors.torch import load_file

        tiny = importlib.import_module("diffusers").AutoencoderTiny()
        tiny.load_state_dict(load_file(Path(self.setup.folder, "tiny", "vae.safetensors")))
        return tiny.to(self.dtype).eval().requires_grad_(False)

    def _others(self) -> None:
        """The networks of the sides beside diffusers as it comes."""
        plain, vaes, sides = self.nets.pop("diffusers"), self.vaes, self.setup.sides
        self.vaes = {}
        if "diffusers" in sides:
            self.nets["diffusers"], self.vaes = plain, dict(vaes)
        if "channels_last" in sides:
            # Alone it is what a script does: to another layout in place.
            again = _twin if "diffusers" in sides else lambda net: net
            last = torch.channels_last
            self.nets["channels_last"] = again(plain).to(memory_format=last)
            for (_, kind), vae in vaes.items():
                self.vaes["channels_last", kind] = again(vae).to(memory_format=last)
        if "compiled" in sides:
            torch._inductor.config.freezing = True
            self.nets["compiled"] = torch.compile(_twin(plain), dynamic=False)
            for (_, kind), vae in vaes.items():
                self.vaes["compiled", kind] = twin = _twin(vae)
                if self.setup.compiled == "all":
                    twin.decoder = torch.compile(twin.decoder, dynamic=False)
                else:
                    twin.to(memory_format=torch.channels_last)

    def call(self, side: str, part: str) -> Callable[[], Tensor]:
        """diffusers has no NASA: that part has no call."""
        given = self.inputs
        if part == "vae":
            return lambda: self._decode(side, "full", given["z"])
        if part == "text":
            ids = self._ids(given["prompts"])
            return lambda: self._read(ids)[0]
        return lambda: self._backbone(
            side, given["x"], given["tokens"], given["mask"], given["pooled"], given["size_ids"]
        )

    def _ids(self, prompts: Sequence[str]) -> list[Tensor]:
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found = []
        for tokenizer, _ in self.texts:
            length = tokenizer.model_max_length
            found.append(tokenizer(list(prompts), max_length=length, **how).input_ids)
        return found

    def _read(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features [b n k], and the pooled text [b k] where there are two encoders."""
        if len(ids) == 1:
            return self.texts[0][1](ids[0])[0], None
        outs = [
            net(x, output_hidden_states=True) for (_, net), x in zip(self.texts, ids, strict=True)
        ]
        return torch.cat([out.hidden_states[-2] for out in outs], -1), outs[1].text_embeds

    def _backbone(
        self,
        side: str,
        x: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
    ) -> Tensor:
        """The prediction [b c h w]."""
        net, t = self.nets[side], torch.full((len(x),), self.setup.t)
        if self.pixart:
            sizes = {"resolution": None, "aspect_ratio": None}
            out = net(
                x, tokens, t, encoder_attention_mask=mask, added_cond_kwargs=sizes,
                return_dict=False,
            )[0]  # fmt: skip
            return out[:, : x.shape[1]]
        more = None if pooled is None else {"text_embeds": pooled, "time_ids": size_ids}
        return net(x, t, tokens, added_cond_kwargs=more, return_dict=False)[0]

    def _decode(self, side: str, kind: str, z: Tensor) -> Tensor:
        vae = self.vaes[side, kind]
        return vae.decode(z / vae.config.scaling_factor, return_dict=False)[0]

    def _draw(
        self, side: str, prompts: Sequence[str], pixels: int, negative: str | None, vae: str
    ) -> list[Any]:
        from PIL import Image

        z = torch.randn(len(prompts), 4, pixels // 8, pixels // 8)
        x = self._pictures(side, prompts, z, vae)
        rows = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(row.numpy()) for row in rows]

    def picture(
        self, side: str, prompts: Sequence[str], z: Any, negative: str | None, vae: str
    ) -> Any:
        """diffusers has no NASA: a negative is not read."""
        with self.mode(side):
            return self._pictures(side, prompts, torch.from_numpy(z), vae).numpy()

    def _pictures(self, side: str, prompts: Sequence[str], z: Tensor, kind: str) -> Tensor:
        """One step: pictures [b 3 H W] in [-1, 1] from noise [b c h w] in fp32."""
        setup, b = self.setup, len(prompts)
        ids = self._ids(prompts)
        mask, sizes = None, None
        with self.stage("text"):
            if setup.stored:
                tokens, pooled, mask = self.stored.expand(b, -1, -1), None, stored_mask(b)
            else:
                tokens, pooled = self._read(ids)
        if pooled is not None:
            height, width = (8 * side for side in z.shape[2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(b, -1)
        with self.stage("backbone"):
            eps = self._backbone(side, z.to(self.dtype), tokens, mask, pooled, sizes)
        found = self.pipe.scheduler.alphas_cumprod[setup.t] if setup.abar is None else setup.abar
        abar = torch.as_tensor(found, dtype=torch.float32)
        x0 = (z - (1 - abar).sqrt() * eps.float()) / abar.sqrt()
        with self.stage("vae"):
            return self._decode(side, kind, x0.to(self.dtype)).float().clamp(-1, 1)

    def flops(self, part: str) -> int:
        """Floating-point operations of a part's call on the inputs given, counted on meta."""
        from torch.utils.flop_counter import FlopCounterMode

        meta, ids = copy.copy(self), self._ids(self.inputs["prompts"])
        meta.nets = {"diffusers": _without_memory(self.nets["diffusers"])}
        meta.vaes = {("diffusers", "full"): _without_memory(self.vaes["diffusers", "full"])}
        meta.texts = [(None, _without_memory(net)) for _, net in self.texts]
        meta._ids = lambda prompts: [x.to("meta") for x in ids]  # type: ignore[method-assign]
        meta.inputs = {
            name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            meta.call("diffusers", part)()
        return counter.get_total_flops()


def _twin(net: Any) -> Any:
    """The same network again, on the same weights; a layout of its own costs only what it moves."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    return copy.deepcopy(net, shared)


def _without_memory(net: Any) -> Any:
    """The same network on the meta device."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in net.parameters()
    }
    empty |= {id(b): b.to("meta") for b in net.buffers()}
    return copy.deepcopy(net, empty)


# --- a fresh process up to its first picture ------------------------------------------------------


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process: VmRSS, VmHWM (its peak), RssAnon, RssFile; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM", "Rss")))
    return {key.rstrip(":"): 1024 * int(value) for key, value, *_ in pairs}


def first_picture(setup: Setup, pixels: int, out: str) -> dict[str, Any]:
    """Load one side, draw one picture, write it: the moments of the machine's clock when the
    imports, the loading, the drawing and the writing were done, and the memory after the imports
    and at the most."""
    (side,) = setup.sides
    if side in OURS:
        importlib.import_module("snoopi").load  # noqa: B018
    else:
        packages(Path(setup.folder, "diffusers"))
    torch.set_num_threads(setup.threads)
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    base, moments = memory(), {"imported": time.monotonic()}
    host = (Ours if side in OURS else Theirs)(setup)
    moments["loaded"] = time.monotonic()
    with host.mode(side):
        (picture,) = host._draw(side, ["a red cat in the snow"], pixels, None, "full")
    moments["drawn"] = time.monotonic()
    picture.save(out)
    moments["saved"] = time.monotonic()
    return {**moments, "base": base, "peak": memory()["VmHWM"]}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    setup = Setup(**{**given["setup"], "sides": tuple(given["setup"]["sides"])})
    print(json.dumps(first_picture(setup, given["pixels"], given["out"])))
