"""Which calls on CUDA tensors take the fused kernels; tensors without memory stand in for a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from snoopi import ops
from snoopi.guidance import VSF
from snoopi.ops import native
from snoopi.ops.native import CUDA_TEXT, Native

HERE = Native(True, "native CUDA op")


class Positive(VSF):
    """A VSF whose formula leaves the negative alone: it computes nothing that asks for a device."""

    def combine(self, z_pos: Tensor, *others: Any) -> Tensor:
        return z_pos


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(native, "CUDA", HERE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return monkeypatch


def choice(d: int = 40, n: int = 77, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    with FakeTensorMode():
        q = torch.empty(2, 64, 3, d, dtype=dtype, device="cuda", **more)
        text = torch.empty(2, n, 3, d, dtype=dtype, device="cuda")
        return ops.explain(q, text, text, text, text, nasa_scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", native.CUDA_HEAD_DIMS)
def test_what_the_kernels_take(gpu: pytest.MonkeyPatch, d: int, dtype: torch.dtype) -> None:
    assert tuple(choice(d, CUDA_TEXT, dtype)) == ("fused", HERE.why)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"d": 48}, "heads of 48; there are 40, 64, 72, 80, 160"),
        ({"n": CUDA_TEXT + 1}, "texts of 512 keys at most, got 513"),
        ({"dtype": torch.float64}, "no fused CUDA kernel for torch.float64"),
        ({"requires_grad": True}, "a gradient is wanted"),
    ],
)
def test_what_they_do_not_take_is_eager(
    gpu: pytest.MonkeyPatch, call: dict[str, Any], why: str
) -> None:
    found = choice(**call)
    assert found.path == "eager" and why in found.why


def test_an_old_gpu_and_a_missing_op_are_said(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "capability 8.0, got 7.5" in choice().why
    gpu.setattr(native, "CUDA", Native(False, "the CUDA op snoopi/_cuda.so is not built"))
    assert tuple(choice()) == ("eager", "the CUDA op snoopi/_cuda.so is not built")


def test_texts_are_not_packed_on_cuda_and_vsf_is_combined(gpu: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 64, 3, 40, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, 77, 3, 40, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(50, 120, dtype=torch.bfloat16, device="cuda")
        text, out = ops.pack_text(k, k), ops.pack_linear(w)
        assert text.packed is None and out.packed is None
        z = ops.nasa_attention_packed(q, text, text, out, nasa_scale=0.5)
        assert z.shape == (2, 64, 50) and z.device.type == "cuda"
        assert ops.guided_attention(q, text, text, out, Positive(1.0)).shape == (2, 64, 50)


def test_a_library_that_does_not_load_is_warned_of(tmp_path: Path) -> None:
    assert native.load_cuda(tmp_path) == (
        False,
        "the CUDA op snoopi/_cuda.so is not built",
        *[False] * 4,
    )
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match=r"_cuda\.so cannot be loaded.*SNOOPI_BUILD=cuda"):
        assert not native.load_cuda(tmp_path).loaded
