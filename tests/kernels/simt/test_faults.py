"""Faults planted in the kernels are found: by a report, by a count, or by the numbers.

A fault is a changed line, compiled in by -DNASA_FAULT=n (csrc/cuda, `fault(n)`). Several leave the
numbers right on some sizes; that is why the emulation looks at more than numbers.
"""

from dataclasses import dataclass

import pytest
import torch
from simt_build import build
from simt_cases import Call, Errors, make, run, tensor

SMALL = Call(d=40, n=77, b=1, m=37)
TAIL = Call(d=40, n=77, b=1, m=61)  # rows 61 to 63 would belong to the next item
STRENGTH = Call(d=40, n=77, b=1, m=61, strength=True)


@dataclass(frozen=True)
class Planted:
    """A fault's number, a call that shows it, and what must be found."""

    number: int
    what: str
    found: str  # a report, "conflicts" or "numbers"
    call: Call = SMALL

    def __str__(self) -> str:
        return f"{self.number} {self.what}"


QUICK = [
    Planted(1, "no barrier after the wait for a copy", "hazard"),
    Planted(3, "keys past the end are not masked", "numbers"),
    Planted(10, "rows lie in the same banks", "conflicts", Call(d=64, n=77, b=1, m=37)),
]
SLOW = [
    Planted(2, "a wait that leaves one group too many", "copy too early"),
    Planted(4, "no barrier after a step of the projection", "hazard", Call(72, 20, b=1, c_out=130)),
    Planted(5, "queries past the last row are read", "global bounds", TAIL),
    Planted(6, "values past the end are not cleared", "uninitialised"),
    Planted(7, "padding of z is not cleared", "uninitialised", Call(72, 20, b=1, h=1, c_out=9)),
    Planted(8, "no barrier before a stage is filled again", "hazard", Call(40, 154, b=1)),
    Planted(9, "columns past the head are read", "global bounds"),
    Planted(11, "one warp skips a barrier", "hazard"),
    Planted(12, "half a warp shuffles", "divergent"),
    Planted(17, "rows past the last are stored", "global bounds", TAIL),
    Planted(18, "strengths past the last are read", "global bounds", STRENGTH),
]


def check(planted: Planted) -> None:
    dim = f"-DNASA_ONLY_DIM={planted.call.d}"
    faulty = build(dim, f"-DNASA_FAULT={planted.number}", "-Wno-unused")
    inputs = make(planted.call, torch.bfloat16)
    result = run(faulty, inputs, {})
    reports = {report["fault"] for report in result["reports"]}
    if planted.found == "numbers":
        assert not reports
        errors = Errors.of(tensor(result["out"][0], torch.bfloat16), inputs)
        assert errors.ours > 2 * errors.eager
    elif planted.found == "conflicts":
        assert not reports
        cost, ideal = result["counts"]["shared"]
        assert cost > 1.5 * ideal
    else:
        assert planted.found in reports, result["reports"]


@pytest.mark.parametrize("planted", QUICK, ids=str)
def test_faults_are_found(planted: Planted) -> None:
    check(planted)


@pytest.mark.slow
@pytest.mark.parametrize("planted", SLOW, ids=str)
def test_more_faults_are_found(planted: Planted) -> None:
    check(planted)
