"""What a run will need and how long it will take, from its step compiled before anything is there.

The step is compiled as a run would compile it, for the devices at hand or for a TPU slice that is
only described, of shapes alone: no parameter is made and no picture is read. What the compiler says
of the program (its arithmetic, the bytes that it moves, its memory, its collectives) is put beside
what the chip is said to do.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from convnext_jax.data import sources
from convnext_jax.errors import InputError
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.ops import tpu
from convnext_jax.training import parallel
from convnext_jax.training.config import check
from convnext_jax.training.network import AXIS, initial_model
from convnext_jax.training.plan import Plan, run_optimizer, step_flops
from convnext_jax.training.step import TrainState, init_state

PyTree = Any


class Chip(NamedTuple):
    """What the manufacturer says of a device: bf16 FLOP/s, bytes/s of its memory, its bytes."""

    flops: float
    bandwidth: float
    memory: float


# By `device_kind`. Of an H100 or H200 the form with NVLink, without the sparsity.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 819e9, 16e9),  # v5e
    "TPU v5": Chip(459e12, 2765e9, 95e9),  # v5p
    "TPU v6 lite": Chip(918e12, 1640e9, 32e9),  # v6e
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 80e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141e9),
}

# The share of a chip's FLOP/s that the step is taken to reach while it is bound by arithmetic.
UTILISATION = 0.5

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# For a libtpu that only compiles: do not ask for the machine's TPU, and do not wait for another
# process that has it.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # which the described topology overrides
}


def describe(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice, for which programs can be compiled on any machine.

    Keeps JAX from looking for accelerators of this machine, where it has not done so yet.

    Args:
      topology: generation and sides, such as "v5e:4x4" or "v5p:2x2x4".

    Raises:
      InputError: libtpu, which has the compiler, is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"the compiler for {topology} is not installed: pip install libtpu (no TPU is needed), "
            "or leave the topology out for the devices of this machine"
        )
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of no common type: libtpu's, and those of its absence
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"there is no topology {topology!r} ({reason}): give one such as v5e:4x4, v5e:8x16, "
            "v5p:2x2x4 or v6e:4x4"
        ) from error
    return parallel.in_order(devices)


# The step -----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A training step that is lowered, and the shapes that it is of."""

    lowered: jax.stages.Lowered
    state: TrainState  # of `jax.ShapeDtypeStruct`, which have shardings
    batch: PyTree
    model: ConvNextForImageClassification
    plan: Plan


def lower(
    config: FrozenConfigDict, devices: Sequence[jax.Device], examples: int, classes: int
) -> Step:
    """The step of a run of these settings, ready to be compiled; nothing is put into memory.

    Where `config.init_from` is set, the checkpoint is read only if the settings leave its network
    open.

    Args:
      config: see `convnext_jax.training.config`.
      devices: of the run, at hand or described.
      examples: to train on.
      classes: of the data.

    Raises:
      InputError: for settings that no run can be made with.
    """
    check(config)
    plan = Plan(config, examples, len(devices))
    model, params = _network(config, classes)
    device = devices[0]
    if jax.default_backend() == "gpu" != device.platform and device.device_kind not in tpu.KINDS:
        model = model.clone(implementation="plain")  # the kernels of this GPU are not for them
    optimizer, _ = run_optimizer(config, plan, params)
    layout = parallel.layout(config.parallelism, devices)
    by_device = NamedSharding(layout.mesh, PartitionSpec(AXIS))
    state = parallel.placed(
        jax.eval_shape(
            functools.partial(init_state, optimizer=optimizer, with_average=config.ema_decay > 0),
            params,
        ),
        layout.state_sharding,
    )
    side, size = config.image_size, config.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct(layout.batch_shape((size, side, side, 3)), jnp.uint8),
        "label": jax.ShapeDtypeStruct(layout.batch_shape((size,)), jnp.int32),
    }
    batch = parallel.placed(batch, lambda tree: jax.tree.map(lambda _: by_device, tree))
    key = parallel.placed(jax.eval_shape(lambda: jax.random.key(0)), layout.state_sharding)
    lowered = layout.train_step(model, optimizer, config).lower(state, batch, key)
    return Step(lowered, state, batch, model, plan)


