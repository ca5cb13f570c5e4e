"""The shapes world: captioned 32x32 pictures whose attributes are known exactly.

Letters: b pictures, h w pixels, a = 5 attributes, u uniform draws of one picture.

A picture has five attributes; a caption names some of them:

    a small striped red circle on a white background        every attribute named
    a striped shape                                         the shape and three others left open
    white background | red                                  one bare word
    (empty)

Every caption that names two attributes or more is, by a hash of its text, either a training
caption or a held-out one, so prompts of the held-out split were never seen in training.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from snoopi.noise import Noise
from snoopi.worlds.base import Avoid, Batch, Example, Lesson, World, categorical

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross"),
    "colour": ("red", "green", "blue", "yellow", "purple"),
    "size": ("large", "small"),
    "fill": ("solid", "striped"),
    "background": ("white", "grey", "black"),
}
# Skewed on purpose: a mode that is rare in the data is what distillation loses first.
PRIORS: dict[str, tuple[float, ...]] = {
    "shape": (0.30, 0.25, 0.20, 0.15, 0.10),
    "colour": (0.35, 0.25, 0.18, 0.12, 0.10),
    "size": (0.60, 0.40),
    "fill": (0.65, 0.35),
    "background": (0.50, 0.30, 0.20),
}
KEEP, BARE, EMPTY = 0.65, 0.12, 0.10  # an attribute is named; a bare word; no caption at all
HELD_OUT = 8  # one caption in HELD_OUT is never trained on

COLOURS = (
    (0.88, 0.14, 0.14),
    (0.12, 0.66, 0.22),
    (0.13, 0.30, 0.90),
    (0.97, 0.82, 0.08),
    (0.60, 0.16, 0.72),
)
GREYS = (0.96, 0.52, 0.06)
RADII = (0.66, 0.39)  # large, small; the picture spans [-1, 1]

# The nuisance of a picture: what a caption never names.
JITTER_SD = 0.05  # of each colour channel, in [0, 1] units
CENTRE = 0.10
ROTATION = 0.06  # radians
GRADIENT = 0.06  # of the background from edge to centre, in [0, 1] units
EDGE = 1.4  # pixels: a little softer than a box filter, worth 1.8 dB to a 4x4 patch latent
STRIPE_PERIOD = 0.34  # 5.4 pixels: not a multiple of a latent patch
STRIPE_BLEND = 0.65  # how far the second stripe lies from the colour towards the background

SENTENCE = re.compile(
    r"a(?: (?P<size>{size}))?(?: (?P<fill>{fill}))?(?: (?P<colour>{colour}))?"
    r" (?P<shape>shape|{shape})(?: on a (?P<background>{background}) background)?".format(
        **{name: "|".join(values) for name, values in ATTRIBUTES.items()}
    )
)


class Nuisance(NamedTuple):
    """What varies between pictures of one combination; all float64."""

    jitter: Tensor  # [b 3] added to the colour
    centre: Tensor  # [b 2] x, y
    rotation: Tensor  # [b] radians
    phase: Tensor  # [b] of the stripes, in periods
    gradient: Tensor  # [b 2] of the background along x, y


class _Captions(NamedTuple):
    """Every caption with its probabilities; the rows of the tables are label combinations."""

    texts: list[str]  # [s] all distinct captions
    named: list[dict[str, int]]  # [s] what each one names
    choice: np.ndarray  # [300 k] which caption each way of speaking gives
    train: np.ndarray  # [300 k] probability of it in training, 0 where held out
    held_out: np.ndarray  # [s] probability among the held-out prompts, 0 for the others
    marginal: np.ndarray  # [s] probability among the training captions


def caption(named: dict[str, int]) -> str:
    """The sentence that names exactly these attributes (name -> value index)."""
    words = ["a"]
    words += [ATTRIBUTES[name][named[name]] for name in ("size", "fill", "colour") if name in named]
    words.append(ATTRIBUTES["shape"][named["shape"]] if "shape" in named else "shape")
    if "background" in named:
        words += ["on", "a", ATTRIBUTES["background"][named["background"]], "background"]
    return " ".join(words)


def bare_word(attribute: str, value: int) -> str:
    """The shortest caption of one value: "red", "striped", "white background"."""
    word = ATTRIBUTES[attribute][value]
    return f"{word} background" if attribute == "background" else word


def held_out(text: str, named: int) -> bool:
    """Whether a caption naming that many attributes is kept away from training."""
    return named >= 2 and zlib.crc32(text.encode()) % HELD_OUT == 0


class ShapesWorld(World):
    """Procedural captioned pictures; every draw is a function of (seed, stream, step, index)."""

    name = "shapes"
    size = 32
    attributes = ATTRIBUTES
    priors = PRIORS
    example = Example("a large solid shape on a white background", "colour", 0)

    def batch(
        self, noise: Noise, step: int, indices: Sequence[int], stream: str = "world"
    ) -> Batch:
        """Training pictures with captions; picture i does not depend on its neighbours."""
        draws = noise.uniform(stream, step, indices, shape=(15,)).double()  # [b u]
        labels = _labels(draws[:, :5])
        pictures = self.render(labels, _nuisance(draws[:, 5:14]))
        return Batch(pictures, _speak(labels, draws[:, 14].numpy()), labels)

    def lesson(self, noise: Noise, step: int, indices: Sequence[int], overshoot: float) -> Lesson:
        """Pictures and labels of every combination alike, for a judge.

        overshoot: how much wider than the world's the jitter, the centre and the rotation spread.
        """
        columns = [
            noise.integers(f"judge.{name}", step, indices, 0, len(values))
            for name, values in ATTRIBUTES.items()
        ]
        labels = torch.stack(columns, 1)
        drawn = self.nuisance(noise, step, indices, stream="judge.nuisance")
        wide = drawn._replace(
            jitter=overshoot * drawn.jitter,
            centre=overshoot * drawn.centre,
            rotation=overshoot * drawn.rotation,
        )
        return Lesson(self.render(labels, wide), labels)

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
        """A real picture of each prompt [n 3 32 32]: it shows what the prompt names.

        What the prompt leaves open follows the priors; the attribute of `avoid` follows them among
        its other values.
        """
        labels = self.batch(noise, step, indices, stream).labels  # [n a]
        for row, prompt in enumerate(prompts):
            for name, value in self.named(prompt).items():
                labels[row, list(ATTRIBUTES).index(name)] = value
        if avoid is not None:
            weights = torch.tensor(PRIORS[avoid.attribute], dtype=torch.float64)
            weights = weights.repeat(len(prompts), 1)
            weights[torch.arange(len(prompts)), avoid.values] = 0
            edges = weights.cumsum(1)
            u = noise.uniform(f"{stream}.open", step, indices).double()
            column = list(ATTRIBUTES).index(avoid.attribute)
            labels[:, column] = (u[:, None] * edges[:, -1:] >= edges).sum(1)
        return self.render(labels, self.nuisance(noise, step, indices, nuisance))

    def nuisance(
        self, noise: Noise, step: int, indices: Sequence[int], stream: str = "world.nuisance"
    ) -> Nuisance:
        """Nuisance draws alone, to render combinations of one's own choice."""
        return _nuisance(noise.uniform(stream, step, indices, shape=(9,)).double())

    def render(self, labels: Tensor, nuisance: Nuisance) -> Tensor:
        """Antialiased pictures [b 3 32 32] in [-1, 1] of labels [b a].

        Raises ValueError for labels of another shape or out of range.
        """
        _check_labels(labels)
        radius = torch.tensor(RADII, dtype=torch.float64)[labels[:, 2]]
        x, y = _frame(self.size, nuisance)  # [b h w], the shape's own axes
        inside = _coverage(_distance(labels[:, 0], x, y, radius), 2 / self.size)
        paper = _background(self.size, labels[:, 4], nuisance.gradient)  # [b h w]
        ink = torch.tensor(COLOURS, dtype=torch.float64)[labels[:, 1]] + nuisance.jitter  # [b 3]
        faded = STRIPE_BLEND * _stripes(x, nuisance.phase, 2 / self.size)
        inside = inside * (1 - faded * (labels[:, 3] == 1)[:, None, None].float())
        pictures = torch.lerp(paper[:, None], ink.float()[:, :, None, None], inside[:, None])
        return pictures.clamp(0, 1) * 2 - 1  # [b 3 h w]

    def named(self, text: str) -> dict[str, int]:
        """What a caption names: attribute -> value index. Inverts every caption exactly.

        Raises ValueError for a text that is not a caption of this world.
        """
        found = _bare_words().get(text)
        if found is not None:
            return dict([found])
        if text == "":
            return {}
        match = SENTENCE.fullmatch(text)
        if match is None:
            raise ValueError(f"not a caption of the shapes world: {text!r}")
        groups = match.groupdict()
        return {
            name: values.index(groups[name])
            for name, values in ATTRIBUTES.items()
            if groups[name] in values
        }

    def _texts(self) -> list[str]:
        return _captions().texts

    def _weights(self, split: str) -> np.ndarray:
        return _weights(split)

    def _case_weights(self, attribute: str, split: str) -> np.ndarray:
        """Of sentences that name at least one other attribute."""
        table = _captions()
        fits = [
            text.startswith("a ") and bool(named) and attribute not in named
            for text, named in zip(table.texts, table.named, strict=True)
        ]
        return _weights(split) * np.array(fits)

    def _bare_word(self, attribute: str, value: int) -> str:
        return bare_word(attribute, value)


