"""The cache of text embeddings: equal to encoding, small, resumable, and nobody else's."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from snoopi import config as recipes
from snoopi import distiller as distillers
from snoopi import textcache, zoo
from snoopi.conditioning import Conditioning
from snoopi.data import main
from snoopi.models.clip import CLIPTextConfig
from snoopi.pipeline import Pipeline, load
from snoopi.textcache import Identity, TextCache
from snoopi.tokenize import Tokenizer
from snoopi.worlds.shapes import ShapesWorld
from snoopi.zoo import TextSpec

BATCH, SHARD = 4, 6
PROMPTS = [f"{how} {what}" for what in ("circle", "red star", "?") for how in ("a", "big", "blue")]
PROMPTS += ["two words", "a small green square left of a red circle"]
NEGATIVES = ["red", "a blue circle", "big"]


def _clip(width: int, **more: Any) -> TextSpec:
    sizes = {"width": width, "mlp_width": 2 * width, "layers": 2, "heads": 2}
    return TextSpec(CLIPTextConfig(**sizes, projection=more.pop("projection", None)), **more)


def _texts_of(kind: str) -> tuple[zoo.ModelSpec, list[Tokenizer]]:
    """Stable Diffusion's text, SDXL's two texts with a pooled one and sizes, PixArt's T5."""
    if kind == "sd":
        return dataclasses.replace(zoo.model("sd15"), text=(_clip(16),)), [Tokenizer.clip(49407)]
    if kind == "sdxl":
        second = _clip(24, projection=20, output="penultimate", pooled=True, pad_id=0)
        text = (_clip(16, output="penultimate"), second)
        tokenizers = [Tokenizer.clip(49407), Tokenizer.clip(0)]
        return dataclasses.replace(zoo.model("sdxl"), text=text), tokenizers
    spec, tokenizer = zoo.model("shapes_dit"), ShapesWorld().tokenizer()
    text = spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    return dataclasses.replace(spec, text=(dataclasses.replace(text, config=words),)), [tokenizer]


