"""Plans, which compute whether a text can end within its budget, and the guide's probability of a
text that satisfies its constraint.

A :class:`Plan` is a constraint with a budget of ``n`` tokens, including the end token, and a
minimum number ``lo`` of tokens before the end token. All rows with a plan share its tables, the
messages:

    C_k(END, z) = 1 for all k;  C_0(s, z) = 0 for all other states s
    C_k(s, z) = sum_z' T(z, z') sum_s' w(s->s', z') C_{k-1}(s', z')
    w(s->s', z) = sum of beta(z, x) over the tokens x of the edge

``C_k(s, z)`` is the guide's probability that the text satisfies the constraint, if ``k`` tokens are
left, ``s`` is the state of the constraint's automaton and ``z`` the guide's state at the previous
token. ``T`` is the guide's transition, ``beta`` its emission, and ``w`` the weight of an edge of
the automaton. Edges into END are closed until ``lo`` tokens have been written.

Letters: ``S`` states and ``E`` edges of the automaton, ``H`` states of the guide, ``V`` vocabulary.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import integer, require

from ._guide import Guide
from .language import DEFAULT, Constraint, Limits, Matched

_WHERE = "constraint"
_KEPT_SEGMENTS = 3
_KEPT_STEPS = 1024
# If more than V / _PART tokens lead to a next state, one product over the whole vocabulary computes
# their ratios. Otherwise, only the emissions of these tokens are gathered.
_PART = 8
_FEW = 64  # up to V / 64 forbidden tokens are stored as indices, more as a mask
_shared: weakref.WeakKeyDictionary[Guide, weakref.WeakValueDictionary[tuple[object, ...], Messages]]
_shared = weakref.WeakKeyDictionary()
_shared_lock = threading.Lock()


@dataclass(eq=False)
class Plan:
    """Constraint with its budget and guide.

    Args:
        constraint: Constraint of the text.
        budget: Largest number ``n`` of tokens, including the end token. In error messages, the
            budget is called max_new_tokens and ``least`` min_new_tokens, as in ``generate``.
        least: Smallest number ``lo`` of tokens before the end token.
        guide: Guide that looks ahead; None for the mask law.
        limits: Limits of the guide's tables.

    Raises:
        ValueError: If no text of the constraint has a length between ``least`` and the budget, or
            the guide has the wrong vocabulary.
    """

    constraint: Constraint
    budget: int
    least: int = 0
    guide: Guide | None = None
    limits: Limits = DEFAULT

    def __post_init__(self) -> None:
        constraint, budget, least = self.constraint, self.budget, self.least
        for name, value, low in (("max_new_tokens", budget, 1), ("min_new_tokens", least, 0)):
            integer(_WHERE, name, value, low, expected=f"a whole number, at least {low}")
        expected = f"less than max_new_tokens ({budget}), since the last token ends the text"
        require(least < budget, _WHERE, "min_new_tokens", expected, least)
        if self.guide is not None:
            size, found = constraint.vocab_size, self.guide.vocab_size
            require(found == size, _WHERE, "guide", f"the constraint's vocab_size, {size}", found)
        self._steps: dict[tuple[int, int], NextTokens] = {}
        fewest, self._longest = int(constraint.distance[0]), int(constraint.distance.max())
        expected = f"at least {fewest}, the length of the shortest allowed text and its end token"
        require(fewest <= budget, _WHERE, "max_new_tokens", expected, budget)
        fits = self.alive(0, budget)
        expected = f"an allowed text of {least} to {budget - 1} tokens"
        require(fits, _WHERE, "min_new_tokens", expected, "none")

    # --- dead ends --------------------------------------------------------------------------------
    @cached_property
    def _alive(self) -> Tensor | None:
        """Table ``(n + 1, S + 1)``: whether END can be reached with k tokens left in state s.

        None if ``least`` is 0; the constraint's distances to the end are then sufficient.
        """
        if self.least == 0:
            return None
        source, target, _ = self.edges
        alive = torch.zeros(self.budget + 1, self.constraint.num_states + 1, dtype=torch.bool)
        alive[:, -1] = True
        for k in range(1, self.budget + 1):
            open_edges = alive[k - 1, target]
            if self.budget - k < self.least:
                open_edges = open_edges & (target != self.constraint.end)
            alive[k, source[open_edges]] = True
        return alive

    def alive(self, state: int, k: int) -> bool:
        """Return whether a text in a state can still end within ``k`` tokens."""
        if state < 0:
            return False
        if self._alive is None:
            return 0 <= int(self.constraint.distance[state]) <= k
        return bool(self._alive[k, state])

    def step(self, state: int, k: int) -> NextTokens:
        """Return the allowed next tokens in a state, if ``k`` tokens are left in the budget."""
        if self.least == 0:  # the result is the same for all k above the longest distance
            k = min(k, self._longest + 1)
        known = self._steps.get((state, k))
        if known is None:
            if len(self._steps) >= _KEPT_STEPS:
                self._steps.clear()
            known = self._steps[state, k] = NextTokens(self, state, k)
        return known

    def after(self, state: int, k: int, token: int) -> int:
        """Return the state after a token, or -1 if the token is forbidden."""
        constraint = self.constraint
        kind = constraint.classes[token] if 0 <= token < constraint.vocab_size else -1
        if kind < 0 or not self.step(state, k).allows[kind]:
            return -1
        return constraint.rows[state][kind]

    def mask(self, state: int, k: int) -> Tensor | None:
        """Return 0 for allowed and ``-inf`` for forbidden tokens, ``(V,)``.

        Return None if all tokens are allowed.
        """
        live = self.step(state, k).live
        if live.all():
            return None
        return torch.where(live, 0.0, -torch.inf)[self.constraint.class_index]

    def only(self, state: int, k: int) -> int | None:
        """Return the next token if exactly one is allowed, otherwise None."""
        return self.step(state, k).only

    # --- messages ---------------------------------------------------------------------------------
    @cached_property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Edges of the automaton: sources ``(E,)``, targets ``(E,)``, and the edges by class.

        The last tensor, ``(S, classes)``, contains the index of the edge that a class of tokens
        follows in a state, or -1 if the class is forbidden.
        """
        table = self.constraint.table.long()
        states = len(table) + 1
        joint = torch.arange(len(table))[:, None] * states + table
        pairs, inverse = torch.where(table >= 0, joint, -1).unique(return_inverse=True)
        if pairs[0] == -1:
            pairs, inverse = pairs[1:], inverse - 1
        return pairs // states, pairs % states, inverse

    def edge_weights(self) -> Tensor:
        """Return ``w (E, H)``: the guide's emission, summed over the tokens of each edge."""
        assert self.guide is not None
        constraint, by_token = self.constraint, self.guide.by_token
        device = by_token.device
        classes = by_token.new_zeros(constraint.table.shape[1], by_token.shape[1])
        classes.index_add_(0, constraint.class_index.to(device), by_token)
        source, _, edge = self.edges
        state, kind = (edge >= 0).nonzero(as_tuple=True)
        weights = by_token.new_zeros(len(source), by_token.shape[1])
        return weights.index_add_(0, edge[state, kind].to(device), classes[kind.to(device)])

    @cached_property
    def messages(self) -> Messages:
        """Messages of the guide, which plans with the same guide and constraint share.

        If ``least`` is not 0, the plans must also have the same ``least`` and budget.
        """
        assert self.guide is not None
        states, guide = self.constraint.num_states + 1, self.guide
        nbytes = states * (guide.num_states + 1) * guide.initial.element_size() * (self.budget + 1)
        few = nbytes <= self.limits.max_table_bytes
        stride = 1 if few else math.isqrt(self.budget - 1) + 1
        window = (self.least, self.budget) if self.least else ()
        key = (self.constraint.key, stride, *window)
        with _shared_lock:
            tables = _shared.setdefault(guide, weakref.WeakValueDictionary())
            found = tables.get(key)
            if found is None:
                found = tables[key] = Messages(self, stride)
            return found


