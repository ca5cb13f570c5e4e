"""The convolution op: every kind against fp64, odd sizes, what is folded in, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snoopi import ops
from snoopi.ops import Affine, ConvPack, reference
from snoopi.ops.native import NATIVE

SHAPES = [  # b, c_in, c_out, h, w
    (1, 32, 32, 8, 8),
    (2, 64, 96, 7, 5),
    (1, 96, 3, 13, 16),
    (3, 32, 40, 1, 1),
    (2, 160, 100, 24, 16),
    (1, 64, 64, 3, 33),
    (1, 32, 700, 17, 17),
]
KINDS = ("direct", "winograd", "doubled", "phased")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Of eager's error in the same chain. Winograd rounds transformed pixels and filters to bf16, and
# its sums of them are larger; eager rounds after every step of the chain.
WORST = 2.0

native = pytest.mark.skipif(not NATIVE.projects, reason=f"no packed weights: {NATIVE.why}")


def packed(weight: Tensor, kind: str) -> ConvPack:
    """A pack of one kind, whatever this processor would choose."""
    sizes = (weight.shape[0], weight.shape[1], weight.dtype)
    if not torch.ops.snoopi.conv_bytes(kind, *sizes):
        pytest.skip(f"this processor's kernel has no {kind} convolution in {weight.dtype}")
    doubled = kind in ("doubled", "phased")
    return ConvPack(weight, doubled, kind, torch.ops.snoopi.pack_conv(weight, kind))


def draw(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, added, scale, shift, residual."""
    b, c_in, c_out, h, w = shape
    g = torch.Generator().manual_seed(h * w + c_in)
    times = 2 if kind in ("doubled", "phased") else 1

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    weight = normal(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5
    x, residual = normal(b, c_in, h, w), normal(b, c_out, h * times, w * times)
    small = normal(b, c_out), 1 + 0.3 * normal(b, c_in), normal(b, c_in)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(dtype), weight.to(dtype), *(y.to(wide) for y in small), residual.to(dtype))


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def eager(x: Tensor, pack: ConvPack, added: Tensor, norm: Affine, residual: Tensor) -> Tensor:
    """The chain as separate steps, each rounded."""
    scale, shift = (y[:, :, None, None] for y in norm)
    y = F.silu((x.to(scale.dtype) * scale + shift).to(x.dtype))
    y = F.interpolate(y, scale_factor=2.0) if pack.doubled else y
    y = F.conv2d(y, pack.weight, padding=pack.weight.shape[-1] // 2)
    return y + added.to(x.dtype)[:, :, None, None] + residual


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_chain(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x, weight, added, scale, shift, residual = draw(shape, kind, dtype)
    pack, norm = packed(weight, kind), Affine(scale, shift)
    got = ops.conv(x, pack, added, norm=norm, silu=True, residual=residual)
    wide = [y.double() for y in (x, weight, added, scale, shift, residual)]
    truth = reference.conv(*wide[:2], pack.doubled, *wide[2:5], True, wide[5])
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float64:
        assert error(got, truth) < 1e-14
    else:
        allowed = error(eager(x, pack, added, norm, residual), truth)
        assert error(got, truth) <= WORST * allowed


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_in_parts(kind: str, dtype: torch.dtype) -> None:
    x, weight, added, scale, shift, residual = draw((2, 64, 48, 9, 10), kind, dtype)
    pack, norm = packed(weight, kind), Affine(scale, shift)
    wide = weight.double()
    bound = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 6e-3}[dtype]

    def check(*expected: Tensor | bool | None, **words: object) -> None:
        got = ops.conv(x, pack, **words)  # type: ignore[arg-type]
        args = [y.double() if isinstance(y, Tensor) else y for y in expected]
        assert error(got, reference.conv(x.double(), wide, pack.doubled, *args)) < bound

    check(None, None, None, False, None)
    check(None, None, None, True, None, silu=True)
    check(None, scale, shift, False, None, norm=norm)
    check(added, None, None, False, None, added=added)
    check(added[:1], None, None, False, None, added=added[:1])  # one for the batch
    check(None, None, None, False, residual, residual=residual)


@native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda x: str(x)[6:])
def test_a_picture_in_rows_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """The layout of the input and the threads change no bit; a batch is its pictures."""
    x, weight, added, scale, shift, residual = draw((3, 96, 70, 18, 20), "direct", dtype)
    pack, norm = ops.pack_conv(weight), Affine(scale, shift)
    whole = ops.conv(x, pack, added, norm=norm, silu=True, residual=residual)
    lasting = [y.contiguous(memory_format=torch.channels_last) for y in (x, residual)]
    other = ops.conv(lasting[0], pack, added, norm=norm, silu=True, residual=lasting[1])
    assert torch.equal(other, whole)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for i in range(3):
                one = Affine(scale[i : i + 1], shift[i : i + 1])
                rest = {"norm": one, "residual": residual[i : i + 1]}
                got = ops.conv(x[i : i + 1], pack, added[i : i + 1], silu=True, **rest)  # type: ignore[arg-type]
                assert torch.equal(got[0], whole[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm(mean: float, dtype: torch.dtype) -> None:
    """As scale and shift it equals GroupNorm, of a mean far from 0, too."""
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 64, 19, 17, generator=g) + mean).to(dtype)
    norm = nn.GroupNorm(16, 64, eps=1e-6).double().requires_grad_(False)
    norm.weight.copy_(torch.randn(64, generator=g)), norm.bias.copy_(torch.randn(64, generator=g))
    truth = norm(x.double())
    gains = (norm.weight.to(dtype), norm.bias.to(dtype))
    norm.weight.copy_(gains[0]), norm.bias.copy_(gains[1])
    scale, shift = ops.group_norm_fold(x, 16, *gains, 1e-6)
    got = x.double() * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
    truth = norm(x.double())
    # scale x + shift in fp32 loses what the mean is larger than the spread.
    assert error(got, truth) < (1e-12 if dtype == torch.float64 else 5e-7 * (1 + mean))


