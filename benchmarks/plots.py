"""PNG plots of a sweep. matplotlib is an extra (`plots`) and imported only when a plot is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Row
from snoopi.pictures import write_atomically

_COLOURS = {"fp32": "#1f5fa8", "bf16": "#c2571a"}


def check_installed(option: str) -> None:
    """Say what to install, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{option} needs matplotlib, which is not installed: "
            "pip install -r requirements/plots.txt"
        )


def draw_sweep(path: Path, axis: str, label: str, title: str, rows: Sequence[Row]) -> None:
    """Speed-up over eager and fraction of the floor over one swept quantity, a line a dtype.

    rows: of nasa_kernel, those that differ in `axis` alone.
    """
    from matplotlib.figure import Figure  # neither pyplot nor a display

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, floor = figure.subplots(1, 2)
    ticks = sorted({row[axis] for row in rows})
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = sorted((row for row in rows if row["dtype"] == dtype), key=lambda row: row[axis])
        at = [row[axis] for row in mine]
        style = {"color": _COLOURS[dtype], "marker": "o", "markersize": 4}
        speed.plot(at, [row["speedup"] for row in mine], label=f"{dtype} warm", **style)
        cold = [row["speedup_cold"] for row in mine]
        speed.plot(at, cold, label=f"{dtype} cold", linestyle="--", linewidth=1, **style)
        floor.plot(at, [row["roof_fraction"] for row in mine], label=dtype, **style)
    speed.axhline(1.0, color="0.5", linewidth=1)
    speed.set_ylabel("times as fast as eager")
    floor.set_ylabel("fraction of the floor (1: as fast as GEMM)")
    for part in (speed, floor):
        part.set_xscale("log", base=2)
        part.set_xticks(ticks, [str(tick) for tick in ticks])
        part.set_xticks([], minor=True)
        part.set_xlabel(label)
        part.set_ylim(bottom=0)
        part.grid(alpha=0.3)
        part.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
