"""200 steps of training here and 200 of a PyTorch loop written from the original's definition.

Both start from the same weights and see the same bytes; nothing is random. The loop is Hugging
Face's network, torch's AdamW with the original's groups, its tables of the learning rate and the
weight decay, which are written into the groups before each step, and its moving average, as in
`main.py`, `engine.py` and `optim_factory.py` of facebookresearch/ConvNeXt (`optim_factory.py` of
facebookresearch/ConvNeXt-V2 for the layer rule "single").

Adam turns gradients of rounding error into steps of full size, so f64 is what shows equality; one
case in f32 says how far single precision comes. The breaks at the end of the file show that the
comparison sees what goes wrong in such recipes, by the bounds that are asked of it in f32 too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, FrozenConfigDict

from convnext_jax import ConvNextConfig, ConvNextForImageClassification
from convnext_jax.checkpoints import pretrained
from convnext_jax.training import recipe
from convnext_jax.training.config import default_config
from convnext_jax.training.step import TrainState, train_step

torch = pytest.importorskip("torch", reason="the parity suite needs torch")
transformers = pytest.importorskip("transformers", reason="the parity suite needs transformers")

pytestmark = pytest.mark.filterwarnings("ignore:the start has another head")

STEPS = 200
BATCH, SIZE, CLASSES, CHECKPOINT_CLASSES = 8, 16, 5, 7
WIDTHS = (8, 12, 16, 20)
# Largest error of a loss relative to itself, and of anything else to its tensor's largest value.
ASKED = {"loss": 1e-5, "state": 1e-4}
NO_AUGMENTATION = {
    "flip": 0.0, "augment": "", "color_jitter": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0,
    "shift": 0,
}  # fmt: skip
THEIRS = {
    "convnext": transformers.ConvNextForImageClassification,
    "convnextv2": transformers.ConvNextV2ForImageClassification,
}
# In f64 what is left is rounding, amplified over 200 steps.
BOUNDS = {"float64": {"loss": 1e-9, "state": 1e-9}, "float32": ASKED}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the settings of a run that differ from the paper's.

    Attributes:
      settings: fields of `convnext_jax.training.config`, as pairs.
      warmup_steps: of the 200.
      depths: of the network.
      model_type: of the network.
      from_checkpoint: start from a network with other classes, whose head is replaced.
      dtype: of both sides.
    """

    settings: tuple[tuple[str, Any], ...]
    warmup_steps: int = 0
    depths: tuple[int, ...] = (1, 2)
    model_type: str = "convnext"
    from_checkpoint: bool = False
    dtype: str = "float64"

    @property
    def config(self) -> FrozenConfigDict:
        config = ConfigDict(default_config())
        settings = NO_AUGMENTATION | {"batch_size": BATCH} | dict(self.settings)
        with config.unlocked():
            config.update(settings)
        assert set(settings) <= set(default_config())
        return FrozenConfigDict(config)

    @property
    def network(self) -> ConvNextConfig:
        return ConvNextConfig(
            model_type=self.model_type, num_stages=len(self.depths), depths=self.depths,
            hidden_sizes=WIDTHS[: len(self.depths)], patch_size=2, image_size=SIZE,
            num_labels=CLASSES, layer_scale_init_value=1e-6,
        )  # fmt: skip


def pre_training(**settings) -> Case:
    """From scratch: a warm-up to the paper's peak, an average that moves visibly in 200 steps."""
    own = {name: settings.pop(name) for name in ("dtype", "model_type") if name in settings}
    settings = {"learning_rate": 4e-3, "weight_decay": 0.05, "ema_decay": 0.99} | settings
    return Case(tuple(settings.items()), warmup_steps=20, **own)


