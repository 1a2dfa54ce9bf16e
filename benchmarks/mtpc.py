"""Compare the speed of circuit drafts and independent drafts: `python benchmarks/mtpc.py`.

A deep and narrow Llama (24 layers, width 288) over ASCII learns the source of Python's standard
library, once; its weights stay in the user's cache and are trained anew if they are missing. Five
heads of n = 8 are trained in the same way on the frozen model, at rates chosen on a separate seed.
Held-out prompts are then decoded, sampling and greedy, at batch 1 and 8, with the forwards of
`lean.py`, by all engines in turn. Times count only if nothing else ran on the machine; otherwise
there is no verdict. `mtpc_smollm2.py` times a trained head on SmolLM2.

The headline is the paper's claim, so its circuits are the paper's: cp, hmm and btree. The fifth
head, "soft evidence", is an hmm of another paper (CoDD, arXiv 2603.00045), so it has a criterion of
its own, which the verdict does not use, and neither the choice of the circuit nor the gate reads
it. Its criterion has no result if its best rate is at an end of its grid.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import statistics
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import study
import torch
from claims import language
from common import ROOT
from study import Claim, Criterion, Gate, Interval, Row, Rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext.interop.smollm2 import cache_folder
from lora_ext.methods import mtpc as method

sys.path.append(str(ROOT / "examples"))

import mtpc_bytes
from mtpc_bytes import BATCHES, MODES, Found, Sizes

CLAIM = Claim(
    paper="Multi-Byte Prediction (ICML 2026; as Fast and Expressive Multi-Token Prediction with "
    "Probabilistic Circuits, arXiv 2511.11346)",
    claim="Drafts with shared latent variables (cp, hmm, btree) make decoding faster than "
    "drafts of independent tokens (ff), since the model accepts more of them.",
    setup="A Llama of 24 layers and width 288 over ASCII, trained on Python's standard library. "
    "Heads of n = 8, r = 4 on the frozen model cost at most 10 % of a pass (1.3 to 5.6 % in the "
    "paper). Decoded with benchmarks/lean.py, all engines in turn; the circuit is chosen on "
    "another seed.",
    headline="seconds of ff over those of the best circuit, sampling at batch 1",
    use="consecutive tokens depend on each other (code, formats), and a pass is much more "
    "expensive than a draft",
    avoid="the model is so small that a draft costs as much as a pass. Measure seconds, not "
    "tokens per call",
    seeds=3,
    earlier="a head with 151 % of the model's parameters: hmm 1.12 [1.10, 1.17], btree 1.19 [1.13, "
    "1.22] sampling at batch 1, but not in all of eight cells (revision d4a89cc): not reproduced",
    gate="the head costs at most 10 % of a pass, the model is better than a trigram model, and ff "
    "emits 1.5 bytes per call",
)
LATENT, FF, SOFT = ("cp", "hmm", "btree"), "ff", "soft evidence"
SIZES = Sizes(
    width=288,
    layers=24,
    length=256,
    batch=8,
    base_steps=2000,
    head_batch=4,
    head_steps=300,
    n_token=8,
    rank=4,
    adapter_rank=32,
    held_out=64,
    new_tokens=64,
    rounds=7,
)
QUICK = Sizes(32, 2, 64, 2, 4, 2, 3, 4, 2, 4, 8, 12, 1)
VOCAB, EOS, HEADS = 128, 0, 6
BASE_RATE, WARM_UP = 1.5e-3, 0.05
GRIDS = {kind: study.Grid((2.5e-3, 5e-3, 1e-2), most=2) for kind in (FF, "hmm")}
SOFT_GRID = study.Grid((2.5e-3, 5e-3, 1e-2), most=2)  # its leaf logits learn at another rate
CHOOSING, GATE_SEED, CHOOSING_PART = study.TRIALS, study.TRIALS + 1, 1 / 3
MOST_SHARE, LEAST_EMITTED = 0.1, 1.5
TRIGRAM = (0.7, 0.2, 0.1)  # weights of the counts of three, two and one bytes
QUIET = 1.5  # system load above which times are not valid


def settings(quick: bool) -> Mapping[str, object]:
    return {"sizes": str(SIZES), "vocabulary": VOCAB, "rates": BASE_RATE, "text": text_hash()}


def trials(rows: Rows, quick: bool) -> Iterator[Row]:
    """Yield the run that trains the model, the runs that choose the heads' learning rates, and the
    run that the gate judges."""
    yield {"seed": CHOOSING, "part": "model"}
    for kind, grid in {**GRIDS, SOFT: SOFT_GRID}.items():
        for rate in grid.asked(losses(rows, kind)):
            yield {"seed": CHOOSING, "part": "rate", "kind": kind, "rate": rate}
    yield {"seed": GATE_SEED, "part": "decode"}


def losses(rows: Rows, kind: str) -> dict[float, float]:
    """Return the held-out loss for each learning rate that was tried."""
    own = [r for r in rows if (r["part"], r.get("kind")) == ("rate", kind)]
    return {row["rate"]: row["nats"] for row in own}


def arms(seeds: Sequence[int], quick: bool) -> list[Row]:
    return [{"seed": seed, "part": "decode"} for seed in seeds]


def minutes(arm: Row) -> float:
    return {"model": 100.0, "rate": 2.0, "decode": 25.0}[arm["part"]]


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield one row per head: its nats per byte, and for each mode and batch its tokens per call
    and speedup."""
    sizes = QUICK if quick else SIZES
    train, held_out = read_text(sizes)
    model = base(train, sizes, quick)
    if arm["part"] == "model":
        found = {"nats": model_loss(model, held_out, sizes), "trigram": trigram(train, held_out)}
        yield {"kind": "model", **found}
        return
    torch.manual_seed(arm["seed"])
    if arm["part"] == "rate":
        steps = max(1, round(sizes.head_steps * CHOOSING_PART))
        draft = trained_head(model, arm["kind"], train, sizes, arm["rate"], steps)
        yield {"nats": statistics.fmean(nats(draft, held_out, sizes))}
        return
    found = {kind: Found() for kind in (FF, *LATENT, SOFT)}
    drafts: dict[str, method.Draft] = {}
    for kind in found:
        of = kind if kind in (*GRIDS, SOFT) else "hmm"
        rate = {**GRIDS, SOFT: SOFT_GRID}[of].best(losses(rows, of))
        torch.manual_seed(arm["seed"])
        drafts[kind] = trained_head(model, kind, train, sizes, rate, sizes.head_steps)
        found[kind].held_out = nats(drafts[kind], held_out, sizes)
    load = os.getloadavg()[0]
    times = mtpc_bytes.decode(model, drafts, held_out, sizes, found)
    load = max(load, os.getloadavg()[0])
    for kind, one in found.items():
        row: Row = {"kind": kind, "load": load, "nats": statistics.fmean(one.held_out)}
        row["share"] = head_share(kind, sizes)
        trial = decoded(study.trial_rows(rows))
        row["soft_rate_inside"] = int(SOFT_GRID.gate(losses(rows, SOFT)).met)
        row["chosen"] = best_circuit(trial) if trial else ""
        for mode, batch in itertools.product(MODES, BATCHES):
            row[f"emitted_{mode}_{batch}"] = one.emitted[mode, batch]
            row[f"faster_{mode}_{batch}"] = times[FF, mode, batch].over(times[kind, mode, batch])
        yield row


