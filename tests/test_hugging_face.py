"""The original's tests of ConvNeXt, one by one, against what the original itself returned.

`ORIGINAL_TESTS` names each test of transformers' `test_modeling_convnext.py`,
`test_modeling_tf_convnext.py`, `test_backbone_common.py`, `test_image_processing_convnext.py` and
their common mixins, and the tests here that hold its claims; `NOT_TESTED_THERE` does the same for
what no test of the original covers. `test_every_line_is_covered` checks that these exist.

The expected values are in `fixtures/transformers_4_37_2`, written by version 4.37.2 of the original
(see the scripts there). Its networks have kernels at fan-in scale and a layer scale around 1; in
those named "epsilons" the norms see variances near 1e-5, so that every epsilon counts.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import re
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file

from convnext_jax import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ConvNextModel,
    InputError,
    modeling,
    outputs,
)
from convnext_jax.losses import classification_loss

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures" / "transformers_4_37_2"
BEHAVIOUR = json.loads((FIXTURES / "behaviour.json").read_text())
CONFIGURATIONS = json.loads((FIXTURES / "configurations.json").read_text())

CLASSES = {
    "tester": ConvNextForImageClassification,
    "epsilons": ConvNextForImageClassification,
    "in_parts": ConvNextForImageClassification,
    "no_layer_scale": ConvNextForImageClassification,
    "four_channels_patch_2": ConvNextForImageClassification,
    "one_channel_odd_size": ConvNextModel,
    "backbone_tester": ConvNextBackbone,
    "backbone_stem": ConvNextBackbone,
    "backbone_epsilons": ConvNextBackbone,
    "backbone_last": ConvNextBackbone,
}
NETWORKS = [name for name in CLASSES if name != "in_parts"]  # that one is "epsilons" again
TENSORFLOW = {
    "tf": ConvNextForImageClassification,
    "tf_regression": ConvNextForImageClassification,
    "tf_base": ConvNextModel,
}
# Largest difference over the largest value; 8e-7 was measured.
BOUND = 5e-6

# ------------------------------------------------------------------------------- what is where

HERE = "test_hugging_face.py"
MODELING, PRETRAINED = "test_modeling.py", "checkpoints/test_pretrained.py"
PROCESSOR, OUTPUTS = "image/test_processor.py", "test_outputs.py"
CONFIGURATION, LOSSES = "test_configuration.py", "test_losses.py"
PUBLISHED = "test_published_logits.py"

ORIGINAL_TESTS: dict[str, list[tuple[str, str]]] = {
    # test_modeling_convnext.py and the mixins it inherits
    "ConvNextModelTest.test_config": [
        (HERE, "test_constructions"),
        (HERE, "test_settings_of_a_configuration"),
        (CONFIGURATION, "test_json_round_trip"),
        (CONFIGURATION, "test_fields_can_be_changed_while_reading"),
    ],
    "ConvNextModelTest.test_model": [(HERE, "test_shapes_of_the_testers_network")],
    "ConvNextModelTest.test_backbone": [(HERE, "test_backbone_of_the_tester")],
    "ConvNextModelTest.test_hidden_states_output": [(HERE, "test_hidden_states_output")],
    "ConvNextModelTest.test_for_image_classification": [
        (HERE, "test_shapes_of_the_testers_network"),
        (HERE, "test_outputs_of_the_original"),
    ],
    "ConvNextModelTest.test_forward_signature": [(HERE, "test_forward_signature")],
    "ConvNextModelTest.test_model_from_pretrained": [
        (PUBLISHED, "test_published_logits"),
        (HERE, "test_outputs_of_the_original"),
    ],
    "ConvNextModelIntegrationTest.test_inference_image_classification_head": [
        (PUBLISHED, "test_published_logits"),
        (PUBLISHED, "test_from_a_folder_to_logits"),
    ],
    "ModelTesterMixin.test_save_load": [(PRETRAINED, "test_round_trip_is_bit_equal")],
    "ModelTesterMixin.test_determinism": [(HERE, "test_determinism")],
    "ModelTesterMixin.test_initialization": [(MODELING, "test_initialisation")],
    "ModelTesterMixin.test_training": [(HERE, "test_every_parameter_is_trained")],
    "ModelTesterMixin.test_model_outputs_equivalence": [(HERE, "test_tuples_hold_the_fields")],
    "ModelTesterMixin.test_retain_grad_hidden_states_attentions": [
        (HERE, "test_gradient_of_a_hidden_state")
    ],
    "ModelTesterMixin.test_mismatched_shapes": [
        (PRETRAINED, "test_a_head_of_another_width_is_not_replaced_unseen"),
        (PRETRAINED, "test_a_new_head_is_said_and_drawn_by_the_key"),
        (PRETRAINED, "test_only_a_head_may_be_made_anew"),
    ],
    "ModelTesterMixin.test_problem_types": [(HERE, "test_losses_of_the_original")],
    "ModelTesterMixin.test_correct_missing_keys": [
        (HERE, "test_a_classifier_without_its_head"),
        (PRETRAINED, "test_a_classifier_loads_into_the_model_without_a_head"),
        (PRETRAINED, "test_only_whole_parts_are_left_out"),
    ],
    "ModelTesterMixin.test_can_use_safetensors": [
        (PRETRAINED, "test_round_trip_is_bit_equal"),
        (HERE, "test_files_are_written_as_the_original_writes_them"),
    ],
    "ModelTesterMixin.test_torch_export": [(HERE, "test_export")],
    # test_backbone_common.py
    "BackboneTesterMixin.test_config": [
        (HERE, "test_constructions"),
        (HERE, "test_settings_of_a_configuration"),
    ],
    "BackboneTesterMixin.test_forward_signature": [(HERE, "test_forward_signature")],
    "BackboneTesterMixin.test_config_save_pretrained": [(CONFIGURATION, "test_json_round_trip")],
    "BackboneTesterMixin.test_channels": [(HERE, "test_attributes_of_backbones")],
    "BackboneTesterMixin.test_create_from_modified_config": [
        (HERE, "test_backbone_of_a_changed_configuration")
    ],
    "BackboneTesterMixin.test_backbone_common_attributes": [(HERE, "test_attributes_of_backbones")],
    "BackboneTesterMixin.test_backbone_outputs": [
        (HERE, "test_tuples_hold_the_fields"),
        (HERE, "test_access_to_outputs"),
        (HERE, "test_outputs_of_the_original"),
    ],
    # test_image_processing_convnext.py and test_image_processing_common.py
    "ConvNextImageProcessingTest.test_image_processor_properties": [
        (PROCESSOR, "test_defaults_and_json")
    ],
    "ConvNextImageProcessingTest.test_image_processor_from_dict_with_kwargs": [
        (PROCESSOR, "test_changes_on_reading")
    ],
    "ConvNextImageProcessingTest.test_default_interpolation_is_bicubic": [
        (PROCESSOR, "test_defaults_and_json")  # bilinear, as in 4.37.2
    ],
    "ImageProcessingTestMixin.test_image_processor_to_json_string": [
        (PROCESSOR, "test_defaults_and_json")
    ],
    "ImageProcessingTestMixin.test_image_processor_to_json_file": [(PROCESSOR, "test_round_trip")],
    "ImageProcessingTestMixin.test_image_processor_from_and_save_pretrained": [
        (PROCESSOR, "test_round_trip")
    ],
    "ImageProcessingTestMixin.test_init_without_params": [(PROCESSOR, "test_defaults_and_json")],
    "ImageProcessingTestMixin.test_call_pil": [(PROCESSOR, "test_kinds_of_input_and_output")],
    "ImageProcessingTestMixin.test_call_numpy": [(PROCESSOR, "test_kinds_of_input_and_output")],
    "ImageProcessingTestMixin.test_call_pytorch": [(PROCESSOR, "test_torch_tensors")],
    "ImageProcessingTestMixin.test_call_numpy_4_channels": [
        (PROCESSOR, "test_other_numbers_of_channels")
    ],
    "ImageProcessingTestMixin.test_image_processor_preprocess_arguments": [
        (PROCESSOR, "test_unknown_arguments_of_a_call_are_warned_of")
    ],
    "ImageProcessingTestMixin.test_slow_fast_equivalence": [  # one processor here, and both exact
        (PROCESSOR, "test_equal_to_the_originals_semantics_in_every_bit")
    ],
    # test_modeling_tf_convnext.py
    "TFConvNextModelTest.test_model": [(HERE, "test_tensorflow_files")],
    "TFConvNextModelTest.test_for_image_classification": [(HERE, "test_tensorflow_files")],
    "TFConvNextModelTest.test_hidden_states_output": [(HERE, "test_tensorflow_files")],
    "TFConvNextModelTest.test_forward_signature": [(HERE, "test_forward_signature")],
    "TFConvNextModelTest.test_model_outputs_equivalence": [
        (HERE, "test_tuples_of_tensorflow_are_flatter"),
        (HERE, "test_tuples_hold_the_fields"),
    ],
    "TFConvNextModelTest.test_model_from_pretrained": [(HERE, "test_tensorflow_files")],
    "TFConvNextModelTest.test_keras_fit": [(HERE, "test_every_parameter_is_trained")],
    "TFConvNextModelIntegrationTest.test_inference_image_classification_head": [
        (PUBLISHED, "test_published_logits")
    ],
}

NOT_TESTED_THERE: dict[str, list[tuple[str, str]]] = {
    "drop path statistics": [
        (MODELING, "test_drop_path_has_the_linear_rates"),
        (MODELING, "test_drop_path_is_independent_between_blocks"),
        (MODELING, "test_drop_path_is_independent_between_samples"),
        (MODELING, "test_drop_path_keeps_the_expectation"),
    ],
    "layer scale off": [
        (HERE, "test_outputs_of_the_original"),
        (MODELING, "test_there_is_no_layer_scale_at_or_below_zero"),
    ],
    "no labels": [(HERE, "test_a_classifier_without_its_head")],
    "values of the regression of one label": [(HERE, "test_losses_of_the_original")],
    "problem_type written back": [(HERE, "test_the_problem_type_is_inferred_at_each_call")],
    "sizes that are no multiple of 32": [(HERE, "test_outputs_of_the_original")],
    "other numbers of channels": [(HERE, "test_outputs_of_the_original")],
    "values of the processor": [
        (PROCESSOR, "test_pinned_values_of_the_original"),
        (PROCESSOR, "test_equal_to_the_originals_semantics_in_every_bit"),
    ],
    "stretching from 384": [(PROCESSOR, "test_pinned_values_of_the_original")],
    "float pictures in 8 bits": [
        (PROCESSOR, "test_floating_point_pictures_take_the_path_through_8_bits")
    ],
    "negative indices": [
        (HERE, "test_outputs_of_the_original"),
        (HERE, "test_constructions"),
    ],
    "layout of the state dict": [
        (HERE, "test_files_are_written_as_the_original_writes_them"),
        (PRETRAINED, "test_tiny_has_the_182_keys_of_hugging_face"),
        (PRETRAINED, "test_tiny_has_the_shapes_of_hugging_face"),
    ],
    "the label map of ImageNet-22k": [(HERE, "test_a_label_map_with_holes")],
    "epsilon of the pooled output": [
        (HERE, "test_outputs_of_the_original"),
        (MODELING, "test_the_final_norm_has_the_epsilon_of_the_configuration"),
    ],
}


@functools.cache
def names_of_tests(module: str) -> set[str]:
    tree = ast.parse((TESTS / module).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("line", ORIGINAL_TESTS | NOT_TESTED_THERE)
def test_every_line_is_covered(line):
    for module, name in (ORIGINAL_TESTS | NOT_TESTED_THERE)[line]:
        assert name in names_of_tests(module), f"{module} has no {name}"


# ------------------------------------------------------------------------------------- networks

# What compiles soonest; tests/ops holds the implementations of an operation equal.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)


@functools.cache
def network(name: str):
    """The model and its variables, as loaded from the folder of that name."""
    return CLASSES[name].from_pretrained(FIXTURES / "torch" / name, implementation="plain")


@functools.cache
def expected_of(folder: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / folder / "expected.npz") as file:
        return dict(file)


@functools.cache
def outputs_of(name: str):
    """The output for the fixture's pictures, with hidden states."""
    model, variables = network(name)
    run = jit(lambda v, x: model.apply(v, x, output_hidden_states=True))
    return run(variables, expected_of(f"torch/{name}")["pixel_values"])


