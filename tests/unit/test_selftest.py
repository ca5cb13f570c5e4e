"""The self-test passes, and fails when the trainer is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snoopi import guidance, lora, selftest
from snoopi.methods import vsd
from snoopi.schedule import Schedule
from snoopi.selftest import Check

Group = Callable[[], Iterator[Check]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("selftest") / "found.json"
    assert selftest.main(["--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_everything_passes_and_is_written(report: dict[str, Any]) -> None:
    assert report["passed"] and len(report["checks"]) >= 20
    for check in report["checks"]:
        rows = zip(check["expected"], check["found"], check["tolerance"], strict=True)
        assert check["passed"] and all(abs(a - b) <= most for a, b, most in rows)
    assert len({check["name"] for check in report["checks"]}) == len(report["checks"])


def test_fixed_points_are_what_is_known_of_them(report: dict[str, Any]) -> None:
    """Guiding both teachers alike does not move the fixed point; guiding one does."""
    found = {c["name"]: c["found"] for c in report["checks"] if "fixed point" in c["name"]}
    both = [at for name, at in found.items() if "both" in name]
    one = [at for name, at in found.items() if "frozen" in name]
    assert len(both) >= 4 and len(one) >= 4
    assert all(at == pytest.approx([1, 1], abs=1e-6) for at in both)
    assert all(mean > 1.5 and std < 0.8 for mean, std in one)


# --- mistakes of a trainer ------------------------------------------------------------------------


def wrong_sign(*args: Any, of: Any = vsd.vsd_gradient, **more: Any) -> Tensor:
    return -of(*args, **more)


def no_weight(*args: Any, of: Any = vsd.vsd_gradient) -> Tensor:
    return of(*args, weight="none")


def no_guidance_below_one(c: Tensor, u: Tensor, kappa: Tensor) -> Tensor:
    return torch.where(kappa.view(-1, 1, 1, 1) <= 1, c, guidance.cfg(c, u, kappa))


def one_kappa(c: Tensor, u: Tensor, kappa: Tensor) -> Tensor:
    return guidance.cfg(c, u, kappa[:1].expand(len(kappa)))


def squared_kappa(c: Tensor, u: Tensor, kappa: Tensor) -> Tensor:
    return guidance.cfg(c, u, kappa * kappa)


@contextmanager
def all_rows(net: nn.Module, first_row: int, of: Any = lora.rows) -> Iterator[None]:
    with of(net, 0):
        yield


@contextmanager
def no_rows(net: nn.Module, first_row: int, of: Any = lora.rows) -> Iterator[None]:
    with of(net, 2 * first_row):
        yield


@contextmanager
def three_quarters(net: nn.Module, first_row: int, of: Any = lora.rows) -> Iterator[None]:
    with of(net, first_row // 2):
        yield


def doubled(x0: Tensor, gradient: Tensor, of: Any = vsd.surrogate) -> Tensor:
    return 2 * of(x0, gradient)


def attached(x0: Tensor, gradient: Tensor) -> Tensor:
    return 0.5 * (x0 - (x0 - gradient)).square().flatten(1).mean(1)


def rounded(self: Schedule, *args: Any, of: Any = Schedule.to_eps) -> Tensor:
    return of(self, *args).float().double()


def longer(self: Schedule, *args: Any, of: Any = Schedule.target) -> Tensor:
    return 1.001 * of(self, *args)


def uneven_draws(*args: Any, of: Any = vsd.draw_kappa) -> tuple[Tensor, Tensor]:
    kappa, kappa_lora = of(*args)
    return 0.5 + (kappa - 0.5) ** 2 / 3.5, kappa_lora


def shared_draws(*args: Any, of: Any = vsd.draw_kappa) -> tuple[Tensor, Tensor]:
    return of(*args[:5])


GATE: tuple[Group, ...] = (selftest.closed_form, selftest.row_ranges)
MISTAKES: dict[str, tuple[Any, str, Any, tuple[Group, ...]]] = {
    "the sign is wrong": (
        *(vsd, "vsd_gradient", wrong_sign),
        (selftest.closed_form, selftest.fixed_points),
    ),
    "w(t) is missing": (
        *(vsd, "vsd_gradient", no_weight),
        (selftest.closed_form, selftest.fixed_points),
    ),
    "kappa below 1 is taken for 1": (
        *(vsd, "cfg", no_guidance_below_one),
        (selftest.closed_form, selftest.linearity, selftest.fixed_points),
    ),
    "one kappa for all": (vsd, "cfg", one_kappa, (selftest.closed_form, selftest.linearity)),
    "kappa enters squared": (vsd, "cfg", squared_kappa, (selftest.linearity,)),
    "kappa is not uniform": (
        *(vsd, "draw_kappa", uneven_draws),
        (selftest.linearity, selftest.monte_carlo),
    ),
    "independent draws are shared": (vsd, "draw_kappa", shared_draws, (selftest.linearity,)),
    "adapters act on all rows": (lora, "rows", all_rows, GATE),
    "adapters act on no row": (lora, "rows", no_rows, GATE),
    "adapters act on a frozen row": (lora, "rows", three_quarters, GATE),
    "the surrogate lacks its half": (vsd, "surrogate", doubled, (selftest.closed_form,)),
    "the target is not detached": (vsd, "surrogate", attached, (selftest.closed_form,)),
    "the LoRA teacher learns something else": (Schedule, "target", longer, (selftest.denoising,)),
    "fp64 is lost on the way": (Schedule, "to_eps", rounded, (selftest.closed_form,)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, wrong, groups = MISTAKES[name]
    monkeypatch.setattr(where, what, wrong)
    for group in groups:
        assert any(not check.passed for check in group()), group.__name__


def test_a_failure_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checks = (
        Check("right", (1.0, 2.0), (1.0, 2.1), (0.2, 0.2)),
        Check("wrong in one number", (1.0, 2.0), (1.0, 2.1), (0.2, 0.0)),
        Check("not finite", (1.0,), (float("nan"),), (1e9,)),
    )
    monkeypatch.setattr(selftest, "checks", lambda: iter(checks))
    path = tmp_path / "found.json"
    assert selftest.main(["--json", str(path)]) == 1
    report = json.loads(path.read_text())
    assert not report["passed"]
    assert [check["passed"] for check in report["checks"]] == [True, False, False]
    assert report["checks"][2]["found"] == [None]
    out = capsys.readouterr().out
    assert [line[:4] for line in out.splitlines()[1:4]] == ["PASS", "FAIL", "FAIL"]
    assert "1 of 3 checks passed" in out


def test_a_mistake_of_the_user_is_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert selftest.main(["--json", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and str(tmp_path) in err
