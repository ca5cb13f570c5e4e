"""Text to token ids with the `tokenizers` package alone: words, CLIP's BPE, T5's unigrams."""

from __future__ import annotations

import gzip
import html
import json
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from torch import Tensor

FILE = "tokenizer.json"
_LONGEST = 100_000  # tokens; more is a broken file
_VOCABULARY = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48_894  # lines 1 to this of that file; the rest was never used
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PromptCut(UserWarning):
    """A prompt is longer than the tokenizer's length: its end is not read."""


class Tokenizer:
    """Prompts to fixed-length ids: bos, words, eos, padding. Longer prompts are cut before eos."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        if not tokenizer.padding or not tokenizer.truncation:
            raise ValueError(f"{FILE} must hold its padding and truncation (a fixed length)")
        self.tokenizer = tokenizer
        self.max_length: int = tokenizer.truncation["max_length"]
        padding, least = tokenizer.padding, _least(tokenizer)
        if padding["length"] != self.max_length or not least <= self.max_length <= _LONGEST:
            raise ValueError(
                f"{FILE} must pad and cut to one length from {least} to {_LONGEST}, got "
                f"{padding['length']} and {self.max_length}"
            )
        if tokenizer.id_to_token(padding["pad_id"]) is None:
            raise ValueError(f"{FILE}: the padding id {padding['pad_id']} is not in its vocabulary")
        _try_out(tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids int64 [b n] and mask bool [b n], True = a token of the prompt (bos and eos too).

        Warns once (PromptCut) if prompts are longer than `max_length`, with what is lost.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the tokenizer takes a list of strings, got {texts!r}")
        rows = self.tokenizer.encode_batch(list(texts))
        cut = {text: row for text, row in zip(texts, rows, strict=True) if row.overflowing}
        if cut:
            line = _cut_line(*next(iter(cut.items())), self.max_length)
            more = f" (and {len(cut) - 1} more of these prompts)" if len(cut) > 1 else ""
            warnings.warn(line + more, PromptCut, stacklevel=2)
        ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.bool)
        return ids.view(len(rows), self.max_length), mask.view(len(rows), self.max_length)

    @property
    def pad_id(self) -> int:
        """The id that fills short prompts."""
        assert self.tokenizer.padding is not None  # asked for at construction
        return self.tokenizer.padding["pad_id"]

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the vocabulary lacks (they all become one unknown token)."""
        unk = self.tokenizer.token_to_id("<unk>")
        if unk is None:
            return []
        row = self.tokenizer.encode(text)
        return [text[a:b] for i, (a, b) in zip(row.ids, row.offsets, strict=True) if i == unk]

    def cut(self, text: str) -> str | None:
        """The line that says what a prompt loses for its length; None if it fits."""
        row = self.tokenizer.encode(text)
        return _cut_line(text, row, self.max_length) if row.overflowing else None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into an existing folder."""
        (folder / FILE).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json of a model folder; ValueError if it is missing or not one."""
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {FILE}")
        return cls(_parse(path))

    @classmethod
    def words(cls, vocabulary: Sequence[str], max_length: int) -> Tokenizer:
        """A word-level tokenizer: <pad> 0, <unk> 1, <bos> 2, the words, and <eos> last.

        <eos> has the largest id, as in CLIP, so that the same eos rule finds it.
        """
        names = ["<pad>", "<unk>", "<bos>", *vocabulary, "<eos>"]
        ids = {name: i for i, name in enumerate(names)}
        if len(ids) != len(names):
            raise ValueError("the vocabulary holds a word twice")
        hf = HFTokenizer(WordLevel(ids, unk_token="<unk>"))
        hf.normalizer = normalizers.Lowercase()
        hf.pre_tokenizer = pre_tokenizers.Whitespace()
        hf.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>",
            special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
        )
        return cls(_fixed(hf, max_length, 0))

    @classmethod
    def clip(cls, pad_id: int, length: int = 77) -> Tokenizer:
        """CLIP's tokenizer from the vocabulary that comes with the package.

        Equal to Hugging Face's. pad_id: 49407 (eos) for OpenAI's towers, 0 for OpenCLIP's.
        """
        return cls(_fixed(_clip(*clip_vocabulary()), length, pad_id))

    @classmethod
    def from_folder(cls, folder: Path, length: int, pad_id: int | None = None) -> Tokenizer:
        """A checkpoint's tokenizer folder: spiece.model, vocab.json with merges.txt, or
        tokenizer.json.

        length: of the ids. pad_id: None takes the padding token of special_tokens_map.json, then
        of tokenizer_config.json (SD2.1's two files disagree, and the first is right).
        Raises ValueError for a folder or file that is none of these.
        """
        folder = Path(folder)
        if (folder / "spiece.model").is_file():
            hf = _t5(folder / "spiece.model")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            hf = _clip(*_clip_files(folder))
        elif (folder / FILE).is_file():
            hf = _parse(folder / FILE)
        else:
            raise ValueError(
                f"{folder} holds no tokenizer: expected spiece.model, vocab.json with merges.txt, "
                f"or {FILE}"
            )
        if pad_id is None:
            pad_id = _padding(folder, hf)
        if hf.id_to_token(pad_id) is None:
            raise ValueError(f"{folder}: the padding id {pad_id} is not in its vocabulary")
        return cls(_fixed(hf, length, pad_id))


