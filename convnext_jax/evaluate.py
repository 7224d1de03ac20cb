"""How good a model is on a folder of pictures: the work of `convnext-jax evaluate`.

Apart from `training.evaluation`, which scores logits whatever they come from, because here a model
is taken with its own preprocessing and its classes are matched with the folders' names.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convnext_jax.data import pipeline, sources
from convnext_jax.errors import InputError
from convnext_jax.image.processor import ConvNextImageProcessor
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import evaluation

_MISTAKES = 100  # how many a report names


class Result(NamedTuple):
    """A model's evaluation on a folder.

    Attributes:
      evaluation: of the pictures that can be read, in the order of `source`, by the model's
        classes.
      source: the pictures.
      names: what the model calls each of its classes, by index.
      folders: the class folders' names, by index of the class.
      image_size: side of the pictures that the network saw.
      seconds: for all pictures, without reading and compiling the network.
      remarks: what the user should know, such as how the classes were matched, or that pictures
        were left out.
    """

    evaluation: evaluation.Evaluation
    source: sources.FolderSource
    names: dict[int, str]
    folders: dict[int, str]
    image_size: int
    seconds: float
    remarks: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Everything that was found, as JSON has it; the worst class and mistake come first.

        The confusion matrix is a list of [right class, predicted class, examples] of its cells
        that are not 0.
        """
        found, classes = self.evaluation, len(self.names)
        right, examples = found.per_class(classes)
        cells = np.stack(found.confusions(classes), axis=1)
        wrong = cells[cells[:, 0] != cells[:, 1]]
        # In this order the last entry of a class is what it is most often taken for.
        taken_for = {int(i): int(j) for i, j, _ in wrong[np.argsort(wrong[:, 2], kind="stable")]}
        present = np.flatnonzero(examples)
        return {
            "examples": len(found.labels),
            "unreadable": [
                {"image": self.source.example_name(i), "reason": reason}
                for i, reason in found.unreadable
            ],
            "classes": len(present),
            "classes_of_model": classes,
            "image_size": self.image_size,
            **{name: _number(value) for name, value in found.metrics.items()},
            "seconds": round(self.seconds, 3),
            "examples_per_second": round(len(found.labels) / self.seconds, 1),
            "remarks": list(self.remarks),
            "per_class": [
                {
                    "index": int(i),
                    "label": self.names[i],
                    "folder": self.folders[i],
                    "examples": int(examples[i]),
                    "right": int(right[i]),
                    "accuracy": round(right[i] / examples[i], 6),
                    "taken_for": self.names[taken_for[i]] if i in taken_for else None,
                }
                for i in present[np.argsort(right[present] / examples[present], kind="stable")]
            ],
            "mistakes": [
                {
                    "image": self.source.example_name(int(found.ids[i])),
                    "label": self.names[int(found.labels[i])],
                    "predicted": self.names[int(found.predictions[i])],
                    "confidence": _number(found.confidences[i]),
                    "loss": _number(found.losses[i]),
                }
                for i in found.worst_mistakes(_MISTAKES).tolist()
            ],
            "confusion_matrix": cells.tolist(),
        }


def evaluate_folder(
    name_or_path: str,
    folder: str | Path,
    *,
    labels: str | Path | None = None,
    batch_size: int = 32,
) -> Result:
    """Evaluates a model on class folders of pictures, each that can be read exactly once.

    The pictures are prepared as the model's own preprocessor_config.json says, to the pixel values
    that its image processor gives, and go through one jitted program.

    Args:
      name_or_path: a folder with config.json, weights and preprocessor_config.json, or a hub name.
      folder: `<class>/…`, or `val/<class>/…`.
      labels: a JSON file with the names that the folders have for the model's classes, by index: a
        list, or an object; each a name or a list of names. Default: the model's `id2label`.
      batch_size: pictures in one call of the network.

    Raises:
      InputError: for a model that cannot be read, pictures none of which can be, or folders that
        are not its classes.
    """
    root = _class_root(sources.existing_folder(folder))
    classes = sources.scan_classes(root)
    # The model before its preprocessing: what is not a ConvNeXt says so more plainly.
    model, variables = ConvNextForImageClassification.from_pretrained(
        name_or_path, data_format="channels_last"
    )
    if not model.config.num_labels:
        raise InputError(f"{name_or_path} has no classes: it is a network without a head")
    processor = ConvNextImageProcessor.from_pretrained(name_or_path)
    table = pixel_table(processor, name_or_path)
    size = processor.size["shortest_edge"]
    names = {i: model.config.id2label.get(i, f"class {i}") for i in range(model.config.num_labels)}
    known = names if labels is None else _read_labels(Path(labels), len(names))
    numbers, remark = match_classes(list(classes), known, str(folder))

    paths = [path for pictures in classes.values() for path in pictures]
    counts = [len(pictures) for pictures in classes.values()]
    source = sources.FolderSource(
        root, paths, np.repeat([numbers[name] for name in classes], counts)
    )
    batch_size = min(batch_size, len(source))

    @jax.jit
    def step(variables: Any, batch: dict[str, jax.Array]) -> evaluation.Scores:
        pixels = jnp.asarray(table)[batch["image"], jnp.arange(3)]
        logits = model.apply(variables, pixels, return_dict=True).logits
        return evaluation.score(logits, batch["label"], batch["mask"])

    compiled = step.lower(
        variables,
        {
            "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
            "mask": jax.ShapeDtypeStruct((batch_size,), np.float32),
        },
    ).compile()
    batches = pipeline.eval_batches(
        source,
        batch_size=batch_size,
        image_size=size,
        crop_pct=processor.crop_pct,
        resample=processor.resample,
    )
    start = time.perf_counter()
    with contextlib.closing(batches):
        steps = pipeline.eval_steps(len(source), batch_size)
        bar = tqdm(batches, total=steps, unit="batch", leave=False, disable=None)
        found = evaluation.evaluate(compiled, {"model": variables}, bar)["model"]
    seconds = time.perf_counter() - start
    folders = {index: name for name, index in numbers.items()}
    remarks = [remark] if remark else []
    if found.unreadable:
        remarks.append(
            f"{len(found.unreadable):,} of {len(source):,} pictures cannot be read, and count "
            f"neither as right nor as wrong (--json lists them); the first: "
            f"{found.unreadable[0][1]}"
        )
    return Result(found, source, names, folders, size, seconds, tuple(remarks))


