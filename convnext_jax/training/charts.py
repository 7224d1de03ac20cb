"""Charts as SVG for a page of HTML, drawn from plain numbers.

Written out here, not by matplotlib, because the page gives them its colours, light or dark, by the
classes of its style sheet; and because a value is shown where the pointer rests on it (`<title>`),
without a script. Every text from outside is escaped.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

MAX_NUMBERED = 20  # classes up to which every cell of a confusion matrix holds its count
MAX_NAMED = 50  # classes up to which the axes name them

_WIDTH, _HEIGHT = 560, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40  # margins around the plot
_MAX_POINTS = 800  # of a curve: more than there are pixels for
_MAX_MARKED = 60  # points up to which each has a dot
_MAX_TOUCHED = 200  # points of a curve that tell their value
MAX_CELLS = 250  # cells a side beyond which a single one could not be seen


class Curve(NamedTuple):
    """A line of a chart: its style is a class of the page's style sheet."""

    name: str
    style: str
    steps: np.ndarray
    values: np.ndarray


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    text: Callable[[float], str],
    x_title: str = "step",
    x_range: tuple[float, float] | None = None,
    background: Curve | None = None,
    bottom: float | None = None,
    top: float | None = None,
    last: float | None = None,
) -> str:
    """A figure with a line for each curve, a legend of their last values, and axes.

    Args:
      title: heading.
      curves: what to draw; values that are not finite are left out, and so are empty curves.
      text: how a value is written.
      x_title: what the steps are.
      x_range: the first and last of them on the axis; default by the curves.
      background: a curve to draw faintly behind the others; the axes do not make room for it.
      bottom: least value of the axis; default by the values.
      top: greatest value of the axis.
      last: what the legend says of the curves; default the last value of each.

    Returns:
      HTML; where nothing was logged it says so.
    """
    curves = [_finite(curve) for curve in curves]
    curves = [curve for curve in curves if len(curve.steps)]
    head = f'<figure class="chart"><h3>{escape(title)}</h3>'
    if not curves:
        return head + '<p class="missing">None was logged.</p></figure>'

    values = np.concatenate([curve.values for curve in curves])
    low = float(values.min()) if bottom is None else bottom
    high = float(values.max()) if top is None else top
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # hardly a curve: seen from 0
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    first, end = x_range or (
        min(float(curve.steps[0]) for curve in curves),
        max(float(curve.steps[-1]) for curve in curves),
    )
    end = end if end > first else first + 1
    y_ticks = nice_ticks(low, high)
    x_ticks = [tick for tick in nice_ticks(first, end) if first <= tick <= end]
    # The axis ends at a tick, so that no curve touches the frame.
    low = min(low, y_ticks[0]) if bottom is None else bottom
    high = max(high, y_ticks[-1])

    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x_of(step: float) -> float:
        return _LEFT + width * (step - first) / (end - first)

    def y_of(value: float) -> float:
        return _TOP + height * (high - value) / (high - low)

    def path(curve: Curve) -> str:
        points = [
            f"{x_of(curve.steps[i]):.1f} {y_of(curve.values[i]):.1f}"
            for i in _spread(len(curve.steps), _MAX_POINTS)
        ]
        return f'<path class="line {curve.style}" d="M{" L".join(points)}"/>'

    parts = [head, _legend(curves, text, last)]
    parts.append(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">')
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(text(tick))}</text>"
        )
    floor = _TOP + height
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{floor + 17}" text-anchor="middle">'
            f"{escape(short_number(tick))}</text>"
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}"/>')
    parts.append(
        f'<text class="tick" x="{_LEFT + width / 2}" y="{_HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_title)}</text>"
    )
    if background is not None and len((faint := _finite(background)).steps):
        # A window of its own cuts off what leaves the plot; it needs no name, as a clip path does.
        parts.append(
            f'<svg x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" '
            f'viewBox="{_LEFT} {_TOP} {width} {height}">{path(faint)}</svg>'
        )
    for curve in curves:
        parts.append(path(curve))
        marked = len(curve.steps) <= _MAX_MARKED
        for i in _spread(len(curve.steps), _MAX_TOUCHED):
            step, value = curve.steps[i], curve.values[i]
            place = f'cx="{x_of(step):.1f}" cy="{y_of(value):.1f}"'
            said = f"{curve.name}, {x_title} {step:,.0f}: {text(float(value))}"
            dot = f'<circle class="dot {curve.style}" {place} r="2.6"/>' if marked else ""
            parts.append(
                f'<g><title>{escape(said)}</title>{dot}<circle class="touch" {place} r="7"/></g>'
            )
    parts.append("</svg></figure>")
    return "".join(parts)


