"""Exact evaluation: every example of a source counts once, however the batches fall."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import InputError
from convnext_jax.image.augment import normalize

if TYPE_CHECKING:
    from ml_collections import FrozenConfigDict

    from convnext_jax.modeling import ConvNextForImageClassification

PyTree = Any
Batch = dict[str, jax.Array]
Scores = tuple[dict[str, jax.Array], dict[str, jax.Array]]

# Batches that are under way on the devices before the first of them is waited for: enough that
# the devices have work, few enough that their pictures do not fill the memory.
_UNDER_WAY = 3


def eval_step(
    params: PyTree,
    batch: Batch,
    *,
    model: ConvNextForImageClassification,
    config: FrozenConfigDict,
) -> Scores:
    """What a network makes of a batch; run under `jax.pmap` or `jax.jit`.

    Args:
      params: the network's parameters.
      batch: `image` (batch, size, size, channels) uint8, `label` (batch,) int32, and `mask`
        (batch,), 0 for what only fills the batch.
      model: NHWC; its `axis_name` is the mapped axis, or None.
      config: a run's settings; see `convnext_jax.training.config`.

    Returns:
      `score` of its logits, the sums taken over the whole batch, the rest for this device's part.
    """
    images = normalize(batch["image"], config.mean, config.std, model.dtype)
    logits = model.apply({"params": params}, images, return_dict=True).logits
    sums, examples = score(logits, batch["label"], batch["mask"])
    if model.axis_name is not None:
        sums = jax.lax.psum(sums, model.axis_name)
    return sums, examples


def score(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Scores:
    """How good logits are, in f32.

    Args:
      logits: (batch, classes).
      labels: (batch,) the right classes.
      mask: (batch,), 0 for what only fills the batch.

    Returns:
      The sums over the batch of `loss` (cross entropy, not smoothed), `top1` and `top5`; and of
      each example its `loss`, the predicted class as `prediction` and that class's probability as
      `confidence`. Among equal logits the lower index comes first; NaN counts as wrong.
    """
    logits, mask = logits.astype(jnp.float32), mask.astype(jnp.float32)
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # How many classes come first. Written by what comes after, so that a NaN counts as wrong.
    tied = (logits == right) & (jnp.arange(logits.shape[-1]) >= labels[:, None])
    rank = (~((logits < right) | tied)).sum(-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    losses = total - right[:, 0]
    sums = {
        "loss": (losses * mask).sum(),
        "top1": ((rank < 1) * mask).sum(),
        "top5": (((rank < 5) & ~jnp.isnan(right[:, 0])) * mask).sum(),
    }
    examples = {
        "loss": losses,
        "prediction": logits.argmax(-1).astype(jnp.int32),
        "confidence": jnp.exp(logits.max(-1) - total),
    }
    return sums, examples


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass over a source gave; the arrays are in the order of the source.

    An example that could not be read is in none of it but `unreadable`.

    Attributes:
      metrics: means over all examples: `loss`, and `top1` and `top5` in 0..1.
      ids: (examples,) int32, the index of each in the source.
      labels: (examples,) int32, the right class of each.
      predictions: (examples,) int32, the class that scored highest.
      confidences: (examples,) f32, the probability of that class.
      losses: (examples,) f32, cross entropy.
      unreadable: (index in the source, why) of the examples that could not be read.
    """

    metrics: dict[str, float]
    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    losses: np.ndarray
    unreadable: tuple[tuple[int, str], ...] = ()

    @property
    def right(self) -> np.ndarray:
        """(examples,) bool; where a logit was NaN, and so the confidence is, nothing is right."""
        return (self.labels == self.predictions) & ~np.isnan(self.confidences)

    def confusions(self, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cells of the confusion matrix that are not 0, as right class, predicted and count.

        In the order of the rows, then the columns; for 21,841 classes the whole matrix would take
        gigabytes.
        """
        cells, counts = np.unique(
            self.labels.astype(np.int64) * classes + self.predictions, return_counts=True
        )
        return cells // classes, cells % classes, counts

    def confusion_matrix(self, classes: int) -> np.ndarray:
        """(classes, classes) counts; rows are the right classes, columns the predicted ones."""
        matrix = np.zeros((classes, classes), np.int64)
        rows, columns, counts = self.confusions(classes)
        matrix[rows, columns] = counts
        return matrix

    def per_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each class, (classes,): how many of its examples are right, and how many it has."""
        right = np.bincount(self.labels[self.right], minlength=classes)
        return right, np.bincount(self.labels, minlength=classes)

    def worst_mistakes(self, count: int) -> np.ndarray:
        """Places of up to `count` wrong examples here, those first that it was surest of.

        In these arrays, that is: what they are in the source is told by `ids`.
        """
        wrong = np.flatnonzero(~self.right)
        confidences = np.nan_to_num(self.confidences[wrong], nan=-1.0)
        return wrong[np.argsort(-confidences, kind="stable")[:count]]


def evaluate(
    eval_step: Callable[[PyTree, dict[str, np.ndarray]], Scores],
    weights: dict[str, PyTree],
    batches: Iterable[dict[str, np.ndarray]],
    put: Callable[[dict[str, np.ndarray]], dict[str, Any]] = dict,
    own_rows: Callable[[jax.Array], np.ndarray] = np.asarray,
) -> dict[str, Evaluation]:
    """Evaluates several sets of weights in one pass over the data.

    Args:
      eval_step: of parameters and a batch, as this module's under `jax.jit`.
      weights: parameters by name, such as {"val": ..., "val_ema": ...}.
      batches: of `eval_batches`, padded and masked: of every one "image", "label", "id", "mask" and
        "unreadable".
      put: from what the step reads of a batch to how it takes it.
      own_rows: what this process has of an array that `eval_step` gave, an entry for each example.

    Returns:
      An `Evaluation` for each name, of all processes' examples; `unreadable` is this process's.

    Raises:
      InputError: not one example could be read.
    """
    outputs: dict[str, list[Scores]] = {name: [] for name in weights}
    kept: dict[str, list[np.ndarray]] = {"label": [], "id": [], "mask": []}
    unreadable: list[tuple[int, str]] = []
    under_way: collections.deque[dict[str, Scores]] = collections.deque()

    def wait_for_one() -> None:
        for name, (sums, examples) in under_way.popleft().items():
            outputs[name].append((jax.device_get(sums), jax.tree.map(own_rows, examples)))

    for batch in batches:
        parts = put({name: batch[name] for name in ("image", "label", "mask")})
        under_way.append({name: eval_step(params, parts) for name, params in weights.items()})
        for name, values in kept.items():
            values.append(np.asarray(batch[name]))
        unreadable.extend(batch["unreadable"])
        if len(under_way) == _UNDER_WAY:
            wait_for_one()
    while under_way:
        wait_for_one()
    mask = _in_order(kept["mask"]).astype(bool)
    if not mask.any():
        if not unreadable:  # all of them are other processes'
            raise InputError("no example to evaluate on can be read; another process says why")
        raise InputError(
            f"none of the {len(unreadable)} examples to evaluate on can be read; the first: "
            f"{unreadable[0][1]}"
        )
    labels, ids = _in_order(kept["label"])[mask], _in_order(kept["id"])[mask]

    def gather(outputs: list[Scores]) -> Evaluation:
        # Summed in f64: in f32 a sum over millions of examples would lose some.
        sums = {k: sum(float(sums[k]) for sums, _ in outputs) for k in outputs[0][0]}
        examples = {
            k: _in_order([part[k] for _, part in outputs])[mask] for k in sorted(outputs[0][1])
        }
        return Evaluation(
            {name: value / int(mask.sum()) for name, value in sums.items()},
            ids,
            labels,
            examples["prediction"],
            examples["confidence"],
            examples["loss"],
            tuple(unreadable),
        )

    return {name: gather(scores) for name, scores in outputs.items()}


def _in_order(batches: list[np.ndarray]) -> np.ndarray:
    """What the processes have of each batch, joined in the order of the examples."""
    rows = np.stack(batches)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        rows = multihost_utils.process_allgather(rows).swapaxes(0, 1)
    return rows.reshape(-1)
