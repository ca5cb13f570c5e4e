"""From noise to a clean latent: one step, and the multi-step samplers of the models we load.

`sample(NAME, ...)` runs one of SAMPLERS; `ddim` and `one_step` can be called alone. Samplers own no
randomness: the caller gives the noise. They know nothing of K/V packs or attention guidance: those
travel in the Conditioning. A strength per step is a list of Conditionings, one per network call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from snoopi.conditioning import Conditioning, concat
from snoopi.guidance import cfg
from snoopi.schedule import Schedule

Spacing = Literal["trailing", "leading"]
Texts = Conditioning | Sequence[Conditioning]  # one for all network calls, or one for each
Kappa = Tensor | float | Sequence[float | Tensor]


class Backbone(Protocol):
    """forward(x, t, cond) -> prediction."""

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


def one_step(
    backbone: Backbone,
    schedule: Schedule,
    z: Tensor,
    cond: Conditioning,
    t: int,
    abar: float | None = None,
) -> Tensor:
    """x0 = f(z, y): one call on pure noise z [b c h w] at timestep t, converted by the schedule.

    At t below 999 the input is still unscaled noise (DMD, SwiftBrush); only the conversion uses
    (alpha_t, sigma_t). abar: alpha_t^2 in place of the schedule's.
    """
    steps = torch.full((len(z),), t, device=z.device)
    return schedule.to_x0(backbone(z, steps, cond), z, steps, abar)


def guided(
    backbone: Backbone,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    null: Conditioning | None = None,
    kappa: Tensor | float = 1.0,
) -> Tensor:
    """The prediction under classifier-free guidance (Eq. 4; Eq. 5 with a negative prompt as null).

    Without `null` the conditional prediction alone. Both texts run as one batch where they can be
    stacked (equal lengths, both masked or neither, no attention guidance on the conditional side).
    """
    if null is None:
        return backbone(x, t, cond)
    null = null.expand(len(x))
    masks_agree = (cond.mask is None) == (null.mask is None)
    stackable = masks_agree and cond.tokens.shape == null.tokens.shape
    if stackable and cond.guidance is None:
        text = cond if cond.negative is None else cond.plain()  # plain() drops filled-in K/V
        both = backbone(x.repeat(2, 1, 1, 1), t.repeat(2), concat([text, null]))
        conditional, unconditional = both.chunk(2)
        return cfg(conditional, unconditional, kappa)
    return cfg(backbone(x, t, cond), backbone(x, t, null), kappa)


def timesteps(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> list[int]:
    """`steps` timesteps from high to low.

    "trailing" starts at the last one (999, and 999 alone for one step); "leading" is Stable
    Diffusion's original, with offset 1.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")
    most = schedule.steps - (spacing == "leading")  # its offset of 1 must stay inside
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be in 1..{most}, got {steps}")
    if spacing == "leading":
        ratio = schedule.steps // steps
        return [i * ratio + 1 for i in reversed(range(steps))]
    # The stride as numpy's arange has it: its rounding error decides where a time is a half.
    stride = schedule.steps - (schedule.steps - schedule.steps / steps)
    return [round(schedule.steps - i * stride) - 1 for i in range(steps)]


