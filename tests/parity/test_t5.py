"""The T5 encoder against transformers' T5EncoderModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snoopi import zoo
from snoopi.models.t5 import T5Config, T5Encoder
from tests.parity import oracle

pytestmark = pytest.mark.parity
TIED = "encoder.embed_tokens.weight"  # another name of shared.weight
TINY = T5Config(
    vocabulary=64, length=12, width=32, mlp_width=48, layers=3, heads=4, head_dim=12, buckets=8,
    max_distance=20,
)  # fmt: skip


def their_config(config: T5Config) -> Any:
    transformers = oracle.package("transformers")
    return transformers.T5Config(
        vocab_size=config.vocabulary,
        d_model=config.width,
        d_kv=config.head_dim,
        d_ff=config.mlp_width,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def their_state(net: Any) -> dict[str, Tensor]:
    return {k: v for k, v in net.state_dict().items() if k != TIED}


def pair(config: T5Config) -> tuple[T5Encoder, Any]:
    transformers = oracle.package("transformers")
    theirs = oracle.randomise(transformers.T5EncoderModel(their_config(config)))
    with torch.no_grad():  # logits of order 1: nothing divides them by sqrt(d)
        theirs.shared.weight.copy_(oracle.randn(*theirs.shared.weight.shape, seed=9))
        for block in theirs.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(config.head_dim**-0.5)
    assert theirs.encoder.embed_tokens.weight is theirs.shared.weight
    ours = T5Encoder(config).eval().requires_grad_(False)
    ours.load_state_dict(their_state(theirs), strict=True)
    return ours, theirs


def prompts(n: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded with 0, and their mask; one full row."""
    ids = torch.randint(2, 64, (4, n), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([1, n // 3, n // 2, n])
    mask = torch.arange(n) < ends[:, None]
    return ids * mask, mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("n", [1, 12, 77])
def test_hidden_states_equal_transformers(n: int, masked: bool) -> None:
    ours, theirs = pair(TINY)
    ids, mask = prompts(n)
    given = mask if masked else None

    def got() -> Tensor:
        return ours(ids, given).last

    def want() -> Tensor:
        all_ones = torch.ones_like(mask)
        return theirs(ids, attention_mask=(mask if masked else all_ones).long())[0]

    def report() -> str:
        return oracle.hidden_report(ours, theirs, got, want)

    oracle.close(f"T5 n={n} masked={masked}", got(), want(), report)


def test_xxl_has_the_published_names_and_shapes() -> None:
    transformers = oracle.package("transformers")
    ours = zoo.build("pixart-512", "text_encoder")
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(their_config(ours.config))
    expected = {k: v for k, v in oracle.shapes(theirs).items() if k != TIED}
    oracle.same_keys(oracle.shapes(ours), expected)
    assert oracle.count(ours) == 4_762_310_656
    assert len(ours.state_dict()) == 219


def test_distances_beyond_the_table_share_the_last_bucket() -> None:
    """The oracle's buckets, far past max_distance, at XXL's numbers."""
    attention = oracle.package("transformers.models.t5.modeling_t5").T5Attention
    from snoopi.models.t5 import bucket

    distance = torch.arange(-400, 401)
    want = attention._relative_position_bucket(distance, True, 32, 128)
    assert torch.equal(bucket(distance, 32, 128), want)
    assert bucket(distance, 32, 128).unique().numel() == 31  # 0 lies on one side only
