"""What a run amounts to, before it starts: its epochs in steps, its batches, its arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from convnext_jax.configuration import ConvNextConfig, multiply_adds
from convnext_jax.data.sources import Dataset
from convnext_jax.errors import InputError
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import recipe
from convnext_jax.training.config import optimizer_groups, peak_learning_rate
from convnext_jax.training.step import mix_group

PyTree = Any


class Plan:
    """Epochs in steps: what follows from the settings and the number of examples.

    Args:
      config: the settings of the run.
      examples: to train on.
      devices: of the run; default all at hand.

    Raises:
      InputError: for a batch that the devices cannot share evenly, or more warm-up than epochs.
    """

    def __init__(self, config: FrozenConfigDict, examples: int, devices: int | None = None):
        devices = devices or jax.device_count()
        self.eval_batch_size = config.eval_batch_size or config.batch_size
        parts = devices * config.gradient_accumulation
        for name, size, unit, meaning in (
            ("batch_size", config.batch_size, parts, "devices times gradient_accumulation"),
            ("eval_batch_size", self.eval_batch_size, devices, "devices"),
        ):
            if size < 1 or size % unit:
                raise InputError(f"{name} is {size}: give a multiple of {unit}, the {meaning}")
        if config.batch_size > examples:
            raise InputError(
                f"batch_size is {config.batch_size} and there are {examples} training examples: "
                "give a smaller batch_size"
            )
        self.mix_group = mix_group(config, config.batch_size // devices)
        if config.batch_size // parts % self.mix_group:
            raise InputError(
                f"mix_group is {config.mix_group} and a device computes "
                f"{config.batch_size // parts} examples at a time: give a divisor of that"
            )
        self.steps_per_epoch = examples // config.batch_size
        self.total_steps = self._steps(config.epochs)
        self.warmup_steps = int(config.warmup_epochs * self.steps_per_epoch)
        self.eval_every = self._steps(config.eval_every_epochs)
        self.checkpoint_every = self._steps(config.checkpoint_every_epochs)
        if self.warmup_steps >= self.total_steps:
            raise InputError(
                f"warmup_epochs is {config.warmup_epochs} of {config.epochs} epochs in all: "
                "give fewer"
            )

    def evaluates_after(self, step: int) -> bool:
        """Whether the run is evaluated after this many steps."""
        return step > 0 and (step == self.total_steps or step % self.eval_every == 0)

    def _steps(self, epochs: float) -> int:
        return max(1, int(epochs * self.steps_per_epoch))


def run_optimizer(
    config: FrozenConfigDict, plan: Plan, params: PyTree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run, for parameters of these names and shapes, and its learning rate."""
    schedule = recipe.warmup_cosine(
        peak_learning_rate(config), plan.warmup_steps, plan.total_steps, config.min_learning_rate
    )
    optimizer = recipe.optimizer(
        params,
        learning_rate=schedule,
        weight_decay=recipe.weight_decay_cosine(
            config.weight_decay, config.weight_decay_end, plan.total_steps
        ),
        betas=tuple(config.adam_betas),
        eps=config.adam_eps,
        gradient_clip=config.gradient_clip,
        **optimizer_groups(config),
    )
    return optimizer, schedule


def step_flops(config: FrozenConfigDict, network: ConvNextConfig) -> int:
    """Floating-point operations of a step, those of the products alone."""
    # A multiply-add is two operations; the backward pass costs twice the forward one, and with
    # remat the forward one is made twice.
    passes = 1 if config.freeze_backbone else 4 if config.remat else 3
    return 2 * passes * multiply_adds(network, config.image_size) * config.batch_size


def print_plan(
    config: FrozenConfigDict,
    plan: Plan,
    dataset: Dataset,
    model: ConvNextForImageClassification,
    params: PyTree,
    workdir: Path,
) -> None:
    """Prints what `plan` says of the run, with the network's size and the cost of a step."""
    parameters = sum(x.size for x in jax.tree.leaves(params))
    devices = jax.device_count()
    per_picture = multiply_adds(model.config, config.image_size)
    flops = step_flops(config, model.config)
    layout = f"{devices} device(s) x {config.batch_size // devices}"
    if config.gradient_accumulation > 1:
        layout += f" in {config.gradient_accumulation} parts"
    rows = {
        "run": workdir,
        "data": f"{config.data.name}: {len(dataset.train):,} to train on, {len(dataset.val):,} to "
        f"evaluate, {len(dataset.class_names)} classes",
        "network": f"{parameters:,} parameters, {config.image_size} px, {config.dtype}",
        "arithmetic": f"{per_picture / 1e9:.3g} G multiply-adds a picture, "
        f"{flops / 1e12:.3g} TFLOP a step",
        "devices": f"{devices} x {jax.local_devices()[0].device_kind}, {config.parallelism}"
        + (f", of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "batch": f"{config.batch_size:,} in effect: {layout}",
        "steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch), of which warm-up "
        f"{plan.warmup_steps:,}",
        "rate": f"{peak_learning_rate(config):g} at its peak",
        "examples": f"{plan.total_steps * config.batch_size:,} seen in {config.epochs:g} epochs",
        "EMA": _ema_horizon(config, plan),
    }
    print("\n".join(f"{name:>12}  {value}" for name, value in rows.items()), flush=True)


def _ema_horizon(config: FrozenConfigDict, plan: Plan) -> str:
    """How far the average looks back, and what of the initial weights is in it at the end."""
    if config.ema_decay == 0:
        return "off"
    decays = recipe.average_decay(config.ema_decay, jnp.arange(plan.total_steps), config.ema_warmup)
    left = np.prod(np.broadcast_to(np.asarray(decays, np.float64), plan.total_steps))
    horizon = f"horizon {1 / (1 - config.ema_decay):,.0f} steps"
    if left < 1e-3:
        return horizon
    return f"{horizon}; {left:.1%} of the initial weights are left in it at the end: see ema_warmup"
