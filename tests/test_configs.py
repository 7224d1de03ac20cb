"""Every file under configs/: it loads, is locked, and builds its network."""

import importlib.util
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from convnext_jax.training.config import default_config
from convnext_jax.training.loop import Plan, build_model

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config(path):
    config = load(path)
    assert config.keys() == default_config().keys()
    with pytest.raises(AttributeError):
        config.learning_rat = 1.0
    frozen = FrozenConfigDict(config)
    plan = Plan(frozen, examples=1400)
    assert 0 < plan.warmup_steps < plan.total_steps
    model = build_model(frozen, tuple("abcdefghij"))
    variables = jax.eval_shape(model.init_variables, jax.random.key(0))
    assert variables["params"]["classifier"]["kernel"].shape[1] == 10


def test_there_are_configs():
    assert {"digits", "fashion_mnist", "image_folder", "imagenette"} <= {f.stem for f in FILES}
