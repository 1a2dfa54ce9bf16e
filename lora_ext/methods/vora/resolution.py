"""The size that an image is given: whole patches, neither too few nor too many."""

from __future__ import annotations

import math

from lora_ext._checks import require

MIN_PIXELS, MAX_PIXELS = 3136, 784000  # 56 x 56; 4000 patches of 14 x 14
MAX_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    factor: int = 14,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """The nearest size whose sides are multiples of ``factor`` and whose area is in bounds.

    Each side is rounded to a multiple, halves to the even one. Where the area is then above
    ``max_pixels``, the sides are ``floor(side / beta / factor) * factor`` with
    ``beta = sqrt(height * width / max_pixels)``; where it is below ``min_pixels``,
    ``ceil(side * beta / factor) * factor`` with ``beta = sqrt(min_pixels / (height * width))``.

    Args:
        height, width: of the image. factor: the side of a patch.
        min_pixels, max_pixels: bounds of the area.

    Returns:
        ``(height, width)``.

    Raises:
        ValueError: a factor below 1, bounds that are none, a side below the factor, sides whose
            ratio is above 200; or ``max_pixels`` too few for one row of patches of this ratio.

    Source: repository Hon-Wong/VoRA, as in Qwen2-VL.
    """
    require(factor >= 1, "smart_resize", "factor", "at least 1", factor)
    expected = f"above 0 and at most max_pixels = {max_pixels}"
    require(0 < min_pixels <= max_pixels, "smart_resize", "min_pixels", expected, min_pixels)
    for name, side in (("height", height), ("width", width)):
        require(side >= factor, "smart_resize", name, f"at least {factor}", side)
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"smart_resize: height, width: expected a ratio of at most {MAX_RATIO}, found "
            f"{height} x {width}"
        )
    sides = height, width
    resized = [round(side / factor) * factor for side in sides]
    if math.prod(resized) > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        resized = [math.floor(side / beta / factor) * factor for side in sides]
    elif math.prod(resized) < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        resized = [math.ceil(side * beta / factor) * factor for side in sides]
    expected = f"enough for patches of side {factor} in an image of {height} x {width}"
    require(all(resized), "smart_resize", "max_pixels", expected, max_pixels)
    return resized[0], resized[1]
