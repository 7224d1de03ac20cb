"""The command line: what it prints, and what it says when something is wrong."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor
from convnext_jax.cli import BATCH, main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    names = ["tench", "church", "golf ball", "parachute", "chain saw", "French horn", "gas pump"]
    config = ConvNextConfig(
        num_stages=2, depths=(1, 1), hidden_sizes=(8, 16), image_size=16, patch_size=2,
        layer_scale_init_value=1.0, initializer_range=0.5, id2label=dict(enumerate(names)),
    )  # fmt: skip
    model = ConvNextForImageClassification(config)
    model.save_pretrained(folder, model.init_variables(jax.random.key(0)))
    ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.875).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """More than one batch, of several sizes and modes."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(BATCH + 3):
        shape = (20 + 7 * i, 33, 3) if i % 3 else (25, 20 + 5 * i)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(paths[-1])
    return paths


def probabilities(folder: Path, path: str) -> np.ndarray:
    model, variables = ConvNextForImageClassification.from_pretrained(folder)
    processor = ConvNextImageProcessor.from_pretrained(folder)
    pixels = processor(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"]
    return np.asarray(jax.nn.softmax(model.apply(variables, pixels).logits)[0])


def test_json_holds_the_best_classes_of_every_picture(model_folder, pictures, capsys):
    assert main(["classify", str(model_folder), *pictures, "--json", "--top", "3"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == pictures
    for i in (0, len(pictures) - 1):
        expected = probabilities(model_folder, pictures[i])
        best = np.argsort(-expected)[:3]
        assert [p["index"] for p in results[i]["predictions"]] == best.tolist()
        np.testing.assert_allclose(
            [p["probability"] for p in results[i]["predictions"]], expected[best], atol=2e-6
        )
    assert results[0]["predictions"] != results[1]["predictions"]


def test_table_names_five_classes(model_folder, pictures, capsys):
    assert main(["classify", str(model_folder), pictures[1]]) == 0
    path, *rows = capsys.readouterr().out.splitlines()
    assert path == pictures[1]
    expected = probabilities(model_folder, pictures[1])
    config = ConvNextConfig.from_pretrained(model_folder)
    best = np.argsort(-expected)[:5]
    assert [row.split("%")[1].strip() for row in rows] == [config.id2label[i] for i in best]
    shown = [float(row.split("%")[0]) for row in rows]
    np.testing.assert_allclose(shown, expected[best] * 100, atol=0.006)


def spoil(folder: Path, tmp_path: Path, name: str, content: bytes | None) -> Path:
    """A copy of the model's folder with one file changed or, for None, absent."""
    copy = tmp_path / "spoilt"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


def fails_with_one_line(arguments: list[str], said: list[str], capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("convnext-jax: ")
    for words in said:
        assert words in captured.err


def test_missing_and_unreadable_pictures_are_named(model_folder, pictures, tmp_path, capsys):
    absent = str(tmp_path / "absent.jpg")
    fails_with_one_line(["classify", str(model_folder), pictures[0], absent], [absent], capsys)
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    fails_with_one_line(["classify", str(model_folder), str(text)], [str(text)], capsys)
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(pictures[0]).read_bytes()[:200])
    fails_with_one_line(["classify", str(model_folder), str(torn)], [str(torn)], capsys)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b'{"model_type": "resnet"}', ["config.json", "'resnet'"]),
        ("config.json", b'{"model_type": ', ["config.json", "JSON"]),
        ("config.json", None, ["config.json"]),
        ("preprocessor_config.json", None, ["preprocessor_config.json"]),
        ("model.safetensors", None, ["model.safetensors"]),
        ("model.safetensors", "first half", ["model.safetensors", "complete"]),
        ("model.safetensors", b"", ["model.safetensors", "complete"]),
    ],
)
def test_spoilt_models_are_named(model_folder, pictures, tmp_path, capsys, name, content, said):
    if content == "first half":
        whole = (model_folder / name).read_bytes()
        content = whole[: len(whole) // 2]
    folder = spoil(model_folder, tmp_path, name, content)
    fails_with_one_line(["classify", str(folder), pictures[0]], said, capsys)


def test_absent_model_is_named(pictures, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails_with_one_line(["classify", "./absent", pictures[0]], ["./absent"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["classify", "model", "x.png", "--top", "0"], "at least 1"),
        (["classify", "model", "x.png", "--top", "many"], "'many' is no whole number"),
        (["classify", "model"], "IMAGE"),
        (["convert", "weights.pth"], "FOLDER"),
        (["convert", "weights.pth", "folder", "--presett", "tiny"], "--presett"),
        (["convert", "weights.pth", "folder", "--size", "-1"], "at least 1"),
        (["convent"], "'convent'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


# ------------------------------------------------------------------------------------------ convert


@pytest.fixture
def weights(model_folder, tmp_path) -> Path:
    """The model's weights alone, under a name that tells the size of its pictures."""
    path = tmp_path / "weights_384.safetensors"
    path.write_bytes((model_folder / "model.safetensors").read_bytes())
    return path


def test_convert_writes_a_folder_that_classifies(weights, model_folder, pictures, tmp_path, capsys):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([f"name {i}" for i in range(7)]))
    folder = str(tmp_path / "new" / "folder")
    assert main(["convert", str(weights), folder, "--labels", str(labels), "--size", "16"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    for said in (folder, "ConvNextForImageClassification", "8-16", "7 classes", "huggingface"):
        assert said in shown.out
    assert ConvNextImageProcessor.from_pretrained(folder).size == {"shortest_edge": 16}
    # The pictures prepared as the test's model wants them, the rest as it was converted.
    name = "preprocessor_config.json"
    (Path(folder) / name).write_bytes((model_folder / name).read_bytes())
    assert main(["classify", folder, pictures[1], "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)[0]["predictions"]
    assert [p["label"] for p in predictions] == [f"name {p['index']}" for p in predictions]
    expected = probabilities(model_folder, pictures[1])
    assert predictions[0]["index"] == expected.argmax()
    assert abs(predictions[0]["probability"] - expected.max()) < 2e-6


def test_convert_says_what_is_wrong_in_one_line(weights, tmp_path, capsys):
    target = tmp_path / "target"
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights.read_bytes()[:-100])
    text = tmp_path / "notes.txt"
    text.write_text("no weights")
    for arguments, said in (
        ([str(torn), str(target)], [str(torn), "not a complete safetensors file"]),
        ([str(text), str(target)], [str(text), ".safetensors"]),
        ([str(tmp_path / "absent.pth"), str(target)], ["there is no file", "absent.pth"]),
        ([str(weights), str(target), "--preset", "tiny"], ["(8, 16)", "the preset tiny"]),
        ([str(weights), str(target), "--labels", str(text)], [str(text), "JSON"]),
        ([str(weights), str(target), "--ema"], ["no averaged weights"]),
        ([str(weights), str(text)], [str(text), "folder"]),
    ):
        fails_with_one_line(["convert", *arguments], said, capsys)
        assert not target.exists()
    assert text.read_text() == "no weights"


def test_convert_tells_what_it_could_not_take_over(weights, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    weights.rename(source / "model.safetensors")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    assert main(["convert", str(source), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().err.startswith("convnext-jax: note: the source prepares pictures by")


def test_convert_stopped_by_a_key_leaves_nothing(weights, tmp_path, monkeypatch):
    def stop(_file):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    assert main(["convert", str(weights), str(tmp_path / "new")]) == 130
    assert not (tmp_path / "new").exists()
