"""Schedules against their published constants, and the conversions between predictions."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from snoopi.schedule import Prediction, Schedule

PREDICTIONS = [kind for kind in get_args(Prediction) if kind != "flow"]

SD = Schedule()
PIXART = Schedule("linear", 1e-4, 0.02)
TIMES = torch.tensor([0, 1, 250, 400, 999])


def latents() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x[0], x[1]


@pytest.mark.parametrize(
    ("schedule", "t", "alpha_bar"),
    [
        (SD, 0, 0.99915),
        (SD, 249, 0.6754324),
        (SD, 399, 0.4260864),
        (SD, 400, 0.4244830),
        (SD, 499, 0.2776697),
        (SD, 749, 0.0566235),
        (SD, 799, 0.0371950),
        (SD, 800, 0.0368696),
        (SD, 999, 0.00466010),
        (PIXART, 399, 0.1951464),
        (PIXART, 400, 0.1935720),
        (PIXART, 799, 0.0015321),
        (PIXART, 800, 0.0015075),
        (PIXART, 999, 4.03583e-5),
    ],
)
def test_alpha_bar_equals_the_published_value(schedule: Schedule, t: int, alpha_bar: float) -> None:
    assert float(schedule.alpha_bar()[t]) == pytest.approx(alpha_bar, rel=2e-5, abs=6e-8)


@pytest.mark.parametrize(
    ("schedule", "alpha", "sigma", "ratio"),
    [(SD, 0.0682649, 0.9976672, 14.61464), (PIXART, 0.00635, 0.99998, 157.407)],
)
def test_last_timestep(schedule: Schedule, alpha: float, sigma: float, ratio: float) -> None:
    got = schedule.alpha_sigma(torch.tensor([999]), torch.zeros(1, 1, dtype=torch.float64))
    assert float(got[0]) == pytest.approx(alpha, rel=1e-3)
    assert float(got[1]) == pytest.approx(sigma, rel=1e-5)
    assert float(got[1] / got[0]) == pytest.approx(ratio, rel=1e-5)


def test_alpha_bar_is_float64_and_falls() -> None:
    for schedule in (SD, PIXART):
        abar = schedule.alpha_bar()
        assert abar.dtype == torch.float64 and len(abar) == 1000
        assert (abar.diff() < 0).all() and abar[0] < 1 and abar[-1] > 0


def test_noise_keeps_the_variance() -> None:
    alpha, sigma = SD.alpha_sigma(TIMES, torch.zeros(5, 1, 1, dtype=torch.float64))
    assert alpha.shape == (5, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-15, atol=0)


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_leads_back_to_x0_and_eps(prediction: Any, betas: Any) -> None:
    schedule = Schedule(betas, 1e-4, 0.02, prediction=prediction)
    x0, eps = latents()
    x_t = schedule.add_noise(x0, eps, TIMES)
    target = schedule.target(x0, eps, TIMES)
    assert target.dtype == torch.float64
    torch.testing.assert_close(schedule.to_x0(target, x_t, TIMES), x0, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.to_eps(target, x_t, TIMES), eps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_prediction_gives_an_x0_and_eps_that_rebuild_x_t(prediction: Any) -> None:
    schedule = Schedule(prediction=prediction)
    x_t, pred = latents()
    x0, eps = schedule.to_x0(pred, x_t, TIMES), schedule.to_eps(pred, x_t, TIMES)
    torch.testing.assert_close(schedule.add_noise(x0, eps, TIMES), x_t, rtol=1e-9, atol=1e-12)


def test_targets_are_what_their_names_say() -> None:
    x0, eps = latents()
    alpha, sigma = SD.alpha_sigma(TIMES, x0)
    assert torch.equal(SD.target(x0, eps, TIMES), eps)
    assert torch.equal(Schedule(prediction="x0").target(x0, eps, TIMES), x0)
    v = Schedule(prediction="v").target(x0, eps, TIMES)
    torch.testing.assert_close(v, alpha * eps - sigma * x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_of_16_bit_tensors_run_in_fp32(prediction: Any) -> None:
    schedule = Schedule(prediction=prediction)
    x_t, pred = (x.bfloat16() for x in latents())
    for convert in (schedule.to_x0, schedule.to_eps):
        got = convert(pred, x_t, TIMES)
        assert got.dtype == torch.float32
        exact = convert(pred.double(), x_t.double(), TIMES)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("schedule", "ratio"), [(SD, 14.61464), (PIXART, 157.407)])
def test_x0_of_the_last_timestep_is_good_to_fp32(schedule: Schedule, ratio: float) -> None:
    """One rounding of eps is amplified by sigma / alpha; 16-bit arithmetic would leave nothing."""
    x0, eps = (x[:1].float() for x in latents())
    t = torch.tensor([999])
    back = schedule.to_x0(eps, schedule.add_noise(x0, eps, t), t)
    rounding = float(eps.abs().max()) * torch.finfo(torch.float32).eps
    assert (back - x0).abs().max() < 2 * ratio * rounding
    wrong = schedule.to_x0(eps + 0.01, schedule.add_noise(x0, eps, t), t)
    torch.testing.assert_close(back - wrong, torch.full_like(x0, 0.01 * ratio), rtol=1e-3, atol=0)


def test_impossible_names_are_refused() -> None:
    with pytest.raises(ValueError, match="betas must be one of scaled_linear, linear, got 'cos'"):
        Schedule("cos")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="prediction must be one of eps, v, x0, flow, got 'epsilon'"
    ):
        Schedule(prediction="epsilon")  # type: ignore[arg-type]


def test_a_flow_has_no_alpha_and_sigma() -> None:
    x, t = torch.zeros(1, 4, 2, 2), torch.tensor([999])
    for convert in (Schedule(prediction="flow").to_x0, Schedule(prediction="flow").to_eps):
        with pytest.raises(ValueError, match="use the sampler 'flow'"):
            convert(x, x, t)


def test_a_rounded_abar_replaces_the_schedules() -> None:
    x, eps, t = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5), torch.tensor([999])
    abar = 0.0047
    want = (1 - (1 - abar) ** 0.5 * 0.5) / abar**0.5
    assert Schedule().to_x0(eps, x, t, abar).item() == pytest.approx(want, rel=1e-6)
    exact = Schedule().to_x0(eps, x, t).item()
    assert exact == pytest.approx(want * (abar / 0.00466010) ** 0.5, rel=1e-3) and exact != want
