"""Recipes: one TOML file and `section.key=value` overrides become one frozen Config.

Every key is declared once, below, with its type, its default, its bounds and a one-line meaning;
reading, checking, writing and the printed reference all walk these declarations. What a user can
get wrong raises ConfigError with one line that names the file (or the override), the key, what was
expected and what came.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A recipe or an override that can't be used; the message is one line for the user."""


class _Bounds(NamedTuple):
    """Closed bounds of a number or of each number in a list; `above` is an open lower bound."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def hold(self, value: float) -> bool:
        return self.low <= value <= self.high and value > self.above

    def __str__(self) -> str:
        if self.above > -math.inf:
            return f"above {self.above:g}" + (
                f" and at most {self.high:g}" if self.high < math.inf else ""
            )
        if self.high < math.inf:
            return f"from {self.low:g} to {self.high:g}"
        return f"of at least {self.low:g}"


def _key(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    span: Literal["closed", "half-open"] | None = None,
) -> Any:
    """Declare one key. `span` makes a pair a range: [low, high], which may be one point, or
    [low, high), which may not be empty."""
    bounds = _Bounds(low, high, above)
    return field(default=default, metadata={"help": help, "bounds": bounds, "span": span})


# --- the sections, in the order in which they are written -----------------------------------------


@dataclass(frozen=True)
class Model:
    """Which networks a run starts from."""

    preset: str = _key("shapes", "zoo preset to build from scratch (not method vsd)")
    store: Literal["fp32", "fp16"] = _key("fp32", "storage of the weights in the model folder")
    vae: str = _key(
        "", "model folder, or name of the recipe that trains the VAE (method denoise); '': none"
    )
    teacher: str = _key(
        "", "model folder, or name of the recipe that trains the teacher (method vsd)"
    )
    student_init: str = _key(
        "teacher", "'teacher' copies the teacher, else a model folder (method vsd)"
    )
    student: Literal["full", "lora"] = _key(
        "full", "what of the student trains: every weight, or adapters beside them (student_lora)"
    )


@dataclass(frozen=True)
class Data:
    """Where prompts (and, for a teacher, pictures) come from."""

    world: Literal["shapes", "emoji"] = _key(
        "shapes", "captioned picture source; emoji needs pip install 'snoopi[emoji]'"
    )
    prompts: str = _key(
        "",
        "file of prompts, .txt (one a line) or .jsonl (key prompt); '': captions of the world",
    )
    cache: str = _key(
        "",
        "folder of text embeddings made by `python -m snoopi.data cache`; '': encode at each step",
    )
    negatives: str = _key("", "file of negative prompts, as data.prompts; '': none")
    null: Literal["encoded", "zeros"] = _key(
        "encoded", "the null text: the encoded empty prompt, or zeros"
    )
    dropout: float = _key(
        0.1, "share of captions replaced by the null text where a score is learnt", low=0, high=1
    )


@dataclass(frozen=True)
class Kappa:
    """Guidance scales of the two teachers in the VSD gradient (SNOOPI Eq. 7)."""

    teacher: tuple[float, float] = _key(
        (0.5, 4.0), "range of the frozen teacher; [c, c] fixes it", low=0, span="closed"
    )
    lora: tuple[float, float] = _key(
        (0.5, 4.0), "range of the LoRA teacher; [c, c] fixes it", low=0, span="closed"
    )
    draw: Literal["shared", "independent"] = _key(
        "shared", "one u ~ U(0,1) mapped to both ranges, or one u each"
    )
    per: Literal["sample", "batch"] = _key(
        "sample", "one draw for each picture, or one for the whole batch"
    )


@dataclass(frozen=True)
class Vsd:
    """The VSD gradient and its surrogate loss."""

    student_t: int = _key(999, "timestep of the student's only call", low=0, high=999)
    every: int = _key(
        1, "steps for each update of the student; the LoRA teacher is updated at each", low=1
    )
    t: tuple[int, int] = _key(
        (20, 981), "the teachers' timesteps [low, high)", low=0, high=1000, span="half-open"
    )
    weight: Literal["sigma2", "none"] = _key("sigma2", "w(t) of the gradient: sigma_t^2, or 1")
    normaliser: Literal["none", "dmd"] = _key(
        "none", "'dmd' divides by mean |x0 - x0_teacher| of each picture"
    )
    surrogate: Literal["mean", "sum"] = _key(
        "mean", "0.5 |x0 - target|^2 over a picture's elements; mean over the batch"
    )


@dataclass(frozen=True)
class Lora:
    """The LoRA teacher."""

    rank: int = _key(64, "rank of the adapters", low=1)
    gamma: float = _key(128.0, "numerator of the adapters' multiplier gamma / rank", above=0)
    targets: tuple[str, ...] = _key(
        ("to_q", "to_v"), "endings of the names of the layers that get an adapter"
    )
    t: tuple[int, int] = _key(
        (0, 1000), "timesteps of its own training [low, high)", low=0, high=1000, span="half-open"
    )
    loss_weight: Literal["none", "alpha_bar"] = _key("none", "weight of its noise-prediction loss")
    updates_per_step: int = _key(
        1, "updates of the LoRA teacher for each update of the student", low=1
    )


@dataclass(frozen=True)
class StudentLora:
    """The adapters of model.student = "lora"; the defaults are SwiftBrush v2's."""

    rank: int = _key(256, "rank of the student's adapters", low=1)
    gamma: float = _key(512.0, "numerator of their multiplier gamma / rank", above=0)
    targets: tuple[str, ...] = _key(
        ("to_q", "to_k", "to_v"), "endings of the names of the layers that get an adapter"
    )


