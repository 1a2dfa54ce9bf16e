"""Laws of the circuit ops for training, in addition to ``test_contract.py``."""

import math

import pytest
import torch
from backends import Backend
from cases_circuit import (
    LEAVES,
    MEDIUM,
    OPS,
    SMALL,
    Inputs,
    Window,
    bounds,
    circuit_inputs,
    formula,
    run,
    window_of,
)
from contract import Outputs, assert_same_bits, same, shapes, within
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference._circuit import KINDS


def check_bounds(got: Outputs, inputs: Inputs, what: object) -> None:
    exact = formula(inputs)
    within(got, exact, bounds(inputs, exact), what)


@pytest.mark.parametrize("params", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_leaf_and_parameter_dtypes_may_differ(backend: Backend, params: torch.dtype) -> None:
    for dtype in backend.dtypes():
        window = Window("btree", 2, 4, 6, 9)
        i = circuit_inputs(window, dtype, seed=2, params=params, device=backend.device)
        got = run(i)
        assert all(got[f"d{k}"].dtype == i[k].dtype for k in LEAVES)
        check_bounds(got, i, (dtype, params))


def test_log_probabilities_may_replace_logits(backend: Backend) -> None:
    for kind in KINDS:
        i = circuit_inputs(window_of(kind, 3, 5, 4, 1), torch.float32, seed=3)
        i = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in i.items()}
        i |= {"leaf": -i["leaf"].abs()[..., 0], "x": None}
        check_bounds(run(i), i, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind: str) -> None:
    i = circuit_inputs(window_of(kind, 2, 5, 3, 4), torch.float64, seed=4)
    leaves = [i[k].requires_grad_() for k in LEAVES if i[k] is not None]

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.circuit_scan(kind, *values, *(None,) * (3 - len(values)), i["x"])[:2])

    assert torch.autograd.gradcheck(f, leaves)


def impossible_cases(device: str) -> dict[str, Inputs]:
    cases: dict[str, Inputs] = {}
    inf = -math.inf
    for kind in ("cp", "hmm", "btree"):
        i = circuit_inputs(Window(kind, 4, 5, 6, 7), torch.float32, seed=5, marginalised=False)
        i["x"] %= 6
        i["leaf"][1, 2, :, i["x"][1, 2]] = inf  # No state can emit the token.
        i["leaf"][2, 1] = inf  # all logits of a position are -inf
        i["prior"][0, :5] = inf  # only one possible initial state
        i["prior"][3] = inf  # no possible initial state
        if i["trans"] is not None:
            i["trans"][:, :, 2, 1:] = inf
            i["trans"][0, 1, 4] = inf  # a state without a successor
        cases[f"{kind} without a path"] = i
        i = circuit_inputs(Window(kind, 2, 6, 4, 5), torch.float32, seed=6)
        for t in (i["leaf"], i["prior"], *([i["trans"]] if i["trans"] is not None else [])):
            t.copy_(torch.where(t > 0, 1e4, -1e4))
        cases[f"{kind} at 1e4"] = i
    i = circuit_inputs(Window("hmm", 2, 9, 40, 5), torch.float32, seed=7, marginalised=False)
    band = torch.full((40, 40), inf)
    for shift in (0, 1):
        band.diagonal(shift).zero_()
    i["trans"] = i["trans"] + band
    i["prior"] = torch.where(torch.arange(40) == 0, 0.0, inf).expand(2, 40).contiguous()
    # The path allowed by the tokens is much less probable than states forbidden by later tokens.
    i["leaf"] = i["leaf"] * 40
    cases["left to right"] = i
    i = circuit_inputs(Window("hmm", 1, 4, 3, 3), torch.float32, seed=8, marginalised=False)
    i["prior"] = torch.tensor([[0.0, -200.0, inf]])  # e^-200 underflows, but the state is possible.
    i["leaf"][:, 1:, 0] = inf
    i["trans"][:] = torch.tensor([[0.0, inf, inf], [inf, 0.0, -150.0], [inf, inf, 0.0]])
    i["leaf"][:, 3, 1] = inf
    cases["one path below the smallest float"] = i
    i = circuit_inputs(Window("btree", 1, 4, 2, 3), torch.float32, seed=9, marginalised=False)
    i["trans"][:] = torch.tensor([[0.0, -180.0], [-300.0, 0.0]])
    i["leaf"][:, 0, 0] = inf  # Only the second state emits the first token,
    i["leaf"][:, 3, 1] = inf  # and only the first state emits the last token.
    i["leaf"][:, 2, 1] = inf
    cases["a tree whose halves need different states"] = i
    return {
        name: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in i.items()}
        for name, i in cases.items()
    }


