"""The rules engine: every tensor used or dropped on purpose, every parameter filled once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from weights_convert.files import Entry
from weights_convert.rules import IDENTITY, Layout, Rule, names, plan, trouble_line


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {k: Entry(tuple(v.shape), v.dtype, v.detach) for k, v in tensors.items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors.items()}


def values(*names: str, shape: Sequence[int] = (4, 6)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) for name in names}


LAYOUT = Layout(
    [
        Rule("a.q.", "a.qkv.", (0, 3)),
        Rule("a.k.", "a.qkv.", (1, 3)),
        Rule("a.v.", "a.qkv.", (2, 3)),
        Rule("a.", "layers.a."),
        Rule("out.weight", "proj", transposed=True),
        Rule("mid.weight", "mid.conv", conv=True),
        Rule("mid.", "middle."),
    ],
    "net.",
    drop=(r"position_ids", r"ema\..*"),
)


def test_each_kind_of_rule_out_and_back() -> None:
    """Split, transpose, 1x1 convolution, longest beginning, prefix; backward is the inverse."""
    ours = values("a.q.weight", "a.k.weight", "a.v.weight", "a.norm.bias", "mid.weight", "mid.bias")
    ours["out.weight"] = values("x", shape=(3, 5))["x"]
    file = {
        "net.a.qkv.weight": torch.cat([ours[f"a.{n}.weight"] for n in "qkv"]),
        "net.layers.a.norm.bias": ours["a.norm.bias"],
        "net.mid.conv": ours["mid.weight"][:, :, None, None],
        "net.middle.bias": ours["mid.bias"],
        "net.proj": ours["out.weight"].T.contiguous(),
        "net.position_ids": torch.arange(3),
        "net.ema.0": torch.zeros(1),
    }
    how, trouble = plan(shapes(ours), LAYOUT, entries(file))
    assert not trouble and set(how.dropped) == {"net.position_ids", "net.ema.0"}
    forward = how.forward(entries(file), None)
    assert forward.keys() == ours.keys()
    for name, entry in forward.items():
        assert entry.shape == tuple(ours[name].shape) and torch.equal(entry.read(), ours[name])
    # In the order of the file, so that it is read once from its beginning to its end.
    order = list(file)
    source = {item.target: item.source for item in how.items}
    places = [order.index(source[name]) for name in forward]
    assert places == sorted(places)
    back = how.backward(entries(ours))
    assert back.keys() == file.keys() - set(how.dropped)
    for name, entry in back.items():
        assert torch.equal(entry.read(), file[name]), name


def test_a_matrix_fits_a_convolution_of_one_pixel_and_nothing_wider() -> None:
    ours, layout = values("proj_in.weight"), Layout(IDENTITY)
    for shape in ((4, 6), (4, 6, 1, 1)):
        file = {"proj_in.weight": ours["proj_in.weight"].view(shape)}
        how, trouble = plan(shapes(ours), layout, entries(file))
        assert not trouble
        got = how.forward(entries(file), None)["proj_in.weight"].read()
        assert torch.equal(got, ours["proj_in.weight"])
    for wrong in ((6, 4), (4, 6, 3, 3), (24,), (4, 6, 1), (1, 4, 6), (4, 1, 6, 1), (2, 2, 6, 1)):
        file = {"proj_in.weight": torch.zeros(wrong)}
        _, trouble = plan(shapes(ours), layout, entries(file))
        assert trouble == [f"proj_in.weight must be [4, 6], got {list(wrong)}"]


def test_all_trouble_is_listed() -> None:
    ours = values("a.weight", "b.weight", "c.weight", "d.weight")
    file = values("a.weight", "e.weight") | {
        "b.weight": torch.zeros(6, 4),
        "d.weight": torch.zeros(4, 6, dtype=torch.long),
    }
    how, trouble = plan(shapes(ours), Layout(IDENTITY, drop=(r"e",)), entries(file))
    assert [item.target for item in how.items] == ["a.weight"]
    assert sorted(trouble) == [
        "b.weight must be [4, 6], got [6, 4]",
        "d.weight must be of a floating type, got torch.int64",
        "has an unexpected e.weight",  # a pattern drops whole names
        "lacks c.weight (for c.weight)",
    ]
    assert trouble_line("x", [str(i) for i in range(7)]) == "x: 0; 1; 2; 3; 4; and 2 more"
    assert trouble_line("x", ["a", "b"]) == "x: a; b"


def test_a_split_tensor_that_is_missing_or_of_another_size() -> None:
    ours = values("a.q.weight", "a.k.weight", "a.v.weight")
    _, trouble = plan(shapes(ours), LAYOUT, {})
    assert trouble == [f"lacks net.a.qkv.weight (for a.{n}.weight)" for n in "qkv"]
    file = {"net.a.qkv.weight": torch.zeros(8, 6)}
    _, trouble = plan(shapes(ours), LAYOUT, entries(file))
    assert set(trouble) == {"net.a.qkv.weight must be [12, 6], got [8, 6]"}


def test_aliases_and_a_name_that_is_there_twice() -> None:
    layout = Layout(IDENTITY, aliases=((r"^query\.", "to_q."), (r"^old\.", "")), drop=())
    ours = values("to_q.weight")
    file = {"query.weight": ours["to_q.weight"]}
    how, trouble = plan(shapes(ours), layout, entries(file))
    assert not trouble and how.items[0].source == "query.weight"
    both = file | {"to_q.weight": ours["to_q.weight"] + 1}
    how, trouble = plan(shapes(ours), layout, entries(both))
    assert how.items[0].source == "to_q.weight"
    assert trouble == ["has an unexpected query.weight"]  # one of them is not used: say so


def test_a_parameter_without_a_rule() -> None:
    with pytest.raises(ValueError, match=r"no rule for other\.weight"):
        names(["other.weight"], LAYOUT)
    # A rule's beginning ends at a dot: "block.1." is none of "block.10.".
    found = names(["block.10.w"], Layout([Rule("block.1.", "x."), Rule("", "y.")]))
    assert found["block.10.w"][0] == "y.block.10.w"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts(dtype: torch.dtype) -> None:
    ours = values("w")
    how, _ = plan(shapes(ours), Layout(IDENTITY), entries(ours))
    entry = how.forward(entries(ours), dtype)["w"]
    assert entry.dtype == dtype and torch.equal(entry.read(), ours["w"].to(dtype))
    for large, finite in (
        (7e4, dtype != torch.float16),
        (float("inf"), True),
        (-7e4, dtype != torch.float16),
    ):
        file = {"w": ours["w"].clone()}
        file["w"][1, 2], file["w"][0, 0] = large, float("nan")
        entry = how.forward(entries(file), dtype)["w"]
        if finite:  # what was not finite before is no loss of the cast
            assert torch.equal(entry.read().isfinite(), file["w"].isfinite())
        else:
            with pytest.raises(ValueError, match=r"w reaches 70000, too large for torch.float16"):
                entry.read()
