"""The paper's recipe in small pure functions: schedules, groups, optimizer, averaged weights, loss.

After `main.py`, `engine.py`, `optim_factory.py` and `utils.py` of facebookresearch/ConvNeXt, and,
for the layer rule "single", `optim_factory.py` of facebookresearch/ConvNeXt-V2. Not the paper's is
Muon, which the settings for small data use.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from convnext_jax.errors import InputError

PyTree = Any

# The rule "group" was made for depths 3, 3, 27, 3: the third stage's 27 blocks fill the ids 3 to
# 11, the last stage has 12, and what follows the stages 13.
LAYER_RULES = ("group", "single")
GROUP_STAGES, GROUP_DEPTH, GROUP_LAST_ID = 4, 27, 13

MUON_MOMENTUM = 0.95
# About the root mean square of Muon's step before the learning rate multiplies it, so that it goes
# by AdamW's learning rate (Liu et al., arXiv:2502.16982, who have 0.2; 0.4 did better here).
MUON_RMS = 0.4


# Schedules, by optimizer step counted from 0 -----------------------------------------------------


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, final: float = 1e-6
) -> optax.Schedule:
    """Learning rate by optimizer step: a line from 0 to `peak`, then half a cosine to `final`.

    Both ends of the warm-up count, so step 0 runs at 0 and the last warm-up step, like the first of
    the cosine, at `peak`; a warm-up of one step is a step at 0. The last step of all ends just
    above `final`, and steps after it have `final`.
    """

    def learning_rate(step: jax.Array | int) -> jax.Array:
        warmup = peak * jnp.asarray(step, float) / max(warmup_steps - 1, 1)
        remaining = jnp.asarray(total_steps - step, float) / max(total_steps - warmup_steps, 1)
        # (1 + cos x) / 2 as a squared sine of what remains: near the end of the schedule the sum
        # would keep few digits of f32, and of this all are right.
        share = jnp.square(jnp.sin(jnp.pi / 2 * jnp.clip(remaining, 0, 1)))
        return jnp.where(step < warmup_steps, warmup, final + (peak - final) * share)

    return learning_rate


def weight_decay_cosine(start: float, end: float | None, total_steps: int) -> optax.Schedule:
    """Weight decay by optimizer step: half a cosine from `start` to `end`, without warm-up.

    Constant where `end` is None. A decay that starts at 0 stays there, as in the original, which
    writes the schedule only into groups whose decay is above 0.
    """
    if end is None or start == 0:
        return optax.constant_schedule(start)
    return warmup_cosine(start, 0, total_steps, end)


# Groups of parameters ----------------------------------------------------------------------------


def decays(params: PyTree) -> PyTree:
    """True for each parameter that weight decay applies to: those of more than one dimension.

    So no bias decays, no norm, no layer scale and, of ConvNeXt V2, no response norm, whose
    parameters have four dimensions in the original and are excepted there by name.
    """
    return jax.tree.map(lambda parameter: parameter.ndim > 1, params)


def layer_ids(params: PyTree, rule: str) -> PyTree:
    """The layer that each parameter counts to, for the layer-wise decay of the learning rate.

    Norm and convolution before a stage count to its first block, but for the stem under the rule
    "group"; what follows the stages has the highest id.

    Args:
      params: of a network for classification, or of one without head; shapes will do.
      rule: "group" divides depths 3, 3, 27, 3 into twelve: the stem has 0, the first stage 1, the
        second 2, the third 3 to 11 by three blocks each, the last 12, the rest 13. With a shorter
        third stage the last one still has 12, as in the repository of V2: of ConvNeXt-T the third
        ends at 5, so that its learning rate falls short of the last one's by the seventh power of
        the decay. (The first repository lets only depths 3, 3, 27, 3 have it.) "single" counts
        blocks, from 1, and takes every depth.

    Returns:
      The tree of `params` with ints.

    Raises:
      InputError: "group" for a network without four stages, or with a third stage of more than 27
        blocks; or another rule.
    """
    depths = _depths(params)
    if rule not in LAYER_RULES:
        raise InputError(f"layer_decay_rule is {rule!r}: choose 'group' or 'single'")
    if rule == "group" and (len(depths) != GROUP_STAGES or depths[2] > GROUP_DEPTH):
        raise InputError(
            f"layer_decay_rule is 'group' for a network of depths {depths}: it takes four stages, "
            f"the third of at most {GROUP_DEPTH} blocks; give 'single', which takes all depths"
        )

    def layer_id(path: tuple[Any, ...], _: Any) -> int:
        names = [key.key for key in path]
        stage, block = _place(names)
        if stage is None:
            return GROUP_LAST_ID if rule == "group" else sum(depths) + 1
        if rule == "single":
            return sum(depths[:stage]) + (block or 0) + 1
        if stage == 0:
            return 0 if "embeddings" in names else 1
        return (1, 2, 3 + (block or 0) // 3, GROUP_LAST_ID - 1)[stage]

    return jax.tree_util.tree_map_with_path(layer_id, params)


def layer_scales(params: PyTree, layer_decay: float, rule: str) -> PyTree:
    """What multiplies each parameter's learning rate: `layer_decay` to the power of its distance.

    The distance is that of the parameter's id, as `layer_ids` gives it, from the highest, so that
    the head has 1. With a `layer_decay` of 1 everything has, whatever the rule.
    """
    if layer_decay == 1:
        return jax.tree.map(lambda _: 1.0, params)
    last = GROUP_LAST_ID if rule == "group" else sum(_depths(params)) + 1
    return jax.tree.map(lambda id_: float(layer_decay) ** (last - id_), layer_ids(params, rule))


def group_table(
    params: PyTree,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_decay_rule: str = "group",
    freeze_backbone: bool = False,
    muon: bool = False,
) -> str:
    """The groups of the optimizer as a table to print, one a line, from the stem to the head.

    Each has the name that the original prints, what multiplies its learning rate, its weight decay,
    and how many tensors and parameters it holds. The arguments are those of `optimizer`.
    """
    scales = layer_scales(params, layer_decay, layer_decay_rule)
    has_layers = layer_decay != 1
    ids = layer_ids(params, layer_decay_rule) if has_layers else jax.tree.map(lambda _: 0, params)
    columns = [
        jax.tree.leaves(trained(tree, freeze_backbone))
        for tree in (ids, decays(params), moved_by_muon(params, muon), scales, params)
    ]
    groups: dict[tuple[int, bool, bool, float], list[int]] = {}
    for id_, decay, by_muon, scale, parameter in zip(*columns, strict=True):
        groups.setdefault((id_, not decay, by_muon, scale), []).append(math.prod(parameter.shape))

    rows = [("group", "learning rate x", "weight decay", "tensors", "parameters")]
    for (id_, without, by_muon, scale), sizes in sorted(groups.items()):
        name = (f"layer_{id_}_" if has_layers else "") + ("no_decay" if without else "decay")
        name += "_muon" if by_muon else ""
        decay = 0.0 if without else weight_decay
        rows.append((name, f"{scale:.6g}", f"{decay:g}", str(len(sizes)), f"{sum(sizes):,}"))
    frozen = params["convnext"] if freeze_backbone else {}
    for name, tree in {"frozen": frozen, "all": params}.items():
        sizes = [math.prod(x.shape) for x in jax.tree.leaves(tree)]
        if sizes:
            rows.append((name, "", "", str(len(sizes)), f"{sum(sizes):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    )


def trained(tree: PyTree, freeze_backbone: bool) -> PyTree:
    """The part of a tree of parameters that training changes: all, or the classifier alone."""
    return {"classifier": tree["classifier"]} if freeze_backbone else tree


def moved_by_muon(params: PyTree, muon: bool = True) -> PyTree:
    """True for each parameter that Muon moves, if it is used: the two kernels of each MLP."""

    def is_moved(path: tuple[Any, ...], _: Any) -> bool:
        return muon and path[-1].key == "kernel" and path[-2].key in ("pwconv1", "pwconv2")

    return jax.tree_util.tree_map_with_path(is_moved, params)


def scale_head(params: PyTree, scale: float) -> PyTree:
    """The parameters with the head's kernel and bias multiplied by `scale`, for a new head.

    The original multiplies before it loads a checkpoint, so that a head which comes with the
    checkpoint keeps its values: do not call this for such a one.
    """
    head = jax.tree.map(lambda parameter: parameter * scale, params["classifier"])
    return {**params, "classifier": head}


def _depths(params: PyTree) -> tuple[int, ...]:
    """The number of blocks in each stage."""
    stages = params.get("convnext", params)["encoder"]
    return tuple(
        sum(name.startswith("layers_") for name in stages[f"stages_{i}"])
        for i in range(len(stages))
    )


def _place(names: list[str]) -> tuple[int | None, int | None]:
    """Stage and block that a parameter belongs to, from its path.

    The stem counts to stage 0, and what lies before a stage's blocks has no block; what follows the
    stages has neither.
    """
    stage, block = (0 if "embeddings" in names else None), None
    for name in names:
        if name.startswith("stages_"):
            stage = int(name.removeprefix("stages_"))
        elif name.startswith("layers_"):
            block = int(name.removeprefix("layers_"))
    return stage, block


# The optimizer -----------------------------------------------------------------------------------


def optimizer(
    params: PyTree,
    *,
    learning_rate: optax.Schedule,
    weight_decay: float | optax.Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    gradient_clip: float = 0.0,
    layer_decay: float = 1.0,
    layer_decay_rule: str = "group",
    freeze_backbone: bool = False,
    muon: bool = False,
) -> optax.GradientTransformation:
    """AdamW as `torch.optim.AdamW` has it, with the paper's groups of parameters.

    A parameter's learning rate is the schedule times its layer's scale; its decay, where it has
    one, is multiplied by that and not divided by the moments. The epsilon is added to the square
    root, after the correction for the start.

    Args:
      params: what will be trained, for its names and shapes; `jax.eval_shape`'s result will do.
      learning_rate: by optimizer step, from 0.
      weight_decay: of what `decays` names; a number, or by optimizer step.
      betas: decay of the first and of the second moment.
      eps: added to the denominator.
      gradient_clip: largest global norm of the gradients of what is trained; beyond it they are
        multiplied by gradient_clip / (norm + 1e-6), as `torch.nn.utils.clip_grad_norm_` does. 0
        does not clip.
      layer_decay: see `layer_scales`.
      layer_decay_rule: see `layer_ids`.
      freeze_backbone: only `params["classifier"]` has moments and moves; the updates of the rest
        are zeros.
      muon: the kernels of the MLPs go by Muon (Jordan et al., 2024, "Muon: an optimizer for hidden
        layers in neural networks"): by their gradients' momentum, looking one step ahead as
        Nesterov has it, made orthogonal and scaled to the root mean square `MUON_RMS`. Learning
        rate, layer scale and decay act as in AdamW.

    Returns:
      A transformation whose `update` needs the parameters. Its state is optax's
      `ScaleByAdamState`, with moments in the dtypes of the parameters; what Muon moves has no
      second moment, but a scalar 0 in its place.

    Raises:
      InputError: for a rule that does not fit the network.
    """
    scales = trained(layer_scales(params, layer_decay, layer_decay_rule), freeze_backbone)
    decay_of = weight_decay if callable(weight_decay) else optax.constant_schedule(weight_decay)
    beta1, beta2 = betas

    def init(params: PyTree) -> optax.ScaleByAdamState:
        moving = trained(params, freeze_backbone)
        mu = optax.tree.zeros_like(moving)
        nu = jax.tree.map(
            lambda m, by_muon: jnp.zeros(() if by_muon else m.shape, m.dtype),
            mu,
            moved_by_muon(moving, muon),
        )
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: PyTree, state: optax.ScaleByAdamState, params: PyTree
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        rate, decay, count = learning_rate(state.count), decay_of(state.count), state.count + 1
        moving, own = trained(params, freeze_backbone), trained(gradients, freeze_backbone)
        if gradient_clip > 0:
            shrink = jnp.minimum(1, gradient_clip / (optax.tree.norm(own) + 1e-6))
            own = jax.tree.map(lambda g: g * shrink, own)
        by_muon = moved_by_muon(moving, muon)
        correction1, correction2 = _correction(beta1, count), _correction(beta2, count)

        def follow(m: jax.Array, g: jax.Array, by_muon: bool) -> jax.Array:
            beta = MUON_MOMENTUM if by_muon else beta1
            return beta * m + (1 - beta) * g

        def follow_square(v: jax.Array, g: jax.Array, by_muon: bool) -> jax.Array:
            return v if by_muon else beta2 * v + (1 - beta2) * jnp.square(g)

        def direct(m: jax.Array, v: jax.Array, g: jax.Array, by_muon: bool) -> jax.Array:
            if by_muon:
                return follow(m, g, by_muon)
            return m / correction1 / (jnp.sqrt(v / correction2) + eps)

        def move(d: jax.Array, p: jax.Array, scale: float, decays: bool) -> jax.Array:
            if decays:
                d += decay * p
            return (-rate * scale * d).astype(p.dtype)

        mu = jax.tree.map(follow, state.mu, own, by_muon)
        nu = jax.tree.map(follow_square, state.nu, own, by_muon)
        directions = jax.tree.map(direct, mu, nu, own, by_muon)
        if muon:
            directions = _orthogonalize_some(directions, by_muon)
        updates = jax.tree.map(move, directions, moving, scales, decays(moving))
        if freeze_backbone:
            updates = {**optax.tree.zeros_like(params), **updates}
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _correction(beta: float, count: jax.Array) -> jax.Array:
    """1 - beta ** count, of which the plain form loses four digits in f32 for a beta of 0.999."""
    if beta == 0:
        return jnp.ones((), float)
    return -jnp.expm1(jnp.asarray(count, float) * math.log(beta))


def _orthogonalize_some(matrices: PyTree, which: PyTree) -> PyTree:
    """Some leaves made orthogonal and brought to the root mean square `MUON_RMS`.

    Those of one shape are stacked: a network of equal blocks then takes few products.
    """
    leaves, tree = jax.tree.flatten(matrices)
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (leaf, is_meant) in enumerate(zip(leaves, jax.tree.leaves(which), strict=True)):
        if is_meant:
            places.setdefault(leaf.shape, []).append(place)
    for shape, same in places.items():
        done = orthogonalize(jnp.stack([leaves[place] for place in same]))
        for place, matrix in zip(same, done * (MUON_RMS * math.sqrt(max(shape))), strict=True):
            leaves[place] = matrix
    return tree.unflatten(leaves)


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Matrices (..., rows, columns) with their singular values brought to between 0.68 and 1.21.

    By five steps of Newton and Schulz's iteration, with the coefficients of Jordan et al. (2024),
    which are quick rather than exact. Singular values below two thousandths of the Frobenius norm
    may stay smaller; zeros stay zeros.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if tall else matrices  # the smaller square is the cheaper one
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        square = x @ x.swapaxes(-1, -2)
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.swapaxes(-1, -2) if tall else x


# Averaged weights --------------------------------------------------------------------------------


def average_decay(decay: float, step: jax.Array | int, warmup: bool) -> jax.Array | float:
    """Decay of the moving average at a step, counted from 0.

    The paper's is constant, which leaves mostly initial weights in the average of a run of a few
    thousand steps. With the warm-up, which is not the paper's, it is at most
    (1 + step) / (10 + step).
    """
    if not warmup:
        return decay
    step = jnp.asarray(step, float)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def update_average(average: PyTree, params: PyTree, decay: jax.Array | float) -> PyTree:
    """The exponential moving average of the weights, one optimizer step on."""
    return jax.tree.map(lambda a, p: (a * decay + p * (1 - decay)).astype(a.dtype), average, params)


# Losses ------------------------------------------------------------------------------------------


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of each example against a distribution over the classes.

    Args:
      logits: (batch, classes); computed in at least f32.
      targets: (batch, classes), each row of sum 1.

    Returns:
      (batch,) of at least f32.
    """
    return optax.softmax_cross_entropy(logits.astype(_wide(logits)), targets)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
