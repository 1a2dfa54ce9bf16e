"""`SpeculativeDecoder`: greedy tokens, distribution of samples, batches, stopping, statistics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from methods.toy import FAMILIES, make_draft, make_model, prompts, train
from torch import Tensor

from lora_ext import reference
from lora_ext.methods import mtpc
from lora_ext.methods.mtpc._drafting import nucleus
from lora_ext.nn import CircuitHead

KINDS = ("ff", "cp", "hmm", "btree")
WINDOWS = ("condition", "restart")
NEW = 40


def greedy(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, do_sample=False, **options)


# -------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize("draft_layers", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_generate(
    family: str, batch: int, window: str, draft_layers: int
):
    model, (ids, mask) = make_model(family), prompts(batch)
    expected = greedy(model, ids, mask, max_new_tokens=NEW)
    draft = make_draft(model, draft_layers=draft_layers)
    train(draft, expected[:, :26], steps=10)  # so that the head predicts some tokens correctly
    found = draft.decoder(mode="greedy", window=window).generate(ids, mask, max_new_tokens=NEW)
    assert torch.equal(found.sequences, expected)
    # Some of the 4 drafted tokens (3 with evidence) are accepted, and some are rejected.
    assert 0.5 < found.accepted_per_call < 2.9


@pytest.mark.parametrize(
    ("kind", "n", "emission"),
    [*((kind, 4, "full") for kind in KINDS), ("cp", 1, "full"), ("hmm", 7, "adapter")],
)
def test_greedy_tokens_do_not_depend_on_the_draft(kind: str, n: int, emission: str):
    model, (ids, mask) = make_model("llama"), prompts(2)
    expected = greedy(model, ids, mask, max_new_tokens=NEW)
    draft = make_draft(model, kind, n_token=n, emission=emission)
    for window in WINDOWS:
        decoder = draft.decoder(mode="greedy", window=window)
        found = decoder.generate(ids, mask, max_new_tokens=NEW)
        assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("emission", ["full", "adapter"])
def test_greedy_tokens_do_not_depend_on_the_shortlist(window: str, emission: str):
    model, (ids, mask) = make_model("llama"), prompts(3)
    expected = greedy(model, ids, mask, max_new_tokens=NEW)
    new = expected[:, ids.shape[1] :]
    for left_out in new.unique().tolist():
        shortlist = torch.tensor([token for token in range(5) if token != left_out])
        draft = make_draft(model, "hmm", emission=emission, shortlist=shortlist)
        decoder = draft.decoder(mode="greedy", window=window)
        assert torch.equal(decoder.generate(ids, mask, max_new_tokens=NEW).sequences, expected)
    assert len(new.unique()) > 1


@pytest.mark.parametrize("eos", range(5))
def test_greedy_rows_end_like_those_of_generate(eos: int):
    model, (ids, mask) = make_model("llama"), prompts(3)
    expected = greedy(model, ids, mask, max_new_tokens=NEW, eos_token_id=eos)
    decoder = make_draft(model).decoder(mode="greedy")
    found = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=eos)
    assert torch.equal(found.sequences, expected)


def test_last_position_of_the_model_is_reached_and_not_exceeded():
    model, (ids, mask) = make_model("gpt2"), prompts(2)
    room = 64 - ids.shape[1]  # GPT-2 has no embedding for later positions
    expected = greedy(model, ids, mask, max_new_tokens=room)
    found = make_draft(model).decoder(mode="greedy").generate(ids, mask, max_new_tokens=room)
    assert torch.equal(found.sequences, expected)


def test_untrained_head_drafts_the_models_first_token():
    # Each component is initialised with the LM head, so the first token is accepted.
    model, (ids, mask) = make_model("llama"), prompts(1)
    decoder = make_draft(model, noise=0).decoder(mode="greedy")
    found = decoder.generate(ids, mask, max_new_tokens=1)
    assert found.calls == [1] and found.accepted[0] >= 1


# -------------------------------------------------------------------------------------------------
# Distribution of samples, by enumeration of all paths of the decoder


class Enumerated(mtpc.SpeculativeDecoder):
    """Decoder in which row b follows path b: a given draft and outcome of verification per call.

    ``weight[b]`` becomes the probability of the path by the rules of speculative decoding. The ops
    get uniform numbers from inside the path's region, and must reproduce the path.
    """

    def follow(self, paths: Tensor, drafts: list[Tensor]) -> None:
        """Set the paths, ``(B, calls)``.

        An entry encodes a row of ``drafts[call]`` and the outcome of its verification.
        """
        self.paths, self.drafts, self.call = paths, drafts, -1
        self.weight = torch.ones(len(paths), dtype=torch.float64)

    def uniforms(self, generators: list[torch.Generator], device: torch.device) -> Tensor:
        self.rows = torch.tensor([g.initial_seed() for g in generators])
        self.call += 1
        self.code = self.paths[self.rows, self.call]
        n = self.head.n_token
        return torch.zeros(len(generators), 3 * n + 1)

    def draft(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> Any:
        n, v = self.head.n_token, self.head.vocab_size
        first = 0 if pending is None else 1
        outcomes = (n - first + 1) * v
        tokens = self.drafts[self.call][self.code // outcomes]
        if pending is not None:
            tokens = torch.cat([pending[:, None], tokens], 1)
        circuit = self.circuit(hidden, pending)
        scan = reference.circuit_scan(self.head.kind, *circuit, tokens)
        drawn = scan.conditional[:, first:].sum(1).exp()
        self.weight[self.rows] *= drawn
        self.possible = drawn > 0
        uniforms = torch.zeros(len(tokens), n, 2)
        # Use the middles of the intervals that draw the likeliest state and the token of the path.
        for k in range(n):
            state = scan.posterior[:, k].argmax(-1)
            leaf = circuit.leaf[torch.arange(len(tokens)), k, state].softmax(-1)
            uniforms[:, k, 0] = middle(scan.posterior[:, k], state)
            uniforms[:, k, 1] = middle(leaf, tokens[:, k])
        draft = super().draft(hidden, pending, uniforms)
        assert torch.equal(draft.tokens[self.possible], tokens[self.possible])
        return draft._replace(tokens=tokens)

    def verify(self, draft: Any, target: Tensor, pending: Tensor | None, uniforms: Tensor) -> Any:
        rows, n, v = *draft.tokens.shape, self.head.vocab_size
        first = 0 if pending is None else 1
        outcome = self.code % ((n - first + 1) * v)
        accepted, token = first + outcome // v, outcome % v
        p = law(target, self.temperature, self.top_p)
        here = torch.arange(rows)
        weight = torch.ones(rows, dtype=p.dtype)
        uniforms = torch.zeros(rows, n + 1, dtype=torch.float64)
        for k in range(first, n):
            ratio = p[here, k, draft.tokens[:, k]] / draft.conditional[:, k].exp()
            ratio = ratio.clamp(max=1)
            weight *= torch.where(k < accepted, ratio, torch.where(k == accepted, 1 - ratio, 1))
            uniforms[:, k] = torch.where(k < accepted, ratio / 2, (1 + ratio) / 2)
        q = torch.stack(
            [self.head_conditional(draft, k) for k in range(n)] + [torch.zeros_like(p[:, 0])], 1
        )
        residual = self.next_law(p[here, accepted], q[here, accepted], accepted)
        total = residual.sum(-1)
        weight *= torch.where(total > 0, residual[here, token] / total.clamp(min=1e-300), 0)
        uniforms[:, n] = middle(residual, token)
        self.weight[self.rows] *= weight
        found = super().verify(draft, target, pending, uniforms.float())
        # The uniforms that lead to a less probable outcome may include no float32 number.
        likely = self.possible & (weight > 1e-6)
        self.check(found[0][likely], accepted[likely])
        self.check(found[1][likely], token[likely])
        return accepted, token

    def check(self, found: Tensor, expected: Tensor) -> None:
        assert torch.equal(found, expected)

    def next_law(self, p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
        """Return unnormalised probabilities of the token after the accepted ones."""
        return (p - q).clamp(min=0)

    def head_conditional(self, draft: Any, k: int) -> Tensor:
        position = torch.full((len(draft.tokens),), k)
        kind = self.head.kind
        dist = reference.circuit_conditional_dist(kind, *draft.circuit, draft.tokens, position)
        return dist.exp()


def middle(weights: Tensor, index: Tensor) -> Tensor:
    """Return the middle of the interval that inverse-CDF sampling maps to ``index``."""
    sums = weights.cumsum(-1)
    at = index[:, None]
    end, width = sums.gather(1, at), weights.gather(1, at)
    return ((end - width / 2) / sums[:, -1:].clamp(min=1e-300)).squeeze(1)


def law(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    p = (logits / temperature).softmax(-1)
    ordered, order = p.sort(-1, descending=True)
    kept = (ordered.cumsum(-1) - ordered < top_p).double() * ordered
    return torch.zeros_like(p).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


def true_law(model: Any, prompt: Tensor, new: int, temperature: float, top_p: float) -> Tensor:
    """Return the probabilities of all ``new``-token sequences, ordered as itertools.product."""
    v = model.config.vocab_size
    tails = torch.tensor(list(itertools.product(range(v), repeat=new)))
    ids = torch.cat([prompt.expand(len(tails), -1), tails], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, -new - 1 : -1]
    return law(logits, temperature, top_p).gather(-1, tails[..., None]).squeeze(-1).prod(1)


def enumerate_paths(
    kind_of_decoder: type[Enumerated],
    window: str,
    kind: str,
    v: int,
    n: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    new: int = 3,
    shortlist: Tensor | None = None,
    **fields: Any,
) -> tuple[Tensor, Tensor]:
    """Return the decoder's and the verifier's distribution of the first ``new`` tokens."""
    model = make_model("llama", vocab=v, layers=1, width=8)
    head = make_draft(model, kind, n_token=n, noise=1.0, shortlist=shortlist, **fields).head
    decoder = kind_of_decoder(model, head, window=window, temperature=temperature, top_p=top_p)
    free = [n, *[n - 1 if window == "condition" else n] * (new - 1)]  # tokens drafted at each call
    drafts = [torch.tensor(list(itertools.product(range(v), repeat=k))).view(-1, k) for k in free]
    codes = torch.tensor([v**k * (k + 1) * v for k in free])
    paths = torch.cartesian_prod(*(torch.arange(c) for c in codes))
    decoder.follow(paths, drafts)
    prompt = torch.tensor([[1, 0, 1]])
    rows = range(len(paths))  # The seed of a row is the index of its path.
    found = decoder.generate(prompt.expand(len(paths), -1), max_new_tokens=new, seed=rows)
    assert len({*found.calls}) == new  # Some paths need one call, others one per token.
    # A path that ends after c calls occurs once per continuation, so its weight is divided.
    unused = torch.cat([codes.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.int64)])
    weight = decoder.weight / unused[torch.tensor(found.calls)]
    place = (found.sequences[:, 3:] * v ** torch.arange(new - 1, -1, -1)).sum(1)
    total = torch.zeros(v**new, dtype=torch.float64).index_add(0, place, weight)
    return total, true_law(model, prompt, new, temperature, top_p)


@pytest.mark.parametrize(
    ("window", "kind", "v", "n", "temperature", "top_p"),
    [
        ("condition", "hmm", 3, 2, 1.0, 1.0),
        ("condition", "btree", 2, 3, 1.0, 1.0),
        ("condition", "cp", 3, 2, 0.7, 0.8),
        ("condition", "ff", 2, 2, 1.5, 1.0),
        ("restart", "hmm", 2, 2, 1.0, 1.0),
        ("restart", "ff", 2, 2, 1.0, 0.6),
    ],
)
def test_samples_have_the_distribution_of_the_verifier(
    window: str, kind: str, v: int, n: int, temperature: float, top_p: float
):
    total, expected = enumerate_paths(Enumerated, window, kind, v, n, temperature, top_p)
    assert expected.sum().item() == pytest.approx(1, abs=1e-12)
    assert (total - expected).abs().sum().item() / 2 < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "kind", "new"),
    [("condition", "cp", 3), ("condition", "hmm", 3), ("restart", "hmm", 2)],
)
def test_shortlist_does_not_change_the_distribution(window: str, kind: str, new: int):
    # Token 1 is never drafted, but it is emitted and then used as evidence.
    shortlist = torch.tensor([2, 0])
    total, expected = enumerate_paths(Enumerated, window, kind, 3, 2, new=new, shortlist=shortlist)
    assert expected[3**new // 2] > 1e-3  # token 1 at every position
    assert (total - expected).abs().sum().item() / 2 < 1e-12


class Dropping(Enumerated):
    """Decoder with the rule of the authors' code: a call that accepts a token discards the token
    that is drawn next. The next call drafts this position again, so its token has the law p."""

    def next_law(self, p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
        return torch.where((accepted > 0)[:, None], p, super().next_law(p, q, accepted))

    def check(self, found: Tensor, expected: Tensor) -> None:
        pass


def test_discarding_the_kept_token_changes_the_distribution():
    total, expected = enumerate_paths(Dropping, "condition", "hmm", 3, 2)
    assert total.sum().item() == pytest.approx(1, abs=1e-12)
    assert (total - expected).abs().sum().item() / 2 > 0.01


def test_tokens_forbidden_by_the_verifier_are_never_emitted():
    model, (ids, mask) = make_model("llama"), prompts(3)
    draft = make_draft(model, "hmm")
    with torch.no_grad():  # Make the draft prefer the forbidden token.
        draft.head.emit[:, :, 3] = 0
        draft.head.emit[:, :, 3, :] += 5 * draft.hidden_states(input_ids=ids).mean((0, 1)).sign()

    def forbid(_module: Any, _args: Any, logits: Tensor) -> Tensor:
        logits[..., 3] = -torch.inf
        return logits

    handle = model.get_output_embeddings().register_forward_hook(forbid)
    drafted, _ = draft.head.sample(draft.hidden_states(input_ids=ids))
    assert (drafted == 3).double().mean() > 0.4
    for window in WINDOWS:
        for seed in range(5):
            decoder = draft.decoder(window=window)
            found = decoder.generate(ids, mask, max_new_tokens=NEW, seed=10 * seed)
            assert not (found.sequences[:, ids.shape[1] :] == 3).any()
    handle.remove()


def test_top_p_keeps_the_likeliest_tokens_up_to_its_mass():
    p = torch.tensor([0.05, 0.5, 0.2, 0.25])
    kept = [nucleus(p.log(), top_p).softmax(-1) for top_p in (0.4, 0.5, 0.51, 1.0)]
    torch.testing.assert_close(kept[0], torch.tensor([0, 1.0, 0, 0]))
    torch.testing.assert_close(kept[1], torch.tensor([0, 1.0, 0, 0]))
    torch.testing.assert_close(kept[2], torch.tensor([0, 2 / 3, 0, 1 / 3]))
    torch.testing.assert_close(kept[3], p)


# -------------------------------------------------------------------------------------------------
# Batches, stop rules, statistics


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_row_depends_on_its_seed_and_not_on_its_batch(family: str, window: str):
    model, (ids, mask) = make_model(family), prompts(3)
    decoder = make_draft(model, draft_layers=1).decoder(window=window)
    together = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=3, seed=[5, 6, 7])
    again = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=3, seed=[5, 6, 7])
    assert torch.equal(together.sequences, again.sequences)
    for row in range(3):
        alone = decoder.generate(
            ids[row : row + 1, mask[row] == 1], max_new_tokens=NEW, eos_token_id=3, seed=[5 + row]
        )
        new = alone.sequences[0, int(mask[row].sum()) :]
        assert torch.equal(together.sequences[row, 6 : 6 + len(new)], new)
        assert (together.sequences[row, 6 + len(new) :] == 0).all()
        assert (alone.calls, alone.emitted) == ([together.calls[row]], [together.emitted[row]])


@pytest.mark.parametrize("window", WINDOWS)
def test_emission_stops_at_the_first_end_and_at_the_budget(window: str):
    model, (ids, mask) = make_model("llama"), prompts(3)
    decoder = make_draft(model).decoder(window=window)
    whole = decoder.generate(ids, mask, max_new_tokens=NEW, seed=4)
    assert whole.sequences.shape == (3, 6 + NEW)
    for budget in range(1, 8):
        cut = decoder.generate(ids, mask, max_new_tokens=budget, seed=4)
        assert torch.equal(cut.sequences, whole.sequences[:, : 6 + budget])
        assert all(e >= budget for e in cut.emitted)
    ends = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=[2, 4], seed=4)
    longest = 0
    for row in range(3):
        new = whole.sequences[row, 6:].tolist()
        length = next((i + 1 for i, t in enumerate(new) if t in (2, 4)), NEW)
        longest = max(longest, length)
        expected = [*new[:length], *[0] * (NEW - length)][: ends.sequences.shape[1] - 6]
        assert ends.sequences[row, 6:].tolist() == expected
    assert ends.sequences.shape[1] == 6 + longest


def test_statistics_count_calls_and_untruncated_tokens():
    model, (ids, mask) = make_model("llama"), prompts(2)
    draft = make_draft(model)
    for window, passes in (("condition", 1), ("restart", 2)):
        found = draft.decoder(window=window).generate(ids, mask, max_new_tokens=NEW)
        assert [a + c for a, c in zip(found.accepted, found.calls, strict=True)] == found.emitted
        assert all(NEW <= e < NEW + 5 for e in found.emitted)
        assert found.passes == passes * max(found.calls) - (passes - 1)
        assert found.emitted_per_call == sum(found.emitted) / sum(found.calls)
        assert found.accepted_per_call == pytest.approx(found.emitted_per_call - 1)


# -------------------------------------------------------------------------------------------------
# Seeds


def sampled(seed: Any = None, batch: int = 3) -> mtpc.Generation:
    model = make_model("llama")
    ids = prompts(1)[0].expand(batch, -1)
    return make_draft(model).decoder().generate(ids, max_new_tokens=NEW, seed=seed)


def test_calls_without_a_seed_use_torchs_generator():
    model, (ids, mask) = make_model("llama"), prompts(3)
    decoder = make_draft(model).decoder()

    def call() -> Tensor:
        return decoder.generate(ids, mask, max_new_tokens=NEW).sequences

    torch.manual_seed(3)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(call(), first) and torch.equal(call(), second)


@pytest.mark.slow
def test_rows_of_successive_seeds_all_differ():
    rows = [tuple(row) for seed in range(4) for row in sampled(seed).sequences.tolist()]
    assert len(set(rows)) == 12  # Prompts are equal, so only seeds make rows differ.
    assert torch.equal(sampled(1).sequences, sampled(1).sequences)
    assert torch.equal(sampled(1, batch=2).sequences, sampled(1).sequences[:2])
    assert len({seed for s in range(50) for seed in sampled(s, batch=2).seeds}) == 100


def test_rows_are_reproduced_by_their_recorded_seeds():
    found = sampled()
    again = sampled(found.seeds[1:], batch=2)
    assert found.seeds[1:] == again.seeds
    assert torch.equal(again.sequences, found.sequences[1:])
    assert torch.equal(sampled(found.seeds[2:], batch=1).sequences, found.sequences[2:])


def test_invalid_seeds_are_refused():
    with pytest.raises(ValueError, match="seed: expected None, one seed or 3 seeds, found 2"):
        sampled([1, 2])
    for wrong in ([1.5, 2, 3], 1.5, "abc"):
        with pytest.raises(TypeError, match="seed: expected None, an integer or 3 integers, found"):
            sampled(wrong)


# -------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("model_dtype", "head_dtype"), [("float32", "float64"), ("float64", "float32")]
)
def test_head_and_model_may_differ_in_dtype(model_dtype: str, head_dtype: str, window: str):
    model, (ids, mask) = make_model("llama").to(getattr(torch, model_dtype)), prompts(2)
    draft = make_draft(model)
    draft.head.to(getattr(torch, head_dtype))
    expected = greedy(model, ids, mask, max_new_tokens=NEW)
    decoder = draft.decoder("greedy", window)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=NEW).sequences, expected)
    sampled = draft.decoder("sample", window, top_p=0.9).generate(ids, mask, max_new_tokens=NEW)
    assert sampled.sequences.shape == expected.shape


def test_errors_name_invalid_arguments():
    model, (ids, mask) = make_model("llama"), prompts(2)
    head = make_draft(model).head
    make: Any = mtpc.SpeculativeDecoder
    other = CircuitHead(16, 6, 4, 3, "hmm")
    decoder = make(model, head)
    cases = [
        ("mode", lambda: make(model, head, mode="beam")),
        ("window", lambda: make(model, head, window="drop")),
        ("temperature", lambda: make(model, head, temperature=0)),
        ("top_p", lambda: make(model, head, top_p=0)),
        ("head", lambda: make(model, other)),
        ("max_new_tokens", lambda: decoder.generate(ids, mask, max_new_tokens=0)),
        ("max_new_tokens: .* found no value", lambda: decoder.generate(ids, mask)),
        ("input_ids", lambda: decoder.generate(ids[0], max_new_tokens=1)),
        (
            "attention_mask: expected shape",
            lambda: decoder.generate(ids, mask[:1], max_new_tokens=1),
        ),
        ("attention_mask: .*left", lambda: decoder.generate(ids, mask.flip(1), max_new_tokens=1)),
        ("seed", lambda: decoder.generate(ids, mask, max_new_tokens=1, seed=[1])),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=f"SpeculativeDecoder: {name}"):
            call()
    model.config.sliding_window, model.config.layer_types = 8, ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="full attention"):
        decoder.generate(ids, mask, max_new_tokens=1)
