r"""ConvNeXt fine-tuned on ImageNet-1k, at 224 or 384 pixels, with a learning rate for each depth.

    python train.py --config configs/finetune.py:22k_base_384 \
        --config.init_from=facebook/convnext-base-224-22k --config.data.folder=FOLDER

`init_from` must be given: the network of the row's name, trained at 224 pixels on what stands
before it, as a folder, a file or a hub name. (`configs/imagenet1k.py` and `imagenet22k.py` make
such networks.) FOLDER holds `train/<class>/*` and `val/<class>/*`. The row follows the colon;
without one it is `22k_base_224`.

    row             top-1   start                              8 GPUs on each of   images a GPU
    1k_base_384      85.1   facebook/convnext-base-224                   2 nodes             32
    1k_large_384     85.5   facebook/convnext-large-224                  2 nodes             32
    22k_tiny_224     82.9   convnext_tiny_22k_224.pth                no command released
    22k_small_224    84.6   convnext_small_22k_224.pth               no command released
    22k_base_224     85.8   facebook/convnext-base-224-22k               2 nodes             32
    22k_large_224    86.6   facebook/convnext-large-224-22k              2 nodes             32
    22k_xlarge_224   87.0   facebook/convnext-xlarge-224-22k             4 nodes             16
    22k_tiny_384     84.1   convnext_tiny_22k_224.pth                no command released
    22k_small_384    85.8   convnext_small_22k_224.pth               no command released
    22k_base_384     86.8   facebook/convnext-base-224-22k               4 nodes             16
    22k_large_384    87.5   facebook/convnext-large-224-22k              4 nodes             16
    22k_xlarge_384   87.8   facebook/convnext-xlarge-224-22k             8 nodes              8

The accuracies are those that the authors publish. These rows have not been run here, so that what
they reach with this code is not known. All see 512 photos a step, in float32
(--config.dtype=bfloat16 is faster and is no part of them); `gradient_accumulation` fits them onto
fewer devices.

The commands are those of `TRAINING.md` of facebookresearch/ConvNeXt. For tiny and small there are
none: their drop path, and a layer decay of 0.8 from one group of three blocks to the next, are
those of table 6 of arXiv:2201.03545v2. The twelve groups of the authors' code are made for depths
of 3, 3, 27 and 3, so tiny decays from block to block (`single`) by the cube root of 0.8; that
choice is ours.

What one may stumble over:

* From ImageNet-1k the head stays, and `head_init_scale` has nothing to act on; from ImageNet-22k
  it is replaced.
* 1k_base starts from the raw weights at the authors', 1k_large from the averaged ones, and what is
  on the hub is averaged. --config.init_averaged=true takes the averaged ones of a training file.
* 384 pixels are evaluated without a crop, whatever `crop_pct` says.
* The average's horizon of 10,000 steps is a seventh of these 75,060; only xlarge has one.
"""

from ml_collections import ConfigDict

from convnext_jax.configuration import PRESETS
from convnext_jax.errors import InputError
from convnext_jax.training.config import default_config, picture_data

ROWS = {
    "1k_base_384": {"drop_path": 0.8, "layer_decay": 0.7},
    "1k_large_384": {"drop_path": 0.95, "layer_decay": 0.7},
    "22k_tiny_224": {"drop_path": 0.0, "layer_decay": 0.8 ** (1 / 3), "rule": "single"},
    "22k_small_224": {"drop_path": 0.1, "layer_decay": 0.8},
    "22k_base_224": {"drop_path": 0.2, "layer_decay": 0.8},
    "22k_large_224": {"drop_path": 0.3, "layer_decay": 0.8},
    "22k_xlarge_224": {"drop_path": 0.4, "layer_decay": 0.8, "ema": 0.9999},
    "22k_tiny_384": {"drop_path": 0.0, "layer_decay": 0.8 ** (1 / 3), "rule": "single"},
    "22k_small_384": {"drop_path": 0.1, "layer_decay": 0.8},
    "22k_base_384": {"drop_path": 0.2, "layer_decay": 0.8},
    "22k_large_384": {"drop_path": 0.3, "layer_decay": 0.8},
    "22k_xlarge_384": {"drop_path": 0.4, "layer_decay": 0.8, "ema": 0.9999},
}


def get_config(row: str = "22k_base_224") -> ConfigDict:
    """The settings of a row: those of `default_config`, but for what is stated here."""
    if row not in ROWS:
        raise InputError(f"there is no row {row!r} in finetune.py: choose from {', '.join(ROWS)}")
    config, values = default_config(), ROWS[row]
    _, network, side = row.split("_")
    with config.unlocked():
        config.data = picture_data("data/imagenet-1k")
    config.plan_examples, config.plan_classes = 1_281_167, 1000
    config.image_size = int(side)
    config.model.update(PRESETS[network])
    config.model.drop_path_rate = values["drop_path"]
    # What the blocks of the large networks keep for the backward pass is most of a step's memory.
    config.remat = network in ("large", "xlarge")
    config.head_init_scale = 0.001

    config.batch_size = 512
    config.epochs = 30.0
    config.warmup_epochs = 0.0
    config.learning_rate = 5e-5
    config.weight_decay = 1e-8
    config.layer_decay = values["layer_decay"]
    config.layer_decay_rule = values.get("rule", "group")
    config.ema_decay = values.get("ema", 0.0)
    config.mixup = config.cutmix = 0.0
    return config
