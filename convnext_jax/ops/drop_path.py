"""Drop path (stochastic depth, Huang et al., arXiv:1603.09382) of whole samples."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def drop_path(x: jax.Array, rate: float, key: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Zeroes each sample of `x` with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      x: (batch, ...), any float dtype, which the result keeps.
      rate: probability of dropping a sample, 0 <= rate < 1.
      key: the PRNG key of this block and step; the same on every device.
      axis_name: when `x` is one device's part of a batch split over this mapped axis, its name.
        The mask is then drawn for the whole batch and each device takes its part, so that the
        result does not depend on the number of devices.
    """
    gain = drop_path_gain(x.shape[0], rate, key, axis_name, x.dtype)
    return x * gain.reshape((x.shape[0],) + (1,) * (x.ndim - 1))


def drop_path_gain(
    local: int, rate: float, key: jax.Array, axis_name: str | None, dtype: DTypeLike
) -> jax.Array:
    """What `drop_path` multiplies the samples of this device with: (local,), of `dtype`.

    Args:
      local: samples of the batch on this device; the others as `drop_path` has them.
    """
    keep = own_part(lambda n: jax.random.bernoulli(key, 1.0 - rate, (n,)), local, axis_name)
    return jnp.where(keep, jnp.asarray(1.0 / (1.0 - rate), dtype), jnp.asarray(0, dtype))


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
