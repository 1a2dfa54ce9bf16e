"""Decoders under constraints: satisfaction, greedy tokens, distribution of samples and errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from control_toys import BUDGET, EOS, V, constraint, guide, satisfies
from methods.toy import make_draft, make_model, prompts

from lora_ext.control import Constraint, ConstraintProcessor

KINDS = ("ff", "cp", "hmm", "btree")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": "restart"},
    {"shortlist": torch.tensor([0, 1, 3])},  # without the required token 2 and the end token
]


def text(row: list[int]) -> tuple[int, ...]:
    """Return the tokens before the end token; raise if the row has none."""
    return tuple(row[: row.index(EOS)])


def decoder(kind: str = "hmm", mode: str = "sample", guided: bool = True, **options: Any) -> Any:
    fields = {k: options.pop(k) for k in ("shortlist", "n_token", "bridge") if k in options}
    given = {"constraint": constraint(), "guide": guide() if guided else None} | options
    return make_draft(make_model("llama"), kind, **fields).decoder(mode=mode, **given)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_satisfies_its_constraint_with_every_kind_of_draft(
    kind: str, guided: bool
) -> None:
    ids, mask = prompts(3)
    for options, budget in zip(OPTIONS, (2, BUDGET, 9), strict=True):
        found = decoder(kind, guided=guided, **options).generate(
            ids, mask, max_new_tokens=budget, eos_token_id=EOS, seed=3
        )
        for row in found.sequences[:, ids.shape[1] :].tolist():
            assert satisfies(text(row)) and row.index(EOS) < budget


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_tokens_equal_those_of_generate_with_the_processor(
    options: dict[str, Any], guided: bool
) -> None:
    ids, mask = prompts(3)
    how = ConstraintProcessor(constraint(), guide() if guided else None, max_new_tokens=12)
    expected = make_model("llama").generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=EOS,
        logits_processor=[how],
    )
    found = decoder(mode="greedy", guided=guided, **options).generate(
        ids, mask, max_new_tokens=12, eos_token_id=EOS
    )
    assert torch.equal(found.sequences, expected)


def law_of_samples(guided: bool, temperature: float) -> dict[tuple[int, ...], float]:
    """Return the probability of each text if every token is sampled from the processor's scores."""
    model, ids = make_model("llama"), prompts(1)[0]
    rows: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    out: dict[tuple[int, ...], float] = {}
    while rows:
        prefix, p = rows.pop()
        how = ConstraintProcessor(
            constraint(),
            guide() if guided else None,
            max_new_tokens=BUDGET,
            temperature=temperature,
        )
        with torch.no_grad():
            logits = model(torch.cat([ids, torch.tensor([prefix]).long().view(1, -1)], 1)).logits
        for end in range(len(prefix) + 1):
            now = torch.cat([ids, torch.tensor([prefix[:end]]).long().view(1, -1)], 1)
            scores = how(now, logits[:, ids.shape[1] - 1 + end])
        for token, q in enumerate((scores[0] / temperature).softmax(-1).tolist()):
            if q > 0 and token == EOS:
                out[prefix] = p * q
            elif q > 0:
                rows.append(((*prefix, token), p * q))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "guided"), [(OPTIONS[0], False), (OPTIONS[0], True), (OPTIONS[2], True)]
)
def test_samples_have_the_processors_distribution(options: dict[str, Any], guided: bool) -> None:
    wanted = law_of_samples(guided, 1.5)
    assert sum(wanted.values()) == pytest.approx(1)
    count, ids = 800, prompts(1)[0]
    found = decoder("cp", guided=guided, n_token=3, temperature=1.5, **options).generate(
        ids.expand(count, -1), max_new_tokens=BUDGET, eos_token_id=EOS, seed=7
    )
    texts = [text(row) for row in found.sequences[:, ids.shape[1] :].tolist()]
    assert set(texts) <= set(wanted)
    # Pearson's statistic over the texts with an expected count of at least 5: it is at most five
    # standard deviations above its mean, the number of these texts.
    often = {t: p for t, p in wanted.items() if p * count >= 5}
    assert len(often) > 8
    score = sum((texts.count(t) - count * p) ** 2 / (count * p) for t, p in often.items())
    assert score < len(often) + 5 * (2 * len(often)) ** 0.5
    assert found.emitted_per_call > 1.2


def test_bridges_and_chains_of_windows_are_constrained_too() -> None:
    ids, mask = prompts(2)
    for mode, guided in itertools.product(("greedy", "sample"), (False, True)):
        found = decoder("cp", mode, guided, n_token=2, bridge=8, chain=2).generate(
            ids, mask, max_new_tokens=9, eos_token_id=EOS, seed=1
        )
        assert all(satisfies(text(r)) for r in found.sequences[:, ids.shape[1] :].tolist())


