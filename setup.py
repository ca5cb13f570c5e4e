"""Builds the native op. Everything else about the package stands in pyproject.toml.

SNOOPI_BUILD chooses what is built:
    auto  what this machine's torch can use: the CPU op, and for a CUDA build of torch (2.13 or
          later) the CUDA op where nvcc is and compiles it (default)
    cpu   the CPU op, snoopi/_cpu.so
    cuda  both, whatever torch is there: compiling needs no GPU
    none  nothing: a pure-Python install, ordinary PyTorch ops take over

SNOOPI_EMULATE_AMX=1 is for tests: the AMX kernel runs on plain code in place of AMX instructions,
wherever AVX-512 is (`make isa`).

SNOOPI_CUDA_ARCHS are the targets of nvcc (default: those of 80 89 90a 100 120 that it knows); PTX
of the first and the last serves GPUs in between and later ones. CUDA_HOME says where CUDA is, if
nvcc is not on PATH.

The CPU op is compiled for any processor: csrc/cpu/kernel.cpp once per capability with that
capability's flags, chosen between at run time; every other source once, with none.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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
CUDA_ARCHS = "80 89 90a 100 120"
STABLE_TORCH = (2, 13)  # the first whose stable ABI has a stream's native handle
STABLE_ABI = "0x{:02x}{:02x}000000000000".format(*STABLE_TORCH)
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # that may stand before a compiler in CXX
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
    return mode


def extensions() -> list[Extension]:
    """What is built, by SNOOPI_BUILD."""
    mode = build_mode()
    if mode == "none":
        return []
    found = [Extension("snoopi._cpu", sources=[])]
    if mode == "cpu" or (mode == "auto" and not _torch_has_cuda()):
        return found
    why_not = cuda_trouble()
    if why_not is None:
        # In auto it is an extra: where it does not compile, it is warned of and left out.
        found.append(Extension("snoopi._cuda", sources=[], optional=mode == "auto"))
    elif mode == "cuda":
        sys.exit(f"SNOOPI_BUILD=cuda: {why_not}")
    else:
        print(f"the CUDA op is left out: {why_not}")
    return found


def _torch_has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False  # building says so
    return torch.version.cuda is not None


def cuda_trouble() -> str | None:
    """Why the CUDA op cannot be built here; None if it can."""
    try:
        import torch
    except ImportError:
        return None  # building says so
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or tuple(map(int, found.groups())) < STABLE_TORCH:
        return f"it needs torch {'.'.join(map(str, STABLE_TORCH))}, this is {torch.__version__}"
    if nvcc() is None:
        return "no nvcc found; set CUDA_HOME or put it on PATH"
    if not cuda_archs():
        return f"{nvcc()} compiles for none of {CUDA_ARCHS}; it needs CUDA 11.1 or later"
    return None


def nvcc() -> Path | None:
    """CUDA's compiler: of CUDA_HOME, on PATH, or where CUDA is installed by default."""
    home = os.environ.get("CUDA_HOME")
    there = [Path(home) / "bin" / "nvcc"] if home else []
    there += [Path(found)] if (found := shutil.which("nvcc")) and not home else []
    there += [] if home else [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in there if path.is_file()), None)


def cuda_archs() -> list[str]:
    """The targets: SNOOPI_CUDA_ARCHS as they are, else those of CUDA_ARCHS that nvcc knows."""
    asked = os.environ.get("SNOOPI_CUDA_ARCHS", "").replace(";", " ").split()
    if asked:
        return asked
    done = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True)
    known = re.findall(r"compute_(\d+)", done.stdout)
    return [arch for arch in CUDA_ARCHS.split() if arch.rstrip("af") in known]


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
        """Compile the sources of one op and link them."""
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError:
            sys.exit(
                "install torch first: pip install -r requirements/run.txt, then "
                "pip install --no-build-isolation -e ."
            )
        cxx = compiler().split()
        cuda = ext.name == "snoopi._cuda"
        # Objects of another torch are no use: their headers differ. Nor are those of another nvcc.
        made_by = f"torch-{torch.__version__}" + (f"-{cuda_mark()}" if cuda else "")
        temp = Path(self.build_temp).resolve() / f"{ext.name}-{made_by}"
        temp.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        jobs = (cuda_jobs if cuda else compile_jobs)(cxx, temp, includes)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(self._compile, jobs))
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        objects = [job[-1] for job in jobs]
        if cuda:  # nvcc knows where its runtime lies, and links it in
            linker = [str(nvcc()), "-cudart", "static", "-ccbin", host_compiler(cxx)]
            flags = ["-ltorch_cpu", "-lc10", "-Xlinker", "--exclude-libs=ALL"]
        else:
            linker, flags = cxx, link_flags()
        self._spawn([*linker, "-shared", *objects, "-o", str(out), *libraries, *flags])

    def _compile(self, job: list[str]) -> None:
        target = Path(job[-1])
        sources = [*(ROOT / "csrc").glob("c*/*"), Path(__file__)]  # cpu and cuda
        newest = max(path.stat().st_mtime for path in sources)
        if self.force or not target.exists() or target.stat().st_mtime < newest:
            self._spawn(job)

    def _spawn(self, command: list[str]) -> None:
        """Run the compiler; its own messages are the explanation when it fails."""
        try:
            self.spawn(command)
        except Exception as error:
            raise CompileError(
                f"building a native op failed: {error}. The compiler's messages stand above; "
                "SNOOPI_BUILD=cpu installs without the CUDA op, SNOOPI_BUILD=none without either."
            ) from None


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


def cuda_codes(archs: list[str]) -> list[str]:
    """nvcc's -gencode: machine code of each target, and PTX of the first and the last.

    PTX of 90a would serve that GPU alone, that of 90 also serves all later ones.
    """
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = dict.fromkeys(arch.rstrip("af") for arch in (archs[0], archs[-1]))
    return codes + [f"arch=compute_{arch},code=compute_{arch}" for arch in plain]


def cuda_mark() -> str:
    """A short name of nvcc's version and its targets."""
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    return hashlib.sha256(f"{version}{cuda_archs()}".encode()).hexdigest()[:12]


def host_compiler(cxx: list[str]) -> str:
    """The word of $CXX that nvcc is to call: not a launcher before it, nor an option after it."""
    return next((word for word in cxx if Path(word).name not in LAUNCHERS), cxx[0])


def cuda_jobs(cxx: list[str], temp: Path, includes: list[str]) -> list[list[str]]:
    """Compiler calls of the CUDA op: the kernels by nvcc, the glue on torch's stable ABI."""
    source, jobs = ROOT / "csrc" / "cuda", []
    targets = [word for code in cuda_codes(cuda_archs()) for word in ("-gencode", code)]
    call = [str(nvcc()), "-std=c++17", "-O3", *targets, "-ccbin", host_compiler(cxx)]
    call += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for kernel in sorted(source.glob("*.cu")):
        jobs.append([*call, "-c", str(kernel), "-o", str(temp / f"{kernel.stem}.cu.o")])
    flags = [*COMMON_FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *includes]
    for glue in sorted(source.glob("*.cpp")):
        jobs.append([*cxx, *flags, "-c", str(glue), "-o", str(temp / f"{glue.stem}.o")])
    return jobs


if __name__ == "__main__":
    os.chdir(ROOT)  # setuptools reads pyproject.toml and copies in-place builds from there
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildOps},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
