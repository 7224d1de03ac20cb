"""Resizing against Pillow itself, pixel by pixel."""

import io
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image

from convnext_jax.errors import InputError
from convnext_jax.image import apply_plan, pack, plan_resize, resize
from convnext_jax.image import resample as resampling

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

# 13.0 is the first release that takes the height first when that shrinks most.
pytestmark = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="compares with Pillow 13"
)

apply_on_cpu = jax.jit(resampling._by_gather)
apply_as_products = jax.jit(resampling._by_product)


def pillow(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], resample))


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise, or black and white alone, which drives the filters into clipping."""
    if rng.integers(2):
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    return rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)


def differing(image: np.ndarray, size: tuple[int, int], resample: int, form=apply_plan) -> int:
    """Pixels that differ from Pillow's. The result is padded to 400 x 400: one program for all."""
    assert max(size) <= 400
    plan = plan_resize(image.shape[:2], size, resample, crop=(0, 0, 400, 400))
    batch, plans = pack([image], [plan])
    out = np.asarray(form(batch[0], jax.tree.map(lambda x: x[0], plans)))
    inside = out[: size[0], : size[1]]
    assert not out[size[0] :].any()
    assert not out[:, size[1] :].any()
    return int(np.any(inside != pillow(image, size, resample), axis=-1).sum())


def random_sizes(rng: np.random.Generator, cases: int, longest: int) -> np.ndarray:
    """Log-uniform (height, width, new height, new width), so that extremes are as frequent."""
    sizes = np.exp(rng.uniform(0, np.log(longest + 1), (cases, 4))).astype(int)
    return np.minimum(sizes, [longest, longest, 400, 400])


def count_differing(seed: int, cases: int, longest: int, form=apply_plan) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    wrong = dict.fromkeys(FILTERS, 0)
    for height, width, *size in random_sizes(rng, cases, longest).tolist():
        image = random_image(rng, height, width)
        for name, resample in FILTERS.items():
            wrong[name] += differing(image, tuple(size), resample, form)
    return wrong


NONE_WRONG = dict.fromkeys(FILTERS, 0)


def test_no_pixel_differs_from_pillow():
    assert count_differing(seed=0, cases=25, longest=250) == NONE_WRONG


@pytest.mark.slow
def test_no_pixel_differs_from_pillow_in_900_cases():
    assert count_differing(seed=1, cases=150, longest=700) == NONE_WRONG


def test_no_pixel_differs_in_the_matrix_form():
    # The form of accelerators, run here on whatever device there is.
    assert count_differing(seed=2, cases=6, longest=120, form=apply_as_products) == NONE_WRONG


def test_both_forms_lower_for_every_platform():
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    plan = pack([np.zeros((64, 64, 3), np.uint8)] * 2, [plan_resize((64, 64), (32, 48))] * 2)[1]
    exported = jax.export.export(apply_plan, platforms=("cpu", "cuda", "tpu"))(images, plan)
    assert exported.out_avals[0].shape == (2, 32, 48, 3)


@pytest.mark.parametrize("resample", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 1), (7, 5)),
        ((1, 300), (3, 20)),
        ((300, 1), (20, 3)),
        ((399, 2), (1, 400)),
        ((2, 399), (400, 1)),
        ((255, 255), (254, 256)),
        ((37, 51), (37, 20)),  # the pass along the height is not needed
        ((37, 51), (12, 51)),  # nor here the one along the width
        ((37, 51), (37, 51)),
        ((100, 60), (40, 60)),
        ((100, 60), (40, 31)),  # 60 rows less, 29 columns less: the height comes first
        ((100, 60), (40, 30)),  # 60 and 30: it does not
    ],
)
def test_extreme_sizes(before, after, resample):
    image = random_image(np.random.default_rng(3), *before)
    assert differing(image, after, resample) == 0


