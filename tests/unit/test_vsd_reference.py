"""One step of the Distiller against the same step written out plainly, in float64.

The reference below has four separate forward passes of a network without adapters, explicit
formulae, and numpy's own keyed draws through Noise; nothing of snoopi.methods, snoopi.guidance,
snoopi.lora or snoopi.schedule.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from snoopi import config as recipes
from snoopi import zoo
from snoopi.conditioning import Conditioning
from snoopi.distiller import Distiller
from snoopi.layers.remake import keep_activations
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.worlds.shapes import ShapesWorld

B, STEP = 4, 3
Gradients = dict[str, Tensor]


class Case(NamedTuple):
    """What the network predicts, and a recipe's keys."""

    prediction: str
    overrides: tuple[str, ...]


CASES = {
    "shared": Case("v", ("vsd.surrogate=mean",)),
    "mismatched": Case(
        "eps",
        (
            *("kappa.lora=[1.0, 1.0]", "kappa.teacher=[0.2, 6.0]", "kappa.per=batch"),
            *("vsd.weight=none", "vsd.normaliser=dmd", "vsd.surrogate=sum", "vsd.student_t=400"),
            "lora.loss_weight=alpha_bar",
        ),
    ),
    "independent": Case(
        "x0",
        (
            *("kappa.draw=independent", "kappa.lora=[0.5, 3.0]", "data.null=zeros"),
            "parallel.teacher_pass=sequential",
            *("run.accumulate=2", "lora.updates_per_step=2", "data.dropout=0.5"),
        ),
    ),
}


def teacher(prediction: str) -> Pipeline:
    """A random teacher in float64 with a text encoder that reads the world's words."""
    spec, tokenizer = zoo.preset("debug"), ShapesWorld().tokenizer()
    words = tokenizer.tokenizer.get_vocab_size()
    text = dataclasses.replace(
        spec.text[0], config=spec.text[0].config.for_words(words, tokenizer.max_length)
    )
    schedule = dataclasses.replace(spec.schedule, prediction=prediction)
    spec = dataclasses.replace(spec, text=(text,), schedule=schedule)
    net, encoder = (zoo.fresh(spec, part, 1).double() for part in ("backbone", "text_encoder"))
    net.conv_out.weight.data = draw("conv_out", net.conv_out.weight.shape) * 0.05
    encoder.requires_grad_(False)
    return Pipeline(spec, net.requires_grad_(False), None, [encoder], [tokenizer])


def draw(name: str, shape: Any) -> Tensor:
    return Noise(11).sample(name, 0, 0, shape).double()


def trained(distiller: Distiller) -> tuple[Gradients, Gradients]:
    """The gradients of one step, before anything clips or uses them; those of LoRA: the last."""
    found: dict[str, Gradients] = {}

    def keep(name: str, net: nn.Module) -> Any:
        def update(step: int) -> float:
            grads = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
            found[name] = grads
            net.zero_grad(set_to_none=True)
            return 0.0

        return update

    for name in ("student", "pair"):
        optimizer = {"student": "student_optimizer", "pair": "lora_optimizer"}[name]
        getattr(distiller, optimizer).update = keep(name, getattr(distiller, name))
    distiller.step(STEP)
    return found["student"], found["pair"]


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_plain_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    config = recipes.load("debug", [f"run.batch={B}", "run.seed=5", "ema.decay=0", *case.overrides])
    pipeline = teacher(case.prediction)
    frozen = copy.deepcopy(pipeline.backbone)
    reader = Pipeline(pipeline.spec, None, None, pipeline.text_encoders, pipeline.tokenizers)
    normal = Noise.normal
    monkeypatch.setattr(Noise, "normal", lambda *a, **k: normal(*a, **k).double())
    distiller = Distiller(config, torch.device("cpu"), pipeline)
    distiller.student.double(), distiller.pair.double()
    with torch.no_grad():  # past the start: adapters that act, a student that has moved
        for key, p in distiller.pair.named_parameters():
            p += 0.1 * draw(key, p.shape) if "lora_b" in key else 0
        for key, p in distiller.student.named_parameters():
            p += 0.01 * draw(f"student {key}", p.shape)
    student = copy.deepcopy(frozen).requires_grad_(True)
    student.load_state_dict(distiller.student.state_dict())
    adapters = {
        key: p.detach().clone().requires_grad_()
        for key, p in distiller.pair.named_parameters()
        if "lora_" in key
    }

    with keep_activations():  # it calls networks on weights that are put back afterwards
        expected = reference(config, case.prediction, frozen, student, adapters, reader)
    for got, plain in zip(trained(distiller), expected, strict=True):
        assert got.keys() == plain.keys()
        assert max(g.abs().max() for g in plain.values()) > 1e-4
        for key, value in plain.items():
            most = value.abs().max().clamp(min=1e-6)
            assert (got[key] - value).abs().max() < 1e-8 * most, key


