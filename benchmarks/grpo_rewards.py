"""Train an adapter with TRL's AsyncGRPOTrainer against `lora-ext serve`, and measure its rewards.

The program is `examples/async_grpo.py`: TRL's trainer and client, unmodified except for the three
functions that need a GPU, train an adapter of SmolLM2-135M for 30 steps. Meanwhile another client
uses another adapter on the same server. The reward of an answer is the share of its words that
begin with a capital letter. For each of three seeds, `--check` expects that

* the mean reward of the last five steps exceeds that of the first five steps by at least 0.2; the
* mean ratio of probabilities (trainer over server) of the first step is within 1e-4 of 1; all
* answers of the other adapter, which are greedy, are equal.

Run `make demo` and `pip install trl aiohttp`, then `python benchmarks/grpo_rewards.py --check`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from common import ROOT, append_rows, machine_columns

STEPS, MEAN_OF = 30, 5
BATCH, GROUP = 16, 8  # answers per step, and per prompt
LEAST_GAIN = 0.2  # least difference of the mean rewards of the last and the first steps
LARGEST_RATIO_ERROR = 1e-4  # in the first step, whose answers come from the current adapter


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--check", action="store_true", help="exit with 1 below a target")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/grpo_rewards.csv")
    args = parser.parse_args()
    sys.path.append(str(ROOT / "examples"))
    import async_grpo

    met = True
    for seed in args.seeds:
        folder = ROOT / "out" / "grpo_rewards" / str(seed)
        lines, answers = async_grpo.main(args.steps, folder, seed=seed, batch=BATCH, group=GROUP)
        rewards = [line["reward"] for line in lines]
        first, last = (statistics.fmean(part) for part in (rewards[:MEAN_OF], rewards[-MEAN_OF:]))
        error = abs(lines[0]["ratio"] - 1)
        row: dict[str, object] = {"seed": seed, "batch": BATCH, "group": GROUP}
        row |= {"steps": len(lines), "first": f"{first:.4f}", "last": f"{last:.4f}"}
        row |= {"gain": f"{last - first:.4f}", "ratio_error": f"{error:.3g}"}
        row |= {"answers": len(answers), "distinct_answers": len(set(answers))}
        row["rewards"] = " ".join(f"{reward:.3f}" for reward in rewards)
        print(row, flush=True)
        append_rows(args.out, [{**machine_columns(), **row}])
        met &= last - first >= LEAST_GAIN and error <= LARGEST_RATIO_ERROR
        met &= len(lines) == args.steps and len(set(answers)) == 1
    return int(args.check and not met)


if __name__ == "__main__":
    sys.exit(main())
