"""The notebook runs from top to bottom, on a model folder made for the test."""

import re
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

from convnext_jax import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

NOTEBOOK = Path(__file__).parents[1] / "examples" / "classify_photos.ipynb"


def outputs_of(notebook, kind):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs if output.output_type == kind]


def text_of(notebook):
    return "".join(output.text for output in outputs_of(notebook, "stream"))


def assert_complete(notebook):
    """What a reader is promised: names, two figures, times, and features that are of use."""
    text = text_of(notebook)
    assert len(re.findall(r"^(.+ [\d.]+%, ){4}.+ [\d.]+%$", text, re.MULTILINE)) == 2
    assert re.search(r"first call [\d.]+ s, later ones [\d.]+ ms for 2 photos", text)
    rows = dict(
        re.findall(r"^(\w[\w ]*?) +\d+ numbers a digit, ([\d.]+)% of 300", text, re.MULTILINE)
    )
    assert set(rows) == {"pooled", "stage 3", "pixels"}
    assert all(float(accuracy) > 20 for accuracy in rows.values())  # a guess is right in 10 %
    figures = [o for o in outputs_of(notebook, "display_data") if "image/jpeg" in o.data]
    assert len(figures) == 2
    assert not outputs_of(notebook, "error")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    config = ConvNextConfig.preset("atto", num_labels=20, layer_scale_init_value=1.0)
    model = ConvNextForImageClassification(config)
    model.save_pretrained(tmp_path / "model", model.init_variables(jax.random.key(0)))
    ConvNextImageProcessor.preset("imagenet_224").save_pretrained(tmp_path / "model")

    monkeypatch.setenv("CONVNEXT_MODEL", str(tmp_path / "model"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert_complete(notebook)
    assert "20 classes" in text_of(notebook)


def test_the_notebook_is_kept_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert_complete(notebook)
    assert not re.search(r"/(home|tmp|root|work)/|Warning", NOTEBOOK.read_text())
