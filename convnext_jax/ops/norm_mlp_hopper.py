"""Second half of a ConvNeXt block in kernels: LayerNorm, MLP, layer scale and residual.

    out = x + gain * scale * (gelu(norm(u) @ w1 + b1) @ w2 + b2)

`forward` and `backward` are one kernel each direction (and a half), in which the hidden layer, four
times as wide as the rows, never reaches memory. Forward, a program takes a few rows through all of
it, a few columns of the hidden layer at a time. Backward, the hidden layer is computed again twice:
by rows, for the gradient of `u`, and by columns, each program summing its columns' part of the
weights' gradients over many rows. That is for rows of up to 256 numbers: of wider ones, too few fit
into a program's registers and the weights are read too often.

`hidden` and `output` are the two products by themselves, each with what follows it, for wider rows
and for few. Backward, where the hidden layer is then kept, the products are XLA's, and
`through_gelu` and `through_norm` are what lies between and after them.

For NVIDIA's Hopper GPUs, in Pallas lowered to Triton.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convnext_jax.ops.kernels import in_32_bits
from convnext_jax.ops.layer_norm import layer_norm

F32 = jnp.float32


class Tiles(NamedTuple):
    """How much a program takes at a time, and the compiler's options."""

    rows: int
    hidden: int  # columns of the hidden layer
    warps: int = 4
    stages: int = 2


class ProductTiles(NamedTuple):
    """The tile of a product's result that is a program's, and how much it sums at a time."""

    rows: int
    columns: int
    depth: int = 64
    warps: int = 4
    stages: int = 3


class PairOfTiles(NamedTuple):
    """Of the two products as kernels of their own."""

    hidden: ProductTiles
    output: ProductTiles


class BackwardTiles(NamedTuple):
    """Those of the two kernels of `backward`."""

    by_rows: Tiles
    by_columns: Tiles
    programs: int = 264  # by columns; two for each of the multiprocessors of an H100


def forward_tiles(shape: tuple[int, int]) -> Tiles | PairOfTiles | None:
    """The fastest on an H100; None for shapes that the kernels are no use for."""
    rows, width = shape
    if not is_possible(shape):
        return None
    if width > 256 or (width > 128 and rows < 2**12):
        return product_tiles(shape)
    if rows < 2**14:
        return Tiles(64, 64 if width <= 96 or width > 128 else 32, stages=3)
    if width <= 96:
        return Tiles(128, 64, stages=3)
    if width <= 128:
        return Tiles(128, 32, stages=3)
    return Tiles(128, 64, warps=8, stages=3) if width <= 192 else Tiles(64, 32)


def product_tiles(shape: tuple[int, int]) -> PairOfTiles:
    """For rows of `shape`, (rows, width): of those that divide it, the fastest on an H100."""
    rows, width = shape
    most, depth = math.gcd(width, 256), math.gcd(width, 64)
    if rows >= 2**13:
        return PairOfTiles(
            ProductTiles(128, 128 if most >= 32 else 64, depth, warps=8),
            ProductTiles(128, most, warps=8, stages=4 if most == 256 else 3),
        )
    if rows >= 2**10:
        return PairOfTiles(
            ProductTiles(64, min(128, 4 * most), depth), ProductTiles(64, min(64, most), stages=4)
        )
    # What these wait for is the weights: narrow tiles where there are few, for more of the GPU to
    # read them, and many stages.
    columns = 64 if rows * width >= 2**18 else 32
    return PairOfTiles(
        ProductTiles(64, 64, depth, stages=6),
        ProductTiles(64, min(columns, most), math.gcd(4 * width, 128), stages=5),
    )


def backward_tiles(shape: tuple[int, int]) -> BackwardTiles | None:
    """The fastest on an H100; None for widths that the kernel is no use for."""
    width = shape[1]
    if not is_possible(shape) or width > 192:
        return None
    if width <= 128:
        tiles = Tiles(64, 64, stages=3 if width <= 96 else 2)
        return BackwardTiles(tiles, tiles)
    return BackwardTiles(Tiles(64, 32), Tiles(32, 64))


