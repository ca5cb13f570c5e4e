"""Train a teacher, or distil one into a one-step student (PG-SB).

torchrun [--nproc-per-node N] -m snoopi.train [RECIPE] [section.key=value ...]
         [--out DIR] [--resume] [--print-config] [--dry-run [--ranks N]]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snoopi import errors

if __name__ == "__main__":
    errors.leave_on_signals("snoopi.train")  # the imports below take seconds

import torch

from snoopi import config as recipes
from snoopi import parallel, plan, runstate, zoo
from snoopi.config import Config
from snoopi.data import NegativeList, PromptList, file_digest, unread
from snoopi.distiller import Distiller, check_clip_loss
from snoopi.final import OBSERVERS, Observer
from snoopi.folders import SHIPPED, SPEC_FILE, read_spec, shipped, shipped_or_path
from snoopi.health import Health
from snoopi.noise import Noise
from snoopi.pictures import write_atomically
from snoopi.pipeline import Pipeline, load
from snoopi.runlog import RunLog, event_writer, read
from snoopi.textcache import TextCache, shards_digest
from snoopi.tokenize import PromptCut
from snoopi.trainers import TeacherTrainer, Trainer, VAETrainer

DEFAULT = "pgsb_shapes_gap"
STORES = {"fp32": torch.float32, "fp16": torch.float16}  # model.store


# What a resumed run may change without changing a number of its steps.
FREE = (
    "evaluate.",
    "model.store",
    "parallel.",
    "run.log",
    "run.health",
    "run.tensorboard",
    "run.save",
    "run.keep",
    "run.milestones",
    "run.async_save",
    "run.accumulate",
)
_IDENTITY = "steps:"  # states of earlier versions note a digest of another kind, without it
_WRITTEN = ("model", "config.toml", "report.html", "summary.json")  # atomically, in a run's folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped, 1 when
    another rank was lost."""
    options = _parser().parse_intermixed_args(arguments)
    again = "the same command with --resume goes on"
    return errors.status("snoopi.train", lambda: _command(options), again)


def _command(options: argparse.Namespace) -> None:
    config, out = _resolve(options)
    if options.print_config:
        print(recipes.to_toml(config), end="")
    elif options.dry_run:
        print(_plan(config, out, options.ranks))
    else:
        group = config.parallel.shard == "always"
        with parallel.session(config.run.device, group) as device, warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCut)  # data.unread has told it
            run(config, out, device, resume=options.resume)


def run(config: Config, out: Path, device: torch.device, *, resume: bool = False) -> None:
    """One run from recipe to report, in the folder `out`; a missing teacher is trained first."""
    method, started = config.run.method, time.monotonic()
    _check(config, out, resume)
    source = _source(config, out, device)
    _say_memory(config, source)
    seconds = {"sources": time.monotonic() - started}
    started = time.monotonic()
    trainer = _trainer(config, device, source)  # before the lock: a mistake leaves no folder
    with runstate.lock(out):
        _tidy(out)
        _say(f"{out}: {_what(config)}")
        observer = OBSERVERS[method](config, out)
        if observer.world.attribution:
            _say(observer.world.attribution)
        fit(trainer, config, out, observer, resume=resume)
        pipeline = trainer.pipeline()
        if pipeline is None:
            return
        pipeline.provenance = _provenance(config, out, source) | observer.pictures()
        model = pipeline.save(out / "model", STORES[config.model.store])
        seconds["training"] = time.monotonic() - started
        observer.finish(model, source, seconds)


def _say_memory(config: Config, source: Path | None) -> None:
    """What a rank of a distillation will need, said before it is taken."""
    if config.run.method == "vsd" and source is not None and parallel.is_main():
        spec, _ = read_spec(source)
        if not plan.is_small(spec):
            _say(plan.describe(spec, config, [parallel.world_size()]))


