"""The shapes world: its draws, its captions and the held-out split."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from snoopi.noise import Noise
from snoopi.worlds import build
from snoopi.worlds.shapes import BARE, EMPTY, KEEP, PRIORS, ShapesWorld, bare_word, caption

WORLD = ShapesWorld()


@pytest.fixture(scope="module")
def many() -> tuple[list[str], torch.Tensor]:
    batch = WORLD.batch(Noise(5), 0, range(6000))
    return batch.captions, batch.labels


def within(count: int, n: int, p: float) -> bool:
    """A binomial count within five standard deviations: a wrong prior fails, chance does not."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1


def test_pictures_are_in_range_and_as_described() -> None:
    pictures, captions, labels = WORLD.batch(Noise(0), 3, range(10))
    assert pictures.shape == (10, 3, 32, 32) and pictures.dtype == torch.float32
    assert labels.shape == (10, 5) and labels.dtype == torch.int64 and len(captions) == 10
    assert pictures.min() >= -1 and pictures.max() <= 1


def test_a_picture_does_not_depend_on_its_batch() -> None:
    whole = WORLD.batch(Noise(0), 7, range(67))
    for part in ([11], list(range(40, 67)), [66, 3, 11]):
        again = WORLD.batch(Noise(0), 7, part)
        assert torch.equal(again.pictures, whole.pictures[part])
        assert torch.equal(again.labels, whole.labels[part])
        assert again.captions == [whole.captions[i] for i in part]


def test_seed_step_and_stream_each_change_the_batch() -> None:
    pictures = WORLD.batch(Noise(0), 0, range(8)).pictures
    assert torch.equal(pictures, WORLD.batch(Noise(0), 0, range(8)).pictures)
    for other in (
        WORLD.batch(Noise(1), 0, range(8)),
        WORLD.batch(Noise(0), 1, range(8)),
        WORLD.batch(Noise(0), 0, range(8), stream="other"),
    ):
        assert not torch.equal(pictures, other.pictures)


def test_labels_follow_the_priors(many: tuple[list[str], torch.Tensor]) -> None:
    labels = many[1]
    for column, (name, prior) in enumerate(PRIORS.items()):
        counts = torch.bincount(labels[:, column], minlength=len(prior)).tolist()
        for value, p in enumerate(prior):
            assert within(counts[value], len(labels), p), (name, value, counts)


def test_captions_follow_their_priors(many: tuple[list[str], torch.Tensor]) -> None:
    captions, n = many[0], len(many[0])
    assert within(captions.count(""), n, EMPTY)
    bare = [c for c in captions if c and not c.startswith("a ")]
    assert within(len(bare), n, BARE)
    # Redrawing shifts single attributes a little, so only the whole is held to KEEP closely.
    sentences = [WORLD.named(c) for c in captions if c.startswith("a ")]
    kept = sum(len(named) for named in sentences) / (5 * len(sentences))
    assert abs(kept - KEEP) < 0.03


def test_a_caption_names_only_what_is_true(many: tuple[list[str], torch.Tensor]) -> None:
    for text, row in zip(many[0], many[1].tolist(), strict=True):
        truth = dict(zip(WORLD.attributes, row, strict=True))
        assert WORLD.named(text).items() <= truth.items()


def test_named_inverts_every_caption() -> None:
    choices = [[None, *range(len(values))] for values in WORLD.attributes.values()]
    seen = {}
    for values in itertools.product(*choices):
        what = {n: v for n, v in zip(WORLD.attributes, values, strict=True) if v is not None}
        seen[caption(what)] = what
    assert len(seen) == 6 * 6 * 3 * 3 * 4  # no two combinations share a caption
    for name, words in WORLD.attributes.items():
        seen |= {bare_word(name, v): {name: v} for v in range(len(words))}
    seen[""] = {}
    assert all(WORLD.named(text) == what for text, what in seen.items())
    assert set(WORLD.captions()) == set(seen)


@pytest.mark.parametrize("text", ["white", "a red", "a red small circle", "A red circle", "shape "])
def test_named_refuses_what_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        WORLD.named(text)


def test_the_example_of_the_documentation() -> None:
    text = "a small striped red circle on a white background"
    assert WORLD.named(text) == {"shape": 0, "colour": 0, "size": 1, "fill": 1, "background": 0}


