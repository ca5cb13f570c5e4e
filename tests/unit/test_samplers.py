"""One step and DDIM: against their formulas and exact solutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi.conditioning import Conditioning
from snoopi.guidance import NASA
from snoopi.samplers import SAMPLERS, ddim, guided, one_step, sample, timesteps
from snoopi.schedule import Schedule


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


COND = Conditioning(randn(2, 3, 4))
NULL = Conditioning(randn(1, 3, 4, seed=1))
Z = randn(2, 4, 5, 5, seed=2)


class Recorder:
    """A backbone that depends on x, t and the text, and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Conditioning]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append((x, t, cond))
        text = cond.tokens.mean((1, 2)).view(-1, 1, 1, 1)
        return torch.tanh(0.8 * x + t.view(-1, 1, 1, 1) / 500 + text)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("t", [999, 400, 0])
def test_one_step_is_the_formula_on_unscaled_noise(prediction: Any, t: int) -> None:
    schedule, net = Schedule(prediction=prediction), Recorder()
    got = one_step(net, schedule, Z, COND, t)
    x, steps, _ = net.calls[0]
    assert torch.equal(x, Z) and steps.tolist() == [t, t] and len(net.calls) == 1
    abar = float(schedule.alpha_bar()[t])
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    out = Recorder()(Z, steps, COND)
    want = {"eps": (Z - sigma * out) / alpha, "v": alpha * Z - sigma * out, "x0": out}[prediction]
    torch.testing.assert_close(got, want)


def test_one_ddim_step_is_one_step() -> None:
    for prediction in ("eps", "v", "x0"):
        schedule = Schedule(prediction=prediction)  # type: ignore[arg-type]
        want = one_step(Recorder(), schedule, Z, COND, 999)
        torch.testing.assert_close(ddim(Recorder(), schedule, Z, COND, steps=1), want)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 35, 300])
def test_a_network_that_knows_x0_is_led_there_exactly(prediction: Any, steps: int) -> None:
    """With one picture in the world, the ideal network's path is straight in (x0, eps)."""
    schedule, x0 = Schedule(prediction=prediction), randn(2, 4, 5, 5, seed=3).double()

    def ideal(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t, x)
        return schedule.target(x0, (x - alpha * x0) / sigma, t)

    got = ddim(ideal, schedule, Z.double(), COND, steps=steps)
    torch.testing.assert_close(got, x0, rtol=1e-8, atol=1e-8)


def test_each_trailing_step_lands_on_the_next_timestep() -> None:
    """Where steps do not divide 1000, too: the state has the noise level the network is told."""
    schedule, net = Schedule(), Recorder()
    states: list[Tensor] = []
    ddim(net, schedule, Z, COND, steps=7, callback=lambda i, x: states.append(x))
    assert [int(t[0]) for _, t, _ in net.calls] == timesteps(schedule, 7)
    for i, (x, t, _) in enumerate(net.calls[:-1]):
        pred, after = Recorder()(x, t, COND), net.calls[i + 1][1]
        x0, eps = schedule.to_x0(pred, x, t), schedule.to_eps(pred, x, t)
        torch.testing.assert_close(states[i], schedule.add_noise(x0, eps, after))
    x, t, _ = net.calls[-1]
    torch.testing.assert_close(states[-1], schedule.to_x0(Recorder()(x, t, COND), x, t))


def test_without_alpha_one_the_last_step_stops_at_the_first_noise_level() -> None:
    schedule, net = Schedule(), Recorder()
    got = ddim(net, schedule, Z, COND, steps=4, alpha_one=False)
    x, t, _ = net.calls[-1]
    pred, zero = Recorder()(x, t, COND), torch.zeros(2, dtype=torch.long)
    x0, eps = schedule.to_x0(pred, x, t), schedule.to_eps(pred, x, t)
    torch.testing.assert_close(got, schedule.add_noise(x0, eps, zero))