def _check(config: Config, out: Path, resume: bool) -> None:
    """What can be known to fail before the first minute is spent. Writes nothing."""
    parallel.micro_batches(parallel.slice_of(config.run.batch), config.run.accumulate)
    if config.data.prompts:
        PromptList(config.data.prompts, Noise(config.run.seed))
    if config.data.negatives:
        NegativeList(config.data.negatives, Noise(config.run.seed))
    if config.run.tensorboard:
        event_writer()
    check_clip_loss(config)
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"cannot use {out} as a run's folder: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot use {out} as a run's folder: {parent} cannot be written to")
    _check_unused(out, resume)


def _check_unused(out: Path, resume: bool) -> None:
    """ValueError where a run without --resume would take another one's folder."""
    found, path = runstate.steps(out), out / "metrics.jsonl"
    rows = read(path) if path.exists() else []
    done = f"up to step {found[-1]}" if found else "that was stopped before its first state"
    if not resume and (found or rows):
        raise ValueError(f"{out} holds a run {done}: add --resume, or another --out")


def _tidy(out: Path) -> None:
    """Remove what a killed run was writing under another name; all of it is written anew."""
    if parallel.is_main():
        states = ("state/.partial-*", "state/.gone-*")
        for pattern in (*(f".{name}.*" for name in _WRITTEN), "samples/.*.png.*", *states):
            for left in out.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _trainer(config: Config, device: torch.device, source: Path | None) -> Trainer:
    """The trainer of run.method, from the model folder it starts with."""
    if config.run.method == "autoencode":
        return VAETrainer(config, device)
    if config.run.method == "denoise":
        return TeacherTrainer(config, device, _load("model.vae", source).vae if source else None)
    assert source is not None
    init = config.model.student_init
    student = None if init == "teacher" else _load("model.student_init", Path(init))
    cache = _cache(config, source)
    teacher = _load("model.teacher", source, texts=cache is None)
    trainer = Distiller(config, device, teacher, student, cache)
    for file in filter(None, (trainer.prompts, trainer.negatives)):
        for line in unread(file, teacher):
            _say(line)
    return trainer


def _cache(config: Config, source: Path) -> TextCache | None:
    """The recipe's cache of text embeddings, if it has one; ValueError if it is another's."""
    data = config.data
    if not data.cache:
        return None
    negatives = file_digest(data.negatives) if data.negatives else ""
    return TextCache(data.cache, source, file_digest(data.prompts), negatives)


def _load(key: str, folder: Path, texts: bool = True) -> Pipeline:
    """A model folder with all that its use needs, in fp32, in which runs keep their weights.

    texts: whether its text encoders are needed. The backbone is not read here: the trainer streams
    it to where its parts belong.
    """
    spec, _ = read_spec(folder)
    without = () if texts else [part for part in spec.parts() if part.startswith("text_encoder")]
    found = load(folder, dtype=torch.float32, without=without, defer=("backbone",))
    read = [*found.tokenizers, *(found.text_encoders if texts else ())]
    lacks = {
        "model.vae": {"vae": found.vae is None},
        "model.student_init": {"backbone": found.backbone is None},
        "model.teacher": {
            "backbone": found.backbone is None,
            "vae": found.vae is None,
            "text encoder or tokenizer": any(part is None for part in read),
        },
    }[key]
    missing = [name for name, lacking in lacks.items() if lacking]
    if missing:
        raise ValueError(f"{key}: {folder} has no {', no '.join(missing)}")
    return found


