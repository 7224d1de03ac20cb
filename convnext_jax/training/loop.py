"""A whole run: from a configuration to a folder with metrics, checkpoints, pictures and a model.

The order of what happens at a step is a contract:

1. start the step on the devices, whose batch is there already, 2. take the next batch and start
moving it to the devices, 3. write the metrics of the step before (so that the devices never wait
for the host), 4. evaluate when it is time, 5. save when it is time. A checkpoint is thus the state
and the data's position after the same batch, and everything written about the steps up to it is on
disk. What was written about later steps is dropped on resuming.

Several processes that share a run all call `train`; the first one writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FrozenConfigDict
from tqdm import tqdm

from convnext_jax.checkpoints.files import read_json
from convnext_jax.data import pipeline, sources
from convnext_jax.errors import InputError
from convnext_jax.training import checkpointing, parallel, recipe
from convnext_jax.training.config import (
    check,
    eval_pictures,
    optimizer_groups,
    train_pictures,
)
from convnext_jax.training.evaluation import Evaluation, evaluate
from convnext_jax.training.metrics import METRICS_NAME, MetricsWriter, read_rows
from convnext_jax.training.network import initial_model
from convnext_jax.training.plan import Plan, print_plan, run_optimizer
from convnext_jax.training.results import write_results
from convnext_jax.training.step import TrainState, init_state
from convnext_jax.training.unreadable import UnreadableExamples

# What may differ when a run is continued, because the result does not depend on it, or by rounding
# alone.
FREE_SETTINGS = {
    "failed_save", "keep_checkpoints", "kernels", "loader_workers", "log_every_steps",
    "log_example_ids", "max_skipped_steps", "max_unreadable", "parallelism", "plan_classes",
    "plan_examples",
}  # fmt: skip

# Where the state and the batch go that a run ended with whose loss was not finite.
NOT_FINITE = "not_finite"


class NotFinite(FloatingPointError):
    """The loss was no longer finite, more often than the run allows."""


class Preempted(Exception):
    """The run was asked to end, by SIGTERM or a notice of the machines, and has saved its state."""


def train(config: ConfigDict, workdir: str | Path, *, profile_steps: int = 0) -> dict[str, float]:
    """Trains, or continues the run that `workdir` holds, and writes its results there.

    Args:
      config: see `convnext_jax.training.config.default_config`.
      workdir: the run's folder, the same for all processes; made when it does not exist.
      profile_steps: so many steps, from the second one on, are traced into `workdir/profile`.

    Returns:
      The final metrics, as in `metrics.json`.

    Raises:
      InputError: for settings or data that cannot be used.
      NotFinite: when the loss is no longer finite, and was not more often than `max_skipped_steps`
        allows.
      OSError: when a checkpoint cannot be written, and `failed_save` is "stop".
      Preempted: when the run was asked to end.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:  # which would only say the same again
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        stop = stack.enter_context(_StopRequest())
        return _train(FrozenConfigDict(config), Path(workdir), stop, profile_steps, stack)


