"""Circuits with multivariate Gaussian leaves, and these leaves as torch distributions."""

from __future__ import annotations

import math

import torch
from circuit_graphs import circuit_of
from torch import Tensor
from torch.distributions import MultivariateNormal

from lora_ext.circuits import (
    Categorical,
    Circuit,
    Gaussian,
    Input,
    MultivariateGaussian,
    RegionGraph,
)

LEAF = MultivariateGaussian(min_std=1e-6)
GRAPHS = {
    "mixture": lambda: RegionGraph.cp(3, 2, LEAF),
    "rat_spn": lambda: RegionGraph.rat_spn(6, 1, 3, 2, 3, LEAF),
    "images": lambda: RegionGraph.poon_domingos(2, 3, 2, LEAF, 2),
    "chain": lambda: chain(),
    "families": lambda: RegionGraph.rat_spn(
        5, 1, 2, 2, 2, [LEAF, Categorical(3), LEAF, Gaussian(), LEAF]
    ),
}


def chain(tie: str | None = "emission") -> RegionGraph:
    """Return the graph of a two-state chain of three steps that emit two correlated numbers."""
    inputs = {f"x{t}": Input([2 * t, 2 * t + 1], LEAF, 2, tie) for t in range(3)}
    products = [("z0", ["x0", "z1"]), ("z1", ["x1", "z2"]), ("z2", ["x2"])]
    return RegionGraph.from_edges(inputs, products, {"z1": 2, "z2": 2})


def circuit(name: str, seed: int = 0) -> Circuit:
    """Return a float64 circuit with random parameters, whose variables are correlated."""
    made = circuit_of(GRAPHS[name](), seed)
    with torch.no_grad():
        for table in made.leaves:
            if "lower" in table:
                table["lower"].normal_()
                table["log_diagonal"].normal_(std=0.3)
    return made


def normals(made: Circuit, region: int) -> MultivariateNormal:
    """Return the distributions of the units of an input region, built from the documented meaning
    of its parameters."""
    t = {k: v.detach().clone() for k, v in made.region_leaves(region).items()}
    lower = torch.diag_embed(t["log_diagonal"].exp())
    for u in range(len(lower)):
        numbers = iter(t["lower"][u])
        for i in range(lower.shape[1]):
            for j in range(i):
                lower[u, i, j] = next(numbers)
    return MultivariateNormal(t["mean"], scale_tril=lower)


def given(normal: MultivariateNormal, unit: int, x: Tensor) -> tuple[MultivariateNormal, float]:
    """Return the distribution of the missing entries (NaN) of ``x (d,)`` given the others, and the
    log-density of the others."""
    mean, cov = normal.mean[unit], normal.covariance_matrix[unit]
    h, o = x.isnan(), ~x.isnan()
    log_prob, gain = 0.0, cov[h][:, o]
    if o.any():
        seen = MultivariateNormal(mean[o], cov[o][:, o])
        log_prob = seen.log_prob(x[o]).item()
        gain = gain @ torch.linalg.inv(cov[o][:, o])
    if not h.any():
        return normal, log_prob
    rest = cov[h][:, h] - gain @ cov[o][:, h]
    return MultivariateNormal(mean[h] + gain @ (x[o] - mean[o]), rest), log_prob


def rows_with_gaps(n: int, rows: int, seed: int = 0, share: float = 0.4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g, dtype=torch.float64)
    x[torch.rand(x.shape, generator=g) < share] = math.nan
    x[0], x[1] = torch.randn(n, generator=g, dtype=torch.float64), math.nan
    return x
