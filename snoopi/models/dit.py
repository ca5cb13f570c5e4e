"""The diffusion transformer of PixArt-alpha (and of the small worlds), from one config.

Parameter names are diffusers' PixArtTransformer2DModel's. A latent is cut into patch x patch tokens
with fixed positions; each block is self-attention, cross-attention to text, MLP. Time enters by
adaLN-single: one projection of it for all blocks, beside a table of each block's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi.conditioning import Conditioning
from snoopi.layers.attention import CrossAttention, SelfAttention, fill_kv
from snoopi.layers.embeddings import TimestepEmbedding, sinusoid
from snoopi.layers.remake import remake

SINUSOID = 256  # features of a timestep, and of each size


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT; the defaults are those of PixArt-alpha XL/2 at 512 pixels.

    out_channels: more than in_channels with a learned variance, which is cut off. sample_size:
    latent pixels a side in training; positions of any other size are stretched to its range, and
    interpolation divides them. text_width: of the text features, before the caption projection.
    size_embed: the picture's size is embedded beside the time (1024-MS).
    """

    in_channels: int = 4
    out_channels: int = 8
    patch: int = 2
    layers: int = 28
    heads: int = 16
    head_dim: int = 72
    text_width: int = 4096
    sample_size: int = 64
    interpolation: float = 1.0
    size_embed: bool = False

    def __post_init__(self) -> None:
        if self.out_channels < self.in_channels:
            raise ValueError(
                f"out_channels must be at least in_channels = {self.in_channels}, "
                f"got {self.out_channels}"
            )
        unit = 12 if self.size_embed else 4  # quarters: sin, cos of two axes; thirds: h, w, ratio
        if self.width % unit:
            raise ValueError(f"heads x head_dim must be divisible by {unit}, got {self.width}")
        if self.sample_size % self.patch:
            raise ValueError(
                f"sample_size must be a multiple of patch = {self.patch}, got {self.sample_size}"
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def size_ids(self, height: int, width: int) -> tuple[float, ...] | None:
        """(h, w, h/w) of a picture of height x width pixels; None if no size is embedded."""
        return (float(height), float(width), height / width) if self.size_embed else None


class PatchEmbed(nn.Module):
    """One token a patch, plus its position."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """x [b in h w] -> tokens [b m c], row by row."""
        x = self.proj(x)  # [b c h/p w/p]
        size = (x.shape[-2], x.shape[-1])
        where = positions(self.config, size).to(x.device, x.dtype)
        return x.flatten(2).transpose(1, 2) + where  # [b m c]


def positions(config: DiTConfig, size: tuple[int, int]) -> Tensor:
    """Sin-cos features of a grid of (h, w) tokens, fp32 [m c]: half for the column, half the row.

    Not a parameter and never loaded: a token's place is its share of the grid, in units of the
    grid that was trained on.
    """
    h, w = size
    row, column = _axis(config, h), _axis(config, w)  # [h c/2], [w c/2]
    grid = torch.cat([column.expand(h, w, -1), row[:, None].expand(h, w, -1)], dim=-1)
    return grid.flatten(0, 1)  # [m c]


def _axis(config: DiTConfig, count: int) -> Tensor:
    """Sines, then cosines of `count` places along one axis, fp32 [count c/2]."""
    base, quarter = config.sample_size // config.patch, config.width // 4
    # Places in fp32, angles in fp64: as the models were trained.
    place = torch.arange(count, dtype=torch.float32) / (count / base) / config.interpolation
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.outer(place.double(), frequency)  # [count c/4]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


class TimeSizeEmbedding(nn.Module):
    """The embedding of the timestep, plus that of the picture's size (1024-MS)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOID, config.width)
        if config.size_embed:
            self.resolution_embedder = TimestepEmbedding(SINUSOID, config.width // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(SINUSOID, config.width // 3)

    def forward(self, t: Tensor, size_ids: Tensor | None) -> Tensor:
        """t [b], size_ids [b 3] or None -> [b c]."""
        temb = self.timestep_embedder(sinusoid(t, SINUSOID))
        if not hasattr(self, "resolution_embedder"):
            return temb
        if size_ids is None or size_ids.shape != (t.shape[0], 3):
            got = None if size_ids is None else list(size_ids.shape)
            raise ValueError(f"this DiT needs cond.size_ids [b 3] = (h, w, h/w), got {got}")
        size, ratio = size_ids[:, :2].flatten(), size_ids[:, 2]  # [2b], [b]
        resolution = self.resolution_embedder(sinusoid(size, SINUSOID)).view(t.shape[0], -1)
        aspect = self.aspect_ratio_embedder(sinusoid(ratio, SINUSOID))  # [b c/3]
        return temb + torch.cat([resolution, aspect], dim=-1)


class AdaLNSingle(nn.Module):
    """adaLN-single: what time says to every block, shift, scale and gate for attention and MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.emb = TimeSizeEmbedding(config)
        self.linear = nn.Linear(config.width, 6 * config.width)

    def forward(self, t: Tensor, size_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The blocks' modulation [b 6 c], and the embedding itself [b c] for the last layer."""
        temb = self.emb(t, size_ids)
        return self.linear(F.silu(temb)).unflatten(-1, (6, -1)), temb


class CaptionProjection(nn.Module):
    """Text features to the width of the tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.text_width, config.width)
        self.linear_2 = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b n k] -> [b n c]."""
        return self.linear_2(F.gelu(self.linear_1(tokens), approximate="tanh"))


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (tanh), Linear back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        up = nn.ModuleDict({"proj": nn.Linear(channels, 4 * channels)})
        # Place 1 is diffusers' dropout: it keeps its number, not its module.
        self.net = nn.ModuleDict({"0": up, "2": nn.Linear(4 * channels, channels)})

    def forward(self, x: Tensor) -> Tensor:
        """[b m c] -> [b m c]."""
        return remake(self._second, self.net["0"].get_submodule("proj")(x))

    def _second(self, x: Tensor) -> Tensor:
        return self.net["2"](F.gelu(x, approximate="tanh"))  # x [b m 4c]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of x [b m c], then scale and shift [b 1 c] by what time says."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, cross-attention to text, MLP; the text enters without norm and gate."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, heads, head_dim = config.width, config.heads, config.head_dim
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn1 = SelfAttention(width, heads, head_dim, bias=True)
        self.attn2 = CrossAttention(width, width, heads, head_dim, bias=True)
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, modulation: Tensor, cond: Conditioning, size: tuple[int, int]
    ) -> Tensor:
        """x [b m c], modulation [b 6 c], texts of width c; size: (h, w) tokens -> [b m c]."""
        mine = (self.scale_shift_table + modulation).chunk(6, dim=1)  # [b 1 c] each
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mine
        x = x + gate * self.attn1(modulate(x, shift, scale))
        x = x + self.attn2(x, cond, size)
        return x + gate_mlp * self.ff(modulate(x, shift_mlp, scale_mlp))


class DiT(nn.Module):
    """A text-conditioned transformer: forward(x, t, cond) -> prediction (eps, v or x0)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_embed = PatchEmbed(config)
        self.adaln_single = AdaLNSingle(config)
        self.caption_projection = CaptionProjection(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.width))
        self.proj_out = nn.Linear(config.width, config.patch**2 * config.out_channels)
        layers = self.cross_attentions()
        for i, layer in enumerate(layers):
            layer.index, layer.count = i, len(layers)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x [b in h w], t [b] (integers or floats in [0, 1000]) -> prediction [b in h w].

        Raises ValueError where h or w is no multiple of the patch, or cond does not fit.
        """
        size = self._grid(x)
        if cond.guidance_embed is not None:
            raise ValueError("cond.guidance_embed is given, but a DiT does not read it")
        modulation, temb = self.adaln_single(t, cond.size_ids)
        # K/V that were filled in come from projected texts: nothing is left to project.
        text = self._projected(cond) if cond.kv is None else cond
        x = self.pos_embed(x)
        for block in self.transformer_blocks:
            x = block(x, modulation, text, size)
        shift, scale = (self.scale_shift_table + temb[:, None]).chunk(2, dim=1)  # [b 1 c] each
        return self._picture(self.proj_out(modulate(x, shift, scale)), size)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Tokens of a latent, (h, w)."""
        (h, w), patch = x.shape[-2:], self.config.patch
        if h % patch or w % patch:
            raise ValueError(f"this DiT needs latents of multiples of {patch}, got {h}x{w}")
        return h // patch, w // patch

    def _projected(self, cond: Conditioning) -> Conditioning:
        """The texts (prompt, negative, null) at the tokens' width, one projection for all."""
        width = self.config.text_width
        if cond.width != width:
            raise ValueError(f"this DiT needs text features of width {width}, got {cond.width}")
        negative, null = (
            None if text is None else replace(text, tokens=self.caption_projection(text.tokens))
            for text in (cond.negative, cond.null)
        )
        tokens = self.caption_projection(cond.tokens)
        return replace(cond, tokens=tokens, negative=negative, null=null, kv=None)

    def _picture(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Patches [b m p*p*out] laid side by side, the learned variance cut off: [b in h w]."""
        patch = self.config.patch
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, size)  # [b h/p w/p p p out]
        x = x[..., : self.config.in_channels].permute(0, 5, 1, 3, 2, 4)  # [b in h/p p w/p p]
        return x.flatten(4).flatten(2, 3)  # [b in h w]

    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attentions in forward order."""
        return [m for m in self.transformer_blocks.modules() if isinstance(m, CrossAttention)]

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards, compiles or checkpoints one by one."""
        return list(self.transformer_blocks)

    def text_kv(self, cond: Conditioning) -> Conditioning:
        """The conditioning with the K/V of its texts filled in for every layer (inference only).

        Its tokens stay as they came: they are what the K/V are remembered by.
        """
        made = fill_kv(self.cross_attentions(), self._projected(cond))
        return replace(cond, kv=made._replace(sources=cond.sources()))

    @torch.no_grad()
    def initialise(self) -> None:
        """PixArt-alpha's start: small gates, text and output at zero.

        Embeddings of time, size and text keep the variance of their input: the paper's sd of 0.02
        does so at its width only.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        for embed in (*self.adaln_single.emb.modules(), *self.caption_projection.modules()):
            if isinstance(embed, nn.Linear):
                nn.init.normal_(embed.weight, std=embed.in_features**-0.5)
        nn.init.normal_(self.adaln_single.linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (Block, DiT)):
                nn.init.normal_(module.scale_shift_table, std=self.config.width**-0.5)
        for output in (self.proj_out, *(layer.to_out[0] for layer in self.cross_attentions())):
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]
