"""Sets of pictures, features and their files, and the metrics by name."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from snoopi import folders, zoo
from snoopi.evaluate import features, hpsv2, measure, pairs
from snoopi.evaluate import picture_sets as sets
from snoopi.evaluate.features import PROTOCOLS, Features
from snoopi.evaluate.fid import FeatureStats, frechet_distance
from snoopi.evaluate.kid import kernel_distance
from snoopi.evaluate.measure import Bench, Switches
from snoopi.evaluate.picture_sets import DrawnSet, How, Job, Row
from snoopi.evaluate.precision_recall import precision_recall
from snoopi.evaluate.prompts import read_prompts
from snoopi.models.vgg import VGGConfig
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ToolSpec
from tests.unit.test_tools import TINY, networks

SMALL = VGGConfig(channels=(4,) * 5, convs=(1,) * 5, width=6, classes=3)
VGG = ToolSpec("small-vgg", {"network": SMALL})


def picture(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 40))


def folder_of(path: Path, count: int, seed: int = 0) -> Path:
    path.mkdir()
    for i in range(count):
        picture(seed + i).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "vgg"
    return folders.save_tools(path, VGG, {"network": zoo.fresh(VGG, "network", 0)})


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- found ----------------------------------------------------------------------------------------


def test_pictures_are_found_in_natural_order(tmp_path: Path) -> None:
    for name in ("10.png", "9.jpg", "b2.PNG", "b10.jpeg", ".11.png", "notes.txt", "5²1.png"):
        (tmp_path / name).touch()
    (tmp_path / "8.png").mkdir()
    assert [p.name for p in sets.picture_files(tmp_path)] == [
        "5²1.png",
        "9.jpg",
        "10.png",
        "b2.PNG",
        "b10.jpeg",
    ]


def test_a_folder_without_pictures_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture"):
        sets.picture_files(tmp_path)
    with pytest.raises(ValueError, match="not there"):
        sets.picture_files(tmp_path / "nowhere")


def test_a_picture_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", 3) / "1.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"1\.png is no readable picture"):
        list(sets.batches(sets.picture_files(path.parent), PROTOCOLS["vgg16"].prepare, 2))


def test_batches_are_in_order_and_of_all(tmp_path: Path) -> None:
    files = sets.picture_files(folder_of(tmp_path / "a", 5))
    found = list(sets.batches(files, PROTOCOLS["vgg16"].prepare, 2))
    assert [len(part) for part, _ in found] == [2, 2, 1]
    want = torch.cat([PROTOCOLS["vgg16"].prepare(sets.open_picture(f)) for f in files])
    assert torch.equal(torch.cat([rows for _, rows in found]), want)


def test_texts_of_found_pictures(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", 3)
    assert [r.prompt for r in sets.found_rows(path, ["a", "b", "c"], "n", 2)] == ["a", "b"]
    assert sets.found_rows(path, None, None, None)[0].prompt is None
    with pytest.raises(ValueError, match="3 pictures for 2 prompts"):
        sets.found_rows(path, ["a", "b"], None, None)
    with pytest.raises(ValueError, match="4 pictures with prompts wanted, 3 found"):
        sets.found_rows(path, ["a", "b", "c", "d"], None, 4)
    line = json.dumps({"file": "../x.png", "prompt": "a", "negative": None})
    (path / sets.PROMPTS).write_text(line)
    with pytest.raises(ValueError, match="no file of this folder"):
        sets.found_rows(path, None, None, None)
    line = json.dumps({"file": "0.png", "prompt": "a", "negative": "drawn away from"})
    (path / sets.PROMPTS).write_text(line)
    assert sets.found_rows(path, None, None, None)[0].negative == "drawn away from"
    assert sets.found_rows(path, None, "scored", None)[0].negative == "scored"
    (path / sets.PROMPTS).write_text(json.dumps({"file": "0.png", "prompt": 5, "negative": None}))
    with pytest.raises(ValueError, match="line 1: no file, prompt"):
        sets.found_rows(path, None, None, None)


def test_sixteen_bits_of_grey_are_read_as_eight(tmp_path: Path) -> None:
    values = np.array([[0, 257, 0x8080, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(sets.open_picture(tmp_path / "a.png")).tolist() == [[0, 1, 128, 255]]


def test_prompts_of_every_form(tmp_path: Path) -> None:
    texts = ["a", "b c"]
    forms: dict[str, str] = {
        "p.txt": "a\n\nb c\n",
        "p.jsonl": '{"prompt": "a"}\n{"prompt": "b c"}\n',
        "list.json": json.dumps(texts),
        "labels.json": json.dumps({"labels": [["1.png", "a"], ["2.png", "b c"]]}),
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        assert read_prompts(tmp_path / name) == texts
    bad = {"w.json": '["\\ud800"]', "v.json": '{"labels": [["1.png", "\\ud800"]]}'}
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read_prompts(tmp_path / name)
    for name, content in {"x.json": "[1]", "y.json": '{"labels": ["a"]}', "z.csv": "a"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(tmp_path / "nowhere.json")


# --- drawn ----------------------------------------------------------------------------------------


class Painter:
    """A pipeline that paints the noise, and notes what it was asked for."""

    def __init__(self, bad: float = 0.0) -> None:
        self.calls: list[tuple[list[str], list[str | None]]] = []
        self.bad = bad

    def noise(self, seed: int, indices: Sequence[int], size: Any = None) -> Tensor:
        return torch.stack([torch.full((3, 2, 2), (i % 100) / 100) for i in indices])

    def pictures(self, prompts: Any, z: Tensor, negatives: Any, *rest: Any) -> Tensor:
        self.calls.append((prompts, negatives))
        return z + self.bad


def wanted(folder: Path, count: int = 5, **identity: Any) -> DrawnSet:
    jobs = [Job(f"{i}.png", f"p{i}", "away" if i > 2 else None, i) for i in range(count)]
    return DrawnSet(folder, jobs, {"seed": 0, **identity})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_calls_are_full_and_of_one_negative(tmp_path: Path) -> None:
    painter: Any = Painter()
    assert sets.draw(painter, wanted(tmp_path / "a"), How(), 2) == 5
    assert all(len(prompts) == 2 and len(set(negs)) == 1 for prompts, negs in painter.calls)
    rows = sets.read_rows(tmp_path / "a")
    assert [(r.prompt, r.negative) for r in rows[2:4]] == [("p2", None), ("p3", "away")]
    assert sets.found_rows(tmp_path / "a", None, None, None) == rows


def test_a_set_is_the_same_on_any_ranks_and_resumed(tmp_path: Path) -> None:
    painter: Any = Painter()
    sets.draw(painter, wanted(tmp_path / "one"), How(), 2)
    counts = [sets.draw(painter, wanted(tmp_path / "two"), How(), 2, rank, 2) for rank in (1, 0)]
    assert counts == [2, 3]
    (tmp_path / "two/3.png").unlink()
    painter.calls.clear()
    assert sets.draw(painter, wanted(tmp_path / "two"), How(), 2) == 1
    assert painter.calls == [(["p3", "p3"], ["away", "away"])]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_settings_are_refused_and_more_pictures_are_not(tmp_path: Path) -> None:
    painter: Any = Painter()
    sets.draw(painter, wanted(tmp_path / "a"), How(), 2)
    wanted(tmp_path / "a", 7).check()
    with pytest.raises(ValueError, match="seed 0 there, 1 wanted"):
        wanted(tmp_path / "a", seed=1).check()
    with pytest.raises(ValueError, match=r"pictures without manifest\.json"):
        wanted(folder_of(tmp_path / "b", 1)).check()
    (tmp_path / "a" / sets.MANIFEST).write_text("[")
    with pytest.raises(ValueError, match="no manifest"):
        wanted(tmp_path / "a").check()


def test_pictures_that_are_not_finite_leave_no_folder(tmp_path: Path) -> None:
    painter: Any = Painter(bad=float("nan"))
    with pytest.raises(ValueError, match=r"0\.png: .* not finite"):
        sets.draw(painter, wanted(tmp_path / "a"), How(), 2)
    assert not (tmp_path / "a").exists()


# --- features -------------------------------------------------------------------------------------


def test_features_of_a_folder_are_kept_and_taken_again(tmp_path: Path, vgg: Path) -> None:
    folder, cache = folder_of(tmp_path / "real", 5), tmp_path / "cache"
    found = features.of_files(sets.picture_files(folder), "vgg16", vgg, cache, batch=2)
    assert found.count == 5 and found.width == 6 and found.rows is not None
    assert (found.rows >= 0).all() and found.rows.std(0).max() > 0
    torch.testing.assert_close(
        features.of_files(sets.picture_files(folder), "vgg16", vgg, batch=5).rows, found.rows
    )
    path = cache / "real-vgg16.safetensors"
    marked = Features.of(found.rows + 1, "vgg16", "")
    features.write_features(path, marked, features._metadata(path))
    again = features.of_files(sets.picture_files(folder), "vgg16", vgg, cache)
    assert torch.equal(again.rows, found.rows + 1), "it was made again"
    picture(9, (30, 30)).save(folder / "5.png")
    with pytest.raises(ValueError, match=r"real-vgg16\.safetensors .*\(count, files differ\)"):
        features.of_files(sets.picture_files(folder), "vgg16", vgg, cache)


def test_other_weights_are_not_taken_from_the_cache(tmp_path: Path, vgg: Path) -> None:
    folder, cache = folder_of(tmp_path / "real", 2), tmp_path / "cache"
    features.of_files(sets.picture_files(folder), "vgg16", vgg, cache)
    other = folders.save_tools(tmp_path / "b", VGG, {"network": zoo.fresh(VGG, "network", 1)})
    with pytest.raises(ValueError, match=r"\(weights differ\)"):
        features.of_files(sets.picture_files(folder), "vgg16", other, cache)


def test_features_that_are_not_finite_name_their_picture(tmp_path: Path) -> None:
    net = zoo.fresh(VGG, "network", 0)
    with torch.no_grad():
        net.classifier[0].bias[0] = float("nan")
    files = sets.picture_files(folder_of(tmp_path / "a", 2))
    with pytest.raises(ValueError, match=r"0\.png: vgg16 features are not finite"):
        features.extract(files, "vgg16", net.eval())


def test_bgr_is_the_picture_with_its_channels_turned_round() -> None:
    image = picture(0)
    turned = Image.merge("RGB", image.split()[::-1])
    for name in ("vgg16", "inception-tf1"):
        plain, bgr = PROTOCOLS[name].prepare, PROTOCOLS[f"{name}-bgr"].prepare
        assert torch.equal(bgr(image), plain(turned))
        assert not torch.equal(bgr(image), plain(image))
    assert PROTOCOLS["inception"].prepare(image).shape == (1, 3, 299, 299)
    assert Switches(bgr=True).pr_protocol() == "inception-tf1-bgr"
    assert Switches(pr_features="vgg16").pr_protocol() == "vgg16"


def test_files_of_features_and_statistics(tmp_path: Path) -> None:
    rows = randn(9, 4)
    features.write_features(tmp_path / "f.safetensors", Features.of(rows, "inception", "x"))
    back = features.read_features(tmp_path / "f.safetensors")
    assert torch.equal(back.rows, rows) and back.protocol == "inception"
    stats = Features(None, "", "x", FeatureStats.of(rows))
    features.write_features(tmp_path / "s.safetensors", stats)
    back = features.read_features(tmp_path / "s.safetensors")
    assert back.rows is None and back.count == 9
    torch.testing.assert_close(back.stats.covariance, torch.cov(rows.double().T))
    other = FeatureStats.of(randn(7, 4, seed=1))
    want = frechet_distance(FeatureStats.of(rows), other)
    assert frechet_distance(back.stats, other) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"features": torch.zeros(3)}, r"floats \[n d\]"),
        ({"features": torch.zeros(3, 2, dtype=torch.int64)}, r"floats \[n d\]"),
        ({"features": torch.tensor([[0.0], [torch.nan]])}, "row 1 is not"),
        ({"mean": torch.zeros(3)}, "neither features nor mean"),
        ({"mean": torch.zeros(2), "covariance": torch.ones(2, 2).tril()}, "symmetric"),
        ({"mean": torch.zeros(3), "covariance": torch.zeros(2, 2)}, r"mean \[d\] and"),
    ],
)
def test_bad_files_of_features(tmp_path: Path, tensors: dict[str, Tensor], line: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, {"count": "5"})
    with pytest.raises(ValueError, match=line) as raised:
        features.read_features(path)
    assert str(path) in str(raised.value)


def test_moments_are_checked() -> None:
    mean, cov = torch.zeros(2), torch.eye(2)
    for bad, line in [
        ((mean, cov, 1), "2 rows"),
        ((mean[None], cov, 5), "expected"),
        ((mean, cov * torch.inf, 5), "finite"),
        ((mean, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 5), "symmetric"),
        ((mean, -cov, 5), "negative variance"),
    ]:
        with pytest.raises(ValueError, match=line):
            FeatureStats.from_moments(*bad)


# --- the metrics ----------------------------------------------------------------------------------


def test_distances_of_given_features_are_the_functions_own() -> None:
    real, fake = randn(60, 5), randn(50, 5, seed=1) * 1.3
    bench = Bench(
        features=Features.of(fake, "inception", "f"),
        reference=Features.of(real, "", "r"),
        switches=Switches(kid_subsets=3, kid_size=20, pr_k=2),
    )
    names = measure.names("fid, kid,pr,fid")
    measure.check(names, bench)
    found = measure.measure(names, bench)
    assert list(found) == ["fid", "kid", "pr"]
    stats = [FeatureStats.of(x) for x in (fake, real)]
    assert found["fid"].figures["fid"] == (frechet_distance(*stats), 50, None, None)
    kid = kernel_distance(real, fake, 3, 20)
    assert [f.value for f in found["kid"].figures.values()] == [kid.mean, kid.std]
    pair = precision_recall(real, fake, 2)
    assert tuple(f.value for f in found["pr"].figures.values()) == pair
    assert "k = 2" in found["pr"].protocol and "against r" in found["fid"].protocol
    assert found["fid"].details["reference_count"] == 60


def test_pictures_are_read_once_for_two_metrics(
    tmp_path: Path, vgg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "inception", PROTOCOLS["vgg16"])
    rows = [Row(f) for f in sets.picture_files(folder_of(tmp_path / "fake", 4, seed=50))]
    real = folder_of(tmp_path / "real", 5)
    how = Switches(kid_subsets=2, kid_size=3)
    keep = tmp_path / "kept"
    bench = Bench(rows, None, real, {"vgg": vgg}, switches=how, keep=keep)
    measure.check(["fid", "kid"], bench)
    found = measure.measure(["fid", "kid"], bench)
    (keep / "fake-inception.safetensors").unlink()  # so that a second reading would show
    again = measure.measure(["fid"], bench)
    assert not list(keep.iterdir()) and again["fid"].figures == found["fid"].figures
    sides = (
        features.of_files(sets.picture_files(p), "vgg16", vgg) for p in (rows[0].file.parent, real)
    )
    want = frechet_distance(*(side.stats for side in sides))
    assert found["fid"].figures["fid"].value == pytest.approx(want)
    rows[0].file.unlink()
    (keep / "fake-inception.safetensors").touch()
    with pytest.raises(ValueError, match=r"fake-inception\.safetensors is of other pictures"):
        measure.check(["fid"], bench)


def test_what_metrics_need(tmp_path: Path, vgg: Path) -> None:
    ten, two = (Features.of(randn(n, 3), "inception", f"{n} rows") for n in (10, 2))
    other = Features.of(randn(10, 3), "vgg16", "other")
    wide = Features.of(randn(10, 4), "", "wide")
    stats = Features(None, "inception", "stats", ten.stats)
    row = [Row(tmp_path / "a.png")]
    for metrics, bench, line in [
        ("fid", Bench(features=ten), "fid: --reference"),
        ("pr", Bench(features=ten, reference=stats), "pr: stats holds statistics"),
        ("pr", Bench(features=two, reference=ten), "pr: 2 rows holds 2 rows, not 4"),
        ("kid", Bench(features=ten, reference=two), "kid: subsets of 1000 wanted, 2 pictures"),
        ("fid", Bench(features=ten, reference=other), "inception and vgg16 features"),
        ("fid", Bench(features=ten, reference=wide), "3 and 4 values"),
        ("fid", Bench(row * 2, reference=ten), "fid: --inception"),
        ("fid", Bench(row, reference=ten, tools={"inception": vgg}), "fid: needs 2 pictures"),
        ("fid", Bench((), reference=ten, keep=tmp_path), "fid: needs 2 pictures or more, got 0"),
        ("fid", Bench(row * 2, reference=ten, tools={"inception": vgg}), "small-vgg"),
        ("fid", Bench(row * 2, reference=tmp_path), "holds no picture"),
        ("clip", Bench(row), "clip: .* --prompts"),
        ("clip", Bench([Row(row[0].file, "a")]), "clip: --clip"),
        ("clip", Bench([Row(row[0].file, "a")], tools={"clip": vgg}), "small-vgg, not a CLIP"),
        ("hpsv2", Bench([Row(row[0].file, "a")]), "hpsv2: --hps-version"),
        ("removal", Bench(tools={}), "removal: --clip"),
        ("named", Bench(row), "named: .* --world"),
    ]:
        with pytest.raises(ValueError, match=line):
            measure.check([metrics], bench)
    unknown = Bench(features=wide, reference=wide, switches=Switches(bgr=True))
    with pytest.raises(ValueError, match="do not say theirs"):
        measure.check(["pr"], unknown)
    measure.check(["fid"], unknown)
    assert "unknown protocol (4 values); wide" in measure.measure(["fid"], unknown)["fid"].protocol
    for text in ("fdi", "", "fid,,kdi"):
        with pytest.raises(ValueError, match="--metrics: expected some of fid, kid"):
            measure.names(text)


def test_hpsv2_weights_that_say_their_version(tmp_path: Path) -> None:
    """By the name of the file that they were converted from."""
    clip = folders.save_tools(
        tmp_path / "hps",
        TINY,
        networks(),
        Tokenizer.words(["a"], 12),
        {"sources": {"HPS_v2_compressed.pt": "0" * 64}},
    )
    row = [Row(tmp_path / "a.png", "a")]
    given = Bench(row, tools={"hps": clip}, switches=Switches(hps_version="v2.0"))
    measure.check(["hpsv2"], given)
    given.switches = Switches(hps_version="v2.1")
    with pytest.raises(ValueError, match=r"--hps-version v2\.1, but .*hps was made of v2\.0"):
        measure.check(["hpsv2"], given)


# --- HPSv2's means, removal's pairs ---------------------------------------------------------------


def test_hpsv2_averages_ten_groups_of_eighty() -> None:
    scores = {style: (20 + randn(800, seed=i)).tolist() for i, style in enumerate(hpsv2.STYLES)}
    found = hpsv2.aggregate(scores)
    groups = [np.mean(scores["photo"][i : i + 80]) for i in range(0, 800, 80)]
    assert found["photo"] == pytest.approx((np.mean(groups), np.std(groups)))
    every = [x for style in hpsv2.STYLES for x in scores[style]]
    assert found["average"][0] == pytest.approx(statistics.fmean(every))
    assert hpsv2.aggregate({"photo": [1.0, 3.0]})["photo"] == (2.0, 1.0)


def test_the_papers_pairs() -> None:
    found = pairs.read_pairs(pairs.PAPER)
    negatives = [pair.negative for pair in found]
    assert negatives == ["male", "female", "young", "old", "cat", "dog"]
    assert [pair.prompt for pair in found] == ["A photo of a person"] * 4 + ["A photo of a pet"] * 2
    assert all(pair.shows not in pair.others and pair.negative in pair.shows for pair in found)


def test_pictures_before_are_drawn_once_a_prompt() -> None:
    found = pairs.jobs(pairs.read_pairs(pairs.PAPER), 100)
    assert len(found) == 100 * (2 + 6)
    assert {job.noise for job in found} == set(range(100))
    before = [job for job in found if job.negative is None]
    assert {job.file.split("/")[0] for job in before} == {"before-0", "before-4"}
    rows = [Row(Path(job.file), job.prompt, job.negative) for job in found]
    pair = pairs.read_pairs(pairs.PAPER)[5]
    assert len(pairs.pictures(rows, pair, None)) == len(pairs.pictures(rows, pair, "dog")) == 100
    assert pairs.pictures(rows, pair, "dog")[3] == Path("after-5/00003.png")
    with pytest.raises(ValueError, match="none of 'A photo of a pet' with the negative 'dog'"):
        pairs.pictures([row for row in rows if row.negative != "dog"], pair, "dog")


def test_a_picture_is_free_if_another_text_is_nearer() -> None:
    texts = torch.eye(3)
    embeddings = torch.tensor([[0.9, 0.1, 0], [0.2, 0.3, 0], [0, 0, 1.0], [0.5, 0.4, 0.49]])
    assert pairs.free(embeddings[:3], texts) == 2


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"prompt": "a", "negative": "b", "shows": "c"}',
        '{"prompt": "a", "negative": "b", "shows": "c", "others": []}',
        '{"prompt": "a", "negative": "b", "shows": "c", "others": "de"}',
        '{"prompt": "a", "negative": "", "shows": "c", "others": ["d"]}',
    ],
)
def test_bad_pairs(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(pairs.PAPER.read_text() + line)
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 7: expected"):
        pairs.read_pairs(path)