def fine_tuning(**settings) -> Case:
    """From a checkpoint of other classes, without warm-up.

    The rule "group" has a third stage of three groups to divide.
    """
    settings = {
        "learning_rate": 2e-3, "layer_decay": 0.7, "head_init_scale": 0.001, "ema_decay": 0.99,
    } | settings  # fmt: skip
    depths = (2, 3) if settings.get("layer_decay_rule") == "single" else (1, 1, 7, 1)
    return Case(tuple(settings.items()), depths=depths, from_checkpoint=True)


CASES = {
    "pre-training": pre_training(),
    "pre-training, two parts": pre_training(gradient_accumulation=2, ema_decay=0.9999),
    "pre-training, decay schedule": pre_training(weight_decay_end=0.2),
    "pre-training, decay schedule, two parts": pre_training(
        weight_decay_end=0.2, gradient_accumulation=2
    ),
    "pre-training, clipped, two parts": pre_training(gradient_clip=0.5, gradient_accumulation=2),
    "pre-training, V2": pre_training(model_type="convnextv2"),
    "fine-tuning, group": fine_tuning(weight_decay=0.05),
    "fine-tuning, group, two parts": fine_tuning(weight_decay=0.05, gradient_accumulation=2),
    "fine-tuning, group, decay of 1e-8": fine_tuning(weight_decay=1e-8, layer_decay=0.8),
    "fine-tuning, single": fine_tuning(
        weight_decay=0.05, layer_decay_rule="single", layer_decay=0.8
    ),
    "fine-tuning, single, decay of 1e-8, two parts": fine_tuning(
        weight_decay=1e-8, layer_decay_rule="single", gradient_accumulation=2
    ),
    "f32: pre-training": pre_training(dtype="float32"),
}


# What a run gives, in numpy by name: `loss`, (steps,); and for each parameter, by its name in the
# state dict of Hugging Face, `weight of`, `average of`, and, (steps,), `learning rate of` and
# `learning rate times weight decay of`.
Trajectory = dict[str, np.ndarray]


def batches():
    """200 batches of 8 from 64 pictures whose classes can be told apart: uint8, and int32."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, CLASSES, 64).astype(np.int32)
    patterns = rng.integers(0, 256, (CLASSES, SIZE, SIZE, 3))
    images = 0.3 * patterns[labels] + 0.7 * rng.integers(0, 256, (64, SIZE, SIZE, 3))
    for _ in range(STEPS):
        chosen = rng.choice(64, BATCH, replace=False)
        yield {"image": images[chosen].astype(np.uint8), "label": labels[chosen]}


# Here --------------------------------------------------------------------------------------------


def run_ours(case: Case) -> Trajectory:
    """200 calls of the step that training makes, from Hugging Face's state dict."""
    with jax.enable_x64(case.dtype == "float64"):
        config, dtype = case.config, jnp.dtype(case.dtype)
        model = ConvNextForImageClassification(
            case.network, dtype=dtype, param_dtype=dtype, data_format="channels_last",
            implementation="plain",
        )  # fmt: skip
        params = pretrained.load_state_dict(
            model, start_of(case), "the start", dtype, ignore_mismatched_sizes=case.from_checkpoint
        )["params"]
        if case.from_checkpoint:
            head = dict(zip(("kernel", "bias"), new_head(case).values(), strict=True))
            head = {"kernel": jnp.asarray(head["kernel"].T), "bias": jnp.asarray(head["bias"])}
            params = recipe.scale_head({**params, "classifier": head}, config.head_init_scale)
        optimizer = recipe.optimizer(
            params,
            learning_rate=recipe.warmup_cosine(
                config.learning_rate, case.warmup_steps, STEPS, config.min_learning_rate
            ),
            weight_decay=recipe.weight_decay_cosine(
                config.weight_decay, config.weight_decay_end, STEPS
            ),
            betas=tuple(config.adam_betas),
            eps=config.adam_eps,
            gradient_clip=config.gradient_clip,
            layer_decay=config.layer_decay,
            layer_decay_rule=config.layer_decay_rule,
        )
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            average=jax.tree.map(jnp.copy, params),
            skipped=jnp.zeros((), jnp.int32),
        )
        step = jax.jit(
            functools.partial(train_step, model=model, optimizer=optimizer, config=config),
        )
        losses = []
        for batch in batches():
            state, metrics = step(state, batch, jax.random.key(0))
            losses.append(metrics["loss"])
        result = {"loss": np.array(losses)} | applied(optimizer, params, case)
        for what, tree in {"weight": state.params, "average": state.average}.items():
            named = pretrained.state_dict({"params": tree}, case.model_type)
            result |= {f"{what} of {name}": value for name, value in named.items()}
            assert {value.dtype for value in named.values()} == {dtype}
        return result