@pytest.mark.parametrize("name", impossible_cases("cpu"))
def test_only_impossible_windows_are_minus_infinity_with_zero_gradient(
    backend: Backend, name: str
) -> None:
    i = impossible_cases(backend.device)[name]
    got, exact = run(i), formula(i)
    # The emission e, as large as the logits, is rounded once, and so is every sum that contains it.
    largest = max(i[k].nan_to_num(neginf=0).abs().max() for k in LEAVES if i[k] is not None)
    near = 2.0**-24 * (256 + 4 * float(largest))
    for key, value in got.items():
        assert torch.equal(value.cpu() == -math.inf, exact[key] == -math.inf), key
        assert not value.isnan().any(), key
        expected = exact[key].float()
        if key == "posterior":
            assert torch.equal(value.cpu() > 1e-37, expected > 1e-37)
        torch.testing.assert_close(value.cpu(), expected, rtol=2e-6, atol=near)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_errors_stay_small_on_long_chains(backend: Backend, kind: str) -> None:
    if backend.small:
        pytest.skip("this backend runs only small shapes")
    window = window_of(kind, 1, 2048 if backend.is_twin else 256, 3, 5)
    i = circuit_inputs(window, torch.float32, seed=10, device=backend.device)
    got, exact = run(i), formula(i)
    for key, value in got.items():
        assert value.isfinite().all()
        exactly = exact[key].float()
        # Each component of kind "cp" sums its log-probabilities in float32.
        torch.testing.assert_close(value.cpu(), exactly, rtol=3e-6, atol=1.3e-3)


@shapes(OPS[0], SMALL, MEDIUM, name="window")
def test_bits_of_a_row_do_not_depend_on_the_batch(backend: Backend, window: Window) -> None:
    i = circuit_inputs(window, torch.float32, seed=11, device=backend.device)
    together = run(i)
    for b in range(min(2, window.rows)):
        alone = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in i.items()}
        same(run(alone), {k: v[b : b + 1] for k, v in together.items()}, f"row {b}")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_strided_or_expanded(backend: Backend, kind: str) -> None:
    for c, v in ((4, 8), (3, 5)):
        window = window_of(kind, 3, 4, c, v)
        i = circuit_inputs(window, torch.float32, seed=13, device=backend.device)
        expected = run(i)
        apart = {
            k: torch.cat([i[k], i[k]], 1)[:, : i[k].shape[1]] for k in LEAVES if i[k] is not None
        }
        same(run({**i, **apart}), expected, "apart")
        turned = {k: t.transpose(0, 1).contiguous().transpose(0, 1) for k, t in apart.items()}
        same(run({**i, **turned, "x": i["x"].T.contiguous().T}), expected, "turned")
        one = {k: i[k][:1].expand_as(i[k]) for k in apart}
        copies = {k: t.contiguous() for k, t in one.items()}
        same(run({**i, **one}), run({**i, **copies}), "one for all")


