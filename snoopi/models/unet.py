"""The UNet of Stable Diffusion 1.5, 2.1 and XL (and of the small worlds), from one config.

Parameter names are diffusers' UNet2DConditionModel's. Level i has `channels[i]` channels; its
blocks are resnet, then (if depth[i] > 0) a transformer of depth[i] blocks. The up path mirrors the
down path with one more resnet a level, each fed the hidden state and a skip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi.conditioning import Conditioning
from snoopi.layers.attention import CrossAttention, SelfAttention, fill_kv
from snoopi.layers.blocks import Downsample, ResnetBlock, Upsample, norm_silu_conv
from snoopi.layers.embeddings import TimestepEmbedding, sinusoid
from snoopi.layers.packed import PackedGEGLU, added, linear
from snoopi.layers.remake import remake


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are SD1.5's.

    depth, heads: transformer blocks and attention heads per level (depth 0: no transformer). The
    middle uses the last level's heads and mid_depth blocks. linear_proj: proj_in and proj_out are
    Linear (SD2.x, SDXL) instead of 1x1 convolutions. pooled_width and size_width: SDXL's pooled
    text and the sinusoid width of each of its six size ids. guidance_width: LCM's cond_proj.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    resnets: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    text_width: int = 768
    linear_proj: bool = False
    norm_groups: int = 32
    pooled_width: int | None = None
    size_width: int = 256
    guidance_width: int | None = None

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.depth) == len(self.heads):
            raise ValueError("channels, depth and heads need one entry a level each")
        for channels, heads in zip(self.channels, self.heads, strict=True):
            if channels % heads or channels % self.norm_groups:
                raise ValueError(
                    f"{channels} channels must be divisible by {heads} heads and "
                    f"{self.norm_groups} norm groups"
                )

    def size_ids(self, height: int, width: int) -> tuple[int, ...] | None:
        """SDXL's six ids of an uncropped picture of height x width pixels, h before w; or None."""
        return None if self.pooled_width is None else (height, width, 0, 0, height, width)


