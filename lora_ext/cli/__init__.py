"""Command-line program ``lora-ext``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from ._arguments import make_parser
from ._output import Fault, printable

__all__ = ["main"]

# Errors that bad input raises. Any other exception is a bug, and its traceback is printed.
_BAD_INPUT = (ValueError, NotImplementedError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command-line arguments; None uses the arguments of the process.

    Returns:
        The exit status: 0 on success; 1 if ``doctor`` or ``gpu-report`` finds a fault, or
        ``inspect`` finds a value that is not finite; 2 on bad input, which one sentence on standard
        error describes; 130 after Ctrl-C; 141 if the process that reads standard output has closed
        it.

    Raises:
        SystemExit: After ``--help`` and ``--version`` with status 0, and on invalid arguments with
            status 2.
    """
    parsed = make_parser().parse_args(arguments)
    name = f"lora-ext {parsed.command}"

    def complain(words: object) -> None:
        print(f"{name}: {printable(' '.join(str(words).split()))}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
            try:
                status = parsed.run(parsed) or 0  # only doctor returns a status
            except Fault as fault:
                complain(fault)
                status = 1
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:  # The reader has closed the pipe, as `head` does.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _BAD_INPUT as error:
        complain(error)
        return 2
    except RuntimeError as error:
        # On a CPU, torch has no separate exception type for a lack of memory.
        if "allocate memory" not in str(error):
            raise
        complain(f"expected an adapter that fits into memory: {error}")
        return 2
