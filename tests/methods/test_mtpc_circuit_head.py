"""`CircuitHead`: distributions, special cases, evidence, state and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuit_heads import DOUBLE, KINDS, D, K, V, hidden, make, windows
from torch.nn import functional as F

from lora_ext import reference
from lora_ext.layers.labels import IGNORE
from lora_ext.methods.mtpc import MtpcConfig, layers
from lora_ext.methods.mtpc._emission import EMISSIONS
from lora_ext.nn import CircuitHead


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_windows_sum_to_one(kind: str, emission: str):
    head, x = make(kind, emission), windows()
    h = hidden(1).expand(len(x), D)
    log_prob = head.log_prob(h, x)
    assert log_prob[:, -1].exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (log_prob[:, 1:] <= log_prob[:, :-1]).all()
    torch.testing.assert_close(head.conditionals(h, x).cumsum(-1), log_prob)


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_equals_the_formula_on_the_logits_of_circuit(kind: str, emission: str):
    # Training and decoding represent the same distribution by different logits.
    head, h = make(kind, emission), hidden(2, 3)
    x = torch.randint(0, V, (2, 3, K))
    x[0, 1, 2] = IGNORE
    expected = reference.circuit_scan(kind, *head.circuit(h), torch.where(x < 0, -1, x).view(-1, K))
    torch.testing.assert_close(head.log_prob(h, x).view(-1, K), expected.prefix)


def test_emissions_equal_their_formulas():
    h = hidden(2)
    head = make("cp", "expander")
    expected = torch.einsum("vd,kcde,ne->nkcv", head.unembed, head.maps, h)
    torch.testing.assert_close(head.circuit(h).leaf, expected)
    head = make("cp", "adapter")
    a, b = (t.unflatten(0, (K, -1)) for t in (head.lora_A, head.lora_B))
    states = h[:, None, None] + torch.einsum("kcdr,kcre,ne->nkcd", b, a, h)
    torch.testing.assert_close(head.circuit(h).leaf, states @ head.unembed.t())


@pytest.mark.parametrize("kind", KINDS)
def test_full_conditional_equals_the_conditionals_of_every_token(kind: str):
    head, h, x = make(kind), hidden(V), torch.randint(0, V, (V, K))
    for k in range(K):
        prefix, same = x[:1].repeat(V, 1), h[:1].expand(V, D)
        prefix[:, k] = torch.arange(V)
        dist = head.full_conditional(h[:1], x[:1], k)[0]
        torch.testing.assert_close(dist, head.conditionals(same, prefix)[:, k])
    per_row = torch.arange(V)
    both = head.full_conditional(h, x, per_row)
    for row in range(V):
        alone = head.full_conditional(h[row : row + 1], x[row : row + 1], row)
        torch.testing.assert_close(both[row : row + 1], alone)


def test_hmm_and_btree_with_identity_transitions_equal_the_mixture():
    cp, x = make("cp"), windows()
    h = hidden(1).expand(len(x), D)
    for kind in ("hmm", "btree"):
        head = make(kind)
        with torch.no_grad():
            head.emit.copy_(cp.emit)
            head.prior.copy_(cp.prior)
            head.trans.zero_()
            head.trans_bias.copy_(torch.eye(3).expand_as(head.trans_bias).log())
        torch.testing.assert_close(head.log_prob(h, x), cp.log_prob(h, x))


def test_mixture_of_one_component_equals_the_factorised_head():
    ff, cp, x = make("ff"), make("cp", rank=1), windows()
    with torch.no_grad():
        cp.emit.copy_(ff.emit)
    h = hidden(1).expand(len(x), D)
    torch.testing.assert_close(cp.log_prob(h, x), ff.log_prob(h, x))


def test_tree_over_two_positions_equals_the_mixture():
    cp, tree, x = make("cp", n_token=2), make("btree", n_token=2), windows(2)
    assert tree.trans is None and tree.trans_bias is None
    tree.load_state_dict(cp.state_dict())
    h = hidden(1).expand(len(x), D)
    torch.testing.assert_close(tree.log_prob(h, x), cp.log_prob(h, x))


def test_head_of_one_token_is_a_mixture_of_softmaxes():
    head, h = make("cp", n_token=1), hidden(5)
    w = F.linear(h, head.prior).softmax(-1)
    p = torch.einsum(
        "nc,ncv->nv", w, F.linear(h, head.emit.flatten(0, 2)).view(5, 3, V).softmax(-1)
    )
    x = torch.randint(0, V, (5, 1))
    torch.testing.assert_close(head.log_prob(h, x).exp(), p.gather(1, x))


@pytest.mark.parametrize("kind", ["hmm", "btree"])
def test_options_of_transitions_change_stored_parameters(kind: str):
    m = {"hmm": K - 1, "btree": K - 2}[kind]
    free = make(kind, contextual=False)
    assert free.trans is None and free.trans_bias.shape == (m, 3, 3)
    trans = free.circuit(hidden(2)).trans
    torch.testing.assert_close(trans[0], trans[1])
    shared = make(kind, share_transitions=True)
    assert shared.trans.shape == (1, 3, 3, D)
    trans = shared.circuit(hidden(2)).trans
    assert trans.shape == (2, m, 3, 3)
    torch.testing.assert_close(trans[:, 0], trans[:, -1])
    assert not torch.equal(trans[0], trans[1])


def test_transitions_initially_keep_the_state():
    head = CircuitHead(D, V, K, 8, "hmm")
    stay = head.circuit(torch.zeros(1, D)).trans.softmax(-1).diagonal(dim1=-2, dim2=-1)
    assert stay.min() > 0.98
    even = CircuitHead(D, V, K, 8, "hmm", init_identity=False).circuit(torch.zeros(1, D)).trans
    assert even.softmax(-1).max() < 0.14


def test_init_from_lm_head_gives_every_component_the_lm_head():
    weight, h = torch.randn(2 * V, D, dtype=DOUBLE), hidden(3)
    head = CircuitHead(D, V, K, 3, "btree", dtype=DOUBLE)
    before = head.circuit(h).leaf
    head.init_from_lm_head(weight, num_blocks=2)
    leaf = head.circuit(h).leaf.softmax(-1)
    for k in range(2):
        expected = F.linear(h, weight[k * V : (k + 1) * V]).softmax(-1)
        torch.testing.assert_close(leaf[:, k], expected[:, None].expand(3, 3, V))
    # Positions for which the weight has no block stay unchanged.
    torch.testing.assert_close(leaf[:, 2:], before[:, 2:].softmax(-1))
    for emission in ("expander", "adapter"):
        head = CircuitHead(D, V, K, 3, "btree", emission, dtype=DOUBLE)
        head.init_from_lm_head(weight, num_blocks=2)
        leaf = head.circuit(h).leaf.softmax(-1)
        expected = F.linear(h, weight[:V]).softmax(-1)
        torch.testing.assert_close(leaf, expected[:, None, None].expand_as(leaf))


def test_adapter_emission_shares_the_frozen_unembedding():
    weight = torch.randn(V, D)
    head = CircuitHead(D, V, K, 3, "cp", "adapter")
    head.init_from_lm_head(weight)
    assert head.unembed.data_ptr() == weight.data_ptr()
    assert "unembed" not in dict(head.named_parameters()) and "unembed" in head.state_dict()


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_determined_by_uniforms_and_have_their_conditionals(kind: str, emission: str):
    head, h = make(kind, emission), hidden(2, 3)
    uniforms = torch.rand(2, 3, K, 2)
    tokens, conditional = head.sample(h, uniforms=uniforms)
    again, _ = head.sample(h, uniforms=uniforms)
    assert torch.equal(tokens, again) and tokens.shape == (2, 3, K)
    torch.testing.assert_close(conditional, head.conditionals(h, tokens))
    given = torch.full((2, 3, K), IGNORE)
    given[..., :2] = 1
    tokens, conditional = head.sample(h, given, generator=torch.Generator().manual_seed(0))
    assert (tokens[..., :2] == 1).all()
    torch.testing.assert_close(conditional, head.conditionals(h, tokens))


def test_samples_have_the_frequencies_of_the_distribution():
    head, x = make("hmm", n_token=2), windows(2)
    h = hidden(1)
    p = head.log_prob(h.expand(len(x), D), x)[:, -1].exp()
    n = 20_000
    tokens, _ = head.sample(h.expand(n, D), generator=torch.Generator().manual_seed(1))
    found = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V)
    chi = ((found - n * p) ** 2 / (n * p)).sum().item()
    assert chi < 26.1  # 0.999 quantile of chi-square with 8 degrees of freedom


def test_argmax_accepts_evidence_and_is_the_mode_of_the_factorised_head():
    head, h = make("ff"), hidden(2, 3)
    tokens, value = head.argmax(h)
    assert torch.equal(tokens, head.circuit(h).leaf.argmax(-1).view(2, 3, K))
    torch.testing.assert_close(value, head.log_prob(h, tokens)[..., -1])
    given = torch.full((2, 3, K), IGNORE)
    given[..., 0] = 2
    assert (head.argmax(h, given)[0][..., 0] == 2).all()


@pytest.mark.parametrize("emission", EMISSIONS)
def test_empty_batch_gives_empty_results_and_zero_gradients(emission: str):
    head, h, x = make("hmm", emission), hidden(0), torch.empty(0, K, dtype=torch.int64)
    assert head.log_prob(h, x).shape == (0, K) and head.sample(h)[0].shape == (0, K)
    assert head.full_conditional(h, x, 0).shape == (0, V) and head.argmax(h)[1].shape == (0,)
    total = head.conditionals(h, x).sum()
    total.backward()
    assert total == 0
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_parameters_give_float32_results_near_float64(dtype: torch.dtype):
    head, h, x = make("btree"), hidden(4), torch.randint(0, V, (4, K))
    narrow = CircuitHead(D, V, K, 3, "btree", dtype=dtype)
    narrow.load_state_dict(head.state_dict())
    found, expected = narrow.log_prob(h.to(dtype), x), head.log_prob(h, x)
    assert found.dtype == torch.float32
    # Logits are about 2.5; parameters and logits have 8 (bfloat16) or 24 significant bits.
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.3}[dtype]
    assert (found - expected).abs().max() < bound


# -------------------------------------------------------------------------------------------------
# State and errors


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_restores_the_distribution(kind: str, emission: str):
    head, h = make(kind, emission), hidden(3)
    other = CircuitHead(D, V, K, KINDS[kind], kind, emission, adapter_rank=2, dtype=DOUBLE)
    other.load_state_dict(head.state_dict())
    x = torch.randint(0, V, (3, K))
    assert torch.equal(other.log_prob(h, x), head.log_prob(h, x))


def test_shared_lm_head_is_never_written():
    weight = torch.randn(V, D, dtype=DOUBLE)
    before = weight.clone()
    head = CircuitHead(D, V, K, 3, "cp", "adapter", dtype=DOUBLE)
    head.init_from_lm_head(weight)
    head.load_state_dict(head.state_dict())  # Values are equal, so the memory stays shared.
    assert head.unembed.data_ptr() == weight.data_ptr()
    head.load_state_dict({k: t + 1 for k, t in head.state_dict().items()})
    assert torch.equal(weight, before) and torch.equal(head.unembed, before + 1)
    head.init_from_lm_head(weight)
    head.reset_parameters()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n_token": 0}, "n_token"),
        ({"rank": 0}, "rank"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"kind": "pcfg"}, "kind"),
        ({"emission": "mlp"}, "emission"),
        ({"kind": "ff", "rank": 2}, "rank"),
        ({"kind": "hmm", "rank": 1}, "rank"),
        ({"kind": "btree", "n_token": 1}, "n_token"),
        ({"adapter_rank": 0}, "adapter_rank"),
    ],
)
def test_errors_name_invalid_sizes(options: dict[str, Any], name: str):
    sizes = {"hidden_size": D, "vocab_size": V, "n_token": K, "rank": 3, "kind": "cp"}
    with pytest.raises(ValueError, match=f"CircuitHead: {name}: expected .*, found"):
        CircuitHead(**{**sizes, **options})


def test_leaves_larger_than_the_free_memory_are_refused_before_allocation(monkeypatch):
    sizes = (576, 49152, 8, 8, "btree")
    monkeypatch.setattr(layers, "free_bytes", lambda device: 3_000_000_000)
    with pytest.raises(ValueError) as caught:
        CircuitHead(*sizes, emission="full")
    message = str(caught.value)
    assert message.startswith("CircuitHead: emission: expected leaves that fit into the free mem")
    assert 'use emission="adapter", a shortlist' in message
    size = "8 positions x 8 components x 49152 tokens x width 576"
    assert f"of 3.0 GB, found 'full' of {size}, which takes 7.2 GB" in message
    monkeypatch.undo()
    # This needs more memory than any machine has, so the real function can be called.
    with pytest.raises(ValueError, match=r"found 'adapter' .*; use a shortlist or a smaller"):
        CircuitHead(1 << 20, 1 << 40, 1, 1, "ff", emission="adapter")


def test_default_emission_depends_on_the_number_of_drafted_tokens():
    for count, emission in ((4096, "full"), (4097, "adapter"), (49152, "adapter")):
        assert MtpcConfig(rank=8).for_tokens(count).emission == emission
    assert MtpcConfig(emission="expander").for_tokens(9).emission == "expander"


def test_unsupported_dtypes_are_refused():
    with pytest.raises(NotImplementedError, match="dtype"):
        CircuitHead(D, V, K, 3, "cp", dtype=torch.float8_e4m3fn)


def test_errors_name_invalid_inputs():
    head, h, x = make("cp"), hidden(2, 3), torch.zeros(2, 3, K, dtype=torch.int64)
    gap = x.clone()
    gap[0, 0, 1] = IGNORE
    cases = [
        (ValueError, "evidence: expected -100 only at the end", lambda: head.sample(h, gap)),
        (ValueError, "evidence: expected -100 only at the end", lambda: head.argmax(h, gap)),
        (TypeError, "h: expected a floating", lambda: head.log_prob(h.long(), x)),
        (TypeError, "tokens: expected int64", lambda: head.log_prob(h, x.double())),
        (ValueError, "h: expected shape", lambda: head.log_prob(h[..., :-1], x)),
        (ValueError, "tokens: expected shape", lambda: head.log_prob(h, x[..., :-1])),
        (ValueError, "tokens: expected shape", lambda: head.log_prob(h, x[:1])),
        (ValueError, "tokens: expected ids in", lambda: head.log_prob(h, x + V)),
        (ValueError, "tokens: expected ids in", lambda: head.sample(h, x - 1)),
        (
            ValueError,
            r"k: expected positions in \[0, 4\), found 4",
            lambda: head.full_conditional(h, x, K),
        ),
        (
            ValueError,
            "k: expected one position or shape",
            lambda: head.full_conditional(h, x, torch.zeros(3, dtype=torch.int64)),
        ),
        (TypeError, "k: expected int64", lambda: head.full_conditional(h, x, torch.zeros(2, 3))),
        (ValueError, "uniforms: expected shape", lambda: head.sample(h, uniforms=torch.rand(2, K))),
        (ValueError, "init_from_lm_head: weight", lambda: head.init_from_lm_head(torch.ones(V, 2))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


# -------------------------------------------------------------------------------------------------
# Autocast and names


@pytest.mark.parametrize("contextual", [True, False])
@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_results_only_by_its_rounding(kind: str, emission: str, contextual: bool):
    head = make(kind, emission, contextual=contextual, dtype=torch.float32)
    h, x = hidden(3).float(), torch.randint(0, V, (3, K))
    exact = head.log_prob(h, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.log_prob(h, x)
        tokens, conditional = head.sample(h, uniforms=torch.rand(3, K, 2))
        dist = head.full_conditional(h, x, 1)
    assert found.dtype == torch.float32
    # Logits up to 60 are rounded to 8 bits: the error is 0.125 at each of four positions.
    assert (found - exact).abs().max() < 1
    assert conditional.isfinite().all() and tokens.max() < V
    torch.testing.assert_close(dist.exp().sum(-1), torch.ones(3))
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("emission", "names"),
    [("full", {"emit"}), ("expander", {"maps", "unembed"}), ("adapter", {"lora_A", "lora_B"})],
)
def test_parameters_of_the_leaves_are_attributes_of_the_head(emission: str, names: set[str]):
    head = make("hmm", emission)
    assert all(getattr(head, name) is getattr(head.leaves, name) for name in names)
    assert head.trans is head.sums.trans and not hasattr(head, "other")
    saved = {
        *names,
        "prior",
        "trans",
        "trans_bias",
        *({"unembed"} - names if emission != "full" else ()),
    }
    assert head.state_dict().keys() == saved
    inside = torch.nn.Sequential(torch.nn.Identity(), head)
    assert inside.state_dict().keys() == {f"1.{name}" for name in saved}
    other = torch.nn.Sequential(torch.nn.Identity(), make("hmm", emission))
    with torch.no_grad():
        other[1].prior.zero_()
    other.load_state_dict(inside.state_dict())
    assert torch.equal(other[1].prior, head.prior)
    assert not hasattr(head, {"full": "maps", "expander": "lora_A", "adapter": "emit"}[emission])
    with pytest.raises(RuntimeError, match=f"Missing.*{min(names)}"):
        head.load_state_dict({"prior": head.prior})
    with pytest.raises(RuntimeError, match=r"Unexpected.*other"):
        head.load_state_dict({**head.state_dict(), "other": head.prior})
