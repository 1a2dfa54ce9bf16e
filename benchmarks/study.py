"""The harness of the methods' small reproductions, `benchmarks/<method>.py`.

A study is a module with

    CLAIM = Claim(paper="...", claim="...", setup="...", seeds=3)
    def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]    a Row is a dict with "seed"
    def criteria(rows: Rows) -> list[Criterion]                        what --check applies
    def verdict(rows: Rows) -> Verdict                                 for docs/reproduction.md
    def show(rows: Rows) -> None                                       optional: prints its tables
    def draw(rows: Rows, path: Path) -> None                           optional: --picture PATH

    if __name__ == "__main__":
        sys.exit(study.run(sys.modules[__name__]))

`measure` yields numbers and strings under names that it chooses; rows may differ in their columns,
and "seed" names what a row was drawn from ("0+1" for a pair). The other functions get the rows as
they come back from the csv file, so that a run and its file are judged alike: numbers of six
digits, booleans as 0 and 1, "" where a row lacks a column.

    python benchmarks/<method>.py        measures, prints, adds rows to results/<method>.csv
        --check           exits with 1 where a criterion is not met
        --seeds N         seeds 0 to N - 1, instead of as many as the claim has
        --quick           smallest sizes, shows only that it works: writes no rows without --out
        --from-results    judges the last run of the csv file instead of measuring
        --full            also measures what no criterion asks for, where a study has it
        --out FOLDER      of the csv file          --picture PATH    draws the rows there

Criteria and verdicts are written down before the run: neither seeds nor thresholds follow it.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common import ROOT, append_rows, machine_columns

RESULTS = ROOT / "benchmarks" / "results"
REPRODUCED, DIRECTION, NOT_REPRODUCED = "reproduced", "direction only", "not reproduced"

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is tried here; one sentence each."""

    paper: str
    claim: str
    setup: str
    seeds: int = 3


@dataclass(frozen=True)
class Criterion:
    """A condition on the rows."""

    name: str
    asked: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """Our figure over the seeds, in words, and REPRODUCED, DIRECTION or NOT_REPRODUCED."""

    figure: str
    word: str

    def __post_init__(self) -> None:
        words = REPRODUCED, DIRECTION, NOT_REPRODUCED
        if self.word not in words:
            raise ValueError(f"Verdict: word: expected one of {words}, found {self.word!r}")


def run(study: ModuleType, arguments: list[str] | None = None) -> int:
    """The command line of a study; returns its exit status."""
    name = Path(str(study.__file__)).stem
    parser = argparse.ArgumentParser(description=(study.__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a criterion fails")
    parser.add_argument("--seeds", type=int, default=study.CLAIM.seeds, metavar="N")
    parser.add_argument("--quick", action="store_true", help="shows only that it works")
    if hasattr(study, "measure_full"):
        parser.add_argument("--full", action="store_true", help="also what no criterion asks for")
    parser.add_argument("--from-results", action="store_true", help="judge the last run instead")
    parser.add_argument("--out", type=Path, help="folder of the csv file")
    parser.add_argument("--picture", type=Path, help="draw the rows here")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, found {args.seeds}")
    if args.picture and not hasattr(study, "draw"):
        parser.error(f"--picture: {name} draws none")
    path = (args.out or RESULTS) / f"{name}.csv"
    if args.from_results:
        rows = last_run(path)
    else:
        start = time.perf_counter()
        full = getattr(args, "full", False)
        measure = study.measure_full if full else study.measure
        written = as_text(measure(range(args.seeds), args.quick))
        print(
            f"{time.perf_counter() - start:.0f} s, seeds {', '.join(map(str, range(args.seeds)))}"
        )
        if args.out or not args.quick:
            append_rows(path, [{**machine_columns(), **row} for row in written])
        rows = [_parsed(row) for row in written]
    if hasattr(study, "show"):
        study.show(rows)
    found = study.criteria(rows)
    print(criteria_table(found))
    verdict = study.verdict(rows)
    print(f"\n{verdict.word}: {verdict.figure}")
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        study.draw(rows, args.picture)
    return int(args.check and not all(c.passed for c in found))


def last_run(path: Path) -> Rows:
    """Rows of the last run in a csv file; one process writes one date.

    Raises:
        SystemExit: there is none.
    """
    if not path.exists():
        raise SystemExit(f"{path}: expected rows of an earlier run, found no file")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path}: expected rows of an earlier run, found none")
    return [_parsed(row) for row in rows if row["date"] == rows[-1]["date"]]


def as_text(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Rows as the file has them, all with the same columns."""
    rows = list(rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    if not rows or any("seed" not in row for row in rows):
        raise ValueError("measure: expected rows, each with a seed")
    return [{name: _text(row.get(name, "")) for name in columns} for row in rows]


def criteria_table(criteria: Sequence[Criterion]) -> str:
    """Markdown."""
    cells = [(c.name, c.asked, c.found, "yes" if c.passed else "**no**") for c in criteria]
    return markdown(("criterion", "asked", "found", "met"), cells)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, its columns aligned up to sixty characters so that it reads in a terminal too."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [min(60, max(map(len, column))) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def mean(rows: Iterable[Row], column: str, **where: object) -> float:
    """Of a column over the rows with these values.

    Raises:
        ValueError: no row has them.
    """
    found = [row[column] for row in rows if all(row[k] == v for k, v in where.items())]
    if not found:
        raise ValueError(f"mean: expected rows with {where}, found none")
    return sum(found) / len(found)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parsed(row: dict[str, str]) -> Row:
    return {name: text if name == "revision" else _number(text) for name, text in row.items()}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
