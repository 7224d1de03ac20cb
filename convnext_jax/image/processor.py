"""`ConvNextImageProcessor`: pictures to the `pixel_values` that the networks were trained on.

Options, defaults, order of operations and JSON are those of the image processor in Hugging Face
transformers 4.37.2, and so are the pixels: resizing is equal to Pillow's in every bit, rescaling
and normalising round where the original rounds. Where this class differs on purpose:

* a `PIL.Image` is converted to what an image viewer shows (`do_convert_rgb`): RGB, upright where
  its EXIF data say that it was taken turned. The original refuses other modes, ignores the
  transparent colour of RGB pictures and does not turn any; `do_convert_rgb=False` does as it does;
* `data_format=None` and `input_data_format="none"` do what the original's documentation says, where
  its code raises;
* the layout of a `PIL.Image` is known: one three pixels high is not taken for channels-first;
* the result has the size asked for even where a picture smaller than its crop is padded by an odd
  number of pixels; the original loses a row or column there;
* a size without "shortest_edge" together with `do_resize` is an `InputError`, not a KeyError, and
  so are sizes that would not fit into memory;
* every error is an `InputError` (a ValueError) of one line.
"""

import copy
import functools
import importlib
import inspect
import json
import math
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from convnext_jax.errors import InputError
from convnext_jax.image import resample as resampling
from convnext_jax.image.decode import load, to_rgb

__all__ = ["PRESETS", "BatchFeature", "ConvNextFeatureExtractor", "ConvNextImageProcessor"]

PROCESSOR_NAME = "preprocessor_config.json"
IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)
# From this size on a picture is stretched to a square instead of being cropped.
FIRST_WARPED_SIZE = 384
# A larger result would not fit into the memory of most machines.
LARGEST_SIZE = 2**13

# The preprocessing that published checkpoints are evaluated with; none of them uses the defaults of
# the class. `ConvNextImageProcessor.preset` builds a processor from a name.
_IMAGENET = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": int(resampling.Resampling.BICUBIC),
}
_TORCHVISION = _IMAGENET | {"size": 224, "resample": int(resampling.Resampling.BILINEAR)}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # ConvNeXt, ConvNeXt V2, the isotropic variants and DINOv3's linear evaluation at 224 pixels:
    # the shorter side to 256, the centre cut out.
    "imagenet_224": _IMAGENET | {"size": 224, "crop_pct": 0.875},
    # timm's checkpoints of its own recipes at their test size: the shorter side to 288.
    "imagenet_288": _IMAGENET | {"size": 288, "crop_pct": 1.0},
    # Everything fine-tuned at 384 pixels: stretched.
    "imagenet_384": _IMAGENET | {"size": 384, "crop_pct": 0.875},
    # ConvNeXt V2 Huge fine-tuned at 512 pixels: stretched.
    "imagenet_512": _IMAGENET | {"size": 512, "crop_pct": 0.875},
    # torchvision's weights: the shorter side to 236, 230 or 232, bilinear.
    "torchvision_tiny": _TORCHVISION | {"crop_pct": 224 / 236},
    "torchvision_small": _TORCHVISION | {"crop_pct": 224 / 230},
    "torchvision_base": _TORCHVISION | {"crop_pct": 224 / 232},
    "torchvision_large": _TORCHVISION | {"crop_pct": 224 / 232},
}


# Where the arrays of other frameworks come from: a module, and its function of a numpy array.
_FRAMEWORKS = {"pt": ("torch", "from_numpy"), "tf": ("tensorflow", "convert_to_tensor")}


