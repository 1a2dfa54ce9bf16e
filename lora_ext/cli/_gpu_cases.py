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
        floats: names of the inputs that are float32 for every dtype of the op.
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
    floats: tuple[str, ...] = ()
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


def only(make: Make, *names: str) -> Make:
    """Return the function that makes some of the inputs of ``make``."""

    def some(g: torch.Generator, size: int) -> Inputs:
        made = make(g, size)
        return {name: made[name] for name in names}

    return some


def plain(function: Callable[..., Any], **arguments: Any) -> Any:
    return function(**arguments)


def compared(
    name: str,
    make: Make,
    leaves: tuple[str, ...] = (),
    arguments: Callable[[Inputs], Inputs] = dict,
    call: Callable[..., Any] = plain,
    launchers: str = "",
    op: str = "",
    **how: Any,
) -> Case:
    """Return the case that compares an op with the reference function of the same name.

    Args:
        name: name of the two functions.
        make: see ``Case``. The names of the inputs are those of arguments of ``call``.
        leaves: arguments for which gradients of a weighted sum of the first result are returned
            too. Without leaves, all results are compared.
        arguments: function that prepares the arguments from the inputs, before the timing.
        call: function that receives one of the two functions and the arguments.
        launchers: names of the launchers, separated by spaces; by default, there is one, ``name``.
        op: name of the case, if it is not ``name``.
        how: further arguments of ``Case``.
    """

    def results(function: Callable[..., Any], bound: Inputs) -> list[Tensor]:
        found = call(function, **bound)
        return tensors([found] if isinstance(found, Tensor) else list(found))

    def ready(function: Callable[..., Any], given: Inputs) -> Call:
        bound = arguments(given)
        own = {k: convert(bound[k], lambda t: t.detach().clone().requires_grad_()) for k in leaves}
        bound, at = {**bound, **own}, tensors(own)
        if not leaves:
            return lambda: results(function, bound)
        with torch.no_grad():
            y = results(function, bound)[0]  # only its shape is used
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
        weights = weights.view(y.shape).to(y)

        def run() -> list[Tensor]:
            found = results(function, bound)[0]
            return [found.detach(), *torch.autograd.grad(found, at, weights)]

        return run

    names = (*(launchers or name.rstrip("_")).split(),)
    prepared, formula = (partial(ready, getattr(of, name)) for of in (ops, reference))
    return Case(op or name, names, make, prepared, lambda i: formula(i)(), **how)


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
        "adapter_ids": torch.randint(-1, adapters, (rows,), generator=g),
    }


def _projected(g: torch.Generator, size: int) -> Inputs:
    made = lora_inputs(_DECODE, g, size)
    v = randn(g, len(made["x"]), made["b"].shape[2])
    return {"v": v, "b": made["b"], "adapter_ids": made["adapter_ids"]}


def sibling_inputs(g: torch.Generator, size: int) -> Inputs:
    made = [lora_inputs(_DECODE, g, size) for _ in range(3)]
    return {**made[0], **{name: [each[name] for each in made] for name in ("a", "b")}}


def siblings(make: Make, **how: Any) -> Case:
    def arguments(given: Inputs) -> Inputs:
        x, b = given["x"], given["b"]
        return {**given, "y": [x.new_zeros(len(x), each.shape[1]) for each in b]}

    return compared("lora_apply_siblings_", make, (), arguments, launchers="lora_apply", **how)


def _plan_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, *_, adapters = _PREFILL[size]
    ids = torch.randint(-1, adapters, (rows,), generator=g)
    return {"adapter_ids": ids, "num_adapters": adapters}


def _plan(given: Inputs) -> Call:
    return lambda: [ops.lora_plan(given["adapter_ids"], given["num_adapters"])]


def _ids_of_plan(given: Inputs, found_plan: list[Tensor]) -> list[Tensor]:
    """Return the adapter id of each row, read from the op's plan (rows grouped by adapter)."""
    rows, adapters = len(given["adapter_ids"]), given["num_adapters"]
    plan = found_plan[0].cpu()
    found = torch.full((rows,), -1)
    perm = plan[-(rows + adapters + 2) : -(adapters + 2)]
    for chunk in plan[8 : 8 + 4 * int(plan[0])].view(-1, 4).tolist():
        found[perm[chunk[1] : chunk[1] + chunk[2]].long()] = chunk[0]
    return [found]


