"""Probabilistic circuits over any region graph: structure, checks, queries, sampling, EM."""

from lora_ext.circuits.checks import PCStructureError
from lora_ext.circuits.circuit import Circuit, Flows, MapResult, Report
from lora_ext.circuits.layered import Layered, compile_graph
from lora_ext.circuits.leaves import (
    Bernoulli,
    Binomial,
    Categorical,
    External,
    Gaussian,
    Indicator,
    Leaf,
)
from lora_ext.circuits.picture import draw_graph
from lora_ext.circuits.region_graph import (
    Input,
    Partition,
    Region,
    RegionGraph,
    chow_liu_parents,
)

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Circuit",
    "External",
    "Flows",
    "Gaussian",
    "Indicator",
    "Input",
    "Layered",
    "Leaf",
    "MapResult",
    "PCStructureError",
    "Partition",
    "Region",
    "RegionGraph",
    "Report",
    "chow_liu_parents",
    "compile_graph",
    "draw_graph",
]
