"""The paper's experiments at world scale: which units they are made of, and what they claim.

An experiment is tables of arms; an arm gives one unit for each seed. Claims compare two arms of a
table, seed by seed. Every comparison of the paper has its controls beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snoopi import config as recipes
from snoopi.reproduce.candidates import CANDIDATES
from snoopi.reproduce.records import Records
from snoopi.reproduce.units import STEPS, Negatives, Teacher, Train, Unit, unique

TUNING_SEED = 100  # of the runs that choose a learning rate; no figure is reported on it
RATES = (5e-5, 1e-4, 2e-4)  # of the student; the recipes have 1e-4
KAPPAS = (1.0, 2.0, 3.0, 4.0, 5.0)
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
METHODS = ("nasa", "nasa-centred", "nag", "vsf", "embed-sub", "cfg")
PROMPTS = 100  # for each open attribute of a removal test
LOWER, HIGHER = -1, 1


@dataclass(frozen=True)
class Column:
    """A figure of a table. rate: in [0, 1], shown as a percentage."""

    key: str
    title: str
    rate: bool = False


@dataclass(frozen=True)
class Claim:
    """That arm `left` has a lower or higher figure than arm `right` ("": than 0).

    paper: what the paper says; else a control, or a finding of this project that is tested again.
    """

    text: str
    left: str
    right: str
    figure: str = "frechet"
    sign: int = LOWER
    paper: bool = True


@dataclass(frozen=True)
class Table:
    """Arms side by side. curves: their evaluations over training are drawn, too.

    x: the arms' places on an axis: the columns are drawn over it.
    """

    title: str
    arms: Mapping[str, Callable[[int], Unit]]
    columns: Sequence[Column]
    claims: Sequence[Claim] = ()
    curves: bool = False
    x: tuple[str, Mapping[str, float]] | None = None
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    tables, first: by world and what is on record: what comes second may depend on what was found.
    first: units that are run for a choice and not shown.
    """

    title: str
    question: str
    tables: Callable[[str, Records], Sequence[Table]]
    first: Callable[[str], Sequence[Unit]] = field(default=lambda world: ())

    def units(self, world: str, records: Records, seeds: Sequence[int]) -> list[Unit]:
        """What the experiment consists of, as far as it is known from the records."""
        found = [
            arm(seed)
            for seed in seeds
            for table in self.tables(world, records)
            for arm in table.arms.values()
        ]
        return unique([*found, *self.first(world)])


_QUALITY = (
    Column("frechet", "F"),
    Column("all_right", "right", True),
    Column("precision", "precision", True),
    Column("recall", "recall", True),
)
_REMOVAL = (
    Column("scale", "strength"),
    Column("easy_before", "easy before", True),
    Column("easy", "easy", True),
    Column("targeted", "targeted", True),
    Column("keep_ratio", "kept of unguided", True),
    Column("same", "same", True),
    Column("frechet", "F"),
)


def _removal(world: str) -> tuple[Column, ...]:
    """Columns of a removal test. An emoji shows next to nothing that nobody named."""
    return tuple(c for c in _REMOVAL if world != "emoji" or c.key != "same")


def _student(recipe: str, *overrides: str, steps: int = STEPS) -> Callable[[int], Train]:
    return lambda seed: Train(recipe, seed, (f"run.steps={steps}", *overrides))


def _negatives(
    student: Callable[[int], Train], method: str, scale: float | None = None
) -> Callable[[int], Negatives]:
    return lambda seed: Negatives(student(seed), method, scale, PROMPTS)


# --- Fig. 2 ---------------------------------------------------------------------------------------


def _fig2(world: str, records: Records) -> list[Table]:
    fixed, mean, ttur, random = (
        "fixed, 4.5",
        "fixed, 2.25",
        "fixed, 2.25, LoRA teacher 5:1",
        "U(0.5, 4) (PG-SB)",
    )
    arms = {
        fixed: _student(f"pgsb_{world}_fixed"),
        mean: _student(f"swiftbrush_{world}"),
        # As many updates of the student: one in five steps.
        ttur: _student(f"dmd2trick_{world}", "evaluate.every=250", steps=5 * STEPS),
        random: _student(f"pgsb_{world}"),
    }
    claims = (
        Claim("PG-SB ends better than a fixed kappa", random, fixed),
        Claim("PG-SB ends better than the two time scales", random, ttur),
        Claim("PG-SB rises less between evaluations than a fixed kappa", random, fixed, "rises"),
        Claim("so it does beside its own mean, fixed", random, mean, "rises", paper=False),
        Claim("PG-SB ends better than its own mean, fixed", random, mean, paper=False),
        Claim("5:1 ends better than 2:1, both fixed at 2.25", ttur, mean, paper=False),
    )
    note = (
        "F over the updates of the student; rises: root mean square of what F rises by between "
        "evaluations (a fall counts 0, however bad the start). Two updates of the LoRA teacher for "
        "each of the student, but for 5:1."
    )
    columns = (*_QUALITY, Column("rises", "rises of F"))
    return [Table("Quality over training", arms, columns, claims, curves=True, note=note)]


