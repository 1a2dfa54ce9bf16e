"""Vision as LoRA: images as input of a language model, without a vision tower.

Source: "Vision as LoRA" (arXiv 2503.20680).
"""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand

from ._embed import VisionPatchEmbed, smart_resize
from ._modalities import modality
from ._placement import apply, merge, remove
from .config import VoraConfig
from .distill import DistillHeads, TeacherStates, block_distill_loss, teacher_states
from .files import from_peft, load_state_dict, state_dict, to_peft
from .layers import UnmergeableRouteError, VoraLinear
from .model import VoraForCausalLM
from .splice import Spliced, build_vision_mask, splice_images

if TYPE_CHECKING:
    from .processor import VoraImageProcessor

__all__ = [
    "DistillHeads", "Spliced", "TeacherStates", "UnmergeableRouteError", "VisionPatchEmbed",
    "VoraConfig", "VoraForCausalLM", "VoraImageProcessor", "VoraLinear", "apply",
    "block_distill_loss", "build_vision_mask", "from_peft", "load_state_dict", "merge", "modality",
    "remove", "smart_resize", "splice_images", "state_dict", "teacher_states", "to_peft",
]  # fmt: skip

__getattr__ = on_demand(__name__, processor="VoraImageProcessor")  # The class needs transformers.
