"""Finding and reading the files of a checkpoint: a local folder, or a hub repository."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convnext_jax.errors import InputError

HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token")


def split_hub_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords for huggingface_hub, and the rest."""
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    return hub, {name: value for name, value in options.items() if name not in HUB_OPTIONS}


def find_file(name_or_path: str | Path, filename: str, **hub_options: Any) -> Path:
    """The path of one file of a checkpoint, fetched from the hub when the name is not a folder.

    Raises:
      InputError: when it is in neither place, saying what was looked for and where.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / filename).is_file():
            raise InputError(f"there is no {filename} in {folder}: is this a model's folder?")
        return folder / filename
    name = str(name_or_path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.exists()
    if looks_local:
        raise InputError(
            f"there is no folder {name}, and a hub name reads owner/name: "
            f"cannot look for {filename} there"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it reports each retry; the error below says it once
        return Path(hf_hub_download(name, filename, **hub_options))
    # Offline is an OSError of one kind or another; what the hub answers is an HTTP error.
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise InputError(
            f"there is no folder {name}, and {filename} could not be had from the hub as {name}, "
            f"revision {hub_options.get('revision') or 'main'} ({_first_sentence(error)}): check "
            "the name and the connection, or give a folder"
        ) from error
    finally:
        logger.setLevel(level)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is an InputError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file by name, in the dtypes of the file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a complete safetensors file ({reason}): copy or download it again"
        ) from error


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name, in their own dtypes."""
    from safetensors.numpy import save_file

    # transformers refuses a file that does not say which framework's layout it has.
    save_file(dict(arrays), path, metadata={"format": "pt"})


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
