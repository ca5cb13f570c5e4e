"""Train a teacher, or distil one into a one-step student (PG-SB).

torchrun [--nproc-per-node N] -m snoopi.train [RECIPE] [section.key=value ...]
         [--out DIR] [--resume] [--print-config] [--dry-run]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from snoopi import config as recipes
from snoopi import parallel, runstate, zoo
from snoopi.config import Config
from snoopi.final import OBSERVERS, Observer
from snoopi.pictures import write_atomically
from snoopi.pipeline import SHIPPED, load, shipped, shipped_or_path
from snoopi.runlog import RunLog
from snoopi.trainers import Distiller, TeacherTrainer, Trainer, VAETrainer

DEFAULT = "pgsb_shapes_gap"
STORES = {"fp32": torch.float32, "fp16": torch.float16}  # model.store


# What a resumed run may change without changing a number of its steps.
FREE = (
    "evaluate.",
    "model.store",
    "parallel.",
    "run.log",
    "run.save",
    "run.keep",
    "run.accumulate",
)


class Stopped(Exception):
    """A run was asked to stop by a signal and has saved its state."""

    def __init__(self, message: str, caught: int) -> None:
        super().__init__(message)
        self.status = 128 + caught


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    options = _parser().parse_args(arguments)
    try:
        config, out = _resolve(options)
        if options.print_config:
            print(recipes.to_toml(config), end="")
        elif options.dry_run:
            print(_plan(config, out))
        else:
            group = config.parallel.shard == "always"
            with parallel.session(config.run.device, group) as device:
                run(config, out, device, resume=options.resume)
    except ValueError as error:
        if parallel.is_main():
            print(f"snoopi.train: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if parallel.is_main():
            print(f"snoopi.train: {stopped}", file=sys.stderr)
        return stopped.status
    return 0


def run(config: Config, out: Path, device: torch.device, *, resume: bool = False) -> None:
    """One run from recipe to report, in the folder `out`; a missing teacher is trained first."""
    method, started = config.run.method, time.monotonic()
    source = _source(config, out, device)
    seconds = {"sources": time.monotonic() - started}
    started = time.monotonic()
    with runstate.lock(out):
        trainer = _trainer(config, device, source)
        _say(f"{out}: {_what(config)}")
        observer = OBSERVERS[method](config, out)
        fit(trainer, config, out, observer, resume=resume)
        pipeline = trainer.pipeline()
        if pipeline is None:
            return
        pipeline.provenance = _provenance(config, out, source)
        model = pipeline.save(out / "model", STORES[config.model.store])
        seconds["training"] = time.monotonic() - started
        observer.finish(model, source, seconds)


def _trainer(config: Config, device: torch.device, source: Path | None) -> Trainer:
    """The trainer of run.method, from the model folder it starts with."""
    if config.run.method == "autoencode":
        return VAETrainer(config, device)
    if config.run.method == "denoise":
        vae = load(source, dtype=torch.float32).vae if source else None
        return TeacherTrainer(config, device, vae)
    assert source is not None
    init = config.model.student_init
    # Trained from fp32, however it is stored.
    student = None if init == "teacher" else load(init, dtype=torch.float32)
    return Distiller(config, device, load(source, dtype=torch.float32), student)


def fit(trainer: Trainer, config: Config, out: Path, observer: Observer, *, resume: bool) -> None:
    """The loop: step, log, look, save; stops on a signal, or on a loss that is not finite."""
    steps, every = config.run.steps, config.evaluate.every
    first = _first_step(trainer, config, out, resume)
    with (
        parallel.SignalGuard() as guard,
        RunLog(out / "metrics.jsonl", steps, resumed=first, main=parallel.is_main()) as log,
    ):
        clock, pictures = time.monotonic(), 0
        for step in range(first, steps):
            row = trainer.step(step)
            done, pictures = step + 1, pictures + config.run.batch
            _check_finite(row, trainer, step)
            # The last step is measured by observer.finish, on the model folder as it was written.
            looking = every > 0 and done % every == 0 and done < steps
            if looking or done % config.run.log == 0 or done == steps:
                row = parallel.mean(row)
                row["images_per_s"] = pictures / (time.monotonic() - clock)
                if looking:
                    row |= observer.look(trainer.pipeline(), done)
                log.write(done, row)
                clock, pictures = time.monotonic(), 0
            stopping = guard.stop() and done < steps
            if done % config.run.save == 0 or done == steps or stopping:
                _save(trainer, config, out, done)
            if stopping:
                message = f"stopped after step {done}; --resume --out {out} goes on from there"
                raise Stopped(message, guard.caught or signal.SIGTERM)


def _check_finite(row: dict[str, Any], trainer: Trainer, step: int) -> None:
    """Stop on a figure that is not finite, naming what the step was made of."""
    bad = [name for name, value in row.items() if not math.isfinite(float(value))]
    if parallel.any_rank(bool(bad)):
        names = ", ".join(bad) or "a figure of another rank"
        raise ValueError(
            f"step {step}: {names} is not finite; the run stops, its last state is whole. "
            f"{trainer.describe(step)}"
        )


def _first_step(trainer: Trainer, config: Config, out: Path, resume: bool) -> int:
    """The step to start from: that of the newest run state with --resume, else 0."""
    found = runstate.steps(out)
    if found and not resume:
        raise ValueError(
            f"{out} holds a run up to step {found[-1]}: add --resume, or another --out"
        )
    if not found:
        if parallel.is_main():
            if resume:  # killed before its first state: nothing to go on from
                (out / "metrics.jsonl").unlink(missing_ok=True)
            write_atomically(out / "config.toml", recipes.to_toml(config).encode())
        return 0
    before = recipes.load(out / "config.toml")
    changed = [d for d in recipes.differences(before, config) if not d.startswith(FREE)]
    if changed:
        raise ValueError(f"{out} was started with another recipe: {'; '.join(changed)}")
    step = runstate.load_latest(out, trainer.state())
    _say(f"{out}: resumed after step {step}")
    return step


def _save(trainer: Trainer, config: Config, out: Path, done: int) -> None:
    digest = recipes.digest(config)
    runstate.save(out, done, trainer.state(), config=digest, keep=config.run.keep)


def _source(config: Config, out: Path, device: torch.device) -> Path | None:
    """The model folder a run starts from: its teacher (vsd) or its VAE (denoise).

    A folder is taken as it is. A name is that of a model shipped with the package, else of a recipe
    whose run lies beside `out`; if there is none yet, it is trained first.
    """
    name = {"vsd": config.model.teacher, "denoise": config.model.vae}.get(config.run.method, "")
    if not name:
        return None
    if name in shipped() or name not in recipes.recipes():
        return shipped_or_path(name)
    folder = out.parent / name
    if not (folder / "model").is_dir():
        _say(f"{folder / 'model'} is not there yet: training it first")
        run(recipes.load(name), folder, device, resume=True)
        parallel.barrier()
    return folder / "model"


def _resolve(options: argparse.Namespace) -> tuple[Config, Path]:
    """The recipe with its overrides, and the run's folder."""
    words = list(options.recipe)
    name = words.pop(0) if words and "=" not in words[0] else None
    if name is None and options.resume and options.out and (options.out / "config.toml").is_file():
        name = str(options.out / "config.toml")
    name = name or DEFAULT
    config = recipes.load(name, words)
    return config, options.out or Path("runs") / Path(name).stem


