"""Conversion of every architecture from every layout: the converted networks equal the oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import snoopi
from snoopi.conditioning import Conditioning
from snoopi.folders import read_spec
from snoopi.models.unet import UNetConfig
from snoopi.pipeline import Pipeline
from snoopi.zoo import preset, text_part
from tests.parity import matrix, oracle, test_unet, tiny
from tests.parity.oracle import randn
from weights_convert import detect, tables
from weights_convert.convert import convert, targets
from weights_convert.files import Entry, Weights
from weights_convert.rules import Layout, plan

pytestmark = pytest.mark.parity


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {k: Entry(tuple(v.shape), v.dtype, v.detach) for k, v in tensors.items()}


def backward(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors as a file of another layout has them."""
    ours = {k: tuple(v.shape) for k, v in tensors.items()}
    # The file's shapes are known only from the layout: plan against what it would hold.
    from weights_convert.rules import names, source_shape

    file = {
        name: Entry(source_shape(ours[k], rule), torch.float32, tensors[k].detach)
        for k, (name, rule) in names(ours, layout).items()
    }
    how, trouble = plan(ours, layout, file)
    assert not trouble
    return {k: e.read() for k, e in how.backward(entries(tensors)).items()}


# --- comparing ------------------------------------------------------------------------------------


def compare(architecture: str, layout: str, pipeline: Pipeline, nets: dict[str, nn.Module]) -> None:
    """Every converted network beside its oracle, on random input."""
    for part, theirs in nets.items():
        if part in ("unet", "transformer"):
            got, want = backbone_outputs(pipeline.backbone, theirs)
        elif part == "vae":
            got, want = vae_outputs(pipeline.vae, theirs)
        else:
            index = 0 if part == "text_encoder" else 1
            got, want = text_outputs(pipeline.text_encoders[index], theirs)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            oracle.close(f"{architecture} {layout} {part} output {i}", a, b)
            matrix.record(architecture, layout, max(oracle.errors(a, b)))


@torch.no_grad()
def backbone_outputs(ours: Any, theirs: Any) -> tuple[list[Tensor], list[Tensor]]:
    t = torch.tensor([431, 999])
    x = randn(2, 4, 16, 16, seed=1)
    if isinstance(ours.config, UNetConfig):
        cond = test_unet.text(ours.config, 2)
        return [ours(x, t, cond)], [test_unet.their_prediction(theirs, x, t, cond)]
    size = torch.tensor([[16.0, 24.0, 2 / 3]] * 2) if ours.config.size_embed else None
    cond = Conditioning(randn(2, 7, ours.config.text_width, seed=2), size_ids=size)
    more: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if size is not None:
        more = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
    want = theirs(x, cond.tokens, t, added_cond_kwargs=more, return_dict=False)[0]
    return [ours(x, t, cond)], [want[:, :4]]


@torch.no_grad()
def vae_outputs(ours: Any, theirs: Any) -> tuple[list[Tensor], list[Tensor]]:
    x, z = randn(1, 3, 32, 32, seed=3).clamp(-1, 1), randn(1, 4, 8, 8, seed=4)
    factor = theirs.config.scaling_factor
    want = [theirs.encode(x).latent_dist.mean * factor, theirs.decode(z / factor).sample]
    return [ours.encode(x), ours.decode(z)], want


@torch.no_grad()
def text_outputs(ours: Any, theirs: Any) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, ours.config.vocabulary - 2, (2, 12), generator=generator)
    if ours.config.masked:
        mask = torch.ones_like(ids, dtype=torch.bool)
        return [ours(ids, mask).last], [theirs(ids, attention_mask=mask.long())[0]]
    ids[:, 9:] = ours.config.eos_id
    out, want = ours(ids), theirs(ids, output_hidden_states=True)
    got, expected = [out.last, out.penultimate], [want.last_hidden_state, want.hidden_states[-2]]
    if ours.config.projection:
        got, expected = [*got, out.pooled], [*expected, want.text_embeds]
    return got, expected