def fit(trainer: Trainer, config: Config, out: Path, observer: Observer, *, resume: bool) -> None:
    """The loop: step, log, look, save; stops on a signal, or on what is not finite."""
    steps, every = config.run.steps, config.evaluate.every
    first = _first_step(trainer, config, out, resume)
    with (
        parallel.SignalGuard() as guard,
        RunLog(
            out / "metrics.jsonl",
            steps,
            resumed=first,
            main=parallel.is_main(),
            tensorboard=out / "tensorboard" if config.run.tensorboard else None,
        ) as log,
        runstate.Saver(config.run.async_save) as saver,
    ):
        clock, pictures = time.monotonic(), 0
        for step in range(first, steps):
            row = parallel.numbers(trainer.step(step))
            done, pictures = step + 1, pictures + config.run.batch
            _check_finite([n for n, v in row.items() if not math.isfinite(v)], trainer, done)
            saver.check()
            stopping = guard.stop()
            # The last step is measured by observer.finish, on the model folder as it was written.
            looking = every > 0 and done % every == 0 and done < steps
            saving = done % config.run.save == 0 or done == steps or stopping
            saving = saving or _is_milestone(config, done)
            if looking or saving:  # the update of this step may have gone wrong after its loss
                _check_finite(runstate.not_finite(trainer.state()), trainer, done)
            if looking or done % config.run.log == 0 or done == steps:
                health = trainer.health
                row = parallel.mean({**row, **(health.sums() if health else {})})
                row = _with_health(health, row, log) if health else row
                row["images_per_s"] = pictures / (time.monotonic() - clock)
                if looking:
                    row |= observer.look(trainer.pipeline(), done)
                log.write(done, row)
                clock, pictures = time.monotonic(), 0
            if saving:
                _save(saver, trainer, config, out, done)
            if stopping:
                break
    if guard.stop():  # asked here, too: a signal may have come while the last state was written
        rest = "finishes with the report" if done == steps else "goes on from there"
        message = f"stopped after step {done} of {steps}; --resume --out {out} {rest}"
        raise errors.Stopped(message, guard.caught or signal.SIGTERM)


def _with_health(health: Health, row: dict[str, Any], log: RunLog) -> dict[str, Any]:
    """A row with its sums turned into figures; an alarm is said."""
    sums = {name: row.pop(name) for name in health.sums()}
    row |= health.figures(sums)
    if "warning" in row:
        log.say(f"warning: {row['warning']}")
    return row


def _check_finite(bad: list[str], trainer: Trainer, done: int) -> None:
    """Stop if a rank found a figure or a tensor not finite, naming what the step was made of.

    bad: the names that this rank found.
    """
    if not parallel.any_rank(bool(bad)):
        return
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    text = f"{', '.join(bad[:4])}{more} not finite: {trainer.describe(done - 1)}" if bad else ""
    raise ValueError(
        f"step {done}: {parallel.first_text(text)}; the run stops, what it saved before is whole"
    )


def _first_step(trainer: Trainer, config: Config, out: Path, resume: bool) -> int:
    """The step to start from: that of the newest run state with --resume, else 0."""
    _check_unused(out, resume)  # again: now nobody else can start one there
    step = 0
    if runstate.steps(out):
        before = recipes.load(out / "config.toml")
        changed = [d for d in recipes.differences(before, config) if not d.startswith(FREE)]
        if changed:
            raise ValueError(f"{out} was started with another recipe: {'; '.join(changed)}")
        step = runstate.load_latest(out, trainer.state())
        if trainer.health:
            files = runstate.attached(out, step)
            trainer.health.restore(files, parallel.rank(), parallel.world_size())
        noted = runstate.noted_config(out, step)
        if noted.startswith(_IDENTITY) and noted != _identity(config):
            raise ValueError(
                f"{out}: config.toml, data.negatives, data.cache or "
                f"the file of data.prompts is another than at step {step}: "
                "put it back, or start anew with another --out"
            )
        _say(f"{out}: resumed after step {step}")
    elif (out / "metrics.jsonl").exists():
        _say(f"{out}: stopped before its first run state, starting again")
        if parallel.is_main():
            (out / "metrics.jsonl").unlink()
    if parallel.is_main():
        write_atomically(out / "config.toml", recipes.to_toml(config).encode())
    return step


def _save(saver: runstate.Saver, trainer: Trainer, config: Config, out: Path, done: int) -> None:
    saver.save(
        out,
        done,
        trainer.state(),
        config=_identity(config),
        keep=config.run.keep,
        milestone=_is_milestone(config, done),
        files=trainer.health.files(parallel.rank()) if trainer.health else {},
    )


def _is_milestone(config: Config, done: int) -> bool:
    return config.run.milestones > 0 and done % config.run.milestones == 0