@functools.cache
def encoders(kind: str, seed: int = 0) -> Pipeline:
    """A model of text encoders alone."""
    spec, tokenizers = _texts_of(kind)
    parts = [zoo.text_part(i) for i in range(len(spec.text))]
    nets = [zoo.fresh(spec, part, seed).eval().requires_grad_(False) for part in parts]
    return Pipeline(spec, text_encoders=nets, tokenizers=tokenizers)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with model/, p.txt, n.txt and cache/ (fp32) by kind of text; not to change."""

    @functools.cache
    def make(kind: str) -> Path:
        base = tmp_path_factory.mktemp(kind)
        encoders(kind).save(base / "model")
        _write_texts(base)
        assert cache(base, "--negatives", str(base / "n.txt")) == 0
        return base

    return make


def _write_texts(base: Path) -> None:
    (base / "p.txt").write_text("\n".join(PROMPTS))
    (base / "n.txt").write_text("\n".join(NEGATIVES))


def cache(base: Path, *words: str, dtype: str = "fp32", out: str = "cache") -> int:
    sizes = ["--batch", str(BATCH), "--shard-size", str(SHARD), "--dtype", dtype]
    places = [str(base / "model"), str(base / "p.txt"), "--out", str(base / out)]
    return main(["cache", *places, *sizes, *words])


def opened(base: Path, out: str = "cache") -> TextCache:
    index = textcache.read_index(base / out)
    return TextCache(base / out, base / "model", index.identity.prompts, index.identity.negatives)


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def hidden(cond: Conditioning) -> Tensor:
    """Tokens with what nobody reads at zero."""
    return cond.tokens if cond.mask is None else cond.tokens * cond.mask[..., None]


# --- what is read is what was encoded -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equal_to_encoding(
    made: Callable[[str], Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    """Bit for bit at the same batch size: of fp32 as it is, of bf16 rounded once."""
    base, out = made(kind), tmp_path if dtype == "bf16" else made(kind) / "cache"
    if dtype == "bf16":
        assert cache(base, "--negatives", str(base / "n.txt"), dtype=dtype, out=str(out)) == 0
    read, stored = opened(base, str(out)), textcache.DTYPES[dtype]
    for name, texts, rows in [
        ("prompts", PROMPTS, [0, 1, 2, 3]),
        ("prompts", PROMPTS, [9, 2, 7, 10]),  # across shards, in another order, a padded batch
        ("negatives", NEGATIVES, [2, 0, 0, 1]),
        ("null", [""], [0]),
    ]:
        want = encoders(kind).encode([texts[row] for row in rows])
        got = read.read(name, rows)
        assert torch.equal(got.tokens, hidden(want).to(stored).float())
        assert (got.mask is None) == (want.mask is None) == (kind != "pixart")
        if want.mask is not None:
            assert got.mask is not None and torch.equal(got.mask, want.mask)
            assert 0 < int(want.mask.sum()) < want.mask.numel()
        assert (got.pooled is None) == (want.pooled is None) == (kind != "sdxl")
        if want.pooled is not None:
            assert got.pooled is not None
            assert torch.equal(got.pooled, want.pooled.to(stored).float())
        assert got.size_ids is None and (want.size_ids is not None) == (kind == "sdxl")
        if want.size_ids is not None:
            sized = encoders(kind).native(got).size_ids
            assert sized is not None and torch.equal(sized, want.size_ids)


def test_only_tokens_that_are_read_are_stored(made: Callable[[str], Path]) -> None:
    for kind in ("sd", "pixart"):
        base = made(kind)
        index = textcache.read_index(base / "cache")
        held = sum(s.tokens for n, s in index.shards.items() if n.startswith("prompts"))
        want = encoders(kind).encode(PROMPTS)
        assert held == (want.tokens.shape[:2].numel() if want.mask is None else want.mask.sum())
        assert sum(index.counts.values()) == sum(s.rows for s in index.shards.values())
        assert (index.sizes is not None) and index.sizes.length == want.tokens.shape[1]


def test_a_network_reads_a_cached_text_alike(made: Callable[[str], Path]) -> None:
    """PixArt's transformer, bit for bit, though what padding holds is another thing."""
    net = zoo.fresh("shapes_dit", "backbone", 0).eval().requires_grad_(False)
    for i, p in enumerate(net.parameters()):  # its output starts at zero
        p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 400)
    want = encoders("pixart").encode(PROMPTS[:4])
    got = opened(made("pixart")).read("prompts", range(4))
    assert not torch.equal(got.tokens, want.tokens)
    out = net(z, t, want)
    assert torch.equal(net(z, t, got), out) and out.std() > 0.01


# --- damage and mistakes --------------------------------------------------------------------------


