"""The step on many devices: two ways to lay a run out over them, with the same results.

`DataParallel` is `jax.pmap`: every device holds the whole state and computes its part of the batch.
`Sharded` is `jax.jit` over a mesh: every device also holds only its part of parameters, optimizer
state and average, and gathers the parameters for the computation (fully sharded data parallelism,
as Rajbhandari et al., arXiv:1910.02054, have it in their third stage). Both call the functions of
`convnext_jax.training.step`, and a checkpoint of either is one of the other.

Where several processes share a run, each has the devices of its host and its rows of the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from convnext_jax.errors import InputError
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training.evaluation import Scores, eval_step
from convnext_jax.training.network import AXIS
from convnext_jax.training.step import (
    Metrics,
    TrainState,
    apply_gradients,
    local_gradients,
    train_step,
)

PyTree = Any
Batch = dict[str, np.ndarray]
TrainStep = Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Metrics]]

# Parameters of fewer numbers stay whole: gathering them takes longer than they save memory.
_SMALLEST_SHARDED = 2**14


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the processes of a run, before anything else is asked of JAX.

    On TPU pods, under Slurm's `srun` and Open MPI's `mpirun` JAX finds out everything by itself;
    elsewhere the arguments say it. Where there is nothing to join, nothing is done.

    Args:
      coordinator: host:port of process 0.
      processes: how many.
      process: which of them this one is, from 0.

    Raises:
      InputError: only some of the arguments were given, or the others were not reached.
    """
    arguments = (coordinator, processes, process)
    if any(x is not None for x in arguments) and None in arguments:
        raise InputError("give all of --coordinator, --processes and --process, or none of them")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        if "coordinator_address should be defined" in str(error):
            return  # nothing says that there are others: one process, the usual case
        raise InputError(f"the processes of the run cannot be joined ({error})") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the processes of the run did not meet ({reason})") from error


def all_devices() -> list[jax.Device]:
    """Those of all processes, `in_order`."""
    return in_order(jax.devices())


def in_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Process by process, as the rows of a batch lie over them."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def layout(name: str, devices: Sequence[jax.Device] | None = None) -> DataParallel | Sharded:
    """The way to run that `config.parallelism` names, over all devices or those given."""
    return {"pmap": DataParallel, "sharded": Sharded}[name](devices or all_devices())


