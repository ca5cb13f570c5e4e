"""Inception v3 as FID uses it (Szegedy et al., 2016; TensorFlow's weights of 2015-12-05).

Parameter names are torchvision's. It differs from torchvision's network in 1008 classes, in mean
pools that leave padding out of the mean, and in the last block, whose pool is a maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = int | tuple[int, int]
# A branch's convolutions in order, each (channels, kernel[, stride]); in a list: side by side.
Step = tuple[int, Kernel] | tuple[int, Kernel, int] | list[tuple[int, Kernel]]
Branches = Mapping[str, tuple[Step, ...]]


def _a(pool: int) -> Branches:
    return {
        "branch1x1": ((64, 1),),
        "branch5x5": ((48, 1), (64, 5)),
        "branch3x3dbl": ((64, 1), (96, 3), (96, 3)),
        "branch_pool": ((pool, 1),),
    }


def _c(mid: int) -> Branches:
    wide, high = (1, 7), (7, 1)
    return {
        "branch1x1": ((192, 1),),
        "branch7x7": ((mid, 1), (mid, wide), (192, high)),
        "branch7x7dbl": ((mid, 1), (mid, high), (mid, wide), (mid, high), (192, wide)),
        "branch_pool": ((192, 1),),
    }


_B: Branches = {"branch3x3": ((384, 3, 2),), "branch3x3dbl": ((64, 1), (96, 3), (96, 3, 2))}
_D: Branches = {
    "branch3x3": ((192, 1), (320, 3, 2)),
    "branch7x7x3": ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
}
_FORK: Step = [(384, (1, 3)), (384, (3, 1))]
_E: Branches = {
    "branch1x1": ((320, 1),),
    "branch3x3": ((384, 1), _FORK),
    "branch3x3dbl": ((448, 1), (384, 3), _FORK),
    "branch_pool": ((192, 1),),
}
# Name, channels in, branches, pool. "halve": a 3x3 maximum of stride 2 beside strided branches.
_MIXED: tuple[tuple[str, int, Branches, Literal["mean", "max", "halve"]], ...] = (
    ("Mixed_5b", 192, _a(32), "mean"),
    ("Mixed_5c", 256, _a(64), "mean"),
    ("Mixed_5d", 288, _a(64), "mean"),
    ("Mixed_6a", 288, _B, "halve"),
    ("Mixed_6b", 768, _c(128), "mean"),
    ("Mixed_6c", 768, _c(160), "mean"),
    ("Mixed_6d", 768, _c(160), "mean"),
    ("Mixed_6e", 768, _c(192), "mean"),
    ("Mixed_7a", 768, _D, "halve"),
    ("Mixed_7b", 1280, _E, "mean"),
    ("Mixed_7c", 2048, _E, "max"),
)


@dataclass(frozen=True)
class InceptionConfig:
    """The network is fixed; TensorFlow's weights have 1008 classes."""

    classes: int = 1008


class InceptionOutput(NamedTuple):
    """What evaluations read, of b pictures.

    features [b 2048]: the last mean pool ("pool3"), for FID, KID, precision and recall.
    logits [b classes]: their softmax is the class probability. logits_unbiased: without the last
    layer's bias, as the Inception Score is usually computed. features_64, features_192,
    features_768: means over the picture after the first and second pool and before Mixed_7a.
    """

    features: Tensor
    logits: Tensor
    logits_unbiased: Tensor
    features_64: Tensor
    features_192: Tensor
    features_768: Tensor


class BasicConv(nn.Module):
    """Convolution, batch norm (eps 1e-3), ReLU; "same" padding where the stride is 1."""

    def __init__(
        self, before: int, channels: int, kernel: Kernel, stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if stride == 1 and pad else (0, 0)
        self.conv = nn.Conv2d(before, channels, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c' h' w']."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches and a pool side by side, concatenated in the order of the table.

    A branch of one convolution has the branch's name; else they are numbered: name_1, name_2, and
    name_2a, name_2b where the branch forks at its end.
    """

    def __init__(
        self, before: int, branches: Branches, pool: Literal["mean", "max", "halve"]
    ) -> None:
        super().__init__()
        self.pool = pool
        self.paths: dict[str, list[list[str]]] = {}  # branch to the names of its steps
        for branch, steps in branches.items():
            self.paths[branch] = []
            channels = before
            for i, step in enumerate(steps, 1):
                forks = step if isinstance(step, list) else [step]
                base = branch if len(steps) == 1 else f"{branch}_{i}"
                names = [f"{base}{'ab'[j]}" if len(forks) > 1 else base for j in range(len(forks))]
                for name, fork in zip(names, forks, strict=True):
                    self.add_module(name, BasicConv(channels, *fork))
                self.paths[branch].append(names)
                channels = forks[0][0]

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c' h' w']."""
        parts = []
        for branch, steps in self.paths.items():
            y = self._pooled(x) if branch == "branch_pool" else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            parts.append(y)
        if self.pool == "halve":
            parts.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(parts, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Inception(nn.Module):
    """FID's Inception v3: forward(pictures) -> InceptionOutput. For measuring only, in eval mode.

    In training mode its batch norms would follow the pictures.
    """

    def __init__(self, config: InceptionConfig) -> None:
        super().__init__()
        self.config = config
        self.Conv2d_1a_3x3 = BasicConv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv(80, 192, 3, pad=False)
        for name, before, branches, pool in _MIXED:
            self.add_module(name, Mixed(before, branches, pool))
        self.fc = nn.Linear(2048, config.classes)

    def forward(self, pictures: Tensor) -> InceptionOutput:
        """pictures [b 3 299 299] from 0 to 255, unrounded (snoopi.preprocess.inception_pictures).

        The scale is TensorFlow's, (x - 128) / 128. Any size from 75 works; FID means 299.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3 or min(pictures.shape[2:]) < 75:
            raise ValueError(
                f"pictures must be [b 3 h w] of at least 75 pixels, got {list(pictures.shape)}"
            )
        x = (pictures - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        features_64 = x.mean((2, 3))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        features_192 = x.mean((2, 3))
        features_768 = features_192
        for name, *_ in _MIXED:
            if name == "Mixed_7a":
                features_768 = x.mean((2, 3))
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))  # [b 2048]
        unbiased = F.linear(features, self.fc.weight)
        logits = unbiased + self.fc.bias
        return InceptionOutput(features, logits, unbiased, features_64, features_192, features_768)

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return [self.get_submodule(name) for name, *_ in _MIXED]