@pytest.mark.slow
@pytest.mark.parametrize("resample", FILTERS.values(), ids=FILTERS)
def test_big_downscale(resample):
    image = random_image(np.random.default_rng(4), 3000, 4000)
    assert differing(image, (9, 16), resample) == 0  # up to 2000 taps a pixel


def test_pixel_values_by_hand():
    # Two pixels, 0 and 255, to four: bilinear weights 0, 1/4, 3/4, 1 give 63.75 and 191.25.
    image = np.array([0, 255], np.uint8)[None, :, None]
    assert np.asarray(resize(image, (1, 4), 2)).ravel().tolist() == [0, 64, 191, 255]
    # The mean of 1 and 2 is rounded up; so is that of its rows.
    image = np.array([[1, 2], [2, 2]], np.uint8)[:, :, None]
    assert np.asarray(resize(image, (1, 1), 4)).item() == 2


def test_the_sum_is_rounded_between_the_passes():
    # 0.5 becomes 1 after the first pass, and the mean of 1 and 0 becomes 1; 0.25 would become 0.
    image = np.array([[1, 0], [0, 0]], np.uint8)[:, :, None]
    assert np.asarray(resize(image, (1, 1), 4)).item() == 1


@pytest.mark.parametrize("resample", range(1, 6), ids=sorted(FILTERS, key=FILTERS.get)[1:])
@pytest.mark.parametrize(("before", "after"), [(23, 7), (7, 23), (200, 30)])
def test_weights_to_nine_digits(before, after, resample):
    # 8-bit pixels hide an error in the seventh digit. Pillow resizes 32-bit integers with the same
    # weights, unrounded; so one pixel of 2**30 a row shows every weight.
    impulses = np.diag(np.full(before, 2**30, np.int32))
    theirs = np.asarray(Image.fromarray(impulses).resize((after, before), resample)).T
    start, weights = resampling._filter_weights(
        before, after, np.arange(after), *resampling._FILTERS[resample]
    )
    ours = np.zeros((after, before))
    for row, first, w in zip(ours, start, weights, strict=True):
        row[first : first + len(w)] = w[: before - first]
    np.testing.assert_allclose(ours * 2**30, theirs, rtol=0, atol=0.501)


def test_nearest_accumulates_its_coordinate():
    # For these sizes (i + 0.5) * scale names another pixel than the accumulated coordinate.
    before, after = 90, 25
    closed = ((np.arange(after) + 0.5) * (before / after)).astype(int)
    start = plan_resize((before, 1), (after, 1), 0).rows.start
    expected = pillow(np.arange(before, dtype=np.uint8)[:, None], (after, 1), 0).ravel()
    assert start.tolist() == expected.tolist()
    assert start.tolist() != closed.tolist()


def test_leading_axes_and_jit():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (2, 3, 20, 31, 4), np.uint8)
    out = jax.jit(resize, static_argnums=(1, 2))(jnp.asarray(images), (13, 40), 3)
    assert out.shape == (2, 3, 13, 40, 4)
    assert out.dtype == jnp.uint8
    for i in range(2):
        for j in range(3):
            # Four channels of their own; Pillow would take them for RGB and transparency.
            for c in range(4):
                expected = pillow(images[i, j, :, :, c], (13, 40), 3)
                assert np.array_equal(out[i, j, :, :, c], expected)


def test_a_batch_of_many_sizes_in_one_program():
    rng = np.random.default_rng(6)
    # The last two are resized along the height first.
    sizes = [(30, 200), (240, 240), (100, 90), (255, 40), (250, 200)]
    images = [random_image(rng, *size) for size in sizes]
    plans = [
        plan_resize(size, (50, 180), r) for size, r in zip(sizes, (3, 1, 2, 5, 3), strict=True)
    ]
    assert [bool(plan.rows_first) for plan in plans] == [False, True, True, True, True]
    packed = pack(images, plans)
    assert packed[0].shape == (5, 256, 256, 3)
    for form in (apply_plan, jax.jit(jax.vmap(apply_plan)), jax.vmap(apply_as_products)):
        out = np.asarray(form(*packed))
        for image, r, result in zip(images, (3, 1, 2, 5, 3), out, strict=True):
            assert np.array_equal(result, pillow(image, (50, 180), r))


