"""The distribution of tokens from drafting and verifying, enumerated with the ops themselves.

Every draw and every acceptance test is a step function of its uniform number. Bisection finds the
steps, which gives the probability of each outcome of the op. The distribution of the output is then
a sum over all paths, without sampling. The verifier is a table of next-token distributions.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from backends import Backend
from torch import Tensor

from lora_ext import ops
from lora_ext.reference._circuit import KINDS, CircuitSample, num_transitions

V = 3
Prefix = tuple[int, ...]


def step_sizes(f: Callable[[Tensor], Tensor], rows: int, outcomes: int, dtype: torch.dtype):
    """Return the share of [0, 1) that leads to each outcome, ``(rows, outcomes)`` float64.

    ``f`` maps one uniform number per row to one outcome per row, and is monotonic. All borders
    between outcomes are bisected at once, with ``outcomes - 1`` copies of the rows.
    """
    # Find the first u whose outcome is at least ``border``.
    border = torch.arange(1, outcomes).repeat_interleave(rows)
    low = torch.zeros(rows * (outcomes - 1), dtype=torch.float64)
    high = torch.where(f(low.to(dtype)) >= border, 0.0, torch.ones_like(low))
    for _ in range(53 if dtype == torch.float64 else 25):
        middle = (low + high) / 2
        reached = f(middle.to(dtype)) >= border
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    edges = torch.stack([torch.zeros(rows), *high.view(outcomes - 1, rows), torch.ones(rows)])
    return edges.diff(dim=0).T


@dataclass
class Game:
    backend: Backend
    kind: str
    n_token: int
    dtype: torch.dtype
    temperature: float = 1.0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.n_token)
        c = 1 if self.kind == "ff" else 2
        m = num_transitions(self.kind, self.n_token)

        def logits(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype)

        self.leaf, self.prior = logits(1, self.n_token, c, V), logits(1, c)
        self.trans = logits(1, m, c, c)
        prefixes = [
            p for n in range(self.n_token + 1) for p in itertools.product(range(V), repeat=n)
        ]
        self.table = {p: logits(V) for p in prefixes}
        self.table[()][1] = -torch.inf  # The verifier forbids a token that the draft prefers.
        self.leaf[0, 0, :, 1] += 1
        self.drafts = torch.tensor(list(itertools.product(range(V), repeat=self.n_token)))

    def verifier(self, prefix: Prefix) -> Tensor:
        return (self.table[prefix].double() / self.temperature).softmax(-1)

    def uniform(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def put(self, *tensors: Tensor) -> list[Tensor]:
        return [t.to(self.backend.device) for t in tensors]

    def sample(self, tokens: Tensor, uniforms: Tensor) -> CircuitSample:
        rows = len(tokens)
        leaf, prior, trans = (
            t.expand(rows, *t.shape[1:]) for t in self.put(self.leaf, self.prior, self.trans)
        )
        got = ops.circuit_sample(self.kind, leaf, prior, trans, *self.put(uniforms, tokens))
        return CircuitSample(*(t.cpu() for t in got))

    def draft_law(self) -> dict[Prefix, Tensor]:
        """Return the distribution ``q(. | prefix)`` from which ``circuit_sample`` draws, for each
        prefix."""
        law: dict[Prefix, Tensor] = {}
        c = self.leaf.shape[2]
        for k in range(self.n_token):
            prefixes = list(itertools.product(range(V), repeat=k))
            evidence = torch.full((len(prefixes), self.n_token), -1)
            evidence[:, :k] = torch.tensor(prefixes, dtype=torch.long).view(len(prefixes), k)

            def token_at(u_state: Tensor, u_token: Tensor, evidence=evidence, k=k) -> Tensor:
                rows = evidence.repeat(len(u_token) // len(evidence), 1)
                uniforms = torch.zeros(len(rows), self.n_token, 2, dtype=self.uniform())
                uniforms[:, k, 0], uniforms[:, k, 1] = u_state, u_token
                return self.sample(rows, uniforms).tokens[:, k]

            # The op returns the probability of each state (the posterior), but not the drawn state.
            # A state is selected by a uniform number in the middle of its share.
            full = evidence.clone()
            share = self.sample(full, torch.zeros(len(full), self.n_token, 2, dtype=self.uniform()))
            share = share.posterior[:, k].double()  # (prefixes, C)
            middle = share.cumsum(-1) - share / 2
            q = torch.zeros(len(prefixes), V, dtype=torch.float64)
            for z in range(c):
                at = middle[:, z].to(self.uniform())
                sizes = step_sizes(
                    lambda u, at=at: token_at(at.repeat(V - 1), u), len(prefixes), V, self.uniform()
                )
                q += share[:, z : z + 1] * sizes
            law |= dict(zip(prefixes, q, strict=True))
        return law

    def step_law(self) -> dict[Prefix, tuple[Tensor, Tensor]]:
        """Return two tensors for each prefix of a draft. The first one is the probability ``(V,)``
        that each next token is accepted. Row i of the second one, ``(V, V)``, is the distribution
        of the token that ``spec_verify`` emits after it rejects token i. After a full window, row 0
        is the distribution of the next token."""
        n, rows = self.n_token, len(self.drafts)
        zeros = torch.zeros(rows, n, 2, dtype=self.uniform())
        sample = self.sample(self.drafts, zeros)
        target = torch.stack(
            [
                torch.stack([self.table[tuple(draft[:k])] for k in range(n + 1)])
                for draft in self.drafts.tolist()
            ]
        )
        leaf = self.leaf.expand(rows, *self.leaf.shape[1:])
        steps: dict[Prefix, tuple[Tensor, Tensor]] = {}
        for k in range(n + 1):

            def run(u: Tensor, which: int, k: int = k) -> tuple[Tensor, Tensor]:
                copies = len(u) // rows
                uniforms = torch.zeros(len(u), n + 1, dtype=self.uniform())
                uniforms[:, k] = 1 - 2.0**-24  # rejects at position k if possible
                uniforms[:, which] = u
                tensors = (t.repeat(copies, *[1] * (t.dim() - 1)) for t in (target, *sample, leaf))
                got = ops.spec_verify(*self.put(*tensors, uniforms), temperature=self.temperature)
                return got[0].cpu(), got[1].cpu()

            emitted = step_sizes(lambda u, run=run: run(u, n)[1], rows, V, self.uniform())
            kept = torch.ones(rows, dtype=torch.float64)
            if k < n:
                rejected = lambda u, run=run, k=k: (run(u, k)[0] <= k).long()  # noqa: E731
                kept = step_sizes(rejected, rows, 2, self.uniform())[:, 0]
            for row, draft in enumerate(self.drafts.tolist()):
                accept, after = steps.setdefault(
                    tuple(draft[:k]), (torch.zeros(V).double(), torch.zeros(V, V).double())
                )
                token = draft[k] if k < n else 0
                accept[token] = kept[row]
                after[token] = emitted[row]
        return steps

    def output_law(self, *, keep_residual: bool = True) -> Tensor:
        """Return the distribution of the first two tokens that a step emits, ``(V, V)``. If the
        step emits one token, the verifier draws the second one. With ``keep_residual=False``, a
        common variant, the verifier also draws the token at a rejected position, unless it is the
        first one."""
        q, steps = self.draft_law(), self.step_law()
        law = torch.zeros(V, V, dtype=torch.float64)

        def emit(tokens: Prefix, chance: float) -> None:
            if len(tokens) >= 2:
                law[tokens[0], tokens[1]] += chance
            else:
                law[tokens[0]] += chance * self.verifier(tokens)

        def walk(prefix: Prefix, chance: float) -> None:
            accept, after = steps[prefix]
            if len(prefix) == self.n_token:
                for token in range(V):
                    emit((*prefix, token), chance * float(after[0, token]))
                return
            for drafted in range(V):
                drawn = chance * float(q[prefix][drafted])
                walk((*prefix, drafted), drawn * float(accept[drafted]))
                rejected = drawn * float(1 - accept[drafted])
                if prefix and not keep_residual:
                    emit(prefix, rejected)
                else:
                    for token in range(V):
                        emit((*prefix, token), rejected * float(after[drafted, token]))

        walk((), 1.0)
        return law

    def expected_law(self) -> Tensor:
        return torch.stack([self.verifier(())[i] * self.verifier((i,)) for i in range(V)])


def total_variation(game: Game, **options: bool) -> float:
    return float((game.output_law(**options) - game.expected_law()).abs().sum() / 2)


def tokens_of(backend: Backend) -> int:
    """Return the window length: three tokens for fast backends, two otherwise."""
    return 3 if backend.is_twin and not backend.small else 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_output_distribution_is_that_of_the_verifier(backend: Backend, kind: str) -> None:
    if backend.small and not backend.is_twin and kind != "hmm":
        pytest.skip("the checking emulator is slow and runs only one kind")
    game = Game(backend, kind, tokens_of(backend), torch.float32)
    law = game.output_law()
    assert (law - game.expected_law()).abs().sum() / 2 < 1e-6
    assert law[1].sum() == 0  # The verifier forbids token 1: exactly 0.
    if backend.is_twin:
        assert total_variation(Game(backend, kind, 3, torch.float64)) < 1e-12


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_output_distribution_includes_the_temperature(temperature: float) -> None:
    game = Game(Backend("cpu"), "hmm", 3, torch.float64, temperature)
    assert total_variation(game) < 1e-12


def test_replacing_the_residual_token_changes_the_output_distribution() -> None:
    game = Game(Backend("cpu"), "hmm", 3, torch.float64)
    assert total_variation(game, keep_residual=False) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_have_the_distribution_of_the_conditionals(backend: Backend, kind: str) -> None:
    if backend.small:
        pytest.skip("this test runs only on fast backends")
    game = Game(backend, kind, tokens_of(backend), torch.float32)
    for prefix, q in game.draft_law().items():
        for token in range(V):
            window = torch.full((1, game.n_token), -1)
            window[0, : len(prefix) + 1] = torch.tensor([*prefix, token])
            sample = game.sample(window, torch.zeros(1, game.n_token, 2))
            assert abs(sample.conditional[0, len(prefix)].double().exp() - q[token]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_decoding_equals_token_by_token_decoding(backend: Backend, kind: str) -> None:
    """Check three rows of max-product drafts, conditioned on the last accepted token."""
    n, length, rows = tokens_of(backend), 12, 3
    game = Game(backend, kind, n, torch.float32)

    def verifier_logits(context: list[int]) -> Tensor:
        return game.table[tuple(context[-n:])]

    plain: list[list[int]] = []
    for row in range(rows):
        context = [row]
        while len(context) < length:
            context.append(int(verifier_logits(context).argmax()))
        plain.append(context)

    contexts = [[row] for row in range(rows)]
    g = torch.Generator().manual_seed(5)
    kept = 0
    while min(map(len, contexts)) < length:
        # The window begins with the last accepted token as evidence.
        evidence = torch.full((rows, n), -1)
        evidence[:, 0] = torch.tensor([c[-1] for c in contexts])
        m = num_transitions(kind, n)
        c = game.leaf.shape[2]
        leaf = torch.stack([torch.stack([verifier_logits(x)] * n) for x in contexts])
        leaf = leaf[:, :, None].nan_to_num(neginf=-9) + torch.randn(rows, n, c, V, generator=g)
        prior, trans = torch.randn(rows, c, generator=g), torch.randn(rows, m, c, c, generator=g)
        tokens, _ = ops.circuit_argmax(kind, *game.put(leaf, prior, trans, evidence))
        drafts = tokens.cpu().tolist()
        target = torch.stack(
            [
                # Position 0 is evidence, so its target is not read.
                torch.stack(
                    [torch.full((V,), torch.nan)]
                    + [verifier_logits(x[:-1] + d[:k]) for k in range(1, n + 1)]
                )
                for x, d in zip(contexts, drafts, strict=True)
            ]
        )
        accepted, token = ops.spec_verify(
            *game.put(target, tokens, torch.zeros(rows, n), torch.zeros(rows, n, c), leaf,
                      torch.zeros(rows, n + 1), torch.ones(rows, dtype=torch.long)),
            temperature=0.0,
        )  # fmt: skip
        for row, x in enumerate(contexts):
            x += [*drafts[row][1 : int(accepted[row])], int(token[row])]
            kept += int(accepted[row]) - 1
    assert [x[:length] for x in contexts] == plain
    assert kept > 0
