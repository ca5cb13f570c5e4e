"""What a distillation needs of memory, known before it starts: python -m snoopi.train --dry-run.

What stays (weights, gradients, moments, average, text encoders, VAE) is counted from shapes. What
comes and goes (activations, casts, gathered weights) is measured on a step of the real networks on
the meta device, where tensors have shapes and no memory: every storage that the step makes is
followed until it dies. The step is the CPU's; a GPU's attention keeps its inputs in bf16, so that
it needs less. What an allocator wastes and what libraries hold is not in it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snoopi import lora, parallel, zoo
from snoopi.conditioning import Conditioning
from snoopi.config import Config
from snoopi.folders import SPEC_FILE, read_tools
from snoopi.guidance import NASA
from snoopi.methods.clip_loss import clip_loss, text_embeddings
from snoopi.methods.vsd import choose_passes, surrogate, teacher_scores
from snoopi.ops.library import attention_op
from snoopi.ops.nasa import pays
from snoopi.ops.packs import TextPack
from snoopi.zoo import ModelSpec, ToolSpec

GIB = 2**30
RANKS = (1, 2, 4, 8, 64)  # columns of the table
SMALL = 50_000_000  # parameters of a backbone below which a run starts without its plan


# --- one step without memory ----------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the storages made under it that are alive: `now`, and at most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and take note of what it made."""
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return made

    def _follow(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.now -= size

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.now


class Work(NamedTuple):
    """Bytes above the networks' own at the peaks of a step, gradients and casts included.

    student: the student's update, with the teachers' scores in it; clip: the CLIP loss in the
    middle of it, 0 without; lora: the LoRA teacher's update.
    """

    student: int
    clip: int
    lora: int


class Case(NamedTuple):
    """One step to be measured: pictures at once, and how the recipe has it run.

    clip: what the CLIP loss adds to the model's networks (`clip_tools`). gathered: weights come
    whole in run.dtype, as FSDP2 hands them out, and gradients leave at once.
    """

    spec: ModelSpec
    config: Config
    clip: ToolSpec | None
    batch: int
    gathered: bool


_MEASURED: dict[str, Work] = {}  # by the case's repr: a spec's table of strengths has no hash


def _work_of(case: Case) -> Work:
    """The step of a case, measured once."""
    key = repr(case)
    if key not in _MEASURED:
        with torch.device("meta"), _as_on_cpu(), Live() as live:
            student, pair = networks(case.spec, case.config)
            for net in (student, pair):
                if case.config.parallel.checkpointing:
                    for block in net.blocks():
                        block.forward = functools.partial(_forgetting, block.forward)
                    parallel.checkpoint_blocks(net.blocks())
                if case.gathered:
                    _as_gathered(net, case.config.run.dtype)
            judge = None if case.clip is None else Judge.build(case.spec, case.clip)
            _MEASURED[key] = step(case, student, pair, judge, live)
    return _MEASURED[key]


def _as_gathered(net: nn.Module, dtype: parallel.Dtype) -> None:
    if dtype == "bf16":
        net.to(torch.bfloat16)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _Casts:
    """Autocast to bf16, which the meta device has not: inputs are cast, trained weights once."""

    def __init__(self) -> None:
        self.on = self.within = False
        self.kept: dict[int, Tensor] = {}

    def __call__(self, x: Any) -> Any:
        if not self.on or not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not isinstance(x, nn.Parameter) or not x.requires_grad:
            return x.to(torch.bfloat16)
        if id(x) not in self.kept:
            self.kept[id(x)] = x.to(torch.bfloat16)
        return self.kept[id(x)]


_casts = _Casts()


@contextmanager
def _cast(dtype: parallel.Dtype) -> Iterator[None]:
    """As `parallel.autocast`, whose copies of weights live as long as the context.

    It stays on after it: in a backward pass checkpointed blocks run as they did.
    """
    _casts.on, _casts.within = dtype == "bf16", True
    try:
        yield
    finally:
        _casts.within = False
        _casts.kept.clear()


def _forgetting(forward: Any, *args: Any) -> Any:
    """A block's forward; where it runs again, autocast's context is of the block alone."""
    try:
        return forward(*args)
    finally:
        if not _casts.within:
            _casts.kept.clear()


@contextmanager
def _as_on_cpu() -> Iterator[None]:
    """torch.nn.functional with the CPU's attention and autocast for tensors on meta.

    Functions are put in place, not a mode: a backward pass that recomputes a block runs without
    the modes of the forward.
    """
    former = F.linear, F.conv2d, F.scaled_dot_product_attention

    def cast(function: Any) -> Any:
        return lambda *args: function(*map(_casts, args))

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        q, k, v = (_casts(x) for x in (q, k, v))
        text = TextPack(k.transpose(1, 2), v.transpose(1, 2), options.get("attn_mask"))
        if pays(q.transpose(1, 2), text):  # here the op is on the CPU alone
            scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
            return attention_op(q.transpose(1, 2), text.k, text.v, scale).transpose(1, 2)
        if torch.is_grad_enabled() and q.dtype == torch.bfloat16:  # see ops/eager.py
            q, k, v = q.float(), k.float(), v.float()
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]

    F.linear, F.conv2d = cast(former[0]), cast(former[1])
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear, F.conv2d, F.scaled_dot_product_attention = former
        _casts.on = False
        _casts.kept.clear()


