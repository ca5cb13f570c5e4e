"""Sets of pictures in folders: drawn by a model and resumed, or found; with their prompts.

A set that was drawn here holds manifest.json (what decides its pixels), prompts.jsonl (a line
{"file", "prompt", "negative"} for each picture) and the pictures. Picture i starts from noise i of
the seed, so that it is the same whichever rank draws it and whenever.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from snoopi.errors import writing
from snoopi.folders import SPEC_FILE, read_spec, weights_path
from snoopi.noise import Noise
from snoopi.pictures import to_uint8, write_atomically
from snoopi.pipeline import Pipeline, Scale

FORMAT = "snoopi-pictures-1"
MANIFEST, PROMPTS = "manifest.json", "prompts.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg")
_THREADS = 8  # that read and resize pictures while a network works


class Row(NamedTuple):
    """A picture's file with the texts it was drawn from, None where they are not known."""

    file: Path
    prompt: str | None = None
    negative: str | None = None


class Job(NamedTuple):
    """A picture to draw: its file within the set's folder, its texts, the number of its noise."""

    file: str
    prompt: str
    negative: str | None
    noise: int


@dataclass(frozen=True)
class How:
    """What decides a picture beside model, texts and index; None: the model's own choice."""

    seed: int = 0
    guidance: str = "nasa"
    scale: float | tuple[float, ...] | None = None
    steps: int | None = None
    size: tuple[int, int] | None = None  # (height, width) in pixels


# --- found ----------------------------------------------------------------------------------------


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which 2.png comes before 10.png."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def picture_files(folder: Path) -> list[Path]:
    """The pictures directly in a folder, in natural order of their names.

    Raises ValueError for what is no folder, or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}, no folder")
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
    found = [p for p in found if p.is_file()]
    if not found:
        raise ValueError(f"{folder} holds no picture: expected files {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda path: natural(path.name))


def found_rows(
    folder: Path, prompts: Sequence[str] | None, negative: str | None, num: int | None
) -> list[Row]:
    """The first `num` pictures of a folder with their texts.

    The texts are those given, in natural order of the files' names, else those of the folder's
    prompts.jsonl, else unknown; a negative that is given is every picture's. Raises ValueError if
    there are fewer pictures than asked for, or another number of prompts.
    """
    if prompts is None and (folder / PROMPTS).is_file():
        rows = [row for row in read_rows(folder) if row.file.parent == folder]
        lost = next((row.file for row in rows[:num] if not row.file.is_file()), None)
        if lost:
            raise ValueError(f"{lost} is not there, but in {folder / PROMPTS}: draw it first")
        if negative is not None:
            rows = [row._replace(negative=negative) for row in rows]
    else:
        files = picture_files(folder)
        if prompts is not None and num is None and len(prompts) != len(files):
            raise ValueError(
                f"{folder} holds {len(files)} pictures for {len(prompts)} prompts: give as many "
                "prompts, or --num for the first ones"
            )
        texts: Sequence[str | None] = [None] * len(files) if prompts is None else prompts
        rows = [Row(f, t, negative) for f, t in zip(files, texts, strict=False)]
    if num is not None and len(rows) < num:
        raise ValueError(f"{folder}: {num} pictures with prompts wanted, {len(rows)} found")
    return rows[:num]


def read_rows(folder: Path) -> list[Row]:
    """The pictures of a set that was drawn here, also those that are not drawn yet.

    Raises ValueError for a file that is none of ours, or names a picture outside its folder.
    """
    path, rows = folder / PROMPTS, []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    for number, line in enumerate(filter(None, lines), 1):
        try:
            data = json.loads(line)
            name, prompt, negative = data["file"], data["prompt"], data["negative"]
            if not all(isinstance(text, str | None) for text in (prompt, negative)):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}, line {number}: no file, prompt and negative") from None
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}, line {number}: {name!r} is no file of this folder")
        rows.append(Row(folder / name, prompt, negative))
    return rows


def open_picture(path: Path) -> Image.Image:
    """A picture with all its pixels. Raises ValueError, naming it, if they cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            # PIL's own conversion of 16 bits cuts them off at 255.
            return _bytes(picture) if picture.mode.startswith("I") else picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable picture: {error}") from None


