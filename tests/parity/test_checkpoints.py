"""Files written by the code of those who publish ConvNeXts, loaded here, give their outputs.

Weights are random, scaled by fan-in, with the layer scale around 1, as in test_transformers.py. The
peer writes f32 files; outputs are compared in f32, and in f64 with both networks widened.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from convnext_jax import ConvNextBackbone, ConvNextForImageClassification, ConvNextModel
from convnext_jax.checkpoints import foreign
from convnext_jax.cli import main

torch = pytest.importorskip("torch", reason="the parity suite needs torch")
transformers = pytest.importorskip("transformers", reason="the parity suite needs transformers")
timm = pytest.importorskip("timm", reason="the parity suite needs timm", exc_type=ImportError)
torchvision = pytest.importorskip("torchvision.models", reason="the parity suite needs torchvision")

# Largest difference relative to the largest value of each tensor.
BOUNDS = {"f64": 1e-9, "f32": 1e-4}
# Two stages of equal width, so that tensors of the same shape can be mistaken for each other.
DEPTHS, WIDTHS, LABELS = (1, 2, 1, 1), (8, 16, 16, 24), 7
PICTURES = (2, 3, 70, 96)


# ---------------------------------------------------------------------------------------- the peers


class OriginalBlock(torch.nn.Module):
    """The block of both papers: depthwise convolution, norm, MLP, layer scale or GRN."""

    def __init__(self, width, scale=True, grn=False):
        super().__init__()
        self.dwconv = torch.nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = torch.nn.Linear(width, 4 * width)
        self.pwconv2 = torch.nn.Linear(4 * width, width)
        if grn:
            self.grn = torch.nn.Module()
            for name in ("gamma", "beta"):
                setattr(self.grn, name, torch.nn.Parameter(torch.zeros(1, 1, 1, 4 * width)))
        elif scale:
            self.gamma = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = torch.nn.functional.gelu(self.pwconv1(self.norm(y)))
        if hasattr(self, "grn"):
            norms = y.square().sum((1, 2), keepdim=True).sqrt()
            share = norms / (norms.mean(-1, keepdim=True) + 1e-6)
            y = self.grn.gamma * (y * share) + self.grn.beta + y
        y = self.pwconv2(y)
        if hasattr(self, "gamma"):
            y = self.gamma * y
        return x + y.permute(0, 3, 1, 2)


class MapNorm(torch.nn.LayerNorm):
    """A LayerNorm over the channels of a map."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Original(torch.nn.Module):
    """The paper's network under the names of its repository."""

    def __init__(self, grn=False, labels=LABELS):
        super().__init__()
        convolution, norm = torch.nn.Conv2d, lambda width: MapNorm(width, eps=1e-6)
        self.downsample_layers = torch.nn.ModuleList(
            [torch.nn.Sequential(convolution(3, WIDTHS[0], 4, 4), norm(WIDTHS[0]))]
            + [
                torch.nn.Sequential(norm(a), convolution(a, b, 2, 2))
                for a, b in itertools.pairwise(WIDTHS)
            ]
        )
        self.stages = torch.nn.ModuleList(
            torch.nn.Sequential(*[OriginalBlock(width, grn=grn) for _ in range(depth)])
            for width, depth in zip(WIDTHS, DEPTHS, strict=True)
        )
        self.norm = torch.nn.LayerNorm(WIDTHS[-1], eps=1e-6)
        self.head = torch.nn.Linear(WIDTHS[-1], labels)

    def forward(self, x):
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        pooled = self.norm(x.mean((2, 3)))
        return {"logits": self.head(pooled), "pooled": pooled, "maps": maps}


class Isotropic(torch.nn.Module):
    """The paper's section 3.3 under the names of its repository."""

    def __init__(self, scale):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 24, 16, 16)
        self.blocks = torch.nn.Sequential(*[OriginalBlock(24, scale) for _ in range(3)])
        self.norm = torch.nn.LayerNorm(24, eps=1e-6)
        self.head = torch.nn.Linear(24, LABELS)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        pooled = self.norm(x.mean((2, 3)))
        return {"logits": self.head(pooled), "pooled": pooled, "maps": [x]}


def timm_outputs(model, x):
    maps = model.forward_intermediates(x, intermediates_only=True)
    outputs = {"pooled": model.forward_head(maps[-1], pre_logits=True), "maps": maps}
    return outputs | ({"logits": model(x)} if model.num_classes else {})


def torchvision_outputs(model, x):
    maps, y = [], x
    for number, part in enumerate(model.features):
        y = part(y)
        maps += [y] if number % 2 else []
    pooled = model.classifier[1](model.classifier[0](model.avgpool(y)))
    return {"logits": model(x), "pooled": pooled, "maps": maps}


