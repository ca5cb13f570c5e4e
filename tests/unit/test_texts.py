"""Texts that a pipeline keeps: nothing is read twice, and nothing that has changed is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snoopi import memory, texts, zoo
from snoopi.layers.attention import CrossAttention
from snoopi.noise import Noise
from snoopi.pipeline import MODES, Pipeline
from snoopi.worlds.shapes import ShapesWorld

PROMPTS = ["a red circle", "a small blue star"]
NEGATIVES = [None, "red", ["red", "large"], ["red", None]]


def tiny(preset: str = "debug", one_step: bool = True) -> Pipeline:
    """An untrained pipeline of which every weight says something."""
    spec, tokenizer = zoo.model(preset), ShapesWorld().tokenizer()
    text = spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    spec = dataclasses.replace(
        spec,
        text=(dataclasses.replace(text, config=words),),
        one_step=zoo.OneStep() if one_step else None,
        kappa=2.0,
    )
    nets: dict[str, Any] = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
    for net in nets.values():
        for i, (name, p) in enumerate(net.named_parameters()):
            p.data += 0.05 * Noise(1).normal(name, 0, [i], p.shape)[0]
    return Pipeline(spec, nets["backbone"], nets["vae"], [nets["text_encoder"]], [tokenizer])


@pytest.fixture(autouse=True)
def memory_as_before() -> Any:
    yield
    memory.give_back()


class Calls:
    """Counts what a pipeline does with texts: encoder calls and projections to K and V."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.encoder = self.projections = 0
        pipeline.text_encoders[0].register_forward_pre_hook(self._encoder)
        for module in pipeline.backbone.modules():
            if isinstance(module, CrossAttention):
                module.to_k.register_forward_pre_hook(self._projection)
                module.to_v.register_forward_pre_hook(self._projection)

    def _encoder(self, module: nn.Module, arguments: Any) -> None:
        self.encoder += 1

    def _projection(self, module: nn.Module, arguments: Any) -> None:
        self.projections += 1

    def of(self, work: Callable[[], Any]) -> tuple[int, int]:
        """Encoder calls and projections that one piece of work makes."""
        before = self.encoder, self.projections
        work()
        return self.encoder - before[0], self.projections - before[1]


def draw(pipeline: Pipeline, **options: Any) -> Tensor:
    z = pipeline.noise(0, range(len(PROMPTS)))
    options = {"prompts": PROMPTS, "steps": 1, **options}
    return pipeline.latents(z=z, **options)


