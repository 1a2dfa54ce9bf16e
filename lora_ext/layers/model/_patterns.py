"""Safe matching of regular expressions from untrusted files.

PEFT reads several fields of a configuration as Python regular expressions. ``re`` backtracks, holds
the GIL and cannot be interrupted, so a pattern such as ``(a+)+$`` in a downloaded adapter would
block the server. Patterns that are plain names are therefore matched in this process, and all other
patterns in a child process that is killed after a timeout.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

TIMEOUT_S = 10.0
MAX_PATTERN = 1 << 16

# A dotted name, possibly anchored: the only operator is ".", so matching takes linear time.
_PLAIN = re.compile(r"\^?[\w.\-]*\$?")

_CHILD = """
import json, re, sys
jobs, names = json.load(sys.stdin)
out = []
for method, regex in jobs:
    try:
        find = getattr(re.compile(regex), method)
    except Exception as error:
        sys.exit(json.dump({"error": f"{regex!r}: {error}"}, sys.stdout))
    out.append([m and (m.groupdict().get("idx") or "") for m in map(find, names)])
json.dump(out, sys.stdout)
"""


@functools.lru_cache(maxsize=64)
def match_names(
    method: str, template: str, patterns: tuple[str, ...], names: tuple[str, ...]
) -> tuple[tuple[str | None, ...], ...]:
    """Match every pattern against every name; raise ValueError after a timeout.

    ``method`` is the name of a method of ``re.Pattern``, and ``template`` is a regular expression
    with ``{}`` in the position of the pattern. The result has one row per pattern and one entry per
    name: the text of group ``idx`` (empty if the template has no such group), or None if the name
    does not match.
    """
    rows: list[tuple[str | None, ...] | None] = [None] * len(patterns)
    hard: list[int] = []
    for i, pattern in enumerate(patterns):
        if (length := len(pattern)) > MAX_PATTERN:
            raise ValueError(f"expected at most {MAX_PATTERN} characters, found {length}")
        if not _PLAIN.fullmatch(pattern):
            hard.append(i)
            continue
        find = getattr(re.compile(template.replace("{}", pattern)), method)
        rows[i] = tuple(m and (m.groupdict().get("idx") or "") for m in map(find, names))
    if hard:
        jobs = [[method, template.replace("{}", patterns[i])] for i in hard]
        for i, row in zip(hard, _match_in_child(jobs, names), strict=True):
            rows[i] = tuple(row)
    return tuple(row for row in rows if row is not None)


def _match_in_child(jobs: list[list[str]], names: tuple[str, ...]) -> list[list[str | None]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([jobs, names]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"matching the regular expression took over {TIMEOUT_S:g} s (catastrophic "
            f"backtracking?): {jobs[0][1][:200]!r}"
        ) from None
    try:
        result = json.loads(done.stdout)
    except ValueError:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"matching the regular expression failed: {reason[0][:200]}") from None
    if isinstance(result, dict):
        raise ValueError(f"expected a regular expression, found {result['error'][:300]}")
    return result
