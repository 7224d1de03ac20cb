"""Where a run starts: a new network, or a checkpoint with its own head or a new one."""

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from convnext_jax import ConvNextConfig, ConvNextForImageClassification, InputError
from convnext_jax.training.config import default_config
from convnext_jax.training.network import initial_model

SHAPE = {"depths": (1, 2), "hidden_sizes": (8, 16), "patch_size": 2}
KEY = jax.random.key(3)


def settings(**changes) -> FrozenConfigDict:
    config = default_config()
    config.image_size = 8
    config.model.update({**SHAPE, **changes.pop("model", {})})
    config.update(changes)
    return FrozenConfigDict(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a network of three classes, and its parameters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = ConvNextConfig(num_stages=2, image_size=8, num_labels=3, **SHAPE)
    model = ConvNextForImageClassification(config)
    variables = model.init_variables(jax.random.key(0))
    model.save_pretrained(folder, variables)
    return str(folder), variables["params"]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_from_scratch():
    model, params = initial_model(settings(head_init_scale=0.5), ("a", "b"), KEY)
    _, plain = initial_model(settings(), ("a", "b"), KEY)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert_equal(params["convnext"], plain["convnext"])
    assert model.implementation is None
    assert initial_model(settings(kernels=False), ("a", "b"), KEY)[0].implementation == "plain"
    np.testing.assert_array_equal(
        params["classifier"]["kernel"], 0.5 * plain["classifier"]["kernel"]
    )


def test_a_head_for_other_classes_is_new_and_scaled(checkpoint, capsys):
    folder, before = checkpoint
    changes = {"init_from": folder, "head_init_scale": 0.001}
    model, params = initial_model(settings(**changes), tuple("abcde"), KEY)
    assert_equal(params["convnext"], before["convnext"])
    kernel = params["classifier"]["kernel"]
    assert kernel.shape == (16, 5)
    assert 1e-6 < kernel.std() < 1e-4  # 0.001 of 0.02
    assert model.config.id2label[4] == "e"
    assert model.config.drop_path_rate == 0.1  # of the settings
    assert "a new head for 5 classes" in capsys.readouterr().out


def test_a_head_for_as_many_classes_is_kept(checkpoint, capsys):
    folder, before = checkpoint
    changes = {"init_from": folder, "head_init_scale": 0.001}
    _, params = initial_model(settings(**changes), ("x", "y", "z"), KEY)
    assert_equal(params, before)
    assert "its head is kept" in capsys.readouterr().out


def test_the_network_can_be_the_checkpoint_s(checkpoint):
    folder, _ = checkpoint
    open_shape = {"depths": (), "hidden_sizes": (), "patch_size": 4, "drop_path_rate": 0.3}
    model, _ = initial_model(settings(init_from=folder, model=open_shape), ("x", "y"), KEY)
    assert model.config.depths == (1, 2)
    assert model.config.patch_size == 2
    assert model.config.drop_path_rate == 0.3
    assert model.config.image_size == 8


def test_another_network_than_the_settings_is_refused(checkpoint):
    folder, _ = checkpoint
    other = settings(init_from=folder, model={"depths": (1, 1)})
    with pytest.raises(InputError, match=r"depths \(1, 2\) and the settings \(1, 1\)"):
        initial_model(other, ("x", "y"), KEY)


def test_neither_a_network_nor_a_checkpoint():
    with pytest.raises(InputError, match="neither init_from nor model"):
        initial_model(settings(model={"depths": (), "hidden_sizes": ()}), ("x", "y"), KEY)


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        initial_model(settings(init_from=str(tmp_path / "nowhere.pth")), ("x",), KEY)
