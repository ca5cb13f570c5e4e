"""How LoRA files name the modules of a network and their factors, as data.

A kohya name ("lora_unet_down_blocks_0_...") cannot be taken apart by rule: it is looked up among
the model's modules, in diffusers' spelling and in the SGM repository's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from snoopi.models.clip import CLIPTextConfig
from snoopi.models.unet import UNetConfig
from snoopi.zoo import ModelSpec, build
from weights_convert.rules import Shape
from weights_convert.tables import unet_ldm_names

DIALECTS = ("diffusers", "peft", "kohya", "kohya-sgm", "snoopi")
PEFT = "base_model.model."

# Dialect and spelling of a name: the module, then which factor it is (A, a, down: the first).
_SPELLINGS = tuple(
    (dialect, re.compile(pattern))
    for dialect, pattern in (
        ("kohya", r"(?P<module>lora_[a-z0-9]+_[^.]+)\.lora_(?P<role>down|up)\.weight"),
        ("kohya", r"(?P<module>lora_[a-z0-9]+_[^.]+)\.(?P<role>alpha)"),
        ("diffusers", r"(?P<module>.+)\.lora_(?P<role>[AB])\.weight"),
        ("peft-live", r"(?P<module>.+)\.lora_(?P<role>[AB])\.(?P<adapter>[^.]+)\.weight"),
        (
            "diffusers-old",
            r"(?P<module>.+?)(\.processor)?\.to_(?P<part>[qkv]|out)_lora\.(?P<role>down|up)\.weight",
        ),
        ("diffusers", r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<role>down|up)\.weight"),
        ("snoopi", r"(?P<module>.+)\.lora_(?P<role>[ab])"),
        ("", r"(?P<module>.+)\.(?P<role>alpha)"),
    )
)
_ROLES = {"A": "down", "a": "down", "down": "down", "B": "up", "b": "up", "up": "up"}

# What other adapters are called, by what their names contain.
REFUSED = (
    (r"\.(dora_scale$|lora_magnitude_vector)", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.(oft_|boft_|oft_blocks)", "OFT"),
    (r"\.lora_mid\.", "a LoCon with a third factor"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding"),
    (r"\.lora_([AB](\.[^.]+)?|up|down)\.bias$", "a LoRA with biases"),
    (r"\.diff(_b)?$", "whole differences"),
)
# Initialisations after which the base is another one than the published.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# The networks in dotted names and in kohya's.
PREFIXES = (
    ("unet.", "backbone"),
    ("transformer.", "backbone"),
    ("backbone.", "backbone"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
)
KOHYA = (
    ("lora_unet_", "backbone"),
    ("lora_transformer_", "backbone"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
)
PARTS = dict((*PREFIXES, *KOHYA))
# Buffers that a whole state dict holds besides parameters.
BUFFERS = re.compile(r"(.*\.)?(position_ids|pos_embed\.pos_embed)")


class Modules:
    """The modules of a network that a LoRA can change, found by any spelling of their names."""

    def __init__(self, spec: ModelSpec, part: str) -> None:
        net, config = build(spec, part), spec.parts()[part]
        self.shapes: dict[str, Shape] = {
            name: tuple(m.weight.shape)
            for name, m in net.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d))
        }
        self.tensors = set(net.state_dict())
        self.dotted: dict[str, set[str]] = {}
        self.underscored: dict[str, set[str]] = {}
        self.sgm: dict[str, str] = {}
        for name in self.shapes:
            self._add(name, name)
            if isinstance(config, CLIPTextConfig):  # newer transformers have no such level
                self._add(name.removeprefix("text_model."), name)
        if isinstance(config, UNetConfig):
            for name, theirs in unet_ldm_names(config).items():
                module = name.removesuffix(".weight")
                if module in self.shapes:
                    self.sgm[module] = theirs.removesuffix(".weight")
                    self.underscored.setdefault(flat(self.sgm[module]), set()).add(module)

    def _add(self, spelling: str, name: str) -> None:
        self.dotted.setdefault(spelling, set()).add(name)
        self.underscored.setdefault(flat(spelling), set()).add(name)

    def find(self, spelling: str, underscored: bool) -> str:
        """The module of a spelling; LookupError where there is none, or more than one."""
        found = (self.underscored if underscored else self.dotted).get(spelling, set())
        if len(found) != 1:
            what = f"could be {' or '.join(sorted(found))}" if found else "is no module"
            raise LookupError(f"{spelling} {what}")
        return next(iter(found))


def flat(name: str) -> str:
    """kohya's spelling of a dotted name."""
    return name.replace(".", "_")


class Key(NamedTuple):
    """A name of a file taken apart. prefix: which network it says it is of, "" if it does not."""

    name: str
    dialect: str
    prefix: str
    module: str
    role: str
    adapter: str | None


def parse(name: str) -> Key | None:
    """A name taken apart; None if it is no factor and no alpha."""
    for dialect, pattern in _SPELLINGS:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        module, role = groups["module"], _ROLES.get(groups["role"], "alpha")
        if dialect == "kohya":
            for start, _ in KOHYA:
                if module.startswith(start):
                    return Key(name, dialect, start, module[len(start) :], role, None)
            return None
        prefix, module = split(module)
        if dialect == "diffusers" and name.startswith(PEFT):
            dialect = "peft"
        if (which := groups.get("part")) is not None:
            module += _old_part(module, which)
        return Key(name, dialect, prefix, module, role, groups.get("adapter"))
    return None


def split(name: str) -> tuple[str, str]:
    """The prefix that names a network ("" without one), and the rest."""
    name = name.removeprefix(PEFT)
    for prefix, _ in PREFIXES:
        if name.startswith(prefix):
            return prefix, name[len(prefix) :]
    return "", name


def _old_part(module: str, which: str) -> str:
    """The projection that old diffusers called to_out_lora, by where it was."""
    if module.endswith("self_attn"):  # a text encoder's
        return f".{which}_proj"
    return ".to_out.0" if which == "out" else f".to_{which}"
