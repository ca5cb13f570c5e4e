"""Samplers against diffusers' schedulers, step by step on the same dummy network."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi.conditioning import Conditioning
from snoopi.samplers import ddim, sample, timesteps
from snoopi.schedule import Schedule
from tests.parity import matrix, oracle
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


# --- the other samplers ---------------------------------------------------------------------------

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIXART: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
STEPS = (1, 2, 3, 4, 7, 8, 20, 25, 50)

# sampler: diffusers' class and the published scheduler_config.json's options
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", SD | {"timestep_spacing": "trailing"}),
    "euler-leading": (
        "EulerDiscreteScheduler",
        SD | {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "euler-ancestral": (
        "EulerAncestralDiscreteScheduler",
        SD | {"timestep_spacing": "trailing", "steps_offset": 1},
    ),
    "dpm++": ("DPMSolverMultistepScheduler", PIXART),
    "lcm": ("LCMScheduler", SD),
    "tcd": ("TCDScheduler", SD),
}
PREDICTIONS = {name: ["eps", "v"] for name in CASES} | {"lcm": ["eps", "v", "x0"]}


def fresh(i: int) -> Tensor:
    return randn(2, 4, 6, 6, seed=1000 + i)


def their_run(kind: str, options: dict[str, Any], steps: int, z: Tensor, **more: Any) -> Any:
    """Timesteps, calls, and every new latent of a diffusers scheduler."""
    diffusers = oracle.package("diffusers")
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(steps)
    module = sys.modules[type(scheduler).__module__]
    x, seen, calls, count = z * scheduler.init_noise_sigma, [], [], iter(range(100))
    before = getattr(module, "randn_tensor", None)
    if before is not None:
        module.randn_tensor = lambda *args, **kwargs: fresh(next(count))  # type: ignore[attr-defined]
    try:
        for t in scheduler.timesteps:
            calls.append(float(t))
            prediction = network(scheduler.scale_model_input(x, t), t.expand(2))
            out = scheduler.step(prediction, t, x, **more)
            x = out.prev_sample
            seen.append(x)
    finally:
        if before is not None:
            module.randn_tensor = before  # type: ignore[attr-defined]
    return calls, seen


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_every_sampler_equals_diffusers(name: str, steps: int) -> None:
    kind, options = CASES[name]
    betas = {k: options[k] for k in ("beta_start", "beta_end")}
    for prediction in PREDICTIONS[name]:
        schedule = Schedule(options["beta_schedule"], **betas, prediction=prediction)  # type: ignore[arg-type]
        z = randn(2, 4, 6, 6, seed=steps)
        more = {"eta": 1.0} if name == "tcd" else {}
        theirs = options | {"prediction_type": NAMES[prediction]}
        want_calls, want = their_run(kind, theirs, steps, z, **more)
        calls: list[float] = []

        def net(x: Tensor, t: Tensor, cond: Conditioning, calls: list[float] = calls) -> Tensor:
            calls.append(float(t[0]))
            return network(x, t)

        got: list[Tensor] = []
        x0 = sample(
            name,
            net,
            schedule,
            z,
            COND,
            steps=steps,
            noise=fresh,
            callback=lambda i, x, got=got: got.append(x),
        )
        assert calls == want_calls, (prediction, calls, want_calls)
        assert len(got) == len(want) and torch.equal(got[-1], x0)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            oracle.close(f"{name} {prediction} step {i + 1}/{steps}", a, b)
        matrix.record(f"sampler {name}", "every step", max(oracle.errors(got[-1], want[-1])))


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_tcd_at_other_etas(eta: float) -> None:
    for steps in (1, 4, 8):
        z = randn(2, 4, 6, 6, seed=steps)
        _, want = their_run("TCDScheduler", SD, steps, z, eta=eta)
        got: list[Tensor] = []
        sample(
            "tcd",
            lambda x, t, cond: network(x, t),
            Schedule(),
            z,
            COND,
            steps=steps,
            noise=fresh,
            callback=lambda i, x, got=got: got.append(x),
            eta=eta,
        )
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            oracle.close(f"tcd eta {eta} step {i + 1}/{steps}", a, b)


def test_dmd2_is_x0_and_noise_at_its_four_times() -> None:
    """diffusers runs DMD2 with LCMScheduler at these times: the boundary terms are 1e-7 there."""
    diffusers = oracle.package("diffusers")
    times = [999, 749, 499, 249]
    scheduler = diffusers.LCMScheduler(**SD)
    scheduler.set_timesteps(timesteps=times)
    assert scheduler.timesteps.tolist() == times
    module = sys.modules[type(scheduler).__module__]
    before, count = module.randn_tensor, iter(range(9))
    module.randn_tensor = lambda *args, **kwargs: fresh(next(count))  # type: ignore[attr-defined]
    x = z = randn(2, 4, 6, 6)
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    finally:
        module.randn_tensor = before  # type: ignore[attr-defined]
    got = sample(
        "dmd2", lambda x, t, cond: network(x, t), Schedule(), z, COND, steps=4, noise=fresh
    )
    oracle.close("dmd2", got, x)
