"""The paper's recipe in small pure functions: schedule, optimizer, averaged weights, loss.

After `main.py`, `optim_factory.py` and `utils.py` of facebookresearch/ConvNeXt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, final: float = 1e-6
) -> optax.Schedule:
    """Learning rate by optimizer step: a line from 0 to `peak`, then half a cosine to `final`.

    Both ends of the warm-up count, so step 0 runs at 0 and the last warm-up step, like the first of
    the cosine, at `peak`; the last step of all ends just above `final`.
    """

    def learning_rate(step: jax.Array | int) -> jax.Array:
        warmup = peak * step / max(warmup_steps - 1, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(step < warmup_steps, warmup, cosine)

    return learning_rate


def decays(params: PyTree) -> PyTree:
    """True for each parameter that weight decay applies to: those of more than one dimension."""
    return jax.tree.map(lambda parameter: parameter.ndim > 1, params)


def adamw(
    learning_rate: optax.Schedule,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with the paper's decay groups; the decay is multiplied by the learning rate."""
    optimizer = optax.adamw(learning_rate, *betas, eps, weight_decay=weight_decay, mask=decays)
    if gradient_clip > 0:
        return optax.chain(optax.clip_by_global_norm(gradient_clip), optimizer)
    return optimizer


def average_decay(decay: float, step: jax.Array | int, warmup: bool) -> jax.Array | float:
    """Decay of the moving average at a step, counted from 0.

    The paper's is constant, which leaves mostly initial weights in the average of a run of a few
    thousand steps. With the warm-up, which is not the paper's, it is at most
    (1 + step) / (10 + step).
    """
    return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else decay


def update_average(average: PyTree, params: PyTree, decay: jax.Array | float) -> PyTree:
    """The exponential moving average of the weights, one optimizer step on."""
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), average, params)


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy of each example against its smoothed label.

    Args:
      logits: (batch, classes); computed in f32.
      labels: (batch,) ints.
      smoothing: share of the target spread evenly over all classes, the right one included.

    Returns:
      (batch,) f32.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
