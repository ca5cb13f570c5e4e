"""One engine for all layouts: which tensor of a file becomes which parameter, and back.

A Layout says, for the names of a network, where a file keeps them. `plan` runs it against a file:
every parameter is filled once, every tensor used or dropped on purpose, all shapes equal; else one
error lists all the trouble. `Plan.forward` gives the network's tensors, `backward` the file's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from weights_convert.files import Entry

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """`target` (a name, or the beginning of names up to a dot) is kept under `source`.

    part: (i, n): it is the i-th of n equal parts of the source's first axis. transposed: the source
    is its transpose. conv: a matrix is kept as a 1x1 convolution.
    """

    target: str
    source: str
    part: tuple[int, int] = (0, 1)
    transposed: bool = False
    conv: bool = False


@dataclass(frozen=True)
class Layout:
    """How a file names the parameters of one network.

    rules: the longest matching one counts; "" matches all. prefix: before every name of the file.
    aliases: regular expressions over the file's names (without prefix) and what they stand for.
    drop: regular expressions of names (without prefix) that are left out on purpose.
    """

    rules: Sequence[Rule]
    prefix: str = ""
    aliases: Sequence[tuple[str, str]] = ()
    drop: Sequence[str] = ()


IDENTITY = (Rule("", ""),)


class Item(NamedTuple):
    """One parameter: where it comes from, and its shape in the network."""

    target: str
    source: str
    rule: Rule
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """A network's parameters, each with its place in a file. dropped: names left out on purpose."""

    items: Sequence[Item]
    dropped: Sequence[str] = field(default=())

    def forward(self, source: Mapping[str, Entry], dtype: torch.dtype | None) -> dict[str, Entry]:
        """The network's tensors, in the order in which the file holds them."""
        order = {name: i for i, name in enumerate(source)}
        items = sorted(self.items, key=lambda item: (order[item.source], item.rule.part))
        return {item.target: _forward(item, source[item.source], dtype) for item in items}

    def backward(self, network: Mapping[str, Entry]) -> dict[str, Entry]:
        """The file's tensors, from the network's."""
        groups: dict[str, list[Item]] = {}
        for item in self.items:
            groups.setdefault(item.source, []).append(item)
        return {name: _backward(items, network) for name, items in groups.items()}


def names(targets: Iterable[str], layout: Layout) -> dict[str, tuple[str, Rule]]:
    """Each parameter's name in the file, with the rule that says so."""
    rules = {rule.target: rule for rule in layout.rules}
    found = {}
    for target in targets:
        rule = next((rules[start] for start in _starts(target) if start in rules), None)
        if rule is None:
            raise ValueError(f"the layout has no rule for {target}")
        found[target] = (layout.prefix + rule.source + target[len(rule.target) :], rule)
    return found


def _starts(name: str) -> Iterable[str]:
    """The name, then its beginnings up to each dot, the longest first, then nothing."""
    yield name
    for match in reversed(list(re.finditer(r"\.", name))):
        yield name[: match.end()]
    yield ""


def plan(
    targets: Mapping[str, Shape],
    layout: Layout,
    source: Mapping[str, Entry],
    rename: Callable[[str], str] = lambda name: name,
) -> tuple[Plan, list[str]]:
    """The plan and its trouble: what is missing, misshapen, or neither used nor dropped.

    targets: the network's names and shapes. source: the file's tensors that begin with the layout's
    prefix. rename: another spelling of the file's names (SD1's averaged weights).
    """
    real = _aliased(source, layout)
    items, trouble, used = [], [], set()
    for target, (name, rule) in names(targets, layout).items():
        found = real.get(rename(name))
        if found is None:
            trouble.append(f"lacks {rename(name)} (for {target})")
            continue
        used.add(found)
        shape = targets[target]
        wanted = source_shape(shape, rule)
        if not _same(source[found].shape, wanted):
            got = list(source[found].shape)
            trouble.append(f"{found} must be {list(wanted)}, got {got}")
            continue
        counter = target.endswith("num_batches_tracked")
        if source[found].dtype.is_floating_point == counter:
            kind = "an integer" if counter else "a floating"
            trouble.append(f"{found} must be of {kind} type, got {source[found].dtype}")
            continue
        items.append(Item(target, found, rule, shape))
    dropped = []
    for name in source:
        if name in used:
            continue
        if any(re.fullmatch(pattern, name[len(layout.prefix) :]) for pattern in layout.drop):
            dropped.append(name)
        else:
            trouble.append(f"has an unexpected {name}")
    return Plan(items, dropped), trouble


def _aliased(source: Mapping[str, Entry], layout: Layout) -> dict[str, str]:
    """The layout's spelling of each of the file's names; its own spelling goes before an alias."""
    real = {name: name for name in source}
    for name in source:
        rest = name[len(layout.prefix) :]
        for pattern, stands_for in layout.aliases:
            other, count = re.subn(pattern, stands_for, rest)
            if count:
                real.setdefault(layout.prefix + other, name)
    return real


def source_shape(shape: Shape, rule: Rule) -> Shape:
    """The shape in the file of a parameter's shape in the network."""
    shape = shape[::-1] if rule.transposed else shape
    shape = (*shape, 1, 1) if rule.conv and len(shape) == 2 else shape
    return (shape[0] * rule.part[1], *shape[1:]) if rule.part[1] > 1 else shape


def _same(a: Shape, b: Shape) -> bool:
    """Equal, or a 1x1 convolution beside a matrix: files keep either."""
    if a == b:
        return True
    short, long = sorted((a, b), key=len)
    return len(short) == 2 and len(long) == 4 and long == (*short, 1, 1)


def _forward(item: Item, entry: Entry, dtype: torch.dtype | None) -> Entry:
    def read() -> Tensor:
        value = entry.read()
        i, n = item.rule.part
        value = value.chunk(n)[i] if n > 1 else value
        value = value.T if item.rule.transposed else value
        return cast(item.target, value.reshape(item.shape), dtype)

    floating = entry.dtype.is_floating_point
    return Entry(item.shape, dtype if dtype and floating else entry.dtype, read)


def cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another float type; ValueError where finite values would not stay so."""
    if dtype is None or value.dtype == dtype or not value.is_floating_point():
        return value
    result = value.to(dtype)
    if not _finite(result) and bool((value.isfinite() & ~result.isfinite()).any()):
        largest = float(value[value.isfinite()].abs().max())
        raise ValueError(f"{name} reaches {largest:g}, too large for {dtype}: keep bf16 or fp32")
    return result


def _finite(value: Tensor) -> bool:
    """Whether all are finite, without a copy: NaN and infinities reach the minimum or maximum."""
    return not value.numel() or all(bool(end.isfinite()) for end in torch.aminmax(value))


def _backward(items: Sequence[Item], network: Mapping[str, Entry]) -> Entry:
    items = sorted(items, key=lambda item: item.rule.part)
    entries = [network[item.target] for item in items]
    rule = items[0].rule
    shape = source_shape(items[0].shape, rule)

    def read() -> Tensor:
        values = [entry.read() for entry in entries]
        value = values[0] if len(values) == 1 else torch.cat(values)
        value = value.T if rule.transposed else value
        return value.reshape(shape).contiguous()

    return Entry(shape, entries[0].dtype, read)


def trouble_line(where: str, trouble: Sequence[str], most: int = 5) -> str:
    """One line that lists the first of it and counts the rest."""
    more = f"; and {len(trouble) - most} more" if len(trouble) > most else ""
    return f"{where}: {'; '.join(trouble[:most])}{more}"
