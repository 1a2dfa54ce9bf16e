"""Compare the formulas of the circuits with sums over all windows and, in one test, all latents."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lora_ext import reference
from lora_ext.reference._circuit import KINDS, draw, num_transitions

COMPONENTS, VOCABULARY = 2, 3


def circuit(kind: str, n_token: int, seed: int = 0, c: int = COMPONENTS, v: int = VOCABULARY):
    """Return (leaf, prior, trans) of one row, as float64 logits."""
    g = torch.Generator().manual_seed(seed)
    c = 1 if kind == "ff" else c

    def logits(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    m = num_transitions(kind, n_token)
    return logits(1, n_token, c, v), logits(1, c), logits(1, m, c, c)


def windows(n_token: int, v: int = VOCABULARY) -> Tensor:
    return torch.tensor(list(itertools.product(range(v), repeat=n_token)))


def scan_all(kind: str, leaf: Tensor, prior: Tensor, trans: Tensor, x: Tensor):
    return reference.circuit_scan(
        kind, *(t.expand(len(x), *t.shape[1:]) for t in (leaf, prior, trans)), x
    )


def joint_by_latents(kind: str, leaf: Tensor, prior: Tensor, trans: Tensor, x: list[int]) -> float:
    """Return p(x) as a sum over all values of all latents, without a scan or recursion."""
    n_token, c = leaf.shape[1:3]
    emit, w, a = leaf[0].softmax(-1), prior[0].softmax(-1), trans[0].softmax(-1)
    # Pairs (latent, parent) of all latents but the root, and the latent that emits each position.
    edges: list[tuple[int, int]] = []
    sees = [0] * n_token
    if kind == "hmm":
        edges = [(k, k - 1) for k in range(1, n_token)]
        sees = list(range(n_token))
    elif kind == "btree":

        def split(lo: int, hi: int, latent: int) -> None:
            middle = lo + round((hi - lo) / 2)
            for first, last in ((lo, middle), (middle, hi)):
                if last - first == 1:
                    sees[first] = latent
                else:
                    edges.append((len(edges) + 1, latent))
                    split(first, last, len(edges))

        if n_token > 1:
            split(0, n_token, 0)
    total = 0.0
    for z in itertools.product(range(c), repeat=len(edges) + 1):
        p = float(w[z[0]])
        for m, (child, parent) in enumerate(edges):
            p *= float(a[m, z[parent], z[child]])
        for k, token in enumerate(x):
            p *= float(emit[k, z[sees[k]], token])
        total += p
    return total


@pytest.mark.parametrize("n_token", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_circuit_scan_is_the_sum_over_all_latents(kind: str, n_token: int):
    parts = circuit(kind, n_token, seed=n_token)
    x = windows(n_token)[:: max(1, VOCABULARY**n_token // 20)]
    got = scan_all(kind, *parts, x).prefix[:, -1].exp()
    expected = [joint_by_latents(kind, *parts, row.tolist()) for row in x]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_token", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_are_marginals_and_window_probabilities_sum_to_one(kind: str, n_token: int):
    x = windows(n_token)
    scan = scan_all(kind, *circuit(kind, n_token), x)
    joint = scan.prefix[:, -1].exp()
    assert abs(joint.sum() - 1) < 1e-12
    for k in range(n_token):
        tail = VOCABULARY ** (n_token - 1 - k)
        marginal = joint.view(-1, tail).sum(1).repeat_interleave(tail)
        torch.testing.assert_close(scan.prefix[:, k].exp(), marginal, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(scan.conditional.cumsum(1), scan.prefix)
    torch.testing.assert_close(scan.posterior.sum(-1), torch.ones_like(scan.prefix))


@pytest.mark.parametrize("kind", KINDS)
def test_token_minus_one_is_marginalised_and_conditionals_are_ratios_of_marginals(kind: str):
    x = windows(4)
    parts = circuit(kind, 4)
    joint = scan_all(kind, *parts, x).prefix[:, -1].exp().view(3, 3, 3, 3)
    for given in itertools.product([False, True], repeat=4):
        hidden = torch.where(torch.tensor(given), x, -1)
        dims = [k for k, g in enumerate(given) if not g]
        expected = (joint.sum(dims, keepdim=True) if dims else joint).expand(3, 3, 3, 3).flatten()
        torch.testing.assert_close(scan_all(kind, *parts, hidden).prefix[:, -1].exp(), expected)
    n_token, x = 4, windows(4)
    parts = [t.expand(len(x), *t.shape[1:]) for t in circuit(kind, n_token)]
    scan = reference.circuit_scan(kind, *parts, x)
    for k in range(n_token):
        at = torch.full((len(x),), k)
        dist = reference.circuit_conditional_dist(kind, *parts, x, at)
        torch.testing.assert_close(dist.gather(1, x[:, k : k + 1])[:, 0], scan.conditional[:, k])
        torch.testing.assert_close(dist.exp().sum(1), torch.ones(len(x)), check_dtype=False)


def test_all_kinds_agree_for_identity_transitions_and_draws_skip_zero_weights():
    leaf, prior, _ = circuit("cp", 4)
    x = windows(4)
    identity = torch.full((1, 3, 2, 2), -math.inf, dtype=torch.float64)
    identity.diagonal(dim1=2, dim2=3).zero_()
    cp = scan_all("cp", leaf, prior, identity[:, :0], x).prefix
    torch.testing.assert_close(scan_all("hmm", leaf, prior, identity, x).prefix, cp)
    torch.testing.assert_close(scan_all("btree", leaf, prior, identity[:, :2], x).prefix, cp)
    none = identity[:, :0, :1, :1]
    one = [scan_all(k, leaf[:, :, :1], prior[:, :1], none, x).prefix for k in ("cp", "ff")]
    torch.testing.assert_close(*one)
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, 5)
    u = torch.tensor([0.0, 0.4999, 0.5, 0.99999994])
    assert draw(p, u).tolist() == [1, 1, 3, 3]
    assert draw(torch.zeros(1, 3), torch.tensor([0.5])).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_circuit_scan_gradient_passes_gradcheck(kind: str):
    leaf, prior, trans = (t.requires_grad_() for t in circuit(kind, 5, seed=3))
    x = torch.tensor([[0, -1, 2, 1, 0]])

    def f(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(reference.circuit_scan(kind, *parts, x)[:2])

    assert torch.autograd.gradcheck(f, (leaf, prior, trans))


@pytest.mark.parametrize("kind", ["cp", "hmm", "btree"])
def test_impossible_windows_are_minus_infinity_without_nan(kind: str):
    leaf, prior, trans = circuit(kind, 4)
    leaf[0, 2, :, 1] = -math.inf  # Token 1 is impossible at position 2.
    prior[0, 0] = -math.inf
    trans[..., 0, 1] = -math.inf
    for t in (leaf, prior, trans):
        t.requires_grad_()
    x = torch.tensor([[0, 2, 1, 0]])
    scan = reference.circuit_scan(kind, leaf, prior, trans, x)
    assert scan.prefix[0].isinf().tolist() == [False, False, True, True]
    assert (scan.conditional[0, 2:] == -math.inf).all()
    assert (scan.posterior[0, 3] == 0).all() or kind == "btree"
    scan.prefix[scan.prefix.isfinite()].sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (leaf, prior, trans))


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_circuit_sample_follows_the_circuit(kind: str, given: int):
    n_token, count = 3, 20000
    g = torch.Generator().manual_seed(5)
    parts = circuit(kind, n_token, seed=2)
    many = [t.expand(count, *t.shape[1:]) for t in parts]
    evidence = torch.full((count, n_token), -1)
    evidence[:, :given] = torch.tensor([2, 0, 0])[:given]
    uniforms = torch.rand(count, n_token, 2, generator=g)
    tokens, conditional, posterior = reference.circuit_sample(kind, *many, uniforms, evidence)
    scan = reference.circuit_scan(kind, *many, tokens)
    torch.testing.assert_close(conditional, scan.conditional)
    torch.testing.assert_close(posterior, scan.posterior)
    x = windows(n_token)
    p = scan_all(kind, *parts, x).prefix[:, -1].exp()
    p = torch.where((x[:, :given] == evidence[0, :given]).all(1), p, 0)
    p = p / p.sum()
    weights = torch.tensor([9, 3, 1])
    seen = torch.bincount((tokens * weights).sum(1), minlength=27)
    possible = p > 0
    assert seen[~possible].sum() == 0
    chi2 = ((seen - count * p)[possible] ** 2 / (count * p)[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)  # mean + 5 standard deviations


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("n_token", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_circuit_argmax_is_the_best_pair_of_tokens_and_latents(kind, n_token, given):
    leaf, prior, trans = circuit(kind, n_token, seed=7)
    evidence = torch.full((1, n_token), -1)
    evidence[:, :given] = 1
    tokens, value = reference.circuit_argmax(kind, leaf, prior, trans, evidence)
    assert (tokens[:, :given] == 1).all()
    # The max over latents is the limit of the sum if all log-probabilities are divided by a
    # temperature that goes to 0.
    cold = 400.0
    x = windows(n_token)
    x = x[(x[:, :given] == 1).all(1)]
    hot = [cold * reference._circuit.log_softmax(t) for t in (leaf, prior, trans)]
    scores = reference_unnormalised(kind, *hot, x) / cold
    assert abs(scores.max() - value) < 0.02
    assert x[scores.argmax()].tolist() == tokens[0].tolist()


def reference_unnormalised(kind: str, leaf: Tensor, prior: Tensor, trans: Tensor, x: Tensor):
    """Return the scan of unnormalised logits: the log of the sum, over latents, of the product of
    all exponentials."""
    e = leaf[0][torch.arange(x.shape[1]), :, x].double()  # (B, K, C)
    last: list[Tensor] = []

    def observe(k: int, cur: Tensor) -> Tensor:
        last[:] = [torch.logsumexp(cur + e[:, k], 1)]
        return e[:, k]

    rows = len(x)
    reference._circuit._walk(
        kind, x.shape[1], prior.expand(rows, -1), trans.expand(rows, *trans.shape[1:]), observe
    )
    return last[0]


def test_spec_verify_accepts_rejects_and_adds_the_bonus_token():
    kind, n_token, v = "hmm", 2, VOCABULARY
    leaf, prior, trans = circuit(kind, n_token)
    tokens = torch.tensor([[0, 1]])
    scan = reference.circuit_scan(kind, leaf, prior, trans, tokens)
    own = reference.circuit_conditional_dist(kind, leaf, prior, trans, tokens, torch.tensor([0]))
    forbids = torch.tensor([[0.0, -math.inf, 0.0]], dtype=torch.float64)
    bonus = torch.tensor([[-math.inf, -math.inf, 0.0]], dtype=torch.float64)
    target = torch.stack([own, forbids, bonus], 1)

    def verify(u: list[float], **options):
        uniforms = torch.tensor([u])
        a, nxt = reference.spec_verify(
            target, tokens, scan.conditional, scan.posterior, leaf, uniforms, **options
        )
        return int(a), int(nxt)

    # At position 0, p = q, so every u accepts. At position 1, p is 0, so even u = 0 rejects.
    for u in (0.0, 0.5, 0.99999994):
        accepted, token = verify([0.99999994, 0.0, u])
        assert accepted == 1 and token != 1
    assert verify([0.5, 0.5, 0.5], num_evidence=torch.tensor([2])) == (2, 2)
    greedy = verify([0.0, 0.0, 0.0], temperature=0)
    assert greedy[0] in (0, 1) and greedy[1] in (int(own.argmax()), 0)
    assert v == 3
