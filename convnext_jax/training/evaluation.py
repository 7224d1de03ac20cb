"""Exact evaluation: every example of a source counts once, however the batches fall."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass over a source gave.

    Attributes:
      metrics: means over all examples: `loss`, and `top1` and `top5` in 0..1.
      labels: (examples,) the right class of each, in the order of the source.
      predictions: (examples,) the class that scored highest.
    """

    metrics: dict[str, float]
    labels: np.ndarray
    predictions: np.ndarray

    def confusion_matrix(self, classes: int) -> np.ndarray:
        """(classes, classes) counts; rows are the right classes, columns the predicted ones."""
        matrix = np.zeros((classes, classes), np.int64)
        np.add.at(matrix, (self.labels, self.predictions), 1)
        return matrix


def evaluate(
    eval_step: Callable[[PyTree, dict[str, np.ndarray]], tuple[dict[str, jax.Array], jax.Array]],
    weights: dict[str, PyTree],
    batches: Iterator[dict[str, np.ndarray]],
    devices: int,
) -> dict[str, Evaluation]:
    """Evaluates several sets of weights in one pass over the data.

    Args:
      eval_step: `step.eval_step` under `jax.pmap`, of parameters and a batch.
      weights: parameters by name, such as {"val": ..., "val_ema": ...}.
      batches: of `eval_batches`, padded and masked.
      devices: how many parts each batch is split into.

    Returns:
      An `Evaluation` for each name.
    """
    results: dict[str, list] = {name: [] for name in weights}
    labels, masks = [], []
    for batch in batches:
        parts = split(batch, devices)
        for name, params in weights.items():
            results[name].append(eval_step(params, parts))  # dispatched, not waited for
        labels.append(batch["label"])
        masks.append(np.asarray(batch["mask"]).astype(bool))
    mask = np.concatenate(masks)

    def gather(outputs: list) -> Evaluation:
        outputs = jax.device_get(outputs)
        # Summed in f64: in f32 a sum over millions of examples would lose some.
        sums = {k: sum(float(sums[k]) for sums, _ in outputs) for k in outputs[0][0]}
        predictions = np.concatenate([predicted.reshape(-1) for _, predicted in outputs])
        return Evaluation(
            {name: value / int(mask.sum()) for name, value in sums.items()},
            np.concatenate(labels)[mask],
            predictions[mask],
        )

    return {name: gather(outputs) for name, outputs in results.items()}


def split(batch: dict[str, np.ndarray], devices: int) -> dict[str, np.ndarray]:
    """What the step reads of a batch, with a leading axis over the devices."""
    return {
        name: value.reshape(devices, -1, *value.shape[1:])
        for name, value in batch.items()
        if name in ("image", "label", "mask")
    }
