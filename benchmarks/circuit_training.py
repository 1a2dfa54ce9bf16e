"""Training of circuits compared with peers: a step of EM, an epoch of gradient steps on digits.

``circuit_engine.py`` times these calls. Every function returns calls by name, ours under
``lora_ext``. If a peer is not installed, it is skipped and the reason is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from einsum_peer import einsum_layers, layers_of
from torch import Tensor, nn

from lora_ext.circuits import Categorical, Circuit, RegionGraph, chow_liu_parents

Calls = dict[str, Callable[[], object]]
SEQUENCES, STEPS, VALUES = 512, 32, 64
GREYS, BATCH = 17, 100


def em_calls(rank: int) -> Calls:
    """Return calls of one EM step of a homogeneous chain: 512 rows, 32 variables of 64 values.

    Raises:
        SystemExit: If a peer's parameters differ from ours after a step.
    """
    torch.manual_seed(0)
    circuit = Circuit(RegionGraph.hmm(STEPS, rank, Categorical(VALUES), homogeneous=True))
    x = torch.randint(VALUES, (SEQUENCES, STEPS))
    peers = {form: _hmmlearn(circuit, rank, x, form) for form in ("scaling", "log")}
    circuit.em_step(x, pseudocount=0)
    calls: Calls = {"lora_ext": lambda: circuit.em_step(x, pseudocount=0)}
    for form, peer in peers.items():
        if peer is None:
            continue
        fit, transitions = peer
        fit()
        off = float((transitions() - _transitions(circuit)).abs().max())
        if not off < 1e-5:  # float32 against float64
            raise SystemExit(f"em, r = {rank}: hmmlearn, {form} is off by {off:.3g}: not timed")
        calls[f"hmmlearn, {form}"] = fit
    return calls


def _transitions(circuit: Circuit) -> Tensor:
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    return circuit.region_weights(names["z1"]).detach().double().softmax(1)


def _hmmlearn(
    circuit: Circuit, rank: int, x: Tensor, form: str
) -> tuple[Callable[[], object], Callable[[], Tensor]] | None:
    """Return a call of one EM step of hmmlearn that starts from our parameters, and a function that
    returns its transition matrix."""
    try:
        from hmmlearn import hmm  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("hmmlearn: skipped: not installed (lora_ext's extra peers)")
        return None
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
    peer = hmm.CategoricalHMM(rank, n_iter=1, init_params="", implementation=form)
    peer.n_features = VALUES
    first = circuit.region_weights(names["z0"])[0]
    emission = circuit.region_leaves(names["x0"])["logits"]
    peer.startprob_, peer.emissionprob_ = (
        t.detach().double().softmax(-1).numpy() for t in (first, emission)
    )
    peer.transmat_ = _transitions(circuit).numpy()
    column, lengths = x.reshape(-1, 1).numpy(), [STEPS] * len(x)
    return lambda: peer.fit(column, lengths), lambda: torch.from_numpy(peer.transmat_)


# --- an epoch on digits ---------------------------------------------------------------------------
def digits() -> Tensor | None:
    """Load the digits ``(1797, 64)``, values 0 to 16; return None without scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("digits: skipped: scikit-learn is not installed")
        return None
    return torch.tensor(load_digits(return_X_y=True)[0]).long()


def epoch(
    model: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter | Tensor], x: Tensor
):
    """Return a call that trains for one epoch with Adam, in batches of 100."""
    optimizer = torch.optim.Adam(list(parameters), lr=1e-3)

    def run() -> float:
        total = 0.0
        for batch in x.split(BATCH):
            optimizer.zero_grad()
            loss = -model(batch).mean()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        return total / len(x)

    return run


def rat_spn_calls(units: int, x: Tensor, depth: int, repetitions: int) -> Calls:
    """Return calls that train a RAT-SPN for one epoch: as our circuit, as einsum layers, and, if it
    is installed, as libcirkit's circuit, which has equal sizes but other random splits."""
    torch.manual_seed(0)
    graph = RegionGraph.rat_spn(64, depth, repetitions, units, units, Categorical(GREYS))
    circuit = Circuit(graph)
    leaf, weights, scopes = layers_of(circuit)
    calls: Calls = {
        "lora_ext": epoch(circuit.log_prob, circuit.parameters(), x),
        "einsum layers": epoch(
            lambda b: einsum_layers(leaf, weights, scopes, b), [leaf, *weights], x
        ),
    }
    peer = _cirkit(
        "RandomBinaryTree", units, "tucker", 64, depth=depth, num_repetitions=repetitions
    )
    return calls | ({"libcirkit": epoch(*peer, x)} if peer else {})


