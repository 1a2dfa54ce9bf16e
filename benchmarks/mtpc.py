"""Compare the speed of circuit drafts and independent drafts: `python benchmarks/mtpc.py`.

The text is that of `examples/mtpc_bytes.py`, the model is smaller. Four heads of n = 8 are trained
in the same way on one frozen model. Held-out prompts are then decoded, sampling and greedy, at
batch 1 and 8, with the forwards of `lean.py`, by all engines in turn. Times count only if nothing
else ran on the machine; otherwise there is no verdict. `mtpc_smollm2.py` times a trained head on
SmolLM2.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Iterator, Mapping

import study
import torch
from common import ROOT
from study import Claim, Criterion, Interval, Row, Rows

sys.path.append(str(ROOT / "examples"))

import mtpc_bytes
from mtpc_bytes import BATCHES, MODES, Found, Sizes

CLAIM = Claim(
    paper="Fast and Expressive Multi-Token Prediction with Probabilistic Circuits "
    "(arXiv 2511.11346)",
    claim="Drafts with shared latent variables (cp, hmm, btree) make decoding faster than "
    "drafts of independent tokens (ff), since the model accepts more of them. Of the circuits, "
    "hmm and btree improve on the mixture cp.",
    setup="A byte-level Llama (2 layers, width 96) on the source of Python's standard library. "
    "Heads of n = 8, r = 8 are trained in the same way on the frozen model. Held-out prompts are "
    "decoded with benchmarks/lean.py, sampling and greedy, at batch 1 and 8, in turn.",
    headline="speedup over ff",
    use="consecutive tokens depend on each other (code, formats), and a pass is much more "
    "expensive than a draft",
    avoid="the model is so small that a draft costs as much as a pass. Measure seconds, not tokens "
    "per call: on such a model, circuits made sampling 1.1 to 1.2 times as fast as ff at "
    "batch size 1, and slower at batch size 8",
    seeds=3,
    earlier="bytes emitted per call, sampling: ff 2.15, cp 2.50, hmm 2.68, btree 2.68 (3 seeds, "
    "revision 7df50ba+): reproduced, in calls; no criterion measured seconds",
)
LATENT, TREES = ("cp", "hmm", "btree"), ("hmm", "btree")
SMALL = Sizes(
    width=96,
    layers=2,
    length=64,
    batch=16,
    base_steps=500,
    head_batch=4,
    head_steps=200,
    n_token=8,
    rank=8,
    adapter_rank=32,
    held_out=64,
    new_tokens=64,
    rounds=7,
)
QUIET = 1.5  # system load above which times are not valid


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield one row per head: its nats, and per mode and batch its tokens per call and speedup."""
    sizes = mtpc_bytes.QUICK if quick else SMALL
    torch.manual_seed(arm["seed"])
    train, held_out = mtpc_bytes.read_text(sizes)
    model = mtpc_bytes.train_model(train, sizes)
    found = {kind: Found() for kind in ("ff", *LATENT)}
    drafts = {
        kind: mtpc_bytes.train_head(model, kind, train, held_out, sizes, one)
        for kind, one in found.items()
    }
    load = os.getloadavg()[0]
    times = mtpc_bytes.decode(model, drafts, held_out, sizes, found)
    load = max(load, os.getloadavg()[0])
    for kind, one in found.items():
        row: Row = {"kind": kind, "load": load, "nats": statistics.fmean(one.held_out)}
        for mode, batch in itertools.product(MODES, BATCHES):
            row[f"emitted_{mode}_{batch}"] = one.emitted[mode, batch]
            row[f"faster_{mode}_{batch}"] = times["ff", mode, batch].over(times[kind, mode, batch])
        yield row


def settings(quick: bool) -> Mapping[str, object]:
    return {"sizes": str(SMALL)}


def faster(rows: Rows, kind: str, mode: str, batch: int) -> Interval:
    """Return the speedup of a head over ff."""
    return study.interval(study.column(rows, f"faster_{mode}_{batch}", kind=kind))


def criteria(rows: Rows) -> list[Criterion]:
    """Check the speedups of chains and trees in every mode and batch (the headline)."""
    quiet = max(row["load"] for row in rows) <= QUIET
    found: list[Criterion] = []
    for kind, mode, batch in itertools.product(TREES, MODES, BATCHES):
        each = faster(rows, kind, mode, batch)
        found.append(
            Criterion(
                f"speedup of {kind} over ff, {mode}, batch {batch}",
                "above 1",
                f"{each:.2f}" if quiet else "the machine was busy",
                each.middle > 1 if quiet else None,
                headline=True,
            )
        )
    nats = {kind: study.mean(rows, "nats", kind=kind) for kind in ("ff", *LATENT)}
    calls = {kind: emitted(rows, kind) for kind in nats}
    for kind in LATENT:
        gap = nats["ff"] - nats[kind]
        name = f"held-out nats per byte, ff - {kind}"
        found.append(Criterion(name, "at least 0.05", f"{gap:.2f}", gap >= 0.05))
    for kind, other in (*((kind, "ff") for kind in LATENT), *((kind, "cp") for kind in TREES)):
        times = calls[kind] / calls[other]
        name = f"bytes emitted per call, sampling: {kind} / {other}"
        found.append(Criterion(name, "above 1", f"{times:.2f}", times > 1))
    return found


def emitted(rows: Rows, kind: str) -> float:
    """Return the bytes per call when sampling at the larger batch."""
    return study.mean(rows, f"emitted_{MODES[0]}_{max(BATCHES)}", kind=kind)


def figure(rows: Rows) -> str:
    """Return the bytes per call; the criteria contain the speedups."""
    quiet = max(row["load"] for row in rows) <= QUIET
    calls = ", ".join(f"{kind} {emitted(rows, kind):.2f}" for kind in ("ff", *LATENT))
    seconds = "in the table" if quiet else "left for a quiet machine"
    return f"speedups over ff {seconds}; bytes emitted per call, sampling: {calls}"


def panels(rows: Rows) -> study.Panels:
    """Return the bytes per call, and the speedups over ff in the same rounds."""
    found = {
        "bytes per call, sampling": {
            kind: study.interval(
                study.column(rows, f"emitted_{MODES[0]}_{max(BATCHES)}", kind=kind)
            )
            for kind in ("ff", *LATENT)
        }
    }
    for mode, batch in itertools.product(MODES, BATCHES):
        found[f"times faster than ff, {mode}, batch {batch}"] = {
            kind: faster(rows, kind, mode, batch) for kind in LATENT
        }
    return found


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
