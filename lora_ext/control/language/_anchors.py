r"""The ``^`` and ``$`` (or ``\A`` and ``\z``) of expressions that match from end to end.

At the two ends they say nothing, and are dropped. Anywhere else outlines-core has no state for
them, or reads them as what never holds; so they are refused.
"""

from __future__ import annotations

import re

from lora_ext._checks import require

# What a look at single characters would misread: an escape, flags, the beginning of a class.
_PART = re.compile(r"\\(?:[pP]\{[\w=!: .-]*\}|.)|\(\?[a-zA-Z-]+\)|\[\^?\]?|.", re.DOTALL)
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+\)")
_BEGIN, _END = ("^", r"\A"), ("$", r"\z")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


def unanchored(where: str, argument: str, pattern: str) -> str:
    """Return the expression without the ``^`` that its alternatives begin with and the ``$`` that
    they end with.

    Args:
        where, argument: name the expression in the error.
        pattern: in the syntax of Rust's regex crate.

    Raises:
        ValueError: for one in another place.
    """
    parts = _PART.findall(pattern)
    # Comments may hide brackets then: only the two ends of the whole are told for certain.
    verbose = _VERBOSE.search(pattern) is not None
    kept: list[str] = []
    groups = classes = 0
    before = True  # nothing but flags since the alternative began
    for i, part in enumerate(parts):
        if part in _BEGIN + _END and (verbose or not classes):
            first = part in _BEGIN and before
            last = part in _END and _ends(parts, i, verbose)
            expected = "^ and $ at the beginning and end of the whole text alone"
            found = f"{part} as part {i + 1} of {pattern!r:.80}"
            require(groups == 0 and (first or last), where, argument, expected, found)
            continue
        kept.append(part)
        if classes or part[0] == "[":
            classes += (part[0] == "[") - (part == "]")
        elif not _FLAGS.fullmatch(part):
            groups += (part == "(") - (part == ")")
        if not _FLAGS.fullmatch(part):
            before = part == "|" and not (classes or groups or verbose)
    return "".join(kept)


def _ends(parts: list[str], place: int, verbose: bool) -> bool:
    """Return whether an alternative ends behind a place."""
    for part in parts[place + 1 :]:
        if part not in _END:
            return part == "|" and not verbose
    return True
