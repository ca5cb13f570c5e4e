"""Activations that cost less to make again than to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_kept = 0  # contexts of `keep_activations` that are open


def remake(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), whose backward pass makes again what f keeps, all but the result of its last product.

    f: a module's method of elementwise steps and norms, then one Linear or convolution. The product
    keeps its input for the weight's gradient; here only x is kept. In the backward pass the steps
    before the product run again, the product does not: non-reentrant checkpointing stops as soon as
    everything that was kept is there, and a product keeps its inputs before it starts. Same values,
    same gradients.

    Raises (in the backward pass):
        RuntimeError: the module's weights are others than in the forward pass.
    """
    # The compiler weighs by itself what to keep.
    if _kept or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return f(x)
    module: nn.Module = f.__self__  # type: ignore[attr-defined]
    weights = list(module.parameters())

    def run(x: Tensor) -> Tensor:
        # torch.func.functional_call puts the weights back that the forward pass ran without.
        if any(a is not b for a, b in zip(weights, module.parameters(), strict=True)):
            raise RuntimeError(
                f"the weights of a {type(module).__name__} were replaced between its forward and "
                "backward pass: run the forward pass within snoopi.layers.remake.keep_activations()"
            )
        return f(x)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def keep_activations() -> Iterator[None]:
    """Forward passes of the body keep what the backward pass needs: for torch.func."""
    global _kept
    _kept += 1
    try:
        yield
    finally:
        _kept -= 1
