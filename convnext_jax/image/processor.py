"""`ConvNextImageProcessor`: pictures to the `pixel_values` that the networks were trained on.

Options, defaults, order of operations and JSON are those of the image processor in Hugging Face
transformers 4.37.2, and so are the pixels: resizing is equal to Pillow's in every bit, rescaling
and normalising round where the original rounds. Where this class differs on purpose:

* pictures of other modes than RGB given as `PIL.Image` are converted (`do_convert_rgb`); the
  original refuses grey ones and ones with transparency;
* `data_format=None` keeps the layout of the input, as the original's documentation says, where its
  code raises;
* the layout of a `PIL.Image` is known: one three pixels high is not taken for channels-first;
* the result has the size asked for even where a picture smaller than its crop is padded by an odd
  number of pixels; the original loses a row or column there;
* a size without "shortest_edge" together with `do_resize` is an `InputError`, not a KeyError;
* every error is an `InputError` (a ValueError) of one line.
"""

import copy
import functools
import inspect
import json
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
from convnext_jax.image.decode import to_rgb

__all__ = ["BatchFeature", "ConvNextImageProcessor"]

PROCESSOR_NAME = "preprocessor_config.json"
IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)
# From this size on a picture is stretched to a square instead of being cropped.
FIRST_WARPED_SIZE = 384


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
      do_convert_rgb: Whether `PIL.Image`s of other modes are converted to RGB by
        `convnext_jax.image.to_rgb`; None is True. Arrays are taken as they are.
      **kwargs: Anything else becomes an attribute, and stays in the JSON.

    Raises:
      InputError: A size that is not understood. (Everything else is checked when it is used.)
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
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

        Resizing, cropping and the arithmetic after them run in one jitted program on JAX's default
        device. Pictures are padded to a few shapes, so that a stream of photos of many sizes
        compiles a handful of programs. Floating-point pictures are resized as the original does
        it: in 8 bits, so that they keep their range but not their precision.

        Args:
          images: A `PIL.Image`, an array [H, W, C] or [C, H, W] (numpy, JAX or torch), a list or
            tuple of either, or an array of four axes. Values are expected in 0 .. 255; for
            values in 0 .. 1 pass `do_rescale=False`.
          do_resize: This and the next arguments replace the processor's own for this call.
          size: See the class.
          crop_pct: See the class.
          resample: See the class.
          do_rescale: See the class.
          rescale_factor: See the class.
          do_normalize: See the class.
          image_mean: See the class.
          image_std: See the class.
          return_tensors: None for a list of numpy arrays; "np", "jax" or "pt" for one array of
            numpy, JAX or PyTorch.
          data_format: Layout of the result: "channels_first", "channels_last", or None for that
            of the input.
          input_data_format: Layout of the input. By default it is taken from the first picture,
            for all: channels-first if the first axis is 1 or 3 long, else channels-last if the
            last one is.
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
        if return_tensors not in (None, "np", "jax", "pt"):
            raise InputError(
                f'return_tensors={return_tensors!r} is not supported: use None, "np", "jax" or "pt"'
            )
        arrays, layout = _to_arrays(images, options.do_convert_rgb, input_data_format)
        data_format = layout if data_format is None else _layout(data_format, "data_format")
        arrays = [_channels_last(array, layout) for array in arrays]
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
            results = [_resize_and_look_up(array, options, channels_first) for array in arrays]
        else:
            results = [_rescale_and_normalize(array, options) for array in arrays]
            if channels_first:
                results = [result.transpose(2, 0, 1) for result in results]
        return BatchFeature(pixel_values=_as_tensors(results, return_tensors))

    def _options(self, **given: Any) -> _Options:
        options = _Options(
            **{
                name: getattr(self, name) if value is None else value
                for name, value in given.items()
            }
        )
        options = options._replace(size=_size_dict(options.size), resample=_plain(options.resample))
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not isinstance(getattr(options, name), bool | np.bool_ | int):
                raise InputError(f"{name} must be true or false, not {getattr(options, name)!r}")
        if not isinstance(options.resample, int):
            raise InputError(
                f"resample must be the number of one of Pillow's filters, not {options.resample!r}"
            )
        if options.do_resize:
            if "shortest_edge" not in options.size:
                raise InputError(
                    f"do_resize needs a size like {{'shortest_edge': 224}}, not {options.size}"
                )
            target = options.size["shortest_edge"]
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


