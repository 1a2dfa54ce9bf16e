"""``lora-ext``: what people do to adapters without writing code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from ._arguments import make_parser
from ._output import Fault, printable

__all__ = ["main"]

# What bad input raises. Anything else is a defect of this package, and keeps its traceback.
_BAD_INPUT = (ValueError, NotImplementedError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: default are those of the process.

    Returns:
        the exit status: 0; 1 where doctor finds a fault or inspect a value that is not finite; 2 on
        bad input, after one sentence on standard error; 130 after Ctrl-C.

    Raises:
        SystemExit: after ``--help`` (0), ``--version`` (0) and arguments that are none (2).
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
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _BAD_INPUT as error:
        complain(error)
        return 2
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # of torch's, which has no kind of its own for it
            raise
        complain("expected an adapter that fits into memory, found a larger one")
        return 2
