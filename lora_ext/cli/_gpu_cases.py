"""Cases of ``lora-ext gpu-report``: ops with inputs, and the references that they must match.

A launcher is a C++ function that starts the CUDA kernels of an op. The cases call every launcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.circuits import Categorical, Circuit, RegionGraph

Inputs = dict[str, Any]
Call = Callable[[], list[Tensor]]
Make = Callable[[torch.Generator, int], Inputs]


@dataclass(frozen=True)
class Case:
    """Op with inputs, and the reference that its results must match.

    Args:
        op: name of the case, which begins with the name of the op.
        launchers: names of the launchers in ``csrc/include`` that the op calls, without the prefix
            ``launch_``.
        make: function that receives a generator and a size, and returns inputs. Size 0 is small,
            for the check, and size 1 is large, for the timing. The floor of a time is computed from
            all inputs, so a timed case has no input that the op does not read.
        ready: function that prepares all arguments from the inputs, and returns the call of the op.
            Only the call is timed, so it must not create a tensor on the host.
        formula: reference function, which computes the same results from float64 inputs.
        dtype: dtype of the floating-point inputs of the op.
        bound: maximum absolute error of a result, divided by its largest absolute value.
        exact: whether the results must be equal, since they are indices.
        timed: whether the case is also timed, with the large size.
        read: function that turns inputs and results of the op into the results of the reference.
    """

    op: str
    launchers: tuple[str, ...]
    make: Make
    ready: Callable[[Inputs], Call]
    formula: Callable[[Inputs], list[Tensor]]
    dtype: torch.dtype = torch.float32
    bound: float = 1e-4
    exact: bool = False
    timed: bool = True
    read: Callable[[Inputs, list[Tensor]], list[Tensor]] = lambda given, found: found

    def run(self, given: Inputs) -> list[Tensor]:
        """Return the results of the op, to be compared with those of the reference."""
        return self.read(given, self.ready(given)())


def moved(inputs: Mapping[str, Any], outputs: list[Tensor]) -> int:
    """Return the total size in bytes of all arguments and results, which a kernel must move."""
    return sum(t.nbytes for t in [*tensors(inputs), *outputs])


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, list) else []


def convert(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``move`` to every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {key: convert(each, move) for key, each in value.items()}
    return [convert(each, move) for each in value] if isinstance(value, list) else value


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


# --- LoRA -----------------------------------------------------------------------------------------
# (rows, input features, output features, rank, adapters) of the small and of the large size
_DECODE = ((5, 72, 48, 16, 3), (64, 4096, 4096, 16, 64))
_PREFILL = ((300, 72, 48, 16, 3), (4096, 4096, 4096, 16, 4))
_WIDE = ((300, 72, 48, 264, 2), (4096, 4096, 4096, 512, 1))


def lora_inputs(sizes: Any, g: torch.Generator, size: int) -> Inputs:
    rows, i, o, rank, adapters = sizes[size]
    return {
        "x": randn(g, rows, i),
        "a": randn(g, adapters, rank, i) / i**0.5,
        "b": randn(g, adapters, o, rank),
        "ids": torch.randint(-1, adapters, (rows,), generator=g),
    }


def only(make: Make, *names: str) -> Make:
    """Return the function that makes some of the inputs of ``make``."""

    def some(g: torch.Generator, size: int) -> Inputs:
        made = make(g, size)
        return {name: made[name] for name in names}

    return some


def both(name: str, launchers: tuple[str, ...], make: Any, ready: Any, **how: Any) -> Case:
    """Return the case that compares an op with the reference function of the same name.

    ``ready(function, inputs)`` returns the call of one of the two functions.
    """
    op, formula, label = getattr(ops, name), getattr(reference, name), how.pop("op", name)
    return Case(label, launchers, make, partial(ready, op), lambda i: ready(formula, i)(), **how)


def pair(name: str, make: Any, arguments: Any, *launchers: str, **how: Any) -> Case:
    """Return the case of an op and its reference function, which have the same arguments.

    ``arguments`` is the function that returns the arguments for the inputs. The input
    "row_weights" is passed as ``weights``.
    """

    def ready(function: Any, given: Inputs) -> Call:
        bound = arguments(given)
        named = {"weights": given["row_weights"]} if "row_weights" in given else {}

        def call() -> list[Tensor]:
            found = function(*bound, **named)
            return tensors([found] if isinstance(found, Tensor) else list(found))

        return call

    return both(name, launchers, make, ready, **how)


def shrink(given: Inputs) -> tuple[Tensor, ...]:
    return given["x"], given["a"], given["ids"]


def bank(given: Inputs) -> tuple[Tensor, ...]:
    return given["x"], given["a"], given["b"], given["ids"]


def _projected(g: torch.Generator, size: int) -> Inputs:
    made = lora_inputs(_DECODE, g, size)
    v = randn(g, len(made["x"]), made["b"].shape[2])
    return {"projected": v, "b": made["b"], "ids": made["ids"]}


def _expand(given: Inputs) -> tuple[Tensor, ...]:
    v, b = given["projected"], given["b"]
    return b.new_zeros(len(v), b.shape[1]), v, b, given["ids"]


def sibling_inputs(g: torch.Generator, size: int) -> Inputs:
    made = [lora_inputs(_DECODE, g, size) for _ in range(3)]
    return {**made[0], **{name: [each[name] for each in made] for name in ("a", "b")}}


def siblings(given: Inputs) -> tuple[Any, ...]:
    x, a, b = given["x"], given["a"], given["b"]
    return [x.new_zeros(len(x), each.shape[1]) for each in b], x, a, b, given["ids"]


def _plan_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, *_, adapters = _PREFILL[size]
    return {"ids": torch.randint(-1, adapters, (rows,), generator=g), "adapters": adapters}


def _plan(given: Inputs) -> Call:
    return lambda: [ops.lora_plan(given["ids"], given["adapters"])]


def _ids_of_plan(given: Inputs, found_plan: list[Tensor]) -> list[Tensor]:
    """Return the adapter id of each row, read from the op's plan (rows grouped by adapter)."""
    rows, adapters = len(given["ids"]), given["adapters"]
    plan = found_plan[0].cpu()
    found = torch.full((rows,), -1)
    perm = plan[-(rows + adapters + 2) : -(adapters + 2)]
    for chunk in plan[8 : 8 + 4 * int(plan[0])].view(-1, 4).tolist():
        found[perm[chunk[1] : chunk[1] + chunk[2]].long()] = chunk[0]
    return [found]


