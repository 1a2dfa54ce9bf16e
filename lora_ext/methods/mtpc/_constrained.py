"""Speculative decoding under a constraint: the draft contains only tokens that the constraint
allows.

The constraint state of every row advances with the drafted tokens. At every position, the
distributions of the circuit and of the verifier are multiplied by the same factor: ``r``, the
probability that the constraint will be satisfied, estimated by a guide (see
:mod:`lora_ext.control`), or the mask of allowed tokens. Since the factor is the same,
``ops.spec_verify`` is used unchanged. After the end of a text, both distributions contain only end
tokens.

A token is *forced* if it is the only allowed one; both distributions then give it probability 1. A
run of forced tokens that follows a window is appended to the window and needs no acceptance test.
If the whole window is accepted, the next token is drawn from the logits after the run.

Shape letters: ``B`` rows, ``K`` drafted tokens, ``n`` tokens per window, ``F`` tokens of the
longest run, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext import control, ops
from lora_ext._checks import require
from lora_ext.control import Block, MatchedPlan, Plan, Row
from lora_ext.reference import log_softmax

from ._drafting import DraftedWindow, draw
from ._request import Request
from ._shortlist import Shortlist
from .layers import Circuit

_WHERE = "SpeculativeDecoder"
_MAX_FORCED_TOKENS = 32  # per run: a run lengthens the verifier's pass for every row


class _Position(NamedTuple):
    """Constraint states of the rows before a position of a window, and ``log r`` of all tokens at
    this position."""

    rows: list[Row | None]
    blocks: list[Block]


class Constrained:
    """Constraint states of the rows of one call during decoding.

    Args:
        decoder: a :class:`SpeculativeDecoder` with a constraint.
        request: budget and end tokens of the call.
        batch: number of rows.

    Raises:
        ValueError: If the number of constraints, the end tokens or the vocabulary do not match; if
            stop strings are given; or if a constraint cannot be satisfied within the budget.
    """

    def __init__(self, decoder: Any, request: Request, batch: int):
        plans = control.plans_of(_WHERE, decoder.constraint, decoder.guide, request.budget)
        count = len(plans)
        require(count in (1, batch), _WHERE, "constraint", f"1 or {batch} constraints", count)
        for plan in plans:
            if plan is not None:
                _check(plan, request, decoder.head.vocab_size)
        listed = plans * batch if count == 1 else plans
        self.rows: list[Row | None] = [None if p is None else Row.first(p) for p in listed]
        self.decoder = decoder
        self.temperature = decoder.temperature if decoder.mode == "sample" else 1.0

    def first(self, logits: Tensor) -> Tensor:
        """Return the logits of the first token ``(B, V)`` under the constraints.

        Raises:
            ValueError: As for :meth:`take`.
        """
        law = control.moved(control.log_ratios(self.rows), logits, self.temperature)
        _possible(self.rows, law)
        return law

    def start(self, token: Tensor) -> None:
        """Advance every row by its first token ``(B,)``, which was drawn without a draft."""
        self.rows = control.advance(self.rows, token.tolist())

    def drafted(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> DraftedWindow:
        """Draft a window that the constraints allow; the arguments are those of ``Steps.draft``."""
        self._window: list[_Position] = []
        self._after = self.rows  # constraint states after the tokens drafted so far
        self._runs = torch.zeros(len(self.rows), dtype=torch.long)
        decoder, head = self.decoder, self.decoder.head
        # Rows without a constraint use the same draft as in a batch without constraints, so that a
        # seed gives the same tokens.
        self._free = torch.tensor([row is None for row in self.rows], device=hidden.device)
        some = bool(self._free.any())
        free = decoder.draft(hidden, pending, uniforms).tokens if some else None
        if decoder.bridge is None or pending is None:
            every = Shortlist(None, head.vocab_size)
            circuit = decoder.circuit(hidden, pending)
            return DraftedWindow.joined([self._drawn(every, circuit, uniforms, pending, free)])
        parts, state, before = [], hidden, pending[:, None]
        for j, numbers in enumerate(uniforms.split(head.n_token, 1)):
            state = decoder.advance_states(state, before)
            own = None if free is None else free[:, j * head.n_token :]
            circuit = head.narrow_circuit(state)
            parts.append(self._drawn(head.listed, circuit, numbers, None, own))
            before = parts[-1][0]
        return DraftedWindow.joined(parts)

    def _drawn(
        self,
        listed: Shortlist,
        circuit: Circuit,
        uniforms: Tensor,
        pending: Tensor | None,
        free: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a window. Return its tokens ``(B, n)``, their log-probabilities ``(B, n)``, and the
        log-distributions ``(B, n, V)`` that they were drawn from."""
        batch, n = uniforms.shape[:2]
        kind, greedy = self.decoder.head.kind, self.decoder.mode == "greedy"
        rows = self._after
        places = torch.full((batch, n), -1, device=uniforms.device)
        tokens, laws = [], []
        for k in range(n):
            at = torch.full((batch,), k, device=uniforms.device)
            q = listed.widen(ops.circuit_conditional_dist(kind, *circuit, places, at))  # (B, V)
            if k == 0 and pending is not None:  # The pending token is decided already.
                self._window.append(_Position(rows, []))
                token, law = pending, torch.zeros_like(q)
            else:
                blocks = control.log_ratios(rows)
                self._window.append(_Position(rows, blocks))
                law = control.moved(blocks, q)
                # If the draft gives the allowed tokens no probability, the token is drawn from r.
                nothing = (law == -torch.inf).all(1, keepdim=True)
                if bool(nothing.any()):
                    law = torch.where(nothing, control.moved(blocks, torch.zeros_like(q)), law)
                    # If a matcher allows no token, any token is drawn, which is not kept.
                    law = torch.where((law == -torch.inf).all(1, keepdim=True), 0.0, law)
                law = log_softmax(law)
                token = law.argmax(-1) if greedy else draw(law, uniforms[:, k, 1])
                if free is not None:
                    token = torch.where(self._free, free[:, k], token)
                rows = control.advance(rows, token.tolist())
            known = q.gather(1, token[:, None])[:, 0] > -torch.inf
            places[:, k] = torch.where(known, listed.places(token), -1)
            tokens.append(token)
            laws.append(law)
        self._after = rows
        law, token = torch.stack(laws, 1), torch.stack(tokens, 1)
        return token, law.gather(2, token[..., None])[..., 0], law

    def with_forced(self, tokens: Tensor) -> Tensor:
        """Append each row's run of forced tokens to a window ``(B, K)``; return ``(B, K + F)``.
        Shorter runs are padded with zeros, which their rows do not keep."""
        columns: list[list[int]] = []
        for _ in range(_MAX_FORCED_TOKENS):
            only = [None if row is None else row.only for row in self._after]
            if all(token is None for token in only):
                break
            pairs = zip(self._after, only, strict=True)
            forced = [None if token is None else row for row, token in pairs]
            columns.append([t or 0 for t in only])
            both = zip(self._after, control.advance(forced, columns[-1]), strict=True)
            self._after = [before if after is None else after for before, after in both]
            self._runs += torch.tensor([t is not None for t in only])
        return torch.cat([tokens, *(tokens.new_tensor(c)[:, None] for c in columns)], 1)

    def target(self, target: Tensor) -> Tensor:
        """Return the verifier's logits ``(B, K + 1, V)`` under the constraints.

        Args:
            target: ``(B, K + F + 1, V)``, the verifier's logits for the tokens of
                :meth:`with_forced`. The last position of the result is the one after each row's
                run.
        """
        self._window.append(_Position(self._after, control.log_ratios(self._after)))
        n = len(self._window) - 1
        after_run = target[torch.arange(len(target)), n + self._runs]
        places = [
            control.moved(position.blocks, after_run if k == n else target[:, k], self.temperature)
            for k, position in enumerate(self._window)
        ]
        self._law = torch.stack(places, 1)
        return self._law

    def take(self, accepted: Tensor, token: Tensor) -> Tensor:
        """Advance the rows by their accepted tokens and the verifier's token.

        Returns:
            number of tokens in the result of :meth:`with_forced` that each row keeps, ``(B,)``. A
            row that keeps its whole window also keeps its run.

        Raises:
            ValueError: If the model has no finite score for any token that the constraint allows.
        """
        every = torch.arange(len(accepted), device=accepted.device)
        rows = [self._window[a].rows[i] for i, a in enumerate(accepted.tolist())]
        _possible(rows, self._law[every, accepted])
        self.rows = control.advance(rows, token.tolist())
        whole = accepted == len(self._window) - 1
        return accepted + whole * self._runs.to(accepted.device)

    def select(self, stay: list[int]) -> None:
        """Keep only the rows with these indices."""
        self.rows = [self.rows[i] for i in stay]


