"""The command line ``lora-ext``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from ._arguments import make_parser
from ._output import Fault, printable

__all__ = ["main"]

# Errors that bad input raises. Any other exception is a bug and keeps its traceback.
_BAD_INPUT = (ValueError, NotImplementedError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: default are those of the process.

    Returns:
        the exit status: 0 on success; 1 if doctor or gpu-report finds a fault or inspect a value
        that is not finite; 2 on bad input, after one sentence on standard error; 130 after Ctrl-C;
        141 if the reader of standard output has closed it.

    Raises:
        SystemExit: after ``--help`` (0), ``--version`` (0) and invalid arguments (2).
    """
    parsed = make_parser().parse_args(arguments)
    name = f"lora-ext {parsed.command}"

    def complain(words: object) -> None:
        print(f"{name}: {printable(' '.join(str(words).split()))}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
            try:
                status = parsed.run(parsed)
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
        if "allocate memory" not in str(error):  # torch has no exception type for this on a CPU.
            raise
        complain(f"expected an adapter that fits into memory: {error}")
        return 2
