"""LoRA against peft, in a tiny UNet: linear and convolution, multiplier, merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from snoopi import lora
from snoopi.models.unet import UNet
from tests.parity import oracle
from tests.parity.oracle import randn
from tests.parity.test_unet import pair, text, their_prediction

pytestmark = pytest.mark.parity
# Attention, the GEGLU, convolutions of stride 1 and 2, and 1x1 convolutions.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv", "conv_shortcut"]
RANK, GAMMA = 3, 7.5


def adapted() -> tuple[UNet, Any]:
    """Both networks with the same random, non-zero adapters."""
    oracle.package("diffusers")
    peft = oracle.package("peft")
    ours, theirs = pair("sd15")
    names = lora.inject(ours, TARGETS, RANK, GAMMA)
    config = peft.LoraConfig(r=RANK, lora_alpha=GAMMA, target_modules=TARGETS, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, theirs)
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert sorted(layers) == sorted(names)
    with torch.no_grad():
        for seed, (name, ours_layer) in enumerate(lora.adapters(ours).items()):
            a, b = layers[name].lora_A["default"].weight, layers[name].lora_B["default"].weight
            for p, mine in ((a, ours_layer.lora_a), (b, ours_layer.lora_b)):
                # Small enough to keep the network well-conditioned: merging rounds differently.
                p.copy_(0.4 * randn(*p.shape, seed=seed) / p[0].numel() ** 0.5)
                mine.copy_(p)
    return ours.requires_grad_(False), theirs.requires_grad_(False).eval()


def test_adapters_and_merge_equal_peft() -> None:
    ours, theirs = adapted()
    peft = oracle.package("peft")
    x, t, cond = randn(2, 4, 8, 8, seed=9), torch.tensor([10, 900]), text(ours.config, 2)
    plain, _ = pair("sd15")
    want = their_prediction(theirs, x, t, cond)
    adapted_output = ours(x, t, cond)
    oracle.close("peft", adapted_output, want)
    assert oracle.errors(adapted_output, plain(x, t, cond))[0] > 0.1
    lora.merge(ours)
    oracle.close("merged against adapters", ours(x, t, cond), want)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    oracle.close("merged", ours(x, t, cond), their_prediction(theirs, x, t, cond))
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(plain))


def test_delta_weights_equal_peft() -> None:
    ours, theirs = adapted()
    modules = dict(theirs.named_modules())
    for name, layer in lora.adapters(ours).items():
        oracle.close(name, layer.delta_weight(), modules[name].get_delta_weight("default"))


def test_initialisation_has_the_same_spread_as_peft() -> None:
    oracle.package("diffusers")
    peft = oracle.package("peft")
    ours, theirs = pair("sd15")
    lora.inject(ours, TARGETS, 16, 16.0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=TARGETS), theirs)
    modules = dict(theirs.named_modules())
    for name, layer in lora.adapters(ours).items():
        want, got = modules[name].lora_A["default"].weight.detach(), layer.lora_a.detach()
        assert got.shape == want.shape
        if want.numel() > 2000:
            assert float(got.std() / want.std()) == pytest.approx(1, abs=0.1)
            assert float(got.abs().max() / want.abs().max()) == pytest.approx(1, abs=0.02)
        assert not layer.lora_b.any()
