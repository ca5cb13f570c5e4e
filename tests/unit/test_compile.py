"""parallel.compile: a graph for each block, equal to rounding, none left out in silence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.testing import CompileCounter

from snoopi import lora, parallel
from snoopi.conditioning import Conditioning
from snoopi.models.unet import TransformerBlock

SIZE = (2, 3)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Graphs and settings of this test alone."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield


def block() -> TransformerBlock:
    torch.manual_seed(0)
    made = TransformerBlock(8, 2, 12)
    lora.inject(made, ["to_q"], 2, 4.0)
    for p in lora.parameters(made):
        p.data.normal_()
    return made


def call(net: nn.Module, rows: int = 2) -> Tensor:
    x = torch.linspace(-1, 1, rows * 6 * 8).view(rows, 6, 8)
    text = torch.linspace(-1, 1, rows * 5 * 12).view(rows, 5, 12)
    return net(x, Conditioning(text), SIZE)


def gradients(net: nn.Module) -> list[Tensor]:
    found = lora.parameters(net)
    return list(torch.autograd.grad(call(net).square().sum(), found))


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_block_computes_the_same(checkpointing: bool) -> None:
    plain, compiled = block(), block()
    parallel.compile_blocks([compiled], backend="aot_eager")
    if checkpointing:
        parallel.checkpoint_blocks([compiled])
    for mine, other in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(mine, other)
    for first_row in (2, 4, 0):  # the frozen teacher's rows come first
        with torch.no_grad(), lora.rows(plain, first_row), lora.rows(compiled, first_row):
            torch.testing.assert_close(call(compiled, 4), call(plain, 4))


def test_blocks_of_one_class_do_not_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "COMPILED", 1)
    blocks, counter = [nn.Linear(n, 2) for n in (3, 4, 5)], CompileCounter()
    parallel.compile_blocks(blocks, backend=counter)
    for net in blocks:
        net(torch.ones(2, net.in_features))
    assert counter.frame_count == 3


def test_more_graphs_than_the_limit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "COMPILED", 1)
    net = nn.Linear(3, 2)
    parallel.compile_blocks([net], backend="eager")
    net(torch.ones(2, 3))
    with pytest.raises(FailOnRecompileLimitHit), torch.no_grad():
        net(torch.ones(2, 3))


def test_a_block_that_makes_no_single_graph_is_an_error() -> None:
    class Talks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print(x.sum().item())
            return x

    net = Talks()
    parallel.compile_blocks([net], backend="eager")
    with pytest.raises(Unsupported):
        net(torch.ones(2))
