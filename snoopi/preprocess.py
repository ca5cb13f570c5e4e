"""Pictures as the measuring networks want them: resized, cropped and normalised as published.

Each function is one protocol, to the letter: scores depend on the resize. PIL's bicubic filter has
antialiasing and rounds to bytes; a tensor's has neither unless asked for. The network's side:
CLIPVision reads clip_pictures, clip_tensor or hpsv2_pictures, Inception inception_pictures, VGG
vgg_pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pictures - mean) / std per channel; pictures [b 3 h w] in [0, 1]."""
    shift, scale = (
        torch.tensor(v, dtype=pictures.dtype, device=pictures.device)[:, None, None]  # [3 1 1]
        for v in (mean, std)
    )
    return (pictures - shift) / scale


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size, of any mode, as RGB in [0, 1]: float32 [b 3 h w]."""
    if not pictures:
        raise ValueError("give at least one picture, got none")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"pictures must be of one size, got {', '.join(map(str, sorted(sizes)))}")
    rows = [np.array(picture.convert("RGB")) for picture in pictures]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255  # [b 3 h w]


def clip_pictures(pictures: Sequence[Image.Image], size: int = 224) -> Tensor:
    """CLIP's own preprocessing (OpenAI, open_clip, CLIP score): [b 3 size size], normalised.

    PIL bicubic to `size` on the short side, rounded to bytes; centre crop; RGB last, as open_clip
    does (transformers converts first, and only transparent pictures and palettes notice). An odd
    margin is cut as torchvision does, see centre_crop.
    """
    resized = []
    for picture in pictures:
        wide, high = picture.size
        new = _short_side(high, wide, size)
        if (high, wide) != new:
            picture = picture.resize(new[::-1], Image.Resampling.BICUBIC)
        resized.append(centre_crop(picture, size))
    return normalise(to_tensor(resized), CLIP_MEAN, CLIP_STD)


def clip_tensor(
    pictures: Tensor,
    size: int = 224,
    antialias: bool = True,
    fit: Literal["crop", "pad"] = "crop",
) -> Tensor:
    """CLIP's preprocessing of tensors, with gradients: [b 3 size size], normalised.

    pictures: [b 3 h w] in [0, 1]; the bicubic filter may overshoot, and nothing is rounded.
    fit: "crop" makes the short side `size` and cuts the rest; "pad" makes the long side `size` and
    adds black.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be [b 3 h w], got {list(pictures.shape)}")
    high, wide = pictures.shape[2:]
    if fit == "crop":
        new = _short_side(high, wide, size)
        pictures = _bicubic(pictures, new, antialias)
        top, left = _margin(new[0] - size), _margin(new[1] - size)
        pictures = pictures[:, :, top : top + size, left : left + size]
    else:
        scale = size / max(high, wide)
        new = (max(1, round(high * scale)), max(1, round(wide * scale)))
        pictures = _bicubic(pictures, new, antialias)
        top, left = (size - new[0]) // 2, (size - new[1]) // 2
        pictures = F.pad(pictures, (left, size - new[1] - left, top, size - new[0] - top))
    return normalise(pictures, CLIP_MEAN, CLIP_STD)


def hpsv2_pictures(
    pictures: Sequence[Image.Image], size: int = 224, antialias: bool = True
) -> Tensor:
    """HPSv2's preprocessing: a tensor first, then resized, so without rounding to bytes.

    The long side becomes `size`, the rest is black (the published package sets
    resize_longest_max). antialias: torchvision's default from 0.17 on; scores made with an older
    one need False. Scores differ between the two: note which was used.
    """
    return torch.cat([clip_tensor(to_tensor([p]), size, antialias, "pad") for p in pictures])


def inception_pictures(pictures: Sequence[Image.Image], size: int = 299) -> Tensor:
    """clean-fid's "clean" resize: float32 [b 3 size size] from 0 to 255, not rounded.

    PIL's bicubic filter (with antialiasing) on each channel as floats, clipped to 0..255.
    """
    rows = []
    for picture in pictures:
        channels = np.array(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        resized = [
            Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)
            for channel in channels
        ]
        rows.append(np.stack([np.asarray(channel) for channel in resized]).clip(0, 255))
    return torch.from_numpy(np.stack(rows))


def reference_picture(picture: Image.Image, size: int = 256) -> Image.Image:
    """A reference picture of FID-30K: the central square, LANCZOS to size x size, RGB bytes.

    Generated pictures go through the same function.
    """
    square = centre_crop(picture.convert("RGB"), min(picture.size))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def vgg_pictures(pictures: Sequence[Image.Image], size: int = 224) -> Tensor:
    """VGG16's input for precision and recall: TensorFlow 1's bilinear resize, ImageNet's mean/std.

    [b 3 size size]. Pictures of another shape are squeezed, not cropped.
    """
    rows = torch.cat([tf1_bilinear(to_tensor([p]), size) for p in pictures])
    return normalise(rows, IMAGENET_MEAN, IMAGENET_STD)


def tf1_bilinear(pictures: Tensor, size: int) -> Tensor:
    """resize_bilinear of TensorFlow 1 (align_corners off): [b c h w] -> [b c size size].

    Output pixel i is read at i * in / out, without the half-pixel shift, and without antialiasing.
    """
    for axis in (2, 3):
        length = pictures.shape[axis]
        at = torch.arange(size, dtype=torch.float32, device=pictures.device) * (length / size)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (at - low).to(pictures.dtype)
        weight = weight[:, None] if axis == 2 else weight
        a, b = pictures.index_select(axis, low), pictures.index_select(axis, high)
        pictures = a + (b - a) * weight
    return pictures


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central size x size pixels of a picture that is at least as large.

    Half an odd margin is rounded to the even number, as in torchvision; transformers rounds it
    down, and so cuts one pixel elsewhere for a margin of 3, 7, 11...
    """
    wide, high = picture.size
    if min(wide, high) < size:
        raise ValueError(f"a picture must be at least {size} pixels a side, got {high}x{wide}")
    left, top = _margin(wide - size), _margin(high - size)
    return picture.crop((left, top, left + size, top + size))


def _margin(excess: int) -> int:
    return round(excess / 2)  # halves to even


def _short_side(high: int, wide: int, size: int) -> tuple[int, int]:
    """(height, width) with `size` on the short side; the long one is rounded down."""
    if high <= wide:
        return size, int(size * wide / high)
    return int(size * high / wide), size


def _bicubic(pictures: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    if tuple(pictures.shape[2:]) == size:
        return pictures
    return F.interpolate(pictures, size, mode="bicubic", align_corners=False, antialias=antialias)
