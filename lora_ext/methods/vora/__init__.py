"""Vision as LoRA: a language model that sees, without a vision tower.

Source: "Vision as LoRA" (arXiv 2503.20680).
"""

from .distill import DistillHeads, block_distill_loss
from .embed import VisionPatchEmbed
from .mask import build_vision_mask
from .resolution import smart_resize
from .splice import Spliced, splice_images

__all__ = [
    "DistillHeads",
    "Spliced",
    "VisionPatchEmbed",
    "block_distill_loss",
    "build_vision_mask",
    "smart_resize",
    "splice_images",
]
