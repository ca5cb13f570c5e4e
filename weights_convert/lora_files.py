"""LoRA files of every dialect, read.

A LoRA is, for each network and module, two factors and a number: W' = W + (alpha / rank) up down
(Hu et al., 2021). The dialects differ in how they spell the module, what they call the factors, and
where they keep alpha: in a tensor, in the file's metadata, in a file beside it, or nowhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snoopi.folders import SPEC_FILE, read_spec
from snoopi.zoo import ModelSpec, model
from weights_convert.files import Entry, Weights, open_weights
from weights_convert.lora_names import (
    BUFFERS,
    CHANGED_BASE,
    PARTS,
    PREFIXES,
    REFUSED,
    Key,
    Modules,
    parse,
    split,
)
from weights_convert.rules import Shape, trouble_line

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' key in a safetensors header, and ours
_PEFT_DEFAULT = 8  # of both r and lora_alpha, where peft's config leaves them out


@dataclass(frozen=True)
class Factor:
    """One module's low-rank change: down [r in ...], up [out r ...]; alpha None stands for r."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return len(self.down)

    @property
    def full_alpha(self) -> float:
        """Alpha, with what None stands for."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The multiplier alpha / rank."""
        return self.full_alpha / self.rank

    def delta(self, shape: Shape) -> Tensor:
        """(alpha / rank) up down in the shape of the module's weight, fp32."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        return self.scale * (up @ down).view(shape)


@dataclass(frozen=True)
class Lora:
    """Factors by part ("backbone", "text_encoder", ...) and module of a model.

    dialect: of the file they came from. notes: what a reader of the file should know. metadata:
    the file's own, and what is to be written beside the factors.
    """

    spec: ModelSpec
    parts: Mapping[str, Mapping[str, Factor]]
    dialect: str = "snoopi"
    files: Sequence[Path] = ()
    notes: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


class _Source(NamedTuple):
    """A file with what lies beside it: peft's config, and the network its folder names."""

    weights: Weights
    config: _Config | None
    part: str | None
    files: tuple[Path, ...]


def read_lora(
    path: Path | str,
    spec: ModelSpec | str,
    part: str | None = None,
    alpha: float | None = None,
) -> Lora:
    """The LoRA in a file or a folder of peft's or diffusers', its dialect known by the names.

    spec: the model (or its preset's name) whose modules it changes. part: the network, for names
    that do not tell and fit several. alpha: for a file that holds none; else it is the rank, and a
    note says so. Factors have the shapes their modules need: a 1x1 convolution's serve a Linear,
    and the reverse.

    Raises ValueError listing every name that is unknown, doubled, lacks its other half, has a wrong
    shape or is not finite, and naming adapters that are no plain LoRA (DoRA, LoHa, LoKr, ...).
    """
    spec = model(spec) if isinstance(spec, str) else spec
    if part is not None and part not in spec.parts():
        raise ValueError(f"{spec.arch} has no part {part!r}; it has {', '.join(spec.parts())}")
    if alpha is not None:
        _check_alpha(alpha, "alpha")
    path = Path(path)
    reader = _Reader(path, spec, part)
    for source in _sources(path):
        reader.take(source)
    return reader.lora(alpha)


def spec_of(arch: str) -> ModelSpec:
    """The model that --arch names: a preset, or a model folder (or its snoopi.json)."""
    path = Path(arch)
    folder = path.parent if path.name == SPEC_FILE else path
    return read_spec(folder)[0] if (folder / SPEC_FILE).is_file() else model(arch)


def _sources(path: Path) -> list[_Source]:
    if not path.is_dir():
        beside = path.with_name(CONFIG)
        if path.stem == "adapter_model" and beside.is_file():
            return [_adapter(path, beside, None)]
        weights = open_weights(path)
        return [_Source(weights, None, None, weights.files)]
    if (path / CONFIG).is_file():
        return [_adapter(_first(path, "adapter_model"), path / CONFIG, None)]
    folders = [(path / prefix[:-1], part) for prefix, part in PREFIXES]
    if found := [item for item in folders if (item[0] / CONFIG).is_file()]:
        return [_adapter(_first(f, "adapter_model"), f / CONFIG, part) for f, part in found]
    return _sources(_first(path, "pytorch_lora_weights"))


