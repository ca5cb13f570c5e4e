"""Run states: what `--resume` reads. Sharded or not, at any number of ranks, bit for bit.

A run state is a folder `state/step-00000100` of torch.distributed.checkpoint (DCP) files and a
manifest.json with the step, the recipe's digest and the size and SHA-256 of every file. It is
written under another name, synced and renamed, so that what bears the final name is whole.

DCP's own reader unpickles: `.metadata` with pickle.load, plain values with torch.load(...,
weights_only=False). Here the former goes through an unpickler that knows DCP's metadata classes and
nothing else, the latter through weights_only=True; tensors are read so by DCP itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from snoopi import errors

FORMAT, VERSION = "snoopi run state", 1
_MANIFEST, _METADATA = "manifest.json", ".metadata"
_METADATA_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
T = TypeVar("T")


class RunStateError(ValueError):
    """A run state that can't be written, read or used; the message is one line for the user."""


@dataclass(frozen=True)
class Manifest:
    """What a run state says about itself. `files` maps a name to [bytes, SHA-256].

    milestone: it is never dropped for newer ones.
    """

    step: int
    config: str
    world: int
    torch: str
    files: dict[str, tuple[int, str]]
    milestone: bool = False
    format: str = FORMAT
    version: int = VERSION


# --- what goes into a state -----------------------------------------------------------------------