def _bytes(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits in 8."""
    values = np.asarray(picture).astype(np.float64) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def batches(
    files: Sequence[Path], prepare: Callable[[Image.Image], Tensor], batch: int
) -> Iterator[tuple[Sequence[Path], Tensor]]:
    """Files and their prepared pictures [b ...], each prepared to [1 ...], in order.

    The next batch is read while the caller works on one.
    """
    parts = [files[start : start + batch] for start in range(0, len(files), batch)]

    def one(path: Path) -> Tensor:
        return prepare(open_picture(path))

    with ThreadPoolExecutor(_THREADS) as pool:

        def submit(part: Sequence[Path]) -> list[Future[Tensor]]:
            return [pool.submit(one, path) for path in part]

        coming = submit(parts[0]) if parts else []
        for number, part in enumerate(parts):
            here = coming
            coming = submit(parts[number + 1]) if number + 1 < len(parts) else []
            yield part, torch.cat([future.result() for future in here])


# --- drawn ----------------------------------------------------------------------------------------


def texts_digest(texts: Sequence[str]) -> str:
    """SHA-256 of a list of texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 of all that decides a model folder's pictures: its spec, weights and tokenizers."""
    spec, _ = read_spec(folder)
    digest = hashlib.sha256(json.dumps(spec.to_json(), sort_keys=True).encode())
    files = [weights_path(folder, part) for part in spec.parts()]
    for path in [*files, *sorted(folder.glob("tokenizer*/tokenizer.json"))]:
        if path.is_file():
            digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with writing(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_model(folder: Path) -> bool:
    """Whether a folder is a model folder (or of tools), not one of pictures."""
    return (folder / SPEC_FILE).is_file()


@dataclass(frozen=True)
class DrawnSet:
    """A set to draw: its folder, its pictures, and plain data that decides their pixels beside."""

    folder: Path
    jobs: Sequence[Job]
    identity: Mapping[str, Any]

    def rows(self) -> list[Row]:
        """The pictures with their texts, drawn or not."""
        return [Row(self.folder / job.file, job.prompt, job.negative) for job in self.jobs]

    def missing(self) -> list[Job]:
        """What is not drawn yet."""
        return [job for job in self.jobs if not (self.folder / job.file).is_file()]

    def check(self) -> None:
        """ValueError if the folder holds pictures of another set, or without a manifest.

        There may be more or fewer pictures of this one in it.
        """
        path = self.folder / MANIFEST
        if path.is_file():
            try:
                there = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                there = None
            if not isinstance(there, dict):
                raise ValueError(f"{path} is no manifest: remove it, or give another --out")
            other = [
                f"{key} {there.get(key)!r:.60} there, {value!r:.60} wanted"
                for key, value in self._manifest().items()
                if there.get(key) != value
            ]
            if other:
                raise ValueError(
                    f"{self.folder} holds other pictures ({'; '.join(other)}): give another --out, "
                    "or remove it"
                )
        elif self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder: give another --out")
        elif self.folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in _files(self)):
            raise ValueError(f"{self.folder} holds pictures without {MANIFEST}: another --out")

    def start(self) -> None:
        """Write manifest and prompts; any rank may, they write the same."""
        text = json.dumps(self._manifest(), indent=2) + "\n"
        write_atomically(self.folder / MANIFEST, text.encode())
        lines = [
            json.dumps({"file": job.file, "prompt": job.prompt, "negative": job.negative}) + "\n"
            for job in self.jobs
        ]
        write_atomically(self.folder / PROMPTS, "".join(lines).encode())

    def tidy(self) -> None:
        """Remove what a killed command was writing under another name. Before any rank draws."""
        for path in list(_files(self)):
            if path.name[0] == "." and any(
                f"{end}." in path.name for end in (".png", ".json", ".jsonl")
            ):
                path.unlink()

    def _manifest(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format": FORMAT, **self.identity}))


def _files(drawn: DrawnSet) -> Iterator[Path]:
    """What lies where the set's pictures will."""
    for folder in {drawn.folder, *((drawn.folder / job.file).parent for job in drawn.jobs)}:
        yield from folder.iterdir() if folder.is_dir() else ()


def draw(
    pipeline: Pipeline,
    wanted: DrawnSet,
    how: How,
    batch: int,
    rank: int = 0,
    world: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Draw this rank's share of what is missing; returns the number of pictures drawn.

    Every call of the networks has the same number of rows (short ones are filled up) and one
    negative, since a network's rounding depends on both: pictures are equal bit for bit at any
    number of ranks and after any interruption, and at another `batch` up to rounding.

    done: told the number of pictures drawn so far. Raises ValueError for what the pipeline
    refuses, and for pictures that are not finite.
    """
    groups: dict[str | None, list[Job]] = {}
    for job in wanted.jobs:
        groups.setdefault(job.negative, []).append(job)
    drawn, batch = 0, min(batch, max(map(len, groups.values())))
    missing = set(wanted.missing())
    for negative, group in groups.items():
        mine = [job for job in group[rank::world] if job in missing]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            filled = part + part[-1:] * (batch - len(part))
            pixels = _pixels(pipeline, filled, negative, how)[: len(part)]
            if not drawn:
                wanted.start()  # not before: what the pipeline refuses leaves no folder
            for job, picture in zip(part, pixels, strict=True):
                write_atomically(wanted.folder / job.file, _png(Image.fromarray(picture)))
            drawn += len(part)
            done(drawn)
    if not drawn:
        wanted.start()  # there may be fewer pictures than before
    return drawn


def paint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    negatives: Sequence[str | None] | None,
    indices: Sequence[int],
    how: How,
) -> Tensor:
    """Pictures [b 3 H W] in [-1, 1] of prompts, from noises `indices` of the seed."""
    z = pipeline.noise(how.seed, indices, how.size)

    def noise(step: int) -> Tensor:
        return Noise(how.seed).normal("sampler", step, indices, tuple(z.shape[1:])).to(z)

    scale: Scale = list(how.scale) if isinstance(how.scale, tuple) else how.scale
    return pipeline.pictures(prompts, z, negatives, how.guidance, scale, how.steps, noise)


def _pixels(pipeline: Pipeline, jobs: Sequence[Job], negative: str | None, how: How) -> Any:
    """Bytes [b h w 3]."""
    prompts, indices = [job.prompt for job in jobs], [job.noise for job in jobs]
    x = paint(pipeline, prompts, [negative] * len(jobs), indices, how)
    if not bool(x.isfinite().all()):
        raise ValueError(f"{jobs[0].file}: the model's pictures are not finite (--dtype fp32?)")
    return to_uint8(x)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")  # the smallest file would take five times as long
    return buffer.getvalue()
