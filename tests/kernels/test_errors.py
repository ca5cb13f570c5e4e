"""Messages of the ops: each names the argument, what was expected and what came."""

from typing import Any

import pytest
import torch
from cases import Case, make

from snoopi import ops
from snoopi.ops import native

Z = torch.zeros


def call(**changes: Any) -> torch.Tensor:
    inputs = make(Case(b=2, m=9, n=7, h=8, d=40, c_out=24))
    names = ("k_pos", "v_pos", "k_neg", "v_neg")
    args = dict(zip(names, inputs.texts, strict=True)) | {"q": inputs.q} | inputs.kwargs
    return ops.nasa_attention(**(args | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Z(2, 9, 320)}, r"q must be \[b m h d\], got \[2, 9, 320\]"),
        ({"q": Z(2, 9, 8, 40, dtype=torch.int64)}, "q must be a floating-point tensor, got int64"),
        (
            {"k_neg": Z(2, 77, 5, 64)},
            r"k_neg must be \[b n h d\] with b=2 or 1, n >= 1, h=8 d=40, got \[2, 77, 5, 64\]",
        ),
        ({"k_pos": Z(3, 7, 8, 40)}, "k_pos must be .* b=2 or 1"),
        ({"k_pos": Z(2, 0, 8, 40)}, "k_pos must be .* n >= 1"),
        ({"v_neg": Z(2, 6, 8, 40)}, r"v_neg must be \[2, 7, 8, 40\] like k_neg"),
        ({"v_neg": Z(2, 7, 8, 40).half()}, "v_neg must be float32 like q, got float16"),
        ({"mask_pos": Z(2, 7)}, "mask_pos must be bool, True = attend, got float32"),
        (
            {"mask_neg": Z(2, 6).bool()},
            r"mask_neg must be \[b n\] with b=2 or 1, n=7, got \[2, 6\]",
        ),
        ({"mask_null": Z(2, 7).bool()}, "k_null and v_null must be given together"),
        ({"k_null": Z(2, 7, 8, 40)}, "k_null and v_null must be given together"),
        ({"w_out": Z(24, 300)}, r"w_out must be \[c_out h\*d=320\], got \[24, 300\]"),
        ({"b_out": Z(23)}, r"b_out must be \[c_out\] with c_out=24, got \[23\]"),
        ({"w_out": None}, "b_out was given without w_out"),
        ({"w_out": Z(24, 320).bfloat16()}, "b_out must be bfloat16 like w_out, got float32"),
        ({"nasa_scale": Z(2)}, r"nasa_scale must be .* \[b m\] with b=2, m=9, got \[2\] float32"),
        ({"nasa_scale": Z(2, 8)}, r"nasa_scale must be .* \[b m\]"),
        ({"nasa_scale": Z(2, 9).int()}, "nasa_scale must be .* int32"),
        ({"nasa_scale": "1.0"}, r"nasa_scale must be a number or a tensor \[b m\], got '1.0'"),
        ({"backend": "cuda"}, "backend must be auto, fused or reference, got 'cuda'"),
        ({"k_neg": Z(2, 7, 8, 40, device="meta")}, "k_neg must be on cpu like q, got meta"),
    ],
)
def test_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_packs_check_their_parts() -> None:
    with pytest.raises(ValueError, match=r"v must be like k, \[1, 7, 8, 40\] float32"):
        ops.pack_text(Z(1, 7, 8, 40), Z(1, 7, 8, 41))
    with pytest.raises(ValueError, match=r"weight must be \[c_out c_in\]"):
        ops.pack_linear(Z(3))
    with pytest.raises(ValueError, match=r"bias must be \[c_out\] with c_out=3"):
        ops.pack_linear(Z(3, 4), Z(4))


def test_fused_is_refused_where_it_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(Case())
    meta = [x.to("meta") for x in (inputs.q, *inputs.texts)]
    with pytest.raises(ValueError, match=r"fused.* there is no fused kernel for meta"):
        ops.nasa_attention(*meta, nasa_scale=1.0, backend="fused")
    monkeypatch.setattr(native, "NATIVE", native.Native(False, "it is not built"))
    with pytest.raises(ValueError, match=r'backend="fused" is not possible here: it is not built'):
        call(backend="fused")
    with pytest.raises(ValueError, match="it is not built"):
        ops.twin_attention(inputs.q, *inputs.texts, backend="fused")
    assert torch.isfinite(call()).all()


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(Case())
    args = (inputs.q, *inputs.texts)
    assert ops.explain(*args, nasa_scale=0.0).path == "plain"
    assert ops.explain(*args, nasa_scale=1.0, backend="reference").path == "reference"
    if native.NATIVE.loaded:
        assert ops.explain(*args, nasa_scale=1.0).path == "fused"
        choice = ops.explain(inputs.q.requires_grad_(), *inputs.texts, nasa_scale=1.0)
        assert (choice.path, "gradient" in choice.why) == ("eager", True)
        few, text = torch.zeros(1, 16, 8, 160), torch.zeros(1, 77, 8, 160)
        choice = ops.explain(few, *[text] * 4, nasa_scale=1.0)
        assert (choice.path, "pack_text beforehand" in choice.why) == ("eager", True)
        many = torch.zeros(1, 65, 8, 160)
        assert ops.explain(many, *[text] * 4, nasa_scale=1.0).path == "fused"
        half = [x.bfloat16() for x in (few, *[text] * 4)]
        assert ops.explain(*half, nasa_scale=1.0).path == "fused"
    monkeypatch.setattr(native, "NATIVE", native.Native(False, "it is not built"))
    assert ops.explain(*args, nasa_scale=1.0) == ("eager", "it is not built")


def test_a_library_that_does_not_fit_is_said_once_and_survived(tmp_path: Any) -> None:
    assert native.load(tmp_path)[:2] == (False, "the native op snoopi/_cpu.so is not built")
    for content, why in [
        (b"?", "does not say which torch"),
        (b"SNOOPI_BUILT_FOR_TORCH=1.0.0\0", "it was built for torch 1.0.0, this is torch"),
        (f"SNOOPI_BUILT_FOR_TORCH={torch.__version__}\0".encode(), "cannot be loaded: .*_cpu.so"),
    ]:
        (tmp_path / "_cpu.so").write_bytes(content)
        with pytest.warns(UserWarning, match=why) as seen:
            assert not native.load(tmp_path).loaded
        assert len(seen) == 1
