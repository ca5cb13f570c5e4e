"""The memory plan against steps that are really made."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from snoopi import config as recipes
from snoopi import plan, zoo
from snoopi.config import Config
from snoopi.distiller import Distiller
from snoopi.pipeline import Pipeline
from snoopi.plan import Live
from snoopi.worlds.shapes import ShapesWorld

CPU = torch.device("cpu")
SPEC = zoo.model("debug")


def teacher(spec: zoo.ModelSpec) -> Pipeline:
    """A model whose text encoder reads the world's words."""
    tokenizer, text = ShapesWorld().tokenizer(), spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    spec = dataclasses.replace(spec, text=(dataclasses.replace(text, config=words),))
    backbone, encoder = (zoo.fresh(spec, part, 0) for part in ("backbone", "text_encoder"))
    return Pipeline(spec, backbone, None, [encoder.eval()], [tokenizer])


def recipe(*words: str) -> Config:
    return recipes.load("debug", ["parallel.shard=never", *words])


def test_live_follows_storages_until_they_die() -> None:
    with Live() as live:
        x = torch.zeros(1000)
        y = x[10:].view(-1)  # no storage of its own
        assert live.now == live.peak == 4000
        z = (x + 1).sum()
        assert (live.now, live.peak) == (4004, 8004)
        del x
        assert live.now == 4004, "its view holds it"
        del y
        assert live.now == 4
        live.restart()
        assert live.peak == z.nbytes


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["parallel.checkpointing=true"],
        ["parallel.checkpointing=true", "parallel.teacher_pass=sequential"],
        ["run.dtype=bf16", "run.batch=4"],
        ["model.student=lora", "student_lora.rank=4"],
    ],
    ids=" ".join,
)
def test_the_planned_step_is_the_step_that_runs(words: list[str]) -> None:
    config = recipe(*words)
    with Live() as live:  # from the start, or the weights would count where a view of them is made
        made = teacher(SPEC)
        trainer = Distiller(config, CPU, made)
        trainer.step(0)
        start = live.now
        live.restart()
        trainer.step(1)
    work = max(plan.plan(made.spec, config, 1).work.values())
    assert live.peak - start == pytest.approx(work, rel=0.15)


def test_what_stays_is_counted_from_shapes() -> None:
    config = recipe("run.dtype=bf16", "ema.dtype=bf16", "ema.decay=0.9")
    made = teacher(SPEC)
    trainer = Distiller(config, CPU, made)
    trainer.step(0)
    stays = plan.plan(made.spec, config, 1).stays

    def held(tensors: object) -> int:
        return sum(t.nbytes for t in tensors)  # type: ignore[attr-defined]

    assert stays["student"] == held(trainer.student.parameters())
    assert stays["teacher pair"] == held(trainer.pair.parameters())
    assert stays["moving average"] == held(trainer.average.average.values())
    assert stays["text encoders"] == held(trainer.teacher.text_encoders[0].parameters())
    moments = [
        moment
        for optimizer in (trainer.student_optimizer, trainer.lora_optimizer)
        for state in optimizer.adamw.state.values()
        for key, moment in state.items()
        if key != "step"
    ]
    assert stays["optimizer moments"] == held(moments)


def test_a_lora_student_and_a_cache_need_less() -> None:
    full = plan.plan(SPEC, recipe("ema.decay=0.9"), 1)
    words = ["ema.decay=0.9", "model.student=lora", "student_lora.rank=2"]
    words += ["data.prompts=p.txt", "data.cache=c"]
    config = recipe(*words)
    less = plan.plan(SPEC, config, 1)
    assert less.stays["text encoders"] == 0 < full.stays["text encoders"]
    for part in ("optimizer moments", "moving average"):
        assert 0 < less.stays[part] < full.stays[part]
    assert less.stays["student"] > full.stays["student"]  # its adapters
    lines = plan.describe(SPEC, config, [1]).splitlines()
    assert "frozen, and" in lines[0] and not any("CLIP" in line for line in lines)
    clip = [
        "clip_loss.weight=0.1",
        "clip_loss.model=m",
        "clip_loss.taesd=t",
        "clip_loss.decoder=taesd",
    ]
    assert "not counted: the networks of the CLIP loss" in plan.describe(SPEC, recipe(*clip), [1])


def test_ranks_divide_what_stays_and_the_batch() -> None:
    config = recipe("parallel.shard=auto", "run.batch=8")
    one, four = (plan.plan(SPEC, config, ranks) for ranks in (1, 4))
    assert (one.batch, four.batch) == (8, 2)
    assert one.stays["student"] / 4 <= four.stays["student"] < one.stays["student"] / 3
    assert four.stays["text encoders"] == one.stays["text encoders"]
    assert four.peak < one.peak
    whole = plan.plan(SPEC, recipe("run.batch=8"), 4)
    assert whole.stays == one.stays
    with pytest.raises(ValueError, match=r"expected 3 ranks x run.accumulate = 1 to divide"):
        plan.plan(SPEC, config, 3)


def test_checkpointing_and_sequential_passes_need_less() -> None:
    def work(*words: str) -> int:
        return max(plan.plan(SPEC, recipe(*words), 1).work.values())

    plain, checkpointed = work(), work("parallel.checkpointing=true")
    assert checkpointed < 0.5 * plain
    assert work("parallel.checkpointing=true", "parallel.teacher_pass=sequential") < checkpointed


def test_the_table_names_every_part() -> None:
    config = recipe("parallel.shard=auto", "run.batch=8")
    text = plan.describe(SPEC, config, plan.worlds(config))
    assert plan.worlds(config) == [1, 2, 4, 8]
    for word in ("student", "teacher pair", "adapters", "moments", "VAE", "peak", "checkpointing"):
        assert word in text
    assert "fits into the" in text and "with 1, 2, 4, 8 ranks" in text


# Run alone: what the process holds above its imports is the run's.
RSS = """
import dataclasses, gc, json, sys
import torch
from snoopi import config as recipes, plan, zoo
from snoopi.distiller import Distiller
sys.path.insert(0, "tests/unit")
from test_plan import MIDDLE, peak_rss, teacher

words = json.loads(sys.argv[1])
config = recipes.load("debug", words)
planned = plan.plan(MIDDLE, config, 1).peak
made = teacher(MIDDLE)  # also warms what torch loads late
held = sum(p.nbytes for p in made.backbone.parameters())
gc.collect()
before = peak_rss(reset=True)
trainer = Distiller(config, torch.device("cpu"), made)
trainer.step(0), trainer.step(1)
print(json.dumps([planned, peak_rss() - before + held]))
"""
MIDDLE = dataclasses.replace(
    zoo.model("shapes"),
    backbone=dataclasses.replace(
        zoo.model("shapes").backbone, channels=(256, 512), heads=(4, 8), norm_groups=32
    ),
    latent_size=16,
)


def peak_rss(reset: bool = False) -> int:
    """Bytes: the resident set now (reset), or its peak since."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    key = "VmRSS:" if reset else "VmHWM:"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["run.batch=4"], ["run.batch=16", "parallel.checkpointing=true"]],
    ids=" ".join,
)
def test_the_plan_is_the_resident_set_of_a_run(words: list[str]) -> None:
    # Freed blocks go back at once, or the peak is of what malloc keeps.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", RSS, json.dumps(["parallel.shard=never", *words])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned, measured = json.loads(done.stdout)
    assert measured == pytest.approx(planned, rel=0.15)
