"""snoopi: one-step text-to-image diffusion with real control (SNOOPI: PG-SB and NASA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snoopi.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`snoopi.load` and `snoopi.Pipeline`, imported on first use: `import snoopi` stays cheap."""
    if name in ("Pipeline", "load"):
        from snoopi import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'snoopi' has no attribute {name!r}")