def test_expanded_leaf_is_not_copied() -> None:
    leaf = torch.randn(1, 4, 8, 500).expand(64, 4, 8, 500)
    x = torch.zeros(64, 4, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.circuit_scan("cp", leaf, None, None, x)
    most = max(event.cpu_memory_usage for event in profile.key_averages())
    assert most < leaf[0].nelement() * 4 * 8  # A copy would have the size of 64 rows.


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(backend: Backend, kind: str) -> None:
    how = {"seed": 15, "device": backend.device}
    i = circuit_inputs(window_of(kind, 3, 4, 3, 5), torch.float32, **how)
    leaves = [i[k].requires_grad_() if i[k] is not None else None for k in LEAVES]

    def loss(leaf: Tensor, prior: Tensor | None, trans: Tensor | None) -> Tensor:
        scan = ops.circuit_scan(kind, leaf * 2, prior, trans, i["x"])
        return (scan.prefix * i["dprefix"]).sum() + scan.conditional.sum()

    torch.compiler.reset()
    given = [t for t in leaves if t is not None]
    expected = torch.autograd.grad(loss(*leaves), given)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(torch.autograd.grad(compiled(*leaves), given), expected, strict=True):
        assert_same_bits(mine, eager)


def test_gradients_are_computed_only_if_needed(backend: Backend) -> None:
    i = circuit_inputs(Window("hmm", 2, 3, 4, 5), torch.float32, seed=16, device=backend.device)
    every = run({**i, "dconditional": torch.zeros_like(i["dconditional"])})
    for wanted in LEAVES:
        parts = {k: i[k].detach().requires_grad_(k == wanted) for k in LEAVES}
        scan = ops.circuit_scan("hmm", *parts.values(), i["x"])
        (grad,) = torch.autograd.grad(scan.prefix, parts[wanted], i["dprefix"])
        assert_same_bits(grad, every[f"d{wanted}"])
        assert not scan.posterior.requires_grad


def test_double_backward_and_forward_mode_raise() -> None:
    i = circuit_inputs(Window("hmm", 2, 3, 4, 5), torch.float32, seed=17)
    leaf = i["leaf"].requires_grad_()
    prefix = ops.circuit_scan("hmm", leaf, i["prior"], i["trans"], i["x"]).prefix
    with pytest.raises(RuntimeError, match="not itself differentiable"):
        torch.autograd.grad((prefix * leaf[..., 0, 0]).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(
            lambda leaf: ops.circuit_scan("hmm", leaf, i["prior"], i["trans"], i["x"]).prefix,
            (i["leaf"].detach(),),
            (torch.ones_like(i["leaf"]),),
        )


def head(
    rows: int,
    dtype: torch.dtype,
    device: str,
    *,
    seed: int = 0,
    sizes: tuple[int, ...] = (3, 4, 9, 8),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, emit, x and the gradient of e. ``sizes`` is (K, C, V, D)."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, sizes[-1], generator=g).to(dtype)
    emit = torch.randn(sizes, generator=g).to(dtype)
    x = torch.randint(-1, sizes[2], (rows, sizes[0]), generator=g)
    de = torch.randn(rows, *sizes[:2], generator=g)
    de = de.double() if dtype == torch.float64 else de
    return tuple(t.to(device) for t in (h, emit, x, de))  # pyright: ignore


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_emission_gather_equals_the_formula(backend: Backend, rows: int) -> None:
    for dtype in backend.dtypes():
        h, emit, x, de = head(rows, dtype, backend.device)
        leaves = [t.detach().requires_grad_() for t in (h, emit)]
        e = ops.emission_gather(*leaves, x)
        got = [e.detach(), *torch.autograd.grad(e, leaves, de)]
        wide = [t.detach().cpu().double().requires_grad_() for t in (h, emit)]
        formula = reference.emission_gather(*wide, x.cpu())
        exact = [formula.detach(), *torch.autograd.grad(formula, wide, de.cpu().double())]
        # The logits (at most 12), their gradients, and sums of both are rounded to dtype.
        u = torch.finfo(dtype).eps / 2
        for mine, exactly, size in zip(got, exact, (12, 8, 8), strict=True):
            error = (mine.cpu().double() - exactly).abs()
            assert (error <= 4 * u * size * (1 + exactly.abs())).all(), dtype


def test_emission_gather_uses_chunks_of_bounded_size() -> None:
    rows, sizes = 300, (2, 8, 4100, 16)  # 131 KB of logits per row and position: 511 rows per chunk
    h, emit, x, de = head(rows, torch.float32, "cpu", sizes=sizes)
    h, de = h.repeat(4, 1), de.repeat(4, 1, 1)
    leaves = [t.requires_grad_() for t in (h, emit)]
    x = x.repeat(4, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        e = ops.emission_gather(*leaves, x)
        grads = torch.autograd.grad(e, leaves, de)
    most = max(event.cpu_memory_usage for event in profile.events())
    assert most <= 64 << 20
    expected = reference.emission_gather(h[:rows].detach(), emit.detach(), x[:rows])
    torch.testing.assert_close(e[900:], expected, rtol=1e-5, atol=1e-5)
    alone = [t.detach().requires_grad_() for t in (h[:rows], emit)]
    few = torch.autograd.grad(ops.emission_gather(*alone, x[:rows]), alone, de[:rows])
    torch.testing.assert_close(grads[0][900:], few[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1], 4 * few[1], rtol=1e-4, atol=1e-4)


def test_emission_gather_passes_gradcheck_opcheck_and_compile() -> None:
    h, emit, x, de = head(3, torch.float64, "cpu", seed=1, sizes=(2, 2, 3, 4))
    leaves = [t.requires_grad_() for t in (h, emit)]
    assert torch.autograd.gradcheck(lambda *t: ops.emission_gather(*t, x), leaves)
    library = torch.ops.lora_ext
    torch.library.opcheck(library.emission_gather.default, (*leaves, x))
    given = (de, h.detach(), emit.detach(), x, True, False)
    torch.library.opcheck(library.emission_gather_backward.default, given)
    compiled = torch.compile(ops.emission_gather, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*leaves, x), ops.emission_gather(*leaves, x))
    chained = ops.circuit_scan("cp", ops.emission_gather(*leaves, x))
    leaf = torch.einsum("bd,kcvd->bkcv", h, emit)
    torch.testing.assert_close(chained, ops.circuit_scan("cp", leaf, None, None, x))