def copied(base: Path, to: Path) -> Path:
    shutil.copytree(base, to, dirs_exist_ok=True)
    return to


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_row_is_read_without_its_shard_and_checked(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """A broken bit of the last row: the others are read, it is refused, verify finds it."""
    base = copied(made("sd"), tmp_path)
    name = "prompts-00000.safetensors"
    flip(base / "cache" / name, -1)
    read = opened(base)
    want = opened(made("sd")).read("prompts", range(SHARD - 1)).tokens
    assert torch.equal(read.read("prompts", range(SHARD - 1)).tokens, want)
    with pytest.raises(ValueError, match=rf"damaged: row {SHARD - 1} of {name} .* CRC-32"):
        read.read("prompts", [SHARD - 1])
    with pytest.raises(ValueError, match=rf"damaged: {name} does not have the SHA-256"):
        textcache.verify(base / "cache")


def test_the_pooled_text_is_checked_too(made: Callable[[str], Path], tmp_path: Path) -> None:
    base, name = copied(made("sdxl"), tmp_path), "prompts-00000.safetensors"
    with safe_open(base / "cache" / name, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors["pooled"][2, 3] += 1
    save_file(tensors, base / "cache" / name)
    read = opened(base)
    read.read("prompts", [1, 3])
    with pytest.raises(ValueError, match=rf"damaged: row 2 of {name} .* CRC-32"):
        read.read("prompts", [2])


def test_a_shard_cut_short_is_noticed_and_replaced(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    base = copied(made("pixart"), tmp_path)
    before = shards(base / "cache")
    name = "prompts-00001.safetensors"
    (base / "cache" / name).write_bytes(before[name][:-1])
    with pytest.raises(ValueError, match=rf"damaged: {name} has {len(before[name]) - 1} of"):
        opened(base)
    assert cache(base, "--negatives", str(base / "n.txt"), "--verify") == 0
    assert shards(base / "cache") == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompts": "0" * 64}, "another prompt file: expected 000000000000..., got "),
        ({"negatives": "0" * 64}, "another file of negatives: expected 000000000000..., got "),
    ],
)
def test_a_cache_of_another_file_is_not_opened(
    made: Callable[[str], Path], change: dict[str, str], expected: str
) -> None:
    base = made("sd")
    found = textcache.read_index(base / "cache").identity
    texts = {"prompts": found.prompts, "negatives": found.negatives} | change
    with pytest.raises(ValueError, match=f"holds a cache of {expected}"):
        TextCache(base / "cache", base / "model", **texts)


def test_a_cache_of_other_encoders_is_not_opened(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of other weights, and of the same weights that are read in another way."""
    base, other = made("sd"), encoders("sd", seed=1).save(tmp_path / "other")
    prompts = textcache.read_index(base / "cache").identity.prompts
    with pytest.raises(ValueError, match="holds a cache of other text encoders"):
        TextCache(base / "cache", other, prompts)
    lower = copied(base / "model", tmp_path / "lower")
    spec = lower / "snoopi.json"
    spec.write_text(spec.read_text().replace('"lower": false', '"lower": true'))
    with pytest.raises(ValueError, match="holds a cache of other text encoders"):
        TextCache(base / "cache", lower, prompts)
    (lower / "text_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*text_encoder\.safetensors: No such file"):
        TextCache(base / "cache", lower, prompts)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dtype", "bf16"], "another dtype: expected bf16, got fp32"),
        (["--shard-size", "7"], "another shard size: expected 7, got 6"),
        (["--negatives", "p.txt"], "another file of negatives"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--out", "model"], "is not empty, and holds no text cache"),
        (["--negatives", "none.txt"], "--negatives: cannot read none.txt: No such file"),
    ],
)
def test_mistakes_of_the_command_are_one_line(
    made: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    base = made("pixart")
    monkeypatch.chdir(base)
    before = shards(base / "cache"), (base / "cache" / "index.json").read_bytes()
    capsys.readouterr()
    assert cache(Path(), "--negatives", "n.txt", *words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "vocabulary" not in line]
    assert len(said) == 1 and said[0].startswith("snoopi.data: ") and expected in said[0]
    assert before == (shards(base / "cache"), (base / "cache" / "index.json").read_bytes())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "of another format"),
        ('{"format": "snoopi text cache", "version": 2}', "expected text cache version 1, got 2"),
        ('{"format": "snoopi text cache", "version": 1, "identity": {}}', "is malformed"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        textcache.read_index(tmp_path)


# --- writing --------------------------------------------------------------------------------------

IDENTITY = Identity("e" * 64, "p" * 64, "", "fp32", 3)


class Encoder:
    """Counts its calls; `broken` texts are not finite."""

    def __init__(self, broken: str = "-") -> None:
        self.calls, self.broken = 0, broken

    def __call__(self, texts: list[str]) -> Conditioning:
        self.calls += 1
        values = [float("nan") if text == self.broken else len(text) for text in texts]
        tokens = torch.tensor(values).view(-1, 1, 1) * torch.ones(1, 5, 2)
        mask = torch.arange(5) < torch.tensor([min(5, len(text)) for text in texts])[:, None]
        return Conditioning(tokens, mask)


def words(kind: str, rows: range) -> list[str]:
    return ["w" * (row % 7) for row in rows]


def test_going_on_gives_the_same_bytes(tmp_path: Path) -> None:
    """After a stop between shards and within one: the finished ones are kept, not made again."""
    counts = {"null": 1, "prompts": 11}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    every = Encoder()
    textcache.write(whole, IDENTITY, counts, words, every, batch=2)

    def stop(kind: str, rows: range) -> list[str]:
        if rows.start == 6:
            raise KeyboardInterrupt
        return words(kind, rows)

    with pytest.raises(KeyboardInterrupt):
        textcache.write(broken, IDENTITY, counts, stop, Encoder(), batch=2)
    kept = {p.name: p.stat().st_mtime_ns for p in broken.glob("*.safetensors")}
    assert len(kept) == 3 and textcache.read_index(broken).missing() == [
        "prompts-00002.safetensors",
        "prompts-00003.safetensors",
    ]
    (broken / ".prompts-00000.safetensors.partial").write_bytes(b"half, of one made since")
    (broken / ".prompts-00002.safetensors.partial").write_bytes(b"half")
    (broken / "prompts-00002.safetensors").write_bytes(b"not noted in the index")
    rest = Encoder()
    textcache.write(broken, IDENTITY, counts, words, rest, batch=2)
    assert shards(broken) == shards(whole)
    assert (broken / "index.json").read_bytes() == (whole / "index.json").read_bytes()
    assert rest.calls == 3 and every.calls == 1 + 2 * 3 + 1  # two batches a shard, the last has one
    assert {n: (broken / n).stat().st_mtime_ns for n in kept} == kept
    assert {p.name for p in broken.iterdir()} == {*shards(whole), "index.json", ".lock"}


def test_an_unfinished_cache_is_not_opened(made: Callable[[str], Path], tmp_path: Path) -> None:
    base = copied(made("sd"), tmp_path)
    folder, index = base / "cache", textcache.read_index(base / "cache")
    rest = {n: s for n, s in index.shards.items() if n != "prompts-00001.safetensors"}
    textcache._write_index(folder, dataclasses.replace(index, shards=rest))
    with pytest.raises(ValueError, match="is not finished: 1 of 4 shards are missing"):
        opened(base)


def test_negatives_may_come_later(made: Callable[[str], Path], tmp_path: Path) -> None:
    base = copied(made("pixart"), tmp_path)
    assert cache(base, out="later") == 0
    prompts = textcache.read_index(base / "later").identity.prompts
    with pytest.raises(ValueError, match="was made without --negatives"):
        TextCache(base / "later", base / "model", prompts, "0" * 64)
    assert cache(base, "--negatives", str(base / "n.txt"), out="later") == 0
    assert shards(base / "later") == shards(base / "cache")


def test_a_text_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the embedding of 'www' is not finite"):
        textcache.write(tmp_path, IDENTITY, {"null": 1, "prompts": 5}, words, Encoder("www"))
    assert set(shards(tmp_path)) == {"null-00000.safetensors", "prompts-00000.safetensors"}


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another command"):
            textcache.write(tmp_path, IDENTITY, {"null": 1, "prompts": 5}, words, Encoder())


def test_a_text_padded_at_its_start_is_refused(tmp_path: Path) -> None:
    def encode(texts: list[str]) -> Conditioning:
        return Conditioning(
            torch.ones(len(texts), 2, 1), torch.tensor([[False, True]] * len(texts))
        )

    with pytest.raises(ValueError, match="pads before the text"):
        textcache.write(tmp_path, IDENTITY, {"null": 1}, words, encode)


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, a whole tiny teacher of the shapes world, p.txt, n.txt and cache/."""
    base = tmp_path_factory.mktemp("teacher")
    spec, tokenizer = zoo.model("debug"), ShapesWorld().tokenizer()
    text = spec.text[0]
    words = text.config.for_words(tokenizer.tokenizer.get_vocab_size(), tokenizer.max_length)
    spec = dataclasses.replace(spec, text=(dataclasses.replace(text, config=words),))
    nets = [zoo.fresh(spec, part, 0).eval() for part in ("backbone", "vae", "text_encoder")]
    Pipeline(spec, nets[0], nets[1], nets[2:], [tokenizer]).save(base / "model")
    _write_texts(base)
    assert cache(base, "--negatives", str(base / "n.txt")) == 0
    return base


def distiller(base: Path, *words: str, cached: bool) -> distillers.Distiller:
    config = recipes.load(
        "debug",
        [f"run.batch={BATCH}", "model.teacher=x", f"data.prompts={base / 'p.txt'}", *words],
    )
    without = ("text_encoder",) if cached else ()
    pipeline = load(base / "model", dtype=torch.float32, without=without)
    found = opened(base) if cached else None
    return distillers.Distiller(config, torch.device("cpu"), pipeline, cache=found)


def test_steps_are_equal_without_text_encoders(teacher: Path) -> None:
    """The losses of three steps, bit for bit; the student has encoders all the same."""
    plain, cached = (distiller(teacher, cached=how) for how in (False, True))
    assert cached.teacher.text_encoders == [None] and bool(plain.null.tokens.any())
    for step in range(3):
        one, two = plain.step(step), cached.step(step)
        assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in two.items()}
    whole, again = plain.pipeline(), cached.pipeline()
    assert whole is not None and again is not None
    one, two = (found.text_encoders[0].state_dict() for found in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("null", ["encoded", "zeros"])
def test_the_null_text_is_of_the_kind_asked_for(teacher: Path, null: str) -> None:
    nulls = [distiller(teacher, f"data.null={null}", cached=how).null for how in (False, True)]
    assert torch.equal(nulls[0].tokens, nulls[1].tokens)
    assert bool(nulls[1].tokens.any()) == (null == "encoded")


def test_each_sample_has_its_negative(teacher: Path) -> None:
    """In a part of a step, encoded or cached; none without a file of them."""
    words = [f"data.negatives={teacher / 'n.txt'}"]
    plain, cached = (distiller(teacher, *words, cached=how) for how in (False, True))
    one, two = (found._part(1, range(BATCH)) for found in (plain, cached))
    assert plain.negatives is not None and one.negative is not None and two.negative is not None
    texts = plain.negatives.batch(1, range(BATCH))
    assert len(set(texts)) > 1 and set(texts) <= set(NEGATIVES)
    assert torch.equal(one.negative.tokens, plain.teacher.encode(texts).tokens)
    assert torch.equal(one.negative.tokens, two.negative.tokens)
    assert torch.equal(one.cond.tokens, two.cond.tokens) and one.prompts == two.prompts
    assert f"negatives = {plain._negatives(0, range(BATCH))}" in plain.describe(0)
    assert distiller(teacher, cached=False)._part(1, range(BATCH)).negative is None


def test_cached_texts_have_size_ids(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a native picture, where a network reads any: the cache holds none."""
    ids = torch.tensor([[8, 8, 0, 0, 8, 8]])
    found = distiller(teacher, f"data.negatives={teacher / 'n.txt'}", cached=True)
    monkeypatch.setattr(Pipeline, "native", lambda _, cond: dataclasses.replace(cond, size_ids=ids))
    part = found._part(0, range(BATCH))
    assert part.negative is not None
    assert part.cond.size_ids is ids and part.negative.size_ids is ids


def test_a_cache_needs_its_file_of_prompts() -> None:
    with pytest.raises(recipes.ConfigError, match=r"data\.cache: expected data\.prompts beside it"):
        recipes.load("debug", ["data.cache=x"])
