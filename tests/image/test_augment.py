"""The random crop's distribution, the flip, the normalisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.errors import InputError
from convnext_jax.image import normalize, random_flip, sample_crop


def boxes(height: int, width: int, n: int = 4000, **kwargs) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([sample_crop(rng, height, width, **kwargs) for _ in range(n)])


def test_crops_lie_inside_and_cover_the_picture():
    top, left, height, width = boxes(375, 500).T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 375
    assert (left + width).max() == 500
    assert min(height.min(), width.min()) >= 1


def test_area_is_uniform_and_aspect_log_uniform():
    # At most half of a large square, so that nearly every box fits at the first try.
    _, _, height, width = boxes(1000, 1000, scale=(0.08, 0.5)).T
    area = height * width / 1000**2
    assert area.min() == pytest.approx(0.08, abs=0.002)
    assert area.max() == pytest.approx(0.5, abs=0.002)
    # Standard errors of the means: 0.0019 and 0.0026.
    assert area.mean() == pytest.approx(0.29, abs=0.008)
    aspect = np.log(width / height)
    assert aspect.mean() == pytest.approx(0.0, abs=0.011)
    assert aspect.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), abs=0.005)
    assert np.abs(aspect).max() <= math.log(4 / 3) + 0.01
    assert np.abs(np.corrcoef(area, aspect)[0, 1]) < 0.07


def test_position_is_uniform_within_what_is_left():
    top, left, height, width = boxes(1000, 1000).T
    for start, side in ((top, height), (left, width)):
        relative = start[side < 900] / (1000 - side[side < 900])
        assert relative.mean() == pytest.approx(0.5, abs=0.025)
        assert relative.std() == pytest.approx(1 / math.sqrt(12), abs=0.015)


def test_a_box_that_never_fits_becomes_the_central_one():
    rng = np.random.default_rng(0)
    assert sample_crop(rng, 20, 1000, scale=(1.0, 1.0)) == (0, (1000 - 27) // 2, 20, 27)
    assert sample_crop(rng, 1000, 20, scale=(1.0, 1.0)) == ((1000 - 27) // 2, 0, 27, 20)
    # Within the ratios it is everything.
    assert sample_crop(rng, 100, 120, scale=(2.0, 2.0)) == (0, 0, 100, 120)


def test_tiny_pictures():
    assert (boxes(1, 1, n=50) == [0, 0, 1, 1]).all()
    assert (boxes(1, 300, n=50)[:, 2] == 1).all()


def test_the_generator_decides():
    rngs = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    first, same, other = ([sample_crop(rng, 375, 500) for _ in range(3)] for rng in rngs)
    assert first == same != other


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float32])
def test_flip(dtype):
    images = (jnp.arange(400 * 2 * 3) % 251).reshape(400, 2, 3, 1).astype(dtype)
    out = jax.jit(random_flip)(jax.random.key(0), images)
    assert out.dtype == dtype
    as_it_was = jnp.all(out == images, axis=(1, 2, 3))
    mirrored = jnp.all(out == images[:, :, ::-1], axis=(1, 2, 3))
    assert bool(jnp.all(as_it_was | mirrored))
    flipped = int(jnp.sum(mirrored & ~as_it_was))
    assert 160 < flipped < 240  # 200 expected, standard deviation 10
    # Both kinds among neighbours: the draws are not shared.
    assert 0.3 < float(jnp.mean(as_it_was[1:] != as_it_was[:-1])) < 0.7


def test_flip_probability_and_one_key_an_image():
    images = jnp.arange(12).reshape(2, 2, 3, 1)
    assert jnp.array_equal(random_flip(jax.random.key(0), images, 0.0), images)
    assert jnp.array_equal(random_flip(jax.random.key(0), images, 1.0), images[:, :, ::-1])
    keys = jax.random.split(jax.random.key(1), 2)
    one_by_one = jax.vmap(random_flip, (0, 0, None))(keys, images, 0.5)
    for key, image, out in zip(keys, images, one_by_one, strict=True):
        assert jnp.array_equal(out, random_flip(key, image, 0.5))


def test_normalize():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    out = jax.jit(normalize, static_argnums=(1, 2, 3))(images, mean, std, jnp.float32)
    assert out.dtype == jnp.float32
    # Four roundings of values below 1 (2**-24 each), divided by 0.224.
    np.testing.assert_allclose(out, expected, rtol=0, atol=4 * 2**-24 / 0.224)
    # Rounded once to the requested type: half a unit in the last of 8 bits.
    low = normalize(images, mean, std, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)
    with jax.enable_x64(True):
        high = normalize(images, mean, std, jnp.float64)
        assert high.dtype == jnp.float64
        np.testing.assert_allclose(high, expected, rtol=0, atol=1e-14)


def test_normalize_with_one_number():
    out = normalize(np.full((2, 2, 5), 255, np.uint8), 0.5, 0.25)
    assert out.shape == (2, 2, 5)
    np.testing.assert_allclose(out, 2.0, rtol=1e-6)
    with pytest.raises(InputError, match="mean has 3 numbers for images of 1 channels"):
        normalize(np.zeros((2, 2, 1), np.uint8), (0.1, 0.2, 0.3), 1.0)