def networks(spec: ModelSpec, config: Config, device: str = "meta") -> tuple[Any, Any]:
    """Student and teacher pair as the Distiller makes them, without their weights."""
    student = zoo.build(spec, "backbone", device).requires_grad_(True)
    if config.model.student == "lora":
        own = config.student_lora
        lora.inject(student, own.targets, own.rank, own.gamma)
    pair = zoo.build(spec, "backbone", device)
    lora.inject(pair, config.lora.targets, config.lora.rank, config.lora.gamma)
    if config.run.dtype == "bf16":
        parallel.store_bf16(pair)
    return student, pair


class Judge(NamedTuple):
    """The CLIP loss's networks on the meta device, frozen."""

    image_encoder: Any
    text_encoder: Any
    decoder: Any

    @classmethod
    def build(cls, spec: ModelSpec, tools: ToolSpec) -> Judge:
        """Of `clip_tools`; the model's VAE decodes where they have no decoder."""
        made = [
            zoo.build(tools if part in tools.parts() else spec, part)
            for part in ("image_encoder", "text_encoder", "vae")
        ]
        return cls(*(net.requires_grad_(False) for net in made))

    def loss(self, x0: Tensor, dtype: parallel.Dtype) -> None:
        """All prompts are read at once; then one picture stands for all, which come one by one."""
        length = self.text_encoder.config.length
        with _cast(dtype):
            texts = text_embeddings(
                self.text_encoder,
                lambda prompts: (torch.zeros(len(prompts), length, dtype=torch.int64), None),  # type: ignore[arg-type]
                [""] * len(x0),
            )
        clip_loss(x0[:1], texts[:1], 1.0, self.decoder, self.image_encoder, lambda: _cast(dtype))


