"""Sources: the right pictures with the right labels, the same split for good, or an error."""

import gzip
import hashlib
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data import sources
from convnext_jax.errors import InputError

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def raises_one_line(call: Callable[[], object], *parts: object) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# --- load ---


def test_load_passes_its_arguments_on():
    data = sources.load("digits", val_fraction=0.5, split_seed=3)
    assert len(data.val) == round(1797 * 0.5)


def test_load_names_what_exists():
    raises_one_line(lambda: sources.load("cifar"), "'cifar'", "digits", "image_folder")


@pytest.mark.parametrize("arguments", [{"fraction": 0.5}, {"split_seed": 1, "nope": 2}])
def test_load_says_which_arguments_a_data_set_takes(arguments: dict):
    raises_one_line(
        lambda: sources.load("digits", **arguments), *[set(arguments) - {"split_seed"}][0]
    )
    takes = ("val_fraction", "split_seed", "tune_fraction")
    raises_one_line(lambda: sources.load("digits", **arguments), *takes)


# --- a part of the training part to choose settings on ---


def names(source: sources.Source) -> list[str]:
    return [source.example_name(i) for i in range(len(source))]


def test_tuning_leaves_val_alone():
    whole = sources.load("digits")
    data = sources.load("digits", tune_fraction=0.25)
    assert set(names(data.train)).isdisjoint(names(data.val))
    assert sorted(names(data.train) + names(data.val)) == sorted(names(whole.train))
    assert set(names(data.val)).isdisjoint(names(whole.val))
    expected = np.bincount(whole.train.labels) * 0.25
    assert np.all(np.abs(np.bincount(data.val.labels) - expected) < 1)
    assert data.class_names == whole.class_names
    assert sources.fingerprint(data) != sources.fingerprint(whole)


def test_tuning_examples_are_those_of_the_training_part():
    whole = sources.load("digits").train
    by_name = {whole.example_name(i): whole[i] for i in range(len(whole))}
    data = sources.load("digits", tune_fraction=0.1)
    for source in (data.train, data.val):
        assert source.labels.dtype == np.int32
        pictures = source.batch(np.arange(len(source)))
        for i in range(0, len(source), 10):
            example, expected = source[i], by_name[source.example_name(i)]
            assert example["id"] == i
            assert example["label"] == source.labels[i] == expected["label"]
            assert np.array_equal(example["image"], expected["image"])
            assert np.array_equal(pictures[i], expected["image"])


def test_tuning_split_goes_by_its_seed_and_the_names(tmp_path: Path):
    first, again, other = (
        names(sources.load("digits", tune_fraction=0.1, tune_seed=seed).val) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    # And not by where the folder lies, nor by how it is read.
    parts = []
    for folder in ("a", "b"):
        root = two_trees(tmp_path / folder)
        for in_memory in (False, True):
            arguments = {"folder": root, "tune_fraction": 0.34, "in_memory": in_memory}
            data = sources.load("image_folder", **arguments)
            parts.append([name.removeprefix(str(root)) for name in names(data.val)])
            assert all(name.startswith("/train/") for name in parts[-1])
    assert len(parts[0]) == 3
    assert parts[1:] == parts[:1] * 3


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_tuning_fraction_is_checked(fraction: float):
    raises_one_line(lambda: sources.load("digits", tune_fraction=fraction), fraction)


# --- the held-out part ---


def test_split_takes_the_same_share_of_every_class():
    labels = np.repeat(np.arange(5), (100, 33, 10, 7, 1))
    keys = [str(i) for i in range(len(labels))]
    held_out = sources.stratified_split(labels, keys, 0.2, seed=0)
    assert held_out.sum() == round(0.2 * len(labels))
    taken = np.bincount(labels[held_out], minlength=5)
    assert np.all(np.abs(taken - 0.2 * np.bincount(labels)) < 1)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_split_leaves_every_class_something_to_train_on(fraction: float):
    labels = np.repeat(np.arange(4), (200, 3, 2, 1))
    held_out = sources.stratified_split(labels, [str(i) for i in range(206)], fraction, seed=1)
    assert set(labels[~held_out]) == {0, 1, 2, 3}


def test_split_depends_on_keys_and_seed_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 500)
    keys = np.array([f"class{label}/{i:03}" for i, label in enumerate(labels)])

    def held_out(order: np.ndarray, seed: int) -> set[str]:
        mask = sources.stratified_split(labels[order], list(keys[order]), 0.25, seed)
        return set(keys[order][mask])

    in_order = np.arange(500)
    assert held_out(in_order, 0) == held_out(rng.permutation(500), 0)
    common = held_out(in_order, 0) & held_out(in_order, 1)
    assert len(common) < 60, "two seeds share about a quarter of 125"


