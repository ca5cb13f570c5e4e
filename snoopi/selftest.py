"""Does the trainer do what the mathematics says? On the command line, in seconds, on any machine.

python -m snoopi.selftest [--json FILE]

The trainer's own code (kappa draws, teacher scores, VSD gradient, surrogate, LoRA pair) runs in the
world of snoopi.worlds.gaussian, where every score is known, and is compared with the same
mathematics written down again in numpy. What is known of the fixed points there:

- Both teachers guided alike (SNOOPI Eq. 7): the unguided conditional, whatever kappa is.
- Only the frozen teacher guided (DMD): the generator overshoots the prompt and loses variety. How
  far depends on w(t): at kappa 3 mean 2.17 and std 0.60 with the trainer's sigma_t^2, 1.98 and 0.63
  with the chain rule's alpha_t besides, which the paper leaves out.

Every check is one line; the exit status is 0 if all of them pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snoopi import errors

if __name__ == "__main__":
    errors.leave_on_signals("snoopi.selftest")  # the imports below take seconds

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from snoopi import lora, zoo
from snoopi.conditioning import Conditioning, concat
from snoopi.guidance import cfg
from snoopi.methods import vsd
from snoopi.methods.denoise import Weight, denoising_loss
from snoopi.noise import Noise
from snoopi.pictures import write_atomically
from snoopi.schedule import Prediction, Schedule
from snoopi.worlds.gaussian import DATA, ExactPair, Generator, Prompts, texts

Array = NDArray[np.float64]
Range = tuple[float, float]

NOISE = Noise(2024)
T = (20, 981)  # timesteps of the teachers [low, high), as in the recipes
START = (0.4, 0.6)  # mean and standard deviation of a generator that has far to go
RANDOM: Range = (0.5, 4.0)  # kappa of the recipes; a third of its draws is near 1 or below
UNGUIDED: Range = (1.0, 1.0)


class Check(NamedTuple):
    """One comparison: it passes where |found - expected| <= tolerance in every number."""

    name: str
    expected: tuple[float, ...]
    found: tuple[float, ...]
    tolerance: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """False, too, where a number is not finite."""
        rows = zip(self.expected, self.found, self.tolerance, strict=True)
        return all(abs(found - expected) <= most for expected, found, most in rows)

    @property
    def off(self) -> float:
        """The largest |found - expected|."""
        return max(abs(b - a) for a, b in zip(self.expected, self.found, strict=True))

    def line(self) -> str:
        """What is printed of it."""
        expected, found = (" ".join(f"{x:z.7f}" for x in row) for row in self[1:3])
        verdict = "PASS" if self.passed else "FAIL"
        numbers = f"{expected:<22}  {found:<22}  {self.off:<8.1e}  {max(self.tolerance):.1e}"
        return f"{verdict}  {self.name:<{WIDTH}}  {numbers}"


WIDTH = 80  # of the longest name
HEADER = f"{'':4}  {'check':<{WIDTH}}  {'expected':<22}  {'found':<22}  off by    tolerance"


def checks() -> Iterator[Check]:
    """Every check, as it is done."""
    for group in (closed_form, linearity, denoising, fixed_points, monte_carlo, row_ranges):
        yield from group()


# --- the trainer's side: torch, the project's own functions ---------------------------------------


class Draws(NamedTuple):
    """What one expectation is over, [n] each; weight: the share of each row in it."""

    z: Tensor
    eps: Tensor
    t: Tensor
    kappa: Tensor
    kappa_lora: Tensor
    weight: Tensor


class Student(NamedTuple):
    """A generator and the pair of teachers that knows it."""

    generator: Generator
    pair: ExactPair

    def gradient(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The gradient at the generator's (mean, std) [2], and the VSD gradient of each row [n].

        As a training step does it: x_t from a detached x0, the teachers without gradients, then
        the surrogate's backward through the generator.
        """
        schedule = self.pair.schedule
        self.pair.follow(self.generator.mean.item(), self.generator.std.item())
        z, eps = (noise.view(-1, 1, 1, 1) for noise in (draws.z, draws.eps))  # [n 1 1 1]
        cond, null = texts(len(z), z.dtype)
        x0 = self.generator(z)
        x_t = schedule.add_noise(x0.detach(), eps, draws.t)
        scores = vsd.teacher_scores(
            self.pair, x_t, draws.t, cond, null, draws.kappa, draws.kappa_lora
        )
        gradient = vsd.vsd_gradient(schedule, scores, x0.detach(), x_t, draws.t)
        loss = (draws.weight * vsd.surrogate(x0, gradient)).sum()
        found = torch.autograd.grad(loss, [self.generator.mean, self.generator.std])
        return torch.stack(found), gradient.flatten()