def test_held_out_captions_are_disjoint_from_training(
    many: tuple[list[str], torch.Tensor],
) -> None:
    train, held = set(WORLD.captions("train")), set(WORLD.captions("held-out"))
    assert not train & held
    assert train | held == set(WORLD.captions())
    assert 0.08 < len(held) / len(train | held) < 0.17
    assert all(len(WORLD.named(text)) >= 2 for text in held)
    assert not held & set(many[0])
    assert set(WORLD.prompts(Noise(0), 800, "held-out")) <= held
    assert set(WORLD.prompts(Noise(0), 800)) <= train


def test_prompts_are_distributed_like_the_training_captions(
    many: tuple[list[str], torch.Tensor],
) -> None:
    prompts, n = WORLD.prompts(Noise(1), 6000), 6000
    for text in ("", "red", "a red shape", "a large shape"):
        p = many[0].count(text) / n
        assert abs(prompts.count(text) / n - p) < 7 * math.sqrt(p / n) + 2 / n, text
    held = [WORLD.named(t) for t in WORLD.prompts(Noise(1), 6000, "held-out")]
    colours = np.bincount([what["colour"] for what in held if "colour" in what], minlength=5)
    # A hash decides what is held out, so the priors survive roughly: the order at the ends.
    assert colours[0] == colours.max() and colours[0] > 2 * colours[4]


def test_prompts_are_stateless() -> None:
    whole = WORLD.prompts(Noise(2), 30, "held-out")
    assert WORLD.prompts(Noise(2), indices=[29, 4], split="held-out") == [whole[29], whole[4]]
    assert WORLD.prompts(Noise(2), 30, "held-out", step=1) != whole


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_removal_cases_leave_the_attribute_open(split: str) -> None:
    for attribute in WORLD.attributes:
        cases = WORLD.removal_cases(Noise(0), attribute, 100, split)
        assert set(cases) <= set(WORLD.captions(split))
        named = [WORLD.named(text) for text in cases]
        assert all(what and attribute not in what for what in named)
        assert len(set(cases)) > 15


def test_bare_words() -> None:
    assert WORLD.bare_word("colour", 0) == "red"
    assert WORLD.bare_word("background", 0) == "white background"
    assert WORLD.named(WORLD.bare_word("fill", 1)) == {"fill": 1}


def test_users_mistakes_are_named() -> None:
    for call, message in (
        (lambda: WORLD.bare_word("weight", 0), "unknown attribute 'weight'"),
        (lambda: WORLD.bare_word("colour", 5), "values 0..4, got 5"),
        (lambda: WORLD.prompts(Noise(0), 3, "test"), "'train' or 'held-out', got 'test'"),
        (lambda: WORLD.prompts(Noise(0)), "count or indices"),
        (lambda: WORLD.prompts(Noise(0), 3, indices=[1]), "count or indices"),
        (lambda: build("cats"), "unknown world 'cats'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_render_refuses_bad_labels() -> None:
    nuisance = WORLD.nuisance(Noise(0), 0, [0])
    for labels in (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 5)):
        with pytest.raises(ValueError, match="int64"):
            WORLD.render(labels, nuisance)
    with pytest.raises(ValueError, match="must lie in"):
        WORLD.render(torch.tensor([[5, 0, 0, 0, 0]]), nuisance)


def test_what_the_pictures_show() -> None:
    """Size, fill, colour and background can be read off the pixels, so the labels are true."""
    labels = torch.tensor(list(itertools.product(*(range(len(v)) for v in PRIORS.values()))))
    pictures = WORLD.render(labels, WORLD.nuisance(Noise(0), 0, range(len(labels))))
    corners = pictures[:, :, :2, :2].mean((1, 2, 3))
    for value, grey in enumerate((0.92, 0.04, -0.88)):
        assert (corners[labels[:, 4] == value] - grey).abs().max() < 0.25
    saturation = pictures.amax(1) - pictures.amin(1)  # greys have none
    area = (saturation > 0.25).double().mean((1, 2))
    for shape in range(5):
        big, small = (area[(labels[:, 0] == shape) & (labels[:, 2] == s)] for s in (0, 1))
        assert big.min() > 1.5 * small.max()
    core = pictures[:, :, 15:17, 14:18].std(3).mean((1, 2))  # within the smallest shape
    assert core[labels[:, 3] == 1].min() > 2 * core[labels[:, 3] == 0].max()


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = WORLD.tokenizer()
    ids, mask = tokenizer(WORLD.captions())
    assert ids.shape == mask.shape == (len(WORLD.captions()), WORLD.max_tokens)
    assert len({tuple(row) for row in ids.tolist()}) == len(WORLD.captions())
    assert not any(tokenizer.unknown(word) for word in WORLD.vocabulary)
