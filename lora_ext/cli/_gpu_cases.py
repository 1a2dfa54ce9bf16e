"""Cases of ``lora-ext gpu-report``: ops with inputs, and the references that they must match.

A launcher is a C++ function that starts the CUDA kernels of an op. The cases call every launcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.circuits import Categorical, Circuit, RegionGraph

Inputs = dict[str, Any]
Call = Callable[[], list[Tensor]]
Make = Callable[[torch.Generator, int], Inputs]


def plain(function: Callable[..., Any], **arguments: Any) -> Any:
    return function(**arguments)


@dataclass(frozen=True)
class Case:
    """Op with inputs, and the reference that its results must match.

    By default, the reference is the function of :mod:`lora_ext.reference` with the op's name.
    Arguments with several names are strings, in which spaces separate the names.

    Args:
        op: name of the case, which begins with the name of the op.
        make: function that receives a generator and a size, and returns inputs. Size 0 is small,
            for the check, and size 1 is large, for the timing. The names of the inputs are those of
            arguments of ``call``.
        inputs: names of the inputs of ``make`` that the case needs; by default all. The lower bound
            of a time is computed from their bytes, so a timed op must read all of them.
        leaves: names of arguments to differentiate. With leaves, the first result and the gradients
            of a weighted sum of its elements are compared. Without leaves, all results are.
        arguments: function that prepares the arguments from the inputs, before the timing.
        of_op: arguments that only the op has.
        call: function that receives the op or the reference, and the arguments.
        prepare: function that replaces ``leaves``, ``arguments`` and ``call``. It receives
            :mod:`lora_ext.ops` or :mod:`lora_ext.reference`, and the inputs, and returns a function
            without arguments. The op's function is timed and must not create tensors on the host.
        launches: names of the launchers in ``csrc/include`` that the op calls, without the prefix
            ``launch_``; by default, there is one with the name of the op.
        dtype: dtype of the floating-point inputs of the op. Those of the reference are float64.
        bound: maximum absolute error of a result, divided by its largest absolute value.
        exact: whether the results must be equal, since they are indices.
        timed: whether the case is also timed, with the large size.
        floats: names of the inputs that are float32 for every dtype of the op.
        read: function that converts results of the op to the form of the reference's results. Its
            arguments are the inputs and the results of the op.
    """

    op: str
    make: Make
    inputs: str = ""
    leaves: str = ""
    arguments: Callable[[Inputs], Inputs] = dict
    of_op: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] = plain
    prepare: Callable[[Any, Inputs], Call] | None = None
    launches: str = ""
    dtype: torch.dtype = torch.float32
    bound: float = 1e-4
    exact: bool = False
    timed: bool = True
    floats: str = ""
    read: Callable[[Inputs, list[Tensor]], list[Tensor]] = lambda given, found: found

    @property
    def function(self) -> str:
        """Name of the op and of its reference."""
        return re.split(r"\W", self.op)[0]

    @property
    def launchers(self) -> list[str]:
        """Names of the launchers that the op calls."""
        return (self.launches or self.function.rstrip("_")).split()

    def ready(self, given: Inputs) -> Call:
        """Prepare all arguments from the inputs, and return a function that calls the op."""
        return self._prepared(ops, given)

    def formula(self, given: Inputs) -> list[Tensor]:
        """Return the results of the reference."""
        return self._prepared(reference, given)()

    def run(self, given: Inputs) -> list[Tensor]:
        """Return the results of the op, to be compared with those of the reference."""
        return self.read(given, self.ready(given)())

    def _prepared(self, of: Any, given: Inputs) -> Call:
        if self.prepare is not None:
            return self.prepare(of, given)
        bound = {**self.arguments(given), **(self.of_op if of is ops else {})}
        leaves = self.leaves.split()
        own = {k: convert(bound[k], lambda t: t.detach().clone().requires_grad_()) for k in leaves}
        bound, at = {**bound, **own}, tensors(own)

        def results() -> list[Tensor]:
            found = self.call(getattr(of, self.function), **bound)
            return tensors([found] if isinstance(found, Tensor) else list(found))

        if not leaves:
            return results
        with torch.no_grad():
            y = results()[0]  # only its shape is used
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
        weights = weights.view(y.shape).to(y)

        def run() -> list[Tensor]:
            found = results()[0]
            return [found.detach(), *torch.autograd.grad(found, at, weights)]

        return run


def moved(inputs: Mapping[str, Any], outputs: list[Tensor]) -> int:
    """Return the bytes that a kernel must move: the total size of all arguments and results."""
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
# (rows, input features, output features, rank, adapters), for the small and the large size
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
    return {**made, "v": randn(g, len(made["x"]), made["b"].shape[2])}


def sibling_inputs(g: torch.Generator, size: int) -> Inputs:
    made = [lora_inputs(_DECODE, g, size) for _ in range(3)]
    return {**made[0], **{name: [each[name] for each in made] for name in ("a", "b")}}


def _with_outputs(given: Inputs) -> Inputs:
    x, b = given["x"], given["b"]
    return {**given, "y": [x.new_zeros(len(x), each.shape[1]) for each in b]}


def _plan_inputs(g: torch.Generator, size: int) -> Inputs:
    rows, *_, adapters = _PREFILL[size]
    ids = torch.randint(-1, adapters, (rows,), generator=g)
    return {"adapter_ids": ids, "num_adapters": adapters}


def _plan(of: Any, given: Inputs) -> Call:
    ids, count = given["adapter_ids"], given["num_adapters"]
    return lambda: [ops.lora_plan(ids, count) if of is ops else ids]


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
FLOAT: Any = {"bound": 2.0**-13}  # for results that are float32 or wider for inputs of any dtype


def lora_cases() -> list[Case]:
    """Return the cases of the ops that serve, train and measure adapters."""
    decode, prefill, wide = (partial(lora_inputs, sizes) for sizes in (_DECODE, _PREFILL, _WIDE))
    plain_base = partial(dict, weight=None, bias=None)
    train: Any = {"leaves": "x a b", "launches": "lora_train_shrink lora_train_backward"}
    siblings: Any = {"arguments": _with_outputs, "launches": "lora_apply"}
    shrink: Any = {"inputs": "x a adapter_ids", **BF16, **FLOAT}
    expand: Any = {"inputs": "v b adapter_ids", "arguments": _with_output, "floats": "v"}
    return [
        Case("lora_plan", _plan_inputs, prepare=_plan, exact=True, read=_ids_of_plan),
        Case("lora_segment_ids", _segments, arguments=_with_rows, exact=True),
        Case("lora_shrink", decode, **shrink),
        Case("lora_expand_", _projected, **expand, **BF16),
        Case("lora_apply", decode, **BF16),
        Case("lora_apply, prefill", prefill, **BF16),
        Case("lora_apply, large rank", wide, **BF16),
        Case("lora_apply_siblings_", sibling_inputs, **siblings, **BF16),
        Case("lora_linear", prefill, arguments=plain_base, **train, **BF16),
        Case("lora_dropout", prefill, "x", arguments=_with_seed, **BF16),
        Case("lora_gram", grams, **FLOAT),
        Case("lora_pair_stats", grams, arguments=_pairs, **FLOAT),
    ]


# --- circuits -------------------------------------------------------------------------------------
PARAMETERS = ("leaf", "prior", "trans")
HMM = partial(dict, kind="hmm")
FORWARD = "layers_weights layers_forward"
BACKWARD = f"{FORWARD} layers_backward layers_dweights"


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


def _sampled(of: Any, given: Inputs) -> Call:
    """Return a function that computes the log-probabilities of the tokens that the op draws.

    The reference does not draw tokens, because rounding could change them.
    """
    arguments = {name: given[name] for name in PARAMETERS}
    if of is reference:
        scan = partial(reference.circuit_scan, "hmm", **arguments, x=given["drawn"])
        return lambda: [scan().conditional]
    uniforms = given["uniforms"]

    def call() -> list[Tensor]:
        found = ops.circuit_sample("hmm", **arguments, uniforms=uniforms)
        given["drawn"] = found.tokens
        return [found.conditional]

    return call


def _verify(given: Inputs) -> Inputs:
    # The op and the reference receive the same numbers, since their tokens must be equal.
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


def layers(of: Any, given: Inputs) -> Call:
    """Return a function that runs a circuit's forward, and its backward for the weights."""
    program = ops.Program(given["numbers"], list(given["plan"]))
    leaf, w = given["leaf"], given["w"]
    if of is reference:
        w = w.detach().clone().requires_grad_()
        val = reference.circuit_layers(leaf, w, given["numbers"])
        (dw,) = torch.autograd.grad(val[:, _roots(program)].sum(), [w])
        return lambda: [val.detach()[:, 2:], dw]
    droots = torch.ones(len(leaf), program.plan[5], dtype=leaf.dtype, device=leaf.device)

    def call() -> list[Tensor]:
        val = ops.circuit_layers(leaf, w, program)
        return [val[:, 2:], ops.circuit_layers_backward(droots, val, w, program)[1]]

    return call


