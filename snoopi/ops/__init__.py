"""Attention (plain, NASA, its twin form), convolutions, linears; fused on the CPU where built."""

from snoopi.ops.conv import (
    Affine,
    ConvPack,
    conv,
    group_norm_fold,
    pack_conv,
)
from snoopi.ops.linear import GEGLUPack, LayerNorm, geglu, linear, pack_geglu
from snoopi.ops.nasa import (
    attention,
    explain,
    guided_attention,
    nasa_attention,
    nasa_attention_packed,
    twin_attention,
)
from snoopi.ops.packs import Formula, LinearPack, TextPack, pack_linear, pack_text

__all__ = [
    "Affine",
    "ConvPack",
    "Formula",
    "GEGLUPack",
    "LayerNorm",
    "LinearPack",
    "TextPack",
    "attention",
    "conv",
    "explain",
    "geglu",
    "group_norm_fold",
    "guided_attention",
    "linear",
    "nasa_attention",
    "nasa_attention_packed",
    "pack_conv",
    "pack_geglu",
    "pack_linear",
    "pack_text",
    "twin_attention",
]
