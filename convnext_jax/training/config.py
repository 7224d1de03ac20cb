"""Every setting of a training run, with the paper's ImageNet-1k values for ConvNeXt-T.

A file under `configs/` starts from `default_config()` and states what it changes; the result is
locked, so that a key that does not exist is an error in the file and on the command line alike.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """The settings of a run; each comment says what it means and in which unit."""
    config = ConfigDict()
    config.seed = 0  # of initial weights, order of examples, crops, flips and drop path

    # Arguments of `convnext_jax.data.load`; each data set has its own.
    config.data = ConfigDict({"name": "digits"})

    # Fields of ConvNextConfig. The number of classes and their names come from the data.
    config.model = ConfigDict(
        {
            "num_channels": 3,
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
    config.crop_pct = 0.875  # evaluation: the centre that is kept after resizing; none from 384 on

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

    config.eval_every_epochs = 1.0  # besides the evaluation at the end
    config.eval_batch_size = 0  # over all devices; 0 takes batch_size
    config.checkpoint_every_epochs = 1.0
    config.keep_checkpoints = 3  # the newest ones
    config.log_every_steps = 50
    config.log_example_ids = False  # write the ids of each step's examples to examples.jsonl
    config.loader_threads = 16  # that decode pictures on this host
    return config.lock()
