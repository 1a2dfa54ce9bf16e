"""Tools for measurements: clocks, repetitions, errors, copy bandwidth, rows of csv files.

Compared calls run interleaved, one round of each at a time, so that a slow phase of the machine
affects all of them. The time of a call is the median over the rounds, with the 20th and 80th
percentile.
"""

from __future__ import annotations

import csv
import datetime
import functools
import gc
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], object]
# Least error that is assumed for a peer, as a share of the largest entry: 128 float32 roundings.
# The sums of a peer may be exact by chance, and correct sums in another order must still pass.
MIN_PEER_ERROR = 2.0**-17


@runtime_checkable
class Remote(Protocol):
    """Call in another process that measures its own time."""

    def __call__(self) -> object: ...
    def seconds(self, count: int) -> float:
        """Return the seconds that ``count`` calls take in the other process."""
        ...


@dataclass(frozen=True)
class Timing:
    """Seconds per call: one number per round, their median, and two percentiles."""

    median: float
    p20: float
    p80: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: list[float]) -> Timing:
        """Return the timing of these rounds, with their median and percentiles."""
        cuts = statistics.quantiles(rounds, n=5, method="inclusive") if rounds[1:] else rounds * 4
        return cls(statistics.median(rounds), cuts[0], cuts[3], tuple(rounds))

    def over(self, other: Timing) -> float:
        """Return the median, over the rounds, of this time divided by the time of ``other``."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleaved(
    calls: Mapping[str, Call], rounds: int = 7, min_seconds: float = 0.0, warm_up: int = 1
) -> dict[str, Timing]:
    """Time calls against each other on the CPU.

    Args:
        calls: Calls by name.
        rounds: Number of measurements of each call; every second round reverses the order of the
            calls.
        min_seconds: A measurement repeats its call until it takes about this long.
        warm_up: Number of calls of each function before the first measurement.
    """
    inner = {}
    for name, call in calls.items():
        for _ in range(warm_up):
            call()
        inner[name] = max(1, round(min_seconds / max(seconds(call, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        order = list(calls) if index % 2 == 0 else list(reversed(calls))
        for name in order:
            found[name].append(seconds(calls[name], inner[name]) / inner[name])
    return {name: Timing.of(rounds) for name, rounds in found.items()}


def seconds(call: Call, count: int) -> float:
    """Return the seconds of ``count`` calls; a call in another process uses its own clock."""
    if isinstance(call, Remote):
        return call.seconds(count)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def error_over_bound(
    ours: Tensor, peer: Tensor, exact: Tensor, least: float = MIN_PEER_ERROR
) -> float:
    """Return the largest error of ``ours`` divided by its bound; above 1 the result is wrong.

    The bound is three times the error of ``peer``, so it does not depend on the processor. If the
    largest error of ``peer`` is below ``least`` times the largest entry of ``exact``, that product
    is used instead.

    Args:
        ours: result to check.
        peer: result of another implementation, in the same dtype and on the same inputs.
        exact: result in float64 on the same inputs.
        least: least error of the peer, as a share of the largest entry.
    """
    exact = exact.double()
    error, peer_error = ((found.double() - exact).abs().max() for found in (ours, peer))
    bound = 3 * torch.maximum(peer_error, least * exact.abs().max())
    return float(error / bound.clamp(min=1e-300))


def copy_call(nbytes: int = 256 << 20, device: str = "cpu") -> tuple[Call, int]:
    """Return a call that copies more bytes than any cache can store, and the number of bytes that
    it reads and writes."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def peak_bytes(call: Call) -> int:
    """Return the peak of torch's CPU allocator during a call, beyond the bytes held before."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


@functools.cache
def machine_columns(device: str = "cpu") -> dict[str, object]:
    """Return the columns of a row that describe where and when the row was measured."""
    from lora_ext import _loader

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": _loader.load().cpu_isa() if device == "cpu" else "",
        "torch": torch.__version__,
        "revision": _revision(),
    }


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a csv file with the same columns.

    Rows that were written before the column ``cpu`` existed get an empty value in this column.

    Raises:
        ValueError: If the file has other columns.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            found, old = list(reader.fieldnames or []), list(reader)
        if found == [column for column in columns if column != "cpu"]:
            path.unlink()
            append_rows(path, [{column: row.get(column, "") for column in columns} for row in old])
        elif found != columns:
            raise ValueError(
                f"{path}: expected the columns {columns}, found {found}; move the file away"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _revision() -> str:
    """Return the commit, followed by "+" if files outside results/ have changed; "" without git."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if commit.returncode:
        return ""
    elsewhere = ["--", ".", ":!benchmarks/results"]  # the run itself adds rows there
    changes = subprocess.run(
        [*git, "status", "--porcelain", "-uno", *elsewhere], capture_output=True
    )
    return commit.stdout.strip() + ("+" if changes.stdout else "")
