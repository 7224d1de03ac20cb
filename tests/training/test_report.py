"""The pictures of a run: what they show is what was measured, and any run can be drawn."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from convnext_jax.training import report


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
