"""The second half of a block: LayerNorm, MLP with GELU, layer scale, drop path and residual.

One meaning, two implementations:

- `plain`: JAX operations, differentiable in every mode and to every order.
- `fused`: kernels that never write the hidden layer, four times as wide as the map, to memory; for
  NVIDIA's Hopper GPUs, in half precision (`norm_mlp_hopper.py`). Nothing but the map that is
  normalized is kept for the gradient.

`benchmarks/ops.py` measures them.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from convnext_jax.errors import InputError
from convnext_jax.ops.activations import activation
from convnext_jax.ops.hopper import is_usable

Implementation = Literal["plain", "fused"]


class NormMlpWeights(NamedTuple):
    """Parameters of the MLP and of what surrounds it, for maps of C channels."""

    norm_scale: jax.Array  # (C,), as norm_bias, b2 and scale
    norm_bias: jax.Array
    w1: jax.Array  # (C, 4 C)
    b1: jax.Array  # (4 C,)
    w2: jax.Array  # (4 C, C)
    b2: jax.Array
    scale: jax.Array  # layer scale


def norm_mlp(
    x: jax.Array,
    shortcut: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None = None,
    *,
    epsilon: float,
    implementation: Implementation,
) -> jax.Array:
    """`shortcut + gain * scale * (gelu(norm(x) @ w1 + b1) @ w2 + b2)`.

    Args:
      x: (N, H, W, C), what is normalized over C.
      shortcut: (N, H, W, C), the block's input, of the dtype of `x`.
      weights: of any float dtype; w1 and w2 are multiplied in the dtype of `x`.
      gain: (N,), drop path's factor for each example, which has no gradient; None for 1.
      epsilon: of the norm.
      implementation: "plain", or "fused" where `is_fused_faster` says so; on other platforms than
        its own it is the plain one, too.

    Returns:
      (N, H, W, C), the dtype of `x`.
    """
    if implementation == "plain":
        return _plain(x, shortcut, weights, gain, epsilon)
    if implementation == "fused":
        return _fused(x, shortcut, weights, gain, epsilon)
    raise InputError(f"implementation is {implementation!r}: choose 'plain' or 'fused'")


def is_fused_faster(
    shape: tuple[int, ...], dtype: jnp.dtype, *, with_gradient: bool, is_mapped: bool
) -> bool:
    """Whether "fused" is there, and the faster one, on the devices of this process.

    Args:
      shape: (N, H, W, C) of `x`.
      dtype: of `x`.
      with_gradient: whether it will be differentiated.
      is_mapped: see `depthwise_conv`.
    """
    from convnext_jax.ops import norm_mlp_hopper as kernels

    return (
        dtype == jnp.bfloat16
        and all(isinstance(side, int) for side in shape)
        and is_usable(is_mapped)
        and kernels.is_faster((shape[0] * shape[1] * shape[2], shape[3]), with_gradient)
    )


def _plain(
    x: jax.Array,
    shortcut: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    y = (normal * weights.norm_scale + weights.norm_bias).astype(x.dtype)
    y = y @ weights.w1.astype(x.dtype) + weights.b1.astype(x.dtype)
    y = activation("gelu")(y)
    w2, b2 = weights.w2 * weights.scale, weights.b2 * weights.scale
    y = y @ w2.astype(x.dtype) + b2.astype(x.dtype)
    if gain is not None:
        y *= gain.astype(x.dtype)[:, None, None, None]
    return shortcut + y


# The choice of platform lies inside the custom gradient, as that of the convolution.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(
    x: jax.Array,
    shortcut: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    def fused(x, shortcut, weights, gain):
        from convnext_jax.ops import norm_mlp_hopper as kernels

        rows = _rows(x), _rows(shortcut), *weights, _by_row(gain, x)
        return kernels.forward(*rows, epsilon=epsilon).reshape(x.shape)

    plain = functools.partial(_plain, epsilon=epsilon)
    return lax.platform_dependent(x, shortcut, weights, gain, cuda=fused, default=plain)


def _fused_forward(x, shortcut, weights, gain, epsilon):
    return _fused(x, shortcut, weights, gain, epsilon), (x, weights, gain)


def _fused_backward(epsilon, saved, g):
    dx, of_weights = _fused_gradients(*saved, g, epsilon)
    gain = saved[2]
    return dx, g, of_weights, None if gain is None else jnp.zeros_like(gain)


# With a gradient of its own as well, since kernels have none.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused_gradients(
    x: jax.Array, weights: NormMlpWeights, gain: jax.Array | None, g: jax.Array, epsilon: float
) -> tuple[jax.Array, NormMlpWeights]:
    from convnext_jax.ops import norm_mlp_hopper as kernels

    def fused(x, weights, gain, g):
        if gain is not None:
            g *= gain.astype(g.dtype)[:, None, None, None]
        dx, *gradients = kernels.backward(_rows(x), _rows(g), *weights, epsilon=epsilon)
        return dx.reshape(x.shape), NormMlpWeights(*gradients)

    plain = functools.partial(_plain_gradients, epsilon=epsilon)
    forms = {"cuda": fused} if kernels.backward_tiles((x.size // x.shape[-1], x.shape[-1])) else {}
    return lax.platform_dependent(x, weights, gain, g, **forms, default=plain)


def _plain_gradients(
    x: jax.Array, weights: NormMlpWeights, gain: jax.Array | None, g: jax.Array, epsilon: float
) -> tuple[jax.Array, NormMlpWeights]:
    branch = functools.partial(_plain, shortcut=jnp.zeros_like(x), gain=gain, epsilon=epsilon)
    return jax.vjp(lambda x, weights: branch(x, weights=weights), x, weights)[1](g)


_fused_gradients.defvjp(
    lambda *inputs: (_fused_gradients(*inputs), inputs[:4]),
    lambda epsilon, saved, cotangents: jax.vjp(
        functools.partial(_plain_gradients, epsilon=epsilon), *saved
    )[1](cotangents),
)
_fused.defvjp(_fused_forward, _fused_backward)


def _rows(maps: jax.Array) -> jax.Array:
    return maps.reshape(-1, maps.shape[-1])


def _by_row(gain: jax.Array | None, maps: jax.Array) -> jax.Array | None:
    """Each example's gain for each position of its map, f32."""
    if gain is None:
        return None
    return jnp.repeat(gain.astype(jnp.float32), maps.shape[1] * maps.shape[2])
