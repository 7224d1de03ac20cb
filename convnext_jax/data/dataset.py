"""What a data set is: two sources of examples and the names of their classes.

A source answers `source[i]` with one decoded example and knows its labels without decoding
anything.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from convnext_jax.data.encoded import Encoded
from convnext_jax.errors import InputError

# Fixed here, not asked of Pillow: what an installation can decode differs between machines, and
# the list of files, and with it the split, must not.
# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on


class Example(TypedDict):
    """One example: `image` uint8 [H, W, 3] RGB, its class index, and its index in the source."""

    image: np.ndarray
    label: int
    id: int


class Source(Protocol):
    """Random access to the examples of one split. Derive from it, for the sake of its defaults.

    Attributes:
      labels: int32 [N], the class index of every example.
      size: (height, width) of the pictures where all have the same and `batch` exists, else None.
    """

    labels: np.ndarray
    size: tuple[int, int] | None = None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Decodes example `index`; raises `InputError` naming it if that is impossible."""
        ...

    def example_name(self, index: int) -> str:
        """What a person would call example `index`: a path, or a place such as `digits/123`."""
        ...

    def key(self, index: int) -> str:
        """A name of example `index` that no other has, wherever the data lie."""
        return self.example_name(index)

    def digest(self) -> str:
        """Of the examples' names and labels, in order."""
        return digest(
            f"{label} {self.example_name(i)}" for i, label in enumerate(self.labels.tolist())
        )

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """The pictures of the examples `indices` [B] at once: a new array, uint8 [B, H, W, 3]."""
        raise NotImplementedError

    def file(self, index: int) -> Encoded | None:
        """Where the picture of example `index` is, if a source's pictures are yet to be decoded.

        Of all examples of a source, or None of each.
        """
        return None


@dataclass(frozen=True)
class Dataset:
    """A training split, a held-out split, and the names of the classes both are labelled with."""

    train: Source
    val: Source
    class_names: tuple[str, ...]


class Subset(Source):
    """Some examples of another source, numbered anew from 0.

    Args:
      source: the other source.
      members: integers [N], which of its examples, in order.
    """

    def __init__(self, source: Source, members: np.ndarray):
        self.source = source
        self.members = members
        self.labels = source.labels[members]
        self.size = source.size

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.members[index])] | {"id": index}

    def example_name(self, index: int) -> str:
        return self.source.example_name(int(self.members[index]))

    def batch(self, indices: np.ndarray) -> np.ndarray:
        return self.source.batch(self.members[indices])

    def key(self, index: int) -> str:
        return self.source.key(int(self.members[index]))

    def file(self, index: int) -> Encoded | None:
        return self.source.file(int(self.members[index]))


def digest(lines: Iterable[str]) -> str:
    """SHA-256 of so many lines of text."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def stratified_split(
    labels: np.ndarray, keys: Sequence[str], fraction: float, seed: int
) -> np.ndarray:
    """Holds out `fraction` of the examples, the same share of every class to within one example.

    Each class is ordered by a SHA-256 of seed and key, and its first examples are held out, so the
    result is a function of the arguments alone: not of the order of the examples, the machine, or
    the version of a random number generator. Every class keeps at least one training example.

    Args:
      labels: integers [N].
      keys: N distinct strings that identify the examples.
      fraction: share to hold out, above 0 and below 1.
      seed: which of the possible splits.

    Returns:
      bool [N], True where the example is held out.

    Raises:
      InputError: a fraction outside (0, 1), or one that holds out nothing.
    """
    take = _quotas(labels, fraction)

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{keys[index]}".encode("utf-8", "surrogateescape")).digest()

    held_out = np.zeros(len(labels), bool)
    for label, number in enumerate(take):
        members = sorted(np.flatnonzero(labels == label), key=rank)
        held_out[members[:number]] = True
    return held_out


def split_by_number(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """`stratified_split` by the numbers of the examples for their keys, for millions of them."""
    take = _quotas(labels, fraction)
    place = np.arange(len(labels), dtype=np.uint64)
    rank = _scramble(place + _scramble(np.array([seed % 2**64], np.uint64)))
    # By class and then by rank, in one sort of 64 bits: a third of the time of np.lexsort.
    order = np.argsort(labels.astype(np.uint64) << 40 | rank >> 24, kind="stable")
    counts = np.bincount(labels)
    place_in_class = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    held_out = np.zeros(len(labels), bool)
    held_out[order[place_in_class < take[labels[order]]]] = True
    return held_out


def _quotas(labels: np.ndarray, fraction: float) -> np.ndarray:
    """How many examples of each class to hold out."""
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction must be above 0 and below 1, not {fraction}")
    counts = np.bincount(labels)
    quotas = counts * fraction
    take = np.floor(quotas).astype(int)
    missing = round(len(labels) * fraction) - int(take.sum())
    # The classes that rounding down cut most get the examples that are still missing.
    for label in np.argsort(take - quotas, kind="stable")[:missing]:
        take[label] += 1
    take = np.clip(take, 0, np.maximum(counts - 1, 0))
    if take.sum() == 0:
        raise InputError(
            f"{len(labels)} examples are too few to hold out a fraction of {fraction};"
            " add examples or raise the fraction"
        )
    return take


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """Different numbers that look random for different ones, uint64: those of SplitMix64."""
    numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