def _network(
    config: FrozenConfigDict, classes: int
) -> tuple[ConvNextForImageClassification, PyTree]:
    """The network of a run, and the shapes of its parameters."""
    names, made = tuple(map(str, range(classes))), []
    if config.model.depths:  # the weights of a checkpoint change nothing here
        config = ConfigDict(config)
        config.init_from = ""
        config = FrozenConfigDict(config)

    def params() -> PyTree:
        model, params = initial_model(config, names, jax.random.key(0))
        made.append(model)
        return params

    if config.init_from:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params())
    else:
        shapes = jax.eval_shape(params)
    return made[0], shapes


# What the compiled program says -------------------------------------------------------------------


def memory(step: Step, compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a device while the step runs, by what they hold; their sum is its need.

    The compiler says how much is temporary, not of what: `gradients` is what all of them together
    take, and `activations` the rest of the temporaries.
    """
    held = _held(step)
    said = compiled.memory_analysis()
    gradients = min(held["parameters"], said.temp_size_in_bytes)
    # New arrays that do not take the place of old ones, the program, and the padding of all that
    # goes into it, which TPUs lay out in tiles.
    other = said.argument_size_in_bytes - sum(held.values())
    other += said.output_size_in_bytes - said.alias_size_in_bytes
    other += said.generated_code_size_in_bytes
    return held | {
        "gradients": gradients,
        "activations": said.temp_size_in_bytes - gradients,
        "padding, program": other,
    }


def _held(step: Step) -> dict[str, int]:
    """Bytes of a device that the step is given, by what they hold."""

    def own(tree: PyTree) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    return {
        "parameters": own(step.state.params),
        "optimizer": own(step.state.opt_state),
        "EMA": own(step.state.average),
        "pictures": own(step.batch),
    }


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """The exchanges between devices in the text of a compiled program.

    Args:
      program: what `jax.stages.Compiled.as_text` gives.

    Returns:
      By kind, one of `COLLECTIVES`, how many there are and how many bytes each device has of them
      in all: of what goes into an operation or of what comes out, whichever is more. One that
      stands in a loop counts once.
    """
    sizes: dict[str, int] = {}
    kinds: dict[str, str] = {}
    going_in, coming_out, channels = {}, {}, {}
    for instruction in _instructions(program):
        name, operation, operands = instruction.name, instruction.operation, instruction.operands
        sizes[name] = _bytes(instruction.shape)
        kind = operation.removesuffix("-start").removesuffix("-done")
        if kind not in COLLECTIVES:
            continue
        if operation.endswith("-done"):  # of the operation that its operand started
            coming_out[operands[0]] = sizes[name]
            continue
        kinds[name] = kind
        going_in[name] = sum(sizes.get(operand, 0) for operand in operands)
        # Of a start, the shape is that of what both halves share.
        coming_out[name] = 0 if operation.endswith("-start") else sizes[name]
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        channels[name] = channel[1] if channel else name
    # What TPUs do beside other work stands in the text once for each part of that work, all of the
    # same channel and size.
    exchanges = {
        (kind, channels[name], max(going_in[name], coming_out[name]))
        for name, kind in kinds.items()
    }
    totals: dict[str, tuple[int, int]] = {}
    for kind, _, size in exchanges:
        count, total = totals.get(kind, (0, 0))
        totals[kind] = count + 1, total + size
    return totals


def traffic(program: str) -> int:
    """Bytes between a device and its memory in a run of a compiled program, loops made once.

    What each operation reads and writes, but for what the compiler keeps in memory on the chip.
    XLA's own count, `cost_analysis()["bytes accessed"]`, has that too, and for TPUs it takes some
    4.6 kB for each number that a gather reads, of which the augmentation has many.

    Args:
      program: what `jax.stages.Compiled.as_text` gives.
    """
    # The insides of fused operations, and what reductions apply, stay in registers.
    inside = set(re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", program))
    held: dict[str, int] = {}  # bytes of each value that lie in the device's memory
    read: dict[str, int] = {}  # of a copy under way, those of what it reads
    total = 0
    for instruction in _instructions(program):
        name, operation, operands = instruction.name, instruction.operation, instruction.operands
        held[name] = _bytes(instruction.shape, in_memory=True)
        taken = sum(held.get(operand, 0) for operand in operands)
        if operation.endswith("-start"):
            read[name] = taken
        elif instruction.computation not in inside and operation not in _FREE:
            if operation.endswith("-done"):  # of a slice, only the slice is read
                taken = min(read.get(operands[0], 0), _bytes(instruction.shape))
            if not _IS_FREE_CALL.search(instruction.text):
                total += held[name] + taken
    return total


class _Instruction(NamedTuple):
    """One of a compiled program: `name = shape operation(operands), ...`, a part of a function."""

    computation: str
    name: str
    shape: str
    operation: str
    operands: list[str]
    text: str


_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")

# Operations that move nothing: names for parts and wholes, and what runs other functions.
_FREE = frozenset(
    (
        "after-all", "bitcast", "conditional", "constant", "get-tuple-element", "parameter",
        "partition-id", "tuple", "while",
    )
)  # fmt: skip
_IS_FREE_CALL = re.compile(
    'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast)"'
)


def _instructions(program: str) -> Iterator[_Instruction]:
    computation = ""
    for line in program.splitlines():
        if found := _INSTRUCTION.match(line):
            name, shape, operation, text = found.groups()
            operands = re.findall(r"%([\w.-]+)", text.split("), ")[0])
            yield _Instruction(computation, name, shape, operation, operands, text)
        elif found := _HEAD.match(line):
            computation = found[1]


def _bytes(shape: str, in_memory: bool = False) -> int:
    """Bytes of a shape as XLA writes it, of a tuple those of all its arrays; without padding.

    With `in_memory`, of those alone that do not lie in another space: on the chip, or the host.
    """
    total = 0
    for kind, bits, sides, layout in _ARRAY.findall(shape):
        size = 1 if kind == "pred" else int(bits) / 8
        if not (in_memory and "S(" in layout):
            total += math.ceil(size * math.prod(int(side) for side in sides.split(",") if side))
    return total


# The table ----------------------------------------------------------------------------------------


def print_forecast(config: ConfigDict | FrozenConfigDict, topology: str = "") -> None:
    """Prints what a run of these settings amounts to, and what its compiled step needs.

    Args:
      config: see `convnext_jax.training.config`.
      topology: of a TPU slice, as `describe` takes it; empty: the devices at hand.

    Raises:
      InputError: for settings that no run can be made with, or a topology that there is not.
    """
    config = ConfigDict(config)
    config.scan = False  # a compiler counts one round of a loop; unrolled, it counts every block
    config = FrozenConfigDict(config)
    check(config)
    devices = describe(topology) if topology else parallel.all_devices()
    examples, classes = _data_size(config)
    step = lower(config, devices, examples, classes)
    chip = CHIPS.get(devices[0].device_kind)
    room = chip.memory if chip else None
    if not topology:  # what JAX lets a run have of it
        room = (devices[0].memory_stats() or {}).get("bytes_limit", room)

    where = f", {topology} as described" if topology else ""
    in_parts = f" in {config.gradient_accumulation} parts"
    _print_rows(
        {
            "devices": f"{len(devices)} x {devices[0].device_kind}{where}, {config.parallelism}",
            "data": f"{examples:,} to train on, {classes:,} classes"
            + (", as plan_examples and plan_classes say" if config.plan_examples else ""),
            "network": f"{sum(x.size for x in jax.tree.leaves(step.state.params)):,} parameters, "
            f"{config.image_size} px, {config.dtype}" + (", remat" if config.remat else ""),
            "batch": f"{config.batch_size:,}: {len(devices)} device(s) x "
            f"{config.batch_size // len(devices)}"
            + (in_parts if config.gradient_accumulation > 1 else ""),
            "steps": f"{step.plan.total_steps:,} in {config.epochs:g} epochs",
        }
    )
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _print_rows(_refused_rows(step, error))
    else:
        _print_rows(_memory_rows(step, compiled, room))
        _print_rows(_time_rows(config, step, compiled, len(devices), chip))


def _data_size(config: FrozenConfigDict) -> tuple[int, int]:
    """The number of examples to train on, and of classes."""
    if config.plan_examples and config.plan_classes:
        return config.plan_examples, config.plan_classes
    try:
        dataset = sources.load(
            **config.data, tune_fraction=config.tune_fraction, tune_seed=config.tune_seed
        )
    except InputError as error:
        raise InputError(
            f"{error}; before the data is there, give --config.plan_examples and "
            "--config.plan_classes"
        ) from error
    return len(dataset.train), len(dataset.class_names)


def _refused_rows(step: Step, error: Exception) -> dict[str, str]:
    """What is known of a step that the compiler found too large for the device."""
    rows = {name: _size(size) for name, size in _held(step).items() if size}
    return rows | {"fits": f"no: {str(error).splitlines()[0].split('. HLO module')[0]}"}


def _memory_rows(step: Step, compiled: jax.stages.Compiled, room: float | None) -> dict[str, str]:
    """A device's memory: what takes how much of it, and whether there is enough."""
    needs = memory(step, compiled)
    total = sum(needs.values())
    rows = {name: _size(size) for name, size in needs.items() if size}
    rows["in all"] = f"{_size(total)} a device"
    if room is None:
        return rows | {"fits": "unknown, as the memory of this device is"}
    return rows | {"fits": f"{'yes' if total <= room else 'no'}: there are {_size(room)}"}


def _time_rows(
    config: FrozenConfigDict,
    step: Step,
    compiled: jax.stages.Compiled,
    devices: int,
    chip: Chip | None,
) -> dict[str, str]:
    """What a step computes, moves and exchanges, and what follows for the time of the run."""
    pictures, text = config.batch_size // devices, compiled.as_text()
    cost = compiled.cost_analysis()
    # Of a loop, the compiler counts one round.
    rounds = config.gradient_accumulation
    counted, moved = rounds * cost["flops"], rounds * traffic(text)
    products = step_flops(config, step.model.config) / devices
    rows = {
        "arithmetic": f"{counted / pictures / 1e9:.3g} GFLOP a picture as XLA counts, "
        f"{products / pictures / 1e9:.3g} for the products alone; "
        f"{counted * devices / 1e12:.3g} TFLOP a step",
        "traffic": f"{_size(moved)} a step between a device and its memory "
        f"({_size(rounds * cost['bytes accessed'])} as XLA counts)",
    }
    exchanges = collectives(text) if devices > 1 else {}
    for kind, (count, size) in sorted(exchanges.items()):
        rows[kind] = f"{count}, of {_size(size)} a device and step"
    if chip is None:
        return rows | {"time": "unknown, as the speed of this device is"}
    computing = max(counted, products) / (
        chip.flops * UTILISATION
    )  # XLA leaves out others' kernels
    moving = moved / chip.bandwidth
    seconds = max(computing, moving)
    days = seconds * step.plan.total_steps / 86400
    return rows | {
        "computing": f"{1e3 * computing:.3g} ms a step at {UTILISATION:.0%} of the chip's "
        f"{chip.flops / 1e12:.4g} TFLOP/s in bf16",
        "moving": f"{1e3 * moving:.3g} ms a step at its {chip.bandwidth / 1e9:.4g} GB/s",
        "step": f"{1e3 * seconds:.3g} ms, the longer of the two: "
        f"{config.batch_size / seconds:,.0f} pictures/s",
        "run": f"{24 * days:.3g} hours, {days:.3g} days: {step.plan.total_steps:,} steps, "
        f"{config.epochs:g} epochs, without evaluations",
    }


def _print_rows(rows: dict[str, str]) -> None:
    print("\n".join(f"{name:>18}  {value}" for name, value in rows.items()), flush=True)


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
