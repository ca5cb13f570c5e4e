"""One prompt, one picture: a whole one-step model against diffusers on the same weights.

python -m benchmarks.generate [--models sd21,sd15,pixart-512,sdxl] [--dtype fp32|bf16|both]
                              [--batch 1,4] [--size PIXELS] [--rounds N] [--cold N] [--vae tiny]
                              [--compile [unet|all]] [--threads N,...] [--keep FOLDER] [--json FILE]

Full size, random weights, 512 x 512: tokens, text encoder, backbone, VAE, picture in 8 bits, with
and without a negative under NASA. Then fresh processes: imports, loading, first picture as a PNG,
peak memory. Every side runs in a process of its own and they take turns; the pictures are compared
before anything is timed. Needs diffusers and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common, models, sides
from benchmarks.common import Column, Row, Span, Table, WrongResult, number
from benchmarks.models import Worker
from snoopi import errors
from snoopi.noise import Noise
from snoopi.zoo import ModelSpec

NAME = "benchmarks.generate"
ROOT = Path(__file__).parents[1]
STAGES = ("text", "backbone", "vae")
POLL = 0.02  # seconds between two looks at a fresh process's memory
IMPORT_ROUNDS = 3
# After `import torch`: seconds until each name is there.
IMPORTS = {
    "import snoopi": "import snoopi",
    "snoopi.load": "import snoopi; snoopi.load",
    "a pipeline of diffusers": "from benchmarks import sides; from pathlib import Path; "
    "sides.packages(Path({folder!r}))",
}
Rows = list[dict[str, Any]]


class Case(NamedTuple):
    """What is drawn: a model's pictures in one format."""

    model: str
    dtype: str
    threads: int
    batches: Sequence[int]
    pixels: int
    rounds: int
    cold: int
    tiny: bool
    compiled: str

    @property
    def sides(self) -> tuple[str, ...]:
        """Those that take part."""
        return (*sides.OURS, *(s for s in sides.THEIRS if s != "compiled" or self.compiled))


class Drawing(NamedTuple):
    """What one row is about."""

    side: str
    negative: bool = False
    vae: str = "full"


def measure(case: Case, folder: Path) -> tuple[Rows, Rows]:
    """Rows of warm drawings, and rows of fresh processes.

    Raises:
        WrongResult: a side draws something else, or its process died.
    """
    spec = models.spec(case.model)
    models.write(folder, spec, case.dtype, case.tiny)
    exact = _exact(case, spec, folder)

    def setup(*names: str) -> sides.Setup:
        more = {"tiny": case.tiny, "compiled": case.compiled}
        return models.setup(folder, spec, case.dtype, case.threads, *names, **more)

    theirs = case.sides[len(sides.OURS) :]
    rows: Rows = []
    with models.workers([*map(setup, sides.OURS), setup(*theirs)]) as workers:
        for batch in case.batches:
            rows += _drawn(case, spec, batch, workers, exact)
    return rows, _fresh(case, spec, folder) if case.cold else []


def _vaes(case: Case) -> list[str]:
    return ["full", "tiny"] if case.tiny else ["full"]


def _exact(case: Case, spec: ModelSpec, folder: Path) -> Mapping[str, Any]:
    """diffusers' picture in fp32 by VAE; none for fp32 itself, or if memory lacks the room."""
    if case.dtype == "fp32" or not models.fits_in_fp32(folder, case.dtype):
        return {}
    how = models.setup(folder, spec, "fp32", case.threads, "diffusers", tiny=case.tiny)
    with models.workers([how]) as workers:
        given = _given(case, spec, 1)
        worker = workers["diffusers"]
        return {v: worker.ask("picture", "diffusers", *given, None, v) for v in _vaes(case)}


def _given(case: Case, spec: ModelSpec, batch: int) -> tuple[list[str], Any]:
    """Prompts and noise [b c h w] that the pictures are compared at; row i at any batch."""
    side = case.pixels // spec.vae.factor
    z = Noise(0).normal("z", 0, range(batch), (spec.latent_channels, side, side))
    return [f"a blue dog in the grass, {row}" for row in range(batch)], z.numpy()


# --- warm pipelines -------------------------------------------------------------------------------


