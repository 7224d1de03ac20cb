"""The recipe against figures computed from the original's code (ImageNet-1k and fine-tuning)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax import ConvNextConfig, ConvNextForImageClassification
from convnext_jax.training import recipe


@pytest.mark.parametrize(
    ("settings", "golden"),
    [
        (  # 300 epochs of 312 steps, 20 of them warm-up
            {"peak": 4e-3, "warmup_steps": 6240, "total_steps": 93600},
            {
                0: 0.0,
                1: 6.41128e-7,
                6239: 4e-3,
                6240: 4e-3,
                46800: 2.2243730e-3,
                93599: 1.0000013e-6,
            },
        ),
        (  # fine-tuning: 30 epochs of 2502 steps, no warm-up
            {"peak": 5e-5, "warmup_steps": 0, "total_steps": 75060},
            {0: 5e-5, 37530: 2.55e-5, 75059: 1.00000002e-6},
        ),
    ],
)
def test_schedule_has_the_golden_values(settings, golden):
    schedule = recipe.warmup_cosine(**settings, final=1e-6)
    with jax.enable_x64(True):
        for step, value in golden.items():
            np.testing.assert_allclose(schedule(jnp.asarray(step)), value, rtol=1e-6, atol=1e-15)
    # And in f32, as the step computes it: within its rounding of the peak.
    for step, value in golden.items():
        rate = jax.jit(schedule)(jnp.asarray(step, jnp.int32))
        np.testing.assert_allclose(rate, value, rtol=1e-6, atol=3e-7 * settings["peak"])


def test_kernels_decay_and_nothing_else():
    config = ConvNextConfig(num_stages=2, depths=(1, 1), hidden_sizes=(4, 8), num_labels=3)
    model = ConvNextForImageClassification(config)
    params = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
    decayed = {
        "/".join(key.key for key in path)
        for path, decays in jax.tree_util.tree_leaves_with_path(recipe.decays(params))
        if decays
    }
    layers = ["dwconv", "pwconv1", "pwconv2"]
    assert decayed == {
        "convnext/embeddings/patch_embeddings/kernel",
        "convnext/encoder/stages_1/downsampling_layer_1/kernel",
        *(
            f"convnext/encoder/stages_{s}/layers_0/{layer}/kernel"
            for s in (0, 1)
            for layer in layers
        ),
        "classifier/kernel",
    }


def test_adamw_step_equals_the_formula():
    with jax.enable_x64(True):  # in f32 the correction 1 - 0.999 alone is off by 6e-6
        params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
        gradients = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full((2,), -2.0)}
        optimizer = recipe.adamw(lambda step: 0.1, 0.05, (0.9, 0.999), 1e-8)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # The first step of Adam moves by the sign of the gradient; decay is times the learning rate.
    np.testing.assert_allclose(updates["kernel"], -0.1 * (1 + 0.05 * 3.0), rtol=1e-7)
    np.testing.assert_allclose(updates["bias"], 0.1, rtol=1e-7)


def test_gradient_clip_limits_the_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    clipped = recipe.adamw(lambda step: 1.0, 0.0, gradient_clip=1.0)
    _, state = clipped.update(gradients, clipped.init(params), params)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moments["a"], [0.1 * 3 / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(moments["b"], [0, 0.1 * 4 / 5], rtol=1e-6)


def test_average_follows_the_weights():
    average = recipe.update_average({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, 0.9)
    np.testing.assert_allclose(average["w"], [1.1], rtol=1e-6)


def test_average_decay_is_constant_or_grows_to_its_value():
    assert recipe.average_decay(0.9999, 3, warmup=False) == 0.9999
    steps = [0, 8, 89, 10**6]
    decays = [float(recipe.average_decay(0.9999, step, warmup=True)) for step in steps]
    np.testing.assert_allclose(decays, [1 / 10, 9 / 18, 90 / 99, 0.9999], rtol=1e-6)


def test_smoothed_cross_entropy_equals_the_definition():
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    labels = np.array([0, 3, 4, 3])
    targets = np.full((4, 5), 0.1 / 5)
    targets[np.arange(4), labels] += 0.9
    log_probabilities = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    expected = -(targets * log_probabilities).sum(1)
    actual = recipe.smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