class BatchFeature(dict):
    """What a processor returns: `features["pixel_values"]` or `features.pixel_values`.

    A pytree, so that it passes through `jax.jit`, and a dict, so that `**features` calls a model.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


jax.tree_util.register_pytree_with_keys(
    BatchFeature,
    lambda features: (
        [(jax.tree_util.DictKey(key), features[key]) for key in sorted(features)],
        tuple(sorted(features)),
    ),
    lambda keys, values: BatchFeature(zip(keys, values, strict=True)),
)


class _Options(NamedTuple):
    """The arguments of one call, each given or taken from the processor, and checked."""

    do_resize: bool
    size: dict[str, int]
    crop_pct: float
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    do_convert_rgb: bool


class ConvNextImageProcessor:
    """Resize, crop, rescale and normalise pictures for ConvNeXt.

    Args:
      do_resize: Whether to resize (and crop).
      size: {"shortest_edge": S} or S: the result is S x S. Below 384 the shorter side becomes
        int(S / crop_pct) and the centre is cut out; from 384 on the picture is stretched.
        Default 384.
      crop_pct: The part of the shorter side that is kept below 384. Default 224 / 256.
      resample: Pillow's filter: NEAREST 0, LANCZOS 1, BILINEAR 2, BICUBIC 3, BOX 4, HAMMING 5.
        Default BILINEAR; the published networks were trained with BICUBIC, and their files
        say so.
      do_rescale: Whether to multiply by `rescale_factor`.
      rescale_factor: Default 1 / 255.
      do_normalize: Whether to subtract `image_mean` and divide by `image_std`, after rescaling.
      image_mean: A number, or one for each channel. Default 0.5; the published networks were
        trained with (0.485, 0.456, 0.406), and their files say so.
      image_std: Likewise. Default 0.5; the published networks: (0.229, 0.224, 0.225).
      do_convert_rgb: Whether `PIL.Image`s are converted by `convnext_jax.image.to_rgb` to upright
        RGB: grey, palettes, transparency, CMYK, 16 bits, EXIF orientation. Arrays are taken as
        they are, but for grey ones [H, W], whose one channel is repeated. None is True; False
        takes the stored pixels, as the original does.
      **kwargs: Anything else becomes an attribute, and stays in the JSON.

    Raises:
      InputError: A size that is not understood. (Everything else is checked when it is used.)
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        /,  # a file may have a key "self"
        do_resize: bool = True,
        size: int | Mapping[str, int] | Sequence[int] | None = None,
        crop_pct: float | None = None,
        resample: int = resampling.Resampling.BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool | None = True,
        **kwargs: Any,
    ):
        for name in ("feature_extractor_type", "image_processor_type"):
            kind = kwargs.pop(name, None)
            if kind is not None and not str(kind).startswith("ConvNext"):
                warnings.warn(
                    f"these settings are for {kind}: a ConvNextImageProcessor may treat pictures "
                    "differently",
                    stacklevel=2,
                )
        self.do_resize = do_resize
        self.size = _size_dict({"shortest_edge": 384} if size is None else size)
        self.crop_pct = 224 / 256 if crop_pct is None else crop_pct
        self.resample = _plain(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _plain(IMAGENET_STANDARD_MEAN if image_mean is None else image_mean)
        self.image_std = _plain(IMAGENET_STANDARD_STD if image_std is None else image_std)
        self.do_convert_rgb = True if do_convert_rgb is None else do_convert_rgb
        for name, value in kwargs.items():
            if hasattr(type(self), name):
                raise InputError(f"{name!r} cannot be a setting: it is a method here")
            setattr(self, name, value)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The processor that a family of published checkpoints was evaluated with.

        Args:
          name: A key of `PRESETS`: "imagenet_224" or "imagenet_384" for most checkpoints.
          **changes: Arguments of the class that replace those of the preset.

        Raises:
          InputError: An unknown name.
        """
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
        return cls(**{**copy.deepcopy(PRESETS[name]), **changes})

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        do_resize: bool | None = None,
        size: int | Mapping[str, int] | Sequence[int] | None = None,
        crop_pct: float | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        return_tensors: str | None = None,
        data_format: str | None = "channels_first",
        input_data_format: str | None = None,
        do_convert_rgb: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Preprocess one picture or several.

        Resizing, cropping and the arithmetic after them run jitted on JAX's default device.
        Pictures are padded to a few shapes, so that a stream of photos of many sizes compiles a
        handful of programs; of a list, an accelerator takes up to 16 of equal shape at once.
        Floating-point pictures are resized as the original does it: in 8 bits, so that they keep
        their range but not their precision.

        Args:
          images: A `PIL.Image`, an array [H, W, C] or [C, H, W] (numpy, JAX, torch or
            TensorFlow), a list or tuple of either, or an array of four axes. Values are expected
            in 0 .. 255; for values in 0 .. 1 pass `do_rescale=False`.
          do_resize: This and the next arguments replace the processor's own for this call.
          size: See the class.
          crop_pct: See the class.
          resample: See the class.
          do_rescale: See the class.
          rescale_factor: See the class.
          do_normalize: See the class.
          image_mean: See the class.
          image_std: See the class.
          return_tensors: None for a list of numpy arrays; "np", "jax", "pt" or "tf" for one array
            of numpy, JAX, PyTorch or TensorFlow.
          data_format: Layout of the result: "channels_first", "channels_last", or None for that
            of the input.
          input_data_format: Layout of arrays; "none" for grey ones [H, W]. By default it is taken
            from the first picture, for all: channels-first if the first axis is 1 or 3 long, else
            channels-last if the last one is.
          do_convert_rgb: See the class.
          **kwargs: Anything else is ignored with a warning.

        Returns:
          A `BatchFeature` with `pixel_values`: [N, C, S, S] float32, or a list of N arrays. (The
          dtype is that of the input if it is neither resized, rescaled nor uint8.)

        Raises:
          InputError: Pictures or options that cannot be used, or pictures of different sizes
            where one array is asked for.
        """
        if kwargs:
            warnings.warn(f"preprocess ignores {', '.join(sorted(kwargs))}", stacklevel=2)
        options = self._options(
            do_resize=do_resize,
            size=size,
            crop_pct=crop_pct,
            resample=resample,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_convert_rgb=do_convert_rgb,
        )
        return_tensors = getattr(return_tensors, "value", return_tensors)  # an enumeration's
        if return_tensors not in (None, "np", "jax", *_FRAMEWORKS):
            raise InputError(
                f"return_tensors={return_tensors!r} is not supported: "
                'use None, "np", "jax", "pt" or "tf"'
            )
        arrays, layout = _to_arrays(images, options.do_convert_rgb, input_data_format)
        data_format = layout if data_format is None else _layout(data_format, "data_format")
        for array in arrays:
            _check_channels(array, options)
        first = arrays[0]
        if options.do_rescale and first.dtype != np.uint8 and first.min() >= 0 and first.max() <= 1:
            warnings.warn(
                "the values of the first picture lie in 0 .. 1 and will be rescaled again; "
                "if they are rescaled already, pass do_rescale=False",
                stacklevel=2,
            )

        channels_first = data_format == "channels_first"
        if options.do_resize:
            parts = _resize_and_look_up(arrays, options, channels_first)
        else:
            parts = []
            for number, array in enumerate(arrays):
                pixels = _rescale_and_normalize(array, options)[None]
                if channels_first:
                    pixels = pixels.transpose(0, 3, 1, 2)
                parts.append(_Part([number], pixels))
        return BatchFeature(pixel_values=_as_tensors(parts, return_tensors))

    def _options(self, **given: Any) -> _Options:
        options = _Options(
            **{
                name: getattr(self, name) if value is None else value
                for name, value in given.items()
            }
        )
        options = options._replace(
            size=_size_dict(options.size),
            resample=_plain(options.resample),
            image_mean=_plain(options.image_mean),
            image_std=_plain(options.image_std),
        )
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not isinstance(getattr(options, name), bool | np.bool_ | int | None):
                raise InputError(f"{name} must be true or false, not {getattr(options, name)!r}")
        if not isinstance(options.resample, int) or isinstance(options.resample, bool):
            raise InputError(
                f"resample must be the number of one of Pillow's filters, not {options.resample!r}"
            )
        if options.do_resize:
            target = options.size.get("shortest_edge")
            if target is None or target > LARGEST_SIZE:
                raise InputError(
                    "do_resize needs a size like {'shortest_edge': 224}, at most "
                    f"{LARGEST_SIZE} pixels, not {options.size}"
                )
            if target < FIRST_WARPED_SIZE and not (
                _is_number(options.crop_pct) and 0 < options.crop_pct <= target
            ):
                raise InputError(
                    f"crop_pct must be a number above 0, such as 0.875, for the size {target}, "
                    f"not {options.crop_pct!r}"
                )
        if options.do_rescale and not _is_number(options.rescale_factor):
            raise InputError(
                f"do_rescale needs a number as rescale_factor, not {options.rescale_factor!r}"
            )
        for name in ("image_mean", "image_std") if options.do_normalize else ():
            values = getattr(options, name)
            listed = values if isinstance(values, list) else [values]
            if not all(_is_number(value) for value in listed):
                raise InputError(
                    f"{name} must be a number, or one for each channel, not {values!r}"
                )
            if name == "image_std" and 0 in listed:
                raise InputError("image_std must not be 0")
        return options

    # JSON -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All options and further attributes, and `image_processor_type`."""
        return copy.deepcopy(self.__dict__) | {"image_processor_type": "ConvNextImageProcessor"}

    @classmethod
    def from_dict(
        cls, settings: Mapping[str, Any], *, return_unused_kwargs: bool = False, **changes: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build a processor from `to_dict`'s result, or from the original's.

        Args:
          settings: The options by name.
          return_unused_kwargs: Whether to return `(processor, unused)`.
          **changes: Options that replace those in `settings`. Names that the processor does not
            have are unused.
        """
        known = {*inspect.signature(cls).parameters, *settings}
        unused = {name: changes.pop(name) for name in set(changes) - known}
        processor = cls(**{**settings, **changes})
        if return_unused_kwargs:
            return processor, unused
        if unused:
            warnings.warn(f"unused settings: {', '.join(sorted(unused))}", stacklevel=2)
        return processor

    def to_json_string(self) -> str:
        """`to_dict` as JSON, keys sorted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike) -> None:
        """Write `to_json_string` to a file."""
        Path(path).write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> Self:
        """Read a processor from a JSON file."""
        return cls._from_file(Path(path), {})

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `preprocessor_config.json` into a folder, which is made if it does not exist."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: give a folder to save the processor in")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / PROCESSOR_NAME)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, **changes: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a processor from a folder, a JSON file, or a repository of the Hugging Face hub.

        Args:
          name_or_path: A folder that holds `preprocessor_config.json`, the path of such a file,
            or a hub name such as "facebook/convnext-tiny-224".
          **changes: Options to change, and `revision`, `cache_dir`, `local_files_only`, `token`,
            which go to huggingface_hub. `return_unused_kwargs` as in `from_dict`.

        Raises:
          InputError: No such folder or repository, no such file in it, or not a processor.
        """
        from convnext_jax.checkpoints import files  # needed here alone

        hub_options, changes = files.split_hub_options(changes)
        path = Path(name_or_path)
        if not path.is_file():
            path = files.find_file(name_or_path, PROCESSOR_NAME, **hub_options)
        return cls._from_file(path, changes)

    @classmethod
    def _from_file(cls, path: Path, changes: dict[str, Any]) -> Self | tuple[Self, dict[str, Any]]:
        from convnext_jax.checkpoints import files

        if not path.is_file():
            raise InputError(f"{path}: no such file; check the path")
        settings = files.read_json(path)
        try:
            return cls.from_dict(settings, **changes)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def __repr__(self) -> str:
        return f"ConvNextImageProcessor {self.to_json_string()}"


class ConvNextFeatureExtractor(ConvNextImageProcessor):
    """The former name of `ConvNextImageProcessor`; making one warns, as the original does."""

    def __init__(self, *args: Any, **kwargs: Any):
        warnings.warn(
            "ConvNextFeatureExtractor is the former name of ConvNextImageProcessor: use that",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)


# Options ------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Numbers and sequences of numbers as Python's own, so that JSON can hold them."""
    if hasattr(value, "tolist"):  # an array's or a scalar's, of whatever framework
        return value.tolist()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _is_number(value: Any) -> bool:
    """Whether it is a number that single precision can hold."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and bool(abs(value) < 1e38)


def _size_dict(size: Any) -> dict[str, int]:
    """An int is the shortest edge, a pair (height, width); a dict must have known keys."""
    if isinstance(size, numbers.Integral) and not isinstance(size, bool):
        size = {"shortest_edge": size}
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    if not isinstance(size, Mapping) or set(size) not in (
        {"height", "width"},
        {"shortest_edge"},
        {"shortest_edge", "longest_edge"},
        {"longest_edge"},
    ):
        raise InputError(
            f"size={size!r} is not understood: use {{'shortest_edge': 224}} (or 224, or one of "
            "{'height', 'width'}, {'longest_edge'}, {'shortest_edge', 'longest_edge'})"
        )
    for name, value in size.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise InputError(f"size: {name} must be a positive whole number, not {value!r}")
    return {name: int(value) for name, value in size.items()}


def _layout(layout: Any, name: str) -> str:
    if layout in ("channels_first", "channels_last"):
        return str(getattr(layout, "value", layout))
    raise InputError(f'{name} must be "channels_first" or "channels_last", not {layout!r}')


# Pictures in --------------------------------------------------------------------------------------


def _to_arrays(images: Any, convert_rgb: bool, layout: str | None) -> tuple[list[np.ndarray], str]:
    """Numpy arrays [H, W, C], and the layout in which they came."""
    if layout is not None and layout != "none":
        layout = _layout(layout, "input_data_format")
    axes = 2 if layout == "none" else 3
    if isinstance(images, PIL.Image.Image):
        images = [images]
    elif not isinstance(images, (list, tuple)):
        images = _to_numpy(images)
        if images.ndim not in (axes, axes + 1):
            raise InputError(
                f"an array of pictures has {axes} or {axes + 1} axes, this one has the shape "
                f'{images.shape}; for grey pictures [H, W] pass input_data_format="none"'
            )
        images = [images] if images.ndim == axes else list(images)
    if not images:
        raise InputError("no pictures were given: the list is empty")

    arrays = []
    for number, image in enumerate(images):
        if isinstance(image, PIL.Image.Image):
            if convert_rgb:
                image = to_rgb(image)
            else:
                load(image)
            array = np.asarray(image)
            expected = 3
        else:
            array, expected = _to_numpy(image), axes
        if array.ndim != expected or 0 in array.shape:
            raise InputError(
                f"picture {number} has the shape {array.shape}: height, width and channels are "
                "needed, none of them 0 (grey PIL images: do_convert_rgb=True; grey arrays [H, W]: "
                'input_data_format="none")'
            )
        if array.ndim == 2:
            array = np.repeat(array[:, :, None], 3 if convert_rgb else 1, axis=2)
        elif not isinstance(image, PIL.Image.Image):
            layout = layout or _infer_layout(array)
            array = array.transpose(1, 2, 0) if layout == "channels_first" else array
        else:
            layout = layout or "channels_last"
        arrays.append(array)
    return arrays, "channels_first" if layout == "none" else layout


def _infer_layout(array: np.ndarray) -> str:
    if array.shape[0] in (1, 3):
        return "channels_first"
    if array.shape[2] in (1, 3):
        return "channels_last"
    raise InputError(
        f"cannot tell the channels of a picture of shape {array.shape}: pass "
        'input_data_format="channels_first" or "channels_last"'
    )


def _to_numpy(image: Any) -> np.ndarray:
    if not hasattr(image, "__array__"):
        raise InputError(
            f"a picture cannot be a {type(image).__name__}: give a PIL image or a numpy, JAX, "
            "torch or TensorFlow array (convnext_jax.image.read_image reads files)"
        )
    try:
        if hasattr(image, "detach"):  # a torch tensor
            image = image.detach().cpu()
            image = image.float() if str(image.dtype) == "torch.bfloat16" else image
        array = np.asarray(image)
    except Exception as error:  # whatever a framework says of what is not in memory
        reason = " ".join(str(error).split())
        raise InputError(
            f"a picture of type {type(image).__name__} has no values to read ({reason[:200]}); "
            "preprocess pictures outside of jit and graphs"
        ) from error
    if array.dtype == jnp.bfloat16:
        return array.astype(np.float32)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise InputError(f"a picture cannot have the dtype {array.dtype}: use uint8 or a float")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_channels(array: np.ndarray, options: _Options) -> None:
    for name in ("image_mean", "image_std") if options.do_normalize else ():
        values = getattr(options, name)
        if isinstance(values, list) and len(values) != array.shape[-1]:
            raise InputError(
                f"{name}={values} must be a number, or one for each of the {array.shape[-1]} "
                "channels"
            )


# Pixels -------------------------------------------------------------------------------------------


def _rescale_and_normalize(pixels: np.ndarray, options: _Options) -> np.ndarray:
    """The arithmetic after resizing, on [..., C], in the dtypes of the original."""
    if options.do_rescale:
        pixels = (pixels * float(options.rescale_factor)).astype(np.float32)
    if options.do_normalize:
        if pixels.dtype.kind != "f":
            pixels = pixels.astype(np.float32)
        mean, std = (
            np.asarray(values, pixels.dtype) for values in (options.image_mean, options.image_std)
        )
        pixels = (pixels - mean) / std
    return pixels


def resize_rule(
    height: int, width: int, size: int, crop_pct: float
) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """How the original brings a picture to size x size.

    Below 384 the shorter side is resized to int(size / crop_pct), the longer one in proportion, and
    the centre is cut out; from 384 on the whole picture is resized, whatever its proportions.

    Args:
      height: Of the picture, in pixels.
      width: Likewise.
      size: Of the result.
      crop_pct: The part of the shorter side that is kept.

    Returns:
      The (height, width) to resize to, and the (top, left, height, width) to keep of that, or
      None for all. Top and left are negative where the resized picture is smaller than the crop:
      it is then centred in zeros.
    """
    if size >= FIRST_WARPED_SIZE:
        return (size, size), None
    short = int(size / crop_pct)
    if width <= height:
        resized = (int(short * height / width), short)
    else:
        resized = (short, int(short * width / height))
    top, left = ((side - size) // 2 for side in resized)
    return resized, (top, left, size, size)


class _Part(NamedTuple):
    """Pictures that went through one program together."""

    numbers: Sequence[int]  # n places in the list of pictures
    pixels: np.ndarray | jax.Array  # [n, ...]


def _resize_and_look_up(
    images: Sequence[np.ndarray], options: _Options, channels_first: bool
) -> list[_Part]:
    """Resize, crop, rescale and normalise pictures [H, W, C], on the device."""
    size = options.size["shortest_edge"]
    pictures, plans = [], []
    # What can go through one program: equal padded shapes, channels, and a path through 8 bits.
    groups: dict[tuple, list[int]] = {}
    for number, image in enumerate(images):
        in_size, channels = image.shape[:2], image.shape[2]
        out_size, crop = resize_rule(*in_size, size, options.crop_pct)
        plans.append(resampling.plan_resize(in_size, out_size, options.resample, crop))
        picture, was_scaled = _to_uint8(image)
        pictures.append(picture)
        # Pillow filters the colours of pictures with transparency multiplied by it.
        alpha = (
            channels in (2, 4)
            and out_size != in_size
            and options.resample != resampling.Resampling.NEAREST
        )
        kind = (resampling.packed_shape(plans[-1]), channels, was_scaled, alpha)
        groups.setdefault(kind, []).append(number)

    parts = []
    for ((height, width, n_taps), channels, was_scaled, alpha), group in groups.items():
        # After resizing there are 256 possible values a channel: all arithmetic that follows is
        # done on those, in numpy, and looked up.
        values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], channels, axis=1)
        if was_scaled:
            values = (values * (1 / 255)).astype(np.float32)
        table = _rescale_and_normalize(values, options)
        for part in _split(group, height * width):
            batch, packed = resampling.pack([pictures[n] for n in part], [plans[n] for n in part])
            pixels = _device_program(
                batch, _join(packed, table), size, n_taps, table.dtype.name, alpha, channels_first
            )
            parts.append(_Part(part, pixels))
    return parts


def _split(group: Sequence[int], pixels: int) -> list[Sequence[int]]:
    """Cut a group into parts of a few sizes, since each size is a program of its own.

    A CPU works on one picture after the other anyway; an accelerator on several, but not on more
    than 16 padded pictures of a megapixel.
    """
    device = jax.config.jax_default_device  # None, a device, or the name of a platform
    platform = getattr(device, "platform", device) or jax.default_backend()
    sizes = [1] if platform == "cpu" else [n for n in (16, 4, 1) if n * pixels <= 2**24 or n == 1]
    parts, first = [], 0
    while first < len(group):
        count = next(n for n in sizes if first + n <= len(group))
        parts.append(group[first : first + count])
        first += count
    return parts


def _join(plans: resampling.ResizePlan, table: np.ndarray) -> np.ndarray:
    """Plans for N pictures and a table [256, C], as one array of int32.

    A transfer to an accelerator takes longer to start than these numbers take to move.
    """
    # Where no arithmetic is done the table holds 0 .. 255 as uint8, and else float32.
    table = table.astype(np.int32) if table.dtype == np.uint8 else table.view(np.int32)
    arrays = (*plans.rows, *plans.columns, plans.rows_first.astype(np.int32), table)
    return np.concatenate([array.ravel() for array in arrays])


def _take_apart(
    settings: jax.Array, count: int, size: int, n_taps: int, table_dtype: str
) -> tuple[resampling.ResizePlan, jax.Array]:
    """Undo `_join`, under jit."""
    starts, weights = (count, size), (count, size, n_taps)
    lengths = [math.prod(shape) for shape in (starts, weights, starts, weights, (count,))]
    *axes, rows_first, table = jnp.split(settings, np.cumsum(lengths))
    rows, columns = (
        resampling.Taps(axes[i].reshape(starts), axes[i + 1].reshape(weights)) for i in (0, 2)
    )
    if table_dtype == "uint8":
        table = table.astype(jnp.uint8)
    else:
        table = jax.lax.bitcast_convert_type(table, table_dtype)
    return resampling.ResizePlan(rows, columns, rows_first != 0), table.reshape(256, -1)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _device_program(
    images: jax.Array,
    settings: jax.Array,
    size: int,
    n_taps: int,
    table_dtype: str,
    alpha: bool,
    channels_first: bool,
) -> jax.Array:
    """[N, H, W, C] uint8 -> [N, S, S, C] or [N, C, S, S] of the dtype of the table."""
    plans, table = _take_apart(settings, len(images), size, n_taps, table_dtype)
    if alpha:
        images = resampling.premultiply_alpha(images)
    images = resampling.apply_plan(images, plans)
    if alpha:
        images = resampling.unpremultiply_alpha(images)
    channel = jnp.arange(images.shape[-1])
    if channels_first:
        images, channel = images.transpose(0, 3, 1, 2), channel[:, None, None]
    return table[images, channel]


def _to_uint8(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """The 8-bit picture that is resized, and whether it had to be multiplied by 255 for that."""
    if image.dtype == np.uint8:
        return image, False
    with np.errstate(invalid="ignore"):  # NaN: refused below
        whole = np.allclose(image, image.astype(int))
    low, high = image.min(), image.max()
    if whole and low >= 0 and high <= 255:
        return image.astype(np.uint8), False
    if not whole and low >= 0 and high <= 1:
        return (image * 255).astype(np.float32).astype(np.uint8), True
    raise InputError(
        f"a picture with values from {low} to {high} cannot be resized: whole numbers in 0 .. 255 "
        "or fractions in 0 .. 1 are needed"
    )


# Pictures out -------------------------------------------------------------------------------------


def _as_tensors(parts: Sequence[_Part], return_tensors: str | None) -> Any:
    """A list of arrays of numpy, or one array of the kind asked for."""
    count = sum(len(part.numbers) for part in parts)
    if return_tensors is None:
        results: list[Any] = [None] * count
        for part in parts:
            for number, result in zip(part.numbers, np.asarray(part.pixels), strict=True):
                results[number] = np.array(result)
        return results

    shapes = sorted({part.pixels.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise InputError(
            f"pictures of the shapes {', '.join(map(str, shapes))} do not fit into one array: "
            "use do_resize=True or return_tensors=None"
        )
    shape, dtype = (count, *shapes[0]), np.result_type(*(part.pixels.dtype for part in parts))
    if return_tensors == "jax" and all(isinstance(part.pixels, jax.Array) for part in parts):
        if len(parts) == 1:  # all of them, in order
            return parts[0].pixels
        batch = jnp.zeros(shape, dtype)
        for part in parts:
            batch = _put(batch, part.pixels, np.array(part.numbers))
        return batch
    batch = np.empty(shape, dtype)
    for part in parts:
        batch[part.numbers] = part.pixels
    if return_tensors == "jax":
        return jnp.asarray(batch)
    if return_tensors == "np":
        return batch
    module, function = _FRAMEWORKS[return_tensors]
    try:
        return getattr(importlib.import_module(module), function)(batch)
    except ImportError:
        raise InputError(
            f'return_tensors="{return_tensors}" needs {module}, which is not installed'
        ) from None


@functools.partial(jax.jit, donate_argnums=0)
def _put(batch: jax.Array, pictures: jax.Array, numbers: jax.Array) -> jax.Array:
    return batch.at[numbers].set(pictures)
