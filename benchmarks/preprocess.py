"""Times the training pipeline on photos against plain Pillow, with the same number of threads.

    python benchmarks/preprocess.py --photos FOLDER [--size 224] [--json FILE]

FOLDER holds picture files, in folders or not. Both sides read them from disk, in random order, draw
the recipe's random resized crop and end with a uint8 array of SIZE x SIZE pixels a picture:

    pipeline   `train_batches`: batches of 64, made by grain's threads
    Pillow     open, convert to RGB, crop, resize (bicubic), array, in a thread pool

The two take turns, so that a change in the load of the machine meets both; the table holds medians
over the rounds, in pictures a second, and the median, lowest and highest ratio of a round.

Then pictures in memory: batches of 512 out of 50,000 of 32 x 32, as they are, in pictures a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image

from convnext_jax.data.pipeline import train_batches
from convnext_jax.data.sources import ArraySource, FolderSource
from convnext_jax.image import CROP_DRAWS, sample_crop

BATCH_SIZE = 64
BATCHES = 10  # a round, of each side
ROUNDS = 9


def pillow_crop(path: Path, draws: list, size: int) -> np.ndarray:
    """What a plain data loader does for one picture."""
    with PIL.Image.open(path) as file:
        image = file.convert("RGB")
    top, left, height, width = sample_crop(draws, image.height, image.width)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), PIL.Image.Resampling.BICUBIC))


def compare(paths: list[Path], size: int, threads: int, rounds: int) -> dict:
    """Pictures a second of both sides."""
    rng = np.random.default_rng(0)
    source = FolderSource(Path("/"), [str(p)[1:] for p in paths], np.zeros(len(paths), int))
    arguments = {"batch_size": BATCH_SIZE, "image_size": size, "seed": 0, "num_threads": threads}
    number = BATCH_SIZE * BATCHES * max(threads // 2, 1)

    def pipeline() -> float:
        before = set(threading.enumerate())
        with closing(train_batches(source, **arguments)) as batches:
            for _ in islice(batches, threads + 2):  # from now on, what is taken is what is made
                pass
            start = time.perf_counter()
            for _ in islice(batches, number // BATCH_SIZE):
                pass
            seconds = time.perf_counter() - start
        # Closing lets the batches under way be finished: not while the other side runs.
        for thread in set(threading.enumerate()) - before:
            thread.join()
        return seconds

    def pillow() -> float:
        order = rng.integers(len(paths), size=number)
        draws = rng.random((number, *CROP_DRAWS)).tolist()
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(lambda i, d: pillow_crop(paths[i], d, size), order, draws))
            return time.perf_counter() - start

    rates: dict[str, list[float]] = {"pipeline": [], "pillow": []}
    for round_number in range(rounds + 1):
        for name, side in (("pipeline", pipeline), ("pillow", pillow)):
            seconds = side()
            if round_number:  # the first makes tables of weights and fills the system's cache
                rates[name].append(number / seconds)
    ratios = [a / b for a, b in zip(rates["pipeline"], rates["pillow"], strict=True)]
    return {
        "threads": threads,
        "pipeline": statistics.median(rates["pipeline"]),
        "pillow": statistics.median(rates["pillow"]),
        "ratio": statistics.median(ratios),
        "worst ratio": min(ratios),
        "best ratio": max(ratios),
    }


def in_memory(threads: int, rounds: int) -> float:
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
        num_threads=threads,
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
        f"{about['mean bytes'] / 1000:.0f} kB; {cores} CPU cores"
    )
    print(f"{about['versions']}\n")
    print(f"| threads | pipeline to {options.size} px, 1/s | Pillow, 1/s | ratio (rounds) |")
    print("|---:|---:|---:|---:|")
    threads = [number for number in (1, 2, 8, 16) if number <= cores]
    photos, memory = [], []
    for number in threads:
        row = compare(paths, options.size, number, options.rounds)
        photos.append(row)
        print(
            f"| {number} | {row['pipeline']:.0f} | {row['pillow']:.0f} | {row['ratio']:.2f} "
            f"({row['worst ratio']:.2f} .. {row['best ratio']:.2f}) |",
            flush=True,
        )
    print("\n| threads | in memory, 32 px, 1/s |\n|---:|---:|")
    for number in threads:
        rate = in_memory(number, options.rounds)
        memory.append({"threads": number, "rate": rate})
        print(f"| {number} | {rate:,.0f} |", flush=True)
    if options.json:
        report = {**about, "size": options.size, "photos to crops": photos, "in memory": memory}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