def student(
    prompts: Prompts, prediction: Prediction = "eps", at: tuple[float, float] = START
) -> Student:
    """A generator in a world, before teachers of one parametrisation."""
    return Student(Generator(*at), ExactPair(prompts, Schedule(prediction=prediction)))


def quadrature(
    kappa: Range, kappa_lora: Range, t: Sequence[int], nodes: int = 10, chain: bool = False
) -> Draws:
    """The expectation over z, eps (Gauss-Hermite), kappa (Gauss-Legendre; shared) and t, float64.

    chain: weighted by alpha_t, the chain rule's factor dx_t / dx0, which the trainer leaves out.
    """
    at, share = np.polynomial.hermite_e.hermegauss(nodes)
    u, share_u = np.polynomial.legendre.leggauss(3)  # its lowest node in U(.5, 4) is below 1
    fixed = kappa[0] == kappa[1] and kappa_lora[0] == kappa_lora[1]
    u, share_u = (np.zeros(1), np.ones(1)) if fixed else ((1 + u) / 2, share_u / 2)
    share_t = Schedule().alpha_bar().sqrt()[list(t)].numpy() if chain else np.ones(len(t))
    rows = _product(at, at, np.asarray(t), u)
    shares = _product(share / share.sum(), share / share.sum(), share_t / len(t), share_u)
    z, eps, time_, u_ = (torch.from_numpy(row) for row in rows)
    guided, guided_lora = (low + (high - low) * u_ for low, high in (kappa, kappa_lora))
    weight = torch.from_numpy(np.prod(shares, axis=0))
    return Draws(z, eps, time_, guided, guided_lora, weight)


