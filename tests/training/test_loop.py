"""Whole runs: what a run leaves behind, going on after an interruption, and wrong settings."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from convnext_jax import ConvNextForImageClassification, ConvNextImageProcessor, InputError
from convnext_jax.data import pipeline, sources
from convnext_jax.training import checkpointing, loop, parallel
from convnext_jax.training import step as step_module
from convnext_jax.training.config import default_config
from convnext_jax.training.metrics import MetricsWriter, read_rows

ROOT = Path(__file__).parents[2]


def toy_config(**changes) -> ConfigDict:
    """Five epochs of a network of 2,700 parameters on the digits."""
    config = default_config()
    with config.unlocked():
        config.data = ConfigDict({"name": "digits", "val_fraction": 0.2, "split_seed": 0})
    config.image_size = 8
    config.crop_pct = 1.0
    config.augment = ""  # the rest of the augmentation is drawn, and compiles faster
    config.mix_group = 32
    config.model.patch_size = 2
    config.model.depths = (1,)
    config.model.hidden_sizes = (16,)
    config.model.layer_scale_init_value = 1.0
    config.batch_size = 128
    config.learning_rate = 0.02
    config.epochs = 5.0
    config.warmup_epochs = 1.0
    config.ema_decay = 0.9
    config.checkpoint_every_epochs = 2.0
    config.eval_every_epochs = 4.0
    config.log_every_steps = 3
    config.log_example_ids = True
    config.loader_workers = 2
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its folder and what `train` returned."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, loop.train(toy_config(), workdir)


def test_run_folder_is_complete(finished):
    workdir, final = finished
    assert "<h2>Worst mistakes</h2>" in (workdir / "report.html").read_text()
    for name in ("curves.png", "confusion_matrix.png"):
        with Image.open(workdir / name) as image:
            assert min(image.size) > 300
    assert json.loads((workdir / "metrics.json").read_text()) == final
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 128
    assert list((workdir / "tensorboard").iterdir())
    assert len(list((workdir / "examples").glob("*.png"))) == 10
    rows = read_rows(workdir / "metrics.jsonl")
    steps = 5 * (1438 // 128)
    assert [row["step"] for row in rows if "train/loss" in row] == [
        step for step in range(1, steps + 1) if step % 3 == 0 or step == steps
    ]
    assert [row["step"] for row in rows if "val_ema/top1" in row] == [44, 55]
    assert rows[-1]["val_ema/top1"] == final["val_ema/top1"]
    matrix = np.loadtxt(workdir / "confusion_matrix.csv", delimiter=",")
    assert matrix.sum() == 359
    assert matrix.trace() == round(final["val_ema/top1"] * 359)
    assert not any("second" in name for row in rows for name in row)  # timings live elsewhere


def test_exported_model_gives_the_reported_accuracy(finished):
    workdir, final = finished
    model, variables = ConvNextForImageClassification.from_pretrained(workdir / "model")
    processor = ConvNextImageProcessor.from_pretrained(workdir / "model")
    held_out = sources.digits(val_fraction=0.2, split_seed=0).val
    images = [held_out[i]["image"] for i in range(len(held_out))]
    pixels = processor(images, return_tensors="np")["pixel_values"]
    logits = jax.jit(model.apply)(variables, pixels).logits
    assert (np.asarray(logits.argmax(-1)) == held_out.labels).mean() == final["val_ema/top1"]
    assert model.config.id2label == {i: str(i) for i in range(10)}
    assert final["val_ema/top1"] > 0.2  # it has learnt something: the classes are balanced


class Stopped(Exception):
    """Stands for whatever ends a run between two steps."""


def end() -> None:
    raise Stopped


def stop_after(monkeypatch, batches_taken: int, stop=end):
    original = pipeline.train_batches

    def train_batches(*args, **options):
        batches = original(*args, **options)

        class Iterator:
            taken = 0

            def __next__(self):
                if self.taken == batches_taken:
                    stop()
                self.taken += 1
                return next(batches)

            def __getattr__(self, name):
                return getattr(batches, name)

        return Iterator()

    monkeypatch.setattr(pipeline, "train_batches", train_batches)


def test_interrupted_run_continues_where_it_was_saved(finished, tmp_path, monkeypatch, capsys):
    whole, final = finished
    workdir = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        stop_after(patch, 30)  # saved at 22; 23 to 30 are done again
        with pytest.raises(Stopped):
            loop.train(toy_config(), workdir)
    assert [row["step"] for row in read_rows(workdir / "examples.jsonl")] == list(range(1, 31))
    again = loop.train(toy_config(), workdir)
    assert "resumed from step 22" in capsys.readouterr().out

    # Every step once, with the examples that the uninterrupted run saw at it.
    assert read_rows(workdir / "examples.jsonl") == read_rows(whole / "examples.jsonl")
    for row, expected in zip(
        read_rows(workdir / "metrics.jsonl"), read_rows(whole / "metrics.jsonl"), strict=True
    ):
        assert row.keys() == expected.keys()
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-5)
    assert again == pytest.approx(final)


def test_run_that_ended_is_not_trained_again(finished, monkeypatch):
    workdir, final = finished
    before = (workdir / "metrics.jsonl").read_text()

    def train_step(*_):
        raise Stopped

    monkeypatch.setattr(parallel.DataParallel, "train_step", lambda *_: train_step)
    assert loop.train(toy_config(), workdir) == final
    assert (workdir / "metrics.jsonl").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(finished):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"other settings \(learning_rate, model.depths\)"):
        loop.train(toy_config(learning_rate=1.0, model={"depths": (2,)}), workdir)


def test_settings_that_change_no_result_may_differ(finished):
    workdir, final = finished
    assert loop.train(toy_config(loader_workers=1, keep_checkpoints=9), workdir) == final


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "checkpoints" / "22").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        loop.train(toy_config(), tmp_path)


def test_run_that_saved_nothing_may_start_again_with_other_data(tmp_path):
    config = picture_tree(tmp_path / "photos", {"cat": 8, "dog": 8})
    broken = tmp_path / "photos" / "dog" / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "unreadable.jsonl").read_text()
    broken.unlink()
    assert loop.train(config, tmp_path / "run")["steps"] == 1
    assert not (tmp_path / "run" / "unreadable.jsonl").read_text()  # it was of other data


def spoil(root: Path, truncated: int, empty: int, mislabelled: int) -> dict[str, str]:
    """Breaks pictures of a tree, some of either split, and says which cannot be read and why."""
    order = sorted(root.glob("*/*.png"), key=lambda path: (path.stem, path.parent.name))
    order = [order[i] for i in np.random.default_rng(7).permutation(len(order))]
    broken = {}
    for path in order[:truncated]:
        path.write_bytes(path.read_bytes()[:200])
        broken[str(path)] = "cannot be decoded"
    for path in order[truncated : truncated + empty]:
        path.write_bytes(b"")
        broken[str(path)] = "is not a picture"
    for i, path in enumerate(order[truncated + empty :][:mislabelled]):
        with Image.open(path) as image:
            pixels = image.copy()
        pixels.save(path, format=("JPEG", "BMP", "WEBP")[i % 3])
    return broken


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A run on 200 pictures, 1 % cut short, 1 % empty, and some not of the format of their name."""
    folder = tmp_path_factory.mktemp("faulty")
    config = picture_tree(folder / "photos", {"cat": 100, "dog": 100})
    config.update({"epochs": 3.0, "batch_size": 16, "loader_workers": 3, "keep_checkpoints": 9})
    config.checkpoint_every_epochs = config.eval_every_epochs = 1.0
    broken = spoil(folder / "photos", 2, 2, 6)
    return folder, config, broken, loop.train(config, folder / "run")