def assert_close(value, expected, bound=BOUND):
    value = np.asarray(value)
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    assert np.abs(value - expected).max() <= bound * np.abs(expected).max()


def assert_outputs(output, expected, names):
    """Each field of the output equals the fixture's, and no field that the fixture has is left."""
    seen = set()
    for name, value in output.items():
        for i, x in enumerate(value) if isinstance(value, tuple) else [("", value)]:
            key = f"{name}_{i}" if i != "" else name
            assert_close(x, expected[key])
            seen.add(key)
    assert seen == {key for key in expected if key.startswith(names)}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_the_original(name):
    """Logits, pooled features, maps of a backbone and every hidden state, with the sizes that no
    stage divides, other numbers of channels and patches, no layer scale, negative indices.
    """
    names = {
        ConvNextModel: ("last_hidden_state", "pooler_output", "hidden_states"),
        ConvNextForImageClassification: ("logits", "hidden_states"),
        ConvNextBackbone: ("feature_maps", "hidden_states"),
    }[CLASSES[name]]
    assert_outputs(outputs_of(name), expected_of(f"torch/{name}"), names)


def test_shards_of_the_original():
    """Several safetensors files and their index hold what the one file holds."""
    jax.tree.map(np.testing.assert_array_equal, network("in_parts")[1], network("epsilons")[1])


