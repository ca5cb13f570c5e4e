"""python -m snoopi.evaluate: draws, resumes, measures; its mistakes; two ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import Warm, assert_one_line
from PIL import Image
from safetensors.torch import save_file

from snoopi import folders, zoo
from snoopi.evaluate import __main__ as evaluate
from snoopi.evaluate.pairs import PAPER
from snoopi.models.clip import CLIPTextConfig
from snoopi.models.clip_vision import CLIPVisionConfig
from snoopi.models.vgg import VGGConfig
from snoopi.tokenize import Tokenizer
from snoopi.zoo import ToolSpec

pytestmark = pytest.mark.e2e
WORLD = ("shapes_teacher", "--world", "shapes", "--steps", "1", "--num", "7", "--batch", "3")
DISTANCES = ("--metrics", "fid,kid,pr,named", "--kid-size", "5", "--kid-subsets", "4")

IMAGE = CLIPVisionConfig(
    width=16, mlp_width=24, layers=1, heads=2, patch=16, image_size=32, projection=12
)
TEXT = CLIPTextConfig(width=12, mlp_width=16, layers=1, heads=2, projection=12)
CLIP = ToolSpec("tiny-clip", {"image_encoder": IMAGE, "text_encoder": TEXT})
VGG = ToolSpec("vgg16", {"network": VGGConfig((4,) * 5, (1,) * 5, width=6, classes=3)})


def pictures(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Seven pictures of the teacher at one step, and the report of drawing them."""
    out = tmp_path_factory.mktemp("drawn")
    words = (*WORLD, *DISTANCES, "--out", str(out / "set"), "--json", str(out / "a.json"))
    assert evaluate.main(words) == 0
    return out / "set", json.loads((out / "a.json").read_text())


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with the real vocabulary, and a tiny VGG."""
    out = tmp_path_factory.mktemp("tools")
    nets = {part: zoo.fresh(CLIP, part, 0) for part in CLIP.parts()}
    folders.save_tools(out / "clip", CLIP, nets, Tokenizer.clip(49407))
    folders.save_tools(out / "vgg", VGG, {"network": zoo.fresh(VGG, "network", 0)})
    return out


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real")
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 44)).save(out / f"{i}.png")
    return out


def test_a_model_of_a_small_world(drawn: tuple[Path, dict[str, Any]]) -> None:
    out, report = drawn
    names = ["manifest.json", "prompts.jsonl", *(f"{i:05d}.png" for i in range(7))]
    assert sorted(pictures(out)) == sorted(names)
    metrics = report["metrics"]
    assert list(metrics) == ["fid", "kid", "pr", "named"]
    figures = {name: f for m in metrics.values() for name, f in m["figures"].items()}
    assert {"fid", "kid", "kid_std", "precision", "recall", "all"} <= figures.keys()
    assert all(np.isfinite(figure["value"]) for figure in figures.values())
    assert all(figures[name]["n"] == 7 for name in ("fid", "kid", "recall", "all"))
    assert 0 < figures["shape"]["n"] <= 7 and figures["all"]["low"] < figures["all"]["high"]
    assert all("judge" in metric["protocol"] for metric in metrics.values())
    assert report["seed"] == 0 and {"snoopi", "torch", "pillow"} <= report["versions"].keys()
    assert report["pictures"]["main"]["identity"]["steps"] == 1
    assert {"drawing", "measuring"} <= report["seconds"].keys()


def test_the_folder_measures_as_the_model_did(
    drawn: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = drawn
    again = tmp_path / "b.json"
    words = (str(out), "--world", "shapes", *DISTANCES, "--json", str(again))
    assert evaluate.main(words) == 0
    found = json.loads(again.read_text())["metrics"]
    for name, metric in report["metrics"].items():
        assert found[name]["figures"] == metric["figures"]
    shown = capsys.readouterr().out
    assert shown.startswith(f"{out}\n\nmetric") and f"wrote {again}" in shown
    assert "named: what the prompt names is right, by the shapes world's judge" in shown


def test_a_worlds_removal_keeps_no_pictures(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    words = ("--metrics", "removal", "--removal-count", "2", "--json", str(out))
    assert evaluate.main((*WORLD[:5], *words)) == 0
    figures = json.loads(out.read_text())["metrics"]["removal"]["figures"]
    assert figures["targeted before"]["value"] == 0 and figures["easy after"]["n"] == 10
    assert figures["easy keep"]["n"] != 10  # attributes, not pictures
    assert list(tmp_path.iterdir()) == [out]


def test_a_stopped_command_goes_on(
    warm: Warm, drawn: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    words = (*WORLD[:-4], "--num", "60", "--batch", "3", *DISTANCES, "--out", str(out))
    command = warm.start("evaluate", *words)
    command.until(lambda: (out / "00004.png").exists())
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    assert (
        command.last_line == "snoopi.evaluate: SIGTERM: stopped at once; the same command goes on"
    )
    assert not (out / "00059.png").exists(), "it was done before it was stopped"
    assert not [name for name in pictures(out) if name.startswith(".")]
    (out / ".00009.png.x1y2z3").touch()  # as SIGKILL would have left it
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*.png")}
    fewer = (*WORLD[:-4], "--num", "4", "--batch", "3", "--metrics", "fid", "--out", str(out))
    assert evaluate.main(fewer) == 0  # all four are there
    assert len((out / "prompts.jsonl").read_text().splitlines()) == 4
    assert evaluate.main((*WORLD, *DISTANCES, "--out", str(out))) == 0  # seven of them
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    want = pictures(drawn[0])
    assert not [name for name in pictures(out) if name.startswith(".")]
    assert {name: data for name, data in pictures(out).items() if name in want} == want


def _rank(number: int, out: Path) -> None:
    os.environ["RANK"] = str(number)
    words = (*WORLD, *DISTANCES, "--out", str(out), "--json", str(out.with_suffix(".json")))
    os._exit(evaluate.main(words))


def test_two_ranks_draw_the_same(
    drawn: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(n, tmp_path / "set")) for n in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert pictures(tmp_path / "set") == pictures(drawn[0])
    report = json.loads((tmp_path / "set.json").read_text())
    assert report["drawn_by_rank_0"] == {"main": 4}
    assert report["metrics"]["fid"]["figures"] == drawn[1]["metrics"]["fid"]["figures"]


def test_scores_hpsv2_and_pairs_of_a_model(tools: Path, tmp_path: Path) -> None:
    """Everything that is drawn: prompts with a negative, the benchmark, before and after."""
    benchmark = tmp_path / "benchmark"
    benchmark.mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        texts = json.dumps([f"a red circle {style} {i}" for i in range(3)])
        (benchmark / f"{style}.json").write_text(texts)
    (tmp_path / "p.txt").write_text("a red circle\na blue star\n")
    clip, out = str(tools / "clip"), str(tmp_path / "set")
    common = (
        *("--metrics", "clip,hpsv2,removal", "--clip", clip, "--hps", clip),
        *("--hps-version", "v2.1", "--hps-prompts", str(benchmark), "--num", "2"),
    )
    drawing = (
        *("--prompts", str(tmp_path / "p.txt"), "--negative", "green", "--removal-count", "2"),
        *("--steps", "1", "--out", out),
    )
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert evaluate.main(("shapes_teacher", *common, *drawing, "--json", str(a))) == 0
    assert evaluate.main((out, *common, "--json", str(b))) == 0
    first, second = (json.loads(path.read_text())["metrics"] for path in (a, b))
    for name in first:
        assert first[name]["figures"] == second[name]["figures"]
    assert list(first["clip"]["figures"]) == ["clip", "clip_negative"]
    names = ["anime", "concept-art", "paintings", "photo", "average"]
    assert list(first["hpsv2"]["figures"]) == [f"{name} v2.1" for name in names]
    assert first["hpsv2"]["figures"]["average v2.1"]["n"] == 8
    removal = first["removal"]["figures"]
    assert removal["after"]["n"] == 12 and removal["dog before"]["n"] == 2
    assert len(first["removal"]["details"]["pairs"]) == len(PAPER.read_text().splitlines())
    manifest = json.loads((tmp_path / "set/removal/manifest.json").read_text())
    assert manifest["scale"] == 0.5, "Tab. 3's strength"
    assert "v2.1" in first["hpsv2"]["protocol"] and "antialiasing" in first["hpsv2"]["protocol"]


def test_a_folder_against_another(tools: Path, real: Path, tmp_path: Path) -> None:
    """Precision and recall by a network; then the same from the features that were kept."""
    words = ("--metrics", "pr", "--pr-features", "vgg16", "--reference", str(real))
    keep, cache, out = tmp_path / "keep", tmp_path / "cache", tmp_path / "a.json"
    more = ("--vgg", str(tools / "vgg"), "--cache", str(cache), "--save-features", str(keep))
    assert evaluate.main((str(real), *words, *more, "--json", str(out))) == 0
    figures = json.loads(out.read_text())["metrics"]["pr"]["figures"]
    assert [figures[name]["value"] for name in ("precision", "recall")] == [1, 1]
    given = (
        *("--features", str(keep / f"{real.name}-vgg16.safetensors"), *words[:-1]),
        str(cache / f"{real.name}-vgg16.safetensors"),
    )
    assert evaluate.main((*given, "--json", str(out))) == 0
    assert json.loads(out.read_text())["metrics"]["pr"]["figures"] == figures


def test_a_folder_was_drawn_for_one_negative_and_is_scored_for_another(
    tools: Path, real: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("star\n" * 6)
    found = {}
    for negative in ("green", "blue"):
        out = tmp_path / f"{negative}.json"
        words = ("--metrics", "clip", "--clip", str(tools / "clip"), "--negative", negative)
        more = ("--prompts", str(tmp_path / "p.txt"), "--json", str(out))
        assert evaluate.main((str(real), *words, *more)) == 0
        found[negative] = json.loads(out.read_text())["metrics"]["clip"]
        assert found[negative]["details"]["negative"] == negative
    values = [metric["figures"]["clip_negative"]["value"] for metric in found.values()]
    assert values[0] != values[1]


def test_a_report_takes_the_place_of_nothing_but_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, out = tmp_path / "kept.safetensors", tmp_path / "out.json"
    save_file({"features": torch.randn(5, 3)}, kept)
    words = ("--metrics", "fid", "--features", str(kept), "--reference", str(kept), "--json")
    for _ in range(2):
        assert evaluate.main((*words, str(out))) == 0
    (tmp_path / "prompts.json").write_text('["a"]')
    for name in ("kept.safetensors", "prompts.json", "manifest.json"):
        before, _ = kept.read_bytes(), capsys.readouterr()
        assert evaluate.main((*words, str(tmp_path / name))) == 2
        assert_one_line(capsys.readouterr().err, "--json", name)
        assert kept.read_bytes() == before


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("nowhere --metrics fid", ("nowhere is no model folder and no folder of pictures",)),
        ("{real} --metrics fid,fdi", ("--metrics", "'fdi'")),
        ("--metrics fid", ("--features FILE",)),
        ("shapes_teacher --metrics fid", ("--out",)),
        ("shapes_teacher --metrics fid --out {new}", ("--prompts",)),
        ("shapes_vae --metrics fid --world shapes --num 5 --out {new}", ("lacks backbone",)),
        ("{real} --metrics fid", ("fid: --reference",)),
        ("{real} --metrics fid --reference {real}", ("fid: --inception",)),
        ("{real} --metrics fid --reference {real} --inception {tools}/vgg", ("vgg16",)),
        ("{real} --metrics fid --reference {tools}", ("holds no picture",)),
        ("{real} --metrics kid --reference {real} --inception {tools}/vgg", ("vgg16",)),
        ("{real} --metrics clip --clip {tools}/clip", ("prompts are not known",)),
        ("{real} --metrics hpsv2 --hps {tools}/clip", ("--hps-version",)),
        ("{real} --metrics removal --clip {tools}/clip", ("removal", "before and after")),
        ("{real} --metrics removal --world shapes", ("give a model",)),
        ("{real} --metrics named --world shapes", ("44x40 pixels, not 32 a side",)),
        ("{real} --metrics fid --batch 0", ("--batch", "at least 1", "0")),
        ("{real} --metrics kid --kid-size 1", ("--kid-size", "at least 2")),
        ("{real} --metrics fid --num 9 --reference {real}", ("9 pictures", "6 found")),
        ("{real} --metrics hpsv2 --hps-jpeg 100", ("--hps-jpeg", "100")),
        ("{real} --metrics fid --size 8x8", ("--size is for a model",)),
        ("{real} --metrics fid --seed 3", ("--seed is for a model",)),
        ("{real} --metrics fid --kid-size 9", ("--kid-size is for kid",)),
        ("{real} --metrics removal --negative x", ("--negative is for fid",)),
        ("{real} --metrics clip --clip-first -5", ("--clip-first", "-5")),
        ("{real} --metrics pr --features {kept} --reference {real} --num 3", ("--num", "every")),
        ("{real} --metrics fid --features {kept} --reference {kept}", ("6 pictures", "5 rows")),
        ("--metrics fid --features {kept} --reference {kept} --cache {new}", ("--cache", "file")),
        ("--metrics fid --features {kept} --reference {kept} --negative x", ("--negative",)),
        ("--metrics pr --features {kept} --reference {kept} --bgr", ("inception-tf1-bgr",)),
        ("{real} --metrics clip --clip {torn} --prompts {six}", ("not a readable safetensors",)),
        ("{world} --out {new} --num 3", ("4 pictures", "3")),
        ("{world} --out {new} --save-features {new}", ("--world", "--save-features")),
        ("{real} --metrics fid --cache {real}/0.png", ("--cache must be a folder", "0.png")),
        ("{real} --metrics fid --save-features {real}/0.png/a", ("cannot write", "0.png")),
        ("{real} --metrics pr --world shapes --bgr", ("--bgr", "judge")),
        ("{world} --out {new} --size 3", ("--size", "HxW")),
        ("{real} --metrics fid --world shapes --reference {real}", ("--world", "--reference")),
        ("{world} --out {new} --size 33x32", ("33x32", "32 pixels a side")),
        ("{world} --out {new} --steps 1001", ("1001",)),
        ("{world} --out {new} --scale 1,2", ("scale", "1, got 2")),
        ("{world} --out {set} --seed 1", ("set holds other pictures", "seed 0 there, 1 wanted")),
        ("{world} --out {real}", ("pictures without manifest.json",)),
        ("{world} --out {set}/00000.png", ("--out must be a folder", "00000.png")),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    words: str,
    names: tuple[str, ...],
    drawn: tuple[Path, dict[str, Any]],
    tools: Path,
    real: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, torn = tools / "kept.safetensors", tools / "torn"
    save_file({"features": torch.randn(5, 3)}, kept)
    shutil.copytree(tools / "clip", torn, dirs_exist_ok=True)
    os.truncate(torn / "image_encoder.safetensors", 999)
    before = pictures(drawn[0]), pictures(real)
    world = " ".join((*WORLD, "--metrics", "fid"))
    places = {"real": real, "tools": tools, "set": drawn[0], "new": tmp_path / "new"}
    places |= {"kept": kept, "torn": torn, "six": tools / "six.txt"}
    places["six"].write_text("a\n" * 6)
    given = words.format(world=world, **places).split()
    assert evaluate.main([*given, "--json", str(tmp_path / "out.json")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if not line.startswith(("drawing", "measuring"))]
    assert_one_line("\n".join(said), "snoopi.evaluate: ", *names)
    assert not list(tmp_path.iterdir())
    assert before == (pictures(drawn[0]), pictures(real))


def test_a_picture_that_cannot_be_read_is_named(
    tools: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (real / "3.png").read_bytes()
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(data if i != 2 else data[:-300])
    words = ("--metrics", "pr", "--pr-features", "vgg16", "--reference", str(real))
    assert evaluate.main((str(tmp_path), *words, "--vgg", str(tools / "vgg"))) == 2
    assert_one_line(capsys.readouterr().err.replace("measuring pr\n", ""), "2.png is no readable")


def test_other_prompts_than_the_worlds_are_not_judged(
    drawn: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against captions of others the judge would find everything wrong."""
    shutil.copytree(drawn[0], tmp_path / "set")
    path = tmp_path / "set/prompts.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    assert evaluate.main((str(tmp_path / "set"), "--world", "shapes", *DISTANCES)) == 2
    assert_one_line(capsys.readouterr().err, "set shows other prompts than --world shapes's")


def test_help_names_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "fid, kid, pr, clip, hpsv2, removal" in shown and "docs/metrics.md" in shown
