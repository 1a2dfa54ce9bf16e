"""Probabilistic circuits over any region graph: structure, checks, queries, sampling, EM."""

from lora_ext.circuits.builders import chow_liu_parents
from lora_ext.circuits.circuit import Circuit, Report
from lora_ext.circuits.flows import Flows, Marginals
from lora_ext.circuits.leaves import (
    Bernoulli,
    Binomial,
    Categorical,
    External,
    Gaussian,
    Indicator,
    Leaf,
)
from lora_ext.circuits.multivariate import MultivariateGaussian
from lora_ext.circuits.program import Layered, compile_graph
from lora_ext.circuits.region_graph import RegionGraph
from lora_ext.circuits.regions import Input, Partition, Region
from lora_ext.circuits.sampling import KBest, MapResult
from lora_ext.circuits.scopes import PCStructureError
from lora_ext.circuits.training import Epoch, pad_sequences, train_em, train_gradient

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Circuit",
    "Epoch",
    "External",
    "Flows",
    "Gaussian",
    "Indicator",
    "Input",
    "KBest",
    "Layered",
    "Leaf",
    "MapResult",
    "Marginals",
    "MultivariateGaussian",
    "PCStructureError",
    "Partition",
    "Region",
    "RegionGraph",
    "Report",
    "chow_liu_parents",
    "compile_graph",
    "pad_sequences",
    "train_em",
    "train_gradient",
]
