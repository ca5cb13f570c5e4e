"""Inputs and the error rule shared by the op's tests.

The rule: relative rms error against fp64 is at most twice that of the ordinary PyTorch chain in the
same dtype, with a small floor because that chain may be exact.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snoopi import ops
from snoopi.ops import eager, reference
from snoopi.ops.packs import TextPack

FLOOR = {torch.float32: 2e-7, torch.bfloat16: 1e-3, torch.float16: 2e-4, torch.float64: 1e-12}
MEAN_ERRORS: dict[torch.dtype, float] = {}  # filled by test_mean_error_is_that_of_eager
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One shape of the op and what is special about it."""

    b: int = 2
    m: int = 33
    n: int = 7
    h: int = 2
    d: int = 8
    n_neg: int | None = None
    c_out: int | None = 24
    null: bool = False
    mask: str | None = None  # random | dead: the second item's texts have no live key
    strength: bool = False
    nasa_scale: float = 1.3
    spread: float = 1.0  # of the queries; large gives one-hot softmaxes
    outliers: bool = False
    shared: bool = False  # negative and null text of batch 1
    strided: bool = False
    rising: bool = False  # later keys are larger: so is the largest logit of all so far

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if v != self.__dataclass_fields__[k].default}
        return " ".join(f"{k}={v}" for k, v in shown.items()) or "default"


CASES = [
    Case(),
    Case(n=1, n_neg=1),
    Case(m=1, n=1, d=1, h=1, b=1),
    Case(m=64, n=12, d=16, h=4),
    Case(m=16, n=12, d=16, h=8),
    Case(m=65, n=77, d=40, h=3),
    Case(m=31, n=77, d=64, c_out=None),
    Case(m=35, n=120, n_neg=5, d=72),
    Case(m=47, n=77, d=80, c_out=7),
    Case(m=261, n=20, d=20, h=4, c_out=75),
    Case(m=17, n=77, n_neg=300, d=160, h=1),
    Case(m=150, n=13, d=5, h=3, b=3),
    Case(m=33, n=12, d=16, null=True),
    Case(m=33, n=12, d=16, mask="random"),
    Case(m=33, n=12, d=16, mask="dead", null=True),
    Case(m=33, n=12, d=16, strength=True),
    Case(m=33, n=12, d=40, strength=True, null=True, mask="dead", shared=True, c_out=None),
    Case(nasa_scale=1.0),
    Case(nasa_scale=0.0, m=65, d=40),
    Case(nasa_scale=-0.7, shared=True),
    Case(d=40, n=77, spread=40.0),
    Case(d=40, n=77, outliers=True),
    Case(d=64, n=20, outliers=True, spread=10.0, mask="random", strength=True, null=True),
    Case(m=33, d=16, strided=True, null=True, mask="random", strength=True),
    Case(m=31, d=40, strided=True, shared=True, c_out=None),
    Case(m=33, n=1100, n_neg=600, d=40, rising=True, mask="random", null=True),
]