def _segments(g: torch.Generator, size: int) -> Inputs:
    ends = torch.randint(1, 9, (4 if size == 0 else 512,), generator=g).cumsum(0)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    return {"seg_indptr": indptr, "seg_adapter": torch.arange(len(ends)).int() % 7}


def _with_rows(given: Inputs) -> Inputs:
    return {**given, "num_tokens": int(given["seg_indptr"][-1])}


def _with_output(given: Inputs) -> Inputs:
    return {**given, "y": given["b"].new_zeros(len(given["v"]), given["b"].shape[1])}


def _with_seed(given: Inputs) -> Inputs:
    return {**given, "p": 0.5, "seed": torch.tensor(7, device=given["x"].device)}


def grams(g: torch.Generator, size: int) -> Inputs:
    rank, i, o = ((5, 40, 24), (64, 4096, 4096))[size]
    return {"a": [randn(g, rank, i) / i**0.5] * 3, "b": [randn(g, o, rank) / o**0.5] * 3}


def _pairs(given: Inputs) -> Inputs:
    halves, ones = [t / 2 for t in given["b"]], given["a"][0].new_ones(3).double()
    return {**given, "projected_b": halves, "scaling": ones}


BF16: Any = {"dtype": torch.bfloat16, "bound": 2.0**-6}
FLOAT: Any = {"bound": 2.0**-13}  # of results that are float32 or float64 for inputs of every dtype
#: Function that returns the case of training, see ``compared``.
train: Any = partial(
    compared,
    "lora_linear",
    leaves=("x", "a", "b"),
    arguments=partial(dict, weight=None, bias=None),
    launchers="lora_train_shrink lora_train_backward",
)


def lora_cases() -> list[Case]:
    """Return the cases of the ops that serve, train and measure adapters."""
    decode, prefill, wide = (partial(lora_inputs, sizes) for sizes in (_DECODE, _PREFILL, _WIDE))
    apply = partial(compared, "lora_apply", **BF16)
    plan = ("lora_plan", ("lora_plan",), _plan_inputs, _plan)
    return [
        Case(*plan, lambda i: [i["adapter_ids"].cpu()], exact=True, read=_ids_of_plan),
        compared("lora_segment_ids", _segments, arguments=_with_rows, exact=True),
        compared("lora_shrink", only(decode, "x", "a", "adapter_ids"), **{**BF16, **FLOAT}),
        compared("lora_expand_", _projected, arguments=_with_output, floats=("v",), **BF16),
        apply(decode),
        apply(prefill, op="lora_apply, prefill"),
        apply(wide, op="lora_apply, large rank"),
        siblings(sibling_inputs, **BF16),
        train(prefill, **BF16),
        compared("lora_dropout", only(prefill, "x"), arguments=_with_seed, **BF16),
        compared("lora_gram", grams, **FLOAT),
        compared("lora_pair_stats", grams, arguments=_pairs, **FLOAT),
    ]


# --- circuits -------------------------------------------------------------------------------------
PARAMETERS = ("leaf", "prior", "trans")
HMM = partial(dict, kind="hmm")
LAYERS = ("layers_weights", "layers_forward", "layers_backward", "layers_dweights")


def circuit_inputs(sizes: Any, g: torch.Generator, size: int) -> Inputs:
    batch, states, words = sizes[size]
    return {
        "leaf": randn(g, batch, 8, states, words),
        "prior": randn(g, batch, states),
        "trans": randn(g, batch, 7, states, states),
        "x": torch.randint(words, (batch, 8), generator=g),
        "k": torch.randint(8, (batch,), generator=g),
        "uniforms": torch.rand(batch, 8, 2, generator=g),
        "target": randn(g, batch, 9, words),
    }


def scan(make: Make, op: str = "") -> Case:
    make, name = only(make, *PARAMETERS, "x"), "circuit_scan"
    launchers = "circuit_leaf circuit_leaf_backward circuit_scan circuit_scan_backward"
    return compared(name, make, PARAMETERS, HMM, launchers=launchers, op=op)


def _sampled(given: Inputs) -> Call:
    arguments = {name: given[name] for name in (*PARAMETERS, "uniforms")}

    def call() -> list[Tensor]:
        found = ops.circuit_sample("hmm", **arguments)
        given["drawn"] = found.tokens
        return [found.conditional]

    return call


def _scored(given: Inputs) -> list[Tensor]:
    """Return the log-probabilities of the tokens that the op has drawn.

    Because of rounding the reference might draw others.
    """
    arguments = {name: given[name] for name in PARAMETERS}
    return [reference.circuit_scan("hmm", **arguments, x=given["drawn"]).conditional]


