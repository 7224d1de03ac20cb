"""A folder of pictures of one's own: from scratch, or from any checkpoint this library reads.

    python train.py --config configs/image_folder.py --config.data.folder=FOLDER
    python train.py --config configs/image_folder.py:finetune --config.data.folder=FOLDER \
        --config.init_from=facebook/convnext-tiny-224
    python train.py --config configs/image_folder.py:probe --config.data.folder=FOLDER \
        --config.init_from=facebook/convnext-tiny-224

FOLDER holds `train/<class>/*` and `val/<class>/*`, or `<class>/*` alone, a share of which is then
held out: the same pictures on every machine, drawn evenly over the classes.

Without a row, a ConvNeXt-atto from scratch, for some thousands of pictures. `finetune` changes the
whole checkpoint, the lower layers less than the upper ones; some hundreds of pictures will do.
`probe` freezes it and trains a new head alone, which needs the least time and memory. For
`init_from` give a hub name, a folder, or a file of timm, torchvision or the original repositories.
"""

from ml_collections import ConfigDict

from convnext_jax.errors import InputError
from convnext_jax.training.config import default_config, picture_data, small_data_config

ROWS = ("scratch", "finetune", "probe")


def get_config(row: str = "scratch") -> ConfigDict:
    """The settings of the run."""
    if row not in ROWS:
        raise InputError(f"configs/image_folder.py has no row {row!r}: it has {', '.join(ROWS)}")
    config = small_data_config() if row == "scratch" else default_config()
    with config.unlocked():
        config.data = picture_data("")
        config.data.val_fraction, config.data.split_seed = 0.2, 0
    config.log_every_steps = 10
    if row == "scratch":
        config.image_size = 128
        config.crop_scale = (0.25, 1.0)
        config.model.depths = (2, 2, 6, 2)
        config.model.hidden_sizes = (40, 80, 160, 320)
        config.batch_size = 64
        config.epochs = 100.0
        config.warmup_epochs = 5.0
        config.ema_decay = 0.995
        return config

    config.model.depths = ()  # the checkpoint's network
    config.model.hidden_sizes = ()
    config.image_size = 224
    config.crop_scale = (0.25, 1.0)
    config.mixup = config.cutmix = 0.0
    config.batch_size = 32
    config.ema_decay = 0.0  # too few steps for an average
    config.checkpoint_every_epochs = 5.0
    if row == "finetune":
        config.learning_rate = 3e-4
        config.learning_rate_batch = 32
        config.layer_decay = 0.8
        config.layer_decay_rule = "single"
        config.head_init_scale = 0.001
        config.epochs = 30.0
        config.warmup_epochs = 2.0
    else:
        config.freeze_backbone = True
        config.model.drop_path_rate = 0.0
        config.augment = ""
        config.color_jitter = config.erase = 0.0
        config.learning_rate = 1e-3
        config.learning_rate_batch = 32
        config.weight_decay = 0.0
        config.epochs = 30.0
        config.warmup_epochs = 1.0
    return config
