"""Tiny random oracle models (diffusers, transformers) and how ours are compared with them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

_DECLARED = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as its operators
TOLERANCE = 1e-5  # relative error of outputs in fp32, rms and max


def package(name: str) -> Any:
    """An oracle package, or a skip.

    The index may bring a torchvision built for CUDA along with open_clip: beside torch for the CPU
    its operators do not load, and its import fails because it describes two of them. Declaring
    those lets it, and what imports it, in; a torchvision that fails even so is hidden.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "torchvision" not in sys.modules:
        _import_torchvision()
    return pytest.importorskip(name)


def _import_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is None:
        return
    for attempt in range(2):
        try:
            importlib.import_module("torchvision")
            return
        except Exception:  # RuntimeError: operator torchvision::nms does not exist
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]
            if attempt == 0:
                for operator in ("nms", "qnms"):
                    _DECLARED.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
    sys.modules["torchvision"] = None  # type: ignore[assignment]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1) from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters that keep activations of order 1; no bias or norm is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if "embedding.weight" in name:
            p.copy_(values)
        elif p.dim() > 1:
            p.copy_(values / math.sqrt(math.prod(p.shape[1:])))
        else:
            p.copy_(0.2 * values + (1.0 if name.endswith("weight") else 0.0))
    return net.eval().requires_grad_(False)


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative error in fp64: rms over rms, and maximum over maximum."""
    got, want = got.double(), want.double()
    difference = got - want
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt()
    return float(rms), float(difference.abs().max() / want.abs().max())


def close(name: str, got: Tensor, want: Tensor, report: Callable[[], str] | None = None) -> None:
    """Assert equal shapes and an error of at most TOLERANCE; prints the error (pytest -rP)."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, want {list(want.shape)}"
    rms, worst = errors(got, want)
    print(f"{name}: relative error rms {rms:.2e}, max {worst:.2e}")
    if not max(rms, worst) <= TOLERANCE:
        details = report() if report else ""
        pytest.fail(f"{name}: relative error rms {rms:.2e}, max {worst:.2e}\n{details}")


def hidden_report(
    ours: nn.Module, theirs: nn.Module, run_ours: Callable[[], Any], run_theirs: Callable[[], Any]
) -> str:
    """Per module that both networks name alike, in forward order: the error of its output."""
    with _recorded(ours) as got:
        run_ours()
    with _recorded(theirs) as want:
        run_theirs()
    lines = []
    for name, tensor in want.items():
        if name in got and got[name].shape == tensor.shape:
            rms, worst = errors(got[name], tensor)
            lines.append(f"  {name:60s} rms {rms:.2e} max {worst:.2e}")
    return "\n".join(lines)


@contextmanager
def _recorded(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                outputs[name] = output

        return keep

    handles = [m.register_forward_hook(hook(name)) for name, m in net.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters and persistent buffers."""
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


def same_keys(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> None:
    """Assert equal names and shapes; the message lists what differs."""
    assert not (missing := sorted(theirs.keys() - ours.keys())), f"we lack {missing[:8]}"
    assert not (extra := sorted(ours.keys() - theirs.keys())), f"only we have {extra[:8]}"
    wrong = {k: (ours[k], theirs[k]) for k in ours if ours[k] != theirs[k]}
    assert not wrong, f"shapes differ: {dict(list(wrong.items())[:8])}"


def count(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


# The published configs (unet/config.json), as far as they differ from diffusers' defaults.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
SD21 = SD15 | {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = SD15 | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
