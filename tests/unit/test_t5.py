"""The T5 encoder alone: masks, precision, the shared table."""

from __future__ import annotations

import torch
from torch import Tensor

from snoopi.models.t5 import RMSNorm, T5Config, T5Encoder, bucket

CONFIG = T5Config(
    vocabulary=32, length=12, width=16, mlp_width=24, layers=3, heads=2, head_dim=8, eos_id=31
)
IDS = torch.randint(1, 32, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(12) < torch.tensor([[12], [5]])


def t5() -> T5Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5Encoder(CONFIG).eval().requires_grad_(False)


def test_padding_changes_no_token_of_the_text() -> None:
    net = t5()
    want = net(IDS[1:, :5]).last
    for pad in (0, 7):
        ids = torch.where(MASK, IDS, pad)
        got = net(ids, MASK).last
        torch.testing.assert_close(got[1:, :5], want, rtol=1e-5, atol=1e-5)
    assert (net(IDS).last[1:, :5] - want).abs().max() > 0.01  # without the mask it is read


def test_no_mask_is_a_mask_of_all() -> None:
    net = t5()
    everything = net(IDS, torch.ones_like(MASK)).last
    torch.testing.assert_close(net(IDS).last, everything, rtol=1e-6, atol=1e-6)


def test_a_text_without_a_token_is_finite() -> None:
    nobody = torch.zeros_like(MASK)
    assert t5()(IDS, nobody).last.isfinite().all()
    half = t5().to(torch.bfloat16)
    assert half(IDS, nobody).last.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert t5()(IDS, nobody).last.isfinite().all()


def test_order_is_seen_through_the_first_blocks_table_alone() -> None:
    net = t5()
    names = [name for name in net.state_dict() if "relative" in name]
    assert names == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    flipped = net(IDS.flip(1)).last.flip(1)
    assert (flipped - net(IDS).last).abs().max() > 0.01
    net.state_dict()[names[0]].zero_()
    torch.testing.assert_close(net(IDS.flip(1)).last.flip(1), net(IDS).last, rtol=1e-5, atol=1e-5)


def test_buckets_count_steps_then_widen_and_tell_before_from_after() -> None:
    def of(*distances: int) -> list[int]:
        return bucket(torch.tensor(distances), 32, 128).tolist()

    assert of(0, -1, -7, -8) == [0, 1, 7, 8]
    assert of(-15, -16, -127, -5000) == [9, 10, 15, 15]
    assert of(1, 7, 8, 5000) == [17, 23, 24, 31]


def test_logits_are_not_divided() -> None:
    """One head, one key heavier than the other by hand."""
    attention = t5().encoder.get_submodule("block")[0].layer[0].SelfAttention
    q, k, v = torch.ones(8), torch.ones(8) / 4, torch.eye(16)
    for linear in (attention.q, attention.k):
        linear.weight.zero_()
    attention.q.weight[:8, 0] = q
    attention.k.weight[:8, 0] = k
    attention.v.weight.copy_(v)
    attention.o.weight.copy_(torch.eye(16))
    x = torch.zeros(1, 2, 16)
    x[0, 0, 0] = 1.0  # q.k of the first token with itself is 8 / 4 = 2, with the second 0
    z: Tensor = attention(x, torch.zeros(1, 2, 2, 2), None)[0]
    torch.testing.assert_close(z[0, 0, 0], torch.sigmoid(torch.tensor(2.0)))


def test_the_norm_squares_in_fp32() -> None:
    norm = RMSNorm(4).half()
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square is beyond fp16
    assert torch.equal(norm(x), torch.ones_like(x))


def test_queries_start_smaller_by_the_root_of_the_head_dim() -> None:
    net = t5()
    before = net.blocks()[0].layer[0].SelfAttention.q.weight.clone()
    net.initialise()
    torch.testing.assert_close(
        net.blocks()[0].layer[0].SelfAttention.q.weight, before / CONFIG.head_dim**0.5
    )
