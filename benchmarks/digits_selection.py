"""Chooses the settings of `configs/digits.py` without looking at the fifth that it holds out.

    python benchmarks/digits_selection.py

Only the training part of the config's split is used: cut into four folds, evenly over the classes,
each candidate is trained on three and validated on the fourth, four times. The rule was fixed
before the first run: the highest mean top-1 of the averaged weights, ties by the lower mean
validation loss. One process a core, so a machine with many cores finishes in minutes.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

FOLDS = 4
CANDIDATES = [
    {"batch_size": batch_size, "learning_rate": learning_rate, "crop_scale": (smallest_crop, 1.0)}
    for batch_size, learning_rate, smallest_crop in itertools.product(
        (32, 64), (1e-3, 2e-3), (0.7, 0.85)
    )
]


def fold(number: int, val_fraction: float, split_seed: int):
    """The data of one fold: all of it from the training part of the config's split."""
    import numpy as np

    from convnext_jax.data import sources

    whole = sources.digits(val_fraction, split_seed)
    labels = whole.train.labels
    place = np.empty(len(labels), int)
    for label in range(len(whole.class_names)):
        members = np.flatnonzero(labels == label)
        np.random.default_rng([split_seed, label]).shuffle(members)
        place[members] = np.arange(len(members)) % FOLDS

    def part(mask: np.ndarray) -> sources.ArraySource:
        train = whole.train
        return sources.ArraySource(
            train.name, train.images[mask], labels[mask], train.numbers[mask]
        )

    return sources.Dataset(part(place != number), part(place == number), whole.class_names)


def run(task: tuple[int, int]) -> tuple[int, float, float]:
    """Trains one candidate on one fold: its number, top-1 and loss of the averaged weights."""
    candidate, number = task
    if hasattr(os, "sched_setaffinity"):  # a core each: XLA would start a thread a core in each
        own = multiprocessing.current_process()._identity[0] % os.cpu_count()
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[own]})
    from configs import digits
    from convnext_jax.data import sources
    from convnext_jax.training import loop

    config = digits.get_config()
    sources.DATASETS["digits"] = lambda **split: fold(number, **split)
    config.update(CANDIDATES[candidate])
    config.eval_every_epochs = config.checkpoint_every_epochs = config.epochs
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        metrics = loop.train(config, Path(folder, "run"))
    return candidate, metrics["val_ema/top1"], metrics["val_ema/loss"]


def main() -> None:
    """Runs every candidate on every fold and prints the table, best first."""
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_cpu_multi_thread_eigen=false")
    tasks = list(itertools.product(range(len(CANDIDATES)), range(FOLDS)))
    results: dict[int, list[tuple[float, float]]] = {}
    # A process a task: what one run leaves behind must not reach the next.
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for candidate, top1, loss in pool.imap_unordered(run, tasks, chunksize=1):
            results.setdefault(candidate, []).append((top1, loss))
            print(f"{CANDIDATES[candidate]}: {top1:.4f}", file=sys.stderr, flush=True)

    def mean(candidate: int) -> tuple[float, float]:
        top1, loss = (sum(values) / FOLDS for values in zip(*results[candidate], strict=True))
        return top1, loss

    print("| batch_size | learning_rate | crop_scale | top-1 of the folds, % | mean | loss |")
    print("|---|---|---|---|---|---|")
    for candidate in sorted(results, key=lambda c: (-mean(c)[0], mean(c)[1])):
        settings = " | ".join(str(value) for value in CANDIDATES[candidate].values())
        folds = ", ".join(f"{100 * top1:.2f}" for top1, _ in sorted(results[candidate]))
        top1, loss = mean(candidate)
        print(f"| {settings} | {folds} | {100 * top1:.2f} | {loss:.4f} |")


if __name__ == "__main__":
    main()
