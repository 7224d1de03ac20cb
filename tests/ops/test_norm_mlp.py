"""LayerNorm, MLP, layer scale, drop path and residual as one operation: both implementations."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from convnext_jax import ConvNextConfig, modeling, ops
from convnext_jax.errors import InputError
from convnext_jax.ops import hopper, norm_mlp_tpu, tpu
from convnext_jax.ops import norm_mlp_hopper as kernels
from convnext_jax.ops.kernels import is_unsplit
from convnext_jax.ops.norm_mlp import NormMlpWeights

EPSILON = 1e-6
INTERPRET = jax.default_backend() != "gpu"  # there the kernels are compiled
norm_mlp = importlib.import_module("convnext_jax.ops.norm_mlp")  # which its function hides
BLOCK = ConvNextConfig(hidden_sizes=(32,), depths=(2,), num_stages=1, drop_path_rate=0.5)


@pytest.fixture(autouse=True)
def traced_anew():
    """Blocks stay traced as they were: by no earlier test, and not for a later one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def on_cpu():
    """For what is said of other platforms than the kernels', and of f32, which a GPU rounds."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def numbers(shape, deviation=1.0, seed=0):
    seed = [seed, *shape]
    return np.random.default_rng(seed).standard_normal(shape) * deviation


def weights_of(width: int) -> NormMlpWeights:
    """f64, but as they are in bf16."""
    shapes = [(width,)] * 2 + [(width, 4 * width), (4 * width,), (4 * width, width)]
    shapes += [(width,)] * 2
    deviations = (0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.5)
    values = [numbers(s, d, i) for i, (s, d) in enumerate(zip(shapes, deviations, strict=True))]
    values[0] += 1
    return NormMlpWeights(*(np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) for v in values))


def of_definition(x, shortcut, weights, gain):
    """In f64, by numpy."""
    x, shortcut = np.asarray(x, np.float64), np.asarray(shortcut, np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    h = (normal * weights.norm_scale + weights.norm_bias) @ weights.w1 + weights.b1
    y = (h * (1 + erf(h / np.sqrt(2))) / 2) @ weights.w2 + weights.b2
    return shortcut + np.asarray(gain)[:, None, None, None] * weights.scale * y


def error(x, expected):
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


def test_plain_is_the_definition():
    x, shortcut, g = (numbers((2, 3, 5, 24), seed=i) for i in range(3))
    weights, gain = weights_of(24), np.array([0.0, 1.25])
    with jax.enable_x64(True):
        y, gradients = jax.vjp(
            lambda x, shortcut, weights: ops.norm_mlp(
                x, shortcut, weights, jnp.asarray(gain), epsilon=EPSILON, implementation="plain"
            ),
            jnp.asarray(x), jnp.asarray(shortcut), jax.tree.map(jnp.asarray, weights),
        )  # fmt: skip
        gradients = gradients(jnp.asarray(g))
    np.testing.assert_allclose(y, of_definition(x, shortcut, weights, gain), rtol=1e-12, atol=1e-12)
    step = 1e-6
    for gradient, direction, moved in (
        (gradients[0], d := numbers(x.shape, seed=9),
         lambda t: of_definition(x + t * d, shortcut, weights, gain)),
        (gradients[1], e := numbers(x.shape, seed=8),
         lambda t: of_definition(x, shortcut + t * e, weights, gain)),
        (gradients[2].w1, f := numbers(weights.w1.shape, seed=7),
         lambda t: of_definition(x, shortcut, weights._replace(w1=weights.w1 + t * f), gain)),
        (gradients[2].scale, h := numbers(weights.scale.shape, seed=6),
         lambda t: of_definition(x, shortcut, weights._replace(scale=weights.scale + t * h), gain)),
    ):  # fmt: skip
        slope = ((moved(step) - moved(-step)) * g).sum() / (2 * step)
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), slope, rtol=1e-7)


def by_plain_arithmetic(x, shortcut, g, weights, gain):
    """Result and gradients, of x and the weights, of arrays of bf16: in f64, and in bf16."""

    def plain(x, shortcut, weights):
        factors = None if gain is None else gain.astype(x.dtype)
        return ops.norm_mlp(
            x, shortcut, weights, factors, epsilon=EPSILON, implementation="plain"
        )  # fmt: skip

    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.bfloat16):
            maps = [jnp.asarray(np.asarray(v, np.float64), dtype) for v in (x, shortcut, g)]
            y, gradients = jax.vjp(plain, *maps[:2], NormMlpWeights(*map(dtype, weights)))
            dx, _, of_weights = gradients(maps[2])
            yield y, (dx, *of_weights)


# Widths that are cut into several parts; rows that do not fill the last block, and that do.
@pytest.mark.parametrize(("width", "sides"), [(96, (5, 9)), (48, (16, 8)), (64, (3, 1))])
def test_kernels_err_less_than_plain_arithmetic(width, sides):
    shape = (2, *sides, width)
    weights, gain = weights_of(width), np.array([0.5, 1 / 0.9])
    half = [jnp.asarray(numbers(shape, seed=i), jnp.bfloat16) for i in range(3)]
    x = half[0]
    (expected, expected_gradients), (theirs, their_gradients) = by_plain_arithmetic(
        *half, weights, gain
    )
    narrow = NormMlpWeights(*(jnp.asarray(w, jnp.bfloat16) for w in weights))
    rows = [v.reshape(-1, width) for v in half]
    by_row = jnp.repeat(jnp.asarray(gain, jnp.float32), sides[0] * sides[1])
    how = {"epsilon": EPSILON, "interpret": INTERPRET}
    for tiles in (kernels.forward_tiles((2**20, width)), kernels.product_tiles(rows[0].shape)):
        ours = kernels.forward(*rows[:2], *narrow, by_row, tiles=tiles, **how)
        assert ours.dtype == jnp.bfloat16
        assert error(ours.reshape(shape), expected) < 1.02 * error(theirs, expected) < 5e-3
    scaled = (rows[2] * by_row[:, None]).astype(jnp.bfloat16)
    h = norm_mlp._hidden(x, narrow, EPSILON).reshape(-1, 4 * width)
    names = ("x", *NormMlpWeights._fields)
    for dx, *of_weights in (
        kernels.backward(
            rows[0], scaled, *narrow, tiles=kernels.backward_tiles((1, width)), **how
        ),
        kernels.backward_of_hidden(h, rows[0], scaled, *narrow, **how),
    ):  # fmt: skip
        ours = (dx.reshape(shape), *of_weights)
        for name, mine, theirs, best in zip(
            names, ours, their_gradients, expected_gradients, strict=True
        ):
            assert error(mine, best) < max(1.1 * error(theirs, best), 4.2e-3), name


# All of the hidden layer at a time, and a part; rows that do not fill the last block, and that do.
@pytest.mark.parametrize(
    ("width", "sides", "with_gain"), [(96, (5, 9), True), (192, (5, 9), False), (128, (4, 8), True)]
)
def test_kernels_of_tpus_err_less_than_plain_arithmetic(width, sides, with_gain, monkeypatch):
    monkeypatch.setattr(norm_mlp_tpu, "ROWS", 32)
    shape, gain = (2, *sides, width), np.array([0.5, 1 / 0.9]) if with_gain else None
    weights = weights_of(width)
    x, shortcut, g = (jnp.asarray(numbers(shape, seed=i), jnp.bfloat16) for i in range(3))
    (expected, expected_gradients), (theirs, their_gradients) = by_plain_arithmetic(
        x, shortcut, g, weights, gain
    )
    narrow = NormMlpWeights(*(jnp.asarray(w, jnp.bfloat16) for w in weights))
    gain = None if gain is None else jnp.asarray(gain, jnp.float32)
    # Of memory that was not written, and of rows that are not there, NaN is read.
    interpret = pltpu.InterpretParams(
        uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    how = {"epsilon": EPSILON, "interpret": interpret}
    ours = norm_mlp_tpu.forward(x, shortcut, narrow, gain, **how)
    assert ours.dtype == jnp.bfloat16
    assert error(ours, expected) < error(theirs, expected) < 5e-3
    dx, of_weights = norm_mlp_tpu.backward(x, g, narrow, gain, **how)
    names = ("x", *NormMlpWeights._fields)
    for name, mine, their, best in zip(
        names, (dx, *of_weights), their_gradients, expected_gradients, strict=True
    ):
        assert error(mine, best) < min(error(their, best), 4.2e-3), name


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed",
)
def test_kernels_in_a_program_for_tpus():
    """Both directions of narrow blocks where they are mapped; none where XLA would split them."""
    program = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from convnext_jax import ConvNextConfig, ConvNextModel
from convnext_jax.training import ahead
config = ConvNextConfig(
    hidden_sizes=(96, 256, 512), depths=(2, 1, 1), num_stages=3, drop_path_rate=0.5, image_size=64
)
mesh = Mesh(np.array(ahead.describe("v5e:2x2")), "b")
def placed(x, *axes):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))
model = ConvNextModel(config, dtype=jnp.bfloat16)
variables = jax.tree.map(placed, jax.eval_shape(model.init_variables, jax.random.key(0)))
pictures = placed(jnp.zeros((64, 3, 64, 64), jnp.bfloat16), "b")
def gradient(axis):
    def loss(variables, pictures):
        key = {"drop_path": jax.random.key(1)}
        out = model.clone(axis_name=axis).apply(variables, pictures, train=True, rngs=key)
        return out.pooler_output.sum()
    return jax.grad(loss)
def mapped(mesh, **how):
    return jax.shard_map(
        gradient("b"), mesh=mesh, in_specs=(P(), P("b")), out_specs=P(), check_vma=False, **how
    )
def kernels(function, mesh):
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(variables, pictures).compile().as_text()
    print(text.count('custom_call_target="tpu_custom_call"'))
two = Mesh(mesh.devices.reshape(2, 2), ("b", "m"))
kernels(mapped(mesh), mesh)
kernels(gradient(None), mesh)
kernels(mapped(two, axis_names={"b"}), two)
"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["6", "0", "0"]


def test_no_kernel_where_xla_splits_along_an_axis():
    seen = []

    def look(x):
        seen.append(is_unsplit(x, is_mapped=True))
        return x

    x = jnp.zeros((4, 2))
    for axes, manual in ((("b",), {"b"}), (("b", "m"), {"b"}), (("b", "m"), {"b", "m"})):
        kinds = (jax.sharding.AxisType.Auto,) * len(axes)
        mesh = jax.sharding.AbstractMesh((2,) * len(axes), axes, axis_types=kinds)
        how = {"in_specs": P("b"), "out_specs": P("b"), "check_vma": False, "axis_names": manual}
        jax.eval_shape(jax.shard_map(look, mesh=mesh, **how), x)
    assert seen == [True, False, True]


def test_kernels_of_tpus_are_given_what_is_theirs(monkeypatch):
    """The operation on a TPU, its kernels simulated, is the plain one."""
    width = 96
    shape, gain = (16, 2, 3, width), jnp.arange(16.0) / 8
    x, shortcut, g = (jnp.asarray(numbers(shape, seed=i), jnp.bfloat16) for i in range(3))
    weights = NormMlpWeights(*(jnp.asarray(w, jnp.bfloat16) for w in weights_of(width)))

    def run(implementation):
        def function(x, shortcut, weights):
            return ops.norm_mlp(
                x, shortcut, weights, gain, epsilon=EPSILON, implementation=implementation
            )

        def all_of_it(x, shortcut, weights, g):
            y, gradients = jax.vjp(function, x, shortcut, weights)
            return y, *gradients(g)

        return jax.jit(all_of_it)(x, shortcut, weights, g)

    def as_on_tpu(*inputs, default, tpu):
        return tpu(*inputs)

    theirs = run("plain")
    monkeypatch.setattr(norm_mlp.tpu, "is_target", lambda: True)
    monkeypatch.setattr(norm_mlp.lax, "platform_dependent", as_on_tpu)
    for name in ("forward", "backward"):
        kernel = getattr(norm_mlp_tpu, name)
        monkeypatch.setattr(
            norm_mlp_tpu, name, functools.partial(kernel, interpret=pltpu.InterpretParams())
        )
    ours = run("fused")
    for mine, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == their.dtype
        assert error(mine, their) < 0.02


def test_kernels_of_tpus_whose_numbers_are_off_are_not_used(monkeypatch):
    tpu.compare(interpret=True)
    right = norm_mlp_tpu._gelu
    monkeypatch.setattr(norm_mlp_tpu, "_gelu", lambda h: 1.1 * right(h))
    with pytest.raises(RuntimeError, match="off: the gradient of x by 0"):
        tpu.compare(interpret=True)


@pytest.mark.parametrize(
    ("shape", "possible"),
    [((200704, 96), True), ((49, 1024), True), ((64, 8), True), ((64, 1536), False),
     ((64, 136), False), ((64, 12), False), ((0, 96), False)],
)  # fmt: skip
def test_what_the_kernels_of_tpus_can_take(shape, possible):
    assert norm_mlp_tpu.is_possible(shape) is possible


@pytest.mark.parametrize(
    ("shape", "faster"),
    [((64, 56, 56, 96), True), ((16, 28, 28, 256), True), ((64, 14, 14, 384), False),
     ((24, 56, 56, 96), False)],
)  # fmt: skip
def test_where_the_kernels_of_tpus_should_be_faster(shape, faster):
    assert norm_mlp_tpu.is_faster(shape) is faster


def test_no_rows_are_read_or_written_that_are_not_there():
    """What stands in a block beyond the last row does not reach any sum."""
    width = 32
    weights = [jnp.asarray(w, jnp.bfloat16) for w in weights_of(width)]
    x, g = (jnp.asarray(numbers((200, width), seed=i), jnp.bfloat16) for i in range(2))
    few = kernels.backward(x[:129], g[:129], *weights, epsilon=EPSILON, interpret=INTERPRET)
    all_rows = kernels.backward(
        x, g.at[129:].set(0), *weights, epsilon=EPSILON, interpret=INTERPRET
    )  # fmt: skip
    np.testing.assert_array_equal(few[0], all_rows[0][:129])
    for a, b in zip(few[1:], all_rows[1:], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02)


@pytest.mark.parametrize("rows", [1056, 1057, 1583])
def test_a_program_with_several_blocks_of_rows_in_the_norm(rows):
    """528 programs: of two or three blocks each, the last one with fewer or part of one."""
    width = 16
    u, dy, g = (numbers((rows, width), seed=i) for i in range(3))
    scale, bias = 1 + numbers((width,), 0.1), numbers((width,), 0.1)
    arrays = (jnp.asarray(array, jnp.float32) for array in (u, dy, g, scale, bias))
    y, du, sums = kernels.through_norm(*arrays, epsilon=EPSILON, interpret=INTERPRET, rows=1)

    deviation = np.sqrt(u.var(-1, keepdims=True) + EPSILON)
    normal = (u - u.mean(-1, keepdims=True)) / deviation
    dn = dy * scale
    along = (dn * normal).mean(-1, keepdims=True)
    expected = (
        normal * scale + bias,
        (dn - dn.mean(-1, keepdims=True) - normal * along) / deviation,
        np.stack([g.sum(0), (dy * normal).sum(0)]),
    )
    for found, exact in zip((y, du, sums), expected, strict=True):
        assert error(found, exact) < 1e-6


@pytest.mark.parametrize("rows", [272, 280])
def test_a_program_with_several_blocks_of_rows_in_the_gelu(rows):
    columns, tiles = 4096, kernels.ProductTiles(16, 16)  # 256 chunks, and eight programs of each
    h, da = numbers((rows, columns)), numbers((rows, columns), seed=1)
    a, dh, sums = kernels.through_gelu(
        jnp.asarray(h, jnp.float32), jnp.asarray(da, jnp.float32), interpret=INTERPRET, tiles=tiles
    )
    distribution = (1 + erf(h / np.sqrt(2))) / 2
    slope = distribution + h * np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi)
    for found, exact in ((a, h * distribution), (dh, da * slope), (sums, (da * slope).sum(0))):
        assert error(found, exact) < 3e-4  # the kernels' GELU is one for bf16


def test_fused_on_another_platform_is_the_plain_one(on_cpu):
    x, shortcut = (jnp.asarray(numbers((2, 3, 5, 32), seed=i), jnp.bfloat16) for i in range(2))
    weights = NormMlpWeights(*(jnp.asarray(w, jnp.float32) for w in weights_of(32)))
    gain = jnp.asarray([0.0, 1.25])

    def loss(x, shortcut, weights, implementation):
        y = ops.norm_mlp(x, shortcut, weights, gain, epsilon=EPSILON, implementation=implementation)
        return jnp.square(y.astype(jnp.float32)).sum()

    plain, fused = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)(x, shortcut, weights, name)
        for name in ("plain", "fused")
    )
    jax.tree.map(np.testing.assert_array_equal, fused, plain)
    with pytest.raises(InputError, match="'plain' or 'fused'"):
        loss(x, shortcut, weights, "best")


def test_no_kernels_without_their_devices():
    if jax.default_backend() == "gpu":
        pytest.skip("this has a GPU")
    x = jax.ShapeDtypeStruct((256, 56, 56, 96), jnp.bfloat16)
    assert not hopper.is_usable(x, is_mapped=True)
    assert not ops.is_fused_faster(x, with_gradient=True, is_mapped=True)


@pytest.mark.parametrize(
    ("shape", "with_gradient", "faster"),
    [
        ((802816, 96), True, True),
        ((200704, 192), True, True),
        ((100352, 256), False, True),
        ((50176, 512), True, True),
        ((3136, 96), False, True),
        ((3136, 96), True, False),  # not measured
        ((802816, 40), False, False),  # not a multiple of 16
        ((0, 96), False, False),
    ],
)
def test_where_the_kernels_are_faster(shape, with_gradient, faster):
    assert kernels.is_faster(shape, with_gradient) is faster


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_block_is_the_same_by_either_way(train, scan, monkeypatch, on_cpu):
    model = modeling.ConvNextModel(BLOCK, data_format="channels_last", scan=scan)
    pictures = jnp.asarray(numbers((4, 32, 32, 3)), jnp.float32)
    variables = model.init_variables(jax.random.key(0))
    variables = jax.tree.map(lambda p: p + 0.2 * jnp.asarray(numbers(p.shape), p.dtype), variables)

    def loss(variables):
        rngs = {"drop_path": jax.random.key(1)} if train else None
        out = model.apply(variables, pictures, train=train, rngs=rngs).last_hidden_state
        return jnp.square(out).mean(), out

    run = jax.value_and_grad(loss, has_aux=True)
    (_, by_parts), gradients = run(variables)
    asked = []
    monkeypatch.setattr(ops, "is_fused_faster", lambda *args, **how: asked.append(how) or True)
    jax.clear_caches()  # in which the block is traced
    (_, at_once), gradients_at_once = run(variables)
    assert asked
    assert all(how == {"with_gradient": train, "is_mapped": False} for how in asked)
    np.testing.assert_allclose(at_once, by_parts, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients_at_once), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"implementation": "plain"}, {"precision": "highest"}, {"hidden_act": "relu"},
     {"layer_scale_init_value": 0.0}, {"model_type": "convnextv2"}],
)  # fmt: skip
def test_block_in_parts_where_it_is_not_the_same_operation(change, monkeypatch):
    monkeypatch.setattr(ops, "is_fused_faster", lambda *args, **how: True)
    monkeypatch.setattr(ops, "norm_mlp", None)  # would fail
    fields = {k: v for k, v in change.items() if k in ("implementation", "precision")}
    config = BLOCK.to_dict() | {k: v for k, v in change.items() if k not in fields}
    config.pop("drop_path_rate")
    model = modeling.ConvNextModel(ConvNextConfig.from_dict(config), **fields)
    variables = model.init_variables(jax.random.key(0))
    model.apply(variables, jnp.zeros((1, 3, 32, 32)))


def test_fused_has_second_derivatives(on_cpu):
    x, weights = jnp.asarray(numbers((1, 2, 2, 16)), jnp.float32), weights_of(16)
    weights = NormMlpWeights(*(jnp.asarray(w, jnp.float32) for w in weights))

    def slope(x, weights, implementation):
        def loss(x, weights):
            y = ops.norm_mlp(x, x, weights, epsilon=EPSILON, implementation=implementation)
            return jnp.square(y).sum()

        return sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(loss, (0, 1))(x, weights)))

    fused, plain = (jax.grad(slope, (0, 1))(x, weights, name) for name in ("fused", "plain"))
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_widths_without_a_kernel_are_plain():
    x = jnp.asarray(numbers((1, 2, 2, 24)), jnp.bfloat16)
    weights = NormMlpWeights(*(jnp.asarray(w, jnp.float32) for w in weights_of(24)))
    fused, plain = (
        jax.jit(ops.norm_mlp, static_argnames=("epsilon", "implementation"))(
            x, x, weights, epsilon=EPSILON, implementation=name
        )
        for name in ("fused", "plain")
    )
    np.testing.assert_array_equal(fused, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"w1": (16, 48)}, r"w1 is \(16, 48\), and for maps of 16 channels \(16, 64\)"),
     ({"scale": (1,)}, r"scale is \(1,\)")],
)  # fmt: skip
def test_weights_that_do_not_fit(change, message):
    weights = weights_of(16)._replace(**{name: np.zeros(s) for name, s in change.items()})
    x = jnp.zeros((1, 2, 2, 16))
    with pytest.raises(InputError, match=message):
        ops.norm_mlp(x, x, weights, epsilon=EPSILON, implementation="fused")
    with pytest.raises(InputError, match="the shortcut bfloat16"):
        ops.norm_mlp(x, x.astype(jnp.bfloat16), weights_of(16), epsilon=EPSILON,
                     implementation="fused")  # fmt: skip


def test_block_in_parts_for_what_looks_at_them(monkeypatch):
    monkeypatch.setattr(ops, "is_fused_faster", lambda *args, **how: True)
    model = modeling.ConvNextModel(BLOCK)
    variables = model.init_variables(jax.random.key(0))
    _, seen = model.apply(variables, jnp.zeros((1, 3, 32, 32)), capture_intermediates=True)
    block = seen["intermediates"]["encoder"]["stages_0"]["layers_0"]
    assert {"layernorm", "pwconv1", "pwconv2"} < block.keys()
    # In mixed dtypes, whose result has another one in parts.
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
    half["params"]["encoder"]["stages_0"]["layers_0"]["layer_scale_parameter"] = jnp.ones(32)
    monkeypatch.setattr(ops, "norm_mlp", None)  # would fail
    with pytest.raises(TypeError, match="NoneType"):  # of the other block
        model.apply(half, jnp.zeros((1, 3, 32, 32), jnp.bfloat16))
    half["params"]["encoder"]["stages_0"]["layers_1"]["layer_scale_parameter"] = jnp.ones(32)
    model.apply(half, jnp.zeros((1, 3, 32, 32), jnp.bfloat16))


class Device:
    def __init__(self, capability):
        self.device_kind, self.compute_capability = "a GPU", capability


@pytest.mark.parametrize(
    ("capability", "level", "message"),
    [("8.0", "INFO", "not used on a GPU"), ("gfx942", "INFO", "not used on a GPU"),
     ("9.0", "WARNING", "without its kernels (no such thing)")],
)  # fmt: skip
def test_log_says_why_there_are_no_kernels(capability, level, message, monkeypatch, caplog):
    def fail():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
    monkeypatch.setattr(hopper, "_try", fail)
    with caplog.at_level("INFO"):
        assert not hopper._are_there.__wrapped__()
    assert [record.levelname for record in caplog.records] == [level]
    assert message in caplog.text


def test_kernels_of_each_kind_are_tried(monkeypatch):
    importlib.import_module("convnext_jax.ops.depthwise_conv_hopper")  # uses `jax.jit` itself
    tried = []
    monkeypatch.setattr(
        jax, "jit", lambda f: tried.append(f.func.__module__ + f.func.__name__) or jax_stub
    )
    hopper._try()
    assert len(set(tried)) == 8


class jax_stub:
    """What `jax.jit` gives, of which nothing is compiled."""

    lower = staticmethod(lambda *args: jax_stub)
    compile = staticmethod(lambda: None)


def test_models_run_where_kernels_cannot_even_be_imported():
    program = """
import sys
sys.modules["jax.experimental.pallas"] = sys.modules["jax.experimental.pallas.triton"] = None
import jax, jax.numpy as jnp
from convnext_jax import ConvNextConfig, ConvNextModel
model = ConvNextModel(ConvNextConfig(hidden_sizes=(8,), depths=(1,), num_stages=1))
variables = model.init_variables(jax.random.key(0))
half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
jax.grad(lambda v: model.apply(v, jnp.ones((1, 3, 32, 32), jnp.bfloat16)).pooler_output.sum())(half)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
