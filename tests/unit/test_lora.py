"""LoRA: identity at injection, multiplier, the row gate of the teacher pair, merge and remove."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snoopi import lora
from snoopi.conditioning import Conditioning
from snoopi.models.unet import UNet, UNetConfig
from snoopi.noise import Noise

ALL = ["*"]
CONFIG = UNetConfig(
    channels=(16, 32),
    resnets=1,
    depth=(1, 1),
    heads=(2, 4),
    text_width=12,
    norm_groups=8,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(linear_proj: bool = False) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(UNetConfig(**{**vars(CONFIG), "linear_proj": linear_proj})).eval()


def inputs(b: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    t = torch.tensor([3, 999, 500, 20])[:b]
    return randn(b, 4, 6, 10), t, Conditioning(randn(b, 5, 12, seed=1))


@torch.no_grad()
def fill(net: nn.Module, value: float | None = None) -> None:
    """Every adapter's parameters random, or one value."""
    for seed, p in enumerate(lora.parameters(net)):
        p.copy_(0.2 * randn(*p.shape, seed=seed) if value is None else torch.tensor(value))


def classes(net: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in net.named_modules()}


@pytest.mark.parametrize("linear_proj", [False, True])
def test_injecting_changes_nothing_bit_for_bit(linear_proj: bool) -> None:
    net = unet(linear_proj)
    x, t, cond = inputs()
    want, before = net(x, t, cond), net.state_dict()
    names = lora.inject(net, ALL, rank=2, gamma=4.0)
    kinds = (nn.Linear, nn.Conv2d)
    assert names == [n for n, m in net.named_modules() if isinstance(m, kinds)]
    assert torch.equal(net(x, t, cond), want)
    after = net.state_dict()
    assert before.keys() <= after.keys()
    assert after.keys() - before.keys() == {f"{n}.{s}" for n in names for s in lora.SUFFIXES}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_only_adapters_are_trained() -> None:
    net = unet()
    lora.inject(net, ["to_q", "conv1"], 2, 2.0)
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert trained == list(lora.state_dict(net)) and trained
    assert all(name.endswith(lora.SUFFIXES) for name in trained)
    assert [id(p) for p in lora.parameters(net)] == [
        id(p) for p in net.parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_linear_is_w_x_plus_gamma_over_rank_b_a_x(first: int) -> None:
    net = nn.Sequential(nn.Linear(6, 5))
    lora.inject(net, ["0"], rank=2, gamma=5.0)
    fill(net)
    layer, x = net[0], randn(3, 4, 6)
    delta = x @ layer.lora_a.T @ layer.lora_b.T
    delta[:first] = 0
    with torch.no_grad(), lora.rows(net, first):
        got = net(x)
    torch.testing.assert_close(got, x @ layer.weight.T + layer.bias + 2.5 * delta)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_is_that_of_the_summed_weight(kernel: int, stride: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, kernel, stride, padding=kernel // 2))
    lora.inject(net, ["0"], rank=2, gamma=5.0)
    fill(net)
    layer, x = net[0], randn(2, 3, 7, 6)
    a, b = layer.lora_a, layer.lora_b[..., 0, 0]
    weight = layer.weight + 2.5 * torch.einsum("or,rikl->oikl", b, a)
    want = nn.functional.conv2d(x, weight, layer.bias, stride, kernel // 2)
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta_weight(), weight - layer.weight, rtol=1e-5, atol=1e-5)


def test_initialisation_depends_on_the_noise_and_the_name_alone() -> None:
    nets = [unet(), unet(), unet(), unet()]
    lora.inject(nets[0], ALL, 2, 2.0, Noise(5))
    lora.inject(nets[1], ["to_q", "conv1"], 2, 2.0, Noise(5))
    lora.inject(nets[2], ["to_q"], 2, 2.0, Noise(6))
    lora.inject(nets[3], ["to_q"], 2, 2.0)
    few, all_ = lora.state_dict(nets[1]), lora.state_dict(nets[0])
    assert all(torch.equal(value, all_[name]) for name, value in few.items())
    for name, value in lora.state_dict(nets[2]).items():
        assert torch.equal(value, all_[name]) == name.endswith("lora_b")
    a = [v.flatten() for k, v in lora.state_dict(nets[2]).items() if "attn1.to_q.lora_a" in k]
    assert not torch.equal(a[0][:8], a[1][:8])


# --- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "suffixes"),
    [
        (["to_q", "to_v"], ("to_q", "to_v")),
        (["attn2.to_q"], ("attn2.to_q",)),
        (["*.attn2.to_[kv]"], ("attn2.to_k", "attn2.to_v")),
        (["to_out.0"], ("to_out.0",)),
        (["conv_in"], ("conv_in",)),
    ],
)
def test_targets_match_whole_parts_of_a_name(targets: list[str], suffixes: tuple[str, ...]) -> None:
    net = unet()
    kinds = (nn.Linear, nn.Conv2d)
    want = [n for n, m in net.named_modules() if isinstance(m, kinds) and n.endswith(suffixes)]
    assert lora.inject(net, targets, 2, 2.0) == want and want
    assert list(lora.adapters(net)) == want


@pytest.mark.parametrize("targets", [["to_x"], ["to_q", "norm1"], ["o_q"], ["to_q", "attn1"]])
def test_a_target_without_a_match_is_refused_before_anything_changes(targets: list[str]) -> None:
    net = unet()
    before = classes(net)
    with pytest.raises(ValueError, match=rf"LoRA target '{targets[-1]}' matches no Linear"):
        lora.inject(net, targets, 2, 2.0)
    assert classes(net) == before and all(p.requires_grad for p in net.parameters())


def test_impossible_ranks_and_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora.inject(unet(), ALL, 0, 1.0)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    circular = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    for net in (grouped, circular):
        with pytest.raises(ValueError, match="LoRA on 0: only plain zero-padded convolutions"):
            lora.inject(net, ALL, 2, 2.0)


# --- the row gate ----------------------------------------------------------------------------


@pytest.mark.parametrize("linear_proj", [False, True])
def test_frozen_rows_are_bit_equal_to_the_bare_network(linear_proj: bool) -> None:
    """Whatever the adapters hold: infinities must not leak into the rows before the gate."""
    net = unet(linear_proj)
    x, t, cond = inputs()
    with torch.no_grad():
        bare = net(x, t, cond)
        lora.inject(net, ALL, 2, 4.0)
        for value in (None, float("inf"), float("nan")):
            fill(net, value)
            with lora.rows(net, 2):
                got = net(x, t, cond)
            assert torch.equal(got[:2], bare[:2])
            assert not torch.equal(got[2:], bare[2:])
            with lora.rows(net, 4):
                assert torch.equal(net(x, t, cond), bare)


def test_rows_behind_the_gate_are_those_of_the_adapted_network() -> None:
    net = unet()
    x, t, cond = inputs()
    lora.inject(net, ALL, 2, 4.0)
    fill(net)
    with torch.no_grad():
        everywhere = net(x, t, cond)
        with lora.rows(net, 2):
            torch.testing.assert_close(net(x, t, cond)[2:], everywhere[2:], rtol=1e-5, atol=1e-5)
        with lora.rows(net, 0):
            assert torch.equal(net(x, t, cond), everywhere)
        assert torch.equal(net(x, t, cond), everywhere)  # the gate is gone


def test_the_gate_refuses_inputs_that_are_broadcast_later() -> None:
    """A text of one row serves rows on both sides: its adapters could only be on or off for all."""
    net = unet()
    x, t, cond = inputs()
    lora.inject(net, ["to_k"], 2, 4.0)
    with torch.no_grad(), lora.rows(net, 2):
        net(x, t, cond)
        with pytest.raises(ValueError, match=r"lora\.rows from row 2, but an input has 1 rows"):
            net(x, t, Conditioning(cond.tokens[:1]))


def test_the_gate_is_refused_under_grad_and_closed_after_an_error() -> None:
    net = unet()
    lora.inject(net, ALL, 2, 4.0)
    with pytest.raises(RuntimeError, match="no_grad only"), lora.rows(net, 2):
        pass
    with torch.no_grad(), pytest.raises(KeyError), lora.rows(net, 2):
        raise KeyError
    assert {layer.first_row for layer in lora.adapters(net).values()} == {0}


def test_checkpointing_leaves_gradients_equal() -> None:
    net = unet()
    x, t, cond = inputs()
    lora.inject(net, ALL, 2, 4.0)
    fill(net)

    def gradients(again: bool) -> Sequence[Tensor]:
        out = checkpoint(net, x, t, cond, use_reentrant=False) if again else net(x, t, cond)
        return torch.autograd.grad(out.square().mean(), lora.parameters(net))

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again) and plain.any()


