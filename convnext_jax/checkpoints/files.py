"""Finding and reading the files of a checkpoint: a local folder, or a hub repository.

Every reader hands out `Tensor`s, whose values are read one at a time and only when asked for, so
that loading never holds a second copy of a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import InputError

HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token")

WEIGHTS_NAME = "model.safetensors"
# What a checkpoint may keep its weights in, in the order in which they are looked for.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)

# The names of dtypes in a safetensors file.
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

# Under which name a PyTorch file may hold its state dict, in the order of preference; the averaged
# weights of a training run come last unless they are asked for.
WRAPPERS = ("model", "state_dict", "module")
AVERAGED_WRAPPERS = ("model_ema", "state_dict_ema")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, whose values are read when numpy asks for them: `np.asarray(tensor)`.

    Attributes:
      shape: as PyTorch has it, whatever the layout of the file.
      dtype: of the values in the file.
      read: reads the values anew at each call.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


# ------------------------------------------------------------------------------------------ finding


def split_hub_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords for huggingface_hub, and the rest."""
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    return hub, {name: value for name, value in options.items() if name not in HUB_OPTIONS}


def find_file(name_or_path: str | Path, *filenames: str, **hub_options: Any) -> Path:
    """The path of the first of these files that a checkpoint has.

    It is fetched from the hub when the name is not a folder; the others are not.

    Raises:
      InputError: when none is in either place, saying what was looked for and where.
    """
    wanted = " or ".join([", ".join(filenames[:-1]), filenames[-1]] if filenames[1:] else filenames)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        for filename in filenames:
            if (folder / filename).is_file():
                return folder / filename
        raise InputError(f"there is no {wanted} in {folder}: is this a model's folder?")
    name = str(name_or_path)
    if folder.is_file():
        raise InputError(f"{name} is a file, and {wanted} is looked for in a folder: give that")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"there is no folder {name}, and a hub name reads owner/name: "
            f"cannot look for {wanted} there"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    where = f"{name}, revision {hub_options.get('revision') or 'main'}"
    reason = None
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it reports each retry; the error below says it once
        for filename in filenames:
            try:
                return Path(hf_hub_download(name, filename, **hub_options))
            except LocalEntryNotFoundError as error:
                # Without a connection the other names may still be in the cache: ask it alone.
                reason = reason or error
                hub_options = {**hub_options, "local_files_only": True}
            except EntryNotFoundError:
                continue
    # Offline is an OSError of one kind or another; what the hub answers is an HTTP error.
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = error
    finally:
        logger.setLevel(level)
    if reason is None:
        raise InputError(f"the hub has {where}, but no {wanted} in it")
    raise InputError(
        f"there is no folder {name}, and {wanted} could not be had from the hub as {where} "
        f"({_first_sentence(reason)}): check the name and the connection, or give a folder"
    ) from reason


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is an InputError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


# ------------------------------------------------------------------------------------------ reading


