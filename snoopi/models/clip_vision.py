"""CLIP and OpenCLIP image towers (ViT-B/32 to bigG/14), for CLIP scores and losses.

Parameter names are Hugging Face's CLIPVisionModelWithProjection's (`pre_layrnorm` is their
spelling), with CLIPModel's logit_scale beside them. The text tower of the same model is a
snoopi.models.clip.CLIPText with a projection; both give embeddings of one width, not normalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from snoopi.layers.encoder import Activation, EncoderLayer


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a CLIP image tower; the defaults are OpenAI's ViT-B/32's.

    activation: OpenAI's weights need quick_gelu, LAION's gelu. image_size: pixels a side of the
    only size it takes. temperature: whether it keeps its CLIP model's logit_scale (a file of the
    image tower alone has none).
    """

    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    patch: int = 32
    image_size: int = 224
    projection: int = 512
    activation: Activation = "quick_gelu"
    temperature: bool = True

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_size < 1 or self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}"
            )


class CLIPVisionOutput(NamedTuple):
    """last [b n k]: after the last layer, without the final LayerNorm, class token first.
    penultimate [b n k]: input of the last layer. pooled [b k']: the class token of `last`,
    normalised by the final LayerNorm and projected: the picture's embedding, of any length."""

    last: Tensor
    penultimate: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    """A class token and patches of the picture in reading order, plus learned positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        patches = (config.image_size // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, config.width)

    def forward(self, pictures: Tensor) -> Tensor:
        """[b 3 H W] -> [b n k]."""
        x = self.patch_embedding(pictures).flatten(2).transpose(1, 2)  # [b n-1 k]
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([first, x], dim=1) + self.position_embedding.weight  # [b n k]


class VisionModel(nn.Module):
    """Embeddings, a LayerNorm, layers, and a LayerNorm of the class token."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            EncoderLayer(
                config.width, config.mlp_width, config.heads, config.activation, causal=False
            )
            for _ in range(config.layers)
        )
        self.post_layernorm = nn.LayerNorm(config.width)

    def layers(self) -> list[nn.Module]:
        """The encoder's layers in order."""
        return list(self.encoder.get_submodule("layers").children())

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b 3 H W] -> after the last layer, before it, [b n k] each; the class token [b k]."""
        x = penultimate = self.pre_layrnorm(self.embeddings(pictures))
        for layer in self.layers():
            penultimate, x = x, layer(x)
        return x, penultimate, self.post_layernorm(x[:, 0])


class CLIPVision(nn.Module):
    """A CLIP image tower: forward(pictures) -> CLIPVisionOutput.

    logit_scale: the logarithm of the factor that CLIP's training multiplies cosines by (a scalar
    of the whole model, kept here), or None. CLIP score and HPSv2 use bare cosines.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)
        self.logit_scale = None
        if config.temperature:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's first value

    def forward(self, pictures: Tensor) -> CLIPVisionOutput:
        """pictures [b 3 S S], preprocessed (snoopi.preprocess.clip_pictures)."""
        size = self.config.image_size
        if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, size, size):
            raise ValueError(f"pictures must be [b 3 {size} {size}], got {list(pictures.shape)}")
        last, penultimate, first = self.vision_model(pictures)
        return CLIPVisionOutput(last, penultimate, self.visual_projection(first))

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return self.vision_model.layers()
