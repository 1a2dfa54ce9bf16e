"""Constraints and guides, compared with Ctrl-G (Zhang et al., arXiv 2406.13892; MIT licence)."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from control_tokenizer import tokenizer
from control_toys import BUDGET, EDGES, EOS, LEAST, H, V, constraint, guide, table_model

from lora_ext.control import Constraint, Guide, Plan, Row, advance, apply

REASON = "ctrlg is not installed: pip install git+https://github.com/joshuacnf/Ctrl-G"


@pytest.fixture(scope="module")
def ctrlg() -> Iterator[Any]:
    """Yield the package ctrlg and undo the changes of torch's precision that its import makes."""
    compiled, precision = torch.compile, torch.get_float32_matmul_precision()
    torch.compile = lambda f: f  # type: ignore[assignment]
    try:
        yield pytest.importorskip("ctrlg", reason=REASON)
    finally:
        torch.compile = compiled  # type: ignore[assignment]
        torch.set_float32_matmul_precision(precision)


def their_hmm(ctrlg: Any, whole: Guide) -> Any:
    found = ctrlg.HMM(whole.num_states, whole.vocab_size, EOS)
    numbers = (whole.transition, whole.emission.log(), whole.initial.log())
    found.update_params(*(t.float() for t in numbers))
    return found


def test_guided_distribution_equals_the_logits_processor_of_ctrlg(ctrlg: Any) -> None:
    masks: dict[tuple[int, int], Any] = {}
    for state, token, after in EDGES:
        masks.setdefault((state, after), np.zeros(V, bool))[token] = True
    graph = {"edges": [(*pair, mask) for pair, mask in masks.items()], "initial_state": 0}
    dfa = ctrlg.DFAModel(graph | {"accept_states": {2, 3}}, V)
    how = ctrlg.ConstraintLogitsProcessor(
        their_hmm(ctrlg, guide()), dfa, LEAST, BUDGET - 1, [7], suffix_ids=[EOS]
    )
    rows: dict[tuple[int, ...], Row | None] = {
        (): Row.first(Plan(constraint(), BUDGET, LEAST, guide()))
    }
    compared = 0
    for _ in range(BUDGET - 1):
        scores = torch.stack([table_model()(x) for x in rows]).log()
        theirs = how(torch.tensor([[7, *x] for x in rows]), scores.float()).double().exp()
        ours = apply(list(rows.values()), scores)[0].softmax(-1)
        assert (theirs - ours).abs().max() < 1e-6
        compared += len(rows)
        grown = {
            (*x, t): after
            for x, row in rows.items()
            for t in range(4)
            for after in advance([row], [t])
            if after is not None and not after.lost
        }
        rows = dict(grown)
    assert compared > 70


def test_keyword_constraints_equal_the_automata_of_ctrlg(ctrlg: Any) -> None:
    tokens = tokenizer()
    ids = dict(zip("abc", tokens.convert_tokens_to_ids(list("abc")), strict=True))
    size = len(tokens)

    def kmp(word: str) -> Any:
        return ctrlg.KMPBuilder(size).build([ids[c] for c in word])

    either = ctrlg.AhoCorasickBuilder(size).build([[ids[c] for c in w] for w in ("aba", "ca")])
    pairs = [
        (kmp("aba"), Constraint.keywords(tokens, ["aba"])),
        (either, Constraint.keywords(tokens, [["aba", "ca"]])),
        (ctrlg.DFA_prod([kmp("ab"), kmp("ca")]), Constraint.keywords(tokens, ["ab", "ca"])),
        (
            ctrlg.DFA_prod([kmp("ab"), kmp("ca")], mode="union"),
            Constraint.keywords(tokens, ["ab"]) | Constraint.keywords(tokens, ["ca"]),
        ),
        (ctrlg.DFA_negate(kmp("ab")), Constraint.keywords(tokens, none_of=["ab"])),
    ]
    for graph, ours in pairs:
        theirs = ctrlg.DFAModel(graph, size)
        for length in range(6):
            for text in itertools.product(ids.values(), repeat=length):
                state = theirs.initial_state
                for token in text:
                    state = theirs.next_state(state, token)
                assert theirs.is_accept(state) == ours.accepts(text)


def test_likelihoods_and_expected_counts_equal_the_hmm_of_ctrlg(ctrlg: Any) -> None:
    whole, texts = guide(), torch.tensor(list(itertools.product(range(V), repeat=3)))
    theirs = their_hmm(ctrlg, whole)
    with torch.no_grad():
        likelihoods = theirs.forward(texts)
    assert torch.allclose(likelihoods[-1].double(), whole.log_prob(texts), atol=1e-5)
    flows = torch.zeros(H, H), torch.zeros(V + 1, H), torch.zeros(H)
    with torch.no_grad():
        theirs.backward(texts, likelihoods, *flows)
    transition = whole.transition.clone().requires_grad_()
    law = whole.initial.expand(len(texts), -1)
    for t in range(3):
        law = law * whole.emission.t()[texts[:, t]]
        law = law @ transition if t < 2 else law
    law.sum(-1).log().sum().backward()
    assert torch.allclose(flows[0].double(), transition.grad, rtol=1e-4)
