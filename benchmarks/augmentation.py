"""Times a training step with the recipe's augmentation against the same step without.

    python benchmarks/augmentation.py [--batch-size 256] [--rounds N] [--toy] [--json FILE]

ConvNeXt-T at 224 pixels, bfloat16 compute, AdamW and averaged weights, on one device; the batch of
uint8 pictures is already in its memory. "With" is the paper's ImageNet-1k recipe: flip, RandAugment
rand-m9-mstd0.5-inc1, random erasing, mixup and cutmix; "without" only normalizes. The two take
turns, some steps each, so that a change in the load of the machine meets both; the first table
holds medians over the rounds, in milliseconds a step, and what the first step took to compile.

The second table times each part by itself, each as a program of its own, which reads its input from
memory and writes its result there; inside the step some of that falls away. --toy takes a network
and pictures small enough for a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from convnext_jax.configuration import ConvNextConfig
from convnext_jax.image.augment import normalize, random_erase, random_flip, random_shift
from convnext_jax.image.mixing import mix
from convnext_jax.image.randaugment import color_jitter, parse_policy, rand_augment, three_augment
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import recipe
from convnext_jax.training.config import default_config
from convnext_jax.training.step import TrainState, augment, init_state, train_step

CLASSES = 1000
WITHOUT = {
    "flip": 0.0, "augment": "", "color_jitter": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0
}  # fmt: skip
TOY = {"image_size": 32, "model": {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64)}}
WARM_UP, ROUNDS, STEPS = 2, 15, 8


def settings(toy: bool, changes: dict | None = None) -> FrozenConfigDict:
    """The paper's settings for ConvNeXt-T, and changes to them."""
    config = default_config()
    config.dtype = "bfloat16"
    for each in (TOY if toy else {}, changes or {}):
        config.update(each)
    return FrozenConfigDict(config)


