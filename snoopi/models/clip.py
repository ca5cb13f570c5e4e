"""CLIP text encoders (CLIP-L, OpenCLIP-H, OpenCLIP-bigG, and the small worlds').

Parameter names are Hugging Face's CLIPTextModel's (with text_projection beside it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from snoopi.layers.encoder import Activation, EncoderLayer


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a CLIP text encoder; the defaults are CLIP-L's.

    projection: width of the pooled projection, None without one (SD1.5, SD2.x). pad_id: the
    tokenizer's padding (SD1.5 pads with eos, SD2.x and SDXL's second encoder with 0).
    """

    vocabulary: int = 49408
    length: int = 77
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    activation: Activation = "quick_gelu"
    projection: int | None = None
    eos_id: int = 49407
    masked: ClassVar[bool] = False  # padding is read as text, here and by the backbone

    def for_words(self, vocabulary: int, length: int) -> CLIPTextConfig:
        """The same encoder for a vocabulary whose last id is eos, and prompts of `length`."""
        return replace(self, vocabulary=vocabulary, length=length, eos_id=vocabulary - 1)


class CLIPTextOutput(NamedTuple):
    """last [b n k]: final LayerNorm applied. penultimate [b n k]: input of the last layer, without
    it (what SDXL reads). pooled [b k']: the eos position of `last`, projected if there is one."""

    last: Tensor
    penultimate: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    """Token and position embeddings."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b n] -> [b n k]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(positions)


class TextModel(nn.Module):
    """Embeddings, layers, final LayerNorm: last and penultimate features."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            EncoderLayer(
                config.width, config.mlp_width, config.heads, config.activation, causal=True
            )
            for _ in range(config.layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.width)

    def layers(self) -> list[nn.Module]:
        """The encoder's layers in order."""
        return list(self.encoder.get_submodule("layers").children())

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [b n] -> after the last layer and LayerNorm, before the last layer; [b n k] each."""
        x = penultimate = self.embeddings(ids)
        for layer in self.layers():
            penultimate, x = x, layer(x)
        return self.final_layer_norm(x), penultimate


class CLIPText(nn.Module):
    """A CLIP text encoder: forward(ids) -> CLIPTextOutput."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = None
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor) -> CLIPTextOutput:
        """ids int64 [b n], padded; no mask: every position attends to those before it."""
        last, penultimate = self.text_model(ids)
        # The first eos, by its id: padding may be eos again, and added tokens may exceed it.
        eos = (ids == self.config.eos_id).int().argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), eos]  # [b k]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return CLIPTextOutput(last, penultimate, pooled)

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return self.text_model.layers()
