"""Print tables and draw a chart of the rows of bench_lora.py: `python benchmarks/report.py [CSV]`.

The output is Markdown: targets and measured values, then with `--all` every row of the last run.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, str]]
MODEL = "SmolLM2-shaped, r16 on 7 linears: "
MIX = "mix of 3, width 4096, 512 tokens"


@dataclass(frozen=True)
class Target:
    """Target: a bound for one column of one case of lora_ext."""

    text: str
    case: str
    column: str
    bound: float
    at_least: bool = False
    rank: str = ""  # distinguishes rows of one case
    peer: str = ""  # if given, the value is its column divided by lora_ext's

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    *(
        target
        for rows in (16, 8)
        for target in (
            Target(
                f"{MODEL}decode, {rows} rows of {rows} adapters, time over no adapters",
                f"decode {rows} rows of {rows} adapters",
                "over_base",
                1.35,
            ),
            Target(
                f"{MODEL}decode, {rows} rows of {rows} adapters, PEFT's time over lora_ext's",
                f"decode {rows} rows of {rows} adapters",
                "over_peft",
                2.5,
                at_least=True,
            ),
        )
    ),
    Target(
        f"{MODEL}prefill 8 x 128, 8 adapters, time over no adapters",
        "prefill 8 rows of 8 adapters x 128",
        "over_base",
        1.12,
    ),
    *(
        Target(f"op at {case}: GB/s over this machine's copy", case, "of_copy", 0.60, at_least=True)
        for case in ("D4", "D5", "D6")
    ),
    Target(
        "op, 64 rows of 64 adapters: ranks {8, 16, 32, 64} over all 64",
        "mixed ranks",
        "over_full",
        0.55,
        rank="8, 16, 32, 64",
    ),
    Target("one op call on a tiny input, us", "tiny call", "median", 8.0),
    Target("bytes allocated by a call of lora_apply_", "lora_apply_ allocates", "median", 0),
    Target(
        "bytes allocated by lora_apply beyond its result",
        "lora_apply allocates beyond its result",
        "median",
        0,
    ),
    Target(
        "layer, forward and backward, dropout 0.1: PEFT's time over lora_ext's, geometric mean",
        "layers, dropout 0.1, geometric mean",
        "over_peft",
        1.15,
        at_least=True,
    ),
    Target(
        "the same without dropout",
        "layers, dropout 0.0, geometric mean",
        "over_peft",
        1.0,
        at_least=True,
    ),
    *(
        Target(
            f"layer, forward and backward, dropout {p}: time over the bare layer, worst of three",
            f"layers, dropout {p}, worst",
            "over_base",
            1.25,
        )
        for p in ("0.0", "0.1")
    ),
    *(
        Target(
            f"layer, dropout {p}: bytes kept for the backward over PEFT's, worst of three",
            f"layers, dropout {p}, kept for backward",
            "median",
            1.0,
        )
        for p in ("0.0", "0.1")
    ),
    *(
        Target(
            f"SmolLM2-shaped, r16: a step of one adapter, dropout {p}: {text} over PEFT's",
            f"step of one adapter, dropout {p}, {what}",
            "median",
            1.0,
        )
        for p in ("0.0", "0.1")
        for text, what in (
            ("peak memory", "peak"),
            ("bytes kept for the backward", "kept for backward"),
        )
    ),
    Target(
        "16 adapters x 16 tokens, forward and backward: 16 calls of PEFT over one of lora_ext",
        "16 adapters x 16 tokens",
        "over_peft",
        3.0,
        at_least=True,
    ),
    *(
        Target(
            f"SmolLM2-shaped, r16: a step of 8 adapters x {n} tokens, 8 steps of PEFT over it",
            f"step of 8 adapters x {n} tokens",
            "over_peft",
            3.0,
            at_least=True,
        )
        for n in (16, 64)
    ),
    Target(
        f"{MIX}: forward and backward, time of the chain of torch's ops over lora_ext's",
        f"{MIX}: forward and backward",
        "median",
        2.5,
        at_least=True,
        peer="chain",
    ),
    Target(
        f"{MIX}: forward, GB/s over this machine's copy",
        f"{MIX}: forward",
        "of_copy",
        0.60,
        at_least=True,
    ),
)
SHOWN = (
    "case provider dtype tokens adapters rank unit median p20 p80 gbytes_per_s of_copy over_base "
    "over_peft over_full worst_error"
).split()


def main() -> None:
    """Print the tables, and draw the chart if requested."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "csv", nargs="?", type=Path, default=ROOT / "benchmarks/results/lora_cpu.csv"
    )
    parser.add_argument("--chart", type=Path, help="save a chart of the whole-model times here")
    parser.add_argument("--all", action="store_true", help="also print every row")
    args = parser.parse_args()
    with args.csv.open(newline="") as file:
        rows = latest(list(csv.DictReader(file)))
    print(promises(rows))
    if args.all:
        for matrix in dict.fromkeys(row["matrix"] for row in rows):
            print(f"\n### {matrix}\n\n{table([r for r in rows if r['matrix'] == matrix])}")
    if args.chart:
        save_chart(rows, args.chart)


