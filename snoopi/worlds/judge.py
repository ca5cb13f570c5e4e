"""A small learned judge: which attributes does a generated picture show?

The renderer knows the truth about its own pictures; a generator's pictures need a reader. The judge
is a CNN with one head per attribute over 64 features, in which Frechet distances are taken too.

    python -m snoopi.worlds.judge --out FILE [--world W] [--steps N] [--seed N]

rebuilds a shipped file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from snoopi.noise import Noise
from snoopi.worlds import NAMES, Lesson, World, build

FORMAT = "snoopi-judge-1"


def shipped(world: str) -> Path:
    """The file of the judge that comes with a world."""
    return Path(__file__).parent / f"{world}_judge.safetensors"


SHIPPED = shipped("shapes")
CHUNK = 64  # every forward pass has this batch, so a label cannot depend on the caller's

NOISE_SD = 0.25  # of the training noise, drawn U(0, NOISE_SD) per picture
BLUR_SD = 1.0  # pixels, drawn U(0, BLUR_SD) for half the pictures
PATCH = 4  # latent-like compression: keep the first principal components of a patch
RANKS = (5, 24)
# Of a world's judge, where they are not the shapes world's.
SIZES: dict[str, dict[str, Any]] = {
    "emoji": {"widths": (32, 64, 96, 128), "absent": True},
}
OVERSHOOT = 1.5  # a generator may stray a little outside the world's own nuisance


class Judge(nn.Module):
    """Attribute classifier of 3-channel pictures in [-1, 1]; b pictures, a attributes.

    Beside the attributes it learns how noisy and blurred a picture is, so that its features, and
    the Frechet distance in them, see grain that the attribute heads are trained to ignore.

    absent: whether a picture may show none of an attribute's values; each head has an output more
    for that, which `labels` reports as -1.
    """

    def __init__(
        self,
        attributes: Mapping[str, Sequence[str]],
        size: int = 32,
        widths: Sequence[int] = (16, 32, 64, 64),
        features: int = 64,
        absent: bool = False,
    ) -> None:
        super().__init__()
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        self.size, self.widths, self.width, self.absent = size, tuple(widths), features, absent
        steps = zip((3, *widths), widths, strict=False)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(steps)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.embed = nn.Linear(widths[-1], features)
        self.heads = nn.ModuleList(
            nn.Linear(features, len(v) + absent) for v in attributes.values()
        )
        self.quality = nn.Linear(features, 2)  # noise sd and blur sd, as shares of their maxima

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [b 64] of pictures [b 3 size size]."""
        x = pictures
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))  # [b w size/2^i size/2^i]
        return self.embed(x.mean((2, 3)))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features, float32 [b 64] on the judge's device.

        Raises ValueError unless pictures are finite floats [b 3 size size].
        """
        _check_pictures(pictures, self.size)
        pictures = pictures.to(self.embed.weight)
        rows = []
        for part in pictures.split(CHUNK):
            padding = part.new_zeros(CHUNK - len(part), *part.shape[1:])
            rows.append(self(torch.cat([part, padding]))[: len(part)])
        return torch.cat(rows) if rows else pictures.new_zeros(0, self.width)

    @torch.no_grad()
    def labels(self, pictures: Tensor) -> Tensor:
        """The most likely value of each attribute, int64 [b a] on the CPU; -1: none."""
        return self.labels_of(self.features(pictures))

    @torch.no_grad()
    def labels_of(self, features: Tensor) -> Tensor:
        """The same from `features`, float32 [b 64]."""
        found = torch.stack([head(features).argmax(1) for head in self.heads], 1).cpu()
        counts = torch.tensor([len(values) for values in self.attributes.values()])
        return torch.where(found < counts, found, -1)

    def save(self, path: Path, provenance: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file at once: a reader sees the old file or the new one."""
        config: dict[str, Any] = {"attributes": self.attributes, "size": self.size}
        config |= {"widths": self.widths, "features": self.width}
        config |= {"absent": True} if self.absent else {}
        metadata = {"format": FORMAT, "config": json.dumps(config)}
        data = save(
            {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()},
            {**(provenance or {}), **metadata},
        )
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, source: Path | World = SHIPPED) -> Judge:
        """The judge in a file or the one shipped for a world (the shapes world), ready to judge.

        Raises ValueError for a file that is missing, truncated, or no judge.
        """
        path = source if isinstance(source, Path) else shipped(source.name)
        if not path.is_file():
            raise ValueError(f"{path}: no such judge file")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise ValueError(f"{path}: not a judge file: format {FORMAT!r} expected, got {found!r}")
        try:
            judge = cls(**json.loads(metadata["config"]))
            judge.load_state_dict(weights)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: weights do not fit the judge they claim: {error}") from error
        return judge.eval().requires_grad_(False)


