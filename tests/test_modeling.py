import ast
import functools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import convnext_jax
from convnext_jax import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    InputError,
    modeling,
)
from convnext_jax.configuration import PRESETS, drop_path_rates

# The paper's networks at the head's width of ImageNet-1k, ImageNet-22k and without a head, and
# timm's smaller ones.
PARAMETERS = {
    "atto": {1000: 3_695_520, 21841: 10_385_481, 0: 3_374_520},
    "femto": {1000: 5_217_784, 21841: 13_241_569, 0: 4_832_784},
    "pico": {1000: 9_045_672, 21841: 19_737_105, 0: 8_532_672},
    "nano": {1000: 15_593_560, 21841: 28_952_641, 0: 14_952_560},
    "tiny": {1000: 28_589_128, 21841: 44_615_857, 0: 27_820_128},
    "small": {1000: 50_223_688, 21841: 66_250_417, 0: 49_454_688},
    "base": {1000: 88_591_464, 21841: 109_953_489, 0: 87_566_464},
    "large": {1000: 197_767_336, 21841: 229_799_953, 0: 196_230_336},
    "xlarge": {1000: 350_196_968, 21841: 392_900_177, 0: 348_147_968},
    "huge": {1000: 659_942_216, 21841: 718_651_313, 0: 657_125_216},
    "isotropic_small": {1000: 22_308_712, 21841: 30_332_497, 0: 21_923_712},
    "isotropic_base": {1000: 87_083_752, 21841: 103_110_481, 0: 86_314_752},
    "isotropic_large": {1000: 305_942_504, 21841: 327_304_529, 0: 304_917_504},
}
# ConvNeXt V2 with 1000 classes.
PARAMETERS_V2 = {
    "atto": 3_708_400,
    "femto": 5_233_240,
    "pico": 9_066_280,
    "nano": 15_623_800,
    "tiny": 28_635_496,
    "base": 88_717_800,
    "large": 197_956_840,
    "huge": 660_289_640,
}
SMALL = ConvNextConfig(
    num_stages=2,
    depths=(1, 2),
    hidden_sizes=(8, 12),
    num_labels=3,
    image_size=16,
    patch_size=2,
    layer_scale_init_value=1.0,
)
RNG = np.random.default_rng(0)
PICTURES = RNG.standard_normal((2, 3, 18, 13)).astype(np.float32)  # maps of 9x6 and 4x3


