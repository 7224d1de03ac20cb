"""Depthwise convolution, stride 1, zero padding that keeps the size.

One meaning, two implementations:

- `plain`: XLA's grouped convolution, differentiable in every mode and to every order.
- `shifted`: a sum of shifted copies of the input, one a tap of the kernel. XLA's CPU backend has no
  kernel of its own for grouped convolutions; on two cores and a 7x7 kernel this form is 9 to 21
  times faster forward and for the input's gradient, and 3 to 32 times for the kernel's gradient
  (`benchmarks/ops.py`). It has a gradient of its own, so no forward-mode differentiation.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from convnext_jax.errors import InputError

Implementation = Literal["plain", "shifted"]


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    implementation: Implementation | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolves each channel of `x` with its own kernel (cross-correlation, as in every framework).

    Args:
      x: (batch, height, width, channels), f64, f32, bf16 or f16, which the result keeps; products
        are summed in at least f32.
      kernel: (kernel height, kernel width, 1, channels), both sides odd, the dtype of `x`.
      implementation: "plain" or "shifted"; None takes "shifted" where the program runs on a CPU
        and "plain" elsewhere. Give "plain" for forward-mode derivatives and Hessians.
      precision: of the products, as in `jax.lax.conv_general_dilated`. "shifted" multiplies
        elementwise and has no use for it.

    Returns:
      (batch, height, width, channels).
    """
    sides, channels = kernel.shape[:2], x.shape[-1]
    if kernel.shape[2:] != (1, channels) or sides[0] % 2 == 0 or sides[1] % 2 == 0:
        raise InputError(
            f"a depthwise kernel for {channels} channels has the shape (odd, odd, 1, {channels}), "
            f"not {kernel.shape}"
        )
    if implementation is None:
        return _by_platform(x, kernel, precision)
    if implementation == "plain":
        return _plain(x, kernel, precision)
    if implementation == "shifted":
        return _shifted(x, kernel)
    raise InputError(f"implementation is {implementation!r}: choose 'plain', 'shifted' or None")


def _plain(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(side // 2, side // 2) for side in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


def _plain_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(functools.partial(_plain, precision=precision), x, kernel)[1](g)


@jax.custom_vjp
def _shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    height, width = x.shape[1:3]
    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    padded, taps = _pad(x, kernel).astype(sum_dtype), kernel[:, :, 0].astype(sum_dtype)
    # Unrolled on purpose: XLA fuses the sum into one loop that reads and writes each value once.
    total = jnp.zeros((), sum_dtype)
    for i in range(taps.shape[0]):
        for j in range(taps.shape[1]):
            total += padded[:, i : i + height, j : j + width] * taps[i, j]
    return total.astype(x.dtype)


def _shifted_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    height, width = x.shape[1:3]
    # The input's gradient is the same operation with the kernel turned by half a turn.
    x_gradient = _shifted(g, kernel[::-1, ::-1])

    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    padded, g = _pad(x, kernel).astype(sum_dtype), g.astype(sum_dtype)

    def row_of_taps(i: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(padded, i, height, axis=1)
        taps = [rows[:, :, j : j + width] * g for j in range(kernel.shape[1])]
        return jnp.stack([tap.sum((0, 1, 2)) for tap in taps])

    # A loop over the rows of the kernel, so that the sums of one row share one pass over the data;
    # all of them unrolled run (and compile) several times slower.
    kernel_gradient = lax.map(row_of_taps, jnp.arange(kernel.shape[0]))[:, :, None]
    return x_gradient, kernel_gradient.astype(kernel.dtype)


def _pad(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


_shifted.defvjp(
    lambda x, kernel: (_shifted(x, kernel), (x, kernel)),
    lambda saved, g: _shifted_gradients(*saved, g),
)


# The choice of platform lies inside the custom gradient, so that a branch not taken leaves nothing
# behind in what is saved for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_platform(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    plain = functools.partial(_plain, precision=precision)
    return lax.platform_dependent(x, kernel, cpu=_shifted, default=plain)


def _by_platform_backward(
    precision: lax.PrecisionLike, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    plain = functools.partial(_plain_gradients, precision=precision)
    return lax.platform_dependent(*saved, g, cpu=_shifted_gradients, default=plain)


_by_platform.defvjp(
    lambda x, kernel, precision: (_by_platform(x, kernel, precision), (x, kernel)),
    _by_platform_backward,
)
