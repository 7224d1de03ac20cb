"""Every setting of a training run, with the paper's ImageNet-1k values for ConvNeXt-T.

A file under `configs/` starts from `default_config()` and states what it changes; the result is
locked, so that a key that does not exist is an error in the file and on the command line alike.
"""

from __future__ import annotations

from ml_collections import ConfigDict, FrozenConfigDict

from convnext_jax.errors import InputError


def default_config() -> ConfigDict:
    """The settings of a run; each comment says what it means and in which unit."""
    config = ConfigDict()
    config.seed = 0  # of initial weights, order of examples, crops, flips and drop path

    # Arguments of `convnext_jax.data.load`; each data set has its own.
    config.data = ConfigDict({"name": "digits"})

    # Fields of ConvNextConfig. The number of classes and their names come from the data.
    config.model = ConfigDict(
        {
            "patch_size": 4,
            "depths": (3, 3, 9, 3),
            "hidden_sizes": (96, 192, 384, 768),
            "hidden_act": "gelu",
            "layer_scale_init_value": 1e-6,
            "layer_norm_eps": 1e-6,
            "drop_path_rate": 0.1,
        }
    )
    config.dtype = "float32"  # of the computation: "float32" or "bfloat16"; parameters stay f32

    config.image_size = 224  # side of the square that the network sees, in pixels
    config.mean = (0.485, 0.456, 0.406)  # of each channel, for pixels in 0..1
    config.std = (0.229, 0.224, 0.225)
    config.crop_scale = (0.08, 1.0)  # area of the random crop, as a share of the picture
    config.crop_ratio = (3 / 4, 4 / 3)  # its width over its height
    config.flip = 0.5  # probability of a horizontal flip
    config.crop_pct = 0.875  # evaluation: the centre kept after resizing; from 384 px on, all is

    config.batch_size = 4096  # over all devices
    config.epochs = 300.0
    config.warmup_epochs = 20.0
    config.learning_rate = 4e-3  # after the warm-up, which starts at 0; not scaled by batch_size
    config.min_learning_rate = 1e-6  # where the cosine ends
    config.weight_decay = 0.05  # of kernels; biases, norms and layer scale do not decay
    config.adam_betas = (0.9, 0.999)
    config.adam_eps = 1e-8
    config.gradient_clip = 0.0  # largest global norm; 0 does not clip
    config.label_smoothing = 0.1
    config.ema_decay = 0.9999  # of the averaged weights, which are then what is exported; 0: none
    config.ema_warmup = False  # let the decay grow from 0.1: for runs of a few thousand steps

    config.eval_every_epochs = 1.0  # besides the evaluation at the end
    config.eval_batch_size = 0  # over all devices; 0 takes batch_size
    config.checkpoint_every_epochs = 1.0
    config.keep_checkpoints = 3  # the newest ones
    config.log_every_steps = 50
    config.log_example_ids = False  # write the ids of each step's examples to examples.jsonl
    config.loader_threads = 16  # that decode pictures on this host
    return config.lock()


def check(config: FrozenConfigDict) -> None:
    """Refuses settings that no run can be made with, before anything is read or written.

    Raises:
      InputError: naming the setting, its value and what it may be.
    """
    triple = "three numbers"
    rules = {
        "seed": (config.seed >= 0, "0 or more"),
        "dtype": (config.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        "image_size": (config.image_size > 0, "more than 0"),
        "mean": (len(config.mean) == 3, triple),
        "std": (len(config.std) == 3 and all(x > 0 for x in config.std), triple + " above 0"),
        "crop_scale": (_is_range(config.crop_scale, 1), "(low, high) with 0 < low <= high <= 1"),
        "crop_ratio": (_is_range(config.crop_ratio), "(low, high) with 0 < low <= high"),
        "flip": (0 <= config.flip <= 1, "0 to 1"),
        "crop_pct": (0 < config.crop_pct <= 1, "above 0 and at most 1"),
        "epochs": (config.epochs > 0, "more than 0"),
        "warmup_epochs": (config.warmup_epochs >= 0, "0 or more"),
        "learning_rate": (config.learning_rate >= 0, "0 or more"),
        "weight_decay": (config.weight_decay >= 0, "0 or more"),
        "adam_betas": (
            len(config.adam_betas) == 2 and all(0 <= beta < 1 for beta in config.adam_betas),
            "two numbers from 0 to below 1",
        ),
        "gradient_clip": (config.gradient_clip >= 0, "0 or more"),
        "label_smoothing": (0 <= config.label_smoothing < 1, "0 to below 1"),
        "ema_decay": (0 <= config.ema_decay < 1, "0 to below 1"),
        "eval_every_epochs": (config.eval_every_epochs > 0, "more than 0"),
        "checkpoint_every_epochs": (config.checkpoint_every_epochs > 0, "more than 0"),
        "keep_checkpoints": (config.keep_checkpoints > 0, "1 or more"),
        "log_every_steps": (config.log_every_steps > 0, "1 or more"),
        "loader_threads": (config.loader_threads > 0, "1 or more"),
    }
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise InputError(f"{name} is {config[name]!r}: give {wanted}")


def _is_range(bounds: tuple[float, ...], most: float = float("inf")) -> bool:
    return len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= most
