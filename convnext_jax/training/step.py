"""One step of training: pure functions, which `convnext_jax.training.parallel` runs on devices.

A step is two functions, the gradients of a device's part of the batch and their application, and
`train_step` is both with a mean over the devices between them. The model has an axis name or None.
With it, a device sees its part of the batch and the results are joined over the axis; without it,
the same function runs on one device or under `jax.jit`. What is random is drawn for the whole batch
from `fold_in(key, step)` and each device takes its part, so a run depends on the number of devices
by the order of its sums alone, and needs no saved RNG state. (A device must hold a whole group of
what is mixed together: see `mix_group`.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import FrozenConfigDict

from convnext_jax import ops
from convnext_jax.image.augment import normalize, random_erase, random_flip, random_shift
from convnext_jax.image.mixing import mix
from convnext_jax.image.randaugment import color_jitter, parse_policy, rand_augment, three_augment
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import recipe

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, steps done.
      params: the network's parameters, f32.
      opt_state: the optimizer's.
      average: exponential moving average of the parameters, or None.
      skipped: int32, how many of the steps changed nothing, because their gradients were not
        finite. More than `config.max_skipped_steps`: the run is over, and the state stays what it
        was before the step that was one too many.
    """

    step: jax.Array
    params: PyTree
    opt_state: optax.OptState
    average: PyTree | None
    skipped: jax.Array


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, with_average: bool
) -> TrainState:
    """The state before the first step; the average starts at the initial weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if with_average else None,
        skipped=jnp.zeros((), jnp.int32),
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
      The next state, and the means over the whole batch of `loss` and `top1` (of mixed pictures,
      the larger part's class counts) with the `gradient_norm`, and the state's `skipped`.
    """
    gradients, metrics = local_gradients(
        state.params, state.step, batch, key, model=model, config=config
    )
    if model.axis_name is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), model.axis_name)
    return apply_gradients(state, gradients, metrics, optimizer=optimizer, config=config)


def local_gradients(
    params: PyTree,
    step: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    model: ConvNextForImageClassification,
    config: FrozenConfigDict,
) -> tuple[PyTree, Metrics]:
    """The mean gradients of what this device has of a batch, with the means of `loss` and `top1`.

    In as many parts as `config.gradient_accumulation` says: the means of the parts' means.
    The arguments are those of `train_step`, and `step` counts the steps done before.
    """
    axis_name, parts = model.axis_name, config.gradient_accumulation
    local = len(batch["label"])
    group = mix_group(config, local)
    step_key = jax.random.fold_in(key, step)
    image_key, group_key, drop_path_key = jax.random.split(step_key, 3)
    rows = {
        "image": batch["image"],
        "label": batch["label"],
        "image_key": _own_keys(image_key, local, parts, axis_name),
        "group_key": _own_keys(group_key, local // group, parts, axis_name),
    }

    def loss_of(params: PyTree, part: Batch, drop_path_key: jax.Array):
        if config.freeze_backbone:  # the gradient ends at the head, and is not computed below it
            params = {**params, "convnext": jax.lax.stop_gradient(params["convnext"])}
        images, targets = augment(part, model.config.num_labels, config, model.dtype)
        rngs = {"drop_path": drop_path_key}
        outputs = model.apply({"params": params}, images, return_dict=True, train=True, rngs=rngs)
        right = outputs.logits.argmax(-1) == targets.argmax(-1)
        losses = recipe.soft_cross_entropy(outputs.logits, targets)
        return losses.mean(), {"loss": losses.mean(), "top1": right.mean(dtype=losses.dtype)}

    gradient_of = jax.grad(loss_of, has_aux=True)
    if parts == 1:
        return gradient_of(params, rows, drop_path_key)

    def add_part(total: PyTree, part: Batch) -> tuple[PyTree, None]:
        own = gradient_of(params, part, part.pop("drop_path_key"))
        return jax.tree.map(jnp.add, total, own), None

    rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    rows["drop_path_key"] = jax.random.split(drop_path_key, parts)
    shapes = jax.eval_shape(
        lambda: gradient_of(params, jax.tree.map(lambda x: x[0], rows), drop_path_key)
    )
    total, _ = jax.lax.scan(add_part, optax.tree.zeros_like(shapes), rows)
    return jax.tree.map(lambda x: x / parts, total)


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    metrics: Metrics,
    *,
    optimizer: optax.GradientTransformation,
    config: FrozenConfigDict,
) -> tuple[TrainState, Metrics]:
    """The second half of `train_step`: the optimizer's step, and the average's.

    Gradients or a loss that are not finite change nothing but the counts.

    Args:
      state: before the step.
      gradients: of the whole batch.
      metrics: of the whole batch.
      optimizer: as in `init_state`.
      config: a run's settings.
    """
    metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    # When there were too many, the run is over, and a step that was under way does not count.
    skipped = state.skipped + (~is_finite & (state.skipped <= config.max_skipped_steps))
    goes_on = skipped <= config.max_skipped_steps

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        decay = recipe.average_decay(config.ema_decay, state.step, config.ema_warmup)
        average = recipe.update_average(average, params, decay)
    new, old = (params, opt_state, average), (state.params, state.opt_state, state.average)
    new = jax.tree.map(lambda n, o: jnp.where(is_finite & goes_on, n, o), new, old)
    return TrainState(state.step + goes_on, *new, skipped), metrics | {"skipped": skipped}


