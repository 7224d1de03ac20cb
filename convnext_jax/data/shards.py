"""Data sets in few large files: tar archives as webdataset lays them out, and ArrayRecord files.

What a source needs to know of its examples (labels, names, and where each is) is found by reading
through the files once, and is kept in an index file: beside them, or where that cannot be written,
in `$XDG_CACHE_HOME/convnext_jax` (`~/.cache`). An index is a handful of arrays, some 50 bytes an
example; the fourteen million of ImageNet-22k are no objects of Python's.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convnext_jax.data.dataset import IMAGE_SUFFIXES, Dataset, Example, Source, split_by_number
from convnext_jax.data.encoded import (
    Encoded,
    Record,
    Span,
    file_system,
    is_remote,
    open_records,
    parse_example,
    reason_of,
)
from convnext_jax.data.photo import read_photo
from convnext_jax.data.workers import Workers, cores
from convnext_jax.errors import InputError

CLASSES = "classes.json"  # what `pack` writes: a list of names

# For fewer files than this a process, it gains less than its start costs.
_FILES_A_PROCESS = 32
_MOST_PROCESSES = 16
_FORMAT = 1  # of an index file

# Where fsspec's file systems say when a file was changed, or which version of it there is.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified")


class _Part(NamedTuple):
    """What is known of the N examples of a file, or of several."""

    labels: np.ndarray  # int32 [N]
    at: np.ndarray  # int64 [N], the offset of the picture's bytes, or the number of the record
    sizes: np.ndarray  # int64 [N], of the picture's bytes; of a record, 0
    lengths: np.ndarray  # int32 [N], of the examples' names in UTF-8
    names: np.ndarray  # uint8 [sum of lengths], the names end to end


class _Format(NamedTuple):
    """How one kind of file is found, read through, and read from."""

    train: str  # patterns of the files' names
    val: str
    all: str
    scan: Callable[[str], _Part]
    place: Callable[[str, int, int, str], Encoded]


def tar_shards(
    folder: str | os.PathLike[str],
    train: str | None = None,
    val: str | None = None,
    class_names: str | None = None,
    val_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """Uncompressed tar archives as webdataset lays them out, such as `convnext-jax shards` writes.

    The files of an example share the name before the first dot: a picture (a suffix of
    `IMAGE_SUFFIXES`), and its class index as the text of `.cls`, or as `label` of `.json`. They
    need not be next to each other.

    Args:
      folder: where the shards are; it may be a URL that fsspec reads (gs://, s3://, https://),
        of which each picture is then asked for alone.
      train: pattern of the shards to train on, in `folder`, or with a path or URL of its own: `*`
        and `?`, and braces `{000000..001281}` or `{a,b}`. Default: `*train*.tar`, or if there are
        none, all that are not val's.
      val: pattern of the held-out shards. Default: `*val*.tar`. If there are none, the stratified
        `val_fraction` of the others that `split_seed` draws; that choice depends on the labels in
        their order alone.
      class_names: file with the names of the classes in the order of their indices, `.json` with
        a list or a text with one a line, in `folder` or with a path of its own. Default:
        `classes.json` or `label.labels.txt`, and without these the names are the indices.

    Raises:
      InputError: no such shards, a shard that is damaged, cut off or compressed, an example without
        a label or with one that is no class. (A damaged picture raises when it is read.)
    """
    return _dataset(_TAR, folder, train, val, class_names, val_fraction, split_seed)


def array_record(
    folder: str | os.PathLike[str],
    train: str | None = None,
    val: str | None = None,
    class_names: str | None = None,
    val_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """ArrayRecord files as TensorFlow Datasets prepares them, and `convnext-jax shards` too.

    Each record is a `tf.train.Example` with the features `image` (the encoded picture), `label`
    and perhaps `file_name`. TensorFlow Datasets itself is not needed. The arguments are those of
    `tar_shards`, but for the patterns' defaults, `*train*array_record*` and `*val*array_record*`,
    and that there are no URLs.

    Raises:
      InputError: no such files, a damaged one, a record without label or picture, or with a label
        that is no class.
    """
    for place in (os.fspath(folder), train, val):
        if place is not None and is_remote(place):
            raise InputError(f"{place}: ArrayRecord files are read from disks alone; copy it there")
    return _dataset(_ARRAY_RECORD, folder, train, val, class_names, val_fraction, split_seed)


class ShardSource(Source):
    """Pictures in shards, decoded when asked for.

    Args:
      shards: paths or URLs.
      shard: int32 [N], in which of them each example is.
      part: what else is known of the examples, in this order.
      place: from the path of a shard, `at`, size and name of an example to where its picture is.
    """

    def __init__(
        self,
        shards: Sequence[str],
        shard: np.ndarray,
        part: _Part,
        place: Callable[[str, int, int, str], Encoded],
    ):
        self.shards = tuple(shards)
        self.labels = part.labels
        self._shard, self._at, self._sizes, self._place = shard, part.at, part.sizes, place
        self._lengths, self._names = part.lengths, part.names
        self._name_at = np.cumsum(part.lengths, dtype=np.int64) - part.lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image = read_photo(self.file(index))
        return {"image": image, "label": int(self.labels[index]), "id": index}

    def example_name(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]}: {self._name(index)}"

    def key(self, index: int) -> str:
        return f"{_base(self.shards[self._shard[index]])}: {self._name(index)}"

    def digest(self) -> str:
        """Of the shards' names, and of the examples' labels and places in them."""
        result = hashlib.sha256("\n".join(map(_base, self.shards)).encode(errors="surrogateescape"))
        for array in (self._shard, self._at, self._sizes, self.labels):
            result.update(array.tobytes())
        return result.hexdigest()

    def file(self, index: int) -> Encoded:
        path = self.shards[self._shard[index]]
        return self._place(path, int(self._at[index]), int(self._sizes[index]), self._name(index))

    def take(self, members: np.ndarray) -> "ShardSource":
        """The examples `members` [M] alone, numbered anew from 0."""
        columns = (self.labels, self._at, self._sizes, self._lengths)
        part = _Part(*(column[members] for column in columns), self._names)
        result = ShardSource(self.shards, self._shard[members], part, self._place)
        result._name_at = self._name_at[members]  # in the names of all
        return result

    def _name(self, index: int) -> str:
        first = self._name_at[index]
        name = self._names[first : first + self._lengths[index]]
        return name.tobytes().decode("utf-8", "surrogateescape")


def _dataset(
    kind: _Format,
    folder: str | os.PathLike[str],
    train: str | None,
    val: str | None,
    class_names: str | None,
    val_fraction: float,
    split_seed: int,
) -> Dataset:
    root = os.fspath(folder)
    if not root:
        raise InputError(
            "no folder of the data is named: give one (train.py: --config.data.folder=FOLDER)"
        )
    if not is_remote(root):
        root = os.path.expanduser(root)
        if not Path(root).is_dir():
            raise InputError(f"{root}: no such folder; check the path of the data")
    val_shards = _find(root, val or kind.val, must=val is not None)
    train_shards = _find(root, train or kind.train, must=train is not None)
    if not train_shards:
        train_shards = [s for s in _find(root, kind.all, must=True) if s not in set(val_shards)]
    if not train_shards:
        raise InputError(f"{root} holds shards of val alone; add those to train on")
    both = set(train_shards) & set(val_shards)
    if both:
        raise InputError(f"{min(both)} is matched by train and by val; give patterns that differ")

    names = _read_class_names(root, class_names)
    sources = [_read_shards(shards, kind) for shards in (train_shards, val_shards) if shards]
    if names is None:
        classes = 1 + max(int(source.labels.max()) for source in sources)
        if classes > (most := sum(map(len, sources))):
            raise InputError(
                f"the labels go up to {classes - 1:,}, of {most:,} examples: if they are right,"
                f" give the names of the classes, in {CLASSES} or by class_names"
            )
        names = tuple(map(str, range(classes)))
    for source in sources:
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= len(names)))
        if len(wrong):
            raise InputError(
                f"{source.example_name(wrong[0])} has the label {source.labels[wrong[0]]}, but"
                f" there are {len(names)} classes, numbered from 0; give another list of names"
                " (class_names), or mend the shards"
            )
    if val_shards:
        return Dataset(*sources, names)
    (whole,) = sources
    held_out = split_by_number(whole.labels, val_fraction, split_seed)
    parts = (whole.take(np.flatnonzero(mask)) for mask in (~held_out, held_out))
    return Dataset(*parts, names)


def _read_class_names(root: str, given: str | None) -> tuple[str, ...] | None:
    for name in (CLASSES, "label.labels.txt") if given is None else (given,):
        path = _join(root, name)
        try:
            if is_remote(path):
                system, there = file_system(path)
                text = system.cat_file(there).decode()
            else:
                text = Path(path).read_text(encoding="utf-8")
            is_json = path.endswith(".json")
            names = json.loads(text) if is_json else text.rstrip().splitlines()
        except FileNotFoundError:
            continue
        except Exception as error:  # a remote file system's may be of any kind
            reason = reason_of(error)
            raise InputError(f"{path} cannot be read as names of classes ({reason})") from None
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise InputError(f"{path} is no list of names of classes, JSON or one a line; mend it")
        return tuple(names)
    if given is not None:
        raise InputError(f"{_join(root, given)}: no such file; check class_names")
    return None


# Finding shards ----------------------------------------------------------------------------------


def _find(root: str, pattern: str, must: bool) -> list[str]:
    """The shards of a pattern, those of each alternative of its braces in order of name."""
    found: list[str] = []
    inside_root = root.rstrip("/") + "/"
    for path in (_join(root, each) for each in _expand_braces(pattern)):
        is_inside = path.startswith(inside_root)
        if not re.search(r"[*?\[]", path.removeprefix(inside_root)):
            found.append(path)
        elif is_remote(path):
            system, there = file_system(path)
            with _remote_errors(path):
                found += sorted(system.unstrip_protocol(each) for each in system.glob(there))
        elif is_inside:
            inside = glob(path.removeprefix(inside_root), root_dir=root)
            found += sorted(os.path.join(root, each) for each in inside)
        else:
            found += sorted(glob(path))
    if must and not found:
        raise InputError(f"{_join(root, pattern)}: there are no such shards; check the pattern")
    return found


def _join(root: str, name: str) -> str:
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{root.rstrip('/')}/{name}"


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _expand_braces(pattern: str) -> Iterator[str]:
    """`a-{00..12}.tar`, `{a,b}`: one text for each alternative, numbers with leading zeros."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if brace is None:
        yield pattern
        return
    first, last, texts = brace.groups()
    if texts is None:
        texts = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        texts = texts.split(",")
    for text in texts:
        yield from _expand_braces(pattern[: brace.start()] + text + pattern[brace.end() :])


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each file system raises what it likes
        raise InputError(f"{url} cannot be read ({type(error).__name__}: {error})") from error


# The index ---------------------------------------------------------------------------------------


def _read_shards(shards: list[str], kind: _Format) -> ShardSource:
    """The source of all examples of some shards, through their index."""
    parts = index_shards(shards, kind.scan)
    for shard, part in zip(shards, parts, strict=True):
        if not len(part.labels):
            raise InputError(f"{shard} holds no labelled pictures; leave it out")
    whole = _Part(*map(np.concatenate, zip(*parts, strict=True)))
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part.labels) for part in parts])
    return ShardSource(shards, shard, whole, kind.place)


