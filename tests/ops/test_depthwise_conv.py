"""Every implementation against the definition, written out in numpy in f64."""

import functools
import importlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import InputError
from convnext_jax.ops import depthwise_conv, hopper
from convnext_jax.ops import depthwise_conv_hopper as kernels

# The package's name for the function hides that of the module.
module = importlib.import_module("convnext_jax.ops.depthwise_conv")

IMPLEMENTATIONS = ["plain", "shifted", "toeplitz", "streamed", None]
SHAPES = [
    ((2, 9, 8, 3), (7, 7)),
    ((1, 2, 3, 4), (7, 7)),  # maps smaller than the kernel
    ((2, 1, 1, 2), (7, 7)),
    ((1, 6, 7, 2), (3, 5)),
    ((1, 6, 7, 2), (1, 1)),
    ((1, 6, 7, 1), (9, 3)),
    ((32, 3, 4, 2), (7, 7)),  # enough examples for the default to multiply matrices on a CPU
]


def taps_of(x, sides):
    """The input under each tap of the kernel: (kernel height, kernel width, *x.shape)."""
    (rows, columns), (height, width) = sides, x.shape[1:3]
    padded = np.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    return np.stack(
        [
            [padded[:, i : i + height, j : j + width] for j in range(columns)]
            for i in range(rows)
        ]
    )  # fmt: skip


def definition(x, kernel):
    return np.einsum("ijnhwc,ijc->nhwc", taps_of(x, kernel.shape[:2]), kernel[:, :, 0])


def gradients_by_definition(x, kernel, g):
    """Of sum(g * definition(x, kernel))."""
    kernel_gradient = np.einsum("ijnhwc,nhwc->ijc", taps_of(x, kernel.shape[:2]), g)
    return definition(g, kernel[::-1, ::-1]), kernel_gradient[:, :, None]


def random_arrays(shape, sides, dtype=np.float64, mean=0.0):
    rng = np.random.default_rng(0)
    shapes = (shape, (*sides, 1, shape[-1]), shape)
    return [(mean + rng.standard_normal(shape)).astype(dtype) for shape in shapes]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "sides"), SHAPES)
