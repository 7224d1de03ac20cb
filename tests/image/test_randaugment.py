"""Every operation against Pillow's; what is drawn against the rules of the originals."""

import functools
import itertools
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from distributions import assert_same_distribution, assert_share
from PIL import ImageEnhance, ImageFilter, ImageOps

from convnext_jax.errors import InputError
from convnext_jax.image import randaugment
from convnext_jax.image.randaugment import OPERATIONS, Policy, draw, parse_policy

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "sample_photos"
FILL = (124, 116, 104)
SHAPE = (37, 53, 3)
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
FACTORS = [0.0, 0.1, 0.19, 0.4, 0.55, 0.73, 0.9, 1.0, 1.1, 1.37, 1.6, 1.81, 1.9]
SIGNED = (-1.0, -0.9, -0.43, -0.1, 0.0, 0.27, 0.5, 0.9, 1.0)
ARGUMENTS = {
    "AutoContrast": [0],
    "Equalize": [0],
    "Invert": [0],
    "Rotate": [30 * share for share in SIGNED],
    "Posterize": [0, 1, 2, 3, 4],
    "Solarize": [0, 1, 26, 128, 255, 256],
    "SolarizeAdd": [0, 1, 55, 99, 110],
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), FACTORS),
    **{name: [0.3 * share for share in SIGNED] for name in ("ShearX", "ShearY")},
    **{name: [0.45 * share for share in SIGNED] for name in ("TranslateX", "TranslateY")},
}
FUNCTIONS = {
    "AutoContrast": lambda images, _: randaugment.auto_contrast(images),
    "Equalize": lambda images, _: randaugment.equalize(images),
    "Invert": lambda images, _: randaugment.invert(images),
    "Rotate": randaugment.rotate,
    "Posterize": randaugment.posterize,
    "Solarize": randaugment.solarize,
    "SolarizeAdd": randaugment.solarize_add,
    "Color": randaugment.color,
    "Contrast": randaugment.contrast,
    "Brightness": randaugment.brightness,
    "Sharpness": randaugment.sharpness,
    "ShearX": randaugment.shear_x,
    "ShearY": randaugment.shear_y,
    "TranslateX": randaugment.translate_x,
    "TranslateY": randaugment.translate_y,
}


# Pillow, called as timm 0.3.2 does ----------------------------------------------------------------


def by_pillow(name: str, pixels: np.ndarray, argument: float) -> np.ndarray:
    image = PIL.Image.fromarray(pixels)
    width, height = image.size

    def affine(*matrix: float) -> PIL.Image.Image:
        bicubic = PIL.Image.Resampling.BICUBIC
        return image.transform(
            image.size, PIL.Image.Transform.AFFINE, matrix, resample=bicubic, fillcolor=FILL
        )

    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        out = getattr(ImageEnhance, name)(image).enhance(float(np.float32(argument)))
    elif name == "Posterize" and argument == 0:
        out = PIL.Image.new("RGB", image.size)  # refused by newer versions, black in those of 2020
    elif name == "SolarizeAdd":
        out = image.point(3 * [min(255, i + int(argument)) if i < 128 else i for i in range(256)])
    else:
        out = {
            "AutoContrast": lambda: ImageOps.autocontrast(image),
            "Equalize": lambda: ImageOps.equalize(image),
            "Invert": lambda: ImageOps.invert(image),
            "Posterize": lambda: ImageOps.posterize(image, int(argument)),
            "Solarize": lambda: ImageOps.solarize(image, int(argument)),
            "Rotate": lambda: image.rotate(
                argument, resample=PIL.Image.Resampling.BICUBIC, fillcolor=FILL
            ),
            "ShearX": lambda: affine(1, argument, 0, 0, 1, 0),
            "ShearY": lambda: affine(1, 0, 0, argument, 1, 0),
            "TranslateX": lambda: affine(1, 0, argument * width, 0, 1, 0),
            "TranslateY": lambda: affine(1, 0, 0, 0, 1, argument * height),
        }[name]()
    return np.asarray(out)


