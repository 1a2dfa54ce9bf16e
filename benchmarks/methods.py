"""Run the reproductions of all methods, and write docs/reproduction.md.

`python benchmarks/methods.py` runs `benchmarks/<method>.py --check` of every method, which measures
the arms without rows, then writes the page from the rows in benchmarks/results. An interrupted run
can be continued. The exit status is 1 if a criterion of a headline is not met.

    --only copra splora    runs only these studies; the page still contains all
    --from-results         runs no study
    --seeds N              number of seeds of each study, instead of that of its claim
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
from wrap_docs import wrapped  # noqa: E402  (after the change of sys.path)

PAGE = ROOT / "docs" / "reproduction.md"
INTRODUCTION = """# The papers' claims, and the results here

This page explains, for each method, what its paper claims and what a small reproduction found.

The experiments use pretrained models wherever two cores allow it. Criteria and seeds were committed
before the runs and not adapted afterwards. The verdict follows from the criteria of the headline
alone:

* *Reproduced*: all are met.
* *Direction only*: each is met, or its effect has the reported sign.
* *Not reproduced*: at least one effect does not have the reported sign.
* *Not run yet*: rows are missing, or the machine was too busy for timing. The page then shows the
  result of an earlier protocol, which is no verdict on this one.

Brackets contain 95 % bootstrap intervals over the seeds. A small reproduction neither proves nor
refutes a paper. A `+` after a revision means uncommitted changes.

`pip install --no-build-isolation '.[claims]'` installs the models and texts
(`benchmarks/claims/material.py` lists their licences). `python benchmarks/methods.py` measures what
is missing and writes this page; `--from-results` writes it from the existing rows.
"""


def main(arguments: list[str] | None = None) -> int:
    known = studies()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=known, metavar="METHOD", help="run these")
    parser.add_argument("--from-results", action="store_true", help="run no study")
    parser.add_argument("--seeds", type=int, metavar="N")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    failed = []
    if not args.from_results:
        failed = [name for name in args.only or known if not check(name, args.seeds)]
    args.page.write_text(wrapped(page(known)))
    print(f"wrote {args.page}")
    if failed:
        print(f"headline not met, or no result: {', '.join(failed)}")
    return int(bool(failed))


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
    """Return the page in Markdown: a table of all methods, then a section per method."""
    header = ("method", "paper", "headline", "verdict", "use it when", "not when")
    table, sections = [], []
    for name in names:
        module = importlib.import_module(name)
        rows, stale = found_rows(name, module)
        judged, claim = study.judge(module, rows), module.CLAIM
        row = (f"[{name}](#{name})", claim.paper, claim.headline, f"**{judged.word}**")
        table.append((*row, claim.use, claim.avoid))
        sections.append(section(name, module, rows, judged, stale))
    return "\n".join([INTRODUCTION, study.markdown(header, table), "", *sections])


def found_rows(name: str, module: ModuleType) -> tuple[study.Rows, int]:
    """Return the rows of the current settings, and the number of rows of other settings.

    If the texts are not installed, the settings of the last row count as the current ones.
    """
    path = study.RESULTS / f"{name}.csv"
    try:
        store = study.Store.of(path, module, quick=False)
    except (ModuleNotFoundError, RuntimeError, ValueError) as error:
        # The settings contain the hash of the texts; without them, those of the last row are used.
        print(f"{name}: {error}")
        store = study.Store.of_last(path)
    return store.rows(), store.others()


def told(judged: study.Judged, claim: study.Claim) -> str:
    """Return the result, after the number of seeds if some are missing, or the earlier result."""
    if not judged.seeds:
        return f"not run yet. Earlier protocol: {claim.earlier}"
    if judged.word != study.NOT_RUN:
        return judged.figure
    return f"{len(judged.seeds)} of {claim.seeds} seeds: {judged.figure}"


def section(
    name: str, module: ModuleType, rows: study.Rows, judged: study.Judged, stale: int
) -> str:
    """Return a method's section: claim, set-up, result, verdict, criteria, machine of the rows."""
    claim = module.CLAIM
    lines = [
        f"## {name}",
        "",
        f"* Claim: {claim.claim}",
        f"* Set-up: {claim.setup}",
        f"* Result: {told(judged, claim)}.",
        f"* Verdict: **{judged.word}** ([notes](notes/{name}.md)).",
    ]
    if judged.criteria:
        lines += ["", study.criteria_table(judged.criteria)]
    arms = study.arms_of(module, range(claim.seeds), quick=False)
    done = len(arms) - len(study.missing(arms, rows))
    measured = f"{done} of {len(arms)} arms have rows"
    if rows:
        revisions = ", ".join(sorted({str(row["revision"]) for row in rows}))
        first = rows[0]
        measured += (
            f"; {str(rows[0]['date'])[:10]}, {first['device']}, {first['threads']} threads, torch "
            f"{first['torch']}, revision {revisions}"
        )
    if stale:
        measured += f"; {stale} rows of other settings are not counted"
    return "\n".join([*lines, "", f"`python benchmarks/{name}.py --check`: {measured}.", ""])


if __name__ == "__main__":
    sys.exit(main())
