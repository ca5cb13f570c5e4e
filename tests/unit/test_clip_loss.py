"""The clamped CLIP loss: its gradient at x0, its clamp, its checkpoints, its place in a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snoopi import folders, zoo
from snoopi.methods.clip_loss import clip_cosine, clip_loss, text_embeddings
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.clip_vision import CLIPVisionConfig
from snoopi.models.vae import TAESD, VAE, TAESDConfig, VAEConfig
from snoopi.noise import Noise
from snoopi.worlds.shapes import ShapesWorld
from snoopi.zoo import ToolSpec
from tests.unit.test_distiller import distiller, equal, weights

NOISE = Noise(3)
TOKENIZER = ShapesWorld().tokenizer()
IMAGE = CLIPVisionConfig(
    width=16, mlp_width=32, layers=1, heads=2, patch=8, image_size=16, projection=12
)
TEXT = CLIPTextConfig(width=16, mlp_width=24, layers=1, heads=2, projection=12).for_words(
    TOKENIZER.tokenizer.get_vocab_size(), TOKENIZER.max_length
)
CLIP = ToolSpec("tiny-clip", {"image_encoder": IMAGE, "text_encoder": TEXT})
TINY_VAE = VAEConfig(channels=(8, 8), resnets=1, norm_groups=4)
TINY_TAESD = TAESDConfig(channels=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
PROMPTS = ["a red circle", "blue", "a small star"]


def networks(kind: str) -> tuple[Any, Any, Any]:
    """Decoder, image tower and text encoder, in float64 and frozen."""
    torch.manual_seed(0)
    decoder: nn.Module = VAE(TINY_VAE) if kind == "vae" else TAESD(TINY_TAESD)
    parts = (zoo.fresh(CLIP, part, 0) for part in CLIP.parts())
    return tuple(net.double().eval().requires_grad_(False) for net in (decoder, *parts))  # type: ignore[return-value]


def latents() -> Tensor:
    return 0.2 * NOISE.normal("x0", 0, range(3), (4, 6, 6)).double()  # pictures of 12 pixels


@pytest.mark.parametrize("kind", ["vae", "taesd"])
def test_the_gradient_is_not_zero_and_equals_finite_differences(kind: str) -> None:
    decoder, tower, encoder = networks(kind)
    x0, texts = latents(), text_embeddings(encoder, TOKENIZER, PROMPTS)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3, dtype=torch.float64))
    found = clip_loss(x0, texts, 1.0, decoder, tower)  # tau = 1: nothing is clamped
    assert found.loss.shape == (3,) and (found.loss > 0).all()
    assert (found.gradient.flatten(1).norm(dim=1) > 1e-4).all()
    torch.testing.assert_close(found.loss, 1 - clip_cosine(x0, texts, decoder, tower))
    for seed in range(3):
        way = NOISE.normal("way", seed, range(3), (4, 6, 6)).double()
        h = 1e-5
        high, low = (1 - clip_cosine(x0 + s * h * way, texts, decoder, tower) for s in (1, -1))
        slope = (found.gradient * way).flatten(1).sum(1)
        torch.testing.assert_close(slope, (high - low) / (2 * h), rtol=1e-5, atol=1e-9)


def test_the_tower_reads_pictures_as_clip_does() -> None:
    """Latents whose picture is black, white or grey: CLIP's mean and deviation by hand."""
    _, tower, encoder = networks("vae")

    class Grey(VAE):
        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :1, :1, :1].expand(-1, 3, 16, 16)

    values = torch.tensor([-1.0, 1.0, 0.2], dtype=torch.float64)
    texts = text_embeddings(encoder, TOKENIZER, PROMPTS)
    x0 = values[:, None, None, None].expand(3, 4, 6, 6)
    got = clip_cosine(x0, texts, Grey(TINY_VAE), tower)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    share = (values[:, None] + 1) / 2  # [b 1] in [0, 1]
    seen = ((share - mean) / std)[:, :, None, None].expand(3, 3, 16, 16)
    want = torch.nn.functional.cosine_similarity(tower(seen).pooled, texts, dim=1)
    torch.testing.assert_close(got, want)


def test_above_tau_nothing_is_asked_for() -> None:
    decoder, tower, encoder = networks("vae")
    x0, texts = latents(), text_embeddings(encoder, TOKENIZER, PROMPTS)
    cosine = clip_cosine(x0, texts, decoder, tower).detach()
    order = cosine.argsort()
    tau = float((cosine[order[0]] + cosine[order[1]]) / 2)  # one picture below it, two above
    found = clip_loss(x0, texts, tau, decoder, tower)
    pulled = found.gradient.flatten(1).norm(dim=1) > 0
    assert pulled[order[0]] and not pulled[order[1:]].any()
    torch.testing.assert_close(found.loss, (tau - cosine).clamp(min=0))
    torch.testing.assert_close(found.cosine, cosine)


def test_each_picture_is_held_to_its_own_prompt() -> None:
    decoder, tower, encoder = networks("taesd")
    texts = text_embeddings(encoder, TOKENIZER, PROMPTS)
    whole = clip_loss(latents(), texts, 1.0, decoder, tower)
    alone = clip_loss(latents()[1:2], texts[1:2], 1.0, decoder, tower)
    torch.testing.assert_close(whole.gradient[1:2], alone.gradient)
    swapped = clip_loss(latents(), texts.flip(0), 1.0, decoder, tower)
    assert (whole.cosine - swapped.cosine).abs()[[0, 2]].min() > 1e-6


