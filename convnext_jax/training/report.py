"""Pictures of a run, drawn from plain data: rows of metrics.jsonl and a confusion matrix.

matplotlib is imported inside the functions, and drawn with Agg through `Figure` itself: neither
pyplot's state nor the backend of a notebook is touched. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; line styles repeat what they say.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY, _BLUE, _ORANGE, _GREEN = "#767676", "#0072B2", "#D55E00", "#009E73"
_TRAIN = {"color": _GREY, "linestyle": "-", "marker": "."}
_VAL = {  # key prefix in the metrics: name and style
    "val": ("raw weights", {"color": _BLUE, "linestyle": "-", "marker": "o"}),
    "val_ema": ("EMA weights", {"color": _ORANGE, "linestyle": "--", "marker": "s"}),
}

_MAX_NUMBERED = 20  # classes up to which every cell of a confusion matrix holds its count
_MAX_NAMED = 50  # classes up to which the axes name them
_MAX_CELLS = 250  # cells a side beyond which a single one could not be seen
_MAX_NAME = 22  # characters of a class name that fit beside an axis


def plot_curves(
    metrics: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str = "Training"
) -> None:
    """Draws loss, validation accuracy and learning rate against the step, as a PNG.

    Args:
      metrics: rows with a "step" and any of "train/loss", "train/learning_rate", "val/loss",
        "val/top1", "val_ema/loss", "val_ema/top1" (top1 as a share of 1). Other keys are ignored;
        what no row has is said to be missing.
      path: file to write.
      title: heading of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=14, parse_math=False)
    loss, accuracy, rate = figure.subplots(1, 3)

    steps, values = _series(metrics, "train/loss")
    name = "train"
    if len(steps) > 100:
        loss.plot(steps, values, color=_GREY, alpha=0.3, linewidth=0.8)
        steps, values = _moving_average(steps, values, window=len(steps) // 40)
        name = "train, moving average"
    if len(steps):
        loss.plot(steps, values, **_line(_TRAIN, steps), label=name)
    curves = [values]
    for split, (name, style) in _VAL.items():
        steps, values = _series(metrics, f"{split}/loss")
        if len(steps):
            label = f"val, {name}, last {values[-1]:.3f}"
            loss.plot(steps, values, **_line(style, steps), label=label)
            curves.append(values)
        steps, values = _series(metrics, f"{split}/top1")
        if len(steps):
            label = f"{name}, last {values[-1]:.2%}"
            accuracy.plot(steps, values, **_line(style, steps), label=label)
    finite = np.concatenate(curves)
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.max() > 0:
        # By the curves, not by the noise behind them, whose peaks would flatten the rest.
        loss.set_ylim(min(0.0, finite.min()), 1.1 * finite.max())
    steps, values = _series(metrics, "train/learning_rate")
    if len(steps):
        rate.plot(steps, values, color=_GREEN, linewidth=1.8)
        rate.set_ylim(bottom=0)

    for axes, heading, unit in (
        (loss, "Loss", "cross entropy"),
        (accuracy, "Validation accuracy", "top-1"),
        (rate, "Learning rate", "learning rate"),
    ):
        axes.set_title(heading)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        if not axes.lines:
            _say_missing(axes, heading)
        elif axes is not rate:
            axes.legend(frameon=False, loc="lower right" if axes is accuracy else "upper right")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    figure.savefig(path, format="png", dpi=130)


def plot_confusion_matrix(
    matrix: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    title: str = "Confusion matrix",
) -> None:
    """Draws a confusion matrix and the recall of its classes beside it, as a PNG.

    A cell's colour is its share of the examples of its true class, on a square-root scale so that
    rare confusions show. Up to 20 classes cells hold their counts, up to 50 the axes name the
    classes; beyond, the recall is a curve from the worst class to the best, the worst are listed
    with what they are taken for, and beyond 250 a cell shows the largest of a block. The size of
    the picture is bounded whatever the number of classes.

    Args:
      matrix: integers [K, K], rows the true class, columns the predicted one.
      class_names: K names.
      path: file to write.
      title: heading of the figure.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(matrix)
    examples = matrix.sum(axis=1)
    share = matrix / np.maximum(examples, 1)[:, None]
    recall = np.where(examples > 0, np.diag(share), np.nan)
    total, right = int(examples.sum()), int(np.trace(matrix))
    names = [_short(name) for name in class_names]

    height = float(np.clip(0.45 * classes + 2.2, 5, 11)) if classes <= _MAX_NAMED else 8.5
    figure = Figure(figsize=(height * 1.45, height), layout="constrained")
    accuracy = f"{right:,} of {total:,} right ({right / total:.2%})" if total else "no examples"
    figure.suptitle(f"{title}: {accuracy}", fontsize=14, parse_math=False)

    if classes <= _MAX_NAMED:
        axes = figure.subplot_mosaic([["cells", "recall"]], width_ratios=(3, 1))
        _name_axes(axes["cells"], names)
        _draw_recall_bars(axes["recall"], recall, examples)
    else:
        axes = figure.subplot_mosaic(
            [["cells", "recall"], ["cells", "worst"]], width_ratios=(2, 1), height_ratios=(3, 2)
        )
        _draw_recall_curve(axes["recall"], recall)
        _list_worst(axes["worst"], matrix, recall, names)
    if classes <= _MAX_NUMBERED:
        _number_cells(axes["cells"], matrix, share)
    block = -(-classes // _MAX_CELLS)
    picture = axes["cells"].imshow(
        _block_maximum(share, block),
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        interpolation="nearest",
        extent=(-0.5, classes - 0.5, classes - 0.5, -0.5),
        aspect="auto",
    )
    axes["cells"].set_xlabel("predicted class")
    axes["cells"].set_ylabel("true class")
    bar = figure.colorbar(
        picture, ax=axes["cells"], location="bottom", fraction=0.03, pad=0.02, aspect=50
    )
    largest = f" (largest of {block}×{block} classes)" if block > 1 else ""
    bar.set_label(f"share of the true class's examples{largest}")
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks(ticks, labels=[f"{tick:.0%}" for tick in ticks])
    figure.savefig(path, format="png", dpi=130)


def _series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(steps), np.array(values, np.float64)


def _moving_average(
    steps: np.ndarray, values: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.full(window, 1 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def _line(style: Mapping[str, str], steps: np.ndarray) -> dict[str, object]:
    """Marks the points while they are few enough to be told apart."""
    marker = style["marker"] if len(steps) <= 30 else None
    return {**style, "marker": marker, "markersize": 4, "linewidth": 1.8}


def _say_missing(axes: "Axes", what: str) -> None:
    message = f"{what}: none was logged"
    axes.text(0.5, 0.5, message, ha="center", va="center", color=_GREY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _font_size(classes: int) -> float:
    return 10 if classes <= 25 else 7


def _block_maximum(share: np.ndarray, block: int) -> np.ndarray:
    """The largest of every block×block cells: [K, K] to [ceil(K / block), ceil(K / block)]."""
    padding = -len(share) % block
    padded = np.pad(share, ((0, padding), (0, padding)))
    blocks = len(padded) // block
    return padded.reshape(blocks, block, blocks, block).max(axis=(1, 3))


def _number_cells(axes: "Axes", matrix: np.ndarray, share: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(matrix), strict=True):
        axes.text(
            column,
            row,
            f"{matrix[row, column]}",
            ha="center",
            va="center",
            color="white" if share[row, column] > 0.3 else "black",
            fontsize=10 if len(matrix) <= 12 else 8,
        )


def _name_axes(axes: "Axes", names: Sequence[str]) -> None:
    text = {"fontsize": _font_size(len(names)), "parse_math": False}
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **text, **(slant if max(map(len, names)) > 3 else {}))
    axes.set_yticks(range(len(names)), names, **text)


def _draw_recall_bars(axes: "Axes", recall: np.ndarray, examples: np.ndarray) -> None:
    """One bar a class, in line with the rows of the matrix."""
    size = _font_size(len(recall)) - 1
    rows = np.arange(len(recall))
    axes.barh(rows, np.nan_to_num(recall), color=_BLUE, height=0.7)
    for row, value in zip(rows, recall, strict=True):
        place = {"x": 0.03, "color": "black"}
        if value > 0.5:
            place = {"x": value - 0.03, "ha": "right", "color": "white"}
        elif value > 0:
            place = {"x": value + 0.03, "color": "black"}
        label = "no examples" if np.isnan(value) else f"{value:.1%}"
        axes.text(y=row, s=label, va="center", fontsize=size, **place)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(recall) - 0.5, -0.5)
    axes.set_yticks(rows, [f"n={n:,}" for n in examples], fontsize=size)
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_xlabel("recall")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_recall_curve(axes: "Axes", recall: np.ndarray) -> None:
    """The recalls of the classes that have examples, sorted."""
    known = np.sort(recall[np.isfinite(recall)])
    axes.fill_between(range(len(known)), known, color=_BLUE, alpha=0.25, linewidth=0)
    axes.plot(known, color=_BLUE, linewidth=1.8)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("classes, from worst to best")
    axes.set_ylabel("recall")
    if len(known):
        axes.set_title(f"Recall: median {np.median(known):.1%}", fontsize=11)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _list_worst(
    axes: "Axes", matrix: np.ndarray, recall: np.ndarray, names: Sequence[str], count: int = 12
) -> None:
    """The classes of lowest recall, each with the class it is most often taken for."""
    lines = [f"{'recall':>6}  class → most often taken for"]
    for i in np.argsort(recall, kind="stable")[: min(count, np.isfinite(recall).sum())]:
        mistakes = matrix[i].copy()
        mistakes[i] = 0
        taken_for = f" → {names[mistakes.argmax()]}" if mistakes.any() else ""
        lines.append(f"{recall[i]:6.1%}  {names[i]}{taken_for}")
    axes.set_axis_off()
    axes.text(
        0,
        1,
        "\n".join(lines),
        transform=axes.transAxes,
        va="top",
        family="monospace",
        fontsize=7.5,
        linespacing=1.35,
        parse_math=False,
    )
