"""From a source to batches of uint8 pictures in host memory, with grain.

The host decodes, crops and resizes; everything after that (flips, colour, normalisation, mixing)
belongs on the accelerator. Batch k is a function of the arguments and k alone: the threads only
decide when it is ready, and a process of a larger run reads its rows of the same global batch. The
state of an iterator is therefore the number of the next batch.

Close an iterator when done with it (`with contextlib.closing(train_batches(...)) as batches:`),
otherwise an interrupted program finishes the batches already under way before it ends.
"""

import math
import os

import grain
import numpy as np
from PIL import Image

from convnext_jax.data.sources import Source
from convnext_jax.image.augment import sample_crop
from convnext_jax.image.processor import resize_rule

# A thread makes whole batches, and Pillow releases the interpreter lock while it decodes and
# resizes; beyond this number the lock is what they wait for.
_DEFAULT_THREADS = min(os.cpu_count() or 1, 16)


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
    num_threads: int = _DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless shuffled batches, each epoch in a new order, each visit of an example newly cropped.

    The stream of examples is the epochs one after the other, each holding every example exactly
    once; a batch may span two epochs. Step k of the run is the stream's k-th stretch of
    `batch_size * process_count` examples, and process i has the i-th `batch_size` of them: the
    global batch, crops included, does not depend on how many processes share it.

    Args:
      source: the examples.
      batch_size: examples in a batch of this process, B.
      image_size: side of the square pictures delivered, S.
      seed: of the order and the crops.
      crop_scale: range of the random crop's area as a share of the picture's; None for no random
        crop but the transform of `eval_batches`.
      crop_ratio: range of the random crop's width / height.
      crop_pct: as in `eval_batches`, when `crop_scale` is None.
      resample: Pillow's filter, applied to the crop.
      num_threads: threads that make batches.
      process_index: which of `process_count` processes this one is.
      process_count: processes that share the run.

    Returns:
      An iterator over {"image": uint8 [B, S, S, 3], "label": int32 [B], "id": int32 [B]} that
      `get_state` and `set_state`, or grain's CheckpointSave and CheckpointRestore, resume exactly.
      A picture that cannot be read raises the source's `InputError` from `next`.
    """
    # Explicit seeds, because the ones grain derives change with the number of stages before them.
    # Hashing keeps the epochs of neighbouring seeds apart: grain shuffles epoch e by seed + e.
    shuffle_seed, crop_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))

    def prepare(example: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if crop_scale is None:
            image = eval_transform(example["image"], image_size, crop_pct, resample)
        else:
            image = _random_crop(
                example["image"], image_size, crop_scale, crop_ratio, resample, rng
            )
        return _record(image, example["label"], example["id"])

    return iter(
        grain.MapDataset.source(source)
        .shuffle(seed=shuffle_seed)
        .repeat()
        # Before the batches are dealt out, so that the generator of a crop goes by the place in
        # the run's stream; after it, every process would draw the same crops.
        .random_map(prepare, seed=crop_seed)
        .batch(batch_size, drop_remainder=True)[process_index::process_count]
        .to_iter_dataset(_read_options(num_threads))
    )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    crop_pct: float = 224 / 256,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    num_threads: int = _DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Every example exactly once, in order, in `eval_steps` batches for every process.

    Args:
      source: the examples.
      batch_size: rows in a batch of this process, B; the last batches are padded to it.
      image_size: side of the square pictures delivered, S.
      crop_pct: share of the resized short side that the centre crop keeps; see `eval_transform`.
      resample: Pillow's filter.
      num_threads: threads that make batches.
      process_index: which of `process_count` processes this one is.
      process_count: processes that share the pass.

    Returns:
      An iterator over {"image": uint8 [B, S, S, 3], "label": int32 [B], "id": int32 [B], "mask":
      float32 [B]}. Rows that pad have mask 0, image and label 0, and id -1.
    """

    def prepare(index: int) -> dict[str, np.ndarray]:
        if index >= len(source):
            padding = np.zeros((image_size, image_size, 3), np.uint8)
            return _record(padding, label=0, id=-1) | {"mask": np.float32(0)}
        example = source[index]
        image = eval_transform(example["image"], image_size, crop_pct, resample)
        return _record(image, example["label"], example["id"]) | {"mask": np.float32(1)}

    rows = eval_steps(len(source), batch_size, process_count) * batch_size * process_count
    return iter(
        grain.MapDataset.range(rows)
        .map(prepare)
        .batch(batch_size)[process_index::process_count]
        .to_iter_dataset(_read_options(num_threads))
    )


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


def _random_crop(
    image: np.ndarray,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resample: Image.Resampling,
    rng: np.random.Generator,
) -> np.ndarray:
    top, left, height, width = sample_crop(rng, image.shape[0], image.shape[1], scale, ratio)
    # Cut first: given the box, Pillow's resize would let pixels outside of it bleed in.
    crop = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(crop.resize((image_size, image_size), resample))


def _record(image: np.ndarray, label: int, id: int) -> dict[str, np.ndarray]:
    return {"image": image, "label": np.int32(label), "id": np.int32(id)}


def _read_options(num_threads: int) -> grain.ReadOptions:
    # Counted in batches, which may be large: enough that no thread waits, and little more.
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
