"""Ranks, sharding and precision: everything that a training loop asks of torch.distributed.

Models and losses know nothing of it. With one process (no torchrun) there is no process group and
every function here is the identity of its kind, so that one loop serves both. Random numbers need
no care: noise.py keys them by global index.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from snoopi.errors import Interrupted, RankLost, of_the_network

Shard = Literal["auto", "always", "never"]
Dtype = Literal["fp32", "bf16"]
Read = Callable[[str, slice], Tensor]  # rows of a named tensor
COMPILED = 16  # graphs of one block
# How long a rank waits for one that lives: rank 0 alone makes pictures and reports. One that has
# died is noticed at once.
TIMEOUT = timedelta(minutes=30)


# --- ranks ----------------------------------------------------------------------------------------


def setup(device: Literal["auto", "cpu", "cuda"] = "auto", group: bool = False) -> torch.device:
    """Choose this rank's device and join the process group if torchrun started several ranks.

    Args:
        device: "auto" is CUDA where there is one. Collectives of CPU tensors use gloo, of CUDA
            tensors NCCL.
        group: make a process group for a single process, too (parallel.shard = "always" needs it).

    Raises:
        ValueError: no such device, or fewer GPUs than ranks on this machine.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected a machine with CUDA for 'cuda', found none")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"rank {local} of this machine has no GPU: expected at most "
                f"{torch.cuda.device_count()} processes, one for each GPU"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", group)
    return torch.device(kind, local) if kind == "cuda" else torch.device("cpu")


def _join(backend: str, group: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        fresh = PrefixStore(_name_of_this_start(store, rank, world), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=TIMEOUT)
    elif group:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it by *
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _name_of_this_start(store: Store, rank: int, world: int, timeout: timedelta = TIMEOUT) -> str:
    """A name that the ranks of this start share, and no rank of an earlier one.

    torchrun's store outlives the ranks (TORCH_DISABLE_SHARE_RDZV_TCP_STORE is off by default), so
    after a restart it holds the addresses of dead ones, and a rank that is early would take them
    for its peers'. Under a prefix of this start's own it finds nothing old. torchrun's restart
    count is no such prefix: each machine has its own. So every rank says a word that is new,
    rank 0 answers each with the name, and waits until all have taken it.

    Raises:
        RankLost: a rank did not answer within the timeout.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    others = list(range(1, world)) if rank == 0 else [0]
    name, answered = word, dict.fromkeys(others, "")
    store.set(f"word/{rank}", word)
    while others:
        if rank == 0:
            for other in others:
                said = _peek(store, f"word/{other}")
                if said != answered[other]:  # the first may be a dead rank's
                    store.set(f"answer/{other}", f"{said} {name}")
                    answered[other] = said
            others = [other for other in others if _peek(store, f"taken/{other}") != name]
        else:
            said, _, name = _peek(store, f"answer/{rank}").partition(" ")
            if said == word:
                store.set(f"taken/{rank}", name)
                others = []
        if others and time.monotonic() > end:
            missing = ", ".join(map(str, others))
            raise RankLost(
                f"rank {missing} of {world} did not start within {timeout.total_seconds():g} s"
            )
        time.sleep(0.01 if others else 0)
    return name


def _peek(store: Store, key: str) -> str:
    """A value of the store, "" if it has none: does not wait for one."""
    return store.get(key).decode() if store.check([key]) else ""


def teardown() -> None:
    """Leave the process group. Waits for all ranks first: gloo may abort a rank that is behind."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def session(
    device: Literal["auto", "cpu", "cuda"] = "auto", group: bool = False
) -> Iterator[torch.device]:
    """`setup` on entry, `teardown` on exit; after an exception without waiting for other ranks.

    Raises:
        RankLost: another rank died or did not answer, here or in a collective of the body.
    """
    try:
        yield setup(device, group)
        teardown()
    except BaseException as error:
        # Another rank may hang in a collective that this one never reaches: do not join it there.
        if dist.is_initialized() and world_size() == 1:
            dist.destroy_process_group()
        if of_the_network(error):
            raise RankLost(_in_words(error)) from error
        raise


