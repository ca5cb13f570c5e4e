"""Stateless noise: a number depends on seed, stream, step and sample index, on nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from snoopi.noise import Noise

NOISE = Noise(7)


def test_a_draw_does_not_depend_on_the_batch_it_is_drawn_in() -> None:
    whole = NOISE.normal("z", 3, range(10), (4, 2, 2))
    torch.rand(5)  # global generators play no part
    np.random.default_rng(0)
    parts = [NOISE.normal("z", 3, part, (4, 2, 2)) for part in ([0, 1, 2], [3], range(4, 10))]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[[9, 2]], Noise(7).normal("z", 3, [9, 2], (4, 2, 2)))
    assert torch.equal(whole[5], NOISE.sample("z", 3, 5, (4, 2, 2)))


def test_uniform_and_integers_do_not_depend_on_the_batch_either() -> None:
    u, i = NOISE.uniform("kappa", 1, range(6)), NOISE.integers("t", 1, range(6), 20, 981)
    assert torch.equal(u[4:], NOISE.uniform("kappa", 1, [4, 5]))
    assert torch.equal(i[4:], NOISE.integers("t", 1, [4, 5], 20, 981))


def test_seed_stream_step_and_index_all_matter() -> None:
    draws = [
        Noise(seed).normal(stream, step, [index], (8,))
        for seed, stream, step, index in itertools.product(
            (0, 1, -1, 2**40), ("z", "eps", ""), (0, 1), (0, 1, 2**33)
        )
    ]
    for a, b in itertools.combinations(draws, 2):
        assert not (a == b).any()


def test_key_fields_do_not_run_into_each_other() -> None:
    assert not torch.equal(NOISE.normal("a", 1, [0], (4,)), NOISE.normal("a", 0, [1], (4,)))
    assert not torch.equal(NOISE.normal("init a", 0, [0], (4,)), NOISE.normal("init", 0, [0], (4,)))


def test_shapes_and_dtypes() -> None:
    for draw in (NOISE.normal("z", 0, [1, 2], (3, 4)), NOISE.uniform("u", 0, [1, 2], shape=(3, 4))):
        assert draw.shape == (2, 3, 4) and draw.dtype == torch.float32
    assert NOISE.normal("z", 0, [1, 2]).shape == (2,)
    assert NOISE.normal("z", 0, []).shape == (0,)
    integers = NOISE.integers("t", 0, [1, 2, 3], 0, 5, (2,))
    assert integers.shape == (3, 2) and integers.dtype == torch.int64


def test_normal_has_gaussian_moments_over_samples_and_within_one() -> None:
    for x in (NOISE.normal("z", 0, range(20000)), NOISE.sample("z", 0, 0, (200, 100)).flatten()):
        x, n = x.double(), x.numel()
        assert abs(float(x.mean())) < 5 / n**0.5
        assert abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
        assert abs(float((x**3).mean())) < 5 * (15 / n) ** 0.5
        assert abs(float((x**4).mean()) - 3) < 5 * (96 / n) ** 0.5


def test_streams_steps_and_neighbours_are_uncorrelated() -> None:
    z = NOISE.normal("z", 0, range(20000))
    for other in (NOISE.normal("eps", 0, range(20000)), NOISE.normal("z", 1, range(20000))):
        assert abs(float((z * other).mean())) < 5 / len(z) ** 0.5
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / len(z) ** 0.5


def test_uniform_fills_its_bins_evenly() -> None:
    u = NOISE.uniform("kappa", 0, range(20000), 0.5, 4.0)
    assert float(u.min()) >= 0.5 and float(u.max()) < 4.0
    expected = len(u) / 50
    chi_square = ((torch.histc(u, 50, 0.5, 4.0) - expected) ** 2 / expected).sum()
    assert 49 - 5 * 98**0.5 < float(chi_square) < 49 + 5 * 98**0.5


def test_integers_reach_both_ends_and_stay_inside() -> None:
    t = NOISE.integers("t", 0, range(20000), 20, 25)
    assert t.unique().tolist() == [20, 21, 22, 23, 24]
    counts = torch.bincount(t - 20).double()
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 4 + 5 * 8**0.5


def test_uniform_of_an_empty_range_is_the_constant() -> None:
    assert (NOISE.uniform("kappa", 0, range(100), 1.7, 1.7) == torch.tensor(1.7)).all()


@pytest.mark.parametrize("index", [0, 12345678901])
def test_generator_is_fresh_each_time(index: int) -> None:
    first = NOISE.generator("z", 0, index).standard_normal(3)
    assert (first == NOISE.generator("z", 0, index).standard_normal(3)).all()
