"""Builds the native op. Everything else about the package stands in pyproject.toml.

SNOOPI_BUILD chooses what is built:
    auto  what this machine's torch can use (default; in this version the CPU op)
    cpu   the CPU op, snoopi/_cpu.so
    cuda  the CUDA op; its sources come in a later version
    none  nothing: a pure-Python install, ordinary PyTorch ops take over

SNOOPI_EMULATE_AMX=1 is for tests: the AMX kernel runs on plain code in place of AMX instructions,
wherever AVX-512 is (`make isa`).

The CPU op is compiled for any processor: csrc/cpu/kernel.cpp once per capability with that
capability's flags, chosen between at run time; every other source once, with none.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNEL = "kernel.cpp"
EMULATE_AMX = os.environ.get("SNOOPI_EMULATE_AMX") == "1"
MODES = ("auto", "cpu", "cuda", "none")
X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES: dict[str, list[str]] = {"default": []}
if X86:
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma"]
    CAPABILITIES["avx512"] = [*CAPABILITIES["avx2"], *avx512]
    paired = [*CAPABILITIES["avx512"], "-mavx512bf16", "-DSNOOPI_PAIRED"]
    CAPABILITIES["avx512_bf16"] = paired
    CAPABILITIES["amx"] = [*paired, "-mamx-tile", "-mamx-bf16", "-DSNOOPI_AMX"]
    if EMULATE_AMX:
        CAPABILITIES["amx"] = [*CAPABILITIES["avx512"], "-DSNOOPI_PAIRED", "-DSNOOPI_AMX"]
COMMON_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON_FLAGS += ["-DSNOOPI_AMX_EMULATED"] if EMULATE_AMX else []
KERNEL_FLAGS = [*COMMON_FLAGS, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
KERNEL_FLAGS += ["-fno-exceptions"]  # they would need the C++ library
KERNEL_FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas"]
# GCC 12 warns of its own intrinsics.
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def build_mode() -> str:
    """SNOOPI_BUILD, checked."""
    mode = os.environ.get("SNOOPI_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"SNOOPI_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda" and not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        sys.exit(
            "SNOOPI_BUILD=cuda: the CUDA sources come in a later version; use auto, cpu or none"
        )
    return mode


def compiler() -> str:
    """The C++ compiler: $CXX, else the first of c++, g++ and clang++ that is there."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    sys.exit(
        f"no C++ compiler found ({named or 'c++, g++, clang++'}): install one (Debian: apt-get "
        "install g++), or set SNOOPI_BUILD=none for a pure-Python install"
    )


class BuildOps(build_ext):
    """Compiles with the C++ compiler alone: torch's own extension class has one set of flags."""

    def get_ext_filename(self, fullname: str) -> str:
        """Plain _cpu.so: torch.ops.load_library loads it, so no Python ABI is part of it."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError:
            sys.exit(
                "install torch first: pip install -r requirements/run.txt, then "
                "pip install --no-build-isolation -e ."
            )
        cxx = compiler().split()
        # Objects of another torch are no use: their headers differ.
        temp = Path(self.build_temp).resolve() / f"{ext.name}-torch-{torch.__version__}"
        temp.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        jobs = list(compile_jobs(cxx, temp, includes))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(self._compile, jobs))
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        objects = [job[-1] for job in jobs]
        self._spawn([*cxx, "-shared", *objects, "-o", str(out), *libraries, *link_flags()])

    def _compile(self, job: list[str]) -> None:
        target = Path(job[-1])
        sources = [*(ROOT / "csrc" / "cpu").iterdir(), Path(__file__)]
        newest = max(path.stat().st_mtime for path in sources)
        if self.force or not target.exists() or target.stat().st_mtime < newest:
            self._spawn(job)

    def _spawn(self, command: list[str]) -> None:
        """Run the compiler; its own messages are the explanation when it fails."""
        try:
            self.spawn(command)
        except Exception as error:
            sys.exit(
                f"building the native op failed: {error}. The compiler's messages stand above; "
                "SNOOPI_BUILD=none installs without it."
            )


def compile_jobs(cxx: list[str], temp: Path, includes: list[str]) -> list[list[str]]:
    """Compiler calls, each ending in its object: the kernel per capability, the glue once."""
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    jobs = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name == KERNEL:
            for name, flags in CAPABILITIES.items():
                call = [*cxx, *KERNEL_FLAGS, *flags, f"-DSNOOPI_CAPABILITY={name}"]
                jobs.append([*call, "-c", str(source), "-o", str(temp / f"{source.stem}.{name}.o")])
        else:
            call = [*cxx, *COMMON_FLAGS, *openmp, *includes]
            jobs.append([*call, "-c", str(source), "-o", str(temp / f"{source.stem}.o")])
    return jobs


def link_flags() -> list[str]:
    """libtorch_cpu and c10; torch itself is loaded first, so no path to them is written down."""
    flags = ["-ltorch_cpu", "-lc10"]
    return [*flags, *([] if sys.platform == "darwin" else ["-fopenmp", "-Wl,--no-undefined"])]


os.chdir(ROOT)  # setuptools reads pyproject.toml and copies in-place builds from there
setup(
    ext_modules=[] if build_mode() == "none" else [Extension("snoopi._cpu", sources=[])],
    cmdclass={"build_ext": BuildOps},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
