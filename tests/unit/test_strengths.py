"""Strength is data: per layer, per step and per query, by hand; and the presets' table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import generate, zoo
from snoopi.conditioning import Conditioning
from snoopi.guidance import (
    METHODS,
    NAG,
    NASA,
    PRESETS,
    VSF,
    Guidance,
    strength,
    with_strength,
)
from snoopi.layers.attention import CrossAttention
from snoopi.models.unet import UNet, UNetConfig
from snoopi.noise import Noise
from snoopi.pipeline import MODES, STRENGTHS, Pipeline
from snoopi.samplers import SAMPLERS, grid, sample
from snoopi.schedule import Schedule
from snoopi.worlds.shapes import ShapesWorld

GUIDANCES = [NASA(0.7), NASA(0.7, centred=True), NAG(2.0), NAG(2.0, norm_p=2), VSF(1.0)]
HEADS, DIM = 2, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(b: int, n: int, seed: int) -> Conditioning:
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, 0] = True
    return Conditioning(2 * randn(b, n, 5, seed=seed), mask)


# --- a layer by loops over rows, tokens and heads ---------------------------------------------


def by_hand(net: CrossAttention, x: Tensor, cond: Conditioning, size: tuple[int, int]) -> Tensor:
    """The layer in fp64, a token at a time; a text of one row serves the batch."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for m in range(x.shape[1]):
            z, share = hand_attend(net, x[b, m], cond, b)
            neg, share_neg = hand_attend(net, x[b, m], cond.negative, b)
            null, _ = hand_attend(net, x[b, m], cond.null, b)
            a = hand_strength(net, cond, b, divmod(m, size[1]), size)
            z = hand_formula(cond.guidance, a, z, share, neg, share_neg, null)
            out[b, m] = net.to_out[0].weight @ z.flatten() + net.to_out[0].bias
    return out


def hand_attend(net: Any, x: Tensor, text: Any, b: int) -> tuple[Tensor, Tensor]:
    """Attention of one token [h d] and each head's sum of exp(logits) [h]; 0 without a key."""
    b = b if len(text) > 1 else 0
    z, share = torch.zeros(HEADS, DIM).double(), torch.zeros(HEADS).double()
    for h in range(HEADS):
        rows = slice(h * DIM, (h + 1) * DIM)
        q = net.to_q.weight[rows] @ x
        for n in range(text.tokens.shape[1]):
            if text.mask is None or text.mask[b, n]:
                k, v = (to.weight[rows] @ text.tokens[b, n] for to in (net.to_k, net.to_v))
                weight = torch.exp(q @ k / math.sqrt(DIM))
                share[h] += weight
                z[h] += weight * v
        if share[h] > 0:
            z[h] /= share[h]
    return z, share


