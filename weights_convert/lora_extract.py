"""A LoRA from two full checkpoints: the best low-rank stand-in for their difference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from snoopi.folders import SPEC_FILE, read_spec
from snoopi.zoo import ModelSpec
from weights_convert.convert import plan_all, targets
from weights_convert.detect import detect
from weights_convert.files import Entry, open_weights
from weights_convert.lora_files import Factor, Lora
from weights_convert.lora_names import Modules
from weights_convert.rules import Shape, trouble_line

# Singular values below this share of the largest are rounding, not change.
_NOISE = 1e-7


class Module(NamedTuple):
    """How well ranks serve one module: kept[i], of the energy `total`, at the i-th rank."""

    part: str
    name: str
    shape: Shape
    rank: int
    kept: tuple[float, ...]
    total: float


@dataclass
class Extraction:
    """A LoRA, and how much of the difference it holds.

    Energy: the sum of squared singular values, which is the difference's squared norm. ranks: 1, 2,
    4, ... and the rank asked for. unheld: the difference's norm by name, where no LoRA can hold it
    (norms, biases, embeddings). equal: modules without any difference, by part.
    """

    spec: ModelSpec
    ranks: tuple[int, ...]
    parts: dict[str, dict[str, Factor]] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)
    equal: dict[str, int] = field(default_factory=dict)
    unheld: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def energy(self) -> list[float]:
        """The share of the modules' energy that each of `ranks` keeps."""
        total = math.fsum(m.total for m in self.modules)
        return [math.fsum(m.kept[i] for m in self.modules) / total for i in range(len(self.ranks))]

    def lora(self) -> Lora:
        """The LoRA, with the energy kept in its metadata."""
        kept = {f"{m.part}.{m.name}": round(m.kept[-1] / m.total, 6) for m in self.modules}
        energy = dict(zip(map(str, self.ranks), self.energy(), strict=True))
        said = {"rank": self.ranks[-1], "energy": energy, "modules": kept}
        return Lora(self.spec, self.parts, metadata={"snoopi_extract": json.dumps(said)})


def extract(
    base: Path | str,
    tuned: Path | str,
    rank: int,
    arch: str | None = None,
    parts: Sequence[str] | None = None,
) -> Extraction:
    """The LoRA of rank `rank` nearest to tuned - base, module by module, in the Frobenius norm.

    base, tuned: model folders, or checkpoints that `convert` reads. Every Linear and Conv2d gets
    the first `rank` singular vectors of its difference (fewer, where it has fewer), with alpha =
    rank: a scale of 1. parts: which networks; None: the backbone and the text encoders that both
    have. arch: for what the weights cannot say. One module's difference is in memory at a time.

    Raises ValueError for checkpoints of different architectures, without any difference, or with
    values that are not finite.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    folders = [str(path) for path in (base, tuned) if (Path(path) / SPEC_FILE).is_file()]
    arch = arch or next(iter(folders), None)  # a model folder tells what the other one is
    spec, ours = _open(Path(base), arch)
    _, theirs = _open(Path(tuned), arch)
    result = Extraction(spec, (*(2**i for i in range((rank - 1).bit_length())), rank))
    for part in _parts(spec, ours, theirs, parts, result):
        _check_alike(part, ours[part], theirs[part], Path(tuned))
        _extract_part(part, ours[part], theirs[part], result)
    if not result.modules:
        what = f"; {len(result.unheld)} norms, biases or embeddings do" if result.unheld else ""
        raise ValueError(f"{base} and {tuned}: no Linear or Conv2d differs{what}")
    return result


def _open(path: Path, arch: str | None) -> tuple[ModelSpec, dict[str, Mapping[str, Entry]]]:
    """A checkpoint's networks in our names."""
    if not (path / SPEC_FILE).is_file():
        found = detect(path, arch)
        if not isinstance(found.spec, ModelSpec):
            raise ValueError(f"{path} is of tools (networks that measure), not of a model")
        plans = plan_all(found, path)
        return found.spec, {p.name: plans[p.name].forward(p.weights, None) for p in found.parts}
    spec, _ = read_spec(path)
    networks = {}
    for part in spec.parts():
        file = path / f"{part}.safetensors"
        if file.is_file():
            weights = open_weights(file)
            if weights.shapes() != targets(spec, part):
                raise ValueError(f"{file} does not fit its {SPEC_FILE}")
            networks[part] = weights.entries
    return spec, networks


