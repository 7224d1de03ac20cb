"""Checkpoints in and out: config.json and the weights beside it.

The parameter tree mirrors Hugging Face's state dict, so a key follows from a path by rule:
`convnext/encoder/stages_0/layers_1/dwconv/kernel` is
`convnext.encoder.stages.0.layers.1.dwconv.weight`. Files of other publishers come in through
`foreign`; what goes out has Hugging Face's names.
"""

from __future__ import annotations

import contextlib
import math
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

from convnext_jax.checkpoints import files, foreign
from convnext_jax.checkpoints.files import WEIGHTS_NAME, Tensor
from convnext_jax.configuration import CONFIG_NAME, ConvNextConfig
from convnext_jax.errors import InputError

# The base module in the tree, and what Hugging Face calls it in each family.
BASE_MODULE = "convnext"
BASE_PREFIXES = {"convnextv2": "convnextv2.", "dinov3_convnext": ""}
CLASS_PREFIXES = {"convnextv2": "ConvNextV2", "dinov3_convnext": "DINOv3ConvNext"}
HEAD_PREFIX = "classifier."
FINAL_NORM_PREFIX = "layernorm."
BACKBONE_NORMS = "hidden_states_norms."

# Hugging Face's names in DINOv3's files, from those of the other families. The modules of
# transformers 5 say "model.stages", and its files still "stages".
DINOV3_NAMES = (
    (r"^embeddings\.patch_embeddings\.", "stages.0.downsample_layers.0."),
    (r"^embeddings\.layernorm\.", "stages.0.downsample_layers.1."),
    (r"^encoder\.stages\.", "stages."),
    (r"\.downsampling_layer\.", ".downsample_layers."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv", ".pointwise_conv"),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"(^|\.)layernorm\.", r"\1layer_norm."),
)

Path_ = tuple[str, ...]
Sharding = jax.sharding.Sharding


# -------------------------------------------------------------------------------- names and layouts


def key_of(path: Path_, model_type: str = "convnext") -> str:
    """Hugging Face's name of the parameter at this path of the tree of a family."""
    name = _name_of(path)
    if model_type == "dinov3_convnext":
        for pattern, replacement in DINOV3_NAMES:
            name = re.sub(pattern, replacement, name)
    is_base = path[0] == BASE_MODULE
    return BASE_PREFIXES.get(model_type, "convnext.") + name if is_base else name


def _name_of(path: Path_) -> str:
    """The name that all families and publishers share here, see `foreign`."""
    *modules, leaf = path[1:] if path[0] == BASE_MODULE else path
    names = [re.sub(r"^(stages|layers|downsampling_layer)_(\d+)$", r"\1.\2", m) for m in modules]
    names = [re.sub(r"^hidden_states_norms_", BACKBONE_NORMS, name) for name in names]
    return ".".join([*names, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def to_torch_layout(path: Path_, value: np.ndarray) -> np.ndarray:
    """Kernels from HWIO to OIHW and from (in, out) to (out, in); the rest as it is.

    The two vectors of a global response norm have four axes there.
    """
    if path[-2:-1] == ("grn",):
        return value.reshape(1, 1, 1, -1)
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def from_torch_layout(path: Path_, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if path[-2:-1] == ("grn",):
        return value.reshape(-1)
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def state_dict(variables: Mapping[str, Any], model_type: str = "convnext") -> dict[str, np.ndarray]:
    """The variables as Hugging Face's state dict, in numpy arrays of their own dtypes."""
    tensors = _tensors(variables, model_type)
    return {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}


def _tensors(variables: Mapping[str, Any], model_type: str) -> dict[str, Tensor]:
    """The same, each array made when it is read."""
    parameters = flatten_dict(meta.unbox(variables["params"]))
    return {
        key_of(path, model_type): Tensor(
            _torch_shape(path, value.shape),
            np.dtype(value.dtype),
            lambda path=path, value=value: to_torch_layout(path, np.asarray(value)),
        )
        for path, value in parameters.items()
    }


def _torch_shape(path: Path_, shape: tuple[int, ...]) -> tuple[int, ...]:
    return to_torch_layout(path, np.broadcast_to(np.int8(0), shape)).shape


# ------------------------------------------------------------------------------------------ loading


def load(
    model_class: type,
    name_or_path: str | Path,
    model_options: dict[str, Any],
    changes: dict,
    **placing: Any,
) -> tuple[Any, dict[str, Any]]:
    """What `from_pretrained` of the models does; see there."""
    hub_options, changes = files.split_hub_options(changes)
    config_path = files.find_file(name_or_path, CONFIG_NAME, **hub_options)
    values = files.read_json(config_path)
    if "architecture" in values and "model_type" not in values:
        raise InputError(
            f"{config_path} is a configuration of timm's: run convnext-jax convert {name_or_path} "
            "FOLDER, and load that folder"
        )
    config = ConvNextConfig.from_pretrained(name_or_path, **changes, **hub_options)
    model = model_class(config, **model_options)
    path = files.find_file(name_or_path, *files.WEIGHTS_NAMES, **hub_options)
    state = files.read_weights(path, name=name_or_path, **hub_options)
    param_dtype = model_options["param_dtype"]
    return model, load_state_dict(model, state, str(path), param_dtype, **placing)


def load_state_dict(
    model: Any,
    state: foreign.State,
    source: str,
    param_dtype: Any = None,
    *,
    sharding: Any = None,
    ignore_mismatched_sizes: bool = False,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """The variables of `model` from a state dict, every key accounted for.

    Args:
      model: one of the documented models.
      state: arrays by name in PyTorch's layout, named as Hugging Face (with or without a prefix) or
        one of the publishers in `foreign` names them. `files.Tensor`s are read one at a time.
      source: what to call the state dict in errors, such as the file it came from.
      param_dtype: dtype of the result; None keeps the dtype of the arrays.
      sharding: where to put the arrays: one `jax.sharding.Sharding` for all, or a pytree of them
        with the structure of the variables or a prefix of it; None is JAX's default device.
      ignore_mismatched_sizes: initialise a head anew that is missing or of another width.
      key: for the new head; `jax.random.key(0)` when not given.

    Raises:
      InputError: one, listing every key that is missing, unexpected or of the wrong shape.
    """
    variables = jax.eval_shape(model.init_variables, jax.random.key(0))
    expected = flatten_dict(variables["params"])
    held, new = match(model, expected, state, source, ignore_mismatched_sizes)
    shardings = flatten_dict(_shardings(sharding, variables)["params"])

    def new_value(path: Path_) -> np.ndarray:
        shape = expected[path].shape
        if path[-1] == "kernel":
            draw = jax.random.normal(jax.random.key(0) if key is None else key, shape)
            return np.asarray(model.config.initializer_range * draw)
        return np.full(shape, 1.0 if path[-1] == "scale" else 0.0, expected[path].dtype)

    def value(path: Path_) -> jax.Array:
        if path in new:
            array, dtype = new_value(path), param_dtype or expected[path].dtype
        else:
            array = np.asarray(state[held[path]])
            array = array.reshape(_torch_shape(path, expected[path].shape))
            array, dtype = from_torch_layout(path, array), param_dtype or array.dtype
        return _place(path, array, dtype, shardings[path])

    return {"params": unflatten_dict({path: value(path) for path in expected})}


def match(
    model: Any,
    expected: Mapping[Path_, Any],
    state: foreign.State,
    source: str,
    ignore_mismatched_sizes: bool = False,
) -> tuple[dict[Path_, str], set[Path_]]:
    """Which tensor belongs to which parameter, and which parameters are to be made new.

    Only names and shapes are looked at. New are the norms of a backbone, where the file has none,
    and the head if `ignore_mismatched_sizes` allows it; both are told in a warning.

    Args:
      expected: the parameters of the model by path, arrays or what has their shape.

    Raises:
      InputError: see `load_state_dict`.
    """
    publisher = foreign.publisher_of(state, source)
    found = foreign.hugging_face_names(state, publisher, source)
    wanted = {path: _name_of(path) for path in expected}
    # A whole part that this model has not is left out: the head, and the final norm of a backbone.
    for part in (HEAD_PREFIX, FINAL_NORM_PREFIX):
        if not any(name.startswith(part) for name in wanted.values()):
            found = {name: key for name, key in found.items() if not name.startswith(part)}
    # Nor has a backbone the norms of stages that it does not return.
    if any(name.startswith(BACKBONE_NORMS) for name in wanted.values()):
        norms = tuple(f"{BACKBONE_NORMS}{stage}." for stage in model.config.stage_names)
        kept = set(wanted.values())
        found = {n: key for n, key in found.items() if n in kept or not n.startswith(norms)}

    misfits: dict[Path_, tuple[str, str]] = {}
    for path, name in wanted.items():
        shape = _torch_shape(path, expected[path].shape)
        if name not in found:
            misfits[path] = ("missing", key_of(path, model.config.model_type))
            continue
        tensor, key = state[found[name]], found[name]
        if not _same_shape(name, tuple(tensor.shape), shape):
            text = f"{key} {tuple(tensor.shape)} instead of {shape}"
            misfits[path] = ("of the wrong shape", text)
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            misfits[path] = ("of the wrong type", f"{key} {tensor.dtype}")

    norms = {path for path in misfits if wanted[path].startswith(BACKBONE_NORMS)}
    norms = {path for path in norms if misfits[path][0] == "missing"}
    head = {path for path, name in wanted.items() if name.startswith(HEAD_PREFIX)}
    head_is_new = ignore_mismatched_sizes and not head.isdisjoint(misfits)
    new = norms | (head if head_is_new else set())

    problems: dict[str, list[str]] = {}
    for path, (what, text) in misfits.items():
        if path not in new:
            problems.setdefault(what, []).append(text)
    unexpected = sorted(found[name] for name in set(found) - set(wanted.values()))
    if unexpected:
        problems["unexpected"] = unexpected
    if problems:
        listing = "; ".join(f"{len(t)} {what}: {', '.join(t)}" for what, t in problems.items())
        only_head = not unexpected and misfits.keys() - norms <= head
        hint = " (ignore_mismatched_sizes=True makes a new head)" if only_head else ""
        raise InputError(f"{source} does not fit the configuration: {listing}{hint}")

    for paths, why in ((norms, "has no norms of feature maps"), (head & new, "has another head")):
        if paths:
            names = {path: key_of(path, model.config.model_type) for path in paths}
            texts = [misfits.get(path, ("", names[path]))[1] for path in paths]
            warnings.warn(
                f"{source} {why}; newly initialised, to be trained: {', '.join(sorted(texts))}",
                stacklevel=5,
            )
    return {path: found[name] for path, name in wanted.items() if path not in new}, new


def _same_shape(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape, up to axes of length one where publishers differ in them.

    These are the linear layers of a block, which some write as 1x1 convolutions, and the vectors
    that are multiplied with a map.
    """
    if given == wanted:
        return True
    differ = (".pwconv1.weight", ".pwconv2.weight", ".layer_scale_parameter",
              ".grn.weight", ".grn.bias")  # fmt: skip
    ones = len(given) - len(wanted)
    if not name.endswith(differ):
        return False
    if name.endswith((".grn.weight", ".grn.bias")):
        return given == wanted[-1:]
    return ones > 0 and given == (*wanted, *(1,) * ones)


def _shardings(sharding: Any, variables: Mapping[str, Any]) -> Any:
    try:
        return jax.tree.broadcast(
            sharding, variables, is_leaf=lambda x: x is None or isinstance(x, Sharding)
        )
    except ValueError as error:
        raise InputError(
            "sharding is neither one jax.sharding.Sharding nor a pytree of them with the "
            f"structure of the variables: {' '.join(str(error).split())}"
        ) from error


def _place(path: Path_, value: np.ndarray, dtype: Any, sharding: Sharding | None) -> jax.Array:
    """The array where it shall be; waits for it, so that one at a time is in flight."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    value = np.ascontiguousarray(value, dtype)
    if sharding is None:
        return jnp.array(value).block_until_ready()
    try:
        array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    except (ValueError, TypeError) as error:  # an uneven split; no sharding at all
        raise InputError(
            f"{'/'.join(path)} {value.shape} cannot be put onto {sharding}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return array.block_until_ready()


# ------------------------------------------------------------------------------------------- saving


def save(model: Any, folder: str | Path, variables: Mapping[str, Any]) -> None:
    """What `save_pretrained` of the models does; see there."""
    save_tensors(model, folder, _tensors(variables, model.config.model_type), "what is being saved")


def save_tensors(
    model: Any,
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    source: str,
    processor: Any = None,
) -> int:
    """Writes a folder with tensors of any publisher's names, one of them at a time in memory.

    Returns the number of parameters in it.

    Args:
      model: the model that they are of; the folder says so.
      folder: is made when it does not exist. Its older files stay as they are if anything fails.
      tensors: in PyTorch's layout, in the dtypes that they shall have.
      source: what to call the tensors in errors.
      processor: a `ConvNextImageProcessor` to save beside them.

    Raises:
      InputError: when the tensors do not fit the model, or the folder cannot be made.
    """
    variables = jax.eval_shape(model.init_variables, jax.random.key(0))
    expected = flatten_dict(variables["params"])
    # Checked before anything is written: a folder that cannot be loaded again helps nobody.
    held, new = match(model, expected, tensors, source)
    if new:
        raise InputError(f"{source} misses {', '.join(sorted(map(_name_of, new)))}")
    model_type = model.config.model_type
    state = {
        key_of(path, model_type): _reshaped(tensors[key], _torch_shape(path, expected[path].shape))
        for path, key in held.items()
    }
    dtype = str(next(iter(state.values())).dtype)
    name = type(model).__name__
    if model_type in CLASS_PREFIXES:
        name = CLASS_PREFIXES[model_type] + name.removeprefix("ConvNext")
    told = {"architectures": (name,), "torch_dtype": dtype}
    if "dtype" in model.config.extra:  # the same, in files of transformers 5
        told["dtype"] = dtype
    config = model.config.replace(**told)

    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made a folder: {error.strerror}") from error
    try:
        # All files are whole before any replaces an older one, which a failure leaves as it was.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            config.save_pretrained(partial)
            files.write_safetensors(Path(partial, WEIGHTS_NAME), state)
            if processor is not None:
                processor.save_pretrained(partial)
            # The configuration, by which a folder is known as a model's, comes last.
            for name in sorted(os.listdir(partial), key=lambda name: name == CONFIG_NAME):
                os.replace(Path(partial, name), folder / name)
        return sum(math.prod(tensor.shape) for tensor in state.values())
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # what is in it by now stays
                folder.rmdir()
        raise


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, np.dtype(tensor.dtype), lambda: np.asarray(tensor).reshape(shape))