def _in_words(error: BaseException) -> str:
    """The first sentence of a collective's error, without the place in torch's source."""
    text = re.sub(r"\[\S+\.(cc|cpp|h):\d+\] ", "", str(error)).partition("\n")[0]
    return f"another rank has ended or does not answer ({text.partition('. ')[0]})"


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the body on rank 0, then on the others: a world or a cache is made once, then found."""
    try:
        if not is_main():
            barrier()
        yield
    finally:
        # Also after an error on rank 0, or the others would wait for ever.
        if is_main():
            barrier()


# --- the batch ------------------------------------------------------------------------------------


def slice_of(batch: int) -> range:
    """This rank's contiguous share of the global batch: indices into 0..batch-1.

    Raises:
        ValueError: the number of ranks does not divide the batch. (Unequal shares would make the
            mean of the ranks' mean losses another number than the mean over the batch.)
    """
    if batch % world_size():
        raise ValueError(f"run.batch: expected a multiple of {world_size()} ranks, got {batch}")
    share = batch // world_size()
    return range(rank() * share, (rank() + 1) * share)


def micro_batches(rows: range, parts: int) -> list[range]:
    """Split one rank's share into `parts` equal runs (run.accumulate).

    Raises:
        ValueError: `parts` does not divide the share.
    """
    if len(rows) % parts:
        raise ValueError(
            f"run.accumulate: expected a divisor of the {len(rows)} pictures of one rank, "
            f"got {parts}"
        )
    size = len(rows) // parts
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# --- numbers that all ranks share -----------------------------------------------------------------


def numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Scalars as Python's, float64, by one transfer. Waits for the device: ask once a step."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in values.items()}
    stacked = torch.stack([value.detach().double().reshape(()) for value in tensors.values()])
    found = dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: found[name] if name in found else float(values[name]) for name in values}


def mean(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Mean over ranks of each scalar, in float64 and by one collective. Waits for the device."""
    total = torch.tensor(list(numbers(values).values()), dtype=torch.float64)
    if values and world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    if world_size() == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return bool(total)


def first_text(text: str) -> str:
    """The first rank's text that is not empty, on every rank; "" if all are. A collective."""
    texts: list[Any] = [text]
    if world_size() > 1:
        texts = [None] * world_size()
        dist.all_gather_object(texts, text)
    return next((item for item in texts if item), "")


def check_equal(what: str, value: Any) -> None:
    """Raise ValueError on every rank unless all ranks hold an equal value (small and picklable)."""
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    odd = [number for number, other in enumerate(values) if other != values[0]]
    if odd:
        raise ValueError(
            f"{what} differs between ranks: {values[0]!r} on 0, {values[odd[0]]!r} on {odd[0]}"
        )


def fingerprint(module: nn.Module) -> list[float]:
    """Sum and sum of magnitudes of all weights, float64: equal weights give equal numbers."""
    sums = [0.0, 0.0]
    for value in module.state_dict().values():
        local = _local(value).double()
        sums = [sums[0] + local.sum().item(), sums[1] + local.abs().sum().item()]
    return sums


# --- sharding and precision -----------------------------------------------------------------------


def is_sharded(shard: Shard) -> bool:
    """Whether parallel.shard means FSDP2 here; "auto": with more than one rank (one would pay)."""
    return shard == "always" or (shard == "auto" and world_size() > 1)


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    policy: Shard = "auto",
    dtype: Dtype = "fp32",
    device: torch.device | None = None,
    methods: Sequence[str] = (),
    read: Read | None = None,
) -> nn.Module:
    """Apply FSDP2 in place: one group for each block, one for the rest. Returns the module.

    Build optimizers and averages after this call: it replaces Parameters. Only `forward` (and the
    `methods` named here, for example "encode") gathers the weights. Without sharding the module is
    only moved to the device.

    read(name, rows): of a module on the meta device, the rows (along the first dimension) of a
    parameter or buffer. Memory is made after sharding, for this rank's part alone, and filled
    tensor by tensor, so that no rank ever holds the whole network.

    With bf16 the weights are gathered in bf16, gradients are reduced in fp32, and no input is cast:
    FSDP2's default would turn a float timestep of 999 into 1000.

    Raises:
        ValueError: the ranks do not hold the same weights (each keeps only its own part of them);
            a parameter without dimensions is trainable.
    """
    device = device or torch.device("cpu")
    if read is None:
        module.to(device)
    if world_size() > 1:
        seen = fingerprint(module) if read is None else _glance(module, read)
        check_equal(f"the initial weights of {type(module).__name__}", seen)
    if not is_sharded(policy):
        return module if read is None else _fill(module, device, read)
    if not dist.is_initialized():
        raise ValueError("parallel.shard = 'always' at one rank needs setup(group=True)")
    # A scalar (CLIP's temperature) cannot be divided: every rank keeps it whole, which is right for
    # a frozen one only, since nothing averages its gradient.
    scalars = {p for p in module.parameters() if p.ndim == 0}
    if any(p.requires_grad for p in scalars):
        raise ValueError(f"a scalar of {type(module).__name__} cannot be sharded: freeze it")
    mesh = init_device_mesh(device.type, (world_size(),))
    inner = _precision(dtype)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    fully_shard(
        module, mesh=mesh, mp_policy=_precision(dtype, root=True), ignored_params=scalars or None
    )
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module if read is None else _fill(module, device, read)


