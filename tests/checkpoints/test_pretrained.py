import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from convnext_jax import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    InputError,
)
from convnext_jax.checkpoints import files, pretrained

SMALL = ConvNextConfig(
    num_stages=2, depths=(1, 2), hidden_sizes=(4, 6), num_labels=3, image_size=16, patch_size=2
)
MODELS = [ConvNextModel, ConvNextForImageClassification, ConvNextBackbone]


def random_variables(model, dtype=None):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype or leaf.dtype), shapes
    )


def assert_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """A classifier's checkpoint."""
    model = ConvNextForImageClassification(SMALL)
    model.save_pretrained(tmp_path / "model", random_variables(model))
    return tmp_path / "model"


# -------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bit_equal(model_class, dtype, tmp_path):
    model = model_class(SMALL.replace(out_features=["stem", "stage2"]), param_dtype=dtype)
    variables = random_variables(model)
    model.save_pretrained(tmp_path / "new" / "folder", variables)
    again, loaded = model_class.from_pretrained(tmp_path / "new" / "folder", param_dtype=dtype)
    assert_equal(loaded, variables)
    assert again.config == model.config.replace(
        architectures=(model_class.__name__,), torch_dtype=jnp.dtype(dtype).name
    )
    assert sorted(contents(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


def test_round_trip_in_f64(tmp_path):
    with jax.enable_x64(True):
        model = ConvNextModel(SMALL, param_dtype=jnp.float64)
        variables = random_variables(model)
        model.save_pretrained(tmp_path, variables)
        assert_equal(ConvNextModel.from_pretrained(tmp_path, param_dtype=jnp.float64)[1], variables)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_param_dtype_is_the_dtype_of_the_result(folder, dtype):
    loaded = ConvNextForImageClassification.from_pretrained(folder, param_dtype=dtype)[1]
    expected = random_variables(ConvNextForImageClassification(SMALL))
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(dtype), expected))


def test_options_reach_the_model_and_the_configuration(folder):
    model, _ = ConvNextModel.from_pretrained(
        folder,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        precision="highest",
        implementation="plain",
        data_format="channels_last",
        drop_path_rate=0.25,
    )
    assert (model.dtype, model.param_dtype, model.precision) == (
        jnp.bfloat16,
        jnp.float16,
        "highest",
    )
    assert (model.implementation, model.data_format) == ("plain", "channels_last")
    assert model.config.drop_path_rate == 0.25


def test_partitioned_variables_are_saved_as_what_they_hold(tmp_path):
    import flax.linen as nn

    model = ConvNextModel(SMALL)
    variables = random_variables(model)
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), variables)
    model.save_pretrained(tmp_path, boxed)
    assert_equal(ConvNextModel.from_pretrained(tmp_path)[1], variables)


# ----------------------------------------------------------------------------------- keys, layouts


def keys_of_a_classifier(depths):
    """The rules of Hugging Face's state dict, written down a second time."""

    def with_bias(*names):
        return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]

    keys = with_bias("embeddings.patch_embeddings", "embeddings.layernorm", "layernorm")
    for i, depth in enumerate(depths):
        if i > 0:
            keys += with_bias(
                f"encoder.stages.{i}.downsampling_layer.0",
                f"encoder.stages.{i}.downsampling_layer.1",
            )
        for j in range(depth):
            layer = f"encoder.stages.{i}.layers.{j}"
            parts = ("dwconv", "layernorm", "pwconv1", "pwconv2")
            keys += with_bias(*(f"{layer}.{part}" for part in parts))
            keys.append(f"{layer}.layer_scale_parameter")
    return [f"convnext.{key}" for key in keys] + with_bias("classifier")


def shapes_of(model):
    return jax.eval_shape(
        lambda key: {
            pretrained.key_of(path): pretrained.to_torch_layout(path, value)
            for path, value in pretrained.flatten_dict(model.init_variables(key)["params"]).items()
        },
        jax.random.key(0),
    )


def test_tiny_has_the_182_keys_of_hugging_face():
    config = ConvNextConfig.preset("tiny", num_labels=1000)
    keys = keys_of_a_classifier(config.depths)
    assert len(keys) == 182
    assert sorted(shapes_of(ConvNextForImageClassification(config))) == sorted(keys)

    base = [key.removeprefix("convnext.") for key in keys if key.startswith("convnext.")]
    assert sorted(shapes_of(ConvNextModel(config))) == sorted(base)

    backbone = ConvNextBackbone(config.replace(out_features=["stem", "stage3"]))
    norms = [
        f"hidden_states_norms.{n}.{leaf}" for n in ("stem", "stage3") for leaf in ("weight", "bias")
    ]
    body = [key for key in base if not key.startswith("layernorm.")]
    assert sorted(shapes_of(backbone)) == sorted(body + norms)