def test_a_pytorch_file_of_the_original(tmp_path):
    pytest.importorskip("torch")
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(FIXTURES / "torch" / "epsilons" / name, tmp_path)
    _, variables = ConvNextForImageClassification.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, variables, network("epsilons")[1])


@pytest.mark.parametrize("name", ["tester", "epsilons"])
def test_a_classifier_without_its_head(name):
    """The base model takes the classifier's file, and drops the prefix and the head."""
    model, variables = ConvNextModel.from_pretrained(
        FIXTURES / "torch" / name, implementation="plain"
    )
    expected = expected_of(f"torch/{name}")
    output = jit(model.apply)(variables, expected["pixel_values"])
    assert_outputs(output, expected, ("last_hidden_state", "pooler_output"))


def test_no_labels_give_the_pooled_features():
    expected = expected_of("torch/four_channels_patch_2")
    logits = outputs_of("four_channels_patch_2").logits
    assert_close(logits, expected["pooler_output"])


@pytest.mark.parametrize("name", NETWORKS)
def test_files_are_written_as_the_original_writes_them(name, tmp_path):
    """Every key, shape, dtype and value of the original's file, and of its config.json."""
    model, variables = network(name)
    model.save_pretrained(tmp_path, variables)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(FIXTURES / "torch" / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert_file_holds(
        json.loads((tmp_path / "config.json").read_text()),
        json.loads((FIXTURES / "torch" / name / "config.json").read_text()),
    )


# -------------------------------------------------------------------------------- shapes and calls

MODELS = [ConvNextModel, ConvNextForImageClassification, ConvNextBackbone]
TESTER = ConvNextConfig(
    num_stages=4,
    hidden_sizes=(10, 20, 30, 40),
    depths=(2, 2, 3, 2),
    hidden_act="gelu",
    num_labels=10,
    initializer_range=0.02,
    out_features=("stage2", "stage3", "stage4"),
    image_size=32,
)
# The same with fewer blocks, for what does not hang on their number.
SMALL = ConvNextConfig(
    hidden_sizes=(4, 6, 8, 10), depths=(1, 2, 1, 1), image_size=32, layer_scale_init_value=1.0
)
PICTURES = np.random.default_rng(0).standard_normal((13, 3, 32, 32)).astype(np.float32)
LABELS = np.arange(13) % 10


@functools.cache
def untrained(model_class, config=SMALL):
    model = model_class(config, implementation="plain")
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) / 5, shapes)


