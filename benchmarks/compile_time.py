"""How long the first training step takes to compile, beside plain flax.linen.

    python benchmarks/compile_time.py                                   # T, 224 px, bf16
    python benchmarks/compile_time.py --size 64 --batch 8 --dtype float32
    python benchmarks/compile_time.py --topology v5e:4x4 --batch 1024   # for a TPU, without one

A contender starts in a process of its own, with an empty folder for jax's persistent compilation
cache: that is the cold start, in which writing to the folder counts as compiling. A second process
finds the first one's programs there: that is the warm start. Contenders take turns; a round is both
starts of each, and the table has medians over the rounds.

The step is forward, backward and AdamW on f32 weights, with drop path 0.1, in `--dtype`; it gets
its pictures as arguments. "Trace", "lower" and "compile" are JAX's three parts of making a program
of a function, "step" is the first run of the program, and "first" is the four together, of which
the ratio is to plain linen's, round by round. "Process" is from starting Python to the step's
result, imports and initial weights included. "Temporaries" are what the compiler says that the step
needs beside its arguments.

With `--topology`, which needs libtpu, the step is compiled for so many described devices, mapped
over them with `--batch` pictures in all, and does not run. "Bytes accessed" is what the compiler
counts for one device, with what lies in memory on the chip; "traffic" leaves that out. Of a kernel
both have what it reads and writes, each array once. It counts the body of a loop once, so that
there is no row for `scan`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONTENDERS = ("plain linen", "convnext_jax", "convnext_jax-scan")
AXIS = "batch"  # over which the step is mapped
CLASSES = 1000
DROP_PATH = 0.1
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05


# A contender's process ----------------------------------------------------------------------------


def training_step(options: argparse.Namespace) -> tuple[Callable, Callable]:
    """A function that makes the initial state, and the step from one state to the next."""
    import jax
    import jax.numpy as jnp
    import optax
    import plain_linen

    from convnext_jax import ConvNextConfig, ConvNextForImageClassification
    from convnext_jax.configuration import PRESETS

    config = ConvNextConfig(
        **PRESETS[options.model], num_labels=CLASSES, drop_path_rate=DROP_PATH,
        image_size=options.size,
    )  # fmt: skip
    dtype, axis = jnp.dtype(options.dtype), AXIS if options.topology else None
    if options.contender == "plain linen":
        model = plain_linen.ConvNext(
            config.depths, config.hidden_sizes, CLASSES, DROP_PATH, dtype=dtype
        )
    else:
        model = ConvNextForImageClassification(
            config, dtype=dtype, data_format="channels_last", axis_name=axis,
            scan=options.contender.endswith("-scan"),
        )  # fmt: skip
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def initial_state():
        pictures = jnp.zeros((1, options.size, options.size, 3), dtype)
        params = model.init(jax.random.key(0), pictures)["params"]
        return params, optimizer.init(params)

    def step(state, pictures, labels, key):
        params, moments = state

        def loss(params):
            scores = model.apply({"params": params}, pictures, train=True, rngs={"drop_path": key})
            scores = getattr(scores, "logits", scores).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        gradients = jax.grad(loss)(params)
        if axis is not None:
            gradients = jax.lax.pmean(gradients, axis)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    return initial_state, step


def start(options: argparse.Namespace) -> dict:
    """The first step on this machine, by its parts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    initial_state, step = training_step(options)
    state = jax.block_until_ready(jax.jit(initial_state)())
    rng = np.random.default_rng(0)
    shape = (options.batch, options.size, options.size, 3)
    pictures = jnp.asarray(rng.standard_normal(shape, np.float32), options.dtype)
    arguments = pictures, jnp.asarray(rng.integers(0, CLASSES, options.batch)), jax.random.key(0)
    jax.block_until_ready(arguments)

    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=0).trace(state, *arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(state, *arguments))
    times.append(time.perf_counter())
    trace, lower, compile_, run = np.diff(times).tolist()
    return {
        "trace": trace, "lower": lower, "compile": compile_, "step": run,
        "first": times[-1] - times[0],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "versions": f"{_hardware(jax.devices()[0])}, {_versions()}",
    }  # fmt: skip


