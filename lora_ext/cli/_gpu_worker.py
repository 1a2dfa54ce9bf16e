"""Process that runs the cases of ``lora-ext gpu-report`` for the command.

A faulty kernel may corrupt the CUDA context of its process, end the process, or never end. In each
case, only the check of this kernel fails, because the next check runs in a new process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ._output import Fault

# Limits in seconds. The start loads libraries and compiles PTX if the GPU is newer than the build.
MAX_START_S, MAX_CASE_S = 600.0, 120.0

# Function that runs in the process: it sends a description of the machine, or an error, and then
# answers each ``(step, op)`` with an entry of the report, and True if its CUDA context is corrupt.
Serve = Callable[[Connection, str], None]


class Worker:
    """Process that runs cases; it is started when a case needs it.

    Args:
        serve: module-level function that the process runs.
        backend: second argument of ``serve``.
        max_case_s: seconds after which a case without a result has failed.
    """

    def __init__(self, serve: Serve, backend: str, max_case_s: float = MAX_CASE_S):
        self._serve, self._backend, self._max_case_s = serve, backend, max_case_s
        self._connection: Connection | None = None
        self._process: Any = None
        self.seconds = 0.0  # spent in cases, without the start of processes

    def machine(self) -> dict[str, Any]:
        """Start the process, and return its description of the machine.

        Raises:
            Fault: If the process cannot run a case.
        """
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = theirs, self._backend
        self._process = spawn.Process(target=self._serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends recv()
        found = self._receive(MAX_START_S)
        if isinstance(found, str):
            raise Fault(f"expected a process that runs cases, found one that {found}")
        if isinstance(found, Exception):
            self.close()
            raise found
        return found

    def run(self, step: str, op: str) -> dict[str, Any] | str:
        """Run a case, and return its entry in the report, or how the process failed, as a text."""
        if self._connection is None:
            self.machine()
        assert self._connection is not None
        begin = time.monotonic()
        try:
            self._connection.send((step, op))
            found = self._receive(self._max_case_s)
        except ConnectionError:  # The process had already ended.
            found = self._receive(self._max_case_s)
        self.seconds += time.monotonic() - begin
        if isinstance(found, str):
            return found
        entry, spoiled = found
        if spoiled:
            self.close()
        return entry

    def _receive(self, seconds: float) -> Any:
        """Return what the process sent, or a text that says how it ended or how long it took."""
        assert self._connection is not None
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            words = f"gave no result in {seconds:.0f} s"
        except (EOFError, ConnectionResetError):
            self._process.join(seconds)
            words = f"ended with status {self._process.exitcode}"  # negative: a signal
        self.close()
        return words

    def close(self) -> None:
        """End the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(10)  # The driver may keep the process alive for longer.
            self._connection = None
