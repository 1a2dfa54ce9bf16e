"""Per-request constraints in continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require

from ._sampling import Sampling

if TYPE_CHECKING:
    from lora_ext.control import Constraint, Guide, Matched, MatchedPlan, Plan, Row

# lora_ext.control is imported only if a request has a constraint, because it imports
# lora_ext.circuits, which would take half of the import time of the package.

_WHERE = "add_request"
# Names of the positional arguments of the manager's add_request that follow request_id.
_NAMES = ("max_new_tokens", "streaming", "record_timestamps", "eos_token_id")
_MAX_FORKS = 64  # maximum number of forks of a request whose constraint states are cached
NO_LOGPROBS = "None with return_logprobs, which is only for tokens that the manager itself chooses"


class RequestConstraint:
    """States of a constraint in one request and in the requests that are forked from it.

    Args:
        plan: the constraint together with the maximum number of new tokens.
        temperature: temperature of the request's sampling; 1 without sampling.
    """

    def __init__(self, plan: Plan | MatchedPlan, temperature: float):
        from lora_ext.control import Row

        self.temperature = temperature
        self._first = Row.first(plan)
        self._known: dict[str, tuple[list[int], Row | None]] = {}

    def row(self, state: Any) -> Row | None:
        """Return the state of the constraint after the tokens that a request has generated.

        ``state`` is the request's state in transformers.
        """
        from lora_ext import control

        tokens = state.generated_tokens
        if state._true_initial_tokens:  # preempted: generated tokens became part of the prompt
            tokens = state.initial_tokens[state._true_initial_tokens :] + tokens
        before, row = self._known.get(state.request_id, ([], self._first))
        if tokens[: len(before)] != before:
            before, row = [], self._first
        for token in tokens[len(before) :]:
            (row,) = control.advance([row], [token])
        if len(self._known) >= _MAX_FORKS:
            self._known.clear()
        self._known[state.request_id] = list(tokens), row
        return row


def limits_of(manager: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, set[int]]:
    """Return the maximum number of new tokens of a request, and the ids of its end tokens."""
    plain = dict(zip(_NAMES, args, strict=False)) | kwargs
    config = manager.generation_config
    budget, eos = (
        getattr(config, name) if plain.get(name) is None else plain[name]
        for name in ("max_new_tokens", "eos_token_id")
    )
    return budget, {eos} if isinstance(eos, int) else set(eos or ())


def request_constraint(
    manager: Any,
    constraint: Constraint | Matched | None,
    guide: Guide | None,
    sampling: Sampling | None,
    arguments: Sequence[Any],
    settings: dict[str, Any],
) -> RequestConstraint | None:
    """Check the constraint of a request before the request is queued, and return its states.

    Returns None if the request has no constraint.

    Args:
        manager: continuous-batching manager of transformers.
        constraint, guide, sampling: arguments of the request.
        arguments, settings: other positional and keyword arguments of ``add_request``.

    Raises:
        ValueError: If ``max_new_tokens`` is too small for the constraint, or if the end tokens or
            the vocabulary of the constraint are not those of the model.
        NotImplementedError: If the manager has the option ``return_logprobs``.
    """
    if constraint is None:
        require(guide is None, _WHERE, "guide", "None without a constraint", guide)
        return None
    from lora_ext import control

    budget, ends = limits_of(manager, arguments, settings)
    require(budget is not None, _WHERE, "max_new_tokens", "a number with a constraint", budget)
    alone = not manager.continuous_batching_config.return_logprobs
    require(alone, _WHERE, "constraint", NO_LOGPROBS, constraint, NotImplementedError)
    (plan,) = control.plans_of(_WHERE, constraint, guide, budget)
    assert plan is not None
    expected = f"the end tokens of the constraint, {list(constraint.eos)}"
    require(ends == set(constraint.eos), _WHERE, "eos_token_id", expected, sorted(ends))
    size = manager.model.get_output_embeddings().weight.shape[0]
    expected = f"a vocabulary of {size} tokens, as in the model"
    found = constraint.vocab_size
    require(found == size, _WHERE, "constraint", expected, found)
    temperature = 1.0 if sampling is None else sampling.temperature
    return RequestConstraint(plan, temperature or 1.0)


class Standing(NamedTuple):
    """Row of a step's scores that belongs to a request with a constraint.

    Attributes:
        place: index of the row in the scores.
        row: state of the constraint.
        temperature: divisor of the scores before a token is drawn.
        whole: True if the token is drawn from the whole distribution, without top-k or top-p.
        generator: generator of the request, or None for torch's default generator.
    """

    place: int
    row: Row | None
    temperature: float
    whole: bool = False
    generator: torch.Generator | None = None


def drawn(scores: Tensor, rows: Sequence[Standing]) -> tuple[dict[int, int], list[Standing]]:
    """Draw one token for each row that has a guide and samples from the whole distribution.

    A guide is a hidden Markov model of the tokens that follow. The function uses rejection
    sampling, which needs no matrix product over the vocabulary. On a GPU that product is cheaper,
    so the function draws no tokens there. It also skips rows with a NaN score or without a finite
    score for an allowed token, since an error would end the steps of all other requests.

    Args:
        scores: scores ``(1, N, V)`` of N rows and V tokens, which are not modified.
        rows: the rows with constraints.

    Returns:
        The drawn tokens by place, and the rows for which no token was drawn.
    """
    apart = [e for e in rows if e.whole and e.row and not e.row.lost and e.row.plan.guide]
    if scores.device.type != "cpu" or not apart:
        return {}, list(rows)
    from lora_ext import control

    warm = torch.tensor([[each.temperature] for each in apart], dtype=torch.float64)
    own = scores[0, [e.place for e in apart]]
    tempered, envelope = control.proposal_scores([e.row for e in apart], own, warm)
    fine = tempered.amax(-1) == 0
    apart = [e for e, good in zip(apart, fine.tolist(), strict=True) if good]
    if not apart:
        return {}, list(rows)

    def numbers(which: list[int], count: int) -> Tensor:
        return torch.stack([torch.rand(count, 2, generator=apart[i].generator) for i in which])

    places = [each.place for each in apart]
    kept = [e.row for e in apart]
    tokens, _ = control.draw_from(kept, tempered[fine], envelope[fine], numbers)
    left = [each for each in rows if each.place not in places]
    return dict(zip(places, tokens, strict=True)), left


def constrained(scores: Tensor, rows: Sequence[Standing]) -> Tensor:
    """Return ``scores (1, N, V)`` with the constraints applied; ``scores`` is not modified.

    Rows without a constraint keep their scores. If a row has no allowed token, its end tokens are
    allowed, since an error would end the steps of all other requests.
    """
    if not rows:
        return scores
    from lora_ext import control

    ratios = control.log_ratios([each.row for each in rows])
    # Clamp to the range of float32. Otherwise 0 times infinity would allow a forbidden token.
    warm = torch.tensor([each.temperature for each in rows]).clamp(1e-30, 1e30)
    blocks = [
        control.Block(inside, ratio * warm[inside, None].to(ratio)) for inside, ratio in ratios
    ]
    places = [each.place for each in rows]
    changed = scores.clone()
    own = control.moved(blocks, scores[0, places])
    for i in (own.amax(-1) == -torch.inf).nonzero()[:, 0].tolist():
        row = rows[i].row
        own[i, list(row.plan.constraint.eos) if row else []] = 0
    changed[0, places] = own
    return changed
