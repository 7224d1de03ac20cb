"""The step: what it computes, and that the number of devices does not matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from convnext_jax import ConvNextConfig, ConvNextForImageClassification
from convnext_jax.training import recipe
from convnext_jax.training.config import default_config
from convnext_jax.training.evaluation import evaluate, split
from convnext_jax.training.step import eval_step, init_state, train_step

CONFIG = FrozenConfigDict(default_config())


def toy_model(**options):
    config = ConvNextConfig(
        num_stages=2, depths=(1, 1), hidden_sizes=(8, 16), patch_size=2, image_size=8,
        num_labels=7, drop_path_rate=0.5, layer_scale_init_value=1.0,
    )  # fmt: skip
    options = {"data_format": "channels_last", "dtype": jnp.float32, **options}
    return ConvNextForImageClassification(config, **options)


def toy_batch(seed: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 7, size).astype(np.int32),
    }


def losses_on(devices: int) -> list[float]:
    """The losses of 12 steps of a toy run, with flips and drop path, on so many devices."""
    model = toy_model(axis_name="batch")
    optimizer = recipe.adamw(recipe.warmup_cosine(1e-2, 3, 12), 0.05)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("batch",))
    state = jax.device_put(
        init_state(model, optimizer, jax.random.key(1), with_average=True),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    step = jax.pmap(
        lambda state, batch, key: train_step(
            state, batch, key, model=model, optimizer=optimizer, config=CONFIG
        ),
        axis_name="batch",
        in_axes=(None, 0, None),
        out_axes=(None, None),
        devices=jax.devices()[:devices],
    )
    losses = []
    for i in range(12):
        state, metrics = step(state, split(toy_batch(i, 16), devices), jax.random.key(2))
        losses.append(float(metrics["loss"]))
    return losses


def test_number_of_devices_does_not_matter():
    """Each number in a process of its own, since devices are counted once a process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    program = "import json, test_step as t; print(json.dumps([t.losses_on(n) for n in (1, 4)]))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    one, four = json.loads(done.stdout.splitlines()[-1])
    assert len(set(one)) == 12
    np.testing.assert_allclose(four, one, rtol=1e-5)


def test_step_without_an_axis_equals_the_mapped_one():
    model, mapped = toy_model(), toy_model(axis_name="batch")
    optimizer = recipe.adamw(lambda step: 1e-3, 0.05)
    state = init_state(model, optimizer, jax.random.key(1), with_average=True)
    batch, key, options = toy_batch(0, 8), jax.random.key(2), {"optimizer": optimizer}
    plain_step = jax.jit(lambda s, b, k: train_step(s, b, k, model=model, config=CONFIG, **options))
    plain, _ = plain_step(state, batch, key)
    mapped_step = jax.pmap(
        lambda s, b, k: train_step(s, b, k, model=mapped, config=CONFIG, **options),
        axis_name="batch", in_axes=(None, 0, None), out_axes=(None, None),
    )  # fmt: skip
    other, _ = mapped_step(state, split(batch, 1), key)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        # Adam's first step is lr * sign(gradient): rounding shows where the gradient is nearly 0.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_randomness_changes_with_the_step_and_the_key():
    model = toy_model()
    optimizer = optax.sgd(0.0)
    state = init_state(model, optimizer, jax.random.key(1), with_average=False)
    batch = toy_batch(0, 8)
    run = jax.jit(
        lambda state, key: train_step(
            state, batch, key, model=model, optimizer=optimizer, config=CONFIG
        )[1]["loss"]
    )

    def loss(step: int, seed: int) -> float:
        return float(run(state.replace(step=jnp.asarray(step, jnp.int32)), jax.random.key(seed)))

    losses = {(step, seed): loss(step, seed) for step in (0, 1) for seed in (0, 1)}
    assert len(set(losses.values())) == 4
    assert loss(1, 0) == losses[1, 0]


def test_average_moves_once_a_step_towards_the_weights():
    model, optimizer = toy_model(), recipe.adamw(lambda step: 1e-2, 0.05)
    config = default_config()
    config.ema_decay = 0.75
    state = init_state(model, optimizer, jax.random.key(1), with_average=True)
    run = jax.jit(
        lambda state, batch, key: train_step(
            state, batch, key, model=model, optimizer=optimizer, config=FrozenConfigDict(config)
        )
    )
    after, _ = run(state, toy_batch(0, 8), jax.random.key(2))
    expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, state.params, after.params)
    for a, b in zip(jax.tree.leaves(after.average), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert int(after.step) == 1


class FixedLogits:
    """Stands in for a network: the logits are the pixels, so that the right answer is known."""

    axis_name = None
    dtype = jnp.float32

    def apply(self, variables, images, return_dict):
        from convnext_jax.outputs import ImageClassifierOutputWithNoAttention as Output

        return Output(logits=images.reshape(len(images), -1)[:, :7] * variables["params"])


@pytest.mark.parametrize("examples", [1, 7, 8, 13])
def test_evaluation_counts_every_example_once(examples):
    rng = np.random.default_rng(examples)
    images = rng.integers(0, 4, (examples, 1, 3, 3), np.uint8)  # few values, so there are ties
    labels = rng.integers(0, 7, examples).astype(np.int32)
    batches = []
    for start in range(0, examples, 4):
        count = min(4, examples - start)
        fill = [(0, 4 - count)]
        batches.append(
            {
                "image": np.pad(images[start : start + 4], fill + [(0, 0)] * 3),
                "label": np.pad(labels[start : start + 4], fill),
                "mask": np.pad(np.ones(count, np.float32), fill),
            }
        )
    config = default_config()
    config.mean, config.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    step = jax.jit(
        lambda params, parts: eval_step(
            params,
            {name: value[0] for name, value in parts.items()},
            model=FixedLogits(),
            config=FrozenConfigDict(config),
        )
    )
    result = evaluate(step, {"val": jnp.asarray(255.0)}, iter(batches), devices=1)["val"]

    logits = images.reshape(examples, -1)[:, :7].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")  # among equals the lower index first
    position = (order == labels[:, None]).argmax(1)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(examples), labels]
    assert result.metrics["top1"] == (position < 1).mean()
    assert result.metrics["top5"] == (position < 5).mean()
    np.testing.assert_allclose(result.metrics["loss"], losses.mean(), rtol=1e-6)
    np.testing.assert_array_equal(result.predictions, order[:, 0])
    np.testing.assert_array_equal(result.labels, labels)
    matrix = result.confusion_matrix(7)
    assert matrix.sum() == examples
    assert matrix.trace() == (position < 1).sum()


def test_nan_counts_as_wrong():
    batch = {
        "image": np.zeros((2, 1, 3, 3), np.uint8),
        "label": np.array([0, 3], np.int32),
        "mask": np.ones(2, np.float32),
    }
    sums, _ = eval_step(jnp.asarray(jnp.nan), batch, model=FixedLogits(), config=CONFIG)
    assert float(sums["top1"]) == float(sums["top5"]) == 0
