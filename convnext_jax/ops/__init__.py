"""The operations of a ConvNeXt that have more than one implementation, and its activations."""

from convnext_jax.ops.activations import ACTIVATIONS, activation
from convnext_jax.ops.depthwise_conv import depthwise_conv
from convnext_jax.ops.drop_path import drop_path, own_part

__all__ = ["ACTIVATIONS", "activation", "depthwise_conv", "drop_path", "own_part"]
