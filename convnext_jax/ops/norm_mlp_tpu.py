"""Second half of a ConvNeXt block in kernels: LayerNorm, MLP, layer scale, drop path and residual.

    out = x + gain * scale * (gelu(norm(u) @ w1 + b1) @ w2 + b2)

One kernel each direction, in which the hidden layer, four times as wide as the maps, never reaches
memory. A step of the kernel takes some hundred rows through all of it, a few columns of the hidden
layer at a time, with all weights in the memory on the chip. Backward, the hidden layer is computed
again, and the weights' gradients are summed on the chip from step to step.

For TPUs, in Pallas lowered to Mosaic. Never run on one: compiled, and simulated. So where there is
a TPU, `tpu.py` compares their numbers with the plain form's before they are used.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.ops.activations import _normal_distribution
from convnext_jax.ops.kernels import in_32_bits

if TYPE_CHECKING:
    from convnext_jax.ops.norm_mlp import NormMlpWeights  # which imports this

F32 = jnp.float32
ROWS = 512  # of a step


def is_possible(shape: tuple[int, int]) -> bool:
    """Whether the kernels can take (rows, width)."""
    rows, width = shape
    # Columns are taken in multiples of 128, or all at a time. Beyond 1024 channels the weights and
    # the sums of their gradients fill the memory on the chip.
    return rows > 0 and width <= 1024 and width % (8 if width <= 128 else 32) == 0


def is_faster(shape: tuple[int, int, int, int]) -> bool:
    """Whether these kernels should be faster than XLA for (N, H, W, C), by what a v5e can do.

    A product of the MLP takes 8 C operations for each 10 bytes that XLA moves, and a v5e 240 in the
    time of one: of wider maps memory is no bound, and the hidden layer would be computed again for
    nothing. (A v6e has more for a byte: there, wider ones may gain, too.) Examples that do not fill
    a tile of 16 are kept in another order, and would be copied.
    """
    examples, height, width, channels = shape
    possible = is_possible((examples * height * width, channels))
    return possible and channels <= 256 and examples % 16 == 0


def _columns(width: int) -> int:
    """How much of the hidden layer is taken at a time."""
    return 4 * width if width <= 128 else math.gcd(4 * width, 512)


@in_32_bits
def forward(
    u: jax.Array,
    x: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None = None,
    *,
    epsilon: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """The formula above, of maps of bf16.

    Args:
      u: (N, H, W, C), what is normalized.
      x: (N, H, W, C), the residual.
      weights: of at most 32 bits; w1 and w2 are multiplied in the dtype of `u`.
      gain: (N,), what an example is multiplied with before `x` is added; None for 1.
      epsilon: of the norm.
      interpret: run the kernel as plain JAX operations, on any platform.

    Returns:
      (N, H, W, C), the dtype of `u`.
    """
    rows, width = math.prod(u.shape[:-1]), u.shape[-1]
    norm_scale, norm_bias, w1, b1, w2, b2, scale = weights
    vectors = [v.astype(F32)[None] for v in (norm_scale, norm_bias, b1, b2, scale)]
    inputs = [_rows(u), _rows(x), w1.astype(u.dtype), w2.astype(u.dtype), *vectors]
    [out] = _call(
        functools.partial(_forward_kernel, epsilon=epsilon),
        inputs, gain, [jax.ShapeDtypeStruct((rows, width), u.dtype)], products=2,
        interpret=interpret,
    )  # fmt: skip
    return _maps(out, u.shape)


@in_32_bits
def backward(
    u: jax.Array,
    g: jax.Array,
    weights: NormMlpWeights,
    gain: jax.Array | None = None,
    *,
    epsilon: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, NormMlpWeights]:
    """The gradients of `u` and, in f32, the weights; that of `x` is `g`.

    `g` is (N, H, W, C), the dtype of `u`, of the result; all else as in `forward`.
    """
    rows, width = math.prod(u.shape[:-1]), u.shape[-1]
    norm_scale, norm_bias, w1, b1, *of_second = weights
    w2, b2, scale = (w.astype(F32) for w in of_second)
    scaled_w2 = (w2 * scale).T.astype(u.dtype)
    vectors = [v.astype(F32)[None] for v in (norm_scale, norm_bias, b1)]
    results = [
        jax.ShapeDtypeStruct((rows, width), u.dtype),
        jax.ShapeDtypeStruct((width, 4 * width), F32),
        jax.ShapeDtypeStruct((width, 4 * width), F32),
        jax.ShapeDtypeStruct((1, 4 * width), F32),
        jax.ShapeDtypeStruct((3, width), F32),
    ]
    du, dw1, dw2, db1, sums = _call(
        functools.partial(_backward_kernel, rows=rows, epsilon=epsilon),
        [_rows(u), _rows(g), w1.astype(u.dtype), scaled_w2, *vectors], gain, results,
        products=5, interpret=interpret,
    )  # fmt: skip
    dnorm_scale, dnorm_bias, sum_g = sums
    dw2 = dw2.T
    dscale = (w2 * dw2).sum(0) + b2 * sum_g
    gradients = dnorm_scale, dnorm_bias, dw1, db1[0], dw2 * scale, sum_g * scale, dscale
    return _maps(du, u.shape), type(weights)(*gradients)


def _call(kernel, inputs, gain, results, *, products, interpret):
    """Runs `kernel` over the rows of the first two inputs, of the gain and of the first result.

    What else there is lies on the chip as a whole.
    """
    rows, width = inputs[0].shape
    tile = min(rows, ROWS)
    if gain is not None:
        gain = jnp.tile(gain.astype(F32), rows // len(gain))[None]
        inputs = [*inputs, gain]
    block = pl.BlockSpec((tile, width), lambda i: (i, 0))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1))

    in_specs = [block] * 2 + [whole(x) for x in inputs[2:]]
    if gain is not None:
        in_specs[-1] = pl.BlockSpec((1, tile), lambda i: (0, i))
    # Each array passes between the chip and its memory once.
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in [*inputs, *results])
    return pl.pallas_call(
        functools.partial(kernel, with_gain=gain is not None),
        grid=(pl.cdiv(rows, tile),),
        in_specs=in_specs,
        out_specs=[block] + [whole(x) for x in results[1:]],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM((tile, width), F32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            # Weights and sums; some maps of a step; the rest, the hidden columns among it.
            vmem_limit_bytes=48 * width**2 + 64 * tile * width + 2**24,
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 8 * rows * width**2,
            transcendentals=4 * rows * width,
            bytes_accessed=moved,
        ),
        interpret=interpret,
    )(*inputs)


def _forward_kernel(
    u_ref,
    x_ref,
    w1_ref,
    w2_ref,
    norm_scale_ref,
    norm_bias_ref,
    b1_ref,
    b2_ref,
    scale_ref,
    *refs,
    epsilon,
    with_gain,
):
    *gain_refs, out_ref, sum_ref = refs
    normal, _ = _normalize(u_ref[...].astype(F32), epsilon)
    y = (normal * norm_scale_ref[...] + norm_bias_ref[...]).astype(u_ref.dtype)
    sum_ref[...] = jnp.broadcast_to(b2_ref[...], sum_ref.shape)
    size = _columns(u_ref.shape[1])

    @pl.loop(0, b1_ref.shape[1] // size)
    def _(j):
        columns = pl.ds(pl.multiple_of(j * size, 128), size)
        a = _gelu(_dot(y, w1_ref[:, columns]) + b1_ref[:, columns]).astype(y.dtype)
        sum_ref[...] += _dot(a, w2_ref[columns, :])

    branch = sum_ref[...] * scale_ref[...]
    if with_gain:
        branch *= _column(gain_refs[0])
    out_ref[...] = (x_ref[...].astype(F32) + branch).astype(out_ref.dtype)


def _backward_kernel(
    u_ref,
    g_ref,
    w1_ref,
    w2_ref,
    norm_scale_ref,
    norm_bias_ref,
    b1_ref,
    *refs,
    rows,
    epsilon,
    with_gain,
):
    *gain_refs, du_ref, dw1_ref, dw2_ref, db1_ref, sums_ref, dy_ref = refs
    sum_refs = dw1_ref, dw2_ref, db1_ref, sums_ref

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in sum_refs:
            ref[...] = jnp.zeros_like(ref)

    u, g = u_ref[...].astype(F32), g_ref[...].astype(F32)
    if with_gain:
        g *= _column(gain_refs[0])
    if rows % len(u):  # what lies beyond the last row may be anything, and is not to be summed
        there = lax.broadcasted_iota(jnp.int32, u.shape, 0) < rows - pl.program_id(0) * len(u)
        u, g = jnp.where(there, u, 0), jnp.where(there, g, 0)
    normal, inverse = _normalize(u, epsilon)
    y = (normal * norm_scale_ref[...] + norm_bias_ref[...]).astype(u_ref.dtype)
    half_g = g.astype(y.dtype)
    # The narrow sides are transposed, and once for all columns.
    y_columns, g_columns = y.T, half_g.T
    dy_ref[...] = jnp.zeros_like(dy_ref)
    size = _columns(u.shape[1])

    @pl.loop(0, b1_ref.shape[1] // size)
    def _(j):
        columns = pl.ds(pl.multiple_of(j * size, 128), size)
        w1 = w1_ref[:, columns]
        h = _dot(y, w1) + b1_ref[:, columns]
        a, dh = jax.jvp(_gelu, (h,), (_dot(half_g, w2_ref[:, columns]),))
        db1_ref[:, columns] += dh.sum(0, keepdims=True)
        a, dh = a.astype(y.dtype), dh.astype(y.dtype)
        dw1_ref[:, columns] += _dot(y_columns, dh)
        dw2_ref[:, columns] += _dot(g_columns, a)
        dy_ref[...] += _dot(dh, w1, axis=1)

    dy = dy_ref[...]
    for i, summed in enumerate((dy * normal, dy, g)):
        sums_ref[i : i + 1, :] += summed.sum(0, keepdims=True)
    dn = dy * norm_scale_ref[...]
    along = (dn * normal).mean(1, keepdims=True)
    du = inverse * (dn - dn.mean(1, keepdims=True) - normal * along)
    du_ref[...] = du.astype(du_ref.dtype)


def _normalize(u, epsilon):
    centred = u - u.mean(1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(centred).mean(1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _gelu(h):
    return h * _normal_distribution(h, True)


def _dot(a, b, axis=0):
    """Sums the products of the columns of `a` and what lies along `axis` in `b`."""
    dimensions = ((1,), (axis,)), ((), ())
    return lax.dot_general(a, b, dimensions, precision="default", preferred_element_type=F32)


def _column(ref):
    return ref[...].T


# XLA keeps maps on a TPU with the examples next to the channels: rows in this order move nothing.


def _rows(maps):
    return maps.transpose(1, 2, 0, 3).reshape(-1, maps.shape[-1])


def _maps(rows, shape):
    n, height, width, channels = shape
    return rows.reshape(height, width, n, channels).transpose(2, 0, 1, 3)
