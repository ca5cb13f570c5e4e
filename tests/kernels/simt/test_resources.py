"""What nvcc makes of the kernels, which needs no GPU: registers, spills, shared memory, HMMA."""

import re
import shutil
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from simt_build import CUDA, cached, nvcc_path, sources
from simt_cases import Call, arguments, make

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
REGISTERS = 65536  # of a multiprocessor, on all of them
# Blocks of a multiprocessor that registers must allow, by head dim; fewer leave it idle.
BLOCKS_OF_128 = {40: 4, 64: 2, 72: 2, 80: 2, 160: 2}
# Shared memory at 64 rows and two texts of 77 tokens, KiB: what fits beside other blocks.
SHARED_KIB = {40: 40, 64: 55, 72: 62, 80: 67, 160: 127}
A100, H100 = 163 * 1024, 227 * 1024

needs_nvcc = pytest.mark.skipif(nvcc_path() is None, reason="needs nvcc (CUDA toolkit)")


@dataclass(frozen=True)
class Instance:
    """One kernel as ptxas reports it."""

    name: str
    registers: int
    spilled: int

    @property
    def head_dim(self) -> int:
        found = re.search(r"(?:Half|BFloat16|PlainKernelI)[EL]*i(\d+)E", self.name)
        assert found is not None, self.name
        return int(found[1])

    @property
    def threads(self) -> int:
        warps = re.search(r"Li\d+ELi\d+ELi(\d+)ELi\d+ELb", self.name)
        return 32 * int(warps[1]) if warps else 128

    @property
    def projects(self) -> bool:
        return bool(re.search(r"Lb[01]ELb1E", self.name))


def nvcc(architecture: str, *flags: str) -> tuple[list[Instance], str]:
    """Compiles nasa.cu: what ptxas says of each instance, and the object's path."""
    # A shell, because ptxas reports on stderr and the cache keeps files.
    command = (
        'out="$2"; "$0" -std=c++17 -O3 -Xptxas -v -Xcompiler -fPIC,-Wall,-Wextra,-Werror '
        f'-arch={architecture} {" ".join(flags)} -c {CUDA / "nasa.cu"} -o "$out.o" '
        '>"$out" 2>&1 || { cat "$out" >&2; exit 1; }'
    )
    inputs = [path for path in sources(kernels=True) if path.parent == CUDA]
    log = cached("ptxas.txt", ["sh", "-c", command, str(nvcc_path())], inputs)
    text = log.read_text()
    assert "warning" not in text, text
    pattern = (
        r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+)"
    )
    found = [
        Instance(name, int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in re.findall(pattern, text, re.DOTALL)
    ]
    return found, str(log)


def check(architecture: str, *flags: str) -> list[Instance]:
    instances, log = nvcc(architecture, *flags)
    for x in instances:
        assert x.spilled == 0, x
        most = REGISTERS // x.threads
        if not x.projects and x.threads == 128 and "PlainKernel" not in x.name:
            most = REGISTERS // 128 // BLOCKS_OF_128[x.head_dim]
        assert x.registers <= most, x
    check_tensor_cores(architecture, log, *flags)
    return instances


def check_tensor_cores(architecture: str, log: str, *flags: str) -> None:
    """Both formats' products are in the machine code, or without a disassembler in the PTX."""
    disassembler = shutil.which("cuobjdump")
    inputs = [path for path in sources(kernels=True) if path.parent == CUDA]
    if disassembler is not None:
        command = [
            "sh",
            "-c",
            f'"{disassembler}" -sass "$0" >"$2"',
            log.replace(".txt", ".txt.part.o"),
        ]
        text = cached("sass.txt", command, inputs).read_text()
        assert "HMMA.16816.F32 " in text and "HMMA.16816.F32.BF16" in text
        assert "LDSM.16.MT88" in text and "LDGSTS" in text
        assert not re.search(r"\b(STL|LDL)\b", text), "local memory"
    else:
        command = [
            str(nvcc_path()),
            "-std=c++17",
            f"-arch={architecture}",
            *flags,
            "-ptx",
            str(CUDA / "nasa.cu"),
        ]
        text = cached("nasa.ptx", command, inputs).read_text()
        for t in ("f16", "bf16"):
            assert f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32" in text


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_some_instances_do_not_spill(architecture: str) -> None:
    assert len(check(architecture, "-DNASA_ONLY_DIM=40")) == 15


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_instance_spills(architecture: str) -> None:
    assert len(check(architecture)) == 2 * (4 * 6 + 5 + 1) + 5


@pytest.mark.parametrize("d", SHARED_KIB)
def test_shared_memory_is_within_budget(simt: ModuleType, d: int) -> None:
    inputs = make(Call(d=d, n=77, b=1, m=64), torch.bfloat16)
    for limit in (A100, H100):
        found = simt.query(*arguments(inputs), limit)
        assert found["shared_bytes"] <= SHARED_KIB[d] * 1024
        assert found["rows"] == 64 and found["single"]
