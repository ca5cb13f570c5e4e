"""Preprocessing against open_clip's and transformers' processors, torchvision, and formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snoopi import preprocess
from tests.parity import oracle

pytestmark = pytest.mark.parity
# Height and width: square, larger and smaller than 224, exact, and margins odd both ways.
SIZES = [(256, 256), (512, 512), (96, 96), (224, 224), (224, 225), (333, 500), (500, 333), (70, 91)]


def picture(high: int, wide: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with hard edges and noise: what a resize can go wrong on."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:high, :wide].astype(np.float64)
    waves = [np.sin(x / (3 + c)) * np.cos(y / (5 - c)) for c in range(3)]
    values = 127.5 + 90 * np.stack(waves, -1)
    values[high // 4 : high // 2, wide // 3 : wide // 2] = (255, 0, 128)
    values += generator.normal(0, 20, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def same(name: str, got: Tensor, want: Tensor, at_most: float = 0.0) -> None:
    assert got.shape == want.shape, f"{name}: {list(got.shape)}, want {list(want.shape)}"
    worst = float((got.double() - want.double()).abs().max())
    print(f"{name}: max error {worst:.2e}")
    assert worst <= at_most, f"{name}: max error {worst:.2e}, at most {at_most:.0e}"


def open_clip_transform() -> Any:
    transform = oracle.package("open_clip").transform
    return transform.image_transform_v2(transform.PreprocessCfg(size=224), is_train=False)


@pytest.mark.parametrize("size", SIZES)
def test_clip_pictures_equal_open_clips_transform(size: tuple[int, int]) -> None:
    image = picture(*size)
    got = preprocess.clip_pictures([image, picture(*size, seed=1)])
    same(f"open_clip {size}", got[0], open_clip_transform()(image))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA"])
def test_other_modes_become_rgb_as_in_open_clip(mode: str) -> None:
    image = picture(300, 250).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(300, 250, seed=1).convert("L"))
    same(mode, preprocess.clip_pictures([image])[0], open_clip_transform()(image))


@pytest.mark.parametrize("size", SIZES)
def test_clip_pictures_equal_transformers_processor(size: tuple[int, int]) -> None:
    transformers = oracle.package("transformers")
    image = picture(*size)
    theirs = transformers.CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    long = int(224 * max(size) / min(size))
    got = preprocess.clip_pictures([image])
    if (long - 224) % 4 == 3:  # it rounds half a pixel of margin down, open_clip to even
        resized = image.resize((long, 224) if size[1] > size[0] else (224, long), 3)
        at = (long - 224) // 2
        box = (at, 0, at + 224, 224) if size[1] > size[0] else (0, at, 224, at + 224)
        assert not torch.allclose(got, theirs, atol=1e-2)
        got = preprocess.clip_pictures([resized.crop(box)])
    same(f"transformers {size}", got, theirs, 1e-6)


def test_the_sizes_have_a_margin_that_the_two_round_differently() -> None:
    margins = {int(224 * max(size) / min(size)) - 224 for size in SIZES}
    assert any(m % 4 == 3 for m in margins) and any(m % 4 == 1 for m in margins)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_clip_tensor_equals_torchvision(size: tuple[int, int], antialias: bool) -> None:
    oracle.package("torchvision")
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC, antialias=antialias),
            transforms.CenterCrop(224),
            transforms.Normalize(preprocess.CLIP_MEAN, preprocess.CLIP_STD),
        ]
    )
    x = transforms.ToTensor()(picture(*size))[None]
    same(f"tensor {size}", preprocess.clip_tensor(x, antialias=antialias), theirs(x))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_order_equals_torchvision(size: tuple[int, int], antialias: bool) -> None:
    """ToTensor, long side to 224, black around it, normalise: the published order."""
    oracle.package("torchvision")
    from torchvision.transforms import InterpolationMode, ToTensor
    from torchvision.transforms import functional as tv

    x, (high, wide) = ToTensor()(picture(*size)), size
    scale = 224 / float(max(high, wide))
    new = [round(high * scale), round(wide * scale)]
    x = tv.resize(x, new, InterpolationMode.BICUBIC, antialias=antialias)
    pads = [(224 - new[1]) // 2, (224 - new[0]) // 2]
    x = tv.pad(x, [*pads, 224 - new[1] - pads[0], 224 - new[0] - pads[1]], fill=0)
    want = tv.normalize(x, list(preprocess.CLIP_MEAN), list(preprocess.CLIP_STD))
    got = preprocess.hpsv2_pictures([picture(*size)], antialias=antialias)
    same(f"hpsv2 {size}", got[0], want)


def test_the_ways_to_resize_differ_where_they_should() -> None:
    """The switch must matter, or the tests above compare nothing."""
    image = picture(512, 512).point(lambda v: 64 + v // 2)  # nothing overshoots 0..255
    pil = preprocess.clip_pictures([image])
    sharp, soft = (preprocess.hpsv2_pictures([image], antialias=a) for a in (False, True))
    assert float((sharp - soft).abs().max()) > 0.5
    rounding = float((pil - soft).abs().max())
    assert 0 < rounding < 2 / 255 / 0.26  # bytes in between, and no more


def filtered(x: np.ndarray, size: int) -> np.ndarray:
    """Keys' cubic (a = -1/2), widened for shrinking, along the last axis, in float64."""
    scale = x.shape[-1] / size
    reach = 2 * max(scale, 1.0)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(int(centre - reach + 0.5), 0)
        last = min(int(centre + reach + 0.5), x.shape[-1])
        d = np.abs((np.arange(first, last) + 0.5 - centre) / max(scale, 1.0))
        near = (1.5 * d - 2.5) * d * d + 1
        far = ((-0.5 * d + 2.5) * d - 4) * d + 2
        weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
        rows.append(x[..., first:last] @ (weights / weights.sum()))
    return np.stack(rows, -1)