def _drawn(
    case: Case,
    spec: ModelSpec,
    batch: int,
    workers: Mapping[str, Worker],
    exact: Mapping[str, Any],
) -> Rows:
    """The rows of a batch size, printed: compared (which warms them up), then drawn in turns."""
    away = _check(case, spec, batch, workers, exact)
    against = "fp32" if exact else "diffusers"
    drawings = [Drawing(side, False, vae) for vae in _vaes(case) for side in case.sides]
    drawings += [Drawing(side, True) for side in sides.OURS]
    taken: dict[Drawing, list[dict[str, float]]] = {drawing: [] for drawing in drawings}

    def draw(drawing: Drawing) -> Span:
        side, negative, vae = drawing
        found = workers[side].ask("draw", side, batch, case.pixels, negative, vae)
        taken[drawing].append(found)
        return Span(found["total"], found["processor"])

    runs: dict[str, list[Callable[[], object]]] = {
        str(i): [lambda drawing=drawing: draw(drawing)]  # type: ignore[misc]
        for i, drawing in enumerate(drawings)
    }
    found = common.interleave(runs, case.rounds, warmup=0)
    times = {drawing: found[str(i)][0] for i, drawing in enumerate(drawings)}
    rows = []
    for drawing in drawings:
        stages = {
            stage: 1e3 * statistics.median(one[stage] for one in taken[drawing]) for stage in STAGES
        }
        rest = [one["total"] - sum(one[stage] for stage in STAGES) for one in taken[drawing]]
        ratios = {
            side: [
                a / b
                for a, b in zip(
                    times[Drawing(side, False, drawing.vae)].seconds,
                    times[drawing].seconds,
                    strict=True,
                )
            ]
            for side in case.sides[len(sides.OURS) :]
        }
        row = {
            "model": case.model,
            **drawing._asdict(),
            "dtype": case.dtype,
            "threads": case.threads,
            "batch": batch,
            "pixels": case.pixels,
            "ms": {**stages, "rest": 1e3 * statistics.median(rest), "total": times[drawing].ms},
            "quartiles_ms": times[drawing].quartiles_ms,
            "speedup": {side: statistics.median(one) for side, one in ratios.items()},
            "speedup_quartiles": {side: common.quartiles(one) for side, one in ratios.items()},
            "error": away[drawing],
            "error_against": against if not drawing.negative else "none",
            "cores": {drawing.side: times[drawing].cores},
        }
        print(common.text_row(TABLE.columns, row), flush=True)
        rows.append(row)
    return rows


def _check(
    case: Case,
    spec: ModelSpec,
    batch: int,
    workers: Mapping[str, Worker],
    exact: Mapping[str, Any],
) -> dict[Drawing, float]:
    """The error of each drawing by the rules of `benchmarks.models`."""
    prompts, z = _given(case, spec, batch)
    away: dict[Drawing, float] = {}
    for vae in _vaes(case):
        what = f"{case.model} {case.dtype}, the picture, batch {batch}, {vae} VAE"
        got = {s: workers[s].ask("picture", s, prompts, z, None, vae) for s in case.sides}
        found = models.check(what, case.dtype, got, exact.get(vae))
        away |= {Drawing(side, False, vae): value for side, value in found.items()}
        if vae == "full":
            plain = got["none"]
            rounding = found["diffusers"] if exact else None
    ours = {s: workers[s].ask("picture", s, prompts, z, sides.NEGATIVE, "full") for s in sides.OURS}
    what = f"{case.model} {case.dtype}, the picture with NASA, batch {batch}"
    found = models.check_negative(what, case.dtype, ours, plain, rounding)
    return away | {Drawing(side, True): value for side, value in found.items()}


# --- fresh processes ------------------------------------------------------------------------------


def _fresh(case: Case, spec: ModelSpec, folder: Path) -> Rows:
    """A row a side, printed: fresh processes in turns, the files in the system's cache."""
    names = [side for side in case.sides if side != "compiled"]
    taken: dict[str, Rows] = {side: [] for side in names}

    def start(side: str) -> Span:
        setup = models.setup(folder, spec, case.dtype, case.threads, side)
        taken[side].append(first_picture(setup, case.pixels, folder / "first.png"))
        return Span(taken[side][-1]["first_s"], 0.0)

    runs: dict[str, list[Callable[[], object]]] = {
        side: [lambda side=side: start(side)]  # type: ignore[misc]
        for side in names
    }
    common.interleave(runs, case.cold, warmup=0)
    middle = {
        side: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for side, found in taken.items()
    }
    rows = []
    for side in names:
        ratios = {
            key: {
                other: statistics.median(
                    b[key] / a[key] for a, b in zip(taken[other], taken[side], strict=True)
                )
                for other in names
                if other in sides.THEIRS
            }
            for key in ("first_s", "load_s", "peak", "anonymous")
        }
        rows.append(
            {
                "model": case.model,
                "dtype": case.dtype,
                "threads": case.threads,
                "pixels": case.pixels,
                "side": side,
                **{key: middle[side][key] for key in middle[side] if key.endswith("_s")},
                "first_quartiles_s": common.quartiles([one["first_s"] for one in taken[side]]),
                "peak_mib": middle[side]["peak"] / 2**20,
                "anonymous_mib": middle[side]["anonymous"] / 2**20,
                "over": ratios,
            }
        )
    return rows


