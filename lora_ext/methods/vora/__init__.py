"""Vision as LoRA: a language model that sees, without a vision tower.

Source: "Vision as LoRA" (arXiv 2503.20680).
"""

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

__all__ = [
    "DistillHeads",
    "Spliced",
    "UnmergeableRouteError",
    "VisionPatchEmbed",
    "VoraConfig",
    "VoraForCausalLM",
    "VoraLinear",
    "apply",
    "block_distill_loss",
    "build_vision_mask",
    "from_peft",
    "load_state_dict",
    "merge",
    "modality",
    "remove",
    "smart_resize",
    "splice_images",
    "state_dict",
    "to_peft",
]