def _roots(program: ops.Program) -> list[int]:
    """Return the units of the circuit's roots, which follow five lists in ``program.numbers``."""
    nodes, parts, children, matrices, users = program.numbers[3:8].tolist()
    first = 10 + 6 * nodes + 4 * parts + 2 * children + 6 * matrices + users
    return program.numbers[first : first + program.plan[5]].tolist()


def _walk(of: Any, given: Inputs) -> Call:
    # Both walks start from the values that the reference has computed.
    leaf, w, numbers = given["leaf"], given["w"], given["numbers"]
    wide = leaf.cpu().double(), w.cpu().double(), numbers.cpu()
    val = reference.circuit_layers(*wide, "none", "max").to(leaf)
    program = ops.Program(numbers, list(given["plan"])) if of is ops else numbers
    return lambda: [of.circuit_layers_walk(val, w, program, given["root"])]


def circuit_cases() -> list[Case]:
    """Return the cases of the ops of circuits.

    They cover sums, tables, circuits of any graph, and circuits with parameters that a network
    computes.
    """
    parts = "weights values finish ratios dvalues dweights fused".split()
    circuit = partial(circuit_inputs, ((2, 5, 40), (256, 32, 320)))
    parameters, graph = " ".join(PARAMETERS), "leaf w numbers plan"
    scan: Any = {
        "leaves": parameters,
        "arguments": HMM,
        "launches": "circuit_leaf circuit_leaf_backward circuit_scan circuit_scan_backward",
    }
    sample: Any = {"prepare": _sampled, "floats": "uniforms", **FLOAT}
    verify: Any = {"arguments": _verify, "floats": "uniforms", "exact": True}
    sums: Any = {"leaves": "w values", "floats": "values"}
    log_sums = " ".join(f"log_sum_{part}" for part in parts)
    of_rows = "log_sum_per_row log_sum_per_row_backward"
    of_max: Any = {"arguments": partial(dict, norm="logits", semiring="max"), "floats": "values"}
    table: Any = {"leaves": "table", "launches": "circuit_table circuit_table_backward"}
    whole: Any = {"prepare": layers, "launches": BACKWARD}
    walk: Any = {"prepare": _walk, "launches": "layers_walk", "exact": True}
    return [
        Case("circuit_scan", circuit, f"{parameters} x", **scan),
        Case("circuit_sample", circuit, f"{parameters} uniforms", **sample),
        Case("circuit_conditional_dist", circuit, f"{parameters} x k", arguments=HMM, **FLOAT),
        Case("circuit_argmax", circuit, parameters, arguments=HMM),
        Case("spec_verify", circuit, f"{parameters} x uniforms target", **verify),
        Case("log_einsum_exp", sum_inputs, launches=log_sums, **sums),
        Case("log_einsum_exp, of rows", _sums_of_rows, launches=of_rows, **sums),
        Case("log_einsum_exp, max", sum_inputs, launches="log_max", **of_max),
        Case("circuit_table", _tables, arguments=partial(dict, norm="logits"), **table),
        Case("circuit_layers", program_inputs, graph, **whole),
        Case("circuit_layers, by stages", wide_program_inputs, graph, **whole),
        Case("circuit_layers_walk", program_inputs, **walk),
    ]


