"""Words of the command line that several commands read alike."""

from __future__ import annotations

import argparse

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype


def scale(text: str) -> float | list[float]:
    """A strength: a number, or several with commas between (for argparse)."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        expected = "a number, or one per step as in 0.5,0.5,0,0"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    return numbers if "," in text else numbers[0]


def size(text: str | None) -> tuple[int, int] | None:
    """HxW as (height, width). Raises ValueError for anything else."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size must be HxW in pixels, for example 512x512, got {text!r}")
    return int(height), int(width)
