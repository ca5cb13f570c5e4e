"""Finds and loads the native ops (snoopi/_cpu.so, _cuda.so); remembers why one is absent."""

import ctypes
import functools
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 4  # of the ops, in csrc/cpu/nasa.cpp
CUDA_VERSION = 2  # in csrc/cuda/torch.cpp
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_HEAD_DIMS = (40, 64, 72, 80, 160)  # of instances in csrc/cuda/nasa_launch.h
CUDA_TEXT = 512  # most keys of a text
CUDA_CAPABILITY = (8, 0)  # the least: cp.async and mma of bf16
CUDA_GRID = 65535  # most items of a batch, and most heads
CUDA_QUERIES = 2**24  # most of an item
CUDA_SPAN = 2**31 - 1  # most elements from an item's first row to its end
_PACKAGE = Path(__file__).resolve().parent.parent


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
    path = (folder or _PACKAGE) / "_cpu.so"
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


def load_cuda(folder: Path | None = None) -> Native:
    """Load the CUDA op, which is built on a stable ABI for torch 2.13 and later. As `load`."""
    path = (folder or _PACKAGE) / "_cuda.so"
    if not path.is_file():
        return Native(False, "the CUDA op snoopi/_cuda.so is not built")
    try:
        torch.ops.load_library(str(path))
        version = getattr(torch.ops.snoopi, "cuda_version", None)
        fits = version is not None and version() == CUDA_VERSION
        trouble = None if fits else "it was built from other sources"
    except (OSError, RuntimeError) as error:
        trouble = str(error).splitlines()[0]
    if trouble is None:
        return Native(True, "native CUDA op")
    why = f"the native op snoopi/_cuda.so cannot be loaded: {trouble}"
    warnings.warn(
        f"{why}; the plain PyTorch path is used. Build it again: "
        "SNOOPI_BUILD=cuda pip install --no-build-isolation -e .",
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
CUDA = load_cuda()


def why_not(x: Tensor) -> str | None:
    """Why the native op cannot take a tensor of this device and dtype; None if it can.

    fp16 is computed in fp32: no processor of today multiplies it faster.
    """
    if x.device.type != "cpu":
        return f"there is no fused kernel for {x.device.type} in this version"
    if x.dtype not in _DTYPES:
        return f"there is no fused kernel for {x.dtype}"
    return None if NATIVE.loaded else NATIVE.why


def why_not_attend(q: Tensor, texts: Collection[Tensor], softmax_scale: float | None) -> str | None:
    """Why no fused attention takes q [b m h d] and such keys and values; None if one does."""
    if q.device.type != "cuda":
        return why_not(q)
    if not CUDA.loaded:
        return CUDA.why
    if (beyond := beyond_cuda(q, texts, softmax_scale)) is not None:
        return beyond
    has = torch.cuda.get_device_capability(q.device)
    if has < CUDA_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (CUDA_CAPABILITY, has))
        return f"the fused CUDA kernel needs compute capability {needed}, got {found}"
    trouble = device_trouble(q.device.index)
    return None if trouble is None else f"the CUDA op cannot run on {q.device}: {trouble}"


def beyond_cuda(q: Tensor, texts: Collection[Tensor], softmax_scale: float | None) -> str | None:
    """Why csrc/cuda/nasa_launch.h would refuse such a call; None if it would not.

    The words hold no number that may be a symbol, of which torch.compile makes no text.
    """
    if q.dtype not in _CUDA_DTYPES:
        return f"there is no fused CUDA kernel for {q.dtype}"
    b, m, h, d = q.shape
    if d not in CUDA_HEAD_DIMS:
        known = ", ".join(map(str, CUDA_HEAD_DIMS))
        return f"there is no fused CUDA kernel for heads of {int(d)}; there are {known}"
    if max(x.shape[1] for x in texts) > CUDA_TEXT:
        return f"the fused CUDA kernel takes texts of {CUDA_TEXT} keys at most"
    if softmax_scale is not None and not softmax_scale >= torch.finfo(torch.float32).tiny:
        return "the fused CUDA kernel takes a softmax_scale above 0 alone"
    # Rows that cannot be read as they lie are copied, to lie one after the other.
    span = max(x.shape[1] * max(x.stride(1), h * d) for x in (q, *texts))
    if max(b, h) > CUDA_GRID or m > CUDA_QUERIES or span > CUDA_SPAN:
        return "the fused CUDA kernel does not take so many items, heads or queries"
    return None


def device_trouble(index: int | None) -> str | None:
    """Why the CUDA op, once loaded, cannot run on a device, in CUDA's words; None if it can.

    Its runtime may be newer than the driver, or it holds no code for the device.
    """
    return _device_trouble(index)


# torch.compile cannot look into a C function. The mark is torch.compiler.assume_constant_result's,
# which imports dynamo, whoever compiles or not.
device_trouble._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _device_trouble(index: int | None) -> str | None:
    trouble = ctypes.CDLL(str(_PACKAGE / "_cuda.so")).snoopi_nasa_cuda_trouble
    trouble.restype = ctypes.c_char_p
    with torch.cuda.device(index):
        found: bytes | None = trouble()
    return None if found is None else found.decode()