# --- captions --------------------------------------------------------------------------------


@functools.cache
def _captions() -> _Captions:
    combinations = list(itertools.product(*(range(len(v)) for v in ATTRIBUTES.values())))
    chances = np.array([math.prod(_chance(c)) for c in combinations])
    ways = list(itertools.product((True, False), repeat=5))  # which attributes are named
    odds = np.array([math.prod(KEEP if kept else 1 - KEEP for kept in way) for way in ways])
    number: dict[str, int] = {}
    named: list[dict[str, int]] = []

    def enter(text: str, what: dict[str, int]) -> int:
        if text not in number:
            number[text] = len(number)
            named.append(what)
        return number[text]

    choice = []
    for values in combinations:
        truth = dict(zip(ATTRIBUTES, values, strict=True))
        parts = [{n: truth[n] for n, k in zip(truth, way, strict=True) if k} for way in ways]
        row = [enter(caption(part), part) for part in parts]
        row += [enter(bare_word(n, v), {n: v}) for n, v in truth.items()] + [enter("", {})]
        choice.append(row)
    table = np.array(choice)  # [300 32 + 5 + 1]
    hidden = np.array([held_out(t, len(n)) for t, n in zip(number, named, strict=True)])
    spoken = np.where(hidden[table[:, :32]], 0.0, odds)
    # Renormalising the ways left is the same as redrawing until the caption may be trained on.
    spoken *= (1 - BARE - EMPTY) / spoken.sum(1, keepdims=True)
    train = np.hstack([spoken, np.full((300, 5), BARE / 5), np.full((300, 1), EMPTY)])
    marginal = np.bincount(table.ravel(), (train * chances[:, None]).ravel(), len(number))
    plain = np.bincount(table[:, :32].ravel(), (odds * chances[:, None]).ravel(), len(number))
    return _Captions(list(number), named, table, train, plain * hidden, marginal)