def test_a_crop_is_a_crop_of_the_resized_picture():
    image = random_image(np.random.default_rng(7), 300, 211)
    whole = np.pad(pillow(image, (90, 64), 3), ((0, 20), (3, 10), (0, 0)))
    plan = plan_resize((300, 211), (90, 64), 3, crop=(10, -3, 100, 77))
    assert np.array_equal(apply_plan(image, plan), whole[10:110])
    # Only what the crop needs is packed: 5 * 300 / 90 rows and a few more.
    small = plan_resize((300, 211), (90, 64), 3, crop=(20, 30, 5, 5))
    assert pack([image], [small])[0].shape == (1, 64, 64, 3)


def test_few_shapes_for_many_sizes():
    rng = np.random.default_rng(8)
    shapes = set()
    for height, width in rng.integers(200, 1000, (200, 2)).tolist():
        image = np.zeros((height, width, 3), np.uint8)
        packed, plan = pack([image], [plan_resize((height, width), (384, 384), 3)])
        shapes.add((packed.shape, plan.rows.weights.shape, plan.columns.weights.shape))
    # Sides from 256 to 1024 and 8 or 32 taps.
    assert len(shapes) <= 9


@pytest.mark.parametrize("resample", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency(mode, resample):
    image = np.random.default_rng(9).integers(0, 256, (40, 33, len(mode)), np.uint8)
    image[:20, :, -1] = np.where(image[:20, :, -1] < 128, 0, 255)
    out = jnp.asarray(image)
    if resample:
        out = resampling.premultiply_alpha(out)
    out = resize(out, (25, 60), resample)
    if resample:
        out = resampling.unpremultiply_alpha(out)
    assert np.array_equal(out, pillow(image, (25, 60), resample))


def photos() -> list[np.ndarray]:
    """Real photos, grey ones as grey, at most 1000 pixels a side."""
    files = [p.read_bytes() for p in sorted((DATA / "sample_photos").glob("*.*g"))]
    archive = DATA / "imagenet_sample_dev" / "images.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as z:
            files += [z.read(name) for name in z.namelist() if name.lower().endswith("jpeg")]
    images = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    return [np.atleast_3d(x) for x in images if x.ndim == 2 or x.shape[2] == 3]


def check_photo(image: np.ndarray, resample: int) -> None:
    short = min(image.shape[:2])
    for size in [
        tuple(int(256 * side / short) for side in image.shape[:2]),
        (384, 384),
    ]:
        out = pack([image], [plan_resize(image.shape[:2], size, resample)])
        expected = pillow(image.squeeze(), size, resample).reshape(*size, -1)
        assert np.array_equal(apply_plan(*out)[0], expected)


@pytest.mark.skipif(not DATA.exists(), reason=f"no photos in {DATA}")
def test_a_few_photos():
    for image in photos()[:2]:
        check_photo(image, 3)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"no photos in {DATA}")
@pytest.mark.parametrize("resample", FILTERS.values(), ids=FILTERS)
def test_photos(resample):
    images = photos()
    assert len(images) > 50
    for image in images:
        check_photo(image, resample)


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "resample", "message"),
    [
        ((4, 4, 3), np.float32, (2, 2), 3, "float32: convert them first"),
        ((4, 4), np.uint8, (2, 2), 3, r"got shape \(4, 4\)"),
        ((4, 4, 3), np.uint8, (0, 2), 3, "every side must be from 1 to 1048576 pixels"),
        ((4, 4, 3), np.uint8, (2, 2), 6, "unknown resampling filter 6"),
    ],
)
def test_errors(shape, dtype, size, resample, message):
    with pytest.raises(InputError, match=message) as caught:
        resize(np.zeros(shape, dtype), size, resample)
    assert "\n" not in str(caught.value)
