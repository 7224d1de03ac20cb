import copy
import json
import math
import pickle
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import ConvNextConfig, ConvNextForImageClassification, InputError
from convnext_jax.configuration import PRESETS, drop_path_rates, multiply_adds

# The fields of Hugging Face's documentation and what they default to.
DEFAULTS = {
    "num_channels": 3,
    "patch_size": 4,
    "num_stages": 4,
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "layer_scale_init_value": 1e-6,
    "drop_path_rate": 0.0,
    "image_size": 224,
    "out_features": ("stage4",),
    "out_indices": (4,),
    "num_labels": 2,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "return_dict": True,
    "output_hidden_states": False,
    "stage_names": ("stem", "stage1", "stage2", "stage3", "stage4"),
}
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    assert getattr(ConvNextConfig(), name) == DEFAULTS[name]


def test_order_of_positional_arguments():
    config = ConvNextConfig(1, 2, 3, [4, 5, 6], [1, 2, 1], "relu", 0.1, 1e-5, 0.5, 0.2, 64)
    assert config == ConvNextConfig(
        num_channels=1,
        patch_size=2,
        num_stages=3,
        hidden_sizes=(4, 5, 6),
        depths=(1, 2, 1),
        hidden_act="relu",
        initializer_range=0.1,
        layer_norm_eps=1e-5,
        layer_scale_init_value=0.5,
        drop_path_rate=0.2,
        image_size=64,
    )


# ------------------------------------------------------------------------- frozen, equal, hashable


def test_attributes_cannot_be_set():
    config = ConvNextConfig(note="kept")
    for name in ("depths", "num_labels", "note", "brand_new"):
        with pytest.raises(AttributeError, match=rf"config\.replace\({name}=\.\.\.\)"):
            setattr(config, name, 1)
    with pytest.raises(AttributeError, match="cannot be changed"):
        del config.depths


def test_values_cannot_be_changed_in_place():
    config = ConvNextConfig(extra_list=[1, [2]], extra_map={"a": {"b": 1}})
    assert config.extra_list == (1, (2,))
    for mapping in (config.id2label, config.label2id, config.extra_map, config.extra_map["a"]):
        with pytest.raises(ValueError, match="immutable"):
            mapping[0] = "changed"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no field 'depth'"):
        _ = ConvNextConfig().depth


def test_equal_configurations_have_equal_hashes():
    changes = {"depths": [1, 1, 1, 1], "id2label": {0: "cat", 1: "dog"}, "note": {"a": [1]}}
    one, other = ConvNextConfig(**changes), ConvNextConfig(**changes)
    assert one == other
    assert hash(one) == hash(other)
    for change in ({"depths": (1, 1, 1, 2)}, {"id2label": {0: "dog", 1: "cat"}}, {"note": 1}):
        assert one.replace(**change) != one
    assert one != "a configuration"


def test_a_copy_from_another_process_is_equal_and_has_the_hash_of_this_one():
    # Hashes of strings differ between processes; a cached one must not travel.
    code = (
        "import pickle, sys; from convnext_jax import ConvNextConfig; "
        "config = ConvNextConfig(num_labels=3, note='x'); hash(config); "
        "sys.stdout.buffer.write(pickle.dumps(config))"
    )
    sent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    config = ConvNextConfig(num_labels=3, note="x")
    assert pickle.loads(sent) == config
    assert hash(pickle.loads(sent)) == hash(config)


def test_the_hash_is_computed_once(monkeypatch):
    config = ConvNextConfig()
    value = hash(config)
    monkeypatch.setattr(ConvNextConfig, "_fields", lambda self: pytest.fail("computed again"))
    assert hash(config) == value


# --------------------------------------------------------------------------------- out_features


