"""Probabilistic circuits over any region graph: structure, checks, queries, sampling, EM."""

from lora_ext.circuits.chain import KBest
from lora_ext.circuits.chow_liu import chow_liu_parents
from lora_ext.circuits.circuit import Circuit, Report
from lora_ext.circuits.errors import PCStructureError
from lora_ext.circuits.layered import Layered, compile_graph
from lora_ext.circuits.learning import Flows
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
from lora_ext.circuits.picture import draw_graph
from lora_ext.circuits.queries import Marginals
from lora_ext.circuits.region_graph import RegionGraph
from lora_ext.circuits.regions import Input, Partition, Region
from lora_ext.circuits.sampling import MapResult
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
    "draw_graph",
    "pad_sequences",
    "train_em",
    "train_gradient",
]