@dataclass
class Inputs:
    """Arguments of the op. `kwargs` is everything but q and the two texts."""

    q: Tensor
    texts: list[Tensor]  # k_pos, v_pos, k_neg, v_neg
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype; masks stay bool."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        kwargs = {name: cast(x) for name, x in self.kwargs.items()}
        return Inputs(cast(self.q), [cast(x) for x in self.texts], kwargs)

    def by(self, chain: Any) -> Tensor:
        """Run a chain of `reference` or `eager` on them."""
        names = ("k_null", "v_null", "mask_null", "w_out", "b_out", "mask_pos", "mask_neg")
        k_null, v_null, mask_null, w_out, b_out, *masks = (self.kwargs.get(x) for x in names)
        pos, neg = TextPack(*self.texts[:2], masks[0]), TextPack(*self.texts[2:], masks[1])
        null = None if k_null is None else TextPack(k_null, v_null, mask_null)
        scale = self.q.shape[-1] ** -0.5
        return chain(self.q, pos, neg, null, w_out, b_out, self.kwargs["nasa_scale"], scale)

    def packed(self) -> Tensor:
        """The result of the op on packs."""
        kwargs = self.kwargs
        pos = ops.pack_text(*self.texts[:2], kwargs["mask_pos"])
        neg = ops.pack_text(*self.texts[2:], kwargs["mask_neg"])
        null = out = None
        if "k_null" in kwargs:
            null = ops.pack_text(*(kwargs[x] for x in ("k_null", "v_null", "mask_null")))
        if "w_out" in kwargs:
            out = ops.pack_linear(kwargs["w_out"], kwargs["b_out"])
        a = kwargs["nasa_scale"]
        return ops.nasa_attention_packed(self.q, pos, neg, out, null=null, nasa_scale=a)

    def exact(self) -> Tensor:
        """The result in fp64, from the inputs as they are."""
        return self.to(torch.float64).by(reference.nasa_attention)

    def eager(self) -> Tensor:
        """The result of the ordinary PyTorch chain."""
        return self.by(eager.nasa_attention)


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Inputs of a case. Values are drawn in fp32, so every dtype sees the same numbers, rounded."""
    g = torch.Generator().manual_seed(seed)
    b, h, d = case.b, case.h, case.d

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g)
        if not case.strided or len(shape) != 4:
            return x.to(dtype)
        # A slice of a wider tensor that has heads before tokens: every stride but the last is odd.
        wide = torch.randn(shape[0], shape[2], shape[1], shape[3] + 3, generator=g).to(dtype)
        return wide.transpose(1, 2)[..., 2:-1]

    def text(n: int, batch: int) -> list[Tensor]:
        k, v = draw(batch, n, h, d), draw(batch, n, h, d)
        if case.rising:
            k *= torch.linspace(0.1, 8.0, n)[None, :, None, None].to(dtype)
        if case.outliers:
            k[:, :: max(n // 3, 1)] *= 30.0
            v[:, :: max(n // 2, 1)] *= 100.0
        return [k, v]

    def mask(n: int, batch: int) -> Tensor | None:
        if case.mask is None:
            return None
        live = torch.rand(batch, n, generator=g) < 0.6
        live[:, 0] = True
        if case.mask == "dead":
            live[-1] = False
        return live

    n_neg = case.n if case.n_neg is None else case.n_neg
    other = 1 if case.shared else b
    q = draw(b, case.m, h, d) * case.spread
    if case.strided:  # what a product returns is contiguous
        q = draw(b, case.m, h, d)
    texts = text(case.n, b) + text(n_neg, other)
    kwargs: dict[str, Any] = {"mask_pos": mask(case.n, b), "mask_neg": mask(n_neg, other)}
    kwargs["nasa_scale"] = case.nasa_scale
    if case.null:
        kwargs["k_null"], kwargs["v_null"] = text(3, other)
        kwargs["mask_null"] = mask(3, other)
    if case.strength:
        kwargs["nasa_scale"] = torch.rand(b, case.m, generator=g).to(dtype) * 2
    if case.c_out is not None:
        kwargs["w_out"] = draw(case.c_out, h * d) * (h * d) ** -0.5
        kwargs["b_out"] = draw(case.c_out)
    return Inputs(q, texts, kwargs)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative rms error; NaN and infinities count as infinite."""
    assert got.shape == exact.shape
    if not torch.isfinite(got).all():
        return float("inf")
    norm = exact.double().norm().item()
    return (got.double() - exact.double()).norm().item() / max(norm, 1e-30)


def check(got: Tensor, inputs: Inputs, factor: float = 2.0) -> None:
    """Hold a result to the rule."""
    exact = inputs.exact()
    ours, theirs = error(got, exact), error(inputs.eager(), exact)
    bound = max(factor * theirs, FLOOR[got.dtype])
    assert ours <= bound, f"error {ours:.3g}, at most {bound:.3g} (eager {theirs:.3g})"
