"""Data sets as other libraries keep them: Hugging Face's `datasets`, and TensorFlow Datasets.

Neither is a dependency. Both give the encoded pictures, which are decoded here like all others.
"""

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from convnext_jax.data.dataset import Dataset, Example, Source, Subset, split_by_number
from convnext_jax.data.encoded import Content, Encoded, Missing, reason_of
from convnext_jax.data.photo import read_photo
from convnext_jax.data.shards import cache_folder
from convnext_jax.errors import InputError

# What a held-out split is called, where the caller does not say.
VAL_SPLITS = ("validation", "val", "valid", "test")


def hf_datasets(
    folder: str,
    train: str | None = None,
    val: str | None = None,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    label: str | None = None,
) -> Dataset:
    """A data set of Hugging Face's library: one of the hub, or a folder of `save_to_disk`.

    Its pictures are the column of the type `Image`, its classes that of `ClassLabel`.

    Args:
      folder: a folder, or the name of a data set of the hub, which is downloaded as a whole.
      train: the split to train on; default `train`, or the only one.
      val: the held-out one; default the first of `VAL_SPLITS` that there is. If there is none, the
        stratified `val_fraction` of the other that `split_seed` draws.
      label: the column of the classes, where there are several.

    Raises:
      InputError: the library is not installed, there is no such data set or split, or it has none
        or several of such columns.
    """
    library = _import("datasets", folder)
    root = Path(folder).expanduser()
    try:
        if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
            splits = library.load_from_disk(str(root))
        else:
            splits = library.load_dataset(folder)
    except Exception as error:  # of many kinds
        raise InputError(
            f"{folder} cannot be loaded by datasets ({type(error).__name__}:"
            f" {' '.join(str(error).split())})"
        ) from error
    if not isinstance(splits, Mapping):
        splits = {"train": splits}
    train, val = _choose_splits(folder, list(splits), train, val, slices=False)

    features = splits[train].features
    images, labels = (
        [name for name, feature in features.items() if isinstance(feature, kind)]
        for kind in (library.Image, library.ClassLabel)
    )
    labels = [label] if label in labels else labels if label is None else []
    if (len(images), len(labels)) != (1, 1):
        columns = ", ".join(f"{name} ({type(f).__name__})" for name, f in features.items())
        raise InputError(
            f"{folder} has the columns {columns},"
            " where one Image and one ClassLabel are needed; name the latter (label) if there are"
            " several"
        )
    image, label = images[0], labels[0]

    def source(split: str) -> Source:
        rows = splits[split].cast_column(image, library.Image(decode=False))
        numbers = rows.select_columns([label]).with_format("numpy")[:][label]

        def file(index: int, name: str) -> Encoded:
            cell = rows[index][image]
            if cell is None:
                return Missing("it has no picture", name)
            return Path(cell["path"]) if cell["bytes"] is None else Content(cell["bytes"], name)

        return LibrarySource(f"{folder}/{split}", numbers, file)

    names = tuple(features[label].names)
    return _dataset(source, names, train, val, val_fraction, split_seed)


