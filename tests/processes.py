"""A group of two processes, for tests of distributed training.

The processes start once and then run one function after another, because starting them takes most
of the time of a short test. A function is found by its file and name, so it may be defined in a
test module that a new process cannot import.
"""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from scripts import module_of
from torch import distributed

WORLD = 2
# Time limit in seconds for a function and its imports, since deadlocked processes never end.
_TIMEOUT_S = 240.0


class TwoProcesses:
    """Group of two CPU processes with gloo. Call :meth:`close` at the end."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results of ``function(rank, *args)`` in the two processes, by rank.

        Args:
            function: Function at the top level of a module.
            args: Arguments that pickle can serialize.

        Raises:
            RuntimeError: If the function raises in a process, with its traceback, or takes too
                long. The next call starts new processes.
        """
        if not self._members:
            self._start()
        module = sys.modules[function.__module__]
        work = pickle.dumps((module.__file__, function.__qualname__, args))
        results: list[Any] = []
        failures: list[str] = []
        for _, pipe in self._members:
            pipe.send_bytes(work)
        for rank, (_, pipe) in enumerate(self._members):
            # If one process fails, the other one would wait for it for ever.
            if not pipe.poll(5.0 if failures else _TIMEOUT_S):
                failures.append(f"process {rank}: no answer")
                continue
            try:
                failure, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failure, result = "the process ended", None
            if failure:
                failures.append(f"process {rank}: {failure}")
            results.append(result)
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.terminate()
        for process, _ in self._members:
            process.join()
        self._members = []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, port), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))


def _serve(pipe: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
    )
    distributed.init_process_group(
        "gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=_TIMEOUT_S)
    )
    while True:
        try:
            path, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            module = module_of(Path(path), "of_processes_" + path.replace(os.sep, "_"))
            answer = None, getattr(module, name)(rank, *args)
            distributed.barrier()  # Each process waits until the other one is done.
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))