def _segments(g: torch.Generator, size: int) -> Inputs:
    ends = torch.randint(1, 9, (4 if size == 0 else 512,), generator=g).cumsum(0)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    return {"indptr": indptr, "adapter": torch.arange(len(ends)).int() % 7}


def gradients(
    function: Callable[..., Tensor], given: Inputs, names: tuple[str, ...], *rest: Any
) -> Call:
    """Return the call of a function that also returns gradients for the inputs ``names``.

    The gradients are those of a weighted sum of the result. ``rest`` are further arguments.
    """
    leaves = [given[name].detach().clone().requires_grad_() for name in names]
    with torch.no_grad():
        y = function(*leaves, *rest)  # only its shape is used
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
    weights = weights.view(y.shape).to(y)

    def call() -> list[Tensor]:
        y = function(*leaves, *rest)
        return [y.detach(), *torch.autograd.grad(y, leaves, weights)]

    return call


def train(function: Any, given: Inputs) -> Call:
    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(x, None, None, a, b, given["ids"])

    return gradients(run, given, ("x", "a", "b"))


def _dropout(function: Any, given: Inputs) -> Call:
    seed = torch.tensor(7, device=given["x"].device)
    return lambda: [function(given["x"], 0.5, seed)]


def grams(g: torch.Generator, size: int) -> Inputs:
    rank, i, o = ((5, 40, 24), (64, 4096, 4096))[size]
    return {"a": [randn(g, rank, i) / i**0.5] * 3, "b": [randn(g, o, rank) / o**0.5] * 3}


BF16 = {"dtype": torch.bfloat16, "bound": 2.0**-6}
FLOAT = {"bound": 2.0**-13}  # of results that are float32 or float64 for inputs of every dtype


