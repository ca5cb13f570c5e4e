"""Frechet and kernel distance, precision, recall: torch-fidelity's, on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from snoopi.evaluate.fid import FeatureStats, frechet_distance
from snoopi.evaluate.kid import kernel_distance, squared_mmd
from snoopi.evaluate.precision_recall import precision_recall
from tests.parity import oracle

pytestmark = pytest.mark.parity
SUBSETS, SIZE = 7, 60


def features(n: int, d: int, seed: int) -> Tensor:
    """Not negative and of few large values, as what leaves a ReLU and a mean over a picture."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(9)) / d**0.5
    rows = torch.randn(n, d, generator=g) * (1 + 0.2 * seed) + 0.1 * seed
    return (rows @ mixing).exp().double()


@pytest.fixture(scope="module")
def both() -> tuple[Tensor, Tensor]:
    return features(300, 48, 0), features(220, 48, 1)


def test_frechet_distance(both: tuple[Tensor, Tensor]) -> None:
    module = oracle.package("torch_fidelity.metric_fid")
    statistics = [module.fid_features_to_statistics(x) for x in both]
    want = module.fid_statistics_to_metric(*statistics, verbose=False)[module.KEY_METRIC_FID]
    got = frechet_distance(*(FeatureStats.of(x) for x in both))
    assert got == pytest.approx(want, rel=1e-9)


def test_kernel_distance(both: tuple[Tensor, Tensor]) -> None:
    """Mean and deviation of the same subsets; and of whole sets, where nothing is drawn."""
    module = oracle.package("torch_fidelity.metric_kid")
    how = {"kid_subsets": SUBSETS, "kid_subset_size": SIZE, "rng_seed": 3, "verbose": False}
    want = module.kid_features_to_metric(*both, **how)
    draw, found = np.random.RandomState(3), []
    for _ in range(SUBSETS):
        rows = [torch.from_numpy(draw.choice(len(x), SIZE, replace=False)) for x in both]
        found.append(squared_mmd(both[0][rows[0]], both[1][rows[1]]))
    assert np.mean(found) == pytest.approx(want[module.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert np.std(found) == pytest.approx(want[module.KEY_METRIC_KID_STD], rel=1e-9)
    equal = both[0][:200], both[1][:200]
    want = module.kid_features_to_metric(*equal, **{**how, "kid_subset_size": 200})
    got = kernel_distance(*equal, subsets=SUBSETS, size=200)
    assert got.mean == pytest.approx(want[module.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert got.std == pytest.approx(0, abs=1e-9 * got.mean)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall(both: tuple[Tensor, Tensor], k: int) -> None:
    module = oracle.package("torch_fidelity.metric_prc")
    real, fake = both
    want = module.prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    got = precision_recall(real, fake, k)
    expected = want[module.KEY_METRIC_PRECISION], want[module.KEY_METRIC_RECALL]
    assert got == pytest.approx(expected, abs=1e-6)  # its shares are means in fp32
    assert min(got) > 0 and max(got) < 1
