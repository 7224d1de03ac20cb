"""ConvNeXt on Imagenette at 128 pixels, from scratch: ten classes of ImageNet, 9,469 photos.

    python train.py --config configs/imagenette.py --config.data.folder=FOLDER

FOLDER holds `train/<class>/*` and `val/<class>/*`. All photos are decoded once, into half a
gigabyte. These settings have not been measured on Imagenette yet.
"""

from ml_collections import ConfigDict

from convnext_jax.training.config import small_data_config


def get_config() -> ConfigDict:
    """The settings of the run."""
    config = small_data_config()
    with config.unlocked():
        config.data = ConfigDict(
            {
                "name": "image_folder",
                "folder": "data/imagenette128",
                "in_memory": True,
            }
        )
    config.image_size = 128
    config.crop_pct = 1.0  # the photos are 128 pixels wide and high already
    config.crop_scale = (0.25, 1.0)
    # Three stages, on maps of 32, 16 and 8.
    config.model.depths = (3, 3, 9)
    config.model.hidden_sizes = (96, 192, 384)
    config.model.drop_path_rate = 0.2
    config.dtype = "bfloat16"

    config.batch_size = 256
    config.epochs = 200.0
    config.warmup_epochs = 10.0
    config.eval_every_epochs = 20.0
    config.checkpoint_every_epochs = 100.0
    config.log_every_steps = 100
    return config
