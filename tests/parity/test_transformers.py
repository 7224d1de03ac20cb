"""Equality with Hugging Face transformers, on random weights under which every branch is visible.

Kernels are scaled by fan-in and the layer scale is drawn around 1. With the usual 0.02 and 1e-6 the
blocks hardly act, and a wrong activation or epsilon hides. The mutations at the end of the file
show that these comparisons see such errors.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import ConvNextBackbone, ConvNextConfig, ConvNextForImageClassification, modeling
from convnext_jax.checkpoints import pretrained
from convnext_jax.configuration import drop_path_rates
from convnext_jax.ops import ACTIVATIONS

torch = pytest.importorskip("torch", reason="the parity suite needs torch")
transformers = pytest.importorskip("transformers", reason="the parity suite needs transformers")

# Largest difference relative to the largest value of each tensor.
BOUNDS = {"f64": 1e-9, "f32": 1e-4}
DTYPES = {"f64": np.float64, "f32": np.float32}
OURS = {"classifier": ConvNextForImageClassification, "backbone": ConvNextBackbone}
THEIRS = {
    ("convnext", "classifier"): transformers.ConvNextForImageClassification,
    ("convnext", "backbone"): transformers.ConvNextBackbone,
    ("convnextv2", "classifier"): transformers.ConvNextV2ForImageClassification,
    ("convnextv2", "backbone"): transformers.ConvNextV2Backbone,
    ("dinov3_convnext", "backbone"): transformers.DINOv3ConvNextBackbone,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch of pictures, (batch, channels, height, width)."""

    config: ConvNextConfig
    pictures: tuple[int, int, int, int]
    kind: str = "classifier"
    train: bool = False
    # What XLA compiles soonest: tests/ops holds the implementations of an operation equal.
    implementation: str | None = "plain"


def small(pictures=(2, 3, 37, 44), kind="classifier", **changes) -> Case:
    """Three stages at 1/4, 1/8 and 1/16 of a picture that none of them divides."""
    fields = {
        "num_stages": 3,
        "depths": (1, 2, 1),
        "hidden_sizes": (8, 16, 24),
        "num_labels": 5,
        "layer_scale_init_value": 1.0,
    }
    if "id2label" in changes:
        del fields["num_labels"]
    return Case(ConvNextConfig(**{**fields, **changes}), pictures, kind)


CASES = {
    "tiny": Case(
        ConvNextConfig.preset("tiny", num_labels=1000), (2, 3, 64, 64), implementation=None
    ),
    "one stage": small(num_stages=1, depths=(2,), hidden_sizes=(12,)),
    "two stages": small(num_stages=2, depths=(1, 3), hidden_sizes=(12, 20)),
    "three stages": dataclasses.replace(small(), implementation=None),
    "five stages": small(
        (1, 3, 40, 70), num_stages=5, depths=(1, 1, 2, 1, 1), hidden_sizes=(4, 6, 8, 10, 12),
        patch_size=2,
    ),
    "equal widths": small(hidden_sizes=(12, 12, 12), num_labels=12),
    "patch 1": small((2, 3, 13, 10), patch_size=1),
    "patch 2": small((2, 3, 21, 30), patch_size=2),
    "patch 3": small(patch_size=3),
    "patch 7": small((2, 3, 60, 45), patch_size=7),
    "patch 4x2": small(patch_size=(4, 2)),
    "one channel": small((2, 1, 28, 28), num_channels=1),
    "four channels": small((2, 4, 33, 50), num_channels=4),
    "no layer scale": small(layer_scale_init_value=0.0),
    "large final epsilon": small(layer_norm_eps=1e-2),
    "regression": small(num_labels=1),
    "regression of many": small(problem_type="regression"),
    "multi-label": small(problem_type="multi_label_classification"),
    "no head": small(num_labels=0),
    "backbone, last stage": small(kind="backbone"),
    "backbone, by name": small(kind="backbone", out_features=["stem", "stage1", "stage3"]),
    "backbone, by index": small((1, 4, 50, 33), "backbone", out_indices=(1, -1), num_channels=4),
    "V2": small(model_type="convnextv2"),
    "V2, patch 2": small((2, 3, 21, 30), patch_size=2, model_type="convnextv2"),
    "V2, backbone": small(
        kind="backbone", model_type="convnextv2", out_features=["stage1", "stage3"]
    ),
    "DINOv3": small(
        kind="backbone", model_type="dinov3_convnext", out_indices=(0, 1, 2, 3), layer_norm_eps=1e-3
    ),
}  # fmt: skip

