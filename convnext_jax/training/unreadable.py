"""The list of the examples that a run could not read, and the end of a run that has too many."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from tqdm import tqdm

from convnext_jax.data.sources import Dataset
from convnext_jax.errors import InputError
from convnext_jax.training import parallel
from convnext_jax.training.metrics import read_rows

UNREADABLE_NAME = "unreadable.jsonl"


class UnreadableExamples:
    """Lists each unreadable example once in the run's folder, and refuses to go on with too many.

    `unreadable.jsonl` has rows of "split" ("train" or "val"), "example" (its name) and "reason";
    of several processes, the others have files of their own, `unreadable_1.jsonl` and so on. A
    resumed run goes on with the list; whoever has repaired the files may delete it before.

    Args:
      folder: the run's; every process of the run must come here.
      dataset: what the examples are numbered in.
      most: share of a split's examples, 0..1, that may be unreadable.
      resumed: whether the run goes on; a list that another run left is begun anew.
    """

    def __init__(self, folder: Path, dataset: Dataset, most: float, resumed: bool):
        # Every process of a run lists what it met itself.
        number = jax.process_index()
        self._folder = folder
        self._path = folder / (f"unreadable_{number}.jsonl" if number else UNREADABLE_NAME)
        self._sources = {"train": dataset.train, "val": dataset.val}
        self._most = most
        self._failed, self._read = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        if number == 0:  # an earlier start may have had more processes
            for path in _lists(folder):
                rows = read_rows(path) if resumed else []  # without a last one that was cut short
                partial = path.with_name(f".{path.name}.partial")
                partial.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
                os.replace(partial, path)
        parallel.wait_for_all("lists of unreadable examples")
        self._known: dict[str, set[str]] = {"train": set(), "val": set()}
        self._take_in_all()

    def add(self, split: str, failures: Sequence[tuple[int, str]], read: int) -> None:
        """Lists what a batch or a pass did without.

        Args:
          split: "train" or "val".
          failures: (index, why) of what could not be read, an example perhaps more than once.
          read: how many examples were read beside them.

        Raises:
          InputError: too many are known by now; or, before so many have been met, more than ten
            and than twice the share of all that was read since the start. A data set with no more
            of them than its share will practically never come to that.
        """
        source, known = self._sources[split], self._known[split]
        self._failed[split] += len(failures)
        self._read[split] += len(failures) + read
        if not failures:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for index, reason in failures:
                name = source.example_name(index)
                if name in known:
                    continue
                if not any(self._known.values()):
                    tqdm.write(f"left out: {reason} ({self._path} lists this and any others)")
                known.add(name)
                row = {"split": split, "example": name, "reason": reason}
                file.write(json.dumps(row) + "\n")
        self._refuse_too_many_known(split, failures[-1][1])
        failed, count = self._failed[split], self._read[split]
        if failed > 10 + 2 * self._most * count:
            found = f"{failed:,} of the first {count:,} examples read of {split} cannot be"
            self._refuse(f"{found} ({failed / count:.1%}", failures[-1][1])

    def hear_of_others(self) -> None:
        """Takes in what the other processes have listed; every process must ask.

        Raises:
          InputError: too many are known by now, in every process.
        """
        if jax.process_count() == 1:
            return
        parallel.wait_for_all("all have listed")
        reasons = self._take_in_all()
        # A network's file system may show one process what it does not show another yet.
        refusal: InputError | None = None
        try:
            for split, reason in reasons.items():
                self._refuse_too_many_known(split, reason)
        except InputError as error:
            refusal = error
        if parallel.agree(refusal is not None):
            raise refusal or InputError(
                "too many examples cannot be read: another process names one"
            )

    def _take_in_all(self) -> dict[str, str]:
        """Knows of what is listed; the last reason for each split."""
        reasons = {}
        for row in listed(self._folder):
            self._known[row["split"]].add(row["example"])
            reasons[row["split"]] = row["reason"]
        return reasons

    def _refuse_too_many_known(self, split: str, reason: str) -> None:
        count, total = len(self._known[split]), len(self._sources[split])
        if count > self._most * total:
            found = f"at least {count:,} of the {total:,} examples of {split} cannot be read"
            self._refuse(f"{found} ({count / total:.1%}", reason)

    def _refuse(self, found: str, reason: str) -> NoReturn:
        raise InputError(
            f"{found}, and max_unreadable allows {self._most:.1%} of all): {self._path} lists "
            f"them; repair or remove them, or raise max_unreadable; the last: {reason}"
        )


def listed(folder: Path) -> list[dict[str, str]]:
    """The rows that all processes of a run have written, each example once."""
    rows = [row for path in _lists(folder) for row in read_rows(path)]
    return list({(row["split"], row["example"]): row for row in rows}.values())


def _lists(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{Path(UNREADABLE_NAME).stem}*.jsonl"))
