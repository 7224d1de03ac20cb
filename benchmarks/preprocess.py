"""Times the training pipeline on photos against plain Pillow, with as many workers.

    python benchmarks/preprocess.py --photos FOLDER [--size 224] [--json FILE]

FOLDER holds picture files, in folders or not. All sides read them from disk, in random order, draw
the recipe's random resized crop and end with a uint8 array of SIZE x SIZE pixels a picture:

    pipeline           `train_batches`: batches of 64, by threads, or by processes from three on
    Pillow, threads    open, convert to RGB, crop, resize (bicubic), array, in a thread pool
    Pillow, processes  the same in a process pool, in batches of 64, left where they were made

They take turns, so that a change in the load of the machine meets all; the table holds medians over
the rounds, in pictures a second, and the median, lowest and highest ratio of a round.

Then pictures in memory: batches of 512 out of 50,000 of 32 x 32, as they are, in pictures a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL.Image

from convnext_jax.data.pipeline import train_batches
from convnext_jax.data.sources import ArraySource, FolderSource
from convnext_jax.image import CROP_DRAWS, sample_crop

BATCH_SIZE = 64
BATCHES = 10  # a round, of each side
ROUNDS = 9
WARM_UP = 3  # rounds of the pipeline before all
FILL_SECONDS = 1.0  # in which the pipeline makes what it keeps ready, before the others' turn


def pillow_crop(path: Path, draws: list, size: int) -> np.ndarray:
    """What a plain data loader does for one picture."""
    with PIL.Image.open(path) as file:
        image = file.convert("RGB")
    top, left, height, width = sample_crop(draws, image.height, image.width)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), PIL.Image.Resampling.BICUBIC))


def pillow_batch(paths: list[Path], draws: list, size: int) -> int:
    """The same for a batch; what comes back is how many, so that no time goes into sending it."""
    return len(np.stack([pillow_crop(*each, size) for each in zip(paths, draws, strict=True)]))


def compare(paths: list[Path], size: int, workers: int, rounds: int) -> dict:
    """Pictures a second of the three sides."""
    rng = np.random.default_rng(0)
    source = FolderSource(Path("/"), [str(p)[1:] for p in paths], np.zeros(len(paths), int))
    arguments = {"batch_size": BATCH_SIZE, "image_size": size, "seed": 0, "num_workers": workers}
    number = BATCH_SIZE * BATCHES * max(workers // 2, 1)

    def pipeline() -> float:
        for _ in islice(batches, workers + 2):  # from now on, what is taken is what is made
            pass
        start = time.perf_counter()
        for _ in islice(batches, number // BATCH_SIZE):
            pass
        seconds = time.perf_counter() - start
        time.sleep(FILL_SECONDS)
        return seconds

    def pillow_threads() -> float:
        order = rng.integers(len(paths), size=number)
        draws = rng.random((number, *CROP_DRAWS)).tolist()
        with ThreadPoolExecutor(workers) as pool:
            start = time.perf_counter()
            list(pool.map(lambda i, d: pillow_crop(paths[i], d, size), order, draws))
            return time.perf_counter() - start

    def pillow_processes() -> float:
        order = rng.integers(len(paths), size=(number // BATCH_SIZE, BATCH_SIZE)).tolist()
        draws = rng.random((len(order), BATCH_SIZE, *CROP_DRAWS)).tolist()
        files = [[paths[i] for i in batch] for batch in order]
        start = time.perf_counter()
        list(processes.map(pillow_batch, files, draws, [size] * len(files)))
        return time.perf_counter() - start

    sides = {
        "pipeline": pipeline,
        "Pillow, threads": pillow_threads,
        "Pillow, processes": pillow_processes,
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with (
        closing(train_batches(source, **arguments)) as batches,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes,
    ):
        # Each process makes tables of weights for the sizes that it meets first.
        for _ in islice(batches, WARM_UP * number // BATCH_SIZE):
            pass
        for round_number in range(rounds + 1):
            for name, side in sides.items():
                seconds = side()
                if round_number:  # the first fills the system's cache
                    rates[name].append(number / seconds)
    row = {"workers": workers, **{name: statistics.median(each) for name, each in rates.items()}}
    for name in ("Pillow, threads", "Pillow, processes"):
        ratios = [a / b for a, b in zip(rates["pipeline"], rates[name], strict=True)]
        row[f"ratio to {name}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def in_memory(workers: int, rounds: int) -> float:
    """Pictures a second of batches that are indexed out of an array."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    source = ArraySource("noise", images, np.zeros(len(images), int))
    batches = train_batches(
        source,
        batch_size=512,
        image_size=32,
        seed=0,
        crop_scale=None,
        crop_pct=1.0,
        num_workers=workers,
    )
    rates = []
    with closing(batches):
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for _ in islice(batches, 500):
                pass
            rates.append(500 * 512 / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def main() -> None:
    """Prints the tables; with --json writes the same to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()

    suffixes = (".jpg", ".jpeg", ".png")
    paths = [p for p in options.photos.resolve().rglob("*") if p.suffix.lower() in suffixes]
    if not paths:
        parser.error(f"{options.photos} holds no pictures ({', '.join(suffixes)})")
    sides = [PIL.Image.open(path).size for path in paths]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {
        "photos": len(paths),
        "median pixels": statistics.median(width * height for width, height in sides),
        "mean bytes": statistics.mean(path.stat().st_size for path in paths),
        "cores": cores,
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {version(name)}" for name in ("numpy", "pillow", "simplejpeg", "grain")
        ),
    }
    print(
        f"{len(paths)} photos, median {about['median pixels'] / 1000:.0f} thousand pixels, mean "
        f"{about['mean bytes'] / 1000:.0f} kB; {cores} CPU cores; to {options.size} px, pictures a "
        "second"
    )
    print(f"{about['versions']}\n")
    print("| workers | pipeline | Pillow, threads | ratio | Pillow, processes | ratio |")
    print("|---:|---:|---:|---:|---:|---:|")
    workers = [number for number in (1, 2, 4, 8, 16) if number <= cores]
    photos, memory = [], []
    for number in workers:
        row = compare(paths, options.size, number, options.rounds)
        photos.append(row)
        cells = [f"{number}", f"{row['pipeline']:.0f}"]
        for name in ("Pillow, threads", "Pillow, processes"):
            ratio, low, high = row[f"ratio to {name}"]
            cells += [f"{row[name]:.0f}", f"{ratio:.2f} ({low:.2f} .. {high:.2f})"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| threads | in memory, 32 px, 1/s |\n|---:|---:|")
    for number in workers:
        rate = in_memory(number, options.rounds)
        memory.append({"threads": number, "rate": rate})
        print(f"| {number} | {rate:,.0f} |", flush=True)
    if options.json:
        report = {**about, "size": options.size, "photos to crops": photos, "in memory": memory}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
