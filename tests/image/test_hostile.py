"""Files, settings and objects that are broken or made to harm: a result or one clear error."""

import csv
import json
import random
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax.errors import InputError
from convnext_jax.image import PRESETS, ConvNextImageProcessor

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def one_line(error: InputError) -> str:
    assert "\n" not in str(error)
    return str(error)


# Files --------------------------------------------------------------------------------------------

# Reads and preprocesses every file named on standard input; a line of JSON each.
READER = """
import json, resource, sys, time
from convnext_jax.errors import InputError
from convnext_jax.image import ConvNextImageProcessor, read_image

process = ConvNextImageProcessor(size=64)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in json.load(sys.stdin):
    start, before = time.perf_counter(), peak()
    try:
        pixels = process(read_image(path), input_data_format="channels_last").pixel_values
        out = list(pixels[0].shape)
    except InputError as error:
        out = str(error)
    seconds, after = time.perf_counter() - start, peak()
    print(json.dumps({"path": path, "out": out, "seconds": seconds, "grown": after - before}))
"""


def read_all(paths: list[Path]) -> list[dict]:
    """What became of each file, with seconds and megabytes of growth, in one other process."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == len(paths)
    return rows


@pytest.mark.skipif(not (DATA / "odd_images").exists(), reason=f"no pictures in {DATA}")
def test_odd_files_in_bounded_time_and_memory():
    folder = DATA / "odd_images"
    manifest = {row["file"]: row for row in csv.DictReader((folder / "manifest.csv").open())}
    for row in read_all([folder / name for name in manifest]):
        name = Path(row["path"]).name
        if manifest[name]["pillow13_load"] == "ok":
            assert row["out"] == [3, 64, 64], row
        else:
            assert row["out"].startswith(str(folder / name)), row
            assert "\n" not in row["out"]
        assert row["seconds"] < 30, row
        assert row["grown"] < 300, row


def png(path: Path, width: int, height: int, rows: int | None = None) -> Path:
    """A black PNG of one bit a pixel; with fewer rows than it promises if `rows` says so."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(line) for _ in range(height if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", pixels + packer.flush())
        + chunk(b"IEND", b"")
    )
    return path


def test_pictures_made_to_fill_the_memory(tmp_path):
    files = {
        # A few kilobytes that promise 40 gigapixels, and 900 megapixels that are really there.
        png(tmp_path / "promise.png", 200_000, 200_000, rows=1): "more than 89478485 pixels",
        png(tmp_path / "bomb.png", 30_000, 30_000): "more than 89478485 pixels",
        # Within the limit on pixels; the resized strip would be 73 times 20 million long.
        png(tmp_path / "strip.png", 20_000_000, 1): "every side must be from 1 to 1048576",
        png(tmp_path / "long.png", 1_000_000, 2): "every side must be from 1 to 1048576",
        # Unusual, and good.
        png(tmp_path / "thin.png", 12_000, 3): [3, 64, 64],
        png(tmp_path / "large.png", 6_000, 5_000): [3, 64, 64],
    }
    for row, expected in zip(read_all(list(files)), files.values(), strict=True):
        assert expected in row["out"] or expected == row["out"], row
        assert row["seconds"] < 60, row
        assert row["grown"] < 600, row


