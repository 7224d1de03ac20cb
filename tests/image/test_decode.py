"""Reading picture files: what a viewer shows, and errors that say what is wrong with a file."""

import csv
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import Image

from convnext_jax.errors import InputError
from convnext_jax.image import read_image, to_rgb
from convnext_jax.image.decode import decode_image

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def photo() -> Image.Image:
    """A smooth picture of 8 rows and 12 columns, different in every corner."""
    y, x = np.mgrid[:8, :12]
    return Image.fromarray(np.stack([20 * x, 30 * y, 255 - 10 * (x + y)], -1).astype(np.uint8))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rgb_is_read_as_it_is(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    out = read_image(tmp_path / "photo.png")
    assert out.dtype == np.uint8
    assert np.array_equal(out, np.asarray(photo))
    assert out.flags.writeable
    assert np.array_equal(read_image(str(tmp_path / "photo.png")), out)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "photo.png", exif=exif)
    stored = np.asarray(photo)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    assert np.array_equal(read_image(tmp_path / "photo.png"), upright)


def test_grey_and_bilevel():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert np.array_equal(to_rgb(Image.fromarray(grey)), np.repeat(grey[..., None], 3, -1))
    out = np.asarray(to_rgb(Image.fromarray(grey > 100)))
    assert np.array_equal(out[..., 0], np.where(grey > 100, 255, 0))


def test_transparency_shows_white():
    red = np.zeros((1, 3, 4), np.uint8)
    red[..., 0] = 200
    red[0, :, 3] = [255, 0, 51]
    # A fifth of 200 over four fifths of 255.
    assert np.asarray(to_rgb(Image.fromarray(red))).tolist() == [
        [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    ]
    grey = np.array([[[100, 255], [100, 0]]], np.uint8)
    assert np.asarray(to_rgb(Image.fromarray(grey))).tolist() == [[[100] * 3, [255] * 3]]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    image.save(tmp_path / "photo.png", transparency=1)
    assert read_image(tmp_path / "photo.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_a_transparent_colour_in_rgb(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    image.save(tmp_path / "photo.png", transparency=(4, 5, 6))
    assert read_image(tmp_path / "photo.png").tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "photo.png")
    assert read_image(tmp_path / "photo.png")[0, :, 0].tolist() == [0, 0, 1, 255]
    assert np.asarray(to_rgb(Image.fromarray(deep.astype(np.int32))))[0, :, 2].tolist() == [
        *(0, 0, 1, 255)
    ]


def test_cmyk():
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    out = np.asarray(to_rgb(Image.fromarray(ink, mode="CMYK")))
    assert out.tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.full((2, 2), 65536, np.int32)])
def test_values_without_a_white_are_refused(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "photo.tif")
    with pytest.raises(InputError, match=r"photo\.tif: .* no defined white") as error:
        read_image(tmp_path / "photo.tif")
    one_line(error)


def test_the_first_frame_of_several(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "photo.tif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "photo.tif")[0, 0].tolist() == [255, 0, 0]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"cat\.jpg: no such file") as error:
        read_image(tmp_path / "cat.jpg")
    one_line(error)
    with pytest.raises(InputError, match="is a folder") as error:
        read_image(tmp_path)
    one_line(error)


def test_not_a_picture(tmp_path):
    (tmp_path / "cat.jpg").write_text("<html>not found</html>")
    with pytest.raises(InputError, match=r"cat\.jpg is not a picture") as error:
        read_image(tmp_path / "cat.jpg")
    one_line(error)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_cut_short(tmp_path, kind):
    rng = np.random.default_rng(0)
    whole = tmp_path / f"whole.{kind}"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / f"cat.{kind}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"cat\.{kind} cannot be decoded .*cut short") as error:
        read_image(tmp_path / f"cat.{kind}")
    one_line(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [95, 10])  # above the limit, and above twice the limit
def test_too_many_pixels(photo, tmp_path, monkeypatch, limit):
    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=rf"photo\.png has more than {limit} pixels") as error:
        read_image(tmp_path / "photo.png")
    one_line(error)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 96)
    assert read_image(tmp_path / "photo.png").shape == (8, 12, 3)


@pytest.mark.skipif(not (DATA / "odd_images").exists(), reason=f"no pictures in {DATA}")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_odd_files():
    """What Pillow decodes is read, whatever its mode; the rest is one line that names the file."""
    folder = DATA / "odd_images"
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    assert len(rows) > 30
    for row in rows:
        if row["pillow13_load"] == "ok":
            width, height = (int(side) for side in row["size"].strip("()").split(","))
            if row["exif_orientation"] in ("5", "6", "7", "8"):
                width, height = height, width
            out = read_image(folder / row["file"])
            assert out.shape == (height, width, 3), row
            assert out.dtype == np.uint8
        else:
            with pytest.raises(InputError, match=row["file"]) as error:
                read_image(folder / row["file"])
            one_line(error)


def test_content_of_a_file(photo, tmp_path):
    """The same from memory; errors call it what the caller does."""
    path = tmp_path / "photo.png"
    photo.save(path)
    content = path.read_bytes()
    assert np.array_equal(decode_image(content, "it"), read_image(path))
    for damaged, match in ((content[:60], "it cannot be decoded"), (b"text", "it is not a pic")):
        with pytest.raises(InputError, match=match) as error:
            decode_image(damaged, "it")
        one_line(error)
