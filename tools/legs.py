"""Run commands, each with a time limit and a log; a failed command does not stop the others.

The commands, called legs, run one after another. Legs with ``beside=True`` run in a second lane, so
that waiting for the network, or for a single process, leaves no core idle.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PRINTING = threading.Lock()


@dataclass
class Leg:
    """A command, or a function that returns a note for the summary and raises if it fails."""

    name: str
    command: list[str] | Callable[[], str]
    seconds: int
    env: dict[str, str] = field(default_factory=dict)
    after: str | None = None  # an earlier leg to wait for; if it failed, this leg is skipped
    beside: bool = False  # runs in the second lane, after earlier legs of that lane


@dataclass
class Result:
    leg: Leg
    outcome: str  # "ok", "FAILED", "timeout", "skipped"
    seconds: float
    note: str = ""


def _run_command(leg: Leg, log: Path, show: bool) -> tuple[str, str]:
    assert isinstance(leg.command, list)
    with log.open("w") as out:
        out.write("$ " + " ".join(leg.command) + "\n")
        out.flush()
        # A new process group, so that a time limit also ends the command's children.
        process = subprocess.Popen(
            leg.command,
            cwd=ROOT,
            env={**os.environ, **leg.env},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(leg.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "timeout", f"ended after its {leg.seconds} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if show or code:
        with _PRINTING:
            print(f"-- {leg.name}", *lines[-60 if code else -400 :], sep="\n", flush=True)
    return ("ok" if code == 0 else "FAILED"), (lines[-1][:100] if len(lines) > 1 else "")


def _run_leg(leg: Leg, logs: Path, show: bool) -> Result:
    with _PRINTING:
        print(f"== {leg.name}", flush=True)
    start = time.monotonic()
    log = logs / f"{leg.name.replace(' ', '_')}.log"
    try:
        if callable(leg.command):
            outcome, note = "ok", leg.command()
            log.write_text(note + "\n")
        else:
            outcome, note = _run_command(leg, log, show)
    except Exception as error:
        outcome, note = "FAILED", f"{type(error).__name__}: {error}"
        log.write_text(note + "\n")
    return Result(leg, outcome, time.monotonic() - start, note)


def run(legs: list[Leg], logs: Path, show: bool = False) -> int:
    """Run every leg, print and write the summary, and return the number of failed legs."""
    logs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Future[Result]] = {leg.name: Future() for leg in legs}
    start = time.monotonic()

    def lane(beside: bool) -> None:
        for leg in (leg for leg in legs if leg.beside == beside):
            if leg.after in found and found[leg.after].result().outcome != "ok":
                result = Result(leg, "skipped", 0.0, f"because `{leg.after}` failed")
            else:
                result = _run_leg(leg, logs, show)
            found[leg.name].set_result(result)

    with ThreadPoolExecutor(2) as lanes:
        for done in [lanes.submit(lane, beside) for beside in (False, True)]:
            done.result()
    results = [found[leg.name].result() for leg in legs]
    failed = sum(r.outcome != "ok" for r in results)
    lines = [f"{'step':22} {'outcome':8} {'seconds':>8}  last line"]
    lines += [f"{r.leg.name:22} {r.outcome:8} {r.seconds:8.1f}  {r.note}" for r in results]
    lines += [f"{time.monotonic() - start:40.1f}  all", f"{failed} of {len(legs)} failed"]
    (logs / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]), flush=True)
    return failed
