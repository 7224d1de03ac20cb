import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import ConvNextConfig, InputError
from convnext_jax.losses import classification_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((4, 3)).astype(np.float32)
CLASSES = np.array([2, 0, 1, 1])
VALUES = RNG.standard_normal((4, 3)).astype(np.float32)
TARGETS = RNG.integers(0, 2, (4, 3)).astype(np.float32)


def loss(logits, labels, num_labels=3, problem_type=None):
    config = ConvNextConfig(num_labels=num_labels, problem_type=problem_type)
    return classification_loss(jnp.asarray(logits), jnp.asarray(labels), config)


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    total = np.log(np.exp(logits).sum(-1))
    return np.mean(total - logits[np.arange(len(labels)), labels])


def binary_cross_entropy(logits, labels):
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int8])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_whole_numbers_are_classes(dtype, shape):
    labels = CLASSES.astype(dtype).reshape(shape)
    assert loss(LOGITS, labels) == pytest.approx(cross_entropy(LOGITS, CLASSES), rel=1e-6)


def test_ignored_labels_do_not_count():
    labels = np.array([2, -100, 1, -100])
    expected = cross_entropy(LOGITS[[0, 2]], labels[[0, 2]])
    assert loss(LOGITS, labels) == pytest.approx(expected, rel=1e-6)
    gradient = jax.grad(lambda logits: loss(logits, labels))(LOGITS)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)
    wide = np.zeros((2, 200), np.float32)  # here -100 would be a class counted from the end
    assert loss(wide, np.array([-100, 3]), 200) == pytest.approx(np.log(200), rel=1e-6)


@pytest.mark.parametrize("label", [3, -1, -3, 99])
def test_a_label_that_names_no_class_is_not_a_number(label):
    assert np.isnan(loss(LOGITS, np.array([label, 0, 1, 2])))


def test_floats_are_several_labels_a_picture():
    expected = binary_cross_entropy(LOGITS, TARGETS)
    assert loss(LOGITS, TARGETS) == pytest.approx(expected, rel=1e-6)
    assert loss(LOGITS, TARGETS.astype(bool)) == pytest.approx(expected, rel=1e-6)
    named = loss(LOGITS, TARGETS.astype(int), problem_type="multi_label_classification")
    assert named == pytest.approx(expected, rel=1e-6)


def test_large_logits_do_not_overflow():
    logits, labels = np.array([[200.0, -200.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    assert loss(logits, labels, 2) == pytest.approx(200.0)
    assert loss(logits, np.array([1]), 2) == pytest.approx(400.0)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_one_label_is_regression(shape, dtype):
    labels = np.array([1, 2, 3, 4], dtype).reshape(shape)
    expected = np.mean((LOGITS[:, 0] - labels.reshape(-1)) ** 2)
    assert loss(LOGITS[:, :1], labels, 1) == pytest.approx(expected, rel=1e-6)


def test_regression_of_several_values():
    expected = np.mean((LOGITS - VALUES) ** 2)
    assert loss(LOGITS, VALUES, problem_type="regression") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_give_a_loss_in_f32(dtype):
    logits = jnp.asarray(LOGITS, dtype)
    value = loss(logits, CLASSES)
    assert value.dtype == jnp.float32
    assert value == pytest.approx(cross_entropy(logits, CLASSES), rel=1e-6)


def test_f64_stays_f64():
    with jax.enable_x64(True):
        value = loss(LOGITS.astype(np.float64), CLASSES)
        assert value.dtype == jnp.float64
        assert value == pytest.approx(cross_entropy(LOGITS, CLASSES), rel=1e-14)


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (CLASSES[:3], None),
        (VALUES[:, 0], "single_label_classification"),
        (VALUES[:, :2], None),
        (VALUES[:, 0], "regression"),
        (CLASSES, "multi_label_classification"),
    ],
)
def test_labels_of_another_shape_or_type(labels, problem_type):
    with pytest.raises(InputError) as error:
        loss(LOGITS, labels, problem_type=problem_type)
    assert "\n" not in str(error.value)
    assert str(labels.shape) in str(error.value)