def confusion_chart(
    cells: tuple[np.ndarray, np.ndarray, np.ndarray], examples: np.ndarray, names: Sequence[str]
) -> str:
    """A confusion matrix: the depth of a cell's colour is its share of the examples of its class.

    On a square-root scale, so that rare confusions show. Up to 20 classes cells hold their counts,
    up to 50 the axes name the classes, and beyond 250 a cell shows the largest of a block: the size
    of the picture is bounded whatever the number of classes.

    Args:
      cells: right classes, predicted classes and counts of the cells that are not 0.
      examples: [K] of each class.
      names: K names.

    Returns:
      HTML.
    """
    classes = len(names)
    rows, columns, counts = cells
    shares = counts / np.maximum(examples[rows], 1)
    if classes > MAX_NAMED:
        return _confusion_picture(rows, columns, shares, classes)

    cell = 38 if classes <= MAX_NUMBERED else 16
    size = 12 if classes <= MAX_NUMBERED else 10.5
    labels = [shorten(name, 18) for name in names]
    # Letters are about 0.6 of their size wide; the columns' names rise at 45 degrees.
    margin = min(max(map(len, labels)), 18) * size * 0.62 + 32
    slanted = max(map(len, labels)) > 3
    above = (0.71 * margin if slanted else 20) + 22
    side = classes * cell
    right = 0.71 * margin if slanted else 10
    parts = [
        f'<svg class="matrix" viewBox="0 0 {margin + side + right:.0f} {above + side + 4:.0f}" '
        f'style="max-width:{margin + side + right:.0f}px" role="img" '
        'aria-label="Confusion matrix">'
    ]
    for i, label in enumerate(labels):
        middle = (i + 0.5) * cell
        parts.append(
            f'<text class="tick" font-size="{size}" text-anchor="end" x="{margin - 6:.1f}" '
            f'y="{above + middle + 4:.1f}">{escape(label)}</text>'
        )
        x, y = margin + middle, above - 6
        turn = f' transform="rotate(-45 {x:.1f} {y:.1f})"' if slanted else ""
        anchor = "start" if slanted else "middle"
        parts.append(
            f'<text class="tick" font-size="{size}" text-anchor="{anchor}" x="{x:.1f}" '
            f'y="{y:.1f}"{turn}>{escape(label)}</text>'
        )
    for i in range(classes + 1):
        at = i * cell
        parts.append(
            f'<path class="grid" d="M{margin:.1f} {above + at:.1f}h{side}'
            f'M{margin + at:.1f} {above:.1f}v{side}"/>'
        )
    for row, column, count, share in zip(rows, columns, counts, shares, strict=True):
        x, y = margin + column * cell, above + row * cell
        said = f"{names[row]}, taken for {names[column]}: {count:,} of {examples[row]:,}"
        if row == column:
            said = f"{names[row]}: {count:,} of {examples[row]:,} right"
        style = "right" if row == column else "wrong"
        parts.append(
            f'<g><title>{escape(said)} ({share:.1%})</title><rect class="{style}" x="{x:.1f}" '
            f'y="{y:.1f}" width="{cell}" height="{cell}" fill-opacity="{math.sqrt(share):.3f}"/>'
        )
        if classes <= MAX_NUMBERED:
            deep = " deep" if share > 0.25 else ""
            parts.append(
                f'<text class="count{deep}" text-anchor="middle" font-size="{_fit(count)}" '
                f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}">{short_number(count)}</text>'
            )
        parts.append("</g>")
    middle = above + side / 2
    parts.append(
        f'<text class="tick" font-size="11" x="12" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle:.0f})">true class</text>'
        f'<text class="tick" font-size="11" x="{margin + side / 2:.0f}" y="12" '
        'text-anchor="middle">predicted class</text></svg>'
    )
    return "".join(parts)


def picture(image: np.ndarray, side: int, alt: str = "") -> str:
    """An `<img>` that carries its pixels, shrunk to fit into a square; small ones stay small.

    Args:
      image: uint8 [H, W, 3] or [H, W, 4].
      side: most pixels of its longer side.
      alt: what it shows.
    """
    drawn = Image.fromarray(image)
    drawn.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    coarse = ' class="coarse"' if max(drawn.size) < 64 else ""
    return f'<img{coarse} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie from `low`, or just below it, to `high` or just above.

    Every tick is a multiple of 1, 2 or 5 times a power of ten.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks


def short_number(value: float) -> str:
    """A number in few characters: 1,234, 12.5k, 3M, 0.02, 4e-5."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.4g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    mantissa, e, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def shorten(name: str, length: int) -> str:
    """The name, cut off where it is longer than so many characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _confusion_picture(
    rows: np.ndarray, columns: np.ndarray, shares: np.ndarray, classes: int
) -> str:
    block = -(-classes // MAX_CELLS)
    cells = -(-classes // block)
    depth = np.zeros((2, cells, cells))  # of the right ones, and of the wrong ones
    np.maximum.at(depth, ((rows != columns).astype(int), rows // block, columns // block), shares)
    # Colours that can be seen on white and on black; the page shines through where nothing is.
    colours = np.array([(43, 140, 214), (230, 110, 20)], np.uint8)
    shown = depth.argmax(0)
    alpha = np.rint(255 * np.sqrt(depth.max(0))).astype(np.uint8)
    image = np.concatenate([colours[shown], alpha[..., None]], axis=-1)
    # Enlarged by whole numbers, so that no browser blurs it.
    scale = max(1, 500 // cells)
    image = image.repeat(scale, 0).repeat(scale, 1)
    said = f"one cell for {block} × {block} classes, its largest" if block > 1 else "a cell a class"
    return (
        f'<div class="heat">{picture(image, max(image.shape), "Confusion matrix")}'
        f'<p class="note">Rows are the {classes:,} true classes from the first to the last, '
        f"columns the predicted ones; {said}.</p></div>"
    )


def _legend(curves: Sequence[Curve], text: Callable[[float], str], last: float | None) -> str:
    items = [
        f'<li><svg viewBox="0 0 26 8" width="26" height="8" aria-hidden="true">'
        f'<path class="line {curve.style}" d="M1 4H25"/></svg>{escape(curve.name)} '
        f"<b>{escape(text(float(curve.values[-1]) if last is None else last))}</b></li>"
        for curve in curves
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def _finite(curve: Curve) -> Curve:
    keep = np.isfinite(curve.values)
    return curve._replace(steps=curve.steps[keep], values=curve.values[keep])


def _fit(count: int) -> float:
    """Size of a count's digits in a cell."""
    return {1: 13, 2: 13, 3: 12.5, 4: 11}.get(len(short_number(int(count))), 9.5)
