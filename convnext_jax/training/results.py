"""What a run leaves behind at its end: the model, the report, pictures, figures, examples."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from convnext_jax.data import pipeline, sources
from convnext_jax.errors import InputError
from convnext_jax.image import ConvNextImageProcessor
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import report
from convnext_jax.training.config import default_config, eval_pictures, train_pictures
from convnext_jax.training.evaluation import Evaluation
from convnext_jax.training.metrics import METRICS_NAME, TIMING_NAME, read_rows
from convnext_jax.training.step import augment
from convnext_jax.training.unreadable import UNREADABLE_NAME, listed

PyTree = Any

# Classes beyond which the whole confusion matrix is not written: 22k of them take gigabytes.
MAX_MATRIX = 2500


def write_results(
    config: FrozenConfigDict,
    workdir: Path,
    model: ConvNextForImageClassification,
    dataset: sources.Dataset,
    params: PyTree,
    evaluations: dict[str, Evaluation],
    exported: str,
    steps: int,
) -> dict[str, float]:
    """Writes all of it into the run's folder, and says in a line how good the model is.

    Args:
      config: the run's settings.
      workdir: its folder, with metrics.jsonl, timing.jsonl and, if any, unreadable.jsonl.
      model: the network, as it was trained.
      dataset: what it was trained and evaluated on.
      params: the parameters to export.
      evaluations: of the final weights by name, "val" and "val_ema".
      exported: which of these `params` are.
      steps: optimizer steps done.

    Returns:
      What metrics.json holds.
    """
    found = evaluations[exported]
    metrics = read_rows(workdir / METRICS_NAME)
    report.plot_curves(metrics, workdir / "curves.png")
    if len(dataset.class_names) <= MAX_MATRIX:
        matrix = found.confusion_matrix(len(dataset.class_names))
        report.plot_confusion_matrix(matrix, dataset.class_names, workdir / "confusion_matrix.png")
        np.savetxt(workdir / "confusion_matrix.csv", matrix, fmt="%d", delimiter=",")
    pictures, captions = augmentation_grid(config, dataset)
    facts = {
        "steps": f"{steps:,}",
        "training examples": f"{len(dataset.train):,}",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(params)):,}",
    }
    splits = [row["split"] for row in listed(workdir)]
    if splits:
        facts["unreadable examples"] = (
            f"{splits.count('train'):,} of train, {splits.count('val'):,} of val: {UNREADABLE_NAME}"
        )
    report.write_report(
        workdir / "report.html",
        title=workdir.absolute().name,
        metrics=metrics,
        timing=read_rows(workdir / TIMING_NAME),
        evaluations=evaluations,
        exported=exported,
        class_names=dataset.class_names,
        source=dataset.val,
        config=config.to_dict(),
        defaults=default_config().to_dict(),
        facts=facts,
        augmentation=pictures,
        captions=captions,
    )

    model = model.clone(data_format="channels_first", axis_name=None, dtype=None)
    model.save_pretrained(workdir / "model", {"params": params})
    image_processor(config).save_pretrained(workdir / "model")

    examples = workdir / "examples"
    examples.mkdir(exist_ok=True)
    files = [
        "".join(c if c.isalnum() or c in "-_" else "_" for c in n) for n in dataset.class_names
    ]
    for label, file in enumerate(files[:10]):
        of_class = found.ids[found.labels == label]
        if of_class.size:  # a class may be too small to have held any out, or none that can be read
            name = file if files.count(file) == 1 else f"{file}_{label}"
            Image.fromarray(dataset.val[int(of_class[0])]["image"]).save(examples / f"{name}.png")

    unreadable = len(dataset.val) - len(found.labels)  # by all processes
    final: dict[str, Any] = {
        "steps": steps,
        "examples": len(found.labels),
        "unreadable": unreadable,
        "exported": exported,
    }
    for name, evaluation in evaluations.items():
        final |= {f"{name}/{metric}": value for metric, value in evaluation.metrics.items()}
    (workdir / "metrics.json").write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
    without = f" ({unreadable:,} more cannot be read)" if unreadable else ""
    print(
        f"top-1 {final[f'{exported}/top1']:.2%} on {len(found.labels):,} held-out examples"
        f"{without}; model in {workdir / 'model'}, report.html beside it"
    )
    return final


def image_processor(config: FrozenConfigDict) -> ConvNextImageProcessor:
    """The preprocessing that this run evaluated with, for `preprocessor_config.json`."""
    return ConvNextImageProcessor(
        size={"shortest_edge": config.image_size},
        crop_pct=config.crop_pct,
        resample=Image.Resampling.BICUBIC,
        image_mean=list(config.mean),
        image_std=list(config.std),
    )


def augmentation_grid(
    config: FrozenConfigDict, dataset: sources.Dataset, rows: int = 6, draws: int = 7
) -> tuple[np.ndarray, list[list[str]]]:
    """What training shows the network: examples as they are, and as they were drawn for it.

    Args:
      config: a run's settings.
      dataset: examples of `train` are taken, spread evenly, that can be read.
      rows: how many.
      draws: of each.

    Returns:
      Pictures uint8 (rows, 1 + draws, size, size, 3), and what is in each: the names of the classes
      whose share in the target is above a tenth.
    """
    examples = len(dataset.train)
    members = set()
    for first in np.linspace(0, examples - 1, min(rows, examples)).astype(int).tolist():
        after = (index for index in range(first, examples) if _is_readable(dataset.train, index))
        members.update([*itertools.islice(after, 1)])
    chosen, rows = sources.Subset(dataset.train, np.array(sorted(members))), len(members)
    options = {"batch_size": rows, "num_workers": 1}
    with contextlib.closing(pipeline.eval_batches(chosen, **options, **eval_pictures(config))) as b:
        plain = next(b)["image"]
    batches = pipeline.train_batches(chosen, **options, **train_pictures(config))
    with contextlib.closing(batches):
        drawn = [next(batches) for _ in range(draws)]
    order = [np.argsort(batch["id"]) for batch in drawn]
    image_key, group_key = jax.random.split(jax.random.key(config.seed))
    images, targets = jax.jit(augment, static_argnums=(1, 2))(
        {
            "image": np.concatenate([b["image"][i] for b, i in zip(drawn, order, strict=True)]),
            "label": np.concatenate([b["label"][i] for b, i in zip(drawn, order, strict=True)]),
            "image_key": jax.random.split(image_key, rows * draws),
            "group_key": jax.random.split(group_key, draws),  # mixed within a draw
        },
        len(dataset.class_names),
        config,
    )
    pixels = (np.asarray(images) * np.array(config.std) + np.array(config.mean)) * 255
    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    names = dataset.class_names

    def caption(target: np.ndarray) -> str:
        classes = [int(c) for c in np.argsort(-target) if target[c] > 0.1]
        if len(classes) == 1:
            return names[classes[0]]
        return ", ".join(f"{target[c]:.0%} {names[c]}" for c in classes)

    captions = [
        [names[chosen.labels[row]]] + [caption(targets[draw * rows + row]) for draw in range(draws)]
        for row in range(rows)
    ]
    pixels = pixels.reshape(draws, rows, *pixels.shape[1:]).swapaxes(0, 1)
    return np.concatenate([plain[:, None], pixels], axis=1), captions


def _is_readable(source: sources.Source, index: int) -> bool:
    try:
        source[index]
    except InputError:
        return False
    return True
