"""From a source to batches of uint8 pictures in host memory, with grain.

The host decodes, crops and resizes; everything after that (flips, colour, normalisation, mixing)
belongs on the accelerator. Batch k is a function of the arguments and k alone: the threads only
decide when it is ready, and a process of a larger run reads its rows of the same global batch. The
state of an iterator is therefore the number of the next batch.

A picture that cannot be read does not stop a run. In training another example takes its place,
which is drawn by that place; an evaluation leaves it out. Every batch lists what it did without.

grain's element is a whole batch, given by its number: small pictures in memory are delivered by one
indexing of an array, which no call per picture could match.

Close an iterator when done with it (`with contextlib.closing(train_batches(...)) as batches:`),
otherwise an interrupted program finishes the batches already under way before it ends.
"""

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from convnext_jax.data import photo
from convnext_jax.data.dataset import Source
from convnext_jax.data.encoded import Encoded
from convnext_jax.data.sources import ArraySource
from convnext_jax.data.workers import Workers, cores
from convnext_jax.errors import InputError
from convnext_jax.image.crop import CROP_DRAWS, sample_crop
from convnext_jax.image.processor import resize_rule

# More threads than this only wait for each other's interpreter lock.
_MOST_THREADS = 8
# For fewer than this, processes of their own gain less than their start costs.
_FEWEST_PROCESSES = 3
_MOST_PROCESSES = 16  # by default: each takes some 100 MB
_MOST_AHEAD = 8 * 2**30  # bytes of batches that wait for the accelerator
# Examples drawn to replace one that cannot be read: where 60 % of all cannot, one place in ten
# million has none that can.
_MOST_DRAWS = 32

