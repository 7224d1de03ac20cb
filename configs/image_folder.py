"""ConvNeXt-atto from scratch on a folder of pictures of one's own.

    python train.py --config configs/image_folder.py --config.data.folder=FOLDER

FOLDER holds `train/<class>/*` and `val/<class>/*`, or `<class>/*` alone, a share of which is then
held out: the same pictures on every machine, drawn evenly over the classes. A start for some
hundreds of pictures or more, from scratch; its settings have not been tuned.
"""

from ml_collections import ConfigDict

from convnext_jax.training.config import default_config


def get_config() -> ConfigDict:
    """The settings of the run."""
    config = default_config()
    with config.unlocked():
        config.data = ConfigDict(
            {"name": "image_folder", "folder": "", "val_fraction": 0.2, "split_seed": 0}
        )
    config.image_size = 128
    config.crop_scale = (0.35, 1.0)
    config.model.depths = (2, 2, 6, 2)
    config.model.hidden_sizes = (40, 80, 160, 320)
    config.model.drop_path_rate = 0.1

    config.batch_size = 64
    config.epochs = 60.0
    config.warmup_epochs = 5.0
    config.learning_rate = 1e-3
    config.ema_decay = 0.995
    config.ema_warmup = True
    config.log_every_steps = 10
    return config