# Compiling takes most of the time of these tests. With excess precision allowed, XLA leaves out
# roundings to bf16 on the way from one operation to the next.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def random_variables(model):
    """Every branch visible, and quicker than compiling the initialisation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        return jnp.asarray(1 + rng.standard_normal(leaf.shape), leaf.dtype) / math.sqrt(fan_in)

    return jax.tree.map(draw, shapes)


def small(model_class=ConvNextForImageClassification, config=SMALL, **options):
    options.setdefault("implementation", "plain")  # compiles sooner
    model = model_class(config, **options)
    return model, random_variables(model)


def run(model, variables, pictures=PICTURES, **arguments):
    return jit(lambda v, x: model.apply(v, x, **arguments))(variables, pictures)


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ------------------------------------------------------------------------------ parameters, initial


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    config = ConvNextConfig.preset(name, num_labels=21841)
    model = ConvNextForImageClassification(config, implementation="plain")
    params = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
    assert count(params) == PARAMETERS[name][21841]
    # Tracing a network takes a while: the same one with another head is counted by its parts.
    body, a_label = count(params["convnext"]), count(params["classifier"]) / 21841
    assert body == PARAMETERS[name][0]
    assert body + 1000 * a_label == PARAMETERS[name][1000]


@pytest.mark.parametrize("num_labels", [0, 1000])
def test_parameter_counts_with_another_head(num_labels):
    config = ConvNextConfig.preset("atto", num_labels=num_labels)
    model = ConvNextForImageClassification(config, implementation="plain")
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    assert count(shapes) == PARAMETERS["atto"][num_labels]


@pytest.mark.parametrize("name", PARAMETERS_V2)
def test_parameter_counts_of_v2(name):
    """No layer scale, and a gain and a bias for each hidden channel of the MLP."""
    config = ConvNextConfig.preset(name, num_labels=1000, model_type="convnextv2")
    blocks = sum(d * c for d, c in zip(config.depths, config.hidden_sizes, strict=True))
    assert PARAMETERS_V2[name] == PARAMETERS[name][1000] + (8 - 1) * blocks
    model = ConvNextForImageClassification(config, implementation="plain")
    if sum(config.depths) < 20:  # tracing the deep ones takes long
        assert (
            count(jax.eval_shape(model.init_variables, jax.random.key(0))) == (PARAMETERS_V2[name])
        )


def test_no_preset_is_untested():
    assert set(PARAMETERS) == set(PRESETS)


def test_initialisation():
    config = SMALL.replace(
        num_stages=1,
        depths=(1,),
        hidden_sizes=(64,),
        initializer_range=0.05,
        layer_scale_init_value=0.1,
    )
    variables = ConvNextForImageClassification(config).init_variables(jax.random.key(0))
    assert set(variables) == {"params"}
    for path, value in jax.tree.leaves_with_path(variables):
        name = path[-1].key
        assert value.dtype == jnp.float32
        if name == "kernel":
            deviation = np.std(value)
            assert abs(deviation / 0.05 - 1) < 4 / math.sqrt(2 * value.size)
            assert abs(np.mean(value)) < 4 * 0.05 / math.sqrt(value.size)
        else:
            expected = {"bias": 0.0, "scale": 1.0, "layer_scale_parameter": np.float32(0.1)}[name]
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_there_is_no_layer_scale_at_or_below_zero(value):
    model = ConvNextModel(SMALL.replace(layer_scale_init_value=value))
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    assert "layer_scale_parameter" not in shapes["params"]["encoder"]["stages_0"]["layers_0"]


def test_param_dtype_is_the_dtype_of_every_parameter():
    model = ConvNextForImageClassification(SMALL, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


# ------------------------------------------------------------------------------------------ outputs


def test_output_of_the_model():
    output = run(*small(ConvNextModel), output_hidden_states=True)
    assert list(output) == ["last_hidden_state", "pooler_output", "hidden_states"]
    assert output.last_hidden_state.shape == (2, 12, 4, 3)
    assert output.pooler_output.shape == (2, 12)
    assert [x.shape for x in output.hidden_states] == [(2, 8, 9, 6), (2, 8, 9, 6), (2, 12, 4, 3)]
    np.testing.assert_array_equal(output.hidden_states[-1], output.last_hidden_state)


def test_output_of_the_classifier():
    model, variables = small()
    output = run(model, variables, labels=jnp.array([0, 2]))
    assert list(output) == ["loss", "logits"]
    assert output.loss.shape == ()
    assert output.logits.shape == (2, 3)
    assert list(run(model, variables)) == ["logits"]
    network = ConvNextModel(SMALL, implementation="plain")
    features = run(network, {"params": variables["params"]["convnext"]})
    head = variables["params"]["classifier"]
    expected = features.pooler_output @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)


def test_output_of_the_backbone():
    config = SMALL.replace(out_features=["stem", "stage2"])
    model, variables = small(ConvNextBackbone, config)
    output = run(model, variables, output_hidden_states=True)
    assert list(output) == ["feature_maps", "hidden_states"]
    assert [x.shape for x in output.feature_maps] == [(2, 8, 9, 6), (2, 12, 4, 3)]
    assert len(output.hidden_states) == 3
    assert output.attentions is None
    # Each stage has a norm of its own, over channels.
    x = np.asarray(output.hidden_states[2], np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    norm = variables["params"]["hidden_states_norms_stage2"]
    expected = x * norm["scale"][:, None, None] + norm["bias"][:, None, None]
    np.testing.assert_allclose(output.feature_maps[1], expected, rtol=1e-4, atol=1e-4)


def test_properties_of_the_backbone():
    model = ConvNextBackbone(ConvNextConfig(out_indices=[0, -2]))
    assert model.stage_names == ("stem", "stage1", "stage2", "stage3", "stage4")
    assert model.out_features == ("stem", "stage3")
    assert model.out_indices == (0, -2)
    assert model.num_features == (96, 96, 192, 384, 768)
    assert model.channels == (96, 384)
    assert model.out_feature_channels == {
        "stem": 96, "stage1": 96, "stage2": 192, "stage3": 384, "stage4": 768,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_class", "lengths"),
    [(ConvNextModel, (2, 3)), (ConvNextForImageClassification, (1, 2)), (ConvNextBackbone, (1, 2))],
)
def test_plain_tuples(model_class, lengths):
    model, variables = small(model_class)
    for output_hidden_states, length in zip((False, True), lengths, strict=True):
        arguments = {"output_hidden_states": output_hidden_states}
        values = jax.eval_shape(
            lambda v, a=arguments: model.apply(v, PICTURES, return_dict=False, **a), variables
        )
        assert type(values) is tuple
        assert len(values) == length
        # The configuration gives what the call leaves open.
        config = SMALL.replace(return_dict=False, **arguments)
        defaults = jax.eval_shape(lambda v, c=config: model_class(c).apply(v, PICTURES), variables)
        assert type(defaults) is tuple
        assert len(defaults) == length


def test_without_labels_the_logits_are_the_pooled_features():
    model, variables = small(config=SMALL.replace(num_labels=0))
    assert set(variables["params"]) == {"convnext"}
    network = ConvNextModel(SMALL, implementation="plain")
    features = run(network, {"params": variables["params"]["convnext"]})
    np.testing.assert_array_equal(run(model, variables).logits, features.pooler_output)


def test_one_label_is_regression():
    model, variables = small(config=SMALL.replace(num_labels=1))
    labels = jnp.array([0.5, -1.0])
    output = run(model, variables, labels=labels)
    assert output.logits.shape == (2, 1)
    expected = np.mean((output.logits[:, 0] - labels) ** 2)
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)


@pytest.mark.parametrize("model_class", [ConvNextModel, ConvNextBackbone])
def test_both_data_formats_give_the_same(model_class):
    model, variables = small(model_class)
    first = run(model, variables, output_hidden_states=True)
    last = run(
        model.clone(data_format="channels_last"),
        variables,
        PICTURES.transpose(0, 2, 3, 1),
        output_hidden_states=True,
    )
    assert jax.tree.structure(first) == jax.tree.structure(last)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
        a = a.transpose(0, 2, 3, 1) if a.ndim == 4 else a
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


# -------------------------------------------------------------------------------- sizes, bad input


def test_what_does_not_fill_a_patch_is_left_out():
    model, variables = small(ConvNextModel)
    whole = run(model, variables, PICTURES)
    cut = run(model, variables, PICTURES[:, :, :, :12])
    np.testing.assert_allclose(whole.pooler_output, cut.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (33, 47)])
def test_any_size_from_one_stride_of_the_network(size):
    model, variables = small(ConvNextModel)
    shapes = jax.eval_shape(model.apply, variables, jnp.zeros((1, 3, *size)))
    assert shapes.last_hidden_state.shape == (1, 12, size[0] // 4, size[1] // 4)


@pytest.mark.parametrize(
    ("size", "parts"),
    [((3, 20), ["stage 2", "1x10", "2x2"]), ((20, 1), ["the picture", "20x1", "2x2"])],
)
def test_a_picture_that_is_too_small(size, parts):
    model, variables = small()
    with pytest.raises(InputError) as error:
        model.apply(variables, jnp.zeros((1, 3, *size)))
    assert_one_line(error, *parts, "larger pictures")


@pytest.mark.parametrize(
    ("pictures", "parts"),
    [
        (None, ["pixel_values is missing"]),
        (np.zeros((1, 3, 16, 16), np.uint8), ["uint8", "ConvNextImageProcessor"]),
        (np.zeros((1, 3, 16, 16), int), ["float pictures"]),
        (np.zeros((1, 1, 16, 16), np.float32), ["(1, 1, 16, 16)", "3 channels", "num_channels"]),
        (np.zeros((1, 16, 16, 3), np.float32), ["(1, 16, 16, 3)", "channels, height, width"]),
        (np.zeros((3, 16, 16), np.float32), ["(3, 16, 16)", "(batch, channels, height, width)"]),
    ],
)
@pytest.mark.parametrize("model_class", [ConvNextForImageClassification, ConvNextBackbone])
def test_pictures_that_the_model_does_not_take(model_class, pictures, parts):
    model, variables = small(model_class)
    with pytest.raises(InputError) as error:
        model.apply(variables, pictures)
    assert_one_line(error, *parts)


def test_pictures_in_the_other_data_format():
    model, variables = small(data_format="channels_last")
    with pytest.raises(InputError) as error:
        model.apply(variables, PICTURES)
    assert_one_line(error, "(batch, height, width, channels)", "channels_last")


def test_an_unknown_data_format():
    model = ConvNextModel(SMALL, data_format="NHWC")
    with pytest.raises(InputError, match=r"'NHWC'.*'channels_first'"):
        model.init(jax.random.key(0), PICTURES)


def test_an_unknown_activation():
    model = ConvNextModel(SMALL.replace(hidden_act="gleu"))
    with pytest.raises(InputError, match="'gleu'"):
        jax.eval_shape(model.init, jax.random.key(0), PICTURES)


# ------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    exact = run(*small(), labels=jnp.array([0, 2]), output_hidden_states=True)
    model, variables = small(dtype=dtype)
    output = run(model, variables, labels=jnp.array([0, 2]), output_hidden_states=True)
    assert output.logits.dtype == dtype
    assert {x.dtype for x in output.hidden_states} == {jnp.dtype(dtype)}
    assert output.loss.dtype == jnp.float32
    for a, b in zip(output.hidden_states, exact.hidden_states, strict=True):
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert 0 < error < 16 * float(jnp.finfo(dtype).eps)


def test_half_precision_parameters_and_pictures():
    model, variables = small(param_dtype=jnp.bfloat16)
    output = run(model, variables, PICTURES.astype(jnp.bfloat16), output_hidden_states=True)
    assert {x.dtype for x in output.hidden_states} == {jnp.dtype(jnp.bfloat16)}
    # With pictures in f32, everything is promoted.
    assert run(model, variables, PICTURES).logits.dtype == jnp.float32


def norm(x, epsilon):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def expected_pooled(output, variables, epsilon):
    scale, bias = (
        np.asarray(variables["params"]["layernorm"][k], np.float64) for k in ("scale", "bias")
    )
    pooled = np.asarray(output.last_hidden_state, np.float64).mean((2, 3))
    return norm(pooled, epsilon) * scale + bias


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_final_norm_is_in_f32(dtype):
    model, variables = small(ConvNextModel, dtype=dtype)
    output = run(model, variables)
    assert output.pooler_output.dtype == jnp.float32
    expected = expected_pooled(output, variables, SMALL.layer_norm_eps)
    np.testing.assert_allclose(output.pooler_output, expected, rtol=1e-5, atol=1e-5)


def test_the_final_norm_has_the_epsilon_of_the_configuration():
    model, variables = small(ConvNextModel, SMALL.replace(layer_norm_eps=0.5))
    output = run(model, variables)
    np.testing.assert_allclose(
        output.pooler_output, expected_pooled(output, variables, 0.5), rtol=1e-4, atol=1e-5
    )


def test_the_variance_of_the_final_norm_does_not_cancel():
    """Features around 1000 with a deviation near 1: E[x²] - E[x]² is wrong by percents in f32."""
    config = SMALL.replace(num_stages=1, depths=(1,), hidden_sizes=(8,))
    model, variables = small(ConvNextModel, config)
    params = variables["params"]
    params["embeddings"]["layernorm"]["bias"] = 1000 + jnp.linspace(-1.5, 1.5, 8)
    params["encoder"]["stages_0"]["layers_0"]["layer_scale_parameter"] = jnp.zeros(8)
    output = run(model, variables)
    expected = expected_pooled(output, variables, SMALL.layer_norm_eps)
    np.testing.assert_allclose(output.pooler_output, expected, rtol=0, atol=2e-3)


def test_f64():
    with jax.enable_x64(True):
        model, variables = small(param_dtype=jnp.float64)
        pictures = PICTURES.astype(np.float64)
        output = run(model, variables, pictures, labels=jnp.array([0, 2]))
        assert (output.logits.dtype, output.loss.dtype) == (jnp.float64, jnp.float64)
        # Both forms of the depthwise convolution agree to f64's own precision.
        other = run(model.clone(implementation=None), variables, pictures)
        np.testing.assert_allclose(output.logits, other.logits, rtol=1e-12, atol=1e-12)
        gradients = jax.eval_shape(
            jax.grad(lambda v: model.apply(v, pictures, labels=jnp.array([0, 2])).loss), variables
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float64)}


# ----------------------------------------------------------------------------------------- families


def global_response_norm(x, scale, bias):
    """Algorithm 1 of the ConvNeXt V2 paper, one picture and channel at a time."""
    result = np.empty_like(x)
    for n, picture in enumerate(x):
        norms = [math.sqrt((picture[:, :, c] ** 2).sum()) for c in range(x.shape[-1])]
        for c, own in enumerate(norms):
            gain = own / (sum(norms) / len(norms) + 1e-6)
            result[n, :, :, c] = scale[c] * picture[:, :, c] * gain + bias[c] + picture[:, :, c]
    return result


def test_global_response_norm():
    x = RNG.standard_normal((2, 5, 3, 6))
    params = {"scale": RNG.standard_normal(6), "bias": RNG.standard_normal(6)}
    with jax.enable_x64(True):
        result = modeling.GlobalResponseNorm(SMALL).apply({"params": params}, x)
    np.testing.assert_allclose(result, global_response_norm(x, **params), rtol=1e-12)


def test_global_response_norm_starts_as_the_identity():
    x = RNG.standard_normal((2, 5, 3, 6)).astype(np.float32)
    result, variables = modeling.GlobalResponseNorm(SMALL).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(result, x)
    assert {k: v.shape for k, v in variables["params"].items()} == {"scale": (6,), "bias": (6,)}


def test_the_gradient_of_a_channel_that_is_zero_everywhere_is_finite():
    x = RNG.standard_normal((1, 4, 4, 3)).astype(np.float32)
    x[..., 1] = 0
    params = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
    module = modeling.GlobalResponseNorm(SMALL)
    gradient = jax.grad(lambda x: module.apply({"params": params}, x).sum())(x)
    np.testing.assert_array_equal(gradient[..., 1], 1)  # only the residual path
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_global_response_norm_in_half_precision(dtype):
    """Sums of squares beyond f16's range: 64 x 64 values near 40."""
    x = 40 + RNG.standard_normal((1, 64, 64, 4))
    params = {"scale": np.ones(4), "bias": np.zeros(4)}
    result = modeling.GlobalResponseNorm(SMALL, dtype=dtype).apply({"params": params}, x)
    assert result.dtype == dtype
    np.testing.assert_allclose(
        result.astype(np.float32), global_response_norm(x, **params), rtol=0.02
    )