def train_judge(
    world: World, noise: Noise, steps: int = 3000, batch: int = 64, lr: float = 4e-3
) -> Judge:
    """A judge trained on rendered pictures of the world's lessons, degraded at random.

    Deterministic in (noise.seed, steps, batch, lr) on one machine and thread count.
    """
    judge, tutor = _fresh(world, noise), _tutor(world, noise)
    basis = _patch_basis(world.batch(noise, 0, range(1024), stream="judge.basis").pictures)
    learning = [*judge.parameters(), *(tutor.parameters() if tutor else ())]
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        lesson, degraded = _lesson(world, noise, step, range(batch), basis)
        loss = _loss(judge, tutor, lesson, degraded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


def accuracy(judge: Judge, world: World, noise: Noise, count: int = 4096) -> dict[str, float]:
    """Share of right labels on clean rendered pictures, by attribute and "all" together."""
    right = []
    for start in range(0, count, CHUNK):
        indices = range(start, min(start + CHUNK, count))
        batch = world.batch(noise, 0, indices, stream="judge.accuracy")
        right.append(judge.labels(batch.pictures) == batch.labels)
    table = torch.cat(right)
    rates = dict(zip(world.attributes, table.double().mean(0).tolist(), strict=True))
    return {"all": table.all(1).double().mean().item(), **rates}


def _fresh(world: World, noise: Noise) -> Judge:
    """Untrained judge whose weights come from the noise, not from torch's global generator."""
    judge = Judge(world.attributes, world.size, **SIZES.get(world.name, {}))
    for index, weight in enumerate(judge.parameters()):
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            draw = noise.normal("judge.init", 0, [index], weight.shape)[0]
            weight.data = draw * math.sqrt(2 / fan_in)
        elif weight.ndim == 1:
            is_scale = any(weight is norm.weight for norm in judge.norms)
            weight.data = torch.full_like(weight, float(is_scale))
    return judge


def _tutor(world: World, noise: Noise) -> nn.Linear | None:
    """A head over the features that tells a world's subjects apart, thrown away after training.

    Without it the features, and the Frechet distance in them, would see nothing but attributes.
    """
    if not world.subjects:
        return None
    head = nn.Linear(Judge(world.attributes, world.size).width, world.subjects)
    draw = noise.normal("judge.tutor", 0, [0], head.weight.shape)[0]
    head.weight.data = draw / math.sqrt(head.in_features)
    head.bias.data.zero_()
    return head


def _lesson(
    world: World,
    noise: Noise,
    step: int,
    indices: Sequence[int],
    basis: tuple[Tensor, Tensor],
) -> tuple[Lesson, Tensor]:
    """A lesson of degraded pictures, and how degraded they are [b 2]."""
    lesson = world.lesson(noise, step, indices, OVERSHOOT)
    pictures = lesson.pictures
    u = noise.uniform("judge.degrade", step, indices, shape=(5,))  # [b 5]
    rank = (RANKS[0] + (RANKS[1] - RANKS[0]) * u[:, 0]).long()
    pictures = torch.where(
        (u[:, 1] < 1 / 3)[:, None, None, None], _compress(pictures, rank, basis), pictures
    )
    blur = BLUR_SD * (2 * u[:, 2] - 1).clamp(min=0)  # half stay sharp
    pictures = _blur(pictures, blur)
    sd = NOISE_SD * (1.25 * u[:, 3] - 0.25).clamp(min=0)  # a fifth stay clean
    grain = noise.normal("judge.noise", step, indices, pictures.shape[1:])
    pictures = pictures + sd[:, None, None, None] * grain
    return lesson._replace(pictures=pictures), torch.stack([sd / NOISE_SD, blur / BLUR_SD], 1)


def _loss(judge: Judge, tutor: nn.Linear | None, lesson: Lesson, degraded: Tensor) -> Tensor:
    features, labels = judge(lesson.pictures), lesson.labels
    loss = F.mse_loss(judge.quality(features), degraded)
    for i, (head, values) in enumerate(zip(judge.heads, judge.attributes.values(), strict=True)):
        wanted = labels[:, i].where(labels[:, i] >= 0, len(values))  # none: the output after them
        loss = loss + F.cross_entropy(head(features), wanted)
    if tutor is not None and lesson.subjects is not None:
        loss = loss + F.cross_entropy(tutor(features), lesson.subjects)
    return loss


def _patch_basis(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [p] and principal components [p p], strongest first, of PATCH x PATCH patches."""
    patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1).double()
    return patches.mean(0).float(), torch.linalg.eigh(torch.cov(patches.T))[1].flip(1).float()


def _compress(pictures: Tensor, rank: Tensor, basis: tuple[Tensor, Tensor]) -> Tensor:
    """What a linear patch autoencoder of that many channels leaves of each picture."""
    mean, components = basis
    codes = (F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2) - mean) @ components  # [b n p]
    codes = codes * (torch.arange(codes.shape[2]) < rank[:, None, None])
    patches = (codes @ components.T + mean).transpose(1, 2)
    return F.fold(patches, pictures.shape[2:], PATCH, stride=PATCH)


def _blur(pictures: Tensor, sd: Tensor) -> Tensor:
    """Gaussian blur by a standard deviation of its own for each picture, in pixels [b]."""
    b, c, h, w = pictures.shape
    taps = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sd[:, None].clamp(min=1e-3)) ** 2)  # [b 7]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # [bc 1 7]
    x = F.pad(pictures.reshape(1, b * c, h, w), (3, 3, 3, 3), mode="replicate")
    x = F.conv2d(x, kernel[:, :, None, :], groups=b * c)
    return F.conv2d(x, kernel[:, :, :, None], groups=b * c).view(b, c, h, w)


def _check_pictures(pictures: Tensor, size: int) -> None:
    shape = list(pictures.shape)
    if len(shape) != 4 or shape[1:] != [3, size, size] or not pictures.is_floating_point():
        raise ValueError(
            f"pictures must be float [b 3 {size} {size}], got {pictures.dtype} {shape}"
        )
    if not bool(pictures.isfinite().all()):
        raise ValueError("pictures must be finite, got NaN or infinite values")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a judge for a world, write it and print its accuracy."""
    parser = argparse.ArgumentParser(
        prog="python -m snoopi.worlds.judge",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--world", choices=NAMES, default="shapes", help="whose pictures it reads")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of 64 pictures")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise")
    options = parser.parse_args(arguments)
    if options.steps < 1 or not options.out.parent.is_dir():
        parser.error("--steps must be positive and the folder of --out must exist")
    world = build(options.world)
    if world.attribution:
        print(world.attribution)
    judge = train_judge(world, Noise(options.seed), options.steps)
    rates = accuracy(judge, world, Noise(options.seed + 1))
    of = "" if options.world == "shapes" else f" --world {options.world}"
    how = f"{of} --steps {options.steps} --seed {options.seed}"
    provenance = {
        "command": f"python -m snoopi.worlds.judge{how}",
        "steps": str(options.steps),
        "seed": str(options.seed),
        "accuracy": json.dumps(rates),
        "torch": torch.__version__,
    }
    judge.save(options.out, provenance)
    print("accuracy on clean pictures: " + ", ".join(f"{k} {v:.4f}" for k, v in rates.items()))
    print(f"wrote {options.out} ({options.out.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