# -------------------------------------------------------------------------------------------------
# Text, model and heads


def _modules() -> list[bytes]:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [bytes(b for b in path.read_bytes() if 0 < b < VOCAB) for path in paths]


def text_hash() -> str:
    return hashlib.sha256(b"\0".join(_modules())).hexdigest()[:12]


def read_text(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Pack modules into rows; some rows of every tenth module are held out."""
    modules = [list(module) for module in _modules()]
    train = [module for i, module in enumerate(modules) if i % 10]
    held_out = method.pack_documents(modules[::10], sizes.length, EOS)
    rows = method.pack_documents(train, sizes.length, EOS)
    return rows, held_out[:: max(1, len(held_out) // sizes.held_out)]


def base(rows: Tensor, sizes: Sizes, quick: bool) -> Any:
    """Load the model from the user's cache, or train it and save it there."""
    text = f"{sizes.width, sizes.layers, sizes.length, sizes.batch, sizes.base_steps}{text_hash()}"
    name = hashlib.sha256(f"{text}{BASE_RATE}{HEADS}{VOCAB}".encode()).hexdigest()[:12]
    path = cache_folder() / "claims" / f"mtpc-{name}.pt"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=HEADS if sizes.width % HEADS == 0 else 4,
        num_key_value_heads=HEADS if sizes.width % HEADS == 0 else 4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    if path.exists() and not quick:
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval().requires_grad_(False)
    train_model(model, rows, sizes)
    if not quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        os.replace(part, path)
    return model.eval().requires_grad_(False)


def batches(rows: Tensor, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (batch,), generator=g)]