# Options ------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Numbers and sequences of numbers as Python's own, so that JSON can hold them."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, (np.floating, np.ndarray)):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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
    """Numpy arrays of three axes, and the layout that they all have."""
    if isinstance(images, PIL.Image.Image):
        images = [images]
    elif not isinstance(images, (list, tuple)):
        images = _to_numpy(images)
        if images.ndim not in (3, 4):
            raise InputError(
                f"an array of pictures has 3 or 4 axes, this one has the shape {images.shape}; "
                "a grey picture needs an axis for its one channel"
            )
        images = [images] if images.ndim == 3 else list(images)
    if not images:
        raise InputError("no pictures were given: the list is empty")

    is_pil = isinstance(images[0], PIL.Image.Image)
    if convert_rgb:
        images = [to_rgb(x) if isinstance(x, PIL.Image.Image) else x for x in images]
    arrays = [_to_numpy(image) for image in images]
    for number, array in enumerate(arrays):
        if array.ndim != 3 or 0 in array.shape:
            raise InputError(
                f"picture {number} has the shape {array.shape}: height, width and channels are "
                "needed, none of them 0 (grey PIL images: do_convert_rgb=True)"
            )
    if layout is not None:
        return arrays, _layout(layout, "input_data_format")
    first, last = arrays[0].shape[0], arrays[0].shape[2]
    if first in (1, 3) and not is_pil:
        return arrays, "channels_first"
    if last in (1, 3):
        return arrays, "channels_last"
    raise InputError(
        f"cannot tell the channels of a picture of shape {arrays[0].shape}: pass "
        'input_data_format="channels_first" or "channels_last"'
    )


def _to_numpy(image: Any) -> np.ndarray:
    if hasattr(image, "detach"):  # a torch tensor
        image = image.detach().cpu()
        image = image.float() if str(image.dtype) == "torch.bfloat16" else image
    if not isinstance(image, PIL.Image.Image) and not hasattr(image, "__array__"):
        raise InputError(
            f"a picture cannot be a {type(image).__name__}: give a PIL image or a numpy, JAX or "
            "torch array (convnext_jax.image.read_image reads files)"
        )
    array = np.asarray(image)
    if array.dtype == jnp.bfloat16:
        return array.astype(np.float32)
    if array.dtype.kind not in "buif":
        raise InputError(f"a picture cannot have the dtype {array.dtype}: use uint8 or a float")
    return array


def _channels_last(array: np.ndarray, layout: str) -> np.ndarray:
    return array.transpose(1, 2, 0) if layout == "channels_first" else array


def _check_channels(array: np.ndarray, options: _Options) -> None:
    if not options.do_normalize:
        return
    for name in ("image_mean", "image_std"):
        values = np.asarray(getattr(options, name))
        if values.dtype.kind not in "iuf" or values.shape not in ((), (array.shape[-1],)):
            raise InputError(
                f"{name}={getattr(options, name)!r} must be a number, or one for each of the "
                f"{array.shape[-1]} channels"
            )
    if not np.all(options.image_std):
        raise InputError("image_std must not be 0")


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


def _resize_and_look_up(image: np.ndarray, options: _Options, channels_first: bool) -> jax.Array:
    """Resize, crop, rescale and normalise one picture [H, W, C], on the device."""
    height, width, channels = image.shape
    new_size, crop = resize_rule(height, width, options.size["shortest_edge"], options.crop_pct)
    plan = resampling.plan_resize((height, width), new_size, options.resample, crop)

    pixels, was_scaled = _to_uint8(image)
    # After resizing there are 256 possible values a channel: all arithmetic that follows is done
    # on those, in numpy, and looked up.
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], channels, axis=1)
    if was_scaled:
        values = (values * (1 / 255)).astype(np.float32)
    table = _rescale_and_normalize(values, options)
    # Pillow filters the colours of pictures with transparency multiplied by it.
    alpha = (
        channels in (2, 4)
        and new_size != (height, width)
        and options.resample != resampling.Resampling.NEAREST
    )
    batch, plans = resampling.pack([pixels], [plan])
    return _device_program(
        batch[0], jax.tree.map(lambda x: x[0], plans), table, alpha, channels_first
    )


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


@functools.partial(jax.jit, static_argnames=("alpha", "channels_first"))
def _device_program(
    image: jax.Array,
    plan: resampling.ResizePlan,
    table: jax.Array,
    alpha: bool,
    channels_first: bool,
) -> jax.Array:
    """[H, W, C] uint8 -> [S, S, C] or [C, S, S] of the dtype of `table` [256, C]."""
    if alpha:
        image = resampling.premultiply_alpha(image)
    image = resampling.apply_plan(image, plan)
    if alpha:
        image = resampling.unpremultiply_alpha(image)
    channel = jnp.arange(image.shape[-1])
    if channels_first:
        image, channel = image.transpose(2, 0, 1), channel[:, None, None]
    return table[image, channel]


# Pictures out -------------------------------------------------------------------------------------


def _as_tensors(results: list[np.ndarray | jax.Array], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return [np.array(result) for result in results]
    shapes = {result.shape for result in results}
    if len(shapes) > 1:
        raise InputError(
            f"pictures of the shapes {', '.join(map(str, sorted(shapes)))} do not fit into one "
            "array: use do_resize=True or return_tensors=None"
        )
    if return_tensors == "jax" and isinstance(results[0], jax.Array):
        return jnp.stack(results)
    stacked = np.stack(results)
    if return_tensors == "np":
        return stacked
    if return_tensors == "jax":
        return jnp.asarray(stacked)
    try:
        import torch
    except ImportError:
        raise InputError('return_tensors="pt" needs PyTorch, which is not installed') from None
    return torch.from_numpy(stacked)
