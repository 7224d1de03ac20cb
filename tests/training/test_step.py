"""The step: what it computes, and that the number of devices does not matter."""

import functools
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
from convnext_jax.image.augment import normalize
from convnext_jax.training import parallel, recipe
from convnext_jax.training.config import default_config
from convnext_jax.training.step import augment, init_state, train_step


def toy_model(drop_path_rate=0.5, **options):
    config = ConvNextConfig(
        num_stages=2, depths=(1, 1), hidden_sizes=(8, 16), patch_size=2, image_size=8,
        num_labels=7, drop_path_rate=drop_path_rate, layer_scale_init_value=1.0,
    )  # fmt: skip
    options = {"data_format": "channels_last", "dtype": jnp.float32, **options}
    return ConvNextForImageClassification(config, **options)


def toy_batch(seed: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 7, size).astype(np.int32),
    }


def toy_config(**changes):
    """The paper's settings, all of its augmentation among them, with the changes."""
    config = default_config()
    config.image_size, config.mix_group = 8, 4
    config.update(changes)
    return FrozenConfigDict(config)


CONFIG = toy_config()
PLAIN = {"flip": 0.0, "augment": "", "color_jitter": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}


def start(model, learning_rate, **options):
    """The state of a run that has not begun, and its optimizer."""
    params = model.init_variables(jax.random.key(1))["params"]
    options = {"weight_decay": 0.05, **options}
    optimizer = recipe.optimizer(params, learning_rate=learning_rate, **options)
    return init_state(params, optimizer, with_average=True), optimizer


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling takes most of these tests, and speed is not looked at."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def losses_on(layout: str, devices: int, parts: int) -> list[float]:
    """The losses of 12 steps of a toy run with drop path and mixing, on so many devices.

    Batches of one part also have all other augmentation.
    """
    parallel._SMALLEST_SHARDED = 1
    changes = {} if parts == 1 else {**PLAIN, "mixup": 0.8}
    config = toy_config(gradient_accumulation=parts, gradient_clip=1.0, **changes)
    model = toy_model(axis_name="batch")
    state, optimizer = start(model, recipe.warmup_cosine(1e-2, 3, 12), muon=True)
    run = parallel.layout(layout, jax.devices()[:devices])
    state = jax.device_put(state, run.state_sharding(state))
    step, key = run.train_step(model, optimizer, config), jax.random.key(2)
    key = jax.device_put(key, run.state_sharding(key))
    losses = []
    for i in range(12):
        state, metrics = step(state, run.put(toy_batch(i, 16), parts), key)
        losses.append(float(metrics["loss"]))
    kernel = state.params["convnext"]["encoder"]["stages_1"]["layers_0"]["pwconv1"]["kernel"]
    share = devices if layout == "sharded" else 1
    assert kernel.addressable_shards[0].data.size == kernel.size // share
    return losses