def _train(
    config: FrozenConfigDict,
    workdir: Path,
    stop: _StopRequest,
    profile_steps: int,
    stack: contextlib.ExitStack,
) -> dict[str, float]:
    check(config)
    checkpointing.code_version()  # of the code as it is now, not when the first checkpoint is made
    dataset = sources.load(
        **config.data, tune_fraction=config.tune_fraction, tune_seed=config.tune_seed
    )
    plan = Plan(config, len(dataset.train))
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    model, params = initial_model(config, dataset.class_names, init_key)

    layout = parallel.layout(config.parallelism)
    optimizer, schedule = run_optimizer(config, plan, params)
    train_step = layout.train_step(model, optimizer, config)
    eval_step = layout.eval_step(model, config)
    _open_workdir(workdir, config, sources.fingerprint(dataset))
    print_plan(config, plan, dataset, model, params, workdir)
    groups = optimizer_groups(config)
    print(recipe.group_table(params, weight_decay=config.weight_decay, **groups))

    checkpoints = stack.enter_context(
        checkpointing.Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    )
    first_state = functools.partial(
        init_state, optimizer=optimizer, with_average=config.ema_decay > 0
    )
    shapes = jax.eval_shape(first_state, params)
    restored = checkpointing.restore(checkpoints, parallel.placed(shapes, layout.stored_sharding))
    if restored is None:
        # From the host's memory, so that no device ever has more than its part.
        place = jax.jit(first_state, out_shardings=layout.state_sharding(shapes))
        state, position, start = place(jax.device_get(params)), None, 0
    else:
        state, position = layout.running(restored[0]), restored[1]
        start = int(state.step)
        print(f"resumed from step {start}")
    del params, restored  # a second copy, which may not fit
    if start > plan.total_steps:
        raise InputError(
            f"{workdir} holds step {start} of a run that ends at {plan.total_steps}: "
            "give another --workdir"
        )
    key_sharding = layout.state_sharding(jax.ShapeDtypeStruct((), np.uint32))
    step_key = jax.jit(
        lambda: jax.random.split(jax.random.key(config.seed))[1], out_shardings=key_sharding
    )()

    is_first = jax.process_index() == 0
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = stack.enter_context(
        contextlib.closing(
            pipeline.train_batches(
                dataset.train,
                batch_size=config.batch_size // jax.process_count(),
                parts=config.gradient_accumulation,
                num_workers=config.loader_workers or None,
                **share,
                **train_pictures(config),
            )
        )
    )
    if position is not None:
        batches.set_state(position)
    metrics_path = workdir / METRICS_NAME
    writer = None
    if is_first:
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, start)))
    unreadable = UnreadableExamples(workdir, dataset, config.max_unreadable, start > 0)
    bar = stack.enter_context(
        tqdm(total=plan.total_steps, initial=start, unit="step", disable=None if is_first else True)
    )

    def fetch() -> _Batch:
        """Takes the next batch, and starts moving it to the devices."""
        before = batches.get_state()
        batch = next(batches)
        parts = {name: batch[name] for name in ("image", "label")}
        on_devices = layout.put(parts, config.gradient_accumulation)
        return _Batch(on_devices, batch, before, batches.get_state())

    def run_evaluation(state: TrainState) -> dict[str, Evaluation]:
        weights = {"val": state.params}
        if state.average is not None:
            weights["val_ema"] = state.average
        examples = pipeline.eval_batches(
            dataset.val,
            batch_size=plan.eval_batch_size // jax.process_count(),
            num_workers=config.loader_workers or None,
            **share,
            **eval_pictures(config),
        )
        with contextlib.closing(examples):
            found = evaluate(eval_step, weights, stop.watch(examples), layout.put, layout.rows)
        unreadable.add("val", found["val"].unreadable, len(found["val"].labels))
        unreadable.hear_of_others()
        return found

    def write_evaluation(step: int, found: dict[str, Evaluation], rate: float | None) -> None:
        values = {
            f"{name}/{metric}": value
            for name, evaluation in found.items()
            for metric, value in evaluation.metrics.items()
        }
        if writer is not None:
            writer.write(step, values)
        bar.write(_evaluation_line(step, plan, values, rate), file=sys.stdout)

    def save(state: TrainState, batch: _Batch, evaluations: dict[str, Evaluation] | None) -> None:
        top1 = None
        if evaluations is not None:
            top1 = evaluations.get("val_ema", evaluations["val"]).metrics["top1"]
        with _failed_save(config):
            checkpointing.look(checkpoints, wait=True)  # at the one before
        with _failed_save(config, may_go_on=jax.process_count() == 1):
            checkpointing.save(checkpoints, layout.stored(state), batch.position, config, top1)

    def write_step(step: int, batch: _Batch, metrics: dict[str, jax.Array]) -> None:
        """Metrics of a step that the devices may still be at; waits for it."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values.pop("skipped"))
        # Looked at every step, so that no checkpoint holds what came of it.
        is_finite = math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])
        if not is_finite:
            _keep_batch(workdir, step, batch)
            what = (
                f"the loss is {values['loss']} and its gradient's norm {values['gradient_norm']} "
                f"at step {step}"
            )
            if skipped > config.max_skipped_steps:
                raise _NotFinite(what, batch)
            bar.write(f"{what}: left out, {skipped} of {config.max_skipped_steps} allowed")
        if writer is None or (step % config.log_every_steps and step != plan.total_steps):
            return
        # The optimizer, whose schedule it is, has not seen the steps that were left out.
        rate = float(schedule(step - 1 - skipped))
        values = {**values, "learning_rate": rate} if is_finite else {}
        if skipped:
            values["skipped"] = skipped
        writer.write(step, {f"train/{name}": value for name, value in values.items()})
        if is_finite:
            bar.set_postfix(loss=f"{values['loss']:.3f}", top1=f"{values['top1']:.3f}")

    pending: tuple[int, _Batch, dict[str, jax.Array]] | None = None
    last_evaluation: dict[str, Evaluation] | None = None
    # A run may have been stopped between a step and its evaluation.
    is_missing = is_first and plan.evaluates_after(start) and not _is_evaluated(metrics_path, start)
    if parallel.agree(is_missing):
        last_evaluation = run_evaluation(state)
        write_evaluation(start, last_evaluation, None)
    tick_step, tick = start, time.perf_counter()
    upcoming = fetch() if start < plan.total_steps else None
    stop.begin_after(start)
    for step in range(start + 1, plan.total_steps + 1):
        if profile_steps and step == start + 2:
            jax.profiler.start_trace(str(workdir / "profile"))
        batch = upcoming
        unreadable.add("train", batch.on_host["unreadable"], len(batch.on_host["id"]))
        state, metrics = train_step(state, batch.on_devices, step_key)
        if writer is not None and config.log_example_ids:
            writer.write_examples(step, batch.on_host["id"].tolist())
        last = step == plan.total_steps
        upcoming = None if last else fetch()

        is_preempted = stop.is_due(step)
        evaluation_due = plan.evaluates_after(step)
        save_due = last or step % plan.checkpoint_every == 0
        try:
            if pending is not None:
                write_step(*pending)
            pending = step, batch._replace(on_devices=None), metrics  # which need the memory
            if evaluation_due or save_due or is_preempted:
                write_step(*pending)
                pending = None
        except _NotFinite as error:
            with contextlib.suppress(OSError):
                checkpointing.look(checkpoints, wait=True)
            # The state is the one before that step, but for its count.
            state = layout.stored(state.replace(skipped=state.skipped - 1))
            kept = _keep_state(workdir, state, error.batch, config)
            raise NotFinite(
                f"{error}. {kept}. Give another --workdir with a lower learning_rate, or with "
                "gradient_clip; or the same with a larger max_skipped_steps"
            ) from None
        if profile_steps and start + 2 <= step == min(start + 1 + profile_steps, plan.total_steps):
            jax.block_until_ready(state.params)
            jax.profiler.stop_trace()
            bar.write(f"{workdir / 'profile'}: a trace of {profile_steps} steps", file=sys.stdout)
        evaluations = None
        if evaluation_due and not is_preempted:
            jax.block_until_ready(state.params)
            seconds = time.perf_counter() - tick
            rate = (step - tick_step) * config.batch_size / seconds
            if writer is not None and step > tick_step:
                writer.write_timing(step, {"seconds": seconds, "examples_per_second": rate})
            try:
                evaluations = last_evaluation = run_evaluation(state)
                write_evaluation(step, evaluations, rate)
            except _Interrupted:  # it is made when the run continues
                is_preempted = True
        if save_due or is_preempted:
            save(state, batch, evaluations)
        else:
            with _failed_save(config):
                checkpointing.look(checkpoints)
        if is_preempted:
            with _failed_save(config):
                checkpointing.look(checkpoints, wait=True)
            saved = checkpoints.latest_step()
            raise Preempted(f"asked to end, saved step {saved} of {plan.total_steps}")
        if evaluation_due or step == start + 1:  # the first step compiles
            jax.block_until_ready(state.params)
            tick_step, tick = step, time.perf_counter()
        bar.update()

    if last_evaluation is None:  # the run had already ended; its results are written again
        last_evaluation = run_evaluation(state)
    with _failed_save(config):
        checkpointing.look(checkpoints, wait=True)
    exported = "val_ema" if state.average is not None else "val"
    weights = layout.whole(state.params if state.average is None else state.average)
    final = {}
    if is_first:
        final = write_results(
            config, workdir, model, dataset, weights, last_evaluation, exported, plan.total_steps
        )
    parallel.wait_for_all("results")  # the first process is one that the others cannot do without
    return final or read_json(workdir / "metrics.json")


class _Batch(NamedTuple):
    """A batch on its way to the devices, with the data's position before and after it."""

    on_devices: Any
    on_host: dict[str, np.ndarray]
    before: dict[str, Any]
    position: dict[str, Any]