def _chance(combination: Sequence[int]) -> list[float]:
    return [PRIORS[n][v] for n, v in zip(ATTRIBUTES, combination, strict=True)]


@functools.cache
def _bare_words() -> dict[str, tuple[str, int]]:
    return {bare_word(n, v): (n, v) for n, words in ATTRIBUTES.items() for v in range(len(words))}


def _speak(labels: Tensor, u: np.ndarray) -> list[str]:
    """One training caption for each row of labels [b a], by one uniform draw each."""
    table = _captions()
    rows = np.ravel_multi_index(labels.T.numpy(), tuple(len(v) for v in ATTRIBUTES.values()))
    edges = np.cumsum(table.train[rows], 1)  # [b k]
    ways = (u[:, None] * edges[:, -1:] >= edges).sum(1)
    return [table.texts[i] for i in table.choice[rows, ways]]


def _weights(split: str) -> np.ndarray:
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', got {split!r}")
    return _captions().marginal if split == "train" else _captions().held_out


# --- drawing ---------------------------------------------------------------------------------


def _labels(u: Tensor) -> Tensor:
    """Attribute values by their priors: uniform [b a] -> int64 [b a]."""
    columns = [categorical(np.array(PRIORS[n]), u[:, i].numpy()) for i, n in enumerate(ATTRIBUTES)]
    return torch.from_numpy(np.stack(columns, 1))


