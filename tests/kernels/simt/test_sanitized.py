"""The kernels under address and undefined-behaviour sanitizers."""

import subprocess
from pathlib import Path

import pytest
from simt_build import FLAGS, SIMT, cached, compiler, sources

pytestmark = pytest.mark.slow


def program(*flags: str) -> Path:
    command = [compiler(), *FLAGS, "-Wno-error", "-O0", "-DNASA_ONLY_DIM=72"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *flags]
    files = [str(SIMT / name) for name in ("sanitize.cpp", "nasa_emu.cpp")]
    return cached("sanitized", [*command, *files], sources(kernels=True))


def test_nothing_is_found_in_the_kernels() -> None:
    done = subprocess.run([program()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count(": ok") == 9


@pytest.mark.parametrize(
    "fault, found",
    [(14, "heap-buffer-overflow"), (15, "out of bounds")],
    ids=["raw read past the values", "more columns than registers"],
)
def test_faults_are_found(fault: int, found: str) -> None:
    done = subprocess.run([program(f"-DNASA_FAULT={fault}")], capture_output=True, text=True)
    assert done.returncode != 0
    assert found in done.stderr, done.stderr[-4000:]