@pytest.mark.parametrize("size", [(256, 256), (299, 299), (120, 400), (640, 480)])
def test_inception_pictures_equal_the_formula_unrounded(size: tuple[int, int]) -> None:
    image = picture(*size)
    x = np.asarray(image).astype(np.float64).transpose(2, 0, 1)
    want = filtered(filtered(x, 299).swapaxes(1, 2), 299).swapaxes(1, 2).clip(0, 255)
    got = preprocess.inception_pictures([image])
    assert got.dtype == torch.float32 and float(got.min()) >= 0 and float(got.max()) <= 255
    same(f"clean-fid {size}", got[0], torch.from_numpy(want), 1e-3)
    if size != (299, 299):
        assert float((got - got.round()).abs().max()) > 0.4


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (640, 427), (256, 256), (100, 103)])
def test_reference_pictures_equal_torchvision(size: tuple[int, int]) -> None:
    oracle.package("torchvision")
    from torchvision.transforms import functional as tv

    image = picture(*size)
    want = tv.center_crop(image, min(size)).resize((256, 256), Image.Resampling.LANCZOS)
    got = preprocess.reference_picture(image)
    assert got.mode == "RGB" and np.array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("size", [(256, 256), (100, 300), (224, 224), (448, 112)])
def test_vgg_pictures_equal_tensorflows_formula(size: tuple[int, int]) -> None:
    oracle.package("torchvision")
    from torchvision.transforms import functional as tv

    image, (high, wide) = picture(*size), size
    x = np.asarray(image).astype(np.float64) / 255
    want = np.empty((224, 224, 3))
    for i in range(224):
        for j in range(224):
            # TensorFlow's positions are fp32, and so off by up to 2e-5 of a pixel.
            y = float(np.float32(i) * np.float32(high / 224))
            z = float(np.float32(j) * np.float32(wide / 224))
            top, left = math.floor(y), math.floor(z)
            down, right = min(top + 1, high - 1), min(left + 1, wide - 1)
            upper = x[top, left] + (x[top, right] - x[top, left]) * (z - left)
            lower = x[down, left] + (x[down, right] - x[down, left]) * (z - left)
            want[i, j] = upper + (lower - upper) * (y - top)
    rows = tv.normalize(
        torch.from_numpy(want).permute(2, 0, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    same(f"vgg {size}", preprocess.vgg_pictures([image])[0], rows, 2e-6)
    if size == (448, 112):  # half a pixel beside what torch calls bilinear
        torchs = F.interpolate(torch.from_numpy(x).permute(2, 0, 1)[None], (224, 224))
        assert float((torchs[0] - torch.from_numpy(want).permute(2, 0, 1)).abs().max()) > 0.05


def test_gradients_reach_the_pictures() -> None:
    x = torch.rand(1, 3, 64, 48, dtype=torch.float64, requires_grad=True)
    for fit in ("crop", "pad"):
        assert torch.autograd.gradcheck(
            lambda x, fit=fit: preprocess.clip_tensor(x, 8, fit=fit), (x,), fast_mode=True
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preprocess.to_tensor([]), "at least one picture"),
        (lambda: preprocess.to_tensor([picture(9, 8), picture(8, 9)]), "one size, got"),
        (lambda: preprocess.clip_tensor(torch.zeros(3, 9, 9)), r"\[b 3 h w\], got \[3, 9, 9\]"),
        (lambda: preprocess.centre_crop(picture(9, 8), 9), "at least 9 pixels a side, got 9x8"),
    ],
)
def test_mistakes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
