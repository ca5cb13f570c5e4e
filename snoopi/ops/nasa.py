"""The op's Python face: checks, autocast, choice of path. The arithmetic is elsewhere.

b batch, m query tokens (picture), n text tokens, h heads, d head dim.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from snoopi.ops import checks, eager, library, native, reference
from snoopi.ops.packs import Formula, LinearPack, TextPack, pack_text


class Guidance(Protocol):
    """What `guided_attention` needs of a guidance; see snoopi.guidance."""

    @property
    def needs_null(self) -> bool: ...
    def formula(self) -> Formula: ...
    def combine(
        self,
        z_pos: Tensor,
        lse_pos: Tensor | None,
        z_neg: Tensor,
        lse_neg: Tensor | None,
        z_null: Tensor | None = None,
    ) -> Tensor: ...


class Choice(NamedTuple):
    """The path a call takes (fused, eager, reference or plain) and the reason in words."""

    path: str
    why: str


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Plain attention to one text and the output projection: what runs where nothing is negated.

    q [b m h d]; k, v [b|1 n h d]; mask bool [b|1 n], True = attend; w_out [c_out h*d] and b_out
    [c_out] as in nn.Linear. Returns [b m c_out], or [b m h d] without w_out. softmax_scale is
    d ** -0.5 unless given. A fully masked text gives 0 (before b_out), never NaN.

    Runs in the native op where that is faster than scaled_dot_product_attention, which takes all
    other calls. Differentiable either way; gradients are computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    call = _Call(q, {"": TextPack(k, v, mask)}, w_out, b_out)
    return call.run(_attend, call.q, call.texts[""], call.w_out, call.b_out, softmax_scale)


def _attend(
    q: Tensor,
    text: TextPack,
    w_out: Tensor | None,
    b_out: Tensor | None,
    softmax_scale: float | None,
) -> Tensor:
    if not _native_pays(q, text):
        return eager.attend(q, text, w_out, b_out, softmax_scale)
    z = library.attention_op(q, text.k, text.v, _softmax_scale(softmax_scale, q))
    return eager.project(z, w_out, b_out)


def _native_pays(q: Tensor, text: TextPack) -> bool:
    # A graph that was exported runs without this package, and its sizes may stay open.
    return not torch.compiler.is_exporting() and native.why_not(q) is None and pays(q, text)


def pays(q: Tensor, text: TextPack) -> bool:
    """Whether the native op is faster at plain attention on this processor (benchmarks.attention).

    PyTorch's is slow in bf16 on a CPU without AMX. With AMX, and in fp32, the op loses on wide
    heads, which do not fit its blocks, and in fp32 on tiny calls; there, over thousands of keys, it
    wins a tenth, but rounds three times as much, for it sums them in one run and not by blocks.
    """
    if not native.NATIVE.attends or text.mask is not None or len(text.k) != len(q):
        return False
    if q.dtype == torch.float32:
        n = text.k.shape[1]
        # Not by the batch: a picture's result is the same on any number of ranks.
        return q.shape[-1] <= 160 and n <= 1024 and q.shape[1:3].numel() * n >= 2**14
    return q.dtype == torch.bfloat16 and (q.shape[-1] <= 160 or not native.NATIVE.tiles)


def nasa_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    k_null: Tensor | None = None,
    v_null: Tensor | None = None,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    mask_null: Tensor | None = None,
    nasa_scale: float | Tensor,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """NASA cross-attention (SNOOPI Eq. 8-10): (Z+ - a Z-) W_out^T + b_out.

    q [b m h d]; k, v [b|1 n h d], a text of batch 1 serves every q; masks bool [b|1 n], True =
    attend; w_out [c_out h*d], b_out [c_out] as in nn.Linear. Returns [b m c_out], or [b m h d]
    without w_out. a = nasa_scale: a float or a tensor [b m] (either dim may be 1; 0-d is fine).
    With a null text: Z+ - a (Z- - Z0). softmax_scale is d ** -0.5 unless given.

    A fully masked text gives Z = 0, never NaN. A Python 0.0 gives `attention` on the positive text,
    bit for bit; tensor strengths are never inspected. Accumulates in fp32 (fp64 for fp64). Under
    autocast every tensor is cast to the autocast dtype; elsewhere dtypes must agree.

    backend: auto takes the fastest path for the call (see `explain`), fused the fused op or an
    error, reference the plain-torch twin.

    Raises:
        ValueError: arguments that do not fit together; backend="fused" where it does not exist.
    """
    texts = _texts((k_pos, v_pos, mask_pos), (k_neg, v_neg, mask_neg), (k_null, v_null, mask_null))
    call = _Call(q, texts, w_out, b_out, softmax_scale)
    return _nasa(call, nasa_scale, _choose(call, nasa_scale, backend).path)


def nasa_attention_packed(
    q: Tensor,
    pos: TextPack,
    neg: TextPack,
    out: LinearPack | None,
    *,
    null: TextPack | None = None,
    nasa_scale: float | Tensor,
    softmax_scale: float | None = None,
) -> Tensor:
    """`nasa_attention` on texts and an output projection that were packed beforehand.

    For inference, where texts and weights serve many calls. Same shapes, same result. Containers
    that hold no native layout are taken as plain tensors.

    Raises:
        ValueError: as `nasa_attention`.
    """
    texts = {"_pos": pos, "_neg": neg} | ({} if null is None else {"_null": null})
    w_out, b_out = (None, None) if out is None else (out.weight, out.bias)
    call = _Call(q, texts, w_out, b_out, softmax_scale)
    path = _choose(call, nasa_scale, "auto").path
    if path != "fused" or not _laid_out(call):
        return _nasa(call, nasa_scale, path)
    formula = Formula(_strength(nasa_scale, call.q), "nasa")
    return call.run(_guided, call, out, formula)


def guided_attention(
    q: Tensor,
    pos: TextPack,
    neg: TextPack,
    out: LinearPack | None,
    guidance: Guidance,
    *,
    null: TextPack | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention to a positive and a negative text, combined by `guidance`, and the projection.

    Shapes as in `nasa_attention`; guidance is a snoopi.guidance.NASA, NAG or VSF, or any object
    with a `formula()` and the same in plain torch, `combine`. Texts and weights may be packed or
    not. Where the fused op cannot run, where a gradient is wanted, and for a formula of the kind
    "combine", all but NASA come from `twin_attention` and `combine`.

    Raises:
        ValueError: as `nasa_attention`; a null text that is missing or that nobody reads.
    """
    formula = guidance.formula()
    if guidance.needs_null != (null is not None):
        wanted = "a null text" if guidance.needs_null else "no null text"
        raise ValueError(f"this {type(guidance).__name__} needs {wanted}, see its `needs_null`")
    if formula.kind == "nasa":
        return nasa_attention_packed(
            q, pos, neg, out, null=null, nasa_scale=formula.strength, softmax_scale=softmax_scale
        )
    w_out, b_out = (None, None) if out is None else (out.weight, out.bias)
    call = _Call(q, {"_pos": pos, "_neg": neg}, w_out, b_out, softmax_scale)
    checks.check_strength(formula.strength, call.q)
    # On CUDA the kernel has NASA and the twin form; the others are combined from the latter.
    own = formula.kind == "combine" or q.device.type == "cuda"
    if not own and _choose_path(call, "auto", formula.strength).path == "fused":
        formula = formula._replace(strength=_strength(formula.strength, call.q))
        return call.run(_guided, call, out, formula)
    texts = (pos.k, pos.v, neg.k, neg.v)
    twins = twin_attention(
        q, *texts, mask_pos=pos.mask, mask_neg=neg.mask, softmax_scale=softmax_scale
    )
    z_null = None
    if null is not None:
        z_null = attention(q, null.k, null.v, null.mask, softmax_scale=softmax_scale)
    # A strength by query is fp32 and would widen 16-bit attention.
    z = guidance.combine(*twins, z_null).to(twins[0].dtype)
    return call.run(eager.project, z, call.w_out, call.b_out)


