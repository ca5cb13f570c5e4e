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
MANY = "so many items, heads or queries"


class Positive(VSF):
    """A VSF whose formula leaves the negative alone: it computes nothing that asks for a device."""

    def combine(self, z_pos: Tensor, *others: Any) -> Tensor:
        return z_pos


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(native, "CUDA", HERE)
    monkeypatch.setattr(native, "device_trouble", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return monkeypatch


def choice(
    d: int = 40,
    n: int = 77,
    dtype: torch.dtype = torch.bfloat16,
    *,
    b: int = 2,
    m: int = 64,
    h: int = 3,
    every: int = 1,
    softmax_scale: float | None = None,
    **more: Any,
) -> Any:
    """What is chosen; `every`: q's tokens are one in so many of a tensor's."""
    with FakeTensorMode():
        strides = (m * every * h * d, every * h * d, d, 1)
        q = torch.empty_strided((b, m, h, d), strides, dtype=dtype, device="cuda", **more)
        text = torch.empty(1, n, h, d, dtype=dtype, device="cuda")
        texts = (text, text, text, text)
        return ops.explain(q, *texts, nasa_scale=0.5, softmax_scale=softmax_scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", native.CUDA_HEAD_DIMS)
def test_what_the_kernels_take(gpu: pytest.MonkeyPatch, d: int, dtype: torch.dtype) -> None:
    assert tuple(choice(d, CUDA_TEXT, dtype)) == ("fused", HERE.why)


@pytest.mark.parametrize("most", [{"b": 65535}, {"h": 65535, "m": 1, "n": 5}, {"m": 2**24, "h": 1}])
def test_how_large_calls_may_be(gpu: pytest.MonkeyPatch, most: dict[str, int]) -> None:
    assert choice(**most).path == "fused"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"d": 48}, "heads of 48; there are 40, 64, 72, 80, 160"),
        ({"n": CUDA_TEXT + 1}, "texts of 512 keys at most"),
        ({"dtype": torch.float64}, "no fused CUDA kernel for torch.float64"),
        ({"requires_grad": True}, "a gradient is wanted"),
        ({"softmax_scale": 0.0}, "a softmax_scale above 0"),
        ({"softmax_scale": -0.1}, "a softmax_scale above 0"),
        ({"softmax_scale": 1e-50}, "a softmax_scale above 0"),  # 0 in fp32
        ({"b": 65536}, MANY),
        ({"h": 65536, "m": 1, "n": 5}, MANY),
        ({"m": 2**24 + 1, "h": 1}, MANY),
        ({"m": 2**20, "h": 52}, MANY),  # an item of more than 2^31 elements
        ({"m": 2**20, "every": 18}, MANY),
    ],
)
def test_what_they_do_not_take_is_eager(
    gpu: pytest.MonkeyPatch, call: dict[str, Any], why: str
) -> None:
    found = choice(**call)
    assert found.path == "eager" and why in found.why


@pytest.mark.parametrize(
    ("d", "n", "softmax_scale"), [(40, 77, None), (48, 77, None), (40, 513, None), (40, 77, -0.1)]
)
def test_the_choice_compiles_into_the_graph(d: int, n: int, softmax_scale: float | None) -> None:
    """Also where sizes and numbers are symbols."""

    def called(q: Tensor, text: Tensor, scale: float | None) -> Tensor:
        return q + len(native.beyond_cuda(q, [text], scale) or "")

    compiled = torch.compile(called, backend="eager", fullgraph=True, dynamic=True)
    for more in (0, 1):
        q, text = torch.zeros(2, 64 + more, 3, d), torch.zeros(2, n + more, 3, d)
        assert torch.equal(compiled(q, text, softmax_scale), called(q, text, softmax_scale))


def test_what_keeps_the_op_from_a_device_is_said(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(native, "device_trouble", lambda index: f"no kernel image, {index}")
    assert tuple(choice()) == ("eager", "the CUDA op cannot run on cuda:0: no kernel image, 0")
    with FakeTensorMode(), pytest.raises(ValueError, match=r"not possible here.*no kernel image"):
        q = torch.empty(1, 5, 2, 40, device="cuda")
        ops.twin_attention(q, q, q, q, q, backend="fused")


def test_devices_are_asked_once_and_outside_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(native, "_device_trouble", lambda index: asked.append(index) or "trouble")

    def length(x: Tensor) -> Tensor:
        return x + len(native.device_trouble(1) or "")

    compiled = torch.compile(length, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [7, 7]
    compiled(torch.ones(2))
    assert asked == [1]


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


def test_packs_that_were_moved_to_a_device_are_taken_as_tensors(gpu: pytest.MonkeyPatch) -> None:
    k, w = torch.ones(1, 7, 2, 40), torch.ones(5, 80)
    text, out = ops.pack_text(k, k), ops.pack_linear(w)

    def moved(pack: Any) -> Any:
        def there(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")

        return pack._make(map(there, pack))

    with FakeTensorMode():
        q = torch.empty(2, 9, 2, 40, device="cuda")
        there, weights = moved(text), moved(out)
        assert (there.packed is None) == (text.packed is None)
        # snoopi::guided_attention has no kernel for CUDA, and its fake would say so of no device.
        gpu.setattr("snoopi.ops.library.guided_op", lambda *_: pytest.fail("a pack was read"))
        z = ops.nasa_attention_packed(q, there, there, weights, nasa_scale=0.5)
        assert z.shape == (2, 9, 5) and z.device.type == "cuda"
        assert ops.guided_attention(q, there, there, weights, Positive(1.0)).shape == (2, 9, 5)


def test_a_library_that_does_not_load_is_warned_of(tmp_path: Path) -> None:
    assert native.load_cuda(tmp_path) == (
        False,
        "the CUDA op snoopi/_cuda.so is not built",
        *[False] * 4,
    )
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match=r"_cuda\.so cannot be loaded.*SNOOPI_BUILD=cuda"):
        assert not native.load_cuda(tmp_path).loaded
