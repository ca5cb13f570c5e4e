"""Frechet distance between two sets of features (Heusel et al. 2017), in float64 throughout."""

from __future__ import annotations

import torch
from torch import Tensor

from snoopi.noise import Noise

DRAWS = 200  # resamplings behind an interval


class FeatureStats:
    """Mean and covariance of features seen in parts, by Chan's pairwise update.

    Equal to one pass over all rows up to rounding; merge() joins the parts of several processes.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of outer deviations

    @classmethod
    def of(cls, features: Tensor) -> FeatureStats:
        """The statistics of one matrix of features [n d]."""
        if features.ndim != 2:
            raise ValueError(f"features must be [n d], got {list(features.shape)}")
        stats = cls(features.shape[1])
        stats.update(features)
        return stats

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> FeatureStats:
        """The statistics of `count` rows with that mean [d] and unbiased covariance [d d].

        Raises ValueError for other shapes, values that are not finite, fewer than two rows, and
        what no covariance can be: not symmetric, or with a negative variance.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean [d] and covariance [d d] expected, "
                f"got {list(mean.shape)} and {list(covariance.shape)}"
            )
        if count < 2:
            raise ValueError(f"a covariance needs 2 rows of features or more, got {count}")
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite, got NaN or infinite values")
        covariance = covariance.double()
        skew, largest = (covariance - covariance.T).abs().max(), covariance.abs().max()
        if bool(skew > 1e-5 * largest):
            raise ValueError("a covariance must be symmetric: is it one of its triangles?")
        if bool((covariance.diagonal() < 0).any()):
            raise ValueError("a covariance must have no negative variance on its diagonal")
        stats = cls(len(mean))
        stats.count, stats.mean = count, mean.double()
        stats._scatter = covariance * (count - 1)
        return stats

    def update(self, features: Tensor) -> None:
        """Add rows [n d]. Raises ValueError for another width or values that are not finite."""
        width = len(self.mean)
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"features must be [n {width}], got {list(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError("features must be finite, got NaN or infinite values")
        if len(features) == 0:
            return
        rows = features.detach().to("cpu", torch.float64)
        mean = rows.mean(0)
        self._join(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: FeatureStats) -> None:
        """Add all that another object of the same width has seen."""
        if len(other.mean) != len(self.mean):
            raise ValueError(
                f"features of {len(self.mean)} and {len(other.mean)} values cannot be merged"
            )
        if other.count:
            self._join(other.count, other.mean, other._scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [d d]. Raises ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 rows of features or more, got {self.count}")
        return self._scatter / (self.count - 1)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        gap = mean - self.mean
        self._scatter = self._scatter + scatter
        self._scatter = self._scatter + torch.outer(gap, gap) * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of S_b^(1/2) S_a S_b^(1/2),
    which is symmetric: no complex square root, no offset on the diagonal.

    Raises ValueError for different widths or fewer than two rows on a side.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} values cannot be compared")
    return _distance(a, b.mean, b.covariance.trace(), _root(b.covariance))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance [d d]."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding leaves -1e-17 and such


def _distance(a: FeatureStats, mean: Tensor, trace: Tensor, root: Tensor) -> float:
    """The distance to a set of that mean, trace and root of the covariance."""
    cov = a.covariance
    product = root @ cov @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    gap = (a.mean - mean).square().sum()
    return max(0.0, (gap + cov.trace() + trace - 2 * eigenvalues.sqrt().sum()).item())


def frechet_interval(
    features: Tensor, reference: FeatureStats, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % interval of the Frechet distance of features [n d] to a reference, at this n.

    F +- 1.96 times its standard deviation over bootstrap resamples of the rows, not below 0. The
    quantiles of the resamples would not do: each lies further off than the rows themselves. F at a
    finite n is above that of endless rows, alike for all that is compared at equal n. The reference
    is held fixed.
    """
    n, noise, covariance = len(features), Noise(0), reference.covariance
    root, trace = _root(covariance), covariance.trace()
    distance = _distance(FeatureStats.of(features), reference.mean, trace, root)
    resampled = []
    for draw in range(draws):
        rows = torch.from_numpy(noise.generator("bootstrap", 0, draw).integers(0, n, n))
        stats = FeatureStats.of(features[rows])
        resampled.append(_distance(stats, reference.mean, trace, root))
    spread = 1.959964 * torch.tensor(resampled, dtype=torch.float64).std().item()
    return max(0.0, distance - spread), distance + spread
