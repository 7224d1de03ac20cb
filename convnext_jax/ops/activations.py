"""Activations by Hugging Face's names (`activations.py` of transformers 4.37.2, and selu).

Every function is elementwise and keeps shape and dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from convnext_jax.errors import InputError

Activation = Callable[[jax.Array], jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    """The input times Φ of it, the normal distribution function.

    The error function costs more than the matrix product before it on accelerators, and on a CPU
    a quarter of a small network's time. In f32, Φ is computed to some roundings and, in its lower
    tail, those of x² / 2; in half precision to 2.4e-5 of itself, an eightieth of what rounding to
    bf16 does.
    """
    size = jnp.dtype(x.dtype).itemsize
    if size > 4:
        return jax.nn.gelu(x, approximate=False)
    wide = x.astype(jnp.float32)
    return (wide * _normal_distribution(wide, size == 2)).astype(x.dtype)


# Φ(-x) exp(x²/2) for x >= 0 is t (c0 + c1 t + ..) with t = 1 / (1 + a x), the form of Hastings
# ("Approximations for Digital Computers", 1955); these coefficients make the relative error least.
_TAIL = 0.3, (0.1196293, 0.12075395, 0.09991354, 0.12856147,
              -0.053683361, 0.20635321, -0.1572029, 0.035674735)  # fmt: skip
_HALF_PRECISION_TAIL = 0.25, (0.1017743, 0.0772235, 0.189411, -0.1142605, 0.2458635)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normal_distribution(x: jax.Array, is_half_precision: bool) -> jax.Array:
    a, coefficients = _HALF_PRECISION_TAIL if is_half_precision else _TAIL
    t = 1 / (1 + a * jnp.abs(x))
    tail = jnp.zeros_like(t)
    for coefficient in reversed(coefficients):
        tail = (tail + coefficient) * t
    tail *= _bell(x, is_half_precision)
    return jnp.where(x < 0, tail, 1 - tail)


@_normal_distribution.defjvp
def _normal_distribution_jvp(
    is_half_precision: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The compiler sees that both have the same exponential.
    density = _bell(*primals, is_half_precision) * (1 / math.sqrt(2 * math.pi))
    return _normal_distribution(*primals, is_half_precision), density * tangents[0]


def _bell(x: jax.Array, is_half_precision: bool) -> jax.Array:
    """exp(-x²/2)."""
    return jnp.exp(-0.5 * x * x) if is_half_precision else _own_bell(x)


# 2^x for |x| <= 1/2 to 2e-9.
_EXP2 = (1.0, 0.69314721, 0.24022647, 0.055503288, 0.009618489, 0.0013399936, 0.00015345823)


@jax.custom_jvp
def _own_bell(x: jax.Array) -> jax.Array:
    """exp(-x²/2) of f32 numbers.

    XLA's CPU backend guards its exponential against numbers that cannot come up here: for atto, a
    training step is 8 % longer with it.
    """
    exponent = jnp.maximum(x * x * (-0.5 / math.log(2)), -126.0)
    whole = jnp.floor(exponent + 0.5)
    rest = exponent - whole
    power = jnp.zeros_like(rest)
    for coefficient in reversed(_EXP2):
        power = power * rest + coefficient
    # Adding to the bits of the exponent multiplies by a power of two.
    bits = lax.bitcast_convert_type(power, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


@_own_bell.defjvp
def _own_bell_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    bell = _own_bell(x)
    return bell, -x * bell * tangent


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_10(x: jax.Array) -> jax.Array:
    return jnp.clip(_gelu(x), -10, 10)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _laplace(x: jax.Array) -> jax.Array:
    # The normal distribution function fitted to relu² in "Mega" (arXiv:2209.10655): mean sqrt(1/2),
    # deviation sqrt(1 / 4 pi), in the digits that the original uses.
    return 0.5 * (1.0 + lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


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