def step(case: Case, student: Any, pair: Any, judge: Judge | None, live: Live) -> Work:
    """A Distiller's step without its optimizers, on zeros."""
    spec, config, batch = case.spec, case.config, case.batch
    start, dtype = live.now, config.run.dtype
    z = torch.zeros(batch, spec.latent_channels, spec.latent_size, spec.latent_size)
    cond, null = _text(spec, batch), _text(spec, 1)
    t, kappa = torch.full((batch,), 500), torch.ones(batch)
    negative, guided = None, cond
    if config.nasa_train.alpha[1] > 0:
        negative, region = _text(spec, batch), torch.ones(batch, 1, 1)
        guided = dataclasses.replace(cond, negative=negative, guidance=NASA(1.0), region=region)
        for layer in student.cross_attentions():  # the op would refuse weights autocast has not met
            layer.to_out[0].register_forward_hook(lambda *_: None)
    _gradients_of_former_parts(student, case)
    live.restart()
    with _cast(dtype):
        x0 = student(z, t, guided).float()
    with _cast(dtype):
        asked, pixels = config.parallel.teacher_pass, batch * spec.latent_size**2
        passes = choose_passes(asked, case.gathered, pixels)
        teacher_scores(pair, x0.detach(), t, cond, null, kappa, kappa, passes, negative=negative)
    loss, first, clip = surrogate(x0, torch.zeros_like(x0)).mean(), live.peak - start, 0
    if judge is not None:
        live.restart()
        judge.loss(x0, dtype)
        clip = live.peak - start
    live.restart()
    torch.autograd.backward(loss)
    first, x0 = max(first, live.peak - start), x0.detach()
    student.zero_grad(set_to_none=True)
    _gradients_of_former_parts(pair, case)
    live.restart()
    with _cast(dtype):
        error = pair(x0, t, cond).float() - x0
    torch.autograd.backward(error.square().mean())
    pair.zero_grad(set_to_none=True)
    return Work(first, clip, live.peak - start)


def _gradients_of_former_parts(net: nn.Module, case: Case) -> None:
    """Under run.accumulate they are there from the start (gathered ones: see `plan`)."""
    if case.config.run.accumulate > 1 and not case.gathered:
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def _text(spec: ModelSpec, batch: int) -> Conditioning:
    """A conditioning of the shapes that the model's text encoders give."""
    backbone, length = spec.backbone, spec.text[0].config.length
    mask = torch.ones(batch, length, dtype=torch.bool) if spec.text[0].config.masked else None
    pooled = getattr(backbone, "pooled_width", None)
    side = spec.latent_size * spec.vae.factor
    ids = backbone.size_ids(side, side)
    return Conditioning(
        torch.zeros(batch, length, backbone.text_width),
        mask,
        None if pooled is None else torch.zeros(batch, pooled),
        None if ids is None else torch.tensor([ids]).expand(batch, len(ids)),
    )


# --- the plan -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Memory of one rank of a world, in bytes: what stays, what comes and goes, the peak."""

    ranks: int
    batch: int
    stays: dict[str, int]
    work: dict[str, int]

    @property
    def peak(self) -> int:
        """What stays and the largest of what comes and goes."""
        return sum(self.stays.values()) + max(self.work.values())


def plan(spec: ModelSpec, config: Config, ranks: int) -> Plan:
    """The memory of a rank when `ranks` share a vsd recipe.

    Raises:
        ValueError: the ranks and run.accumulate do not divide run.batch.
    """
    parts, share = ranks * config.run.accumulate, config.run.batch
    if share % parts:
        raise ValueError(
            f"--ranks: expected {ranks} ranks x run.accumulate = {config.run.accumulate} to divide "
            f"run.batch = {share}"
        )
    batch, sharded = share // parts, _is_sharded(config, ranks)
    student, pair = networks(spec, config)
    learns = [p for p in student.parameters() if p.requires_grad]
    tools, over = clip_tools(spec, config), ranks if sharded else 1
    work = _work_of(Case(spec, _that_matters(config), tools, batch, sharded))
    if sharded:
        groups = _gathered(student, config.run.dtype), _gathered(pair, config.run.dtype)
        roots = sum(root for root, _ in groups)
        gathered = roots + max(block for _, block in groups)
        # Between the parts of a step FSDP2 keeps gradients whole: they are reduced after the last.
        held = over if config.run.accumulate == 1 else 1
        student_gradients, lora_gradients = size(learns, held), size(lora.parameters(pair), held)
        work = Work(
            work.student + gathered + student_gradients,
            work.clip + roots + (student_gradients if held == 1 else 0),
            work.lora + gathered + lora_gradients,
        )
    works = {"student's update": work.student}
    if tools is not None:
        works["its CLIP loss"] = work.clip
    works["LoRA teacher's update"] = work.lora
    return Plan(ranks, batch, what_stays(spec, config, ranks), works)