def clean(text: str) -> str:
    """open_clip's cleaning of captions (CLIP score, HPSv2): HTML entities, white space, case.

    Without its repair of wrongly decoded text (the ftfy package), which plain captions never need.
    """
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _fixed(hf: HFTokenizer, length: int, pad_id: int) -> HFTokenizer:
    least = _least(hf)
    if not least <= length <= _LONGEST:
        raise ValueError(f"a tokenizer's length must be from {least} to {_LONGEST}, got {length}")
    hf.enable_truncation(length)
    hf.enable_padding(length=length, pad_id=pad_id, pad_token=hf.id_to_token(pad_id))
    return hf


def _try_out(hf: HFTokenizer) -> None:
    """ValueError for a tokenizer whose parts do not fit: it would fail at the first prompt."""
    try:
        hf.encode("a \u2603 " * 200)  # words, perhaps an unknown one, a cut
    except BaseException as error:  # the tokenizers package raises bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{FILE} cannot be used: {error}") from error


def _least(hf: HFTokenizer) -> int:
    """The shortest length: bos and eos are never cut."""
    return max(1, hf.num_special_tokens_to_add(False))


def _cut_line(text: str, row: Any, length: int) -> str:
    """What a prompt of more tokens than `length` loses."""
    lost = [
        start
        for part in row.overflowing
        for (start, _), read, special in zip(
            part.offsets, part.attention_mask, part.special_tokens_mask, strict=True
        )
        if read and not special
    ]
    words = " ".join(text[min(lost) :].split())
    words = words if len(words) <= 60 else words[:57] + "..."
    count = f"{len(lost)} token" + "s" * (len(lost) != 1)
    return f"the prompt is longer than {length} tokens: its end is not read ({count}: {words!r})"


def _parse(path: Path) -> HFTokenizer:
    text = path.read_bytes()
    try:
        return HFTokenizer.from_str(text.decode())
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error


def _padding(folder: Path, hf: HFTokenizer) -> int:
    """The id of the padding token that the folder's files name."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        token = _json(path).get("pad_token") if path.is_file() else None
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found = hf.token_to_id(token)
            if found is None:
                raise ValueError(f"{path}: the pad_token {token!r} is not in the vocabulary")
            return found
    for token in ("<pad>", _EOS):
        if (found := hf.token_to_id(token)) is not None:
            return found
    raise ValueError(f"{folder} names no padding token")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object, got {type(data).__name__}")
    return data


# --- CLIP -----------------------------------------------------------------------------------------


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids (49,408), and its merges (48,894)."""
    lines = gzip.decompress(_VOCABULARY.read_bytes()).decode().splitlines()[1 : _MERGES + 1]
    merges = [_pair(line) for line in lines]
    letters = _letters()
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges)]
    return {token: i for i, token in enumerate([*tokens, _BOS, _EOS])}, merges


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second


