"""`convnext_jax.convert`: whose file it is, what it says of its network, and what is written.

The names of each publisher are written down here a second time; tests/parity compares the outputs
with the publishers' own code.
"""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convnext_jax import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ConvNextModel,
    InputError,
)
from convnext_jax.checkpoints import files, pretrained
from convnext_jax.convert import convert

DEPTHS, WIDTHS, LABELS = (1, 2, 1, 1), (4, 6, 6, 8), 3

# Where each publisher keeps what; the block's parts are depthwise convolution, norm, the two linear
# layers, the layer scale, and the two vectors of the response norm.
NAMES = {
    "original": {
        "stem": "downsample_layers.0.0", "stem norm": "downsample_layers.0.1",
        "downsample": "downsample_layers.{i}.{k}", "block": "stages.{i}.{j}",
        "parts": ("dwconv", "norm", "pwconv1", "pwconv2", "gamma", "grn.gamma", "grn.beta"),
        "norm": "norm", "head": "head",
    },
    "timm": {
        "stem": "stem.0", "stem norm": "stem.1",
        "downsample": "stages.{i}.downsample.{k}", "block": "stages.{i}.blocks.{j}",
        "parts": ("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "gamma", "mlp.grn.weight",
                  "mlp.grn.bias"),
        "norm": "head.norm", "head": "head.fc",
    },
    "huggingface": {
        "stem": "{base}embeddings.patch_embeddings", "stem norm": "{base}embeddings.layernorm",
        "downsample": "{base}encoder.stages.{i}.downsampling_layer.{k}",
        "block": "{base}encoder.stages.{i}.layers.{j}",
        "parts": ("dwconv", "layernorm", "pwconv1", "pwconv2", "layer_scale_parameter",
                  "grn.weight", "grn.bias"),
        "norm": "{base}layernorm", "head": "classifier",
    },
    "dinov3": {
        "stem": "stages.0.downsample_layers.0", "stem norm": "stages.0.downsample_layers.1",
        "downsample": "stages.{i}.downsample_layers.{k}", "block": "stages.{i}.layers.{j}",
        "parts": ("depthwise_conv", "layer_norm", "pointwise_conv1", "pointwise_conv2", "gamma"),
        "norm": "layer_norm", "head": None,
    },
    "torchvision": {
        "stem": "features.0.0", "stem norm": "features.0.1",
        "downsample": "features.{even}.{k}", "block": "features.{odd}.{j}",
        "parts": ("block.0", "block.2", "block.3", "block.5", "layer_scale"),
        "norm": "classifier.0", "head": "classifier.2",
    },
    "isotropic": {
        "stem": "stem", "stem norm": None, "block": "blocks.{j}",
        "parts": ("dwconv", "norm", "pwconv1", "pwconv2", "gamma"), "norm": "norm", "head": "head",
    },
}  # fmt: skip