def tfds(
    folder: str,
    train: str | None = None,
    val: str | None = None,
    val_fraction: float = 0.2,
    split_seed: int = 0,
) -> Dataset:
    """A data set that TensorFlow Datasets has prepared as ArrayRecord, through its data sources.

    (Where they hold pictures and labels, the data set `array_record` reads the same files without
    the library, and faster. This one also takes splits such as `train[:10%]`.)

    Args:
      folder: of the prepared version, which holds `dataset_info.json`; or the name of a data set,
        as in `tfds.data_source`, that lies where the library keeps them.
      train: the split to train on; default `train`, or the only one.
      val: the held-out one; default the first of `VAL_SPLITS` that there is. If there is none, the
        stratified `val_fraction` of the other that `split_seed` draws.

    Raises:
      InputError: the library is not installed, there is no such data set or split, it has no
        features `image` and `label`, or is not kept as ArrayRecord.
    """
    from tqdm import tqdm

    library = _import("tensorflow_datasets", folder)
    root = Path(folder).expanduser()
    try:
        if (root / "dataset_info.json").is_file():
            builder = library.builder_from_directory(str(root))
        else:
            builder = library.builder(folder, file_format="array_record")
        info = builder.info
        train, val = _choose_splits(folder, list(info.splits), train, val, slices=True)
        undecoded = {"image": library.decode.SkipDecoding()}
        examples = {
            split: builder.as_data_source(split, decoders=undecoded)
            for split in (train, val)
            if split is not None
        }
        names = tuple(info.features["label"].names)
    except InputError:
        raise
    except Exception as error:  # of many kinds
        raise InputError(
            f"{folder} cannot be loaded by tensorflow_datasets ({type(error).__name__}:"
            f" {' '.join(str(error).split())})"
        ) from error

    def source(split: str) -> Source:
        rows = examples[split]

        def read_labels() -> np.ndarray:
            numbers = tqdm(range(len(rows)), f"labels of {split}", unit="example", disable=None)
            return np.array([rows[i]["label"] for i in numbers], np.int32)

        # With the time at which the set was prepared: another of this name has other labels.
        about = Path(builder.data_path) / "dataset_info.json"
        prepared = about.stat().st_mtime_ns if about.is_file() else 0  # it may be in a store
        size = f"{len(rows)} {info.splits[split].num_bytes}"
        name = f"{builder.data_path} {split} {size} {prepared}"
        return LibrarySource(
            f"{folder}/{split}",
            _kept(name, read_labels),
            lambda index, name: Content(rows[index]["image"], name),
        )

    return _dataset(source, names, train, val, val_fraction, split_seed)


class LibrarySource(Source):
    """Pictures that a library keeps, decoded when asked for.

    Args:
      name: prefix of the example names.
      labels: integers [N].
      file: from the number and the name of an example to its encoded picture.
    """

    def __init__(self, name: str, labels: np.ndarray, file: Callable[[int, str], Encoded]):
        self.name = name
        self.labels = np.asarray(labels).astype(np.int32)
        self._file = file

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image = read_photo(self.file(index))
        return {"image": image, "label": int(self.labels[index]), "id": index}

    def example_name(self, index: int) -> str:
        return f"{self.name}/{index}"

    def file(self, index: int) -> Encoded:
        name = self.example_name(index)
        try:
            return self._file(index, name)
        except Exception as error:  # the library's, of any kind
            return Missing(reason_of(error), name)


def _import(name: str, folder: str) -> ModuleType:
    if not str(folder):
        raise InputError(
            "no data set is named: give a folder or a name (train.py: --config.data.folder=NAME)"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{folder} is read by {name}, but {error.name} is not installed: pip install"
            f" {error.name}"
        ) from None


def _choose_splits(
    folder: str, splits: list[str], train: str | None, val: str | None, slices: bool
) -> tuple[str, str | None]:
    for split in (train, val):
        if split is not None and (split.split("[")[0] if slices else split) not in splits:
            raise InputError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
    if train is None:
        if "train" not in splits and len(splits) > 1:
            raise InputError(f"{folder} has the splits {', '.join(splits)}: say which to train on")
        train = "train" if "train" in splits else splits[0]
    if val is None:
        val = next((split for split in VAL_SPLITS if split in splits and split != train), None)
    return train, val


def _dataset(
    source: Callable[[str], Source],
    names: tuple[str, ...],
    train: str,
    val: str | None,
    val_fraction: float,
    split_seed: int,
) -> Dataset:
    splits = [source(split) for split in (train, val) if split is not None]
    for part in splits:
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(names)))
        if len(wrong):
            raise InputError(
                f"{part.example_name(wrong[0])} has the label {part.labels[wrong[0]]}, which is"
                f" none of the {len(names)} classes; give splits whose labels are known"
            )
    if val is not None:
        return Dataset(*splits, names)
    (whole,) = splits
    held_out = split_by_number(whole.labels, val_fraction, split_seed)
    parts = (Subset(whole, np.flatnonzero(mask)) for mask in (~held_out, held_out))
    return Dataset(*parts, names)


def _kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that takes a reading of all data to make, kept under this name."""
    path = cache_folder() / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-labels.npy"
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        array = make()
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            np.save(file, array)
        unfinished.replace(path)
    except OSError:  # then it is made anew the next time
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return array