def test_timesteps() -> None:
    schedule = Schedule()
    assert timesteps(schedule, 1) == [999]
    assert timesteps(schedule, 4) == [999, 749, 499, 249]
    assert timesteps(schedule, 3) == [999, 666, 332]
    assert timesteps(schedule, 4, "leading") == [751, 501, 251, 1]
    assert timesteps(schedule, 1000) == list(range(999, -1, -1))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"steps must be in 1..1000, got {steps}"):
            timesteps(schedule, steps)
    assert max(timesteps(schedule, 999, "leading")) == 999
    with pytest.raises(ValueError, match=r"steps must be in 1..999, got 1000"):
        timesteps(schedule, 1000, "leading")
    with pytest.raises(ValueError, match=r"spacing must be one of .*, got 'linspace'"):
        timesteps(schedule, 4, "linspace")  # type: ignore[arg-type]


def test_guided_is_equation_4_in_one_call_where_texts_stack() -> None:
    t, net = torch.tensor([10, 900]), Recorder()
    c, u = Recorder()(Z, t, COND), Recorder()(Z, t, NULL.expand(2))
    for kappa in (0.0, 0.5, 1.0, 4.0):
        got = guided(net, Z, t, COND, NULL, kappa)
        torch.testing.assert_close(got, (1 - kappa) * u + kappa * c)
    assert len(net.calls) == 4 and all(len(x) == 4 for x, _, _ in net.calls)
    per_row = guided(net, Z, t, COND, NULL, torch.tensor([0.5, 4.0]))
    torch.testing.assert_close(per_row[1], guided(net, Z, t, COND, NULL, 4.0)[1])


def test_guided_runs_apart_what_cannot_be_stacked() -> None:
    t = torch.tensor([10, 900])
    longer = Conditioning(randn(2, 5, 4, seed=4))
    masked = replace(COND, mask=torch.ones(2, 3).bool())
    negative = replace(COND, negative=NULL, guidance=NASA(0.5))
    for cond, null in ((longer, NULL), (negative, NULL), (masked, NULL)):
        net = Recorder()
        got = guided(net, Z, t, cond, null, 3.0)
        assert len(net.calls) == 2 and net.calls[0][2] is cond
        c, u = Recorder()(Z, t, cond), Recorder()(Z, t, NULL.expand(2))
        torch.testing.assert_close(got, -2 * u + 3 * c)


def test_guided_without_null_is_the_conditional_prediction() -> None:
    t, net = torch.tensor([10, 900]), Recorder()
    assert torch.equal(guided(net, Z, t, COND, None, 7.5), Recorder()(Z, t, COND))
    assert len(net.calls) == 1


def fresh(i: int) -> Tensor:
    return randn(*Z.shape, seed=100 + i)


