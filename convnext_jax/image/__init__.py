"""Pictures: decoding, resizing, the image processor, augmentation. Knows nothing of models."""

from convnext_jax.image.augment import normalize, random_flip
from convnext_jax.image.crop import CROP_DRAWS, sample_crop
from convnext_jax.image.decode import read_image, to_rgb
from convnext_jax.image.processor import (
    PRESETS,
    BatchFeature,
    ConvNextFeatureExtractor,
    ConvNextImageProcessor,
    resize_rule,
)
from convnext_jax.image.resample import (
    ResizePlan,
    Taps,
    apply_plan,
    pack,
    plan_resize,
    resize,
)

__all__ = [
    "CROP_DRAWS",
    "PRESETS",
    "BatchFeature",
    "ConvNextFeatureExtractor",
    "ConvNextImageProcessor",
    "ResizePlan",
    "Taps",
    "apply_plan",
    "normalize",
    "pack",
    "plan_resize",
    "random_flip",
    "read_image",
    "resize",
    "resize_rule",
    "sample_crop",
    "to_rgb",
]