def make_batch(size: int, batch_size: int) -> dict[str, jax.Array]:
    """Pictures whose values change as slowly as a photo's, in the device's memory."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (batch_size, 16, 16, 3)).astype(np.float32)
    shape = (batch_size, size, size, 3)
    smooth = jax.jit(lambda x: jax.image.resize(x, shape, "bicubic").clip(0, 255).astype("uint8"))
    labels = rng.integers(0, CLASSES, batch_size).astype(np.int32)
    return {"image": smooth(coarse), "label": jnp.asarray(labels)}


# Steps --------------------------------------------------------------------------------------------


def make_step(config: FrozenConfigDict) -> tuple[Callable, Callable[[], TrainState]]:
    """The compiled step and what makes its first state."""
    fields = {"patch_size", "depths", "hidden_sizes", "drop_path_rate"}
    network = ConvNextConfig(
        num_labels=CLASSES,
        image_size=config.image_size,
        **{name: value for name, value in config.model.items() if name in fields},
    )
    model = ConvNextForImageClassification(network, dtype=jnp.bfloat16, data_format="channels_last")
    schedule = recipe.warmup_cosine(1e-3, 10, 1000, 1e-6)

    @jax.jit
    def first_params() -> dict:
        return model.init_variables(jax.random.key(0))["params"]

    optimizer = recipe.optimizer(
        jax.eval_shape(first_params), learning_rate=schedule, weight_decay=config.weight_decay
    )
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=config)
    state = jax.jit(lambda: init_state(first_params(), optimizer, True))
    return jax.jit(step, donate_argnums=0), state


def compare_steps(toy: bool, batch_size: int, rounds: int) -> dict:
    """Median milliseconds a step with and without, and the seconds of the first one."""
    configs = {"with": settings(toy), "without": settings(toy, WITHOUT)}
    batch = make_batch(configs["with"].image_size, batch_size)
    key = jax.random.key(1)
    steps, states, first = {}, {}, {}
    for name, config in configs.items():
        steps[name], state = make_step(config)
        states[name] = jax.block_until_ready(state())
        start = time.perf_counter()
        states[name], _ = jax.block_until_ready(steps[name](states[name], batch, key))
        first[name] = time.perf_counter() - start

    def run(name: str) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            states[name], metrics = steps[name](states[name], batch, key)
        jax.block_until_ready(metrics)
        return 1000 * (time.perf_counter() - start) / STEPS

    times: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(WARM_UP + rounds):
        for name in configs:
            milliseconds = run(name)
            if turn >= WARM_UP:
                times[name].append(milliseconds)
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return {
        "batch size": batch_size,
        "image size": configs["with"].image_size,
        **{f"{name} ms": statistics.median(values) for name, values in times.items()},
        **{f"{name} first s": seconds for name, seconds in first.items()},
        "ratio": statistics.median(ratios),
        "lowest ratio": min(ratios),
        "highest ratio": max(ratios),
    }


# Parts --------------------------------------------------------------------------------------------


def compare_parts(toy: bool, batch_size: int, rounds: int) -> list[dict]:
    """Median milliseconds of each part by itself."""
    config = settings(toy)
    batch = make_batch(config.image_size, batch_size)
    images, labels = batch["image"], batch["label"]
    image_keys = jax.random.split(jax.random.key(2), batch_size)
    group_keys = jax.random.split(jax.random.key(3), max(1, batch_size // config.mix_group))
    dtype = jnp.bfloat16
    floats = normalize(images, config.mean, config.std, dtype)
    policy = parse_policy(config.augment)

    def mixing(keys: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mix(
            keys, images, labels, CLASSES,
            mixup=config.mixup, cutmix=config.cutmix, smoothing=config.label_smoothing,
        )  # fmt: skip

    def whole(keys: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = {"image": images, "label": labels, "image_key": keys, "group_key": group_keys}
        return augment(rows, CLASSES, config, dtype)

    def scaled(keys: jax.Array, images: jax.Array) -> jax.Array:
        return normalize(images, config.mean, config.std, dtype)

    parts = {
        "normalize (in both steps)": (scaled, image_keys, images),
        "flip": (random_flip, image_keys, images),
        f"RandAugment {config.augment}": (
            lambda keys, images: rand_augment(keys, images, policy), image_keys, images
        ),
        "random erasing": (random_erase, image_keys, floats),
        "mixup and cutmix": (mixing, group_keys, floats),
        "all of these": (whole, image_keys, images),
        "colour jitter 0.4": (
            lambda keys, images: color_jitter(keys, images, 0.4), image_keys, images
        ),
        "three-augment": (three_augment, image_keys, images),
        "shift by 4": (lambda keys, images: random_shift(keys, images, 4), image_keys, images),
    }  # fmt: skip
    rows = []
    for name, (function, keys, pictures) in parts.items():
        program = jax.jit(function)
        start = time.perf_counter()
        jax.block_until_ready(program(keys, pictures))
        first = time.perf_counter() - start
        times = []
        for turn in range(WARM_UP + rounds):
            # Other draws in each call, as their number decides how often the costly parts run.
            calls = [jax.random.split(jax.random.key(100 * turn + i), len(keys)) for i in range(4)]
            jax.block_until_ready(calls)
            start = time.perf_counter()
            jax.block_until_ready([program(call, pictures) for call in calls])
            if turn >= WARM_UP:
                times.append(1000 * (time.perf_counter() - start) / len(calls))
        rows.append({"part": name, "ms": statistics.median(times), "first s": first})
    return rows


def main() -> None:
    """Prints the tables; with --json writes the same to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--toy", action="store_true", help="a small network at 32 pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{device.device_kind}, {cores} CPU cores"
    versions = f"jax {version('jax')}, jaxlib {version('jaxlib')}"
    versions += f", Python {platform.python_version()}"
    print(f"{machine}; {versions}; medians of {options.rounds} rounds\n")

    steps = compare_steps(options.toy, options.batch_size, options.rounds)
    network = "toy" if options.toy else "ConvNeXt-T"
    print("| step | with, ms | without, ms | with / without (rounds) | first step, s |")
    print("|---|---:|---:|---:|---:|")
    print(
        f"| {network}, {steps['image size']} px, batch {steps['batch size']} "
        f"| {steps['with ms']:.2f} | {steps['without ms']:.2f} | {steps['ratio']:.3f} "
        f"({steps['lowest ratio']:.3f} .. {steps['highest ratio']:.3f}) "
        f"| {steps['with first s']:.1f} / {steps['without first s']:.1f} |\n",
        flush=True,
    )
    parts = compare_parts(options.toy, options.batch_size, options.rounds)
    print("| part by itself | ms | first call, s |")
    print("|---|---:|---:|")
    for row in parts:
        print(f"| {row['part']} | {row['ms']:.2f} | {row['first s']:.1f} |", flush=True)
    if options.json:
        report = {"machine": machine, "versions": versions, "step": steps, "parts": parts}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