@pytest.mark.parametrize(
    ("name", "steps", "times"),
    [
        ("lcm", 1, [999]),
        ("lcm", 2, [999, 499]),
        ("lcm", 4, [999, 759, 499, 259]),
        ("lcm", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("euler", 1, [999]),
        ("euler", 2, [999, 499]),
        ("euler", 4, [999, 749, 499, 249]),
        ("dmd2", 4, [999, 749, 499, 249]),
        ("flow", 1, [1000.0]),
        ("flow", 4, [1000.0, 750.0, 500.0, 250.0]),
    ],
)
def test_published_timesteps(name: str, steps: int, times: list[float]) -> None:
    """What the network is called at (the models' own tables)."""
    net = Recorder()
    sample(name, net, Schedule(), Z, COND, steps=steps, noise=fresh)
    assert [float(t[0]) for _, t, _ in net.calls] == times
    assert all(t.is_floating_point() == (name == "flow") for _, t, _ in net.calls)


def test_pndm_calls_the_network_once_more() -> None:
    net = Recorder()
    sample("pndm", net, Schedule(), Z, COND, steps=25)
    times = [int(t[0]) for _, t, _ in net.calls]
    assert times == [961, 921, *range(921, 0, -40)] and len(times) == 26


def test_alpha_bar_of_the_published_schedules() -> None:
    sd, pixart = Schedule().alpha_bar(), Schedule("linear", 1e-4, 0.02).alpha_bar()
    want = {399: 0.4260864, 400: 0.4244830, 799: 0.0371950, 800: 0.0368696, 999: 0.00466010}
    assert {t: round(float(sd[t]), 8) for t in want} == pytest.approx(want, abs=6e-8)
    want = {399: 0.1951464, 400: 0.1935720, 799: 0.0015321, 800: 0.0015075, 999: 4.03583e-5}
    assert {t: float(pixart[t]) for t in want} == pytest.approx(want, rel=4e-5)


def test_a_flow_step_adds_the_velocity() -> None:
    schedule = Schedule(prediction="flow")
    net = Recorder()
    got = sample("flow", net, schedule, Z, COND, steps=1)
    assert torch.equal(got, Z + Recorder()(Z, torch.tensor([1000.0, 1000.0]), COND))


def test_turbo_sees_scaled_noise() -> None:
    """Euler's sigma space: sigma / sqrt(sigma^2 + 1) = 0.99767 of the noise."""
    net = Recorder()
    sample("euler", net, Schedule(), Z, COND, steps=1)
    torch.testing.assert_close(net.calls[0][0], 0.9976672 * Z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_an_exact_network_gives_x0_back(name: str) -> None:
    """With a network that knows the picture. (PNDM extrapolates from its past: not exact.)"""
    x0 = randn(*Z.shape, seed=9)
    schedule = Schedule(prediction="flow" if name == "flow" else "x0")

    def net(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return x0 - Z if name == "flow" else x0

    got = sample(name, net, schedule, Z, COND, steps=4, noise=fresh)
    # tcd ends at t = 0, two DDIMs at abar[0]: a little noise is left.
    left = 0.05 if name in ("tcd", "ddim-leading", "ddim-abar0") else 1e-5
    assert (got - x0).square().mean().sqrt() < left


def test_guidance_with_a_negative_text_is_eq_5() -> None:
    """The negative in place of the null text, at every call."""
    negative = Conditioning(randn(2, 3, 4, seed=8))
    plain = sample("euler", Recorder(), Schedule(), Z, COND, steps=3)
    same = sample("euler", Recorder(), Schedule(), Z, COND, steps=3, null=COND, kappa=7.5)
    torch.testing.assert_close(same, plain)
    away = sample("euler", Recorder(), Schedule(), Z, COND, steps=3, null=negative, kappa=7.5)
    assert not torch.allclose(away, plain)


def test_samplers_refuse_bad_calls() -> None:
    with pytest.raises(ValueError, match="unknown sampler 'eular'; the nearest is 'euler'"):
        sample("eular", Recorder(), Schedule(), Z, COND)
    with pytest.raises(ValueError, match=r"adds noise: give noise\(step\)"):
        sample("lcm", Recorder(), Schedule(), Z, COND, steps=2)
    for name in SAMPLERS:
        with pytest.raises(ValueError, match="steps must be"):
            sample(name, Recorder(), Schedule(), Z, COND, steps=0, noise=fresh)
    with pytest.raises(ValueError, match=r"steps must be in 1..50, got 51"):
        sample("lcm", Recorder(), Schedule(), Z, COND, steps=51, noise=fresh)


@pytest.mark.parametrize("times", [[], [1000], [500, 600], [5, -1]])
def test_impossible_times_are_refused(times: list[int]) -> None:
    with pytest.raises(ValueError, match="times must fall, from at most 999 to at least 0"):
        sample("euler", Recorder(), Schedule(), Z, COND, times=times)


@pytest.mark.parametrize("name", ["ddim", "ddim-leading", "pndm"])
def test_samplers_on_a_grid_refuse_other_times(name: str) -> None:
    with pytest.raises(ValueError, match=r"has its own .* times"):
        sample(name, Recorder(), Schedule(), Z, COND, times=[800, 300, 10])
