"""Trainers that learn a world, of a VAE and of a teacher, and what every trainer is made of.

A trainer holds networks, optimizers and an average, and knows how to do step n; the loop around it
(saving, logging, stopping) is train.py's. Every random number is keyed by (seed, stream, step,
global sample index), so a trainer carries no random state and one step is a function of n.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snoopi import lora, parallel, worlds, zoo
from snoopi.conditioning import Conditioning
from snoopi.config import Config, Optim
from snoopi.folders import (
    WeightFile,
    is_deferred,
    weights_path,
)
from snoopi.health import Health
from snoopi.methods.autoencode import autoencoding_loss
from snoopi.methods.denoise import denoising_loss, draw_timesteps
from snoopi.methods.ema import EMA
from snoopi.models.vae import PatchVAEConfig, VAEConfig
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline, read_text
from snoopi.runstate import OptimizerState
from snoopi.worlds import World

TAIL = 0.3  # share of a run in which a trapezoid's learning rate falls
FIT_PICTURES = 2048  # pictures behind the patch transform's principal components


class Trainer(Protocol):
    """What the loop asks of a run."""

    health: Health | None
    """Figures of its working, for the rows; None: there are none."""

    def step(self, step: int) -> dict[str, Any]:
        """Do step `step` (from 0); returns the row of figures to log. All ranks call."""

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, for runstate.save and load_latest."""

    def pipeline(self) -> Pipeline | None:
        """The trained model with its averaged weights, whole, on rank 0; None on other ranks."""

    def describe(self, step: int) -> str:
        """What step `step` was made of, for the report of a loss that is not finite."""


