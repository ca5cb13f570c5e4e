"""The health of a distillation: figures that tell early when it goes wrong, at next to no cost.

They are summed between rows of metrics.jsonl, from numbers that a step has anyway; only the fixed
probes and one comparison a row call a network once more, without gradients. Nothing here draws from
a stream of the run or changes a weight, so a run has the same numbers with and without it.

    gap_t_A-B, gap_kappa_A-B   root mean square of the guided teachers' difference (what Eq. 7
                               drives to 0), by ranges of the timestep and of kappa
    diversity                  mean distance of two pictures' x0, in a picture's deviations
    drift_start, drift_last    distance of the probes' x0 from their first and their last x0
    denoise_lora, _frozen      denoising losses of both teachers on the student's pictures
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

PROBES = 8  # fixed pictures whose x0 is compared over a run, at most
LOOKS = 20  # looks at the probes in a run
BINS_T, BINS_KAPPA = 5, 4
COLLAPSE = 0.5  # a diversity below this share of the run's first one is an alarm
_FIGURES = ("diversity", "drift_start", "drift_last", "denoise_lora", "denoise_frozen")


class Health:
    """Sums of one rank since the last row, and what the next figures are compared with.

    Args:
        t: range of the teachers' timesteps [low, high).
        kappa: range of the frozen teacher's guidance scale [low, high].
    """

    def __init__(
        self, t: tuple[int, int], kappa: tuple[float, float], device: torch.device
    ) -> None:
        whole = [round(edge) for edge in _edges(*t, min(BINS_T, t[1] - t[0]))]
        scales = _edges(*kappa, BINS_KAPPA if kappa[1] > kappa[0] else 1)
        names = [f"gap_t_{a}-{b - 1}" for a, b in pairwise(whole)]
        self._kappa_at = len(names)
        pairs = pairwise(scales)
        names += [f"gap_kappa_{a:.4g}-{b:.4g}" if a < b else f"gap_kappa_{a:.4g}" for a, b in pairs]
        self.names = [*names, *_FIGURES]
        self._t_inner = torch.tensor(whole[1:-1], dtype=torch.float64, device=device)
        self._kappa_inner = torch.tensor(scales[1:-1], dtype=torch.float64, device=device)
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)
        self._start: Tensor | None = None
        self._last: Tensor | None = None
        self._first_diversity = math.nan
        self._alarmed = False

    # --- what a step tells ------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, gap: Tensor, t: Tensor, kappa: Tensor) -> None:
        """The teachers' gap at timesteps t and guidance scales kappa, [b] each."""
        self._add_binned(0, gap, t, self._t_inner)
        self._add_binned(self._kappa_at, gap, kappa, self._kappa_inner)

    @torch.no_grad()
    def pictures(self, x0: Tensor) -> None:
        """Pictures of one part of a step [b c h w]; one alone tells nothing.

        Pairs of different parts or ranks are not compared: that would gather all pictures. The mean
        is of the same expectation, so a curve may have a small step where the ranks change.
        """
        if len(x0) > 1:
            self._add("diversity", diversity(x0))

    @torch.no_grad()
    def denoising(self, lora_teacher: Tensor, frozen: Tensor) -> None:
        """Both teachers' denoising losses (scalars) on the same pictures, timesteps and noise."""
        self._add("denoise_lora", lora_teacher)
        self._add("denoise_frozen", frozen)

    @property
    def probed(self) -> bool:
        """Whether there is a first x0 of the probes to compare with."""
        return self._start is not None

    @staticmethod
    def due(done: int, steps: int) -> bool:
        """Whether to look at the probes after `done` of `steps` updates: LOOKS times a run.

        Not at every state: when a run saves may change on resuming, its rows must not.
        """
        return done % math.ceil(steps / LOOKS) == 0

    @torch.no_grad()
    def probe(self, x0: Tensor) -> None:
        """x0 of the probes now, [n c h w]: the same noise and prompts each time."""
        x0 = x0.detach().float().contiguous()
        if self._start is None or self._last is None:
            self._start = x0
        else:
            self._add("drift_start", _distance(x0, self._start))
            self._add("drift_last", _distance(x0, self._last))
        self._last = x0

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[self.names.index(name)] += torch.stack(
            [value.double(), value.new_ones(()).double()]
        )

    def _add_binned(self, first: int, values: Tensor, keys: Tensor, inner: Tensor) -> None:
        """Add values [b] to the ranges, from name `first` on, that `inner` edges part."""
        places = torch.bucketize(keys.double(), inner, right=True)  # [b]
        # By a product with 0 and 1: scattered adds on CUDA have no fixed order.
        each = (places[:, None] == torch.arange(len(inner) + 1, device=keys.device)).double()
        found = torch.stack([each.T @ values.double(), each.sum(0)], 1)  # [k 2]
        self._sums[first : first + len(found)] += found

    # --- rows -------------------------------------------------------------------------------------

    def sums(self) -> dict[str, Tensor]:
        """Sums and counts since the last row, to be averaged over ranks for `figures`."""
        return {
            f"{name} {kind}": self._sums[row, column]
            for row, name in enumerate(self.names)
            for column, kind in enumerate(("sum", "count"))
        }

    def figures(self, means: Mapping[str, float]) -> dict[str, float | str]:
        """The row's figures from `sums` averaged over ranks; starts the next row.

        What had no sample is left out. "warning" is the text of an alarm, when it begins.
        """
        found: dict[str, float | str] = {}
        for name in self.names:
            if means[f"{name} count"] > 0:
                found[name] = means[f"{name} sum"] / means[f"{name} count"]
        self._sums.zero_()
        now = found.get("diversity")
        if isinstance(now, float):
            if math.isnan(self._first_diversity):
                self._first_diversity = now
            fallen = now < COLLAPSE * self._first_diversity
            if fallen and not self._alarmed:
                found["warning"] = (
                    f"diversity of x0 fell from {self._first_diversity:.3g} to {now:.3g}: "
                    "the student may be collapsing"
                )
            self._alarmed = fallen
        return found

    # --- run states -------------------------------------------------------------------------------

    def files(self, rank: int) -> dict[str, bytes]:
        """This rank's part of a run state, for runstate.save: it makes a resumed row the same."""
        tensors = {"sums": self._sums, "alarm": self._alarm()}
        if rank == 0 and self._start is not None and self._last is not None:
            tensors |= {"start": self._start, "last": self._last}
        copies = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        return {_file(rank): tensor_bytes(copies)}

    def _alarm(self) -> Tensor:
        return torch.tensor([self._first_diversity, float(self._alarmed)], dtype=torch.float64)

    def restore(self, files: Mapping[str, bytes], rank: int, ranks: int) -> None:
        """Go on from what `files` of all ranks gave; at another number of ranks rank 0 has all.

        A state without such files (its run had no health) starts anew, from the probes of now.

        Raises:
            ValueError: a file is not one of ours.
        """
        names = sorted(name for name in files if name.startswith("health-"))
        if _file(0) not in names:
            return
        try:
            found = {name: read_tensors(files[name]) for name in names}
            main = found[_file(0)]
            same = len(names) == ranks
            mine = [found[_file(rank)]] if same else list(found.values()) if rank == 0 else []
            fits = all(each["sums"].shape == self._sums.shape for each in mine)
            for each in mine if fits else []:
                self._sums += each["sums"].to(self._sums)
            self._first_diversity, alarmed = main["alarm"].tolist()
            self._alarmed = bool(alarmed)
            if "start" in main:
                self._start = main["start"].to(self._sums.device)
                self._last = main["last"].to(self._sums.device)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"the run state's {', '.join(names)} are no health files: {error}"
            ) from None


def diversity(x0: Tensor) -> Tensor:
    """Mean distance of two of the pictures [b c h w], b >= 2, in a picture's standard deviations.

    Distances are root mean squares over elements, so pictures that have nothing in common are about
    1.4 apart, and equal ones 0.
    """
    flat = x0.float().flatten(1)  # [b c*h*w]
    distance = F.pdist(flat).mean() / math.sqrt(flat.shape[1])
    return distance / flat.std(1).mean().clamp(min=1e-12)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean over pictures of the root mean square difference."""
    return (x - y).square().flatten(1).mean(1).sqrt().mean()


def _edges(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / count for i in range(count + 1)]


def _file(rank: int) -> str:
    return f"health-{rank}.safetensors"