# Five blocks, so that the rates 0, 1/8, .. 1/2 are the same numbers in f32 and in f64:
# transformers computes them in f32.
TRAINING = dataclasses.replace(
    small((8, 3, 29, 24), depths=(1, 3, 1), drop_path_rate=0.5), train=True
)

FILES = {
    "classifier": small(id2label={i: f"class {i}" for i in range(5)}, drop_path_rate=0.25),
    "backbone": small(
        kind="backbone",
        out_features=["stage1", "stage3"],
        patch_size=2,
        hidden_act="relu",
        problem_type="multi_label_classification",
        image_size=64,
    ),
}


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    """The dtype of both sides."""
    with jax.enable_x64(request.param == "f64"):
        yield request.param


@pytest.fixture
def same_draws(monkeypatch):
    """Lets both sides drop the same paths: one row of uniform numbers a block."""
    depths = TRAINING.config.depths[1:]  # the first stage's rate is 0: it draws nothing
    draws = np.random.default_rng(3).uniform(size=(sum(depths), TRAINING.pictures[0]))
    # Here, a stage's blocks draw together.
    ours = itertools.cycle(np.split(draws.T, np.cumsum(depths)[:-1], axis=1))
    theirs = itertools.cycle(draws)
    monkeypatch.setattr(
        jax.random, "bernoulli", lambda key, keep, shape: jnp.floor(keep + next(ours)) == 1
    )
    monkeypatch.setattr(
        torch, "rand", lambda shape, **to: torch.from_numpy(next(theirs)).reshape(shape).to(**to)
    )


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_equal(name, precision, record_worst):
    errors = compare(CASES[name], precision)
    record_worst(precision, errors)
    assert too_large(errors, precision) == {}


@pytest.mark.parametrize("hidden_act", sorted(set(ACTIVATIONS) - {"selu"}))
def test_activations_are_equal(hidden_act, precision, record_worst):
    case = small(num_stages=1, depths=(2,), hidden_sizes=(8,), hidden_act=hidden_act)
    errors = compare(case, precision)
    record_worst(precision, errors)
    assert too_large(errors, precision) == {}


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_drop_path_rates_are_equal(rate):
    errors = rate_errors(ConvNextConfig.preset("tiny", drop_path_rate=rate))
    assert max(errors) < 1e-7  # f32 over there


def test_training_with_drop_path_is_equal(precision, same_draws, record_worst):
    errors = compare(TRAINING, precision)
    record_worst(f"{precision}, training with drop path", errors)
    assert too_large(errors, precision) == {}


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", OURS)
def test_a_folder_written_by_transformers_loads_here(kind, tmp_path):
    case = FILES[kind]
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    model, variables = OURS[kind].from_pretrained(tmp_path)
    expected = case.config.to_dict()
    assert {k: v for k, v in model.config.to_dict().items() if k in expected} == expected
    assert too_large(output_errors(model, variables, theirs, case), "f32") == {}