def train_model(model: Any, rows: Tensor, sizes: Sizes) -> None:
    """Train the language model with a warm-up and a cosine decay; can be resumed."""

    def loss(model: Any, ids: Tensor) -> Tensor:
        return mtpc_bytes.next_byte_loss(model, ids)

    def factor(part: float) -> float:
        return min(part / WARM_UP, (1 + math.cos(math.pi * part)) / 2)

    groups = [{"params": list(model.parameters()), "lr": BASE_RATE}]
    drawn = list(batches(rows, sizes.base_steps, sizes.batch, 1))
    language.train(model, drawn, groups, loss=loss, part="base", clip=1.0, schedule=factor)


def trained_head(
    model: Any, kind: str, rows: Tensor, sizes: Sizes, rate: float, steps: int
) -> method.Draft:
    """Retrofit a head to the frozen model, train only the head, and return it."""
    rank = 1 if kind == FF else sizes.rank
    family, evidence = ("hmm", "soft") if kind == SOFT else (kind, "none")
    config = method.MtpcConfig(
        sizes.n_token, rank, family, "adapter", sizes.adapter_rank, evidence=evidence
    )
    draft = method.retrofit(model, config)
    seed = torch.initial_seed()
    groups = [{"params": [p for p in draft.parameters() if p.requires_grad], "lr": rate}]

    def loss(draft: Any, ids: Tensor) -> Tensor:
        return draft.loss(ids, eos_id=EOS)[0]

    drawn = batches(rows, steps, sizes.head_batch, seed)
    language.train(draft, drawn, groups, loss=loss, part=f"head {kind}", clip=1.0)
    return draft.eval()


@torch.no_grad()
def nats(draft: method.Draft, rows: Tensor, sizes: Sizes) -> list[float]:
    """Return the held-out loss in nats of each position of a window."""
    each = [draft.loss(ids, eos_id=EOS)[1] for ids in rows.split(sizes.batch)]
    return torch.stack(each).mean(0).tolist()


@torch.no_grad()
def model_loss(model: Any, rows: Tensor, sizes: Sizes) -> float:
    parts = [mtpc_bytes.next_byte_loss(model, ids) for ids in rows.split(sizes.batch)]
    return torch.stack(parts).mean().item()