def test_split_is_pinned():
    # A later version that splits otherwise would test on what older runs trained on.
    labels = np.array([0, 1] * 10)
    held_out = sources.stratified_split(labels, [str(i) for i in range(20)], 0.3, seed=0)
    assert np.flatnonzero(held_out).tolist() == [4, 9, 10, 11, 13, 16]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_is_checked(fraction: float):
    labels = np.zeros(10, int)
    keys = [str(i) for i in range(10)]
    raises_one_line(lambda: sources.stratified_split(labels, keys, fraction, 0), fraction)


def test_split_that_holds_out_nothing_is_refused():
    keys = ["0", "1", "2"]
    raises_one_line(lambda: sources.stratified_split(np.arange(3), keys, 0.3, 0), "too few")


# --- digits ---


def test_digits_are_scikit_learns_made_bytes():
    from sklearn.datasets import load_digits

    original = load_digits()
    data = sources.digits()
    assert (len(data.train), len(data.val)) == (1438, 359)
    assert data.class_names == tuple("0123456789")
    seen = set()
    for source in (data.train, data.val):
        for i in range(len(source)):
            example = source[i]
            collection, number = source.example_name(i).split("/")
            assert collection == "digits"
            seen.add(int(number))
            assert example["id"] == i
            assert example["label"] == source.labels[i] == original.target[int(number)]
            assert example["image"].shape == (8, 8, 3)
            assert example["image"].dtype == np.uint8
            difference = example["image"] - original.images[int(number), :, :, None] * 255 / 16
            assert np.abs(difference).max() <= 0.5
    assert seen == set(range(1797))


def test_digits_split_is_stratified_and_by_seed():
    first, again, other = (sources.digits(split_seed=s).val for s in (0, 0, 1))
    assert np.array_equal(first.numbers, again.numbers)
    assert not np.array_equal(first.numbers, other.numbers)
    assert set(np.bincount(first.labels)) <= {34, 35, 36, 37}