class _NotFinite(Exception):
    """A loss that is not finite was one too many; with its batch."""

    def __init__(self, what: str, batch: _Batch):
        super().__init__(what)
        self.batch = batch


class _Interrupted(Preempted):
    """An evaluation was given up because the run is to end."""


class _StopRequest:
    """Whether the run is to end: SIGTERM, or what JAX hears of it on the other hosts.

    Schedulers send SIGTERM some time before they take a machine away.
    """

    def __init__(self):
        self._is_asked = False
        # JAX then listens for the signal, and agrees with the other hosts on the step.
        self._is_shared = parallel.is_shared()
        self._was_asked = False  # about the steps of earlier starts
        self._before: Any = None

    def __enter__(self) -> _StopRequest:
        if not self._is_shared and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self._is_asked = True

    def begin_after(self, start: int) -> None:
        """Asks about the steps up to `start`, which an earlier start of the run has made.

        The hosts agree on the step after the last that any of them has asked about. A notice that
        comes before the first step would otherwise mean step 1, about which no one would ask.
        """
        if self._is_shared:
            asked = [multihost_utils.reached_preemption_sync_point(i + 1) for i in range(start)]
            self._was_asked = any(asked)

    def is_due(self, step: int) -> bool:
        """Whether to end after this step; every process must ask at every step."""
        if self._is_shared:
            return multihost_utils.reached_preemption_sync_point(step) or self._was_asked
        return self._is_asked

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, until the run of a single process is to end."""
        for batch in batches:
            if self._is_asked:
                raise _Interrupted("asked to end during an evaluation")
            yield batch


@contextlib.contextmanager
def _failed_save(config: FrozenConfigDict, *, may_go_on: bool = True) -> Iterator[None]:
    """What a checkpoint that could not be written means for the run."""
    try:
        yield
    except OSError as error:
        if config.failed_save == "stop" or not may_go_on:
            raise OSError(
                f"{error}: the one before it is whole. Make room and start again, or give "
                "--config.failed_save=continue"
            ) from error
        tqdm.write(f"{error}: the run goes on without it", file=sys.stderr)


def _keep_batch(workdir: Path, step: int, batch: _Batch) -> None:
    """Writes this process's rows of a batch whose loss was not finite."""
    folder = workdir / NOT_FINITE
    folder.mkdir(exist_ok=True)
    rows = {name: batch.on_host[name] for name in ("image", "label", "id")}
    np.savez(folder / f"step_{step}_process_{jax.process_index()}.npz", **rows)


