"""Training over batches raises the likelihood; padded sequences score like shorter chains."""

from __future__ import annotations

import math

import pytest
import torch
from circuit_graphs import GRAPHS, circuit_of, close
from torch.utils.data import DataLoader, TensorDataset

from lora_ext.circuits import (
    Bernoulli,
    Categorical,
    Gaussian,
    RegionGraph,
    pad_sequences,
    train_em,
    train_gradient,
)


def data(rows: int = 60, seed: int = 0) -> torch.Tensor:
    """Return rows of four ternary variables; the first two are equal."""
    x = torch.randint(3, (rows, 4), generator=torch.Generator().manual_seed(seed))
    x[:, 1] = x[:, 0]
    return x


def loader(*tensors: torch.Tensor, batch_size: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*tensors), batch_size, shuffle=True, generator=generator)


# --- over a loader --------------------------------------------------------------------------------
def test_tensor_is_one_batch_with_full_steps():
    one, other = circuit_of(GRAPHS["hmm"]()), circuit_of(GRAPHS["hmm"]())
    history = train_em(one, data(), epochs=3)
    for epoch in history:
        assert epoch.log_prob == other.em_step(data()).item()
    assert torch.equal(one.weights, other.weights)
    train_em(one, loader(data(), batch_size=60), epochs=1)  # a loader with one batch
    other.em_step(data())
    close(one.weights, other.weights)


def test_resumed_training_equals_uninterrupted_training_bit_for_bit():
    batches = data().split(30)
    unbroken, broken = circuit_of(GRAPHS["hmm"]()), circuit_of(GRAPHS["hmm"]())
    expected = train_em(unbroken, batches, epochs=4)
    found = train_em(broken, batches, epochs=1)
    found += train_em(broken, batches, epochs=3, epochs_before=1)
    assert found == expected
    assert torch.equal(broken.weights, unbroken.weights)
    with pytest.raises(ValueError, match=r"train_em: epochs_before: expected .* found -1"):
        train_em(broken, batches, epochs=1, epochs_before=-1)


@pytest.mark.parametrize("train", [train_em, train_gradient])
def test_training_over_a_loader_raises_the_likelihood_of_held_out_data(train):
    circuit = circuit_of(GRAPHS["hmm"](), seed=1).float()
    held_out = data(40, seed=1)
    before = circuit.log_prob(held_out).mean().item()
    history = train(circuit, loader(data()), epochs=8, held_out=held_out)
    assert len(history) == 8
    assert history[-1].held_out == pytest.approx(circuit.log_prob(held_out).mean().item())
    assert history[-1].held_out > before + 0.3
    assert history[-1].log_prob > history[0].log_prob


@pytest.mark.parametrize("train", [train_em, train_gradient])
def test_second_tensor_of_a_batch_is_the_root_of_each_row(train):
    graph = RegionGraph.rat_spn(4, 2, 2, 2, 2, Bernoulli(), num_roots=2)
    circuit = circuit_of(graph, seed=2)
    g = torch.Generator().manual_seed(0)
    label = torch.arange(80) % 2
    x = torch.bernoulli(torch.where(label[:, None] == 1, 0.8, 0.2).expand(80, 4), generator=g)
    train(circuit, loader(x.long(), label), epochs=15)
    assert (circuit.log_prob(x.long()).argmax(1) == label).double().mean() > 0.85


def test_step_size_may_follow_a_schedule_and_a_progress_bar_receives_the_likelihood():
    asked: list[int] = []
    seen: list[dict[str, str]] = []

    class Bar(list):
        def set_postfix(self, **figures: str) -> None:
            seen.append(figures)

    def step(number: int) -> float:
        asked.append(number)
        return 0.5

    circuit = circuit_of(GRAPHS["cp"]())
    batches = [data(8), data(8, seed=1)]
    train_em(circuit, batches, epochs=2, step=step, progress=Bar)
    assert asked == [0, 1, 2, 3]
    assert len(seen) == 4 and set(seen[0]) == {"epoch", "log_prob"}


def test_given_optimizer_is_used():
    circuit = circuit_of(GRAPHS["cp"]())
    before = circuit.weights.detach().clone()
    train_gradient(circuit, data(), 1, optimizer=torch.optim.SGD([circuit.leaves[0]["logits"]], 1))
    assert torch.equal(circuit.weights, before)


