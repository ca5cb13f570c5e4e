"""VGG16 against torchvision's: names at full size, outputs at small widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snoopi import zoo
from snoopi.models.vgg import VGG, VGGConfig
from tests.parity import oracle
from tests.parity.oracle import randn

pytestmark = pytest.mark.parity
CONFIG = VGGConfig(channels=(4, 6, 8, 10, 12), width=20, classes=7)


def small() -> Any:
    """torchvision's own VGG on its own table of layers, at our small widths."""
    oracle.package("torchvision")
    from torchvision.models import vgg

    table: list[int | str] = []
    for channels, convs in zip(CONFIG.channels, CONFIG.convs, strict=True):
        table += [channels] * convs + ["M"]
    net = vgg.VGG(vgg.make_layers(table), num_classes=7, init_weights=False)  # type: ignore[arg-type]
    width = CONFIG.width
    net.classifier[0] = nn.Linear(12 * 49, width)
    net.classifier[3] = nn.Linear(width, width)
    net.classifier[6] = nn.Linear(width, 7)
    return oracle.randomise(net)


def pair() -> tuple[VGG, Any]:
    theirs = small()
    ours = VGG(CONFIG).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_outputs_and_taps_equal_torchvision(size: tuple[int, int]) -> None:
    ours, theirs = pair()
    x = randn(2, 3, *size)

    def report() -> str:
        return oracle.hidden_report(ours, theirs, lambda: ours(x), lambda: theirs(x))

    maps: list[Tensor] = []
    y = x
    for layer in theirs.features:
        if isinstance(layer, nn.MaxPool2d):
            maps.append(y)
        y = layer(y)
    y = theirs.avgpool(y).flatten(1)
    fc2 = theirs.classifier[:4](y)
    got = ours(x)
    oracle.close("fc2", got.fc2, fc2, report)
    oracle.close("fc2_relu", got.fc2_relu, fc2.relu(), report)
    oracle.close("logits", got.logits, theirs(x), report)
    assert float(got.fc2.min()) < 0 <= float(got.fc2_relu.min())
    found = ours.taps(x)
    assert [tuple(t.shape) for t in found] == [tuple(m.shape) for m in maps]
    for i, (tap, want) in enumerate(zip(found, maps, strict=True)):
        oracle.close(f"tap {i}", tap, want)


def test_the_preset_has_torchvisions_names_and_shapes() -> None:
    oracle.package("torchvision")
    from torchvision.models import vgg16

    with torch.device("meta"):
        theirs = vgg16(weights=None, init_weights=False)
    ours = zoo.build("vgg16", "network")
    oracle.same_keys(oracle.shapes(ours), oracle.shapes(theirs))
    assert oracle.count(ours) == 138_357_544
    for mine, want in ((ours.features, theirs.features), (ours.classifier, theirs.classifier)):
        assert [type(m) for m in mine] == [type(m) for m in want]
