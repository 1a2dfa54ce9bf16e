"""Circuits over region graphs: time against peers, and the error of each precision.

    python benchmarks/circuit_engine.py                       all tables, rows into out/bench/
    python benchmarks/circuit_engine.py --table hmm --out benchmarks/results

Tables: ``hmm``, a hidden Markov model with shared parameters, against libcirkit (where it is
installed) and against the formula in torch; ``rat_spn``, against the einsum layers that RAT-SPN
code is made of; ``numerics``, the largest error of a log-likelihood per precision, on the emulator
where there is no GPU. Every result is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, append_rows, interleaved, machine_columns
from torch import Tensor

from lora_ext import _loader
from lora_ext.circuits import Categorical, Circuit, RegionGraph
from lora_ext.ops import _registration, circuit_sum
from lora_ext.reference.circuit import logsumexp

Model = Callable[[Tensor], Tensor]
ROWS, STEPS, VALUES = 64, 32, 64


def row(table: str, case: str, provider: str, **columns: object) -> dict[str, object]:
    """One line of the csv file."""
    empty = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "over_lora_ext", "worst_error"), "")
    values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in columns.items()}
    return {
        **machine_columns(),
        "table": table,
        "case": case,
        "provider": provider,
        **empty,
        **values,
    }


def plain_hmm(circuit: Circuit) -> Model:
    """The forward algorithm as one writes it in torch, over the circuit's own parameters."""
    names = {circuit.graph.label(i): i for i in range(len(circuit.graph.regions))}

    def run(x: Tensor) -> Tensor:
        below: Tensor | None = None
        for t in reversed(range(x.shape[1])):
            leaf = circuit.region_leaves(names[f"x{t}"])["logits"].log_softmax(1)
            e = leaf[:, x[:, t]].T
            below = e if below is None else e + below
            w = circuit.region_weights(names[f"z{t}"]).softmax(1)
            top = below.amax(1, keepdim=True)
            below = ((below - top).exp() @ w.T).log() + top
        assert below is not None
        return below[:, 0]

    return run


def cirkit_hmm(circuit: Circuit, rank: int) -> Model | None:
    """libcirkit's circuit of the same structure with the same parameters, if it is installed."""
    try:
        from cirkit.pipeline import PipelineContext  # pyright: ignore[reportMissingImports]
        from cirkit.templates import pgms  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    symbolic = pgms.hmm(
        list(range(STEPS)),
        input_layer="categorical",
        num_latent_states=rank,
        input_layer_kwargs={"num_categories": VALUES},
    )
    peer = context.compile(symbolic)
    source = torch.cat([circuit.leaves[0]["logits"].flatten(), circuit.weights]).detach()
    with torch.no_grad():
        for parameter in peer.parameters():  # leaves of the last step first, then its sums
            taken, source = source.split([parameter.numel(), len(source) - parameter.numel()])
            parameter.copy_(taken.view_as(parameter))
    assert not len(source)
    return lambda x: peer(x)[:, 0, 0]


def plain_layers(circuit: Circuit) -> Model:
    """Einsum layers: products of all pairs in memory, softmaxed weights, one einsum a layer."""
    execution = circuit._run()

    def run(x: Tensor) -> Tensor:
        leaf = circuit._leaf_values("bench", x, None)
        constant = leaf.new_tensor([0, -torch.inf]).expand(len(x), 2)
        parts = [constant, leaf]
        if execution.factor_span.start < execution.factor_span.stop:
            val = torch.cat(parts, 1)
            parts.append(val[:, execution.factors.factors.T].sum(2))
        for stage in execution.stages:
            val = torch.cat(parts, 1)
            columns = stage.products.columns
            n, m = stage.products.kron or (1, 1)
            left = val[:, columns[0].index].view(len(x), stage.groups, -1, n)
            right = val[:, columns[1].index].view(len(x), stage.groups, -1, m)
            tops = [t.amax(3, keepdim=True) for t in (left, right)]
            a, b = (left - tops[0]).exp(), (right - tops[1]).exp()
            w = stage.weights.gather(circuit.weights).softmax(2)
            w = w.view(stage.groups, stage.units, -1, n, m)
            top = (tops[0] + tops[1]).squeeze(3)  # (B, G, partitions)
            best = top.amax(2, keepdim=True)
            part = torch.einsum("bgpi,bgpj,gopij->bgop", a, b, w)
            total = (part * (top - best).exp()[:, :, None]).sum(3)
            parts.append((total.log() + best).flatten(1))
        return parts[-1][:, 0]

    return run


