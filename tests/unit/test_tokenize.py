"""Tokenizers: known ids, padding, cutting, and the files that are not whole."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import snoopi.tokenize
from snoopi import generate
from snoopi.pipeline import Pipeline
from snoopi.tokenize import FILE, PromptCut, Tokenizer, clean, clip_vocabulary
from snoopi.zoo import PRESETS, TextSpec, preset

BOS, EOS = 49406, 49407
CAT = [BOS, 320, 1125, 539, 320, 2368, EOS]  # published for "a photo of a cat"


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip(pad_id=EOS)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that are text."""
    found, mask = tokenizer([text])
    return found[0][mask[0]].tolist()


# --- CLIP -----------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_published_one() -> None:
    path = Path(snoopi.tokenize.__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("924691ac288e")
    vocabulary, merges = clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    assert [vocabulary[t] for t in ("!", "!</w>", "cat</w>", "<|endoftext|>")] == [
        0, 256, 2368, EOS,
    ]  # fmt: skip
    assert sorted(vocabulary.values()) == list(range(49408))


def test_clip_gives_the_published_ids(clip: Tokenizer) -> None:
    assert ids(clip, "a photo of a cat") == CAT
    assert ids(clip, "  A\tphoto of\n a   CAT ") == CAT
    assert ids(clip, "hello world") == [BOS, 3306, 1002, EOS]
    assert ids(clip, "") == [BOS, EOS]
    assert ids(clip, "2024") == [BOS, 273, 271, 273, 275, EOS]  # digit by digit
    assert ids(clip, "isn't") == [BOS, 2923, 713, EOS]
    # The marks themselves are special tokens, and weights of emphasis are text.
    assert ids(clip, "<|endoftext|>") == [BOS, EOS, EOS]
    assert ids(clip, "(cat:1.3)") == [BOS, 263, 2368, 281, 272, 269, 274, 264, EOS]


@pytest.mark.parametrize("pad", [EOS, 0])
def test_clip_pads_to_77(pad: int) -> None:
    tokenizer = Tokenizer.clip(pad)
    found, mask = tokenizer(["a photo of a cat", ""])
    assert found.shape == mask.shape == (2, 77)
    assert (found.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert found[0, :7].tolist() == CAT and found[0, 7:].unique().tolist() == [pad]
    assert mask.sum(1).tolist() == [7, 2]
    assert tokenizer.pad_id == pad


def test_pad_ids_of_the_presets_are_in_their_vocabularies() -> None:
    pads = {name: [text.pad_id for text in PRESETS[name].text] for name in PRESETS}
    assert (pads["sd15"], pads["sd21"], pads["sd21-v"], pads["sd-turbo"]) == ([EOS], [0], [0], [0])
    assert (pads["sdxl"], pads["sdxl-turbo"], pads["pixart-512"]) == ([EOS, 0], [EOS, 0], [0])


def test_a_long_prompt_keeps_eos_and_is_said(clip: Tokenizer) -> None:
    message = r"^the prompt is longer than 77 tokens: its end is not read \(2 tokens: 'red hat'\)$"
    with pytest.warns(PromptCut, match=message):
        found, mask = clip(["cat " * 75 + "red hat"])
    assert found[0].tolist() == [BOS, *[2368] * 75, EOS]
    assert mask.all()
    assert clip.cut("cat " * 75) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip(["cat " * 75, "a", ""])


def test_the_count_of_lost_tokens_is_of_tokens_not_of_characters(clip: Tokenizer) -> None:
    """One emoji may be several tokens, and the rest may be many times the length."""
    text = "🦩" * 200
    whole = len(ids(Tokenizer.clip(EOS, 2000), text)) - 2
    assert whole > 250
    line = clip.cut(text)
    assert line and f"({whole - 75} tokens: " in line
    assert len(line) < 150 and line.endswith("...')")


def test_a_call_warns_once(clip: Tokenizer) -> None:
    long = ["cat " * 76, "dog " * 76, "cat " * 76, "short"]
    with pytest.warns(PromptCut) as seen:
        clip(long)
    assert len(seen) == 1
    assert str(seen[0].message).endswith("(and 1 more of these prompts)")


def test_strings_are_asked_for(clip: Tokenizer) -> None:
    for wrong in ("a cat", [None], [3]):
        with pytest.raises(ValueError, match="takes a list of strings"):
            clip(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [-1, 0, 1, 100_001, 10**9])
def test_absurd_lengths_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length must be from 2 to 100000, got {length}"):
        Tokenizer.clip(0, length)


def test_open_clips_cleaning() -> None:
    assert clean("  A  caf&eacute;\n&amp;amp; MORE ") == "a café & more"


def test_pixart_prompts_are_lowercased_and_stripped() -> None:
    assert {name: PRESETS[name].text[0].lower for name in PRESETS} == {
        name: "pixart" in name for name in PRESETS
    }
    text = PRESETS["pixart-512"].text[0]
    assert text.prepare("  A Cat\n") == "a cat"
    assert TextSpec(text.config).prepare("  A Cat\n") == "  A Cat\n"


# --- folders --------------------------------------------------------------------------------------

SMALL = {t: i for i, t in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "!"])}
SMALL |= {"<|startoftext|>": 6, "<|endoftext|>": 7}