def reference(
    config: recipes.Config,
    prediction: str,
    frozen: nn.Module,
    student: nn.Module,
    adapters: dict[str, Tensor],
    reader: Pipeline,
) -> tuple[Gradients, Gradients]:
    """SNOOPI Eq. 7 and the LoRA teacher's loss, one batch, a line for a formula."""
    noise, rows, shape = Noise(5), range(B), (16, 8, 8)
    alpha, sigma = levels()
    prompts = ShapesWorld().prompts(noise, stream="prompts", step=STEP, indices=rows)
    with torch.no_grad():
        y = reader.encode(prompts).tokens
        null = reader.encode([""] * B).tokens * (config.data.null != "zeros")

    def at(values: Tensor, t: Tensor) -> Tensor:
        return values[t][:, None, None, None]

    def eps_of(out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        a, s = at(alpha, t), at(sigma, t)
        return {"eps": out, "v": a * out + s * x, "x0": (x - a * out) / s}[prediction]

    def x0_of(out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        a, s = at(alpha, t), at(sigma, t)
        return {"eps": (x - s * out) / a, "v": a * x - s * out, "x0": out}[prediction]

    def adapted() -> dict[str, Tensor]:
        """Every adapted weight W + (gamma / rank) B A."""
        weights = {}
        for key in adapters:
            if key.endswith("lora_a"):
                a, b = adapters[key], adapters[key.replace("lora_a", "lora_b")]
                weight = key.replace("lora_a", "weight")
                product = (b.flatten(1) @ a.flatten(1)).view(frozen.get_parameter(weight).shape)
                weights[weight] = frozen.get_parameter(weight) + 8 / 4 * product
        return weights

    # The student's pictures.
    z = noise.normal("z", STEP, rows, shape)
    last = torch.full((B,), config.vsd.student_t)
    x0 = x0_of(student(z, last, Conditioning(y)), z, last)

    # Four separate passes at x_t, guided.
    t = noise.integers("t", STEP, rows, 20, 981)
    x_t = at(alpha, t) * x0.detach() + at(sigma, t) * noise.normal("eps", STEP, rows, shape)
    drawn = rows if config.kappa.per == "sample" else [0] * B
    u = noise.uniform("kappa", STEP, drawn)
    shared = config.kappa.draw == "shared"
    u_lora = u if shared else noise.uniform("kappa_lora", STEP, drawn)
    (low, high), (low_lora, high_lora) = config.kappa.teacher, config.kappa.lora
    k = (low + (high - low) * u).double()[:, None, None, None]
    k_lora = (low_lora + (high_lora - low_lora) * u_lora).double()[:, None, None, None]
    with torch.no_grad():
        c_psi, u_psi = (frozen(x_t, t, Conditioning(text)) for text in (y, null))
        c_phi, u_phi = (
            functional_call(frozen, adapted(), (x_t, t, Conditioning(text))) for text in (y, null)
        )
    psi, phi = (1 - k) * u_psi + k * c_psi, (1 - k_lora) * u_phi + k_lora * c_phi
    g = eps_of(psi, x_t, t) - eps_of(phi, x_t, t)
    if config.vsd.weight == "sigma2":
        g = at(sigma, t) ** 2 * g
    if config.vsd.normaliser == "dmd":
        g = g / (x0.detach() - x0_of(psi, x_t, t)).abs().mean((1, 2, 3), keepdim=True)
    elements = x0[0].numel() if config.vsd.surrogate == "mean" else 1
    x0.backward(g / (elements * B))  # the gradient of a mean over the batch

    # The LoRA teacher's last update; nothing moved it in between.
    i = STEP * config.lora.updates_per_step + config.lora.updates_per_step - 1
    t = noise.integers("lora_t", i, rows, 0, 1000)
    eps = noise.normal("lora_eps", i, rows, shape)
    dropped = noise.uniform("dropout", i, rows) < config.data.dropout
    text = torch.where(dropped[:, None, None], null, y)
    a, s = at(alpha, t), at(sigma, t)
    clean = x0.detach()
    out = functional_call(frozen, adapted(), (a * clean + s * eps, t, Conditioning(text)))
    target = {"eps": eps, "v": a * eps - s * clean, "x0": clean}[prediction]
    weight = a**2 if config.lora.loss_weight == "alpha_bar" else 1.0
    (weight * (out - target) ** 2).mean().backward()
    of_student = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
    return of_student, {k: p.grad for k, p in adapters.items() if p.grad is not None}


def levels() -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of the preset's schedule, Stable Diffusion's."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - beta, 0)
    return abar.sqrt(), (1 - abar).sqrt()