def test_tiny_has_the_shapes_of_hugging_face():
    shapes = shapes_of(ConvNextForImageClassification(ConvNextConfig.preset("tiny", num_labels=9)))
    expected = {
        "convnext.embeddings.patch_embeddings.weight": (96, 3, 4, 4),
        "convnext.encoder.stages.1.downsampling_layer.0.weight": (96,),
        "convnext.encoder.stages.1.downsampling_layer.1.weight": (192, 96, 2, 2),
        "convnext.encoder.stages.2.layers.8.layer_scale_parameter": (384,),
        "convnext.encoder.stages.2.layers.8.dwconv.weight": (384, 1, 7, 7),
        "convnext.encoder.stages.2.layers.8.layernorm.bias": (384,),
        "convnext.encoder.stages.2.layers.8.pwconv1.weight": (1536, 384),
        "convnext.encoder.stages.2.layers.8.pwconv2.weight": (384, 1536),
        "convnext.layernorm.weight": (768,),
        "classifier.weight": (9, 768),
        "classifier.bias": (9,),
    }
    assert {key: shapes[key].shape for key in expected} == expected


def test_layouts():
    kernel = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)  # HWIO
    weight = pretrained.to_torch_layout(("dwconv", "kernel"), kernel)
    assert weight.shape == (7, 5, 2, 3)
    assert weight[6, 4, 1, 2] == kernel[1, 2, 4, 6]
    assert weight[6, 4, 0, 2] == kernel[0, 2, 4, 6]
    np.testing.assert_array_equal(pretrained.from_torch_layout(("kernel",), weight), kernel)
    matrix = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(pretrained.to_torch_layout(("kernel",), matrix), matrix.T)
    np.testing.assert_array_equal(pretrained.from_torch_layout(("kernel",), matrix.T), matrix)
    for leaf in ("scale", "bias", "layer_scale_parameter"):
        assert pretrained.to_torch_layout((leaf,), kernel) is kernel


def test_the_file_says_whose_layout_it_has(folder):
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


# --------------------------------------------------------------------- from one model into another


def test_a_classifier_loads_into_the_model_without_a_head(folder):
    _, loaded = ConvNextModel.from_pretrained(folder)
    expected = random_variables(ConvNextForImageClassification(SMALL))
    assert_equal(loaded["params"], expected["params"]["convnext"])


@pytest.mark.parametrize("saved", [ConvNextModel, ConvNextForImageClassification])
def test_a_backbone_names_its_new_norms(saved, tmp_path):
    model = saved(SMALL)
    model.save_pretrained(tmp_path, random_variables(model))
    with pytest.warns(UserWarning, match="newly initialised") as caught:
        _, loaded = ConvNextBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2"])
    assert len(caught) == 1
    for name in ("stem", "stage2"):
        for leaf in ("weight", "bias"):
            assert f"hidden_states_norms.{name}.{leaf}" in str(caught[0].message)
    params = loaded["params"]
    for name in ("hidden_states_norms_stem", "hidden_states_norms_stage2"):
        np.testing.assert_array_equal(params[name]["scale"], 1)
        np.testing.assert_array_equal(params[name]["bias"], 0)
    body = random_variables(model)["params"]
    body = body.get("convnext", body)
    assert_equal(params["encoder"], body["encoder"])
    assert_equal(params["embeddings"], body["embeddings"])


