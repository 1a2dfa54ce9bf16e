"""Prompts that begin alike share blocks of keys and values, but never across adapters.

A block is found by a hash of its tokens. Here they carry the number of the adapter's version in
bits that no token has.
"""

from __future__ import annotations

from collections.abc import Sequence

_DIGITS = 4  # tokens that carry an adapter's number; a page holds at least as many


def marked(tokens: Sequence[int], number: int, vocab_size: int) -> list[int] | None:
    """The tokens with an adapter's number in the first page, or None where it has no room.

    Args:
        tokens: of a prompt, from its beginning. number: of the adapter's version, 0 the base model.
        vocab_size: every token is below it.
    """
    bits = (vocab_size - 1).bit_length()
    result = list(tokens)
    for i in range(min(_DIGITS, len(result))):
        number, digit = divmod(number, 1 << (31 - bits))
        result[i] = int(result[i]) + (digit << bits)  # a tensor would change in place
    return None if number else result
