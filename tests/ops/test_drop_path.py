import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.ops import drop_path_gain


def factors(rate, key, count):
    """What each of `count` samples is multiplied with."""
    gain = drop_path_gain(count, rate, key)
    assert gain.shape == (count,)
    return np.asarray(gain)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_expectation(rate):
    count = 20_000
    seen = factors(rate, jax.random.key(0), count)
    assert set(seen) == {np.float32(0), np.float32(1 / (1 - rate))}
    deviation = np.sqrt(rate * (1 - rate) / count)
    assert abs((seen == 0).mean() - rate) < 4 * deviation
    assert abs(seen.mean() - 1) < 4 * deviation / (1 - rate)


def test_a_rate_of_zero_changes_nothing():
    np.testing.assert_array_equal(factors(0.0, jax.random.key(0), 100), 1.0)


def test_the_key_alone_decides():
    first, again, other = (factors(0.5, jax.random.key(seed), 200) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 60 < (first != other).sum() < 140


def test_samples_are_independent():
    # Neighbours agree as often as not.
    seen = factors(0.5, jax.random.key(0), 10_000)
    assert abs((seen[1:] == seen[:-1]).mean() - 0.5) < 0.02


def test_each_of_several_blocks_has_its_rate():
    rates, count = np.array([0.0, 0.2, 0.7]), 20_000
    gains = np.asarray(drop_path_gain(count, rates, jax.random.key(0)))
    assert gains.shape == (count, 3)
    assert (np.abs((gains == 0).mean(0) - rates) <= 4 * np.sqrt(rates * (1 - rates) / count)).all()
    np.testing.assert_array_equal(gains.max(0), (1 / (1 - rates)).astype(np.float32))


def test_blocks_are_independent():
    first, second = np.asarray(drop_path_gain(10_000, (0.5, 0.5), jax.random.key(0))).T
    assert abs((first == second).mean() - 0.5) < 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_is_that_asked_for(dtype):
    assert drop_path_gain(4, 0.5, jax.random.key(0), dtype=dtype).dtype == dtype


def test_devices_take_their_parts_of_one_mask():
    key = jax.random.key(0)
    whole = drop_path_gain(12, 0.5, key)
    assert 0 < (whole == 0).sum() < 12
    for devices in (2, 3, 4):
        run = jax.vmap(
            lambda _, own=12 // devices: drop_path_gain(own, 0.5, key, "batch"), axis_name="batch"
        )
        np.testing.assert_array_equal(run(jnp.arange(devices)).reshape(12), whole)
