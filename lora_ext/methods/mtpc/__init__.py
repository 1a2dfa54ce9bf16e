"""Multi-token prediction with probabilistic circuits: windows, retrofit, speculative decoding.

Source: "Fast and Expressive Multi-Token Prediction with Probabilistic Circuits" (arXiv 2511.11346).
"""

from .config import MtpcConfig
from .windows import pack_documents, shift_labels, unfold_teacher, unfold_windows

__all__ = ["MtpcConfig", "pack_documents", "shift_labels", "unfold_teacher", "unfold_windows"]