def match_classes(
    folders: Sequence[str], names: Mapping[int, str | Sequence[str]], place: str = "the data"
) -> tuple[dict[str, int], str | None]:
    """Which of a model's classes each folder holds.

    A folder is found by its name: the model's own, or that but for case and punctuation
    ("golf_ball" for "golf ball", "T-shirt_top" for "T-shirt/top"), or one of the names that a label
    lists ("tench" of "tench, Tinca tinca"). Not all classes need a folder. If no name is known at
    all, folders that are numbers are taken for indices. As many folders as there are classes are
    taken in the order of their names if they are WordNet's (n01440764), which is how ImageNet's
    classes are numbered, or if the model has no names for its classes ("LABEL_0").

    Args:
      folders: in the order of their names.
      names: of the model's classes by index, each a name or several.
      place: what to call the data in errors.

    Returns:
      The index of each folder's class; and a remark where it was not found by name.

    Raises:
      InputError: a folder belongs to no class, or two to one.
    """
    exact, alike, listed = {}, {}, {}
    for index, given in names.items():
        for name in [given] if isinstance(given, str) else given:
            exact.setdefault(unicodedata.normalize("NFC", name), set()).add(index)
            alike.setdefault(_simple(name), set()).add(index)
            for part in name.split(","):
                listed.setdefault(_simple(part), set()).add(index)

    def find(folder: str) -> int | None:
        for table, key in ((exact, folder), (alike, _simple(folder)), (listed, _simple(folder))):
            if key and len(table.get(key, ())) == 1:  # ImageNet has two cranes
                return next(iter(table[key]))
        return None

    found = {folder: find(folder) for folder in folders}
    unknown = [folder for folder in folders if found[folder] is None]
    remark = None
    if len(unknown) == len(folders):
        numbers = [int(folder) if re.fullmatch("[0-9]{1,9}", folder) else -1 for folder in folders]
        if len(set(numbers)) == len(folders) and set(numbers) <= set(names):
            found, unknown = dict(zip(folders, numbers, strict=True)), []
            remark = "the folders' names were taken for the indices of the model's classes"
        elif len(folders) == len(names) and (
            all(re.fullmatch("n[0-9]{8}", folder) for folder in folders)
            or all(re.fullmatch(r"LABEL_\d+|class \d+", _first(n)) for n in names.values())
        ):
            found, unknown = dict(zip(folders, sorted(names), strict=True)), []
            first, last = ((folders[i], _first(names[sorted(names)[i]])) for i in (0, -1))
            remark = (
                "no folder has the name of a class: they were taken in order, from "
                f"{first[0]} for {first[1]!r} to {last[0]} for {last[1]!r}"
            )
    if unknown:
        raise InputError(
            f"{place}: {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
            f"model's {len(names)} classes ({_some([_first(name) for name in names.values()])}): "
            "rename the folders, or name the classes as the folders do by --labels FILE"
        )
    owners: dict[int, str] = {}
    for folder, index in found.items():
        if index in owners:
            raise InputError(
                f"{place}: {owners[index]!r} and {folder!r} are both the class "
                f"{_first(names[index])!r}: put their pictures into one folder"
            )
        owners[index] = folder
    return found, remark


def _class_root(folder: Path) -> Path:
    """The folder that holds the class folders: `val` below it, if that holds folders itself."""
    val = folder / "val"
    return val if val.is_dir() and any(child.is_dir() for child in val.iterdir()) else folder


def pixel_table(processor: ConvNextImageProcessor, place: str) -> np.ndarray:
    """What the processor makes, after resizing, of each value in each channel: f32 [256, 3].

    Raises:
      InputError: it does not resize, or its settings cannot be used; `place` says whose it is.
    """
    values = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    layout = {"return_tensors": "np", "data_format": "channels_last"}
    if not processor.do_resize:
        raise InputError(
            f"{place} does not resize pictures (do_resize in preprocessor_config.json is false): "
            "evaluation needs them in one size"
        )
    processor(np.zeros((1, 1, 3), np.uint8), input_data_format="channels_last", **layout)  # checks
    pixels = processor(values, do_resize=False, input_data_format="channels_last", **layout)
    return pixels["pixel_values"][0, 0].astype(np.float32)


def _read_labels(path: Path, count: int) -> dict[int, list[str]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        names = {
            int(index): [str(name) for name in ([given] if isinstance(given, str) else given)]
            for index, given in pairs
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f'{path} is not a JSON list of names, nor an object such as {{"0": "tench"}}: {reason}'
        ) from error
    if sorted(names) != list(range(count)) or not all(names.values()):
        raise InputError(
            f"{path} names {len(names)} classes, and the model has {count}: give one name, or a "
            f"list of names, for each index from 0 to {count - 1}"
        )
    return names


def _simple(name: str) -> str:
    """A name without what a file system or a hurried hand changes in it."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _first(name: str | Sequence[str]) -> str:
    return name if isinstance(name, str) else name[0]


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def _number(value: float) -> float | None:
    """As JSON can say it, which has no NaN."""
    return round(float(value), 6) if np.isfinite(value) else None
