"""Time circuits over region graphs and their peers, and measure the error of each precision.

    python benchmarks/circuit_engine.py                  all tables, rows into out/bench/
    python benchmarks/circuit_engine.py --table hmm --ranks 16 32 64 128 256 512 --jax-python PYTHON

The tables, each with the peers that are compared with our circuit:

* ``hmm``: a hidden Markov model with shared parameters. Peers: the formula in torch with stacked
  steps (eager, compiled, and with probabilities), ``jax.jit`` over ``lax.scan``, and libcirkit.
* ``rat_spn``: a RAT-SPN. Peers: stacked einsum layers, eager and compiled.
* ``em``: a step of Baum-Welch. Peer: hmmlearn.
* ``digits``: an epoch of Adam on scikit-learn's digits, for a RAT-SPN and for a hidden Chow-Liu
  tree. Peers: einsum layers and libcirkit.
* ``numerics``: the largest error of a log-likelihood for each precision, on the emulator if there
  is no GPU.

Values and gradients of every model are checked against float64 before timing. If a peer is not
installed, it is skipped and the reason is printed. The fastest model is listed first. The first run
compiles for minutes; later runs use torch's cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import circuit_training
import torch
from chain_peers import Chain, Jax, Peer, jax_missing, scaled, stacked, torch_peer
from common import ROOT, Timing, append_rows, interleaved, machine_columns
from einsum_peer import DEPTH, REPETITIONS, einsum_layers, layers_of
from torch import Tensor

from lora_ext import _loader
from lora_ext.circuits import Categorical, Circuit, RegionGraph
from lora_ext.ops import _registration, circuit_sum
from lora_ext.reference._circuit import logsumexp

ROWS, STEPS, VALUES = 64, 32, 64


def row(table: str, case: str, provider: str, **columns: object) -> dict[str, object]:
    """Return one line of the csv file."""
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


def cirkit_peer(circuit: Circuit, rank: int, x: Tensor) -> Peer | None:
    """Return libcirkit's circuit with the same structure and parameters; None without libcirkit."""
    try:
        from cirkit.pipeline import PipelineContext  # pyright: ignore[reportMissingImports]
        from cirkit.templates import pgms  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("libcirkit: skipped: not installed (lora_ext's extra peers)")
        return None
    context = PipelineContext(backend="torch", semiring="lse-sum", fold=True, optimize=True)
    symbolic = pgms.hmm(
        list(range(STEPS)),
        input_layer="categorical",
        num_latent_states=rank,
        input_layer_kwargs={"num_categories": VALUES},
    )
    peer = context.compile(symbolic)
    leaf = circuit.leaves[0]["logits"].flatten()
    source = torch.cat([leaf, circuit.weights]).detach()
    with torch.no_grad():
        for parameter in peer.parameters():  # Order: leaves of the last step, then its sums.
            taken, source = source.split([parameter.numel(), len(source) - parameter.numel()])
            parameter.copy_(taken.view_as(parameter))
    assert not len(source)
    of = torch_peer(lambda: peer(x)[:, 0, 0], list(peer.parameters()))
    return replace(of, gradient=lambda: of.gradient()[len(leaf) :])


def compare(
    table: str,
    case: str,
    circuit: Circuit,
    peers: dict[str, Peer],
    x: Tensor,
    rounds: int,
    least: bool = False,
) -> list[dict[str, object]]:
    """Check values and gradients of every model against float64, then time them.

    By default, the medians of rounds of 50 milliseconds are compared. With ``least``, for machines
    that are never idle, the shortest of many bursts of a millisecond is compared.
    """
    burst = 1e-3 if least else 0.05
    leaves = list(circuit.leaves.parameters())
    ours = torch_peer(lambda: circuit.log_prob(x), [circuit.weights], leaves)
    peers = {"lora_ext": ours, **peers}
    exact = Circuit(circuit.graph).double()
    exact.load_state_dict({k: v.double() for k, v in circuit.state_dict().items()})
    flat = exact.log_prob(x).detach(), torch_peer(lambda: exact.log_prob(x), [exact.weights])
    expected, gradient = flat[0], flat[1].gradient()
    # Every step rounds four values of the size of log p; gradients contain exponentials of these
    # values.
    size = 1 + float(expected.abs().max())
    bound, gradient_bound = 2e-6 * size * STEPS**0.5, 2**-22 * size * STEPS
    errors: dict[str, float] = {}
    for name, peer in peers.items():
        with torch.no_grad():
            errors[name] = float((as_tensor(peer.value()) - expected).abs().max())
        off = float((peer.gradient() - gradient).abs().max() / gradient.abs().max())
        if not (errors[name] < bound and off < gradient_bound):
            found = f"{errors[name]:.3g}, its gradient by {off:.3g} of the largest"
            raise SystemExit(f"{case}: {name} is off by {found}: not timed")
    with torch.no_grad():
        calls = {name: peer.value for name, peer in peers.items()}
        timings = {"forward": interleaved(calls, rounds, burst)}
    calls = {name: peer.step for name, peer in peers.items()}
    timings["forward and backward"] = interleaved(calls, rounds, burst)

    def over(t: Timing, ours: Timing) -> float:
        return min(t.rounds) / min(ours.rounds) if least else t.over(ours)

    return [
        row(
            table,
            f"{case}, {what}",
            name,
            median_ms=t.median * 1e3,
            p20_ms=t.p20 * 1e3,
            p80_ms=t.p80 * 1e3,
            over_lora_ext=over(t, found["lora_ext"]),
            worst_error=errors[name],
        )
        for what, found in timings.items()
        for name, t in sorted(found.items(), key=lambda item: over(item[1], found["lora_ext"]))
    ]


