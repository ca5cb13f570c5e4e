"""LoRA files of every dialect: read, written, merged, extracted; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import snoopi
from snoopi import lora as adapters
from snoopi import zoo
from snoopi.conditioning import Conditioning
from snoopi.pipeline import Pipeline
from snoopi.worlds.shapes import ShapesWorld
from snoopi.zoo import ModelSpec
from weights_convert.__main__ import main
from weights_convert.lora import (
    DIALECTS,
    Factor,
    Lora,
    extract,
    load_lora,
    merge,
    read_lora,
    write_lora,
)
from weights_convert.lora_names import Modules

UNET = zoo.preset("debug")
_ENCODER = UNET.text[0].config
# SD1.5's projections (convolutions), SDXL's two text encoders.
TWO = dataclasses.replace(
    UNET,
    arch="two",
    backbone=dataclasses.replace(UNET.backbone, linear_proj=False),
    text=(
        UNET.text[0],
        dataclasses.replace(UNET.text[0], config=dataclasses.replace(_ENCODER, layers=2)),
    ),
)
_DIT = zoo.preset("shapes_dit")
DIT = dataclasses.replace(
    _DIT, backbone=dataclasses.replace(_DIT.backbone, layers=2, heads=2, head_dim=12)
)
SPECS = {"unet": UNET, "two": TWO, "dit": DIT}
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
PROJ = "down_blocks.0.attentions.0.proj_in"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@cache
def shapes(arch: str, part: str) -> dict[str, tuple[int, ...]]:
    """The modules of a part and their weights' shapes."""
    return Modules(next(s for s in SPECS.values() if s.arch == arch), part).shapes


def factor(spec: ModelSpec, module: str, rank: int, alpha: float | None, part: str) -> Factor:
    """Random factors for a module, small enough for a network to stay well-conditioned."""
    shape = shapes(spec.arch, part)[module]
    generator = torch.Generator().manual_seed(len(module) + rank)
    down = torch.randn(rank, *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    return Factor(down, 0.3 * up / rank**0.5, alpha)


def made(spec: ModelSpec, *parts: str, alpha: float | None = 6.0, every: int = 1) -> Lora:
    """A LoRA of every `every`-th module, with other ranks and other alphas among them."""
    found = {}
    for part in parts or tuple(p for p in spec.parts() if p != "vae"):
        names = list(shapes(spec.arch, part))[::every]
        found[part] = {
            name: factor(spec, name, 2 if i % 3 else 3, alpha if i % 5 else 0.5, part)
            for i, name in enumerate(names)
        }
    return Lora(spec, found)


def same(got: Lora, want: Mapping[str, Mapping[str, Factor]]) -> None:
    """Assert equal parts, modules, factors (bit for bit) and alphas."""
    assert {p: list(f) for p, f in got.parts.items()} == {p: list(f) for p, f in want.items()}
    for part, factors in want.items():
        for name, wanted in factors.items():
            found = got.parts[part][name]
            assert torch.equal(found.down, wanted.down) and found.down.dtype == wanted.down.dtype
            assert torch.equal(found.up, wanted.up) and found.up.dtype == wanted.up.dtype
            assert found.full_alpha == wanted.full_alpha, (part, name)


def target(folder: Path, dialect: str) -> Path:
    return folder / (dialect if dialect == "peft" else f"{dialect}.safetensors")


# --- dialects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dialect"),
    [(n, d) for n in SPECS for d in DIALECTS if (n, d) != ("dit", "kohya-sgm")],  # SGM has no DiT
)
def test_round_trips_are_bit_equal_and_keep_alpha(name: str, dialect: str, tmp_path: Path) -> None:
    lora, path = made(SPECS[name]), target(tmp_path, dialect)
    write_lora(lora, path, dialect)
    got = read_lora(path, SPECS[name])
    same(got, lora.parts)
    assert got.dialect == dialect and not got.notes
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_network_in_16_bit(dialect: str, tmp_path: Path) -> None:
    whole = made(TWO, "text_encoder_2", alpha=None)
    cast = {
        n: Factor(f.down.bfloat16(), f.up.bfloat16(), f.alpha)
        for n, f in whole.parts["text_encoder_2"].items()
    }
    lora, path = Lora(TWO, {"text_encoder_2": cast}), target(tmp_path, dialect)
    write_lora(lora, path, dialect)
    # Only in peft's folder of one network nothing says which; the number of layers does.
    same(read_lora(path, TWO), lora.parts)