# Why examples could not be read, by their row among those asked for.
Failures = dict[int, str]


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    crop_scale: tuple[float, float] | None = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    crop_pct: float = 224 / 256,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    num_workers: int | None = None,
    parts: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless shuffled batches, each epoch in a new order, each visit of an example newly cropped.

    The stream of examples is the epochs one after the other, each holding every example exactly
    once; a batch may span two epochs. Step k of the run is the stream's k-th stretch of
    `batch_size * process_count` examples, and of each of its `parts` process i has the i-th share:
    the global batch and its parts, crops included, do not depend on how many processes share them.

    An example that cannot be read is replaced by one drawn from all of them, by the step and the
    place in the global batch, and that by the next one drawn until one can be read. So what a batch
    holds still depends on nothing but the arguments and the files.

    Args:
      source: the examples.
      batch_size: examples in a batch of this process, B.
      image_size: side of the square pictures delivered, S.
      seed: of the order and the crops.
      crop_scale: range of the random crop's area as a share of the picture's; None for no random
        crop but the transform of `eval_batches`.
      crop_ratio: range of the random crop's width / height.
      crop_pct: as in `eval_batches`, when `crop_scale` is None.
      resample: Pillow's filter, applied to the crop after it has been cut out; see
        `photo.read_crop` for the pixels.
      num_workers: threads that make batches, each, where `_FEWEST_PROCESSES` or more of them read
        picture files, with a process of its own to do it in; 0 makes each batch when it is asked
        for. None: one for each core of this host, but at most `_MOST_PROCESSES`, or `_MOST_THREADS`
        without processes.
      parts: that a batch is accumulated in, one after the other; a divisor of `batch_size`.
      process_index: which of `process_count` processes this one is.
      process_count: processes that share the run.

    Returns:
      An iterator over {"image": uint8 [B, S, S, 3], "label": int32 [B], "id": int32 [B],
      "unreadable": list of (id, why)} that `get_state` and `set_state`, or grain's CheckpointSave
      and CheckpointRestore, resume exactly. "unreadable" lists what this process could not read
      for the batch, in the order of the rows and draws; the other three are of what it read.
      `next` raises `InputError` where `_MOST_DRAWS` examples drawn for a place cannot be read.
    """
    if crop_scale is None and source.size is not None:
        # The same at every visit, so that it is done once; at 1.0 the second time changes nothing.
        source, crop_pct = _transformed(source, image_size, crop_pct, resample), 1.0
    shuffle_seed, crop_seed, replace_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    stream = _shuffled_stream(len(source), shuffle_seed)
    crop = {"size": image_size, "scale": crop_scale, "ratio": crop_ratio, "resample": resample}
    read_crops = functools.partial(_read_crops, **crop)
    workers = None
    are_files = crop_scale is not None and source.file(0) is not None
    if are_files:
        num_workers = min(cores(), _MOST_PROCESSES) if num_workers is None else num_workers
        if num_workers >= _FEWEST_PROCESSES:
            read_crops = workers = Workers(read_crops, num_workers)

    def read(indices: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, Failures]:
        if crop_scale is None:
            return _evaluation_images(source, indices, image_size, crop_pct, resample)
        if are_files:
            return read_crops([source.file(index) for index in indices.tolist()], draws)
        return _crops(source, indices, draws, **crop)

    whole = batch_size * process_count
    own = np.arange(whole).reshape(parts, process_count, -1)[:, process_index].reshape(-1)

    def make_batch(step: int) -> dict[str, Any]:
        indices = stream(step * whole, whole)[own]
        # The numbers of the whole global batch, of which this process takes its rows: the crop of
        # an example goes by its place in the run's stream.
        rng = np.random.default_rng((crop_seed, step))
        draws = rng.random((whole, *CROP_DRAWS))[own]
        images, failures = read(indices, draws)
        spares: dict[int, Iterator[int]] = {}  # by row, as what follows
        unreadable: dict[int, list[tuple[int, str]]] = {}
        while failures:
            rows = sorted(failures)
            for row in rows:
                unreadable.setdefault(row, []).append((int(indices[row]), failures[row]))
                if row not in spares:
                    rng = np.random.default_rng((replace_seed, step, int(own[row])))
                    spares[row] = iter(rng.integers(len(source), size=_MOST_DRAWS).tolist())
                spare = next(spares[row], None)
                if spare is None:
                    raise InputError(
                        f"{1 + _MOST_DRAWS} examples drawn one after the other cannot be read: "
                        f"check where the data lie; the last: {failures[row]}"
                    )
                indices[row] = spare
            images[rows], again = read(indices[rows], draws[rows])
            failures = {rows[i]: reason for i, reason in again.items()}
        return {
            "image": images,
            "label": source.labels[indices],
            "id": indices.astype(np.int32),
            "unreadable": [failure for row in sorted(unreadable) for failure in unreadable[row]],
        }

    try:
        batches = _iterator(make_batch, sys.maxsize, num_workers, batch_size * image_size**2 * 3)
    except BaseException:
        if workers is not None:
            workers.close()
        raise
    return batches if workers is None else _BatchesOfWorkers(batches, workers)


class _BatchesOfWorkers(grain.DatasetIterator):
    """An iterator that, when it is closed, ends the processes that work for it."""

    def __init__(self, batches: grain.DatasetIterator, workers: Workers):
        super().__init__(batches)
        self._batches, self._workers = batches, workers

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._batches.close()
        self._workers.close()


def _read_crops(
    files: Sequence[Encoded],
    draws: np.ndarray,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resample: Image.Resampling,
) -> tuple[np.ndarray, Failures]:
    """Random crops of N picture files by their draws [N, *CROP_DRAWS]: uint8 [N, S, S, 3]."""
    numbers = draws.tolist()

    def read(row: int, out: np.ndarray) -> None:
        pick_box = functools.partial(sample_crop, numbers[row], scale=scale, ratio=ratio)
        photo.read_crop(files[row], pick_box, size, resample, out=out)

    return _rows(len(files), size, read)


def _crops(
    source: Source,
    indices: np.ndarray,
    draws: np.ndarray,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resample: Image.Resampling,
) -> tuple[np.ndarray, Failures]:
    """The same of N examples that are no files."""
    indices, numbers = indices.tolist(), draws.tolist()

    def read(row: int, out: np.ndarray) -> None:
        image = source[indices[row]]["image"]
        top, left, height, width = sample_crop(numbers[row], *image.shape[:2], scale, ratio)
        crop = Image.fromarray(image[top : top + height, left : left + width])
        # In one call: a small picture's resize in several, as `photo` has it, leaves the threads
        # waiting for each other's interpreter lock.
        out[...] = crop.resize((size, size), resample)

    return _rows(len(indices), size, read)


def _rows(
    number: int, size: int, read: Callable[[int, np.ndarray], None]
) -> tuple[np.ndarray, Failures]:
    """Pictures uint8 [number, size, size, 3] from `read(row, out)`; 0 where that could not read."""
    images, failures = np.empty((number, size, size, 3), np.uint8), {}
    for row in range(number):
        try:
            read(row, images[row])
        except InputError as error:
            images[row] = 0
            failures[row] = str(error)
    return images, failures


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    crop_pct: float = 224 / 256,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    num_workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Every example exactly once, in order, in `eval_steps` batches for every process.

    One that cannot be read counts as padding does: nothing could take its place.

    Args:
      source: the examples.
      batch_size: rows in a batch of this process, B; the last batches are padded to it.
      image_size: side of the square pictures delivered, S.
      crop_pct: share of the resized short side that the centre crop keeps; see `eval_transform`.
      resample: Pillow's filter.
      num_workers: threads that make batches, of which more than `_MOST_THREADS` are not used; None:
        one for each core of this host.
      process_index: which of `process_count` processes this one is.
      process_count: processes that share the pass.

    Returns:
      An iterator over {"image": uint8 [B, S, S, 3], "label": int32 [B], "id": int32 [B], "mask":
      float32 [B], "unreadable": list of (id, why)}. Rows that pad, and those of the unreadable
      examples, have mask 0, image and label 0, and id -1.
    """

    def make_batch(step: int) -> dict[str, Any]:
        first = (step * process_count + process_index) * batch_size
        indices = np.arange(min(first, len(source)), min(first + batch_size, len(source)))
        pad = (0, batch_size - len(indices))
        images, failures = _evaluation_images(source, indices, image_size, crop_pct, resample)
        labels, ids = source.labels[indices], indices.astype(np.int32)
        mask = np.ones(len(indices), np.float32)
        failed = list(failures)
        labels[failed], ids[failed], mask[failed] = 0, -1, 0
        return {
            "image": np.pad(images, (pad, (0, 0), (0, 0), (0, 0))) if pad[1] else images,
            "label": np.pad(labels, pad),
            "id": np.pad(ids, pad, constant_values=-1),
            "mask": np.pad(mask, pad),
            "unreadable": [(int(indices[row]), reason) for row, reason in failures.items()],
        }

    steps = eval_steps(len(source), batch_size, process_count)
    if num_workers is not None:
        num_workers = min(num_workers, _MOST_THREADS)
    return _iterator(make_batch, steps, num_workers, batch_size * image_size**2 * 3)