class FeedForward(nn.Module):
    """GEGLU: one Linear gives value and gate, value * gelu(gate), one Linear back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        gate = nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)})
        # Place 1 is diffusers' dropout: it keeps its number, not its module.
        self.net = nn.ModuleDict({"0": gate, "2": nn.Linear(4 * channels, channels)})

    def forward(self, x: Tensor) -> Tensor:
        """[b m c] -> [b m c]."""
        return remake(self._second, self.first(x))

    def added(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x + the same of norm(x): in two passes where the Linears are packed."""
        first = self.first
        if isinstance(first, PackedGEGLU) and first.takes(x, norm):
            return linear(self.net["2"], first.gated(x, norm), residual=x)
        return x + self(norm(x))

    @property
    def first(self) -> nn.Linear:
        """The Linear that gives values, then gates."""
        return self.net["0"].get_submodule("proj")  # type: ignore[return-value]

    def _second(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)  # [b m 4c] each
        return self.net["2"](value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to text, feed-forward; each with its LayerNorm before."""

    def __init__(self, channels: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads, channels // heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, text_width, heads, channels // heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, cond: Conditioning, size: tuple[int, int]) -> Tensor:
        """x [b m c], tokens of an h x w picture -> [b m c]."""
        x = added(self.attn1, x, self.norm1)
        x = added(self.attn2, x, self.norm2, cond, size)
        return added(self.ff, x, self.norm3)


class SpatialTransformer(nn.Module):
    """GroupNorm (eps 1e-6), projection in, transformer blocks over the pixels, projection out."""

    def __init__(self, config: UNetConfig, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        self.linear_proj = config.linear_proj
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, config.text_width) for _ in range(depth)
        )
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return (
            nn.Linear(channels, channels) if self.linear_proj else nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """[b c h w] -> [b c h w]."""
        h, w = x.shape[-2:]
        y = self.norm(x)
        if self.linear_proj:
            y = self.proj_in(y.flatten(2).transpose(1, 2))  # [b hw c]
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)  # [b hw c]
        for block in self.transformer_blocks:
            y = block(y, cond, (h, w))
        if self.linear_proj:
            rows = x.flatten(2).transpose(1, 2)  # [b hw c], as the pixels lie in channels-last
            y = linear(self.proj_out, y, residual=rows).unflatten(1, (h, w))  # [b h w c]
            return y.permute(0, 3, 1, 2)  # [b c h w], channels-last also to PyTorch's eyes
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, (h, w)))  # [b c h w]


class Level(nn.Module):
    """One resolution of the down path, the middle, or the up path: resnets with transformers."""

    def __init__(
        self, config: UNetConfig, widths: list[int], channels: int, heads: int, depth: int
    ) -> None:
        super().__init__()
        time_width, groups = 4 * config.channels[0], config.norm_groups
        if depth:
            self.attentions = nn.ModuleList(
                SpatialTransformer(config, channels, heads, depth) for _ in widths
            )
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, time_width, groups, 1e-5) for width in widths
        )


class DownLevel(Level):
    """Resnets (and transformers), then a downsampler on all levels but the last."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        channels = config.channels[level]
        before = config.channels[max(level - 1, 0)]
        widths = [before] + [channels] * (config.resnets - 1)
        super().__init__(config, widths, channels, config.heads[level], config.depth[level])
        if level + 1 < len(config.channels):
            self.downsamplers = nn.ModuleList([Downsample(channels, pad_all=True)])

    def forward(self, x: Tensor, temb: Tensor, cond: Conditioning) -> tuple[Tensor, list[Tensor]]:
        """The hidden state and the skips it leaves for the up path, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, cond)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidLevel(Level):
    """Resnet, transformer, resnet (two resnets alone if mid_depth is 0)."""

    def __init__(self, config: UNetConfig) -> None:
        channels, heads = config.channels[-1], config.heads[-1]
        super().__init__(config, [channels] * 2, channels, heads, 0)
        if config.mid_depth:
            transformer = SpatialTransformer(config, channels, heads, config.mid_depth)
            self.attentions = nn.ModuleList([transformer])

    def forward(self, x: Tensor, temb: Tensor, cond: Conditioning) -> Tensor:
        """[b c h w] -> [b c h w]."""
        x = self.resnets[0](x, temb)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x, cond)
        return self.resnets[1](x, temb)


class UpLevel(Level):
    """Resnets on [hidden, skip] (and transformers), then an upsampler except on the last level."""

    def __init__(self, config: UNetConfig, level: int, skip_widths: list[int]) -> None:
        channels = config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        hidden = [below] + [channels] * config.resnets
        widths = [h + s for h, s in zip(hidden, skip_widths, strict=True)]
        super().__init__(config, widths, channels, config.heads[level], config.depth[level])
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, cond: Conditioning, size: tuple | None
    ) -> Tensor:
        """Pops its skips from the end; `size` is the next level's, for odd sizes."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, cond)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, size)
        return x


class UNet(nn.Module):
    """A text-conditioned UNet: forward(x, t, cond) -> prediction (eps, v or x0)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c0, levels = config.channels[0], range(len(config.channels))
        self.conv_in = nn.Conv2d(config.in_channels, c0, 3, padding=1)
        self.time_embedding = TimestepEmbedding(c0, 4 * c0, config.guidance_width)
        if config.pooled_width:
            width = config.pooled_width + 6 * config.size_width
            self.add_embedding = TimestepEmbedding(width, 4 * c0)
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in levels)
        self.mid_block = MidLevel(config)
        skips = _skip_widths(config)
        self.up_blocks = nn.ModuleList(
            UpLevel(config, level, [skips.pop() for _ in range(config.resnets + 1)])
            for level in reversed(levels)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, c0, eps=1e-5)
        self.conv_out = nn.Conv2d(c0, config.out_channels, 3, padding=1)
        layers = self.cross_attentions()
        for i, layer in enumerate(layers):
            layer.index, layer.count = i, len(layers)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x [b c h w], t [b] (integers or floats in [0, 1000]) -> prediction [b c_out h w]."""
        temb = self._time(t, cond)
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            x, more = level(x, temb, cond)
            skips += more
        x = self.mid_block(x, temb, cond)
        for level in self.up_blocks:
            rest = len(skips) - self.config.resnets - 1
            size = tuple(skips[rest - 1].shape[-2:]) if rest else None
            x = level(x, skips, temb, cond, size)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)

    def _time(self, t: Tensor, cond: Conditioning) -> Tensor:
        """The embedding of t, of LCM's guidance and of SDXL's pooled text and sizes, [b 4 c0]."""
        temb = self.time_embedding(sinusoid(t, self.config.channels[0]), self._guidance(cond))
        if self.config.pooled_width is None:
            return temb
        if cond.pooled is None or cond.size_ids is None:
            raise ValueError("this UNet needs cond.pooled [b k] and cond.size_ids [b 6]")
        sizes = sinusoid(cond.size_ids.flatten(), self.config.size_width)  # [6b size_width]
        sizes = sizes.view(cond.size_ids.shape[0], -1)  # [b 6 size_width]
        return temb + self.add_embedding(torch.cat([cond.pooled.float(), sizes], dim=-1))

    def _guidance(self, cond: Conditioning) -> Tensor | None:
        width = self.config.guidance_width
        if cond.guidance_embed is None:
            return None
        if width is None:
            raise ValueError("cond.guidance_embed is given, but this UNet has no cond_proj")
        return sinusoid(cond.guidance_embed, width, sin_first=True, shift=1.0)

    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attentions in forward order: down, middle, up."""
        parts = [self.down_blocks, self.mid_block, self.up_blocks]
        return [m for part in parts for m in part.modules() if isinstance(m, CrossAttention)]

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards, compiles or checkpoints one by one."""
        kinds = (ResnetBlock, SpatialTransformer, Downsample, Upsample)
        return [m for m in self.modules() if isinstance(m, kinds)]

    def text_kv(self, cond: Conditioning) -> Conditioning:
        """The conditioning with the K/V of its texts filled in for every layer (inference only)."""
        return replace(cond, kv=fill_kv(self.cross_attentions(), cond))

    def initialise(self) -> None:
        """The output starts at zero."""
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]


def _skip_widths(config: UNetConfig) -> list[int]:
    """Channels of the skips in the order in which the down path leaves them."""
    widths = [config.channels[0]]
    for level, channels in enumerate(config.channels):
        widths += [channels] * config.resnets
        if level + 1 < len(config.channels):
            widths.append(channels)
    return widths
