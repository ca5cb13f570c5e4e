"""Moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp lets the first updates forget the random start. dtype: storage of the average; the
    update runs in it. Sharded parameters give a sharded average. Build it after sharding.
    decay 0 is no average: nothing is kept.
    """

    def __init__(self, net: nn.Module, decay: float, dtype: torch.dtype = torch.float32) -> None:
        self.decay = decay
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
        weights = dict(net.named_parameters())
        averages = list(self.average.values())
        current = [weights[n].detach().to(a.dtype) for n, a in self.average.items()]
        torch._foreach_lerp_(averages, current, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name (for run states)."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over an average; tensors that were filled in place are already there."""
        for name, value in self.average.items():
            if state[name] is not value:
                value.copy_(state[name])
