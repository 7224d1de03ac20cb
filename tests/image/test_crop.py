"""The random crop's distribution, against the definition of the recipe."""

import math

import numpy as np
import pytest

from convnext_jax.image import CROP_DRAWS, sample_crop


def boxes(height: int, width: int, n: int = 10_000, **kwargs) -> np.ndarray:
    draws = np.random.default_rng(0).random((n, *CROP_DRAWS)).tolist()
    return np.array([sample_crop(each, height, width, **kwargs) for each in draws])


def distance_from_uniform(values: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of values in 0 .. 1 from the uniform distribution.

    Of n uniform values it exceeds 1.95 / sqrt(n) once in a thousand times.
    """
    steps = np.arange(len(values) + 1) / len(values)
    values = np.sort(values)
    return max((steps[1:] - values).max(), (values - steps[:-1]).max())


def test_crops_lie_inside_and_cover_the_picture():
    top, left, height, width = boxes(375, 500).T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 375
    assert (left + width).max() == 500
    assert min(height.min(), width.min()) >= 1


def test_area_is_uniform_and_aspect_log_uniform():
    # At most half of a large square, so that every box fits at the first try.
    _, _, height, width = boxes(10_000, 10_000, scale=(0.08, 0.5)).T
    area = (height * width / 10_000**2 - 0.08) / 0.42
    aspect = (np.log(width / height) / math.log(4 / 3) + 1) / 2
    assert distance_from_uniform(area) < 1.95 / 100
    assert distance_from_uniform(aspect) < 1.95 / 100
    assert np.abs(np.corrcoef(area, aspect)[0, 1]) < 0.04  # standard deviation 0.01


def test_boxes_that_do_not_fit_are_drawn_again():
    """The area and ratio of a 375 x 500 photo, against drawing by the definition until it fits."""
    rng = np.random.default_rng(1)
    areas = rng.uniform(0.08, 1.0, 40_000)
    aspects = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), 40_000))
    widths, heights = np.sqrt(areas * aspects * 187_500), np.sqrt(areas / aspects * 187_500)
    fit = (widths <= 500) & (heights <= 375)
    _, _, height, width = boxes(375, 500).T
    drawn, wanted = height * width / 187_500, np.sort(areas[fit])
    # Where each drawn area stands among those wanted: uniform, if the two are distributed alike.
    rank = np.searchsorted(wanted, drawn) / len(wanted)
    assert distance_from_uniform(rank) < 1.95 * math.sqrt(1 / 10_000 + 1 / fit.sum())
    assert np.log(width / height).mean() == pytest.approx(np.log(aspects[fit]).mean(), abs=0.008)


def test_position_is_uniform_within_what_is_left():
    top, left, height, width = boxes(10_000, 10_000).T
    for start, side in ((top, height), (left, width)):
        room = side < 9900
        assert distance_from_uniform(start[room] / (10_000 - side[room])) < 0.023
    assert abs(np.corrcoef(top - (10_000 - height) / 2, left - (10_000 - width) / 2)[0, 1]) < 0.04


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_draws_stay_inside(draw: float):
    top, left, height, width = sample_crop(np.full(CROP_DRAWS, draw), 375, 500, scale=(0.08, 0.7))
    assert 0 <= top <= 375 - height
    assert 0 <= left <= 500 - width
    if draw:
        assert (top, left) == (375 - height, 500 - width)


def test_a_box_that_never_fits_becomes_the_central_one():
    draws = np.random.default_rng(0).random(CROP_DRAWS)
    assert sample_crop(draws, 20, 1000, scale=(1.0, 1.0)) == (0, (1000 - 27) // 2, 20, 27)
    assert sample_crop(draws, 1000, 20, scale=(1.0, 1.0)) == ((1000 - 27) // 2, 0, 27, 20)
    # Within the ratios it is everything.
    assert sample_crop(draws, 100, 120, scale=(2.0, 2.0)) == (0, 0, 100, 120)


def test_ten_tries():
    draws = np.full(CROP_DRAWS, 0.999)  # an area of everything, in a ratio that never fits
    draws[-1] = 0.0
    assert sample_crop(draws, 300, 300)[:2] == (0, 0)
    assert sample_crop(draws, 300, 300)[2:] == (98, 73)  # the last try: 8 % in the ratio of 3 : 4
    assert len(draws) == 10
    draws[-1] = 0.999
    assert sample_crop(draws, 300, 300) == (0, 0, 300, 300)


def test_tiny_pictures():
    assert (boxes(1, 1, n=50) == [0, 0, 1, 1]).all()
    assert (boxes(1, 300, n=50)[:, 2] == 1).all()
