"""The distribution of each row's next token under its constraint, with or without a guide.

Without a guide, the next token of a row has the distribution ``p(x) 1[END can be reached]`` (the
mask law), and with a guide ``p(x) r(x)`` (the guided law), both normalised. ``p`` is the model's
distribution and

    r(x) = sum_z A(z) beta(z, x) C_{k-1}(delta(s, x), z) / sum_z A(z) beta(z, x)

is the guide's probability that the text will satisfy the constraint, given the tokens so far and
``x``. ``A`` is the guide's distribution of its state and ``beta`` its emission. ``s`` is the
current state of the constraint's automaton and ``delta`` its transition function. ``k`` is the
number of tokens left, and ``C`` is computed in ``_messages.py``.

All functions compute with ``log r``. In the mask law, ``log r`` is 0 for allowed tokens; in both
laws, it is ``-inf`` for forbidden tokens. ``_rejection.py`` draws tokens from these laws.

Letters: ``V`` vocabulary, ``H`` states of the guide, ``S`` states of the automaton, ``n`` rows of a
block, ``B`` rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ._guide import Guide
from ._messages import MatchedPlan, NextTokens, Plan

#: A next state can be allowed by the constraint but have probability 0 under the guide. Such a
#: state is treated as less likely than the least likely other next state, by this number of nats.
IMPOSSIBLE_GAP_NATS = 50.0


@dataclass(frozen=True)
class Row:
    """State of one row between two tokens.

    Rows are immutable, so you can store a row and continue from it later.

    Attributes:
        plan: Constraint with its budget and guide.
        state: State of the constraint's automaton; -1 after a forbidden token.
        left: Number ``k`` of tokens left in the budget.
        law: Guide's distribution ``A (H,)`` of its state at the next token; None without a guide.
    """

    plan: Plan | MatchedPlan
    state: int
    left: int
    law: Tensor | None = None

    @classmethod
    def first(cls, plan: Plan | MatchedPlan, prior: Tensor | None = None) -> Row:
        """Return a row before its first token.

        Args:
            plan: Plan of the row.
            prior: Guide's distribution of its first state, ``(H,)``; None for its ``initial``.
        """
        if plan.guide is None:
            return cls(plan, 0, plan.budget)
        return cls(plan, 0, plan.budget, plan.guide.initial if prior is None else prior)

    @property
    def ended(self) -> bool:
        """True after the end token."""
        return self.state == self.plan.constraint.end

    @property
    def lost(self) -> bool:
        """True after a forbidden token."""
        return self.state < 0

    @property
    def only(self) -> int | None:
        """Next token if exactly one is allowed. None otherwise, and if the row has ended."""
        if self.ended or self.lost:
            return None
        return self.plan.only(self.state, self.left)

    @property
    def guided_plan(self) -> Plan | None:
        """Plan of the row if its next token has the guided law, otherwise None."""
        if isinstance(self.plan, MatchedPlan) or self.plan.guide is None:
            return None
        return None if self.ended or self.lost else self.plan

    def mask(self) -> Tensor | None:
        """Return ``log r (V,)`` of the mask law; None if every token is allowed."""
        return self.plan.mask(self.state, 0 if self.ended else self.left)


def advance(rows: Sequence[Row | None], tokens: Sequence[int]) -> list[Row | None]:
    """Advance every row by its next token; one matrix product advances all rows of a guide."""
    after = list(rows)
    guided: dict[Guide, dict[int, Row]] = {}
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row is not None and not (row.lost or row.ended):
            state = row.plan.after(row.state, row.left, token)
            after[i] = moved_row = replace(row, state=state, left=row.left - 1)
            if (plan := moved_row.guided_plan) is not None and plan.guide is not None:
                guided.setdefault(plan.guide, {})[i] = moved_row
    for guide, moved_rows in guided.items():
        laws = stacked_laws(moved_rows.values())
        chosen = torch.tensor([tokens[i] for i in moved_rows], device=laws.device)
        for (i, row), law in zip(moved_rows.items(), guide.step(laws, chosen), strict=True):
            after[i] = replace(row, law=law)
    return after


def stacked_laws(rows: Iterable[Row]) -> Tensor:
    """Return the ``law`` of every row that has a guide, stacked as ``(n, H)``."""
    return torch.stack([row.law for row in rows if row.law is not None])


class Block(NamedTuple):
    """Rows with the same plan, state and number of tokens left.

    Attributes:
        places: Indices of the rows in the batch.
        ratio: Logarithms ``log r (n, V)`` of the factors of all next tokens; ``-inf`` for forbidden
            tokens.
    """

    places: list[int]
    ratio: Tensor


def log_ratios(rows: Sequence[Row | None]) -> list[Block]:
    """Return ``log r``, the logarithms of the factors of all next tokens, in blocks of rows with
    equal plans and states.

    The blocks omit rows without a constraint, rows after a forbidden token, and rows without a
    guide in which every token is allowed. If the guide of a row is in float32 on the CPU, the bits
    of the row's ratios do not depend on the other rows.
    """
    alike: dict[tuple[Plan | MatchedPlan, int, int], dict[int, Row]] = {}
    for i, row in enumerate(rows):
        if row is not None and not row.lost:
            key = row.plan, row.state, 0 if row.ended else row.left
            alike.setdefault(key, {})[i] = row
    blocks: list[Block] = []
    guided: dict[Guide, list[_GuidedRows]] = {}
    for members in alike.values():
        places, first = list(members), next(iter(members.values()))
        plan = first.guided_plan
        if plan is not None and plan.guide is not None:
            group = _GuidedRows(places, plan, first, stacked_laws(members.values()))
            guided.setdefault(plan.guide, []).append(group)
        elif (mask := first.mask()) is not None:
            blocks.append(Block(places, mask.expand(len(places), -1)))
    for guide, groups in guided.items():
        blocks += _guided_blocks(guide, groups)
    return blocks


class _GuidedRows:
    """Rows with a guide and the same plan, state and number of tokens left.

    A next state is *wide* if many tokens lead to it, see :class:`Layout`.

    Attributes:
        places: Indices of the rows in the batch.
        laws: Guide's distributions of the rows, ``(n, H)``.
        layout: Allowed tokens, grouped by their next state.
        weighted: Products of ``laws`` and the message of each of the w wide next states,
            ``(w n, H)``.
        weighted_scales: Logarithms of the scales of these messages, ``(w n,)``.
    """

    def __init__(self, places: list[int], plan: Plan, row: Row, laws: Tensor):
        step = plan.step(row.state, row.left)
        self.places, self.laws, self.layout = places, laws, step.layout
        self._plan = plan
        self._messages, scales = plan.messages(row.left - 1)
        self._scales = finite_scales(scales, step)
        wide = self.layout.wide
        products = [laws * self._messages[s] for s in wide]
        self.weighted = torch.cat(products) if products else laws[:0]
        self.weighted_scales = self._scales[wide].repeat_interleave(len(laws))

    def log_ratio(self, of_wide: Tensor | None) -> Tensor:
        """Return ``log r (n, V)``.

        ``of_wide (w n, V)`` contains, for each wide next state, ``log r`` as if every token led to
        this state. The argument is None if there are no wide next states.
        """
        layout, device, rows = self.layout, self.laws.device, len(self.laws)
        if of_wide is None or not layout.wide:
            shape = (rows, self._plan.constraint.vocab_size)
            out = torch.full(shape, -torch.inf, dtype=self.laws.dtype, device=device)
        else:
            out, *others = of_wide.split(rows)
            for mask, ratio in zip(layout.others, others, strict=True):
                out = torch.where(mask.to(device), ratio, out)
            if layout.dead.dtype == torch.bool:
                out.masked_fill_(layout.dead.to(device), -torch.inf)
            elif len(layout.dead):
                out.index_fill_(1, layout.dead.to(device), -torch.inf)
        if len(layout.narrow):
            assert self._plan.guide is not None
            tokens, successors = layout.narrow.to(device), layout.behind.to(device)
            messages, emitted = self._messages[successors], self._plan.guide.by_token[tokens]
            for i, law in enumerate(self.laws):
                ratio = log_quotient(law, emitted, messages)  # (t,)
                out[i, tokens] = ratio + self._scales[successors]
        return out.index_fill_(1, layout.ends.to(device), 0.0)


def _guided_blocks(guide: Guide, groups: list[_GuidedRows]) -> list[Block]:
    """Return ``log r`` of all rows of one guide, with a single product over the vocabulary."""
    wide = [group for group in groups if group.layout.wide]
    if not wide:
        return [Block(group.places, group.log_ratio(None)) for group in groups]
    laws, weighted = torch.cat([g.laws for g in wide]), torch.cat([g.weighted for g in wide])
    products = guide.over_vocabulary(torch.cat([laws, weighted]))
    totals, joints = products.split([len(laws), len(weighted)])
    if len(weighted) > len(laws):  # repeat the totals of a group for each wide next state
        parts = totals.split([len(g.laws) for g in wide])
        pairs = zip(parts, wide, strict=True)
        totals = torch.cat([part.repeat(len(g.layout.wide), 1) for part, g in pairs])
    smallest = torch.finfo(joints.dtype).tiny
    if float(totals.min()) >= smallest:
        joints.div_(totals)
    else:  # a token of probability 0 under the guide does not change the distribution of the state
        without_token = weighted.sum(-1, keepdim=True)
        joints = torch.where(totals > 0, joints / totals.clamp(min=smallest), without_token)
    scales = torch.cat([g.weighted_scales for g in wide])
    ratios = joints.clamp_(smallest, 1.0).log_().add_(scales[:, None])
    each = ratios.split([len(g.weighted) for g in groups])
    return [Block(g.places, g.log_ratio(ratio)) for g, ratio in zip(groups, each, strict=True)]


def log_quotient(law: Tensor, emitted: Tensor, messages: Tensor) -> Tensor:
    """Return ``log (sum_z A beta C / sum_z A beta)`` of tokens, without the scales of messages.

    The quotient is at least the smallest normal number of the dtype, so that allowed tokens stay
    possible. A token of probability 0 under the guide does not change the distribution of the
    state.

    Args:
        law: Guide's distribution ``A (..., H)`` of its state.
        emitted: Emission ``beta (..., H)`` of each token.
        messages: Message ``C (..., H)`` of each token's next state.
    """
    joint = law * emitted
    total = joint.sum(-1)
    smallest = torch.finfo(joint.dtype).tiny
    quotient = (joint * messages).sum(-1) / total.clamp(min=smallest)
    if not bool((total > 0).all()):
        quotient = torch.where(total > 0, quotient, (law * messages).sum(-1))
    return quotient.clamp(smallest, 1.0).log()


def finite_scales(scales: Tensor, step: NextTokens) -> Tensor:
    """Return log-scales ``(S + 1,)`` of messages, finite for all allowed next states of a step.

    A next state of probability 0 under the guide is still allowed by the constraint. Its log-scale
    is set ``IMPOSSIBLE_GAP_NATS`` below the smallest log-scale of the other next states.
    """
    known = scales[step.states.to(scales.device)]
    if bool((known > -torch.inf).all()):
        return scales
    known = known[known > -torch.inf]
    lowest = float(known.min()) - IMPOSSIBLE_GAP_NATS if len(known) else 0.0
    return torch.where(scales > -torch.inf, scales, lowest)


def apply(
    rows: Sequence[Row | None], scores: Tensor, temperature: float = 1.0
) -> tuple[Tensor, list[Block]]:
    """Return ``scores (B, V) + temperature * log r``, and the blocks of ``log r``.

    ``softmax(result / temperature)`` is the mask law or the guided law of each row. An item of
    ``rows`` is None if the row has no constraint. Rows without a block are bitwise equal to
    ``scores``, which is not changed.
    """
    blocks = [Block(places, r.to(scores.device)) for places, r in log_ratios(rows)]
    return moved(blocks, scores, temperature), blocks


def moved(blocks: Sequence[Block], scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``scores (B, V)`` with ``temperature * log r`` added to the rows of the blocks.

    ``scores`` is not changed; without blocks, the result is ``scores`` itself.
    """
    scores = scores.clone() if blocks else scores
    for places, ratio in blocks:
        ratio = ratio.to(scores)
        if temperature != 1:
            # A fused product and addition would make rounding depend on the address of the row.
            ratio = temperature * ratio
        first, last = places[0], places[-1]
        if places == list(range(first, last + 1)):
            scores[first : last + 1].add_(ratio)
        else:
            scores[places] += ratio
    return scores
