"""From a checkpoint's folder and a picture to logits, as published.

The whole path (processor and model from one folder, the picture, the logits) runs on a small
network of the same layout, against the logits that transformers 4.37.2 computed with it
(`fixtures/transformers_4_37_2/published`).

The published checkpoints themselves are only looked at when asked for:

    CONVNEXT_JAX_PUBLISHED=cached pytest -m slow tests/test_published_logits.py
    CONVNEXT_JAX_PUBLISHED=download pytest -m slow tests/test_published_logits.py

The first takes those in the local cache of huggingface_hub and skips the rest; the second fetches
them (up to 2.6 GB each). Both need the picture 000000039769 of COCO val2017, under
`../shared/data/coco_39769` or where the environment variable CONVNEXT_JAX_COCO_39769 says.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from convnext_jax import ConvNextForImageClassification, ConvNextImageProcessor, InputError

PUBLISHED = Path(__file__).parent / "fixtures" / "transformers_4_37_2" / "published"
SHARED = Path(__file__).parents[2] / "shared" / "data"
COCO = Path(os.environ.get("CONVNEXT_JAX_COCO_39769", SHARED / "coco_39769" / "000000039769.png"))
SLICES = SHARED / "reference_logits" / "hf_expected_slices.json"


def picture_of(name: str) -> PIL.Image.Image:
    if name == "coco_39769":
        if not COCO.is_file():
            pytest.skip(f"the COCO picture is not at {COCO}")
        return PIL.Image.open(COCO)
    # Slow waves of colour, as in the fixtures' script: what a resize keeps.
    y, x = np.mgrid[0:480, 0:640]
    waves = [np.sin(x / 37 + y / 91), np.sin(x / 53 - y / 29), np.sin((x + y) / 71)]
    return PIL.Image.fromarray(np.uint8(np.round(127.5 + 120 * np.stack(waves, -1))))


# ----------------------------------------------------------------------------- the path, here


@pytest.fixture(scope="module")
def folder():
    processor = ConvNextImageProcessor.from_pretrained(PUBLISHED)
    model, variables = ConvNextForImageClassification.from_pretrained(
        PUBLISHED, implementation="plain"
    )
    return processor, model, jax.jit(lambda x: model.apply(variables, x).logits)


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("name", ["synthetic", "coco_39769"])
def test_from_a_folder_to_logits(name, size, folder):
    """Both size rules; the settings of preprocessing come from the folder."""
    processor, model, logits_of = folder
    picture = picture_of(name)
    pixels = processor(picture, size={"shortest_edge": size}, return_tensors="np")["pixel_values"]
    logits = logits_of(pixels)
    assert logits.shape == (1, 1000)
    with np.load(PUBLISHED / "expected.npz") as file:
        expected = file[f"{name}_{size}"]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=5e-6 * np.abs(expected).max())
    np.testing.assert_allclose(logits[0, :3], expected[:3], rtol=0, atol=1e-4)
    assert model.config.id2label[int(logits[0].argmax())] == f"class {expected.argmax()}"


def test_the_picture_and_its_preprocessing_matter(folder):
    """What the bounds above would see: another filter, another crop, another mean."""
    processor, _, logits_of = folder
    picture = picture_of("synthetic")
    with np.load(PUBLISHED / "expected.npz") as file:
        expected = file["synthetic_224"]
    for change in (
        {"resample": 2},
        {"crop_pct": 1.0},
        {"image_mean": 0.5},
        {"rescale_factor": 1 / 256},
    ):
        pixels = processor(picture, return_tensors="np", **change)["pixel_values"]
        assert np.abs(logits_of(pixels)[0] - expected).max() > 1e-3, change


# ---------------------------------------------------------------------- the published checkpoints


def hub_name(file: str) -> str:
    """The hub's name of a file of the original repositories."""
    version, size, data, side = re.fullmatch(
        r"convnext(v2|)_([a-z]+)_(22k_1k|22k|1k)_(\d+)(?:_ema)?", file
    ).groups()
    if version:  # all of V2's are fine-tuned on ImageNet-1k
        return f"facebook/convnextv2-{size}-{data}-{side}"
    return f"facebook/convnext-{size}-{side}" + ("" if data == "1k" else f"-{data}").replace(
        "_", "-"
    )


