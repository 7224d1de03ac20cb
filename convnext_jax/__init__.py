"""ConvNeXt in JAX: the names of Hugging Face's documentation, as pure linen modules.

from convnext_jax import ConvNextForImageClassification, ConvNextImageProcessor
"""

from convnext_jax.configuration import ConvNextConfig
from convnext_jax.errors import InputError
from convnext_jax.image.processor import ConvNextFeatureExtractor, ConvNextImageProcessor
from convnext_jax.modeling import (
    ConvNextBackbone,
    ConvNextForImageClassification,
    ConvNextModel,
)

__all__ = [
    "ConvNextBackbone",
    "ConvNextConfig",
    "ConvNextFeatureExtractor",
    "ConvNextForImageClassification",
    "ConvNextImageProcessor",
    "ConvNextModel",
    "InputError",
]
