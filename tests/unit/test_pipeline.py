"""Model folders: what is written is what is read, and nothing broken is taken."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import snoopi
from snoopi import folders, memory, zoo
from snoopi.conditioning import Conditioning
from snoopi.folders import SHIPPED, shipped, shipped_or_path
from snoopi.models.vae import PatchVAE
from snoopi.noise import Noise
from snoopi.pipeline import Pipeline
from snoopi.worlds.shapes import ShapesWorld


def tiny() -> Pipeline:
    """A whole untrained pipeline of the debug preset."""
    spec = dataclasses.replace(zoo.preset("debug"), one_step=zoo.OneStep())
    tokenizer = ShapesWorld().tokenizer()
    nets = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
    out = nets["backbone"].conv_out.weight
    out.data.copy_(0.1 * Noise(1).normal("out", 0, [0], out.shape)[0])
    assert isinstance(nets["vae"], PatchVAE)
    nets["vae"].fit(ShapesWorld().batch(Noise(0), 0, range(64)).pictures)
    return Pipeline(
        spec, nets["backbone"], nets["vae"], [nets["text_encoder"]], [tokenizer], {"a": 1}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny().save(tmp_path / "model")


def test_a_model_folder_round_trip_is_exact(folder: Path) -> None:
    before, after = tiny(), snoopi.load(folder)
    assert after.spec == before.spec and after.provenance == {"a": 1}
    for name, tensor in before.backbone.state_dict().items():
        assert torch.equal(tensor, after.backbone.state_dict()[name])
    assert before("a red circle")[0].tobytes() == after("a red circle")[0].tobytes()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_saving_over_a_folder_replaces_it_whole(folder: Path) -> None:
    (folder / "stray").write_text("x")
    tiny().save(folder)
    assert not (folder / "stray").exists() and snoopi.load(folder).vae is not None


def test_fp16_is_stored_and_read_as_fp32_on_the_cpu(tmp_path: Path) -> None:
    before = tiny()
    folder = before.save(tmp_path / "model", torch.float16)
    stored = load_file(folder / "backbone.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    after = snoopi.load(folder).backbone
    for name, tensor in before.backbone.state_dict().items():
        assert after.state_dict()[name].dtype == torch.float32
        assert torch.equal(tensor.half().float(), after.state_dict()[name])
    assert snoopi.load(folder, dtype=torch.float16).backbone.conv_in.weight.dtype == torch.float16


def test_fp16_does_not_overflow_silently(tmp_path: Path) -> None:
    pipeline = tiny()
    pipeline.backbone.conv_in.bias.data[0] = 1e5
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        pipeline.save(tmp_path / "model", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_folder_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error or a Ctrl-C while it is written, and between the two renames at the end."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: x (os error 28)")

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny().save(folder)
    assert len(calls) == 3
    monkeypatch.undo()
    monkeypatch.setattr(folders, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model'"):
        tiny().save(folder)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_dtype_and_optimize(folder: Path) -> None:
    half = snoopi.load(folder, dtype=torch.bfloat16, optimize="auto")
    assert half.backbone.conv_in.weight.dtype == torch.bfloat16
    assert half("a red circle", steps=2)[0].size == (32, 32)
    with pytest.raises(ValueError, match="optimize"):
        snoopi.load(folder, optimize="fast")


def test_an_optimized_pipeline_is_frozen_and_restored_by_a_call(folder: Path) -> None:
    plain, fast = snoopi.load(folder), snoopi.load(folder, optimize="auto")
    nets = [fast.backbone, fast.vae, *fast.text_encoders]
    assert not any(p.requires_grad for net in nets for p in net.parameters())
    z = fast.noise(0, [0, 1])
    options = {"negatives": ["red", "blue"], "steps": 1}
    want = plain.pictures(["a star", "a circle"], z, **options)
    got = fast.pictures(["a star", "a circle"], z, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert fast.restore() is fast
    assert torch.equal(fast.pictures(["a star", "a circle"], z, **options), want)
    for name, tensor in plain.backbone.state_dict().items():
        assert torch.equal(tensor, fast.backbone.state_dict()[name])


def test_text_encoders_leave_memory_after_the_first_texts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[set[int]] = []
    monkeypatch.setattr(memory, "drop_read", lambda weights: dropped.append({*map(id, weights)}))
    net = snoopi.load(folder, optimize="auto")
    first = np.array(net("a red circle", "square")[0])
    assert dropped == [{id(p) for p in net.text_encoders[0].parameters()}]
    net.forget()
    assert (np.array(net("a red circle", "square")[0]) == first).all() and len(dropped) == 1
    net.restore()
    net("a red circle")
    assert len(dropped) == 1


def test_an_optimized_pipeline_moves_and_saves_as_a_plain_one(folder: Path, tmp_path: Path) -> None:
    fast = snoopi.load(folder, optimize="auto")
    z, args = fast.noise(0, [0]), (["a star"], ["red"], "nasa", 1.0, 1)
    saved = load_file(fast.save(tmp_path / "again") / "backbone.safetensors")
    stored = load_file(folder / "backbone.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in saved.items())
    moved = fast.to("cpu", torch.float64).latents(args[0], z, *args[1:])
    plain = snoopi.load(folder).to("cpu", torch.float64).latents(args[0], z, *args[1:])
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-5)


def test_a_picture_in_tiles(folder: Path) -> None:
    """Patches do not see one another, so tiles change nothing but rounding."""
    pipeline = snoopi.load(folder)
    z = pipeline.noise(0, [0], (64, 40))  # latents of 16 x 10
    whole = pipeline.pictures(["a star"], z, steps=1)
    torch.testing.assert_close(pipeline.pictures(["a star"], z, steps=1, tile=6), whole)
    assert torch.equal(pipeline.pictures(["a star"], z, steps=1, tile=16), whole)
    (picture,) = pipeline("a star", steps=1, size=(64, 40), tile=6)
    assert picture.size == (40, 64)


def other_vae(tmp_path: Path, **changes: int) -> Path:
    """A folder with a VAE alone, of weights that give another picture."""
    spec = dataclasses.replace(
        tiny().spec, vae=dataclasses.replace(zoo.preset("debug").vae, **changes)
    )
    vae = zoo.fresh(spec, "vae", 0)
    for i, p in enumerate(vae.parameters()):
        p.data = Noise(2).normal("vae", 0, [i], p.shape)[0]
    return Pipeline(spec, vae=vae).save(tmp_path / "vae")


def test_the_vae_of_another_folder(folder: Path, tmp_path: Path) -> None:
    other = other_vae(tmp_path)
    (folder / "vae.safetensors").unlink()
    pipeline = snoopi.load(folder, vae=other)
    assert torch.equal(pipeline.vae.to_patch, snoopi.load(other).vae.to_patch)
    assert pipeline("a star", steps=1)[0].size == (32, 32)
    again = snoopi.load(pipeline.save(tmp_path / "whole"))
    assert torch.equal(again.vae.to_patch, pipeline.vae.to_patch)


def test_taesd_in_the_place_of_a_vae(tmp_path: Path) -> None:
    """`--vae FOLDER` with a folder of tools: its latents are those of Stable Diffusion."""
    spec = dataclasses.replace(zoo.preset("shapes"), vae=zoo.preset("sd15").vae)
    folder = Pipeline(spec).save(tmp_path / "model")
    tool = zoo.preset("taesd")
    taesd = zoo.fresh(tool, "vae", 0)
    folders.save_tools(tmp_path / "taesd", tool, {"vae": taesd})
    pipeline = snoopi.load(folder, vae=tmp_path / "taesd")
    assert type(pipeline.vae) is type(taesd) and pipeline.spec.vae == tool.networks["vae"]
    assert torch.equal(pipeline.vae.decoder.layers[0].weight, taesd.decoder.layers[0].weight)


def test_a_vae_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit debug: expected latents of 16 channels"):
        snoopi.load(folder, vae=other_vae(tmp_path, latent_channels=8))
    with pytest.raises(ValueError, match=r"nowhere is not a model folder: it does not exist"):
        snoopi.load(folder, vae="nowhere")
    (tmp_path / "vae" / "vae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vae holds no VAE: expected vae\.safetensors"):
        snoopi.load(folder, vae=tmp_path / "vae")
    (tmp_path / "vgg").mkdir()
    folders.write_spec(tmp_path / "vgg", zoo.preset("vgg16"), {})
    with pytest.raises(ValueError, match="holds no VAE"):
        snoopi.load(folder, vae=tmp_path / "vgg")


def test_a_partial_folder_says_what_is_missing(folder: Path) -> None:
    (folder / "vae.safetensors").unlink()
    pipeline = snoopi.load(folder)
    assert pipeline.vae is None and pipeline.backbone is not None
    with pytest.raises(ValueError, match="lacks vae"):
        pipeline("a red circle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "not a readable safetensors"),
        ("lack", "lacks conv_in.weight"),
        ("extra", "unexpected foreign"),
        ("shape", "conv_in.weight must be"),
        ("json", "is not JSON"),
        ("key", "the nearest is 'latent_size'"),
        ("type", "latent_size must be int"),
        ("gone", "not a model folder"),
        ("format", "not of format"),
    ],
)
def test_a_broken_folder_is_refused(folder: Path, damage: str, message: str) -> None:
    weights, spec = folder / "backbone.safetensors", folder / "snoopi.json"
    state, data = load_file(weights), json.loads(spec.read_text())
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "lack":
        del state["conv_in.weight"]
    elif damage == "extra":
        state["foreign"] = torch.zeros(1)
    elif damage == "shape":
        state["conv_in.weight"] = torch.zeros(1, 2)
    elif damage == "key":
        data["model"]["latent_sise"] = 8
    elif damage == "type":
        data["model"]["latent_size"] = "8"
    elif damage == "format":
        data["format"] = 99
    if damage in ("lack", "extra", "shape"):
        save_file(state, weights)
    spec.write_text("{" if damage == "json" else json.dumps(data))
    if damage == "gone":
        spec.unlink()
    with pytest.raises(ValueError, match=message):
        snoopi.load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": (), "negative": "a", "num": 2}, "at least one prompt, got an empty list"),
        ({"prompt": "a", "num": 0}, "num"),
        ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
        ({"prompt": "a", "seed": 2**63}, "seed must be a whole number from 0"),
        ({"prompt": "a", "scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"prompt": "a", "guidance": "cfg", "scale": float("inf")}, "finite number, got inf"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "tile": 1}, "tile must be at least 2 latent pixels, got 1"),
        ({"prompt": "a", "size": (30, 32)}, "multiples of 4"),
        ({"prompt": "a", "guidance": "nassa"}, "guidance must be one of"),
        ({"prompt": ["a", "b"], "negative": ["c"]}, "one per prompt"),
    ],
)
def test_a_call_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**arguments)


def test_mixed_negatives_leave_rows_without_one_alone() -> None:
    pipeline = tiny()
    z = pipeline.noise(0, [0, 1, 2])
    prompts = ["a red circle", "a star", "a small square"]
    plain = pipeline.latents(prompts, z, guidance="none", steps=1)
    for guidance in ("nasa", "nasa-centred", "nag", "vsf", "embed-sub"):
        mixed = pipeline.latents(prompts, z, [None, "red", ""], guidance, 0.8, steps=1)
        torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
        assert (mixed[1] - plain[1]).abs().max() > 1e-3, guidance


def test_cfg_follows_equation_5() -> None:
    """kappa 1 is the plain picture; kappa 0 the negative's; an empty negative is the null text."""
    pipeline = tiny()
    z = pipeline.noise(0, [0])
    plain = pipeline.latents(["a star"], z, guidance="none", steps=1)
    negative = pipeline.latents(["red"], z, guidance="none", steps=1)
    torch.testing.assert_close(pipeline.latents(["a star"], z, ["red"], "cfg", 1.0, 1), plain)
    out = pipeline.latents(["a star"], z, ["red"], "cfg", 0.0, 1)
    torch.testing.assert_close(out, negative, rtol=1e-4, atol=1e-5)
    null = pipeline.latents([""], z, guidance="none", steps=1)
    out = pipeline.latents(["a star"], z, [""], "cfg", 0.0, 1)
    torch.testing.assert_close(out, null, rtol=1e-4, atol=1e-5)


