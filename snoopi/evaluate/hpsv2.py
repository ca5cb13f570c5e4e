"""Human Preference Score v2 (Wu et al. 2023): 100 times a fine-tuned CLIP's cosine.

The published benchmark has 800 prompts in each of four styles; a style's score is the mean of ten
means of 80 pictures, the average that over all forty. Scores of v2.0 and v2.1 weights do not
compare (Stable Diffusion 2.0: 27.17 and 26.38), and they depend on details of the pipeline: its
pictures are written as JPEG of quality 75, and its resize had no antialiasing before torchvision
0.17. It computes in fp16 on a GPU; here it is fp32.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from snoopi.evaluate.clip_score import Prepare, cosines, embed_pictures, embed_texts
from snoopi.evaluate.picture_sets import Row
from snoopi.folders import Clip
from snoopi.preprocess import hpsv2_pictures

VERSIONS = ("v2.0", "v2.1")
STYLES = ("anime", "concept-art", "paintings", "photo")
GROUPS = 10
QUALITY = 75  # of the published pictures


@dataclass(frozen=True)
class Reading:
    """How pictures are read. antialias: of the resize. jpeg: quality of a JPEG pass, None: none."""

    antialias: bool = True
    jpeg: int | None = QUALITY

    def words(self) -> str:
        """For who reads the number."""
        lossy = f"JPEG of quality {self.jpeg}" if self.jpeg else "no JPEG pass"
        return f"{lossy}, resize {'with' if self.antialias else 'without'} antialiasing"


def score_picture(size: int, reading: Reading) -> Prepare:
    """A picture as HPSv2 reads it: [1 3 size size]. What is a JPEG file already stays as it is."""

    def prepare(picture: Image.Image) -> Tensor:
        if reading.jpeg and picture.format != "JPEG":
            picture = as_jpeg(picture, reading.jpeg)
        return hpsv2_pictures([picture], size, reading.antialias)

    return prepare


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """A picture as a JPEG file gives it back."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def scores(clip: Clip, rows: Sequence[Row], reading: Reading, batch: int = 32) -> Tensor:
    """100 cosines of pictures and their bare prompts: [n]."""
    size = clip.image_encoder.config.image_size
    files, prompts = [row.file for row in rows], [row.prompt or "" for row in rows]
    pictures = embed_pictures(clip, files, score_picture(size, reading), batch)
    return 100 * cosines(pictures, embed_texts(clip, prompts)[0])


def aggregate(found: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Mean and population deviation of group means for each style, and of all as "average".

    A style's scores, in the benchmark's order, are divided into GROUPS groups of equal size. Fewer
    than GROUPS scores, or a rest, make groups that differ by one.
    """
    table, every = {}, []
    for style, values in found.items():
        groups = [g for g in _groups(values) if g]
        means = [statistics.fmean(group) for group in groups]
        table[style] = statistics.fmean(means), statistics.pstdev(means)
        every += means
    return {**table, "average": (statistics.fmean(every), statistics.pstdev(every))}


def _groups(values: Sequence[float]) -> list[Sequence[float]]:
    edges = [len(values) * i // GROUPS for i in range(GROUPS + 1)]
    return [values[a:b] for a, b in itertools.pairwise(edges)]


def read_prompts(folder: Path) -> dict[str, list[str]]:
    """The benchmark's prompts by style: FOLDER/{anime,concept-art,paintings,photo}.json.

    Raises ValueError for a file that is missing or no list of texts.
    """
    return {style: read_list(folder / f"{style}.json") for style in STYLES}


def is_text(value: object) -> bool:
    """Whether it is a text that can be encoded: JSON may hold halves of surrogates."""
    return isinstance(value, str) and not any(0xD800 <= ord(c) <= 0xDFFF for c in value)


def read_list(path: Path) -> list[str]:
    """A JSON list of texts. Raises ValueError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(map(is_text, found)):
        raise ValueError(f"{path} is no JSON list of prompts")
    return found