def _identity(config: Config) -> str:
    """What a run state notes of its recipe: all that decides the numbers of its steps."""
    data = config.data
    digests = "".join(file_digest(path) for path in (data.prompts, data.negatives) if path)
    if data.cache:
        digests += shards_digest(Path(data.cache), negatives=bool(data.negatives))
    return f"{_IDENTITY}{recipes.identity(config, FREE)}{digests}"


def _source(config: Config, out: Path, device: torch.device) -> Path | None:
    """The model folder a run starts from: its teacher (vsd) or its VAE (denoise).

    A folder is taken as it is. A name is that of a model shipped with the package, else of a recipe
    whose run lies beside `out`; if there is none yet, it is trained first.
    """
    name = {"vsd": config.model.teacher, "denoise": config.model.vae}.get(config.run.method, "")
    if not name:
        return None
    known = [*shipped(), *recipes.recipes()]
    if name not in known and "/" not in name and not Path(name).exists():
        near = recipes.nearest(name, known)
        raise ValueError(f"{name!r} is no model folder, no recipe and no shipped model{near}")
    if name in shipped() or name not in known:
        return shipped_or_path(name)
    folder = out.parent / name
    if folder.absolute() == out.absolute():
        raise ValueError(f"{out}: a run cannot start from itself; choose another --out")
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


def _plan(config: Config, out: Path, ranks: int | None) -> str:
    """What a run would do, without doing it: recipe, parameter counts, memory, steps."""
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks: expected at least 1, got {ranks}")
    lines = [recipes.to_toml(config), f"out: {out}"]
    if config.run.method != "vsd":
        spec = zoo.model(config.model.preset)
        for part in spec.parts():
            count = sum(p.numel() for p in zoo.build(spec, part).parameters())
            lines.append(f"{part}: {count:,} parameters")
    else:
        lines.append(f"teacher: {config.model.teacher}{_unmade(config.model.teacher)}")
        worlds = plan.worlds(config) if ranks is None else [ranks]
        lines.append(plan.describe(_teacher_spec(config, out), config, worlds))
    lines.append(_what(config))
    return "\n".join(lines)


def _teacher_spec(config: Config, out: Path) -> zoo.ModelSpec:
    """The sizes of a teacher that may not be there yet: of its folder, its recipe or its preset."""
    name = config.model.teacher
    trained = out.parent / name / "model"
    if name in shipped() or (Path(name) / SPEC_FILE).is_file():
        return read_spec(shipped_or_path(name))[0]
    if name in recipes.recipes():
        return read_spec(trained)[0] if trained.is_dir() else _preset_of(name)
    if name in zoo.PRESETS or _unmade(name):
        return zoo.model(Path(name).name)
    known = [*shipped(), *recipes.recipes(), *zoo.PRESETS]
    near = recipes.nearest(name, known)
    raise ValueError(f"{name!r} is no model folder, no recipe, no shipped model, no preset{near}")


def _unmade(teacher: str) -> str:
    """What to say of a model folder that is not there yet but has a preset's name; else ""."""
    path = Path(teacher)
    if "/" not in teacher or path.exists() or path.name not in zoo.PRESETS:
        return ""
    return f" (not there yet: taken to have the sizes of the preset {path.name})"


def _preset_of(recipe: str) -> zoo.ModelSpec:
    return zoo.model(recipes.load(recipe).model.preset)


def _what(config: Config) -> str:
    run, teacher = config.run, config.model.teacher
    whence = " (comes with the package)" if teacher in shipped() else ""
    verbs = {
        "vsd": f"distilling {teacher}{whence} into one step",
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
    parser = errors.Parser(
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
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, its memory, and stop"
    )
    parser.add_argument(
        "--ranks", type=int, help="with --dry-run: plan the memory for this number of ranks"
    )
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a process group may outlive an error, and those of gloo can abort an interpreter
    # that comes to a good end ("terminate called without an active exception"): leave at once.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    os._exit(code) if code or not alone else sys.exit(0)
