"""LoRA files of diffusers and peft read by us, and ours read by them: equal outputs, no warning."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from snoopi import zoo
from snoopi.models.clip import CLIPText, CLIPTextConfig
from snoopi.models.dit import DiT
from snoopi.models.unet import UNet
from snoopi.zoo import ModelSpec, text_part
from tests.parity import oracle, test_dit, test_unet, tiny
from tests.parity.oracle import randn
from weights_convert.lora import Factor, Lora, load_lora, read_lora, write_lora
from weights_convert.lora_names import Modules

pytestmark = pytest.mark.parity
# Attention, projections, the GEGLU, convolutions of stride 1 and 2 and 1x1, time embeddings.
TARGETS = {
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj", "conv_in", "linear_1"),
}
TEXT_TARGETS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
SIZES: dict[str, Any] = {"r": 3, "lora_alpha": 12}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"to_k": 2, r"(down|transformer)_blocks\.\d+\..*(conv1|to_v)": 4},
    "alpha_pattern": {"attn2.to_v": 1.5, "to_out.0": 7},
}
TEXT_PATTERNS: dict[str, Any] = {"rank_pattern": {"fc1": 5}, "alpha_pattern": {"q_proj": 2}}


class Nets:
    """A model's networks, theirs and ours with the same weights, and what each says."""

    def __init__(self, name: str) -> None:
        oracle.package("diffusers")
        self.peft = oracle.package("peft")
        self.name = name
        self.theirs: dict[str, Any] = {}
        self.ours: dict[str, Any] = {}
        if name == "dit":
            self.ours["backbone"], self.theirs["backbone"] = test_dit.pair("sizes")
            spec = zoo.preset("pixart-1024")
        else:
            self.ours["backbone"], self.theirs["backbone"] = test_unet.pair(name)
            spec = zoo.preset(name)
            self._texts(tiny.components(name), spec)
        configs = [self.ours[text_part(i)].config for i in range(len(self.ours) - 1)]
        texts = tuple(
            dataclasses.replace(text, config=config)
            for text, config in zip(spec.text, configs, strict=False)
        )
        self.spec: ModelSpec = dataclasses.replace(
            spec, backbone=self.ours["backbone"].config, text=texts or spec.text
        )

    def _texts(self, nets: Mapping[str, nn.Module], spec: ModelSpec) -> None:
        for i, text in enumerate(spec.text):
            theirs: Any = nets[text_part(i)]
            config: Any = theirs.config
            assert isinstance(text.config, CLIPTextConfig)
            ours = CLIPText(
                dataclasses.replace(
                    text.config,
                    width=config.hidden_size,
                    mlp_width=config.intermediate_size,
                    layers=config.num_hidden_layers,
                    heads=config.num_attention_heads,
                    projection=config.projection_dim if text.config.projection else None,
                )
            )
            ours.load_state_dict(tiny.state(theirs), strict=True)
            self.theirs[text_part(i)] = theirs
            self.ours[text_part(i)] = ours.eval().requires_grad_(False)

    def keep_the_backbone(self) -> None:
        """Forget the text encoders."""
        for part in list(self.ours)[1:]:
            del self.ours[part], self.theirs[part]

    def adapt(self, **more: Any) -> None:
        """Random adapters of peft's in each of their networks."""
        for seed, (part, net) in enumerate(self.theirs.items()):
            targets, patterns = (
                (TARGETS, PATTERNS) if part == "backbone" else (TEXT_TARGETS, TEXT_PATTERNS)
            )
            words = {**SIZES, **patterns, **more}
            config = self.peft.LoraConfig(target_modules=targets, **words)
            net.add_adapter(config) if hasattr(net, "add_adapter") else (
                self.peft.inject_adapter_in_model(config, net)
            )
            randomise(net, seed)

    def load(self, lora: Lora) -> None:
        """A LoRA into our networks."""
        assert set(lora.parts) == set(self.ours)
        for part, factors in lora.parts.items():
            load_lora(self.ours[part], factors)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Assert equal outputs, far from what the networks said without adapters."""
        plain = Nets(self.name)
        for part in self.theirs:
            want, got = say(self.theirs[part]), say(self.ours[part])
            oracle.close(f"{name} {part}", got, want)
            assert oracle.errors(got, say(plain.ours[part]))[0] > 0.02, part


def say(net: Any) -> Tensor:
    """A network's output for fixed inputs."""
    if isinstance(net, (UNet, DiT)):
        cond = (test_unet if isinstance(net, UNet) else test_dit).text(net.config, 2)
        return net(randn(2, 4, 8, 8, seed=9), torch.tensor([10, 900]), cond)
    ids = torch.tensor([[49406, 5, 9, 49407, 49407]])
    if isinstance(net, CLIPText):
        return net(ids).last
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    kind = type(base).__name__
    if kind.startswith("CLIP"):
        return net(ids).last_hidden_state
    x, t = randn(2, 4, 8, 8, seed=9), torch.tensor([10, 900])
    if kind.startswith("UNet"):
        config = next(
            o
            for _, o in test_unet.TINY.values()
            if o.channels == tuple(base.config.block_out_channels)
        )
        return test_unet.their_prediction(net, x, t, test_unet.text(config, 2))
    return test_dit.their_prediction(net, x, t, test_dit.text(test_dit.TINY["sizes"][1], 2))