def _first(folder: Path, stem: str) -> Path:
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise ValueError(
        f"{folder} is no folder of a LoRA: expected {stem}.safetensors or {stem}.bin in it"
    )


def _adapter(path: Path, config: Path, part: str | None) -> _Source:
    weights = open_weights(path)
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    return _Source(weights, _Config(config, data), part, (*weights.files, config))


class _Config(dict[str, Any]):
    """peft's LoraConfig: rank and alpha of all modules, and of those that a pattern matches."""

    def __init__(self, path: Path, data: Any) -> None:
        super().__init__(data if isinstance(data, dict) else {})
        self.path = path
        if not isinstance(data, dict):
            raise ValueError(f"{path}: the LoRA's config must be an object, got {data!r:.80}")
        kind = self.get("peft_type") or "LORA"
        if kind != "LORA":
            raise ValueError(f"{path} is of a {kind!r} adapter, not of a LoRA")
        if self.get("use_dora"):
            raise ValueError(f"{path} is of DoRA, which is no plain LoRA")
        start = self.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(CHANGED_BASE):
            raise ValueError(
                f"{path}: with init_lora_weights = {start!r} the base was changed, too; "
                f"save it converted (path_initial_model_for_weight_conversion)"
            )
        self.ranks = self._patterns("rank_pattern")
        self.alphas = self._patterns("alpha_pattern")

    def _patterns(self, name: str) -> list[tuple[re.Pattern[str], Any]]:
        patterns = self.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{self.path}: {name} must be an object, got {patterns!r:.80}")
        try:
            # peft's rule: the pattern is the end of the name, whole parts of it.
            return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{self.path}: {name} holds a bad pattern: {error}") from error

    def alpha(self, module: str, rank: int) -> float:
        """What it says for a module; ValueError if its rank there is another than the tensors'."""
        said = self._value(self.ranks, "r", module)
        if said != rank:
            raise ValueError(f"has rank {rank} at {module}, but its config says {said!r}")
        alpha = self._value(self.alphas, "lora_alpha", module)
        _check_alpha(alpha, f"lora_alpha of {module}")
        # rsLoRA multiplies by alpha / sqrt(rank); alpha sqrt(rank) says that in our words.
        return float(alpha) * math.sqrt(rank) if self.get("use_rslora") else float(alpha)

    def _value(self, patterns: list[tuple[re.Pattern[str], Any]], name: str, module: str) -> Any:
        for pattern, value in patterns:
            if pattern.match(module):
                return value
        value = self.get(name)
        return _PEFT_DEFAULT if value is None else value


def _check_alpha(alpha: Any, what: str) -> None:
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{what} must be a finite number other than 0, got {alpha!r}")


@dataclass
class _Slot:
    """What a file says of one module: its tensors by role, and the config that covers it."""

    spelled: str
    config: _Config | None
    entries: dict[str, tuple[str, Entry]] = field(default_factory=dict)


