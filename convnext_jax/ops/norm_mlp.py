"""The second half of a block: LayerNorm, MLP with GELU, layer scale, drop path and residual.

One meaning, two implementations:

- `plain`: JAX operations, differentiable in every mode and to every order.
- `fused`: kernels in bf16, for NVIDIA's Hopper GPUs (`norm_mlp_hopper.py`) and for TPUs
  (`norm_mlp_tpu.py`). They never write the hidden layer, four times as wide, to memory, and nothing
  but the map that is normalized is kept for the gradient; of wide maps on a GPU the hidden layer
  is, under the name "hidden".

`benchmarks/ops.py` measures them, but for those of TPUs, which no one has run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from convnext_jax.errors import InputError
from convnext_jax.ops import hopper, tpu
from convnext_jax.ops.activations import activation
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
    """Whether "fused" is there, and the faster one, on the devices of the program at hand.

    Args:
      x: (N, H, W, C), what is normalized; may be traced.
      with_gradient: whether it will be differentiated.
      is_mapped: see `depthwise_conv`.
    """
    is_known = all(isinstance(side, int) for side in x.shape)
    if x.dtype != jnp.bfloat16 or not is_known:
        return False
    if tpu.is_usable(x, is_mapped):
        from convnext_jax.ops import norm_mlp_tpu

        return norm_mlp_tpu.is_faster(x.shape)
    if not hopper.is_usable(x, is_mapped):
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
    forms = {}
    if tpu.is_target():
        from convnext_jax.ops import norm_mlp_tpu

        def on_tpu(x, shortcut, weights, gain):
            narrow = jax.tree.map(_at_most_f32, weights)
            return norm_mlp_tpu.forward(x, shortcut, narrow, gain, epsilon=epsilon)

        if norm_mlp_tpu.is_possible(_rows_shape(x)):
            forms["tpu"] = on_tpu
    else:
        from convnext_jax.ops import norm_mlp_hopper

        def on_hopper(x, shortcut, weights, gain):
            rows = _rows(x), _rows(shortcut), *map(_at_most_f32, weights), _by_row(gain, x)
            return norm_mlp_hopper.forward(*rows, epsilon=epsilon).reshape(x.shape)

        if norm_mlp_hopper.forward_tiles(_rows_shape(x)):
            forms["cuda"] = on_hopper
    plain = functools.partial(_plain, epsilon=epsilon)
    return lax.platform_dependent(x, shortcut, weights, gain, **forms, default=plain)


def _fused_forward(x, shortcut, weights, gain, epsilon):
    if tpu.is_target() or _is_hidden_again(x):
        return _fused(x, shortcut, weights, gain, epsilon), (x, weights, gain, None)
    h = checkpoint_name(_hidden(x, weights, epsilon), "hidden")
    return _output(h, shortcut, weights, gain), (x, weights, gain, h)


def _is_hidden_again(x: jax.Array) -> bool:
    """Whether a Hopper GPU computes the hidden layer again for the gradient, or it is kept."""
    from convnext_jax.ops import norm_mlp_hopper

    return norm_mlp_hopper.backward_tiles(_rows_shape(x)) is not None


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
    forms = {}
    if tpu.is_target():
        from convnext_jax.ops import norm_mlp_tpu

        def on_tpu(x, weights, gain, h, g):
            narrow = jax.tree.map(_at_most_f32, weights)
            dx, gradients = norm_mlp_tpu.backward(x, g, narrow, gain, epsilon=epsilon)
            return dx, _like(weights, gradients)

        if norm_mlp_tpu.is_possible(_rows_shape(x)):
            forms["tpu"] = on_tpu
    else:
        from convnext_jax.ops import norm_mlp_hopper

        def on_hopper(x, weights, gain, h, g):
            if gain is not None:  # in f32, as the other direction has it
                wide = gain.astype(jnp.float32)[:, None, None, None]
                g = (g.astype(jnp.float32) * wide).astype(g.dtype)
            rows = _rows(x), _rows(g), *map(_at_most_f32, weights)
            if h is None:
                dx, *gradients = norm_mlp_hopper.backward(*rows, epsilon=epsilon)
            else:
                dx, *gradients = norm_mlp_hopper.backward_of_hidden(
                    _rows(h), *rows, epsilon=epsilon
                )
            return dx.reshape(x.shape), _like(weights, gradients)

        if norm_mlp_hopper.is_possible(_rows_shape(x)):
            forms["cuda"] = on_hopper

    def plain(x, weights, gain, h, g):
        return _plain_gradients(x, weights, gain, g, epsilon)

    return lax.platform_dependent(x, weights, gain, h, g, **forms, default=plain)


def _like(weights: NormMlpWeights, gradients: Iterable[jax.Array]) -> NormMlpWeights:
    """The gradients in the dtypes of the weights."""
    return NormMlpWeights(*(d.astype(w.dtype) for d, w in zip(gradients, weights, strict=True)))


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