def shapes_of(values) -> list:
    return [shapes_of(x) if isinstance(x, tuple) else list(x.shape) for x in values]


def test_shapes_of_the_testers_network():
    model, variables = untrained(ConvNextModel, TESTER)
    output = jax.eval_shape(model.apply, variables, PICTURES)
    assert output.last_hidden_state.shape == (13, 40, 1, 1)
    assert output.pooler_output.shape == (13, 40)
    model, variables = untrained(ConvNextForImageClassification, TESTER)
    output = jax.eval_shape(model.apply, variables, PICTURES, LABELS)
    assert output.logits.shape == (13, 10)
    assert output.loss.shape == ()


def test_backbone_of_the_tester():
    model, variables = untrained(ConvNextBackbone, TESTER)
    output = jax.eval_shape(model.apply, variables, PICTURES)
    assert shapes_of(output.feature_maps) == [[13, 20, 4, 4], [13, 30, 2, 2], [13, 40, 1, 1]]
    assert model.channels == (20, 30, 40)
    model, variables = untrained(ConvNextBackbone, TESTER.replace(out_features=None))
    output = jax.eval_shape(model.apply, variables, PICTURES)
    assert shapes_of(output.feature_maps) == [[13, 40, 1, 1]]
    assert model.channels == (40,)


@pytest.mark.parametrize("model_class", MODELS)
def test_hidden_states_output(model_class):
    """Asked for by argument and by configuration, as many as stages and one, from a quarter on."""
    by_argument, variables = untrained(model_class)
    by_config = model_class(SMALL.replace(output_hidden_states=True))
    for apply, arguments in (
        (by_argument.apply, {"output_hidden_states": True}),
        (by_config.apply, {}),
    ):
        output = jax.eval_shape(functools.partial(apply, **arguments), variables, PICTURES)
        assert shapes_of(output.hidden_states) == [
            [13, 4, 8, 8], [13, 4, 8, 8], [13, 6, 4, 4], [13, 8, 2, 2], [13, 10, 1, 1],
        ]  # fmt: skip
    for apply, arguments in (
        (by_argument.apply, {}),
        (by_config.apply, {"output_hidden_states": False}),
    ):
        output = jax.eval_shape(functools.partial(apply, **arguments), variables, PICTURES)
        assert output.hidden_states is None


@pytest.mark.parametrize("model_class", MODELS)
def test_forward_signature(model_class):
    """Documented arguments by their names and in their order, after the module itself."""
    names = list(inspect.signature(model_class.__call__).parameters)[1:]
    documented = ["pixel_values", "labels", "output_hidden_states", "return_dict"]
    if model_class is not ConvNextForImageClassification:
        documented.remove("labels")
    assert names == [*documented, "train"]


def arguments_of(case: str):
    """The class and the arguments that a case of `behaviour.json` names."""
    name, hidden, labels = case.split(", ")
    arguments = {"output_hidden_states": hidden.endswith("True")}
    if labels.endswith("True"):
        arguments["labels"] = np.array([0, 1])
    return next(c for c in MODELS if c.__name__ == name), arguments


