"""Compare MoD, alone and added to LoRA, with LoRA on SmolLM2: `python benchmarks/mod.py`.

SmolLM2 is tuned for 1,000 steps on Python's source (claims/language.py) by LoRA, by LoRA and MoD,
by LoRA with as many more parameters as MoD adds, by MoD alone, and by LoRA with as few parameters
as MoD alone. Settings are chosen on a separate seed, by runs of 100 steps: first LoRA's learning
rate; then, for LoRA and MoD, k, the initial mass of the last layer, and the learning rate of router
and norms; and the learning rates of the two arms with few parameters. Two more arms tune LoRA such
that a late layer predicts instead of the last one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import study
import torch
from claims import language
from study import Claim, Criterion, Gate, Interval, Row, Rows

from lora_ext.methods import mod
from lora_ext.nn import LoraConfig, wrap

CLAIM = Claim(
    paper="MoDE, Tuning Language Models by Mixture-of-Depths Ensemble (arXiv 2410.13077v2)",
    claim="An ensemble of the last layers, added to a tuning method, modestly improves it. Used "
    "instead of other trainable modules, it is comparable with larger ones.",
    setup="SmolLM2-135M, 1,000 steps of 2 x 128 tokens of Python's source. LoRA of rank 8 on all "
    "linear layers; MoD with k, initial mass and rates chosen beside LoRA; LoRA with as many "
    "more parameters as MoD adds, and LoRA with MoD's parameters alone.",
    headline="loss of LoRA + MoD below that of LoRA, and of LoRA with as many more parameters",
    use="you can store hardly any parameters, and a small part of LoRA's gain is enough",
    avoid="you can train LoRA: no gain of MoD in addition to LoRA was found, and training costs as "
    "much as k heads",
    seeds=3,
    earlier="200 steps, rates chosen for MoD alone: beside LoRA +0.0086 [+0.0065, +0.0126] nats, "
    "alone 15 % of LoRA's gain (3 seeds, revision edb0283): not reproduced",
    gate="LoRA gains 0.05 nats per token in 100 steps, MoD has at most 5 % of LoRA's parameters, "
    "and no chosen rate is at the upper end of its grid",
)
LORA, BOTH, WIDER = "LoRA", "LoRA + MoD", "LoRA, as many more parameters"
ALONE, SMALL, UNTUNED = "MoD", "LoRA, MoD's parameters", "untuned"
LATE = {f"LoRA, layer -{back + 1} predicts": back for back in (1, 2)}
ARMS = (UNTUNED, LORA, BOTH, WIDER, ALONE, SMALL)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHOOSING = study.TRIALS
KINDS = tuple((k, mass) for k in (2, 3, 4) for mass in (0.98, 0.9))  # k and initial mass to try
FIRST_RATE = 3e-4  # of router and norms, while k and the initial mass are chosen
GRIDS = {
    LORA: study.Grid((2.5e-4, 5e-4, 1e-3), most=2),
    BOTH: study.Grid((1e-4, 3e-4, 1e-3), most=2),
    ALONE: study.Grid((1e-3, 3e-3, 1e-2), most=2),
    SMALL: study.Grid((1e-3, 3e-3, 1e-2), most=2),
}
STEPS, CHOOSING_STEPS, BATCH, LENGTH, HELD_OUT, ROWS = 1000, 100, 2, 128, 96, 800
LEAST_GAIN, MOST_PARAMETERS, COMPARABLE, LATE_SHARE = 0.05, 0.05, 0.02, 1.05


def settings(quick: bool) -> Mapping[str, object]:
    sizes = (STEPS, CHOOSING_STEPS, BATCH, LENGTH, HELD_OUT, ROWS, KINDS)
    rates = {name: grid.rates for name, grid in GRIDS.items()}
    return {"sizes": sizes, "rates": rates, "model": language.load(quick).hash}


def trials(rows: Rows, quick: bool) -> Iterator[Row]:
    """Yield the runs that choose the learning rates, k and the initial mass of the last layer."""
    yield {"seed": CHOOSING, "arm": UNTUNED}
    for rate in GRIDS[LORA].asked(losses_by_rate(rows, LORA)):
        yield {"seed": CHOOSING, "arm": LORA, "rate": rate}
    for k, mass in KINDS:
        yield {"seed": CHOOSING, "arm": BOTH, "rate": FIRST_RATE, "k": k, "mass": mass}
    for name in (BOTH, ALONE, SMALL):
        for rate in GRIDS[name].asked(losses_by_rate(rows, name)):
            yield {"seed": CHOOSING, "arm": name, "rate": rate, "k": "", "mass": ""}


def losses_by_rate(rows: Rows, arm: str) -> dict[float, float]:
    """Return the loss for each learning rate that was tried, with the chosen k and initial mass."""
    own = [row for row in rows if (row["seed"], row["arm"]) == (CHOOSING, arm)]
    return {row["rate"]: row["loss"] for row in own if row.get("k", "") == ""}


def kind_of(rows: Rows) -> tuple[int, float]:
    """Return the k and the initial mass with which LoRA and MoD had the lowest loss."""
    tried = [r for r in rows if (r["seed"], r["arm"]) == (CHOOSING, BOTH) and r["k"] != ""]
    best = min(tried, key=lambda row: row["loss"])
    return best["k"], best["mass"]


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield one arm per way of tuning. The first seed also has the arms in which a late layer
    predicts."""
    for seed in seeds:
        for arm in (*ARMS, *LATE) if seed == 0 else ARMS:
            yield {"seed": seed, "arm": arm}


