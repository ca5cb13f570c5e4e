"""Distillation step by step: a LoRA student, two time scales, negative-aware training."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import config, lora, runstate, zoo
from snoopi.distiller import Distiller
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.worlds.shapes import ShapesWorld

NOISE = Noise(3)


def teacher() -> Pipeline:
    """An untrained debug teacher whose output is not zero."""
    spec = zoo.preset("debug")
    tokenizer = ShapesWorld().tokenizer()
    text = spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    spec = dataclasses.replace(spec, text=(dataclasses.replace(text, config=words),))
    nets = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
    out = nets["backbone"].conv_out.weight
    out.data.copy_(0.1 * NOISE.normal("out", 0, [0], out.shape)[0])
    nets["vae"].fit(ShapesWorld().batch(Noise(0), 0, range(64)).pictures)
    return Pipeline(spec, nets["backbone"], nets["vae"], [nets["text_encoder"]], [tokenizer])


def distiller(*overrides: str) -> Distiller:
    base = ["run.steps=4", "run.batch=2", 'lora.targets=["to_q"]', "model.teacher=x"]
    base += ["lora.updates_per_step=1", "optim.student.betas=[0.0, 0.99]"]
    return Distiller(config.load("debug", [*base, *overrides]), torch.device("cpu"), teacher())


def weights(trainer: Distiller) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.student.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


STUDENT = ["model.student=lora", "student_lora.rank=2", "student_lora.gamma=4"]


def test_a_lora_student_trains_and_saves_its_adapters_alone() -> None:
    trainer = distiller(*STUDENT)
    before, names = weights(trainer), set(trainer.state()["student"])
    assert names and all(name.endswith(lora.SUFFIXES) for name in names)
    assert names == set(trainer.average.average)
    for step in range(3):
        trainer.step(step)
    after = weights(trainer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == names  # every adapter, and nothing else
    assert len(trainer.student_optimizer.parameters) == len(names)


def test_the_model_folder_holds_the_merged_student() -> None:
    """The averaged adapters added to their base, under the names of the bare network."""
    trainer = distiller(*STUDENT)
    for step in range(3):
        trainer.step(step)
    pipeline = trainer.pipeline()
    assert pipeline is not None
    with torch.no_grad():
        for name, p in trainer.student.named_parameters():
            if name in trainer.average.average:
                p.copy_(trainer.average.average[name])
    part = trainer._part(0, range(2))
    x, t = NOISE.normal("x", 0, range(2), (16, 8, 8)), torch.tensor([999, 20])
    with torch.no_grad():
        got, want = pipeline.backbone(x, t, part.cond), trainer.student(x, t, part.cond)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not any(name.endswith(lora.SUFFIXES) for name in pipeline.backbone.state_dict())
    start = teacher().backbone
    assert start is not None
    assert not torch.equal(want, start(x, t, part.cond))


def test_two_time_scales_update_the_student_at_every_kth_step() -> None:
    trainer = distiller("vsd.every=2")
    states, rows, fakes = [weights(trainer)], [], [trainer.pair.state_dict()]
    averages = []
    for step in range(4):
        fakes.append({k: v.clone() for k, v in trainer.pair.state_dict().items()})
        rows.append(trainer.step(step))
        states.append(weights(trainer))
        averages.append({k: v.clone() for k, v in trainer.average.average.items()})
    same = [equal(a, b) for a, b in pairwise(states)]
    assert same == [True, False, True, False]
    # The average moves with the student alone, and its ramp counts updates: 1/10, then 2/11.
    assert equal(averages[1], averages[2])
    for name, got in averages[3].items():
        want = torch.lerp(averages[1][name], states[4][name], 9 / 11)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert ["loss_vsd" in row for row in rows] == [False, True, False, True]
    assert all("loss_lora" in row and row["grad_norm_lora"] > 0 for row in rows)
    assert all(not equal(a, b) for a, b in pairwise(fakes[1:]))
    # The LoRA teacher saw other pictures and noise at each: another loss.
    assert len({float(row["loss_lora"]) for row in rows}) == 4


@pytest.mark.parametrize(
    "words",
    [
        STUDENT,
        pytest.param(["vsd.every=3", "lora.updates_per_step=2"], marks=pytest.mark.slow),
        pytest.param(["nasa_train.alpha=[0, 1]"], marks=pytest.mark.slow),
    ],
    ids=["lora", "every", "aware"],
)
def test_a_resumed_run_is_bit_equal(words: list[str], tmp_path: Path) -> None:
    """Also with a stop between two updates of the student, and with its average."""
    whole, first, second = (distiller(*words, "run.steps=6", "ema.decay=0.9") for _ in range(3))
    want = [whole.step(step) for step in range(6)]
    got = [first.step(step) for step in range(4)]
    runstate.save(tmp_path, 4, first.state())
    assert runstate.load_latest(tmp_path, second.state()) == 4
    assert got + [second.step(step) for step in range(4, 6)] == want
    assert equal(weights(second), weights(whole))
    average = whole.average.average
    assert all(torch.equal(v, average[k]) for k, v in second.average.average.items())


def test_negative_aware_training_steers_the_student_and_the_frozen_teacher_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off, on = distiller(), distiller("nasa_train.alpha=[0.2, 0.9]")
    part = on._part(0, range(2))
    assert part.negative is not None and off._part(0, range(2)).negative is None
    cond = on._student_text(0, part)
    alpha = on._alpha(0, range(2))
    assert cond.region is not None and torch.equal(cond.region.flatten(), alpha)
    assert (alpha >= 0.2).all() and (alpha < 0.9).all() and alpha[0] != alpha[1]
    assert torch.equal(on._alpha(0, [1]), alpha[1:])  # by sample, whatever the batch
    # The student under alpha as the region equals it under alpha as a number, sample by sample.
    x0, z = on._generate(0, part), on._normal("z", 0, range(2))
    for i in range(2):
        rows = (part.cond, part.negative)
        text, away = (y.map(lambda v, i=i: v[i : i + 1]) for y in rows)
        text = dataclasses.replace(text, negative=away, nasa_scale=float(alpha[i]))
        t = on.config.vsd.student_t
        with torch.no_grad():
            out = on.student(z[i : i + 1], torch.tensor([t]), text)
            want = on.schedule.to_x0(out, z[i : i + 1], torch.tensor([t]))
        torch.testing.assert_close(x0[i : i + 1], want, rtol=1e-3, atol=1e-4)
    assert (x0 - off._generate(0, part)).abs().max() > 1e-3
    # Teachers: rows are [frozen y, frozen y- | lora y, lora null].
    seen: list[Any] = []
    forward = on.pair.forward
    monkeypatch.setattr(
        on.pair, "forward", lambda x, t, c: seen.append(c.tokens) or forward(x, t, c)
    )
    on._gradient(0, part, x0.detach())
    c_psi, u_psi, c_phi, u_phi = seen[0].chunk(4)
    assert torch.equal(c_psi, part.cond.tokens) and torch.equal(c_phi, part.cond.tokens)
    assert torch.equal(u_psi, part.negative.tokens)
    assert torch.equal(u_phi, on.null.expand(2).tokens)
    assert not torch.equal(u_psi, u_phi)
    assert "alpha = [" in on.describe(0) and "negatives = [" in on.describe(0)
    row = on.step(0)
    assert row["grad_norm_student"] > 0
