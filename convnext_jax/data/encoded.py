"""Where the bytes of a picture are that is no file of its own, and how to get them.

Such a place is small, can be sent to another process, and says in errors which picture it is.
"""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

from convnext_jax.errors import InputError


class Span(NamedTuple):
    """A stretch of a file, as of a tar archive; the file may be behind a URL that fsspec reads."""

    path: str
    offset: int  # of its first byte
    size: int  # in bytes
    member: str  # what the file calls it

    @property
    def name(self) -> str:
        return f"{self.path}: {self.member}"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
          InputError: the file is not there, cannot be read, or ends before the stretch does.
        """
        try:
            if is_remote(self.path):
                system, path = file_system(self.path)
                content = system.cat_file(path, self.offset, self.offset + self.size)
            else:
                with open(self.path, "rb") as file:
                    file.seek(self.offset)
                    content = file.read(self.size)
        except Exception as error:  # a remote file system's may be of any kind
            raise InputError(f"{self.name} cannot be read ({reason_of(error)})") from error
        if len(content) > self.size:
            raise InputError(
                f"{self.name} cannot be read: its server does not give parts of files; copy the"
                " files to a disk"
            )
        if len(content) < self.size:
            raise InputError(
                f"{self.name} cannot be read: the file ends within it, and has changed since its"
                " index was made; fetch it again"
            )
        return content


class Record(NamedTuple):
    """The picture in a record of an ArrayRecord file, a `tf.train.Example`."""

    path: str
    number: int  # of the record, from 0
    member: str

    @property
    def name(self) -> str:
        return f"{self.path}: {self.member}"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
          InputError: the file is not there, or damaged, or the record holds no picture.
        """
        try:
            status = os.stat(self.path)
            reader = _kept_reader(self.path, (status.st_size, status.st_mtime_ns))
            (record,) = reader.read([self.number])
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file; check the path of the data") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.name} cannot be read ({reason_of(error)})") from error
        return picture_of(record, self.name)


class Missing(NamedTuple):
    """A picture of which a source found out that it cannot give it."""

    reason: str
    name: str

    def read(self) -> bytes:
        raise InputError(f"{self.name} cannot be read ({self.reason})")


class Content(NamedTuple):
    """The bytes themselves, of a source that has none but its own way to read them."""

    content: bytes
    name: str

    def read(self) -> bytes:
        return self.content


# What the sources of pictures that are yet to be decoded name them by.
Encoded = Path | Span | Record | Content | Missing


# Files behind URLs -------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and what the URL is called there."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise InputError(f"{url} is read by fsspec: pip install fsspec") from None
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # such as gcsfs, which gs:// needs
        raise InputError(f"{url} cannot be opened ({reason_of(error)})") from None


# ArrayRecord -------------------------------------------------------------------------------------


def open_records(path: str) -> Any:
    """The reader of an ArrayRecord file, which any threads may share.

    Raises:
      InputError: no such file, or another kind of file, or a damaged one.
      OSError: it cannot be opened for another reason.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check the path of the data")
    with open(path, "rb"):  # whose reason says more than the reader's, as of too many open files
        pass
    reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise InputError(f"{path} is no ArrayRecord file, or damaged or cut off; fetch it again")
    return reader


# Few enough for any limit on open files. A file that is another one by now is opened anew.
@functools.lru_cache(maxsize=64)
def _kept_reader(path: str, stamp: tuple[int, int]) -> Any:
    return open_records(path)


def picture_of(record: bytes, name: str) -> bytes:
    """The feature `image` of a `tf.train.Example`, an encoded picture."""
    image = parse_example(record, name).get("image")
    if not isinstance(image, bytes):
        raise InputError(
            f"{name} has no feature 'image' of bytes: it is none of a labelled picture"
        )
    return image


def parse_example(record: bytes, name: str) -> dict[str, bytes | int | None]:
    """The first value of each feature of a `tf.train.Example`; None for one without, or of floats.

    Format: protobuf's wire format of `tensorflow/core/example/{example,feature}.proto`. TensorFlow
    itself would be a large thing to install for the three fields that matter here.

    Raises:
      InputError: it is none.
    """
    features: dict[str, bytes | int | None] = {}
    try:
        for entries in _fields(record, 1):
            for entry in _fields(entries, 1):
                (key,), (feature,) = _fields(entry, 1), _fields(entry, 2)
                values: list[bytes | int] = []
                for bytes_list in _fields(feature, 1):
                    values += _fields(bytes_list, 1)
                for int_list in _fields(feature, 3):
                    for value in _fields(int_list, 1):  # packed into bytes, or one by one
                        values.append(value if isinstance(value, int) else _varint(value, 0)[0])
                first = values[0] if values else None
                if isinstance(first, int) and first >= 1 << 63:
                    first -= 1 << 64
                features[key.decode()] = first
    except (IndexError, ValueError, TypeError):
        raise InputError(f"{name} is no tf.train.Example, or damaged") from None
    return features


def _fields(message: bytes, wanted: int) -> list[Any]:
    """The values of the field `wanted` of a protobuf message: bytes, or integers."""
    values, at = [], 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError("no such kind of field")
        if at > len(message):
            raise ValueError("cut off")
        if tag >> 3 == wanted:
            values.append(value)
    return values


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