def test_what_is_not_native_is_the_reference() -> None:
    x, weight, added, scale, shift, residual = draw((2, 12, 8, 5, 6), "direct", torch.float32)
    pack = ops.pack_conv(weight)  # 12 channels: no kernel
    assert pack.packed is None
    got = ops.conv(x, pack, added, norm=Affine(scale, shift), silu=True, residual=residual)
    expected = reference.conv(x, weight, False, added, scale, shift, True, residual)
    assert torch.equal(got, expected)
    half = ops.pack_conv(weight.half(), doubled=True)
    assert half.packed is None and ops.conv(x.half(), half).shape == (2, 8, 10, 12)


@native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("doubled", [False, True])
def test_opcheck(doubled: bool, dtype: torch.dtype) -> None:
    x, weight, added, scale, shift, _ = draw((1, 32, 16, 4, 4), "direct", dtype)
    pack = ops.pack_conv(weight, doubled=doubled)
    args = (x, pack.packed, pack.kind, 16, scale, shift, True, added, None)
    torch.library.opcheck(torch.ops.snoopi.conv, args)
    torch.library.opcheck(torch.ops.snoopi.pack_conv, (weight, pack.kind))
    torch.library.opcheck(torch.ops.snoopi.group_norm_fold, (x, 8, None, None, 1e-5))


def test_mistakes_are_named() -> None:
    x, weight = torch.randn(2, 32, 4, 4), torch.randn(8, 32, 3, 3)
    pack = ops.pack_conv(weight)
    with pytest.raises(ValueError, match=r"weight must be .*got \[8, 32, 5, 5\]"):
        ops.pack_conv(torch.randn(8, 32, 5, 5))
    with pytest.raises(ValueError, match=r"weight must be \[c_out c_in 3 3\], got \[8, 32, 1, 1\]"):
        ops.pack_conv(torch.randn(8, 32, 1, 1), doubled=True)
    with pytest.raises(ValueError, match=r"x must be \[b 32 h w\], got \[2, 31, 4, 4\]"):
        ops.conv(x[:, 1:], pack)
    with pytest.raises(ValueError, match=r"added must be \[2, 8\], got \[3, 8\]"):
        ops.conv(x, pack, torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"residual must be \[2, 8, 4, 4\], got \[2, 8, 4, 5\]"):
        ops.conv(x, pack, residual=torch.randn(2, 8, 4, 5))
    with pytest.raises(ValueError, match=r"norm.scale must be \[2, 32\], got \[32, 2\]"):
        ops.conv(x, pack, norm=Affine(torch.ones(32, 2), torch.ones(2, 32)))
    with pytest.raises(ValueError, match="c a multiple of 5"):
        ops.group_norm_fold(x, 5, None, None, 1e-5)


@native
def test_foreign_packs_are_refused() -> None:
    x, weight = torch.randn(1, 32, 4, 4), torch.randn(8, 32, 3, 3)
    pack = ops.pack_conv(weight)
    assert pack.packed is not None
    with pytest.raises(RuntimeError, match=r"packed .* weight of 32 to 8 channels must be"):
        ops.conv(x, pack._replace(packed=pack.packed[1:]))
    with pytest.raises(RuntimeError, match="a convolution must be direct"):
        torch.ops.snoopi.pack_conv(weight, "sideways")
