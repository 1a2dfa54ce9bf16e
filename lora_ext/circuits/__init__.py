"""Probabilistic circuits over any region graph: structure, checks, queries, sampling, EM."""

from ._builders import chow_liu_parents
from ._flows import Flows, Marginals
from ._leaves import Bernoulli, Binomial, Categorical, External, Gaussian, Indicator, Leaf
from ._program import Layered, compile_graph
from ._regions import Input, Partition, PCStructureError, Region
from ._sampling import KBest, MapResult
from .circuit import Circuit, Report
from .multivariate import MultivariateGaussian
from .region_graph import RegionGraph
from .training import Epoch, pad_sequences, train_em, train_gradient

__all__ = [
    "Bernoulli", "Binomial", "Categorical", "Circuit", "Epoch", "External", "Flows", "Gaussian",
    "Indicator", "Input", "KBest", "Layered", "Leaf", "MapResult", "Marginals",
    "MultivariateGaussian", "PCStructureError", "Partition", "Region", "RegionGraph", "Report",
    "chow_liu_parents", "compile_graph", "pad_sequences", "train_em", "train_gradient",
]  # fmt: skip
