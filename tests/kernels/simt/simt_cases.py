"""Calls of the emulated kernels, with the same inputs for fp64 and PyTorch's chain."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from cases import Inputs, error
from torch import Tensor

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float32: 2e-7}
HEAD_DIMS = (40, 64, 72, 80, 160)
# Around the tiles of 80 keys (each text in one) and 64 (several), and what models use.
LENGTHS = (1, 5, 16, 64, 77, 80, 81, 120, 154, 300, 512)


@dataclass(frozen=True)
class Call:
    """Sizes of a call and what is special about it."""

    d: int
    n: int
    n_neg: int | None = None  # as n unless given
    b: int = 2
    m: int = 37
    h: int = 2
    mask: str | None = None  # random | dead: the last item has no live key | last: only late keys
    shared: bool = False  # negative and null text of batch 1
    null: int = 0  # its length
    strength: bool = False
    c_out: int | None = None
    strided: bool = False  # q, k and v are slices of what one product returned
    spread: float = 1.0

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if v != getattr(type(self), k, None)}
        return " ".join(f"{k}={v}" for k, v in shown.items())


def grid(d: int) -> list[Call]:
    """One call for each length, the other properties in turns that do not coincide."""
    masks, sizes = (None, "random", "dead", "last"), (37, 16, 1, 65, 17, 128, 130)
    calls = []
    for i, n in enumerate(LENGTHS):
        i += HEAD_DIMS.index(d)
        calls.append(
            Call(
                d=d,
                n=n,
                n_neg=(n, 77, 5)[i % 3],
                m=sizes[i % 7],
                mask=masks[i % 4],
                shared=i % 2 == 0,
                null=(0, 1, 20, 0, 90)[i % 5],
                strength=i % 3 == 1,
                strided=i % 4 < 2,
            )
        )
    return calls


# Of one block's worth of rows and more, through w_out, in the forms that the grid leaves out.
PROJECTED = [
    Call(d=40, n=77, h=3, m=70, c_out=75),  # 120 inputs are no multiple of 16
    Call(d=40, n=120, h=8, b=1, c_out=320, null=5),
    Call(d=40, n=77, h=8, b=1, m=70, c_out=320, null=20, mask="random"),
    Call(d=40, n=20, h=1, b=1, m=5121, c_out=3),  # so many rows that blocks have more of them
    Call(d=64, n=77, h=2, m=65, c_out=64, mask="random", strength=True),
    Call(d=72, n=20, h=1, m=9, c_out=1),  # one head, 72 inputs, one output
    Call(d=72, n=154, h=3, b=1, c_out=130, shared=True),
    Call(d=80, n=77, h=8, b=1, m=64, c_out=36),
    Call(d=160, n=77, h=1, m=33, c_out=65, mask="dead"),
    Call(d=160, n=81, h=2, b=1, m=20, c_out=320, null=3),
]
MANY_ROWS = [
    Call(d=40, n=77, b=1, m=1100, h=1),
    Call(d=64, n=81, n_neg=20, b=1, m=1025, h=1, mask="random"),
    Call(d=80, n=16, b=1, m=1151, h=1, strength=True),
]
LAYERS = [
    Call(d=80, n=77, b=1, m=1024, h=8),  # Stable Diffusion 1.5, 32 x 32
    Call(d=72, n=120, b=1, m=1024, h=16, mask="random"),  # PixArt, 512 pixels
]
WIDE_LOGITS = [
    Call(d=40, n=77, spread=40.0),
    Call(d=64, n=154, spread=40.0, mask="random"),
    Call(d=160, n=300, spread=20.0, null=2),
]


def make(call: Call, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Inputs of a call, drawn in fp32."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def text(n: int, batch: int) -> list[Tensor]:
        kv = draw(batch, n, 2, call.h, call.d).to(dtype)
        if not call.strided:
            return [x.contiguous() for x in kv.unbind(2)]
        return list(kv.unbind(2))

    def mask(n: int, batch: int) -> Tensor | None:
        if call.mask is None:
            return None
        live = torch.rand(batch, n, generator=g) < 0.6
        live[:, n // 2] = True
        if call.mask == "last":
            live[:, : (n - 1) // 64 * 64] = False
            live[:, -1] = True
        if call.mask == "dead":
            live[-1] = False
        return live

    b, m, h, d = call.b, call.m, call.h, call.d
    other = 1 if call.shared else b
    n_neg = call.n if call.n_neg is None else call.n_neg
    q = draw(b, m, 3, h, d)[:, :, 1].to(dtype) if call.strided else draw(b, m, h, d).to(dtype)
    if call.spread != 1.0:
        q = q * call.spread
    texts = text(call.n, b) + text(n_neg, other)
    kwargs: dict[str, Any] = {"mask_pos": mask(call.n, b), "mask_neg": mask(n_neg, other)}
    if call.null:
        kwargs["k_null"], kwargs["v_null"] = text(call.null, other)
        kwargs["mask_null"] = mask(call.null, other)
    # Rounded, so that what the kernel takes in fp32 is what PyTorch's chain takes.
    kwargs["nasa_scale"] = (2 * torch.rand(b, m, generator=g)).to(dtype) if call.strength else 1.3
    if call.c_out is not None:
        kwargs["w_out"] = (draw(call.c_out, h * d) * (h * d) ** -0.5).to(dtype)
        kwargs["b_out"] = draw(call.c_out).to(dtype)
    return Inputs(q, texts, kwargs)


def bits(x: Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it; 16-bit floats as uint16."""
    if x.dtype == torch.bool:
        return x.numpy().view(np.uint8)
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)


def tensor(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The reverse of `bits`."""
    return torch.from_numpy(x if dtype == torch.float32 else x.view(np.int16)).view(dtype)


def arguments(inputs: Inputs, **more: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """q, texts and options of the module's functions. A batch of 1 gets stride 0, not copies."""
    batch = inputs.q.shape[0]

    def wide(x: Tensor | None) -> np.ndarray | None:
        if x is None:
            return None
        return np.broadcast_to(bits(x), (batch, *x.shape[1:])) if x.shape[0] == 1 else bits(x)

    kwargs = inputs.kwargs
    texts = [
        (wide(inputs.texts[0]), wide(inputs.texts[1]), wide(kwargs.get("mask_pos"))),
        (wide(inputs.texts[2]), wide(inputs.texts[3]), wide(kwargs.get("mask_neg"))),
    ]
    if "k_null" in kwargs:
        texts.append(tuple(wide(kwargs[x]) for x in ("k_null", "v_null", "mask_null")))
    options: dict[str, Any] = {
        "dtype": DTYPES[inputs.q.dtype],
        "softmax_scale": inputs.q.shape[-1] ** -0.5,
        **more,
    }
    a = kwargs["nasa_scale"]
    if isinstance(a, Tensor):
        options["strength"] = a.float().numpy()
    else:
        options["nasa_scale"] = a
    for name in ("w_out", "b_out"):
        if name in kwargs:
            options[name] = bits(kwargs[name])
    return bits(inputs.q), texts, options


def run(simt: ModuleType, inputs: Inputs, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return simt.nasa(*arguments(inputs, **more), settings)


@dataclass(frozen=True)
class Errors:
    """Relative rms errors against fp64."""

    ours: float
    eager: float

    @classmethod
    def of(cls, out: Tensor, inputs: Inputs) -> "Errors":
        exact = inputs.exact()
        return cls(error(out.view(exact.shape), exact), error(inputs.eager(), exact))
