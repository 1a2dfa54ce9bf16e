"""Training over batches, by expectation maximisation or gradients, and padding of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from ._leaves import COUNT
from ._parameters import require_tensor
from .circuit import Circuit

# Batches as a DataLoader yields them: rows, or pairs of rows and the root unit of each row.
Batches = Tensor | Iterable[Any]
# Function that wraps the batches of an epoch to show progress, such as ``tqdm.tqdm``.
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Epoch(NamedTuple):
    """Mean log-likelihoods of an epoch of training, in nats per row.

    Attributes:
        log_prob: Mean over the rows of the epoch, each computed before the step on its batch.
        held_out: Mean over the held-out rows after the epoch; None if there are no such rows.
    """

    log_prob: float
    held_out: float | None


def train_em(
    circuit: Circuit,
    batches: Batches,
    epochs: int,
    step: float | Callable[[int], float] | None = None,
    pseudocount: float = 0.1,
    keep_zero: bool = False,
    held_out: Any = None,
    progress: Progress | None = None,
    epochs_before: int = 0,
) -> list[Epoch]:
    """Train a circuit by expectation maximisation, one :meth:`Circuit.em_step` per batch.

    Args:
        circuit: Circuit to train in place.
        batches: A tensor, which is a single batch, or an iterable of batches that can be iterated
            again in each epoch, such as a ``DataLoader``. A batch is data ``(B, n)``, or a pair of
            data and the root units ``(B,)`` of the rows, such as their classes.
        epochs: Number of epochs.
        step: Step size, or a function of the number of steps already made in this call. Our choice
            for None: 1 if an epoch has one batch, otherwise ``(1 + k) ** -0.6`` after k epochs, but
            at least 0.05.
        pseudocount: See :meth:`Circuit.em_step`.
        keep_zero: See :meth:`Circuit.em_step`.
        held_out: Rows, or a pair of rows and root units, to score after each epoch.
        progress: Function that wraps the batches of an epoch, such as ``tqdm.tqdm``. If its result
            has a method ``set_postfix``, training calls it with the epoch and the log-likelihood.
        epochs_before: Number of epochs of earlier calls, if this call continues a training with the
            default step. With 0 the first step has size 1, so that a single batch replaces
            everything that was learned before.

    Returns:
        Mean log-likelihoods of each epoch.

    Raises:
        ValueError: If ``batches`` is empty or can be iterated only once, if ``epochs_before`` is
            negative, or if :meth:`Circuit.em_step` raises it.

    Source: decreasing steps, Cappe and Moulines 2009 (online EM).
    """
    integer("train_em", "epochs_before", epochs_before, 0)
    number = 0

    def make(x: Tensor, root: Tensor | None, epoch: int, single: bool) -> float:
        nonlocal number
        if step is None:
            size = 1.0 if single else max(0.05, (1 + epochs_before + epoch) ** -0.6)
        else:
            size = step(number) if callable(step) else step
        number += 1
        return float(circuit.em_step(x, size, pseudocount, keep_zero, root))

    return _train("train_em", circuit, batches, epochs, make, held_out, progress)


def train_gradient(
    circuit: Circuit,
    batches: Batches,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 0.05,
    held_out: Any = None,
    progress: Progress | None = None,
) -> list[Epoch]:
    """Train a circuit by gradient ascent on the mean log-likelihood, one step per batch.

    Args:
        circuit: See :func:`train_em`.
        batches: See :func:`train_em`.
        epochs: See :func:`train_em`.
        optimizer: Optimizer of the parameters; None for Adam on all parameters.
        lr: Learning rate of the default optimizer.
        held_out: See :func:`train_em`.
        progress: See :func:`train_em`.

    Returns:
        Mean log-likelihoods of each epoch.

    Raises:
        ValueError: See :func:`train_em` and :meth:`Circuit.log_prob`.
    """
    chosen = optimizer or torch.optim.Adam(circuit.parameters(), lr)

    def make(x: Tensor, root: Tensor | None, epoch: int, single: bool) -> float:
        log_prob = _log_prob("train_gradient", circuit, x, root).mean()
        chosen.zero_grad()
        (-log_prob).backward()
        chosen.step()
        return float(log_prob.detach())

    return _train("train_gradient", circuit, batches, epochs, make, held_out, progress)


def _train(
    name: str,
    circuit: Circuit,
    batches: Batches,
    epochs: int,
    make: Callable[[Tensor, Tensor | None, int, bool], float],
    held_out: Any,
    progress: Progress | None,
) -> list[Epoch]:
    """Run the loop over epochs and batches.

    ``make(x, root, epoch, single)`` makes a training step on a batch and returns the mean
    log-likelihood before the step; ``single`` is True if an epoch has one batch.
    """
    integer(name, "epochs", epochs, 1, expected=COUNT)
    listed = [batches] if isinstance(batches, Tensor) else batches
    again, found = not isinstance(listed, Iterator), f"a {type(listed).__name__}"
    require(again, name, "batches", "batches that can be read again every epoch", found)
    history: list[Epoch] = []
    single = isinstance(listed, Sized) and len(listed) == 1
    for epoch in range(epochs):
        total, rows = 0.0, 0
        bar: Any = listed if progress is None else progress(listed)
        for batch in bar:
            x, root = _split(name, circuit, batch)
            total, rows = total + len(x) * make(x, root, epoch, single), rows + len(x)
            if hasattr(bar, "set_postfix"):
                bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", log_prob=f"{total / rows:.3f}")
        require(rows > 0, name, "batches", "at least one batch", "none")
        score = None
        if held_out is not None:
            with torch.no_grad():
                score = float(_log_prob(name, circuit, *_split(name, circuit, held_out)).mean())
        history.append(Epoch(total / rows, score))
    return history


def _split(name: str, circuit: Circuit, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return the rows and the root units of a batch on the device of the circuit."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    good = len(parts) in (1, 2) and all(isinstance(t, Tensor) for t in parts)
    found = ", ".join(type(t).__name__ for t in parts)
    require(good, name, "batches", "a tensor of rows, or a pair (rows, roots)", f"({found})")
    # If the batch has no roots, `root` is None.
    x, root, *_ = (*(t.to(circuit.weights.device) for t in parts), None)
    assert x is not None
    return x, root


def _log_prob(name: str, circuit: Circuit, x: Tensor, root: Tensor | None) -> Tensor:
    """Return the log-probability of each row.

    Raise ValueError if the circuit has several root units and ``root`` is None.
    """
    log_prob = circuit.log_prob(x, root=root)
    expected = "pairs (rows, roots), because the circuit has several root units"
    found = f"rows without roots for {log_prob.shape[-1]} root units"
    require(log_prob.dim() == 1, name, "batches", expected, found)
    return log_prob


def pad_sequences(sequences: Sequence[Tensor], num_variables: int | None = None) -> Tensor:
    """Return sequences of different lengths as rows of data, padded with missing values.

    In a chain with normalised transitions, a padded row has the same probability as its sequence in
    a chain of the sequence's length. EM also learns the same parameters from the padded rows as
    from the sequences.

    Args:
        sequences: One-dimensional tensors of one dtype.
        num_variables: Number of columns of the result; None for the length of the longest sequence.

    Returns:
        ``(B, num_variables)``, int64 padded with -1, or floating padded with NaN.

    Raises:
        ValueError: If there are no sequences, a sequence is not one-dimensional, their dtypes
            differ, or a sequence is longer than ``num_variables``.
    """
    where = "pad_sequences"
    require(len(sequences) > 0, where, "sequences", "at least one", "none")
    for i, s in enumerate(sequences):
        name = f"sequences[{i}]"
        require_tensor(where, name, s)
        dtype = sequences[0].dtype
        require(s.dim() == 1, where, name, "one dimension", f"shape {tuple(s.shape)}")
        require(s.dtype == dtype, where, name, f"{dtype} as in sequences[0]", s.dtype)
        if num_variables is not None:
            require(len(s) <= num_variables, where, name, f"at most {num_variables} values", len(s))
    size = max(map(len, sequences)) if num_variables is None else num_variables
    first = sequences[0] if sequences[0].is_floating_point() else sequences[0].long()
    x = first.new_full((len(sequences), size), torch.nan if first.is_floating_point() else -1)
    for row, s in zip(x, sequences, strict=True):
        row[: len(s)] = s
    return x
