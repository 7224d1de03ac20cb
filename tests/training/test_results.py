"""The pictures of the augmentation in a run's report."""

import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from convnext_jax.data import sources
from convnext_jax.training.config import default_config
from convnext_jax.training.results import augmentation_grid


def grid(**changes):
    config = default_config()
    config.update({"image_size": 8, "crop_pct": 1.0, "augment": "", "erase": 0.0, "flip": 0.0})
    config.update({"color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0})
    config.update(changes)
    dataset = sources.load("digits")
    pictures, captions = augmentation_grid(FrozenConfigDict(config), dataset, rows=4, draws=3)
    assert pictures.shape == (4, 4, 8, 8, 3)
    assert pictures.dtype == np.uint8
    assert [len(row) for row in captions] == [4] * 4
    return dataset, pictures, captions


def test_every_row_starts_with_an_example_as_it_is():
    dataset, pictures, captions = grid()
    for row, index in enumerate(np.linspace(0, len(dataset.train) - 1, 4).astype(int)):
        example = dataset.train[int(index)]
        np.testing.assert_array_equal(pictures[row, 0], example["image"])
        assert captions[row] == [str(example["label"])] * 4
    assert len(np.unique(pictures[:, 0].reshape(4, -1), axis=0)) == 4


def test_examples_that_cannot_be_read_are_not_among_them(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    # Of the places 0, 3, 7 and 11: the next, that of the next place, and none.
    broken = [0, 3, 4, 5, 6, 11]
    for i in broken:
        (tmp_path / f"{i}.png").write_bytes(b"")
    source = sources.FolderSource(tmp_path, [f"{i}.png" for i in range(12)], np.arange(12))
    config = default_config()
    config.update({"image_size": 8, "crop_pct": 1.0, "augment": "", "mixup": 0.0, "cutmix": 0.0})
    names = tuple(map(str, range(12)))
    pictures, captions = augmentation_grid(
        FrozenConfigDict(config), sources.Dataset(source, source, names), rows=4, draws=3
    )
    assert [row[0] for row in captions] == ["1", "7"]
    assert pictures.shape == (2, 4, 8, 8, 3)
    for row, index in enumerate((1, 7)):
        np.testing.assert_array_equal(pictures[row, 0], source[index]["image"])
        assert captions[row] == [str(index)] * 4


def test_each_draw_is_another_crop_of_its_own_row():
    _, pictures, _ = grid(crop_scale=(0.6, 0.8))
    for row in range(4):
        assert not np.array_equal(pictures[row, 1], pictures[row, 2])
        # Most of the picture: closer to its own original than to the others'.
        distance = np.abs(pictures[:, 0].astype(int) - pictures[row, 1]).mean(axis=(1, 2, 3))
        assert distance.argmin() == row


def test_without_anything_random_the_draws_are_the_example():
    _, pictures, _ = grid(shift=1, crop_scale=(1.0, 1.0))
    shifted = [p for row in pictures for p in row[1:] if not np.array_equal(p, row[0])]
    assert 4 <= len(shifted) <= 12  # of 12, each unmoved with probability 1/9


def test_mixed_pictures_name_both_classes():
    dataset, _, captions = grid(mixup=0.8, label_smoothing=0.0)
    names = [row[0] for row in captions]
    mixed = [c for row in captions for c in row[1:] if "%" in c]
    assert mixed
    for caption in mixed:
        shares, classes = zip(*(part.split() for part in caption.split(", ")), strict=True)
        assert sum(int(share.rstrip("%")) for share in shares) in (99, 100, 101)
        assert set(classes) <= set(names)
    assert dataset.class_names[0] == "0"
