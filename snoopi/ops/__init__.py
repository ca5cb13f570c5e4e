"""Cross-attention ops: plain attention, NASA and its twin form; fused on the CPU where built."""

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
    "Formula",
    "LinearPack",
    "TextPack",
    "attention",
    "explain",
    "guided_attention",
    "nasa_attention",
    "nasa_attention_packed",
    "pack_linear",
    "pack_text",
    "twin_attention",
]
