"""Finds and loads the native CPU op (snoopi/_cpu.so), and remembers why it is absent if it is."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 4  # of the ops, in csrc/cpu/nasa.cpp
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Native(NamedTuple):
    """State of the native op: whether it is loaded, a sentence on it, what else it does.

    projects: it multiplies with the output weights, too; where torch's own product is faster it
    does not. attends: it is faster than scaled_dot_product_attention at one text, and at a
    picture's attention to itself: with AVX-512. pairs: bf16 is
    multiplied in hardware, tiles: by AMX.
    """

    loaded: bool
    why: str
    projects: bool = False
    attends: bool = False
    pairs: bool = False
    tiles: bool = False


def load(folder: Path | None = None) -> Native:
    """Load the native CPU op into torch.ops.snoopi.

    An absent library is a choice (SNOOPI_BUILD=none) and passes in silence; one that is present but
    unusable gives a warning. Never raises.
    """
    path = (folder or Path(__file__).resolve().parent.parent) / "_cpu.so"
    if not path.is_file():
        return Native(False, "the native op snoopi/_cpu.so is not built")
    trouble = _unfit(path)
    if trouble is None:
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            trouble = str(error).splitlines()[0]
    if trouble is None and not _is_current():
        trouble = "it was built from other sources"
    if trouble is None:
        projects = torch.ops.snoopi.linear_bytes(1, 1, torch.float32) > 0
        capability = torch.ops.snoopi.cpu_capability()
        has = ("AVX512" in capability, "bf16 by" in capability, "AMX" in capability)
        return Native(True, f"native CPU op, {capability}", projects, *has)
    why = f"the native op snoopi/_cpu.so cannot be loaded: {trouble}"
    warnings.warn(
        f"{why}; the plain PyTorch path is used. Build it again: "
        "pip install --no-build-isolation -e .",
        stacklevel=2,
    )
    return Native(False, why)


def _is_current() -> bool:
    """Whether the library that was loaded has the ops that this version calls."""
    version = getattr(torch.ops.snoopi, "cpu_version", None)
    return version is not None and version() == VERSION


def _unfit(path: Path) -> str | None:
    """Compare the torch version written into the library with the one that runs.

    Done before loading, because a library for another torch may load and then crash.
    """
    mark = re.search(rb"SNOOPI_BUILT_FOR_TORCH=([0-9A-Za-z.+]+)", path.read_bytes())
    if mark is None:
        return "it does not say which torch it was built for"
    built = mark.group(1).decode().split("+")[0]
    runs = str(torch.__version__).split("+")[0]
    return None if built == runs else f"it was built for torch {built}, this is torch {runs}"


NATIVE = load()


def why_not(x: Tensor) -> str | None:
    """Why the native op cannot take a tensor of this device and dtype; None if it can.

    fp16 is computed in fp32: no processor of today multiplies it faster.
    """
    if x.device.type != "cpu":
        return f"there is no fused kernel for {x.device.type} in this version"
    if x.dtype not in _DTYPES:
        return f"there is no fused kernel for {x.dtype}"
    return None if NATIVE.loaded else NATIVE.why
