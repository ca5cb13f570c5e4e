"""Model folders, and prompts to pictures.

A model folder holds snoopi.json (the ModelSpec and provenance), one safetensors file per network
and a tokenizer per text encoder. Partial folders are fine: what is absent is None, and calling the
pipeline says what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from snoopi import memory
from snoopi import optimize as packing
from snoopi.conditioning import Conditioning
from snoopi.folders import (
    defer_part,
    is_deferred,
    load_part,
    load_tokenizer,
    read_spec,
    read_vae,
    replacing,
    write_networks,
)
from snoopi.graphs import Graphs
from snoopi.guidance import METHODS, cfg, strength, with_strength
from snoopi.noise import Noise
from snoopi.pictures import to_uint8
from snoopi.samplers import grid, one_step, sample
from snoopi.schedule import Schedule
from snoopi.texts import RecentTexts, Text, guided
from snoopi.tiles import check_tile, decode_tiled
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ModelSpec, TextSpec, text_part

MODES = (*METHODS, "embed-sub", "cfg", "none")
# Where neither the caller nor the model says.
STRENGTHS = {
    **{name: float(strength(how)) for name, how in METHODS.items()},
    "embed-sub": 1.0,
    "cfg": 2.0,
    "none": 0.0,
}
# A strength: a number, or a tensor of one per cross-attention [layers]; of either kind one for all
# network calls, or a sequence of one per call.
Strength = float | Tensor
Scale = Strength | Sequence[Strength] | None


class _Plan(NamedTuple):
    """How a call is sampled: sampler "" is one call of the network by the recipe."""

    sampler: str
    steps: int
    times: Sequence[int] | None = None
    options: Mapping[str, Any] = {}

    def calls(self, schedule: Schedule) -> int:
        """How often the network is called (classifier-free guidance not counted)."""
        return len(grid(self.sampler, schedule, self.steps, self.times)) if self.sampler else 1


class Pipeline:
    """Prompt -> tokenizer -> text encoder -> backbone -> VAE -> picture.

    backbone, vae, text_encoders, tokenizers: modules of snoopi.models (and Tokenizers), or None
    where the model folder has none. spec: its ModelSpec. folder: where `load` found it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backbone: Any = None,
        vae: Any = None,
        text_encoders: Sequence[Any] = (),
        tokenizers: Sequence[Tokenizer | None] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec = spec
        self.backbone = backbone
        self.vae = vae
        self.text_encoders = list(text_encoders) or [None] * len(spec.text)
        self.tokenizers = list(tokenizers) or [None] * len(spec.text)
        self.provenance = dict(provenance or {})
        self.folder: Path | None = None
        self._recent: RecentTexts | None = None  # after `optimize`
        self._lone = False  # whether the next call's texts are the first, and maybe only ones
        self._graphs: Graphs | None = None  # of the backbone's calls, on CUDA after `optimize`

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative: str | Sequence[str] | None = None,
        guidance: str = "nasa",
        scale: Scale = None,
        steps: int | None = None,
        seed: int = 0,
        num: int = 1,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
    ) -> list[Image.Image]:
        """Pictures of one prompt or of a list of prompts, `num` of each, prompt by prompt.

        negative: what to steer away from, one for all or one per prompt; "" and None mean none
        (for "cfg" they mean the null prompt). guidance: "nasa", "nasa-centred", "nag", "vsf",
        "embed-sub" (subtract text embeddings), "cfg" (of the model's outputs, every step) or
        "none". A multi-step model runs under CFG at its own kappa besides, but for "none".
        scale: its strength; for "cfg" it is kappa (1 = off). None: the model's default. A sequence
        gives every network call its own (pndm: one more than steps); under a guidance of attention
        a strength may be a tensor of one per cross-attention in forward order [layers], under
        "cfg" of one per picture [b].
        steps: None is the recipe's of a one-step model (mostly one), else the model's default.
        size: (height, width) in pixels. tile: decode pictures that are larger than so many latent
        pixels in tiles of that side, in the memory of one (see `decode_tiled`); None: as a whole.
        Picture i of a prompt uses noise i of `seed`, whatever the batch. Raises ValueError for what
        it cannot do.
        """
        check_tile(tile)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("give at least one prompt, got an empty list")
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        negatives = _negatives(negative, len(prompts))
        prompts = [p for p in prompts for _ in range(num)]
        negatives = [n for n in negatives for _ in range(num)]
        indices = [i % num for i in range(len(prompts))]
        z = self.noise(seed, indices, size)

        def noise(step: int) -> Tensor:
            return Noise(seed).normal("sampler", step, indices, tuple(z.shape[1:])).to(z)

        x = self.pictures(prompts, z, negatives, guidance, scale, steps, noise, tile)
        return [Image.fromarray(row) for row in to_uint8(x)]

    def noise(
        self, seed: int, indices: Sequence[int], size: tuple[int, int] | None = None
    ) -> Tensor:
        """The starting noise of pictures `indices`, [b c h w]."""
        factor, native = self.spec.vae.factor, self.spec.latent_size
        height, width = size or (native * factor, native * factor)
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(f"size must be multiples of {factor} pixels, got {height}x{width}")
        shape = (self.spec.latent_channels, height // factor, width // factor)
        return Noise(seed).normal("z", 0, indices, shape)

    @torch.no_grad()
    def pictures(
        self,
        prompts: Sequence[str],
        z: Tensor,
        negatives: Sequence[str | None] | None = None,
        guidance: str = "nasa",
        scale: Scale = None,
        steps: int | None = None,
        noise: Callable[[int], Tensor] | None = None,
        tile: int | None = None,
    ) -> Tensor:
        """Pictures [b 3 H W] in [-1, 1] from prompts and starting noise z [b c h w].

        noise(i): fresh N(0, 1) in z's shape for step i of a sampler that adds noise. tile: as in a
        call.
        """
        check_tile(tile)
        self._complete()
        assert self.vae is not None
        x0 = self.latents(prompts, z, negatives, guidance, scale, steps, noise)
        x0 = x0.to(self._dtype(self.vae))
        x = self.vae.decode(x0) if tile is None else decode_tiled(self.vae, x0, tile)
        return x.float().clamp(-1, 1)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        z: Tensor,
        negatives: Sequence[str | None] | None = None,
        guidance: str = "nasa",
        scale: Scale = None,
        steps: int | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Clean latents [b c h w] from prompts and starting noise; noise as in `pictures`.

        Raises ValueError for a guidance, scale or steps that cannot be, before a network runs.
        """
        if guidance not in MODES:
            raise ValueError(f"guidance must be one of {', '.join(MODES)}, got {guidance!r}")
        if not prompts:
            raise ValueError("give at least one prompt")
        plan = self._plan(steps)
        scales = self._scales(guidance, scale, plan, len(z))
        negatives = list(negatives or [None] * len(prompts))
        self._check_recent()
        null: Conditioning | None = None
        kappas: list[Strength] = [self.spec.kappa] * len(scales)
        if guidance == "cfg":
            kappas = scales
        if guidance == "cfg" and any(isinstance(k, Tensor) or k != 1 for k in kappas):
            null = self._filled(self._unconditional(negatives))
        elif guidance in self._over_cfg():
            null = self._filled(self._null())
        conds = self._conditions(prompts, negatives, guidance, scales)
        conds = [self._sized(cond, z.shape[2:]) for cond in conds]
        null = None if null is None else self._sized(null, z.shape[2:])
        if self._lone:  # where more texts follow, the system takes these pages when it needs them
            memory.drop_read(p for net in self.text_encoders if net for p in net.parameters())
            self._lone = False
        backbone = self.backbone
        assert backbone is not None
        z = z.to(next(backbone.parameters()).device)
        return self._sample(plan, conds, z, null, kappas, noise)

    def _over_cfg(self) -> tuple[str, ...]:
        """Guidances under which the model runs with CFG besides: a multi-step model needs it."""
        return () if self.spec.one_step else (*METHODS, "embed-sub")

    def _plan(self, steps: int | None) -> _Plan:
        """What is run at a number of steps (None: the model's): its recipe, or its sampler."""
        recipe = self.spec.one_step
        if recipe is None:
            return _Plan(self.spec.sampler, steps or self.spec.steps)
        steps = steps or recipe.steps
        if recipe.sampler:
            times = recipe.times if len(recipe.times) == steps else None
            more = {"eta": recipe.eta} if recipe.sampler == "tcd" else {}
            return _Plan(recipe.sampler, steps, times, more)
        return _Plan("ddim" if steps > 1 else "", steps)

    def _scales(self, guidance: str, scale: Scale, plan: _Plan, batch: int) -> list[Strength]:
        """One strength for all network calls, or one per call, checked."""
        calls = plan.calls(self.spec.schedule)  # of impossible steps: an error
        if scale is None:
            return [self._default_scale(guidance)]
        each = isinstance(scale, (list, tuple))
        scales: list[Strength] = list(scale) if each else [scale]  # type: ignore[arg-type, list-item]
        if each and len(scales) != calls:
            raise ValueError(
                f"scale must be one number, or one per network call: {calls}, got {len(scales)}"
            )
        for value in scales:
            if isinstance(value, Tensor) and not (
                value.shape == (batch,)
                if guidance == "cfg"
                else guidance in METHODS and value.dim() < 2
            ):
                raise ValueError(
                    f"scale may be a tensor [layers] under {', '.join(METHODS)}, of one per "
                    f"picture [{batch}] under cfg; got {list(value.shape)} under {guidance}"
                )
            if not torch.as_tensor(value).isfinite().all():
                raise ValueError(f"scale must be a finite number, got {value}")
        return scales

    def _sample(
        self,
        plan: _Plan,
        conds: list[Conditioning],
        z: Tensor,
        null: Conditioning | None,
        kappas: list[Strength],
        noise: Callable[[int], Tensor] | None,
    ) -> Tensor:
        """x0 by a plan; conds and kappas: one for all network calls, or one per call."""
        backbone, schedule, recipe = self.backbone, self.spec.schedule, self.spec.one_step
        assert backbone is not None

        run = backbone
        if self._records(z):
            run = self._graphs = self._graphs or Graphs(backbone)

        def call(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return run(x.to(self._dtype(backbone)), t, cond)

        if recipe is not None and recipe.guidance is not None:
            width = torch.full((len(z),), 1000 * (recipe.guidance - 1), device=z.device)
            conds = [dataclasses.replace(cond, guidance_embed=width) for cond in conds]
        if plan.sampler:
            one = len(conds) == 1
            cond, kappa = (conds[0], kappas[0]) if one else (conds, kappas)
            return sample(
                plan.sampler, call, schedule, z, cond, steps=plan.steps, times=plan.times,
                null=null, kappa=kappa, noise=noise, **plan.options,
            )  # fmt: skip
        assert recipe is not None
        x0 = one_step(call, schedule, z, conds[0], recipe.t, recipe.abar)
        if null is None:
            return x0
        away = one_step(call, schedule, z, null.expand(len(z)), recipe.t, recipe.abar)
        return cfg(x0, away, kappas[0])

    def _records(self, z: Tensor) -> bool:
        """Whether the backbone's calls for z become graphs."""
        return z.is_cuda and self._recent is not None

    def condition(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        guidance: str,
        scale: Strength,
    ) -> Conditioning:
        """The conditioning of prompts with their negatives under a guidance.

        Without any negative it is the plain conditioning. In a mixed batch rows without a negative
        get a negative that attends to nothing.
        """
        return self.conditions(prompts, negatives, guidance, [scale])[0]

    def conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        guidance: str,
        scales: Sequence[Strength],
    ) -> list[Conditioning]:
        """`condition` at several strengths; the texts are read, and their K/V made, once."""
        self._check_recent()
        return self._conditions(prompts, negatives, guidance, scales)

    def _conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        guidance: str,
        scales: Sequence[Strength],
    ) -> list[Conditioning]:
        text = self._text("prompts", prompts, lambda: self.encode(prompts))
        if guidance in ("cfg", "none") or not any(negatives):
            return [self._filled(text)] * len(scales)
        shared = len(set(negatives)) == 1
        texts = tuple(negatives[:1] if shared else negatives)
        used = torch.tensor([bool(n) for n in texts], device=text.cond.tokens.device)
        if guidance == "embed-sub":
            neg = self.encode([n or "" for n in texts])
            read = _attend_where(neg, used).mask  # padding that nothing reads is no text either
            assert read is not None
            away = torch.where(read[..., None], neg.tokens, 0)
            cond = text.cond
            return [dataclasses.replace(cond, tokens=cond.tokens - s * away) for s in scales]

        def where_used(found: Conditioning) -> Conditioning:
            return found if all(texts) else _attend_where(found.expand(len(texts)), used)

        negative = self._text(
            "negatives", texts, lambda: where_used(self.encode([n or "" for n in texts]))
        )
        how, null = METHODS[guidance], None
        if how.needs_null:
            given = tuple(map(bool, texts))
            null = self._text("nulls", given, lambda: where_used(self.null()))
        cond = guided(self.backbone, text, negative, null, how)
        return [dataclasses.replace(cond, guidance=with_strength(how, s)) for s in scales]

    def _text(
        self, kind: str, texts: Sequence[str | bool | None], make: Callable[[], Conditioning]
    ) -> Text:
        """A text that is made by make(), or one of the recent ones; its kind and texts name it."""
        if self._recent is None:
            return Text(make())
        return self._recent.get((kind, *texts), make)

    def _filled(self, text: Text) -> Conditioning:
        """A text alone, with its K/V where texts are kept: there the backbone is not sharded."""
        if self._recent is None or torch.is_grad_enabled():
            return text.cond
        return text.filled(self.backbone)

    def _null(self) -> Text:
        return self._text("null", (), self.null)

    def _check_recent(self) -> None:
        """Forget the texts of networks that have changed."""
        if self._recent is not None:
            parts = (self.backbone, *self.text_encoders)
            nets = [net for net in parts if net is not None]
            if not self._recent.check(nets, self.tokenizers):
                self._graphs = None

    def forget(self) -> None:
        """Forget the texts that were read, and CUDA graphs, after a change torch does not count.

        Weights that are replaced or changed in place are noticed; writes through `.data`, hooks and
        tensors of inference_mode are not.
        """
        self._graphs = None
        if self._recent is not None:
            self._recent.clear()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text features of prompts: every encoder's output side by side, and the pooled text.

        Size ids are a native picture's; `latents` puts the ids of its own size in their place.
        """
        self._complete("text_encoder", *(text_part(i) for i in range(1, len(self.spec.text))))
        features, mask, pooled = [], None, None
        for text, encoder, tokenizer in zip(
            self.spec.text, self.text_encoders, self.tokenizers, strict=True
        ):
            assert encoder is not None and tokenizer is not None
            out, read = read_text(text, encoder, tokenizer, prompts)
            features.append(getattr(out, text.output))
            mask = mask if read is None else read
            pooled = out.pooled if text.pooled else pooled
        tokens = torch.cat(features, dim=-1)
        if self.backbone is not None:  # T5-XXL may be stored in bf16 beside an fp32 backbone
            tokens = tokens.to(self._dtype(self.backbone))
        return self.native(Conditioning(tokens, mask, pooled))

    def native(self, cond: Conditioning) -> Conditioning:
        """A text with the size ids of a native picture, if any are read."""
        return self._sized(cond, (self.spec.latent_size, self.spec.latent_size))

    def _sized(self, cond: Conditioning, latent: Sequence[int]) -> Conditioning:
        """With the size ids [b 6] or [b 3] of a whole picture of latent (h, w), if any are read."""
        height, width = (side * self.spec.vae.factor for side in latent)
        ids = self.spec.backbone.size_ids(height, width)
        if ids is None:
            return cond
        rows = torch.tensor([ids], device=cond.tokens.device).expand(len(cond), len(ids))
        return dataclasses.replace(cond, size_ids=rows)

    def null(self) -> Conditioning:
        """The unconditional text, batch 1: the encoded empty prompt, or zeros."""
        return null_text(self.encode([""]), self.spec.null)

    def _unconditional(self, negatives: Sequence[str | None]) -> Text:
        """What CFG leads away from: each prompt's negative, the null text where it has none."""
        if not any(negatives):
            return self._null()

        def make() -> Conditioning:
            texts = self.encode([n or "" for n in negatives])
            if self.spec.null == "encoded" or all(negatives):
                return texts
            null = self.null()
            used = torch.tensor([bool(n) for n in negatives], device=texts.tokens.device)
            tokens = torch.where(used[:, None, None], texts.tokens, null.tokens)
            pooled = texts.pooled
            if pooled is not None and null.pooled is not None:
                pooled = torch.where(used[:, None], pooled, null.pooled)
            return dataclasses.replace(texts, tokens=tokens, pooled=pooled)

        return self._text("away", negatives, make)

    def _default_scale(self, guidance: str) -> float:
        if guidance == "cfg" and self.spec.one_step is None:
            return self.spec.kappa
        return self.spec.strengths.get(guidance, STRENGTHS[guidance])

    def _dtype(self, net: nn.Module) -> torch.dtype:
        return next(net.parameters()).dtype

    def _complete(self, *parts: str) -> None:
        """ValueError naming what a partial model folder lacks for the call."""
        have = {"backbone": self.backbone, "vae": self.vae}
        for i, (encoder, tokenizer) in enumerate(
            zip(self.text_encoders, self.tokenizers, strict=True)
        ):
            have[text_part(i)] = encoder if tokenizer is not None else None
        missing = [part for part in (parts or have) if have[part] is None]
        if missing:
            raise ValueError(f"this model folder lacks {', '.join(missing)} (or its tokenizer)")

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Pipeline:
        """Move every network that has memory, in place; returns the pipeline."""
        self.forget()
        for net in self._present():
            net.to(device=device, dtype=dtype)
        if self._recent is not None:  # what was packed is of the weights as they were
            self._pack()
        return self

    def optimize(self) -> Pipeline:
        """Make the pipeline fast for inference, in place; pictures change by rounding at most.

        Its networks are frozen, backbone and VAE packed (snoopi.optimize), the last texts are kept
        with their K/V, text encoders that lie in their file leave memory after the first texts, the
        backbone's calls on CUDA become graphs (snoopi.graphs), and this process keeps freed memory
        (snoopi.memory.keep_freed: for all of it, not for this pipeline alone). Returns the
        pipeline.
        """
        return self._optimize()

    def _optimize(self, done: Callable[[Tensor], object] | None = None) -> Pipeline:
        for net in self._present():
            net.requires_grad_(False)
        self._pack(done)
        self._recent, self._lone = RecentTexts(), True
        memory.keep_freed()
        return self

    def _pack(self, done: Callable[[Tensor], object] | None = None) -> None:
        """Pack backbone and VAE; texts are short, their encoders large rather than slow."""
        for net in (self.backbone, self.vae):
            if net is not None and not is_deferred(net):
                packing.optimize(net, done)

    def restore(self) -> Pipeline:
        """Undo `optimize`, but that networks stay frozen; returns the pipeline."""
        for net in self._present():
            packing.restore(net)
        self._recent, self._graphs, self._lone = None, None, False
        memory.give_back()
        return self

    def _present(self) -> list[nn.Module]:
        """The networks that have memory."""
        nets = (self.backbone, self.vae, *self.text_encoders)
        return [net for net in nets if net is not None and not is_deferred(net)]

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> Path:
        """Write the model folder atomically: all of it appears at once, or nothing changes.

        dtype: storage of floating-point weights; None: as they are.
        Raises OSError naming `folder`, for example on a full disk.
        """
        folder = Path(folder)
        with replacing(folder) as to:
            write_networks(to, self.spec, self._networks(), self.tokenizers, self.provenance, dtype)
        return folder

    def _networks(self) -> dict[str, nn.Module | None]:
        texts = {text_part(i): net for i, net in enumerate(self.text_encoders)}
        return {"backbone": self.backbone, "vae": self.vae, **texts}


def null_text(empty: Conditioning, kind: Literal["encoded", "zeros"]) -> Conditioning:
    """The unconditional text of a kind, from the encoded empty prompt."""
    if kind == "encoded":
        return empty
    zeros = None if empty.pooled is None else torch.zeros_like(empty.pooled)
    return dataclasses.replace(empty, tokens=torch.zeros_like(empty.tokens), pooled=zeros)


def read_text(
    text: TextSpec, encoder: Any, tokenizer: Tokenizer, prompts: Sequence[str]
) -> tuple[Any, Tensor | None]:
    """One encoder's output for prompts, and the mask bool [b n] of the tokens that are text.

    The mask is None where padding is read as text (CLIP); else the encoder was given it, too.
    """
    device = next(encoder.parameters()).device
    ids, mask = (x.to(device) for x in tokenizer([text.prepare(p) for p in prompts]))
    return (encoder(ids, mask), mask) if text.config.masked else (encoder(ids), None)


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    optimize: str = "none",
    without: Collection[str] = (),
    defer: Collection[str] = (),
    vae: str | Path | None = None,
) -> Pipeline:
    """A Pipeline from a model folder: memory-mapped safetensors assigned to meta networks.

    dtype: None keeps the stored one, but on the CPU reads fp16 as fp32: torch's CPU kernels have
    little fp16, and it would be slower besides. optimize: "none", or "auto" for what
    `Pipeline.optimize` does: equal to "none" up to rounding, for inference only, with a setting of
    the whole process; `Pipeline.restore` undoes it. vae: another folder, whose VAE is taken.
    without: parts that are left out as if their files were absent, for example "text_encoder".
    defer: parts that stay on the meta device; their files are checked, and read by who needs them.
    Raises ValueError for a folder that is not a model folder, or whose files do not fit its
    snoopi.json.
    """
    if optimize not in ("none", "auto"):
        raise ValueError(f"optimize must be 'none' or 'auto', got {optimize!r}")
    folder = Path(path)
    spec, provenance = read_spec(folder)
    folders = dict.fromkeys(spec.parts(), folder)
    if vae is not None:
        folders["vae"] = Path(vae)
        spec = dataclasses.replace(spec, vae=read_vae(folders["vae"], spec))
    widen = dtype is None and torch.device(device).type == "cpu"
    parts = {
        part: None
        if part in without
        else defer_part(place, spec, part)
        if part in defer
        else load_part(place, spec, part, dtype, widen)
        for part, place in folders.items()
    }
    tokenizers = [load_tokenizer(folder, spec, i) for i in range(len(spec.text))]
    texts = [parts[text_part(i)] for i in range(len(spec.text))]
    pipeline = Pipeline(spec, parts["backbone"], parts["vae"], texts, tokenizers, provenance)
    pipeline.folder = folder
    pipeline.to(device)
    # Nobody has written to the weights yet, so that what a pack stands for may leave memory: who
    # reads it later reads the file again.
    return pipeline._optimize(memory.dropper()) if optimize == "auto" else pipeline


def _attend_where(text: Conditioning, used: Tensor) -> Conditioning:
    """A text that the rows where used [b] is False attend to nowhere: for them it gives 0."""
    mask = text.mask
    if mask is None:
        mask = torch.ones(text.tokens.shape[:2], dtype=torch.bool, device=used.device)
    return dataclasses.replace(text, mask=mask & used[:, None])


def _negatives(negative: str | Sequence[str] | None, count: int) -> list[str | None]:
    """One negative per prompt; None and "" are None."""
    if negative is None or isinstance(negative, str):
        return [negative or None] * count
    if len(negative) != count:
        raise ValueError(f"give one negative, or one per prompt: {count}, got {len(negative)}")
    return [n or None for n in negative]