def applied(optimizer: optax.GradientTransformation, params: Any, case: Case) -> Trajectory:
    """Learning rate and weight decay of each parameter at each step, from what the optimizer does.

    With moments that make Adam's direction 1, a parameter at 0 moves by its learning rate, and
    another by its decay times that in addition: one large enough to show it.
    """
    small = jax.tree.map(lambda p: jnp.ones((1,) * p.ndim, p.dtype), params)
    if not isinstance(optimizer.init(small), optax.ScaleByAdamState):
        return {}  # one of those that are broken on purpose
    steps = np.arange(STEPS)
    filled = [(1 - beta ** (steps + 1)) / beta for beta in case.config.adam_betas]

    def moved(count: jax.Array, mu: jax.Array, nu: jax.Array, value: float) -> Any:
        state = optax.ScaleByAdamState(
            count, optax.tree.scale(mu, small), optax.tree.scale(nu, small)
        )
        gradients = optax.tree.zeros_like(small)
        return optimizer.update(gradients, state, optax.tree.scale(value, small))[0]

    large = 1 / case.config.weight_decay
    at_0, at_large = (
        flatten_dict(jax.vmap(moved, (0, 0, 0, None))(steps, *filled, value))
        for value in (0.0, large)
    )
    result = {}
    for path in at_0:
        name = pretrained.key_of(path, case.model_type)
        at_0_, at_large_ = (np.asarray(at[path]).reshape(STEPS) for at in (at_0, at_large))
        result[f"learning rate of {name}"] = -at_0_ * (1 + case.config.adam_eps)
        result[f"learning rate times weight decay of {name}"] = (at_0_ - at_large_) / large
    return result


# There -------------------------------------------------------------------------------------------


def new_head(case: Case) -> dict[str, np.ndarray]:
    """A new head's weights, before they are scaled; its bias is not 0, so that scaling shows."""
    rng = np.random.default_rng(6)
    return {
        "classifier.weight": rng.normal(size=(CLASSES, case.network.hidden_sizes[-1])),
        "classifier.bias": rng.normal(size=CLASSES),
    }


@functools.cache
def start_of(case: Case) -> dict[str, np.ndarray]:
    """Hugging Face's initial weights, all of them made visible but for the layer scale's 1e-6.

    For fine-tuning these are a checkpoint's, and the new head's beside them.
    """
    torch.manual_seed(3)
    network = case.network
    if case.from_checkpoint:
        network = network.replace(num_labels=CHECKPOINT_CLASSES)
    model = their_model(case, network)
    rng = np.random.default_rng(4)
    start = {}
    for name, value in model.state_dict().items():
        noise = rng.normal(size=value.shape)
        start[name] = value.numpy().astype(np.float64)
        if case.from_checkpoint:  # every norm, bias and layer scale has been trained
            start[name] += noise * (0.1 if value.ndim == 1 else 0.05)
    return start


def their_model(case: Case, network: ConvNextConfig):
    fields = {k: v for k, v in network.to_dict().items() if k not in ("id2label", "label2id")}
    config = transformers.AutoConfig.for_model(**fields, num_labels=network.num_labels)
    return THEIRS[case.model_type](config).to(getattr(torch, case.dtype)).train()


