"""DDIM against diffusers' DDIMScheduler, step by step on the same dummy network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi.conditioning import Conditioning
from snoopi.samplers import ddim, timesteps
from snoopi.schedule import Schedule
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity
COND = Conditioning(randn(2, 3, 4))


def network(x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
    """A bounded, nonlinear function of x and t."""
    phase = (t.float() / 300).view(-1, 1, 1, 1)
    return torch.tanh(0.8 * x + phase.sin()) + 0.3 * x.roll(1, dims=-1)


def scheduler(betas: str, prediction: str, spacing: str, alpha_one: bool) -> Any:
    diffusers = oracle.package("diffusers")
    low, high = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
    return diffusers.DDIMScheduler(
        beta_start=low,
        beta_end=high,
        beta_schedule=betas,
        clip_sample=False,
        set_alpha_to_one=alpha_one,
        steps_offset=1,
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction],
        timestep_spacing=spacing,
    )


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
@pytest.mark.parametrize("alpha_one", [True, False])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_step_equals_diffusers(
    prediction: Any, spacing: Any, alpha_one: bool, betas: Any
) -> None:
    low, high = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
    schedule = Schedule(betas, low, high, prediction=prediction)
    theirs = scheduler(betas, prediction, spacing, alpha_one)
    for steps in (1, 4, 25):
        theirs.set_timesteps(steps)
        assert timesteps(schedule, steps, spacing) == theirs.timesteps.tolist()
        got: list[Tensor] = []
        x = z = randn(2, 4, 6, 6, seed=steps)
        ddim(
            network,
            schedule,
            z,
            COND,
            steps=steps,
            spacing=spacing,
            alpha_one=alpha_one,
            callback=lambda i, x, got=got: got.append(x),
        )
        for i, t in enumerate(theirs.timesteps):
            x = theirs.step(network(x, t.expand(2)), t, x).prev_sample
            oracle.close(f"{prediction} {spacing} step {i + 1}/{steps}", got[i], x)


@pytest.mark.parametrize("steps", [2, 3, 5, 6, 7, 9, 30, 35, 50, 64, 999])
def test_timesteps_equal_diffusers_where_steps_do_not_divide(steps: int) -> None:
    for spacing in ("trailing", "leading"):
        theirs = scheduler("scaled_linear", "eps", spacing, True)
        theirs.set_timesteps(steps)
        assert timesteps(Schedule(), steps, spacing) == theirs.timesteps.tolist()
