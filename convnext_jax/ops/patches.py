"""Convolution over patches that do not overlap.

One meaning, two forms: XLA's convolution, and one matrix product. On an H100 cuDNN takes up to five
times as long as the product; and its calls tear apart what XLA would have the GPU start at once (a
command buffer, which is a CUDA graph). On a CPU the product takes half of the time for a stem, and
with its gradients a fifth to nine tenths. Elsewhere it was not measured.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from convnext_jax.ops import hopper


def patches(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    precision: lax.PrecisionLike = None,
    is_mapped: bool = False,
) -> jax.Array:
    """A convolution whose strides are its kernel's sides, without padding, plus `bias`.

    Args:
      x: (batch, height, width, channels); what does not fill a patch is dropped.
      kernel: (kernel height, kernel width, channels, features), the dtype of `x`.
      bias: (features,), the dtype of `x`.
      precision: of the products.
      is_mapped: see `depthwise_conv`.

    Returns:
      (batch, height // kernel height, width // kernel width, features), the dtype of `x`.
    """
    product = functools.partial(_product, precision=precision)
    convolution = functools.partial(_convolution, precision=precision)
    forms = {}
    if all(isinstance(side, int) for side in x.shape[1:3]):  # in `jax.export` they may be any
        forms["cpu"] = product
        if hopper.is_usable(x, is_mapped):
            forms["cuda"] = product
    return lax.platform_dependent(x, kernel, **forms, default=convolution) + bias


def _convolution(x: jax.Array, kernel: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=kernel.shape[:2],
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _product(x: jax.Array, kernel: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    (down, across), (batch, height, width, channels) = kernel.shape[:2], x.shape
    rows, columns = height // down, width // across
    x = x[:, : rows * down, : columns * across]
    # A patch's row as one axis: XLA's CPU backend copies the innermost axis by itself.
    x = x.reshape(batch, rows, down, columns, across * channels).swapaxes(2, 3)
    x = x.reshape(batch, rows, columns, down * across * channels)
    return jnp.dot(x, kernel.reshape(-1, kernel.shape[-1]), precision=precision)
