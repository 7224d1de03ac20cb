import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import InputError
from convnext_jax.ops import ACTIVATIONS, activation

erf = np.vectorize(math.erf)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def selu(x):
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    return scale * np.where(x > 0, x, alpha * np.expm1(x))


FORMULAS = {
    "gelu": gelu,
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": lambda x: 0.5 * (1 + erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": selu,
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name):
    x = np.linspace(-13, 13, 1001)
    with jax.enable_x64(True):
        y = activation(name)(jnp.asarray(x))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, FORMULAS[name](x), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_is_kept(name, dtype):
    x = jnp.linspace(-3, 3, 25).astype(dtype)
    y = activation(name)(x)
    assert y.dtype == dtype
    expected = FORMULAS[name](np.asarray(x, np.float64))
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gelu_in_half_precision_is_rounded_once(dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    x = x[np.isfinite(x.astype(np.float32))]
    wide = x.astype(np.float64)
    distribution = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in wide])
    density = np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    eps, smallest = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)

    def check(found, expected, tolerance):
        # Half a step of the dtype, and what Φ is off. XLA takes numbers below the smallest for 0,
        # and Φ can be one of them where its derivative, 170 times as much, is not.
        error = np.abs(np.asarray(found, np.float64) - expected)
        step = np.exp2(np.floor(np.log2(np.maximum(np.abs(expected), smallest)))) * eps
        tiny = np.abs(expected) < 200 * smallest
        bound = np.where(tiny, 200 * smallest, step / 2 + tolerance * np.abs(expected))
        worst = np.argmax(error / bound)
        assert error[worst] <= bound[worst], (found[worst], expected[worst])

    gelu, slope = jax.jit(
        lambda x: jax.jvp(activation("gelu"), (x,), (jnp.ones_like(x),))
    )(x)  # fmt: skip
    assert gelu.dtype == slope.dtype == dtype
    check(gelu, wide * distribution, 2.5e-5)
    # Near its zero at -0.75 the slope is the difference of two numbers, each with an error.
    far = np.abs(wide + 0.75) > 0.1
    check(slope[far], (distribution + wide * density)[far], 2e-4)
    assert np.array_equal(np.asarray(jax.jit(activation("gelu"))(x)), np.asarray(gelu))
    backward = jax.jit(jax.vmap(jax.grad(activation("gelu"))))(x)
    assert np.array_equal(np.asarray(backward), np.asarray(slope))


def test_gelu_in_single_precision_is_exact_to_some_roundings():
    x = np.linspace(-12.5, 9, 20001, dtype=np.float32)
    wide = x.astype(np.float64)
    distribution = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in wide])
    density = np.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    gelu = activation("gelu")
    slope = jax.grad(gelu)
    found = jax.jit(jax.vmap(lambda x: (gelu(x), slope(x), jax.grad(slope)(x))))(x)
    expected = wide * distribution, distribution + wide * density, (2 - wide**2) * density
    # Rounding x² / 2 is an error of the exponential's argument: a relative one of its result.
    rounding = (4 + wide**2 / 2) * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_array_less(
        np.abs(np.asarray(found[0]) - expected[0]), rounding * np.abs(expected[0]) + 1e-37
    )
    for derivative, exact in zip(found[1:], expected[1:], strict=True):
        # A sum of two terms with the errors of each.
        terms = distribution + (2 + np.abs(wide) + wide**2) * density
        np.testing.assert_array_less(np.abs(np.asarray(derivative) - exact), rounding * terms)


def test_gelu_of_numbers_that_are_none_or_huge():
    x = jnp.asarray([0.0, 1e30, -1e30, jnp.inf, jnp.nan], jnp.float32)
    y = activation("gelu")(x)
    np.testing.assert_array_equal(y, jnp.asarray([0.0, 1e30, 0.0, jnp.inf, jnp.nan], jnp.float32))
    slope = jax.vmap(jax.grad(activation("gelu")))(x[:3])
    np.testing.assert_allclose(slope, [0.5, 1, 0], rtol=2e-7, atol=1e-7)


def test_a_callable_is_itself():
    assert activation(jnp.sin) is jnp.sin


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(InputError) as error:
        activation("gleu")
    assert "\n" not in str(error.value)
    for name in ("gleu", *ACTIVATIONS):
        assert name in str(error.value)
