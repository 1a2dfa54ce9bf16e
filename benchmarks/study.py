"""Framework of the methods' reproductions, `benchmarks/<method>.py`: rows, gates, verdicts.

A study is a module with

    CLAIM = Claim(...)                                       the paper's claim, and our advice
    def settings(quick) -> Mapping[str, object]              optional: what its figures depend on
    def trials(rows, quick) -> Iterable[Row]                 arms with seeds from 100 on, given the
                                                             rows of earlier ones: first those that
                                                             choose learning rates, then the gate's
    def gate(rows: Rows) -> list[Gate]                       judges the rows of the trials
    def arms(seeds, quick) -> Iterable[Row]                  optional: tasks, each with its "seed"
    def measure(arm: Row, quick: bool, rows: Rows) -> Iterable[Row]
                                                             rows of an arm, given earlier rows
    def criteria(rows: Rows) -> list[Criterion]              those of the headline give the verdict
    def figure(rows: Rows) -> str                            the result in words, with intervals
    def panels(rows: Rows) -> Panels                         optional: tables and picture
    def minutes(arm: Row) -> float                           expected duration on one core

    if __name__ == "__main__":
        sys.exit(study.run(sys.modules[__name__]))

The trials run first. From their rows, the gate checks whether the effect could be seen at all: the
arms have learned, there is room for a difference, the rivals differ, and costs are in the paper's
range. If the gate fails, the arms of the criteria do not run, and the verdict is "not testable
here". The criteria see only rows of the claim's seeds, and the gate only rows of the trials.

Without `arms`, each seed is one arm. Rows are written arm by arm, so an interrupted run can be
continued, and a run whose arms all have rows measures nothing. `claims.language.train` saves the
state of a long run in the user's cache every five minutes, and continues from it. Every row has the
hash of the settings; rows of other settings are neither judged nor counted. Only seeds with rows
for every arm are judged. There is no verdict until the number of these seeds is that of the claim.

    python benchmarks/<method>.py        runs the missing arms, adds their rows to results/*.csv,
                                         and prints the verdict
        --check           exits with 1 if the gate or a criterion of the headline is not met
        --seeds N         seeds 0 to N - 1, instead of the claim's number
        --quick           smallest sizes, only checks the code: writes no rows without --out
        --from-results    judges the existing rows instead of measuring
        --json            prints gate, criteria and verdict as JSON, all else on standard error
        --full            also measures arms without a criterion, if a study has `more`
        --also WORDS ...  of these arms, only those with the given values, such as "FIM:4 classes"
        --out FOLDER      of the csv file          --picture PATH    draws the panels there

Gates and criteria are fixed before the run: neither seeds nor thresholds depend on the results.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common import ROOT, machine_columns

from lora_ext.interop.smollm2 import cache_folder

RESULTS = ROOT / "benchmarks" / "results"
REPRODUCED, DIRECTION, NOT_REPRODUCED = "reproduced", "direction only", "not reproduced"
NOT_TESTABLE, NOT_RUN = "not testable here", "not run yet"
TRIALS = 100  # first seed of the trials, which choose rates and judge the gate
INSIDE = "inside the grid"  # condition of the gates of learning rates
SAVE_SECONDS = 300.0  # between two saved states of a run

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Claim:
    """Claim of a paper, its test here, and the advice for users.

    Attributes:
        headline: The criteria that give the verdict, in a few words.
        use, avoid: When to use the method, and when not.
        earlier: Result of the earlier protocol, with its verdict.
        gate: What must hold before the criteria are judged, in a few words.
        needs: What a test would need, if the gate fails.
    """

    paper: str
    claim: str
    setup: str
    headline: str
    use: str
    avoid: str
    seeds: int = 3
    earlier: str = ""
    gate: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Gate:
    """Condition on the trials without which the criteria cannot show the effect."""

    name: str
    asked: str
    found: str
    met: bool


@dataclass(frozen=True)
class Criterion:
    """Condition on the rows.

    Attributes:
        passed: Whether the criterion is met; None if it could not be measured, such as time on a
            busy machine.
        headline: Whether the verdict depends on it.
        points: Whether the effect has the paper's sign; ignored if the criterion is met.
    """

    name: str
    asked: str
    found: str
    passed: bool | None
    headline: bool = False
    points: bool = False


@dataclass(frozen=True)
class Interval:
    """Number with its 95 % interval."""

    middle: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        middle, low, high = (format(x, spec) for x in (self.middle, self.low, self.high))
        return f"{middle} [{low}, {high}]"


Panels = Mapping[str, Mapping[str, Interval]]  # by title, by label


def interval(
    values: Sequence[float] | Sequence[Sequence[float]],
    statistic: Callable[[Sequence[float]], float] = statistics.fmean,
    draws: int = 4000,
) -> Interval:
    """Return a figure with its 95 % percentile interval by bootstrap, from a fixed seed.

    Args:
        values: One number per seed, or several, such as one per device. If there are several, seeds
            are drawn with replacement, and then the numbers of each drawn seed.
        statistic: Function of one number per seed; several numbers of a seed count as their mean.
    """
    groups = [list(v) if isinstance(v, Sequence) else [v] for v in values]
    rng = random.Random(0)

    def once() -> float:
        chosen = rng.choices(groups, k=len(groups))
        return statistic([statistics.fmean(rng.choices(g, k=len(g))) for g in chosen])

    found = sorted(once() for _ in range(draws))
    middle = statistic([statistics.fmean(group) for group in groups])
    return Interval(middle, found[round(0.025 * (draws - 1))], found[round(0.975 * (draws - 1))])


@dataclass(frozen=True)
class Grid:
    """Grid of learning rates to try.

    If the best rate is at an end of the grid, a rate beyond this end is added.

    Attributes:
        rates: First rates, in rising order; rates are added at the distance of the first two.
        most: Largest number of added rates.
    """

    rates: tuple[float, ...]
    most: int = 3

    def asked(self, losses: Mapping[float, float]) -> list[float]:
        """Return the learning rates to try, given the losses of those that have been tried."""
        step, rates = self.rates[1] / self.rates[0], [_rounded(rate) for rate in self.rates]
        losses = {_rounded(rate): loss for rate, loss in losses.items()}
        while len(rates) < len(self.rates) + self.most and set(rates) <= set(losses):
            best = min(rates, key=lambda rate: _finite(losses[rate]))
            if best == rates[0]:
                rates.insert(0, _rounded(rates[0] / step))
            elif best == rates[-1]:
                rates.append(_rounded(rates[-1] * step))
            else:
                break
        return rates

    def best(self, losses: Mapping[float, float]) -> float:
        """Return the learning rate with the lowest loss; non-finite losses count as the worst."""
        return min(losses, key=lambda rate: _finite(losses[rate]))

    def gate(self, losses: Mapping[float, float], of: str = "") -> Gate:
        """Return the gate that requires the best learning rate to be inside the grid."""
        best, ends = self.best(losses), (min(losses), max(losses))
        found = f"{best:.3g} of {ends[0]:.3g} to {ends[1]:.3g}"
        return Gate(f"best rate{of and f' of {of}'}", INSIDE, found, best not in ends)


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")  # as in the csv files


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def gate_above(name: str, found: float, least: float, spec: str = ".3f") -> Gate:
    """Return the gate that ``found`` is at least ``least``."""
    return Gate(name, f"at least {least:g}", format(found, spec), found >= least)


def gate_between(name: str, found: float, low: float, high: float, spec: str = ".3f") -> Gate:
    """Return the gate that ``found`` is between ``low`` and ``high``."""
    return Gate(name, f"{low:g} to {high:g}", format(found, spec), low <= found <= high)


# -------------------------------------------------------------------------------------------------
# Judging


@dataclass(frozen=True)
class Judged:
    """Result, gate, criteria and verdict, with the seeds that they are based on."""

    seeds: tuple[int, ...]
    figure: str
    criteria: list[Criterion]
    word: str
    gate: list[Gate]

    @property
    def reason(self) -> str:
        """Gates that are not met, with what was expected and found."""
        return "; ".join(
            f"{each.name}: expected {each.asked}, found {each.found}"
            for each in self.gate
            if not each.met
        )

    def as_json(self) -> dict[str, object]:
        """Return the verdict, the gate and the criteria for a JSON file."""
        criteria = [
            {
                "name": each.name,
                "asked": each.asked,
                "found": each.found,
                "met": None if each.passed is None else bool(each.passed),
                "headline": each.headline,
            }
            for each in self.criteria
        ]
        gate = [{**vars(each), "met": bool(each.met)} for each in self.gate]
        found = {"verdict": self.word, "seeds": list(self.seeds), "figure": self.figure}
        return {**found, "gate": gate, "criteria": criteria}


def judge(study: ModuleType, rows: Rows, quick: bool = False) -> Judged:
    """Return the result and the verdict; there is no verdict until all seeds have rows.

    The gate is judged first, and only on rows of the trials. With ``quick``, the gate is ignored.
    """
    gate = judged_gate(study, rows, quick)
    if not gate:
        return Judged((), "", [], NOT_RUN, [])
    if not quick and not all(each.met for each in gate):
        return Judged((), "", [], NOT_TESTABLE, gate)
    seeds = whole_seeds(study, rows, quick)
    if not seeds:
        return Judged((), "", [], NOT_RUN, gate)
    rows = [row for row in rows if _seeds_of(row) <= set(seeds)]
    criteria = study.criteria(rows)
    head = [criterion for criterion in criteria if criterion.headline]
    if not head:
        raise ValueError(f"{study.__name__}: criteria: expected one with headline=True, found none")
    if len(seeds) < study.CLAIM.seeds or any(c.passed is None for c in head):
        word = NOT_RUN
    elif all(c.passed for c in head):
        word = REPRODUCED
    else:
        word = DIRECTION if all(c.passed or c.points for c in head) else NOT_REPRODUCED
    return Judged(seeds, study.figure(rows), criteria, word, gate)


def judged_gate(study: ModuleType, rows: Rows, quick: bool = False) -> list[Gate]:
    """Judge the gate by the rows of the trials; return [] if rows or the gate are missing.

    Raises:
        ValueError: If the gate has no condition.
    """
    if not hasattr(study, "gate") or missing(trials_of(study, rows, quick), rows):
        return []
    gate = list(study.gate(trial_rows(rows)))
    if not gate:
        raise ValueError(f"{study.__name__}: gate: expected at least one condition, found none")
    return gate


def trial_rows(rows: Rows) -> Rows:
    """Return the rows of the trials, which have seeds from 100 on."""
    return [row for row in rows if min(_seeds_of(row)) >= TRIALS]


def trials_of(study: ModuleType, rows: Rows, quick: bool) -> list[Row]:
    """Return the arms of the trials that can be determined from the rows measured so far.

    Raises:
        ValueError: If an arm has a seed of the criteria.
    """
    arms = list(getattr(study, "trials", lambda rows, quick: [])(trial_rows(rows), quick))
    for arm in arms:
        if min(_seeds_of(arm)) < TRIALS:
            raise ValueError(
                f"{study.__name__}: trials: expected seeds from {TRIALS} on, found {arm['seed']}"
            )
    return arms


def whole_seeds(study: ModuleType, rows: Rows, quick: bool = False) -> tuple[int, ...]:
    """Return the seeds of the claim, from 0 on, for which every arm has rows."""
    found: list[int] = []
    for seed in range(study.CLAIM.seeds):
        if missing(arms_of(study, range(seed + 1), quick), rows):
            break
        found.append(seed)
    return tuple(found)


def arms_of(study: ModuleType, seeds: Sequence[int], quick: bool) -> list[Row]:
    each = getattr(study, "arms", lambda seeds, quick: [{"seed": seed} for seed in seeds])
    return list(each(seeds, quick))


def missing(arms: Sequence[Row], rows: Rows) -> list[Row]:
    return [arm for arm in arms if not _has(rows, arm)]


def _has(rows: Rows, arm: Row) -> bool:
    return any(all(_same(row.get(k, ""), value) for k, value in arm.items()) for row in rows)


def _words(arm: Row) -> set[str]:
    return {str(value) for value in arm.values()}


def _same(found: object, asked: object) -> bool:
    return found == (_number(asked) if isinstance(asked, str) else asked)


def _seeds_of(row: Row) -> set[int]:
    return {int(seed) for seed in str(row["seed"]).split("+")}  # "0+1" is a pair of seeds


# -------------------------------------------------------------------------------------------------
# Rows


class Store:
    """Rows of a study in its csv file that have the same settings."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings

    @classmethod
    def of(cls, path: Path, study: ModuleType, quick: bool) -> Store:
        """Open the rows of the study's current settings."""
        given = getattr(study, "settings", lambda quick: {})(quick)
        text = json.dumps({"quick": quick, **given}, sort_keys=True, default=str)
        return cls(path, hashlib.blake2b(text.encode(), digest_size=4).hexdigest())

    @classmethod
    def of_last(cls, path: Path) -> Store:
        """Open the rows with the settings of the last row; used if the current ones are unknown."""
        rows = cls(path, "")._all()
        return cls(path, rows[-1]["settings"] if rows else "")

    def rows(self) -> Rows:
        """Return the rows of these settings."""
        return [_parsed(row) for row in self._all() if row.get("settings") == self.settings]

    def others(self) -> int:
        """Return the number of rows of other settings."""
        return len(self._all()) - len(self.rows())

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; if the process is killed, the old file remains."""
        first = {**machine_columns(), "settings": self.settings}
        new = [{**first, **{k: _text(v) for k, v in row.items()}} for row in rows]
        rows_ = [*self._all(), *new]
        columns = list(dict.fromkeys(name for row in rows_ for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", newline="", dir=self.path.parent, suffix=".part", delete=False
        ) as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows_)
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.path)

    def _all(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))


def measure_missing(study: ModuleType, store: Store, seeds: Sequence[int], args: Any) -> None:
    """Run the arms that have no rows, and write the rows of each arm when it ends.

    The trials run first. If the gate then fails, the arms of the criteria do not run.
    """
    from tqdm import tqdm

    if store.others():
        print(f"{store.path}: {store.others()} rows of other settings are not counted")
    while left := missing(trials_of(study, store.rows(), args.quick), store.rows()):
        print(f"trial: {_title(left[0])}", flush=True)
        _measure(study, store, left[0], args.quick)
    if not hasattr(study, "gate"):
        raise ValueError(f"{study.__name__}: expected a function `gate`, found none")
    gate = judged_gate(study, store.rows(), args.quick)
    arms: list[Row] = []
    if args.quick or all(each.met for each in gate):
        arms = arms_of(study, seeds, args.quick)
        if hasattr(study, "more"):
            asked = [set()] if args.full else [set(words.split(":")) for words in args.also]
            more = study.more(seeds, args.quick)
            arms += [arm for arm in more if any(each <= _words(arm) for each in asked)]
    left = missing(arms, store.rows())
    done = len(arms) - len(left)
    with tqdm(total=len(arms), initial=done, unit="arm", disable=None) as bar:
        for arm in left:
            bar.set_description(_title(arm))
            _measure(study, store, arm, args.quick)
            bar.update()
    for each in vars(study).values():  # Clear the caches of models and adapters that arms share.
        getattr(each, "cache_clear", lambda: None)()


def _title(arm: Row) -> str:
    return " ".join(str(value) for value in arm.values())


def _measure(study: ModuleType, store: Store, arm: Row, quick: bool) -> None:
    """Run one arm, write its rows with its duration, and remove its saved states."""
    global _states
    hashed = hashlib.blake2b(json.dumps(arm, sort_keys=True).encode(), digest_size=8).hexdigest()
    name = f"{Path(str(study.__file__)).stem}-{store.settings}"
    start, _states = time.monotonic(), cache_folder() / "claims" / name / hashed
    try:
        rows = [{**arm, **row} for row in study.measure(arm, quick, store.rows())]
        seconds = time.monotonic() - start
        store.add({**row, "seconds": float(f"{seconds:.3g}")} for row in rows)
        shutil.rmtree(_states, ignore_errors=True)
    finally:
        _states = None


def minutes_left(study: ModuleType, rows: Rows, seeds: int) -> float:
    """Return the minutes that the arms without rows need. An arm that was measured with other seeds
    is expected to take as long; others take ``study.minutes(arm)``."""
    arms = [*trials_of(study, rows, False), *arms_of(study, range(seeds), False)]
    gate = judged_gate(study, rows)
    if not all(each.met for each in gate):
        return 0.0
    total = 0.0
    for arm in missing(arms, rows):
        alike = {name: value for name, value in arm.items() if name != "seed"}
        seconds = [r["seconds"] for r in rows if _has([r], alike) and r.get("seconds", "") != ""]
        total += statistics.fmean(seconds) / 60 if seconds else study.minutes(arm)
    return total


# -------------------------------------------------------------------------------------------------
# Runs that can be resumed

_states: Path | None = None  # folder of the current run's saved states


class Checkpoint:
    """Saved state of a part of a run; nothing is saved outside of a run.

    Args:
        path: File of the state, or None.
    """

    def __init__(self, path: Path | None):
        self.path, self._saved = path, time.monotonic()

    def restored(self) -> Any:
        """Return the saved state, or None."""
        import torch

        if self.path is None or not self.path.exists():
            return None
        return torch.load(self.path, weights_only=True)

    def offer(self, state: Callable[[], Any]) -> None:
        """Save the result of ``state()`` if five minutes have passed since the last save."""
        import torch

        if self.path is None or time.monotonic() - self._saved < SAVE_SECONDS:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(state(), part)
        os.replace(part, self.path)
        self._saved = time.monotonic()


def checkpoint(part: str) -> Checkpoint:
    """Return the checkpoint of a part of the current run, such as one of its models."""
    return Checkpoint(_states / f"{part}.pt" if _states else None)


# -------------------------------------------------------------------------------------------------
# The command line


def run(study: ModuleType, arguments: list[str] | None = None) -> int:
    """Run the command line of a study; return its exit status."""
    args = _arguments(study, arguments)
    name = Path(str(study.__file__)).stem
    if not args.json:
        return _run(study, name, args)[0]
    with contextlib.redirect_stdout(sys.stderr):
        status, judged = _run(study, name, args)
    print(json.dumps({name: judged.as_json()}, indent=1))
    return status


def _run(study: ModuleType, name: str, args: argparse.Namespace) -> tuple[int, Judged]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or (Path(scratch) if args.quick else RESULTS)
        store = Store.of(folder / f"{name}.csv", study, args.quick)
        if not args.from_results:
            if not args.quick:
                left = minutes_left(study, store.rows(), args.seeds)
                print(f"{name}: about {left:.0f} minutes of training left", flush=True)
            measure_missing(study, store, range(args.seeds), args)
        rows = store.rows()
    if not rows:
        raise SystemExit(
            f"{store.path}: expected rows of settings {store.settings}, found {store.others()} "
            f"rows of other settings; `python benchmarks/{name}.py` measures the missing ones"
        )
    judged = judge(study, rows, args.quick)
    panels = study.panels(rows) if judged.seeds and hasattr(study, "panels") else {}
    for title, each in panels.items():
        print(f"\n{title}")
        print(markdown(("", "[95 %]"), [(k, f"{value:.3g}") for k, value in each.items()]))
    print(gate_table(judged.gate))
    if judged.word == NOT_TESTABLE:
        print(f"\n{judged.word}: {judged.reason}")
    else:
        print(criteria_table(judged.criteria))
        print(f"\n{judged.word}, {len(judged.seeds)} of {study.CLAIM.seeds} seeds: {judged.figure}")
    if args.picture and panels:
        draw_panels(panels, args.picture)
    met = [bool(c.passed) for c in judged.criteria if c.headline]
    return int(args.check and not (met and all(met))), judged


def _arguments(study: ModuleType, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(study.__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the headline fails")
    parser.add_argument("--seeds", type=int, default=study.CLAIM.seeds, metavar="N")
    parser.add_argument("--quick", action="store_true", help="only checks that it works")
    if hasattr(study, "more"):
        parser.add_argument("--full", action="store_true", help="run arms without criteria, too")
        parser.add_argument(
            "--also", nargs="+", default=(), metavar="WORDS", help="only these arms of --full"
        )
    parser.add_argument("--from-results", action="store_true", help="judge the existing rows")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("--out", type=Path, help="folder of the csv file")
    parser.add_argument("--picture", type=Path, help="draw the panels here")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, found {args.seeds}")
    if args.picture and not hasattr(study, "panels"):
        parser.error(f"--picture: {Path(str(study.__file__)).stem} has no panels")
    return args


def draw_panels(panels: Panels, path: Path) -> None:
    """Draw a panel per title, with a point and its interval per label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, tallest = max(1, len(panels)), max(map(len, panels.values()), default=1)
    figure, axes = pyplot.subplots(
        1, count, figsize=(4.4 * count, 1.2 + 0.34 * tallest), layout="constrained", squeeze=False
    )
    for axis, (title, each) in zip(axes[0], panels.items(), strict=False):
        for place, found in enumerate(each.values()):
            axis.plot([found.low, found.high], [place, place], color="0.45", lw=2)
            axis.plot(found.middle, place, "o", color="#0072B2")
        axis.set_yticks(range(len(each)), list(each))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def gate_table(gate: Sequence[Gate]) -> str:
    """Return the gate as a Markdown table."""
    cells = [(g.name, g.asked, g.found, "yes" if g.met else "**no**") for g in gate]
    return markdown(("gate", "asked", "found", "met"), cells) + "\n"


def criteria_table(criteria: Sequence[Criterion]) -> str:
    """Return the criteria as a Markdown table."""
    met = {True: "yes", False: "**no**", None: "left for a quiet machine"}
    cells = [
        (c.name + (" (headline)" if c.headline else ""), c.asked, c.found, met[c.passed])
        for c in criteria
    ]
    return markdown(("criterion", "asked", "found", "met"), cells)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, with columns aligned up to sixty characters for the terminal."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [min(60, max(map(len, column))) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def column(rows: Iterable[Row], name: str, **where: object) -> list[Any]:
    """Return a column of the rows that have the values in ``where``.

    Raises:
        ValueError: If no row has these values.
    """
    found = [row[name] for row in rows if all(row.get(k, "") == v for k, v in where.items())]
    if not found:
        raise ValueError(f"column: expected rows with {where}, found none")
    return found


def mean(rows: Iterable[Row], name: str, **where: object) -> float:
    """Return the mean of a column over the rows that have the values in ``where``."""
    return statistics.fmean(column(rows, name, **where))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parsed(row: dict[str, str]) -> Row:
    kept = ("revision", "settings")
    return {name: text if name in kept else _number(text) for name, text in row.items()}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
