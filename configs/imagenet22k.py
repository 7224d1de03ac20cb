"""ConvNeXt pre-trained on ImageNet-22k at 224 pixels: 21,841 classes, 90 epochs, no averaging.

    python train.py --config configs/imagenet22k.py:base --config.data.folder=FOLDER

FOLDER holds `<class>/*` for each of the 21,841 classes of the release of fall 2011, some 14.2
million photos. With --config.data.name=tar_shards it holds `*.tar` in webdataset's layout, or those
that --config.data.train='imagenet22k-train-{0000..4095}.tar' says; docs/training.md has the others.
The row follows the colon; without one it is `base`. `configs/finetune.py` makes a classifier of the
1,000 classes of it.

    row       top-1 after fine-tuning at 224 / 384   parameters   multiply-adds
    tiny                               82.9 / 84.1       44.6 M           4.5 G
    small                              84.6 / 85.8       66.3 M           8.7 G
    base                               85.8 / 86.8      110.0 M          15.4 G
    large                              86.6 / 87.5      229.8 M          34.4 G
    xlarge                             87.0 / 87.8      392.9 M          61.0 G

The accuracies, on ImageNet-1k, are those that the authors publish; they give none on ImageNet-22k.
These rows have not been run here, so that what they reach with this code is not known.

base, large and xlarge are the commands of `TRAINING.md` of facebookresearch/ConvNeXt: 16 nodes of 8
GPUs with 32 images each, in float32 (--config.dtype=bfloat16 is faster and is no part of them). For
tiny and small no command was released; their drop path is that of table 5 of arXiv:2201.03545v2.
`gradient_accumulation` fits the 4,096 photos of a step onto fewer devices; on one machine with 8
GPUs the authors take 16.

One difference: the authors train on every photo and evaluate on none. Here one in a thousand is
held out, unless FOLDER has `train/` and `val/`, or `*val*.tar`, and is evaluated once, at the end.
"""

from ml_collections import ConfigDict

from convnext_jax.configuration import PRESETS
from convnext_jax.errors import InputError
from convnext_jax.training.config import default_config, picture_data

ROWS = {  # drop path
    "tiny": 0.0,
    "small": 0.0,
    "base": 0.1,
    "large": 0.1,
    "xlarge": 0.2,
}


def get_config(row: str = "base") -> ConfigDict:
    """The settings of a row: those of `default_config`, but for what is stated here."""
    if row not in ROWS:
        raise InputError(
            f"there is no row {row!r} in imagenet22k.py: choose from {', '.join(ROWS)}"
        )
    config = default_config()
    with config.unlocked():
        config.data = picture_data("data/imagenet-22k")
        config.data.val_fraction, config.data.split_seed = 0.001, 0
    # One in a thousand of the 14,197,122 is held out.
    config.plan_examples, config.plan_classes = round(0.999 * 14_197_122), 21841
    config.model.update(PRESETS[row])
    config.model.drop_path_rate = ROWS[row]
    # What the blocks of the large networks keep for the backward pass is most of a step's memory.
    config.remat = row in ("large", "xlarge")

    config.epochs = 90.0
    config.warmup_epochs = 5.0
    config.ema_decay = 0.0
    config.mix_group = 32  # the images on one of the authors' GPUs, which share a draw of mixup
    config.eval_every_epochs = config.epochs
    config.eval_batch_size = 1024  # is not accumulated, and must fit onto fewer devices too
    return config
