"""Whether a program can have the kernels for TPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.ops.kernels import is_unsplit, work

# Those with 128 MiB of memory on the chip, which holds the weights of a block.
KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")


def is_target() -> bool:
    """Whether the program at hand is for TPUs that have the kernels.

    Within `jax.pmap` and `jax.shard_map` these are the devices of the mesh, which may be described
    ones that this process does not have; elsewhere all devices.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return all(d.device_kind in KINDS for d in ([device] if device else jax.devices()))


def is_usable(x: jax.Array, is_mapped: bool) -> bool:
    """As `hopper.is_usable`, for the kernels of TPUs."""
    return is_target() and is_unsplit(x, is_mapped) and _are_there()


@functools.cache
def _are_there() -> bool:
    """Whether this jax has what the kernels are written in; tried once in a process, and logged."""
    return work(_try)


def _try() -> None:
    """Lowers the kernels; where there is a TPU, also runs them."""
    from convnext_jax.ops import norm_mlp_tpu

    x, shortcut, g, weights, gain = _numbers()
    for function, maps in ((norm_mlp_tpu.forward, (x, shortcut)), (norm_mlp_tpu.backward, (x, g))):
        traced = jax.jit(functools.partial(function, epsilon=1e-6)).trace(*maps, weights, gain)
        traced.lower(lowering_platforms=("tpu",))
    if jax.default_backend() == "tpu":
        compare()


def compare(interpret: bool = False) -> None:
    """Runs both kernels, and raises RuntimeError where they differ from the plain form."""
    from convnext_jax.ops import norm_mlp_tpu
    from convnext_jax.ops.norm_mlp import NormMlpWeights, norm_mlp

    x, shortcut, g, weights, gain = _numbers()
    how = {"epsilon": 1e-6, "interpret": interpret}

    @jax.jit
    def fused(x, shortcut, g, weights, gain):
        y = norm_mlp_tpu.forward(x, shortcut, weights, gain, **how)
        dx, of_weights = norm_mlp_tpu.backward(x, g, weights, gain, **how)
        return y, dx, *of_weights

    @jax.jit
    def plain(x, shortcut, g, weights, gain):
        def function(x, weights):
            return norm_mlp(x, shortcut, weights, gain, epsilon=1e-6, implementation="plain")

        y, gradients = jax.vjp(function, x, weights)
        dx, of_weights = gradients(g)
        return y, dx, *of_weights

    ours, theirs = fused(x, shortcut, g, weights, gain), plain(x, shortcut, g, weights, gain)
    names = ("the result", "the gradient of x", *NormMlpWeights._fields)
    for name, a, b in zip(names, ours, theirs, strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not error < 0.03:  # each is off by some 0.01 in bf16
            raise RuntimeError(f"a kernel's numbers are off: {name} by {error:.2g} of itself")


def _numbers() -> tuple:
    """What needs two steps of a kernel, the second with rows that are not there, and a loop."""
    from convnext_jax.ops.norm_mlp import NormMlpWeights

    rng, width = np.random.default_rng(0), 192
    vector, matrix = (width,), (width, 4 * width)
    shapes = vector, vector, matrix, (4 * width,), matrix[::-1], vector, vector

    def numbers(shape: tuple[int, ...], scale: float) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * scale, jnp.bfloat16)

    x, shortcut, g = (numbers((16, 7, 7, width), 1.0) for _ in range(3))
    weights = NormMlpWeights(*(numbers(shape, 0.1) for shape in shapes))
    return x, shortcut, g, weights, jnp.arange(16.0) / 8
