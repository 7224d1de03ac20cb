"""What the models return: pytrees that behave as Hugging Face's `ModelOutput`.

Fields and their order are those of transformers 4.37.2 (`modeling_outputs.py`). An output is an
ordered mapping of the fields that are not None: iteration gives names, an integer or slice gives
values. It cannot be changed, so that it passes through `jax.jit`, `vmap` and `grad` as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import jax
from flax import struct


class ModelOutput:
    """Base of the outputs: attribute, name, integer and slice access; None fields are skipped."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order: what `return_dict=False` returns."""
        return tuple(self._present().values())

    def keys(self) -> KeysView[str]:
        """Names of the fields that are not None."""
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        """Values of the fields that are not None."""
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        """Pairs of the fields that are not None."""
        return self._present().items()

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` when it is None or unknown."""
        return self._present().get(name, default)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self._present()

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def _present(self) -> dict[str, Any]:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}


@struct.dataclass
class BaseModelOutputWithPoolingAndNoAttention(ModelOutput):
    """Output of `ConvNextModel`; shapes for `data_format="channels_first"`.

    Attributes:
      last_hidden_state: (batch, channels, height, width), the last stage's map, not normalised.
      pooler_output: (batch, channels), its mean over the map, after the final LayerNorm.
      hidden_states: when asked for, the stem's map and each stage's, num_stages + 1 of them.
    """

    last_hidden_state: jax.Array | None = None
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


@struct.dataclass
class ImageClassifierOutputWithNoAttention(ModelOutput):
    """Output of `ConvNextForImageClassification`.

    Attributes:
      loss: scalar, when labels were given.
      logits: (batch, num_labels), before the softmax; the pooled features when num_labels is 0.
      hidden_states: when asked for, the stem's map and each stage's, num_stages + 1 of them.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


@struct.dataclass
class BackboneOutput(ModelOutput):
    """Output of `ConvNextBackbone`.

    Attributes:
      feature_maps: normalised maps of the stages in `out_features`, in stage order.
      hidden_states: when asked for, all maps, not normalised.
      attentions: always None; a ConvNeXt has none.
    """

    feature_maps: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: None = None
