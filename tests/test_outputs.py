import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (
            BaseModelOutputWithPoolingAndNoAttention,
            ["last_hidden_state", "pooler_output", "hidden_states"],
        ),
        (ImageClassifierOutputWithNoAttention, ["loss", "logits", "hidden_states"]),
        (BackboneOutput, ["feature_maps", "hidden_states", "attentions"]),
    ],
)
def test_fields_are_those_of_hugging_face_in_their_order(output, names):
    assert [field.name for field in dataclasses.fields(output)] == names
    assert all(getattr(output(), name) is None for name in names)


def test_access_skips_what_is_none():
    output = ImageClassifierOutputWithNoAttention(logits=10, hidden_states=(1, 2))
    assert output.loss is None
    assert output.logits == output["logits"] == output[0] == output.get("logits") == 10
    assert output[1] == output[-1] == (1, 2)
    assert output[:2] == output.to_tuple() == (10, (1, 2))
    assert list(output) == list(output.keys()) == ["logits", "hidden_states"]
    assert list(output.values()) == [10, (1, 2)]
    assert dict(output.items()) == {"logits": 10, "hidden_states": (1, 2)}
    assert len(output) == 2
    assert "logits" in output
    assert "loss" not in output
    assert output.get("loss", 3) == 3
    with pytest.raises(KeyError):
        output["loss"]
    with pytest.raises(IndexError):
        output[2]


def test_an_output_cannot_be_changed():
    output = ImageClassifierOutputWithNoAttention(logits=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.logits = 2
    with pytest.raises(TypeError):
        output["logits"] = 2
    for name in ("pop", "update", "setdefault"):
        assert not hasattr(output, name)


def test_an_output_is_a_pytree():
    output = BackboneOutput(feature_maps=(jnp.zeros((2, 3)), jnp.ones((2, 4))))
    assert [leaf.shape for leaf in jax.tree.leaves(output)] == [(2, 3), (2, 4)]
    doubled = jax.jit(lambda o: jax.tree.map(lambda x: 2 * x, o))(output)
    assert isinstance(doubled, BackboneOutput)
    assert doubled.hidden_states is None
    np.testing.assert_array_equal(doubled.feature_maps[1], 2.0)
    rows = jax.vmap(lambda o: o.feature_maps[1].sum())(output)
    np.testing.assert_array_equal(rows, [4.0, 4.0])
    gradient = jax.grad(lambda o: (o.feature_maps[0] ** 2).sum() + o.feature_maps[1].sum())(output)
    np.testing.assert_array_equal(gradient.feature_maps[1], 1.0)


def test_an_output_can_be_pickled():
    output = ImageClassifierOutputWithNoAttention(logits=np.arange(3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(output)).logits, [0, 1, 2])
