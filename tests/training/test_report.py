"""The pictures of a run: what they show is what was measured, and any run can be drawn."""

import base64
import io
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from convnext_jax.data.sources import ArraySource
from convnext_jax.training import charts, report
from convnext_jax.training.evaluation import Evaluation


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, for a look at what is in them."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: object, **options: object) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def rows(steps: int) -> list[dict[str, float]]:
    train = [
        {"step": s, "train/loss": 2 / s, "train/learning_rate": 1e-3 * s}
        for s in range(1, steps + 1)
    ]
    val = [
        {
            "step": s,
            "val/loss": 3 / s,
            "val/top1": 1 - 1 / s,
            "val_ema/loss": 4 / s,
            "val_ema/top1": 1 - 2 / s,
            "val/top5": 1.0,
        }
        for s in range(10, steps + 1, 10)
    ]
    return sorted(train + val, key=lambda row: row["step"])


def line(axes: object, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return list(found.get_xdata()), list(found.get_ydata())


def test_curves_show_what_was_measured(tmp_path: Path, drawn: list[Figure]):
    report.plot_curves(rows(40), tmp_path / "curves.png", title="a_b $x$")
    loss, accuracy, rate = drawn[0].axes
    steps = [10, 20, 30, 40]
    assert line(loss, "train") == (list(range(1, 41)), [2 / s for s in range(1, 41)])
    assert line(loss, "val, raw weights, last 0.075") == (steps, [3 / s for s in steps])
    assert line(loss, "val, EMA weights, last 0.100") == (steps, [4 / s for s in steps])
    assert line(accuracy, "raw weights, last 97.50%") == (steps, [1 - 1 / s for s in steps])
    assert line(accuracy, "EMA weights, last 95.00%") == (steps, [1 - 2 / s for s in steps])
    assert list(rate.lines[0].get_ydata()) == [1e-3 * s for s in range(1, 41)]
    for axes in drawn[0].axes:
        assert axes.get_title()
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
    # Colour is not all that tells the two apart.
    assert accuracy.lines[0].get_linestyle() != accuracy.lines[1].get_linestyle()


def test_long_noisy_losses_are_averaged(tmp_path: Path, drawn: list[Figure]):
    noise = np.random.default_rng(0).normal(size=4000)
    metrics = [{"step": s, "train/loss": 1 + noise[s]} for s in range(4000)]
    report.plot_curves(metrics, tmp_path / "curves.png")
    steps, values = line(drawn[0].axes[0], "train, moving average")
    assert np.std(values) < 0.2
    at = steps.index(2000 - 0.5)
    assert values[at] == pytest.approx(1 + noise[1950:2050].mean())


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "train/loss": 2.0}],
        [{"step": 1, "val/top1": 0.5, "val/loss": None}],
        [{"step": 1, "val/loss": float("inf")}],
        [{"step": s, "train/loss": float("nan"), "val/loss": float("inf")} for s in range(200)],
    ],
)
def test_curves_of_hardly_a_run(tmp_path: Path, drawn: list[Figure], metrics: list[dict]):
    report.plot_curves(metrics, tmp_path / "curves.png")
    for axes in drawn[0].axes:
        said = any("none was logged" in text.get_text() for text in axes.texts)
        assert said == (not axes.lines)
    assert (tmp_path / "curves.png").stat().st_size > 1000


FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]


def test_confusion_matrix_shows_counts_and_recall(tmp_path: Path, drawn: list[Figure]):
    matrix = np.array(
        [[8, 2, 0, 0, 0], [0, 1, 0, 0, 3], [0, 0, 7, 0, 0], [0, 0, 0, 0, 0], [5, 0, 0, 0, 0]]
    )
    report.plot_confusion_matrix(matrix, FASHION, tmp_path / "confusion.png")
    cells, recall = drawn[0].axes[:2]
    assert "16 of 26 right (61.54%)" in drawn[0].get_suptitle()
    counts = {text.get_position(): text.get_text() for text in cells.texts}
    # Row 1 is the true class, drawn downwards; column 4 the predicted one, drawn to the right.
    assert counts == {
        (0, 0): "8",
        (1, 0): "2",
        (1, 1): "1",
        (4, 1): "3",
        (2, 2): "7",
        (0, 4): "5",
    }
    assert cells.get_ylim() == (4.5, -0.5)
    assert [label.get_text() for label in cells.get_yticklabels()] == FASHION
    assert [label.get_text() for label in cells.get_xticklabels()] == FASHION
    assert (cells.get_xlabel(), cells.get_ylabel()) == ("predicted class", "true class")
    shares = np.asarray(cells.images[0].get_array())
    assert shares[0].tolist() == [0.8, 0.2, 0, 0, 0]
    assert [bar.get_width() for bar in recall.patches] == [0.8, 0.25, 1, 0, 0]
    assert [text.get_text() for text in recall.texts] == [
        "80.0%",
        "25.0%",
        "100.0%",
        "no examples",
        "0.0%",
    ]
    assert recall.get_ylim() == cells.get_ylim()