def original_name(name: str) -> str:
    """What the original calls a parameter of Hugging Face's."""
    name = name.removeprefix("convnext.").removeprefix("convnextv2.")
    for theirs, original in {
        r"^embeddings\.patch_embeddings": "downsample_layers.0.0",
        r"^embeddings\.layernorm": "downsample_layers.0.1",
        r"^encoder\.stages\.(\d+)\.downsampling_layer": r"downsample_layers.\1",
        r"^encoder\.stages\.(\d+)\.layers\.(\d+)": r"stages.\1.\2",
        r"^layernorm": "norm",
        r"^classifier": "head",
        r"\.layernorm\.": ".norm.",
        r"layer_scale_parameter$": "gamma",
        r"grn\.weight$": "grn.gamma",
        r"grn\.bias$": "grn.beta",
    }.items():
        name = re.sub(theirs, original, name)
    return name


def original_layer(name: str, depths: tuple[int, ...], rule: str) -> tuple[int, int]:
    """The id of a parameter by the original's name of it, and the highest id."""
    part, *numbers = name.split(".")
    if part == "downsample_layers":
        stage, block = int(numbers[0]), None
    elif part == "stages":
        stage, block = int(numbers[0]), int(numbers[1])
    elif rule == "group":
        return 13, 13
    else:
        return sum(depths) + 1, sum(depths) + 1
    if rule == "single":
        return sum(depths[:stage]) + (0 if block is None else block) + 1, sum(depths) + 1
    if block is None:
        return {0: 0, 1: 2, 2: 3, 3: 12}[stage], 13
    return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage], 13


def schedule_table(start: float, end: float, warmup: int) -> np.ndarray:
    """The original's table over the 200 steps."""
    rest = STEPS - warmup
    cosine = [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    return np.concatenate([np.linspace(0, start, warmup), cosine])


@functools.cache
def run_theirs(case: Case) -> Trajectory:
    """The loop in PyTorch."""
    config, dtype = case.config, getattr(torch, case.dtype)
    model = their_model(case, case.network)
    start = start_of(case)
    if case.from_checkpoint:
        start = start | new_head(case)
        for name in ("classifier.weight", "classifier.bias"):
            start[name] = start[name] * config.head_init_scale
    model.load_state_dict({k: torch.from_numpy(v).to(dtype) for k, v in start.items()})

    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        own = original_name(name)
        spared = parameter.ndim == 1 or own.endswith((".bias", ".gamma", ".beta"))
        group, scale = "no_decay" if spared else "decay", 1.0
        if config.layer_decay != 1:
            layer, last = original_layer(own, case.depths, config.layer_decay_rule)
            group, scale = f"layer_{layer}_{group}", config.layer_decay ** (last - layer)
        made = groups.setdefault(group, {
            "weight_decay": 0.0 if spared else config.weight_decay, "lr_scale": scale,
            "params": [], "names": [],
        })  # fmt: skip
        made["params"].append(parameter)
        made["names"].append(name)
    optimizer = torch.optim.AdamW(
        [{k: v for k, v in group.items() if k != "names"} for group in groups.values()],
        lr=config.learning_rate, betas=tuple(config.adam_betas), eps=config.adam_eps,
        weight_decay=0.0,
    )  # fmt: skip
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    rates = schedule_table(config.learning_rate, config.min_learning_rate, case.warmup_steps)
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    weight_decays = schedule_table(config.weight_decay, end, 0)
    average = copy.deepcopy(model.state_dict())
    mean, std = (torch.tensor(tuple(x), dtype=torch.float64) for x in (config.mean, config.std))

    written: dict[str, list[float]] = {}
    losses, parts = [], config.gradient_accumulation
    for step, batch in enumerate(batches()):
        for group, names in zip(optimizer.param_groups, groups.values(), strict=True):
            group["lr"] = rates[step] * group["lr_scale"]
            if group["weight_decay"] > 0:
                group["weight_decay"] = weight_decays[step]
            for name in names["names"]:
                product = group["lr"] * group["weight_decay"]
                written.setdefault(f"learning rate of {name}", []).append(group["lr"])
                written.setdefault(f"learning rate times weight decay of {name}", []).append(
                    product
                )
        pixels = (torch.from_numpy(batch["image"]).to(torch.float64) / 255 - mean) / std
        pixels = pixels.to(dtype).permute(0, 3, 1, 2)
        labels = torch.from_numpy(batch["label"]).long()
        optimizer.zero_grad()
        loss_of_parts = []
        for x, y in zip(pixels.chunk(parts), labels.chunk(parts), strict=True):
            loss = criterion(model(x).logits, y)
            (loss / parts).backward()
            loss_of_parts.append(loss.item())
        if config.gradient_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name] = config.ema_decay * average[name] + (1 - config.ema_decay) * value
        losses.append(np.mean(loss_of_parts))
    result = {"loss": np.array(losses)} | {k: np.array(v) for k, v in written.items()}
    result |= {f"weight of {k}": v.numpy() for k, v in model.state_dict().items()}
    return result | {f"average of {k}": v.numpy() for k, v in average.items()}


