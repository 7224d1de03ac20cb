"""The list of the examples that a run could not read, and the end of a run that has too many."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from convnext_jax.data.sources import Dataset
from convnext_jax.errors import InputError
from convnext_jax.training.metrics import read_rows

UNREADABLE_NAME = "unreadable.jsonl"


class UnreadableExamples:
    """Lists each unreadable example once in the run's folder, and refuses to go on with too many.

    `unreadable.jsonl` has rows of "split" ("train" or "val"), "example" (its name) and "reason";
    of several processes, the others have files of their own, `unreadable_1.jsonl` and so on. A
    resumed run goes on with the list; whoever has repaired the files may delete it before.

    Args:
      folder: the run's.
      dataset: what the examples are numbered in.
      most: share of a split's examples, 0..1, that may be unreadable.
      resumed: whether the run goes on; a list that another run left is begun anew.
    """

    def __init__(self, folder: Path, dataset: Dataset, most: float, resumed: bool):
        # Every process of a run lists what it met itself.
        number = jax.process_index()
        self._path = folder / (f"unreadable_{number}.jsonl" if number else UNREADABLE_NAME)
        self._sources = {"train": dataset.train, "val": dataset.val}
        self._most = most
        self._failed, self._read = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        rows = read_rows(self._path) if resumed else []
        self._known = {
            split: {row["example"] for row in rows if row["split"] == split}
            for split in self._sources
        }
        if self._path.exists():  # without a last row that was cut short
            partial = folder / f".{self._path.name}.partial"
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(partial, self._path)

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
        count, total = len(known), len(source)
        found = f"at least {count:,} of the {total:,} examples of {split} cannot be read"
        if count <= self._most * total:
            count, total = self._failed[split], self._read[split]
            found = f"{count:,} of the first {total:,} examples read of {split} cannot be"
            if count <= 10 + 2 * self._most * total:
                return
        raise InputError(
            f"{found} ({count / total:.1%}, and max_unreadable allows {self._most:.1%} of all): "
            f"{self._path} lists them; repair or remove them, or raise max_unreadable; the last: "
            f"{failures[-1][1]}"
        )
