"""Run the reproductions of all methods, and write docs/reproduction.md.

`python benchmarks/methods.py` runs `benchmarks/<method>.py --check` of every method, which measures
the missing arms, then writes the page from the rows in benchmarks/results. An interrupted run can
be continued. The exit status is 1 if a gate or a criterion of a headline is not met.

    --only copra splora    runs only these studies; the page still contains all
    --from-results         runs no study
    --left                 only prints the minutes of training that each method still needs
    --json                 only prints gates, criteria and verdicts of the existing rows
    --seeds N              number of seeds of each study, instead of that of its claim
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import study
from common import ROOT

from lora_ext import methods

HERE = Path(__file__).parent
sys.path.append(str(ROOT / "tools"))
from wrap_docs import wrapped  # noqa: E402  (after the change of sys.path)

PAGE = ROOT / "docs" / "reproduction.md"
INTRODUCTION = """# The papers' claims, and the results here

This page explains, for each method, what its paper claims and what a small reproduction found.

Each claim has a *gate*, which is judged first, on separate seeds that also choose learning rates:
the models have learned, there is room for the effect, and costs are in the paper's range. Gates,
criteria and seeds were committed before the runs and not adapted afterwards. The criteria then give
the verdict:

* *Reproduced*: all are met.
* *Direction only*: each is met, or its effect has the reported sign.
* *Not reproduced*: at least one effect does not have the reported sign.
* *Not testable here*: the gate fails. This is no evidence about the paper.
* *Not run yet*: runs are missing, or the machine was busy. The result is an earlier one.

Brackets contain 95 % bootstrap intervals over the seeds.

