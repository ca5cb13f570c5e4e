"""Rules for an automatic strength, by hand and beside NASA."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.evaluate import negatives
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.reproduce import candidates
from snoopi.reproduce.candidates import CANDIDATES, RULES, Automatic
from snoopi.worlds import ShapesWorld


def randn(*shape: int, seed: int) -> Tensor:
    return Noise(seed).normal("test", 0, [0], shape)[0]


Z_POS, Z_NEG, Z_NULL = (randn(2, 5, 3, 8, seed=i) for i in range(3))  # [b m h d]
LSE_POS, LSE_NEG = (randn(2, 5, 3, seed=i) for i in (3, 4))


def combine(how: Automatic, z_neg: Tensor = Z_NEG) -> Tensor:
    return how.combine(Z_POS, LSE_POS, z_neg, LSE_NEG, Z_NULL)


def test_projection_leaves_nothing_of_the_negative_and_adds_nothing() -> None:
    z = combine(Automatic(rule="projection"))
    held = (Z_POS * Z_NEG).sum(-1)
    left = (z * Z_NEG).sum(-1)
    torch.testing.assert_close(left, held.clamp(max=0), atol=1e-5, rtol=1e-5)
    assert (held > 0).any() and torch.equal(z[held < 0], Z_POS[held < 0])


def test_norm_does_not_see_the_length_of_the_negative() -> None:
    z = combine(Automatic(0.5, rule="norm"))
    torch.testing.assert_close(z, combine(Automatic(0.5, rule="norm"), 7 * Z_NEG))
    away = (Z_POS - z).norm(dim=-1)
    torch.testing.assert_close(away, 0.5 * Z_POS.norm(dim=-1))


@pytest.mark.parametrize("centred", [False, True])
def test_mass_is_nasa_where_both_texts_tie(centred: bool) -> None:
    how = Automatic(0.7, rule="mass", centred=centred)
    z = how.combine(Z_POS, LSE_POS, Z_NEG, LSE_POS, Z_NULL)
    away = Z_NEG - Z_NULL if centred else Z_NEG
    torch.testing.assert_close(z, Z_POS - 0.7 * away)
    dead = torch.full_like(LSE_NEG, -torch.inf)  # a negative without a key
    gone = how.combine(Z_POS, LSE_POS, torch.zeros_like(Z_NEG), dead, torch.zeros_like(Z_NULL))
    assert torch.equal(gone, Z_POS)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_take_away_changes_nothing(rule: str) -> None:
    assert torch.equal(combine(Automatic(2.0, rule=rule), torch.zeros_like(Z_NEG)), Z_POS)


@pytest.mark.parametrize("name", ["auto-mass", "auto-mass-centred"])
def test_pictures_are_those_of_nasa_under_a_rule_of_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(zoo.preset("debug"), one_step=zoo.OneStep())
    nets: Any = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
    out = nets["backbone"].conv_out.weight
    out.data.copy_(0.1 * randn(*out.shape, seed=1))
    nets["vae"].fit(ShapesWorld().batch(Noise(0), 0, range(64)).pictures)
    texts, words = [nets["text_encoder"]], [ShapesWorld().tokenizer()]
    pipeline = Pipeline(spec, nets["backbone"], nets["vae"], texts, words)
    case = (["a red circle", "a shape"], ["red", "star"], [3, 4])
    drawn = candidates.drawer(pipeline, name, 0)(1.5)(*case)
    monkeypatch.setitem(RULES, "mass", lambda pos, away, lse_pos, lse_neg: lse_pos * 0 + 1)
    one = candidates.drawer(pipeline, name, 0)(1.5)(*case)
    mode = "nasa-centred" if CANDIDATES[name].centred else "nasa"
    nasa = negatives.drawer(pipeline, mode, 0)(1.5)(*case)
    torch.testing.assert_close(one, nasa, atol=1e-5, rtol=1e-5)
    assert (drawn - nasa).abs().max() > 1e-3
