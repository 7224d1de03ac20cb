"""Photos to random crops at the speed of an accelerator, with the pixels that Pillow would give.

Three things make it faster than Pillow's open, crop and resize; all of them leave the interpreter
lock alone while they work:

* libjpeg-turbo is called directly (simplejpeg), into a buffer that a thread keeps, and stops after
  the last row of the crop. Its pixels are those of Pillow, which is built on the same library.
* A crop of four times the size wanted or more, as from a phone's photo, is decoded at 1/2, 1/4 or
  1/8 of its size, as Pillow's `draft` does; at least twice the size wanted is left to the resize.
* The two passes of Pillow's resize are float32 matrix products. They sum the same 22-bit weights in
  the same order of passes, and round to 8 bits after each; float32 carries 24 bits, so that a sum
  next to a half may fall to its other side: a difference of 1, in about one value of twenty
  thousand, and of two thousand where the sides before and after have a simple ratio.

What is not an ordinary JPEG file (other formats, CMYK, damaged or cut short, and so on) is read by
`read_image`, so that the colours and the errors are always its own.
"""

import functools
import math
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import simplejpeg
from PIL.Image import Resampling

from convnext_jax.data.encoded import Content, Encoded, Record, Span
from convnext_jax.image.decode import decode_image, read_image
from convnext_jax.image.resample import PRECISION_BITS, plan_resize

__all__ = ["decode_photo", "read_crop", "read_photo", "resize_crop"]

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


def read_photo(file: str | Encoded) -> np.ndarray:
    """`read_image`, faster where the file is an ordinary JPEG: the same pixels, the same errors."""
    header, content = _open(file)
    if header is not None:
        image = _decode(content, header, strict=True)
        if image is not None:
            return _turn(image, header.orientation).copy()  # out of the thread's buffer
    return _by_pillow(file, content)


def decode_photo(content: bytes, name: str) -> np.ndarray:
    """`decode_image`, likewise."""
    header = _parse(content)
    if header is not None:
        image = _decode(content, header, strict=True)
        if image is not None:
            return _turn(image, header.orientation).copy()  # out of the thread's buffer
    return decode_image(content, name)