`benchmarks/claims/material.py` says how to install models and texts. `python
benchmarks/methods.py` measures what is missing and writes this page (`--left`: minutes).
"""


def main(arguments: list[str] | None = None) -> int:
    known = studies()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=known, metavar="METHOD", help="methods to run")
    parser.add_argument("--from-results", action="store_true", help="run no study")
    parser.add_argument("--left", action="store_true", help="print the minutes of missing runs")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument("--seeds", type=int, metavar="N")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    if args.left or args.json:
        with contextlib.redirect_stdout(sys.stderr):
            found = {name: _rows_and_module(name) for name in args.only or known}
        if args.left:
            print(left(found))
        else:
            verdicts = {name: study.judge(m, rows).as_json() for name, (m, rows) in found.items()}
            print(json.dumps(verdicts, indent=1))
        return 0
    failed = []
    if not args.from_results:
        failed = [name for name in args.only or known if not check(name, args.seeds)]
    args.page.write_text(wrapped(page(known)))
    print(f"wrote {args.page}")
    if failed:
        print(f"headline not met, or no result: {', '.join(failed)}")
    return int(bool(failed))


def _rows_and_module(name: str) -> tuple[ModuleType, study.Rows]:
    module = importlib.import_module(name)
    return module, found_rows(name, module)[0]


def left(found: Mapping[str, tuple[ModuleType, study.Rows]]) -> str:
    """Return the minutes of training that each method still needs on one core, and their sum."""
    minutes = {
        name: study.minutes_left(module, rows, module.CLAIM.seeds)
        for name, (module, rows) in found.items()
    }
    lines = [f"{name:12s} {each:6.0f} minutes" for name, each in minutes.items()]
    return "\n".join([*lines, f"{'all':12s} {sum(minutes.values()):6.0f} minutes"])


def studies() -> list[str]:
    """Return the methods that have a reproduction."""
    return [name for name in methods.__all__ if (HERE / f"{name}.py").exists()]


def check(name: str, seeds: int | None) -> bool:
    """Run one study in a separate process; return whether its criteria are met."""
    print(f"== {name}", flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--check"]
    command += [] if seeds is None else ["--seeds", str(seeds)]
    return subprocess.run(command).returncode == 0


def page(names: Iterable[str]) -> str:
    """Return the page in Markdown: a table of verdicts, then a section per method."""
    table, sections = [], []
    for name in names:
        module = importlib.import_module(name)
        rows, stale = found_rows(name, module)
        judged, claim = study.judge(module, rows), module.CLAIM
        table.append((f"[{name}](#{name})", claim.paper, f"**{judged.word}**"))
        sections.append(section(name, module, rows, judged, stale))
    return "\n".join(
        [INTRODUCTION, study.markdown(("method", "paper", "verdict"), table), "", *sections]
    )


def found_rows(name: str, module: ModuleType) -> tuple[study.Rows, int]:
    """Return the rows of the current settings, and the number of rows of other settings.

    If the texts are not installed, the settings of the last row are used as the current settings.
    """
    path = study.RESULTS / f"{name}.csv"
    try:
        store = study.Store.of(path, module, quick=False)
    except (ModuleNotFoundError, RuntimeError, ValueError) as error:
        # The settings contain the hash of the texts; without the texts, the last row's settings are
        # used.
        print(f"{name}: {error}")
        store = study.Store.of_last(path)
    return store.rows(), store.others()


def told(judged: study.Judged, claim: study.Claim) -> str:
    """Return a text with the result, and the number of seeds if some seeds are missing. Without a
    result, the text contains the result of the earlier protocol. If the gate fails, it contains
    what a test would need."""
    if judged.word == study.NOT_TESTABLE:
        needs = claim.needs and f". A test would need {claim.needs}"
        return f"none, since the gate fails{needs}"
    if not judged.seeds:
        return f"none yet. Earlier protocol: {claim.earlier}"
    if judged.word != study.NOT_RUN:
        return judged.figure
    return f"{len(judged.seeds)} of {claim.seeds} seeds: {judged.figure}"


def gate_of(judged: study.Judged, claim: study.Claim) -> str:
    """Return the gate's conditions with the measured values, or the claim's text if the gate has
    not been judged."""
    if not judged.gate:
        return claim.gate
    rates = sum(g.met and g.asked == study.INSIDE for g in judged.gate)
    each = [
        g.name + f" {g.found}" + ("" if g.met else f" (**no**: {g.asked})")
        for g in judged.gate
        if not (g.met and g.asked == study.INSIDE)
    ]
    if rates:
        each.append(f"{rates} best rates {study.INSIDE}")
    return "; ".join(each)


def others(judged: study.Judged) -> str:
    """Return a text with the number of criteria that are met, and the missed criteria that the
    result does not name."""
    met = sum(bool(c.passed) for c in judged.criteria)
    missed = [
        f"{c.name}: {c.found} ({c.asked})"
        for c in judged.criteria
        if not c.passed and c.found not in judged.figure
    ]
    text = f"; {met} of {len(judged.criteria)} criteria are met"
    return f"{text}, not {'; '.join(missed)}" if missed else text


def section(
    name: str, module: ModuleType, rows: study.Rows, judged: study.Judged, stale: int
) -> str:
    """Return a method's section of the page: claim, set-up, gate, criterion, result and verdict."""
    claim = module.CLAIM
    judged_text = "" if judged.word == study.NOT_RUN or not judged.criteria else others(judged)
    lines = [
        f"## {name}",
        "",
        f"* Claim: {claim.claim}",
        f"* Set-up: {claim.setup}",
        f"* Gate: {gate_of(judged, claim)}.",
        f"* Criterion: {claim.headline}{judged_text}.",
        f"* Result: {told(judged, claim)}.",
        f"* Verdict: **{judged.word}** ([advice]({name}.md), [notes](notes/{name}.md)).",
    ]
    arms = [
        *study.trials_of(module, rows, False),
        *study.arms_of(module, range(claim.seeds), False),
    ]
    missing = len(study.missing(arms, rows))
    measured = f"{len(arms) - missing} of {len(arms)} runs have rows"
    if rows:
        revisions = ", ".join(sorted({str(row["revision"]) for row in rows}))
        cpu = rows[0].get("cpu") or rows[0]["device"]
        measured += f"; {str(rows[0]['date'])[:10]}, {cpu}, revision {revisions}"
    if stale:
        measured += f"; {stale} rows of earlier protocols are not counted"
    return "\n".join([*lines, "", f"`python benchmarks/{name}.py --check`: {measured}.", ""])


if __name__ == "__main__":
    sys.exit(main())
