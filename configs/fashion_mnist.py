"""ConvNeXt on Fashion-MNIST: 28x28 grey pictures of clothes, 60,000 to train on and 10,000 to test.

Reads the four official files (`train-images-idx3-ubyte.gz` and its three companions), which are not
downloaded:

    python train.py --config configs/fashion_mnist.py --config.data.folder=FOLDER

Its accuracy has not been measured yet.
"""

from ml_collections import ConfigDict

from convnext_jax.training.config import default_config


def get_config() -> ConfigDict:
    """The settings of the run."""
    config = default_config()
    with config.unlocked():
        config.data = ConfigDict({"name": "fashion_mnist", "folder": "data/fashion-mnist"})
    config.image_size = 28
    config.crop_pct = 1.0
    config.mean = config.std = (0.5, 0.5, 0.5)
    config.crop_scale = (0.6, 1.0)
    # A stem of 2x2 patches: maps of 14, 7 and 3.
    config.model.patch_size = 2
    config.model.depths = (2, 4, 2)
    config.model.hidden_sizes = (64, 128, 256)
    config.model.drop_path_rate = 0.1

    config.batch_size = 256
    config.epochs = 30.0
    config.warmup_epochs = 2.0
    config.learning_rate = 2e-3
    config.ema_decay = 0.999
    config.ema_warmup = True
    return config
