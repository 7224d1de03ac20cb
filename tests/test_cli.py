"""The command line: what it prints, and what it says when something is wrong."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from convnext_jax import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor
from convnext_jax.cli import BATCH, classify, main
from convnext_jax.data.pipeline import eval_transform
from convnext_jax.errors import InputError
from convnext_jax.evaluate import evaluate_folder, match_classes, pixel_table


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
        (["evaluate", "model"], "DATA"),
        (["evaluate", "model", "data", "--batch-size", "0"], "at least 1"),
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


# ----------------------------------------------------------------------------------------- evaluate


@pytest.fixture
def class_folders(pictures, tmp_path) -> Path:
    """The pictures by class, three in each and two in the last, every other one as a JPEG."""
    folder = tmp_path / "data"
    for i, path in enumerate(pictures):
        place = folder / ["church", "golf ball", "chain saw", "tench", "gas pump"][min(i // 3, 4)]
        place.mkdir(parents=True, exist_ok=True)
        if i % 2:
            Image.open(path).convert("RGB").save(place / f"{i}.jpg", quality=90)
        else:
            Path(path).rename(place / f"{i}.png")
    return folder


def all_probabilities(folder: Path, paths: list[Path]) -> np.ndarray:
    model, variables = ConvNextForImageClassification.from_pretrained(folder)
    processor = ConvNextImageProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = processor(images, return_tensors="np")["pixel_values"]
    return np.asarray(jax.nn.softmax(jax.jit(model.apply)(variables, pixels).logits))


def test_evaluate_predicts_what_classify_does(model_folder, class_folders, capsys):
    result = evaluate_folder(str(model_folder), class_folders, batch_size=4)
    paths = [result.source.example_name(i) for i in range(len(result.source))]
    assert len(paths) == BATCH + 3
    best = [found["predictions"][0] for found in classify(str(model_folder), paths, top=1)]
    assert [result.names[int(i)] for i in result.evaluation.predictions] == [
        prediction["label"] for prediction in best
    ]
    np.testing.assert_allclose(
        result.evaluation.confidences, [prediction["probability"] for prediction in best], atol=2e-6
    )
    right = [Path(path).parent.name == b["label"] for path, b in zip(paths, best, strict=True)]
    assert result.evaluation.metrics["top1"] == np.mean(right)


def test_evaluate_prints_everything_as_json(model_folder, class_folders, capsys):
    evaluated = ["evaluate", str(model_folder), str(class_folders), "--batch-size", "5", "--json"]
    assert main(evaluated) == 0
    found = json.loads(capsys.readouterr().out)
    names = list(ConvNextConfig.from_pretrained(model_folder).id2label.values())
    ranks, losses, matrix = [], [], np.zeros((7, 7), int)
    paths = sorted(class_folders.glob("*/*"))
    by_path = dict(zip(map(str, paths), all_probabilities(model_folder, paths), strict=True))
    for path in paths:
        expected, right = by_path[str(path)], names.index(path.parent.name)
        ranks.append((expected > expected[right]).sum())
        losses.append(-np.log(expected[right]))
        matrix[right, expected.argmax()] += 1
    assert found["examples"] == len(ranks) == matrix.sum()
    assert (found["classes"], found["classes_of_model"], found["image_size"]) == (4, 7, 16)
    assert found["top1"] == pytest.approx(np.mean(np.array(ranks) < 1), abs=1e-6)
    assert found["top5"] == pytest.approx(np.mean(np.array(ranks) < 5), abs=1e-6)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    shown = np.zeros_like(matrix)
    for row, column, count in found["confusion_matrix"]:
        shown[row, column] = count
    np.testing.assert_array_equal(shown, matrix)
    for row in found["per_class"]:
        assert row["label"] == row["folder"] == names[row["index"]]
        assert row["right"] == matrix[row["index"], row["index"]]
        assert row["examples"] == matrix[row["index"]].sum()
        wrong = matrix[row["index"]].copy()
        wrong[row["index"]] = 0
        if wrong.any():
            assert wrong[names.index(row["taken_for"])] == wrong.max()
        else:
            assert row["taken_for"] is None
    assert [row["accuracy"] for row in found["per_class"]] == sorted(
        row["accuracy"] for row in found["per_class"]
    )
    assert len(found["mistakes"]) == matrix.sum() - matrix.trace()
    for mistake in found["mistakes"]:
        expected = by_path[mistake["image"]]
        assert mistake["label"] == Path(mistake["image"]).parent.name
        assert mistake["predicted"] == names[expected.argmax()]
        assert mistake["confidence"] == pytest.approx(expected.max(), abs=2e-6)


def test_evaluate_prints_tables(model_folder, class_folders, tmp_path, capsys):
    whole = tmp_path / "whole"
    (whole / "train" / "other").mkdir(parents=True)
    class_folders.rename(whole / "val")
    assert main(["evaluate", str(model_folder), str(whole)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = evaluate_folder(str(model_folder), whole).report()
    first, second, *rows = shown.out.splitlines()
    assert first == f"top-1 {found['top1']:.2%}   top-5 {found['top5']:.2%}   loss " + format(
        found["loss"], ".4f"
    )
    assert second.startswith("11 pictures of 4 of the model's 7 classes, 16 px, in ")
    worst = found["per_class"][0]
    assert f"{worst['right']}/{worst['examples']}" in rows[2]
    assert f"{worst['label']} -> {worst['taken_for']}" in rows[2]
    assert any(found["mistakes"][0]["image"] in row for row in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 20, "crop_pct": 0.7, "resample": 2},
        {"size": 16, "image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]},
        {"size": 16, "do_normalize": False, "resample": 1},
        {"size": 16, "do_rescale": False, "image_mean": 100.0, "image_std": 50.0},
        {"size": 384},
    ],
)
def test_evaluate_sees_the_pixels_of_the_processor(changes):
    processor = ConvNextImageProcessor(**changes)
    picture = np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8)
    expected = processor(
        picture, data_format="channels_last", input_data_format="channels_last", return_tensors="np"
    )["pixel_values"][0]
    image = eval_transform(
        picture, processor.size["shortest_edge"], processor.crop_pct, processor.resample
    )
    pixels = pixel_table(processor, "a model")[image, np.arange(3)]
    np.testing.assert_array_equal(pixels, expected)


ANIMALS = {0: "tench, Tinca tinca", 1: "crane", 2: "golf ball", 3: "crane", 4: "T-shirt/top"}
WORDNET = ["n01440764", "n02012849", "n03126707", "n03445777", "n04370456"]


def test_evaluate_leaves_out_what_cannot_be_read_and_says_so(model_folder, class_folders, capsys):
    evaluated = ["evaluate", str(model_folder), str(class_folders), "--json"]
    assert main(evaluated) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["unreadable"] == expected["remarks"] == []
    # The first of its class, so that those after it do not lie where they are counted.
    (class_folders / "church/!torn.png").write_bytes(b"")
    (class_folders / "tench/torn.jpg").write_bytes(b"no picture")
    assert main(evaluated) == 0
    found = json.loads(capsys.readouterr().out)
    left_out = {str(class_folders / "church/!torn.png"), str(class_folders / "tench/torn.jpg")}
    assert {row["image"] for row in found["unreadable"]} == left_out
    assert all(row["image"] in row["reason"] for row in found["unreadable"])
    assert "2 of 13 pictures cannot be read" in found["remarks"][0]
    for key in ("examples", "classes", "top1", "top5", "per_class", "confusion_matrix"):
        assert found[key] == expected[key], key
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert len(found["mistakes"]) == len(expected["mistakes"]) > 3
    for mistake, wanted in zip(found["mistakes"], expected["mistakes"], strict=True):
        for key in ("image", "label", "predicted"):
            assert mistake[key] == wanted[key]
        assert mistake["confidence"] == pytest.approx(wanted["confidence"], rel=1e-3)
    assert main(evaluated[:-1]) == 0
    shown = capsys.readouterr()
    assert "11 pictures (2 more cannot be read) of 4 of the model's" in shown.out
    assert shown.err.startswith("convnext-jax: note: 2 of 13 pictures cannot be read")


@pytest.mark.parametrize(
    ("folders", "names", "expected", "said"),
    [
        (["golf ball", "tench, Tinca tinca"], ANIMALS, [2, 0], None),
        (["Golf_Ball", "T-shirt_top", "tinca tinca"], ANIMALS, [2, 4, 0], None),
        (["cafe\u0301"], {0: "caf\u00e9"}, [0], None),
        (["1", "10", "2"], dict(enumerate(["0", "10", "2", "1"])), [3, 1, 2], None),
        (["1", "10", "2"], {i: f"x{i}" for i in range(11)}, [1, 10, 2], "indices"),
        (WORDNET, ANIMALS, [0, 1, 2, 3, 4], "n01440764 for 'tench, Tinca tinca'"),
        (["ant", "bee"], {0: "LABEL_0", 1: "LABEL_1"}, [0, 1], "ant for 'LABEL_0'"),
        (["n2", "n1"], {0: ["n1", "tench"], 1: ["n2", "carp"]}, [1, 0], None),
    ],
)
def test_folders_find_their_classes(folders, names, expected, said):
    numbers, remark = match_classes(folders, names)
    assert [numbers[folder] for folder in folders] == expected
    assert (remark is None) == (said is None)
    assert said is None or said in remark


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["golf ball", "crane"], ["'crane' is not among", "5 classes", "--labels"]),  # which one?
        (["golf ball", "n01440764", "b", "c", "d"], ["'n01440764', 'b', 'c' and 1 more are not"]),
        (["a", "b", "c", "d", "e"], ["'a', 'b', 'c' and 2 more are not"]),  # no order to trust
        (WORDNET[:4], ["and 1 more are not among"]),
        (["7"], ["'7' is not"]),
        (["golf ball", "golf_ball"], ["'golf ball' and 'golf_ball' are both"]),
        (["+"], ["'+' is not"]),
    ],
)
def test_folders_that_are_no_classes_are_named(folders, said):
    with pytest.raises(InputError) as error:
        match_classes(folders, ANIMALS, "photos")
    assert str(error.value).startswith("photos: ")
    for words in said:
        assert words in str(error.value)


def test_evaluate_takes_other_names_and_tells_what_it_assumed(
    model_folder, class_folders, tmp_path, capsys
):
    expected = evaluate_folder(str(model_folder), class_folders).report()["confusion_matrix"]
    names = list(ConvNextConfig.from_pretrained(model_folder).id2label.values())
    for folder in list(class_folders.iterdir()):
        folder.rename(class_folders / f"photos {names.index(folder.name)}")
    labels = tmp_path / "labels.json"
    evaluated = ["evaluate", str(model_folder), str(class_folders), "--json"]
    other_names = {str(i): [f"n{i}", f"photos {i}"] if i % 2 else f"photos {i}" for i in range(7)}
    labels.write_text(json.dumps(other_names))
    assert main([*evaluated, "--labels", str(labels)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["confusion_matrix"] == expected
    assert found["remarks"] == []
    for content, said in (
        ("[", "JSON"), ('["a"]', "names 1 classes, and the model has 7"), ("3", "JSON"),
        ('{"x": "y"}', "JSON"), (None, "labels.json"),
    ):  # fmt: skip
        labels.unlink()
        if content is not None:
            labels.write_text(content)
        fails_with_one_line([*evaluated, "--labels", str(labels)], [str(labels), said], capsys)
    for folder in list(class_folders.iterdir()):
        folder.rename(class_folders / folder.name.split()[1])
    assert main(evaluated[:-1]) == 0
    note = "convnext-jax: note: the folders' names were taken for the indices"
    assert capsys.readouterr().err.startswith(note)


def test_evaluate_says_what_is_wrong_in_one_line(model_folder, class_folders, tmp_path, capsys):
    def fails(model: Path | str, data: Path | str, *said: str) -> None:
        fails_with_one_line(["evaluate", str(model), str(data)], list(said), capsys)

    fails(model_folder, tmp_path / "absent", "absent: no such folder")
    (tmp_path / "empty").mkdir()
    fails(model_folder, tmp_path / "empty", "empty has no class folders")
    no_resize = b'{"do_resize": false, "size": {"shortest_edge": 16}}'
    name = "preprocessor_config.json"
    fails(spoil(model_folder, tmp_path, name, no_resize), class_folders, "do_resize")
    (tmp_path / "spoilt" / name).write_text('{"size": {"height": 16, "width": 16}}')
    fails(tmp_path / "spoilt", class_folders, "shortest_edge")
    (tmp_path / "spoilt" / name).unlink()
    fails(tmp_path / "spoilt", class_folders, name)
    torn = tmp_path / "all_torn" / "church" / "torn.png"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"no picture")
    fails(model_folder, tmp_path / "all_torn", "none of the 1 examples", "torn.png")
    (class_folders / "dog").mkdir()
    fails(model_folder, class_folders, "dog", "holds no pictures")
    torn.rename(class_folders / "dog" / "torn.png")
    fails(model_folder, class_folders, "'dog' is not among the model's 7 classes ('tench'")


def test_evaluate_names_the_package_that_is_missing(class_folders, monkeypatch, capsys):
    import convnext_jax.data

    monkeypatch.setitem(sys.modules, "grain", None)
    for name in ("convnext_jax.evaluate", "convnext_jax.data.pipeline"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(convnext_jax.data, "pipeline")
    said = ["evaluate needs grain", "pip install 'convnext-jax[train]'"]
    fails_with_one_line(["evaluate", "model", str(class_folders)], said, capsys)


def test_evaluate_stopped_by_a_key(model_folder, class_folders, monkeypatch, capsys):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("convnext_jax.evaluate.evaluation.evaluate", stop)
    assert main(["evaluate", str(model_folder), str(class_folders)]) == 130
    assert capsys.readouterr().out == ""


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
