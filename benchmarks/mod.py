"""Compare MoD, alone and added to LoRA, with LoRA on SmolLM2: `python benchmarks/mod.py`.

SmolLM2 is tuned on two kinds of text (claims/language.py) by LoRA, by LoRA and MoD, and by MoD
alone, 200 steps each. Learning rates are chosen first, on a separate seed: that of LoRA, and for
MoD alone those of the router and of the norms.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import study
import torch
from claims import language
from study import Claim, Criterion, Interval, Row, Rows

from lora_ext.methods import mod
from lora_ext.nn import LoraConfig, wrap

CLAIM = Claim(
    paper="Tuning Language Models by Mixture-of-Depths Ensemble (arXiv 2410.13077)",
    claim="An ensemble of the last layers, added to a tuning method, improves it modestly. Late "
    "layers can be tuned to losses close to the last layer's. Used instead of other trainable "
    "modules, the ensemble is nearly as good with far fewer parameters.",
    setup="SmolLM2-135M, 200 steps of 2 x 64 tokens on Python's source and on lines about Debian's "
    "packages. LoRA of rank 8 on all linear layers; MoD with k = 3 and lambda 0.1. Rates of LoRA, "
    "router and norms are chosen on another seed; 64 held-out rows.",
    headline="loss against LoRA",
    use="you can store hardly any parameters, and a small part of LoRA's gain is enough: MoD alone "
    "had 15 % of it on SmolLM2, with 0.12 % of the parameters",
    avoid="you can train LoRA: adding MoD to it made the loss on unseen text 0.009 nats per token "
    "worse here, and training costs as much as k heads",
    seeds=3,
    earlier="a Llama of 6 layers on a Markov source. MoD alone has 49 % of LoRA's gain for 2.1 % "
    "of its parameters; added to LoRA -0.0048 nats per token (3 seeds, revision 0bf2c4d): "
    "direction only",
)
LORA, BOTH, ALONE, UNTUNED = "LoRA", "LoRA + MoD", "MoD", "untuned"
ARMS = (UNTUNED, LORA, BOTH, ALONE)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHOOSING = 100  # seed on which rates are chosen
LORA_RATES, ROUTER_RATES, NORM_RATES = (5e-4, 2e-3), (1e-3, 1e-2), (1e-3, 1e-2)
STEPS, CHOOSING_STEPS, BATCH, LENGTH, HELD_OUT = 200, 60, 2, 64, 64


def settings(quick: bool) -> Mapping[str, object]:
    sizes = (STEPS, CHOOSING_STEPS, BATCH, LENGTH, HELD_OUT)
    rates = (LORA_RATES, ROUTER_RATES, NORM_RATES)
    return {"sizes": sizes, "rates": rates, "model": language.load(quick).hash}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms that choose learning rates, then each way of tuning on each kind of text."""
    for rate in LORA_RATES:
        yield {"seed": CHOOSING, "kind": "python", "arm": LORA, "rate": rate}
    for router, norms in itertools.product(ROUTER_RATES, NORM_RATES):
        rates = {"rate": router, "norm_rate": norms}
        yield {"seed": CHOOSING, "kind": "python", "arm": ALONE, **rates}
    for seed in seeds:
        for kind in language.KINDS:
            for arm in ARMS:
                yield {"seed": seed, "kind": kind, "arm": arm}


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield the loss of one tuned model on unseen texts."""
    steps = CHOOSING_STEPS if arm["seed"] == CHOOSING else STEPS
    steps = 3 if quick else steps
    held_out, batches = data(arm["kind"], arm["seed"], steps, quick)
    torch.manual_seed(arm["seed"])
    model = language.load(quick).copy()
    if arm["arm"] in (LORA, BOTH):
        wrap(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    if arm["arm"] in (BOTH, ALONE):
        mod.apply(model)
    groups = grouped(model, rates_of(arm, rows))
    count = sum(p.numel() for group in groups for p in group["params"])
    if groups:
        language.train(model, ({"input_ids": b, "labels": b} for b in batches), groups)
    yield {"loss": language.loss_of(model, held_out), "parameters": count}


def data(kind: str, seed: int, steps: int, quick: bool) -> tuple[Any, Any]:
    """Return rows that are held out for every seed, and batches of the others."""
    held, length = (4, 16) if quick else (HELD_OUT, LENGTH)
    total = held + (STEPS + CHOOSING_STEPS) * BATCH if not quick else held + 40
    if kind == "packages" and not quick:
        total = held + 380  # 3,000 lines have 500 texts
    rows = language.rows_of(kind, total, length, quick)
    g = torch.Generator().manual_seed(seed)
    order = torch.randint(held, len(rows), (steps * BATCH,), generator=g)
    return rows[:held], rows[order].split(BATCH)


def rates_of(arm: Row, rows: Rows) -> dict[str, float]:
    """Return rates of LoRA, router and norms: the arm's if it chooses rates, else the best ones."""
    if arm["seed"] == CHOOSING:
        return {"lora": arm["rate"], "router": arm["rate"], "norms": arm.get("norm_rate", 0.0)}
    tried = [row for row in rows if row["seed"] == CHOOSING]
    best = {
        name: min((r for r in tried if r["arm"] == name), key=lambda r: r["loss"])
        for name in (LORA, ALONE)
    }
    return {
        "lora": best[LORA]["rate"],
        "router": best[ALONE]["rate"],
        "norms": best[ALONE]["norm_rate"],
    }


