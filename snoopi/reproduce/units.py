"""What is trained or measured: each unit is a process, and one line of the records.

A unit's key is a function of its recipe, its teacher and what is measured, so figures that are
there are not made again. Judges, strengths to try and the code are not in it: a test pins them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from snoopi import config as recipes
from snoopi.config import Config
from snoopi.folders import shipped, shipped_or_path, weights_path

STEPS = 200  # of a student here: half of the recipes' 400
# Negatives and the teacher are units of their own.
MEASURED = ("evaluate.removal=0", "evaluate.teacher=false")
# Beginnings of keys that change no figure.
FREE = (
    *("run.log", "run.save", "run.keep", "run.health", "run.tensorboard", "run.milestones"),
    *("run.async_save", "parallel.", "evaluate.removal", "evaluate.teacher", "evaluate.batch"),
)


@dataclass(frozen=True)
class Train:
    """A student distilled by a recipe; figures are means over its last evaluations.

    overrides: section.key=value, without the seed.
    """

    recipe: str
    seed: int
    overrides: tuple[str, ...] = (f"run.steps={STEPS}",)
    kind: ClassVar[str] = "train"

    def words(self) -> list[str]:
        """The arguments of snoopi.train."""
        return [self.recipe, f"run.seed={self.seed}", *self.overrides, *MEASURED]

    def config(self) -> Config:
        """The resolved recipe. Raises ConfigError for a mistake in it."""
        return recipes.load(self.recipe, self.words()[1:])

    def what(self) -> dict[str, Any]:
        """All that decides the figures."""
        config = self.config()
        return {
            "config": recipes.identity(config, FREE),
            "teacher": _teacher(config.model.teacher),
        }

    @property
    def key(self) -> str:
        """Names the unit in the records."""
        return _key(self)

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        return f"{Path(self.recipe).stem}-seed{self.seed}-{self.key[:8]}"

    def describe(self) -> str:
        """For people."""
        words = [word for word in self.overrides if word != f"run.steps={STEPS}"]
        return " ".join([self.recipe, f"seed {self.seed}", *words])

    def plain(self) -> dict[str, Any]:
        """For the records."""
        return {"recipe": self.recipe, "overrides": list(self.overrides), "seed": self.seed}


@dataclass(frozen=True)
class Teacher:
    """A teacher drawn in many steps under CFG at kappa, one draw of U(low, high) a picture.

    seed: of the prompts, the noise and kappa.
    """

    model: str
    kappa: tuple[float, float]
    seed: int
    steps: int = 25
    prompts: int = 500
    kind: ClassVar[str] = "teacher"

    @property
    def world(self) -> str:
        """The world that it was trained on."""
        return recipes.load(self.model).data.world

    def what(self) -> dict[str, Any]:
        """All that decides the figures."""
        return {**asdict(self), "weights": _teacher(self.model)}

    @property
    def key(self) -> str:
        """Names the unit in the records."""
        return _key(self)

    def describe(self) -> str:
        """For people."""
        low, high = self.kappa
        kappa = f"{low:g}" if low == high else f"U({low:g}, {high:g})"
        return f"{self.model} in {self.steps} steps at kappa {kappa}, seed {self.seed}"

    def plain(self) -> dict[str, Any]:
        """For the records."""
        return asdict(self)


@dataclass(frozen=True)
class Negatives:
    """One way to use a negative prompt on one student: searched, then measured once.

    prompts: for each open attribute. scale: measured at this strength, without a search.
    """

    student: Train
    method: str
    scale: float | None = None
    prompts: int = 200
    kind: ClassVar[str] = "negatives"

    def what(self) -> dict[str, Any]:
        """All that decides the figures."""
        return {**self.own(), "student": self.student.key}

    def own(self) -> dict[str, Any]:
        """What comes on top of the student."""
        return {"method": self.method, "scale": self.scale, "prompts": self.prompts}

    @property
    def key(self) -> str:
        """Names the unit in the records."""
        return _key(self)

    @property
    def seed(self) -> int:
        """The student's."""
        return self.student.seed

    def describe(self) -> str:
        """For people."""
        at = "searched" if self.scale is None else f"at {self.scale:g}"
        return f"{self.method} {at} on {self.student.describe()}"

    def plain(self) -> dict[str, Any]:
        """For the records."""
        return {**self.own(), "student": self.student.plain()}


Unit = Train | Teacher | Negatives
U = TypeVar("U", Train, Unit)


def parse(kind: str, plain: dict[str, Any]) -> Unit:
    """The unit that `plain` described."""
    if kind == Train.kind:
        return Train(plain["recipe"], plain["seed"], tuple(plain["overrides"]))
    if kind == Teacher.kind:
        return Teacher(**{**plain, "kappa": tuple(plain["kappa"])})
    if kind == Negatives.kind:
        student = parse(Train.kind, plain["student"])
        assert isinstance(student, Train)
        return Negatives(**{**plain, "student": student})
    raise ValueError(f"unknown kind of unit {kind!r}")


def students(units: Sequence[Unit]) -> list[Train]:
    """The runs that units need, each once."""
    runs = [unit if isinstance(unit, Train) else unit.student for unit in units
            if not isinstance(unit, Teacher)]  # fmt: skip
    return unique(runs)


def unique(units: Iterable[U]) -> list[U]:
    """Each key once: an override that says what the recipe does makes no other unit."""
    found: dict[str, U] = {}
    for unit in units:
        found.setdefault(unit.key, unit)
    return list(found.values())


@functools.cache
def _key(unit: Unit) -> str:
    text = json.dumps({"kind": unit.kind, **unit.what()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _teacher(model: str) -> str:
    """A digest of a shipped model's weights, or of the recipe of one that is trained first."""
    if model not in shipped():
        return (
            recipes.identity(recipes.load(model), FREE)[:16] if model in recipes.recipes() else ""
        )
    data = weights_path(shipped_or_path(model), "backbone").read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]
