"""Samplers against diffusers' schedulers, step by step on the same dummy network, and the recipes
of one- and few-step models against the calls of their model cards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from snoopi.conditioning import Conditioning
from snoopi.pipeline import Pipeline
from snoopi.samplers import SAMPLERS, ddim, one_step, sample, timesteps
from snoopi.schedule import Schedule
from snoopi.zoo import RECIPES, model
from tests.parity import matrix, oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity
COND = Conditioning(randn(2, 3, 4))
NEGATIVE = Conditioning(randn(2, 3, 4, seed=1))
SHAPE = (2, 4, 6, 6)

# The published scheduler_config.json, as far as they can matter to any of the schedulers.
SD: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SDXL = SD | {"timestep_spacing": "leading", "interpolation_type": "linear"}
PIXART: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
TRAILING = {"timestep_spacing": "trailing"}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
STEPS = (1, 2, 3, 4, 7, 8, 20, 25, 35, 50)  # 3, 7 and 35 do not divide 1000

# sampler: diffusers' class and options, and the predictions that the class knows
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ddim-leading": ("DDIMScheduler", SDXL, ("eps", "v", "x0")),
    "pndm": ("PNDMScheduler", SD, ("eps", "v")),
    "euler": ("EulerDiscreteScheduler", SDXL | TRAILING, ("eps", "v", "x0")),
    "euler-leading": ("EulerDiscreteScheduler", SDXL, ("eps", "v", "x0")),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", SDXL | TRAILING, ("eps", "v")),
    "dpm++": ("DPMSolverMultistepScheduler", PIXART, ("eps", "v", "x0")),
    "lcm": ("LCMScheduler", SDXL, ("eps", "v", "x0")),
    "tcd": ("TCDScheduler", SDXL, ("eps", "v", "x0")),
}


def network(x: Tensor, t: Tensor, cond: Conditioning = COND) -> Tensor:
    """A bounded, nonlinear function of x, t and the text."""
    phase = (t.float() / 300).view(-1, 1, 1, 1)
    text = cond.tokens.mean((1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(0.8 * x + phase.sin() + text) + 0.3 * x.roll(1, dims=-1)


def fresh(i: int) -> Tensor:
    """The noise of step i."""
    return randn(*SHAPE, seed=1000 + i)


class Seen(NamedTuple):
    """The times that the network was called at, and every new latent."""

    times: list[float]
    latents: list[Tensor]


def scheduler_of(kind: str, options: Mapping[str, Any], prediction: str = "eps") -> Any:
    """As model cards make one: from another scheduler's config, of which it takes what it knows."""
    config = {**options, "prediction_type": NAMES[prediction]}
    return getattr(oracle.package("diffusers"), kind).from_config(config)


def schedule_of(options: Mapping[str, Any], prediction: Any = "eps") -> Schedule:
    low, high = options["beta_start"], options["beta_end"]
    return Schedule(options["beta_schedule"], low, high, prediction=prediction)


@contextmanager
def given_noise(scheduler: Any) -> Iterator[None]:
    """In here a scheduler's i-th draw is fresh(i)."""
    module: Any = sys.modules[type(scheduler).__module__]
    before, count = getattr(module, "randn_tensor", None), iter(range(1000))
    if before is not None:
        module.randn_tensor = lambda *args, **kwargs: fresh(next(count))
    try:
        yield
    finally:
        if before is not None:
            module.randn_tensor = before


def their_run(
    scheduler: Any, z: Tensor, net: Callable[..., Tensor] = network, **options: Any
) -> Seen:
    """A diffusers scheduler whose timesteps are set, from z to the end."""
    x, seen = z * getattr(scheduler, "init_noise_sigma", 1.0), Seen([], [])
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    with given_noise(scheduler):
        for t in scheduler.timesteps:
            seen.times.append(float(t))
            x = scheduler.step(net(scaled(x, t), t.expand(len(x))), t, x, **options).prev_sample
            seen.latents.append(x)
    return seen


