"""The image processor against values of the original, and against its semantics written out."""

import enum
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image

from convnext_jax.errors import InputError
from convnext_jax.image import (
    PRESETS,
    BatchFeature,
    ConvNextFeatureExtractor,
    ConvNextImageProcessor,
    processor,
    read_image,
    to_rgb,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="compares with Pillow 13"
)


def synthetic(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    channels = [(7 * x + 3 * y) % 256, (x * x + 5 * y) % 256, (x * y) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def pixels(images, data_format="channels_last", **options) -> np.ndarray:
    """The first picture as numpy, [H, W, C]."""
    return ConvNextImageProcessor(**options)(images, data_format=data_format).pixel_values[0]


def original(
    image: np.ndarray,
    size: int = 384,
    crop_pct: float = 224 / 256,
    resample: int = 2,
    rescale_factor: float = 1 / 255,
    image_mean=0.5,
    image_std=0.5,
) -> np.ndarray:
    """What transformers 4.37.2 does to one picture [H, W, C] uint8, with numpy and Pillow alone."""
    height, width = image.shape[:2]
    new_width, new_height = size, size
    if size < 384:
        short = int(size / crop_pct)
        new_width, new_height = (
            (short, int(short * height / width))
            if width <= height
            else (int(short * width / height), short)
        )
    image = np.asarray(Image.fromarray(image).resize((new_width, new_height), resample))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    image = image[top : top + size, left : left + size]
    image = (image * rescale_factor).astype(np.float32)
    return (image - np.float32(image_mean)) / np.float32(image_std)


# Values -------------------------------------------------------------------------------------------

# Made by transformers 4.37.2 with Pillow 13.0.0: mean and standard deviation of the whole result,
# and the first three values of the first channel, to six decimals.
PINNED = [
    ({"size": 224}, (300, 400), -0.005006, 0.445844, [-0.835294, -0.772549, -0.709804]),
    ({"size": 224}, (401, 257), -0.004047, 0.462858, [-0.074510, -0.011765, 0.043137]),
    (
        {"size": 224, "resample": 3},
        (300, 400),
        -0.004981,
        0.485486,
        [-0.827451, -0.764706, -0.701961],
    ),
    (
        {"size": 224, "resample": 3},
        (401, 257),
        -0.004000,
        0.511860,
        [-0.074510, -0.019608, 0.043137],
    ),
    ({"size": 384}, (300, 400), -0.007153, 0.474634, [-1.0, -0.937255, -0.882353]),
    ({"size": 384}, (401, 257), -0.007260, 0.474721, [-1.0, -0.968627, -0.937255]),
    ({"size": 20}, (300, 400), -0.004902, 0.154224, [0.192157, -0.333333, 0.301961]),
    ({"size": 20}, (401, 257), -0.003680, 0.179139, [-0.003922, 0.419608, -0.372549]),
    (
        {"size": 224, "resample": 3, **IMAGENET},
        *((300, 400), 0.215507, 1.079858, [-1.741159, -1.604161, -1.467163]),
    ),
    (
        {"size": 224, "resample": 3, **IMAGENET},
        *((401, 257), 0.217666, 1.138738, [-0.097183, 0.022690, 0.159688]),
    ),
]


@pytest.mark.parametrize(("options", "size", "mean", "std", "first"), PINNED)
def test_pinned_values_of_the_original(options, size, mean, std, first):
    out = ConvNextImageProcessor(**options)(synthetic(*size), return_tensors="np").pixel_values
    side = options["size"]
    assert out.shape == (1, 3, side, side)
    assert out.dtype == np.float32
    # Half of the last decimal; the sums over all pixels were taken in single precision.
    np.testing.assert_allclose(out[0, 0, 0, :3], first, rtol=0, atol=6e-7)
    np.testing.assert_allclose(
        [out.mean(dtype=np.float64), out.std(dtype=np.float64)], [mean, std], atol=2e-6
    )


@pillow_13
@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize(
    ("size", "shape"), [(32, (50, 75)), (33, (71, 40)), (100, (30, 31)), (384, (500, 300))]
)
def test_equal_to_the_originals_semantics_in_every_bit(size, shape, resample):
    image = noise(*shape)
    out = pixels(image, size=size, resample=resample, **IMAGENET)
    expected = original(image, size, resample=resample, **IMAGENET)
    assert np.array_equal(out, expected)


@pillow_13
def test_options_equal_the_originals_semantics():
    image = noise(60, 40)
    for options in [
        {"crop_pct": 1.0},
        {"crop_pct": 0.5},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.1, "image_std": 0.7},
    ]:
        assert np.array_equal(pixels(image, size=24, **options), original(image, 24, **options))


# Steps --------------------------------------------------------------------------------------------


def test_each_step_can_be_left_out():
    image = synthetic(30, 40)
    raw = pixels(image, size=16, do_rescale=False, do_normalize=False)
    assert raw.dtype == np.uint8
    scaled = pixels(image, size=16, do_normalize=False)
    assert np.array_equal(scaled, (raw * (1 / 255)).astype(np.float32))
    normalized = pixels(image, size=16, do_rescale=False, image_mean=3.0, image_std=2.0)
    assert np.array_equal(normalized, (raw.astype(np.float32) - 3) / 2)
    untouched = pixels(image, do_resize=False, do_rescale=False, do_normalize=False)
    assert np.array_equal(untouched, image)
    only_arithmetic = pixels(image, do_resize=False)
    assert np.array_equal(
        only_arithmetic,
        ((image * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5),
    )


def test_arguments_of_a_call_replace_those_of_the_processor():
    image = synthetic(30, 40)
    changes = {"crop_pct": 0.6, "resample": 1, "rescale_factor": 0.01, "image_mean": 0.3}
    changes |= {"image_std": [0.1, 0.2, 0.3], "size": 12}
    called = ConvNextImageProcessor(size=16)(image, data_format="channels_last", **changes)
    assert np.array_equal(called.pixel_values[0], pixels(image, **changes))
    for name in ("do_resize", "do_rescale", "do_normalize"):
        called = ConvNextImageProcessor(size=16)(
            image, data_format="channels_last", **{name: False}
        )
        assert np.array_equal(called.pixel_values[0], pixels(image, size=16, **{name: False}))


def test_a_crop_larger_than_the_picture_is_padded_with_zeros():
    # int(20 / 1.25) = 16 rows and columns, two of zeros on every side; zeros become -1.
    out = pixels(np.full((30, 30, 3), 255, np.uint8), size=20, crop_pct=1.25)
    assert (out[2:18, 2:18] == 1).all()
    assert (out == 1).sum() == 16 * 16 * 3
    assert (out == -1).sum() == (20 * 20 - 16 * 16) * 3
    # int(20 / 1.3) = 15: an odd number to pad, and still 20 x 20.
    assert pixels(np.zeros((30, 30, 3), np.uint8), size=20, crop_pct=1.3).shape == (20, 20, 3)


def test_floating_point_pictures_take_the_path_through_8_bits():
    image = synthetic(60, 45)
    expected = pixels(image, size=32, resample=3, **IMAGENET)
    # Whole numbers in 0 .. 255 are the same picture, in any dtype.
    for dtype in (np.float32, np.float64, np.int32, np.int64):
        assert np.array_equal(
            pixels(image.astype(dtype), size=32, resample=3, **IMAGENET), expected
        )
    # So are their fractions, which are not rescaled; and what lies between is cut off.
    fractions = ((image + 0.8) / 256).astype(np.float32)
    out = pixels(fractions, size=32, resample=3, do_rescale=False, **IMAGENET)
    quantised = np.floor(fractions * np.float32(255)).astype(np.uint8)
    again = pixels(quantised, size=32, resample=3, **IMAGENET)
    assert out.dtype == np.float32
    assert np.array_equal(out, again)
    # Without a resize nothing is quantised, and the dtype is kept.
    kept = pixels(fractions.astype(np.float64), do_resize=False, do_rescale=False)
    assert kept.dtype == np.float64
    np.testing.assert_allclose(kept, fractions * 2.0 - 1.0, atol=1e-15)


def test_rescaling_twice_is_warned_of():
    image = synthetic(20, 20) / 255
    with pytest.warns(UserWarning, match="do_rescale=False"):
        ConvNextImageProcessor(size=8)(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConvNextImageProcessor(size=8)(image, do_rescale=False)
        ConvNextImageProcessor(size=8)(np.zeros((9, 9, 3), np.uint8))


# Layouts and kinds of pictures --------------------------------------------------------------------


@pytest.mark.parametrize("do_resize", [True, False])
def test_data_formats(do_resize):
    image = synthetic(30, 40)
    turned = image.transpose(2, 0, 1)
    run = ConvNextImageProcessor(size=16, do_resize=do_resize)
    last = run(image, data_format="channels_last").pixel_values[0]
    first = run(image, data_format="channels_first").pixel_values[0]
    assert last.shape[-1] == first.shape[0] == 3
    assert np.array_equal(first, last.transpose(2, 0, 1))
    assert np.array_equal(run(image).pixel_values[0], first)
    assert np.array_equal(run(turned).pixel_values[0], first)
    assert np.array_equal(run(turned, data_format="channels_last").pixel_values[0], last)
    # None keeps the layout of the input.
    assert np.array_equal(run(image, data_format=None).pixel_values[0], last)
    assert np.array_equal(run(turned, data_format=None).pixel_values[0], first)


def test_the_layout_is_inferred_as_the_original_does():
    run = ConvNextImageProcessor(size=8)
    ambiguous = noise(3, 20)  # three rows of three channels: channels-first wins
    assert run(ambiguous, do_resize=False).pixel_values[0].shape == (3, 20, 3)
    last = run(ambiguous, do_resize=False, input_data_format="channels_last")
    assert last.pixel_values[0].shape == (3, 3, 20)
    # A PIL image is no matter of guessing.
    pil = run(Image.fromarray(ambiguous), do_resize=False)
    assert np.array_equal(pil.pixel_values[0], last.pixel_values[0])
    # The first picture decides for all.
    pair = run([noise(20, 20), noise(3, 20)], do_resize=False).pixel_values
    assert [x.shape for x in pair] == [(3, 20, 20), (3, 3, 20)]


def test_kinds_of_input_and_output():
    image = synthetic(30, 40)
    run = ConvNextImageProcessor(size=16)
    expected = run(image, return_tensors="np").pixel_values
    assert isinstance(expected, np.ndarray)
    assert expected.shape == (1, 3, 16, 16)
    for given in (Image.fromarray(image), jnp.asarray(image), [image], (image,), image[None]):
        assert np.array_equal(run(given, return_tensors="np").pixel_values, expected)
    assert np.array_equal(run.preprocess(image).pixel_values[0], expected[0])
    many = run([image, synthetic(50, 20)], return_tensors="jax")
    assert isinstance(many["pixel_values"], jax.Array)
    assert many.pixel_values.shape == (2, 3, 16, 16)
    assert np.array_equal(many.pixel_values[0], expected[0])
    listed = run([image, image]).pixel_values
    assert isinstance(listed, list)
    assert [type(x) for x in listed] == [np.ndarray] * 2
    assert listed[0].flags.writeable
    not_resized = run(image, do_resize=False, return_tensors="jax").pixel_values
    assert isinstance(not_resized, jax.Array)
    brain = jnp.asarray(image / 256, jnp.bfloat16)
    assert run(brain, do_rescale=False).pixel_values[0].dtype == np.float32


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    image = synthetic(30, 40)
    run = ConvNextImageProcessor(size=16)
    expected = run(image, return_tensors="np").pixel_values
    out = run(torch.from_numpy(image).permute(2, 0, 1), return_tensors="pt").pixel_values
    assert isinstance(out, torch.Tensor)
    assert np.array_equal(out.numpy(), expected)
    whole = run(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert whole.dtype == torch.uint8
    learnt = torch.full((3, 9, 9), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert run(learnt, do_rescale=False).pixel_values[0].shape == (3, 16, 16)


def test_pil_modes():
    rgba = Image.fromarray(noise(20, 20, 4))
    grey = Image.fromarray(noise(20, 20, 1)[..., 0])
    for image in (rgba, grey):
        out = pixels(image, size=16)
        assert np.array_equal(out, pixels(to_rgb(image), size=16))
        with pytest.raises(InputError):
            pixels(image, size=16, do_convert_rgb=False)
    assert ConvNextImageProcessor(do_convert_rgb=None).do_convert_rgb is True


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_taken_turned_is_seen_as_a_viewer_shows_it(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(synthetic(30, 40)).save(tmp_path / "photo.png", exif=exif)
    opened = Image.open(tmp_path / "photo.png")
    run = ConvNextImageProcessor(size=16)
    as_shown = run(opened).pixel_values[0]
    assert np.array_equal(as_shown, run(read_image(tmp_path / "photo.png")).pixel_values[0])
    stored = run(opened, do_convert_rgb=False).pixel_values[0]
    assert np.array_equal(stored, run(synthetic(30, 40)).pixel_values[0])
    assert np.array_equal(stored, as_shown) == (orientation == 1)


def test_a_file_that_is_cut_short_is_one_clear_error(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "photo.png").write_bytes(content[: len(content) // 2])
    for convert in (True, False):
        with pytest.raises(InputError, match=r"photo\.png cannot be decoded") as error:
            ConvNextImageProcessor(size=8)(
                Image.open(tmp_path / "photo.png"), do_convert_rgb=convert
            )
        assert "\n" not in str(error.value)


def test_grey_arrays_without_an_axis_of_channels():
    grey = noise(20, 30, 1)[..., 0]
    run = ConvNextImageProcessor(size=16)
    expected = run(np.repeat(grey[..., None], 3, -1)).pixel_values[0]
    for given in (grey, [grey], grey[None]):
        out = run(given, input_data_format="none").pixel_values
        assert len(out) == 1
        assert np.array_equal(out[0], expected)
    one = run(
        grey, input_data_format="none", do_convert_rgb=False, image_mean=0.5, image_std=0.5
    ).pixel_values[0]
    assert np.array_equal(one, expected[:1])


def test_names_from_enumerations():
    """The original's `TensorType` and `ChannelDimension` are enumerations of text."""

    class Kind(enum.StrEnum):
        JAX = "jax"
        LAST = "channels_last"

    run = ConvNextImageProcessor(size=16)
    out = run(
        noise(20, 20), return_tensors=Kind.JAX, data_format=Kind.LAST, input_data_format=Kind.LAST
    )
    assert isinstance(out.pixel_values, jax.Array)
    assert out.pixel_values.shape == (1, 16, 16, 3)


def test_frameworks_that_are_not_installed(monkeypatch):
    for name, module in (("pt", "torch"), ("tf", "tensorflow")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=f'return_tensors="{name}" needs {module}'):
            ConvNextImageProcessor(size=8)(noise(9, 9), return_tensors=name)


def test_pictures_of_different_kinds_in_one_list():
    """They go through different programs, and come out in their order."""
    image, other = noise(20, 20), synthetic(200, 300)
    fractions = (other / 256).astype(np.float32)
    run = ConvNextImageProcessor(size=16, do_rescale=False, do_normalize=False)
    mixed = [image, fractions, other, image[::-1], other[:90]]
    expected = [run(each).pixel_values[0] for each in mixed]
    assert [x.dtype for x in expected] == [np.uint8, np.float32, *[np.uint8] * 3]
    for out, one in zip(run(mixed).pixel_values, expected, strict=True):
        assert out.dtype == one.dtype
        assert np.array_equal(out, one)
    for kind in ("np", "jax"):
        out = run(mixed, return_tensors=kind).pixel_values
        assert out.dtype == np.float32
        assert np.array_equal(out, np.stack(expected))


def test_other_numbers_of_channels():
    grey = noise(20, 20, 1)
    out = pixels(grey, size=16, image_mean=0.4, image_std=0.2)
    repeated = pixels(np.repeat(grey, 3, -1), size=16, image_mean=0.4, image_std=0.2)
    assert np.array_equal(out, repeated[..., :1])
    many = noise(20, 20, 7)
    raw = {"do_rescale": False, "do_normalize": False}
    out = ConvNextImageProcessor(size=16, **raw)(
        many, input_data_format="channels_last", data_format=None
    ).pixel_values[0]
    assert np.array_equal(out[..., 3:6], pixels(many[..., 3:6], size=16, **raw))


@pillow_13
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_arrays_with_transparency_are_resized_as_pillow_does(mode):
    image = noise(40, 30, len(mode))
    raw = {"do_rescale": False, "do_normalize": False, "crop_pct": 1.0}
    for resample in (0, 2, 3):
        out = ConvNextImageProcessor(size=30, **raw)(
            image, size=20, resample=resample, input_data_format="channels_last", data_format=None
        ).pixel_values[0]
        expected = np.asarray(Image.fromarray(image).resize((20, 26), resample))
        assert np.array_equal(out, expected[3:23])


# Programs -----------------------------------------------------------------------------------------


def test_a_stream_of_sizes_compiles_a_handful_of_programs():
    compiled = []

    def count(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    run = ConvNextImageProcessor(size=48)
    run(noise(40, 40))
    jax.monitoring.register_event_duration_secs_listener(count)
    sizes = np.random.default_rng(1).integers(30, 1000, (40, 2)).tolist()
    for height, width in sizes:
        run(noise(height, width), return_tensors="jax")
    after_40 = len(compiled)
    # Every kind of program once; the rest of the stream finds them compiled.
    for height, width in sizes:
        for options in ({"image_mean": 0.3}, {"resample": 1}, {"crop_pct": 0.9}):
            run(noise(height - 3, width + 2), return_tensors="jax", **options)
    assert 1 <= after_40 <= 10
    assert len(compiled) - after_40 <= 4


def accelerator(group, pixels):
    """How a list is cut where the default device is none of a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        return split(group, pixels)


split = processor._split


def test_lists_are_cut_into_parts_of_few_sizes():
    assert split([5, 6, 7], 2**18) == [[5], [6], [7]]
    assert [len(part) for part in accelerator(list(range(39)), 2**18)] == [16, 16, 4, 1, 1, 1]
    assert [n for part in accelerator(range(39), 2**18) for n in part] == list(range(39))
    # At most sixteen padded pictures of a megapixel.
    assert [len(part) for part in accelerator(list(range(17)), 2**22)] == [4, 4, 4, 4, 1]
    assert [len(part) for part in accelerator([0, 1], 2**26)] == [1, 1]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_list_in_parts_equals_its_pictures_one_by_one(monkeypatch, channels):
    sizes = np.random.default_rng(2).integers(20, 90, (23, 2)).tolist()
    images = [noise(height, width, channels) for height, width in sizes]
    run = ConvNextImageProcessor(size=24, resample=3, image_mean=0.4, image_std=0.2)
    layout = {"input_data_format": "channels_last"}
    expected = np.stack([run(image, **layout).pixel_values[0] for image in images])
    monkeypatch.setattr(processor, "_split", accelerator)
    for kind in ("np", "jax", None):
        out = run(images, return_tensors=kind, **layout).pixel_values
        assert np.array_equal(out, expected)


# Presets ------------------------------------------------------------------------------------------


def test_presets():
    """What the published files say, and torchvision's own sizes before the crop."""
    run = ConvNextImageProcessor.preset("imagenet_224")
    assert run.to_dict() == ConvNextImageProcessor(size=224, resample=3, **IMAGENET).to_dict()
    shorter = {
        "imagenet_224": (256, 224),
        "imagenet_288": (288, 288),
        "imagenet_384": (384, 384),
        "imagenet_512": (512, 512),
        "torchvision_tiny": (236, 224),
        "torchvision_small": (230, 224),
        "torchvision_base": (232, 224),
        "torchvision_large": (232, 224),
    }
    assert set(shorter) == set(PRESETS)
    for name, (resized, size) in shorter.items():
        run = ConvNextImageProcessor.preset(name)
        (height, width), _ = processor.resize_rule(500, 400, size, run.crop_pct)
        assert run.size == {"shortest_edge": size}
        assert min(height, width) == resized
        assert (height == width) == (size >= 384)
        assert run.resample == (2 if name.startswith("torchvision") else 3)
        assert {"image_mean": run.image_mean, "image_std": run.image_std} == IMAGENET
    changed = ConvNextImageProcessor.preset("imagenet_384", size=512, image_mean=0.5)
    assert (changed.size, changed.image_mean) == ({"shortest_edge": 512}, 0.5)
    changed.image_std[0] = 9.0
    assert PRESETS["imagenet_384"]["image_std"] == IMAGENET["image_std"]
    with pytest.raises(InputError, match="unknown preset 'imagenet': use one of imagenet_224"):
        ConvNextImageProcessor.preset("imagenet")


def test_the_former_name_warns():
    with pytest.warns(FutureWarning, match="ConvNextImageProcessor"):
        old = ConvNextFeatureExtractor(size=24)
    assert isinstance(old, ConvNextImageProcessor)
    assert old.to_dict() == ConvNextImageProcessor(size=24).to_dict()
    image = noise(30, 40)
    new = ConvNextImageProcessor(size=24)
    assert np.array_equal(old(image).pixel_values[0], new(image).pixel_values[0])
    with pytest.warns(FutureWarning):
        assert type(ConvNextFeatureExtractor.from_dict({"size": 8})) is ConvNextFeatureExtractor


# Saving -------------------------------------------------------------------------------------------


def test_defaults_and_json(tmp_path):
    run = ConvNextImageProcessor()
    expected = {
        "crop_pct": 224 / 256,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ConvNextImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 384},
    }
    assert run.to_dict() == json.loads(run.to_json_string()) == expected
    run.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "preprocessor_config.json").read_text()) == expected
    assert run.to_json_string() in repr(run)


def test_round_trip(tmp_path):
    run = ConvNextImageProcessor(
        do_resize=False,
        size=np.int64(96),
        crop_pct=0.9,
        resample=Image.Resampling.LANCZOS,
        do_rescale=False,
        rescale_factor=1 / 127,
        do_normalize=False,
        image_mean=np.array([0.1, 0.2, 0.3]),
        image_std=(np.float32(0.5), 0.5, jnp.asarray(0.25)),
        do_convert_rgb=False,
        something_else={"kept": [1]},
    )
    assert run.something_else == {"kept": [1]}
    run.save_pretrained(tmp_path)
    run.to_json_file(tmp_path / "other.json")
    for again in (
        ConvNextImageProcessor.from_pretrained(tmp_path),
        ConvNextImageProcessor.from_pretrained(tmp_path / "other.json"),
        ConvNextImageProcessor.from_json_file(tmp_path / "other.json"),
        ConvNextImageProcessor.from_dict(run.to_dict()),
    ):
        assert again.to_dict() == run.to_dict()
        assert again.something_else == {"kept": [1]}


def test_to_dict_is_a_copy():
    run = ConvNextImageProcessor()
    run.to_dict()["image_mean"][0] = 9.0
    assert run.image_mean == ConvNextImageProcessor().image_mean == [0.5] * 3


def test_changes_on_reading(tmp_path):
    ConvNextImageProcessor(size=20).save_pretrained(tmp_path)
    read = ConvNextImageProcessor.from_pretrained
    assert read(tmp_path, size=42).size == {"shortest_edge": 42}
    assert read(tmp_path, do_normalize=False, crop_pct=0.5).crop_pct == 0.5
    run, unused = read(tmp_path, resample=3, foo=1, return_unused_kwargs=True)
    assert run.resample == 3
    assert unused == {"foo": 1}
    with pytest.warns(UserWarning, match="foo"):
        read(tmp_path, foo=1)


def test_older_files():
    old = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "resample": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = ConvNextImageProcessor.from_dict(old)
    assert run.size == {"shortest_edge": 224}
    assert "feature_extractor_type" not in run.to_dict()
    with pytest.warns(UserWarning, match="ViTImageProcessor"):
        ConvNextImageProcessor.from_dict({"image_processor_type": "ViTImageProcessor"})


def test_batch_feature():
    run = ConvNextImageProcessor(size=8)(noise(9, 9), return_tensors="jax")
    assert isinstance(run, BatchFeature)
    assert list(run) == ["pixel_values"]
    assert run["pixel_values"] is run.pixel_values
    with pytest.raises(AttributeError, match="labels"):
        _ = run.labels
    doubled = jax.jit(lambda features: jax.tree.map(lambda x: 2 * x, features))(run)
    assert isinstance(doubled, BatchFeature)
    assert np.array_equal(doubled.pixel_values, 2 * run.pixel_values)


# Errors -------------------------------------------------------------------------------------------

IMAGE = np.zeros((9, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGE, {"size": {"height": 8, "width": 8}}, "do_resize needs a size like"),
        (IMAGE, {"size": (8, 8)}, "do_resize needs a size like"),
        (IMAGE, {"size": {"longest_edge": 8}}, "do_resize needs a size like"),
        (IMAGE, {"size": 20.0}, "not understood"),
        (IMAGE, {"size": True}, "not understood"),
        (IMAGE, {"size": (1, 2, 3)}, "not understood"),
        (IMAGE, {"size": {"edge": 8}}, "not understood"),
        (IMAGE, {"size": {"shortest_edge": 8, "height": 8}}, "not understood"),
        (IMAGE, {"size": 0}, "positive whole number"),
        (IMAGE, {"size": {"shortest_edge": "8"}}, "positive whole number"),
        (IMAGE, {"crop_pct": 0}, "crop_pct must be"),
        (IMAGE, {"crop_pct": 9}, "crop_pct must be"),
        (IMAGE, {"crop_pct": "0.5"}, "crop_pct must be"),
        (IMAGE, {"resample": 7}, "unknown resampling filter 7"),
        (IMAGE, {"resample": "bicubic"}, "resample must be the number .* not 'bicubic'"),
        (IMAGE, {"rescale_factor": "1"}, "rescale_factor"),
        (IMAGE, {"rescale_factor": float("nan")}, "rescale_factor"),
        (IMAGE, {"rescale_factor": 10**400}, "rescale_factor"),
        (IMAGE, {"image_mean": float("inf")}, "image_mean must be a number"),
        (IMAGE, {"image_mean": [0.5, None, 0.5]}, "image_mean must be a number"),
        (IMAGE, {"image_mean": [0.5, 0.5]}, r"image_mean=\[0.5, 0.5\] must be .* 3 channels"),
        (IMAGE, {"image_std": [0.5]}, "image_std"),
        (IMAGE, {"image_std": "x"}, "image_std"),
        (IMAGE, {"image_std": [0.5, 0, 0.5]}, "must not be 0"),
        (IMAGE, {"return_tensors": "mx"}, "return_tensors='mx'"),
        (IMAGE, {"data_format": "NHWC"}, "data_format must be"),
        (IMAGE, {"input_data_format": "NHWC"}, "input_data_format must be"),
        ([], {}, "the list is empty"),
        ("cat.jpg", {}, "cannot be a str"),
        ([IMAGE, None], {}, "cannot be a NoneType"),
        ([[IMAGE]], {}, "cannot be a list"),
        (IMAGE[..., 0], {}, "3 or 4 axes"),
        (IMAGE[None, None], {}, "3 or 4 axes"),
        ([IMAGE, IMAGE[None]], {}, "picture 1 has the shape"),
        (IMAGE[:0], {}, "none of them 0"),
        (np.zeros((9, 9, 4), np.uint8), {}, "cannot tell the channels"),
        (IMAGE.astype(np.complex64), {}, "dtype complex64"),
        (np.full((9, 9, 3), 256), {}, "values from 256 to 256"),
        (np.full((9, 9, 3), -1.0), {}, "values from -1.0 to -1.0"),
        (np.full((9, 9, 3), 1.5), {}, "values from 1.5 to 1.5"),
        (np.full((9, 9, 3), np.nan, np.float32), {}, "values from nan to nan"),
        (
            [IMAGE, np.zeros((8, 9, 3), np.uint8)],
            {"do_resize": False, "return_tensors": "np"},
            "do not fit into one array",
        ),
    ],
)
def test_errors(images, options, message):
    with pytest.raises(InputError, match=message) as error:
        ConvNextImageProcessor(size=8)(images, **options)
    assert "\n" not in str(error.value)


def test_sizes_that_only_resizing_refuses():
    run = ConvNextImageProcessor(size=(20, 30))
    assert run.size == {"height": 20, "width": 30}
    assert run(IMAGE, do_resize=False).pixel_values[0].shape == (3, 9, 9)
    both = ConvNextImageProcessor(size={"shortest_edge": 8, "longest_edge": 9})
    assert both(IMAGE).pixel_values[0].shape == (3, 8, 8)
    with pytest.raises(InputError, match="not understood"):
        ConvNextImageProcessor(size=20.0)


def test_unknown_arguments_of_a_call_are_warned_of():
    with pytest.warns(UserWarning, match="do_center_crop"):
        ConvNextImageProcessor(size=8)(IMAGE, do_center_crop=True)


def test_reading_errors(tmp_path):
    read = ConvNextImageProcessor.from_pretrained
    with pytest.raises(InputError, match=r"preprocessor_config\.json") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere"):
        ConvNextImageProcessor.from_json_file(tmp_path / "nowhere.json")
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": 22')
    with pytest.raises(InputError, match=r"preprocessor_config\.json is not valid JSON"):
        read(tmp_path)
    path.write_text('{"size": {"edge": 3}}')
    with pytest.raises(InputError, match=r"preprocessor_config\.json: size=.* not understood"):
        read(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        ConvNextImageProcessor().save_pretrained(path)


def test_importing_pictures_loads_no_framework_but_jax():
    # optax is not in the list: flax, which the package's models import, brings it along.
    code = "import sys, convnext_jax.image; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "convnext_jax.image.processor" in loaded
    assert not {"torch", "transformers", "tensorflow", "grain", "huggingface_hub"} & loaded


def test_the_table_is_exact_for_every_value():
    """The look-up is the original's arithmetic for each of the 256 values."""
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    out = pixels(image, size=16, crop_pct=1.0, **IMAGENET)
    scaled = (image * (1 / 255)).astype(np.float32)
    expected = (scaled - np.float32(IMAGENET["image_mean"])) / np.float32(IMAGENET["image_std"])
    assert np.array_equal(out, expected)
