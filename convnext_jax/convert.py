"""Anybody's ConvNeXt as a folder that this library and Hugging Face's `transformers` load.

Isotropic networks load here alone: `transformers` does not have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict

from convnext_jax import modeling
from convnext_jax.checkpoints import files, foreign, pretrained
from convnext_jax.checkpoints.files import Tensor
from convnext_jax.configuration import CONFIG_NAME, PRESETS, ConvNextConfig
from convnext_jax.errors import InputError
from convnext_jax.image.processor import FIRST_WARPED_SIZE, PROCESSOR_NAME, ConvNextImageProcessor

# ImageNet-22k: huggingface's list of label names has two classes more than the networks, and its
# configurations leave these two out without numbering the rest anew.
LABELS_22K, LISTED_22K, REMOVED_22K = 21841, 21843, (9205, 15027)

# What a timm configuration may say of a network that is another one than it seems by its tensors.
TIMM_ARGUMENTS = {
    "norm_eps": (None, 1e-6),
    "output_stride": (None, 32),
    "kernel_sizes": (None, 7),
    "norm_layer": (None, "layernorm", "layernorm2d"),
    "head_norm_first": (None, False),
    "stem_type": (None, "patch"),
    "global_pool": (None, "", "avg"),
}
TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu",
                    "silu": "silu", "swish": "silu", "mish": "mish"}  # fmt: skip
# Architectures of timm's whose norms have another epsilon, which no tensor tells.
TIMM_OTHER_EPSILON = re.compile(r"^(test_convnext|convnext_xxlarge)")
TIMM_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


class Conversion(NamedTuple):
    """What was made: the model, its numbers of parameters and classes, whose names, remarks."""

    model: modeling.ConvNextPreTrainedModel
    parameters: int
    classes: int
    publisher: str
    remarks: tuple[str, ...]


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    labels: str | Path | None = None,
    size: int | None = None,
    averaged: bool = False,
    revision: str | None = None,
) -> Conversion:
    """Writes config.json, model.safetensors and preprocessor_config.json of a published ConvNeXt.

    Values and dtypes of the tensors stay as they are, bit for bit. What the file does not say of
    its network and its preprocessing comes from the configuration beside it, Hugging Face's or
    timm's, and otherwise from the names and shapes of the tensors.

    Args:
      source: a file of weights (.safetensors, .pth, .pt, .bin, .h5), a folder or a hub name.
      folder: where to write; its older files stay as they are if anything fails.
      preset: a name of `ConvNextConfig.preset` that the network has to have the widths of.
      config: a config.json of Hugging Face's, for what tensors do not tell.
      labels: a JSON file with the names of the classes: a list, or an object by index.
      size: side of the pictures that the network was trained on; default: what the source says, or
        the number at the end of its name, as in convnext_base_22k_1k_384.pth, or 224.
      averaged: take the averaged weights that a training run saved beside the last ones.
      revision: of the hub repository.

    Raises:
      InputError: when anything does not fit, before anything is written.
    """
    for name, place in {"the source": source, "the folder to write": folder}.items():
        if not str(place).strip():  # an unset variable of a shell; the current folder is "."
            raise InputError(f"{name} is an empty name: give a path")
    if revision is not None and Path(source).expanduser().exists():
        raise InputError(f"{source} is on this machine: --revision is of a hub repository")
    hub_options = {} if revision is None else {"revision": revision}
    path, beside = _find(source, hub_options)
    state = files.read_weights(path, averaged, **(hub_options | beside))
    publisher = foreign.publisher_of(state, str(path))
    remarks: list[str] = []

    own_path = _optional(source, CONFIG_NAME, hub_options) if beside else None
    own = files.read_json(own_path) if own_path else {}
    timm = own if "architecture" in own and "model_type" not in own else {}
    fields = foreign.infer_configuration(state, str(path))
    given = config or (None if timm else own_path)
    if given is not None:
        built = _read_config(Path(given))
    else:
        built = ConvNextConfig(**fields | _timm_fields(timm, publisher, fields, str(source)))
    _check_outline(built, preset, fields, str(path), given)
    if fields["num_labels"] or labels is not None or given is None:
        built = _with_labels(built, fields["num_labels"], labels, str(path))

    processor = None
    if timm:
        processor = _timm_processor(timm.get("pretrained_cfg"), size, str(source), remarks)
    elif beside and (found := _optional(source, PROCESSOR_NAME, hub_options)):
        processor = _own_processor(files.read_json(found), size, remarks)
    processor = processor or _usual_processor(built, publisher, str(source), size)
    if given is None:
        built = built.replace(image_size=processor.size["shortest_edge"])

    model = _model(built, state, publisher, str(path))
    state, is_new = _with_final_norm(model, state, publisher, str(path))
    if is_new:
        remarks.append("the file has no final norm: it is new, scale 1 and bias 0, to be trained")
    parameters = pretrained.save_tensors(model, folder, state, str(path), processor)
    return Conversion(model, parameters, fields["num_labels"], publisher, tuple(remarks))


# ---------------------------------------------------------------------------------- what there is


def _find(source: str | Path, hub_options: dict) -> tuple[Path, dict]:
    """The file of weights, and, when other files belong to it, under which name to find them."""
    path = Path(source).expanduser()
    if path.is_file():
        return path, {}
    if not path.exists() and re.search(r"\.(safetensors|bin|pth|pt|h5|hdf5)$", path.name):
        raise InputError(
            f"there is no file {source}: give a file of weights, a folder or a hub name"
        )
    return files.find_file(source, *files.WEIGHTS_NAMES, **hub_options), {"name": source}


def _optional(source: str | Path, filename: str, hub_options: dict) -> Path | None:
    try:
        return files.find_file(source, filename, **hub_options)
    except InputError:  # the weights have been found there: it has no such file
        return None


def _read_config(path: Path) -> ConvNextConfig:
    if not path.is_file():
        raise InputError(f"there is no file {path}: --config takes a config.json")
    try:
        return ConvNextConfig.from_dict(files.read_json(path))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _check_outline(
    config: ConvNextConfig, preset: str | None, fields: dict, source: str, given: Any
) -> None:
    """That the configuration, or the preset, has the widths and depths of the tensors."""
    expected = {"its configuration" if given is None else str(given): config}
    if preset is not None:
        expected[f"the preset {preset}"] = ConvNextConfig.preset(preset)
    # DINOv3's networks cannot be told from others' in every file: the configuration may say it.
    told = ("convnextv2", "convnext_isotropic")
    family = fields["model_type"]
    if family != config.model_type and (family in told or config.model_type in told):
        raise InputError(
            f"{source} is of the family {family} by its tensors, and {next(iter(expected))} says "
            f"{config.model_type}: give the configuration of this file"
        )
    for name, outline in expected.items():
        for field in ("hidden_sizes", "depths"):
            if tuple(fields[field]) != tuple(getattr(outline, field)):
                raise InputError(
                    f"{source} has {field} {tuple(fields[field])}, and {name} says "
                    f"{tuple(getattr(outline, field))}: give the configuration of this file"
                )


def _model(
    config: ConvNextConfig, state: foreign.State, publisher: str, source: str
) -> modeling.ConvNextPreTrainedModel:
    """The documented model that has these parameters."""
    names = foreign.hugging_face_names(state, publisher, source)
    if any(name.startswith(pretrained.BACKBONE_NORMS) for name in names):
        return modeling.ConvNextBackbone(config)
    # A backbone of DINOv3 has no norms of its own.
    if publisher == "huggingface dinov3" and "layernorm.weight" not in names:
        return modeling.ConvNextBackbone(config)
    if any(name.startswith(pretrained.HEAD_PREFIX) for name in names):
        return modeling.ConvNextForImageClassification(config)
    return modeling.ConvNextModel(config)


def _with_final_norm(
    model: modeling.ConvNextPreTrainedModel, state: foreign.State, publisher: str, source: str
) -> tuple[foreign.State, bool]:
    """The tensors with a new final norm where an encoder was published without one (FCMAE's)."""
    names = foreign.hugging_face_names(state, publisher, source)
    missing = [f"layernorm.{leaf}" for leaf in ("weight", "bias")]
    is_base = type(model) is modeling.ConvNextModel
    if not is_base or any(name in names for name in missing) or publisher.startswith("huggingface"):
        return state, False
    width = model.config.hidden_sizes[-1]
    dtype = next(iter(state.values())).dtype
    key = {"timm": "head.norm."}.get(publisher, "norm.")
    norm = {"weight": np.ones(width, dtype), "bias": np.zeros(width, dtype)}
    new = {key + leaf: Tensor((width,), dtype, lambda v=v: v) for leaf, v in norm.items()}
    return {**state, **new}, True


# ------------------------------------------------------------------------------------------- labels


def _with_labels(
    config: ConvNextConfig, count: int, path: str | Path | None, source: str
) -> ConvNextConfig:
    """The configuration with the names of the classes, numbered as the head's outputs."""
    if path is None and config.num_labels == count:
        names = dict(config.id2label)
    elif path is None:
        return config.replace(num_labels=count)
    else:
        names = _read_labels(Path(path))
    if count == 0 and names:
        raise InputError(f"{path} names {len(names)} classes, and {source} has no head")
    if count == LABELS_22K and len(names) == LISTED_22K:
        names = {index: name for index, name in names.items() if index not in REMOVED_22K}
    if len(names) != count:
        raise InputError(f"{path} names {len(names)} classes, and {source} has {count}")
    if count == LABELS_22K or sorted(names) == list(range(count)):
        names = {i: names[index] for i, index in enumerate(sorted(names))}
    elif path is not None:
        raise InputError(f"{path} does not number its {count} classes from 0 to {count - 1}")
    if FrozenDict(names) == config.id2label:
        return config
    return config.replace(id2label=names, label2id=None)


def _read_labels(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise InputError(f"there is no file {path}: --labels takes a JSON file of class names")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {int(index): str(name) for index, name in pairs}
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f'{path} is not a JSON list of names, nor an object such as {{"0": "tench"}}: {reason}'
        ) from error


# --------------------------------------------------------------------------------------------- timm


def _timm_fields(
    own: Mapping[str, Any], publisher: str, inferred: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """What a configuration of timm's, if there is one, says beyond the tensors."""
    architecture = str(own.get("architecture", ""))
    parts = {n: own.get(n) or {} for n in ("model_args", "pretrained_cfg", "label_descriptions")}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise InputError(f"{source} has {name}={part!r} in timm's configuration, no object")
    arguments = parts["model_args"]
    is_xxlarge = publisher == "timm" and inferred["hidden_sizes"] == [384, 768, 1536, 3072]
    if is_xxlarge or TIMM_OTHER_EPSILON.match(architecture):
        raise InputError(
            f"{source} has norms with an epsilon of 1e-5 ({architecture or 'convnext_xxlarge'}): "
            "no configuration of Hugging Face's holds that"
        )
    for name, known in TIMM_ARGUMENTS.items():
        value = arguments.get(name, own.get(name))
        if value not in known:
            raise InputError(
                f"{source} has {name}={value!r} in timm's configuration, which is not supported"
            )
    fields: dict[str, Any] = {}
    activation = arguments.get("act_layer")
    if activation is not None:
        if not isinstance(activation, str) or activation not in TIMM_ACTIVATIONS:
            raise InputError(f"{source} has the activation {activation!r}, which is not supported")
        fields["hidden_act"] = TIMM_ACTIVATIONS[activation]
    if isinstance(rate := arguments.get("drop_path_rate"), int | float):
        fields["drop_path_rate"] = rate
    if "dinov3" in str(parts["pretrained_cfg"].get("tag")):
        fields["model_type"] = "dinov3_convnext"
    names = own.get("label_names")
    if isinstance(names, list | dict) and len(names) == own.get("num_classes"):
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        described = {str(k): text for k, text in parts["label_descriptions"].items()}
        # What is no number is for the configuration to refuse.
        fields["id2label"] = {index: described.get(str(name), name) for index, name in pairs}
        fields["num_labels"] = None
    return fields


def _timm_processor(
    settings: Any, size: int | None, source: str, remarks: list[str]
) -> ConvNextImageProcessor | None:
    """The preprocessing of timm, as far as the processor has it."""
    if not isinstance(settings, Mapping) or "input_size" not in settings:
        return None
    try:
        own_size = int(settings["input_size"][-1])
        crop, mode = float(settings.get("crop_pct") or 0.875), settings.get("crop_mode") or "center"
        changes = {
            "resample": TIMM_FILTERS[settings.get("interpolation") or "bicubic"],
            "image_mean": [float(value) for value in settings["mean"]],
            "image_std": [float(value) for value in settings["std"]],
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{source} has a pretrained_cfg that is not understood: {error}"
        ) from error
    side = size or own_size
    warped = mode == "squash"
    if warped != (side >= FIRST_WARPED_SIZE):
        ours = "stretched" if side >= FIRST_WARPED_SIZE else "cropped"
        remarks.append(
            f"timm would {'stretch' if warped else 'crop'} pictures of {side} pixels, and this "
            f"processor's are {ours}: for the same figures, prepare pictures otherwise"
        )
    return ConvNextImageProcessor(size={"shortest_edge": side}, crop_pct=crop, **changes)


# ---------------------------------------------------------------------------------------- pictures


def _own_processor(
    settings: dict[str, Any], size: int | None, remarks: list[str]
) -> ConvNextImageProcessor:
    """The processor of a Hugging Face folder; that of another class as far as it is the same."""
    kind = settings.pop("image_processor_type", None) or settings.pop("feature_extractor_type", "")
    if not str(kind or "ConvNext").startswith("ConvNext"):
        names = ("image_mean", "image_std", "resample", "rescale_factor", "size")
        settings = {name: settings[name] for name in names if name in settings}
        settings["crop_pct"] = 1.0
        remarks.append(
            f"the source prepares pictures by {kind}: size, filter, mean and deviation are taken "
            f"over, pictures below {FIRST_WARPED_SIZE} pixels are cropped and others stretched"
        )
    given = settings.get("size")
    if isinstance(given, Mapping) and "shortest_edge" not in given and "height" in given:
        settings["size"] = {"shortest_edge": given["height"]}
    if size is not None:
        settings["size"] = {"shortest_edge": size}
    return ConvNextImageProcessor(**settings)


def _usual_processor(
    config: ConvNextConfig, publisher: str, source: str, size: int | None
) -> ConvNextImageProcessor:
    """What a publisher's checkpoints of this kind were trained with."""
    named = re.search(r"[-_](224|288|384|512)(?=[-_.]|$)", Path(source).name)
    side = size or (int(named[1]) if named else 224)
    if publisher == "torchvision":
        for name in ("tiny", "small", "base", "large"):
            outline = PRESETS[name]["depths"], PRESETS[name]["hidden_sizes"]
            if (config.depths, config.hidden_sizes) == outline:
                return ConvNextImageProcessor.preset(f"torchvision_{name}", size=size or 224)
    crop = 1.0 if 224 < side < FIRST_WARPED_SIZE else 0.875
    return ConvNextImageProcessor.preset("imagenet_224", size=side, crop_pct=crop)