def our_run(run: Callable[..., Tensor], z: Tensor, **options: Any) -> Seen:
    """run(net, z, callback=...), with its calls and latents kept."""
    seen = Seen([], [])

    def net(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.times.append(float(t[0]))
        return network(x, t, cond)

    x0 = run(net, z, callback=lambda i, x: seen.latents.append(x), **options)
    assert torch.equal(seen.latents[-1], x0)
    return seen


def by_name(name: str, schedule: Schedule, cond: Conditioning = COND) -> Callable[..., Tensor]:
    def run(net: Any, z: Tensor, **options: Any) -> Tensor:
        return sample(name, net, schedule, z, cond, noise=fresh, **options)

    return run


def same(what: str, got: Seen, want: Seen, row: str = "") -> None:
    """Equal times, and latents within oracle.TOLERANCE after every step."""
    assert got.times == want.times, f"{what}: called at {got.times}, want {want.times}"
    assert len(got.latents) == len(want.latents)
    for i, (a, b) in enumerate(zip(got.latents, want.latents, strict=True)):
        oracle.close(f"{what} step {i + 1}/{len(want.latents)}", a, b)
        if row:
            matrix.record(row, "every step", max(oracle.errors(a, b)))


# --- every sampler, every step --------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_diffusers(name: str, steps: int) -> None:
    kind, options, predictions = CASES[name]
    for prediction in predictions:
        scheduler, z = scheduler_of(kind, options, prediction), randn(*SHAPE, seed=steps)
        scheduler.set_timesteps(steps)
        more = {"eta": 1.0} if name == "tcd" else {}
        want = their_run(scheduler, z, **more)
        got = our_run(by_name(name, schedule_of(options, prediction)), z, steps=steps)
        same(f"{name} {prediction}", got, want, f"sampler {name}")


@pytest.mark.parametrize("betas", [SD, PIXART], ids=["scaled_linear", "linear"])
@pytest.mark.parametrize("alpha_one", [True, False])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", NAMES)
def test_ddim_equals_diffusers(
    prediction: str, spacing: Any, alpha_one: bool, betas: dict[str, Any]
) -> None:
    """Trailing only where the steps divide 1000: see the next test."""
    more = {"timestep_spacing": spacing, "set_alpha_to_one": alpha_one, "steps_offset": 1}
    scheduler = scheduler_of("DDIMScheduler", betas | {"clip_sample": False} | more, prediction)
    schedule = schedule_of(betas, prediction)
    for steps in STEPS:
        if spacing == "trailing" and 1000 % steps:
            continue
        scheduler.set_timesteps(steps)
        z = randn(*SHAPE, seed=steps)

        def run(net: Any, z: Tensor, steps: int = steps, **more: Any) -> Tensor:
            options = {"steps": steps, "spacing": spacing, "alpha_one": alpha_one}
            return ddim(net, schedule, z, COND, **options, **more)

        row = "sampler ddim" if spacing == "trailing" and alpha_one else ""
        same(f"ddim {prediction} {spacing}", our_run(run, z), their_run(scheduler, z), row)


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_between_trailing_times_is_first_order_dpm_solver(steps: int) -> None:
    """DPM-Solver++ of order 1 is DDIM. diffusers' DDIM itself steps by 1000 // steps, which misses
    the next of its own trailing times where the steps do not divide 1000, and ends at t = 0."""
    for options in (SD, PIXART):
        config = PIXART | options | TRAILING | {"solver_order": 1, "steps_offset": 0}
        for prediction in NAMES:
            scheduler = scheduler_of("DPMSolverMultistepScheduler", config, prediction)
            scheduler.set_timesteps(steps)
            z = randn(*SHAPE, seed=steps)
            got = our_run(by_name("ddim", schedule_of(options, prediction)), z, steps=steps)
            same(f"ddim {prediction}", got, their_run(scheduler, z), "sampler ddim")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_tcd_at_other_etas(eta: float, steps: int) -> None:
    scheduler, z = scheduler_of("TCDScheduler", SDXL), randn(*SHAPE, seed=steps)
    scheduler.set_timesteps(steps)
    got = our_run(by_name("tcd", Schedule()), z, steps=steps, eta=eta)
    same(f"tcd eta {eta}", got, their_run(scheduler, z, eta=eta))


@pytest.mark.parametrize("prediction", NAMES)
def test_lcm_near_the_boundary(prediction: str) -> None:
    """c_skip is below 1e-5 at all of LCM's own times, 2.5e-3 at t = 1, and 1 at t = 0."""
    scheduler, times = scheduler_of("LCMScheduler", SDXL, prediction), [9, 2, 1, 0]
    scheduler.set_timesteps(timesteps=times)
    z = randn(*SHAPE)
    got = our_run(by_name("lcm", schedule_of(SD, prediction)), z, times=times)
    same(f"lcm {prediction}", got, their_run(scheduler, z), "sampler lcm")


@pytest.mark.parametrize("steps", STEPS)
def test_flow_equals_diffusers_flow_matching(steps: int) -> None:
    """Its velocity points to the noise, InstaFlow's to the picture."""
    scheduler, z = oracle.package("diffusers").FlowMatchEulerDiscreteScheduler(), randn(*SHAPE)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    want = their_run(scheduler, z, lambda x, t: -network(x, t))
    got = our_run(by_name("flow", Schedule(prediction="flow")), z, steps=steps)
    assert got.times == pytest.approx(want.times, rel=1e-6)  # theirs are sigmas in fp32 x 1000
    same("flow", got, Seen(got.times, want.latents), "sampler flow")


@pytest.mark.parametrize("times", [[999, 749, 499, 249], [999, 499], [999], [800, 300, 10]])
@pytest.mark.parametrize("prediction", NAMES)
def test_dmd2_is_x0_then_noise(prediction: str, times: list[int]) -> None:
    """x0 as diffusers' DDIM has it, and its add_noise to the next time."""
    scheduler = scheduler_of("DDIMScheduler", SD, prediction)
    scheduler.set_timesteps(1)
    z = x = randn(*SHAPE)
    want = Seen([float(t) for t in times], [])
    for i, t in enumerate(times):
        x = scheduler.step(network(x, torch.tensor([t])), t, x).pred_original_sample
        if i + 1 < len(times):
            x = scheduler.add_noise(x, fresh(i), torch.tensor(times[i + 1 : i + 2]))
        want.latents.append(x)
    got = our_run(by_name("dmd2", Schedule(prediction=prediction)), z, times=times)  # type: ignore[arg-type]
    same(f"dmd2 {prediction}", got, want, "sampler dmd2")


@pytest.mark.parametrize("t", [999, 800, 400, 399])
@pytest.mark.parametrize("abar", [None, 0.0047])
@pytest.mark.parametrize("betas", [SD, PIXART], ids=["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", NAMES)
def test_one_step_is_the_x0_of_diffusers(
    prediction: str, betas: dict[str, Any], abar: float | None, t: int
) -> None:
    scheduler = scheduler_of("DDIMScheduler", betas | {"clip_sample": False}, prediction)
    scheduler.set_timesteps(1)
    if abar is not None:
        scheduler.alphas_cumprod[t] = abar
    z = randn(*SHAPE)
    want = scheduler.step(network(z, torch.tensor([t])), t, z).pred_original_sample
    got = one_step(network, schedule_of(betas, prediction), z, COND, t, abar)
    oracle.close(f"one step {prediction} at {t}", got, want)
    matrix.record("sampler one-step", "every step", max(oracle.errors(got, want)))


@pytest.mark.parametrize("kappa", [0.0, 4.5, 7.5])
@pytest.mark.parametrize("name", [*CASES, "ddim"])
def test_guidance_at_every_step(name: str, kappa: float) -> None:
    """Eq. 4 and 5: the negative in place of the null text; diffusers' formula in their loop."""
    trailing_ddim = ("DDIMScheduler", SDXL | TRAILING | {"set_alpha_to_one": True})
    kind, options = trailing_ddim if name == "ddim" else CASES[name][:2]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        away, towards = network(x, t, NEGATIVE), network(x, t, COND)
        return away + kappa * (towards - away)

    scheduler, z = scheduler_of(kind, options), randn(*SHAPE)
    scheduler.set_timesteps(8)
    more = {"eta": 1.0} if name == "tcd" else {}
    run = by_name(name, schedule_of(options))
    got = our_run(run, z, steps=8, null=NEGATIVE, kappa=kappa)
    same(f"{name} kappa {kappa}", got, their_run(scheduler, z, guided, **more))


# --- timesteps ------------------------------------------------------------------------------------

ALL_TIMED = CASES | {"ddim": ("DDIMScheduler", SDXL | TRAILING, ())}
MANY = [*range(1, 151), 200, 250, 300, 333, 500, 501, 999]
TRAILED = ("ddim", "euler", "euler-ancestral")


def both_times(name: str, scheduler: Any, steps: int) -> tuple[list[float], list[float]]:
    """Ours and theirs. At some numbers of steps (61, 103, ...) rounding appends t = -1 to their
    trailing times; we leave it out."""
    scheduler.set_timesteps(steps)
    want = [float(t) for t in scheduler.timesteps]
    if name in TRAILED and len(want) == steps + 1:
        assert want.pop() == -1
    return [float(t) for t in SAMPLERS[name].times(Schedule(), steps)], want


@pytest.mark.parametrize("name", ALL_TIMED)
def test_times_of_any_number_of_steps(name: str) -> None:
    """Also where the exact time is a half, as the 499 of DPM-Solver++ in 30 steps."""
    scheduler = scheduler_of(*ALL_TIMED[name][:2])
    for steps in MANY if name not in ("lcm", "tcd") else range(1, 51):
        got, want = both_times(name, scheduler, steps)
        assert got == want, f"{steps} steps"


@pytest.mark.parametrize("steps", [2, 3, 5, 6, 7, 9, 30, 35, 50, 64, 999])
def test_spacings_equal_diffusers(steps: int) -> None:
    for spacing in ("trailing", "leading"):
        scheduler = scheduler_of("DDIMScheduler", SD | {"timestep_spacing": spacing})
        scheduler.set_timesteps(steps)
        assert timesteps(Schedule(), steps, spacing) == scheduler.timesteps.tolist()  # type: ignore[arg-type]


# --- recipes --------------------------------------------------------------------------------------


class Card(NamedTuple):
    """How a model card calls a model: scheduler, what it changes in the base model's config,
    timesteps in place of a number of steps, options of step(), and the numbers of steps."""

    kind: str
    base: Mapping[str, Any] = SDXL
    change: Mapping[str, Any] = {}
    times: tuple[int, ...] = ()
    options: Mapping[str, Any] = {}
    steps: tuple[int, ...] = (1,)
    prediction: str = "eps"


_ROUNDED = 0.0047
_FEW = (1, 2, 4, 8)
_EULER = "EulerDiscreteScheduler"
_PIXART_LCM = Card("LCMScheduler", PIXART, steps=(4, 1, 2, 8))
_LCM = Card("LCMScheduler", steps=(4, 1, 2, 8))
_TCD = Card("TCDScheduler", options={"eta": 1.0}, steps=_FEW)
# The first number of steps is the recipe's own. x0: the clean latent of one call at times[0].
CARDS: dict[str, Card] = {
    "swiftbrush": Card("x0", SD, {"abar": _ROUNDED}, (999,)),
    "sbv2": Card("x0", SD, times=(999,)),
    "sd-turbo": Card(_EULER, SD, TRAILING, steps=_FEW),
    "sdxl-turbo": Card("EulerAncestralDiscreteScheduler", SDXL, TRAILING, steps=_FEW),
    "dmd-pixart": Card("x0", PIXART | {"clip_sample": False}, times=(400,)),
    "dmd2-sd15": Card("x0", SD, {"abar": _ROUNDED}, (999,)),
    "dmd2-sdxl-1step": Card("LCMScheduler", times=(399,)),
    "dmd2-sdxl-4step": Card("LCMScheduler", times=(999, 749, 499, 249), steps=(4,)),
    "dmd2-sdxl-4step-lora": Card("LCMScheduler", times=(999, 749, 499, 249), steps=(4,)),
    "lcm-sdxl": _LCM,
    "lcm-dreamshaper": _LCM._replace(base=SD),
    "lcm-lora-sdxl": _LCM,
    "lcm-lora-sd15": _LCM._replace(base=SD),
    "instaflow": Card("FlowMatchEulerDiscreteScheduler", steps=_FEW),
    "yoso-pixart": _PIXART_LCM._replace(steps=(1, 2, 4), prediction="v"),
    "pixart-lcm": _PIXART_LCM,
    "hyper-sdxl-1step": Card("LCMScheduler", times=(800,)),
    "hyper-sdxl-1step-lora": _TCD,
    "hyper-sd15-1step-lora": _TCD._replace(base=SD),
    **{
        f"hyper-{name}-{n}steps-lora": Card("DDIMScheduler", base, TRAILING, steps=(n,))
        for name, base in (("sdxl", SDXL), ("sd15", SD))
        for n in (2, 4, 8)
    },
    "sdxl-lightning-1step": Card(_EULER, change=TRAILING, prediction="x0"),
    **{
        f"sdxl-lightning-{n}step": Card(_EULER, change=TRAILING, steps=(n,))
        for n in (2, 4, 8)
    },
}  # fmt: skip


class Net(nn.Module):
    """The dummy network as a pipeline's backbone; keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[float, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append((float(t[0]), cond.guidance_embed))
        return network(x, t, cond)


class Dummy(Pipeline):
    """A pipeline whose texts are COND."""

    def encode(self, prompts: Any) -> Conditioning:
        return COND


def their_x0(card: Card, steps: int, z: Tensor) -> tuple[list[float], Tensor]:
    """Times and the latent of a model card's call."""
    if card.kind == "x0":
        t = card.times[0]
        scheduler = scheduler_of("DDIMScheduler", card.base)
        scheduler.set_timesteps(1)
        scheduler.alphas_cumprod[t] = card.change.get("abar", scheduler.alphas_cumprod[t])
        x0 = scheduler.step(network(z, torch.tensor([t])), t, z).pred_original_sample
        return [float(t)], x0
    if card.kind.startswith("FlowMatch"):
        scheduler = oracle.package("diffusers").FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        seen = their_run(scheduler, z, lambda x, t: -network(x, t))
        return seen.times, seen.latents[-1]
    scheduler = scheduler_of(card.kind, {**card.base, **card.change}, card.prediction)
    if card.times:
        scheduler.set_timesteps(timesteps=list(card.times))
    else:
        scheduler.set_timesteps(steps)
    seen = their_run(scheduler, z, **card.options)
    return seen.times, seen.latents[-1]


def test_every_recipe_has_a_card() -> None:
    assert sorted(CARDS) == sorted(RECIPES)


@pytest.mark.parametrize("name", CARDS)
def test_recipes_run_as_their_model_cards(name: str) -> None:
    """Pipeline.latents without guidance, at the recipe's number of steps and at others."""
    card, spec = CARDS[name], model(name)
    embedded = 1000.0 * (8 - 1) if name in ("lcm-sdxl", "lcm-dreamshaper") else None
    for i, steps in enumerate(card.steps):
        z, net = randn(*SHAPE, seed=steps), Net()
        times, want = their_x0(card, steps, z)
        got = Dummy(spec, net).latents(
            ["a", "b"], z, guidance="none", steps=steps if i else None, noise=fresh
        )
        assert [t for t, _ in net.calls] == times, (name, steps)
        for _, embed in net.calls:
            assert (None if embed is None else embed.tolist()) == (embedded and [embedded] * 2)
        oracle.close(f"{name} {steps} steps", got, want)
        matrix.record("recipes", "every step", max(oracle.errors(got, want)))