def test_a_multi_step_model_runs_under_its_own_kappa() -> None:
    pipeline = tiny()
    pipeline.spec = dataclasses.replace(pipeline.spec, one_step=None, kappa=3.0)
    z = pipeline.noise(0, [0])
    default = pipeline.latents(["a star"], z, steps=2)
    assert torch.equal(default, pipeline.latents(["a star"], z, guidance="cfg", steps=2))
    plain = pipeline.latents(["a star"], z, guidance="none", steps=2)
    assert (default - plain).abs().max() > 1e-3
    steered = pipeline.latents(["a star"], z, ["red"], "nasa", 0.5, steps=2)
    assert (steered - default).abs().max() > 1e-3


def test_the_shipped_models_load() -> None:
    assert "shapes_vae" in shipped()
    vae = snoopi.load(shipped_or_path("shapes_vae")).vae
    pictures = ShapesWorld().batch(Noise(3), 0, range(64)).pictures
    with torch.no_grad():
        latents = vae.encode(pictures)
        error = (vae.decode(latents) - pictures).square().mean()
    assert abs(latents.std() - 1) < 0.1
    assert 10 * torch.log10(4 / error) > 31  # dB; 32.5 on the recipe's own held-out pictures


# --- a text encoder with masks, and a transformer that reads them ------------------------------