def lr_factor(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of step `step` as a share of the recipe's: warm-up, then its schedule.

    "cosine": half a cosine to 0 over the run. "trapezoid": flat, then a line to 0 over the last
    TAIL of the run.
    """
    warm = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    left = 1 - step / steps
    course = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
        "trapezoid": min(1.0, left / TAIL),
    }
    return warm * course[optim.schedule]


class Optimizer:
    """AdamW over what requires a gradient, with its schedule, reduction and clipping."""

    def __init__(self, optim: Optim, steps: int, **nets: nn.Module) -> None:
        self.optim, self.steps = optim, steps
        named = [(f"{n}.{k}", p) for n, net in nets.items() for k, p in net.named_parameters()]
        self.parameters = [p for _, p in named if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.state = OptimizerState(self.adamw, named)

    def update(self, step: int) -> Tensor:
        """One update from this rank's gradients; returns their norm before clipping, float64 [].

        A norm that is not finite leaves weights and moments as they are. Does not wait for the
        device.
        """
        parallel.reduce_gradients(self.parameters)
        norm = parallel.clip_grad_norm(self.parameters, self.optim.clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.optim.lr * lr_factor(self.optim, step, self.steps)
        # The fused update asks it on the device; the loop stops there: keep the last good weights.
        self.adamw.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm


class VAETrainer:
    """An autoencoder learns a world's pictures."""

    health: Health | None = None

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.noise, self.world = Noise(config.run.seed), worlds.build(config.data.world)
        self.spec = zoo.model(config.model.preset)
        if not isinstance(self.spec.vae, VAEConfig):
            raise ValueError(f"model.preset: {self.spec.arch} has no VAE that learns")
        net = zoo.fresh(self.spec, "vae", config.run.seed)
        self.vae = spread(net, config, device)
        self.optimizer = Optimizer(config.optim.student, config.run.steps, vae=self.vae)
        self.average = average_of(self.vae, config)

    def step(self, step: int) -> dict[str, Any]:
        """One update of the autoencoding loss on fresh pictures."""
        config, rows = self.config, []
        parts = local_parts(config)
        for part in parts:
            pictures = self.world.batch(self.noise, step, part).pictures.to(self.device)
            side = pictures.shape[-1] // self.spec.vae.factor
            shape = (self.spec.latent_channels, side, side)
            eps = self.noise.normal("eps", step, part, shape).to(self.device)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            with parallel.autocast(self.device, config.run.dtype):
                auto = config.autoencode
                loss = autoencoding_loss(self.vae, pictures, eps, auto.l1, auto.kl)
            with parallel.gradient_sync(self.vae, part == parts[-1]):
                (loss.total.mean() / len(parts)).backward()
            figures = {"loss": loss.total, "loss_squared": loss.squared, "loss_kl": loss.kl}
            rows.append({name: value.detach().mean() for name, value in figures.items()})
        norm = self.optimizer.update(step)
        self.average.update(self.vae, step)
        return {**mean_row(rows), "grad_norm": norm}

    def state(self) -> dict[str, Any]:
        """Weights, average and optimizer moments."""
        average = self.average.average
        return {"vae": self.vae, "average": average, "optimizer": self.optimizer.state}

    @torch.no_grad()
    def pipeline(self) -> Pipeline | None:
        """The VAE alone, scaled to latents of standard deviation 1 on the world."""
        vae = averaged(self.spec, "vae", self.vae, self.average, self.config)
        if vae is None:
            return None
        pictures = self.world.batch(self.noise, 0, range(FIT_PICTURES), "vae").pictures
        mean = torch.cat([vae.moments(rows)[0] for rows in pictures.split(128)])
        scaled = dataclasses.replace(vae.config, scaling=round(1 / mean.std().item(), 5))
        vae.config = scaled
        return Pipeline(dataclasses.replace(self.spec, vae=scaled), vae=vae)

    def describe(self, step: int) -> str:
        """Nothing but the step decides the pictures."""
        return "the pictures are those of stream 'world' at this step"


class TeacherTrainer:
    """A multi-step teacher (text encoder and backbone) learns a world's pictures by denoising."""

    health: Health | None = None

    def __init__(self, config: Config, device: torch.device, vae: Any = None) -> None:
        self.config, self.device = config, device
        self.noise, self.world = Noise(config.run.seed), worlds.build(config.data.world)
        self.tokenizer = self.world.tokenizer()
        self.vae = self._vae(vae).to(device)
        self.spec = self._spec()
        self.backbone = self._network("backbone")
        self.text_encoder = self._network("text_encoder")
        nets = {"backbone": self.backbone, "text_encoder": self.text_encoder}
        self.optimizer = Optimizer(config.optim.student, config.run.steps, **nets)
        self.averages = {name: average_of(net, config) for name, net in nets.items()}

    def _vae(self, vae: Any) -> Any:
        """The VAE that was given, or the preset's linear patch transform fitted to the world."""
        if vae is not None:
            # Convolutions on the CPU are faster in channels-last, and pictures follow the weights.
            return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        preset = zoo.model(self.config.model.preset)
        if not isinstance(preset.vae, PatchVAEConfig):
            raise ValueError("model.vae: this preset needs a model folder with a VAE, got ''")
        fitted = zoo.fresh(preset, "vae", self.config.run.seed).eval()
        fitted.fit(self.world.batch(self.noise, 0, range(FIT_PICTURES), "vae").pictures)
        return fitted

    def _spec(self) -> zoo.ModelSpec:
        """The preset with the world's vocabulary, the VAE's config, the recipe's prediction."""
        spec, tokenizer = zoo.model(self.config.model.preset), self.tokenizer
        _check_vae(self.vae.config, spec, self.world)
        text = spec.text[0]
        words = tokenizer.tokenizer.get_vocab_size()
        encoder = text.config.for_words(words, tokenizer.max_length)
        schedule = dataclasses.replace(spec.schedule, prediction=self.config.denoise.prediction)
        return dataclasses.replace(
            spec,
            vae=self.vae.config,
            text=(dataclasses.replace(text, config=encoder),),
            schedule=schedule,
            null=self.config.data.null,
        )

    def _network(self, part: str) -> Any:
        net = zoo.fresh(self.spec, part, self.config.run.seed)
        return spread(net, self.config, self.device)

    def step(self, step: int) -> dict[str, Any]:
        """Predict what the noise hides at random timesteps (Eq. 3), with text dropout."""
        parts, losses = local_parts(self.config), []
        for part in parts:
            pictures, captions, _ = self.world.batch(self.noise, step, part)
            loss = self._loss(step, part, pictures, captions).mean()
            last = part == parts[-1]
            with (
                parallel.gradient_sync(self.backbone, last),
                parallel.gradient_sync(self.text_encoder, last),
            ):
                (loss / len(parts)).backward()
            losses.append(loss.detach())
        norm = self.optimizer.update(step)
        for name, average in self.averages.items():
            average.update(getattr(self, name), step)
        return {"loss": torch.stack(losses).mean(), "grad_norm": norm}

    def _timesteps(self, step: int, part: range) -> Tensor:
        denoise = self.config.denoise
        return draw_timesteps(self.noise, step, part, denoise.t, denoise.sampling)

    def _loss(self, step: int, part: range, pictures: Tensor, captions: list[str]) -> Tensor:
        config, noise = self.config, self.noise
        dropped = noise.uniform("dropout", step, part) < config.data.dropout
        texts = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        t = self._timesteps(step, part).to(self.device)
        with torch.no_grad():
            x0 = self.vae.encode(pictures.to(self.device))
        eps = noise.normal("eps", step, part, x0.shape[1:]).to(self.device)
        with parallel.autocast(self.device, config.run.dtype):
            cond = self._encode(texts)
            weight = config.denoise.weight
            return denoising_loss(self.backbone, self.spec.schedule, x0, t, eps, cond, weight)

    def _encode(self, texts: list[str]) -> Conditioning:
        text = self.spec.text[0]
        out, mask = read_text(text, self.text_encoder, self.tokenizer, texts)
        return Conditioning(getattr(out, text.output), mask)

    def state(self) -> dict[str, Any]:
        """Weights, averages and optimizer moments."""
        nets = {"backbone": self.backbone, "text_encoder": self.text_encoder}
        averages = {name: average.average for name, average in self.averages.items()}
        return {**nets, "average": averages, "optimizer": self.optimizer.state}

    def pipeline(self) -> Pipeline | None:
        """The teacher with its averaged weights."""
        nets = {
            name: averaged(self.spec, name, getattr(self, name), average, self.config)
            for name, average in self.averages.items()
        }
        if not parallel.is_main():
            return None
        vae = copy.deepcopy(self.vae).cpu()
        return Pipeline(self.spec, nets["backbone"], vae, [nets["text_encoder"]], [self.tokenizer])

    def describe(self, step: int) -> str:
        """Timesteps and captions of a step (of this rank's share)."""
        part = parallel.slice_of(self.config.run.batch)
        t = self._timesteps(step, part).tolist()
        captions = self.world.batch(self.noise, step, part).captions
        return f"t = {t}, captions = {captions}"


def _check_vae(vae: VAEConfig | PatchVAEConfig, spec: zoo.ModelSpec, world: World) -> None:
    """ValueError for latents that the preset's backbone does not take, or pictures of a size that
    the world does not draw."""
    channels, side = spec.backbone.in_channels, spec.latent_size * vae.factor
    if vae.latent_channels != channels:
        raise ValueError(
            f"model.vae: {spec.arch} needs latents of {channels} channels, "
            f"got {vae.latent_channels}"
        )
    if side != world.size:
        raise ValueError(
            f"model.preset: {spec.arch} makes pictures of {side} pixels a side, "
            f"the world of {world.size}"
        )


def local_parts(config: Config) -> list[range]:
    """This rank's share of the global batch, split for accumulation."""
    return parallel.micro_batches(parallel.slice_of(config.run.batch), config.run.accumulate)


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over a step's parts of each figure."""
    return {key: torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]}


