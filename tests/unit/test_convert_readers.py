"""Readers of weights under attack: a bad file is one ValueError; nothing runs, grows or stays."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from snoopi import errors, zoo
from weights_convert.convert import convert
from weights_convert.files import INDEX, Weights, open_weights, write_safetensors

MEMORY = 64 * 2**20  # bytes that a refusal may take
HUGE = 10**18


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A whole network of the debug preset: 286 tensors, 1 MB."""
    return dict(zoo.fresh("debug", "backbone", 0).state_dict())


@pytest.fixture
def memory() -> Iterator[None]:
    """Fails where the peak of resident memory rose by more than MEMORY."""
    with bounded():
        yield


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():  # not Linux
        yield
        return
    before = _resident("VmRSS")
    reset.write_text("5")  # begins the peak anew
    yield
    assert _resident("VmHWM") - before < MEMORY


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def refused(source: Path, match: str) -> None:
    """Both the reader's user and the command get one line that names the file; nothing stays."""
    folder = source.parent
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        convert(source, folder / "model", arch="debug")
    line = errors.one_line(caught.value)
    assert line is not None and str(source.parent) in line and len(line) < 1000, line
    assert sorted(folder.iterdir()) == before


def read_all(weights: Weights) -> None:
    """Every tensor is what its entry says."""
    for entry in weights.entries.values():
        value = entry.read()
        assert tuple(value.shape) == entry.shape and value.dtype == entry.dtype
        value.contiguous().view(-1).view(torch.uint8).sum()