def test_v2_has_global_response_norms_and_no_layer_scale():
    model, variables = small(ConvNextModel, SMALL.replace(model_type="convnextv2"))
    block = variables["params"]["encoder"]["stages_1"]["layers_0"]
    assert set(block) == {"dwconv", "layernorm", "pwconv1", "grn", "pwconv2"}
    assert block["grn"]["scale"].shape == (48,)
    assert np.isfinite(run(model, variables).pooler_output).all()


def test_an_isotropic_network_has_one_stage_and_no_norm_after_the_stem():
    config = ConvNextConfig(
        model_type="convnext_isotropic", depths=(2,), hidden_sizes=(12,), num_labels=3
    )
    assert (config.patch_size, config.num_stages, config.layer_norm_eps) == (16, 1, 1e-6)
    model, variables = small(config=config)
    network = variables["params"]["convnext"]
    assert set(network["embeddings"]) == {"patch_embeddings"}
    assert set(network["encoder"]["stages_0"]) == {"layers_0", "layers_1"}
    pictures = RNG.standard_normal((2, 3, 40, 33)).astype(np.float32)
    maps = run(model, variables, pictures, output_hidden_states=True).hidden_states
    assert [x.shape for x in maps] == [(2, 12, 2, 2)] * 2
    patches = pictures[:, :, :32, :32].reshape(2, 3, 2, 16, 2, 16)
    stem = network["embeddings"]["patch_embeddings"]
    expected = np.einsum("nciajb,abcd->ndij", patches, stem["kernel"])
    expected += np.asarray(stem["bias"])[:, None, None]
    np.testing.assert_allclose(maps[0], expected, rtol=1e-4, atol=1e-4)


