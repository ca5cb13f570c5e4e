"""Tokenizers against transformers', open_clip's and sentencepiece's: ids equal on random texts."""

from __future__ import annotations

import ast
import importlib.util
import io
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from snoopi.tokenize import Tokenizer, clean, clip_vocabulary
from snoopi.tokenize import _sentencepiece as read_pieces
from tests.parity import oracle

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::snoopi.tokenize.PromptCut"),
]
FUZZ = [2_000, pytest.param(20_000, marks=pytest.mark.slow)]
TRICKY = [
    "",
    " ",
    "\t\n  \r",
    "a photo of a cat",
    "A PHOTO, of: a (cat:1.3) -- 8k!!!",
    "don't can't it's we'll I'M they'RE x'd 's '' '",
    "2024 3.14 ½ ² ٣ Ⅷ ①",
    "café cafe\u0301 naïve Ångström \u212b",
    "straße ŒUVRE ﬁne ﬂat ĳ Ǆ ŉ",
    "ΣΊΣΥΦΟΣ ς Σ",
    "İstanbul \u0131I \u017fs '\u017f",
    "東京 タワー カ\u3099 ｶﾞ 한국어 ᄒ\u1161\u11ab",
    "שלום مرحبا हिन्दी ไทย",
    "🙂🦩👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈 👍🏽",
    "zero\u200bwidth\u200djoin \ufeffbom soft\u00adhyphen",
    "no\u00a0break\u2003em\u3000wide\u2028line\u2029para\x85next",
    "\x00\x01\x1f\x7f\x80",
    "“curly” \u2018quotes\u2019 — dash… «guillemets»",
    "<|endoftext|>",
    "a<|endoftext|>b <|startoftext|> <|ENDOFTEXT|>",
    "<|endoftext|><|endoftext|>!!!",
    "<start_of_text> <end_of_text> <pad> </s> <unk> <extra_id_0>",
    "&lt;b&gt; &amp;amp; &eacute; &#39; &#x1F642;",
    "http://example.com/?q=a&b=c user@example.com #tag @handle",
    "snake_case CamelCase kebab-case a/b\\c a+b=c ~`^|{}[]",
    "supercalifragilisticexpialidocious" * 3,
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "word " * 300,
    "!" * 500,
    "ab" * 2000,
]
_RANGES = [
    (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x180), (0x180, 0x250), (0x2B0, 0x370), (0x370, 0x400),
    (0x400, 0x530), (0x590, 0x600), (0x600, 0x700), (0x900, 0xA00), (0xE00, 0xE80),
    (0x1E00, 0x2000), (0x2000, 0x2070), (0x20A0, 0x2600), (0x3000, 0x3100), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF00, 0xFFF0), (0x1F300, 0x1FA00),
    (0x0, 0x20), (0x1D400, 0x1D800),
]  # fmt: skip
_GLUE = [" ", " ", " ", " ", "", "", "  ", "\n", "\t", ", ", ". ", "-", "'", "'s ", "\u00a0"]


def words() -> list[str]:
    """The vocabulary's whole words, common ones first."""
    return [token[:-4] for token in clip_vocabulary()[0] if token.endswith("</w>")]


def fuzz(count: int, seed: int = 0) -> list[str]:
    """Random texts: common and rare words, numbers, runs of characters of all scripts."""
    rng = random.Random(seed)
    common = [word for word in words() if word.isascii() and word.isalpha()]

    def part() -> str:
        kind = rng.random()
        if kind < 0.5:
            word = rng.choice(common[: 10 ** rng.randint(2, 4)])
            return rng.choice((str, str, str.upper, str.title))(word)
        if kind < 0.6:
            return str(rng.randint(0, 10 ** rng.randint(1, 6)))
        low, high = rng.choice(_RANGES)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 4)))

    def text() -> str:
        return "".join(part() + rng.choice(_GLUE) for _ in range(rng.randint(1, 20)))

    return [text() for _ in range(count)]


