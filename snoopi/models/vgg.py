"""VGG16 (Simonyan and Zisserman, 2015): features for precision and recall, perceptual features.

Parameter names are torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VGGConfig:
    """Sizes of a VGG; the defaults are VGG16's. convs: convolutions of each stage."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs: tuple[int, ...] = (2, 2, 3, 3, 3)
    width: int = 4096
    classes: int = 1000

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.convs) or min(self.convs, default=0) < 1:
            raise ValueError(
                f"channels and convs need one entry of at least 1 a stage, "
                f"got {self.channels} and {self.convs}"
            )


class VGGOutput(NamedTuple):
    """fc2 [b 4096]: the second fully connected layer before its ReLU; fc2_relu: after it (what
    improved precision and recall read in one port and in the other); logits [b 1000]."""

    fc2: Tensor
    fc2_relu: Tensor
    logits: Tensor


class VGG(nn.Module):
    """VGG16: forward(pictures) -> VGGOutput, taps(pictures) -> feature maps."""

    def __init__(self, config: VGGConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # where in `features` each stage's pool is
        before = 3
        for channels, convs in zip(config.channels, config.convs, strict=True):
            for _ in range(convs):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            self.ends.append(len(layers))
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        width = config.width
        self.classifier = nn.Sequential(
            nn.Linear(before * 7 * 7, width),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(width, config.classes),
        )

    def taps(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps [b c h w] after the last ReLU of each stage.

        In VGG16: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3. pictures: as in forward.
        """
        found, start = [], 0
        x = self._checked(pictures)
        for end in self.ends:
            x = self.features[start:end](x)
            found.append(x)
            start = end
        return found

    def forward(self, pictures: Tensor) -> VGGOutput:
        """pictures [b 3 h w], normalised (snoopi.preprocess.vgg_pictures); 224 x 224 as trained."""
        x = self.features(self._checked(pictures))
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)  # [b 49c], no change at 224 pixels
        fc2 = self.classifier[:4](x)
        relu = self.classifier[4](fc2)
        return VGGOutput(fc2, relu, self.classifier[5:](relu))

    def _checked(self, pictures: Tensor) -> Tensor:
        least = 2 ** len(self.ends)
        if pictures.ndim != 4 or pictures.shape[1] != 3 or min(pictures.shape[2:]) < least:
            raise ValueError(
                f"pictures must be [b 3 h w] of at least {least} pixels, got {list(pictures.shape)}"
            )
        return pictures

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return [self.features, self.classifier]
