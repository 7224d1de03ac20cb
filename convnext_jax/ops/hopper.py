"""What the kernels for NVIDIA's Hopper GPUs share, and whether this process can run them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_32_bits(function: Callable) -> Callable:
    """The function with JAX's 64 bits switched off, which the kernels' positions do not need."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return wrapped


def is_usable(is_mapped: bool) -> bool:
    """Whether the kernels run on the devices of this process, and can be put into a program.

    Args:
      is_mapped: whether they come into a `jax.pmap` or `jax.shard_map`. Elsewhere the program must
        be one of a single device, as XLA cannot split a kernel over several.
    """
    return (is_mapped or jax.device_count() == 1) and _are_there()


@functools.cache
def _are_there() -> bool:
    """Whether the devices are Hopper GPUs, and this jax compiles a kernel for them.

    Tried once in a process; where it is not so on a GPU, the log says why, and the plain forms of
    the operations serve.
    """
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    try:
        if int(float(device.compute_capability)) != 9:
            raise ValueError(
                f"they are for compute capability 9, this has {device.compute_capability}"
            )
        _try()
    except Exception as error:  # whatever another version of jax may raise
        reason = " ".join(str(error).split())[:200]
        logging.getLogger(__name__).warning(
            "%s runs ConvNeXt without its kernels (%s)", device.device_kind, reason
        )
        return False
    return True


def _try() -> None:
    """Compiles a small kernel of each kind."""
    from convnext_jax.ops import depthwise_conv_hopper, norm_mlp_hopper

    def arrays(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    rows, width = 64, 32
    mlp = functools.partial(norm_mlp_hopper.forward, epsilon=1e-6)
    weights = [(width,)] * 2 + [(width, 4 * width), (4 * width,), (4 * width, width)]
    jax.jit(mlp).lower(*arrays(*[(rows, width)] * 2, *weights, *[(width,)] * 2)).compile()
    convolution = jax.jit(depthwise_conv_hopper.forward)
    convolution.lower(*arrays((1, 8, 8, width), (7, 7, 1, width), (width,))).compile()
