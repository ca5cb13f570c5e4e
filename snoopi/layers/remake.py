"""Activations that cost less to make again than to keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def remake(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), whose backward pass makes again what f keeps, all but the result of its last product.

    f: elementwise steps and norms, then one Linear or convolution. The product keeps its input for
    the weight's gradient; here only x is kept. In the backward pass the steps before the product
    run again, the product does not: non-reentrant checkpointing stops as soon as everything that
    was kept is there, and a product keeps its inputs before it starts. Same values, same gradients.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return f(x)  # the compiler weighs by itself what to keep
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)