def test_all_dialects_say_the_same(tmp_path: Path) -> None:
    """From each dialect to each other, and back to the first: the same bytes."""
    write_lora(made(TWO), first := tmp_path / "kohya.safetensors", "kohya")
    before = first
    for dialect in ("diffusers", "kohya-sgm", "snoopi", "kohya"):
        after = tmp_path / f"to-{dialect}.safetensors"
        write_lora(read_lora(before, TWO), after, dialect)
        before = after
    assert before.read_bytes() == first.read_bytes()


def pair(name: str, rank: int = 2, alpha: float | None = None, part: str = "backbone") -> Factor:
    return factor(UNET, name, rank, alpha, part)


def saved(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata)
    return path


def spelled(names: Mapping[str, tuple[str, str]], **more: Tensor) -> dict[str, Tensor]:
    """The tensors of our modules under a file's names for down and up."""
    tensors = {}
    for module, (down, up) in names.items():
        f = pair(module, part="text_encoder" if module == TEXT else "backbone")
        tensors |= {down: f.down, up: f.up}
    return tensors | more


# What a file may call the factors: dialect, then name of each module's factors.
FOREIGN: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "today's mixture": (
        "diffusers",
        {
            Q: (f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight"),
            CONV: (f"unet.{CONV}.lora_A.weight", f"unet.{CONV}.lora_B.weight"),
            TEXT: (
                f"text_encoder.{TEXT}.lora_linear_layer.down.weight",
                f"text_encoder.{TEXT}.lora_linear_layer.up.weight",
            ),
        },
    ),
    "old processors": (
        "diffusers-old",
        {
            name: tuple(
                f"unet.{Q.removesuffix('.to_q')}.processor.{old}_lora.{which}.weight"
                for which in ("down", "up")
            )
            for name, old in ((Q, "to_q"), (Q.replace("to_q", "to_out.0"), "to_out"))
        },
    ),
    "old text encoder": (
        "diffusers-old",
        {
            TEXT: tuple(
                f"text_encoder.{TEXT.removesuffix('.q_proj')}.to_q_lora.{which}.weight"
                for which in ("down", "up")
            )
        },
    ),
    "one network, no prefix": (
        "diffusers",
        {Q: (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")},
    ),
    "a text encoder without its upper level": (
        "diffusers",
        {
            TEXT: tuple(
                f"text_encoder.{TEXT.removeprefix('text_model.')}.lora_{which}.weight"
                for which in "AB"
            )
        },
    ),
    "peft's names in a lone file": (
        "peft",
        {Q: tuple(f"base_model.model.{Q}.lora_{which}.weight" for which in "AB")},
    ),
    "live": ("peft-live", {Q: tuple(f"{Q}.lora_{which}.default.weight" for which in "AB")}),
    "ours, from a network": ("snoopi", {Q: (f"{Q}.lora_a", f"{Q}.lora_b")}),
    "OneTrainer's prefix": (
        "kohya",
        {
            Q: tuple(
                f"lora_transformer_{Q.replace('.', '_')}.lora_{which}.weight"
                for which in ("down", "up")
            )
        },
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_names_of_other_programs(case: str, tmp_path: Path) -> None:
    dialect, names = FOREIGN[case]
    lora = read_lora(saved(tmp_path / "x.safetensors", spelled(names)), UNET)
    want: dict[str, dict[str, Factor]] = {}
    for module in names:
        part = "text_encoder" if module == TEXT else "backbone"
        want.setdefault(part, {})[module] = pair(module, part=part)
    same(lora, {p: want[p] for p in UNET.parts() if p in want})
    assert lora.dialect == dialect
    count = len(names)
    assert lora.notes == [
        f"no alpha for {count} of {count} modules: alpha = rank, a scale of 1, is taken"
    ]


def test_a_live_state_dict_leaves_the_model_itself_out(tmp_path: Path) -> None:
    net = zoo.fresh(UNET, "backbone", 0)
    tensors = {
        name.replace(Q, f"{Q}.base_layer"): value for name, value in net.state_dict().items()
    } | spelled(FOREIGN["live"][1])
    lora = read_lora(saved(tmp_path / "x.safetensors", tensors), UNET, alpha=108.0)
    same(lora, {"backbone": {Q: dataclasses.replace(pair(Q), alpha=108.0)}})
    assert lora.notes[0] == f"left out: {len(net.state_dict())} tensors of the model itself"
    assert lora.notes[1] == "no alpha for 1 of 1 modules: alpha = 108 is taken"


def test_a_pickled_file(tmp_path: Path) -> None:
    torch.save(spelled(FOREIGN["old processors"][1]), tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        assert read_lora(path, UNET).dialect == "diffusers-old"


def adapter(folder: Path, config: Any, names: tuple[str, ...] = (Q, CONV)) -> Path:
    folder.mkdir()
    tensors = {}
    for name in names:
        f = pair(name, 3 if name == CONV else 2)
        tensors |= {f"base_model.model.{name}.lora_A.weight": f.down}
        tensors |= {f"base_model.model.{name}.lora_B.weight": f.up}
    saved(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


RANKS = {"r": 2, "rank_pattern": {"conv1": 3}}


@pytest.mark.parametrize(
    ("config", "alphas"),
    [
        ({"lora_alpha": 5} | RANKS, (5, 5)),
        ({"lora_alpha": 5, "alpha_pattern": {"resnets.0.conv1": 7.5}} | RANKS, (5, 7.5)),
        ({"lora_alpha": 5, "alpha_pattern": {"^conv1": 7, "onv1": 8}} | RANKS, (5, 5)),
        ({"lora_alpha": 5, "alpha_pattern": {r".*attn\d\.to_q": 1}} | RANKS, (1, 5)),
        ({"lora_alpha": 5, "use_rslora": True} | RANKS, (5 * 2**0.5, 5 * 3**0.5)),
        (RANKS, (8, 8)),
    ],
)
def test_alpha_of_a_peft_folder(
    config: dict[str, Any], alphas: tuple[float, float], tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "x", config)
    for path in (folder, folder / "adapter_model.safetensors"):
        factors = read_lora(path, UNET).parts["backbone"]
        assert (factors[Q].alpha, factors[CONV].alpha) == pytest.approx(alphas, rel=1e-12)


def test_alpha_of_diffusers_metadata(tmp_path: Path) -> None:
    names = FOREIGN["today's mixture"][1]
    config = {"unet.r": 2, "unet.lora_alpha": 128, "unet.alpha_pattern": {CONV: 3}}
    config |= {"text_encoder.r": 2, "text_encoder.lora_alpha": 16}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    lora = read_lora(saved(tmp_path / "x.safetensors", spelled(names), metadata), UNET)
    assert lora.parts["backbone"][Q].alpha == 128 and lora.parts["backbone"][CONV].alpha == 3
    assert lora.parts["text_encoder"][TEXT].alpha == 16 and not lora.notes


@pytest.mark.parametrize("module", [PROJ, Q])
def test_a_1x1_convolution_serves_a_linear_and_the_reverse(module: str, tmp_path: Path) -> None:
    for spec, other in ((UNET, TWO), (TWO, UNET)):
        f = factor(other, module, 2, 4.0, "backbone")
        down, up = f.down, f.up
        if module == Q:  # a Linear in both
            down, up = down[..., None, None], up[..., None, None]
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        lora = read_lora(saved(tmp_path / f"{spec.arch}.safetensors", tensors), spec)
        found = lora.parts["backbone"][module]
        weight = zoo.build(spec, "backbone").get_submodule(module).weight
        assert found.down.shape[1:] == weight.shape[1:] and found.up.dim() == weight.dim()
        assert torch.equal(found.down.flatten(1), f.down.flatten(1))
        assert torch.equal(found.up.flatten(1), f.up.flatten(1))
        load_lora(zoo.build(spec, "backbone", "cpu"), lora.parts["backbone"])


def test_a_file_that_fits_both_text_encoders_needs_part(tmp_path: Path) -> None:
    f = pair(TEXT, part="text_encoder")
    tensors = {f"{TEXT}.lora_A.weight": f.down, f"{TEXT}.lora_B.weight": f.up}
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match="fits text_encoder and text_encoder_2: say which"):
        read_lora(path, TWO)
    assert list(read_lora(path, TWO, part="text_encoder_2").parts) == ["text_encoder_2"]


# Names of published files: what they are of our names.
PUBLISHED = {
    "sdxl": {
        "down_blocks_1_attentions_0_proj_in": "down_blocks.1.attentions.0.proj_in",
        "mid_block_resnets_0_time_emb_proj": "mid_block.resnets.0.time_emb_proj",
        "input_blocks_0_0": "conv_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "out_2": "conv_out",
    },
    "sd15": {
        "down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
        "up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0": (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"
        ),
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
    },
    "pixart-1024": {
        "transformer_blocks_27_attn2_to_k": "transformer_blocks.27.attn2.to_k",
        "adaln_single_emb_resolution_embedder_linear_1": (
            "adaln_single.emb.resolution_embedder.linear_1"
        ),
    },
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_names_at_full_size(arch: str) -> None:
    modules = Modules(zoo.model(arch), "backbone")
    for spelling, name in PUBLISHED[arch].items():
        assert modules.find(spelling, True) == name
    assert all(len(names) == 1 for names in modules.underscored.values())
    if arch != "pixart-1024":
        assert list(modules.sgm) == list(modules.shapes)


# The parameters of rank 64: attention alone, and the fourteen kinds of module of DMD2's LoRA.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KINDS = (
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@pytest.mark.parametrize(
    ("arch", "kinds", "count"),
    [
        ("sd15", ATTENTION, 12_754_944),
        ("sd21", ATTENTION, 13_279_232),
        ("pixart-512", ATTENTION, 33_030_144),
        ("sd15", KINDS, 67_252_224),
        ("sd21", KINDS, 67_776_512),
    ],
)
def test_parameters_of_rank_64(arch: str, kinds: tuple[str, ...], count: int) -> None:
    found = Modules(zoo.model(arch), "backbone").shapes
    chosen = [shape for name, shape in found.items() if name.endswith(kinds)]
    assert sum(64 * (math.prod(shape[1:]) + shape[0]) for shape in chosen) == count


def test_an_ambiguous_kohya_name_is_an_error() -> None:
    modules = Modules(UNET, "backbone")
    modules.underscored[Q.replace(".", "_")].add(CONV)
    with pytest.raises(LookupError, match="could be"):
        modules.find(Q.replace(".", "_"), True)


def test_other_metadata_is_kept_in_another_dialect(tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "sd_v1", "sshs_model_hash": "0", "format": "pt"}
    path = saved(tmp_path / "x.safetensors", spelled(FOREIGN["OneTrainer's prefix"][1]), metadata)
    write_lora(read_lora(path, UNET), tmp_path / "y.safetensors", "diffusers")
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "ss_base_model_version", "lora_adapter_metadata"}


# --- what is refused ------------------------------------------------------------------------------

KOHYA = f"lora_unet_{Q.replace('.', '_')}"


def kohya() -> dict[str, Tensor]:
    f = pair(Q)
    return {
        f"{KOHYA}.lora_down.weight": f.down,
        f"{KOHYA}.lora_up.weight": f.up,
        f"{KOHYA}.alpha": torch.tensor(4.0),
    }


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = kohya()
    return tensors | {f"{KOHYA}.{name}": change(tensors[f"{KOHYA}.{name}"])}


def without(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in kohya().items() if not k.endswith(name)}


def nan(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[1] = math.nan
    return value


X = torch.zeros(2, 2)
DOTTED = {f"{Q}.lora_A.weight": X, f"{Q}.lora_B.weight": X}
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown module": (
        kohya() | {"lora_unet_there.lora_down.weight": X, "lora_unet_no.lora_up.weight": X},
        "no is no module of the backbone; .*: there is no module of the backbone",
    ),
    "unknown name": (kohya() | {f"{KOHYA}.gamma": X}, "unexpected .*gamma"),
    "another network": (kohya() | {"lora_vae_x.lora_up.weight": X}, "unexpected lora_vae_x"),
    "no such encoder": (
        kohya() | {"lora_te2_x.lora_up.weight": X},
        "is of a text_encoder_2, which debug has not",
    ),
    "doubled": (
        kohya()
        | {
            f"lora_unet_input_blocks_1_1_{KOHYA.partition('attentions_0_')[2]}.alpha": torch.tensor(
                4.0
            )
        },
        "are both backbone .*to_q's alpha",
    ),
    "half": (without("lora_up.weight"), "has no other half .*lacks up"),
    "alpha alone": (
        kohya() | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
        "conv_in.alpha has no other half .*lacks down and up",
    ),
    "down shape": (
        changed("lora_down.weight", lambda v: v[:, 1:]),
        r"must be \[2, 16\].*\[2, 15\]",
    ),
    "up shape": (changed("lora_up.weight", lambda v: v[:, :1]), r"must be \[16, 2\] .*\[16, 1\]"),
    "transposed": (changed("lora_down.weight", lambda v: v.T), r"must be \[16, 16\], got|must be"),
    "no rank": (changed("lora_down.weight", lambda v: v[:0]), "must have a rank"),
    "scalar": (changed("lora_down.weight", lambda v: v.sum()), "must have a rank"),
    "alpha shape": (changed("alpha", lambda v: v.expand(2)), "must be one number"),
    "alpha zero": (changed("alpha", lambda v: 0 * v), "finite number other than 0, got 0.0"),
    "alpha nan": (changed("alpha", lambda v: v * math.nan), "finite number other than 0, got nan"),
    "not finite": (changed("lora_up.weight", nan), "lora_up.weight has values that are not finite"),
    "integers": (changed("lora_up.weight", lambda v: v.int()), "of a floating type, got torch.int"),
    "mixed": (kohya() | DOTTED, "mixes the dialects diffusers, kohya"),
    "no lora": ({"conv_in.weight": X}, "holds no LoRA: .*conv_in.weight"),
    "empty": ({}, "holds no LoRA: .*there is none"),
    "dora": (kohya() | {f"{KOHYA}.dora_scale": X}, "holds DoRA"),
    "peft dora": (DOTTED | {f"{Q}.lora_magnitude_vector": X}, "holds DoRA"),
    "loha": ({f"{KOHYA}.hada_w1_a": X}, "holds LoHa"),
    "lokr": ({f"{KOHYA}.lokr_w1": X}, "holds LoKr"),
    "tucker": (kohya() | {f"{KOHYA}.lora_mid.weight": X}, "a LoCon with a third factor"),
    "bias": (DOTTED | {f"{Q}.lora_B.bias": X}, "a LoRA with biases"),
    "two adapters": (
        {f"{Q}.lora_A.{a}.weight": X for a in ("one", "two")},
        "holds the adapters one, two",
    ),
    "foreign weights in a live dict": (
        {f"{Q}.lora_A.a.weight": X, "decoder.weight": X},
        "unexpected decoder.weight",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, message = BROKEN[case]
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(path, UNET)
    assert str(error.value).startswith(str(path))
    status = main(["lora", str(path), str(tmp_path / "y"), "--to", "peft", "--arch", "debug"])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and err.startswith("weights_convert: ")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_truncated_and_doubled_headers(tmp_path: Path) -> None:
    whole = saved(tmp_path / "x.safetensors", kohya()).read_bytes()
    for cut in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            read_lora(tmp_path / "x.safetensors", UNET)
    twice = whole.replace(b"lora_down.weight", b'lora_up.weight"}')
    (tmp_path / "x.safetensors").write_bytes(twice)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_lora(tmp_path / "x.safetensors", UNET)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "must be an object"),
        ({"peft_type": "LOHA"}, "of a 'LOHA' adapter"),
        ({"use_dora": True}, "of DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "the base was changed"),
        ({"r": 4}, "has rank 2 at .*to_q, but its config says 4"),
        ({"lora_alpha": "8"} | RANKS, "must be a finite number other than 0, got '8'"),
        ({"lora_alpha": math.inf} | RANKS, "must be a finite number other than 0, got inf"),
        ({"alpha_pattern": {"(": 1}} | RANKS, "alpha_pattern holds a bad pattern"),
        ({"alpha_pattern": [1]} | RANKS, "alpha_pattern must be an object"),
    ],
)
def test_broken_configs_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_lora(adapter(tmp_path / "x", config), UNET)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "no folder of a LoRA"), ("none.safetensors", "not exist")):
        with pytest.raises(ValueError, match=message):
            read_lora(tmp_path / name, UNET)
    path = saved(tmp_path / "x.safetensors", kohya())
    with pytest.raises(ValueError, match="debug has no part 'unet'"):
        read_lora(path, UNET, part="unet")
    lora = read_lora(path, UNET)
    for where, dialect, message in (
        ("x.safetensors", "kohya", "exists already"),
        ("y", "kohya", "must be a .safetensors file for kohya"),
        ("y.safetensors", "peft", "must be a folder for peft"),
        ("y.safetensors", "a1111", "must be one of diffusers, peft"),
    ):
        with pytest.raises(ValueError, match=message):
            write_lora(lora, tmp_path / where, dialect)
    with pytest.raises(ValueError, match="kohya-sgm names UNets"):
        write_lora(made(DIT, "backbone"), tmp_path / "y.safetensors", "kohya-sgm")
    with pytest.raises(ValueError, match="holds no module"):
        write_lora(Lora(UNET, {}), tmp_path / "y.safetensors", "kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "x.safetensors"]


# --- into networks, merged, extracted -------------------------------------------------------------


def folder_of(spec: ModelSpec, path: Path, dtype: torch.dtype | None = None) -> Path:
    """A model folder with every network but the VAE."""
    nets = {p: zoo.fresh(spec, p, 3).eval() for p in spec.parts() if p != "vae"}
    backbone = nets.pop("backbone")
    last = backbone.proj_out if spec is DIT else backbone.conv_out  # starts at zero
    torch.nn.init.normal_(last.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    tokenizers = [ShapesWorld().tokenizer() for _ in nets]
    pipeline = Pipeline(spec, backbone, None, list(nets.values()), tokenizers, {"source": "test"})
    return pipeline.save(path, dtype)


@torch.no_grad()
def outputs(pipeline: Pipeline) -> list[Tensor]:
    """What each network says to fixed inputs."""
    spec, generator = pipeline.spec, torch.Generator().manual_seed(1)
    width = (
        spec.backbone.text_width  # the backbone's own, whatever the encoders give
    )
    x = torch.randn(2, spec.backbone.in_channels, 8, 8, generator=generator)
    cond = Conditioning(torch.randn(2, 5, width, generator=generator))
    ids = torch.tensor([[1, 2, 3, 31]])
    found = [pipeline.backbone(x, torch.tensor([10, 900]), cond)]
    for encoder in pipeline.text_encoders:
        out = encoder(ids, torch.ones_like(ids, dtype=torch.bool)) if spec is DIT else encoder(ids)
        found.append(out.last)
    return found


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_merging_equals_the_adapters(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    source, lora = folder_of(spec, tmp_path / "source"), made(spec, every=3)
    write_lora(lora, tmp_path / "x.safetensors", "kohya")
    merge(source, [tmp_path / "x.safetensors"], tmp_path / "merged")
    plain, with_adapters = snoopi.load(source), snoopi.load(source)
    nets = (with_adapters.backbone, *with_adapters.text_encoders)
    for net, factors in zip(nets, lora.parts.values(), strict=True):
        load_lora(net, factors)
        assert {n: a.multiplier for n, a in adapters.adapters(net).items()} == {
            n: f.scale for n, f in factors.items()
        }
    want = outputs(with_adapters)
    close(outputs(snoopi.load(tmp_path / "merged")), want)
    for before, after in zip(outputs(plain), want, strict=True):
        assert float((after - before).norm() / before.norm()) > 0.01


def test_merging_several_with_their_scales(tmp_path: Path) -> None:
    source = folder_of(UNET, tmp_path / "source", torch.bfloat16)
    a, b = made(UNET, "backbone", every=4), made(UNET, "backbone", alpha=9.0, every=6)
    write_lora(a, tmp_path / "a.safetensors", "diffusers")
    write_lora(b, tmp_path / "b", "peft")
    paths = [tmp_path / "a.safetensors", tmp_path / "b"]
    merge(source, paths, tmp_path / "merged", [0.5, -2.0])
    before = load_file(source / "backbone.safetensors")
    after = load_file(tmp_path / "merged" / "backbone.safetensors")
    assert list(before) == list(after)
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        total = torch.zeros_like(weight, dtype=torch.float32)
        for scale, lora in ((0.5, a), (-2.0, b)):
            if name.endswith(".weight") and module in lora.parts["backbone"]:
                total += scale * lora.parts["backbone"][module].delta(tuple(weight.shape))
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], (weight.float() + total).bfloat16())
    encoder = "text_encoder.safetensors"
    assert (source / encoder).read_bytes() == (tmp_path / "merged" / encoder).read_bytes()
    said = snoopi.load(tmp_path / "merged").provenance
    assert said["source"] == "test" and [m["scale"] for m in said["merged"]] == [0.5, -2.0]
    assert [m["dialect"] for m in said["merged"]] == ["diffusers", "peft"]
    assert sorted(said["merged"][1]["files"]) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all(len(h) == 64 for m in said["merged"] for h in m["files"].values())
    assert (tmp_path / "merged" / "tokenizer").is_dir()


def test_a_merged_model_can_become_a_recipe(tmp_path: Path) -> None:
    """As an LCM-LoRA makes a model of many steps one of few."""
    source = folder_of(UNET, tmp_path / "source")
    recipe = dataclasses.replace(UNET, arch="lcm", one_step=zoo.OneStep(499))
    write_lora(made(UNET, every=9), tmp_path / "x.safetensors", "kohya")
    folder_of(recipe, tmp_path / "recipe")
    words = ["source", "x.safetensors", "m", "--arch", "recipe"]
    assert main(["merge", *(w if w[0] == "-" else str(tmp_path / w) for w in words)]) == 0
    assert snoopi.load(tmp_path / "m").spec == recipe != UNET
    with pytest.raises(ValueError, match=r"sd15 has another backbone than .*source"):
        merge(source, [tmp_path / "x.safetensors"], tmp_path / "n", arch="sd15")


def test_merging_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    source = folder_of(UNET, tmp_path / "source", torch.float16)
    path = tmp_path / "x.safetensors"
    write_lora(made(UNET), path, "snoopi")
    before = sorted(p.name for p in tmp_path.iterdir())
    for scales, message in (
        ([1.0, 2.0], "give one scale, or one per LoRA: 1, got 2"),
        ([math.nan], "must be a finite number"),
        ([1e9], "too large for torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(source, [path], tmp_path / "merged", scales)
    with pytest.raises(ValueError, match="exists already"):
        merge(source, [path], source)
    (source / "text_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"changes the text_encoder, which .*source has not"):
        merge(source, [path], tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_load_lora_checks_before_it_changes() -> None:
    net = zoo.fresh(UNET, "backbone", 0)
    f = pair(Q)
    for factors, message in (
        ({Q: f, "nowhere": f}, "nowhere must be a bare Linear or Conv2d, got no module"),
        ({Q: f, "conv_norm_out": f}, "got GroupNorm"),
        ({Q: f, CONV: f}, r"conv1 must be \(2, 16, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(net, factors)
    assert not adapters.adapters(net) and all(p.requires_grad for p in net.parameters())
    load_lora(net, {Q: f})
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        f"{Q}.lora_a",
        f"{Q}.lora_b",
    }
    with pytest.raises(ValueError, match="got LoRALinear"):
        load_lora(net, {Q: f})


def test_extracting_a_known_difference_recovers_it(tmp_path: Path) -> None:
    source, lora = folder_of(TWO, tmp_path / "source"), made(TWO, every=3)
    write_lora(lora, tmp_path / "x.safetensors", "kohya")
    merge(source, [tmp_path / "x.safetensors"], tmp_path / "merged")
    result = extract(source, tmp_path / "merged", rank=3)
    assert result.ranks == (1, 2, 3) and not result.unheld
    energy = result.energy()
    assert energy[2] == pytest.approx(1, abs=1e-9) and energy[0] < energy[1] < energy[2]
    modules = {p: shapes(TWO.arch, p) for p in lora.parts}
    assert result.equal == {p: len(m) - len(lora.parts[p]) for p, m in modules.items()}
    got = result.lora()
    for part, factors in lora.parts.items():
        assert list(got.parts[part]) == list(factors)
        for name, f in factors.items():
            delta, want = (x.delta(modules[part][name]) for x in (got.parts[part][name], f))
            assert float((delta - want).norm() / want.norm()) < 1e-5
            assert got.parts[part][name].scale == 1
    write_lora(got, tmp_path / "y.safetensors", "diffusers")
    merge(source, [tmp_path / "y.safetensors"], tmp_path / "again")
    for part in lora.parts:
        want_weights = load_file(tmp_path / "merged" / f"{part}.safetensors")
        for name, weight in load_file(tmp_path / "again" / f"{part}.safetensors").items():
            assert torch.allclose(weight, want_weights[name], rtol=0, atol=1e-6)


def test_extraction_is_the_best_of_its_rank(tmp_path: Path) -> None:
    base, tuned = folder_of(UNET, tmp_path / "a"), folder_of(UNET, tmp_path / "b")
    weights = load_file(tuned / "backbone.safetensors")
    generator = torch.Generator().manual_seed(5)
    changed = (f"{Q}.weight", f"{CONV}.weight", "conv_norm_out.bias", "conv_in.bias")
    noise = {n: torch.randn(weights[n].shape, generator=generator) for n in changed}
    save_file(
        weights | {n: weights[n] + d for n, d in noise.items()}, tuned / "backbone.safetensors"
    )
    result = extract(base, tuned, rank=5, parts=["backbone"])
    assert result.ranks == (1, 2, 4, 5)
    kept, total = 0.0, 0.0
    for module in result.modules:
        values = torch.linalg.svdvals(noise[f"{module.name}.weight"].double().flatten(1)) ** 2
        want = [float(values[:r].sum()) for r in result.ranks]
        assert list(module.kept) == pytest.approx(want, rel=1e-5)
        assert module.total == pytest.approx(float(values.sum()), rel=1e-5)
        delta = result.parts["backbone"][module.name].delta(module.shape)
        rest = float((noise[f"{module.name}.weight"] - delta).square().sum())
        assert rest == pytest.approx(module.total - module.kept[-1], rel=1e-4)
        kept, total = kept + want[-1], total + float(values.sum())
    assert result.energy()[-1] == pytest.approx(kept / total, rel=1e-5)
    for name in changed[2:]:
        assert result.unheld[f"backbone.{name}"] == pytest.approx(
            float(noise[name].norm()), rel=1e-5
        )
    said = json.loads(result.lora().metadata["snoopi_extract"])
    assert said["energy"]["5"] == result.energy()[-1] and len(said["modules"]) == 2


def test_extracting_from_bare_files(tmp_path: Path) -> None:
    """A model folder beside one network's file in the same names, which says less."""
    base = folder_of(UNET, tmp_path / "a")
    weights = load_file(base / "backbone.safetensors")
    change = factor(UNET, CONV, 1, 1.0, "backbone").delta(tuple(weights[f"{CONV}.weight"].shape))
    weights[f"{CONV}.weight"] += change
    path = saved(tmp_path / "unet.safetensors", weights)
    result = extract(base, path, rank=2)
    assert [m.name for m in result.modules] == [CONV] and result.modules[0].rank >= 1
    assert result.energy() == pytest.approx([1, 1], abs=1e-6)
    assert result.notes == ["not compared: text_encoder"]


def test_extraction_refuses(tmp_path: Path) -> None:
    base, other = folder_of(UNET, tmp_path / "a"), folder_of(TWO, tmp_path / "b")
    with pytest.raises(ValueError, match="no Linear or Conv2d differs"):
        extract(base, base, 4)
    with pytest.raises(ValueError, match=r"b is of another backbone: .*proj_in.weight must be"):
        extract(base, other, 4)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        extract(base, base, 0)
    with pytest.raises(ValueError, match="vae is not in both"):
        extract(base, base, 4, parts=["vae"])
    weights = load_file(base / "backbone.safetensors")
    weights[f"{Q}.weight"][0, 0] = math.inf
    save_file(weights, other / "backbone.safetensors")
    (other / "snoopi.json").write_bytes((base / "snoopi.json").read_bytes())
    with pytest.raises(ValueError, match=r"backbone .*to_q.weight has values that are not finite"):
        extract(base, other, 4)


# --- commands -------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(UNET, tmp_path / "source")
    write_lora(made(UNET), tmp_path / "a.safetensors", "kohya")

    def run(*words: str) -> str:
        where = [w if w.startswith("-") or w in NOT_PATHS else str(tmp_path / w) for w in words]
        assert main(where) == 0
        return capsys.readouterr().out

    out = run("lora", "a.safetensors", "b", "--to", "peft", "--arch", "debug", "--dtype", "fp16")
    assert "kohya" in out and "0.166667 to 3" in out and "wrote" in out
    out = run("merge", "source", "a.safetensors", "b", "merged", "--scale", "1", "--scale", "0.5")
    assert "scale 1, 0.5" in out and "peft" in out
    out = run("extract", "source", "merged", "c.safetensors", "--rank", "4", "--report")
    assert "rank 4 keeps 100.0000% of the energy" in out and "energy kept" in out
    assert len(read_lora(tmp_path / "c.safetensors", UNET).parts["backbone"]) > 10
    out = run("lora", "c.safetensors", "d.safetensors", "--to", "kohya-sgm", "--arch", "source")
    assert "diffusers" in out
    status = main(["merge", str(source), str(tmp_path / "no.safetensors"), str(tmp_path / "x")])
    assert status == 2 and capsys.readouterr().err.count("\n") == 1
    words = ["extract", str(source), str(source), str(tmp_path / "a.safetensors")]
    assert main(words) == 2  # before it compares the two
    assert "a.safetensors exists already" in capsys.readouterr().err
    for command in ("lora", "merge", "extract"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "DST" in capsys.readouterr().out


NOT_PATHS = {
    *("lora", "merge", "extract", "peft", "kohya-sgm", "debug", "fp16", "1", "0.5", "4"),
}