# --- diffusers folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "fp16", "sharded", "bin"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_diffusers_folder(name: str, layout: str, tmp_path: Path) -> None:
    nets = tiny.components(name)
    source = tiny.save_folder(name, nets, tmp_path / "source", layout)
    if layout == "fp16":
        for net in nets.values():  # parameters alone: positions are computed, not stored
            net.load_state_dict({k: v.half() for k, v in net.named_parameters()}, strict=False)
    report = convert(source, tmp_path / "model", check=True)
    pipeline = snoopi.load(tmp_path / "model")
    assert [part.tensors for part in report.parts] == [
        len(pipeline._networks()[part.part].state_dict()) for part in report.parts
    ]
    spec, provenance = read_spec(tmp_path / "model")
    assert spec.schedule == preset("sd15" if name == "sdxl" else name).schedule
    assert len(provenance["files"]) == len(nets) * (3 if layout == "sharded" else 1)
    pads = {"sd15": [49407], "sdxl": [49407, 0], "sd21": [0], "sd21-v": [0]}
    assert [t.pad_id for t in pipeline.tokenizers] == pads.get(name, [0])
    compare(name, layout, pipeline, nets)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart-512"])
def test_parts_of_a_model(name: str, tmp_path: Path) -> None:
    """A component's folder, and a bare file, give a model folder with that part alone."""
    nets = tiny.components(name)
    tiny.save_folder(name, nets, tmp_path / "source", "safetensors")
    for part, net in nets.items():
        convert(tmp_path / "source" / part, tmp_path / part)
        pipeline = snoopi.load(tmp_path / part)
        have = [k for k, v in pipeline._networks().items() if v is not None]
        ours = "backbone" if part in ("unet", "transformer") else part
        if part.startswith("text"):
            assert len(have) == 1 and have[0].startswith("text_encoder")
            index = [e is not None for e in pipeline.text_encoders].index(True)
            got, want = text_outputs(pipeline.text_encoders[index], net)
        else:
            assert have == [ours]
            outputs = vae_outputs if part == "vae" else backbone_outputs
            got, want = outputs(getattr(pipeline, ours), net)
        for a, b in zip(got, want, strict=True):
            oracle.close(f"{name} {part} alone", a, b)
            matrix.record(name, "component", max(oracle.errors(a, b)))


def spec_file(name: str, folder: Path) -> Path:
    """A snoopi.json with the tiny model's sizes: a bare file does not say its heads."""
    tiny.save_folder(name, tiny.components(name), folder / "for_spec", "safetensors")
    convert(folder / "for_spec", folder / "spec")
    return folder / "spec" / "snoopi.json"


def test_old_attention_names_of_the_vae(tmp_path: Path) -> None:
    nets = tiny.components("sd15")
    source = tiny.save_folder("sd15", nets, tmp_path / "source", "safetensors")
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in load_file(path).items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        tensors[key] = value
    assert sum("query" in key for key in tensors) == 4
    save_file(tensors, path)
    text = source / "text_encoder" / "model.safetensors"
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(text) | more, text)
    convert(source, tmp_path / "model", check=True)
    compare("sd15", "old names", snoopi.load(tmp_path / "model"), nets)


def test_clip_without_its_prefix(tmp_path: Path) -> None:
    nets = tiny.components("sd15")
    source = tiny.save_folder("sd15", nets, tmp_path / "source", "safetensors")
    text = source / "text_encoder" / "model.safetensors"
    save_file({k.removeprefix("text_model."): v for k, v in load_file(text).items()}, text)
    convert(source, tmp_path / "model")
    compare("sd15", "no prefix", snoopi.load(tmp_path / "model"), nets)


# --- single files ---------------------------------------------------------------------------------


