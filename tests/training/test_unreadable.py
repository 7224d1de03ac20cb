"""The list of unreadable examples, and when there are too many to go on."""

from pathlib import Path

import jax
import numpy as np
import pytest

from convnext_jax.data.sources import Dataset, Source
from convnext_jax.errors import InputError
from convnext_jax.training import parallel
from convnext_jax.training.metrics import read_rows
from convnext_jax.training.unreadable import UnreadableExamples, listed

MANY = 1_000_000


class Names(Source):
    """So many examples, of which nothing but the names is asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def example_name(self, index: int) -> str:
        return f"{index}.jpg"


def listing(folder: Path, most: float, count: int = MANY, resumed: bool = False):
    dataset = Dataset(Names(count), Names(count), ("a", "b"))
    return UnreadableExamples(folder, dataset, most, resumed)


def failures(*indices: int) -> list[tuple[int, str]]:
    return [(index, f"{index}.jpg is damaged") for index in indices]


def test_each_is_listed_once_and_a_resumed_run_goes_on_with_the_list(tmp_path: Path, capsys):
    unreadable = listing(tmp_path, 0.5)
    unreadable.add("train", [], 8)
    assert not (tmp_path / "unreadable.jsonl").exists()
    unreadable.add("train", failures(3, 7, 3), 5)
    unreadable.add("train", failures(7), 7)
    unreadable.add("val", failures(3), 7)
    assert capsys.readouterr().out.count("left out: ") == 1
    rows = [
        {"split": split, "example": f"{index}.jpg", "reason": f"{index}.jpg is damaged"}
        for split, index in (("train", 3), ("train", 7), ("val", 3), ("val", 9))
    ]
    assert read_rows(tmp_path / "unreadable.jsonl") == rows[:3]
    with (tmp_path / "unreadable.jsonl").open("a") as file:
        file.write('{"split": "tra')  # as a crash leaves it
    unreadable = listing(tmp_path, 0.5, resumed=True)
    unreadable.add("train", failures(3, 7), 6)
    unreadable.add("val", failures(9, 3), 6)
    assert read_rows(tmp_path / "unreadable.jsonl") == rows
    listing(tmp_path, 0.5)
    assert read_rows(tmp_path / "unreadable.jsonl") == []


def test_more_than_the_share_is_too_many_however_often_it_was_resumed(tmp_path: Path):
    for first in (0, 2):
        listing(tmp_path, 0.05, 100, resumed=first > 0).add(
            "train", failures(first, first + 1), 1000
        )
    unreadable = listing(tmp_path, 0.05, 100, resumed=True)
    unreadable.add("train", failures(4, 0), 1000)  # five of a hundred: no more than the share
    with pytest.raises(InputError) as caught:
        unreadable.add("train", failures(5), 1000)
    message = str(caught.value)
    assert "at least 6 of the 100 examples of train cannot be read (6.0%" in message
    assert "5.0% of all" in message
    assert str(tmp_path / "unreadable.jsonl") in message
    assert message.endswith("the last: 5.jpg is damaged")
    assert len(read_rows(tmp_path / "unreadable.jsonl")) == 6


@pytest.mark.parametrize(("share", "most"), [(0.6, 0.05), (0.3, 0.1), (0.05, 0.001), (0.001, 0)])
def test_far_too_many_are_noticed_long_before_all_are_read(tmp_path: Path, share, most):
    rng = np.random.default_rng(0)
    unreadable = listing(tmp_path, most)

    def read(count: int) -> None:
        for first in range(0, count, 64):
            bad = np.flatnonzero(rng.random(64) < share)
            unreadable.add("train", failures(*(first + bad).tolist()), 64 - len(bad))

    with pytest.raises(InputError, match=r"^\d+ of the first |^at least 1 of "):
        read(int(64 / share))


@pytest.mark.parametrize("most", [0.3, 0.05, 0.01, 0.001])
def test_the_share_itself_is_never_taken_for_too_many(tmp_path: Path, most):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        unreadable = listing(tmp_path, most)
        for _ in range(150):
            bad = int(rng.binomial(64, most))
            unreadable.add("train", failures(*rng.integers(0, 50, bad).tolist()), 64 - bad)


def test_all_may_be_unreadable_if_so_wanted(tmp_path: Path):
    listing(tmp_path, 1.0, 30).add("val", failures(*range(30)), 0)


def test_of_several_processes_each_hears_of_all(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "wait_for_all", lambda place: None)
    monkeypatch.setattr(parallel, "agree", lambda value: value)
    lists = []
    for number in range(2):
        monkeypatch.setattr(jax, "process_index", lambda: number)  # noqa: B023
        lists.append(listing(tmp_path, 0.05, 100))
    first, second = lists
    for number, unreadable in enumerate(lists):  # neither has met more than its share
        unreadable.add("train", failures(*range(3 * number, 3 * number + 3)), 1000)
    assert len(read_rows(tmp_path / "unreadable_1.jsonl")) == 3
    assert len(listed(tmp_path)) == 6
    for unreadable in (first, second):
        with pytest.raises(InputError, match="at least 6 of the 100 examples of train"):
            unreadable.hear_of_others()
    # A run that goes on knows what all have listed, whichever process it is.
    third = listing(tmp_path, 0.06, 100, resumed=True)
    third.add("train", failures(0, 5), 1000)
    assert len(listed(tmp_path)) == 6
    third.hear_of_others()
    monkeypatch.setattr(parallel, "agree", lambda value: True)  # one that sees more files
    with pytest.raises(InputError, match="another process"):
        third.hear_of_others()
    # Another run begins with none, also of processes that it does not have.
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    listing(tmp_path, 0.05, 100)
    assert listed(tmp_path) == []
