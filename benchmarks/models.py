"""Whole models for model_forward and generate: folders of random weights, the processes of the
sides (benchmarks.sides), and the rule by which their results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, sides
from benchmarks.common import Span, WrongResult
from benchmarks.sides import Setup
from snoopi import zoo
from snoopi.folders import read_spec
from snoopi.models.t5 import T5Config
from snoopi.models.vae import TAESDConfig
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ModelSpec, text_part
from weights_convert.export import export

# The one-step model that stands for an architecture: one call, x0 from the prediction of noise.
ONE_STEP = {
    "sd15": "dmd2-sd15",
    "sd21": "sbv2",
    "pixart-512": "dmd-pixart",
    "sdxl": "dmd2-sdxl-1step",
}
# Relative errors of a whole network. Below FLOORS a side is right whatever diffusers' own error is;
# above CEILINGS diffusers itself computes something else.
FLOORS = {"fp32": 2e-5, "bf16": 1e-3}
CEILINGS = {"fp32": 1e-3, "bf16": 0.1}
ERROR_FACTOR = 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands on whole models, beside `common.add_options`."""
    add = parser.add_argument
    parser.set_defaults(dtype="bf16")
    add("--models", default="sd21", metavar="NAME[,...]", help=f"of {', '.join(ONE_STEP)}")
    add("--batch", default="1", metavar="B[,...]", help="pictures of a call")
    add("--size", type=int, default=512, metavar="PIXELS", help="a side of the picture")
    add("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    add(
        "--compile",
        nargs="?",
        choices=("unet", "all"),
        const="unet",
        default="",
        help="time diffusers under torch.compile too: its backbone (a minute or two), or the VAE "
        "as well",
    )
    add("--keep", type=Path, metavar="FOLDER", help="leave the models there, or find them there")


def spec(name: str) -> ModelSpec:
    """The one-step model of a name."""
    return zoo.model(ONE_STEP[name])


def names(option: str) -> list[str]:
    """--models as names; ValueError for an unknown one."""
    found = option.split(",")
    if unknown := [name for name in found if name not in ONE_STEP]:
        known = ", ".join(ONE_STEP)
        raise ValueError(f"--models must be of {known}, got {', '.join(map(repr, unknown))}")
    return found


def batches(option: str) -> list[int]:
    """--batch as numbers of at least 1."""
    words = option.split(",")
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise ValueError(f"--batch must be numbers of at least 1, such as 1,4, got {option!r}")
    return list(map(int, words))