@pytest.mark.parametrize(
    ("given", "features", "indices"),
    [
        ({}, ["stage4"], [4]),
        ({"out_features": ["stem", "stage2"]}, ["stem", "stage2"], [0, 2]),
        ({"out_features": ("stage1",)}, ["stage1"], [1]),
        ({"out_indices": (0, 2)}, ["stem", "stage2"], [0, 2]),
        ({"out_indices": [-1]}, ["stage4"], [-1]),
        ({"out_indices": [-5, 2, -1]}, ["stem", "stage2", "stage4"], [-5, 2, -1]),
        ({"out_features": ["stage4"], "out_indices": [-1]}, ["stage4"], [-1]),
        ({"out_features": [], "out_indices": []}, [], []),
        ({"out_features": []}, [], []),
        ({"out_indices": []}, [], []),
    ],
)
def test_outputs_are_aligned(given, features, indices):
    config = ConvNextConfig(**given)
    assert list(config.out_features) == features
    assert list(config.out_indices) == indices


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"out_features": "stage4"}, "out_features"),
        ({"out_features": {"stage4"}}, "out_features"),
        ({"out_features": ["stage5"]}, "'stage5'"),
        ({"out_features": ["stage1", "stage1"]}, "twice"),
        ({"out_features": ["stage2", "stage1"]}, "order"),
        ({"out_indices": 4}, "out_indices"),
        ({"out_indices": "4"}, "out_indices"),
        ({"out_indices": [5]}, "5"),
        ({"out_indices": [-6]}, "-6"),
        ({"out_indices": [1.5]}, "1.5"),
        ({"out_indices": [-1, 4]}, "twice"),
        ({"out_features": 4}, "out_features"),
        ({"out_features": [4]}, "4"),
        ({"out_features": ["stem", "stage5", "stage1"]}, "'stage5'"),
        ({"out_features": ["stage1", "stem"]}, "order"),
        ({"out_indices": {4}}, "out_indices"),
        ({"out_indices": [-11]}, "-11"),
        ({"out_indices": [2, 2]}, "twice"),
        ({"out_indices": [-4, 1]}, "twice"),
        ({"out_indices": [None]}, "None"),
        ({"out_indices": [2, 1]}, "order"),
        ({"out_indices": [-1, 1]}, "order"),
        ({"out_features": ["stage1"], "out_indices": [1, 2]}, "disagree"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "disagree"),
        ({"out_features": [], "out_indices": [1]}, "disagree"),
    ],
)
def test_outputs_that_cannot_be_aligned(given, part):
    with pytest.raises(InputError) as error:
        ConvNextConfig(**given)
    assert_one_line(error, part)


def test_one_of_the_outputs_replaces_the_other():
    config = ConvNextConfig(out_features=["stage1"])
    assert config.replace(out_indices=[-2]).out_features == ("stage3",)
    assert config.replace(out_features=["stage2"]).out_indices == (2,)
    assert config.replace(out_features=None).out_indices == (4,)
    assert config.replace(drop_path_rate=0.1).out_features == ("stage1",)


# --------------------------------------------------------------------------------------- labels


def test_labels_follow_their_number():
    config = ConvNextConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert ConvNextConfig(num_labels=0).id2label == {}


def test_names_give_their_number_and_inverse():
    config = ConvNextConfig(id2label={"0": "cat", "1": "dog", "2": "cow"})
    assert config.num_labels == 3
    assert config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert config.label2id == {"cat": 0, "dog": 1, "cow": 2}


def test_a_conflicting_number_of_labels_warns_and_gives_way():
    with pytest.warns(UserWarning, match="num_labels is 5 and id2label has 2"):
        assert ConvNextConfig(num_labels=5, id2label={0: "cat", 1: "dog"}).num_labels == 2


def test_names_survive_a_replacement_that_keeps_their_number():
    config = ConvNextConfig(id2label={0: "cat", 1: "dog"})
    assert config.replace(num_labels=2) == config
    assert config.replace(num_labels=1).id2label == {0: "LABEL_0"}
    assert config.replace(id2label={0: "cow"}).label2id == {"cow": 0}
    assert config.replace(depths=(1, 1, 1, 1)).id2label == {0: "cat", 1: "dog"}


# -------------------------------------------------------------------------------- other bad values


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"num_channels": 0}, "num_channels"),
        ({"num_channels": 2.5}, "num_channels"),
        ({"num_channels": True}, "num_channels"),
        ({"patch_size": -1}, "patch_size"),
        ({"patch_size": (4, 4, 4)}, "patch_size"),
        ({"image_size": "224"}, "image_size"),
        ({"num_stages": 3}, "hidden_sizes"),
        ({"depths": (1, 1)}, "depths"),
        ({"depths": (1, 1, 0, 1)}, "depths[2]"),
        ({"depths": 3}, "depths"),
        ({"hidden_sizes": "abcd"}, "hidden_sizes"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"initializer_range": -0.1}, "initializer_range"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps"),
        ({"layer_scale_init_value": None}, "layer_scale_init_value"),
        ({"layer_scale_init_value": float("nan")}, "layer_scale_init_value"),
        ({"initializer_range": 10**400}, "initializer_range"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate"),
        ({"problem_type": "classification"}, "problem_type"),
        ({"num_labels": -1}, "num_labels"),
        ({"num_labels": 1_000_001}, "num_labels"),
        ({"id2label": ["cat"]}, "id2label"),
        ({"label2id": ["cat", "dog"]}, "label2id"),
        ({"id2label": {0: "cat"}, "label2id": "cat"}, "label2id"),
        ({"id2label": {0: "cat"}, "label2id": {"cat": [0]}}, "label2id"),
        ({"id2label": {"first": "cat"}}, "id2label"),
        ({"id2label": {None: "cat"}}, "id2label"),
        ({"id2label": {math.inf: "cat"}}, "id2label"),
        ({"replace": 1}, "replace"),
    ],
)
def test_values_that_build_no_network(given, part):
    with pytest.raises(InputError) as error:
        ConvNextConfig(**given)
    assert_one_line(error, part)