def lora_cases() -> list[Case]:
    """Return the cases of the ops that serve, train and measure adapters."""
    decode, prefill, wide = (partial(lora_inputs, sizes) for sizes in (_DECODE, _PREFILL, _WIDE))
    trains = ("lora_train_shrink", "lora_train_backward")
    return [
        Case(
            *("lora_plan", ("lora_plan",), _plan_inputs, _plan, lambda i: [i["ids"].cpu()]),
            exact=True,
            read=_ids_of_plan,
        ),
        pair(
            "lora_segment_ids",
            _segments,
            lambda i: (i["indptr"], i["adapter"], int(i["indptr"][-1])),
            "lora_segment_ids",
            exact=True,
        ),
        pair(
            "lora_shrink", only(decode, "x", "a", "ids"), shrink, "lora_shrink", **{**BF16, **FLOAT}
        ),
        pair("lora_expand_", _projected, _expand, "lora_expand", **BF16),
        pair("lora_apply", decode, bank, "lora_apply", **BF16),
        pair("lora_apply", prefill, bank, "lora_apply", op="lora_apply, prefill", **BF16),
        pair("lora_apply", wide, bank, "lora_apply", op="lora_apply, large rank", **BF16),
        pair("lora_apply_siblings_", sibling_inputs, siblings, "lora_apply", **BF16),
        both("lora_linear", trains, prefill, train, **BF16),
        both("lora_dropout", ("lora_dropout",), only(prefill, "x"), _dropout, **BF16),
        pair("lora_gram", grams, lambda i: (i["a"], i["b"]), "lora_gram", **FLOAT),
        pair(
            "lora_pair_stats",
            grams,
            lambda i: (i["a"], i["b"], [t / 2 for t in i["b"]], i["a"][0].new_ones(3).double()),
            "lora_pair_stats",
            **FLOAT,
        ),
    ]


# --- circuits -------------------------------------------------------------------------------------
def _circuit(g: torch.Generator, size: int) -> Inputs:
    return circuit_inputs(g, *((2, 5, 40), (256, 32, 320))[size])


def circuit_inputs(g: torch.Generator, batch: int, states: int, words: int) -> Inputs:
    return {
        "leaf": randn(g, batch, 8, states, words),
        "prior": randn(g, batch, states),
        "trans": randn(g, batch, 7, states, states),
        "x": torch.randint(words, (batch, 8), generator=g),
        "k": torch.randint(8, (batch,), generator=g),
        "uniforms": torch.rand(batch, 8, 2, generator=g),
        "target": randn(g, batch, 9, words),
    }


def scan(function: Any, given: Inputs) -> Call:
    def run(leaf: Tensor, prior: Tensor, trans: Tensor) -> Tensor:
        return function("hmm", leaf, prior, trans, given["x"]).prefix

    return gradients(run, given, ("leaf", "prior", "trans"))