def assert_as_pillow(name: str, out: np.ndarray, pixels: np.ndarray, argument: float) -> None:
    expected = by_pillow(name, pixels, argument)
    if name in WARPS:
        near = np.abs(out.astype(int) - expected) <= 1
        assert near.mean() >= 0.995, f"{name} {argument}: {near.mean()}"
    else:
        assert np.array_equal(out, expected), f"{name} {argument}"


# Pictures -----------------------------------------------------------------------------------------


@functools.cache
def pictures(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Noise, noise in a narrow range, waves, three colours, one colour; and photos, if there."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [127 + 120 * np.sin(x / period + y / 9) for period in (3, 7, 20)]
    made = [
        rng.integers(0, 256, shape),
        rng.integers(61, 170, shape) // [1, 2, 1],
        np.stack(waves, -1),
        rng.integers(0, 3, shape) * 90 + 20,
        np.broadcast_to([7, 250, 128], shape),
    ]
    for path in sorted(PHOTOS.glob("*.[jp][pn]g")):
        with PIL.Image.open(path) as photo:
            made.append(np.asarray(photo.convert("RGB").resize(shape[1::-1])))
    return np.stack(made).astype(np.uint8)


def cases(shape: tuple[int, int, int], names=OPERATIONS):
    """All pictures with all arguments of the operations: pixels, indices, arguments."""
    all_of = [
        (picture, OPERATIONS.index(name), argument)
        for name in names
        for argument in ARGUMENTS[name]
        for picture in pictures(shape)
    ]
    pixels, operations, arguments = zip(*all_of, strict=True)
    return np.stack(pixels), np.array(operations, np.int32), np.array(arguments, np.float32)


# Operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows(name):
    pixels, _, arguments = cases(SHAPE, [name])
    outs = np.asarray(jax.jit(FUNCTIONS[name])(pixels, arguments))
    assert outs.dtype == np.uint8
    for out, picture, argument in zip(outs, pixels, arguments, strict=True):
        assert_as_pillow(name, out, picture, float(argument))


def test_one_program_for_all_operations_is_pillows_on_tiny_pictures():
    pixels, operations, arguments = cases((1, 4, 3))
    order = np.random.default_rng(0).permutation(len(pixels))  # mixed, as RandAugment has them
    pixels, operations, arguments = pixels[order], operations[order], arguments[order]
    operations[::7] = -1
    outs = np.asarray(jax.jit(randaugment.apply_operation)(pixels, operations, arguments))
    for out, picture, number, argument in zip(outs, pixels, operations, arguments, strict=True):
        if number < 0:
            assert np.array_equal(out, picture)
        else:
            assert_as_pillow(OPERATIONS[number], out, picture, float(argument))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason=f"no photos in {PHOTOS}")
def test_operations_on_whole_photos():
    for path in sorted(PHOTOS.glob("*.[jp][pn]g")):
        with PIL.Image.open(path) as photo:
            pixels = np.asarray(photo.convert("RGB"))
        for name in OPERATIONS:
            program = jax.jit(FUNCTIONS[name])
            for argument in ARGUMENTS[name]:
                out = program(pixels[None], jnp.full(1, argument, jnp.float32))[0]
                assert_as_pillow(name, np.asarray(out), pixels, float(np.float32(argument)))


