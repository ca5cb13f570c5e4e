"""Prompts of one's own: read right, in an order that seed and epoch alone decide."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from snoopi import parallel
from snoopi.data import STREAM, NegativeList, PromptList, file_digest
from snoopi.noise import Noise


def prompt_list(path: Path, count: int, seed: int = 0) -> PromptList:
    path.write_text("".join(f"prompt {i}\n" for i in range(count)))
    return PromptList(path, Noise(seed))


def test_lines_of_text(tmp_path: Path) -> None:
    """A byte order mark, blank lines, other line ends and a last line without one."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff a red circle \r\n\n  \nein gr\u00fcner Stern\nlast".encode())
    read = PromptList(path, Noise(0))
    assert read.texts(range(3)) == ["a red circle", "ein gr\u00fcner Stern", "last"]
    assert len(read) == 3


def test_lines_of_json(tmp_path: Path) -> None:
    """Other keys do not matter; a line separator within a text ends no line."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b", "id": 3}\n\n{"prompt": " c "}\n', encoding="utf-8")
    assert PromptList(path, Noise(0)).texts([0, 1]) == ["a\u2028b", "c"]


def test_each_prompt_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    prompts = prompt_list(tmp_path / "p.txt", 50)
    epochs = [[prompts[50 * epoch + i] for i in range(50)] for epoch in range(3)]
    file = prompts.texts(range(50))
    assert all(Counter(epoch) == Counter(file) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, file]}) == 4


def test_a_batch_is_a_function_of_seed_step_and_indices(tmp_path: Path) -> None:
    """Ranks and parts see slices of one batch, it may span epochs, a fresh reader agrees."""
    path = tmp_path / "p.txt"
    prompts, again = prompt_list(path, 7), prompt_list(path, 7)
    assert again.batch(5, 4, range(4)) == prompts.batch(5, 4, range(4))  # no state from before
    whole = prompts.batch(1, 4, range(4))  # samples 4 to 7: the last is of the next epoch
    assert whole == prompts.batch(1, 4, range(2)) + prompts.batch(1, 4, range(2, 4))
    assert whole == [prompts[n] for n in (4, 5, 6, 7)]
    assert {prompts[n] for n in range(7)} == set(prompts.texts(range(7)))
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


def test_the_order_is_that_of_the_seed_and_the_epoch(tmp_path: Path) -> None:
    """The order that runs of earlier versions had: resuming one goes on in it."""
    prompts = prompt_list(tmp_path / "p.txt", 30, seed=5)
    for epoch in range(2):
        keys = Noise(5).generator(STREAM, epoch, 0).random(30)
        rows = [row for step in range(6) for row in prompts.rows(6 * epoch + step, 5, range(5))]
        assert rows == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_parts_read_one_global_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, accumulate: int
) -> None:
    """Each rank a contiguous slice, each part a run of it, for batches that span epochs, too."""
    path, batch = tmp_path / "p.txt", 8
    whole = prompt_list(path, 21)
    monkeypatch.setattr(parallel, "world_size", lambda: world)
    for step in range(6):
        read = []
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            own = PromptList(path, Noise(0))  # a process of its own
            for part in parallel.micro_batches(parallel.slice_of(batch), accumulate):
                read += own.batch(step, batch, part)
        assert read == [whole[step * batch + i] for i in range(batch)]


def test_negatives_are_drawn_for_each_sample(tmp_path: Path) -> None:
    """By seed, step and global index alone; all of them, about alike often."""
    path = tmp_path / "n.txt"
    path.write_text("".join(f"negative {i}\n" for i in range(8)))
    read, again = NegativeList(path, Noise(0)), NegativeList(path, Noise(0))
    whole = read.rows(3, range(800))
    assert whole == again.rows(3, range(400)) + again.rows(3, range(400, 800))
    assert whole != read.rows(4, range(800)) and whole != NegativeList(path, Noise(1)).rows(
        3, range(800)
    )
    counts = Counter(whole)
    assert set(counts) == set(range(8)) and all(60 < n < 140 for n in counts.values())
    assert read.batch(3, [5]) == [f"negative {whole[5]}"]


def test_the_texts_stay_on_disk(tmp_path: Path) -> None:
    """Of millions of prompts only places (16 bytes) and an epoch's order (8) are held."""
    path, count = tmp_path / "p.txt", 20_000
    path.write_text("".join(f"prompt {i} {'of many words ' * 20}\n" for i in range(count)))
    tracemalloc.start()
    try:
        prompts = PromptList(path, Noise(0))
        assert prompts[0].startswith("prompt ")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 30 * count
    assert peak < 50 * count


def test_a_file_that_changes_in_use_is_noticed(tmp_path: Path) -> None:
    """A file written anew in its place; one that another takes the place of is read on."""
    path = tmp_path / "p.txt"
    prompts = prompt_list(path, 10)
    first = prompts.texts(range(10))
    (tmp_path / "q.txt").write_text("another\n")
    os.replace(tmp_path / "q.txt", path)
    assert prompts.texts(range(10)) == first
    prompts = prompt_list(path, 10)
    with path.open("w") as file:
        file.write("short\n")
    with pytest.raises(
        ValueError, match=r"data\.prompts: .*p\.txt was changed while it was in use"
    ):
        prompts.texts([9])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("n.csv", b"a", r"expected a \.txt or \.jsonl file, got .*n\.csv"),
        ("n.txt", b"a\n\n\xff\n", r"n\.txt is not UTF-8 text: see line 3"),
        ("n.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r'line 2: expected \{"prompt": "text"\}'),
        ("n.jsonl", b'{"prompt": " "}\n', r'line 1: expected \{"prompt": "text"\}'),
    ],
)
def test_a_file_of_negatives_is_checked_alike(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.negatives: .*{expected}"):
        NegativeList(path, Noise(0))


def test_the_digest_needs_no_reader(tmp_path: Path) -> None:
    prompts = prompt_list(tmp_path / "p.txt", 5)
    assert file_digest(prompts.path) == prompts.digest
