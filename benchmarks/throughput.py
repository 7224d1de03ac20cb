"""Pictures a second and peak memory of ConvNeXt, beside other people's.

    python benchmarks/throughput.py                                # T, inference, 224 px, bf16
    python benchmarks/throughput.py --task training --model base
    python benchmarks/throughput.py --batch 1 --contenders convnext_jax timm timm-graphs

Each contender lives in a process of its own, with weights and pictures on its device, and they take
turns: a round is some seconds of each. The table has medians over the rounds, the ratio to the
fastest of PyTorch's round by round, and what the framework's own allocator says of its
memory at its peak. "First" is the time of the first step, compilation included.

Training is forward, backward and AdamW on f32 weights, with drop path 0.1 and bf16 arithmetic.
Inference has weights of the same type as the pictures. A contender whose library is not installed
is left out, with a line that says so. Of jax-ml/bonsai a checkout is wanted on PYTHONPATH, and
Keras has no network below T.

On a CPU all of them are given large pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, where the
environment has no other): zeroing small ones was a third of a small network's training step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = ("convnext_jax", "convnext_jax-scan")
ON_JAX = (*OURS, "keras", "bonsai")  # Keras 3 with its backend JAX, and jax-ml/bonsai
PEERS = ("timm", "timm-graphs", "timm-tuned", "timm-eager", "huggingface")  # on PyTorch
# What `torch.compile` calls their modes; the others are not compiled.
MODES = {"timm": "default", "timm-graphs": "reduce-overhead", "timm-tuned": "max-autotune"}
CLASSES = 1000
DROP_PATH = 0.1
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05

PyTree = Any
Run = Callable[[int], None]  # makes so many steps, and waits for them
Logits = Callable[..., Any]  # of parameters, pictures and, in training, a key


# Contenders ---------------------------------------------------------------------------------------


def own_network(options: argparse.Namespace) -> tuple[PyTree, Logits]:
    """The parameters, f32 for training, and what computes logits from them."""
    import jax
    import jax.numpy as jnp

    from convnext_jax import ConvNextConfig, ConvNextForImageClassification
    from convnext_jax.configuration import PRESETS

    config = ConvNextConfig(
        **PRESETS[options.model], num_labels=CLASSES, drop_path_rate=DROP_PATH,
        image_size=options.size,
    )  # fmt: skip
    dtype = jnp.dtype(options.dtype)
    model = ConvNextForImageClassification(
        config, dtype=dtype, param_dtype=jnp.float32 if options.task == "training" else dtype,
        data_format="channels_last", scan=options.contender.endswith("-scan"),
    )  # fmt: skip

    def logits(params, pictures, key=None):
        rngs = None if key is None else {"drop_path": key}
        return model.apply({"params": params}, pictures, train=key is not None, rngs=rngs).logits

    return model.init_variables(jax.random.key(0))["params"], logits


def keras_network(options: argparse.Namespace) -> tuple[PyTree, Logits]:
    """As `own_network`; drop path's masks are those of the first step in all."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    half = options.dtype == "bfloat16"
    keras.config.set_dtype_policy(
        ("mixed_bfloat16" if options.task == "training" else "bfloat16") if half else "float32"
    )
    model = getattr(keras.applications, f"ConvNeXt{options.model.capitalize()}")(
        weights=None, include_preprocessing=False, classifier_activation=None, classes=CLASSES,
        input_shape=(options.size, options.size, 3),
    )  # fmt: skip
    trained, others = (
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )

    def logits(params, pictures, key=None):
        return model.stateless_call(params, others, pictures, training=key is not None)[0]

    return trained, logits


def bonsai_network(options: argparse.Namespace) -> tuple[PyTree, Logits]:
    """As `own_network`."""
    import jax
    from bonsai.models.convnext import modeling
    from flax import nnx

    from convnext_jax.configuration import PRESETS

    config = modeling.ModelConfig(
        PRESETS[options.model]["depths"], PRESETS[options.model]["hidden_sizes"], DROP_PATH, CLASSES
    )
    graph, params = nnx.split(modeling.ConvNeXt(config, rngs=nnx.Rngs(0)))

    def rounded(params):
        return jax.tree.map(lambda x: x.astype(options.dtype), params)

    def logits(params, pictures, key=None):
        network = nnx.merge(graph, rounded(params))
        return network(pictures, rngs=key, train=key is not None)

    return params if options.task == "training" else rounded(params), logits


