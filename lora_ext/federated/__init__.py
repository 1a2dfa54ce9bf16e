"""Federated fine-tuning with LoRA: plans, payloads and aggregation. Nothing here needs Flower.

``LocalGrid``, ``LoraStrategy``, ``make_client_app`` and ``make_server_app`` do, and are found in
:mod:`lora_ext.federated.flower` when they are asked for.
"""

from lora_ext._on_demand import on_demand

from .aggregation import Aggregate, aggregate
from .batched import BatchedClients, ClientSpec, UnsupportedModule, logits_of, merged
from .layers import LoraLayerManager
from .logs import CommLog, CommRow, RoundLog
from .masked import aggregate_masked, masked_payload
from .partition import partition_dirichlet, partition_pathological
from .payload import Payload, pack_tensors, plan_bytes, plan_shapes, read_npy, unpack_tensors
from .plan import PATTERN, Client, LayerNotFound, LayerPlan, check_layers, layer_pairs
from .update import Update

__all__ = [
    "Aggregate", "BatchedClients", "ClientSpec", "CommLog", "CommRow", "LayerNotFound", "LayerPlan",
    "LoraLayerManager", "Payload", "RoundLog", "UnsupportedModule", "Update", "aggregate",
    "aggregate_masked", "masked_payload", "pack_tensors", "partition_dirichlet",
    "partition_pathological", "plan_bytes", "plan_shapes", "read_npy", "unpack_tensors",
]  # fmt: skip

__getattr__ = on_demand(__name__, flower="LocalGrid LoraStrategy make_client_app make_server_app")
