"""CLIP score: the cosine of a picture's and its prompt's embeddings (Hessel et al. 2021).

As the COCO-30K line prints it (GigaGAN, DMD2, SwiftBrush v2: 0.30 to 0.34): OpenCLIP ViT-g-14 of
laion2b_s12b_b42k, not multiplied by 100 and not cut at 0, captions behind "A photo depicts ",
pictures at 256 pixels first, fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snoopi.evaluate.picture_sets import batches
from snoopi.folders import Clip
from snoopi.methods.clip_loss import text_embeddings
from snoopi.preprocess import clip_pictures, reference_picture
from snoopi.tokenize import PromptCut, clean

PREFIX = "A photo depicts "
SIZE = 256  # of a picture before CLIP's own preprocessing

Prepare = Callable[[Image.Image], Tensor]


def score_picture(size: int, first: int | None = SIZE) -> Prepare:
    """A picture as the CLIP score reads it: [1 3 size size].

    first: the central square is made so large by LANCZOS before, as the line's pictures are; None:
    the picture as it is.
    """

    def prepare(picture: Image.Image) -> Tensor:
        square = picture if first is None else reference_picture(picture, first)
        return clip_pictures([square], size)

    return prepare


def embed_texts(clip: Clip, texts: Sequence[str], batch: int = 64) -> tuple[Tensor, int]:
    """Embeddings [n k] of length 1, fp32, of texts cleaned as open_clip does; how many were cut.

    A text that is longer than the tokenizer's length loses its end.
    """
    cleaned = [clean(text) for text in texts]
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)  # counted here
        for start in range(0, len(cleaned), batch):
            part = cleaned[start : start + batch]
            rows.append(text_embeddings(clip.text_encoder, clip.tokenizer, part).cpu())
    return torch.cat(rows), sum(clip.tokenizer.cut(text) is not None for text in cleaned)


@torch.no_grad()
def embed_pictures(clip: Clip, files: Sequence[Path], prepare: Prepare, batch: int = 32) -> Tensor:
    """Embeddings [n k] of length 1, fp32, of picture files.

    Raises ValueError, naming the file, for a picture that cannot be read or whose embedding is not
    finite.
    """
    device, rows = next(clip.image_encoder.parameters()).device, []
    for part, pictures in batches(files, prepare, batch):
        found = clip.image_encoder(pictures.to(device)).pooled.float().cpu()
        wrong = (~found.isfinite().all(1)).nonzero()
        if len(wrong):
            raise ValueError(f"{part[int(wrong[0])]}: its CLIP embedding is not finite")
        rows.append(F.normalize(found, dim=-1))
    return torch.cat(rows)


def cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """The cosine of each picture and its text, both [n k] of length 1: [n]."""
    return (pictures * texts).sum(-1)
