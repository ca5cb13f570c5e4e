"""The paper's experiments on a small world, and comparisons of one's own.

python -m snoopi.reproduce fig2|tab1|tab2|fig3|tab3|fig5|nasa-t|dit|all [--world shapes] [--seeds 3]
python -m snoopi.reproduce recipes [RECIPE ...] [section.key=value ...] [--seeds 0 1 2]
python -m snoopi.reproduce guidance MODEL [--count N] [--methods nasa ...]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snoopi import config as recipes
from snoopi import errors, worlds
from snoopi.evaluate.negatives import EVALUATION_SEED, METHODS, GuidanceTable, guidance_table
from snoopi.evaluate.world import gap_closed
from snoopi.folders import shipped_or_path
from snoopi.noise import Noise
from snoopi.pictures import save_png, write_atomically
from snoopi.pipeline import load
from snoopi.report import guidance_text, text_table
from snoopi.reproduce import book
from snoopi.reproduce.experiments import EXPERIMENTS, WORLDS, check
from snoopi.reproduce.jobs import Processes, Runner, finished
from snoopi.reproduce.records import Records
from snoopi.reproduce.strips import strips
from snoopi.reproduce.units import Unit, unique

SEEDS = 3
RECORDS = Path("docs/reproduction/runs.jsonl")
RECIPES = ("pgsb_shapes", "pgsb_shapes_gap")
FIGURES = ("all_right", "frechet", "gap_closed", "recall", "precision")  # of summary.json's "end"


class RunKey(NamedTuple):
    """One run of a comparison."""

    recipe: str
    seed: int

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return f"{Path(self.recipe).stem}-seed{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes a subcommand's words in one run only; overrides may follow options, too.
    if rest and (not hasattr(options, "recipes") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.recipes += rest
    return errors.status("snoopi.reproduce", lambda: options.work(options))


# --- the paper's experiments ---------------------------------------------------------------------


def _experiments(options: argparse.Namespace) -> None:
    if options.jobs < 1 or options.seeds < 1:
        raise ValueError(
            f"--jobs and --seeds must be at least 1, got {options.jobs} and {options.seeds}"
        )
    names = WORLDS[options.world] if options.experiment == "all" else (options.experiment,)
    try:
        only = re.compile(options.only)
    except re.error as error:
        raise ValueError(f"--only: {options.only!r} is no regular expression: {error}") from None
    records, seeds = Records(options.records), range(options.seeds)
    check(names, options.world, records)

    def wanted() -> list[Unit]:
        units = [
            unit
            for name in names
            for unit in EXPERIMENTS[name].units(options.world, records, seeds)
        ]
        return [unit for unit in unique(units) if only.search(unit.describe())]

    def missing() -> list[Unit]:
        return [unit for unit in wanted() if unit not in records]

    if not wanted():
        raise ValueError(f"--only: no unit of {options.experiment} matches {options.only!r}")

    if options.dry_run:
        for unit in missing():
            print(unit.describe())
        print(f"{len(missing())} units to run, {len(records)} on record in {options.records}")
        return
    runner = Runner(options.out, options.jobs, records)
    while not options.draw and (todo := missing()):  # what was found may ask for more
        runner.run(todo)
    found = book.chapters(names, options.world, records, seeds)
    print(book.as_text(found))
    path = options.out / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = {name: list(strips(name, options.world, records, options.out)) for name in names}
    for name, figures in drawn.items():
        for number, figure in enumerate(figures, 1):
            save_png(figure.image, options.out / "pictures" / f"{name}-{number}.png")
    write_atomically(path, book.as_html(found, records, drawn).encode())
    print(f"wrote {path}")
    if options.markdown:
        command = f"python -m snoopi.reproduce {options.experiment} --world {options.world}"
        if options.seeds != SEEDS:
            command += f" --seeds {options.seeds}"
        text = book.as_markdown(found, f"{command} --draw --markdown {options.markdown}")
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.markdown, text.encode())
        print(f"wrote {options.markdown}")


# --- recipes --------------------------------------------------------------------------------------


def _recipes(options: argparse.Namespace) -> None:
    names = [word for word in options.recipes if "=" not in word] or list(RECIPES)
    overrides = [word for word in options.recipes if "=" in word]
    if options.jobs < 1 or not options.seeds:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    # A mistake is told before hours of training.
    configs = {name: recipes.load(name, overrides) for name in names}
    for name, config in configs.items():
        if config.run.method != "vsd" or not config.evaluate.prompts:
            raise ValueError(f"{name}: expected a recipe that distils and evaluates a student")
    keys = [RunKey(name, seed) for name in names for seed in options.seeds]
    against = {(config.model.teacher, config.data.world) for config in configs.values()}
    if len(against) > 1:
        raise ValueError(
            "recipes are compared on one world under one teacher, got "
            + " and ".join(f"{teacher} ({world})" for teacher, world in sorted(against))
        )
    runner = _Recipes(options.out, options.jobs, overrides)
    for teacher in dict.fromkeys(config.model.teacher for config in configs.values()):
        runner.processes.teacher(teacher, options.out)
    # One run measures the teacher, which is the same for all.
    jobs = [(key, key == keys[0]) for key in keys]
    summaries = dict(zip(keys, runner.processes.all(runner.summary, jobs), strict=True))
    results = _compare(summaries)
    print(f"\n{_recipe_text(results)}\n")
    _write(options.json or options.out / "recipes.json", results)


class _Recipes:
    """Runs of snoopi.train in folders of one comparison."""

    def __init__(self, out: Path, jobs: int, overrides: Sequence[str]) -> None:
        self.out, self.overrides, self.processes = out, overrides, Processes(jobs)

    def summary(self, job: tuple[RunKey, bool]) -> dict[str, Any]:
        """The summary of a run, which is trained unless it is there; whether with its teacher's."""
        key, teacher = job
        folder = self.out / key.folder
        more = ["evaluate.removal=0", f"evaluate.teacher={str(teacher).lower()}"]
        words = [f"run.seed={key.seed}", *self.overrides, *more]
        if not finished(folder, recipes.load(key.recipe, words)):
            words = ["snoopi.train", key.recipe, *words, "--out", str(folder), "--resume"]
            self.processes.run(words)
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return found