@pytest.mark.parametrize("case", BEHAVIOUR["outputs"])
def test_tuples_hold_the_fields(case):
    """Nested as the original's, and equal to the fields of the output in every value."""
    model_class, arguments = arguments_of(case)
    config = SMALL.replace(out_features=["stage1", "stage4"])
    model, variables = untrained(model_class, config)
    pictures = PICTURES[:2]
    run = jit(
        lambda v, x: (
            model.apply(v, x, **arguments),
            model.apply(v, x, **arguments, return_dict=False),
        )
    )
    output, values = run(variables, pictures)
    assert type(values) is tuple
    assert shapes_of(values) == BEHAVIOUR["tuples"][case]
    fields = [getattr(output, name) for name in output]
    assert len(fields) == len(values)
    for a, b in zip(jax.tree.leaves(fields), jax.tree.leaves(values), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_configuration_that_asks_for_tuples(model_class):
    config = SMALL.replace(out_features=["stage1", "stage4"])
    _, variables = untrained(model_class, config)
    model = model_class(config.replace(return_dict=False, output_hidden_states=True))
    values = jax.eval_shape(model.apply, variables, PICTURES[:2])
    assert type(values) is tuple
    case = f"{model_class.__name__}, as its configuration says"
    assert shapes_of(values) == BEHAVIOUR["tuples"][case]


@pytest.mark.parametrize("case", BEHAVIOUR["outputs"])
def test_access_to_outputs(case):
    """Fields, keys, iteration, indexing and slicing, with those skipped that are None."""
    model_class, arguments = arguments_of(case)
    model, variables = untrained(model_class, SMALL.replace(out_features=["stage1", "stage4"]))
    run = functools.partial(model.apply, **arguments)
    output = jax.eval_shape(run, variables, PICTURES[:2])
    assert {
        "fields": list(type(output).__dataclass_fields__),
        "keys": list(output.keys()),
        "iteration": list(output),
        "length": len(output),
        "first": shapes_of([output[0]]),
        "from the second on": shapes_of(output[1:]),
        "to_tuple": shapes_of(output.to_tuple()),
        "none": [f for f in type(output).__dataclass_fields__ if getattr(output, f) is None],
        "loss in": "loss" in output,
    } == BEHAVIOUR["outputs"][case]


@pytest.mark.parametrize("model_class", MODELS)
def test_calls_that_the_original_refuses(model_class):
    """No pictures (a clear error here for the backbone too) and another number of channels."""
    model, variables = untrained(model_class)
    for case, pictures in (("no pictures", None), ("four channels", np.zeros((1, 4, 32, 32)))):
        assert BEHAVIOUR[f"{case}: {model_class.__name__}"] in ("ValueError", "AttributeError")
        with pytest.raises(InputError) as error:
            model.apply(variables, pictures)
        assert "\n" not in str(error.value)


def test_determinism():
    model, variables = network("epsilons")
    run = jit(model.apply)
    pictures = expected_of("torch/epsilons")["pixel_values"]
    one, other = run(variables, pictures).logits, run(variables, pictures).logits
    np.testing.assert_array_equal(one, other)


def test_export():
    """An exported program gives the same logits."""
    model, variables = network("epsilons")
    pictures = expected_of("torch/epsilons")["pixel_values"]
    exported = jax.export.export(jit(lambda v, x: model.apply(v, x).logits))(variables, pictures)
    assert exported.out_avals[0].shape == (2, 5)
    assert_close(exported.call(variables, pictures), expected_of("torch/epsilons")["logits"])


# ---------------------------------------------------------------------------------------- training


def test_every_parameter_is_trained():
    """The gradient of the loss reaches each parameter, in training with drop path."""
    expected = expected_of("torch/tester")
    model, variables = network("tester")
    model = model.clone(config=model.config.replace(drop_path_rate=0.1))

    def loss(v, key):
        labels = expected["labels_inferred"]
        output = model.apply(
            v, expected["pixel_values"], labels, train=True, rngs={"drop_path": key}
        )
        return output.loss

    gradients = jit(jax.grad(loss))(variables, jax.random.key(0))
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


def test_gradient_of_a_hidden_state():
    """Of the pooled features by the stem's map: chained with the stem, it is that of the pictures.

    A map inside a pure function has no gradient of its own to keep; the parts of the network are
    modules by themselves, and the rest of it is a function of the map.
    """
    model, variables = ConvNextModel.from_pretrained(
        FIXTURES / "torch" / "epsilons", implementation="plain"
    )
    params = variables["params"]
    pictures = expected_of("torch/epsilons")["pixel_values"]
    stem = modeling.ConvNextEmbeddings(model.config, implementation="plain")
    encoder = modeling.ConvNextEncoder(model.config, implementation="plain")

    def pictures_to_stem(x):
        return stem.apply({"params": params["embeddings"]}, x.transpose(0, 2, 3, 1))

    def stem_to_sum(y):
        return encoder.apply({"params": params["encoder"]}, y)[-1].sum()

    @jit
    def gradients(x):
        y, back = jax.vjp(pictures_to_stem, x)
        by_map = jax.grad(stem_to_sum)(y)
        whole = jax.grad(lambda x: model.apply(variables, x).last_hidden_state.sum())(x)
        return by_map, back(by_map)[0], whole

    by_map, chained, whole = gradients(pictures)
    assert by_map.shape == (2, 8, 8, 4)
    assert np.abs(by_map).max() > 0
    assert_close(chained, np.asarray(whole), 1e-4)


# ------------------------------------------------------------------------------------------ losses

LOSSES_OF = {name: ["inferred", "regression"] for name in ("tester", "epsilons", "no_layer_scale")}
for _name in ("tester", "epsilons"):
    LOSSES_OF[_name] += ["single_label_classification", "multi_label_classification"]


@pytest.mark.parametrize(
    ("name", "problem_type"), [(name, kind) for name in LOSSES_OF for kind in LOSSES_OF[name]]
)
def test_losses_of_the_original(name, problem_type):
    """All three, inferred and named, with a label of -100 among the classes; and no warning."""
    expected = expected_of(f"torch/{name}")
    labels = expected[f"labels_{problem_type}"]
    if problem_type == "single_label_classification":
        assert -100 in labels
    model, variables = network(name)
    named = None if problem_type == "inferred" else problem_type
    model = model.clone(config=model.config.replace(problem_type=named))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The network under jit is tested above: its logits serve here, and one call does the rest.
        value = classification_loss(outputs_of(name).logits, jnp.asarray(labels), model.config)
        if name == "epsilons":
            called = jit(model.apply)(variables, expected["pixel_values"], labels).loss
            np.testing.assert_allclose(called, value, rtol=1e-6)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[f"loss_{problem_type}"], rtol=BOUND)


