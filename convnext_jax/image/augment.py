"""Random augmentation and normalisation for training, of batches on the device."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from convnext_jax.errors import InputError

__all__ = ["normalize", "random_erase", "random_flip", "random_shift"]


def random_shift(keys: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Shift each image by up to `pixels` along each axis; what comes in is its reflection.

    The same as a random crop of the picture padded by reflection (torchvision's
    `RandomCrop(size, padding=pixels, padding_mode="reflect")`): all shifts are equally probable.

    Args:
      keys: [N] typed PRNG keys, one an image.
      images: [N, H, W, C], any dtype.
      pixels: 0 or more, and less than H and W.

    Returns:
      The same shape and dtype.

    Raises:
      InputError: The picture is too small to be reflected so far.
    """
    height, width = images.shape[1:3]
    if not 0 <= pixels < min(height, width):
        raise InputError(
            f"cannot shift pictures of {height} x {width} by {pixels} pixels: give at least 0 and "
            "less than their smaller side"
        )
    shifts = jax.vmap(lambda key: jax.random.randint(key, (2,), -pixels, pixels + 1))(keys)

    def reflected(shift: jax.Array, size: int) -> jax.Array:
        place = jnp.abs(jnp.arange(size) + shift[:, None])
        return size - 1 - jnp.abs(size - 1 - place)

    rows, columns = reflected(shifts[:, 0], height), reflected(shifts[:, 1], width)
    each = jnp.arange(len(images))[:, None, None]
    return images[each, rows[:, :, None], columns[:, None, :]]


def random_flip(keys: jax.Array, images: jax.Array, p: float = 0.5) -> jax.Array:
    """Mirror each image left to right with probability `p`.

    Args:
      keys: [N] typed PRNG keys, one an image.
      images: [N, H, W, C], any dtype.
      p: Probability of a flip.

    Returns:
      The same shape and dtype.
    """
    flip = jax.vmap(lambda key: jax.random.bernoulli(key, p))(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def normalize(
    images: jax.Array,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Compute `(images / 255 - mean) / std`.

    Args:
      images: [..., C] uint8 (or any number in 0 .. 255).
      mean: Of the values in 0 .. 1: one number, or C.
      std: Likewise.
      dtype: Of the result. Arithmetic is done in float32 at least, and rounded to it at the end.

    Returns:
      [..., C] of that dtype.

    Raises:
      InputError: Neither 1 nor C numbers.
    """
    compute = jnp.promote_types(dtype, jnp.float32)

    def per_channel(values: ArrayLike, name: str) -> jax.Array:
        if np.size(values) not in (1, images.shape[-1]):
            raise InputError(
                f"{name} has {np.size(values)} numbers for images of {images.shape[-1]} channels"
            )
        return jnp.asarray(values, compute)

    scaled = images.astype(compute) / 255
    return ((scaled - per_channel(mean, "mean")) / per_channel(std, "std")).astype(dtype)


def random_erase(
    keys: jax.Array,
    images: jax.Array,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: float = 0.3,
    attempts: int = 10,
) -> jax.Array:
    """Fill a box of each image with noise, with some probability.

    Random erasing (Zhong et al. 2017, arXiv:1708.04896) as in timm 0.3.2 with one box and noise for
    each pixel (`RandomErasing(mode="pixel")`): standard normal, for images that are normalized.

    Args:
      keys: [N] typed PRNG keys, one an image.
      images: [N, H, W, C] floating point.
      probability: Of a box. An image whose boxes all did not fit stays as it is, too.
      area: Smallest and largest area of the box, as a share of the picture's; uniform.
      aspect: Smallest height / width of the box; its logarithm is uniform up to that of 1 / aspect.
      attempts: Boxes that are drawn until one is less high and less wide than the picture.

    Returns:
      The same shape and dtype.
    """
    height, width = images.shape[1:3]
    noise_keys, boxes = draw_erase(keys, height, width, probability, area, aspect, attempts)
    top, left, box_height, box_width = (edge[:, None, None, None] for edge in boxes.T)
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    erased = (
        (row >= top) & (row < top + box_height) & (column >= left) & (column < left + box_width)
    )
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], jnp.float32))(noise_keys)
    return jnp.where(erased, noise.astype(images.dtype), images)


def draw_erase(
    keys: jax.Array,
    height: int,
    width: int,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: float = 0.3,
    attempts: int = 10,
) -> tuple[jax.Array, jax.Array]:
    """Draw the boxes of `random_erase`.

    Returns:
      [N] keys for the noise and [N, 4] int32: top, left, height and width of the box in pixels, of
      which the last two are 0 where nothing is erased.
    """
    bound = -math.log(aspect)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        box_key, noise_key = jax.random.split(key)
        uniform = jax.random.uniform(box_key, (3 + 2 * attempts,))
        fires, place, tries = uniform[0], uniform[1:3], uniform[3:].reshape(2, attempts)
        share = (area[0] + (area[1] - area[0]) * tries[0]) * (height * width)
        ratio = jnp.exp(bound * (2 * tries[1] - 1))
        heights = jnp.round(jnp.sqrt(share * ratio)).astype(jnp.int32)
        widths = jnp.round(jnp.sqrt(share / ratio)).astype(jnp.int32)
        fits = (heights < height) & (widths < width)
        first = jnp.argmax(fits)
        sides = jnp.array([heights[first], widths[first]])
        # A box may touch each edge.
        place = (place * (jnp.array([height, width]) - sides + 1)).astype(jnp.int32)
        fires = (fires < probability) & fits.any()
        return noise_key, jnp.concatenate([place, jnp.where(fires, sides, 0)])

    return jax.vmap(one)(keys)
