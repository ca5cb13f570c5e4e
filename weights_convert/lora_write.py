"""LoRA files written, in five dialects; alpha is in each of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snoopi.errors import writing
from snoopi.models.unet import UNetConfig
from weights_convert.files import Entry, write_safetensors
from weights_convert.lora_files import CONFIG, METADATA, Factor, Lora
from weights_convert.lora_names import DIALECTS, PEFT, Modules, flat


def write_lora(lora: Lora, path: Path | str, dialect: str) -> None:
    """Write a LoRA: a .safetensors file, or for "peft" a folder (one for each of several networks).

    dialect: "diffusers" (alpha in the metadata, where load_lora_weights reads it), "peft", "kohya"
    (diffusers' module names), "kohya-sgm" (a UNet in the SGM repository's names) or "snoopi".
    Raises ValueError for a target that exists or a LoRA the dialect cannot hold, OSError for the
    disk; then nothing is written.
    """
    path = Path(path)
    check_target(path, dialect)
    if not any(lora.parts.values()):
        raise ValueError("the LoRA holds no module")
    if dialect == "peft":
        _write_peft(lora, path)
        return
    if dialect.startswith("kohya"):
        tensors, metadata = _kohya(lora, dialect), {}
    else:
        tensors, config = _dotted(lora, dialect)
        metadata = {METADATA: json.dumps(config, sort_keys=True)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, entries(tensors), {"format": "pt", **lora.metadata, **metadata})


def check_target(path: Path, dialect: str) -> None:
    """ValueError for a dialect there is not, or a path that it cannot be written to."""
    if dialect not in DIALECTS:
        raise ValueError(f"the dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
    if path.exists():
        raise ValueError(f"{path} exists already: choose another DST")
    if (dialect == "peft") == (path.suffix == ".safetensors"):
        what = "a folder" if dialect == "peft" else "a .safetensors file"
        raise ValueError(f"DST must be {what} for {dialect}, got {path.name}")


def entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Tensors as they are written."""
    return {name: _entry(value) for name, value in tensors.items()}


def _entry(value: Tensor) -> Entry:
    value = value.detach()
    return Entry(tuple(value.shape), value.dtype, lambda: value.cpu())


def _dotted(lora: Lora, dialect: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """diffusers' names or ours, and the configs of all parts under their prefixes."""
    down, up = (
        ("lora_A.weight", "lora_B.weight") if dialect == "diffusers" else ("lora_a", "lora_b")
    )
    unet = isinstance(lora.spec.backbone, UNetConfig)
    backbone = "unet" if unet else "transformer"
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part, factors in lora.parts.items():
        prefix = backbone if (part, dialect) == ("backbone", "diffusers") else part
        for name, factor in factors.items():
            tensors[f"{prefix}.{name}.{down}"] = factor.down
            tensors[f"{prefix}.{name}.{up}"] = factor.up
        configs |= {f"{prefix}.{k}": v for k, v in _config(factors).items()}
    return tensors, configs


def _config(factors: Mapping[str, Factor]) -> dict[str, Any]:
    """peft's LoraConfig of these factors: the commonest rank and alpha, and the exceptions."""
    ranks = {_pattern(name): factor.rank for name, factor in factors.items()}
    alphas = {_pattern(name): _number(factor.full_alpha) for name, factor in factors.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": [_pattern(name).removeprefix("^") for name in factors],
        "use_rslora": False,
        "use_dora": False,
    }


def _pattern(name: str) -> str:
    """A module in peft's patterns, which match the end of a name unless they start with ^.

    transformers 5 has no "text_model." level, the versions before it do: the end serves both.
    """
    short = name.removeprefix("text_model.")
    return f"^{name}" if short == name else short


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _write_peft(lora: Lora, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for part, factors in lora.parts.items():
                _write_adapter(
                    lora, factors, temporary / part if len(lora.parts) > 1 else temporary
                )
            temporary.chmod(0o755)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_adapter(lora: Lora, factors: Mapping[str, Factor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, factor in factors.items():
        tensors[f"{PEFT}{name}.lora_A.weight"] = factor.down
        tensors[f"{PEFT}{name}.lora_B.weight"] = factor.up
    metadata = {"format": "pt", **lora.metadata}
    write_safetensors(folder / "adapter_model.safetensors", entries(tensors), metadata)
    config = {"peft_type": "LORA", "bias": "none", "inference_mode": True, **_config(factors)}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _kohya(lora: Lora, dialect: str) -> dict[str, Tensor]:
    tensors = {}
    two = len(lora.spec.text) > 1
    starts = {"backbone": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_"}
    for part, factors in lora.parts.items():
        modules = Modules(lora.spec, part)
        if part == "backbone" and dialect == "kohya-sgm" and not modules.sgm:
            raise ValueError(f"kohya-sgm names UNets, not the backbone of {lora.spec.arch}")
        sgm = modules.sgm if dialect == "kohya-sgm" else {}
        for name, factor in factors.items():
            spelled = flat(sgm.get(name, name))
            if modules.underscored[spelled] != {name}:
                both = " and ".join(sorted(modules.underscored[spelled]))
                raise ValueError(f"kohya's names do not tell {both} apart")
            key = f"{starts.get(part, 'lora_te2_')}{spelled}"
            tensors[f"{key}.lora_down.weight"] = factor.down
            tensors[f"{key}.lora_up.weight"] = factor.up
            tensors[f"{key}.alpha"] = torch.tensor(factor.full_alpha)
    return tensors
