"""What the process keeps and what it returns: page faults of warm work, memory of loading."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from snoopi import memory
from snoopi.folders import load_weights

MIB = 1 << 20
LINUX = Path("/proc/self/clear_refs").exists() and memory._glibc() is not None
pytestmark = pytest.mark.skipif(not LINUX, reason="needs Linux and glibc")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    memory.give_back()
    yield
    memory.give_back()


def megabytes(what: str) -> float:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{what}:"))
    return int(line.split()[1]) / 1024


FAULTS = """
import resource
import torch
from torch import nn
from snoopi import memory

def faults(work):  # page faults of a warm run, of several the fewest: not every hole is reused
    found = []
    with torch.no_grad():
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            work()
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])

size = 36 << 20  # bytes of a tensor: beyond every threshold of glibc's own
pages = size // 4096
x = torch.zeros(size // 4)
net = nn.Sequential(nn.GELU(), nn.SiLU(), nn.Tanh())
plain = faults(lambda: net(x))
assert plain > 2 * pages, plain
assert memory.keep_freed()
kept = faults(lambda: net(x))
assert kept < plain // 20, (plain, kept)
assert memory.give_back()
# What small blocks keep apart stays in the heap and is used again; this is too big for any of it.
big = faults(lambda: torch.ones(16 * size // 4))
assert big > 15 * pages, (pages, big)
"""


def test_warm_work_faults_no_pages_in() -> None:
    """In a fresh process: what this one has freed in between leaves holes or not."""
    subprocess.run([sys.executable, "-c", FAULTS], check=True)


RETURNED = """
import torch
from snoopi import memory
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))

memory.keep_freed()
before = resident()
for _ in range(3):
    torch.ones(16 << 20)
assert resident() > before + 60, (before, resident())
memory.give_back()
assert resident() < before + 8, (before, resident())
"""


def test_what_was_kept_is_returned() -> None:
    """In a fresh process: this one has room among what it has freed."""
    subprocess.run([sys.executable, "-c", RETURNED], check=True)


def test_nothing_happens_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(MIB)
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    assert not memory.keep_freed() and not memory.give_back()
    memory.drop_pages(x)
    assert (x == 1).all()


def layers(count: int, side: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))


@pytest.mark.parametrize(
    ("stored", "dtype", "widen", "size"),
    [
        (torch.float32, torch.bfloat16, False, 32),
        (torch.float16, None, True, 64),
        (torch.float32, None, False, 0),
        (torch.bfloat16, torch.bfloat16, False, 0),
    ],
)
def test_loading_needs_the_network_and_one_tensor(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None, widen: bool, size: int
) -> None:
    """The peak is the weights as they will be (MiB); without a conversion they stay mapped."""
    state = {k: torch.ones(v.shape, dtype=stored) for k, v in layers(16, 1024).state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    del state
    memory.give_back()
    net = layers(16, 1024)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, mapped = megabytes("VmRSS"), megabytes("RssFile")
    load_weights(net, tmp_path / "x.safetensors", dtype, widen)
    assert megabytes("VmHWM") - before < size + 4 + 6
    assert megabytes("RssFile") - mapped < 3
    assert all((p == 1).all() for p in net.parameters())


def test_dropping_pages_spares_the_neighbours(tmp_path: Path) -> None:
    x = torch.arange(8 * 4096 // 4, dtype=torch.int32)
    want = x.clone()
    memory.drop_pages(x[1000:5000])  # not mapped from a file: whole pages inside become zeros
    first, last = 1000, 5000
    assert torch.equal(x[:first], want[:first]) and torch.equal(x[last:], want[last:])


def test_weights_that_were_read_leave_memory_unless_written(tmp_path: Path) -> None:
    """Files that are mapped and clean; of a written one every value stays, and it stays."""
    values = {name: torch.randn(4 << 20) for name in ("read", "written")}
    mapped = {}
    for name, value in values.items():
        save_file({name: value}, tmp_path / name)
        with safe_open(tmp_path / name, framework="pt") as file:
            mapped[name] = file.get_tensor(name)
    mapped["written"][7] = 3.0
    assert all(x.sum().isfinite() for x in mapped.values())
    before = megabytes("RssFile")
    memory.drop_read(mapped.values())
    assert 14 < before - megabytes("RssFile") < 18
    values["written"][7] = 3.0
    assert all(torch.equal(mapped[name], values[name]) for name in values)
    memory.drop_read([torch.ones(3)])  # not mapped from a file


def test_importing_the_package_costs_next_to_nothing() -> None:
    """`import snoopi` loads neither torch nor anything of ours; the networks load no compiler."""
    program = """
        import sys, snoopi
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        from snoopi import zoo
        for part in ("backbone", "vae", "text_encoder"):
            zoo.build("debug", part)
        heavy = {"torch._dynamo", "torch._inductor", "sympy", "PIL.PngImagePlugin", "diffusers"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_what_lies_in_a_file_is_dropped_and_read_again(tmp_path: Path) -> None:
    """Only whole weights of a mapping; a tensor in ordinary memory keeps its values."""
    weights = {"a": torch.randn(1 << 16), "b": torch.randn(1 << 16)}
    save_file(weights, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        mapped = {name: file.get_tensor(name) for name in weights}
    drop = memory.dropper()
    before = megabytes("RssFile")
    for value in mapped.values():
        assert value.sum().isfinite()
        drop(value)
    assert megabytes("RssFile") - before < 0.2
    for name, value in mapped.items():
        assert torch.equal(value, weights[name])
        drop(weights[name])
        assert torch.equal(weights[name], value)
