"""Chains, compared with torch-struct: partition functions, marginals and best paths."""

import pytest
import torch
from circuit_graphs import circuit_of, close
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.circuits import Categorical, Circuit, RegionGraph

torch_struct = pytest.importorskip(
    "torch_struct",
    reason="torch-struct is not installed: pip install --no-build-isolation '.[peers]'",
)
# torch-struct was written before torch required constraints of distributions.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not define `arg_constraints`")
STEPS, RANK, VALUES, ROWS = 6, 4, 5, 7


def chain(seed: int) -> tuple[Circuit, Tensor, Tensor, Tensor]:
    """Return an HMM and its log-probabilities: prior (C), transitions (T - 1, C, C) and leaves."""
    circuit = circuit_of(RegionGraph.hmm(STEPS, RANK, Categorical(VALUES)), seed)
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    prior = circuit.region_weights(names["z0"])[0].log_softmax(0)
    steps = [circuit.region_weights(names[f"z{t}"]).log_softmax(1) for t in range(1, STEPS)]
    leaves = [circuit.region_leaves(names[f"x{t}"])["logits"].log_softmax(1) for t in range(STEPS)]
    return circuit, prior, torch.stack(steps), torch.stack(leaves)


def data(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(VALUES, (ROWS, STEPS), generator=g)


def potentials(prior: Tensor, steps: Tensor, leaves: Tensor, x: Tensor) -> Tensor:
    """Return the potentials in torch-struct's layout ``(B, T - 1, next state, state)``."""
    seen = torch.stack([leaves[t][:, x[:, t]].T for t in range(STEPS)], 1)  # (B, T, C)
    edges = steps.transpose(1, 2)[None] + seen[:, 1:, :, None]
    edges[:, 0] = edges[:, 0] + (prior + seen[:, 0])[:, None]
    return edges


@pytest.mark.parametrize("seed", range(4))
def test_log_probabilities_gradients_flows_and_best_paths_equal_torch_struct(seed: int) -> None:
    circuit, *tables = chain(seed)
    x = data(seed)
    peer = torch_struct.LinearChainCRF(potentials(*tables, x))
    close(circuit.log_prob(x), peer.partition)
    prior, steps, leaves = (t[None].expand(ROWS, *t.shape) for t in tables)
    close(ops.circuit_scan("hmm", leaves, prior, steps, x).prefix[:, -1], peer.partition)
    close(reference.circuit_scan("hmm", leaves, prior, steps, x).prefix[:, -1], peer.partition)
    close(circuit.map(x).value, peer.max.detach())
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    edges = torch_struct.LinearChainCRF(potentials(*tables, x)).marginals.sum(0)
    flows = circuit.flows(x).weights
    for t in range(1, STEPS):
        first = circuit.layered.weight_off[names[f"z{t}"]]
        used = flows[first : first + RANK * RANK].view(RANK, RANK)
        close(used, edges[t - 1].T.detach())
    gradients = [
        torch.autograd.grad(value.sum(), [*circuit.parameters()], retain_graph=True)
        for value in (
            circuit.log_prob(x),
            torch_struct.LinearChainCRF(potentials(*tables, x)).partition,
        )
    ]
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_products_of_log_matrices_equal_log_partitions() -> None:
    g = torch.Generator().manual_seed(0)
    edges = 5 * torch.randn(3, STEPS - 1, RANK, RANK, generator=g, dtype=torch.float64)
    product = edges[:, 0]
    for t in range(1, STEPS - 1):
        product = ops.log_bmm(edges[:, t], product)
    close(product.logsumexp((1, 2)), torch_struct.LinearChainCRF(edges).partition)
