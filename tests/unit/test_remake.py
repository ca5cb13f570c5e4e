"""Activations that are made again: same values and gradients, less kept, no product twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from snoopi.layers import blocks, remake
from snoopi.layers.blocks import ResnetBlock
from snoopi.models import dit, unet

PRODUCTS = ("convolution", "addmm", "mm", "bmm", "linear")


def resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ResnetBlock(8, 16, 12, 4, 1e-5), (torch.randn(2, 8, 6, 6), torch.randn(2, 12))


def geglu() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return unet.FeedForward(8), (torch.randn(2, 5, 8),)


def mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return dit.FeedForward(8), (torch.randn(2, 5, 8),)


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def run(net: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], int, int]:
    """Output and gradients, bytes that the graph keeps beside inputs and weights, products run."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    known = {x.untyped_storage().data_ptr() for x in (*leaves, *net.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    # Products are counted apart: a mode would see what hooks keep, too.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net(*leaves)
    size = sum(x.untyped_storage().nbytes() for x in kept.values())
    grads = torch.autograd.grad(out.square().sum(), [*leaves, *net.parameters()])
    with Products() as products:
        again = net(*leaves)
        torch.autograd.grad(again.square().sum(), [*leaves, *net.parameters()])
    return [out.detach(), *grads], size, products.count


@pytest.mark.parametrize("make", [resnet, geglu, mlp])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_numbers_less_memory_no_product_twice(
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]],
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net, inputs = make()
    net.to(memory_format=memory_format)  # type: ignore[call-overload]
    mine, size, products = run(net, inputs)
    for module in (blocks, unet, dit):
        monkeypatch.setattr(module, "remake", lambda f, x: f(x))
    plain, size_plain, products_plain = run(net, inputs)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
    assert size < 0.7 * size_plain
    assert products == products_plain > 0


def test_nothing_is_wrapped_where_no_gradient_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remake, "checkpoint", None)  # calling it would fail
    with torch.no_grad():
        assert torch.equal(remake.remake(F.silu, torch.ones(2)), F.silu(torch.ones(2)))


def test_weights_put_back_before_the_backward_pass_are_an_error() -> None:
    net, inputs = resnet()
    other = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    loss = functional_call(net, other, inputs).square().sum()
    with pytest.raises(RuntimeError, match="weights of a ResnetBlock were replaced"):
        loss.backward()
    for p in other.values():
        p.grad = None
    with remake.keep_activations():
        loss = functional_call(net, other, inputs).square().sum()
    loss.backward()
    net.load_state_dict(other)
    net(*inputs).square().sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, other[name].grad), name
