"""Batches: every example where it belongs, the same after a resume and over any processes."""

import json
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from PIL import Image

from convnext_jax.data import pipeline, sources
from convnext_jax.data.sources import ArraySource
from convnext_jax.data.workers import Workers
from convnext_jax.errors import InputError
from convnext_jax.image import CROP_DRAWS, ConvNextImageProcessor, sample_crop

SIZE = 8


def toy(examples: int, height: int = 12, width: int = 16) -> ArraySource:
    """Noise pictures, so that every crop of every picture is different."""
    rng = np.random.default_rng(examples)
    images = rng.integers(0, 256, (examples, height, width, 3), np.uint8)
    return ArraySource("toy", images, rng.integers(0, 5, examples))


def batches(source: ArraySource, number: int, **arguments: object) -> list[dict[str, np.ndarray]]:
    arguments = {"batch_size": 4, "image_size": SIZE, "seed": 0, "num_workers": 2} | arguments
    with closing(pipeline.train_batches(source, **arguments)) as iterator:
        return list(islice(iterator, number))


def ids(rows: list[dict[str, np.ndarray]]) -> list[int]:
    return np.concatenate([batch["id"] for batch in rows]).tolist()


def joined(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The global batches of processes that share a run."""
    return [
        {
            key: [row for part in step for row in part[key]]
            if key == "unreadable"
            else np.concatenate([part[key] for part in step])
            for key in step[0]
        }
        for step in zip(*parts, strict=True)
    ]


def assert_same(actual: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert np.array_equal(got[key], wanted[key]), key


# --- training ---


def test_train_batch_contents():
    source = toy(10)
    (batch,) = batches(source, 1)
    assert batch.pop("unreadable") == []
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, SIZE, SIZE, 3), np.uint8),
        "label": ((4,), np.int32),
        "id": ((4,), np.int32),
    }
    assert batch["label"].tolist() == source.labels[batch["id"]].tolist()


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 2), (97, 5)])
def test_every_example_exactly_once_an_epoch(examples: int, batch_size: int):
    epochs = 5
    number = -(-epochs * examples // batch_size)
    stream = ids(batches(toy(examples), number, batch_size=batch_size))
    orders = [stream[e * examples : (e + 1) * examples] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(examples))
    if examples > 5:
        assert len(set(map(tuple, orders))) == epochs, "an epoch repeats the order of another"


def test_seeds_give_unrelated_orders_and_crops():
    source = toy(50)
    streams = {seed: ids(batches(source, 50, seed=seed)) for seed in range(4)}
    epochs = [tuple(stream[e * 50 : (e + 1) * 50]) for stream in streams.values() for e in range(4)]
    assert len(set(epochs)) == 16, "an epoch of one seed is an epoch of another"
    first, second = (batches(toy(1), 1, seed=seed)[0]["image"] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_every_visit_of_an_example_is_cropped_anew():
    crops = [b["image"][i].tobytes() for b in batches(toy(1), 10) for i in range(4)]
    assert len(set(crops)) > 35


def test_batches_do_not_depend_on_the_threads():
    source = toy(30)
    expected = batches(source, 20, num_workers=0)
    for num_workers in (1, 5):
        assert_same(batches(source, 20, num_workers=num_workers), expected)


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_the_batches_of_one(process_count: int):
    source = toy(25)
    whole = batches(source, 11, batch_size=12)
    parts = [
        batches(
            source,
            11,
            batch_size=12 // process_count,
            process_index=i,
            process_count=process_count,
        )
        for i in range(process_count)
    ]
    assert_same(joined(parts), whole)


@pytest.mark.parametrize("done", [0, 1, 6, 7, 20])
def test_resume_from_the_state_is_exact(done: int):
    source = toy(25)
    expected = batches(source, done + 10)[done:]
    arguments = {"batch_size": 4, "image_size": SIZE, "seed": 0}
    with closing(pipeline.train_batches(source, **arguments, num_workers=3)) as iterator:
        list(islice(iterator, done))
        state = json.dumps(iterator.get_state())
    with closing(pipeline.train_batches(source, **arguments, num_workers=1)) as iterator:
        next(iterator)  # what is already prefetched must not survive
        iterator.set_state(json.loads(state))
        assert_same(list(islice(iterator, 10)), expected)


def test_resume_through_orbax_is_exact(tmp_path: Path):
    import orbax.checkpoint as ocp

    source = toy(25)
    expected = batches(source, 25)
    arguments = {"batch_size": 4, "image_size": SIZE, "seed": 0, "num_workers": 2}
    with closing(pipeline.train_batches(source, **arguments)) as iterator:
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            list(islice(iterator, 9))
            manager.save(9, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        next(iterator)
    with (
        closing(pipeline.train_batches(source, **arguments)) as iterator,
        ocp.CheckpointManager(tmp_path / "run") as manager,
    ):
        manager.restore(
            9, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator))
        )
        assert_same(list(islice(iterator, 16)), expected[9:])


def test_crops_are_drawn_by_place_in_the_stream():
    """The boxes and the pixels of a process's batch, worked out anew from the definition."""
    source = toy(9)
    scale, ratio = (0.3, 0.9), (0.5, 2)
    arguments = {"crop_scale": scale, "crop_ratio": ratio, "batch_size": 3, "seed": 5}
    second = batches(source, 4, **arguments, process_index=1, process_count=2)
    _, crop_seed = np.random.SeedSequence(5).generate_state(2).tolist()
    for step, batch in enumerate(second):
        draws = np.random.default_rng((crop_seed, step)).random((6, *CROP_DRAWS))[3:]
        for row, number in enumerate(batch["id"]):
            top, left, height, width = sample_crop(draws[row], 12, 16, scale, ratio)
            picture = Image.fromarray(source.images[number])
            picture = picture.crop((left, top, left + width, top + height))
            expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            difference = np.abs(batch["image"][row].astype(int) - expected)
            assert difference.max() <= 1
            assert np.count_nonzero(difference) <= 2


@pytest.fixture
def folder(tmp_path: Path) -> sources.FolderSource:
    """JPEG and PNG files of several sizes."""
    rng = np.random.default_rng(0)
    names = [f"{i}.{('jpg', 'png')[i % 2]}" for i in range(8)]
    for i, name in enumerate(names):
        image = rng.integers(0, 256, (20 + i, 40 - 2 * i, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / name)
    return sources.FolderSource(tmp_path, names, np.arange(8) % 3)


def test_files_give_the_batches_of_the_same_pictures_in_memory(folder: sources.FolderSource):
    in_memory = sources.FolderSource(folder.root, folder.paths, folder.labels)
    in_memory.keep_in_memory()
    assert_same(batches(folder, 6, crop_scale=None), batches(in_memory, 6, crop_scale=None))
    for got, wanted in zip(batches(folder, 6), batches(in_memory, 6), strict=True):
        assert got["id"].tolist() == wanted["id"].tolist()
        assert got["label"].tolist() == wanted["label"].tolist()
        # `photo.read_crop` promises this much of Pillow's pixels.
        difference = np.abs(got["image"].astype(int) - wanted["image"])
        assert difference.max() <= 1
        assert np.count_nonzero(difference) <= 2


def test_processes_that_read_the_files_change_nothing(folder: sources.FolderSource):
    expected = batches(folder, 6, num_workers=0)
    arguments = {"batch_size": 4, "image_size": SIZE, "seed": 0}
    with closing(pipeline.train_batches(folder, **arguments, num_workers=3)) as iterator:
        assert isinstance(iterator, pipeline._BatchesOfWorkers)
        assert_same(list(islice(iterator, 2)), expected[:2])
        state = json.dumps(iterator.get_state())
        next(iterator)
        iterator.set_state(json.loads(state))
        assert_same(list(islice(iterator, 4)), expected[2:])
        processes = iterator._workers._processes
        assert [process.poll() for process in processes] == [None] * 3
    assert None not in [process.poll() for process in processes]


def test_processes_end_where_no_iterator_can_be_made(folder, monkeypatch: pytest.MonkeyPatch):
    started = []

    def workers(*arguments: object) -> Workers:
        started.append(Workers(*arguments))
        return started[0]

    monkeypatch.setattr(pipeline, "Workers", workers)
    monkeypatch.setattr(grain, "ReadOptions", None)
    with pytest.raises(TypeError):
        batches(folder, 1, num_workers=3)
    assert len(started) == 1
    assert None not in [process.poll() for process in started[0]._processes]


def test_no_random_crop_is_the_evaluation_transform():
    source = toy(6)
    for batch in batches(source, 4, crop_scale=None, crop_pct=0.8):
        for row, number in enumerate(batch["id"]):
            expected = pipeline.eval_transform(source.images[number], SIZE, 0.8)
            assert np.array_equal(batch["image"][row], expected)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_pictures_of_the_right_size_are_delivered_as_they_are(
    grey: bool, subset: bool, monkeypatch: pytest.MonkeyPatch
):
    source = toy(30, SIZE, SIZE)
    if grey:
        source = ArraySource("toy", source.images[..., 0], source.labels)
    before = source.images.copy()
    whole = sources.Subset(source, np.arange(30)[::-1]) if subset else source
    expected = [whole[i]["image"] for i in range(30)]
    monkeypatch.setattr(pipeline, "eval_transform", None)  # nothing is done one by one
    arguments = {"batch_size": 7, "image_size": SIZE, "crop_pct": 1.0}
    with closing(pipeline.eval_batches(whole, **arguments)) as iterator:
        passes = [*iterator, *batches(whole, 9, crop_scale=None, **arguments)]
    for batch in passes:
        assert batch["image"].shape == (7, SIZE, SIZE, 3)
        for image, number, label in zip(batch["image"], batch["id"], batch["label"], strict=True):
            assert np.array_equal(image, expected[number] if number >= 0 else np.zeros_like(image))
            assert label == (whole.labels[number] if number >= 0 else 0)
        batch["image"][:] = 7  # the caller's own
    assert np.array_equal(source.images, before)


def test_large_pictures_of_the_right_size_are_not_warped():
    # From 384 pixels on the whole picture is resized: to its own size, here.
    source = toy(2, 384, 384)
    (batch,) = batches(source, 1, batch_size=2, image_size=384, crop_scale=None, crop_pct=0.8)
    assert np.array_equal(batch["image"], source.images[batch["id"]])
    small = toy(2, 30, 30)
    (batch,) = batches(small, 1, batch_size=2, image_size=384, crop_scale=None)
    assert batch["image"].shape == (2, 384, 384, 3)


# --- evaluation ---


def test_evaluation_uses_no_more_threads_than_help():
    before = set(threading.enumerate())
    arguments = {"batch_size": 1, "image_size": SIZE}
    with closing(pipeline.eval_batches(toy(100), **arguments, num_workers=50)) as iterator:
        next(iterator)
        # grain keeps one of its own, which fetches the batches.
        assert 0 < len(set(threading.enumerate()) - before) <= pipeline._MOST_THREADS + 1


@pytest.mark.parametrize("process_count", [1, 2, 3])
@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (1, 4), (7, 7), (9, 2)])
def test_evaluation_counts_every_example_once(examples: int, batch_size: int, process_count: int):
    source = toy(examples)
    steps = pipeline.eval_steps(examples, batch_size, process_count)
    assert (steps - 1) * batch_size * process_count < examples
    passes = []
    for i in range(process_count):
        iterator = pipeline.eval_batches(
            source,
            batch_size=batch_size,
            image_size=SIZE,
            process_index=i,
            process_count=process_count,
        )
        with closing(iterator):
            passes.append(list(iterator))
        assert len(passes[-1]) == steps

    in_order = [batch for step in zip(*passes, strict=True) for batch in step]
    for batch in in_order:
        assert batch["image"].shape == (batch_size, SIZE, SIZE, 3)
        assert batch["image"].dtype == np.uint8
        assert (batch["label"].dtype, batch["id"].dtype) == (np.int32, np.int32)
        assert batch["mask"].dtype == np.float32
    (rows,) = joined([[batch] for batch in in_order])
    assert rows["unreadable"] == []
    real = rows["mask"] == 1
    assert real.sum() == rows["mask"].sum() == examples
    assert rows["id"][real].tolist() == list(range(examples))
    assert rows["label"][real].tolist() == source.labels.tolist()
    assert set(rows["id"][~real]) <= {-1}
    assert not rows["image"][~real].any()
    assert not rows["label"][~real].any()
    for image, number in zip(rows["image"][real], rows["id"][real], strict=True):
        assert np.array_equal(image, pipeline.eval_transform(source.images[number], SIZE))