# --- safetensors ----------------------------------------------------------------------------------


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from a header (an object, or its text) and the tensors' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a whole safetensors file"),
    "seven bytes": (b"1234567", "is not a whole safetensors file"),
    "a header of nothing": (pack(b"", length=0), "is not a whole safetensors file"),
    "a header of 10^18 bytes": (pack({}, b"0" * 64, HUGE), f"its header claims {HUGE} bytes"),
    "a header of 2^64 - 1 bytes": (pack({}, length=2**64 - 1), "its header claims"),
    "a header to the end and one byte": (pack({}, length=3), "its header claims 3 bytes"),
    "not JSON": (pack(b"{nonsense}"), "safetensors header is damaged"),
    "not UTF-8": (pack(b'{"\xff\xfe": 1}'), "safetensors header is damaged"),
    "nested without end": (pack(b"[" * 100_000), "safetensors header is damaged"),
    "a list": (pack([1, 2]), "header must be an object"),
    "a number": (pack(b"1234"), "header must be an object"),
    "only metadata": (pack({"__metadata__": {"a": "b"}}), "holds no tensor"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__ must map names"),
    "metadata of null": (pack({"__metadata__": None}), "__metadata__ must map names"),
    "a key twice": (
        pack(b'{"a":%b,"a":%b}' % ((json.dumps(f32(0, 4)).encode(),) * 2), b"0000"),
        "the key 'a' stands in it twice",
    ),
    "a key twice inside": (
        pack(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"0000"),
        "the key 'dtype' stands in it twice",
    ),
    "no dtype": (pack({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"0000"), "must have dtype"),
    "more than dtype": (pack({"a": f32(0, 4) | {"x": 1}}, b"0000"), "must have dtype"),
    "an unknown dtype": (pack({"a": f32(0, 4, dtype="F33")}, b"0000"), "unknown dtype 'F33'"),
    "a dtype of another type": (
        pack({"a": f32(0, 4) | {"dtype": ["F32"]}}, b"0000"),
        "has the unknown dtype",
    ),
    "a dtype of other bytes": (pack({"a": f32(0, 4, dtype="F64")}, b"0000"), "must take 8 bytes"),
    "no shape": (pack({"a": f32(0, 4) | {"shape": None}}, b"0000"), "must be a list of sizes"),
    "a negative size": (pack({"a": f32(0, 4, [-1])}, b"0000"), "must be a list of sizes"),
    "two negative sizes": (pack({"a": f32(0, 4, [-1, -1])}, b"0000"), "must be a list of sizes"),
    "half a size": (pack({"a": f32(0, 4, [1.0])}, b"0000"), "must be a list of sizes"),
    "a size of true": (pack({"a": f32(0, 4, [True])}, b"0000"), "must be a list of sizes"),
    "a shape of 10^18": (pack({"a": f32(0, 4, [HUGE])}, b"0000"), f"must take {4 * HUGE} bytes"),
    "a shape that overflows": (pack({"a": f32(0, 4, [2**32] * 3)}, b"0000"), "must take"),
    "a shape that overflows to its bytes": (
        pack({"a": f32(0, 4, [2**62 + 1])}, b"0000"),
        "must take",
    ),
    "nothing of a size no tensor has": (
        pack({"a": f32(0, 0, [0, 10**30])}, b"0000"),
        "must be a list of sizes",
    ),
    "offsets beyond the end": (pack({"a": f32(0, 8)}, b"0000"), "is truncated or damaged"),
    "offsets of 10^18": (pack({"a": f32(0, HUGE)}, b"0000"), "is truncated or damaged"),
    "offsets backwards": (pack({"a": f32(4, 0, [1])}, b"0000"), "must take 4 bytes"),
    "three offsets": (
        pack({"a": f32(0, 4) | {"data_offsets": [0, 4, 8]}}, b"0000"),
        "is truncated or damaged",
    ),
    "overlapping": (pack({"a": f32(0, 8), "b": f32(4, 12)}, b"0" * 12), "b must begin at byte 8"),
    "the same bytes": (pack({"a": f32(0, 4), "b": f32(0, 4)}, b"0000"), "b must begin at byte 4"),
    "a gap": (pack({"a": f32(0, 4), "b": f32(8, 12)}, b"0" * 12), "b must begin at byte 4"),
    "data before the first": (pack({"a": f32(4, 8)}, b"0" * 8), "a must begin at byte 0"),
    "data behind the last": (pack({"a": f32(0, 4)}, b"0" * 8), "is damaged: its tensors take 4"),
    "foreign names": (pack({"a\nb": f32(0, 4)}, b"0000"), "is not recognised"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_bad_safetensors_file(case: str, tmp_path: Path, memory: None) -> None:
    raw, match = SAFETENSORS[case]
    (tmp_path / "model.safetensors").write_bytes(raw)
    refused(tmp_path / "model.safetensors", match)


def test_a_folder_or_nothing_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="expected a file of weights, got a folder"):
        open_weights(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "of files of weights it must hold one, found: none")
    refused(tmp_path / "absent.safetensors", "does not exist")
    (tmp_path / "model.txt").write_text("weights")
    refused(tmp_path / "model.txt", r"expected a file of weights \(.safetensors")


def test_every_truncation(state: dict[str, Tensor], tmp_path: Path, memory: None) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for end in (*range(40), *range(40, len(raw), len(raw) // 97), header - 1, header, -1):
        path.write_bytes(raw[:end])
        with pytest.raises(ValueError, match=r"not a whole safetensors file|truncated or damaged"):
            open_weights(path)
    refused(path, "truncated or damaged")


def test_names_that_are_missing_misshapen_or_of_integers(
    state: dict[str, Tensor], tmp_path: Path, memory: None
) -> None:
    path, name = tmp_path / "model.safetensors", "conv_out.weight"
    save_file({k: v for k, v in state.items() if k != name}, path)
    refused(path, rf"does not fit debug: backbone: lacks {name} \(for {name}\)$")
    lost = {k: v for k, v in state.items() if not k.startswith("mid_block.resnets")}
    save_file(lost, path)
    refused(path, rf"lacks mid_block.*; and {len(state) - len(lost) - 5} more$")
    for wrong in (state[name][:1], state[name].flatten(), torch.zeros(0)):
        save_file(state | {name: wrong.clone()}, path)
        got = re.escape(str(list(wrong.shape)))
        refused(path, rf"{name} must be \[16, 16, 3, 3\], got {got}")
    save_file(state | {name: state[name].int()}, path)
    refused(path, f"{name} must be of a floating type, got torch.int32")
    save_file(state | {"conv_out.weights": torch.zeros(2)}, path)
    refused(path, "has an unexpected conv_out.weights$")
    # All of it in one line.
    save_file(lost | {name: state[name][:1].clone(), "more": torch.zeros(2)}, path)
    refused(path, r"lacks .*; and \d+ more$")


def flips(raw: bytes, first: int, last: int, count: int) -> Iterator[bytes]:
    """Copies of a file with one to four bytes in [first, last) changed."""
    rng = random.Random(0)
    for _ in range(count):
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(first, last)] = rng.choice((rng.randrange(256), 0, 0x7B, 0xFF))
        yield bytes(changed)


def survives(raw: bytes, path: Path) -> bool:
    """Whether it opens; else a ValueError says why, and nothing but that may happen."""
    path.write_bytes(raw)
    try:
        weights = open_weights(path)
    except ValueError as error:
        assert str(path) in str(error)
        return False
    read_all(weights)
    return True


def test_flipped_bytes_in_a_header(tmp_path: Path, memory: None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(3, 2), "b": torch.zeros(5).half()}, path, {"format": "pt"})
    raw = path.read_bytes()
    opened = sum(survives(r, path) for r in flips(raw, 0, len(raw) - 34, 800))
    assert 10 < opened < 400  # a changed name is no damage that a reader could see


def test_flipped_bytes_and_a_whole_conversion(
    state: dict[str, Tensor], tmp_path: Path, memory: None
) -> None:
    """A header of 30 kB: whatever changes in it, the conversion says so, or nothing changed."""
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for changed in flips(raw, 8, header, 60):
        if changed[:header].split() == raw[:header].split():
            continue
        path.write_bytes(changed)
        refused(path, "model.safetensors")


# --- pickled files --------------------------------------------------------------------------------


class Calls:
    """Unpickling it would call a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Torn:
    """A tensor that unpickling would build over a storage of four numbers, at any size."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        untyped = torch.arange(4.0).untyped_storage()
        self.storage = torch.storage.TypedStorage(
            wrap_storage=untyped, dtype=torch.float32, _internal=True
        )
        self.where = offset, size, stride

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        more = (False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.where, *more)


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "a command": lambda mark: Calls(os.system, f"touch {mark}"),
    "an opened file": lambda mark: Calls(open, str(mark), "w"),
    "evaluated code": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "in a tensor's place": lambda mark: {"conv_in.weight": Calls(os.mkdir, str(mark))},
    "beside the tensors": lambda mark: {"state_dict": {}, "callbacks": Calls(os.mkdir, str(mark))},
    "below state_dict": lambda mark: {"state_dict": {"a": [Calls(os.mkdir, str(mark))]}},
    "a key": lambda mark: {Calls(os.mkdir, str(mark)): 1},
    "an import": lambda mark: Calls(__import__, "antigravity"),
    "a module loaded": lambda mark: Calls(torch.load, str(mark)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".pt"])
@pytest.mark.parametrize("case", ATTACKS)
def test_nothing_of_a_pickle_runs(
    case: str, suffix: str, zipped: bool, tmp_path: Path, memory: None
) -> None:
    mark = tmp_path.with_name(f"{tmp_path.name}-ran")
    path = tmp_path / f"model{suffix}"
    torch.save(ATTACKS[case](mark), path, _use_new_zipfile_serialization=zipped)
    refused(path, r"holds Python objects \(\S+\) besides tensors.*use the safetensors file")
    assert not mark.exists()


def test_the_attacks_would_run(tmp_path: Path) -> None:
    """The control: plain unpickling runs them."""
    torch.save(ATTACKS["a command"](tmp_path / "ran"), tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def another_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("letter.txt", "no weights")


def bomb(path: Path) -> None:
    """300 MB of zeros in 300 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(300 * 2**20))


def safetensors_by_another_name(path: Path) -> None:
    path.write_bytes(pack({"a": f32(0, 4)}, b"0000"))


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "no readable file of weights"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "no readable file of weights"),
    "text": (lambda path: path.write_text("version https://git-lfs"), "no readable file"),
    "a bare pickle": (bare_pickle, "no readable file of weights|expected tensors by name"),
    "TorchScript": (torchscript, r"is a TorchScript program.*state_dict\(\)"),
    "another archive": (another_archive, "no readable file of weights"),
    "a zip bomb": (bomb, "is compressed or damaged"),
    "safetensors by another name": (safetensors_by_another_name, "no readable file of weights"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_kind(case: str, tmp_path: Path) -> None:
    write, match = FOREIGN[case]
    write(tmp_path / "model.pth")
    with bounded():
        refused(tmp_path / "model.pth", match)


VALUES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda x: None, "got 'conv_in.weight' of type NoneType"),
    "a list": (lambda x: [x], "got 'conv_in.weight' of type list"),
    "a text": (lambda x: "weights", "got 'conv_in.weight' of type str"),
    "sparse": (lambda x: x.to_sparse(), "conv_in.weight is sparse_coo, not a plain tensor"),
    "without values": (lambda x: x.to("meta"), "conv_in.weight is on the device meta"),
    "a dtype without a name": (
        lambda x: x.to(torch.float8_e5m2fnuz),
        "is of torch.float8_e5m2fnuz|no readable file",
    ),
    "complex": (lambda x: x.to(torch.complex64), "is of torch.complex64"),
    "negated": (torch._neg_view, "is a lazily negated"),
    "integers": (lambda x: x.long(), "must be of a floating type, got torch.int64"),
    "a number beyond all types": (lambda x: 10**30, "'conv_in.weight' is too large a number"),
    "another shape": (lambda x: x[:1], r"must be \[16, 16, 3, 3\], got \[1, 16, 3, 3\]"),
    "more numbers than it has": (
        lambda x: Torn((16, 16, 3, 3), (144, 9, 3, 1)),
        "no readable file of weights",
    ),
    "10^13 numbers": (lambda x: Torn((10**13,), (1,)), "no readable file of weights"),
    "one number 10^18 times": (
        lambda x: Torn((10**9, 10**9), (0, 0)),
        r"must be \[16, 16, 3, 3\], got \[1000000000, 1000000000\]",
    ),
    "before its storage": (lambda x: Torn((2,), (1,), -2), "no readable file of weights"),
    "far behind its storage": (lambda x: Torn((2,), (1,), 10**12), "no readable file of weights"),
    "backwards": (lambda x: Torn((4,), (-1,), 3), "no readable file of weights"),
    "of a negative size": (lambda x: Torn((-4,), (1,)), "no readable file of weights"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_is_no_plain_tensor(
    case: str, zipped: bool, state: dict[str, Tensor], tmp_path: Path, memory: None
) -> None:
    make, match = VALUES[case]
    data = state | {"conv_in.weight": make(state["conv_in.weight"])}
    path = tmp_path / "model.pth"
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    refused(path, match)


def test_what_is_no_mapping_of_names(tmp_path: Path, memory: None) -> None:
    path = tmp_path / "model.pth"
    for data in ([torch.zeros(2)], torch.zeros(2), 3, {3: torch.zeros(2)}, {"a": {"b": {}}}):
        torch.save(data, path)
        refused(path, "expected tensors by name")
    torch.save({}, path)
    refused(path, "holds no tensor")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_flipped_pickles(zipped: bool, tmp_path: Path, memory: None) -> None:
    buffer = io.BytesIO()
    data = {"state_dict": {"a.weight": torch.ones(3, 2), "b": torch.zeros(5).half()}, "epoch": 3}
    torch.save(data, buffer, _use_new_zipfile_serialization=zipped)
    raw, path = buffer.getvalue(), tmp_path / "model.ckpt"
    assert survives(raw, path)
    step = max(len(raw) // 100, 1)
    assert not any(survives(raw[:end], path) for end in range(0, len(raw) - 1, step))
    opened = sum(survives(changed, path) for changed in flips(raw, 0, len(raw), 300))
    assert 0 < opened < 300


# --- shards ---------------------------------------------------------------------------------------


def shards(folder: Path, index: Any) -> Path:
    """Two shards and an index."""
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "model-2.safetensors")
    path = folder / f"model{INDEX}"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


BOTH = {"a": "model-1.safetensors", "b": "model-2.safetensors"}


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("", "must hold a weight_map"),
        ("[1]", "must hold a weight_map"),
        ("[" * 100_000, "must hold a weight_map"),
        ({"weight_map": [1]}, "must hold a weight_map"),
        ({"metadata": {}}, "must hold a weight_map"),
        ({"weight_map": BOTH | {"c": "model-2.safetensors"}}, "names c and 0 more that no shard"),
        ({"weight_map": BOTH | {"c": "model-3.safetensors"}}, "model-3.safetensors does not exist"),
        ({"weight_map": {"a": "model-2.safetensors"}}, "says b is in None"),
        ({"weight_map": BOTH | {"a": "model-2.safetensors"}}, "says b|says a|no shard holds"),
        (
            {"weight_map": {"a": "../model-1.safetensors"}},
            "a shard must be a file of weights besid",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "a shard must be a file of weights beside it"),
        ({"weight_map": {"a": ".."}}, "got a folder|beside it"),
        ({"weight_map": {"a": ""}}, "beside it"),
        ({"weight_map": {"a": 3}}, "3 does not exist"),
        ({"weight_map": {"a": f"model{INDEX}"}}, "a shard must be a file of weights beside it"),
    ],
)
def test_a_bad_index(index: Any, match: str, tmp_path: Path, memory: None) -> None:
    refused(shards(tmp_path, index), match)


def test_a_good_index(tmp_path: Path) -> None:
    weights = open_weights(shards(tmp_path, {"weight_map": BOTH}))
    assert sorted(weights.entries) == ["a", "b"] and len(weights.files) == 3


# --- what is written ------------------------------------------------------------------------------


def test_a_cast_that_overflows_names_the_tensor(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, name = tmp_path / "model.safetensors", "conv_out.weight"
    save_file(state | {name: state[name] + 1e6}, path)
    with pytest.raises(ValueError, match=rf"{name} reaches 1e\+06, too large for torch.float16"):
        convert(path, tmp_path / "model", arch="debug", dtype="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    convert(path, tmp_path / "model", arch="debug", dtype="bf16", check=True)


def test_a_write_that_fails_leaves_nothing(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    entries = dict(open_weights(tmp_path / "model.safetensors").entries)
    name = list(entries)[-1]
    entries[name] = type(entries[name])(entries[name].shape, torch.float32, lambda: torch.ones(1))
    with pytest.raises(ValueError, match=f"{name} must be torch.float32"):
        write_safetensors(tmp_path / "out.safetensors", entries)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_existing_target_is_kept(state: dict[str, Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "model"
    save_file(state, source)
    target.mkdir()
    (target / "letters.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists already: it is not a model folder"):
            convert(source, target, arch="debug", overwrite=overwrite)
    assert (target / "letters.txt").read_text() == "precious"
    convert(source, tmp_path / "other", arch="debug")
    with pytest.raises(ValueError, match="add --overwrite"):
        convert(source, tmp_path / "other", arch="debug")
    source.write_bytes(source.read_bytes()[:-1])
    before = (tmp_path / "other/backbone.safetensors").read_bytes()
    with pytest.raises(ValueError, match="truncated or damaged"):
        convert(source, tmp_path / "other", arch="debug", overwrite=True)
    assert (tmp_path / "other/backbone.safetensors").read_bytes() == before


def test_a_model_folder_is_replaced_whole_or_not_at_all(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "model"
    save_file(state, source)
    convert(source, target, arch="debug")
    (target / "notes.txt").write_text("of the old one")
    rename, calls = os.rename, []

    def failing(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == 2:  # the old one is aside, the new one not yet in
            raise OSError(28, "No space left on device", str(b))
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        convert(source, target, arch="debug", overwrite=True)
    assert (target / "notes.txt").exists() and len(calls) == 3
    monkeypatch.undo()
    convert(source, target, arch="debug", overwrite=True)
    assert not (target / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.safetensors"]


def test_odd_header_lengths_are_read(tmp_path: Path) -> None:
    """The format aligns nothing: tensors may begin at any byte."""
    values = torch.arange(6.0)
    for spaces in range(8):
        text = json.dumps({"a": f32(0, 24, [2, 3])}).encode() + b" " * spaces
        (tmp_path / "a.safetensors").write_bytes(pack(text, values.numpy().tobytes()))
        entry = open_weights(tmp_path / "a.safetensors").entries["a"]
        assert torch.equal(entry.read(), values.view(2, 3))


def test_every_dtype_is_read_as_it_was_written(tmp_path: Path) -> None:
    from weights_convert.files import DTYPES

    tensors = {
        name: (torch.arange(6) % 2).to(dtype).view(2, 3) for name, dtype in DTYPES.items()
    } | {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    first = open_weights(tmp_path / "a.safetensors").entries
    write_safetensors(tmp_path / "b.safetensors", first, {"format": "pt"})
    second = open_weights(tmp_path / "b.safetensors").entries
    for (name, want), entries in itertools.product(tensors.items(), (first, second)):
        got = entries[name].read()
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.view(-1).view(torch.uint8))
