"""Prints the parity matrix after the tests."""

from __future__ import annotations

from typing import Any

from tests.parity import matrix


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if matrix.RECORDS:
        terminalreporter.section("parity matrix: worst relative error (fp32)")
        for line in matrix.lines():
            terminalreporter.write_line(line)