# --- idx files ---


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Four small files under the official names, the t10k ones not compressed."""
    rng = np.random.default_rng(0)
    for stem, number in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (number, 5, 4), np.uint8)
        labels = np.arange(number, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / f"{stem}-{name}-ubyte"
            if stem == "train":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return tmp_path


def test_idx_files_are_read(idx_folder: Path):
    data = sources.fashion_mnist(idx_folder)
    assert (len(data.train), len(data.val)) == (30, 20)
    assert data.class_names[9] == "Ankle boot"
    rng = np.random.default_rng(0)
    train, val = (rng.integers(0, 256, (n, 5, 4), np.uint8) for n in (30, 20))
    for source, images, name in ((data.train, train, "train"), (data.val, val, "t10k")):
        for i in (0, 13):
            example = source[i]
            assert np.array_equal(example["image"], np.stack([images[i]] * 3, axis=-1))
            assert (example["label"], example["id"]) == (i % 10, i)
            assert source.example_name(i) == f"fashion-mnist/{name}/{i}"


TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
T10K_LABELS = "t10k-labels-idx1-ubyte"
SOME_IMAGES = np.zeros((30, 5, 4), np.uint8)

BAD_IDX = {
    "cut off": (TRAIN_IMAGES, gzip.compress(os.urandom(4000))[:2000]),
    "empty file": (TRAIN_IMAGES, b""),
    "not gzip": (TRAIN_IMAGES, b"<html>not found</html>"),
    "damaged": (TRAIN_IMAGES, gzip.compress(b"")[:10] + b"\xff" * 100),
    "another type of number": (TRAIN_IMAGES, gzip.compress(b"\0\0\x09" + idx(SOME_IMAGES)[3:])),
    "labels instead of images": (TRAIN_IMAGES, gzip.compress(idx(SOME_IMAGES[:, 0, 0]))),
    "cut off in its header": (TRAIN_IMAGES, gzip.compress(idx(SOME_IMAGES)[:10])),
    "too short": (TRAIN_IMAGES, gzip.compress(idx(SOME_IMAGES)[:-1])),
    "too long": (TRAIN_IMAGES, gzip.compress(idx(SOME_IMAGES) + b"\0")),
    "not compressed, too short": (T10K_LABELS, idx(np.zeros(20, np.uint8))[:-3]),
    "another number of labels": (T10K_LABELS, idx(np.zeros(19, np.uint8))),
    "an eleventh class": (T10K_LABELS, idx(np.full(20, 10, np.uint8))),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_file_is_named(idx_folder: Path, case: str):
    name, content = BAD_IDX[case]
    (idx_folder / name).write_bytes(content)
    raises_one_line(lambda: sources.fashion_mnist(idx_folder), idx_folder / name)


def test_missing_idx_file_and_folder_are_named(idx_folder: Path):
    (idx_folder / TRAIN_IMAGES).unlink()
    raises_one_line(lambda: sources.fashion_mnist(idx_folder), idx_folder, TRAIN_IMAGES)
    nowhere = idx_folder / "nowhere"
    raises_one_line(lambda: sources.fashion_mnist(nowhere), nowhere)


def test_fashion_mnist_itself():
    folder = SHARED_DATA / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    data = sources.load("fashion_mnist", folder=str(folder))
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert np.bincount(data.val.labels).tolist() == [1000] * 10
    # Published mean of the training pixels: 0.2860.
    assert data.train.images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert data.train[0]["image"].shape == (28, 28, 3)
    assert data.class_names[data.train[0]["label"]] == "Ankle boot"


# --- CIFAR-10 ---


@pytest.fixture
def cifar_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of five pictures, of which two are val."""
    monkeypatch.setattr(sources, "CIFAR10_VAL_PER_CLASS", 2)
    rng = np.random.default_rng(0)
    for name in ("ship", "airplane", "frog"):
        (tmp_path / "tree" / "train" / name).mkdir(parents=True)
        for i in range(5):
            image = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / "tree" / "train" / name / f"{i:04}.jpg")
    return tmp_path / "tree"


def pack(tree: Path, archive: Path) -> Path:
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tree / "train", "train")
    return archive


def test_cifar10(cifar_tree: Path):
    data = sources.load("cifar10", folder=str(cifar_tree))
    assert data.class_names == ("airplane", "frog", "ship")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert names(data.val) == [
        f"cifar10/train/{name}/000{i}.jpg" for name in data.class_names for i in (3, 4)
    ]
    for source in (data.train, data.val):
        assert source.images.shape == (len(source), 32, 32, 3)
        for i, name in enumerate(names(source)):
            file = cifar_tree / name.removeprefix("cifar10/")
            assert np.array_equal(source[i]["image"], np.asarray(Image.open(file)))