def test_a_backbone_of_dinov3_returns_maps_as_they_are_and_counts_the_picture():
    config = SMALL.replace(
        model_type="dinov3_convnext", patch_size=4, out_features=("stem", "stage1")
    )
    model, variables = small(ConvNextBackbone, config)
    assert set(variables["params"]) == {"embeddings", "encoder"}
    assert (model.num_features, model.channels) == ((3, 8, 12), (3, 8))
    output = run(model, variables, output_hidden_states=True)
    np.testing.assert_array_equal(output.feature_maps[0], PICTURES)
    np.testing.assert_array_equal(output.feature_maps[1], output.hidden_states[1])


# ---------------------------------------------------------------------------------------- drop path

# One stage of maps of 1x1: all samples are cheap, and a block's input is the output before it.
DROPPING = ConvNextConfig(
    num_stages=1,
    depths=(6,),
    hidden_sizes=(4,),
    patch_size=2,
    image_size=2,
    layer_scale_init_value=1.0,
    drop_path_rate=0.5,
)
COUNT = 8000


def block_outputs(model, variables, train, key, pictures):
    """Each block's input and output: (blocks + 1, samples, channels)."""
    _, seen = jit(
        lambda v, x: model.apply(
            v,
            x,
            train=train,
            rngs={"drop_path": key},
            capture_intermediates=lambda m, _: isinstance(
                m, modeling.LayerNorm | modeling.ConvNextLayer
            ),
            mutable="intermediates",
        )
    )(variables, pictures)
    seen = seen["intermediates"]
    blocks = seen["encoder"]["stages_0"]
    maps = [seen["embeddings"]["layernorm"]] + [blocks[f"layers_{j}"] for j in range(6)]
    return np.stack([x["__call__"][0].reshape(len(pictures), -1) for x in maps])