def grouped(model: Any, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the trained parameters with their rates."""
    found: dict[str, list[Any]] = {"lora": [], "router": [], "norms": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if "lora_" in name else "norms" if "norm" in name else "router"
            found[kind].append(parameter)
    return [{"params": each, "lr": rates[kind]} for kind, each in found.items() if each]


# -------------------------------------------------------------------------------------------------
# Judging


def losses(rows: Rows, arm: str, kind: str | None = None) -> list[float]:
    """Return the loss of each seed: the mean over the kinds of text, or of one kind."""
    own = [r for r in rows if r["arm"] == arm and kind in (None, r["kind"])]
    own = [r for r in own if r["seed"] != CHOOSING]
    seeds = sorted({r["seed"] for r in own})
    return [study.mean(own, "loss", seed=seed) for seed in seeds]


def less(rows: Rows, one: str, other: str, kind: str | None = None) -> Interval:
    """Return the loss of arm `one` minus that of `other`, in nats per token."""
    pairs = zip(losses(rows, one, kind), losses(rows, other, kind), strict=True)
    return study.interval([a - b for a, b in pairs])


def share(rows: Rows) -> Interval:
    """Return the gain of MoD alone as a share of the gain of LoRA."""
    columns = (losses(rows, name) for name in (UNTUNED, ALONE, LORA))
    return study.interval([(u - m) / (u - a) for u, m, a in zip(*columns, strict=True)])


def part_of_parameters(rows: Rows) -> float:
    """Return the number of MoD's parameters as a share of LoRA's."""
    return study.mean(rows, "parameters", arm=ALONE) / study.mean(rows, "parameters", arm=LORA)


def criteria(rows: Rows) -> list[Criterion]:
    """Check both halves of the claim: MoD added to LoRA, and instead of it."""
    added, alone, part = less(rows, BOTH, LORA), share(rows), part_of_parameters(rows)
    return [
        Criterion(
            "loss of LoRA + MoD minus that of LoRA, nats per token",
            "interval below 0",
            f"{added:+.4f}",
            added.high < 0,
            headline=True,
            points=added.middle < 0,
        ),
        Criterion(
            "MoD alone: share of LoRA's gain",
            "at least half",
            f"{alone:.0%}",
            alone.middle >= 0.5,
            headline=True,
            points=alone.middle > 0.25,
        ),
        Criterion("MoD alone: share of LoRA's parameters", "<= 5 %", f"{part:.2%}", part <= 0.05),
        *(
            Criterion(f"LoRA + MoD minus LoRA, {kind}", "below 0", f"{each:+.4f}", each.middle < 0)
            for kind, each in ((kind, less(rows, BOTH, LORA, kind)) for kind in language.KINDS)
        ),
    ]


def figure(rows: Rows) -> str:
    """Format both halves of the claim."""
    return (
        f"adding MoD to LoRA changed the loss by {less(rows, BOTH, LORA):+.4f} nats per token; MoD "
        f"alone had {share(rows):.0%} of LoRA's gain for {part_of_parameters(rows):.2%} of its "
        "parameters"
    )


def panels(rows: Rows) -> study.Panels:
    return {
        f"{kind}: held-out loss": {
            arm: study.interval(losses(rows, arm, kind)) for arm in ARMS if losses(rows, arm, kind)
        }
        for kind in language.KINDS
    }


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
