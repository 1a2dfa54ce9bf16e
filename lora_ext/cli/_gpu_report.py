"""``lora-ext gpu-report``: check and time the kernels on this GPU.

Nothing is compiled or installed. The report contains no names of people or machines and no paths.
The cases run in another process (``_gpu_worker.py``), so that a fault of one kernel does not end
the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_ext
from lora_ext import _loader, ops
from lora_ext._files import write_files

from ._gpu_cases import Case, convert, moved
from ._gpu_variants import all_cases
from ._gpu_worker import Worker
from ._output import Fault, say, table

FORMAT = 1
# Assumed memory bandwidth in bytes per microsecond, by compute capability.
_STREAM = {(9, 0): 2.7e6, (8, 0): 1.6e6, (8, 9): 0.27e6}
_FLUSH = 1 << 27  # bytes to write before each run, more than the size of any L2 cache
_FLUSHES = 16  # The writes outlast the host's launch of the run, so no host time is measured.
_RUNS = 20


def gpu_report(arguments: Any) -> None:
    """Check and time every kernel on this GPU, and write a report.

    Compares every op with its reference formula, and compares the time of its
    kernels with the time to move their bytes. Writes a JSON file and a Markdown
    page beside it. If a kernel crashes or hangs, its check fails, and the next check
    runs in a new process. Compiles and installs nothing. The report contains
    versions, GPU, clocks, the hash of the kernels, errors and times, but no names
    or paths. The exit status is 1 if a check fails.
    """
    out, limit = Path(arguments.out), 60 * arguments.minutes
    cases = _chosen(arguments.only)
    with closing(Worker(serve, arguments.backend)) as worker:
        report: dict[str, Any] = {"format": FORMAT, **worker.machine(), "running": None}
        report |= {"checks": [], "times": []}

        def run(step: str, case: Case) -> None:
            report["running"] = {"step": step, "op": case.op}
            _write(out, report)
            found = worker.run(step, case.op)
            if isinstance(found, str):
                found = {**_entry(step, case), "found": f"The process {found}."}
            report[f"{step}s"].append(found)

        for case in cases:
            run("check", case)
        checked = worker.seconds
        for case in [case for case in cases if case.timed]:
            if report["card"]["capability"] is None or worker.seconds - checked > limit:
                break  # Times are measured only on a GPU, and only until the time is up.
            run("time", case)
        report["running"] = None
        _write(out, report)
    say(page(report))
    failed = [check["op"] for check in report["checks"] if not check["ok"]]
    if failed:
        raise Fault(f"expected every check to pass, found failures of {', '.join(failed)}")


def serve(connection: Connection, backend: str) -> None:
    """Run cases of :func:`all_cases` in this process, as a :class:`Worker` requests them."""
    # All kernels are loaded, and compiled if they are PTX, when the CUDA context is created.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    try:
        with _backend(backend) as (device, module):
            torch.zeros((), device=device)  # creates the context
            connection.send(_machine(device, module))
            answer(connection, all_cases(), device)
    except Fault as fault:
        connection.send(fault)


def answer(connection: Connection, cases: Sequence[Case], device: torch.device) -> None:
    """Run requested cases until the connection is closed or a kernel corrupts the CUDA context."""
    known, spoiled = {case.op: case for case in cases}, False
    while not spoiled:
        try:
            step, op = connection.recv()
        except EOFError:
            return
        entry = (_check if step == "check" else _time)(known[op], device)
        spoiled = _spoiled(device)
        connection.send((entry, spoiled))


def _spoiled(device: torch.device) -> bool:
    """Return whether an error of a kernel makes every later call of this process fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def _chosen(only: str | None) -> list[Case]:
    cases = all_cases()
    if only is None:
        return cases
    wanted, known = only.split(","), [case.op for case in cases]
    for name in wanted:
        if not any(op.startswith(name) for op in known):
            raise ValueError(f"--only: expected prefixes of the names {known}, found {name!r}")
    return [case for case in cases if any(case.op.startswith(name) for name in wanted)]


@contextmanager
def _backend(name: str) -> Iterator[tuple[torch.device, Any]]:
    """Enter a context in which the ops run on ``name``: CUDA or the emulator.

    Yields the device and the compiled module.
    """
    if name == "cuda":
        module = _loader.load()
        if not torch.cuda.is_available():
            raise Fault("expected a GPU, found none; `lora-ext doctor` shows the reason")
        if not module.has_kernels():
            raise Fault("expected a build with CUDA kernels, found a build without CUDA")
        yield torch.device("cuda", torch.cuda.current_device()), module
        return
    try:
        module = _loader.load("_emu")
    except ImportError:
        raise Fault("expected a build with LORA_EXT_EMU=1, found no emulator") from None
    with ops.routed("lora_ext_emu"):
        yield torch.device("cpu"), module


