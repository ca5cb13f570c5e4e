"""The CUDA kernels on the host: right, without a report, the same in every order of threads."""

import math
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from simt_cases import (
    DTYPES,
    FLOOR,
    HEAD_DIMS,
    LAYERS,
    MANY_ROWS,
    PROJECTED,
    WIDE_LOGITS,
    Call,
    Errors,
    arguments,
    grid,
    make,
    run,
    tensor,
)

from snoopi.ops import reference
from snoopi.ops.packs import TextPack

HALVES = (torch.float16, torch.bfloat16)
A100, ADA, H100 = 163 * 1024, 99 * 1024, 227 * 1024  # shared memory of a block
SETTINGS: tuple[dict[str, Any], ...] = (
    {"order": "ascending"},
    {"order": "descending", "landing": "issue"},
    *({"order": "random", "landing": "random", "seed": seed} for seed in range(3)),
)
ids = DTYPES.__getitem__


def calls_of(d: int, dtype: torch.dtype) -> list[Call]:
    """fp32 has one instance for all lengths and takes most of the time."""
    return grid(d)[:: 3 if dtype == torch.float32 else 1]


@cache
def measured(simt: ModuleType, call: Call, dtype: torch.dtype) -> Errors:
    """The errors of a call that must not be reported, have bank conflicts or leave bits out."""
    inputs = make(call, dtype)
    result = run(simt, inputs, {}, lse=True)
    assert result["error"] == "ok", result["reports"]
    assert not result["reports"], result["reports"]
    cost, ideal = result["counts"]["shared"]
    assert cost == ideal, result["counts"]["sites"]
    return Errors.of(tensor(result["out"][0], dtype), inputs)


def check(simt: ModuleType, call: Call, dtype: torch.dtype) -> None:
    errors = measured(simt, call, dtype)
    bound = max(2.0 * errors.eager, FLOOR[dtype])
    assert errors.ours <= bound, f"{call}: {errors}"


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_grid(simt: ModuleType, d: int, dtype: torch.dtype) -> None:
    for call in calls_of(d, dtype):
        check(simt, call, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=ids)
@pytest.mark.parametrize("call", PROJECTED, ids=str)
def test_projection(simt: ModuleType, call: Call, dtype: torch.dtype) -> None:
    check(simt, call, dtype)


@pytest.mark.parametrize("call", [*MANY_ROWS, *WIDE_LOGITS], ids=str)
def test_many_rows_and_wide_logits(simt: ModuleType, call: Call) -> None:
    for dtype in DTYPES:
        check(simt, call, dtype)


