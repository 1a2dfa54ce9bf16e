"""Federated fine-tuning with LoRA: plans, payloads and aggregation. Nothing here needs Flower.

``LocalGrid``, ``LoraStrategy``, ``make_client_app`` and ``make_server_app`` do, and are found in
:mod:`lora_ext.federated.flower` when they are asked for.
"""

import importlib
from typing import Any

from .aggregation import Aggregate, aggregate
from .batched import BatchedClients
from .batches import logits_of as logits_of
from .batches import merged as merged
from .clients import ClientSpec
from .keys import PATTERN as PATTERN
from .keys import LayerNotFound
from .keys import check_layers as check_layers
from .keys import layer_pairs as layer_pairs
from .layers import LoraLayerManager
from .logs import CommLog, CommRow, RoundLog
from .masked import aggregate_masked, masked_payload
from .partition import partition_dirichlet, partition_pathological
from .payload import Payload, pack_tensors, plan_bytes, plan_shapes, read_npy, unpack_tensors
from .plan import LayerPlan
from .supported import UnsupportedModule
from .update import Client as Client
from .update import Update

__all__ = [
    "Aggregate",
    "BatchedClients",
    "ClientSpec",
    "CommLog",
    "CommRow",
    "LayerNotFound",
    "LayerPlan",
    "LoraLayerManager",
    "Payload",
    "RoundLog",
    "UnsupportedModule",
    "Update",
    "aggregate",
    "aggregate_masked",
    "masked_payload",
    "pack_tensors",
    "partition_dirichlet",
    "partition_pathological",
    "plan_bytes",
    "plan_shapes",
    "read_npy",
    "unpack_tensors",
]

_FLOWER = ("LocalGrid", "LoraStrategy", "make_client_app", "make_server_app")


def __getattr__(name: str) -> Any:
    """What speaks Flower, which is imported when it is asked for."""
    if name in _FLOWER:
        return getattr(importlib.import_module("lora_ext.federated.flower"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
