"""RandAugment, colour jitter and three-augment on batches of uint8 images, on the device.

The operations are Pillow's, as timm 0.3.2 (`timm/data/auto_augment.py`), torchvision's
`ColorJitter` and DeiT III (`augment.py` of facebookresearch/deit) call them. Those on tables and
blends give Pillow's results bit for bit: they are computed in whole numbers, or in float32 where no
sum can be fused with a product that was rounded, so that every compiler and device agrees. The
affine ones work in float32 where Pillow has float64, which can move a value by one level.

Every image has a PRNG key of its own and its result depends on nothing else, so a batch can be
split over devices in any way.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from convnext_jax.errors import InputError

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
IMAGENET_MEAN = (124, 116, 104)  # of the training pictures, in 0 .. 255, rounded
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_BLENDS = ("Brightness", "Contrast", "Color", "Sharpness")
_WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_MAX_MAGNITUDE = 10.0
_PART = 8  # images that an expensive operation takes at a time; few, as the last part is not full


# The policy ---------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """What RandAugment draws from.

    Attributes:
      magnitude: mean strength of an operation, 0 to 10.
      deviation: standard deviation of the strength, which is then clipped to 0 .. 10.
      layers: operations drawn for each image, with replacement; each is done with probability 1/2.
      increasing: whether a greater magnitude always changes more. If not, posterize and solarize
        change less, and the four blends go from a factor of 0.1 to one of 1.9.
    """

    magnitude: float = 10.0
    deviation: float = 0.0
    layers: int = 2
    increasing: bool = False


def parse_policy(text: str) -> Policy:
    """Read a policy such as "rand-m9-mstd0.5-inc1".

    The grammar is that of timm 0.3.2: after "rand", in any order, m (magnitude), mstd (deviation),
    n (layers) and inc (increasing), each followed by its value and joined by "-". Unlike there,
    inc0 means no, an unreadable part is an error, and the weights w are not supported.

    Raises:
      InputError: Naming the part that is not understood or out of range.
    """
    head, *parts = text.split("-")
    fields: dict[str, float | int | bool] = {}
    readers = {
        "m": ("magnitude", r"\d+", int, lambda value: value <= _MAX_MAGNITUDE),
        "mstd": ("deviation", r"\d+(\.\d*)?", float, math.isfinite),
        "n": ("layers", r"\d+", int, lambda value: value > 0),
        "inc": ("increasing", r"[01]", lambda digit: digit == "1", lambda value: True),
    }
    if head != "rand":
        raise InputError(
            f"augmentation {text!r} is unknown: give 'rand-m9-mstd0.5-inc1' or similar"
        )
    for part in parts:
        match = re.fullmatch(r"([a-z]+)([\d.]+)", part)
        name, value = match.groups() if match else (part, "")
        known = name in readers and re.fullmatch(readers[name][1], value)
        if not known or not readers[name][3](readers[name][2](value)):
            raise InputError(
                f"{part!r} in the augmentation {text!r} is unknown: it is made of m0 to m10 "
                "(magnitude), mstd0.5 (its deviation), n2 (operations an image), inc1 (increasing)"
            )
        fields[readers[name][0]] = readers[name][2](value)
    return Policy(**fields)


def draw(keys: jax.Array, policy: Policy) -> tuple[jax.Array, jax.Array]:
    """Draw what `rand_augment` does to each image.

    Args:
      keys: [N] typed PRNG keys.
      policy: see `Policy`.

    Returns:
      [N, layers] int32, the indices in `OPERATIONS`, or -1 where nothing is done; and [N, layers]
      float32, the argument of the operation (0 for those that take none): degrees, bits kept,
      threshold, summand, factor, shear, or share of the side.
    """

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        uniform_key, normal_key = jax.random.split(key)
        choice, fires, sign = jax.random.uniform(uniform_key, (3, policy.layers))
        choice = (choice * len(OPERATIONS)).astype(jnp.int32)
        noise = policy.deviation * jax.random.normal(normal_key, (policy.layers,))
        magnitude = jnp.clip(policy.magnitude + noise, 0, _MAX_MAGNITUDE)
        argument = _argument(choice, magnitude, jnp.where(sign < 0.5, -1, 1), policy.increasing)
        return jnp.where(fires < 0.5, choice, -1), argument

    return jax.vmap(one)(keys)


def _argument(
    operation: jax.Array, magnitude: jax.Array, sign: jax.Array, increasing: bool
) -> jax.Array:
    """What an operation is given for a magnitude in 0 .. 10 and a sign."""
    bits = jnp.floor(magnitude * 4 / 10)
    threshold = jnp.floor(magnitude * 256 / 10)
    factor = 1 + sign * magnitude * 0.09 if increasing else 0.1 + magnitude * 0.18
    arguments = {
        "Rotate": sign * magnitude * 3,
        "Posterize": 4 - bits if increasing else bits,
        "Solarize": 256 - threshold if increasing else threshold,
        "SolarizeAdd": jnp.floor(magnitude * 11),
        **dict.fromkeys(_BLENDS, factor),
        **dict.fromkeys(("ShearX", "ShearY"), sign * magnitude * 0.03),
        **dict.fromkeys(("TranslateX", "TranslateY"), sign * magnitude * 0.045),
    }
    zero = jnp.zeros_like(magnitude)
    return jnp.choose(
        operation, [arguments.get(name, zero) for name in OPERATIONS], mode="clip"
    ).astype(jnp.float32)


# Random augmentation ------------------------------------------------------------------------------


def rand_augment(
    keys: jax.Array,
    images: jax.Array,
    policy: Policy,
    fill: tuple[int, int, int] = IMAGENET_MEAN,
) -> jax.Array:
    """RandAugment (Cubuk et al. 2019, arXiv:1909.13719) as in timm 0.3.2.

    Args:
      keys: [N] typed PRNG keys, one an image.
      images: [N, H, W, 3] uint8.
      policy: see `Policy` and `parse_policy`.
      fill: what geometric operations put where there was no picture.

    Returns:
      [N, H, W, 3] uint8.

    Raises:
      InputError: The images are not uint8 of three channels.
    """
    _check(images)
    operations, arguments = draw(keys, policy)

    def layer(images: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return apply_operation(images, *drawn, fill), None

    return lax.scan(layer, images, (operations.T, arguments.T))[0]


def apply_operation(
    images: jax.Array,
    operation: jax.Array,
    argument: jax.Array,
    fill: tuple[int, int, int] = IMAGENET_MEAN,
) -> jax.Array:
    """Do one operation to each image.

    All images pass through one table look-up and one blend, whose tables and parameters depend on
    the operation. Warps and histograms would cost much more than that, so they are only done to
    the images that were given one, a few at a time.

    Args:
      images: [N, H, W, 3] uint8.
      operation: [N] int32, indices in `OPERATIONS`, or -1 for none.
      argument: [N] float32, see `draw`.
      fill: see `rand_augment`.

    Returns:
      [N, H, W, 3] uint8.
    """

    def chosen(*names: str) -> jax.Array:
        return functools.reduce(jnp.logical_or, [operation == _NUMBER[name] for name in names])

    # Tables.
    levels = jnp.arange(256)
    whole = argument.astype(jnp.int32)[:, None]
    simple = {
        "Invert": 255 - levels,
        "Posterize": _posterized(levels, whole),
        "Solarize": _solarized(levels, whole),
        "SolarizeAdd": _solarize_added(levels, whole),
    }
    table = jnp.broadcast_to(levels, (len(images), 256))
    for name, values in simple.items():
        table = jnp.where(chosen(name)[:, None], values, table)
    table = jnp.broadcast_to(table[:, None], (len(images), 3, 256))
    table = jnp.where(chosen("AutoContrast")[:, None, None], _autocontrast_table(images), table)
    table = _for_chosen(chosen("Equalize"), _equalize_table, table, images)

    # Blends.
    grey = _luma(images)
    degenerate = jnp.where(_wide(chosen("Contrast")), _mean(grey), 0)
    degenerate = jnp.where(_wide(chosen("Color")), grey, degenerate)
    degenerate = jnp.where(_wide(chosen("Sharpness")), _smooth(images), degenerate)
    blended = _blend(degenerate, images, argument)

    images = jnp.where(_wide(chosen(*_BLENDS)), blended, _look_up(table, images))

    # Warps.
    height, width = images.shape[1:3]
    matrix = jnp.stack(
        [
            _matrix(name, argument, height, width)
            if name in _WARPS
            else jnp.zeros((len(images), 6))
            for name in OPERATIONS
        ]
    )[operation, jnp.arange(len(images))]
    warp = functools.partial(_warp, fill=fill)
    return _for_chosen(chosen(*_WARPS), warp, images, images, matrix)


def color_jitter(keys: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Change brightness, contrast and saturation, in random order.

    As torchvision's `ColorJitter(strength, strength, strength)` on a PIL image: each factor is
    uniform in 1 - strength (at least 0) .. 1 + strength.

    Args:
      keys: [N] typed PRNG keys, one an image.
      images: [N, H, W, 3] uint8.
      strength: 0 or more; 0 changes nothing.

    Returns:
      [N, H, W, 3] uint8.

    Raises:
      InputError: The images are not uint8 of three channels, or the strength is negative.
    """
    _check(images)
    if strength < 0:
        raise InputError(f"the strength of the colour jitter is {strength}: give 0 or more")
    if strength == 0:
        return images
    operations, factors = draw_jitter(keys, strength)

    def step(images: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        operation, factor = drawn
        grey = _luma(images)
        degenerate = jnp.where(_wide(operation == _NUMBER["Contrast"]), _mean(grey), 0)
        degenerate = jnp.where(_wide(operation == _NUMBER["Color"]), grey, degenerate)
        return _blend(degenerate, images, factor), None

    return lax.scan(step, images, (operations.T, factors.T))[0]


def draw_jitter(keys: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """Draw the order ([N, 3] int32, indices in `OPERATIONS`) and factors ([N, 3] float32)."""
    three = jnp.array([_NUMBER[name] for name in ("Brightness", "Contrast", "Color")])

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        order, factors = jax.random.uniform(key, (2, 3))
        low, high = jnp.maximum(0, 1 - strength), 1 + strength
        return three[jnp.argsort(order)], low + (high - low) * factors

    return jax.vmap(one)(keys)


def three_augment(keys: jax.Array, images: jax.Array) -> jax.Array:
    """The first step of DeiT III's augmentation (Touvron et al. 2022, arXiv:2204.07118).

    Each image becomes grey, or is solarized from 128 on, or blurred by a Gaussian of standard
    deviation U(0.1, 2), with equal probability. There, a `color_jitter` of 0.3 follows.

    Args:
      keys: [N] typed PRNG keys, one an image.
      images: [N, H, W, 3] uint8.

    Returns:
      [N, H, W, 3] uint8.

    Raises:
      InputError: The images are not uint8 of three channels.
    """
    _check(images)
    choice, radius = draw_three(keys)
    choice = _wide(choice)
    grey = jnp.broadcast_to(_luma(images).astype(jnp.uint8), images.shape)
    changed = jnp.where(choice == 0, grey, solarize(images, 128))
    return jnp.where(choice == 2, gaussian_blur(images, radius), changed)


def draw_three(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw 0 (grey), 1 (solarize) or 2 (blur), [N] int32, and the blur's deviation, [N] float32."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        choice, radius = jax.random.uniform(key, (2,))
        return (3 * choice).astype(jnp.int32), 0.1 + 1.9 * radius

    return jax.vmap(one)(keys)


# Operations ---------------------------------------------------------------------------------------
# All take [N, H, W, 3] uint8, an argument that is a number or [N] of them, and return what they
# took. Tests compare each with Pillow.


def auto_contrast(images: jax.Array) -> jax.Array:
    """Stretch each channel to 0 .. 255, as `ImageOps.autocontrast`."""
    return _look_up(_autocontrast_table(images), images)


def equalize(images: jax.Array) -> jax.Array:
    """Make the histogram of each channel flat, as `ImageOps.equalize`."""
    return _look_up(_equalize_table(images), images)


def invert(images: jax.Array) -> jax.Array:
    """Subtract from 255, as `ImageOps.invert`."""
    return 255 - images


def posterize(images: jax.Array, bits: ArrayLike) -> jax.Array:
    """Keep the highest `bits` of each value, as `ImageOps.posterize`; 0 bits give black."""
    kept = _posterized(images.astype(jnp.int32), _wide(_each(bits, images, jnp.int32)))
    return kept.astype(jnp.uint8)


def solarize(images: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Invert values from `threshold` on, as `ImageOps.solarize`; 256 changes nothing."""
    threshold = _wide(_each(threshold, images, jnp.int32))
    return _solarized(images.astype(jnp.int32), threshold).astype(jnp.uint8)


def solarize_add(images: jax.Array, summand: ArrayLike) -> jax.Array:
    """Add to the values below 128, up to 255, as `solarize_add` of timm."""
    summand = _wide(_each(summand, images, jnp.int32))
    return _solarize_added(images.astype(jnp.int32), summand).astype(jnp.uint8)


def color(images: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blend with the grey picture, as `ImageEnhance.Color`."""
    return _blend(_luma(images), images, factor)


def contrast(images: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blend with the mean grey, as `ImageEnhance.Contrast`."""
    return _blend(_mean(_luma(images)), images, factor)


def brightness(images: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blend with black, as `ImageEnhance.Brightness`."""
    return _blend(jnp.zeros((), jnp.int32), images, factor)


def sharpness(images: jax.Array, factor: ArrayLike) -> jax.Array:
    """Blend with the smoothed picture, as `ImageEnhance.Sharpness`."""
    return _blend(_smooth(images), images, factor)


def rotate(
    images: jax.Array, degrees: ArrayLike, fill: tuple[int, int, int] = IMAGENET_MEAN
) -> jax.Array:
    """Rotate counter-clockwise about the centre, bicubic, as `Image.rotate`."""
    return _geometric("Rotate", images, degrees, fill)


def shear_x(
    images: jax.Array, shear: ArrayLike, fill: tuple[int, int, int] = IMAGENET_MEAN
) -> jax.Array:
    """Take the pixel (x, y) from (x + shear y, y), bicubic, as `Image.transform`."""
    return _geometric("ShearX", images, shear, fill)


def shear_y(
    images: jax.Array, shear: ArrayLike, fill: tuple[int, int, int] = IMAGENET_MEAN
) -> jax.Array:
    """Take the pixel (x, y) from (x, y + shear x), bicubic, as `Image.transform`."""
    return _geometric("ShearY", images, shear, fill)


def translate_x(
    images: jax.Array, share: ArrayLike, fill: tuple[int, int, int] = IMAGENET_MEAN
) -> jax.Array:
    """Take the pixel (x, y) from (x + share W, y), bicubic, as `Image.transform`."""
    return _geometric("TranslateX", images, share, fill)


def translate_y(
    images: jax.Array, share: ArrayLike, fill: tuple[int, int, int] = IMAGENET_MEAN
) -> jax.Array:
    """Take the pixel (x, y) from (x, y + share H), bicubic, as `Image.transform`."""
    return _geometric("TranslateY", images, share, fill)


def gaussian_blur(images: jax.Array, radius: ArrayLike) -> jax.Array:
    """Blur with a standard deviation of `radius` pixels, 0 to 2, as `ImageFilter.GaussianBlur`.

    Three box blurs along each axis; their windows are those of Gwosdek et al. 2011, whose edges
    count in part. Pillow works in whole numbers, once the window is known; that is computed in
    float32 where it has float64, which can move a value by one level.
    """
    radius = _each(radius, images, jnp.float32)
    variance = radius * radius / 3
    length = jnp.sqrt(12 * variance + 1)
    whole = jnp.floor((length - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) * (whole + 1)))
    # The weights of the inner pixels of the window and of the two outer ones, times 2**24.
    inner = (2.0**24 / (2 * (whole + part) + 1)).astype(jnp.uint32)
    whole = whole.astype(jnp.uint32)
    outer = (jnp.uint32(2**24) - (2 * whole + 1) * inner) // 2
    inner, outer, is_wide = _wide(inner), _wide(outer), _wide(whole) > 0

    def box_blur(images: jax.Array, axis: int) -> jax.Array:
        padding = [(2, 2) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(images, padding, mode="edge").astype(jnp.uint32)
        size = images.shape[axis]
        a, b, c, d, e = (lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(5))
        window = jnp.where(is_wide, b + c + d, c) * inner + jnp.where(is_wide, a + e, b + d) * outer
        return ((window + 2**23) >> 24).astype(jnp.uint8)

    blur_three_times = functools.partial(lax.fori_loop, 0, 3)
    images = blur_three_times(lambda _, images: box_blur(images, 2), images)
    return blur_three_times(lambda _, images: box_blur(images, 1), images)


# What they are made of ----------------------------------------------------------------------------


def _check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise InputError(
            f"images are {images.dtype} of shape {images.shape}: augmentation takes uint8 pictures "
            "of three channels, (N, H, W, 3)"
        )


def _each(argument: ArrayLike, images: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[N] of the dtype, from that or from one number."""
    return jnp.broadcast_to(jnp.asarray(argument, dtype), images.shape[:1])


def _wide(values: jax.Array) -> jax.Array:
    """[N] to [N, 1, 1, 1]."""
    return values[:, None, None, None]


def _for_chosen(
    chosen: jax.Array,
    function: Callable[..., jax.Array],
    otherwise: jax.Array,
    *operands: jax.Array,
) -> jax.Array:
    """`function(*operands)` in the rows that are `chosen`, and `otherwise` in the others.

    Computes a few rows at a time, as many times as it takes for those that are chosen; each row of
    the result must depend on the same row of the operands alone.
    """
    rows = len(chosen)
    part = min(_PART, rows)
    order = jnp.argsort(~chosen, stable=True)
    # What is not chosen is given a row that does not exist, so that its result is dropped.
    order = jnp.where(chosen[order], order, rows + jnp.arange(rows))
    order = jnp.concatenate([order, 2 * rows + jnp.arange(part)])
    end = chosen.sum()

    def compute(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, result = state
        which = lax.dynamic_slice_in_dim(order, start, part)
        value = function(*(operand.at[which].get(mode="clip") for operand in operands))
        value = value.astype(result.dtype)
        return start + part, result.at[which].set(value, mode="drop", unique_indices=True)

    start = jnp.zeros((), end.dtype)
    return lax.while_loop(lambda state: state[0] < end, compute, (start, otherwise))[1]


def _look_up(table: jax.Array, images: jax.Array) -> jax.Array:
    """table[n, c, images[n, h, w, c]], uint8."""
    rows = jnp.arange(len(images))[:, None, None, None]
    channels = jnp.arange(images.shape[-1])
    table = table.astype(jnp.uint8)
    return table.at[rows, channels, images.astype(jnp.int32)].get(mode="promise_in_bounds")


def _posterized(values: jax.Array, bits: jax.Array) -> jax.Array:
    return values & (-1 << (8 - bits))


def _solarized(values: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(values < threshold, values, 255 - values)


def _solarize_added(values: jax.Array, summand: jax.Array) -> jax.Array:
    return jnp.where(values < 128, jnp.minimum(values + summand, 255), values)


def _autocontrast_table(images: jax.Array) -> jax.Array:
    """[N, 3, 256] int32."""
    low = images.min((1, 2)).astype(jnp.int32)[..., None]
    high = images.max((1, 2)).astype(jnp.int32)[..., None]
    levels = jnp.arange(256)
    span = jnp.maximum(high - low, 1)
    stretched, rest = jnp.divmod(255 * (levels - low), span)
    # One number a channel is looked up, not one a level: gathers are what a TPU is slow at.
    is_below = jnp.asarray(_rounded_below())[low, high] >> (stretched & 31).astype(jnp.uint32) & 1
    stretched -= jnp.where(rest == 0, is_below.astype(jnp.int32), 0)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), levels)


@functools.cache
def _rounded_below() -> np.ndarray:
    """Where float64 arithmetic takes autocontrast to just below a whole number.

    Pillow computes int(level * scale - low * scale) with scale = 255 / (high - low). Where the
    exact value is whole, rounding can leave less, and `int` then takes the number before it.

    Returns:
      [256, 256] uint32, by the lowest and the highest level of a channel: bit v % 32 is set where
      the whole number v becomes v - 1. These v are few and at equal, odd distances, so that no two
      have the same bit.
    """
    low, high = np.triu_indices(256, 1)
    scale = 255.0 / (high - low)
    bits = np.zeros((256, 256), np.uint32)
    for level in range(256):
        exact, rest = np.divmod(255 * (level - low), high - low)
        computed = (level * scale + -low * scale).astype(np.int64)
        is_below = (low <= level) & (level <= high) & (rest == 0) & (computed < exact)
        bits[low[is_below], high[is_below]] |= np.uint32(1) << (exact[is_below] % 32).astype(
            np.uint32
        )
    return bits


def _equalize_table(images: jax.Array) -> jax.Array:
    """[N, 3, 256] int32."""
    levels = jnp.arange(256)
    n, height, width, channels = images.shape
    image, channel = jnp.arange(n)[:, None, None, None], jnp.arange(channels)
    histogram = jnp.zeros((n, channels, 256), jnp.int32).at[image, channel, images].add(1)
    brightest = jnp.where(histogram > 0, levels, 0).max(-1, keepdims=True)
    step = (height * width - jnp.take_along_axis(histogram, brightest, -1)) // 255
    below = jnp.cumsum(histogram, -1) - histogram
    equalized = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(equalized, 255), levels)


def _luma(images: jax.Array) -> jax.Array:
    """[N, H, W, 1] int32: the luma of ITU-R BT.601 in 0 .. 255, rounded as `Image.convert("L")`."""
    red, green, blue = jnp.split(images.astype(jnp.int32), 3, -1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def _mean(grey: jax.Array) -> jax.Array:
    """[N, 1, 1, 1] int32: the mean over an image, rounded."""
    count = grey.shape[1] * grey.shape[2]
    total = grey.sum((1, 2, 3), keepdims=True, dtype=jnp.uint32)
    return ((2 * total + count) // (2 * count)).astype(jnp.int32)


def _smooth(images: jax.Array) -> jax.Array:
    """[N, H, W, 3] int32: the filter ((1, 1, 1), (1, 5, 1), (1, 1, 1)) / 13, rounded.

    The outermost pixels stay as they are. The exact value is never halfway between two levels.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.int32)
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    values = images.astype(jnp.int32)
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    return jnp.where(inside, (2 * total + 13) // 26, values)


def _blend(degenerate: jax.Array, images: jax.Array, factor: ArrayLike) -> jax.Array:
    """Compute degenerate + factor (images - degenerate), clipped, as `Image.blend`.

    Pillow rounds the product to float32, then the sum, then cuts off the fraction. Here the product
    is one of whole numbers (24 bits times 8), rounded by its conversion to float32; the scale that
    follows is a power of two and exact. So nothing changes where a compiler fuses the scale with
    the sum, as they do on accelerators.

    Args:
      degenerate: [N, H, W, 3] int32, or anything that broadcasts to it.
      images: [N, H, W, 3] uint8.
      factor: A number or [N] of them, 0 or more.

    Returns:
      [N, H, W, 3] uint8.
    """
    code = lax.bitcast_convert_type(_each(factor, images, jnp.float32), jnp.uint32)
    exponent, fraction = code >> 23, code & (2**23 - 1)
    is_normal = exponent > 24  # below that it is less than 2**-102, as good as 0
    mantissa = jnp.where(is_normal, fraction | 2**23, 0)
    scale = lax.bitcast_convert_type(jnp.where(is_normal, exponent - 23, 1) << 23, jnp.float32)

    difference = images.astype(jnp.int32) - degenerate
    product = _wide(mantissa) * jnp.abs(difference).astype(jnp.uint32)
    product = product.astype(jnp.float32) * _wide(scale)
    total = degenerate.astype(jnp.float32) + jnp.where(difference < 0, -product, product)
    return jnp.clip(total, 0, 255).astype(jnp.uint8)


def _geometric(
    name: str, images: jax.Array, argument: ArrayLike, fill: tuple[int, int, int]
) -> jax.Array:
    argument = _each(argument, images, jnp.float32)
    return _warp(images, _matrix(name, argument, *images.shape[1:3]), fill)


def _matrix(name: str, argument: jax.Array, height: int, width: int) -> jax.Array:
    """[N, 6] float32 (a, b, c, d, e, f): (x, y) takes its value from (ax + by + c, dx + ey + f).

    Coordinates are in pixels from the centre of the picture.
    """
    one, zero = jnp.ones_like(argument), jnp.zeros_like(argument)
    radians = argument * (math.pi / 180)
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    # A shear leaves the corner where it is; Pillow measures it from there.
    rows = {
        "Rotate": (cos, -sin, zero, sin, cos, zero),
        "ShearX": (one, argument, argument * (height / 2), zero, one, zero),
        "ShearY": (one, zero, zero, argument, one, argument * (width / 2)),
        "TranslateX": (one, zero, argument * width, zero, one, zero),
        "TranslateY": (one, zero, zero, zero, one, argument * height),
    }
    return jnp.stack(rows[name], -1)


def _warp(images: jax.Array, matrix: jax.Array, fill: tuple[int, int, int]) -> jax.Array:
    """Affine transformation with bicubic interpolation, as `Image.transform`.

    The cubic is the one of a = -1, at the edges the outermost pixels go on, and the fraction of the
    result is cut off.

    Args:
      images: [N, H, W, 3] uint8.
      matrix: [N, 6] float32, see `_matrix`.
      fill: For pixels whose centre comes from outside of the picture.

    Returns:
      [N, H, W, 3] uint8.
    """
    n, height, width, _ = images.shape
    a, b, c, d, e, f = (matrix[:, i, None, None] for i in range(6))
    x = jnp.arange(width) + (0.5 - width / 2)
    y = (jnp.arange(height) + (0.5 - height / 2))[:, None]
    source_x = a * x + b * y + c + width / 2
    source_y = d * x + e * y + f + height / 2
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)

    left, top = jnp.floor(source_x - 0.5), jnp.floor(source_y - 0.5)
    right_of, below = (source_x - 0.5 - left)[..., None], (source_y - 0.5 - top)[..., None]
    columns = left.astype(jnp.int32)[..., None] + jnp.arange(-1, 3)
    rows = top.astype(jnp.int32)[..., None] + jnp.arange(-1, 3)
    columns, rows = jnp.clip(columns, 0, width - 1), jnp.clip(rows, 0, height - 1)

    # One gather brings all three channels, packed into one number.
    red, green, blue = jnp.moveaxis(images.astype(jnp.int32), -1, 0)
    packed = (red | green << 8 | blue << 16).reshape(n, -1)

    def tap(i: int, j: int) -> jax.Array:
        index = (rows[..., i] * width + columns[..., j]).reshape(n, -1)
        found = jnp.take_along_axis(packed, index, 1, mode="promise_in_bounds")
        found = found.reshape(n, height, width, 1)
        return ((found >> jnp.array([0, 8, 16])) & 255).astype(jnp.float32)

    across = [_cubic(*(tap(i, j) for j in range(4)), right_of) for i in range(4)]
    value = jnp.clip(_cubic(*across, below), 0, 255).astype(jnp.uint8)
    return jnp.where(inside[..., None], value, jnp.array(fill, jnp.uint8))


def _cubic(
    before: jax.Array, at: jax.Array, after: jax.Array, last: jax.Array, offset: jax.Array
) -> jax.Array:
    """The cubic through `at` and `after`; where all four are equal it is exactly that value."""
    slope = after - before
    square = 2 * (before - at) + after - last
    cube = at - before - after + last
    return at + offset * (slope + offset * (square + offset * cube))
