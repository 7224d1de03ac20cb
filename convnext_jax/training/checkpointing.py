"""Checkpoints of a run with orbax: the state, and the position of the data, saved as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from convnext_jax.errors import InputError
from convnext_jax.training.step import TrainState


def manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """An orbax manager that writes in the background and keeps the newest `keep` checkpoints."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, data: dict[str, Any]) -> None:
    """Starts saving; `data` is the iterator's `get_state()` after the batch of the last step."""
    items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
    checkpoints.save(int(state.step), args=ocp.args.Composite(**items))


def restore(
    checkpoints: ocp.CheckpointManager, like: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint, placed as the arrays of `like` are; None when there is none.

    Raises:
      InputError: when it does not fit `like`: the folder holds a run of another network.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    items = {"state": ocp.args.StandardRestore(shapes), "data": ocp.args.JsonRestore()}
    try:
        restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"checkpoint {step} in {checkpoints.directory} does not fit this run ({reason}): "
            "give another --workdir"
        ) from error
    return restored["state"], restored["data"]