def samples(make: Make, op: str = "circuit_sample") -> Case:
    make, floats = only(make, *PARAMETERS, "uniforms"), ("uniforms",)
    return Case(op, ("circuit_sample",), make, _sampled, _scored, floats=floats, **FLOAT)


def distributions(make: Make, op: str = "") -> Case:
    make = only(make, *PARAMETERS, "x", "k")
    return compared("circuit_conditional_dist", make, arguments=HMM, op=op, **FLOAT)


def _verify(given: Inputs) -> Inputs:
    # Computed from the same numbers for the op and for the reference, whose tokens must be equal.
    leaf, prior, trans = (given[name].cpu().double() for name in PARAMETERS)
    found = reference.circuit_scan("hmm", leaf, prior, trans, given["x"].cpu())
    leaf = given["leaf"]
    wide = reference.accumulator(leaf.dtype)
    uniforms = given["uniforms"][:, 0, 0].float()[:, None].expand(-1, 9).contiguous()
    return {
        "target": given["target"],
        "tokens": given["x"],
        "conditional": found.conditional.to(leaf.device, wide),
        "posterior": found.posterior.to(leaf.device, wide),
        "leaf": leaf,
        "uniforms": uniforms,
    }


def verified(make: Make, op: str = "") -> Case:
    make, floats = only(make, *PARAMETERS, "x", "uniforms", "target"), ("uniforms",)
    return compared("spec_verify", make, (), _verify, op=op, floats=floats, exact=True)


def sum_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, nodes, inputs = ((6, 9, 20), (512, 256, 256))[size]
    return {"w": randn(g, nodes, inputs), "values": -randn(g, rows, inputs).abs()}


def _sums_of_rows(g: torch.Generator, size: int) -> Inputs:
    rows, nodes, inputs = ((3, 9, 20), (512, 8, 1024))[size]
    return {"w": randn(g, rows, nodes, inputs), "values": -randn(g, rows, inputs).abs()}


def _tables(g: torch.Generator, size: int) -> Inputs:
    blocks, block, words, batch = ((3, 5, 11, 4), (64, 32, 1024, 512))[size]
    return {
        "table": randn(g, blocks * block, words),
        "x": torch.randint(words, (batch, blocks), generator=g),
        "row": torch.arange(blocks) * block,
        "block": block,
    }


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
    parts = "weights values finish ratios dvalues dweights fused".split()
    log_sums = " ".join(f"log_sum_{part}" for part in parts)
    sums, both = partial(compared, "log_einsum_exp", floats=("values",)), ("w", "values")
    of_rows = "log_sum_per_row log_sum_per_row_backward"
    of_max = partial(dict, norm="logits", semiring="max")
    logits, tables = partial(dict, norm="logits"), "circuit_table circuit_table_backward"
    circuit = partial(circuit_inputs, ((2, 5, 40), (256, 32, 320)))
    graph = ("leaf", "w", "numbers", "plan")
    stages = only(wide_program_inputs, *graph)
    walk = ("circuit_layers_walk", ("layers_walk",), program_inputs, _walk, _walk_formula)
    return [
        scan(circuit),
        samples(circuit),
        distributions(circuit),
        compared("circuit_argmax", only(circuit, *PARAMETERS), arguments=HMM),
        verified(circuit),
        sums(sum_inputs, both, launchers=log_sums),
        sums(_sums_of_rows, both, launchers=of_rows, op="log_einsum_exp, of rows"),
        sums(sum_inputs, (), of_max, launchers="log_max", op="log_einsum_exp, max"),
        compared("circuit_table", _tables, ("table",), logits, launchers=tables),
        Case("circuit_layers", LAYERS, only(program_inputs, *graph), layers, layers_formula),
        Case("circuit_layers, by stages", LAYERS, stages, layers, layers_formula),
        Case(*walk, exact=True),
    ]


# --- losses and mixtures --------------------------------------------------------------------------
MIXES: Any = {
    "arguments": partial(dict, eps=1e-5),
    "launchers": "depth_mix depth_mix_backward",
}
#: Function that returns the case of a mixture of layers, see ``compared``.
mix: Any = partial(compared, "depth_mix", leaves=("hiddens", "gammas", "weights"), **MIXES)