def average_of(net: nn.Module, config: Config) -> EMA:
    """The recipe's moving average of a network that `spread` has made."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.ema.dtype]
    return EMA(net, config.ema.decay, dtype, Noise(config.run.seed), parallel.local_rows)


def spread(net: Any, config: Config, device: torch.device, folder: Path | None = None) -> Any:
    """torch.compile, activation checkpointing and FSDP2 as the recipe says; in place.

    A backbone that `load` has deferred is read now from its model folder, by each rank its part.
    """
    if config.parallel.compile:
        parallel.compile_blocks(net.blocks())
    if config.parallel.checkpointing:
        parallel.checkpoint_blocks(net.blocks())
    if not parallel.is_sharded(config.parallel.shard):  # FSDP2 takes contiguous parameters only
        net.to(memory_format=torch.channels_last)
    return parallel.shard(
        net,
        net.blocks(),
        policy=config.parallel.shard,
        dtype=config.run.dtype,
        device=device,
        read=_reader(net, folder, Noise(config.run.seed)) if folder and is_deferred(net) else None,
    )


def _reader(net: nn.Module, folder: Path, noise: Noise) -> parallel.Read:
    """Rows of a backbone's tensors: of its file, or as `lora.inject` starts its adapters."""
    file = WeightFile(weights_path(folder, "backbone"), net)
    shapes = {name: value.shape for name, value in net.state_dict().items()}

    def read(name: str, rows: slice) -> Tensor:
        if name.endswith(lora.SUFFIXES):
            return lora.initial(name, shapes[name], noise)[rows]
        return file.rows(name, rows)

    return read


def averaged(spec: zoo.ModelSpec, part: str, net: nn.Module, average: EMA, config: Config) -> Any:
    """A whole network with the averaged weights (the plain ones without an average), on rank 0."""
    use = average.average if config.ema.decay else {}
    state = parallel.gather_full({**net.state_dict(), **use})
    if not parallel.is_main():
        return None
    state = lora.merged(net, state)
    whole = zoo.build(spec, part)
    whole.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return whole.requires_grad_(False)
