"""The second half of a block: LayerNorm, MLP with GELU, layer scale, drop path and residual.

One meaning, two implementations:

- `plain`: JAX operations, differentiable in every mode and to every order.
- `fused`: kernels for NVIDIA's Hopper GPUs, in bf16 (`norm_mlp_hopper.py`). Of narrow maps they
  never write the hidden layer, four times as wide, to memory, and nothing but the map that is
  normalized is kept for the gradient; of wide ones the hidden layer is, under the name "hidden".

`benchmarks/ops.py` measures them.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from convnext_jax.errors import InputError
from convnext_jax.ops.activations import activation
from convnext_jax.ops.hopper import is_usable
from convnext_jax.ops.layer_norm import layer_norm

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

    "fused" has a gradient of its own, so no forward-mode differentiation.

    Args:
      x: (N, H, W, C), what is normalized over C.
      shortcut: (N, H, W, C), the block's input, of the dtype of `x`.
      weights: of any float dtype; w1 and w2 are multiplied in the dtype of `x`.
      gain: (N,), drop path's factor for each example, which has no gradient; None for 1.
      epsilon: of the norm.
      implementation: "plain", or "fused" where `is_fused_faster` says so; on other platforms than
        its own, and for widths that are not its own, it is the plain one, too.

    Returns:
      (N, H, W, C), the dtype of `x`.

    Raises:
      InputError: weights that do not fit `x`.
    """
    width = x.shape[-1]
    shapes = dict.fromkeys(weights._fields, (width,))
    shapes |= {"w1": (width, 4 * width), "b1": (4 * width,), "w2": (4 * width, width)}
    for name, weight in weights._asdict().items():
        if weight.shape != shapes[name]:
            raise InputError(
                f"{name} is {weight.shape}, and for maps of {width} channels {shapes[name]}"
            )
    if shortcut.dtype != x.dtype:
        raise InputError(f"x is {x.dtype} and the shortcut {shortcut.dtype}: cast one of them")
    gain = None if gain is None else lax.stop_gradient(gain)
    if implementation == "plain":
        return _plain(x, shortcut, weights, gain, epsilon)
    if implementation == "fused":
        return _fused(x, shortcut, weights, gain, epsilon)
    raise InputError(f"implementation is {implementation!r}: choose 'plain' or 'fused'")


def is_fused_faster(x: jax.Array, *, with_gradient: bool, is_mapped: bool) -> bool:
    """Whether "fused" is there, and the faster one, on the devices of this process.

    Args:
      x: (N, H, W, C), what is normalized; may be traced.
      with_gradient: whether it will be differentiated.
      is_mapped: see `depthwise_conv`.
    """
    is_known = all(isinstance(side, int) for side in x.shape)
    if x.dtype != jnp.bfloat16 or not is_known or not is_usable(x, is_mapped):
        return False
    from convnext_jax.ops import norm_mlp_hopper as kernels

    return kernels.is_faster(_rows_shape(x), with_gradient)