@torch.no_grad()
def randomise(net: nn.Module, seed: int) -> None:
    """Adapters that change the outputs, but keep the network well-conditioned."""
    for i, (name, p) in enumerate(net.named_parameters()):
        if ".lora_A." in name or ".lora_B." in name:
            p.copy_(0.2 * randn(*p.shape, seed=100 * seed + i) / p[0].numel() ** 0.5)


@contextmanager
def silence() -> Iterator[None]:
    """Fail on a warning, Python's or a logger's of an oracle."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not said, said


def pipeline(nets: Nets) -> Any:
    """diffusers' pipeline around their networks."""
    diffusers = oracle.package("diffusers")
    texts = {part: net for part, net in nets.theirs.items() if part != "backbone"}
    kind = diffusers.StableDiffusionPipeline
    more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if len(texts) == 2:
        kind, more = diffusers.StableDiffusionXLPipeline, {"tokenizer_2": None}
    vae = diffusers.AutoencoderKL(block_out_channels=(32,))
    scheduler = diffusers.EulerDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1)
    return kind(
        vae=vae, unet=nets.theirs["backbone"], scheduler=scheduler, tokenizer=None, **texts, **more
    )


# --- theirs, read by us ---------------------------------------------------------------------------


def save_weights(nets: Nets, folder: Path, metadata: bool) -> None:
    """diffusers' save_lora_weights, as its training scripts call it."""
    utils = oracle.package("diffusers.utils")
    training = oracle.package("diffusers.training_utils")
    state_dict = oracle.package("peft.utils").get_peft_model_state_dict
    layers: dict[str, Any] = {}
    for part, net in nets.theirs.items():
        name = "unet" if part == "backbone" else part
        layers[f"{name}_lora_layers"] = utils.convert_state_dict_to_diffusers(state_dict(net))
    if metadata:
        named = {("unet" if p == "backbone" else p): net for p, net in nets.theirs.items()}
        layers |= training._collate_lora_metadata(named)
    type(pipeline(nets)).save_lora_weights(folder, **layers)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_save_lora_weights_with_metadata(name: str, tmp_path: Path) -> None:
    nets = Nets(name)
    nets.adapt()
    save_weights(nets, tmp_path, metadata=True)
    lora = read_lora(tmp_path, nets.spec)
    assert lora.dialect == "diffusers" and not lora.notes
    nets.load(lora)
    nets.check(name)


def test_save_lora_weights_without_metadata_lost_alpha(tmp_path: Path) -> None:
    nets = Nets("sdxl")
    nets.adapt(lora_alpha=9, alpha_pattern={})
    save_weights(nets, tmp_path, metadata=False)
    assert "no alpha" in read_lora(tmp_path, nets.spec).notes[0]
    nets.load(read_lora(tmp_path, nets.spec, alpha=9))
    nets.check("sdxl")


