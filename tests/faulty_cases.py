"""Cases of ``lora-ext gpu-report`` that give wrong results, or crash the process that runs them.

New processes import this file, because they cannot import a test module.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from lora_ext import ops
from lora_ext.cli import _gpu_report, _gpu_variants
from lora_ext.cli._gpu_cases import Case

END_S = 600.0  # A hanging case sleeps longer than any test waits.


def serve(connection: Connection, backend: str) -> None:
    """Answer with this process's id; "crash" kills it, "hang" blocks it, "spoil" retires it."""
    connection.send({"backend": backend})
    while True:
        try:
            _, op = connection.recv()
        except EOFError:
            return
        if op == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if op == "hang":
            time.sleep(END_S)
        connection.send(({"op": op, "process": os.getpid()}, op == "spoil"))


def cases() -> Sequence[Case]:
    """Return a wrong case, one that ends its process, and a correct one."""
    (case,) = (case for case in _gpu_variants.all_cases() if case.op == "lora_shrink")

    def wrong(of: Any, given: Any) -> Any:
        call = case.ready(given)
        return lambda: [2 * t for t in call()] if of is ops else case.formula(given)

    def crash(of: Any, given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)

    faulty = {"wrong": wrong, "crash": crash}
    return [*(replace(case, op=op, prepare=how) for op, how in faulty.items()), case]


def serve_cases(connection: Connection, backend: str) -> None:
    """Serve :func:`cases` in the way in which ``_gpu_report.serve`` serves all cases."""
    with _gpu_report._backend(backend) as (device, module):
        connection.send(_gpu_report._machine(device, module))
        _gpu_report.answer(connection, cases(), device)
