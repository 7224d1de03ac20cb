"""Fast reading of photos: Pillow's pixels, `read_image`'s errors, whatever the file is."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from convnext_jax.data import photo
from convnext_jax.errors import InputError
from convnext_jax.image import read_image

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and noise on top, as a photo has them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 12, (height, width, 3))
    noisy[height // 3 : height // 2, width // 4 : width // 3] = (255, 0, 0)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def by_pillow(image: np.ndarray, box: photo.Box, size: int, resample: int = 3) -> np.ndarray:
    top, left, height, width = box
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    return np.asarray(crop.resize((size, size), resample))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """As promised: off by 1 in at most one value in a thousand."""
    difference = np.abs(actual.astype(int) - expected)
    assert actual.shape == expected.shape
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= difference.size // 1000 + 3  # few are few by chance


def result(call: Callable[[], np.ndarray]) -> np.ndarray | str:
    """What a call gives, or the error's text."""
    try:
        return call()
    except InputError as error:
        return str(error)


def assert_same(actual: np.ndarray | str, expected: np.ndarray | str) -> None:
    assert type(actual) is type(expected), (actual, expected)
    assert np.array_equal(actual, expected)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_image(path: object) -> None:
        raise AssertionError(f"{path} was left to read_image")

    monkeypatch.setattr(photo, "read_image", read_image)


ORDINARY = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "restart markers": {"restart_marker_blocks": 5},
    "restart rows": {"restart_marker_rows": 1, "subsampling": 0},
    "optimized": {"optimize": True, "quality": 40},
    "progressive": {"progressive": True},
    "not YCbCr": {"keep_rgb": True, "subsampling": 0},
}


# --- ordinary JPEG files ---


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_jpegs_have_pillows_pixels(tmp_path: Path, kind: str, mode: str):
    """The two libjpeg-turbos agree; a release of either that does not must not go unnoticed."""
    for height, width in ((97, 131), (64, 48), (1, 1)):
        path = tmp_path / f"{height}.jpg"
        picture(height, width).convert(mode).save(path, **ORDINARY[kind])
        expected = read_image(path)
        assert np.array_equal(photo.read_photo(path), expected)
        assert np.array_equal(photo.decode_photo(path.read_bytes(), "it"), expected)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("kind", ORDINARY)
def test_decoding_stops_below_the_crop(tmp_path: Path, kind: str):
    path = tmp_path / "it.jpg"
    picture(200, 150).save(path, **ORDINARY[kind])
    expected = read_image(path)
    # Where nothing is resized, every pixel is the decoder's own: also in the last rows it decodes.
    for top in (0, 7, 8, 15, 30, 31, 100, 168):
        crop = photo.read_crop(path, lambda h, w, top=top: (top, 5, 32, 32), 32)
        assert np.array_equal(crop, expected[top : top + 32, 5:37]), top