def hand_strength(net: Any, cond: Any, b: int, at: tuple[int, int], size: tuple[int, int]) -> float:
    """The layer's number times the mean of the region over the token's window."""
    value = strength(cond.guidance)
    if isinstance(value, Tensor) and value.dim() == 1:
        value = value[net.index]
    value = float(value)
    if cond.region is None:
        return value
    region = cond.region[b if len(cond.region) > 1 else 0]
    rows, columns = (
        slice(i * whole // parts, -(-(i + 1) * whole // parts))
        for i, whole, parts in zip(at, region.shape, size, strict=True)
    )
    return value * float(region[rows, columns].double().mean())


def hand_formula(
    how: Any, a: float, z: Tensor, share: Tensor, neg: Tensor, share_neg: Tensor, null: Tensor
) -> Tensor:
    if isinstance(how, NASA):
        return z - a * (neg - null if how.centred else neg)
    if isinstance(how, VSF):
        low = share_neg * math.exp(-how.bias)
        joint = (share[:, None] * z - a * low[:, None] * neg) / (share + low)[:, None]
        return joint if share_neg.sum() > 0 else z
    if share_neg.sum() == 0:
        return z
    far = z + a * (z - neg)

    def norm(t: Tensor) -> float:
        powers = sum(abs(float(v)) ** how.norm_p for v in t.flatten())
        return powers ** (1 / how.norm_p)

    most = how.tau * norm(z)
    far = far * min(1.0, most / norm(far)) if norm(far) > 0 else far
    return how.blend * far + (1 - how.blend) * z


def layer() -> CrossAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CrossAttention(HEADS * DIM, 5, HEADS, DIM).double().requires_grad_(False)
    net.index, net.count = 1, 3
    return net


REGIONS = {
    "none": None,
    "per row": randn(2, 4, 6, seed=9).sigmoid(),
    "shared": randn(1, 8, 12, seed=9).sigmoid(),
    "uneven": randn(2, 7, 5, seed=9).sigmoid(),
    "coarse": randn(2, 2, 3, seed=9).sigmoid(),
}


@torch.no_grad()
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_a_region_and_a_strength_per_layer_by_hand(guidance: Guidance, region: str) -> None:
    net, x, size = layer(), randn(2, 24, HEADS * DIM, seed=1), (4, 6)
    layers = torch.tensor([5.0, 0.6, 7.0], dtype=torch.float64)
    if REGIONS[region] is not None:  # the values of a region are fp32
        layers = layers.float()
    cond = dataclasses.replace(
        text(2, 4, 2),
        negative=text(1, 3, 3),
        null=text(2, 5, 4),
        guidance=with_strength(guidance, layers),
        region=REGIONS[region],
    )
    got, want = net(x, cond, size), by_hand(net, x, cond, size)
    tight = 1e-12 if region == "none" else 1e-6
    torch.testing.assert_close(got, want, rtol=tight, atol=tight)
    number = dataclasses.replace(cond, guidance=with_strength(guidance, 0.6))
    torch.testing.assert_close(net(x, number, size), want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_rows_and_texts_without_a_key_by_hand(guidance: Guidance) -> None:
    net, x = layer(), randn(2, 6, HEADS * DIM, seed=1)
    prompt, negative = text(2, 4, 2), text(2, 3, 3)
    assert prompt.mask is not None and negative.mask is not None
    negative.mask[0] = False
    for dead in (None, 0, 1):
        if dead is not None:
            prompt.mask[dead] = False
        cond = dataclasses.replace(prompt, negative=negative, null=text(1, 5, 4), guidance=guidance)
        got, want = net(x, cond, (2, 3)), by_hand(net, x, cond, (2, 3))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (2, 1, 4, 6)])
def test_a_region_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"region must be \[2 or 1, H, W\], got \["):
        dataclasses.replace(text(2, 4, 2), region=torch.ones(shape))


@pytest.mark.parametrize("guidance", [NASA, NAG, VSF])
def test_a_formula_refuses_a_strength_per_layer(guidance: Any) -> None:
    z, lse = randn(2, 3, 2, 4), randn(2, 3, 2)
    with pytest.raises(ValueError, match=r"strength must be a number or \[b m\], got \[4\]"):
        guidance(torch.ones(4)).combine(z, lse, z, lse)


def test_nag_knows_two_norms() -> None:
    with pytest.raises(ValueError, match="norm_p must be 1 or 2, got 3"):
        NAG(norm_p=3)


# --- per step --------------------------------------------------------------------------------

SCHEDULE = Schedule()
CALLS = {name: 5 if name == "pndm" else 4 for name in SAMPLERS}  # network calls at 4 steps


def unet() -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"channels": (8, 16), "resnets": 1, "depth": (0, 1)}
        net = UNet(UNetConfig(**sizes, heads=(1, 2), text_width=5, norm_groups=4))
        return net.eval().double().requires_grad_(False)


def step_noise(i: int) -> Tensor:
    return randn(2, 4, 8, 8, seed=100 + i)


