"""One PG-SB step against the same step written plainly with diffusers and peft.

python -m benchmarks.train_step [--dtype fp32|bf16|both] [--threads 1,2] [--pairs N] [--batch B]
                                [--latent SIDE] [--json FILE]

The plain step is what a script would do: a diffusers UNet as the student, another one with peft's
adapters as the teacher pair, four calls in turn for the two teachers' scores (adapters disabled for
the frozen one), torch's AdamW and clip_grad_norm_. Between it and snoopi's step stand variants that
differ from their neighbour in one thing each, so that the gain is split by cause. All take the same
weights, prompts, noise and timesteps, and must give the same figures before anything is timed.
Needs diffusers and peft.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Column, Row, Table, WrongResult, number
from snoopi import config as recipes
from snoopi import errors, lora, parallel, zoo
from snoopi.config import Config
from snoopi.distiller import Distiller
from snoopi.layers import blocks
from snoopi.models import unet
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.unet import UNetConfig
from snoopi.noise import Noise
from snoopi.ops import native
from snoopi.pipeline import Pipeline
from snoopi.tokenize import Tokenizer
from snoopi.worlds.shapes import ShapesWorld

NAME = "benchmarks.train_step"
MODEL = "sd15, a quarter as wide"
# SD1.5 with a quarter of its widths: heads as wide and norm groups as large as they are there.
UNET = UNetConfig(channels=(80, 160, 320, 320), heads=(2, 2, 2, 2), text_width=192, norm_groups=8)
TEXT = CLIPTextConfig(width=192, mlp_width=768, heads=3)
RANK, GAMMA = 16, 32.0
CHECKED = ("loss_vsd", "grad_norm_student", "loss_lora", "grad_norm_lora", "x0_std", "gap")
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, of figures of the first two steps
CHECKED_STEPS = 2


class Case(NamedTuple):
    """What is trained: number format, pictures of a step, latent side."""

    dtype: str
    batch: int
    latent: int


# --- the two sides --------------------------------------------------------------------------------


def recipe(case: Case) -> Config:
    """PG-SB as Table 6 has it for SD1.5, without its CLIP loss, average and health figures."""
    words = [
        f"run.batch={case.batch}",
        f"run.dtype={case.dtype}",
        "run.accumulate=1",
        "run.health=false",
        "ema.decay=0",
        "clip_loss.weight=0",
        'data.prompts=""',
        "parallel.checkpointing=false",
        f"lora.rank={RANK}",
        f"lora.gamma={GAMMA}",
    ]
    return recipes.load("pgsb_sd15", words)


def teacher(case: Case) -> Pipeline:
    """A teacher with random weights whose output has the size of noise."""
    spec = dataclasses.replace(
        zoo.model("sd15"),
        backbone=UNET,
        text=(dataclasses.replace(zoo.model("sd15").text[0], config=TEXT),),
        latent_size=case.latent,
    )
    net, text = (zoo.fresh(spec, part, 0).eval() for part in ("backbone", "text_encoder"))
    out = net.conv_out.weight
    out.data.copy_(Noise(0).sample("conv_out", 0, 0, out.shape) / out[0].numel() ** 0.5)
    return Pipeline(spec, net, None, [text], [Tokenizer.clip(spec.text[0].pad_id)])


def distiller(case: Case) -> Distiller:
    """snoopi's side. Adapters start far from zero: the teachers differ by more than bf16 rounds."""
    made = Distiller(recipe(case), torch.device("cpu"), teacher(case))
    for name, p in made.pair.named_parameters():
        if name.endswith("lora_b"):
            p.data.copy_(0.3 * Noise(0).sample(name, 0, 0, p.shape))
    return made


def packages() -> tuple[Any, Any]:
    """diffusers and peft, with what the plain step uses of them loaded.

    Raises:
        ValueError: they are not installed.
    """
    # Beside a torch for the CPU a torchvision for CUDA does not load, and they would not without.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    try:
        diffusers, peft = (importlib.import_module(name) for name in ("diffusers", "peft"))
        _ = diffusers.UNet2DConditionModel, peft.get_peft_model
    except ImportError as error:
        raise ValueError(f"the plain step needs diffusers and peft: {error}") from error
    return diffusers, peft


