"""Which part of LEGEND does what, on the digits of legend.py? `python benchmarks/legend_full.py`.

Its depths and its ranks apart, other targets, frozen layers sent along, speeds that must be learned
first, ranks that fall toward the output, and depth as the number of layers that Fed-HeLLo's draw
chooses; beside them fast devices alone, and ranks by device as in HetLoRA. Nothing is judged.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import legend
import study
from legend import KNOWN, METHODS, Method, middle, show
from study import DIRECTION, Criterion, Row, Rows, Verdict

CLAIM = dataclasses.replace(legend.CLAIM, seeds=3)
SKEWED = "3 classes"
FILLED = {**KNOWN, "mode": "balanced", "k_min": 3}
COUNT = {"depth_as_count": True}
OTHERS = {
    "legend, rank 4 in every layer": Method(ranks=(4,) * 6, settings=KNOWN),
    "all layers, ranks 1 to 6": Method(),
    "legend, ranks 6 to 1": Method(ranks=(6, 5, 4, 3, 2, 1), settings=KNOWN),
    "legend, frozen layers sent": Method(settings=KNOWN, others="frozen"),
    "legend, balanced, k_min 3": Method(settings=FILLED),
    "legend, speeds learned": Method(settings={}),
    "depth as count": Method(settings={**KNOWN, **COUNT}, others="frozen"),
    "depth as count, balanced, k_min 3": Method(settings={**FILLED, **COUNT}, others="frozen"),
    "fast devices alone": Method(fast_alone=True),
    "HetLoRA, ranks 4, 2, 1": Method(
        ranks=(4,) * 6, caps=(4, 2, 1), aggregation={"rank_agg": "zero_pad"}
    ),
}
__all__ = ["CLAIM", "criteria", "measure", "show", "verdict"]


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """One row for every seed, partition and method."""
    methods = {**METHODS, **OTHERS}
    runs = [(method, partition) for method in methods for partition in ("iid", SKEWED)]
    yield from legend.measured(seeds, quick, methods, runs)


def criteria(rows: Rows) -> list[Criterion]:
    """None."""
    return []


def verdict(rows: Rows) -> Verdict:
    """What random layers in the place of the last ones do where labels are skewed."""
    best = {m: middle(rows, "best", m, SKEWED) for m in ("uniform", "legend", "depth as count")}
    return Verdict(
        f"three classes a device, best accuracy: all layers {best['uniform']:.3f}, LEGEND "
        f"{best['legend']:.3f}, as many layers drawn at random {best['depth as count']:.3f}",
        DIRECTION,
    )


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