def steered(guidance: Guidance | None, region: Tensor | None = None) -> Conditioning:
    texts = {"negative": text(1, 3, 3), "null": text(1, 4, 4)}
    return dataclasses.replace(text(2, 4, 2), **texts, guidance=guidance, region=region)


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_each_call_its_own_conditioning_and_kappa(name: str) -> None:
    calls = CALLS[name]
    assert len(grid(name, SCHEDULE, 4)) == calls
    conds = [Conditioning(randn(2, 3, 4, seed=i)) for i in range(calls)]
    null, seen = Conditioning(randn(1, 7, 4, seed=50)), []  # another length: two calls a step

    def net(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(cond)
        return torch.tanh(x + cond.tokens.mean())

    def run(cond: Any, kappa: Any = 1.0, null: Any = None) -> Tensor:
        z = randn(2, 4, 8, 8)
        return sample(
            name, net, SCHEDULE, z, cond, steps=4, noise=step_noise, kappa=kappa, null=null
        )

    each = run(conds)
    assert len(seen) == calls and all(a is b for a, b in zip(seen, conds, strict=True))
    assert not torch.equal(each, run(conds[0]))
    assert torch.equal(run([conds[0]] * calls), run(conds[0]))
    # A kappa of 0 on a step leaves its null text alone; the others count there.
    for i in range(calls):
        kappas = [0.0 if j == i else 2.0 for j in range(calls)]
        other = [conds[-1] if j == i else cond for j, cond in enumerate(conds)]
        torch.testing.assert_close(run(conds, kappas, null), run(other, kappas, null))
    assert torch.equal(run(conds, [2.0] * calls, null), run(conds, 2.0, null))
    seen.clear()
    for many in ([], conds[1:], [*conds, conds[0]]):
        expected = f"per network call: {calls}, got {len(many)}"
        with pytest.raises(ValueError, match=f"cond must be one, or one {expected}"):
            run(many)
        with pytest.raises(ValueError, match=f"kappa must be one, or one {expected}"):
            run(conds[0], [1.0] * len(many), null)
    assert seen == []


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_value_of_step_times_layer_times_region(guidance: Guidance) -> None:
    """A few-step sampler by hand: at each call every layer is given its own product as [b m]."""
    net, z, times = unet(), randn(2, 4, 8, 8), (999, 749, 499, 249)
    layers = net.cross_attentions()
    per_step, per_layer = [1.3, 0.7, 0.0, 0.4], torch.rand(len(layers)) + 0.2
    region = randn(2, 8, 8, seed=9).sigmoid().float()
    conds = [steered(with_strength(guidance, s * per_layer), region) for s in per_step]
    packed = [net.text_kv(cond) for cond in conds]
    x = z
    for i, now in enumerate(times):
        handles = []
        for layer in layers:

            def put(module: Any, args: Any, i: int = i) -> Any:
                tokens, cond, size = args
                coarse = region.unfold(1, 8 // size[0], 8 // size[0])
                coarse = coarse.unfold(2, 8 // size[1], 8 // size[1]).mean((-1, -2))  # [b h w]
                a = per_step[i] * per_layer[module.index] * coarse.flatten(1)  # [b m]
                return tokens, dataclasses.replace(cond, guidance=with_strength(guidance, a)), size

            handles.append(layer.register_forward_pre_hook(put))
        t = torch.full((2,), now)
        x0 = SCHEDULE.to_x0(net(x, t, steered(guidance)), x, t)
        for handle in handles:
            handle.remove()
        after = torch.full((2,), times[i + 1]) if i < 3 else None
        x = x0 if after is None else SCHEDULE.add_noise(x0, step_noise(i), after)
    for given in (conds, packed):
        got = sample("dmd2", net, SCHEDULE, z, given, times=times, noise=step_noise)
        torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)
    one = sample("dmd2", net, SCHEDULE, z, conds[0], times=times, noise=step_noise)
    assert (one - x).abs().max() > 1e-3


# --- per step through the pipeline and the command -------------------------------------------


def tiny(**recipe: Any) -> Pipeline:
    """A whole untrained pipeline of the debug preset; without a recipe a multi-step model."""
    one_step = zoo.OneStep(**recipe) if recipe else None
    spec = dataclasses.replace(zoo.preset("debug"), one_step=one_step)
    nets = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
    out = nets["backbone"].conv_out.weight
    out.data.copy_(0.1 * Noise(1).normal("out", 0, [0], out.shape)[0])
    nets["vae"].fit(ShapesWorld().batch(Noise(0), 0, range(64)).pictures)
    texts, tokenizers = [nets["text_encoder"]], [ShapesWorld().tokenizer()]
    return Pipeline(spec, nets["backbone"], nets["vae"], texts, tokenizers)


LCM = {"sampler": "lcm", "steps": 4}


def latents(pipeline: Pipeline, scale: Any, guidance: str = "nasa", **more: Any) -> Tensor:
    z = pipeline.noise(0, [0, 1])
    prompts, negatives = ["a red circle", "a star"], ["red", None]

    def noise(step: int) -> Tensor:
        return Noise(0).normal("sampler", step, [0, 1], tuple(z.shape[1:]))

    return pipeline.latents(prompts, z, negatives, guidance, scale, noise=noise, **more)


@pytest.mark.parametrize("guidance", [*METHODS, "embed-sub", "cfg"])
@pytest.mark.parametrize("recipe", [LCM, {}], ids=["few", "many"])
def test_a_pipeline_takes_one_strength_per_step(recipe: Any, guidance: str) -> None:
    pipeline, steps = tiny(**recipe), {"steps": 4}
    same = latents(pipeline, [0.8] * 4, guidance, **steps)
    torch.testing.assert_close(same, latents(pipeline, 0.8, guidance, **steps))
    found = [
        latents(pipeline, scale, guidance, **steps)
        for scale in (0.8, 0.0, [0.8, 0.8, 0.0, 0.0], (0.0, 0.0, 0.8, 0.8))
    ]
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            assert (a[0] - b[0]).abs().max() > 1e-4


def test_each_step_is_called_at_its_strength() -> None:
    pipeline = tiny(**LCM)
    layers = torch.linspace(0.1, 1.0, len(pipeline.backbone.cross_attentions()))
    seen: list[Conditioning] = []
    pipeline.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    scales: Sequence[float | Tensor] = [0.5, 0.0, layers, 0.25]
    latents(pipeline, scales, "nag")
    assert [type(cond.guidance) for cond in seen] == [NAG] * 4
    values = [strength(cond.guidance) for cond in seen if cond.guidance is not None]
    assert all(a is b for a, b in zip(values, scales, strict=True))
    assert all(cond.kv is seen[0].kv for cond in seen)  # made once for all steps
    seen.clear()
    latents(pipeline, layers)
    assert all(cond.guidance == NASA(layers) for cond in seen) and len(seen) == 4


def test_one_network_call_takes_one_strength() -> None:
    pipeline = tiny(t=999)
    assert torch.equal(latents(pipeline, [0.8]), latents(pipeline, 0.8))
    with pytest.raises(ValueError, match="one per network call: 1, got 2"):
        latents(pipeline, [0.8, 0.7])


@pytest.mark.parametrize("recipe", [{"t": 999}, {}])
def test_cfg_takes_a_kappa_per_picture(recipe: Any) -> None:
    pipeline, prompts = tiny(**recipe), ["a red circle", "a blue star"]
    kappas, z = torch.tensor([0.5, 3.0]), pipeline.noise(0, [0, 1])
    both = pipeline.latents(prompts, z, None, "cfg", kappas, 1)
    for i, kappa in enumerate(kappas.tolist()):
        alone = pipeline.latents(prompts[i : i + 1], z[i : i + 1], None, "cfg", kappa, 1)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, pipeline.latents(prompts, z, None, "cfg", 3.0, 1))


@pytest.mark.parametrize(
    ("recipe", "steps", "calls"),
    [(LCM, None, 4), (LCM, 2, 2), ({"t": 999}, 3, 3), ({}, None, 25), ({}, 6, 6)],
)
@pytest.mark.parametrize("guidance", MODES)
def test_a_wrong_number_of_strengths_is_an_error_before_anything_runs(
    recipe: Any, steps: int | None, calls: int, guidance: str
) -> None:
    pipeline, ran = tiny(**recipe), []
    for net in (pipeline.backbone, pipeline.text_encoders[0]):
        net.register_forward_pre_hook(lambda module, args: ran.append(module))
    for n in (0, calls - 1, calls + 1):
        with pytest.raises(ValueError, match=rf"^scale must be .*: {calls}, got {n}$"):
            latents(pipeline, [0.5] * n, guidance, steps=steps)
    assert ran == []


@pytest.mark.parametrize(
    ("scale", "guidance", "message"),
    [
        ([0.5, float("nan"), 0.5, 0.5], "nasa", "scale must be a finite number, got nan"),
        ([0.5, 0.5, 0.5, float("inf")], "cfg", "scale must be a finite number, got inf"),
        (torch.tensor([1.0, float("inf")]), "nasa", "scale must be a finite number, got tensor"),
        (torch.ones(4), "cfg", r"of one per picture \[2\] under cfg; got \[4\] under cfg"),
        (torch.ones(1), "embed-sub", r"scale may be a tensor \[layers\] under nasa, .*; got \[1\]"),
        (torch.ones(4, 2), "nag", r"scale may be a tensor \[layers\] under .*; got \[4, 2\] under"),
        (torch.ones(2), "vsf", "a strength per layer needs 7 values, got 2"),
    ],
)
def test_impossible_strengths_are_refused(scale: Any, guidance: str, message: str) -> None:
    pipeline = tiny(**LCM)
    assert len(pipeline.backbone.cross_attentions()) == 7
    with pytest.raises(ValueError, match=message):
        latents(pipeline, scale, guidance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(**LCM).save(tmp_path_factory.mktemp("models") / "model")


def command(folder: Path, out: Path, *more: str) -> int:
    words = [str(folder), "a red circle", "--negative", "red", "--out", str(out), *more]
    return generate.main(words)


def test_the_command_takes_a_strength_per_step(folder: Path, tmp_path: Path) -> None:
    made = {}
    for scale in ("0.8", "0.8,0.8,0.8,0.8", "0.8,0.8,0,0"):
        assert command(folder, tmp_path / "a.png", "--scale", scale) == 0
        made[scale] = (tmp_path / "a.png").read_bytes()
    assert made["0.8"] == made["0.8,0.8,0.8,0.8"] != made["0.8,0.8,0,0"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--scale", "0.8,0.7"], ("scale", "network call: 4", "got 2")),
        (["--scale", "0.8,0.7", "--steps", "3"], ("scale", "network call: 3", "got 2")),
        (["--scale", "0.5,nan,0,0"], ("scale", "finite", "nan")),
        (["--scale", "0.5,,0,0"], ("--scale", "a number, or one per step", "'0.5,,0,0'")),
        (["--scale", "strong"], ("--scale", "a number, or one per step", "'strong'")),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: Any
) -> None:
    def status() -> int | str | None:
        try:
            return command(folder, tmp_path / "a.png", *more)
        except SystemExit as stop:
            return stop.code

    assert status() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


# --- the table of strengths ------------------------------------------------------------------


def test_methods_and_presets_fit_together() -> None:
    assert list(METHODS) == list(MODES[: len(METHODS)])
    assert STRENGTHS == {
        "nasa": 0.5, "nasa-centred": 0.5, "nag": 2.0, "vsf": 3.0,
        "embed-sub": 1.0, "cfg": 2.0, "none": 0.0,
    }  # fmt: skip
    for name, found in PRESETS.items():
        assert "nasa" in found
        for method, guidance in found.items():
            usual = METHODS[method]
            assert type(guidance) is type(usual), (name, method)
            assert guidance.needs_null == usual.needs_null, (name, method)


def test_every_recipe_of_the_table_is_in_the_zoo() -> None:
    families = {name.split("-")[0] for name in zoo.PRESETS}
    assert all(name in zoo.PRESETS or name in families for name in PRESETS)