def test_save_lora_adapter(tmp_path: Path) -> None:
    nets = Nets("sd15")
    nets.keep_the_backbone()
    nets.adapt()
    nets.theirs["backbone"].save_lora_adapter(tmp_path)
    nets.load(read_lora(tmp_path, nets.spec))
    nets.check("save_lora_adapter")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_peft_folder_and_live_state_dict(name: str, rslora: bool, tmp_path: Path) -> None:
    nets = Nets(name)
    patterns = {} if rslora else PATTERNS  # peft has rsLoRA without patterns alone
    net = nets.theirs["backbone"]
    nets.keep_the_backbone()
    config = nets.peft.LoraConfig(target_modules=TARGETS, use_rslora=rslora, **SIZES, **patterns)
    model = nets.peft.get_peft_model(net, config)
    randomise(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    nets.theirs["backbone"] = model
    lora = read_lora(tmp_path / "adapter", nets.spec)
    assert lora.dialect == "peft" and not lora.notes
    nets.load(lora)
    nets.check(name)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "live.safetensors"
    )
    live = read_lora(tmp_path / "live.safetensors", nets.spec)
    assert live.dialect == "peft-live" and "tensors of the model itself" in live.notes[0]
    for module, factor in lora.parts["backbone"].items():
        assert torch.equal(live.parts["backbone"][module].down, factor.down)
        assert torch.equal(live.parts["backbone"][module].up, factor.up)


# --- ours, and kohya's, read by them --------------------------------------------------------------


def made(nets: Nets, alpha: float, varied: bool) -> Lora:
    """A LoRA of all that TARGETS names, in all networks."""
    parts: dict[str, dict[str, Factor]] = {}
    for part in nets.ours:
        targets = TARGETS if part == "backbone" else TEXT_TARGETS
        shapes = Modules(nets.spec, part).shapes
        names = [n for n in shapes if any(n == t or n.endswith(f".{t}") for t in targets)]
        for i, name in enumerate(names):
            shape, rank = shapes[name], 2 + (i % 3 == 0) * varied
            down = randn(rank, *shape[1:], seed=i) / torch.Size(shape[1:]).numel() ** 0.5
            up = 0.1 * randn(shape[0], rank, *(1 for _ in shape[2:]), seed=i + 1)
            mine = alpha / 2 if varied and i % 4 == 0 else alpha
            parts.setdefault(part, {})[name] = Factor(down, up, mine)
    return Lora(nets.spec, parts)


@pytest.mark.parametrize(("name", "varied"), [("sd15", True), ("sd21", False), ("sdxl", True)])
def test_load_lora_weights_reads_our_diffusers_file(
    name: str, varied: bool, tmp_path: Path
) -> None:
    nets = Nets(name)
    lora = made(nets, 5.0, varied)
    write_lora(lora, tmp_path / "x.safetensors", "diffusers")
    nets.load(lora)
    pipe = pipeline(nets)
    with silence():
        pipe.load_lora_weights(tmp_path / "x.safetensors")
    nets.check(name)


# SGM names are of SDXL's repository, and diffusers reads them for no other model.
@pytest.mark.parametrize(
    ("name", "dialect"), [("sd15", "kohya"), ("sdxl", "kohya"), ("sdxl", "kohya-sgm")]
)
def test_load_lora_weights_reads_our_kohya_file(name: str, dialect: str, tmp_path: Path) -> None:
    """As LCM-LoRA's: convolutions, projections, time embeddings, one alpha for all."""
    nets = Nets(name)
    lora = made(nets, 1.0, False)
    if dialect == "kohya":  # diffusers knows this module by its SGM name alone
        backbone = {k: f for k, f in lora.parts["backbone"].items() if "add_embedding" not in k}
        lora = dataclasses.replace(lora, parts={**lora.parts, "backbone": backbone})
    write_lora(lora, tmp_path / "x.safetensors", dialect)
    nets.load(read_lora(tmp_path / "x.safetensors", nets.spec))
    pipe = pipeline(nets)
    with silence():
        pipe.load_lora_weights(tmp_path / "x.safetensors")
    nets.check(name)


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_peft_reads_our_folder(name: str, varied: bool, tmp_path: Path) -> None:
    nets = Nets(name)
    nets.keep_the_backbone()
    lora = made(nets, 5.0, varied)
    write_lora(lora, tmp_path / "x", "peft")
    nets.load(lora)
    with silence():
        nets.theirs["backbone"] = nets.peft.PeftModel.from_pretrained(
            nets.theirs["backbone"], tmp_path / "x"
        )
    nets.check(name)


def test_load_lora_adapter_reads_our_file(tmp_path: Path) -> None:
    nets = Nets("sd21")
    nets.keep_the_backbone()
    lora = made(nets, 5.0, True)
    write_lora(lora, tmp_path / "x.safetensors", "diffusers")
    nets.load(lora)
    with silence():
        # Only with weight_name it reads the metadata, its own files' as well.
        nets.theirs["backbone"].load_lora_adapter(
            tmp_path, weight_name="x.safetensors", prefix="unet"
        )
    nets.check("load_lora_adapter")