@pytest.mark.parametrize("case", BEHAVIOUR["problem_types"])
def test_the_problem_type_is_inferred_at_each_call(case):
    """What the original writes back to its configuration is inferred here, and not written."""
    count, dtype = int(case[0]), case.split(", ")[1]
    shape = (2,) if count == 1 or dtype != "float32" else (2, count)
    labels = jnp.ones(shape, {"int64": "int32"}.get(dtype, dtype))
    logits = jnp.linspace(-1.0, 2.0, 2 * count).reshape(2, count)
    config = ConvNextConfig(num_labels=count)
    inferred = classification_loss(logits, labels, config)
    assert config.problem_type is None
    losses = {}
    for problem_type in ("regression", "single_label_classification", "multi_label_classification"):
        try:
            named = config.replace(problem_type=problem_type)
            losses[problem_type] = float(classification_loss(logits, labels, named))
        except InputError:
            continue
    assert float(inferred) == losses.pop(BEHAVIOUR["problem_types"][case])
    assert all(float(inferred) != other for other in losses.values() if np.isfinite(other))
    # The next call may bring labels of another kind; the original would keep to the first.
    other = jnp.zeros((2, count), jnp.float32)
    assert np.isfinite(classification_loss(logits, other, config))


# --------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("given", BEHAVIOUR["backbones"])
def test_attributes_of_backbones(given):
    fields = json.loads(given)
    model = ConvNextBackbone(SMALL.replace(**fields) if fields else SMALL)
    for name, value in BEHAVIOUR["backbones"][given].items():
        ours = getattr(model, name)
        assert (ours if isinstance(value, dict) else list(ours)) == value
    assert len(model.channels) == len(model.out_features) == len(model.out_indices)
    assert len(model.stage_names) == len(model.num_features) == len(model.out_feature_channels)
    picked = [model.num_features[i] for i in model.out_indices]
    assert list(model.channels) == picked


@pytest.mark.parametrize(
    "changes",
    [
        {"out_features": ["stage1", "stage3"]},
        {"out_indices": [0, 2]},
        {"out_indices": [-2]},
        {"out_features": None},
        {"out_indices": None},
    ],
)
def test_backbone_of_a_changed_configuration(changes):
    """As many maps, channels, names and indices, each map with its stage's width and size."""
    config = SMALL.replace(out_features=["stage1", "stage2", "stage4"]).replace(**changes)
    model, variables = untrained(ConvNextBackbone, config)
    output = jax.eval_shape(model.apply, variables, PICTURES)
    assert len(output.feature_maps) == len(model.out_features) == len(model.out_indices)
    sides = {"stem": 8, "stage1": 8, "stage2": 4, "stage3": 2, "stage4": 1}
    expected = [
        [13, width, sides[name], sides[name]]
        for width, name in zip(model.channels, model.out_features, strict=True)
    ]
    assert shapes_of(output.feature_maps) == expected
    if None in changes.values():
        assert model.out_features == ("stage4",)
        assert model.channels == (model.num_features[-1],)
    norms = {name for name in variables["params"] if name.startswith("hidden_states_norms")}
    assert norms == {f"hidden_states_norms_{name}" for name in model.out_features}


# ---------------------------------------------------------------------------------- configurations


def plain(value):
    """As read from a JSON file."""
    return json.loads(json.dumps(value))


def assert_file_holds(ours: dict, theirs: dict) -> None:
    """Our config.json has the values of the original's, and beyond them its defaults alone."""
    theirs = {key: value for key, value in theirs.items() if key != "transformers_version"}
    ours = {key: value for key, value in ours.items() if key != "transformers_version"}
    if theirs.get("label2id", 0) is None:  # derived here, left out there
        names = theirs.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
        theirs["label2id"] = {label: int(i) for i, label in names.items()}
        if "id2label" not in theirs:  # the two default names: neither is written
            del theirs["label2id"]
    assert {key: value for key, value in ours.items() if key in theirs} == theirs
    # The original leaves out what equals the defaults of its base class.
    beyond = {key: value for key, value in ours.items() if key not in theirs}
    assert (
        beyond.items()
        <= {
            "return_dict": True,
            "output_hidden_states": False,
            "problem_type": None,
        }.items()
    )


def assert_is_the_original(config: ConvNextConfig, case: dict) -> None:
    assert_file_holds(plain(config.to_dict()), case["file"])
    theirs = case["attributes"]
    assert config.num_labels == theirs["num_labels"]
    assert {str(i): label for i, label in config.id2label.items()} == theirs["id2label"]
    if theirs["label2id"] is not None:
        assert config.label2id == theirs["label2id"]
    assert list(config.out_features) == theirs["out_features"]
    assert list(config.out_indices) == theirs["out_indices"]
    assert config.return_dict == theirs["use_return_dict"]
    assert config.output_hidden_states == theirs["output_hidden_states"]
    assert config.problem_type == theirs["problem_type"]