def test_autocontrast_of_many_ranges():
    low, high = np.triu_indices(256)
    levels = np.arange(256)
    scale = 255.0 / np.maximum(high - low, 1)[:, None]
    expected = np.clip((levels * scale + -low[:, None] * scale).astype(int), 0, 255)
    expected[low == high] = levels
    # Those whose upper end is rounded off, and some of the others.
    below = (high > low) & (expected[np.arange(len(low)), high] == 254)
    assert below.sum() > 1000
    use = below | (np.arange(len(low)) % 7 == 0)
    low, high, expected = (array[use][: use.sum() // 3 * 3] for array in (low, high, expected))
    # Images of two pixels, one range a channel.
    images = np.stack([low, high], -1).astype(np.uint8).reshape(-1, 1, 3, 2).swapaxes(2, 3)
    tables = np.asarray(jax.jit(randaugment._autocontrast_table)(images))
    assert np.array_equal(tables.reshape(-1, 256), expected)
    # That formula is Pillow's.
    for i in range(0, len(low), 100):
        ramp = np.arange(low[i], high[i] + 1, dtype=np.uint8)[None, :, None].repeat(3, 2)
        out = by_pillow("AutoContrast", ramp, 0)
        assert np.array_equal(out[0, :, 0], expected[i, low[i] : high[i] + 1])


def test_blend_of_every_pair_of_levels():
    rng = np.random.default_rng(0)
    factors = np.concatenate([FACTORS, rng.uniform(0, 2, 80), [1e-3, 5.0]]).astype(np.float32)
    degenerate, value = np.mgrid[:256, :256].astype(np.int32)[:, None, ..., None]
    blend = jax.jit(randaugment._blend)
    outs = blend(degenerate, np.broadcast_to(value, (len(factors), 256, 256, 1)), factors)
    for out, factor in zip(np.asarray(outs), factors, strict=True):
        first, second = (
            PIL.Image.fromarray(array[0, ..., 0].astype(np.uint8)) for array in (degenerate, value)
        )
        expected = PIL.Image.blend(first, second, float(factor))
        assert np.array_equal(out[..., 0], expected), factor


def test_equalize_of_few_and_many_pixels():
    # Histograms whose last level decides: steps of 0, of 1 with values past 255, and larger ones.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 600, 3))
    for i, levels in enumerate(np.linspace(1, 255, 60).astype(int)):
        images[i] = images[i] % levels + i
        images[i, :, i * 9 :] = min(255, levels + i)
    images = images.astype(np.uint8)
    for out, image in zip(np.asarray(jax.jit(randaugment.equalize)(images)), images, strict=True):
        assert np.array_equal(out, by_pillow("Equalize", image, 0))


def test_gaussian_blur_is_pillows_within_one_level():
    radii = np.random.default_rng(0).uniform(0.1, 2, 24).astype(np.float32)
    images = pictures()
    pairs = list(itertools.product(images, radii))
    outs = jax.jit(randaugment.gaussian_blur)(
        np.stack([image for image, _ in pairs]), np.array([radius for _, radius in pairs])
    )
    equal = []
    for out, (image, radius) in zip(np.asarray(outs), pairs, strict=True):
        blur = ImageFilter.GaussianBlur(float(radius))
        difference = np.abs(out - np.asarray(PIL.Image.fromarray(image).filter(blur), int))
        assert difference.max() <= 1
        equal.append(difference == 0)
    assert np.mean(equal) > 0.999


# RandAugment --------------------------------------------------------------------------------------

RECIPE = "rand-m9-mstd0.5-inc1"


def test_policies():
    assert parse_policy(RECIPE) == Policy(9, 0.5, 2, True)
    assert parse_policy("rand") == Policy(10, 0.0, 2, False)
    assert parse_policy("rand-inc1-n3-m5") == Policy(5, 0.0, 3, True)
    assert parse_policy("rand-mstd1-m7-inc0") == Policy(7, 1.0, 2, False)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("augmix-m3", "augmix-m3"),
        ("", "''"),
        ("rand-m9-w0", "'w0'"),
        ("rand-m11", "'m11'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-n0", "'n0'"),
        ("rand-mstd0.5.1", "'mstd0.5.1'"),
        ("rand-inc2", "'inc2'"),
        ("rand-m", "'m'"),
        ("rand-m9-", "''"),
    ],
)
def test_policies_that_do_not_exist(text, part):
    with pytest.raises(InputError) as error:
        parse_policy(text)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def argument_of(name: str, magnitude: float, sign: int, increasing: bool) -> float:
    """What timm's level functions give for a magnitude in 0 .. 10."""
    level = magnitude / 10
    if name in ("AutoContrast", "Equalize", "Invert"):
        return 0.0
    if name == "Rotate":
        return sign * level * 30
    if name == "Posterize":
        return 4 - int(level * 4) if increasing else int(level * 4)
    if name == "Solarize":
        return 256 - int(level * 256) if increasing else int(level * 256)
    if name == "SolarizeAdd":
        return int(level * 110)
    if name.startswith("Shear"):
        return sign * level * 0.3
    if name.startswith("Translate"):
        return sign * level * 0.45
    return 1 + sign * level * 0.9 if increasing else level * 1.8 + 0.1