def index_shards(shards: list[str], scan: Callable[[str], _Part]) -> list[_Part]:
    """What is known of each shard: from the index where that is of it, otherwise by a scan."""
    with ThreadPoolExecutor(16) as pool:  # a store answers each question after a while
        stamps = list(pool.map(_stamp, shards))
    folder = shards[0].rpartition("/")[0]
    inside = [shard.removeprefix(f"{folder}/") for shard in shards]
    name = f"index-{_digest(inside)}.npz"
    beside, cached = f"{folder}/{name}", f"{cache_folder()}/{_digest(shards)}-{name}"
    parts = [None] * len(shards)
    for index in (cached, beside):
        known = _load_index(index)
        # What has been copied to a store is younger than the index that was copied with it.
        by_size = index == beside and is_remote(index)
        for i, (path, stamp) in enumerate(zip(inside, stamps, strict=True)):
            part, (size, changed) = known.get(path, (None, (-1, 0)))
            if size == stamp[0] and (by_size or changed == stamp[1]):
                parts[i] = part
    missing = [i for i, part in enumerate(parts) if part is None]
    if missing:
        for i, part in zip(missing, _scan_all([shards[i] for i in missing], scan), strict=True):
            parts[i] = part
        try:
            _save_index(beside, inside, stamps, parts)
        except OSError:
            with contextlib.suppress(OSError):  # then it is made anew the next time
                cache_folder().mkdir(parents=True, exist_ok=True)
                _save_index(cached, inside, stamps, parts)
    return parts


