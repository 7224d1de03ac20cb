"""LayerNorm over the channels.

One meaning, two forms of one arithmetic. XLA's CPU backend computes mean and variance again for
every channel that they are used for, unless they are kept from it: a third of the time of a small
network. Elsewhere XLA makes one kernel of all, which this would break.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, of each position by itself.

    Args:
      x: (..., C), any float dtype; mean and variance are computed in at least f32.
      scale: (C,), as `bias`.
      bias: (C,).
      epsilon: what is added to the variance.

    Returns:
      (..., C), in the dtype of the arithmetic: at least f32.
    """
    forms = {
        "cpu": functools.partial(_normalize, kept=lax.optimization_barrier),
        "default": functools.partial(_normalize, kept=lambda x: x),
    }
    forms = {name: functools.partial(form, epsilon=epsilon) for name, form in forms.items()}
    return lax.platform_dependent(x, scale, bias, **forms)


def _normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    kept: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The two-pass variance: E[x²] - E[x]² cancels, and with the final norm's epsilon of 1e-12
    # nothing covers what is left.
    centred = x - kept(x.mean(-1, keepdims=True))
    variance = kept(jnp.square(centred).mean(-1, keepdims=True))
    return centred * (lax.rsqrt(variance + epsilon) * scale) + bias
