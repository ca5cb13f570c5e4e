"""snoopi.graphs: what is recorded, when, and from which memory it is replayed.

Without a device the recording is a stand-in that, like a CUDA graph, runs again on the memory it
was recorded with and leaves its result where it was. On one (-m gpu) it is CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import graphs, zoo
from snoopi.conditioning import Conditioning
from snoopi.graphs import Graphs
from snoopi.guidance import NAG, NASA
from snoopi.pipeline import Pipeline
from snoopi.tokenize import Tokenizer
from snoopi.zoo import OneStep


class Recorder:
    """Records like CUDA: replays read and write the memory of the recording."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, function: Callable[..., Tensor], args: Any) -> Any:
        self.recorded += 1
        result = torch.full_like(function(*args), torch.nan)  # recording computes nothing

        def replay() -> None:
            self.replayed += 1
            result.copy_(function(*args))

        return replay, result


def unet(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return x * t[:, None] + cond.tokens.mean(1) * (2 if cond.negative is None else 3)


def cond(seed: int, guidance: Any = None, batch: int = 2) -> Conditioning:
    g = torch.Generator().manual_seed(seed)
    tokens, other = (torch.randn(batch, 3, 4, generator=g) for _ in range(2))
    negative = None if guidance is None else Conditioning(other)
    return Conditioning(tokens, negative=negative, guidance=guidance)


def call(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + seed)
    return torch.randn(batch, 4, generator=g), torch.full((batch,), float(seed))


def test_calls_of_one_kind_are_one_recording() -> None:
    recorder = Recorder()
    net, results = Graphs(unet, recorder), []
    for seed in range(4):
        results.append((net(*call(seed), cond(seed)), unet(*call(seed), cond(seed))))
    assert (recorder.recorded, recorder.replayed) == (1, 4)
    for got, want in results:  # earlier results are not overwritten
        assert torch.equal(got, want)


def test_another_kind_is_another_recording() -> None:
    """Batch, dtype, structure, and numbers that are constants of a graph; not the tensors."""
    recorder = Recorder()
    net = Graphs(unet, recorder)
    kinds: list[tuple[Any, ...]] = [
        (*call(0), cond(0)),
        (*call(0, 1), cond(0, batch=1)),
        (call(0)[0].double(), call(0)[1], cond(0)),
        (*call(0), cond(0, NASA(0.5))),
        (*call(0), cond(0, NASA(0.7))),
        (*call(0), cond(0, NASA(torch.tensor(0.7)))),
        (*call(0), cond(0, NAG(0.7))),
    ]
    for number, args in enumerate(kinds, 1):
        assert torch.equal(net(*args), unet(*args)) and recorder.recorded == number
    for args in kinds:
        assert torch.equal(net(*args), unet(*args))
    assert recorder.recorded == len(kinds)
    net(*call(0), cond(0, NASA(torch.tensor(0.9))))
    assert recorder.recorded == len(kinds)
    net.clear()
    net(*kinds[0])
    assert recorder.recorded == len(kinds) + 1


def test_the_recordings_used_last_are_kept() -> None:
    recorder = Recorder()
    net = Graphs(unet, recorder)
    for batch in range(1, graphs.MOST + 1):
        net(*call(0, batch), cond(0, batch=batch))
    net(*call(0, 1), cond(0, batch=1))
    net(*call(0, 30), cond(0, batch=30))  # 2 goes, not 1
    assert recorder.recorded == graphs.MOST + 1
    net(*call(0, 1), cond(0, batch=1))
    assert recorder.recorded == graphs.MOST + 1
    net(*call(0, 2), cond(0, batch=2))
    assert recorder.recorded == graphs.MOST + 2


def test_what_cannot_be_recorded_is_called_as_it_is() -> None:
    tried = []

    def refuse(function: Any, args: Any) -> Any:
        tried.append(args)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    net = Graphs(unet, refuse)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph: operation not"):
        got = net(*call(1), cond(1))
    assert torch.equal(got, unet(*call(1), cond(1)))
    assert torch.equal(net(*call(2), cond(2)), unet(*call(2), cond(2))) and len(tried) == 1
    net(*call(2, 1), cond(2, batch=1))  # another kind is tried, and nothing more is said
    assert len(tried) == 2


def pipeline() -> Pipeline:
    """The debug model, one-step, with random weights."""
    spec = replace(zoo.model("debug"), one_step=OneStep(t=999))
    nets = {part: zoo.fresh(spec, part, 0) for part in ("backbone", "vae", "text_encoder")}
    torch.manual_seed(0)
    torch.nn.init.normal_(nets["backbone"].conv_out.weight, std=0.1)  # it starts at zero
    words = Tokenizer.words(["a", "red", "circle", "square"], spec.text[0].config.length)
    return Pipeline(spec, nets["backbone"], nets["vae"], [nets["text_encoder"]], [words])


def pictures(net: Pipeline, negative: str | None, num: int = 2) -> Tensor:
    z = net.noise(0, list(range(num)))
    return net.latents(["a red circle"] * num, z, [negative] * num).cpu()


def test_a_pipeline_replays_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the texts of the call, and anew once a weight was replaced or changed."""
    recorder = Recorder()
    monkeypatch.setattr("snoopi.pipeline.Graphs", partial(Graphs, record=recorder))
    monkeypatch.setattr(Pipeline, "_records", lambda self, z: self._recent is not None)
    plain, net = pipeline(), pipeline().optimize()
    try:
        for negative in (None, "square", "a square", None):
            torch.testing.assert_close(pictures(net, negative), pictures(plain, negative))
        assert (recorder.recorded, recorder.replayed) == (2, 4)
        for each in (plain, net):
            weight = each.backbone.conv_out.weight
            each.backbone.conv_out.weight = torch.nn.Parameter(-weight.detach())
        torch.testing.assert_close(pictures(net, None), pictures(plain, None))
        net.forget()
        pictures(net, None)
        assert recorder.recorded == 4
    finally:
        net.restore()
    pictures(net, None)
    assert recorder.recorded == 4


@pytest.mark.gpu
def test_on_a_device_graphs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Convolutions of another memory format round otherwise in TF32, cuDNN's default for fp32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = pipeline().to("cuda")
    net = pipeline().to("cuda").optimize()
    for negative in (None, "square", "a square", None):
        torch.testing.assert_close(pictures(net, negative), pictures(plain, negative))
    assert net._graphs is not None and all(net._graphs._kept.values())