def test_unreadable_pictures_are_listed_and_the_run_goes_on(faulty):
    folder, config, broken, final = faulty
    dataset = sources.load(**config.data)
    rows = read_rows(folder / "run" / "unreadable.jsonl")
    assert {row["example"] for row in rows} == broken.keys()
    assert len(rows) == len(broken) == 4  # each once, though met in three epochs
    for row in rows:
        assert broken[row["example"]] in row["reason"]
        source = {"train": dataset.train, "val": dataset.val}[row["split"]]
        assert row["example"] in [source.example_name(i) for i in range(len(source))]
    held_out = sum(row["split"] == "val" for row in rows)
    assert 0 < held_out < 4, "the test does not see both splits"
    assert (final["examples"], final["unreadable"]) == (50 - held_out, held_out)
    seen = [i for row in read_rows(folder / "run" / "examples.jsonl") for i in row["ids"]]
    assert len(seen) == final["steps"] * 16
    assert not {dataset.train.example_name(i) for i in seen} & broken.keys()
    report = (folder / "run" / "report.html").read_text()
    assert f"{4 - held_out} of train, {held_out} of val: unreadable.jsonl" in report
    assert len(list((folder / "run" / "examples").iterdir())) == 2


def test_mistakes_in_the_report_are_of_the_pictures_they_name(faulty):
    """Behind an example that was left out, places and numbers in the source differ."""
    from convnext_jax.training import charts

    folder, config, broken, _ = faulty
    dataset = sources.load(**config.data)
    report = (folder / "run" / "report.html").read_text().split("<h2>Worst mistakes</h2>")[1]
    names = [dataset.val.example_name(i) for i in range(len(dataset.val))]
    first = min(names.index(name) for name in broken if name in names)
    shown = [i for i, name in enumerate(names) if f'title="{name}"' in report]
    assert max(shown) > first
    for i in shown:
        card = report.split(f'title="{names[i]}">')[1].split("</figure>")[0]
        true = dataset.class_names[dataset.val.labels[i]]
        assert card.startswith(charts.picture(dataset.val[i]["image"], 128, true))
        assert f'<b class="true">{true}</b>' in card