@pytest.mark.parametrize(("devices", "parts"), [(4, 1), (2, 2)])
def test_layout_over_devices_does_not_matter(devices, parts):
    """In a process of its own, since devices are counted once a process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    layouts = [("pmap", 1), ("pmap", devices), ("sharded", devices)]
    runs = f"[t.losses_on(*layout, {parts}) for layout in {layouts}]"
    program = f"import json, test_step as t; print(json.dumps({runs}))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, several, sharded = json.loads(done.stdout.splitlines()[-1])
    assert len(set(one)) == 12
    np.testing.assert_allclose(several, one, rtol=1e-5)
    np.testing.assert_allclose(sharded, one, rtol=1e-5)


def test_step_without_an_axis_equals_the_mapped_one():
    model, mapped = toy_model(), toy_model(axis_name="batch")
    state, optimizer = start(model, lambda step: 1e-3)
    batch, key, options = toy_batch(0, 8), jax.random.key(2), {"optimizer": optimizer}
    options["config"] = toy_config(**PLAIN)
    plain_step = jax.jit(lambda s, b, k: train_step(s, b, k, model=model, **options))
    plain, _ = plain_step(state, batch, key)
    mapped_step = jax.pmap(
        lambda s, b, k: train_step(s, b, k, model=mapped, **options),
        axis_name="batch", in_axes=(None, 0, None), out_axes=(None, None),
    )  # fmt: skip
    other, _ = mapped_step(state, jax.tree.map(lambda x: x[None], batch), key)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        # Adam's first step is lr * sign(gradient): rounding shows where the gradient is nearly 0.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_randomness_changes_with_the_step_and_the_key():
    model = toy_model()
    optimizer = optax.sgd(0.0)
    state = init_state(model.init_variables(jax.random.key(1))["params"], optimizer, False)
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


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = toy_model()
    state, optimizer = start(model, lambda step: 1e-2)
    config = toy_config(max_skipped_steps=1, **PLAIN)
    step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, config=config))
    key = jax.random.key(2)
    spoilt = jax.tree.map(lambda x: x, state.params)
    spoilt["classifier"]["bias"] = spoilt["classifier"]["bias"].at[0].set(jnp.nan)
    before = state.replace(params=spoilt)

    def unchanged(after):
        parts = ("params", "opt_state", "average")
        return jax.tree.all(
            jax.tree.map(
                functools.partial(np.array_equal, equal_nan=True),
                [getattr(before, part) for part in parts],
                [getattr(after, part) for part in parts],
            )
        )

    once, metrics = step(before, toy_batch(0, 8), key)
    assert np.isnan(metrics["loss"])
    assert unchanged(once)
    assert (int(once.step), int(once.skipped)) == (1, 1)
    # One too many: the run is over, and stays where it was before that step.
    twice, _ = step(once, toy_batch(1, 8), key)
    again, _ = step(twice.replace(params=state.params), toy_batch(2, 8), key)
    assert unchanged(twice)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, state.params))
    assert (int(twice.step), int(twice.skipped), int(again.step)) == (1, 2, 1)


def test_average_moves_once_a_step_towards_the_weights():
    model = toy_model()
    state, optimizer = start(model, lambda step: 1e-2)
    config = toy_config(ema_decay=0.75, **PLAIN)
    run = jax.jit(
        lambda state, batch, key: train_step(
            state, batch, key, model=model, optimizer=optimizer, config=config
        )
    )
    after, _ = run(state, toy_batch(0, 8), jax.random.key(2))
    expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, state.params, after.params)
    for a, b in zip(jax.tree.leaves(after.average), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert int(after.step) == 1


@functools.cache
def one_step(model, optimizer_options=(), **changes):
    """A step of toy training from a fixed state, of a fixed batch of 8: (state, metrics)."""
    state, optimizer = start(model, lambda step: 1e-2, **dict(optimizer_options))
    config = toy_config(**changes)
    step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, config=config))
    return step(state, toy_batch(0, 8), jax.random.key(2))


def changed(before, after):
    return {
        jax.tree_util.keystr(path): not np.array_equal(a, b)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
    }


def test_accumulated_parts_are_one_batch():
    """Without what is drawn by part, two parts of a batch give the gradient of the whole."""
    model = toy_model(drop_path_rate=0.0)
    whole_state, whole = one_step(model, **PLAIN)
    parts_state, parts = one_step(model, gradient_accumulation=2, **PLAIN)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(whole_state), jax.tree.leaves(parts_state), strict=True):
        # Adam's first step is lr * sign(gradient): rounding shows where the gradient is nearly 0.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)
    assert int(parts_state.step) == 1


def test_parts_draw_their_own_drop_path():
    whole = one_step(toy_model(), **PLAIN)[1]["loss"]
    parts = one_step(toy_model(), gradient_accumulation=2, **PLAIN)[1]["loss"]
    assert abs(float(whole - parts)) > 1e-4


def test_remat_changes_nothing():
    plain_state, plain = one_step(toy_model(), **PLAIN)
    state, metrics = one_step(toy_model(remat=True), **PLAIN)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_a_frozen_backbone_stays_and_the_head_moves():
    model = toy_model(drop_path_rate=0.0)
    options = (("freeze_backbone", True),)
    state, metrics = one_step(model, options, freeze_backbone=True, **PLAIN)
    before = model.init_variables(jax.random.key(1))["params"]
    for name, moved in changed(before, state.params).items():
        assert moved == ("classifier" in name), name
    assert all("classifier" in jax.tree_util.keystr(path) for path, _ in
               jax.tree_util.tree_leaves_with_path(state.opt_state.mu))  # fmt: skip
    assert float(metrics["gradient_norm"]) > 0


@pytest.mark.parametrize(
    "setting",
    [{"shift": 2}, {"flip": 0.5}, {"augment": "rand-m9-mstd0.5-inc1"}, {"augment": "three"},
     {"color_jitter": 0.4}, {"erase": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0}],
    ids=lambda setting: "-".join(map(str, next(iter(setting.items())))),
)  # fmt: skip
def test_each_setting_of_the_augmentation_acts(setting):
    batch = toy_batch(3, 8)
    rows = {
        **batch,
        "image_key": jax.random.split(jax.random.key(4), 8),
        "group_key": jax.random.split(jax.random.key(5), 2),
    }
    plain, targets = augment(rows, 7, toy_config(**PLAIN))
    images, mixed = augment(rows, 7, toy_config(**{**PLAIN, **setting}))
    assert images.shape == plain.shape == (8, 8, 8, 3)
    np.testing.assert_allclose(
        plain, normalize(batch["image"], CONFIG.mean, CONFIG.std), rtol=1e-6, atol=1e-6
    )
    assert not np.array_equal(images, plain)
    np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-6)
    is_mix = bool({"mixup", "cutmix"} & set(setting))
    assert np.allclose(targets, mixed) != is_mix
    np.testing.assert_array_equal(targets.argmax(-1), batch["label"])


def test_color_jitter_rests_where_randaugment_acts():
    batch = toy_batch(3, 8)
    rows = {**batch, "image_key": jax.random.split(jax.random.key(4), 8),
            "group_key": jax.random.split(jax.random.key(5), 2)}  # fmt: skip
    policy = {**PLAIN, "augment": "rand-m9-mstd0.5-inc1"}
    with_jitter, _ = augment(rows, 7, toy_config(**{**policy, "color_jitter": 0.4}))
    without, _ = augment(rows, 7, toy_config(**policy))
    np.testing.assert_array_equal(with_jitter, without)
