"""What a run leaves to be looked at, drawn from plain data: report.html and two pictures.

`write_report` makes one page that needs no other file; `plot_curves` and `plot_confusion_matrix`
draw PNGs for wherever a picture is wanted. Of those, colours are Okabe and Ito's, which
colour-blind readers can tell apart; line styles repeat what they say. matplotlib is imported inside
the functions, and drawn with Agg through `Figure` itself: neither pyplot's state nor the backend of
a notebook is touched.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from convnext_jax.training import charts
from convnext_jax.training.charts import Curve, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from convnext_jax.data.sources import Source
    from convnext_jax.training.evaluation import Evaluation

_GREY, _BLUE, _ORANGE, _GREEN = "#767676", "#0072B2", "#D55E00", "#009E73"
_TRAIN = {"color": _GREY, "linestyle": "-", "marker": "."}
_VAL = {  # key prefix in the metrics: name and style
    "val": ("raw weights", {"color": _BLUE, "linestyle": "-", "marker": "o"}),
    "val_ema": ("EMA weights", {"color": _ORANGE, "linestyle": "--", "marker": "s"}),
}

_MAX_NAME = 22  # characters of a class name that fit beside an axis

_MISTAKES = 24  # pictures of them in a report
_ALL_CLASSES = 25  # classes up to which a report's table of them is whole from the start
_MOST_ROWS = 2000  # of any table
_PICTURE_BYTES = 2_200_000  # that a report's augmented pictures may take, however they compress

_VAL_STYLES = {"val": "raw", "val_ema": "average"}  # classes of the style sheet below

_STYLE = """
:root{--page:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5c6570;--rule:#dfe3e8;--raw:#0072b2;
--average:#d55e00;--other:#00805c;--grey:#767d86;--right:#0072b2;--wrong:#d55e00;--deep:#fff}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1d2127;--ink:#e8ebef;--soft:#a3adb8;
--rule:#333a43;--raw:#56b4e9;--average:#ff9b4a;--other:#3fcfa0;--grey:#98a1ab;--right:#4aa3dc;
--wrong:#ff9b4a;--deep:#0c0f12}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0;overflow-wrap:anywhere}
section{margin-top:52px}
section>h2{font-size:21px;margin:0 0 16px;padding-bottom:8px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:0 0 8px;font-weight:600}
p{margin:0}figure{margin:0}
.lead,.note,.missing{color:var(--soft)}
.lead{margin-top:4px}.note{margin:0 0 14px;font-size:14.5px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:16px;margin:24px 0}
.tile{background:var(--card);border-radius:10px;padding:18px 22px;border-left:5px solid var(--raw)}
.tile.average{border-color:var(--average)}
.tile h2{font-size:15px;font-weight:600;margin:0}
.tile p{color:var(--soft);font-size:14.5px}
.tile .big{font-size:40px;line-height:1.25;font-weight:650;color:var(--ink);letter-spacing:-.01em}
.tile .big small{font-size:16px;font-weight:400;color:var(--soft);letter-spacing:0}
.kept{font-weight:400;font-size:12.5px;border:1px solid var(--rule);border-radius:9px;
padding:1px 8px;margin-left:6px;color:var(--soft)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0;font-size:14.5px}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:28px}
svg{display:block;width:100%;height:auto;overflow:visible}
.chart .legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0 0 6px;padding:0;
font-size:13.5px;color:var(--soft)}
.legend li{display:flex;align-items:center;gap:7px}.legend svg{width:26px}
.legend b{color:var(--ink)}
.tick{fill:var(--soft)}.chart .tick{font-size:12px}
.grid{stroke:var(--rule);fill:none}.axis{stroke:var(--grey);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.train{stroke:var(--grey)}.line.raw{stroke:var(--raw)}
.line.average{stroke:var(--average);stroke-dasharray:7 3}.line.other{stroke:var(--other)}
.line.faint{stroke:var(--grey);stroke-width:1;opacity:.35}
.dot.train{fill:var(--grey)}.dot.raw{fill:var(--raw)}.dot.average{fill:var(--average)}
.dot.other{fill:var(--other)}.touch{fill:transparent}g:hover>.dot{r:4.5}
.draws{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:8px;
max-width:calc(var(--columns)*150px)}
.draws figcaption{text-align:center}
.column{font-size:13.5px;color:var(--soft)}.drawn{grid-column:2/-1}
.draws img{width:100%;border-radius:4px}.draws figcaption{font-size:12px;color:var(--soft);
line-height:1.3;overflow-wrap:anywhere;padding-top:2px}
img{display:block;max-width:100%}.coarse,.heat img{image-rendering:pixelated}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:32px;
align-items:start}
.below{display:grid;gap:28px}
.heat img{width:100%;border:1px solid var(--rule)}.heat .note{margin-top:8px}
rect.right{fill:var(--right)}rect.wrong{fill:var(--wrong)}
.count{fill:var(--ink)}.count.deep{fill:var(--deep);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14.5px;width:100%}
th{text-align:left;font-weight:600;color:var(--soft);font-size:13px}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
td{overflow-wrap:anywhere}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th:last-child,td:last-child{padding-right:2px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.bar{display:block;background:var(--card);border-radius:3px;height:14px;margin-top:4px;
min-width:90px}.classes td:nth-child(2){width:55%}
.beside .classes td:nth-child(2){width:26%}
.bar i{display:block;height:100%;background:var(--raw);border-radius:3px}
details{margin-top:14px}summary{cursor:pointer;color:var(--raw);font-size:14.5px}
.mistakes{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:22px 16px}
.mistakes img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--card);border-radius:6px}
.mistakes figcaption{font-size:14px;line-height:1.35;padding-top:6px;overflow-wrap:anywhere}
.mistakes figcaption>*{display:block}
.true{color:var(--right)}.taken{color:var(--wrong)}.place{color:var(--soft);font-size:11.5px}
@media print{section{break-inside:avoid-page}}
""".strip()


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    metrics: Sequence[Mapping[str, float]],
    timing: Sequence[Mapping[str, float]],
    evaluations: Mapping[str, Evaluation],
    exported: str,
    class_names: Sequence[str],
    source: Source,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    facts: Mapping[str, object] | None = None,
    augmentation: np.ndarray | None = None,
    captions: Sequence[Sequence[str]] | None = None,
) -> None:
    """Writes a run's report: one page of HTML that needs no other file, network or script.

    Its size stays below some 6 MB, whatever the data.

    Args:
      path: file to write.
      title: what the run is called.
      metrics: rows of metrics.jsonl; see `plot_curves`.
      timing: rows of timing.jsonl: "step" and "examples_per_second".
      evaluations: of the final weights, by name: "val", and "val_ema" where there is an average.
      exported: which of them the exported model has; its mistakes are shown.
      class_names: K names.
      source: the examples of the evaluations.
      config: the run's settings, nested.
      defaults: those that a run has unless it says otherwise; what differs is set apart.
      facts: further lines on the run, such as its devices and its number of steps, by name.
      augmentation: uint8 [rows, columns, S, S, 3]: in each row an example as it is, then as it was
        drawn for training.
      captions: [rows][columns] texts below these pictures; an empty one says nothing.
    """
    main = evaluations[exported]
    body = [
        _summary_section(title, evaluations, exported, metrics, facts or {}),
        _curves_section(metrics, timing),
    ]
    if augmentation is not None and augmentation.size:
        body.append(_augmentation_section(augmentation, captions))
    body.append(_confusion_section(main, class_names))
    body.append(_classes_section(main, class_names))
    body.append(_mistakes_section(main, class_names, source))
    body.append(_settings_section(config, defaults))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
    # A file system may hand out names that are no Unicode; "replace" makes them readable.
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def _summary_section(
    title: str,
    evaluations: Mapping[str, Evaluation],
    exported: str,
    metrics: Sequence[Mapping[str, float]],
    facts: Mapping[str, object],
) -> str:
    main = evaluations[exported]
    wrong = int((~main.right).sum())
    tiles = []
    for name in sorted(evaluations, key=lambda name: name != exported):
        values, label = evaluations[name].metrics, _name_of(name)
        kept = '<span class="kept">exported</span>' if name == exported else ""
        _, curve = _series(metrics, f"{name}/top1")
        highest = max(curve[np.isfinite(curve)], default=0.0)
        best = f"best of the run {highest:.2%}, " if highest > values["top1"] else ""
        tiles.append(
            f'<div class="tile {_VAL_STYLES.get(name, "raw")}"><h2>{escape(label)} {kept}</h2>'
            f'<p class="big">{values["top1"]:.2%}<small> top-1</small></p>'
            f"<p>{best}top-5 {values['top5']:.2%}, loss {values['loss']:.4f}</p></div>"
        )
    found = f"{wrong:,} of {len(main.labels):,} held-out examples wrong"
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in (dict(facts) | _surroundings()).items()
    )
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="lead">{found}.</p></header><div class="tiles">{"".join(tiles)}</div>'
        f'<dl class="facts">{rows}</dl>'
    )


def _curves_section(
    metrics: Sequence[Mapping[str, float]], timing: Sequence[Mapping[str, float]]
) -> str:
    steps, values = _series(metrics, "train/loss")
    train, noise = Curve("train", "train", steps, values), None
    if len(steps) > 100:
        noise = train._replace(style="faint")
        steps, values = _moving_average(steps, values, window=len(steps) // 40)
        train = Curve("train, smoothed", "train", steps, values)

    def val(metric: str) -> list[Curve]:
        return [
            Curve(_name_of(name), style, *_series(metrics, f"{name}/{metric}"))
            for name, style in _VAL_STYLES.items()
        ]

    rate = Curve("learning rate", "other", *_series(metrics, "train/learning_rate"))
    speed = Curve("training", "other", *_series(timing, "examples_per_second"))
    number = charts.short_number
    x_range = (0.0, float(max((row["step"] for row in [*metrics, *timing]), default=1)))

    def chart(heading: str, curves: Sequence[Curve], **options: Any) -> str:
        return charts.line_chart(heading, curves, x_range=x_range, **options)

    drawn = [
        chart("Loss", [train, *val("loss")], text=number, background=noise),
        chart("Validation accuracy, top-1", val("top1"), text=_percent),
        chart("Learning rate", [rate], text=number, bottom=0.0),
        chart("Throughput, examples a second", [speed], text=number, bottom=0.0),
    ]
    return f'<section><h2>Curves</h2><div class="charts">{"".join(drawn)}</div></section>'


def _augmentation_section(pictures: np.ndarray, captions: Sequence[Sequence[str]] | None) -> str:
    rows, columns = pictures.shape[:2]
    side = max(8, min(128, int((_PICTURE_BYTES / (3 * rows * columns)) ** 0.5)))
    cells = ['<p class="column">original</p>']
    if columns > 1:
        cells.append('<p class="column drawn">as the network saw it in training</p>')
    for row in range(rows):
        for column in range(columns):
            caption = captions[row][column] if captions is not None else ""
            below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
            alt = f"example {row + 1}, " + (f"draw {column}" if column else "original")
            drawn = charts.picture(pictures[row, column], side, alt)
            cells.append(f"<figure>{drawn}{below}</figure>")
    return (
        "<section><h2>Augmentation</h2>"
        f'<div class="draws" style="--columns:{columns}">{"".join(cells)}</div></section>'
    )


def _confusion_section(evaluation: Evaluation, names: Sequence[str]) -> str:
    rows, columns, counts = cells = evaluation.confusions(len(names))
    _, examples = evaluation.per_class(len(names))
    wrong = np.flatnonzero(rows != columns)
    worst = wrong[np.argsort(-counts[wrong], kind="stable")][:12]
    lines = [
        (
            _name_cell(names[rows[i]]),
            _name_cell(names[columns[i]]),
            f"{counts[i]:,}",
            f"{counts[i] / examples[rows[i]]:.1%}",
        )
        for i in worst
    ]
    table = _table(("true class", "taken for", "times", "of its class"), lines, numbers=2)
    beside = f"<div><h3>Most frequent confusions</h3>{table}</div>" if lines else ""
    # Half the page is too narrow for the names of many classes.
    place = "below" if charts.MAX_NUMBERED < len(names) <= charts.MAX_NAMED else "beside"
    return (
        f'<section><h2>Confusion matrix</h2><div class="{place}">'
        f"<div>{charts.confusion_chart(cells, examples, names)}</div>{beside}</div></section>"
    )


def _classes_section(evaluation: Evaluation, names: Sequence[str]) -> str:
    right, examples = evaluation.per_class(len(names))
    present = np.flatnonzero(examples)
    recall = right[present] / examples[present]
    order = np.argsort(recall, kind="stable")
    lines = [
        (
            _name_cell(names[present[i]]),
            f'<span class="bar"><i style="width:{100 * recall[i]:.1f}%"></i></span>',
            f"{recall[i]:.1%}",
            f"{right[present[i]]:,} / {examples[present[i]]:,}",
        )
        for i in order[:_MOST_ROWS]
    ]
    head = ("class", "", "accuracy", "right")
    if len(order) <= _ALL_CLASSES:
        shown = _table(head, lines, numbers=2, style="classes")
    else:
        sorted_recall = Curve("median", "raw", np.arange(1, len(order) + 1), recall[order])
        chart = charts.line_chart(
            "Accuracy of the classes, from the worst to the best",
            [sorted_recall], text=_percent, x_title="class", bottom=0.0, top=1.0,
            last=float(np.median(recall)),
        )  # fmt: skip
        more = f"the first {_MOST_ROWS:,}" if len(order) > _MOST_ROWS else f"all {len(order):,}"
        shown = (
            f'<div class="beside"><div>{chart}</div><div><h3>The worst</h3>'
            f"{_table(head, lines[:15], numbers=2, style='classes')}</div></div>"
            f"<details><summary>Show {more} classes, the worst first</summary>"
            f"{_table(head, lines, numbers=2, style='classes')}</details>"
        )
    absent = len(names) - len(present)
    note = f'<p class="note">Classes without a held-out example: {absent:,}.</p>' if absent else ""
    return f"<section><h2>Accuracy of each class</h2>{shown}{note}</section>"


def _mistakes_section(evaluation: Evaluation, names: Sequence[str], source: Source) -> str:
    cards = []
    for i in evaluation.worst_mistakes(_MISTAKES).tolist():
        true, taken = names[evaluation.labels[i]], names[evaluation.predictions[i]]
        index = int(evaluation.ids[i])
        place = source.example_name(index)
        sure = evaluation.confidences[i]
        cards.append(
            f'<figure title="{escape(place)}">{charts.picture(source[index]["image"], 128, true)}'
            f'<figcaption><b class="true">{escape(shorten(true, 60))}</b>'
            f'<span class="taken">{escape(shorten(taken, 60))} <small>{sure:.1%}</small></span>'
            f'<small class="place">{escape(shorten(Path(place).name, 40))}</small>'
            "</figcaption></figure>"
        )
    said = (
        '<p class="note">The mistakes that the network was surest of: <b class="true">what it is'
        '</b>, and <span class="taken">what it was taken for</span> with its probability.</p>'
        f'<div class="mistakes">{"".join(cards)}</div>'
    )
    none = f'<p class="note">None: all {len(evaluation.labels):,} examples are right.</p>'
    return f"<section><h2>Worst mistakes</h2>{said if cards else none}</section>"


def _settings_section(config: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> str:
    ours, usual = _flat(config), _flat(defaults or {})
    changed = [name for name in ours if defaults is not None and ours[name] != usual.get(name)]
    lines = [(_code(name), _code(ours[name]), _code(usual.get(name, ""))) for name in changed]
    same = [(_code(name), _code(ours[name])) for name in ours if name not in changed]
    parts = ["<section><h2>Settings</h2>"]
    if lines:
        parts.append("<h3>Changed</h3>" + _table(("setting", "value", "default"), lines))
    if same:
        table = _table(("setting", "value"), same)
        if lines:
            heading = f"<summary>Show the {len(same)} that have their defaults</summary>"
            parts.append(f"<details>{heading}{table}</details>")
        else:
            parts.append(table)
    return "".join(parts) + "</section>"


def _surroundings() -> dict[str, str]:
    """What the page was written with."""
    packages = ("convnext-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = [f"Python {platform.python_version()}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    return {
        "software": ", ".join(versions),
        "hardware": f"{device}; {os.cpu_count()} processor cores, {platform.platform()}",
    }


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0, style: str = ""
) -> str:
    """A table of cells that are HTML already; the last `numbers` columns align to the right."""
    first = len(head) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ['class="number"' if i >= first else "" for i in range(len(cells))]
        return "".join(f"<{tag} {k}>{c}</{tag}>" for c, k in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _name_cell(name: str) -> str:
    return f'<span title="{escape(shorten(name, 200))}">{escape(shorten(name, 44))}</span>'


def _code(text: str) -> str:
    return f"<code>{escape(shorten(text, 300))}</code>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"model.depths": "[3, 3, 9, 3]"}."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, default=str, ensure_ascii=False)
    return flat


def _name_of(evaluation: str) -> str:
    return _VAL[evaluation][0] if evaluation in _VAL else evaluation


def _percent(value: float) -> str:
    text = f"{value:.2%}"
    return text.replace(".00%", "%")


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
    names = [shorten(name, _MAX_NAME) for name in class_names]

    height = float(np.clip(0.45 * classes + 2.2, 5, 11)) if classes <= charts.MAX_NAMED else 8.5
    figure = Figure(figsize=(height * 1.45, height), layout="constrained")
    accuracy = f"{right:,} of {total:,} right ({right / total:.2%})" if total else "no examples"
    figure.suptitle(f"{title}: {accuracy}", fontsize=14, parse_math=False)

    if classes <= charts.MAX_NAMED:
        axes = figure.subplot_mosaic([["cells", "recall"]], width_ratios=(3, 1))
        _name_axes(axes["cells"], names)
        _draw_recall_bars(axes["recall"], recall, examples)
    else:
        axes = figure.subplot_mosaic(
            [["cells", "recall"], ["cells", "worst"]], width_ratios=(2, 1), height_ratios=(3, 2)
        )
        _draw_recall_curve(axes["recall"], recall)
        _list_worst(axes["worst"], matrix, recall, names)
    if classes <= charts.MAX_NUMBERED:
        _number_cells(axes["cells"], matrix, share)
    block = -(-classes // charts.MAX_CELLS)
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


def _say_missing(axes: Axes, what: str) -> None:
    message = f"{what}: none was logged"
    axes.text(0.5, 0.5, message, ha="center", va="center", color=_GREY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _font_size(classes: int) -> float:
    return 10 if classes <= 25 else 7


def _block_maximum(share: np.ndarray, block: int) -> np.ndarray:
    """The largest of every block×block cells: [K, K] to [ceil(K / block), ceil(K / block)]."""
    padding = -len(share) % block
    padded = np.pad(share, ((0, padding), (0, padding)))
    blocks = len(padded) // block
    return padded.reshape(blocks, block, blocks, block).max(axis=(1, 3))


def _number_cells(axes: Axes, matrix: np.ndarray, share: np.ndarray) -> None:
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


def _name_axes(axes: Axes, names: Sequence[str]) -> None:
    text = {"fontsize": _font_size(len(names)), "parse_math": False}
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **text, **(slant if max(map(len, names)) > 3 else {}))
    axes.set_yticks(range(len(names)), names, **text)


def _draw_recall_bars(axes: Axes, recall: np.ndarray, examples: np.ndarray) -> None:
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


def _draw_recall_curve(axes: Axes, recall: np.ndarray) -> None:
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
    axes: Axes, matrix: np.ndarray, recall: np.ndarray, names: Sequence[str], count: int = 12
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
