"""Calls recorded as CUDA graphs: the CPU launches one graph, not a thousand kernels.

A graph reads and writes the memory that it was recorded with. So the arguments are copied into
buffers before every replay, and the results out of theirs. Parameters stay where they are: changes
in place are seen, replaced ones are not (`clear`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UPS = 3  # calls before a recording, in which libraries make their handles and workspaces
MOST = 8  # recordings that are kept: each has a network's activations of its own

Record = Callable[[Callable[..., Tensor], tuple[Any, ...]], tuple[Callable[[], None], Tensor]]


class Recording(NamedTuple):
    """One call: where its tensors are copied to, how it runs, and where its result is."""

    buffers: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


def record_cuda(
    function: Callable[..., Tensor], args: tuple[Any, ...]
) -> tuple[Callable[[], None], Tensor]:
    """Record function(*args) on the current CUDA device: what replays it, and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*args)
    return graph.replay, result


class Graphs:
    """A function of pytrees of tensors, which returns one tensor, replayed from recordings.

    There is one recording for every kind of arguments: their structure, the tensors' shapes, dtypes
    and devices, and everything that is no tensor, for it is a constant of the graph. The MOST used
    last are kept. What cannot be recorded, because something in it waits for the device, is called
    as it is from then on; a warning says so once.

    record: what records; `record_cuda`, or a stand-in.
    """

    def __init__(self, function: Callable[..., Tensor], record: Record = record_cuda) -> None:
        self._function, self._record = function, record
        self._kept: dict[tuple[Any, ...], Recording | None] = {}
        self._warned = False

    @torch.no_grad()
    def __call__(self, *args: Any) -> Tensor:
        """The function's result; gradients stop here."""
        leaves, structure = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (repr(structure), *map(_kind, leaves))
        known = key in self._kept  # also what could not be recorded
        recording = self._kept.pop(key) if known else self._recorded(leaves, structure)
        self._kept[key] = recording  # the last in order is the one used last
        if len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
        if recording is None:
            return self._function(*args)
        for buffer, tensor in zip(recording.buffers, tensors, strict=True):
            buffer.copy_(tensor)
        recording.replay()
        return recording.result.clone()

    def clear(self) -> None:
        """Forget all recordings: parameters were replaced, or the function does something else."""
        self._kept.clear()

    def _recorded(self, leaves: list[Any], structure: Any) -> Recording | None:
        still = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        buffers = [leaf for leaf in still if isinstance(leaf, Tensor)]
        try:
            replay, result = self._record(self._function, pytree.tree_unflatten(still, structure))
        except RuntimeError as error:
            if not self._warned:
                why = str(error).splitlines()[0]
                warnings.warn(f"a call cannot be recorded as a CUDA graph: {why}", stacklevel=3)
                self._warned = True
            return None
        return Recording(buffers, replay, result)


def _kind(leaf: Any) -> Any:
    """What two leaves must share for one recording."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return type(leaf), leaf