def _plain(
    x: jax.Array,
    shortcut: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    return _output(_hidden(x, weights, epsilon), shortcut, weights, gain)


def _hidden(x: jax.Array, weights: NormMlpWeights, epsilon: float) -> jax.Array:
    y = layer_norm(x, weights.norm_scale, weights.norm_bias, epsilon).astype(x.dtype)
    return y @ weights.w1.astype(x.dtype) + weights.b1.astype(x.dtype)


def _output(
    h: jax.Array, shortcut: jax.Array, weights: NormMlpWeights, gain: jax.Array | None
) -> jax.Array:
    w2, b2 = weights.w2 * weights.scale, weights.b2 * weights.scale
    y = activation("gelu")(h) @ w2.astype(h.dtype) + b2.astype(h.dtype)
    if gain is not None:
        y *= gain.astype(h.dtype)[:, None, None, None]
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
    from convnext_jax.ops import norm_mlp_hopper as kernels

    def fused(x, shortcut, weights, gain):
        rows = _rows(x), _rows(shortcut), *map(_at_most_f32, weights), _by_row(gain, x)
        return kernels.forward(*rows, epsilon=epsilon).reshape(x.shape)

    plain = functools.partial(_plain, epsilon=epsilon)
    forms = {"cuda": fused} if kernels.forward_tiles(_rows_shape(x)) else {}
    return lax.platform_dependent(x, shortcut, weights, gain, **forms, default=plain)


def _fused_forward(x, shortcut, weights, gain, epsilon):
    from convnext_jax.ops import norm_mlp_hopper as kernels

    if kernels.backward_tiles(_rows_shape(x)):
        return _fused(x, shortcut, weights, gain, epsilon), (x, weights, gain, None)
    h = checkpoint_name(_hidden(x, weights, epsilon), "hidden")
    return _output(h, shortcut, weights, gain), (x, weights, gain, h)


def _fused_backward(epsilon, saved, g):
    dx, of_weights = _fused_gradients(*saved, g, epsilon)
    gain = saved[2]
    return dx, g, of_weights, None if gain is None else jnp.zeros_like(gain)


# With a gradient of its own as well, since kernels have none.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused_gradients(
    x: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None,
    h: jax.Array | None,
    g: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, NormMlpWeights]:
    """Those of `x` and the weights; `h` is the hidden layer before the GELU, where it was kept."""
    from convnext_jax.ops import norm_mlp_hopper as kernels

    def fused(x, weights, gain, h, g):
        if gain is not None:  # in f32, as the other direction has it
            wide = gain.astype(jnp.float32)[:, None, None, None]
            g = (g.astype(jnp.float32) * wide).astype(g.dtype)
        rows = _rows(x), _rows(g), *map(_at_most_f32, weights)
        if h is None:
            dx, *gradients = kernels.backward(*rows, epsilon=epsilon)
        else:
            dx, *gradients = kernels.backward_of_hidden(_rows(h), *rows, epsilon=epsilon)
        gradients = (d.astype(w.dtype) for d, w in zip(gradients, weights, strict=True))
        return dx.reshape(x.shape), NormMlpWeights(*gradients)

    def plain(x, weights, gain, h, g):
        return _plain_gradients(x, weights, gain, g, epsilon)

    forms = {"cuda": fused} if kernels.is_possible(_rows_shape(x)) else {}
    return lax.platform_dependent(x, weights, gain, h, g, **forms, default=plain)


def _plain_gradients(
    x: jax.Array, weights: NormMlpWeights, gain: jax.Array | None, g: jax.Array, epsilon: float
) -> tuple[jax.Array, NormMlpWeights]:
    branch = functools.partial(_plain, shortcut=jnp.zeros_like(x), gain=gain, epsilon=epsilon)
    return jax.vjp(lambda x, weights: branch(x, weights=weights), x, weights)[1](g)


def _gradients_backward(epsilon, saved, cotangents):
    x, weights, gain, h, g = saved
    plain = functools.partial(_plain_gradients, epsilon=epsilon)
    *of_first, of_g = jax.vjp(plain, x, weights, gain, g)[1](cotangents)
    # What depends on the hidden layer is counted as depending on what that is computed from.
    return *of_first, None if h is None else jnp.zeros_like(h), of_g


_fused_gradients.defvjp(
    lambda *inputs: (_fused_gradients(*inputs), inputs[:5]), _gradients_backward
)
_fused.defvjp(_fused_forward, _fused_backward)


def _at_most_f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.dtype(x.dtype).itemsize > 4 else x


def _rows(maps: jax.Array) -> jax.Array:
    return maps.reshape(-1, maps.shape[-1])


def _rows_shape(maps: jax.Array) -> tuple[int, int]:
    return math.prod(maps.shape[:-1]), maps.shape[-1]


def _by_row(gain: jax.Array | None, maps: jax.Array) -> jax.Array | None:
    """Each example's gain for each position of its map, f32."""
    if gain is None:
        return None
    return jnp.repeat(gain.astype(jnp.float32), maps.shape[1] * maps.shape[2])