@dataclass(frozen=True)
class ClipLoss:
    """The clamped CLIP loss beside VSD (SwiftBrush v2; SNOOPI Sec. 8)."""

    weight: float = _key(0.0, "weight at the first step; 0 switches the loss off", low=0)
    tau: float = _key(0.37, "cosine of picture and prompt above which it is 0", low=-1, high=1)
    schedule: Literal["constant", "linear"] = _key(
        "linear", "course of the weight; linear: to 0 over the run"
    )
    model: str = _key("", "folder of tools with a CLIP: image encoder, text encoder, tokenizer")
    decoder: Literal["vae", "taesd"] = _key(
        "vae", "what makes pictures of x0: the teacher's VAE, or a TAESD (less memory and time)"
    )
    taesd: str = _key("", "folder of tools with a TAESD")


@dataclass(frozen=True)
class NasaTrain:
    """Negative-aware training: the student runs with NASA on."""

    alpha: tuple[float, float] = _key(
        (0.0, 0.0),
        "range of NASA's strength, drawn for each picture; [0, 0]: off",
        low=0,
        span="closed",
    )


@dataclass(frozen=True)
class Denoise:
    """Training of a teacher on captioned pictures."""

    sampling: Literal["uniform", "logit_normal"] = _key(
        "uniform", "distribution of t; logit_normal: mostly the middle, where the picture forms"
    )
    prediction: Literal["v", "eps", "x0"] = _key(
        "v", "what the network predicts and the loss compares"
    )
    weight: Literal["none", "min_snr"] = _key("none", "weight of the loss over timesteps")
    t: tuple[int, int] = _key(
        (0, 1000), "timesteps [low, high)", low=0, high=1000, span="half-open"
    )


@dataclass(frozen=True)
class Autoencode:
    """Training of a VAE on pictures."""

    l1: float = _key(0.1, "weight of the absolute error beside the squared error", low=0)
    kl: float = _key(1e-3, "weight of the KL divergence, a mean over latent values", low=0)


@dataclass(frozen=True)
class Optim:
    """One AdamW."""

    lr: float = _key(1e-6, "learning rate after warm-up", above=0)
    betas: tuple[float, float] = _key((0.9, 0.999), "AdamW's betas", low=0, high=0.999999)
    weight_decay: float = _key(0.0, "AdamW's decoupled weight decay", low=0)
    clip: float = _key(1.0, "largest norm of the gradient; 0 does not clip", low=0)
    schedule: Literal["constant", "cosine", "trapezoid"] = _key(
        "constant",
        "course of the learning rate; cosine ends at 0, trapezoid falls to 0 in the last 30 %",
    )
    warmup: int = _key(0, "steps of linear warm-up", low=0)


@dataclass(frozen=True)
class Optims:
    """Optimizers: of the trained network, and of the LoRA teacher."""

    student: Optim = field(default_factory=Optim)
    lora: Optim = field(default_factory=lambda: Optim(lr=1e-3))


