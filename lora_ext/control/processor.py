"""Logits processor that applies constraints in transformers' ``generate``.

Letters: ``B`` rows, ``T`` tokens so far, ``V`` vocabulary, ``H`` states of the guide.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require

from . import _law
from ._guide import Guide, require_distributions
from ._law import Row, advance
from ._messages import MatchedPlan, Plan
from .language import DEFAULT, Constraint, Limits, Matched

#: One constraint or None for all rows, or a sequence of them with one per prompt.
Constraints = Constraint | Matched | None | Sequence[Constraint | Matched | None]
_WHERE = "ConstraintProcessor"


class ConstraintProcessor:
    """Logits processor that makes every row satisfy its constraint within a budget of tokens.

    Pass it as ``model.generate(..., logits_processor=[ConstraintProcessor(...)])`` for sampling,
    greedy or beam search. ``softmax(scores / temperature)`` of the returned scores is the
    distribution of the next token. Without a guide, this is the mask law: the model's distribution,
    restricted to tokens after which the text can still end within the budget. With a guide, it is
    the guided law: the mask law multiplied by the guide's probability that the text will satisfy
    the constraint (docs/control.md). No text is truncated: every text ends within the budget,
    unless its constraint is from :meth:`Constraint.from_matcher`. Scores of rows without a
    constraint stay bitwise unchanged.

    You can pass one processor to several consecutive calls of ``generate``. If the prompts of a
    call are rows that an earlier call returned, call :meth:`reset` first: otherwise the processor
    cannot distinguish the first step of the new call from one more step of the earlier call. If
    later processors such as top_p change the scores, the constraint still holds, but the
    distribution changes. Penalties, ``min_new_tokens`` of ``generate`` and stop rules may forbid
    all tokens that a constraint allows.

    Args:
        constraints: Constraint of all rows, or a list with one constraint (or None) per prompt.
        guide: Guide that looks ahead; None for the mask law.
        max_new_tokens: Budget of every row: the largest number of new tokens, including the end
            token, as in ``generate``.
        min_new_tokens: Smallest number of tokens before the end token.
        temperature: Temperature that is passed to ``generate``, which divides the returned scores
            by it.
        prior: Guide's distribution ``(B, H)`` of its state at the first new token of every row,
            such as ``guide.filter(prompts)``; None for the guide's ``initial``.
        limits: Limits of the guide's tables.

    Attributes:
        log_weight: ``log (p / p_drawn)`` of each row after ``generate``, ``(B,)``. ``p`` is the
            row's probability under the unconstrained scores at the temperature, and ``p_drawn``
            under the constrained scores. Weighted with ``p / p_drawn``, sampled rows represent the
            distribution ``p``, restricted to the constraint, up to a constant factor.

    Raises:
        ValueError: If a constraint cannot be satisfied within the budget, the guide has another
            vocabulary, or a number is out of range; the message names the argument.
    """

    def __init__(
        self,
        constraints: Constraints,
        guide: Guide | None = None,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        prior: Tensor | None = None,
        limits: Limits = DEFAULT,
    ):
        right = isinstance(temperature, (int, float)) and 0 < temperature < float("inf")
        require(right, _WHERE, "temperature", "a number above 0", repr(temperature))
        self._plans = plans_of(_WHERE, constraints, guide, max_new_tokens, min_new_tokens, limits)
        self._budget = max_new_tokens
        known = [plan.constraint.eos for plan in self._plans if plan is not None]
        self._ends = sorted({token for eos in known for token in eos})
        self._guide = guide
        self._prior: Tensor | None = None
        if prior is not None:
            shape, where = tuple(prior.shape), (_WHERE, "prior")
            require(guide is not None, *where, "None, as there is no guide", shape)
            assert guide is not None
            fits = len(shape) == 2 and shape[1] == guide.num_states
            require(fits, *where, f"shape (B, {guide.num_states})", shape)
            require_distributions(*where, prior)
            self._prior = prior.to(guide.initial)
        self.temperature = float(temperature)
        self._prompt: Tensor | None = None
        self._warned = False
        self._before = torch.empty(0)
        self._rows: list[Row | None] = []
        self._weight = self._next = torch.empty(0)
        self._blocks: list[_law.Block] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the constrained scores of the next token of every row.

        Args:
            input_ids: Prompts and the new tokens so far, ``(B, T)``.
            scores: Scores (logits) of the next token, ``(B, V)``.

        Raises:
            ValueError: If the rows do not match the constraints or the last call, the vocabularies
                differ, or every allowed token of a row has the score ``-inf``.
        """
        batch = len(input_ids)
        if self._goes_on(input_ids):
            self._warn_if_over(input_ids)
            self._follow(self._parents(input_ids), input_ids[:, -1].tolist())
        else:
            self._begin(input_ids, scores)
        self._before = input_ids.clone()
        changed, self._blocks = _law.apply(self._rows, scores, self.temperature)
        self._next = torch.zeros(batch, dtype=torch.float64)
        for places, _ in self._blocks:
            before, after = self._total(scores[places]), self._total(changed[places])
            gone = (after == -torch.inf) & (before > -torch.inf)
            none = [i for i, g in zip(places, gone.tolist(), strict=True) if g]
            expected = "a finite score for at least one token that the constraint allows"
            why = "another processor, such as a penalty or min_new_tokens, forbids all of them"
            require(not none, _WHERE, "scores", expected, f"none in rows {none[:4]}: {why}")
            self._next[places] = (after - before).double().cpu().nan_to_num(0.0)
        ended = [i for i in range(batch) if self._at_end(i)]
        self._next[ended] = 0.0
        return changed

    def _total(self, scores: Tensor) -> Tensor:
        """Return ``log sum exp(scores / temperature)`` of each row."""
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return (wide if self.temperature == 1 else wide / self.temperature).logsumexp(-1)

    @property
    def log_weight(self) -> Tensor:
        """Log-weights ``(B,)`` float64, see the class.

        A row that has not ended is weighted as if it ended with the next token.
        """
        return self._weight + self._next

    # --- state between runs -----------------------------------------------------------------------
    def reset(self) -> None:
        """Start new texts at the next call, with the whole budget and new log-weights."""
        self._prompt = None

    def _goes_on(self, input_ids: Tensor) -> bool:
        """Return whether ``input_ids`` are the rows of the last call with one more token."""
        if self._prompt is None or len(input_ids) != len(self._rows):
            return False
        start, length = self._prompt.shape[1], input_ids.shape[1]
        if length <= start or not torch.equal(input_ids[:, :start], self._prompt):
            return False
        before = self._before.shape[1]
        expected = "the rows of the last call with one more token each, or other prompts"
        found = f"{length} tokens per row after {before} (call reset() to begin a new run)"
        require(length > before, _WHERE, "input_ids", expected, found)
        return length == before + 1

    def _warn_if_over(self, input_ids: Tensor) -> None:
        """Warn once if ``generate`` would have stopped before this call.

        The call is then the first of a new ``generate``, unless ``generate`` has another budget or
        other end tokens. There is no warning if the rows are reordered, which only happens between
        the steps of one beam search.
        """
        if self._warned or not torch.equal(input_ids[:, :-1], self._before):
            return
        assert self._prompt is not None
        new = input_ids[:, self._prompt.shape[1] :]
        ends = torch.tensor(self._ends, dtype=new.dtype, device=new.device)
        if new.shape[1] < self._budget and not bool(torch.isin(new, ends).any(1).all()):
            return
        self._warned = True
        warnings.warn(
            f"{_WHERE}: input_ids: expected no call after max_new_tokens={self._budget} tokens or "
            f"an end token in every row, found one after {new.shape[1]} new tokens. This call "
            "continues the texts, and rows that have ended only get end tokens. For a new call of "
            "generate with the returned rows, call reset() first; otherwise pass the same "
            "max_new_tokens and eos_token_id to generate",
            stacklevel=3,
        )

    def _begin(self, input_ids: Tensor, scores: Tensor) -> None:
        batch = len(input_ids)
        count = len(self._plans)
        expected = f"a number of constraints that divides the {batch} rows, as one per prompt does"
        require(batch % count == 0, _WHERE, "constraints", expected, count)
        plans = [self._plans[i * count // batch] for i in range(batch)]
        size = scores.shape[1]
        for found in {plan.constraint.vocab_size for plan in plans if plan is not None}:
            expected = f"a vocab_size of {size}, as in the scores"
            require(found == size, _WHERE, "constraints", expected, found)
        priors: list[Any] = [None] * batch
        if self._prior is not None:
            rows = len(self._prior)
            expected = f"a number of rows that divides the {batch} rows of the batch"
            require(batch % rows == 0, _WHERE, "prior", expected, rows)
            priors = [self._prior[i * rows // batch] for i in range(batch)]
        self._rows = [
            None if plan is None else Row.first(plan, prior)
            for plan, prior in zip(plans, priors, strict=True)
        ]
        self._prompt = input_ids.clone()
        self._warned = False
        self._weight = torch.zeros(batch, dtype=torch.float64)

    def _parents(self, input_ids: Tensor) -> list[int]:
        """Return for each row the index of the row of the last call that this row continues.

        The indices differ from 0, 1, ... in beam search, which reorders rows.
        """
        batch = len(input_ids)
        if torch.equal(input_ids[:, :-1], self._before):
            return list(range(batch))
        count = len(self._plans)
        known: dict[tuple[int, ...], int] = {}
        for i, tokens in enumerate(self._before.tolist()):
            known.setdefault((i * count // batch, *tokens), i)
        parents: list[int] = []
        expected = "a row of the last call with one more token"
        for i, tokens in enumerate(input_ids[:, :-1].tolist()):
            place = (i * count // batch, *tokens)
            found = f"a row with {tokens[-3:]} before the new token"
            require(place in known, _WHERE, f"input_ids: row {i}", expected, found)
            parents.append(known[place])
        return parents

    def _follow(self, parents: list[int], tokens: list[int]) -> None:
        chosen = torch.zeros(len(parents), dtype=torch.float64)
        children: dict[int, list[int]] = {}
        for i, parent in enumerate(parents):
            children.setdefault(parent, []).append(i)
        for places, ratio in self._blocks:
            pairs = [
                (j, i)
                for j, parent in enumerate(places)
                if not self._at_end(parent)
                for i in children.get(parent, ())
            ]
            if pairs:
                at, into = (list(side) for side in zip(*pairs, strict=True))
                chosen[into] = ratio[at, [tokens[i] for i in into]].double().cpu()
        self._weight = self._weight[parents] + self._next[parents] - chosen
        self._rows = advance([self._rows[p] for p in parents], tokens)

    def _at_end(self, i: int) -> bool:
        row = self._rows[i]
        return row is not None and row.ended


def plans_of(
    where: str,
    constraints: Constraints,
    guide: Guide | None,
    budget: int,
    least: int = 0,
    limits: Limits = DEFAULT,
) -> list[Plan | MatchedPlan | None]:
    """Return the plan of each constraint: a list with one item, or with one per prompt.

    Args:
        where: Beginning of error messages.
        constraints: See :class:`ConstraintProcessor`.
        guide: See :class:`ConstraintProcessor`.
        budget: Largest number of tokens, including the end token.
        least: Smallest number of tokens before the end token; 0 for a matcher.
        limits: See :class:`ConstraintProcessor`.

    Raises:
        ValueError: If an item is not a constraint, or if :class:`Plan` raises it.
        NotImplementedError: If a matcher is combined with a guide or a smallest number of tokens.
    """
    listed = list(constraints) if isinstance(constraints, Sequence) else [constraints]
    good = bool(listed) and all(c is None or isinstance(c, Constraint | Matched) for c in listed)
    expected = "a Constraint or None, or a list of them"
    require(good, where, "constraints", expected, repr(constraints)[:80])
    plans: dict[Constraint | Matched, Plan | MatchedPlan] = {}
    for c in listed:
        if isinstance(c, Matched):
            for name, value, none in (("guide", guide, None), ("min_new_tokens", least, 0)):
                expected = f"{none} for a constraint of from_matcher, which cannot look ahead"
                require(value == none, where, name, expected, value, NotImplementedError)
            plans[c] = MatchedPlan(c, budget)
        elif c is not None and c not in plans:
            plans[c] = Plan(c, budget, least, guide, limits)
    return [None if c is None else plans[c] for c in listed]
