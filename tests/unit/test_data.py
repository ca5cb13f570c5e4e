"""Prompts of one's own: read right, in an order that seed and epoch alone decide."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from snoopi.data import PromptList
from snoopi.noise import Noise


def prompt_list(path: Path, count: int, seed: int = 0) -> PromptList:
    path.write_text("".join(f"prompt {i}\n" for i in range(count)))
    return PromptList(path, Noise(seed))


def test_lines_of_text(tmp_path: Path) -> None:
    """A byte order mark, blank lines, other line ends and a last line without one."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff a red circle \r\n\n  \nein gr\u00fcner Stern\nlast".encode())
    read = PromptList(path, Noise(0))
    assert read.prompts == ("a red circle", "ein gr\u00fcner Stern", "last") and len(read) == 3


def test_lines_of_json(tmp_path: Path) -> None:
    """Other keys do not matter; a line separator within a text ends no line."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b", "id": 3}\n\n{"prompt": " c "}\n', encoding="utf-8")
    assert PromptList(path, Noise(0)).prompts == ("a\u2028b", "c")


def test_each_prompt_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    prompts = prompt_list(tmp_path / "p.txt", 50)
    epochs = [[prompts[50 * epoch + i] for i in range(50)] for epoch in range(3)]
    assert all(Counter(epoch) == Counter(prompts.prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, prompts.prompts]}) == 4


def test_a_batch_is_a_function_of_seed_step_and_indices(tmp_path: Path) -> None:
    """Ranks and parts see slices of one batch, it may span epochs, a fresh reader agrees."""
    path = tmp_path / "p.txt"
    prompts, again = prompt_list(path, 7), prompt_list(path, 7)
    assert again.batch(5, 4, range(4)) == prompts.batch(5, 4, range(4))  # no state from before
    whole = prompts.batch(1, 4, range(4))  # samples 4 to 7: the last is of the next epoch
    assert whole == prompts.batch(1, 4, range(2)) + prompts.batch(1, 4, range(2, 4))
    assert whole == [prompts[n] for n in (4, 5, 6, 7)]
    assert {prompts[n] for n in range(7)} == set(prompts.prompts)
    other = prompt_list(path, 7, seed=1)
    assert [other[n] for n in range(21)] != [prompts[n] for n in range(21)]


def test_fewer_prompts_than_a_batch(tmp_path: Path) -> None:
    assert prompt_list(tmp_path / "p.txt", 1).batch(3, 4, range(4)) == ["prompt 0"] * 4


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = prompt_list(tmp_path / "p.txt", 3).digest
    assert first == prompt_list(tmp_path / "q.txt", 3).digest
    assert first != prompt_list(tmp_path / "p.txt", 4).digest


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_prompt_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data\.prompts: .*p\.txt holds no prompt"):
        PromptList(path, Noise(0))
