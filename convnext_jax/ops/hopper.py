"""What the kernels for NVIDIA's Hopper GPUs share, and whether this process can run them."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnext_jax.ops.kernels import is_unsplit, work


def is_usable(x: jax.Array, is_mapped: bool) -> bool:
    """Whether a kernel may take `x`, on the devices of this process and in the program at hand.

    Arguments as in `kernels.is_unsplit`.
    """
    return is_unsplit(x, is_mapped) and _are_there()


@functools.cache
def _are_there() -> bool:
    """Whether all devices are Hopper GPUs, and this jax compiles the kernels for them.

    Tried once in a process. On other GPUs, and where a version of jax no longer has what they are
    written in (0.12 says that Pallas' way to Triton will go), the log says so, and the plain forms
    of the operations serve.
    """
    if jax.default_backend() != "gpu":
        return False
    log = logging.getLogger(__name__)
    kinds = {
        (device.device_kind, str(getattr(device, "compute_capability", "?")))
        for device in jax.devices()
    }
    if {capability.split(".")[0] for _, capability in kinds} != {"9"}:
        names = ", ".join(sorted(kind for kind, _ in kinds))
        log.info("ConvNeXt's kernels are for NVIDIA's Hopper GPUs: not used on %s", names)
        return False
    if not work(_try):
        return False
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    return True


def _try() -> None:
    """Lowers a small kernel of each kind, and compiles the shortest."""
    from convnext_jax.ops import depthwise_conv_hopper, norm_mlp_hopper

    def lower(function: Callable, *shapes: tuple[int, ...], **options: float) -> jax.stages.Lowered:
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        return jax.jit(functools.partial(function, **options)).lower(*arrays)

    rows, width = 64, 32
    vector, matrix = (width,), (width, 4 * width)
    weights = [vector, vector, matrix, (4 * width,), matrix[::-1], vector, vector]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for function in (norm_mlp_hopper.backward, norm_mlp_hopper.forward):
            lowered = lower(function, (rows, width), (rows, width), *weights, epsilon=1e-6)
        lowered.compile()
        wide = (rows, 4 * width)
        lower(norm_mlp_hopper.hidden, (rows, width), *weights[2:4])
        lower(norm_mlp_hopper.output, wide, (rows, width), *weights[4:])
        lower(norm_mlp_hopper.through_gelu, wide, wide)
        lower(norm_mlp_hopper.through_norm, *[(rows, width)] * 3, vector, vector, epsilon=1e-6)
        maps = (1, 8, 8, width)
        lower(depthwise_conv_hopper.forward, maps, (7, 7, 1, width), vector)
        lower(depthwise_conv_hopper.kernel_gradient, maps, maps)