def minutes(arm: Row) -> float:
    if arm["arm"] == UNTUNED:
        return 0.5
    return 4.5 if arm["seed"] == CHOOSING else 45.0


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield the loss of one tuned model on unseen texts."""
    name, steps = arm["arm"], CHOOSING_STEPS if arm["seed"] == CHOOSING else STEPS
    steps = 3 if quick else steps
    held_out, batches = data(arm["seed"], steps, quick)
    torch.manual_seed(arm["seed"])
    model = language.load(quick).copy()
    rates = rates_of(arm, rows)
    if name != UNTUNED:
        build(model, name, config_of(arm, rows, quick))
    groups = grouped(model, rates)
    count = sum(p.numel() for group in groups for p in group["params"])
    if groups:
        language.train(model, ({"input_ids": b, "labels": b} for b in batches), groups)
    chosen = {f"{kind}_rate": rate for kind, rate in rates.items()} if groups else {}
    yield {"loss": language.loss_of(model, held_out), "parameters": count, **chosen}


def config_of(arm: Row, rows: Rows, quick: bool) -> mod.ModConfig:
    """Return MoD's settings: the arm's, the chosen ones, or those of a late layer."""
    if arm["arm"] in LATE:
        weights = [0.0] * (LATE[arm["arm"]] + 1)
        weights[0] = 1.0
        fixed: Any = tuple(weights)
        return mod.ModConfig(k=len(fixed), router="fixed", fixed_weights=fixed, distill_weight=0.0)
    tried = any(row["arm"] == BOTH and row.get("k", "") != "" for row in rows)
    chosen = kind_of(rows) if tried else KINDS[0]
    k, mass = (arm["k"], arm["mass"]) if arm.get("k", "") != "" else chosen
    return mod.ModConfig(k=k, final_mass=mass)


def build(model: Any, arm: str, config: mod.ModConfig) -> None:
    """Add the arm's trained parameters to the model."""
    blocks, width = len(model.model.layers), model.config.hidden_size
    added = 2 * config.k * width  # about MoD's number: k norms and a router with k outputs
    if arm == SMALL:
        # Rank 1 on the output projections of the last blocks: two vectors of the width each.
        last = list(range(max(0, blocks - config.k), blocks))
        settings = {"r": 1, "lora_alpha": 2, "target_modules": ["o_proj"]}
        wrap(model, LoraConfig(**settings, layers_to_transform=last))
    elif arm != ALONE:
        pattern: dict[str, int] = {}
        if arm == WIDER:  # one more rank on output projections, which add twice the width each
            pattern = {
                rf"layers\.{i}\.self_attn\.o_proj": 9
                for i in range(max(0, blocks - added // (2 * width)), blocks)
            }
        alphas: dict[str, float] = {name: 18.0 for name in pattern}  # the same alpha / r
        wrap(
            model,
            LoraConfig(
                r=8,
                lora_alpha=16,
                target_modules=TARGETS,
                rank_pattern=pattern,
                alpha_pattern=alphas,
            ),
        )
    if arm in (BOTH, ALONE, *LATE):
        mod.apply(model, config)


def data(seed: int, steps: int, quick: bool) -> tuple[Any, Any]:
    """Return the rows of tokens that are held out for every seed, and batches of all other rows."""
    held, length = (4, 16) if quick else (HELD_OUT, LENGTH)
    rows = language.rows_of("python", held + (40 if quick else ROWS), length, quick)
    g = torch.Generator().manual_seed(seed)
    order = torch.randint(held, len(rows), (steps * BATCH,), generator=g)
    return rows[:held], rows[order].split(BATCH)


def rates_of(arm: Row, rows: Rows) -> dict[str, float]:
    """Return the learning rates of LoRA, and of router and norms: the arm's or the chosen ones."""
    name = arm["arm"]

    def best(of: str) -> float:
        tried = losses_by_rate(rows, of)
        return GRIDS[of].best(tried) if tried else 0.0

    own = arm.get("rate") or (best(name) if name in GRIDS else 0.0)
    lora = own if name in (LORA, SMALL) else best(LORA)
    return {"lora": lora, "mod": own if name in (BOTH, ALONE) else best(BOTH)}


def grouped(model: Any, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the trained parameters with their learning rates, as groups for the optimizer."""
    found: dict[str, list[Any]] = {"lora": [], "mod": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found["lora" if "lora_" in name else "mod"].append(parameter)
    return [{"params": each, "lr": rates[kind]} for kind, each in found.items() if each]


# -------------------------------------------------------------------------------------------------
# Judging


def less(rows: Rows, one: str, other: str) -> Interval:
    """Return the loss of arm ``one`` minus that of ``other``, in nats per token."""
    pairs = zip(*(study.column(rows, "loss", arm=name) for name in (one, other)), strict=True)
    return study.interval([a - b for a, b in pairs])


def share(rows: Rows) -> Interval:
    """Return the gain of MoD alone as a share of the gain of LoRA."""
    columns = (study.column(rows, "loss", arm=name) for name in (UNTUNED, ALONE, LORA))
    return study.interval([(u - m) / (u - a) for u, m, a in zip(*columns, strict=True)])


def gate(rows: Rows) -> list[Gate]:
    """Check LoRA's gain and MoD's number of parameters, and that no best learning rate is at the
    upper end of its grid."""
    untuned = study.mean(rows, "loss", arm=UNTUNED)
    gain = untuned - min(losses_by_rate(rows, LORA).values())
    part = study.mean(rows, "parameters", arm=ALONE) / study.mean(rows, "parameters", arm=LORA)
    found = [
        study.gate_above("LoRA's gain in 100 steps, nats per token", gain, LEAST_GAIN),
        Gate(
            "MoD's parameters over LoRA's",
            f"at most {MOST_PARAMETERS:.0%}",
            f"{part:.2%}",
            part <= MOST_PARAMETERS,
        ),
    ]
    for name, grid in GRIDS.items():
        tried = losses_by_rate(rows, name)
        best = grid.best(tried)
        text = f"{best:g} of {min(tried):g} to {max(tried):g}"
        # A best rate at the lower end means that the arm should not learn, which is a result.
        found.append(Gate(f"rate of {name}", "below the upper end", text, best < max(tried)))
    return found


def criteria(rows: Rows) -> list[Criterion]:
    """Check LoRA with MoD against LoRA (the headline), MoD alone, and late layers."""
    found: list[Criterion] = []
    for rival in (LORA, WIDER):
        each = less(rows, BOTH, rival)
        found.append(
            Criterion(
                f"loss of {BOTH} minus that of {rival}, nats per token",
                "interval below 0",
                f"{each:+.4f}",
                each.high < 0,
                headline=True,
                points=each.middle < 0,
            )
        )
    alone = less(rows, ALONE, SMALL)
    found.append(
        Criterion(
            f"loss of {ALONE} minus that of {SMALL}",
            f"at most {COMPARABLE}",
            f"{alone:+.4f}",
            alone.middle <= COMPARABLE,
        )
    )
    last = study.column(rows, "loss", arm=LORA, seed=0)[0]
    for name in LATE:
        times = study.mean(rows, "loss", arm=name, seed=0) / last
        found.append(
            Criterion(
                f"loss of {name}, over that of LoRA (one seed)",
                f"at most {LATE_SHARE}",
                f"{times:.3f}",
                times <= LATE_SHARE,
            )
        )
    return found


def figure(rows: Rows) -> str:
    """Return a text with the change of LoRA's loss by MoD, and MoD's share of LoRA's gain."""
    part = study.mean(rows, "parameters", arm=ALONE) / study.mean(rows, "parameters", arm=LORA)
    return (
        f"adding MoD to LoRA changed the loss by {less(rows, BOTH, LORA):+.4f} nats per token, and "
        f"by {less(rows, BOTH, WIDER):+.4f} compared with as many more parameters of LoRA; MoD "
        f"alone had {share(rows):.0%} of LoRA's gain for {part:.2%} of its parameters, "
        f"{less(rows, ALONE, SMALL):+.4f} compared with LoRA of that size"
    )


def panels(rows: Rows) -> study.Panels:
    own = [row for row in rows if row["seed"] < study.TRIALS]
    return {
        "held-out loss": {
            arm: study.interval(study.column(own, "loss", arm=arm)) for arm in (*ARMS, *LATE)
        }
    }


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
