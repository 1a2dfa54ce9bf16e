r"""Anchors ``^`` and ``$`` (or ``\A`` and ``\z``) of expressions that match a whole text.

At the beginning and end of the text, anchors have no effect and are removed. outlines-core does not
support anchors in other positions, so they are rejected.
"""

from __future__ import annotations

import re

from lora_ext._checks import require

# Part of an expression: an escape, flags, the beginning of a character class, or a character.
_PART = re.compile(r"\\(?:[pP]\{[\w=!: .-]*\}|.)|\(\?[a-zA-Z-]+\)|\[\^?\]?|.", re.DOTALL)
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+\)")
_BEGIN, _END = ("^", r"\A"), ("$", r"\z")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


def unanchored(where: str, argument: str, pattern: str) -> str:
    """Return an expression without the ``^`` at the beginning and the ``$`` at the end of its
    alternatives.

    Args:
        where: Name of the caller, for the error message.
        argument: Name of the argument, for the error message.
        pattern: Expression in the syntax of Rust's regex crate.

    Raises:
        ValueError: If there is an anchor in any other position.
    """
    parts = _PART.findall(pattern)
    # A verbose expression may have comments with brackets, which hide where alternatives end. Then
    # only anchors at the two ends of the whole expression are removed.
    verbose = _VERBOSE.search(pattern) is not None
    kept: list[str] = []
    groups = classes = 0
    before = True  # whether only flags precede the current part in its alternative
    for i, part in enumerate(parts):
        if part in _BEGIN + _END and (verbose or not classes):
            first = part in _BEGIN and before
            last = part in _END and _ends(parts, i, verbose)
            expected = "^ and $ only at the beginning and end of the whole text"
            found = f"{part} as element {i + 1} of {pattern!r:.80}"
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
    """Return whether only end anchors follow ``parts[place]`` up to the next ``|`` or the end."""
    for part in parts[place + 1 :]:
        if part not in _END:
            return part == "|" and not verbose
    return True
