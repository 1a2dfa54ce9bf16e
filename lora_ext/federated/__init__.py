"""Federated fine-tuning with LoRA: plans, payloads and aggregation. Nothing here needs Flower."""

from .aggregation import Aggregate, aggregate
from .batched import BatchedClients
from .clients import ClientSpec
from .keys import LayerNotFound
from .layers import LoraLayerManager
from .logs import CommLog, CommRow, RoundLog
from .masked import aggregate_masked, masked_payload
from .partition import partition_dirichlet, partition_pathological
from .payload import Payload, pack_tensors, plan_bytes, plan_shapes, read_npy, unpack_tensors
from .plan import LayerPlan
from .supported import UnsupportedModule
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