# The comparison ----------------------------------------------------------------------------------


def errors(ours: Trajectory, theirs: Trajectory) -> dict[str, float]:
    """Of each loss relative to itself, the worst; of the rest to the largest value of each."""
    found = {}
    for name, value in ours.items():
        expected = theirs[name].reshape(value.shape).astype(np.float64)
        scale = np.abs(expected) if name == "loss" else np.abs(expected).max()
        difference = np.abs(value.astype(np.float64) - expected)
        found[name] = float((difference / np.where(scale > 0, scale, 1)).max())
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """For networks of this size a second one costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_trajectory(name, record_worst):
    case = CASES[name]
    theirs, ours = run_theirs(case), run_ours(case)
    assert ours.keys() == theirs.keys()
    assert theirs["loss"][-10:].mean() < 0.9 * theirs["loss"][:10].mean()  # it learns
    found = errors(ours, theirs)
    for kind in ("loss", "weight", "average", "learning"):
        record_worst(f"{kind}, {name}", {k: v for k, v in found.items() if k.startswith(kind)})
    bounds = {k: BOUNDS[case.dtype]["loss" if k == "loss" else "state"] for k in found}
    assert {k: v for k, v in found.items() if not v <= bounds[k]} == {}


# Breaks ------------------------------------------------------------------------------------------


def biases_decay(patch):
    patch.setattr(recipe, "decays", lambda params: jax.tree.map(lambda _: True, params))


def a_group_is_shifted_by_one(patch):
    right = recipe.layer_ids

    def shifted(params, rule):
        return jax.tree.map(lambda id_: 5 if id_ == 4 else id_, right(params, rule))

    patch.setattr(recipe, "layer_ids", shifted)


def the_average_moves_per_part(patch):
    right = recipe.update_average

    def twice(average, params, decay):
        return right(right(average, params, decay), params, decay)

    patch.setattr(recipe, "update_average", twice)


def parts_are_summed(patch):
    right = recipe.optimizer

    def summed(*args, **settings):
        optimizer = right(*args, **settings)
        return optimizer._replace(
            update=lambda gradients, *rest: optimizer.update(
                jax.tree.map(lambda g: 2 * g, gradients), *rest
            )
        )

    patch.setattr(recipe, "optimizer", summed)


def nothing_is_clipped(patch):
    right = recipe.optimizer
    patch.setattr(recipe, "optimizer", lambda *a, **kw: right(*a, **{**kw, "gradient_clip": 0}))


def the_schedule_is_a_step_ahead(patch):
    right = recipe.warmup_cosine

    def ahead(*args):
        schedule = right(*args)
        return lambda step: schedule(step + 1)

    patch.setattr(recipe, "warmup_cosine", ahead)


def the_warmup_has_one_step_more(patch):
    right = recipe.warmup_cosine

    def longer(peak, warmup, *rest):
        schedule = right(peak, warmup, *rest)
        return lambda step: jnp.where(step < warmup, peak * step / warmup, schedule(step))

    patch.setattr(recipe, "warmup_cosine", longer)


def the_weight_decay_is_constant(patch):
    patch.setattr(recipe, "weight_decay_cosine", lambda start, *_: lambda step: start)


def the_heads_bias_is_not_scaled(patch):
    right = recipe.scale_head

    def kernel_alone(params, scale):
        head = {**right(params, scale)["classifier"], "bias": params["classifier"]["bias"]}
        return {**params, "classifier": head}

    patch.setattr(recipe, "scale_head", kernel_alone)


def _from_parts_of_optax(patch, adam=None, scale_the_decay=True, decay_in_gradient=False):
    """The optimizer put together from optax's, with one thing wrong."""

    def put_together(params, *, learning_rate, weight_decay, layer_decay, layer_decay_rule, **_):
        scales = recipe.layer_scales(params, layer_decay, layer_decay_rule)
        scaled = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))
        decayed = optax.add_decayed_weights(weight_decay(0), mask=recipe.decays)
        parts = [adam or optax.scale_by_adam(), decayed, scaled]
        if not scale_the_decay:
            parts = [parts[0], scaled, decayed]
        if decay_in_gradient:
            parts = [decayed, parts[0], scaled]
        return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))

    patch.setattr(recipe, "optimizer", put_together)