def test_rows_have_separate_constraints_and_free_rows_keep_their_tokens() -> None:
    ids, mask = prompts(3)
    other = Constraint.from_edges([(0, 1, 1), (1, 3, 1)], 0, {1}, V, EOS)
    mixed = decoder(constraint=[constraint(), None, other]).generate(
        ids, mask, max_new_tokens=BUDGET, eos_token_id=EOS, seed=[5, 6, 7]
    )
    free = decoder(constraint=None).generate(
        ids, mask, max_new_tokens=BUDGET, eos_token_id=EOS, seed=[5, 6, 7]
    )
    rows = mixed.sequences[:, ids.shape[1] :].tolist()
    assert satisfies(text(rows[0])) and other.accepts(text(rows[2]))
    shorter = min(free.sequences.shape[1], mixed.sequences.shape[1])
    assert torch.equal(free.sequences[1, :shorter], mixed.sequences[1, :shorter])


def test_stop_strings_beside_a_constraint_are_refused() -> None:
    from control_tokenizer import tokenizer

    ids, mask = prompts(2)
    settings: dict[str, Any] = {"stop_strings": ["a"], "tokenizer": tokenizer()}
    with pytest.raises(ValueError, match="stop_strings: expected None with a constraint"):
        decoder().generate(ids, mask, max_new_tokens=BUDGET, eos_token_id=EOS, **settings)


@pytest.mark.parametrize("mode", ["sample", "greedy"])
@pytest.mark.parametrize("options", [{}, {"bridge": 8, "n_token": 2}])
def test_model_that_forbids_a_required_token_raises(options: dict[str, Any], mode: str) -> None:
    # Every text contains 2; rows without a constraint continue.
    ids, mask = prompts(2)
    settings: dict[str, Any] = {"max_new_tokens": BUDGET, "eos_token_id": EOS, "seed": 1}

    def banned(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([2]), -torch.inf)

    one = decoder("cp", mode, **options)
    one.model.lm_head.register_forward_hook(banned)
    with pytest.raises(ValueError, match="logits: expected a finite logit of a token that the con"):
        one.generate(ids, mask, **settings)
    free = decoder("cp", mode, constraint=[None, None], **options)
    free.model.lm_head.register_forward_hook(banned)
    assert 2 not in free.generate(ids, mask, **settings).sequences[:, ids.shape[1] :]


class Short:
    """Matcher that allows any two tokens, and then no further token."""

    def __init__(self) -> None:
        self.read = 0

    def fill_next_token_bitmask(self, bits: torch.Tensor, index: int) -> None:
        bits[index, 0] = 0b1111 if self.read < 2 else 0

    def accept_token(self, token: int) -> bool:
        self.read += 1
        return True

    def rollback(self, count: int) -> None:
        self.read -= count


@pytest.mark.parametrize("mode", ["sample", "greedy"])
@pytest.mark.parametrize("options", [{}, {"bridge": 8, "n_token": 2}])
def test_matcher_that_allows_no_token_raises_within_the_budget(
    options: dict[str, Any], mode: str
) -> None:
    ids, mask = prompts(2)
    given = {"constraint": [Constraint.from_matcher(Short(), V, EOS), None], "guided": False}
    one = decoder("cp", mode, **options, **given)
    found = one.generate(ids, mask, max_new_tokens=2, eos_token_id=EOS, seed=1)
    assert EOS not in found.sequences[0, ids.shape[1] :]
    with pytest.raises(ValueError, match="logits: expected a finite logit of a token that the con"):
        one.generate(ids, mask, max_new_tokens=3, eos_token_id=EOS, seed=1)


def test_masked_drafts_are_accepted_at_least_as_often_as_plain_ones() -> None:
    # A plain draft is sampled without the mask, so its tokens outside the mask are rejected.
    torch.manual_seed(0)
    p, q = ((2 * torch.randn(200, 8)).softmax(-1) for _ in range(2))
    live = torch.rand(200, 8) < 0.6
    live[:, 0] = True
    masked = p * live / (p * live).sum(-1, keepdim=True)
    local = q * live / (q * live).sum(-1, keepdim=True)
    plain = torch.minimum(masked, q).sum(-1)
    assert (torch.minimum(masked, local).sum(-1) >= plain - 1e-6).all()


@pytest.mark.parametrize(
    ("given", "call", "message"),
    [
        ({}, {"max_new_tokens": 1}, "max_new_tokens: expected at least 2"),
        ({}, {"eos_token_id": 3}, r"eos_token_id: .* all end tokens of the constraint, \[4\]"),
        ({}, {"eos_token_id": [3, 4]}, "no token that the constraint allows inside a text"),
        ({"constraint": [constraint()] * 3}, {}, "1 or 2 constraints, found 3"),
        ({"guide": guide(vocab=6)}, {}, "guide: expected the constraint's vocab_size, 5, found 6"),
        ({"constraint": "json"}, {}, "constraints: expected a Constraint"),
        ({}, {"repetition_penalty": 1.1}, "repetition_penalty: expected"),
    ],
)
def test_unsatisfiable_requests_are_refused_before_the_model_runs(
    given: dict[str, Any], call: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = decoder(**given)
    monkeypatch.setattr(type(one.model), "forward", None)
    settings = {"max_new_tokens": BUDGET, "eos_token_id": EOS} | call
    ids, mask = prompts(2)
    with pytest.raises(ValueError, match=message):
        one.generate(ids, mask, **settings)
