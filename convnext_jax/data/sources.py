"""The data sets there are, by name, and those of pictures in memory and of folders of pictures.

Other storage joins by implementing `Source` and adding its function to `DATASETS`.
"""

import gzip
import inspect
import lzma
import os
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from convnext_jax.data.dataset import (
    IMAGE_SUFFIXES,
    Dataset,
    Example,
    Source,
    Subset,
    digest,
    stratified_split,
)
from convnext_jax.data.libraries import hf_datasets, tfds
from convnext_jax.data.photo import decode_photo, read_photo
from convnext_jax.data.shards import array_record, tar_shards
from convnext_jax.errors import InputError

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

CIFAR10_VAL_PER_CLASS = 500


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """A digest of the class names and of each split's example names and labels.

    Two data sets with equal digests have the same examples under the same ids, as far as their
    names tell; the pictures are not read.
    """
    return {
        "classes": digest(dataset.class_names),
        "train": dataset.train.digest(),
        "val": dataset.val.digest(),
    }


class ArraySource(Source):
    """Pictures held in memory.

    Args:
      name: prefix of the example names.
      images: uint8, [N, H, W, 3] RGB or [N, H, W] grey.
      labels: integers [N].
      numbers: [N] the number, or name, of each example in its original collection (default
        0..N-1).
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        numbers: np.ndarray | None = None,
    ):
        self.name = name
        self.images = images
        self.labels = labels.astype(np.int32)
        self.numbers = np.arange(len(images)) if numbers is None else numbers
        self.size = images.shape[1:3]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        image = self.images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return {"image": image, "label": int(self.labels[index]), "id": index}

    def example_name(self, index: int) -> str:
        return f"{self.name}/{self.numbers[index]}"

    def batch(self, indices: np.ndarray) -> np.ndarray:
        images = self.images[indices]
        return np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images


class FolderSource(Source):
    """Picture files, decoded when asked for.

    Args:
      root: folder the paths start from.
      paths: relative paths of the pictures, `/`-separated.
      labels: integers [N].
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: np.ndarray):
        self.root = root
        self.paths = tuple(paths)
        self.labels = labels.astype(np.int32)
        # Once kept in memory; in the place of one that cannot be read, why.
        self.images: Sequence[np.ndarray | str] | np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        image = self._read(index) if self.images is None else self.images[index]
        if isinstance(image, str):
            raise InputError(image)
        return {"image": image, "label": int(self.labels[index]), "id": index}

    def example_name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def key(self, index: int) -> str:
        return unicodedata.normalize("NFC", self.paths[index])

    def batch(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]

    def file(self, index: int) -> Path | None:
        return self.root / self.paths[index] if self.images is None else None

    def keep_in_memory(self) -> None:
        """Decodes all pictures now, with a thread a core, to keep them.

        One that cannot be read raises its `InputError` when it is asked for, as without this.
        """

        def read(index: int) -> np.ndarray | str:
            try:
                return self._read(index)
            except InputError as error:
                return str(error)

        images = _in_threads(read, range(len(self)))
        shapes = {getattr(image, "shape", None) for image in images}
        if len(shapes) == 1 and None not in shapes:
            self.size = images[0].shape[:2]
            stacked = np.empty((len(images), *images[0].shape), np.uint8)
            for index in range(len(images)):  # one by one, or all would be there twice
                stacked[index], images[index] = images[index], None
            images = stacked
        self.images = images

    def _read(self, index: int) -> np.ndarray:
        return read_photo(self.root / self.paths[index])


