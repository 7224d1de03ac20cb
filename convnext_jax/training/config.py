"""Every setting of a training run, with the paper's ImageNet-1k values for ConvNeXt-T.

A file under `configs/` starts from `default_config()` and states what it changes; the result is
locked, so that a key that does not exist is an error in the file and on the command line alike.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict, config_dict

from convnext_jax.errors import InputError
from convnext_jax.image.randaugment import parse_policy


def default_config() -> ConfigDict:
    """The settings of a run; each comment says what it means and in which unit."""
    config = ConfigDict()
    config.seed = 0  # of initial weights, order of examples, crops, flips and drop path

    # Arguments of `convnext_jax.data.sources.load`; each data set has its own.
    config.data = ConfigDict({"name": "digits"})
    config.tune_fraction = 0.0  # share of the training part that replaces val, to tune on
    config.tune_seed = 0  # which share
    # For `train.py --plan` alone, before the data is there: the number of examples to train on and
    # of their classes. 0: as the data has.
    config.plan_examples = 0
    config.plan_classes = 0

    # Fields of ConvNextConfig. The number of classes and their names come from the data. With
    # `init_from` the network comes from there, all but its drop path: type, patch size, depths and
    # widths must agree, unless the depths are (), which take what there is.
    config.model = ConfigDict(
        {
            "model_type": "convnext",
            "patch_size": 4,
            "depths": (3, 3, 9, 3),
            "hidden_sizes": (96, 192, 384, 768),
            "hidden_act": "gelu",
            "layer_scale_init_value": 1e-6,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "drop_path_rate": 0.1,
        }
    )
    config.dtype = "float32"  # of the computation: "float32" or "bfloat16"; parameters stay f32
    config.remat = False  # compute whole blocks again in the backward pass: less memory, more time
    config.kernels = True  # the fastest form of each operation; False: XLA's own ones alone
    config.scan = False  # run the blocks of a stage as a loop: compiles sooner, runs slower

    # Fine-tuning.
    config.init_from = ""  # a checkpoint to start from: a folder, a file of weights or a hub name
    config.init_averaged = False  # take the averaged weights of a training run's file
    config.head_init_scale = 1.0  # multiplies a new head's kernel
    config.freeze_backbone = False  # train the head alone (a linear probe)

    config.image_size = 224  # side of the square that the network sees, in pixels
    config.mean = (0.485, 0.456, 0.406)  # of each channel, for pixels in 0..1
    config.std = (0.229, 0.224, 0.225)
    config.crop_scale = (0.08, 1.0)  # area of the random crop, as a share of the picture
    config.crop_ratio = (3 / 4, 4 / 3)  # its width over its height
    config.shift = 0  # not 0: no crop, but a shift by up to so many pixels, reflecting
    config.flip = 0.5  # probability of a horizontal flip
    config.augment = "rand-m9-mstd0.5-inc1"  # RandAugment as timm spells it, "three", or "": none
    config.color_jitter = 0.4  # strength; acts where `augment` is not RandAugment
    config.erase = 0.25  # probability of erasing a box
    config.mixup = 0.8  # alpha of the Beta distribution that mixup draws from; 0: none
    config.cutmix = 1.0  # the same for cutmix
    config.mix_prob = 1.0  # probability that a group is mixed at all
    config.mix_switch_prob = 0.5  # probability of cutmix where both are on
    config.mix_group = 128  # examples that share one draw, at most a part of a device's batch
    config.crop_pct = 0.875  # evaluation: the centre kept after resizing; from 384 px on, all is

    config.batch_size = 4096  # of an optimizer step: over all devices and accumulated parts
    config.gradient_accumulation = 1  # parts that a device computes its share of the batch in
    config.epochs = 300.0
    config.warmup_epochs = 20.0
    config.learning_rate = 4e-3  # after the warm-up, which starts at 0
    config.learning_rate_batch = 0  # the batch_size that it is for, scaled by; 0: not scaled
    config.min_learning_rate = 1e-6  # where the cosine ends
    config.weight_decay = 0.05  # of kernels; biases, norms and layer scale do not decay
    config.weight_decay_end = config_dict.placeholder(float)  # a cosine leads there; None: constant
    config.layer_decay = 1.0  # learning rate of a layer over that of the layer above it
    config.layer_decay_rule = "group"  # the paper's twelve groups, or "single": each block is one
    config.muon = False  # move the MLPs' kernels by Muon, not AdamW: for training from scratch
    config.adam_betas = (0.9, 0.999)
    config.adam_eps = 1e-8
    config.gradient_clip = 0.0  # largest global norm; 0 does not clip
    config.label_smoothing = 0.1
    config.ema_decay = 0.9999  # of the averaged weights, which are then what is exported; 0: none
    config.ema_warmup = False  # let the decay grow from 0.1: for runs of a few thousand steps

    config.max_skipped_steps = 0  # leave out so many steps whose loss is not finite, then stop

    config.parallelism = "pmap"  # the state whole on every device, or "sharded" over them
    config.eval_every_epochs = 1.0  # besides the evaluation at the end
    config.eval_batch_size = 0  # over all devices; 0 takes batch_size
    config.checkpoint_every_epochs = 1.0
    config.keep_checkpoints = 3  # the newest ones; the best one stays besides
    config.failed_save = "stop"  # or "continue", when a checkpoint cannot be written: a full disk
    config.log_every_steps = 50
    config.log_example_ids = False  # write the ids of each step's examples to examples.jsonl
    config.max_unreadable = 0.05  # share of a split's examples that the run may do without
    config.loader_workers = 0  # that decode pictures on this host; 0: as its cores suggest
    return config.lock()


def picture_data(folder: str) -> ConfigDict:
    """The settings `data` of any data set of pictures in files, by default a folder of folders.

    None leaves an argument at its default; a data set that has it not, as `label` of all but
    `hf_datasets`, takes no other. See `convnext_jax.data.sources.DATASETS`.
    """
    return ConfigDict(
        {
            "name": "image_folder",
            "folder": folder,
            "train": config_dict.placeholder(str),  # of shards: patterns, or splits
            "val": config_dict.placeholder(str),
            "val_fraction": config_dict.placeholder(float),
            "split_seed": config_dict.placeholder(int),
            "class_names": config_dict.placeholder(str),
            "label": config_dict.placeholder(str),
        }
    )


def small_data_config() -> ConfigDict:
    """`default_config` changed for some thousand to some ten thousand pictures, from scratch.

    The paper's own settings stay near chance there: its learning rate is for batches of 4,096, its
    average still holds the initial weights after a few thousand steps, and blocks that start at a
    millionth of their strength need longer than such a run lasts.
    """
    config = default_config()
    config.model.layer_scale_init_value = 1.0
    config.model.initializer_range = 0.06
    config.batch_size = 512
    config.learning_rate = 6e-3
    config.learning_rate_batch = 512
    config.weight_decay = 0.4
    config.muon = True
    config.mix_prob = 0.5
    config.ema_decay = 0.999
    config.ema_warmup = True
    return config


def peak_learning_rate(config: FrozenConfigDict) -> float:
    """The learning rate after the warm-up, scaled by the batch if the settings say so."""
    reference = config.learning_rate_batch or config.batch_size
    return config.learning_rate * config.batch_size / reference


def optimizer_groups(config: FrozenConfigDict) -> dict[str, Any]:
    """What `recipe.optimizer` and `recipe.group_table` are told of the groups of parameters."""
    return {
        "layer_decay": config.layer_decay,
        "layer_decay_rule": config.layer_decay_rule,
        "freeze_backbone": config.freeze_backbone,
        "muon": config.muon,
    }


def check(config: FrozenConfigDict) -> None:
    """Refuses settings that no run can be made with, before anything is read or written.

    Raises:
      InputError: naming the setting, its value and what it may be.
    """
    triple = "three numbers"
    rules = {
        "seed": (0 <= config.seed < 2**32, "0 to below 2**32"),
        "tune_fraction": (0 <= config.tune_fraction < 1, "0 to below 1"),
        "plan_examples": (config.plan_examples >= 0, "0 or more"),
        "plan_classes": (config.plan_classes >= 0, "0 or more"),
        "head_init_scale": (config.head_init_scale >= 0, "0 or more"),
        "dtype": (config.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        "image_size": (config.image_size > 0, "more than 0"),
        "mean": (
            len(config.mean) == 3 and all(0 <= x <= 1 for x in config.mean),
            triple + " from 0 to 1",
        ),
        "std": (len(config.std) == 3 and all(x > 0 for x in config.std), triple + " above 0"),
        "crop_scale": (_is_range(config.crop_scale, 1), "(low, high) with 0 < low <= high <= 1"),
        "crop_ratio": (_is_range(config.crop_ratio), "(low, high) with 0 < low <= high"),
        "shift": (0 <= config.shift < config.image_size, "0 to below image_size"),
        "flip": (0 <= config.flip <= 1, "0 to 1"),
        "color_jitter": (config.color_jitter >= 0, "0 or more"),
        "erase": (0 <= config.erase <= 1, "0 to 1"),
        "mixup": (config.mixup >= 0, "0 or more"),
        "cutmix": (config.cutmix >= 0, "0 or more"),
        "mix_prob": (0 <= config.mix_prob <= 1, "0 to 1"),
        "mix_switch_prob": (0 <= config.mix_switch_prob <= 1, "0 to 1"),
        "mix_group": (config.mix_group > 0, "1 or more"),
        "crop_pct": (0 < config.crop_pct <= 1, "above 0 and at most 1"),
        "epochs": (config.epochs > 0, "more than 0"),
        "warmup_epochs": (config.warmup_epochs >= 0, "0 or more"),
        "learning_rate": (config.learning_rate >= 0, "0 or more"),
        "min_learning_rate": (config.min_learning_rate >= 0, "0 or more"),
        "adam_eps": (config.adam_eps > 0, "more than 0"),
        "learning_rate_batch": (config.learning_rate_batch >= 0, "0 or more"),
        "gradient_accumulation": (config.gradient_accumulation > 0, "1 or more"),
        "weight_decay": (config.weight_decay >= 0, "0 or more"),
        "weight_decay_end": (
            config.weight_decay_end is None or config.weight_decay_end >= 0,
            "0 or more, or None",
        ),
        "layer_decay": (0 < config.layer_decay <= 1, "above 0 and at most 1"),
        "layer_decay_rule": (config.layer_decay_rule in ("group", "single"), "'group' or 'single'"),
        "adam_betas": (
            len(config.adam_betas) == 2 and all(0 <= beta < 1 for beta in config.adam_betas),
            "two numbers from 0 to below 1",
        ),
        "gradient_clip": (config.gradient_clip >= 0, "0 or more"),
        "label_smoothing": (0 <= config.label_smoothing < 1, "0 to below 1"),
        "ema_decay": (0 <= config.ema_decay < 1, "0 to below 1"),
        "max_skipped_steps": (config.max_skipped_steps >= 0, "0 or more"),
        "parallelism": (config.parallelism in ("pmap", "sharded"), "'pmap' or 'sharded'"),
        "failed_save": (config.failed_save in ("stop", "continue"), "'stop' or 'continue'"),
        "eval_every_epochs": (config.eval_every_epochs > 0, "more than 0"),
        "checkpoint_every_epochs": (config.checkpoint_every_epochs > 0, "more than 0"),
        "keep_checkpoints": (config.keep_checkpoints > 0, "1 or more"),
        "log_every_steps": (config.log_every_steps > 0, "1 or more"),
        "max_unreadable": (0 <= config.max_unreadable <= 1, "0 to 1"),
        "loader_workers": (config.loader_workers >= 0, "0 or more"),
    }
    if config.augment not in ("", "three"):
        parse_policy(config.augment)
    if not config.init_from and (config.layer_decay < 1 or config.freeze_backbone):
        raise InputError(
            "init_from is not set, and a layer_decay below 1 and freeze_backbone are for a network "
            "that has learnt something: give a checkpoint with --config.init_from=FOLDER"
        )
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise InputError(f"{name} is {config[name]!r}: give {wanted}")


def train_pictures(config: FrozenConfigDict) -> dict[str, Any]:
    """What `data.pipeline.train_batches` is told of the pictures: their size and their crops."""
    return {
        "image_size": config.image_size,
        "seed": config.seed,
        "crop_scale": None if config.shift > 0 else tuple(config.crop_scale),
        "crop_ratio": tuple(config.crop_ratio),
        "crop_pct": config.crop_pct,
    }


def eval_pictures(config: FrozenConfigDict) -> dict[str, Any]:
    """What `data.pipeline.eval_batches` is told of the pictures."""
    return {"image_size": config.image_size, "crop_pct": config.crop_pct}


def _is_range(bounds: tuple[float, ...], most: float = float("inf")) -> bool:
    return len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= most