def _plan(config: Config, out: Path) -> str:
    """What a run would do, without doing it: recipe, parameter counts, steps."""
    lines = [recipes.to_toml(config), f"out: {out}"]
    if config.run.method != "vsd":
        spec = zoo.preset(config.model.preset)
        for part in spec.parts():
            count = sum(p.numel() for p in zoo.build(spec, part).parameters())
            lines.append(f"{part}: {count:,} parameters")
    else:
        lines.append(f"teacher: {config.model.teacher}")
    lines.append(_what(config))
    return "\n".join(lines)


def _what(config: Config) -> str:
    run = config.run
    verbs = {
        "vsd": "distilling a one-step student",
        "denoise": "training a teacher",
        "autoencode": "training a VAE",
    }
    size = f"{run.steps} steps of {run.batch} pictures"
    return f"{verbs[run.method]}: {size}, {run.dtype}, seed {run.seed}"


def _provenance(config: Config, out: Path, source: Path | None) -> dict[str, Any]:
    """Where a model folder comes from: enough to make it again, to the bit on an equal machine."""
    return {
        "source": source.name if source and source.parent == SHIPPED else str(source or ""),
        "source_sha256": _weights_sha256(source),
        "method": config.run.method,
        "recipe": out.name,
        "config": {k: v for k, v in recipes.flat(config).items() if not k.startswith(FREE)},
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": parallel.world_size(),
    }


def _weights_sha256(source: Path | None) -> dict[str, str]:
    """SHA-256 of each weight file in the model folder that a run starts from."""
    files = sorted(source.glob("*.safetensors")) if source else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _say(text: str) -> None:
    if parallel.is_main():
        print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snoopi.train",
        description="Train a teacher, or distil one into a one-step student (PG-SB).",
        epilog="Keys of a recipe (section.key, type, default, meaning):\n\n" + recipes.reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(recipes.recipes())
    parser.add_argument(
        "recipe",
        nargs="*",
        help=f"a recipe ({names}) or a .toml file, then overrides section.key=value "
        f"(default: {DEFAULT})",
    )
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest run state")
    parser.add_argument("--print-config", action="store_true", help="print the recipe and stop")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a process group may outlive an error: leave at once, with the right status.
    os._exit(code) if code else sys.exit(0)
