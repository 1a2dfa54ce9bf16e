"""Homogeneous chains, compared with hmmlearn: log-likelihood, best path, one Baum-Welch step."""

import numpy as np
import pytest
import torch
from circuit_graphs import circuit_of, close
from torch import Tensor

from lora_ext import ops
from lora_ext.circuits import Categorical, Circuit, Gaussian, Leaf, RegionGraph, pad_sequences

hmm = pytest.importorskip(
    "hmmlearn.hmm", reason="hmmlearn is not installed: pip install --no-build-isolation '.[peers]'"
)
STEPS, RANK, VALUES, ROWS = 7, 3, 4, 40


def chain(leaf: Leaf, seed: int) -> Circuit:
    """Return a float64 chain in which all steps share the transition matrix and the emissions."""
    circuit = circuit_of(RegionGraph.hmm(STEPS, RANK, leaf, homogeneous=True), seed)
    if isinstance(leaf, Gaussian):
        with torch.no_grad():
            circuit.leaves[0]["mean"] *= 3
            circuit.leaves[0]["log_std"] += 0.3 * torch.randn(RANK, dtype=torch.float64)
    return circuit


def tables(circuit: Circuit) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return prior (C), transitions (C, C) and emissions, in the order of the states."""
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    prior = circuit.region_weights(names["z0"])[0].softmax(0).detach()
    steps = circuit.region_weights(names["z1"]).softmax(1).detach()
    return prior, steps, {k: t.detach() for k, t in circuit.region_leaves(names["x0"]).items()}


def peer_of(circuit: Circuit):
    """Return hmmlearn's model with the parameters of ``circuit``. Its ``fit`` does one iteration,
    without priors."""
    prior, steps, leaves = tables(circuit)
    options = {"n_components": RANK, "n_iter": 1, "init_params": ""}
    if "logits" in leaves:
        peer = hmm.CategoricalHMM(**options)
        peer.n_features = VALUES
        peer.emissionprob_ = leaves["logits"].softmax(1).numpy()
    else:
        peer = hmm.GaussianHMM(**options, min_covar=0, covars_prior=0, covars_weight=1)
        peer.n_features = 1
        peer.means_ = leaves["mean"][:, None].numpy().copy()
        peer.covars_ = (2 * leaves["log_std"]).exp()[:, None].numpy()
    peer.startprob_, peer.transmat_ = prior.numpy(), steps.numpy()
    return peer


def columns(x: Tensor) -> tuple[np.ndarray, list[int]]:
    """Return the rows in hmmlearn's format, concatenated, with their lengths."""
    return x.reshape(-1, 1).numpy(), [STEPS] * len(x)


def rows_of(circuit: Circuit, seed: int) -> Tensor:
    return circuit.sample(ROWS, generator=torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize("leaf", [Categorical(VALUES), Gaussian()], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("seed", range(3))
def test_log_likelihoods_and_best_paths_equal_hmmlearn(leaf: Leaf, seed: int) -> None:
    circuit = chain(leaf, seed)
    x = rows_of(chain(leaf, seed + 10), seed)
    peer = peer_of(circuit)
    log_prob, best = circuit.log_prob(x).detach(), circuit.map(x).value.detach()
    for i in range(0, ROWS, 5):
        sequence, _ = columns(x[i : i + 1])
        assert peer.score(sequence) == pytest.approx(log_prob[i].item(), rel=1e-10)
        assert peer.decode(sequence)[0] == pytest.approx(best[i].item(), rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_circuit_scan_of_each_row_equals_the_log_likelihood_of_hmmlearn(seed: int) -> None:
    circuit = chain(Categorical(VALUES), seed)
    x = rows_of(circuit, seed)
    prior, steps, leaves = tables(circuit)
    shapes = {"leaf": leaves["logits"][None, None], "prior": prior.log()[None]}
    leaf = shapes["leaf"].expand(ROWS, STEPS, RANK, VALUES)
    trans = steps.log()[None, None].expand(ROWS, STEPS - 1, RANK, RANK)
    scan = ops.circuit_scan("hmm", leaf, shapes["prior"].expand(ROWS, RANK), trans, x)
    assert peer_of(circuit).score(*columns(x)) == pytest.approx(scan.prefix[:, -1].sum().item())


@pytest.mark.parametrize("ragged", [False, True], ids=["one length", "many lengths"])
@pytest.mark.parametrize("leaf", [Categorical(VALUES), Gaussian()], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("seed", range(3))
def test_em_step_equals_a_baum_welch_step_of_hmmlearn(leaf: Leaf, seed: int, ragged: bool) -> None:
    circuit = chain(leaf, seed)
    x = rows_of(chain(leaf, seed + 20), seed)
    lengths = [1 + i % STEPS if ragged else STEPS for i in range(ROWS)]
    sequences = [row[:length] for row, length in zip(x, lengths, strict=True)]
    padded, flat = pad_sequences(sequences, STEPS), torch.cat(sequences)[:, None].numpy()
    peer = peer_of(circuit)
    for _ in range(3):
        assert peer.score(flat, lengths) == pytest.approx(circuit.log_prob(padded).sum().item())
        peer.fit(flat, lengths)
        circuit.em_step(padded, pseudocount=0)
        prior, steps, leaves = tables(circuit)
        close(prior, torch.from_numpy(peer.startprob_))
        close(steps, torch.from_numpy(peer.transmat_))
        if "logits" in leaves:
            close(leaves["logits"].softmax(1), torch.from_numpy(peer.emissionprob_))
            continue
        close(leaves["mean"], torch.from_numpy(peer.means_[:, 0]), 1e-9)
        if not ragged:
            variance = torch.from_numpy(peer.covars_[:, 0, 0])
            close((2 * leaves["log_std"]).exp(), variance, 1e-9)
