"""SPLoRA: pruning of an adapter's layers to preserve the safety alignment of the base model.

A layer is scored by the distance of its update from the directions in which the alignment changed
the weight.

Source: "Safe Pruning LoRA: Robust Distance-Guided Pruning for Safety Alignment in Adaptation of
LLMs" (arXiv 2506.18931); the metric E-DIEM after arXiv 2407.08623; the projection of Safe LoRA
(arXiv 2405.16833).
"""

from ._projection import ZeroAlignmentError, project_factor
from .config import SploraConfig
from .pruning import SploraResult, apply, apply_to, project, remove, select_layers
from .scores import (
    DegenerateReferenceError,
    LayerStats,
    diem,
    ediem_scores,
    pair_stats,
    size_correlation,
)

__all__ = [
    "DegenerateReferenceError", "LayerStats", "SploraConfig", "SploraResult", "ZeroAlignmentError",
    "apply", "apply_to", "diem", "ediem_scores", "pair_stats", "project", "project_factor",
    "remove", "select_layers", "size_correlation",
]  # fmt: skip