# Worked out by hand from the rule: the resized (width, height), then the crop's left and top edge.
@pytest.mark.parametrize(
    ("width", "height", "image_size", "crop_pct", "resized", "left", "top"),
    [
        (500, 375, 224, 0.875, (341, 256), 58, 16),
        (375, 500, 224, 0.875, (256, 341), 16, 58),
        (40, 40, 32, 0.875, (36, 36), 2, 2),
        (33, 21, 10, 1.0, (15, 10), 2, 0),
        (7, 20, 9, 0.9, (10, 28), 0, 9),
        (50, 40, 384, 0.875, (384, 384), 0, 0),
        (20, 30, 383, 1.0, (383, 574), 0, 95),
    ],
)
def test_evaluation_transform(
    width: int,
    height: int,
    image_size: int,
    crop_pct: float,
    resized: tuple[int, int],
    left: int,
    top: int,
):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    whole = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC))
    expected = whole[top : top + image_size, left : left + image_size]
    assert np.array_equal(pipeline.eval_transform(image, image_size, crop_pct), expected)


def test_evaluation_transform_pads_what_is_too_small():
    image = np.full((4, 7, 3), 255, np.uint8)
    result = pipeline.eval_transform(image, 9, crop_pct=9 / 4)
    assert result.shape == (9, 9, 3)
    # Five rows are missing, the larger half of them above; one column on each side.
    assert np.flatnonzero(result.any(axis=(1, 2))).tolist() == [3, 4, 5, 6]
    assert np.flatnonzero(result.any(axis=(0, 2))).tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("image_size", "crop_pct", "resample"),
    [
        (32, 0.875, Image.Resampling.BICUBIC),
        (31, 0.9, Image.Resampling.BILINEAR),
        (20, 1.25, Image.Resampling.BICUBIC),
        (384, 0.875, Image.Resampling.BICUBIC),
    ],
)
def test_evaluation_equals_the_image_processor(
    image_size: int, crop_pct: float, resample: Image.Resampling
):
    processor = ConvNextImageProcessor(
        size={"shortest_edge": image_size},
        crop_pct=crop_pct,
        resample=resample,
        do_rescale=False,
        do_normalize=False,
    )
    rng = np.random.default_rng(0)
    for height, width in ((40, 40), (61, 47), (30, 53)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = processor(image, return_tensors="np", data_format="channels_last")
        actual = pipeline.eval_transform(image, image_size, crop_pct, resample)
        assert np.array_equal(actual, expected["pixel_values"][0])


# --- when things go wrong ---


class Damaged(ArraySource):
    """A source of which every third picture, and one more, cannot be read."""

    def __getitem__(self, index: int) -> dict:
        if index % 3 == 0 or index == 5:
            raise InputError(f"toy/{index}: cannot be read; remove it")
        return super().__getitem__(index)


@pytest.fixture(params=["files", "kept in memory", "no files"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[sources.Source, set[int]]:
    """A source of 24 pictures, and those of them that cannot be read."""
    if request.param == "no files":
        source = toy(24)
        source.__class__ = Damaged
        source.size = None
        return source, {*range(0, 24, 3), 5}
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(24)]
    for i, name in enumerate(names):
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 40 - i, 3), np.uint8))
        # What the name says of the format matters as little here as elsewhere.
        image.save(tmp_path / name, format="PNG" if i % 2 else "JPEG")
    content = (tmp_path / names[3]).read_bytes()
    (tmp_path / names[3]).write_bytes(content[: len(content) // 2])
    content = (tmp_path / names[20]).read_bytes()
    (tmp_path / names[20]).write_bytes(content[: len(content) // 2])
    (tmp_path / names[8]).write_bytes(b"")
    (tmp_path / names[13]).write_text("not a picture")
    (tmp_path / names[17]).unlink()
    source = sources.FolderSource(tmp_path, names, np.arange(24) % 5)
    if request.param == "kept in memory":
        source.keep_in_memory()
    return source, {3, 8, 13, 17, 20}


@pytest.mark.parametrize("crop_scale", [(0.08, 1.0), None])
def test_what_cannot_be_read_is_replaced_and_listed(damaged, crop_scale):
    source, bad = damaged
    epochs = batches(source, 18, crop_scale=crop_scale)  # three
    missed = [number for batch in epochs for number, _ in batch["unreadable"]]
    assert set(missed) == bad
    assert len(missed) >= 3 * len(bad)
    for batch in epochs:
        assert batch["image"].shape == (4, SIZE, SIZE, 3)
        assert not bad & set(batch["id"].tolist())
        assert batch["label"].tolist() == source.labels[batch["id"]].tolist()
        for number, reason in batch["unreadable"]:
            with pytest.raises(InputError) as caught:
                source[number]
            assert reason == str(caught.value)
        if crop_scale is None:
            for image, number in zip(batch["image"], batch["id"].tolist(), strict=True):
                expected = pipeline.eval_transform(source[number]["image"], SIZE)
                assert np.array_equal(image, expected)
    good = set(range(24)) - bad
    for epoch in range(3):  # what can be read is met in every epoch as it would be without
        assert good <= set(ids(epochs[6 * epoch : 6 * epoch + 6]))


def test_replacements_are_drawn_by_place_in_the_stream(damaged):
    """The examples and the pixels of batches, worked out anew from the definition."""
    source, bad = damaged
    _, crop_seed, replace_seed = np.random.SeedSequence(5).generate_state(3).tolist()
    order = ids(batches(toy(24), 6, seed=5, batch_size=4))
    tried = []
    for step, batch in enumerate(batches(source, 6, seed=5)):
        expected, missed = order[4 * step : 4 * step + 4], []
        for place, number in enumerate(expected):
            spare = np.random.default_rng((replace_seed, step, place)).integers(24, size=32)
            chain = [number, *spare.tolist()]
            tries = next(i for i, number in enumerate(chain) if number not in bad)
            missed += chain[:tries]
            expected[place] = chain[tries]
            tried.append(tries)
        assert batch["id"].tolist() == expected
        assert [number for number, _ in batch["unreadable"]] == missed
        draws = np.random.default_rng((crop_seed, step)).random((4, *CROP_DRAWS))
        for row, number in enumerate(expected):
            picture = source[number]["image"]
            top, left, height, width = sample_crop(
                draws[row], *picture.shape[:2], (0.08, 1.0), (3 / 4, 4 / 3)
            )
            picture = Image.fromarray(picture).crop((left, top, left + width, top + height))
            wanted = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            assert np.abs(batch["image"][row].astype(int) - wanted).max() <= 1
    assert max(tried) > 1, "no replacement was replaced"


def test_replacements_depend_on_neither_threads_nor_processes(damaged):
    source, _ = damaged
    expected = batches(source, 10, batch_size=8, num_workers=0)
    for num_workers in (1, 3):  # from three on, files are read by processes of their own
        assert_same(batches(source, 10, batch_size=8, num_workers=num_workers), expected)
    for process_count in (2, 4):
        shared = {"batch_size": 8 // process_count, "process_count": process_count}
        parts = [batches(source, 10, **shared, process_index=i) for i in range(process_count)]
        assert_same(joined(parts), expected)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_replacements_are_the_same_after_a_resume(damaged, num_workers: int):
    source, _ = damaged
    expected = batches(source, 12)
    arguments = {"batch_size": 4, "image_size": SIZE, "seed": 0, "num_workers": num_workers}
    with closing(pipeline.train_batches(source, **arguments)) as iterator:
        list(islice(iterator, 5))
        state = json.dumps(iterator.get_state())
    with closing(pipeline.train_batches(source, **arguments)) as iterator:
        next(iterator)
        iterator.set_state(json.loads(state))
        assert_same(list(islice(iterator, 7)), expected[5:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_where_nothing_can_be_read_the_caller_is_told(tmp_path: Path, num_workers: int):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    source = sources.FolderSource(tmp_path, ["a.jpg", "b.jpg"], np.zeros(2, int))
    for crop_scale in ((0.08, 1.0), None):
        with pytest.raises(InputError, match=r"33 examples drawn .* the last: .*[ab]\.jpg"):
            batches(source, 1, num_workers=num_workers, crop_scale=crop_scale)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_leaves_out_what_cannot_be_read(damaged, process_count: int):
    source, bad = damaged
    arguments = {"batch_size": 5, "image_size": SIZE, "process_count": process_count}
    parts = []
    for i in range(process_count):
        with closing(pipeline.eval_batches(source, **arguments, process_index=i)) as iterator:
            parts.append(list(iterator))
    in_order = [[batch] for step in zip(*parts, strict=True) for batch in step]
    (rows,) = joined(in_order)
    real = rows["mask"] == 1
    good = sorted(set(range(24)) - bad)
    assert rows["id"][real].tolist() == good
    assert rows["label"][real].tolist() == source.labels[good].tolist()
    for image, number in zip(rows["image"][real], good, strict=True):
        expected = pipeline.eval_transform(source[number]["image"], SIZE)
        assert np.array_equal(image, expected)
    assert [number for number, _ in rows["unreadable"]] == sorted(bad)
    assert set(rows["id"][~real]) == {-1}
    for key in ("image", "label", "mask"):
        assert not rows[key][~real].any()


class Slow(ArraySource):
    """A source that counts what is read and takes its time."""

    reads = 0

    def __getitem__(self, index: int) -> dict:
        self.reads += 1
        time.sleep(0.005)
        return super().__getitem__(index)


def test_close_abandons_what_is_queued():
    source = toy(100)
    source.__class__ = Slow
    before = set(threading.enumerate())
    iterator = pipeline.train_batches(source, batch_size=20, image_size=SIZE, seed=0, num_workers=1)
    next(iterator)
    iterator.close()
    workers = set(threading.enumerate()) - before
    assert workers
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()
    # One batch was delivered and one was under way; the queue held more.
    assert source.reads <= 2 * 20


def test_prefetching_is_bounded():
    source = toy(100)
    source.__class__ = Slow
    iterator = pipeline.train_batches(source, batch_size=2, image_size=SIZE, seed=0, num_workers=2)
    with closing(iterator):
        next(iterator)
        time.sleep(0.5)
        assert source.reads <= 2 * (1 + 2 + 2)
