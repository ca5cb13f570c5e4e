"""Autoencoders between pictures and latents: AutoencoderKL, TAESD, a fixed linear patch transform.

All give encode(pictures) -> scaled latents and decode(latents) -> pictures in [-1, 1]; the scaling
factor is inside, so that nothing outside can forget it or apply it twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.layers.blocks import Downsample, ResnetBlock, Upsample, norm_silu_conv


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an AutoencoderKL; the defaults are Stable Diffusion's (SDXL: scaling 0.13025)."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2
    norm_groups: int = 32
    scaling: float = 0.18215

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel."""
        return 2 ** (len(self.channels) - 1)


class MidAttention(nn.Module):
    """One head of self-attention over the pixels, with GroupNorm (eps 1e-6) and residual inside."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c h w]."""
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # [b hw c]
        q, k, v = (f(y).unsqueeze(2) for f in (self.to_q, self.to_k, self.to_v))  # [b hw 1 c]
        y = self.to_out[0](ops.attention(q, k, v).flatten(-2))  # [b hw c]
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])  # [b c h w]


class Mid(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, None, groups, 1e-6) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c h w]."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets, then a down- or upsampler where the level has one."""

    def __init__(self, before: int, channels: int, resnets: int, groups: int, sampler: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(before if i == 0 else channels, channels, None, groups, 1e-6)
            for i in range(resnets)
        )
        self.downsamplers = self.upsamplers = None
        if sampler == "down":
            self.downsamplers = nn.ModuleList([Downsample(channels, pad_all=False)])
        if sampler == "up":
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c' h' w']."""
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in self.downsamplers or self.upsamplers or ():
            x = sampler(x)
        return x


class Encoder(nn.Module):
    """Picture -> mean and log-variance of the latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        before = (channels[0], *channels)
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            Level(before[i], c, config.resnets, groups, "down" if i < last else "")
            for i, c in enumerate(channels)
        )
        self.mid_block = Mid(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b 3 H W] -> [b 2z h w]."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """Latent -> picture; each level has one resnet more than the encoder's."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Mid(channels[0], groups)
        before = (channels[0], *channels)
        last = len(channels) - 1
        self.up_blocks = nn.ModuleList(
            Level(before[i], c, config.resnets + 1, groups, "up" if i < last else "")
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[b z h w] -> [b 3 H W]."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class VAE(nn.Module):
    """AutoencoderKL (Rombach et al., 2022), as in every Stable Diffusion."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return [m for m in self.modules() if isinstance(m, (Level, Mid))]

    def forward(self, pictures: Tensor) -> Tensor:
        """Reconstructions [b 3 H W] of pictures, through the mean of the latent."""
        return self.decode(self.encode(pictures))

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to -30..20) of the unscaled latent, [b z h w] each."""
        mean, logvar = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pictures: Tensor, eps: Tensor | None = None) -> Tensor:
        """Pictures [b 3 H W] in [-1, 1] -> latents [b z h w], scaled; a sample if eps is given."""
        mean, logvar = self.moments(pictures)
        if eps is not None:
            mean = mean + (0.5 * logvar).exp() * eps
        return mean * self.config.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [b z h w] -> pictures [b 3 H W] in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling))


