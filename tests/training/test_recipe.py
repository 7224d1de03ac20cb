"""The recipe against figures computed from the original's code (ImageNet-1k and fine-tuning)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax import ConvNextConfig, ConvNextForImageClassification
from convnext_jax.configuration import PRESETS
from convnext_jax.errors import InputError
from convnext_jax.image.mixing import soft_targets
from convnext_jax.training import recipe


def shapes_of(**fields):
    """The parameters' shapes of a network for classification."""
    depths = fields.get("depths", (3, 3, 9, 3))
    fields = {"num_stages": len(depths), "num_labels": 3, **fields}
    model = ConvNextForImageClassification(ConvNextConfig(**fields))
    return jax.eval_shape(model.init_variables, jax.random.key(0))["params"]


def preset_shapes(name):
    model = ConvNextForImageClassification(ConvNextConfig.preset(name, num_labels=1000))
    return jax.eval_shape(model.init_variables, jax.random.key(0))["params"]


@pytest.fixture(scope="module")
def base():
    """The shapes of the network that the rule "group" was made for."""
    return preset_shapes("base")


def by_name(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def toy(**fields):
    return shapes_of(**{"depths": (1, 1), "hidden_sizes": (4, 8), **fields})


# Schedules ---------------------------------------------------------------------------------------


SCHEDULES = {
    # 300 epochs of 312 steps, 20 of them warm-up
    "pre-training": (
        {"peak": 4e-3, "warmup_steps": 6240, "total_steps": 93600},
        {
            0: 0.0,
            1: 6.41128e-7,
            6239: 4e-3,
            6240: 4e-3,
            6241: 3.9999999987e-3,
            46800: 2.2243730e-3,
            93599: 1.0000013e-6,
        },
    ),
    # fine-tuning: 30 epochs of 2502 steps, no warm-up
    "fine-tuning": (
        {"peak": 5e-5, "warmup_steps": 0, "total_steps": 75060},
        {0: 5e-5, 37530: 2.55e-5, 75059: 1.00000002e-6},
    ),
    "a warm-up of one step": (
        {"peak": 1.0, "warmup_steps": 1, "total_steps": 11},
        {0: 0.0, 1: 1.0, 6: 0.5 + 0.5e-6},
    ),
    "a warm-up of two steps": (
        {"peak": 1.0, "warmup_steps": 2, "total_steps": 12},
        {0: 0.0, 1: 1.0, 2: 1.0, 7: 0.5 + 0.5e-6},
    ),
    "after the end": ({"peak": 1.0, "warmup_steps": 0, "total_steps": 9}, {9: 1e-6, 100: 1e-6}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_has_the_golden_values(name):
    settings, golden = SCHEDULES[name]
    schedule = recipe.warmup_cosine(**settings, final=1e-6)
    for step, value in golden.items():
        rate = jax.jit(schedule)(jnp.asarray(step, jnp.int32))
        assert rate.dtype == jnp.float32
        np.testing.assert_allclose(rate, value, rtol=1e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(schedule(jnp.asarray(step, jnp.int32)), value, rtol=1e-6)


@pytest.mark.parametrize(
    ("peak", "warmup", "total"),
    [(4e-3, 6240, 93600), (5e-5, 0, 75060), (8e-4, 0, 750_600), (2.5e-3, 1, 1000)],
)
def test_schedule_equals_the_originals_table_in_single_precision(peak, warmup, total):
    steps = np.arange(total - warmup)
    cosine = 1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi * steps / (total - warmup)))
    table = np.concatenate([np.linspace(0, peak, warmup), cosine])
    rates = jax.vmap(recipe.warmup_cosine(peak, warmup, total))(np.arange(total, dtype=np.int32))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, table, rtol=1e-6)
    with jax.enable_x64(True):
        rates = jax.vmap(recipe.warmup_cosine(peak, warmup, total))(
            np.arange(total, dtype=np.int32)
        )
        np.testing.assert_allclose(rates, table, rtol=1e-12)


def test_weight_decay_follows_a_cosine_or_stays():
    schedule = recipe.weight_decay_cosine(0.04, 0.4, 200)
    values = [float(schedule(step)) for step in (0, 50, 100, 200)]
    np.testing.assert_allclose(values, [0.04, 0.04 + 0.36 * (1 - 0.5**0.5) / 2, 0.22, 0.4], 1e-6)
    assert recipe.weight_decay_cosine(0.05, None, 200)(77) == 0.05
    assert recipe.weight_decay_cosine(0.0, 0.4, 200)(77) == 0  # as in the original


# Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["convnext", "convnextv2", "dinov3_convnext"])
def test_kernels_decay_and_nothing_else(model_type):
    params = toy(model_type=model_type)
    decayed = {name for name, decays in by_name(recipe.decays(params)).items() if decays}
    layers = ["dwconv", "pwconv1", "pwconv2"]
    assert decayed == {
        "convnext/embeddings/patch_embeddings/kernel",
        "convnext/encoder/stages_1/downsampling_layer_1/kernel",
        *(
            f"convnext/encoder/stages_{s}/layers_0/{layer}/kernel"
            for s in (0, 1)
            for layer in layers
        ),
        "classifier/kernel",
    }
    if model_type == "convnextv2":
        assert "convnext/encoder/stages_0/layers_0/grn/scale" in by_name(params)


# By layer, from 0, as the original prints them.
SCALES = {
    0.7: [
        0.0096889, 0.0138413, 0.0197733, 0.0282475, 0.0403536, 0.0576480, 0.0823543, 0.117649,
        0.16807, 0.2401, 0.343, 0.49, 0.7, 1,
    ],
    0.8: [
        0.0549756, 0.0687195, 0.0858993, 0.1073742, 0.1342177, 0.1677722, 0.2097152, 0.262144,
        0.32768, 0.4096, 0.512, 0.64, 0.8, 1,
    ],
}  # fmt: skip


@pytest.mark.parametrize("layer_decay", SCALES)
def test_the_twelve_groups_have_the_golden_scales(base, layer_decay):
    ids = by_name(recipe.layer_ids(base, "group"))
    scales = by_name(recipe.layer_scales(base, layer_decay, "group"))
    for name, scale in scales.items():
        np.testing.assert_allclose(scale, SCALES[layer_decay][ids[name]], rtol=5e-6)
    assert set(ids.values()) == set(range(14))


# Of one tensor from each place, by the rule: the original's function and that of V2's repository.
STEM = "convnext/embeddings/layernorm/scale"
BLOCK = "convnext/encoder/stages_{}/layers_{}/pwconv1/kernel"
BEFORE = "convnext/encoder/stages_{}/downsampling_layer_{}/bias"
NORM, HEAD = "convnext/layernorm/scale", "classifier/kernel"


def test_ids_of_the_twelve_groups(base):
    ids = by_name(recipe.layer_ids(base, "group"))
    assert ids[STEM] == ids["convnext/embeddings/patch_embeddings/kernel"] == 0
    assert {ids[BLOCK.format(0, j)] for j in range(3)} == {1}
    assert {ids[BLOCK.format(1, j)] for j in range(3)} == {2}
    assert [ids[BLOCK.format(2, j)] for j in range(27)] == [3 + j // 3 for j in range(27)]
    assert {ids[BLOCK.format(3, j)] for j in range(3)} == {12}
    for stage, id_ in {1: 2, 2: 3, 3: 12}.items():
        assert ids[BEFORE.format(stage, 0)] == ids[BEFORE.format(stage, 1)] == id_
    assert ids[NORM] == ids[HEAD] == ids["classifier/bias"] == 13


def test_ids_by_block(base):
    ids = by_name(recipe.layer_ids(base, "single"))
    starts = (0, 3, 6, 33)
    assert ids[STEM] == ids[BLOCK.format(0, 0)] == 1
    for stage, depth in enumerate((3, 3, 27, 3)):
        for block in range(depth):
            assert ids[BLOCK.format(stage, block)] == starts[stage] + block + 1
    for stage in (1, 2, 3):
        assert {ids[BEFORE.format(stage, i)] for i in (0, 1)} == {starts[stage] + 1}
    assert ids[NORM] == ids[HEAD] == 37


@pytest.mark.parametrize("name", PRESETS)
def test_rules_on_every_preset(name):
    params = preset_shapes(name)
    depths = PRESETS[name]["depths"]
    single = by_name(recipe.layer_ids(params, "single"))
    assert set(single.values()) == set(range(1, sum(depths) + 2))
    scales = by_name(recipe.layer_scales(params, 0.9, "single"))
    assert scales[HEAD] == 1
    np.testing.assert_allclose(scales[BLOCK.format(0, 0)], 0.9 ** sum(depths), rtol=1e-12)
    if len(depths) == 4:
        thirds = set(range(3, 3 + -(-depths[2] // 3)))
        group = by_name(recipe.layer_ids(params, "group"))
        assert set(group.values()) == {0, 1, 2, 12, 13} | thirds
    else:
        with pytest.raises(InputError, match="give 'single'"):
            recipe.layer_ids(params, "group")


@pytest.mark.parametrize(
    "depths", [(2,), (1, 2), (1, 1, 2), (1, 1, 28, 1), (1, 1, 1, 1, 1)], ids=str
)
def test_the_group_rule_refuses_depths_that_it_has_no_ids_for(depths):
    params = shapes_of(depths=depths, hidden_sizes=(4,) * len(depths))
    with pytest.raises(InputError, match="give 'single'") as error:
        recipe.layer_scales(params, 0.8, "group")
    assert str(depths) in str(error.value)
    assert set(by_name(recipe.layer_ids(params, "single")).values()) == set(
        range(1, sum(depths) + 2)
    )
    # Nothing is refused where no layer is to differ.
    assert set(by_name(recipe.layer_scales(params, 1.0, "group")).values()) == {1.0}


def test_an_unknown_rule_is_an_error():
    with pytest.raises(InputError, match="choose 'group' or 'single'"):
        recipe.layer_ids(toy(), "layer")


def test_the_table_of_groups(base):
    settings = {"weight_decay": 0.05, "layer_decay": 0.7}
    header, *rows = recipe.group_table(base, **settings).splitlines()
    assert header.split() == [
        *("group", "learning", "rate", "x", "weight", "decay", "tensors", "parameters"),
    ]
    *groups, total = (row.split() for row in rows)
    assert [row[0] for row in groups] == [
        f"layer_{id_}_{decay}" for id_ in range(14) for decay in ("decay", "no_decay")
    ]
    for name, scale, decay, _, _ in groups:
        np.testing.assert_allclose(float(scale), SCALES[0.7][int(name.split("_")[1])], rtol=5e-6)
        assert decay == ("0" if "no_decay" in name else "0.05")
    assert groups[0] == ["layer_0_decay", "0.0096889", "0.05", "1", "6,144"]
    assert groups[6][3:] == ["10", "6,891,008"]  # one downsampling kernel and three blocks'
    assert groups[25][3:] == ["21", "29,696"]
    assert groups[26][3:] == ["1", "1,024,000"]
    tensors, parameters = (sum(int(row[i].replace(",", "")) for row in groups) for i in (3, 4))
    assert total == ["all", str(tensors), f"{parameters:,}"] == ["all", "344", "88,591,464"]
    assert len({len(row) for row in rows}) == 1


def test_the_table_without_layers_and_with_a_frozen_backbone(base):
    rows = [row.split() for row in recipe.group_table(base, weight_decay=1e-8).splitlines()[1:]]
    assert [row[:3] for row in rows[:-1]] == [["decay", "1", "1e-08"], ["no_decay", "1", "0"]]
    table = recipe.group_table(base, weight_decay=0.05, freeze_backbone=True)
    assert [row.split()[-2:] for row in table.splitlines()[1:]] == [
        ["1", "1,024,000"], ["1", "1,000"], ["342", "87,566,464"], ["344", "88,591,464"],
    ]  # fmt: skip


def test_the_table_tells_what_muon_moves(base):
    table = recipe.group_table(base, weight_decay=0.4, muon=True)
    rows = [row.split() for row in table.splitlines()[1:]]
    # Two kernels in each of 36 blocks, and the stem's, three downsampling, 36 depthwise, the head.
    assert [row[:4] for row in rows[:-1]] == [
        ["decay", "1", "0.4", "41"],
        ["decay_muon", "1", "0.4", "72"],
        ["no_decay", "1", "0", "231"],
    ]


# The optimizer -----------------------------------------------------------------------------------


def two_layers():
    """Parameters as of a network with one block of one kernel, and a head."""
    kernel, bias = jnp.ones((4, 3)), jnp.ones(3)
    block = {"pwconv1": {"kernel": kernel, "bias": bias}}
    return {
        "convnext": {"encoder": {"stages_0": {"layers_0": block}}},
        "classifier": {"kernel": kernel, "bias": bias},
    }


def test_adamw_steps_equal_the_formula_in_single_precision():
    params = two_layers()
    rng = np.random.default_rng(0)
    rates, scales = [0.1, 0.05], recipe.layer_scales(params, 0.5, "single")
    optimizer = recipe.optimizer(
        params, learning_rate=lambda step: jnp.asarray(rates)[step], weight_decay=0.05,
        betas=(0.9, 0.999), eps=1e-8, layer_decay=0.5, layer_decay_rule="single",
    )  # fmt: skip
    state = optimizer.init(params)
    expected = {name: np.ones(p.shape) for name, p in by_name(params).items()}
    first, second = (dict.fromkeys(expected, 0.0) for _ in range(2))
    for t, rate in enumerate(rates, 1):
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, gradient in by_name(gradients).items():
            g, p, own = np.asarray(gradient, float), expected[name], rate * by_name(scales)[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            p = p * (1 - own * (0.05 if p.ndim > 1 else 0))
            corrected = np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8
            expected[name] = p - own * first[name] / (1 - 0.9**t) / corrected
    assert int(state.count) == 2
    for name, value in by_name(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 3, 6, 4)])
def test_orthogonalize_moves_the_singular_values_alone(shape):
    """Against the polynomial applied to them five times, in f64."""
    matrices = np.random.default_rng(0).standard_normal(shape)
    u, s, v = np.linalg.svd(matrices, full_matrices=False)
    s /= np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    expected = (u * s[..., None, :]) @ v
    with jax.enable_x64(True):
        got = recipe.orthogonalize(jnp.asarray(matrices))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)  # 1e-7 is added to the norm
    got = recipe.orthogonalize(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_orthogonalize_as_documented():
    share = np.geomspace(0.002, 1, 2000)  # of the largest norm that a singular value can have
    for _ in range(5):
        share = 3.4445 * share - 4.775 * share**3 + 2.0315 * share**5
    assert 0.68 < share.min() < 0.69
    assert 1.20 < share.max() < 1.21
    assert not recipe.orthogonalize(jnp.zeros((2, 3, 4))).any()


def test_muon_moves_the_kernels_of_the_mlps_by_the_formula_and_the_rest_as_adamw():
    params = two_layers()
    rng = np.random.default_rng(0)
    rates = [0.1, 0.05, 0.2]
    settings = {
        "learning_rate": lambda step: jnp.asarray(rates)[step],
        "weight_decay": 0.05, "layer_decay": 0.5, "layer_decay_rule": "single",
    }  # fmt: skip
    optimizer, adamw = (recipe.optimizer(params, **settings, muon=on) for on in (True, False))
    state, adamw_state, adamw_params = optimizer.init(params), adamw.init(params), params
    name = "convnext/encoder/stages_0/layers_0/pwconv1/kernel"
    scale = by_name(recipe.layer_scales(params, 0.5, "single"))[name]
    assert scale == 0.5
    expected, momentum = np.ones((4, 3)), 0.0
    for rate in rates:
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        updates, adamw_state = adamw.update(gradients, adamw_state, adamw_params)
        adamw_params = optax.apply_updates(adamw_params, updates)

        g = np.asarray(by_name(gradients)[name], float)
        momentum = 0.95 * momentum + 0.05 * g
        u, s, v = np.linalg.svd(0.95 * momentum + 0.05 * g, full_matrices=False)
        s /= np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        # A matrix whose singular values are 1 has the root mean square 1 / sqrt(longer side).
        direction = 0.4 * np.sqrt(4) * (u * s) @ v
        expected = expected - rate * scale * (direction + 0.05 * expected)

    got, others = by_name(params), by_name(adamw_params)
    np.testing.assert_allclose(got.pop(name), expected, rtol=0, atol=2e-6)
    others.pop(name)
    for other, value in got.items():
        np.testing.assert_array_equal(value, others[other], err_msg=other)


def test_muon_of_blocks_alike_is_muon_of_each():
    shapes = toy(depths=(2, 3))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), shapes)
    optimizer = recipe.optimizer(
        params, learning_rate=lambda step: 1.0, weight_decay=0.0, muon=True
    )
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    moved = {name for name, by_muon in by_name(recipe.moved_by_muon(params)).items() if by_muon}
    assert moved == {
        f"convnext/encoder/stages_{stage}/layers_{layer}/pwconv{i}/kernel"
        for stage, depth in enumerate((2, 3))
        for layer in range(depth)
        for i in (1, 2)
    }
    for name in moved:
        kernel = by_name(params)[name]
        direction = recipe.orthogonalize(kernel) * 0.4 * max(kernel.shape) ** 0.5
        np.testing.assert_allclose(by_name(updates)[name], -direction, rtol=0, atol=1e-5)
    for name, moment in by_name(state.nu).items():
        assert moment.shape == (() if name in moved else by_name(params)[name].shape)


def test_betas_of_zero_move_by_the_sign():
    params = {"convnext": {}, "classifier": {"bias": jnp.zeros(2)}}
    optimizer = recipe.optimizer(
        params, learning_rate=lambda step: 0.1, weight_decay=0.05, betas=(0.0, 0.0)
    )
    gradients = {"convnext": {}, "classifier": {"bias": jnp.array([2.0, -3.0])}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["classifier"]["bias"], [-0.1, 0.1], rtol=1e-6)


def test_weight_decay_may_follow_a_schedule():
    params = {"classifier": {"kernel": jnp.ones((2, 2))}}
    optimizer = recipe.optimizer(
        params, learning_rate=lambda step: 0.5, weight_decay=lambda step: 0.1 * (step + 1)
    )
    zeros, state = optax.tree.zeros_like(params), optimizer.init(params)
    for decay in (0.1, 0.2):
        updates, state = optimizer.update(zeros, state, params)
        np.testing.assert_allclose(updates["classifier"]["kernel"], -0.5 * decay, rtol=1e-6)


def test_gradient_clip_limits_the_global_norm():
    params = {"classifier": {"a": jnp.zeros(2), "b": jnp.zeros(2)}}
    gradients = {"classifier": {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}}
    # torch divides by the norm and 1e-6: visible where the norm is small.
    for largest, size, factor in [(1.0, 1.0, 1 / 5.000001), (6.0, 1.0, 1.0), (1e-6, 1e-6, 1 / 6)]:
        clipped = recipe.optimizer(
            params, learning_rate=lambda step: 1.0, weight_decay=0.0, gradient_clip=largest
        )
        scaled = jax.tree.map(lambda g, size=size: g * size, gradients)
        _, state = clipped.update(scaled, clipped.init(params), params)
        np.testing.assert_allclose(
            state.mu["classifier"]["a"], [0.1 * 3 * size * factor, 0], rtol=1e-6
        )
        np.testing.assert_allclose(
            state.mu["classifier"]["b"], [0, 0.1 * 4 * size * factor], rtol=1e-6
        )


def test_a_frozen_backbone_has_no_moments_and_stays():
    params = two_layers()
    optimizer = recipe.optimizer(
        params, learning_rate=lambda step: 0.1, weight_decay=0.05, gradient_clip=1.0,
        freeze_backbone=True,
    )  # fmt: skip
    state = optimizer.init(params)
    assert state.mu.keys() == state.nu.keys() == {"classifier"}
    # The backbone's gradients do not count for the clip either.
    gradients = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    gradients["classifier"] = jax.tree.map(lambda p: 0.01 * jnp.ones_like(p), params["classifier"])
    updates, state = optimizer.update(gradients, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert not any(x.any() for x in jax.tree.leaves(updates["convnext"]))
    np.testing.assert_allclose(state.mu["classifier"]["bias"], 0.001, rtol=1e-6)
    np.testing.assert_allclose(updates["classifier"]["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["classifier"]["kernel"], -0.105, rtol=1e-5)


def test_the_optimizer_keeps_dtypes_and_takes_shapes():
    shapes = toy()
    optimizer = recipe.optimizer(
        shapes, learning_rate=recipe.warmup_cosine(1e-3, 2, 10), weight_decay=0.05,
        layer_decay=0.8, layer_decay_rule="single",
    )  # fmt: skip
    with jax.enable_x64(True):  # where the schedule is f64 and the parameters are not
        updates, state = jax.eval_shape(
            lambda params: optimizer.update(params, optimizer.init(params), params), shapes
        )
    for tree in (updates, state.mu, state.nu):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_scale_head_scales_kernel_and_bias_alone():
    params = {"convnext": {"w": jnp.ones(2)}, "classifier": {"kernel": jnp.ones(2), "bias": 2.0}}
    scaled = recipe.scale_head(params, 0.5)
    np.testing.assert_array_equal(scaled["convnext"]["w"], 1)
    np.testing.assert_array_equal(scaled["classifier"]["kernel"], 0.5)
    assert scaled["classifier"]["bias"] == 1.0
    assert params["classifier"]["bias"] == 2.0


# Averaged weights --------------------------------------------------------------------------------


def test_average_follows_the_weights():
    average = recipe.update_average({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, 0.9)
    np.testing.assert_allclose(average["w"], [1.1], rtol=1e-6)


def test_average_decay_is_constant_or_grows_to_its_value():
    assert recipe.average_decay(0.9999, 3, warmup=False) == 0.9999
    steps = [0, 8, 89, 10**6]
    decays = [float(recipe.average_decay(0.9999, step, warmup=True)) for step in steps]
    np.testing.assert_allclose(decays, [1 / 10, 9 / 18, 90 / 99, 0.9999], rtol=1e-6)


# Losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
def test_smoothed_cross_entropy_equals_the_definition(smoothing):
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    labels = np.array([0, 3, 4, 3])
    log_probabilities = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    right = log_probabilities[np.arange(4), labels]
    # As in timm's LabelSmoothingCrossEntropy: the rest of the confidence on the mean of all.
    expected = -((1 - smoothing) * right + smoothing * log_probabilities.mean(1))
    targets = soft_targets(jnp.asarray(labels), 5, smoothing)
    actual = recipe.soft_cross_entropy(jnp.asarray(logits), targets)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_soft_cross_entropy_equals_the_definition():
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(4, 5)), rng.dirichlet(np.ones(5), 4)
    # Numbers of bf16, with which the same is computed in f32, and in f64 where the logits are f64.
    logits = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    expected = -(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    for dtype in (jnp.bfloat16, jnp.float32):
        actual = recipe.soft_cross_entropy(jnp.asarray(logits, dtype), jnp.asarray(targets))
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    with jax.enable_x64(True):
        actual = recipe.soft_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
