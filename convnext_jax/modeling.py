"""ConvNeXt as linen modules, in the order in which the data meets them.

"A ConvNet for the 2020s" (Liu et al., arXiv:2201.03545), with the names, arguments, numerics and
parameter tree of Hugging Face's `modeling_convnext.py` (transformers 4.37.2). Inside, everything is
NHWC; the three classes that Hugging Face documents, at the end of the file, take and return NCHW
unless told `data_format="channels_last"`. Where ConvNeXt V2, DINOv3's ConvNeXt and the isotropic
networks differ, the code asks for `config.model_type`.

Randomness comes from the stream "drop_path" alone:

    logits = model.apply(variables, pixels, train=True, rngs={"drop_path": key}).logits
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from convnext_jax import losses, ops
from convnext_jax.configuration import ConvNextConfig, drop_path_rates
from convnext_jax.errors import InputError
from convnext_jax.outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

# Every norm but the last has this epsilon, whatever `config.layer_norm_eps` says: so does the
# original, whose field reaches the final norm alone. (DINOv3's reaches all of them.)
EPSILON = 1e-6
KERNEL_SIZE = 7
EXPANSION = 4

# What a block keeps for its backward pass, beside its input: the two maps that are dear to compute.
# The norm and the activation, whose results are as large, are cheap to compute again.
KEPT = jax.checkpoint_policies.save_only_these_names("conv", "hidden")


class ConvNextModule(nn.Module):
    """What all parts of the network share: their configuration and their numerics.

    Attributes:
      config: the network.
      dtype: of the computation; None computes in the promoted dtype of inputs and parameters.
      param_dtype: of the parameters when they are initialised.
      precision: of matrix products and convolutions (`jax.lax.Precision`); matters on GPU and TPU,
        where the default multiplies f32 in TF32 or bf16.
      implementation: None for the fastest form of each operation on the platform at hand; "plain"
        for the forms that also support forward-mode derivatives.
      axis_name: the mapped axis over which the batch is split, under `jax.pmap`; with it, drop path
        draws its mask for the global batch, and the result is that of one device.
      remat: keep a block's input alone for the backward pass, and compute the rest again; else the
        convolution's map and the hidden layer are kept too.
      scan: run the blocks of a stage as a loop over their stacked parameters, so that each stage
        compiles as one block does. The parameters that go in and the gradients that come out are
        those of the single blocks, as ever.
    """

    config: ConvNextConfig
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    implementation: Literal["plain"] | None = None
    axis_name: str | None = None
    remat: bool = False
    scan: bool = False

    @property
    def shared(self) -> dict[str, Any]:
        """These attributes, for the parts that this module is made of."""
        return {
            name: getattr(self, name)
            for name in ConvNextModule.__dataclass_fields__
            if name not in ("parent", "name")
        }

    @property
    def _kernel_init(self) -> nn.initializers.Initializer:
        # Plain normal: the truncation that the paper's code asks for lies at 100 deviations.
        return nn.initializers.normal(self.config.initializer_range)

    @property
    def _epsilon(self) -> float:
        """Of every norm but the last."""
        is_dinov3 = self.config.model_type == "dinov3_convnext"
        return self.config.layer_norm_eps if is_dinov3 else EPSILON

    @nn.nowrap
    def _norm(
        self, name: str, epsilon: float | None = None, dtype: DTypeLike | None = None
    ) -> nn.Module:
        return LayerNorm(
            epsilon=self._epsilon if epsilon is None else epsilon,
            dtype=dtype or self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @nn.nowrap
    def _drop_path_gain(self, samples: int, rate: float | Sequence[float]) -> jax.Array:
        """`ops.drop_path_gain` by a key of the stream "drop_path", of at least f32."""
        if not self.has_rng("drop_path"):
            raise InputError(
                f"train=True with drop_path_rate={self.config.drop_path_rate} needs a key: "
                'give rngs={"drop_path": key} to apply'
            )
        key, dtype = self.make_rng("drop_path"), jnp.result_type(float)
        return ops.drop_path_gain(samples, rate, key, self.axis_name, dtype)


class LayerNorm(nn.Module):
    """Normalizes each position over its channels; (..., C) to the same.

    Attributes:
      epsilon: what is added to the variance.
      dtype: of the result; None for the promoted dtype of input and parameters.
      param_dtype: of the parameters when they are initialised.
    """

    epsilon: float
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        return ops.layer_norm(x, scale, bias, self.epsilon).astype(dtype)


class DepthwiseConv(ConvNextModule):
    """The 7x7 convolution of each channel by itself, with bias; (N, H, W, C) to the same."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (KERNEL_SIZE, KERNEL_SIZE, 1, channels)
        kernel = self.param("kernel", self._kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return ops.depthwise_conv(
            x, kernel, bias, implementation=self.implementation, precision=self.precision,
            is_mapped=self.axis_name is not None,
        )  # fmt: skip


class Dense(ConvNextModule):
    """A dense layer, its outputs scaled each by its own factor or not; (..., C) to (..., features).

    In training the factors are multiplied into the kernel: so their gradient comes from that of the
    kernel, and the outputs need not be kept for it.

    Attributes:
      features: of the output.
    """

    features: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, scale: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self._kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        if scale is not None and train:
            kernel, bias, scale = kernel * scale, bias * scale, None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = ops.dense(x, kernel, bias, self.precision)
        return y if scale is None else y * scale.astype(y.dtype)


class Patches(ConvNextModule):
    """A convolution over patches that do not overlap, with bias; what does not fill one is dropped.

    (N, H, W, C) to (N, H // height, W // width, features).

    Attributes:
      features: of the output.
      sides: height and width of a patch.
    """

    features: int = 0
    sides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.sides, x.shape[-1], self.features)
        kernel = self.param("kernel", self._kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return ops.patches(
            x, kernel, bias, precision=self.precision, is_mapped=self.axis_name is not None
        )


class ConvNextEmbeddings(ConvNextModule):
    """The stem: patches of the picture, (N, H, W, num_channels) to (N, H/patch, W/patch, width)."""

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        config = self.config
        _check_map("the picture", pixel_values, config.patch_size)
        side = config.patch_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        x = Patches(
            **self.shared, features=config.hidden_sizes[0], sides=sides, name="patch_embeddings"
        )(pixel_values)
        return x if config.model_type == "convnext_isotropic" else self._norm("layernorm")(x)


class GlobalResponseNorm(ConvNextModule):
    """Each channel's share in the energy of its picture, as a gain (ConvNeXt V2, algorithm 1).

    (N, H, W, C) to the same; its parameters start at 0, where it is the identity.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (
            self.param(name, nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
            for name in ("scale", "bias")
        )
        x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        # The sum of squares over a map overflows f16 and is coarse in bf16.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        energy = jnp.sum(jnp.square(wide), axis=(1, 2), keepdims=True)
        # The norm's derivative is infinite at 0: a channel that is 0 everywhere gets none.
        positive = energy > 0
        norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, energy, 1)), 0)
        gain = norm / (jnp.mean(norm, axis=-1, keepdims=True) + EPSILON)
        return scale * (x * gain.astype(x.dtype)) + bias + x


class ConvNextLayer(ConvNextModule):
    """A block: depthwise 7x7, LayerNorm, MLP four times as wide, layer scale, drop path, residual.

    ConvNeXt V2 has a global response norm inside the MLP, and no layer scale.

    Attributes:
      drop_path_rate: probability of leaving this block out for a sample, in training.
    """

    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, gain: jax.Array | None = None
    ) -> jax.Array:
        """(N, H, W, C) to the same.

        Args:
          x: the map.
          train: whether samples are dropped.
          gain: (N,), what `ops.drop_path_gain` gave; None calls it.
        """
        width = x.shape[-1]
        if gain is None and train and self.drop_path_rate > 0:
            gain = self._drop_path_gain(x.shape[0], self.drop_path_rate)
        y = checkpoint_name(DepthwiseConv(**self.shared, name="dwconv")(x), "conv")
        if self._is_fused(x, y, train):
            return ops.norm_mlp(
                y, x, self._weights(), gain, epsilon=self._epsilon, implementation="fused"
            )
        y = self._norm("layernorm")(y)
        y = checkpoint_name(
            Dense(**self.shared, features=EXPANSION * width, name="pwconv1")(y), "hidden"
        )
        y = ops.activation(self.config.hidden_act)(y)
        if self.config.model_type == "convnextv2":
            y = GlobalResponseNorm(**self.shared, name="grn")(y)
        if self._has_scale:
            init = nn.initializers.constant(self.config.layer_scale_init_value)
            scale = self.param("layer_scale_parameter", init, (width,), self.param_dtype)
            y = Dense(**self.shared, features=width, name="pwconv2")(y, scale, train)
        else:
            y = Dense(**self.shared, features=width, name="pwconv2")(y)
        if gain is not None:
            y *= gain.astype(y.dtype)[:, None, None, None]
        return x + y

    @property
    def _has_scale(self) -> bool:
        config = self.config
        return config.layer_scale_init_value > 0 or config.model_type == "dinov3_convnext"

    @nn.nowrap
    def _is_fused(self, x: jax.Array, y: jax.Array, train: bool) -> bool:
        """Whether all that follows the convolution, from `x` to `y`, runs as one operation."""
        return (
            not self.is_initializing()
            and not self.is_mutable_collection("intermediates")  # which would miss the parts
            and self.implementation is None
            and self.precision is None
            and self._has_scale
            and self.config.model_type != "convnextv2"
            and self.config.hidden_act in ("gelu", "gelu_python")
            and ops.is_fused_faster(y, with_gradient=train, is_mapped=self.axis_name is not None)
            and (self.dtype or jnp.result_type(x, *self._weights())) == x.dtype == y.dtype
        )

    @nn.nowrap
    def _weights(self) -> ops.NormMlpWeights:
        params = nn.meta.unbox(self.variables["params"])
        norm, first, second = (params[name] for name in ("layernorm", "pwconv1", "pwconv2"))
        return ops.NormMlpWeights(
            norm["scale"], norm["bias"], first["kernel"], first["bias"], second["kernel"],
            second["bias"], params["layer_scale_parameter"],
        )  # fmt: skip


# Traced, differentiated and lowered once for all blocks that differ in their arrays alone: jit
# keeps what it traced by the static arguments and the shapes of the others, as long as the process.
@functools.partial(jax.jit, static_argnames=("layer", "train", "prevent_cse"))
def _block(
    x: jax.Array,
    params: dict[str, Any],
    gain: jax.Array | None,
    *,
    layer: ConvNextLayer,
    train: bool,
    prevent_cse: bool = True,
) -> jax.Array:
    """`layer` with these parameters; keeps for its gradient what `layer.remat` says."""

    def apply(x: jax.Array, params: dict[str, Any], gain: jax.Array | None) -> jax.Array:
        return layer.apply({"params": params}, x, train, gain)

    policy = None if layer.remat else KEPT
    return jax.checkpoint(apply, policy=policy, prevent_cse=prevent_cse)(x, params, gain)


class ConvNextStage(ConvNextModule):
    """Norm and 2x2 patches where the width changes (all stages but the first), then the blocks.

    Equal blocks are one function, traced once. So what `nn.intercept_methods` puts between linen's
    calls does not reach into them, unless "intermediates" are mutable: then each is by itself.

    Attributes:
      index: which stage of the configuration this is, from 0.
    """

    index: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.index > 0:
            _check_map(f"the map that reaches stage {self.index + 1}", x, 2)
            x = self._norm("downsampling_layer_0")(x)
            features = self.config.hidden_sizes[self.index]
            x = Patches(
                **self.shared, features=features, sides=(2, 2), name="downsampling_layer_1"
            )(x)
        rates = drop_path_rates(self.config)[self.index]
        gains = [None] * len(rates)
        if train and max(rates) > 0:  # also where the rate is 0: so all blocks are one program
            gains = list(self._drop_path_gain(x.shape[0], rates).T)
        policy = None if self.remat else KEPT
        block = nn.remat(ConvNextLayer, static_argnums=(2,), policy=policy)
        blocks = [
            block(**self.shared, drop_path_rate=rate, name=f"layers_{j}")
            for j, rate in enumerate(rates)
        ]
        # What writes parameters or intermediates has to be part of this module.
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            for block, gain in zip(blocks, gains, strict=True):
                x = block(x, train, gain)
            return x

        params = self.variables.get("params", {})
        if missing := [block.name for block in blocks if block.name not in params]:
            raise InputError(
                f"the parameters of {'/'.join(self.path)} lack {', '.join(missing)}: they are of "
                f"another network than this one with depths={tuple(self.config.depths)}"
            )
        own = [params[block.name] for block in blocks]
        shared = functools.partial(
            _block, layer=ConvNextLayer(**self.shared, parent=None), train=train
        )
        if self.scan and len(blocks) > 1:
            # The loop keeps the compiler from undoing what is computed again.
            shared = functools.partial(shared, prevent_cse=False)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(own, gains, strict=True))
            return jax.lax.scan(lambda x, arrays: (shared(x, *arrays), None), x, stacked)[0]
        for block, *arrays in zip(blocks, own, gains, strict=True):
            with jax.named_scope(block.name):
                x = shared(x, *arrays)
        return x


class ConvNextEncoder(ConvNextModule):
    """All stages; returns the maps before and after each, num_stages + 1 of them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        maps = [x]
        for index in range(self.config.num_stages):
            stage = ConvNextStage(**self.shared, index=index, name=f"stages_{index}")
            maps.append(stage(maps[-1], train))
        return tuple(maps)


class ConvNextPreTrainedModel(ConvNextModule):
    """What the documented models share: the layout of pictures and maps, initialisation, files.

    Attributes:
      data_format: "channels_first" (as Hugging Face documents) or "channels_last", which spares the
        transposes; holds for the pictures that go in and the maps that come out.
    """

    data_format: Literal["channels_first", "channels_last"] = "channels_first"

    @nn.nowrap
    def init_variables(self, key: jax.Array, batch_size: int = 1) -> dict[str, Any]:
        """Variables of a new network, initialised under `jax.jit` for `config.image_size`.

        Kernels are normal(initializer_range), biases 0, norms 1 and 0, layer scale
        layer_scale_init_value.
        """
        size, channels = self.config.image_size, self.config.num_channels
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, height, width, channels)
        if self.data_format == "channels_first":
            shape = (batch_size, channels, height, width)
        return jax.jit(self.init)(key, jnp.zeros(shape, jnp.float32))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        implementation: Literal["plain"] | None = None,
        data_format: Literal["channels_first", "channels_last"] = "channels_first",
        sharding: Any = None,
        ignore_mismatched_sizes: bool = False,
        key: jax.Array | None = None,
        **config_changes: Any,
    ) -> tuple[Self, dict[str, Any]]:
        """The model and its variables from a local folder or a hub name.

        Reads config.json and the first that exists of model.safetensors,
        model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json (through
        torch, and never running code of theirs) and tf_model.h5 (through h5py), one tensor at a
        time: no second copy of the model is held. Every key is accounted for: a checkpoint of a
        classifier also loads into `ConvNextModel` (its head is left out) and `ConvNextBackbone`
        (whose new norms are named in a warning). Files of timm, torchvision and the original
        repositories become such a folder by `convnext-jax convert`.

        Args:
          name_or_path: a folder, or a hub name such as "facebook/convnext-tiny-224".
          dtype, precision, implementation, data_format: attributes of the model.
          param_dtype: dtype of the parameters that are returned, whatever the file holds.
          sharding: where each array is put, straight from the file: one `jax.sharding.Sharding`, or
            a pytree of them with the structure of the variables or a prefix of it. None is the
            default device.
          ignore_mismatched_sizes: initialise a head anew that the file has not, or has with another
            number of classes, and warn; otherwise that is an error.
          key: the new head's kernel is normal(initializer_range) by it; default
            `jax.random.key(0)`.
          **config_changes: fields of the configuration, and `revision`, `cache_dir`,
            `local_files_only`, `token` for huggingface_hub.

        Raises:
          InputError: when the files are not there, are damaged, or do not fit the network; one
            error lists every key that is missing, unexpected or of the wrong shape.
        """
        from convnext_jax.checkpoints import pretrained  # a leaf, reached only here

        model_options = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "implementation": implementation,
            "data_format": data_format,
        }
        return pretrained.load(
            cls,
            name_or_path,
            model_options,
            config_changes,
            sharding=sharding,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            key=key,
        )

    @nn.nowrap
    def save_pretrained(self, folder: str | Path, variables: dict[str, Any]) -> None:
        """Writes config.json and model.safetensors, which Hugging Face `transformers` loads."""
        from convnext_jax.checkpoints import pretrained

        pretrained.save(self, folder, variables)

    @nn.nowrap
    def _enter(self, pixel_values: ArrayLike | None) -> jax.Array:
        """The pictures as NHWC, after the checks that name what is wrong with them."""
        if pixel_values is None:
            raise InputError("pixel_values is missing: the model needs pictures")
        if self.data_format not in ("channels_first", "channels_last"):
            raise InputError(
                f"data_format is {self.data_format!r}: choose 'channels_first' or 'channels_last'"
            )
        x = jnp.asarray(pixel_values)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(
                f"pixel_values are {x.dtype}: the model takes float pictures, rescaled and "
                "normalised by ConvNextImageProcessor"
            )
        channels, axis = self.config.num_channels, 1 if self.data_format == "channels_first" else 3
        if x.ndim != 4 or x.shape[axis] != channels:
            order = "channels, height, width" if axis == 1 else "height, width, channels"
            raise InputError(
                f"pixel_values have the shape {x.shape}: the model takes (batch, {order}) with "
                f"{channels} channels (config.num_channels, data_format={self.data_format!r})"
            )
        return jnp.transpose(x, (0, 2, 3, 1)) if axis == 1 else x

    @nn.nowrap
    def _maps(self, pixel_values: ArrayLike | None, train: bool) -> tuple[jax.Array, ...]:
        """The stem's map and each stage's, NHWC; DINOv3 counts the picture as the first."""
        x = self._enter(pixel_values)
        stem = ConvNextEmbeddings(**self.shared, name="embeddings")(x)
        maps = ConvNextEncoder(**self.shared, name="encoder")(stem, train)
        return (x, *maps[1:]) if self.config.model_type == "dinov3_convnext" else maps

    @nn.nowrap
    def _leave(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """NHWC maps in the layout of `data_format`."""
        if self.data_format == "channels_last":
            return maps
        return tuple(jnp.transpose(x, (0, 3, 1, 2)) for x in maps)

    @nn.nowrap
    def _flags(
        self, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool]:
        """The two flags as given, or else as the configuration says."""
        config = self.config
        return (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            config.return_dict if return_dict is None else return_dict,
        )


class ConvNextModel(ConvNextPreTrainedModel):
    """The network without a head: the last stage's map, and its mean after a LayerNorm."""

    @nn.compact
    def __call__(
        self,
        pixel_values: ArrayLike | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple:
        """Runs the network.

        Args:
          pixel_values: (batch, num_channels, height, width), or NHWC with
            `data_format="channels_last"`; any float dtype, any size from one stride of the network.
          output_hidden_states: also return the stem's map and each stage's.
          return_dict: False returns a plain tuple of the fields that are not None.
          train: drop blocks at random; needs `rngs={"drop_path": key}` when the rate is not 0.

        Returns:
          `last_hidden_state`, not normalised; `pooler_output` (batch, width) in at least f32;
          `hidden_states`, the last of which is `last_hidden_state`.
        """
        output_hidden_states, return_dict = self._flags(output_hidden_states, return_dict)
        maps = self._maps(pixel_values, train)

        # In at least f32, like the norm: an epsilon of 1e-12 vanishes in bf16.
        norm_dtype = jnp.promote_types(maps[-1].dtype, jnp.float32)
        pooled = jnp.mean(maps[-1], axis=(1, 2), dtype=norm_dtype)
        pooled = self._norm("layernorm", self.config.layer_norm_eps, norm_dtype)(pooled)

        maps = self._leave(maps)
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],
            pooler_output=pooled,
            hidden_states=maps if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


class ConvNextForImageClassification(ConvNextPreTrainedModel):
    """The network with a linear head on the pooled features."""

    @nn.compact
    def __call__(
        self,
        pixel_values: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """Runs the network and, when labels are given, the loss.

        Args:
          pixel_values: as in `ConvNextModel`.
          labels: what `config.problem_type` asks for: (batch,) ints for single-label
            classification, -100 being ignored; (batch, num_labels) floats for multi-label
            classification; (batch,) or (batch, num_labels) floats for regression. With no
            problem_type it is inferred: one label is regression, ints are single-label.
          output_hidden_states, return_dict, train: as in `ConvNextModel`.

        Returns:
          `loss`, a scalar, when labels are given; `logits` (batch, num_labels) in the compute
          dtype; `hidden_states` when asked for.
        """
        output_hidden_states, return_dict = self._flags(output_hidden_states, return_dict)
        network = ConvNextModel(**self.shared, data_format=self.data_format, name="convnext")
        features = network(pixel_values, output_hidden_states, True, train)
        logits = features.pooler_output
        if self.config.num_labels > 0:
            logits = Dense(**self.shared, features=self.config.num_labels, name="classifier")(
                logits
            )
        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else losses.classification_loss(
                logits, jnp.asarray(labels), self.config
            ),
            logits=logits,
            hidden_states=features.hidden_states,
        )  # fmt: skip
        return output if return_dict else output.to_tuple()


class ConvNextBackbone(ConvNextPreTrainedModel):
    """The network as a pyramid of maps for detection and segmentation.

    Returns the stages in `config.out_features`, each through a LayerNorm of its own. There is no
    final norm and no pooling. DINOv3's backbones have no norms here, and their "stem" is the
    picture itself; so has Hugging Face defined them.
    """

    @property
    def stage_names(self) -> tuple[str, ...]:
        """All stages, from "stem"."""
        return self.config.stage_names

    @property
    def out_features(self) -> tuple[str, ...]:
        """Names of the stages that are returned."""
        return self.config.out_features

    @property
    def out_indices(self) -> tuple[int, ...]:
        """Their positions in `stage_names`."""
        return self.config.out_indices

    @property
    def num_features(self) -> tuple[int, ...]:
        """Width of every stage, the stem first."""
        is_dinov3 = self.config.model_type == "dinov3_convnext"
        stem = self.config.num_channels if is_dinov3 else self.config.hidden_sizes[0]
        return (stem, *self.config.hidden_sizes)

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Width of every stage by its name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    @property
    def channels(self) -> tuple[int, ...]:
        """Widths of the stages that are returned."""
        return tuple(self.out_feature_channels[name] for name in self.out_features)

    @nn.compact
    def __call__(
        self,
        pixel_values: ArrayLike | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        train: bool = False,
    ) -> BackboneOutput | tuple:
        """Runs the network; arguments as in `ConvNextModel`.

        Returns:
          `feature_maps`, one (batch, channels, height, width) map for each of `out_features`, in
          stage order; `hidden_states`, all maps before those norms, when asked for.
        """
        output_hidden_states, return_dict = self._flags(output_hidden_states, return_dict)
        is_dinov3 = self.config.model_type == "dinov3_convnext"
        maps = self._maps(pixel_values, train)
        feature_maps = tuple(
            x if is_dinov3 else self._norm(f"hidden_states_norms_{name}")(x)
            for name, x in zip(self.stage_names, maps, strict=True)
            if name in self.out_features
        )
        output = BackboneOutput(
            feature_maps=self._leave(feature_maps),
            hidden_states=self._leave(maps) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


def _check_map(what: str, x: jax.Array, patch_size: int | tuple[int, int]) -> None:
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if x.shape[1] < sides[0] or x.shape[2] < sides[1]:
        raise InputError(
            f"{what} is {x.shape[1]}x{x.shape[2]} and its patches are {sides[0]}x{sides[1]}: "
            "give larger pictures or a configuration with fewer stages or smaller patches"
        )
