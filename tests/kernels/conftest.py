"""Lets the tests of this folder import their shared `cases`, and prints what they measured."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The processor's capability as the op sees it, and its mean errors."""
    from cases import MEAN_ERRORS

    from snoopi.ops.native import NATIVE

    if MEAN_ERRORS:
        terminalreporter.write_line(NATIVE.why)
    for dtype, mean in MEAN_ERRORS.items():
        terminalreporter.write_line(
            f"error against fp64, {str(dtype)[6:]}: {mean:.2f} of eager's (geometric mean)"
        )