@pytest.fixture(scope="module")
def dropped():
    """Which block was left out for which sample: (blocks, samples)."""
    model, variables = small(ConvNextModel, DROPPING)
    pictures = np.random.default_rng(1).standard_normal((COUNT, 3, 2, 2)).astype(np.float32)
    x = block_outputs(model, variables, True, jax.random.key(0), pictures)
    return (x[1:] == x[:-1]).all(-1)


def test_drop_path_has_the_linear_rates(dropped):
    rates = np.linspace(0, 0.5, 6)
    np.testing.assert_allclose(drop_path_rates(DROPPING)[0], rates)
    assert not dropped[0].any()
    deviations = np.sqrt(rates * (1 - rates) / COUNT)
    assert (np.abs(dropped.mean(1) - rates)[1:] < 4 * deviations[1:]).all()


def test_drop_path_is_independent_between_blocks(dropped):
    correlations = np.corrcoef(dropped[1:])
    others = correlations[~np.eye(5, dtype=bool)]
    assert np.abs(others).max() < 4 / math.sqrt(COUNT)


def test_drop_path_is_independent_between_samples(dropped):
    for lag in (1, 2, COUNT // 2):
        for row in dropped[1:]:
            correlation = np.corrcoef(row[lag:], row[:-lag])[0, 1]
            assert abs(correlation) < 4 / math.sqrt(COUNT - lag)


def test_drop_path_keeps_the_expectation():
    layer = modeling.ConvNextLayer(DROPPING, drop_path_rate=0.3, implementation="plain")
    x = np.random.default_rng(1).standard_normal((1, 1, 1, 4)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.3) + jnp.arange(leaf.shape[-1]) * 0.1,
        jax.eval_shape(layer.init, jax.random.key(0), x),
    )
    exact = layer.apply(variables, x) - x
    many = np.repeat(x, COUNT, 0)
    seen = layer.apply(variables, many, train=True, rngs={"drop_path": jax.random.key(0)}) - many
    kept = np.asarray(seen != 0).all((1, 2, 3))
    np.testing.assert_allclose(seen[kept], np.repeat(exact / 0.7, kept.sum(), 0), rtol=1e-4)
    relative = np.asarray(seen.mean(0) / exact[0])
    assert np.abs(relative - 1).max() < 4 * math.sqrt(0.3 / 0.7 / COUNT)


def test_drop_path_is_off_in_evaluation():
    model, variables = small(ConvNextModel, SMALL.replace(drop_path_rate=0.9))
    plain, _ = small(ConvNextModel)
    expected = run(plain, variables).pooler_output
    np.testing.assert_array_equal(run(model, variables).pooler_output, expected)
    np.testing.assert_array_equal(
        run(model, variables, train=False, rngs={"drop_path": jax.random.key(0)}).pooler_output,
        expected,
    )


def test_drop_path_needs_a_key_when_there_is_something_to_drop():
    model, variables = small(config=SMALL.replace(drop_path_rate=0.5))
    for arguments in ({}, {"rngs": {"dropout": jax.random.key(0)}}):
        with pytest.raises(InputError) as error:
            model.apply(variables, PICTURES, train=True, **arguments)
        assert_one_line(error, "drop_path_rate=0.5", 'rngs={"drop_path": key}')
    model, variables = small()
    jax.eval_shape(lambda v: model.apply(v, PICTURES, train=True), variables)