def compile_for(options: argparse.Namespace) -> dict:
    """What the compiler says of the step for the devices of `options.topology`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from convnext_jax.training import ahead

    devices = ahead.describe(options.topology)
    mesh = Mesh(np.array(devices), (AXIS,))
    whole, parts = PartitionSpec(), PartitionSpec(AXIS)
    everywhere = NamedSharding(mesh, whole)
    by_device = NamedSharding(mesh, parts)

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    initial_state, step = training_step(options)
    step = jax.shard_map(
        step, mesh=mesh, in_specs=(whole, parts, parts, whole), out_specs=whole, check_vma=False
    )
    state = jax.tree.map(lambda x: placed(x, everywhere), jax.eval_shape(initial_state))
    shape = (options.batch, options.size, options.size, 3)
    pictures = jax.ShapeDtypeStruct(shape, jnp.dtype(options.dtype), sharding=by_device)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=by_device)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    lowered = jax.jit(step, donate_argnums=0).lower(state, pictures, labels, key)
    begin = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    cost = compiled.cost_analysis()
    return {
        "compile": seconds,
        "flops": cost["flops"] * len(devices) / options.batch,
        "bytes": cost["bytes accessed"],
        "traffic": ahead.traffic(compiled.as_text()),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "versions": f"{len(devices)} x {devices[0].device_kind}, {_versions()}",
    }


def _hardware(device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    return f"{len(os.sched_getaffinity(0))} CPU core(s)"


def _versions() -> str:
    import flax
    import jax

    return f"jax {jax.__version__}, flax {flax.__version__}, Python {sys.version.split()[0]}"


# The table ----------------------------------------------------------------------------------------


def in_process(contender: str, cache: str) -> dict:
    """What `contender` answers in a process of its own, and how long that took to end."""
    # Without the memory that JAX would take at once; and nothing is too small for the cache.
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, __file__, *sys.argv[1:], f"--contender={contender}"]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer | {"process": time.perf_counter() - begin}


def compare_starts(options: argparse.Namespace) -> list[dict]:
    cold = {name: [] for name in options.contenders}
    warm = {name: [] for name in options.contenders}
    for _ in range(options.rounds):
        for name in options.contenders:
            with tempfile.TemporaryDirectory() as cache:
                cold[name].append(in_process(name, cache))
                warm[name].append(in_process(name, cache))
    rows = []
    for name in options.contenders:
        row = _first_columns(options, name)
        for part in ("trace", "lower", "compile", "step", "first"):
            row[f"{part} s"] = _median(cold[name], part, 2)
        ratios = _ratios(cold, name, "first")
        row |= {
            "ratio": round(statistics.median(ratios), 3),
            "range": f"{min(ratios):.3f} .. {max(ratios):.3f}",
            "process s": _median(cold[name], "process", 2),
            "warm first s": _median(warm[name], "first", 2),
            "warm process s": _median(warm[name], "process", 2),
            "temporaries MiB": round(cold[name][0]["temporaries"] / 2**20, 1),
            "versions": cold[name][0]["versions"],
        }
        rows.append(row)
    return rows


def compare_programs(options: argparse.Namespace) -> list[dict]:
    names = [name for name in options.contenders if not name.endswith("-scan")]
    with tempfile.TemporaryDirectory() as cache:
        said = {name: [in_process(name, cache)] for name in names}
    return [
        _first_columns(options, name)
        | {
            "GFLOP a picture": round(figures["flops"] / 1e9, 2),
            "bytes accessed, GB": round(figures["bytes"] / 1e9, 2),
            "ratio": round(_ratios(said, name, "bytes")[0], 3),
            "traffic, GB": round(figures["traffic"] / 1e9, 2),
            "temporaries GB": round(figures["temporaries"] / 1e9, 2),
            "compile s": round(figures["compile"], 1),
            "versions": figures["versions"],
        }
        for name, [figures] in said.items()
    ]


def _first_columns(options: argparse.Namespace, name: str) -> dict:
    return {
        "contender": name,
        "model": options.model,
        "px": options.size,
        "batch": options.batch,
        "dtype": options.dtype,
    }


def _median(figures: list[dict], part: str, digits: int) -> float:
    return round(statistics.median(one[part] for one in figures), digits)


def _ratios(figures: dict[str, list[dict]], name: str, part: str) -> list[float]:
    """Of a figure to the first contender's, round by round."""
    first = next(iter(figures.values()))
    return [own[part] / other[part] for own, other in zip(figures[name], first, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=256, help="pictures of a step, on all devices")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS,
        help="ratios are to the first",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topology", metavar="TOPOLOGY", help="of TPUs, such as v5e:4x4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(compile_for(options) if options.topology else start(options)))
        return
    rows = compare_programs(options) if options.topology else compare_starts(options)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