def transformers_outputs(model, x):
    output = model(x, output_hidden_states=True)
    if "feature_maps" in output:
        return {"maps": list(output.feature_maps), "hidden": list(output.hidden_states)}
    if "logits" in output:
        base = getattr(model, model.base_model_prefix)
        pooled = base(x).pooler_output
        return {"logits": output.logits, "pooled": pooled, "maps": list(output.hidden_states)}
    return {"pooled": output.pooler_output, "maps": list(output.hidden_states)}


def timm_network(name, labels=LABELS, **options):
    return timm.create_model(
        name, depths=DEPTHS, dims=WIDTHS, num_classes=labels, **options
    ).eval()  # fmt: skip


def without_scale(model):
    """As by `ls_init_value=None`, which `create_model` drops."""
    for module in model.modules():
        if hasattr(module, "gamma"):
            module.gamma = None
    assert not any("gamma" in key for key in model.state_dict())
    return model


def torchvision_network():
    settings = [
        torchvision.convnext.CNBlockConfig(width, following, depth)
        for width, following, depth in zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)
    ]
    return torchvision.ConvNeXt(settings, num_classes=LABELS).eval()


FAMILIES = {
    "convnext": ("ConvNextConfig", "ConvNext"),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2"),
    "dinov3": ("DINOv3ConvNextConfig", "DINOv3ConvNext"),
}


def transformers_network(family, kind):
    configuration, prefix = FAMILIES[family]
    fields = {"hidden_sizes": list(WIDTHS), "depths": list(DEPTHS), "num_labels": LABELS}
    if kind == "Backbone":
        fields["out_features"] = ["stage1", "stage3"]
    config = getattr(transformers, configuration)(**fields)
    return getattr(transformers, prefix + kind)(config).eval()


