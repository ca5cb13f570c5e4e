"""The native op under lesser processors, and what a capability's object may hold."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snoopi.ops.native import NATIVE

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
import sys
sys.path[:0] = {paths!r}
import torch
from cases import CASES, check, make
from snoopi import ops
from snoopi.ops.native import NATIVE

assert NATIVE.loaded and NATIVE.why.endswith({capability!r}.upper()), NATIVE.why
for case in CASES:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = make(case, dtype)
        out = ops.nasa_attention(inputs.q, *inputs.texts, backend="fused", **inputs.kwargs)
        check(out, inputs)
inputs = make(CASES[5], torch.float64)
for got, right in zip(*(ops.twin_attention(inputs.q, *inputs.texts, backend=x)
                        for x in ("fused", "reference"))):
    torch.testing.assert_close(got, right)
"""


@pytest.mark.slow  # `make isa` runs all of the op's tests so
@pytest.mark.skipif(not NATIVE.loaded, reason=NATIVE.why)
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_case_under_a_lesser_capability(capability: str) -> None:
    if capability == "avx2" and not any(x in NATIVE.why for x in ("AVX2", "AVX512")):
        pytest.skip("this processor has no AVX2")
    code = SMALL.format(paths=[str(ROOT), str(Path(__file__).parent)], capability=capability)
    # torch's own attention asks for AVX-512 where oneDNN may use AMX, whatever its own vectors are.
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
FLAGS = {
    "default": "",
    "avx512": AVX512,
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16 -DSNOOPI_PAIRED -DSNOOPI_AMX",
}


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
@pytest.mark.parametrize("capability", FLAGS)
def test_a_capability_object_shares_no_code(capability: str, tmp_path: Path) -> None:
    """One exported table and the C library: nothing a linker could pick for another object."""
    if capability != "default" and platform.machine() != "x86_64":
        pytest.skip("an x86-64 capability")
    target = tmp_path / "kernel.o"
    source = ROOT / "csrc" / "cpu" / "kernel.cpp"
    call = [
        "g++",
        "-std=c++20",
        "-O0",
        "-fPIC",
        "-fno-exceptions",
        f"-DSNOOPI_CAPABILITY={capability}",
    ]
    call += ["-Wno-psabi", *FLAGS[capability].split()]
    subprocess.run([*call, "-c", str(source), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True)
    kinds = [line.split(maxsplit=1) for line in symbols.stdout.replace(" " * 16, "0 ").splitlines()]
    shared = [rest for _, rest in kinds if rest[0] in "WVuTBDGSC"]
    assert shared == [f"D snoopi::kernels_{capability}"]
    allowed = {"erf", "exp2", "log2", "log2f", "sqrt", "sqrtf", "memset", "memcpy"}
    allowed |= {"_GLOBAL_OFFSET_TABLE_"}
    assert {rest[2:] for _, rest in kinds if rest[0] == "U"} <= allowed
