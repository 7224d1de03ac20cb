"""Image resizing that is bit-equal to Pillow's, as pure functions that run on the accelerator.

Pillow resizes 8-bit pictures in two passes, one along the width and one along the height. Every
output pixel of a pass is a weighted sum of a few neighbouring input pixels; the weights are
computed in float64, rounded to 22-bit fixed point, and the sum is rounded back to 8 bits after
*each* pass. All of that is integer arithmetic, so it can be reproduced exactly.

The work is split in two:

* `plan_resize` computes the weights of both passes on the host, with numpy in float64;
* `apply_plan` runs the passes on the device. The plan is an array argument, so the compiled program
  depends on shapes alone, not on the original size of a picture nor on the filter.

Nearest neighbour, a side that does not change, a crop, and zero padding are plans too: one weight
of 1 a pixel, or none at all. `resize` puts the two together for pictures of one shape; `pack`
brings pictures of many sizes to a few shapes, so that a stream of photos needs only a handful of
programs.

Pillow 13.0.0: `src/libImaging/Resample.c` for the filters, `src/libImaging/Geometry.c` for nearest.
Older releases always run the pass along the width first; 13.0 runs the other one first when the
height shrinks by more than twice what the width does, which is what is done here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL.Image import Resampling

from convnext_jax.errors import InputError

__all__ = [
    "Resampling",
    "ResizePlan",
    "Taps",
    "apply_plan",
    "pack",
    "packed_shape",
    "plan_resize",
    "premultiply_alpha",
    "resize",
    "unpremultiply_alpha",
]

PRECISION_BITS = 22
# The weights of one side take about as much memory as 16 times its pixels; and nothing longer than
# this is a photo.
MAX_SIDE = 2**20


class Taps(NamedTuple):
    """The weighted sums of one resizing pass, for `n_out` output positions along one side.

    Output `i` is the sum over `t` of `weights[i, t] * input[start[i] + t]`, divided by 2**22 with
    rounding. Weights of zero may reach beyond the input.
    """

    start: np.ndarray | jax.Array  # [..., n_out] int32, first input index
    weights: np.ndarray | jax.Array  # [..., n_out, n_taps] int32, 22-bit fixed point


class ResizePlan(NamedTuple):
    """What `apply_plan` needs to know about one picture or, with a leading axis, about many."""

    rows: Taps  # along the height
    columns: Taps  # along the width
    rows_first: np.ndarray | jax.Array  # [...] bool, which pass comes first


# Filters, as functions of the distance in units of the (stretched) input pixel -------------------


def _box(x: np.ndarray) -> np.ndarray:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1.0, 1.0 - x, 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    x = x * np.pi
    return np.where(x == 0.0, 1.0, np.sin(x) / np.where(x == 0.0, 1.0, x))


def _hamming(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    # Pillow writes these two constants in single precision.
    window = float(np.float32(0.54)) + float(np.float32(0.46)) * np.cos(x * np.pi)
    return np.where(x == 0.0, 1.0, np.where(x < 1.0, _sinc(x) * window, 0.0))


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3.0), 0.0)


_FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    Resampling.BOX: (_box, 0.5),
    Resampling.BILINEAR: (_bilinear, 1.0),
    Resampling.HAMMING: (_hamming, 1.0),
    Resampling.BICUBIC: (_bicubic, 2.0),
    Resampling.LANCZOS: (_lanczos, 3.0),
}


# The plan, on the host ----------------------------------------------------------------------------


def plan_resize(
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    resample: int = Resampling.BICUBIC,
    crop: tuple[int, int, int, int] | None = None,
) -> ResizePlan:
    """Compute how Pillow resizes a picture of one size to another, and optionally crops it.

    Args:
      in_size: (height, width) before, in pixels. (Pillow's own order is width, height.)
      out_size: (height, width) after, in pixels.
      resample: A Pillow filter: NEAREST 0, LANCZOS 1, BILINEAR 2, BICUBIC 3, BOX 4, HAMMING 5.
      crop: (top, left, height, width) of the part of the *resized* picture to keep. What lies
        outside of the picture becomes 0, and what is cut away is never computed.

    Returns:
      A plan of numpy arrays, with `out_size` (or the crop's size) outputs.

    Raises:
      InputError: A side below 1 or above 2**20 pixels, or an unknown filter.
    """
    for size in (in_size, out_size):
        if min(size) < 1 or max(size) > MAX_SIDE:
            raise InputError(
                f"cannot resize (height, width) {tuple(in_size)} to {tuple(out_size)}: "
                f"every side must be from 1 to {MAX_SIDE} pixels"
            )
    if resample != Resampling.NEAREST and resample not in _FILTERS:
        raise InputError(
            f"unknown resampling filter {resample!r}: use 0 (nearest), 1 (lanczos), 2 (bilinear), "
            "3 (bicubic), 4 (box) or 5 (hamming)"
        )
    top, left, height, width = (0, 0, *out_size) if crop is None else crop
    rows, columns = (
        _make_taps(int(before), int(after), int(resample), int(first), int(count))
        for before, after, first, count in zip(
            in_size, out_size, (top, left), (height, width), strict=True
        )
    )
    return ResizePlan(rows, columns, np.bool_(_rows_first(in_size, out_size)))


def _rows_first(in_size: tuple[int, int], out_size: tuple[int, int]) -> bool:
    shrunk_height, shrunk_width = (
        before - after for before, after in zip(in_size, out_size, strict=True)
    )
    return shrunk_height > 0 and shrunk_height > 2 * shrunk_width


@functools.lru_cache(maxsize=256)
def _make_taps(in_size: int, out_size: int, resample: int, first: int, count: int) -> Taps:
    """Taps of one side for `count` outputs from `first` on, as read-only numpy arrays."""
    # Outputs outside of the picture have no weights.
    low = min(max(first, 0), out_size)
    high = min(max(first + count, low), out_size)
    index = np.arange(low, high)
    if in_size == out_size or low == high:
        start, weights = index, np.ones((len(index), 1))
    elif resample == Resampling.NEAREST:
        # The coordinate is accumulated, and its rounding errors with it: (i + 0.5) * scale often
        # names another pixel.
        scale = in_size / out_size
        steps = np.full(high, scale)
        steps[0] *= 0.5
        start = np.add.accumulate(steps)[low:].astype(np.int64)
        weights = np.ones((len(index), 1))
    else:
        start, weights = _filter_weights(in_size, out_size, index, *_FILTERS[resample])
    # Rounds half away from zero: the conversion truncates.
    fixed = weights * (1 << PRECISION_BITS) + np.where(weights < 0.0, -0.5, 0.5)
    before = min(max(-first, 0), count)
    missing = (before, count - before - len(index))
    taps = Taps(
        np.pad(start.astype(np.int32), missing), np.pad(fixed.astype(np.int32), (missing, (0, 0)))
    )
    for array in taps:
        array.flags.writeable = False
    return taps


def _filter_weights(
    in_size: int,
    out_size: int,
    outputs: np.ndarray,
    kernel: Callable[[np.ndarray], np.ndarray],
    support: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Of the outputs named: first input index [n] and normalised float64 weights [n, n_taps]."""
    scale = in_size / out_size
    # When shrinking, the filter is stretched so that it covers every input pixel.
    stretch = max(scale, 1.0)
    support *= stretch
    center = (outputs + 0.5) * scale
    start = np.maximum((center - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((center + support + 0.5).astype(np.int64), in_size)
    index = start[:, None] + np.arange((stop - start).max())
    weights = kernel((index - center[:, None] + 0.5) * (1.0 / stretch))
    weights = np.where(index < stop[:, None], weights, 0.0)
    # Accumulated from left to right as Pillow does; np.sum would add in pairs.
    total = np.add.accumulate(weights, axis=1)[:, -1:]
    return start, weights / np.where(total == 0.0, 1.0, total)


# Many sizes, few shapes ---------------------------------------------------------------------------


def _bucket(n: int, smallest: int, factor: int, step: int = 4096) -> int:
    """The next of smallest, smallest * factor, ..., and from `step` on of its multiples."""
    bucket = smallest
    while bucket < n:
        bucket = min(bucket * factor, bucket + step)
    return bucket


def packed_shape(plan: ResizePlan) -> tuple[int, int, int]:
    """The shape that `pack` gives to the one picture of a plan.

    Only the part of a picture that its plan reads is kept. Its sides are padded to 64, 128, 256,
    ... pixels, the shorter at least to half of the longer, so that photos of every size and
    orientation share at most three shapes an octave; taps are padded to 8, 32, 128, ... a pixel.
    Only what is longer than 4096 pixels is padded less, for the sake of memory.

    Returns:
      Height, width, and taps of an output pixel.
    """
    height, width = (stop - first for first, stop in map(_span, (plan.rows, plan.columns)))
    if max(height, width) <= max(4 * min(height, width), 4096):
        height, width = max(height, width // 2), max(width, height // 2)
    n_taps = max(taps.weights.shape[1] for taps in (plan.rows, plan.columns))
    return _bucket(height, 64, 2), _bucket(width, 64, 2), _bucket(n_taps, 8, 4)


def pack(
    images: Sequence[np.ndarray], plans: Sequence[ResizePlan]
) -> tuple[np.ndarray, ResizePlan]:
    """Bring pictures of many sizes to one shape out of a small set, for `apply_plan`.

    The shape is the largest `packed_shape` of the plans; pictures and taps are padded with zeros.

    Args:
      images: N arrays [H_i, W_i, C] uint8, C the same for all.
      plans: N plans for them, all with the same number of outputs.

    Returns:
      The pictures, [N, H, W, C] uint8, and one plan with a leading axis N; all numpy.
    """
    height, width, n_taps = (max(sizes) for sizes in zip(*map(packed_shape, plans), strict=True))
    batch = np.zeros((len(images), height, width, images[0].shape[-1]), np.uint8)
    starts = [np.zeros((len(plans), len(taps.start)), np.int32) for taps in plans[0][:2]]
    weights = [np.zeros((*start.shape, n_taps), np.int32) for start in starts]
    for number, (image, plan) in enumerate(zip(images, plans, strict=True)):
        spans = [_span(taps) for taps in plan[:2]]
        window = image[tuple(slice(*span) for span in spans)]
        batch[number, : window.shape[0], : window.shape[1]] = window
        for axis, taps in enumerate(plan[:2]):
            # Outputs without any weight may start anywhere; keep them inside.
            starts[axis][number] = np.maximum(taps.start - spans[axis][0], 0)
            weights[axis][number, :, : taps.weights.shape[1]] = taps.weights
    rows, columns = (Taps(*taps) for taps in zip(starts, weights, strict=True))
    return batch, ResizePlan(rows, columns, np.array([plan.rows_first for plan in plans]))


def _span(taps: Taps) -> tuple[int, int]:
    """First and last + 1 input index with a weight; (0, 1) if there is none."""
    out, tap = np.nonzero(taps.weights)
    if out.size == 0:
        return 0, 1
    index = taps.start[out] + tap
    return int(index.min()), int(index.max()) + 1


# The passes, on the device ------------------------------------------------------------------------


@jax.jit
def apply_plan(images: jax.Array, plan: ResizePlan) -> jax.Array:
    """Resize (and crop) images as planned by `plan_resize`.

    Args:
      images: [..., H, W, C] uint8.
      plan: A plan shared by all images, or one whose arrays have the leading axes of `images` in
        front (as `pack` returns them).

    Returns:
      [..., n_rows, n_columns, C] uint8.

    Raises:
      InputError: The images are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise InputError(f"resizing works on uint8 images, not {images.dtype}: convert them first")
    leading = images.shape[:-3]
    shared = plan.rows_first.ndim == 0
    images = images.reshape(-1, *images.shape[-3:])
    if not shared:
        plan = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(leading) :]), plan)

    # A CPU sums one picture at a time, tap by tap, and stays in its cache; an accelerator does a
    # batch at once, as matrix products.
    def one_by_one(images: jax.Array, plan: ResizePlan) -> jax.Array:
        if shared:
            return jax.lax.map(lambda image: _by_gather(image, plan), images)
        return jax.lax.map(lambda each: _by_gather(*each), (images, plan))

    def all_at_once(images: jax.Array, plan: ResizePlan) -> jax.Array:
        return jax.vmap(_by_product, in_axes=(0, None if shared else 0))(images, plan)

    out = jax.lax.platform_dependent(images, plan, cpu=one_by_one, default=all_at_once)
    return out.reshape(*leading, *out.shape[1:])


def _in_order(
    image: jax.Array,
    rows_first: jax.Array,
    along_height: Callable[[jax.Array], jax.Array],
    along_width: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    return jax.lax.cond(
        rows_first,
        lambda image: along_width(along_height(image)),
        lambda image: along_height(along_width(image)),
        image,
    )


def _to_uint8(sums: jax.Array) -> jax.Array:
    rounded = (sums + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.uint8)


def _by_gather(image: jax.Array, plan: ResizePlan) -> jax.Array:
    """[H, W, C] uint8 -> [n_rows, n_columns, C] uint8, by loops that visit no unused tap or row."""
    rows, columns, rows_first = plan
    n_columns, channels = columns.start.shape[0], image.shape[2]

    def weighted_rows(pixels: jax.Array, taps: Taps) -> jax.Array:
        """Sums of whole rows, which lie contiguously in memory: [n_in, M] -> [n_out, M]."""

        def add_tap(tap: jax.Array, sums: jax.Array) -> jax.Array:
            neighbour = jnp.take(pixels, taps.start + tap, axis=0, mode="clip").astype(jnp.int32)
            return sums + neighbour * jax.lax.dynamic_index_in_dim(taps.weights, tap, axis=1)

        used = jnp.max(jnp.where(taps.weights != 0, jnp.arange(taps.weights.shape[1]) + 1, 0))
        sums = jnp.zeros((taps.start.shape[0], pixels.shape[1]), jnp.int32)
        return _to_uint8(jax.lax.fori_loop(0, used, add_tap, sums))

    def along_height(image: jax.Array) -> jax.Array:
        out = weighted_rows(image.reshape(image.shape[0], -1), rows)
        return out.reshape(-1, *image.shape[1:])

    def along_width(image: jax.Array) -> jax.Array:
        # In transposed blocks of 16 rows: a transposed picture would fall out of the cache.
        height, width = image.shape[:2]
        block_height = min(16, height)

        def do_block(block: jax.Array, out: jax.Array) -> jax.Array:
            # The last block may overlap the one before it, and computes the same again.
            top = jnp.minimum(block * block_height, height - block_height)
            pixels = jax.lax.dynamic_slice_in_dim(image, top, block_height, axis=0)
            pixels = weighted_rows(pixels.swapaxes(0, 1).reshape(width, -1), columns)
            pixels = pixels.reshape(n_columns, block_height, channels).swapaxes(0, 1)
            return jax.lax.dynamic_update_slice_in_dim(out, pixels, top, axis=0)

        last = jnp.where(
            rows.weights != 0, rows.start[:, None] + jnp.arange(rows.weights.shape[1]), 0
        )
        height_in_use = jnp.where(rows_first, height, jnp.max(last) + 1)
        out = jnp.zeros((height, n_columns, channels), jnp.uint8)
        return jax.lax.fori_loop(0, -(-height_in_use // block_height), do_block, out)

    return _in_order(image, rows_first, along_height, along_width)


def _by_product(image: jax.Array, plan: ResizePlan) -> jax.Array:
    """The same as 8-bit matrix products with 32-bit sums, for tensor cores and matrix units."""

    def weighted_rows(image: jax.Array, taps: Taps) -> jax.Array:
        # The band matrix [n_out, n_in], split into three signed 8-bit digits: 2**16, 2**8 and 1.
        tap = jnp.arange(image.shape[0]) - taps.start[:, None]
        last = taps.weights.shape[1] - 1
        band = jnp.take_along_axis(taps.weights, jnp.clip(tap, 0, last), axis=1)
        band = jnp.where((tap >= 0) & (tap <= last), band, 0)
        upper = (band + 128) >> 8
        digits = [(upper + 128) >> 8, ((upper + 128) & 255) - 128, ((band + 128) & 255) - 128]
        # Pixels are shifted into the signed range; the sums of the weights shift the result back.
        signed = (image.reshape(image.shape[0], -1).astype(jnp.int32) - 128).astype(jnp.int8)
        high, middle, low = (
            jnp.dot(digit.astype(jnp.int8), signed, preferred_element_type=jnp.int32)
            for digit in digits
        )
        sums = (high << 16) + (middle << 8) + low + 128 * jnp.sum(band, axis=1, keepdims=True)
        return _to_uint8(sums).reshape(-1, *image.shape[1:])

    return _in_order(
        image,
        plan.rows_first,
        lambda image: weighted_rows(image, plan.rows),
        lambda image: weighted_rows(image.swapaxes(0, 1), plan.columns).swapaxes(0, 1),
    )


def resize(
    images: jax.Array | np.ndarray, size: tuple[int, int], resample: int = Resampling.BICUBIC
) -> jax.Array:
    """Resize images exactly as Pillow does; under `jax.jit`, `size` and `resample` are static.

    The channels are resized independently of one another, which is what Pillow does to L, RGB and
    CMYK pictures. It multiplies the colours of LA and RGBA pictures by alpha before and divides
    them after: see `premultiply_alpha`.

    Args:
      images: [..., H, W, C] uint8.
      size: (height, width) of the result, in pixels. (Pillow's own order is width, height.)
      resample: A Pillow filter: NEAREST 0, LANCZOS 1, BILINEAR 2, BICUBIC 3, BOX 4, HAMMING 5.

    Returns:
      [..., height, width, C] uint8, equal to `PIL.Image.Image.resize` in every bit.

    Raises:
      InputError: Images that are not uint8 or have less than 3 axes, a size below 1, an unknown
        filter.
    """
    if images.ndim < 3:
        raise InputError(
            f"resize expects images [..., height, width, channels], got shape {images.shape}"
        )
    return apply_plan(images, plan_resize(images.shape[-3:-1], size, resample))


def premultiply_alpha(images: jax.Array) -> jax.Array:
    """Multiply the colours by the last channel, as Pillow does before it filters LA and RGBA.

    Args:
      images: [..., C] uint8, alpha last.

    Returns:
      The same shape, uint8, alpha unchanged.
    """
    colours, alpha = images[..., :-1].astype(jnp.int32), images[..., -1:]
    product = colours * alpha.astype(jnp.int32) + 128
    product = ((product >> 8) + product) >> 8  # division by 255, rounded
    return jnp.concatenate([product.astype(jnp.uint8), alpha], axis=-1)


def unpremultiply_alpha(images: jax.Array) -> jax.Array:
    """Divide the colours by the last channel, as Pillow does after it has filtered LA and RGBA.

    Args:
      images: [..., C] uint8, alpha last.

    Returns:
      The same shape, uint8, alpha unchanged; colours where alpha is 0 are left as they are.
    """
    colours, alpha = images[..., :-1].astype(jnp.int32), images[..., -1:]
    divisor = jnp.maximum(alpha.astype(jnp.int32), 1)
    quotient = jnp.minimum(255 * colours // divisor, 255)
    quotient = jnp.where(alpha == 0, colours, quotient)
    return jnp.concatenate([quotient.astype(jnp.uint8), alpha], axis=-1)
