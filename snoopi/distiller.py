"""PG-SB: a student of one step, distilled from a teacher by prompts alone (SNOOPI Eq. 6-7)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snoopi import lora, parallel, worlds, zoo
from snoopi.conditioning import Conditioning
from snoopi.config import Config
from snoopi.data import NegativeList, PromptList
from snoopi.folders import Clip, load_clip, load_tools, read_tools
from snoopi.guidance import NASA
from snoopi.health import PROBES, Health
from snoopi.methods.clip_loss import ClipLoss, Decoder, clip_loss, text_embeddings
from snoopi.methods.denoise import denoising_loss, drop_text
from snoopi.methods.vsd import choose_passes, draw_kappa, surrogate, teacher_scores, vsd_gradient
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline, null_text
from snoopi.runstate import trainable
from snoopi.samplers import one_step
from snoopi.textcache import TextCache
from snoopi.trainers import Optimizer, average_of, averaged, local_parts, mean_row, spread


class Part(NamedTuple):
    """One accumulation part of a step: global sample indices, and their texts.

    negative: a negative prompt for each sample, None where there are none.
    """

    indices: range
    prompts: list[str]
    cond: Conditioning
    negative: Conditioning | None = None


class Distiller:
    """PG-SB: a one-step student from prompts alone, by VSD with a frozen and a LoRA teacher."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        teacher: Pipeline,
        student: Pipeline | None = None,
        cache: TextCache | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.noise, self.world = Noise(config.run.seed), worlds.build(config.data.world)
        file = config.data.prompts
        self.prompts = PromptList(file, self.noise) if file else None
        file = config.data.negatives
        self.negatives = NegativeList(file, self.noise) if file else None
        self.cache = cache  # in place of the teacher's text encoders, which may be absent then
        self.teacher = teacher.to(device)
        frozen, teacher.backbone = teacher.backbone, None  # becomes the pair: no third copy
        if frozen is None:
            raise ValueError("model.teacher: this model folder has no backbone")
        self.spec = dataclasses.replace(
            teacher.spec,
            null=config.data.null,
            one_step=zoo.OneStep(config.vsd.student_t),
        )
        self.schedule = self.spec.schedule
        start = student.backbone if student is not None else frozen
        if start is None or start.config != frozen.config:
            raise ValueError("model.student_init: its backbone must have the teacher's sizes")
        start = copy.deepcopy(start).requires_grad_(True).train()
        if config.model.student == "lora":
            own = config.student_lora
            lora.inject(start, own.targets, own.rank, own.gamma, self.noise)
        self.student = spread(start, config, device, (student or teacher).folder)
        lora.inject(frozen, config.lora.targets, config.lora.rank, config.lora.gamma, self.noise)
        if config.run.dtype == "bf16":
            parallel.store_bf16(frozen)
        self.pair = spread(frozen, config, device, teacher.folder)
        run = config.run
        self.student_optimizer = Optimizer(config.optim.student, run.steps, student=self.student)
        updates = run.steps * config.lora.updates_per_step
        self.lora_optimizer = Optimizer(config.optim.lora, updates, pair=self.pair)
        self.average = average_of(self.student, config)
        self.clip = (
            ClipNetworks.load(config, device, teacher.vae) if config.clip_loss.weight else None
        )
        with torch.no_grad():
            self.null = self._null()
        ranges = config.vsd.t, config.kappa.teacher
        self.health = Health(*ranges, device) if config.run.health else None

    def _null(self) -> Conditioning:
        if self.cache is not None:
            return null_text(self._cached("null", [0]), self.spec.null)
        return Pipeline(
            self.spec,
            text_encoders=self.teacher.text_encoders,
            tokenizers=self.teacher.tokenizers,
        ).null()

    def step(self, step: int) -> dict[str, Any]:
        """The student follows the teachers' difference, then the LoRA teacher the student.

        With vsd.every = k only each k-th step updates the student (two time scales, DMD2).
        """
        if self.health and not self.health.probed:
            self._probe(self.health)
        parts = [self._part(step, indices) for indices in local_parts(self.config)]
        every = self.config.vsd.every
        turn = (step + 1) % every == 0
        x0, row = self._update_student(step, parts) if turn else (self._pictures(step, parts), {})
        updates = self.config.lora.updates_per_step
        rows = [self._update_lora(step * updates + i, parts, x0) for i in range(updates)]
        # Means, not the last: a figure that is not finite shows, whichever update it is of.
        row |= {name: sum(each[name] for each in rows) / updates for name in rows[0]}
        if turn:
            self.average.update(self.student, step // every)
        if self.health and self.health.due(step + 1, self.config.run.steps):
            self._probe(self.health)
        return row

    @torch.no_grad()
    def _probe(self, health: Health) -> None:
        """x0 of fixed noise and prompts, in parts of a step's size."""
        pictures = []
        rows, size = range(min(PROBES, self.config.run.batch)), len(local_parts(self.config)[0])
        for indices in (rows[first : first + size] for first in rows[::size]):
            z, cond = self._normal("probe", 0, indices), self._part(0, indices).cond
            with parallel.autocast(self.device, self.config.run.dtype):
                t = self.config.vsd.student_t
                pictures.append(one_step(self.student, self.schedule, z, cond, t))
        parallel.reshard(self.student)
        health.probe(torch.cat(pictures))

    @torch.no_grad()
    def _part(self, step: int, indices: range) -> Part:
        prompts, negatives = self._prompts(step, indices), self._negatives(step, indices)
        if self.cache is None:
            negative = self.teacher.encode(negatives) if negatives else None
            return Part(indices, prompts, self.teacher.encode(prompts), negative)
        assert self.prompts is not None  # Config has seen to it
        rows = self.prompts.rows(step, self.config.run.batch, indices)
        negative = None
        if self.negatives is not None:
            negative = self._cached("negatives", self.negatives.rows(step, indices))
        return Part(indices, prompts, self._cached("prompts", rows), negative)

    def _cached(self, kind: str, rows: Sequence[int]) -> Conditioning:
        assert self.cache is not None
        found = self.cache.read(kind, rows).map(lambda x: x.to(self.device))
        return self.teacher.native(found)

    @property
    def aware(self) -> bool:
        """Whether training is negative-aware (NASA-T)."""
        return self.config.nasa_train.alpha[1] > 0

    def _prompts(self, step: int, indices: range) -> list[str]:
        """Prompts of a step: of the recipe's file, or captions of the world."""
        if self.prompts is not None:
            return self.prompts.batch(step, self.config.run.batch, indices)
        return self.world.prompts(self.noise, stream="prompts", step=step, indices=indices)

    def _negatives(self, step: int, indices: Sequence[int]) -> list[str]:
        """Negative prompts of a step: of the recipe's file; else, under NASA-T, words of the world;
        [] where nothing asks for them."""
        if self.negatives is not None:
            return self.negatives.batch(step, indices)
        if not self.aware:
            return []
        words = [
            self.world.bare_word(attribute, value)
            for attribute, names in self.world.attributes.items()
            for value in range(len(names))
        ]
        chosen = self.noise.integers("negatives", step, indices, 0, len(words))
        return [words[i] for i in chosen.tolist()]

    def _text_encoders(self) -> Sequence[nn.Module | None]:
        """The teacher's, read from its folder where the cache stands in for them."""
        return self.teacher.text_encoders if self.cache is None else self.cache.encoders()

    def _update_student(
        self, step: int, parts: Sequence[Part]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """x0 = f(z, y), g = w(t) (eps_psi - eps_phi), and one update along g (Eq. 7)."""
        pictures, rows = [], []
        for part, last in _with_last(parts):
            x0 = self._generate(step, part)
            gradient, row = self._gradient(step, part, x0.detach())
            loss = surrogate(x0, gradient, self.config.vsd.surrogate).mean()
            row = {"loss_vsd": loss.detach(), **row}
            if self.clip is not None:
                away, figures = self._clip_loss(self.clip, step, part, x0, gradient)
                loss, row = loss + away, row | figures
            with parallel.gradient_sync(self.student, last):
                (loss / len(parts)).backward()
            pictures.append(x0.detach())
            rows.append(row)
        norm = self.student_optimizer.update(step)
        return pictures, {**mean_row(rows), "grad_norm_student": norm}

    @torch.no_grad()
    def _pictures(self, step: int, parts: Sequence[Part]) -> list[Tensor]:
        """What the LoRA teacher learns from where the student is not updated."""
        return [self._generate(step, part) for part in parts]

    def _generate(self, step: int, part: Part) -> Tensor:
        """x0 = f(z, y) [b c h w] with the student's graph."""
        z, cond = self._normal("z", step, part.indices), self._student_text(step, part)
        with parallel.autocast(self.device, self.config.run.dtype):
            return one_step(self.student, self.schedule, z, cond, self.config.vsd.student_t)

    def _student_text(self, step: int, part: Part) -> Conditioning:
        """What the student reads: the prompt, under NASA-T with NASA of a drawn strength beside."""
        if not self.aware:
            return part.cond
        alpha = self._alpha(step, part.indices).view(-1, 1, 1)  # [b 1 1]: one for all of a picture
        return dataclasses.replace(
            part.cond, negative=part.negative, guidance=NASA(1.0), region=alpha
        )

    def _alpha(self, step: int, indices: Sequence[int]) -> Tensor:
        alpha = self.noise.uniform("alpha", step, indices, *self.config.nasa_train.alpha)
        return alpha.to(self.device)

    def _clip_loss(
        self, clip: ClipNetworks, step: int, part: Part, x0: Tensor, gradient: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """A number whose gradient is the weighted CLIP loss's, and what tells of it.

        Norms are of what reaches x0 of a picture: gradient (VSD's) as the surrogate divides it.
        """
        config, run = self.config.clip_loss, self.config.run
        weight = config.weight * (1 - step / run.steps if config.schedule == "linear" else 1)
        found = clip.loss(part.prompts, x0, config.tau, run.dtype)
        pull = weight * found.gradient
        elements = x0[0].numel() if self.config.vsd.surrogate == "mean" else 1
        vsd_norm = gradient.flatten(1).norm(dim=1) / elements  # [b]
        clip_norm = pull.flatten(1).norm(dim=1)
        figures = {
            "clip_weight": x0.new_tensor(weight),
            "loss_clip": found.loss.mean(),
            "clip_cosine": found.cosine.mean(),
            "grad_x0_vsd": vsd_norm.mean(),
            "grad_x0_clip": clip_norm.mean(),
            # Not their ratio: VSD's is 0 while the adapters are, CLIP's where one is above tau.
            "clip_share": (clip_norm / (clip_norm + vsd_norm).clamp(min=1e-30)).mean(),
        }
        return (x0 * pull).flatten(1).sum(1).mean(), figures

    def _gradient(self, step: int, part: Part, x0: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The VSD gradient at fresh noise and timesteps, and the figures that tell of it."""
        vsd, noise = self.config.vsd, self.noise
        t = noise.integers("t", step, part.indices, *vsd.t).to(self.device)
        x_t = self.schedule.add_noise(x0, self._normal("eps", step, part.indices), t)
        kappa, kappa_lora = self._kappa(step, part.indices)
        with parallel.autocast(self.device, self.config.run.dtype):
            away = part.negative if self.aware else None  # the frozen teacher's null text (Eq. 5)
            own = self.config.parallel
            pixels = x_t.numel() // x_t.shape[1]
            passes = choose_passes(own.teacher_pass, parallel.is_sharded(own.shard), pixels)
            texts = (part.cond, self.null)
            scores = teacher_scores(
                self.pair, x_t, t, *texts, kappa, kappa_lora, passes, negative=away
            )
        gradient = vsd_gradient(self.schedule, scores, x0, x_t, t, vsd.weight, vsd.normaliser)
        # Means over samples, so that parts and ranks add up to the figure of the whole batch.
        gap = (scores.teacher - scores.lora_teacher).square().flatten(1).mean(1).sqrt()  # [b]
        if self.health:
            self.health.scores(gap, t, kappa)
            self.health.pictures(x0)
        row = {"gap": gap.mean(), "kappa_mean": kappa.mean(), "kappa_lora_mean": kappa_lora.mean()}
        return gradient, {**row, "x0_std": x0.flatten(1).std(1).mean()}

    def _update_lora(
        self, draw: int, parts: Sequence[Part], pictures: Sequence[Tensor]
    ) -> dict[str, Any]:
        """The LoRA teacher learns to denoise the student's pictures, with text dropout."""
        config, noise, rows = self.config, self.noise, []
        for (part, last), x0 in zip(_with_last(parts), pictures, strict=True):
            t = noise.integers("lora_t", draw, part.indices, *config.lora.t).to(self.device)
            eps = self._normal("lora_eps", draw, part.indices)
            dropped = noise.uniform("dropout", draw, part.indices) < config.data.dropout
            cond = drop_text(part.cond, self.null, dropped)
            frozen = self._frozen_loss(draw, x0, t, eps, cond)
            with parallel.autocast(self.device, config.run.dtype):
                loss = denoising_loss(
                    self.pair, self.schedule, x0, t, eps, cond, config.lora.loss_weight
                ).mean()
            with parallel.gradient_sync(self.pair, last):
                (loss / len(parts)).backward()
            rows.append({"loss_lora": loss.detach()})
            if self.health and frozen is not None:
                self.health.denoising(loss.detach(), frozen)
        return {**mean_row(rows), "grad_norm_lora": self.lora_optimizer.update(draw)}

    @torch.no_grad()
    def _frozen_loss(
        self, draw: int, x0: Tensor, t: Tensor, eps: Tensor, cond: Conditioning
    ) -> Tensor | None:
        """The frozen teacher's denoising loss, at the last update before a row of the log.

        Asked before the LoRA teacher's own pass, whose end leaves the pair sharded.
        """
        config = self.config
        if not self.health or (draw + 1) % (config.run.log * config.lora.updates_per_step):
            return None
        with parallel.autocast(self.device, config.run.dtype), lora.rows(self.pair, len(x0)):
            weight = config.lora.loss_weight
            return denoising_loss(self.pair, self.schedule, x0, t, eps, cond, weight).mean()

    def _kappa(self, step: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        k = self.config.kappa
        kappa, kappa_lora = draw_kappa(self.noise, step, indices, k.teacher, k.lora, k.draw, k.per)
        return kappa.to(self.device), kappa_lora.to(self.device)

    def _normal(self, stream: str, step: int, indices: Sequence[int]) -> Tensor:
        side = self.spec.latent_size
        shape = (self.spec.latent_channels, side, side)
        return self.noise.normal(stream, step, indices, shape).to(self.device)

    def state(self) -> dict[str, Any]:
        """Student (of a LoRA student its adapters), its average, the adapters, moments."""
        whole = self.config.model.student == "full"
        return {
            "student": self.student if whole else trainable(self.student),
            "average": self.average.average,
            "lora": trainable(self.pair),
            "optimizer_student": self.student_optimizer.state,
            "optimizer_lora": self.lora_optimizer.state,
        }

    def pipeline(self) -> Pipeline | None:
        """The student with its averaged weights, and the teacher's VAE and text encoder."""
        net = averaged(self.spec, "backbone", self.student, self.average, self.config)
        if not parallel.is_main():
            return None
        teacher = self.teacher
        others = [teacher.vae, *self._text_encoders()]
        vae, *texts = (copy.deepcopy(net).cpu() if net is not None else None for net in others)
        return Pipeline(self.spec, net, vae, texts, teacher.tokenizers)

    def describe(self, step: int) -> str:
        """Timesteps, guidance scales and prompts of a step (of this rank's share)."""
        indices = parallel.slice_of(self.config.run.batch)
        t = self.noise.integers("t", step, indices, *self.config.vsd.t).tolist()
        kappa, kappa_lora = (
            [round(k, 4) for k in ks.tolist()] for ks in self._kappa(step, indices)
        )
        prompts, negatives = self._prompts(step, indices), self._negatives(step, indices)
        away = f", negatives = {negatives}" if negatives else ""
        if self.aware:
            away += f", alpha = {[round(a, 4) for a in self._alpha(step, indices).tolist()]}"
        return f"t = {t}, kappa = {kappa}, kappa_lora = {kappa_lora}, prompts = {prompts}{away}"


class ClipNetworks(NamedTuple):
    """What the CLIP loss runs x0 and prompts through, frozen and whole on every rank."""

    clip: Clip
    decoder: Decoder
    device: torch.device

    @classmethod
    def load(cls, config: Config, device: torch.device, vae: Any) -> ClipNetworks:
        """From the folders of [clip_loss]; vae: the teacher's. ValueError names the key."""
        section = config.clip_loss
        with _named("clip_loss.model"):
            clip = load_clip(section.model, device)
        if section.decoder == "vae":
            return cls(clip, vae.requires_grad_(False), device)
        with _named("clip_loss.taesd"):
            decoder: Any = load_tools(section.taesd, str(device), torch.float32).get("vae")
            channels = vae.config.latent_channels
            if decoder is None or decoder.config.latent_channels != channels:
                raise ValueError(f"{section.taesd} has no TAESD for latents of {channels} channels")
        return cls(clip, decoder, device)

    def loss(
        self, prompts: Sequence[str], x0: Tensor, tau: float, dtype: parallel.Dtype
    ) -> ClipLoss:
        """The loss of x0 [b c h w] against its prompts, and its gradient there."""
        precision = partial(parallel.autocast, self.device, dtype)
        with precision():
            texts = text_embeddings(self.clip.text_encoder, self.clip.tokenizer, prompts)
        return clip_loss(x0, texts, tau, self.decoder, self.clip.image_encoder, precision)


def check_clip_loss(config: Config) -> None:
    """ValueError, before minutes of reading a teacher, for folders that are none of tools."""
    section = config.clip_loss
    for name in ("model", "taesd"):
        if section.weight and name in ("model", section.decoder):
            with _named(f"clip_loss.{name}"):
                read_tools(Path(getattr(section, name)))


@contextmanager
def _named(key: str) -> Iterator[None]:
    """ValueErrors of the body get the name of the key before them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _with_last(parts: Sequence[Part]) -> Iterator[tuple[Part, bool]]:
    return ((part, i == len(parts) - 1) for i, part in enumerate(parts))