def state_of(
    publisher, *, depths=DEPTHS, widths=WIDTHS, labels=LABELS, channels=3, patch=4,
    v2=False, scale=True, convolutions=False, base="convnext.", dtype=np.float32,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A state dict of this publisher's; the same numbers in the same place whoever it is."""
    names, rng, state = NAMES[publisher], np.random.default_rng(0), {}

    def put(name, *shape, written=None):
        value = rng.standard_normal(shape).astype(dtype)
        if name is not None:
            state[name] = value.reshape(written or shape)

    def layer(name, *shape):
        put(name and f"{name}.weight", *shape)
        put(name and f"{name}.bias", shape[0])

    layer(names["stem"].format(base=base), widths[0], channels, patch, patch)
    layer(names["stem norm"] and names["stem norm"].format(base=base), widths[0])
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        place = {"i": i, "even": 2 * i, "odd": 2 * i + 1, "base": base}
        if i > 0:
            layer(names["downsample"].format(k=0, **place), widths[i - 1])
            layer(names["downsample"].format(k=1, **place), width, widths[i - 1], 2, 2)
        for j in range(depth):
            block = names["block"].format(j=j, **place)
            conv, norm, first, second, gamma, *grn = (f"{block}.{p}" for p in names["parts"])
            layer(conv, width, 1, 7, 7)
            layer(norm, width)
            ones = (1, 1) if convolutions else ()
            layer(first, 4 * width, width)
            layer(second, width, 4 * width)
            for name in (first, second):
                state[f"{name}.weight"] = state[f"{name}.weight"].reshape(
                    *state[f"{name}.weight"].shape, *ones
                )
            if v2:
                for name in grn:
                    written = (4 * width,) if publisher == "timm" else (1, 1, 1, 4 * width)
                    put(name, 4 * width, written=written)
            elif scale:
                put(gamma, width, written=(width, 1, 1) if publisher == "torchvision" else None)
    layer(names["norm"].format(base=base), widths[-1])
    if labels and names["head"]:
        layer(names["head"], labels, widths[-1])
    return state


@pytest.fixture
def write(tmp_path):
    def save(state, name="theirs.safetensors"):
        save_file(state, tmp_path / name)
        return tmp_path / name

    return save


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ------------------------------------------------------------------------------------- the tensors

ISOTROPIC = {"depths": (3,), "widths": (8,), "patch": 16}
SOURCES = {
    "original": ("original", {}, "convnext"),
    "original without layer scale": ("original", {"scale": False}, "convnext"),
    "original, no head": ("original", {"labels": 0}, "convnext"),
    "original V2": ("original", {"v2": True}, "convnextv2"),
    "isotropic": ("isotropic", ISOTROPIC, "convnext_isotropic"),
    "isotropic without layer scale": (
        "isotropic", ISOTROPIC | {"scale": False}, "convnext_isotropic"
    ),
    "timm": ("timm", {}, "convnext"),
    "timm, 1x1 convolutions": ("timm", {"convolutions": True}, "convnext"),
    "timm V2": ("timm", {"v2": True, "convolutions": True}, "convnextv2"),
    "torchvision": ("torchvision", {}, "convnext"),
    "dinov3": ("dinov3", {"labels": 0}, "dinov3_convnext"),
    "huggingface": ("huggingface", {}, "convnext"),
    "huggingface V2": ("huggingface", {"v2": True, "base": "convnextv2."}, "convnextv2"),
    "huggingface, no prefix": ("huggingface", {"base": "", "labels": 0}, "convnext"),
    "half precision": ("timm", {"dtype": np.float16}, "convnext"),
    "other shapes": ("original", {"channels": 5, "patch": 2, "labels": 1}, "convnext"),
    "six stages": (
        "torchvision", {"depths": (1,) * 6, "widths": (2, 3, 4, 5, 6, 7)}, "convnext"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_every_publisher_becomes_hugging_face(name, write, tmp_path):
    publisher, options, family = SOURCES[name]
    made = convert(write(state_of(publisher, **options)), tmp_path / "ours")
    config = ConvNextConfig.from_pretrained(tmp_path / "ours")
    widths, depths = options.get("widths", WIDTHS), options.get("depths", DEPTHS)
    assert (config.hidden_sizes, config.depths) == (widths, depths)
    assert config.model_type == family
    assert config.num_channels == options.get("channels", 3)
    assert config.patch_size == options.get("patch", 4)
    assert config.num_labels == options.get("labels", LABELS)
    has_scale = options.get("scale", True) and not options.get("v2")
    assert (config.layer_scale_init_value > 0) == has_scale
    plain = publisher == "huggingface"
    assert config.layer_norm_eps == (1e-12 if plain else 1e-6)

    if family == "dinov3_convnext":
        expected = state_of("dinov3", labels=0)
    else:
        base = "convnextv2." if family == "convnextv2" else "convnext."
        base = base if options.get("labels", LABELS) else ""
        same = {key: options[key] for key in options if key != "convolutions"} | {"base": base}
        expected = state_of("huggingface", **same)
        if family == "convnext_isotropic":
            expected = {k: v for k, v in expected.items() if "embeddings.layernorm" not in k}
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(written[key], value)
    assert made.parameters == sum(value.size for value in expected.values())
    assert made.remarks == ()

    model_class = type(made.model)
    has_head = options.get("labels", LABELS) > 0 and publisher != "dinov3"
    assert model_class is (ConvNextForImageClassification if has_head else ConvNextModel)
    _, variables = model_class.from_pretrained(tmp_path / "ours", param_dtype=None)
    state = pretrained.state_dict(variables, family)
    assert all(np.array_equal(state[key], value) for key, value in expected.items())


def test_the_file_of_a_backbone_keeps_all_its_norms(tmp_path):
    """Without its configuration: the norms say which maps it returns."""
    config = ConvNextConfig(
        hidden_sizes=WIDTHS, depths=DEPTHS, out_features=["stem", "stage2", "stage4"]
    )
    model = ConvNextBackbone(config)
    model.save_pretrained(tmp_path / "theirs", model.init_variables(jax.random.key(0)))
    made = convert(tmp_path / "theirs" / "model.safetensors", tmp_path / "ours")
    assert type(made.model) is ConvNextBackbone
    assert made.model.out_features == config.out_features
    first, second = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert first.keys() == second.keys()


def test_a_folder_that_holds_anothers_names_loads_as_well(write, tmp_path):
    """Names are translated wherever they come from; only the configuration has to be there."""
    config = ConvNextConfig(hidden_sizes=WIDTHS, depths=DEPTHS, num_labels=LABELS)
    config.save_pretrained(tmp_path)
    write(state_of("timm"), "model.safetensors")
    _, variables = ConvNextForImageClassification.from_pretrained(tmp_path)
    expected = state_of("huggingface")
    state = pretrained.state_dict(variables)
    assert all(np.array_equal(state[key], value) for key, value in expected.items())


def test_a_backbone_keeps_its_norms(tmp_path):
    config = ConvNextConfig(
        hidden_sizes=WIDTHS, depths=DEPTHS, out_features=["stage1", "stage4"], image_size=32
    )
    model = ConvNextBackbone(config)
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    model.save_pretrained(tmp_path / "theirs", jax.tree.map(lambda x: np.ones(x.shape), shapes))
    made = convert(tmp_path / "theirs", tmp_path / "ours")
    assert type(made.model) is ConvNextBackbone
    first, second = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert ConvNextConfig.from_pretrained(tmp_path / "ours") == ConvNextConfig.from_pretrained(
        tmp_path / "theirs"
    )


def test_an_encoder_without_a_final_norm_gets_one(write, tmp_path):
    """Masked pre-training leaves none."""
    state = {k: v for k, v in state_of("timm", v2=True, labels=0).items() if "head" not in k}
    made = convert(write(state), tmp_path / "ours")
    assert "no final norm" in made.remarks[0]
    written = load_file(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_array_equal(written["layernorm.weight"], 1)
    np.testing.assert_array_equal(written["layernorm.bias"], 0)


def test_several_files_are_read_by_their_index(write, tmp_path):
    state = state_of("huggingface")
    folder = tmp_path / "theirs"
    folder.mkdir()
    names = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(state)}
    for file in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for source in (folder, folder / "model.safetensors.index.json"):
        convert(source, tmp_path / "ours")
        written = load_file(tmp_path / "ours" / "model.safetensors")
        assert all(np.array_equal(written[key], state[key]) for key in state)


# ----------------------------------------------------------------------------------------- refusals


def change(state, old, new):
    return {key.replace(old, new): value for key, value in state.items()}


REFUSALS = {
    "a ResNet": ({"conv1.weight": np.zeros((4, 3, 7, 7))}, ["does not hold a ConvNeXt", "conv1"]),
    "nothing": ({}, ["does not hold a ConvNeXt", "nothing"]),
    "norm first": (state_of("timm") | {"norm_pre.weight": np.ones(8)}, ["_hnf"]),
    "hidden head": (state_of("timm") | {"head.pre_logits.fc.weight": np.ones(8)}, ["_mlp"]),
    "overlapping stem": (change(state_of("timm"), "stem.1.", "stem.2."), ["_ols"]),
    "CLIP": (change(state_of("timm"), "st", "visual.trunk.st"), ["CLIP"]),
    "a missing tensor": (
        {k: v for k, v in state_of("timm").items() if k != "stages.1.blocks.1.conv_dw.bias"},
        ["1 missing: convnext.encoder.stages.1.layers.1.dwconv.bias"],
    ),
    "a missing stem": (
        {k: v for k, v in state_of("timm").items() if not k.startswith("stem.0")},
        ["not a whole ConvNeXt", "embeddings.patch_embeddings.weight is missing"],
    ),
    "a missing stage": (
        change(state_of("timm"), "stages.3.", "stages.7."), ["not a whole ConvNeXt"]
    ),
    "another kernel size": (
        state_of("timm") | {"stages.1.blocks.1.conv_dw.weight": np.zeros((6, 1, 5, 5))},
        ["stages.1.blocks.1.conv_dw.weight (6, 1, 5, 5) instead of (6, 1, 7, 7)"],
    ),
    "an unexpected tensor": (
        state_of("timm") | {"stages.1.blocks.1.attn.weight": np.zeros(6)},
        ["1 unexpected: stages.1.blocks.1.attn.weight"],
    ),
    "a far stage": (
        state_of("timm") | {"stages.999999999999.blocks.0.conv_dw.weight": np.zeros((6, 1, 7, 7))},
        ["not a whole ConvNeXt"],
    ),
    "no rows": (state_of("timm") | {"stem.0.weight": np.zeros((0, 3, 4, 4))}, ["(0, 3, 4, 4)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_such_network_is_refused(name, write, tmp_path):
    state, said = REFUSALS[name]
    with pytest.raises(InputError) as error:
        convert(write(state), tmp_path / "ours")
    one_line(error, "theirs.safetensors", *said)
    assert not (tmp_path / "ours").exists()


def test_a_preset_of_other_widths(write, tmp_path):
    source = write(state_of("timm"))
    with pytest.raises(InputError) as error:
        convert(source, tmp_path / "ours", preset="tiny")
    one_line(error, "(4, 6, 6, 8)", "the preset tiny", "(96, 192, 384, 768)")
    with pytest.raises(InputError, match="no preset 'tinny'"):
        convert(source, tmp_path / "ours", preset="tinny")


def test_a_configuration_that_is_given(write, tmp_path):
    source = write(state_of("original"))
    config = ConvNextConfig(
        hidden_sizes=WIDTHS, depths=DEPTHS, num_labels=LABELS, hidden_act="relu", image_size=64
    )
    config.save_pretrained(tmp_path)
    convert(source, tmp_path / "ours", config=tmp_path / "config.json")
    assert ConvNextConfig.from_pretrained(tmp_path / "ours").hidden_act == "relu"

    config.replace(depths=(1, 1, 1, 1)).save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        convert(source, tmp_path / "ours", config=tmp_path / "config.json")
    one_line(error, "depths (1, 2, 1, 1)", str(tmp_path / "config.json"))
    config.replace(model_type="convnextv2").save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        convert(source, tmp_path / "ours", config=tmp_path / "config.json")
    one_line(error, "the family convnext", "config.json says convnextv2")
    for content in ("[]", "{", '{"model_type": "resnet"}', '{"hidden_sizes": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError) as error:
            convert(source, tmp_path / "ours", config=tmp_path / "config.json")
        one_line(error, "config.json")
    with pytest.raises(InputError, match="there is no file"):
        convert(source, tmp_path / "ours", config=tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["absent.pth", "./absent", "absent.safetensors"])
def test_a_source_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"absent") as error:
        convert(name, tmp_path / "ours")
    one_line(error, "there is no")


def test_an_empty_folder(tmp_path):
    (tmp_path / "theirs").mkdir()
    with pytest.raises(InputError) as error:
        convert(tmp_path / "theirs", tmp_path / "ours")
    one_line(error, str(tmp_path / "theirs"), *files.WEIGHTS_NAMES)


def test_a_failure_leaves_what_was_there(write, tmp_path, monkeypatch):
    convert(write(state_of("timm")), tmp_path / "ours")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "preprocessor_config.json"}

    def full(_file):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(KeyboardInterrupt):
        convert(write(state_of("original", scale=False)), tmp_path / "ours")
    after = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert after == before
    with pytest.raises(KeyboardInterrupt):
        convert(write(state_of("original")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_may_be_converted_in_its_own_place(write, tmp_path):
    convert(write(state_of("timm"), "model.safetensors"), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = state_of("huggingface")
    assert all(np.array_equal(written[key], expected[key]) for key in expected)


# ------------------------------------------------------------------------------------------- labels


def labelled(tmp_path, write, names, count=LABELS):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(names))
    source = write(state_of("original", labels=count, widths=(2, 2, 2, 2)))
    convert(source, tmp_path / "ours", labels=path)
    return ConvNextConfig.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("names", [["a", "b", "c"], {"0": "a", "2": "c", "1": "b"}])
def test_labels_are_written(names, tmp_path, write):
    config = labelled(tmp_path, write, names)
    assert dict(config.id2label) == {0: "a", 1: "b", 2: "c"}
    assert dict(config.label2id) == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b"], "names 2 classes, and"),
        ({"1": "a", "2": "b", "3": "c"}, "from 0 to 2"),
        ({"x": "a"}, "not a JSON list"),
        (3, "not a JSON list"),
    ],
)
def test_labels_that_do_not_fit(names, said, tmp_path, write):
    with pytest.raises(InputError) as error:
        labelled(tmp_path, write, names)
    one_line(error, said, "labels.json")


def test_labels_for_a_network_without_a_head(tmp_path, write):
    with pytest.raises(InputError, match="has no head"):
        labelled(tmp_path, write, ["a"], count=0)


def test_the_two_superfluous_labels_of_imagenet_22k_are_taken_out(tmp_path, write):
    names = {str(i): f"class {i}" for i in range(21843)}
    config = labelled(tmp_path, write, names, count=21841)
    kept = [f"class {i}" for i in range(21843) if i not in (9205, 15027)]
    assert [config.id2label[i] for i in range(21841)] == kept


def test_a_configuration_with_their_holes_is_numbered_anew_and_read_as_it_is(tmp_path, write):
    state = state_of("huggingface", labels=21841, widths=(2, 2, 2, 2))
    write(state, "model.safetensors")
    names = {i: f"class {i}" for i in range(21843) if i not in (9205, 15027)}
    config = ConvNextConfig(hidden_sizes=(2, 2, 2, 2), depths=DEPTHS, id2label=names)
    config.save_pretrained(tmp_path)
    assert dict(ConvNextConfig.from_pretrained(tmp_path).id2label) == names
    convert(tmp_path, tmp_path / "ours")
    renumbered = ConvNextConfig.from_pretrained(tmp_path / "ours")
    assert renumbered.id2label[9205] == "class 9206"
    assert renumbered.id2label[21840] == "class 21842"
    assert sorted(renumbered.id2label) == list(range(21841))
    assert renumbered.label2id["class 21842"] == 21840


# ------------------------------------------------------------------------------------ preprocessing


def processor_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ConvNextImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "options", "side", "crop"),
    [
        ("convnext_tiny_1k_224_ema.safetensors", {}, 224, 0.875),
        ("convnext_base_22k_1k_384.safetensors", {}, 384, 0.875),
        ("convnextv2_huge_22k_512_ema.safetensors", {}, 512, 0.875),
        ("weights.safetensors", {}, 224, 0.875),
        ("weights.safetensors", {"size": 288}, 288, 1.0),
        ("convnext_base_22k_1k_384.safetensors", {"size": 224}, 224, 0.875),
    ],
)
def test_the_usual_preprocessing(name, options, side, crop, tmp_path, write):
    convert(write(state_of("original"), name), tmp_path / "ours", **options)
    processor = processor_of(tmp_path / "ours")
    assert processor.size == {"shortest_edge": side}
    assert (processor.crop_pct, processor.resample) == (crop, 3)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    assert ConvNextConfig.from_pretrained(tmp_path / "ours").image_size == side


def test_a_processor_beside_the_weights_is_taken_over(write, tmp_path):
    write(state_of("huggingface"), "model.safetensors")
    ConvNextImageProcessor(size=96, crop_pct=0.75, resample=0, note="kept").save_pretrained(
        tmp_path
    )
    convert(tmp_path, tmp_path / "ours")
    expected = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text()) == expected


def test_a_processor_of_another_class_is_said(write, tmp_path):
    write(state_of("dinov3", labels=0), "model.safetensors")
    settings = {
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_center_crop": None,
        "size": {"height": 256, "width": 256}, "resample": 2, "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    made = convert(tmp_path, tmp_path / "ours")
    assert "DINOv3ViTImageProcessorFast" in made.remarks[0]
    processor = processor_of(tmp_path / "ours")
    assert processor.size == {"shortest_edge": 256}
    assert (processor.crop_pct, processor.resample) == (1.0, 2)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]


def timm_folder(tmp_path, write, publisher="timm", state=None, **changes):
    write(state_of(publisher) if state is None else state, "model.safetensors")
    own = {
        "architecture": "convnext_nano", "num_classes": LABELS, "num_features": 8,
        "pretrained_cfg": {
            "tag": "in12k_ft_in1k", "input_size": [3, 224, 224], "crop_pct": 0.95,
            "interpolation": "bicubic", "crop_mode": "center", "mean": [0.5, 0.4, 0.3],
            "std": [0.3, 0.2, 0.1], "num_classes": LABELS, "classifier": "head.fc",
        },
    }  # fmt: skip
    own["pretrained_cfg"] |= changes.pop("pretrained_cfg", {})
    (tmp_path / "config.json").write_text(json.dumps(own | changes))
    return tmp_path


def test_the_configuration_of_timm_is_read(write, tmp_path):
    source = timm_folder(
        tmp_path, write, label_names=["n1", "n2", "n3"], label_descriptions={"n2": "second"},
        model_args={"drop_path_rate": 0.25, "act_layer": "gelu_tanh"},
    )  # fmt: skip
    made = convert(source, tmp_path / "ours")
    assert made.remarks == ()
    config = ConvNextConfig.from_pretrained(tmp_path / "ours")
    assert dict(config.id2label) == {0: "n1", 1: "second", 2: "n3"}
    assert (config.drop_path_rate, config.hidden_act) == (0.25, "gelu_pytorch_tanh")
    assert (config.model_type, config.layer_norm_eps) == ("convnext", 1e-6)
    processor = processor_of(tmp_path / "ours")
    assert processor.size == {"shortest_edge": 224}
    assert (processor.crop_pct, processor.resample) == (0.95, 3)
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(processor.image_std) == [0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("side", "mode", "remark"),
    [
        (384, "squash", None), (224, "center", None), (384, "center", "crop pictures of 384"),
        (320, "squash", "stretch pictures of 320"),
    ],
)  # fmt: skip
def test_what_the_processor_cannot_do_as_timm_does_is_said(side, mode, remark, write, tmp_path):
    source = timm_folder(
        tmp_path, write, pretrained_cfg={"input_size": [3, side, side], "crop_mode": mode}
    )
    remarks = convert(source, tmp_path / "ours").remarks
    assert (remark is None and remarks == ()) or remark in remarks[0]
    assert processor_of(tmp_path / "ours").size == {"shortest_edge": side}


def test_the_tag_tells_dinov3(write, tmp_path):
    source = timm_folder(
        tmp_path, write, state=state_of("timm", labels=0), num_classes=0,
        pretrained_cfg={"tag": "dinov3_lvd1689m", "num_classes": 0},
    )  # fmt: skip
    assert convert(source, tmp_path / "ours").model.config.model_type == "dinov3_convnext"
    written = load_file(tmp_path / "ours" / "model.safetensors")
    expected = state_of("dinov3", labels=0)
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "convnext_xxlarge"}, "1e-5"),
        ({"architecture": "test_convnext2"}, "1e-5"),
        ({"model_args": {"norm_eps": 1e-5}}, "norm_eps=1e-05"),
        ({"model_args": {"output_stride": 8}}, "output_stride=8"),
        ({"model_args": {"act_layer": "prelu"}}, "'prelu'"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"model_args": {"act_layer": ["gelu"]}}, "['gelu']"),
        ({"model_args": "depths"}, "model_args='depths'"),
        ({"label_descriptions": ["x"]}, "label_descriptions=['x']"),
        ({"label_names": {"a": "x", "b": "y", "c": "z"}}, "id2label"),
        ({"pretrained_cfg": {"interpolation": "magic"}}, "pretrained_cfg"),
        ({"pretrained_cfg": {"input_size": []}}, "pretrained_cfg"),
    ],
)
def test_what_timm_can_and_this_network_cannot(changes, said, write, tmp_path):
    with pytest.raises(InputError) as error:
        convert(timm_folder(tmp_path, write, **changes), tmp_path / "ours")
    one_line(error, said)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("name", "crop"), [("tiny", 224 / 236), ("small", 224 / 230)])