# --- Tab. 1 ---------------------------------------------------------------------------------------


def _tab1(world: str, records: Records) -> list[Table]:
    def arm(low: float, high: float) -> Callable[[int], Teacher]:
        return lambda seed: Teacher(f"{world}_teacher", (low, high), seed)

    random = "U(2, 5)"
    arms = {f"{kappa:g}": arm(kappa, kappa) for kappa in KAPPAS} | {random: arm(2.0, 5.0)}
    claims = (
        Claim("3 is better than 2 in F", "3", "2"),
        Claim("3 is better than 5 in F", "3", "5"),
        Claim("recall falls from 2 to 5", "5", "2", "recall"),
        Claim("precision rises from 2 to 5", "5", "2", "precision", HIGHER),
        Claim("U(2, 5) is better than 5 in F", random, "5"),
        Claim("U(2, 5) is better than 2 in F", random, "2"),
        Claim("U(2, 5) is better than 3, near its middle, in F", random, "3", paper=False),
    )
    x = ("kappa", {f"{kappa:g}": kappa for kappa in KAPPAS})
    note = "The teacher in 25 steps of DDIM; seeds are of prompts, noise and kappa."
    return [Table("The teacher under guidance", arms, _QUALITY, claims, x=x, note=note)]


# --- Tab. 2 ---------------------------------------------------------------------------------------

_NONE, _BOTH = "fixed: 4.5 / 4.5", "both random: U / U"
_TEACHER, _LORA = "teacher random: U / 4.5", "LoRA teacher random: 4.5 / U"
_BOTH_MEAN, _GAP = "control: 2.25 / 2.25", "control: 3.5 / 2"
_TEACHER_MEAN, _LORA_MEAN = "control: 2.25 / 4.5", "control: 4.5 / 2.25"
_INDEPENDENT = "control: U / U, drawn apart"


def _tab2_recipes(world: str) -> dict[str, str]:
    return {
        _NONE: f"pgsb_{world}_fixed",
        _TEACHER: f"pgsb_{world}_teacher_only",
        _TEACHER_MEAN: f"pgsb_{world}_teacher_only_mean",
        _LORA: f"pgsb_{world}_lora_only",
        _LORA_MEAN: f"pgsb_{world}_lora_only_mean",
        _BOTH: f"pgsb_{world}",
        _BOTH_MEAN: f"swiftbrush_{world}",
        _INDEPENDENT: f"pgsb_{world}_independent",
        _GAP: f"pgsb_{world}_gap",
    }


_TAB2_CLAIMS = (
    Claim("random for both is better than fixed", _BOTH, _NONE),
    Claim("random for the LoRA teacher is better than fixed", _LORA, _NONE),
    Claim("random for the frozen teacher alone does harm", _TEACHER, _NONE, sign=HIGHER),
    Claim("random for both is better than for the LoRA teacher alone", _BOTH, _LORA),
    Claim("both: randomness helps beside its mean, fixed", _BOTH, _BOTH_MEAN, paper=False),
    Claim("LoRA teacher: randomness helps beside its mean", _LORA, _LORA_MEAN, paper=False),
    Claim("frozen teacher: randomness harms beside its mean", _TEACHER, _TEACHER_MEAN,
          sign=HIGHER, paper=False),
    Claim("one draw for both is better than two", _BOTH, _INDEPENDENT, paper=False),
    Claim("a fixed gap, 3.5 / 2, is better than random for both", _GAP, _BOTH, paper=False),
    Claim("and draws more of the prompt right", _GAP, _BOTH, "all_right", HIGHER, paper=False),
)  # fmt: skip


def _tab2(world: str, records: Records) -> list[Table]:
    chosen = {name: _rate(recipe, records) for name, recipe in _tab2_recipes(world).items()}
    own = {name: _student(recipe) for name, recipe in _tab2_recipes(world).items()}
    note = (
        "kappa of the frozen / the LoRA teacher; U is U(0.5, 4). Means of the last three "
        "evaluations of a run, then over seeds."
    )
    tables = [Table("The recipes' learning rate, 1e-4", own, _QUALITY, _TAB2_CLAIMS, note=note)]
    tuned = {
        name: _student(_tab2_recipes(world)[name], f"optim.student.lr={rate:g}")
        for name, rate in chosen.items()
        if rate is not None
    }
    if tuned:
        rates = ", ".join(f"{name}: {rate:g}" for name, rate in chosen.items() if rate)
        title = "Each arm at the best learning rate of its own"
        note = (
            f"The lowest F of {', '.join(f'{r:g}' for r in RATES)} in a run of another seed, "
            f"measured on the same prompts: {rates}."
        )
        claims = [c for c in _TAB2_CLAIMS if c.left in tuned and c.right in tuned]
        tables.append(Table(title, tuned, _QUALITY, claims, note=note))
    return tables


