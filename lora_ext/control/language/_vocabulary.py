"""Conversion of a tokenizer's tokens to the bytes of their text.

Tokenizers write tokens in three notations: byte-level BPE (one letter per byte), SentencePiece
(``\u2581`` for a space, ``<0x0A>`` for a byte), and plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from lora_ext._checks import require

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "\u2581"


def utf8(where: str, argument: str, text: str) -> bytes:
    """Return the UTF-8 bytes of a text.

    Raises:
        ValueError: If the text contains an unpaired surrogate.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at index {error.start}"
    raise ValueError(f"{where}: {argument}: expected no unpaired surrogate, found {found}")


def end_tokens(where: str, eos: int | Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Check the end tokens; return them in ascending order."""
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    whole = bool(ends) and all(type(e) is int and 0 <= e < vocab_size for e in ends)
    require(whole, where, "eos_token_id", f"tokens in 0 .. {vocab_size - 1}", repr(eos))
    return tuple(sorted(set(ends)))


class Vocabulary:
    """Bytes of all tokens.

    Attributes:
        tokens: Bytes of each token. None for a token without text, which is an end token, padding,
            a special token of a chat, or an id that the tokenizer does not have.
        eos: Tokens that end a text.
        key: Hash of ``tokens`` and ``eos``.
    """

    def __init__(self, tokens: Sequence[bytes | None], eos: tuple[int, ...]):
        self.tokens = [None if i in eos else t for i, t in enumerate(tokens)]
        self.eos = eos
        self.key = hashlib.blake2b(repr((self.tokens, eos)).encode(), digest_size=24).digest()


_read: weakref.WeakKeyDictionary[Any, dict[tuple[object, ...], Vocabulary]]
_read = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary_of(
    where: str,
    tokenizer: Any,
    vocab_size: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Vocabulary:
    """Return the vocabulary of a transformers tokenizer, cached for the life of the tokenizer.

    Args:
        where: Name of the caller, for messages.
        tokenizer: Tokenizer with a method ``get_vocab``.
        vocab_size: Number of token ids of the model, if it is larger than the tokenizer's; None for
            the tokenizer's.
        eos_token_id: Token or tokens that end a text; None for the tokenizer's.

    Raises:
        ValueError: If the object is not a tokenizer, has no end token, or has more tokens than
            ``vocab_size``.
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    known = callable(getattr(tokenizer, "get_vocab", None))
    expected = "a transformers tokenizer, with get_vocab"
    require(known, where, "tokenizer", expected, type(tokenizer).__name__)
    eos = getattr(tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
    require(eos is not None, where, "tokenizer", "an end token (or set eos_token_id)", "none")
    assert eos is not None
    ids = tokenizer.get_vocab()
    fewest = max(ids.values()) + 1
    size = fewest if vocab_size is None else vocab_size
    require(size >= fewest, where, "vocab_size", f"at least {fewest}, the tokenizer's size", size)
    ends = end_tokens(where, eos, size)
    key = (len(ids), size, ends)
    with _lock:
        kept = _read.setdefault(tokenizer, {})
        if key not in kept:
            kept[key] = Vocabulary(_token_bytes(tokenizer, ids, size), ends)
        return kept[key]


def _token_bytes(tokenizer: Any, ids: dict[str, int], size: int) -> list[bytes | None]:
    letters = _byte_letters() if _is_byte_level(tokenizer, ids) else None
    special = {int(i) for i in getattr(tokenizer, "all_special_ids", ())}
    added: dict[int, str] = {}
    for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        added[int(i)] = str(getattr(token, "content", token))
        if getattr(token, "special", False):
            special.add(int(i))
    pieces = any(_SPACE in text for text in ids)
    tokens: list[bytes | None] = [None] * size
    for text, i in ids.items():
        if i in special or not 0 <= i < size:
            continue
        if i in added:
            tokens[i] = added[i].encode()
        elif letters is not None:
            if all(c in letters for c in text):
                tokens[i] = bytes(letters[c] for c in text)
        elif pieces and (byte := _BYTE.match(text)):
            tokens[i] = bytes([int(byte[1], 16)])
        else:
            tokens[i] = (text.replace(_SPACE, " ") if pieces else text).encode()
    return tokens


def _is_byte_level(tokenizer: Any, ids: dict[str, int]) -> bool:
    """Return whether tokens are written in the alphabet of byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        return '"ByteLevel"' in json.dumps([parts.get("decoder"), parts.get("pre_tokenizer")])
    return hasattr(tokenizer, "byte_decoder") or "\u0120" in ids  # a space in byte-level BPE


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of byte-level BPE; printable letters represent themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in plain}
    others = (b for b in range(256) if b not in set(plain))
    return letters | {chr(256 + i): b for i, b in enumerate(others)}