def twin_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    *,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention to two texts with their log-sum-exp: (z_pos, lse_pos, z_neg, lse_neg).

    Shapes as in `nasa_attention`; z [b m h d] in q's dtype. lse [b m h] is the natural log of the
    sum of exp(softmax_scale q.k), fp32 (fp64 for fp64), -inf where no key is live. Both are
    differentiable.

    Raises:
        ValueError: as `nasa_attention`.
    """
    texts = _texts((k_pos, v_pos, mask_pos), (k_neg, v_neg, mask_neg))
    call = _Call(q, texts, softmax_scale=softmax_scale)
    pos, neg = call.texts["_pos"], call.texts["_neg"]
    fused = _choose_path(call, backend).path == "fused"
    chain = library.twin_op if fused else reference.twin_attention
    return call.run(chain, call.q, pos, neg, call.scale)


def explain(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    k_null: Tensor | None = None,
    v_null: Tensor | None = None,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    mask_null: Tensor | None = None,
    nasa_scale: float | Tensor,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Choice:
    """The path `nasa_attention` would take for the same arguments, and why.

    Raises:
        ValueError: as `nasa_attention`.
    """
    texts = _texts((k_pos, v_pos, mask_pos), (k_neg, v_neg, mask_neg), (k_null, v_null, mask_null))
    return _choose(_Call(q, texts, w_out, b_out, softmax_scale), nasa_scale, backend)


class _Call:
    """A checked call: tensors of one dtype, ready for any path."""

    def __init__(
        self,
        q: Tensor,
        texts: Mapping[str, TextPack],
        w_out: Tensor | None = None,
        b_out: Tensor | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        device = q.device.type
        self.autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
            device
        )
        checks.check_call(q, texts, w_out, b_out, same_dtype=not self.autocast)
        self.q, self.texts, self.w_out, self.b_out = q, texts, w_out, b_out
        self.softmax_scale = softmax_scale
        if self.autocast:
            self._cast()

    @property
    def scale(self) -> float:
        """The softmax scale, d ** -0.5 unless it was given."""
        return _softmax_scale(self.softmax_scale, self.q)

    def _cast(self) -> None:
        q = self.q
        if q.dtype != torch.float64:  # autocast leaves fp64 alone
            q = q.to(torch.get_autocast_dtype(q.device.type))
        self.q = q
        self.texts = {
            name: text
            if text.k.dtype == text.v.dtype == q.dtype
            else TextPack(text.k.to(q.dtype), text.v.to(q.dtype), text.mask)
            for name, text in self.texts.items()
        }
        self.w_out = None if self.w_out is None else self.w_out.to(q.dtype)
        self.b_out = None if self.b_out is None else self.b_out.to(q.dtype)

    def run(self, chain: Callable[..., Any], *args: object) -> Any:
        """Run a path. Autocast has had its say in the casts above; off, so that fp32 stays fp32."""
        if not self.autocast:
            return chain(*args)
        with torch.autocast(self.q.device.type, enabled=False):
            return chain(*args)

    def needs_grad(self, *more: object) -> bool:
        """Whether autograd will ask for a gradient of a tensor of the call, or of one in `more`."""
        tensors = [t for text in self.texts.values() for t in (text.k, text.v)]
        others = [t for t in more if isinstance(t, Tensor)]
        return eager.needs_grad(self.q, self.w_out, self.b_out, *tensors, *others)


def _nasa(call: _Call, nasa_scale: float | Tensor, path: str) -> Tensor:
    q, pos, neg, null = call.q, call.texts["_pos"], call.texts["_neg"], call.texts.get("_null")
    out = (call.w_out, call.b_out)
    if path == "plain":
        return call.run(_attend, q, pos, *out, call.softmax_scale)
    a = _strength(nasa_scale, q)
    return call.run(_CHAINS[path], q, pos, neg, null, *out, a, call.scale)


_CHAINS: dict[str, Callable[..., Tensor]] = {
    "fused": library.nasa_op,
    "eager": eager.nasa_attention,
    "reference": reference.nasa_attention,
}


def _choose(call: _Call, nasa_scale: float | Tensor, backend: str) -> Choice:
    choice = _choose_path(call, backend, nasa_scale)
    checks.check_strength(nasa_scale, call.q)
    if not isinstance(nasa_scale, Tensor) and nasa_scale == 0.0:
        return Choice("plain", "the strength is a Python zero: plain attention, bit for bit")
    if choice.path == "fused" and backend == "auto" and _packing_costs_more(call):
        why = "packing the texts costs more than it saves on so few queries; pack_text beforehand"
        return Choice("eager", why)
    return choice


def _packing_costs_more(call: _Call) -> bool:
    """Whether a call is faster as PyTorch ops because its texts are not packed beforehand.

    Measured in fp32 alone, with up to 64 queries for each text and texts of more than 128 K
    elements; the 16-bit types gain more from the op than packing takes.
    """
    if call.q.dtype != torch.float32 or torch.compiler.is_compiling() or _laid_out(call):
        return False
    if call.q.device.type != "cpu":
        return False  # nothing is packed there
    texts = call.texts.values()
    queries = call.q.shape[0] * call.q.shape[1]
    elements = sum(text.k.numel() for text in texts)
    most = max(text.k.shape[0] for text in texts)
    return queries <= 64 * most and elements > most * 2**17


def _choose_path(call: _Call, backend: str, nasa_scale: object = None) -> Choice:
    checks.check_backend(backend)
    texts = [x for text in call.texts.values() for x in (text.k, text.v)]
    missing = native.why_not_attend(call.q, texts, call.softmax_scale)
    loaded = native.CUDA if call.q.device.type == "cuda" else native.NATIVE
    if backend == "fused":
        if missing is not None:
            raise ValueError(f'backend="fused" is not possible here: {missing}')
        return Choice("fused", f"asked for; {loaded.why}")
    if backend == "reference":
        return Choice("reference", "asked for")
    if missing is not None:
        return Choice("eager", missing)
    if call.needs_grad(nasa_scale):
        why = "a gradient is wanted: the fused op computes the forward pass twice, which is slower"
        return Choice("eager", why)
    return Choice("fused", loaded.why)


def _guided(call: _Call, out: LinearPack | None, formula: Formula) -> Tensor:
    """The fused op; texts that are not packed are packed here."""
    texts = [t if t.packed is not None else pack_text(*t[:3]) for t in call.texts.values()]
    null = texts[2] if len(texts) > 2 else None
    if out is not None and call.w_out is not out.weight:  # cast: the pack is of another dtype
        assert call.w_out is not None
        out = LinearPack(call.w_out, call.b_out)
    return library.guided_op(call.q, texts[0], texts[1], null, out, formula, call.scale)


def _laid_out(call: _Call) -> bool:
    """Whether every text holds the native layout: made by a native op, for the call's dtype.

    A pack that was moved to another device still holds the CPU's, which nothing there reads.
    """
    here = call.q.device.type == "cpu"
    return here and all(text.packed is not None for text in call.texts.values())


def _texts(*parts: tuple[Tensor | None, Tensor | None, Tensor | None]) -> dict[str, TextPack]:
    texts = {}
    for suffix, (k, v, mask) in zip(("_pos", "_neg", "_null"), parts, strict=False):
        if k is not None and v is not None:
            texts[suffix] = TextPack(k, v, mask)
        elif k is not None or v is not None or mask is not None:
            raise ValueError(f"k{suffix} and v{suffix} must be given together, and with a mask")
    return texts


def _strength(nasa_scale: float | Tensor, q: Tensor) -> float | Tensor:
    """A float, or a tensor [b m] on q's device."""
    if not isinstance(nasa_scale, Tensor):
        return float(nasa_scale)
    return nasa_scale.to(q.device).expand(q.shape[0], q.shape[1])


def _softmax_scale(softmax_scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
