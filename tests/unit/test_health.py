"""Health of a distillation: right sums, the same on any number of ranks and when resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from snoopi.health import COLLAPSE, Health, diversity

CPU = torch.device("cpu")


def health() -> Health:
    return Health((20, 980), (0.5, 4.5), CPU)


def mean_of(ranks: Sequence[Health]) -> dict[str, float]:
    """What parallel.mean does."""
    sums = [each.sums() for each in ranks]
    return {name: sum(s[name].item() for s in sums) / len(ranks) for name in sums[0]}


def figures(*ranks: Health) -> dict[str, float | str]:
    """The row's figures; all ranks must find the same ones."""
    means = mean_of(ranks)
    found = [each.figures(means) for each in ranks]
    assert all(each == found[0] for each in found)
    return found[0]


def pictures(spread: float, count: int = 4) -> Tensor:
    """One picture with something of its own added to each."""
    noise = torch.randn(count + 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise[:1] + spread * noise[1:]


def test_a_gap_counts_in_its_ranges() -> None:
    it = health()
    t = torch.tensor([20, 211, 212, 979])
    kappa = torch.tensor([0.5, 1.49, 1.5, 4.49])
    it.scores(torch.tensor([1.0, 3.0, 5.0, 7.0]), t, kappa)
    assert figures(it) == {
        "gap_t_20-211": 2.0,
        "gap_t_212-403": 5.0,
        "gap_t_788-979": 7.0,
        "gap_kappa_0.5-1.5": 2.0,
        "gap_kappa_1.5-2.5": 5.0,
        "gap_kappa_3.5-4.5": 7.0,
    }
    assert figures(it) == {}, "a row has what came since the row before"


def test_a_fixed_kappa_and_few_timesteps() -> None:
    it = Health((400, 402), (4.5, 4.5), CPU)
    it.scores(torch.tensor([1.0, 2.0]), torch.tensor([400, 401]), torch.tensor([4.5, 4.5]))
    assert figures(it) == {"gap_t_400-400": 1.0, "gap_t_401-401": 2.0, "gap_kappa_4.5": 1.5}


def test_diversity_of_known_pictures() -> None:
    assert diversity(pictures(0.0)).item() == 0
    noise = torch.randn(16, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    assert diversity(noise).item() == pytest.approx(math.sqrt(2), rel=0.02)
    assert diversity(7 * noise).item() == pytest.approx(diversity(noise).item())
    one = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)  # std sqrt(4/3)
    assert diversity(torch.cat([one, -one])).item() == pytest.approx(2 / math.sqrt(4 / 3))
    assert math.isfinite(diversity(torch.zeros(2, 4, 2, 2)).item())


def test_drift_of_the_probes() -> None:
    it = health()
    assert not it.probed
    for value in (1.0, 4.0, 3.0):
        it.probe(torch.full((3, 4, 2, 2), value))
    assert it.probed
    assert figures(it) == {"drift_start": (3 + 2) / 2, "drift_last": (3 + 1) / 2}


@pytest.mark.parametrize(("steps", "looks"), [(1, 1), (6, 6), (20, 20), (21, 10), (60_000, 20)])
def test_a_run_looks_at_its_probes_some_times(steps: int, looks: int) -> None:
    assert sum(Health.due(done, steps) for done in range(1, steps + 1)) == looks


def test_ranks_and_parts_add_up() -> None:
    gap, t = torch.rand(8), torch.randint(20, 980, (8,))
    kappa = torch.rand(8) * 4 + 0.5
    whole, ranks = health(), (health(), health())
    whole.scores(gap, t, kappa)
    whole.denoising(gap.mean(), t.float().mean())
    for place, rank in enumerate(ranks):
        for part in (slice(4 * place, 4 * place + 2), slice(4 * place + 2, 4 * place + 4)):
            rank.scores(gap[part], t[part], kappa[part])
            rank.denoising(gap[part].mean(), t[part].float().mean())
    assert figures(*ranks) == pytest.approx(figures(whole))


def test_one_picture_has_no_diversity() -> None:
    it = health()
    it.pictures(pictures(1.0, count=1))
    assert figures(it) == {}


def test_a_collapse_is_warned_of_once_each_time() -> None:
    it = health()
    told = []
    for spread in (1.0, 0.9, 0.2, 0.1, 1.0, 0.1):
        it.pictures(pictures(spread))
        told.append("warning" in (row := figures(it)))
        if told[-1]:
            first = diversity(pictures(1.0)).item()
            assert row["diversity"] < COLLAPSE * first
            assert f"fell from {first:.3g} to {row['diversity']:.3g}" in str(row["warning"])
    assert told == [False, False, True, False, False, True]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_resumed_run_goes_on_with_its_sums(ranks: int) -> None:
    """Saved on two ranks between two rows, after a warning."""
    saved = (health(), health())
    for spread in (1.0, 0.1):
        for place, it in enumerate(saved):
            it.probe(pictures(spread))
            it.pictures(pictures(spread))
            if spread == 1.0:
                it.scores(torch.tensor([1.0 + place]), torch.tensor([50]), torch.tensor([1.0]))
        if spread == 1.0:
            figures(*saved)
    assert "warning" in figures(*saved)
    for place, it in enumerate(saved):
        it.pictures(pictures(0.2))
        it.scores(torch.tensor([2.0 + place]), torch.tensor([50]), torch.tensor([1.0]))
    files = {name: data for rank, it in enumerate(saved) for name, data in it.files(rank).items()}
    fresh = [health() for _ in range(ranks)]
    for rank, it in enumerate(fresh):
        it.restore({**files, "other": b""}, rank, ranks)
        assert it.probed
    for group in (saved, fresh):
        for it in group:
            it.probe(pictures(0.5))
    expected, found = figures(*saved), figures(*fresh)
    assert "warning" not in found and expected["gap_t_20-211"] == 2.5
    assert found == (expected if ranks == 2 else pytest.approx(expected))


def test_a_state_without_health_starts_anew() -> None:
    it = health()
    it.restore({}, 0, 1)
    assert not it.probed and figures(it) == {}


@pytest.mark.parametrize("content", [b"", b"not ours", save({"sums": torch.zeros(1)})])
def test_a_foreign_file_is_named(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"health-0\.safetensors are no health files"):
        health().restore({"health-0.safetensors": content}, 0, 1)
