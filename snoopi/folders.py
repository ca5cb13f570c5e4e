"""Model folders: snoopi.json, one safetensors file per network, a tokenizer per text encoder.

snoopi.json holds a ModelSpec or a ToolSpec, and provenance. Partial folders are fine: what is
absent is None. A folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snoopi import lora, memory
from snoopi.errors import writing
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ModelSpec, ToolSpec, build, text_part

SPEC_FILE = "snoopi.json"
SHIPPED = Path(__file__).parent / "shipped"  # model folders that come with the package
FORMAT = 1
_SIZES = (
    "heads",
    "head_dim",
    "norm_groups",
    "resnets",
    "patch",
    "in_channels",
    "latent_size",
    "steps",
)


def shipped() -> list[str]:
    """Names of the model folders that come with the package."""
    folders = SHIPPED.iterdir() if SHIPPED.is_dir() else ()
    return sorted(folder.name for folder in folders if (folder / SPEC_FILE).is_file())


def shipped_or_path(name: str) -> Path:
    """The folder of a shipped model by its name, else the name as a path."""
    return SHIPPED / name if name in shipped() else Path(name)


def read_spec(folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The ModelSpec and the provenance in a model folder's snoopi.json."""
    return _read(folder, ModelSpec, "a model that makes pictures", "snoopi.folders.load_tools")


def read_tools(folder: Path) -> tuple[ToolSpec, dict[str, Any]]:
    """The ToolSpec and the provenance in the snoopi.json of a folder of tools."""
    return _read(folder, ToolSpec, "tools (networks that measure)", "snoopi.load")


def read_vae(folder: Path, spec: ModelSpec) -> Any:
    """The config of the VAE in another folder, a model's or TAESD's, for a model of `spec`.

    Raises ValueError for a folder without a VAE, or of latents that are not the model's.
    """
    if _kind(_json(folder)) == "ToolSpec":
        config = read_tools(folder)[0].parts().get("vae")
    else:
        config = read_spec(folder)[0].vae
    if config is None or not weights_path(folder, "vae").is_file():
        raise ValueError(f"{folder} holds no VAE: expected {weights_path(folder, 'vae').name}")
    expected, got = ((vae.latent_channels, vae.factor) for vae in (spec.vae, config))
    if expected != got:
        raise ValueError(
            f"the VAE of {folder} does not fit {spec.arch}: expected latents of {expected[0]} "
            f"channels at 1/{expected[1]} of the size, got {got[0]} at 1/{got[1]}"
        )
    return config


def _read(folder: Path, kind: Any, what: str, other: str) -> tuple[Any, dict[str, Any]]:
    """The spec of one kind and the provenance; `other` is the function that reads the other."""
    data = _json(folder)
    provenance = data.get("provenance") or {}
    if not isinstance(provenance, dict):
        raise ValueError(
            f"{folder / SPEC_FILE}: provenance must be an object, got {provenance!r:.80}"
        )
    got = _kind(data)
    if got in ("ModelSpec", "ToolSpec") and got != kind.__name__:
        raise ValueError(
            f"{folder} holds not {what}: expected a {kind.__name__}, got a {got}; {other} reads it"
        )
    try:
        return parse_spec(kind, data.get("model")), provenance
    except (ValueError, ArithmeticError) as error:  # a config divides by its own numbers
        raise ValueError(f"{folder / SPEC_FILE}: {error}") from error


