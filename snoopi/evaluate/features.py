"""Features of pictures by published networks, and files of features and statistics.

A protocol is a network and the way pictures come to it, to the letter: distances between features
of two protocols mean nothing. A file of features is a safetensors file with "features" [n d], or
with the statistics "mean" [d] and "covariance" [d d] (and `count` in its metadata); its metadata
says where it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from snoopi import preprocess
from snoopi.evaluate.fid import FeatureStats
from snoopi.evaluate.picture_sets import batches, file_sha256
from snoopi.folders import defer_part, load_tools, read_tools, weights_path
from snoopi.models.inception import InceptionConfig
from snoopi.models.vgg import VGGConfig
from snoopi.pictures import write_atomically

FORMAT = "snoopi-features-1"


class Protocol(NamedTuple):
    """How pictures become features.

    tool: the kind of network. prepare: one picture -> the network's input [1 3 h w]. read: the
    network's output -> features [b d]. words: for who reads the number.
    """

    tool: str
    prepare: Callable[[Image.Image], Tensor]
    read: Callable[[Any], Tensor]
    words: str


def _clean(picture: Image.Image) -> Tensor:
    return preprocess.inception_pictures([preprocess.reference_picture(picture)])


def _tf1(picture: Image.Image) -> Tensor:
    # TensorFlow resizes bytes: 0 to 255, exactly.
    square = (preprocess.to_tensor([preprocess.reference_picture(picture)]) * 255).round()
    return preprocess.tf1_bilinear(square, 299)  # the network does (x - 128) / 128


def _tf1_bgr(picture: Image.Image) -> Tensor:
    return _tf1(picture).flip(1)  # every channel goes the same way, so the order may come last


def _vgg(picture: Image.Image) -> Tensor:
    return preprocess.vgg_pictures([picture])


def _vgg_bgr(picture: Image.Image) -> Tensor:
    return _vgg(Image.merge("RGB", picture.convert("RGB").split()[::-1]))


_SQUARE = "centre crop, LANCZOS to 256"
PROTOCOLS: dict[str, Protocol] = {
    "inception": Protocol(
        "inception",
        _clean,
        lambda out: out.features,
        f"FID Inception pool3, 2,048 values; {_SQUARE}, clean-fid's resize to 299",
    ),
    "inception-tf1": Protocol(
        "inception",
        _tf1,
        lambda out: out.features,
        f"FID Inception pool3, 2,048 values; {_SQUARE}, TensorFlow 1's resize to 299, RGB",
    ),
    "inception-tf1-bgr": Protocol(
        "inception",
        _tf1_bgr,
        lambda out: out.features,
        f"FID Inception pool3, 2,048 values; {_SQUARE}, TensorFlow 1's resize to 299, BGR",
    ),
    "vgg16": Protocol(
        "vgg",
        _vgg,
        lambda out: out.fc2_relu,
        "VGG16 fc2 after its ReLU, 4,096 values; TensorFlow 1's resize to 224, RGB",
    ),
    "vgg16-bgr": Protocol(
        "vgg",
        _vgg_bgr,
        lambda out: out.fc2_relu,
        "VGG16 fc2 after its ReLU, 4,096 values; TensorFlow 1's resize to 224, BGR",
    ),
}
_KINDS = {"inception": InceptionConfig, "vgg": VGGConfig}


@dataclass(frozen=True)
class Features:
    """Features of a set of pictures, or their statistics alone.

    rows: floats [n d], None where only statistics are known. protocol: its name, "" where a file
    does not say. source: words for the report. known: the statistics, where there are no rows.
    """

    rows: Tensor | None
    protocol: str
    source: str
    known: FeatureStats | None = None

    @classmethod
    def of(cls, rows: Tensor, protocol: str, source: str) -> Features:
        """Features from their rows [n d]. Raises ValueError, naming the source, if not finite."""
        finite = rows.isfinite().all(1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise ValueError(f"{source}: features must be finite, but row {bad} is not")
        return cls(rows, protocol, source)

    @functools.cached_property
    def stats(self) -> FeatureStats:
        """Mean and covariance; of 40,504 rows seconds."""
        if self.rows is None:
            assert self.known is not None
            return self.known
        return FeatureStats.of(self.rows)

    @property
    def count(self) -> int:
        """Number of pictures."""
        return self.stats.count if self.rows is None else len(self.rows)

    @property
    def width(self) -> int:
        """Number of values of a picture."""
        return len(self.stats.mean) if self.rows is None else self.rows.shape[1]


# --- networks -------------------------------------------------------------------------------------


def check_tool(folder: Path, tool: str) -> None:
    """ValueError unless a folder of tools holds the network of a kind ("inception", "vgg")."""
    spec, _ = read_tools(folder)
    config = spec.networks.get("network")
    if not isinstance(config, _KINDS[tool]) or defer_part(folder, spec, "network") is None:
        raise ValueError(f"--{tool}: {folder} holds {spec.arch}, expected {_ARCHS[tool]}")


def width_of(folder: Path) -> int:
    """How many features the network in a folder of tools gives."""
    config = read_tools(folder)[0].networks["network"]
    return config.width if isinstance(config, VGGConfig) else INCEPTION_WIDTH


_ARCHS = {"inception": "inception-fid", "vgg": "vgg16"}
INCEPTION_WIDTH = 2048  # of pool3


@torch.no_grad()
def extract(
    files: Sequence[Path],
    protocol: str,
    network: nn.Module,
    batch: int = 32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Features float32 [n d] of picture files, in fp32.

    Raises ValueError, naming the file, for pictures that cannot be read and features that are not
    finite.
    """
    how, found = PROTOCOLS[protocol], []
    for part, pictures in batches(files, how.prepare, batch):
        rows = how.read(network(pictures.to(device))).float().cpu()
        wrong = (~rows.isfinite().all(1)).nonzero()
        if len(wrong):
            raise ValueError(f"{part[int(wrong[0])]}: {protocol} features are not finite")
        found.append(rows)
    return torch.cat(found)