@pytest.mark.parametrize("kind", OURS)
def test_a_folder_written_here_loads_in_transformers(kind, tmp_path):
    case = FILES[kind]
    model, state = OURS[kind](case.config), random_state(their_model(case))
    variables = pretrained.load_state_dict(model, state, "random weights", jnp.float32)
    model.save_pretrained(tmp_path, variables)
    theirs, report = THEIRS["convnext", kind].from_pretrained(tmp_path, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    assert not any(report.values()), report
    assert too_large(output_errors(model, variables, theirs, case), "f32") == {}


@pytest.mark.parametrize("kind", OURS)
def test_configurations_pass_both_ways(kind, tmp_path):
    config = FILES[kind].config
    config.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(theirs) is transformers.ConvNextConfig
    theirs.save_pretrained(tmp_path / "theirs")
    again = ConvNextConfig.from_pretrained(tmp_path / "theirs")
    assert again == config.replace(transformers_version=again.transformers_version)


def output_errors(model, variables, theirs, case: Case) -> dict[str, float]:
    pictures = random_pictures(case).astype(np.float32)
    with torch.no_grad():
        expected = flat(theirs(torch.from_numpy(pictures)))
    return relative_errors(flat(model.apply(variables, pictures)), expected)


# -------------------------------------------------------------------------------------- mutations


def tanh_gelu(patch):
    patch.setitem(ACTIVATIONS, "gelu", ACTIVATIONS["gelu_new"])


def epsilon_of_the_blocks(patch):
    _change_epsilon(patch, 1e-6, 1e-12)


def epsilon_of_the_final_norm(patch):
    _change_epsilon(patch, 1e-12, 1e-6)


def depthwise_rows_and_columns_swapped(patch):
    _change_layout(patch, "dwconv", (3, 2, 1, 0))


def patch_rows_and_columns_swapped(patch):
    _change_layout(patch, "patch_embeddings", (3, 2, 1, 0))


def downsampling_channels_swapped(patch):
    _change_layout(patch, "downsampling_layer_1", (2, 3, 0, 1))


def classifier_not_transposed(patch):
    _change_layout(patch, "classifier", (0, 1))


def depthwise_kernels_turned(patch):
    right = modeling.ops.depthwise_conv
    patch.setattr(
        modeling.ops,
        "depthwise_conv",
        lambda x, k, *bias, **options: right(x, k[::-1, ::-1], *bias, **options),
    )


def _change_epsilon(patch, old, new):
    right = modeling.LayerNorm

    def changed(*, epsilon, **options):
        return right(epsilon=new if epsilon == old else epsilon, **options)

    patch.setattr(modeling, "LayerNorm", changed)


def _change_layout(patch, module, axes):
    right = pretrained.from_torch_layout

    def changed(path, value):
        return value.transpose(axes) if path[-2:] == (module, "kernel") else right(path, value)

    patch.setattr(pretrained, "from_torch_layout", changed)


# Which comparison must see it: a wrong epsilon moves f32 results by less than 1e-4.
MUTATIONS = {
    tanh_gelu: ("f64", "f32"),
    epsilon_of_the_blocks: ("f64",),
    epsilon_of_the_final_norm: ("f64",),
    depthwise_rows_and_columns_swapped: ("f64", "f32"),
    patch_rows_and_columns_swapped: ("f64", "f32"),
    downsampling_channels_swapped: ("f64", "f32"),
    classifier_not_transposed: ("f64", "f32"),
    depthwise_kernels_turned: ("f64", "f32"),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_seen(mutation, precision, monkeypatch, record_worst):
    mutation(monkeypatch)
    # Square kernels everywhere: a missing transposition keeps every shape.
    errors = compare(CASES["equal widths"], precision)
    record_worst(f"{precision}, with {mutation.__name__}", errors)
    if precision in MUTATIONS[mutation]:
        assert too_large(errors, precision) != {}


def test_a_mutation_of_v2_is_seen(monkeypatch, record_worst):
    """Of the global response norm alone: the other norms keep their epsilon."""
    right = modeling.LayerNorm
    monkeypatch.setattr(modeling, "EPSILON", 1e-5)
    monkeypatch.setattr(
        modeling, "LayerNorm", lambda **options: right(**options | {"epsilon": 1e-6})
    )
    with jax.enable_x64(True):
        case = CASES["V2"]
        config = case.config.replace(layer_norm_eps=1e-6)
        errors = compare(dataclasses.replace(case, config=config), "f64")
    record_worst("f64, with another epsilon in the global response norm", errors)
    assert too_large(errors, "f64") != {}


def test_a_mutation_of_dinov3_is_seen(monkeypatch, record_worst):
    """Its norms have the epsilon of the configuration, here 1e-3."""
    _change_epsilon(monkeypatch, 1e-3, 1e-6)
    with jax.enable_x64(True):
        errors = compare(CASES["DINOv3"], "f64")
    record_worst("f64, with the epsilon of the other families", errors)
    assert too_large(errors, "f64") != {}


def test_a_mutation_of_the_drop_path_rates_is_seen(
    precision, same_draws, monkeypatch, record_worst
):
    def with_one_block_too_many(config):
        total = sum(config.depths)
        rates = iter([config.drop_path_rate * i / total for i in range(total)])
        return tuple(tuple(next(rates) for _ in range(depth)) for depth in config.depths)

    monkeypatch.setattr(modeling, "drop_path_rates", with_one_block_too_many)
    errors = compare(TRAINING, precision)
    record_worst(f"{precision}, with drop_path_rates", errors)
    assert too_large(errors, precision) != {}


def test_a_mutation_of_the_drop_path_scale_is_seen(
    precision, same_draws, monkeypatch, record_worst
):
    right = modeling.ops.drop_path_gain
    monkeypatch.setattr(
        modeling.ops,
        "drop_path_gain",
        lambda n, rates, *rest: right(n, rates, *rest) * (1 - np.asarray(rates)),
    )
    errors = compare(TRAINING, precision)
    record_worst(f"{precision}, with drop_path_scale", errors)
    assert too_large(errors, precision) != {}


# ------------------------------------------------------------------------------------- comparison


def compare(case: Case, precision: str) -> dict[str, float]:
    """Relative error of every output and of the gradient of every parameter."""
    dtype = DTYPES[precision]
    theirs = their_model(case).to(torch.from_numpy(np.zeros(0, dtype)).dtype)
    state = {name: value.astype(dtype) for name, value in random_state(theirs).items()}
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    pictures, labels = random_pictures(case).astype(dtype), random_labels(case, dtype)
    return relative_errors(
        run_ours(state, pictures, labels, case), run_theirs(theirs, pictures, labels)
    )


def run_ours(state, pictures, labels, case: Case) -> dict:
    """Outputs, loss and gradients of this library's model with this state dict."""
    model = OURS[case.kind](case.config, implementation=case.implementation)
    variables = pretrained.load_state_dict(model, state, "random weights")
    arguments = {} if labels is None else {"labels": labels}

    def loss_of(params):
        output, seen = model.apply(
            {"params": params},
            pictures,
            **arguments,
            output_hidden_states=True,
            train=case.train,
            rngs={"drop_path": jax.random.key(0)},
            capture_intermediates=lambda module, _: module.name == "convnext",
            mutable="intermediates",
        )
        results = flat(output)
        if case.kind == "classifier":
            results["pooled"] = seen["intermediates"]["convnext"]["__call__"][0].pooler_output
        if labels is None:
            weights = random_weights(results)
            results["loss"] = sum((weights[name] * results[name]).sum() for name in weights)
        return results["loss"], results

    quick = {"xla_backend_optimization_level": 0} if case.implementation == "plain" else None
    run = jax.jit(jax.grad(loss_of, has_aux=True), compiler_options=quick)
    gradients, results = run(variables["params"])
    gradients = pretrained.state_dict({"params": gradients}, case.config.model_type)
    return results | {f"gradient of {name}": value for name, value in gradients.items()}


def run_theirs(model, pictures, labels) -> dict:
    """The same of a transformers model."""
    arguments = {} if labels is None else {"labels": torch.from_numpy(labels)}
    pooled = {}
    if hasattr(model, "classifier"):
        model.base_model.register_forward_hook(
            lambda _module, _inputs, output: pooled.update(pooled=output.pooler_output)
        )
    output = model(torch.from_numpy(pictures), **arguments, output_hidden_states=True)
    results = flat(output) | pooled
    if labels is None:
        weights = random_weights(results)
        results["loss"] = sum(
            (torch.from_numpy(weights[name]) * results[name]).sum() for name in weights
        )
    results["loss"].backward()
    # DINOv3's modules call "model.stages" what its files call "stages".
    gradients = {
        f"gradient of {name.removeprefix('model.')}": value.grad
        for name, value in model.named_parameters()
    }
    return {name: value.detach() for name, value in results.items()} | gradients


def relative_errors(ours: dict, theirs: dict) -> dict[str, float]:
    """Largest difference of each tensor relative to its largest value."""
    assert ours.keys() == theirs.keys()
    errors = {}
    for name in theirs:
        value, expected = np.asarray(ours[name]), theirs[name].numpy()
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
        largest = np.abs(expected).max()
        assert largest > 0, f"{name} is all zeros and shows nothing"
        errors[name] = float(np.abs(value.astype(np.float64) - expected).max() / largest)
    return errors


def too_large(errors: dict[str, float], precision: str) -> dict[str, float]:
    """The errors that are not within the bound; a NaN is not."""
    return {name: error for name, error in errors.items() if not error <= BOUNDS[precision]}


def rate_errors(config: ConvNextConfig) -> list[float]:
    stages = their_model(Case(config, (1, 3, 32, 32))).convnext.encoder.stages
    theirs = [getattr(layer.drop_path, "drop_prob", 0.0) for s in stages for layer in s.layers]
    ours = list(itertools.chain(*drop_path_rates(config)))
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def their_model(case: Case) -> torch.nn.Module:
    """A transformers model with the random weights, in f32."""
    model_class = THEIRS[case.config.model_type, case.kind]
    model = model_class(model_class.config_class.from_dict(case.config.to_dict()))
    model.load_state_dict({k: torch.from_numpy(v) for k, v in random_state(model).items()})
    return model.train(case.train)


def random_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A state dict that leaves no branch small: see the top of the file."""
    rng = np.random.default_rng(0)

    def draw(name, tensor):
        value = rng.standard_normal(tuple(tensor.shape))
        if tensor.ndim > 1 and ".grn." not in name:
            return value / np.sqrt(np.prod(tensor.shape[1:]))
        return 0.2 * value if name.endswith("bias") else 1 + 0.2 * value

    return {name: draw(name, tensor) for name, tensor in model.state_dict().items()}


def random_pictures(case: Case) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(case.pictures)


def random_labels(case: Case, dtype) -> np.ndarray | None:
    """What the loss of the case takes; None where there is none."""
    rng, config, batch = np.random.default_rng(2), case.config, case.pictures[0]
    if case.kind != "classifier" or config.num_labels == 0:
        return None
    if config.problem_type == "multi_label_classification":
        return rng.integers(0, 2, (batch, config.num_labels)).astype(dtype)
    if config.problem_type == "regression":
        return rng.standard_normal((batch, config.num_labels)).astype(dtype)
    if config.num_labels == 1:
        return rng.standard_normal(batch).astype(dtype)
    return rng.integers(0, config.num_labels, batch)


def random_weights(results: dict) -> dict[str, np.ndarray]:
    """Weights of a sum over the outputs, so that each value has an influence of its own."""
    rng = np.random.default_rng(4)
    dtype = str(next(iter(results.values())).dtype).removeprefix("torch.")
    return {
        name: rng.standard_normal(tuple(value.shape)).astype(dtype)
        for name, value in results.items()
    }


def flat(output) -> dict:
    """The tensors of an output of either side by name, tuples by position."""
    named = {name: value for name, value in output.items() if not isinstance(value, tuple)}
    for name in output.keys() - named.keys():
        named |= {f"{name}[{i}]": value for i, value in enumerate(output[name])}
    return dict(sorted(named.items()))