@pytest.mark.parametrize("case", CONFIGURATIONS["constructed"], ids=lambda case: str(case["given"]))
@pytest.mark.filterwarnings("ignore:num_labels is 5 and id2label has 2")
def test_constructions(case):
    """Each gives the original's values and file, and loads the original's file; or is an error."""
    if "error" in case:
        assert case["error"] in ("ValueError", "IndexError", "TypeError")
        with pytest.raises(InputError) as error:
            ConvNextConfig(**case["given"])
        assert "\n" not in str(error.value)
        return
    config = ConvNextConfig(**case["given"])
    assert_is_the_original(config, case)
    read = ConvNextConfig.from_dict(case["file"])
    assert_is_the_original(read, case)
    assert read == config.replace(transformers_version="4.37.2")


@pytest.mark.parametrize("case", CONFIGURATIONS["set"], ids=lambda case: str(case["set"]))
def test_settings_of_a_configuration(case):
    """`replace` does what setting attributes in place does there."""
    config = ConvNextConfig(**case["given"])
    for name, value in case["set"]:
        config = config.replace(**{name: value})
    assert_is_the_original(config, case)


def test_a_label_map_with_holes():
    """The published maps of ImageNet-22k: 21,841 names under keys up to 21842, two left out.

    They are read as they are; a name may also stand twice.
    """
    names = {str(i): f"synset {i % 21000}" for i in range(21843) if i not in (9205, 15027)}
    config = ConvNextConfig.from_dict({"model_type": "convnext", "id2label": names})
    assert config.num_labels == 21841
    assert max(config.id2label) == 21842
    assert 9205 not in config.id2label
    assert config.id2label[9206] == names["9206"]
    assert plain(config.to_dict())["id2label"] == names
    model = ConvNextForImageClassification(config, implementation="plain")
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    assert shapes["params"]["classifier"]["kernel"].shape == (768, 21841)


# -------------------------------------------------------------------------------------- TensorFlow


@functools.cache
def tensorflow_network(name: str):
    return TENSORFLOW[name].from_pretrained(FIXTURES / name, implementation="plain")


@pytest.mark.parametrize("name", TENSORFLOW)
def test_tensorflow_files(name):
    """A real tf_model.h5 loads, and gives what the TensorFlow class gave, field by field."""
    model, variables = tensorflow_network(name)
    expected = expected_of(name)
    hidden = "hidden_states_0" in expected
    run = jit(functools.partial(model.apply, output_hidden_states=hidden))
    output = run(variables, expected["pixel_values"])
    names = ("logits", "hidden_states")
    if TENSORFLOW[name] is ConvNextModel:
        names = ("last_hidden_state", "pooler_output", "hidden_states")
    assert_outputs(output, expected, names)


@pytest.mark.parametrize("name", ["tf", "tf_regression"])
def test_losses_of_tensorflow_are_those_of_single_pictures(name):
    """The vector of losses there is this one's loss under vmap, and its mean the scalar here."""
    model, variables = tensorflow_network(name)
    expected = expected_of(name)

    def loss(pixels, label):
        return model.apply(variables, pixels[None], label[None]).loss

    pictures, labels = expected["pixel_values"], expected["labels"]
    losses = jit(jax.vmap(loss))(pictures, labels)
    assert expected["loss"].shape == (3,)
    assert_close(losses, expected["loss"])
    mean = jit(model.apply)(variables, pictures, labels).loss
    np.testing.assert_allclose(mean, expected["loss"].mean(), rtol=BOUND)


def test_the_base_model_of_a_tensorflow_classifier():
    model, variables = ConvNextModel.from_pretrained(FIXTURES / "tf", implementation="plain")
    expected = expected_of("tf")
    output = jit(model.apply)(variables, expected["pixel_values"])
    assert_outputs(output, expected, ("last_hidden_state", "pooler_output"))


def test_tuples_of_tensorflow_are_flatter():
    """Hidden states lie in the outer tuple there, in one of their own here."""
    observed = json.loads((FIXTURES / "tf" / "observed.json").read_text())
    assert observed["fields of the output"] == ["loss", "logits", "hidden_states", "attentions"]
    model, variables = untrained(
        ConvNextForImageClassification,
        TESTER.replace(depths=(1, 2, 1, 1)),
    )
    for labels in (False, True):
        arguments = {"labels": LABELS[:3]} if labels else {}
        run = functools.partial(
            model.apply, output_hidden_states=True, return_dict=False, **arguments
        )
        values = jax.eval_shape(run, variables, PICTURES[:3])
        flat = shapes_of((*values[:-1], *values[-1]))
        case = f"return_dict=False: classifier, labels {labels}, hidden states True"
        theirs = observed[case]
        # There a loss a picture, here their mean.
        assert flat == ([[], *theirs[1:]] if labels else theirs)


# --------------------------------------------------------------------------------- documentation

PAGE = (TESTS.parent / "docs" / "hugging_face.md").read_text()
HUB_NAME = '"facebook/convnext-tiny-224"'


def section(title: str) -> str:
    """The text under a heading, up to the next one of any rank."""
    return re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", PAGE, re.S | re.M).group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, its head and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] not in ("argument", "TensorFlow", "PyTorch")]