def test_interrupted_run_on_faulty_pictures_is_the_same(faulty, tmp_path, monkeypatch):
    folder, config, _, final = faulty
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(Stopped):
            loop.train(config, tmp_path / "run")
    before = (tmp_path / "run" / "unreadable.jsonl").read_text()
    assert before
    with (tmp_path / "run" / "unreadable.jsonl").open("a") as file:
        file.write('{"split": "tr')  # as a crash leaves it
    assert loop.train(config, tmp_path / "run") == pytest.approx(final)
    for name in ("unreadable.jsonl", "examples.jsonl"):
        whole, again = (read_rows(run / name) for run in (folder / "run", tmp_path / "run"))
        assert again == whole
    assert (tmp_path / "run" / "unreadable.jsonl").read_text().startswith(before)


@pytest.mark.parametrize("in_memory", [False, True])
def test_too_many_unreadable_pictures_stop_the_run_at_once(in_memory, tmp_path):
    config = picture_tree(tmp_path / "photos", {"cat": 100, "dog": 100})
    with config.data.unlocked():
        config.data.in_memory = in_memory
    spoil(tmp_path / "photos", 60, 60, 0)
    with pytest.raises(InputError, match=r"max_unreadable allows 5\.0% of all") as error:
        loop.train(config, tmp_path / "run")
    message, listed = str(error.value), tmp_path / "run" / "unreadable.jsonl"
    assert "\n" not in message
    assert str(listed) in message
    assert len(read_rows(listed)) < 40  # it did not take all of them
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))

    config.max_unreadable = 0.7
    final = loop.train(config, tmp_path / "run")
    assert final["examples"] + final["unreadable"] == 50


def test_too_many_held_out_pictures_unreadable(tmp_path):
    config = picture_tree(tmp_path / "photos/train", {"cat": 20, "dog": 20})
    picture_tree(tmp_path / "photos/val", {"cat": 10, "dog": 10})
    config.data.folder = str(tmp_path / "photos")
    spoil(tmp_path / "photos" / "val", 1, 1, 0)
    with pytest.raises(InputError, match=r"2 of the 20 examples of val cannot be read \(10.0%"):
        loop.train(config, tmp_path / "run")
    config.max_unreadable = 0.1
    assert loop.train(config, tmp_path / "run")["unreadable"] == 2