def not_finite(state: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of this rank's tensors in a state that hold NaN or infinity."""
    bad = []
    for name, value in state.items():
        path = f"{prefix}{name}"
        if isinstance(value, nn.Module | OptimizerState):
            value = value.state_dict()
        if isinstance(value, Mapping):
            bad += not_finite(value, f"{path}.")
        elif isinstance(value, Tensor):
            part = value.to_local() if isinstance(value, DTensor) else value
            bad += [] if bool(torch.isfinite(part).all()) else [path]
    return bad


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that require grad, by name: a LoRA teacher's state without its frozen base."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


class OptimizerState:
    """An Adam's or AdamW's moments and step counters, keyed by the parameters' names.

    Keyed by name, not by number, it fits any order of groups; hyper-parameters are left out, since
    the recipe and the step give them. Build it after sharding.

    Args:
        optimizer: torch.optim.Adam or AdamW (without amsgrad).
        named: names of (at least) all its parameters, for example `module.named_parameters()`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]
    ) -> None:
        assert isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        assert not any(group["amsgrad"] for group in optimizer.param_groups)
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self._optimizer = optimizer
        self._named = {name: parameter for name, parameter in named if parameter in held}
        assert len(self._named) == len(held), "a parameter of the optimizer has no name"

    def state_dict(self) -> dict[str, Any]:
        """{name: {step, exp_avg, exp_avg_sq}}: the optimizer's own tensors, zeros at first."""
        return {name: self._moments(parameter) for name, parameter in self._named.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over tensors; those that DCP has filled in place are already there."""
        for name, parameter in self._named.items():
            for key, value in self._moments(parameter).items():
                if value is not state[name][key]:
                    value.copy_(state[name][key])

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        moments = self._optimizer.state[parameter]
        if not moments:
            # What AdamW makes before its first step, so that there is something to load into.
            moments["step"] = torch.zeros((), dtype=torch.float32)
            moments["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            moments["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return moments


# --- writing --------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    config: str = "",
    keep: int = 2,
    milestone: bool = False,
    files: Mapping[str, bytes] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder`/state/step-NNNNNNNN, drop all but the newest `keep` states. Every rank calls.

    Args:
        folder: the run's folder.
        step: updates done so far.
        state: modules, OptimizerStates, or nested dicts of tensors and plain values, by name.
        config: digest of the recipe.
        keep: states to keep, at least 1, beside the milestones. States of later steps (a future
            that the run has left by resuming from an earlier state) are dropped, milestones too.
        milestone: this state is kept for good, however many follow.
        files: small files of this rank's own beside the tensors, by name (see `attached`); no two
            ranks may use one name.
        group: the ranks' process group for this save, by default the one of the run.

    Raises:
        RunStateError: it can't be written, for example because the disk is full; what was there
            before is untouched.
    """
    states = Path(folder) / "state"
    final = states / _name(step)
    partial = states / f".partial-{final.name}"
    try:
        _agreed(lambda: _clear(partial), main_only=True, group=group)
        _agreed(lambda: _write(state, partial, files or {}, group), group=group)
        parts = _gather(_hashes(partial), group)
        hashes = {name: entry for part in parts for name, entry in part.items()}
        noted = dict(sorted(hashes.items()))
        manifest = Manifest(step, config, _world(), torch.__version__, noted, milestone)
        _agreed(lambda: _publish(manifest, partial, final), main_only=True, group=group)
    except KeyboardInterrupt:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except RunStateError as error:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise RunStateError(
            f"cannot save the run state of step {step} in {states}: {error} "
            f"({_free_megabytes(folder)} MB free on that disk); earlier states are untouched"
        ) from None
    _agreed(lambda: _prune(states, step, keep), main_only=True, group=group)
    return final


class Saver:
    """Writes a run's states one after another: at once, or in the background of the run.

    In the background the state is copied into host memory (one more copy of it, kept for the next
    save) and a thread does all that `save` does, by collectives of a group of its own. A signal
    interrupts the main thread alone, so it never meets torch's writer there. What the thread meets
    is raised on all ranks by the next `check`, `save` or exit. Every rank calls every method.
    """

    def __init__(self, background: bool = False) -> None:
        self._background = background
        # gloo: a state in host memory; a group of its own: the run's collectives go on beside it.
        self._group = dist.new_group(backend="gloo") if background and _world() > 1 else None
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Wait for what is being written; after a Ctrl-C not: the state before it is whole."""
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._thread is not None:
            self._thread.join()

    def save(self, folder: Path, step: int, state: Mapping[str, Any], **how: Any) -> None:
        """`save`, after the one before it has ended. `how`: its further arguments."""
        self.wait()
        if not self._background:
            save(folder, step, state, **how)
            return
        copy = self._stager.stage(_plain_values(state))
        assert isinstance(copy, dict)  # no Future: this stager copies at once

        def work() -> None:
            try:
                save(folder, step, copy, **how, group=self._group)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="run state", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise a background save's error, at the same step on all ranks. A collective then."""
        if self._thread is not None:
            ranks = _gather((self._thread.is_alive(), self._error is not None))
            if any(error for _, error in ranks) or not any(alive for alive, _ in ranks):
                self.wait()

    def wait(self) -> None:
        """Wait for a background save, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def _plain_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with modules and optimizers as dicts, as DCP itself would make them."""
    with_state = (nn.Module, OptimizerState)
    return {k: v.state_dict() if isinstance(v, with_state) else v for k, v in state.items()}


def _free_megabytes(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder).free // 2**20)
    except OSError:
        return "unknown"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _clear(partial: Path) -> None:
    """Make an empty folder, removing what killed runs left."""
    for pattern in (".partial-*", ".gone-*"):
        for left in partial.parent.glob(pattern):
            shutil.rmtree(left)
    partial.mkdir(parents=True)


class _SavePlanner(DefaultSavePlanner):
    """Lets signals through between two tensors: in the middle of one, torch's writer (C++ that
    calls back into Python) makes an "unexpected pos" of a Ctrl-C, or ends the process."""

    def __init__(self, let_signals_through: Callable[[], None]) -> None:
        super().__init__()
        self._let_signals_through = let_signals_through

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._let_signals_through()
        return super().resolve_data(write_item)


def _write(
    state: Mapping[str, Any],
    partial: Path,
    files: Mapping[str, bytes],
    group: dist.ProcessGroup | None,
) -> None:
    writer = FileSystemWriter(partial, sync_files=True)
    with _quiet(), errors.held() as let_signals_through:
        planner = _SavePlanner(let_signals_through)
        dcp_save(
            dict(state),
            storage_writer=writer,
            planner=planner,
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    for name, content in files.items():
        with (partial / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _hashes(partial: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of this rank's share of the files."""
    names = sorted(path.name for path in partial.iterdir())
    return {name: _size_and_hash(partial / name) for name in names[_rank() :: _world()]}


def _size_and_hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _publish(manifest: Manifest, partial: Path, final: Path) -> None:
    """Write the manifest and give the folder its final name; each step on disk before the next."""
    with (partial / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    if final.exists():
        _drop(final)
    partial.rename(final)
    _sync(final.parent)


def _drop(path: Path) -> None:
    """Remove a state; it loses its name first, so that no half of it is ever found under it."""
    gone = path.with_name(f".gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def _prune(states: Path, step: int, keep: int) -> None:
    found = steps(states.parent)
    past = [number for number in found if number <= step]
    for number in found:
        path = states / _name(number)
        if number > step or (number not in past[-keep:] and not _is_milestone(path)):
            _drop(path)


def _is_milestone(path: Path) -> bool:
    """By its own manifest, not by a recipe that may have changed since; one that is damaged is
    none."""
    try:
        return manifest(path).milestone
    except RunStateError:
        return False


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """Steps of the run states in a run's folder, in order; [] if there are none."""
    states = Path(folder) / "state"
    names = [path.name for path in states.iterdir()] if states.is_dir() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


def load_latest(folder: Path, state: dict[str, Any]) -> int:
    """Load the newest whole run state in place and return its step. Every rank calls.

    `state` has the names and shapes of the saved one; the number of ranks may differ. A state whose
    files are damaged is left out with a warning on stderr, and the one before it is taken.

    Raises:
        RunStateError: there is no whole run state, or it does not fit `state`.
    """
    troubles: list[str] = []
    for step in reversed(_gather(steps(folder))[0]):
        path = Path(folder) / "state" / _name(step)
        try:
            metadata = _agreed(functools.partial(_verified, path))
        except RunStateError as error:
            troubles.append(str(error))
            if _rank() == 0:
                print(f"warning: {error}; trying the run state before it", file=sys.stderr)
            continue
        assert metadata is not None
        _agreed(functools.partial(_load, path, metadata, state))
        return step
    what = f"no whole run state: {troubles[0]}" if troubles else "no run state"
    raise RunStateError(f"cannot resume from {folder}: {what}")


def noted_config(folder: Path, step: int) -> str:
    """What `save` was given as `config` for the state of a step."""
    return manifest(Path(folder) / "state" / _name(step)).config


def attached(folder: Path, step: int) -> dict[str, bytes]:
    """The files that `save` was given beside the tensors of a step, of all ranks, by name.

    For a state that `load_latest` has found whole. All ranks get all of them, so they are small.
    """
    path = Path(folder) / "state" / _name(step)
    names = [name for name in manifest(path).files if not _of_dcp(name)]
    return {name: (path / name).read_bytes() for name in names}


def _of_dcp(name: str) -> bool:
    return name == _METADATA or name.endswith(".distcp")


def manifest(path: Path) -> Manifest:
    """The manifest of one state folder.

    Raises:
        RunStateError: the folder is not a run state of this version.
    """
    try:
        found = json.loads((path / _MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        raise RunStateError(f"{path} is not a run state: it has no readable {_MANIFEST}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RunStateError(f"{path} is not a run state: {_MANIFEST} is of another format")
    if found.get("version") != VERSION:
        raise RunStateError(
            f"{path}: expected run state version {VERSION}, got {found.get('version')!r}"
        )
    try:
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in found["files"].items()}
        read = Manifest(**{**found, "files": files})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunStateError(f"{path} is not a run state: {_MANIFEST} is malformed") from None
    if not isinstance(read.step, int) or path.name != _name(read.step):
        raise RunStateError(f"{path} is not the state of its name: it is of step {read.step!r}")
    return read


def _verified(path: Path) -> Metadata:
    """DCP's metadata of a state whose files are all there and right; each rank checks a share."""
    files = manifest(path).files
    found = {item.name for item in path.iterdir()} - {_MANIFEST}
    if found != set(files):
        odd = sorted(found ^ set(files))
        raise RunStateError(f"{path} is damaged: files missing or foreign: {', '.join(odd)}")
    for name in sorted(files)[_rank() :: _world()]:
        size, sha = files[name]
        got, digest = _size_and_hash(path / name)
        if got != size:
            raise RunStateError(f"{path} is damaged: {name} has {got} of {size} bytes")
        if digest != sha:
            raise RunStateError(f"{path} is damaged: {name} does not have the SHA-256 noted for it")
    return _read_metadata(path, set(files))


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of which DCP's metadata is made; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        found = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if found or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a run state")


def _read_metadata(path: Path, files: set[str]) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO((path / _METADATA).read_bytes())).load()
        places = metadata.storage_data.values()
        assert isinstance(metadata, Metadata)
        assert all(p.relative_path in files and not p.transform_descriptors for p in places)
    except Exception as error:  # a foreign pickle can raise anything
        raise RunStateError(f"{path} is not a run state: bad {_METADATA}: {error}") from None
    return metadata


class _Reader(FileSystemReader):
    """DCP's reader with metadata that were read with care."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """DCP's planner wanting an exact fit: DCP would cast dtypes and pass over unasked-for keys."""

    def create_local_plan(self) -> LoadPlan:
        saved: Mapping[str, Any] = self.metadata.state_dict_metadata if self.metadata else {}
        wanted = self.state_dict
        troubles = [f"{name} is not in it" for name in sorted(wanted.keys() - saved.keys())]
        troubles += [f"{name} is not wanted" for name in sorted(saved.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & saved.keys()):
            there, here = _kind(saved[name]), _kind(wanted[name])
            if there != here:
                troubles.append(f"{name} is {there}, expected {here}")
        if troubles:
            more = f" and {len(troubles) - 3} more" if len(troubles) > 3 else ""
            raise RunStateError("; ".join(troubles[:3]) + more)
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        # The base class unpickles: give it bytes that were written here.
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def _kind(value: Any) -> str:
    """Shape and dtype, in words that are the same for a tensor and for its metadata."""
    if isinstance(value, TensorStorageMetadata):
        return f"{list(value.size)} {value.properties.dtype}"
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "a plain value"


def _load(path: Path, metadata: Metadata, state: dict[str, Any]) -> None:
    try:
        with _quiet():
            dcp_load(
                state,
                storage_reader=_Reader(path, metadata),
                planner=_Planner(),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise RunStateError(f"{path} does not fit this run: {_cause(error)}") from None


# --- the lock -------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder (made if absent) against a second run; given up when the process ends.

    Raises:
        RunStateError: another process holds it, or the folder can't be made.
    """
    file = _agreed(lambda: _take_lock(Path(folder)), main_only=True)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _take_lock(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refused must not be tried again at exit.
        file = (folder / ".lock").open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            file.close()
            raise RunStateError(f"{folder} is in use by another run (process {holder})") from None
        except OSError:
            file.close()
            raise
    except OSError as error:
        raise RunStateError(f"cannot use {folder} as a run's folder: {error.strerror}") from None
    return file


# --- ranks ----------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in order of ranks."""
    if _world() == 1:
        return [value]
    values: list[Any] = [None] * _world()
    dist.all_gather_object(values, value, group=group)
    return values


def _agreed(
    work: Callable[[], T], *, main_only: bool = False, group: dist.ProcessGroup | None = None
) -> T | None:
    """Do the work (on rank 0 only, if so asked); an error on any rank is raised on all of them."""
    result, trouble = None, ""
    if _rank() == 0 or not main_only:
        try:
            result = work()
        except (Exception, CheckpointException) as error:
            _reraise_interrupt(error)
            if not _expected(error):  # a bug of ours: the other ranks are told, this one shows it
                traceback.print_exception(error)
            trouble = _cause(error)
    troubles = [item for item in _gather(trouble, group) if item]
    if troubles:
        raise RunStateError(troubles[0])
    return result


def _reraise_interrupt(error: BaseException) -> None:
    """DCP wraps a Ctrl-C like an error; it is none."""
    for behind in _chain(error):
        if isinstance(behind, KeyboardInterrupt):
            raise behind from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what stands behind it; of DCP's wrapped errors the lowest rank's."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, CheckpointException):
            behind = behind.failures[min(behind.failures)][0]
        yield behind
        behind = behind.__cause__ or behind.__context__


def _expected(error: BaseException) -> bool:
    """Whether a disk, a foreign file or another rank's death can be the reason."""
    reasons = (OSError, RunStateError, pickle.UnpicklingError)
    chain = list(_chain(error))
    return any(isinstance(b, reasons) or errors.of_the_network(b) for b in chain)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong."""
    error = next(_chain(error))
    if isinstance(error, RunStateError):
        return str(error)
    # torch's writer answers a full disk with an error of its own; the reason stands behind it.
    for behind in _chain(error):
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")
        yield
