"""A user's mistakes: one line that names the thing, exit status 2, and nothing written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import FAST, Warm, assert_one_line, rows
from safetensors.torch import load_file, save_file

from snoopi import generate, parallel, train

pytestmark = pytest.mark.e2e


@pytest.fixture
def teacher(reference: Path, tmp_path: Path) -> Path:
    """A teacher's model folder of one's own, to be damaged."""
    return Path(shutil.copytree(reference.parent / "debug_teacher" / "model", tmp_path / "teacher"))


class Mistake:
    """Runs a command in this process and looks at the line it leaves."""

    def __init__(self, capsys: pytest.CaptureFixture[str], out: Path) -> None:
        self._capsys, self.out = capsys, out

    def train(self, *words: str, names: tuple[str, ...]) -> None:
        assert train.main([*words, "--out", str(self.out)]) == 2
        assert_one_line(self._capsys.readouterr().err, "snoopi.train: ", *names)

    def generate(self, *words: str, names: tuple[str, ...]) -> None:
        assert generate.main([*words]) == 2
        assert_one_line(self._capsys.readouterr().err, "snoopi.generate: ", *names)


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Mistake:
    return Mistake(capsys, tmp_path / "out")


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("debgu", ("'debgu'", "nearest is debug")),
        ("debug vsd.studnt_t=3", ("vsd.studnt_t", "nearest is vsd.student_t")),
        ("debug vsd.student_t=1000", ("vsd.student_t", "from 0 to 999", "1000")),
        ("debug vsd.student_t=-1", ("vsd.student_t", "from 0 to 999", "-1")),
        ("debug vsd.t=[20,1001]", ("vsd.t", "from 0 to 1000", "1001")),
        ("debug vsd.t=[5,5]", ("vsd.t", "low < high", "[5, 5]")),
        ("debug lora.t=[9,2]", ("lora.t", "low < high", "[9, 2]")),
        ("debug kappa.teacher=[nan,1]", ("kappa.teacher", "[number, number]", "nan")),
        ("debug kappa.lora=[0,inf]", ("kappa.lora", "[number, number]", "inf")),
        ("debug evaluate.scales=[]", ("evaluate.scales", "[number, ...]", "[]")),
        ("debug evaluate.prompts=1", ("evaluate.prompts", "0, or at least 2", "1")),
        ("debug evaluate.teacher_steps=1001", ("evaluate.teacher_steps", "1001")),
        ("debug run.steps=0", ("run.steps", "at least 1", "0")),
        ("debug run.batch=0", ("run.batch", "at least 1", "0")),
        ("debug run.batch=8 run.accumulate=3", ("run.accumulate", "divisor", "8", "3")),
        ("debug run.seed=-1", ("run.seed", "0", "-1")),
        ("debug optim.student.lr=0", ("optim.student.lr", "above 0", "0")),
        ("debug ema.decay=1", ("ema.decay", "0.999999", "1.0")),
        ("debug lora.rank=0", ("lora.rank", "at least 1", "0")),
        ("debug model.teacher=nowhere", ("'nowhere'", "no model folder, no recipe")),
        ("debug model.teacher=debug_techer", ("'debug_techer'", "nearest is debug_teacher")),
        ("debug model.teacher=no/where", ("no/where", "does not exist")),
        ("debug model.teacher=shapes_vae", ("model.teacher", "no backbone", "no text encoder")),
        ("debug_teacher model.preset=debgu", ("'debgu'", "nearest is 'debug'")),
        ("debug_teacher model.preset=shapes", ("model.vae", "needs a model folder")),
        ("debug_teacher model.vae=shapes_vae", ("model.vae", "16 channels", "got 4")),
        ("debug_teacher model.preset=sd15 model.vae=shapes_vae", ("sd15", "256", "32")),
        ("shapes_vae model.preset=debug", ("model.preset", "no VAE that learns")),
        ("debug run.device=cuda", ("run.device", "CUDA")),
        ("debug --unknown", ("--unknown",)),
        ("debug run.steps", ("section.key=value",)),
    ],
)
def test_impossible_values(mistake: Mistake, words: str, names: tuple[str, ...]) -> None:
    if "cuda" in words and torch.cuda.is_available():
        words = "debug run.device=tpu"
        names = ("run.device", "cuda")
    if "--unknown" in words:
        with pytest.raises(SystemExit) as left:
            train.main([*words.split()])
        assert left.value.code == 2
        assert_one_line(mistake._capsys.readouterr().err, *names)
    else:
        mistake.train(*words.split(), names=names)
    assert not mistake.out.exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (['lora.targets=["to_nothing"]'], ("to_nothing", "matches no")),
        (["model.student_init=nowhere"], ("nowhere", "does not exist")),
        (["model.student_init=VAE"], ("model.student_init", "no backbone")),
    ],
)
def test_values_that_a_teacher_refuses(
    mistake: Mistake, teacher: Path, words: list[str], names: tuple[str, ...]
) -> None:
    vae = str(train.shipped_or_path("shapes_vae"))
    words = [word.replace("VAE", vae) for word in words]
    mistake.train(*FAST, f"model.teacher={teacher}", *words, names=names)
    assert not mistake.out.exists()


def test_a_batch_that_the_ranks_do_not_divide(
    mistake: Mistake, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    names = ("run.batch", "multiple of 3 ranks", "got 2")
    mistake.train(*FAST, f"model.teacher={teacher}", names=names)
    assert not mistake.out.exists()


# --- model folders --------------------------------------------------------------------------------


def change_spec(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "snoopi.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "backbone.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def be_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def be_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def truncate(folder: Path) -> None:
    os.truncate(folder / "backbone.safetensors", 1000)


def not_utf8(folder: Path) -> None:
    (folder / "snoopi.json").write_bytes(b"\xff\xfe")


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": 3}')


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def more_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"word{i}": 1000 + i for i in range(9)}
    path.write_text(json.dumps(data))


def a_far_number(folder: Path) -> None:
    """As many words as before, but one whose id the text encoder has no row for."""
    path = folder / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["red"] = 1000
    path.write_text(json.dumps(data))


DAMAGES: list[tuple[Callable[[Path], object], tuple[str, ...]]] = [
    (be_empty, ("holds no snoopi.json",)),
    (be_a_file, ("is a file",)),
    (truncate, ("backbone.safetensors", "not a readable safetensors")),
    (not_utf8, ("snoopi.json", "is not JSON")),
    (lambda f: (f / "snoopi.json").unlink(), ("holds no snoopi.json",)),
    (lambda f: (f / "snoopi.json").write_text("{"), ("snoopi.json", "is not JSON")),
    (lambda f: (f / "snoopi.json").write_text("[" * 99999), ("snoopi.json", "is not JSON")),
    (lambda f: (f / "snoopi.json").write_text("[]"), ("snoopi.json", "not of format 1")),
    (lambda f: change_spec(f, lambda d: d.update(format=2)), ("not of format 1",)),
    (lambda f: change_spec(f, lambda d: d.pop("model")), ("must be an object",)),
    (lambda f: change_spec(f, lambda d: d.update(provenance=[3])), ("provenance",)),
    (lambda f: change_spec(f, lambda d: d["model"].update(arhc="")), ("'arhc'", "'arch'")),
    (lambda f: change_spec(f, lambda d: d["model"].pop("vae")), ("lacks vae",)),
    (
        lambda f: change_spec(f, lambda d: d["model"]["backbone"].update(channels=[-1])),
        ("one entry a level",),
    ),
    (
        lambda f: change_spec(f, lambda d: d["model"]["text"][0]["config"].update(heads=3)),
        ("model.text.config.heads must divide the width 16, got 3",),
    ),
    (
        lambda f: change_spec(f, lambda d: d["model"]["backbone"].update(heads=[0, 0])),
        ("snoopi.json", "modulo by zero"),
    ),
    (lambda f: change_weights(f, lambda s: s.pop("conv_in.bias")), ("lacks conv_in.bias",)),
    (
        lambda f: change_weights(f, lambda s: s.update({"conv_in.bias": torch.zeros(3)})),
        ("conv_in.bias must be [16], got [3]",),
    ),
    (
        lambda f: change_weights(f, lambda s: s.update({"conv_in.bias": torch.zeros(16).int()})),
        ("conv_in.bias must be of a floating type", "torch.int32"),
    ),
    (lambda f: (f / "backbone.safetensors").unlink(), ("model.teacher", "no backbone")),
    (lambda f: (f / "vae.safetensors").unlink(), ("model.teacher", "no vae")),
    (lambda f: (f / "text_encoder.safetensors").unlink(), ("model.teacher", "no text encoder")),
    (bad_tokenizer, ("tokenizer.json", "not a tokenizer file")),
    (no_tokenizer, ("holds no tokenizer.json",)),
    (more_words, ("does not fit its text encoder", "expected at most")),
    (a_far_number, ("does not fit its text encoder", "got 1001")),
]


@pytest.mark.parametrize(("damage", "names"), DAMAGES)
def test_a_broken_teacher(
    mistake: Mistake, teacher: Path, damage: Callable[[Path], object], names: tuple[str, ...]
) -> None:
    damage(teacher)
    mistake.train(*FAST, f"model.teacher={teacher}", names=names)
    assert not mistake.out.exists()


@pytest.mark.parametrize(("damage", "names"), DAMAGES[:8])
def test_a_broken_model_makes_no_picture(
    mistake: Mistake, teacher: Path, damage: Callable[[Path], object], names: tuple[str, ...]
) -> None:
    damage(teacher)
    mistake.generate(str(teacher), "a circle", "--out", f"{mistake.out}.png", names=names)
    assert not Path(f"{mistake.out}.png").exists()


def numbers(data: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where a JSON value holds numbers."""
    if isinstance(data, dict):
        return [p for k, v in data.items() for p in numbers(v, (*path, k))]
    if isinstance(data, list):
        return [p for i, v in enumerate(data) for p in numbers(v, (*path, i))]
    return [path] if isinstance(data, int | float) and not isinstance(data, bool) else []