def test_confusion_matrix_of_a_thousand_classes(tmp_path: Path, drawn: list[Figure]):
    matrix = np.diag(np.full(1000, 50))
    matrix[123, 123], matrix[123, 901] = 10, 40
    matrix[500, 500], matrix[500, 3] = 30, 20
    matrix[7] = 0
    names = [f"class {i} $ {'x' * 50}" for i in range(1000)]
    report.plot_confusion_matrix(matrix, names, tmp_path / "confusion.png")
    cells, recall, worst = drawn[0].axes[:3]
    assert not cells.texts
    assert len(cells.get_xticklabels()) < 20
    shares = np.asarray(cells.images[0].get_array())
    assert shares.shape == (250, 250)
    assert np.argwhere((shares > 0) & (shares < 1)).tolist() == [
        [123 // 4, 901 // 4],
        [500 // 4, 3 // 4],
    ]
    assert shares[123 // 4, 901 // 4] == pytest.approx(0.8)
    curve = recall.lines[0].get_ydata()
    assert len(curve) == 999, "the class without examples has no recall"
    assert curve[0] == pytest.approx(0.2)
    _, first, second, *_ = worst.texts[0].get_text().splitlines()
    assert first.split()[:3] == ["20.0%", "class", "123"]
    assert "→ class 901" in first
    assert second.split()[:3] == ["60.0%", "class", "500"]
    assert "→ class 3" in second
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 2500


@pytest.mark.parametrize("classes", [1, 21, 51, 251])
def test_any_number_of_classes_can_be_drawn(tmp_path: Path, drawn: list[Figure], classes: int):
    matrix = np.eye(classes, dtype=np.int64)
    report.plot_confusion_matrix(matrix, ["$x_"] * classes, tmp_path / "confusion.png")
    shares = np.asarray(drawn[0].axes[0].images[0].get_array())
    assert np.diag(shares).all()
    assert len(shares) == (classes if classes <= 250 else 126)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 2500


def test_confusion_matrix_without_examples(tmp_path: Path, drawn: list[Figure]):
    for classes in (3, 60):
        matrix = np.zeros((classes, classes), np.int64)
        report.plot_confusion_matrix(matrix, ["a"] * classes, tmp_path / "confusion.png")
        assert "no examples" in drawn[-1].get_suptitle()


def test_matplotlib_is_imported_when_drawing_and_pyplot_never(tmp_path: Path):
    program = (
        "import sys\n"
        "from convnext_jax.training import report\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"report.plot_curves([], {str(tmp_path / 'curves.png')!r})\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ------------------------------------------------------------------------------------- report.html


class Page(HTMLParser):
    """What is on a page; refuses one whose elements do not nest."""

    VOID = {"meta", "img", "path", "circle", "rect"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(said.split()) for tag, said in self.words if tag != "style")

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append((self.open[-1], data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the first table with these headings."""
        tables, rows = self.text_of_tables(), []
        for found in tables:
            if found[0] == list(head):
                rows = found[1:]
                break
        assert rows, f"no table {head}"
        return rows

    def text_of_tables(self) -> list[list[list[str]]]:
        tables = []
        for row in re.split(r"<table[^>]*>", self.rawdata_all)[1:]:
            lines = re.findall(r"<tr>(.*?)</tr>", row.split("</table>")[0])
            cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]
            tables.append(
                [[unescape(re.sub("<[^>]*>", "", cell)) for cell in line] for line in cells]
            )
        return tables

    def feed(self, data):
        self.rawdata_all = data
        super().feed(data)


def evaluation(labels, predictions, confidences=None, **metrics) -> Evaluation:
    labels, predictions = np.array(labels, np.int32), np.array(predictions, np.int32)
    confidences = np.full(len(labels), 0.5) if confidences is None else np.array(confidences)
    top1 = float((labels == predictions).mean())
    metrics = {"loss": 0.25, "top1": top1, "top5": 1.0, **metrics}
    return Evaluation(
        metrics,
        np.arange(len(labels)),
        labels,
        predictions,
        confidences.astype(np.float32),
        np.zeros(len(labels)),
    )


def source(count: int, size: int = 8) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return ArraySource("made-up", images, np.zeros(count, int))


def page(tmp_path: Path, evaluations: dict[str, Evaluation], names: list[str], **options) -> Page:
    path = tmp_path / "report.html"
    settings = {
        "title": "a run",
        "metrics": rows(40),
        "timing": [{"step": s, "seconds": 1.0, "examples_per_second": 100.0 + s} for s in (20, 40)],
        "exported": list(evaluations)[-1],
        "source": source(len(next(iter(evaluations.values())).labels)),
        "config": {"seed": 0, "model": {"depths": (3, 3)}},
        **options,
    }
    report.write_report(path, evaluations=evaluations, class_names=names, **settings)
    return Page(path.read_text(encoding="utf-8"))


def test_report_tells_the_results(tmp_path: Path):
    raw = evaluation([0, 0, 1, 1, 2], [0, 0, 1, 1, 0], top5=0.9)
    average = evaluation([0, 0, 1, 1, 2], [0, 1, 1, 0, 1], [0.9, 0.6, 0.9, 0.7, 0.8], loss=0.125)
    written = page(tmp_path, {"val": raw, "val_ema": average}, ["ant", "bee", "cat"])
    assert "3 of 5 held-out examples wrong" in written.text
    for said in (
        "EMA weights exported 40.00% top-1",  # first, since they are the model
        "top-5 100.00%, loss 0.1250",
        "raw weights 80.00% top-1 best of the run 97.50%, top-5 90.00%, loss 0.2500",
    ):
        assert said in written.text
    assert written.text.index("EMA weights exported") < written.text.index("raw weights 80")
    assert written.table("true class", "taken for", "times", "of its class") == [
        ["ant", "bee", "1", "50.0%"],
        ["bee", "ant", "1", "50.0%"],
        ["cat", "bee", "1", "100.0%"],
    ]
    assert written.table("class", "", "accuracy", "right") == [
        ["cat", "", "0.0%", "0 / 1"],
        ["ant", "", "50.0%", "1 / 2"],
        ["bee", "", "50.0%", "1 / 2"],
    ]
    # Of the exported weights, the surest first.
    mistakes = written.text[written.text.index("Worst mistakes") :]
    assert re.findall(r"(\w+) (\w+) ([\d.]+%) (\d)", mistakes) == [
        ("cat", "bee", "80.0%", "4"),
        ("bee", "ant", "70.0%", "3"),
        ("ant", "bee", "60.0%", "1"),
    ]


def test_report_shows_the_pictures_themselves(tmp_path: Path):
    examples = source(3)
    drawn = np.random.default_rng(1).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    written = page(
        tmp_path, {"val": evaluation([0, 1, 1], [0, 1, 0])}, ["a", "b"], source=examples,
        augmentation=drawn, captions=[["", "0.7 a, 0.3 b", ""], ["", "", "<i>"]],
    )  # fmt: skip
    pictures = []
    for image in written.all("img"):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    *augmented, mistake = pictures
    np.testing.assert_array_equal(np.stack(augmented), drawn.reshape(6, 16, 16, 3))
    np.testing.assert_array_equal(mistake, examples[2]["image"])
    assert "0.7 a, 0.3 b" in written.text
    assert ("figcaption", "<i>") in written.words


def test_report_needs_nothing_else_and_believes_no_name(tmp_path: Path):
    name = "<script>alert('x')</script>\"&\ud800"
    written = page(
        tmp_path, {"val": evaluation([0, 1, 1], [1, 1, 0])}, [name, "b" * 5000], title=name,
        config={name: name, "nested": {name: [name]}}, facts={name: name},
    )  # fmt: skip
    assert not written.all("script")
    assert not written.all("link")
    for image in written.all("img"):
        assert set(image) <= {"alt", "src", "class"}
    for _, attributes in written.elements:
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes
    assert "http" not in written.rawdata_all
    assert "url(" not in written.rawdata_all
    assert "<script>alert('x')</script>\"&" in written.text
    assert "prefers-color-scheme:dark" in written.rawdata_all


def test_report_sets_changed_settings_apart(tmp_path: Path):
    written = page(
        tmp_path, {"val": evaluation([0], [0])}, ["a"],
        config={"seed": 0, "rate": 0.1, "model": {"depths": (3, 3)}, "data": {"folder": "x"}},
        defaults={"seed": 0, "rate": 0.2, "model": {"depths": [3, 3]}},
    )  # fmt: skip
    assert written.table("setting", "value", "default") == [
        ["rate", "0.1", "0.2"],
        ["data.folder", '"x"', ""],
    ]
    assert written.table("setting", "value") == [["seed", "0"], ["model.depths", "[3, 3]"]]


def test_report_curves_are_what_was_measured(tmp_path: Path):
    written = page(tmp_path, {"val": evaluation([0, 1], [0, 1])}, ["a", "b"])
    titles = [said for tag, said in written.words if tag == "title"]
    assert "raw weights, step 10: 90%" in titles
    assert "EMA weights, step 40: 95%" in titles
    assert "train, step 4: 0.5" in titles
    assert "learning rate, step 40: 0.04" in titles
    assert "training, step 20: 120" in titles
    for said in ("Loss", "Validation accuracy", "Learning rate", "Throughput"):
        assert said in written.text
    assert "None: all 2 examples are right" in written.text
    assert "None was logged" not in written.text


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "val/top1": 0.0, "val/loss": 0.0}],
        [{"step": 1, "val/top1": 1.0, "val/loss": float("inf"), "train/loss": None}],
        [{"step": s, "train/loss": float("nan")} for s in range(200)],
        [{"step": s, "train/loss": 1e-12 * s, "val/loss": -1e9} for s in range(200)],
    ],
)
def test_report_of_hardly_a_run(tmp_path: Path, metrics: list[dict]):
    written = page(
        tmp_path, {"val": evaluation([0], [0])}, ["a"], metrics=metrics, timing=[], facts=None
    )
    assert "None was logged" in written.text
    assert not re.search(r"\b(nan|inf)\b", re.sub("<style>.*</style>", "", written.rawdata_all))


@pytest.mark.parametrize("classes", [1, 2, 21, 51, 1000])
def test_report_of_any_number_of_classes_stays_small(tmp_path: Path, classes: int):
    rng = np.random.default_rng(0)
    labels = np.arange(3 * classes) // 3
    predictions = np.where(rng.random(len(labels)) < 0.7, labels, rng.permutation(labels))
    names = [f"class number {i}, of a long name" for i in range(classes + 1)]  # the last is empty
    noise = rng.integers(0, 256, (8, 8, 150, 150, 3), np.uint8)  # does not compress
    written = page(
        tmp_path, {"val": evaluation(labels, predictions)}, names, augmentation=noise,
        source=source(len(labels), 150 if classes == 21 else 8),
    )  # fmt: skip
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert "Classes without a held-out example: 1." in written.text
    assert len(written.table("class", "", "accuracy", "right")) == min(
        classes, 15 if classes > 25 else 25
    )


def test_ticks_are_round_and_enclose_the_values():
    assert charts.nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.nice_ticks(0.93, 0.99) == [0.92, 0.94, 0.96, 0.98, 1.0]
    assert charts.nice_ticks(0, 351) == [0, 100, 200, 300, 400]
    assert charts.nice_ticks(-3, 4) == [-4, -2, 0, 2, 4]
    numbers = {12500: "12.5k", 1234: "1,234", 3e6: "3M", 0.02: "0.02", 4e-5: "4e-5", 0: "0"}
    assert {n: charts.short_number(n) for n in numbers} == numbers