@pytest.mark.parametrize(
    ("preset", "one_step"),
    [
        ("debug", True),
        ("shapes_dit", False),
        pytest.param("debug", False, marks=pytest.mark.slow),
        pytest.param("shapes_dit", True, marks=pytest.mark.slow),
    ],
)
def test_a_kept_text_gives_the_same_picture_bit_for_bit(preset: str, one_step: bool) -> None:
    """In every mode, with every kind of negative, in one call of the network and in several."""
    plain, kept = tiny(preset, one_step), tiny(preset, one_step).optimize()
    for guidance in MODES:
        for negative in NEGATIVES:
            several = [negative] * 2 if isinstance(negative, str) else negative
            steps = 1 if one_step else 2
            options = {"guidance": guidance, "negatives": several, "steps": steps}
            kept.forget()
            first, again = draw(kept, **options), draw(kept, **options)
            assert torch.equal(first, again), options
            # Packed weights and K/V of one text apart from another's round otherwise.
            torch.testing.assert_close(first, draw(plain, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", MODES)
@pytest.mark.parametrize("one_step", [True, False])
def test_a_repeated_text_is_not_read_again(guidance: str, one_step: bool) -> None:
    pipeline = tiny(one_step=one_step).optimize()
    calls = Calls(pipeline)
    options = {"negatives": ["red", "red"], "guidance": guidance, "steps": 3}
    first = calls.of(lambda: draw(pipeline, **options))
    again = calls.of(lambda: draw(pipeline, **options))
    assert first[0] >= 1 and first[1] > 0
    if guidance == "embed-sub":  # its text is another one for every strength
        return
    assert again == (0, 0)
    # Another prompt with the same negative: one text is read, and projected once a layer.
    layers = sum(isinstance(m, CrossAttention) for m in pipeline.backbone.modules())
    other = calls.of(lambda: draw(pipeline, **options | {"prompts": ["a star", "a square"]}))
    assert other == (1, 2 * layers)


def swap_encoder(pipeline: Pipeline) -> None:
    pipeline.text_encoders[0] = zoo.fresh(pipeline.spec, "text_encoder", 7).eval()


def swap_backbone(pipeline: Pipeline) -> None:
    other = tiny().backbone
    other.load_state_dict({k: 1.5 * v for k, v in other.state_dict().items()})
    pipeline.backbone = other


def load_in_place(net: nn.Module) -> None:
    net.load_state_dict({k: 1.5 * v for k, v in net.state_dict().items()})


def to_k(pipeline: Pipeline) -> nn.Linear:
    layers = [m for m in pipeline.backbone.modules() if isinstance(m, CrossAttention)]
    return layers[0].to_k


def replace_parameter(pipeline: Pipeline) -> None:
    to_k(pipeline).weight = nn.Parameter(to_k(pipeline).weight.detach().flip(0))


def write_in_place(pipeline: Pipeline) -> None:
    with torch.no_grad():
        to_k(pipeline).weight.mul_(3)


def other_tokenizer(pipeline: Pipeline) -> None:
    class Backwards:
        def __call__(self, prompts: Any) -> Any:
            return ShapesWorld().tokenizer()([" ".join(reversed(p.split())) for p in prompts])

    pipeline.tokenizers[0] = Backwards()  # type: ignore[call-overload]


def write_data(pipeline: Pipeline) -> None:
    to_k(pipeline).weight.data.mul_(3)
    pipeline.forget()


@pytest.mark.parametrize(
    "change",
    [
        swap_encoder,
        swap_backbone,
        lambda p: load_in_place(p.text_encoders[0]),
        lambda p: load_in_place(p.backbone),
        replace_parameter,
        write_in_place,
        other_tokenizer,
        write_data,
        lambda p: p.to("cpu", torch.float64),
    ],
)
@pytest.mark.parametrize("guidance", ["none", "nasa", "cfg"])
def test_what_has_changed_is_read_again(change: Callable[[Pipeline], Any], guidance: str) -> None:
    options = {"negatives": ["red", "large"], "guidance": guidance}
    kept = tiny().optimize()
    before = draw(kept, **options)
    change(kept)
    fresh = tiny().optimize()
    change(fresh)
    after = draw(kept, **options)
    assert not torch.equal(after, before) and torch.equal(after, draw(fresh, **options))


def test_only_the_last_texts_are_kept() -> None:
    pipeline = tiny().optimize()
    calls = Calls(pipeline)
    words = [f"a {size} {shape}" for size in ("small", "large") for shape in ("star", "circle")]
    several = [[a, b] for a in words for b in words][: texts.RECENT]
    for prompts in several:
        draw(pipeline, prompts=prompts, guidance="none")
    assert all(
        calls.of(lambda p=p: draw(pipeline, prompts=p, guidance="none")) == (0, 0) for p in several
    )
    assert calls.of(lambda: draw(pipeline, guidance="none"))[0] == 1  # the first one goes
    assert calls.of(lambda: draw(pipeline, prompts=several[1], guidance="none")) == (0, 0)
    assert calls.of(lambda: draw(pipeline, prompts=several[0], guidance="none"))[0] == 1


def test_nothing_is_kept_under_grad_or_unless_asked() -> None:
    pipeline = tiny().optimize()
    draw(pipeline, guidance="none")
    pipeline.text_encoders[0].requires_grad_(True)
    with torch.enable_grad():
        (cond,) = pipeline.conditions(PROMPTS, [None, None], "none", [0.0])
    assert cond.tokens.requires_grad and cond.kv is None
    pipeline = tiny()
    calls = Calls(pipeline)
    for _ in range(2):
        assert calls.of(lambda: draw(pipeline, guidance="none"))[0] == 1


def test_restore_ends_it() -> None:
    pipeline = tiny().optimize()
    draw(pipeline)
    assert pipeline.restore() is pipeline
    calls = Calls(pipeline)
    for _ in range(2):
        assert calls.of(lambda: draw(pipeline))[0] == 1
    assert torch.equal(draw(pipeline), draw(tiny()))


def test_prompts_with_negatives_of_their_own_are_drawn_in_one_call() -> None:
    """Each row as if it were alone (to rounding), and the network is called once for all."""
    pipeline = tiny().optimize()
    prompts, negatives = [*PROMPTS, "a large square"], ["red", "a small star", "blue"]
    z = pipeline.noise(0, [0, 1, 2])
    calls: list[int] = []
    pipeline.backbone.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    for guidance in MODES:
        calls.clear()
        together = pipeline.latents(prompts, z, negatives, guidance, 1.3, steps=1)
        assert calls == ([3, 3] if guidance == "cfg" else [3])
        for i in range(3):
            alone = pipeline.latents(
                prompts[i : i + 1], z[i : i + 1], negatives[i : i + 1], guidance, 1.3, steps=1
            )
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        if guidance != "none":  # and the negatives are each prompt's own
            turned = pipeline.latents(prompts, z, negatives[::-1], guidance, 1.3, steps=1)
            assert (turned[0] - together[0]).abs().max() > 1e-3
