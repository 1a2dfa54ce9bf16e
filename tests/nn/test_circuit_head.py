"""CircuitHead: distributions, limits, loss, evidence, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext import reference
from lora_ext.nn import CircuitHead
from lora_ext.nn.circuit_head import EMISSIONS, IGNORE

KINDS = {"ff": 1, "cp": 3, "hmm": 3, "btree": 3}
D, V, K = 6, 3, 4
DOUBLE = torch.float64


def make(kind: str, emission: str = "full", n_token: int = K, **options: Any) -> CircuitHead:
    """A head with parameters of size one, so that components and contexts differ."""
    torch.manual_seed(7)
    options = {"rank": KINDS[kind], "adapter_rank": 2, "dtype": DOUBLE, **options}
    head = CircuitHead(D, V, n_token, kind=kind, emission=emission, **options)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, dtype=DOUBLE))
        if emission == "adapter":
            head.unembed.copy_(torch.randn(head.unembed.shape, dtype=DOUBLE))
    return head


def hidden(*leading: int) -> Tensor:
    return torch.randn(*leading, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def windows(n_token: int = K) -> Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=n_token)))


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
def test_log_prob_is_the_formula_on_the_logits_of_circuit(kind: str, emission: str):
    """Training never sees the logits that decoding sees; both are one distribution."""
    head, h = make(kind, emission), hidden(2, 3)
    x = torch.randint(0, V, (2, 3, K))
    x[0, 1, 2] = IGNORE
    expected = reference.circuit_scan(kind, *head.circuit(h), torch.where(x < 0, -1, x).view(-1, K))
    torch.testing.assert_close(head.log_prob(h, x).view(-1, K), expected.prefix)


def test_emissions_are_their_formulas():
    h = hidden(2)
    head = make("cp", "expander")
    expected = torch.einsum("vd,kcde,ne->nkcv", head.unembed, head.maps, h)
    torch.testing.assert_close(head.circuit(h).leaf, expected)
    head = make("cp", "adapter")
    a, b = (t.unflatten(0, (K, -1)) for t in (head.lora_A, head.lora_B))
    states = h[:, None, None] + torch.einsum("kcdr,kcre,ne->nkcd", b, a, h)
    torch.testing.assert_close(head.circuit(h).leaf, states @ head.unembed.t())


@pytest.mark.parametrize("kind", KINDS)
def test_full_conditional_is_the_conditional_of_every_token(kind: str):
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


def test_identity_transitions_make_hmm_and_btree_the_mixture():
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


def test_a_mixture_of_one_component_is_the_factorised_head():
    ff, cp, x = make("ff"), make("cp", rank=1), windows()
    with torch.no_grad():
        cp.emit.copy_(ff.emit)
    h = hidden(1).expand(len(x), D)
    torch.testing.assert_close(cp.log_prob(h, x), ff.log_prob(h, x))


def test_a_tree_over_two_positions_is_the_mixture():
    cp, tree, x = make("cp", n_token=2), make("btree", n_token=2), windows(2)
    assert tree.trans is None and tree.trans_bias is None
    tree.load_state_dict(cp.state_dict())
    h = hidden(1).expand(len(x), D)
    torch.testing.assert_close(tree.log_prob(h, x), cp.log_prob(h, x))


def test_one_token_is_a_mixture_of_softmaxes():
    head, h = make("cp", n_token=1), hidden(5)
    w = F.linear(h, head.prior).softmax(-1)
    p = torch.einsum(
        "nc,ncv->nv", w, F.linear(h, head.emit.flatten(0, 2)).view(5, 3, V).softmax(-1)
    )
    x = torch.randint(0, V, (5, 1))
    torch.testing.assert_close(head.log_prob(h, x).exp(), p.gather(1, x))


# -------------------------------------------------------------------------------------------------
# Shortlist


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shortlist_is_the_head_of_a_smaller_vocabulary(kind: str, emission: str):
    shortlist = torch.tensor([4, 0, 3])  # in any order; kept in ascending order
    small = make(kind, emission)
    head = CircuitHead(D, 5, K, KINDS[kind], kind, emission, 2, dtype=DOUBLE, shortlist=shortlist)
    head.load_state_dict({**small.state_dict(), "shortlist": shortlist.sort().values})
    x = windows()
    h, listed = hidden(1).expand(len(x), D), torch.tensor([0, 3, 4])
    torch.testing.assert_close(head.log_prob(h, listed[x]), small.log_prob(h, x))
    wide, dense = head.circuit(h[:2]).leaf, small.circuit(h[:2]).leaf
    torch.testing.assert_close(wide[..., listed], dense)
    assert (wide[..., [1, 2]] == -torch.inf).all()
    outside = listed[x]
    outside[:, 2] = 1
    log_prob = head.log_prob(h, outside)
    torch.testing.assert_close(log_prob[:, :2], small.log_prob(h, x)[:, :2])
    assert (log_prob[:, 2:] == -torch.inf).all()
    dist = head.full_conditional(h, listed[x], 1)
    torch.testing.assert_close(dist[:, listed], small.full_conditional(h, x, 1))
    assert (dist[:, [1, 2]] == -torch.inf).all()
    uniforms = torch.rand(len(x), K, 2)
    tokens = head.sample(h, uniforms=uniforms)[0]
    assert torch.equal(tokens, listed[small.sample(h, uniforms=uniforms)[0]])
    assert torch.equal(head.argmax(h)[0], listed[small.argmax(h)[0]])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_loss_marginalises_what_is_not_on_the_shortlist(beta: float):
    small, listed = make("hmm"), torch.tensor([0, 3, 4])
    head = CircuitHead(D, 5, K, 3, "hmm", dtype=DOUBLE, shortlist=listed)
    head.load_state_dict({**small.state_dict(), "shortlist": listed})
    h, x = hidden(2, 5), torch.randint(0, V, (2, 5, K))
    teacher = torch.randn(2, 5, K, 5, dtype=DOUBLE)
    wide = listed[x]
    x[0, :3, 1], wide[0, :3, 1] = IGNORE, 2
    x[1, :, 0], wide[1, :, 0] = IGNORE, 1
    found = head.loss(h, wide, beta=beta, teacher_logits=teacher)
    expected = small.loss(h, x, beta=beta, teacher_logits=teacher[..., listed])
    torch.testing.assert_close(found, expected)
    found[0].backward()
    expected[0].backward()
    torch.testing.assert_close(head.emit.grad, small.emit.grad)


def test_a_teacher_that_forbids_the_shortlist_leaves_finite_gradients():
    head = CircuitHead(D, 5, K, 3, "hmm", dtype=DOUBLE, shortlist=[0, 3])
    labels = torch.tensor([[0, 3, 1, 0]])
    teacher = torch.zeros(1, K, 5, dtype=DOUBLE)
    teacher[0, 1:3, [0, 3]] = -torch.inf  # where the label counts, and where it does not
    loss, each = head.loss(hidden(1), labels, beta=0.5, teacher_logits=teacher)
    loss.backward()
    assert each.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_a_state_dict_brings_its_shortlist_or_is_refused():
    listed, other = (CircuitHead(D, 9, K, 3, "cp", shortlist=ids) for ids in ([8, 5], [0, 1]))
    state = listed.state_dict()
    other.load_state_dict(state)
    h, x = hidden(2).float(), torch.randint(9, (2, K))
    assert torch.equal(other.log_prob(h, x), listed.log_prob(h, x))
    with pytest.raises(ValueError, match=r"shortlist: expected ids in \[0, 7\), found 5 to 8"):
        CircuitHead(D, 7, K, 3, "cp", shortlist=[0, 1]).load_state_dict(state)
    with pytest.raises(ValueError, match="shortlist: expected ascending ids"):
        other.load_state_dict({**state, "shortlist": torch.tensor([8, 5])})
    with torch.device("meta"):
        head = CircuitHead(D, 9, K, 3, "cp", shortlist=[8, 5])
    head.load_state_dict(state, assign=True)
    assert torch.equal(head.log_prob(h, x), listed.log_prob(h, x))


def test_a_shortlist_takes_its_rows_of_the_lm_head():
    weight, h, listed = torch.randn(5, D, dtype=DOUBLE), hidden(3), torch.tensor([0, 3, 4])
    for emission in EMISSIONS:
        options = {"dtype": DOUBLE, "shortlist": listed}
        head = CircuitHead(D, 5, K, 3, "btree", emission, **options)
        head.init_from_lm_head(weight)
        leaf = head.circuit(h).leaf[:, 0, 0, listed]
        torch.testing.assert_close(leaf, F.linear(h, weight[listed]))


@pytest.mark.parametrize(
    ("shortlist", "error"),
    [
        (torch.tensor([1, 1]), "distinct"),
        (torch.tensor([0, 3]), r"ids in \[0, 3\), found 0 to 3"),
        (torch.tensor([-1, 0]), r"found -1 to 0"),
        (torch.tensor([1]), "L >= 2"),
        (torch.tensor([], dtype=torch.int64), "L >= 2"),
        (torch.tensor([[0, 1]]), r"found \(1, 2\)"),
    ],
)
def test_wrong_shortlists_are_named(shortlist: Tensor, error: str):
    with pytest.raises(ValueError, match=f"CircuitHead: shortlist: .*{error}"):
        CircuitHead(D, V, K, 3, "cp", shortlist=shortlist)
    with pytest.raises(TypeError, match="CircuitHead: shortlist: expected int64"):
        CircuitHead(D, V, K, 3, "cp", shortlist=torch.tensor([0, 1], dtype=torch.int32))


@pytest.mark.parametrize("kind", ["hmm", "btree"])
def test_options_of_transitions_store_what_they_say(kind: str):
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


def test_transitions_start_by_keeping_the_state():
    head = CircuitHead(D, V, K, 8, "hmm")
    stay = head.circuit(torch.zeros(1, D)).trans.softmax(-1).diagonal(dim1=-2, dim2=-1)
    assert stay.min() > 0.98
    even = CircuitHead(D, V, K, 8, "hmm", init_identity=False).circuit(torch.zeros(1, D)).trans
    assert even.softmax(-1).max() < 0.14


def test_init_from_lm_head_makes_every_component_the_language_model():
    weight, h = torch.randn(2 * V, D, dtype=DOUBLE), hidden(3)
    head = CircuitHead(D, V, K, 3, "btree", dtype=DOUBLE)
    before = head.circuit(h).leaf
    head.init_from_lm_head(weight, num_blocks=2)
    leaf = head.circuit(h).leaf.softmax(-1)
    for k in range(2):
        expected = F.linear(h, weight[k * V : (k + 1) * V]).softmax(-1)
        torch.testing.assert_close(leaf[:, k], expected[:, None].expand(3, 3, V))
    torch.testing.assert_close(leaf[:, 2:], before[:, 2:].softmax(-1))  # beyond the blocks
    for emission in ("expander", "adapter"):
        head = CircuitHead(D, V, K, 3, "btree", emission, dtype=DOUBLE)
        head.init_from_lm_head(weight, num_blocks=2)
        leaf = head.circuit(h).leaf.softmax(-1)
        expected = F.linear(h, weight[:V]).softmax(-1)
        torch.testing.assert_close(leaf, expected[:, None, None].expand_as(leaf))


def test_adapters_share_the_memory_of_the_frozen_unembedding():
    weight = torch.randn(V, D)
    head = CircuitHead(D, V, K, 3, "cp", "adapter")
    head.init_from_lm_head(weight)
    assert head.unembed.data_ptr() == weight.data_ptr()
    assert "unembed" not in dict(head.named_parameters()) and "unembed" in head.state_dict()


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_from_the_uniforms_and_have_their_conditionals(kind: str, emission: str):
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


def test_argmax_takes_evidence_and_is_the_mode_of_the_factorised_head():
    head, h = make("ff"), hidden(2, 3)
    tokens, value = head.argmax(h)
    assert torch.equal(tokens, head.circuit(h).leaf.argmax(-1).view(2, 3, K))
    torch.testing.assert_close(value, head.log_prob(h, tokens)[..., -1])
    given = torch.full((2, 3, K), IGNORE)
    given[..., 0] = 2
    assert (head.argmax(h, given)[0][..., 0] == 2).all()


# -------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("kind", KINDS)
def test_loss_without_discount_is_the_joint_likelihood(kind: str):
    head, h, x = make(kind), hidden(2, 3), torch.randint(0, V, (2, 3, K))
    loss, _ = head.loss(h, x, gamma=1.0)
    expected = -head.log_prob(h, x)[..., -1].mean() / K
    torch.testing.assert_close(loss, expected)


def test_loss_is_the_formula_with_ignored_targets():
    head, h, x = make("hmm"), hidden(5), torch.randint(0, V, (5, K))
    x[0, 1] = x[1, 2:] = IGNORE
    x[:, 3] = IGNORE  # no valid target: its term is zero, not 0 / 0
    loss, each = head.loss(h, x, gamma=0.5)
    c = head.conditionals(h, x)
    terms = [-c[:, k].sum() / max(1, int((x[:, k] != IGNORE).sum())) for k in range(K)]
    torch.testing.assert_close(each, torch.stack(terms))
    expected = sum(0.5**k * t for k, t in enumerate(terms)) / (1 + 0.5 + 0.25 + 0.125)
    torch.testing.assert_close(loss, expected)
    assert each[3] == 0


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation_is_the_divergence_from_the_teacher(kind: str, leading: tuple[int, ...]):
    head, h, x = make(kind), hidden(*leading), torch.randint(0, V, (*leading, K))
    x[0, ..., -1] = IGNORE
    teacher = torch.randn(*leading, K, V, dtype=DOUBLE)
    teacher[..., 0, 0] = -torch.inf  # a token that the teacher forbids costs nothing
    _, each = head.loss(h, x, beta=1.0, teacher_logits=teacher)
    for k in range(K):
        q = head.full_conditional(h, x, k)
        p = teacher[..., k, :].softmax(-1)
        gap = torch.where(p > 0, p * (p.log() - q), 0).sum(-1)
        valid = x[..., k] != IGNORE
        torch.testing.assert_close(each[k], gap[valid].mean())
    half, _ = head.loss(h, x, beta=0.5, teacher_logits=teacher)
    whole, _ = head.loss(h, x, beta=1.0, teacher_logits=teacher)
    torch.testing.assert_close(half, (whole + head.loss(h, x)[0]) / 2)


@pytest.mark.parametrize(
    ("kind", "emission"), [*((k, "full") for k in KINDS), ("cp", "expander"), ("hmm", "adapter")]
)
def test_gradients_of_all_parameters_are_those_of_finite_differences(kind: str, emission: str):
    head, h, x = (
        make(kind, emission, n_token=3),
        hidden(2),
        torch.tensor([[0, IGNORE, 2], [1, 1, 0]]),
    )
    names, values = zip(*head.named_parameters(), strict=True)
    h.requires_grad_()

    def loss(h: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Loss(head), {f"head.{n}": p for n, p in given.items()}, (h, x)
        )

    assert torch.autograd.gradcheck(loss, (h, *values))


class Loss(torch.nn.Module):
    """The loss as a forward, for functional_call."""

    def __init__(self, head: CircuitHead):
        super().__init__()
        self.head = head

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.head.loss(h, x)[0]


def test_windows_without_targets_have_no_loss_and_no_gradient():
    head, x = make("btree"), torch.full((3, K), IGNORE)
    loss, _ = head.loss(hidden(3), x)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("emission", EMISSIONS)
def test_no_rows_give_empty_results_and_zero_gradients(emission: str):
    head, h, x = make("hmm", emission), hidden(0), torch.empty(0, K, dtype=torch.int64)
    assert head.log_prob(h, x).shape == (0, K) and head.sample(h)[0].shape == (0, K)
    assert head.full_conditional(h, x, 0).shape == (0, V) and head.argmax(h)[1].shape == (0,)
    loss, _ = head.loss(h, x)
    loss.backward()
    assert loss == 0


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    head, h, x = make("hmm", "adapter"), hidden(7), torch.randint(0, V, (7, K))
    teacher = torch.randn(7, K, V, dtype=DOUBLE)
    whole, _ = head.loss(h, x, beta=0.5, teacher_logits=teacher)
    monkeypatch.setattr("lora_ext.nn.circuit_head._CHUNK", 3 * K * 3 * D)
    parts, _ = head.loss(h, x, beta=0.5, teacher_logits=teacher)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters_give_float32_results_near_those_of_float64(dtype: torch.dtype):
    head, h, x = make("btree"), hidden(4), torch.randint(0, V, (4, K))
    narrow = CircuitHead(D, V, K, 3, "btree", dtype=dtype)
    narrow.load_state_dict(head.state_dict())
    found, expected = narrow.log_prob(h.to(dtype), x), head.log_prob(h, x)
    assert found.dtype == torch.float32
    # Logits are about 2.5 in size; parameters and logits are rounded to 8 or 24 bits.
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.3}[dtype]
    assert (found - expected).abs().max() < bound


# -------------------------------------------------------------------------------------------------
# State and errors


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_carries_the_distribution(kind: str, emission: str):
    head, h = make(kind, emission), hidden(3)
    other = CircuitHead(D, V, K, KINDS[kind], kind, emission, adapter_rank=2, dtype=DOUBLE)
    other.load_state_dict(head.state_dict())
    x = torch.randint(0, V, (3, K))
    assert torch.equal(other.log_prob(h, x), head.log_prob(h, x))


def test_the_shared_lm_head_is_never_written():
    weight = torch.randn(V, D, dtype=DOUBLE)
    before = weight.clone()
    head = CircuitHead(D, V, K, 3, "cp", "adapter", dtype=DOUBLE)
    head.init_from_lm_head(weight)
    head.load_state_dict(head.state_dict())  # nothing new: still shared
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
        ({"adapter_rank": 257}, "adapter_rank"),
    ],
)
def test_sizes_out_of_range_are_named(options: dict[str, Any], name: str):
    sizes = {"hidden_size": D, "vocab_size": V, "n_token": K, "rank": 3, "kind": "cp"}
    with pytest.raises(ValueError, match=f"CircuitHead: {name}: expected .*, found"):
        CircuitHead(**{**sizes, **options})


def test_other_dtypes_are_not_implemented():
    with pytest.raises(NotImplementedError, match="dtype"):
        CircuitHead(D, V, K, 3, "cp", dtype=torch.float8_e4m3fn)


def test_wrong_inputs_are_named():
    head, h, x = make("cp"), hidden(2, 3), torch.zeros(2, 3, K, dtype=torch.int64)
    gap = x.clone()
    gap[0, 0, 1] = IGNORE
    cases = [
        (ValueError, "evidence: expected given tokens first", lambda: head.sample(h, gap)),
        (ValueError, "evidence: expected given tokens first", lambda: head.argmax(h, gap)),
        (TypeError, "h: expected a floating", lambda: head.log_prob(h.long(), x)),
        (TypeError, "tokens: expected int64", lambda: head.log_prob(h, x.double())),
        (ValueError, "h: expected shape", lambda: head.log_prob(h[..., :-1], x)),
        (ValueError, "tokens: expected shape", lambda: head.log_prob(h, x[..., :-1])),
        (ValueError, "tokens: expected shape", lambda: head.log_prob(h, x[:1])),
        (ValueError, "tokens: expected ids in", lambda: head.log_prob(h, x + V)),
        (ValueError, "tokens: expected ids in", lambda: head.sample(h, x - 1)),
        (ValueError, "k: expected positions", lambda: head.full_conditional(h, x, K)),
        (
            ValueError,
            "k: expected one position or shape",
            lambda: head.full_conditional(h, x, torch.zeros(3, dtype=torch.int64)),
        ),
        (TypeError, "k: expected int64", lambda: head.full_conditional(h, x, torch.zeros(2, 3))),
        (ValueError, "tokens: expected shape", lambda: head.loss(h, x[..., :-1])),
        (ValueError, "uniforms: expected shape", lambda: head.sample(h, uniforms=torch.rand(2, K))),
        (ValueError, "gamma", lambda: head.loss(h, x, gamma=0.0)),
        (ValueError, "gamma", lambda: head.loss(h, x, gamma=1.1)),
        (ValueError, "beta", lambda: head.loss(h, x, beta=-0.1)),
        (ValueError, "teacher_logits", lambda: head.loss(h, x, beta=0.5)),
        (
            ValueError,
            "teacher_logits",
            lambda: head.loss(h, x, beta=0.5, teacher_logits=torch.zeros(2, 3, K, V + 1)),
        ),
        (ValueError, "init_from_lm_head: weight", lambda: head.init_from_lm_head(torch.ones(V, 2))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("shortlist", [None, [2, 0]])
@pytest.mark.parametrize("emission", ["full", "adapter"])
def test_the_loss_compiles_in_one_piece(emission: str, shortlist: list[int] | None):
    head, h = make("hmm", emission, shortlist=shortlist), hidden(3)
    labels = torch.randint(V, (3, K))
    labels[1, 2] = IGNORE
    compiled = torch.compile(lambda *t: head.loss(*t)[0], fullgraph=True, backend="aot_eager")
    parameters = list(head.parameters())
    a, b = compiled(h, labels), head.loss(h, labels)[0]
    assert torch.equal(a, b)
    for mine, eager in zip(
        torch.autograd.grad(a, parameters), torch.autograd.grad(b, parameters), strict=True
    ):
        assert torch.allclose(mine, eager, rtol=1e-10, atol=1e-12)
    for wrong in (labels + V, labels.clamp(max=-7)):
        with pytest.raises(ValueError, match=r"emission_gather: x\[.*: expected"):
            compiled(h, wrong)
