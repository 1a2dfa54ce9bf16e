"""Constraints evaluated by a matcher of another package: masks without a token budget."""

from __future__ import annotations

import importlib
import itertools
import json
from typing import Any

import pytest
import torch
from control_tokenizer import tokenizer
from control_toys import EOS, V, constraint, guide, satisfies, table_model
from methods.toy import make_draft, make_model, prompts

from lora_ext.control import Constraint, ConstraintProcessor, Row, advance, plans_of


class Bits:
    """Matcher of the toy language with xgrammar's interface, which counts the tokens it reads."""

    def __init__(self) -> None:
        self.states, self.read = [0], 0

    def allowed(self) -> list[bool]:
        return [constraint().next_state(self.states[-1], t) >= 0 for t in range(V)]

    def fill_next_token_bitmask(self, bits: torch.Tensor, index: int = 0) -> bool:
        bits[index, 0] = sum(1 << t for t, may in enumerate(self.allowed()) if may)
        return True

    def accept_token(self, token: int) -> bool:
        self.read += 1
        self.states.append(constraint().next_state(self.states[-1], token))
        return self.states[-1] >= 0

    def rollback(self, count: int) -> None:
        assert 0 < count < len(self.states)
        del self.states[-count:]


class Bytes:
    """Matcher of the toy language with the interface of llguidance."""

    def __init__(self) -> None:
        self.own = Bits()
        self.consume_token, self.rollback = self.own.accept_token, self.own.rollback

    def compute_bitmask(self) -> bytes:
        return sum(1 << t for t, may in enumerate(self.own.allowed()) if may).to_bytes(1, "little")


MATCHERS = pytest.mark.parametrize("make", [Bits, Bytes])


@MATCHERS
def test_matcher_is_rolled_back_to_the_common_prefix(make: Any) -> None:
    one = Constraint.from_matcher(make(), V, EOS)
    for text in itertools.chain(*(itertools.product(range(4), repeat=n) for n in (3, 0, 2, 4))):
        assert one.accepts(text) == satisfies(text)
    assert not one.accepts([2, EOS]) and not one.accepts([99])


@MATCHERS
def test_matcher_and_edges_have_the_same_distribution_if_the_budget_is_large(make: Any) -> None:
    """Check rows with different and with equal texts. All rows of the first constraint share one
    matcher."""
    plans = [plans_of("test", c, None, 99)[0] for c in
             (Constraint.from_matcher(make(), V, EOS), constraint())]  # fmt: skip
    texts = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(0))
    both = [[Row.first(p)] * 6 for p in plans if p is not None]
    from lora_ext.control import apply

    for k in range(5):
        scores = torch.stack([table_model()(tuple(t[:k])).log() for t in texts.tolist()])
        assert torch.equal(apply(both[0], scores)[0], apply(both[1], scores)[0])
        both = [advance(rows, texts[:, k].tolist()) for rows in both]  # type: ignore[misc]
    assert [r.lost for r in both[0]] == [r.lost for r in both[1]]  # type: ignore[union-attr]


def test_single_row_is_never_rolled_back() -> None:
    matcher = Bits()
    how = ConstraintProcessor(Constraint.from_matcher(matcher, V, EOS), max_new_tokens=9)
    ids = torch.tensor([[1]])
    for token in (0, 2, 1, 1):
        how(ids, torch.zeros(1, V))
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    how(ids, torch.zeros(1, V))
    assert matcher.read == 4


def test_matcher_masks_drafts_like_edges() -> None:
    ids, mask = prompts(3)
    for mode in ("greedy", "sample"):
        found = []
        for one in (Constraint.from_matcher(Bits(), V, EOS), constraint()):
            draft = make_draft(make_model("llama"), "cp", n_token=3)
            found.append(draft.decoder(mode=mode, constraint=one).generate(
                ids, mask, max_new_tokens=30, eos_token_id=EOS, seed=1
            ).sequences)  # fmt: skip
        same = min(f.shape[1] for f in found) - 8  # Only the last 8 tokens depend on the budget.
        assert torch.equal(found[0][:, :same], found[1][:, :same])


def test_matcher_with_a_guide_or_minimum_length_and_other_objects_raise() -> None:
    one = Constraint.from_matcher(Bits(), V, EOS)
    with pytest.raises(NotImplementedError, match="guide: expected None for a constraint"):
        ConstraintProcessor(one, guide(), max_new_tokens=9)
    with pytest.raises(NotImplementedError, match="min_new_tokens: expected 0 for a constraint"):
        ConstraintProcessor(one, max_new_tokens=9, min_new_tokens=2)
    with pytest.raises(ValueError, match="matcher: expected a matcher like xgrammar"):
        Constraint.from_matcher(object(), V, EOS)
    with pytest.raises(ValueError, match=r"eos_token_id: expected tokens in 0 \.\. 4, found 9"):
        Constraint.from_matcher(Bits(), V, 9)


def test_llguidance_grammar_may_nest_to_any_depth() -> None:
    reason = "llguidance is not installed: pip install llguidance"
    llguidance = pytest.importorskip("llguidance", reason=reason)
    tokens = tokenizer()
    wrapped = importlib.import_module("llguidance.hf").from_tokenizer(tokens, len(tokens))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        {"$ref": "#/$defs/l", "$defs": {"l": {"type": "array", "items": {"$ref": "#/$defs/l"}}}}
    )
    matcher = llguidance.LLMatcher(wrapped, grammar)
    one = Constraint.from_matcher(matcher, len(tokens), tokens.eos_token_id)
    for text in ("[]", "[[],[[[[[[]]]]]]]", "[[[[]]"):
        try:
            json.loads(text)
            wanted = True
        except ValueError:
            wanted = False
        assert one.accepts(tokens.encode(text)) == wanted
