"""Times the implementations of the depthwise convolution against each other.

    python benchmarks/ops.py [--json FILE]

For every shape: the forward pass, the input's gradient and the kernel's gradient, each compiled by
itself. The contenders take turns, so that a change in the load of the machine meets both; the table
holds medians over the rounds, in milliseconds. Ratios above 1 say that `shifted` is the faster.
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
# (batch, height, width, channels): tiny's second and last stage at 224 pixels, its first at batch
# 8, and the digits' network.
SHAPES = (
    ((4, 28, 28, 192), "float32"),
    ((4, 7, 7, 768), "float32"),
    ((8, 56, 56, 96), "float32"),
    ((64, 8, 8, 64), "float32"),
    ((4, 28, 28, 192), "bfloat16"),
)
CONTENDERS = ("plain", "shifted")
WARM_UP, ROUNDS, SECONDS = 2, 15, 6.0


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
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


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
                "plain / shifted": medians["plain"] / medians["shifted"],
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
    print("| shape (NHWC) | dtype | operation | plain, ms | shifted, ms | plain / shifted |")
    print("|---|---|---|---:|---:|---:|")
    rows = []
    for shape, dtype in SHAPES:
        for row in compare(shape, dtype):
            rows.append(row)
            print(
                f"| {'x'.join(map(str, shape))} | {dtype} | {row['operation']} | "
                f"{row['plain ms']:.2f} | {row['shifted ms']:.2f} | {row['plain / shifted']:.1f} |",
                flush=True,
            )
    if options.json:
        report = {"machine": machine, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
