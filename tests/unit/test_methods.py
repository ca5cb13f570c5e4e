"""Losses against closed forms and against plain recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from snoopi import lora, zoo
from snoopi.conditioning import Conditioning, concat
from snoopi.config import Optim
from snoopi.guidance import cfg
from snoopi.methods import vsd
from snoopi.methods.autoencode import autoencoding_loss
from snoopi.methods.denoise import (
    denoising_loss,
    draw_timesteps,
    drop_text,
    loss_weight,
)
from snoopi.methods.ema import EMA, round_at_random
from snoopi.methods.vsd import (
    TeacherScores,
    draw_kappa,
    surrogate,
    teacher_scores,
    vsd_gradient,
)
from snoopi.models.vae import VAE, PatchVAE, PatchVAEConfig, VAEConfig
from snoopi.noise import Noise
from snoopi.schedule import Schedule
from snoopi.trainers import lr_factor

NOISE = Noise(5)
SPEC = zoo.preset("debug")
B = 3


def pair() -> nn.Module:
    """A tiny backbone with adapters that do something."""
    net = zoo.fresh(SPEC, "backbone", 0).eval()
    nn.init.normal_(net.conv_out.weight)
    lora.inject(net, ["to_q", "ff.net.2", "conv1", "time_emb_proj"], 4, 8, NOISE)
    for i, p in enumerate(lora.parameters(net)):
        p.data += 0.1 * NOISE.normal("adapter", 0, [i], p.shape)[0]
    return net


def texts() -> tuple[Conditioning, Conditioning]:
    width = SPEC.backbone.text_width
    cond = Conditioning(NOISE.normal("cond", 0, range(B), (5, width)))
    return cond, Conditioning(NOISE.normal("null", 0, [0], (5, width)))


def latents(stream: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return NOISE.normal(stream, 0, range(B), (16, 8, 8)).to(dtype)


T = torch.tensor([20, 500, 980])


def test_teacher_scores_equal_four_plain_calls() -> None:
    net, (cond, null), x_t = pair(), texts(), latents("x")
    kappa, kappa_lora = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([2.0, 0.7, 1.0])
    scores = teacher_scores(net, x_t, T, cond, null, kappa, kappa_lora)
    frozen = copy.deepcopy(net)
    lora.remove(frozen)
    with torch.no_grad():
        expected = cfg(frozen(x_t, T, cond), frozen(x_t, T, null.expand(B)), kappa)
        adapted = cfg(net(x_t, T, cond), net(x_t, T, null.expand(B)), kappa_lora)
    # Matrix products of 12 rows and of 3 may round differently: 7e-7 of the values' size on either
    # side, which guidance (c and u, weighted 4 and -3) can raise tenfold.
    for got, plain in ((scores.teacher, expected), (scores.lora_teacher, adapted)):
        assert (got - plain).abs().max() < 1e-5 * plain.abs().max()
    assert (expected - adapted).abs().max() > 0.01


def test_teacher_passes_are_one_call_where_weights_are_gathered_or_calls_cost() -> None:
    for asked in ("fused", "sequential"):
        assert vsd.choose_passes(asked, False, 1) == vsd.choose_passes(asked, True, 10**6) == asked
    assert vsd.choose_passes("auto", True, 10**6) == "fused"
    assert vsd.choose_passes("auto", False, vsd.SMALL - 1) == "fused"
    assert vsd.choose_passes("auto", False, vsd.SMALL) == "sequential"


def test_sequential_teacher_passes_equal_the_fused_one() -> None:
    """In fp64: in fp32 products of 12 rows and of 3 round differently, by 1e-6 after guidance."""
    net, x_t = pair().double(), latents("x").double()
    cond, null = (text.map(lambda x: x.double()) for text in texts())
    for kappa in (0.0, 1.0):  # the null prediction alone, and the guided one
        k = torch.full((B,), kappa)
        fused = teacher_scores(net, x_t, T, cond, null, k, k)
        sequential = teacher_scores(net, x_t, T, cond, null, k, k, "sequential")
        for got, expected in zip(sequential, fused, strict=True):
            assert (got - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (fused.teacher - fused.lora_teacher).abs().max() > 0.01
    assert all(layer.first_row == 0 for layer in lora.adapters(net).values())


def test_frozen_rows_are_bit_equal_with_adapters_set_to_inf() -> None:
    net, (cond, null), x_t = pair(), texts(), latents("x")
    frozen = copy.deepcopy(net)
    lora.remove(frozen)
    for p in lora.parameters(net):
        p.data.fill_(torch.inf)
    kappa = torch.tensor([0.5, 1.5, 4.0])
    scores = teacher_scores(net, x_t, T, cond, null, kappa, kappa)
    # The network without adapters, on the same batch of four: rounding depends on its size.
    batch = concat([cond, null.expand(B)] * 2)
    with torch.no_grad():
        out = frozen(x_t.repeat(4, 1, 1, 1), T.repeat(4), batch)
    c, u = out[: 2 * B].chunk(2)
    assert torch.equal(scores.teacher, cfg(c, u, kappa))
    assert not scores.lora_teacher.isfinite().all()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_surrogates_gradient_is_the_vsd_gradient(prediction: str, reduction: str) -> None:
    schedule = Schedule(prediction=prediction)  # type: ignore[arg-type]
    x0 = latents("x0", torch.float64).requires_grad_()
    x_t = latents("x_t", torch.float64)
    scores = TeacherScores(latents("psi", torch.float64), latents("phi", torch.float64))
    gradient = vsd_gradient(schedule, scores, x0.detach(), x_t, T)
    alpha, sigma = schedule.alpha_sigma(T, x_t)
    factor = {"eps": 1.0, "v": alpha, "x0": -alpha / sigma}[prediction]
    closed = sigma**2 * factor * (scores.teacher - scores.lora_teacher)
    torch.testing.assert_close(gradient, closed, rtol=1e-9, atol=1e-12)
    (got,) = torch.autograd.grad(surrogate(x0, gradient, reduction).sum(), x0)  # type: ignore[arg-type]
    elements = x0[0].numel() if reduction == "mean" else 1
    torch.testing.assert_close(got, closed / elements, rtol=1e-9, atol=1e-12)


def test_the_dmd_normaliser_divides_by_the_teachers_distance() -> None:
    schedule, x0, x_t = Schedule(prediction="eps"), latents("x0"), latents("x_t")
    scores = TeacherScores(latents("psi"), latents("phi"))
    plain = vsd_gradient(schedule, scores, x0, x_t, T, "none")
    divided = vsd_gradient(schedule, scores, x0, x_t, T, "none", "dmd")
    distance = (x0 - schedule.to_x0(scores.teacher, x_t, T)).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(divided * distance, plain)


def test_the_gradient_is_linear_in_kappa() -> None:
    """E over kappa of the gradient is the gradient at the mean kappa: why controls are needed."""
    net, (cond, null), x_t = pair(), texts(), latents("x")
    schedule = SPEC.schedule

    def gradient(kappa: float) -> Tensor:
        k = torch.full((B,), kappa)
        return vsd_gradient(schedule, teacher_scores(net, x_t, T, cond, null, k, k), x_t, x_t, T)

    mean = (gradient(0.5) + gradient(4.0)) / 2
    torch.testing.assert_close(mean, gradient(2.25), rtol=1e-4, atol=1e-5)


def test_kappa_draws() -> None:
    indices = range(4000)
    shared, shared_lora = draw_kappa(NOISE, 0, indices, (0.5, 4.0), (1.0, 2.0))
    assert 0.5 <= shared.min() < 0.52 and 3.98 < shared.max() < 4.0
    assert abs(shared.mean() - 2.25) < 0.06
    torch.testing.assert_close((shared - 0.5) / 3.5, shared_lora - 1.0)
    a, b = draw_kappa(NOISE, 0, indices, (0.5, 4.0), (0.5, 4.0), draw="independent")
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05
    one, _ = draw_kappa(NOISE, 3, range(8, 16), (0.5, 4.0), (0.5, 4.0), per="batch")
    assert (one == draw_kappa(NOISE, 3, [0], (0.5, 4.0), (0.5, 4.0), per="batch")[0]).all()
    fixed, _ = draw_kappa(NOISE, 0, indices, (4.5, 4.5), (2.25, 2.25))
    assert (fixed == 4.5).all()


def test_denoising_loss_of_the_true_answer_is_zero() -> None:
    x0, eps, cond = latents("x0"), latents("eps"), texts()[0]
    for prediction in ("eps", "v", "x0"):
        schedule = Schedule(prediction=prediction)  # type: ignore[arg-type]
        target = schedule.target(x0, eps, T)
        loss = denoising_loss(lambda x, t, c, y=target: y, schedule, x0, T, eps, cond)
        assert (loss == 0).all()
        off = denoising_loss(lambda x, t, c, y=target: y + 2, schedule, x0, T, eps, cond)
        torch.testing.assert_close(off, torch.full((B,), 4.0))


def test_loss_weights_mean_the_same_error_of_x0() -> None:
    """min-SNR weights one and the same x0 error alike, whatever the network predicts."""
    x_t, error = latents("x_t", torch.float64), 0.1
    alpha, sigma = Schedule().alpha_sigma(T, x_t)
    scale = {"x0": 1.0, "eps": alpha / sigma, "v": 1 / sigma}
    weighted = [
        loss_weight(Schedule(prediction=p), T, "min_snr", x_t) * (error * s) ** 2  # type: ignore[arg-type]
        for p, s in ((p, torch.as_tensor(s).flatten()) for p, s in scale.items())
    ]
    torch.testing.assert_close(weighted[1], weighted[0])
    torch.testing.assert_close(weighted[2], weighted[0])


def test_timesteps_fill_their_range() -> None:
    for sampling, middle in (("uniform", 0.5), ("logit_normal", 0.728)):
        t = draw_timesteps(NOISE, 0, range(4000), (100, 900), sampling)  # type: ignore[arg-type]
        assert t.min() >= 100 and t.max() < 900 and abs(t.double().mean() - 500) < 15
        # The share between the quartiles of the range: sigmoid(N(0, 1)) in (1/4, 3/4).
        share = ((t >= 300) & (t < 700)).double().mean()
        assert abs(share - middle) < 0.03, sampling
        alone = draw_timesteps(NOISE, 0, [7], (100, 900), sampling)  # type: ignore[arg-type]
        assert alone == t[7]


def test_text_dropout_takes_whole_rows() -> None:
    cond, null = texts()
    out = drop_text(cond, null, torch.tensor([True, False, True]))
    assert torch.equal(out.tokens[0], null.tokens[0])
    assert torch.equal(out.tokens[1], cond.tokens[1])


def test_ema_ramps_and_averages() -> None:
    net = nn.Linear(2, 2)
    average = EMA(net, 0.9)
    start = average.average["weight"].clone()
    with torch.no_grad():
        net.weight += 1
    average.update(net, 0)
    torch.testing.assert_close(average.average["weight"], start + 0.9)  # d = 1 / 10
    average.update(net, 10_000)
    torch.testing.assert_close(average.average["weight"], start + 0.9 + 0.1 * 0.1)


def test_an_average_in_bf16_follows_the_one_in_fp32() -> None:
    """At a decay of 0.9999 an update is 1/80 of a step of bf16, which is lost to the nearest."""
    net = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        net.weight.fill_(1.0)
    exact, rough = EMA(net, 0.9999), EMA(net, 0.9999, torch.bfloat16, Noise(5))
    with torch.no_grad():
        net.weight += 1.0
    for step in range(100_000, 101_000):
        exact.update(net, step)
        rough.update(net, step)
    (a,), (b,) = exact.average.values(), (x.float() for x in rough.average.values())
    assert a.mean() > 1.09, "they must have somewhere to go"
    # The updates are independent, so the mean is of 64^2 elements with a variance of
    # (1000 updates) (1/80 of a step) (a step)^2 at most.
    deviation = 2**-7 * (1000 / 80) ** 0.5
    assert (b - a).square().mean().sqrt() < deviation
    assert abs((b - a).mean().item()) < 4 * deviation / 64
    assert b.unique().numel() > 4


def test_rounding_at_random_gives_either_neighbour_by_its_distance() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-9, -1.0 - 3 * 2**-9, 0.0, 1.996, float("inf"), 2.0**-130])
    every = torch.arange(2**16, dtype=torch.int32)[:, None]
    got = round_at_random(x.expand(2**16, -1).contiguous(), every.expand(-1, len(x)))
    assert torch.equal(got, got.bfloat16().float()), "bf16 holds them"
    assert torch.equal(got.double().mean(0), x.double())
    low, high = got[0], got[-1]
    assert (low[[1, 2, 4]] != high[[1, 2, 4]]).all() and torch.equal(low[[0, 3, 5]], x[[0, 3, 5]])
    assert high[4] == 2.0


def test_an_average_in_bf16_rounds_by_place_and_update() -> None:
    """Rows of a shard as in the whole, in any memory format, and not the same at every update."""

    def averaged(rows: slice, steps: range, channels_last: bool = False) -> torch.Tensor:
        net = nn.Conv2d(3, 5, 3)
        weight = NOISE.normal("weight", 0, range(5), (3, 3, 3))
        net.weight = nn.Parameter(weight[rows].clone())
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        first = rows.start or 0
        average = EMA(net, 0.99, torch.bfloat16, NOISE, lambda x: (x, first))
        for step in steps:
            with torch.no_grad():
                net.weight *= 1.01
            average.update(net, step)
        return average.average["weight"]

    whole = averaged(slice(None), range(100, 110))
    assert torch.equal(averaged(slice(2, 4), range(100, 110)), whole[2:4])
    assert torch.equal(averaged(slice(None), range(100, 110), channels_last=True), whole)
    assert not torch.equal(averaged(slice(None), range(200, 210)), whole)


def test_autoencoding_loss_parts() -> None:
    vae = VAE(VAEConfig(channels=(8, 8), resnets=1, norm_groups=4, scaling=0.5))
    pictures = NOISE.uniform("p", 0, range(2), -1, 1, (3, 8, 8))
    eps = torch.zeros(2, 4, 4, 4)
    loss = autoencoding_loss(vae, pictures, eps, l1=0.0, kl=0.0)
    expected = (vae(pictures) - pictures).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.total, expected)
    mean, logvar = vae.moments(pictures)
    normal = torch.distributions.Normal(0.0, 1.0)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, normal).mean((1, 2, 3))
    torch.testing.assert_close(loss.kl, kl)


def test_patch_vae_is_the_best_linear_code() -> None:
    basis = NOISE.normal("basis", 0, range(5), (48,))
    code = NOISE.normal("code", 0, range(200), (4, 5)) @ basis + 0.3  # [200 4 48]: rank 5
    fold = {"output_size": (8, 8), "kernel_size": 4, "stride": 4}
    pictures = nn.functional.fold(code.transpose(1, 2), **fold)
    vae = PatchVAE(PatchVAEConfig(latent_channels=5))
    vae.fit(pictures)
    latents = vae.encode(pictures)
    torch.testing.assert_close(vae.decode(latents), pictures, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(5), rtol=1e-2, atol=1e-2)


def test_learning_rate_schedules() -> None:
    def course(schedule: str, warmup: int = 0) -> list[float]:
        optim = Optim(schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
        return [lr_factor(optim, step, 100) for step in range(100)]

    assert course("constant") == [1.0] * 100
    cosine = course("cosine", warmup=10)
    assert cosine[0] == pytest.approx(0.1) and cosine[50] == pytest.approx(0.5)
    assert cosine[99] < 0.001
    flat = course("trapezoid")
    assert flat[:71] == [1.0] * 71
    assert flat[85] == pytest.approx(0.5) and flat[99] == pytest.approx(1 / 30)
