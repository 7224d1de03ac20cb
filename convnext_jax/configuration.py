"""The configuration of a ConvNeXt: Hugging Face's fields and JSON, frozen and hashable.

Semantics follow `ConvNextConfig` of transformers 4.37.2 (`configuration_convnext.py` and the fields
it inherits). Where this differs from it, the difference is said in the docstring of the class.

One class serves the architectures that differ from ConvNeXt in a detail or two, told apart by
`model_type`:

* "convnext": "A ConvNet for the 2020s" (arXiv:2201.03545);
* "convnextv2": global response normalisation in place of layer scale (arXiv:2301.00808);
* "dinov3_convnext": the distilled backbones of DINOv3 (arXiv:2508.10104), which differ in their
  epsilons, in the names of their files and in what a backbone returns;
* "convnext_isotropic": the first paper's section 3.3, one stage of 16x16 patches and no norm after
  them. Hugging Face has no such architecture.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.core import FrozenDict

from convnext_jax.errors import InputError

CONFIG_NAME = "config.json"
MODEL_TYPES = ("convnext", "convnextv2", "dinov3_convnext", "convnext_isotropic")
MAX_LABELS = 1_000_000  # each has a name in the configuration
MAX_NESTING = 100  # of unknown keys, so that no later step runs out of stack
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Widths and depths of the paper's networks (Table 9 and section 3.3 of arXiv:2201.03545), of timm's
# smaller ones (timm/models/convnext.py) and of ConvNeXt V2's largest (arXiv:2301.00808).
PRESETS: dict[str, dict[str, Any]] = {
    "atto": {"depths": (2, 2, 6, 2), "hidden_sizes": (40, 80, 160, 320)},
    "femto": {"depths": (2, 2, 6, 2), "hidden_sizes": (48, 96, 192, 384)},
    "pico": {"depths": (2, 2, 6, 2), "hidden_sizes": (64, 128, 256, 512)},
    "nano": {"depths": (2, 2, 8, 2), "hidden_sizes": (80, 160, 320, 640)},
    "tiny": {"depths": (3, 3, 9, 3), "hidden_sizes": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "hidden_sizes": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "hidden_sizes": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "hidden_sizes": (192, 384, 768, 1536)},
    "xlarge": {"depths": (3, 3, 27, 3), "hidden_sizes": (256, 512, 1024, 2048)},
    "huge": {"depths": (3, 3, 27, 3), "hidden_sizes": (352, 704, 1408, 2816)},
    # Without layer scale, but for the large one, whose published weights have it.
    "isotropic_small": {"depths": (18,), "hidden_sizes": (384,), "layer_scale_init_value": 0.0},
    "isotropic_base": {"depths": (18,), "hidden_sizes": (768,), "layer_scale_init_value": 0.0},
    "isotropic_large": {"depths": (36,), "hidden_sizes": (1024,)},
}


class ConvNextConfig:
    """Everything that defines a ConvNeXt, under Hugging Face's names; immutable and hashable.

    Args:
      num_channels: channels of the input picture.
      patch_size: side of the stem's patches and their stride, in pixels; an int or (height, width).
        Default 4; 16 for an isotropic network.
      num_stages: number of stages; `hidden_sizes` and `depths` have this length. Default 4; 1 for
        an isotropic network; as many as `depths` has for DINOv3, whose files do not say.
      hidden_sizes: width of each stage. Default (96, 192, 384, 768).
      depths: number of blocks of each stage. Default (3, 3, 9, 3).
      hidden_act: activation inside the blocks: a name of `convnext_jax.ops.ACTIVATIONS` or a
        callable (which JSON cannot hold).
      initializer_range: standard deviation of the normal initialisation of kernels.
      layer_norm_eps: epsilon of the final LayerNorm alone; all others use 1e-6, as the original.
        Default 1e-12; 1e-6 for DINOv3, where it holds for every norm, and isotropic networks.
      layer_scale_init_value: initial layer scale; no layer scale at all when <= 0 (DINOv3 always
        has one). ConvNeXt V2 has none: the field is 0 there.
      drop_path_rate: rate of stochastic depth of the last block; it grows linearly from 0.
      image_size: side of the input (or (height, width)) used to initialise the variables. Any other
        size can be given at the call.
      out_features: stages whose maps `ConvNextBackbone` returns, among `stage_names`.
      out_indices: the same as positions in `stage_names`; negative ones are kept as given.
        With neither, the last stage; with one, the other follows; with both, they must agree.
      num_labels: width of the classifier; 0 leaves it out. Default 2, or the length of `id2label`.
      id2label: name of each class by index (JSON's string keys become ints).
      label2id: its inverse, derived when not given.
      problem_type: which loss `ConvNextForImageClassification` computes: "regression",
        "single_label_classification", "multi_label_classification" or None, inferred at the call.
      return_dict: default of the models' argument of that name.
      output_hidden_states: default of the models' argument of that name.
      model_type: which architecture, one of `MODEL_TYPES`.
      **extra: any other key of a config.json; kept, readable as an attribute, and written back.

    Raises:
      InputError (a ValueError): for any value that cannot build a network, naming the field.

    Differences from the original: sequences are stored as tuples and mappings as FrozenDict;
    attributes cannot be set, `replace` returns a changed copy; `label2id` is derived from
    `id2label`; `num_stages`, `hidden_sizes` and `depths` must agree in length.
    """

    model_type = "convnext"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int | Sequence[int] | None = None,
        num_stages: int | None = None,
        hidden_sizes: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        hidden_act: str | Callable = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float | None = None,
        layer_scale_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        image_size: int | Sequence[int] = 224,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int | str, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        return_dict: bool = True,
        output_hidden_states: bool = False,
        model_type: str = "convnext",
        **extra: Any,
    ):
        if model_type not in MODEL_TYPES:
            raise InputError(f"model_type is {model_type!r}: choose from {', '.join(MODEL_TYPES)}")
        isotropic, dinov3 = model_type == "convnext_isotropic", model_type == "dinov3_convnext"
        if num_stages is None:
            known = depths if depths is not None else hidden_sizes
            num_stages = len(known) if dinov3 and isinstance(known, Sequence) else 4
            num_stages = 1 if isotropic else num_stages
        if patch_size is None:
            patch_size = 16 if isotropic else 4
        if layer_norm_eps is None:
            layer_norm_eps = 1e-6 if isotropic or dinov3 else 1e-12
        fields: dict[str, Any] = {
            "model_type": model_type,
            "num_channels": _positive_int("num_channels", num_channels),
            "patch_size": _side("patch_size", patch_size),
            "num_stages": _positive_int("num_stages", num_stages),
            "hidden_sizes": _stage_tuple("hidden_sizes", hidden_sizes, (96, 192, 384, 768)),
            "depths": _stage_tuple("depths", depths, (3, 3, 9, 3)),
            "hidden_act": hidden_act,
            "initializer_range": _number("initializer_range", initializer_range, low=0),
            "layer_norm_eps": _number("layer_norm_eps", layer_norm_eps, low=0),
            "layer_scale_init_value": _number("layer_scale_init_value", layer_scale_init_value),
            "drop_path_rate": _number("drop_path_rate", drop_path_rate, low=0, below=1),
            "image_size": _side("image_size", image_size),
        }
        for name in ("hidden_sizes", "depths"):
            if len(fields[name]) != fields["num_stages"]:
                raise InputError(
                    f"{name} has {len(fields[name])} entries and num_stages is {num_stages}: "
                    "give one entry a stage"
                )
        if isotropic and num_stages != 1:
            raise InputError(f"num_stages is {num_stages}: an isotropic network has one stage")
        if dinov3 and fields["patch_size"] != 4:
            raise InputError(f"patch_size is {patch_size}: that of a DINOv3 ConvNeXt is 4")
        if model_type == "convnextv2":
            fields["layer_scale_init_value"] = 0.0
        if not isinstance(hidden_act, str) and not callable(hidden_act):
            raise InputError(f"hidden_act is {hidden_act!r}: give a name or a callable")
        if problem_type is not None and problem_type not in PROBLEM_TYPES:
            raise InputError(
                f"problem_type is {problem_type!r}: choose from {PROBLEM_TYPES} or None"
            )

        stage_names = ("stem", *(f"stage{i}" for i in range(1, num_stages + 1)))
        fields["out_features"], fields["out_indices"] = _align_outputs(
            out_features, out_indices, stage_names
        )
        fields["id2label"], fields["label2id"] = _label_maps(num_labels, id2label, label2id)
        fields["problem_type"] = problem_type
        fields["return_dict"] = bool(return_dict)
        fields["output_hidden_states"] = bool(output_hidden_states)
        extra.pop("stage_names", None)  # derived; files written by the original carry it
        reserved = [name for name in extra if hasattr(type(self), name)]
        if reserved:
            raise InputError(f"{reserved[0]!r} cannot be a configuration key: it is a method here")
        fields["extra"] = _freeze(extra)
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "stage_names", stage_names)
        object.__setattr__(self, "_hash", None)

    # ---------------------------------------------------------------- what follows from the fields

    @property
    def num_labels(self) -> int:
        """Number of classes: the length of `id2label`."""
        return len(self.id2label)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ConvNextConfig:
        """A network of known widths and depths.

        Args:
          name: the paper's "tiny", "small", "base", "large", "xlarge"; timm's "atto", "femto",
            "pico", "nano"; ConvNeXt V2's "huge"; "isotropic_small", "isotropic_base",
            "isotropic_large".
          **changes: further fields: `model_type="convnextv2"` for a V2 of these widths,
            `num_labels=1000` for an ImageNet-1k head.
        """
        if name not in PRESETS:
            raise InputError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
        if name.startswith("isotropic_"):
            changes = {"model_type": "convnext_isotropic", **changes}
        return cls(**{**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> ConvNextConfig:
        """A copy with these fields changed and what hangs on them brought into step.

        As with the original's setters, `out_features` alone resets `out_indices` and the reverse,
        and `num_labels` makes new label names only when the number differs.
        """
        fields = self._fields()
        if "out_features" in changes or "out_indices" in changes:
            fields["out_features"] = fields["out_indices"] = None
        if "id2label" in changes or changes.get("num_labels", self.num_labels) != self.num_labels:
            fields["id2label"] = fields["label2id"] = None
        if changes.get("num_stages", self.num_stages) != self.num_stages:
            fields["out_features"] = fields["out_indices"] = None
        return type(self)(**{**fields, **changes})

    # ------------------------------------------------------------------------------ in and out

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values under Hugging Face's keys, as written to `config.json`."""
        fields = {name: _thaw(value) for name, value in self._fields().items()}
        if callable(fields["hidden_act"]):
            raise InputError("hidden_act is a callable, which config.json cannot hold: give a name")
        # Hugging Face rebuilds the two default labels by itself and leaves them out too.
        if self.id2label == _label_maps(None, None, None)[0]:
            del fields["id2label"], fields["label2id"]
        # What Hugging Face's classes of these names do not have.
        if self.model_type == "convnextv2":
            del fields["layer_scale_init_value"]
        if self.model_type == "dinov3_convnext":
            del fields["patch_size"], fields["num_stages"]
        return {"stage_names": list(self.stage_names), **fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> ConvNextConfig:
        """A configuration from the contents of a `config.json`, with fields changed on the way.

        Raises:
          InputError: when it is the configuration of another architecture.
        """
        model_type = values.get("model_type", cls.model_type)
        if model_type not in MODEL_TYPES:
            raise InputError(
                f"model_type is {model_type!r}, none of {', '.join(MODEL_TYPES)}: "
                "this is the configuration of another architecture"
            )
        config = cls(**values)
        return config.replace(**changes) if changes else config

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into `folder`, which is made when it does not exist."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **changes: Any) -> ConvNextConfig:
        """Reads `config.json` from a local folder or a hub repository.

        Args:
          name_or_path: a folder, or a hub name such as "facebook/convnext-tiny-224".
          **changes: fields to change, and `revision`, `cache_dir`, `local_files_only`, `token`,
            which go to huggingface_hub.
        """
        from convnext_jax.checkpoints import files  # a leaf, reached only here

        hub_options, changes = files.split_hub_options(changes)
        path = files.find_file(name_or_path, CONFIG_NAME, **hub_options)
        try:
            return cls.from_dict(files.read_json(path), **changes)
        except TypeError as error:  # for one, a list where the constructor wants keywords
            raise InputError(f"{path} is not a ConvNeXt configuration: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    # ------------------------------------------------------------------- frozen, equal, hashable

    def _fields(self) -> dict[str, Any]:
        names = [name for name in self.__dict__ if name not in ("extra", "stage_names", "_hash")]
        return {**{name: getattr(self, name) for name in names}, **self.extra}

    def __setattr__(self, name: str, value: Any):
        raise AttributeError(
            f"a configuration cannot be changed: config.replace({name}=...) returns a changed copy"
        )

    def __delattr__(self, name: str):
        raise AttributeError(f"a configuration cannot be changed: {name!r} stays")

    def __getattr__(self, name: str) -> Any:
        # Only called for what is no field. Unpickling looks for dunder names before __init__.
        if not name.startswith("_"):
            extra = self.__dict__.get("extra", {})
            if name in extra:
                return extra[name]
        raise AttributeError(f"ConvNextConfig has no field {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._fields() == other._fields()

    def __hash__(self) -> int:
        # Cached: a 21k-entry id2label is part of it, and jit hashes its static arguments each call.
        if self._hash is None:
            value = hash((type(self), tuple(sorted(self._fields().items(), key=lambda kv: kv[0]))))
            object.__setattr__(self, "_hash", value)
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # String hashes differ between processes, so the cached one must not travel.
        return {**self.__dict__, "_hash": None}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state)

    def __repr__(self) -> str:
        names = ", ".join(
            f"{name}={value!r}"
            for name, value in self._fields().items()
            if name not in ("id2label", "label2id")
        )
        return f"ConvNextConfig({names}, num_labels={self.num_labels})"


def drop_path_rates(config: ConvNextConfig) -> tuple[tuple[float, ...], ...]:
    """Rate of each block, by stage: linear from 0 to `drop_path_rate` over all blocks in order."""
    total = sum(config.depths)
    rates = [config.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
    starts = [sum(config.depths[:stage]) for stage in range(config.num_stages)]
    return tuple(
        tuple(rates[start : start + depth])
        for start, depth in zip(starts, config.depths, strict=True)
    )


def multiply_adds(config: ConvNextConfig, image_size: int | tuple[int, int] | None = None) -> int:
    """Multiplications, each with an addition, that the network spends on one picture.

    Those of the convolutions, of the dense layers and of the head (none with num_labels=0); norms,
    activations and what is done channel by channel are left out, as in the paper's "FLOPs", which
    are these: 4.5e9 for ConvNeXt-T at 224 pixels. A training step takes about three times as many,
    and a multiply-add is two floating-point operations.

    Args:
      config: the network.
      image_size: side, or (height, width), of the picture in pixels; default `config.image_size`.

    Raises:
      InputError: when nothing would be left of the picture before the last stage.
    """
    image_size = config.image_size if image_size is None else _side("image_size", image_size)
    height, width = _pair(image_size)
    patch_height, patch_width = _pair(config.patch_size)
    height, width = height // patch_height, width // patch_width
    inputs, total = config.num_channels * patch_height * patch_width, 0
    for stage, (depth, channels) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
        if stage > 0:
            height, width = height // 2, width // 2  # by patches of 2x2, as far as they are whole
            inputs = config.hidden_sizes[stage - 1] * 2 * 2
        # The 7x7 convolution of each channel, and two dense layers, to four times the width and
        # back.
        block = 7 * 7 * channels + 2 * channels * 4 * channels
        total += height * width * (inputs * channels + depth * block)
    if height * width == 0:
        raise InputError(
            f"image_size is {image_size}: too small for {config.num_stages} stages after patches "
            f"of {config.patch_size}"
        )
    return total + config.hidden_sizes[-1] * config.num_labels


# ------------------------------------------------------------------------------------- validation


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise InputError(f"{name} is {value!r}: give a whole number of at least 1")
    return value.__index__()


def _number(name: str, value: Any, low: float | None = None, below: float | None = None) -> float:
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    bad = bad or not -1e300 < value < 1e300  # NaN, infinity, integers that no float can hold
    if bad or (low is not None and not value >= low) or (below is not None and not value < below):
        bounds = "a number" + (f" >= {low}" if low is not None else "")
        bounds += f" and < {below}" if below is not None else ""
        raise InputError(f"{name} is {value!r}: give {bounds}")
    return value


def _side(name: str, value: Any) -> int | tuple[int, int]:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return (_positive_int(name, value[0]), _positive_int(name, value[1]))
    return _positive_int(name, value)


def _pair(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


def _stage_tuple(name: str, value: Any, default: tuple[int, ...]) -> tuple[int, ...]:
    if value is None:
        return default
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{name} is {value!r}: give a list of whole numbers, one a stage")
    return tuple(_positive_int(f"{name}[{i}]", entry) for i, entry in enumerate(value))


def _align_outputs(
    features: Sequence[str] | None, indices: Sequence[int] | None, stage_names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """`out_features` and `out_indices` in step (transformers' `backbone_utils`, 4.37.2)."""
    if features is not None:
        if isinstance(features, str) or not isinstance(features, Sequence):
            raise InputError(f"out_features is {features!r}: give a list of stage names")
        unknown = [name for name in features if name not in stage_names]
        if unknown:
            raise InputError(f"out_features names {unknown[0]!r}: choose from {list(stage_names)}")
        _check_order("out_features", features, [stage_names.index(name) for name in features])
    if indices is not None:
        if not isinstance(indices, Sequence) or isinstance(indices, str):
            raise InputError(f"out_indices is {indices!r}: give a list of whole numbers")
        for index in indices:
            # The original checks index % count, lets -6 of 5 through and fails later.
            if not hasattr(index, "__index__") or not -len(stage_names) <= index < len(stage_names):
                raise InputError(
                    f"out_indices holds {index!r}: it must lie within {len(stage_names)} stages, "
                    f"{list(stage_names)}"
                )
        _check_order("out_indices", indices, [index % len(stage_names) for index in indices])
    if features is None and indices is None:
        return (stage_names[-1],), (len(stage_names) - 1,)
    if indices is None:
        return tuple(features), tuple(stage_names.index(name) for name in features)
    named = tuple(stage_names[index] for index in indices)
    if features is not None and tuple(features) != named:
        raise InputError(
            f"out_features {list(features)} and out_indices {list(indices)} "
            f"(that is {list(named)}) disagree: give one of them"
        )
    return named, tuple(indices)


def _check_order(name: str, given: Sequence, positions: list[int]) -> None:
    if len(set(positions)) != len(positions):
        raise InputError(f"{name} {list(given)} holds a stage twice")
    if positions != sorted(positions):
        raise InputError(f"{name} {list(given)} is not in the order of the stages")


def _label_maps(
    num_labels: int | None, id2label: Mapping | None, label2id: Mapping | None
) -> tuple[FrozenDict, FrozenDict]:
    if label2id is not None:
        try:
            label2id = {str(label): int(index) for label, index in label2id.items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"label2id is no mapping of names to whole numbers ({error}): give one, or None"
            ) from error
    if id2label is None:
        count = 2 if num_labels is None else num_labels
        if isinstance(count, bool) or not hasattr(count, "__index__") or count.__index__() < 0:
            raise InputError(f"num_labels is {num_labels!r}: give a whole number of at least 0")
        if count > MAX_LABELS:
            raise InputError(f"num_labels is {num_labels!r}: there can be {MAX_LABELS} at most")
        if label2id is not None and len(label2id) == count:
            id2label = {index: label for label, index in label2id.items()}
        else:
            id2label, label2id = {i: f"LABEL_{i}" for i in range(count)}, None
    else:
        if not isinstance(id2label, Mapping):
            raise InputError(
                f"id2label is {type(id2label).__name__}: give a mapping of index to name"
            )
        try:
            id2label = {int(index): str(label) for index, label in id2label.items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"id2label has a key that is no whole number: {error}") from error
        if num_labels is not None and num_labels != len(id2label):
            warnings.warn(
                f"num_labels is {num_labels} and id2label has {len(id2label)} entries: "
                "the latter counts",
                stacklevel=3,
            )
    if label2id is None:
        label2id = {label: index for index, label in id2label.items()}
    return FrozenDict(id2label), FrozenDict(label2id)


def _freeze(value: Any, depth: int = 0) -> Any:
    if depth > MAX_NESTING:
        raise InputError(f"a key of the configuration is nested more than {MAX_NESTING} deep")
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(entry, depth + 1) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_freeze(entry, depth + 1) for entry in value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_thaw(entry) for entry in value]
    return value