@pytest.mark.parametrize("increasing", [True, False])
def test_arguments(increasing):
    magnitudes = [*range(11), 0.37, 4.99, 8.123, 9.876]  # whole ones land on every step exactly
    every = list(itertools.product(range(15), magnitudes, (-1, 1)))
    numbers, values, signs = (np.array(column) for column in zip(*every, strict=True))
    out = randaugment._argument(numbers, values.astype(np.float32), signs, increasing)
    expected = [argument_of(OPERATIONS[i], *rest, increasing) for i, *rest in every]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [RECIPE, "rand-m8-mstd3"])
def test_draws(text):
    policy = parse_policy(text)
    keys = jax.random.split(jax.random.key(0), 10_000)
    numbers, arguments = (np.asarray(x) for x in jax.jit(draw, static_argnums=1)(keys, policy))
    assert numbers.shape == arguments.shape == (10_000, policy.layers)
    fired = numbers >= 0
    for layer in range(policy.layers):
        assert_share(fired[:, layer], 1 / 2)
        for number in range(15):
            assert_share(numbers[:, layer] == number, 1 / 30)
    # With replacement, and independently of each other.
    assert_share(fired[:, 0] & fired[:, 1], 1 / 4)
    assert_share(
        numbers[fired[:, 0] & fired[:, 1], 0] == numbers[fired[:, 0] & fired[:, 1], 1], 1 / 15
    )

    rng = random.Random(0)
    for number, name in enumerate(OPERATIONS):
        original = [
            argument_of(
                name,
                min(10, max(0, rng.gauss(policy.magnitude, policy.deviation))),
                -1 if rng.random() > 0.5 else 1,
                policy.increasing,
            )
            for _ in range(20_000)
        ]
        drawn = arguments[numbers == number]
        # In whole 1e-4, so that no rounding decides which of two equal values is less.
        assert_same_distribution(*(np.rint(1e4 * np.array(x, float)) for x in (drawn, original)))


@jax.jit
def augment(keys, images):
    """RandAugment and what it drew."""
    policy = parse_policy(RECIPE)
    return randaugment.rand_augment(keys, images, policy), *draw(keys, policy)


@functools.cache
def augmented() -> tuple[np.ndarray, ...]:
    """80 pictures, keys, what RandAugment makes of them, and what it drew."""
    images = np.resize(pictures(), (80, *SHAPE))
    keys = jax.random.split(jax.random.key(1), 80)
    return images, keys, *map(np.asarray, augment(keys, images))


def test_rand_augment_does_what_was_drawn():
    images, _, outs, numbers, arguments = augmented()
    twice = 0
    for image, out, ops, args in zip(images, outs, numbers, arguments, strict=True):
        done = [(OPERATIONS[op], float(arg)) for op, arg in zip(ops, args, strict=True) if op >= 0]
        if len(done) == 2:
            if done[0][0] in WARPS:
                continue  # one level more or less may become many
            twice += 1
            image = by_pillow(done[0][0], image, done[0][1])
        if done:
            assert_as_pillow(done[-1][0], out, image, done[-1][1])
        else:
            assert np.array_equal(out, image)
    assert twice >= 8


