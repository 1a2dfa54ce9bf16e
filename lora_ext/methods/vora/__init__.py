"""Vision as LoRA: a language model that sees, without a vision tower.

Source: "Vision as LoRA" (arXiv 2503.20680).
"""

from typing import TYPE_CHECKING, Any

from lora_ext.nn.modalities import modality
from lora_ext.nn.vora_linear import UnmergeableRouteError, VoraLinear

from .config import VoraConfig
from .distill import DistillHeads, block_distill_loss
from .embed import VisionPatchEmbed
from .files import from_peft, load_state_dict, state_dict, to_peft
from .layers import apply, merge, remove
from .mask import build_vision_mask
from .model import VoraForCausalLM
from .resolution import smart_resize
from .splice import Spliced, splice_images
from .teacher import TeacherStates, teacher_states

if TYPE_CHECKING:
    from .processor import VoraImageProcessor

__all__ = [
    "DistillHeads", "Spliced", "TeacherStates", "UnmergeableRouteError", "VisionPatchEmbed",
    "VoraConfig", "VoraForCausalLM", "VoraImageProcessor", "VoraLinear", "apply",
    "block_distill_loss", "build_vision_mask", "from_peft", "load_state_dict", "merge", "modality",
    "remove", "smart_resize", "splice_images", "state_dict", "teacher_states", "to_peft",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The processor needs transformers, and is imported when it is asked for."""
    if name == "VoraImageProcessor":
        from .processor import VoraImageProcessor

        return VoraImageProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
