"""Frechet distance, precision and recall, Wilson intervals and the removal protocol."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi.evaluate.fid import FeatureStats, frechet_distance, frechet_interval
from snoopi.evaluate.kid import kernel_distance, squared_mmd
from snoopi.evaluate.precision_recall import precision_recall
from snoopi.evaluate.removal import (
    Choice,
    RemovalReport,
    RemovalTest,
    all_named_right,
    wilson,
)
from snoopi.noise import Noise
from snoopi.worlds import ShapesWorld
from snoopi.worlds.judge import Judge

WORLD = ShapesWorld()


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStats:
    """Statistics of given moments, from points that have them exactly."""
    d = len(mean)
    points = torch.cat([torch.eye(d), -torch.eye(d)]).double()
    points *= math.sqrt((2 * d - 1) / 2)  # unbiased covariance 1
    return FeatureStats.of(mean + points @ torch.linalg.cholesky(covariance).T)


# --- Frechet distance ------------------------------------------------------------------------


def test_statistics_in_parts_equal_one_pass() -> None:
    rows = 1e3 + draw(200, 5)  # a large mean is what a sum of squares would lose
    stats = FeatureStats(5)
    for part in rows.split([1, 99, 0, 60, 40]):
        stats.update(part)
    left, right = FeatureStats.of(rows[:70]), FeatureStats.of(rows[70:])
    left.merge(right)
    left.merge(FeatureStats(5))
    for got in (stats, left):
        assert got.count == 200
        torch.testing.assert_close(got.mean, rows.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(got.covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-11)


def test_frechet_of_commuting_gaussians_is_closed_form() -> None:
    basis = torch.linalg.qr(draw(6, 6))[0]
    a, b = draw(1, 6, 1)[0].abs() + 0.1, 9 * draw(1, 6, 2)[0].abs() + 0.1
    mean = draw(1, 6)[0]
    got = frechet_distance(
        gaussian(torch.zeros(6).double(), basis @ a.diag() @ basis.T),
        gaussian(mean, basis @ b.diag() @ basis.T),
    )
    want = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert got == pytest.approx(want.item(), rel=1e-10)


def test_frechet_against_fifty_digits() -> None:
    mpmath = pytest.importorskip("mpmath")
    x, y = draw(30, 4, 1), draw(40, 4, 2) @ draw(4, 4, 3) + 1
    x[:, 3] = x[:, 2] * (1 + 1e-9)  # nearly singular, as features are
    a, b = FeatureStats.of(x), FeatureStats.of(y)
    with mpmath.workdps(50):
        product = mpmath.matrix(a.covariance.tolist()) * mpmath.matrix(b.covariance.tolist())
        roots = sum(mpmath.sqrt(mpmath.re(v)) for v in mpmath.eig(product, right=False))
        gap = (a.mean - b.mean).square().sum().item()
        want = gap + float(a.covariance.trace() + b.covariance.trace()) - float(2 * roots)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-7)


def test_frechet_of_itself_is_zero_and_symmetric() -> None:
    a, b = FeatureStats.of(draw(50, 8)), FeatureStats.of(2 * draw(60, 8, 1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    few = FeatureStats.of(draw(3, 8))  # rank deficient
    assert math.isfinite(frechet_distance(few, b))


def test_frechet_refuses_bad_features() -> None:
    stats = FeatureStats.of(draw(5, 3))
    for call, message in (
        (lambda: stats.update(draw(5, 4)), r"\[n 3\], got \[5, 4\]"),
        (lambda: stats.update(torch.full((2, 3), torch.nan)), "finite"),
        (lambda: stats.update(torch.full((2, 3), torch.inf)), "finite"),
        (lambda: FeatureStats.of(draw(5, 3)[0]), r"\[n d\]"),
        (lambda: stats.merge(FeatureStats(4)), "3 and 4"),
        (lambda: frechet_distance(stats, FeatureStats.of(draw(5, 4))), "3 and 4"),
        (lambda: frechet_distance(stats, FeatureStats.of(draw(1, 3))), "2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- kernel distance -------------------------------------------------------------------------


def test_squared_mmd_equals_brute_force() -> None:
    x, y = draw(9, 4), draw(7, 4, 1) + 0.5

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [
            (float(p @ q) / 4 + 1) ** 3
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and i == j)
        ]
        return sum(pairs) / len(pairs)

    want = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert squared_mmd(x, y) == pytest.approx(want, rel=1e-12)
    assert squared_mmd(x.float(), y.float()) == pytest.approx(want, rel=1e-5)


def test_kernel_distance_has_no_bias_and_sees_a_shift() -> None:
    real, fake = draw(2000, 6), draw(3000, 6, 1)
    same = kernel_distance(real, fake, subsets=60, size=100)
    assert abs(same.mean) < 4 * same.std / 60**0.5 + 1e-3
    assert kernel_distance(real, fake, subsets=60, size=100) == same
    assert kernel_distance(real, fake, subsets=60, size=100, seed=1) != same
    assert kernel_distance(real, fake + 0.5, subsets=60, size=100).mean > 10 * abs(same.mean) + 0.1


def test_kernel_distance_refuses_bad_features() -> None:
    for call, message in (
        (lambda: kernel_distance(draw(50, 3), draw(50, 3)), "1000 rows a side, got 50"),
        (lambda: kernel_distance(draw(9, 3), draw(9, 4), size=5), "3 and 4 values"),
        (lambda: kernel_distance(draw(9, 3), draw(9, 3), size=1), "size at least 2, got 100 and 1"),
        (lambda: squared_mmd(draw(9, 3), draw(9, 3)[0]), r"finite \[n d\], got \[3\]"),
        (lambda: squared_mmd(draw(9, 3), draw(9, 3) * torch.nan), r"finite \[n d\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- precision and recall --------------------------------------------------------------------


def test_frechet_interval_covers_the_distance_and_narrows() -> None:
    reference = FeatureStats.of(draw(20_000, 4, seed=1))
    widths = []
    for n in (300, 2700):
        low, high = frechet_interval(draw(n, 4, seed=2) + 0.5, reference)  # |mean|^2 = 1
        assert low < 1.0 < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 3, rel=0.3)  # by the root of n


def brute_force(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    def share(rows: Tensor, centres: Tensor) -> float:
        radii = []
        for i, centre in enumerate(centres):
            others = [float((centre - c).norm()) for j, c in enumerate(centres) if j != i]
            radii.append(sorted(others)[k - 1])
        inside = [
            any(float((r - c).norm()) <= rad for c, rad in zip(centres, radii, strict=True))
            for r in rows
        ]
        return sum(inside) / len(inside)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_equals_brute_force(k: int, block: int) -> None:
    real, fake = 100 + draw(40, 3), 100.5 + 0.6 * draw(31, 3, 1)
    want = brute_force(real, fake, k)
    assert precision_recall(real, fake, k, block) == pytest.approx(want, abs=1e-12)
    assert 0 < want[1] < want[0] <= 1


def test_precision_and_recall_tell_two_failures_apart() -> None:
    real = torch.cat([draw(100, 4), draw(100, 4, 1) + 50])
    dropped = draw(80, 4, 2)  # good pictures of one mode only
    precision, recall = precision_recall(real, dropped)
    assert precision > 0.7 and recall < 0.5
    junk = torch.cat([real + 1e-3, 500 * draw(200, 4, 3)])
    precision, recall = precision_recall(real, junk)
    assert precision < 0.55 and recall > 0.95


def test_precision_recall_refuses_bad_features() -> None:
    good = draw(10, 3)
    for real, fake, k, message in (
        (good, draw(3, 3), 3, "more than 3 fake rows, got 3"),
        (good, draw(10, 2), 3, "3 and 2"),
        (good[0], good, 3, "real features"),
        (good, good * torch.nan, 3, "fake features must be finite"),
        (good, good, 0, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(real, fake, k)


# --- removal ---------------------------------------------------------------------------------


def test_wilson_intervals() -> None:
    # Newcombe (1998), Table I: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
    for successes, n in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, n)


class PixelJudge:
    """Reads labels that FakeModel wrote into the picture (of real ones, whatever stands there)."""

    def features(self, pictures: Tensor) -> Tensor:
        return pictures[:, 0, 0, :5]

    def labels_of(self, features: Tensor) -> Tensor:
        return features.round().long()


class FakeModel:
    """Shows what the prompt names, the rest by its noise; removes at known rates.

    The negative's value is replaced by its successor with probability `remove`; a named attribute
    is broken with probability `spoil` and another with probability `stray`, if there is a negative.
    """

    def __init__(self, remove: float, spoil: float = 0.0, stray: float = 0.0) -> None:
        self.remove, self.spoil, self.stray = remove, spoil, stray
        self.plain_calls = 0

    def __call__(
        self, prompts: list[str], negatives: list[str] | None, indices: list[int]
    ) -> Tensor:
        self.plain_calls += negatives is None
        rows = []
        for i, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
            rng = Noise(0).generator("fake", 0, index)
            what, unwanted = WORLD.named(prompt), None
            if negatives is not None:
                ((unwanted, value),) = WORLD.named(negatives[i]).items()
            row = []
            for name, values in WORLD.attributes.items():
                shown, luck = int(rng.integers(len(values))), float(rng.random())
                shown = what.get(name, shown)
                if unwanted == name:
                    change = shown == value and luck < self.remove
                elif unwanted is not None:
                    change = luck < (self.spoil if name in what else self.stray)
                else:
                    change = False
                row.append((shown + change) % len(values))
            rows.append(row)
        pictures = torch.zeros(len(rows), 3, 32, 32)
        pictures[:, 0, 0, :5] = torch.tensor(rows).float()
        return pictures


def make(model: FakeModel, seed: int = 3, **options: Any) -> RemovalTest:
    return RemovalTest(model, PixelJudge(), WORLD, Noise(seed), **options)  # type: ignore[arg-type]


def run(model: FakeModel, **options: int) -> RemovalReport:
    return make(model, **options).measure(model)


def test_removal_recovers_known_rates() -> None:
    model = FakeModel(remove=0.7, spoil=0.1, stray=0.25)
    report = run(model, count=200)
    total = report.targeted["total"]
    assert total.n == 1000 and total.free_before == 0
    assert total.free == pytest.approx(0.7, abs=0.06)
    assert total.free_low < 0.7 < total.free_high
    assert total.keep_before == 1 and total.keep == pytest.approx(0.9, abs=0.04)
    assert total.keep_ratio == total.keep
    assert total.keep_low is not None and total.keep_low < 0.9 < (total.keep_high or 0)
    assert total.same_low is not None and total.same_low < 0.75 < (total.same_high or 0)
    assert total.same == pytest.approx(0.75, abs=0.05)
    easy = report.easy["colour"]
    assert easy.n == 200
    assert easy.free_before == pytest.approx(0.8, abs=0.12)  # one value in five
    assert easy.free == pytest.approx(0.8 + 0.2 * 0.7, abs=0.08)
    assert list(report.easy) == [*WORLD.attributes, "total"]


class HalfBlind(PixelJudge):
    """Reads nothing of the first attribute where its value is even."""

    def labels_of(self, features: Tensor) -> Tensor:
        labels = super().labels_of(features)
        labels[labels[:, 0] % 2 == 0, 0] = -1
        return labels


def test_where_nothing_is_shown_there_is_nothing_to_remove() -> None:
    model, first = FakeModel(remove=0.7), next(iter(WORLD.attributes))
    test = RemovalTest(model, HalfBlind(), WORLD, Noise(3), count=60)  # type: ignore[arg-type]
    found, seen = test.measure(model), run(model, count=60)
    targeted = found.targeted[first]
    assert 0 < targeted.n < 60 and targeted.free_before == 0
    assert found.targeted["total"].n == 4 * 60 + targeted.n
    assert found.easy[first].n == 60 and found.targeted["size"].free == seen.targeted["size"].free


def test_removal_without_effect() -> None:
    report = run(FakeModel(remove=0), count=30)
    for table in (report.easy, report.targeted):
        for result in table.values():
            assert result.free == result.free_before
            assert result.keep == result.same == 1


def test_removal_does_not_depend_on_the_batch_and_is_json() -> None:
    a, b = (run(FakeModel(0.5, 0.1, 0.1), count=30, batch=n) for n in (7, 64))
    assert a == b
    assert json.loads(json.dumps(a.to_dict(), allow_nan=False)) == a.to_dict()


def test_removal_refuses_bad_calls() -> None:
    with pytest.raises(ValueError, match="positive"):
        run(FakeModel(1), count=0)
    with pytest.raises(ValueError, match="unknown attribute 'weight'"):
        make(FakeModel(1), attributes=["weight"])
    with pytest.raises(ValueError, match="at least one attribute"):
        make(FakeModel(1), attributes=[])
    with pytest.raises(ValueError, match="strength"):
        make(FakeModel(1), count=1).choose_scale(lambda _: FakeModel(1), [])


def choose(scales: list[float], spoil: float) -> tuple[Choice, int]:
    models: dict[float, FakeModel] = {}

    def at(scale: float) -> FakeModel:
        assert scale not in models, "a strength was measured twice"
        return models.setdefault(scale, FakeModel(remove=scale / 2, spoil=spoil * scale))

    plain = FakeModel(remove=0)
    test = make(plain, seed=0, count=100, split="train")
    choice = test.choose_scale(at, scales)
    assert not any(m.plain_calls for m in models.values())
    return choice, plain.plain_calls


def test_choose_scale_stops_at_the_bound() -> None:
    scales = [0.5, 1.0, 1.5, 2.0]
    choice, plain_calls = choose(scales, spoil=0.035)  # keep 0.965 at 1, 0.93 at 2
    assert choice.met and 0.5 <= choice.scale < 2.0
    within = {s for s, r in choice.results.items() if (r.keep_ratio or 0) >= 0.96}
    assert choice.scale == max(within) and within < set(choice.results)
    # Two halvings of the grid's last interval: the next strength that was tried is an eighth away.
    assert min(s for s in choice.results if s > choice.scale) == choice.scale + 0.125
    assert len(choice.results) == len(scales) + 2
    assert plain_calls == 5 * 2  # once for all strengths: 5 attributes, 100 prompts by 64
    assert choose(scales, spoil=0.0)[0].scale == 2.0
    assert json.dumps(choice.to_dict(), allow_nan=False)


def test_choose_scale_says_when_none_meets_the_bound() -> None:
    choice, _ = choose([2.0, 1.0], spoil=0.3)
    assert not choice.met and choice.scale == 1.0


def free_of(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> Tensor:
    """Real pictures of the prompts: a perfect generator, which obeys its negatives."""
    labels = WORLD.batch(Noise(77), 0, indices).labels
    for row, prompt in enumerate(prompts):
        for name, value in WORLD.named(prompt).items():
            labels[row, list(WORLD.attributes).index(name)] = value
        if negatives is not None:
            ((name, value),) = WORLD.named(negatives[row]).items()
            column = list(WORLD.attributes).index(name)
            # The next value that is not the negative, by the world's priors among the rest.
            others = [v for v in range(len(WORLD.attributes[name])) if v != value]
            weights = torch.tensor([WORLD.priors[name][v] for v in others])
            if labels[row, column] == value:
                draw = Noise(78).uniform("other", 0, [indices[row]])
                labels[row, column] = others[int((draw * weights.sum() >= weights.cumsum(0)).sum())]
    return WORLD.render(labels, WORLD.nuisance(Noise(79), 0, indices))


def test_fidelity_is_best_for_real_pictures_without_the_negative() -> None:
    test = RemovalTest(free_of, Judge.load(), WORLD, Noise(3), count=100)
    report = test.measure(free_of)
    for kind in ("easy", "targeted"):
        fidelity = report.fidelity[kind]
        assert fidelity.low <= fidelity.frechet <= fidelity.high
        assert report.to_dict()[kind]["total"]["free"] == 1
    targeted = report.fidelity["targeted"]
    # 500 other real pictures lie about 0.4 off; those that show the negative lie much further.
    assert targeted.frechet < 0.8 and targeted.before > 2 * targeted.frechet
    assert set(report.tables()) == {"easy", "targeted"}


def test_all_named_right() -> None:
    prompts = ["a red circle", "a small shape", "", "green"]
    labels = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    rate, per = all_named_right(WORLD, labels, prompts)
    assert rate == pytest.approx(2 / 3)
    assert per == {"shape": 1.0, "colour": 1.0, "size": 0.0}
    with pytest.raises(ValueError, match="no prompt names"):
        all_named_right(WORLD, labels[:1], [""])
    with pytest.raises(ValueError, match=r"\[4, 5\]"):
        all_named_right(WORLD, labels[:2], prompts)
