"""Other people's names for the same parameters, and what a file says of its network.

Whoever published a ConvNeXt named its parameters differently. All names lead to those of Hugging
Face's `ConvNextModel` and classifier, without a prefix: "embeddings.layernorm.weight",
"encoder.stages.0.layers.2.pwconv1.bias", "layernorm.weight", "classifier.weight".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from convnext_jax.checkpoints.files import Tensor
from convnext_jax.errors import InputError

State = Mapping[str, np.ndarray | Tensor]
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]

# Parameters that an architecture of another design has, and what it is that is not supported.
REFUSED = {
    r"^norm_pre\.": "it normalises the map before the pooling (timm's _hnf)",
    r"^head\.pre_logits\.": "it has a hidden layer in the head (timm's _mlp)",
    r"^stem\.[2-9]\.": "its stem is made of several convolutions (timm's _ols)",
    r"^stages\.\d+\.blocks\.\d+\.shortcut\.": "its blocks change their width",
    r"^visual\.": "it is one tower of a CLIP model",
}

# What each publisher calls what, in the order of application; None leaves a tensor out.
HUGGING_FACE: Rules = (
    (r"^(convnext|convnextv2)\.", ""),
    # Before layer scales were called layer_scale_parameter, norms were saved under these.
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)
DINOV3: Rules = (
    (r"^model\.", ""),
    (r"^stages\.0\.downsample_layers\.0\.", "embeddings.patch_embeddings."),
    (r"^stages\.0\.downsample_layers\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample_layers\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.", "encoder.stages."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv", ".pwconv"),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"(^|\.)layer_norm\.", r"\1layernorm."),
)
ORIGINAL: Rules = (
    (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
    (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
    (r"^downsample_layers\.", "encoder.stages."),
    (r"^(encoder\.stages\.\d+)\.(\d+)\.", r"\1.downsampling_layer.\2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    # The isotropic variants.
    (r"^stem\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "encoder.stages.0.layers."),
    (r"\.grn\.gamma$", ".grn.weight"),
    (r"\.grn\.beta$", ".grn.bias"),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"(^|\.)norm\.", r"\1layernorm."),
    (r"^head\.", "classifier."),
)
TIMM: Rules = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.", "encoder.stages."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"^head\.norm\.", "layernorm."),
    (r"\.norm\.", ".layernorm."),
    (r"^head\.fc\.", "classifier."),
)


def _torchvision_block(match: re.Match) -> str:
    part = {"0": "dwconv", "2": "layernorm", "3": "pwconv1", "5": "pwconv2"}
    stage, layer, index = int(match[1]) // 2, match[2], match[3]
    return f"encoder.stages.{stage}.layers.{layer}.{part.get(index, index)}."


TORCHVISION: Rules = (
    (r"^features\.0\.0\.", "embeddings.patch_embeddings."),
    (r"^features\.0\.1\.", "embeddings.layernorm."),
    # Stages have the odd numbers, what lies between them the even ones.
    (r"^features\.(\d*[13579])\.(\d+)\.block\.(\d+)\.", _torchvision_block),
    (
        r"^features\.(\d*[13579])\.(\d+)\.layer_scale$",
        lambda m: f"encoder.stages.{int(m[1]) // 2}.layers.{m[2]}.layer_scale_parameter",
    ),
    (
        r"^features\.(\d*[02468])\.(\d+)\.",
        lambda m: f"encoder.stages.{int(m[1]) // 2}.downsampling_layer.{m[2]}.",
    ),
    (r"^classifier\.0\.", "layernorm."),
    (r"^classifier\.2\.", "classifier."),
)

# A key that only this publisher's files have.
PUBLISHERS: dict[str, tuple[str, Rules]] = {
    "huggingface": (r"^(convnext\.|convnextv2\.)?(embeddings|encoder\.stages)\.", HUGGING_FACE),
    "huggingface dinov3": (r"^(model\.)?stages\.\d+\.(downsample_layers|layers)\.", DINOV3),
    "timm": (r"^stages\.\d+\.blocks\.\d+\.", TIMM),
    "torchvision": (r"^features\.\d+\.\d+\.block\.\d+\.", TORCHVISION),
    "facebookresearch": (r"^downsample_layers\.\d+\.\d+\.", ORIGINAL),
    "facebookresearch isotropic": (r"^blocks\.\d+\.dwconv\.", ORIGINAL),
}
# The repository of DINOv3 keeps its final norm a second time under the first name, and EUPE what it
# was distilled with under both.
LEFT_OUT = re.compile(r"^(norms|projectors)\.")


def publisher_of(state: State, source: str) -> str:
    """Whose names these are, a key of `PUBLISHERS`.

    Raises:
      InputError: when they are nobody's, or those of a network that is not supported.
    """
    for pattern, reason in REFUSED.items():
        if any(re.search(pattern, key) for key in state):
            raise InputError(f"{source} is a network of another design: {reason}")
    for publisher, (pattern, _) in PUBLISHERS.items():
        if any(re.search(pattern, key) for key in state):
            return publisher
    first = ", ".join(list(state)[:3]) or "nothing"
    raise InputError(
        f"{source} does not hold a ConvNeXt as Hugging Face, timm, torchvision or the original "
        f"repository save it: it holds {first}" + (", ..." if len(state) > 3 else "")
    )


def hugging_face_names(state: State, publisher: str, source: str) -> dict[str, str]:
    """The key in `state` of each parameter, by its name at Hugging Face without a prefix.

    Keys that no rule knows stay as they are.

    Raises:
      InputError: when two tensors have the same name there.
    """
    rules = PUBLISHERS[publisher][1]
    names: dict[str, str] = {}
    for key in state:
        if publisher.startswith("facebookresearch") and LEFT_OUT.match(key):
            continue
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in names:
            raise InputError(f"{source} holds {name} twice, as {names[name]} and as {key}")
        names[name] = key
    return names


def infer_configuration(state: State, source: str) -> dict[str, Any]:
    """The fields of a `ConvNextConfig` that the names and shapes of tensors tell.

    These are the family (`model_type`), `num_channels`, `patch_size`, `hidden_sizes`, `depths`,
    `num_labels`, whether there is a layer scale, the maps that a backbone returns, and the
    publisher's epsilon of the final norm.

    Raises:
      InputError: when the tensors do not make up the network's outline.
    """
    publisher = publisher_of(state, source)
    names = hugging_face_names(state, publisher, source)

    blocks = [re.match(r"encoder\.stages\.(\d+)\.layers\.\d+\.dwconv\.weight$", n) for n in names]
    stages = [int(match[1]) for match in blocks if match]
    depths = [stages.count(stage) for stage in range(len(set(stages)))]

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = tuple(state[names[name]].shape) if name in names else None
        if found is None or len(found) != axes or 0 in found:
            what = "is missing" if found is None else f"has the shape {found}"
            raise InputError(f"{source} is not a whole ConvNeXt: {names.get(name, name)} {what}")
        return found

    _, channels, *patch = shape("embeddings.patch_embeddings.weight", 4)
    sizes = [
        shape(f"encoder.stages.{stage}.layers.0.dwconv.weight", 4)[0]
        for stage in range(max(len(depths), 1))
    ]
    isotropic = (
        publisher == "facebookresearch isotropic" or "embeddings.layernorm.weight" not in names
    )
    if any(name.endswith(".grn.weight") for name in names):
        family = "convnextv2"
    elif publisher == "huggingface dinov3" or any(key.startswith("norms.") for key in state):
        family = "dinov3_convnext"
    else:
        family = "convnext_isotropic" if isotropic else "convnext"
    fields: dict[str, Any] = {
        "model_type": family,
        "num_channels": channels,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "num_stages": len(sizes),
        "hidden_sizes": sizes,
        "depths": depths,
        "num_labels": shape("classifier.bias", 1)[0] if "classifier.bias" in names else 0,
    }
    if family != "convnextv2":
        scaled = any(name.endswith(".layer_scale_parameter") for name in names)
        fields["layer_scale_init_value"] = 1e-6 if scaled else 0.0
    stage_names = ("stem", *(f"stage{stage + 1}" for stage in range(len(sizes))))
    normed = [stage for stage in stage_names if f"hidden_states_norms.{stage}.weight" in names]
    if normed:  # a backbone, with a norm for each map that it returns
        fields["out_features"] = normed
    if publisher != "huggingface":
        # Hugging Face's default for the final norm is 1e-12; the networks were trained with this.
        fields["layer_norm_eps"] = 1e-6
    return fields
