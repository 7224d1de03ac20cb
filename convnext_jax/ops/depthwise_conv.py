"""Depthwise convolution, stride 1, zero padding that keeps the size.

One meaning, four implementations:

- `plain`: XLA's grouped convolution, differentiable in every mode and to every order.
- `shifted`: a sum of shifted copies of the input, one a tap of the kernel, and for the kernel's
  gradient a sum of products. XLA's CPU backend has no kernel of its own for grouped convolutions;
  on two cores and a 7x7 kernel this form is 8 to 38 times faster, and 2 to 56 times for the
  kernel's gradient.
- `toeplitz`: each channel's map as a vector, multiplied by the matrix that its kernel amounts to.
  Most of that matrix is zeros, but on maps of up to 8x8 the products are small enough for what
  multiplies matrices. On an NVIDIA H100 they are as fast as cuDNN forward and for the input's
  gradient, and 1.5 to 42 times for the kernel's gradient, which cuDNN is slow at on maps of 7x7; on
  a CPU, with enough examples, they are faster than `shifted` for the kernel's gradient.

- `streamed`: kernels for NVIDIA's Hopper GPUs (`depthwise_conv_hopper.py`): on an H100 two to four
  times as fast as cuDNN, where that has no bad luck in its search for an algorithm. Elsewhere, and
  in f64, it is `plain`.

`benchmarks/ops.py` measures them. The last three have gradients of their own, so no forward-mode
differentiation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convnext_jax.errors import InputError
from convnext_jax.ops import hopper

Implementation = Literal["plain", "shifted", "toeplitz", "streamed"]
Choice = tuple[tuple[str, Implementation], ...]  # an implementation for each platform


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
    precision: lax.PrecisionLike = None,
    is_mapped: bool = False,
) -> jax.Array:
    """Convolves each channel of `x` with its own kernel (cross-correlation, as in every framework).

    Args:
      x: (batch, height, width, channels), f64, f32, bf16 or f16, which the result keeps; products
        are summed in at least f32.
      kernel: (kernel height, kernel width, 1, channels), both sides odd, the dtype of `x`.
      bias: (channels,), added to the result, the dtype of `x`; None for 0.
      implementation: "plain", "shifted", "toeplitz" or "streamed"; None takes the fastest for the
        shape and the platform that the program runs on. Give "plain" for forward-mode derivatives
        and Hessians.
      precision: of the products, as in `jax.lax.conv_general_dilated`. "shifted" multiplies
        elementwise, and "streamed" in f32: they have no use for it.
      is_mapped: whether this is within `jax.pmap` or `jax.shard_map`, so that `x` lies on one
        device. Of several devices, None takes "streamed" there alone: XLA cannot split a kernel.

    Returns:
      (batch, height, width, channels).
    """
    sides, channels = kernel.shape[:2], x.shape[-1]
    if kernel.shape[2:] != (1, channels) or sides[0] % 2 == 0 or sides[1] % 2 == 0:
        raise InputError(
            f"a depthwise kernel for {channels} channels has the shape (odd, odd, 1, {channels}), "
            f"not {kernel.shape}"
        )
    if implementation == "plain":
        return _with_bias(_plain)(x, kernel, bias, precision)
    if implementation is None:
        return _convolve(x, kernel, bias, _fastest(x, is_mapped), precision)
    if implementation == "streamed" and _is_streamable(x):
        return _convolve(x, kernel, bias, _STREAMED, precision)
    if implementation in _FORMS:
        form = "plain" if implementation == "streamed" else implementation
        return _convolve(x, kernel, bias, (("default", form),), precision)
    raise InputError(
        f"implementation is {implementation!r}: choose 'plain', 'shifted', 'toeplitz', 'streamed' "
        "or None"
    )


def _fastest(x: jax.Array, is_mapped: bool) -> Choice:
    if not _is_known(x):
        return ("cpu", "shifted"), ("default", "plain")
    batch, positions = x.shape[0], x.shape[1] * x.shape[2]
    # The matrix costs the same for any batch.
    cpu = "toeplitz" if batch >= 32 and positions <= 8 * 8 else "shifted"
    cuda = "toeplitz" if batch >= 16 and positions <= 8 * 8 else "plain"
    if _is_streamable(x) and hopper.is_usable(x, is_mapped):
        cuda = "streamed"
    return ("cpu", cpu), ("cuda", cuda), ("default", "plain")


def _is_streamable(x: jax.Array) -> bool:
    """Sums in f32 are enough, and positions are numbers of 30 bits."""
    return jnp.dtype(x.dtype).itemsize <= 4 and _is_known(x) and 0 < x.size < 2**30


def _is_known(x: jax.Array) -> bool:
    """Whether its size is; in `jax.export` it may be any."""
    return all(isinstance(side, int) for side in x.shape)


# The choice of platform lies inside the custom gradient, so that a branch not taken leaves nothing
# behind in what is saved for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    by_platform: Choice,
    precision: lax.PrecisionLike,
) -> jax.Array:
    forms = {
        platform: functools.partial(_FORMS[name].forward, precision=precision)
        for platform, name in by_platform
    }
    return lax.platform_dependent(x, kernel, bias, **forms)


def _convolve_backward(
    by_platform: Choice,
    precision: lax.PrecisionLike,
    saved: tuple[jax.Array, jax.Array, jax.Array | None],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    forms = {
        platform: functools.partial(_FORMS[name].gradients, precision=precision)
        for platform, name in by_platform
    }
    x, kernel, bias = saved
    of_bias = None if bias is None else g.sum((0, 1, 2))
    return *lax.platform_dependent(x, kernel, g, **forms), of_bias


_convolve.defvjp(lambda *inputs: (_convolve(*inputs), inputs[:3]), _convolve_backward)


def _with_bias(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def biased(
        x: jax.Array, kernel: jax.Array, bias: jax.Array | None, precision: lax.PrecisionLike
    ) -> jax.Array:
        y = forward(x, kernel, precision)
        return y if bias is None else y + bias

    return biased


# Plain --------------------------------------------------------------------------------------------


def _plain(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(side // 2, side // 2) for side in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


def _plain_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(functools.partial(_plain, precision=precision), x, kernel)[1](g)


# Shifted ------------------------------------------------------------------------------------------


def _shifted(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    height, width = x.shape[1:3]
    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    padded, taps = _pad(x, kernel).astype(sum_dtype), kernel[:, :, 0].astype(sum_dtype)

    def convolve(_: jax.Array, y: jax.Array) -> jax.Array:
        # Unrolled on purpose: XLA makes one loop of it that reads and writes each value once.
        total = jnp.zeros((), sum_dtype)
        for i in range(taps.shape[0]):
            for j in range(taps.shape[1]):
                total += padded[:, i : i + height, j : j + width] * taps[i, j]
        return total.astype(x.dtype)

    # XLA would compute the sum again in everything that uses it: a norm's mean, its variance and
    # its result. Not so what a loop gives; this one has a single round, which XLA does not know.
    rounds = lax.optimization_barrier(jnp.int32(1))
    return lax.fori_loop(0, rounds, convolve, x)


def _shifted_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    height, width = x.shape[1:3]
    # The input's gradient is the same operation with the kernel turned by half a turn.
    x_gradient = _convolve(g, kernel[::-1, ::-1], None, (("default", "shifted"),), precision)

    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    padded, g = _pad(x, kernel).astype(sum_dtype), g.astype(sum_dtype)
    ones = jnp.ones(height * width, sum_dtype)

    def of_picture(padded: jax.Array, g: jax.Array) -> jax.Array:
        def row_of_taps(i: jax.Array) -> jax.Array:
            lines = lax.dynamic_slice_in_dim(padded, i, height)
            products = [lines[:, j : j + width] * g for j in range(kernel.shape[1])]
            # Sums by a product with ones, which XLA has a fast kernel for.
            rows = [p.reshape(height * width, -1) for p in products]
            return jnp.stack([jnp.dot(ones, r, precision="highest") for r in rows])

        # Loops, so that a picture is in the cache while all taps are summed; all taps unrolled run
        # (and compile) several times slower.
        return lax.map(row_of_taps, jnp.arange(kernel.shape[0]))

    if _is_known(x):
        of_pictures = lax.map(lambda maps: of_picture(*maps), (padded, g))
    else:
        of_pictures = jax.vmap(of_picture)(padded, g)
    kernel_gradient = of_pictures.sum(0)
    return x_gradient, kernel_gradient[:, :, None].astype(kernel.dtype)


def _pad(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


# Toeplitz -----------------------------------------------------------------------------------------


def _toeplitz(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    matrix = _matrix_of_kernel(kernel, x.shape[1:3])
    y = _multiply("nqc,cpq->npc", _as_vectors(x), matrix, precision)
    return y.astype(x.dtype).reshape(x.shape)


def _toeplitz_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    matrix = _matrix_of_kernel(kernel, x.shape[1:3])
    x_gradient = _multiply("npc,cpq->nqc", _as_vectors(g), matrix, precision)
    matrix_gradient = _multiply("npc,nqc->cpq", _as_vectors(g), _as_vectors(x), precision)
    kernel_gradient = _kernel_of_matrix(matrix_gradient, x.shape[1:3], kernel.shape)
    return x_gradient.astype(x.dtype).reshape(x.shape), kernel_gradient.astype(kernel.dtype)


def _as_vectors(maps: jax.Array) -> jax.Array:
    return maps.reshape(len(maps), -1, maps.shape[-1])


def _multiply(spec: str, a: jax.Array, b: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """An einsum with sums, and a result, of at least f32."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    einsum = functools.partial(jnp.einsum, spec, precision=precision, preferred_element_type=wide)
    # XLA's CPU backend has not every product of half precision that is summed in single.
    return lax.platform_dependent(
        a, b, cpu=lambda a, b: einsum(a.astype(wide), b.astype(wide)), default=einsum
    )


