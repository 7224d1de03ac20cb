"""Mixup and cutmix against timm 0.3.2's rule: what is drawn, and what is done with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions import assert_same_distribution, assert_share

from convnext_jax.errors import InputError
from convnext_jax.image.mixing import draw_mix, mix, soft_targets

RECIPE = {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5}
N = 10_000


drawing = jax.jit(draw_mix)  # compiled once: neither settings nor sizes are static


@functools.cache
def all_keys() -> jax.Array:
    return jax.random.split(jax.random.key(0), N)


@functools.cache
def drawn(height: int, width: int, **settings) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x) for x in drawing(all_keys(), height, width, **(RECIPE | settings)))


def original_cutmix(n: int, height: int, width: int, alpha: float) -> np.ndarray:
    """By the rule of timm: top, bottom, left, right and lambda, n of each."""
    rng = np.random.default_rng(0)
    ratio = np.sqrt(1 - rng.beta(alpha, alpha, n))
    cut_h, cut_w = (height * ratio).astype(int), (width * ratio).astype(int)
    centre_y, centre_x = rng.integers(0, height, n), rng.integers(0, width, n)
    top, bottom = (np.clip(centre_y + side * (cut_h // 2), 0, height) for side in (-1, 1))
    left, right = (np.clip(centre_x + side * (cut_w // 2), 0, width) for side in (-1, 1))
    return np.array(
        [top, bottom, left, right, 1 - (bottom - top) * (right - left) / height / width]
    )


# What is drawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch_prob", [0.5, 0.2])
def test_mixup_or_cutmix(switch_prob):
    weights, use_cutmix, boxes = drawn(32, 32, switch_prob=switch_prob)
    assert_share(use_cutmix, switch_prob)
    assert (boxes[~use_cutmix] == 0).all()
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_lambda_of_mixup():
    weights, use_cutmix, _ = drawn(32, 32)
    expected = np.random.default_rng(0).beta(0.8, 0.8, 200_000)
    assert_same_distribution(weights[~use_cutmix], expected)


@pytest.mark.parametrize(("size", "alpha"), [((32, 32), 1.0), ((224, 224), 1.0), ((33, 20), 0.5)])
def test_boxes_and_lambda_of_cutmix(size, alpha):
    if size == (32, 32):
        weights, use_cutmix, boxes = drawn(*size)
    else:
        weights, use_cutmix, boxes = drawn(*size, mixup=0.0, cutmix=alpha)
        assert use_cutmix.all()
    weights, boxes = weights[use_cutmix], boxes[use_cutmix]
    top, bottom, left, right = boxes.T
    area = (bottom - top) * (right - left)
    assert area.min() >= 0
    np.testing.assert_allclose(weights, 1 - area / (size[0] * size[1]), rtol=0, atol=2e-7)
    assert boxes.min() == 0
    assert (bottom.max(), right.max()) == size
    original = original_cutmix(200_000, *size, alpha)
    for ours, expected in zip([*boxes.T, weights], original, strict=True):
        assert_same_distribution(np.round(ours, 5), np.round(expected, 5).astype(ours.dtype))
    assert_same_distribution(bottom - top, original[1] - original[0])
    assert_same_distribution(right - left, original[3] - original[2])
    # Boxes of a side that is not cut off have the same share of both sides.
    whole = (top > 0) & (bottom < size[0]) & (left > 0) & (right < size[1])
    sides = ((bottom - top) / size[0] - (right - left) / size[1])[whole]
    assert np.abs(sides).max() <= 2 / min(size)


def test_a_group_may_stay_unmixed():
    weights, use_cutmix, boxes = drawn(32, 32, prob=0.3)
    assert_share(weights < 1, 0.3 * 0.999)  # some cutmix boxes are empty
    assert_share(use_cutmix, 0.3 * 0.5)
    assert (boxes[weights == 1][:, ::2] == boxes[weights == 1][:, 1::2]).any(1).all()


def test_mixup_alone():
    weights, use_cutmix, _ = drawn(32, 32, mixup=0.2, cutmix=0.0)
    assert not use_cutmix.any()
    assert_same_distribution(weights, np.random.default_rng(0).beta(0.2, 0.2, 200_000))


# What is done with it -----------------------------------------------------------------------------


def batch(groups: int, size: int, dtype=np.float32):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(groups * size, 8, 10, 3)).astype(dtype)
    labels = rng.integers(0, 7, groups * size)
    return all_keys()[:groups], images, labels


@jax.jit
def mixed(keys, images, labels, prob=1.0):
    return mix(keys, images, labels, 7, **(RECIPE | {"prob": prob}), smoothing=0.1)


def mixed_by_numpy(images: np.ndarray, group: int, weight, use_cutmix, box) -> np.ndarray:
    """One group of four, float32."""
    own = images[4 * group : 4 * group + 4].astype(np.float32)
    if not use_cutmix:
        return own * weight + own[::-1] * (1 - weight)
    top, bottom, left, right = box
    out = own.copy()
    out[:, top:bottom, left:right] = own[::-1][:, top:bottom, left:right]
    return out


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_images_and_targets_are_those_of_the_rule(prob):
    keys, images, labels = batch(24, 4)
    outs, targets = map(np.asarray, mixed(keys, images, labels, prob))
    weights, use_cutmix, boxes = (x[:24] for x in drawn(8, 10, prob=prob))
    assert targets.shape == (96, 7)
    assert targets.dtype == np.float32
    assert 3 <= use_cutmix.sum() <= 20
    one_hots = np.where(labels[:, None] == np.arange(7), 1 - 0.1 + 0.1 / 7, 0.1 / 7)
    for g, weight in enumerate(weights):
        rows = slice(4 * g, 4 * g + 4)
        expected = mixed_by_numpy(images, g, weight, use_cutmix[g], boxes[g])
        exact = use_cutmix[g] or weight == 1
        np.testing.assert_allclose(outs[rows], expected, rtol=0, atol=0 if exact else 1e-6)
        expected = one_hots[rows] * weight + one_hots[rows][::-1] * (1 - weight)
        np.testing.assert_allclose(targets[rows], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


def test_groups_do_not_depend_on_each_other():
    keys, images, labels = batch(24, 4)
    outs, targets = mixed(keys, images, labels)
    rows = slice(4 * 10, 4 * 13)
    some = mixed(keys[10:13], images[rows], labels[rows])
    # Another program may round otherwise.
    np.testing.assert_allclose(some[0], outs[rows], rtol=0, atol=1e-6)
    np.testing.assert_allclose(some[1], targets[rows], rtol=0, atol=1e-6)
    others = np.roll(images, 4 * 7, 0), np.roll(labels, 4 * 7)
    moved = mixed(jnp.roll(keys, 7), *others)
    assert np.array_equal(moved[0], np.roll(outs, 4 * 7, 0))
    assert np.array_equal(moved[1], np.roll(targets, 4 * 7, 0))


def test_nothing_to_mix():
    keys, images, labels = batch(2, 4)
    outs, targets = mix(keys, images, labels, 7, mixup=0.0, cutmix=0.0, smoothing=0.1)
    assert np.array_equal(outs, images)
    expected = np.where(labels[:, None] == np.arange(7), 1 - 0.1 + 0.1 / 7, 0.1 / 7)
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert np.array_equal(targets, soft_targets(labels, 7, 0.1))
    assert np.array_equal(soft_targets(labels, 7), np.eye(7)[labels])


def test_many_classes_and_low_precision():
    keys, images, labels = batch(24, 4, jnp.bfloat16)
    program = jax.jit(lambda *args: mix(*args, 21_841, **RECIPE)).lower(keys, images, labels)
    program = program.compile()
    outs, targets = program(keys, images, labels)
    # The targets are made in place.
    memory = program.memory_analysis()
    assert targets.nbytes < memory.output_size_in_bytes < 1.1 * targets.nbytes
    assert memory.temp_size_in_bytes < 0.1 * targets.nbytes
    # Images are mixed in float32 and rounded once.
    assert outs.dtype == jnp.bfloat16
    drawn_here = (x[:24] for x in drawn(8, 10))
    expected = [
        mixed_by_numpy(images, g, *draw) for g, draw in enumerate(zip(*drawn_here, strict=True))
    ]
    equal = outs == np.concatenate(expected).astype(jnp.bfloat16)
    assert equal.mean() > 0.999


def test_what_cannot_be_mixed():
    keys, images, labels = batch(2, 4)
    with pytest.raises(InputError, match="a batch of 7 does not divide into 2 groups"):
        mix(keys, images[:7], labels[:7], 7, **RECIPE)
    with pytest.raises(InputError, match="images to mix are uint8: normalize them"):
        mix(keys, images.astype(np.uint8), labels, 7, **RECIPE)
