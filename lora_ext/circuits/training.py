"""Training over batches of data, by expectation maximisation or by gradients; padded sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from ._leaves import COUNT
from ._parameters import require_tensor
from .circuit import Circuit

# Batches as a DataLoader gives them: rows, or rows and the root of each.
Batches = Tensor | Iterable[Any]
# Wraps the batches of an epoch to show how far it is; ``tqdm.tqdm``, say.
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Epoch(NamedTuple):
    """What an epoch of training came to, in nats a row.

    Attributes:
        log_prob: mean over its rows, each before the step of its batch.
        held_out: mean over the held-out rows after the epoch; None without any.
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
    """Train by expectation maximisation, one step per batch (:meth:`Circuit.em_step`); return one
    entry per epoch.

    Args:
        circuit: is trained in place.
        batches: a tensor, which is one batch; or batches that can be read again every epoch, such
            as a ``DataLoader``: tensors ``(B, n)``, or pairs of one and of the roots ``(B,)`` that
            the rows belong to, such as their classes.
        epochs: how often to read them.
        step: of every step, or a function of the number of steps made. Our choice for None: 1 with
            one batch an epoch, else ``(1 + k) ** -0.6`` with k the epochs made, not below 0.05.
        pseudocount, keep_zero: as :meth:`Circuit.em_step` takes them.
        held_out: rows, or a pair of rows and roots, to be scored after every epoch.
        progress: wraps the batches of an epoch, ``tqdm.tqdm`` say; a bar that has ``set_postfix``
            is told the figures.
        epochs_before: of a training that goes on, the epochs of the calls before, from which the
            default step follows. Without them its first step is 1, and what was learned is lost to
            one batch. A ``step`` of yours counts from 0 in every call.

    Raises:
        ValueError: for batches that are none or can be read once only, ``epochs_before`` below 0,
            and all that :meth:`Circuit.em_step` refuses.

    Source: steps that shrink, Cappe and Moulines 2009 (online EM).
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
    """Train by gradient ascent of the mean log-likelihood, one step per batch; return one entry per
    epoch.

    Args:
        circuit, batches, epochs, held_out, progress: as :func:`train_em` takes them.
        optimizer: None: Adam on all parameters with ``lr``.
        lr: of that Adam.

    Raises:
        ValueError: as :func:`train_em`, and all that :meth:`Circuit.log_prob` refuses.
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
    """Run the loop over epochs and batches with any kind of step."""
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
    """Return rows and roots of a batch, on the circuit's device."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    good = len(parts) in (1, 2) and all(isinstance(t, Tensor) for t in parts)
    found = ", ".join(type(t).__name__ for t in parts)
    require(good, name, "batches", "rows, or rows and roots, as tensors", f"({found})")
    x, root, *_ = (*(t.to(circuit.weights.device) for t in parts), None)  # rows alone: no roots
    assert x is not None
    return x, root


def _log_prob(name: str, circuit: Circuit, x: Tensor, root: Tensor | None) -> Tensor:
    """Return ``log_prob``, which must be of one root a row."""
    log_prob = circuit.log_prob(x, root=root)
    expected = "rows and their roots in a circuit of several root units"
    require(log_prob.dim() == 1, name, "batches", expected, "rows alone")
    return log_prob


def pad_sequences(sequences: Sequence[Tensor], num_variables: int | None = None) -> Tensor:
    """Return sequences of different lengths as rows of data, with what is missing at their ends.

    Chains, whose transitions sum to one, give a padded row the probability that a shorter chain
    gives its sequence; EM learns from it what it would learn there.

    Args:
        sequences: one dimension each, of one dtype.
        num_variables: columns of the result; default is the longest.

    Returns:
        ``(B, num_variables)``, int64 with -1 behind the ends, or NaN behind those of numbers.

    Raises:
        ValueError: for no sequences, other dimensions, several dtypes, or one that is too long.
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
