"""A training step on one device and on all of them, with the state whole or split over them.

    python benchmarks/devices.py                          # ConvNeXt-B, 128 pictures a device
    python benchmarks/devices.py --model xlarge --batch 64 --memory
    python benchmarks/devices.py --toy                    # a small network, to try the script

Every layout has the same pictures for each device, the whole augmentation and bfloat16. Without
--memory the layouts take turns in one process, and the table says how much faster all devices are
than one. With it, each has a process of its own, and the table says what it took of a device's
memory at its peak, as the device's own allocator reports it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from convnext_jax.configuration import PRESETS
from convnext_jax.training import parallel, recipe
from convnext_jax.training.config import default_config
from convnext_jax.training.network import initial_model
from convnext_jax.training.step import init_state

CLASSES = tuple(f"class {i}" for i in range(1000))
WARM_UP, ROUNDS, STEPS = 2, 9, 6


def settings(options: argparse.Namespace, devices: int) -> FrozenConfigDict:
    config = default_config()
    config.dtype = "bfloat16"
    config.batch_size = options.batch * devices
    config.mix_group = min(128, options.batch)
    config.remat = options.remat
    if options.toy:
        config.image_size = 32
        config.model.depths, config.model.hidden_sizes = (1, 1), (64, 128)
    else:
        config.model.update(PRESETS[options.model])
    return FrozenConfigDict(config)


class Contender:
    """A layout with its compiled step, its state and a batch on its devices."""

    def __init__(self, options: argparse.Namespace, name: str, devices: int):
        config = settings(options, devices)
        layout = parallel.layout(name, parallel.all_devices()[:devices])
        model, params = initial_model(config, CLASSES, jax.random.key(0))
        optimizer = recipe.optimizer(
            params, learning_rate=lambda step: 1e-4, weight_decay=config.weight_decay
        )
        params = jax.device_get(params)  # off the first device, whose peak is looked at

        def first_state(params):
            return init_state(params, optimizer, with_average=True)

        sharding = layout.state_sharding(jax.eval_shape(first_state, params))
        self.state = jax.jit(first_state, out_shardings=sharding)(params)
        self.step = layout.train_step(model, optimizer, config)
        rng = np.random.default_rng(0)
        shape = (config.batch_size, config.image_size, config.image_size, 3)
        labels = rng.integers(0, len(CLASSES), config.batch_size).astype(np.int32)
        self.batch = layout.put({"image": rng.integers(0, 256, shape, np.uint8), "label": labels})
        key = jax.random.key(1)
        self.key = jax.device_put(key, layout.state_sharding(key))
        self.pictures = config.batch_size
        start = time.perf_counter()
        self.run(1)
        self.first = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - start) / steps


def compare(options: argparse.Namespace) -> list[dict]:
    """Median milliseconds a step, and the ratio of the pictures a second to those of one device."""
    everything = jax.device_count()
    layouts = [("pmap", 1), ("pmap", everything), ("sharded", everything)]
    contenders = {layout: Contender(options, *layout) for layout in layouts}
    rates: dict[tuple[str, int], list[float]] = {layout: [] for layout in layouts}
    for turn in range(WARM_UP + ROUNDS):
        for layout, contender in contenders.items():
            seconds = contender.run(STEPS)
            if turn >= WARM_UP:
                rates[layout].append(contender.pictures / seconds)
    one = rates["pmap", 1]
    rows = []
    for (name, devices), values in rates.items():
        ratios = [a / b for a, b in zip(values, one, strict=True)]
        rows.append(
            {
                "layout": name,
                "devices": devices,
                "pictures/s": round(statistics.median(values), 1),
                "ms": round(1000 * options.batch * devices / statistics.median(values), 2),
                "to one": round(statistics.median(ratios), 3),
                "range": f"{min(ratios):.3f} .. {max(ratios):.3f}",
                "first s": round(contenders[name, devices].first, 1),
            }
        )
    return rows


def measure_memory(options: argparse.Namespace) -> list[dict]:
    rows = []
    for name in ("pmap", "sharded"):
        command = [sys.executable, __file__, *sys.argv[1:], f"--only={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def measure_one(options: argparse.Namespace) -> dict:
    contender = Contender(options, options.only, jax.device_count())
    milliseconds = 1000 * contender.run(STEPS)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.devices()]
    state = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(contender.state))
    return {
        "layout": options.only,
        "devices": jax.device_count(),
        "peak GiB a device": [round(peak / 2**30, 2) for peak in peaks],
        "state GiB a device": round(state / 2**30, 2),
        "ms": round(milliseconds, 1),
        "first s": round(contender.first, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=128, help="pictures for each device")
    parser.add_argument("--remat", action="store_true", help="see the setting of this name")
    parser.add_argument("--memory", action="store_true", help="look at memory, not at time")
    parser.add_argument("--toy", action="store_true", help="a small network")
    parser.add_argument("--only", choices=("pmap", "sharded"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure_one(options)))
        return
    rows = measure_memory(options) if options.memory else compare(options)
    print(
        f"{options.model}, {options.batch} pictures a device, remat {options.remat}; "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
