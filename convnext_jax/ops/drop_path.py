"""Drop path (stochastic depth, Huang et al., arXiv:1603.09382) of whole samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def drop_path_gain(
    samples: int,
    rate: float | Sequence[float],
    key: jax.Array,
    axis_name: str | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """What each sample is multiplied with: 0 with probability `rate`, and else 1 / (1 - rate).

    Args:
      samples: of the batch on this device.
      rate: probability of dropping a sample, 0 <= rate < 1; or that of each of several blocks, all
        of whose masks are then drawn at once.
      key: the PRNG key of the blocks and the step; the same on every device.
      axis_name: when the batch is split over this mapped axis, its name. The mask is then drawn for
        the whole batch and each device takes its part, so that the result does not depend on the
        number of devices.
      dtype: of the result.

    Returns:
      (samples,), or (samples, blocks).
    """
    kept = 1.0 - np.asarray(rate, np.float64)
    keep = own_part(lambda n: jax.random.bernoulli(key, kept, (n, *kept.shape)), samples, axis_name)
    return jnp.where(keep, jnp.asarray(1.0 / kept, dtype), jnp.asarray(0, dtype))


def own_part(draw: Callable[[int], jax.Array], local: int, axis_name: str | None) -> jax.Array:
    """What `draw(n)` draws for the n samples of a batch, or the part of it for this device.

    Args:
      draw: gives an array of n entries along its first axis, the same ones on every device.
      local: samples of the batch on this device.
      axis_name: the mapped axis that the batch is split over, or None when it is not split.
    """
    if axis_name is None:
        return draw(local)
    drawn = draw(local * jax.lax.axis_size(axis_name))
    return jax.lax.dynamic_slice_in_dim(drawn, jax.lax.axis_index(axis_name) * local, local)