# --- losses and mixtures --------------------------------------------------------------------------
MIXES: Any = {
    "arguments": partial(dict, eps=1e-5),
    "launches": "depth_mix depth_mix_backward",
}


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


def _both(function: Any, hidden: Tensor, other: Tensor, weight: Tensor, softcap: Any) -> Tensor:
    return function([hidden, other], weight, None, softcap=softcap)


def _heads_of_rows(g: torch.Generator, size: int) -> Inputs:
    batch, rows, keys = ((2, 5, 40), (4, 1024, 1024))[size]
    return {
        "q": randn(g, batch, 6, rows, 64),
        "k": randn(g, batch, 2, keys, 64),
        "v": randn(g, batch, 2, keys, 64),
        "mask": torch.rand(batch, rows, keys, generator=g) < 0.9,
    }


def loss_cases() -> list[Case]:
    """Return the cases of mixtures of layers, losses and attention."""
    entropy: Any = {
        "leaves": "hidden weight",
        "arguments": partial(dict, bias=None, softcap=None),
        "launches": "cross_entropy_update cross_entropy_finish cross_entropy_gradient",
    }
    divergence: Any = {
        "leaves": "hidden",
        "arguments": partial(dict, softcap=None),
        "call": _both,
        "launches": "kl_update kl_finish kl_gradient",
    }
    return [
        Case("depth_mix", mixes, leaves="hiddens gammas weights", **MIXES),
        Case("chunked_cross_entropy", head_inputs, "hidden weight labels", **entropy),
        Case("chunked_kl", head_inputs, "hidden weight other", **divergence),
        Case("row_attention", _heads_of_rows, arguments=partial(dict, causal=True)),
    ]


