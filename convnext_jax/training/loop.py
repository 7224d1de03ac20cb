"""A whole run: from a configuration to a folder with metrics, checkpoints, pictures and a model.

The order of what happens at a step is a contract:

1. take the next batch, 2. start the step on the devices, 3. write the metrics of the step before
(so that the devices never wait for the host), 4. evaluate when it is time, 5. save when it is time.
A checkpoint is thus the state and the data's position after the same batch, and everything written
about the steps up to it is on disk. What was written about later steps is dropped on resuming.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict
from tqdm import tqdm

from convnext_jax.checkpoints.files import read_json
from convnext_jax.data import pipeline, sources
from convnext_jax.errors import InputError
from convnext_jax.training import checkpointing, recipe
from convnext_jax.training.config import (
    check,
    eval_pictures,
    peak_learning_rate,
    train_pictures,
)
from convnext_jax.training.evaluation import Evaluation, eval_step, evaluate, split
from convnext_jax.training.metrics import MetricsWriter
from convnext_jax.training.network import AXIS, initial_model
from convnext_jax.training.plan import Plan, print_plan
from convnext_jax.training.results import write_results
from convnext_jax.training.step import TrainState, init_state, train_step
from convnext_jax.training.unreadable import UnreadableExamples

# What may differ when a run is continued, because the result does not depend on it.
FREE_SETTINGS = {
    "keep_checkpoints",
    "loader_workers",
    "log_every_steps",
    "log_example_ids",
    "max_unreadable",
}


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains, or continues the run that `workdir` holds, and writes its results there.

    Args:
      config: see `convnext_jax.training.config.default_config`.
      workdir: the run's folder; made when it does not exist.

    Returns:
      The final metrics, as in `metrics.json`.

    Raises:
      InputError: for settings or data that cannot be used.
      FloatingPointError: when the loss is no longer finite.
    """
    config, workdir = FrozenConfigDict(config), Path(workdir)
    check(config)
    dataset = sources.load(
        **config.data, tune_fraction=config.tune_fraction, tune_seed=config.tune_seed
    )
    plan = Plan(config, len(dataset.train))
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    model, params = initial_model(config, dataset.class_names, init_key)

    devices = jax.local_devices()
    replicated = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    schedule = recipe.warmup_cosine(
        peak_learning_rate(config), plan.warmup_steps, plan.total_steps, config.min_learning_rate
    )
    groups = {
        "layer_decay": config.layer_decay,
        "layer_decay_rule": config.layer_decay_rule,
        "freeze_backbone": config.freeze_backbone,
        "muon": config.muon,
    }
    optimizer = recipe.optimizer(
        params,
        learning_rate=schedule,
        weight_decay=recipe.weight_decay_cosine(
            config.weight_decay, config.weight_decay_end, plan.total_steps
        ),
        betas=tuple(config.adam_betas),
        eps=config.adam_eps,
        gradient_clip=config.gradient_clip,
        **groups,
    )
    # Placed on all devices from the start: otherwise the second step would compile again.
    state = jax.device_put(init_state(params, optimizer, config.ema_decay > 0), replicated)
    del params  # a second copy, which may not fit
    step_key = jax.device_put(step_key, replicated)
    p_train_step = jax.pmap(
        functools.partial(train_step, model=model, optimizer=optimizer, config=config),
        axis_name=AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
        donate_argnums=(0,),
    )
    p_eval_step = jax.pmap(
        functools.partial(eval_step, model=model, config=config),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, 0),
    )
    _open_workdir(workdir, config, sources.fingerprint(dataset))
    print_plan(config, plan, dataset, model, state.params, workdir)
    print(recipe.group_table(state.params, weight_decay=config.weight_decay, **groups))

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            checkpointing.manager(workdir / "checkpoints", config.keep_checkpoints)
        )
        batches = stack.enter_context(
            contextlib.closing(
                pipeline.train_batches(
                    dataset.train,
                    batch_size=config.batch_size,
                    num_workers=config.loader_workers or None,
                    **train_pictures(config),
                )
            )
        )
        restored = checkpointing.restore(checkpoints, state)
        if restored is not None:
            state, position = restored
            batches.set_state(position)
            print(f"resumed from step {int(state.step)}")
        start = int(state.step)
        if start > plan.total_steps:
            raise InputError(
                f"{workdir} holds step {start} of a run that ends at {plan.total_steps}: "
                "give another --workdir"
            )
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, start)))
        unreadable = UnreadableExamples(workdir, dataset, config.max_unreadable, start > 0)
        bar = stack.enter_context(
            tqdm(total=plan.total_steps, initial=start, unit="step", disable=None)
        )

        def run_evaluation(state: TrainState) -> dict[str, Evaluation]:
            weights = {"val": state.params}
            if state.average is not None:
                weights["val_ema"] = state.average
            examples = pipeline.eval_batches(
                dataset.val,
                batch_size=plan.eval_batch_size,
                num_workers=config.loader_workers or None,
                **eval_pictures(config),
            )
            with contextlib.closing(examples):
                evaluations = evaluate(p_eval_step, weights, examples, len(devices))
            found = evaluations["val"]
            unreadable.add("val", found.unreadable, len(found.labels))
            return evaluations

        def write_step(step: int, metrics: dict[str, jax.Array]) -> None:
            """Metrics of a step that the devices may still be at; waits for it."""
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            # Looked at every step, so that no checkpoint holds what came of it.
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                raise FloatingPointError(
                    f"the loss is {values['loss']} and its gradient's norm "
                    f"{values['gradient_norm']} at step {step}: give another --workdir with a "
                    "lower learning_rate, or with gradient_clip"
                )
            if step % config.log_every_steps and step != plan.total_steps:
                return
            values["learning_rate"] = float(schedule(step - 1))
            writer.write(step, {f"train/{name}": value for name, value in values.items()})
            bar.set_postfix(loss=f"{values['loss']:.3f}", top1=f"{values['top1']:.3f}")

        pending: tuple[int, dict[str, jax.Array]] | None = None
        last_evaluation: dict[str, Evaluation] | None = None
        tick_step, tick = start, time.perf_counter()
        for step in range(start + 1, plan.total_steps + 1):
            batch = next(batches)
            unreadable.add("train", batch["unreadable"], len(batch["id"]))
            if config.log_example_ids:
                writer.write_examples(step, batch["id"].tolist())
            parts = split(batch, len(devices), config.gradient_accumulation)
            state, metrics = p_train_step(state, parts, step_key)
            if pending is not None:
                write_step(*pending)
            pending = step, metrics

            last = step == plan.total_steps
            evaluation_due = last or step % plan.eval_every == 0
            save_due = last or step % plan.checkpoint_every == 0
            if evaluation_due or save_due:
                write_step(*pending)
                pending = None
            if evaluation_due:
                jax.block_until_ready(state.params)
                seconds = time.perf_counter() - tick
                rate = (step - tick_step) * config.batch_size / seconds
                if step > tick_step:
                    writer.write_timing(step, {"seconds": seconds, "examples_per_second": rate})
                last_evaluation = run_evaluation(state)
                values = {
                    f"{name}/{metric}": value
                    for name, evaluation in last_evaluation.items()
                    for metric, value in evaluation.metrics.items()
                }
                writer.write(step, values)
                bar.write(_evaluation_line(step, plan, values, rate))
            if save_due:
                checkpointing.save(checkpoints, state, batches.get_state())
            if evaluation_due or step == start + 1:  # the first step compiles
                jax.block_until_ready(state.params)
                tick_step, tick = step, time.perf_counter()
            bar.update()

        if last_evaluation is None:  # the run had already ended; its results are written again
            last_evaluation = run_evaluation(state)
        checkpoints.wait_until_finished()

    exported = "val_ema" if state.average is not None else "val"
    weights = state.params if state.average is None else state.average
    return write_results(
        config, workdir, model, dataset, weights, last_evaluation, exported, plan.total_steps
    )


def _open_workdir(workdir: Path, config: FrozenConfigDict, data: dict[str, str]) -> None:
    """Writes config.json and data.json; a folder with others is not touched."""
    config_path, data_path = workdir / "config.json", workdir / "data.json"
    partial = workdir / ".config.json.partial"
    settings = json.loads(config.to_json_best_effort())
    if any((workdir / "checkpoints").glob("[0-9]*")):  # otherwise there is nothing to continue
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
    workdir.mkdir(parents=True, exist_ok=True)
    # The settings in one move and last: a folder that has checkpoints has both files whole.
    data_path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, config_path)


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


def _evaluation_line(step: int, plan: Plan, values: dict[str, float], rate: float) -> str:
    parts = [f"step {step:>{len(str(plan.total_steps))}}/{plan.total_steps}"]
    parts.append(f"loss {values['val/loss']:.4f}")
    parts.append(f"top-1 {values['val/top1']:.2%}")
    if "val_ema/top1" in values:
        parts.append(f"EMA top-1 {values['val_ema/top1']:.2%}")
    parts.append(f"{rate:,.0f} examples/s")
    return "  ".join(parts)