def read_weights(path: Path, averaged: bool = False, **hub: Any) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, in whichever format its name says it has.

    Args:
      path: a .safetensors, .bin, .pth, .pt or .h5 file, or the index.json of several.
      averaged: take the averaged weights of a training run's PyTorch file, not the last ones.
      **hub: `name` and the options with which `path` was found, where an index's files come from
        the hub; without them they lie beside it.

    Raises:
      InputError: for a file that is damaged, of another format, or would run code.
    """
    name = path.name.lower()
    if averaged and not name.endswith((".bin", ".pth", ".pt")):
        raise InputError(f"{path} has no averaged weights: only a training run's PyTorch file does")
    if name.endswith(".index.json"):
        return _read_index(path, **hub)
    if name.endswith(".safetensors"):
        return read_safetensors(path)
    if name.endswith((".bin", ".pth", ".pt")):
        return read_torch(path, averaged)
    if name.endswith((".h5", ".hdf5")):
        return read_keras(path)
    raise InputError(
        f"{path} is not a file of weights by its name: .safetensors, .bin, .pth, .pt and .h5 are"
    )


def _read_index(path: Path, name: str | Path | None = None, **hub_options: Any) -> dict:
    """The tensors of all files that an index names."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f'{path} has no "weight_map" from tensors to files: download it again')
    tensors: dict[str, Tensor] = {}
    for filename in sorted(set(places.values())):
        is_index = filename.endswith(".index.json")
        if is_index or Path(filename).name != filename or filename in ("", ".", ".."):
            raise InputError(f"{path} names {filename!r}, which is no file beside it")
        part = read_weights(find_file(name or path.parent, filename, **hub_options))
        absent = [key for key, place in places.items() if place == filename and key not in part]
        if absent:
            raise InputError(f"{path} says that {filename} holds {absent[0]}, which it does not")
        tensors.update(part)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Values are read from the file, not through a mapping of it: a file that another program
    truncates meanwhile is an error and not the end of the process.
    """
    from safetensors import safe_open

    try:
        # The format's own library says whether the file is sound.
        with safe_open(path, "numpy"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    # What it raises has many types, and is about the file in every case.
    except Exception as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({_damage(path, error)}): "
            "copy or download it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        key: _safetensor(path, key, 8 + length, description) for key, description in header.items()
    }


def _safetensor(path: Path, key: str, start: int, description: Any) -> Tensor:
    if not isinstance(description, dict):  # the library also takes the three values in a list
        raise InputError(f"{path}: {key} has no dtype, shape and data_offsets in the header")
    dtype, shape, offsets = (description[name] for name in ("dtype", "shape", "data_offsets"))
    if dtype not in SAFETENSORS_DTYPES:
        raise InputError(f"{path}: {key} has the dtype {dtype}, which is not supported")
    numpy_dtype, count = SAFETENSORS_DTYPES[dtype], math.prod(shape)

    def read() -> np.ndarray:
        with open(path, "rb") as file:
            file.seek(start + offsets[0])
            values = np.fromfile(file, np.uint8, count * numpy_dtype.itemsize)
        if len(values) < count * numpy_dtype.itemsize:
            raise InputError(f"{path} ends within {key}: copy or download it again")
        return values.view(numpy_dtype).reshape(shape)

    return Tensor(tuple(shape), numpy_dtype, read)


def read_torch(path: Path, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict of a PyTorch file, which is refused when it would run code.

    The file may hold it as it is or under one of the names that training programs use, such as
    "model" of the original repository. Prefixes of wrapped modules are taken off.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is a PyTorch file, and torch is not installed: pip install torch, or take a "
            "safetensors file"
        ) from error

    content = _load_torch(path)
    wrappers = AVERAGED_WRAPPERS if averaged else WRAPPERS + AVERAGED_WRAPPERS
    held = [name for name in wrappers if isinstance(content, dict) and name in content]
    if averaged and not held:
        raise InputError(f"{path} has no averaged weights ({' or '.join(AVERAGED_WRAPPERS)})")
    state = content[held[0]] if held else content
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} holds {type(state).__name__}, not a state dict of tensors")
    other = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise InputError(
            f"{path} is not a state dict: {str(other[0])!r} is {type(state[other[0]]).__name__}, "
            "not a tensor"
        )
    for prefix in ("module.", "_orig_mod."):
        if all(str(key).startswith(prefix) for key in state):
            state = {str(key).removeprefix(prefix): value for key, value in state.items()}
    return {str(key): _torch_tensor(path, str(key), value) for key, value in state.items()}


def _load_torch(path: Path) -> Any:
    import torch

    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        # The arguments of a training run, which the original repository saves beside the weights,
        # are a plain container: nothing is called to restore it.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),
        ):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    # What it raises has many types, and is about the file in every case.
    except Exception as error:
        # The names of what is asked for are the only part of torch's pages of advice to pass on.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise InputError(
                f"{path} is refused: opening it would run {code[1]}, which tensors alone do not "
                "need; give a safetensors file, or a PyTorch file with a state dict alone"
            ) from error
        raise InputError(
            f"{path} is not a complete PyTorch file of tensors ({_damage(path, error)}): "
            "copy or download it again"
        ) from error


def _torch_tensor(path: Path, key: str, tensor: Any) -> Tensor:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    dtype = {dtype.name: dtype for dtype in SAFETENSORS_DTYPES.values()}.get(name)
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    if dtype is None or not strided or tensor.is_meta:  # "meta" is a shape without values
        raise InputError(
            f"{path}: {key} is {tensor.layout} of {name} on {tensor.device}, which is not supported"
        )

    def read() -> np.ndarray:
        values = tensor.detach().contiguous()
        if name.startswith(("bfloat", "float8")):  # torch hands numpy their bits alone
            bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
            return values.view(bits).numpy().view(dtype)
        return values.numpy()

    return Tensor(tuple(tensor.shape), dtype, read)


def read_keras(path: Path) -> dict[str, Tensor]:
    """The tensors of a tf_model.h5 of Hugging Face's TensorFlow classes, in PyTorch's layout.

    `convnext/tf_conv_next_model/convnext/layernorm/gamma:0` becomes `convnext.layernorm.gamma`.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            f"{path} is an HDF5 file, and h5py is not installed: pip install h5py"
        ) from error

    tensors: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            # The two outer groups name the layer and the model.
            key = ".".join(name.removesuffix(":0").split("/")[2:])
            tensors[re.sub(r"\bkernel$", "weight", key)] = _keras_tensor(path, name, item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a complete HDF5 file ({_damage(path, error)}): "
            "copy or download it again"
        ) from error
    return tensors


def _keras_tensor(path: Path, name: str, dataset: Any) -> Tensor:
    shape = tuple(dataset.shape or ())
    axes = tuple(range(len(shape)))
    if name.endswith("/kernel:0"):  # HWIO to OIHW, (in, out) to (out, in)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), axes)

    def read() -> np.ndarray:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                return file[name][()].transpose(axes)
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(
                f"{path}: {name} cannot be read ({_one_line(error)}): copy or download it again"
            ) from error

    return Tensor(tuple(shape[axis] for axis in axes), dataset.dtype, read)


# ------------------------------------------------------------------------------------------ writing


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray | Tensor]) -> None:
    """Writes arrays by name, in their own dtypes, holding one of them at a time."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    # Largest items first, as the format's own library writes them: every tensor is aligned.
    order = sorted(arrays, key=lambda key: (-arrays[key].dtype.itemsize, key))
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        start, dtype = end, np.dtype(arrays[key].dtype)
        end += math.prod(arrays[key].shape) * dtype.itemsize
        header[key] = {
            "dtype": names[dtype],
            "shape": list(arrays[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that its format's library refuses."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as reason:
        return _one_line(reason)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: run git lfs pull"
    # torch wraps its reason in advice.
    reason = _one_line(error).split("WeightsUnpickler error: ")[-1].split(" Check the doc")[0]
    return reason.split(". ")[0].rstrip(".")[:200]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _first_sentence(error: Exception) -> str:
    return _one_line(error).split(". ")[0].rstrip(".")
