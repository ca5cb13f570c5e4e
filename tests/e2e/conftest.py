"""What the tests of this folder share: `commands`, and a process that starts commands quickly."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import FAST, Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs `python -m snoopi.X`, without the seconds that importing torch takes."""
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="session")
def reference(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted FAST run, with its teacher beside it. Tests must not change it."""
    out = tmp_path_factory.mktemp("reference") / "run"
    warm.run("train", *FAST, "--out", str(out))
    return out
