"""Depthwise convolution (stride 1, zero padding that keeps the size, NHWC) for NVIDIA GPUs.

Pallas kernels that are lowered through Triton. A thread owns one or two channels of a tile of the
map. It streams over the tile's rows with the taps of its channels, the sums of the output rows that
an input row touches and the row itself in registers, so that each value is loaded once a tile. All
of it is elementwise: a block is a flat list of (tile, channel), whatever the number of channels,
and columns and taps are unrolled in Python.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from convnext_jax.ops.kernels import in_32_bits

_MULTIPROCESSORS = 132  # of an H100; on another GPU only the choice of blocks suffers


class Blocks(NamedTuple):
    rows: int  # of a tile
    columns: int  # of a tile
    per_thread: int = 1  # channels, next to one another
    warps: int = 1  # of a program
    unroll: int = 1  # rows in the body of the loop, in the kernel's gradient
    slots: int = 1  # partial sums of the kernel's gradient


@in_32_bits
def forward(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x` (batch, height, width, channels), `kernel` (odd, odd, 1, channels), bias (channels,)."""
    blocks = blocks or forward_blocks(x.shape, kernel.shape[:2])
    return _convolve(x, kernel, bias, blocks, interpret)


@in_32_bits
def kernel_gradient(
    x: jax.Array,
    g: jax.Array,
    sides: tuple[int, int] = (7, 7),
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """(*sides, 1, channels), summed in f32."""
    blocks = blocks or gradient_blocks(x.shape, sides)
    return _kernel_gradient(x, g, tuple(sides), blocks, interpret)


# Sizes of blocks ----------------------------------------------------------------------------------


def forward_blocks(shape, sides=(7, 7)) -> Blocks:
    _, height, width, _ = shape
    # The widest tile loads least beside what it computes, but needs the most work to fill the GPU.
    for target in (14, 7) if width > 14 else (7,):
        columns = _even(width, target, sides)
        if _warps(shape, height, columns) >= 700:
            return Blocks(height, columns)
    columns = _even(width, 4, sides)
    return Blocks(_rows(shape, columns, 4), columns)


def gradient_blocks(shape, sides=(7, 7)) -> Blocks:
    columns = _even(shape[2], 7, sides)
    rows = _rows(shape, columns, 7)
    tiles = shape[0] * pl.cdiv(shape[1], rows) * pl.cdiv(shape[2], columns)
    # As many partial sums as the GPU works on at once, each of (nearly) the same number of tiles.
    # The registers leave room for 10 or 11 warps; one warp too many takes twice the time.
    most = max(1, 12 * _MULTIPROCESSORS * 32 // shape[3])
    slots = pl.cdiv(tiles, pl.cdiv(tiles, most))
    return Blocks(rows, columns, unroll=1 if rows % 2 else 2, slots=slots)


def _even(width, target, sides):
    """Columns of a tile, such that tiles of about `target` columns waste few."""
    # A tile's neighbours have to cover what it sees of them.
    return min(width, max(pl.cdiv(width, pl.cdiv(width, target)), sides[1] // 2))


def _rows(shape, columns, least):
    rows = shape[1]
    while rows > least and _warps(shape, rows, columns) < 700:
        rows = pl.cdiv(rows, 2)
    return rows


def _warps(shape, rows, columns):
    batch, height, width, channels = shape
    return batch * pl.cdiv(height, rows) * pl.cdiv(width, columns) * channels // 32


# What both kernels share --------------------------------------------------------------------------


class _Tiling(NamedTuple):
    shape: tuple[int, int, int, int]
    rows: int
    columns: int
    sides: tuple[int, int]

    @property
    def down(self):
        return pl.cdiv(self.shape[1], self.rows)

    @property
    def across(self):
        return pl.cdiv(self.shape[2], self.columns)

    @property
    def count(self):
        return self.shape[0] * self.down * self.across


def _tiling(shape, blocks, sides):
    tiling = _Tiling(shape, min(blocks.rows, shape[1]), min(blocks.columns, shape[2]), sides)
    return tiling


class _Tile:
    """For each element of a block its tile: masks and offsets of what is in it and around it."""

    def __init__(self, tiling, tile, channel, valid):
        _, height, width, channels = tiling.shape
        self.tiling, self.size = tiling, channel.size
        self.left = tiling.sides[1] // 2
        across, rest = lax.rem(tile, tiling.across), lax.div(tile, tiling.across)
        self.row = 0 if tiling.down == 1 else lax.rem(rest, tiling.down) * tiling.rows
        picture = lax.div(rest, tiling.down)
        self.place = (picture * height * width + across * tiling.columns) * channels + channel
        self.masks = {}  # of a column counted from the tile's first; none for one always outside
        for column in range(-self.left, tiling.columns + self.left):
            if tiling.across > 1 or 0 <= column < width:
                self.masks[column] = _all(valid, *self._column(column, across))
        self.columns = [column for column in range(tiling.columns) if column in self.masks]

    def _column(self, column, across):
        """Masks, on the left and on the right one for all columns wherever possible."""
        columns, width, last = self.tiling.columns, self.tiling.shape[2], self.tiling.across - 1
        if column < 0:
            return [across > 0]
        if last * columns + column < width:
            return []
        return [across < last if width % columns == 0 else across * columns + column < width]

    def _at(self, row, column):
        """Offsets of (row, 0), and of (row, -left) for a `column` left of the tile."""
        _, height, width, channels = self.tiling.shape
        row = jnp.clip(self.row + row, 0, height - 1)
        at = self.place + row * (width * channels)
        if column < 0:  # where negative, not loaded either
            at = jnp.maximum(at - self.left * channels, 0)
        # To an index known to be small, the compiler adds constants within the load instruction.
        at = at & ((1 << 30) - 1)
        # The compiler has lost track of which elements lie next to one another.
        together = math.gcd(channels, self.size, 8)
        return plgpu.max_contiguous(pl.multiple_of(at, (together,)), (together,))

    def _inside(self, row):
        return (self.row + row >= 0) & (self.row + row < self.tiling.shape[1])

    def load(self, ref, row, columns, *, zeros):
        """Values of a row, by column; above and below the map zeros, or without `zeros` any."""
        values, channels = {}, self.tiling.shape[3]
        for column in columns:
            at = self._at(row, column) + (column + (column < 0) * self.left) * channels
            mask = _all(self.masks[column], self._inside(row) if zeros else True)
            if mask is True:
                values[column] = plgpu.load(ref.at[at])
            else:
                mask = jnp.broadcast_to(mask, at.shape)
                values[column] = plgpu.load(ref.at[at], mask=mask, other=0)
        return values

    def store(self, ref, row, values):
        """Stores what of a row lies in the tile."""
        mask = row >= 0
        if self.tiling.shape[1] % self.tiling.rows:
            mask = mask & (self.row + row < self.tiling.shape[1])
        for column in self.columns:
            at = self._at(row, 0) + column * self.tiling.shape[3]
            both = jnp.broadcast_to(_all(self.masks[column], mask), at.shape)
            plgpu.store(ref.at[at], values[column].astype(ref.dtype), mask=both)


def _all(*masks):
    masks = [mask for mask in masks if mask is not True]
    return functools.reduce(jnp.logical_and, masks) if masks else True


def _multiply_add(a, b, c, interpret):
    """`a * b + c`. XLA has Triton round the product first: two instructions in place of one."""
    if interpret:
        return a * b + c
    return plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, c.dtype)],
    )[0]


def _call(body, elements, size, out_shape, warps, interpret, *inputs):
    return pl.pallas_call(
        body,
        grid=(pl.cdiv(elements, size),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=body.func.__name__.strip("_"),
    )(*(array.reshape(-1) for array in inputs))


# Convolution --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(3, 4))
def _convolve(x, kernel, bias, blocks, interpret):
    tiling = _tiling(x.shape, blocks, kernel.shape[:2])
    size = 32 * blocks.warps * blocks.per_thread
    body = functools.partial(_depthwise_conv, tiling=tiling, size=size, interpret=interpret)
    y = jax.ShapeDtypeStruct((x.size,), x.dtype)
    inputs = (x, kernel) if bias is None else (x, kernel, bias)
    y = _call(body, tiling.count * x.shape[3], size, y, blocks.warps, interpret, *inputs)
    return y.reshape(x.shape)


def _depthwise_conv(x_ref, kernel_ref, *bias_and_y_refs, tiling, size, interpret):
    *bias_refs, y_ref = bias_and_y_refs
    (taps_down, taps_across), channels = tiling.sides, tiling.shape[3]
    above, left = taps_down // 2, taps_across // 2
    element = pl.program_id(0) * size + lax.iota(jnp.int32, size)
    index, channel = lax.div(element, channels), lax.rem(element, channels)
    valid = True if tiling.count * channels % size == 0 else index < tiling.count
    tile = _Tile(tiling, index, channel, valid)
    taps = [
        kernel_ref[tap * channels + channel].astype(jnp.float32)
        for tap in range(taps_down * taps_across)
    ]

    # A tile as high as the map streams over the map's own rows alone.
    whole = tiling.down == 1
    first, last = (0, tiling.rows) if whole else (-above, tiling.rows + above)
    bias = jnp.zeros((size,), jnp.float32)
    for bias_ref in bias_refs:
        bias = bias_ref[channel].astype(jnp.float32)
    empty = [bias] * tiling.columns
    load = functools.partial(tile.load, x_ref, columns=tile.masks, zeros=not whole)

    def add_row(row, carry):
        values, sums = carry
        following = load(row + 1)  # before they are needed
        values = _in_f32(values)
        new_sums = []
        for i in range(taps_down):  # the output row `row - above + i`
            totals = list(sums[i])
            for column in tile.columns:
                for j in range(taps_across):
                    if column + j - left in values:
                        totals[column] = _multiply_add(
                            values[column + j - left],
                            taps[(taps_down - 1 - i) * taps_across + j],
                            totals[column],
                            interpret,
                        )
            new_sums.append(totals)
        tile.store(y_ref, row - above, new_sums[0])
        return following, [*new_sums[1:], empty]

    _, sums = lax.fori_loop(first, last, add_row, (load(first), [empty] * taps_down))
    if whole:
        for row in range(above):
            tile.store(y_ref, jnp.int32(last - above + row), sums[row])


# Gradient of the kernel ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _kernel_gradient(x, g, sides, blocks, interpret):
    channels = x.shape[3]
    tiling = _tiling(x.shape, blocks, sides)
    size = 32 * blocks.warps * blocks.per_thread
    slots = min(blocks.slots, tiling.count)
    body = functools.partial(
        _depthwise_conv_kernel_gradient,
        tiling=tiling,
        slots=slots,
        size=size,
        unroll=blocks.unroll,
        interpret=interpret,
    )
    sums = jax.ShapeDtypeStruct((slots * math.prod(sides) * channels,), jnp.float32)
    sums = _call(body, slots * channels, size, sums, blocks.warps, interpret, x, g)
    return sums.reshape(slots, *sides, 1, channels).sum(0).astype(x.dtype)


def _depthwise_conv_kernel_gradient(
    x_ref, g_ref, sums_ref, *, tiling, slots, size, unroll, interpret
):
    """Each slot sums over the tiles slot, slot + slots, slot + 2 * slots and so on."""
    (taps_down, taps_across), channels = tiling.sides, tiling.shape[3]
    above, left = taps_down // 2, taps_across // 2
    element = pl.program_id(0) * size + lax.iota(jnp.int32, size)
    slot, channel = lax.div(element, channels), lax.rem(element, channels)
    valid = True if slots * channels % size == 0 else slot < slots
    assert tiling.rows % unroll == 0, (tiling, unroll)

    def add_tile(count, sums):
        index = slot + count * slots
        tile = _Tile(tiling, index, channel, _all(valid, index < tiling.count))
        load_x = functools.partial(
            tile.load, x_ref, columns=tile.masks, zeros=tiling.shape[1] % tiling.rows != 0
        )
        load_g = functools.partial(tile.load, g_ref, columns=tile.columns, zeros=True)

        def add_rows(block, carry):
            sums, window, x, g = carry
            sums = [list(row) for row in sums]
            for k in range(unroll):
                row = block * unroll + k
                next_x, next_g = load_x(row + 1), load_g(row + above + 1)  # before they are needed
                window = [*window[1:], _in_f32(g)]  # the rows of g from `above` before to after
                x = _in_f32(x)
                for i in range(taps_down):
                    for j in range(taps_across):
                        for column in tile.columns:
                            if column + j - left in x:
                                sums[i][j] = _multiply_add(
                                    x[column + j - left],
                                    window[taps_down - 1 - i][column],
                                    sums[i][j],
                                    interpret,
                                )
                x, g = next_x, next_g
            return sums, window, x, g

        zeros = {column: jnp.zeros((size,), jnp.float32) for column in tile.columns}
        if tiling.down == 1:
            window = [zeros] * above + [_in_f32(load_g(row)) for row in range(above)]
        else:
            window = [_in_f32(load_g(row)) for row in range(-above, above)]
        carry = sums, [zeros, *window], load_x(0), load_g(above)
        return lax.fori_loop(0, tiling.rows // unroll, add_rows, carry)[0]

    sums = [[jnp.zeros((size,), jnp.float32)] * taps_across for _ in range(taps_down)]
    sums = lax.fori_loop(0, pl.cdiv(tiling.count, slots), add_tile, sums)
    for i in range(taps_down):
        for j in range(taps_across):
            at = (slot * taps_down * taps_across + i * taps_across + j) * channels + channel
            plgpu.store(sums_ref.at[at], sums[i][j], mask=None if valid is True else valid)


def _in_f32(values):
    return {column: value.astype(jnp.float32) for column, value in values.items()}
