"""A world whose scores are known exactly: pictures are single numbers, prompts are numbers, too.

x0 | y ~ N(y mean, std^2). What the null text stands for, all prompts together, depends on which
prompts there are:

    "two prompts"   y = 1 or -1, equally often: half N(mean, std^2), half N(-mean, std^2)
    "all prompts"   y ~ N(0, 1): N(0, mean^2 + std^2)

The data have mean = std = 1. A one-step generator x0 = mean y + std z makes pictures of the same
family, so the scores of both teachers are known, with and without a text. By symmetry it is enough
to look at the prompt y = 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from snoopi import lora
from snoopi.conditioning import Conditioning
from snoopi.schedule import Schedule

Prompts = Literal["two prompts", "all prompts"]
DATA = (1.0, 1.0)  # mean and standard deviation of x0 at the prompt y = 1
RANK, GAMMA = 2, 4.0  # two texts need a rank of two; the multiplier gamma / rank is not 1

COND = torch.tensor([[[1.0, 0.0]]])  # [1 1 2]: the prompt y = 1
NULL = torch.tensor([[[0.0, 1.0]]])


class Generator(nn.Module):
    """The student: x0 = mean + std z at the prompt y = 1; z [b 1 1 1], in float64."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        """z in the dtype of the weights -> x0, [b 1 1 1]."""
        return self.mean + self.std * z


class ExactPair(nn.Module):
    """Both teachers with the exact answer, as one network with an adapter.

    A linear layer turns a text into the two normal distributions of equal weight that x0 is drawn
    from; the layer's own weights are those of the data, with its adapter those of a generator. So
    the row gate of snoopi.lora decides who answers, as in a real pair of teachers.
    """

    def __init__(self, prompts: Prompts, schedule: Schedule) -> None:
        super().__init__()
        self.prompts, self.schedule = prompts, schedule
        self.normals = nn.Linear(2, 4, bias=False)
        lora.inject(self, ["normals"], RANK, GAMMA)
        self.double().requires_grad_(False)
        self.normals.weight.copy_(self._normals(*DATA))
        lora.adapters(self)["normals"].lora_a.copy_(torch.eye(RANK))

    def follow(self, mean: float, std: float) -> None:
        """The LoRA teacher knows the pictures of the generator mean y + std z."""
        change = self._normals(mean, std).to(self.normals.weight) - self.normals.weight
        lora.adapters(self)["normals"].lora_b.copy_(change / (GAMMA / RANK))

    def _normals(self, mean: float, std: float) -> Tensor:
        """Means and standard deviations of the two normals [4], for each text: [4 2]."""
        wide = (mean**2 + std**2) ** 0.5
        null = {
            "two prompts": (mean, -mean, std, std),
            "all prompts": (0.0, 0.0, wide, wide),
        }
        columns = [(mean, mean, std, std), null[self.prompts]]
        return torch.tensor(columns, dtype=torch.float64).T

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The best prediction from x_t, x [b 1 1 1], in the schedule's parametrisation."""
        mean_a, mean_b, std_a, std_b = self.normals(cond.tokens[:, 0]).T  # [b] each
        alpha, sigma = (value.flatten() for value in self.schedule.alpha_sigma(t, x))  # [b]

        def answer(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
            """Of one normal: the log-density at x_t, and the best prediction."""
            var = (alpha * std).square() + sigma.square()  # of x_t
            off = x.flatten() - alpha * mean
            eps, x0 = sigma * off / var, mean + alpha * std.square() * off / var
            best = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}
            return -0.5 * (off.square() / var + var.log()), best[self.schedule.prediction]

        (log_a, best_a), (log_b, best_b) = answer(mean_a, std_a), answer(mean_b, std_b)
        # The mean of both by their posterior shares.
        return torch.lerp(best_b, best_a, torch.sigmoid(log_a - log_b)).view_as(x)


def texts(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Conditioning, Conditioning]:
    """The prompt y = 1 for a batch, and the null text."""
    return Conditioning(COND.to(dtype).expand(batch, -1, -1)), Conditioning(NULL.to(dtype))
