"""Data sets of other libraries, where these are installed; otherwise what is said of it."""

import functools
import io
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data import libraries, pipeline, sources
from convnext_jax.data.dataset import Dataset
from convnext_jax.data.encoded import Content
from convnext_jax.errors import InputError


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def raises_one_line(call: Callable[[], object], *parts: object) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def assert_examples(source: sources.Source, numbers: list[int], classes: int) -> None:
    """The pictures `jpeg` makes of these numbers, labelled with them modulo `classes`."""
    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == [i % classes for i in numbers]
    for i, number in enumerate(numbers):
        assert source.file(i).read() == jpeg(number)
        with Image.open(io.BytesIO(jpeg(number))) as image:
            assert np.array_equal(source[i]["image"], np.asarray(image))
        assert source[i]["label"] == number % classes
    with closing(
        pipeline.train_batches(source, batch_size=4, image_size=8, seed=0, num_workers=3)
    ) as batches:
        batch = next(batches)
    assert batch["label"].tolist() == source.labels[batch["id"]].tolist()


@pytest.mark.parametrize("name", ["hf_datasets", "tfds"])
def test_library_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch):
    library = {"hf_datasets": "datasets", "tfds": "tensorflow_datasets"}[name]
    monkeypatch.setitem(sys.modules, library, None)
    raises_one_line(
        lambda: sources.load(name, folder="somewhere"), "somewhere", f"pip install {library}"
    )
    raises_one_line(lambda: sources.load(name, folder=""), "--config.data.folder=NAME")


@pytest.mark.parametrize(
    ("splits", "given", "chosen"),
    [
        (["train", "test", "validation"], (None, None), ("train", "validation")),
        (["test", "train"], (None, None), ("train", "test")),
        (["train"], (None, None), ("train", None)),
        (["all"], (None, None), ("all", None)),
        (["a", "b"], ("b", None), ("b", None)),
        (["a", "b"], ("b", "a"), ("b", "a")),
        (["train", "test"], ("train[:80%]", "train[80%:]"), ("train[:80%]", "train[80%:]")),
    ],
)
def test_splits(splits: list[str], given: tuple, chosen: tuple):
    assert libraries._choose_splits("it", splits, *given, slices=True) == chosen


def test_splits_that_are_not_there():
    choose = functools.partial(libraries._choose_splits, slices=False)
    raises_one_line(lambda: choose("it", ["train"], "train[:80%]", None), "no split 'train[:80%]'")
    raises_one_line(lambda: choose("it", ["a", "b"], None, None), "it has the splits a, b")
    raises_one_line(lambda: choose("it", ["train"], None, "val"), "no split 'val'")
    raises_one_line(lambda: choose("it", ["train"], "trai", None), "no split 'trai'")


def test_a_row_that_the_library_cannot_give_is_unreadable():
    def file(index: int, name: str) -> Content:
        if index == 1:
            raise KeyError("no such chunk")
        return Content(b"123", name)

    source = libraries.LibrarySource("it/train", np.zeros(2), file)
    assert source.file(0).read() == b"123"
    raises_one_line(source.file(1).read, "it/train/1 cannot be read", "no such chunk")


# --- Hugging Face's datasets ---


def test_hf_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    for i in range(12):
        path = tmp_path / "photos" / ("train" if i < 9 else "test") / "abc"[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache")
    )
    loaded.save_to_disk(str(tmp_path / "saved"))

    def load(folder: str = "saved", **arguments: object) -> Dataset:
        return sources.load("hf_datasets", folder=str(tmp_path / folder), **arguments)

    data = load()
    assert data.class_names == ("a", "b", "c")
    assert_examples(data.train, [0, 3, 6, 1, 4, 7, 2, 5, 8], 3)
    assert_examples(data.val, [9, 10, 11], 3)
    assert data.train.example_name(3) == f"{tmp_path}/saved/train/3"
    alone = load("saved/train", val_fraction=0.34)
    assert (len(alone.train), len(alone.val)) == (6, 3)
    raises_one_line(lambda: load("photos/gone"), "photos/gone", "cannot be loaded by datasets")
    raises_one_line(lambda: load(val="validation"), "no split 'validation'", "train, test")

    unlabelled = loaded["train"].remove_columns("label")
    unlabelled.save_to_disk(str(tmp_path / "unlabelled"))
    raises_one_line(lambda: load("unlabelled"), "the columns image (Image)", "ClassLabel")
    unknown = loaded.copy()
    hidden = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpeg(0), "path": None}], "label": [-1]},
        features=loaded["train"].features,
    )
    unknown["test"] = hidden
    datasets.DatasetDict(unknown).save_to_disk(str(tmp_path / "hidden"))
    raises_one_line(lambda: load("hidden"), "hidden/test/0 has the label -1")


# --- TensorFlow Datasets ---


def test_tfds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorflow_datasets", reason="TensorFlow Datasets is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "code" / "toy").mkdir(parents=True)
    (tmp_path / "code" / "toy" / "toy_builder.py").write_text(
        f"""
import sys
import tensorflow_datasets as tfds
sys.path.append({str(Path(__file__).parent)!r})
from test_libraries import jpeg
class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({{
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
            "file_name": tfds.features.Text(),
        }}))
    def _split_generators(self, _):
        return {{"train": self._generate_examples(range(9)),
                "validation": self._generate_examples(range(9, 12))}}
    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {{"image": jpeg(i), "label": i % 3, "file_name": f"{{i}}.jpg"}}
"""
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    from toy.toy_builder import Toy

    builder = Toy(data_dir=str(tmp_path / "prepared"), file_format="array_record")
    builder.download_and_prepare()
    folder = str(builder.data_dir)
    by_hand = sources.load("array_record", folder=folder)
    order = [int(by_hand.train.file(i).member.split(".")[0]) for i in range(9)]
    assert sorted(order) == list(range(9))
    assert_examples(by_hand.train, order, 3)
    for _ in range(2):  # the second time with the labels that the first has kept
        data = sources.load("tfds", folder=folder)
        assert_examples(data.train, order, 3)
        assert data.val.labels.tolist() == by_hand.val.labels.tolist()
        assert data.class_names == by_hand.class_names == ("x", "y", "z")
    assert len(list((tmp_path / "cache" / "convnext_jax").glob("*-labels.npy"))) == 2
    part = sources.load("tfds", folder=folder, train="train[:4]")
    assert_examples(part.train, order[:4], 3)
    raises_one_line(lambda: sources.load("tfds", folder="no_such_set"), "no_such_set")


def test_kept_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(value: int) -> np.ndarray:
        made.append(value)
        return np.full(3, value)

    assert libraries._kept("a", lambda: make(1)).tolist() == [1, 1, 1]
    assert libraries._kept("b", lambda: make(2)).tolist() == [2, 2, 2]
    assert libraries._kept("a", lambda: make(3)).tolist() == [1, 1, 1]
    for path in (tmp_path / "convnext_jax").iterdir():
        path.write_bytes(b"damaged")
    assert libraries._kept("a", lambda: make(4)).tolist() == [4, 4, 4]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert libraries._kept("a", lambda: make(5)).tolist() == [5, 5, 5]
    assert made == [1, 2, 4, 5]