def openclip_state(net: Any, extra_layer: bool) -> dict[str, Tensor]:
    """OpenCLIP's names, written down apart from the tables they are to test."""
    old = {k.removeprefix("text_model."): v for k, v in tiny.state(net).items()}
    out = {
        "token_embedding.weight": old["embeddings.token_embedding.weight"],
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "logit_scale": torch.tensor(4.6),
    }
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = old[f"final_layer_norm.{kind}"]
    layers = net.config.num_hidden_layers
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(layers + extra_layer):
        a, b = f"encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                out[f"{b}.{theirs}.{kind}"] = old[f"{a}.{ours}.{kind}"]
            qkv = [old[f"{a}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            out[f"{b}.attn.in_proj_{kind}"] = torch.cat(qkv)
    if "text_projection.weight" in old:
        out["text_projection"] = old["text_projection.weight"].T.contiguous()
    elif extra_layer:
        out["text_projection"] = torch.eye(net.config.hidden_size)
    return out


def single_file(name: str, nets: dict[str, nn.Module], ema: bool) -> dict[str, Tensor]:
    """An LDM or SGM file's tensors; with `ema` the raw weights are others than the average."""
    base = "sd21" if name == "sd21-v" else name
    config = test_unet.TINY[base][1]
    unet = backward(tables.unet_ldm(config), tiny.state(nets["unet"]))
    vae = backward(tables.vae_ldm(targets_config(name)), tiny.state(nets["vae"]))
    out = {**unet, **vae}
    if ema:
        averaged = {"model_ema." + k[len("model.") :].replace(".", ""): v for k, v in unet.items()}
        out = {k: v + 1 if k in unet else v for k, v in out.items()} | averaged
        out |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    text = nets["text_encoder"]
    if name == "sd15":
        out |= {f"{tables.LDM_CLIP}{k}": v for k, v in tiny.state(text).items()}
        ids = torch.arange(77)[None]
        out[f"{tables.LDM_CLIP}text_model.embeddings.position_ids"] = ids
    elif name == "sdxl":
        out |= {f"{tables.SGM_CLIP}{k}": v for k, v in tiny.state(text).items()}
        second = openclip_state(nets["text_encoder_2"], extra_layer=False)
        out |= {f"{tables.SGM_OPENCLIP}{k}": v for k, v in second.items()}
    else:
        named = openclip_state(text, extra_layer=True)
        out |= {f"{tables.LDM_OPENCLIP}{k}": v for k, v in named.items()}
    out |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}
    return {k: v.clone().contiguous() for k, v in out.items()}


def targets_config(name: str) -> Any:
    from snoopi.models.vae import VAEConfig
    from tests.parity import test_vae

    return VAEConfig(channels=test_vae.CHANNELS, norm_groups=8)


@pytest.mark.parametrize("layout", ["LDM/SGM", "ckpt", "EMA"])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sd21-v", "sdxl"])
def test_a_single_file(name: str, layout: str, tmp_path: Path) -> None:
    nets = tiny.components(name)
    tensors = single_file(name, nets, ema=layout == "EMA")
    path = tmp_path / ("model.ckpt" if layout == "ckpt" else "model.safetensors")
    if layout == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 5, "epoch": 1}, path)
    else:
        save_file(tensors, path)
    arch = str(spec_file(name, tmp_path))
    report = convert(path, tmp_path / "model", arch=arch, check=True)
    (note,) = report.notes  # what is left out is said
    others = 2 if name == "sd15" else 3  # betas, alphas_cumprod, OpenCLIP's logit_scale
    said = f"{others} of schedules and the like"
    if layout == "EMA":
        said = f"2 averaged weights, {len(nets['unet'].state_dict())} raw UNet weights, {said}"
    assert note == f"left out on purpose: {said}"
    pipeline = snoopi.load(tmp_path / "model")
    compare(name, layout, pipeline, nets)
    assert all(t is not None for t in pipeline.tokenizers)
    if layout == "EMA":
        arch = str(tmp_path / "spec")
        convert(path, tmp_path / "raw", arch=arch, prefer="raw")
        raw = snoopi.load(tmp_path / "raw").backbone.state_dict()
        mine = pipeline.backbone.state_dict()
        assert all(torch.equal(raw[k], mine[k] + 1) for k in mine)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_diffusers_reads_the_same_from_a_single_file(name: str) -> None:
    """Our tables beside diffusers' own conversion of the same tensors."""
    utils = oracle.package("diffusers.loaders.single_file_utils")
    nets = tiny.components(name)
    tensors = single_file(name, nets, ema=False)
    theirs = utils.convert_ldm_unet_checkpoint(dict(tensors), dict(nets["unet"].config))
    wanted = tiny.state(nets["unet"])
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[k], wanted[k]) for k in wanted)
    theirs = utils.convert_ldm_vae_checkpoint(dict(tensors), dict(nets["vae"].config))
    wanted = tiny.state(nets["vae"])
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[k].reshape(wanted[k].shape), wanted[k]) for k in wanted)


