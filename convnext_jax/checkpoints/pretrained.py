"""Hugging Face checkpoints in and out: config.json and model.safetensors.

The parameter tree mirrors Hugging Face's state dict, so a key follows from a path by rule:
`convnext/encoder/stages_0/layers_1/dwconv/kernel` is
`convnext.encoder.stages.0.layers.1.dwconv.weight`.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from convnext_jax.checkpoints import files
from convnext_jax.configuration import CONFIG_NAME, ConvNextConfig
from convnext_jax.errors import InputError

WEIGHTS_NAME = "model.safetensors"
BASE_PREFIX = "convnext."
HEAD_PREFIX = "classifier."
FINAL_NORM_PREFIX = "layernorm."
BACKBONE_NORMS = "hidden_states_norms."

Path_ = tuple[str, ...]


def key_of(path: Path_) -> str:
    """Hugging Face's name of the parameter at this path of the tree."""
    *modules, leaf = path
    names = [re.sub(r"^(stages|layers|downsampling_layer)_(\d+)$", r"\1.\2", m) for m in modules]
    names = [re.sub(r"^hidden_states_norms_", BACKBONE_NORMS, name) for name in names]
    return ".".join([*names, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def to_torch_layout(path: Path_, value: np.ndarray) -> np.ndarray:
    """Kernels from HWIO to OIHW and from (in, out) to (out, in); the rest as it is."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def from_torch_layout(path: Path_, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The variables as Hugging Face's state dict, in numpy arrays of their own dtypes."""
    parameters = flatten_dict(meta.unbox(variables["params"]))
    return {
        key_of(path): np.ascontiguousarray(to_torch_layout(path, np.asarray(value)))
        for path, value in parameters.items()
    }


def load_state_dict(
    model: Any, state: Mapping[str, np.ndarray], source: str, param_dtype: Any = None
) -> dict[str, Any]:
    """The variables of `model` from Hugging Face's state dict, every key accounted for.

    Args:
      model: one of the documented models.
      state: arrays by name, in PyTorch's layout, with or without the prefix "convnext.".
      source: what to call the state dict in errors, such as the file it came from.
      param_dtype: dtype of the result; None keeps the dtype of the arrays.

    Raises:
      InputError: one, listing every key that is missing, unexpected or of the wrong shape.
    """
    expected = flatten_dict(jax.eval_shape(model.init_variables, jax.random.key(0))["params"])
    keys = {path: key_of(path) for path in expected}
    state = _with_prefix_of(set(keys.values()), state)

    new = {
        path for path, key in keys.items() if key.startswith(BACKBONE_NORMS) and key not in state
    }
    missing = [key for path, key in keys.items() if key not in state and path not in new]
    unexpected = sorted(set(state) - set(keys.values()))
    wrong = []
    for path, key in keys.items():
        if key in state:
            shape = jax.eval_shape(lambda x, p=path: to_torch_layout(p, x), expected[path]).shape
            if tuple(state[key].shape) != shape:
                wrong.append(f"{key} {tuple(state[key].shape)} instead of {shape}")
    if missing or unexpected or wrong:
        problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
        listing = "; ".join(
            f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names
        )
        raise InputError(f"{source} does not fit the configuration: {listing}")
    if new:
        names = ", ".join(sorted(keys[path] for path in new))
        warnings.warn(
            f"{source} has no norms of feature maps; newly initialised, to be trained: {names}",
            stacklevel=4,
        )

    def value(path: Path_) -> jax.Array:
        if path in new:
            fill = 1.0 if path[-1] == "scale" else 0.0
            return jnp.full(expected[path].shape, fill, param_dtype or expected[path].dtype)
        return jnp.asarray(from_torch_layout(path, state[keys[path]]), dtype=param_dtype)

    return {"params": unflatten_dict({path: value(path) for path in expected})}


def load(
    model_class: type, name_or_path: str | Path, model_options: dict[str, Any], changes: dict
) -> tuple[Any, dict[str, Any]]:
    """What `from_pretrained` of the models does; see there."""
    hub_options, changes = files.split_hub_options(changes)
    config = ConvNextConfig.from_pretrained(name_or_path, **changes, **hub_options)
    model = model_class(config, **model_options)
    path = files.find_file(name_or_path, WEIGHTS_NAME, **hub_options)
    state = files.read_safetensors(path)
    return model, load_state_dict(model, state, str(path), model_options["param_dtype"])


def save(model: Any, folder: str | Path, variables: Mapping[str, Any]) -> None:
    """What `save_pretrained` of the models does; see there."""
    state = state_dict(variables)
    dtype = str(next(iter(state.values())).dtype)
    # Checked before anything is written: a folder that cannot be loaded again helps nobody.
    load_state_dict(model, state, "what is being saved")
    told = {"architectures": (type(model).__name__,), "torch_dtype": dtype}
    if "dtype" in model.config.extra:  # the same, in files of transformers 5
        told["dtype"] = dtype
    config = model.config.replace(**told)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made a folder: {error.strerror}") from error
    # Both files are whole before either replaces an older one, which a failure leaves as it was.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        config.save_pretrained(partial)
        files.write_safetensors(Path(partial, WEIGHTS_NAME), state)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            os.replace(Path(partial, name), folder / name)


def _with_prefix_of(keys: set[str], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict with the prefix of a model that has these keys, less the parts it has not.

    Only a whole part is left out: the head for a network without one, and the final norm for a
    backbone.
    """
    state = {key.removeprefix(BASE_PREFIX): value for key, value in state.items()}
    own = {key.removeprefix(BASE_PREFIX) for key in keys}
    for part in (HEAD_PREFIX, FINAL_NORM_PREFIX):
        if not any(key.startswith(part) for key in own):
            state = {key: value for key, value in state.items() if not key.startswith(part)}
    if own == keys:
        return state
    return {
        key if key.startswith(HEAD_PREFIX) else BASE_PREFIX + key: v for key, v in state.items()
    }
