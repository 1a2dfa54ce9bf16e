"""Multi-token prediction with probabilistic circuits: windows, retrofit, speculative decoding.

Source: "Fast and Expressive Multi-Token Prediction with Probabilistic Circuits" (arXiv 2511.11346).
"""

from lora_ext.layers import shift_labels

from ._config import MtpcConfig
from ._drafting import TokenBridge
from .decoder import Generation, SpeculativeDecoder
from .layers import CircuitHead
from .retrofit import Draft, retrofit
from .tail import DraftTail
from .windows import frequent_tokens, pack_documents, unfold_teacher, unfold_windows, window_loss

__all__ = [
    "CircuitHead", "Draft", "DraftTail", "Generation", "MtpcConfig", "SpeculativeDecoder",
    "TokenBridge", "frequent_tokens", "pack_documents", "retrofit", "shift_labels",
    "unfold_teacher", "unfold_windows", "window_loss",
]  # fmt: skip