def test_the_decoder_keeps_the_inputs_of_its_blocks_alone() -> None:
    """Its backward pass runs the blocks again, and it is left as it was."""
    decoder, tower, encoder = networks("vae")
    texts = text_embeddings(encoder, TOKENIZER, PROMPTS)
    x = latents().requires_grad_()
    (want,) = torch.autograd.grad((1 - clip_cosine(x, texts, decoder, tower)).sum(), x)
    calls, kept = 0, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.numel()
        return value

    hook = decoder.decoder.mid_block.resnets[0].register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        got = clip_loss(x, texts, 1.0, decoder, tower)
    torch.testing.assert_close(got.gradient, want)
    assert calls == 2 * len(PROMPTS)
    hook.remove()
    assert not any("forward" in vars(block) for block in decoder.blocks())
    few, kept = kept, 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        clip_cosine(x, texts, decoder, tower)
    assert few < kept


# --- the trainer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders clip and taesd; the latter for the debug preset's latents of 16 channels."""
    root = tmp_path_factory.mktemp("tools")
    nets = {part: zoo.fresh(CLIP, part, 0) for part in CLIP.parts()}
    folders.save_tools(root / "clip", CLIP, nets, TOKENIZER)
    spec = ToolSpec("tiny-taesd", {"vae": dataclasses.replace(TINY_TAESD, latent_channels=16)})
    folders.save_tools(root / "taesd", spec, {"vae": zoo.fresh(spec, "vae", 0)})
    return root


@pytest.mark.parametrize("decoder", ["vae", "taesd"])
def test_the_loss_joins_the_students_update(decoder: str, tools: Path) -> None:
    words = [f"clip_loss.decoder={decoder}", f"clip_loss.model={tools / 'clip'}"]
    words += [f"clip_loss.taesd={tools / 'taesd'}", "clip_loss.tau=1", "optim.student.clip=0"]
    plain, off = distiller(), distiller(*words)
    rows = plain.step(0), off.step(0)
    assert rows[0] == rows[1] and equal(weights(plain), weights(off))  # weight = 0 is off
    on = distiller(*words, "clip_loss.weight=100")
    row = on.step(0)
    assert row["grad_x0_clip"] > 0 and row["loss_clip"] > 0
    # B = 0 and one kappa: both teachers agree, and the CLIP loss is all there is at the first step.
    assert row["grad_x0_vsd"] == 0 and row["clip_share"] == 1 and row["loss_vsd"] == 0
    assert row["grad_norm_student"] > 0 and rows[0]["grad_norm_student"] == 0
    row, last = on.step(1), on.step(3)
    assert 0 < row["clip_share"] < 1 and row["grad_x0_vsd"] > 0
    assert last["grad_x0_clip"] > 0
    assert (row["clip_weight"], last["clip_weight"]) == (75, 25)  # of 100, at steps 1 and 3 of 4


def test_the_student_follows_the_sum_of_both_gradients(tools: Path) -> None:
    """By the chain rule once more: the mean over the batch of VSD's surrogate and weight * loss."""
    words = [f"clip_loss.model={tools / 'clip'}", "clip_loss.tau=1", "clip_loss.weight=5"]
    trainer = distiller(*words, "clip_loss.schedule=constant", "kappa.teacher=[3, 3]")
    assert trainer.clip is not None
    part = trainer._part(0, range(2))
    x0 = trainer._generate(0, part)
    gradient, _ = trainer._gradient(0, part, x0.detach())
    texts = text_embeddings(trainer.clip.clip.text_encoder, TOKENIZER, part.prompts)
    tower = trainer.clip.clip.image_encoder
    cosine = clip_cosine(x0, texts, trainer.clip.decoder, tower)
    total = (x0 * gradient).flatten(1).sum(1).mean() + 5 * (1 - cosine).mean()
    parameters = trainer.student_optimizer.parameters
    want = torch.stack([g.norm() for g in torch.autograd.grad(total, parameters)]).norm()
    row = trainer.step(0)
    assert row["grad_norm_student"] == pytest.approx(float(want), rel=1e-4)
    assert row["grad_x0_vsd"] > 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["clip_loss.weight=1"], ["clip_loss.model: expected a folder of tools with a CLIP"]),
        (
            ["clip_loss.weight=1", "clip_loss.model=x", "clip_loss.decoder=taesd"],
            ["clip_loss.taesd: expected a folder of tools with a TAESD"],
        ),
        (["clip_loss.weight=1", "clip_loss.model=nowhere"], ["clip_loss.model: nowhere is not"]),
        (["clip_loss.weight=1", "clip_loss.model=TAESD"], ["clip_loss.model:", "not a CLIP"]),
        (
            [
                "clip_loss.weight=1",
                "clip_loss.model=CLIP",
                "clip_loss.decoder=taesd",
                "clip_loss.taesd=CLIP",
            ],
            ["clip_loss.taesd:", "no TAESD for latents of 16 channels"],
        ),
    ],
)
def test_a_mistake_names_the_key(words: list[str], parts: list[str], tools: Path) -> None:
    words = [w.replace("CLIP", str(tools / "clip")) for w in words]
    words = [w.replace("TAESD", str(tools / "taesd")) for w in words]
    with pytest.raises(ValueError) as raised:
        distiller(*words)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)