def _nuisance(u: Tensor) -> Nuisance:
    """Uniform [b 9] in [0, 1) -> nuisance of b pictures."""
    spread = u * 2 - 1
    # The half step of a float32 draw keeps the normal quantile finite at u = 0.
    jitter = JITTER_SD * torch.special.ndtri(u[:, :3] + 2**-26)
    angle, strength = 2 * math.pi * u[:, 7], GRADIENT * u[:, 8]
    gradient = torch.stack([strength * angle.cos(), strength * angle.sin()], 1)
    return Nuisance(jitter, CENTRE * spread[:, 3:5], ROTATION * spread[:, 5], u[:, 6], gradient)


def _check_labels(labels: Tensor) -> None:
    counts = torch.tensor([len(v) for v in ATTRIBUTES.values()])
    if labels.ndim != 2 or labels.shape[1] != 5 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [b 5], got {labels.dtype} {list(labels.shape)}")
    if bool(((labels < 0) | (labels >= counts)).any()):
        raise ValueError(f"labels must lie in 0..{(counts - 1).tolist()}, got {labels.tolist()}")


def _axis(size: int) -> Tensor:
    """Pixel centres in [-1, 1]."""
    return (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1


def _frame(size: int, nuisance: Nuisance) -> tuple[Tensor, Tensor]:
    """Pixel positions in each shape's own axes, y upwards: two float32 [b h w]."""
    axis = _axis(size)
    cx, cy = nuisance.centre.float()[:, :, None, None].unbind(1)
    cos, sin = (f(nuisance.rotation).float()[:, None, None] for f in (torch.cos, torch.sin))
    x, y = axis[None, None, :] - cx, -axis[None, :, None] - cy
    return cos * x + sin * y, cos * y - sin * x


def _coverage(distance: Tensor, pixel: float) -> Tensor:
    """How much of each pixel lies inside, from the signed distance of its centre."""
    return (0.5 - distance / (EDGE * pixel)).clamp(0, 1)


def _distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to each picture's outline, negative inside: [b h w]."""
    out = torch.empty_like(x)
    for value, outline in enumerate((_circle, _square, _triangle, _star, _cross)):
        rows = (shape == value).nonzero()[:, 0]
        out[rows] = outline(x[rows], y[rows], radius.float()[rows, None, None])
    return out


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    y = y + 0.15 * r  # the centroid lies below the middle of the height
    side = x.abs() * math.cos(math.pi / 6) + y * 0.5
    return torch.maximum(side, -y) - 0.64 * r


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points, folded into one half point: a line from the tip to the notch."""
    tip, notch, half = 1.32, 0.58, math.pi / 5
    angle = torch.atan2(x, y)
    angle = (torch.remainder(angle + half, 2 * half) - half).abs()
    length = (x * x + y * y).sqrt()
    u, v = length * angle.cos(), length * angle.sin()
    du, dv = notch * math.cos(half) - tip, notch * math.sin(half)
    norm = math.hypot(du, dv)
    return ((u - tip * r) * dv - v * du) / norm


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    long, wide = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 1.05 * r, wide - 0.38 * r)


def _stripes(x: Tensor, phase: Tensor, pixel: float) -> Tensor:
    """Antialiased upright stripes, 0 or 1 away from the edges: [b h w]."""
    turns = x / STRIPE_PERIOD + phase.float()[:, None, None]
    edge = (torch.remainder(turns, 1) - 0.5).abs() - 0.25  # in periods, signed
    return _coverage(-edge * STRIPE_PERIOD, pixel)


def _background(size: int, value: Tensor, gradient: Tensor) -> Tensor:
    """A grey with a slight linear gradient: [b h w]."""
    axis = _axis(size)
    gx, gy = gradient.float()[:, :, None, None].unbind(1)
    grey = torch.tensor(GREYS)[value][:, None, None]
    return grey + gx * axis[None, None, :] + gy * axis[None, :, None]
