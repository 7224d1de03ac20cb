"""Second half of a ConvNeXt block in one kernel: LayerNorm, MLP, layer scale and residual.

    out = x + gain * scale * (gelu(norm(u) @ w1 + b1) @ w2 + b2)

The hidden layer, four times as wide as the rows, never reaches memory. Forward, a program takes a
few rows through all of it, a few columns of the hidden layer at a time. Backward, the hidden layer
is computed again twice: by rows, for the gradient of `u`, and by columns, each program summing its
columns' part of the weights' gradients over many rows.

For NVIDIA's Hopper GPUs, in Pallas lowered to Triton. On an H100 forward is 1.4 to 2.8 times
as fast as XLA for widths of 80 to 256, backward 1.3 to 2 times for widths of 80 to 192; at widths
above, too few rows fit into a program's registers and the weights are read too often.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convnext_jax.ops.hopper import in_32_bits

F32 = jnp.float32


class Tiles(NamedTuple):
    """How much a program takes at a time, and the compiler's options."""

    rows: int
    hidden: int  # columns of the hidden layer
    warps: int = 4
    stages: int = 2


class BackwardTiles(NamedTuple):
    by_rows: Tiles
    by_columns: Tiles
    programs: int = 264  # by columns; two for each of the multiprocessors of an H100


def forward_tiles(shape: tuple[int, int]) -> Tiles | None:
    """The fastest on an H100; None for widths that the kernel is no use for."""
    width = shape[1]
    if not _possible(shape) or width > 256:
        return None
    if width <= 96:
        return Tiles(128, 64, stages=3)
    if width <= 128:
        return Tiles(128, 32, stages=3)
    return Tiles(128, 64, warps=8, stages=3) if width <= 192 else Tiles(64, 32)


def backward_tiles(shape: tuple[int, int]) -> BackwardTiles | None:
    """The fastest on an H100; None for widths that the kernel is no use for."""
    width = shape[1]
    if not _possible(shape) or width > 192:
        return None
    if width <= 128:
        tiles = Tiles(64, 64, stages=3 if width <= 96 else 2)
        return BackwardTiles(tiles, tiles)
    return BackwardTiles(Tiles(64, 32), Tiles(32, 64))


def _possible(shape: tuple[int, int]) -> bool:
    rows, width = shape
    # Triton's products have sides of at least 16, and positions are 32-bit numbers.
    return width % 16 == 0 and rows * width < 2**31


def is_faster(shape: tuple[int, int], with_gradient: bool) -> bool:
    """Whether these kernels are faster than XLA for (rows, width), on an H100.

    So they are with 25 million numbers and more. With 2 million either takes less time than JAX
    takes to start it; what lies between was not measured.
    """
    if shape[0] * shape[1] < 2**24 or forward_tiles(shape) is None:
        return False
    return not with_gradient or backward_tiles(shape) is not None


@in_32_bits
def forward(
    u: jax.Array,
    x: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    scale: jax.Array,
    gain: jax.Array | None = None,
    *,
    epsilon: float,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """The formula above, of rows of bf16.

    Args:
      u: (rows, width), what is normalized.
      x: (rows, width), the residual.
      norm_scale, norm_bias, b2, scale: (width,).
      w1: (width, 4 width), multiplied in the dtype of `u`.
      b1: (4 width,).
      w2: (4 width, width), likewise.
      gain: (rows,), what a row is multiplied with before `x` is added; None for 1.
      epsilon: of the norm.
      interpret: run the kernel as plain JAX operations, on any platform.
      tiles: None takes those of `forward_tiles`.

    Returns:
      (rows, width), the dtype of `u`.
    """
    rows, width = u.shape
    tiles = tiles or forward_tiles(u.shape)
    w2, b2 = _scaled(w2, b2, scale, u.dtype)
    row_block = pl.BlockSpec((tiles.rows, width), lambda i: (i, 0))
    gains = [] if gain is None else _wide(gain)
    kernel = functools.partial(
        _forward_kernel, rows=rows, epsilon=epsilon, tiles=tiles, interpret=interpret
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, tiles.rows),),
        in_specs=[row_block, row_block] + [_WHOLE] * (6 + len(gains)),
        out_specs=row_block,
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
    )(u, x, *_wide(norm_scale, norm_bias), w1.astype(u.dtype), *_wide(b1), w2, b2, *gains)


