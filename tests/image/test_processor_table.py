"""The processor against the original, row by row, and the table of docs/image_processor.md.

The fixtures hold what transformers 4.37.2 made of the same pictures (`make_fixtures.py`). The rows
of the table are what is found here; after a change of the cases, write them with

    CONVNEXT_JAX_WRITE_TABLE=1 python -m pytest tests/image/test_processor_table.py -k table
"""

import functools
import hashlib
import importlib.util
import io
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from convnext_jax.errors import InputError
from convnext_jax.image import ConvNextImageProcessor

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FIXTURES = ROOT / "tests" / "fixtures" / "processor"
PAGE = ROOT / "docs" / "image_processor.md"
MARKS = "<!-- table: begin -->\n", "<!-- table: end -->\n"

spec = importlib.util.spec_from_file_location("processor_cases", FIXTURES / "cases.py")
cases = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cases
spec.loader.exec_module(cases)

ORIGINAL = json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))
# Settings that are all wrong, so that a call has to replace every one of them.
CONTRARY = {
    "do_resize": False,
    "size": 50,
    "crop_pct": 0.7,
    "resample": 1,
    "do_rescale": False,
    "rescale_factor": 0.01,
    "do_normalize": False,
    "image_mean": 0.3,
    "image_std": 0.4,
}
DEFAULTS = {
    "do_resize": True,
    "size": 384,
    "crop_pct": 224 / 256,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

pytestmark = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="the fixtures were made with Pillow 13"
)


def ours(case, **settings) -> str:
    """The hash of the result, or the name of the error."""
    settings = settings or {"options": case.options, "call": case.call}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the values of the first picture lie in")
            process = ConvNextImageProcessor(**settings["options"])
            values = process(case.picture(), **settings["call"]).pixel_values
    except InputError as error:
        return "InputError" if "\n" not in str(error) else "an error of several lines"
    return cases.digest([np.asarray(value) for value in values])


@functools.cache
def outcome(number: int) -> str:
    """What the table says of a case: yes, that both refuse it, or the difference."""
    case = cases.CASES[number]
    original = ORIGINAL[f"{case.group}: {case.label}"]
    given = ours(case)
    in_the_call = ours(case, options=CONTRARY, call={**DEFAULTS, **case.options, **case.call})
    assert given == in_the_call, "the call's arguments do not replace those of the constructor"
    if original == "ValueError" and given == "InputError":
        return "yes: both refuse it with a ValueError"
    if original == given:
        return "yes"
    return f"no: {case.difference}"


def available(case) -> bool:
    return case.needs is None or importlib.util.find_spec(case.needs) is not None


@pytest.mark.parametrize("number", range(len(cases.CASES)), ids=lambda n: cases.CASES[n].label)
def test_equal_to_the_original_or_a_documented_difference(number):
    case = cases.CASES[number]
    if not available(case):
        pytest.skip(f"no {case.needs}")
    equal = outcome(number).startswith("yes")
    assert equal == (case.difference is None), outcome(number)
    if case.difference:  # what it says of the original's errors
        original = ORIGINAL[f"{case.group}: {case.label}"]
        fails = "refuses" if original == "ValueError" else original
        assert (fails in case.difference) == original.endswith("Error")


def test_the_table_of_the_documentation():
    rows, group = [], None
    for number, case in enumerate(cases.CASES):
        if case.group != group:
            group = case.group
            rows += ["", f"**{group}**", "", "| given | equal to the original |", "|---|---|"]
        # Where a framework is not installed, what the test above expects of it.
        says = outcome(number) if available(case) else "yes"
        rows.append(f"| {case.label} | {says} |")
    table = "\n".join(rows[1:]) + "\n"
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    committed, after = rest.split(MARKS[1])
    if os.environ.get("CONVNEXT_JAX_WRITE_TABLE"):
        PAGE.write_text(before + MARKS[0] + table + MARKS[1] + after, encoding="utf-8")
    else:
        assert committed == table, "the table is out of date: see the head of this module"


def test_every_case_has_its_fixture():
    assert {f"{case.group}: {case.label}" for case in cases.CASES} == set(ORIGINAL)


# Photos -------------------------------------------------------------------------------------------


def sample_photos() -> Iterator[tuple[str, Image.Image]]:
    for path in sorted((DATA / "sample_photos").glob("*.*g")):
        yield path.name, Image.open(path)
    path = DATA / "coco_39769" / "000000039769.png"
    if path.exists():
        yield path.name, Image.open(path)


def zipped(path: Path) -> Iterator[tuple[str, Image.Image]]:
    if path.exists():
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.lower().endswith("jpeg"):
                    yield name, Image.open(io.BytesIO(archive.read(name)))


def photo_fixtures() -> dict:
    return json.loads((FIXTURES / "photos.json").read_text(encoding="utf-8"))


def check_photos(photos, labels) -> int:
    expected = photo_fixtures()["photos"]
    count = 0
    for name, image in photos:
        for label in labels:
            process = ConvNextImageProcessor(**cases.PHOTO_OPTIONS[label])
            values = process(image).pixel_values
            assert cases.digest(values) == expected[Path(name).name][label], (name, label)
        count += 1
    return count


@pytest.mark.skipif(not DATA.exists(), reason=f"no photos in {DATA}")
def test_the_sample_photos():
    assert check_photos(sample_photos(), ["224, bicubic, ImageNet"]) > 5


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"no photos in {DATA}")
def test_every_photo_with_both_rules_and_filters():
    archive = DATA / "imagenet_sample_dev" / "images.zip"
    count = check_photos(sample_photos(), cases.PHOTO_OPTIONS)
    count += check_photos(zipped(archive), cases.PHOTO_OPTIONS)
    assert count == len(photo_fixtures()["photos"])


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"no photos in {DATA}")
@pytest.mark.parametrize("data_set", cases.SMALL_OPTIONS)
def test_every_picture_of_a_data_set(data_set):
    """11 thousand photos, 50 thousand small ones and 70 thousand grey pictures."""
    process = ConvNextImageProcessor(**cases.SMALL_OPTIONS[data_set])
    found = cases.small_hashes(data_set, DATA, process)
    assert found == photo_fixtures()[data_set]


def test_a_hash_sees_one_rounding():
    """The comparison would notice the last bit of one value."""
    values = np.zeros((3, 4, 4), np.float32)
    other = values.copy()
    other[2, 3, 3] = np.nextafter(np.float32(0), np.float32(1))
    assert cases.digest([values]) != cases.digest([other])
    assert cases.digest([values]) != cases.digest([values.astype(np.float64)])
    assert len(cases.digest([values])) == hashlib.sha256().digest_size * 2