def test_numbers_of_numpy_are_numbers():
    config = ConvNextConfig(num_labels=np.int64(3), patch_size=np.int32(2))
    assert json.loads(json.dumps(config.to_dict()))["patch_size"] == 2


# ---------------------------------------------------------------------------------- presets, rates


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = ConvNextConfig.preset(name, num_labels=1000, drop_path_rate=0.5)
    assert config.num_labels == 1000
    assert config.depths == PRESETS[name]["depths"]
    assert config.hidden_sizes == PRESETS[name]["hidden_sizes"]
    assert config.num_stages == len(config.depths)
    isotropic = name.startswith("isotropic")
    assert config.model_type == ("convnext_isotropic" if isotropic else "convnext")
    assert config.hidden_sizes[-1] == config.hidden_sizes[0] * (1 if isotropic else 8)


def test_tiny_is_the_default():
    assert ConvNextConfig.preset("tiny") == ConvNextConfig()


def test_there_is_no_such_preset():
    with pytest.raises(InputError) as error:
        ConvNextConfig.preset("enormous")
    assert_one_line(error, "'enormous'", *PRESETS)


def test_drop_path_rates_are_linear_over_all_blocks():
    rates = drop_path_rates(ConvNextConfig.preset("tiny", drop_path_rate=0.1))
    assert [len(stage) for stage in rates] == [3, 3, 9, 3]
    np.testing.assert_allclose(np.concatenate(rates), np.linspace(0, 0.1, 18), rtol=1e-15)
    one_block = ConvNextConfig(num_stages=1, depths=[1], hidden_sizes=[8], drop_path_rate=0.5)
    assert drop_path_rates(one_block) == ((0.0,),)


# ------------------------------------------------------------------------------------ in and out

CONFIGURATIONS = [
    {},
    {"num_labels": 0},
    {"num_labels": 7},
    {"id2label": {0: "cat", 1: "dog"}, "problem_type": "multi_label_classification"},
    {"id2label": {3: "a hole", 7: "another"}},
    {"patch_size": (4, 2), "image_size": (64, 32), "out_indices": [0, -1]},
    {
        "num_stages": 2,
        "depths": [1, 2],
        "hidden_sizes": [8, 16],
        "hidden_act": "relu",
        "layer_scale_init_value": 0,
        "output_hidden_states": True,
        "return_dict": False,
    },
    {"note": "kept", "nested": {"list": [1, {"a": None}], "1": 2}},
]


@pytest.mark.parametrize("fields", CONFIGURATIONS)
def test_json_round_trip(fields, tmp_path):
    config = ConvNextConfig(**fields)
    assert ConvNextConfig.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    assert ConvNextConfig.from_pretrained(tmp_path / "new" / "folder") == config


def test_json_has_the_keys_of_hugging_face(tmp_path):
    ConvNextConfig(num_labels=12, note="kept").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    expected = set(DEFAULTS) - {"num_labels"} | {"model_type", "note"}
    assert set(values) == expected
    assert values["model_type"] == "convnext"
    assert values["stage_names"] == STAGES
    assert values["hidden_sizes"] == [96, 192, 384, 768]
    # Keys of JSON are strings, and those of id2label stay in the order of the classes.
    assert list(values["id2label"]) == [str(i) for i in range(12)]


def test_fields_can_be_changed_while_reading(tmp_path):
    ConvNextConfig(out_features=["stage1"], num_labels=5).save_pretrained(tmp_path)
    config = ConvNextConfig.from_pretrained(tmp_path, out_indices=[2, 3], drop_path_rate=0.2)
    assert config.out_features == ("stage2", "stage3")
    assert (config.drop_path_rate, config.num_labels) == (0.2, 5)


def test_a_callable_activation_is_for_python_alone(tmp_path):
    config = ConvNextConfig(hidden_act=np.tanh)
    assert config == ConvNextConfig(hidden_act=np.tanh)
    with pytest.raises(InputError) as error:
        config.save_pretrained(tmp_path / "folder")
    assert_one_line(error, "hidden_act")
    assert not (tmp_path / "folder").exists()


