"""The emulation finds each planted misuse, in every order of threads, and nothing in right code."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

# What must be reported. Others may be too: who reads too early may also read what nobody wrote.
EXPECTED = {
    "no barrier": "hazard",
    "no warp sync": "hazard",
    "shuffle for sync": "hazard",
    "write after read": "hazard",
    "uninitialised": "uninitialised",
    "copy read too early": "copy too early",
    "copy overwritten too early": "copy too early",
    "copy wait leaves one": "copy too early",
    "copy without barrier": "hazard",
    "copy uncommitted": "copy uncommitted",
    "copy in flight": "copy in flight",
    "shared bounds": "shared bounds",
    "shared alignment": "shared alignment",
    "global bounds": "global bounds",
    "global alignment": "global alignment",
    "written twice": "written twice",
    "not written": "not written",
    "divergent": "divergent",
    "half warp": "deadlock",
    "warp skips barrier": "deadlock",
    "different barriers": "divergent",
}
RIGHT = ("clean", "conflicts", "sectors", "product", "transposed")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"order": "ascending"},
    {"order": "descending", "landing": "issue"},
    *({"order": "random", "landing": "random", "seed": seed} for seed in range(4)),
)


def test_the_lists_are_complete(simt: ModuleType) -> None:
    assert sorted(simt.selftests()) == sorted([*EXPECTED, *RIGHT])


@pytest.mark.parametrize("name", EXPECTED)
def test_misuse_is_reported(simt: ModuleType, name: str) -> None:
    for settings in SETTINGS:
        reports = simt.selftest(name, settings)["reports"]
        assert EXPECTED[name] in [report["fault"] for report in reports], (settings, reports)
        assert all(report["site"] for report in reports)


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_is_not_reported(simt: ModuleType, name: str) -> None:
    results = [simt.selftest(name, settings) for settings in SETTINGS]
    for result in results:
        assert result["error"] == 0 and not result["reports"]
        assert result["out"].tobytes() == results[0]["out"].tobytes()


def test_deadlocks_name_the_waiting_lines(simt: ModuleType) -> None:
    (report,) = simt.selftest("half warp")["reports"]
    assert report["detail"].startswith("32 threads wait, thread 0 at selftest.h:")


def test_traffic_is_counted(simt: ModuleType) -> None:
    assert simt.selftest("conflicts")["counts"]["shared"] == (8, 1)
    cost, ideal = simt.selftest("sectors")["counts"]["loads"]
    assert cost >= 4 * ideal
    counts = simt.selftest("product")["counts"]
    assert (counts["products"], counts["matrices"], counts["copies"]) == (1, 8, 48)
    assert simt.selftest("clean")["counts"]["barriers"] == 3


def wide(x: np.ndarray) -> np.ndarray:
    """bf16 bits as fp32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def test_matrix_loads_and_products_compute_what_the_manual_says(simt: ModuleType) -> None:
    result = simt.selftest("product")
    np.testing.assert_array_equal(
        result["out"].reshape(16, 8), wide(result["a"]) @ wide(result["b"]).T
    )
    result = simt.selftest("transposed")
    np.testing.assert_array_equal(result["out"].reshape(8, 16), wide(result["a"])[:, :8].T)
