"""The random resized crop of training, drawn on the host, where the picture is decoded and cut."""

import math
from collections.abc import Sequence

__all__ = ["CROP_DRAWS", "sample_crop"]

_TRIES = 10
# Shape of the uniform numbers behind one crop: a row for each try, of area, ratio, top and left.
CROP_DRAWS = (_TRIES, 4)


def sample_crop(
    draws: Sequence[Sequence[float]],
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """The box of a random resized crop, as a function of uniform numbers.

    The area is uniform, the aspect ratio log-uniform, the place uniform. After ten boxes that do
    not fit, the largest central box whose ratio is allowed is taken. This is the crop of the
    ConvNeXt recipe (in timm 0.3.2, `RandomResizedCropAndInterpolation.get_params`), but no side is
    ever rounded to 0.

    Args:
      draws: `CROP_DRAWS` numbers in [0, 1), independent and uniform. Always that many, so that the
        numbers of a picture can be drawn before its size is known.
      height: Of the picture, in pixels.
      width: Of the picture, in pixels.
      scale: Smallest and largest area of the box, as a part of the picture's.
      ratio: Smallest and largest width / height of the box.

    Returns:
      (top, left, height, width) of the box, in pixels; it lies inside of the picture.
    """
    pixels = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_top, u_left in draws:
        area = (scale[0] + u_area * (scale[1] - scale[0])) * pixels
        aspect = math.exp(low + u_ratio * (high - low))
        crop_width = max(round(math.sqrt(area * aspect)), 1)
        crop_height = max(round(math.sqrt(area / aspect)), 1)
        if crop_height <= height and crop_width <= width:
            top = int(u_top * (height - crop_height + 1))
            left = int(u_left * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, max(round(width / ratio[0]), 1))
    crop_width = min(width, max(round(height * ratio[1]), 1))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
