"""Equality with timm, whose networks follow the original code in another arrangement."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import pytest

from convnext_jax import ConvNextConfig, ConvNextForImageClassification
from convnext_jax.checkpoints import pretrained
from convnext_jax.configuration import PRESETS

torch = pytest.importorskip("torch", reason="the parity suite needs torch")
timm = pytest.importorskip("timm", reason="the parity suite needs timm", exc_type=ImportError)

# timm's names to Hugging Face's, in this order.
RENAMING = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.", "encoder.stages."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"^head\.fc\.", "classifier."),
    (r"^head\.norm\.|^head\.layernorm\.", "layernorm."),
)


# timm has the largest network as a V2 alone, and no isotropic ones.
NETWORKS = [
    *(("convnext", name) for name in PRESETS if not name.startswith(("huge", "isotropic"))),
    *(("convnextv2", name) for name in ("atto", "femto", "pico", "nano", "tiny", "huge")),
]


@pytest.mark.parametrize(("model_type", "name"), NETWORKS)
@pytest.mark.parametrize("num_labels", [1000, 21841, 0])
def test_parameter_counts_are_equal(model_type, name, num_labels):
    with torch.device("meta"):
        theirs = timm.create_model(f"{model_type}_{name}", num_classes=num_labels)
    config = ConvNextConfig.preset(name, num_labels=num_labels, model_type=model_type)
    model = ConvNextForImageClassification(config, implementation="plain")
    ours = jax.tree.leaves(jax.eval_shape(model.init_variables, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in ours) == sum(
        parameter.numel() for parameter in theirs.parameters()
    )


@pytest.mark.parametrize("name", ["atto", "tiny"])  # with 1x1 convolutions, with linear layers
def test_logits_and_maps_are_equal(name, record_worst):
    theirs = timm.create_model(f"convnext_{name}", num_classes=10).double().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # as in the comparison with transformers
            value = rng.standard_normal(tuple(parameter.shape))
            value = (
                value / math.sqrt(math.prod(value.shape[1:])) if value.ndim > 1 else 1 + value / 5
            )
            parameter.copy_(torch.from_numpy(value))
        pictures = rng.standard_normal((2, 3, 70, 64))
        maps = theirs.forward_intermediates(torch.from_numpy(pictures), intermediates_only=True)
        expected = [theirs(torch.from_numpy(pictures)), *maps]

    # The original's final epsilon; Hugging Face's default is 1e-12.
    config = ConvNextConfig.preset(name, num_labels=10, layer_norm_eps=1e-6)
    with jax.enable_x64(True):
        model = ConvNextForImageClassification(config, implementation="plain")
        state = hugging_face_names({k: v.numpy() for k, v in theirs.state_dict().items()})
        variables = pretrained.load_state_dict(model, state, "timm's network")
        output = jax.jit(lambda v, x: model.apply(v, x, output_hidden_states=True))(
            variables, pictures
        )
        ours = [output.logits, *output.hidden_states[1:]]
    errors = {
        f"output {i}": float(np.abs(np.asarray(a) - b.numpy()).max() / b.abs().max())
        for i, (a, b) in enumerate(zip(ours, expected, strict=True))
    }
    record_worst("f64, timm", errors)
    assert max(errors.values()) < 1e-9


def hugging_face_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMING:
            name = re.sub(pattern, replacement, name)
        if ".pwconv" in name and value.ndim == 4:  # a linear layer written as a 1x1 convolution
            value = value[:, :, 0, 0]
        renamed[name] = value
    return renamed
