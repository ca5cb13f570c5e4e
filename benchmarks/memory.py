"""Memory of a rank: the plan of the Table 6 recipes, and how far it can be trusted.

python -m benchmarks.memory [--part plan|shards|measured|all] [--out FILE.md]

plan: peaks on 1 to 64 ranks as `snoopi.train --dry-run` plans them. shards: the bytes that FSDP2
gives the first of 8 and of 64 ranks of a process group that only pretends, against the plan's.
measured: small networks of the same architectures on real gloo ranks, their resident sets against
the plan for the same recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Column, Row, Table, number
from snoopi import config as recipes
from snoopi import errors, parallel, plan, zoo
from snoopi.config import Config
from snoopi.distiller import Distiller
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.dit import DiTConfig
from snoopi.models.t5 import T5Config
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig
from snoopi.pictures import write_atomically
from snoopi.pipeline import Pipeline, load
from snoopi.trainers import Optimizer, average_of
from snoopi.worlds.shapes import ShapesWorld
from snoopi.zoo import ModelSpec, TextSpec

NAME = "benchmarks.memory"
PARTS = ("plan", "shards", "measured")
# The recipes of SNOOPI's Table 6, SDXL's beside them, and their teachers.
RECIPES = {
    "pgsb_sd15": "sd15",
    "pgsb_sd21": "sd21",
    "pgsb_pixart": "pixart-512",
    "pgsb_pixart_t999": "pixart-512",
    "pgsb_sdxl": "sdxl",
}
WORLDS = plan.RANKS  # of "plan"
PRETENDED = (8, 64)
GLOO = (1, 2, 4)
STEPS = 2  # measured: the optimizers' moments are there from the first step's end


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 where FSDP2 and plan differ, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    common.check_file("--out", options.out)
    machine = common.machine([1])
    print("\n".join(common.machine_lines(machine)))
    pages = []
    for part in PARTS if options.part == "all" else (options.part,):
        table, rows = TABLES[part], []
        print(f"\n{table.title}\n{common.explain(table.columns)}\n")
        print(common.text_head(table.columns), flush=True)
        for row in WORK[part]():
            rows.append(row)
            print(common.text_row(table.columns, row), flush=True)
        head = {"command": f"python -m {NAME} --part {part}", "machine": machine}
        pages.append(
            common.markdown(table, {**head, "rows": rows, "summary": [], "notes": NOTES[part]})
        )
    if options.out is not None:
        write_atomically(options.out, "\n".join(pages).encode())
        print(f"wrote {options.out}")


# --- the plan -------------------------------------------------------------------------------------


def planned() -> Iterable[dict[str, Any]]:
    """A row for each recipe, with and without activation checkpointing."""
    for name, model in RECIPES.items():
        spec = zoo.model(model)
        for on in (True, False):
            words = [f"parallel.checkpointing={str(on).lower()}"]
            config = recipes.load(name, words)
            one_by_one = recipes.load(name, [*words, f"run.accumulate={config.run.batch}"])
            plans = {n: plan.plan(spec, config, n) for n in plan.worlds(config)}
            yield {
                "shape": name,
                "checkpointing": on,
                "batch": config.run.batch,
                "texts": plans[1].stays["text encoders"],
                "peaks": {n: p.peak for n, p in plans.items()},
                "one_by_one": plan.plan(spec, one_by_one, 1).peak,
            }


# --- FSDP2's shards -------------------------------------------------------------------------------


def sharded() -> Iterable[dict[str, Any]]:
    """A row for each recipe and pretended world; each in a process of its own.

    Raises:
        WrongResult: FSDP2 gives a rank other bytes than the plan says.
    """
    for name in RECIPES:
        for ranks in PRETENDED:
            found = _child({}, "_print_shards", name, ranks).communicate()[0]
            row = json.loads(found or "{}")
            if not row or row["found"] != row["planned"]:
                raise common.WrongResult(f"{name} on {ranks} ranks: planned and found {row}")
            yield row


def _print_shards(name: str, ranks: str) -> None:
    """In a process: bytes of the first of `ranks` ranks, none of which but this one is there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(ranks))
    parallel.check_equal = lambda what, value: None  # there is nobody to be equal to
    config, spec = recipes.load(name, ["ema.decay=0.9999"]), zoo.model(RECIPES[name])
    stays = plan.what_stays(spec, config, int(ranks))
    student, pair = plan.networks(spec, config)
    for net in (student, pair):
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        parallel.shard(
            net,
            net.blocks(),
            dtype=config.run.dtype,
            read=lambda key, rows, shapes=shapes: torch.zeros(()).expand(shapes[key])[rows],  # type: ignore[misc]
        )
    found = {"student": _bytes(student.parameters()), "teacher pair": _bytes(pair.parameters())}
    moments = 0
    for net in (student, pair):
        optimizer = Optimizer(config.optim.student, 1, net=net)
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.adamw.step()
        states = optimizer.adamw.state.values()
        moments += _bytes(v for state in states for key, v in state.items() if key != "step")
    found["optimizer moments"] = moments
    found["moving average"] = _bytes(average_of(student, config).average.values())
    print(
        json.dumps(
            {
                "shape": name,
                "ranks": int(ranks),
                "found": found,
                "planned": {k: stays[k] for k in found},
            }
        )
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of this rank's rows."""
    return sum(parallel.local_rows(tensor.detach())[0].nbytes for tensor in tensors)


# --- resident sets --------------------------------------------------------------------------------


def small(kind: str) -> ModelSpec:
    """SD1.5's architecture at a quarter of its widths ("unet"), or a small PixArt ("dit").

    On latents of 16 pixels, with the words of the world, and text encoders and a VAE that hardly
    count.
    """
    vae = VAEConfig(channels=(32, 32, 32, 32), resnets=1, norm_groups=8)
    net: UNetConfig | DiTConfig
    text: CLIPTextConfig | T5Config
    if kind == "unet":
        net = UNetConfig(channels=(80, 160, 320, 320), norm_groups=16, text_width=192)
        text = CLIPTextConfig(width=192, mlp_width=768, layers=2, heads=4)
    else:
        net = DiTConfig(layers=14, heads=8, text_width=256, sample_size=16)
        text = T5Config(width=256, mlp_width=512, layers=2, heads=4)
    spec = zoo.model({"unet": "sd15", "dit": "pixart-512"}[kind])
    made = dataclasses.replace(spec, backbone=net, vae=vae, text=(TextSpec(text),), latent_size=16)
    return _worded(made)


def recipe(checkpointing: bool) -> Config:
    """Table 6's, in fp32 and as far as memory goes: its adapters, an average, 4 pictures."""
    words = ["run.batch=4", "run.steps=10", "ema.decay=0.9999", "lora.rank=64", "lora.gamma=128"]
    words += [
        'lora.targets=["to_q", "to_v"]',
        f"parallel.checkpointing={str(checkpointing).lower()}",
    ]
    return recipes.load("debug", words)


def measured() -> Iterable[dict[str, Any]]:
    """A row for each network, world and way of checkpointing.

    Raises:
        WrongResult: a rank ended with an error, which it has printed.
    """
    for kind in ("unet", "dit"):
        with tempfile.TemporaryDirectory() as folder:
            spec = small(kind)
            _pipeline(spec).save(Path(folder) / "m")
            for on in (True, False):
                for ranks in GLOO:
                    peak = plan.plan(spec, recipe(on), ranks).peak
                    found = _resident(Path(folder) / "m", on, ranks)
                    row = {"shape": kind, "checkpointing": on, "ranks": ranks, "planned": peak}
                    yield row | {key: max(each[key] for each in found) for key in found[0]}


def _resident(folder: Path, checkpointing: bool, ranks: int) -> list[dict[str, int]]:
    """What each of some gloo ranks has measured."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        world |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        # Freed memory goes back at once, or the peak is of what malloc keeps.
        world |= {"MALLOC_TRIM_THRESHOLD_": "0", "PYTHONWARNINGS": "ignore"}
        processes.append(_child(world, "_print_resident", folder, int(checkpointing)))
    try:
        found = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # which does nothing to one that has ended
    if any(process.returncode for process in processes):
        raise common.WrongResult(f"a rank of {ranks} failed")
    return [json.loads(text) for text in found]


def _print_resident(folder: str, checkpointing: str) -> None:
    """In a process: bytes above its imports of a rank of a distillation at its peak.

    libraries: what a distillation of a few megabytes leaves behind; code is read at its first use.
    """
    start = resident(reset=True)
    with parallel.session("cpu") as device:
        config = recipe(checkpointing == "1")
        _distil(config, device, _pipeline(_worded(zoo.model("debug"))))
        gc.collect()
        libraries = resident(reset=True) - start
        _distil(config, device, load(folder, dtype=torch.float32, defer=("backbone",)))
        print(json.dumps({"measured": resident() - start, "libraries": libraries}))


def _distil(config: Config, device: torch.device, teacher: Pipeline) -> None:
    trainer = Distiller(config, device, teacher)
    for step in range(STEPS):
        trainer.step(step)


def _pipeline(spec: ModelSpec) -> Pipeline:
    """Random weights that read the world's words."""
    backbone, vae, text = (zoo.fresh(spec, part, 0).eval() for part in spec.parts())
    return Pipeline(spec, backbone, vae, [text], [ShapesWorld().tokenizer()])


def _worded(spec: ModelSpec) -> ModelSpec:
    """The same model for the words of the world."""
    tokenizer, text = ShapesWorld().tokenizer(), spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    return dataclasses.replace(spec, text=(dataclasses.replace(text, config=words, pad_id=0),))


def resident(reset: bool = False) -> int:
    """Bytes: the resident set now (reset), or its peak since."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    key = "VmRSS:" if reset else "VmHWM:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _child(world: dict[str, str], function: str, *words: object) -> subprocess.Popen[str]:
    """A process that calls one of this module's functions, and prints JSON."""
    code = f"from benchmarks import memory; memory.{function}(*{tuple(map(str, words))!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **world},
        stdout=subprocess.PIPE,
        text=True,
    )


