"""Pictures of one coloured shape on noise, of any size, with a caption.

The example and the benchmark of VoRA train on them. Six colours, four shapes and four quadrants
give 96 captions. Position and size of the shape, and the noise, differ between pictures.

Source: the protocol of docs/vora.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 50),
    "purple": (150, 50, 190),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


class Picture(NamedTuple):
    """Image with the parts of its caption."""

    image: Tensor  # (3, H, W) uint8
    colour: str
    shape: str
    quadrant: str

    @property
    def caption(self) -> str:
        """Caption, such as "red circle top left"."""
        return f"{self.colour} {self.shape} {self.quadrant}"


def draw_picture(size: tuple[int, int], generator: torch.Generator) -> Picture:
    """Draw a picture of a random kind.

    Args:
        size: ``(H, W)``, at least 16 each.
        generator: Source of all random numbers.
    """
    numbers = torch.rand(6, generator=generator).tolist()
    colour = list(COLOURS)[int(numbers[0] * len(COLOURS))]
    shape = SHAPES[int(numbers[1] * len(SHAPES))]
    place = int(numbers[2] * len(QUADRANTS))
    height, width = size
    image = torch.randint(0, 60, (3, height, width), generator=generator, dtype=torch.uint8)

    half = min(size) / 2  # side of the square that contains the shape
    radius = half * (0.42 + 0.06 * numbers[3])
    down, right = ((half / 2 - radius) * (2 * number - 1) for number in numbers[4:])
    middle_y = height * (1 + 2 * (place // 2)) / 4 + down
    middle_x = width * (1 + 2 * (place % 2)) / 4 + right
    y = (torch.arange(height) + 0.5 - middle_y)[:, None] / radius
    x = (torch.arange(width) + 0.5 - middle_x) / radius
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": torch.maximum(x.abs(), y.abs()) <= 0.85,
        "triangle": (y <= 0.8) & (x.abs() <= (y + 1) / 1.8),
        "cross": (torch.minimum(x.abs(), y.abs()) <= 0.3) & (torch.maximum(x.abs(), y.abs()) <= 1),
    }[shape]
    paint = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
    return Picture(torch.where(inside, paint, image), colour, shape, QUADRANTS[place])
