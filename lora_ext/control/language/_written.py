"""Constraints from texts, words, regular expressions and JSON schemas."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_ext._checks import integer

from . import _algebra, _any_json, _keywords, _regex
from ._algebra import Automaton
from ._limits import DEFAULT, Clock, Limits
from ._vocabulary import vocabulary_of

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_KEPT = 64
_kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_kept_lock = threading.Lock()


class Written:
    """Constructors of :class:`~lora_ext.control.Constraint` that need a tokenizer.

    A constraint is built once and cached by its content and vocabulary. Constructors that use
    outlines-core raise ImportError without it, with the command that installs it.
    """

    @classmethod
    def _of(
        cls, what: str, automaton: Automaton, eos: tuple[int, ...], clock: Clock, part: str
    ) -> Self:
        raise NotImplementedError

    @classmethod
    def choice(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return the constraint that allows exactly the given texts, in any tokenization.

        Args:
            texts: at least one text.
            tokenizer: a tokenizer of transformers.
            vocab_size: ``V`` of the model, if it has more ids than the tokenizer.
            eos_token_id: the tokens that end a text; None uses the tokenizer's.
            limits: limits of states, bytes and seconds.

        Raises:
            ValueError: If there is no text, or the tokenizer cannot be used.
            ConstraintTooLarge: If it exceeds the limits.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("choice", (texts,), _keywords.choice, *how)

    @classmethod
    def keywords(
        cls,
        tokenizer: Any,
        all_of: Sequence[str | Sequence[str]] = (),
        none_of: Sequence[str] = (),
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return the constraint that a text contains all of some words and none of others.

        A word may be any substring of the text, in any tokenization: "dog" is contained in "a dog"
        and in "dogma".

        Args:
            tokenizer, vocab_size, eos_token_id, limits: see :meth:`choice`.
            all_of: words, or lists of words of which one must occur.
            none_of: words that must not occur.

        Raises:
            ValueError: If a word is empty, or words exclude each other.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("keywords", (all_of, none_of), _keywords.keywords, *how)

    @classmethod
    def regex(
        cls,
        pattern: str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        r"""Return the constraint that a whole text matches a regular expression.

        The syntax is that of Rust's regex crate, without ``\b``. ``^`` and ``$`` are only allowed
        at the beginning and end of the whole text, where they have no effect. A text with a NUL
        byte matches nothing. Needs the extra ``control``.

        Args:
            pattern: the expression.
            tokenizer, vocab_size, eos_token_id, limits: see :meth:`choice`.

        Raises:
            ValueError: If the expression is invalid.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("regex", (pattern,), _regex.pattern, *how)

    @classmethod
    def json_schema(
        cls,
        schema: dict[str, Any] | str,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return the constraint of JSON texts of a schema, with at most one space between parts.

        Properties have the order of the schema, and no other properties are allowed. ``date`` and
        ``date-time`` are checked for their format, not for the calendar. Needs the extra
        ``control``.

        Args:
            schema: a dictionary, or JSON.
            tokenizer, vocab_size, eos_token_id, limits: see :meth:`choice`.

        Raises:
            NotImplementedError: For a keyword that the automaton cannot enforce, such as
                ``minimum`` or ``uniqueItems``, which the message names; and for values of ``enum``
                and ``const`` that outlines-core would change: numbers with too many digits, or
                names with a special character of expressions.
            ValueError: If the schema is invalid.
        """
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("json_schema", (schema,), _regex.json_schema, *how)

    @classmethod
    def json_object(
        cls,
        tokenizer: Any,
        *,
        depth: int = _any_json.DEPTH,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        limits: Limits = DEFAULT,
    ) -> Self:
        """Return the constraint of JSON objects of any content, with at most one space between
        parts.

        Args:
            tokenizer, vocab_size, eos_token_id, limits: see :meth:`choice`.
            depth: levels of nested objects and arrays, including the outer object, at least 1;
                every level doubles the states.
        """
        integer("json_object", "depth", depth, 1)
        how = tokenizer, vocab_size, eos_token_id, limits
        return cls._spelled("json_object", (depth,), _any_json.json_object, *how)

    @classmethod
    def _spelled(
        cls,
        what: str,
        content: tuple[Any, ...],
        build: Callable[..., Automaton],
        tokenizer: Any,
        vocab_size: int | None,
        eos_token_id: int | Sequence[int] | None,
        limits: Limits,
    ) -> Self:
        """Build the constraint of an automaton over bytes; cached by its content."""
        vocabulary = vocabulary_of(what, tokenizer, vocab_size, eos_token_id)
        content = tuple(map(_settled, content))
        told = hashlib.blake2b(repr(content).encode(), digest_size=24).digest()
        key = (what, told, vocabulary.key, limits)
        with _kept_lock:
            if (found := _kept.get(key)) is not None:
                _kept.move_to_end(key)
                return found
        clock = Clock(what, limits)
        byte = _algebra.minimal(build(*content, clock), clock)
        part = f"{len(byte.table)} states over bytes times the vocabulary"
        tokens = _algebra.over_tokens(byte, vocabulary.tokens, clock, part)
        made = cls._of(what, tokens, vocabulary.eos, clock, part)
        with _kept_lock:
            _kept[key] = made
            while len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)
        return made


def _settled(content: Any) -> Any:
    """Convert nested iterables to lists, since ``repr`` abbreviates arrays and iterators."""
    if isinstance(content, (str, bytes, Mapping)) or not isinstance(content, Iterable):
        return content
    return [_settled(part) for part in content]