def test_cifar10_archive_is_the_tree(cifar_tree: Path, tmp_path: Path):
    expected = sources.cifar10(cifar_tree)
    archive = pack(cifar_tree, tmp_path / "packed" / "cifar10_train_jpg.tar.xz")
    for path in (archive, archive.parent):
        data = sources.cifar10(path)
        assert sources.fingerprint(data) == sources.fingerprint(expected)
        assert np.array_equal(data.train.images, expected.train.images)
        assert np.array_equal(data.val.images, expected.val.images)


def test_what_is_wrong_with_cifar10_is_named(cifar_tree: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    raises_one_line(lambda: sources.cifar10(tmp_path / "empty"), tmp_path / "empty", ".tar.xz")
    raises_one_line(lambda: sources.cifar10(tmp_path / "gone"), tmp_path / "gone")
    archive = pack(cifar_tree, tmp_path / "packed" / "cifar10_train_jpg.tar.xz")
    content = archive.read_bytes()
    for damaged in (content[: len(content) // 2], b"text", b""):
        archive.write_bytes(damaged)
        raises_one_line(lambda: sources.cifar10(archive), archive, "fetch it again")
    frog = cifar_tree / "train" / "frog" / "0002.jpg"
    Image.new("RGB", (33, 32)).save(frog)
    raises_one_line(lambda: sources.cifar10(cifar_tree), "frog/0002.jpg", "33×32")
    frog.write_bytes(b"")
    raises_one_line(lambda: sources.cifar10(cifar_tree), frog)
    raises_one_line(lambda: sources.cifar10(pack(cifar_tree, archive)), "frog/0002.jpg", archive)
    for name in ("0002.jpg", "0001.jpg", "0000.jpg"):
        (frog.parent / name).unlink()
    raises_one_line(lambda: sources.cifar10(cifar_tree), "'frog'", "only 2")


def test_an_archive_of_something_else(tmp_path: Path):
    (tmp_path / "train").mkdir()
    archive = pack(tmp_path, tmp_path / "other.tar.xz")
    raises_one_line(lambda: sources.cifar10(archive), archive, "no pictures")


@pytest.mark.slow
def test_cifar10_itself():
    folder = SHARED_DATA / "cifar10_jpg"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    data = sources.load("cifar10", folder=str(folder))
    assert np.bincount(data.train.labels).tolist() == [4500] * 10
    assert np.bincount(data.val.labels).tolist() == [500] * 10
    assert data.class_names[::9] == ("airplane", "truck")
    assert names(data.val)[0] == "cifar10/train/airplane/4500.jpg"
    # Published means of the training pixels, from before they were made JPEG.
    pixels = np.concatenate([data.train.images, data.val.images])
    means = pixels.mean((0, 1, 2)) / 255
    assert means == pytest.approx((0.4914, 0.4822, 0.4465), abs=3e-4)
    # No two pictures are one array in two places.
    assert len({hashlib.sha256(image).digest() for image in pixels}) == 50_000


# --- folders of pictures ---


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 0, 255)).save(path)


def two_trees(root: Path) -> Path:
    for i, name in enumerate(("cat", "dog", "owl")):
        for j in range(3):
            picture(root / "train" / name / f"{j}.png", 10 * i + j)
    picture(root / "val" / "owl" / "x.png", 200)
    picture(root / "val" / "cat" / "y.png", 100)
    return root


def one_tree(root: Path, order: int = 1) -> Path:
    for name in ("apple", "pear", "fig")[::order]:
        for j in range(20)[::order]:
            picture(root / name / f"{j:02}.png")
    return root


def test_train_and_val_trees(tmp_path: Path):
    data = sources.image_folder(two_trees(tmp_path))
    assert data.class_names == ("cat", "dog", "owl")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    # val lacks dogs; its labels are those of train all the same.
    assert data.val.labels.tolist() == [0, 2]
    assert data.val.example_name(1) == str(tmp_path / "val" / "owl" / "x.png")
    example = data.train[4]
    assert example["image"].shape == (5, 6, 3)
    assert example["image"][0, 0].tolist() == [11, 0, 255]
    assert (example["label"], example["id"]) == (1, 4)


def relative_names(source: sources.FolderSource) -> list[str]:
    return [source.example_name(i).removeprefix(f"{source.root}/") for i in range(len(source))]


def test_one_tree_is_split_the_same_everywhere(tmp_path: Path):
    here = sources.image_folder(one_tree(tmp_path / "a"), val_fraction=0.25, split_seed=7)
    there = sources.image_folder(
        one_tree(tmp_path / "b" / "c", order=-1), val_fraction=0.25, split_seed=7
    )
    assert relative_names(here.train) == relative_names(there.train)
    assert relative_names(here.val) == relative_names(there.val)
    everything = relative_names(here.train) + relative_names(here.val)
    assert len(everything) == len(set(everything)) == 60
    assert np.bincount(here.val.labels).tolist() == [5, 5, 5]
    other = sources.image_folder(tmp_path / "a", val_fraction=0.25, split_seed=8)
    assert relative_names(here.val) != relative_names(other.val)


class Backwards:
    """A folder's entries in falling order of name, as `os.scandir` might well list them."""

    scandir = os.scandir

    def __init__(self, folder: str):
        entries = sorted(Backwards.scandir(folder), key=lambda entry: entry.name, reverse=True)
        self.entries = iter(entries)

    def __iter__(self) -> "Backwards":
        return self

    def __next__(self) -> os.DirEntry:
        return next(self.entries)

    def __enter__(self) -> "Backwards":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_listing_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one_tree(tmp_path)
    expected = sources.image_folder(tmp_path)
    monkeypatch.setattr(os, "scandir", Backwards)
    assert next(os.walk(tmp_path))[1] == ["pear", "fig", "apple"]
    data = sources.image_folder(tmp_path)
    assert data.class_names == ("apple", "fig", "pear")
    assert relative_names(data.train) == relative_names(expected.train)
    assert relative_names(data.val) == relative_names(expected.val)


def test_the_two_forms_of_an_accent_split_alike(tmp_path: Path):
    names = {}
    for form, text in (("composed", "caf\u00e9"), ("decomposed", "cafe\u0301")):
        for j in range(12):
            picture(tmp_path / form / text / f"{text}{j}.png")
            picture(tmp_path / form / "tea" / f"{j}.png")
        data = sources.image_folder(tmp_path / form)
        assert data.class_names == ("caf\u00e9", "tea")
        names[form] = [name.replace("cafe\u0301", "caf\u00e9") for name in relative_names(data.val)]
    assert names["composed"] == names["decomposed"]


def test_which_files_count(tmp_path: Path):
    root = one_tree(tmp_path)
    picture(root / "fig" / "upper.PNG")
    picture(root / "fig" / "2021" / "summer" / "nested.jpeg")
    for hidden in (".thumb.png", "._00.png", ".cache/a.png"):
        picture(root / "fig" / hidden)
    picture(root / ".git" / "a.png")
    (root / "fig" / "notes.txt").write_text("figs")
    (root / "README.md").write_text("fruit")
    data = sources.image_folder(root, val_fraction=0.5)
    assert data.class_names == ("apple", "fig", "pear")
    names = set(relative_names(data.train) + relative_names(data.val))
    assert {name for name in names if name.startswith("fig/")} == {
        *(f"fig/{j:02}.png" for j in range(20)),
        "fig/upper.PNG",
        "fig/2021/summer/nested.jpeg",
    }


def test_a_class_may_be_called_train(tmp_path: Path):
    for name in ("car", "train"):
        for j in range(4):
            picture(tmp_path / name / f"{j}.png")
    assert sources.image_folder(tmp_path, val_fraction=0.25).class_names == ("car", "train")


def test_missing_folder(tmp_path: Path):
    raises_one_line(lambda: sources.image_folder(tmp_path / "gone"), tmp_path / "gone")
    picture(tmp_path / "a.png")
    raises_one_line(lambda: sources.image_folder(tmp_path / "a.png"), "not a folder")


def test_no_class_folders(tmp_path: Path):
    picture(tmp_path / "loose.png")
    raises_one_line(lambda: sources.image_folder(tmp_path), tmp_path, "no class folders")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    raises_one_line(lambda: sources.image_folder(tmp_path), tmp_path / "train", "no class folders")


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder(tmp_path: Path, content: str | None, split: str):
    empty = two_trees(tmp_path) / split / "newt"
    empty.mkdir()
    if content:
        (empty / content).write_bytes(b"x")
    raises_one_line(lambda: sources.image_folder(tmp_path), empty, "holds no pictures")


def test_class_in_val_that_train_lacks(tmp_path: Path):
    picture(two_trees(tmp_path) / "val" / "newt" / "0.png")
    raises_one_line(lambda: sources.image_folder(tmp_path), tmp_path / "val", "'newt'")


def test_train_without_val(tmp_path: Path):
    one_tree(tmp_path / "train")
    raises_one_line(lambda: sources.image_folder(tmp_path), tmp_path / "val", tmp_path / "train")
    assert len(sources.image_folder(tmp_path / "train").train) == 48


@pytest.mark.parametrize("one_size", [True, False])
def test_pictures_kept_in_memory(tmp_path: Path, one_size: bool):
    root = two_trees(tmp_path)
    if not one_size:
        Image.new("RGB", (9, 4), (1, 2, 3)).save(root / "train" / "dog" / "1.png")
    expected = sources.image_folder(root)
    data = sources.load("image_folder", folder=root, in_memory=True)
    assert sources.fingerprint(data) == sources.fingerprint(expected)
    assert (data.train.size, data.val.size) == ((5, 6) if one_size else None, (5, 6))
    pictures = [expected.train[i] for i in range(9)]
    for path in root.rglob("*.png"):
        path.unlink()
    for i, example in enumerate(pictures):
        assert np.array_equal(data.train[i]["image"], example["image"])
        assert data.train[i]["label"] == example["label"]
        assert (data.train.file(i), expected.train.file(i).name) == (None, f"{i % 3}.png")
    if one_size:
        batch = data.train.batch(np.array([4, 0, 4]))
        assert np.array_equal(batch, np.stack([pictures[i]["image"] for i in (4, 0, 4)]))


def test_damaged_picture_kept_in_memory_is_named_when_asked_for(tmp_path: Path):
    damaged = two_trees(tmp_path) / "train" / "cat" / "1.png"
    damaged.write_bytes(b"")
    source = sources.image_folder(tmp_path, in_memory=True).train
    for _ in range(2):
        raises_one_line(lambda: source[1], damaged)
    assert source[2]["image"].shape == source[0]["image"].shape
    assert source.size is None  # no array holds them all


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_damaged_picture_is_named_when_read(tmp_path: Path, content: bytes):
    damaged = two_trees(tmp_path) / "train" / "cat" / "1.png"
    damaged.write_bytes(content)
    source = sources.image_folder(tmp_path).train
    assert source[0]["label"] == 0
    raises_one_line(lambda: source[1], damaged)


def test_real_photos(tmp_path: Path):
    archive = SHARED_DATA / "imagenette128" / "imagenette128.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    with zipfile.ZipFile(archive) as photos:
        for split in ("train", "val"):
            names = [n for n in photos.namelist() if n.startswith(split) and n.endswith(".JPEG")]
            photos.extractall(tmp_path, names[:: len(names) // 60])
    data = sources.image_folder(tmp_path)
    assert len(data.class_names) == 10
    assert data.class_names[0] == "n01440764"
    for source in (data.train, data.val):
        assert set(source.labels) == set(range(10))
        for i in range(0, len(source), 7):
            assert source[i]["image"].shape == (128, 128, 3)
            assert data.class_names[source[i]["label"]] in source.example_name(i)