def is_possible(shape: tuple[int, int]) -> bool:
    """Whether the kernels can take (rows, width) at all."""
    rows, width = shape
    # Triton's products have sides of at least 16, and positions are 32-bit numbers.
    return width % 16 == 0 and 0 < rows * 4 * width < 2**31


def is_faster(shape: tuple[int, int], with_gradient: bool) -> bool:
    """Whether these kernels are faster than XLA for (rows, width), on an H100.

    Of small maps the gradients were not measured.
    """
    if not with_gradient:
        return is_possible(shape)
    least = 2**24 if backward_tiles(shape) else 2**22
    return is_possible(shape) and shape[0] * shape[1] >= least


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
    tiles: Tiles | PairOfTiles | None = None,
) -> jax.Array:
    """The formula above, of rows of bf16.

    Args:
      u: (rows, width), what is normalized.
      x: (rows, width), the residual.
      norm_scale, norm_bias, b2, scale: (width,), as the other weights of at most 32 bits.
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
    if isinstance(tiles, PairOfTiles):
        y = layer_norm(u, norm_scale, norm_bias, epsilon).astype(u.dtype)
        a = hidden(y, w1, b1, interpret=interpret, tiles=tiles.hidden)
        return output(a, x, w2, b2, scale, gain, interpret=interpret, tiles=tiles.output)
    row_block = pl.BlockSpec((tiles.rows, width), lambda i: (i, 0))
    gains = [] if gain is None else [gain]
    kernel = functools.partial(
        _forward_kernel, rows=rows, epsilon=epsilon, tiles=tiles, interpret=interpret
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, tiles.rows),),
        in_specs=[row_block, row_block] + [_WHOLE] * (7 + len(gains)),
        out_specs=row_block,
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
    )(
        u, x, norm_scale, norm_bias, w1.astype(u.dtype), b1, w2.astype(u.dtype), b2, scale, *gains
    )  # fmt: skip


@in_32_bits
def hidden(
    y: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    *,
    interpret: bool = False,
    tiles: ProductTiles | None = None,
) -> jax.Array:
    """`gelu(y @ w1 + b1)`, (rows, 4 width), of (rows, width) that are normalized, as `y`."""
    tiles = tiles or product_tiles(y.shape).hidden

    def finish(h, b1):
        return _gelu(h + b1, interpret)

    return _product(finish, y, w1.astype(y.dtype), [b1], tiles=tiles, interpret=interpret)


@in_32_bits
def output(
    a: jax.Array,
    x: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    scale: jax.Array,
    gain: jax.Array | None = None,
    *,
    interpret: bool = False,
    tiles: ProductTiles | None = None,
) -> jax.Array:
    """`x + gain * scale * (a @ w2 + b2)`, of what `hidden` gives and the arguments of `forward`."""
    tiles = tiles or product_tiles(x.shape).output

    def finish(y, b2, scale, x, gain=1):
        return x + (y + b2) * (scale * gain)

    w2 = w2.astype(a.dtype)
    return _product(finish, a, w2, [b2, scale], x, gain, tiles=tiles, interpret=interpret)


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
    scaled_w2 = (w2 * scale.astype(F32)).astype(u.dtype)
    du, y, sums = _gradient_by_rows(
        u,
        g,
        norm_scale,
        norm_bias,
        w1,
        b1,
        scaled_w2,
        epsilon=epsilon,
        tiles=tiles.by_rows,
        interpret=interpret,
    )
    products = _gradients_by_columns(
        y,
        g,
        w1,
        b1,
        scaled_w2,
        tiles=tiles.by_columns,
        programs=tiles.programs,
        interpret=interpret,
    )
    sum_g, dnorm_scale = sums.sum(0)
    return du, dnorm_scale, *_gradients_of_weights(products, sum_g, w1, w2, b2, scale)


@in_32_bits
def backward_of_hidden(
    h: jax.Array,
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
) -> tuple[jax.Array, ...]:
    """As `backward`, for rows of any width, by XLA's products, `through_gelu` and `through_norm`.

    `h` is `norm(u) @ w1 + b1`, (rows, 4 width), the dtype of `u`.
    """
    w1, w2 = w1.astype(u.dtype), w2.astype(F32)
    a, dh, db1 = through_gelu(h, g @ (w2 * scale).astype(u.dtype).T, interpret=interpret)
    y, du, (sum_g, dnorm_scale) = through_norm(
        u, dh @ w1.T, g, norm_scale, norm_bias, epsilon=epsilon, interpret=interpret
    )
    products = _dot(y.T, dh), db1, _dot(a.T, g)
    return du, dnorm_scale, *_gradients_of_weights(products, sum_g, w1, w2, b2, scale)


def _gradients_of_weights(products, sum_g, w1, w2, b2, scale):
    """Those that follow from the gradients of w1, b1 and the scaled w2: all but norm_scale's."""
    dw1, db1, dw2 = products
    # What depends on all rows alike comes from the gradients of the weights.
    dnorm_bias = jnp.dot(w1.astype(F32), db1, precision="highest")
    dscale = (w2 * dw2).sum(0) + b2 * sum_g
    return dnorm_bias, dw1, db1, dw2 * scale, sum_g * scale, dscale


