"""Picture files to RGB arrays, as an image viewer would show them."""

import contextlib
import io
import os
from typing import BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from convnext_jax.errors import InputError

__all__ = ["decode_image", "read_image", "to_rgb"]


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read a picture file as RGB.

    The picture is turned upright and converted by `to_rgb`. Of a file with several frames or pages
    the first is read. Colour profiles are ignored, as they were when the published networks were
    trained.

    Args:
      path: A file of any format that Pillow reads.

    Returns:
      [height, width, 3] uint8.

    Raises:
      InputError: The file is missing, is no picture, is damaged or cut short, has a pixel format
        without a defined brightness, or has more pixels than Pillow's limit against
        decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million).
    """
    path = os.fspath(path)
    return _read(path, path)


def decode_image(content: bytes, name: str) -> np.ndarray:
    """`read_image` of the content of a picture file, which errors call `name`."""
    return _read(io.BytesIO(content), name)


def _read(file: str | bytes | BinaryIO, path: str | bytes) -> np.ndarray:
    try:
        image = PIL.Image.open(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a picture; give the files in it") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read this file") from None
    except PIL.Image.DecompressionBombError:
        raise _too_large(path) from None
    except PIL.UnidentifiedImageError:
        raise InputError(
            f"{path} is not a picture in a format that Pillow reads, or it is damaged; convert it "
            "to JPEG or PNG"
        ) from None
    except Exception as error:
        raise _unreadable(path, error) from error

    with image:
        # Pillow warns from one times its limit and refuses from two; here the limit is the limit.
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise _too_large(path)
        load(image, path)
        try:
            return np.array(to_rgb(image))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def load(image: PIL.Image.Image, name: str | bytes = "") -> None:
    """Decode a picture that has been opened, if that has not been done.

    Args:
      image: The picture.
      name: What errors call it, where it has no file name of its own.

    Raises:
      InputError: The file is damaged.
    """
    # The decoders raise nearly any exception on damaged data.
    try:
        image.load()
    except Exception as error:
        raise _unreadable(getattr(image, "filename", "") or name or "a picture", error) from None


def _unreadable(path: object, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{path} cannot be decoded ({reason}); the file is damaged or cut short: fetch it again or "
        "leave it out"
    )


def _too_large(path: str) -> InputError:
    return InputError(
        f"{path} has more than {PIL.Image.MAX_IMAGE_PIXELS} pixels; shrink it, or raise "
        "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert a picture of any mode to upright 8-bit RGB, as an image viewer would show it.

    The picture is turned as its EXIF orientation says. Palettes are looked up, grey is repeated,
    CMYK, YCbCr, HSV and Lab are converted by Pillow. Transparent parts show white. Of 16-bit grey
    the upper eight bits are kept, which is what Pillow's readers do to 16-bit colour; 32-bit
    integers (mode I) are taken for 16-bit grey.

    Args:
      image: The picture; its pixels are not changed.

    Returns:
      A picture of mode RGB; `image` itself if it is upright RGB without transparency.

    Raises:
      InputError: The file behind the picture is damaged, or its pixels have 32 bits (mode F, or I
        outside of 0 .. 65535), for which no value is white.
    """
    load(image)
    # A damaged EXIF block says nothing about the pixels: they are shown as they lie.
    with contextlib.suppress(Exception):
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.array(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(
                "a picture of 32-bit integers has no defined white; rescale it to 8 bits first"
            )
        transparent = grey == image.info.get("transparency", -1)
        return PIL.Image.fromarray(np.where(transparent, 255, grey >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        raise InputError(
            "a picture of 32-bit floats has no defined white; rescale it to 8 bits first"
        )
    if image.mode == "La":  # converts to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