def _letters() -> list[str]:
    """The characters that stand for the 256 bytes: themselves where printable, else from 256 on."""
    ranges = ((ord("!"), ord("~")), (ord("¡"), ord("¬")), (ord("®"), ord("ÿ")))
    printable = [chr(i) for low, high in ranges for i in range(low, high + 1)]
    return [*printable, *(chr(256 + i) for i in range(256 - len(printable)))]


def _clip_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """vocab.json and merges.txt, checked against each other."""
    vocabulary = _json(folder / "vocab.json")
    if not all(type(i) is int for i in vocabulary.values()):
        raise ValueError(f"{folder / 'vocab.json'} must map tokens to ids")
    if set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError(f"{folder / 'vocab.json'} must number its {len(vocabulary)} tokens from 0")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    except ValueError as error:
        raise ValueError(f"{folder / 'merges.txt'} must hold pairs of tokens: {error}") from error
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"{folder}: merges.txt has {merge}, which vocab.json lacks")
    if lost := [token for token in (_BOS, _EOS) if token not in vocabulary]:
        raise ValueError(f"{folder / 'vocab.json'} lacks {' and '.join(lost)}")
    return vocabulary, merges


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> HFTokenizer:
    hf = HFTokenizer(
        BPE(
            vocabulary,
            merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=_EOS,
        )
    )
    hf.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    eos, bos = (_EOS, vocabulary[_EOS]), (_BOS, vocabulary[_BOS])
    hf.post_processor = processors.RobertaProcessing(
        eos, bos, trim_offsets=False, add_prefix_space=False
    )
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([_BOS, _EOS])
    return hf


# --- T5 -------------------------------------------------------------------------------------------

_EXTRA = 100  # <extra_id_99> to <extra_id_0> follow the pieces


def _t5(path: Path) -> HFTokenizer:
    """T5's tokenizer from sentencepiece's spiece.model."""
    pieces, charsmap = _sentencepiece(path)
    names = [piece for piece, _ in pieces]
    if names[:3] != ["<pad>", "</s>", "<unk>"]:
        raise ValueError(f"{path} must begin with <pad>, </s>, <unk> as T5's does: {names[:3]}")
    extra = [f"<extra_id_{i}>" for i in reversed(range(_EXTRA))]
    hf = HFTokenizer(
        Unigram([*pieces, *((name, 0.0) for name in extra)], unk_id=2, byte_fallback=False)
    )
    if charsmap:
        try:
            hf.normalizer = normalizers.Precompiled(charsmap)
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ValueError(f"{path}: its normalisation table is broken: {error}") from error
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    hf.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    hf.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    hf.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3] + extra])
    return hf


def _sentencepiece(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """The pieces with their scores, and the normalisation table, of a sentencepiece model.

    A protobuf message: field 1 repeated {1: text, 2: score}, field 3 {2: charsmap}.
    """
    pieces, charsmap, last = [], b"", 0
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))
                pieces.append((piece[1].decode(), score))
            elif number == 3 and isinstance(value, bytes):
                charsmap = dict(_fields(value)).get(2, b"")
            last = max(last, number)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is not a whole sentencepiece model: {error!r}") from error
    if not pieces:
        raise ValueError(f"{path} is not a sentencepiece model: it holds no piece")
    if last < 3:  # cut between two fields
        raise ValueError(f"{path} is not a whole sentencepiece model: it holds no normaliser")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message: ints, or bytes of strings and floats."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {place}")
        if place + size > len(data):
            raise ValueError(f"it ends at byte {len(data)}, a field goes to {place + size}")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for i in range(10):
        if place + i >= len(data):
            raise ValueError(f"it ends at byte {len(data)}, inside a number")
        byte = data[place + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, place + i + 1
    raise ValueError(f"a number at byte {place} has no end")
