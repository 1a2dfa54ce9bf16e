"""The distribution of a constrained call (draft, forced tokens and verification) by enumeration.

Every sampled token and every accept decision is a step function of a uniform random number.
Bisection finds the steps, as in ``test_circuit_decode_law``. The model is a table of next-token
distributions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from control_toys import EOS, V, guide, table_model
from methods.toy import make_draft, make_model
from test_circuit_decode_law import step_sizes
from torch import Tensor

from lora_ext.control import Constraint, ConstraintProcessor
from lora_ext.methods.mtpc._constrained import Constrained
from lora_ext.methods.mtpc._request import Request

N, BUDGET, LONG = 2, 7, 5  # lengths of a window, a text and the compared prefixes
Tokens = tuple[int, ...]
# After two tokens, the second one determines the run of forced tokens: "2 3", "0" or none.
EDGES = [(0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 3), (1, 2, 5), (1, 3, 4), (2, 2, 6), (6, 3, 5)]
EDGES += [(3, 0, 5), (4, 1, 5), (4, 3, 5), (5, 0, 5), (5, 1, 5), (5, 3, 5)]


def constraint() -> Constraint:
    return Constraint.from_edges(EDGES, 0, {5}, V, EOS)


class Call:
    """One call of a decoder for many rows at once, with a table in place of the model."""

    def __init__(self, guided: bool, control: type[Constrained] = Constrained):
        draft = make_draft(make_model("llama"), "cp", n_token=N, rank=2)
        how = {"constraint": constraint(), "guide": guide() if guided else None}
        self.decoder = draft.decoder(**how)
        self.control, self.model = control, table_model()
        self.hidden = torch.randn(1, 16, generator=torch.Generator().manual_seed(3)).double()

    @torch.no_grad()
    def __call__(self, drawing: Tensor, testing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, accepted count and next token for uniforms (B, N) and (B, N + 1)."""
        # Bisection also tries 1, which no uniform reaches.
        batch, most = len(drawing), 1 - 2.0**-24
        drawing, testing = drawing.clamp(max=most), testing.clamp(max=most)
        request = Request(BUDGET, frozenset([EOS]), 0, None, [0] * batch, {})
        control = self.control(self.decoder, request, batch)
        numbers = drawing[..., None].expand(-1, -1, 2)
        window = control.drafted(self.hidden.expand(batch, -1), None, numbers)
        tokens = control.with_forced(window.tokens)
        target = control.target(torch.stack([self.table(tuple(t)) for t in tokens.tolist()]))
        accepted, token = self.decoder.verify(window, target, None, testing)
        return tokens, control.take(accepted, token), token

    @cache  # noqa: B019
    def table(self, tokens: Tokens) -> Tensor:
        return torch.stack([self.model(tokens[:k]) for k in range(len(tokens) + 1)]).log()

    def drafts(self) -> dict[Tokens, tuple[float, list[float]]]:
        """Return each window's probability, and uniform numbers that sample the window."""
        found: dict[Tokens, tuple[float, list[float]]] = {(): (1.0, [])}
        for k in range(N):
            at = torch.tensor([u for _, u in found.values()], dtype=torch.float64)

            def drawn(u: Tensor, at: Tensor = at, k: int = k) -> Tensor:
                numbers = torch.full((len(u), N), 0.5, dtype=torch.float64)
                numbers[:, :k], numbers[:, k] = at.repeat(len(u) // len(at), 1), u
                return self(numbers, torch.zeros(len(u), N + 1).double())[0][:, k]

            sizes = step_sizes(drawn, len(at), V, torch.float32)
            middle = sizes.cumsum(1) - sizes / 2
            found = {
                (*x, v): (p * float(s[v]), [*u, float(m[v])])
                for (x, (p, u)), s, m in zip(found.items(), sizes, middle, strict=True)
                for v in range(V)
                if s[v] > 0
            }
        return found

    def law(self) -> dict[Tokens, float]:
        """Return the distribution of the first ``LONG`` tokens.

        The tokens after those of the call are distributed by :meth:`next`.
        """
        found = self.drafts()
        at = torch.tensor([u for _, u in found.values()], dtype=torch.float64)
        chance = [p for p, _ in found.values()]
        out: dict[Tokens, float] = {}
        for k in range(N + 1):

            def run(u: Tensor, which: int, k: int = k) -> tuple[Tensor, Tensor, Tensor]:
                numbers = torch.zeros(len(u), N + 1, dtype=torch.float64)
                numbers[:, k] = 1 - 2.0**-24  # rejects the token at k if possible
                numbers[:, which] = u
                return self(at.repeat(len(u) // len(at), 1), numbers)

            last = step_sizes(lambda u, run=run: run(u, N)[2], len(at), V, torch.float32)
            kept = torch.zeros(len(at), dtype=torch.float64)
            if k < N:
                rejected = lambda u, run=run, k=k: (run(u, k)[1] <= k).long()  # noqa: E731
                kept = step_sizes(rejected, len(at), 2, torch.float32)[:, 0]
            tokens, accepted, _ = self(at, torch.zeros(len(at), N + 1).double())
            for i, x in enumerate(tokens.tolist()):
                end = k if k < N else int(accepted[i])
                for v in range(V):
                    share = chance[i] * float((1 - kept[i]) * last[i, v])
                    self.emit(out, (*x[:end], v), share)
                chance[i] *= float(kept[i])
        return out

    def emit(self, out: dict[Tokens, float], text: Tokens, share: float) -> None:
        if share == 0:
            return
        if EOS in text:
            text = text[: text.index(EOS) + 1]
        if EOS in text or len(text) >= LONG:
            out[text[:LONG]] = out.get(text[:LONG], 0.0) + share
            return
        for v, p in enumerate(self.next(text)):
            self.emit(out, (*text, v), share * p)

    @cache  # noqa: B019
    def next(self, text: Tokens) -> list[float]:
        """Return the next-token distribution after ``text`` in ``generate`` with the processor."""
        how = ConstraintProcessor(constraint(), self.decoder.guide, max_new_tokens=BUDGET)
        for k in range(len(text) + 1):
            law = how(torch.tensor([[0, *text[:k]]]), self.model(text[:k]).log()[None])
        return law[0].softmax(-1).tolist()

    def distance(self) -> float:
        """Return the total variation distance between the call's and the expected distribution."""
        expected: dict[Tokens, float] = {}
        self.emit(expected, (), 1.0)
        found = self.law()
        keys = {*expected, *found}
        return sum(abs(expected.get(t, 0.0) - found.get(t, 0.0)) for t in keys) / 2


@pytest.mark.parametrize("guided", [False, True])
def test_constrained_call_with_forced_runs_has_the_expected_distribution(guided: bool) -> None:
    assert Call(guided).distance() < 1e-6


def test_forced_runs_of_a_batch_have_different_lengths() -> None:
    call = Call(False)
    drawn = torch.tensor([u for _, u in call.drafts().values()], dtype=torch.float64)
    tokens, accepted, _ = call(drawn, torch.zeros(len(drawn), N + 1).double())
    assert {(x[1], n) for x, n in zip(tokens.tolist(), accepted.tolist(), strict=True)} == {
        (0, 4), (1, 3), (2, 2), (3, 2),
    }  # fmt: skip


def test_enumeration_detects_states_that_ignore_the_draft() -> None:
    class Standing(Constrained):
        def target(self, target: Tensor) -> Tensor:
            self._window = [p._replace(blocks=self._window[0].blocks) for p in self._window]
            return super().target(target)

    assert Call(False, Standing).distance() > 1e-3


def test_mostly_forced_answer_takes_one_call() -> None:
    # The tokens must equal those with the processor; the first call emits all ten forced tokens.
    run = [(s, s % 4, s + 1) for s in range(1, 11)]
    one = Constraint.from_edges([(0, 0, 1), (0, 1, 1), *run], 0, {11}, V, EOS)
    free: Any = [None, one]
    ids = torch.randint(0, 4, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 14, "eos_token_id": EOS}
    draft, model = make_draft(make_model("llama"), "cp", n_token=N), make_model("llama")
    found = draft.decoder(mode="greedy", constraint=free).generate(ids, **settings)
    how = ConstraintProcessor(free, max_new_tokens=14)
    mask = torch.ones_like(ids)
    wanted = model.generate(
        ids, attention_mask=mask, do_sample=False, logits_processor=[how], **settings
    )
    assert torch.equal(found.sequences, wanted[:, : found.sequences.shape[1]])
    assert found.calls[1] == 1 and found.emitted[1] >= 12