@in_32_bits
def backward(
    u: jax.Array,
    g: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    scale: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
    tiles: BackwardTiles | None = None,
) -> tuple[jax.Array, ...]:
    """The gradients of `forward`'s arguments but `x`, whose gradient is `g`, the result's.

    With a gain, `g` is to be multiplied with it before. Those of the weights are in f32.
    """
    w1, w2 = w1.astype(u.dtype), w2.astype(F32)
    tiles = tiles or backward_tiles(u.shape)
    scaled_w2, _ = _scaled(w2, b2, scale, u.dtype)
    du, y, sums = _gradient_by_rows(
        u,
        g,
        *_wide(norm_scale, norm_bias),
        w1,
        *_wide(b1),
        scaled_w2,
        epsilon=epsilon,
        tiles=tiles.by_rows,
        interpret=interpret,
    )
    dw1, db1, dw2 = _gradients_by_columns(
        y,
        g,
        w1,
        *_wide(b1),
        scaled_w2,
        tiles=tiles.by_columns,
        programs=tiles.programs,
        interpret=interpret,
    )
    sum_g, dnorm_scale = sums.sum(0)
    # What depends on all rows alike comes from the gradients of the weights.
    dnorm_bias = jnp.dot(w1.astype(F32), db1, precision="highest")
    dscale = (w2 * dw2).sum(0) + b2 * sum_g
    gradients = (dnorm_scale, dnorm_bias, dw1, db1, dw2 * scale, sum_g * scale, dscale)
    return du, *gradients


def _scaled(w2, b2, scale, dtype):
    scale = scale.astype(F32)
    return (w2 * scale).astype(dtype), b2 * scale


def _wide(*vectors):
    return [v.astype(F32) for v in vectors]


_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def _compiler_params(tiles):
    return plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)


# Forward ------------------------------------------------------------------------------------------


def _forward_kernel(
    u_ref,
    x_ref,
    norm_scale_ref,
    norm_bias_ref,
    w1_ref,
    b1_ref,
    w2_ref,
    b2_ref,
    *gain_and_out_refs,
    rows,
    epsilon,
    tiles,
    interpret,
):
    *gain_refs, out_ref = gain_and_out_refs
    width = u_ref.shape[1]
    parts, start = _split(width), pl.program_id(0) * tiles.rows
    block, mask = pl.ds(0, tiles.rows), _mask(start, tiles.rows, rows)
    normal, _ = _normalize([_load(u_ref, block, p, mask) for p in parts], width, epsilon)
    y = _affine(normal, norm_scale_ref, norm_bias_ref, parts, interpret, u_ref.dtype)

    def chunk(j, sums):
        columns = pl.ds(j * tiles.hidden, tiles.hidden)
        h = plgpu.load(b1_ref.at[columns])[None]
        for y_part, p in zip(y, parts, strict=True):
            h += _dot(y_part, plgpu.load(w1_ref.at[p, columns]))
        a = _gelu(h, interpret).astype(u_ref.dtype)
        return tuple(
            total + _dot(a, plgpu.load(w2_ref.at[columns, p]))
            for total, p in zip(sums, parts, strict=True)
        )

    biases = tuple(jnp.broadcast_to(_vector(b2_ref, p), (tiles.rows, p.size)) for p in parts)
    sums = lax.fori_loop(0, 4 * width // tiles.hidden, chunk, biases)
    gain = 1 if not gain_refs else _column(gain_refs[0], pl.ds(start, tiles.rows), mask)
    for total, p in zip(sums, parts, strict=True):
        out = _load(x_ref, block, p, mask).astype(F32) + total * gain
        _store(out_ref, block, p, out.astype(out_ref.dtype), mask)


# Backward -----------------------------------------------------------------------------------------


def _gradient_by_rows(u, g, norm_scale, norm_bias, w1, b1, w2, *, epsilon, tiles, interpret):
    """The gradient of u, norm(u), and each block's sums of g and of norm_scale's gradient."""
    rows, width = u.shape
    blocks = pl.cdiv(rows, tiles.rows)
    row_block = pl.BlockSpec((tiles.rows, width), lambda i: (i, 0))
    like_u = jax.ShapeDtypeStruct(u.shape, u.dtype)
    kernel = functools.partial(
        _by_rows_kernel, rows=rows, epsilon=epsilon, tiles=tiles, interpret=interpret
    )
    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        in_specs=[row_block, row_block] + [_WHOLE] * 5,
        out_specs=[row_block, row_block, pl.BlockSpec((None, 2, width), lambda i: (i, 0, 0))],
        out_shape=[like_u, like_u, jax.ShapeDtypeStruct((blocks, 2, width), F32)],
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
    )(u, g, norm_scale, norm_bias, w1, b1, w2)