def check_options(options: argparse.Namespace) -> list[int]:
    """Refuse what cannot be measured, before the minutes of it; returns the numbers of threads."""
    threads = common.thread_counts(options.threads or str(common.num_cores()))
    names(options.models)
    batches(options.batch)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if options.size < 64 or options.size % 64:
        raise ValueError(f"--size must be a multiple of 64 pixels, got {options.size}")
    common.check_file("--json", options.json)
    common.check_folder("--keep", options.keep)
    for name in ("diffusers", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the other side needs {name}: see requirements/parity.txt")
    return threads


# --- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(keep: Path | None, model: str, dtype: str) -> Iterator[Path]:
    """Where a model is written: in --keep, or in a folder that goes when the body is done."""
    if keep is not None:
        yield keep / f"{model}-{dtype}"
        return
    with tempfile.TemporaryDirectory(prefix="snoopi-benchmark-") as made:
        yield Path(made)


def write(folder: Path, model: ModelSpec, dtype: str, tiny: bool) -> None:
    """Random weights of a model as `snoopi` and `diffusers` folders, and a small VAE as `tiny`.

    What is there already is kept. A T5 encoder is left out: its prompts count as cached.

    Raises:
        ValueError: what is there is another model.
    """
    assert model.schedule.prediction == "eps", "what benchmarks.sides computes x0 from"
    ours, kind = folder / "snoopi", common.DTYPES[dtype]
    if ours.is_dir() and read_spec(ours)[0] != model:
        raise ValueError(f"{ours} is another model than {model.arch}: choose another --keep")
    if not ours.is_dir():
        texts = [_random(model, text_part(i), kind) for i in range(len(model.text))]
        tokenizers = [
            None if net is None else Tokenizer.clip(text.pad_id)
            for net, text in zip(texts, model.text, strict=True)
        ]
        backbone, vae = (_random(model, part, kind) for part in ("backbone", "vae"))
        Pipeline(model, backbone, vae, texts, tokenizers).save(ours)
        del backbone, vae, texts
    if not (folder / "diffusers").is_dir():
        export(ours, folder / "diffusers", "diffusers")
    if tiny and not (folder / "tiny").is_dir():
        small = replace(model, vae=TAESDConfig())
        Pipeline(small, None, _random(small, "vae", kind)).save(folder / "tiny")


def _random(model: ModelSpec, part: str, dtype: torch.dtype) -> nn.Module | None:
    """A network with random weights; None for a T5 encoder.

    Matrices keep the size of what they act on, norms are near one, no bias is zero. The numbers are
    slices of one block, for drawing a billion of them would take a minute.
    """
    if isinstance(model.parts()[part], T5Config):
        return None
    net = zoo.build(model, part).to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    block = torch.randn(2**25, generator=torch.Generator().manual_seed(0))
    half, start = len(block) // 2, 0
    for name, p in net.named_parameters():
        start = (start + 7_919_317) % half
        values = block[start : start + min(p.numel(), half)]
        values = values.repeat(-(-p.numel() // half))[: p.numel()].view(p.shape)
        if "embedding.weight" in name:
            p.copy_(values)
        elif p.dim() > 1:
            p.copy_(values * p[0].numel() ** -0.5)
        else:
            p.copy_(0.1 * values + (1.0 if name.endswith("weight") else 0.0))
    return net


def setup(
    folder: Path, model: ModelSpec, dtype: str, threads: int, *names: str, **more: Any
) -> Setup:
    """What a process of these sides is told."""
    recipe, text = model.one_step, model.text[0].config
    assert recipe is not None and not recipe.sampler and recipe.steps == 1
    stored = text.width if isinstance(text, T5Config) else 0
    how = (str(folder), dtype, threads, stored, recipe.t, recipe.abar)
    return Setup(*how, sides=names, **more)


def fits_in_fp32(folder: Path, dtype: str) -> bool:
    """Whether memory has room for a model in fp32 and its activations (Linux; else True)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    (free,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    size = sum(path.stat().st_size for path in (folder / "snoopi").glob("*.safetensors"))
    return free > 1.1 * size * 4 / common.DTYPES[dtype].itemsize + 2 * 2**30


# --- processes ------------------------------------------------------------------------------------


class Worker:
    """A host of sides in a process of its own."""

    def __init__(self, given: Setup) -> None:
        self.given = given
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, given), daemon=True)
        self._process.start()
        end.close()
        self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of its host returns.

        Raises:
            WrongResult: the process died, or the method failed.
        """
        with contextlib.suppress(ConnectionError):  # the answer tells
            self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            fine, found = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            found = f"died with status {self._process.exitcode}"
            fine = False
        if not fine:
            raise WrongResult(f"the process of {', '.join(self.given.sides)}: {found}")
        return found

    def span(self, side: str, part: str) -> Span:
        """The time of a call as its process measures it."""
        return Span(*self.ask("span", side, part))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def host(given: Setup) -> sides.Host:
    """The host of a setup's sides."""
    return (sides.Ours if given.sides[0] in sides.OURS else sides.Theirs)(given)


def _serve(pipe: Any, given: Setup) -> None:
    """Answer until the other end is closed."""

    def answer(work: Any) -> Any:
        try:
            found = (True, work())
        except Exception as error:  # the parent says it
            found = (False, f"{type(error).__name__}: {error}")
        pipe.send((found[0], None if isinstance(found[1], sides.Host) else found[1]))
        return found[1]

    made = answer(lambda: host(given))
    if not isinstance(made, sides.Host):
        return
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            method, arguments = pipe.recv()
            answer(lambda: getattr(made, method)(*arguments))  # noqa: B023


@contextlib.contextmanager
def workers(setups: Sequence[Setup]) -> Iterator[dict[str, Worker]]:
    """The worker of each side by its name, while the body runs."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Worker] = {}
        for given in setups:
            worker = Worker(given)
            stack.callback(worker.close)
            found |= dict.fromkeys(given.sides, worker)
        yield found


# --- what is given and what comes out -------------------------------------------------------------


def inputs(model: ModelSpec, batch: int, pixels: int) -> dict[str, Any]:
    """Inputs of one call of every part, see `sides.Host.give`; row i is the same in any batch."""
    noise, rows, side = Noise(0), range(batch), pixels // model.vae.factor

    def draw(name: str, count: Sequence[int], *shape: int) -> Any:
        return noise.normal(name, 0, count, shape).numpy()

    latent, config = (model.latent_channels, side, side), model.backbone
    stored = isinstance(model.text[0].config, T5Config)
    n = sides.STORED_TOKENS if stored else model.text[0].config.length
    ids = config.size_ids(pixels, pixels)
    pooled = getattr(config, "pooled_width", None)
    return {
        "x": draw("x", rows, *latent),
        "z": draw("z", rows, *latent),
        "tokens": draw("tokens", rows, n, config.text_width),
        "negative": draw("negative", [0], n, config.text_width),
        "mask": sides.stored_mask(batch).numpy() if stored else None,
        "pooled": None if pooled is None else draw("pooled", rows, pooled),
        "size_ids": None if ids is None else torch.tensor([ids] * batch).numpy(),
        "prompts": [f"a red cat in the snow, {row}" for row in rows],
    }


def error(got: Any, exact: Any) -> float:
    """`common.error` of arrays."""
    return common.error(torch.from_numpy(got), _double(exact))


def _double(x: Any) -> Tensor:
    return torch.from_numpy(x).double()


def check(what: str, dtype: str, got: Mapping[str, Any], exact: Any) -> dict[str, float]:
    """The error of each side's result: at most ERROR_FACTOR times diffusers' own, or the floor.

    exact: diffusers' result in fp32 of the first rows, or None where that does not fit or is no
    better: then the others are held to diffusers' result itself.

    Raises:
        WrongResult: naming the side.
    """
    first = got["diffusers"]
    if exact is None:
        found = {side: error(result, first) for side, result in got.items()}
        bound = _loose(dtype)
        against = "diffusers'"
    else:
        rows = len(exact)
        found = {side: error(result[:rows], exact) for side, result in got.items()}
        if not found["diffusers"] <= CEILINGS[dtype]:
            raise WrongResult(
                f"{what}, diffusers: error {found['diffusers']:.3g} against its own in fp32, at "
                f"most {CEILINGS[dtype]:.3g} is allowed; nothing was timed"
            )
        bound = max(ERROR_FACTOR * found["diffusers"], FLOORS[dtype])
        against = f"fp32 (diffusers' own is {found['diffusers']:.3g})"
    for side, value in found.items():
        if not value <= bound:
            raise WrongResult(
                f"{what}, {side}: error {value:.3g} against {against}, at most {bound:.3g} is "
                "allowed; nothing was timed"
            )
    if exact is not None:
        # The rows that fp32 does not have: two results at these errors are so far apart at most.
        for side, result in got.items():
            apart = error(result, first)
            if not apart <= bound + found["diffusers"]:
                raise WrongResult(
                    f"{what}, {side}: {apart:.3g} from diffusers' in all rows; nothing was timed"
                )
    return found


def check_negative(
    what: str, dtype: str, got: Mapping[str, Any], plain: Any, rounding: float | None
) -> dict[str, float]:
    """With a negative, where diffusers has nothing to compare with: both of ours agree up to
    rounding, and the negative matters more than that.

    plain: the result without the negative. rounding: the error of diffusers' own result without it
    against fp32; None where it is not known. Returns the distance of each side from `none`.

    Raises:
        WrongResult: naming what is wrong.
    """
    bound = _loose(dtype)
    if rounding is not None:  # two results at these errors are so far apart at most
        bound = max((1 + ERROR_FACTOR) * rounding, FLOORS[dtype])
    found = {side: error(result, got["none"]) for side, result in got.items()}
    for side, value in found.items():
        if not value <= bound:
            raise WrongResult(
                f"{what}, {side}: {value:.3g} from the unoptimized result, at most {bound:.3g} is "
                "allowed; nothing was timed"
            )
    moved = error(got["none"], plain)
    if not (2 * max(found.values()) < moved < math.inf):
        raise WrongResult(f"{what}: the negative changes the result by {moved:.3g} only")
    return found


def unjudged(rows: Sequence[common.Row]) -> list[str]:
    """A note on rows in bf16 that no result in fp32 could be had for."""
    count = sum(row["dtype"] == "bf16" and row["error_against"] == "diffusers" for row in rows)
    if not count:
        return []
    return [
        f"{count} rows: memory had no room for diffusers in fp32, so that their error is the "
        "distance from diffusers' result"
    ]


def _loose(dtype: str) -> float:
    """How far two results may be apart where no better one is known."""
    return FLOORS[dtype] if dtype == "fp32" else CEILINGS[dtype]
