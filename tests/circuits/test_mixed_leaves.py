"""Circuits with a different leaf family for each variable, compared with their region graph."""

from __future__ import annotations

import pytest
import torch
from circuit_graphs import assignments, circuit_of, close, evaluate

from lora_ext.circuits import (
    Bernoulli,
    Binomial,
    Categorical,
    Gaussian,
    PCStructureError,
    RegionGraph,
)
from lora_ext.reference._circuit import draw

LEAVES = [Bernoulli(), Categorical(3), Binomial(2), Bernoulli(), Categorical(3), Categorical(2)]
BUILDERS = {
    "cp": lambda leaf: RegionGraph.cp(6, 3, leaf),
    "hmm": lambda leaf: RegionGraph.hmm(6, 2, leaf),
    "hclt": lambda leaf: RegionGraph.hclt([-1, 0, 0, 1, 1, 2], 2, leaf),
    "btree": lambda leaf: RegionGraph.btree(6, 3, leaf),
    "rat_spn": lambda leaf: RegionGraph.rat_spn(6, 1, 2, 2, 3, leaf),
    "poon_domingos": lambda leaf: RegionGraph.poon_domingos(2, 3, 2, leaf),
    "poon_domingos delta 2": lambda leaf: RegionGraph.poon_domingos(2, 3, 2, leaf, 2),
    "poon_domingos uncut": lambda leaf: RegionGraph.poon_domingos(2, 3, 2, leaf, 3),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_circuits_of_several_families_match_their_graph(name):
    circuit = circuit_of(BUILDERS[name](LEAVES))
    x = assignments(circuit)
    log_prob = circuit.log_prob(x)
    assert log_prob.logsumexp(0).abs() < 1e-12
    for row in range(0, len(x), 31):
        expected = torch.tensor(evaluate(circuit, x[row].tolist()), dtype=torch.float64)
        close(log_prob[row].exp().detach(), expected)
    families = {v: r.leaf for r in circuit.graph.regions if r.leaf for v in scope_of(r.variables)}
    assert [families[v] for v in range(6)] == LEAVES


def scope_of(variables: int) -> list[int]:
    return [v for v in range(6) if variables >> v & 1]


@pytest.mark.parametrize("name", BUILDERS)
def test_list_of_one_repeated_family_equals_that_family(name):
    assert BUILDERS[name]([Bernoulli()] * 6) == BUILDERS[name](Bernoulli())


@pytest.mark.parametrize("name", BUILDERS)
def test_list_of_the_wrong_length_raises(name):
    message = "leaf: expected one family, or one for each of 6 variables, found 5"
    with pytest.raises(PCStructureError, match=message):
        BUILDERS[name](LEAVES[:5])


def test_numbers_and_categories_are_learned_together():
    graph = RegionGraph.rat_spn(
        4, 1, 3, 2, 2, [Gaussian(), Categorical(3), Gaussian(), Bernoulli()]
    )
    circuit, other = circuit_of(graph, seed=1), circuit_of(graph, seed=2)
    x = other.sample(200, generator=torch.Generator().manual_seed(0))[0]
    values = [circuit.em_step(x, pseudocount=0) for _ in range(15)]
    assert torch.stack(values).diff().min() > -1e-9


def test_homogeneous_chain_accepts_one_family_only():
    with pytest.raises(PCStructureError, match="hclt: leaf: expected one family, because the cir"):
        RegionGraph.hmm(6, 2, LEAVES, homogeneous=True)


@pytest.mark.parametrize("leaf", [Bernoulli(), Binomial(8), Categorical(1), Categorical(13)])
def test_values_are_drawn_like_draw_does_row_by_row(leaf):
    """Check also uniforms equal to the cumulative sums, 0, and the largest number below 1."""
    g = torch.Generator().manual_seed(0)
    table = {k: 3 * torch.randn(t.shape, generator=g) for k, t in leaf.table(20).items()}
    if isinstance(leaf, Categorical):
        logits = table["logits"].masked_fill_(torch.rand(20, 1, generator=g) < 0.5, 0)
        logits[:, 1:][torch.rand(logits[:, 1:].shape, generator=g) < 0.3] = -torch.inf
    row, u = torch.randint(20, (3000,), generator=g), torch.rand(3000, generator=g)
    u[::3] = (u[::3] * 8).floor() / 8
    u[:20], row[:20] = 1 - 2**-24, torch.arange(20)
    expected = draw(leaf.log_table(table).exp()[row], u)
    assert torch.equal(leaf.sample(table, row, u), expected)