def _json(folder: Path) -> dict[str, Any]:
    """What is in a folder's snoopi.json; ValueError if it is no such file of our format."""
    path = folder / SPEC_FILE
    if not path.is_file():
        found = f"holds no {SPEC_FILE}" if folder.is_dir() else "does not exist"
        found = "is a file" if folder.is_file() else found
        raise ValueError(f"{folder} is not a model folder: it {found}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    return data


def _kind(data: dict[str, Any]) -> Any:
    """Which spec a snoopi.json holds, as it says."""
    model = data.get("model")
    return model.get("kind") if isinstance(model, dict) else None


def parse_spec(kind: Any, data: Any) -> Any:
    """A ModelSpec or ToolSpec from snoopi.json's plain data, its types and sizes checked.

    Raises ValueError, or the ArithmeticError of a config that divides by a number of its own.
    """
    spec = kind.from_json(data)
    _check_sizes(dataclasses.asdict(spec), "model")
    return spec


def _check_sizes(value: Any, where: str) -> None:
    """ValueError for a size that no network has, which torch would notice late or never."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_sizes(item, f"{where}.{name}")
        heads, width = value.get("heads"), value.get("width")
        if (
            isinstance(heads, int)
            and isinstance(width, int)
            and "head_dim" not in value  # else any number of heads has a width of its own
            and width % heads
        ):
            raise ValueError(f"{where}.heads must divide the width {width}, got {heads}")
    elif isinstance(value, tuple):
        for item in value:
            _check_sizes(item, where)
    elif isinstance(value, int | float):
        name = where.rsplit(".", 1)[-1]
        if name in _SIZES and value < 1:
            raise ValueError(f"{where} must be at least 1, got {value}")
        if name in ("beta_start", "beta_end") and not 0 <= value < 1:
            raise ValueError(f"{where} must be from 0 to below 1, got {value}")


# --- reading --------------------------------------------------------------------------------------


def load_tools(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """The networks of a folder of tools (a ToolSpec) by part, in eval mode and frozen.

    A part whose file is absent is left out: an image encoder may come without its text encoder.
    dtype: as in `load`. Raises ValueError for a folder of another kind, without any network, or
    whose files do not fit its snoopi.json.
    """
    folder = Path(path)
    spec, _ = read_tools(folder)
    widen = dtype is None and torch.device(device).type == "cpu"
    parts = {part: load_part(folder, spec, part, dtype, widen) for part in spec.parts()}
    found = {p: net.to(device).requires_grad_(False) for p, net in parts.items() if net is not None}
    if not found:
        files = ", ".join(f"{part}.safetensors" for part in parts)
        raise ValueError(f"{folder} holds no network: expected {files}")
    return found


class Clip(NamedTuple):
    """A whole CLIP: both towers and the tokenizer of the text's."""

    image_encoder: Any
    text_encoder: Any
    tokenizer: Tokenizer


def load_clip(path: str | Path, device: str | torch.device = "cpu") -> Clip:
    """A CLIP from a folder of tools, in fp32, in eval mode and frozen.

    Raises ValueError for a folder of another kind, or that lacks a part.
    """
    folder = Path(path)
    spec, _ = read_tools(folder)
    nets = load_tools(folder, str(device), torch.float32)
    parts = ("image_encoder", "text_encoder")
    missing = [part for part in parts if part not in nets]
    tokenizer = None if missing else load_tokenizer(folder, spec, 0)
    if tokenizer is None:
        raise ValueError(f"{folder} has no {', no '.join(missing or ['tokenizer'])}: not a CLIP")
    return Clip(nets["image_encoder"], nets["text_encoder"], tokenizer)


def load_part(
    folder: Path, spec: ModelSpec | ToolSpec, part: str, dtype: torch.dtype | None, widen: bool
) -> nn.Module | None:
    """One network of a folder, None where its file is absent; dtype, widen: see load_weights."""
    net = _built(folder, spec, part)
    return None if net is None else load_weights(net, weights_path(folder, part), dtype, widen)


def defer_part(folder: Path, spec: ModelSpec | ToolSpec, part: str) -> nn.Module | None:
    """As `load_part`, but on the meta device: its file is checked, and not read yet."""
    net = _built(folder, spec, part)
    if net is not None:
        WeightFile(weights_path(folder, part), net)
    return net


def weights_path(folder: Path, part: str) -> Path:
    """The file of one network in a model folder."""
    return folder / f"{part}.safetensors"


def is_deferred(net: nn.Module) -> bool:
    """Whether a network has no memory yet."""
    return any(value.is_meta for value in net.state_dict().values())


def _built(folder: Path, spec: ModelSpec | ToolSpec, part: str) -> nn.Module | None:
    """A part's network on the meta device, None where its file is absent."""
    if not weights_path(folder, part).is_file():
        return None
    try:
        return build(spec, part)
    except (ValueError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"{folder / SPEC_FILE}: no {part} has these sizes: {error}") from error


class WeightFile:
    """A safetensors file that fits a network, read by rows: a rank maps no more than it takes.

    net: with or without adapters (which no file of a model folder holds). Raises ValueError as
    `load_weights` does, before anything is read.
    """

    def __init__(self, path: Path, net: nn.Module) -> None:
        try:
            self._file = safe_open(path, framework="pt")
            names = self._file.keys()
            found = {name: _header(self._file.get_slice(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        _check_fits(net, path, found)
        self._shapes = {name: shape for name, (shape, _, _) in found.items()}

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows (along the first dimension) of a tensor, as stored; a scalar as a whole."""
        if not self._shapes[name]:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[rows]


def load_weights(
    net: nn.Module, path: Path, dtype: torch.dtype | None = None, widen: bool = False
) -> nn.Module:
    """Fill a meta network from a safetensors file, strictly: every key used, every shape equal.

    dtype: of floating-point weights; None keeps each one's. widen: fp16 becomes fp32. Tensors stay
    mapped where that changes nothing; others are converted one by one, so the most memory is that
    of the network as it will be and one tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            _check_fits(net, path, {name: _header(file.get_slice(name)) for name in names})
            state = {name: _converted(file.get_tensor(name), dtype, widen) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    net.load_state_dict(state, assign=True)
    return net


def _converted(stored: Tensor, dtype: torch.dtype | None, widen: bool) -> Tensor:
    """A mapped tensor as it is, or converted; then its pages of the file are not kept."""
    if dtype is None and widen and stored.dtype == torch.float16:
        dtype = torch.float32
    if dtype in (None, stored.dtype) or not stored.is_floating_point():
        return stored
    made = stored.to(dtype)
    memory.drop_pages(stored)
    return made


# safetensors' names of types, in torch's words.
_TYPES = {"BOOL": "bool", "U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_TYPES |= {"F64": "float64", **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)}}


def _header(part: Any) -> tuple[list[int], bool, str]:
    """Shape, whether floating, and type of a tensor that safetensors has not read."""
    dtype = part.get_dtype()
    name = f"torch.{_TYPES[dtype]}" if dtype in _TYPES else dtype
    return list(part.get_shape()), dtype.startswith(("F", "BF")), name


def _check_fits(
    net: nn.Module, path: Path, found: Mapping[str, tuple[list[int], bool, Any]]
) -> None:
    """ValueError unless a file's tensors (shape, whether floating, type) are the network's."""
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith(lora.SUFFIXES)}
    expected = {name: list(tensor.shape) for name, tensor in wanted.items()}
    trouble = [f"lacks {name}" for name in expected if name not in found]
    trouble += [f"has an unexpected {name}" for name in found if name not in expected]
    trouble += [
        f"{name} must be {expected[name]}, got {shape}"
        for name, (shape, _, _) in found.items()
        if name in expected and shape != expected[name]
    ]
    trouble += [
        f"{name} must be of a floating type, got {dtype}"
        for name, (_, floating, dtype) in found.items()
        if name in wanted and wanted[name].is_floating_point() != floating
    ]
    if trouble:
        more = f"; and {len(trouble) - 5} more" if len(trouble) > 5 else ""
        raise ValueError(
            f"{path} does not fit {type(net).__name__}: {'; '.join(trouble[:5])}{more}"
        )


def load_tokenizer(folder: Path, spec: ModelSpec | ToolSpec, index: int) -> Tokenizer | None:
    """The tokenizer of a text encoder, None where it is absent; ValueError if it does not fit."""
    path = folder / tokenizer_folder(index)
    if not path.is_dir():
        return None
    found, encoder = Tokenizer.load(path), spec.parts()[text_part(index)]
    ids = found.tokenizer.get_vocab().values()  # not its size: a file may leave numbers out
    sizes = (1 + max(ids, default=0), found.max_length)
    if sizes[0] > encoder.vocabulary or sizes[1] > encoder.length:
        raise ValueError(
            f"{path} does not fit its text encoder: expected at most {encoder.vocabulary} words "
            f"and {encoder.length} tokens, got {sizes[0]} and {sizes[1]}"
        )
    return found


# --- writing --------------------------------------------------------------------------------------


def save_tools(
    folder: Path | str,
    spec: ToolSpec,
    networks: Mapping[str, nn.Module],
    tokenizer: Tokenizer | None = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a folder of tools atomically, as Pipeline.save does a model's.

    networks: of the spec's parts, or of some of them. Raises ValueError for any other part.
    """
    unknown = [part for part in networks if part not in spec.parts()]
    if unknown or not networks:
        have = ", ".join(spec.parts())
        raise ValueError(f"{spec.arch} has the parts {have}, got {', '.join(unknown) or 'none'}")
    tokenizers = [] if tokenizer is None else [tokenizer]
    with replacing(Path(folder)) as to:
        write_networks(to, spec, networks, tokenizers, provenance or {}, dtype)
    return Path(folder)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill under another name; it takes the place of `folder` when the body is done.

    Raises OSError naming `folder`. After any error what was there is untouched, nothing is left.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_networks(
    folder: Path,
    spec: ModelSpec | ToolSpec,
    networks: Mapping[str, nn.Module | None],
    tokenizers: Sequence[Tokenizer | None],
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """Fill an empty folder; floating-point weights in `dtype`, or as they are."""
    for part, net in networks.items():
        if net is not None:
            state = {k: _stored(v, dtype) for k, v in net.state_dict().items()}
            path = folder / f"{part}.safetensors"
            save_file(state, path)
            path.chmod(0o644)  # safetensors makes it readable by its owner alone
    for i, tokenizer in enumerate(tokenizers):
        if tokenizer is not None:
            (folder / tokenizer_folder(i)).mkdir()
            tokenizer.save(folder / tokenizer_folder(i))
    write_spec(folder, spec, provenance)


def write_spec(folder: Path, spec: ModelSpec | ToolSpec, provenance: Mapping[str, Any]) -> None:
    """Write snoopi.json into an existing folder."""
    data = {"format": FORMAT, "model": spec.to_json(), "provenance": dict(provenance)}
    path = folder / SPEC_FILE
    with writing(path):
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight as it is written: on the CPU, contiguous, floats in `dtype`."""
    value = value.detach().cpu()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"a weight is too large for {dtype}, or not finite: store fp32")
    return value.contiguous()


def put_in_place(new: Path, old: Path) -> None:
    """Put a folder in the place of another; the old one is kept aside until the new one is in."""
    if not old.exists():
        os.rename(new, old)
        return
    if not old.is_dir():
        raise ValueError(f"{old} is in the way: it is not a folder")
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.old.", dir=old.parent))
    try:
        os.rename(old, aside / "old")
        os.rename(new, old)
    finally:
        if not old.exists():  # an error or a Ctrl-C came between the two
            os.rename(aside / "old", old)
        shutil.rmtree(aside, ignore_errors=True)


def tokenizer_folder(index: int) -> str:
    """The name of the i-th text encoder's tokenizer, as in diffusers."""
    return "tokenizer" if index == 0 else f"tokenizer_{index + 1}"