class _Reader:
    """Collects the tensors of one LoRA, and all the trouble with them."""

    def __init__(self, path: Path, spec: ModelSpec, part: str | None) -> None:
        self.path, self.spec, self.part = path, spec, part
        self.networks: dict[str, Modules] = {}
        self.slots: dict[tuple[str, str], _Slot] = {}
        self.dialects: set[str] = set()
        self.trouble: list[str] = []
        self.notes: list[str] = []
        self.files: list[Path] = []
        self.metadata: dict[str, str] = {}

    def modules(self, part: str) -> Modules:
        """The modules of a part, made when first asked for."""
        if part not in self.networks:
            if part not in self.spec.parts():
                raise ValueError(f"{self.path} is of a {part}, which {self.spec.arch} has not")
            self.networks[part] = Modules(self.spec, part)
        return self.networks[part]

    def take(self, source: _Source) -> None:
        """Place every name of one file."""
        weights = source.weights
        self.files += source.files
        self.metadata |= _kept(weights.metadata)
        self._refuse(weights.entries)
        parsed = {name: parse(name) for name in weights.entries}
        keys = [key for key in parsed.values() if key is not None]
        self.dialects.add(dialect := self._dialect(keys, list(parsed)))
        bare = source.part or self.part or self._guess([key for key in keys if not key.prefix])
        configs = _configs(source, keys)
        for key in keys:
            self._place(key, PARTS.get(key.prefix, bare), configs, weights.entries[key.name])
        self._rest([name for name, key in parsed.items() if key is None], dialect, bare)

    def _refuse(self, names: Mapping[str, Entry]) -> None:
        for name in names:
            for pattern, what in REFUSED:
                if re.search(pattern, name):
                    raise ValueError(f"{self.path} holds {what} ({name}): only LoRA can be read")

    def _dialect(self, keys: Sequence[Key], names: Sequence[str]) -> str:
        """The file's one dialect; ValueError for none, a mixture, or several adapters."""
        if not any(key.role != "alpha" for key in keys):
            some = f"such as {names[0]!r}" if names else "there is none"
            raise ValueError(f"{self.path} holds no LoRA: no name of a factor in it ({some})")
        found = {key.dialect for key in keys} - {""}
        if found == {"diffusers", "diffusers-old"}:  # of a time when text encoders lagged behind
            found = {"diffusers"}
        if len(found) > 1:
            raise ValueError(f"{self.path} mixes the dialects {', '.join(sorted(found))}")
        adapters = {key.adapter for key in keys if key.adapter}
        if len(adapters) > 1:
            raise ValueError(
                f"{self.path} holds the adapters {', '.join(sorted(adapters))}: save one"
            )
        dialect = next(iter(found))
        sgm = ("input_blocks_", "middle_block_", "output_blocks_")
        if dialect == "kohya" and any(key.module.startswith(sgm) for key in keys):
            return "kohya-sgm"
        return dialect

    def _guess(self, keys: Sequence[Key]) -> str:
        """The network that most of the names are of that do not say it."""
        if not keys:
            return "backbone"
        counts = {
            part: sum(key.module in self.modules(part).dotted for key in keys)
            for part in self.spec.parts()
            if part != "vae"
        }
        best = [part for part, count in counts.items() if count == max(counts.values())]
        if len(best) > 1 and counts[best[0]]:
            raise ValueError(f"{self.path} fits {' and '.join(best)}: say which by --part")
        return best[0]

    def _place(self, key: Key, part: str, configs: Mapping[str, _Config], entry: Entry) -> None:
        try:
            module = self.modules(part).find(key.module, key.dialect == "kohya")
        except LookupError as error:
            self.trouble.append(f"{key.name}: {error.args[0]} of the {part}")
            return
        slot = self.slots.setdefault((part, module), _Slot(key.module, configs.get(key.prefix)))
        if key.role in slot.entries:
            other = slot.entries[key.role][0]
            self.trouble.append(f"{key.name} and {other} are both {part} {module}'s {key.role}")
        slot.entries[key.role] = (key.name, entry)

    def _rest(self, names: Sequence[str], dialect: str, bare: str) -> None:
        """A live state dict holds the model's own tensors, too; anything else is trouble."""
        own = [n for n in names if dialect == "peft-live" and self._is_base(n, bare)]
        self.trouble += [f"has an unexpected {name}" for name in names if name not in set(own)]
        if own:
            self.notes.append(f"left out: {len(own)} tensors of the model itself")

    def _is_base(self, name: str, bare: str) -> bool:
        prefix, rest = split(name)
        tensors = self.modules(PARTS.get(prefix, bare)).tensors
        rest = rest.replace(".base_layer.", ".")
        return rest in tensors or f"text_model.{rest}" in tensors or bool(BUFFERS.fullmatch(rest))

    def lora(self, alpha: float | None) -> Lora:
        """The LoRA, once all is placed."""
        parts: dict[str, dict[str, Factor]] = {}
        for (part, module), slot in self._in_order():
            try:
                factor = _factor(slot, self.networks[part].shapes[module], f"{part} {module}")
            except ValueError as error:
                self.trouble.append(str(error))
            else:
                parts.setdefault(part, {})[module] = factor
        if self.trouble:
            where = f"{self.path} is no LoRA of {self.spec.arch}"
            raise ValueError(trouble_line(where, self.trouble))
        silent = [f for factors in parts.values() for f in factors.values() if f.alpha is None]
        if silent:
            total = sum(len(factors) for factors in parts.values())
            what = "alpha = rank, a scale of 1," if alpha is None else f"alpha = {alpha:g}"
            self.notes.append(f"no alpha for {len(silent)} of {total} modules: {what} is taken")
            if alpha is not None:
                parts = {
                    p: {n: _with_alpha(f, alpha) for n, f in fs.items()} for p, fs in parts.items()
                }
        dialect = "+".join(sorted(self.dialects))
        return Lora(self.spec, parts, dialect, self.files, self.notes, self.metadata)

    def _in_order(self) -> list[tuple[tuple[str, str], _Slot]]:
        """The slots in the order of the networks' modules."""
        places = {
            (part, module): (list(self.spec.parts()).index(part), i)
            for part, modules in self.networks.items()
            for i, module in enumerate(modules.shapes)
        }
        return sorted(self.slots.items(), key=lambda item: places[item[0]])


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a header goes into a file of another dialect: not our words, nor kohya's hashes."""
    return {
        name: value
        for name, value in metadata.items()
        if name not in ("format", METADATA) and not name.startswith("sshs_")
    }


