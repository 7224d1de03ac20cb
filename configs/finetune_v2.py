r"""ConvNeXt V2 fine-tuned on ImageNet-1k at 224 pixels, from its self-supervised weights (FCMAE).

    convnext-jax convert convnextv2_base_1k_224_fcmae.pt fcmae_base
    python train.py --config configs/finetune_v2.py:base \
        --config.init_from=fcmae_base --config.data.folder=FOLDER

`init_from` must be given: the encoder of the row's name, pre-trained without labels. FOLDER holds
`train/<class>/*` and `val/<class>/*`. The row follows the colon; without one it is `base`.

    row    top-1   parameters   multiply-adds   epochs
    base    84.9       88.7 M          15.4 G      100
    tiny    83.0       28.6 M           4.5 G      300
    atto    76.7        3.7 M          0.55 G      600

The accuracies are those that the authors publish, of averaged weights, trained in JAX on TPUs. The
rows are the PyTorch commands of `TRAINING.md` of facebookresearch/ConvNeXt-V2, which has them for
these three alone: 4 nodes of 8 GPUs with 32 images each, so 1,024 photos a step, in mixed
precision, which is bfloat16 here. (`gradient_accumulation` fits them onto fewer devices; on one
machine with 8 GPUs the authors take 4.) They have not been run here, so that what they reach with
this code is not known.

The learning rates are the commands' `blr` times 1024 / 256. The authors draw the head anew with a
standard deviation of 2e-5, which is the 0.02 of every kernel times `head_init_scale`. Two
differences: their warm-up reaches its rate one step later, and their half precision is float16.
"""

from ml_collections import ConfigDict

from convnext_jax.configuration import PRESETS
from convnext_jax.errors import InputError
from convnext_jax.training.config import default_config, picture_data

ROWS = {
    "base": {
        "model": {"drop_path_rate": 0.1},
        "epochs": 100.0,
        "warmup_epochs": 20.0,
        "learning_rate": 2.5e-3,
        "layer_decay": 0.6,
        "layer_decay_rule": "group",
    },
    "tiny": {
        "model": {"drop_path_rate": 0.2},
        "epochs": 300.0,
        "warmup_epochs": 40.0,
        "learning_rate": 3.2e-3,
        "layer_decay": 0.9,
        "layer_decay_rule": "single",
    },
    "atto": {
        "model": {"drop_path_rate": 0.1},
        "epochs": 600.0,
        "warmup_epochs": 0.0,
        "learning_rate": 8e-4,
        "layer_decay": 0.9,
        "layer_decay_rule": "single",
        "weight_decay": 0.3,
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.2,
    },
}


def get_config(row: str = "base") -> ConfigDict:
    """The settings of a row: those of `default_config`, but for what is stated here."""
    if row not in ROWS:
        raise InputError(
            f"there is no row {row!r} in finetune_v2.py: choose from {', '.join(ROWS)}"
        )
    config = default_config()
    with config.unlocked():
        config.data = picture_data("data/imagenet-1k")
    config.plan_examples, config.plan_classes = 1_281_167, 1000
    config.model.update(PRESETS[row])
    config.model.model_type = "convnextv2"
    config.model.layer_scale_init_value = 0.0  # there is none
    config.head_init_scale = 0.001
    config.dtype = "bfloat16"
    config.batch_size = 1024
    config.mix_group = 32  # the images on one of the authors' GPUs, which share a draw of mixup
    config.update(ROWS[row])
    return config
