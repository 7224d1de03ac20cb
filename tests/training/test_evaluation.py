"""Evaluation: every example counts once, and the figures are those of a plain computation."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from convnext_jax.errors import InputError
from convnext_jax.image.processor import resize_rule
from convnext_jax.outputs import ImageClassifierOutputWithNoAttention
from convnext_jax.training.config import default_config
from convnext_jax.training.evaluation import Evaluation, eval_step, evaluate, score

CLASSES = 7


def batches_of(examples: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """Batches as `eval_batches` makes them: the last one filled up with what does not count."""
    count = len(examples["label"])
    examples = {"id": np.arange(count), **examples, "mask": np.ones(count, np.float32)}
    padding = -count % size
    filled = {
        name: np.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1))
        for name, value in examples.items()
    }
    return [
        {name: value[start : start + size] for name, value in filled.items()} | {"unreadable": []}
        for start in range(0, count, size)
    ]


def expected_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(-logits, axis=1, kind="stable")  # among equals the lower index first
    total = np.log(np.exp(logits).sum(1))
    rows = np.arange(len(labels))
    return {
        "position": (order == labels[:, None]).argmax(1),
        "losses": total - logits[rows, labels],
        "predictions": order[:, 0],
        "confidences": np.exp(logits.max(1) - total),
    }


@jax.jit
def scale_and_score(scale, batch):
    """Stands in for a network: the logits are the pixels, so that the right answer is known."""
    logits = batch["image"].reshape(len(batch["image"]), -1)[:, :CLASSES] * scale
    return score(logits, batch["label"], batch["mask"])


@pytest.mark.parametrize("examples", [1, 7, 8, 29])
def test_every_example_counts_once(examples):
    rng = np.random.default_rng(examples)
    images = rng.integers(0, 4, (examples, 1, 3, 3), np.uint8)  # few values, so there are ties
    labels = rng.integers(0, CLASSES, examples).astype(np.int32)
    batches = batches_of({"image": images, "label": labels, "id": labels}, 4)
    results = evaluate(
        scale_and_score, {"val": jnp.float32(1), "val_ema": jnp.float32(-2)}, iter(batches)
    )
    for name, scale in (("val", 1.0), ("val_ema", -2.0)):
        result = results[name]
        expected = expected_of(images.reshape(examples, -1)[:, :CLASSES] * scale, labels)
        assert result.metrics["top1"] == (expected["position"] < 1).mean()
        assert result.metrics["top5"] == (expected["position"] < 5).mean()
        np.testing.assert_allclose(result.metrics["loss"], expected["losses"].mean(), rtol=1e-6)
        np.testing.assert_array_equal(result.labels, labels)
        np.testing.assert_array_equal(result.predictions, expected["predictions"])
        np.testing.assert_allclose(result.losses, expected["losses"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(result.confidences, expected["confidences"], rtol=1e-6)
        matrix = result.confusion_matrix(CLASSES)
        assert matrix.sum() == examples
        assert matrix.trace() == (expected["position"] < 1).sum()


def test_examples_that_cannot_be_read_are_in_no_figure():
    images = np.zeros((6, 1, 3, 3), np.uint8)
    labels = np.array([0, 1, 0, 1, 0, 1], np.int32)
    images[labels == 1, 0, 0, 1] = 3  # right, but for the last
    images[5] = 0
    batches = batches_of({"image": images, "label": labels}, 4)
    for batch, row, number in ((batches[0], 1, 1), (batches[1], 0, 4)):
        batch["mask"][row], batch["id"][row], batch["label"][row] = 0, -1, 0
        batch["unreadable"].append((number, f"{number} cannot be read"))
    result = evaluate(scale_and_score, {"val": jnp.float32(1)}, batches)["val"]
    assert result.ids.tolist() == [0, 2, 3, 5]
    assert result.labels.tolist() == [0, 0, 1, 1]
    assert result.metrics["top1"] == 3 / 4
    assert result.ids[result.worst_mistakes(9)].tolist() == [5]
    assert result.unreadable == ((1, "1 cannot be read"), (4, "4 cannot be read"))
    for batch in batches:
        batch["mask"][:] = 0
    with pytest.raises(InputError, match=r"none of the 2 examples .* the first: 1 cannot be read"):
        evaluate(scale_and_score, {"val": jnp.float32(1)}, batches)


class PixelsAsLogits:
    """A network whose logits are its pixels, over an axis of devices."""

    axis_name = "batch"
    dtype = jnp.float32

    def apply(self, variables, images, return_dict):
        logits = images.reshape(len(images), -1)[:, :CLASSES] * variables["params"]
        return ImageClassifierOutputWithNoAttention(logits=logits)


def test_step_normalises_and_sums_over_all_devices():
    config = default_config()
    config.mean, config.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 1, 3, 3), np.uint8)
    labels = rng.integers(0, CLASSES, 6).astype(np.int32)
    step = functools.partial(eval_step, model=PixelsAsLogits(), config=FrozenConfigDict(config))
    mapped = jax.vmap(step, axis_name="batch", in_axes=(None, 0), out_axes=(None, 0))
    batches = batches_of({"image": images, "label": labels}, 4)
    weights = {"val": jnp.float32(2)}
    result = evaluate(
        jax.jit(mapped),
        weights,
        batches,
        put=lambda batch: {k: v.reshape(2, -1, *v.shape[1:]) for k, v in batch.items()},
        own_rows=lambda rows: np.asarray(rows).reshape(-1),
    )["val"]

    pixels = (images / 255 - np.array(config.mean)) / np.array(config.std)
    expected = expected_of(2 * pixels.reshape(6, -1)[:, :CLASSES], labels)
    np.testing.assert_allclose(result.losses, expected["losses"], rtol=1e-5)
    np.testing.assert_array_equal(result.predictions, expected["predictions"])
    np.testing.assert_allclose(result.metrics["loss"], expected["losses"].mean(), rtol=1e-5)
    assert result.metrics["top1"] == (expected["position"] < 1).mean()


def test_nan_counts_as_wrong():
    labels = np.array([0, 3, 0], np.int32)
    logits = np.zeros((3, CLASSES), np.float32)
    logits[:2] = np.nan
    sums, examples = score(jnp.asarray(logits), labels, np.ones(3))
    assert float(sums["top1"]) == float(sums["top5"]) == 1
    result = Evaluation(
        {},
        np.arange(3),
        labels,
        *(np.asarray(examples[k]) for k in ("prediction", "confidence", "loss")),
    )
    assert result.right.tolist() == [False, False, True]
    right, count = result.per_class(CLASSES)
    assert (right[0], count[0], right[3], count[3]) == (1, 2, 0, 1)
    assert sorted(result.worst_mistakes(5).tolist()) == [0, 1]


def made_up(labels, predictions, confidences) -> Evaluation:
    losses = np.zeros(len(labels), np.float32)
    return Evaluation(
        {}, np.arange(len(labels)), np.array(labels, np.int32), np.array(predictions, np.int32),
        np.array(confidences, np.float32), losses,
    )  # fmt: skip


def test_what_is_told_of_the_examples():
    result = made_up([0, 0, 1, 2, 2, 2], [0, 1, 0, 2, 0, 0], [0.9, 0.4, 0.8, 0.99, 0.3, 0.8])
    assert result.confusion_matrix(4).tolist() == [
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [2, 0, 1, 0],
        [0, 0, 0, 0],
    ]
    cells = list(zip(*(part.tolist() for part in result.confusions(4)), strict=True))
    assert cells == [(0, 0, 1), (0, 1, 1), (1, 0, 1), (2, 0, 2), (2, 2, 1)]
    right, count = result.per_class(4)
    assert right.tolist() == [1, 0, 1, 0]
    assert count.tolist() == [2, 1, 3, 0]
    assert result.worst_mistakes(3).tolist() == [2, 5, 1]  # the surest first
    assert result.worst_mistakes(99).tolist() == [2, 5, 1, 4]
    assert made_up([1], [1], [0.5]).worst_mistakes(3).tolist() == []


def test_many_classes_need_little_memory():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 21_841, (2, 50_000))
    result = made_up(labels, predictions, np.ones(50_000))
    tracemalloc.start()
    rows, columns, counts = result.confusions(21_841)
    result.per_class(21_841)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.sum() == 50_000
    assert np.array_equal(np.unique(labels * 21_841 + predictions), rows * 21_841 + columns)
    assert peak < 10e6


def test_batches_do_not_pile_up():
    """The next batch is asked for only when the one some places before it is done."""
    done, ahead = [], []

    class Output:
        """An array on a device, as far as `jax.device_get` is concerned."""

        def __init__(self, value):
            self.value = value

        def __array__(self, *_, **__):
            done.append(1)
            return self.value

    def step(_params, batch):
        return scale_and_score(1.0, batch)[0] | {"top5": Output(np.float32(0))}, {
            name: np.asarray(value) for name, value in scale_and_score(1.0, batch)[1].items()
        }

    def batches():
        images = np.zeros((40, 1, 3, 3), np.uint8)
        for number, batch in enumerate(
            batches_of({"image": images, "label": np.zeros(40, np.int32)}, 2)
        ):
            ahead.append(number - len(done))
            yield batch

    evaluate(step, {"val": None}, batches())
    assert max(ahead) < 4


# What the original code resizes the shorter side to, before the centre of this size is cut out.
@pytest.mark.parametrize(
    ("size", "short"),
    [(160, 182), (176, 201), (192, 219), (224, 256), (256, 292), (288, 329), (320, 365)],
)
def test_published_resize_rule(size, short):
    (height, width), (top, left, *crop) = resize_rule(400, 600, size, 224 / 256)
    assert (height, width) == (short, int(short * 600 / 400))
    assert crop == [size, size]
    assert (top, left) == ((height - size) // 2, (width - size) // 2)
    assert resize_rule(400, 600, 384, 0.875) == ((384, 384), None)