class PlainOptimizer:
    """AdamW and the clipping of gradients as torch has them by default."""

    def __init__(self, net: nn.Module, optim: recipes.Optim) -> None:
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.clip = optim.clip
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )

    def update(self, step: int) -> float:
        """One update; returns the gradients' norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm.item()


class Plain:
    """The same step with diffusers and peft, as a script has it.

    source: a Distiller in its first state, for weights and text encoder.
    """

    def __init__(self, case: Case, source: Distiller) -> None:
        diffusers, peft = packages()
        self.case, self.config = case, source.config
        self.noise, self.schedule = source.noise, source.schedule
        self.text, self.world = source.teacher, ShapesWorld()
        self.student = diffusers.UNet2DConditionModel(**_diffusers_config())
        self.student.load_state_dict(_plain_state(source.student))
        base = diffusers.UNet2DConditionModel(**_diffusers_config()).requires_grad_(False)
        base.load_state_dict({k: v.float() for k, v in _plain_state(source.pair).items()})
        if case.dtype == "bf16":
            parallel.store_bf16(base)  # as snoopi stores its pair
        targets = list(self.config.lora.targets)
        chosen = peft.LoraConfig(r=RANK, lora_alpha=GAMMA, target_modules=targets)
        self.pair = peft.get_peft_model(base, chosen, autocast_adapter_dtype=False)
        adapters = lora.state_dict(source.pair)
        for name, p in self.pair.named_parameters():
            if p.requires_grad:
                layer, factor, *_ = name.removeprefix("base_model.model.").rsplit(".", 3)
                p.data.copy_(adapters[f"{layer}.{factor.lower()}"])
        optim = self.config.optim
        self.optimizers = (
            PlainOptimizer(self.student, optim.student),
            PlainOptimizer(self.pair, optim.lora),
        )
        with torch.no_grad():
            self.null = self.text.encode([""]).tokens

    def step(self, step: int) -> dict[str, Any]:
        """One update of the student, one of the LoRA teacher."""
        config, schedule, rows = self.config, self.schedule, range(self.case.batch)
        z, eps, lora_eps = (self._normal(name, step) for name in ("z", "eps", "lora_eps"))
        with torch.no_grad():
            prompts = self.world.prompts(self.noise, stream="prompts", step=step, indices=rows)
            text = self.text.encode(prompts).tokens
            null = self.null.expand_as(text)
        last = torch.full((len(rows),), config.vsd.student_t)
        with self._precision():
            x0 = schedule.to_x0(self.student(z, last, text).sample, z, last)
        t = self.noise.integers("t", step, rows, *config.vsd.t)
        low, high = config.kappa.teacher
        kappa = (low + (high - low) * self.noise.uniform("kappa", step, rows)).view(-1, 1, 1, 1)
        with torch.no_grad(), self._precision():
            x_t = schedule.add_noise(x0, eps, t)
            with self.pair.disable_adapter():
                real = [self.pair(x_t, t, words).sample.float() for words in (text, null)]
            fake = [self.pair(x_t, t, words).sample.float() for words in (text, null)]
        psi, phi = (u + kappa * (c - u) for c, u in (real, fake))
        gradient = (psi - phi) * schedule.alpha_sigma(t, x_t)[1].square()
        loss = 0.5 * F.mse_loss(x0, (x0 - gradient).detach())
        loss.backward()
        norm = self.optimizers[0].update(step)

        x0 = x0.detach()
        lora_t = self.noise.integers("lora_t", step, rows, *config.lora.t)
        dropped = self.noise.uniform("dropout", step, rows) < config.data.dropout
        words = torch.where(dropped[:, None, None], null, text)
        x_t = schedule.add_noise(x0, lora_eps, lora_t)
        with self._precision():
            pred = self.pair(x_t, lora_t, words).sample
        away = (pred.float() - lora_eps).square().flatten(1).mean(1)
        if config.lora.loss_weight == "alpha_bar":
            away = away * schedule.alpha_sigma(lora_t, x0)[0].flatten().square()
        loss_lora = away.mean()
        loss_lora.backward()
        return {
            "loss_vsd": loss.detach(),
            "grad_norm_student": norm,
            "gap": (psi - phi).square().flatten(1).mean(1).sqrt().mean(),
            "x0_std": x0.flatten(1).std(1).mean(),
            "loss_lora": loss_lora.detach(),
            "grad_norm_lora": self.optimizers[1].update(step),
        }

    def _normal(self, name: str, step: int) -> Tensor:
        side = self.case.latent
        return self.noise.normal(name, step, range(self.case.batch), (UNET.in_channels, side, side))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """bf16 autocast with attention in fp32 where a gradient runs: in bf16 its backward pass is
        ten times slower on a CPU, which would be no fair baseline."""
        if self.case.dtype == "fp32":
            yield
            return
        attention = F.scaled_dot_product_attention

        def upcast(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return attention(q, k, v, **options)
            with torch.autocast("cpu", enabled=False):
                return attention(q.float(), k.float(), v.float(), **options).to(q.dtype)

        F.scaled_dot_product_attention = upcast  # type: ignore[assignment]
        try:
            with torch.autocast("cpu", torch.bfloat16):
                yield
        finally:
            F.scaled_dot_product_attention = attention


def _diffusers_config() -> dict[str, Any]:
    """UNET in diffusers' words, where `attention_head_dim` is the number of heads."""
    return {
        "block_out_channels": UNET.channels,
        "attention_head_dim": UNET.heads[0],
        "cross_attention_dim": UNET.text_width,
        "norm_num_groups": UNET.norm_groups,
    }


