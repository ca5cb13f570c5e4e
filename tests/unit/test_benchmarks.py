"""The benchmark commands on tiny shapes: their files, their mistakes, and what stops them."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import (
    attention,
    calls,
    common,
    generate,
    model_forward,
    models,
    nasa_kernel,
    nasa_price,
    plots,
    sides,
    tables,
    train_step,
)
from benchmarks.calls import METHODS, Shape
from snoopi import ops, zoo
from snoopi.layers.attention import CrossAttention
from snoopi.layers.packed import PackedLinear
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.unet import UNetConfig
from snoopi.models.vae import VAEConfig

CONTRACT = (
    *(
        "guidance",
        "shape",
        "dtype",
        "threads",
        "fused_ms",
        "eager_ms",
        "speedup",
        "gflops",
        "roof_fraction",
    ),
    *("error_fused", "error_eager"),
)
TINY = Shape(6, 3, 2, 4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and models that take no time."""
    monkeypatch.setattr(nasa_kernel, "REAL", {"tiny": TINY, "odd": Shape(5, 7, 1, 3, b=2)})
    monkeypatch.setattr(nasa_kernel, "GEMM", (8, 4, 6))
    monkeypatch.setattr(nasa_kernel, "BASE", TINY)
    sweeps = {"m": [TINY, Shape(9, 3, 2, 4)], "d": [TINY, Shape(6, 3, 1, 8)]}
    monkeypatch.setattr(nasa_kernel, "SWEEPS", sweeps)
    monkeypatch.setattr(nasa_price, "MODEL", "debug")
    monkeypatch.setattr(nasa_price, "LATENT", 4)
    monkeypatch.setattr(nasa_price, "TEXT", 3)
    monkeypatch.setattr(common, "num_cores", lambda: 2)