def _matrix_of_kernel(kernel: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """(channels, height * width of the output, height * width of the input), the taps unchanged."""
    rows, columns = _places(sides, kernel.shape, kernel.dtype)
    matrix = jnp.einsum("ijc,jxv->cixv", kernel[:, :, 0], columns, precision="highest")
    matrix = jnp.einsum("cixv,iyu->cyxuv", matrix, rows, precision="highest")
    return matrix.reshape(len(matrix), sides[0] * sides[1], -1)


def _kernel_of_matrix(
    matrix: jax.Array, sides: tuple[int, int], shape: tuple[int, ...]
) -> jax.Array:
    """The transpose of `_matrix_of_kernel`: for each tap, the sum of where it stands."""
    rows, columns = _places(sides, shape, matrix.dtype)
    matrix = matrix.reshape(len(matrix), *sides, *sides)
    total = jnp.einsum("cyxuv,iyu->cixv", matrix, rows, precision="highest")
    return jnp.einsum("cixv,jxv->ijc", total, columns, precision="highest")[:, :, None]


def _places(
    sides: tuple[int, int], shape: tuple[int, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """For rows and for columns, (taps, out, in): 1 where a tap of `out` lies on `in`."""
    return tuple(
        jnp.asarray(np.stack([np.eye(side, k=tap - taps // 2) for tap in range(taps)]), dtype)
        for side, taps in zip(sides, shape[:2], strict=True)
    )


# Streamed -----------------------------------------------------------------------------------------


def _streamed(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, precision: lax.PrecisionLike
) -> jax.Array:
    from convnext_jax.ops import depthwise_conv_hopper as kernels

    return kernels.forward(x, kernel, bias)


def _streamed_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, precision: lax.PrecisionLike
) -> tuple[jax.Array, jax.Array]:
    # Both by functions that have gradients again.
    x_gradient = _convolve(g, kernel[::-1, ::-1], None, _STREAMED, precision)
    return x_gradient, _streamed_kernel_gradient(x, g, kernel.shape[:2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _streamed_kernel_gradient(x: jax.Array, g: jax.Array, sides: tuple[int, int]) -> jax.Array:
    from convnext_jax.ops import depthwise_conv_hopper as kernels

    return kernels.kernel_gradient(x, g, sides)


_streamed_kernel_gradient.defvjp(
    lambda x, g, sides: (_streamed_kernel_gradient(x, g, sides), (x, g)),
    lambda sides, saved, cotangent: (
        _convolve(saved[1], cotangent[::-1, ::-1], None, _STREAMED, None),
        _convolve(saved[0], cotangent, None, _STREAMED, None),
    ),
)


class _Form(NamedTuple):
    forward: Callable[..., jax.Array]  # of x, kernel, bias, precision
    gradients: Callable[..., tuple[jax.Array, jax.Array]]  # of x, kernel, g, precision


_FORMS = {
    "plain": _Form(_with_bias(_plain), _plain_gradients),
    "shifted": _Form(_with_bias(_shifted), _shifted_gradients),
    "toeplitz": _Form(_with_bias(_toeplitz), _toeplitz_gradients),
    "streamed": _Form(_streamed, _streamed_gradients),
}
_STREAMED = ("cuda", "streamed"), ("default", "plain")