@pytest.mark.parametrize("call", LAYERS, ids=str)
def test_layers_of_real_models(simt: ModuleType, call: Call) -> None:
    check(simt, call, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_mean_error_is_that_of_eager(simt: ModuleType, dtype: torch.dtype) -> None:
    calls = [call for d in HEAD_DIMS for call in calls_of(d, dtype)]
    calls += PROJECTED if dtype in HALVES else []
    errors = [measured(simt, call, dtype) for call in calls]
    ratios = [max(e.ours, 1e-9) / max(e.eager, 1e-9) for e in errors]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"{DTYPES[dtype]}: {mean:.3f} of eager's error, at most {max(ratios):.2f}")
    assert mean <= (1.0 if dtype in HALVES else 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("n", [77, 150])
def test_results_do_not_depend_on_the_order(simt: ModuleType, n: int, dtype: torch.dtype) -> None:
    for d in (40, 160):
        call = Call(d=d, n=n, n_neg=20, b=1, mask="random", null=3, strength=True)
        calls = [call]
        if dtype in HALVES:
            calls.append(Call(d=d, n=n, n_neg=20, b=1, c_out=75))
        for inputs in (make(call, dtype) for call in calls):
            results = [run(simt, inputs, settings, lse=True) for settings in SETTINGS]
            for result in results:
                assert result["error"] == "ok" and not result["reports"], result["reports"]
                for name in ("out", "lse"):
                    for x, y in zip(result[name], results[0][name], strict=True):
                        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("n", [20, 154])
def test_twin(simt: ModuleType, n: int, dtype: torch.dtype) -> None:
    for d, mask in ((40, "random"), (72, "dead"), (160, None)):
        inputs = make(Call(d=d, n=n, n_neg=77, mask=mask, shared=True), dtype)
        result = run(simt, inputs, {}, twin=True, lse=True)
        assert result["error"] == "ok" and not result["reports"], result["reports"]
        exact = inputs.to(torch.float64)
        for i, name in enumerate(("mask_pos", "mask_neg")):
            text = TextPack(*exact.texts[2 * i : 2 * i + 2], inputs.kwargs[name])
            z, lse = reference.attend(exact.q, text, d**-0.5)
            got = tensor(result["out"][i], dtype).double()
            rounding = 1e-2 if dtype == torch.bfloat16 else 1.5e-3
            assert (got - z).norm() <= (rounding if dtype in HALVES else 1e-6) * z.norm()
            np.testing.assert_allclose(result["lse"][i], lse.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_tiles_with_the_same_maximum_count_alike(simt: ModuleType, dtype: torch.dtype) -> None:
    """Of equal keys, whose logits are large: values 1 in the first tiles cancel -1 in the last."""
    inputs = make(Call(d=40, n=512, spread=400.0), dtype)
    inputs.kwargs["nasa_scale"] = 0.0
    k, v = inputs.texts[:2]
    k[:] = k[:, :1].clone()
    v[:, :256], v[:, 256:] = 1.0, -1.0
    out = tensor(run(simt, inputs, {})["out"][0], dtype)
    assert out.abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("n", [7, 100])
def test_fully_masked_texts_count_for_nothing(simt: ModuleType, n: int, dtype: torch.dtype) -> None:
    inputs = make(Call(d=64, n=n, b=1), dtype)
    inputs.kwargs |= {f"mask_{x}": torch.zeros(1, n, dtype=torch.bool) for x in ("pos", "neg")}
    result = run(simt, inputs, {}, lse=True)
    assert not result["reports"]
    assert not tensor(result["out"][0], dtype).any()
    assert all(np.isneginf(x).all() for x in result["lse"])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("n", [7, 100])
def test_nan_is_not_hidden_and_does_not_spread(
    simt: ModuleType, n: int, dtype: torch.dtype
) -> None:
    inputs = make(Call(d=40, n=n), dtype)
    inputs.q[0, 3, 1, 2] = float("nan")
    inputs.texts[0][1, n - 1, 0, 5] = float("nan")  # a key
    out = tensor(run(simt, inputs, {})["out"][0], dtype)
    assert out[0, 3, 1].isnan().all() and out[1, :, 0].isnan().all()
    out[0, 3, 1] = out[1, :, 0] = 0.0
    assert out.isfinite().all()
    inputs.kwargs["mask_pos"] = torch.ones(2, n, dtype=torch.bool)
    inputs.kwargs["mask_pos"][1, n - 1] = False  # a masked key is not looked at
    assert tensor(run(simt, inputs, {})["out"][0], dtype)[1].isfinite().all()


def test_a_row_does_not_depend_on_the_others(simt: ModuleType) -> None:
    whole = make(Call(d=40, n=77, m=70), torch.bfloat16)
    part = make(Call(d=40, n=77, m=70), torch.bfloat16)
    part.q = part.q[:, :13]
    rows = run(simt, whole, {})["out"][0][:, :13]
    assert rows.tobytes() == run(simt, part, {})["out"][0].tobytes()


@pytest.mark.parametrize("dtype", HALVES, ids=ids)
def test_little_shared_memory(simt: ModuleType, dtype: torch.dtype) -> None:
    inputs = make(Call(d=160, n=77, m=40), dtype)
    assert simt.query(*arguments(inputs), H100)["stages"] == 2
    assert simt.query(*arguments(inputs), ADA)["stages"] == 1
    results = [run(simt, inputs, {"shared_limit": limit}) for limit in (H100, ADA)]
    assert not any(result["reports"] for result in results)
    assert results[0]["out"][0].tobytes() == results[1]["out"][0].tobytes()
    assert run(simt, inputs, {"shared_limit": 48 * 1024})["error"] == "shared memory"


def test_the_kernel_projects_where_an_estimate_favours_it(simt: ModuleType) -> None:
    def projects(call: Call, dtype: torch.dtype = torch.float16, **options: Any) -> bool:
        device = [options.pop(name, of) for name, of in (("sms", 132), ("capability", 90))]
        c_out = options.pop("c_out", call.h * call.d)
        return simt.projects(*arguments(make(call, dtype), **options), c_out, *device)

    call = Call(d=40, n=77, b=1, m=4096, h=8)  # Stable Diffusion 1.5, 64 x 64
    assert projects(call) and projects(call, torch.bfloat16)
    inputs = make(replace(call, c_out=320), torch.float16)
    found = simt.query(*arguments(inputs), H100)
    assert found["project"] and found["rows"] == 32 and found["blocks"] == 128
    # A second wave of blocks, a device half empty, an older one.
    for other in ({"b": 2}, {"m": 2048}, {"h": 9}, {"n": 81}, {"null": 90}):
        assert not projects(replace(call, **other)), other
    assert not projects(call, sms=108) and not projects(call, capability=80)
    assert not projects(call, torch.float32) and not projects(call, twin=True)
    assert not projects(call, c_out=640)
    # More rows than blocks of 32 are for, whatever the device: those of 64 would fill half of it.
    assert projects(replace(call, m=5120), sms=188)
    assert not projects(replace(call, m=5504), sms=188)
    assert not projects(Call(d=64, n=77, b=1, m=4096, h=5))


def test_counts_are_what_the_sizes_say(simt: ModuleType) -> None:
    call = Call(d=40, n=77, b=1, m=64)
    counts = run(simt, make(call, torch.bfloat16), {})["counts"]
    # Two heads of four warps and two texts: logits are 3 deep and 10 wide, values 5 and 5.
    assert counts["products"] == 2 * 4 * 2 * (3 * 10 + 5 * 5)
    assert counts["copies"] == 2 * (64 * 6 + 2 * 80 * (6 + 5))


def test_what_cannot_run_is_refused_by_name(simt: ModuleType) -> None:
    def refused(call: Call, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
        return simt.query(*arguments(make(call, dtype), **options), H100)

    assert refused(Call(d=48, n=5)) == "head dim"
    assert refused(Call(d=40, n=513)) == "texts"
    assert refused(Call(d=40, n=5, null=2), twin=True) == "texts"
    assert refused(Call(d=40, n=5), softmax_scale=0.0) == "softmax scale"
    assert refused(Call(d=40, n=5, c_out=8), torch.float32) == "projection"
    assert refused(Call(d=160, n=5, h=5, c_out=8)) == "projection"
    inputs = make(Call(d=40, n=5), torch.bfloat16)
    inputs.q = torch.zeros(2, 37, 2, 44, dtype=torch.bfloat16)[..., 2:42]
    assert simt.query(*arguments(inputs), H100) == "alignment"
    for size in ({"b": 65536}, {"h": 65536}, {"m": 2**24 + 1}):
        assert of_size(simt, **size) == "size of the call"
    for size in ({"b": 65535}, {"h": 65535}, {"m": 2**24}):
        assert of_size(simt, **size)["blocks"] > 0


def of_size(simt: ModuleType, b: int = 1, m: int = 1, h: int = 1) -> Any:
    """What a call of such a size would launch, if its rows lay in one place."""
    q, text = (np.zeros((1, 1, 1, 40), np.uint16) for _ in range(2))
    text = np.broadcast_to(text, (b, 5, h, 40))
    options = {"dtype": "bf16", "softmax_scale": 1.0}
    return simt.query(np.broadcast_to(q, (b, m, h, 40)), [(text, text, None)], options, H100)


def test_a_device_error_is_named(simt: ModuleType) -> None:
    inputs = make(Call(d=40, n=7, b=1), torch.bfloat16)
    result = run(simt, inputs, {"shared_limit": -1})  # as a device that is not there
    assert result["error"] == "the block was given up"


@pytest.mark.parametrize("limit", [ADA, A100, H100])
def test_every_size_has_an_instance_on_every_device(simt: ModuleType, limit: int) -> None:
    for d in HEAD_DIMS:
        for n in (77, 120):
            for dtype in DTYPES:
                assert isinstance(simt.query(*arguments(make(Call(d=d, n=n), dtype)), limit), dict)
            call = Call(d=d, n=n, h=640 // d, b=1, m=1, c_out=8)
            found = simt.query(*arguments(make(call, torch.bfloat16)), limit)
            assert isinstance(found, dict) or (found, limit) == ("shared memory", ADA)