def _possible(rows: list[Row | None], law: Tensor) -> None:
    """Raise ValueError if a row has a forbidden token within its budget, or if the largest of its
    logits in ``law (B, V)`` is not finite. Logits of rows after their end or their budget are not
    checked."""
    waits = [row is not None and not row.ended and row.left > 0 for row in rows]
    lost = any(row is not None and row.lost and row.left >= 0 for row in rows)
    none = bool((~law.amax(-1).isfinite() & torch.tensor(waits, device=law.device)).any())
    if lost or none:
        expected = "a finite logit of a token that the constraint allows"
        found = f"largest logits {law.amax(-1).tolist()!r:.200}"
        raise ValueError(f"{_WHERE}: logits: expected {expected}, found {found}")


def _check(plan: Plan | MatchedPlan, request: Request, vocab_size: int) -> None:
    constraint, size, ends = plan.constraint, plan.constraint.vocab_size, sorted(request.ends)
    require(size == vocab_size, _WHERE, "constraint", f"{vocab_size} tokens, as in the model", size)
    require(request.stops is None, _WHERE, "stop_strings", "None with a constraint", "strings")
    eos = set(constraint.eos)
    expected = f"all end tokens of the constraint, {list(constraint.eos)}"
    require(eos <= request.ends, _WHERE, "eos_token_id", expected, ends)
    inside = any(constraint.reads(token) for token in request.ends - eos)
    expected = "no token that the constraint allows inside a text"
    require(not inside, _WHERE, "eos_token_id", expected, ends)