@in_32_bits
def through_gelu(
    h: jax.Array, da: jax.Array, *, interpret: bool = False, tiles: ProductTiles | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`a = gelu(h)`, the gradient of `h` by that `da` of `a`, and its sum over the rows in f32.

    One pass over what XLA passes over three times, as each of the three goes to another operation.

    Args:
      h: (rows, columns).
      da: (rows, columns), the dtype of `h`, as the first two results.
      interpret, tiles: as in `forward`.
    """
    rows, columns = h.shape
    tiles = tiles or ProductTiles(16, math.gcd(columns, 256))
    chunks, blocks = columns // tiles.columns, pl.cdiv(rows, tiles.rows)
    each = pl.cdiv(blocks, max(1, 16 * 132 // chunks))  # blocks of rows of a program
    shares = pl.cdiv(blocks, each)
    kernel = functools.partial(
        _through_gelu_kernel, rows=rows, each=each, tiles=tiles, interpret=interpret
    )
    block = pl.BlockSpec((each * tiles.rows, tiles.columns), lambda i, j: (j, i))
    like_h = jax.ShapeDtypeStruct(h.shape, h.dtype)
    a, dh, sums = pl.pallas_call(
        kernel,
        grid=(chunks, shares),
        in_specs=[block, block],
        out_specs=[block, block, pl.BlockSpec((None, tiles.columns), lambda i, j: (j, i))],
        out_shape=[like_h, like_h, jax.ShapeDtypeStruct((shares, columns), F32)],
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
    )(h, da)
    return a, dh, sums.sum(0)


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
    scale_ref,
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
        h = _vector(b1_ref, columns)
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
        branch = total * (_vector(scale_ref, p) * gain)
        out = _load(x_ref, block, p, mask).astype(F32) + branch
        _store(out_ref, block, p, out.astype(out_ref.dtype), mask)


# Products -----------------------------------------------------------------------------------------


def _product(finish, a, w, vectors, x=None, gain=None, *, tiles, interpret):
    """`finish(a @ w, *vectors, x, gain)`, the dtype of `a`.

    The vectors lie along the columns, `x` is of the product's shape, and `gain` has a number for
    each row; the latter two are left out where they are None.
    """
    rows, columns = a.shape[0], w.shape[1]
    tile = pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j: (j, i))
    maps, gains = ([] if v is None else [v] for v in (x, gain))
    kernel = functools.partial(
        _product_kernel,
        rows=rows,
        finish=finish,
        inputs=(len(vectors), len(maps), len(gains)),
        tiles=tiles,
    )
    # Neighbours in the grid read the same rows.
    return pl.pallas_call(
        kernel,
        grid=(columns // tiles.columns, pl.cdiv(rows, tiles.rows)),
        in_specs=[_WHOLE] * (2 + len(vectors)) + [tile] * len(maps) + [_WHOLE] * len(gains),
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((rows, columns), a.dtype),
        compiler_params=_compiler_params(tiles),
        interpret=interpret,
    )(a, w, *vectors, *maps, *gains)


def _product_kernel(a_ref, w_ref, *refs, rows, finish, inputs, tiles):
    *refs, out_ref = refs
    refs = iter(refs)
    vectors, maps, gains = (list(itertools.islice(refs, count)) for count in inputs)
    start = pl.program_id(1) * tiles.rows
    block, mask = pl.ds(start, tiles.rows), _mask(start, tiles.rows, rows)
    columns = pl.ds(pl.program_id(0) * tiles.columns, tiles.columns)

    def add(i, total):
        depth = pl.ds(i * tiles.depth, tiles.depth)
        a, w = _load(a_ref, block, depth, mask), plgpu.load(w_ref.at[depth, columns])
        return total + _dot(a, w)

    total = jnp.zeros((tiles.rows, tiles.columns), F32)
    total = lax.fori_loop(0, a_ref.shape[1] // tiles.depth, add, total)
    tile = pl.ds(0, tiles.rows), pl.ds(0, tiles.columns)
    result = finish(
        total,
        *[_vector(ref, columns) for ref in vectors],
        *[_load(ref, *tile, mask).astype(F32) for ref in maps],
        *[_column(ref, block, mask) for ref in gains],
    )
    _store(out_ref, *tile, result.astype(out_ref.dtype), mask)


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
        h = _vector(b1_ref, columns)
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
    du = _through_normalize(dy, normal, inverse, norm_scale_ref, parts, width, interpret)
    for d, p in zip(du, parts, strict=True):
        _store(du_ref, block, p, d.astype(du_ref.dtype), mask)


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
    b1 = _column(b1_ref, columns, None)

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


def _through_gelu_kernel(h_ref, da_ref, a_ref, dh_ref, sums_ref, *, rows, each, tiles, interpret):
    columns = pl.ds(0, tiles.columns)
    first = pl.program_id(1) * each * tiles.rows
    even = rows % (each * tiles.rows) == 0

    def add_rows(i, sums):
        block = pl.ds(i * tiles.rows, tiles.rows)
        mask = _mask(first + i * tiles.rows, tiles.rows, rows, even)
        a, slope = _gelu_and_slope(_load(h_ref, block, columns, mask).astype(F32), interpret)
        dh = _load(da_ref, block, columns, mask).astype(F32) * slope
        _store(a_ref, block, columns, a.astype(a_ref.dtype), mask)
        _store(dh_ref, block, columns, dh.astype(dh_ref.dtype), mask)
        return sums + dh

    zeros = jnp.zeros((tiles.rows, tiles.columns), F32)
    plgpu.store(sums_ref, lax.fori_loop(0, each, add_rows, zeros).sum(0))


@in_32_bits
def through_norm(
    u: jax.Array,
    dy: jax.Array,
    g: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
    rows: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`y = norm(u)`, the gradient of `u` by that `dy` of `y`, and two sums over the rows.

    They are those of `g` and of the gradient of norm_scale, (2, width), f32. `u`, `dy` and `g` are
    (rows, width), the dtype of the first two results; `rows` is how many a program takes at a time.
    """
    width = u.shape[1]
    rows = rows or max(1, 2**11 // 2 ** (width - 1).bit_length())
    blocks = pl.cdiv(len(u), rows)
    each = pl.cdiv(blocks, 4 * 132)  # blocks of rows of a program
    kernel = functools.partial(
        _through_norm_kernel, block=rows, each=each, rows=len(u), epsilon=epsilon,
        interpret=interpret,
    )  # fmt: skip
    shares = pl.cdiv(blocks, each)
    block = pl.BlockSpec((each * rows, width), lambda i: (i, 0))
    like_u = jax.ShapeDtypeStruct(u.shape, u.dtype)
    y, du, sums = pl.pallas_call(
        kernel,
        grid=(shares,),
        in_specs=[block] * 3 + [_WHOLE] * 2,
        out_specs=[block, block, pl.BlockSpec((None, 2, width), lambda i: (i, 0, 0))],
        out_shape=[like_u, like_u, jax.ShapeDtypeStruct((shares, 2, width), F32)],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
    )(u, dy, g, norm_scale, norm_bias)
    return y, du, sums.sum(0)


def _through_norm_kernel(
    u_ref,
    dy_ref,
    g_ref,
    norm_scale_ref,
    norm_bias_ref,
    y_ref,
    du_ref,
    sums_ref,
    *,
    block,
    each,
    rows,
    epsilon,
    interpret,
):
    width = u_ref.shape[1]
    parts, first = _split(width), pl.program_id(0) * each * block
    even = rows % (each * block) == 0

    def add_rows(i, sums):
        at = pl.ds(i * block, block)
        mask = _mask(first + i * block, block, rows, even)
        normal, (_, inverse) = _normalize(
            [_load(u_ref, at, p, mask) for p in parts], width, epsilon
        )
        y = _affine(normal, norm_scale_ref, norm_bias_ref, parts, interpret, y_ref.dtype)
        dy = [_load(dy_ref, at, p, mask).astype(F32) for p in parts]
        du = _through_normalize(dy, normal, inverse, norm_scale_ref, parts, width, interpret)
        for y_part, du_part, p in zip(y, du, parts, strict=True):
            _store(y_ref, at, p, y_part, mask)
            _store(du_ref, at, p, du_part.astype(du_ref.dtype), mask)
        of_g = [s + _load(g_ref, at, p, mask) for s, p in zip(sums[0], parts, strict=True)]
        of_scale = [s + d * n for s, d, n in zip(sums[1], dy, normal, strict=True)]
        return of_g, of_scale

    zeros = [jnp.zeros((block, p.size), F32) for p in parts]
    for i, sums in enumerate(lax.fori_loop(0, each, add_rows, (zeros, zeros))):
        for s, p in zip(sums, parts, strict=True):
            plgpu.store(sums_ref.at[pl.ds(i, 1), p], s.sum(0)[None])


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
    column = plgpu.load(ref.at[block], mask=mask, other=0 if mask is not None else None)
    return column.astype(F32)[:, None]


def _vector(ref, part):
    return plgpu.load(ref.at[part]).astype(F32)[None]


def _normalize(u, width, epsilon):
    u = [part.astype(F32) for part in u]
    mean = sum(part.sum(1, keepdims=True) for part in u) / width
    centred = [part - mean for part in u]
    variance = sum((c * c).sum(1, keepdims=True) for c in centred) / width
    inverse = lax.rsqrt(variance + epsilon)
    return [c * inverse for c in centred], (mean, inverse)


def _through_normalize(dy, normal, inverse, scale_ref, parts, width, interpret):
    """The gradient of what `_normalize` took, by that of what `_affine` gave."""
    dn = [d * _vector(scale_ref, p) for d, p in zip(dy, parts, strict=True)]
    along = sum((d * n).sum(1, keepdims=True) for d, n in zip(dn, normal, strict=True)) / width
    mean_dn = sum(d.sum(1, keepdims=True) for d in dn) / width
    return [
        inverse * _fma(n, -along, d - mean_dn, interpret) for d, n in zip(dn, normal, strict=True)
    ]


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
