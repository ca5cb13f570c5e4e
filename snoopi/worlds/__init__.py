"""Captioned picture sources that need no download, and the judges that read their pictures."""

from __future__ import annotations

from snoopi.worlds.base import Avoid, Batch, Example, Lesson, World
from snoopi.worlds.shapes import ShapesWorld

NAMES = ("shapes", "emoji")


def build(name: str = "shapes") -> World:
    """The world of that name.

    Raises ValueError for a name not in NAMES, and where a world's packages are missing.
    """
    if name == "shapes":
        return ShapesWorld()
    if name == "emoji":
        from snoopi.worlds.emoji import EmojiWorld  # most runs never need it

        return EmojiWorld()
    raise ValueError(f"unknown world {name!r}: expected one of {', '.join(NAMES)}")


__all__ = ["NAMES", "Avoid", "Batch", "Example", "Lesson", "ShapesWorld", "World", "build"]