def jax_contender(options: argparse.Namespace) -> tuple[Run, Callable[[], int], str]:
    """A function that runs steps, one that tells the peak of memory, and the versions."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    make = {"keras": keras_network, "bonsai": bonsai_network}.get(options.contender, own_network)
    params, logits = make(options)
    rng = np.random.default_rng(0)
    shape = (options.batch, options.size, options.size, 3)
    pictures = jnp.asarray(rng.standard_normal(shape, np.float32), options.dtype)
    labels = jnp.asarray(rng.integers(0, CLASSES, options.batch))

    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(state, key):
        params, moments = state

        def loss(params):
            scores = logits(params, pictures, key).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        gradients = jax.grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    if options.task == "training":
        state = (params, jax.jit(optimizer.init)(params))
        step = jax.jit(step, donate_argnums=0)

        def run(steps: int) -> None:
            nonlocal state
            for i in range(steps):
                state = step(state, jax.random.key(i))
            jax.block_until_ready(state)
    else:
        infer = jax.jit(logits)

        def run(steps: int) -> None:
            for _ in range(steps):
                result = infer(params, pictures)
            jax.block_until_ready(result)

    def peak() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    return run, peak, f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def torch_contender(options: argparse.Namespace) -> tuple[Run, Callable[[], int], str]:
    """As `jax_contender`, of timm or transformers on PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    training = options.task == "training"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    if options.contender == "huggingface":
        from transformers import ConvNextConfig, ConvNextForImageClassification

        from convnext_jax.configuration import PRESETS

        network = ConvNextForImageClassification(
            ConvNextConfig(**PRESETS[options.model], num_labels=CLASSES, drop_path_rate=DROP_PATH)
        )
    else:
        import timm

        network = timm.create_model(f"convnext_{options.model}", drop_path_rate=DROP_PATH)
    network = network.to(device, memory_format=torch.channels_last).train(training)
    if not training:
        network = network.to(dtype)
    mode = MODES.get(options.contender)
    compiled = torch.compile(network, mode=mode) if mode else network
    pictures = torch.randn(options.batch, 3, options.size, options.size, device=device)
    pictures = pictures.to(dtype if not training else torch.float32)
    pictures = pictures.to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=device == "cuda"
    )

    def logits():
        result = compiled(pictures)
        return result.logits if options.contender == "huggingface" else result

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run(steps: int) -> None:
        for _ in range(steps):
            if training:
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    loss = torch.nn.functional.cross_entropy(logits(), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            else:
                with torch.inference_mode():
                    logits()
        wait()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return run, peak, f"{name}, torch {torch.__version__}"


def serve(options: argparse.Namespace) -> None:
    """A contender's process: for each line that comes in, one round, and a line of figures."""
    make = jax_contender if options.contender in ON_JAX else torch_contender
    run, peak, versions = make(options)
    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    run(2)
    start = time.perf_counter()
    run(2)
    steps = max(1, round(options.seconds / ((time.perf_counter() - start) / 2)))
    print(json.dumps({"first": first, "versions": versions}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run(steps)
        seconds = (time.perf_counter() - start) / steps
        print(json.dumps({"seconds": seconds, "peak": peak()}), flush=True)


# The table ----------------------------------------------------------------------------------------


class Contender:
    """The process of a contender, as the one that asks it for rounds sees it."""

    def __init__(self, name: str):
        # A process takes the memory that it needs, so that there is room for the next one.
        # On Linux, the C library has the system back large blocks with large pages.
        environment = {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            **os.environ,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, __file__, *sys.argv[1:], f"--contender={name}"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start = self._answer(name)

    def round(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer("it")

    def _answer(self, name: str) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{name} ended with status {self.process.wait()}")


def compare(options: argparse.Namespace) -> list[dict]:
    contenders = {}
    for name in options.contenders:
        try:
            contenders[name] = Contender(name)
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
    rounds = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            rounds[name].append(contender.round())
    seconds = {name: [figures["seconds"] for figures in rounds[name]] for name in rounds}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peers = [name for name in medians if name in PEERS]
    peer = min(peers, key=medians.get) if peers else next(iter(medians))
    rows = []
    for name, values in seconds.items():
        ratios = [theirs / own for own, theirs in zip(values, seconds[peer], strict=True)]
        rows.append(
            {
                "contender": name,
                "task": options.task,
                "model": options.model,
                "batch": options.batch,
                "ms": round(1000 * medians[name], 3),
                "pictures/s": round(options.batch / medians[name], 1),
                "ratio": round(statistics.median(ratios), 3),
                "range": f"{min(ratios):.3f} .. {max(ratios):.3f}",
                "peak GiB": round(rounds[name][-1]["peak"] / 2**30, 2),
                "first s": round(contenders[name].start["first"], 1),
                "versions": contenders[name].start["versions"],
            }
        )
    for contender in contenders.values():
        contender.process.stdin.close()
        contender.process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="inference", choices=("inference", "training"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--contenders", nargs="+", default=(OURS[0], PEERS[0]), choices=ON_JAX + PEERS
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a contender in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--contender", choices=ON_JAX + PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        serve(options)
        return
    rows = compare(options)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