def read_crop(
    file: str | Encoded,
    pick_box: Callable[[int, int], Box],
    size: int,
    resample: Resampling = Resampling.BICUBIC,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read a picture file, cut a box out of it and resize that to a square.

    Args:
      file: A picture file, or where else an encoded picture is.
      pick_box: From (height, width) of the upright picture to the box, within the picture.
      size: Side of the result, S, in pixels.
      resample: Pillow's filter.
      out: Array to write the result to, uint8 [S, S, 3].

    Returns:
      uint8 [S, S, 3]: that of `read_image`, Pillow's `crop` and `resize`, but for a difference of
      1 in at most one value in a thousand. A box with both sides of 4 S or more differs as
      decoding at a smaller scale does, and its edges lie on pixels of that scale.

    Raises:
      InputError: Whatever `read_image` raises for the file; but damage below the box, where nothing
        is decoded, may pass unnoticed if the file ends as it should.
    """
    header, content = _open(file)
    image = None
    if header is not None:
        height, width = header.upright
        top, left, rows, columns = box = pick_box(height, width)
        scale = next((k for k in (8, 4, 2) if min(rows, columns) >= 2 * k * size), 1)
        if scale > 1:
            edges = (top, left, top + rows, left + columns)
            top, left, bottom, right = ((2 * edge + scale) // (2 * scale) for edge in edges)
            box = top, left, bottom - top, right - left
            image = _decode(content, header, strict=True, scale=scale)
        elif header.may_stop and header.orientation == 1:
            image = _decode(content, header, strict=False, rows=top + rows)
        else:
            image = _decode(content, header, strict=True)
    if image is None:
        image = _by_pillow(file, content)
        box = pick_box(*image.shape[:2])
    else:
        image = _turn(image, header.orientation)
    top, left, rows, columns = box
    return resize_crop(image[top : top + rows, left : left + columns], size, resample, out)


# JPEG files ---------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """What is needed of an ordinary JPEG file before it is decoded."""

    height: int  # as stored
    width: int
    height_at: int  # offset of the two bytes that state the height
    orientation: int  # of EXIF, 1 .. 8
    may_stop: bool  # the file is complete, and holds its rows from top to bottom

    @property
    def upright(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)


def _open(file: str | Encoded) -> tuple[_Header | None, bytes]:
    """The content of a file and its header; no header if `_by_pillow` is to see to it."""
    if isinstance(file, Span | Record | Content):
        content = file.read()
    else:
        try:
            with open(file, "rb", buffering=0) as opened:
                content = opened.read()
        except OSError:
            return None, b""
    return _parse(content), content


def _by_pillow(file: str | Encoded, content: bytes) -> np.ndarray:
    if isinstance(file, Span | Record | Content):
        return decode_image(content, file.name)
    return read_image(file)  # which says what is wrong with the file


def _parse(content: bytes) -> _Header | None:
    """The header of an 8-bit grey or colour JPEG file; None for all that is not plainly one.

    Format: ITU-T T.81, annex B.
    """
    if content[:3] != b"\xff\xd8\xff":
        return None
    frame = exif = None
    xmp_turns = False
    at = 2
    try:
        while True:
            prefix, marker, length = struct.unpack_from(">BBH", content, at)
            if prefix != 0xFF or length < 2 or at + 2 + length > len(content):
                return None
            if marker == 0xE1:
                segment = content[at + 4 : at + 2 + length]
                if segment[:6] != b"Exif\0\0":
                    xmp_turns |= b"tiff:Orientation" in segment
                elif exif is None:
                    exif = segment
                else:
                    return None  # in parts
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                bits, height, width, channels = struct.unpack_from(">BHHB", content, at + 4)
                if marker > 0xC2 or frame or bits != 8 or channels not in (1, 3):
                    return None
                frame = marker, height, width, channels, at + 5
            elif marker == 0xDA:
                break
            elif marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:
                return None
            at += 2 + length
    except (struct.error, IndexError):
        return None
    if frame is None:
        return None
    kind, height, width, channels, height_at = frame
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if height * width == 0 or (limit is not None and height * width > limit):
        return None
    orientation = None if exif is None else _orientation(exif)
    if orientation is None and xmp_turns:
        return None  # which Pillow then obeys
    whole = content[at + 4] == channels and content.endswith(b"\xff\xd9")
    return _Header(height, width, height_at, orientation or 1, whole and kind != 0xC2)


def _orientation(segment: bytes) -> int | None:
    """Of EXIF, 1 .. 8; None if it is not stated."""
    exif = PIL.Image.Exif()
    try:
        exif.load(segment)
        orientation = exif.get(PIL.ExifTags.Base.Orientation)
    except Exception:  # whatever Pillow raises for it: the picture is shown as it lies
        return 1
    return orientation if orientation is None or orientation in range(2, 9) else 1


def _decode(
    content: bytes, header: _Header, strict: bool, scale: int = 1, rows: int = 0
) -> np.ndarray | None:
    """RGB pixels as stored, in a buffer of this thread's; None where `read_image` is to see to it.

    Args:
      content: The file.
      header: Of it.
      strict: Leave files to `read_image` of which libjpeg-turbo says that they are damaged.
      scale: 1, 2, 4 or 8: one pixel for so many.
      rows: If not 0, only the first so many are needed.
    """
    height, width = -(-header.height // scale), -(-header.width // scale)
    # The last rows of a frame depend on those below, through the smoothed colours: two are spare.
    stop = -(-(rows + 2) // 16) * 16
    if rows > 0 and stop < height:
        height = stop
        content = bytearray(content)
        struct.pack_into(">H", content, header.height_at, height)
    try:
        image = simplejpeg.decode_jpeg(
            content,
            "RGB",
            min_height=height if scale > 1 else 0,
            min_width=width if scale > 1 else 0,
            min_factor=scale,
            buffer=_buffer("decoded", height * width * 3, np.uint8),
            strict=strict,
        )
    except ValueError:
        return None
    return image if image.shape == (height, width, 3) else None


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels as they are to be shown."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


# Resizing -----------------------------------------------------------------------------------------

# Outputs of one matrix product along the height and along the width. More make the products larger,
# and more of each of them zeros. (Five pixels of three channels nearly fill a vector of sixteen.)
_GROUPS = {1: 4, 3: 5}  # by the channels that `_make_bands` is asked for
# OpenBLAS gives products of more multiplications than this to threads of its own, for which those
# of the loader would queue.
_LARGEST_PRODUCT = 2**18


class _Bands(NamedTuple):
    """The weights of one pass, so arranged that few calls of `np.matmul` do all of it.

    A group of outputs is a product of weights and a window of inputs. All windows are equally long,
    and those of every `len(first)`-th group are equally far apart.
    """

    weights: np.ndarray  # [groups, window, outputs of a group] float32
    first: tuple[int, ...]  # where the windows of the first groups start
    step: int  # from a window to the one `len(first)` groups later
    before: int  # inputs to add in front, so that all windows lie inside
    length: int  # inputs with those added in front and behind


@functools.lru_cache(maxsize=1024)
def _make_bands(inputs: int, outputs: int, resample: int, channels: int) -> _Bands:
    """Bands for inputs of so many interleaved channels.

    Windows and groups hold all channels; the weights from one channel to another are zeros, which
    are cheaper to multiply by than it is to take the channels apart.
    """
    start, weights = plan_resize((inputs, 1), (outputs, 1), resample).rows
    size = _GROUPS[channels]
    groups = -(-outputs // size)
    output, tap = np.nonzero(weights)
    position = start[output] + tap
    lows, highs = np.full(groups, inputs), np.zeros(groups, int)
    np.minimum.at(lows, output // size, position)
    np.maximum.at(highs, output // size, position + 1)

    # Groups lie size * inputs / outputs apart, the windows of each n-th group a whole number: the
    # better the two agree, the less the windows must reach beyond what their outputs need.
    def arrange(n: int) -> tuple[int, int, list[int]]:
        step = round(n * size * inputs / outputs)
        drift = np.arange(groups) // n * step
        first = [int((lows - drift)[i::n].min()) for i in range(n)]
        window = max(int((highs - drift)[i::n].max()) - first[i] for i in range(n))
        return window, step, first

    # A call costs about as much as another input in each window.
    window, step, first = min(
        map(arrange, range(1, min(groups, 8) + 1)), key=lambda it: it[0] + len(it[2])
    )
    n = len(first)
    before = max(-min(first), 0)
    starts = np.array([first[group % n] + group // n * step for group in range(groups)])
    bands = np.zeros((groups, window, size), np.float32)
    bands[output // size, position - starts[output // size], output % size] = weights[
        output, tap
    ] / (1 << PRECISION_BITS)
    if channels > 1:
        bands = np.einsum("gio,cd->gicod", bands, np.eye(channels, dtype=np.float32))
        bands = bands.reshape(groups, window * channels, size * channels)
    bands.flags.writeable = False
    length = max(inputs, int(starts.max()) + window) + before
    return _Bands(bands, tuple(each + before for each in first), step, before, length)


def resize_crop(
    crop: np.ndarray,
    size: int,
    resample: Resampling = Resampling.BICUBIC,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize a picture to a square as Pillow does, to 1 in at most one value in a thousand.

    Args:
      crop: uint8 [H, W, 3], of any strides.
      size: Side of the result, S, in pixels.
      resample: Pillow's filter.
      out: Array to write the result to, uint8 [S, S, 3], of any strides.

    Returns:
      uint8 [S, S, 3].
    """
    height, width = crop.shape[:2]
    rows = _make_bands(height, size, int(resample), 1)
    columns = _make_bands(width, size, int(resample), 3)
    # Whole groups: a few outputs too many are computed, as zeros.
    n_rows, n_columns = (len(bands.weights) * bands.weights.shape[2] for bands in (rows, columns))
    in_rows = slice(rows.before, rows.before + height)
    in_columns = slice(3 * columns.before, 3 * (columns.before + width))
    # As Pillow 13 does, which begins with the height where that shrinks by far more.
    if height > size and height - size > 2 * (width - size):
        pixels = _padded("pixels", (rows.length, width * 3), 0, in_rows)
        pixels[in_rows].reshape(crop.shape)[...] = crop
        between = _padded("between", (n_rows, columns.length * 3), 1, in_columns)
        _along_height(pixels, rows, between[:, in_columns])
        _round(between)
        result = _buffer("result", n_rows * n_columns, np.float32).reshape(n_rows, n_columns)
        _along_width(between, columns, result)
    else:
        pixels = _padded("pixels", (height, columns.length * 3), 1, in_columns)
        np.copyto(pixels.reshape(height, -1, 3)[:, columns.before : columns.before + width], crop)
        between = _padded("between", (rows.length, n_columns), 0, in_rows)
        _along_width(pixels, columns, between[in_rows])
        _round(between)
        result = _buffer("result", n_rows * n_columns, np.float32).reshape(n_rows, n_columns)
        _along_height(between, rows, result)
    np.add(result, 0.5, out=result)
    np.clip(result, 0, 255, out=result)
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    # The conversion cuts off what is behind the point.
    result = result[:size, : size * 3].reshape(size, size, 3)
    np.copyto(out, result, casting="unsafe")
    return out


def _along_height(pixels: np.ndarray, bands: _Bands, out: np.ndarray) -> None:
    """Float32 [bands.length, M], contiguous, to [outputs, M]."""
    groups, window, size = bands.weights.shape
    row, item = pixels.strides
    out = out.reshape(groups, size, -1)
    block = max(_LARGEST_PRODUCT // (size * window), 1)
    n = len(bands.first)
    for i, first in enumerate(bands.first):
        weights = bands.weights[i::n].swapaxes(1, 2)
        shape, strides = (len(weights), window, pixels.shape[1]), (bands.step * row, row, item)
        windows = np.ndarray(shape, np.float32, pixels, first * row, strides)
        for start in range(0, pixels.shape[1], block):
            part = slice(start, start + block)
            np.matmul(weights, windows[:, :, part], out=out[i::n, :, part])


def _along_width(pixels: np.ndarray, bands: _Bands, out: np.ndarray) -> None:
    """Float32 [N, bands.length * 3], contiguous, to [N, outputs * 3]."""
    groups, window, size = bands.weights.shape
    row, item = pixels.strides
    out = out.reshape(len(pixels), groups, size).swapaxes(0, 1)
    block = max(_LARGEST_PRODUCT // (window * size), 1)
    n = len(bands.first)
    for i, first in enumerate(bands.first):
        weights = bands.weights[i::n]
        shape, strides = (len(weights), len(pixels), window), (bands.step * 3 * item, row, item)
        windows = np.ndarray(shape, np.float32, pixels, first * 3 * item, strides)
        for start in range(0, len(pixels), block):
            part = slice(start, start + block)
            np.matmul(windows[:, part], weights, out=out[i::n, part])


def _round(sums: np.ndarray) -> None:
    """To whole numbers in 0 .. 255, halves upwards, in place."""
    np.add(sums, 0.5, out=sums)
    np.floor(sums, out=sums)
    np.clip(sums, 0, 255, out=sums)


# Memory that a thread keeps: asking the system for it costs as much as filling it.
_kept = threading.local()
_LARGEST_KEPT = 2**24  # bytes


def _buffer(name: str, items: int, dtype: type) -> np.ndarray:
    """The array [items] of that name that the thread keeps, with whatever it was left with."""
    array = getattr(_kept, name, None)
    if array is None or array.size < items:
        array = np.empty(items, dtype)
        if array.nbytes <= _LARGEST_KEPT:
            setattr(_kept, name, array)
    return array[:items]


def _padded(name: str, shape: tuple[int, ...], axis: int, inside: slice) -> np.ndarray:
    """A float32 buffer that is zero outside of a slice along axis 0 or 1."""
    array = _buffer(name, math.prod(shape), np.float32).reshape(shape)
    along = array if axis == 0 else array.swapaxes(0, 1)
    along[: inside.start] = 0
    along[inside.stop :] = 0
    return array