def _compare(summaries: Mapping[RunKey, Mapping[str, Any]]) -> dict[str, Any]:
    """Each run's means over its last evaluations, and their mean and spread over seeds."""
    first = next(iter(summaries.values()))
    names = ("frechet_teacher_1", "frechet_teacher_25", "all_right_teacher_25", "recall_teacher_25")
    teacher = {name: first[name] for name in names}
    one, many = teacher["frechet_teacher_1"], teacher["frechet_teacher_25"]
    runs = []
    for key, summary in summaries.items():
        end = {**summary["end"], "gap_closed": gap_closed(summary["end"]["frechet"], one, many)}
        runs.append({"recipe": key.recipe, "seed": key.seed, **end})
    table = []
    for name in dict.fromkeys(key.recipe for key in summaries):
        mine = [run for run in runs if run["recipe"] == name]
        row: dict[str, Any] = {"recipe": name, "seeds": len(mine)}
        for figure in FIGURES:
            values = [run[figure] for run in mine]
            row[figure] = statistics.fmean(values)
            row[f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(row)
    return {"teacher": teacher, "runs": runs, "recipes": table}


def _recipe_text(results: Mapping[str, Any]) -> str:
    def cell(row: Mapping[str, Any], figure: str) -> str:
        spread = row.get(f"{figure}_sd")
        return f"{row[figure]:.3f}" + ("" if spread is None else f" +- {spread:.3f}")

    runs = [
        [f"{run['recipe']}, seed {run['seed']}", *(f"{run[f]:.3f}" for f in FIGURES)]
        for run in results["runs"]
    ]
    means = [[row["recipe"], *(cell(row, f) for f in FIGURES)] for row in results["recipes"]]
    teacher = ", ".join(f"{name} {value:.3f}" for name, value in results["teacher"].items())
    return "\n".join(
        [
            text_table(("recipe", *(f.replace("_", " ") for f in FIGURES)), [*runs, *means]),
            f"each run: the mean of its last evaluations; +- sd over seeds. {teacher}",
        ]
    )


# --- guidance -------------------------------------------------------------------------------------


def _guidance(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    if min(options.scales) <= 0:
        raise ValueError(f"--scales must be above 0, got {min(options.scales):g}")
    pipeline = load(shipped_or_path(options.model), optimize="auto")
    world = worlds.build(options.world)
    texts = world.prompts(Noise(EVALUATION_SEED), options.count, "held-out")
    for tokenizer in filter(None, pipeline.tokenizers):
        if unknown := sorted({word for text in texts for word in tokenizer.unknown(text)}):
            raise ValueError(
                f"{options.model} does not know words of the {options.world} world "
                f"({', '.join(unknown[:5])}): another --world?"
            )
    table = guidance_table(
        pipeline, options.scales, options.count, options.batch, options.methods, world
    )
    print(f"\n{_guidance_text(table)}\n")
    results = {
        "free_before": table.free_before,
        "frechet_before": table.frechet_before,
        "rows": table.rows(),
        "methods": [method.to_dict() for method in table.methods.values()],
    }
    if options.json:
        _write(options.json, results)


def _guidance_text(table: GuidanceTable) -> str:
    before = (
        f"without guidance: {100 * table.free_before:.1f} % free of a random negative, "
        f"Frechet distance {table.frechet_before:.2f}"
    )
    return f"{guidance_text(table.rows())}\n{before}; best: {table.best().name}"


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog="snoopi.reproduce",
        description="The paper's experiments on a small world, and comparisons of one's own.",
    )
    kinds = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    default = argparse.ArgumentDefaultsHelpFormatter
    for name in (*EXPERIMENTS, "all"):
        text = "all experiments of the world" if name == "all" else EXPERIMENTS[name].title
        kind = kinds.add_parser(name, help=text, description=text, formatter_class=default)
        kind.add_argument("--world", choices=list(WORLDS), default="shapes")
        kind.add_argument("--seeds", type=int, default=SEEDS, help="how many: 0, 1, ...")
        text = "run units whose line in --dry-run matches this regular expression"
        kind.add_argument("--only", metavar="PATTERN", default="", help=text)
        kind.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="runs, report")
        kind.add_argument("--records", type=Path, default=RECORDS, help="what has been measured")
        kind.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
        kind.add_argument("--draw", action="store_true", help="run nothing: draw what is on record")
        kind.add_argument("--dry-run", action="store_true", help="list what would be run")
        kind.add_argument("--markdown", type=Path, help="write the report in this form, too")
        kind.set_defaults(experiment=name, work=_experiments)
    text = "train recipes with several seeds and compare the means of their last evaluations"
    kind = kinds.add_parser("recipes", help=text, description=text, formatter_class=default)
    kind.add_argument(
        "recipes",
        nargs="*",
        help=f"recipes, then overrides section.key=value; none: {', '.join(RECIPES)}",
    )
    kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each")
    kind.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    kind.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    kind.add_argument("--json", type=Path, help="results; None: recipes.json in --out")
    kind.set_defaults(work=_recipes)
    text = "ways to use a negative prompt on one model: searched alike, then measured once"
    kind = kinds.add_parser("guidance", help=text, description=text, formatter_class=default)
    kind.add_argument("model", help="a model folder of a world")
    kind.add_argument("--world", choices=worlds.NAMES, default="shapes")
    kind.add_argument("--count", type=int, default=200, help="prompts for each open attribute")
    kind.add_argument("--batch", type=int, default=50, help="pictures made at once")
    kind.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    kind.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=list(recipes.Evaluate().scales),
        help="strengths to try, in each method's own unit",
    )
    kind.add_argument("--json", type=Path, help="where to write the results")
    kind.set_defaults(work=_guidance)
    return parser


if __name__ == "__main__":
    sys.exit(main())
