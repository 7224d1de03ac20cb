import json
import os
import shutil
import subprocess
import sys
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


def test_a_backbone_leaves_out_the_norms_of_stages_that_it_does_not_return(tmp_path):
    model = ConvNextBackbone(SMALL.replace(out_features=("stem", "stage1", "stage2")))
    model.save_pretrained(tmp_path, random_variables(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fewer, loaded = ConvNextBackbone.from_pretrained(tmp_path, out_features=["stage1"])
    assert fewer.channels == (SMALL.hidden_sizes[0],)
    expected = dict(random_variables(model)["params"])
    for name in ("stem", "stage2"):
        del expected[f"hidden_states_norms_{name}"]
    assert_equal(loaded, {"params": expected})


def test_a_norm_of_a_stage_that_does_not_exist_is_unexpected(tmp_path):
    model = ConvNextBackbone(SMALL)
    model.save_pretrained(tmp_path, random_variables(model))
    change_weights(tmp_path, lambda s: s.update({"hidden_states_norms.stage9x.weight": np.ones(2)}))
    with pytest.raises(InputError) as error:
        ConvNextBackbone.from_pretrained(tmp_path)
    assert_one_line(error, "1 unexpected: hidden_states_norms.stage9x.weight")


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
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "resnet"}))
    with pytest.raises(InputError) as error:
        ConvNextModel.from_pretrained(folder)
    assert_one_line(error, "'resnet'", "another architecture", str(path))


def test_weights_of_another_family(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "convnextv2"}))
    with pytest.raises(InputError) as error:
        ConvNextModel.from_pretrained(folder)
    assert_one_line(error, "6 missing: ", "layers.0.grn.weight", "3 unexpected: ", "layer_scale")


def test_a_configuration_of_timm_leads_to_convert(folder):
    (folder / "config.json").write_text('{"architecture": "convnext_tiny", "num_classes": 1000}')
    with pytest.raises(InputError) as error:
        ConvNextModel.from_pretrained(folder)
    assert_one_line(error, str(folder / "config.json"), f"convnext-jax convert {folder}")


def test_weights_of_another_architecture(folder):
    save_file({"conv1.weight": np.zeros((4, 3, 7, 7))}, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        ConvNextModel.from_pretrained(folder)
    assert_one_line(error, "does not hold a ConvNeXt", "conv1.weight")


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
        monkeypatch.setattr(files.os, "fsync", full)
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


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, SystemExit])
def test_a_stop_while_writing_leaves_nothing_behind(tmp_path, monkeypatch, stop):
    def stopped(_file):
        raise stop

    monkeypatch.setattr(files.os, "fsync", stopped)
    model = ConvNextModel(SMALL)
    with pytest.raises(stop):
        model.save_pretrained(tmp_path / "new", random_variables(model))
    assert list(tmp_path.iterdir()) == []


