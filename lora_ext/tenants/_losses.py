"""Losses, with the names of Tinker's API. A loss is summed over the targets of a datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._checks import choice, instance, number, require

Inputs = Mapping[str, Tensor]


class Loss(NamedTuple):
    """Loss: a function of log-probabilities, the inputs that it needs, and its options.

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
    """Return the probability of each target, divided by its probability when it was sampled."""
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
    """Return all options of a loss: those in ``config``, and defaults for the others.

    Raises:
        ValueError: If the loss, an option or its value is not valid; the message names it.
    """
    known = LOSSES[choice(where, "loss", loss, tuple(LOSSES))].options
    options = dict(known)
    if config is not None:
        instance(where, "config", config, Mapping)
    for key, value in (config or {}).items():
        require(key in known, where, "config", f"one of {tuple(known)} for {loss}", repr(key))
        options[key] = float(number(where, f"config[{key!r}]", value, 0))
    return options
