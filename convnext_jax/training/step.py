"""One step of training and one of evaluation: pure functions, run under `jax.pmap`.

Each takes an optional axis name. With it, a device sees its part of the batch and the results are
joined over the axis; without it, the same function runs on one device or under `jax.jit`. What is
random is drawn for the whole batch from `fold_in(key, step)` and each device takes its part, so a
run depends on the number of devices by the order of its sums alone, and needs no saved RNG state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import FrozenConfigDict

from convnext_jax import ops
from convnext_jax.image.augment import normalize, random_flip
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import recipe

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, optimizer steps done.
      params: the network's parameters, f32.
      opt_state: the optimizer's.
      average: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    params: PyTree
    opt_state: optax.OptState
    average: PyTree | None


def init_state(
    model: ConvNextForImageClassification,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    with_average: bool,
) -> TrainState:
    """The state before the first step; the average starts at the initial weights."""
    params = model.init_variables(key)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if with_average else None,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: ConvNextForImageClassification,
    optimizer: optax.GradientTransformation,
    config: FrozenConfigDict,
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Args:
      state: see `TrainState`.
      batch: `image` (batch, size, size, channels) uint8, `label` (batch,) int32.
      key: the run's key, the same at every step and on every device.
      model: NHWC; its `axis_name` is the mapped axis, or None.
      optimizer: as in `init_state`.
      config: a run's settings; see `convnext_jax.training.config`.

    Returns:
      The next state, and the means over the whole batch of `loss` and `top1` with the
      `gradient_norm`.
    """
    axis_name = model.axis_name
    flip_key, drop_path_key = jax.random.split(jax.random.fold_in(key, state.step))
    image_keys = ops.own_part(
        lambda n: jax.random.split(flip_key, n), len(batch["image"]), axis_name
    )
    images = jax.vmap(random_flip, (0, 0, None))(image_keys, batch["image"], config.flip)
    images = normalize(images, config.mean, config.std, model.dtype)

    def loss_of(params: PyTree) -> tuple[jax.Array, jax.Array]:
        rngs = {"drop_path": drop_path_key}
        outputs = model.apply({"params": params}, images, return_dict=True, train=True, rngs=rngs)
        logits = outputs.logits
        losses = recipe.smoothed_cross_entropy(logits, batch["label"], config.label_smoothing)
        return losses.mean(), (logits.argmax(-1) == batch["label"]).mean()

    (loss, top1), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    if axis_name is not None:
        loss, top1, gradients = jax.lax.pmean((loss, top1, gradients), axis_name)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        decay = recipe.average_decay(config.ema_decay, state.step, config.ema_warmup)
        average = recipe.update_average(average, params, decay)
    metrics = {"loss": loss, "top1": top1, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, opt_state, average), metrics


def eval_step(
    params: PyTree,
    batch: Batch,
    *,
    model: ConvNextForImageClassification,
    config: FrozenConfigDict,
) -> tuple[Metrics, jax.Array]:
    """Sums over the examples of a batch that count.

    Args:
      params: the network's parameters.
      batch: as in `train_step`, and `mask` (batch,), 0 for what only fills the batch.
      model: see `train_step`.
      config: see `train_step`.

    Returns:
      The sums of `loss` (cross entropy, not smoothed), `top1` and `top5` over the whole batch, and
      the predicted class of each of this device's examples, (batch,) int32.
    """
    images = normalize(batch["image"], config.mean, config.std, model.dtype)
    logits = model.apply({"params": params}, images, return_dict=True).logits.astype(jnp.float32)
    labels, mask = batch["label"], batch["mask"].astype(jnp.float32)
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # How many classes come first; among equals the lower index, as in argmax. Written by what comes
    # after, so that a NaN counts as wrong.
    tied = (logits == right) & (jnp.arange(logits.shape[-1]) >= labels[:, None])
    rank = (~((logits < right) | tied)).sum(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    sums = {
        "loss": (losses * mask).sum(),
        "top1": ((rank < 1) * mask).sum(),
        "top5": ((rank < 5) * mask).sum(),
    }
    if model.axis_name is not None:
        sums = jax.lax.psum(sums, model.axis_name)
    return sums, logits.argmax(-1).astype(jnp.int32)