@torch.no_grad()
def _fill(module: nn.Module, device: torch.device, read: Read) -> nn.Module:
    """Give a meta module memory, and each tensor this rank's rows."""
    module.to_empty(device=device)
    for name, value in module.state_dict().items():
        local, first = local_rows(value)
        rows = slice(first, first + len(local)) if local.ndim else slice(None)
        if local.numel():
            local.copy_(read(name, rows))
    return module


def _glance(module: nn.Module, read: Read) -> list[float]:
    """As `fingerprint`, of every tensor's first row alone: ranks may read different files."""
    first = (read(name, slice(0, 1)).double() for name in module.state_dict())
    sums = [(row.sum().item(), row.abs().sum().item()) for row in first]
    return [sum(column) for column in zip(*sums, strict=True)]


def store_bf16(module: nn.Module) -> nn.Module:
    """Keep frozen weights of matrix products and convolutions in bf16, in place.

    Under `autocast` it is what each call would make of them, so no result changes: half the memory,
    and nothing to cast. Norms, biases, tables and whatever trains stay as they are.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.requires_grad:
            layer.weight = nn.Parameter(layer.weight.to(torch.bfloat16), requires_grad=False)
    return module


def _precision(dtype: Dtype, root: bool = False) -> MixedPrecisionPolicy:
    if dtype == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        output_dtype=torch.float32 if root else None,
        cast_forward_inputs=False,
    )


def autocast(device: torch.device, dtype: Dtype) -> contextlib.AbstractContextManager[Any]:
    """The context for networks (not losses) under run.dtype: bf16 autocast, or nothing."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """torch.compile each block's forward. Call before `checkpoint_blocks` and `shard`.

    Graphs are made at the first calls, one for each kind of call: with gradients, without, and for
    each gate of the adapters. As in `checkpoint_blocks` copy a network before, not after.

    Raises (at a call):
        torch._dynamo.exc.Unsupported: a block that does not make one graph.
        torch._dynamo.exc.FailOnRecompileLimitHit: a block is called in more than COMPILED ways.
    """
    import torch._dynamo  # seconds, which who does not compile need not wait for

    # Without it a block that has had too many graphs would run without any, in silence.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[call-overload]  # torch's stubs are behind
            block.forward,
            fullgraph=True,
            backend=backend,
            recompile_limit=COMPILED,
            isolate_recompiles=True,  # blocks share their code, and would share the limit
        )


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Recompute each block's activations in the backward pass. Call before `shard`.

    The block's `forward` is wrapped on the instance, so copy a network before, not after.
    """
    for block in blocks:
        forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
        block.forward = forward