def cache_folder() -> Path:
    """Where it is kept what has been found out about data that cannot be written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnext_jax"


def _stamp(shard: str) -> tuple[int, int]:
    """Size in bytes, and what changes with the content: the time of that, or what a store says."""
    if is_remote(shard):
        system, path = file_system(shard)
        with _remote_errors(shard):
            info = system.info(path)
        version = [str(info[name]) for name in _VERSIONS if name in info]
        return int(info["size"] or 0), int(_digest(version), 16) if version else -1
    try:
        status = os.stat(shard)
    except OSError as error:
        raise InputError(f"{shard} cannot be read ({error.strerror}); check the pattern") from None
    return status.st_size, status.st_mtime_ns


def _scan_all(shards: list[str], scan: Callable[[str], _Part]) -> Iterator[_Part]:
    from tqdm import tqdm

    number = min(len(shards) // _FILES_A_PROCESS, cores(), _MOST_PROCESSES)
    with contextlib.ExitStack() as stack:
        parts = map(scan, shards)
        if number > 1:
            pool = stack.enter_context(ThreadPoolExecutor(number))
            # Left in the opposite order, so that nothing waits for scans that are under way.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            workers = stack.enter_context(contextlib.closing(Workers(scan, number)))
            parts = pool.map(workers, shards)
        yield from tqdm(parts, "index", len(shards), unit="shard", disable=None)


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:12]


def _save_index(
    path: str, shards: list[str], stamps: list[tuple[int, int]], parts: list[_Part]
) -> None:
    if is_remote(path):
        raise OSError("stores are not written to")
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _Part._fields
    }
    unfinished = f"{path}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            np.savez(
                file,
                format=_FORMAT,
                shards=np.array(shards),
                stamps=np.array(stamps, np.int64),
                counts=np.array([[len(p.labels), len(p.names)] for p in parts], np.int64),
                **arrays,
            )
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)


def _load_index(path: str) -> dict[str, tuple[_Part, tuple[int, int]]]:
    """{shard: what is known of it, its size and time}; empty if there is no index to be read."""
    try:
        file: Any = path
        if is_remote(path):
            system, there = file_system(path)
            file = io.BytesIO(system.cat_file(there))
        with np.load(file) as stored:
            if int(stored["format"]) != _FORMAT:
                return {}
            names = ("shards", "stamps", "counts", *_Part._fields)
            content = {name: stored[name] for name in names}
    except Exception:  # numpy's, of many kinds, or a remote file system's: it is made anew
        return {}
    examples, bytes_ = ([0, *np.cumsum(column).tolist()] for column in content["counts"].T)
    known = {}
    for shard, stamp, rows, letters in zip(
        content["shards"].tolist(),
        content["stamps"].tolist(),
        pairwise(examples),
        pairwise(bytes_),
        strict=True,
    ):
        columns = [content[name][slice(*rows)] for name in _Part._fields[:-1]]
        known[shard] = _Part(*columns, content["names"][slice(*letters)]), tuple(stamp)
    return known


def _part(rows: list[tuple[int, int, int, str]]) -> _Part:
    """From (label, at, size, name) of each example."""
    names = [name.encode("utf-8", "surrogateescape") for *_, name in rows]
    return _Part(
        np.array([row[0] for row in rows], np.int32),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.int64),
        np.array(list(map(len, names)), np.int32),
        np.frombuffer(b"".join(names), np.uint8),
    )


# Tar ---------------------------------------------------------------------------------------------


def scan_tar(path: str) -> _Part:
    """Reads the headers and the labels of a shard, not its pictures.

    Raises:
      InputError: not an uncompressed tar archive, or damaged, or not as `tar_shards` says.
    """
    pictures: dict[str, tuple[int, int, str]] = {}  # by key: offset, size, member
    labels: dict[str, int] = {}
    elsewhere: dict[tuple[str, str], str] = {}  # by key and suffix: links, and files with holes
    with contextlib.ExitStack() as stack:
        if is_remote(path):
            system, there = file_system(path)
            stack.enter_context(_remote_errors(path))
            file = stack.enter_context(system.open(there, "rb"))
        else:
            file = stack.enter_context(open(path, "rb"))
        try:
            for member in _members(file):
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem:
                    continue
                key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                if not member.isreg() or member.issparse():
                    elsewhere[key, suffix] = member.name
                    continue
                if suffix in IMAGE_SUFFIXES:
                    if key in pictures:
                        raise InputError(
                            f"{path}: {member.name} is the second picture of its example, after"
                            f" {pictures[key][2]}; names must differ before the first dot"
                        )
                    pictures[key] = member.offset_data, member.size, member.name
                elif suffix == ".cls" or (suffix == ".json" and key not in labels):
                    file.seek(member.offset_data)
                    label = _parse_label(file.read(member.size), suffix)
                    if label is not None:
                        labels[key] = label
                    elif suffix == ".cls":
                        raise InputError(f"{path}: {member.name} is no whole number; mend it")
        except tarfile.TarError as error:
            file.seek(0)
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
                raise InputError(
                    f"{path} is compressed, which leaves no way into its middle; decompress it"
                    " (pictures do not shrink anyway)"
                ) from None
            raise InputError(
                f"{path} is no tar archive, or damaged or cut off ({error}); fetch it again"
            ) from None
    for (key, suffix), name in elsewhere.items():
        if suffix == ".cls" or (suffix in IMAGE_SUFFIXES and key in labels):
            raise InputError(
                f"{path}: {name} is a link or a sparse file, without its bytes in one piece; pack"
                " files as they are (tar --hard-dereference, without -S)"
            )
    for key, (_, _, name) in pictures.items():
        if key not in labels:
            raise InputError(
                f"{path}: {name} has no label; add {key.lstrip('/')}.cls with its class index, or"
                " .json with it as label"
            )
    if without := labels.keys() - pictures.keys():
        raise InputError(
            f"{path}: {min(without).lstrip('/')} has a label but no picture with a suffix that is"
            f" read ({' '.join(sorted(IMAGE_SUFFIXES))}); convert it, or leave it out"
        )
    return _part([(labels[key], at, size, name) for key, (at, size, name) in pictures.items()])


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed archive but folders; it must end as archives do."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # which would otherwise keep them all
            if not member.isdir():
                yield member
        # The module takes a damaged header, or the end of the file in one, for the archive's end.
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError(f"no header at byte {archive.offset:,}")
        while rest := file.read(2**20):
            if any(rest):
                raise tarfile.ReadError(
                    f"something follows its end at byte {archive.offset:,}; of several archives in"
                    " one file, make one"
                )


def _parse_label(content: bytes, suffix: str) -> int | None:
    try:
        if suffix == ".cls":
            return _int32(int(content))
        label = json.loads(content)
    except ValueError:
        return None
    label = label.get("label") if isinstance(label, dict) else None
    return _int32(label) if isinstance(label, int) and not isinstance(label, bool) else None


def _int32(number: int) -> int:
    """The number, or -1, which is no label either, if it is too large for one."""
    return number if abs(number) < 2**31 else -1


# ArrayRecord -------------------------------------------------------------------------------------


def scan_records(path: str) -> _Part:
    """Reads all of a file.

    Raises:
      InputError: no ArrayRecord file, or damaged, or not as `array_record` says.
    """
    reader = open_records(path)
    rows = []
    for number in range(reader.num_records()):
        name = f"{path}: record {number}"
        try:
            (record,) = reader.read([number])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{name} cannot be read ({error}); fetch the file again") from None
        example = parse_example(record, name)
        label, file_name = example.get("label"), example.get("file_name")
        if not isinstance(label, int) or not isinstance(example.get("image"), bytes):
            raise InputError(
                f"{name} has the features {', '.join(sorted(example)) or '(none)'}, where a picture"
                " (image) and its class index (label) are needed"
            )
        called = file_name.decode(errors="surrogateescape") if isinstance(file_name, bytes) else ""
        rows.append((_int32(label), number, 0, called or f"record {number}"))
    return _part(rows)


def _record(path: str, number: int, size: int, name: str) -> Record:
    return Record(path, number, name)


_TAR = _Format("*train*.tar", "*val*.tar", "*.tar", scan_tar, Span)
_ARRAY_RECORD = _Format(
    "*train*array_record*", "*val*array_record*", "*array_record*", scan_records, _record
)
