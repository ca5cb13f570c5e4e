"""Compiles csrc/simt, and with it csrc/cuda's kernels, for the host; keeps results by content."""

import functools
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
CUDA, SIMT = ROOT / "csrc" / "cuda", ROOT / "csrc" / "simt"
CACHE = ROOT / "build" / "simt"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]


def contracts() -> bool:
    """Whether this processor has multiply-adds for g++ to contract to."""
    if platform.machine() != "x86_64":
        return platform.machine() == "aarch64"
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " fma " in cpuinfo.read_text()


if contracts():  # as nvcc does: a product and a sum are rounded once, here as on a GPU
    FLAGS += ["-ffp-contract=fast", *(["-mfma"] if platform.machine() == "x86_64" else [])]


def compiler() -> str:
    """The path of g++; skips the test without it."""
    path = shutil.which("g++")
    if path is None:
        pytest.skip("needs g++ to run the CUDA kernels on the host")
    return path


def includes() -> list[str]:
    """Where Python.h and pybind11 are; skips the test without them."""
    pybind11 = pytest.importorskip("pybind11")
    return [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]


@functools.cache
def setup_py() -> ModuleType:
    """setup.py's functions."""
    spec = importlib.util.spec_from_file_location("snoopi_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_path() -> Path | None:
    """CUDA's compiler, wherever the package's own build would find it."""
    return setup_py().nvcc()


def run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}"


def cached(name: str, command: Sequence[str], inputs: Sequence[Path]) -> Path:
    """The file that `command` + ["-o", file] makes, anew if an input or the command changed."""
    digest = hashlib.sha256(repr(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.part"
        run([*command, "-o", part])
        part.rename(target)  # so that an interrupted build leaves nothing that looks finished
    return target


def sources(kernels: bool) -> list[Path]:
    """What the kernels' part of the module is made of, or the rest."""
    paths = [path for folder in (CUDA, SIMT) for path in sorted(folder.iterdir()) if path.is_file()]
    if kernels:
        return [path for path in paths if path.name != "module.cpp"]
    return [path for path in paths if path.parent == SIMT or path.name in _RESTS_ON]


_RESTS_ON = ("simt.h", "nasa_params.h")  # of csrc/cuda


def build(*flags: str) -> ModuleType:
    """The Python module; `flags` are for the kernels' part of it (-DNASA_FAULT=1)."""
    gxx = compiler()
    commands = {
        "module.o": [gxx, *FLAGS, *includes(), "-c", str(SIMT / "module.cpp")],
        "nasa_emu.o": [gxx, *FLAGS, *flags, "-c", str(SIMT / "nasa_emu.cpp")],
    }
    with ThreadPoolExecutor() as pool:
        made = [
            pool.submit(cached, name, command, sources(kernels=name == "nasa_emu.o"))
            for name, command in commands.items()
        ]
        objects = [future.result() for future in made]
    name = f"snoopi_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = cached(name, [gxx, "-shared", *map(str, objects)], objects)
    # Several builds can be loaded, but pybind11 keeps modules by their full name.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.snoopi_simt", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
