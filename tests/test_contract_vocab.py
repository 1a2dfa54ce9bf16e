"""Laws of the losses over a vocabulary, in addition to ``test_contract.py``."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from cases_vocab import SMALL, Case, Layer, both, close, gradients
from contract import assert_same_bits, with_threads
from torch import Tensor
from torch.nn import functional as F

from lora_ext import ops, reference

both_losses = pytest.mark.parametrize("loss", ["cross_entropy", "kl"])


def test_losses_have_known_values(backend: Backend) -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    eye = torch.eye(3, device=backend.device)
    teacher, student = p.log().to(backend.device), q.log().to(backend.device)
    for chunk in (1, 2, 3):
        got = ops.chunked_kl([student, teacher], eye, None, chunk=chunk)
        assert abs(got.item() - 0.1732868) < 1e-6
        label = torch.tensor([1], device=backend.device)
        got = ops.chunked_cross_entropy(teacher, eye, None, label, chunk=chunk)
        assert abs(got.item() - 1.3862944) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_extreme_logits_stay_finite(backend: Backend, frozen: bool) -> None:
    eye = torch.eye(4, device=backend.device, requires_grad=not frozen)
    hidden = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, -1e4, -1e4, -1e4]], device=backend.device)
    other = hidden.flip(1)
    for t in (hidden, other):
        t.requires_grad_()
    for chunk in (1, 4):
        labels = torch.tensor([1, 2], device=backend.device)
        loss = ops.chunked_cross_entropy(hidden, eye, None, labels, chunk=chunk)
        assert abs(loss.item() - (2e4 + 1.3862944) / 2) < 1e-2
        loss = loss + ops.chunked_kl([other, hidden], eye, None, chunk=chunk)
        loss.backward()
        assert loss.isfinite()
        for t in (hidden, other):
            assert t.grad is not None and t.grad.isfinite().all()
            t.grad = None


def test_sum_beyond_float16_does_not_overflow(backend: Backend) -> None:
    """Check a chunk of equal logits. The gradient first sums the rows of W in the chunk with weight
    one, and 8192 * 16 exceeds 65504, the largest float16."""
    if backend.library != "lora_ext":
        pytest.skip("the GEMM of the emulator has no float32 results for float16")
    hidden = torch.zeros(2, 4, dtype=torch.float16, device=backend.device, requires_grad=True)
    weight = torch.full((8192, 4), 16.0, dtype=torch.float16, device=backend.device)
    labels = torch.zeros(2, dtype=torch.int64, device=backend.device)
    ops.chunked_cross_entropy(hidden, weight, None, labels).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # All rows of W are equal, so dh = 0.


def test_tokens_with_a_bias_of_minus_infinity_have_probability_zero(backend: Backend) -> None:
    """Check that both distributions give probability 0 to tokens with a bias of -inf."""
    layer = Layer(Case(4, 8, 20, 6, bias=True, frozen=True), torch.float32, backend.device)
    layer.bias[:8] = -torch.inf
    layer.labels = layer.labels % 10 + 9
    for loss in ("cross_entropy", "kl"):
        got, expected = both(layer, loss, True), both(layer.wide(), loss, False)
        close(got, expected, 1e-5, loss)
        assert all(g.isfinite().all() for g in gradients(got, layer.leaves()))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("label", [2, 17], ids=["another", "the label"])
def test_non_finite_logit_has_the_same_effect_as_in_the_formula(
    backend: Backend, label: int, value: float, softcap: float | None
) -> None:
    """Check a logit in the last chunk, which is partial. The second row is ignored."""
    bias = torch.linspace(-1, 1, 18)
    bias[17] = value
    weight = torch.randn(18, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([label, -100])

    def losses(how: Any, t: torch.dtype, device: str, **chunk: int) -> list[Tensor]:
        hidden = torch.zeros(2, 4, dtype=t, device=device, requires_grad=True)
        args = (weight.to(device, t), bias.to(device, t), labels.to(device))
        loss = how(hidden, *args, softcap=softcap, **chunk)
        (grad,) = torch.autograd.grad(loss, hidden)
        return [loss.detach().cpu().double(), grad[0].cpu().double()]

    got = losses(ops.chunked_cross_entropy, torch.float32, backend.device, chunk=7)
    expected = losses(reference.chunked_cross_entropy, torch.float64, "cpu")
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_confident_prediction_keeps_its_small_loss_and_gradient(backend: Backend) -> None:
    """Check a loss of exp(-20). It is smaller than the last bit of 1, so the formula in float32
    would give 0."""
    hidden = torch.tensor([[20.0, 0.0]], device=backend.device, requires_grad=True)
    eye = torch.eye(2, device=backend.device)
    loss = ops.chunked_cross_entropy(
        hidden, eye, None, torch.tensor([0], device=backend.device), chunk=1
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    small = torch.tensor(-20.0, dtype=torch.float64).exp().item()
    assert abs(loss.item() - small) < 1e-5 * small
    assert torch.allclose(grad.cpu().double(), small * torch.tensor([[-1.0, 1.0]]).double())


@pytest.mark.parametrize("frozen", [False, True])
@both_losses
def test_loss_and_gradients_are_zero_if_all_rows_are_ignored(
    backend: Backend, frozen: bool, loss: str
) -> None:
    for softcap in (None, 2.0):
        case = Case(4, 8, 12, 5, bias=True, frozen=frozen, softcap=softcap)
        layer = Layer(case, torch.float32, backend.device)
        layer.labels.fill_(-100)
        layer.mask.fill_(False)
        got = both(layer, loss, True)
        assert got.item() == 0
        assert all(not g.any() for g in gradients(got, layer.leaves()))


@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_equal_to_student_gives_no_loss_or_gradient(backend: Backend, frozen: bool) -> None:
    """Check that equal logits give exactly 0. A library may round equal rows of a matrix product
    differently. Products of integers are therefore compared exactly, and others with a
    tolerance."""
    for dtype in backend.dtypes():
        for exact in (True, False):
            case = Case(5, 16, 40, 16, some=False, frozen=frozen)
            layer = Layer(case, dtype, backend.device, exact)
            teacher = layer.hiddens[-1]
            same = teacher.detach().clone().requires_grad_()
            loss = ops.chunked_kl([same, teacher], layer.weight, None, chunk=16)
            found = [loss, *torch.autograd.grad(loss, [same, teacher])]
            for t in found:
                assert t.abs().max() <= (0 if exact and t is loss else 1e-6), (dtype, exact)
            assert not found[2].any()
            loss = ops.chunked_kl(layer.hiddens, layer.weight, None, chunk=16)
            *students, of_teacher = torch.autograd.grad(loss, layer.hiddens)
            assert all(g.any() for g in students) and not of_teacher.any()


def test_ignore_index_is_respected_and_labels_out_of_range_raise(backend: Backend) -> None:
    layer = Layer(Case(6, 8, 12, 5, some=False), torch.float32, backend.device)
    layer.labels[::2] = 3
    args = layer.hiddens[0], layer.weight, None, layer.labels
    got = ops.chunked_cross_entropy(*args, chunk=5, ignore_index=3)
    expected = F.cross_entropy(args[0] @ args[1].T, layer.labels, ignore_index=3)
    assert torch.allclose(got, expected, rtol=1e-5)
    layer = Layer(Case(3, 4, 6, 4, some=False), torch.float32, backend.device)
    for bad in (-1, 6):
        layer.labels[1] = bad
        if backend.is_twin:
            expected = rf"chunked_cross_entropy: labels: expected -100 or .* \[0, 6\), found {bad}"
            with pytest.raises(ValueError, match=expected):
                both(layer, "cross_entropy", True)
        else:
            assert both(layer, "cross_entropy", True).isnan()


def test_layouts_and_repetition_change_no_bit(backend: Backend) -> None:
    """Check with integers, whose sums of products are exact in any order."""

    def strided(t: Tensor) -> Tensor:
        room = t.detach().new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 3)
        room[..., 1 : 2 * t.shape[-1] + 1 : 2] = t.detach()
        return room[..., 1 : 2 * t.shape[-1] + 1 : 2].requires_grad_(t.requires_grad)

    for dtype in backend.dtypes():
        case = Case(5, 16, 40, 16, bias=True)
        layer, other = (Layer(case, dtype, backend.device, exact=True) for _ in range(2))
        other.hiddens = [strided(h) for h in other.hiddens]
        other.weight, other.bias = strided(other.weight), strided(other.bias)
        for loss in ("cross_entropy", "kl"):
            first, again, apart = (both(x, loss, True) for x in (layer, layer, other))
            assert_same_bits(again, first)
            assert_same_bits(apart, first)
            for g, e in zip(
                gradients(apart, other.leaves()), gradients(first, layer.leaves()), strict=True
            ):
                assert g.shape == e.shape and torch.allclose(g, e, rtol=1e-2, atol=1e-3)


def test_number_of_threads_changes_no_bit() -> None:
    """Check the losses for integers, whose products are exact."""
    layer = Layer(Case(70, 16, 3000, 1000, hiddens=2), torch.float32, "cpu", exact=True)
    for loss in ("cross_entropy", "kl"):
        one, two = (both(layer, loss, True) for _ in with_threads(1, 2))
        assert_same_bits(one, two)


@pytest.mark.parametrize("frozen", [False, True])
def test_mixed_dtypes_are_computed_in_the_wider_one(backend: Backend, frozen: bool) -> None:
    for low in (torch.bfloat16, torch.float16):
        for first, second in ((low, torch.float32), (torch.float32, low)):
            case = Case(5, 16, 40, 16, bias=True, frozen=frozen)
            layer = Layer(case, torch.float32, backend.device)
            for t in layer.hiddens:
                t.data = t.data.to(first)
            layer.weight.data, layer.bias.data = layer.weight.to(second), layer.bias.to(second)
            for loss in ("cross_entropy", "kl"):
                wide = layer.wide()
                got, expected = both(layer, loss, True), both(wide, loss, False)
                assert got.dtype == torch.float32
                close(got, expected, 1e-5, loss)
                leaves = layer.leaves() if loss == "kl" else layer.leaves()[:1]
                others = wide.leaves() if loss == "kl" else wide.leaves()[:1]
                pairs = zip(
                    gradients(got, leaves), gradients(expected, others), leaves, strict=True
                )
                for g, e, leaf in pairs:
                    assert g.dtype == leaf.dtype
                    close(g, e, 1e-5 if leaf.dtype == torch.float32 else 1e-2, loss)


def test_autocast_sets_the_dtype_of_the_products(backend: Backend) -> None:
    layer = Layer(Case(5, 16, 40, 16), torch.float32, backend.device)
    hidden, weight = layer.hiddens[0], layer.weight
    with torch.autocast(backend.device, torch.bfloat16):
        got = ops.chunked_cross_entropy(hidden, weight, None, layer.labels, chunk=16)
        (dhidden, dweight) = torch.autograd.grad(got, (hidden, weight))
    low = [t.detach().bfloat16() for t in (hidden, weight)]
    assert_same_bits(got, ops.chunked_cross_entropy(*low, None, layer.labels, chunk=16))
    assert got.dtype == dhidden.dtype == dweight.dtype == torch.float32


@both_losses
def test_gradcheck_in_float64(loss: str) -> None:
    for case in (SMALL[3], SMALL[4], SMALL[6], SMALL[7]):
        # The teacher must be constant. Therefore the layer must be too, since its finite
        # differences would change the teacher.
        kl = loss == "kl"
        layer = Layer(replace(case, frozen=case.frozen or kl), torch.float64, "cpu")
        layer.hiddens = layer.hiddens if kl else layer.hiddens[:1]
        layer.hiddens[-1].requires_grad_(not kl)
        leaves = layer.leaves()

        def f(*leaves: Tensor, layer: Layer = layer) -> Tensor:
            given = list(leaves)
            layer.hiddens = [given.pop(0) if h.requires_grad else h for h in layer.hiddens]
            if given:
                layer.weight = given.pop(0)
            if given:
                layer.bias = given.pop(0)
            return both(layer, loss, True)

        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_losses_equal_eager_ones(frozen: bool) -> None:
    layer = Layer(Case(5, 16, 40, 16, bias=True, frozen=frozen), torch.float32, "cpu")

    def f(hiddens: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        loss = ops.chunked_cross_entropy(hiddens[0], weight, bias, layer.labels, chunk=16)
        return loss + ops.chunked_kl(hiddens, weight, bias, chunk=16, mask=layer.mask)

    expected = f(layer.hiddens, layer.weight, layer.bias)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = compiled(layer.hiddens, layer.weight, layer.bias)
    assert torch.allclose(got, expected, rtol=1e-6)
    for g, e in zip(
        gradients(got, layer.leaves()), gradients(expected, layer.leaves()), strict=True
    ):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-7)


def test_second_backward_gives_the_same_gradients_and_double_backward_raises(
    backend: Backend,
) -> None:
    for frozen in (False, True):
        layer = Layer(Case(3, 4, 6, 4, frozen=frozen), torch.float32, backend.device)
        for name in ("cross_entropy", "kl"):
            loss, hidden = both(layer, name, True), layer.hiddens[0]
            first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
            assert_same_bits(torch.autograd.grad(loss, hidden)[0], first)
            with pytest.raises(RuntimeError, match="is not itself differentiable"):
                torch.autograd.grad(both(layer, name, True), hidden, create_graph=True)
