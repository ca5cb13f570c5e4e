"""The emulated kernels, built once per session."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The Python module of csrc/simt with all kernels; skips without g++ or pybind11."""
    from simt_build import build

    return build()