def test_another_architecture(tmp_path):
    with pytest.raises(InputError) as error:
        ConvNextConfig.from_dict({"model_type": "resnet", "depths": [3, 4, 6, 3]})
    assert_one_line(error, "'resnet'", "another architecture")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError) as error:
        ConvNextConfig.from_pretrained(tmp_path)
    assert_one_line(error, "'vit'", str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ("[1, 2]", "list"),
        ("[" * 100_000, "JSON"),
        ("\xff", "JSON"),
        ('{"depths": [1, 2]}', "depths"),
        ('{"depths": "3"}', "depths"),
        ('{"id2label": {"a": "b"}}', "id2label"),
        ('{"self": 1}', "self"),
    ],
    ids=range(9),
)
def test_a_broken_file_is_named_in_one_line(text, part, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        ConvNextConfig.from_pretrained(tmp_path)
    assert_one_line(error, str(path), part)


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(InputError) as error:
        ConvNextConfig.from_pretrained(tmp_path)
    assert_one_line(error, "config.json", str(tmp_path))
    for name in (str(tmp_path / "nowhere"), "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(InputError) as error:
            ConvNextConfig.from_pretrained(name)
        assert_one_line(error, name)


# ------------------------------------------------------------------------------------------ fuzzing

JUNK = (
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**64, -(2**63), 10**400, 10**5000, 0.5, -0.0, 1e308,
    math.nan, math.inf, -math.inf, "", "4", "stage1", "gelu", "\ud800", "\x00", "猫", "a" * 5000,
    [], [[]], [3, 3, 9, 3], [1, 2], ["stage1"], ["stage2", "stage1"], [-1], [None], [0.5], [2**70],
    ["stem", ["stage1"]], {}, {"0": "cat"}, {"1": None, "0": "dog"}, {"a": {"b": [1, {}]}},
    {"cat": 0}, {"cat": [0]}, {"0": {"1": "2"}}, {"-1": "x", "1e3": "y"}, {"": ""},
)  # fmt: skip
NAMES = (
    *DEFAULTS, "model_type", "note", "extra", "_hash", "self", "cls", "replace", "preset",
    "__class__", "__dict__", "__init__", "_fields", "to_dict", "hub_options", "stage", "0", "",
    "\ud800", "changes", "values", "torch_dtype", "architectures", "transformers_version",
)  # fmt: skip


def junk(rng: random.Random):
    return copy.deepcopy(rng.choice(JUNK))


def mutated(rng: random.Random) -> bytes:
    """A config.json with one to three things wrong, or none that matter."""
    fields = dict(rng.choice(CONFIGURATIONS))
    if rng.random() < 0.2:
        fields["model_type"] = rng.choice(["convnextv2", "dinov3_convnext", "convnext_isotropic"])
    values = {"model_type": "convnext", **fields}
    if rng.random() < 0.5 and "model_type" not in fields:
        values = ConvNextConfig(**fields).to_dict()
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*values, *NAMES])
        match rng.randrange(6):
            case 0:
                values.pop(name, None)
            case 1 | 2:
                values[name] = junk(rng)
            case 3 if isinstance(values.get(name), list) and values[name]:
                values[name][rng.randrange(len(values[name]))] = junk(rng)
            case 3 if isinstance(values.get(name), dict):
                values[name][rng.choice(["0", "1", "x", "LABEL_0"])] = junk(rng)
            case 4:
                values[name] = [junk(rng) for _ in range(rng.randint(0, 6))]
            case _:
                values[rng.choice(NAMES)] = copy.deepcopy(values.get(name))
    if isinstance(values.get("num_labels"), int):
        # Were its bound lost, a larger one would take all memory.
        values["num_labels"] = min(values["num_labels"], 1_000_001)
    # Numbers of this length are no longer written, nor read, by Python's own parser.
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    text = json.dumps(values, ensure_ascii=rng.random() < 0.5)
    sys.set_int_max_str_digits(limit)
    if rng.random() < 0.05:  # by hand: the writer does not nest as deep as the reader
        depth = rng.choice([100, 400, 900, 3000])
        nested = ["[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth]
        text = text[:-1] + ', "deep": ' + rng.choice(nested) + "}"
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and data:
        data = data[: rng.randrange(len(data))]
    if rng.random() < 0.1 and data:
        at = rng.randrange(len(data))
        data = data[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 3))) + data[at:]
    return data


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("ignore:num_labels is")
def test_a_mutated_file_loads_or_gives_one_error(seed, tmp_path):
    """A hundred of them. What loads can be hashed, as `jit` does, and written and read again."""
    rng, outcomes = random.Random(seed), set()
    path = tmp_path / "config.json"
    for _ in range(100):
        data = mutated(rng)
        path.write_bytes(data)
        try:
            config = ConvNextConfig.from_pretrained(tmp_path)
        except InputError as error:
            config, message = None, str(error)
        if config is None:
            assert "\n" not in message, data
            assert str(path) in message, data
            assert len(message) < 500 + 4 * len(data), data
            outcomes.add("error")
            continue
        outcomes.add("loaded")
        hash(config)
        written = json.dumps(config.to_dict())
        again = ConvNextConfig.from_dict(json.loads(written))
        assert json.dumps(again.to_dict()) == written, data
        if "NaN" not in written:
            assert again == config, data
            assert hash(again) == hash(config), data
    assert outcomes == {"error", "loaded"}