@dataclass(frozen=True)
class PatchVAEConfig:
    """Sizes of a linear patch transform."""

    in_channels: int = 3
    latent_channels: int = 16
    patch: int = 4

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel."""
        return self.patch


class PatchVAE(nn.Module):
    """The best linear autoencoder of p x p patches: principal components of unit variance.

    A fixed transform with the interface of VAE for worlds too small to learn one in: latents are
    (patch - mean) @ encode, pictures latents @ decode + mean. `fit` computes all three.
    """

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.in_channels * config.patch**2
        z = config.latent_channels
        if z > width:
            raise ValueError(f"latent_channels must be at most {width}, got {z}")
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.to_latent = nn.Parameter(torch.zeros(width, z), requires_grad=False)
        self.to_patch = nn.Parameter(torch.zeros(z, width), requires_grad=False)

    def blocks(self) -> list[nn.Module]:
        """Nothing to shard or to checkpoint: two matrices."""
        return []

    @torch.no_grad()
    def fit(self, pictures: Tensor) -> None:
        """Principal components of the patches of pictures [b 3 H W], in float64."""
        x = self._patches(pictures).flatten(0, 1).double()  # [b hw width]
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((x - mean).T))
        # Largest first; a fixed sign, so that the same pictures give the same latents anywhere.
        values, vectors = values.flip(0), vectors.flip(1)
        vectors = vectors * vectors.sum(0).sign()
        std = values[: self.config.latent_channels].sqrt()
        basis = vectors[:, : self.config.latent_channels]
        for name, value in (
            ("mean", mean),
            ("to_latent", basis / std),
            ("to_patch", (basis * std).T),
        ):
            getattr(self, name).copy_(value)

    def _patches(self, pictures: Tensor) -> Tensor:
        """[b 3 H W] -> [b hw 3pp]."""
        return F.unfold(pictures, self.config.patch, stride=self.config.patch).transpose(1, 2)

    def encode(self, pictures: Tensor, eps: Tensor | None = None) -> Tensor:
        """Pictures [b 3 H W] in [-1, 1] -> latents [b z h w] of unit variance (eps is ignored)."""
        size = [s // self.config.patch for s in pictures.shape[2:]]
        z = (self._patches(pictures) - self.mean) @ self.to_latent  # [b hw z]
        return z.transpose(1, 2).unflatten(2, size)  # [b z h w]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b z h w] -> pictures [b 3 H W] in about [-1, 1]."""
        size = tuple(s * self.config.patch for s in latents.shape[2:])
        x = latents.flatten(2).transpose(1, 2) @ self.to_patch + self.mean  # [b hw 3pp]
        return F.fold(x.transpose(1, 2), size, self.config.patch, stride=self.config.patch)


@dataclass(frozen=True)
class TAESDConfig:
    """Sizes of a TAESD; the defaults are those of taesd and taesdxl alike.

    scaling: 1.0, since TAESD was trained on scaled latents. encoder_blocks, decoder_blocks: of each
    level, in forward order.
    """

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.encoder_blocks) == len(self.decoder_blocks) >= 1:
            raise ValueError(
                f"encoder_blocks and decoder_blocks need one entry a level, "
                f"got {self.encoder_blocks} and {self.decoder_blocks}"
            )

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel."""
        return 2 ** (len(self.encoder_blocks) - 1)


class TinyBlock(nn.Module):
    """Three convolutions with ReLUs between, plus the input, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b c h w] -> [b c h w]."""
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Picture -> latent; a stride-2 convolution begins every level but the first."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        c = config.channels
        layers: list[nn.Module] = []
        for i, blocks in enumerate(config.encoder_blocks):
            first = nn.Conv2d(config.in_channels, c, 3, padding=1)
            halve = nn.Conv2d(c, c, 3, stride=2, padding=1, bias=False)
            layers += [first if i == 0 else halve, *(TinyBlock(c) for _ in range(blocks))]
        layers.append(nn.Conv2d(c, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [b 3 H W] in [-1, 1] -> [b z h w]; the network itself reads [0, 1]."""
        return self.layers((x + 1) / 2)


class TinyDecoder(nn.Module):
    """Latent -> picture; nearest-neighbour doubling ends every level but the last."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        c, last = config.channels, len(config.decoder_blocks) - 1
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, c, 3, padding=1),
            nn.ReLU(),
        ]
        for i, blocks in enumerate(config.decoder_blocks):
            layers += [TinyBlock(c) for _ in range(blocks)]
            if i < last:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1, bias=False)]
        layers.append(nn.Conv2d(c, config.in_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """[b z h w] -> [b 3 H W] in about [-1, 1]; the latent is squashed to within +-3."""
        return self.layers(torch.tanh(z / 3) * 3) * 2 - 1


class TAESD(nn.Module):
    """A tiny autoencoder on Stable Diffusion's latents (O. Boer Bohan's TAESD and TAESDXL).

    Parameter names are diffusers' AutoencoderTiny's. The interface is VAE's, without randomness.
    """

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return [m for m in self.modules() if isinstance(m, TinyBlock)]

    def forward(self, pictures: Tensor) -> Tensor:
        """Reconstructions [b 3 H W] of pictures."""
        return self.decode(self.encode(pictures))

    def encode(self, pictures: Tensor, eps: Tensor | None = None) -> Tensor:
        """Pictures [b 3 H W] in [-1, 1] -> latents [b z h w], scaled (eps is ignored)."""
        return self.encoder(pictures) * self.config.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [b z h w] -> pictures [b 3 H W] in about [-1, 1]."""
        return self.decoder(latents / self.config.scaling)
