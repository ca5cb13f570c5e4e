"""FID's Inception against torchvision's, patched as TensorFlow's network differs from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import zoo
from snoopi.models.inception import Inception, InceptionConfig
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity


def mean_of_what_is_there(x: Tensor, kernel_size: int, stride: int = 1, padding: int = 0) -> Tensor:
    """A 3x3 mean that padding does not count in, by sums: nine shifted copies over their number."""
    assert (kernel_size, stride, padding) == (3, 1, 1)
    ones = torch.ones_like(x[:1, :1])
    high, wide = x.shape[2:]
    total, count = torch.zeros_like(x), torch.zeros_like(ones)
    padded, there = F.pad(x, (1, 1, 1, 1)), F.pad(ones, (1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            total = total + padded[:, :, i : i + high, j : j + wide]
            count = count + there[:, :, i : i + high, j : j + wide]
    return total / count


@torch.no_grad()
def randomise(net: nn.Module) -> nn.Module:
    """Weights and running statistics that are not the first ones, activations of order 1."""
    oracle.randomise(net)
    generator = torch.Generator().manual_seed(2)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.mul_(2**0.5)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(0.2 * torch.randn(m.num_features, generator=generator))
            m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=generator))
    return net


@pytest.fixture(scope="module")
def theirs() -> Any:
    oracle.package("torchvision")
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    return randomise(net)


@pytest.fixture
def patched(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from torchvision.models import inception

    plain = inception.F
    functional = SimpleNamespace(
        avg_pool2d=mean_of_what_is_there, max_pool2d=plain.max_pool2d, relu=plain.relu
    )
    monkeypatch.setattr(inception, "F", functional)

    def maximum(x: Tensor, **sizes: int) -> Tensor:
        return plain.max_pool2d(x, **sizes)

    block = theirs.Mixed_7c
    forward = type(block).forward

    def last(x: Tensor) -> Tensor:
        functional.avg_pool2d = maximum
        try:
            return forward(block, x)
        finally:
            functional.avg_pool2d = mean_of_what_is_there

    monkeypatch.setattr(block, "forward", last)
    return theirs


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Inception:
    net = Inception(InceptionConfig()).eval().requires_grad_(False)
    net.load_state_dict(theirs.state_dict(), strict=True)
    return net


def test_names_and_shapes_are_torchvisions(theirs: Any) -> None:
    ours = zoo.build("inception-fid", "network")
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(theirs))
    assert oracle.count(ours) == 23_850_960 and len(ours.state_dict()) == 566


def taps(net: Any, x: Tensor) -> dict[int, Tensor]:
    """torchvision's feature maps by width, averaged over the picture."""
    found: dict[int, Tensor] = {}

    def keep(width: int) -> Any:
        return lambda module, args, output: found.__setitem__(width, output.mean((2, 3)))

    places = {64: net.maxpool1, 192: net.maxpool2, 768: net.Mixed_6e, 2048: net.Mixed_7c}
    handles = [m.register_forward_hook(keep(width)) for width, m in places.items()]
    found[1008] = net(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("size", [(299, 299), (107, 83)])
def test_outputs_equal_the_patched_network(
    size: tuple[int, int], ours: Inception, patched: Any
) -> None:
    x = 127.5 + 60 * randn(1, 3, *size, seed=3)
    scaled = x / 128 - 1

    def report() -> str:
        return oracle.hidden_report(ours, patched, lambda: ours(x), lambda: patched(scaled))

    got, want = ours(x), taps(patched, scaled)
    oracle.close("2048", got.features, want[2048], report)
    oracle.close("64", got.features_64, want[64], report)
    oracle.close("192", got.features_192, want[192], report)
    oracle.close("768", got.features_768, want[768], report)
    oracle.close("logits", got.logits, want[1008], report)
    bias = patched.fc.bias
    assert float(bias.abs().max()) > 0.1
    oracle.close("unbiased", got.logits_unbiased, want[1008] - bias, report)


def test_the_patches_matter(ours: Inception, theirs: Any) -> None:
    x = 127.5 + 60 * randn(1, 3, 107, 83, seed=3)
    rms, _ = oracle.errors(ours(x).features, taps(theirs, x / 128 - 1)[2048])
    assert rms > 1e-2


def test_the_scale_is_tensorflows() -> None:
    """128 is black's and white's middle: a picture of it gives what zeros give torchvision."""
    net = Inception(InceptionConfig(classes=4)).eval()
    first: list[Tensor] = []
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, args: first.append(args[0]))
    for value in (0.0, 128.0, 255.0):
        net(torch.full((1, 3, 75, 75), value))
    assert [float(x.unique()) for x in first] == [-1.0, 0.0, 127 / 128]