def first_picture(setup: sides.Setup, pixels: int, out: Path) -> dict[str, float]:
    """A fresh process up to its first picture: seconds of its parts, and bytes above its imports.

    peak: of the resident set, with the files mapped into it; anonymous: of the part that belongs
    to no file.

    Raises:
        WrongResult: the process failed.
    """
    given = {"setup": setup._asdict(), "pixels": pixels, "out": str(out)}
    start, anonymous = time.monotonic(), 0
    words = [sys.executable, "-m", "benchmarks.sides", json.dumps(given)]
    with subprocess.Popen(
        words, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        while True:
            try:
                said, trouble = process.communicate(timeout=POLL)
                break
            except subprocess.TimeoutExpired:
                anonymous = max(anonymous, sides.memory(process.pid).get("RssAnon", 0))
    if process.returncode:
        last = (trouble.strip().splitlines() or ["it said nothing"])[-1]
        raise WrongResult(f"a fresh process of {setup.sides[0]} failed: {last}")
    found = json.loads(said.strip().splitlines()[-1])
    moments = [start, *(found[key] for key in ("imported", "loaded", "drawn", "saved"))]
    names = ("import_s", "load_s", "draw_s", "save_s")
    parts = {n: b - a for n, a, b in zip(names, moments, moments[1:], strict=False)}
    return {
        **parts,
        "first_s": moments[-1] - start,
        "peak": found["peak"] - found["base"]["VmRSS"],
        "anonymous": anonymous - found["base"]["RssAnon"],
    }


def _environment() -> dict[str, str]:
    """A user's: compiled modules are kept, and the package is that of this repository."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def imports(folder: Path) -> dict[str, float]:
    """Seconds of IMPORTS over `import torch`, each in fresh processes; medians."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}

    def once(name: str) -> None:
        body = IMPORTS[name].format(folder=str(folder / "diffusers"))
        script = f"import time, torch; a = time.perf_counter(); {body}"
        words = [sys.executable, "-c", f"{script}; print(time.perf_counter() - a)"]
        done = subprocess.run(
            words, cwd=ROOT, env=_environment(), check=True, capture_output=True, text=True
        )
        taken[name].append(float(done.stdout.split()[-1]))

    runs: dict[str, list[Callable[[], object]]] = {
        name: [lambda name=name: once(name)]  # type: ignore[misc]
        for name in IMPORTS
    }
    common.interleave(runs, IMPORT_ROUNDS, warmup=1)
    return {name: statistics.median(found[1:]) for name, found in taken.items()}


# --- the command ----------------------------------------------------------------------------------


def _of(outer: str, inner: str, form: str = ".2f") -> Callable[[Row], str]:
    """A cell: row[outer][inner], a dash where there is none."""
    return lambda row: number(inner, form)(row[outer])


def _what(row: Row) -> str:
    """A cell: the side and what it draws with."""
    return row["side"] + (" + NASA" if row["negative"] else "")


def _over(key: str, side: str) -> Callable[[Row], str]:
    """A cell: a fresh process's figure over a baseline's."""
    return lambda row: number(side)(row["over"][key])


TABLE = Table(
    f"A picture from a prompt against diffusers: `{NAME}`",
    (
        Column("side", "", _what, 13),
        Column("model", "", lambda row: row["model"], 10),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("batch", "pictures of a call", number("batch", "d"), 5),
        Column("VAE", "tiny: TAESD, another picture", lambda row: row["vae"], 4),
        Column("text", "ms of the text encoders", _of("ms", "text", ".0f"), 6),
        Column("backbone", "ms", _of("ms", "backbone", ".0f"), 8),
        Column("decode", "ms of the VAE", _of("ms", "vae", ".0f"), 6),
        Column("rest", "ms: tokens, noise, K/V of a negative, 8 bits", _of("ms", "rest", ".0f"), 5),
        Column("total", "ms", _of("ms", "total", ".0f"), 6),
        Column("/diff", "diffusers' total over this one's", _of("speedup", "diffusers"), 5),
        Column(
            "/best",
            "the same of diffusers in channels_last under inference_mode",
            _of("speedup", "channels_last"),
            5,
        ),
        Column("/comp", "the same of compiled diffusers", _of("speedup", "compiled"), 5),
        Column(
            "error",
            "from diffusers' picture in fp32 (fp32: from diffusers'; NASA: from none's)",
            number("error", ".1e"),
            7,
        ),
        Column("cores", "in use", common.cores, 5),
    ),
    (
        Column("fresh process", "", lambda row: row["side"], 13),
        Column("model", "", lambda row: f"{row['model']} {row['dtype']}", 15),
        Column("import s", "", number("import_s"), 8),
        Column("load s", "", number("load_s"), 6),
        Column("draw s", "", number("draw_s"), 6),
        Column("first picture s", "", number("first_s"), 15),
        Column("of diff", "", _over("first_s", "diffusers"), 7),
        Column("of best", "", _over("first_s", "channels_last"), 7),
        Column("peak MiB", "", number("peak_mib", ".0f"), 8),
        Column("of diff", "", _over("peak", "diffusers"), 7),
        Column("of best", "", _over("peak", "channels_last"), 7),
        Column("anonymous MiB", "", number("anonymous_mib", ".0f"), 13),
        Column("of diff", "", _over("anonymous", "diffusers"), 7),
        Column("of best", "", _over("anonymous", "channels_last"), 7),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 if a side draws something else, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads = models.check_options(options)
    if options.cold < 0:
        raise ValueError(f"--cold must be at least 0, got {options.cold}")
    names, batches = models.names(options.models), models.batches(options.batch)
    described = common.begin(threads, TABLE, f"{options.rounds} interleaved rounds")
    print("\n" + common.text_head(TABLE.columns), flush=True)
    rows: Rows = []
    fresh: Rows = []
    taken: dict[str, float] = {}
    for model in names:
        for dtype in common.dtypes(options.dtype):
            with models.place(options.keep, model, dtype) as folder:
                for count in threads:
                    more = (options.cold, options.vae == "tiny", options.compile)
                    case = Case(model, dtype, count, batches, options.size, options.rounds, *more)
                    found, cold = measure(case, folder)
                    rows += found
                    fresh += cold
                if options.cold and not taken:
                    taken = imports(folder)
    notes = common.busy(rows) + models.unjudged(rows) + _notes(fresh, taken)
    command = _command(options, threads)
    common.finish(options.json, TABLE, command, described, rows, fresh, notes)


def _notes(fresh: Rows, taken: Mapping[str, float]) -> list[str]:
    """What the second table means, and the imports."""
    if not fresh:
        return []
    notes = [
        "fresh process: a new Python, the files in the system's cache, up to the first PNG; of "
        "diff, of best: the figure before it over diffusers' and over channels_last's",
        "peak: the resident set's, with the model files mapped into it; anonymous: the part that "
        "is in no file; both above what is there after the imports, one picture",
    ]
    text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())
    return [*notes, f"over `import torch`: {text}"]


def _command(options: argparse.Namespace, threads: Sequence[int]) -> str:
    """The command without the files it writes."""
    counts = ",".join(map(str, threads))
    words = f"--models {options.models} --dtype {options.dtype} --batch {options.batch}"
    words += f" --size {options.size} --rounds {options.rounds} --cold {options.cold}"
    words += " --vae tiny" if options.vae == "tiny" else ""
    words += f" --compile {options.compile}" if options.compile else ""
    return f"python -m {NAME} {words} --threads {counts}"


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="One prompt, one picture: a whole one-step model against diffusers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    common.add_options(parser)
    models.add_options(parser)
    parser.set_defaults(rounds=3)
    add("--cold", type=int, default=3, metavar="N", help="fresh processes of each side")
    add("--vae", choices=("full", "tiny"), default="full", help="tiny: rows with TAESD besides")
    return parser


if __name__ == "__main__":
    sys.exit(main())
