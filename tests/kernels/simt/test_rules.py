"""What keeps the two builds of csrc/cuda honest."""

import re
from pathlib import Path

from simt_build import CUDA

KERNELS = [path for path in CUDA.iterdir() if path.name.startswith("nasa")]
RAW = re.compile(
    r"\basm\b|__shared__|__device__|__global__|__host__|threadIdx|blockIdx|blockDim|__sync"
    r"|__shfl|__ldg|\bcuda[A-Z]\w*|#include <cuda"
)
BACKEND = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif).*(CUDA|simt_emu|SIMT)", re.MULTILINE)


def code(path: Path) -> str:
    """A file without its comments."""
    return re.sub(r"//.*", "", path.read_text())


def test_kernels_use_primitives_only() -> None:
    assert KERNELS
    for path in KERNELS:
        assert not (found := RAW.search(code(path))), f"{path.name}: {found}"


def test_only_simt_h_knows_the_backends() -> None:
    for path in CUDA.iterdir():
        if path.name == "simt.h":
            assert BACKEND.search(path.read_text())
        elif path.suffix in (".h", ".cu"):
            assert not BACKEND.search(path.read_text()), path.name


def test_kernels_are_free_of_torch() -> None:
    for path in KERNELS:
        if "torch" not in path.name:  # the glue
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path.name


def test_both_backends_have_the_same_primitives() -> None:
    name = re.compile(r"^(?:SIMT_DEVICE|inline)\s+\w+\s+(\w+)\(", re.MULTILINE)
    helpers = {"shared_address", "widen", "device_attribute"}
    compiled = set(name.findall((CUDA / "simt_cuda.h").read_text())) - helpers
    emulated = code(CUDA.parent / "simt" / "simt_emu.h")
    for primitive in compiled:
        assert re.search(rf"\b{primitive}\(", emulated), primitive