def test_stretching_a_long_strip_takes_little_memory():
    """A strip padded to a square would take 12 gigabytes."""
    strip = np.full((10, 64_000, 3), 128, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = ConvNextImageProcessor(size=384, resample=3)(strip).pixel_values[0]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert np.all(out == out[0, 0, 0])
    assert grown < 600 * 1024


# Objects ------------------------------------------------------------------------------------------


class Liar:
    """Says that it is an array."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no\nvalues")


class Cut(Image.Image):
    """A picture whose file turns out to be damaged when it is read."""

    def load(self):
        raise OSError("truncated")


HOSTILE = {
    "nothing": None,
    "a number": 3,
    "text": "photo.jpg",
    "bytes": b"\xff\xd8\xff",
    "a set": {1, 2},
    "a dict": {"image": 1},
    "a generator": (x for x in ()),
    "nested lists": [[[0, 1, 2]]],
    "an object that fails": Liar(),
    "a zero-dimensional array": np.array(3),
    "an empty array": np.zeros((0, 0, 3), np.uint8),
    "an empty batch": np.zeros((0, 9, 9, 3), np.uint8),
    "objects": np.full((9, 9, 3), None),
    "strings": np.full((9, 9, 3), "x"),
    "dates": np.zeros((9, 9, 3), "datetime64[s]"),
    "a structured array": np.zeros((9, 9, 3), [("r", "u1")]),
    "complex numbers": np.zeros((9, 9, 3), complex),
    "long doubles": np.zeros((9, 9, 3), np.longdouble),
    "not a number": np.full((9, 9, 3), np.nan),
    "infinity": np.full((9, 9, 3), np.inf, np.float32),
    "five channels": np.zeros((9, 9, 5), np.uint8),
    "a damaged file": Cut(),
    "no pixels": Image.new("RGB", (0, 5)),
    "a good and a bad one": [np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)],
    "too long": np.zeros((1, 2**20 + 1, 3), np.uint8),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:the values of the first picture")
def test_objects_that_are_no_pictures(name):
    with pytest.raises(InputError) as error:
        ConvNextImageProcessor(size=8)(HOSTILE[name])
    one_line(error.value)


def test_tracing_is_refused_clearly():
    run = ConvNextImageProcessor(size=8)
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(lambda image: run(image, return_tensors="jax"))(np.zeros((9, 9, 3), np.uint8))


def test_unusual_arrays_that_are_pictures():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    run = ConvNextImageProcessor(size=8)
    expected = run(image).pixel_values[0]
    read_only = image.copy()
    read_only.flags.writeable = False
    for same in (
        read_only,
        np.asfortranarray(image),
        image[::-1, ::-1][::-1, ::-1],
        np.repeat(image, 2, axis=1)[:, ::2],
        image.astype(">u2"),
        image.astype(">f4"),
        np.ma.masked_array(image),
    ):
        assert np.array_equal(run(same).pixel_values[0], expected)
    untouched = run(image.astype(">f8"), do_resize=False, return_tensors="jax").pixel_values
    assert untouched.shape == (1, 3, 20, 30)


# Settings -----------------------------------------------------------------------------------------

VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**400, 0.0, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), 1e-300, "", "224", "bicubic", "true", [], {}, [0.5], [1, 2, 3]),
    *([0.5] * 3, [0.0] * 3, [[0.5] * 3], [None] * 3, ["a"] * 3, [0.5, [0.5], 0.5], {"a": 1}),
    *({"shortest_edge": 8}, {"shortest_edge": 10**9}, {"shortest_edge": "8"}, {"height": 8}),
    *({"height": 8, "width": 8}, {"longest_edge": 8}, {"shortest_edge": None}, [8, 8]),
]
KEYS = [
    *("do_resize", "size", "crop_pct", "resample", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_convert_rgb", "image_processor_type", "crop_size", "self"),
    *("feature_extractor_type", "preprocess", "__class__", "__dict__", "data_format", "", "größe"),
]


def mutated(rng: random.Random) -> str:
    settings = {"size": 16, **PRESETS["imagenet_224"], "do_resize": True}
    settings["size"] = {"shortest_edge": rng.choice([8, 16, 24])}
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(KEYS)
        if rng.random() < 0.15:
            settings.pop(key, None)
        else:
            settings[key] = rng.choice(VALUES)
    text = json.dumps(settings)
    if rng.random() < 0.15:  # damage on the way
        position = rng.randrange(len(text))
        text = (
            text[:position] + rng.choice(["", "}", "[", "\x00", '"', text]) + text[position + 1 :]
        )
    return text


def test_a_thousand_mutated_files(tmp_path):
    """Each is read and used on a picture, or gives one line that names what is wrong."""
    rng = random.Random(0)
    image = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    path = tmp_path / "preprocessor_config.json"
    good = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1000):
            path.write_text(mutated(rng), encoding="utf-8")
            try:
                run = ConvNextImageProcessor.from_pretrained(tmp_path)
                pixels = run(image).pixel_values[0]
                assert pixels.ndim == 3
                run.to_json_string()
                good += 1
            except InputError as error:
                one_line(error)
                refused += 1
    # Neither everything nor nothing gets through.
    assert good > 250
    assert refused > 250
