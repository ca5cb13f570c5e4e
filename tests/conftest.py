"""For every test: one thread, a marker for its folder, and no gpu test without a device."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: the tests' tensors are tiny, and many threads make them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

_TESTS = Path(__file__).parent
_MARKED_FOLDERS = ("parity", "distributed", "e2e")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0] if _TESTS in item.path.parents else ""
        if folder in _MARKED_FOLDERS:
            item.add_marker(folder)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
