"""Shift, flip, erasing: what they do and how often, against the definitions; normalisation."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import assert_same_distribution, assert_share

from convnext_jax.errors import InputError
from convnext_jax.image import normalize, random_flip
from convnext_jax.image.augment import draw_erase, random_erase, random_shift


def keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def assert_no_neighbour_matters(function, images) -> None:
    """The results of a batch are those of its parts, and those of another order."""
    batch = keys(len(images), 7)
    out = function(batch, images)
    assert not np.array_equal(out, images)
    parts = [function(batch[i : i + 3], images[i : i + 3]) for i in range(0, len(images), 3)]
    assert np.array_equal(np.concatenate(parts), out)
    assert np.array_equal(function(batch[::-1], images[::-1])[::-1], out)


# Shift --------------------------------------------------------------------------------------------


shift = jax.jit(random_shift, static_argnums=2)


def test_shift_is_a_crop_of_the_reflected_picture():
    pixels, n = 2, 10_000
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    padded = np.pad(picture, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    images = np.broadcast_to(picture, (n, *picture.shape))
    outs = np.asarray(shift(keys(n), images, pixels))
    assert outs.dtype == np.uint8
    found = 0
    for top in range(2 * pixels + 1):
        for left in range(2 * pixels + 1):
            crop = padded[top : top + 5, left : left + 4]
            is_this = (outs == crop).all((1, 2, 3))
            assert_share(is_this, 1 / (2 * pixels + 1) ** 2)
            found += is_this.sum()
    assert found == n


def test_shift_does_not_depend_on_the_neighbours():
    images = np.random.default_rng(0).random((6, 5, 4, 3), np.float32)
    assert_no_neighbour_matters(lambda *batch: shift(*batch, 3), images)


def test_shift_by_too_much_or_nothing():
    images = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    assert np.array_equal(shift(keys(2), images, 0), images)
    with pytest.raises(InputError, match="cannot shift pictures of 4 x 5 by 4 pixels"):
        random_shift(keys(2), images, 4)


# Flip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_flip(dtype, p):
    images = (jnp.arange(10_000 * 2 * 3) % 251).reshape(10_000, 2, 3, 1).astype(dtype)
    out = jax.jit(random_flip)(keys(10_000), images, p)
    assert out.dtype == dtype
    as_it_was = jnp.all(out == images, axis=(1, 2, 3))
    mirrored = jnp.all(out == images[:, :, ::-1], axis=(1, 2, 3))
    assert bool(jnp.all(as_it_was ^ mirrored))
    assert_share(np.asarray(mirrored), p)
    # Neighbours are independent.
    assert_share(np.asarray(mirrored[1:] & mirrored[:-1])[::2], p * p)


def test_flip_always_and_never():
    images = jnp.arange(36).reshape(2, 2, 3, 3)
    assert jnp.array_equal(random_flip(keys(2), images, 0.0), images)
    assert jnp.array_equal(random_flip(keys(2), images, 1.0), images[:, :, ::-1])


def test_flip_does_not_depend_on_the_neighbours():
    assert_no_neighbour_matters(jax.jit(random_flip), np.arange(72).reshape(6, 2, 2, 3))


# Erasing ------------------------------------------------------------------------------------------


drawing = jax.jit(draw_erase)  # compiled once: the sizes are not static


def original_boxes(n: int, height: int, width: int, probability: float) -> np.ndarray:
    """By the rule of timm 0.3.2: top, left, height, width of each box that is erased."""
    rng = random.Random(0)
    boxes = []
    for _ in range(n):
        if rng.random() > probability:
            continue
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                boxes.append((rng.randint(0, height - h), rng.randint(0, width - w), h, w))
                break
    return np.array(boxes)


# In the second, many tries do not fit; in the last, so many that some images stay as they are.
@pytest.mark.parametrize(("height", "width"), [(224, 224), (20, 60), (3, 60)])
def test_erased_boxes(height, width):
    n, probability = 10_000, 0.25
    boxes = np.asarray(drawing(keys(n), height, width, probability)[1])
    fired = boxes[:, 2] * boxes[:, 3] > 0
    boxes = boxes[fired]
    original = original_boxes(20 * n, height, width, probability)
    original = original[original[:, 2] * original[:, 3] > 0]
    assert_share(fired, len(original) / (20 * n))
    assert (len(original) / (20 * n) < 0.9 * probability) == (height == 3)
    top, left, h, w = boxes.T
    assert boxes.min() >= 0
    assert (top + h).max() == height
    assert (left + w).max() == width
    assert h.max() < height
    assert w.max() < width
    measures = {
        "height": lambda boxes: boxes[:, 2],
        "width": lambda boxes: boxes[:, 3],
        "area": lambda boxes: boxes[:, 2] * boxes[:, 3],
        "aspect": lambda boxes: boxes[:, 2] / boxes[:, 3],
        "top": lambda boxes: boxes[:, 0],
        "left": lambda boxes: boxes[:, 1],
        "place": lambda boxes: boxes[:, 0] / (height - boxes[:, 2]),
    }
    for measure in measures.values():
        assert_same_distribution(measure(boxes), measure(original))
    # Top and left, and the place and the size, are independent of each other.
    shares = np.stack([top / (height - h), left / (width - w), h * w])
    assert np.abs(np.corrcoef(shares) - np.eye(3)).max() < 4.5 / math.sqrt(len(boxes))


def test_area_and_aspect_are_uniform_where_every_box_fits():
    _, _, h, w = np.asarray(drawing(keys(10_000), 2000, 2000, 1.0)[1]).T
    rng = np.random.default_rng(0)
    assert_same_distribution(h * w / 2000**2, rng.uniform(0.02, 1 / 3, 100_000))
    bound = math.log(0.3)
    assert_same_distribution(np.log(h / w), rng.uniform(bound, -bound, 100_000))


@jax.jit
def erased(keys, images):
    """What `random_erase` makes of the images, in float32 and bfloat16, and the boxes."""
    boxes = draw_erase(keys, *images.shape[1:3], 0.5)[1]
    return (
        random_erase(keys, images, 0.5),
        random_erase(keys, images.astype("bfloat16"), 0.5),
        boxes,
    )


def test_erasing_fills_the_box_with_noise():
    images = np.full((96, 32, 40, 3), 9, np.float32)
    out, low, boxes = map(np.array, erased(keys(96), images))
    assert np.array_equal(low, out.astype(jnp.bfloat16))
    noise = []
    for image, (top, left, h, w) in zip(out, boxes, strict=True):
        box = image[top : top + h, left : left + w].copy()
        image[top : top + h, left : left + w] = 9
        assert (image == 9).all()
        noise.append(box)
    assert 30 < sum(box.size > 0 for box in noise) < 66
    values = np.concatenate([box.ravel() for box in noise])
    assert_same_distribution(values, np.random.default_rng(0).normal(size=200_000))
    # Each pixel and channel has noise of its own, and each image.
    largest = sorted(noise, key=lambda box: box.size)[-8:]
    corners = np.stack([box[:8, :8].ravel() for box in largest])
    assert np.abs(np.corrcoef(corners) - np.eye(8)).max() < 0.4
    channels = np.concatenate([box.reshape(-1, 3) for box in noise])
    assert np.abs(np.corrcoef(channels.T) - np.eye(3)).max() < 0.05


def test_erasing_does_not_depend_on_the_neighbours():
    images = np.zeros((96, 32, 40, 3), np.float32)
    batch = keys(96)
    out = erased(batch, images)[0]
    assert np.array_equal(erased(batch[::-1], images)[0][::-1], out)
    some = erased(batch[40:43], images[:3])[0]
    np.testing.assert_allclose(some, out[40:43], rtol=0, atol=1e-5)  # by another program


# Normalisation ------------------------------------------------------------------------------------


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