def test_drop_path_follows_the_key():
    model, variables = small(ConvNextModel, SMALL.replace(drop_path_rate=0.5))
    pictures = np.repeat(PICTURES, 8, 0)
    step = jit(lambda key: model.apply(variables, pictures, train=True, rngs={"drop_path": key}))
    first, again, other = (step(jax.random.key(seed)).pooler_output for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_drop_path_is_that_of_a_look_inside():
    model, variables = small(ConvNextModel, SMALL.replace(drop_path_rate=0.5))
    pictures, rngs = np.repeat(PICTURES, 8, 0), {"drop_path": jax.random.key(0)}
    seen = run(model, variables, pictures, train=True, rngs=rngs)
    looked, _ = run(model, variables, pictures, train=True, rngs=rngs, mutable="intermediates")
    np.testing.assert_allclose(looked.pooler_output, seen.pooler_output, rtol=1e-5, atol=1e-6)


def test_drop_path_does_not_depend_on_the_number_of_devices():
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from convnext_jax import ConvNextConfig, ConvNextForImageClassification
        assert jax.device_count() == 4
        config = ConvNextConfig(num_stages=2, depths=(1, 2), hidden_sizes=(4, 6), patch_size=2,
                                image_size=8, layer_scale_init_value=1.0, drop_path_rate=0.6)
        pictures = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
        labels = np.arange(16) % 2
        key = jax.random.key(5)
        one = ConvNextForImageClassification(config, implementation="plain")
        variables = jax.tree.map(lambda leaf: jnp.linspace(0.1, 0.6, leaf.size).reshape(leaf.shape),
                                 jax.eval_shape(one.init_variables, key))

        def step(model, variables, pictures, labels):
            def loss(v):
                output = model.apply(v, pictures, labels, train=True, rngs={"drop_path": key})
                return output.loss, output.logits
            gradients, logits = jax.grad(loss, has_aux=True)(variables)
            if model.axis_name:
                gradients = jax.lax.pmean(gradients, model.axis_name)
            return logits, gradients

        def close(a, b):
            return all(np.allclose(x, y, rtol=1e-4, atol=1e-5)
                       for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

        expected = jax.jit(lambda *a: step(one, *a))(variables, pictures, labels)
        many = one.clone(axis_name="batch")
        split = lambda x: x.reshape(4, 4, *x.shape[1:])
        run = jax.pmap(lambda *a: step(many, *a), "batch", in_axes=(None, 0, 0))
        logits, gradients = run(variables, split(pictures), split(labels))
        assert close((logits.reshape(16, -1), jax.tree.map(lambda g: g[0], gradients)), expected)

        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        run = jax.jit(jax.shard_map(lambda *a: step(many, *a), mesh=mesh, check_vma=False,
                                    in_specs=(P(), P("batch"), P("batch")),
                                    out_specs=(P("batch"), P())))
        assert close(run(variables, pictures, labels), expected)

        # Without the axis every device draws the mask of its own small batch: another result.
        run = jax.pmap(lambda *a: step(one, *a)[0], "batch", in_axes=(None, 0, 0))
        logits = run(variables, split(pictures), split(labels))
        assert not close(logits.reshape(16, -1), expected[0])
    """
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------ inside other people's programs


class Segmenter(nn.Module):
    """Somebody's module around a backbone, with parts made in `setup`."""

    def setup(self):
        config = SMALL.replace(out_features=["stage1", "stage2"], drop_path_rate=0.1)
        self.backbone = ConvNextBackbone(
            config, data_format="channels_last", implementation="plain"
        )
        self.heads = [nn.Conv(1, (1, 1)) for _ in range(2)]

    def __call__(self, x, train=False):
        maps = self.backbone(x, train=train).feature_maps
        shape = (*x.shape[:3], 1)
        maps = (head(y) for head, y in zip(self.heads, maps, strict=True))
        return sum(jax.image.resize(y, shape, "nearest") for y in maps)


class Regressor(nn.Module):
    """Somebody's compact module around the model, which is given to it."""

    network: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        output = self.network(x.transpose(0, 3, 1, 2), output_hidden_states=True, train=train)
        stem = output.hidden_states[0].mean((2, 3))
        return nn.Dense(1)(jnp.concatenate([stem, output.pooler_output], -1))


@pytest.mark.parametrize("kind", ["backbone", "model"])
def test_trains_inside_somebody_elses_module(kind):
    x = np.random.default_rng(0).standard_normal((8, 16, 16, 3)).astype(np.float32)
    config = SMALL.replace(drop_path_rate=0.1)
    if kind == "backbone":
        model, target = Segmenter(), (x.sum(-1, keepdims=True) > 0).astype(np.float32)
    else:
        model = Regressor(ConvNextModel(config, implementation="plain"))
        target = 3 * x.mean((1, 2))[:, :1] + 1
    optimizer = optax.adam(3e-3)

    @jit
    def step(variables, state, key):
        def loss(v):
            y = model.apply(v, x, train=True, rngs={"drop_path": key})
            return jnp.mean((y - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state, value

    variables = random_like_init(model, x)
    state, losses = optimizer.init(variables), []
    for i in range(40):
        variables, state, value = step(variables, state, jax.random.key(i))
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def random_like_init(model, x):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return jax.tree.map_with_path(
        lambda path, leaf: (
            jnp.ones(leaf.shape)
            if path[-1].key in ("scale", "layer_scale_parameter")
            else jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)
        ),
        shapes,
    )


def test_the_parameters_of_a_part_have_the_names_of_the_whole():
    shapes = jax.eval_shape(Segmenter().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    config = SMALL.replace(out_features=["stage1", "stage2"])
    alone = jax.eval_shape(ConvNextBackbone(config).init_variables, jax.random.key(0))
    assert jax.tree.structure(shapes["params"]["backbone"]) == jax.tree.structure(alone["params"])


def test_vmap_over_seeds():
    config = SMALL.replace(num_stages=1, depths=(1,), hidden_sizes=(8,))
    model = ConvNextForImageClassification(config, implementation="plain")
    keys = jax.random.split(jax.random.key(0), 3)
    many = jit(jax.vmap(model.init, in_axes=(0, None)))(keys, PICTURES)
    outputs = jit(jax.vmap(lambda v: model.apply(v, PICTURES)))(many)
    assert outputs.logits.shape == (3, 2, 3)
    one = jit(model.init)(keys[1], PICTURES)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a[1], b)
    expected = run(model, one).logits
    np.testing.assert_allclose(outputs.logits[1], expected, rtol=1e-4, atol=1e-6)


def test_outputs_pass_through_vmap_and_the_default_implementation():
    model, variables = small(ConvNextModel, implementation=None)
    together = run(model, variables)
    rows = jit(jax.vmap(lambda x: model.apply(variables, x[None])))(PICTURES)
    assert type(rows) is type(together)
    np.testing.assert_allclose(
        rows.pooler_output[:, 0], together.pooler_output, rtol=1e-4, atol=1e-4
    )


def training_loss(model, variables):
    labels, rngs = jnp.array([0, 2]), {"drop_path": jax.random.key(0)}
    return model.apply(variables, PICTURES, labels, False, True, True, rngs=rngs).loss


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("by", ["attribute", "wrapper"])
def test_remat_gives_the_same_gradients(by, implementation):
    config = SMALL.replace(drop_path_rate=0.5)
    _, variables = small(config=config)
    model = ConvNextForImageClassification(config, implementation=implementation)
    wrapped = nn.remat(ConvNextForImageClassification, static_argnums=(3, 4, 5))
    remat = model.clone(remat=True) if by == "attribute" else wrapped(config)
    plain, again = (
        jit(jax.grad(lambda v, model=model: training_loss(model, v)))(variables)
        for model in (model, remat)
    )
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("remat", "kept"), [(False, 1 + 1 + 4), (True, 1)])
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
def test_what_a_block_keeps_for_its_gradient(layer_scale, remat, kept):
    # Its input, the convolution's map and the hidden layer of four times the width; or the input.
    def bytes_kept(blocks):
        config = SMALL.replace(
            num_stages=1, depths=(blocks,), hidden_sizes=(8,), drop_path_rate=0.5,
            layer_scale_init_value=layer_scale, hidden_act="gelu",
        )  # fmt: skip
        model, variables = small(config=config)
        backward = jax.vjp(lambda v: training_loss(model.clone(remat=remat), v), variables)[1]
        parameters = sum(x.nbytes for x in jax.tree.leaves(variables))
        return sum(x.nbytes for x in jax.tree.leaves(backward)) - parameters

    one_map = 4 * len(PICTURES) * 9 * 6 * 8
    assert bytes_kept(3) - bytes_kept(2) == pytest.approx(kept * one_map, abs=0.1 * one_map)


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("model_type", ["convnext", "convnextv2"])
def test_scanned_blocks_are_the_blocks(model_type, remat, implementation):
    config = SMALL.replace(
        model_type=model_type, depths=(2, 3), drop_path_rate=0.5,
        layer_scale_init_value=0.0 if model_type == "convnextv2" else 1.0,
    )  # fmt: skip
    model, variables = small(config=config, implementation=implementation, remat=remat)
    scanned = model.clone(scan=True)
    assert jax.tree.structure(scanned.init_variables(jax.random.key(0))) == jax.tree.structure(
        variables
    )
    loss, gradients = jit(jax.value_and_grad(lambda v: training_loss(model, v)))(variables)
    loop_loss, loop_gradients = jit(jax.value_and_grad(lambda v: training_loss(scanned, v)))(
        variables
    )
    np.testing.assert_allclose(loop_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(loop_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        run(scanned, variables).logits, run(model, variables).logits, rtol=1e-5, atol=1e-6
    )
    plain = scanned.clone(implementation="plain")  # the others have loops of their own
    loops = str(jax.make_jaxpr(lambda v: plain.apply(v, PICTURES))(variables)).count("scan[")
    assert loops == 2


@pytest.mark.parametrize("train", [False, True])
def test_equal_blocks_are_lowered_once(train):
    def functions(blocks):
        config = SMALL.replace(depths=(1, blocks), drop_path_rate=0.5)
        model = ConvNextForImageClassification(config)
        variables = jax.eval_shape(model.init_variables, jax.random.key(0))

        def loss(variables):
            rngs = {"drop_path": jax.random.key(0)}
            return model.apply(variables, PICTURES, jnp.array([0, 2]), train=train, rngs=rngs).loss

        program = jax.jit(jax.grad(loss)).lower(variables).as_text()
        return program.count("func.func private @_block"), program.count("call @_block")

    # One block of the first stage and those of the second, each forward and backward.
    assert functions(2) == (4, 2 * (1 + 2))
    assert functions(5) == (4, 2 * (1 + 5))


@pytest.mark.parametrize("mutable", [False, ["intermediates"]])
def test_blocks_are_computed_again_for_their_gradients(mutable):
    model, variables = small(remat=True)

    def loss(params):
        output = model.apply({"params": params}, PICTURES, mutable=mutable)
        return (output[0] if mutable else output).logits.sum()

    assert "remat" in str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))


def test_parameters_of_a_network_with_fewer_blocks():
    _, variables = small(config=SMALL.replace(depths=(1, 1)))
    model = ConvNextForImageClassification(SMALL.replace(depths=(1, 3)))
    with pytest.raises(InputError, match=r"encoder/stages_1 lack layers_1, layers_2.*\(1, 3\)"):
        model.apply(variables, PICTURES)


def test_scanned_blocks_ask_for_the_key_too():
    model, variables = small(config=SMALL.replace(drop_path_rate=0.5), scan=True)
    with pytest.raises(InputError, match=r"drop_path_rate=0\.5 needs a key"):
        model.apply(variables, PICTURES, train=True)


def test_layer_scale_has_the_same_gradient_within_the_kernel_and_after_it():
    with jax.enable_x64(True):
        _, variables = small(config=SMALL.replace(drop_path_rate=0.0, layer_scale_init_value=0.7))
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        model = ConvNextForImageClassification(SMALL.replace(drop_path_rate=0.0))
        pictures, labels = jnp.asarray(PICTURES, jnp.float64), jnp.array([0, 2])
        within, after = (
            jax.grad(lambda v, train=train: model.apply(v, pictures, labels, train=train).loss)(
                variables
            )
            for train in (True, False)
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(within), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14, err_msg=str(path))


def test_forward_mode_and_hessians_with_the_plain_implementation():
    model, variables = small()
    scale = ("convnext", "encoder", "stages_0", "layers_0", "layer_scale_parameter")

    def loss(value, implementation="plain"):
        params = jax.tree.map_with_path(
            lambda path, leaf: value if tuple(k.key for k in path) == scale else leaf,
            variables["params"],
        )
        labels = jnp.array([0, 2])
        return model.clone(implementation=implementation).apply(
            {"params": params}, PICTURES, labels
        ).loss  # fmt: skip

    value = jnp.linspace(0.5, 1.5, 8)
    direction = jnp.linspace(-1, 1, 8)
    gradient, slope = jit(
        lambda value: (jax.grad(loss)(value), jax.jvp(loss, (value,), (direction,))[1])
    )(value)
    np.testing.assert_allclose(slope, gradient @ direction, rtol=1e-3, atol=1e-5)
    hessian = jit(jax.hessian(loss))(value)
    assert np.isfinite(hessian).all()
    assert np.abs(hessian).max() > 0
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda value: loss(value, None), (value,), (direction,))