def load(
    name: str, *, tune_fraction: float = 0.0, tune_seed: int = 0, **arguments: object
) -> Dataset:
    """The data set `name` of `DATASETS`, called with `arguments`.

    Args:
      name: which data set.
      tune_fraction: above 0, to choose settings without a look at val: the training part is split
        in two by `stratified_split` over the names of its examples, and this share of it stands in
        for val; val itself is out of reach.
      tune_seed: which of the possible splits.
      arguments: of the data set's function; None leaves one at its default.

    Raises:
      InputError: no such name, arguments that data set does not take or lacks, or a share that is
        not below 1.
    """
    if name not in DATASETS:
        raise InputError(f"no data set is called {name!r}; there are: {', '.join(DATASETS)}")
    function = DATASETS[name]
    arguments = {key: value for key, value in arguments.items() if value is not None}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(str(p) for p in inspect.signature(function).parameters.values())
        raise InputError(
            f"data set {name!r}: {error}; it takes ({takes}), and like all others tune_fraction"
            " and tune_seed"
        ) from None
    data = function(**arguments)
    if tune_fraction == 0:
        return data

    whole = data.train
    names = [whole.key(i) for i in range(len(whole))]
    held_out = stratified_split(whole.labels, names, tune_fraction, tune_seed)
    train, val = (Subset(whole, np.flatnonzero(mask)) for mask in (~held_out, held_out))
    return Dataset(train, val, data.class_names)