def kernel(*arguments: str) -> int:
    return nasa_kernel.main(["--repeats", "2", "--no-compile", *arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    return err


# --- nasa_kernel ----------------------------------------------------------------------------------


def test_json_holds_the_machine_and_a_row_a_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "out.json"
    before = torch.get_num_threads()
    assert kernel("--threads", "1,2", "--json", str(file)) == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "checked 8 rows against fp64" in out and f"wrote {file}" in out
    result = json.loads(file.read_text())
    assert list(result) == ["benchmark", "command", "machine", "rows", "summary", "notes"]
    keys = [(row["shape"], row["dtype"], row["threads"]) for row in result["rows"]]
    assert keys == [
        (shape, dtype, threads)
        for dtype in ("fp32", "bf16")
        for threads in (1, 2)
        for shape in ("tiny", "odd")
    ]
    for row in result["rows"]:
        assert set(CONTRACT) <= set(row)
        assert row["speedup"] == pytest.approx(row["eager_ms"] / row["fused_ms"])
        assert row["roof_fraction"] == pytest.approx(row["gflops"] / row["roof_gflops"])
        assert row["compiled_ms"] is None and row["compiled_why"] == "torch.compile was left out"
        assert set(row["quartiles_ms"]) == {"warm", "cold", "eager", "gemm"}
        assert row["error_fused"] < 1e-2 and row["error_eager"] < 1e-2
        fused = common.NATIVE.loaded
        assert row["path"] == ("fused" if fused else "eager")
    assert {row["guidance"] for row in result["rows"] + result["summary"]} == {"nasa"}
    means = {(s["dtype"], s["threads"], s["measure"]): s for s in result["summary"]}
    assert len(means) == 4 * len(nasa_kernel.MEASURES)
    line = means["bf16", 2, "warm over eager"]
    speeds = [r["speedup"] for r in result["rows"] if (r["dtype"], r["threads"]) == ("bf16", 2)]
    assert line["mean"] == pytest.approx(math.sqrt(math.prod(speeds)))
    assert line["worst"] == min(speeds)
    assert means["bf16", 2, "warm over compiled"]["mean"] is None


def test_a_row_and_means_a_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "out.json", tmp_path / "page.md"
    names = ["vsf", "nag", "nasa-centred"]
    arguments = ["--threads", "1", "--dtype", "fp32", "--json", str(file)]
    assert kernel("--guidance", ",".join(names), *arguments) == 0
    assert "checked 6 rows against fp64" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert "--guidance vsf,nag,nasa-centred --shapes real --dtype fp32 " in result["command"]
    keys = [(row["guidance"], row["shape"]) for row in result["rows"]]
    assert keys == [(name, shape) for name in names for shape in ("tiny", "odd")]
    for row in result["rows"]:
        assert row["gflops"] * row["fused_ms"] * 1e6 == pytest.approx(
            nasa_kernel.REAL[row["shape"]].flops(3 if row["guidance"] == "nasa-centred" else 2)
        )
        expected = "eager" if row["guidance"] == "nasa-centred" else "reference"
        assert row["path"] == ("fused" if common.NATIVE.loaded else expected)
    for line in result["summary"]:
        assert line["count"] in (0, 2)
    speeds = {row["shape"]: row["speedup"] for row in result["rows"] if row["guidance"] == "nag"}
    (line,) = (
        line
        for line in result["summary"]
        if (line["guidance"], line["measure"]) == ("nag", "warm over eager")
    )
    assert line["mean"] == pytest.approx(math.sqrt(math.prod(speeds.values())))
    assert tables.main([str(file), "--out", str(page)]) == 0
    text = page.read_text()
    assert all(text.count(f"| tiny | {name} | fp32 | 1 |") == 1 for name in names)
    assert all(text.count(f"| warm over eager | {name} | fp32 | 1 |") == 1 for name in names)


@pytest.mark.parametrize("guidance", METHODS)
def test_flops_and_bytes_are_those_of_the_definition(guidance: str) -> None:
    shape = Shape(5, 7, 2, 3, b=2)
    x = calls.make_inputs(shape, "bf16", guidance)
    texts = METHODS[guidance].texts
    assert texts == (3 if guidance == "nasa-centred" else 2)
    products = texts * 2 * (2 * 2 * 5 * 7 * 6)  # texts, Q K^T and P V, 2 b m n c
    assert shape.flops(texts) == products + 2 * (2 * 5) * 6 * 6
    given = [tensor for tensor in x if tensor is not None]
    moved = sum(tensor.nbytes for tensor in given) + x.q.nbytes  # the result is as large as q
    assert shape.bytes("bf16", texts) == moved


def by_hand(x: calls.Inputs, guidance: str) -> torch.Tensor:
    """The guidances at the strengths that are timed, query by query and head by head."""
    b, m, h, d = x.q.shape
    result = torch.empty(b, m, h * d, dtype=torch.float64)

    def attend(k: Any, v: Any, i: int, j: int, bias: Any = 0.0) -> torch.Tensor:
        heads = [
            torch.softmax(k[i, :, head] @ x.q[i, j, head] / d**0.5 + bias, 0) @ v[i, :, head]
            for head in range(h)
        ]
        return torch.cat(heads)

    for i, j in itertools.product(range(b), range(m)):
        pos, neg = attend(x.k_pos, x.v_pos, i, j), attend(x.k_neg, x.v_neg, i, j)
        if guidance == "nasa":
            z = pos - 0.5 * neg
        elif guidance == "nasa-centred":
            z = pos - 0.5 * (neg - attend(x.k_null, x.v_null, i, j))
        elif guidance == "nag":
            z = 3.0 * pos - 2.0 * neg
            z = z * min(1.0, (2.5 * pos.abs().sum() / z.abs().sum()).item())
            z = 0.375 * z + 0.625 * pos
        else:
            k, v = torch.cat([x.k_pos, x.k_neg], 1), torch.cat([x.v_pos, -3.0 * x.v_neg], 1)
            n = x.k_pos.shape[1]
            bias = torch.tensor([0.0] * n + [-0.1] * n, dtype=torch.float64)
            z = attend(k, v, i, j, bias)
        result[i, j] = x.w_out @ z + x.b_out
    return result


@pytest.mark.parametrize("guidance", METHODS)
def test_exact_and_every_competitor_compute_the_guidance(guidance: str) -> None:
    x = calls.make_inputs(Shape(5, 7, 2, 8, b=2), "fp32", guidance)
    wide = calls.Inputs(*(None if tensor is None else tensor.double() for tensor in x))  # type: ignore[arg-type]
    expected = by_hand(wide, guidance)
    torch.testing.assert_close(calls.exact(x, guidance), expected, rtol=1e-12, atol=1e-12)
    for name, run in calls.competitors(x, guidance).items():
        assert common.error(run(), expected) < 1e-6, name


@pytest.mark.parametrize("guidance", METHODS)
def test_warm_takes_packs_and_cold_plain_tensors(
    guidance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call is given: whether its texts and its projection hold a layout."""
    seen: list[bool] = []

    def spy(name: str) -> None:
        right = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            packs = [a for a in (*args, *kwargs.values()) if hasattr(a, "packed")]
            assert len({pack.packed is not None for pack in packs}) <= 1
            assert len(packs) in (0, METHODS[guidance].texts + 1)
            seen.append(bool(packs) and packs[0].packed is not None)
            return right(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for name in ("nasa_attention", "nasa_attention_packed", "guided_attention"):
        spy(name)
    runs = calls.competitors(calls.make_inputs(TINY, "fp32", guidance), guidance)
    for name in ("warm", "cold", "eager"):
        runs[name]()
    assert seen == [common.NATIVE.loaded, False]


def test_the_real_shapes_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len(nasa_kernel.REAL) == 7
    assert nasa_kernel.REAL["pixart-1024"] == Shape(1024, 120, 16, 72)
    layers = nasa_price.layer_shapes()
    assert len(layers) == 16
    assert layers[0] == layers[-1] == nasa_kernel.REAL["sd21-4096"]
    assert [shape.m for shape in layers[4:9]] == [256, 256, 64, 256, 256]
    for axis, shapes in nasa_kernel.SWEEPS.items():
        assert nasa_kernel.BASE in shapes
        assert all(s.c == nasa_kernel.BASE.c for s in shapes)
        assert len({getattr(s, axis) for s in shapes}) == len(shapes)


@pytest.mark.parametrize("wrong", ["warm", "cold"])
@pytest.mark.parametrize("guidance", METHODS)
def test_a_wrong_result_stops_it_before_timing(
    guidance: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = calls.competitors

    def off(x: calls.Inputs, name: str = "nasa") -> Any:
        runs = right(x, name)
        fine = runs[wrong]
        # A batch of 1 is right, so that the row is named that is not.
        return runs if len(x.q) == 1 else {**runs, wrong: lambda: 1.01 * fine()}

    monkeypatch.setattr(calls, "competitors", off)
    monkeypatch.setattr(common, "interleave", lambda *_: pytest.fail("was timed"))
    file = tmp_path / "out.json"
    arguments = ["--threads", "1", "--dtype", "fp32", "--json", str(file)]
    assert kernel("--guidance", guidance, *arguments) == 1
    said = one_line(capsys)
    assert f"{guidance} odd (b2 m5 n7 h1 d3) fp32 on 1 thread, {wrong}: error 0.01" in said
    assert not file.exists()


def test_the_error_rule() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert common.error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    for bad in (math.nan, math.inf):
        assert common.error(torch.tensor([3.0, bad]), exact) == math.inf
    assert common.error(torch.ones(1), exact) == math.inf
    with pytest.raises(common.WrongResult, match="what: error inf"):
        common.check_error("what", "fp32", math.inf, 1.0)
    with pytest.raises(common.WrongResult):
        common.check_error("what", "fp32", math.nan, 1.0)  # NaN is above no bound either
    with pytest.raises(common.WrongResult):
        common.check_error("what", "bf16", 2.1e-3, 1e-3)
    common.check_error("what", "bf16", 1.9e-3, 1e-3)
    common.check_error("what", "fp32", 1.9e-7, 0.0)


def test_a_wrong_eager_is_no_competitor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error would allow the op's: 2 times a large one."""
    without_bias = METHODS["vsf"]._replace(
        arguments=lambda x: tuple(
            torch.zeros_like(y) if i == 3 else y for i, y in enumerate(calls.vsf_texts(x))
        )
    )
    monkeypatch.setitem(METHODS, "vsf", without_bias)
    monkeypatch.setattr(common, "interleave", lambda *_: pytest.fail("was timed"))
    arguments = ["--threads", "1", "--dtype", "fp32", "--shapes", "tiny"]
    assert kernel("--guidance", "vsf", *arguments) == 1
    assert "vsf tiny (b1 m6 n3 h2 d4) fp32 on 1 thread, eager: error 0.0" in one_line(capsys)
    for bad in (math.nan, math.inf, 1.1e-5):
        with pytest.raises(common.WrongResult):
            common.check_eager("what", "fp32", bad)
    common.check_eager("what", "fp32", 0.9e-5)


def test_without_a_compiler_the_row_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no /usr/bin/c++\nmore lines")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    file = tmp_path / "out.json"
    arguments = ["--repeats", "1", "--threads", "1", "--dtype", "fp32", "--json", str(file)]
    assert nasa_kernel.main(arguments) == 0
    why = "torch.compile failed: RuntimeError: no c++"
    for row in json.loads(file.read_text())["rows"]:
        assert row["compiled_ms"] is None and row["speedup_compiled"] is None
        assert row["compiled_why"] == why
    assert f"2 of 2 rows have none: {why}" in capsys.readouterr().out


def test_a_wrong_compiled_result_stops_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *x: 1.01 * f(*x))
    assert nasa_kernel.main(["--threads", "1", "--dtype", "fp32", "--shapes", "tiny"]) == 1
    assert "nasa tiny (b1 m6 n3 h2 d4) fp32 on 1 thread, compiled: error 0.01" in one_line(capsys)


@pytest.mark.parametrize("count", [1, 2])
def test_op_and_eager_run_on_the_threads_of_the_row(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {"warm": set(), "cold": set(), "eager": set()}
    right = calls.competitors

    def spy(name: str, run: Any) -> Any:
        def call() -> Any:
            seen[name].add(torch.get_num_threads())
            return run()

        return call

    def spies(*args: Any) -> Any:
        return {name: spy(name, run) for name, run in right(*args).items()}

    monkeypatch.setattr(calls, "competitors", spies)
    assert kernel("--threads", str(count), "--shapes", "tiny", "--dtype", "fp32") == 0
    assert seen == {"warm": {count}, "cold": {count}, "eager": {count}}


@pytest.mark.slow
def test_torch_compile_is_a_competitor(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ["--repeats", "1", "--threads", "1", "--json", str(file), "--shapes", "tiny"]
    assert nasa_kernel.main([*arguments, "--guidance", ",".join(METHODS)]) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["compiled_why"] is None
        assert row["speedup_compiled"] == pytest.approx(row["compiled_ms"] / row["fused_ms"])


def test_a_call_handed_to_eager_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ops.explain(*calls.make_inputs(TINY, "fp32")[:7], nasa_scale=1.0)
    monkeypatch.setattr(ops, "explain", lambda *_, **__: choice._replace(path="eager", why="small"))
    file = tmp_path / "out.json"
    assert kernel("--threads", "1", "--shapes", "tiny", "--json", str(file)) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["handed_to_eager"] and row["speedup_cold"] == 1.0 and row["why"] == "small"
    out = capsys.readouterr().out
    assert "= eager" in out and "path eager are handed to it" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "sd15"], "unknown shape 'sd15'"),
        (["--guidance", "cfg"], "unknown guidance 'cfg'; known are nasa, nasa-centred, nag, vsf"),
        (["--guidance", "nasa,"], "unknown guidance ''"),
        (["--guidance", "vsf", "--shapes", "sweep"], "sweep is for --guidance nasa alone"),
        (["--threads", "0"], "--threads must be numbers of at least 1"),
        (["--threads", "1,,2"], "--threads must be numbers"),
        (["--threads", "3"], "--threads must be at most 2"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--plots", "x"], "it needs --shapes sweep"),
        (["--json", "."], "--json must be a file"),
        (["--json", f"{__file__}/x.json"], "is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(nasa_kernel, "check", lambda *_: pytest.fail("it began"))
    assert kernel(*arguments) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--dtype", "fp8"], ["--nope"], ["--repeats", "x"]])
@pytest.mark.parametrize("main", [nasa_kernel.main, nasa_price.main])
def test_unknown_options_are_one_line_and_status_2(
    main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    one_line(capsys)


# --- plots and tables -----------------------------------------------------------------------------


def test_plots_without_matplotlib_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nasa_kernel, "check", lambda *_: pytest.fail("it began"))
    assert kernel("--shapes", "sweep", "--plots", str(tmp_path / "plots")) == 2
    assert "pip install -r requirements/plots.txt" in one_line(capsys)
    assert not (tmp_path / "plots").exists()


def test_a_sweep_moves_one_size_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[common.Row]] = {}

    def draw(path: Path, axis: str, label: str, title: str, rows: list[common.Row]) -> None:
        drawn[axis] = rows

    monkeypatch.setattr(plots, "check_installed", lambda option: None)
    monkeypatch.setattr(plots, "draw_sweep", draw)
    arguments = ["--shapes", "sweep", "--dtype", "bf16", "--threads", "1,2"]
    assert kernel(*arguments, "--plots", str(tmp_path)) == 0
    at = {axis: [row[axis] for row in rows] for axis, rows in drawn.items()}
    assert at == {"m": [6, 9], "n": [3], "d": [4, 8], "b": [1], "threads": [1, 2]}


def test_sweeps_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    assert kernel("--shapes", "sweep", "--threads", "1", "--plots", str(folder)) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["b.png", "d.png", "m.png", "n.png", "threads.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_tables_of_both_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, page = (tmp_path / name for name in ("k.json", "p.json", "page.md"))
    assert kernel("--threads", "1", "--json", str(first)) == 0
    part = ["--part", "attention", "--threads", "1", "--pairs", "2", "--json", str(second)]
    assert nasa_price.main(part) == 0
    assert tables.main([str(first), str(second), "--out", str(page)]) == 0
    text = page.read_text()
    command = (
        "python -m benchmarks.nasa_kernel --guidance nasa --shapes real --dtype both --threads 1"
    )
    assert f"\n    {command} --repeats 2 --no-compile\n" in text
    assert str(tmp_path) not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert sum(line.startswith("| tiny | nasa | fp32 | 1 |") for line in rows) == 1
    assert sum(line.startswith("| all 7 layers |") for line in rows) == 1
    assert json.loads(first.read_text())["machine"]["processor"] in text
    capsys.readouterr()
    assert tables.main([str(second)]) == 0
    assert capsys.readouterr().out == text[text.index("## The price") :]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmark": "other"}'])
def test_other_files_are_no_results(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    assert tables.main([str(file)]) == 2
    assert f"{file} is not what a benchmark's --json writes" in one_line(capsys)
    assert tables.main([str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in one_line(capsys)


# --- nasa_price -----------------------------------------------------------------------------------


def test_price_of_the_layers_and_of_a_step(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert nasa_price.main(["--threads", "1,2", "--pairs", "3", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["command"].endswith("--part both --dtype bf16 --threads 1,2 --pairs 3")
    rows = [row for row in result["rows"] if row["threads"] == 2]
    assert len(rows) == len(result["rows"]) / 2
    *layers, together, step = rows
    assert sum(int(row["shape"].split()[0]) for row in layers) == 7
    assert together["shape"] == "all 7 layers" and step["shape"] == "a step of debug's UNet"
    assert step["eager_ms"] is None and together["eager_ms"] > 0
    for row in rows:
        assert row["ratio_of_medians"] == pytest.approx(row["nasa_ms"] / row["plain_ms"])
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high


def test_pairs_are_compared_one_by_one() -> None:
    times = {"nasa": [2.0, 3.0, 8.0], "plain": [1.0, 2.0, 4.0]}
    row = nasa_price._row("x", "bf16", 1, {k: common.Times(v, v) for k, v in times.items()})
    assert row["ratio_of_medians"] == 1.5 and row["ratio"] == 2.0
    assert row["ratio_quartiles"] == (1.75, 2.0)


def test_plain_is_the_layer_without_a_negative() -> None:
    x = calls.make_inputs(TINY, "fp32")
    expected = ops.attention(x.q, x.k_pos, x.v_pos, None, x.w_out, x.b_out)
    torch.testing.assert_close(nasa_price.plain(x), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_steps_run_on_the_optimized_network(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {"nasa": 0, "plain": 0}
    fused, plain = ops.guided_attention, CrossAttention._out

    def with_packs(q: Any, pos: Any, neg: Any, out: Any, *how: Any, **kwargs: Any) -> torch.Tensor:
        if common.NATIVE.projects:
            assert all(pack.packed is not None for pack in (pos, neg, out))
        packed["nasa"] += 1
        return fused(q, pos, neg, out, *how, **kwargs)

    def without_negative(self: CrossAttention, z: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert isinstance(self.to_out[0], PackedLinear)
        packed["plain"] += 1
        return plain(self, z, *rest)

    monkeypatch.setattr(CrossAttention, "_out", without_negative)
    monkeypatch.setattr(ops, "guided_attention", with_packs)
    with torch.inference_mode():
        net = nasa_price.random_network(dtype)
        nasa_price.measure_step(net, dtype, 1, 2)
    layers = len(net.cross_attentions())
    assert packed == {"nasa": 4 * layers, "plain": 4 * layers}  # 2 pairs, 1 to warm up, 1 to check


def test_a_step_that_the_negative_does_not_change_stops_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nasa_price, "NASA_SCALE", 0.0)
    assert nasa_price.main(["--part", "step", "--threads", "1"]) == 1
    assert "the negative changes nothing" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--pairs", "0"], "--pairs must be at least 1"), (["--threads", "9"], "at most 2")],
)
def test_mistakes_of_price(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nasa_price.main(arguments) == 2
    assert said in one_line(capsys)


# --- the shared parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_rounds_are_interleaved_and_their_order_changes(count: int) -> None:
    names = [f"c{i}" for i in range(count)]
    calls: list[str] = []
    competitors = {name: [lambda name=name: calls.append(name)] for name in names}
    times = common.interleave(competitors, rounds=count * max(count - 1, 1), warmup=0)  # type: ignore[arg-type]
    rounds = [calls[i : i + count] for i in range(0, len(calls), count)]
    assert all(sorted(one) == names for one in rounds)
    assert {one[0] for one in rounds} == set(names)
    assert all(len(parts[0].seconds) == len(rounds) for parts in times.values())
    if count == 5:  # everybody comes after everybody else
        assert len({pair for one in rounds for pair in itertools.pairwise(one)}) == 20


def test_warmup_is_run_and_not_counted() -> None:
    calls: list[int] = []
    times = common.interleave({"a": [lambda: calls.append(0), lambda: None]}, rounds=3, warmup=2)
    assert len(calls) == 5 and [len(part.seconds) for part in times["a"]] == [3, 3]
    together = common.total(times["a"])
    assert together.seconds[1] == times["a"][0].seconds[1] + times["a"][1].seconds[1]


def test_median_and_quartiles() -> None:
    times = common.Times([0.001, 0.004, 0.002, 0.003, 0.1], [0.0] * 5)
    assert times.ms == pytest.approx(3.0) and times.quartiles_ms == pytest.approx((2.0, 4.0))
    assert common.quartiles([7.0]) == (7.0, 7.0)
    assert common.geomean([1.0, 4.0]) == pytest.approx(2.0)


def test_rows_that_got_too_few_cores_are_counted() -> None:
    rows = [{"threads": 2, "cores": {"a": 2.0, "b": b}} for b in (1.1, 1.9, 1.5)]
    assert common.busy(rows)[0].startswith("2 of 3 rows") and not common.busy(rows[1:2])
    assert common.cores(rows[0]) == "1.1"


def test_threads_hold_for_both_and_come_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), common.at_threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_machine_names_neither_paths_nor_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    missing = common.NATIVE._replace(loaded=False, why="cannot be loaded: /home/me/_cpu.so: no")
    monkeypatch.setattr(common, "NATIVE", missing)
    described = common.machine([1])
    assert described["op"] == "cannot be loaded"
    assert described["environment"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert described["torch"] == torch.__version__ and described["threads"] == [1]
    text = json.dumps(described)
    assert os.uname().nodename not in text and "/home" not in text
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in common.machine_lines(described)


# --- attention, train_step ------------------------------------------------------------------------


def test_attention_states_what_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not attention.NATIVE.loaded:
        pytest.skip("no native op")
    shapes = {"tiny": attention.Shape(6, 3, 2, 4), "wide": attention.Shape(70, 70, 2, 161)}
    monkeypatch.setattr(attention, "SHAPES", shapes)
    monkeypatch.setattr(attention, "GEMM", (8, 4, 6))
    file = tmp_path / "a.json"
    assert attention.main(["--rounds", "2", "--threads", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(r["shape"], r["dtype"]) for r in rows] == [
        (shape, dtype) for dtype in ("fp32", "bf16") for shape in shapes
    ]
    takes = "op" if attention.NATIVE.attends else "sdpa"
    wide = "sdpa" if attention.NATIVE.tiles else takes
    assert [r["taken"] for r in rows] == ["sdpa", "sdpa", takes, wide]
    assert tables.main([str(file)]) == 0 and "| wide | fp32 |" in capsys.readouterr().out
    monkeypatch.setattr(
        attention.library, "attention_op", lambda q, k, v, scale: v[:, : q.shape[1]]
    )
    assert attention.main(["--rounds", "2", "--threads", "1"]) == 1
    assert "nothing was timed" in one_line(capsys)


@pytest.mark.parametrize("words", [["--pairs", "0"], ["--batch", "0"], ["--latent", "12"]])
def test_mistakes_of_train_step(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(words) == 2
    assert words[0] in one_line(capsys)


@pytest.mark.parity
def test_train_step_is_the_same_in_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a tiny size; memory is that of the same process here."""
    try:
        train_step.packages()
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(train_step, "peak", lambda name, case, threads: 2**20)
    words = ["--batch", "1", "--latent", "8", "--threads", "1", "--pairs", "1", "--dtype", "fp32"]
    file = tmp_path / "t.json"
    assert train_step.main([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [r["variant"] for r in rows] == [
        "plain",
        "networks",
        "layout",
        "update",
        "attention",
        "remake",
    ]
    assert tables.main([str(file)]) == 0
    step = train_step.Plain.step

    def wrong(self: train_step.Plain, number: int) -> dict[str, Any]:
        return {**step(self, number), "loss_lora": 2.0}

    monkeypatch.setattr(train_step.Plain, "step", wrong)
    capsys.readouterr()
    assert train_step.main(words) == 1
    assert "loss_lora of step 1" in one_line(capsys)


# --- model_forward, generate ----------------------------------------------------------------------

BASE = zoo.model("sbv2")
WHOLE = dataclasses.replace(
    BASE,
    backbone=UNetConfig(
        channels=(16, 32, 64, 64), heads=(1, 2, 4, 4), linear_proj=True, norm_groups=8,
        text_width=24,
    ),
    vae=VAEConfig(channels=(16, 32, 48, 48), norm_groups=8),
    text=(
        dataclasses.replace(
            BASE.text[0], config=CLIPTextConfig(width=24, mlp_width=40, layers=2, heads=2)
        ),
    ),
    latent_size=8,
)  # fmt: skip
WHOLE_WORDS = ["--models", "whole", "--size", "64", "--rounds", "2", "--threads", "1"]


class Here:
    """A Worker without a process: the tests of the sides' own processes are further below."""

    def __init__(self, given: sides.Setup) -> None:
        self.host = models.host(given)

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self.host, method)(*arguments)

    def span(self, side: str, part: str) -> common.Span:
        return common.Span(*self.ask("span", side, part))

    def close(self) -> None:
        pass


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model of the name "whole", and both sides in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(models, "ONE_STEP", {"whole": ""})
    monkeypatch.setattr(models, "spec", lambda name: WHOLE)
    monkeypatch.setattr(models, "Worker", Here)
    monkeypatch.setattr(model_forward, "GEMMS", ((8, 4, 6), (4, 4, 4)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def both() -> None:
    """Skips without diffusers."""
    sides.quiet()
    for name in ("diffusers", "transformers"):
        pytest.importorskip(name)


@pytest.mark.parametrize("command", [model_forward.main, generate.main])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "sd21,sd3"], "--models must be of sd15, sd21, pixart-512, sdxl, got 'sd3'"),
        (["--batch", "1,0"], "--batch must be numbers of at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--size", "500"], "--size must be a multiple of 64 pixels, got 500"),
        (["--threads", "3"], "--threads must be at most 2"),
    ],
)
def test_mistakes_of_whole_models(
    command: Any, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    assert said in one_line(capsys)


def test_without_diffusers_nothing_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    for command in (model_forward.main, generate.main):
        assert command([]) == 2
        assert "the other side needs diffusers" in one_line(capsys)


@pytest.mark.parity
def test_one_call_of_every_part(
    both: None, whole: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.json"
    words = ["--dtype", "both", "--batch", "1,2", "--profile", "--json", str(file)]
    assert model_forward.main([*WHOLE_WORDS, *words]) == 0
    result = json.loads(file.read_text())
    rows = result["rows"]
    parts = ("backbone", "backbone+nasa", "vae", "text")
    assert [(r["dtype"], r["batch"], r["part"]) for r in rows] == [
        (dtype, batch, part) for dtype in ("fp32", "bf16") for batch in (1, 2) for part in parts
    ]
    against = {r["part"]: r["error_against"] for r in rows if r["dtype"] == "bf16"}
    assert against == dict.fromkeys(parts, "fp32") | {"backbone+nasa": "none"}
    for one, two in zip(rows[:4], rows[4:8], strict=True):
        assert two["gflop"] == pytest.approx(2 * one["gflop"], rel=0.01)
    for row in rows:
        assert set(row["ms"]) == {"snoopi", "none", "diffusers", "channels_last"}
        assert row["gflops"] == pytest.approx(1e3 * row["gflop"] / row["ms"]["snoopi"])
        assert row["roof_fraction"] == pytest.approx(row["gflops"] / row["gemm_gflops"])
    operators = {(r["side"], r["part"]) for r in result["summary"]}
    assert operators == {
        (side, part) for side in ("snoopi", "channels_last") for part in model_forward.PARTS
    }
    assert all(r["operator"].count("::") for r in result["summary"] if r["share"] > 0.3)
    capsys.readouterr()
    assert tables.main([str(file)]) == 0
    assert "| whole | backbone+nasa | bf16 | 1 | 2 |" in capsys.readouterr().out


@pytest.mark.parity
def test_flops_are_those_of_a_layer_counted_by_hand(
    both: None, whole: None, tmp_path: Path
) -> None:
    models.write(tmp_path, WHOLE, "fp32", tiny=False)
    theirs = sides.Theirs(models.setup(tmp_path, WHOLE, "fp32", 1, "diffusers"))
    counts = []
    for batch in (1, 3):
        theirs.give(models.inputs(WHOLE, batch, 64))
        counts.append(theirs.flops("text"))
    n, width, mlp = 77, 24, 40
    layer = 2 * n * width * (4 * width + 2 * mlp) + 4 * n * n * width
    assert counts == [2 * layer, 3 * 2 * layer]  # two layers


@pytest.mark.parity
@pytest.mark.parametrize("part", ["vae", "nasa"])
def test_a_side_that_computes_something_else_stops_it(
    part: str,
    both: None,
    whole: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = sides.Ours.call

    def wrong(self: sides.Ours, side: str, asked: str) -> Any:
        call = right(self, side, asked)
        return (lambda: 1.1 * call()) if (side, asked) == ("snoopi", part) else call

    monkeypatch.setattr(sides.Ours, "call", wrong)
    parts = "vae" if part == "vae" else "backbone"
    assert model_forward.main([*WHOLE_WORDS, "--parts", parts]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    where = "vae, batch 1, snoopi" if part == "vae" else "backbone, batch 1, with NASA, snoopi"
    assert f"whole bf16 {where}: " in said and "nothing was timed" in said


@pytest.mark.parity
def test_pictures_by_stage(
    both: None,
    whole: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds = {"snoopi": 1.0, "none": 2.0, "diffusers": 4.0, "channels_last": 3.0}

    def fresh(setup: sides.Setup, pixels: int, out: Path) -> dict[str, float]:
        (side,) = setup.sides
        names = ("import_s", "load_s", "draw_s", "first_s", "peak", "anonymous")
        return dict.fromkeys(names, seconds[side])

    monkeypatch.setattr(generate, "first_picture", fresh)
    monkeypatch.setattr(generate, "imports", lambda folder: {"import snoopi": 0.25})
    file = tmp_path / "g.json"
    words = ["--batch", "2", "--vae", "tiny", "--keep", str(tmp_path), "--json", str(file)]
    for _ in range(2):  # the second time finds the models
        assert generate.main([*WHOLE_WORDS, *words]) == 0
    result = json.loads(file.read_text())
    names = ["snoopi", "none", "diffusers", "channels_last"]
    drawn = [(r["side"], r["negative"], r["vae"]) for r in result["rows"]]
    assert drawn == [
        *((name, False, vae) for vae in ("full", "tiny") for name in names),
        *((name, True, "full") for name in names[:2]),
    ]
    for row in result["rows"]:
        stages = row["ms"]
        assert all(stages[name] > 0 for name in ("text", "backbone", "vae", "total"))
        assert max(stages[name] for name in ("text", "backbone", "vae")) < stages["total"]
        if row["side"] == "diffusers":
            assert row["speedup"]["diffusers"] == 1
    assert [r["over"]["first_s"]["diffusers"] for r in result["summary"]] == [0.25, 0.5, 1, 0.75]
    assert result["notes"][-1] == "over `import torch`: import snoopi 0.25 s"
    assert str(tmp_path) not in result["command"]
    capsys.readouterr()
    assert tables.main([str(file)]) == 0
    assert "| snoopi + NASA | whole | bf16 | 1 | 2 | full |" in capsys.readouterr().out
    another = dataclasses.replace(WHOLE, latent_size=16)
    monkeypatch.setattr(models, "spec", lambda name: another)
    assert generate.main([*WHOLE_WORDS, *words]) == 2
    assert "is another model than sbv2: choose another --keep" in one_line(capsys)


@pytest.mark.parity
def test_a_picture_of_another_text_encoder_stops_it(
    both: None, whole: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sides.Theirs._read
    monkeypatch.setattr(
        sides.Theirs, "_read", lambda self, ids: (right(self, ids)[0].roll(1, 2), None)
    )
    assert generate.main([*WHOLE_WORDS, "--dtype", "fp32", "--cold", "0"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "whole fp32, the picture, batch 1, full VAE, snoopi: error" in said


def test_errors_of_whole_networks() -> None:
    exact = torch.randn(1, 50).numpy()

    def at(error: float, rows: int = 1) -> Any:
        return (exact * (1 + error)).repeat(rows, 0)

    fine = {"diffusers": at(0.01), "snoopi": at(0.019)}
    assert models.check("x", "bf16", fine, exact)["snoopi"] == pytest.approx(0.019, rel=1e-3)
    for wrong, said in [
        ({"diffusers": at(0.01), "snoopi": at(0.021)}, "x, snoopi: error 0.021 against fp32"),
        ({"diffusers": at(0.11), "snoopi": at(0.01)}, "x, diffusers: error 0.11"),
        ({"diffusers": at(0.01), "snoopi": at(math.nan)}, "x, snoopi: error inf"),
    ]:
        with pytest.raises(common.WrongResult, match=said):
            models.check("x", "bf16", wrong, exact)
    rows = at(0.01, 2)
    rows[1] *= 1.1  # a row that fp32 does not have
    with pytest.raises(common.WrongResult, match=r"x, snoopi: .* in all rows"):
        models.check("x", "bf16", {"diffusers": at(0.01, 2), "snoopi": rows}, exact)
    assert models.check("x", "fp32", {"diffusers": at(0), "snoopi": at(1e-5)}, None)
    with pytest.raises(common.WrongResult, match="at most 2e-05"):
        models.check("x", "fp32", {"diffusers": at(0), "snoopi": at(1e-4)}, None)
    ours = {"none": at(0), "snoopi": at(0.02)}
    assert models.check_negative("x", "bf16", ours, at(0.2), 0.01)["none"] == 0
    with pytest.raises(common.WrongResult, match=r"x, snoopi: 0\.02 from the unoptimized"):
        models.check_negative("x", "bf16", ours, at(0.2), 0.005)
    with pytest.raises(
        common.WrongResult, match=r"the negative changes the result by 0\.0291 only"
    ):
        models.check_negative("x", "bf16", ours, at(0.03), 0.01)


def test_a_side_in_its_process(tmp_path: Path) -> None:
    """What it returns is what it returns here, and its troubles are told."""
    models.write(tmp_path, WHOLE, "fp32", tiny=False)
    setup = models.setup(tmp_path, WHOLE, "fp32", 1, "none")
    given = models.inputs(WHOLE, 2, 64)
    here, there = Here(setup), models.Worker(setup)
    for worker in (here, there):
        worker.ask("give", given)
    for part in ("backbone", "nasa", "vae", "text"):
        want, got = (worker.ask("output", "none", part) for worker in (here, there))
        assert models.error(got, want) < 1e-6 and there.span("none", part).seconds > 0
    with pytest.raises(common.WrongResult, match="the process of none: KeyError: 'no such VAE'"):
        there.ask("draw", "none", 1, 64, False, "no such VAE")
    assert set(there.ask("draw", "none", 1, 64, True, "full")) >= {"text", "backbone", "total"}
    there._process.kill()
    with pytest.raises(common.WrongResult, match="the process of none: died with status -9"):
        there.ask("output", "none", "vae")
    there.close()


@pytest.mark.slow
def test_a_fresh_process_up_to_its_first_picture(tmp_path: Path) -> None:
    models.write(tmp_path, WHOLE, "bf16", tiny=False)
    setup = models.setup(tmp_path, WHOLE, "bf16", 1, "snoopi")
    found = generate.first_picture(setup, 64, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (64, 64)
    parts = [found[name] for name in ("import_s", "load_s", "draw_s", "save_s")]
    assert min(parts) > 0 and found["first_s"] == pytest.approx(sum(parts))
    if Path("/proc").is_dir():
        assert found["peak"] > 2**20
    with pytest.raises(common.WrongResult, match=r"a fresh process of snoopi failed: .*no such"):
        generate.first_picture(setup._replace(folder="no such"), 64, tmp_path / "x.png")
