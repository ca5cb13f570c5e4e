"""Pictures as arrays, grids, PNG files and data: URIs."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from snoopi.errors import writing

_PAPER = (255, 255, 255)
_INK = (36, 41, 47)
_FONT_SIZE = 13
_ROW_LABEL_WIDTH = 180  # widest column of row labels, in pixels; longer labels wrap


def to_uint8(pictures: torch.Tensor) -> NDArray[np.uint8]:
    """Pictures [b 3 h w] in [-1, 1] (clamped, rounded to nearest) as bytes [b h w 3].

    Raises:
        ValueError: not [b 3 h w], or a value is not finite.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be [b 3 h w], got {list(pictures.shape)}")
    pixels = pictures.detach().float()
    if not torch.isfinite(pixels).all():
        raise ValueError("pictures must be finite, got NaN or infinity")
    pixels = pixels.clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(
    pictures: torch.Tensor | NDArray[np.uint8],
    columns: int,
    scale: int = 4,
    pad: int = 4,
    titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures in reading order, `columns` to a row, each pixel drawn as scale x scale pixels.

    Args:
        pictures: [b 3 h w] in [-1, 1], or bytes [b h w 3].
        pad: white pixels around each picture.
        titles: one label above each column.
        row_titles: one label to the left of each row, wrapped when long.

    Raises:
        ValueError: no pictures, fewer than one column, or a wrong number of labels.
    """
    tiles = to_uint8(pictures) if isinstance(pictures, torch.Tensor) else pictures
    if len(tiles) == 0 or columns < 1 or scale < 1:
        raise ValueError(
            f"a grid needs pictures, columns >= 1 and scale >= 1, "
            f"got {len(tiles)} pictures, columns={columns}, scale={scale}"
        )
    rows = -(-len(tiles) // columns)
    _check_labels("titles", titles, columns)
    _check_labels("row_titles", row_titles, rows)

    high, wide = tiles.shape[1] * scale, tiles.shape[2] * scale
    font = ImageFont.load_default(_FONT_SIZE)
    column_labels = [_wrap(text, wide, font) for text in titles or ()]
    row_labels = [_wrap(text, _ROW_LABEL_WIDTH, font) for text in row_titles or ()]
    top, _ = _extent(column_labels, font, pad)
    label_high, left = _extent(row_labels, font, pad)
    step_x, step_y = wide + 2 * pad, max(high + 2 * pad, label_high)

    sheet = Image.new("RGB", (left + columns * step_x, top + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = left + i % columns * step_x + pad, top + i // columns * step_y + pad
        picture = Image.fromarray(tile).resize((wide, high), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
    for i, text in enumerate(column_labels):
        at = (left + i * step_x + step_x / 2, top - pad / 2)
        draw.multiline_text(at, text, fill=_INK, font=font, anchor="md", align="center")
    for i, text in enumerate(row_labels):
        at = (left - 2 * pad, top + i * step_y + pad + high / 2)
        draw.multiline_text(at, text, fill=_INK, font=font, anchor="rm", align="right")
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a PNG file whole or not at all (temporary file, then rename); makes the folder."""
    return write_atomically(path, png_bytes(image))


def data_uri(image: Image.Image) -> str:
    """The picture as a data: URI (PNG), for a page that must open without other files."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def png_bytes(image: Image.Image) -> bytes:
    """The picture encoded as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all (temporary beside it, then rename); makes the folder.

    A link is followed. What is no file (a device, a pipe) is written to, not replaced.

    Raises:
        OSError: naming `path`, not the temporary file.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return path
        path, named = path.resolve(), path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a report from a web server
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return named


def _check_labels(name: str, labels: Sequence[str] | None, count: int) -> None:
    if labels is not None and len(labels) != count:
        raise ValueError(f"{name} must have {count} labels, got {len(labels)}")


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Break a label into lines of about `width` pixels."""
    mean_width = font.getlength("the quick brown fox 123") / 23
    return textwrap.fill(text, max(6, int(width / mean_width)))


def _extent(
    labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, pad: int
) -> tuple[int, int]:
    """Height and width that the largest label takes, margins included; 0, 0 without labels."""
    if not labels:
        return 0, 0
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), text, font=font) for text in labels]
    return (
        int(max(box[3] for box in boxes)) + 3 * pad,
        int(max(box[2] for box in boxes)) + 4 * pad,
    )
