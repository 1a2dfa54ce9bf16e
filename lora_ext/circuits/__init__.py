"""Probabilistic circuits over any region graph: structure, checks, queries, sampling, EM."""

from .builders import chow_liu_parents
from .circuit import Circuit, Report
from .flows import Flows, Marginals
from .leaves import Bernoulli, Binomial, Categorical, External, Gaussian, Indicator, Leaf
from .multivariate import MultivariateGaussian
from .program import Layered, compile_graph
from .region_graph import RegionGraph
from .regions import Input, Partition, Region
from .sampling import KBest, MapResult
from .scopes import PCStructureError
from .training import Epoch, pad_sequences, train_em, train_gradient

__all__ = [
    "Bernoulli", "Binomial", "Categorical", "Circuit", "Epoch", "External", "Flows", "Gaussian",
    "Indicator", "Input", "KBest", "Layered", "Leaf", "MapResult", "Marginals",
    "MultivariateGaussian", "PCStructureError", "Partition", "Region", "RegionGraph", "Report",
    "chow_liu_parents", "compile_graph", "pad_sequences", "train_em", "train_gradient",
]  # fmt: skip
