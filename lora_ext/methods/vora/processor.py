"""Image processor for :class:`VisionPatchEmbed`, with the interface of transformers' processors."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._checks import integer, number, require, require_flags

from ._embed import MAX_PIXELS, MIN_PIXELS, smart_resize

EXTRA = "run `pip install --no-build-isolation '.[vision]'` in a checkout of lora_ext"
try:
    from transformers.image_processing_base import BatchFeature
    from transformers.image_processing_utils import BaseImageProcessor
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"VoraImageProcessor: transformers is not installed; {EXTRA}"
    ) from error
try:
    from PIL import Image as pillow
except ModuleNotFoundError:  # Arrays and tensors do not need Pillow.
    pillow = None

#: Normalisation of CLIP and of AIMv2, the paper's teacher.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # torch's names, by Pillow's numbers
#: Keys that transformers writes into the file of every processor.
SERVICE = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")


class VoraImageProcessor(BaseImageProcessor):
    """Processor that resizes, rescales and normalises images of different sizes.

    Like transformers' processors it has ``from_pretrained`` and ``save_pretrained``, and its calls
    accept ``return_tensors`` and keyword arguments that override the settings. Images are not
    padded or cropped.

    Args:
        patch: p, side of a patch in pixels; the sides of resized images are multiples of ``patch``.
        do_resize: whether to resize images to the size from :func:`smart_resize`; if False, their
            sides must be multiples of the patch size.
        min_pixels: lower bound of the area after resizing.
        max_pixels: upper bound of the area after resizing.
        resample: filter, as a number of Pillow: 0 nearest, 2 bilinear, 3 bicubic. Filters 2 and 3
            antialias when they shrink an image.
        do_rescale: whether to multiply the values by ``rescale_factor``.
        rescale_factor: factor for ``do_rescale``.
        do_normalize: whether to compute ``(x - image_mean) / image_std``.
        image_mean: one number per channel.
        image_std: one number per channel, not 0.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If a setting is unknown.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as transformers declares it)

    def __init__(
        self,
        patch: int = 14,
        do_resize: bool = True,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        resample: int = 3,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = STD,
        **service: Any,
    ):
        where = "VoraImageProcessor"
        for name in service:
            require(name in SERVICE, where, name, f"one of {FIELDS}", repr(name), TypeError)
        super().__init__()
        integer(where, "patch", patch, 1)
        integer(where, "max_pixels", max_pixels, 1)
        integer(where, "min_pixels", min_pixels, 1, max_pixels)
        number(where, "rescale_factor", rescale_factor)
        known = type(resample) is not bool and resample in FILTERS
        require(known, where, "resample", f"one of {FILTERS}", repr(resample))
        fits, expected = _are_three_numbers(image_mean), "a number for each of 3 channels"
        require(fits, where, "image_mean", expected, repr(image_mean))
        fits = _are_three_numbers(image_std) and all(image_std)
        require(fits, where, "image_std", "3 numbers other than 0", repr(image_std))
        require_flags(where, do_resize=do_resize, do_rescale=do_rescale, do_normalize=do_normalize)
        self.patch, self.resample, self.rescale_factor = patch, int(resample), rescale_factor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.do_resize, self.do_rescale, self.do_normalize = do_resize, do_rescale, do_normalize
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a processor with the settings in ``image_processor_dict``. Keyword arguments
        override these settings and are also checked."""
        wants_rest = kwargs.pop("return_unused_kwargs", False)
        ours = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        processor = cls(**{**image_processor_dict, **ours})
        return (processor, kwargs) if wants_rest else processor

    def preprocess(
        self, images: Any, *args: Any, return_tensors: str | None = None, **overrides: Any
    ) -> BatchFeature:
        """Process images for :class:`VoraForCausalLM`.

        Args:
            images: an image, a list of images, or one list of images per sample. An image is a
                Pillow image, a path to one, or a numpy array or tensor: ``(H, W)``, ``(C, H, W)``
                or ``(H, W, C)`` with C = 1, 3 or 4 channels; a fourth channel (opacity) is dropped.
                If both the first and the last size are 1, 3 or 4, the first is C. An array with
                four dimensions is a list of images.
            return_tensors: "pt" for one tensor of all images or "np" for one array. The images must
                then have equal sizes after processing.
            overrides: settings for this call.

        Returns:
            ``pixel_values``: float32 tensors ``(3, H, W)``, in one list or in one list per sample,
            like ``images``. ``image_grids``: for each image, the numbers of rows and columns of
            patches ``(h, w)``, in one list.

        Raises:
            ValueError: If a size is invalid, or ``return_tensors`` is set and there is no image or
                images have several sizes.
            TypeError: If an object is not an image, has bools as values, or a setting is unknown.
            ModuleNotFoundError: If ``images`` contains a path and Pillow is not installed.
        """
        where = "VoraImageProcessor"
        expected = "no positional argument after images"
        require(not args, where, "args", expected, len(args), TypeError)
        if overrides:
            settings = {name: getattr(self, name) for name in FIELDS} | overrides
            return type(self)(**settings).preprocess(images, return_tensors=return_tensors)
        given = repr(return_tensors)
        known = return_tensors in (None, "pt", "np")
        require(known, where, "return_tensors", "None, 'pt' or 'np'", given)
        nested = isinstance(images, list | tuple) and any(
            one is None or isinstance(one, list | tuple) or _is_batch(one) for one in images
        )
        samples = [_as_list(one) for one in images] if nested else [_as_list(images)]
        found = [[self._prepare(one) for one in sample] for sample in samples]
        flat = [image for sample in found for image in sample]
        grids = [(i.shape[1] // self.patch, i.shape[2] // self.patch) for i in flat]
        values: Any = found if nested else flat
        places: Any = grids
        if return_tensors is not None:
            sizes = [tuple(image.shape[1:]) for image in flat]
            expected = f"images of equal size after resizing if return_tensors is {given}"
            require(len(set(sizes)) == 1, where, "images", expected, sizes)
            values, places = torch.stack(flat), torch.tensor(grids)
        if return_tensors == "np":
            values, places = values.numpy(), places.numpy()
        return BatchFeature({"pixel_values": values, "image_grids": places})

    def _prepare(self, image: Any) -> Tensor:
        pixels = _to_tensor(image)
        is_integer = not pixels.is_floating_point()
        pixels = pixels.float()
        height, width = pixels.shape[1:]
        target = height, width
        if self.do_resize:
            target = smart_resize(height, width, self.patch, self.min_pixels, self.max_pixels)
        whole = not (target[0] % self.patch or target[1] % self.patch)
        expected = f"sides that are multiples of the patch size {self.patch} if do_resize is False"
        require(whole, "VoraImageProcessor", "images", expected, f"{height} x {width}")
        if target != (height, width):
            mode, smooth = FILTERS[self.resample], self.resample != 0
            pixels = F.interpolate(pixels[None], target, mode=mode, antialias=smooth)[0]
            if is_integer:
                pixels = pixels.clamp(0, 255)  # Bicubic interpolation can exceed the range.
        if self.do_rescale:
            if not is_integer and pixels.min() >= 0 and 0 < pixels.max() <= 1:
                warnings.warn(
                    "VoraImageProcessor: images: expected values of 0 to 255 for do_rescale=True, "
                    f"found a maximum of {pixels.max():.4g}; pass do_rescale=False",
                    stacklevel=2,
                )
            pixels = pixels * self.rescale_factor
        if self.do_normalize:
            mean, std = pixels.new_tensor([self.image_mean, self.image_std])[..., None, None]
            pixels = (pixels - mean) / std
        return pixels


#: Names of the settings in the order of the arguments, without the last argument, which accepts
#: transformers' keys.
FIELDS = tuple(inspect.signature(VoraImageProcessor).parameters)[:-1]


def _are_three_numbers(values: Any) -> bool:
    return (
        isinstance(values, Sequence | np.ndarray)
        and len(values) == 3
        and all(isinstance(v, numbers.Real) and math.isfinite(v) for v in values)
    )


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    several = isinstance(images, list | tuple) or _is_batch(images)
    return list(images) if several else [images]


def _is_batch(images: Any) -> bool:
    return isinstance(images, np.ndarray | Tensor) and images.ndim == 4


def _to_tensor(image: Any) -> Tensor:
    """Convert an image to a tensor ``(3, H, W)`` with unchanged values."""
    if isinstance(image, str | os.PathLike):
        if pillow is None:
            needs = f"reading {os.fspath(image)} needs Pillow; {EXTRA}"
            raise ModuleNotFoundError(f"VoraImageProcessor: {needs}")
        with pillow.open(image) as file:
            image = file.convert("RGB")
    if pillow is not None and isinstance(image, pillow.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype.kind in "buif":
        native = image.astype(image.dtype.newbyteorder("="))  # a copy
        image = torch.from_numpy(np.ascontiguousarray(native))
    where = "VoraImageProcessor"
    found = getattr(image, "dtype", type(image).__name__)
    real = isinstance(image, Tensor) and image.dtype != torch.bool and not image.is_complex()
    expected = "Pillow images, paths, or arrays or tensors of numbers"
    require(real, where, "images", expected, found, TypeError)
    assert isinstance(image, Tensor)
    image = image[None] if image.dim() == 2 else image
    fits = image.dim() == 3 and {image.shape[0], image.shape[2]} & {1, 3, 4}
    require(fits, where, "images", "shape (3, H, W), (H, W, 3) or (H, W)", tuple(image.shape))
    if image.shape[0] not in (1, 3, 4):
        image = image.movedim(2, 0)
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
