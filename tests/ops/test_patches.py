"""The product that patches amount to, beside XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convnext_jax.ops import hopper, patches


def convolution(x, kernel, bias):
    numbers = ("NHWC", "HWIO", "NHWC")
    return bias + lax.conv_general_dilated(
        x, kernel, kernel.shape[:2], "VALID", dimension_numbers=numbers
    )


# Pictures that patches fill, and that they do not; patches that are not square.
@pytest.mark.parametrize(
    ("sides", "patch"), [((8, 12), (4, 4)), ((7, 9), (2, 2)), ((6, 7), (3, 2))]
)  # fmt: skip
def test_the_product_is_the_convolution(sides, patch):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel, bias = (
            jnp.asarray(rng.standard_normal(shape))
            for shape in ((2, *sides, 3), (*patch, 3, 5), (5,))
        )
        results = []
        for form in (patches, convolution):
            y, pull = jax.vjp(form, x, kernel, bias)
            results.append((y, *pull(jnp.cos(y))))
        for found, expected in zip(*results, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("platform", "is_hopper", "has_convolution"),
    [("cpu", False, False), ("cuda", True, False), ("cuda", False, True), ("tpu", False, True)],
)
def test_where_the_product_is_taken(platform, is_hopper, has_convolution, monkeypatch):
    monkeypatch.setattr(hopper, "is_usable", lambda x, is_mapped: is_hopper)
    arguments = [jnp.zeros(shape) for shape in ((1, 8, 8, 3), (4, 4, 3, 5), (5,))]
    jitted = jax.jit(lambda *arguments: patches(*arguments))  # its own: traces are kept
    text = jitted.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == has_convolution