# --- packed weights -------------------------------------------------------------------------------
def _packed_inputs(rows: int, bits: int, minimum: bool, g: torch.Generator, size: int) -> Inputs:
    out, width = ((40, 640), (4096, 4096))[size]
    given = {"x": randn(g, rows, width), "bias": randn(g, out)}
    return {**given, "packed": reference.pack_weight(randn(g, out, width), bits, 64, minimum)}


def _with_size(given: Inputs) -> Inputs:
    return {**given, "out_features": len(given["bias"])}


def packed(rows: int, bits: int, minimum: bool = False) -> Case:
    """Return the case that multiplies ``rows`` rows by a weight packed to ``bits`` bits."""
    op = f"packed_linear, {bits} bits{' and a minimum' * minimum}, {rows} rows"
    return Case(op, partial(_packed_inputs, rows, bits, minimum), arguments=_with_size)


def _weights(g: torch.Generator, size: int) -> Inputs:
    return {"weight": randn(g, *((40, 640), (4096, 4096))[size])}


def packing(bits: int) -> Case:
    """Return the case that rounds a weight to 8 or 4 bits."""
    how: Any = {"arguments": partial(dict, bits=bits), "exact": True, "timed": False}
    return Case(f"pack_weight, {bits} bits", _weights, **how)


def unpacking(bits: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return the case that unpacks a weight from packed codes."""

    def sizes(given: Inputs) -> Inputs:
        panels, groups = given["packed"].shape[:2]
        wide = {"out_features": panels * 32, "in_features": groups * 64}
        return {**given, **wide, "dtype": dtype}

    make, exact = partial(_packed_inputs, 1, bits, False), dtype != torch.float32
    op = f"unpack_weight, {bits} bits{f', {str(dtype)[6:]}' * exact}"
    return Case(op, make, "packed", arguments=sizes, exact=exact)


def all_cases() -> list[Case]:
    """Return all cases, which call every launcher at least once."""
    return [
        *lora_cases(),
        *circuit_cases(),
        *loss_cases(),
        *(packed(rows, bits) for rows in (1, 64) for bits in (8, 4)),
        *(each(bits) for each in (packing, unpacking) for bits in (8, 4)),
    ]