def augment(
    rows: Batch, num_classes: int, config: FrozenConfigDict, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """The pictures as the network sees them in training, and what it should say of them.

    Args:
      rows: `image` (batch, size, size, 3) uint8, `label` (batch,) ints, `image_key` (batch,) PRNG
        keys and `group_key` (groups,) PRNG keys, one for each picture and for each group of
        pictures that are mixed among themselves.
      num_classes: of the targets.
      config: a run's settings.
      dtype: of the pictures that are returned.

    Returns:
      Pictures (batch, size, size, 3), normalised, and targets (batch, num_classes).
    """
    keys = jax.vmap(lambda key: jax.random.split(key, 5))(rows["image_key"])
    images = rows["image"]
    if config.shift > 0:
        images = random_shift(keys[:, 0], images, config.shift)
    if config.flip > 0:
        images = random_flip(keys[:, 1], images, config.flip)
    if config.augment == "three":
        images = three_augment(keys[:, 2], images)
    elif config.augment:
        fill = tuple(round(255 * mean) for mean in config.mean)
        images = rand_augment(keys[:, 2], images, parse_policy(config.augment), fill)
    if config.color_jitter > 0 and config.augment in ("", "three"):
        images = color_jitter(keys[:, 3], images, config.color_jitter)
    images = normalize(images, config.mean, config.std, dtype or jnp.float32)
    if config.erase > 0:
        images = random_erase(keys[:, 4], images, config.erase)
    return mix(
        rows["group_key"], images, rows["label"], num_classes,
        mixup=config.mixup, cutmix=config.cutmix, prob=config.mix_prob,
        switch_prob=config.mix_switch_prob, smoothing=config.label_smoothing,
    )  # fmt: skip


def mix_group(config: FrozenConfigDict, local: int) -> int:
    """Pictures that share one draw of mixup or cutmix, where a device has `local` of a batch.

    As many as `config.mix_group` says; all of a part of the batch where that is fewer, or where
    nothing is mixed.
    """
    part = local // config.gradient_accumulation
    is_mixed = config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)
    return min(config.mix_group, part) if is_mixed else part


def _own_keys(key: jax.Array, local: int, parts: int, axis_name: str | None) -> jax.Array:
    """Keys for what this device has of a batch, one part after the other."""

    def of_part(key: jax.Array) -> jax.Array:
        return ops.own_part(lambda n: jax.random.split(key, n), local // parts, axis_name)

    return jax.vmap(of_part)(jax.random.split(key, parts)).reshape(-1)