def test_values_and_gradients(shape, sides, implementation, x64):
    x, kernel, g = random_arrays(shape, sides)

    @jax.jit
    def run(x, kernel, g):
        y, pull = jax.vjp(lambda *a: depthwise_conv(*a, implementation=implementation), x, kernel)
        return y, *pull(g)

    y, x_gradient, kernel_gradient = run(x, kernel, g)
    assert y.dtype == x_gradient.dtype == kernel_gradient.dtype == jnp.float64
    np.testing.assert_allclose(y, definition(x, kernel), rtol=0, atol=1e-12)
    expected = gradients_by_definition(x, kernel, g)
    np.testing.assert_allclose(x_gradient, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(kernel_gradient, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_order(implementation, x64):
    x, kernel, _ = random_arrays((1, 5, 4, 2), (3, 3))

    def energy(x, kernel):
        return (depthwise_conv(x, kernel, implementation=implementation) ** 2).sum() / 2

    def slope(x, kernel):
        return sum((g**2).sum() for g in jax.grad(energy, (0, 1))(x, kernel)) / 2

    got = jax.jit(jax.grad(slope, (0, 1)))(x, kernel)

    # Against central differences of the same from the definition of the gradients.
    def slope_by_definition(x, kernel):
        y = definition(x, kernel)
        return sum((g**2).sum() for g in gradients_by_definition(x, kernel, y)) / 2

    for which, gradient in enumerate(got):
        direction = random_arrays((1, 5, 4, 2), (3, 3), mean=1.0)[which]
        step = 1e-4
        ends = []
        for sign in (1, -1):
            arguments = [x, kernel]
            arguments[which] = arguments[which] + sign * step * direction
            ends.append(slope_by_definition(*arguments))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (np.asarray(gradient) * direction).sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_f32(dtype, implementation):
    """One rounding at the end: sums of like signs in `dtype` itself would lose several digits."""
    x, kernel, g = random_arrays((4, 12, 12, 4), (7, 7), dtype, mean=3.0)
    y, pull = jax.vjp(lambda *a: depthwise_conv(*a, implementation=implementation), x, kernel)
    x, kernel, g64 = (np.asarray(a, np.float64) for a in (x, kernel, g))
    expected = (definition(x, kernel), *gradients_by_definition(x, kernel, g64))
    for got, value in zip((y, *pull(jnp.asarray(g))), expected, strict=True):
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, np.float64) - value) / np.abs(value)
        assert error.max() < 0.51 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_inputs_and_kernels(implementation):
    x, kernel, _ = random_arrays((2, 5, 6, 4), (3, 3), np.float32)
    xs, kernels = np.stack([x, 2 * x, x + 1]), np.stack([kernel, kernel + 1, -kernel])

    def energy(x, kernel):
        return (depthwise_conv(x, kernel, implementation=implementation) ** 2).sum()

    gradients = jax.grad(energy, (0, 1))
    together = jax.jit(jax.vmap(gradients))(xs, kernels)
    for i in range(3):
        for got, expected in zip(together, gradients(xs[i], kernels[i]), strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_for_the_plain_form():
    x, kernel, direction = random_arrays((1, 5, 4, 2), (3, 3), np.float32)

    def run(implementation):
        return jax.jvp(
            lambda x: depthwise_conv(x, kernel, implementation=implementation), (x,), (direction,)
        )

    np.testing.assert_allclose(run("plain")[1], definition(direction, kernel), rtol=0, atol=1e-5)
    for implementation in ("shifted", "toeplitz", None):
        with pytest.raises(TypeError, match="forward-mode"):
            run(implementation)


@pytest.mark.parametrize(
    "shape", [(7, 7, 1, 3), (6, 7, 1, 4), (7, 6, 1, 4), (7, 7, 4, 1), (7, 7, 4, 4)]
)
def test_a_kernel_of_another_shape(shape):
    with pytest.raises(InputError, match=r"\(odd, odd, 1, 4\)"):
        depthwise_conv(jnp.zeros((1, 8, 8, 4)), jnp.zeros(shape))


def test_an_unknown_implementation():
    with pytest.raises(InputError, match=r"'fast'.*'plain', 'shifted', 'toeplitz'"):
        depthwise_conv(jnp.zeros((1, 8, 8, 4)), jnp.zeros((7, 7, 1, 4)), implementation="fast")


@pytest.mark.parametrize(
    ("platform", "shape", "chosen"),
    [
        ("cpu", (32, 8, 8, 4), "toeplitz"),
        ("cpu", (31, 8, 8, 4), "shifted"),
        ("cpu", (32, 8, 9, 4), "shifted"),
        ("cuda", (16, 8, 8, 4), "toeplitz"),
        ("cuda", (15, 8, 8, 4), "plain"),
        ("cuda", (16, 8, 9, 4), "plain"),
        ("tpu", (32, 8, 8, 4), "plain"),
        ("rocm", (32, 8, 8, 4), "plain"),
    ],
)
def test_what_the_default_takes(platform, shape, chosen, monkeypatch):
    """By the operations that each form alone is made of, without a Hopper GPU."""
    monkeypatch.setattr(hopper, "_are_there", lambda: False)

    def run(x, kernel):
        y, pull = jax.vjp(depthwise_conv, x, kernel)
        return y, pull(y)

    traced = jax.jit(run).trace(jnp.zeros(shape), jnp.zeros((7, 7, 1, shape[-1])))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    held = {op for op in ("convolution", "dot_general", "while") if f"stablehlo.{op}" in text}
    expected = {
        "plain": {"convolution"},
        "shifted": {"while", "dot_general"},
        "toeplitz": {"dot_general"},
    }
    assert held == expected[chosen]


def test_a_batch_of_any_size_is_exported():
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 8, 8, 4), (7, 7, 1, 4))
    ]
    exported = jax.export.export(jax.jit(depthwise_conv))(*shapes)
    x, kernel, _ = random_arrays((40, 8, 8, 4), (7, 7), np.float32)
    np.testing.assert_allclose(exported.call(x, kernel), definition(x, kernel), rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias(implementation, x64):
    x, kernel, g = random_arrays((2, 5, 6, 4), (3, 3))
    bias = np.arange(4.0)
    y, pull = jax.vjp(
        lambda *a: depthwise_conv(*a, implementation=implementation), x, kernel, bias
    )  # fmt: skip
    np.testing.assert_allclose(y, definition(x, kernel) + bias, rtol=0, atol=1e-12)
    expected = (*gradients_by_definition(x, kernel, g), g.sum((0, 1, 2)))
    for got, value in zip(pull(g), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-12)


# Tiles of the whole height and of less, of the whole width and of less, and that do not fill a map.
@pytest.mark.parametrize(
    ("shape", "sides", "blocks"),
    [(shape, sides, None) for shape, sides in SHAPES]
    + [
        ((2, 13, 9, 40), (7, 7), kernels.Blocks(5, 4, slots=7)),
        ((2, 14, 28, 32), (7, 7), kernels.Blocks(14, 14, unroll=2, slots=3)),
        ((1, 8, 16, 24), (5, 3), kernels.Blocks(4, 8, warps=2, unroll=4, slots=2)),
        ((3, 7, 7, 16), (7, 7), kernels.Blocks(7, 7, per_thread=2)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels(shape, sides, blocks, dtype):
    x, kernel, g = random_arrays(shape, sides, dtype)
    bias = np.arange(shape[-1]).astype(dtype)
    how = {"blocks": blocks, "interpret": jax.default_backend() != "gpu"}
    y = kernels.forward(x, kernel, bias, **how)
    gradient = kernels.kernel_gradient(x, g, sides, **how)
    assert y.dtype == gradient.dtype == dtype
    x, kernel, g, bias = (np.asarray(a, np.float64) for a in (x, kernel, g, bias))
    taps = taps_of(x, sides)
    # Of sums as long as these; half a unit in the last place more for what is rounded to bf16.
    last = float(jnp.finfo(dtype).eps) / 2 if dtype == jnp.bfloat16 else 0
    for got, value, size in (
        (y, definition(x, kernel) + bias, np.abs(definition(np.abs(x), np.abs(kernel))) + bias),
        (gradient, gradients_by_definition(x, kernel, g)[1],
         np.einsum("ijnhwc,nhwc->ijc", np.abs(taps), np.abs(g))[:, :, None]),
    ):  # fmt: skip
        error = np.abs(np.asarray(got, np.float64) - value)
        assert (error <= 2e-6 * size + 1.01 * last * np.abs(value)).all()


def test_gradients_of_the_kernels_gradient(monkeypatch):
    x, kernel, g = random_arrays((2, 5, 6, 4), (3, 3), np.float32)
    interpreted = functools.partial(
        kernels.kernel_gradient, interpret=jax.default_backend() != "gpu"
    )
    monkeypatch.setattr(kernels, "kernel_gradient", interpreted)
    cotangent = kernel + 1
    ours = jax.vjp(lambda x, g: module._streamed_kernel_gradient(x, g, (3, 3)), x, g)[1](cotangent)
    plain = jax.vjp(lambda x, g: module._plain_gradients(x, kernel, g, None)[1], x, g)[1](cotangent)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