def _plain_state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in net.state_dict().items() if not k.endswith(lora.SUFFIXES)}


# --- from the plain step to snoopi's, one change at a time ----------------------------------------


class Without:
    """snoopi's side without some of what it does, so that the rest can be told apart."""

    def __init__(
        self, case: Case, *, layout: bool, update: bool, attention: bool, remake: bool
    ) -> None:
        self.made = distiller(case)
        self.attention, self.remake = attention, remake
        made, optim = self.made, self.made.config.optim
        if not layout:
            for net in (made.student, made.pair):
                net.to(memory_format=torch.contiguous_format)
        if not update:
            plain = (
                PlainOptimizer(made.student, optim.student),
                PlainOptimizer(made.pair, optim.lora),
            )
            made.student_optimizer, made.lora_optimizer = plain  # type: ignore[assignment]

    def step(self, step: int) -> dict[str, Any]:
        """The Distiller's."""
        with contextlib.ExitStack() as off:
            if not self.attention:
                state = native.NATIVE._replace(attends=False)
                off.enter_context(mock.patch.object(native, "NATIVE", state))
            for module in () if self.remake else (blocks, unet):
                off.enter_context(mock.patch.object(module, "remake", lambda f, x: f(x)))
            return self.made.step(step)


# In the order in which they are added to snoopi's networks.
CHANGES = {
    "layout": "weights and activations in channels-last",
    "update": "fused AdamW, clipping in one pass",
    "attention": "attention in the native op",
    "remake": "norms and activations made again, not kept",
}


def _variants() -> dict[str, tuple[str, Callable[[Case], Any]]]:
    """Name: (what is changed from the one before, how it is made)."""
    found: dict[str, tuple[str, Callable[[Case], Any]]] = {
        "plain": ("diffusers and peft", lambda case: Plain(case, distiller(case))),
        "networks": (
            "networks and adapters written by hand",
            lambda case: Without(case, **dict.fromkeys(CHANGES, False)),
        ),
    }
    names = list(CHANGES)
    for i, (name, what) in enumerate(CHANGES.items()):
        on = {other: names.index(other) <= i for other in names}
        found[name] = (what, lambda case, on=on: Without(case, **on))  # type: ignore[misc]
    return found


VARIANTS = _variants()  # the last one is snoopi's step as it is


# --- measuring ------------------------------------------------------------------------------------


def check(case: Case, made: dict[str, Any]) -> None:
    """Hold every variant's figures to the plain step's.

    Raises:
        WrongResult: naming the first figure that differs by more than rounding.
    """
    for step in range(CHECKED_STEPS):
        rows = {name: side.step(step) for name, side in made.items()}
        for name, row in rows.items():
            for figure in CHECKED:
                got, want = float(row[figure]), float(rows["plain"][figure])
                if not abs(got - want) <= TOLERANCE[case.dtype] * abs(want):
                    raise WrongResult(
                        f"{name} {case.dtype}: {figure} of step {step + 1} is {got:.6g}, "
                        f"the plain step's {want:.6g}; nothing was timed"
                    )


