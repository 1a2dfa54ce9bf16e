"""Fed-HeLLo: federated LoRA in which each client trains as many layers as it can.

Source: "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA
Allocation" (arXiv 2506.12213), with its repository TNI-playground/Fed_HeLLo.
"""

from lora_ext._on_demand import on_demand
from lora_ext.federated import partition_dirichlet, partition_pathological

from ._patterns import Pattern, cluster_weights, gd_layers, pattern_weights, rgd_layers
from .allocation import HLA
from .config import FedHelloConfig
from .importance import EmptyProxySet, fim_scores

__all__ = [
    "HLA", "EmptyProxySet", "FedHelloConfig", "Pattern", "cluster_weights", "fim_scores",
    "gd_layers", "partition_dirichlet", "partition_pathological", "pattern_weights", "rgd_layers",
]  # fmt: skip

__getattr__ = on_demand(__name__, _flower="FedHello")  # requires Flower
