"""Activations by Hugging Face's names (`activations.py` of transformers 4.37.2, and selu).

Every function is elementwise and keeps shape and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnext_jax.errors import InputError

Activation = Callable[[jax.Array], jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    """The input times Φ of it, the normal distribution function.

    The error function costs more than the matrix product before it on accelerators. In half
    precision Φ is computed to 2.4e-5 of itself, an eightieth of what rounding to bf16 does.
    """
    if jnp.dtype(x.dtype).itemsize > 2:
        return jax.nn.gelu(x, approximate=False)
    return _half_precision_gelu(x)


@jax.custom_jvp
def _half_precision_gelu(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * _normal_distribution(wide)[0]).astype(x.dtype)


@_half_precision_gelu.defjvp
def _half_precision_gelu_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    distribution, density = _normal_distribution(wide)
    slope = distribution + wide * density
    return (wide * distribution).astype(x.dtype), (slope * tangent).astype(x.dtype)


# Φ(-x) exp(x²/2) for x >= 0 is t (c0 + c1 t + ..) with t = 1 / (1 + x / 4), the form of Hastings
# ("Approximations for Digital Computers", 1955); these coefficients make the relative error least.
_TAIL = (0.1017743, 0.0772235, 0.189411, -0.1142605, 0.2458635)


def _normal_distribution(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Φ of f32 numbers, to 2.4e-5 of itself, and its derivative."""
    bell = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + 0.25 * jnp.abs(x))
    tail = jnp.zeros_like(t)
    for coefficient in reversed(_TAIL):
        tail = (tail + coefficient) * t
    tail *= bell
    return jnp.where(x < 0, tail, 1 - tail), bell * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_10(x: jax.Array) -> jax.Array:
    return jnp.clip(_gelu(x), -10, 10)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _laplace(x: jax.Array) -> jax.Array:
    # The normal distribution function fitted to relu² in "Mega" (arXiv:2209.10655): mean sqrt(1/2),
    # deviation sqrt(1 / 4 pi), in the digits that the original uses.
    return 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _linear(x: jax.Array) -> jax.Array:
    return x


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "laplace": _laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": _linear,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _relu2,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str | Activation) -> Activation:
    """The activation of this name; a callable is returned as it is.

    Raises:
      InputError: for an unknown name, listing the known ones.
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise InputError(f"there is no activation {name!r}: choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