class MatchedPlan:
    """Plan of a constraint from a matcher. Its masks do not depend on the budget.

    Args:
        constraint: Constraint of the text.
        budget: Largest number of tokens. A text that has not ended by then is truncated.
    """

    guide: Guide | None = None

    def __init__(self, constraint: Matched, budget: int):
        self.constraint, self.budget = constraint, budget

    def after(self, state: int, k: int, token: int) -> int:
        """Return the state after a token, see :meth:`Plan.after`."""
        return self.constraint.next_state(state, token)

    def mask(self, state: int, k: int) -> Tensor | None:
        """Return the mask of the next token, see :meth:`Plan.mask`."""
        live = self.constraint.mask(state)
        return None if live.all() else torch.where(live, 0.0, -torch.inf)

    def only(self, state: int, k: int) -> int | None:
        """Return the next token if exactly one is allowed, see :meth:`Plan.only`."""
        live = self.constraint.mask(state).nonzero()
        return int(live) if len(live) == 1 else None


class NextTokens:
    """Allowed tokens in a state, with their next states.

    Attributes:
        live: Whether each class of tokens is allowed, ``(classes,)`` bool.
        after: State after a token of each class, ``(classes,)``; -1 if the class is not allowed.
        states: Distinct next states of the allowed classes, except the state after the end.
    """

    def __init__(self, plan: Plan, state: int, k: int):
        constraint = plan.constraint
        self._constraint = constraint
        if state == constraint.end:  # After the end, only end tokens are allowed.
            self.live = torch.arange(constraint.table.shape[1]) == 0
            self.after = torch.where(self.live, constraint.end, -1)
        else:
            after = constraint.table[state].long()
            if plan._alive is None:
                self.live = (after >= 0) & (constraint.distance[after] <= k - 1)
            else:
                self.live = (after >= 0) & plan._alive[max(k - 1, 0), after]
            if k < 1:
                self.live = torch.zeros_like(self.live)
            if plan.budget - k < plan.least:
                self.live[0] = False
            self.after = torch.where(self.live, after, -1)
        behind = self.after[(self.after >= 0) & (self.after != constraint.end)]
        self.states = behind.unique()
        self.allows: list[bool] = self.live.tolist()

    @cached_property
    def layout(self) -> Layout:
        """Tokens, grouped by the method that computes their ratio ``r`` (see ``_law.py``)."""
        constraint = self._constraint
        vocab, end = constraint.vocab_size, constraint.end
        after = self.after[constraint.class_index]  # (V,)
        inside = after[(after >= 0) & (after != end)]
        count = torch.bincount(inside, minlength=1)
        wide: list[int] = []
        if len(inside) > vocab // _PART:  # too many tokens to gather: at least one state is wide
            wide = (count > vocab // _PART).nonzero()[:, 0].tolist() or [int(count.argmax())]
        narrow = (after >= 0) & (after != end)
        for s in wide:
            narrow &= after != s
        tokens, dead = narrow.nonzero()[:, 0], after < 0
        few = int(dead.sum()) <= vocab // _FEW
        return Layout(
            wide,
            [after == s for s in wide[1:]],
            tokens,
            after[tokens],
            dead.nonzero()[:, 0] if few else dead,
            (after == end).nonzero()[:, 0],
        )

    @cached_property
    def only(self) -> int | None:
        """Next token if exactly one is allowed, otherwise None."""
        order, first = self._constraint.tokens_by_class
        if int(first.diff()[self.live].sum()) != 1:
            return None
        kind = int((self.live & (first.diff() > 0)).nonzero()[0])
        return int(order[first[kind]])


class Layout(NamedTuple):
    """Tokens of a step, grouped by their next state.

    Attributes:
        wide: Next states of many tokens. ``log r`` of these tokens is computed by one product with
            the whole vocabulary per state.
        others: Masks ``(V,)`` bool of the tokens of each wide state except the first.
        narrow: Allowed tokens that neither lead to a wide state nor end the text, ``(t,)``.
        behind: Next state of each narrow token, ``(t,)``.
        dead: Indices of the forbidden tokens, or a mask ``(V,)`` bool if there are many.
        ends: Tokens that end the text.
    """

    wide: list[int]
    others: list[Tensor]
    narrow: Tensor
    behind: Tensor
    dead: Tensor
    ends: Tensor


class Messages:
    """Tables of the messages ``C_k``. Every ``stride``-th table is stored; all other tables are
    recomputed when needed.

    A row ``C_k(s)`` is divided by its largest entry, whose logarithm is stored as the row's scale.
    """

    def __init__(self, plan: Plan, stride: int):
        assert plan.guide is not None
        self.guide = plan.guide
        self._budget, self._least, self._stride = plan.budget, plan.least, stride
        device, states = plan.guide.initial.device, plan.constraint.num_states + 1
        self._source, self._target = (t.to(device) for t in plan.edges[:2])
        self._weights = plan.edge_weights()
        self._lock = threading.Lock()
        first = plan.guide.initial.new_zeros(states, plan.guide.num_states)
        first[-1] = 1
        scale = plan.guide.initial.new_full((states,), -torch.inf)
        scale[-1] = 0
        self._marks: list[tuple[Tensor, Tensor]] = [(first, scale)]  # every stride-th C_k
        self._segments: OrderedDict[int, list[tuple[Tensor, Tensor]]] = OrderedDict()

    def __call__(self, k: int) -> tuple[Tensor, Tensor]:
        """Return ``C_k (S + 1, H)`` with scaled rows, and their scales ``(S + 1,)`` as logarithms.

        The largest entry of a row is 1, or 0 if END cannot be reached.
        """
        with self._lock:
            mark, rest = divmod(k, self._stride)
            while len(self._marks) <= mark:
                table, k0 = self._marks[-1], (len(self._marks) - 1) * self._stride
                for i in range(self._stride):
                    table = self._before(*table, k0 + i + 1)
                self._marks.append(table)
            if rest == 0:
                return self._marks[mark]
            segment = self._segments.setdefault(mark, [self._marks[mark]])
            self._segments.move_to_end(mark)
            while len(self._segments) > _KEPT_SEGMENTS:
                self._segments.popitem(last=False)
            while len(segment) <= rest:
                at = mark * self._stride + len(segment)
                segment.append(self._before(*segment[-1], at))
            return segment[rest]

    def _before(self, table: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Compute ``C_k`` and its scales from those of ``C_{k-1}``."""
        source, target, weights = self._source, self._target, self._weights
        end = len(table) - 1
        # Without a minimum length, all budgets share these tables, and k may exceed self._budget.
        if self._least and self._budget - k < self._least:
            inside = target != end
            source, target, weights = source[inside], target[inside], weights[inside]
        # The terms of a state are divided by the largest scale of its next states before the sum.
        largest = torch.full_like(scale, -torch.inf)
        largest.scatter_reduce_(0, source, scale[target], "amax")
        factor = (scale[target] - largest[source]).exp().nan_to_num(0.0)  # (E,)
        sums = torch.zeros_like(table).index_add_(
            0, source, weights * table[target] * factor[:, None]
        )
        new = sums @ self.guide.transition.t()
        top = new.max(1).values
        smallest = torch.finfo(new.dtype).tiny
        scaled = torch.where(top[:, None] > 0, new / top.clamp(min=smallest)[:, None], 0)
        scales = torch.where(top > 0, largest + top.log(), -torch.inf)
        scaled[end], scales[end] = 1, 0
        return scaled, scales
