"""snoopi.optimize: packs weights from outside, changes nothing beyond rounding, can be undone."""

import pytest
import torch
from torch import Tensor, nn

from snoopi import lora
from snoopi.conditioning import Conditioning
from snoopi.guidance import NAG, NASA, VSF, Guidance
from snoopi.layers.attention import CrossAttention
from snoopi.optimize import optimize, restore

GUIDANCES = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), VSF(1.0)]


def layer() -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention(32, 12, 2, 16).requires_grad_(False)


def condition(guidance: Guidance) -> Conditioning:
    g = torch.Generator().manual_seed(1)
    texts = [Conditioning(torch.randn(1, 7, 12, generator=g)) for _ in range(3)]
    return Conditioning(texts[0].tokens, negative=texts[1], null=texts[2], guidance=guidance)


def picture() -> Tensor:
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_packed_weights_give_the_same(guidance: Guidance) -> None:
    net, x, cond = layer(), picture(), condition(guidance)
    plain = net(x, cond, (4, 4))
    assert optimize(nn.ModuleList([net]))[0] is net and net._packed_out is not None
    torch.testing.assert_close(net(x, cond, (4, 4)), plain)
    restore(net)
    assert net._packed_out is None
    assert torch.equal(net(x, cond, (4, 4)), plain)


def changed(net: CrossAttention, how: str) -> None:
    out = net.to_out[0]
    if how == "replaced":
        fresh = nn.Linear(32, 32, device="meta").to_empty(device="cpu").requires_grad_(False)
        fresh.weight.fill_(0.1), fresh.bias.fill_(0.2)
        out.load_state_dict(fresh.state_dict(), assign=True)
    elif how == "in place":
        out.weight.mul_(-1)
    else:
        lora.inject(net, ["to_out.0"], rank=2, gamma=2.0)
        out.lora_b.fill_(0.3)
        if how == "merged":
            lora.merge(net)


@torch.no_grad()
@pytest.mark.parametrize("how", ["replaced", "in place", "adapter", "merged"])
def test_changed_weights_are_seen(how: str) -> None:
    net, x, cond = layer(), picture(), condition(NASA(0.7))
    optimize(net)
    other = layer()
    before = net(x, cond, (4, 4))
    changed(net, how), changed(other, how)
    got = net(x, cond, (4, 4))
    torch.testing.assert_close(got, other(x, cond, (4, 4)))
    assert (got - before).abs().max() > 1e-2
    lora.remove(net)
    optimize(net)
    assert net._packed_out is not None


@torch.no_grad()
def test_an_optimized_layer_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    net, x, cond = layer(), picture(), condition(NASA(0.7))
    optimize(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cond, (4, 4)), net(x, cond, (4, 4)))


def test_a_parameter_that_wants_a_gradient_is_refused() -> None:
    net = nn.ModuleDict({"a": layer(), "b": layer()})
    net["b"].to_out[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"b\.to_out\.0\.bias requires a gradient"):
        optimize(net)
    assert net["a"]._packed_out is None