@pytest.mark.parametrize("layout", ["bare UNet", "bare LDM UNet"])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_a_bare_unet(name: str, layout: str, tmp_path: Path) -> None:
    nets = {"unet": tiny.components(name)["unet"]}
    tensors = tiny.state(nets["unet"])
    if layout == "bare LDM UNet":
        tensors = backward(tables.unet_ldm(test_unet.TINY[name][1], ""), tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    arch = str(spec_file(name, tmp_path))
    convert(tmp_path / "pytorch_model.bin", tmp_path / "model", arch=arch)
    compare(name, layout, snoopi.load(tmp_path / "model"), nets)


# --- PixArt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pth", "pth EMA", "bare"])
@pytest.mark.parametrize("name", ["pixart-512", "pixart-1024"])
def test_pixart_files(name: str, layout: str, tmp_path: Path) -> None:
    net = tiny.components(name)["transformer"]
    tensors = tiny.pixart_state(net) if layout.startswith("pth") else tiny.state(net)
    data: Any = {"state_dict": tensors, "epoch": 3}
    if layout == "pth EMA":
        wrong = {k: v + 1 for k, v in tensors.items()}
        data = {"state_dict": wrong, "state_dict_ema": tensors, "optimizer": {"state": {}}}
    torch.save(tensors if layout == "bare" else data, tmp_path / "model.pth")
    arch = str(spec_file(name, tmp_path))
    convert(tmp_path / "model.pth", tmp_path / "model", arch=arch, check=True)
    compare(name, layout, snoopi.load(tmp_path / "model"), {"transformer": net})


# --- full size, names and shapes only -------------------------------------------------------------


def fake(shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    def read() -> Tensor:
        raise AssertionError("nothing is read while planning")

    return {k: Entry(s, torch.float16, read) for k, s in shapes.items()}


FULL: dict[str, Callable[[], tuple[Any, Layout]]] = {
    "sd15": lambda: (oracle.SD15, tables.unet_diffusers()),
    "sd21": lambda: (oracle.SD21, tables.unet_diffusers()),
    "sdxl": lambda: (oracle.SDXL, tables.unet_diffusers()),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_unets_plan(name: str) -> None:
    diffusers = oracle.package("diffusers")
    utils = oracle.package("diffusers.loaders.single_file_utils")
    config, layout = FULL[name]()
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    shapes = oracle.shapes(theirs)
    wanted = targets(preset(name), "backbone")
    how, trouble = plan(wanted, layout, fake(shapes))
    assert not trouble and len(how.items) == len(wanted)
    # The LDM names that we make are those that diffusers reads.
    named = tables.unet_ldm_names(preset(name).backbone, tables.LDM_UNET)
    with torch.device("meta"):
        tensors = {named[k]: torch.empty(s) for k, s in shapes.items()}
    back = utils.convert_ldm_unet_checkpoint(tensors, dict(theirs.config))
    assert {k: tuple(v.shape) for k, v in back.items()} == shapes
    # And the sizes are recognised from either file's shapes alone.
    from weights_convert import configs

    assert configs.unet_from_diffusers(shapes) == preset(name).backbone
    bare = {k.removeprefix(tables.LDM_UNET): tuple(v.shape) for k, v in tensors.items()}
    assert configs.unet_from_ldm(bare) == preset(name).backbone


@pytest.mark.parametrize("name", ["pixart-256", "pixart-512", "pixart-1024"])
def test_full_size_dits_plan(name: str) -> None:
    from weights_convert import configs

    diffusers = oracle.package("diffusers")
    spec = preset(name)
    more: dict[str, Any] = {"sample_size": spec.backbone.sample_size, "caption_channels": 4096}
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(**more)
        named = tiny.pixart_state(theirs)
    shapes = oracle.shapes(theirs)
    _, trouble = plan(targets(spec, "backbone"), tables.dit_diffusers(), fake(shapes))
    assert not trouble
    assert configs.dit(dict(theirs.config)) == spec.backbone
    file = {k: tuple(v.shape) for k, v in named.items()}
    _, trouble = plan(targets(spec, "backbone"), tables.dit_pixart(spec.backbone), fake(file))
    assert not trouble


def test_full_size_text_encoders_plan() -> None:
    from weights_convert import configs

    transformers = oracle.package("transformers")
    for name in ("sd15", "sd21", "sdxl"):
        for i, text in enumerate(preset(name).text):
            c = text.config
            theirs_config = transformers.CLIPTextConfig(
                vocab_size=c.vocabulary,
                hidden_size=c.width,
                intermediate_size=c.mlp_width,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                hidden_act=c.activation,
                projection_dim=c.projection or 512,
            )
            kind = "CLIPTextModelWithProjection" if c.projection else "CLIPTextModel"
            theirs_config.architectures = [kind]
            with torch.device("meta"):
                theirs = getattr(transformers, kind)(theirs_config)
            shapes = {k: tuple(v.shape) for k, v in tiny.state(theirs).items()}
            wanted = targets(preset(name), text_part(i))
            _, trouble = plan(wanted, tables.clip_hf(), fake(shapes))
            assert not trouble, (name, i)
            assert configs.clip_text(theirs_config.to_dict()) == c
            assert configs.clip_text_from_hf(shapes) == c
            if name != "sd15" and i == len(preset(name).text) - 1:
                with torch.device("meta"):
                    named = openclip_state(theirs, extra_layer=name == "sd21")
                file = {k: tuple(v.shape) for k, v in named.items()}
                depth = c.layers + (name == "sd21")
                layout = tables.clip_openclip(c, "", depth)
                _, trouble = plan(wanted, layout, fake(file))
                assert not trouble, trouble[:3]
    with torch.device("meta"):
        config = transformers.T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        theirs = transformers.T5EncoderModel(config)
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    wanted = targets(preset("pixart-512"), "text_encoder")
    for lost in ("encoder.embed_tokens.weight", "shared.weight", ""):
        file = {k: s for k, s in shapes.items() if k != lost}
        _, trouble = plan(wanted, tables.t5_hf(), fake(file))
        assert not trouble, (lost, trouble[:3])
    assert configs.t5(config.to_dict()) == preset("pixart-512").text[0].config
    assert configs.t5_from_hf(shapes) == preset("pixart-512").text[0].config


def test_what_weights_cannot_say_is_asked_for(tmp_path: Path) -> None:
    shapes = targets(preset("sd21"), "backbone")
    named = tables.unet_ldm_names(preset("sd21").backbone, tables.LDM_UNET)
    entries = fake({named[k]: shape for k, shape in shapes.items()})
    weights = Weights(Path("v2.safetensors"), entries, (Path("v2.safetensors"),), {})
    with pytest.raises(ValueError, match=r"do not say whether it predicts eps or v: add --arch"):
        detect._file(weights, None, "ema")
    for arch in ("sd21", "sd21-v", "sd-turbo"):
        found = detect._file(weights, preset(arch), "ema")
        assert found.spec.schedule == preset(arch).schedule
    with pytest.raises(ValueError, match=r"has the sizes of sd21.*not of sdxl as --arch says"):
        detect._file(weights, preset("sdxl"), "ema")
    torch.save(tiny.state(tiny.components("pixart-512")["transformer"]), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"at which size it was trained: add --arch"):
        convert(tmp_path / "bare.pth", tmp_path / "model")
    source = tiny.save_folder("sd15", tiny.components("sd15"), tmp_path / "source", "safetensors")
    with pytest.raises(ValueError, match=r"sizes of UNet, not of pixart-512"):
        convert(source, tmp_path / "model", arch="pixart-512")
    assert not (tmp_path / "model").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_two_names_of_t5s_embedding_must_agree(tmp_path: Path) -> None:
    nets = tiny.components("pixart-512")
    source = tiny.save_folder("pixart-512", nets, tmp_path / "source", "safetensors")
    text = source / "text_encoder" / "model.safetensors"
    tensors = load_file(text)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, text)
    convert(source, tmp_path / "model", check=True)
    tensors["encoder.embed_tokens.weight"][3, 5] += 1
    save_file(tensors, text)
    with pytest.raises(ValueError, match=r"shared.weight and .*embed_tokens.weight differ"):
        convert(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]