def digits(val_fraction: float = 0.2, split_seed: int = 0) -> Dataset:
    """The 1,797 handwritten digits that scikit-learn carries, 8×8 grey, values 0..16 made 0..255.

    They are the test part of the UCI "Optical Recognition of Handwritten Digits" data set.
    `val` is the stratified `val_fraction` of them that `split_seed` draws.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target
    held_out = stratified_split(
        labels, [str(i) for i in range(len(labels))], val_fraction, split_seed
    )

    def part(mask: np.ndarray) -> ArraySource:
        return ArraySource("digits", images[mask], labels[mask], np.flatnonzero(mask))

    return Dataset(part(~held_out), part(held_out), tuple(str(d) for d in range(10)))


def fashion_mnist(folder: str | os.PathLike[str]) -> Dataset:
    """Fashion-MNIST from its four official idx files: 60,000 and 10,000 grey pictures of 28×28.

    `folder` holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`
    and `t10k-labels-idx1-ubyte`, each as it is or with the suffix `.gz`. `val` is the t10k part.

    Raises:
      InputError: the folder or a file is missing, damaged, or does not fit the others.
    """
    root = existing_folder(folder)

    def part(stem: str, name: str) -> ArraySource:
        images, images_path = _read_idx(root, f"{stem}-images-idx3-ubyte", dimensions=3)
        labels, labels_path = _read_idx(root, f"{stem}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise InputError(
                f"{labels_path} has {len(labels)} labels for the {len(images)} pictures of"
                f" {images_path.name}: the two are not of one data set; download both again"
            )
        if labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
            raise InputError(
                f"{labels_path} holds the label {labels.max()}, but Fashion-MNIST has"
                f" {len(FASHION_MNIST_CLASSES)} classes; give the folder of the official files"
            )
        return ArraySource(f"fashion-mnist/{name}", images, labels)

    return Dataset(part("train", "train"), part("t10k", "t10k"), FASHION_MNIST_CLASSES)


def cifar10(folder: str | os.PathLike[str]) -> Dataset:
    """CIFAR-10's 50,000 training pictures, 32×32 colour, as JPEG files; decoded into memory.

    `folder` holds `train/<class>/….jpg` or the archive `cifar10_train_jpg.tar.xz` of that tree;
    the path of an archive (`.tar.xz`) will do too. `val` is the last 500 pictures of each class by
    name, and the others are the training part. The pixels are not those of the original binary
    files: JPEG has changed them a little.

    Raises:
      InputError: nothing of that is there, the archive or a picture is damaged, a picture of
        another size, a class of 500 pictures or fewer.
    """
    path = Path(folder).expanduser()
    if not path.is_file():
        root = existing_folder(folder)
        path = root / "cifar10_train_jpg.tar.xz"
        if (root / "train").is_dir():
            path = root / "train"
        elif not path.is_file():
            raise InputError(f"{root} holds neither a folder train nor {path.name}; add one")
    names, images = _read_class_tree(path)
    for name, image in zip(names, images, strict=True):
        if image.shape != (32, 32, 3):
            raise InputError(
                f"{path}: {name} has {image.shape[1]}×{image.shape[0]} pixels where CIFAR-10 has"
                " 32×32; use the data set image_folder for other pictures"
            )
    classes = [name.split("/")[0] for name in names]
    class_names, labels = np.unique(classes, return_inverse=True)
    counts = np.bincount(labels)
    if counts.min() <= CIFAR10_VAL_PER_CLASS:
        raise InputError(
            f"{path}: the class {class_names[counts.argmin()]!r} has only {counts.min()} pictures,"
            f" of which val alone takes {CIFAR10_VAL_PER_CLASS}; unpack the archive again"
        )
    held_out = np.zeros(len(names), bool)
    for label in range(len(class_names)):
        held_out[np.flatnonzero(labels == label)[-CIFAR10_VAL_PER_CLASS:]] = True
    pixels, numbers = np.stack(images), np.array(names)

    def part(mask: np.ndarray) -> ArraySource:
        return ArraySource("cifar10/train", pixels[mask], labels[mask], numbers[mask])

    return Dataset(part(~held_out), part(held_out), tuple(class_names.tolist()))


def image_folder(
    folder: str | os.PathLike[str],
    val_fraction: float = 0.2,
    split_seed: int = 0,
    in_memory: bool = False,
) -> Dataset:
    """Any tree of pictures sorted into one folder a class.

    Either `folder/train/<class>/…` and `folder/val/<class>/…`, or `folder/<class>/…`, of which
    the stratified `val_fraction` that `split_seed` draws becomes `val`; that choice depends on
    the names of the files alone. Classes are numbered in the order of their names. Below a class
    folder, files with a suffix of `IMAGE_SUFFIXES` count, in subfolders too; hidden ones do not.

    With `in_memory`, every picture is decoded here and kept, 3 bytes a pixel: for small pictures,
    or few, of a few GB in all.

    Raises:
      InputError: folder missing, no class folders, a class folder without pictures, a class in
        val that train lacks. (A damaged picture raises when it is asked for.)
    """
    data = _image_folder(folder, val_fraction, split_seed)
    if in_memory:
        data.train.keep_in_memory()
        data.val.keep_in_memory()
    return data


def _image_folder(folder: str | os.PathLike[str], val_fraction: float, split_seed: int) -> Dataset:
    root = existing_folder(folder)
    train_root, val_root = root / "train", root / "val"
    if train_root.is_dir() and val_root.is_dir():
        train, val = scan_classes(train_root), scan_classes(val_root)
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise InputError(
                f"{val_root / unknown[0]}: the class {unknown[0]!r} is in val but not in train;"
                f" add {train_root / unknown[0]} or remove it from val"
            )
        class_names = tuple(train)
        number = {name: i for i, name in enumerate(class_names)}
        return Dataset(
            _folder_source(train_root, train, number),
            _folder_source(val_root, val, number),
            class_names,
        )

    if train_root.is_dir() and not _pictures_below(train_root, recursive=False):
        raise InputError(
            f"{root} has a train folder but no val folder; add {val_root}, or give {train_root}"
            " to have it split"
        )
    classes = scan_classes(root)
    class_names = tuple(classes)
    everything = _folder_source(root, classes, {name: i for i, name in enumerate(class_names)})
    keys = [everything.key(i) for i in range(len(everything))]
    held_out = stratified_split(everything.labels, keys, val_fraction, split_seed)

    def part(mask: np.ndarray) -> FolderSource:
        paths = [everything.paths[i] for i in np.flatnonzero(mask)]
        return FolderSource(root, paths, everything.labels[mask])

    return Dataset(part(~held_out), part(held_out), class_names)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "array_record": array_record,
    "cifar10": cifar10,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "hf_datasets": hf_datasets,
    "image_folder": image_folder,
    "tar_shards": tar_shards,
    "tfds": tfds,
}


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    if not str(folder):
        raise InputError(
            "no folder of the data is named: give one (train.py: --config.data.folder=FOLDER)"
        )
    root = Path(folder).expanduser()
    if not root.exists():
        raise InputError(f"{root}: no such folder; check the path of the data")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the folder that holds the data")
    return root


def scan_classes(root: Path) -> dict[str, list[str]]:
    """{class name: its pictures relative to root}, both in the order of their names."""
    try:
        folders = [entry for entry in os.scandir(root) if entry.is_dir()]
    except OSError as error:
        raise InputError(f"{root}: cannot be listed ({error.strerror}); check its rights") from None
    folders = sorted(
        (f for f in folders if not f.name.startswith(".")), key=lambda f: _order(f.name)
    )
    if not folders:
        raise InputError(
            f"{root} has no class folders; put the pictures of each class into a folder of its own"
        )
    classes: dict[str, list[str]] = {}
    for class_folder in folders:
        pictures = _pictures_below(Path(class_folder.path))
        if not pictures:
            raise InputError(
                f"{class_folder.path}: the class folder holds no pictures; add some"
                f" ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder"
            )
        # macOS may hand out the decomposed form of the name that Linux has composed.
        name = unicodedata.normalize("NFC", class_folder.name)
        classes[name] = [f"{class_folder.name}/{picture}" for picture in pictures]
    return classes


def _pictures_below(folder: Path, recursive: bool = True) -> list[str]:
    """Paths of the pictures below a folder, relative to it, `/`-separated, in order of name."""
    pictures = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in files:
            if _is_picture(name):
                pictures.append((Path(parent) / name).relative_to(folder).as_posix())
    return sorted(pictures, key=_order)


def _order(name: str) -> tuple[str, str]:
    return unicodedata.normalize("NFC", name), name


def _folder_source(
    root: Path, classes: dict[str, list[str]], number: dict[str, int]
) -> FolderSource:
    paths = [path for pictures in classes.values() for path in pictures]
    labels = np.repeat([number[name] for name in classes], [len(p) for p in classes.values()])
    return FolderSource(root, paths, labels)


def _read_class_tree(path: Path) -> tuple[list[str], list[np.ndarray]]:
    """Names `<class>/<file>` in order, and pictures, of a folder `train` or an archive of one."""
    if path.is_dir():
        classes = scan_classes(path)
        names = [picture for pictures in classes.values() for picture in pictures]
        return names, _in_threads(lambda name: read_photo(path / name), names)
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and parts[-3:-2] == ("train",) and _is_picture(parts[-1]):
                    files["/".join(parts[-2:])] = archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: cannot be read as a .tar.xz archive, damaged or cut off ({error}); fetch it"
            " again"
        ) from None
    if not files:
        raise InputError(f"{path} holds no pictures train/<class>/….jpg; give another archive")
    names = sorted(files, key=_order)
    # In one thread: for pictures as small as CIFAR's, passing the lock around costs more.
    return names, [decode_photo(files[name], f"{path}: {name}") for name in names]


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The results for all items, with a thread a core; the first error ends it."""

    def some(start: int) -> list[Any]:
        return [function(item) for item in items[start : start + 64]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(chain.from_iterable(pool.map(some, range(0, len(items), 64))))


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _read_idx(root: Path, name: str, dimensions: int) -> tuple[np.ndarray, Path]:
    """Reads an idx file of unsigned bytes, gzipped or not: (array, the path it came from).

    Format: http://yann.lecun.com/exdb/mnist (two zero bytes, a type byte that is 8 for unsigned
    bytes, the number of dimensions, each dimension as a big-endian uint32, the bytes).
    """
    path = next((p for p in (root / f"{name}.gz", root / name) if p.is_file()), None)
    if path is None:
        raise InputError(f"{root} lacks {name}.gz; download the four files of the data set into it")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read, damaged or cut off ({error}); download it again"
        ) from None

    header = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise InputError(
            f"{path} is not an idx file of {dimensions}-dimensional bytes: it starts with"
            f" {content[:4].hex() or 'nothing'} instead of {magic.hex()}; download it again"
        )
    if len(content) < header:
        raise InputError(f"{path}: cut off within its header; download it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(content) - header != expected or expected == 0:
        raise InputError(
            f"{path}: {len(content) - header} bytes of data where its header promises {expected}"
            f" ({'×'.join(map(str, shape))}); download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape), path