# The original's integration test in version 4.37.2, whose resize is Pillow's like ours.
INTEGRATION = {"facebook/convnext-tiny-224": [-0.0260, -0.4739, 0.1911]}
# Those of the current version come from torchvision's resize. Where both are published, they are
# 1.0e-3 apart.
CURRENT = ["facebook/convnext-tiny-224", "facebook/convnextv2-tiny-1k-224"]
# Every checkpoint with a published slice, the file of its weights under the original's name.
CHECKPOINTS = [
    "convnext_tiny_1k_224_ema", "convnext_small_1k_224_ema", "convnext_base_1k_224_ema",
    "convnext_base_1k_384", "convnext_large_1k_224_ema", "convnext_large_1k_384",
    "convnext_base_22k_224", "convnext_large_22k_224", "convnext_xlarge_22k_224",
    "convnext_base_22k_1k_224", "convnext_base_22k_1k_384", "convnext_large_22k_1k_224",
    "convnext_large_22k_1k_384", "convnext_xlarge_22k_1k_224_ema", "convnext_xlarge_22k_1k_384_ema",
    "convnextv2_atto_1k_224_ema", "convnextv2_femto_1k_224_ema", "convnextv2_pico_1k_224_ema",
    "convnextv2_nano_1k_224_ema", "convnextv2_tiny_1k_224_ema", "convnextv2_base_1k_224_ema",
    "convnextv2_large_1k_224_ema", "convnextv2_huge_1k_224_ema", "convnextv2_nano_22k_224_ema",
    "convnextv2_nano_22k_384_ema", "convnextv2_tiny_22k_224_ema", "convnextv2_tiny_22k_384_ema",
    "convnextv2_base_22k_224_ema", "convnextv2_base_22k_384_ema", "convnextv2_large_22k_224_ema",
    "convnextv2_large_22k_384_ema", "convnextv2_huge_22k_384_ema", "convnextv2_huge_22k_512_ema",
]  # fmt: skip


def slices() -> dict[str, dict[str, list[float]]]:
    if not SLICES.is_file():
        pytest.skip(f"the published slices are not at {SLICES}")
    return json.loads(SLICES.read_text())


def load(name: str):
    """Processor, model and variables, from the cache or the hub as the environment says."""
    mode = os.environ.get("CONVNEXT_JAX_PUBLISHED", "")
    if mode not in ("cached", "download"):
        pytest.skip("set CONVNEXT_JAX_PUBLISHED to cached or download")
    try:
        processor = ConvNextImageProcessor.from_pretrained(name, local_files_only=mode == "cached")
        model, variables = ConvNextForImageClassification.from_pretrained(
            name, local_files_only=mode == "cached"
        )
    except InputError as error:
        if mode == "cached" and "could not be had from the hub" in str(error):
            pytest.skip(f"{name} is not in the cache")
        raise
    return processor, model, variables


def test_no_published_checkpoint_is_left_out():
    published = slices()
    assert [*published["v1_convert_jpg"], *published["v2_convert_jpg"]] == CHECKPOINTS
    named = {hub_name(file) for file in CHECKPOINTS}
    assert len(named) == len(CHECKPOINTS)
    assert list(published["tests_png"]) == CURRENT
    assert named >= set(CURRENT) | set(INTEGRATION)


def logits_of_the_picture(name: str):
    processor, model, variables = load(name)
    pixels = processor(picture_of("coco_39769"), return_tensors="np")["pixel_values"]
    with jax.default_matmul_precision("highest"):
        return model, jax.jit(lambda v, x: model.apply(v, x).logits)(variables, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTEGRATION)
def test_published_logits(name):
    """The original's integration test: its processor, its picture, its bound."""
    model, logits = logits_of_the_picture(name)
    assert logits.shape == (1, 1000)
    np.testing.assert_allclose(logits[0, :3], INTEGRATION[name], rtol=0, atol=1e-4)
    assert model.config.id2label[int(logits[0].argmax())] == "tabby, tabby cat"


@pytest.mark.slow
@pytest.mark.parametrize("name", CURRENT)
def test_current_logits(name):
    """The integration tests of transformers 5, but for the difference in the resize."""
    expected = slices()["tests_png"][name]
    _, logits = logits_of_the_picture(name)
    np.testing.assert_allclose(logits[0, :3], expected, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("file", CHECKPOINTS)
def test_published_slices(file):
    """The slices in the original's conversion scripts, within their bound of 1e-3.

    A comment there says "without center cropping", which no version of the processor does below
    384 and which leaves two ways to do it: stretch to the square, or resize the shorter side and
    keep all. One of the two must give all values.
    """
    published = slices()
    expected = (published["v1_convert_jpg"] | published["v2_convert_jpg"])[file]
    processor, model, variables = load(hub_name(file))
    picture = picture_of("coco_39769").convert("RGB")
    side = int(re.search(r"_(\d+)(_ema)?$", file).group(1))
    ways = {"stretched": (side, side)}
    if side < 384:
        short = min(picture.size)
        ways["whole"] = tuple(length * side // short for length in picture.size)
    seen = {}
    with jax.default_matmul_precision("highest"):
        for way, size in ways.items():
            pixels = processor(
                picture.resize(size, processor.resample), do_resize=False, return_tensors="np"
            )["pixel_values"]
            logits = jax.jit(lambda v, x: model.apply(v, x).logits)(variables, pixels)
            seen[way] = np.asarray(logits[0, : len(expected)])
    errors = {way: float(np.abs(values - expected).max()) for way, values in seen.items()}
    assert min(errors.values()) <= 1e-3, f"expected {expected}, have {seen}"
