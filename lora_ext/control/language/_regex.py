"""Regular expressions and JSON schemas as automata over bytes, built by outlines-core.

outlines-core runs in a child process (``_byte_automaton.py``) with limits of time and memory, so
that no expression can block or crash the caller.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lora_ext._checks import require

from . import _schema as schemas
from ._algebra import Automaton
from ._anchors import unanchored
from ._limits import Clock
from ._vocabulary import utf8

_CHILD = Path(__file__).with_name("_byte_automaton.py")
_MEMORY = 2 << 30


def pattern(text: str, clock: Clock) -> Automaton:
    """Return the automaton of all texts that completely match a regular expression.

    Raises:
        ValueError: If the expression is invalid, or contains look-around or back references.
    """
    where = "regex: pattern"
    require(isinstance(text, str), "regex", "pattern", "a string", repr(text)[:80])
    _measure(where, text, clock)
    utf8("regex", "pattern", text)
    bare = unanchored("regex", "pattern", text)
    return _built(where, {"pattern": bare}, clock, repr(text)[:80])


def json_schema(schema: dict[str, Any] | str, clock: Clock) -> Automaton:
    """Return the automaton of JSON that satisfies a schema, with at most one space between parts.

    Raises:
        NotImplementedError: If the automaton cannot enforce a keyword.
        ValueError: If the schema is invalid.
    """
    where = "json_schema: schema"
    if isinstance(schema, str):
        _measure(where, schema, clock)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected JSON: {error!s:.120}") from None
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON values: {error!s:.120}") from None
    _measure(where, text, clock)
    utf8("json_schema", "schema", json.dumps(schema, ensure_ascii=False))
    schema = json.loads(text)  # a copy, because `check` may change it
    inner = schemas.check(schema)
    return _built(where, {"schema": json.dumps(schema), "inner": inner}, clock, text[:80])


def _measure(where: str, text: str, clock: Clock) -> None:
    most = clock.limits.max_pattern
    if len(text) > most:
        clock.refuse(f"{most} characters", f"{len(text)} in {where}")


def _built(where: str, request: dict[str, Any], clock: Clock, told: str) -> Automaton:
    found = importlib.util.find_spec("outlines_core")
    if found is None or found.origin is None:
        raise ImportError(
            f"{where}: expected an installed outlines-core, found none: run "
            "`pip install --no-build-isolation '.[control]'` in a checkout of lora_ext"
        )
    request |= {
        "folder": str(Path(found.origin).parent.parent),
        "seconds": clock.seconds_left,
        "bytes": _MEMORY,
    }
    try:
        answer = subprocess.run(
            [sys.executable, str(_CHILD)],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=max(0.1, clock.seconds_left),
            check=False,
        ).stdout
    except subprocess.TimeoutExpired:
        seconds = clock.limits.max_seconds
        clock.refuse(f"{seconds} seconds", f"more: check for nested repetitions in {told}")
    line, _, data = answer.partition(b"\n")
    head = json.loads(line) if line.startswith(b"{") else {}
    if "error" in head:
        if str(head["error"]).startswith("unsafe: "):
            raise NotImplementedError(
                f"{where}: expected patterns that only match the inside of a JSON string, found "
                f"one with a quote, backslash or control character: {head['error'][8:]!r:.80}"
            )
        raise ValueError(
            f"{where}: expected valid input of outlines-core, found {told}: {head['error']:.200}"
        )
    if "states" not in head or len(data) != 4 * 257 * head["states"]:
        clock.refuse(f"{_MEMORY} bytes", f"more: check for nested repetitions in {told}")
    states = head["states"]
    clock.states(states, f"the repetitions in {told}", merged=False)
    numbers = np.frombuffer(data, np.int32)
    table = numbers[: 256 * states].reshape(states, 256)
    return Automaton(np.arange(256, dtype=np.int32), table, numbers[256 * states :] > 0, 0)
