"""Sum layers, log_einsum_exp and log_bmm, compared with formulas on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import Backend
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference._circuit_sum import log_weights

NORMS = ["logits", "logprobs", "probs", "none"]
# 16-bit weights are tested with two norms only, since they differ from float32 weights only in how
# they are loaded.
KINDS = [
    *itertools.product([torch.float32, torch.float64], NORMS),
    *itertools.product([torch.float16, torch.bfloat16], ["logits", "probs"]),
]
# (regime, shape): the shape is (B, O, I), or (G, B, O, I) for "grouped".
SHAPES = [
    ("shared", (1, 1, 1)),
    ("shared", (3, 5, 7)),
    ("shared", (18, 33, 65)),
    ("grouped", (3, 4, 6, 8)),
    ("grouped", (2, 1, 9, 33)),
    ("per row", (3, 5, 7)),
    ("per row", (2, 70, 40)),
    ("per row", (2, 1, 300)),
]


def inputs(regime: str, shape: tuple[int, ...], norm: str, dtype: torch.dtype, seed: int = 0):
    """Return random (w, values); a fifth of the entries of each are impossible (-inf)."""
    g = torch.Generator().manual_seed(seed)
    *lead, rows, sums, terms = shape
    matrices = {"shared": [], "grouped": lead, "per row": [rows]}[regime]
    w = 2 * torch.randn(*matrices, sums, terms, generator=g)
    w = w.masked_fill(torch.rand(w.shape, generator=g) < 0.2, -torch.inf)
    if norm == "probs":
        w = w.exp()
    values = 5 * torch.randn(*lead, rows, terms, generator=g)
    values = values.masked_fill(torch.rand(values.shape, generator=g) < 0.2, -torch.inf)
    return w.to(dtype), values.to(torch.float64 if dtype == torch.float64 else torch.float32)


def allowed(expected: Tensor, terms: int) -> Tensor:
    """Return the largest |error| allowed: 0 where ``expected`` is -inf, else ``terms + 16``
    roundings of the sum, and four of logarithms and shifts, of at most 20 + |expected|."""
    bound = (terms + 16) * 2.0**-24 + 2.0**-22 * (20 + expected.abs())
    return torch.where(expected == -torch.inf, 0, bound)


def assert_close_logs(got: Tensor, expected: Tensor, terms: int) -> None:
    got = got.cpu().double()
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
    error = torch.where(expected == -torch.inf, 0, (got - expected).abs())
    bound = allowed(expected, terms)
    assert (error <= bound).all(), (error - bound).max()


def dtypes(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes():
        pytest.skip(f"{backend.name} has no {dtype}")


@pytest.mark.parametrize(("regime", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "norm"), KINDS, ids=str)
def test_log_einsum_exp_and_its_gradient_equal_the_formula(
    backend: Backend, dtype: torch.dtype, regime: str, shape: tuple[int, ...], norm: str
) -> None:
    dtypes(backend, dtype)
    w, values = inputs(regime, shape, norm, dtype)
    exact_w, exact_values = (t.double().requires_grad_() for t in (w, values))
    expected = reference.log_einsum_exp(exact_w, exact_values, norm)
    w, values = (t.to(backend.device).requires_grad_() for t in (w, values))
    out = ops.log_einsum_exp(w, values, norm)
    assert out.dtype == values.dtype and out.shape == expected.shape
    assert_close_logs(out.detach(), expected.detach(), shape[-1])

    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(expected, (exact_w, exact_values), dout.double())
    got = torch.autograd.grad(out, (w, values), dout.to(out))
    for name, a, b in zip(("w", "values"), got, exact, strict=True):
        assert a.dtype == (dtype if name == "w" else values.dtype)
        a, b = a.cpu().double(), b.double()
        rounding = torch.finfo(a.dtype if name == "values" else dtype).eps
        scale = b.abs() + (1 if norm != "probs" or name == "values" else b.abs().max())
        assert ((a - b).abs() <= (rounding + shape[-1] * 2e-7 + 1e-5) * scale).all(), name


def test_float64_results_are_within_float64_rounding() -> None:
    for (regime, shape), norm in itertools.product(SHAPES, NORMS):
        w, values = inputs(regime, shape, norm, torch.float64)
        expected = reference.log_einsum_exp(w, values, norm)
        torch.testing.assert_close(
            ops.log_einsum_exp(w, values, norm), expected, rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize(("regime", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["logits", "probs"])
def test_max_equals_the_formula_with_the_gradient_in_one_term(
    backend: Backend, regime: str, shape: tuple[int, ...], norm: str
) -> None:
    w, values = inputs(regime, shape, norm, torch.float32)
    expected = reference.log_einsum_exp(w.double(), values.double(), norm, "max")
    w, values = (t.to(backend.device).requires_grad_() for t in (w, values))
    got = ops.log_einsum_exp(w, values, norm, "max")
    assert_close_logs(got.values.detach(), expected.values, shape[-1])
    assert torch.equal(got.indices.cpu(), expected.indices)
    got.values[got.values > -torch.inf].sum().backward()
    assert values.grad is not None and w.grad is not None
    assert values.grad.isfinite().all() and w.grad.isfinite().all()
    possible = (expected.values > -torch.inf).sum()
    assert values.grad.sum().cpu() == possible


def test_ties_of_the_max_go_to_the_lowest_index(backend: Backend) -> None:
    w = torch.zeros(2, 70).to(backend.device)
    values = torch.full((3, 70), -2.0)
    values[0, [5, 64, 69]] = 1
    values[1, [69, 40]] = 1
    values[2] = -torch.inf
    got = ops.log_einsum_exp(w, values.to(backend.device), "none", "max")
    assert got.indices.tolist() == [[5, 5], [40, 40], [0, 0]]
    assert got.values.tolist() == [[1, 1], [1, 1], [-torch.inf, -torch.inf]]


@pytest.mark.parametrize("regime", ["shared", "grouped", "per row"])
@pytest.mark.parametrize("norm", NORMS)
def test_impossible_sums_stay_impossible_without_nan(
    backend: Backend, regime: str, norm: str
) -> None:
    w, values = inputs(
        regime, (2, 4, 5, 6) if regime == "grouped" else (4, 5, 6), norm, torch.float32
    )
    values[..., 1, :] = -torch.inf  # a row in which all terms are impossible
    w[..., 2, :] = 0 if norm == "probs" else -torch.inf  # a sum whose weights are all impossible
    w, values = (t.to(backend.device).requires_grad_() for t in (w, values))
    out = ops.log_einsum_exp(w, values, norm)
    assert (out[..., 1, :] == -torch.inf).all() and (out[..., 2] == -torch.inf).all()
    dw, dvalues = torch.autograd.grad(out, (w, values), torch.ones_like(out))
    assert dw.isfinite().all() and dvalues.isfinite().all()
    assert not dvalues[..., 1, :].any() and not dw[..., 2, :].any()
    assert not dvalues[values == -torch.inf].any()


def banded(states: int, rows: int, regime: str):
    """Return left-to-right transitions, and values that are much larger for later states."""
    w = torch.full((states, states), -torch.inf)
    for o in range(states):
        w[o, max(0, o - 1) : o + 1] = torch.tensor([-0.3, -1.35])[-(o + 1) :]
    values = -90.0 * torch.arange(states).expand(rows, states).flip(1) - torch.rand(
        rows, states, generator=torch.Generator().manual_seed(0)
    )
    if regime == "per row":
        w = w.expand(rows, states, states).clone()
    if regime == "grouped":
        w, values = torch.stack([w, w + 0.1]), torch.stack([values, values.flip(1)])
    return w, values.contiguous()


@pytest.mark.parametrize("regime", ["shared", "grouped", "per row"])
@pytest.mark.parametrize("norm", ["logits", "logprobs", "probs"])
def test_terms_far_below_the_largest_value_do_not_underflow(
    backend: Backend, regime: str, norm: str
) -> None:
    w, values = banded(6, 3, regime)
    w = w.exp() if norm == "probs" else w
    exact_w, exact_values = (t.double().requires_grad_() for t in (w, values))
    expected = reference.log_einsum_exp(exact_w, exact_values, norm)
    assert expected.min() < -400 and expected.isfinite().all()
    w, values = (t.to(backend.device).requires_grad_() for t in (w, values))
    out = ops.log_einsum_exp(w, values, norm)
    assert_close_logs(out.detach(), expected.detach(), 6)
    exact = torch.autograd.grad(expected.sum(), (exact_w, exact_values))
    got = torch.autograd.grad(out.sum(), (w, values))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)


def test_huge_logits_and_values_do_not_overflow(backend: Backend) -> None:
    w, values = inputs("per row", (3, 5, 7), "logits", torch.float32)
    w, values = w * 1e4, values * 1e3
    expected = reference.log_einsum_exp(w.double(), values.double())
    for matrix, rows in ((w, slice(None)), (w[1], slice(1, 2))):
        got = ops.log_einsum_exp(matrix.to(backend.device), values[rows].to(backend.device))
        torch.testing.assert_close(got.cpu().double(), expected[rows], rtol=1e-5, atol=1e-3)


def test_nan_stays_nan(backend: Backend) -> None:
    w, values = torch.zeros(3, 5), torch.zeros(2, 5)
    values[0, 2] = torch.nan
    for matrix in (w, w.expand(2, 3, 5).clone()):
        out = ops.log_einsum_exp(matrix.to(backend.device), values.to(backend.device))
        assert out[0].isnan().all() and out[1].isfinite().all()


# --- autograd, shapes, errors ---------------------------------------------------------------------
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("regime", ["shared", "grouped", "per row"])
def test_first_and_second_derivatives_pass_gradcheck(regime: str, norm: str) -> None:
    shape = (2, 3, 2, 4) if regime == "grouped" else (3, 2, 4)
    w, values = inputs(regime, shape, norm, torch.float64, seed=3)
    w, values = w.nan_to_num(neginf=-1), values.nan_to_num(neginf=-1)
    w = w.clamp(min=0.1) if norm == "probs" else w
    leaves = [t.requires_grad_() for t in (w, values)]
    assert torch.autograd.gradcheck(lambda *t: ops.log_einsum_exp(*t, norm), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: ops.log_einsum_exp(*t, norm), leaves)


@pytest.mark.parametrize("regime", ["shared", "grouped", "per row"])
def test_third_derivative_equals_that_of_the_formula(regime: str) -> None:
    shape = (2, 3, 2, 4) if regime == "grouped" else (3, 2, 4)
    w, values = inputs(regime, shape, "logits", torch.float64, seed=3)
    leaves = [t.nan_to_num(neginf=-1).requires_grad_() for t in (w, values)]

    def third(f) -> tuple[Tensor, ...]:
        # Powers of all gradients are summed, so that the next derivative depends on all of them.
        value = f(*leaves).square().sum()
        for power in (3, 2):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g**power).sum() for g in grads)
        return torch.autograd.grad(value, leaves)

    for a, b in zip(third(ops.log_einsum_exp), third(reference.log_einsum_exp), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_tangents_raise() -> None:
    w, values = inputs("shared", (3, 2, 4), "logits", torch.float64)
    for f in (
        lambda v: ops.log_einsum_exp(w, v),
        lambda v: ops.log_einsum_exp(w, v, "logits", "max").values,
        lambda v: ops.log_bmm(v[None], w.T[None]),
    ):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(f, (values,), (values,))


def test_log_bmm_and_two_derivatives_equal_the_formula(backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = 3 * torch.randn(3, 4, 5, generator=g), 3 * torch.randn(3, 5, 6, generator=g)
    a[0, 1] = -torch.inf
    b[1, :, 2] = -torch.inf
    a[2, 0, 0] = -5000
    expected = reference.log_bmm(a.double(), b.double())
    assert_close_logs(ops.log_bmm(a.to(backend.device), b.to(backend.device)), expected, 5)
    if backend.is_twin:
        leaves = [torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 3, 2).double()]
        leaves = [t.requires_grad_() for t in leaves]
        assert torch.autograd.gradcheck(ops.log_bmm, leaves)
        assert torch.autograd.gradgradcheck(ops.log_bmm, leaves)
        with pytest.raises(ValueError, match="one dtype"):
            ops.log_bmm(a, b.double())


@pytest.mark.parametrize("regime", ["shared", "grouped", "per row"])
def test_strided_inputs_and_empty_batches_are_supported(backend: Backend, regime: str) -> None:
    shape = (2, 6, 5, 8) if regime == "grouped" else (6, 5, 8)
    w, values = inputs(regime, shape, "logits", torch.float32)
    w, values = w.to(backend.device), values.to(backend.device)
    out = ops.log_einsum_exp(w, values)
    sliced_w = torch.stack([w, w], -1)[..., 0]  # The last axis is not contiguous.
    wide = torch.cat([values, values], -1)[..., :8]  # larger row stride
    assert torch.equal(ops.log_einsum_exp(sliced_w, wide), out)
    wide_w = torch.cat([w, w], -2)[..., :5, :]
    assert torch.equal(ops.log_einsum_exp(wide_w, values), out)
    none = ops.log_einsum_exp(w[:0] if regime == "per row" else w, values[..., :0, :])
    assert none.shape == (*shape[:-3], 0, 5)
    leaf = w.clone().requires_grad_()
    ops.log_einsum_exp(
        leaf[:0] if regime == "per row" else leaf, values[..., :0, :]
    ).sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()
    # The upstream gradient from a sum is expanded (stride 0).
    a = torch.autograd.grad(ops.log_einsum_exp(leaf, values).clamp(min=-99).sum(), leaf)[0]
    b = torch.autograd.grad(
        ops.log_einsum_exp(leaf, values), leaf, (out >= -99).float().contiguous()
    )[0]
    assert torch.equal(a, b)


def test_expanded_matrix_gives_the_same_result_as_a_shared_one(backend: Backend) -> None:
    w, values = inputs("shared", (6, 5, 8), "logits", torch.float32)
    w, values = w.to(backend.device).requires_grad_(), values.to(backend.device)
    a, b = ops.log_einsum_exp(w, values), ops.log_einsum_exp(w.expand(6, 5, 8), values)
    assert torch.equal(a, b)
    possible = a > -torch.inf
    da, db = (torch.autograd.grad(t[possible].sum(), w)[0] for t in (a, b))
    assert torch.equal(da, db)


def test_rows_of_an_expanded_leaf_have_separate_gradients(backend: Backend) -> None:
    w, values = inputs("shared", (6, 5, 8), "logits", torch.float32)
    w, values = w.nan_to_num(neginf=-1).to(backend.device), values.to(backend.device)
    expanded = w.expand(6, 5, 8).requires_grad_()
    own = w.expand(6, 5, 8).clone().requires_grad_()
    grads = [
        torch.autograd.grad(ops.log_einsum_exp(t, values).clamp(min=-99).sum(), t)[0]
        for t in (expanded, own)
    ]
    assert torch.equal(*grads)


def test_row_with_its_own_matrix_does_not_depend_on_the_batch(backend: Backend) -> None:
    w, values = inputs("per row", (7, 20, 33), "logits", torch.float32)
    w, values = w.to(backend.device), values.to(backend.device)
    together = ops.log_einsum_exp(w, values)
    again = ops.log_einsum_exp(w, values)
    assert torch.equal(together, again)
    for b in (0, 6):
        alone = ops.log_einsum_exp(w[b : b + 1], values[b : b + 1])
        assert torch.equal(alone, together[b : b + 1])


def test_row_with_shared_weights_does_not_depend_on_batch_or_threads() -> None:
    w, values = inputs("shared", (67, 70, 130), "logits", torch.float32)
    leaves = [w.requires_grad_(), values.requires_grad_()]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = ops.log_einsum_exp(w, values)
        results.append((out, *torch.autograd.grad(out.clamp(min=-99).sum(), leaves)))
    torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    together, _, dvalues = results[0]
    part = ops.log_einsum_exp(w, values[60:64]).clamp(min=-99).sum()
    assert torch.equal(torch.autograd.grad(part, values)[0][60:64], dvalues[60:64])
    for rows in (slice(0, 1), slice(60, 64), slice(66, 67)):
        assert torch.equal(ops.log_einsum_exp(w, values[rows]), together[rows])
    scaled = ops.log_einsum_weights(w)
    assert torch.equal(ops.log_einsum_exp(w, values, scaled=scaled), together)


def test_number_of_threads_changes_no_bit_of_rows_with_their_own_matrix() -> None:
    w, values = inputs("per row", (64, 16, 64), "logits", torch.float32)
    w.requires_grad_()
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out = ops.log_einsum_exp(w, values)
        grad = torch.autograd.grad(out.clamp(min=-99).sum(), w)[0]
        results.append((out, grad))
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("regime", ["shared", "grouped"])
@pytest.mark.parametrize("norm", NORMS)
def test_scaled_weights_may_be_passed(backend: Backend, regime: str, norm: str) -> None:
    shape = (2, 3, 5, 7) if regime == "grouped" else (3, 5, 7)
    w, values = inputs(regime, shape, norm, torch.float32)
    w, values = w.to(backend.device).requires_grad_(), values.to(backend.device)
    scaled = ops.log_einsum_weights(w, norm)
    log_w = log_weights(w.detach().cpu().double(), norm)
    got = scaled.weight.cpu().double() * scaled.shift.cpu().double().exp()[..., None]
    torch.testing.assert_close(got, log_w.exp(), rtol=1e-5, atol=1e-6)
    a, b = ops.log_einsum_exp(w, values, norm), ops.log_einsum_exp(w, values, norm, scaled=scaled)
    assert torch.equal(a, b)
    da, db = (torch.autograd.grad(t.clamp(min=-99).sum(), w)[0] for t in (a, b))
    assert torch.equal(da, db)
    with pytest.raises(ValueError, match="expected shape of w"):
        ops.log_einsum_exp(w[..., :4, :], values, norm, scaled=scaled)


@pytest.mark.parametrize("regime", ["shared", "grouped", "per row"])
def test_ops_pass_opcheck(regime: str) -> None:
    shape = (2, 3, 4, 5) if regime == "grouped" else (3, 4, 5)
    w, values = inputs(regime, shape, "logits", torch.float32)
    w, values = w.nan_to_num(neginf=-3), values.nan_to_num(neginf=-3)
    leaves = [t.requires_grad_() for t in (w, values)]
    torch.library.opcheck(torch.ops.lora_ext.log_einsum_exp.default, (*leaves, "logits", "fp32"))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.lora_ext.log_einsum_max.default, (*plain, "logits"))
    torch.library.opcheck(torch.ops.lora_ext.log_einsum_weights.default, (plain[0], "logits"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(4)}, "w and values: expected shapes"),
        ({"w": torch.zeros(4, 6)}, "as many terms as w, I = 6"),
        ({"w": torch.zeros(2, 4, 5)}, "the same number of rows"),
        ({"w": torch.zeros(4, 5, dtype=torch.int32)}, "w: expected float32"),
        ({"w": torch.zeros(4, 0), "values": torch.zeros(3, 0)}, "at least one term"),
        ({"values": torch.zeros(3, 5).half()}, "values: expected Float"),
        ({"values": torch.zeros(3, 5).double()}, "values: expected Float"),
        ({"values": torch.zeros(2, 3, 5)}, "w and values: expected shapes"),
        ({"w": torch.zeros(3, 4, 5), "values": torch.zeros(2, 3, 5)}, "the same number of groups"),
        ({"norm": "softmax"}, "norm: expected one of"),
        ({"semiring": "min"}, "semiring: expected one of"),
        ({"precision": "fp8"}, "precision: expected 'fp32', 'high' or 'fp16s'"),
    ],
)
def test_wrong_input_raises(change: dict, message: str) -> None:
    arguments = {"w": torch.zeros(4, 5), "values": torch.zeros(3, 5), **change}
    with pytest.raises(ValueError, match=message):
        ops.log_einsum_exp(**arguments)
