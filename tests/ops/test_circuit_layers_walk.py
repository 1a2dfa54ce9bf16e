"""Draws and best trees of whole circuits, compared with the formula on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import Backend
from circuit_programs import GRAPHS, case, offsets, roots_of, spoiled
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lora_ext
from lora_ext import ops, reference
from lora_ext.circuits import Circuit, Gaussian, Input, RegionGraph

SLOW = "the emulator that checks every access is too slow"
NO_CAPTURE = "no CUDA device, or a build without kernels"


def walk(
    backend: Backend,
    program: ops.Program,
    val: Tensor,
    w: Tensor,
    root: Tensor,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Return the result of ``circuit_layers_walk`` on a backend, as a CPU tensor."""
    on_device = program.to(torch.device(backend.device))
    val, w, root = (t.to(backend.device) for t in (val, w, root))
    u = None if uniforms is None else uniforms.to(backend.device)
    return ops.circuit_layers_walk(val, w, on_device, root, u).cpu()


def start(program: ops.Program, rows: int) -> Tensor:
    return torch.arange(rows) % program.plan[5]


def uniforms_of(program: ops.Program, walks: int, seed: int = 0) -> Tensor:
    return torch.rand(walks, program.plan[9], generator=torch.Generator().manual_seed(seed))


def certain(like: Tensor, seed: int) -> Tensor:
    """Return the logarithms of random probabilities, of which a third are 1 and the others 0.
    Results computed from them are exact."""
    chance = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(chance < 1 / 3, 0.0, -torch.inf)


@pytest.mark.parametrize("name", GRAPHS)
def test_draws_equal_the_formula_if_sums_are_exact(backend: Backend, name: str) -> None:
    if backend.small and name == "a stage a launch":
        pytest.skip(SLOW)
    program, leaf, w, _ = case(name, 6)
    val, w = certain(leaf.new_empty(6, program.plan[0]), 1), certain(w, 2)
    u = uniforms_of(program, 18)
    u[::2] = (u[::2] * 8).floor() / 8  # Half of the uniforms equal many of the cumulative sums.
    args = val, w, start(program, 6), u
    expected = reference.circuit_layers_walk(val, w, program.numbers, *args[2:])
    assert torch.equal(walk(backend, program, *args), expected)


@pytest.mark.parametrize("name", GRAPHS)
def test_draws_and_best_trees_equal_the_formula(backend: Backend, name: str) -> None:
    if backend.small and name == "a stage a launch":
        pytest.skip(SLOW)
    program, leaf, w, _ = case(name, 5)
    for semiring, u in (("sum", uniforms_of(program, 10)), ("max", None)):
        val = reference.circuit_layers(leaf.double(), w.double(), program.numbers, "none", semiring)
        root = start(program, 5)
        # The reference is in float64. No uniform is so close to a cumulative sum that rounding
        # changes the draw.
        expected = reference.circuit_layers_walk(val, w.double(), program.numbers, root, u)
        assert torch.equal(walk(backend, program, val.float(), w, root, u), expected)


def test_float64_equals_the_formula() -> None:
    for name in GRAPHS:
        program, leaf, w, _ = case(name, 5)
        leaf, w, root = leaf.double(), w.double(), start(program, 5)
        u = uniforms_of(program, 20).double()
        val = ops.circuit_layers(leaf, w, program)
        expected = reference.circuit_layers_walk(val, w, program.numbers, root, u)
        assert torch.equal(ops.circuit_layers_walk(val, w, program, root, u), expected)


@pytest.mark.parametrize("name", ["chain", "tree", "pairs", "shared parts"])
def test_first_of_equal_terms_is_chosen(backend: Backend, name: str) -> None:
    program, leaf, w, _ = case(name, 7)
    leaf, w = (leaf / 4).round(), (w / 4).round()
    val = reference.circuit_layers(leaf, w, program.numbers, "none", "max")
    root = start(program, 7)
    expected = reference.circuit_layers_walk(val, w, program.numbers, root)
    assert torch.equal(walk(backend, program, val, w, root), expected)


@pytest.mark.parametrize("norm", ["logits", "none"])
def test_best_tree_has_the_max_product_value_of_its_root(backend: Backend, norm: str) -> None:
    """Check bitwise equality, since the walk compares the same terms as the upward pass."""
    program, leaf, w, _ = case("pairs", 19)
    on_device, w_on = program.to(torch.device(backend.device)), w.to(backend.device)
    root = start(program, 19)

    def values(leaf: Tensor) -> tuple[Tensor, Tensor]:
        val = ops.circuit_layers(leaf.to(backend.device), w_on, on_device, norm, "max").cpu()
        return val, val[:, roots_of(program)].gather(1, root[:, None])

    val, top = values(leaf)
    assert (top > -torch.inf).all()
    chosen = walk(backend, program, val, w, root)
    alone = torch.full_like(leaf, -torch.inf)
    alone.scatter_(1, chosen - 2, leaf.gather(1, chosen - 2))
    assert torch.equal(values(alone)[1], top)