def _configs(source: _Source, keys: Sequence[Key]) -> dict[str, _Config]:
    """The config of each prefix in a file: beside it, or in its metadata."""
    prefixes = {key.prefix for key in keys}
    if source.config is not None:
        return dict.fromkeys(prefixes, source.config)
    path, text = source.weights.path, source.weights.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {METADATA} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: its {METADATA} must be an object, got {data!r:.80}")
    mine = {p: {k[len(p) :]: v for k, v in data.items() if k.startswith(p)} for p in prefixes}
    return {p: _Config(path, config) for p, config in mine.items() if config}


def _with_alpha(factor: Factor, alpha: float) -> Factor:
    return Factor(factor.down, factor.up, alpha) if factor.alpha is None else factor


def _factor(slot: _Slot, shape: Shape, where: str) -> Factor:
    """The factors in the shapes that a weight of `shape` needs; ValueError says what is wrong."""
    missing = [role for role in ("down", "up") if role not in slot.entries]
    if missing:
        names = ", ".join(name for name, _ in slot.entries.values())
        raise ValueError(f"{names} has no other half ({where} lacks {' and '.join(missing)})")
    (down_name, down), (up_name, up) = slot.entries["down"], slot.entries["up"]
    rank = down.shape[0] if down.shape else 0
    if rank < 1:
        raise ValueError(f"{down_name} must have a rank, got {list(down.shape)}")
    square = (1,) * len(shape[2:])
    factor_down = _shaped(down_name, down, (rank, *shape[1:]), where)
    factor_up = _shaped(up_name, up, (shape[0], rank, *square), where)
    return Factor(factor_down, factor_up, _alpha(slot, rank))


def _shaped(name: str, entry: Entry, shape: Shape, where: str) -> Tensor:
    """A tensor read in a shape that it has but for ones at the end."""
    if _squeezed(entry.shape) != _squeezed(shape):
        raise ValueError(f"{name} must be {list(shape)} for {where}, got {list(entry.shape)}")
    if not entry.dtype.is_floating_point:
        raise ValueError(f"{name} must be of a floating type, got {entry.dtype}")
    value = entry.read().reshape(shape)
    if not bool(torch.isfinite(value.float()).all()):
        raise ValueError(f"{name} has values that are not finite")
    return value


def _squeezed(shape: Shape) -> Shape:
    """A matrix's shape of a 1x1 convolution's; any other as it is."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _alpha(slot: _Slot, rank: int) -> float | None:
    said = None if slot.config is None else slot.config.alpha(slot.spelled, rank)
    if "alpha" not in slot.entries:
        return said
    name, entry = slot.entries["alpha"]
    if math.prod(entry.shape) != 1:
        raise ValueError(f"{name} must be one number, got {list(entry.shape)}")
    alpha = float(entry.read().reshape(()))
    _check_alpha(alpha, name)
    if said is not None and not math.isclose(alpha, said, rel_tol=1e-3):
        raise ValueError(f"{name} is {alpha:g}, but the config says {said:g}")
    return alpha
