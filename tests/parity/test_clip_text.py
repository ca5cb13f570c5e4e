"""CLIP text encoders against transformers' CLIPTextModel and CLIPTextModelWithProjection."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from snoopi import zoo
from snoopi.models.clip import CLIPText, CLIPTextConfig
from tests.parity import oracle

pytestmark = pytest.mark.parity
VOCABULARY, LENGTH, BOS, EOS = 64, 12, 62, 63


def their_config(config: CLIPTextConfig, eos_id: int) -> Any:
    transformers = oracle.package("transformers")
    return transformers.CLIPTextConfig(
        vocab_size=config.vocabulary,
        max_position_embeddings=config.length,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection or 512,
        bos_token_id=0,
        eos_token_id=eos_id,
        pad_token_id=1,
    )


def their_shapes(net: Any) -> dict[str, tuple[int, ...]]:
    """Names as in the files: `text_model.` in front of the encoder, no position_ids buffer."""
    found = {k: v for k, v in oracle.shapes(net).items() if "position_ids" not in k}
    # From release 5 on, transformers adds the prefix of a bare CLIPTextModel on saving only.
    bare = not any(k.startswith("text_model.") for k in found)
    return {f"text_model.{k}" if bare else k: v for k, v in found.items()}


def pair(config: CLIPTextConfig, eos_id: int = EOS) -> tuple[CLIPText, Any]:
    transformers = oracle.package("transformers")
    kind = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    theirs = oracle.randomise(getattr(transformers, kind)(their_config(config, eos_id)))
    ours = CLIPText(config).eval().requires_grad_(False)
    oracle.same_keys(oracle.shapes(ours), their_shapes(theirs))
    state = {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k}
    if not config.projection:
        state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def prompts(pad: int) -> torch.Tensor:
    """Rows of different lengths: bos, words, eos, padding; one full row."""
    ids = torch.randint(2, BOS, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    for row, end in enumerate((1, 4, 8, LENGTH - 1)):
        ids[row, end] = EOS
        ids[row, end + 1 :] = pad
    return ids


@pytest.mark.parametrize("pad", [EOS, 0])
@pytest.mark.parametrize("projection", [None, 20])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_outputs_equal_transformers(activation: Any, projection: int | None, pad: int) -> None:
    config = CLIPTextConfig(
        VOCABULARY, LENGTH, 32, 80, 3, 4, activation, projection=projection, eos_id=EOS
    )
    ours, theirs = pair(config)
    ids = prompts(pad)
    want, got = theirs(ids, output_hidden_states=True), ours(ids)
    name = f"{activation} projection={projection} pad={pad}"
    oracle.close(f"{name} last", got.last, want.last_hidden_state)
    oracle.close(f"{name} penultimate", got.penultimate, want.hidden_states[-2])
    pooled = want.text_embeds if projection else want.pooler_output
    oracle.close(f"{name} pooled", got.pooled, pooled)


def test_legacy_eos_id_means_the_largest_id() -> None:
    """Published configs say eos_token_id 2; transformers then pools at the largest id."""
    config = CLIPTextConfig(VOCABULARY, LENGTH, 32, 80, 2, 4, projection=20, eos_id=EOS)
    ours, theirs = pair(config, eos_id=2)
    ids = prompts(EOS)
    oracle.close("legacy eos pooled", ours(ids).pooled, theirs(ids).text_embeds)


def test_shorter_prompts_and_one_layer_equal_transformers() -> None:
    ours, theirs = pair(CLIPTextConfig(VOCABULARY, LENGTH, 32, 80, 1, 4, eos_id=EOS))
    ids = prompts(EOS)[:, :5]
    want, got = theirs(ids, output_hidden_states=True), ours(ids)
    oracle.close("short last", got.last, want.last_hidden_state)
    oracle.close("short penultimate", got.penultimate, want.hidden_states[-2])


@pytest.mark.parametrize(
    ("preset", "part", "params", "tensors"),
    [
        ("sd15", "text_encoder", 123_060_480, 196),
        ("sd21", "text_encoder", 340_387_840, 372),
        ("sdxl", "text_encoder", 123_060_480, 196),
        ("sdxl", "text_encoder_2", 694_659_840, 517),
    ],
)
def test_presets_have_the_published_names_and_shapes(
    preset: str, part: str, params: int, tensors: int
) -> None:
    transformers = oracle.package("transformers")
    ours = zoo.build(preset, part)
    config = ours.config
    kind = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    with torch.device("meta"):
        theirs = getattr(transformers, kind)(their_config(config, 49407))
    oracle.same_keys(oracle.shapes(ours), their_shapes(theirs))
    assert (oracle.count(ours), len(ours.state_dict())) == (params, tensors)
    assert (config.length, config.vocabulary, config.eos_id) == (77, 49408, 49407)