def _parameters(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given["leaf"], given["prior"], given["trans"]


def head(given: Inputs) -> tuple[str, Tensor, Tensor, Tensor]:
    return "hmm", *_parameters(given)


def scored(function: Any, given: Inputs) -> Call:
    """Return the call that returns the log-probabilities of the sample that the op has drawn.

    The reference computes them for the op's tokens, since rounding might make it draw others.
    """

    def call() -> list[Tensor]:
        if function is not ops.circuit_sample:
            return [reference.circuit_scan(*head(given), given["drawn"]).conditional]
        found = function(*head(given), given["uniforms"])
        given["drawn"] = found.tokens
        return [found.conditional]

    return call


def verify(given: Inputs) -> tuple[Tensor, ...]:
    # Computed from the same numbers for the op and for the reference, whose tokens must be equal.
    leaf, prior, trans = (t.cpu().double() for t in _parameters(given))
    found = reference.circuit_scan("hmm", leaf, prior, trans, given["x"].cpu())
    leaf = given["leaf"]
    wide = reference.accumulator(leaf.dtype)
    conditional, posterior = (t.to(leaf.device, wide) for t in (found.conditional, found.posterior))
    uniforms = given["uniforms"][:, 0, 0].float()[:, None].expand(-1, 9).contiguous()
    target = given["target"]
    return target, given["x"], conditional, posterior, leaf, uniforms


def sum_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, nodes, inputs = ((6, 9, 20), (512, 256, 256))[size]
    return {"w": randn(g, nodes, inputs), "values": -randn(g, rows, inputs).abs()}


def _sum(function: Any, given: Inputs) -> Call:
    return gradients(function, given, ("w", "values"))


def _sums_of_rows(g: torch.Generator, size: int) -> Inputs:
    rows, nodes, inputs = ((3, 9, 20), (512, 8, 1024))[size]
    return {"w": randn(g, rows, nodes, inputs), "values": -randn(g, rows, inputs).abs()}


def _max(given: Inputs) -> tuple[Any, ...]:
    return given["w"], given["values"], "logits", "max"


def _tables(g: torch.Generator, size: int) -> Inputs:
    blocks, block, words, batch = ((3, 5, 11, 4), (64, 32, 1024, 512))[size]
    return {
        "table": randn(g, blocks * block, words),
        "x": torch.randint(words, (batch, blocks), generator=g),
        "row": torch.arange(blocks) * block,
        "block": block,
    }


def _table(function: Any, given: Inputs) -> Call:
    rest = given["x"], given["row"], given["block"], "logits"
    return gradients(function, given, ("table",), *rest)


def program_inputs(
    g: torch.Generator, size: int, states: tuple[int, int] = (5, 64), homogeneous: bool = False
) -> Inputs:
    graph = RegionGraph.hmm(4, states[size], Categorical(2), homogeneous)
    return graph_inputs(g, graph, (3, 512)[size])


def graph_inputs(g: torch.Generator, graph: RegionGraph, rows: int) -> Inputs:
    circuit = Circuit(graph)
    program = circuit._execution.program
    return {
        "leaf": randn(g, rows, program.plan[1]),
        "w": randn(g, len(circuit.weights)),
        "numbers": program.numbers,
        "plan": tuple(program.plan),
        "root": torch.arange(rows) % program.plan[5],
    }


def wide_program_inputs(g: torch.Generator, size: int) -> Inputs:
    """Return the inputs of a circuit that is large enough for tensor cores.

    The op runs the program of such a circuit stage by stage.
    """
    return program_inputs(g, size, (130, 512), homogeneous=True)


def layers(given: Inputs) -> Call:
    program = ops.Program(given["numbers"], list(given["plan"]))
    leaf, w = given["leaf"], given["w"]
    droots = torch.ones(len(leaf), program.plan[5], dtype=leaf.dtype, device=leaf.device)

    def call() -> list[Tensor]:
        val = ops.circuit_layers(leaf, w, program)
        return [val[:, 2:], ops.circuit_layers_backward(droots, val, w, program)[1]]

    return call


def layers_formula(given: Inputs) -> list[Tensor]:
    leaf, numbers = given["leaf"], given["numbers"]
    w = given["w"].detach().clone().requires_grad_()
    val = reference.circuit_layers(leaf, w, numbers)
    program = ops.Program(numbers, list(given["plan"]))
    (dw,) = torch.autograd.grad(val[:, _roots(program)].sum(), [w])
    return [val.detach()[:, 2:], dw]


def _roots(program: ops.Program) -> list[int]:
    """Return the units of the circuit's roots.

    In ``program.numbers``, they follow five other lists.
    """
    nodes, parts, children, matrices, users = program.numbers[3:8].tolist()
    first = 10 + 6 * nodes + 4 * parts + 2 * children + 6 * matrices + users
    return program.numbers[first : first + program.plan[5]].tolist()


def _walk(given: Inputs) -> Call:
    program = ops.Program(given["numbers"], list(given["plan"]))
    # The op receives the values that the reference has computed, so that both walks start from the
    # same values.
    leaf, w = (given[key].cpu().double() for key in ("leaf", "w"))
    val = reference.circuit_layers(leaf, w, program.numbers.cpu(), "none", "max")
    val = val.to(given["leaf"])
    return lambda: [ops.circuit_layers_walk(val, given["w"], program, given["root"])]


def _walk_formula(given: Inputs) -> list[Tensor]:
    leaf, w, numbers = given["leaf"], given["w"], given["numbers"]
    val = reference.circuit_layers(leaf, w, numbers, "none", "max")
    return [reference.circuit_layers_walk(val, w, numbers, given["root"])]


def circuit_cases() -> list[Case]:
    """Return the cases of the ops of circuits.

    They cover sums, tables, circuits of any graph, and circuits with parameters that a network
    computes.
    """
    scans = ("circuit_leaf", "circuit_leaf_backward", "circuit_scan", "circuit_scan_backward")
    sums = tuple(
        f"log_sum_{part}" for part in "weights values finish ratios dvalues dweights fused".split()
    )
    by_row = ("log_sum_per_row", "log_sum_per_row_backward")
    parameters, circuit = ("leaf", "prior", "trans"), ("leaf", "w", "numbers", "plan")
    stages = only(wide_program_inputs, *circuit)
    whole = ("layers_weights", "layers_forward", "layers_backward", "layers_dweights")

    return [
        both("circuit_scan", scans, only(_circuit, *parameters, "x"), scan),
        both(
            *("circuit_sample", ("circuit_sample",), only(_circuit, *parameters, "uniforms")),
            scored,
            **FLOAT,
        ),
        pair(
            "circuit_conditional_dist",
            only(_circuit, *parameters, "x", "k"),
            lambda i: (*head(i), i["x"], i["k"]),
            "circuit_conditional_dist",
            **FLOAT,
        ),
        pair("circuit_argmax", only(_circuit, *parameters), head, "circuit_argmax"),
        pair(
            *("spec_verify", only(_circuit, *parameters, "x", "uniforms", "target"), verify),
            "spec_verify",
            exact=True,
        ),
        both("log_einsum_exp", sums, sum_inputs, _sum),
        both("log_einsum_exp", by_row, _sums_of_rows, _sum, op="log_einsum_exp, of rows"),
        pair("log_einsum_exp", sum_inputs, _max, "log_max", op="log_einsum_exp, max"),
        both("circuit_table", ("circuit_table", "circuit_table_backward"), _tables, _table),
        Case("circuit_layers", whole, only(program_inputs, *circuit), layers, layers_formula),
        Case("circuit_layers, by stages", whole, stages, layers, layers_formula),
        Case(
            "circuit_layers_walk",
            ("layers_walk",),
            program_inputs,
            _walk,
            _walk_formula,
            exact=True,
        ),
    ]


# --- losses and mixtures --------------------------------------------------------------------------
def mixes(g: torch.Generator, size: int) -> Inputs:
    return mix_inputs(g, *((5, 40), (4096, 4096))[size])


def mix_inputs(g: torch.Generator, rows: int, width: int) -> Inputs:
    return {
        **{f"h{k}": randn(g, rows, width) for k in range(3)},
        "gammas": randn(g, 3, width),
        "weights": torch.rand(rows, 3, generator=g),
    }


def mix(function: Any, given: Inputs) -> Call:
    def run(h0: Tensor, h1: Tensor, h2: Tensor, gammas: Tensor, weights: Tensor) -> Tensor:
        return function([h0, h1, h2], gammas, weights, 1e-5)

    return gradients(run, given, ("h0", "h1", "h2", "gammas", "weights"))


def head_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, width, words = ((7, 24, 61), (2048, 2048, 32768))[size]
    return {
        "hidden": randn(g, rows, width),
        "other": randn(g, rows, width),
        "weight": randn(g, words, width) / width**0.5,
        "labels": torch.randint(words, (rows,), generator=g),
    }


def _entropy(function: Any, given: Inputs) -> Call:
    return gradients(function, given, ("hidden", "weight"), None, given["labels"])


def _divergence(function: Any, given: Inputs) -> Call:
    def run(hidden: Tensor) -> Tensor:  # The teacher's hidden states need no gradient.
        return function([hidden, given["other"]], given["weight"], None)

    return gradients(run, given, ("hidden",))


def _heads_of_rows(g: torch.Generator, size: int) -> Inputs:
    batch, rows, keys = ((2, 5, 40), (4, 1024, 1024))[size]
    return {
        "q": randn(g, batch, 6, rows, 64),
        "k": randn(g, batch, 2, keys, 64),
        "v": randn(g, batch, 2, keys, 64),
        "mask": torch.rand(batch, rows, keys, generator=g) < 0.9,
    }


def attend(function: Any, given: Inputs) -> Call:
    q, k, v, mask = (given[name] for name in ("q", "k", "v", "mask"))
    return lambda: [function(q, k, v, causal=True, mask=mask)]


def other_cases() -> list[Case]:
    """Return the cases of the ops for depth mixtures, losses over a vocabulary, and attention."""
    entropy = tuple(f"cross_entropy_{part}" for part in ("update", "finish", "gradient"))
    kl = tuple(f"kl_{part}" for part in ("update", "finish", "gradient"))
    labels, other = (only(head_inputs, "hidden", "weight", name) for name in ("labels", "other"))
    return [
        both("depth_mix", ("depth_mix", "depth_mix_backward"), mixes, mix),
        both("chunked_cross_entropy", entropy, labels, _entropy),
        both("chunked_kl", kl, other, _divergence),
        both("row_attention", ("row_attention",), _heads_of_rows, attend),
    ]


def all_cases() -> list[Case]:
    """Return all cases, which call every launcher at least once."""
    return [*lora_cases(), *circuit_cases(), *other_cases()]
