"""Times the implementations of each operation against each other and the device's limits.

    python benchmarks/ops.py [--json FILE]

For every shape of the depthwise convolution: the forward pass, the input's gradient and the
kernel's gradient, each compiled by itself. Of what follows it in a block, on a GPU: the forward
pass, and the gradients with what has to be computed again for them. The floor is the larger of two
times: of reading and writing every number once, and of the arithmetic. The contenders take turns,
so that a change in the load of the machine meets all; the table holds medians over the rounds, in
milliseconds. An accelerator is timed over a row of calls, of which each still costs the host some
twenty microseconds: shorter times are not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.ops import NormMlpWeights, depthwise_conv, norm_mlp

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
CONTENDERS = {
    "cpu": ("plain", "shifted", "toeplitz"),
    "gpu": ("plain", "toeplitz", "streamed"),
}
# (rows, channels) of tiny and base at 224 pixels.
MLP_SHAPES = (
    (802816, 96), (401408, 128), (200704, 192), (100352, 256), (50176, 384), (50176, 512),
    (12544, 768), (12544, 1024),
)  # fmt: skip
# Bytes, f32 additions and multiplications, and bf16 ones of matrix products, a second; NVIDIA's
# data sheets.
CHIPS = {"H100": (3.35e12, 67e12, 989e12), "H200": (4.8e12, 67e12, 989e12)}
# Positions of a map, beyond which a channel's matrix is not tried: giving gigabytes back to the
# system is long work, which the next contender would wait for.
LARGEST_MATRIX = 16 * 16
WARM_UP, ROUNDS, SECONDS = 2, 15, 6.0
CALLS = {"cpu": 1, "gpu": 50}


def convolutions(implementation: str) -> dict:
    """The three compiled functions of (x, kernel, g), g being the gradient of the result."""

    def forward(x, kernel):
        return depthwise_conv(x, kernel, implementation=implementation)

    return {
        "forward": jax.jit(lambda x, k, g: forward(x, k)),
        "input gradient": jax.jit(lambda x, k, g: jax.vjp(lambda x: forward(x, k), x)[1](g)),
        "kernel gradient": jax.jit(lambda x, k, g: jax.vjp(lambda k: forward(x, k), k)[1](g)),
    }


def norm_mlps(implementation: str) -> dict:
    """The two compiled functions of (x, shortcut, g, weights)."""

    def forward(x, shortcut, weights):
        return norm_mlp(x, shortcut, weights, epsilon=1e-6, implementation=implementation)

    def gradients(x, shortcut, g, weights):
        return jax.vjp(lambda x, weights: forward(x, shortcut, weights), x, weights)[1](g)

    return {
        "norm and MLP": jax.jit(lambda x, shortcut, g, weights: forward(x, shortcut, weights)),
        "its gradients, with what they compute again": jax.jit(gradients),
    }


def floor(numbers: int, size: int, simple: float, products: float) -> float | None:
    """The least milliseconds for so many numbers of `size` bytes and so many operations."""
    kind = jax.devices()[0].device_kind
    for name, (bandwidth, f32, bf16) in CHIPS.items():
        if name in kind:
            return 1000 * max(numbers * size / bandwidth, simple / f32, products / bf16)
    return None


def seconds(function, arguments) -> float:
    calls = CALLS[jax.default_backend()]
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def convolution_rows(shape: tuple[int, ...], dtype: str) -> list[dict]:
    rng = np.random.default_rng(0)
    kernel_shape = (KERNEL_SIZE, KERNEL_SIZE, 1, shape[-1])
    arguments = [
        jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, kernel_shape, shape)
    ]  # fmt: skip
    names = CONTENDERS[jax.default_backend()]
    if shape[1] * shape[2] > LARGEST_MATRIX:
        names = [name for name in names if name != "toeplitz"]
    contenders = {name: convolutions(name) for name in names}
    maps = math.prod(shape)
    least = floor(2 * maps, jnp.dtype(dtype).itemsize, 2 * KERNEL_SIZE**2 * maps, 0)
    return compare(contenders, arguments, {"shape": shape, "dtype": dtype, "floor ms": least})


def norm_mlp_rows(shape: tuple[int, int], dtype: str) -> list[dict]:
    rng = np.random.default_rng(0)
    (rows, width), wide = shape, 4 * shape[1]
    maps = [jnp.asarray(rng.standard_normal((1, 1, *shape)), dtype) for _ in range(3)]
    shapes = [(width,)] * 2 + [(width, wide), (wide,), (wide, width)] + [(width,)] * 2
    weights = NormMlpWeights(*(jnp.asarray(rng.standard_normal(s) / 20, dtype) for s in shapes))
    contenders = {name: norm_mlps(name) for name in ("plain", "fused")}
    # Two products forward; of the gradients two for each, and the first again.
    table = compare(contenders, [*maps, weights], {"shape": shape, "dtype": dtype})
    for row, (passes, products) in zip(table, ((3, 2), (3, 5)), strict=True):
        flops = products * 2 * rows * width * wide
        row["floor ms"] = floor(passes * rows * width, jnp.dtype(dtype).itemsize, 0, flops)
    return table


def compare(contenders: dict, arguments: list, facts: dict) -> list[dict]:
    """One row an operation: the median time of each contender."""
    first = next(iter(contenders))
    rows = []
    for operation in contenders[first]:
        for name in contenders:
            for _ in range(WARM_UP):
                seconds(contenders[name][operation], arguments)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        started = time.perf_counter()
        for _ in range(ROUNDS):
            for name in contenders:
                times[name].append(seconds(contenders[name][operation], arguments))
            if time.perf_counter() - started > SECONDS and len(times[first]) >= 5:
                break
        medians = {f"{name} ms": 1000 * statistics.median(times[name]) for name in contenders}
        rows.append({**facts, "operation": operation, **medians, "rounds": len(times[first])})
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
    names = (*CONTENDERS[jax.default_backend()], "fused")
    print(f"| shape | dtype | operation | {' | '.join(f'{c}, ms' for c in names)} | floor, ms |")
    print("|---|---|---|" + "---:|" * (len(names) + 1))
    rows = []
    tables = [(convolution_rows, *case) for case in SHAPES[jax.default_backend()]]
    if jax.default_backend() == "gpu":
        tables += [(norm_mlp_rows, shape, "bfloat16") for shape in MLP_SHAPES]
    for rows_of, shape, dtype in tables:
        for row in rows_of(shape, dtype):
            rows.append(row)
            times = (row.get(f"{name} ms") for name in (*names, "floor"))
            times = " | ".join("" if time is None else f"{time:.3f}" for time in times)
            name = "x".join(map(str, shape))
            print(f"| {name} | {dtype} | {row['operation']} | {times} |", flush=True)
    if options.json:
        report = {"machine": machine, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
