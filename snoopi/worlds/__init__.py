"""Captioned picture sources that need no download, and the judges that read their pictures."""

from __future__ import annotations

from snoopi.worlds.shapes import Batch, ShapesWorld

NAMES = ("shapes",)


def build(name: str) -> ShapesWorld:
    """The world of that name.

    Raises ValueError for a name not in NAMES.
    """
    if name != "shapes":
        raise ValueError(f"unknown world {name!r}: expected one of {', '.join(NAMES)}")
    return ShapesWorld()


__all__ = ["NAMES", "Batch", "ShapesWorld", "build"]