def test_term_of_weight_zero_is_never_drawn(backend: Backend) -> None:
    program = Circuit(RegionGraph.cp(1, 4, Gaussian()))._execution.program
    w = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    u = torch.tensor([[0.0], [0.5], [0.4999], [1 - 2**-24]])
    found = walk(backend, program, torch.zeros(1, 7), w, torch.tensor([0]), u)
    assert (found[:, 0] - 2).tolist() == [1, 2, 1, 2]


def test_weights_far_below_the_largest_are_drawn(backend: Backend) -> None:
    """Check that weights are added in float64, which can represent 1 + 2^-30."""
    program = Circuit(RegionGraph.cp(1, 3, Gaussian()))._execution.program
    w = torch.tensor([0.0, -30.0, -30.0]) * torch.tensor(2.0).log()
    near_one = [[2**-28], [2**-30 - 2**-32], [2**-30 + 2**-32]]
    u = 1 - torch.tensor(near_one, dtype=torch.float64)
    found = walk(backend, program, torch.zeros(1, 6), w, torch.tensor([0]), u)
    assert (found[:, 0] - 2).tolist() == [0, 2, 1]


def test_variables_outside_a_root_stay_unassigned(backend: Backend) -> None:
    inputs = {f"{v}{k}": Input([v], Gaussian()) for v in range(3) for k in "ab"}
    products = [("s", ["0a", "1a"]), ("s", ["0b", "1b"]), ("t", ["1a", "2a"]), ("t", ["1b", "2b"])]
    circuit = Circuit(RegionGraph.from_edges(inputs, products, multi_root=True))
    program = circuit._execution.program
    val = torch.zeros(4, program.plan[0])
    found = walk(backend, program, val, torch.zeros(4), torch.tensor([0, 1, 1, 0]))
    open_ = found < 0
    assert open_.sum(1).tolist() == [1] * 4
    assert torch.equal(open_[0], open_[3]) and torch.equal(open_[1], open_[2])
    assert not torch.equal(open_[0], open_[1])


def test_walk_is_the_same_alone_and_in_a_batch(backend: Backend) -> None:
    program, leaf, w, _ = case("pairs", 37)
    val = reference.circuit_layers(leaf, w, program.numbers)
    root, u = start(program, 37), uniforms_of(program, 111)
    together = walk(backend, program, val, w, root, u)
    for b in (0, 17, 36):
        rows, walks = slice(b, b + 1), slice(3 * b, 3 * b + 3)
        alone = walk(backend, program, val[rows], w, root[rows], u[walks])
        assert torch.equal(alone, together[walks])
    loose = torch.zeros(111, 3 + u.shape[1])
    loose[:, 2:-1] = u  # a strided copy
    assert torch.equal(walk(backend, program, val.T.contiguous().T, w, root, u), together)
    assert torch.equal(walk(backend, program, val, w, root, loose[:, 2:-1]), together)


def test_number_of_threads_changes_no_walk() -> None:
    program, leaf, w, _ = case("tree", 3)
    val, u = ops.circuit_layers(leaf, w, program), uniforms_of(program, 3000)
    found: list[Tensor] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.circuit_layers_walk(val, w, program, torch.zeros(3).long(), u))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_empty_batches_and_zero_walks_give_empty_results(backend: Backend) -> None:
    program, leaf, w, _ = case("chain", 2)
    val = reference.circuit_layers(leaf, w, program.numbers)
    none = torch.zeros(0, dtype=torch.long)
    assert walk(backend, program, val[:0], w, none).shape == (0, 4)
    assert walk(backend, program, val[:0], w, none, uniforms_of(program, 0)).shape == (0, 4)
    root, u = torch.zeros(2, dtype=torch.long), uniforms_of(program, 0)
    assert walk(backend, program, val, w, root, u).shape == (0, 4)


@pytest.mark.parametrize("fill", [torch.nan, -torch.inf, torch.inf])
def test_walk_stays_inside_the_circuit_for_any_values(backend: Backend, fill: float) -> None:
    program, _, w, _ = case("pairs", 4)
    val = torch.full((4, program.plan[0]), fill)
    root, n = start(program, 4), program.plan[1]
    uniforms = [None, uniforms_of(program, 8)]
    if not backend.is_twin:  # CPU twins raise for NaN uniforms.
        uniforms.append(torch.full((8, program.plan[9]), torch.nan))
    for u in uniforms:
        for weights in (w, torch.full_like(w, fill)):
            found = walk(backend, program, val, weights, root, u)
            assert ((found >= 2) & (found < 2 + n)).all()