def eval_steps(examples: int, batch_size: int, process_count: int = 1) -> int:
    """Batches that `eval_batches` gives each process."""
    return math.ceil(examples / (batch_size * process_count))


def eval_transform(
    image: np.ndarray,
    image_size: int,
    crop_pct: float = 224 / 256,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """The published evaluation transform: uint8 [H, W, 3] to uint8 [S, S, 3].

    By the image processor's own `resize_rule`, with Pillow, to whose pixels the processor's are
    equal: a model is evaluated on what it will be given later.
    """
    resized, crop = resize_rule(image.shape[0], image.shape[1], image_size, crop_pct)
    picture = Image.fromarray(image).resize(resized[::-1], resample)
    if crop is not None:
        top, left, height, width = crop
        picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture)


def _evaluation_images(
    source: Source,
    indices: np.ndarray,
    image_size: int,
    crop_pct: float,
    resample: Image.Resampling,
) -> tuple[np.ndarray, Failures]:
    """`eval_transform` of N examples: uint8 [N, S, S, 3]."""
    if source.size is not None and _stays(source.size, image_size, crop_pct):
        return source.batch(indices), {}

    def read(row: int, out: np.ndarray) -> None:
        image = source[int(indices[row])]["image"]
        out[...] = eval_transform(image, image_size, crop_pct, resample)

    return _rows(len(indices), image_size, read)


def _stays(size: tuple[int, int], image_size: int, crop_pct: float) -> bool:
    """Whether `eval_transform` changes nothing of pictures of this height and width."""
    resized, crop = resize_rule(*size, image_size, crop_pct)
    return resized == size and crop in (None, (0, 0, *size))


def _transformed(
    source: Source, image_size: int, crop_pct: float, resample: Image.Resampling
) -> Source:
    """A source in memory with every picture transformed as in an evaluation."""
    if _stays(source.size, image_size, crop_pct):
        return source
    images = np.empty((len(source), image_size, image_size, 3), np.uint8)
    for index in range(len(source)):
        images[index] = eval_transform(source[index]["image"], image_size, crop_pct, resample)
    return ArraySource(source.example_name(0), images, source.labels)


def _shuffled_stream(examples: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """The epochs end to end, each a permutation of the examples, as a function of (first, count).

    It gives the indices [count] from place `first` of the stream on.
    """
    lock = threading.Lock()  # so that one thread makes the order and the others wait for it

    @functools.lru_cache(maxsize=3)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(examples)

    def stretch(first: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            epoch, place = divmod(first, examples)
            with lock:
                part = order(epoch)[place : place + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    return stretch


def _iterator(
    make_batch: Callable[[int], dict[str, Any]],
    batches: int,
    num_workers: int | None,
    batch_bytes: int,
) -> grain.DatasetIterator:
    if num_workers is None:
        num_workers = min(cores(), _MOST_THREADS)
    # Counted in batches, which may be large: enough that no thread waits, but no more than fits.
    ahead = min(num_workers + 2, max(2, _MOST_AHEAD // batch_bytes))
    options = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(batches).map(make_batch).to_iter_dataset(options))