def test_invalid_batches_raise():
    circuit = circuit_of(GRAPHS["cp"]())
    for train, batches, message in (
        (train_em, iter([data()]), "train_em: batches: expected batches that can be read again"),
        (train_gradient, [], "train_gradient: batches: expected at least one batch, found none"),
        (train_em, [(data(), data(), data())], "train_em: batches: expected a tensor of rows,"),
    ):
        with pytest.raises(ValueError, match=message):
            train(circuit, batches, epochs=2)
    with pytest.raises(ValueError, match="train_em: epochs: expected a whole number, at least 1"):
        train_em(circuit, data(), epochs=0)


# --- sequences of different lengths ---------------------------------------------------------------
def test_padded_sequences_have_the_scores_of_shorter_chains():
    circuit = circuit_of(RegionGraph.hmm(5, 3, Categorical(4), homogeneous=True))
    sequences = [torch.tensor(s) for s in ([1, 2, 3], [0], [3, 3, 1, 2, 0])]
    x = pad_sequences(sequences, 5)
    assert x.tolist() == [[1, 2, 3, -1, -1], [0, -1, -1, -1, -1], [3, 3, 1, 2, 0]]
    for row, sequence in enumerate(sequences):
        short = circuit_of(RegionGraph.hmm(len(sequence), 3, Categorical(4), homogeneous=True))
        with torch.no_grad():
            # In both circuits, the weights start with the last variable: first the transitions,
            # then the prior.
            short.leaves[0]["logits"].copy_(circuit.leaves[0]["logits"])
            short.weights.copy_(circuit.weights[-len(short.weights) :])
        close(circuit.log_prob(x[row : row + 1]), short.log_prob(sequence[None]))


def test_floating_sequences_are_padded_with_nan():
    x = pad_sequences([torch.tensor([0.5]), torch.tensor([1.0, 2.0])])
    assert x.shape == (2, 2) and math.isnan(x[0, 1]) and x[1].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"pad_sequences: sequences\[1\]: expected at most 1 "):
        pad_sequences([torch.tensor([1]), torch.tensor([1, 2])], 1)
    with pytest.raises(ValueError, match=r"pad_sequences: sequences\[0\]: expected one dimension"):
        pad_sequences([torch.zeros(2, 2)])
    with pytest.raises(ValueError, match=r"pad_sequences: sequences\[1\]: expected torch.int64 as"):
        pad_sequences([torch.tensor([1]), torch.tensor([0.5])])
    assert pad_sequences([torch.tensor([1], dtype=torch.uint8)], 2).tolist() == [[1, -1]]
    for wrong in ([[1, 2], [0]], [torch.tensor(1)]):
        with pytest.raises(ValueError, match=r"pad_sequences: sequences\[0\]: expected"):
            pad_sequences(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pad_sequences: sequences: expected at least one"):
        pad_sequences([])


def test_parameters_without_data_learn_nothing():
    """Check that EM changes the weights of a transition with data, but not the weights of a
    transition into the padding, which has no data."""
    circuit = circuit_of(RegionGraph.hmm(4, 2, Categorical(3)))
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    before = circuit.region_weights(names["z3"]).detach().clone()
    x = torch.tensor([[0, 1, 2, -1], [1, 1, 0, -1]])
    circuit.em_step(x)
    assert torch.equal(circuit.region_weights(names["z3"]), before)
    assert not torch.equal(circuit.region_weights(names["z2"]), before)


def test_em_over_gaps_never_decreases_the_likelihood():
    for leaf in (Categorical(3), Gaussian()):
        circuit = circuit_of(RegionGraph.hmm(5, 3, leaf, homogeneous=True), seed=3)
        x = circuit_of(circuit.graph, seed=4).sample(
            50, generator=torch.Generator().manual_seed(0)
        )[0]
        gap = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        nothing = math.nan if x.is_floating_point() else -1
        x = x.masked_fill(gap, nothing)
        x[:20, 3:] = nothing
        values = [circuit.em_step(x, pseudocount=0) for _ in range(15)]
        assert torch.stack(values).diff().min() > -1e-9