def fill(model) -> None:
    """Weights that leave no branch small."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = rng.standard_normal(tuple(parameter.shape))
            is_kernel = parameter.ndim > 1 and not name.endswith(("layer_scale", "gamma", "beta"))
            if is_kernel and ".grn." not in name:
                value /= math.sqrt(math.prod(value.shape[1:]))
            else:
                value = 0.2 * value + (0 if name.endswith(("bias", "beta")) else 1)
            parameter.copy_(torch.from_numpy(value))


# -------------------------------------------------------------------------------- who writes what


def write_timm(model, folder, safe=True):
    timm.models.save_for_hf(model, folder, safe_serialization=safe)
    return folder


def write_torch(content, folder, name="weights.pth", **options):
    folder.mkdir()
    torch.save(content, folder / name, **options)
    return folder / name


def training_run(model):
    """What the original repository's main.py saves, its averaged weights being the model's."""
    averaged = model.state_dict()
    last = {name: value + 1 for name, value in averaged.items()}
    arguments = argparse.Namespace(lr=4e-3)
    return {"model": last, "model_ema": averaged, "epoch": 3, "args": arguments, "scaler": {}}


# What has to be converted: the network, how its publisher saves it, and its outputs.
FOREIGN = {
    "original": (Original, lambda m, f: write_torch({"model": m.state_dict()}, f), None),
    "original, 22k head": (
        lambda: Original(labels=21841), lambda m, f: write_torch({"model": m.state_dict()}, f), None
    ),
    "original, before zip files": (
        Original,
        lambda m, f: write_torch(
            {"model": m.state_dict()}, f, _use_new_zipfile_serialization=False
        ),
        None,
    ),
    "original, training run": (Original, lambda m, f: write_torch(training_run(m), f), None),
    "original, data parallel": (
        Original,
        lambda m, f: write_torch(torch.nn.DataParallel(m).state_dict(), f),
        None,
    ),
    "original V2": (
        lambda: Original(grn=True), lambda m, f: write_torch({"model": m.state_dict()}, f), None
    ),
    "isotropic": (
        lambda: Isotropic(scale=False), lambda m, f: write_torch({"model": m.state_dict()}, f), None
    ),
    "isotropic with layer scale": (
        lambda: Isotropic(scale=True), lambda m, f: write_torch({"model": m.state_dict()}, f), None
    ),
    "torchvision": (
        torchvision_network, lambda m, f: write_torch(m.state_dict(), f), torchvision_outputs
    ),
    "timm, 1x1 convolutions": (lambda: timm_network("convnext_atto"), write_timm, timm_outputs),
    "timm, linear": (lambda: timm_network("convnext_tiny"), write_timm, timm_outputs),
    "timm, .bin": (
        lambda: timm_network("convnext_tiny"), lambda m, f: write_timm(m, f, False), timm_outputs
    ),
    "timm, no head": (lambda: timm_network("convnext_tiny", 0), write_timm, timm_outputs),
    "timm, no layer scale": (
        lambda: without_scale(timm_network("convnext_tiny")), write_timm, timm_outputs
    ),
    "timm, another activation": (
        lambda: timm_network("convnext_tiny", act_layer="gelu_tanh"), write_timm, timm_outputs
    ),
    "timm V2, 1x1 convolutions": (
        lambda: timm_network("convnextv2_atto"), write_timm, timm_outputs
    ),
    "timm V2, linear": (lambda: timm_network("convnextv2_tiny"), write_timm, timm_outputs),
    "timm DINOv3": (
        lambda: timm_network("convnext_tiny.dinov3_lvd1689m", 0), write_timm, timm_outputs
    ),
}  # fmt: skip


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    """The dtype of both sides."""
    with jax.enable_x64(request.param == "f64"):
        yield request.param


@pytest.mark.parametrize("name", FOREIGN)
def test_converted_files_give_the_outputs_of_their_publisher(
    name, precision, tmp_path, record_worst, capsys
):
    errors = compare_foreign(name, precision, tmp_path)
    record_worst(f"{precision}, files of others", errors)
    assert too_large(errors, precision) == {}
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1


def compare_foreign(name, precision, tmp_path) -> dict[str, float]:
    make, write, outputs = FOREIGN[name]
    theirs = make()
    fill(theirs)
    source = write(theirs, tmp_path / "theirs")
    arguments = ["--ema"] if "training" in name else []
    assert main(["convert", str(source), str(tmp_path / "ours"), *arguments]) == 0
    has_head = "no head" not in name and "DINOv3" not in name
    return compare(theirs, outputs, tmp_path / "ours", precision, None if has_head else "Model")


LAYOUTS = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    ".bin": lambda model, folder: save_bin(model, folder),
    "sharded .bin": lambda model, folder: save_bin(model, folder, parts=3),
}


def save_bin(model, folder, parts=1):
    """The layout of transformers before safetensors, which version 5 no longer writes."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = {
        key: f"pytorch_model-{1 + i % parts:05d}-of-{parts:05d}.bin" for i, key in enumerate(state)
    }
    for file in set(names.values()):
        torch.save({k: v for k, v in state.items() if names[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


KINDS = [
    ("convnext", "ForImageClassification"), ("convnext", "Model"), ("convnext", "Backbone"),
    ("convnextv2", "ForImageClassification"), ("convnextv2", "Model"), ("convnextv2", "Backbone"),
    ("dinov3", "Model"), ("dinov3", "Backbone"),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_folders_of_transformers_give_its_outputs(family, kind, layout, tmp_path, record_worst):
    theirs = transformers_network(family, kind)
    fill(theirs)
    LAYOUTS[layout](theirs, tmp_path)
    assert layout == "safetensors" or not (tmp_path / "model.safetensors").exists()
    for precision in ("f32", "f64") if layout == "safetensors" else ("f32",):
        with jax.enable_x64(precision == "f64"):
            errors = compare(theirs, transformers_outputs, tmp_path, precision, kind)
        record_worst(f"{precision}, folders of transformers", errors)
        assert too_large(errors, precision) == {}


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_folders_written_here_load_in_transformers_bit_for_bit(family, kind, tmp_path):
    theirs = transformers_network(family, kind)
    fill(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model, variables = OURS[kind].from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", variables)

    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    assert not any(report.values()), report
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    first, second = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)

    _, reloaded = OURS[kind].from_pretrained(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, reloaded, variables)
    assert again.config.architectures == [type(theirs).__name__]


def test_both_names_of_dinov3_load(tmp_path):
    theirs = transformers_network("dinov3", "Model")
    fill(theirs)
    theirs.save_pretrained(tmp_path)  # which takes "model." off "model.stages."
    assert any(key.startswith("model.stages.") for key in theirs.state_dict())
    (tmp_path / "model.safetensors").unlink()
    save_bin(theirs, tmp_path)
    errors = compare(theirs, transformers_outputs, tmp_path, "f32", "Model")
    assert too_large(errors, "f32") == {}


def test_the_repository_of_dinov3_keeps_its_final_norm_twice(tmp_path):
    theirs = Original()
    fill(theirs)
    state = {key: v for key, v in theirs.state_dict().items() if not key.startswith("head.")}
    state |= {f"norms.3.{leaf}": state[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    source = write_torch(state, tmp_path / "theirs")
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    model, variables = ConvNextModel.from_pretrained(tmp_path / "ours")
    assert model.config.model_type == "dinov3_convnext"
    pictures = random_pictures().astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pictures))["pooled"].numpy()
    output = model.apply(variables, pictures)
    np.testing.assert_allclose(output.pooler_output, expected, atol=1e-4 * np.abs(expected).max())


# -------------------------------------------------------------------------------------- mutations


def swapped(name, first, second):
    """A rule list in which two names lead to each other's places."""

    def mutate(patch):
        right = foreign.hugging_face_names

        def changed(state, publisher, source):
            names = right(state, publisher, source)
            if publisher == "huggingface":  # swapping a second time, on loading, would undo it
                return names
            return {
                (key.replace(first, second) if first in key else key.replace(second, first)): value
                for key, value in names.items()
            }

        patch.setattr(foreign, "hugging_face_names", changed)

    mutate.__name__ = name
    return mutate


MUTATIONS = [
    swapped("equal stages swapped", "stages.1.layers.0.", "stages.2.layers.0."),
    swapped("blocks swapped", "stages.1.layers.0.", "stages.1.layers.1."),
    swapped("norms swapped", "stages.1.layers.0.layernorm", "stages.2.downsampling_layer.0"),
    swapped("biases swapped", "dwconv.bias", "pwconv2.bias"),
    swapped("scale and bias swapped", "layernorm.weight", "layernorm.bias"),
]


@pytest.mark.parametrize("name", ["original", "torchvision", "timm, 1x1 convolutions"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_seen(name, mutation, monkeypatch, tmp_path):
    mutation(monkeypatch)
    assert too_large(compare_foreign(name, "f32", tmp_path), "f32") != {}


@pytest.mark.parametrize("name", ["original V2", "timm V2, linear"])
def test_a_mutation_of_the_response_norm_is_seen(name, monkeypatch, tmp_path):
    swapped("", "grn.weight", "grn.bias")(monkeypatch)
    assert too_large(compare_foreign(name, "f32", tmp_path), "f32") != {}


def test_a_mutation_of_the_final_epsilon_is_seen_in_f64(monkeypatch, tmp_path):
    right = foreign.infer_configuration
    monkeypatch.setattr(
        foreign, "infer_configuration", lambda *a: right(*a) | {"layer_norm_eps": 1e-12}
    )
    with jax.enable_x64(True):
        errors = compare_foreign("original", "f64", tmp_path)
    assert {"logits", "pooled"} <= too_large(errors, "f64").keys()


# ------------------------------------------------------------------------------------- comparison

OURS = {
    "ForImageClassification": ConvNextForImageClassification,
    "Model": ConvNextModel,
    "Backbone": ConvNextBackbone,
}


def compare(theirs, outputs, folder: Path, precision, kind=None) -> dict[str, float]:
    """Relative error of every output that the peer has."""
    dtype = {"f64": np.float64, "f32": np.float32}[precision]
    pictures = random_pictures().astype(dtype)
    theirs = theirs.double() if precision == "f64" else theirs
    with torch.no_grad():
        x = torch.from_numpy(pictures)
        expected = flat(theirs(x) if outputs is None else outputs(theirs, x))
    model, variables = OURS[kind or "ForImageClassification"].from_pretrained(
        folder, param_dtype=dtype, implementation="plain"
    )
    ours = flat(our_outputs(model, variables, pictures, maps=sum("maps" in k for k in expected)))
    assert ours.keys() >= expected.keys()
    errors = {}
    for name, value in expected.items():
        value, given = value.numpy(), np.asarray(ours[name])
        assert (given.shape, given.dtype) == (value.shape, dtype), name
        assert np.abs(value).max() > 0, f"{name} is all zeros and shows nothing"
        errors[name] = float(np.abs(given.astype(np.float64) - value).max() / np.abs(value).max())
    return errors


def our_outputs(model, variables, pictures, maps: int) -> dict:
    """Under the names of the peers' outputs, as many maps as the peer has."""

    def run(variables, pictures):
        return model.apply(
            variables,
            pictures,
            output_hidden_states=True,
            capture_intermediates=lambda module, _: module.name == "convnext",
            mutable="intermediates",
        )

    quick = {"xla_backend_optimization_level": 0}  # to compile
    output, seen = jax.jit(run, compiler_options=quick)(variables, pictures)
    if "feature_maps" in output:
        return {"maps": list(output.feature_maps), "hidden": list(output.hidden_states)}
    hidden = list(output.hidden_states)[-maps:]
    if "logits" not in output:
        return {"pooled": output.pooler_output, "maps": hidden}
    pooled = seen["intermediates"]["convnext"]["__call__"][0].pooler_output
    return {"logits": output.logits, "pooled": pooled, "maps": hidden}


def flat(outputs: dict) -> dict:
    named = {name: value for name, value in outputs.items() if not isinstance(value, list)}
    for name, values in outputs.items():
        if isinstance(values, list):
            named |= {f"{name}[{i}]": value for i, value in enumerate(values)}
    return named


def too_large(errors: dict[str, float], precision: str) -> dict[str, float]:
    """The errors that are not within the bound; a NaN is not."""
    return {name: error for name, error in errors.items() if not error <= BOUNDS[precision]}


def random_pictures() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(PICTURES)
