"""ConvNeXt on Fashion-MNIST: 28x28 grey pictures of clothes, 60,000 to train on and 10,000 to test.

Reads the four official files (`train-images-idx3-ubyte.gz` and its three companions), which are not
downloaded:

    python train.py --config configs/fashion_mnist.py --config.data.folder=FOLDER
    python train.py --config configs/fashion_mnist.py:laptop --config.data.folder=FOLDER

Measured on the test pictures, looked at once, with the averaged weights:

    accelerator  95.96 % (the raw weights 95.85 %), 1.9 M parameters, 5 min 39 s in all on one H100
    laptop       91.44 %, 0.2 M parameters, 8 min 53 s in all on two CPU cores

The first was measured when its first stage's convolution was computed in another way: see
benchmarks/RESULTS.md.
"""

from ml_collections import ConfigDict

from convnext_jax.errors import InputError
from convnext_jax.training.config import small_data_config

ROWS = ("accelerator", "laptop")


def get_config(row: str = "accelerator") -> ConfigDict:
    """The settings of the run."""
    if row not in ROWS:
        raise InputError(f"configs/fashion_mnist.py has no row {row!r}: it has {', '.join(ROWS)}")
    config = small_data_config()
    with config.unlocked():
        config.data = ConfigDict({"name": "fashion_mnist", "folder": "data/fashion-mnist"})
    config.crop_pct = 1.0
    config.mean = config.std = (0.5, 0.5, 0.5)
    config.shift = 2
    config.augment = ""  # the pictures have no colours, and stand upright
    config.color_jitter = 0.0
    config.log_every_steps = 100
    if row == "laptop":
        # A stem of 4x4 patches: maps of 7 and 3.
        config.image_size = 28
        config.model.depths = (2, 2)
        config.model.hidden_sizes = (48, 96)
        config.model.drop_path_rate = 0.0
        config.erase = config.mixup = config.cutmix = config.label_smoothing = 0.0
        config.shift = 1
        config.batch_size = 64
        config.learning_rate = 8e-3  # for 512: an eighth of it is used
        config.weight_decay = 0.05
        config.epochs = 10.0
        config.warmup_epochs = 0.5
        config.ema_decay = 0.99
        config.eval_batch_size = 500
        return config

    # A stem of 2x2 patches and one halving: eight blocks on maps of 14x14 and four on 7x7.
    config.image_size = 28
    config.model.patch_size = 2
    config.model.depths = (8, 4)
    config.model.hidden_sizes = (96, 192)
    config.model.drop_path_rate = 0.1
    config.dtype = "bfloat16"
    config.epochs = 160.0
    config.warmup_epochs = 3.0
    config.eval_every_epochs = 20.0
    config.checkpoint_every_epochs = 80.0
    config.eval_batch_size = 1000
    return config
