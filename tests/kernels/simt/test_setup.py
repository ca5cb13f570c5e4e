"""What setup.py builds of the CUDA op, by the torch and the nvcc that are there; both are fakes."""

import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution
from setuptools.errors import CompileError
from simt_build import ROOT, setup_py

CUDA_12 = "50 60 70 75 80 86 87 89 90"
CUDA_13 = "75 80 86 87 88 89 90 100 110 103 120 121"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py with a torch 2.13 for CUDA, and without nvcc."""
    for name in ("SNOOPI_BUILD", "SNOOPI_CUDA_ARCHS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(ROOT / "nowhere"))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return setup_py()


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, knows: str = CUDA_13, fails: bool = False
) -> Path:
    """A CUDA_HOME whose nvcc writes its calls into a file, which is returned."""
    home, calls = folder / "cuda", folder / "calls"
    (home / "bin").mkdir(parents=True, exist_ok=True)
    listed = " ".join(f"compute_{arch}" for arch in knows.split())
    (home / "bin" / "nvcc").write_text(
        f"""#!/bin/sh
case "$1" in
--list-gpu-arch) printf '%s\\n' {listed};;
--version) echo "release {knows}";;
*) echo "$@" >>"{calls}"; {"exit 1" if fails else ":"}
   while [ "$1" != -o ]; do shift; done; touch "$2";;
esac
"""
    )
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return calls


def names(setup: ModuleType) -> list[str]:
    return [extension.name for extension in setup.extensions()]


def test_auto_leaves_out_what_this_machine_cannot_build(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(why: str) -> None:
        monkeypatch.setenv("SNOOPI_BUILD", "auto")
        assert names(setup) == ["snoopi._cpu"]
        assert f"the CUDA op is left out: {why}" in capsys.readouterr().out
        monkeypatch.setenv("SNOOPI_BUILD", "cuda")
        with pytest.raises(SystemExit, match=re.escape(f"SNOOPI_BUILD=cuda: {why}")):
            setup.extensions()

    said("no nvcc found")
    install(tmp_path, monkeypatch, "35 50 60 70 75")
    said(f"{tmp_path}/cuda/bin/nvcc compiles for none of 80 89 90a 100 120")
    install(tmp_path, monkeypatch)
    for version in ("2.11.0+cu128", "2.12.1+cu130", "1.13.1"):
        monkeypatch.setattr(torch, "__version__", version)
        said(f"it needs torch 2.13, this is {version}")


def test_what_is_built_by_default(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, monkeypatch)
    for version in ("2.13.0+cu130", "2.14.1", "3.0.0a0+git12"):
        monkeypatch.setattr(torch, "__version__", version)
        cpu, cuda = setup.extensions()
        assert cuda.name == "snoopi._cuda" and cuda.optional and not cpu.optional
    monkeypatch.setattr(torch.version, "cuda", None)
    assert names(setup) == ["snoopi._cpu"]
    monkeypatch.setenv("SNOOPI_BUILD", "cuda")
    assert not setup.extensions()[1].optional


@pytest.mark.parametrize(
    ("knows", "archs", "later"),
    [
        (CUDA_13, ["80", "89", "90a", "100", "120"], "120"),
        (CUDA_12, ["80", "89", "90a"], "90"),  # PTX of 90a would serve nothing later
        ("80 86", ["80"], "80"),
    ],
)
def test_targets_are_those_that_nvcc_knows(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    knows: str,
    archs: list[str],
    later: str,
) -> None:
    install(tmp_path, monkeypatch, knows)
    assert setup.cuda_archs() == archs
    codes = setup.cuda_codes(archs)
    machine = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = [f"arch=compute_{arch},code=compute_{arch}" for arch in dict.fromkeys(("80", later))]
    assert codes == machine + ptx
    monkeypatch.setenv("SNOOPI_CUDA_ARCHS", "90a;75")
    assert setup.cuda_archs() == ["90a", "75"]  # asked for: nvcc says what it does not know


def build(setup: ModuleType, folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CUDA op was built; the C++ compiler does nothing."""
    monkeypatch.setenv("CXX", "ccache true -m64")
    monkeypatch.setenv("SNOOPI_BUILD", mode)
    launcher = folder / "bin" / "ccache"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("PATH", str(launcher.parent), prepend=os.pathsep)
    cuda = setup.extensions()[1]
    command = setup.BuildOps(Distribution({"ext_modules": [cuda]}))
    command.build_temp, command.build_lib = str(folder / "temp"), str(folder / "lib")
    command.ensure_finalized()
    command.run()
    return (folder / "lib" / "snoopi" / "_cuda.so").is_file()


def test_a_failing_nvcc_is_fatal_only_where_cuda_was_asked_for(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, monkeypatch, fails=True)
    assert not build(setup, tmp_path, "auto", monkeypatch)
    with pytest.raises(CompileError, match="building a native op failed"):
        build(setup, tmp_path, "cuda", monkeypatch)


def test_objects_are_made_anew_for_other_targets_and_another_nvcc(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = install(tmp_path, monkeypatch)

    def compiled() -> list[str]:
        """nvcc's calls of a build, but for the last, which links."""
        calls.write_text("")
        assert build(setup, tmp_path, "cuda", monkeypatch)
        *found, link = calls.read_text().splitlines()
        assert "-shared" in link and all("-ccbin true " in call for call in (*found, link))
        return found

    (call,) = compiled()
    assert "code=sm_120" in call and "nasa.cu" in call
    assert compiled() == []
    monkeypatch.setenv("SNOOPI_CUDA_ARCHS", "80")
    (call,) = compiled()
    assert "code=sm_80" in call and "sm_120" not in call
    install(tmp_path, monkeypatch, CUDA_12)
    assert len(compiled()) == 1