def test_a_model_folder_of_impossible_sizes_is_refused_or_loads(teacher: Path) -> None:
    """Every number of snoopi.json, one at a time, as 0, -1 and 7: one line, or pictures."""
    path = teacher / "snoopi.json"
    original = json.loads(path.read_text())
    refused = 0
    for place in numbers(original["model"]):
        for value in (0, -1, 7):
            changed = json.loads(json.dumps(original))
            inner = changed["model"]
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                pipeline = train.load(teacher)
            except ValueError as error:
                assert "\n" not in str(error) and str(teacher) in str(error), (place, value)
                refused += 1
                continue
            with contextlib.suppress(ValueError):  # a schedule can be mad and a spec whole
                pipeline("a red circle", steps=2)
    assert refused > 60


def test_a_half_precision_teacher_is_trained_from_in_fp32(teacher: Path, tmp_path: Path) -> None:
    def halve(state: dict[str, torch.Tensor]) -> None:
        state.update({name: value.bfloat16() for name, value in state.items()})

    change_weights(teacher, halve)
    words = [*FAST, "run.steps=1", "evaluate.prompts=0", f"model.teacher={teacher}"]
    assert train.main([*words, "--out", str(tmp_path / "out")]) == 0
    saved = load_file(tmp_path / "out" / "model" / "backbone.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


# --- run states and the run's folder --------------------------------------------------------------


@pytest.fixture
def finished(reference: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, with its teacher beside it."""
    os.symlink(reference.parent / "debug_teacher", tmp_path / "debug_teacher")
    return Path(shutil.copytree(reference, tmp_path / "out"))


def last_state(out: Path) -> Path:
    return out / "state" / "step-00000006"


def cut(state: Path) -> None:
    os.truncate(state / "__0_0.distcp", 1000)


def lose(state: Path) -> None:
    (state / ".metadata").unlink()


def foreign(state: Path) -> None:
    shutil.rmtree(state)
    state.mkdir()
    (state / "notes.txt").write_text("mine")


def malformed(state: Path) -> None:
    (state / "manifest.json").write_text('{"format": "snoopi run state", "version": 1}')


def renamed(state: Path) -> None:
    shutil.rmtree(state)
    shutil.copytree(state.with_name("step-00000004"), state)


@pytest.mark.parametrize("damage", [cut, lose, foreign, malformed, renamed])
def test_a_damaged_state_is_said_and_the_one_before_it_taken(
    damage: Callable[[Path], None],
    finished: Path,
    reference: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(last_state(finished))
    words = [*FAST, "evaluate.prompts=0", "--out", str(finished), "--resume"]
    assert train.main(words) == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "step-00000006" in said
    assert "resumed after step 4" in said
    assert rows(finished) == rows(reference)


def test_no_whole_state_is_an_error(
    finished: Path, capsys: pytest.CaptureFixture[str], reference: Path
) -> None:
    for state in (finished / "state").iterdir():
        cut(state)
    assert train.main([*FAST, "--out", str(finished), "--resume"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "no whole run state" in last and "__0_0.distcp has 1000 of" in last
    assert rows(finished) == rows(reference)


def edit(out: Path, old: str, new: str) -> None:
    text = (out / "config.toml").read_text()
    assert text.count(old) == 1
    (out / "config.toml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "words", "names"),
    [
        (lambda o: (o / "config.toml").unlink(), FAST, ("config.toml", "No such file")),
        (lambda o: (o / "config.toml").write_text("[run"), FAST, ("config.toml", "TOML")),
        (lambda o: (o / "config.toml").write_text("[run"), (), ("config.toml", "TOML")),
        (lambda o: (o / "config.toml").write_text("[rum]"), (), ("config.toml", "rum", "run")),
        (lambda o: None, (*FAST, "run.seed=1"), ("another recipe", "run.seed: 0 -> 1")),
        (lambda o: edit(o, "\nseed = 0", "\nseed = 1"), FAST, ("run.seed: 1 -> 0",)),
        # Without a recipe the edited one is all there is to compare with, but for the states.
        (lambda o: edit(o, "\nseed = 0", "\nseed = 1"), (), ("config.toml", "another than")),
    ],
)
def test_a_recipe_that_is_not_the_runs(
    mistake: Mistake,
    finished: Path,
    change: Callable[[Path], object],
    words: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    change(finished)
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    mistake._capsys.readouterr()
    assert train.main([*words, "--out", str(finished), "--resume"]) == 2
    lines = mistake._capsys.readouterr().err.splitlines()
    assert all(name in lines[-1] for name in names), lines
    after = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    before.pop(finished / ".lock"), after.pop(finished / ".lock")
    assert before == after


def test_what_changes_no_number_may_be_edited(finished: Path) -> None:
    edit(finished, "\nkeep = 2", "\nkeep = 3")
    assert train.main(["evaluate.prompts=0", "--out", str(finished), "--resume"]) == 0
    text = (finished / "config.toml").read_text()
    assert "\nkeep = 3" in text and "\nprompts = 0" in text  # what the run is now


def test_a_folder_with_another_run_is_left_alone(mistake: Mistake, finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    mistake.train(*FAST, names=("holds a run up to step 6", "--resume", "--out"))
    shutil.rmtree(finished / "state")
    mistake.train(*FAST, "run.seed=3", names=("before its first state", "--resume"))
    (finished / "metrics.jsonl").write_text("mine\n")
    mistake.train(*FAST, "--resume", names=("metrics.jsonl", "line 1"))
    for path, content in before.items():
        if "state" not in path.parts and path.name != "metrics.jsonl":
            assert path.read_bytes() == content


# --- prompts of one's own -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("p.txt", b"", ("p.txt", "no prompt")),
        ("p.txt", b"\n  \n\t\r\n", ("p.txt", "no prompt")),
        ("p.txt", b"a circle\na \xff star\n", ("p.txt", "not UTF-8", "line 2")),
        ("p.jsonl", b"\n\n", ("p.jsonl", "no prompt")),
        ("p.jsonl", b'{"prompt": "a circle"}\n{"prompt": 3}\n', ("p.jsonl, line 2", "3")),
        ("p.jsonl", b'{"prompt": "a circle"}\n\nnothing\n', ("p.jsonl, line 3", "nothing")),
        ("p.jsonl", b'{"prompt": " "}\n', ("p.jsonl, line 1",)),
        ("p.jsonl", b'["a"]\n', ("p.jsonl, line 1",)),
        ("p.csv", b"a circle\n", (".txt or .jsonl", "p.csv")),
        ("", b"", ("p.txt", "No such file")),
    ],
)
def test_prompt_files_that_cannot_be(
    mistake: Mistake, tmp_path: Path, name: str, content: bytes, names: tuple[str, ...]
) -> None:
    path = tmp_path / (name or "p.txt")
    if name:
        path.write_bytes(content)
    mistake.train(*FAST, f"data.prompts={path}", names=("data.prompts", *names))
    assert [p.name for p in tmp_path.iterdir()] == [name] * bool(name)  # no teacher either


def test_prompts_are_not_for_a_teacher(mistake: Mistake) -> None:
    mistake.train("debug_teacher", "data.prompts=x.txt", names=("data.prompts", "not read"))


def test_unknown_words_are_said_once_and_the_file_is_watched(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    dragon = '{"prompt": "a red dragon", "source": "me"}\n'
    file.write_text('{"prompt": "a red circle a red circle a red circle a red circle"}\n' + dragon)
    teacher = reference.parent / "debug_teacher" / "model"
    words = [*FAST, "run.steps=2", "evaluate.prompts=0", f"data.prompts={file}"]
    words += [f"model.teacher={teacher}", "--out", str(out)]
    assert train.main(words) == 0
    said = capsys.readouterr().err
    assert said.count("not in the vocabulary: dragon") == 1
    assert said.count("1 of its first 2 prompts: the prompt is longer than") == 1
    # Batches of 2 of 2 prompts: each step sees both, other runs see other captions.
    assert [r["step"] for r in rows(out)] == [1, 2] and rows(out) != rows(reference)[:2]
    file.write_text('{"prompt": "a red circle"}\n')
    assert train.main([*words, "--resume"]) == 2
    assert "the file of data.prompts is another than at step 2" in capsys.readouterr().err


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--seed -1", ("seed", "-1")),
        ("--seed 9223372036854775808", ("seed", "9223372036854775808")),
        ("--steps 0", ("steps", "at least 1", "0")),
        ("--steps 1001", ("steps", "1001")),
        ("--num 0", ("num", "at least 1", "0")),
        ("--num -3", ("num", "at least 1", "-3")),
        ("--size 0x0", ("size", "0x0")),
        ("--size 33x32", ("size", "multiples of 4", "33x32")),
        ("--size 32", ("--size", "HxW", "'32'")),
        ("--tile 1", ("tile", "at least 2", "1")),
        ("--vae nowhere", ("nowhere", "does not exist")),
        ("--scale nan", ("scale", "finite", "nan")),
        ("--scale inf", ("scale", "finite", "inf")),
        ("--guidance cfg --scale nan", ("scale", "finite", "nan")),
    ],
)
def test_pictures_that_cannot_be(
    mistake: Mistake, reference: Path, words: str, names: tuple[str, ...]
) -> None:
    out = f"{mistake.out}.png"
    model = str(reference / "model")
    mistake.generate(model, "a red circle", *words.split(), "--out", out, names=names)
    assert not Path(out).exists()


def test_where_pictures_cannot_go(mistake: Mistake, reference: Path, tmp_path: Path) -> None:
    model = str(reference / "model")
    mistake.generate(model, "a", "--out", "picture.jpg", names=("--out", ".png"))
    (tmp_path / "folder.png").mkdir()
    where = str(tmp_path / "folder.png")
    mistake.generate(model, "a", "--out", where, names=("--out", "folder.png"))
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "x.png")
    mistake.generate(model, "a", "--out", where, names=("x.png", "File exists"))
    assert generate.main([model, "", "--out", str(tmp_path / "new" / "x.png")]) == 0
    assert (tmp_path / "new" / "x.png").is_file()


def test_a_mistake_as_a_user_makes_it(warm: Warm, tmp_path: Path) -> None:
    """The real commands: exit status 2, and the same one line."""
    done = warm.run("train", "debgu", cwd=tmp_path, status=2)
    assert_one_line(done.stderr, "snoopi.train: ", "nearest is debug")
    done = warm.run("generate", "nowhere", "a", "--out", "x.png", cwd=tmp_path, status=2)
    assert_one_line(done.stderr, "snoopi.generate: ", "nowhere", "does not exist")
    done = warm.run("generate", "nowhere", "--num", "x", cwd=tmp_path, status=2)
    assert_one_line(done.stderr, "snoopi.generate: ", "--num", "'x'")
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("ours")  # an OSError, but not of a disk

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(ConnectionResetError):
        train.main(["debug", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(train, "run", lambda *_, **__: {}["ours"])
    with pytest.raises(KeyError):
        train.main(["debug", "--out", str(tmp_path / "out")])
