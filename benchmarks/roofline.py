"""What the CUDA kernels could reach at best on A100 and H100, per real shape: ESTIMATES.

python -m benchmarks.roofline [--sass FILE|none] [--out FILE.md]

From a shape's sizes: operations, bytes and exponentials, and the time each would take alone. With a
disassembler (cuobjdump and nvdisasm) and nvcc also the kernel's instructions, counted in each
device's own machine code, and the time to issue them. Nothing here runs on a GPU.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from snoopi import errors

NAME = "benchmarks.roofline"
SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "nasa.cu"
ROWS = 16  # of a warp
TEXTS = 2  # a positive and a negative one


class Shape(NamedTuple):
    """One cross-attention of a model at batch 1: query tokens, heads, head dim, text tokens."""

    name: str
    m: int
    h: int
    d: int
    n: int

    @property
    def channels(self) -> int:
        return self.h * self.d

    @property
    def tiles(self) -> int:
        """Tiles of keys that a warp passes (csrc/cuda/nasa_launch.h)."""
        return TEXTS if self.n <= 80 else TEXTS * -(-self.n // self.key_tile)

    @property
    def key_tile(self) -> int:
        return 80 if self.n <= 80 else 48 if self.d == 160 else 64

    def attention_flops(self) -> float:
        """q k^T and p v of both texts."""
        return TEXTS * 4.0 * self.m * self.n * self.channels

    def projection_flops(self) -> float:
        return 2.0 * self.m * self.channels**2

    def attention_bytes(self) -> float:
        """q and z once, k and v of both texts once, in 16 bits."""
        return 2.0 * self.channels * (2 * self.m + TEXTS * 2 * self.n)

    def projection_bytes(self) -> float:
        """z, the result and the weights."""
        return 2.0 * self.channels * (2 * self.m + self.channels)

    def exponentials(self) -> float:
        return float(self.m * self.h * self.tiles * self.key_tile)

    def warp_tiles(self) -> float:
        """How often a warp passes its loop."""
        return float(-(-self.m // ROWS) * self.h * self.tiles)


class Device(NamedTuple):
    """A data sheet: dense 16-bit FLOP/s, bytes/s, multiprocessors and clock."""

    name: str
    arch: str
    flops: float
    bytes: float
    processors: int
    clock: float

    def matrix_us(self, flops: float) -> float:
        return flops / self.flops * 1e6

    def memory_us(self, size: float) -> float:
        return size / self.bytes * 1e6

    def exponential_us(self, count: float) -> float:
        return count / (16 * self.processors * self.clock) * 1e6

    def issue_us(self, instructions: float) -> float:
        return instructions / (4 * self.processors * self.clock) * 1e6


SHAPES = (
    Shape("SD1.5 64x64", 4096, 8, 40, 77),
    Shape("SD1.5 32x32", 1024, 8, 80, 77),
    Shape("SD1.5 16x16", 256, 8, 160, 77),
    Shape("SD2.1 64x64", 4096, 5, 64, 77),
    Shape("SDXL 64x64", 4096, 10, 64, 77),
    Shape("SDXL 32x32", 1024, 20, 64, 77),
    Shape("PixArt 512 px", 1024, 16, 72, 120),
    Shape("PixArt 1024 px", 4096, 16, 72, 120),
)
DEVICES = (
    Device("A100", "sm_80", 312e12, 2.0e12, 108, 1.41e9),
    Device("H100", "sm_90a", 990e12, 3.35e12, 132, 1.83e9),
)


def loop_instructions(sass: str, arch: str, d: int, key_tile: int) -> Counter[str]:
    """Opcodes in the loop over tiles of the kernel of 4 warps for bf16, without a projection.

    The loop is the shortest backward jump around all products. What it holds for rare cases (log-
    sum-exp, two results) is counted too. sass: cuobjdump's output, of any number of architectures.
    Raises ValueError if it lacks the kernel.
    """
    wanted = re.compile(rf"BFloat16ELi{d}ELi{key_tile}ELi4ELi2ELb[01]ELb0E")
    for part in re.split(r"code for (?=sm_)", sass)[1:]:
        if part.split(maxsplit=1)[0] != arch:
            continue
        for function in part.split("Function : ")[1:]:
            if wanted.search(function.split()[0]):
                return _loop(function)
    raise ValueError(
        f"no kernel for d = {d} with tiles of {key_tile} keys in the machine code for {arch}"
    )


def _loop(function: str) -> Counter[str]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", function)
    at = [int(address, 16) for address, _, _ in lines]
    products = [i for i, (_, opcode, _) in enumerate(lines) if opcode.startswith("HMMA")]
    spans = []
    for i, (_, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode == "BRA" and target and int(target[1], 16) in at:
            first = at.index(int(target[1], 16))
            if first <= products[0] and i >= products[-1]:
                spans.append((i - first, first, i))
    _, first, last = min(spans)
    return Counter(opcode.split(".")[0] for _, opcode, _ in lines[first : last + 1])


def machine_code() -> str | None:
    """The machine code for all devices, or None without the tools."""
    if shutil.which("nvcc") is None or shutil.which("cuobjdump") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "nasa.fatbin"
        command = ["nvcc", "-std=c++17", "-O3", "-fatbin", f"--threads={len(DEVICES)}"]
        for arch in (device.arch for device in DEVICES):
            command += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
        subprocess.run([*command, str(SOURCE), "-o", str(binary)], check=True)
        done = subprocess.run(["cuobjdump", "-sass", str(binary)], check=True, capture_output=True)
    return done.stdout.decode()


def bounds_table() -> list[str]:
    times = [f"{x.name} us: attention, then projection" for x in DEVICES]
    lines = [
        _row("shape", "attention GF", "MB", "projection GF", "MB", *times),
        _row(*["---"] * (5 + len(DEVICES))),
    ]
    for s in SHAPES:
        flops, size = s.attention_flops(), s.attention_bytes()
        more_flops, more_size = s.projection_flops(), s.projection_bytes()
        times = []
        for x in DEVICES:
            attention = (x.matrix_us(flops), x.memory_us(size), x.exponential_us(s.exponentials()))
            projection = (x.matrix_us(more_flops), x.memory_us(more_size))
            parts = (" / ".join(f"{t:.1f}" for t in part) for part in (attention, projection))
            times.append(", ".join(parts))
        name = f"{s.name}: m={s.m} h={s.h} d={s.d} n={s.n}"
        sizes = (flops / 1e9, size / 1e6, more_flops / 1e9, more_size / 1e6)
        lines.append(_row(name, *(f"{x:.2f}" for x in sizes), *times))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def instructions_table(sass: str) -> list[str]:
    titles = [f"{x.name}: instructions (HMMA, MUFU, LDSM)" for x in DEVICES]
    times = [f"{x.name} us: issue / HMMA" for x in DEVICES]
    lines = [
        _row("shape", "keys of a tile", *titles, *times),
        _row(*["---"] * (2 + 2 * len(DEVICES))),
    ]
    for s in SHAPES:
        counts, times = [], []
        for x in DEVICES:
            count = loop_instructions(sass, x.arch, s.d, s.key_tile)
            kinds = ", ".join(str(count[name]) for name in ("HMMA", "MUFU", "LDSM"))
            counts.append(f"{count.total()} ({kinds})")
            issue = x.issue_us(s.warp_tiles() * count.total())
            # m16n8k16 is 4096 FLOPs, some of them on padding.
            times.append(f"{issue:.1f} / {x.matrix_us(s.warp_tiles() * count['HMMA'] * 4096):.1f}")
        lines.append(_row(s.name, str(s.key_tile), *counts, *times))
    return lines


def report(sass: str | None) -> str:
    """Both tables, the second only with machine code."""
    lines = [
        "ESTIMATES, 16 bits, batch 1: the time that matrix products / memory / exponentials would",
        "take alone at the data sheet's rates.",
        "",
    ]
    lines += bounds_table()
    if sass is not None:
        lines += [
            "",
            "ESTIMATES: instructions of a warp (16 rows) for a tile of keys in the machine code of",
            f"{' and '.join(x.arch for x in DEVICES)}, and the time to issue them all, or only the "
            "products, at full occupancy.",
            "",
        ]
        lines += instructions_table(sass)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, or 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.sass == "none":
            sass = None
        else:
            sass = machine_code() if options.sass is None else Path(options.sass).read_text()
        text = report(sass)
        if options.out is not None:
            options.out.write_text(text)
    except (OSError, ValueError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    print(text if options.out is None else f"wrote {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description="What the CUDA kernels could reach at best on A100 and H100: estimates.",
    )
    parser.add_argument(
        "--sass", metavar="FILE|none", help="cuobjdump's output to read (default: make it)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to the screen")
    return parser


if __name__ == "__main__":
    sys.exit(main())
