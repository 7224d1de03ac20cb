"""What the kernels share, whatever they are written for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax


def in_32_bits(function: Callable) -> Callable:
    """The function with JAX's 64 bits switched off, which the kernels' positions do not need."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return wrapped


def is_unsplit(x: jax.Array, is_mapped: bool) -> bool:
    """Whether `x` lies on one device, in the program at hand: XLA cannot split a kernel.

    Args:
      x: an array, or one that is traced.
      is_mapped: whether this is within a `jax.pmap` or `jax.shard_map`. Elsewhere the program must
        be one of a single device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and set(mesh.axis_names) - set(mesh.manual_axes):
        return False  # XLA splits along some of the axes
    # With `check_vma`, `jax.shard_map` wants to know more of a kernel than there is to know.
    varying = getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", ())
    return (is_mapped or jax.device_count() == 1) and not varying


def work(attempt: Callable[[], None]) -> bool:
    """Whether `attempt` raises nothing; the log says what it raised.

    Each process finds out for itself: of several, all must be of one kind.
    """
    try:
        # In a thread of its own, which knows nothing of the transformation that asks.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(attempt).result()
    except Exception as error:  # whatever another version of jax may raise
        message = " ".join(str(error).split())[:200]
        logging.getLogger(__name__).warning("ConvNeXt runs without its kernels (%s)", message)
        return False
    return True
