"""Data, losses and results of training calls, and checks of these data. The names are those of
Tinker's API. The loss of a datum is a sum over its targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import choice, instance, number, require

Inputs = Mapping[str, Tensor]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TARGETS = "target_tokens"


@dataclass(frozen=True, eq=False)
class Datum:
    """Training sequence with the inputs of its loss.

    Args:
        tokens: ``N`` tokens ``(N,)``, the input of the model.
        inputs: inputs of the loss, with the names of Tinker's API:

            * ``target_tokens``: ``(N,)`` target of each token, or for "cross_entropy" also
              ``(N, K)``, ``K`` targets of each token.
            * ``weights``: weight of each target, in the shape of the targets; default 1.
            * ``logprobs``: ``(N,)`` log-probability with which each target was sampled, for the
              losses of reinforcement learning.
            * ``advantages``: ``(N,)`` advantage of each target, for the losses of reinforcement
              learning.
    """

    tokens: Sequence[int] | Tensor
    inputs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Result:
    """Result of a training call.

    Args:
        logprobs: log-probabilities of the targets of each datum, float32, in the shape of the
            targets, on the CPU.
        metrics: metrics by name; ``loss:sum`` is the loss, summed over the data.
    """

    logprobs: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class Checked(NamedTuple):
    """Datum with checked shapes, ranges and dtypes."""

    tokens: Tensor  # (N,) int64
    targets: Tensor  # (N,) or (N, K) int64
    inputs: dict[str, Tensor]  # float32, of the shape of the targets

    @property
    def length(self) -> int:
        """Number of tokens of the model's input."""
        return self.tokens.shape[0]


def checked_tokens(where: str, argument: str, tokens: Any, vocabulary: int) -> Tensor:
    """Return token ids as ``(N,)`` int64; raise ValueError for other values."""
    given = _tensor(where, argument, tokens)
    require(given.dim() == 1, where, argument, "shape (N,)", list(given.shape))
    require(given.numel() > 0, where, argument, "at least one token", "none")
    return _ids(where, argument, given, vocabulary)


def checked_data(
    where: str, data: Sequence[Datum], loss: str, vocabulary: int, max_tokens: int
) -> list[Checked]:
    """Return the checked data of a call; raise ValueError for data that the loss cannot use."""
    instance(where, "data", data, (list, tuple))
    require(len(data) > 0, where, "data", "at least one Datum", "none")
    found = []
    for i, datum in enumerate(data):
        instance(where, f"data[{i}]", datum, Datum)
        found.append(_checked(where, f"data[{i}]", datum, LOSSES[loss], vocabulary, max_tokens))
    return found


def _checked(
    where: str, name: str, datum: Datum, loss: Loss, vocabulary: int, max_tokens: int
) -> Checked:
    tokens = checked_tokens(where, f"{name}.tokens", datum.tokens, vocabulary)
    instance(where, f"{name}.inputs", datum.inputs, Mapping)
    length, inputs = tokens.shape[0], dict(datum.inputs)
    expected = f"at most max_tokens = {max_tokens} tokens"
    require(length <= max_tokens, where, f"{name}.tokens", expected, length)
    known = (_TARGETS, "weights", *loss.needs)
    for key in inputs:
        require(key in known, where, f"{name}.inputs", f"one of {known}", repr(key))
    for key in (_TARGETS, *loss.needs):
        require(key in inputs, where, f"{name}.inputs", f"key {key!r}", f"only {sorted(inputs)}")
    argument = f"{name}.inputs[{_TARGETS!r}]"
    targets = _tensor(where, argument, inputs.pop(_TARGETS))
    many = not loss.needs and targets.dim() == 2 and targets.shape[1] > 0
    expected = f"shape ({length},)" + ("" if loss.needs else f" or ({length}, K)")
    fits = (targets.dim() == 1 or many) and targets.shape[0] == length
    require(fits, where, argument, expected, list(targets.shape))
    targets = _ids(where, argument, targets, vocabulary)
    floats = {}
    for key, value in inputs.items():
        argument = f"{name}.inputs[{key!r}]"
        given = _tensor(where, argument, value)
        fits = given.shape == targets.shape
        require(fits, where, argument, f"shape {list(targets.shape)}", list(given.shape))
        # The tensor is copied because the caller may change it later. Its values are not checked:
        # if one is not finite, the loss is not finite either, and the call fails.
        floats[key] = torch.empty(targets.shape).copy_(given)
    return Checked(tokens, targets, floats)


