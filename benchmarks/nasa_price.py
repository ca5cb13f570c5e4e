"""What NASA costs SD2.1 at 512 px: its cross-attentions, and a whole step of its UNet.

python -m benchmarks.nasa_price [--part attention|step|both] [--dtype bf16|fp32|both]
                                [--threads 1,2] [--pairs N] [--json FILE]

With NASA a cross-attention reads two texts instead of one. The price is judged against the same
layers without a negative, on PyTorch's scaled_dot_product_attention and Linear; in a step, on the
same network, packed by snoopi.optimize.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import calls, common, nasa_kernel
from benchmarks.calls import NASA_SCALE, Inputs, Shape
from benchmarks.common import Column, Row, Table, Times, number
from snoopi import errors, zoo
from snoopi.conditioning import Conditioning
from snoopi.guidance import NASA
from snoopi.noise import Noise
from snoopi.optimize import optimize

NAME = "benchmarks.nasa_price"
MODEL = "sd21"
LATENT = 64  # of a picture of 512 px
TEXT = 77  # tokens of a prompt, padding included


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 for a wrong result, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    return common.status(NAME, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    threads, names = common.thread_counts(options.threads), common.dtypes(options.dtype)
    if options.pairs < 1:
        raise ValueError(f"--pairs must be at least 1, got {options.pairs}")
    common.check_file("--json", options.json)
    machine = common.begin(threads, TABLE, f"{options.pairs} interleaved pairs")
    rows: list[dict[str, Any]] = []

    def add(made: list[dict[str, Any]]) -> None:
        rows.extend(made)
        print("\n".join(common.text_row(TABLE.columns, row) for row in made), flush=True)

    print("\n" + common.text_head(TABLE.columns), flush=True)
    with torch.inference_mode():
        for dtype in names:
            if options.part != "step":
                for count in threads:
                    add(measure_attention(dtype, count, options.pairs))
            if options.part != "attention":
                net = random_network(dtype)
                for count in threads:
                    add([measure_step(net, dtype, count, options.pairs)])
    command = _command(options, threads)
    common.finish(options.json, TABLE, command, machine, rows, [], common.busy(rows))


# --- the cross-attentions alone -------------------------------------------------------------------


def layer_shapes() -> list[Shape]:
    """The shapes of the model's cross-attentions in forward order, read off a pass on "meta"."""
    net = zoo.build(MODEL)
    config, layers, tokens = zoo.model(MODEL).backbone, net.cross_attentions(), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
        for layer in layers
    ]
    with torch.device("meta"):
        x = torch.empty(1, config.in_channels, LATENT, LATENT)
        net(x, torch.empty(1), Conditioning(torch.empty(1, TEXT, config.text_width)))
    for hook in hooks:
        hook.remove()
    return [
        Shape(m, TEXT, layer.heads, layer.to_q.out_features // layer.heads)
        for m, layer in zip(tokens, layers, strict=True)
    ]


def plain(x: Inputs) -> Tensor:
    """One layer without a negative: scaled_dot_product_attention and Linear."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k_pos, x.v_pos))  # [b h m d]
    z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [b m c]
    return F.linear(z, x.w_out, x.b_out)


def measure_attention(dtype: str, threads: int, pairs: int) -> list[dict[str, Any]]:
    """Rows of the layers by shape and of all of them together.

    Raises:
        WrongResult: an error of the op above the rule, naming the layer.
    """
    shapes = layer_shapes()
    inputs = [calls.make_inputs(shape, dtype) for shape in shapes]
    parts: dict[str, list[Callable[[], object]]] = {"nasa": [], "plain": [], "eager": []}
    with common.at_threads(threads):
        for shape, x in zip(shapes, inputs, strict=True):
            nasa_kernel.check(nasa_kernel.Case(MODEL, shape, dtype, threads), x)
            runs = calls.competitors(x)
            parts["nasa"].append(runs["warm"])
            parts["plain"].append(lambda x=x: plain(x))  # type: ignore[misc]
            parts["eager"].append(runs["eager"])
        times = common.interleave(parts, pairs)

    def of(what: str, chosen: Sequence[int]) -> dict[str, Any]:
        picked = {name: common.total([made[i] for i in chosen]) for name, made in times.items()}
        return _row(what, dtype, threads, picked)

    rows = []
    for shape in dict.fromkeys(shapes):
        same = [i for i, other in enumerate(shapes) if other == shape]
        rows.append(of(f"{len(same)} x m{shape.m} h{shape.h} d{shape.d}", same))
    return [*rows, of(f"all {len(shapes)} layers", range(len(shapes)))]


# --- a whole step ---------------------------------------------------------------------------------


def random_network(dtype: str) -> Any:
    """The model's backbone with random weights (torch's own initialisation)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = zoo.build(MODEL).to(common.DTYPES[dtype]).to_empty(device="cpu")
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
    return net