def tiny_dit() -> Pipeline:
    """A whole untrained pipeline of the shapes_dit preset, called at t = 400."""
    spec = zoo.preset("shapes_dit")
    tokenizer = ShapesWorld().tokenizer()
    words = tokenizer.tokenizer.get_vocab_size()
    text = spec.text[0]
    encoder = text.config.for_words(words, tokenizer.max_length)
    text = dataclasses.replace(text, config=encoder)
    spec = dataclasses.replace(spec, text=(text,), one_step=zoo.OneStep(400))
    nets = {part: zoo.fresh(spec, part, 0).eval() for part in spec.parts()}
    for name, p in nets["backbone"].named_parameters():
        if name.startswith("proj_out") or "attn2.to_out" in name:
            p.data.copy_(0.1 * Noise(1).normal(name, 0, [0], p.shape)[0])
    return Pipeline(spec, nets["backbone"].eval(), nets["vae"], [nets["text_encoder"]], [tokenizer])


def test_masks_reach_encoder_and_conditioning() -> None:
    pipeline = tiny_dit()
    seen: list[torch.Tensor] = []
    pipeline.text_encoders[0].register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    cond = pipeline.encode(["a red circle", ""])
    assert cond.mask is not None and cond.mask.sum(1).tolist() == [5, 2]  # bos and eos, too
    assert torch.equal(seen[0], cond.mask) and cond.size_ids is None
    null = pipeline.null()
    assert null.mask is not None and null.mask.sum(1).tolist() == [2]
    torch.testing.assert_close(null.tokens[0], cond.tokens[1])
    assert tiny().encode(["a red circle"]).mask is None  # CLIP reads its padding


