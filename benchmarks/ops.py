"""Times the implementations of the depthwise convolution against each other.

    python benchmarks/ops.py [--json FILE]

For every shape: the forward pass, the input's gradient and the kernel's gradient, each compiled by
itself. The contenders take turns, so that a change in the load of the machine meets all; the table
holds medians over the rounds, in milliseconds. An accelerator is timed over a row of calls, of
which each still costs the host some twenty microseconds: shorter times are not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.ops import depthwise_conv

KERNEL_SIZE = 7
# (batch, height, width, channels): of tiny at 224 pixels, and of the networks for small pictures.
SHAPES = {
    "cpu": (
        ((4, 28, 28, 192), "float32"),
        ((4, 14, 14, 384), "float32"),
        ((4, 7, 7, 768), "float32"),
        ((8, 56, 56, 96), "float32"),
        ((64, 8, 8, 64), "float32"),
        ((64, 7, 7, 48), "float32"),
        ((64, 3, 3, 96), "float32"),
        ((32, 8, 8, 64), "float32"),
        ((32, 14, 14, 64), "float32"),
        ((4, 28, 28, 192), "bfloat16"),
    ),
    "gpu": (
        ((256, 56, 56, 96), "bfloat16"),
        ((256, 28, 28, 192), "bfloat16"),
        ((256, 14, 14, 384), "bfloat16"),
        ((256, 7, 7, 768), "bfloat16"),
        ((512, 16, 16, 128), "bfloat16"),
        ((512, 8, 8, 256), "bfloat16"),
        ((64, 14, 14, 384), "bfloat16"),
        ((64, 7, 7, 768), "bfloat16"),
        ((32, 14, 14, 384), "bfloat16"),
        ((32, 7, 7, 768), "bfloat16"),
        ((16, 14, 14, 384), "bfloat16"),
        ((16, 7, 7, 768), "bfloat16"),
        ((64, 14, 14, 384), "float32"),
        ((64, 7, 7, 768), "float32"),
        ((32, 7, 7, 768), "float32"),
    ),
}
CONTENDERS = ("plain", "shifted", "toeplitz")
WARM_UP, ROUNDS, SECONDS = 2, 15, 6.0
CALLS = {"cpu": 1, "gpu": 50}


def programs(implementation: str) -> dict:
    """The three compiled functions of (x, kernel, g), g being the gradient of the result."""

    def forward(x, kernel):
        return depthwise_conv(x, kernel, implementation=implementation)

    return {
        "forward": jax.jit(lambda x, k, g: forward(x, k)),
        "input gradient": jax.jit(lambda x, k, g: jax.vjp(lambda x: forward(x, k), x)[1](g)),
        "kernel gradient": jax.jit(lambda x, k, g: jax.vjp(lambda k: forward(x, k), k)[1](g)),
    }


def seconds(function, arguments) -> float:
    calls = CALLS[jax.default_backend()]
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def compare(shape: tuple[int, ...], dtype: str) -> list[dict]:
    """One row an operation: the median time of each contender."""
    rng = np.random.default_rng(0)
    kernel_shape = (KERNEL_SIZE, KERNEL_SIZE, 1, shape[-1])
    arguments = [
        jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, kernel_shape, shape)
    ]  # fmt: skip
    contenders = {name: programs(name) for name in CONTENDERS}
    rows = []
    for operation in contenders[CONTENDERS[0]]:
        for name in CONTENDERS:
            for _ in range(WARM_UP):
                seconds(contenders[name][operation], arguments)
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        started = time.perf_counter()
        for _ in range(ROUNDS):
            for name in CONTENDERS:
                times[name].append(seconds(contenders[name][operation], arguments))
            if time.perf_counter() - started > SECONDS and len(times[CONTENDERS[0]]) >= 5:
                break
        medians = {name: 1000 * statistics.median(times[name]) for name in CONTENDERS}
        rows.append(
            {
                "shape": shape,
                "dtype": dtype,
                "operation": operation,
                **{f"{name} ms": medians[name] for name in CONTENDERS},
                "rounds": len(times[CONTENDERS[0]]),
            }
        )
    return rows


def processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), "CPU")


def main() -> None:
    """Prints the table; with --json writes the same to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{device.device_kind} ({processor()}, {cores} cores)"
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    print(f"{machine}; {versions}; {KERNEL_SIZE}x{KERNEL_SIZE} kernels, medians\n")
    print(f"| shape (NHWC) | dtype | operation | {' | '.join(f'{c}, ms' for c in CONTENDERS)} |")
    print("|---|---|---|" + "---:|" * len(CONTENDERS))
    rows = []
    for shape, dtype in SHAPES[jax.default_backend()]:
        for row in compare(shape, dtype):
            rows.append(row)
            times = " | ".join(f"{row[f'{name} ms']:.3f}" for name in CONTENDERS)
            name = "x".join(map(str, shape))
            print(f"| {name} | {dtype} | {row['operation']} | {times} |", flush=True)
    if options.json:
        report = {"machine": machine, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
