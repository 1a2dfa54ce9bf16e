"""Federated fine-tuning with LoRA: plans, payloads and aggregation. Nothing here needs Flower."""

from .aggregation import Aggregate, aggregate
from .keys import LayerNotFound
from .layers import LoraLayerManager
from .plan import LayerPlan
from .update import Update

__all__ = [
    "Aggregate",
    "LayerNotFound",
    "LayerPlan",
    "LoraLayerManager",
    "Update",
    "aggregate",
]