def measure(case: Case, threads: int, pairs: int) -> list[dict[str, Any]]:
    """A row for each variant, in order: times interleaved here, memory in processes of their own.

    Raises:
        WrongResult: the variants do not compute the same.
    """
    memory = {name: peak(name, case, threads) for name in VARIANTS}
    with common.at_threads(threads):
        made = {name: make(case) for name, (_, make) in VARIANTS.items()}
        check(case, made)
        parts: dict[str, list[Callable[[], object]]] = {
            name: [lambda side=side: side.step(CHECKED_STEPS)]  # type: ignore[misc]
            for name, side in made.items()
        }
        times = {n: taken[0] for n, taken in common.interleave(parts, pairs, warmup=0).items()}
    rows, plain, before = [], "plain", "plain"
    for name, (what, _) in VARIANTS.items():
        ratios = {
            other: [a / b for a, b in zip(times[other].seconds, times[name].seconds, strict=True)]
            for other in {plain, before}
        }
        rows.append(
            {
                "variant": name,
                "what": what,
                **case._asdict(),
                "threads": threads,
                "ms": times[name].ms,
                "quartiles_ms": times[name].quartiles_ms,
                "speedup": statistics.median(ratios[plain]),
                "speedup_quartiles": common.quartiles(ratios[plain]),
                "gain": statistics.median(ratios[before]),
                "peak_mib": memory[name] / 2**20,
                "memory": memory[name] / memory[plain],
                "cores": {name: times[name].cores},
            }
        )
        before = name
    return rows


def peak(name: str, case: Case, threads: int) -> int:
    """Bytes of a process's peak in steps of a variant, above what its imports hold."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak, args=(name, case, threads, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise WrongResult(f"{name} {case.dtype}: the process that measures memory died") from None
    finally:
        child.join()


def _peak(name: str, case: Case, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    if name == "plain":
        packages()
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    base = _memory("VmRSS")
    side = VARIANTS[name][1](case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for step in range(CHECKED_STEPS):
        side.step(step)
    sender.send(_memory("VmHWM") - base)


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


# --- the command ----------------------------------------------------------------------------------


def _range(row: Row) -> str:
    low, high = row["speedup_quartiles"]
    return f"{low:.2f}-{high:.2f}"


TABLE = Table(
    f"A PG-SB step ({MODEL}) against diffusers and peft: `{NAME}`",
    (
        Column("variant", "", lambda row: row["variant"], 9),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("batch", "pictures of a step", number("batch", "d"), 5),
        Column("ms", "of a step, median", number("ms", ".0f"), 7),
        Column("speedup", "plain's time over this one's, by rounds", number("speedup"), 7),
        Column("quartiles", "of these", _range, 9),
        Column("gain", "the time of the row above over this one's: one cause", number("gain"), 5),
        Column("MiB", "peak of two steps above the imports", number("peak_mib", ".0f"), 6),
        Column("memory", "that peak over plain's", number("memory"), 6),
        Column("cores", "in use", common.cores, 5),
        Column("change", "from the row above", lambda row: row["what"], 48),
    ),
    (),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 if a side computes something else, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads = common.thread_counts(options.threads)
    for name in ("pairs", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.latent < 8 or options.latent % 8:
        raise ValueError(f"--latent must be a multiple of 8, got {options.latent}")
    common.check_file("--json", options.json)
    packages()
    described = common.begin(threads, TABLE, f"{options.pairs} interleaved rounds")
    print("\n" + common.text_head(TABLE.columns), flush=True)
    rows = []
    for dtype in common.dtypes(options.dtype):
        for count in threads:
            for row in measure(Case(dtype, options.batch, options.latent), count, options.pairs):
                print(common.text_row(TABLE.columns, row), flush=True)
                rows.append(row)
    command = _command(options, threads)
    common.finish(options.json, TABLE, command, described, rows, [], common.busy(rows))


def _command(options: argparse.Namespace, threads: Sequence[int]) -> str:
    """The command without the file it writes."""
    counts = ",".join(map(str, threads))
    words = f"--dtype {options.dtype} --threads {counts} --pairs {options.pairs}"
    return f"python -m {NAME} {words} --batch {options.batch} --latent {options.latent}"


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="A PG-SB step against the same step written with diffusers and peft.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    common.add_options(parser)
    add("--pairs", type=int, default=9, metavar="N", help="interleaved rounds")
    add("--batch", type=int, default=2, metavar="B", help="pictures of a step")
    add("--latent", type=int, default=64, metavar="SIDE", help="latent pixels a side")
    return parser


if __name__ == "__main__":
    sys.exit(main())