class DataParallel:
    """`jax.pmap`: the whole state on every device, and a part of the batch.

    Args:
      devices: of all processes, those of a process side by side.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = list(devices)
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        # What a mapped function is given and gives belongs to this process alone.
        own = [d for d in self.devices if d.process_index == jax.process_index()]
        self._own_mesh = Mesh(np.array(own or self.devices), (AXIS,))

    def state_sharding(self, state: PyTree) -> PyTree:
        """How this process holds a state, or a part of one, of these shapes."""
        return jax.tree.map(lambda _: NamedSharding(self._own_mesh, PartitionSpec()), state)

    def stored_sharding(self, state: PyTree) -> PyTree:
        """How all processes together hold what `stored` gives."""
        return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), state)

    def train_step(
        self,
        model: ConvNextForImageClassification,
        optimizer: optax.GradientTransformation,
        config: FrozenConfigDict,
    ) -> TrainStep:
        """`step.train_step` of a state, a batch as `put` places it, and the run's key."""
        return jax.pmap(
            functools.partial(train_step, model=model, optimizer=optimizer, config=config),
            axis_name=AXIS,
            in_axes=(None, 0, None),
            out_axes=(None, None),
            devices=self.devices,
            donate_argnums=(0,),
        )

    def eval_step(
        self, model: ConvNextForImageClassification, config: FrozenConfigDict
    ) -> Callable[[PyTree, PyTree], Scores]:
        """`evaluation.eval_step` of parameters and a batch as `put` places it."""
        return jax.pmap(
            functools.partial(eval_step, model=model, config=config),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=(None, 0),
            devices=self.devices,
        )

    def batch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the step is given for an array (batch, ...) of the whole batch."""
        return (len(self.devices), shape[0] // len(self.devices), *shape[1:])

    def put(self, batch: Batch, parts: int = 1) -> PyTree:
        """Starts moving this process's rows of a batch to its devices.

        A batch that is accumulated in `parts` is cut into these first, and then each part over the
        devices, so that a part has the same examples whatever the number of devices.
        """
        devices = self._own_mesh.size
        sharding = NamedSharding(self._own_mesh, PartitionSpec(AXIS))

        def cut(value: np.ndarray) -> np.ndarray:
            value = _by_device(value, devices, parts)
            return value.reshape(devices, -1, *value.shape[1:])

        return jax.device_put(jax.tree.map(cut, batch), sharding)

    def rows(self, output: jax.Array) -> np.ndarray:
        """What `eval_step` gave for each example of this process."""
        return np.asarray(output).reshape(-1, *output.shape[2:])

    def stored(self, state: PyTree) -> PyTree:
        """A state as arrays of all processes, which checkpoints are written from."""
        return _replicated_over(self.mesh, state)

    def running(self, state: PyTree) -> PyTree:
        """A state that was read as `stored_sharding` says, as the step takes it."""
        return _replicated_over(self._own_mesh, state)

    def whole(self, params: PyTree) -> PyTree:
        """Parameters that this process has all of."""
        return params


class Sharded:
    """`jax.jit` over a mesh: a part of the state and of the batch on every device.

    Args:
      devices: of all processes, those of a process side by side.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = list(devices)
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        self._batch_sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))

    def state_sharding(self, state: PyTree) -> PyTree:
        """How the devices hold a state, or a part of one, of these shapes."""
        return jax.tree.map(
            lambda x: NamedSharding(self.mesh, sharded_spec(x.shape, len(self.devices))), state
        )

    stored_sharding = state_sharding

    def train_step(
        self,
        model: ConvNextForImageClassification,
        optimizer: optax.GradientTransformation,
        config: FrozenConfigDict,
    ) -> TrainStep:
        """`step.train_step` of a state, a batch as `put` places it, and the run's key."""

        def local(params: PyTree, *arguments: Any) -> tuple[PyTree, Metrics]:
            gradients, metrics = local_gradients(params, *arguments, model=model, config=config)
            return jax.tree.map(self._scattered_mean, gradients), jax.lax.pmean(metrics, AXIS)

        def train_step(
            state: TrainState, batch: PyTree, key: jax.Array
        ) -> tuple[TrainState, Metrics]:
            whole, split = PartitionSpec(), PartitionSpec(AXIS)
            specs = jax.tree.map(lambda x: sharded_spec(x.shape, len(self.devices)), state.params)
            gradients, metrics = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(whole, whole, split, whole),  # the first gathers the parameters
                out_specs=(specs, whole),
                check_vma=False,  # to which the convolution's forms differ in what varies
            )(state.params, state.step, batch, key)
            state, metrics = apply_gradients(
                state, gradients, metrics, optimizer=optimizer, config=config
            )
            sharding = self.state_sharding(state)
            return jax.lax.with_sharding_constraint(state, sharding), metrics

        return jax.jit(train_step, donate_argnums=(0,))

    def eval_step(
        self, model: ConvNextForImageClassification, config: FrozenConfigDict
    ) -> Callable[[PyTree, PyTree], Scores]:
        """`evaluation.eval_step` of parameters and a batch as `put` places it."""
        whole, split = PartitionSpec(), PartitionSpec(AXIS)
        return jax.jit(
            jax.shard_map(
                functools.partial(eval_step, model=model, config=config),
                mesh=self.mesh,
                in_specs=(whole, split),
                out_specs=(whole, split),
                check_vma=False,
            )
        )

    def batch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the step is given for an array (batch, ...) of the whole batch."""
        return shape

    def put(self, batch: Batch, parts: int = 1) -> PyTree:
        """Starts moving this process's rows of a batch to its devices; see `DataParallel.put`."""
        devices = len(self._batch_sharding.addressable_devices)
        return {
            name: jax.make_array_from_process_local_data(
                self._batch_sharding, _by_device(value, devices, parts)
            )
            for name, value in batch.items()
        }

    def rows(self, output: jax.Array) -> np.ndarray:
        """What `eval_step` gave for each example of this process."""
        shards = sorted(output.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    def stored(self, state: PyTree) -> PyTree:
        """A state as arrays of all processes, which checkpoints are written from."""
        return state

    running = stored

    def whole(self, params: PyTree) -> PyTree:
        """Parameters that this process has all of; every process must ask for them."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(lambda x: x, out_shardings=whole)(params)

    def _scattered_mean(self, gradient: jax.Array) -> jax.Array:
        """A device's part of the mean over all of a gradient."""
        spec = sharded_spec(gradient.shape, len(self.devices))
        if AXIS not in spec:
            return jax.lax.pmean(gradient, AXIS)
        total = jax.lax.psum_scatter(gradient, AXIS, scatter_dimension=spec.index(AXIS), tiled=True)
        return total / len(self.devices)


def placed(shapes: PyTree, sharding_of: Callable[[PyTree], PyTree]) -> PyTree:
    """Shapes and dtypes with the shardings that one of a layout's functions says."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        sharding_of(shapes),
    )


def sharded_spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """How an array is split over devices: along its longest axis that they divide, or not at all.

    It is a function of the shape, so that a parameter, its gradient, its moments and its average
    are split alike.
    """
    divisible = [side if side % devices == 0 else 0 for side in shape]
    if devices == 1 or math.prod(shape) < _SMALLEST_SHARDED or max(divisible, default=0) == 0:
        return PartitionSpec()
    axis = divisible.index(max(divisible))
    return PartitionSpec(*(AXIS if i == axis else None for i in range(axis + 1)))


def is_shared() -> bool:
    """Whether this process has joined others by `join`, even if there turned out to be none."""
    return jax.distributed.is_initialized()


def wait_for_all(place: str) -> None:
    """Returns when every process has come to this place of the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def agree(value: bool) -> bool:
    """Whether any process says yes; every process must ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(jnp.asarray(value)).any())


def _by_device(value: np.ndarray, devices: int, parts: int) -> np.ndarray:
    """Rows (parts x devices x n, ...) as (devices x parts x n, ...)."""
    if parts == 1:
        return value
    rows = value.reshape(parts, devices, -1, *value.shape[1:])
    return rows.swapaxes(0, 1).reshape(value.shape)


def _replicated_over(mesh: Mesh, state: PyTree) -> PyTree:
    """Arrays of which every device of this process has all, as such arrays over `mesh`."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def over_mesh(x: jax.Array) -> jax.Array:
        pieces = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, pieces)

    if jax.process_count() == 1:
        return state
    return jax.tree.map(over_mesh, state)