# --- tables ---------------------------------------------------------------------------------------


def _gib(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / plan.GIB:.2f}"


def _peak(ranks: int) -> Callable[[Row], str]:
    return lambda row: f"{row['peaks'][ranks] / plan.GIB:.2f}" if ranks in row["peaks"] else "-"


def _found(part: str) -> Callable[[Row], str]:
    return lambda row: f"{row['found'][part]:,}"


def _ratio(row: Row) -> str:
    return f"{(row['measured'] - row['libraries']) / row['planned']:.3f}"


def _yes(row: Row) -> str:
    return "yes" if row["checkpointing"] else "no"


_CHECKPOINTING = Column("ckpt", "parallel.checkpointing", _yes, 4)
_NAME = Column("recipe", "", lambda row: row["shape"], 16)
TABLES = {
    "plan": Table(
        "Planned memory of a rank",
        (
            _NAME,
            _CHECKPOINTING,
            Column("batch", "pictures of a step, over all ranks", number("batch", "d"), 5),
            *(Column(str(n), f"GiB at the peak of a rank of {n}", _peak(n), 7) for n in WORLDS),
            Column(
                "1 by 1",
                "GiB of 1 rank at one picture at once (run.accumulate)",
                _gib("one_by_one"),
                7,
            ),
            Column(
                "texts", "GiB of these are text encoders; data.cache spares them", _gib("texts"), 6
            ),
        ),
        (),
    ),
    "shards": Table(
        "What FSDP2 gives the first rank, which is what the plan says",
        (
            _NAME,
            Column("ranks", "of a process group that pretends", number("ranks", "d"), 5),
            Column("student", "bytes of its rows", _found("student"), 14),
            Column("pair", "bytes of the teacher pair's", _found("teacher pair"), 14),
            Column("moments", "bytes of both optimizers'", _found("optimizer moments"), 14),
            Column(
                "average", "bytes of the moving average's, in fp32", _found("moving average"), 14
            ),
        ),
        (),
    ),
    "measured": Table(
        "Resident sets of gloo ranks",
        (
            Column("network", "", lambda row: row["shape"], 7),
            _CHECKPOINTING,
            Column("ranks", "real ones, on this machine", number("ranks", "d"), 5),
            Column("planned", "GiB", _gib("planned"), 7),
            Column(
                "measured", "GiB of the largest rank's peak above its imports", _gib("measured"), 8
            ),
            Column("of it code", "GiB that a tiny run leaves behind", _gib("libraries"), 10),
            Column("ratio", "measured without that over planned", _ratio, 5),
        ),
        (),
    ),
}
WORK = {"plan": planned, "shards": sharded, "measured": measured}
NOTES = {
    "plan": [
        "a dash: the ranks do not divide the batch",
        "a rank has batch / ranks pictures at once",
        "the CLIP loss is counted, and the average where the recipe has one (SDXL's has none)",
    ],
    "shards": [
        "weights are zeros, of the recipes' sizes and with adapters; SDXL has an average here, too",
    ],
    "measured": [
        "unet: SD1.5 at a quarter of its widths; dit: PixArt's of 14 blocks and 8 heads; both on "
        "latents of 16 pixels, fp32, 4 pictures over all ranks, adapters of rank 64, an average",
        f"the peak of {STEPS} steps with MALLOC_TRIM_THRESHOLD_=0, one thread",
    ],
}


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="Memory of a rank: the plan of the Table 6 recipes, and what is really taken.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to do")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