def trigram(train: Tensor, held_out: Tensor) -> float:
    """Return the nats per byte of interpolated counts of three, two and one bytes."""

    def codes(rows: Tensor, count: int) -> Tensor:
        parts = [rows[:, 2 - k : rows.shape[1] - k] for k in range(count)]
        return sum(part * VOCAB**k for k, part in enumerate(parts))  # pyright: ignore

    chance = torch.zeros(held_out[:, 2:].shape, dtype=torch.float64)
    for count, weight in zip((3, 2, 1), TRIGRAM, strict=True):
        seen = torch.bincount(codes(train, count).flatten(), minlength=VOCAB**count).double()
        if count == 1:
            seen += 1
        before = seen.view(-1, VOCAB).sum(1) if count > 1 else seen.sum()[None]
        # The last byte is the lowest digit, so a context is the quotient.
        place = codes(held_out, count)
        total = before[place // VOCAB if count > 1 else torch.zeros_like(place)]
        chance += weight * seen[place] / total.clamp(min=1)
    return -chance.log().mean().item()


def head_share(kind: str, sizes: Sizes) -> float:
    """Return the number of floating-point operations of a draft, divided by that of a one-token
    pass."""
    d, k, rank = sizes.width, sizes.adapter_rank, 1 if kind in (FF, SOFT) else sizes.rank
    leaves = sizes.n_token * rank * (4 * k * d + 2 * VOCAB * d)
    latent = {"hmm": sizes.n_token - 1, "btree": sizes.n_token - 2}.get(kind, 0)
    prior = rank if kind != FF else 0
    model = 2 * (sizes.layers * 13 * d * d + VOCAB * d)
    sums = 2 * d * (latent * rank * rank + prior)
    if kind == SOFT:  # evidence of all leaves, and one product per transition
        sums = 2 * sizes.n_token * sizes.rank * (VOCAB + sizes.rank)
    return (leaves + sums) / model


# -------------------------------------------------------------------------------------------------
# Judging


def decoded(rows: Rows) -> Rows:
    return [row for row in rows if row["part"] == "decode"]


def best_circuit(rows: Rows) -> str:
    """Return the circuit with the most bytes per call, sampling at batch 1."""
    own = decoded(rows)
    calls = {kind: study.mean(own, f"emitted_{MODES[0]}_1", kind=kind) for kind in LATENT}
    return max(calls, key=calls.__getitem__)


def gate(rows: Rows) -> list[Gate]:
    """Check the cost of a draft, the model's loss against a trigram model's, and ff's bytes per
    call."""
    own, kinds = decoded(rows), (FF, *LATENT)
    share = max(study.mean(own, "share", kind=kind) for kind in kinds)
    (model,) = [row for row in rows if row["part"] == "model"]
    calls = study.mean(own, f"emitted_{MODES[0]}_1", kind=FF)
    return [
        Gate(
            "operations of a draft over those of a pass",
            f"at most {MOST_SHARE:.0%}",
            f"{share:.1%}",
            share <= MOST_SHARE,
        ),
        Gate(
            "held-out nats per byte of the model",
            "below a trigram model's",
            f"{model['nats']:.3f} against {model['trigram']:.3f}",
            model["nats"] < model["trigram"],
        ),
        study.gate_above("bytes per call of ff, sampling", calls, LEAST_EMITTED, ".2f"),
        *(grid.gate(losses(rows, kind), kind) for kind, grid in GRIDS.items()),
    ]


def faster(rows: Rows, kind: str, mode: str, batch: int) -> Interval:
    """Return the speedup of decoding with the head ``kind`` over decoding with ff."""
    return study.interval(study.column(rows, f"faster_{mode}_{batch}", kind=kind))


def criteria(rows: Rows) -> list[Criterion]:
    """Check the speedups, sampling at batch 1 (the headline), and the nats per byte."""
    quiet = max(row["load"] for row in rows) <= QUIET
    inside = all(row["soft_rate_inside"] for row in rows)
    found: list[Criterion] = []
    for kind in (*LATENT, SOFT):
        each = faster(rows, kind, MODES[0], 1)
        judged = quiet and (inside or kind != SOFT)
        why = "the best rate is at an end of the grid" if quiet else "the machine was busy"
        found.append(
            Criterion(
                f"speedup of {kind} over ff, {MODES[0]}, batch 1",
                "interval above 1",
                f"{each:.2f}" if judged else why,
                each.low > 1 if judged else None,
                headline=kind == chosen(rows),
                points=each.middle > 1,
            )
        )
    for kind in (*LATENT, SOFT):
        gap = study.mean(rows, "nats", kind=FF) - study.mean(rows, "nats", kind=kind)
        name = f"held-out nats per byte, ff - {kind}"
        found.append(Criterion(name, "at least 0.05", f"{gap:.2f}", gap >= 0.05))
    return found


def chosen(rows: Rows) -> str:
    """Return the name of the circuit that was chosen in the trials; every row contains it."""
    return str(rows[0]["chosen"])


def figure(rows: Rows) -> str:
    """Return a text with the speedups and the bytes per call."""
    quiet = max(row["load"] for row in rows) <= QUIET
    calls = ", ".join(
        f"{kind} {study.mean(rows, f'emitted_{MODES[0]}_1', kind=kind):.2f}"
        for kind in (FF, *LATENT, SOFT)
    )
    cells = "; ".join(
        f"{mode}, batch {batch}: "
        + ", ".join(f"{kind} {faster(rows, kind, mode, batch):.2f}" for kind in (*LATENT, SOFT))
        for mode, batch in itertools.product(MODES, BATCHES)
    )
    seconds = cells if quiet else "left for a quiet machine"
    return f"speedups over ff: {seconds}. Bytes per call, sampling at batch 1: {calls}"


def panels(rows: Rows) -> study.Panels:
    """Return the bytes per call, and the speedups over ff in the same rounds."""
    own = [row for row in decoded(rows) if row["seed"] < study.TRIALS]
    found = {
        "bytes per call, sampling": {
            kind: study.interval(study.column(own, f"emitted_{MODES[0]}_1", kind=kind))
            for kind in (FF, *LATENT, SOFT)
        }
    }
    for mode, batch in itertools.product(MODES, BATCHES):
        found[f"times faster than ff, {mode}, batch {batch}"] = {
            kind: faster(own, kind, mode, batch) for kind in (*LATENT, SOFT)
        }
    return found


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
