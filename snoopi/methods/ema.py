"""Moving average of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from snoopi.noise import Noise

Local = Callable[[Tensor], tuple[Tensor, int]]
_AT_ONCE = 2**20  # elements that are averaged in fp32 at a time


def whole(x: Tensor) -> tuple[Tensor, int]:
    """A tensor that is not sharded: its first row is row 0."""
    return x, 0


class EMA:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp lets the first updates forget the random start. Sharded parameters give a sharded
    average. Build it after sharding. decay 0 is no average: nothing is kept.

    dtype: storage of the average. In bf16 an update is computed in fp32 and rounded up or down at
    random, by its distance to either: (1 - d) of a difference is below half a step of bf16 for
    nearly all weights, and to the nearest the average would never move. So its expectation is the
    fp32 average, and its noise stays at sqrt(k / 2) steps of bf16 where a weight is k steps away.

    noise: of that rounding, keyed by update, name and place in the whole tensor, so that ranks and
    resumed runs round alike. local(x): this rank's rows of a tensor, and which is the first.
    """

    def __init__(
        self,
        net: nn.Module,
        decay: float,
        dtype: torch.dtype = torch.float32,
        noise: Noise | None = None,
        local: Local = whole,
    ) -> None:
        self.decay, self.noise, self.local = decay, noise or Noise(0), local
        self.average = {
            name: p.detach().to(dtype, copy=True)
            for name, p in net.named_parameters()
            if p.requires_grad and decay
        }

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """One update with the weights after `step` (counted from 0)."""
        if not self.average:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = {name: p.detach() for name, p in net.named_parameters() if name in self.average}
        averages = list(self.average.values())
        if averages[0].dtype == torch.bfloat16:
            for name, average in self.average.items():
                self._update_bf16(name, average, weights[name], 1 - decay, step)
            return
        current = [weights[n].to(a.dtype) for n, a in self.average.items()]
        torch._foreach_lerp_(averages, current, 1 - decay)

    def _update_bf16(
        self, name: str, average: Tensor, weight: Tensor, share: float, step: int
    ) -> None:
        """One tensor, some rows at a time: fp32 of all of it would be what bf16 is to spare."""
        (here, first), (there, _) = self.local(average), self.local(weight)
        if not here.numel():
            return
        if not here.ndim:
            here, there = here[None], there[None]
        row = here[0].numel()
        for a, w in zip(*(x.split(max(1, _AT_ONCE // row)) for x in (here, there)), strict=True):
            bits = self.noise.bits(f"ema {name}", step, first * row, a.numel())
            a.copy_(round_at_random(a.float().lerp_(w.float(), share), bits.view(a.shape)))
            first += len(a)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name (for run states)."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over an average; tensors that were filled in place are already there."""
        for name, value in self.average.items():
            if state[name] is not value:
                value.copy_(state[name])


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """x (fp32) rounded to a neighbour in bf16, so that the mean over random bits is x; fp32.

    bits: int32 from 0 to 2^16 - 1. bf16 is the upper half of fp32: what is added to the lower half
    carries over as often as that half is large, and then it is cut off.
    """
    return ((x.view(torch.int32) + bits.to(x.device)) & -(2**16)).view(torch.float32)
