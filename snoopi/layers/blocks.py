"""Convolution blocks that UNet and VAE share. Parameter names are diffusers'."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from snoopi.layers.packed import PackedConv2d
from snoopi.layers.remake import remake


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))): in one pass where the convolution is packed (snoopi.optimize)."""
    if isinstance(conv, PackedConv2d) and conv.takes(x, norm):
        return conv.fused(x, norm)
    return conv(F.silu(norm(x)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, plus the input (1x1 conv if widths differ)."""

    def __init__(
        self, channels: int, out_channels: int, time_width: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.conv_shortcut = None if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x [b c h w], temb [b time_width] -> [b c_out h w]."""
        if isinstance(self.conv1, PackedConv2d) and self.conv1.takes(x, self.norm1):
            return self._fused(x, temb)
        h = remake(self._first, x)  # [b c_out h w]
        if self.time_emb_proj is not None:
            assert temb is not None
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = remake(self._second, h)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def _fused(self, x: Tensor, temb: Tensor | None) -> Tensor:
        conv1, conv2 = self.conv1, self.conv2
        assert isinstance(conv1, PackedConv2d)
        time = None
        if self.time_emb_proj is not None:
            assert temb is not None
            time = self.time_emb_proj(F.silu(temb))  # [b c_out]
        h = conv1.fused(x, self.norm1, time=time)
        rest = x if self.conv_shortcut is None else self.conv_shortcut(x)
        if isinstance(conv2, PackedConv2d) and conv2.takes(h, self.norm2):
            return conv2.fused(h, self.norm2, residual=rest)
        return rest + self._second(h)

    def _first(self, x: Tensor) -> Tensor:
        return norm_silu_conv(self.norm1, self.conv1, x)

    def _second(self, h: Tensor) -> Tensor:
        return norm_silu_conv(self.norm2, self.conv2, h)


class Downsample(nn.Module):
    """Halve height and width by a stride-2 convolution.

    pad_all: one pixel all around (UNet); else right and bottom only (VAE encoder).
    """

    def __init__(self, channels: int, *, pad_all: bool) -> None:
        super().__init__()
        self.pad_all = pad_all
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all else 0)

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c h/2 w/2]."""
        return self.conv(x if self.pad_all else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width (or match `size`) by nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[b c h w] -> [b c 2h 2w]; `size` for odd sizes, where the skip is one pixel short."""
        height, width = x.shape[-2:]
        if isinstance(self.conv, PackedConv2d) and size in (None, (2 * height, 2 * width)):
            return self.conv.of_doubled(x)
        if size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
