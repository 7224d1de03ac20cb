"""The operations of a ConvNeXt that have more than one implementation, and its activations."""

from convnext_jax.ops.activations import ACTIVATIONS, activation
from convnext_jax.ops.dense import dense
from convnext_jax.ops.depthwise_conv import depthwise_conv
from convnext_jax.ops.drop_path import drop_path_gain, own_part
from convnext_jax.ops.layer_norm import layer_norm
from convnext_jax.ops.norm_mlp import NormMlpWeights, is_fused_faster, norm_mlp
from convnext_jax.ops.patches import patches

__all__ = [
    "ACTIVATIONS",
    "NormMlpWeights",
    "activation",
    "dense",
    "depthwise_conv",
    "drop_path_gain",
    "is_fused_faster",
    "layer_norm",
    "norm_mlp",
    "own_part",
    "patches",
]
