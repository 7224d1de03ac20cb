"""ConvNeXt from scratch on ImageNet-1k at 224 pixels: the paper's recipe, a row for each network.

    python train.py --config configs/imagenet1k.py:base --config.data.folder=FOLDER

FOLDER holds `train/<class>/*` and `val/<class>/*`: 1,281,167 and 50,000 photos of 1,000 classes.
With --config.data.name=tar_shards it holds `*train*.tar` and `*val*.tar` in webdataset's layout, or
those that --config.data.train='imagenet-train-{000000..001281}.tar' and data.val say; with
array_record or tfds what TensorFlow Datasets has prepared. docs/training.md has the others.
The row follows the colon; without one it is `tiny`.

    row               top-1   parameters   multiply-adds   8 GPUs on each of   images a GPU
    tiny              82.1        28.6 M           4.5 G             4 nodes            128
    small             83.1        50.2 M           8.7 G             4 nodes            128
    base              83.8        88.6 M          15.4 G             4 nodes            128
    large             84.3       197.8 M          34.4 G             8 nodes             64
    isotropic_small   78.7        22.3 M           4.3 G             4 nodes            128
    isotropic_base    82.0        87.1 M          16.9 G             4 nodes            128
    isotropic_large   82.6       305.9 M          59.7 G             8 nodes             64

The accuracies are those that the authors publish, of averaged weights. These rows have not been run
here, so that what they reach with this code is not known.

All seven see 4,096 photos a step, for 93,600 steps. `gradient_accumulation` fits them onto fewer
devices without changing the steps: on one machine with 8 GPUs the authors take 4, and 8 for the two
large networks. They compute in float32; --config.dtype=bfloat16 is faster and is no part of the
published rows.

Settings: `TRAINING.md` of facebookresearch/ConvNeXt, and table 5 of arXiv:2201.03545.
"""

from ml_collections import ConfigDict

from convnext_jax.configuration import PRESETS
from convnext_jax.errors import InputError
from convnext_jax.training.config import default_config, picture_data

# `mix_group` is the number of images on one of the authors' GPUs, which share a draw of mixup.
ROWS = {
    "tiny": {"drop_path": 0.1, "warmup": 20.0, "mix_group": 128},
    "small": {"drop_path": 0.4, "warmup": 20.0, "mix_group": 128},
    "base": {"drop_path": 0.5, "warmup": 20.0, "mix_group": 128},
    "large": {"drop_path": 0.5, "warmup": 20.0, "mix_group": 64},
    "isotropic_small": {"drop_path": 0.1, "warmup": 50.0, "mix_group": 128},
    "isotropic_base": {"drop_path": 0.2, "warmup": 50.0, "mix_group": 128},
    "isotropic_large": {"drop_path": 0.5, "warmup": 50.0, "mix_group": 64},
}


def get_config(row: str = "tiny") -> ConfigDict:
    """The settings of a row: those of `default_config`, but for what is stated here."""
    if row not in ROWS:
        raise InputError(f"there is no row {row!r} in imagenet1k.py: choose from {', '.join(ROWS)}")
    config, values = default_config(), ROWS[row]
    with config.unlocked():
        config.data = picture_data("data/imagenet-1k")
    config.plan_examples, config.plan_classes = 1_281_167, 1000
    if row.startswith("isotropic_"):
        config.model.model_type = "convnext_isotropic"
        config.model.patch_size = 16
    config.model.update(PRESETS[row])  # with the layer scale of the isotropic networks
    config.model.drop_path_rate = values["drop_path"]
    config.warmup_epochs = values["warmup"]
    config.mix_group = values["mix_group"]
    # What the blocks of the large networks keep for the backward pass is most of a step's memory.
    config.remat = row.endswith("large")
    config.eval_batch_size = 1024  # is not accumulated, and must fit onto fewer devices too
    return config
