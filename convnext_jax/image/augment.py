"""Random augmentation and normalisation for training.

What changes the size of a picture is drawn on the host, where the picture is decoded; what leaves
it alone runs on batches on the device.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from convnext_jax.errors import InputError

__all__ = ["normalize", "random_flip", "sample_crop"]


# On the host: one picture -------------------------------------------------------------------------


def sample_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    The area is uniform, the aspect ratio log-uniform. After ten boxes that do not fit, the largest
    central box whose ratio is allowed is taken. This is the crop of the ConvNeXt recipe (in timm
    0.3.2, `RandomResizedCropAndInterpolation.get_params`), but no side is ever rounded to 0.

    Args:
      rng: The source of randomness; how many numbers it gives varies.
      height: Of the picture, in pixels.
      width: Of the picture, in pixels.
      scale: Smallest and largest area of the box, as a part of the picture's.
      ratio: Smallest and largest width / height of the box.

    Returns:
      (top, left, height, width) of the box, in pixels; it lies inside of the picture.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = max(round(math.sqrt(area * aspect)), 1)
        crop_height = max(round(math.sqrt(area / aspect)), 1)
        if crop_height <= height and crop_width <= width:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, max(round(width / ratio[0]), 1))
    crop_width = min(width, max(round(height * ratio[1]), 1))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


# On the device: a batch ---------------------------------------------------------------------------


def random_flip(key: jax.Array, images: jax.Array, p: float = 0.5) -> jax.Array:
    """Mirror each image left to right with probability `p`, independently of the others.

    Args:
      key: A PRNG key.
      images: [N, H, W, C] (or any other leading axes, or none), any dtype.
      p: Probability of a flip.

    Returns:
      The same shape and dtype.
    """
    flip = jax.random.bernoulli(key, p, images.shape[:-3])[..., None, None, None]
    return jnp.where(flip, images[..., ::-1, :], images)


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
