"""Federated fine-tuning with LoRA: plans, payloads and aggregation, without Flower.

``LocalGrid``, ``LoraStrategy``, ``make_client_app`` and ``make_server_app`` require the package
``flwr``. They are imported from :mod:`lora_ext.federated.flower` on first access.
"""

from lora_ext._on_demand import on_demand

from ._aggregation import Aggregate, aggregate
from ._layers import LoraLayerManager
from ._masked import aggregate_masked, masked_payload
from ._payload import Payload, pack_tensors, plan_bytes, plan_shapes, read_npy, unpack_tensors
from ._plan import PATTERN, Client, LayerNotFound, LayerPlan, check_layers, layer_pairs
from ._update import Update
from .batched import BatchedClients, ClientSpec, UnsupportedModule, logits_of, merged
from .logs import CommLog, CommRow, RoundLog
from .partition import partition_dirichlet, partition_pathological

__all__ = [
    "Aggregate", "BatchedClients", "ClientSpec", "CommLog", "CommRow", "LayerNotFound", "LayerPlan",
    "LoraLayerManager", "Payload", "RoundLog", "UnsupportedModule", "Update", "aggregate",
    "aggregate_masked", "masked_payload", "pack_tensors", "partition_dirichlet",
    "partition_pathological", "plan_bytes", "plan_shapes", "read_npy", "unpack_tensors",
]  # fmt: skip

__getattr__ = on_demand(__name__, flower="LocalGrid LoraStrategy make_client_app make_server_app")
