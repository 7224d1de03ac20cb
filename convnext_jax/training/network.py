"""The network of a run before training: a new one, or a checkpoint of anybody's."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from convnext_jax.configuration import ConvNextConfig
from convnext_jax.convert import convert
from convnext_jax.errors import InputError
from convnext_jax.image import ConvNextImageProcessor
from convnext_jax.modeling import ConvNextForImageClassification
from convnext_jax.training import recipe

PyTree = Any

AXIS = "batch"  # of `jax.pmap`, over which a batch is split
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def initial_model(
    config: FrozenConfigDict, class_names: tuple[str, ...], key: jax.Array
) -> tuple[ConvNextForImageClassification, PyTree]:
    """The network of a run, NHWC, over the axis of `jax.pmap`, and its parameters before training.

    Raises:
      InputError: when there is no such checkpoint, or it is of another network than the settings.
    """
    options = {
        "dtype": DTYPES[config.dtype], "data_format": "channels_last", "axis_name": AXIS,
        "remat": config.remat, "scan": config.scan,
        "implementation": None if config.kernels else "plain",
    }  # fmt: skip
    fields = config.model.to_dict()
    described = bool(fields["depths"])
    fields |= {"id2label": dict(enumerate(class_names)), "image_size": config.image_size}
    if described:
        fields["num_stages"] = len(fields["depths"])
    if not config.init_from:
        if not described:
            raise InputError(
                "neither init_from nor model.depths is set: give a checkpoint with "
                "--config.init_from=FOLDER, or the network"
            )
        model = ConvNextForImageClassification(ConvNextConfig(**fields), **options)
        return model, recipe.scale_head(model.init_variables(key)["params"], config.head_init_scale)

    with tempfile.TemporaryDirectory() as folder:  # any publisher's file as one that loads here
        made = convert(config.init_from, folder, averaged=config.init_averaged)
        wanted = ConvNextConfig(**fields) if described else None
        for name in ("model_type", "patch_size", "depths", "hidden_sizes"):
            found = getattr(made.model.config, name)
            if wanted and getattr(wanted, name) != found:
                raise InputError(
                    f"{config.init_from} has the {name} {found} and the settings "
                    f"{getattr(wanted, name)}: give the checkpoint of this network, or settings "
                    "that fit it"
                )
        # A head for as many classes is kept, as the original does; any other one is made anew.
        has_head = made.classes == len(class_names)
        with warnings.catch_warnings(action="ignore"):  # about the new head
            loaded, variables = ConvNextForImageClassification.from_pretrained(
                folder,
                ignore_mismatched_sizes=True,
                key=key,
                id2label=fields["id2label"],
                image_size=config.image_size,
                drop_path_rate=config.model.drop_path_rate,
            )
        processor = ConvNextImageProcessor.from_pretrained(folder)
    params = variables["params"]
    for remark in made.remarks:
        print(f"{config.init_from}: {remark}")
    if not np.allclose([*processor.image_mean, *processor.image_std], [*config.mean, *config.std]):
        print(
            f"{config.init_from}: was trained on pictures of mean {processor.image_mean} and std "
            f"{processor.image_std}, which these settings do not have: see mean and std"
        )
    said = f"{config.init_from}: weights of {made.publisher}, {made.classes} classes; "
    if has_head:
        theirs, ours = made.model.config.id2label.get(0), class_names[0]
        print(said + f"its head is kept; its first class is {theirs!r}, that of the data {ours!r}")
    else:
        print(said + f"a new head for {len(class_names)} classes")
        params = recipe.scale_head(params, config.head_init_scale)
    return ConvNextForImageClassification(loaded.config, **options), params
