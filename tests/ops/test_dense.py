import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.ops import dense


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (7, 8), (0, 3, 5, 8)])
def test_values_and_derivatives_in_f64(shape):
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(s) for s in (shape, (8, 12), (12,)))
    g = rng.standard_normal((*shape[:-1], 12))
    with jax.enable_x64(True):
        inputs = [jnp.asarray(array) for array in (x, kernel, bias)]
        y, pull = jax.vjp(jax.jit(dense), *inputs)
        of_x, of_kernel, of_bias = pull(jnp.asarray(g))
        tangent = jax.jvp(dense, inputs, [jnp.asarray(array) for array in (x, kernel, bias)])[1]
        exact = {"rtol": 1e-12, "atol": 1e-12}
        np.testing.assert_allclose(y, x @ kernel + bias, **exact)
        np.testing.assert_allclose(of_x, g @ kernel.T, **exact)
        rows, gradients = x.reshape(-1, 8), g.reshape(-1, 12)
        np.testing.assert_allclose(of_kernel, rows.T @ gradients, **exact)
        np.testing.assert_allclose(of_bias, gradients.sum(0), **exact)
        np.testing.assert_allclose(tangent, 2 * (x @ kernel) + bias, **exact)


def test_the_dtype_is_kept():
    x, kernel, bias = (jnp.ones(s, jnp.bfloat16) for s in ((2, 3, 3, 4), (4, 8), (8,)))
    assert dense(x, kernel, bias).dtype == jnp.bfloat16