def test_a_dit_folder_round_trip_is_exact(tmp_path: Path) -> None:
    before, after = tiny_dit(), snoopi.load(tiny_dit().save(tmp_path / "model"))
    assert after.spec == before.spec
    z = before.noise(0, [0])
    for guidance in ("nasa", "nasa-centred", "nag", "vsf", "embed-sub", "cfg"):
        args = (["a red circle"], z, ["striped"], guidance, 1.0)
        assert torch.equal(after.latents(*args), before.latents(*args))


def test_a_student_at_t_400_is_called_on_unscaled_noise() -> None:
    pipeline = tiny_dit()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    pipeline.backbone.register_forward_pre_hook(lambda m, args: calls.append(args[:2]))
    z = pipeline.noise(0, [0])
    x0 = pipeline.latents(["a red circle"], z, guidance="none")
    (x, t), abar = calls[0], float(pipeline.spec.schedule.alpha_bar()[400])
    assert torch.equal(x, z) and t.tolist() == [400] and abar == pytest.approx(0.1935720, rel=1e-4)
    with torch.no_grad():
        eps = pipeline.backbone(z, t, pipeline.encode(["a red circle"]))
    torch.testing.assert_close(x0, (z - (1 - abar) ** 0.5 * eps) / abar**0.5)


def test_mixed_negatives_of_masked_texts_leave_rows_without_one_alone() -> None:
    pipeline = tiny_dit()
    z, prompts = pipeline.noise(0, [0, 1, 2]), ["a red circle", "a star", "a small square"]
    plain = pipeline.latents(prompts, z, guidance="none")
    for guidance in ("nasa", "nasa-centred", "nag", "vsf", "embed-sub"):
        mixed = pipeline.latents(prompts, z, [None, "red", ""], guidance, 0.8)
        torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
        assert (mixed[1] - plain[1]).abs().max() > 1e-3, guidance


def test_embedding_subtraction_leaves_the_padding_of_the_negative_out() -> None:
    pipeline = tiny_dit()
    cond, negative = pipeline.encode(["a small red circle"]), pipeline.encode(["striped"])
    got = pipeline.condition(["a small red circle"], ["striped"], "embed-sub", 0.5).tokens
    assert negative.mask is not None and negative.mask[0].tolist()[:4] == [True] * 3 + [False]
    torch.testing.assert_close(got[:, :3], cond.tokens[:, :3] - 0.5 * negative.tokens[:, :3])
    assert torch.equal(got[:, 3:], cond.tokens[:, 3:])


def test_pixart_1024_is_told_its_size() -> None:
    spec = dataclasses.replace(
        zoo.preset("shapes_dit"), backbone=zoo.preset("pixart-1024").backbone, latent_size=128
    )
    sizes = Pipeline(spec)._sized(Conditioning(torch.zeros(2, 3, 4)), (128, 64)).size_ids
    side = 128.0 * spec.vae.factor
    assert sizes is not None and sizes.is_floating_point()
    assert sizes.tolist() == [[side, side / 2, 2.0]] * 2


def test_parts_of_different_types_draw_together() -> None:
    """A text encoder in bf16 beside an fp32 backbone, as PixArt's T5 is stored."""
    pipeline = snoopi.load(SHIPPED / "shapes_teacher")
    pipeline.text_encoders[0].bfloat16()
    assert pipeline.encode(["a red star"]).tokens.dtype == torch.float32
    for guidance in ("nasa", "embed-sub", "cfg"):
        (picture,) = pipeline("a red star", "blue", guidance=guidance, steps=1)
        assert picture.size == (32, 32)