def clip_folder(folder: Path, vocabulary: Any = None, merges: str = "a b</w>") -> Path:
    text = json.dumps(SMALL if vocabulary is None else vocabulary)
    (folder / "vocab.json").write_text(text)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return folder


def pad_files(folder: Path, **pads: Any) -> None:
    for name, pad in pads.items():
        (folder / f"{name}.json").write_text(json.dumps({"pad_token": pad}))


def test_a_folder_of_clips_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(clip_folder(tmp_path), 6)
    assert tokenizer(["ab b"])[0].tolist() == [[6, 4, 3, 7, 7, 7]]
    assert Tokenizer.from_folder(tmp_path, 6, pad_id=1)(["ab b"])[0].tolist() == [
        [6, 4, 3, 7, 1, 1]
    ]


def test_special_tokens_map_comes_before_tokenizer_config(tmp_path: Path) -> None:
    """SD2.1's files: the padding is "!", though tokenizer_config.json says <|endoftext|>."""
    clip_folder(tmp_path)
    pad_files(tmp_path, tokenizer_config="<|endoftext|>")
    assert Tokenizer.from_folder(tmp_path, 6).pad_id == 7
    pad_files(tmp_path, special_tokens_map="!")
    assert Tokenizer.from_folder(tmp_path, 6).pad_id == 5
    pad_files(tmp_path, special_tokens_map={"content": "!", "lstrip": False})
    assert Tokenizer.from_folder(tmp_path, 6).pad_id == 5


def test_a_saved_tokenizer_is_the_same(tmp_path: Path, clip: Tokenizer) -> None:
    clip.save(tmp_path)
    texts = ["a photo of a cat", "東京 🦩 don't", "", "a, b; c!?"]
    for again in (Tokenizer.load(tmp_path), Tokenizer.from_folder(tmp_path, 77, pad_id=EOS)):
        assert torch.equal(again(texts)[0], clip(texts)[0])
        assert again.pad_id == EOS
    assert Tokenizer.from_folder(tmp_path, 12)(texts)[0].shape == (4, 12)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        (SMALL, "a b", "merges.txt has .*'a', 'b'.*which vocab.json lacks"),
        (SMALL, "a", "merges.txt must hold pairs"),
        (SMALL, "a b c", "merges.txt must hold pairs"),
        ([1], "a b</w>", "must hold an object, got list"),
        ({**SMALL, "a": "0"}, "a b</w>", "must map tokens to ids"),
        ({**SMALL, "a": 10**9}, "a b</w>", "must number its 8 tokens from 0"),
        ({**SMALL, "a": -1}, "a b</w>", "must number its 8 tokens from 0"),
        ({**SMALL, "a": 1}, "a b</w>", "must number its 8 tokens from 0"),
        ({"a": 0, "b</w>": 1, "ab</w>": 2}, "a b</w>", "lacks <|startoftext|> and <|endoftext|>"),
    ],
)
def test_clip_files_that_disagree(
    vocabulary: Any, merges: str, message: str, tmp_path: Path
) -> None:
    clip_folder(tmp_path, vocabulary, merges)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
        Tokenizer.from_folder(tmp_path, 77)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer: expected spiece.model"):
        Tokenizer.from_folder(tmp_path, 77)
    clip_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab.json with merges.txt"):
        Tokenizer.from_folder(tmp_path, 77)
    with pytest.raises(ValueError, match=f"holds no {FILE}"):
        Tokenizer.load(tmp_path)