def measure_step(net: Any, dtype: str, threads: int, pairs: int) -> dict[str, Any]:
    """The row of one call of the network as a pipeline makes it.

    `optimize` packs it, and K and V of its texts are filled in beforehand (for NASA packed).

    Raises:
        WrongResult: a prediction that is not finite, or that the negative does not change.
    """
    config, noise = zoo.model(MODEL).backbone, Noise(0)
    what = f"a step of {MODEL}'s UNet"

    def draw(name: str, *sizes: int) -> Tensor:
        return noise.sample(name, 0, 0, sizes).to(common.DTYPES[dtype])

    optimize(net.requires_grad_(False))
    x, t = draw("x", 1, config.in_channels, LATENT, LATENT), torch.tensor([999])
    text, negative = (
        Conditioning(draw(name, 1, TEXT, config.text_width)) for name in ("text", "negative")
    )
    nasa = Conditioning(text.tokens, negative=negative, guidance=NASA(NASA_SCALE))
    filled = {"nasa": net.text_kv(nasa), "plain": net.text_kv(text)}
    with common.at_threads(threads):
        results = [net(x, t, cond) for cond in filled.values()]
        if not all(result.isfinite().all() for result in results) or results[0].equal(results[1]):
            raise common.WrongResult(f"{what} {dtype}: not finite, or the negative changes nothing")
        parts: dict[str, list[Callable[[], object]]] = {
            name: [lambda cond=cond: net(x, t, cond)]  # type: ignore[misc]
            for name, cond in filled.items()
        }
        times = common.interleave(parts, pairs, warmup=1)
    return _row(what, dtype, threads, {name: made[0] for name, made in times.items()})


# --- rows -----------------------------------------------------------------------------------------


def _row(what: str, dtype: str, threads: int, times: dict[str, Times]) -> dict[str, Any]:
    ours, base, chain = times["nasa"], times["plain"], times.get("eager")
    ratios = [a / b for a, b in zip(ours.seconds, base.seconds, strict=True)]
    return {
        "shape": what,
        "dtype": dtype,
        "threads": threads,
        "nasa_ms": ours.ms,
        "plain_ms": base.ms,
        "eager_ms": None if chain is None else chain.ms,
        "ratio_of_medians": ours.ms / base.ms,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": common.quartiles(ratios),
        "quartiles_ms": {name: taken.quartiles_ms for name, taken in times.items()},
        "cores": {name: taken.cores for name, taken in times.items()},
    }


def _range(row: Row) -> str:
    low, high = row["ratio_quartiles"]
    return f"{low:.3f}-{high:.3f}"


TABLE = Table(
    f"The price of NASA in {MODEL} at {8 * LATENT} px: `{NAME}`",
    (
        Column("what", "", lambda row: row["shape"], 26),
        Column("type", "", lambda row: row["dtype"], 4),
        Column("thr", "threads", number("threads", "d"), 3),
        Column("NASA", "ms, both texts, by the op; packed beforehand", number("nasa_ms"), 9),
        Column("plain", "ms, the prompt alone: SDPA and Linear", number("plain_ms"), 9),
        Column("eager", "ms, NASA without the op: SDPA twice", number("eager_ms"), 9),
        Column("cores", "in use, of the competitor with the fewest", common.cores, 5),
        Column(
            "medians",
            "NASA's median over plain's: 1.00 is a negative for nothing",
            number("ratio_of_medians", ".3f"),
            7,
        ),
        Column("pairs", "median of NASA over plain, pair by pair", number("ratio", ".3f"), 6),
        Column("quartiles", "of these ratios", _range, 11),
    ),
    (),
)


def _command(options: argparse.Namespace, threads: Sequence[int]) -> str:
    """The command without the file it writes."""
    counts = ",".join(map(str, threads))
    words = f"--part {options.part} --dtype {options.dtype} --threads {counts}"
    return f"python -m {NAME} {words} --pairs {options.pairs}"


def _parser() -> argparse.ArgumentParser:
    parser = errors.Parser(
        prog=NAME,
        description=f"What NASA costs {MODEL} at {8 * LATENT} px, against no negative at all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--part", choices=("attention", "step", "both"), default="both", help="what to measure")
    common.add_options(parser)
    parser.set_defaults(dtype="bf16")
    add("--pairs", type=int, default=30, metavar="N", help="interleaved pairs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