def ddim(
    backbone: Backbone,
    schedule: Schedule,
    z: Tensor,
    cond: Texts,
    *,
    steps: int = 25,
    null: Conditioning | None = None,
    kappa: Kappa = 1.0,
    spacing: Spacing = "trailing",
    alpha_one: bool = True,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al., 2021, eta 0) from z [b c h w] ~ N(0, I) to x0.

    alpha_one: the last step ends at x0 itself; False ends at abar[0], as Stable Diffusion's
    configs do (set_alpha_to_one false). cond, kappa: one for all steps, or a list of one per step.
    callback(step, x) sees each new x.
    """
    x, times = z, timesteps(schedule, steps, spacing)
    _check_calls(cond, kappa, steps)
    abar = schedule.alpha_bar()
    stride = schedule.steps // steps
    for i, now in enumerate(times):
        t = torch.full((len(x),), now, device=x.device)
        prediction = guided(backbone, x, t, _at(cond, i), null, _at(kappa, i))
        x0, eps = schedule.to_x0(prediction, x, t), schedule.to_eps(prediction, x, t)
        # "leading" steps by its stride; "trailing" by its grid, where the stride may not be whole.
        grid_next = times[i + 1] if i + 1 < steps else -1
        after = now - stride if spacing == "leading" else grid_next
        last = 1.0 if alpha_one else float(abar[0])
        abar_next = float(abar[after]) if after >= 0 else last
        x = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
        if callback is not None:
            callback(i, x)
    return x


def _at(value: Any, call: int) -> Any:
    """What is given for a network call: itself, or its place in a list."""
    return value[call] if isinstance(value, (list, tuple)) else value


def _check_calls(cond: Texts, kappa: Kappa, calls: int) -> None:
    """ValueError where a list of one per network call is not as long as there are calls."""
    for name, value in (("cond", cond), ("kappa", kappa)):
        if isinstance(value, (list, tuple)) and len(value) != calls:
            raise ValueError(
                f"{name} must be one, or one per network call: {calls}, got {len(value)}"
            )


# --- samplers by name -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What every step of a sampler needs: the network, its schedule and what steers it.

    cond, kappa: one for all network calls, or a list of one per call.
    noise(i): fresh N(0, 1) in the shape of the latents for step i; a function of i alone.
    callback(i, x): sees each new x (in the sampler's own scale).
    """

    backbone: Backbone
    schedule: Schedule
    cond: Texts
    null: Conditioning | None = None
    kappa: Kappa = 1.0
    noise: Callable[[int], Tensor] | None = None
    callback: Callable[[int, Tensor], None] | None = None

    def predict(self, i: int, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The guided prediction of call i at x, in fp32 or better, and t as a tensor [b]."""
        dtype = torch.int64 if isinstance(t, int) else torch.float32
        times = torch.full((len(x),), t, dtype=dtype, device=x.device)
        cond, kappa = _at(self.cond, i), _at(self.kappa, i)
        found = guided(self.backbone, x, times, cond, self.null, kappa)
        return found if found.dtype == torch.float64 else found.float(), times

    def fresh(self, i: int) -> Tensor:
        """The noise of step i; ValueError where the caller gave none."""
        if self.noise is None:
            raise ValueError("this sampler adds noise: give noise(step)")
        return self.noise(i)

    def saw(self, i: int, x: Tensor) -> None:
        if self.callback is not None:
            self.callback(i, x)


def _consistency(run: Run, z: Tensor, times: Sequence[int], *, boundary: bool) -> Tensor:
    """x0, then noise to the next timestep, and so on (Luo et al., 2023; Yin et al., 2024, DMD2).

    boundary: LCM's c_skip x + c_out x0 in place of x0, with sigma_data 0.5 and t scaled by 10.
    """
    x = z
    for i, now in enumerate(times):
        prediction, t = run.predict(i, x, now)
        x0 = run.schedule.to_x0(prediction, x, t)
        if boundary:
            scaled = 10.0 * now
            norm = scaled**2 + 0.25
            x0 = (scaled / math.sqrt(norm)) * x0 + (0.25 / norm) * x
        if i + 1 < len(times):
            x = run.schedule.add_noise(x0, run.fresh(i), torch.full_like(t, times[i + 1]))
        else:
            x = x0
        run.saw(i, x)
    return x


def _tcd(run: Run, z: Tensor, times: Sequence[int], *, eta: float) -> Tensor:
    """Trajectory consistency (Zheng et al., 2024): to s = (1 - eta) of the next time, then noise.

    eta: 0 is deterministic, 1 goes to x0 and back as LCM does.
    """
    abar, x = run.schedule.alpha_bar(), z
    for i, now in enumerate(times):
        prediction, t = run.predict(i, x, now)
        x0, eps = run.schedule.to_x0(prediction, x, t), run.schedule.to_eps(prediction, x, t)
        after = times[i + 1] if i + 1 < len(times) else 0
        between, target = float(abar[int((1 - eta) * after)]), float(abar[after])
        x = between**0.5 * x0 + (1 - between) ** 0.5 * eps
        if eta > 0 and i + 1 < len(times):
            ratio = target / between
            x = ratio**0.5 * x + (1 - ratio) ** 0.5 * run.fresh(i)
        run.saw(i, x)
    return x


def _ddim(
    run: Run, z: Tensor, times: Sequence[int], *, spacing: Spacing, alpha_one: bool
) -> Tensor:
    if list(times) != timesteps(run.schedule, len(times), spacing):
        raise ValueError(f"this sampler has its own {spacing} times, got {list(times)}")
    return ddim(
        run.backbone,
        run.schedule,
        z,
        run.cond,
        steps=len(times),
        null=run.null,
        kappa=run.kappa,
        spacing=spacing,
        alpha_one=alpha_one,
        callback=run.callback,
    )


def _pndm(run: Run, z: Tensor, times: Sequence[int]) -> Tensor:
    """Pseudo linear multi-step (Liu et al., 2022, PLMS without Runge-Kutta), up to fourth order.

    The second time comes twice: its first evaluation corrects the first step (Heun-like).
    """
    abar, x, first = run.schedule.alpha_bar(), z, z
    if list(times) != _pndm_times(run.schedule, len(set(times))):
        raise ValueError(f"this sampler has its own leading times, got {list(times)}")
    stride = run.schedule.steps // len(set(times))
    past: list[Tensor] = []  # predictions, the newest last
    for i, now in enumerate(times):
        prediction, _ = run.predict(i, x, now)
        start, before = x, now - stride
        if i == 1:
            mixed, start, now, before = (prediction + past[-1]) / 2, first, now + stride, now
        else:
            past = [*past[-3:], prediction]
            weights = _ADAMS[len(past)]
            mixed = sum(w * p for w, p in zip(weights, reversed(past), strict=True))  # type: ignore[assignment]
        t = torch.full((len(x),), now, device=x.device)
        eps = run.schedule.to_eps(mixed, start, t)
        a, b = float(abar[now]), float(abar[before if before >= 0 else 0])
        scale = a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5
        x = (b / a) ** 0.5 * start - (b - a) / scale * eps
        run.saw(i, x)
    return x


# Adams-Bashforth weights by the number of predictions, the newest first.
_ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _euler(run: Run, z: Tensor, times: Sequence[int], *, leading: bool, ancestral: bool) -> Tensor:
    """Euler steps of the probability flow in sigma = sigma_t / alpha_t (Karras et al., 2022).

    The network sees x / sqrt(sigma^2 + 1). ancestral: fresh noise on the way, as k-diffusion's
    euler_ancestral. callback sees x in the sigma scale.
    """
    sigmas = _sigmas(run.schedule, times)
    x = z * (math.sqrt(sigmas[0] ** 2 + 1) if leading else sigmas[0])
    for i, now in enumerate(times):
        sigma, target = sigmas[i], sigmas[i + 1]
        scale = 1 / math.sqrt(sigma**2 + 1)
        prediction, t = run.predict(i, x * scale, now)
        x0 = run.schedule.to_x0(prediction, x * scale, t)
        slope = (x - x0) / sigma
        if ancestral and target > 0:
            up = math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
            x = x + slope * (math.sqrt(target**2 - up**2) - sigma) + up * run.fresh(i)
        else:
            x = x + slope * (target - sigma)
        run.saw(i, x)
    return x


def _dpm_solver(run: Run, z: Tensor, times: Sequence[int]) -> Tensor:
    """DPM-Solver++ 2M (Lu et al., 2022, midpoint); the first and the last step are first order."""
    abar, x = run.schedule.alpha_bar(), z
    levels = [(float(abar[t]) ** 0.5, (1 - float(abar[t])) ** 0.5) for t in times] + [(1.0, 0.0)]
    lambdas = [math.log(a / s) if s else math.inf for a, s in levels]
    last: Tensor | None = None
    for i, now in enumerate(times):
        prediction, t = run.predict(i, x, now)
        x0 = run.schedule.to_x0(prediction, x, t)
        (_, sigma), (alpha_next, sigma_next) = levels[i], levels[i + 1]
        h = lambdas[i + 1] - lambdas[i]
        towards = -alpha_next * math.expm1(-h)
        new = sigma_next / sigma * x + towards * x0
        if last is not None and i + 1 < len(times):
            ratio = (lambdas[i] - lambdas[i - 1]) / h
            new = new + 0.5 * towards / ratio * (x0 - last)
        x, last = new, x0
        run.saw(i, x)
    return x


def _flow(run: Run, z: Tensor, times: Sequence[float]) -> Tensor:
    """Euler steps along a straight flow (Liu et al., 2023): x += v(x, t) / steps, t from 1000."""
    x = z
    for i, now in enumerate(times):
        prediction, _ = run.predict(i, x, float(now))
        x = x + prediction / len(times)
        run.saw(i, x)
    return x


def _sigmas(schedule: Schedule, times: Sequence[int]) -> list[float]:
    """sigma_t / alpha_t of the times, then 0."""
    abar = schedule.alpha_bar()
    return [*(math.sqrt((1 - float(abar[t])) / float(abar[t])) for t in times), 0.0]


# Timesteps, from the schedule and the number of steps.


def _pndm_times(schedule: Schedule, steps: int) -> list[int]:
    """Leading, with the second one twice: n steps are n + 1 calls (one step is one)."""
    times = timesteps(schedule, steps, "leading")
    return times if steps == 1 else [times[0], times[1], *times[1:]]


def _origin_times(schedule: Schedule, steps: int) -> list[int]:
    """Of the 50 times that consistency models were distilled at, `steps` evenly, from the last."""
    origin = 50
    if not 1 <= steps <= origin:
        raise ValueError(f"steps must be in 1..{origin}, got {steps}")
    stride = schedule.steps // origin
    return [(origin - i * origin // steps) * stride - 1 for i in range(steps)]


def _linspace_times(schedule: Schedule, steps: int) -> list[int]:
    """Evenly from the last to 0, 0 left out."""
    if not 1 <= steps < schedule.steps:
        raise ValueError(f"steps must be in 1..{schedule.steps - 1}, got {steps}")
    last = schedule.steps - 1
    return [round((steps - i) * (last / steps)) for i in range(steps)]


def _flow_times(schedule: Schedule, steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [schedule.steps * (1 - i / steps) for i in range(steps)]


class Sampler(NamedTuple):
    """run(Run, z, times, ...) -> x0, and the times of a number of steps."""

    run: Callable[..., Tensor]
    times: Callable[[Schedule, int], Sequence[Any]]


_trailing = partial(timesteps, spacing="trailing")
_leading = partial(timesteps, spacing="leading")

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(partial(_ddim, spacing="trailing", alpha_one=True), _trailing),
    # Ends at abar[0], as under Stable Diffusion's configs (set_alpha_to_one false).
    "ddim-abar0": Sampler(partial(_ddim, spacing="trailing", alpha_one=False), _trailing),
    "ddim-leading": Sampler(partial(_ddim, spacing="leading", alpha_one=False), _leading),
    "pndm": Sampler(_pndm, _pndm_times),
    "euler": Sampler(partial(_euler, leading=False, ancestral=False), _trailing),
    "euler-leading": Sampler(partial(_euler, leading=True, ancestral=False), _leading),
    "euler-ancestral": Sampler(partial(_euler, leading=False, ancestral=True), _trailing),
    "dpm++": Sampler(_dpm_solver, _linspace_times),
    "lcm": Sampler(partial(_consistency, boundary=True), _origin_times),
    "dmd2": Sampler(partial(_consistency, boundary=False), _trailing),
    "tcd": Sampler(partial(_tcd, eta=1.0), _origin_times),
    "flow": Sampler(_flow, _flow_times),
}


def sample(
    name: str,
    backbone: Backbone,
    schedule: Schedule,
    z: Tensor,
    cond: Texts,
    *,
    steps: int = 1,
    times: Sequence[int] | None = None,
    null: Conditioning | None = None,
    kappa: Kappa = 1.0,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """x0 [b c h w] from z ~ N(0, I) by one of SAMPLERS.

    times: timesteps from high to low in place of the sampler's own. null, kappa: classifier-free
    guidance (Eq. 4; Eq. 5 with a negative prompt as null) at every call. cond, kappa: one for all
    network calls, or a list of one per call (strengths that change from step to step); `grid` says
    how many there are. noise: see Run. options: of the sampler (tcd: eta). Raises ValueError for an
    unknown name, steps it cannot do, or a list of another length.
    """
    chosen = grid(name, schedule, steps, times)
    _check_calls(cond, kappa, len(chosen))
    run = Run(backbone, schedule, cond, null, kappa, noise, callback)
    return SAMPLERS[name].run(run, z, chosen, **options)


def grid(
    name: str, schedule: Schedule, steps: int, times: Sequence[int] | None = None
) -> Sequence[Any]:
    """The timesteps of a sampler's network calls from high to low: `times`, or else its own.

    "pndm" calls the network once more than it has steps. Raises ValueError for an unknown name or
    times and steps that it cannot do.
    """
    if name not in SAMPLERS:
        near = get_close_matches(name, SAMPLERS, n=1, cutoff=0.0)[0]
        known = ", ".join(SAMPLERS)
        raise ValueError(f"unknown sampler {name!r}; the nearest is {near!r} of {known}")
    found = SAMPLERS[name].times(schedule, steps) if times is None else list(times)
    falling = all(a >= b for a, b in itertools.pairwise(found))
    most = schedule.steps - 1
    if not found or not falling or not 0 <= found[-1] <= found[0] <= most + (name == "flow"):
        raise ValueError(f"times must fall, from at most {most} to at least 0, got {found}")
    return found