@dataclass(frozen=True)
class Ema:
    """Moving average of the trained weights; it is what the model folder holds."""

    decay: float = _key(0.0, "decay of each step; 0 switches the average off", low=0, high=0.999999)
    dtype: Literal["fp32", "bf16"] = _key(
        "fp32", "storage of the average; bf16 is rounded at random, so that small steps add up"
    )


@dataclass(frozen=True)
class Parallel:
    """How a step is spread over ranks and memory."""

    shard: Literal["auto", "always", "never"] = _key("auto", "FSDP2; auto: with more than one rank")
    checkpointing: bool = _key(False, "recompute each block's activations in the backward pass")
    compile: bool = _key(
        False, "torch.compile each block (minutes at the start; equal to rounding)"
    )
    teacher_pass: Literal["auto", "fused", "sequential"] = _key(
        "auto",
        "both teachers in one call of four batches, or in four calls (less memory); auto: one "
        "where weights are sharded or the batch is small",
    )


@dataclass(frozen=True)
class Run:
    """The loop."""

    method: Literal["vsd", "denoise", "autoencode"] = _key(
        "vsd", "distil a student, train a teacher, or train a VAE"
    )
    steps: int = _key(1000, "updates of the trained network", low=1)
    batch: int = _key(32, "pictures of one update over all ranks", low=1)
    accumulate: int = _key(1, "parts into which each rank's share of the batch is split", low=1)
    dtype: Literal["fp32", "bf16"] = _key(
        "fp32", "bf16 runs the networks under autocast; losses stay fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto: cuda where there is one")
    seed: int = _key(0, "seed of every random number", low=0, high=2**63 - 1)
    log: int = _key(10, "steps between rows of metrics.jsonl", low=1)
    health: bool = _key(
        True, "rows tell of the run's health, too, and so does the report (method vsd)"
    )
    tensorboard: bool = _key(
        False, "also write the rows as TensorBoard events (needs the package tensorboard)"
    )
    save: int = _key(100, "steps between run states; the last step is always saved", low=1)
    keep: int = _key(2, "run states kept, beside the milestones", low=1)
    async_save: bool = _key(
        False, "write run states while the run goes on, from a copy in host memory"
    )
    milestones: int = _key(0, "steps between run states that are kept for good; 0: none", low=0)


@dataclass(frozen=True)
class Evaluate:
    """Held-out measurements at the end of a run (and during it)."""

    prompts: int = _key(400, "held-out prompts; 0 does not evaluate", low=0)
    every: int = _key(0, "steps between evaluations; 0: only after the last step", low=0)
    batch: int = _key(100, "pictures made at once", low=1)
    removal: int = _key(200, "prompts with a negative; 0 leaves the removal test out", low=0)
    scales: tuple[float, ...] = _key(
        (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 4.0),
        "strengths to try of each way to use a negative prompt, in units of its own (NASA: alpha)",
        low=0,
    )
    teacher: bool = _key(True, "measure the teacher beside its student (method vsd)")
    teacher_steps: int = _key(
        25, "sampler steps of the teacher it is compared with", low=1, high=1000
    )
    teacher_kappa: float = _key(2.25, "guidance scale of that teacher", low=0)
    teacher_kappas: tuple[float, ...] = _key(
        (4.0,), "further guidance scales at which a teacher is measured (method denoise)", low=0
    )