def test_rand_augment_does_not_depend_on_the_neighbours():
    images, keys, outs, *_ = augmented()
    # Another order, and other neighbours: those that need a warp fall into other parts.
    assert np.array_equal(augment(keys[::-1], images[::-1])[0][::-1], outs)
    others = jax.random.split(jax.random.key(2), 50)
    mixed = jnp.concatenate([others, keys[:30]])
    shifted = np.concatenate([images[30:], images[:30]])
    assert np.array_equal(augment(mixed, shifted)[0][50:], outs[:30])
    # A batch of five.
    for start in (0, 5, 10):
        part = slice(start, start + 5)
        assert np.array_equal(augment(keys[part], images[part])[0], outs[part])


# Colour jitter and three-augment ------------------------------------------------------------------


def test_jitter_draws():
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = jax.jit(randaugment.draw_jitter)
    orders, factors = (np.asarray(x) for x in drawn(keys, 0.4))
    three = [OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color")]
    for order in itertools.permutations(three):
        assert_share((orders == order).all(1), 1 / 6)
    rng = np.random.default_rng(0)
    for number in three:
        assert_same_distribution(factors[orders == number], rng.uniform(0.6, 1.4, 50_000))
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.04
    # A factor is never negative.
    assert_same_distribution(drawn(keys, 1.5)[1][:, 0], rng.uniform(0, 2.5, 50_000))


def test_jitter_is_pillows():
    images = np.resize(pictures(), (40, *SHAPE))
    keys = jax.random.split(jax.random.key(3), 40)
    jitter = jax.jit(
        lambda *batch: (randaugment.color_jitter(*batch, 0.4), *randaugment.draw_jitter(keys, 0.4))
    )
    outs, orders, factors = map(np.asarray, jitter(keys, images))
    assert len({tuple(order) for order in orders}) == 6
    for out, image, order, values in zip(outs, images, orders, factors, strict=True):
        for number, factor in zip(order, values, strict=True):
            image = by_pillow(OPERATIONS[number], image, factor)
        assert np.array_equal(out, image)


def test_jitter_of_no_strength():
    images = pictures()
    keys = jax.random.split(jax.random.key(0), len(images))
    assert np.array_equal(randaugment.color_jitter(keys, images, 0.0), images)
    with pytest.raises(InputError, match=r"strength of the colour jitter is -0\.1"):
        randaugment.color_jitter(keys, images, -0.1)


def test_three_augment_draws():
    keys = jax.random.split(jax.random.key(0), 10_000)
    choices, radii = (np.asarray(x) for x in jax.jit(randaugment.draw_three)(keys))
    for choice in range(3):
        assert_share(choices == choice, 1 / 3)
    rng = np.random.default_rng(0)
    assert_same_distribution(radii[choices == 2], rng.uniform(0.1, 2, 50_000))


def test_three_augment_is_pillows():
    images = np.resize(pictures(), (40, *SHAPE))
    keys = jax.random.split(jax.random.key(4), 40)
    three = jax.jit(
        lambda *batch: (randaugment.three_augment(*batch), *randaugment.draw_three(keys))
    )
    outs, choices, radii = map(np.asarray, three(keys, images))
    assert set(choices) == {0, 1, 2}
    for out, pixels, choice, radius in zip(outs, images, choices, radii, strict=True):
        image = PIL.Image.fromarray(pixels)
        if choice == 0:
            assert np.array_equal(out, image.convert("L").convert("RGB"))
        elif choice == 1:
            assert np.array_equal(out, ImageOps.solarize(image))
        else:
            blurred = image.filter(ImageFilter.GaussianBlur(float(radius)))
            assert np.abs(out - np.asarray(blurred, int)).max() <= 1


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)],
)
def test_only_colour_pictures_of_bytes(images):
    keys = jax.random.split(jax.random.key(0), 2)
    for function in (
        lambda: randaugment.rand_augment(keys, images, Policy()),
        lambda: randaugment.color_jitter(keys, images, 0.4),
        lambda: randaugment.three_augment(keys, images),
    ):
        with pytest.raises(InputError, match="augmentation takes uint8 pictures"):
            function()
