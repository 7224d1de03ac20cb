"""Times the image processor against the original's, transformers 4.37.2, on the same photos.

    python benchmarks/processor.py --original PYTHON --photos FOLDER [--json FILE]

PYTHON is the interpreter of an environment that holds transformers 4.37.2 and Pillow; FOLDER holds
picture files, in folders or not. Each processor has a process of its own. Decoded RGB pictures go
in; `pixel_values` come out as one numpy array or, on an accelerator, as an array in its memory, so
that transfers are included on this side (and not on the original's, whose result stays in the
host's memory). The two take turns, so that a change in the load of the machine meets both; the
table holds medians over the rounds, in milliseconds a photo, and what the first pass compiled.

    one by one   a call for each photo, in the order of the files: a stream of many sizes
    list         one call with all photos
    PIL list     the same with `PIL.Image`s
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image

CASES = [
    {"size": size, "resample": resample, "calls": calls}
    for size in (224, 384)
    for resample in (2, 3)
    for calls in ("one by one", "list", "PIL list")
]
FILTERS = {2: "bilinear", 3: "bicubic"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
ROUNDS = 9


# One process a contender --------------------------------------------------------------------------


def serve(contender: str, folder: str) -> None:
    """Answers every case read from standard input with the seconds that one pass took."""
    photos = read(folder)
    compiled: list[float] = []
    if contender == "ours":
        import jax

        from convnext_jax.image import ConvNextImageProcessor

        device = jax.devices()[0]
        tensors = "np" if device.platform == "cpu" else "jax"
        about = {"device": device.device_kind, "versions": f"jax {jax.__version__}"}
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: (
                event.endswith("backend_compile_duration") and compiled.append(seconds)
            )
        )
    else:
        import transformers
        from transformers import ConvNextImageProcessor

        tensors = "np"
        about = {"versions": f"transformers {transformers.__version__}, numpy {np.__version__}"}
    about["versions"] += f", Pillow {PIL.__version__}, Python {platform.python_version()}"
    about |= {"photos": len(photos), "sizes": len({photo.size for photo in photos})}
    print(json.dumps(about), flush=True)

    arrays = [np.asarray(photo) for photo in photos]
    for line in sys.stdin:
        case = json.loads(line)
        process = ConvNextImageProcessor(
            size={"shortest_edge": case["size"]}, resample=case["resample"], **IMAGENET
        )
        pictures = photos if case["calls"] == "PIL list" else arrays
        compiled.clear()
        start = time.perf_counter()
        if case["calls"] == "one by one":
            results = [process(picture, return_tensors=tensors) for picture in pictures]
        else:
            results = [process(pictures, return_tensors=tensors)]
        if tensors == "jax":
            jax.block_until_ready([result["pixel_values"] for result in results])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "programs": len(compiled)}), flush=True)


def read(folder: str) -> list[PIL.Image.Image]:
    """All pictures below a folder, decoded to RGB."""
    photos = []
    for path in sorted(Path(folder).rglob("*.*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            with PIL.Image.open(path) as image:
                photos.append(image.convert("RGB"))
    return photos


# The process that asks them in turn ---------------------------------------------------------------


class Contender:
    """A process that serves cases."""

    def __init__(self, interpreter: str, name: str, folder: Path):
        self.process = subprocess.Popen(
            [*shlex.split(interpreter), __file__, "--serve", name, "--photos", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = json.loads(self.process.stdout.readline())

    def run(self, case: dict) -> dict:
        """One pass over all photos."""
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(case: dict, ours: Contender, original: Contender, rounds: int) -> dict:
    """Median milliseconds a photo of both, and what the first pass of ours had to compile."""
    first = ours.run(case)
    original.run(case)
    ours.run(case)
    times: dict[str, list[float]] = {"ours": [], "original": []}
    for _ in range(rounds):
        for name, contender in (("ours", ours), ("original", original)):
            seconds = contender.run(case)["seconds"]
            times[name].append(1000 * seconds / contender.about["photos"])
    medians = {name: statistics.median(each) for name, each in times.items()}
    ratios = [b / a for a, b in zip(times["ours"], times["original"], strict=True)]
    return {
        **case,
        "ours ms": medians["ours"],
        "original ms": medians["original"],
        "ratio": medians["original"] / medians["ours"],
        "worst ratio": min(ratios),
        "best ratio": max(ratios),
        "first pass s": first["seconds"],
        "programs": first["programs"],
    }


def main() -> None:
    """Prints the table; with --json writes the same to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", help="interpreter of the environment of transformers 4.37.2")
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.photos)
        return

    original = Contender(options.original, "original", options.photos)
    ours = Contender(shlex.quote(sys.executable), "ours", options.photos)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{ours.about['photos']} photos of {ours.about['sizes']} sizes; {cores} CPU cores")
    print(f"ours: {ours.about['device']}, {ours.about['versions']}")
    print(f"original: {original.about['versions']}\n")
    print("| size | filter | calls | ours, ms | original, ms | ratio (rounds) | first pass |")
    print("|---|---|---|---:|---:|---:|---:|")
    rows = []
    for case in CASES:
        row = compare(case, ours, original, options.rounds)
        rows.append(row)
        print(
            f"| {row['size']} | {FILTERS[row['resample']]} | {row['calls']} | {row['ours ms']:.2f} "
            f"| {row['original ms']:.2f} | {row['ratio']:.1f} "
            f"({row['worst ratio']:.1f} .. {row['best ratio']:.1f}) "
            f"| {row['programs']} programs, {row['first pass s']:.1f} s |",
            flush=True,
        )
    if options.json:
        report = {"ours": ours.about, "original": original.about, "cores": cores, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