@pytest.fixture(scope="module")
def compiled_soon():
    """As `OPTIONS`, for code that jits by itself."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def executed(tmp_path_factory, compiled_soon):
    """The names that the page's Python leaves behind, all of its blocks run in order."""
    folder = tmp_path_factory.mktemp("page")
    # The network of the published layout, with smaller pictures.
    shutil.copytree(FIXTURES / "published", folder / "network")
    for file in ("config.json", "preprocessor_config.json"):
        path = folder / "network" / file
        path.write_text(path.read_text().replace(" 224", " 32"))
    y, x = np.mgrid[0:60, 0:80]
    waves = np.stack([np.sin(x / 7), np.cos(y / 9), np.sin((x + y) / 11)], -1)
    PIL.Image.fromarray(np.uint8(127.5 + 100 * waves)).save(folder / "photo.jpg")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M))
    assert HUB_NAME in code
    code = code.replace(HUB_NAME, repr(str(folder / "network")))
    names = {}
    with contextlib.chdir(folder):
        exec(compile(code, "docs/hugging_face.md", "exec"), names)
        model, variables = names["model"], names["variables"]
        names |= {
            "key": jax.random.key(0),
            "picture": PIL.Image.open("photo.jpg").copy(),
            "run": jax.jit(model.apply),
            "base": ConvNextModel(model.config),
            "expected": np.asarray(model.apply(variables, names["x"]).logits),
            "base_variables": {"params": variables["params"]["convnext"]},
        }
    return names


@pytest.mark.slow
def test_the_steps_of_the_documentation_train(executed):
    names = executed
    model, x, labels = names["model"], names["x"], names["labels"]
    before = model.apply(names["variables"], x, labels).loss
    after = model.apply({"params": names["params"]}, x, labels).loss
    assert after < before
    assert np.abs(names["gradients"]["kernel"]).max() > 0


def tables_of_code():
    """(what it replaces, code) of each row of the two tables of counterparts."""
    for title in ("From TensorFlow", "From PyTorch"):
        for theirs, ours in rows(section(title)):
            for code in re.findall(r"`([^`]+)`", ours):
                if "(" in code and not code.startswith("convnext-jax"):
                    yield pytest.param(theirs, code, id=f"{theirs[:40]}: {code[:20]}")


THE_SAME_LOGITS = [
    "model.apply(variables, x)",
    "jax.jit(model.apply)(variables, x)",
    "model.apply(variables, *[x])",
    'model.apply(variables, **{"pixel_values": x})',
    "jax.jit(lambda v, x: model.apply(v, x, output_hidden_states=True))(variables, x)",
    'model.clone(data_format="channels_last").apply(variables, x.transpose(0, 2, 3, 1))',
]


def test_the_tables_have_these_calls():
    codes = [case.values[1] for case in tables_of_code()]
    assert len(codes) >= 30
    assert set(THE_SAME_LOGITS) <= set(codes)


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "code"), list(tables_of_code()))
@pytest.mark.filterwarnings("ignore:.*newly initialised|.*initialised anew|.*head")
def test_code_of_the_tables(theirs, code, executed, tmp_path):
    """Each counterpart runs, and those that stand for plain calls give what those gave."""
    names = executed
    code = code.removeprefix("run = ")
    with contextlib.chdir(tmp_path):
        value = eval(code, dict(names))
    if code in THE_SAME_LOGITS:
        assert_close(value.logits, names["expected"], 1e-5)
    if "jax.vmap" in code:
        losses = np.asarray(value)
        mean = names["model"].apply(names["variables"], names["x"], names["labels"]).loss
        assert losses.shape == (2,)
        np.testing.assert_allclose(losses.mean(), mean, rtol=1e-5)
    if "(*t[:-1], *t[-1])" in code:
        assert [v.ndim for v in value] == [2, 4, 4, 4, 4, 4]
    if "save_pretrained" in code:
        assert (tmp_path / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "made", [ConvNextConfig(), ConvNextImageProcessor()], ids=lambda made: type(made).__name__
)
def test_documented_arguments(made):
    """Every argument stands in the page's table, with its default, in the order of the code."""
    table = rows(section(type(made).__name__))
    names = [row[0].strip("`") for row in table]
    signature = inspect.signature(type(made))
    positional = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "model_type"
    ]
    assert names == positional
    for name, row in zip(names, table, strict=True):
        assert getattr(made, name) == eval(row[1].strip("`")), name


def test_documented_calls_and_outputs():
    text = section("Models")
    calls = [row[0].strip("`") for row in rows(text) if "of `" not in row[0] and row[0] != "output"]
    signature = inspect.signature(ConvNextForImageClassification.__call__)
    assert calls == list(signature.parameters)[1:]
    for model_class, output in (
        (ConvNextModel, outputs.BaseModelOutputWithPoolingAndNoAttention),
        (ConvNextForImageClassification, outputs.ImageClassifierOutputWithNoAttention),
        (ConvNextBackbone, outputs.BackboneOutput),
    ):
        row = next(r for r in rows(text) if r[0] == f"of `{model_class.__name__}`")
        assert re.findall(r"`(\w+)`", row[1]) == list(output.__dataclass_fields__)
