"""Drafts with a bridge: a window starts after the token that the previous call has decided."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_mtpc_decoder import Enumerated, greedy, law, middle, true_law
from methods.toy import FAMILIES, make_draft, make_model, prompts, train
from torch import Tensor

from lora_ext import reference
from lora_ext.methods import mtpc
from lora_ext.nn import TokenBridge

NEW = 40


# -------------------------------------------------------------------------------------------------
# The module


def test_new_bridge_is_the_identity():
    bridge = TokenBridge(4, 6)
    h, embedded = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(bridge(h, embedded), h)


def test_bridge_adds_skip_and_gate_in_units_of_the_state():
    bridge = TokenBridge(2, 1, dtype=torch.float64)
    with torch.no_grad():
        # h / |h| = (1, 1) and e / |e| = (1, -1): gate 2, up 3, skip (5, 0), down (1, 10).
        bridge.read.weight.copy_(
            torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 4, 1, 0], [1, 0, 0, 1]])
        )
        bridge.down.weight.copy_(torch.tensor([[1], [10]]))
    found = bridge(torch.tensor([[7.0, 7.0]]), torch.tensor([[3.0, -3.0]]))
    gated = 3 * 2 / (1 + torch.tensor(-2.0, dtype=torch.float64).exp().item())
    expected = torch.tensor([[7 + 7 * (5 + gated), 7 + 7 * 10 * gated]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # The norm adds an epsilon.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_whose_squares_overflow_keep_their_size(dtype: torch.dtype):
    h, bridge = torch.full((1, 8), 3e4, dtype=dtype), TokenBridge(8, 4, dtype=dtype)
    assert torch.equal(bridge(h, torch.randn(1, 8)), h)


def test_zero_state_has_a_gradient():
    h, bridge = torch.zeros(1, 8, requires_grad=True), TokenBridge(8, 4)
    bridge(h, torch.randn(1, 8)).sum().backward()
    assert torch.equal(h.grad, torch.ones(1, 8))


def test_invalid_sizes_of_a_bridge_are_refused():
    for sizes, name in (((0, 1), "hidden_size"), ((1, 0), "width")):
        with pytest.raises(ValueError, match=f"TokenBridge: {name}: expected at least 1, found 0"):
            TokenBridge(*sizes)


# -------------------------------------------------------------------------------------------------
# Greedy


@pytest.mark.parametrize(("n", "chain", "draft_layers"), [(4, 1, 0), (4, 1, 1), (2, 2, 0)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_generate(
    family: str, batch: int, n: int, chain: int, draft_layers: int
):
    model, (ids, mask) = make_model(family), prompts(batch)
    expected = greedy(model, ids, mask, max_new_tokens=NEW)
    fields = {"n_token": n, "bridge": 8, "chain": chain, "draft_layers": draft_layers}
    draft = make_draft(model, **fields)
    train(draft, expected[:, :26], steps=10)
    found = draft.decoder(mode="greedy").generate(ids, mask, max_new_tokens=NEW)
    assert torch.equal(found.sequences, expected)
    assert 0.5 < found.accepted_per_call < 3.9


@pytest.mark.parametrize("kind", ["ff", "cp", "hmm"])
def test_greedy_tokens_do_not_depend_on_the_shortlist(kind: str):
    model, (ids, mask) = make_model("llama"), prompts(3)
    expected = greedy(model, ids, mask, max_new_tokens=NEW)
    for left_out in range(5):
        shortlist = torch.tensor([token for token in range(5) if token != left_out])
        draft = make_draft(model, kind, bridge=8, emission="adapter", shortlist=shortlist)
        found = draft.decoder(mode="greedy").generate(ids, mask, max_new_tokens=NEW)
        assert torch.equal(found.sequences, expected)


def test_greedy_window_has_the_most_likely_token_at_each_position():
    model = make_model("llama")
    shortlist = torch.tensor([0, 2, 3, 4])
    draft = make_draft(model, "hmm", noise=0.1, bridge=8, shortlist=shortlist)
    assert draft.bridge is not None
    torch.manual_seed(0)
    hidden, pending = torch.randn(64, 16, dtype=torch.float64), torch.randint(5, (64,))
    with torch.no_grad():
        found = draft.decoder(mode="greedy").draft(hidden, pending, torch.empty(0)).tokens
        circuit = draft.head.circuit(draft.bridge(hidden, model.model.embed_tokens(pending)))
    for k in range(4):
        at = torch.full((64,), k)
        dist = reference.circuit_conditional_dist("hmm", *circuit, found, at)
        assert torch.equal(dist.argmax(-1), found[:, k])
    likeliest = reference.circuit_argmax("hmm", *circuit)[0]
    assert (likeliest != found).any(1).sum() > 3  # The jointly most likely windows differ.


# -------------------------------------------------------------------------------------------------
# Distribution of samples


class EnumeratedBehind(Enumerated):
    """Decoder of a bridge: call 0 decides the first token, later calls draft whole windows."""

    def first_token(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        token, p = self.code, law(logits, self.temperature, self.top_p)
        found = super().first_token(logits, middle(p, token).float())
        weight = p[torch.arange(len(token)), token]
        assert torch.equal(found[weight > 1e-6], token[weight > 1e-6])
        self.weight[self.rows] *= weight
        return token

    def draft(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> Any:
        assert pending is not None and self.bridge is not None
        n, kind, embed = self.head.n_token, self.head.kind, self.model.get_input_embeddings()
        drafted = n * self.chain
        tokens = self.drafts[self.code // ((drafted + 1) * self.head.vocab_size)]
        uniforms = torch.zeros(len(tokens), drafted, 2)
        rows, state, before, mixtures = torch.arange(len(tokens)), hidden, pending[:, None], []
        drawn = torch.ones(len(tokens), dtype=torch.float64)
        for start in range(0, drafted, n):
            window = tokens[:, start : start + n]
            for token in before.unbind(1):
                state = self.bridge(state, embed(token))
            before, circuit = window, self.head.circuit(state)
            scan = reference.circuit_scan(kind, *circuit, window)
            drawn *= scan.conditional.sum(1).exp()
            for k in range(n):
                z = scan.posterior[:, k].argmax(-1)
                leaf = circuit.leaf[rows, k, z].softmax(-1)
                uniforms[:, start + k, 0] = middle(scan.posterior[:, k], z)
                uniforms[:, start + k, 1] = middle(leaf, window[:, k])
                at = torch.full((len(tokens),), k)
                dist = reference.circuit_conditional_dist(kind, *circuit, window, at)
                mixtures.append(dist.exp())
        self.weight[self.rows] *= drawn
        # The uniforms that lead to a less probable draft may include no float32 number.
        self.possible = drawn > 1e-6
        self.mixture = torch.stack(mixtures, 1)
        draft = mtpc.SpeculativeDecoder.draft(self, hidden, pending, uniforms)
        assert torch.equal(draft.tokens[self.possible], tokens[self.possible])
        return draft._replace(tokens=tokens)

    def uniforms(self, generators: list[torch.Generator], device: torch.device) -> Tensor:
        super().uniforms(generators, device)
        return torch.zeros(len(generators), 3 * self.drafted + 1)

    def verify(self, draft: Any, target: Tensor, pending: Tensor | None, uniforms: Tensor) -> Any:
        assert pending is None
        return super().verify(draft, target, pending, uniforms)

    def head_conditional(self, draft: Any, k: int) -> Tensor:
        return self.mixture[:, k]


@pytest.mark.parametrize(
    ("kind", "v", "n", "chain", "temperature", "top_p", "shortlist"),
    [
        ("hmm", 2, 2, 1, 1.0, 1.0, None),
        ("cp", 3, 1, 1, 0.7, 0.8, None),
        ("ff", 2, 1, 2, 1.5, 1.0, None),
        ("cp", 3, 1, 2, 1.0, 1.0, (0, 2)),
        ("hmm", 2, 2, 2, 1.0, 1.0, None),
    ],
)
def test_samples_have_the_distribution_of_the_verifier(
    kind: str,
    v: int,
    n: int,
    chain: int,
    temperature: float,
    top_p: float,
    shortlist: tuple[int, ...] | None,
):
    new, prompt = 3, torch.tensor([[1, 0, 1]])
    model = make_model("llama", vocab=v, layers=1, width=8)
    listed = None if shortlist is None else torch.tensor(shortlist)
    draft = make_draft(model, kind, n_token=n, noise=1.0, bridge=4, shortlist=listed)
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    settings |= {"bridge": draft.bridge, "chain": chain}
    decoder = EnumeratedBehind(model, draft.head, **settings)
    k = n * chain
    codes = torch.tensor([v, *[v**k * (k + 1) * v] * (new - 1)])
    paths = torch.cartesian_prod(*(torch.arange(c) for c in codes))
    windows: Any = torch.tensor(list(itertools.product(range(v), repeat=k))).view(-1, k)
    decoder.follow(paths, windows)
    rows = range(len(paths))  # The seed of a row is the index of its path.
    found = decoder.generate(prompt.expand(len(paths), -1), max_new_tokens=new, seed=rows)
    assert {*found.calls} == {1, 2}
    unused = torch.cat([codes.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.int64)])
    weight = decoder.weight / unused[torch.tensor(found.calls) + 1]
    place = (found.sequences[:, 3:] * v ** torch.arange(new - 1, -1, -1)).sum(1)
    total = torch.zeros(v**new, dtype=torch.float64).index_add(0, place, weight)
    expected = true_law(model, prompt, new, temperature, top_p)
    assert expected.sum().item() == pytest.approx(1, abs=1e-12)
    assert (total - expected).abs().sum().item() / 2 < 1e-12


# -------------------------------------------------------------------------------------------------
# Stop rules, statistics, batches


def test_first_token_needs_no_call():
    model, (ids, mask) = make_model("llama"), prompts(2)
    decoder = make_draft(model, bridge=8).decoder()
    one = decoder.generate(ids, mask, max_new_tokens=1, seed=4)
    assert (one.calls, one.emitted, one.passes) == ([0, 0], [0, 0], 0)
    whole = decoder.generate(ids, mask, max_new_tokens=NEW, seed=4)
    assert torch.equal(whole.sequences[:, :7], one.sequences)
    assert [a + c for a, c in zip(whole.accepted, whole.calls, strict=True)] == whole.emitted
    assert all(NEW - 1 <= e < NEW + 4 for e in whole.emitted)
    assert whole.passes == max(whole.calls)


def test_row_depends_on_its_seed_and_not_on_its_batch():
    model, (ids, mask) = make_model("llama"), prompts(3)
    decoder = make_draft(model, n_token=2, bridge=8, chain=2, draft_layers=1).decoder()
    ended = set()
    for end in range(5):
        settings: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": end}
        together = decoder.generate(ids, mask, seed=[5, 6, 7], **settings)
        for row in range(3):
            alone = decoder.generate(ids[row : row + 1, mask[row] == 1], seed=[5 + row], **settings)
            new = alone.sequences[0, int(mask[row].sum()) :]
            assert torch.equal(together.sequences[row, 6 : 6 + len(new)], new)
            assert (together.sequences[row, 6 + len(new) :] == 0).all()
            ended.add(len(new))
    assert 1 in ended and len(ended) > 4  # Some row ends with its first token.


# -------------------------------------------------------------------------------------------------
# Training, files, errors


@pytest.mark.parametrize(("beta", "n", "chain"), [(0.0, 2, 1), (0.5, 2, 1), (0.5, 1, 2)])
def test_loss_equals_that_of_windows_after_the_next_token(beta: float, n: int, chain: int):
    model, (ids, mask) = make_model("llama"), prompts(2, length=9)
    draft = make_draft(model, "cp", n_token=n, bridge=8, chain=chain, beta=beta)
    assert draft.bridge is not None
    labels = ids.clone()
    labels[:, :3] = -100
    loss, each = draft.loss(ids, labels, mask)
    total, count, divergence = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    embed = model.get_input_embeddings()
    for row in range(2):
        own, label = ids[row, mask[row] == 1], labels[row, mask[row] == 1]
        with torch.no_grad():
            hidden = draft.hidden_states(input_ids=own[None])[0]
            logits = model(own[None]).logits[0]
        for t, k in itertools.product(range(len(own)), range(2)):
            if t + 2 + k >= len(own) or label[t + 2 + k] == -100:
                continue
            state = hidden[t : t + 1]
            for j in range(1 + (k if n == 1 else 0)):
                state = draft.bridge(state, embed(own[t + 1 + j])[None])
            # A token that is not a target is marginalised within its window.
            window = label[None, t + 2 + (k if n == 1 else 0) :][:, :n].clamp(min=-1)
            window = torch.cat([window, window.new_zeros(1, n)], 1)[:, :n]
            at = torch.tensor([k if n == 2 else 0])
            dist = reference.circuit_conditional_dist("cp", *draft.head.circuit(state), window, at)
            p = logits[t + 1 + k].log_softmax(-1)
            total[k] -= dist[0, own[t + 2 + k]].item()
            divergence[k] += (p.exp() * (p - dist[0])).sum().item()
            count[k] += 1
    expected = ((1 - beta) * total + beta * divergence) / count
    torch.testing.assert_close(each.float(), expected, rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(((expected[0] + 0.9 * expected[1]) / 1.9).item(), rel=1e-5)


def test_bridge_trains_with_the_head_and_the_model_stays_frozen():
    model, (ids, _) = make_model("llama"), prompts(1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    draft = make_draft(model, bridge=8)
    assert draft.bridge is not None
    start = draft.bridge.down.weight.clone()
    first = train(draft, ids, steps=1)
    assert train(draft, ids, steps=20) < first
    assert not torch.equal(draft.bridge.down.weight, start)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_saved_draft_restores_its_bridge(tmp_path: Path):
    model, (ids, mask) = make_model("llama"), prompts(2)
    draft = make_draft(model, bridge=8, shortlist=torch.tensor([0, 1, 3]))
    draft.save(tmp_path)
    loaded = mtpc.Draft.load(model, tmp_path)
    assert loaded.config == draft.config and loaded.config.bridge == 8
    for name, value in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    found = [d.decoder().generate(ids, mask, max_new_tokens=9, seed=1) for d in (draft, loaded)]
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_bridge_and_head_may_be_saved_in_two_dtypes(tmp_path: Path):
    model = make_model("llama")
    draft = make_draft(model, bridge=8)
    draft.bridge.bfloat16()
    draft.save(tmp_path)
    loaded = mtpc.Draft.load(model, tmp_path)
    for name, value in draft.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == value.dtype and torch.equal(found, value)


@pytest.mark.parametrize("chain", [1025, 10**9, 10**30])
def test_chain_in_a_file_is_limited(tmp_path: Path, chain: int):
    model = make_model("llama")
    make_draft(model, bridge=8).save(tmp_path)
    path = tmp_path / "mtpc_config.json"
    path.write_text(path.read_text().replace('"chain": 1', f'"chain": {chain}'))
    with pytest.raises(ValueError, match="chain: expected an integer up to 1024, found 10"):
        mtpc.Draft.load(model, tmp_path)


def test_file_without_the_bridge_is_refused(tmp_path: Path):
    model = make_model("llama")
    draft = make_draft(model)
    draft.config = dataclasses.replace(draft.config, bridge=8)
    draft.save(tmp_path)
    with pytest.raises(ValueError, match=r"bridge\.down\.weight: expected \(16, 8\), found none"):
        mtpc.Draft.load(model, tmp_path)


def test_errors_name_invalid_arguments():
    model = make_model("llama")
    draft = make_draft(model, bridge=8)
    with pytest.raises(ValueError, match="window: expected 'condition' with a bridge"):
        draft.decoder(window="restart")
    with pytest.raises(ValueError, match="bridge: expected width 16 as in the model, found 17"):
        mtpc.SpeculativeDecoder(model, draft.head, bridge=TokenBridge(17, 8))
    with pytest.raises(
        ValueError, match="MtpcConfig: bridge: expected an integer from 0, found -1"
    ):
        mtpc.MtpcConfig(bridge=-1)
    for chain in (0, -1):
        with pytest.raises(ValueError, match=f"chain: expected 1, or more with a br.*{chain}"):
            draft.decoder(chain=chain)
    for chain in (2.0, True, "2", None):
        with pytest.raises(
            ValueError, match=f"MtpcConfig: chain: expected an integer up to 1024, found {chain!r}"
        ):
            mtpc.MtpcConfig(bridge=8, chain=chain)
        with pytest.raises(
            ValueError, match=f"bridge: expected an integer from 0, found {chain!r}"
        ):
            mtpc.MtpcConfig(bridge=chain)
    for chain in (2.5, True, "2"):
        with pytest.raises(ValueError, match=f"chain: expected an int, found {chain!r}"):
            draft.decoder(chain=chain)
    with pytest.raises(ValueError, match="MtpcConfig: chain: expected 1, or more with a bridge"):
        mtpc.MtpcConfig(chain=2)
    with pytest.raises(ValueError, match="chain: expected 1, or more with a bridge, found 2"):
        make_draft(model).decoder(chain=2)