def _keep_state(workdir: Path, state: TrainState, batch: _Batch, config: FrozenConfigDict) -> str:
    """Saves the state before a step whose loss was not finite; what can be said of that."""
    folder = workdir / NOT_FINITE
    if jax.process_index() == 0:
        for earlier in folder.glob("[0-9]*"):  # of another start that ended so
            shutil.rmtree(earlier)
    parallel.wait_for_all("not finite")
    try:
        with checkpointing.Checkpoints(folder, 1) as checkpoints:
            checkpointing.save(checkpoints, state, batch.before, config)
            checkpointing.look(checkpoints, wait=True)
    except OSError as error:
        return f"{folder} has its batch, but not the state before it: {error}"
    return f"{folder} has the state before it and its batch"


def _is_evaluated(metrics_path: Path, step: int) -> bool:
    return any(row["step"] == step and "val/loss" in row for row in read_rows(metrics_path))


def _open_workdir(workdir: Path, config: FrozenConfigDict, data: dict[str, str]) -> None:
    """Writes config.json and data.json; a folder with others is not touched."""
    config_path, data_path = workdir / "config.json", workdir / "data.json"
    partial = workdir / ".config.json.partial"
    settings = json.loads(config.to_json_best_effort())
    # Without a whole checkpoint there is nothing to continue.
    if any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        changed = set(_differences(settings, read_json(config_path))) - FREE_SETTINGS
        if changed:
            raise InputError(
                f"{workdir} holds a run with other settings ({', '.join(sorted(changed))}): "
                "give another --workdir, or the same settings to continue it"
            )
        changed = set(_differences(data, read_json(data_path)))
        if changed:
            raise InputError(
                f"the data of the run in {workdir} changed since ({', '.join(sorted(changed))}): "
                "give another --workdir, or the same data to continue it"
            )
        return
    is_run = config_path.exists() or data_path.exists()
    if workdir.exists() and (not workdir.is_dir() or (any(workdir.iterdir()) and not is_run)):
        raise InputError(f"{workdir} exists and is not the folder of a run: give another --workdir")
    parallel.wait_for_all("workdir")  # all have looked before one writes
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        # The settings in one move and last: a folder that has checkpoints has both files whole.
        data_path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, config_path)
    parallel.wait_for_all("workdir is made")


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix]
    return [
        difference
        for key in {**ours, **theirs}
        for difference in _differences(
            ours.get(key), theirs.get(key), f"{prefix}.{key}" if prefix else key
        )
    ]


def _evaluation_line(step: int, plan: Plan, values: dict[str, float], rate: float | None) -> str:
    parts = [f"step {step:>{len(str(plan.total_steps))}}/{plan.total_steps}"]
    parts.append(f"loss {values['val/loss']:.4f}")
    parts.append(f"top-1 {values['val/top1']:.2%}")
    if "val_ema/top1" in values:
        parts.append(f"EMA top-1 {values['val_ema/top1']:.2%}")
    if rate is not None:
        parts.append(f"{rate:,.0f} examples/s")
    return "  ".join(parts)
