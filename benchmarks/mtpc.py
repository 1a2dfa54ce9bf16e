"""How much of a circuit's draft the model accepts: `python benchmarks/mtpc.py --check`.

The bytes of `examples/mtpc_bytes.py` with a smaller model: four heads of n = 8 on one frozen model,
trained alike; then sampled decoding of held-out prompts. Times are `mtpc_bytes.py`'s and
`mtpc_smollm2.py`'s affair. Four minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import study
import torch
from common import ROOT
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict

sys.path.append(str(ROOT / "examples"))

import mtpc_bytes
from mtpc_bytes import Found, Sizes

CLAIM = Claim(
    paper="Fast and Expressive Multi-Token Prediction with Probabilistic Circuits "
    "(arXiv 2511.11346)",
    claim="A model accepts more of a draft whose tokens share latent variables (cp, hmm, btree) "
    "than of one whose tokens are independent (ff); of the circuits, hmm and btree go beyond the "
    "mixture cp.",
    setup="A byte-level Llama (2 layers, width 96) on the source of Python's standard library; "
    "heads of n = 8, r = 8, trained alike on the frozen model; sampled decoding of 32 held-out "
    "prompts.",
)
LATENT = ("cp", "hmm", "btree")
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
)
PROMPTS, BATCH, PROMPT = 32, 8, 16


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Held-out nats and tokens emitted a call, for every seed and kind."""
    sizes = mtpc_bytes.QUICK if quick else SMALL
    for seed in seeds:
        torch.manual_seed(seed)
        train, held_out = mtpc_bytes.read_text(sizes)
        model = mtpc_bytes.train_model(train, sizes)
        prompts = held_out[:: max(1, len(held_out) // PROMPTS), :PROMPT][:PROMPTS]
        for kind in ("ff", *LATENT):
            found = Found()
            draft = mtpc_bytes.train_head(model, kind, train, held_out, sizes, found)
            decoder = draft.decoder(mode="sample")
            emitted = calls = 0
            for ids in prompts.split(BATCH):
                settings = {"max_new_tokens": sizes.new_tokens, "eos_token_id": [], "seed": seed}
                out = decoder.generate(ids, **settings)
                emitted, calls = emitted + sum(out.emitted), calls + sum(out.calls)
            draft.remove()
            nats = sum(found.held_out) / len(found.held_out)
            yield {"seed": seed, "kind": kind, "nats": nats, "emitted": emitted / calls}


def criteria(rows: Rows) -> list[Criterion]:
    """Latents against factors, and trees and chains against the mixture."""
    nats, emitted = (of_kind(rows, column) for column in ("nats", "emitted"))
    found = [
        Criterion(
            f"held-out nats a byte of {kind} below those of ff",
            "by at least 0.05",
            f"{nats['ff'] - nats[kind]:.2f}",
            nats["ff"] - nats[kind] >= 0.05,
        )
        for kind in LATENT
    ]
    for kind, other in (
        ("cp", "ff"),
        ("hmm", "ff"),
        ("btree", "ff"),
        ("hmm", "cp"),
        ("btree", "cp"),
    ):
        found.append(
            Criterion(
                f"bytes emitted a call, {kind} over {other}",
                "above 1",
                f"{emitted[kind] / emitted[other]:.2f}",
                emitted[kind] > emitted[other],
            )
        )
    return found


def of_kind(rows: Rows, column: str) -> dict[str, float]:
    """The mean over the seeds."""
    return {kind: study.mean(rows, column, kind=kind) for kind in ("ff", *LATENT)}


def verdict(rows: Rows) -> Verdict:
    """Reproduced where all holds; direction only where latents beat factors, in whatever order."""
    met = [c.passed for c in criteria(rows)]
    emitted = ", ".join(f"{kind} {mean:.2f}" for kind, mean in of_kind(rows, "emitted").items())
    word = REPRODUCED if all(met) else DIRECTION if all(met[:6]) else NOT_REPRODUCED
    return Verdict(f"bytes emitted a call: {emitted}", word)


def show(rows: Rows) -> None:
    """Means, and the seeds they are of."""
    nats, emitted = (of_kind(rows, column) for column in ("nats", "emitted"))
    lines = []
    for kind in nats:
        own = [f"{row['emitted']:.2f}" for row in rows if row["kind"] == kind]
        lines.append([kind, f"{nats[kind]:.3f}", f"{emitted[kind]:.2f}", ", ".join(own)])
    header = ["head", "held-out nats a byte", "emitted a call", "of each seed"]
    print(study.markdown(header, lines), end="\n\n")


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