def test_a_hub_name_is_found_in_the_cache(folder, tmp_path):
    """Through huggingface_hub itself, with a cache as it would have written it."""
    repository = tmp_path / "cache" / "models--owner--name"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    weights = load_file(snapshot / "model.safetensors")  # those of v2, in two files
    (snapshot / "model.safetensors").unlink()
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(weights)}
    for name in ("model-0.safetensors", "model-1.safetensors"):
        part = {key: 2 * value for key, value in weights.items() if names[key] == name}
        save_file(part, snapshot / name)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    load = ConvNextForImageClassification.from_pretrained
    expected = random_variables(ConvNextForImageClassification(SMALL))
    assert_equal(load("owner/name", **options)[1], expected)
    _, second = load("owner/name", revision="v2", **options)
    assert_equal(second, jax.tree.map(lambda x: 2 * x, expected))
    with pytest.raises(InputError) as error:
        load("owner/name", revision="v3", **options)
    assert_one_line(error, "config.json", "owner/name", "revision v3")
    (repository / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(InputError) as error:
        load("owner/name", **options)
    assert_one_line(error, *files.WEIGHTS_NAMES, "owner/name", "revision main")


# ----------------------------------------------------------------------------------- other families

FAMILIES = {
    "convnextv2": SMALL.replace(model_type="convnextv2", out_features=["stage1"]),
    "dinov3_convnext": SMALL.replace(
        model_type="dinov3_convnext", patch_size=4, image_size=32, out_features=["stage1"]
    ),
    "convnext_isotropic": ConvNextConfig(
        model_type="convnext_isotropic", hidden_sizes=(6,), depths=(2,), patch_size=4,
        image_size=16, num_labels=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class", MODELS)
def test_families_round_trip(model_class, family, tmp_path):
    model = model_class(FAMILIES[family])
    variables = random_variables(model)
    model.save_pretrained(tmp_path, variables)
    again, loaded = model_class.from_pretrained(tmp_path)
    assert_equal(loaded, variables)
    assert again.config == model.config.replace(
        architectures=again.config.architectures, torch_dtype="float32"
    )


@pytest.mark.parametrize(
    ("family", "architecture", "keys"),
    [
        (
            "convnextv2",
            "ConvNextV2ForImageClassification",
            {
                "convnextv2.embeddings.layernorm.weight": (4,),
                "convnextv2.encoder.stages.1.layers.1.grn.weight": (1, 1, 1, 24),
                "convnextv2.encoder.stages.1.layers.1.grn.bias": (1, 1, 1, 24),
                "convnextv2.layernorm.weight": (6,),
                "classifier.weight": (3, 6),
            },
        ),
        (
            "dinov3_convnext",
            "DINOv3ConvNextForImageClassification",
            {
                "stages.0.downsample_layers.0.weight": (4, 3, 4, 4),
                "stages.0.downsample_layers.1.weight": (4,),
                "stages.1.downsample_layers.0.weight": (4,),
                "stages.1.downsample_layers.1.weight": (6, 4, 2, 2),
                "stages.1.layers.1.depthwise_conv.weight": (6, 1, 7, 7),
                "stages.1.layers.1.layer_norm.weight": (6,),
                "stages.1.layers.1.pointwise_conv1.weight": (24, 6),
                "stages.1.layers.1.gamma": (6,),
                "layer_norm.weight": (6,),
            },
        ),
    ],
)
def test_families_have_the_names_of_hugging_face(family, architecture, keys, tmp_path):
    model = ConvNextForImageClassification(FAMILIES[family])
    model.save_pretrained(tmp_path, random_variables(model))
    state = load_file(tmp_path / "model.safetensors")
    assert {key: state[key].shape for key in keys} == keys
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]


# ---------------------------------------------------------------------------------- another head


def head_of(variables):
    return variables["params"]["classifier"]


def test_a_new_head_is_said_and_drawn_by_the_key(folder):
    load = ConvNextForImageClassification.from_pretrained
    heads = []
    for key in (None, jax.random.key(0), jax.random.key(1)):
        with pytest.warns(UserWarning, match="newly initialised") as caught:
            model, loaded = load(folder, num_labels=5, ignore_mismatched_sizes=True, key=key)
        assert len(caught) == 1
        message = str(caught[0].message)
        for part in ("classifier.weight (3, 6) instead of (5, 6)", "classifier.bias (3,)"):
            assert part in message
        assert caught[0].filename == __file__
        heads.append(head_of(loaded))
    assert model.config.num_labels == 5
    assert heads[0]["kernel"].shape == (6, 5)
    np.testing.assert_array_equal(heads[0]["kernel"], heads[1]["kernel"])
    assert not np.array_equal(heads[1]["kernel"], heads[2]["kernel"])
    np.testing.assert_array_equal(heads[0]["bias"], 0)
    expected = random_variables(ConvNextForImageClassification(SMALL))["params"]
    assert_equal(loaded["params"]["convnext"], expected["convnext"])


def test_a_new_head_is_drawn_as_at_the_start(folder):
    with pytest.warns(UserWarning, match="newly initialised"):
        _, loaded = ConvNextForImageClassification.from_pretrained(
            folder, num_labels=4000, ignore_mismatched_sizes=True, initializer_range=0.5
        )
    assert abs(float(head_of(loaded)["kernel"].std()) - 0.5) < 0.01


def test_a_head_is_made_for_a_network_without_one(tmp_path):
    ConvNextModel(SMALL).save_pretrained(tmp_path, random_variables(ConvNextModel(SMALL)))
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification.from_pretrained(tmp_path)
    assert_one_line(error, "2 missing: classifier.", "ignore_mismatched_sizes=True")
    with pytest.warns(UserWarning, match=r"classifier.bias, classifier.weight"):
        _, loaded = ConvNextForImageClassification.from_pretrained(
            tmp_path, ignore_mismatched_sizes=True
        )
    assert_equal(loaded["params"]["convnext"], random_variables(ConvNextModel(SMALL))["params"])


def test_a_head_that_fits_is_kept_whatever_is_allowed(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, loaded = ConvNextForImageClassification.from_pretrained(
            folder, ignore_mismatched_sizes=True
        )
    assert_equal(loaded, random_variables(ConvNextForImageClassification(SMALL)))


def test_only_a_head_may_be_made_anew(folder):
    with pytest.raises(InputError) as error:
        ConvNextForImageClassification.from_pretrained(
            folder, hidden_sizes=(4, 8), num_labels=5, ignore_mismatched_sizes=True
        )
    assert_one_line(error, "of the wrong shape", "stages.1.layers.0.dwconv.weight")
    assert "makes a new head" not in str(error.value)


# ---------------------------------------------------------------------------------------- placing


def mesh(**axes):
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
    return jax.sharding.Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def test_one_sharding_for_all(folder):
    sharding = jax.sharding.NamedSharding(mesh(data=1), jax.sharding.PartitionSpec())
    _, loaded = ConvNextForImageClassification.from_pretrained(folder, sharding=sharding)
    assert_equal(loaded, random_variables(ConvNextForImageClassification(SMALL)))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(loaded))


FOUR_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from convnext_jax import ConvNextForImageClassification, InputError
model, plain = ConvNextForImageClassification.from_pretrained(sys.argv[1])
mesh = Mesh(np.array(jax.devices()), ("model",))
rows = NamedSharding(mesh, P("model"))
everywhere = NamedSharding(mesh, P())
tree = jax.tree.map(lambda x: rows if x.shape[0] % 4 == 0 else everywhere, plain)
_, split = ConvNextForImageClassification.from_pretrained(sys.argv[1], sharding=tree)
jax.tree.map(np.testing.assert_array_equal, split, plain)
assert jax.tree.map(lambda x: x.sharding, split) == tree
assert {x.addressable_shards[0].data.shape[0] * 4 == x.shape[0] for x in jax.tree.leaves(split)
        if x.sharding == rows} == {True}
prefix = {"params": {"convnext": everywhere, "classifier": rows.update(spec=P())}}
_, again = ConvNextForImageClassification.from_pretrained(sys.argv[1], sharding=prefix)
jax.tree.map(np.testing.assert_array_equal, again, plain)
for wrong in (rows, {"params": {"convnext": rows}}, P("model")):
    try:
        ConvNextForImageClassification.from_pretrained(sys.argv[1], sharding=wrong)
    except InputError as error:
        print(error)
"""


def test_a_sharding_for_each_array(folder):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, str(folder)],
        capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second, third = run.stdout.splitlines()
    assert "cannot be put onto" in first
    assert "structure of the variables" in second
    assert "cannot be put onto" in third


def test_tensors_are_read_one_at_a_time(folder, monkeypatch):
    """Whoever reads a tensor finds that no other one's values are still held."""
    import weakref

    alive, most = weakref.WeakSet(), [0]
    right = np.fromfile

    class Held(np.ndarray):
        __hash__ = object.__hash__

    def read(*arguments):
        most[0] = max(most[0], len(alive))
        values = right(*arguments).view(Held)
        alive.add(values)
        return values

    monkeypatch.setattr(files.np, "fromfile", read)
    ConvNextForImageClassification.from_pretrained(folder)
    assert most[0] <= 1


def test_mutated_headers_load_or_are_one_error(folder):
    """Files that are sound, with other names, shapes or dtypes than the network's."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, rng = json.loads(content[8:start]), np.random.default_rng(0)
    model, loaded = ConvNextForImageClassification(SMALL), 0
    messages = set()
    for _ in range(30):
        changed = json.loads(json.dumps(header))
        keys = [key for key in changed if key != "__metadata__"]
        key, other = (keys[i] for i in rng.choice(len(keys), 2, replace=False))
        kind = rng.integers(5)
        if kind == 0:
            changed[key]["shape"] = changed[key]["shape"][::-1]
        elif kind == 1:
            changed[key]["shape"].insert(0, 1)
        elif kind == 2:
            changed[key], changed[other] = changed[other], changed[key]
        elif kind == 3:
            changed[key + str(rng.choice(["x", ".weight", "/", ""]))] = changed.pop(key)
        else:
            changed[key]["dtype"] = str(rng.choice(["I32", "U32", "F32"]))
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
        try:
            pretrained.load_state_dict(model, files.read_weights(path), str(path))
            loaded += 1
        except InputError as error:
            messages.add(str(error))
    assert loaded > 3
    assert len(messages) > 10
    assert all("\n" not in message and str(path) in message for message in messages)


def test_tensors_of_whole_numbers_are_refused(folder):
    key = "convnext.layernorm.weight"
    change_weights(folder, lambda state: state.update({key: state[key].astype(np.int32)}))
    with pytest.raises(InputError, match=r"1 of the wrong type: convnext.layernorm.weight int32"):
        ConvNextModel.from_pretrained(folder)


def test_names_from_before_layer_scale_had_one(folder):
    """Old files call the weight and bias of a norm gamma and beta."""

    def change(state):
        for key in [key for key in state if "layernorm" in key]:
            old = key.replace(".weight", ".gamma").replace(".bias", ".beta")
            state[old] = state.pop(key)

    change_weights(folder, change)
    _, loaded = ConvNextForImageClassification.from_pretrained(folder)
    assert_equal(loaded, random_variables(ConvNextForImageClassification(SMALL)))


def test_a_parameter_that_is_there_twice(folder):
    key = "convnext.layernorm.weight"
    change_weights(folder, lambda state: state.update({"layernorm.weight": state[key]}))
    with pytest.raises(InputError, match=r"twice, as \S*layernorm.weight and as"):
        ConvNextModel.from_pretrained(folder)