def test_rows_below_the_crop_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "it.jpg"
    picture(200, 150).save(path)
    decode, shapes = photo.simplejpeg.decode_jpeg, []

    def decode_jpeg(*args: object, **options: object) -> np.ndarray:
        shapes.append(decode(*args, **options).shape)
        return decode(*args, **options)

    monkeypatch.setattr(photo.simplejpeg, "decode_jpeg", decode_jpeg)
    photo.read_crop(path, lambda h, w: (0, 0, 40, 60), 16)
    assert shapes == [(48, 150, 3)]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "it.jpg"
    picture(60, 90).save(path, exif=exif)
    expected = read_image(path)
    assert expected.shape == ((60, 90, 3) if orientation < 5 else (90, 60, 3))
    assert np.array_equal(photo.read_photo(path), expected)
    asked = []

    def pick_box(height: int, width: int) -> photo.Box:
        asked.append((height, width))
        return 3, 11, 24, 40

    assert_close(photo.read_crop(path, pick_box, 20), by_pillow(expected, (3, 11, 24, 40), 20))
    assert asked == [expected.shape[:2]]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_large_crops_are_decoded_small(tmp_path: Path, scale: int):
    size = 24
    height, width = 2 * scale * size + 5, 3 * scale * size
    path = tmp_path / "it.jpg"
    # Upsized, so that it has no detail that the smaller scales do not show.
    picture(height // 8, width // 8).resize((width, height), 3).save(path, quality=90)
    box = 2, scale * 3, 2 * scale * size, 2 * scale * size + 1
    crop = photo.read_crop(path, lambda h, w: box, size)
    # Pillow at the same scale: the box's edges rounded to its pixels.
    with Image.open(path) as image:
        image.draft("RGB", (width // scale, height // scale))
        small = np.asarray(image)
    assert small.shape == (-(-height // scale), -(-width // scale), 3)
    top, left = round(2 / scale + 1e-9), 3
    bottom, right = round((2 + box[2]) / scale + 1e-9), round((box[1] + box[3]) / scale)
    assert_close(crop, by_pillow(small, (top, left, bottom - top, right - left), size))
    # And it shows what the whole picture does, where no edge has to be rounded.
    box = 0, scale * 3, 2 * scale * size, 2 * scale * size
    crop = photo.read_crop(path, lambda h, w: box, size)
    whole = by_pillow(read_image(path), box, size)
    assert np.abs(crop.astype(int) - whole).mean() < 1
    # A pixel less, and nothing is lost.
    box = 2, scale * 3, 4 * size - 1, 2 * scale * size
    crop = photo.read_crop(path, lambda h, w: box, size)
    assert_close(crop, by_pillow(read_image(path), box, size))


def test_results_are_not_overwritten(tmp_path: Path):
    paths = [tmp_path / f"{i}.jpg" for i in range(2)]
    for i, path in enumerate(paths):
        picture(40, 50, seed=i).save(path)
    first = photo.read_photo(paths[0])
    before = first.copy()
    photo.read_photo(paths[1])
    assert np.array_equal(first, before)
    assert first.flags.writeable


def test_threads_do_not_disturb_each_other(tmp_path: Path):
    paths = [tmp_path / f"{i}.jpg" for i in range(12)]
    for i, path in enumerate(paths):
        picture(80 + 9 * i, 170 - 7 * i, seed=i).save(path)

    def crop(i: int) -> np.ndarray:
        return photo.read_crop(paths[i % 12], lambda h, w: (i % 9, 5, 70, 80), 48)

    alone = [crop(i) for i in range(60)]
    with ThreadPoolExecutor(6) as pool:
        for together, expected in zip(pool.map(crop, range(60)), alone, strict=True):
            assert np.array_equal(together, expected)


# --- everything else ---


def write_others(folder: Path) -> list[Path]:
    """Files that are no ordinary JPEG, and some that are no pictures."""
    it = picture(40, 56)
    it.save(folder / "it.png")
    it.save(folder / "a png named.jpg", format="png")
    it.convert("CMYK").save(folder / "cmyk.jpg")
    it.save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    it.save(folder / "turned by xmp.jpg", xmp=xmp)
    exif = Image.Exif()
    exif[0x0112] = 3
    it.save(folder / "exif and xmp.jpg", exif=exif, xmp=xmp)
    it.save(folder / "damaged exif.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 9)
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    contents = {
        "adobe rgb.jpg": whole[:2] + adobe + b"\0" + whole[2:],
        "adobe ycc.jpg": whole[:2] + adobe + b"\x01" + whole[2:],
        "cut short.jpg": whole[: len(whole) * 2 // 3],
        "without its end.jpg": whole[:-2],
        "something behind.jpg": whole + b"more",
        "header only.jpg": whole[:100],
        "fill byte.jpg": whole[:2] + b"\xff" + whole[2:],
        "empty.jpg": b"",
        "text.jpg": b"<html>not found</html>",
        "three bytes.jpg": b"\xff\xd8\xff",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    return [*sorted(folder.iterdir()), folder / "missing.jpg"]


def odd_files() -> list[Path]:
    folder = SHARED_DATA / "odd_images"
    return sorted(p for p in folder.iterdir() if p.suffix != ".csv") if folder.exists() else []


def corner(height: int, width: int) -> photo.Box:
    return 0, 0, min(height, 100), min(width, 100)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Corrupt EXIF")
def test_other_files_are_read_as_read_image_does(tmp_path: Path):
    paths = [*write_others(tmp_path), *odd_files()]
    for path in paths:
        expected = result(lambda path=path: read_image(path))
        assert_same(result(lambda path=path: photo.read_photo(path)), expected)
        crop = result(lambda path=path: photo.read_crop(path, corner, 32))
        if isinstance(expected, str):
            assert crop == expected
        else:
            assert_close(crop, by_pillow(expected, corner(*expected.shape[:2]), 32))
    assert "cannot be decoded" in result(lambda: photo.read_photo(tmp_path / "cut short.jpg"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_content_without_a_file(tmp_path: Path):
    for path in write_others(tmp_path)[:-1]:
        if path.is_file():
            expected = result(lambda path=path: read_image(path))
            content = path.read_bytes()
            actual = result(lambda content=content, path=path: photo.decode_photo(content, path))
            assert_same(actual, expected)


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_anywhere(tmp_path: Path, progressive: bool):
    """Bytes changed at random: the result of `read_image`, or its error."""
    whole = io.BytesIO()
    picture(48, 64).save(whole, "jpeg", progressive=progressive)
    rng = np.random.default_rng(0)
    path = tmp_path / "it.jpg"
    kinds = []
    for _ in range(70):
        content = bytearray(whole.getvalue())
        # Half of the damage hits the headers.
        at = rng.integers(len(content) if rng.random() < 0.5 else 700)
        content[at] = rng.integers(256)
        path.write_bytes(content)
        expected = result(lambda: read_image(path))
        assert_same(result(lambda: photo.read_photo(path)), expected)
        crop = result(lambda: photo.read_crop(path, lambda h, w: (0, 0, h, w), 16))
        kinds.append(type(expected))
        if isinstance(expected, str):
            assert crop == expected
        else:
            assert_close(crop, by_pillow(expected, (0, 0, *expected.shape[:2]), 16))
    assert set(kinds) == {str, np.ndarray}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "it.jpg"
    picture(20, 30).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    for read in (
        photo.read_photo,
        lambda path: photo.read_crop(path, lambda h, w: (0, 0, 8, 8), 8),
    ):
        with pytest.raises(InputError, match="more than 599 pixels"):
            read(path)


# --- resizing ---


@pytest.mark.parametrize("size", [1, 7, 32, 224])
@pytest.mark.parametrize("resample", range(6))
def test_resize_is_pillows(size: int, resample: int):
    rng = np.random.default_rng(0)
    # The last three shrink in height by more than twice what they shrink in width.
    sizes = [
        (1, 1),
        (31, 47),
        (224, 224),
        (300, 310),
        (190, 600),
        (600, 190),
        (500, 224),
        (470, 300),
    ]
    for height, width in sizes:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = by_pillow(image, (0, 0, height, width), size, resample)
        assert_close(photo.resize_crop(image, size, resample), expected)


def test_most_pixels_are_equal_and_halves_are_rounded_up():
    # Differences are as rare as said, over many sizes; and none where many sums end in a half.
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(30):
        height, width = rng.integers(50, 500, 2)
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = by_pillow(image, (0, 0, height, width), 64)
        different += np.count_nonzero(photo.resize_crop(image, 64) != expected)
    assert different / (30 * 64 * 64 * 3) < 2e-4
    image = rng.integers(0, 256, (128, 128, 3), np.uint8)
    for resample in (Resampling.BOX, Resampling.BILINEAR, Resampling.BICUBIC):
        expected = by_pillow(image, (0, 0, 128, 128), 64, resample)
        assert np.array_equal(photo.resize_crop(image, 64, resample), expected)


def test_resize_of_views_into_views():
    image = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    view = image[5:70, 3:60].swapaxes(0, 1)[::-1]
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    assert photo.resize_crop(view, 32, out=batch[1]) is not None
    assert_close(batch[1], by_pillow(view, (0, 0, *view.shape[:2]), 32))
    assert not batch[[0, 2]].any()


def test_extreme_shapes():
    # Longer than the blocks that the products are cut into.
    rng = np.random.default_rng(0)
    for height, width in ((3000, 2), (2, 3000), (2500, 1500)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        assert_close(photo.resize_crop(image, 40), by_pillow(image, (0, 0, height, width), 40))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_photos_of_imagenet(tmp_path: Path):
    archive = SHARED_DATA / "imagenet_sample_dev" / "images.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    import zipfile

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(archive) as photos:
        photos.extractall(tmp_path)
    for path in sorted(tmp_path.rglob("*.JPEG")):
        expected = read_image(path)
        assert np.array_equal(photo.read_photo(path), expected), path
        height, width = (int(side * rng.uniform(0.3, 1)) for side in expected.shape[:2])
        box = (expected.shape[0] - height) // 2, (expected.shape[1] - width) // 3, height, width
        crop = photo.read_crop(path, lambda h, w, box=box: box, 224)
        assert_close(crop, by_pillow(expected, box, 224))