def mix_inputs(sizes: Any, g: torch.Generator, size: int) -> Inputs:
    rows, width = sizes[size]
    return {
        "hiddens": [randn(g, rows, width) for _ in range(3)],
        "gammas": randn(g, 3, width),
        "weights": torch.rand(rows, 3, generator=g),
    }


mixes = partial(mix_inputs, ((5, 40), (4096, 4096)))


def head_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, width, words = ((7, 24, 61), (2048, 2048, 32768))[size]
    return {
        "hidden": randn(g, rows, width),
        "other": randn(g, rows, width),
        "weight": randn(g, words, width) / width**0.5,
        "labels": torch.randint(words, (rows,), generator=g),
    }


def entropy(op: str = "", softcap: float | None = None) -> Case:
    make, leaves = only(head_inputs, "hidden", "weight", "labels"), ("hidden", "weight")
    arguments = partial(dict, bias=None, softcap=softcap)
    launchers = "cross_entropy_update cross_entropy_finish cross_entropy_gradient"
    return compared("chunked_cross_entropy", make, leaves, arguments, launchers=launchers, op=op)


def divergence(
    leaves: tuple[str, ...] = ("hidden", "weight"), op: str = "", softcap: float | None = None
) -> Case:
    def call(function: Any, hidden: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        return function([hidden, other], weight, None, softcap=softcap)

    make, launchers = (
        only(head_inputs, "hidden", "weight", "other"),
        "kl_update kl_finish kl_gradient",
    )
    return compared("chunked_kl", make, leaves, call=call, launchers=launchers, op=op)


def _heads_of_rows(g: torch.Generator, size: int) -> Inputs:
    batch, rows, keys = ((2, 5, 40), (4, 1024, 1024))[size]
    return {
        "q": randn(g, batch, 6, rows, 64),
        "k": randn(g, batch, 2, keys, 64),
        "v": randn(g, batch, 2, keys, 64),
        "mask": torch.rand(batch, rows, keys, generator=g) < 0.9,
    }


def attention(make: Make, op: str = "") -> Case:
    return compared("row_attention", make, arguments=partial(dict, causal=True), op=op)


# --- packed weights -------------------------------------------------------------------------------
def _packed_inputs(rows: int, bits: int, minimum: bool, g: torch.Generator, size: int) -> Inputs:
    out, width = ((40, 640), (4096, 4096))[size]
    given = {"x": randn(g, rows, width), "bias": randn(g, out)}
    return {**given, "packed": reference.pack_weight(randn(g, out, width), bits, 64, minimum)}


def _with_outputs(given: Inputs) -> Inputs:
    return {**given, "out_features": len(given["bias"])}


def packed(rows: int, bits: int, minimum: bool = False) -> Case:
    """Return the case that multiplies ``rows`` rows by a weight packed to 8 or 4 bits."""
    make = partial(_packed_inputs, rows, bits, minimum)
    op = f"packed_linear, {bits} bits{' and a minimum' * minimum}, {rows} rows"
    return compared("packed_linear", make, (), _with_outputs, op=op)


def packing(bits: int) -> Case:
    """Return the case that rounds a weight to 8 or 4 bits."""

    def make(g: torch.Generator, size: int) -> Inputs:
        return {"weight": randn(g, *((40, 640), (4096, 4096))[size])}

    arguments, op = partial(dict, bits=bits), f"pack_weight, {bits} bits"
    return compared("pack_weight", make, (), arguments, op=op, exact=True, timed=False)


def unpacking(bits: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return the case that computes the weight of packed codes."""

    def sizes(given: Inputs) -> Inputs:
        panels, groups = given["packed"].shape[:2]
        wide = {"out_features": panels * 32, "in_features": groups * 64}
        return {**given, **wide, "dtype": dtype}

    make, exact = only(partial(_packed_inputs, 1, bits, False), "packed"), dtype != torch.float32
    op = f"unpack_weight, {bits} bits{f', {str(dtype)[6:]}' * exact}"
    return compared("unpack_weight", make, (), sizes, op=op, exact=exact)


def all_cases() -> list[Case]:
    """Return all cases, which call every launcher at least once."""
    return [
        *lora_cases(),
        *circuit_cases(),
        mix(mixes),
        entropy(),
        divergence(("hidden",)),
        attention(_heads_of_rows),
        *(packed(rows, bits) for rows in (1, 64) for bits in (8, 4)),
        *(each(bits) for each in (packing, unpacking) for bits in (8, 4)),
    ]