def latest(rows: Rows) -> Rows:
    """Return the last row of every case, provider, data type and rank."""
    keys = ("matrix", "case", "provider", "dtype", "rank")
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(row[k] for k in keys)
        found.pop(key, None)  # Rows keep the order of the last run.
        found[key] = row
    return list(found.values())


def promises(rows: Rows) -> str:
    """Return a Markdown table of targets and measured values, and a list of the machines used."""
    lines = ["| what | target | measured | PEFT | |", "|---|---|---|---|---|"]
    used: Rows = []
    for target in TARGETS:
        chosen = [r for r in rows if r["case"] == target.case]
        if target.rank:
            chosen = [r for r in chosen if r["rank"] == target.rank]
        ours = [r for r in chosen if r["provider"] == "lora_ext" and r[target.column]]
        sign = ">=" if target.at_least else "<="
        start = f"| {target.text} | {sign} {target.bound:g} |"
        if not ours:
            lines.append(f"{start} not measured | | |")
            continue
        used.append(ours[-1])
        value = float(ours[-1][target.column])
        if target.peer:
            (peer,) = (r for r in chosen if r["provider"] == target.peer)
            value = float(peer[target.column]) / value
        peft = [r["over_base"] for r in chosen if r["provider"] == "peft"]
        beside = peft[-1] if peft and target.column == "over_base" else ""
        lines.append(f"{start} {value:.3g} | {beside} | {'' if target.met(value) else 'missed'} |")
    pool = {r["case"]: r["median"] for r in rows if r["case"].startswith("pool")}
    if {"pool", "pool's pages"} <= pool.keys():
        found, pages = pool["pool"], pool["pool's pages"]
        fits = "" if found == pages else "missed"
        lines.append(f"| bytes of the pool, against its pages' | {pages} | {found} | | {fits} |")
    columns = ("date", "device", "cpu", "threads", "isa", "torch", "revision")
    machines = dict.fromkeys(
        ", ".join(f"{c} {r[c][:10] if c == 'date' else r[c]}" for c in columns if r.get(c))
        for r in used
    )
    return "\n".join([*lines, "", *(f"Measured: {machine}." for machine in machines)])


def table(rows: Rows) -> str:
    """Return a Markdown table of the columns in which at least one row has a value."""
    columns = [c for c in SHOWN if any(row[c] for row in rows)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row[c] for c in columns)} |" for row in rows]
    return "\n".join(lines)


def save_chart(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = [r for r in rows if r["matrix"] == "model"]
    cases = list(dict.fromkeys(r["case"] for r in model))
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    for index, provider in enumerate(("base", "lora_ext", "peft")):
        values = {r["case"]: float(r["over_base"]) for r in model if r["provider"] == provider}
        places = [i + 0.27 * (index - 1) for i in range(len(cases))]
        color = ("#999999", "#3f7fd9", "#d98c3f")[index]
        bars = axes.bar(
            places, [values.get(c, 0) for c in cases], 0.25, label=provider, color=color
        )
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("time over no adapters")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
