"""Text to token ids with the `tokenizers` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

FILE = "tokenizer.json"


class Tokenizer:
    """Prompts to fixed-length ids: bos, words, eos, padding. Longer prompts are cut before eos."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        if not tokenizer.padding or not tokenizer.truncation:
            raise ValueError(f"{FILE} must hold its padding and truncation (a fixed length)")
        self.tokenizer = tokenizer
        self.max_length: int = tokenizer.truncation["max_length"]

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids int64 [b n] and mask bool [b n], True = a token of the prompt (bos and eos too)."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the tokenizer takes a list of strings, got {texts!r}")
        rows = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.bool)
        return ids.view(len(rows), self.max_length), mask.view(len(rows), self.max_length)

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the vocabulary lacks (they all become one unknown token)."""
        row = self.tokenizer.encode(text)
        unk = self.tokenizer.token_to_id("<unk>")
        return [text[a:b] for i, (a, b) in zip(row.ids, row.offsets, strict=True) if i == unk]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into an existing folder."""
        (folder / FILE).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json of a model folder; ValueError if it is missing or not one."""
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {FILE}")
        text = path.read_bytes()
        try:
            return cls(HFTokenizer.from_str(text.decode()))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error

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
        hf.normalizer = Lowercase()
        hf.pre_tokenizer = Whitespace()
        hf.post_processor = TemplateProcessing(
            single="<bos> $A <eos>",
            special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
        )
        hf.enable_truncation(max_length)
        hf.enable_padding(length=max_length, pad_id=0, pad_token="<pad>")
        return cls(hf)
