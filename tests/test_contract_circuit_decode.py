"""Decoding ops of circuits, compared with the formula on every backend that can run here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from cases_decode import (
    CALLS,
    MEDIUM,
    OPS,
    SMALL,
    Shape,
    circuit,
    draft,
    log_bound,
    make_inputs,
    run_all,
    sample_within_band,
    verify_within_band,
)
from contract import assert_same_bits, shapes, wide
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference._circuit import CircuitSample

OP = replace(OPS[0], medium=MEDIUM)
small_shapes = pytest.mark.parametrize("shape", SMALL, ids=str)


def dtype_pairs(backend: Backend, shape: Shape) -> list[tuple[torch.dtype, torch.dtype]]:
    """Return pairs of a dtype for leaves and a dtype for prior and transitions. For one shape, each
    dtype occurs once in each place; over all shapes, every pair of dtypes other than float64
    occurs."""
    narrow = [t for t in backend.dtypes() if t != torch.float64]
    turn = (SMALL + MEDIUM).index(shape) % len(narrow)
    pairs = list(zip(narrow, narrow[turn:] + narrow[:turn], strict=True))
    return [*pairs, (torch.float64, torch.float64)] if backend.is_twin else pairs


def assert_log_close(got: Tensor, exact: Tensor, dtype: torch.dtype, shape: Shape) -> None:
    got = got.cpu().double()
    assert torch.equal(got == -torch.inf, exact == -torch.inf)
    error = torch.where(exact == -torch.inf, 0, got - exact).abs()
    assert (error <= log_bound(exact.nan_to_num(neginf=0), dtype, shape)).all(), error.max()


def on_cpu(sample: CircuitSample) -> CircuitSample:
    return CircuitSample(*(t.cpu() for t in sample))


@shapes(OP, SMALL, MEDIUM)
def test_conditional_dist_equals_the_formula(backend: Backend, shape: Shape) -> None:
    for dtype, weights in dtype_pairs(backend, shape):
        i = make_inputs(shape, dtype, weights=weights, seed=1, device=backend.device)
        w = wide(i)
        exact = reference.circuit_conditional_dist(*circuit(w), w["x"], w["k"])
        got = ops.circuit_conditional_dist(*circuit(i), i["x"], i["k"])
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_log_close(got, exact, dtype, shape)


@shapes(OP, SMALL, MEDIUM)
@pytest.mark.parametrize("given", [False, True])
def test_sample_follows_the_uniforms(backend: Backend, shape: Shape, given: bool) -> None:
    for dtype, weights in dtype_pairs(backend, shape):
        i = make_inputs(shape, dtype, weights=weights, seed=2, device=backend.device)
        evidence = i["evidence"] if given else None
        got = on_cpu(ops.circuit_sample(*circuit(i), i["uniforms"], evidence))
        drawn = torch.ones_like(got.tokens, dtype=torch.bool)
        if given:
            drawn = evidence.cpu() < 0
            assert torch.equal(got.tokens[~drawn], evidence.cpu()[~drawn])
        assert (sample_within_band(i, got.tokens) | ~drawn).all()
        scan = reference.circuit_scan(*circuit(wide(i)), got.tokens)
        assert_log_close(got.conditional, scan.conditional, dtype, shape)
        slack = log_bound(scan.posterior.new_zeros(()), dtype, shape)
        assert ((got.posterior.double() - scan.posterior).abs() <= slack).all()


@shapes(OP, SMALL, MEDIUM)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_verify_accepts_and_draws_by_the_uniforms(
    backend: Backend, shape: Shape, temperature: float
) -> None:
    for dtype, leaf_dtype in dtype_pairs(backend, shape):
        i = make_inputs(shape, leaf_dtype, seed=3, device=backend.device)
        i["target"] = i["target"].to(dtype)
        if shape.rows > 1:  # Small uniforms: the drafts of these rows are accepted in full.
            i["accept"][1:, :-1] *= 1e-3
        sample = ops.circuit_sample(*circuit(i), i["uniforms"])
        for num_evidence in (None, i["num_evidence"]):
            got = ops.spec_verify(*draft(i, sample), num_evidence, temperature)
            given = torch.zeros(shape.rows) if num_evidence is None else num_evidence.cpu()
            checked = verify_within_band(
                i, on_cpu(sample), *(t.cpu() for t in got), given, temperature
            )
            assert checked.all()


@shapes(OP, SMALL, MEDIUM)
@pytest.mark.parametrize("given", [False, True])
def test_argmax_equals_the_formula(backend: Backend, shape: Shape, given: bool) -> None:
    for dtype, weights in dtype_pairs(backend, shape):
        # Paths with coarse 16-bit logits can have equal probabilities, up to rounding in float32.
        # With this seed, they do not.
        i = make_inputs(shape, dtype, weights=weights, seed=4, device=backend.device)
        w = wide(i)
        evidence = i["evidence"] if given else None
        tokens, value = ops.circuit_argmax(*circuit(i), evidence)
        exact = reference.circuit_argmax(*circuit(w), w["evidence"] if given else None)
        assert_log_close(value, exact[1], dtype, shape)
        # If several paths are equally probable up to rounding, the op may choose other tokens. The
        # best value given these tokens must then equal the best value of all.
        best = reference.circuit_argmax(*circuit(w), tokens.cpu())[1]
        assert_log_close(best, exact[1], torch.float32, shape)
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(tokens.cpu(), exact[0])


@shapes(OP, SMALL, MEDIUM)
def test_power_of_two_weights_give_the_same_tokens_on_every_backend(
    backend: Backend, shape: Shape
) -> None:
    for dtype in backend.dtypes():
        i = make_inputs(shape, dtype, seed=5, exact=True, device=backend.device)
        w = wide(i)
        got = run_all(i, 1.0)
        sample = reference.circuit_sample(*circuit(w), w["uniforms"], w["evidence"])
        assert_same_bits(got["tokens"], sample.tokens, f"{dtype} tokens: ")
        verified = reference.spec_verify(*draft(w, sample), w["num_evidence"])
        assert_same_bits(got["accepted"], verified[0], f"{dtype} accepted: ")
        assert_same_bits(got["next_token"], verified[1], f"{dtype} next token: ")
        # All rows of a matrix have the same number of possible transitions, so there are many ties.
        expected = reference.circuit_argmax(*circuit(w), w["evidence"])[0]
        assert_same_bits(got["argmax"], expected, f"{dtype} argmax: ")


@small_shapes
def test_result_of_a_row_does_not_depend_on_the_batch(backend: Backend, shape: Shape) -> None:
    i = make_inputs(shape, torch.bfloat16, seed=7, device=backend.device)
    together = run_all(i)
    for row in range(shape.rows):
        alone = {n: t[row : row + 1] if isinstance(t, Tensor) else t for n, t in i.items()}
        for name, value in run_all(alone).items():
            assert_same_bits(value, together[name][row : row + 1], f"{name} of row {row}: ")


@small_shapes
def test_shared_strided_and_unaligned_parameters_change_no_bit(
    backend: Backend, shape: Shape
) -> None:
    i = make_inputs(shape, torch.float16, seed=8, device=backend.device)
    if shape.rows == 0:
        pytest.skip("a batch without rows shares no parameters")
    names = ("leaf", "prior", "trans", "target")
    first = {n: t[:1].expand_as(t) if n in names else t for n, t in i.items()}
    expected = run_all({n: t.contiguous() if n in names else t for n, t in first.items()})

    def off_grid(t: Tensor) -> Tensor:
        """Return a copy with three unused elements (NaN) between rows, and one before row 0."""
        width = t[0].numel()
        store = t.new_full((len(t) * (width + 3) + 1,), torch.nan)
        view = store[1:].view(len(t), width + 3)[:, :width]
        return view.copy_(t.flatten(1)).unflatten(1, t.shape[1:]) if width else t

    turned = {n: t.transpose(0, 1).contiguous().transpose(0, 1) if n in names else t for n, t in
              first.items()}  # fmt: skip
    apart = {n: off_grid(t.contiguous()) if n in names else t for n, t in first.items()}
    for other in (first, turned, apart):
        for name, value in run_all(other).items():
            assert_same_bits(value, expected[name], f"{name}: ")


def test_missing_prior_and_transitions_are_uniform(backend: Backend) -> None:
    i = make_inputs(Shape("cp", 3, 3, 4, 5), torch.float32, seed=9, device=backend.device)
    zeros = {**i, "prior": torch.zeros_like(i["prior"]), "trans": None}
    none = {**i, "prior": None, "trans": None}
    for (name, a), b in zip(run_all(none).items(), run_all(zeros).values(), strict=True):
        assert_same_bits(a, b, f"{name}: ")


def test_one_hot_rows_give_their_token_and_impossible_rows_give_token_zero(
    backend: Backend,
) -> None:
    shape = Shape("hmm", 4, 5, 3, 70)
    i = make_inputs(shape, torch.float32, seed=10, device=backend.device)
    g = torch.Generator().manual_seed(0)
    only = torch.randint(0, 70, (4, 5, 1), generator=g).expand(4, 5, 3).to(backend.device)
    leaf = torch.full_like(i["leaf"], -torch.inf).scatter_(-1, only[..., None], -3.0)
    i = {**i, "leaf": leaf, "evidence": torch.full_like(i["evidence"], -1)}
    sample = ops.circuit_sample(*circuit(i), i["uniforms"])
    assert_same_bits(sample.tokens, only[..., 0])
    assert sample.conditional.abs().max() < 1e-6
    assert_same_bits(ops.circuit_argmax(*circuit(i))[0], only[..., 0])
    i = make_inputs(Shape("hmm", 2, 3, 3, 6), torch.float32, seed=11, device=backend.device)
    i["leaf"][:, 1] = -torch.inf  # No token is possible at position 1.
    sample = ops.circuit_sample(*circuit(i), i["uniforms"])
    assert (sample.tokens[:, 1:] == 0).sum() >= 2 and (sample.tokens[:, 1] == 0).all()
    assert sample.conditional[:, 0].isfinite().all()
    assert (sample.conditional[:, 1:] == -torch.inf).all()
    assert (sample.posterior[:, 1].sum(-1) - 1).abs().max() < 1e-6
    assert (sample.posterior[:, 2] == 0).all()
    assert (ops.circuit_argmax(*circuit(i))[1] == -torch.inf).all()
    last = torch.full_like(i["k"], 2)
    dist = ops.circuit_conditional_dist(*circuit(i), sample.tokens, last)
    assert (dist == -torch.inf).all()


def test_mixture_keeps_probabilities_below_the_smallest_float(backend: Backend) -> None:
    """Check a log-probability of -200, for which a sum of float32 probabilities would be 0."""
    leaf = torch.zeros(1, 1, 2, 3)
    leaf[..., 1] = -200.0
    got = ops.circuit_conditional_dist(
        "cp", leaf.to(backend.device), None, None,
        torch.zeros(1, 1, dtype=torch.long, device=backend.device),
        torch.zeros(1, dtype=torch.long, device=backend.device),
    )  # fmt: skip
    expected = torch.tensor([0.0, -200.0, 0.0]) - torch.tensor(2.0).log()
    torch.testing.assert_close(got[0].cpu(), expected)


def test_results_for_large_logits_are_accurate(backend: Backend) -> None:
    shape = Shape("hmm", 2, 3, 3, 20)
    i = make_inputs(shape, torch.float32, seed=12, device=backend.device)
    far = {n: i[n] + 1e4 for n in ("leaf", "prior", "trans", "target")}
    near = {n: t - 1e4 for n, t in far.items()}
    for (name, a), b in zip(run_all({**i, **far}).items(), run_all({**i, **near}).values(),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e-40, 1e30])
def test_forbidden_tokens_are_never_emitted(backend: Backend, temperature: float) -> None:
    shape = Shape("hmm", 64, 3, 2, 37)
    i = make_inputs(shape, torch.float32, seed=12, device=backend.device)
    g = torch.Generator().manual_seed(1)
    allowed = (torch.rand(i["target"].shape, generator=g) < 0.2).to(backend.device)
    allowed[..., 0] = True
    i["target"] = torch.where(allowed, i["target"].nan_to_num(neginf=0.5), -torch.inf)
    i["accept"] = i["accept"] * torch.tensor([0.0, 1.0]).repeat(32)[:, None].to(backend.device)
    sample = ops.circuit_sample(*circuit(i), i["uniforms"])
    accepted, token = ops.spec_verify(*draft(i, sample), None, temperature)
    may = allowed[:, :-1].gather(-1, sample.tokens[..., None])[..., 0]
    position = torch.arange(3, device=backend.device)
    assert (may | (position >= accepted[:, None])).all()
    row = torch.arange(64, device=backend.device)
    assert allowed[row, accepted, token].all()
    assert (accepted == 0).any() and (accepted > 0).any()


def test_rejection_with_equal_distributions_draws_from_p(backend: Backend) -> None:
    """Check a rejection although p = q, which happens if the caller passes a wrong conditional."""
    leaf = torch.tensor([0.0, 0.0, -torch.inf, 0.0]).view(1, 1, 1, 4).to(backend.device)
    target = leaf[:, :, 0].repeat(1, 2, 1)
    far = torch.full((1, 1), 9.0, device=backend.device)
    for u, expected in ((0.0, 0), (0.5, 1), (0.99, 3)):
        got = ops.spec_verify(
            target, torch.zeros(1, 1, dtype=torch.long, device=backend.device), far,
            torch.ones(1, 1, 1, device=backend.device), leaf,
            torch.tensor([[0.5, u]], device=backend.device),
        )  # fmt: skip
        assert [int(t) for t in got] == [0, expected]


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 257, 4097])
def test_greedy_chooses_the_first_of_tied_tokens(backend: Backend, vocabulary: int) -> None:
    shape = Shape("cp", 6, 2, 2, vocabulary)
    i = make_inputs(shape, torch.bfloat16, seed=13, device=backend.device)
    g = torch.Generator().manual_seed(2)
    i["target"] = torch.randint(0, 3, i["target"].shape, generator=g).bfloat16().to(backend.device)
    sample = ops.circuit_sample(*circuit(i), i["uniforms"])
    best = i["target"].argmax(-1)
    tokens = torch.where(torch.arange(6, device=backend.device)[:, None] < 4, best[:, :2], 0)
    sample = sample._replace(tokens=tokens)
    expected = reference.spec_verify(*(t.cpu() for t in draft(i, sample)), temperature=0.0)
    got = ops.spec_verify(*draft(i, sample), temperature=0.0)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


every_op = pytest.mark.parametrize("name", CALLS)


@every_op
def test_leaf_that_requires_a_gradient_raises(name: str) -> None:
    i = make_inputs(Shape("hmm", 2, 3, 2, 4), torch.float32, seed=15)
    i["leaf"].requires_grad_()
    args = [t.detach() if isinstance(t, Tensor) and t.grad_fn else t for t in CALLS[name](i)]
    with pytest.raises(RuntimeError, match=f"{name} has no backward; call it under"):
        getattr(ops, name)(*args)
    with torch.no_grad():
        getattr(ops, name)(*args)


def test_compiles_without_a_graph_break(backend: Backend) -> None:
    i = make_inputs(Shape("hmm", 2, 3, 2, 4), torch.float32, seed=16, device=backend.device)
    expected = run_all(i)
    compiled: Any = torch.compile(run_all, fullgraph=True, backend="aot_eager")
    for name, value in compiled(i).items():
        assert_same_bits(value, expected[name], f"{name}: ")