def compare(
    table: str, case: str, circuit: Circuit, models: dict[str, Model], x: Tensor, rounds: int
) -> list[dict[str, object]]:
    """Check every model, then time forward, and forward with backward."""
    state = circuit.state_dict()
    exact = Circuit(circuit.graph).double()
    exact.load_state_dict({k: v.double() for k, v in state.items()})
    expected = exact.log_prob(x).detach()
    errors: dict[str, float] = {}
    for name, model in models.items():
        errors[name] = float((model(x).detach() - expected).abs().max())
        if not errors[name] < 2e-6 * (1 + float(expected.abs().max())) * STEPS**0.5:
            raise SystemExit(f"{case}: {name} is off by {errors[name]:.3g}: not timed")
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        forward = {n: (lambda m=m: m(x)) for n, m in models.items()}
        timings = {"forward": interleaved(forward, rounds, 0.05)}
    both = {n: (lambda m=m: m(x).sum().backward()) for n, m in models.items()}
    timings["forward and backward"] = interleaved(both, rounds, 0.05)
    for what, found in timings.items():
        for name, t in found.items():
            rows.append(
                row(
                    table,
                    f"{case}, {what}",
                    name,
                    median_ms=t.median * 1e3,
                    p20_ms=t.p20 * 1e3,
                    p80_ms=t.p80 * 1e3,
                    over_lora_ext=t.over(found["lora_ext"]),
                    worst_error=errors[name],
                )
            )
    return rows


def hmm_table(rounds: int, ranks: tuple[int, ...] = (64, 128, 256, 512)) -> list[dict[str, object]]:
    """T = 32, 64 rows, 64 values."""
    rows: list[dict[str, object]] = []
    x = torch.randint(VALUES, (ROWS, STEPS), generator=torch.Generator().manual_seed(0))
    for rank in ranks:
        torch.manual_seed(0)
        circuit = Circuit(RegionGraph.hmm(STEPS, rank, Categorical(VALUES)))
        models: dict[str, Model] = {"lora_ext": circuit.log_prob, "torch": plain_hmm(circuit)}
        peer = cirkit_hmm(circuit, rank)
        if peer:
            models["libcirkit"] = peer
        rows += compare("hmm", f"r = {rank}", circuit, models, x, rounds)
        tied = Circuit(RegionGraph.hmm(STEPS, rank, Categorical(VALUES), homogeneous=True))
        models = {"lora_ext": tied.log_prob, "torch": plain_hmm(tied)}
        rows += compare("hmm", f"r = {rank}, tied", tied, models, x, rounds)
    return rows


def rat_spn_table(rounds: int) -> list[dict[str, object]]:
    """64 variables, depth 3, and sums as wide as the inputs."""
    rows: list[dict[str, object]] = []
    x = torch.randint(8, (ROWS, 64), generator=torch.Generator().manual_seed(0))
    for units in (8, 16, 32):
        torch.manual_seed(0)
        graph = RegionGraph.rat_spn(64, 3, 4, units, units, Categorical(8))
        circuit = Circuit(graph)
        models = {"lora_ext": circuit.log_prob, "einsum layers": plain_layers(circuit)}
        rows += compare("rat_spn", f"{units} units", circuit, models, x, rounds)
    return rows


def numerics_table() -> list[dict[str, object]]:
    """Largest error over 8 rows of a chain with random softmax weights, logits of size 1 and 4."""
    if torch.cuda.is_available():
        device, library, where = "cuda", "lora_ext", "GPU"
    else:
        try:
            _loader.load("_emu")
        except ImportError:
            raise SystemExit("numerics: neither a GPU nor the emulator (LORA_EXT_EMU=1)") from None
        _registration.register("lora_ext_emu")
        device, library, where = "cpu", "lora_ext_emu", "emulator"
    circuit_sum._c = getattr(torch.ops, library)
    rows: list[dict[str, object]] = []
    for rank, steps in ((32, 8), (32, 256), (256, 32)):
        for scale in (1.0, 4.0):
            g = torch.Generator().manual_seed(rank + steps)
            w = scale * torch.randn(rank, rank, generator=g)
            prior = scale * torch.randn(1, rank, generator=g)
            e = (scale * torch.randn(steps, 8, rank, 16, generator=g)).log_softmax(-1)[..., 0]

            def chain(
                precision: str, w: Tensor = w, prior: Tensor = prior, e: Tensor = e
            ) -> Tensor:
                below = e[-1]
                for t in range(len(e) - 2, -2, -1):
                    matrix = (prior if t < 0 else w).to(device)
                    below = circuit_sum.log_einsum_exp(
                        matrix, below.to(device), precision=precision
                    ).cpu()
                    below = below if t < 0 else below + e[t]
                return below

            below = e[-1].double()
            for t in range(len(e) - 2, -2, -1):
                log_w = (prior if t < 0 else w).double().log_softmax(1)
                below = logsumexp(below[:, None] + log_w)
                below = below if t < 0 else below + e[t].double()
            for precision in ("fp32", "high", "fp16s"):
                error = float((chain(precision) - below).abs().max())
                case = f"r = {rank}, T = {steps}, logits of size {scale:g}"
                rows.append(row("numerics", case, f"{precision}, {where}", worst_error=error))
    return rows


def main() -> None:
    """Run the tables that were asked for and append their rows."""
    tables = {
        "hmm": lambda rounds: hmm_table(rounds),
        "rat_spn": lambda rounds: rat_spn_table(rounds),
        "numerics": lambda rounds: numerics_table(),
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", choices=tables, action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.table or tables:
        rows = tables[name](args.rounds)
        append_rows(args.out / "circuit_engine_cpu.csv", rows)
        for r in rows:
            print(
                f"{r['case']:45} {r['provider']:20} {r['median_ms']:>8} ms  "
                f"x {r['over_lora_ext']:<8} error {r['worst_error']}"
            )


if __name__ == "__main__":
    main()
