"""Whole circuits and tables of leaf log-probabilities, compared with formulas on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import Backend
from circuit_programs import GRAPHS, LEAF, STAGED, case, roots_of, spoiled
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.circuits import Circuit, RegionGraph
from lora_ext.circuits._program import matrices_of


def run(backend: Backend, name: str, rows: int, norm: str, dtype: torch.dtype = torch.float32):
    """Return values, flows and the gradient of the weights, as CPU tensors."""
    program, leaf, w, roots = case(name, rows)
    program = program.to(torch.device(backend.device))
    leaf, w = (t.to(backend.device, dtype) for t in (leaf, w))
    droots = (1 + torch.arange(roots, dtype=dtype)).expand(rows, -1).to(backend.device)
    val = ops.circuit_layers(leaf, w, program, norm)
    units, dw = ops.circuit_layers_backward(droots, val, w, program, norm)
    return val.cpu(), units.cpu(), dw.cpu()


def formula(name: str, rows: int, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    program, leaf, w, roots = case(name, rows)
    leaf, w = leaf.double().requires_grad_(), w.double().requires_grad_()
    val = reference.circuit_layers(leaf, w, program.numbers, norm)
    top = val[:, roots_of(program)]
    total = (torch.where(top > -torch.inf, top, 0) * (1 + torch.arange(roots))).sum()
    dleaf, dw = torch.autograd.grad(total, (leaf, w))
    return val.detach(), dleaf, dw


@pytest.mark.parametrize("norm", ["logits", "none"])
@pytest.mark.parametrize("name", [*GRAPHS, *STAGED])
def test_values_and_gradients_equal_the_formula(backend: Backend, name: str, norm: str) -> None:
    rows = 5 if name.endswith("a stage a launch") else 19
    val, units, dw = run(backend, name, rows, norm)
    expected, dleaf, exact_dw = formula(name, rows, norm)
    assert torch.equal(val == -torch.inf, expected == -torch.inf)
    finite = expected > -torch.inf
    # There are at most six layers. Sums have up to 1352 terms, added in groups with a few
    # roundings.
    torch.testing.assert_close(val[finite].double(), expected[finite], rtol=2e-6, atol=2e-5)
    got = units[:, 2 : 2 + dleaf.shape[1]].double()
    torch.testing.assert_close(got, dleaf, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(dw.double(), exact_dw, rtol=2e-4, atol=2e-4)


def test_float64_results_are_within_float64_rounding() -> None:
    for name in GRAPHS:
        for norm in ("logits", "none"):
            val, units, dw = run(Backend("cpu"), name, 9, norm, torch.float64)
            expected, dleaf, exact_dw = formula(name, 9, norm)
            torch.testing.assert_close(val, expected, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(
                units[:, 2 : 2 + dleaf.shape[1]], dleaf, rtol=1e-11, atol=1e-12
            )
            torch.testing.assert_close(dw, exact_dw, rtol=1e-11, atol=1e-12)


def test_sums_of_one_term_of_probability_one_are_exact_apart_from_exponentials(
    backend: Backend,
) -> None:
    program, leaf, w, _ = case("tree", 33)
    g = torch.Generator().manual_seed(3)
    leaf = torch.randint(-8, 9, leaf.shape, generator=g).float()
    for first, sums, terms in matrices_of(program):  # leaves one term of weight 1 per sum
        rows = torch.full((sums, terms), -torch.inf)
        rows[torch.arange(sums), torch.randint(terms, (sums,), generator=g)] = 0
        w[first : first + sums * terms] = rows.flatten()
    expected = reference.circuit_layers(leaf, w, program.numbers)
    on_device = program.to(torch.device(backend.device))
    val = ops.circuit_layers(leaf.to(backend.device), w.to(backend.device), on_device).cpu()
    possible = expected > -torch.inf
    assert torch.equal(val > -torch.inf, possible)
    if backend.is_twin:
        assert torch.equal(val, expected)
    # A kernel's exponential of x has a relative error of at most (1.23 |x| + 4) 2^-24. |x| and the
    # values are at most `spread`; the logarithm and the sum add a rounding each.
    spread = 2 * float(expected[possible].abs().max())
    bound = len(matrices_of(program)) * (1.23 * spread + 4 + 2 * spread) * 2**-24
    assert (val[possible] - expected[possible]).abs().max() <= bound


@pytest.mark.parametrize("name", GRAPHS)
def test_max_product_equals_the_formula(backend: Backend, name: str) -> None:
    if backend.small and name == "a stage a launch":
        pytest.skip("the emulator that checks every access is too slow")
    program, leaf, w, _ = case(name, 5)
    on_device = program.to(torch.device(backend.device))

    def up(leaf: Tensor, w: Tensor, norm: str) -> Tensor:
        leaf, w = leaf.to(backend.device), w.to(backend.device)
        return ops.circuit_layers(leaf, w, on_device, norm, "max").cpu()

    whole = leaf.round(), w.round()
    expected = reference.circuit_layers(*whole, program.numbers, "none", "max")
    assert torch.equal(up(*whole, "none"), expected)
    exact = reference.circuit_layers(leaf.double(), w.double(), program.numbers, "logits", "max")
    # A normaliser has one rounding per term. A path has at most 11 weights and leaves.
    torch.testing.assert_close(up(leaf, w, "logits").double(), exact, rtol=2e-6, atol=2e-5)


def test_path_far_below_the_dominant_states_keeps_its_value(backend: Backend) -> None:
    """Check a sum with weight 0 for the likely state; its other state is e^-900 times as likely."""
    program = Circuit(RegionGraph.cp(1, 2, LEAF))._execution.program
    leaf = torch.tensor([[0.0, -900.0], [-900.0, 0.0], [-torch.inf, -900.0]])
    w = torch.tensor([-torch.inf, 1.5])
    on_device = program.to(torch.device(backend.device))
    leaf_on, w_on = leaf.to(backend.device), w.to(backend.device)
    val = ops.circuit_layers(leaf_on, w_on, on_device, "none")
    assert torch.equal(val[:, -1].cpu(), torch.tensor([-898.5, 1.5, -898.5]))
    ones = torch.ones(3, 1, device=backend.device)
    units, dw = ops.circuit_layers_backward(ones, val, w_on, on_device, "none")
    assert torch.equal(units[:, 2:4].cpu(), torch.tensor([[0.0, 1.0]] * 3))
    assert torch.equal(dw.cpu(), torch.tensor([0.0, 3.0]))


@pytest.mark.slow
def test_sums_that_would_underflow_keep_their_values_and_flows(backend: Backend) -> None:
    """Check a left-to-right chain in which the last states are the most likely. Most sums contain
    only a state and its predecessor; the log-probability of the predecessor is lower by 90."""
    states = 130
    program = Circuit(RegionGraph.hmm(2, states, LEAF))._execution.program
    g = torch.Generator().manual_seed(0)
    leaf = torch.rand(18, 2 * states, generator=g) - 90.0 * torch.arange(states).flip(0).repeat(2)
    w = torch.zeros(states * states + states)
    reach = torch.full((states, states), -torch.inf)
    for o in range(states):
        reach[o, max(0, o - 1) : o + 1] = torch.tensor([-0.3, -1.35])[-(o + 1) :]
    w[: states * states] = reach.flatten()
    droots = torch.rand(18, 1, generator=g)
    on_device = program.to(torch.device(backend.device))
    exact, exact_w = leaf.double().requires_grad_(), w.double().requires_grad_()
    expected = reference.circuit_layers(exact, exact_w, program.numbers, "none")
    total = (expected[:, roots_of(program)] * droots).sum()
    dleaf, exact_dw = torch.autograd.grad(total, (exact, exact_w))
    leaf, w = leaf.to(backend.device), w.to(backend.device)
    for precision, bound in (("fp32", 2e-6), ("high", 2e-5), ("fp16s", 1e-3)):
        val = ops.circuit_layers(leaf, w, on_device, "none", precision=precision)
        error = (val.cpu().double() - expected).abs()[:, 2:]
        assert (error <= bound + 2.0**-22 * expected[:, 2:].abs()).all()
    val = ops.circuit_layers(leaf, w, on_device, "none")
    units, dw = ops.circuit_layers_backward(droots.to(backend.device), val, w, on_device, "none")
    got = units[:, 2 : 2 + leaf.shape[1]].cpu().double()
    # The rounding error of logarithms near -12000 is 5e-4, and so is the relative error of the
    # flows.
    torch.testing.assert_close(got, dleaf, rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(dw.cpu().double(), exact_dw, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize(("precision", "bound"), [("high", 2.0**-15), ("fp16s", 2.0**-10)])
def test_errors_of_lower_precisions_stay_within_the_bound_above_256_terms(
    backend: Backend, precision: str, bound: float
) -> None:
    if backend.is_twin:
        pytest.skip("CPU twins have only one precision")
    program, leaf, w, _ = case("pairs, a stage a launch", 3)
    expected = reference.circuit_layers(leaf.double(), w.double(), program.numbers)
    on_device = program.to(torch.device(backend.device))
    leaf, w = leaf.to(backend.device), w.to(backend.device)
    val = ops.circuit_layers(leaf, w, on_device, precision=precision).cpu().double()
    possible = expected > -torch.inf
    assert torch.equal(val > -torch.inf, possible)
    # Each value is rounded to float32 once, followed by two layers of sums.
    error = (val - expected)[possible].abs()
    assert (error <= 3 * bound + 2.0**-21 * (20 + expected[possible].abs())).all()
    # Without such an error, the op would not have used float16.
    assert precision == "high" or error.max() > 2.0**-17


@pytest.mark.slow
def test_tile_size_changes_no_bit_of_a_row(backend: Backend) -> None:
    """Compare flows of 3072 rows, in tiles of 128 x 64, with flows of one row, in a tile of 64 x
    32."""
    if backend.is_twin or backend.small:
        pytest.skip("only kernels have tiles, and the checking emulator is too slow")
    circuit = Circuit(RegionGraph.hmm(2, 130, LEAF))
    g = torch.Generator().manual_seed(0)
    program = circuit._execution.program.to(torch.device(backend.device))
    leaf = torch.randn(3072, 260, generator=g).to(backend.device)
    w = torch.randn(len(circuit.weights), generator=g).to(backend.device)
    val = ops.circuit_layers(leaf, w, program)
    units, _ = ops.circuit_layers_backward(leaf.new_ones(3072, 1), val, w, program, need_dw=False)
    for b in (0, 1700, 3071):
        alone = ops.circuit_layers(leaf[b : b + 1], w, program)
        assert torch.equal(alone, val[b : b + 1])
        got, _ = ops.circuit_layers_backward(leaf.new_ones(1, 1), alone, w, program, need_dw=False)
        assert torch.equal(got, units[b : b + 1])


@pytest.mark.slow
def test_chain_is_one_launch_and_more_rows_need_another(backend: Backend) -> None:
    """Check 130 states. Three blocks share 32 rows, so 132 multiprocessors process 1408 rows per
    launch."""
    if backend.is_twin or backend.small or backend.device != "cpu":
        pytest.skip("only the emulator counts launches, and the checking emulator is too slow")
    circuit = Circuit(RegionGraph.hmm(3, 130, LEAF, homogeneous=True))
    program = circuit._execution.program
    g = torch.Generator().manual_seed(0)
    leaf, w = torch.randn(1440, 390, generator=g), torch.randn(len(circuit.weights), generator=g)

    def launches(rows: int) -> tuple[int, Tensor]:
        before = backend.module.launches()
        val = ops.circuit_layers(leaf[:rows], w, program)
        return backend.module.launches() - before, val

    one, few = launches(20)
    two, many = launches(1440)
    assert (one, two) == (3, 4)  # one launch each for weights and leaves, one or two for the chain
    assert torch.equal(few, many[:20])


@pytest.mark.slow
def test_flows_of_many_weights_equal_the_formula(backend: Backend) -> None:
    """Check 900 x 900 weights. Their flows are computed in tiles of 128 x 64."""
    if backend.small:
        pytest.skip("the emulator that checks every access is too slow")
    circuit = Circuit(RegionGraph.hmm(2, 900, LEAF))
    g = torch.Generator().manual_seed(0)
    program = circuit._execution.program
    leaf, w = (torch.randn(n, generator=g) for n in ((3, 1800), (len(circuit.weights),)))
    exact = w.double().requires_grad_()
    expected = reference.circuit_layers(leaf.double(), exact, program.numbers)[:, -1]
    (flows,) = torch.autograd.grad(expected.sum(), exact)
    on_device = program.to(torch.device(backend.device))
    leaf, w = leaf.to(backend.device), w.to(backend.device)
    val = ops.circuit_layers(leaf, w, on_device)
    assert (val[:, -1].cpu().double() - expected).abs().max() < 4e-6
    ones = torch.ones(3, 1, device=backend.device)
    _, dw = ops.circuit_layers_backward(ones, val, w, on_device)
    torch.testing.assert_close(dw.cpu().double(), flows, rtol=2e-4, atol=1e-7)


def test_row_is_bitwise_equal_alone_and_in_a_batch(backend: Backend) -> None:
    program, leaf, w, _ = case("pairs", 37)
    program, leaf, w = program.to(torch.device(backend.device)), leaf.to(backend.device), w
    w = w.to(backend.device)
    val = ops.circuit_layers(leaf, w, program)
    for b in (0, 17, 36):
        assert torch.equal(ops.circuit_layers(leaf[b : b + 1], w, program), val[b : b + 1])
    again = ops.circuit_layers(leaf.T.contiguous().T, w, program)  # other strides, the same bits
    assert torch.equal(again, val)


def test_number_of_threads_changes_no_bit() -> None:
    found: list[list[Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([*run(Backend("cpu"), "tree", 150, "logits")])
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_values_in_another_layout_give_the_same_gradient(backend: Backend) -> None:
    program, leaf, w, roots = case("chain", 6)
    program, leaf, w = program.to(torch.device(backend.device)), leaf.to(backend.device), w
    w = w.to(backend.device)
    val, ones = ops.circuit_layers(leaf, w, program), torch.ones(6, roots, device=backend.device)
    first = ops.circuit_layers_backward(ones, val, w, program)
    second = ops.circuit_layers_backward(ones, val.contiguous(), w, program)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not ops.circuit_layers_backward(ones, val, w, program, need_dw=False)[1].numel()


def test_padding_of_copied_values_does_not_affect_large_weights(backend: Backend) -> None:
    program, leaf, w, roots = case("chain", 6)
    program, leaf = program.to(torch.device(backend.device)), leaf.to(backend.device)
    w = (w + 90).to(backend.device)  # e^90 overflows float32.
    val, ones = ops.circuit_layers(leaf, w, program, "none"), leaf.new_ones(6, roots)
    first = ops.circuit_layers_backward(ones, val, w, program, "none")
    second = ops.circuit_layers_backward(ones, val.contiguous(), w, program, "none")
    assert first[1].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_leaves_and_gradients_may_have_any_strides(backend: Backend) -> None:
    program, leaf, w, _ = case("chain", 6)
    program, w = program.to(torch.device(backend.device)), w.to(backend.device)
    loose = torch.zeros(12, 2 * leaf.shape[1])
    loose[::2, 1::2] = leaf
    loose, leaf = loose.to(backend.device)[::2, 1::2], leaf.to(backend.device)
    for other in (loose, loose.T.clone(memory_format=torch.preserve_format).T):
        assert torch.equal(
            ops.circuit_layers(other, w, program), ops.circuit_layers(leaf, w, program)
        )
    table = torch.zeros(4, 3, device=backend.device, requires_grad=True)
    x, row = torch.zeros(6, 2, dtype=torch.long), torch.tensor([0, 2])
    out = ops.circuit_table(table, x.to(table.device), row.to(table.device), 2)
    dout = loose[:, :4].nan_to_num(neginf=1)
    got, expected = (
        torch.autograd.grad(out, table, d, retain_graph=True)[0] for d in (dout, dout.contiguous())
    )
    assert torch.equal(got, expected)


def test_empty_batch_gives_empty_values(backend: Backend) -> None:
    program, leaf, w, roots = case("chain", 0)
    program = program.to(torch.device(backend.device))
    leaf, w = leaf.to(backend.device), w.to(backend.device)
    val = ops.circuit_layers(leaf, w, program)
    assert val.shape == (0, program.plan[0])
    ones = torch.ones(0, roots, device=backend.device)
    assert not ops.circuit_layers_backward(ones, val, w, program)[1].any()


@pytest.mark.parametrize("values", [1, 5, 64, 90])
def test_tables_of_logits_are_softmaxed(backend: Backend, values: int) -> None:
    g = torch.Generator().manual_seed(values)
    logits = 3 * torch.randn(40, values, generator=g)
    logits[1, 1:] = -torch.inf
    logits[2] = -torch.inf  # no value is possible
    # so large that maximum + log(sum) would lose digits: the maximum must be subtracted first
    logits[3] += 1e4
    table = logits.to(backend.device).requires_grad_()
    x = torch.randint(-1, values, (37, 4), generator=g).to(backend.device)
    row = torch.tensor([0, 20, 0, 0], device=backend.device)
    out = ops.circuit_table(table, x, row, 20, "logits")
    exact = logits.double().to(backend.device).requires_grad_()
    expected = reference.circuit_table(exact, x, row, 20, "logits")
    torch.testing.assert_close(out.double(), expected, rtol=4e-7, atol=4e-6)
    dout = torch.randn(out.shape, generator=g).to(out).masked_fill(expected == -torch.inf, 0)
    (got,) = torch.autograd.grad(out, table, dout)
    (dtable,) = torch.autograd.grad(expected, exact, dout.double())
    # A row of the gradient is the sum of up to 111 numbers of size 1.
    torch.testing.assert_close(got.double(), dtable, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [0, 1, 21])
def test_circuit_table_equals_the_formula_bit_for_bit(backend: Backend, rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    table = torch.randint(-8, 9, (9, 4), generator=g).float().to(backend.device).requires_grad_()
    x = torch.randint(-1, 4, (rows, 5), generator=g).to(backend.device)
    row = torch.tensor([0, 3, 3, 6, 0], device=backend.device)
    out = ops.circuit_table(table, x, row, 3)
    expected = reference.circuit_table(table, x, row, 3)
    assert torch.equal(out, expected)
    dout = torch.randint(-4, 5, out.shape, generator=g).to(out)
    for d in (dout, dout.T.contiguous().T):
        (got,) = torch.autograd.grad(out, table, d, retain_graph=True)
        assert torch.equal(got, torch.autograd.grad(expected, table, d, retain_graph=True)[0])


@pytest.mark.slow
def test_tables_pass_opcheck_and_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(4, 3, dtype=torch.float64, generator=g).requires_grad_()
    x, row = torch.tensor([[0, -1], [2, 1]]), torch.tensor([0, 2])
    for norm in ("none", "logits"):
        torch.library.opcheck(torch.ops.lora_ext.circuit_table.default, (table, x, row, 2, norm))
        assert torch.autograd.gradcheck(
            lambda t, norm=norm: ops.circuit_table(t, x, row, 2, norm), table
        )


def test_layers_pass_opcheck() -> None:
    program, leaf, w, roots = case("pairs", 3)
    numbers, plan = program
    torch.library.opcheck(
        torch.ops.lora_ext.circuit_layers.default, (leaf, w, numbers, plan, "logits", "sum")
    )
    val = ops.circuit_layers(leaf, w, program)
    torch.library.opcheck(
        torch.ops.lora_ext.circuit_layers_backward.default,
        (torch.ones(3, roots), val, w, numbers, plan, "logits", True),
    )


def test_sizes_with_too_many_bytes_for_an_int64_raise() -> None:
    units, rows = 1_073_788_162, 2_147_390_976
    assert 8 * units * rows % 2**64 == 8 * 732_160
    numbers = torch.tensor([units, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, -1], dtype=torch.int32)
    program = ops.Program(numbers, [units, 1, 0, 0, 0, 1, len(numbers), 0, 1, 0])
    leaf = torch.zeros(1, 1, dtype=torch.float64).expand(rows, 1)
    with pytest.raises(RuntimeError, match="overflow"):
        ops.circuit_layers(leaf, leaf.new_zeros(0), program)


def test_wrong_input_raises() -> None:
    program, leaf, w, roots = case("chain", 2)
    first_part = 10 + 6 * program.plan[3]
    parts, children = program.numbers[4:6].tolist()
    end_of_users = first_part + 4 * parts + 2 * children + 5  # index of the first `user_end`
    up = ops.circuit_layers
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("leaf: expected N = 20", lambda: up(leaf[:, 1:], w, program)),
        ("leaf: expected float", lambda: up(leaf.half(), w, program)),
        ("w: expected Float", lambda: up(leaf, w.double(), program)),
        ("program: expected matrices in the range of", lambda: up(leaf, w[1:], program)),
        ("norm: expected", lambda: up(leaf, w, program, "probs")),
        ("semiring: expected", lambda: up(leaf, w, program, "none", "min")),
        ("plan: expected", lambda: up(leaf, w, program._replace(plan=program.plan[:-1]))),
        ("program: expected", lambda: up(leaf, w, program._replace(numbers=program.numbers[:-1]))),
        ("program: expected nodes", lambda: up(leaf, w, spoiled(program, 10, 10**6))),
        ("program: expected parts", lambda: up(leaf, w, spoiled(program, first_part + 2, -1))),
        (
            "program: expected users of a matrix",
            lambda: up(leaf, w, spoiled(program, end_of_users, 0)),
        ),
        (
            "program: expected .* the size in the plan",
            lambda: up(leaf, w, program._replace(plan=[*program.plan[:6], 5, *program.plan[7:]])),
        ),
        (
            "plan: expected the sizes of the program",
            lambda: up(leaf, w, program._replace(plan=[*program.plan[:3], 1, *program.plan[4:]])),
        ),
    ]
    for message, call in refusals:
        with pytest.raises(ValueError, match=f"circuit_layers: {message}"):
            call()
    with pytest.raises(ValueError, match="circuit_layers_backward: droots: expected shape"):
        val = up(leaf, w, program)
        ops.circuit_layers_backward(torch.ones(2, roots + 1), val, w, program)
    table, x, row = torch.zeros(4, 3), torch.zeros(2, 2, dtype=torch.long), torch.tensor([0, 2])
    lookups: list[tuple[str, Callable[[], object]]] = [
        ("x: expected values in -1 .. 2, found 3", lambda: ops.circuit_table(table, x + 3, row, 2)),
        ("row: expected multiples of 2", lambda: ops.circuit_table(table, x, row + 1, 2)),
        ("x: expected Long", lambda: ops.circuit_table(table, x.int(), row, 2)),
        ("block: expected a size of 1 to", lambda: ops.circuit_table(table, x, row, 0)),
        ("norm: expected 'logits'", lambda: ops.circuit_table(table, x, row, 2, "probs")),
    ]
    for message, call in lookups:
        with pytest.raises(ValueError, match=f"circuit_table: {message}"):
            call()


def test_debug_mode_checks_the_program_on_every_device(backend: Backend) -> None:
    program, leaf, w, _ = case("chain", 2)
    leaf, w = leaf.to(backend.device), w.to(backend.device)
    bad = spoiled(program, 10, 10**6).to(torch.device(backend.device))
    backend.module.set_debug(True)
    try:
        with pytest.raises(ValueError, match="circuit_layers: program: expected nodes"):
            ops.circuit_layers(leaf, w, bad)
    finally:
        backend.module.set_debug(False)