def test_torchvision_has_its_own_resize(name, crop, tmp_path, monkeypatch):
    """By widths and depths; the tensors are stand-ins without memory."""
    config = ConvNextConfig.preset(name, num_labels=LABELS)
    shapes = state_shapes("torchvision", config)
    (tmp_path / "convnext.safetensors").write_bytes(b"")
    monkeypatch.setattr(files, "read_weights", lambda *_a, **_k: shapes)
    monkeypatch.setattr(files, "write_safetensors", lambda *_a: None)
    convert(tmp_path / "convnext.safetensors", tmp_path / "ours", preset=name)
    processor = processor_of(tmp_path / "ours")
    assert math.isclose(processor.crop_pct, crop)
    assert (processor.size, processor.resample) == ({"shortest_edge": 224}, 2)


def state_shapes(publisher, config):
    """The state dict of a large network as stand-ins: a number seen under a shape."""
    small = state_of(publisher, depths=config.depths, widths=(1, 1, 1, 1), labels=config.num_labels)
    expected = pretrained.flatten_dict(
        jax.eval_shape(ConvNextForImageClassification(config).init_variables, jax.random.key(0))[
            "params"
        ]
    )
    ours = state_of("huggingface", depths=config.depths, widths=(1, 1, 1, 1), labels=LABELS)
    shape_of = {
        pretrained.key_of(path): pretrained.to_torch_layout(
            path, np.broadcast_to(0, leaf.shape)
        ).shape
        for path, leaf in expected.items()
    }
    return {
        theirs: np.broadcast_to(np.float32(0), shape_of[key])
        for theirs, key in zip(small, ours, strict=True)
    }  # fmt: skip


