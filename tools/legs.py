"""Run commands, each with a time limit and a log; one that fails does not stop the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Leg:
    """One step: a command, or a function that raises or returns a word for the summary."""

    name: str
    command: list[str] | Callable[[], str]
    seconds: int
    env: dict[str, str] = field(default_factory=dict)
    after: str | None = None  # skipped when this leg failed


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
        # A process group of its own, so that a time limit also ends what the command started.
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
        print("\n".join(lines[-60 if code else -400 :]), flush=True)
    return ("ok" if code == 0 else "FAILED"), (lines[-1][:100] if len(lines) > 1 else "")


def run(legs: list[Leg], logs: Path, show: bool = False) -> int:
    """Run every leg, print and write the summary; the number of legs that did not pass."""
    logs.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for leg in legs:
        if leg.after and any(r.leg.name == leg.after and r.outcome != "ok" for r in results):
            results.append(Result(leg, "skipped", 0.0, f"because `{leg.after}` failed"))
            continue
        print(f"== {leg.name}", flush=True)
        start = time.monotonic()
        log = logs / f"{leg.name.replace(' ', '_')}.log"
        if callable(leg.command):
            try:
                outcome, note = "ok", leg.command()
            except Exception as error:
                outcome, note = "FAILED", f"{type(error).__name__}: {error}"
            log.write_text(note + "\n")
        else:
            outcome, note = _run_command(leg, log, show)
        results.append(Result(leg, outcome, time.monotonic() - start, note))
    failed = sum(r.outcome != "ok" for r in results)
    lines = [f"{'step':22} {'outcome':8} {'seconds':>8}  last line"]
    lines += [f"{r.leg.name:22} {r.outcome:8} {r.seconds:8.1f}  {r.note}" for r in results]
    lines += [f"{sum(r.seconds for r in results):40.1f}  all", f"{failed} of {len(legs)} failed"]
    (logs / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]), flush=True)
    return failed