@contextlib.contextmanager
def gradient_sync(module: nn.Module, on: bool) -> Iterator[None]:
    """Reduce gradients in this backward pass or (accumulation, all but the last part) keep them."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.set_requires_gradient_sync(on)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def reshard(module: nn.Module) -> None:
    """Give the whole weights back that a forward pass without a backward one leaves gathered."""
    if isinstance(module, FSDPModule):
        module.reshard()


# --- gradients ------------------------------------------------------------------------------------


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (shares its storage); a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor (shares its storage), and which of its rows is the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    return tensor.to_local(), _first_row(tensor)


def _first_row(value: DTensor) -> int:
    """FSDP2 divides as torch.chunk: equal numbers of rows for every rank but the last ones."""
    return min(rank() * -(-len(value) // world_size()), len(value))


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average unsharded parameters' gradients over ranks; FSDP2 has done it for sharded ones."""
    if world_size() == 1:
        return
    plain = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if not plain:
        return
    flat = torch.cat([grad.reshape(-1).float() for grad in plain])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, part in zip(plain, torch.split(flat, [g.numel() for g in plain]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a joint L2 norm of at most `max_norm`; returns the norm before.

    Takes sharded and plain parameters together. `max_norm` = 0 only measures. A norm that is not
    finite is returned and nothing is scaled: the caller skips the update and stops the run. The
    norm, float64 [], stays on the device, and nothing here waits for it.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    sharded = [_local(grad) for grad in grads if isinstance(grad, DTensor)]
    plain = [grad for grad in grads if not isinstance(grad, DTensor)]
    squares = torch.stack([_norm(sharded, grads[0].device), _norm(plain, grads[0].device)]) ** 2
    if sharded and world_size() > 1:
        dist.all_reduce(squares[:1])
    norm = squares.sum().sqrt()
    above = norm.isfinite() & (norm > max_norm)
    # Asking a CPU's tensor costs nothing, and spares small norms the pass over the gradients.
    if max_norm > 0 and (not norm.is_cpu or above):
        scale = torch.where(above, max_norm / (norm + 1e-6), 1.0).float()
        torch._foreach_mul_([*sharded, *plain], scale)
    return norm


def _norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Joint L2 norm in float64 of the tensors' fp32 norms; 0 of none."""
    norms = [tensor.norm(dtype=torch.float32).double() for tensor in tensors]
    return (
        torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64, device=device)
    )


def gather_full(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole CPU tensors of a (sharded) state dict on rank 0, {} on the others. All ranks must call.

    One tensor at a time, so that no device ever holds the whole network.
    """
    gathered = {}
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main():
            gathered[name] = whole.detach().to("cpu", copy=True)
    return gathered


def gather_full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`gather_full` of a module's parameters and buffers."""
    return gather_full(module.state_dict())


# --- stopping -------------------------------------------------------------------------------------


class SignalGuard:
    """Turn SIGTERM and SIGINT (Ctrl-C) into a flag, so that a run can save its state and stop.

    `stop()` is asked after each step by every rank and answers the same on all. A second Ctrl-C
    raises Interrupted (a KeyboardInterrupt) at once. The former handlers come back on exit.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalGuard:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught and number == signal.SIGINT:
            raise Interrupted(number)
        self.caught = signal.Signals(number)
        if is_main():
            # Not print: the signal may have come in the middle of a write to the same stream.
            message = (
                f"\n{self.caught.name}: stopping after this step; Ctrl-C again stops at once\n"
            )
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())

    def stop(self) -> bool:
        """Whether any rank was told to stop. A collective: every rank asks once a step."""
        return any_rank(self.caught is not None)