def test_wrong_padding(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    with pytest.raises(ValueError, match="padding id 8 is not in its vocabulary"):
        Tokenizer.from_folder(tmp_path, 77, pad_id=8)
    pad_files(tmp_path, special_tokens_map="<pad>")
    with pytest.raises(ValueError, match="pad_token '<pad>' is not in the vocabulary"):
        Tokenizer.from_folder(tmp_path, 77)
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(ValueError, match=r"special_tokens_map.json is not JSON"):
        Tokenizer.from_folder(tmp_path, 77)


def change(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        data = data[parent]
    data[key] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("padding", None, "must hold its padding and truncation"),
        ("truncation", None, "must hold its padding and truncation"),
        ("truncation.max_length", 10**9, "must pad and cut to one length"),
        ("padding.strategy", {"Fixed": 10**9}, "must pad and cut to one length"),
        ("padding.strategy", "BatchLongest", "must pad and cut to one length"),
        ("padding.pad_id", 10**9, "padding id 1000000000 is not in its vocabulary"),
        ("truncation.stride", 5, "cannot be used: .*stride"),
        ("model.unk_token", "<none>", "cannot be used: .*UNK"),
        ("post_processor.single", [{"SpecialToken": {"id": "?", "type_id": 0}}], "cannot be used"),
        ("model", {"type": "BPE"}, "is not a tokenizer file"),
        ("model.vocab", [], "is not a tokenizer file"),
    ],
)
def test_a_tokenizer_json_that_does_not_fit(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    Tokenizer.words(["a", "b"], 6).save(tmp_path)
    data = json.loads((tmp_path / FILE).read_text())
    change(data, path, value)
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_a_cut_tokenizer_json(tmp_path: Path) -> None:
    Tokenizer.words(["a", "b"], 6).save(tmp_path)
    whole = (tmp_path / FILE).read_bytes().rstrip()
    for data in (whole[:-1], whole[: len(whole) // 2], b"", b"\xff\xfe\0"):
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(ValueError, match="is not a tokenizer file"):
            Tokenizer.load(tmp_path)


def test_generate_says_what_is_cut_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clip: Tokenizer
) -> None:
    """SDXL's two tokenizers cut the same words; a prompt that fits is no reason for a line."""
    pipeline = Pipeline(preset("sdxl"), tokenizers=[clip, Tokenizer.clip(0)])
    generate._warn_about_words(pipeline, ["a cat", ""])
    assert capsys.readouterr().err == ""
    generate._warn_about_words(pipeline, ["cat " * 75 + "red hat", "dog " * 76])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "snoopi.generate: the prompt is longer than 77 tokens: "
        "its end is not read (2 tokens: 'red hat')"
    )


# --- T5 -------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float, kind: int = 1) -> bytes:
    body = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
    return field(1, body + varint(3 << 3) + varint(kind))


PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁a", -2.0), ("▁cat", -2.5)]
PIECES += [(letter, -5.0) for letter in "abcdehst"]


def spiece(pieces: Sequence[tuple[str, float]] = PIECES) -> bytes:
    normaliser = field(3, field(1, b"identity"))
    trainer = field(2, varint(4 << 3) + varint(len(pieces)))
    return b"".join(piece(*each) for each in pieces) + trainer + normaliser


def t5(folder: Path, data: bytes, length: int = 8) -> Tokenizer:
    (folder / "spiece.model").write_bytes(data)
    return Tokenizer.from_folder(folder, length)


def test_t5_reads_spiece_model(tmp_path: Path) -> None:
    tokenizer = t5(tmp_path, spiece())
    names = [name for name, _ in PIECES]
    found, mask = tokenizer(["a cat", "a", "", "a z"])
    a, cat = names.index("▁a"), names.index("▁cat")
    assert found[:3].tolist() == [
        [a, cat, 1, *[0] * 5], [a, 1, *[0] * 6], [1, *[0] * 7],
    ]  # fmt: skip
    assert found[3, :4].tolist() == [a, names.index("▁"), 2, 1]
    assert mask.sum(1).tolist() == [3, 2, 1, 4]
    assert tokenizer.pad_id == 0
    assert tokenizer.tokenizer.token_to_id("<extra_id_0>") == len(PIECES) + 99
    assert tokenizer.unknown("a zebra cat") == ["z", "r"]


def test_t5_is_cut_before_eos(tmp_path: Path) -> None:
    tokenizer = t5(tmp_path, spiece(), length=120)
    with pytest.warns(PromptCut, match=r"longer than 120 tokens: .*\(2 tokens: 'cat a'\)"):
        found, mask = tokenizer(["cat " * 119 + "cat a"])
    assert found.shape == (1, 120) and mask.all()
    assert found[0, -2:].tolist() == [5, 1]


def test_every_cut_of_spiece_model_is_refused(tmp_path: Path) -> None:
    whole = spiece()
    for size in range(len(whole)):
        with pytest.raises(ValueError, match=r"is not a(?: whole)? sentencepiece model"):
            t5(tmp_path, whole[:size])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 a zip file", "is not a whole sentencepiece model"),
        (b"\xff" * 64, "a number at byte 0 has no end"),
        (varint(1 << 3 | 2) + varint(2**62) + b"abc", "a field goes to 4611686018427387"),
        (varint(1 << 3) + varint(5), "it holds no piece"),
        (field(1, varint(1 << 3) + varint(5)), "is not a whole sentencepiece model"),
        (field(1, field(2, b"abcd")), "is not a whole sentencepiece model"),
        (field(1, field(1, b"\xff")), "is not a whole sentencepiece model"),
        (spiece([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]), "must begin with <pad>, </s>"),
        (spiece() + field(3, field(2, b"abc")), "its normalisation table is broken"),
    ],
)
def test_foreign_spiece_models(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        t5(tmp_path, data)
    assert "spiece.model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_t5_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = t5(tmp_path, spiece())
    tokenizer.save(tmp_path)
    (tmp_path / "spiece.model").unlink()
    texts = ["a cat", "the  b", "", "</s> a"]
    for again in (Tokenizer.load(tmp_path), Tokenizer.from_folder(tmp_path, 8)):
        assert all(map(torch.equal, again(texts), tokenizer(texts)))
