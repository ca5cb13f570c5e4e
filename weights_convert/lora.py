"""LoRA files: converted between dialects, merged into a model, extracted from two of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snoopi import lora as adapters
from snoopi.report import text_table
from weights_convert.convert import DTYPES
from weights_convert.lora_extract import Extraction, extract
from weights_convert.lora_files import Factor, Lora, read_lora, spec_of
from weights_convert.lora_merge import merge
from weights_convert.lora_names import DIALECTS
from weights_convert.lora_write import check_target, write_lora
from weights_convert.rules import cast

__all__ = [
    "DIALECTS",
    "Extraction",
    "Factor",
    "Lora",
    "add_parsers",
    "cast_lora",
    "extract",
    "load_lora",
    "merge",
    "read_lora",
    "spec_of",
    "write_lora",
]


def load_lora(net: nn.Module, factors: Mapping[str, Factor]) -> None:
    """Put factors into a network as adapters (snoopi.lora), each with its own rank and multiplier.

    The network's own weights stop requiring gradients. Raises ValueError for a module that is not
    in the network, whose shape the factors do not fit, or that has an adapter already; the network
    is as before.
    """
    layers = dict(net.named_modules())
    for name, factor in factors.items():
        layer = layers.get(name)
        if layer is None or type(layer) not in (nn.Linear, nn.Conv2d):
            kind = "no module" if layer is None else type(layer).__name__
            raise ValueError(f"the LoRA's {name} must be a bare Linear or Conv2d, got {kind}")
        shape = layer.get_parameter("weight").shape
        square = (1,) * len(shape[2:])
        wanted = (factor.rank, *shape[1:]), (shape[0], factor.rank, *square)
        if (tuple(factor.down.shape), tuple(factor.up.shape)) != wanted:
            got = f"{list(factor.down.shape)} and {list(factor.up.shape)}"
            raise ValueError(f"the LoRA's {name} must be {wanted[0]} and {wanted[1]}, got {got}")
    net.requires_grad_(False)
    for name, factor in factors.items():
        weight = layers[name].get_parameter("weight")
        down, up = (f.to(weight.device, weight.dtype, copy=True) for f in (factor.down, factor.up))
        adapters.attach(layers[name], name, down, up, factor.scale)


def cast_lora(lora: Lora, dtype: torch.dtype | None) -> Lora:
    """The factors in another float type; ValueError where one is too large for it."""
    parts = {
        part: {
            name: Factor(
                cast(f"{part} {name}", factor.down, dtype),
                cast(f"{part} {name}", factor.up, dtype),
                factor.alpha,
            )
            for name, factor in factors.items()
        }
        for part, factors in lora.parts.items()
    }
    return dataclasses.replace(lora, parts=parts)


# --- commands -------------------------------------------------------------------------------------


def add_parsers(kinds: Any) -> None:
    """Register `lora`, `merge` and `extract`."""
    add = _parser(kinds, "lora", "a LoRA into another dialect", _lora)
    add("source", type=Path, metavar="SRC", help="the LoRA's file, or folder (peft, diffusers)")
    add("target", type=Path, metavar="DST", help="what to write: a .safetensors, for peft a folder")
    add("--to", choices=DIALECTS, required=True, help="the dialect")
    add("--arch", metavar="NAME", required=True, help="the LoRA's model: a preset or model folder")
    add("--dtype", choices=list(DTYPES), help="storage of the factors; None: as they are")
    _reading(add)

    add = _parser(kinds, "merge", "LoRAs into a model folder's weights", _merge)
    add("source", type=Path, metavar="SRC", help="a snoopi model folder")
    add("loras", type=Path, nargs="+", metavar="LORA", help="LoRA files or folders of any dialect")
    add("target", type=Path, metavar="DST", help="the model folder to write")
    add(
        "--scale",
        type=float,
        action="append",
        metavar="S",
        help="strength: once for all LoRAs, or once for each in their order; None: 1",
    )
    add("--arch", metavar="NAME", help="the recipe it becomes (lcm-lora-sd15); None: SRC's own")
    _reading(add)

    add = _parser(kinds, "extract", "a LoRA from two full checkpoints", _extract)
    add("base", type=Path, metavar="BASE", help="a model folder, or a checkpoint `convert` reads")
    add("tuned", type=Path, metavar="TUNED", help="the same architecture with other weights")
    add("target", type=Path, metavar="DST", help="what to write: a .safetensors, for peft a folder")
    add("--rank", type=int, default=64, help="of every module's factors")
    add("--to", choices=DIALECTS, default="diffusers", help="the dialect")
    add("--dtype", choices=list(DTYPES), default="fp32", help="storage of the factors")
    add("--arch", metavar="NAME", help="a preset or model folder, where weights do not tell")
    add(
        "--part", action="append", metavar="PART", help="networks to compare; None: all but the VAE"
    )
    add("--report", action="store_true", help="print the energy of every rank and module")


def _parser(kinds: Any, name: str, what: str, run: Any) -> Any:
    kind = kinds.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kind.set_defaults(run=run)
    return kind.add_argument


def _reading(add: Any) -> None:
    add("--part", metavar="PART", help="the network, where the names fit several (text_encoder_2)")
    add("--alpha", type=float, metavar="A", help="where the LoRA holds none; None: the rank")


def _lora(options: argparse.Namespace) -> None:
    lora = read_lora(options.source, spec_of(options.arch), options.part, options.alpha)
    dtype = DTYPES.get(options.dtype or "")
    write_lora(cast_lora(lora, dtype), options.target, options.to)
    print(_text(options.source, lora))
    print(f"wrote {options.target} ({options.to})")


def _merge(options: argparse.Namespace) -> None:
    scales = options.scale or [1.0]
    read = merge(
        options.source,
        options.loras,
        options.target,
        scales,
        options.arch,
        options.part,
        options.alpha,
    )
    for path, lora in zip(options.loras, read, strict=True):
        print(_text(path, lora))
    print(f"wrote {options.target} (scale {', '.join(f'{s:g}' for s in scales)})")


def _text(path: Path, lora: Lora) -> str:
    """What was read, network by network."""
    rows = [
        (
            part,
            str(len(factors)),
            _span([f.rank for f in factors.values()]),
            _span([f.scale for f in factors.values()]),
            f"{sum(f.down.numel() + f.up.numel() for f in factors.values()):,}",
        )
        for part, factors in lora.parts.items()
    ]
    table = text_table(("part", "modules", "rank", "alpha / rank", "parameters"), rows)
    return "\n".join([f"{path}: {lora.dialect}", table, *lora.notes, ""])


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _extract(options: argparse.Namespace) -> None:
    check_target(options.target, options.to)  # before minutes of work
    result = extract(options.base, options.tuned, options.rank, options.arch, options.part)
    lora = cast_lora(result.lora(), DTYPES[options.dtype])
    write_lora(lora, options.target, options.to)
    print(_report(result, options.report))
    print(f"wrote {options.target} ({options.to})")


def _report(result: Extraction, full: bool) -> str:
    """The energy kept: overall, and with `full` by rank and by module."""
    energy = result.energy()
    lines = [
        f"rank {result.ranks[-1]} keeps {energy[-1]:.4%} of the energy of {len(result.modules)} "
        f"modules; {sum(result.equal.values())} modules are equal and left out"
    ]
    if full:
        rows = [
            (str(rank), f"{share:.4%}") for rank, share in zip(result.ranks, energy, strict=True)
        ]
        lines += [text_table(("rank", "energy kept"), rows), ""]
        modules = sorted(result.modules, key=lambda m: m.kept[-1] / m.total)
        rows = [(f"{m.part} {m.name}", f"{m.kept[-1] / m.total:.4%}") for m in modules]
        lines += [text_table(("module", "energy kept"), rows), ""]
    else:
        worst = min(result.modules, key=lambda m: m.kept[-1] / m.total)
        share = worst.kept[-1] / worst.total
        lines.append(f"the least is kept of {worst.part} {worst.name}: {share:.4%}")
    if result.unheld:
        lost = sum(norm**2 for norm in result.unheld.values())
        held = sum(m.total for m in result.modules)
        lines.append(
            f"a LoRA cannot hold {len(result.unheld)} other differences (norms, biases, "
            f"embeddings): norm {lost**0.5:.4g}, {lost / (lost + held):.2%} of all the energy"
        )
    return "\n".join([*lines, *result.notes])