@dataclass(frozen=True)
class Config:
    """One resolved run."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    denoise: Denoise = field(default_factory=Denoise)
    autoencode: Autoencode = field(default_factory=Autoencode)
    kappa: Kappa = field(default_factory=Kappa)
    vsd: Vsd = field(default_factory=Vsd)
    lora: Lora = field(default_factory=Lora)
    student_lora: StudentLora = field(default_factory=StudentLora)
    clip_loss: ClipLoss = field(default_factory=ClipLoss)
    nasa_train: NasaTrain = field(default_factory=NasaTrain)
    optim: Optims = field(default_factory=Optims)
    ema: Ema = field(default_factory=Ema)
    parallel: Parallel = field(default_factory=Parallel)
    evaluate: Evaluate = field(default_factory=Evaluate)


_DISTIL = (
    *("kappa", "vsd", "lora", "student_lora", "clip_loss", "nasa_train"),
    *("optim.lora", "parallel.teacher_pass", "run.health"),
    *("data.prompts", "data.cache", "data.negatives"),
    *("model.teacher", "model.student_init", "model.student"),
)
# Sections and keys that a method does not read. Setting one is an error: it would change nothing.
_UNREAD: dict[str, tuple[str, ...]] = {
    "vsd": ("denoise", "autoencode", "model.preset", "model.vae", "evaluate.teacher_kappas"),
    "denoise": (*_DISTIL, "autoencode", "evaluate.teacher"),
    "autoencode": (*_DISTIL, "denoise", "model.vae", "data.null", "data.dropout"),
}


def _unread(path: str, method: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in _UNREAD[method])


# --- walking the declarations ---------------------------------------------------------------------


class _Declared(NamedTuple):
    """One declared key: `kappa.teacher`, its type, default and metadata."""

    path: str
    type: Any
    default: Any
    meta: Mapping[str, Any]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _walk(section: Any, prefix: str = "") -> Iterator[_Declared]:
    """Yield every key below a config instance, with its value as default, as declared."""
    hints = get_type_hints(type(section))
    for item in dataclasses.fields(section):
        path, value = f"{prefix}{item.name}", getattr(section, item.name)
        if _is_section(hints[item.name]):
            yield from _walk(value, f"{path}.")
        else:
            yield _Declared(path, hints[item.name], value, item.metadata)


_DECLARED: dict[str, _Declared] = {item.path: item for item in _walk(Config())}
_SECTIONS: frozenset[str] = frozenset(
    path.rsplit(".", depth)[0] for path in _DECLARED for depth in range(1, path.count(".") + 1)
)


def _build(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Copy `section` with the keys in `values` (by full path) replaced."""
    changed = {}
    for item in dataclasses.fields(section):
        path, old = f"{prefix}{item.name}", getattr(section, item.name)
        changed[item.name] = (
            _build(old, values, f"{path}.") if path in _SECTIONS else values.get(path, old)
        )
    return dataclasses.replace(section, **changed)


# --- types ----------------------------------------------------------------------------------------


def _type_name(kind: Any, meta: Mapping[str, Any] | None = None) -> str:
    """The type in a user's words, for example `[number, number]`."""
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if kind in names:
        return names[kind]
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(arguments)
    if arguments[-1] is Ellipsis:
        return f"[{names[arguments[0]]}, ...]"
    closing = ")" if meta and meta["span"] == "half-open" else "]"
    return f"[{', '.join(names[item] for item in arguments)}{closing}"


def _fits(kind: Any, value: Any) -> bool:
    """Whether a TOML value has the type; whole numbers pass as numbers, true and false never do."""
    if kind is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return value in arguments
    if not isinstance(value, list | tuple) or not value:
        return False
    if arguments[-1] is Ellipsis:
        return all(_fits(arguments[0], item) for item in value)
    return len(value) == len(arguments) and all(map(_fits, arguments, value))


def _as_type(kind: Any, value: Any) -> Any:
    """Convert a value that fits: numbers to float where declared so, lists to tuples."""
    if kind is float:
        return float(value)
    if isinstance(value, list | tuple):
        return tuple(_as_type(get_args(kind)[0], item) for item in value)
    return value


def _checked(declared: _Declared, value: Any, source: str) -> Any:
    """The value in its declared type. Raises ConfigError on a wrong type or an impossible value."""
    where = f"{source}: {declared.path}"
    if not _fits(declared.type, value):
        expected = _type_name(declared.type, declared.meta)
        raise ConfigError(f"{where}: expected {expected}, got {value!r}")
    value = _as_type(declared.type, value)
    numbers = [
        item
        for item in (value if isinstance(value, tuple) else (value,))
        if isinstance(item, int | float)
    ]
    if not all(declared.meta["bounds"].hold(item) for item in numbers):
        raise ConfigError(
            f"{where}: expected {_type_name(declared.type)} {declared.meta['bounds']}, "
            f"got {_toml(value)}"
        )
    span = declared.meta["span"]
    if span and (value[0] > value[1] or (span == "half-open" and value[0] == value[1])):
        relation = "low <= high" if span == "closed" else "low < high"
        raise ConfigError(f"{where}: expected a range with {relation}, got {_toml(value)}")
    return value