def the_decay_is_not_scaled_by_layer(patch):
    _from_parts_of_optax(patch, scale_the_decay=False)


def epsilon_is_inside_the_root(patch):
    _from_parts_of_optax(patch, optax.scale_by_adam(eps=0, eps_root=1e-8))


def the_decay_goes_through_the_moments(patch):
    _from_parts_of_optax(patch, decay_in_gradient=True)


# In which case, and in what of it.
BREAKS = {
    biases_decay: ("pre-training", "weight"),
    a_group_is_shifted_by_one: ("fine-tuning, group", "weight"),
    the_average_moves_per_part: ("pre-training, two parts", "average"),
    parts_are_summed: ("pre-training, clipped, two parts", "weight"),
    nothing_is_clipped: ("pre-training, clipped, two parts", "weight"),
    the_schedule_is_a_step_ahead: ("pre-training", "weight"),
    the_warmup_has_one_step_more: ("pre-training", "weight"),
    the_weight_decay_is_constant: ("pre-training, decay schedule", "weight"),
    the_heads_bias_is_not_scaled: ("fine-tuning, single", "weight"),
    the_decay_is_not_scaled_by_layer: ("fine-tuning, single", "weight"),
    epsilon_is_inside_the_root: ("pre-training", "weight"),
    the_decay_goes_through_the_moments: ("pre-training", "weight"),
}


def test_the_optimizer_put_together_from_parts_is_right(monkeypatch):
    """So that the breaks made of it have one thing wrong each."""
    _from_parts_of_optax(monkeypatch)
    case = CASES["fine-tuning, single"]
    found = errors(run_ours(case), run_theirs(case))
    assert max(found.values()) < BOUNDS["float64"]["state"]


@pytest.mark.parametrize("break_", BREAKS, ids=lambda break_: break_.__name__)
def test_a_break_is_seen(break_, monkeypatch, record_worst):
    name, kind = BREAKS[break_]
    theirs = run_theirs(CASES[name])
    break_(monkeypatch)
    found = errors(run_ours(CASES[name]), theirs)
    for seen in ("loss", "weight", "average"):
        record_worst(
            f"{break_.__name__}, {seen}", {k: v for k, v in found.items() if k.startswith(seen)}
        )
    assert max(v for k, v in found.items() if k.startswith(kind)) > ASKED["state"]