# ---------------------------------------------------------------------------------- multiply-adds


@pytest.mark.parametrize(
    ("name", "at_224", "at_384"),
    [
        ("tiny", 4.456, 13.09),
        ("small", 8.684, 25.52),
        ("base", 15.355, 45.12),
        ("large", 34.361, 100.98),
        ("xlarge", 60.921, 179.03),
    ],
)
def test_multiply_adds_of_the_published_networks(name, at_224, at_384):
    config = ConvNextConfig.preset(name, num_labels=1000)
    assert round(multiply_adds(config) / 1e9, 3) == at_224
    assert round(multiply_adds(config, 384) / 1e9, 2) == at_384


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # The original's table of isotropic networks, and that of ConvNeXt V2.
        ("isotropic_small", 4.3),
        ("isotropic_base", 16.9),
        ("isotropic_large", 59.7),
        ("atto", 0.55),
        ("femto", 0.78),
        ("pico", 1.37),
        ("nano", 2.45),
        ("huge", 115),
    ],
)
def test_multiply_adds_agree_with_the_published_figure(name, published):
    digits = len(str(published).split(".")[1]) if "." in str(published) else 0
    assert round(multiply_adds(ConvNextConfig.preset(name, num_labels=1000)) / 1e9, digits) == (
        published
    )


def test_multiply_adds_by_hand():
    config = ConvNextConfig(
        num_channels=2, patch_size=(2, 3), num_stages=2, hidden_sizes=(4, 8), depths=(1, 2),
        num_labels=5, image_size=(12, 17),
    )  # fmt: skip
    first, second = 6 * 5, 3 * 2  # a column of the picture and one of the map fill no patch
    expected = first * (2 * 3 * 2 * 4)
    expected += first * (49 * 4 + 4 * 16 + 16 * 4)
    expected += second * (2 * 2 * 4 * 8)
    expected += second * 2 * (49 * 8 + 8 * 32 + 32 * 8)
    assert multiply_adds(config) == expected + 8 * 5
    assert multiply_adds(config.replace(num_labels=0)) == expected
    assert multiply_adds(config, (12, 15)) == expected + 8 * 5
    # Neither layer scale nor global response norm is a product of matrices.
    assert multiply_adds(config.replace(model_type="convnextv2")) == expected + 8 * 5
    assert multiply_adds(config.replace(layer_scale_init_value=0)) == expected + 8 * 5


def test_multiply_adds_are_those_of_the_compiled_convolutions():
    """The products of the network as it is traced, not as they are thought to be."""
    config = ConvNextConfig(hidden_sizes=(4, 6, 8, 10), depths=(1, 2, 1, 1), num_labels=3)
    model = ConvNextForImageClassification(config, implementation="plain")
    variables = jax.eval_shape(model.init_variables, jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((1, 3, 64, 96), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x).logits)(variables, pixels)
    assert products(jaxpr.jaxpr) == multiply_adds(config, (64, 96))


def products(jaxpr) -> int:
    """Multiply-adds of the matrix products and convolutions in a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += out * math.prod(kernel) // kernel[features]
        elif equation.primitive.name == "cond":  # of a form for each platform, the same products
            [same] = {products(form.jaxpr) for form in equation.params["branches"]}
            total += same
        # What is inside others: closed or, in what is computed again, in some versions open.
        inside = (getattr(value, "jaxpr", value) for value in equation.params.values())
        total += sum(products(sub) for sub in inside if hasattr(sub, "eqns"))
    return total


@pytest.mark.parametrize("image_size", [31, (224, 31), 0, "224"])
def test_multiply_adds_of_a_picture_that_is_too_small(image_size):
    with pytest.raises(InputError) as error:
        multiply_adds(ConvNextConfig(), image_size)
    assert_one_line(error, "image_size", str(image_size))