def _machine(device: torch.device, module: Any) -> dict[str, Any]:
    """Return the versions, the properties of the GPU, and the hash of the compiled module."""
    built = {key: _loader.build_info().get(key) for key in ("torch", "cuda", "architectures")}
    card: dict[str, Any] = {"name": "emulator", "capability": None}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        card = {
            "name": found.name,
            "capability": [found.major, found.minor],
            "memory_gib": round(found.total_memory / 2**30),
            "multiprocessors": found.multi_processor_count,
            "shared_kib": found.shared_memory_per_block_optin // 1024,
            # CUDA version that the driver supports
            "driver": _or_none(getattr(torch._C, "_cuda_getDriverVersion", None)),
            "clock_mhz": _or_none(torch.cuda.clock_rate),
            "temperature": _or_none(torch.cuda.temperature),
        }
    return {
        "versions": {
            "lora_ext": lora_ext.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "build": built,
        "card": card,
        "module": hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest(),
    }


def _or_none(query: Any) -> Any:
    """Return ``query()``, or None if it raises, for example because a library is missing."""
    try:
        return query()
    except Exception:
        return None


def _inputs(case: Case, size: int, device: torch.device) -> dict[str, Any]:
    def move(t: Tensor) -> Tensor:
        return t.to(device, case.dtype if t.is_floating_point() else None)

    made = case.make(torch.Generator().manual_seed(0), size)
    given = convert({name: made[name] for name in case.inputs.split() or made}, move)
    return {**given, **{name: given[name].float() for name in case.floats.split()}}


def _entry(step: str, case: Case) -> dict[str, Any]:
    """Return the entry in the report for a case that has no result yet."""
    if step == "time":
        return {"op": case.op, "us": None, "floor_us": None}
    bound = 0 if case.exact else case.bound
    found = {"op": case.op, "launchers": case.launchers, "bound": bound}
    return {**found, "ok": False, "error": None}


def _check(case: Case, device: torch.device) -> dict[str, Any]:
    """Run a case at its small size and return its entry in the report.

    The entry contains the relative error and its bound, or the message of an exception.
    """
    entry = _entry("check", case)
    try:
        given = _inputs(case, 0, device)
        found = [t.detach().cpu().double() for t in case.run(given)]
        exact = convert(given, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())
        wanted = [t.detach().double() for t in case.formula(exact)]
        error = max(_error(a, b) for a, b in zip(found, wanted, strict=True))
    except Exception as raised:  # A kernel may raise anything on an untested GPU.
        words = re.sub(r"\S*[/\\\\]\S*", "...", f"{type(raised).__name__}: {raised}")
        return {**entry, "found": words[:200]}
    return {**entry, "error": error, "ok": error <= entry["bound"]}


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute error, divided by the largest absolute value of ``wanted``.

    Returns infinity if the shapes differ, or if NaN and infinity are not at the same positions.
    """
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), wanted.isfinite()):
        return float("inf")
    finite = wanted.isfinite()
    off = (found - wanted)[finite].abs().max() if finite.any() else torch.zeros(())
    most = wanted[finite].abs().max() if finite.any() else torch.ones(())
    return float(off / most) if most > 0 else float(off)


def _time(case: Case, device: torch.device) -> dict[str, Any]:
    """Time a case at its large size and return its entry in the report.

    The entry contains the median time with a flushed L2 cache, and the time to move the bytes of
    all arguments and results at the assumed bandwidth.
    """
    entry = _entry("time", case)
    try:
        given = _inputs(case, 1, device)
        call = case.ready(given)
        outputs = call()
        times = _measured(call, device)
    except Exception as raised:
        return {**entry, "found": type(raised).__name__}
    stream = _STREAM.get(torch.cuda.get_device_capability(device))
    floor = None if stream is None else moved(given, outputs) / stream
    shapes = [list(v.shape) for v in given.values() if isinstance(v, Tensor)]
    return {**entry, "us": times[len(times) // 2], "floor_us": floor, "shapes": shapes}


def _measured(run: Any, device: torch.device) -> list[float]:
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device)
    times = []
    for _ in range(_RUNS):
        for _ in range(_FLUSHES):
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times)


def _write(out: Path, report: dict[str, Any]) -> None:
    """Write the report and its Markdown page.

    This is called before every case, because a kernel may crash or stop the machine.
    """
    text = json.dumps(report, indent=1)
    files = {out.name: text, out.with_suffix(".md").name: page(report)}
    write_files(out.parent, {name: words.encode() for name, words in files.items()})


def page(report: dict[str, Any]) -> str:
    """Return the Markdown page of a report."""
    card, versions = report["card"], report["versions"]
    head = f"{card['name']}, lora_ext {versions['lora_ext']}, torch {versions['torch']}"
    times = {time["op"]: time for time in report["times"]}
    rows: Sequence[dict[str, Any]] = [
        {
            "op": check["op"],
            "check": "ok" if check["ok"] else "FAILED",
            "error": "-" if check["error"] is None else f"{check['error']:.1e}",
            "bound": f"{check['bound']:.1e}",
            "us": _microseconds(times.get(check["op"], {}).get("us")),
            "floor us": _microseconds(times.get(check["op"], {}).get("floor_us")),
        }
        for check in report["checks"]
    ]
    note = "" if report["times"] else "\nNo times were measured."
    if report["running"] is not None:
        note += "\nNot finished: {step} of {op}.".format(**report["running"])
    shown = table(rows) if rows else "No case has ended."
    return f"# {head}\n\n```\n{shown}\n```\n{note}"


def _microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