def of_files(
    files: Sequence[Path],
    protocol: str,
    tool: Path,
    cache: Path | None = None,
    batch: int = 32,
    device: str | torch.device = "cpu",
) -> Features:
    """Features of picture files of a folder, kept in a folder `cache` and taken from there.

    Raises ValueError if the cache holds features of other pictures, or by other weights.
    """
    if cache is None:
        network = load_tools(tool, str(device), torch.float32)["network"]
        rows = extract(files, protocol, network, batch, device)
        return Features.of(rows, protocol, _source(files))
    provenance = {
        "protocol": protocol,
        "network": read_tools(tool)[0].arch,
        "weights": file_sha256(weights_path(tool, "network")),
        "source": files[0].parent.resolve().name,
        "count": str(len(files)),
        "files": _names_and_sizes(files),
    }
    path = kept_at(cache, files, protocol)
    if path.exists():
        there = _metadata(path)
        other = [key for key, value in provenance.items() if there.get(key) != value]
        if other:
            raise ValueError(
                f"{path} was made from something else ({', '.join(other)} differ): remove it, or "
                "give another folder"
            )
        return dataclasses.replace(read_features(path), source=_source(files))
    features = of_files(files, protocol, tool, None, batch, device)
    write_features(path, features, provenance)
    return features


def kept_at(cache: Path, files: Sequence[Path], protocol: str) -> Path:
    """Where the features of pictures are kept: under the name of their folder."""
    return cache / f"{files[0].parent.resolve().name}-{protocol}.safetensors"


def _source(files: Sequence[Path]) -> str:
    return f"{len(files)} pictures of {files[0].parent}"


def _names_and_sizes(files: Sequence[Path]) -> str:
    """SHA-256 of the names and sizes of files: reading 40,504 pictures would take minutes."""
    listing = [[path.name, path.stat().st_size] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


# --- files ----------------------------------------------------------------------------------------


def write_features(
    path: Path, features: Features, provenance: Mapping[str, str] | None = None
) -> Path:
    """Write a file of features, or of statistics where there are no rows, whole or not at all."""
    metadata = {"protocol": features.protocol, "source": features.source}
    metadata |= {"count": str(features.count), **(provenance or {}), "format": FORMAT}
    if features.rows is None:
        stats = features.stats
        tensors = {"mean": stats.mean, "covariance": stats.covariance}
    else:
        tensors = {"features": features.rows.contiguous()}
    return write_atomically(path, save(tensors, metadata))


def read_features(path: Path) -> Features:
    """Features or statistics from a safetensors file, ours or another's.

    Raises ValueError, naming the file, unless it holds "features" [n d] or "mean" [d] and
    "covariance" [d d], finite floats.
    """
    metadata = _metadata(path)
    protocol = metadata.get("protocol", "")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if "features" in names:
            rows = file.get_tensor("features")
            if rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
                raise ValueError(
                    f"{path}: features must be floats [n d], got {rows.dtype} {list(rows.shape)}"
                )
            rows = rows if rows.dtype == torch.float64 else rows.float()
            return Features.of(rows, protocol, f"{len(rows)} rows of {path}")
        if not {"mean", "covariance"} <= names:
            raise ValueError(f"{path} holds neither features nor mean and covariance")
        mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
    try:
        said = metadata.get("count", "")
        if not said.isdecimal():
            raise ValueError(f"its metadata must have the count of rows, got {said!r}")
        count = int(said)
        stats = FeatureStats.from_moments(mean, covariance, count)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Features(None, protocol, f"statistics of {count} rows in {path}", stats)


def _metadata(path: Path) -> dict[str, str]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