def as_tensor(value: object) -> Tensor:
    """Return the result of a call, which must be a tensor."""
    assert isinstance(value, Tensor)
    return value


def hmm_table(args: argparse.Namespace) -> list[dict[str, object]]:
    """Compare HMMs with T = 32, 64 rows and 64 values; all peers have the same parameters."""
    rows: list[dict[str, object]] = []
    x = torch.randint(VALUES, (ROWS, STEPS), generator=torch.Generator().manual_seed(0))
    missing = jax_missing(args.jax_python)
    if missing:
        print(f"jax: skipped: {missing}")
    for rank in args.ranks:
        torch.manual_seed(0)
        circuit = Circuit(RegionGraph.hmm(STEPS, rank, Categorical(VALUES)))
        chain = Chain.of(circuit)
        peers = {"torch": chain.peer(stacked, x), "torch, scaled": chain.peer(scaled, x)}
        if args.compile:
            peers["torch.compile"] = chain.peer(compiled(stacked), x)
        cirkit = cirkit_peer(circuit, rank, x)
        peers |= {"libcirkit": cirkit} if cirkit else {}
        jax = None if missing else Jax(args.jax_python, chain, x, torch.get_num_threads())
        if jax:
            peers |= {"jax.jit": jax.peer("log"), "jax.jit, scaled": jax.peer("scaled")}
        rows += compare("hmm", f"r = {rank}", circuit, peers, x, args.rounds, args.least)
        if jax:
            jax.close()
    return rows


def compiled(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile the model with torch.compile for one shape."""
    return torch.compile(model, dynamic=False)


def rat_spn_table(args: argparse.Namespace) -> list[dict[str, object]]:
    """Compare RAT-SPNs with 64 variables and depth 3, with as many sums as input units per
    region."""
    rows: list[dict[str, object]] = []
    x = torch.randint(8, (ROWS, 64), generator=torch.Generator().manual_seed(0))
    for units in (8, 16, 32):
        torch.manual_seed(0)
        graph = RegionGraph.rat_spn(64, DEPTH, REPETITIONS, units, units, Categorical(8))
        circuit = Circuit(graph)
        parts = layers_of(circuit)

        def layers(model: Callable[..., Tensor], parts: Any = parts) -> Peer:
            return torch_peer(lambda: model(*parts, x), parts[1], [parts[0]])

        peers = {"einsum layers": layers(einsum_layers)}
        if args.compile:
            peers["einsum layers, torch.compile"] = layers(compiled(einsum_layers))
        rows += compare("rat_spn", f"{units} units", circuit, peers, x, args.rounds, args.least)
    return rows


def learning_rows(
    table: str, case: str, calls: circuit_training.Calls, rounds: int
) -> list[dict[str, object]]:
    """Time the training calls in interleaved rounds; return one row per call."""
    found = interleaved(calls, rounds)
    return [
        row(
            table,
            case,
            name,
            median_ms=t.median * 1e3,
            p20_ms=t.p20 * 1e3,
            p80_ms=t.p80 * 1e3,
            over_lora_ext=t.over(found["lora_ext"]),
        )
        for name, t in sorted(found.items(), key=lambda item: item[1].over(found["lora_ext"]))
    ]


def em_table(args: argparse.Namespace) -> list[dict[str, object]]:
    """Compare EM on 512 sequences of 32 steps with 64 values, for 8 and 32 states."""
    rows: list[dict[str, object]] = []
    for rank in (8, 32):
        rows += learning_rows("em", f"r = {rank}", circuit_training.em_calls(rank), args.rounds)
    return rows


def digits_table(args: argparse.Namespace) -> list[dict[str, object]]:
    """Compare training on 1797 images of 64 pixels with 17 grey levels, in batches of 100."""
    x = circuit_training.digits()
    rows: list[dict[str, object]] = []
    if x is None:
        return rows
    for units in (8, 16):
        calls = circuit_training.rat_spn_calls(units, x, DEPTH, REPETITIONS)
        rows += learning_rows("digits", f"RAT-SPN, {units} units", calls, args.rounds)
    for units in (16, 32):
        calls = circuit_training.hclt_calls(units, x)
        rows += learning_rows("digits", f"HCLT, {units} units", calls, args.rounds)
    return rows


def numerics_table() -> list[dict[str, object]]:
    """Measure the largest error of a chain for random logits with standard deviations 1 and 4."""
    if torch.cuda.is_available():
        device, library, where = "cuda", "lora_ext", "GPU"
    else:
        try:
            _loader.load("_emu")
        except ImportError:
            raise SystemExit("numerics: expected a GPU or the emulator (LORA_EXT_EMU=1)") from None
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
    """Run the requested tables and append their rows."""
    tables = {"hmm": hmm_table, "rat_spn": rat_spn_table, "numerics": lambda _: numerics_table()}
    tables |= {"em": em_table, "digits": digits_table}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=tables, action="append")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256], help="states of hmm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least", action="store_true", help="compare the shortest bursts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not compile")
    parser.add_argument("--jax-python", default=sys.executable, help="interpreter with jax")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.table or tables:
        rows = tables[name](args)
        append_rows(args.out / "circuit_engine_cpu.csv", rows)
        for r in rows:
            print(
                f"{r['case']:32} {r['provider']:28} {r['median_ms']:>8} ms, "
                f"{r['over_lora_ext']:>6} of lora_ext  error {r['worst_error']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
