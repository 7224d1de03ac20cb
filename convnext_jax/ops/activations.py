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
    return jax.nn.gelu(x, approximate=False)


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
