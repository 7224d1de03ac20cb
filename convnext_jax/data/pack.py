"""A folder of pictures into shards: tar archives for webdataset's readers, or ArrayRecord files."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from convnext_jax.data.shards import CLASSES, index_shards, scan_records, scan_tar
from convnext_jax.data.sources import FolderSource, image_folder
from convnext_jax.errors import InputError

FORMATS = ("tar", "array_record")


def pack(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str = "tar",
    shard_bytes: int = 2**28,
    seed: int = 0,
    val_fraction: float = 0.2,
) -> dict[str, int]:
    """Writes a folder of pictures as shards, for the data sets `tar_shards` and `array_record`.

    The files' bytes are copied as they are. Each part is shuffled, so that readers that take one
    shard after the other see the classes mixed. The same folder gives the same bytes. `out` appears
    when all is there; whatever ends the work before leaves nothing of that name.

    Args:
      folder: as `image_folder` takes it, and split by `val_fraction` and `seed` as there.
      out: folder to make; its parent must exist.
      kind: of `FORMATS`.
      shard_bytes: of pictures in a shard, about.
      seed: of the order, and of the split where there is one to be made.
      val_fraction: share to hold out where the folder has no `val`.

    Returns:
      {"train": examples, "val": examples, "classes": number, "shards": number}

    Raises:
      InputError: as `image_folder`, `out` exists, or a picture's file cannot be read.
    """
    if kind not in FORMATS:
        raise InputError(f"there are no shards of the format {kind!r}: give {' or '.join(FORMATS)}")
    out = Path(out).expanduser()
    if out.exists():
        raise InputError(f"{out} exists; remove it, or give the shards another folder")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder, in which {out.name} is to be made")
    data = image_folder(folder, val_fraction, seed)
    for name in data.class_names:
        if name.encode(errors="replace").decode() != name:
            raise InputError(f"the name of the folder {name!r} is not UTF-8; rename it")
    unfinished = out.parent / f".{out.name}.{os.getpid()}"
    unfinished.mkdir()
    try:
        shards = 0
        for part, source in (("train", data.train), ("val", data.val)):
            paths = _write_part(unfinished, part, source, kind, shard_bytes, seed)
            # Reads all headers and labels back, and saves whoever reads the shards doing so.
            index_shards(paths, scan_tar if kind == "tar" else scan_records)
            shards += len(paths)
        names = json.dumps(list(data.class_names), ensure_ascii=False, indent=0)
        (unfinished / CLASSES).write_text(names, encoding="utf-8")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {
        "train": len(data.train),
        "val": len(data.val),
        "classes": len(data.class_names),
        "shards": shards,
    }


def _write_part(
    folder: Path, part: str, source: FolderSource, kind: str, shard_bytes: int, seed: int
) -> list[str]:
    """The paths of the shards."""
    from tqdm import tqdm

    keys = _keys(source.paths)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    with _readable():
        sizes = np.array([os.stat(source.file(index)).st_size for index in order], np.int64)
    shard = (np.cumsum(sizes) - sizes) // min(shard_bytes, 2**62)
    shard = np.unique(shard, return_inverse=True)[1]  # a large picture may have left a gap
    number = int(shard[-1]) + 1
    paths = []
    with tqdm(total=len(order), desc=part, unit=" pictures", disable=None) as bar:
        for i, members in enumerate(np.split(np.array(order), np.flatnonzero(np.diff(shard)) + 1)):
            if kind == "tar":
                path = folder / f"{part}-{i:06}.tar"
                opened = _open_tar(path)
            else:
                path = folder / f"{part}.array_record-{i:05}-of-{number:05}"
                opened = _open_records(path)
            with opened as add:
                for index in members.tolist():
                    file = source.file(index)
                    with _readable():
                        content = file.read_bytes()
                    add(keys[index], file.suffix.lower(), content, int(source.labels[index]))
                    bar.update()
            paths.append(str(path))
    return paths


def _keys(paths: tuple[str, ...]) -> list[str]:
    """Names without a dot after the last slash, each of them once: `tench/n0144_1` of a `.jpg`."""
    taken: set[str] = set()
    keys = []
    for path in paths:
        folder, _, base = path.rpartition("/")
        plain = key = f"{folder}/{base.rpartition('.')[0].replace('.', '_')}"
        number = 1
        while key in taken:
            number += 1
            key = f"{plain}-{number}"
        taken.add(key)
        keys.append(key)
    return keys


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None


@contextmanager
def _open_tar(path: Path) -> Iterator[Any]:
    with tarfile.open(path, "w") as archive:

        def add(key: str, suffix: str, content: bytes, label: int) -> None:
            for name, data in ((key + suffix, content), (f"{key}.cls", b"%d" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

        yield add


@contextmanager
def _open_records(path: Path) -> Iterator[Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a chunk, so that it can be read alone; pictures do not shrink.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")

    def add(key: str, suffix: str, content: bytes, label: int) -> None:
        writer.write(_example(image=content, label=label, file_name=os.fsencode(key + suffix)))

    try:
        try:
            yield add
        finally:
            writer.close()
    except RuntimeError as error:  # which has what the system said somewhere in it
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path.name} cannot be written ({reason})") from None


def _example(**features: bytes | int) -> bytes:
    """A `tf.train.Example` in protobuf's wire format; its features in order of name."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    entries = b""
    for name, value in sorted(features.items()):
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            feature = field(3, field(1, _varint(value)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def _varint(number: int) -> bytes:
    result = bytearray()
    while number >= 0x80:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*result, number])