def _tuning(recipe: str) -> dict[float, Train]:
    return {rate: _student(recipe, f"optim.student.lr={rate:g}")(TUNING_SEED) for rate in RATES}


def _rate(recipe: str, records: Records) -> float | None:
    """The learning rate with the lowest F on the tuning seed, None until all have been run."""
    found = {rate: records.figures(unit) for rate, unit in _tuning(recipe).items()}
    if any(figures is None for figures in found.values()):
        return None
    return min(found, key=lambda rate: found[rate]["frechet"])  # type: ignore[index]


def _tab2_first(world: str) -> list[Unit]:
    return [unit for recipe in _tab2_recipes(world).values() for unit in _tuning(recipe).values()]


# --- negative prompts -----------------------------------------------------------------------------


def _best(world: str) -> Callable[[int], Train]:
    """The student that negatives are tried on: the package's default recipe."""
    return _student(f"pgsb_{world}_gap")


def _fig3(world: str, records: Records) -> list[Table]:
    names = {"nasa": "NASA", "embed-sub": "embedding subtraction", "cfg": "CFG of outputs"}
    arms = {name: _negatives(_best(world), method) for method, name in names.items()}
    claims = [
        Claim(f"NASA removes more than {other}", "NASA", other, "targeted", HIGHER)
        for other in ("embedding subtraction", "CFG of outputs")
    ]
    return [Table("What the baselines remove", arms, _removal(world), claims, note=_MATCHED)]


_MATCHED = (
    "The one of 13 strengths (and two halvings; weaker ones where all break the bound) that "
    "removes most while as many named attributes are right as in 96 % of the unguided pictures, "
    "chosen on other prompts: removal at matched retention. Kept: right with the negative, over "
    "right without, on the reported prompts. Easy: the negative is random; targeted: it names what "
    "the same noise shows without guidance, where it shows anything; same: attributes that nobody "
    "named and that stayed; F: to real pictures of the prompt without the negative. A seed on "
    "which no strength kept enough is marked, and left out of the verdicts."
)


_AUTOMATIC = (
    "Strength: what the rule is multiplied by, searched as above; a rule that needs no search "
    "would have the same for every student. Projection: the share of the negative's attention that "
    "the prompt's holds; norm: as long as the prompt's; mass: by the attention the negative would "
    "get beside the prompt (centred: of Z- - Z0)."
)


def _tab3(world: str, records: Records) -> list[Table]:
    names = {
        "nasa": "NASA", "nasa-centred": "NASA, null-centred", "nag": "NAG", "vsf": "VSF",
        "embed-sub": "embedding subtraction", "cfg": "CFG of outputs",
    }  # fmt: skip
    arms = {name: _negatives(_best(world), method) for method, name in names.items()}
    claims = [
        *(Claim(f"NASA removes more than {names[m]}", "NASA", names[m], "targeted", HIGHER, False)
          for m in ("nag", "vsf", "embed-sub")),
        Claim("null-centred NASA changes less of what nobody named", "NASA, null-centred", "NASA",
              "same", HIGHER, False),
        Claim("null-centred NASA ends nearer to real pictures", "NASA, null-centred", "NASA",
              paper=False),
    ]  # fmt: skip
    claims = [claim for claim in claims if claim.figure in {c.key for c in _removal(world)}]
    paper = {
        "NASA at 0.5": _negatives(_best(world), "nasa", 0.5),
        "NASA at 1": _negatives(_best(world), "nasa", 1.0),
    }
    gained = [
        Claim(
            "NASA at 0.5 removes what a random negative names", "NASA at 0.5", "", "gain", HIGHER
        ),
        Claim("so does NASA at 1", "NASA at 1", "", "gain", HIGHER, paper=False),
    ]
    rules = {
        "NASA": arms["NASA"],
        **{
            name.replace("auto-", "automatic, "): _negatives(_best(world), name)
            for name in CANDIDATES
        },
    }
    tried = [
        Claim(f"{name} removes more than NASA", name, "NASA", "targeted", HIGHER, False)
        for name in rules
        if name != "NASA"
    ]
    return [
        Table("Before and after, at the paper's strength and at 1", paper, _removal(world), gained),
        Table("Ways to use a negative prompt", arms, _removal(world), claims, note=_MATCHED),
        Table("Rules for an automatic strength", rules, _removal(world), tried, note=_AUTOMATIC),
    ]