def what_stays(spec: ModelSpec, config: Config, ranks: int) -> dict[str, int]:
    """The bytes that a rank of `ranks` holds all the time, by what they are."""
    over = ranks if _is_sharded(config, ranks) else 1
    student, pair = networks(spec, config)
    trained = [p for net in (student, pair) for p in net.parameters() if p.requires_grad]
    average = {"fp32": 4, "bf16": 2}[config.ema.dtype] if config.ema.decay else 0
    learns = [p for p in student.parameters() if p.requires_grad]
    parts_read = () if config.data.cache else spec.parts()  # the cache stands in for the encoders
    texts = [zoo.build(spec, part) for part in parts_read if part.startswith("text_encoder")]
    stays = {
        "student": size(student.parameters(), over),
        "teacher pair": size(pair.parameters(), over),
        "optimizer moments": 2 * size(trained, over),
        "moving average": size(learns, over) * average // 4,
        "text encoders": sum(size(net.parameters(), 1) for net in texts),
        "VAE": size(zoo.build(spec, "vae").state_dict().values(), 1),
    }
    tools = clip_tools(spec, config)
    if tools is not None:
        nets = [zoo.build(tools, part) for part in tools.parts()]
        stays["CLIP loss's networks"] = sum(size(net.parameters(), 1) for net in nets)
    return stays


def _is_sharded(config: Config, ranks: int) -> bool:
    """As `parallel.is_sharded`, of a world that is not there."""
    shard = config.parallel.shard
    return shard == "always" or (shard == "auto" and ranks > 1)


def clip_tools(spec: ModelSpec, config: Config) -> ToolSpec | None:
    """The networks that a recipe's CLIP loss adds to the model's: both towers, and its TAESD.

    As the folders of [clip_loss] hold them; one that is not there yet is taken to be the model that
    its name says, or else the usual one. None without the loss.

    Raises:
        ValueError: a folder that is there holds other tools.
    """
    section = config.clip_loss
    if not section.weight:
        return None
    wanted = [("model", "clip-vit-b-32", ["image_encoder", "text_encoder"])]
    if section.decoder == "taesd":
        wanted.append(("taesd", "taesd", ["vae"]))
    parts: dict[str, Any] = {}
    for key, usual, names in wanted:
        folder = Path(getattr(section, key))
        found = _tools(folder, usual).parts()
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"clip_loss.{key}: {folder} has no {', no '.join(missing)}")
        parts |= {name: found[name] for name in names}
    if "vae" in parts:  # a TAESD of other latents is refused when it is read
        parts["vae"] = dataclasses.replace(parts["vae"], latent_channels=spec.latent_channels)
    return ToolSpec("clip_loss", parts)


def _tools(folder: Path, usual: str) -> ToolSpec:
    if (folder / SPEC_FILE).is_file():
        return read_tools(folder)[0]
    return zoo.TOOLS.get(folder.name, zoo.TOOLS[usual])


def _that_matters(config: Config) -> Config:
    """A recipe that is equal for all whose steps are: what was measured once serves again."""
    parts = min(config.run.accumulate, 2)
    run = dataclasses.replace(Config().run, dtype=config.run.dtype, accumulate=parts)
    model = dataclasses.replace(Config().model, student=config.model.student)
    return Config(
        run=run,
        model=model,
        lora=config.lora,
        student_lora=config.student_lora,
        vsd=config.vsd,
        nasa_train=config.nasa_train,
        parallel=config.parallel,
    )