def captions(count: int, seed: int = 1) -> list[str]:
    """Random plain captions."""
    rng = random.Random(seed)
    common = [word for word in words() if word.isascii() and word.isalpha()][:4000]

    def text() -> str:
        chosen = [rng.choice(common) for _ in range(rng.randint(3, 14))]
        mark = rng.choice(["", ".", "!", ", 8k, detailed", " (1920x1080)"])
        return " ".join(chosen).capitalize() + mark

    return [text() for _ in range(count)]


def same(
    texts: Iterable[str], ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]]
) -> None:
    """Assert equal ids of every text; the message shows the first that differ."""
    wrong = [(text, got, want) for text in texts if (got := ours(text)) != (want := theirs(text))]
    assert not wrong, f"{len(wrong)} texts differ; the first: {wrong[:3]}"


def ours(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer([text])[0][0].tolist()


# --- CLIP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_clip() -> Any:
    vocabulary, merges = clip_vocabulary()
    return oracle.package("transformers").CLIPTokenizer(vocab=vocabulary, merges=merges)


def their_ids(tokenizer: Any, length: int, **more: Any) -> Callable[[str], list[int]]:
    def ids(text: str) -> list[int]:
        return tokenizer(
            text, padding="max_length", max_length=length, truncation=True, **more
        ).input_ids

    return ids


@pytest.mark.parametrize("count", FUZZ)
def test_clip_equals_transformers(count: int, their_clip: Any) -> None:
    texts = [*TRICKY, *captions(count // 4), *fuzz(count)]
    same(texts, ours(Tokenizer.clip(49407)), their_ids(their_clip, 77))


@pytest.mark.parametrize("length", [77, 16, 3, 2])
def test_clip_masks_and_padding_equal_transformers(length: int, their_clip: Any) -> None:
    texts = [*TRICKY, *captions(50)]
    tokenizer = Tokenizer.clip(0, length)
    their_clip.pad_token = "!"
    try:
        want = their_clip(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
    finally:
        their_clip.pad_token = "<|endoftext|>"
    ids, mask = tokenizer(texts)
    assert torch.equal(ids, want.input_ids)
    assert torch.equal(mask, want.attention_mask.bool())


def test_clip_from_the_files_transformers_saves(their_clip: Any, tmp_path: Path) -> None:
    """tokenizer.json with tokenizer_config.json, as new checkpoints have them."""
    their_clip.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, 77)
    assert tokenizer.pad_id == 49407
    same([*TRICKY, *fuzz(300, seed=2)], ours(tokenizer), their_ids(their_clip, 77))
    assert torch.equal(tokenizer(TRICKY)[0], Tokenizer.clip(49407)(TRICKY)[0])


def test_the_lost_words_are_those_past_the_length(their_clip: Any) -> None:
    """What we say is cut, tokenized again, is what transformers cuts."""
    tokenizer, cut = Tokenizer.clip(49407, 12), 0
    for text in captions(200, seed=3):
        whole = their_clip(text, add_special_tokens=False).input_ids
        line = tokenizer.cut(text)
        assert (line is None) == (len(whole) <= 10)
        if line is not None and not line.endswith("...')"):
            found = re.search(r"\((\d+) tokens?: (.*)\)$", line)
            assert found is not None and int(found[1]) == len(whole) - 10
            again = their_clip(ast.literal_eval(found[2]), add_special_tokens=False).input_ids
            assert again == whole[10:]
            cut += 1
    assert cut > 50


def load_open_clip() -> ModuleType:
    """open_clip's tokenizer.py by its file: importing the package needs torchvision."""
    for need in ("ftfy", "regex"):
        pytest.importorskip(need)
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("open_clip is not installed")
    path = Path(spec.origin).with_name("tokenizer.py")
    found = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def plain(text: str, fix: Callable[[str], str]) -> bool:
    """Whether open_clip's repair (ftfy) leaves a text alone, and both read its characters alike.

    open_clip's regular expression ignores case: the long s matches s, the Kelvin sign k, the iota
    below a letter. Of characters without a category in this Python, each knows its own.
    """
    folded = set(text) & set("\u017f\u212a\u0345")
    return fix(text) == text and not folded and "Cn" not in map(unicodedata.category, text)


@pytest.mark.parametrize("count", FUZZ)
def test_clip_with_cleaning_equals_open_clip(count: int) -> None:
    module = load_open_clip()
    fix = pytest.importorskip("ftfy").fix_text
    theirs, tokenizer = module.SimpleTokenizer(), Tokenizer.clip(0)
    texts = [
        t for t in [*TRICKY, *fuzz(count)] if plain(t, fix) and "|>" not in t and "_of" not in t
    ]
    assert len(texts) > count / 4
    same(
        [*captions(count), "caf&eacute; &amp;amp; more", *texts],
        lambda text: tokenizer([clean(text)])[0][0].tolist(),
        lambda text: theirs([text])[0].tolist(),
    )


# --- T5 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spiece.model like T5's: its special pieces, its normaliser, 1,500 pieces."""
    trainer = oracle.package("sentencepiece").SentencePieceTrainer
    file = io.BytesIO()
    trainer.train(
        sentence_iterator=iter([*captions(3000, seed=4), *fuzz(300, seed=5)]),
        model_writer=file,
        model_type="unigram",
        vocab_size=1500,
        hard_vocab_limit=False,
        character_coverage=0.995,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("t5")
    (folder / "spiece.model").write_bytes(file.getvalue())
    return folder


@pytest.fixture(scope="module")
def processor(spiece: Path) -> Any:
    package = oracle.package("sentencepiece")
    return package.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))


def their_t5(spiece: Path) -> Any:
    """transformers' tokenizer from the same pieces (its own reader needs protobuf)."""
    pieces, charsmap = read_pieces(spiece / "spiece.model")
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    kind = oracle.package("transformers").T5Tokenizer
    return kind(vocab=[*pieces, *extra], _spm_precompiled_charsmap=charsmap)


def test_pieces_equal_sentencepieces(spiece: Path, processor: Any) -> None:
    pieces, charsmap = read_pieces(spiece / "spiece.model")
    count = processor.get_piece_size()
    assert pieces == [(processor.id_to_piece(i), processor.get_score(i)) for i in range(count)]
    assert len(charsmap) > 100_000


@pytest.mark.parametrize("count", FUZZ)
def test_t5_equals_transformers(count: int, spiece: Path) -> None:
    theirs, tokenizer = their_t5(spiece), Tokenizer.from_folder(spiece, 120)
    texts = [*TRICKY, *captions(count // 4), *fuzz(count)]
    same(texts, ours(tokenizer), their_ids(theirs, 120))
    ids, mask = tokenizer(TRICKY)
    want = theirs(TRICKY, padding="max_length", max_length=120, truncation=True)
    assert ids.tolist() == want.input_ids
    assert mask.long().tolist() == want.attention_mask


@pytest.mark.parametrize("count", FUZZ)
def test_t5_equals_sentencepiece(count: int, spiece: Path, processor: Any) -> None:
    """But for what combines (marks, halfwidth letters), U+0085, and the names of special pieces."""
    tokenizer = Tokenizer.from_folder(spiece, 1000)

    def plain(text: str) -> bool:
        marks = any(unicodedata.category(c)[0] == "M" or "\uff9e" <= c <= "\uffdc" for c in text)
        return not marks and "\x85" not in text and "</s>" not in text and len(text) < 900

    def got(text: str) -> list[int]:
        ids, mask = tokenizer([text])
        return ids[0][mask[0]].tolist()

    texts = [t for t in [*TRICKY, *fuzz(count)] if plain(t)]
    assert len(texts) > count / 4
    same([*captions(count), *texts], got, lambda text: [*processor.encode(text), 1])


def test_t5_from_the_files_transformers_saves(spiece: Path, tmp_path: Path) -> None:
    theirs = their_t5(spiece)
    theirs.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, 120)
    assert tokenizer.pad_id == 0
    same([*TRICKY, *fuzz(300, seed=6)], ours(tokenizer), their_ids(theirs, 120))
