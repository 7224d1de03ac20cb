"""Checkpoints of a run with orbax: everything that it continues from, saved as one.

A checkpoint holds the state, the position of the data, the settings and the version of the code. It
is the same whichever way the run is laid out over devices, and restores onto any other. orbax
writes it in the background and gives it its name when it is whole, so that a run which ends at any
moment leaves the one before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import FrozenConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from convnext_jax.errors import InputError
from convnext_jax.training import parallel
from convnext_jax.training.step import TrainState

PyTree = Any

# Where checkpoints go that could not be read, beside the folder of the others.
DAMAGED = "damaged_checkpoints"


class Checkpoints(ocp.CheckpointManager):
    """An orbax manager that keeps the newest `keep` checkpoints and the best by top-1."""

    def __init__(self, folder: Path, keep: int):
        best = BestN(get_metric_fn=lambda m: m["top1"], n=1, keep_checkpoints_without_metrics=False)
        self.meetings = _Meetings(folder.name) if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            create=True,
            cleanup_tmp_directories=True,  # of a run that ended while it saved
            async_options=ocp.AsyncOptions(barrier_sync_fn=self.meetings),
        )
        super().__init__(folder.absolute(), options=options)


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    data: dict[str, Any],
    config: FrozenConfigDict,
    top1: float | None = None,
) -> None:
    """Starts saving; `look` with `wait` comes first, for the one before.

    Args:
      checkpoints: the run's.
      state: global arrays, as a layout's `stored` gives them.
      data: the iterator's `get_state()` after the batch of the last step.
      config: the run's settings.
      top1: of an evaluation of this state on val, if there was one.

    Raises:
      OSError: it cannot be begun; what was written is removed. Of several processes, the others
        may be waiting for this one then, which should end.
    """
    run = {
        "config": json.loads(config.to_json_best_effort()),
        "code": code_version(),
        "checksum": int(_checksum(state)),
    }
    items = {
        "state": ocp.args.StandardSave(state),
        "data": ocp.args.JsonSave(data),
        "run": ocp.args.JsonSave(run),
    }
    metrics = None if top1 is None else {"top1": top1}
    step = int(state.step)
    with _removing_what_failed(checkpoints):
        if checkpoints.meetings is not None:
            checkpoints.meetings.begin(step)
        checkpoints.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def look(checkpoints: Checkpoints, *, wait: bool = False) -> None:
    """Asks how the writing in the background is going, or waits for its end.

    Of several processes, which must all hear of a failure at the same step, none asks without
    waiting.

    Raises:
      OSError: it failed, here or in another process; what was written is removed.
    """
    with _removing_what_failed(checkpoints):
        if checkpoints.meetings is None:
            checkpoints.check_for_errors()
        if wait:
            checkpoints.wait_until_finished()


def restore(checkpoints: Checkpoints, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, placed as `like` says; None when there is none.

    Newer ones that cannot be read are named, and moved to a folder `DAMAGED` beside the others.

    Args:
      checkpoints: the run's.
      like: shapes and dtypes, with shardings.

    Raises:
      InputError: there are checkpoints, but none can be read.
    """
    steps = sorted(checkpoints.all_steps(), reverse=True)
    for step in steps:
        try:
            state, data = _restore(checkpoints, step, like)
        except Exception as error:  # orbax and tensorstore raise of every kind
            # On stderr, as the one that knows the reason need not be the process that prints.
            message = f"checkpoint {step} in {checkpoints.directory} cannot be read"
            print(f"{message} ({_short(error)})", file=sys.stderr)
            continue
        for damaged in steps[: steps.index(step)]:
            _set_aside(checkpoints, damaged)
        checkpoints.reload()  # otherwise it takes the steps of those for saved
        return state, data
    if steps:
        raise InputError(
            f"none of the checkpoints in {checkpoints.directory} can be read: give another "
            "--workdir, or remove that folder to start anew"
        )
    return None


@functools.cache
def code_version() -> str:
    """The library's version, and the commit of its source where it lies in a git checkout.

    As they were when this was first asked: the files may change under a run.
    """
    version = importlib.metadata.version("convnext-jax")
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} ({commit.stdout.strip()})"


