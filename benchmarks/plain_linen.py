"""ConvNeXt as one writes it from flax.linen's own parts: what the benchmarks compare with.

Nothing here is chosen for speed, compiling or memory. `python benchmarks/plain_linen.py` tells how
far it is from `convnext_jax` with the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


class Block(nn.Module):
    """Depthwise 7x7, norm, MLP, layer scale, drop path, residual; (N, H, W, C) to the same."""

    drop_path: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), feature_group_count=width, dtype=self.dtype, name="dwconv")(x)
        y = nn.LayerNorm(dtype=self.dtype, name="layernorm")(y)
        y = nn.Dense(4 * width, dtype=self.dtype, name="pwconv1")(y)
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(width, dtype=self.dtype, name="pwconv2")(y)
        scale = self.param("layer_scale_parameter", nn.initializers.constant(1e-6), (width,))
        y *= scale.astype(y.dtype)
        if train and self.drop_path > 0:
            keep = 1 - self.drop_path
            mask = jax.random.bernoulli(self.make_rng("drop_path"), keep, (len(x), 1, 1, 1))
            y = jnp.where(mask, y / keep, 0)
        return x + y


class Stage(nn.Module):
    """Norm and 2x2 patches in all stages but the first, and blocks, one for each rate."""

    width: int
    drop_path: Sequence[float]
    downsamples: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.downsamples:
            x = nn.LayerNorm(dtype=self.dtype, name="downsampling_layer_0")(x)
            x = nn.Conv(
                self.width, (2, 2), 2, "VALID", dtype=self.dtype, name="downsampling_layer_1"
            )(x)
        for j, rate in enumerate(self.drop_path):
            x = Block(rate, self.dtype, name=f"layers_{j}")(x, train)
        return x


class ConvNext(nn.Module):
    """The classifier: (N, H, W, 3) to (N, classes)."""

    depths: Sequence[int]
    widths: Sequence[int]
    classes: int
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        rates = np.split(
            np.linspace(0, self.drop_path, sum(self.depths)), np.cumsum(self.depths)[:-1]
        )
        x = nn.Conv(self.widths[0], (4, 4), 4, "VALID", dtype=self.dtype, name="stem")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="stem_norm")(x)
        for i, width in enumerate(self.widths):
            stage = Stage(width, tuple(map(float, rates[i])), i > 0, self.dtype, name=f"stages_{i}")
            x = stage(x, train)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x.mean((1, 2)))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a `convnext_jax.ConvNextForImageClassification` under the names above."""
    network = parameters["convnext"]
    return {
        "stem": network["embeddings"]["patch_embeddings"],
        "stem_norm": network["embeddings"]["layernorm"],
        **network["encoder"],
        "norm": network["layernorm"],
        "head": parameters["classifier"],
    }


def main() -> None:
    from convnext_jax import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        depths=(2, 1, 2, 1), hidden_sizes=(16, 24, 32, 40), num_labels=10,
        layer_scale_init_value=1.0, initializer_range=0.2, drop_path_rate=0.5,
    )  # fmt: skip
    ours = ConvNextForImageClassification(config, data_format="channels_last")
    plain = ConvNext(config.depths, config.hidden_sizes, config.num_labels, config.drop_path_rate)
    pictures = jax.random.normal(jax.random.key(0), (4, 64, 64, 3))
    params = ours.init_variables(jax.random.key(1))["params"]
    expected = ours.apply({"params": params}, pictures).logits
    result = plain.apply({"params": plain_parameters(params)}, pictures)
    error = jnp.linalg.norm(result - expected) / jnp.linalg.norm(expected)
    print(f"logits {result.shape}, relative difference {error:.1e}")


if __name__ == "__main__":
    main()
