"""Vision as LoRA: a language model that sees, without a vision tower.

Source: "Vision as LoRA" (arXiv 2503.20680).
"""

from typing import TYPE_CHECKING, Any

from .distill import DistillHeads, block_distill_loss
from .embed import VisionPatchEmbed
from .mask import build_vision_mask
from .resolution import smart_resize
from .splice import Spliced, splice_images
from .teacher import TeacherStates, teacher_states

if TYPE_CHECKING:
    from .processor import VoraImageProcessor

__all__ = [
    "DistillHeads",
    "Spliced",
    "TeacherStates",
    "VisionPatchEmbed",
    "VoraImageProcessor",
    "block_distill_loss",
    "build_vision_mask",
    "smart_resize",
    "splice_images",
    "teacher_states",
]


def __getattr__(name: str) -> Any:
    """The processor needs transformers, and is imported when it is asked for."""
    if name == "VoraImageProcessor":
        from .processor import VoraImageProcessor

        return VoraImageProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