def test_bfloat16_stays(write, tmp_path):
    state = {k: v.astype(jnp.bfloat16) for k, v in state_of("timm").items()}
    files.write_safetensors(tmp_path / "theirs.safetensors", state)
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours")
    assert {v.dtype for v in load_file(tmp_path / "ours" / "model.safetensors").values()} == {
        np.dtype(jnp.bfloat16)
    }
    assert ConvNextConfig.from_pretrained(tmp_path / "ours").torch_dtype == "bfloat16"


def test_a_backbone_of_dinov3(tmp_path):
    config = ConvNextConfig(
        model_type="dinov3_convnext", depths=(1, 1), hidden_sizes=(4, 6), out_indices=(1, 2)
    )
    model = ConvNextBackbone(config)
    variables = model.init_variables(jax.random.key(0))
    model.save_pretrained(tmp_path / "source", variables)
    assert type(convert(tmp_path / "source", tmp_path / "made").model) is ConvNextBackbone
    _, loaded = ConvNextBackbone.from_pretrained(tmp_path / "made")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize(("source", "folder"), [("", "made"), ("source", ""), ("source", " ")])
def test_an_empty_name_is_not_the_current_folder(source, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is an empty name"):
        convert(source, folder)
    assert list(tmp_path.iterdir()) == []


def test_a_revision_of_what_is_on_this_machine(tmp_path):
    with pytest.raises(InputError, match="--revision is of a hub repository"):
        convert(tmp_path, tmp_path / "made", revision="main")
