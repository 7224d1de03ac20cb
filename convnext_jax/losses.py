"""The losses that `ConvNextForImageClassification` computes from labels.

As in transformers 4.37.2 (`modeling_convnext.py`): means over the batch, as scalars. Computed in at
least f32, whatever the dtype of the logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from convnext_jax.configuration import ConvNextConfig
from convnext_jax.errors import InputError

IGNORE_INDEX = -100


def classification_loss(logits: jax.Array, labels: jax.Array, config: ConvNextConfig) -> jax.Array:
    """The loss of `config.problem_type`, inferred from labels when that is None.

    Args:
      logits: (batch, num_labels).
      labels: (batch,) ints for single-label classification; floats of the shape of the logits for
        multi-label classification; of as many values as the logits for regression.
      config: gives `problem_type` and `num_labels`. The original writes what it inferred back into
        the configuration; a frozen one cannot change, so it is inferred at each call.

    Returns:
      A scalar of at least f32.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    problem_type = config.problem_type
    if problem_type is None:
        if config.num_labels == 1:
            problem_type = "regression"
        elif config.num_labels > 1 and jnp.issubdtype(labels.dtype, jnp.integer):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"

    if problem_type == "single_label_classification":
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.size != logits.shape[0]:
            raise InputError(
                f"labels are {labels.dtype} of shape {labels.shape}: single-label classification "
                f"takes {logits.shape[0]} whole numbers, one a picture"
            )
        return cross_entropy(logits, labels.reshape(-1))
    if labels.size != logits.size:
        raise InputError(
            f"labels have the shape {labels.shape} and the logits {logits.shape}: {problem_type} "
            "takes one label a logit"
        )
    labels = labels.reshape(logits.shape).astype(logits.dtype)
    if problem_type == "regression":
        return jnp.mean(jnp.square(logits - labels))
    return jnp.mean(
        jax.nn.softplus(logits) - labels * logits  # -log p for label 1, -log(1 - p) for label 0
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of (batch, classes) logits over the (batch,) labels that are not -100.

    A label that names no class gives NaN, as no error can be raised under `jax.jit`.
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    # An index above the range has given NaN by now; one below it counts from the end.
    chosen = jnp.where(labels < 0, jnp.nan, chosen)
    counted = labels != IGNORE_INDEX
    return -jnp.sum(jnp.where(counted, chosen, 0)) / jnp.sum(counted)