def _tensor(where: str, argument: str, value: Any) -> Tensor:
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{where}: {argument}: expected numbers, found none: {error}") from None
    require(not found.is_complex(), where, argument, "real numbers", found.dtype)
    return found


def _ids(where: str, argument: str, ids: Tensor, vocabulary: int) -> Tensor:
    require(ids.dtype in _INTEGERS, where, argument, "integers", ids.dtype)
    low, high = (int(v) for v in ids.aminmax())
    fits = low >= 0 and high < vocabulary
    require(fits, where, argument, f"tokens in [0, {vocabulary})", f"{low} to {high}")
    return torch.empty(ids.shape, dtype=torch.int64).copy_(ids)


class Loss(NamedTuple):
    """Loss function, with the names of its inputs and the default values of its options.

    Args:
        function: ``function(logprobs, inputs, **options)``, which returns a term for each target.
        needs: names of the required inputs, in addition to the targets.
        options: default value of each option by name.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    options: Mapping[str, float] = {}

    def sum(self, logprobs: Tensor, inputs: Inputs, options: Mapping[str, float]) -> Tensor:
        """Return the loss of one datum, a scalar tensor: the weighted sum of its terms."""
        terms = self.function(logprobs, inputs, **options)
        weights = inputs.get("weights")
        return terms.sum() if weights is None else (weights * terms).sum()


def _cross_entropy(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return -logprobs


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """Return each target's probability, divided by the probability with which it was sampled."""
    return (logprobs - inputs["logprobs"]).exp()


def _importance_sampling(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return -inputs["advantages"] * _ratio(logprobs, inputs)


def _ppo(
    logprobs: Tensor, inputs: Inputs, clip_low_threshold: float, clip_high_threshold: float
) -> Tensor:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
    return -(ratio * advantages).minimum(clipped * advantages)


def _cispo(
    logprobs: Tensor, inputs: Inputs, clip_low_threshold: float, clip_high_threshold: float
) -> Tensor:
    ratio = _ratio(logprobs, inputs).detach().clamp(clip_low_threshold, clip_high_threshold)
    return -ratio * inputs["advantages"] * logprobs


_RL = ("logprobs", "advantages")
_CLIPS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

#: Losses by name. Each formula is the term of one target, and a loss is the sum over all targets.
#: ``lp`` is the log-probability of the target, ``w`` its weight, ``A`` its advantage, ``r`` the
#: ratio ``exp(lp - logprobs)``, and ``clip`` limits the ratio to the two thresholds.
#:
#: * "cross_entropy": ``-w lp``
#: * "importance_sampling": ``-w A r``
#: * "ppo": ``-w min(r A, clip(r) A)`` (Schulman et al. 2017)
#: * "cispo": ``-w A lp clip(r)``, without the gradient of ``clip(r)`` (CISPO, MiniMax-M1, 2025)
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy),
    "importance_sampling": Loss(_importance_sampling, _RL),
    "ppo": Loss(_ppo, _RL, _CLIPS),
    "cispo": Loss(_cispo, _RL, _CLIPS),
}


def checked_options(where: str, loss: Any, config: Mapping[str, Any] | None) -> dict[str, float]:
    """Return all options of a loss: those in ``config``, and the default values of all other
    options.

    Raises:
        ValueError: If the loss, an option or its value is not valid; the message names the
            argument.
    """
    known = LOSSES[choice(where, "loss", loss, tuple(LOSSES))].options
    options = dict(known)
    if config is not None:
        instance(where, "config", config, Mapping)
    for key, value in (config or {}).items():
        require(key in known, where, "config", f"one of {tuple(known)} for {loss}", repr(key))
        options[key] = float(number(where, f"config[{key!r}]", value, 0))
    return options
