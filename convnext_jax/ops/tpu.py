"""Whether a program can have the kernels for TPUs."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from convnext_jax.ops.hopper import is_unsplit

# Those with 128 MiB of memory on the chip, which holds the weights of a block.
KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")


def is_target() -> bool:
    """Whether the program at hand is for TPUs that have the kernels.

    Within `jax.pmap` and `jax.shard_map` these are the devices of the mesh, which may be described
    ones that this process does not have; elsewhere all devices of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return all(d.device_kind in KINDS for d in ([device] if device else jax.devices()))


def is_usable(x: jax.Array, is_mapped: bool) -> bool:
    """As `hopper.is_usable`, for the kernels of TPUs."""
    return is_target() and is_unsplit(x, is_mapped) and _are_there()


@functools.cache
def _are_there() -> bool:
    """Whether this jax has what the kernels are written in; tried once in a process, and logged."""
    try:
        # In a thread of its own, which knows nothing of the transformation that asks.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(_try).result()
    except Exception as error:  # whatever another version of jax may raise
        log = logging.getLogger(__name__)
        log.warning("ConvNeXt runs without its kernels (%s)", " ".join(str(error).split())[:200])
        return False
    return True


def _try() -> None:
    """Lowers the kernels for a small map, and compiles them where there is a TPU."""
    from convnext_jax.ops import norm_mlp_tpu

    width = 128
    shapes = [(8, 4, 4, width)] * 2
    shapes += [(width,)] * 2 + [(width, 4 * width), (4 * width,), (4 * width, width)]
    shapes += [(width,)] * 2 + [(8,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    for function in (norm_mlp_tpu.forward, norm_mlp_tpu.backward):
        traced = jax.jit(functools.partial(function, epsilon=1e-6)).trace(*arrays)
        lowered = traced.lower(lowering_platforms=("tpu",))
        if jax.default_backend() == "tpu":
            lowered.compile()