def hclt_calls(units: int, x: Tensor) -> Calls:
    """Return calls that train a latent tree for one epoch: as our circuit, as einsum layers, and,
    if it is installed, as libcirkit's circuit."""
    torch.manual_seed(0)
    parents = chow_liu_parents(x, num_categories=GREYS)
    circuit = Circuit(RegionGraph.hclt(parents, rank=units, leaf=Categorical(GREYS)))
    tree = Tree(circuit, [int(p) for p in parents])
    calls: Calls = {
        "lora_ext": epoch(circuit.log_prob, circuit.parameters(), x),
        "einsum layers": epoch(tree, tree.parameters(), x),
    }
    peer = _cirkit("ChowLiuTree", units, "cp", x, input_type="categorical", num_categories=GREYS)
    return calls | ({"libcirkit": epoch(*peer, x)} if peer else {})


class Tree(nn.Module):
    """Tree of latents in torch, with one gather, one matrix product and one sum per depth."""

    def __init__(self, circuit: Circuit, parents: list[int]):
        super().__init__()
        names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}
        depth = [0] * len(parents)
        for v in range(len(parents)):
            at = v
            while parents[at] >= 0:
                at, depth[v] = parents[at], depth[v] + 1
        self.parent = torch.tensor(parents)
        self.levels = [
            torch.tensor([v for v in range(len(parents)) if depth[v] == d])
            for d in range(max(depth), 0, -1)
        ]
        self.root = parents.index(-1)

        def stacked(each: list[Tensor]) -> nn.Parameter:
            return nn.Parameter(torch.stack(each).detach().clone())

        weights = [circuit.region_weights(names[f"z{v}"]) for v in range(len(parents))]
        self.leaf = stacked(
            [circuit.region_leaves(names[f"x{v}"])["logits"] for v in range(len(parents))]
        )
        self.first = nn.Parameter(weights[self.root].detach().clone())
        self.steps = nn.ParameterList(
            stacked([weights[v] for v in level.tolist()]) for level in self.levels
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``log p`` ``(B,)`` of complete rows ``(B, n)``."""
        n, _, values = self.leaf.shape
        index = torch.arange(n)[:, None] * values + x.T  # (n, B)
        table = self.leaf.log_softmax(2).transpose(1, 2).flatten(0, 1)
        below = nn.functional.embedding(index, table)  # (n, B, units)
        for level, w in zip(self.levels, self.steps, strict=True):
            message = _sum(below[level], w)
            below = below.index_add(0, self.parent[level], message)
        return _sum(below[self.root], self.first)[:, 0]


def _sum(values: Tensor, w: Tensor) -> Tensor:
    top = values.amax(-1, keepdim=True)
    return ((values - top).exp() @ w.softmax(-1).transpose(-1, -2)).log() + top


def _cirkit(
    graph: str, units: int, layers: str, *args: object, **options: object
) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]] | None:
    """Return libcirkit's circuit over one of its region graphs, and its parameters."""
    try:
        from cirkit.pipeline import PipelineContext  # pyright: ignore[reportMissingImports]
        from cirkit.templates import region_graph, utils  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("libcirkit: skipped: not installed (lora_ext's extra peers)")
        return None
    softmax = utils.parameterization_to_factory(utils.Parameterization(activation="softmax"))
    symbolic = getattr(region_graph, graph)(*args, **options).build_circuit(
        input_factory=utils.name_to_input_layer_factory("categorical", num_categories=GREYS),
        sum_product=layers,
        sum_weight_factory=softmax,
        num_input_units=units,
        num_sum_units=units,
    )
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    model = context.compile(symbolic)
    return lambda b: model(b).flatten(), list(model.parameters())