def _parts(
    spec: ModelSpec,
    ours: Mapping[str, object],
    theirs: Mapping[str, object],
    asked: Sequence[str] | None,
    result: Extraction,
) -> list[str]:
    """The networks to compare; a note says which are not."""
    both = [part for part in spec.parts() if part in ours and part in theirs]
    if asked is None:
        asked = [part for part in both if part != "vae"]
        left = sorted((ours.keys() | theirs.keys()) - set(asked))
        if left:
            result.notes.append(f"not compared: {', '.join(left)}")
        if not asked:
            raise ValueError("the two have neither the backbone nor a text encoder in common")
    if missing := [part for part in asked if part not in both]:
        raise ValueError(f"{missing[0]} is not in both checkpoints; in both are {', '.join(both)}")
    return list(asked)


def _check_alike(
    part: str, ours: Mapping[str, Entry], theirs: Mapping[str, Entry], tuned: Path
) -> None:
    trouble = [f"lacks {name}" for name in ours if name not in theirs]
    trouble += [f"has an unexpected {name}" for name in theirs if name not in ours]
    trouble += [
        f"{name} must be {list(entry.shape)}, got {list(theirs[name].shape)}"
        for name, entry in ours.items()
        if name in theirs and theirs[name].shape != entry.shape
    ]
    if trouble:
        raise ValueError(trouble_line(f"{tuned} is of another {part}", trouble))


def _extract_part(
    part: str, ours: Mapping[str, Entry], theirs: Mapping[str, Entry], result: Extraction
) -> None:
    shapes = Modules(result.spec, part).shapes
    factors: dict[str, Factor] = {}
    for name, entry in ours.items():
        module, kind = name.rpartition(".")[::2]
        held = kind == "weight" and module in shapes
        difference = _difference(f"{part} {name}", entry, theirs[name])
        if difference is None:
            result.equal[part] = result.equal.get(part, 0) + held
        elif held:
            factors[module], kept, total = _low_rank(difference, result.ranks)
            rank = factors[module].rank
            result.modules.append(Module(part, module, entry.shape, rank, kept, total))
        else:
            result.unheld[f"{part}.{name}"] = float(difference.double().norm())
    if factors:  # in the network's order, not the file's
        result.parts[part] = {name: factors[name] for name in shapes if name in factors}


def _difference(name: str, ours: Entry, theirs: Entry) -> Tensor | None:
    """theirs - ours in fp32; None if it is zero."""
    a, b = ours.read(), theirs.read()
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"{name} must be of a floating type, got {a.dtype} and {b.dtype}")
    difference = b.float() - a.float()
    if not bool(torch.isfinite(difference).all()):
        raise ValueError(f"{name} has values that are not finite")
    return difference if bool(difference.any()) else None


def _low_rank(difference: Tensor, ranks: Sequence[int]) -> tuple[Factor, tuple[float, ...], float]:
    """The best factors of the last of `ranks`, the energy that each rank keeps, and all of it.

    The squared singular values are the eigenvalues of the smaller Gram matrix, in fp64: SD1.5's
    widest convolution, 1280 x 23040, is a matter of 1280 x 1280. With U its first eigenvectors,
    U U^T D is the best approximation, whatever rounding did to the small singular values.
    """
    d = difference.flatten(1).double()  # [out n]
    tall = d.shape[0] > d.shape[1]
    d = d.T if tall else d
    squares, vectors = torch.linalg.eigh(d @ d.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)  # the largest first
    total = float(squares.sum())
    rank = min(ranks[-1], int((squares.sqrt() > _NOISE * squares[0].sqrt()).sum()))
    kept = squares.cumsum(0)
    # Both factors get the square root of the singular values: neither is tiny in 16 bit.
    left = vectors[:, :rank]  # [m r]
    right = left.T @ d  # [r n]
    root = right.norm(dim=1).sqrt()  # [r]
    left, right = left * root, right / root[:, None]
    down, up = (left.T, right.T) if tall else (right, left)  # [r n], [out r]
    shape = difference.shape
    factor = Factor(
        down.float().reshape(rank, *shape[1:]).contiguous(),
        up.float().reshape(shape[0], rank, *(1 for _ in shape[2:])).contiguous(),
        float(rank),
    )
    return factor, tuple(float(kept[min(r, len(kept)) - 1]) for r in ranks), total