class _Meetings:
    """Where the processes wait for each other while they save, as orbax calls for it.

    orbax has all meet when they have written, when the checkpoint has its name, and when it is over
    in whatever way. A process that could not write leaves out the first, where the others wait
    for it until their time is over. Here it comes there too and says so, and all fail alike.

    Args:
      name: of the folder, so that two folders may have checkpoints of the same step.
    """

    KINDS = ("_async_write_complete", "_async_commit_complete")
    OPEN, SHUT = (f"ThreadSaveMultiHostValueHolder:set_value_{x}" for x in ("start", "end"))

    def __init__(self, name: str):
        self._name = name
        self._client = ocp.multihost.get_jax_distributed_client()
        self.begin(0)

    def begin(self, step: int) -> None:
        """Before a checkpoint of this step is saved."""
        self._step, self._is_begun = step, False
        self._to_come: tuple[str, ...] = ()
        self._has_failed = False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        kind = key.partition(".")[0]
        if kind == self.OPEN:  # once before the writing, once when it is over
            self._come_without_part()
        if kind in self.KINDS and self._has_failed:
            raise OSError("another part of it could not be written")
        self._client.wait_at_barrier(f"{self._name}/{key}", timeout_ms)
        if kind == self.SHUT and not self._is_begun:
            self._is_begun, self._to_come = True, self.KINDS
        elif kind in self.KINDS:
            self._to_come = self.KINDS[self.KINDS.index(kind) + 1 :]
            if self._client.key_value_dir_get(f"{self._name}/failed/{key}/"):
                self._to_come = ()
                raise OSError("another process could not write its part")

    def _come_without_part(self) -> None:
        """Goes where the others wait, if they do, and tells them; returns when all are there."""
        waiting, self._to_come = self._to_come[:1], ()
        for kind in waiting:
            self._has_failed = True
            key = f"{kind}.{self._step}"
            self._client.key_value_set(f"{self._name}/failed/{key}/{jax.process_index()}", "")
            timeout_ms = 1000 * ocp.AsyncOptions().timeout_secs
            self._client.wait_at_barrier(f"{self._name}/{key}", timeout_ms)


@contextlib.contextmanager
def _removing_what_failed(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise of every kind
        # Its space may be what the next one needs. Some of its writers may still be at work.
        with contextlib.suppress(Exception):
            checkpoints.wait_until_finished()
        if jax.process_index() == 0:
            for partial in Path(checkpoints.directory).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"a checkpoint could not be written ({_short(error)})") from error


def _short(error: BaseException) -> str:
    """The reason among what tensorstore says, which stands at the end of the first error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [")[0].split())
    return "..." + text[-200:] if len(text) > 200 else text or type(error).__name__


def _restore(
    checkpoints: Checkpoints, step: int, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    items = {
        "state": ocp.args.StandardRestore(like),
        "data": ocp.args.JsonRestore(),
        "run": ocp.args.JsonRestore(),
    }
    failed = None
    try:
        restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise of every kind
        failed = error
    # All processes go on to the same checkpoint, also where one alone cannot read its part.
    if parallel.agree(failed is not None):
        raise failed or ValueError("another process cannot read its part")
    run = restored["run"]
    if int(_checksum(restored["state"])) != run["checksum"]:
        raise ValueError("its numbers are not those that were saved")
    if run["code"] != code_version():
        print(f"checkpoint {step} was written by {run['code']}; this is {code_version()}")
    return restored["state"], restored["data"]


def _set_aside(checkpoints: Checkpoints, step: int) -> None:
    folder = Path(checkpoints.directory)
    aside = folder.parent / DAMAGED
    if jax.process_index() == 0:
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (folder / str(step)).rename(aside / str(step))
    parallel.wait_for_all("checkpoint is set aside")
    print(f"checkpoint {step} was moved to {aside}")


@jax.jit
def _checksum(state: PyTree) -> jax.Array:
    """A number that any change of a state's bits would very likely change; uint32.

    Sums that wrap around, so that it does not depend on how the arrays lie over devices.
    """
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        unsigned = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        total += bits.sum(dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
    return total