def test_walks_pass_opcheck() -> None:
    program, leaf, w, _ = case("pairs", 3)
    val, root = ops.circuit_layers(leaf, w, program), start(program, 3)
    for u in (None, uniforms_of(program, 6)):
        torch.library.opcheck(
            torch.ops.lora_ext.circuit_layers_walk.default, (val, w, *program, root, u)
        )


@pytest.mark.parametrize("drawn", [False, True])
def test_one_graph_works_for_any_number_of_rows(drawn: bool) -> None:
    program, _, w, _ = case("pairs", 2)
    compiled = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=compiled, dynamic=True, fullgraph=True)
    def below(val: Tensor, root: Tensor, u: Tensor | None) -> Tensor:
        return ops.circuit_layers_walk(val, w, program, root, u) - 2

    for rows in (3, 4, 6):
        val, root = torch.zeros(rows, program.plan[0]), start(program, rows)
        u = uniforms_of(program, rows) if drawn else None
        expected = ops.circuit_layers_walk(val, w, program, root, u) - 2
        assert torch.equal(below(val, root, u), expected)
    assert compiled.frame_count == 1


@pytest.mark.cuda
def test_captured_walk_replays_with_changed_inputs(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available() or not lora_ext._C.has_kernels():
        if request.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu: {NO_CAPTURE}")
        pytest.skip(NO_CAPTURE)
    program, leaf, w, _ = case("pairs", 5)
    program = program.to(torch.device("cuda"))
    leaf, w, root = leaf.cuda(), w.cuda(), start(program, 5).cuda()
    u = uniforms_of(program, 10).cuda()
    val = ops.circuit_layers(leaf, w, program)
    ops.circuit_layers_walk(val, w, program, root, u)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.circuit_layers_walk(val, w, program, root, u)
    u.copy_(uniforms_of(program, 10, seed=1))
    graph.replay()
    assert torch.equal(captured, ops.circuit_layers_walk(val, w, program, root, u))


def test_wrong_input_raises() -> None:
    program, leaf, w, _ = case("pairs", 2)
    val, root, u = ops.circuit_layers(leaf, w, program), start(program, 2), uniforms_of(program, 4)
    at = offsets(program)
    beyond = u.clone()
    beyond.view(-1)[3] = 1.5
    go, unit = ops.circuit_layers_walk, r"uniforms: expected numbers in \[0, 1\]"
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("val: expected U", lambda: go(val[:, 1:], w, program, root)),
        ("w: expected Float", lambda: go(val, w.double(), program, root)),
        ("root: expected Long", lambda: go(val, w, program, root.int())),
        (r"root: expected shape \(B,\)", lambda: go(val, w, program, root[:1])),
        ("root: expected numbers in 0 .. 1, found 2", lambda: go(val, w, program, root + 1)),
        ("root: expected numbers in 0 .. 1, found -1", lambda: go(val, w, program, root - 1)),
        ("uniforms: expected shape", lambda: go(val, w, program, root, u[:, 1:])),
        ("uniforms: expected M a multiple of the", lambda: go(val, w, program, root, u[1:])),
        ("uniforms: expected Float", lambda: go(val, w, program, root, u.half())),
        (f"{unit}, found nan at flat index 0", lambda: go(val, w, program, root, u * torch.nan)),
        (f"{unit}, found -0.5 at", lambda: go(val, w, program, root, 0 * u.double() - 0.5)),
        (f"{unit}, found 1.5 at flat index 3", lambda: go(val, w, program, root, beyond)),
        (
            "program: expected an earlier node or a variable as owner",
            lambda: go(val, w, spoiled(program, at["owners"], program.plan[3]), root),
        ),
        (
            "program: expected an earlier node or a variable as owner",
            lambda: go(val, w, spoiled(program, at["owners"], -1 - program.plan[8]), root),
        ),
        (
            "program: expected columns that belong to their owner",
            lambda: go(val, w, spoiled(program, at["draws"] - 1, 0), root),
        ),
        (
            "program: expected indices of uniforms in range",
            lambda: go(val, w, spoiled(program, len(program.numbers) - 1, program.plan[9]), root),
        ),
        ("plan: expected", lambda: go(val, w, program._replace(plan=program.plan[:-1]), root)),
    ]
    for message, call in refusals:
        with pytest.raises(ValueError, match=f"circuit_layers_walk: {message}"):
            call()


def test_walk_stays_inside_the_circuit_for_forged_programs() -> None:
    program, leaf, w, _ = case("pairs", 2)
    val, root, u = ops.circuit_layers(leaf, w, program), start(program, 2), uniforms_of(program, 4)
    accepted = 0
    for at, number in enumerate(program.numbers.tolist()):
        for forged in {-(2**31), -1, 0, number - 1, number + 1, 2**31 - 1} - {number}:
            try:
                found = ops.circuit_layers_walk(val, w, spoiled(program, at, forged), root, u)
            except ValueError:
                continue
            accepted += 1
            assert ((found >= -1) & (found < program.plan[0])).all()
    assert accepted < len(program.numbers)