# --- merge and remove ------------------------------------------------------------------------


def test_merge_equals_the_adapters_and_restores_the_classes() -> None:
    net = unet()
    x, t, cond = inputs()
    before, names = classes(net), list(net.state_dict())
    lora.inject(net, ALL, 2, 4.0)
    fill(net)
    with torch.no_grad():
        want = net(x, t, cond)
        lora.merge(net)
        got = net(x, t, cond)
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert classes(net) == before and list(net.state_dict()) == names
    assert not lora.adapters(net) and not lora.parameters(net)
    assert all("lora" not in key and key != "multiplier" for m in net.modules() for key in vars(m))


def test_remove_gives_the_bare_network_back() -> None:
    net = unet()
    x, t, cond = inputs()
    want, before = net(x, t, cond), classes(net)
    lora.inject(net, ALL, 2, 4.0)
    fill(net, float("nan"))
    lora.remove(net)
    assert torch.equal(net(x, t, cond), want) and classes(net) == before
    lora.inject(net, ["to_q"], 3, 3.0)  # and it can be adapted anew
    assert torch.equal(net(x, t, cond), want)


def test_adapters_travel_by_state_dict() -> None:
    source, target = unet(), unet()
    for net in (source, target):
        lora.inject(net, ["to_q", "conv1"], 2, 4.0)
    fill(source)
    state = lora.state_dict(source)
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert not unexpected and not any(name.endswith(lora.SUFFIXES) for name in missing)
    x, t, cond = inputs()
    assert torch.equal(source(x, t, cond), target(x, t, cond))


def test_hooks_and_16_bit_bases_survive_injection() -> None:
    net = nn.Sequential(nn.Linear(4, 4).bfloat16())
    seen: list[int] = []
    net[0].register_forward_hook(lambda *args: seen.append(1))
    lora.inject(net, ALL, 2, 4.0)
    assert net[0].lora_a.dtype == torch.float32 and net[0].weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        net(randn(2, 4))
    assert seen == [1]
    lora.merge(net)
    assert net[0].weight.dtype == torch.bfloat16 and type(net[0]) is nn.Linear
