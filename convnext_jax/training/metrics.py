"""Where a run writes its figures: JSON lines, TensorBoard and the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
TIMING_NAME = "timing.jsonl"
EXAMPLES_NAME = "examples.jsonl"


class MetricsWriter:
    """Appends rows of figures to the run's folder.

    `metrics.jsonl` holds what the run computed and nothing that depends on the clock, so that two
    equal runs write equal files; `timing.jsonl` holds the rest. Rows past the step that a run
    resumes from are dropped, since those steps are done again.
    """

    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._folder = folder
        for name in (METRICS_NAME, TIMING_NAME, EXAMPLES_NAME):
            _keep_until(folder / name, resume_step)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A row of metrics, also for TensorBoard; `step` counts the optimizer steps done."""
        self._append(METRICS_NAME, {"step": step, **values})
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """A row of what depends on the clock."""
        self._append(TIMING_NAME, {"step": step, **values})
        for name, value in values.items():
            self._tensorboard.add_scalar(f"timing/{name}", value, step)

    def write_examples(self, step: int, ids: list[int]) -> None:
        """The ids of the examples of one step."""
        self._append(EXAMPLES_NAME, {"step": step, "ids": ids})

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        self._tensorboard.close()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _keep_until(path: Path, step: int) -> None:
    if path.exists():
        rows = [row for row in read_rows(path) if row["step"] <= step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