def test_a_model_is_hashable_and_static_under_jit():
    @jax.jit
    def shape(pictures):
        return jax.eval_shape(model.apply, variables, pictures).logits.shape[1] * jnp.ones(())

    model, variables = small()
    assert shape(PICTURES) == 3
    assert hash(model) == hash(ConvNextForImageClassification(SMALL, implementation="plain"))
    assert model == ConvNextForImageClassification(SMALL, implementation="plain")


# --------------------------------------------------------------------------- what imports what

ROOT = Path(convnext_jax.__file__).parent
CORE = ["jax", "flax", "numpy"]
# What each part may import.
ARROWS = {
    "errors.py": [],
    "outputs.py": ["jax", "flax"],
    "configuration.py": [*CORE, "convnext_jax.errors"],
    "losses.py": [*CORE, "convnext_jax.errors", "convnext_jax.configuration"],
    "ops": [*CORE, "convnext_jax.errors", "convnext_jax.ops"],
    "modeling.py": [
        *CORE,
        *(f"convnext_jax.{name}" for name in ("errors", "ops", "outputs", "losses")),
        "convnext_jax.configuration",
    ],
    "image": [*CORE, "PIL", "convnext_jax.errors", "convnext_jax.image"],
    "checkpoints": [
        *CORE,
        "safetensors",
        "huggingface_hub",
        *(f"convnext_jax.{name}" for name in ("errors", "configuration", "checkpoints")),
    ],
}


