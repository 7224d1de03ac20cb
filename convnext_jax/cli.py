"""The command `convnext-jax`.

    convnext-jax classify MODEL IMAGE [IMAGE ...] [--json] [--top 5]
    convnext-jax evaluate MODEL DATA [--json] [--labels FILE] [--batch-size 32]
    convnext-jax convert SOURCE FOLDER [--preset NAME] [--config FILE] [--labels FILE] [--size 224]
    convnext-jax shards PICTURES FOLDER [--format tar] [--shard-mb 256] [--seed 0]
        [--val-fraction 0.2]

MODEL is a folder or a hub name, and so is SOURCE, or one file of weights; DATA is a folder with one
folder of pictures a class, and so is PICTURES, or one of two of these, train and val. What the user
got wrong is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from convnext_jax.errors import InputError

# Pictures of one call of the network: one program serves any number of them.
BATCH = 8

# Rows of the tables that `evaluate` prints; --json has all of them.
CLASSES_SHOWN, MISTAKES_SHOWN = 20, 5


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line; the usage is behind -h."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} -h)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; the exit status."""
    parser = OneLineParser(prog="convnext-jax", description="ConvNeXt in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    classify_parser = commands.add_parser(
        "classify", help="name what is in pictures", description="Names what is in pictures."
    )
    classify_parser.add_argument("model", metavar="MODEL", help="a model's folder, or a hub name")
    classify_parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture files")
    classify_parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    classify_parser.add_argument(
        "--top", type=_positive, default=5, metavar="K", help="classes a picture (default 5)"
    )
    classify_parser.set_defaults(run=classify_command)
    evaluate_parser = commands.add_parser(
        "evaluate",
        help="say how often a model is right on a folder of pictures",
        description="Measures top-1, top-5 and loss on class folders of pictures, each picture "
        "once, prepared as the model's own preprocessing says.",
    )
    evaluate_parser.add_argument("model", metavar="MODEL", help="a model's folder, or a hub name")
    evaluate_parser.add_argument(
        "data", metavar="DATA", help="a folder of <class>/*, or of val/<class>/*"
    )
    evaluate_parser.add_argument(
        "--json", action="store_true", help="print JSON with the confusion matrix, not tables"
    )
    evaluate_parser.add_argument(
        "--labels",
        metavar="FILE",
        help="the folders' names of the model's classes, where its own are others: a JSON list, "
        "or an object by index, of names or lists of names",
    )
    evaluate_parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="default 32"
    )
    evaluate_parser.set_defaults(run=evaluate_command)
    convert_parser = commands.add_parser(
        "convert",
        help="make any published ConvNeXt a folder that loads here and in transformers",
        description="Writes config.json, model.safetensors and preprocessor_config.json of a "
        "checkpoint of Hugging Face, timm, torchvision or the original repositories.",
    )
    convert_parser.add_argument(
        "source", metavar="SOURCE", help="a file of weights, a folder with one, or a hub name"
    )
    convert_parser.add_argument("folder", metavar="FOLDER", help="where to write")
    convert_parser.add_argument(
        "--preset", metavar="NAME", help="refuse a network of other widths than these: tiny, ..."
    )
    convert_parser.add_argument(
        "--config", metavar="FILE", help="a config.json, for what the source does not say"
    )
    convert_parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes: a JSON list, or an object by index"
    )
    convert_parser.add_argument(
        "--size", type=_positive, metavar="PIXELS", help="side of the pictures it was trained on"
    )
    convert_parser.add_argument(
        "--ema", action="store_true", help="the averaged weights of a training run's file"
    )
    convert_parser.add_argument("--revision", metavar="NAME", help="of the hub repository")
    convert_parser.set_defaults(run=convert_command)
    shards_parser = commands.add_parser(
        "shards",
        help="copy a folder of pictures into few large files, to train from",
        description="Writes class folders of pictures as tar archives in webdataset's layout, or "
        "as ArrayRecord files in that of TensorFlow Datasets; the pictures' bytes stay as they "
        "are. FOLDER appears when it is complete.",
    )
    shards_parser.add_argument(
        "pictures",
        metavar="PICTURES",
        help="a folder of train/<class>/* and val/<class>/*, or of <class>/*",
    )
    shards_parser.add_argument("folder", metavar="FOLDER", help="what to write; must not exist")
    shards_parser.add_argument(
        "--format", choices=("tar", "array_record"), default="tar", help="default tar"
    )
    shards_parser.add_argument(
        "--shard-mb", type=_positive, default=256, metavar="N", help="MiB a file (default 256)"
    )
    shards_parser.add_argument(
        "--seed", type=_whole, default=0, metavar="N", help="of the order and the split (default 0)"
    )
    shards_parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="held out where there is no val (default 0.2)",
    )
    shards_parser.set_defaults(run=shards_command)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(f"convnext-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def classify_command(options: argparse.Namespace) -> None:
    """Prints the most probable classes of each picture."""
    results = classify(options.model, options.images, options.top)
    if options.json:
        print(json.dumps(list(results), indent=2, ensure_ascii=False))
        return
    for result in results:
        print(result["image"])
        for prediction in result["predictions"]:
            print(f"  {prediction['probability']:7.2%}  {prediction['label']}")


def classify(model_name: str, paths: Sequence[str], top: int = 5) -> Iterator[dict[str, Any]]:
    """The most probable classes of each picture, as it is ready.

    Args:
      model_name: a folder with config.json, model.safetensors and preprocessor_config.json, or a
        hub name.
      paths: picture files.
      top: classes for each picture, at most as many as the model has.

    Yields:
      {"image": path, "predictions": [{"label", "index", "probability"}, ...]}, best first.

    Raises:
      InputError: for a model or a picture that cannot be read; pictures before it have been
        yielded by then.
    """
    import jax
    import numpy as np

    from convnext_jax.image import ConvNextImageProcessor
    from convnext_jax.image.decode import read_image
    from convnext_jax.modeling import ConvNextForImageClassification

    absent = [path for path in paths if not Path(path).exists()]
    if absent:
        raise InputError(f"{absent[0]} is not there: give the path of a picture file")
    # The model first: what is not a ConvNeXt says so more plainly than its preprocessing does.
    model, variables = ConvNextForImageClassification.from_pretrained(model_name)
    processor = ConvNextImageProcessor.from_pretrained(model_name)
    names = model.config.id2label
    if not names:
        raise InputError(f"{model_name} has no classes: it is a network without a head")

    @jax.jit
    def top_classes(variables: dict, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(variables, pixel_values, return_dict=True).logits
        return jax.lax.top_k(jax.nn.softmax(logits), min(top, logits.shape[-1]))

    batch_size = min(BATCH, len(paths))
    for start in range(0, len(paths), batch_size):
        part = paths[start : start + batch_size]
        images = [read_image(Path(path)) for path in part]
        pixels = processor(images, return_tensors="np", input_data_format="channels_last")[
            "pixel_values"
        ]
        filling = np.zeros((batch_size - len(part), *pixels.shape[1:]), pixels.dtype)
        probabilities, indices = jax.device_get(
            top_classes(variables, np.concatenate([pixels, filling]))
        )
        for path, row, columns in zip(part, probabilities, indices, strict=False):
            predictions = [
                {
                    "label": names.get(int(index), f"class {index}"),
                    "index": int(index),
                    "probability": round(float(probability), 6),
                }
                for probability, index in zip(row, columns, strict=True)
            ]
            yield {"image": path, "predictions": predictions}


def evaluate_command(options: argparse.Namespace) -> None:
    """Prints how good a model is on a folder of pictures."""
    try:
        from convnext_jax.evaluate import evaluate_folder
    except ModuleNotFoundError as error:
        if str(error.name).startswith("convnext_jax"):
            raise
        raise InputError(
            f"evaluate needs {error.name}, which is not installed: "
            "pip install 'convnext-jax[train]'"
        ) from None

    result = evaluate_folder(
        options.model, options.data, labels=options.labels, batch_size=options.batch_size
    ).report()
    if options.json:
        settings = {"model": options.model, "data": options.data}
        print(json.dumps(settings | result, indent=2, ensure_ascii=False, allow_nan=False))
        return
    for remark in result["remarks"]:
        print(f"convnext-jax: note: {remark}", file=sys.stderr)
    print(
        f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   "
        f"loss {'not a number' if result['loss'] is None else format(result['loss'], '.4f')}"
    )
    without = (
        f" ({len(result['unreadable']):,} more cannot be read)" if result["unreadable"] else ""
    )
    print(
        f"{result['examples']:,} pictures{without} of {result['classes']:,} of the model's "
        f"{result['classes_of_model']:,} classes, {result['image_size']} px, in "
        f"{result['seconds']:,.1f} s ({result['examples_per_second']:,.1f} a second)"
    )
    rows = result["per_class"]
    print("\naccuracy  right        class, and what it is most often taken for")
    for row in rows[:CLASSES_SHOWN]:
        taken_for = f" -> {row['taken_for']}" if row["taken_for"] else ""
        counts = f"{row['right']}/{row['examples']}"
        folder = f" ({row['folder']})" if row["folder"] != row["label"] else ""
        print(f"{row['accuracy']:8.2%}  {counts:11}  {row['label']}{folder}{taken_for}")
    if len(rows) > CLASSES_SHOWN:
        print(f"and {len(rows) - CLASSES_SHOWN:,} better ones: --json has all")
    if result["mistakes"]:
        print("\nthe surest mistakes")
    for mistake in result["mistakes"][:MISTAKES_SHOWN]:
        confidence = float("nan") if mistake["confidence"] is None else mistake["confidence"]
        print(f"{confidence:8.2%}  {mistake['predicted']}, not {mistake['label']}")
        print(f"          {mistake['image']}")


def convert_command(options: argparse.Namespace) -> None:
    """Writes the folder and says in a line what is in it."""
    from convnext_jax.convert import convert

    made = convert(
        options.source,
        options.folder,
        preset=options.preset,
        config=options.config,
        labels=options.labels,
        size=options.size,
        averaged=options.ema,
        revision=options.revision,
    )
    config = made.model.config
    for remark in made.remarks:
        print(f"convnext-jax: note: {remark}", file=sys.stderr)
    print(
        f"{options.folder}: {type(made.model).__name__}, {config.model_type}, widths "
        f"{'-'.join(map(str, config.hidden_sizes))}, depths {'-'.join(map(str, config.depths))}, "
        f"{made.classes} classes, {made.parameters:,} parameters, from the names of "
        f"{made.publisher}"
    )


def shards_command(options: argparse.Namespace) -> None:
    """Writes the shards and says how to train from them."""
    try:
        from convnext_jax.data.pack import pack
    except ModuleNotFoundError as error:
        if str(error.name).startswith("convnext_jax"):
            raise
        raise InputError(
            f"shards needs {error.name}, which is not installed: pip install 'convnext-jax[train]'"
        ) from None

    # Asked to end, as by a scheduler, it removes what is unfinished, as after Ctrl-C.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    made = pack(
        options.pictures,
        options.folder,
        kind=options.format,
        shard_bytes=options.shard_mb * 2**20,
        seed=options.seed,
        val_fraction=options.val_fraction,
    )
    name = {"tar": "tar_shards"}.get(options.format, options.format)
    print(
        f"{options.folder}: {made['shards']:,} shards with {made['train']:,} pictures to train on "
        f"and {made['val']:,} held out, of {made['classes']:,} classes; train.py reads them with "
        f"--config.data.name={name} --config.data.folder={shlex.quote(options.folder)}"
    )


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return value


if __name__ == "__main__":
    sys.exit(main())