def picture_tree(root: Path, counts: dict[str, int]) -> ConfigDict:
    """A folder of noise pictures, and the settings to train one epoch on it."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    config = toy_config(batch_size=8, epochs=1.0, warmup_epochs=0.0)
    with config.unlocked():
        config.data = ConfigDict(
            {"name": "image_folder", "folder": str(root), "val_fraction": 0.25, "split_seed": 0}
        )
    return config


def test_class_without_a_held_out_picture_ends_well(tmp_path):
    config = picture_tree(tmp_path / "photos", {"cat": 8, "dog": 8, "rare": 1, "a b": 4, "a_b": 4})
    loop.train(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "examples").iterdir()}
    assert names == {"a_b_0.png", "a_b_1.png", "cat.png", "dog.png"}


def test_run_does_not_continue_on_other_data(tmp_path):
    config = picture_tree(tmp_path / "photos", {"cat": 8, "dog": 8})
    loop.train(config, tmp_path / "run")
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / "zebra")
    with pytest.raises(
        InputError, match=r"data of the run .* changed since \(classes, train, val\)"
    ):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model


def test_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not the folder of a run"):
        loop.train(toy_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5000}, "batch_size is 5000 and there are 1438 training examples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup_epochs": 6.0}, "warmup_epochs is 6.0 of 5.0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0.0}, "^epochs is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale is"),
        ({"adam_betas": (0.9,)}, "adam_betas is"),
        ({"mean": (0.5,)}, "mean is"),
        ({"log_every_steps": 0}, "log_every_steps is 0"),
        ({"max_unreadable": 1.5}, "max_unreadable is 1.5"),
        ({"eval_every_epochs": 0.0}, "eval_every_epochs is 0.0"),
        ({"data": {"name": "digit"}}, "digit"),
        ({"model": {"hidden_act": "gleu"}}, "there is no activation 'gleu'"),
    ],
)
def test_wrong_settings_say_so_and_write_nothing(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        loop.train(toy_config(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ and its gradient.* at step \d+"):
        loop.train(toy_config(learning_rate=1e30, warmup_epochs=0.0), tmp_path / "run")


def test_state_and_batch_of_a_loss_that_is_not_finite_are_kept(tmp_path, monkeypatch):
    spoil_step(monkeypatch, 7)
    with pytest.raises(FloatingPointError, match=r"at step 7\."):
        loop.train(toy_config(), tmp_path / "run")
    with np.load(tmp_path / "run" / "not_finite" / "step_7_process_0.npz") as batch:
        ids = batch["id"].tolist()
    rows = read_rows(tmp_path / "run" / "examples.jsonl")
    assert ids == rows[6]["ids"]
    # A run that is given that checkpoint does the step again, with the same batch.
    kept = tmp_path / "run" / "not_finite"
    assert (kept / "6").is_dir()
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(kept / "6", again / "checkpoints" / "6")
    for name in ("config.json", "data.json"):
        shutil.copy(tmp_path / "run" / name, again)
    with pytest.raises(FloatingPointError, match=r"at step 7\."):
        loop.train(toy_config(), again)
    assert read_rows(again / "examples.jsonl")[0] == {"step": 7, "ids": ids}
    # The same run says the same when it is started again.
    with pytest.raises(loop.NotFinite, match=r"at step 7\. .* has the state before it"):
        loop.train(toy_config(), again)


def test_state_before_a_loss_that_is_not_finite_goes_on_where_it_is_healthy(
    finished, tmp_path, monkeypatch
):
    _, final = finished
    with monkeypatch.context() as patch:
        spoil_step(patch, 7)
        with pytest.raises(loop.NotFinite):
            loop.train(toy_config(), tmp_path / "run")
    (tmp_path / "run" / "not_finite" / "6").rename(tmp_path / "run" / "checkpoints" / "6")
    assert loop.train(toy_config(), tmp_path / "run") == final


def test_state_that_cannot_be_kept_does_not_hide_the_loss(tmp_path, monkeypatch):
    spoil_step(monkeypatch, 7)

    def save(*_):
        raise OSError("no space")

    monkeypatch.setattr(loop.checkpointing, "save", save)
    with pytest.raises(loop.NotFinite, match=r"at step 7\. .* but not the state .* no space"):
        loop.train(toy_config(), tmp_path / "run")


def spoil_step(monkeypatch, number: int) -> None:
    """Makes the gradients of one step infinite."""
    original = step_module.local_gradients

    def local_gradients(params, step, *arguments, **options):
        gradients, metrics = original(params, step, *arguments, **options)
        factor = jax.numpy.where(step == number - 1, jax.numpy.inf, 1.0)
        return jax.tree.map(lambda g: g * factor, gradients), metrics

    monkeypatch.setattr(step_module, "local_gradients", local_gradients)


def test_steps_may_be_left_out(finished, tmp_path, monkeypatch, capsys):
    spoil_step(monkeypatch, 6)
    final = loop.train(toy_config(max_skipped_steps=1), tmp_path / "run")
    assert final["steps"] == 55
    assert "at step 6: left out, 1 of 1 allowed" in capsys.readouterr().out
    rows = {row["step"]: row for row in read_rows(tmp_path / "run" / "metrics.jsonl")}
    assert rows[3].keys() >= {"train/loss"}
    assert rows[6] == {"step": 6, "train/skipped": 1}
    assert rows[9]["train/skipped"] == 1
    assert np.isfinite(rows[9]["train/loss"])
    # The schedule stood still in the step that was left out: that of step 8, between 6 and 9.
    seen = {row["step"]: row for row in read_rows(finished[0] / "metrics.jsonl")}
    rates = [seen[step]["train/learning_rate"] for step in (6, 9)]
    assert min(rates) < rows[9]["train/learning_rate"] < max(rates)


def test_sigterm_ends_with_a_checkpoint(finished, tmp_path, monkeypatch):
    whole, final = finished
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 30, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(loop.Preempted, match="saved step 30 of 55"):
            loop.train(toy_config(), workdir)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert loop.train(toy_config(), workdir) == final
    for name in ("metrics.jsonl", "examples.jsonl", "model/model.safetensors"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_sigterm_in_an_evaluation(finished, tmp_path, monkeypatch):
    """It is given up, and made when the run continues."""
    whole, final = finished
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = pipeline.eval_batches

        def eval_batches(*args, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **options)

        patch.setattr(pipeline, "eval_batches", eval_batches)
        with pytest.raises(loop.Preempted, match="saved step 44 of 55"):
            loop.train(toy_config(), workdir)
        # Neither this time, when the evaluation comes first.
        with pytest.raises(loop.Preempted, match="during an evaluation"):
            loop.train(toy_config(), workdir)
    assert not any("val/loss" in row for row in read_rows(workdir / "metrics.jsonl"))
    assert loop.train(toy_config(), workdir) == final
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flip", "lost", "empty"])
def test_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, finished, tmp_path, capsys):
    whole, final = finished
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / "55"
    files = [file for file in newest.glob("state/**/d/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "cut":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "lost":
        largest.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert loop.train(toy_config(), workdir) == final
    said = capsys.readouterr()
    assert "checkpoint 55 in" in said.err
    assert "cannot be read" in said.err
    assert "resumed from step 44" in said.out
    assert (workdir / "damaged_checkpoints" / "55").is_dir()
    assert newest.is_dir()  # saved again
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_checkpoints_that_are_all_damaged(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for file in (workdir / "checkpoints").glob("*/state/**/d/*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="none of the checkpoints in"):
        loop.train(toy_config(), workdir)


def test_the_best_checkpoint_stays(tmp_path, monkeypatch):
    """Beside the newest."""
    original, top1 = checkpointing.save, iter([0.1, 0.8, 0.8, 0.3, 0.5])
    saved = []

    def save(checkpoints, state, data, config, measured):
        saved.append(measured)
        original(checkpoints, state, data, config, next(top1))

    monkeypatch.setattr(checkpointing, "save", save)
    config = toy_config(keep_checkpoints=1, checkpoint_every_epochs=1.0, eval_every_epochs=1.0)
    loop.train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert saved == [row["val_ema/top1"] for row in rows if "val_ema/top1" in row]
    kept = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {33, 55}  # of two that are equal the later one


@pytest.mark.parametrize("layout", ["pmap", "sharded"])
def test_one_program_for_training_and_one_for_evaluation(layout, tmp_path, caplog):
    """Of a new run as of one that continues."""
    config = toy_config(parallelism=layout, epochs=3.0, eval_every_epochs=1.0)
    names = {"pmap": ["_fun", "_fun"], "sharded": ["eval_step", "train_step"]}[layout]
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            loop.train(config, tmp_path / "run")
        compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
        assert sorted(name for name in compiled if name in names) == names
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "33")


def test_rows_after_the_resumed_step_and_a_torn_last_row_are_dropped(tmp_path):
    whole = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "tr')
    MetricsWriter(tmp_path, resume_step=2).close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


# ------------------------------------------------------------------------- as a person starts it


def run_train(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.learning_rat=1"], "learning_rate"),
        (["--config.data.folder=x"], "folder"),
        (["--config.batch_size=many"], "many"),
        (["--confg=x"], "confg"),
        (["--config=configs/absent.py"], "absent.py"),
        ([f"--config={ROOT}/configs/image_folder.py", "--config.data.folder=absent"], "absent"),
        ([f"--config={ROOT}/configs/image_folder.py"], "--config.data.folder=FOLDER"),
    ],
)
def test_wrong_flag_is_one_line_and_status_2(flags, said, tmp_path):
    done = run_train(*flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("train.py: ")
    assert said in line
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_reach_98_percent(seed, tmp_path):
    done = run_train(f"--workdir={tmp_path / 'run'}", f"--config.seed={seed}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert final[f"{final['exported']}/top1"] >= 0.98


@pytest.mark.slow
def test_digits_killed_in_the_middle_reach_98_percent_too(tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", "--config.log_example_ids=True"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while len(read_rows(workdir / "examples.jsonl")) < 400:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    seen = read_rows(workdir / "examples.jsonl")

    done = run_train(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = int(done.stdout.split("resumed from step ")[1].split()[0])
    assert 0 < resumed <= len(seen)
    rows = read_rows(workdir / "examples.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    # What was lost is done again with the same examples: the data goes on where the state does.
    assert rows[: len(seen)] == seen
    # The stream is the epochs end to end, each holding every example once.
    ids = np.concatenate([row["ids"] for row in rows])
    count = len(sources.digits(val_fraction=0.2, split_seed=0).train)
    for start in range(0, len(ids) - count + 1, count):
        assert sorted(ids[start : start + count]) == list(range(count))
    final = json.loads((workdir / "metrics.json").read_text())
    assert final[f"{final['exported']}/top1"] >= 0.98


def test_notice_before_the_first_step_of_a_resumed_run(monkeypatch):
    """JAX names the step after the last that was asked about, here by none."""
    asked, step_to_end = [], []

    def reached(step):
        if step_to_end:
            return step == step_to_end[0]
        asked.append(step)
        return False

    monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", reached)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with loop._StopRequest() as stop:
        step_to_end.append(max(asked, default=0) + 1)  # the notice
        stop.begin_after(6)
        assert stop.is_due(7)
    asked.clear()
    step_to_end.clear()
    with loop._StopRequest() as stop:
        stop.begin_after(6)
        assert not stop.is_due(7)
        step_to_end.append(max(asked) + 1)
        assert stop.is_due(8)


def test_checkpoint_that_another_process_cannot_read(finished, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    answers = iter([True, False])

    def agree(value):
        return value or next(answers, False)

    monkeypatch.setattr(loop.checkpointing.parallel, "agree", agree)
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    loop.train(toy_config(), workdir)
    assert "another process cannot read its part" in capsys.readouterr().err
    assert (workdir / "damaged_checkpoints" / str(steps[-1])).is_dir()