def size(tensors: Iterable[Tensor], ranks: int) -> int:
    """Bytes of one rank's rows of tensors, the first rank's, which has the most."""
    return sum(
        t.element_size() * (-(-len(t) // ranks) * t[0].numel() if t.ndim else 1) for t in tensors
    )


def _gathered(net: Any, dtype: parallel.Dtype) -> tuple[int, int]:
    """Bytes of FSDP2's whole weights: the root's, which stay, and those of the blocks in hand.

    Two blocks at once (the next one is gathered ahead), and one's gradients, with the copy in fp32
    that is reduced.
    """
    width = {"fp32": 4, "bf16": 2}[dtype]
    blocks = [sum(p.numel() for p in block.parameters()) for block in net.blocks()]
    free = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in net.blocks()]
    root = sum(p.numel() for p in net.parameters()) - sum(blocks)
    return root * width, 2 * max(blocks) * width + max(free) * (width + 4)


def available(device: str) -> tuple[int, str]:
    """Bytes of memory of this machine's device, and what it is."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def worlds(config: Config) -> list[int]:
    """The world sizes of the table that a recipe's batch can be divided among."""
    return [n for n in RANKS if config.run.batch % (n * config.run.accumulate) == 0]


def is_small(spec: ModelSpec) -> bool:
    """Whether a run of the model needs no plan: it fits, and starts before a plan is made."""
    return sum(p.numel() for p in zoo.build(spec).parameters()) < SMALL


def describe(spec: ModelSpec, config: Config, ranks: Sequence[int]) -> str:
    """Parameter counts and the table of memory by rank, one column a world size."""
    student, pair = networks(spec, config)
    adapters = sum(p.numel() for p in lora.parameters(pair))
    own = sum(p.numel() for p in lora.parameters(student))
    whole = sum(p.numel() for p in student.parameters()) - own
    lines = [
        f"student: {whole:,} parameters, all trained, fp32"
        if not own
        else f"student: {whole:,} parameters, frozen, and {own:,} of adapters, trained, fp32",
        f"teacher pair: {whole:,} parameters, frozen, {config.run.dtype}",
        f"adapters: {adapters:,} parameters, trained, fp32",
    ]
    for part in list(spec.parts())[1:]:
        count = sum(p.numel() for p in zoo.build(spec, part).parameters())
        lines.append(f"{part}: {count:,} parameters, frozen, fp32")
    tools = clip_tools(spec, config)
    if tools is not None:
        for part in tools.parts():
            count = sum(p.numel() for p in zoo.build(tools, part).parameters())
            lines.append(f"CLIP loss's {part}: {count:,} parameters, frozen, fp32")
    plans = [plan(spec, config, n) for n in ranks]
    lines += ["", *_table(plans), _other(spec, config, plans[0]), _verdict(config, plans)]
    return "\n".join(lines)


def _table(plans: Sequence[Plan]) -> list[str]:
    def row(name: str, values: Sequence[str]) -> str:
        return f"{name:<40}" + "".join(f"{value:>9}" for value in values)

    lines = [row("GiB of a rank, ranks:", [str(p.ranks) for p in plans])]
    lines.append(row("pictures at once", [str(p.batch) for p in plans]))
    for name in plans[0].stays:
        lines.append(row(name, [f"{p.stays[name] / GIB:.2f}" for p in plans]))
    for name in plans[0].work:
        lines.append(row(f"{name} (comes and goes)", [f"{p.work[name] / GIB:.2f}" for p in plans]))
    return [*lines, row("peak", [f"{p.peak / GIB:.2f}" for p in plans])]


def _other(spec: ModelSpec, config: Config, first: Plan) -> str:
    """The peak with activation checkpointing the other way."""
    on = config.parallel.checkpointing
    other = dataclasses.replace(config.parallel, checkpointing=not on)
    peak = plan(spec, dataclasses.replace(config, parallel=other), first.ranks).peak
    way = "without" if on else "with"
    return f"{way} parallel.checkpointing the peak of {first.ranks} is {peak / GIB:.2f} GiB"


def _verdict(config: Config, plans: Sequence[Plan]) -> str:
    memory, name = available(config.run.device)
    fits = [str(p.ranks) for p in plans if p.peak <= memory]
    which = f"with {', '.join(fits)} ranks, one a device" if fits else "with none of these"
    return f"fits into the {memory / GIB:.1f} GiB of {name} {which}"
