"""The small reproductions of all methods, and docs/reproduction.md: `python benchmarks/methods.py`.

Runs `benchmarks/<method>.py --check` of every method that has one, then writes the page from the
last run of each in benchmarks/results. Exits with 1 where a criterion is not met.

    --only copra splora    runs these alone; the page still tells of all
    --from-results         runs none
    --seeds N              of each, instead of as many as its claim has
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import study
from common import ROOT

from lora_ext import methods

HERE = Path(__file__).parent
sys.path.append(str(ROOT / "tools"))
from wrap_docs import wrapped  # noqa: E402  (it is beside the package)

PAGE = ROOT / "docs" / "reproduction.md"
INTRODUCTION = """# What the papers claim, and what came out here

Each method's central claim, tried small enough for two cores. Criteria were written down before the
runs, and neither seeds nor thresholds follow what came out. *Reproduced*: the claim came out, and
every criterion is met. *Direction only*: the effect is there and points the way the paper says, but
its size or extent is not. *Not reproduced*: it is not there. Criteria are what the exit status of a
benchmark asserts; a claim may be judged by figures beyond them, and fail where all are met. A small
reproduction neither proves nor refutes a paper. A + after a revision: the tree had changes beyond
it.

`python benchmarks/methods.py` runs all of them and writes this page; with `--from-results` it
writes the page from the rows of the last runs.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run, judge, write."""
    known = studies()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=known, metavar="METHOD", help="run these")
    parser.add_argument("--from-results", action="store_true", help="run none")
    parser.add_argument("--seeds", type=int, metavar="N")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    failed = []
    if not args.from_results:
        failed = [name for name in args.only or known if not check(name, args.seeds)]
    args.page.write_text(wrapped(page(known)))
    print(f"wrote {args.page}")
    if failed:
        print(f"criteria not met, or no result: {', '.join(failed)}")
    return int(bool(failed))


def studies() -> list[str]:
    """Methods that have a small reproduction."""
    return [name for name in methods.__all__ if (HERE / f"{name}.py").exists()]


def check(name: str, seeds: int | None) -> bool:
    """Run one in a process of its own; whether its criteria are met."""
    print(f"== {name}", flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--check"]
    command += [] if seeds is None else ["--seeds", str(seeds)]
    return subprocess.run(command).returncode == 0


def page(names: Iterable[str]) -> str:
    """Markdown: the verdicts, then a section for each method."""
    summary, sections = [], []
    for name in names:
        module = importlib.import_module(name)
        path = study.RESULTS / f"{name}.csv"
        if not path.exists():
            summary.append((name, "not run yet", ""))
            continue
        rows = study.last_run(path)
        verdict = module.verdict(rows)
        summary.append((f"[{name}](#{name})", verdict.word, verdict.figure))
        sections.append(section(name, module, rows))
    table = study.markdown(("method", "verdict", "our figure"), summary)
    return "\n".join([INTRODUCTION, table, "", *sections])


def section(name: str, module: ModuleType, rows: study.Rows) -> str:
    """Claim, set-up, figure, verdict, criteria, and what they were measured on."""
    claim, verdict, first = module.CLAIM, module.verdict(rows), rows[0]
    seeds = ", ".join(dict.fromkeys(str(row["seed"]) for row in rows))
    return f"""## {name}

* Paper: {claim.paper}.
* Claim: {claim.claim}
* Our set-up: {claim.setup}
* Our figure (seeds {seeds}): {verdict.figure}.
* Verdict: **{verdict.word}**.

{study.criteria_table(module.criteria(rows))}

`python benchmarks/{name}.py --check`, {str(first["date"])[:10]}, {first["device"]},
{first["threads"]} threads, torch {first["torch"]}, revision {first["revision"]}.
"""


if __name__ == "__main__":
    sys.exit(main())