def test_a_backbone_finds_its_own_norms_without_a_warning(tmp_path):
    model = ConvNextBackbone(SMALL)
    model.save_pretrained(tmp_path, random_variables(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(ConvNextBackbone.from_pretrained(tmp_path)[1], random_variables(model))


def test_a_head_of_another_width_is_not_replaced_unseen(folder):
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification.from_pretrained(folder, num_labels=5)
    assert_one_line(error, "classifier.weight (3, 6) instead of (5, 6)", "classifier.bias (3,)")


# --------------------------------------------------------------------------------------- bad files


def change_weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_one_error_lists_every_key_that_does_not_fit(folder):
    def change(state):
        del state["classifier.bias"]
        del state["convnext.encoder.stages.1.layers.0.dwconv.weight"]
        state["convnext.extra"] = np.zeros(1, np.float32)
        state["another"] = np.zeros(1, np.float32)
        state["convnext.layernorm.weight"] = np.zeros(7, np.float32)

    change_weights(folder, change)
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification.from_pretrained(folder)
    assert_one_line(
        error,
        str(folder / "model.safetensors"),
        "2 missing: ",
        "classifier.bias",
        "convnext.encoder.stages.1.layers.0.dwconv.weight",
        "2 unexpected: ",
        "another",
        "convnext.extra",
        "1 of the wrong shape: convnext.layernorm.weight (7,) instead of (6,)",
    )


def test_a_kernel_with_its_axes_in_another_order_is_of_the_wrong_shape(folder):
    def change(state):
        key = "convnext.encoder.stages.1.layers.0.pwconv1.weight"
        state[key] = np.ascontiguousarray(state[key].T)

    change_weights(folder, change)
    with pytest.raises(InputError, match=r"pwconv1.weight \(6, 24\) instead of \(24, 6\)"):
        ConvNextForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("model_class", [ConvNextModel, ConvNextBackbone])
def test_only_whole_parts_are_left_out(model_class, folder):
    change_weights(folder, lambda state: state.update({"head.weight": np.zeros(1, np.float32)}))
    with pytest.raises(InputError, match=r"1 unexpected: head.weight"):
        model_class.from_pretrained(folder)


def test_a_network_with_more_blocks_misses_their_keys(folder):
    with pytest.raises(InputError, match=r"9 missing: \S*stages\.1\.layers\.2\."):
        ConvNextModel.from_pretrained(folder, depths=(1, 3))


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_named_in_one_line(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification.from_pretrained(folder)
    assert_one_line(error, str(path), "not a complete safetensors file")


def test_a_missing_file_is_named_in_one_line(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification.from_pretrained(folder)
    assert_one_line(error, "model.safetensors", str(folder))


def test_another_architecture(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "convnextv2"}))
    with pytest.raises(InputError) as error:
        ConvNextModel.from_pretrained(folder)
    assert_one_line(error, "'convnextv2'", "another architecture", str(path))


def test_weights_of_another_architecture(folder):
    save_file({"conv1.weight": np.zeros((4, 3, 7, 7))}, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        ConvNextModel.from_pretrained(folder)
    assert_one_line(error, "unexpected: conv1.weight", "missing: embeddings.")


def test_an_unknown_option_is_kept_with_the_configuration(folder):
    # As in Hugging Face, where unknown keywords become attributes of the configuration.
    model, _ = ConvNextModel.from_pretrained(folder, note="kept")
    assert model.config.note == "kept"


# --------------------------------------------------------------------------- saving what cannot be


def test_nothing_is_overwritten_by_variables_of_another_network(folder):
    before = contents(folder)
    other = SMALL.replace(num_labels=4, drop_path_rate=0.5)
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification(other).save_pretrained(
            folder, random_variables(ConvNextForImageClassification(SMALL))
        )
    assert_one_line(error, "what is being saved", "classifier.weight (3, 6) instead of (4, 6)")
    assert contents(folder) == before


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_nothing_is_overwritten_when_writing_fails(folder, part, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    before = contents(folder)
    if part == "config.json":
        monkeypatch.setattr(ConvNextConfig, "save_pretrained", full)
    else:
        monkeypatch.setattr("safetensors.numpy.save_file", full)
    model = ConvNextForImageClassification(SMALL.replace(drop_path_rate=0.5))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder, jax.tree.map(jnp.zeros_like, random_variables(model)))
    assert contents(folder) == before


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("kept")
    model = ConvNextModel(SMALL)
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(InputError) as error:
            model.save_pretrained(path, random_variables(model))
        assert_one_line(error, str(path))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_callable_activation_is_refused_before_anything_is_written(folder):
    before = contents(folder)
    model = ConvNextForImageClassification(SMALL.replace(hidden_act=jnp.tanh))
    with pytest.raises(InputError, match="hidden_act"):
        model.save_pretrained(folder, random_variables(model))
    assert contents(folder) == before


def test_saving_over_an_older_checkpoint(folder):
    model = ConvNextForImageClassification(SMALL)
    ones = jax.tree.map(jnp.ones_like, random_variables(model))
    model.save_pretrained(folder, ones)
    assert_equal(ConvNextForImageClassification.from_pretrained(folder)[1], ones)
    shutil.copytree(folder, folder.parent / "copy")
    assert_equal(ConvNextForImageClassification.from_pretrained(folder.parent / "copy")[1], ones)


def test_safetensors_keep_their_dtypes(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.float16), "b": np.ones((2, 2), jnp.bfloat16)}
    files.write_safetensors(tmp_path / "file.safetensors", arrays)
    again = files.read_safetensors(tmp_path / "file.safetensors")
    assert {name: a.dtype for name, a in again.items()} == {n: a.dtype for n, a in arrays.items()}