def _fig5(world: str, records: Records) -> list[Table]:
    tables = []
    for method, title in (("nasa", "NASA"), ("nasa-centred", "Null-centred NASA")):
        arms = {f"{a:g}": _negatives(_best(world), method, a) for a in ALPHAS}
        names = list(arms)
        highest = 1.0 if method == "nasa" else 0.0  # strength in the paper's figure
        claims = [
            Claim(f"{b} removes more than {a}", b, a, "targeted", HIGHER, paper=float(b) <= highest)
            for a, b in itertools.pairwise(names)
        ]
        x = ("strength", {f"{a:g}": a for a in ALPHAS})
        tables.append(Table(f"{title} by strength", arms, _removal(world)[1:], claims, x=x))
    return tables


def _nasa_t(world: str, records: Records) -> list[Table]:
    plain, aware = _student(f"pgsb_{world}"), _student(f"nasat_{world}")
    one, two = "PG-SB", "PG-SB with NASA-T"
    quality = Table(
        "Quality without a negative",
        {one: plain, two: aware},
        _QUALITY,
        [Claim("training with NASA costs no quality (lower F)", two, one, paper=False)],
    )
    arms = {
        f"{name}, {label}": _negatives(run, "nasa", scale)
        for name, run in ((one, plain), (two, aware))
        for label, scale in (("NASA at 1", 1.0), ("matched retention", None))
    }
    claims = [
        Claim(f"NASA-T removes more, {label}", f"{two}, {label}", f"{one}, {label}", "targeted",
              HIGHER, paper=False)
        for label in ("NASA at 1", "matched retention")
    ]  # fmt: skip
    return [quality, Table("Negatives", arms, _removal(world), claims, note=_MATCHED)]


def _dit(world: str, records: Records) -> list[Table]:
    early, late = "called at t = 400", "called at t = 999"
    arms = {early: _student(f"pgsb_{world}_dit"), late: _student(f"pgsb_{world}_dit_t999")}
    claims = [Claim("an eps student is better called at 400", early, late, paper=False)]
    return [Table("PixArt's family: where the student is called", arms, _QUALITY, claims)]


EXPERIMENTS: dict[str, Experiment] = {
    "tab2": Experiment(
        "Table 2: random kappa for the teachers",
        "Is it the randomness of kappa that helps, or its mean, or the gap between the teachers?",
        _tab2,
        _tab2_first,
    ),
    "tab3": Experiment(
        "Tables 3 and 7: removal by negative prompts",
        "How much of what a negative prompt names disappears, and what else changes?",
        _tab3,
    ),
    "fig2": Experiment(
        "Figure 2: quality over training",
        "Is training with a random kappa steadier than with a fixed one?",
        _fig2,
    ),
    "tab1": Experiment(
        "Table 1: the teacher under guidance",
        "What does kappa do to a multi-step teacher?",
        _tab1,
    ),
    "fig3": Experiment(
        "Figure 3: what else could be done with a negative prompt",
        "Do CFG of outputs and subtraction of embeddings work in one step?",
        _fig3,
    ),
    "fig5": Experiment(
        "Figure 5: strength of NASA",
        "Does more strength remove more, and at what price?",
        _fig5,
    ),
    "nasa-t": Experiment(
        "NASA-T: training with NASA",
        "Does a student trained with NASA use negative prompts better?",
        _nasa_t,
    ),
    "dit": Experiment(
        "The transformer family",
        "At which timestep should an eps student be called?",
        _dit,
    ),
}
"""In the order in which `all` runs them."""

WORLDS = {"shapes": tuple(EXPERIMENTS), "emoji": tuple(n for n in EXPERIMENTS if n != "dit")}


def check(names: Sequence[str], world: str, records: Records) -> None:
    """ValueError for an experiment that the world lacks, or whose recipes it lacks."""
    for name in names:
        if name not in WORLDS[world]:
            raise ValueError(f"{name}: the world {world} has {', '.join(WORLDS[world])}")
        known = recipes.recipes()
        for unit in EXPERIMENTS[name].units(world, records, [0]):
            run = unit.student if isinstance(unit, Negatives) else unit
            recipe = run.model if isinstance(run, Teacher) else run.recipe
            if recipe not in known:
                raise ValueError(f"{name}: the world {world} has no recipe {recipe}")


def value(figures: Mapping[str, Any], key: str) -> float | None:
    """A figure of a unit; derived ones: rises (of a curve), gain (easy - easy before)."""
    if key == "gain":
        return figures["easy"] - figures["easy_before"]
    if key == "rises":
        curve = [look["frechet"] for look in figures["curve"]]
        rises = [max(0.0, b - a) for a, b in itertools.pairwise(curve)]
        return (sum(rise * rise for rise in rises) / len(rises)) ** 0.5 if rises else None
    found: float | None = figures.get(key)
    return found
