"""Helpers for the tests of the command ``lora-ext``."""

import subprocess
import sys
from pathlib import Path

import lora_ext

ROOT = Path(lora_ext.__file__).parent.parent


def as_process(*arguments, **options):
    """Run a command in a separate process, and return the completed process."""
    return subprocess.run(
        [sys.executable, "-m", "lora_ext", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def assert_refused(found, *words):
    """Check that a command returned status 2, printed nothing to standard output, and one line that
    contains ``words`` to standard error."""
    status, out, err = found
    assert status == 2 and out == "", (out, err)
    assert err.count("\n") == 1 and "Traceback" not in err and err.startswith("lora-ext")
    for word in words:
        assert word in err
