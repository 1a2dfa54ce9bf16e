"""LEGEND: federated LoRA on devices of different speeds. Each device trains the last k layers of
the model; k is chosen for each device so that all devices need about the same time.

Source: "Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices", LEGEND (arXiv
2412.20004).
"""

from lora_ext._on_demand import on_demand

from ._capacity import (
    CapacityReport,
    CapacityTracker,
    Estimate,
    RoundTime,
    SimulatedClock,
    waiting_time,
)
from .allocator import LegendAllocator
from .config import LegendConfig
from .configurator import Configuration, LegendConfigurator
from .prefix import PrefixCache
from .ranks import layer_bytes, rank_distribution, resize_lora, resize_state

__all__ = [
    "CapacityReport", "CapacityTracker", "Configuration", "Estimate", "LegendAllocator",
    "LegendConfig", "LegendConfigurator", "PrefixCache", "RoundTime", "SimulatedClock",
    "layer_bytes", "rank_distribution", "resize_lora", "resize_state", "waiting_time",
]  # fmt: skip

__getattr__ = on_demand(__name__, _flower="Legend")  # requires Flower