def _by_rows_kernel(
    u_ref,
    g_ref,
    norm_scale_ref,
    norm_bias_ref,
    w1_ref,
    b1_ref,
    w2_ref,
    du_ref,
    y_ref,
    sums_ref,
    *,
    rows,
    epsilon,
    tiles,
    interpret,
):
    width = u_ref.shape[1]
    parts = _split(width)
    block, mask = pl.ds(0, tiles.rows), _mask(pl.program_id(0) * tiles.rows, tiles.rows, rows)
    normal, (mean, inverse) = _normalize(
        [_load(u_ref, block, p, mask) for p in parts], width, epsilon
    )
    y = _affine(normal, norm_scale_ref, norm_bias_ref, parts, interpret, u_ref.dtype)
    g = [_load(g_ref, block, p, mask) for p in parts]
    for y_part, g_part, p in zip(y, g, parts, strict=True):
        _store(y_ref, block, p, y_part, mask)
        plgpu.store(sums_ref.at[pl.ds(0, 1), p], g_part.astype(F32).sum(0)[None])

    def chunk(j, sums):
        columns = pl.ds(j * tiles.hidden, tiles.hidden)
        w1 = [plgpu.load(w1_ref.at[p, columns]) for p in parts]
        h = plgpu.load(b1_ref.at[columns])[None]
        for y_part, w in zip(y, w1, strict=True):
            h += _dot(y_part, w)
        da = sum(
            _dot_transposed(g_part, plgpu.load(w2_ref.at[columns, p]))
            for g_part, p in zip(g, parts, strict=True)
        )
        dh = (da * _gelu_and_slope(h, interpret)[1]).astype(u_ref.dtype)
        return tuple(s + _dot_transposed(dh, w) for s, w in zip(sums, w1, strict=True))

    zeros = tuple(jnp.zeros((tiles.rows, p.size), F32) for p in parts)
    dy = lax.fori_loop(0, 4 * width // tiles.hidden, chunk, zeros)
    # Read again rather than kept: the loop has use for every register.
    normal = [(_load(u_ref, block, p, mask).astype(F32) - mean) * inverse for p in parts]
    for d, n, p in zip(dy, normal, parts, strict=True):
        products = d * n if mask is None else jnp.where(mask, d * n, 0)
        plgpu.store(sums_ref.at[pl.ds(1, 1), p], products.sum(0)[None])
    dn = [d * _vector(norm_scale_ref, p) for d, p in zip(dy, parts, strict=True)]
    along = sum((d * n).sum(1, keepdims=True) for d, n in zip(dn, normal, strict=True)) / width
    mean_dn = sum(d.sum(1, keepdims=True) for d in dn) / width
    for d, n, p in zip(dn, normal, parts, strict=True):
        du = inverse * _fma(n, -along, d - mean_dn, interpret)
        _store(du_ref, block, p, du.astype(du_ref.dtype), mask)


def _gradients_by_columns(y, g, w1, b1, w2, *, tiles, programs, interpret):
    """Of w1, b1 and the scaled w2, the latter before scaling; in f32."""
    rows, width = y.shape
    blocks, chunks = pl.cdiv(rows, tiles.rows), 4 * width // tiles.hidden
    each = pl.cdiv(blocks, max(1, programs // chunks))  # blocks of rows of a program
    shares = pl.cdiv(blocks, each)
    kernel = functools.partial(
        _by_columns_kernel, rows=rows, each=each, tiles=tiles, interpret=interpret
    )
    # Neighbours in the grid read the same rows.
    matrix = pl.BlockSpec((None, 4 * width, width), lambda chunk, share: (share, 0, 0))
    vector = pl.BlockSpec((None, 4 * width), lambda chunk, share: (share, 0))
    sums = pl.pallas_call(
        kernel,
        grid=(chunks, shares),
        in_specs=[_WHOLE] * 5,
        out_specs=[matrix, vector, matrix],
        out_shape=[
            jax.ShapeDtypeStruct((shares, *shape), F32)
            for shape in ((4 * width, width), (4 * width,), (4 * width, width))
        ],
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
    )(y, g, w1.T, b1, w2)
    dw1, db1, dw2 = (s.sum(0) for s in sums)
    return dw1.T, db1, dw2


def _by_columns_kernel(
    y_ref,
    g_ref,
    w1_ref,
    b1_ref,
    w2_ref,
    dw1_ref,
    db1_ref,
    dw2_ref,
    *,
    rows,
    each,
    tiles,
    interpret,
):
    parts = _split(y_ref.shape[1])
    columns = pl.ds(pl.program_id(0) * tiles.hidden, tiles.hidden)
    first = pl.program_id(1) * each * tiles.rows
    even = rows % (each * tiles.rows) == 0
    w1 = [plgpu.load(w1_ref.at[columns, p]) for p in parts]
    w2 = [plgpu.load(w2_ref.at[columns, p]) for p in parts]
    b1 = plgpu.load(b1_ref.at[columns])[:, None]

    # The hidden layer transposed, so that a product's left side is always in registers.
    def add_rows(i, sums):
        dw1, db1, dw2 = sums
        start = first + i * tiles.rows
        block, mask = pl.ds(start, tiles.rows), _mask(start, tiles.rows, rows, even)
        y = [_load(y_ref, block, p, mask) for p in parts]
        g = [_load(g_ref, block, p, mask) for p in parts]
        h = b1
        for w, y_part in zip(w1, y, strict=True):
            h += _dot_transposed(w, y_part)
        da = sum(_dot_transposed(w, g_part) for w, g_part in zip(w2, g, strict=True))
        a, slope = _gelu_and_slope(h, interpret)
        dh = da * slope
        db1 += dh.sum(1)
        a, dh = a.astype(y_ref.dtype), dh.astype(y_ref.dtype)
        dw1 = tuple(s + _dot(dh, y_part) for s, y_part in zip(dw1, y, strict=True))
        dw2 = tuple(s + _dot(a, g_part) for s, g_part in zip(dw2, g, strict=True))
        return dw1, db1, dw2

    zeros = tuple(jnp.zeros((tiles.hidden, p.size), F32) for p in parts)
    init = zeros, jnp.zeros((tiles.hidden,), F32), zeros
    dw1, db1, dw2 = lax.fori_loop(0, each, add_rows, init)
    plgpu.store(db1_ref.at[columns], db1)
    for d1, d2, p in zip(dw1, dw2, parts, strict=True):
        plgpu.store(dw1_ref.at[columns, p], d1)
        plgpu.store(dw2_ref.at[columns, p], d2)


# Parts of rows ------------------------------------------------------------------------------------


def _split(width):
    """The columns of a row in parts: 96 is 64 and 32. Sides in Triton are powers of two."""
    parts, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        parts.append(pl.ds(start, size))
        start += size
    return parts


def _mask(start, size, rows, even=None):
    """Which rows from `start` on there are; None if all (`even`: blocks of `size` fill them)."""
    if rows % size == 0 if even is None else even:
        return None
    return start + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < rows


def _load(ref, block, part, mask):
    if mask is None:
        return plgpu.load(ref.at[block, part])
    mask = jnp.broadcast_to(mask, (block.size, part.size))
    return plgpu.load(ref.at[block, part], mask=mask, other=0)


def _store(ref, block, part, value, mask):
    mask = None if mask is None else jnp.broadcast_to(mask, value.shape)
    plgpu.store(ref.at[block, part], value, mask=mask)


def _column(ref, block, mask):
    mask = None if mask is None else mask[:, 0]
    return plgpu.load(ref.at[block], mask=mask, other=0 if mask is not None else None)[:, None]


def _vector(ref, part):
    return plgpu.load(ref.at[part])[None]


def _normalize(u, width, epsilon):
    u = [part.astype(F32) for part in u]
    mean = sum(part.sum(1, keepdims=True) for part in u) / width
    centred = [part - mean for part in u]
    variance = sum((c * c).sum(1, keepdims=True) for c in centred) / width
    inverse = lax.rsqrt(variance + epsilon)
    return [c * inverse for c in centred], (mean, inverse)


def _affine(normal, scale_ref, bias_ref, parts, interpret, dtype):
    return [
        _fma(n, _vector(scale_ref, p), _vector(bias_ref, p), interpret).astype(dtype)
        for n, p in zip(normal, parts, strict=True)
    ]


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=F32)


def _dot_transposed(a, b):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=F32)


# GELU ---------------------------------------------------------------------------------------------

# log2 Φ(x) for x <= 0: one exponential and no division give Φ to 1.4e-4 of itself down to -4, and
# to 1e-3 down to -5, where it is 3e-7. Rounding to bf16 does 2e-3.
_LOG_TAIL = (-1.0001421, 1.1488746, -0.46478721, 0.047728211, 0.0056701975, 0.00030370546)


def _gelu(x, interpret):
    low = _copysign(x, -1.0, interpret)
    return _fma(low, _tail(low, interpret), jnp.maximum(x, 0), interpret)


def _gelu_and_slope(x, interpret):
    """GELU and its derivative Φ(x) + x Φ'(x), which is 1/2 and an odd function."""
    low = _copysign(x, -1.0, interpret)
    tail = _tail(low, interpret)
    density = _exp2(_fma(x * x, -0.72134752, -1.3257481, interpret), interpret)
    odd = _copysign(_fma(low, density, tail - 0.5, interpret), x, interpret)
    return _fma(low, tail, jnp.maximum(x, 0), interpret), 0.5 + odd


def _tail(x, interpret):
    """Φ of x <= 0."""
    exponent = _LOG_TAIL[-1]
    for coefficient in reversed(_LOG_TAIL[:-1]):
        exponent = _fma(exponent, x, coefficient, interpret)
    return _exp2(exponent, interpret)


# Single instructions: XLA has Triton keep products and sums apart, and guard the exponential for
# numbers that do not come up here, which makes the kernels' loops half as long again.


def _fma(x, y, z, interpret):
    return x * y + z if interpret else _instruction("fma.rn.ftz.f32 $0, $1, $2, $3;", x, y, z)


def _exp2(x, interpret):
    return jnp.exp2(x) if interpret else _instruction("ex2.approx.ftz.f32 $0, $1;", x)


def _copysign(size, sign, interpret):
    if interpret:
        return jnp.copysign(size, jnp.asarray(sign, F32))
    return _instruction("copysign.f32 $0, $1, $2;", sign, size)


def _instruction(text, *args):
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in args))
    [result] = plgpu.elementwise_inline_asm(
        text,
        args=[jnp.broadcast_to(jnp.asarray(x, F32), shape) for x in args],
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, F32)],
    )
    return result