# --- reading --------------------------------------------------------------------------------------


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("snoopi") / "recipes"
    return sorted(
        item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")
    )


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides, in order.

    Args:
        name_or_path: a packaged recipe's name, or the path of a file (has `.toml` or a folder).
        overrides: `section.key=value`; the value is TOML, or else taken as bare text.

    Raises:
        ConfigError: on anything that is not exactly a known key with a possible value.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(source: str, found: Iterator[tuple[str, Any]]) -> None:
        for path, value in found:
            values[path], sources[path] = _checked(_DECLARED[path], value, source), source

    for source, table in _chain(str(name_or_path), None, ()):
        take(source, _keys_of(table, source))
    for override in overrides:
        take(f"override {override!r}", _keys_of_override(override))
    config: Config = _build(Config(), values)
    _check_whole(config, sources, str(name_or_path))
    return config


def _chain(
    name: str, folder: Path | None, seen: tuple[str, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """(source, table) of a recipe and what it inherits by `base = "other"`, the oldest first."""
    source, text, folder = _read(name, folder)
    if source in seen:
        raise ConfigError(f"{source}: base recipes go in a circle: {' -> '.join((*seen, source))}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    base = table.pop("base", None)
    if base is None:
        return [(source, table)]
    if not isinstance(base, str):
        raise ConfigError(
            f"{source}: base: expected the name or the path of a recipe, got {base!r}"
        )
    return [*_chain(base, folder, (*seen, source)), (source, table)]


def _read(name: str, folder: Path | None) -> tuple[str, str, Path | None]:
    """(source, text, folder) of a recipe; a path in `base` is relative to its file's folder."""
    if not (name.endswith(".toml") or "/" in name):
        known = recipes()
        if name not in known:
            raise ConfigError(
                f"unknown recipe {name!r}{nearest(name, known)}; "
                f"known: {', '.join(known)}, or the path of a .toml file"
            )
        source = f"recipes/{name}.toml"
        return source, (resources.files("snoopi") / source).read_text("utf-8"), None
    path = Path(name) if folder is None else folder / name
    try:
        return str(path), path.read_text("utf-8"), path.parent
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read recipe {path}: it is not UTF-8 text") from None


def _keys_of(table: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of a TOML table.

    Raises:
        ConfigError: a name is neither a section nor a key.
    """
    for name, value in table.items():
        path = f"{prefix}{name}"
        if path in _DECLARED:
            yield path, value
        elif path not in _SECTIONS:
            what = "section" if isinstance(value, dict) else "key"
            raise ConfigError(
                f"{source}: unknown {what} {path}{nearest(path, [*_DECLARED, *_SECTIONS])}"
            )
        elif isinstance(value, dict):
            yield from _keys_of(value, source, f"{path}.")
        else:
            keys = ", ".join(key for key in _DECLARED if key.startswith(f"{path}."))
            raise ConfigError(
                f"{source}: {path}: expected a section with the keys {keys}, got {value!r}"
            )


def _keys_of_override(override: str) -> Iterator[tuple[str, Any]]:
    path, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not path or not text:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        value = {}
    parsed = value["value"] if set(value) == {"value"} else text
    # A folder called 2024 or true is text, too.
    if path in _DECLARED and _DECLARED[path].type is str and not isinstance(parsed, str):
        parsed = text
    return _keys_of({path: parsed}, f"override {override!r}")


def nearest(name: str, known: Sequence[str]) -> str:
    """`; the nearest is X`, by whole paths first and by their last part next."""
    by_last = {item.rsplit(".", 1)[-1]: item for item in known}
    whole = difflib.get_close_matches(name, known, 1, 0.7)
    last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1, 0.7)
    loose = difflib.get_close_matches(name, known, 1, 0.3)
    best = whole[0] if whole else by_last[last[0]] if last else loose[0] if loose else ""
    return f"; the nearest is {best}" if best else ""


def _check_whole(config: Config, sources: Mapping[str, str], recipe: str) -> None:
    """What no key can know alone. Raises ConfigError naming who set the key."""
    method, run = config.run.method, config.run
    for path, source in sources.items():
        if _unread(path, method):
            raise ConfigError(f"{source}: {path} is not read by run.method = {method!r}")
    if run.batch % run.accumulate:
        source = sources.get("run.accumulate", recipe)
        raise ConfigError(
            f"{source}: run.accumulate: expected a divisor of run.batch = {run.batch}, "
            f"got {run.accumulate}"
        )
    if config.evaluate.prompts == 1 and method != "autoencode":  # no covariance of one picture
        source = sources.get("evaluate.prompts", recipe)
        raise ConfigError(f"{source}: evaluate.prompts: expected 0, or at least 2, got 1")
    if method == "vsd" and not config.model.teacher:
        raise ConfigError(
            f"{recipe}: model.teacher: expected a model folder or the name of a recipe, got ''"
        )
    if config.data.cache and not config.data.prompts:
        source = sources.get("data.cache", recipe)
        raise ConfigError(
            f"{source}: data.cache: expected data.prompts beside it, the file that it is of"
        )
    _check_clip_loss(config, sources, recipe)
    aware, own = config.nasa_train.alpha[1] > 0, config.data.prompts
    if aware and own and not config.data.negatives:  # the world has its own
        source = sources.get("nasa_train.alpha", recipe)
        raise ConfigError(
            f"{source}: nasa_train.alpha: expected data.negatives beside data.prompts, got none"
        )
    for path, optim in _read_optims(config):
        if optim.warmup >= run.steps:
            source = sources.get(f"{path}.warmup", recipe)
            raise ConfigError(
                f"{source}: {path}.warmup: expected less than run.steps = {run.steps}, "
                f"got {optim.warmup}"
            )


def _check_clip_loss(config: Config, sources: Mapping[str, str], recipe: str) -> None:
    """A CLIP loss that is on needs its networks. Raises ConfigError."""
    clip = config.clip_loss
    needed = {"model": ("a CLIP", clip.model), "taesd": ("a TAESD", clip.taesd)}
    for name, (what, folder) in needed.items():
        if clip.weight and not folder and name in ("model", clip.decoder):
            source = sources.get(f"clip_loss.{name}", recipe)
            raise ConfigError(
                f"{source}: clip_loss.{name}: expected a folder of tools with {what}, got ''"
            )


def _read_optims(config: Config) -> list[tuple[str, Optim]]:
    both = [("optim.student", config.optim.student), ("optim.lora", config.optim.lora)]
    return both if config.run.method == "vsd" else both[:1]


# --- writing --------------------------------------------------------------------------------------


def _toml(value: Any) -> str:
    """One TOML value. JSON's strings are TOML's but for DEL, which TOML wants escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def to_toml(config: Config) -> str:
    """The resolved config as a recipe, every key its method reads with its meaning.

    `load` of the written text gives an equal Config.
    """
    lines: list[str] = []
    section = ""
    for item in _walk(config):
        if _unread(item.path, config.run.method):
            continue
        parent, name = item.path.rsplit(".", 1)
        if parent != section:
            lines += [""] * bool(lines) + [f"[{parent}]"]
            section = parent
        lines.append(f"{f'{name} = {_toml(item.default)}':<34}  # {item.meta['help']}")
    return "\n".join(lines) + "\n"


def flat(config: Config) -> dict[str, Any]:
    """{"run.steps": 1000, ...}: every key that the config's method reads, as plain JSON values."""
    return {
        item.path: list(item.default) if isinstance(item.default, tuple) else item.default
        for item in _walk(config)
        if not _unread(item.path, config.run.method)
    }


def reference() -> str:
    """Every key with its type, default and meaning, one a line: for --help and the docs."""
    rows = [
        (d.path, _type_name(d.type, d.meta), _toml(d.default), d.meta["help"])
        for d in _DECLARED.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(map(str.ljust, row, widths)), row[3]]) for row in rows) + "\n"


def identity(config: Config, free: Sequence[str]) -> str:
    """SHA-256 of what a resumed run must not change: keys that differ from their defaults.

    free: beginnings of keys that are left out. A key that a later version adds changes nothing.
    """
    defaults = {item.path: item.default for item in _walk(Config())}
    fixed = {
        item.path: item.default
        for item in _walk(config)
        if item.default != defaults[item.path] and not item.path.startswith(tuple(free))
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(before: Config, after: Config) -> list[str]:
    """`section.key: old -> new` for every key that differs, for example on resume."""
    pairs = zip(_walk(before), _walk(after), strict=True)
    return [
        f"{a.path}: {_toml(a.default)} -> {_toml(b.default)}"
        for a, b in pairs
        if a.default != b.default
    ]