def _product(*axes: NDArray[Any]) -> list[NDArray[Any]]:
    """Every combination of one value of each axis: as many rows as axes."""
    return [grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")]


def descend(who: Student, draws: Draws, rate: float, steps: int = 600) -> tuple[float, float]:
    """Gradient flow: small steps along the expected gradient until they move nothing."""
    parameters = [who.generator.mean, who.generator.std]
    for _ in range(steps):
        gradient, _ = who.gradient(draws)
        change = rate * gradient
        with torch.no_grad():
            for parameter, part in zip(parameters, change, strict=True):
                parameter.sub_(part)
        if not 1e-9 < change.abs().max() < 1e3:  # it diverges, or is NaN
            break
    return who.generator.mean.item(), who.generator.std.item()


# --- the other side: numpy, nothing of the project but the world's numbers ------------------------


def noise_levels(t: NDArray[np.int64]) -> tuple[Array, Array]:
    """alpha_t and sigma_t of Stable Diffusion's schedule."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.exp(np.cumsum(np.log1p(-beta)))[t]
    return np.sqrt(abar), np.sqrt(1 - abar)


def true_eps(
    prompts: Prompts, mean: float, std: float, x: Array, alpha: Array, sigma: Array
) -> tuple[Array, Array]:
    """E[eps | x_t = x] with the prompt y = 1 and with the null text."""
    var = (alpha * std) ** 2 + sigma**2
    if prompts == "two prompts":  # of two normals left and right of 0: a tanh
        null = sigma / var * (x - alpha * mean * np.tanh(alpha * mean * x / var))
    else:
        null = sigma * x / (var + (alpha * mean) ** 2)
    return sigma * (x - alpha * mean) / var, null


def true_gradient(
    prompts: Prompts,
    at: tuple[float, float],
    x: Array,
    t: NDArray[np.int64],
    kappa: Array | float,
    kappa_lora: Array | float,
) -> Array:
    """sigma_t^2 times the difference of both teachers' guided answers at x_t = x (SNOOPI Eq. 7)."""
    alpha, sigma = noise_levels(t)
    c_psi, u_psi = true_eps(prompts, *DATA, x, alpha, sigma)
    c_phi, u_phi = true_eps(prompts, *at, x, alpha, sigma)
    psi = (1 - kappa) * u_psi + kappa * c_psi
    phi = (1 - kappa_lora) * u_phi + kappa_lora * c_phi
    return sigma**2 * (psi - phi)


def true_fixed_point(
    prompts: Prompts, kappa: float, kappa_lora: float, t: Sequence[int], chain: bool
) -> tuple[float, float]:
    """Where E[g] = E[g z] = 0, by Newton's method.

    The expectation has one dimension for each t: x_t is normal with the variance v^2 =
    (alpha std)^2 + sigma^2, and E[z | x_t] = alpha std (x_t - alpha mean) / v^2.
    """
    xi, share = np.polynomial.hermite_e.hermegauss(48)
    steps = np.asarray(t)[:, None]
    alpha, sigma = noise_levels(steps)
    weight = share / share.sum() * (alpha if chain else 1.0)

    def moments(at: Array) -> Array:
        mean, std = at
        v = np.sqrt((alpha * std) ** 2 + sigma**2)
        x = alpha * mean + v * xi
        g = weight * true_gradient(prompts, (mean, std), x, steps, kappa, kappa_lora)
        return np.array([g.sum(), (g * alpha * std / v * xi).sum()]) / len(t)

    at, h = np.array([1.5, 0.8]), 1e-6
    for _ in range(50):
        jacobian = [(moments(at + d) - moments(at - d)) / (2 * h) for d in h * np.eye(2)]
        change = np.linalg.solve(np.transpose(jacobian), moments(at))
        at = at - change
        if abs(change).max() < 1e-13:
            break
    return float(at[0]), float(at[1])


# --- the checks -----------------------------------------------------------------------------------


def closed_form() -> Iterator[Check]:
    """The surrogate's backward through the generator is the formula, whatever is predicted."""
    n = 256
    z, eps = (NOISE.normal(stream, 0, range(n)).double() for stream in ("z", "eps"))
    t = NOISE.integers("t", 0, range(n), *T)
    kappa, kappa_lora = vsd.draw_kappa(NOISE, 0, range(n), RANDOM, RANDOM, "independent")
    draws = Draws(z, eps, t, kappa, kappa_lora, torch.full_like(z, 1 / n))
    predictions: tuple[Prediction, ...] = ("eps", "v", "x0")
    worlds: tuple[Prompts, ...] = ("two prompts", "all prompts")
    for prompts, prediction in itertools.product(worlds, predictions):
        found, _ = student(prompts, prediction).gradient(draws)
        alpha, sigma = noise_levels(t.numpy())
        x = alpha * (START[0] + START[1] * z.numpy()) + sigma * eps.numpy()
        kappas = (k.double().numpy() for k in (kappa, kappa_lora))
        g = true_gradient(prompts, START, x, t.numpy(), *kappas)
        name = f"autograd = closed form: {prompts}, {prediction}-prediction"
        yield _check(name, (g.mean(), (g * z.numpy()).mean()), found.tolist(), 1e-12)


def linearity() -> Iterator[Check]:
    """E over kappa of the gradient is the gradient at the mean kappa, for any pair of draws."""
    n = 512
    at = {"z": 0.3, "eps": -0.8}
    z, eps = (torch.full((n,), value, dtype=torch.float64) for value in at.values())
    t, weight = torch.full((n,), 400), torch.full((n,), 1 / n, dtype=torch.float64)
    for draw in ("shared", "independent"):
        drawn = vsd.draw_kappa(NOISE, 1, range(n), RANDOM, (1.0, 6.0), draw)
        kappa, kappa_lora = (k.double() for k in drawn)
        error = [4 * k.std().item() / n**0.5 for k in (kappa, kappa_lora)]
        means = (kappa.mean(), kappa_lora.mean())
        found = [mean.item() for mean in means]
        yield Check(f"mean of kappa, {draw} draws", (2.25, 3.5), tuple(found), tuple(error))
        related = float(torch.corrcoef(torch.stack([kappa, kappa_lora]))[0, 1])
        expected, most = (1.0, 1e-6) if draw == "shared" else (0.0, 4 / n**0.5)
        yield Check(f"correlation of both kappas, {draw} draws", (expected,), (related,), (most,))
        who = student("two prompts")
        each, _ = who.gradient(Draws(z, eps, t, kappa, kappa_lora, weight))
        fixed, fixed_lora = (mean.expand(n) for mean in means)
        once, _ = who.gradient(Draws(z, eps, t, fixed, fixed_lora, weight))
        name = f"E over kappa of the gradient = at the mean kappa, {draw} draws"
        yield _check(name, once.tolist(), each.tolist(), 1e-12)


def denoising() -> Iterator[Check]:
    """The LoRA teacher's loss has its minimum at the generator's score: its gradient is 0 there."""
    cases: dict[Prediction, Weight] = {"eps": "alpha_bar", "v": "none", "x0": "none"}
    for prediction, weight in cases.items():
        who = student("two prompts", prediction)
        draws = quadrature(UNGUIDED, UNGUIDED, range(*T, 48))
        z, eps = (noise.view(-1, 1, 1, 1) for noise in (draws.z, draws.eps))  # [n 1 1 1]
        who.pair.follow(*START)
        layer = lora.adapters(who.pair)["normals"]
        layer.lora_b.requires_grad_()
        x0, (cond, _) = who.generator(z).detach(), texts(len(z))
        each = denoising_loss(who.pair, who.pair.schedule, x0, draws.t, eps, cond, weight)
        (found,) = torch.autograd.grad((draws.weight * each).sum(), layer.lora_b)
        name = f"gradient of the LoRA loss at the exact score: {prediction}, weight {weight}"
        yield _check(name, (0, 0), found[:, 0].view(2, 2).sum(1).tolist(), 1e-12)


class Flow(NamedTuple):
    """A course of training to its fixed point. chain: with the chain rule's alpha_t in w."""

    prompts: Prompts
    kappa: Range
    kappa_lora: Range
    prediction: Prediction = "eps"
    chain: bool = False

    def name(self) -> str:
        """Short words for it."""
        low, high = self.kappa
        words = f"U({low:g}, {high:g})" if low < high else f"{low:g}"
        guided = "both teachers" if self.kappa == self.kappa_lora else "frozen teacher"
        rest = [self.prompts, self.prediction, *["with alpha_t"] * self.chain]
        return f"fixed point, {guided} at kappa {words}: {', '.join(rest)}"


THREE: Range = (3.0, 3.0)
FLOWS = (
    Flow("two prompts", UNGUIDED, UNGUIDED),
    Flow("two prompts", THREE, THREE, "v"),
    Flow("two prompts", RANDOM, RANDOM),
    Flow("all prompts", RANDOM, RANDOM, "x0"),
    Flow("two prompts", THREE, UNGUIDED),
    Flow("two prompts", RANDOM, UNGUIDED),
    Flow("two prompts", THREE, UNGUIDED, chain=True),
    Flow("two prompts", RANDOM, UNGUIDED, chain=True),
    Flow("all prompts", THREE, UNGUIDED, "v"),
    Flow("all prompts", RANDOM, UNGUIDED, "x0"),
)


def fixed_points() -> Iterator[Check]:
    """Gradient flow ends at the data's own mean and std, or where numpy finds the fixed point."""
    t = range(*T, 48)
    for flow in FLOWS:
        who = student(flow.prompts, flow.prediction)
        draws = quadrature(flow.kappa, flow.kappa_lora, t, chain=flow.chain)
        alpha, sigma = noise_levels(draws.t.numpy())
        curvature = float((draws.weight.numpy() * sigma**3 * alpha).sum())  # at kappa = 1
        found = descend(who, draws, 1 / (3 * curvature))
        expected = DATA
        if flow.kappa != flow.kappa_lora:
            mean, mean_lora = (sum(bounds) / 2 for bounds in (flow.kappa, flow.kappa_lora))
            expected = true_fixed_point(flow.prompts, mean, mean_lora, t, flow.chain)
        yield _check(flow.name(), expected, found, 1e-6)


def monte_carlo() -> Iterator[Check]:
    """The gradient of training steps in float32, keyed draws and all, against the quadrature."""
    batch, steps = 512, 8
    kinds = {
        "both teachers, shared": (RANDOM, "shared"),
        "frozen teacher": (UNGUIDED, "independent"),
    }
    for name, (kappa_lora, draw) in kinds.items():
        who = student("two prompts")
        expected, _ = who.gradient(quadrature(RANDOM, kappa_lora, range(*T), nodes=8))
        who.generator.float(), who.pair.float()
        found, rows = [], []
        for step in range(steps):
            draws = _training_draws(step, range(batch), RANDOM, kappa_lora, draw)
            gradient, each = who.gradient(draws)
            found.append(gradient)
            rows.append(torch.stack([each, each * draws.z], dim=1))  # [n 2]
        error = torch.cat(rows).std(dim=0) / (batch * steps) ** 0.5
        mean = torch.stack(found).mean(0)
        name = f"Monte Carlo, {batch * steps} draws, 4 standard errors: {name}"
        yield Check(name, *(tuple(row.tolist()) for row in (expected, mean, 4 * error)))


def _training_draws(step: int, indices: range, kappa: Range, kappa_lora: Range, draw: Any) -> Draws:
    """A step's draws from the streams of the trainer."""
    z, eps = (NOISE.normal(stream, step, indices) for stream in ("z", "eps"))
    t = NOISE.integers("t", step, indices, *T)
    kappas = vsd.draw_kappa(NOISE, step, indices, kappa, kappa_lora, draw)
    return Draws(z, eps, t, *kappas, torch.full_like(z, 1 / len(indices)))


def row_ranges() -> Iterator[Check]:
    """A real network as both teachers: its frozen rows don't know that there are adapters."""
    spec, b = zoo.preset("debug"), 2
    net = zoo.fresh(spec, "backbone", 0).eval().requires_grad_(False)
    nn.init.normal_(net.conv_out.weight, generator=torch.Generator().manual_seed(0))
    size = (spec.latent_channels, spec.latent_size, spec.latent_size)
    x, t = NOISE.normal("x", 0, range(b), size), torch.tensor([20, 980])
    cond, null = (
        Conditioning(NOISE.normal(name, 0, range(rows), (5, spec.backbone.text_width)))
        for name, rows in (("cond", b), ("null", 1))
    )
    kappa = torch.tensor([0.5, 4.0])
    batch = concat([cond, null.expand(b)] * 2)
    c, u, _, _ = net(x.repeat(4, 1, 1, 1), t.repeat(4), batch).chunk(4)  # no adapters yet
    expected = cfg(c, u, kappa)
    lora.inject(net, ["to_q", "to_v", "conv1"], 4, 8, NOISE)
    for i, (name, value) in enumerate(lora.state_dict(net).items()):
        value += 0.1 * NOISE.normal("adapter", i, [0], value.shape)[0] * name.endswith("lora_b")
    scores = vsd.teacher_scores(net, x, t, cond, null, kappa, kappa)
    changed = float((scores.teacher != expected).sum())
    yield _check("UNet pair: numbers of the frozen rows that adapters change", (0,), (changed,), 0)
    moved = float((scores.lora_teacher != expected).float().mean())
    yield _check("UNet pair: share of the LoRA rows that adapters change", (1,), (moved,), 0.01)

    net.double()  # matrix products of eight rows and of two round differently
    x, cond, null = x.double(), *(Conditioning(text.tokens.double()) for text in (cond, null))
    scores = vsd.teacher_scores(net, x, t, cond, null, kappa, kappa)
    with torch.no_grad():
        adapted = cfg(net(x, t, cond), net(x, t, null.expand(b)), kappa)
    gap = (scores.lora_teacher - adapted).abs().max() / adapted.abs().max()
    yield _check("UNet pair: LoRA rows = the adapted network, relative", (0,), (gap.item(),), 1e-12)


def _check(name: str, expected: Sequence[float], found: Sequence[float], tolerance: float) -> Check:
    return Check(name, tuple(map(float, expected)), tuple(found), (tolerance,) * len(found))


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 if a check fails, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    # Its products are tiny: a second thread only waits, and for long where the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    failed: list[Check] = []
    try:
        status = errors.status("snoopi.selftest", lambda: failed.extend(_run(options.json)))
    finally:
        torch.set_num_threads(threads)
    return status or int(bool(failed))


def _run(path: Path | None) -> list[Check]:
    """Do, print and write every check; returns those that fail."""
    if path is not None and path.is_dir():
        raise ValueError(f"--json must be a file, got the folder {path}")
    began, done = time.monotonic(), []
    print(HEADER)
    for check in checks():
        print(check.line(), flush=True)
        done.append(check)
    failed = [check for check in done if not check.passed]
    seconds = time.monotonic() - began
    print(f"{len(done) - len(failed)} of {len(done)} checks passed in {seconds:.1f} s")
    if path is not None:
        rows = [_plain(check) for check in done]
        report = {"passed": not failed, "seconds": round(seconds, 2), "checks": rows}
        report["torch"] = torch.__version__
        write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        print(f"wrote {path}")
    return failed


def _plain(check: Check) -> dict[str, Any]:
    """A check as JSON; null for what is not finite."""
    rows = {
        key: [number if math.isfinite(number) else None for number in getattr(check, key)]
        for key in ("expected", "found", "tolerance")
    }
    return {"name": check.name, **rows, "passed": check.passed}


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog="snoopi.selftest",
        description="Whether the trainer does what the mathematics says: a world of exact scores.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the checks there, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