# What it may import inside a function, where only those who call that function need it.
INSIDE_FUNCTIONS = {
    "configuration.py": ["convnext_jax.checkpoints"],
    "modeling.py": ["convnext_jax.checkpoints"],
    "image": ["convnext_jax.checkpoints", "torch", "tensorflow"],
    "checkpoints": ["torch", "h5py", "convnext_jax.image"],
}


def imports_of(tree):
    """Every module imported below this node: `from a import b` is "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", ARROWS)
def test_imports_run_one_way(part):
    path = ROOT / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        tree = ast.parse(file.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = {name for function in functions for name in imports_of(function)}
        for name in imports_of(tree):
            allowed = ARROWS[part] + (INSIDE_FUNCTIONS.get(part, []) if name in inside else [])
            known = name.split(".")[0] in sys.stdlib_module_names
            assert known or any(f"{name}.".startswith(f"{start}.") for start in allowed), (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_importing_the_package_reads_no_checkpoint_or_training_code():
    code = (
        "import sys, convnext_jax; "
        "print([m for m in sys.modules if m.startswith('convnext_jax.') and "
        "m.split('.')[1] in ('checkpoints', 'data', 'training', 'cli')], "
        "[m for m in ('torch', 'transformers', 'grain', 'ml_collections', 'matplotlib', "
        "'sklearn', 'safetensors', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == "[] []"
